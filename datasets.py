"""From csv files to batches: rows are read and checked, tokenized once, and packed.

CS224N's files are tab-separated despite their name. Columns are found by name; a row whose label is empty is skipped
and reported; anything else that is wrong is a `DataError` with file and line, and up to ROWS_NAMED such rows at once.

Shape letters: R rows of a data set, N packed tokens, B rows of a batch.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bert import CheckpointError
from distributed import ALONE, ProcessGroup
from messages import counted, shown
from ops import PackedTokens, TokenStore, to_device
from run_record import read_file
from tasks import SPLITS, TASKS, Task
from tsv import DELIMITERS, json_rows, numbered_rows

SAMPLE = Path(__file__).resolve().parent / "data" / "sample"
ROBERTAS = {"PAD": "<pad>", "UNK": "<unk>", "CLS": "<s>", "SEP": "</s>", "MASK": "<mask>"}  # for BERT's [PAD], ...
ROWS_NAMED = 5  # of a file's that cannot be used
ROWS_PER_CALL = 4096  # the tokenizer's results hold a hundred times the memory of the ids that are kept of them


class DataError(ValueError):
    """A data file cannot be used; each argument is a line with file, line, what was found and what is allowed."""


class OutputError(ValueError):
    """A model gives no numbers; the message is one line for the user."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a file. label: NaN where the split has none. line: the row's first line in the file."""

    id: str
    texts: tuple[str, ...]
    label: float
    line: int


@dataclass(frozen=True)
class DataFile:
    """A file as it was read. skipped: lines of the rows without a label."""

    path: Path
    examples: list[Example]
    skipped: tuple[int, ...]
    sha256: str


def data_folder(name: str, flag: str = "--data ") -> Path:
    """The directory of `--data`: the project's own sample, or a directory by its path. flag: how errors name it."""
    folder = SAMPLE if name == "sample" else Path(name)
    if not folder.is_dir():
        raise DataError(f"{flag}{name}: no such directory; expected 'sample' or a directory with CS224N's files")
    return folder


def tasks_in(name: str) -> list[str]:
    """The tasks with files in the directory of `--data`; all where there are none."""
    folder = SAMPLE if name == "sample" else Path(name)
    found = [name for name, task in TASKS.items() if any(task.path(split, folder).is_file() for split in SPLITS)]
    return found or list(TASKS)


def read_content(path: Path, task: Task) -> bytes:
    """A file whole. Raises DataError if it cannot be read."""
    try:
        return read_file(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}, expected the {task.title} rows") from None


def read_examples(path: Path, task: Task, labelled: bool) -> DataFile:
    """The rows of a file. labelled: whether the split has labels. Raises DataError for anything that is wrong."""
    return parse_examples(path, read_content(path, task), task, labelled)


def parse_examples(path: Path, content: bytes, task: Task, labelled: bool) -> DataFile:
    """The rows of a file's content. labelled: whether the split has labels. path: for error messages."""
    wanted = task.columns(labelled)
    delimiter = "" if path.suffix == ".jsonl" else task.delimiter or DELIMITERS[path.suffix]
    as_table, as_json = (path, content, DataError, delimiter), (path, content, DataError, wanted)
    rows = numbered_rows(*as_table) if delimiter else json_rows(*as_json)
    header = next(rows, None)
    if header is None:
        raise DataError(f"{path}: the file is empty, expected a header line and rows")
    columns = _columns(path, header[1], wanted, delimiter)
    examples, skipped, problems = list[Example](), list[int](), list[str]()
    for line, cells in rows:
        try:
            example = _example(path, line, cells, len(header[1]), columns, task)
        except DataError as error:
            problems.append(str(error))
            continue
        if labelled and np.isnan(example.label):
            skipped.append(line)
        else:
            examples.append(example)
    if problems:
        rest = len(problems) - ROWS_NAMED
        more = [f"{path}: {counted(rest, 'more row')} that cannot be used"] if rest > 0 else []
        raise DataError(*problems[:ROWS_NAMED], *more)
    if not examples:
        place = " below the header" * bool(delimiter)
        raise DataError(f"{path}: no rows{' with a label' * bool(skipped)}{place}, expected at least one")
    return DataFile(path, examples, tuple(skipped), hashlib.sha256(content).hexdigest())


