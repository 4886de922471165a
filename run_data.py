"""The data of a run: files read through the cache, training rows filtered and augmented, what was found told."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import Config
from datasets import TokenizedRows, Tokenizer, data_folder, longest_cut, read_examples, tokenize
from eda import AUGMENTATIONS
from messages import SCRIPT, command, counted, here
from seeding import derive_seed
from tasks import SPLITS, TASKS, Task
from token_cache import TokenCache, TokenFile, Warn, tokenize_file

NUM_NAMED = 20  # rows without a label that are named one by one

Load = Callable[[Path, Task, bool, torch.device], TokenFile]  # path, task, whether it has labels, device


@dataclass
class Data:
    """The rows of a run by task; test files may be absent. files: what config.json records of each file."""

    train: dict[str, TokenizedRows] = field(default_factory=dict)
    dev: dict[str, TokenizedRows] = field(default_factory=dict)
    test: dict[str, TokenizedRows] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def load_data(config: Config, tokenizer: Tokenizer, device: torch.device) -> Data:
    """The rows of the chosen tasks. Raises DataError for a file that cannot be used."""
    folder = data_folder(config.data)
    data = Data()
    load = token_loader(config, tokenizer, data.notes.append)
    for task in (TASKS[name] for name in config.tasks):
        hashes: dict[str, np.ndarray] = {}
        for split in SPLITS:
            path = task.path(split, folder)
            is_absent = not task.file_name(split) or (split == "test" and not task.folder and not os.path.lexists(path))
            if is_absent or (split == "train" and not config.trains):
                continue
            file = load(path, task, split != "test", device)
            hashes[split] = file.text_hashes
            record = {"rows": len(file.rows), "skipped": list(file.skipped), "sha256": file.sha256}
            data.files[task.file_key(split)] = record
            data.notes.extend(_skipped_note(path, file.skipped))
            rows = file.rows if split != "train" else _training_rows(config, path, file.rows, tokenizer, data)
            getattr(data, split)[task.name] = rows
        data.notes.extend(_leak_warning(config, task, hashes))
    return data


def token_loader(config: Config, tokenizer: Tokenizer, warn: Warn) -> Load:
    """How data files become token ids: through the cache beside the run's directory, unless that is switched off."""
    if config.cache != "off":
        folder = Path(config.cache) if config.cache else Path(config.out).parent / ".cache"
        return TokenCache(folder, tokenizer, warn).load
    return lambda path, task, labelled, device: tokenize_file(
        read_examples(path, task, labelled), task, tokenizer, device
    )


def _skipped_note(path: Path, skipped: Sequence[int]) -> list[str]:
    if not skipped:
        return []
    lines = ", ".join(f"{path}:{line}" for line in skipped[:NUM_NAMED])
    more = f" and {len(skipped) - NUM_NAMED} more" if len(skipped) > NUM_NAMED else ""
    return [f"skipped {counted(len(skipped), 'row')} without a label: {lines}{more}"]


def _leak_warning(config: Config, task: Task, hashes: Mapping[str, np.ndarray]) -> list[str]:
    """A line where rows of the dev file stand in the training file too: their scores are worth nothing."""
    if "train" not in hashes:
        return []
    num_leaked = int(np.isin(hashes["dev"], hashes["train"]).sum())
    if num_leaked == 0:
        return []
    described = command(
        "python", here(SCRIPT.with_name("datasets.py")), config.data, *(f"--task_file={x}" for x in config.task_file)
    )
    is_known = config.task_file or not task.folder  # else its definition is a run's, which datasets.py does not read
    names = f"; `{described}` names them" if is_known else ""
    return [
        f"warning: {num_leaked} of {len(hashes['dev'])} dev rows of {task.name} stand in its training file too{names}"
    ]


def _whole_lengths(path: Path, rows: TokenizedRows, tokenizer: Tokenizer) -> np.ndarray:
    """(R,) tokens of each row, both sentences of a pair together, before truncation."""
    lengths = rows.tokens.lengths.copy()
    full = np.flatnonzero(rows.tokens.longest == tokenizer.max_length)
    if len(full):
        examples = read_examples(path, rows.task, labelled=True).examples
        lengths[full] = [tokenizer.num_tokens(examples[row].texts) for row in full]
    return lengths


def _training_rows(config: Config, path: Path, rows: TokenizedRows, tokenizer: Tokenizer, data: Data) -> TokenizedRows:
    """The rows to train on: without the longest, then with edited rows, so that classes end up equal in number."""
    kept = np.arange(len(rows))
    if config.drop_longest:
        kept, longest = longest_cut(_whole_lengths(path, rows, tokenizer), config.drop_longest)
        num_dropped = len(rows) - len(kept)
        rows = rows.select(kept)
        dropped = counted(num_dropped, "row")
        data.notes.append(f"{path.name}: left out the longest {dropped}, the longest that stays has {longest} tokens")
        data.files[rows.task.file_key("train")].update(dropped_longest=num_dropped, longest_tokens=longest)
    for name in config.chosen("augment"):
        examples = read_examples(path, rows.task, labelled=True).examples
        augmentation = AUGMENTATIONS[name](config.choice("augment", name).parameters)
        seed = derive_seed(config.seed, name, rows.task.name)
        added = augmentation.added(rows.task, [examples[row] for row in kept], seed)
        if added:
            data.notes.append(f"{path.name}: added {len(added)} edited rows ({name})")
            data.files[rows.task.file_key("train")]["augmented_rows"] = len(added)
            rows = rows.followed_by(tokenize(rows.task, added, tokenizer, rows.device))
    return rows
