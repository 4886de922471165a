"""What a run that has ended left in its directory, read back without torch: settings, results, log, dev predictions.

The files may have been edited or damaged: what is read from them is checked, and a `RunError` says what is wrong.

Shape letters: R rows of a dev file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from run_record import CONFIG, METRICS, RESULTS, DevRows, RunError, parse_records, read_json
from tasks import TASKS

if TYPE_CHECKING:
    from datasets import Example

MEAN = "mean"  # the score beside those of the tasks

# Shapes of JSON values: a type, [shape of each], {key: shape} with these keys at least, {...: shape of each}.
NUMBER = (int, float)
GAP = (int, float, type(None))  # null stands for NaN
SETTINGS = {"option": str, "tasks": [str], "data": str, "seed": int, "data_files": {...: {"sha256": str}}}
OPTIONAL_RESULTS: dict[str, Any] = {
    "confusion": {...: [[int]]},
    "gradients": {...: {...: {...: GAP}}},
    "best_epoch": (int, dict, type(None)),
    "peak_memory_mb": GAP,
}
RECORD: dict[str, Any] = {"stage": str, "epoch": int, "step": NUMBER}
OPTIONAL_RECORD: dict[str, Any] = {
    "losses": {...: GAP},
    "draws": {...: NUMBER},
    "lr": GAP,
    "cosines": {...: GAP},
    "dev": {MEAN: GAP, ...: {...: GAP}},
}


def mismatch(value: Any, shape: Any, place: str) -> str:
    """Where a JSON value has not this shape, in words, or ""."""
    if isinstance(shape, dict | list):
        if not isinstance(value, type(shape)):
            return f"{place} is {str(value)[:40]!r}, expected a {'mapping' if isinstance(shape, dict) else 'list'}"
        keys: Any = range(len(value)) if isinstance(shape, list) else value if ... in shape else shape
        for key in keys:
            if isinstance(shape, dict) and key not in value:
                return f"{key!r} is missing"
            inner = shape[0] if isinstance(shape, list) else shape.get(key, shape.get(...))
            if problem := mismatch(value[key], inner, f"{place} {key}"):
                return problem
        return ""
    return "" if isinstance(value, shape) else f"{place} is {str(value)[:40]!r}"


def present(value: Any, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """The optional shapes of the keys that the value has."""
    return {key: shape for key, shape in shapes.items() if isinstance(value, dict) and value.get(key) is not None}


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A run directory with results. config, results: the contents of its files of those names."""

    path: Path
    config: Mapping[str, Any]
    results: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> FinishedRun:
        """Raises RunError if the directory is no run's, the run has not ended, or a file is damaged."""
        if not (path / CONFIG).is_file():
            raise RunError(f"{path}: no run directory, expected one with {CONFIG}")
        config = read_json(path / CONFIG)
        if problem := mismatch(config, SETTINGS, "") or _task_problem(config["tasks"]):
            raise RunError(f"{path / CONFIG}: {problem.strip()}, expected the settings of a run")
        if not (path / RESULTS).is_file():
            raise RunError(f"{path}: the run has not ended, --resume {path} continues it")
        results = read_json(path / RESULTS)
        if problem := _results_problem(config["tasks"], results):
            raise RunError(f"{path / RESULTS}: {problem}, expected the results of a run")
        return cls(path, config, results)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(task for task in TASKS if task in self.config["tasks"])

    def score(self, name: str) -> float:
        """The metric that counts of a task, or the mean over tasks."""
        dev = self.results["dev"]
        return float(dev[MEAN] if name == MEAN else dev[name][TASKS[name].output.selection_metric])

    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; none where there is no such file. Raises RunError if one is damaged."""
        path = self.path / METRICS
        try:
            records = parse_records(path.read_bytes()) if path.exists() else []
        except OSError as error:
            raise RunError(f"{path}: not readable ({error.strerror})") from None
        for record in records:
            if problem := mismatch(record, RECORD | present(record, OPTIONAL_RECORD), ""):
                raise RunError(f"{path}:{problem} in step {record['step']}, expected the log of a run")
        return records

    def data_checksums(self, *splits: str) -> dict[str, str]:
        """SHA-256 of the data files of these splits, by file name, as far as the run read them."""
        names = [TASKS[task].file_name(split) for task in self.tasks for split in splits]
        files = self.config["data_files"]
        return {name: files[name]["sha256"] for name in names if name in files}

    def data_path(self, task: str) -> Path:
        """Where the task's dev file lay."""
        from datasets import data_folder

        return data_folder(self.config["data"], "") / TASKS[task].file_name("dev")

    def dev_examples(self, task: str) -> list[Example]:
        """The rows of the dev file. Raises RunError if the file is not the one that the run was evaluated on."""
        from datasets import DataError, read_examples

        try:
            file = read_examples(self.data_path(task), TASKS[task], labelled=True)
        except DataError as error:
            raise RunError(str(error)) from None
        if file.sha256 != self.data_checksums("dev").get(file.path.name):
            raise RunError(f"{file.path}: the file has changed since the run {self.path}")
        return file.examples

    def dev_rows(self, task: str) -> DevRows:
        """Labels and predictions of the dev rows. Raises RunError if there is no whole file of them."""
        path = self.path / "predictions" / DevRows.file_name(task)
        rows, num_classes = DevRows.read(path), TASKS[task].output.num_classes
        if num_classes is not None:
            is_right = np.isin([rows.labels, rows.predictions], range(num_classes)).all()
            if not is_right or rows.probabilities is None or rows.probabilities.shape[1] != num_classes:
                raise RunError(f"{path}: not the dev rows of {task}, expected classes 0 to {num_classes - 1}")
        return rows


def _task_problem(tasks: list[str]) -> str:
    unknown = [task for task in tasks if task not in TASKS]
    return f"task {unknown[0]!r} is unknown" if unknown else "" if tasks else "there are no tasks"


def _results_problem(tasks: list[str], results: Any) -> str:
    """What is wrong with results of which these tasks are read, or ""."""
    metrics = {task: {TASKS[task].output.selection_metric: NUMBER} for task in tasks}
    needed = {"dev": {MEAN: NUMBER, **metrics}, "parameters": {"total": NUMBER}, "seconds": {"training": NUMBER}}
    problem = mismatch(results, needed | present(results, OPTIONAL_RESULTS), "")
    problem = problem or mismatch(results["dev"], OPTIONAL_RECORD["dev"], "dev")
    for task, matrix in () if problem else (results.get("confusion") or {}).items():
        classes = TASKS[task].output.num_classes if task in TASKS else None
        if classes and [len(row) for row in matrix] != [classes] * classes:
            return f"the confusion of {task} is not {classes} by {classes}"
    return problem.strip()