def _columns(path: Path, header: Sequence[str], wanted: Sequence[str], delimiter: str) -> dict[str, int]:
    """Where the columns that the task needs stand."""
    names = [name.strip() for name in header]
    missing = [name for name in wanted if name not in names]
    if missing:
        if len(names) == 1 and any(mark in names[0] for mark in ",;\t"):
            mark = "tab" if delimiter == "\t" else repr(delimiter)
            found = shown(repr(names[0]))
            raise DataError(f"{path}:1: no {mark} in the header {found}, expected {mark}-separated columns")
        found = shown(", ".join(repr(name) for name in names if name) or "none")
        raise DataError(f"{path}:1: no column {missing[0]!r}, found {found}; expected {', '.join(wanted)}")
    if twice := [name for name in wanted if names.count(name) > 1]:
        raise DataError(f"{path}:1: {names.count(twice[0])} columns {twice[0]!r}, expected one")
    return {name: names.index(name) for name in wanted}


def _example(
    path: Path, line: int, cells: Sequence[str], num_columns: int, columns: dict[str, int], task: Task
) -> Example:
    if len(cells) != num_columns:
        raise DataError(f"{path}:{line}: {counted(len(cells), 'column')}, expected {num_columns} as in the header")
    label = float("nan")
    if task.label_column in columns:
        cell = cells[columns[task.label_column]].strip()
        try:
            label = task.output.parse(cell) if cell else label
        except ValueError:
            raise DataError(
                f"{path}:{line}: {task.label_column} is {shown(repr(cell))}, expected {task.output.allowed}"
            ) from None
    texts = tuple(cells[columns[name]] for name in task.text_columns)
    return Example(cells[columns[task.id_column]].strip() if task.id_column else str(line), texts, label, line)


