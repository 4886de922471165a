"""What the numbers of a run do not say by themselves: what guessing scores, and what went wrong without an error."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tasks import TASKS

Confusion = Mapping[str, Sequence[Sequence[int]] | np.ndarray]  # by task: rows are true classes, columns predicted ones
GUESS = "constant"  # the column of `guess_scores`
GUESS_IN_WORDS = "constant: the score of one answer for all rows, of classes the most frequent one's"


def guess_scores(tasks: Iterable[str], confusion: Confusion) -> dict[str, float]:
    """The score of giving all rows the same answer: the largest class's share, or its part of the mean F1; on a scale,
    where there is no correlation, 0."""
    scores = {}
    for task in tasks:
        if task in confusion:
            counts = np.sum(confusion[task], axis=1)
            share = float(counts.max() / max(1, counts.sum()))
            of_f1 = 2 * share / (1 + share) / len(counts)  # the other classes have 0
            scores[task] = of_f1 if TASKS[task].output.selection_metric == "macro_f1" else share
        elif not TASKS[task].output.class_names:
            scores[task] = 0.0
    return scores


def remarks(
    metrics: Mapping[str, Mapping[str, float]], confusion: Confusion, records: Iterable[Mapping[str, Any]]
) -> list[str]:
    """A line for each task that has one answer for all dev rows, and one if fine-tuning fell below its frozen stage.

    metrics: of each task. records: of metrics.jsonl. Details stand in parentheses at a line's end.
    """
    lines = []
    for task, scores in metrics.items():
        output = TASKS[task].output
        predicted = np.flatnonzero(np.sum(confusion[task], axis=0)).tolist() if task in confusion else []
        if len(predicted) == 1:
            lines.append(f"{task}: one class predicted throughout ({output.class_names[predicted[0]]})")
        elif not output.class_names and scores[output.selection_metric] == 0:
            lines.append(f"{task}: one number predicted throughout (the correlation is undefined and counts as 0)")
    best: dict[str, float] = {}
    for record in records:
        if (mean := (record.get("dev") or {}).get("mean")) is not None:
            best[record["stage"]] = max(best.get(record["stage"], mean), mean)
    if {"pretrain", "finetune"} <= best.keys() and best["finetune"] < best["pretrain"]:
        lines.append(
            f"fine-tuning ended below its frozen stage (best means {best['finetune']:.4f} and {best['pretrain']:.4f}; "
            "the model kept is the fine-tuned one; another --lr or more --epochs may help)"
        )
    return [f"warning: {line}" for line in lines]
