"""Parts of the dev rows by class and by length, the surest errors, and agreement, against plain counting."""

import numpy as np
import pytest

from datasets import Example
from reports.error_analysis import agreement, by_class, by_length, most_wrong, num_words
from run_record import DevRows
from tasks import TASKS

DRAW = np.random.default_rng(5)
LABELS = DRAW.integers(0, 5, 80).astype(float)
PREDICTIONS = np.where(DRAW.random(80) < 0.6, LABELS, DRAW.integers(0, 4, 80)).astype(float)
PROBABILITIES = DRAW.dirichlet(np.ones(5), 80)
SST = DevRows(tuple(map(str, range(80))), LABELS, PREDICTIONS, PROBABILITIES)
STS = DevRows(SST.ids, DRAW.uniform(0, 5, 80), DRAW.uniform(0, 5, 80), None)


def test_precision_recall_and_f1_of_a_class_are_those_that_counting_gives() -> None:
    parts = by_class(TASKS["sst"], SST)
    assert [part.name for part in parts] == list("01234") and sum(part.num_rows for part in parts) == 80
    for k, part in enumerate(parts):
        both = sum(p == y == k for p, y in zip(PREDICTIONS, LABELS, strict=True))
        predicted, true = sum(p == k for p in PREDICTIONS), sum(y == k for y in LABELS)
        assert part.num_rows == true
        expected = {"precision": both / predicted, "recall": both / true, "f1": 2 * both / (predicted + true)}
        assert part.numbers == pytest.approx(expected)


def test_a_class_that_is_never_predicted_counts_as_zero() -> None:
    parts = by_class(TASKS["para"], DevRows(("a", "b"), np.array([0.0, 1.0]), np.zeros(2), None))
    assert parts[1].numbers == {"precision": 0, "recall": 0, "f1": 0} and parts[1].num_rows == 1


def test_errors_on_a_scale_are_those_of_the_rows_in_the_band() -> None:
    rows = DevRows(SST.ids, np.concatenate([[0.0, 5.0], np.round(2 * STS.labels[2:]) / 2]), STS.predictions, None)
    parts = by_class(TASKS["sts"], rows)
    assert [part.name for part in parts] == [f"{k} to {k + 1}" for k in range(5)]
    for k, part in enumerate(parts):
        pairs = zip(rows.predictions, rows.labels, strict=True)
        errors = [p - y for p, y in pairs if k <= y < k + 1 or (k == 4 and y == 5)]
        assert part.num_rows == len(errors) > 0
        expected = {"mean error": sum(errors) / len(errors), "mean absolute error": sum(map(abs, errors)) / len(errors)}
        assert part.numbers == pytest.approx(expected)


def test_labels_that_are_all_equal_make_one_band() -> None:
    (part,) = by_class(TASKS["sts"], DevRows(("a", "b"), np.full(2, 3.0), np.array([2.0, 5.0]), None))
    assert part.num_rows == 2 and part.numbers == {"mean error": 0.5, "mean absolute error": 1.5}


def test_words_of_both_texts_count() -> None:
    assert num_words([Example("a", ("one  two", " three\tfour five"), 0, 2), Example("b", ("",), 0, 3)]).tolist() == [
        5,
        0,
    ]


def test_quarters_by_length_hold_every_row_once_and_their_own_scores() -> None:
    lengths = DRAW.permutation(80)
    parts = by_length(TASKS["sst"], SST, lengths)
    assert [part.num_rows for part in parts] == [20] * 4
    assert [part.name for part in parts] == ["0 to 19", "20 to 39", "40 to 59", "60 to 79"]
    for quarter, part in enumerate(parts):
        rows = [i for i in range(80) if lengths[i] // 20 == quarter]
        assert part.numbers["accuracy"] == pytest.approx(np.mean([PREDICTIONS[i] == LABELS[i] for i in rows]))
    for part, quarter in zip(by_length(TASKS["sts"], STS, lengths), range(4), strict=True):
        rows = lengths // 20 == quarter
        assert part.numbers["pearson"] == pytest.approx(np.corrcoef(STS.predictions[rows], STS.labels[rows])[0, 1])


def test_rows_of_equal_length_stay_together() -> None:
    lengths = np.array([3] * 50 + [4] * 10 + list(range(5, 25)))
    parts = by_length(TASKS["sst"], SST, lengths)
    assert parts[0].name == "3" and parts[0].num_rows == 50
    assert sum(part.num_rows for part in parts) == 80
    (only,) = by_length(TASKS["sst"], SST, np.full(80, 7))
    assert (only.name, only.num_rows) == ("7", 80)


def test_the_surest_errors_come_first_and_rows_that_are_right_not_at_all() -> None:
    found = most_wrong(TASKS["sst"], SST, 10)
    wrong = [i for i in range(80) if PREDICTIONS[i] != LABELS[i]]
    expected = sorted(wrong, key=lambda i: -PROBABILITIES[i, int(PREDICTIONS[i])])[:10]
    assert found == [(i, PROBABILITIES[i, int(PREDICTIONS[i])]) for i in expected]
    assert len(most_wrong(TASKS["sst"], SST, 1000)) == len(wrong)


def test_on_a_scale_the_largest_errors_come_first() -> None:
    found = most_wrong(TASKS["sts"], STS, 3)
    errors = np.abs(STS.predictions - STS.labels)
    assert [error for _, error in found] == sorted(errors, reverse=True)[:3]
    assert [errors[i] for i, _ in found] == [error for _, error in found]


def test_without_probabilities_nothing_is_known_to_be_sure() -> None:
    assert most_wrong(TASKS["sst"], DevRows(SST.ids, LABELS, PREDICTIONS, None), 3) == []


def test_agreement_of_classes_is_the_share_of_equal_predictions_and_kappa() -> None:
    other = DevRows(SST.ids, LABELS, DRAW.permutation(PREDICTIONS), None)
    a, b = SST.predictions, other.predictions
    equal = np.mean([x == y for x, y in zip(a, b, strict=True)])
    by_chance = sum(np.mean(a == k) * np.mean(b == k) for k in range(5))
    found = agreement("sst", SST, other)
    assert found == pytest.approx({"equal": equal, "kappa": (equal - by_chance) / (1 - by_chance)})
    assert agreement("sst", SST, SST) == {"equal": 1, "kappa": 1}
    constant = DevRows(SST.ids, LABELS, np.zeros(80), None)
    assert agreement("sst", constant, constant) == pytest.approx({"equal": 1, "kappa": np.nan}, nan_ok=True)


def test_agreement_on_a_scale_is_the_correlation_and_the_distance() -> None:
    other = DevRows(SST.ids, STS.labels, DRAW.uniform(0, 5, 80), None)
    found = agreement("sts", STS, other)
    assert found["pearson"] == pytest.approx(np.corrcoef(STS.predictions, other.predictions)[0, 1])
    assert found["mean distance"] == pytest.approx(np.mean(np.abs(STS.predictions - other.predictions)))
    assert agreement("sts", STS, STS) == pytest.approx({"pearson": 1, "mean distance": 0})
