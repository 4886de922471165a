"""Run directories as the command leaves them, with made-up numbers: for tests of what reads them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix

from config import Config
from helpers import THREE
from reports.finished_run import FinishedRun
from run_record import DevRows
from tasks import TASKS

ROWS = 60


def write_dev_files(folder: Path, num_rows: int = ROWS, seed: int = 0) -> Path:
    """Dev files of all tasks with texts of different lengths and random labels."""
    folder.mkdir(exist_ok=True)
    draw = np.random.default_rng(seed)
    for name, task in ((name, TASKS[name]) for name in THREE):
        lines = ["\t".join(["", "id", *task.text_columns, task.label_column])]
        for i in range(num_rows):
            texts = [" ".join(f"word{j}" for j in range(draw.integers(1, 20))) for _ in task.text_columns]
            classes = task.output.num_classes
            label = f"{draw.uniform(0, 5):.1f}" if classes is None else str(draw.integers(classes))
            lines.append("\t".join([str(i), f"{name}{i}", *texts, label]))
        (folder / task.file_name("dev")).write_text("\n".join(lines) + "\n", "utf-8")
    return folder


def labels_of(data: Path, task: str) -> np.ndarray:
    """(R,) labels of a dev file."""
    rows = (data / TASKS[task].file_name("dev")).read_text("utf-8").splitlines()[1:]
    return np.array([float(row.rsplit("\t", 1)[1]) for row in rows])


def noisy(data: Path, task: str, noise: float, seed: int) -> np.ndarray:
    """(R,) predictions that are wrong in a share of the rows, or on a scale off by that part of its width."""
    labels, draw = labels_of(data, task), np.random.default_rng(seed)
    classes = TASKS[task].output.num_classes
    if classes is None:
        return np.clip(labels + 5 * noise * draw.normal(size=len(labels)), 0, 5)
    others = (labels + draw.integers(1, classes, len(labels))) % classes
    return np.where(draw.random(len(labels)) < noise, others, labels)


def write_run(
    path: Path,
    data: Path,
    predictions: Mapping[str, np.ndarray],
    records: Sequence[Mapping[str, Any]] = (),
    **flags: Any,
) -> Path:
    """A run that has ended, with these predictions of the dev rows of `data`."""
    tasks = tuple(predictions)
    settings = Config(tasks=tasks, data=str(data), out=str(path)).to_dict() | flags
    (path / "predictions").mkdir(parents=True)
    files, dev, confusion = {}, {}, {}
    for task, predicted in predictions.items():
        content = (data / TASKS[task].file_name("dev")).read_bytes()
        sums = {"rows": len(predicted), "skipped": [], "sha256": hashlib.sha256(content).hexdigest()}
        files[TASKS[task].file_name("dev")] = sums
        labels = labels_of(data, task)
        dev[task] = TASKS[task].output.scores(predicted, labels)
        if TASKS[task].output.num_classes is not None:
            confusion[task] = confusion_matrix(labels, predicted, labels=range(TASKS[task].output.num_classes)).tolist()
        _write_dev_rows(path / "predictions", task, predicted, labels)
    mean = float(np.mean([dev[task][TASKS[task].output.selection_metric] for task in tasks]))
    results = {
        "dev": {**dev, "mean": mean},
        "best_epoch": 2,
        "parameters": {"total": 22_700_000},
        "confusion": confusion,
        "peak_memory_mb": 1024.5,
        "seconds": {"training": 100.0 + flags.get("seed", 0)},
    }
    (path / "config.json").write_text(json.dumps({**settings, "commit": None, "data_files": files, "stages": []}))
    (path / "results.json").write_text(json.dumps(results))
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _write_dev_rows(folder: Path, task: str, predicted: np.ndarray, labels: np.ndarray) -> None:
    output = TASKS[task].output
    ids = tuple(f"{task}{i}" for i in range(len(predicted)))
    probabilities = None
    if output.num_classes is not None:
        sure = np.linspace(0.6, 0.99, len(predicted))
        probabilities = np.repeat((1 - sure)[:, None] / (output.num_classes - 1), output.num_classes, 1)
        probabilities[np.arange(len(predicted)), predicted.astype(int)] = sure
    DevRows(ids, labels, predicted, probabilities).write(folder / DevRows.file_name(task))


def made_run(
    data: Path,
    name: str,
    /,
    noise: float = 0.3,
    tasks: Sequence[str] = THREE,
    treated: bool = True,
    **flags: Any,
) -> FinishedRun:
    """A run beside its data, wrong as often as `noise`; with the same seed and noise, of the same predictions."""
    predictions = {task: noisy(data, task, noise, 100 + flags.get("seed", 0)) for task in tasks}
    path = write_run(data.parent / name, data, predictions, training_records(is_treated=treated), **flags)
    return FinishedRun.read(path)


def training_records(num_steps: int = 40, num_epochs: int = 2, is_treated: bool = False) -> list[dict[str, Any]]:
    """A log of a frozen stage and of fine-tuning with three tasks in turn, or in every step under a treatment."""
    draw = np.random.default_rng(3)
    records: list[dict[str, Any]] = []
    for stage in ("pretrain", "finetune"):
        for step in range(1, num_steps + 1):
            epoch = 1 + (step - 1) * num_epochs // num_steps
            every = is_treated and stage == "finetune"
            plan = list(THREE) if every else [THREE[step % 3]]
            record: dict[str, Any] = {"stage": stage, "epoch": epoch, "step": step, "lr": 1e-3 / step}
            record["losses"] = {task: float(draw.uniform(0.5, 2)) for task in plan}
            if every:
                record["cosines"] = {p: float(draw.normal(0, 0.3)) for p in ("sst-para", "sst-sts", "para-sts")}
            records.append(record)
            if step % (num_steps // num_epochs) == 0:
                tasks = {t: {TASKS[t].output.selection_metric: float(draw.random())} for t in THREE}
                mean = float(np.mean([value for of in tasks.values() for value in of.values()]))
                records.append({"stage": stage, "epoch": epoch, "step": step, "dev": {**tasks, "mean": mean}})
    return records
