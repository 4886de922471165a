"""Tasks: what labels, losses, predictions and scores of each task are."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from tasks import TASKS, Score, is_degenerate, scores, task_loss

RANDOM = np.random.default_rng(0)
SST_LOGITS = RANDOM.normal(size=(7, 5)) * 3
SST_LABELS = np.array([0, 4, 2, 2, 1, 3, 0])
LOGIT = RANDOM.normal(size=(6, 1)) * 3
PARA_LABELS = np.array([0, 1, 1, 0, 1, 0])
STS_LABELS = np.array([0.0, 5.0, 2.2, 3.75, 1.0, 4.0])


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def loss(task: str, logits: np.ndarray, labels: np.ndarray) -> float:
    return float(task_loss(TASKS[task], tensor(logits), tensor(labels)))


def test_the_sentiment_loss_is_the_mean_cross_entropy_over_five_classes() -> None:
    probabilities = np.exp(SST_LOGITS) / np.exp(SST_LOGITS).sum(1, keepdims=True)
    expected = log_loss(SST_LABELS, probabilities, labels=list(range(5)))
    assert loss("sst", SST_LOGITS, SST_LABELS) == pytest.approx(expected, rel=1e-5)


def test_the_paraphrase_loss_is_the_mean_binary_cross_entropy_on_one_logit() -> None:
    expected = log_loss(PARA_LABELS, 1 / (1 + np.exp(-LOGIT[:, 0])), labels=[0, 1])
    assert TASKS["para"].output.num_outputs == 1
    assert loss("para", LOGIT, PARA_LABELS) == pytest.approx(expected, rel=1e-5)


def test_the_similarity_loss_is_the_mean_squared_error_on_the_scale_from_0_to_5() -> None:
    expected = float(np.mean((LOGIT[:, 0] - STS_LABELS) ** 2))
    assert loss("sts", LOGIT, STS_LABELS) == pytest.approx(expected, rel=1e-5)
    assert loss("sts", STS_LABELS[:, None], STS_LABELS) == 0
    assert loss("sts", np.array([[7.0]]), np.array([5.0])) == 4  # a loss on clipped numbers would have no gradient here


@pytest.mark.parametrize(
    ("task", "logits", "labels"),
    [("sst", SST_LOGITS, SST_LABELS), ("para", LOGIT, PARA_LABELS), ("sts", LOGIT, STS_LABELS)],
)
def test_a_loss_has_one_value_a_row_and_is_computed_in_float32(
    task: str, logits: np.ndarray, labels: np.ndarray
) -> None:
    half = tensor(logits).bfloat16()
    of_rows = TASKS[task].output.losses(half, tensor(labels))
    assert of_rows.shape == (len(labels),)
    assert of_rows.dtype == torch.float32
    assert torch.equal(of_rows, TASKS[task].output.losses(half.float(), tensor(labels)))
    assert float(of_rows.mean()) == pytest.approx(float(task_loss(TASKS[task], half, tensor(labels))))


@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_the_binary_loss_is_finite_for_extreme_logits(logit: float) -> None:
    losses = TASKS["para"].output.losses(torch.full((2, 1), logit), torch.tensor([0.0, 1.0]))
    assert losses.tolist() == [max(logit, 0.0), max(-logit, 0.0)]


@pytest.mark.parametrize(
    ("task", "good", "bad"),
    [
        ("sst", ["0", "4", "3", "2.0", " 1 "], ["5", "-1", "2.5", "nan", "inf", "positive", ""]),
        ("para", ["0", "1", "0.0", "1.0"], ["2", "-1", "0.5", "nan", "yes", ""]),
        ("sts", ["0", "5", "5.0", "2.345", "0.0"], ["-0.001", "5.001", "nan", "inf", "-inf", "1,5", ""]),
    ],
)
def test_exactly_the_allowed_labels_are_read(task: str, good: list[str], bad: list[str]) -> None:
    parse = TASKS[task].output.parse
    assert [parse(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(ValueError, match="could not convert|^" + text):
            parse(text)


def test_the_allowed_labels_are_said_in_words() -> None:
    words = {name: task.output.allowed for name, task in TASKS.items()}
    assert words == {"sst": "a whole number from 0 to 4", "para": "0 or 1", "sts": "a number from 0 to 5"}


def test_decoding_takes_the_largest_class_the_sign_of_the_logit_and_the_number_clipped_to_its_scale() -> None:
    sst = TASKS["sst"].output.decode(torch.tensor([[0.0, 1, 5, 2, 3], [9, 1, 5, 2, 3], [0, 1, 2, 3, 4]]))
    para = TASKS["para"].output.decode(torch.tensor([[-0.1], [0.1], [30.0], [-30.0]]))
    sts = TASKS["sts"].output.decode(torch.tensor([[-0.5], [0.0], [2.5], [5.0], [5.5]]))
    assert sst.tolist() == [2, 0, 4]
    assert para.tolist() == [0, 1, 1, 0]
    assert sts.tolist() == [0, 0, 2.5, 5, 5]
    assert Score(1.0, 2.0).decode(torch.tensor([[0.0], [3.0]])).tolist() == [1, 2]


def test_decoding_in_half_precision_gives_float32() -> None:
    for task in TASKS.values():
        assert task.output.decode(torch.ones(2, task.output.num_outputs).half()).dtype == torch.float32


def test_predictions_are_written_as_whole_classes_and_as_numbers_with_six_digits() -> None:
    assert TASKS["sst"].output.format(3.0) == "3"
    assert TASKS["para"].output.format(1.0) == "1"
    assert TASKS["sts"].output.format(1 / 3) == "0.333333"
    assert TASKS["sts"].output.format(5.0) == "5.000000"


def test_files_and_headers_are_those_of_cs224n() -> None:
    names = [TASKS[task].file_name(split) for task in TASKS for split in ("train", "dev", "test")]
    stems = ("ids-sst", "quora", "sts")
    assert names == [f"{stem}-{split}.csv" for stem in stems for split in ("train", "dev", "test-student")]
    headers = [task.prediction_header for task in TASKS.values()]
    assert headers == ["Predicted_Sentiment", "Predicted_Is_Paraphrase", "Predicted_Similiary"]


def naive_macro_f1(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> float:
    values = []
    for k in range(num_classes):
        hits = np.sum((predictions == k) & (labels == k))
        total = np.sum(predictions == k) + np.sum(labels == k)
        values.append(2 * hits / total if total else 0.0)
    return float(np.mean(values))


def test_classes_are_scored_by_accuracy_and_macro_f1_over_all_classes() -> None:
    predictions, labels = np.array([0, 1, 2, 2, 1, 0, 0]), np.array([0, 1, 1, 2, 1, 0, 2])  # classes 3 and 4 are absent
    result = scores(TASKS["sst"], predictions, labels)
    assert result["accuracy"] == pytest.approx(5 / 7)
    assert result["macro_f1"] == pytest.approx(naive_macro_f1(predictions, labels, 5))
    predictions, labels = np.array([0.0, 1, 1, 0]), np.array([0.0, 1, 0, 0])
    result = scores(TASKS["para"], predictions, labels)
    assert result == {"accuracy": 0.75, "macro_f1": pytest.approx(naive_macro_f1(predictions, labels, 2))}


def ranks(values: np.ndarray) -> np.ndarray:
    """Mean rank of each value among all."""
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])


def test_numbers_are_scored_by_pearson_and_spearman() -> None:
    predictions = np.array([0.1, 3.0, 3.0, 5.0, 1.0, 2.5])
    result = scores(TASKS["sts"], predictions, STS_LABELS)
    assert result["pearson"] == pytest.approx(np.corrcoef(predictions, STS_LABELS)[0, 1])
    assert result["spearman"] == pytest.approx(np.corrcoef(ranks(predictions), ranks(STS_LABELS))[0, 1])
    assert result["pearson"] != pytest.approx(result["spearman"], abs=1e-3)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("predictions", "labels"),
    [
        ([2.5, 2.5, 2.5], [0.0, 1.0, 2.0]),
        ([0.0, 0.0, 0.0], [0.0, 1.0, 2.0]),
        ([0.0, 1.0, 2.0], [4.0, 4.0, 4.0]),
        ([2.5 + 1e-13, 2.5, 2.5], [0.0, 1.0, 2.0]),  # constant but for rounding
        ([1.0], [2.0]),
        ([], []),
    ],
)
def test_an_undefined_correlation_counts_as_0(predictions: list[float], labels: list[float]) -> None:
    first, second = np.array(predictions, dtype=np.float64), np.array(labels, dtype=np.float64)
    assert is_degenerate(first) or is_degenerate(second)
    assert scores(TASKS["sts"], first, second) == {"pearson": 0.0, "spearman": 0.0}


def test_predictions_that_differ_little_are_not_degenerate() -> None:
    predictions = np.array([2.5, 2.5001, 2.5002])
    assert not is_degenerate(predictions)
    assert scores(TASKS["sts"], predictions, np.array([0.0, 1.0, 2.0]))["pearson"] == pytest.approx(1.0, abs=1e-6)


def test_the_metric_that_selects_a_checkpoint_is_one_of_the_scores() -> None:
    for task in TASKS.values():
        result = scores(task, np.array([0.0, 1.0, 0.0]), np.array([0.0, 1.0, 1.0]))
        assert math.isfinite(result[task.output.selection_metric])
    metrics = [task.output.selection_metric for task in TASKS.values()]
    assert metrics == ["accuracy", "accuracy", "pearson"]
