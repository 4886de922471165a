"""The run directory: configuration, metrics log, checkpoints and results of one run, and what resuming needs.

Files are written beside their place and renamed. A process killed at any moment leaves a directory that can be resumed.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import math
import os
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from messages import command, resume_command, shown

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, METRICS, RESULTS, LOCK = "config.json", "metrics.jsonl", "results.json", ".lock"
FORMATS = ("png", "pdf", "svg")  # of plots
CHECKSUMS, CHECKSUM = "SHA256SUMS", "checksum"  # the files of a checkpoint's folder; the settings, an entry of theirs

# Shapes of JSON values: a type; [shape of each]; {key: shape, ...: shape of other keys}; (None, shape) may be absent.
NUMBER = int | float
GAP = (None, NUMBER)  # null stands for NaN


RECORD_KEYS = frozenset(  # of config.json beside the flags
    {"versions", "machine", "processor", "gpu", "commit", "compiled", "processes"}
    | {"data_files", "layout", "stages", "automatic", CHECKSUM}
)


class RunError(ValueError):
    """A run directory cannot be used; the message is one line for the user."""


def read_file(path: Path) -> bytes:
    """A file whole. Raises OSError if it cannot be read, or is one that a reader might wait for."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.read_bytes()


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes a file, text as UTF-8, whole or not at all: beside its place, then renamed. Replaces what was there."""
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, values: Any) -> None:
    """Writes a JSON file whole or not at all. Raises ValueError for NaN and infinities."""
    write_atomically(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file. Raises OSError if that cannot be done."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        path.touch()  # with the mode of new files here, where safetensors makes one for its owner alone
        mode = path.stat().st_mode
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata=metadata)
        path.chmod(mode)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from None


def read_json(path: Path) -> Any:
    """Raises RunError if the file is absent or damaged."""
    try:
        return json.loads(read_file(path), parse_constant=_no_number)
    except FileNotFoundError:
        raise RunError(f"{path}: no such file, expected a run directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: not readable as JSON ({shown(error)})") from None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def run_of(path: Path) -> Path:
    """The directory of a run, of which a checkpoint may be named too."""
    return path.parent if path.name in ("best", "last") and (path.parent / CONFIG).is_file() else path


def mismatch(value: Any, shape: Any, place: str = "") -> str:
    """Where a JSON value has not this shape, in words, or ""."""
    if isinstance(shape, tuple):
        return "" if value is None else mismatch(value, shape[1], place)
    is_nested = isinstance(shape, dict | list)
    is_switch = isinstance(value, bool) and shape is not bool
    if type(value) is not type(shape) if is_nested else is_switch or not isinstance(value, shape):
        expected = f", expected a {'mapping' if isinstance(shape, dict) else 'list'}" if is_nested else ""
        return f"{shown(place)} is {'missing' if value is None else shown(repr(str(value)))}{expected}".strip()
    parts: dict[Any, tuple[Any, Any]] = {}
    if isinstance(shape, list):
        parts = {i: (part, shape[0]) for i, part in enumerate(value)}
    elif isinstance(shape, dict):
        others = value if ... in shape else {}
        parts = {k: (value.get(k), shape.get(k, shape.get(...))) for k in {**shape, **others} if k is not ...}
    return next(filter(None, (mismatch(*part, f"{place} {key}".strip()) for key, part in parts.items())), "")


def finite(value: Any) -> Any:
    """The value with NaN and infinities as None, which JSON can hold."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Replaces a folder by what `write` puts into an empty one, and the checksums of that.

    A killed process leaves the old folder or the new one under its name, or, between two renames, the whole new one as
    `<name>.new`; `recover_folder` takes that up.
    """
    beside, complete, old = (folder.with_name(folder.name + suffix) for suffix in (".tmp", ".new", ".old"))
    for leftover in (beside, complete, old):
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        write(beside)
        write_checksums(beside)
    except Exception:
        shutil.rmtree(beside, ignore_errors=True)  # a disk that is full is not left fuller
        raise
    os.rename(beside, complete)
    if folder.exists():
        os.rename(folder, old)
    os.rename(complete, folder)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Completes a replacement that was cut off between its renames, or before all of the old folder was gone."""
    complete, old = (folder.with_name(folder.name + suffix) for suffix in (".new", ".old"))
    if not folder.exists() and complete.exists():
        os.rename(complete, folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path) -> None:
    """Writes the checksums of a folder's files into it."""
    paths = sorted(path for path in folder.iterdir() if path.name != CHECKSUMS)
    (folder / CHECKSUMS).write_text("".join(f"{_sha256(path)}  {path.name}\n" for path in paths), "utf-8")


