"""Where a model goes wrong on the dev rows: by class, by length, and the rows it was most sure of and wrong about.

Shape letters: R rows of a dev file.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from run_record import DevRows
from tasks import Task

if TYPE_CHECKING:
    from datasets import Example

NUM_BANDS = 5  # a scale is cut into as many bands of equal width
NUM_QUANTILES = 4

Part = dict[str, Any]  # some of the dev rows: their name, their number, and what is measured on them


def by_class(task: Task, rows: DevRows) -> list[Part]:
    """Of each class precision, recall and F1; on a scale, of each band of labels the error of the predictions."""
    if task.output.num_classes is None:
        return _by_band(task, rows)
    from sklearn.metrics import precision_recall_fscore_support

    classes = list(range(task.output.num_classes))
    columns = precision_recall_fscore_support(rows.labels, rows.predictions, labels=classes, zero_division=0)
    return [
        {"class": name, "dev rows": int(support), "precision": precision, "recall": recall, "f1": f1}
        for name, precision, recall, f1, support in zip(task.output.class_names, *columns, strict=True)
    ]


def _by_band(task: Task, rows: DevRows) -> list[Part]:
    from scipy.stats import binned_statistic

    errors = rows.predictions - rows.labels
    (means, distances), edges, band_of = binned_statistic(rows.labels, [errors, np.abs(errors)], bins=NUM_BANDS)
    return [
        {
            f"true {task.label_column}": f"{edges[k]:.3g} to {edges[k + 1]:.3g}",
            "dev rows": int((band_of == k + 1).sum()),
            "mean error": means[k],
            "mean absolute error": distances[k],
        }
        for k in np.unique(band_of) - 1
    ]


def by_length(task: Task, rows: DevRows, examples: Sequence["Example"]) -> list[Part]:
    """The task's metrics on each quarter of the rows by words, of both texts. Rows of equal length stay together."""
    lengths = np.array([sum(len(text.split()) for text in example.texts) for example in examples])
    edges = np.unique(np.quantile(lengths, np.arange(1, NUM_QUANTILES) / NUM_QUANTILES))
    quarter_of = np.searchsorted(edges, lengths)
    parts = []
    for mask in (quarter_of == quarter for quarter in np.unique(quarter_of)):
        name = " to ".join(map(str, np.unique([lengths[mask].min(), lengths[mask].max()])))
        scores = task.output.scores(rows.predictions[mask], rows.labels[mask])
        parts.append({"words": name, "dev rows": int(mask.sum()), **scores})
    return parts


def most_wrong(task: Task, rows: DevRows, number: int) -> list[tuple[int, float]]:
    """The wrong rows that the model was most sure of, or on a scale those with the largest errors, the worst first.

    Returns (row, probability of its prediction), on a scale (row, distance of its prediction from its label).
    """
    if rows.probabilities is None:
        certainty = np.abs(rows.predictions - rows.labels)
    else:
        certainty = rows.probabilities[np.arange(len(rows.labels)), rows.predictions.astype(int)]
    wrong = np.flatnonzero(rows.predictions != rows.labels)
    order = wrong[np.argsort(-certainty[wrong], kind="stable")][:number]
    return [(int(i), float(certainty[i])) for i in order]
