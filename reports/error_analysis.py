"""Where a model goes wrong on the dev rows: by class, by length, and the rows it was most sure of and wrong about.

Shape letters: R rows of a dev file, C classes.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from run_record import DevRows
from tasks import TASKS, Task

if TYPE_CHECKING:
    from datasets import Example

NUM_BANDS = 5  # a scale is cut into as many bands of equal width
NUM_QUANTILES = 4


@dataclass(frozen=True)
class Part:
    """Some of the dev rows. numbers: by name, what is measured on them, such as "accuracy"."""

    name: str
    num_rows: int
    numbers: dict[str, float]


def by_class(task: Task, rows: DevRows) -> list[Part]:
    """Of each class precision, recall and F1; on a scale, of each band of labels the error of the predictions."""
    if task.output.num_classes is None:
        return _by_band(rows)
    from sklearn.metrics import precision_recall_fscore_support

    classes = range(task.output.num_classes)
    columns = precision_recall_fscore_support(rows.labels, rows.predictions, labels=list(classes), zero_division=0)
    return [
        Part(str(k), int(support), {"precision": float(precision), "recall": float(recall), "f1": float(f1)})
        for k, precision, recall, f1, support in zip(classes, *columns, strict=True)
    ]


def _by_band(rows: DevRows) -> list[Part]:
    edges = np.linspace(rows.labels.min(), rows.labels.max(), NUM_BANDS + 1)
    band_of = np.clip(np.searchsorted(edges, rows.labels, side="right") - 1, 0, NUM_BANDS - 1)
    parts = []
    for k in np.unique(band_of):
        errors = (rows.predictions - rows.labels)[band_of == k]
        numbers = {"mean error": float(errors.mean()), "mean absolute error": float(np.abs(errors).mean())}
        parts.append(Part(f"{edges[k]:.3g} to {edges[k + 1]:.3g}", len(errors), numbers))
    return parts


def num_words(examples: Sequence["Example"]) -> np.ndarray:
    """(R,) words of each row, both texts of a pair together."""
    return np.array([sum(len(text.split()) for text in example.texts) for example in examples])


def by_length(task: Task, rows: DevRows, lengths: np.ndarray) -> list[Part]:
    """The task's metrics on each quarter of the rows by length (R,). Rows of equal length stay together."""
    edges = np.unique(np.quantile(lengths, np.arange(1, NUM_QUANTILES) / NUM_QUANTILES))
    quarter_of = np.searchsorted(edges, lengths, side="left")
    parts = []
    for quarter in np.unique(quarter_of):
        mask = quarter_of == quarter
        shortest, longest = int(lengths[mask].min()), int(lengths[mask].max())
        name = str(shortest) if shortest == longest else f"{shortest} to {longest}"
        parts.append(Part(name, int(mask.sum()), task.output.scores(rows.predictions[mask], rows.labels[mask])))
    return parts


def most_wrong(task: Task, rows: DevRows, number: int) -> list[tuple[int, float]]:
    """The wrong rows that the model was most sure of, or on a scale those with the largest errors, the worst first.

    Returns (row, probability of its prediction), on a scale (row, distance of its prediction from its label). Empty for
    classes without probabilities.
    """
    if task.output.num_classes is None:
        confidences = np.abs(rows.predictions - rows.labels)
    elif rows.probabilities is None:
        return []
    else:
        confidences = rows.probabilities[np.arange(len(rows.labels)), rows.predictions.astype(int)]
    wrong = np.flatnonzero(rows.predictions != rows.labels)
    order = wrong[np.argsort(-confidences[wrong], kind="stable")][:number]
    return [(int(i), float(confidences[i])) for i in order]


def agreement(task: str, first: DevRows, second: DevRows) -> dict[str, float]:
    """How far two runs predict the same for the same rows.

    For classes the share of equal predictions and Cohen's kappa (NaN if both predict one class only), on a scale the
    correlation and the mean distance of the predictions.
    """
    a, b = first.predictions, second.predictions
    num_classes = TASKS[task].output.num_classes
    if num_classes is None:
        return {"pearson": TASKS[task].output.scores(a, b)["pearson"], "mean distance": float(np.abs(a - b).mean())}
    from sklearn.metrics import cohen_kappa_score

    with np.errstate(invalid="ignore"), warnings.catch_warnings(action="ignore"):
        kappa = cohen_kappa_score(a, b, labels=list(range(num_classes)))
    return {"equal": float(np.mean(a == b)), "kappa": float(kappa)}
