"""Predictions in the order of the rows, metrics against scikit-learn and SciPy, and prediction files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor

from bert import DropoutMasks
from datasets import Batch, FeatureRows, TokenizedRows, TokenRows
from evaluation import (
    Precision,
    compute_features,
    confusion_matrices,
    evaluate,
    format_scores,
    format_table,
    mean_score,
    predict_all,
    predict_logits,
    write_predictions,
)
from helpers import generator, tiny_config, tiny_model
from model import FrozenEncoder
from pal import PalConfig
from tasks import TASKS, is_degenerate

CPU = Precision(torch.device("cpu"))


class LogitsOf:
    """A model whose logits are given: those of row r of a data set stand in row r of its table."""

    def __init__(self, **tables: Tensor) -> None:
        self.tables = tables
        self.batch_sizes: list[int] = []

    def __call__(
        self, task: str, batch: Batch, masks: DropoutMasks | None = None, perturbation: Tensor | None = None
    ) -> Tensor:
        assert masks is None and perturbation is None and not torch.is_grad_enabled()
        self.batch_sizes.append(len(batch))
        return self.tables[task][list(batch.rows)]


def token_rows(task: str, num_rows: int, seed: int = 0, labels: np.ndarray | None = None) -> TokenizedRows:
    """Random rows of very different lengths."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 40, num_rows).astype(np.int32)
    ids = random.integers(0, tiny_config().vocab_size, int(lengths.sum())).astype(np.int32)
    firsts = np.array([random.integers(1, length + 1) for length in lengths], np.int32)
    labels = np.zeros(num_rows, np.float32) if labels is None else labels.astype(np.float32)
    names = [f"row{i}" for i in range(num_rows)]
    return TokenizedRows(TASKS[task], names, labels, TokenRows(ids, lengths, firsts), torch.device("cpu"))


def table(num_rows: int, num_outputs: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, num_outputs, generator=generator(seed))


# -------------------------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize("batch_size", [1, 7, 25, 100])
def test_logits_come_in_the_order_of_the_rows(batch_size: int) -> None:
    logits, rows = table(25, 5), token_rows("sst", 25)
    assert rows.by_length().tolist() != list(range(25))
    model = LogitsOf(sst=logits)
    assert torch.equal(predict_logits(model, "sst", rows, batch_size, CPU), logits)
    assert sum(model.batch_sizes) == 25 and max(model.batch_sizes) <= batch_size
    assert len(model.batch_sizes) == -(-25 // batch_size)


@torch.no_grad()
def test_predictions_do_not_depend_on_the_batch_size() -> None:
    model, rows = tiny_model(adapters=PalConfig.for_encoder(tiny_config())), token_rows("para", 25)
    alone = torch.cat([model("para", rows.batch([i])) for i in range(25)])
    assert alone.std() > 0.05
    for batch_size in (1, 4, 25, 64):
        logits = predict_logits(model, "para", rows, batch_size, CPU)
        torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)
        assert not logits.requires_grad and logits.dtype == torch.float32


def test_features_are_the_pooled_output_without_dropout_in_the_order_of_the_rows() -> None:
    labels = np.arange(25)
    model, rows = tiny_model(adapters=PalConfig.for_encoder(tiny_config())), token_rows("sst", 25, labels=labels)
    features = compute_features(model, "sst", rows, 4, CPU)
    expected = torch.cat([model.pooled("sst", rows.batch([i])) for i in range(25)])
    torch.testing.assert_close(features.features, expected.detach(), rtol=0, atol=1e-5)
    assert not features.features.requires_grad and np.array_equal(features.labels, labels)
    through_features = predict_logits(FrozenEncoder(model), "sst", features, 7, CPU)
    torch.testing.assert_close(through_features, predict_logits(model, "sst", rows, 7, CPU), rtol=0, atol=1e-5)


def test_evaluation_leaves_parameters_gradients_and_generators_alone() -> None:
    model = tiny_model()
    before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    labels = np.array([0, 1, 0, 1, 1])
    evaluate(model, {"para": token_rows("para", 5, labels=labels)}, 2, CPU, pytest.fail)
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_an_evaluation_can_be_stopped_between_batches() -> None:
    calls = []

    def between() -> None:
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt

    model = LogitsOf(sst=table(25, 5))
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, {"sst": token_rows("sst", 25)}, 5, CPU, pytest.fail, between)
    assert len(model.batch_sizes) == 2


