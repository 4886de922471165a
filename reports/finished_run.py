"""What a run that has ended left in its directory, read back without torch: settings, results, log, dev predictions.

The files may have been edited or damaged: what is read from them is checked, and a `RunError` says what is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from messages import resume_command, shown
from remarks import guess_scores, remarks
from run_record import (
    CONFIG,
    GAP,
    METRICS,
    NUMBER,
    RESULTS,
    DevRows,
    RunError,
    mismatch,
    parse_records,
    read_file,
    read_json,
)
from task_files import TaskFileError, add_saved_tasks
from tasks import TASKS

if TYPE_CHECKING:
    from datasets import Example

MEAN = "mean"  # the score beside those of the tasks

SETTINGS = {
    "option": str,
    "tasks": [str],
    "data": str,
    "seed": int,
    "data_files": {...: {"sha256": str}},
    "checkpoint": (None, str),
    "checkpoints": (None, [str]),
    "automatic": (None, [str]),
}
RESULTS_BESIDE_SCORES = {
    "parameters": {"total": NUMBER},
    "seconds": {"training": NUMBER},
    "confusion": (None, {...: [[int]]}),
    "gradients": (None, {...: {...: {...: GAP}}}),
    "best_epoch": (None, int | dict),
    "peak_memory_mb": GAP,
    "soup": (None, [{"checkpoint": str, "kept": bool}]),
}
RECORD = {
    "stage": str,
    "epoch": int,
    "step": NUMBER,
    "losses": (None, {...: GAP}),
    "lr": GAP,
    "cosines": (None, {...: GAP}),
    "dev": (None, {MEAN: GAP, ...: {...: GAP}}),
}


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
        try:
            add_saved_tasks(config.get("layout") if isinstance(config, dict) else None, str(path / CONFIG))
        except TaskFileError as error:
            raise RunError(str(error)) from None
        if problem := mismatch(config, SETTINGS) or _task_problem(config["tasks"]):
            raise RunError(f"{path / CONFIG}: {problem}, expected the settings of a run")
        if not (path / RESULTS).is_file():
            raise RunError(f"{path}: the run has not ended; to go on: {resume_command(path)}")
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

    @property
    def confusion(self) -> dict[str, np.ndarray]:
        """Of each task with classes the counts of dev rows by true class (rows) and predicted class (columns)."""
        matrices = self.results.get("confusion") or {}
        return {task: np.array(matrices[task]) for task in self.tasks if task in matrices}

    @property
    def guesses(self) -> dict[str, float]:
        """Of each task what one answer for all dev rows scores, as far as that is known."""
        return guess_scores(self.tasks, self.confusion)

    @property
    def remarks(self) -> list[str]:
        """What its numbers do not say by themselves. Raises RunError for a damaged log."""
        return remarks({task: self.results["dev"][task] for task in self.tasks}, self.confusion, self.records())

    def records(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; none where there is no such file. Raises RunError if one is damaged."""
        path = self.path / METRICS
        try:
            records = parse_records(read_file(path)) if path.exists() else []
        except OSError as error:
            raise RunError(f"{path}: not readable ({error.strerror})") from None
        for record in records:
            if problem := mismatch(record, RECORD):
                raise RunError(f"{path}: {problem} in step {record['step']}, expected the log of a run")
        return records

    def data_checksums(self, *splits: str) -> dict[str, str]:
        """SHA-256 of the data files of these splits, by file name, as far as the run read them."""
        names = [TASKS[task].file_key(split) for task in self.tasks for split in splits]
        files = self.config["data_files"]
        return {name: files[name]["sha256"] for name in names if name in files}

    def dev_examples(self, task: str) -> list[Example]:
        """The rows of the dev file. Raises RunError if the file is not the one that the run was evaluated on."""
        from datasets import DataError, data_folder, read_examples

        try:
            path = TASKS[task].path("dev", data_folder(self.config["data"], ""))
            file = read_examples(path, TASKS[task], labelled=True)
        except DataError as error:
            raise RunError(*error.args) from None
        if file.sha256 != self.data_checksums("dev").get(TASKS[task].file_key("dev")):
            raise RunError(f"{path}: the file has changed since the run {self.path}")
        return file.examples

    def dev_rows(self, task: str) -> DevRows:
        """Labels and predictions of the dev rows. Raises RunError if there is no whole file of them."""
        path = self.path / "predictions" / DevRows.file_name(task)
        rows, num_classes = DevRows.read(path), TASKS[task].output.num_classes
        width = None if rows.probabilities is None else rows.probabilities.shape[1]
        allowed = np.isin([rows.labels, rows.predictions], range(num_classes or 0)).all() or num_classes is None
        if width != num_classes or not allowed:
            raise RunError(f"{path}: not the dev rows of {task}, expected {TASKS[task].output.allowed}")
        expected = self.config["data_files"].get(TASKS[task].file_key("dev"), {}).get("rows", len(rows.labels))
        if len(rows.labels) != expected:
            raise RunError(f"{path}: {len(rows.labels)} rows, expected the {expected} of the dev file")
        return rows


def _task_problem(tasks: list[str]) -> str:
    unknown = [task for task in tasks if task not in TASKS]
    return f"task {shown(repr(unknown[0]))} is unknown" if unknown else "" if tasks else "there are no tasks"


def _results_problem(tasks: list[str], results: Any) -> str:
    """What is wrong with results of which these tasks are read, or ""."""
    scores = {task: {TASKS[task].output.selection_metric: NUMBER, ...: GAP} for task in tasks}
    if problem := mismatch(results, {"dev": {MEAN: NUMBER, **scores}, **RESULTS_BESIDE_SCORES}):
        return problem
    for task, matrix in (results.get("confusion") or {}).items():
        classes = TASKS[task].output.num_classes if task in TASKS else None
        if classes and [len(row) for row in matrix] != [classes] * classes:
            return f"the confusion of {task} is not {classes} by {classes}"
    return ""
