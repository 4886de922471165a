"""Predictions and what they are worth: metrics of the dev files, confusion matrices, prediction files.

As a command it reports on runs that have ended, one or many: `python evaluation.py RUN [RUN ...]`.

Shape letters: R rows of a data set, K outputs, D hidden.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the command reads files only, and does not wait for torch
    from reports.report import main

    sys.exit(main())

import numpy as np
import torch
from torch import Tensor

from datasets import BetweenBatches, FeatureRows, Rows, TokenizedRows, by_batches, no_stop
from distributed import ALONE, ProcessGroup
from model import MultitaskBert, TaskModel
from remarks import GUESS, GUESS_IN_WORDS
from run_record import DevRows, write_atomically
from tasks import TASKS, is_degenerate

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Precision:
    """Mixed precision: autocast on a device to a dtype, or float32 where dtype is None."""

    device: torch.device
    dtype: torch.dtype | None = None

    def autocast(self) -> AbstractContextManager[object]:
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def _of_all_rows(
    forward: Callable[[Any], Tensor],
    rows: Rows,
    batch_size: int,
    precision: Precision,
    between: BetweenBatches,
    processes: ProcessGroup,
) -> Tensor:
    """What a forward pass of batches gives for each row of a data set, in its order."""

    def compute(index: np.ndarray) -> Tensor:
        with precision.autocast():
            return forward(rows.batch(index))

    return by_batches(compute, rows, batch_size, between, processes)


def predict_logits(
    model: TaskModel,
    task: str,
    rows: Rows,
    batch_size: int,
    precision: Precision,
    between: BetweenBatches = no_stop,
    processes: ProcessGroup = ALONE,
) -> Tensor:
    """(R, K) logits of all rows of a data set, in its order, on the CPU."""
    return _of_all_rows(partial(model, task), rows, batch_size, precision, between, processes).cpu()


def compute_features(
    model: MultitaskBert,
    task: str,
    rows: TokenizedRows,
    batch_size: int,
    precision: Precision,
    between: BetweenBatches = no_stop,
    processes: ProcessGroup = ALONE,
) -> FeatureRows:
    """The pooled features of all rows, from the encoder as it is and without dropout: a frozen encoder's, for good."""
    pooled = partial(model.pooled, task)
    return FeatureRows(_of_all_rows(pooled, rows, batch_size, precision, between, processes), rows.labels)


def predict_all(
    model: TaskModel,
    data: Mapping[str, Rows],
    batch_size: int,
    precision: Precision,
    between: BetweenBatches = no_stop,
    processes: ProcessGroup = ALONE,
) -> dict[str, Tensor]:
    """Of each task the logits (R, K) of its rows, as `predict_logits` gives them."""
    how = batch_size, precision, between, processes
    return {task: predict_logits(model, task, rows, *how) for task, rows in data.items()}


def metrics_of(logits: Mapping[str, Tensor], dev_rows: Mapping[str, Rows], warn: Warn) -> dict[str, dict[str, float]]:
    """Metrics of each task. An undefined correlation counts as 0, with a warning."""
    result = {}
    for task, rows in dev_rows.items():
        predictions = TASKS[task].output.decode(logits[task]).numpy()
        if TASKS[task].output.num_classes is None and is_degenerate(predictions):
            warn(f"warning: {task}: all predictions are equal, the correlation is undefined and counts as 0")
        result[task] = TASKS[task].output.scores(predictions, rows.labels)
    return result


def evaluate(
    model: TaskModel,
    dev_rows: Mapping[str, Rows],
    batch_size: int,
    precision: Precision,
    warn: Warn,
    between: BetweenBatches = no_stop,
    processes: ProcessGroup = ALONE,
) -> dict[str, dict[str, float]]:
    """Metrics of each task on its dev rows."""
    return metrics_of(predict_all(model, dev_rows, batch_size, precision, between, processes), dev_rows, warn)


def mean_score(metrics: Mapping[str, Mapping[str, float]]) -> float:
    """Mean over the tasks of the metric that counts: accuracy for classes, Pearson for a scale."""
    return float(np.mean([metrics[task][TASKS[task].output.selection_metric] for task in metrics]))


def confusion_matrices(logits: Mapping[str, Tensor], dev_rows: Mapping[str, Rows]) -> dict[str, list[list[int]]]:
    """Of each classification task: rows are true classes, columns predicted ones."""
    from sklearn.metrics import confusion_matrix

    result = {}
    for task, rows in dev_rows.items():
        output = TASKS[task].output
        if output.num_classes is not None:
            predictions = output.decode(logits[task]).numpy().astype(int)
            classes = list(range(output.num_classes))
            result[task] = confusion_matrix(rows.labels.astype(int), predictions, labels=classes).tolist()
    return result


def write_predictions(task: str, rows: TokenizedRows, logits: Tensor, path: Path) -> None:
    """A prediction file in the format that CS224N grades. logits: (R, K)."""
    output = TASKS[task].output
    lines = [f"id \t {TASKS[task].prediction_header} \n"]
    for name, value in zip(rows.ids, output.decode(logits).tolist(), strict=True):
        lines.append(f"{name} , {output.format(value)} \n")
    write_atomically(path, "".join(lines))


def write_dev_rows(
    task: str, rows: TokenizedRows, logits: Tensor, folder: Path, texts: Sequence[tuple[str, ...]]
) -> None:
    """Labels, predictions, probabilities and texts, where they are known, of the dev rows. logits: (R, K)."""
    output, probabilities = TASKS[task].output, TASKS[task].output.probabilities(logits)
    shares = None if probabilities is None else probabilities.numpy()
    dev_rows = DevRows(tuple(rows.ids), rows.labels, output.decode(logits).numpy(), shares)
    dev_rows.write(folder / DevRows.file_name(task), TASKS[task].text_columns if texts else (), texts)


def format_scores(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """One line: the metric that counts of each task, and the mean."""
    names = {task: TASKS[task].output.selection_metric for task in metrics}
    parts = [f"{task} {name} {metrics[task][name]:.3f}" for task, name in names.items()]
    return ", ".join([*parts, f"mean {mean_score(metrics):.3f}"])


def format_table(
    metrics: Mapping[str, Mapping[str, float]], num_rows: Mapping[str, int], guesses: Mapping[str, float]
) -> str:
    """The table at the end of a run: both metrics of each task, rows, and the mean that selects checkpoints.

    guesses: of each task what one answer for all rows scores.
    """
    width = 4 + max(len(TASKS[task].title) for task in metrics)
    lines = [f"{'task':<{width}}{'dev rows':>8}  {'':<36}{GUESS:>10}"]
    for task, values in metrics.items():
        first = TASKS[task].output.selection_metric  # the one that counts
        names = [first, *(name for name in values if name != first)]
        cells = "".join(f"{name:<10}{values[name]:>6.3f}  " for name in names)
        lines.append(f"{TASKS[task].title:<{width}}{num_rows[task]:>8}  {cells:<36}{guesses[task]:>10.3f}")
    mean = float(np.mean(list(guesses.values())))
    lines.append(f"{'mean':<{width}}{'':>8}  {'':<10}{mean_score(metrics):>6.3f}{'':20}{mean:>10.3f}")
    return "\n".join([*lines, f"({GUESS_IN_WORDS})"])