def test_autocast_is_on_for_the_dtype_asked_for() -> None:
    seen = []

    class Watch(LogitsOf):
        def __call__(self, task: str, batch: Batch, *args: object, **kwargs: object) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
            return super().__call__(task, batch).bfloat16()

    for dtype in (None, torch.bfloat16):
        logits = predict_logits(
            Watch(sst=table(4, 5)), "sst", token_rows("sst", 4), 4, Precision(torch.device("cpu"), dtype)
        )
        assert logits.dtype == torch.float32
    assert seen == [False, torch.bfloat16]


# ------------------------------------------------------------------------------------------------------ metrics


def test_metrics_equal_those_of_scikit_learn_and_scipy() -> None:
    random = np.random.default_rng(1)
    sst_labels, para_labels = random.integers(0, 4, 60), random.integers(0, 2, 60)  # class 4 never occurs
    sts_labels = random.uniform(0, 5, 60).astype(np.float32)
    sst, para = table(60, 5, 1), table(60, 1, 2)
    sst[:, 4] = -9.0  # and is never predicted: it counts in the macro F1 all the same
    sts = torch.from_numpy(sts_labels).view(-1, 1) + 2 * table(60, 1, 3)
    rows = {
        "sst": token_rows("sst", 60, labels=sst_labels),
        "para": token_rows("para", 60, labels=para_labels),
        "sts": token_rows("sts", 60, labels=sts_labels),
    }
    metrics = evaluate(LogitsOf(sst=sst, para=para, sts=sts), rows, 16, CPU, pytest.fail)
    classes, yes = sst.argmax(-1).numpy(), (torch.sigmoid(para) > 0.5).squeeze(-1).long().numpy()
    scale = np.clip(sts.squeeze(-1).numpy(), 0, 5)
    assert (scale != sts.squeeze(-1).numpy()).any()
    assert metrics["sst"] == pytest.approx(
        {
            "accuracy": accuracy_score(sst_labels, classes),
            "macro_f1": f1_score(sst_labels, classes, labels=range(5), average="macro", zero_division=0),
        }
    )
    assert metrics["para"] == pytest.approx(
        {"accuracy": accuracy_score(para_labels, yes), "macro_f1": f1_score(para_labels, yes, average="macro")}
    )
    assert metrics["sts"] == pytest.approx(
        {"pearson": pearsonr(scale, sts_labels)[0], "spearman": spearmanr(scale, sts_labels)[0]}
    )
    wanted = (metrics["sst"]["accuracy"] + metrics["para"]["accuracy"] + metrics["sts"]["pearson"]) / 3
    assert mean_score(metrics) == pytest.approx(wanted)


def test_the_mean_is_over_the_tasks_that_are_there() -> None:
    metrics = {"sst": {"accuracy": 0.5, "macro_f1": 0.1}, "sts": {"pearson": 0.8, "spearman": 0.2}}
    assert mean_score(metrics) == pytest.approx(0.65)
    assert mean_score({"sts": metrics["sts"]}) == pytest.approx(0.8)
    assert format_scores(metrics) == "sst accuracy 0.500, sts pearson 0.800, mean 0.650"


@pytest.mark.parametrize("value", [2.5, -7.0, 9.0])
def test_equal_predictions_count_as_zero_with_a_warning(value: float) -> None:
    warnings: list[str] = []
    rows = {"sts": token_rows("sts", 20, labels=np.linspace(0, 5, 20))}
    logits = torch.full((20, 1), value) + (table(20, 1) if abs(value) > 5 else 0)  # clipping makes them equal
    metrics = evaluate(LogitsOf(sts=logits), rows, 8, CPU, warnings.append)
    assert metrics == {"sts": {"pearson": 0.0, "spearman": 0.0}}
    assert len(warnings) == 1 and warnings[0].startswith("warning: sts: ") and "counts as 0" in warnings[0]


def test_equal_labels_count_as_zero_and_are_never_nan() -> None:
    rows = {"sts": token_rows("sts", 20, labels=np.full(20, 3.0))}
    metrics = evaluate(LogitsOf(sts=table(20, 1) + 2), rows, 8, CPU, lambda message: None)
    assert metrics == {"sts": {"pearson": 0.0, "spearman": 0.0}}