# --------------------------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """The tokenizer of a checkpoint: texts to token ids, with its special tokens around them: BERT's `[CLS] a [SEP]`
    and `[CLS] a [SEP] b [SEP]`, RoBERTa's `<s> a </s>` and `<s> a </s></s> b </s>`."""

    def __init__(self, folder: Path, max_length: int, is_siamese: bool = False) -> None:
        """folder: holds tokenizer.json, or vocab.txt. max_length: tokens of a sequence, the special ones included.
        is_siamese: the texts of a pair are a sequence each."""
        self.folder = folder
        self.max_length, self.is_siamese = max_length, is_siamese
        self._tokenizer = _load_tokenizer(folder)
        num_embeddings = _read_json(folder / "config.json").get("vocab_size")
        last = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if isinstance(num_embeddings, int) and last >= num_embeddings:
            raise CheckpointError(
                f"{folder}: the tokenizer has token ids up to {last}, expected less than the model's vocab_size "
                f"{num_embeddings}"
            )
        self.special_tokens = {num_texts: self._special_around(num_texts) for num_texts in (1, 2)}
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)

    def _special_around(self, num_texts: int) -> list[list[int]]:
        """The special tokens of a sequence: before the first text, and behind each."""
        encoding = self._tokenizer.encode(*["a"] * num_texts)
        around: list[list[int]] = [[]]
        for token_id, text in zip(encoding.ids, encoding.sequence_ids, strict=True):
            if text is None:
                around[-1].append(token_id)
            elif text == len(around) - 1:
                around.append([])
        if len(around) == num_texts + 1 and all(around):
            return around
        return [[self._special("CLS")], *[[self._special("SEP")]] * num_texts]

    def _special(self, name: str) -> int:
        """The token's id, by the name that the checkpoint gives it, or BERT's or RoBERTa's."""
        names = _read_json(self.folder / "special_tokens_map.json") | _read_json(self.folder / "tokenizer_config.json")
        given = names.get(f"{name.lower()}_token")
        given = given.get("content") if isinstance(given, dict) else given
        tokens = [given] if given else [f"[{name}]", ROBERTAS[name]]
        ids = [self._tokenizer.token_to_id(str(token)) for token in tokens]
        if all(token_id is None for token_id in ids):
            found = f"the tokenizer has no token {shown(tokens[0])}"
            raise CheckpointError(f"{self.folder}: {found}, expected that of a BERT")
        return int(next(token_id for token_id in ids if token_id is not None))

    def special_ids(self) -> dict[str, int]:
        """Of BERT's special tokens. Raises CheckpointError if one is not there."""
        return {name: self._special(name) for name in ROBERTAS}

    def save(self, path: Path) -> None:
        """Writes it as tokenizer.json, which neither pads nor truncates."""
        path.write_text(self._tokenizer.to_str(), "utf-8")

    def fingerprint(self) -> str:
        """Changes with anything that changes token ids."""
        content = f"{self.max_length} {self.is_siamese} {self._tokenizer.to_str()}"
        return hashlib.sha256(content.encode()).hexdigest()

    def num_tokens(self, texts: tuple[str, ...]) -> int:
        """Tokens of a row before truncation, the special ones included."""
        encodings = self._encodings(list(texts))
        num_special = self._num_special(1) * len(texts) if self.is_siamese else self._num_special(len(texts))
        return num_special + sum(len(encoding.ids) for encoding in encodings)

    def cuts(self, texts: tuple[str, ...]) -> bool:
        """Whether `encode` leaves out tokens of a row."""
        sequences = [(text,) for text in texts] if self.is_siamese else [texts]
        return any(
            len("".join(of).encode()) > self.max_length - self._num_special(len(of))  # no token is less than a byte
            and self.num_tokens(of) > self.max_length
            for of in sequences
        )

    def _num_special(self, num_texts: int) -> int:
        """Special tokens of a sequence."""
        return sum(map(len, self.special_tokens[num_texts]))

    def _encodings(self, texts: list[str]) -> list[Any]:
        try:
            return list(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # such as the library's panic over a regular expression, which is no Exception
            raise CheckpointError(f"{self.folder}: the tokenizer cannot be used ({shown(error)})") from None

    def encode(self, rows: Sequence[tuple[str, ...]]) -> "TokenRows":
        """Token ids of rows of one or two texts each, truncated on the longer text where a sequence is too long."""
        parts = [self._encode_chunk(rows[i : i + ROWS_PER_CALL]) for i in range(0, len(rows), ROWS_PER_CALL)]
        return TokenRows.concatenate(parts)

    def _encode_chunk(self, rows: Sequence[tuple[str, ...]]) -> "TokenRows":
        num_texts = len(rows[0])
        flat = [text for row in rows for text in row]
        encodings = self._encodings(flat)
        pieces = [encoding.ids for encoding in encodings]
        ids: list[int] = []
        lengths, firsts = [], []
        for start in range(0, len(pieces), num_texts):
            row, before, ends = pieces[start : start + num_texts], len(ids), list[int]()
            if self.is_siamese:
                sequences = [[part[: self.max_length - self._num_special(1)]] for part in row]
            else:
                sequences = [truncate(row, self.max_length - self._num_special(num_texts))]
            for sequence in sequences:
                first, *behind = self.special_tokens[len(sequence)]
                ids.extend(first)
                for part, special in zip(sequence, behind, strict=True):
                    ids.extend(part)
                    ids.extend(special)
                    ends.append(len(ids))
            firsts.append(ends[0] - before)
            lengths.append(len(ids) - before)
        is_split = self.is_siamese and num_texts == 2
        return TokenRows(np.array(ids, np.int32), np.array(lengths, np.int32), np.array(firsts, np.int32), is_split)


def truncate(texts: Sequence[list[int]], budget: int) -> list[list[int]]:
    """Token lists that together have at most `budget` tokens, shortened at the end of the longest first."""
    lengths = [len(text) for text in texts]
    while sum(lengths) > budget:
        longest = max(range(len(lengths)), key=lambda i: (lengths[i], i))
        others = [length for i, length in enumerate(lengths) if i != longest]
        target = max([budget - sum(others), *others])
        lengths[longest] = target if target < lengths[longest] else lengths[longest] - 1
    return [text[:length] for text, length in zip(texts, lengths, strict=True)]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(read_file(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


@contextmanager
def _reading_tokenizer(files: str) -> Iterator[None]:
    """Whatever goes wrong is a line about these files: tokenizers raises plain Exception for any malformed one."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{files}: not readable as a tokenizer ({error})") from None


def _load_tokenizer(folder: Path) -> Any:
    """A `tokenizers.Tokenizer` without truncation and padding, which are our own business."""
    from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer
    from tokenizers import Tokenizer as Fast
    from tokenizers.processors import RobertaProcessing

    path = folder / "tokenizer.json"
    if path.is_file():
        with _reading_tokenizer(str(path)):
            tokenizer = Fast.from_file(str(path))
    elif (folder / "vocab.txt").is_file():
        path, settings = folder / "vocab.txt", _read_json(folder / "tokenizer_config.json")
        with _reading_tokenizer(f"{path}, tokenizer_config.json"):
            tokenizer = BertWordPieceTokenizer(
                str(path),
                lowercase=settings.get("do_lower_case", True),
                strip_accents=settings.get("strip_accents"),
                handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
            )._tokenizer
        tokenizer.post_processor = None  # the special tokens are those of the settings
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        path = folder / "vocab.json"
        with _reading_tokenizer(f"{path}, merges.txt"):
            tokenizer = ByteLevelBPETokenizer(str(path), str(folder / "merges.txt"))._tokenizer
        tokenizer.add_special_tokens(list(ROBERTAS.values()))
        cls, sep = ((name, tokenizer.token_to_id(name)) for name in (ROBERTAS["CLS"], ROBERTAS["SEP"]))
        tokenizer.post_processor = RobertaProcessing(sep, cls)
    else:
        raise CheckpointError(f"{folder}: no tokenizer, expected tokenizer.json, vocab.txt or vocab.json, merges.txt")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


# ---------------------------------------------------------------------------------------------------- data sets


@dataclass(frozen=True)
class TokenRows:
    """Token ids of R rows in flat arrays: ids (sum of lengths,), lengths (R,), firsts (R,) tokens of the first text.

    is_split: the first text and the second are a sequence each.
    """

    ids: np.ndarray
    lengths: np.ndarray
    firsts: np.ndarray
    is_split: bool = False

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> np.ndarray:
        """(R,) tokens of each row's longest sequence."""
        return np.maximum(self.firsts, self.lengths - self.firsts) if self.is_split else self.lengths

    @cached_property
    def starts(self) -> np.ndarray:
        """(R,) where each row begins."""
        return np.array(np.cumsum(self.lengths, dtype=np.int64) - self.lengths)

    @classmethod
    def concatenate(cls, parts: Sequence["TokenRows"]) -> "TokenRows":
        """The rows of all parts, in order; all are split, or none."""
        columns = [[part.ids for part in parts], [part.lengths for part in parts], [part.firsts for part in parts]]
        ids, lengths, firsts = (np.concatenate([np.empty(0, np.int32), *column]) for column in columns)
        (is_split,) = {part.is_split for part in parts} or {False}
        return cls(ids, lengths, firsts, is_split)


@dataclass(frozen=True)
class Batch:
    """Rows: packed tokens or, for a frozen encoder, pooled features (B, F); labels (B,), NaN where unknown."""

    labels: Tensor
    tokens: PackedTokens | None = None
    features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


class Rows(Protocol):
    """Rows of one task that batches are made of."""

    labels: np.ndarray

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The rows of these numbers, in this order: evaluation's way, which has the numbers on the host."""
        ...

    def num_places(self, rows: np.ndarray) -> int:
        """Tokens of a batch of these rows, with those that belong to no row; 0 where there are none."""
        ...

    def gather(self, rows: Tensor, num_places: int) -> Batch:
        """The same batch for numbers (B,) that are on the device: training's way, as a CUDA graph can record it."""
        ...

    def by_length(self) -> np.ndarray:
        """All row numbers, the longest rows first: no later batch needs more memory than the first."""
        ...


@dataclass
class TokenizedRows:
    """Rows as token ids. ids: the rows' names in their file; labels: (R,) float32, NaN where unknown."""

    task: Task
    ids: list[str]
    labels: np.ndarray
    tokens: TokenRows
    device: torch.device

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def _store(self) -> TokenStore:
        tokens = self.tokens
        return TokenStore.of(tokens.ids, tokens.lengths, tokens.firsts, self.device, tokens.is_split)

    @cached_property
    def _labels(self) -> Tensor:
        return torch.from_numpy(self.labels).to(self.device)

    def num_places(self, rows: np.ndarray) -> int:
        return self._store.num_places(rows)

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        index = np.asarray(rows, dtype=np.int64)
        return self.gather(to_device(index, self.device), self.num_places(index))

    def gather(self, rows: Tensor, num_places: int) -> Batch:
        return Batch(self._labels[rows], tokens=self._store.gather(rows, num_places))

    def by_length(self) -> np.ndarray:
        return np.argsort(-self.tokens.lengths, kind="stable")

    def by_sequence(self) -> "TokenizedRows":
        """The two sequences of split rows as a row each; other rows as they are."""
        tokens = self.tokens
        if not tokens.is_split:
            return self
        lengths = np.stack([tokens.firsts, tokens.lengths - tokens.firsts], 1).ravel()  # (R,) -> (2 R,)
        names, labels = [name for name in self.ids for _ in range(2)], np.repeat(self.labels, 2)
        return TokenizedRows(self.task, names, labels, TokenRows(tokens.ids, lengths, lengths), self.device)

    def select(self, rows: np.ndarray) -> "TokenizedRows":
        """These rows only, in this order."""
        tokens, lengths = self.tokens, self.tokens.lengths[rows]
        pieces = [tokens.ids[first : first + n] for first, n in zip(tokens.starts[rows], lengths, strict=True)]
        ids = np.concatenate([np.empty(0, np.int32), *pieces])
        tokens = TokenRows(ids, lengths, tokens.firsts[rows], tokens.is_split)
        return TokenizedRows(self.task, [self.ids[r] for r in rows], self.labels[rows], tokens, self.device)

    def followed_by(self, others: "TokenizedRows") -> "TokenizedRows":
        """These rows, then the others."""
        tokens = TokenRows.concatenate([self.tokens, others.tokens])
        labels = np.concatenate([self.labels, others.labels])
        return TokenizedRows(self.task, [*self.ids, *others.ids], labels, tokens, self.device)


@dataclass
class FeatureRows:
    """Rows as pooled features (R, F) of a frozen encoder: what a head reads."""

    features: Tensor
    labels: np.ndarray

    def __post_init__(self) -> None:
        self._labels = torch.from_numpy(self.labels).to(self.features.device)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        return self.gather(to_device(np.asarray(rows, dtype=np.int64), self.features.device), 0)

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each feature, (F,); 1 for the deviation of what is constant but for rounding."""
        deviation = self.features.std(0, correction=0)
        return self.features.mean(0), torch.where(deviation > 1e-3 * deviation.mean(), deviation, 1.0)

    def standardized(self, mean: Tensor, deviation: Tensor) -> "FeatureRows":
        """(features - mean) / deviation, both (F,)."""
        return FeatureRows((self.features - mean) / deviation, self.labels)

    def num_places(self, rows: np.ndarray) -> int:
        return 0

    def gather(self, rows: Tensor, num_places: int) -> Batch:
        return Batch(self._labels[rows], features=self.features[rows])

    def by_length(self) -> np.ndarray:
        return np.arange(len(self))


@dataclass
class DeferredRows:
    """Rows that are made when the first batch of them is asked for. labels: (R,), known before."""

    labels: np.ndarray
    make: Callable[[], Rows]

    @cached_property
    def _rows(self) -> Rows:
        return self.make()

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        return self._rows.batch(rows)

    def num_places(self, rows: np.ndarray) -> int:
        return self._rows.num_places(rows)

    def gather(self, rows: Tensor, num_places: int) -> Batch:
        return self._rows.gather(rows, num_places)

    def by_length(self) -> np.ndarray:
        return self._rows.by_length()


BetweenBatches = Callable[[], None]  # called between batches; may raise to stop


def no_stop() -> None:
    """Between batches: nothing."""


@torch.no_grad()
def by_batches(
    compute: Callable[[np.ndarray], Tensor],
    rows: Rows,
    batch_size: int,
    between: BetweenBatches = no_stop,
    processes: ProcessGroup = ALONE,
) -> Tensor:
    """(R, ...) float32 results in the order of the rows, computed on batches of rows of similar length.

    compute: from row numbers (B,) to results (B, ...). Out of memory, it goes on with batches of half the rows. Each
    process computes a part of them, and calls `between` as often as the others.
    Raises OutputError if a result is not finite.
    """
    most = batch_size

    def in_batches(order: np.ndarray) -> Tensor:
        nonlocal most
        parts = []
        for first in range(0, len(order), batch_size):
            between()
            batch = order[first : first + batch_size]
            while len(batch):
                try:
                    parts.append(compute(batch[:most]).float())
                    batch = batch[most:]
                except torch.OutOfMemoryError:
                    if most == 1:
                        text = "the device is out of memory with one row a forward pass (--eval_batch_size)"
                        raise DataError(text) from None
                    most = -(-most // 2)
        return torch.cat(parts)

    order = rows.by_length()
    result = processes.compute_rows(in_batches, order)
    if num_bad := int((~result.isfinite()).reshape(len(result), -1).any(1).sum()):
        raise OutputError(f"the model's outputs are not finite for {num_bad} of {len(result)} rows")
    inverse = torch.from_numpy(np.argsort(order, kind="stable")).to(result.device)
    return result[inverse]


def tokenize(task: Task, examples: Sequence[Example], tokenizer: Tokenizer, device: torch.device) -> TokenizedRows:
    """Rows as token ids."""
    tokens = tokenizer.encode([example.texts for example in examples])
    labels = np.array([example.label for example in examples], dtype=np.float32)
    return TokenizedRows(task, [example.id for example in examples], labels, tokens, device)


def text_hashes(examples: Sequence[Example]) -> np.ndarray:
    """(R,) uint64, equal for rows with the same texts but for case, white space, and the order of a pair."""
    hashes = []
    for example in examples:
        texts = sorted(" ".join(text.split()).casefold() for text in example.texts)
        content = "\0".join(texts).encode("utf-8", "surrogatepass")
        hashes.append(hashlib.blake2b(content, digest_size=8).digest())
    return np.frombuffer(b"".join(hashes), dtype=np.uint64)


def longest_cut(lengths: np.ndarray, share: float) -> tuple[np.ndarray, int]:
    """Rows to keep when the longest share of the rows is dropped, and the number of tokens of the longest kept row.

    lengths: (R,) tokens of the concatenated input. Exactly floor(share * R) rows go, the longest ones; among rows of
    equal length the later ones go first.
    """
    num_dropped = int(share * len(lengths))
    order = np.argsort(lengths, kind="stable")
    kept = np.sort(order[: len(lengths) - num_dropped])
    return kept, int(lengths[kept].max())


def epoch_order(num_rows: int, generator: np.random.Generator) -> np.ndarray:
    """(R,) row numbers of one pass over a data set, in random order."""
    return generator.permutation(num_rows)


class RowStream:
    """Row numbers for a task's draws: pass after pass over its rows, each in a new order.

    Pass p is a function of the seed and p alone, so that a position, the number of rows so far, says all.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        self.num_rows, self.seed = num_rows, seed
        self._pass = -1
        self._order = np.empty(0, dtype=np.int64)

    def rows(self, position: int, count: int) -> np.ndarray:
        """(count,) row numbers from a position on; where a pass ends the next one goes on."""
        parts = []
        while count > 0:
            number, place = divmod(position, self.num_rows)
            if number != self._pass:
                self._pass = number
                self._order = epoch_order(self.num_rows, np.random.default_rng([self.seed, number]))
            parts.append(self._order[place : place + count])
            position, count = position + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)


if __name__ == "__main__":
    from reports.data_report import main

    sys.exit(main())
