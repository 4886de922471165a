"""The run directory: configuration, metrics log, checkpoints and results of one run, and what resuming needs.

Files are written beside their place and renamed. A process killed at any moment leaves a directory that can be resumed.
"""

from __future__ import annotations

import csv
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

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, METRICS, RESULTS, LOCK = "config.json", "metrics.jsonl", "results.json", ".lock"
FORMATS = ("png", "pdf", "svg")  # of plots
TRAINER_TENSORS, TRAINER_STATE = "trainer.safetensors", "trainer.json"


RECORD_KEYS = frozenset(  # of config.json beside the flags
    {"versions", "machine", "processor", "gpu", "commit", "compiled", "data_files", "layout", "stages"}
)


class RunError(ValueError):
    """A run directory cannot be used; the message is one line for the user."""


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


def read_json(path: Path) -> Any:
    """Raises RunError if the file is absent or damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path}: no such file, expected a run directory") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: not readable as JSON ({error})") from None


def finite(value: Any) -> Any:
    """The value with NaN and infinities as None, which JSON can hold."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Replaces a folder by what `write` puts into an empty one.

    A killed process leaves the old folder or the new one under its name, or, between two renames, the whole new one as
    `<name>.new`; `recover_folder` takes that up.
    """
    beside, complete, old = (folder.with_name(folder.name + suffix) for suffix in (".tmp", ".new", ".old"))
    for leftover in (beside, complete, old):
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir(parents=True)
    write(beside)
    os.rename(beside, complete)
    if folder.exists():
        os.rename(folder, old)
    os.rename(complete, folder)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Completes a replacement that was cut off between its renames."""
    complete = folder.with_name(folder.name + ".new")
    if not folder.exists() and complete.exists():
        os.rename(complete, folder)


class MetricsLog:
    """metrics.jsonl, one JSON object a line, and the same numbers for TensorBoard where a folder for it is given."""

    def __init__(self, path: Path, size: int, tensorboard: Path | None) -> None:
        """size: bytes of the file to keep; what a killed run logged after its checkpoint will be logged again."""
        self._path = path
        self._file = path.open("ab")
        self._file.truncate(size)
        self._file.seek(size)
        self._kept, self._folder = size, tensorboard
        self._writer: Any = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends a record; numbers of a step or an evaluation go to TensorBoard under their stage."""
        self._file.write((json.dumps(finite(record), allow_nan=False) + "\n").encode())
        self._file.flush()
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
    def size(self) -> int:
        return self._file.tell()

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
        except ValueError:
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
        """A new run directory. Raises RunError if the path exists, whatever it is: nothing is ever overwritten."""
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise RunError(
                f"--out {path}: exists already, expected a new directory (--resume {path} continues a run)"
            ) from None
        except OSError as error:
            raise RunError(f"--out {path}: cannot be made ({error.strerror})") from None
        run = cls(path)
        run._hold()
        write_json(path / CONFIG, config)
        return run

    @classmethod
    def existing(cls, path: Path) -> RunDirectory:
        """The run to resume. Raises RunError if it is none or has ended."""
        if not (path / CONFIG).is_file():
            raise RunError(f"--resume {path}: no run directory, expected one with {CONFIG}")
        if (path / RESULTS).is_file():
            raise RunError(
                f"--resume {path}: the run has ended, its results are in {path / RESULTS}; to train its model further, "
                f"start a new run with --checkpoint {path}"
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

    def config(self) -> dict[str, Any]:
        return dict(read_json(self.path / CONFIG))

    def open_metrics(self, size: int, tensorboard: bool) -> MetricsLog:
        return MetricsLog(self.path / METRICS, size, self.path / "tensorboard" if tensorboard else None)

    def write_results(self, results: Mapping[str, Any]) -> None:
        write_json(self.path / RESULTS, finite(results))


def write_trainer(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """The trainer's state beside a checkpoint: tensors as safetensors, the rest as JSON."""
    from safetensors.torch import save_file

    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / TRAINER_TENSORS)
    write_json(folder / TRAINER_STATE, state)


def read_trainer(folder: Path, format: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_trainer` wrote. Raises RunError if it is absent, damaged or not of this format."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state = read_json(folder / TRAINER_STATE)
    if not isinstance(state, dict) or state.get("format") != format:
        raise RunError(
            f"{folder / TRAINER_STATE}: written by another version of the program, which alone can resume this run "
            f"(--checkpoint {folder.parent} starts a new one from its model)"
        )
    try:
        return load_file(folder / TRAINER_TENSORS), state
    except (SafetensorError, OSError) as error:
        raise RunError(f"{folder / TRAINER_TENSORS}: not readable as safetensors ({error})") from None


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
            with path.open(encoding="utf-8", newline="") as file:
                header, *rows = list(csv.reader(file))
            if header[:3] != ["id", "label", "prediction"] or not rows:
                raise ValueError(f"header {header[:3]} over {len(rows)} rows")
            width = 3 + sum(name.startswith("probability_") for name in header)
            numbers = np.array([row[1:width] for row in rows], dtype=np.float64)
            if numbers.shape != (len(rows), width - 1) or not np.isfinite(numbers).all():
                raise ValueError("a number is missing or not finite")
        except (OSError, ValueError, csv.Error) as error:
            raise RunError(f"{path}: not readable as dev rows ({error})") from None
        probabilities = numbers[:, 2:] if width > 3 else None
        return cls(tuple(row[0] for row in rows), numbers[:, 0], numbers[:, 1], probabilities)
