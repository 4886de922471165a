"""Tasks: what labels, losses, predictions and scores of each task are."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from helpers import THREE
from tasks import TASKS, Classes, Score, is_degenerate

RANDOM = np.random.default_rng(0)
SST_LOGITS = RANDOM.normal(size=(7, 5)) * 3
SST_PROBABILITIES = np.exp(SST_LOGITS) / np.exp(SST_LOGITS).sum(1, keepdims=True)
SST_LABELS = np.array([0, 4, 2, 2, 1, 3, 0])
LOGIT = RANDOM.normal(size=(6, 1)) * 3
PARA_LABELS = np.array([0, 1, 1, 0, 1, 0])
STS_LABELS = np.array([0.0, 5.0, 2.2, 3.75, 1.0, 4.0])
FAR, AT_THE_END = np.array([[7.0]]), np.array([5.0])  # a loss on clipped numbers would have no gradient here


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize(
    ("task", "logits", "labels", "expected"),
    [
        ("sst", SST_LOGITS, SST_LABELS, log_loss(SST_LABELS, SST_PROBABILITIES, labels=list(range(5)))),
        ("para", LOGIT, PARA_LABELS, log_loss(PARA_LABELS, 1 / (1 + np.exp(-LOGIT[:, 0])))),
        ("sts", LOGIT, STS_LABELS, np.mean((LOGIT[:, 0] - STS_LABELS) ** 2)),
        ("sts", FAR, AT_THE_END, 4.0),
    ],
)
def test_a_loss_is_the_mean_of_one_float32_value_a_row(
    task: str, logits: np.ndarray, labels: np.ndarray, expected: float
) -> None:
    """Cross entropy over five classes, binary cross entropy on one logit, squared error on the scale from 0 to 5."""
    assert float(TASKS[task].output.losses(tensor(logits), tensor(labels)).mean()) == pytest.approx(expected, rel=1e-5)
    half = tensor(logits).bfloat16()
    of_rows = TASKS[task].output.losses(half, tensor(labels))
    assert of_rows.shape == (len(labels),) and of_rows.dtype == torch.float32
    assert torch.equal(of_rows, TASKS[task].output.losses(half.float(), tensor(labels)))


@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_the_binary_loss_is_finite_for_extreme_logits(logit: float) -> None:
    losses = TASKS["para"].output.losses(torch.full((2, 1), logit), torch.tensor([0.0, 1.0]))
    assert losses.tolist() == [max(logit, 0.0), max(-logit, 0.0)]


@pytest.mark.parametrize(
    ("task", "words", "good", "bad"),
    [
        ("sst", "a whole number from 0 to 4", "0|4|3|2.0| 1 ", "5|-1|2.5|nan|inf|positive|"),
        ("para", "0 or 1", "0|1|0.0|1.0", "2|-1|0.5|nan|yes|"),
        ("sts", "a number from 0 to 5", "0|5|5.0|2.345|0.0", "-0.001|5.001|nan|inf|-inf|1,5|"),
    ],
)
def test_exactly_the_labels_that_are_said_to_be_allowed_are_read(task: str, words: str, good: str, bad: str) -> None:
    output = TASKS[task].output
    assert output.allowed == words
    assert [output.parse(text) for text in good.split("|")] == [float(text) for text in good.split("|")]
    for text in bad.split("|"):
        with pytest.raises(ValueError, match="could not convert|^" + text):
            output.parse(text)


def test_decoding_takes_the_largest_class_the_sign_of_the_logit_and_the_number_clipped_to_its_scale() -> None:
    sst = TASKS["sst"].output.decode(torch.tensor([[0.0, 1, 5, 2, 3], [9, 1, 5, 2, 3], [0, 1, 2, 3, 4]]))
    para = TASKS["para"].output.decode(torch.tensor([[-0.1], [0.1], [30.0], [-30.0]]))
    sts = TASKS["sts"].output.decode(torch.tensor([[-0.5], [0.0], [2.5], [5.0], [5.5]]))
    assert (sst.tolist(), para.tolist(), sts.tolist()) == ([2, 0, 4], [0, 1, 1, 0], [0, 0, 2.5, 5, 5])
    assert Score(1.0, 2.0).decode(torch.tensor([[0.0], [3.0]])).tolist() == [1, 2]
    for task in (TASKS[name] for name in THREE):
        assert task.output.decode(torch.ones(2, task.output.num_outputs).half()).dtype == torch.float32


def test_probabilities_are_of_the_classes_and_a_number_on_a_scale_has_none() -> None:
    found = TASKS["sst"].output.probabilities(tensor(SST_LOGITS))
    assert found is not None and found.numpy() == pytest.approx(SST_PROBABILITIES, rel=1e-4)
    found = TASKS["para"].output.probabilities(torch.tensor([[0.0], [2.0]]))
    assert found is not None and found.tolist() == [[0.5, 0.5], pytest.approx([0.119203, 0.880797])]
    assert TASKS["sts"].output.probabilities(torch.tensor([[0.0]])) is None


def test_each_class_has_one_name_or_its_number_and_a_scale_has_none() -> None:
    names = {name: task.output.class_names for name, task in ((name, TASKS[name]) for name in THREE)}
    assert names["sst"] == ("very negative", "negative", "neutral", "positive", "very positive")
    assert (names["para"], names["sts"], Classes(3).class_names) == (("no", "yes"), (), ("0", "1", "2"))
    assert all(
        len(names[name]) == (task.output.num_classes or 0) for name, task in ((name, TASKS[name]) for name in THREE)
    )


def test_files_headers_and_predictions_are_written_as_those_of_cs224n() -> None:
    written = [TASKS[task].output.format(value) for task, value in (("sst", 3.0), ("para", 1.0), ("sts", 1 / 3))]
    assert written == ["3", "1", "0.333333"]
    names = [TASKS[task].file_name(split) for task in THREE for split in ("train", "dev", "test")]
    stems = ("ids-sst", "quora", "sts")
    assert names == [f"{stem}-{split}.csv" for stem in stems for split in ("train", "dev", "test-student")]
    headers = [TASKS[task].prediction_header for task in THREE]
    assert headers == ["Predicted_Sentiment", "Predicted_Is_Paraphrase", "Predicted_Similiary"]


def naive_macro_f1(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> float:
    hits = [np.sum((predictions == k) & (labels == k)) for k in range(num_classes)]
    totals = [np.sum(predictions == k) + np.sum(labels == k) for k in range(num_classes)]
    return float(np.mean([2 * hit / total if total else 0.0 for hit, total in zip(hits, totals, strict=True)]))


@pytest.mark.parametrize(
    ("task", "predictions", "labels"),
    [("sst", [0, 1, 2, 2, 1, 0, 0], [0, 1, 1, 2, 1, 0, 2]), ("para", [0.0, 1, 1, 0], [0.0, 1, 0, 0])],
)  # classes 3 and 4 are absent
def test_classes_are_scored_by_accuracy_and_macro_f1_over_all_classes(
    task: str, predictions: list[float], labels: list[float]
) -> None:
    output, first, second = TASKS[task].output, np.array(predictions), np.array(labels)
    macro_f1 = naive_macro_f1(first, second, output.num_classes or 0)
    assert output.scores(first, second) == pytest.approx({"accuracy": np.mean(first == second), "macro_f1": macro_f1})


def ranks(values: np.ndarray) -> np.ndarray:
    """Mean rank of each value among all."""
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])


def test_numbers_are_scored_by_pearson_and_spearman() -> None:
    predictions, score = np.array([0.1, 3.0, 3.0, 5.0, 1.0, 2.5]), TASKS["sts"].output.scores
    pearson, spearman = (np.corrcoef(of(predictions), of(STS_LABELS))[0, 1] for of in (np.asarray, ranks))
    assert score(predictions, STS_LABELS) == pytest.approx({"pearson": pearson, "spearman": spearman})
    assert abs(pearson - spearman) > 1e-3
    close = np.array([2.5, 2.5001, 2.5002])  # they differ little, but they do
    assert score(close, np.array([0.0, 1.0, 2.0]))["pearson"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("predictions", [[2.5] * 3, [0.0] * 3, [1e-3] * 3, [2.5 + 1e-13, 2.5, 2.5], [1.0], []])
@pytest.mark.parametrize("of", [lambda a, b: (a, b), lambda a, b: (b, a)], ids=["predictions", "labels"])
def test_an_undefined_correlation_counts_as_0(
    predictions: list[float], of: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> None:
    constant, various = np.array(predictions), np.arange(len(predictions), dtype=np.float64)
    assert is_degenerate(constant)
    assert TASKS["sts"].output.scores(*of(constant, various)) == {"pearson": 0.0, "spearman": 0.0}


def test_the_metric_that_selects_a_checkpoint_is_one_of_the_scores() -> None:
    metrics = [TASKS[task].output.selection_metric for task in THREE]
    assert metrics == ["accuracy", "accuracy", "pearson"]
    for task in (TASKS[name] for name in THREE):
        result = task.output.scores(np.array([0.0, 1.0, 0.0]), np.array([0.0, 1.0, 1.0]))
        assert math.isfinite(result[task.output.selection_metric])