def checksum_problem(folder: Path) -> str:
    """What is not as `replace_folder` wrote it, in words, or "". `sha256sum -c SHA256SUMS` checks the same."""
    try:
        lines = read_file(folder / CHECKSUMS).decode().splitlines() or [""]
        sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
        missing = [name for name in sums if Path(name).name != name or not (folder / name).is_file()]
        changed = [name for name, digest in sums.items() if name not in missing and _sha256(folder / name) != digest]
    except (OSError, ValueError):
        return f"{folder / CHECKSUMS}: not readable, expected the checksums of the files beside it"
    if missing:
        return f"{folder / shown(missing[0])}: missing ({CHECKSUMS})"
    return f"{folder / shown(changed[0])}: not as it was written ({CHECKSUMS})" if changed else ""


class MetricsLog:
    """metrics.jsonl, one JSON object a line, and the same numbers for TensorBoard where a folder for it is given."""

    def __init__(self, path: Path, size: int, tensorboard: Path | None) -> None:
        """size: bytes of the file to keep; what a killed run logged after its checkpoint will be logged again."""
        self._path = path
        self._sum = hashlib.sha256(path.read_bytes()[:size] if size else b"")
        self._file = path.open("ab")
        self._file.truncate(size)
        self._file.seek(size)
        self._kept, self._folder = size, tensorboard
        self._writer: Any = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record; numbers of a step or an evaluation go to TensorBoard under their stage."""
        line = (json.dumps(finite(record), allow_nan=False) + "\n").encode()
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            self._file.raw.close()  # it would try once more at the end
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        self._sum.update(line)
        if self._folder is not None:
            self._board()
            self._show(record)

    def write_hyperparameters(self, settings: Mapping[str, Any], scores: Mapping[str, Any]) -> None:
        """The line of this run in TensorBoard's table of hyper-parameters: its flags and its final scores."""
        if self._folder is None:
            return
        from torch.utils.tensorboard.summary import hparams

        metrics = {f"results/{tag}": value for tag, value in flatten(scores)}
        simple = {k: v if type(v) in (int, float) else _in_words(v) for k, v in settings.items()}
        board = self._board()
        for summary in hparams(simple, metrics):
            board.file_writer.add_summary(summary)
        for tag, value in metrics.items():
            board.add_scalar(tag, value)

    def _board(self) -> Any:
        """TensorBoard's writer. A resumed run writes anew what it kept of its log."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            shutil.rmtree(str(self._folder), ignore_errors=True)
            self._writer = SummaryWriter(str(self._folder))
            if (config := self._path.with_name(CONFIG)).exists():
                self._writer.add_text("config", textwrap.indent(config.read_text("utf-8"), " " * 4))
            for record in parse_records(self._path.read_bytes()[: self._kept]):
                self._show(record)
        return self._writer

    def _show(self, record: Mapping[str, Any]) -> None:
        for tag, value in scalars(record):
            self._writer.add_scalar(tag, value, int(record["step"]))

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint says of the log."""
        return {"metrics_size": self._file.tell(), "metrics_sha256": self._sum.hexdigest()}

    def records(self) -> list[dict[str, Any]]:
        """What has been written so far."""
        return parse_records(self._path.read_bytes())

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def parse_records(content: bytes) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. A line that is none, such as the last of a killed run, is passed over."""
    records = []
    for line in content.split(b"\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and {"stage", "epoch", "step"} <= record.keys():
            records.append(record)
    return records


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(tag, number) of a record for TensorBoard: "finetune/loss/sst", "finetune/cosine/sst-para", "finetune/lr".

    The sum of the tasks' losses is left out: it mixes their scales.
    """
    groups = {"losses": "loss", "cosines": "cosine"}
    for tag, value in flatten({k: v for k, v in record.items() if k not in ("stage", "epoch", "step", "loss")}):
        first, slash, rest = tag.partition("/")
        yield f"{record['stage']}/{groups.get(first, first)}{slash}{rest}", value


def _in_words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """(tag, number) for all finite numbers in nested mappings; "loss", "dev/sst/accuracy"."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            yield f"{prefix}{key}", float(value)


def settings_checksum(config: Mapping[str, Any]) -> str:
    """The SHA-256 of a run's settings, but for the entry that holds it."""
    settings = {name: value for name, value in config.items() if name != CHECKSUM}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


