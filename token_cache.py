"""Tokenized files, kept between runs: the second run of a sweep starts without reading a csv file.

An entry is named by what its content follows from: the file's bytes, the task's columns, the tokenizer. An entry that
is damaged, or of another program or version, is made anew. The folder can be deleted at any time.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from datasets import DataFile, TokenizedRows, Tokenizer, TokenRows, parse_examples, read_content, text_hashes, tokenize
from run_record import read_file
from tasks import Task

MAGIC = "multitask-bert tokens 2"  # the number changes with anything that changes an entry's content
Warn = Callable[[str], None]


@dataclass(frozen=True)
class TokenFile:
    """A data file as token ids.

    text_hashes: (R,) uint64, equal for rows with equal texts. skipped: lines of the rows without a label.
    """

    rows: TokenizedRows
    text_hashes: np.ndarray
    skipped: tuple[int, ...]
    sha256: str


def tokenize_file(file: DataFile, task: Task, tokenizer: Tokenizer, device: torch.device) -> TokenFile:
    """The rows of a file that was read, without any cache."""
    rows = tokenize(task, file.examples, tokenizer, device)
    return TokenFile(rows, text_hashes(file.examples), file.skipped, file.sha256)


class TokenCache:
    """Token files from a folder, which they are put into when they are not there."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, warn: Warn) -> None:
        """warn: takes a line about an entry that cannot be used or written; neither ends a run."""
        self.folder = folder
        self.tokenizer = tokenizer
        self.warn = warn
        self._fingerprint = tokenizer.fingerprint()
        self._is_usable = True  # until an entry could not be read or written

    def load(self, path: Path, task: Task, labelled: bool, device: torch.device) -> TokenFile:
        """A data file as token ids. Raises DataError for a file that cannot be used."""
        content = read_content(path, task)
        sha256 = hashlib.sha256(content).hexdigest()
        key = self._key(path, task, labelled, sha256)
        entry = self.folder / f"{task.name}-{key[:32]}.tokens"
        try:
            if self._is_usable:
                return _unpacked(read_file(entry), key, task, sha256, device)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._give_up(entry, error)
        except (ValueError, KeyError) as error:
            self.warn(f"token cache: {entry} cannot be used ({error}) and is made anew")
        file = parse_examples(path, content, task, labelled)
        tokens = tokenize_file(file, task, self.tokenizer, device)
        self._write(entry, _packed(tokens, key))
        return tokens

    def _key(self, path: Path, task: Task, labelled: bool, sha256: str) -> str:
        columns = [task.delimiter or path.suffix, task.id_column, task.text_columns, task.label_column]
        parts = [MAGIC, sha256, *columns, repr(task.output), labelled, self._fingerprint]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _write(self, entry: Path, content: bytes) -> None:
        if not self._is_usable:
            return
        beside = entry.with_name(f".{uuid.uuid4().hex}.tmp")  # several runs may write the same entry
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(content)
            os.replace(beside, entry)
        except OSError as error:
            with suppress(OSError):
                beside.unlink()
            self._give_up(entry, error)

    def _give_up(self, entry: Path, error: OSError) -> None:
        self._is_usable = False
        self.warn(f"token cache: not used, {entry} cannot be read or written ({error.strerror})")


def _packed(file: TokenFile, key: str) -> bytes:
    """An entry: a line with its key and the checksum of the rest, then the arrays as safetensors."""
    from safetensors.numpy import save

    tokens, rows = file.rows.tokens, file.rows
    names = np.frombuffer(json.dumps(rows.ids).encode(), dtype=np.uint8)
    arrays = {"ids": tokens.ids, "lengths": tokens.lengths, "firsts": tokens.firsts, "labels": rows.labels}
    arrays |= {"text_hashes": file.text_hashes, "skipped": np.array(file.skipped, dtype=np.int64), "names": names}
    arrays["is_split"] = np.array([tokens.is_split])
    payload = save(arrays)
    return f"{MAGIC} {key} {hashlib.sha256(payload).hexdigest()}\n".encode() + payload


def _unpacked(content: bytes, key: str, task: Task, sha256: str, device: torch.device) -> TokenFile:
    """Raises ValueError or KeyError for what `_packed` did not write under this key."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    head, _, payload = content.partition(b"\n")
    if head != f"{MAGIC} {key} {hashlib.sha256(payload).hexdigest()}".encode():
        raise ValueError("damaged, or written for something else")
    try:
        arrays = load(payload)
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    tokens = TokenRows(arrays["ids"], arrays["lengths"], arrays["firsts"], bool(arrays["is_split"][0]))
    names = json.loads(arrays["names"].tobytes())
    rows = TokenizedRows(task, names, arrays["labels"], tokens, device)
    return TokenFile(rows, arrays["text_hashes"], tuple(arrays["skipped"].tolist()), sha256)
