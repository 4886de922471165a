"""Predictions in the order of the rows, metrics, and prediction files."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bert import initialize
from datasets import Batch, TokenizedRows, TokenRows
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
from helpers import STD, THREE, Patch, generator, tiny_config, tiny_model
from model import FrozenEncoder, MultitaskBert
from ops import DropoutMasks
from pal import ProjectedAttention
from parameters import Choice
from tasks import TASKS

CPU = Precision(torch.device("cpu"))


class LogitsOf:
    """A model whose logits are given: those of a row that begins with token r stand in row r of its table."""

    def __init__(self, **tables: Tensor) -> None:
        self.tables = tables
        self.batch_sizes: list[int] = []

    def __call__(
        self, task: str, batch: Batch, masks: DropoutMasks | None = None, perturbation: Tensor | None = None
    ) -> Tensor:
        assert masks is None and perturbation is None and not torch.is_grad_enabled()
        self.batch_sizes.append(len(batch))
        assert batch.tokens is not None
        return self.tables[task][batch.tokens.input_ids[batch.tokens.first_tokens]]


def token_rows(task: str, num_rows: int, seed: int = 0, labels: np.ndarray | None = None) -> TokenizedRows:
    """Random rows of very different lengths; each begins with its number."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 40, num_rows).astype(np.int32)
    ids = random.integers(0, tiny_config().vocab_size, int(lengths.sum())).astype(np.int32)
    ids[np.cumsum(lengths) - lengths] = np.arange(num_rows)
    firsts = np.array([random.integers(1, length + 1) for length in lengths], np.int32)
    labels = np.zeros(num_rows, np.float32) if labels is None else labels.astype(np.float32)
    names = [f"row{i}" for i in range(num_rows)]
    return TokenizedRows(TASKS[task], names, labels, TokenRows(ids, lengths, firsts), torch.device("cpu"))


def table(num_rows: int, num_outputs: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, num_outputs, generator=generator(seed))


def adapted_model() -> MultitaskBert:
    """With adapters that have been trained."""
    model = tiny_model(adapter=Choice("pal", ProjectedAttention.Parameters()))
    initialize(model.adapters, STD, generator(9))
    return model


@pytest.mark.parametrize("batch_size", [1, 7, 25, 100])
def test_logits_come_in_the_order_of_the_rows(batch_size: int) -> None:
    logits, rows = table(25, 5), token_rows("sst", 25)
    assert rows.by_length().tolist() != list(range(25))
    model = LogitsOf(sst=logits)
    assert torch.equal(predict_logits(model, "sst", rows, batch_size, CPU), logits)
    assert sum(model.batch_sizes) == 25 and max(model.batch_sizes) <= batch_size
    assert len(model.batch_sizes) == -(-25 // batch_size)


def test_features_are_the_pooled_output_without_dropout_in_the_order_of_the_rows() -> None:
    labels = np.arange(25)
    model, rows = adapted_model(), token_rows("sst", 25, labels=labels)
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
    model, stops = LogitsOf(sst=table(25, 5)), iter([None, None, KeyboardInterrupt()])

    def between() -> None:
        if error := next(stops):
            raise error

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, {"sst": token_rows("sst", 25)}, 5, CPU, pytest.fail, between)
    assert len(model.batch_sizes) == 2