class RunDirectory:
    """The folder of a run and the names in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best, self.last = path / "best", path / "last"
        self.predictions = path / "predictions"
        # The system's lock, which ends with the process; a file that only stands for a lock would outlive it.
        self._lock = FileLock(path / LOCK, timeout=0, fallback_to_soft=False)

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any]) -> RunDirectory:
        """A new run directory, or an empty one taken. Raises RunError if there is anything: nothing is overwritten."""
        cls.check_new(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"--out {path}: cannot be made ({error.strerror})") from None
        run = cls(path)
        run._hold()
        cls.check_new(path)
        write_json(path / CONFIG, {**config, CHECKSUM: settings_checksum(config)})
        return run

    @classmethod
    def check_new(cls, path: Path) -> None:
        """Raises RunError if a run cannot begin there. One that was killed before it had settings can once more."""
        left = {LOCK, f"{CONFIG}.tmp"}
        if os.path.lexists(path) and (not path.is_dir() or any(entry.name not in left for entry in path.iterdir())):
            is_stopped = (path / CONFIG).exists() and not (path / RESULTS).exists()
            way = f"; {resume_command(path)} continues a run" if is_stopped else ""
            raise RunError(f"--out {path}: exists already, expected a new or an empty directory{way}")

    @classmethod
    def existing(cls, path: Path) -> RunDirectory:
        """The run to resume. Raises RunError if it is none or has ended."""
        if not (path / CONFIG).is_file():
            raise RunError(f"--resume {path}: no run directory, expected one with {CONFIG}")
        if (path / RESULTS).is_file():
            raise RunError(
                f"--resume {path}: the run has ended, its results are in {path / RESULTS}; to train its model further, "
                f"start a new run with {command(f'--checkpoint={path}')}"
            )
        run = cls(path)
        run._hold()
        for folder in (run.best, run.last):
            recover_folder(folder)
        return run

    def _hold(self) -> None:
        """Keeps other processes from running in the directory. Raises RunError if one does."""
        try:
            self._lock.acquire()
        except Timeout:
            raise RunError(f"--resume {self.path}: another process is running it, expected a stopped run") from None
        except (OSError, NotImplementedError):  # a file system without locks
            pass

    def close(self) -> None:
        """Lets other processes resume the run."""
        self._lock.release()

    def open_metrics(self, size: int, tensorboard: bool) -> MetricsLog:
        return MetricsLog(self.path / METRICS, size, self.path / "tensorboard" if tensorboard else None)

    def write_results(self, results: Mapping[str, Any]) -> None:
        write_json(self.path / RESULTS, finite(results))


@dataclass(frozen=True)
class DevRows:
    """A task's dev rows, in the order of their file, and what the run's model says of them.

    labels, predictions: (R,) in the units of the label. probabilities: (R, classes), or None on a scale and where a run
    left none.
    """

    ids: tuple[str, ...]
    labels: np.ndarray
    predictions: np.ndarray
    probabilities: np.ndarray | None

    @staticmethod
    def file_name(task: str) -> str:
        return f"{task}-dev-rows.csv"

    def write(self, path: Path, columns: Sequence[str] = (), texts: Sequence[Sequence[str]] = ()) -> None:
        """A csv file: id, label, prediction, of classes the probability of each, and the texts where they are given.

        columns: names of the texts of a row. A number has as many digits as tell it from its neighbours.
        """
        probabilities = (
            np.empty((len(self.ids), 0), self.labels.dtype) if self.probabilities is None else self.probabilities
        )
        numbers = np.column_stack([self.labels, self.predictions, probabilities])
        names = [f"probability_{k}" for k in range(probabilities.shape[1])]
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["id", "label", "prediction", *names, *columns])
        for name, row, of_row in zip(self.ids, numbers, texts or [()] * len(self.ids), strict=True):
            writer.writerow([name, *(np.format_float_positional(x, trim="-") for x in row), *of_row])
        write_atomically(path, file.getvalue())

    @classmethod
    def read(cls, path: Path) -> DevRows:
        """What `write` wrote. Raises RunError if the file is damaged."""
        try:
            header, *rows = csv.reader(io.StringIO(read_file(path).decode(), newline=""))
            if header[:3] != ["id", "label", "prediction"] or not rows:
                raise ValueError(f"header {shown(header[:3])} over {len(rows)} rows")
            width = 3 + sum(name.startswith("probability_") for name in header)
            for number, row in enumerate(rows, 1):
                if len(row) != len(header):
                    raise ValueError(f"row {number} has {len(row)} columns, expected {len(header)}")
            numbers = np.array([row[1:width] for row in rows], dtype=np.float64)
            if not np.isfinite(numbers).all():
                raise ValueError("a number is not finite")
        except OSError as error:
            raise RunError(f"{path}: {error.strerror}") from None
        except (ValueError, csv.Error) as error:
            raise RunError(f"{path}: not readable as dev rows ({shown(error)})") from None
        probabilities = numbers[:, 2:] if width > 3 else None
        return cls(tuple(row[0] for row in rows), numbers[:, 0], numbers[:, 1], probabilities)
