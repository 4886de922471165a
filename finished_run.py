"""What a run that has ended left in its directory, read back without torch: settings, results, log, dev predictions.

Shape letters: R rows of a dev file.
"""

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from run_record import CONFIG, METRICS, RESULTS, RunError, parse_records, read_json
from tasks import TASKS

if TYPE_CHECKING:
    from datasets import Example

MEAN = "mean"  # the score beside those of the tasks


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """A run directory with results. config, results: the contents of its files of those names."""

    path: Path
    config: Mapping[str, Any]
    results: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "FinishedRun":
        """Raises RunError if the directory is no run's, the run has not ended, or a file is damaged."""
        if not (path / CONFIG).is_file():
            raise RunError(f"{path}: no run directory, expected one with {CONFIG}")
        config = read_json(path / CONFIG)
        kinds = {"option": str, "tasks": list, "data": str, "seed": int, "data_files": dict}
        wrong = [n for n, kind in kinds.items() if not isinstance(config, dict) or not isinstance(config.get(n), kind)]
        if wrong:
            raise RunError(f"{path / CONFIG}: no {wrong[0]!r} in it, expected the settings of a run")
        if not (path / RESULTS).is_file():
            raise RunError(f"{path}: the run has not ended, --resume {path} continues it")
        results = read_json(path / RESULTS)
        problem = _problem(config["tasks"], results)
        if problem:
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
        """The lines of metrics.jsonl; none where there is no such file."""
        path = self.path / METRICS
        return parse_records(path.read_bytes()) if path.is_file() else []

    def data_checksums(self, *splits: str) -> dict[str, str]:
        """SHA-256 of the data files of these splits, by file name, as far as the run read them."""
        names = [TASKS[task].file_name(split) for task in self.tasks for split in splits]
        files = self.config["data_files"]
        return {name: files[name]["sha256"] for name in names if name in files}

    def data_path(self, task: str) -> Path:
        """Where the task's dev file lay."""
        from datasets import data_folder

        return data_folder(self.config["data"], "") / TASKS[task].file_name("dev")

    def dev_examples(self, task: str) -> "list[Example]":
        """The rows of the dev file. Raises RunError if the file is not the one that the run was evaluated on."""
        from datasets import DataError, read_examples

        try:
            file = read_examples(self.data_path(task), TASKS[task], labelled=True)
        except DataError as error:
            raise RunError(str(error)) from None
        if file.sha256 != self.data_checksums("dev").get(file.path.name):
            raise RunError(f"{file.path}: the file has changed since the run {self.path}")
        return file.examples

    def dev_rows(self, task: str) -> "DevRows":
        """Labels and predictions of the dev rows.

        A run without a file of them has its prediction file, and the labels are in the data file. Raises RunError if
        neither is there or one is damaged.
        """
        path = self.path / "predictions" / DevRows.file_name(task)
        rows = DevRows.read(path) if path.is_file() else self._rows_of_predictions(task)
        classes = range(TASKS[task].output.num_classes or 0)
        shape = rows.probabilities.shape if rows.probabilities is not None else (len(rows.ids), len(classes))
        if classes and not (np.isin([rows.labels, rows.predictions], classes).all() and shape[1] == len(classes)):
            raise RunError(f"{path}: not the dev rows of {task}, expected classes 0 to {len(classes) - 1}")
        return rows

    def _rows_of_predictions(self, task: str) -> "DevRows":
        path = self.path / "predictions" / f"{task}-dev-output.csv"
        examples = self.dev_examples(task)
        try:
            cells = [line.rsplit(" , ", 1) for line in path.read_text("utf-8").split("\n")[1:] if line]
            predictions = np.array([float(value) for _, value in cells])
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: not readable as predictions ({error})") from None
        ids = tuple(example.id for example in examples)
        if tuple(name for name, _ in cells) != ids:
            raise RunError(f"{path}: its rows are not those of {self.data_path(task)}")
        return DevRows(ids, np.array([example.label for example in examples]), predictions, None)


def _problem(tasks: Any, results: Any) -> str:
    """What the results lack of what is read from every run, or ""."""
    try:
        unknown = [task for task in tasks if task not in TASKS]
        if unknown or not tasks:
            return f"task {unknown[0]!r} is unknown" if unknown else "there are no tasks"
        dev = results["dev"]
        of_tasks = {f"dev {task}": dev[task][TASKS[task].output.selection_metric] for task in tasks}
        totals = {"parameters": results["parameters"]["total"], "training seconds": results["seconds"]["training"]}
        numbers = {**of_tasks, "dev mean": dev[MEAN], **totals}
    except (KeyError, TypeError) as error:
        return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else "not a mapping"
    wrong = [name for name, value in numbers.items() if not isinstance(value, int | float)]
    return f"{wrong[0]} is {numbers[wrong[0]]}" if wrong else ""


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

    def write(self, path: Path) -> None:
        """A csv file: id, label, prediction, and of classes the probability of each."""
        num_classes = 0 if self.probabilities is None else self.probabilities.shape[1]
        columns = [self.labels, self.predictions, *(() if self.probabilities is None else self.probabilities.T)]
        beside = path.with_name(path.name + ".tmp")
        with beside.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["id", "label", "prediction", *(f"probability_{k}" for k in range(num_classes))])
            for name, *values in zip(self.ids, *columns, strict=True):
                writer.writerow([name, *(f"{value:.9g}" for value in values)])
        os.replace(beside, path)

    @classmethod
    def read(cls, path: Path) -> "DevRows":
        """What `write` wrote. Raises RunError if the file is damaged."""
        try:
            with path.open(encoding="utf-8", newline="") as file:
                header, *rows = list(csv.reader(file))
            if header[:3] != ["id", "label", "prediction"] or not rows:
                raise ValueError(f"header {header[:3]} over {len(rows)} rows")
            numbers = np.array([row[1:] for row in rows], dtype=np.float64)
            if numbers.shape != (len(rows), len(header) - 1) or not np.isfinite(numbers).all():
                raise ValueError("a number is missing or not finite")
        except (OSError, ValueError, csv.Error) as error:
            raise RunError(f"{path}: not readable as dev rows ({error})") from None
        probabilities = numbers[:, 2:] if len(header) > 3 else None
        return cls(tuple(row[0] for row in rows), numbers[:, 0], numbers[:, 1], probabilities)
