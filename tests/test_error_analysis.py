"""Parts of the dev rows by class and by length, the surest errors, against plain counting."""

import numpy as np
import pytest

from datasets import Example
from reports.error_analysis import by_class, by_length, most_wrong
from run_record import DevRows
from tasks import TASKS

DRAW = np.random.default_rng(5)
LABELS = DRAW.integers(0, 5, 80).astype(float)
PREDICTIONS = np.where(DRAW.random(80) < 0.6, LABELS, DRAW.integers(0, 4, 80)).astype(float)
CORRECT = PREDICTIONS == LABELS
PROBABILITIES = DRAW.dirichlet(np.ones(5), 80)
SST = DevRows(tuple(map(str, range(80))), LABELS, PREDICTIONS, PROBABILITIES)
NAMES = TASKS["sst"].output.class_names
STS = DevRows(SST.ids, DRAW.uniform(0, 5, 80), DRAW.uniform(0, 5, 80), None)


def test_precision_recall_and_f1_of_a_class_are_those_that_counting_gives() -> None:
    parts = by_class(TASKS["sst"], SST)
    assert [part["class"] for part in parts] == list(NAMES) and sum(part["dev rows"] for part in parts) == 80
    for k, part in enumerate(parts):
        both, predicted, true = (int(x.sum()) for x in (CORRECT & (k == LABELS), k == PREDICTIONS, k == LABELS))
        expected = {"precision": both / max(predicted, 1), "recall": both / true, "f1": 2 * both / (predicted + true)}
        assert part == pytest.approx({"class": NAMES[k], "dev rows": true, **expected})


def test_errors_on_a_scale_are_those_of_the_rows_in_the_band() -> None:
    rows = DevRows(SST.ids, np.concatenate([[0.0, 5.0], np.round(2 * STS.labels[2:]) / 2]), STS.predictions, None)
    parts = by_class(TASKS["sts"], rows)
    assert [part["true similarity"] for part in parts] == [f"{k} to {k + 1}" for k in range(5)]
    for k, part in enumerate(parts):
        errors = (rows.predictions - rows.labels)[(rows.labels // 1 == k) | ((k == 4) & (rows.labels == 5))]
        found = [part["dev rows"], part["mean error"], part["mean absolute error"]]
        assert found == pytest.approx([len(errors), errors.mean(), np.abs(errors).mean()])
    (only,) = by_class(TASKS["sts"], DevRows(("a", "b"), np.full(2, 3.0), np.array([2.0, 5.0]), None))
    assert list(only.values())[1:] == [2, 0.5, 1.5]  # labels that are all equal make one band


def examples(lengths: np.ndarray) -> list[Example]:
    """Rows of two texts with so many words together."""
    return [Example("", (" word\t" * (n // 3), "word " * (n - n // 3)), 0, 2) for n in lengths]


def test_quarters_by_length_hold_every_row_once_and_their_own_scores() -> None:
    lengths = DRAW.permutation(80)
    parts = by_length(TASKS["sst"], SST, examples(lengths))
    assert [part["dev rows"] for part in parts] == [20] * 4
    assert [part["words"] for part in parts] == ["0 to 19", "20 to 39", "40 to 59", "60 to 79"]
    assert [part["accuracy"] for part in parts] == [CORRECT[lengths // 20 == quarter].mean() for quarter in range(4)]


def test_rows_of_equal_length_stay_together() -> None:
    lengths = np.array([3] * 50 + [4] * 10 + list(range(5, 25)))
    parts = by_length(TASKS["sst"], SST, examples(lengths))
    assert (parts[0]["words"], parts[0]["dev rows"]) == ("3", 50) and sum(part["dev rows"] for part in parts) == 80
    (only,) = by_length(TASKS["sst"], SST, examples(np.full(80, 7)))
    assert (only["words"], only["dev rows"]) == ("7", 80)


@pytest.mark.parametrize(
    ("task", "rows", "certainty"),
    [("sst", SST, PROBABILITIES[np.arange(80), PREDICTIONS.astype(int)]),
     ("sts", STS, np.abs(STS.predictions - STS.labels))],
)  # fmt: skip
def test_the_surest_errors_come_first_and_rows_that_are_right_not_at_all(
    task: str, rows: DevRows, certainty: np.ndarray
) -> None:
    wrong = [i for i in range(80) if rows.predictions[i] != rows.labels[i]]
    expected = sorted(wrong, key=lambda i: -certainty[i])
    assert most_wrong(TASKS[task], rows, 10) == [(i, certainty[i]) for i in expected[:10]]
    assert len(most_wrong(TASKS[task], rows, 1000)) == len(wrong)