def test_values_that_differ_by_rounding_only_are_degenerate() -> None:
    assert is_degenerate(np.array([3.0], np.float32)) and is_degenerate(np.full(5, 1e-3))
    assert is_degenerate(np.array([3.0, 3.0 + 1e-12])) and not is_degenerate(np.array([3.0, 3.001]))


def test_a_confusion_matrix_has_true_classes_in_rows_and_predicted_ones_in_columns() -> None:
    predicted = torch.tensor([0, 0, 2, 4, 4, 1])
    labels = np.array([0, 1, 2, 4, 0, 1])
    rows = {
        "sst": token_rows("sst", 6, labels=labels),
        "para": token_rows("para", 6, labels=np.array([0, 0, 0, 0, 1, 1])),
        "sts": token_rows("sts", 6),
    }
    yes = torch.tensor([1.0, -1, -1, -1, 1, -1]).view(-1, 1)
    model = LogitsOf(sst=torch.nn.functional.one_hot(predicted, 5).float(), para=yes, sts=table(6, 1))
    expected = np.zeros((5, 5), int)
    np.add.at(expected, (labels, predicted.numpy()), 1)
    logits = predict_all(model, rows, 4, CPU)
    assert confusion_matrices(logits, rows) == {"sst": expected.tolist(), "para": [[3, 1], [1, 1]]}


# ------------------------------------------------------------------------------------------- files and the table


def test_prediction_files_have_the_format_that_cs224n_grades(tmp_path: Path) -> None:
    model = LogitsOf(
        sst=torch.eye(5)[[4, 0, 2]],
        para=torch.tensor([[0.3], [-0.2], [4.0]]),
        sts=torch.tensor([[5.7], [-1.0], [2.123456789]]),
    )
    expected = {
        "sst": "id \t Predicted_Sentiment \nrow0 , 4 \nrow1 , 0 \nrow2 , 2 \n",
        "para": "id \t Predicted_Is_Paraphrase \nrow0 , 1 \nrow1 , 0 \nrow2 , 1 \n",
        "sts": "id \t Predicted_Similiary \nrow0 , 5.000000 \nrow1 , 0.000000 \nrow2 , 2.123457 \n",
    }
    for task, content in expected.items():
        rows = token_rows(task, 3, seed=4)
        assert rows.by_length().tolist() in ([1, 2, 0], [2, 0, 1])
        path = tmp_path / f"{task}.csv"
        path.write_text("an older file")
        write_predictions(task, rows, predict_logits(model, task, rows, 2, CPU), path)
        assert path.read_bytes() == content.encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["para.csv", "sst.csv", "sts.csv"]


def test_a_prediction_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sst.csv"
    path.write_text("an older file")

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_predictions("sst", token_rows("sst", 3), table(3, 5), path)
    assert path.read_text() == "an older file"


def test_the_table_shows_both_metrics_of_every_task_and_the_mean() -> None:
    metrics = {
        "sst": {"accuracy": 0.5, "macro_f1": 0.4321},
        "para": {"accuracy": 0.8, "macro_f1": 0.75},
        "sts": {"pearson": 0.8, "spearman": 0.7},
    }
    lines = format_table(metrics, {"sst": 11, "para": 22, "sts": 33}).split("\n")
    assert [" ".join(line.split()) for line in lines] == [
        "task dev rows",
        "SST-5 sentiment 11 accuracy 0.500 macro_f1 0.432",
        "Quora paraphrase 22 accuracy 0.800 macro_f1 0.750",
        "STS similarity 33 pearson 0.800 spearman 0.700",
        "mean 0.700",
    ]
    assert all(line == line.rstrip() for line in lines)


def test_feature_rows_are_evaluated_like_token_rows() -> None:
    labels = np.array([0, 1, 1, 0], np.float32)
    model = LogitsOf(para=table(4, 1))
    by_tokens = evaluate(model, {"para": token_rows("para", 4, labels=labels)}, 3, CPU, pytest.fail)
    assert evaluate(model, {"para": FeatureRows(torch.zeros(4, 2), labels)}, 3, CPU, pytest.fail) == by_tokens