@pytest.mark.parametrize(("dtype", "expected"), [(None, False), (torch.bfloat16, torch.bfloat16)])
def test_autocast_is_on_for_the_dtype_asked_for(dtype: torch.dtype | None, expected: object) -> None:
    class Watch(LogitsOf):
        def __call__(self, task: str, batch: Batch, *args: object, **kwargs: object) -> Tensor:
            assert expected == (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
            return super().__call__(task, batch).bfloat16()

    precision = Precision(torch.device("cpu"), dtype)
    assert predict_logits(Watch(sst=table(4, 5)), "sst", token_rows("sst", 4), 4, precision).dtype == torch.float32


def test_metrics_are_the_scores_of_the_decoded_predictions() -> None:
    labels = {name: np.arange(60) % 2 for name in THREE}
    logits = {name: table(60, task.output.num_outputs, 3) * 3 for name, task in ((name, TASKS[name]) for name in THREE)}
    rows = {name: token_rows(name, 60, labels=labels[name]) for name in THREE}
    metrics = evaluate(LogitsOf(**logits), rows, 16, CPU, pytest.fail)
    assert list(metrics) == list(THREE)
    decoded = {
        "sst": logits["sst"].argmax(-1).numpy(),
        "para": (logits["para"][:, 0] > 0).numpy(),
        "sts": np.clip(logits["sts"][:, 0].numpy(), 0, 5),
    }
    for name, of in metrics.items():
        assert of == pytest.approx(TASKS[name].output.scores(decoded[name], labels[name]))
    wanted = (metrics["sst"]["accuracy"] + metrics["para"]["accuracy"] + metrics["sts"]["pearson"]) / 3
    assert mean_score(metrics) == pytest.approx(wanted)


def test_the_mean_is_over_the_tasks_that_are_there() -> None:
    metrics = {"sst": {"accuracy": 0.5, "macro_f1": 0.1}, "sts": {"pearson": 0.8, "spearman": 0.2}}
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


def test_a_confusion_matrix_has_true_classes_in_rows_and_predicted_ones_in_columns() -> None:
    labels, predicted = np.array([0, 1, 2, 4, 0, 1]), torch.tensor([0, 0, 2, 4, 4, 1])
    yes = torch.tensor([1.0, -1, -1, -1, 1, -1]).view(-1, 1)
    logits = {"sst": torch.nn.functional.one_hot(predicted, 5).float(), "para": yes, "sts": table(6, 1)}
    rows = {task: token_rows(task, 6, labels=labels if task == "sst" else labels // 4) for task in THREE}
    rows["para"].labels[4:] = 1
    expected = np.zeros((5, 5), int)
    np.add.at(expected, (labels, predicted.numpy()), 1)
    found = confusion_matrices(predict_all(LogitsOf(**logits), rows, 4, CPU), rows)
    assert found == {"sst": expected.tolist(), "para": [[2, 1], [2, 1]]}


PREDICTION_FILES = {
    "sst": (torch.eye(5)[[4, 0, 2]], "id \t Predicted_Sentiment \nrow0 , 4 \nrow1 , 0 \nrow2 , 2 \n"),
    "para": (
        torch.tensor([[0.3], [-0.2], [4.0]]),
        "id \t Predicted_Is_Paraphrase \nrow0 , 1 \nrow1 , 0 \nrow2 , 1 \n",
    ),
    "sts": (
        torch.tensor([[5.7], [-1.0], [2.123456789]]),
        "id \t Predicted_Similiary \nrow0 , 5.000000 \nrow1 , 0.000000 \nrow2 , 2.123457 \n",
    ),
}


@pytest.mark.parametrize("task", THREE)
def test_prediction_files_have_the_format_of_cs224n_and_are_written_whole_or_not_at_all(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (logits, expected), rows, path = PREDICTION_FILES[task], token_rows(task, 3, seed=4), tmp_path / "predictions.csv"
    path.write_text("an older file")
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_predictions(task, rows, logits, path)
    assert path.read_text() == "an older file"
    write_predictions(task, rows, predict_logits(LogitsOf(**{task: logits}), task, rows, 2, CPU), path)
    assert path.read_bytes() == expected.encode() and list(tmp_path.iterdir()) == [path]


def test_the_table_shows_both_metrics_of_every_task_the_mean_and_what_guessing_scores(monkeypatch: Patch) -> None:
    values = {"sst": (0.5, 0.4321), "para": (0.8, 0.75), "sts": (0.8, 0.7)}
    names = {"sst": ("accuracy", "macro_f1"), "para": ("accuracy", "macro_f1"), "sts": ("pearson", "spearman")}
    metrics = {task: dict(zip(names[task], values[task], strict=True)) for task in THREE}
    guesses = {"sst": 0.25, "para": 0.6251, "sts": 0.0}
    lines = format_table(metrics, {"sst": 11, "para": 22, "sts": 33}, guesses).split("\n")
    assert [" ".join(line.split()) for line in lines[:-1]] == [
        "task dev rows constant",
        "SST-5 sentiment 11 accuracy 0.500 macro_f1 0.432 0.250",
        "Quora paraphrase 22 accuracy 0.800 macro_f1 0.750 0.625",
        "STS similarity 33 pearson 0.800 spearman 0.700 0.000",
        "mean 0.700 0.292",
    ]
    assert all(line == line.rstrip() for line in lines) and lines[-1].startswith("(constant: ")
    output = replace(TASKS["sst"].output, selection_metric="macro_f1")
    monkeypatch.setitem(TASKS, "sst", replace(TASKS["sst"], output=output))
    assert "macro_f1   0.432  accuracy   0.500" in format_table(metrics, dict.fromkeys(TASKS, 9), guesses)
    assert len({len(line) for line in lines[:-1]}) == 1 and max(map(len, lines)) <= 85
