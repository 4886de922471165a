"""The benchmarks: their statistics, that ours and the reference see the same rows, and every script on a tiny model."""

import dataclasses
import importlib
import json
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import dense
import kernels
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import engine
import model as model_module
from benchmarks import __main__ as everything
from benchmarks import (
    evaluation_throughput,
    gpu,
    harness,
    pcgrad_step,
    reference,
    scaling,
    start_up,
    step_cost,
    training_step,
    workload,
)
from benchmarks.harness import Benchmark, Check, Line, MatmulLimit, MeasurementError, Memory, Options, Report, Summary
from benchmarks.reference import OrdinaryLoop, PaddedBert
from bert import BertConfig, PackedTokens
from datasets import Batch, TokenizedRows
from evaluation import predict_logits
from helpers import tiny_config, tiny_encoder
from pal import PalConfig
from tasks import TASKS, task_loss

RANDOM = np.random.default_rng(0)
IN_PROCESS = ("training_step", "evaluation_throughput", "frozen_stage", "pcgrad_step", "step_cost", "scaling")


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> workload.Checkpoint:
    return workload.Checkpoint.find(str(tiny))


@pytest.fixture(scope="module")
def rows(checkpoint: workload.Checkpoint, data: Path) -> dict[str, TokenizedRows]:
    return checkpoint.rows(data, "train")


def script(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.{name}")


# --------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("count", [1, 2, 3, 4, 15, 100])
def test_a_summary_holds_numpy_s_percentiles(count: int) -> None:
    values = RANDOM.lognormal(size=count).tolist()
    found = Summary.of(values)
    expected = np.percentile(values, [50, 25, 75, 0, 100])
    measured = [found.median, found.lower, found.upper, found.smallest, found.largest]
    np.testing.assert_allclose(measured, expected, rtol=1e-12)
    assert found.count == count


def test_ratios_are_taken_round_by_round() -> None:
    assert harness.ratios([2.0, 9.0, 4.0], [1.0, 3.0, 8.0]) == [2.0, 3.0, 0.5]
    with pytest.raises(ValueError, match="zip"):
        harness.ratios([1.0], [1.0, 2.0])


def test_a_ratio_of_totals_compares_what_a_unit_of_size_takes() -> None:
    sizes, other_sizes = [10.0, 40.0, 1.0], [7.0, 2.0, 30.0]
    exact = harness.ratio_of_totals([3 * s for s in sizes], sizes, [2 * s for s in other_sizes], other_sizes)
    assert (exact.median, exact.smallest, exact.largest) == pytest.approx((1.5, 1.5, 1.5))
    seconds, other = [1.0, 5.0, 2.0], [4.0, 1.0, 1.0]
    found = harness.ratio_of_totals(seconds, sizes, other, other_sizes)
    assert found.median == pytest.approx((8 / 51) / (6 / 39))
    assert found.smallest < found.lower < found.upper < found.largest


def test_the_fitted_exponent_is_that_of_a_power_law() -> None:
    sizes = [8, 16, 64, 512]
    assert harness.fitted_exponent(sizes, [0.3 * s**1.7 for s in sizes]) == pytest.approx(1.7)
    assert harness.fitted_exponent(sizes, [2.0] * 4) == pytest.approx(0.0, abs=1e-12)
    noisy = [s * n for s, n in zip(sizes, [1.1, 0.9, 1.2, 1.0], strict=True)]
    slope = statistics.linear_regression(np.log(sizes).tolist(), np.log(noisy).tolist()).slope
    assert harness.fitted_exponent(sizes, noisy) == pytest.approx(slope)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.288, "0.288"), (2.3456, "2.35"), (45.67, "45.7"), (1234.5, "1234"), (3.2e-7, "3.2e-07")],
)
def test_numbers_are_shown_with_three_significant_digits(value: float, text: str) -> None:
    assert harness.significant(value) == text


# ------------------------------------------------------------------------------------------------------- timing


class Clock:
    """A clock that only the steps move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, int]] = []
        monkeypatch.setattr(harness.time, "perf_counter", lambda: self.now)

    def step(self, name: str, seconds: float) -> Callable[[int], None]:
        def take_step(number: int) -> None:
            self.calls.append((name, number))
            self.now += seconds * (number + 1)

        return take_step


def test_kinds_alternate_and_each_round_s_seconds_are_those_of_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    found = harness.alternate({"a": clock.step("a", 1.0), "b": clock.step("b", 10.0)}, rounds=3, warm_up=1)
    assert found["a"] == pytest.approx([2.0, 3.0, 4.0])
    assert found["b"] == pytest.approx([20.0, 30.0, 40.0])
    assert clock.calls == [(name, n) for n in range(4) for name in ("ab" if n % 2 == 0 else "ba")]


def test_a_device_s_work_counts_for_the_step_that_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    waiting = [0.0]

    def launch(number: int) -> None:
        waiting[0] += 5.0

    def synchronize() -> None:
        clock.now += waiting[0]
        waiting[0] = 0.0

    kinds = {"launched": launch, "nothing": lambda number: None}
    found = harness.alternate(kinds, rounds=2, warm_up=0, synchronize=synchronize)
    assert found == {"launched": [5.0, 5.0], "nothing": [0.0, 0.0]}


def test_flops_are_those_that_torch_counts_in_transformers_encoder(checkpoint: workload.Checkpoint) -> None:
    model, num_rows, length = checkpoint.model(tuple(TASKS)), 3, 7
    padded = PaddedBert.from_model(model)
    padded.encoder.set_attn_implementation("eager")  # type: ignore[operator]  # its products are counted one by one
    ids = torch.arange(num_rows * length).view(num_rows, length) % checkpoint.config.vocab_size
    batch = reference.PaddedBatch(ids, torch.zeros_like(ids), torch.ones_like(ids), torch.zeros(num_rows))
    lengths = np.full(num_rows, length)
    with FlopCounterMode(display=False) as forward:
        pooled = padded.pooled(batch)
    assert forward.get_total_flops() == harness.forward_flops(checkpoint.config, lengths)
    with FlopCounterMode(display=False) as backward:
        pooled.sum().backward()
    total = forward.get_total_flops() + backward.get_total_flops()
    assert total == harness.training_flops(checkpoint.config, lengths)


@pytest.mark.parametrize("config", [tiny_config(), tiny_config(num_hidden_layers=3, intermediate_size=48)])
def test_needed_flops_are_those_that_torch_counts_in_our_encoder(
    config: BertConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_onednn_is_faster", lambda: False)  # the counter knows torch's own products only
    monkeypatch.setattr(kernels, "usable", lambda *tensors: False)
    lengths = np.array([6, 6, 6, 6])  # of one length: attention pads nothing
    tokens = PackedTokens.from_rows([[1] * 6] * 4, [[0] * 6] * 4)
    encoder = tiny_encoder(**dataclasses.asdict(config))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder.pool(encoder(tokens, first_only=True))
    assert counter.get_total_flops() == harness.needed_flops(config, lengths)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder.pool(encoder(tokens)[tokens.first_tokens])
    assert counter.get_total_flops() == harness.forward_flops(config, lengths)


@pytest.mark.parametrize("training", [False, True])
def test_the_matmul_limit_runs_the_products_of_the_dense_layers(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_onednn_is_faster", lambda: False)  # the counter knows torch's own products
    config, lengths = tiny_config(), np.array([5, 2, 9])
    whole = harness.training_flops(config, lengths) if training else harness.forward_flops(config, lengths)
    per_pair = (12 if training else 4) * config.hidden_size * config.num_hidden_layers
    attention = per_pair * int((lengths**2).sum())
    limit = MatmulLimit(config, [lengths], training=training)
    with FlopCounterMode(display=False) as counter:
        limit.run(lengths)
    assert counter.get_total_flops() == whole - attention
    assert limit.seconds([lengths], 2.0) == pytest.approx(2.0 * whole / (whole - attention))
    with FlopCounterMode(display=False) as counter:
        limit.run(lengths, lengths)
    assert counter.get_total_flops() == 2 * (whole - attention)
    assert limit.seconds([lengths, lengths], 2.0) == pytest.approx(2.0 * whole / (whole - attention))


@pytest.mark.skipif(dense._onednn() is None, reason="a torch without oneDNN")
@pytest.mark.parametrize("training", [False, True])
def test_the_matmul_limit_runs_the_padded_products_that_the_encoder_runs(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By oneDNN: the operations of every call are counted, and the limit is for the real tokens only."""
    monkeypatch.setattr(dense, "_onednn_is_faster", lambda: True)
    config, lengths = tiny_config(), np.array([5, 2, 9, 60])
    limit = MatmulLimit(config, [lengths], training=training)
    done = 0

    def counted(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        nonlocal done
        done += 2 * inputs.shape[0] * inputs.shape[1] * weight.shape[0]
        return torch.empty(0)

    monkeypatch.setattr(harness, "product", counted)
    limit.run(lengths)
    whole = harness.training_flops(config, lengths) if training else harness.forward_flops(config, lengths)
    attention = (12 if training else 4) * config.hidden_size * config.num_hidden_layers * int((lengths**2).sum())
    size = config.hidden_size
    pooler = (3 if training else 1) * 2 * len(lengths) * size**2
    places = -(-76 // dense.ROWS_MULTIPLE) * dense.ROWS_MULTIPLE
    assert done - pooler == pytest.approx((whole - attention - pooler) * places / 76, rel=1e-12)
    assert limit.seconds([lengths], 2.0) == pytest.approx(2.0 * whole / done)


def test_peak_memory_is_the_process_s_own() -> None:
    held = torch.ones(100_000_000)  # 400 MB
    assert harness.resident_memory_mb(peak=False) > 400
    del held
    command = "from benchmarks.harness import *; import torch; b = resident_memory_mb(True); torch.ones(25_000_000)"
    command += "; print(b, resident_memory_mb(True))"
    done = subprocess.run([sys.executable, "-c", command], cwd=harness.ROOT, capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    own = harness.resident_memory_mb(peak=True)
    assert own > 400 and before < own - 100
    assert 80 < after - before < 120


# ------------------------------------------------------------------------------------------------------ results


REPORT = Report(
    "seconds; ratios to ours",
    [
        Line("ours", [0.2, 0.3, 0.25], matmul_share=0.664, memory=Memory(700.4, 301.0)),
        Line("other", [1.5, 2.5, 2.0], ratio=Summary.of([7.5, 8.0, 8.3])),
        Line("rate", [900.0], "rows/s"),
    ],
    [Check("difference", 1e-7, 1e-4, must_hold=True), Check("cost", 3.5, 3.0)],
    ["a note"],
    {"rounds": 3},
)
FOUND = {"device": "Some(R) Processor, 2 cores", "threads": 2}


def test_a_report_is_shown_as_a_table_of_which_empty_columns_are_left_out() -> None:
    text = harness.shown(REPORT.to_dict())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[2:] == [
        ["ours", "250 (225 to 275) ms", "", "66%", "700 MB (301)"],
        ["other", "2.00 (1.75 to 2.25) s", "8.00 (7.75 to 8.15)", "", ""],
        ["rate", "900 (900 to 900) rows/s", "", "", ""],
    ]
    assert "difference: 1.0e-07, at most 1.0e-04: holds\ncost: 3.50, at most 3.00: DOES NOT HOLD\na note" in text
    bare = replace(REPORT, lines=[Line("ours", [0.2])])
    assert [c.strip() for c in harness.shown(bare.to_dict()).splitlines()[2].split("|")] == [
        "",
        "",
        "median (quartiles)",
        "",
    ]


def test_a_table_is_markdown_with_aligned_columns() -> None:
    assert harness.table(("", "n"), [["a", "1"], ["long", "1000"]]).splitlines() == [
        "|      |    n |",
        "| ---- | ---: |",
        "| a    |    1 |",
        "| long | 1000 |",
    ]


def test_results_are_added_to_those_that_the_file_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert harness.publish("first", REPORT, FOUND, tmp_path) == 0
    assert harness.publish("second", replace(REPORT, checks=[Check("nan", float("inf"), 1)]), FOUND, tmp_path) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["some-r-processor-2-cores.json"]
    saved = json.loads((tmp_path / "some-r-processor-2-cores.json").read_text())
    assert saved["device"] == FOUND["device"]
    assert list(saved["benchmarks"]) == ["first", "second"]
    first = saved["benchmarks"]["first"]
    assert (first["environment"], first["settings"]) == (FOUND, {"rounds": 3})
    assert first["lines"][0]["values"] == [0.2, 0.3, 0.25]
    assert first["lines"][0]["summary"]["median"] == 0.25
    assert [check["holds"] for check in first["checks"]] == [True, False]
    (check,) = saved["benchmarks"]["second"]["checks"]
    assert (check["found"], check["holds"], Check.from_dict(check).found) == (None, False, float("inf"))
    shown = capsys.readouterr().out
    assert shown.startswith("first: seconds; ratios to ours") and "nan: inf, at most 1.00: DOES NOT HOLD" in shown


def test_a_check_that_must_hold_decides_the_exit_status() -> None:
    wrong = replace(REPORT, checks=[Check("difference", 1.0, 1e-4, must_hold=True)])
    assert harness.publish("wrong", wrong, FOUND, None) == 1


def test_the_device_s_name_is_no_host_s() -> None:
    found = harness.environment()
    assert socket.gethostname() not in json.dumps(found)
    assert "/" not in json.dumps(found)
    assert f"{harness.num_cores()} core" in found["device"]
    assert harness.file_name("NVIDIA H200") == "nvidia-h200.json"


# --------------------------------------------------------------------------------------- the same rows for both


class Watched:
    """Rows that remember which of them were asked for."""

    def __init__(self, rows: TokenizedRows, asked: list[tuple[str, list[int]]]) -> None:
        self.rows, self.asked, self.labels = rows, asked, rows.labels

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, numbers: Sequence[int] | np.ndarray) -> Batch:
        self.asked.append((self.rows.task.name, list(numbers)))
        return self.rows.batch(numbers)

    def by_length(self) -> np.ndarray:
        return self.rows.by_length()


@pytest.mark.parametrize(("draws_per_step", "treatment"), [(1, "sum"), (3, "sum"), (3, "pcgrad")])
def test_the_reference_is_given_the_rows_that_ours_draws(
    checkpoint: workload.Checkpoint, rows: Mapping[str, TokenizedRows], draws_per_step: int, treatment: str
) -> None:
    asked: list[tuple[str, list[int]]] = []
    watched = {task: Watched(of, asked) for task, of in rows.items()}
    options: dict[str, Any] = {"draws_per_step": draws_per_step, "treatment": treatment, "batch_size": 4}
    trainer = workload.full_trainer(checkpoint.model(tuple(rows)), watched, **options)
    draws = workload.Draws(rows, draws_per_step, batch_size=4)
    for step in range(24):  # several passes over the rows
        asked.clear()
        trainer.take_step(1, step)
        assert asked == [(task, numbers.tolist()) for task, numbers in draws(step)]


@pytest.mark.parametrize("task", TASKS)
def test_a_padded_batch_holds_the_tokens_of_ours(rows: Mapping[str, TokenizedRows], task: str) -> None:
    numbers = np.array([3, 0, 11, 7])
    padded, ours = reference.pad(rows[task], numbers), rows[task].batch(numbers)
    assert ours.tokens is not None
    is_real = padded.attention_mask.bool()
    assert padded.input_ids[is_real].tolist() == ours.tokens.input_ids.tolist()
    assert padded.token_type_ids[is_real].tolist() == ours.tokens.token_type_ids.tolist()
    assert padded.attention_mask.sum(1).tolist() == ours.tokens.layout.lengths.tolist()
    assert (is_real.int().diff(dim=1) <= 0).all()
    assert not padded.input_ids[~is_real].any()
    assert padded.input_ids.shape[1] == max(ours.tokens.layout.lengths)
    assert torch.equal(padded.labels, ours.labels)


@pytest.mark.parametrize("task", TASKS)
def test_the_reference_s_loss_and_gradient_are_ours_without_dropout(
    checkpoint: workload.Checkpoint, rows: Mapping[str, TokenizedRows], task: str
) -> None:
    model, numbers = checkpoint.model(tuple(rows)), np.arange(12)
    for padded in (PaddedBert.from_checkpoint(checkpoint.folder, model), PaddedBert.from_model(model)):
        loop = OrdinaryLoop(padded, rows, workload.CPU)
        padded.eval()
        batch = rows[task].batch(numbers)
        ours = task_loss(TASKS[task], model(task, batch), batch.labels)
        theirs = loop.loss(task, numbers)
        assert float(theirs.detach()) == pytest.approx(float(ours.detach()), rel=1e-5)
        (found,) = torch.autograd.grad(ours, model.encoder.get_parameter("word_embeddings.weight"))
        name = "encoder.embeddings.word_embeddings.weight"
        (expected,) = torch.autograd.grad(theirs, padded.get_parameter(name))
        assert gpu.difference(found, expected) < 1e-4


def test_the_reference_trains_with_dropout_clips_and_moves_its_weights(
    checkpoint: workload.Checkpoint, rows: Mapping[str, TokenizedRows]
) -> None:
    padded = PaddedBert.from_checkpoint(checkpoint.folder, checkpoint.model(tuple(rows)))
    loop = OrdinaryLoop(padded, rows, workload.CPU)
    before = {name: value.clone() for name, value in padded.state_dict().items()}
    numbers = np.arange(8)
    assert not torch.equal(loop.loss("sts", numbers), loop.loss("sts", numbers))
    assert padded.encoder.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    loop.take_step("sts", numbers)
    gradients = [p.grad for p in padded.parameters() if p.grad is not None]
    assert float(torch.cat([g.flatten() for g in gradients]).norm()) <= 1 + 1e-5
    moved = {name for name, value in padded.state_dict().items() if not torch.equal(value, before[name])}
    assert {"heads.sts.weight", "encoder.pooler.dense.weight"} <= moved
    assert "heads.para.weight" not in moved


def test_the_reference_predicts_what_ours_predicts(
    checkpoint: workload.Checkpoint, rows: Mapping[str, TokenizedRows]
) -> None:
    model = checkpoint.model(tuple(rows))
    padded = PaddedBert.from_checkpoint(checkpoint.folder, model).eval()
    for task, of in rows.items():
        expected = predict_logits(model, task, of, 5, workload.CPU)
        torch.testing.assert_close(reference.predict_logits(padded, task, of, 7, workload.CPU), expected)


@pytest.mark.parametrize(("num_rows", "piece"), [(1000, 4 * 50), (100, 4 * 6), (9, 4)])
def test_length_grouping_sorts_pieces_of_a_random_order(num_rows: int, piece: int) -> None:
    lengths = RANDOM.integers(3, 60, num_rows)
    order = reference.length_grouped_order(lengths, 4, np.random.default_rng(3))
    assert sorted(order.tolist()) == list(range(num_rows))
    expected = np.random.default_rng(3).permutation(num_rows)
    for start in range(0, num_rows, piece):
        part = order[start : start + piece]
        assert (np.diff(lengths[part]) <= 0).all()
        assert sorted(part.tolist()) == sorted(expected[start : start + piece].tolist())


def test_the_length_grouped_batches_stand_for_all_lengths_and_hardly_pad() -> None:
    lengths = np.minimum(RANDOM.lognormal(3, 0.6, 6400).astype(int) + 3, 200)
    batches = reference.length_grouped_batches(lengths, 32, 16)
    assert [len(batch) for batch in batches] == [32] * 16
    assert len({int(row) for batch in batches for row in batch}) == 16 * 32
    means = [float(lengths[batch].mean()) for batch in batches]
    assert np.mean(means) == pytest.approx(lengths.mean(), rel=0.1)
    assert min(means) < 0.5 * lengths.mean() < 2 * lengths.mean() < max(means)
    assert means != sorted(means) and means != sorted(means, reverse=True)
    assert sum(len(b) * lengths[b].max() for b in batches) < 1.1 * sum(lengths[b].sum() for b in batches)


def test_a_task_with_fewer_rows_than_a_batch_gives_the_batch_that_it_has() -> None:
    batches = reference.length_grouped_batches(np.array([4, 9, 6]), 32, 2)
    assert [sorted(batch.tolist()) for batch in batches] == [[0, 1, 2]] * 2


def test_the_grouped_draws_take_the_tasks_in_turn(rows: Mapping[str, TokenizedRows]) -> None:
    assert [task for task, _ in training_step.grouped_draws(rows, 7)] == [
        "sst",
        "para",
        "sts",
        "sst",
        "para",
        "sts",
        "sst",
    ]


def test_a_subset_keeps_the_tasks_proportions(rows: Mapping[str, TokenizedRows]) -> None:
    assert workload.row_counts(workload.subset(rows, 39)) == {"sst": 13, "para": 13, "sts": 13}
    assert workload.row_counts(workload.subset(rows, 10**6)) == workload.row_counts(rows)


# --------------------------------------------------------------------------------------------------- the scripts


@pytest.fixture
def alone_in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Variants run in this process instead of one of their own; the list tells which did."""
    ran: list[str] = []

    def memory(self: Benchmark, variant: str, options: Options) -> Memory:
        ran.append(variant)
        return harness._run_alone(self, variant, options)

    monkeypatch.setattr(Benchmark, "memory", memory)
    return ran


def quick(tiny: Path, data: Path, *further: str) -> list[str]:
    return ["--quick", "--rounds", "1", "--model", str(tiny), "--data", str(data), *further]


def saved_results(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.json")
    return dict(json.loads(path.read_text()))


@pytest.mark.parametrize("name", IN_PROCESS)
def test_a_script_runs_and_leaves_its_results(
    name: str, tiny: Path, data: Path, tmp_path: Path, alone_in_process: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert script(name).main(quick(tiny, data, "--out", str(tmp_path))) == 0
    assert capsys.readouterr().out.startswith(f"{name}: ")
    saved = saved_results(tmp_path)
    report = saved["benchmarks"][name]
    assert all(value > 0 for line in report["lines"] for value in line["values"])
    assert {len(line["values"]) for line in report["lines"]} == {1}
    text = json.dumps(saved)
    assert not any(str(path) in text for path in (tiny, data, tmp_path, harness.ROOT))
    assert set(script(name).BENCHMARK.variants(Options(data, str(tiny)))) == set(alone_in_process)
    assert len(report["lines"]) >= len(alone_in_process)
    if name == "scaling":
        assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
        assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".png"]
        assert set(report["settings"]["exponents"]) == {line["what"].rsplit(",", 1)[0] for line in report["lines"]}


def test_training_step_compares_by_the_same_rows_and_by_the_row(
    tiny: Path, data: Path, alone_in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind takes a known time: ours a second, padded three, grouped two; the products alone half a second."""
    seconds = {"ours": 1.0, "transformers, padded": 3.0, "transformers, grouped by length": 2.0}

    def alternate(kinds: Mapping[str, Any], rounds: int, **options: Any) -> dict[str, list[float]]:
        return {name: [seconds.get(name, 0.5)] * rounds for name in kinds}

    monkeypatch.setattr(training_step, "alternate", alternate)
    monkeypatch.setattr(dense, "_onednn_is_faster", lambda: False)  # no padding
    options = Options(data, str(tiny), rounds=3, quick=True, out=None)
    report = training_step.measure(options)
    ours, padded, grouped = report.lines
    assert padded.ratio is not None and padded.ratio.median == 3.0
    assert grouped.ratio is not None and grouped.ratio.median == pytest.approx(2.0)  # 26 rows in every batch
    assert ours.matmul_share is not None and padded.matmul_share == pytest.approx(ours.matmul_share / 3)
    assert 0.5 < ours.matmul_share < 0.6  # half a second, and attention's products at the same rate
    assert "per row: ours 38.5 ms, transformers, padded 115 ms, transformers, grouped by length 76.9 ms" in report.notes


def test_a_variant_runs_in_a_process_of_its_own(tiny: Path, data: Path) -> None:
    options = Options(data, str(tiny), 1, 1, True, None)
    found = evaluation_throughput.BENCHMARK.memory(evaluation_throughput.OURS, options)
    assert 50 < found.before_mb <= found.peak_mb < 2000
    with pytest.raises(MeasurementError, match="--alone nonsense: expected one of ours, "):
        evaluation_throughput.BENCHMARK.memory("nonsense", options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rounds", "-1"], "--rounds -1: expected 0 or more"),
        (["--data", "nowhere"], "nowhere: no such directory"),
        (["--model", "./nowhere"], "--model ./nowhere: no such directory"),
        (["--alone", "nothing"], "--alone nothing: expected one of plain, pcgrad, smart, pal"),
    ],
)
def test_bad_input_is_one_line(
    tiny: Path, data: Path, given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert step_cost.main([*quick(tiny, data), *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_options_make_the_command_line_that_gives_them(tmp_path: Path) -> None:
    import argparse

    for options in (Options(tmp_path, "model", 4, 2, True, tmp_path / "out"), Options(tmp_path, "x", 9, 0, False)):
        parser = argparse.ArgumentParser()
        harness.add_flags(parser, 1)
        assert harness.options_of(parser.parse_args(options.arguments()), 1) == options


def test_only_full_runs_write_results_unasked(tmp_path: Path) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    harness.add_flags(parser, 15)
    assert harness.options_of(parser.parse_args(["--quick"]), 15).out is None
    full = harness.options_of(parser.parse_args([]), 15)
    assert (full.out, full.rounds) == (harness.RESULTS, 15)


# ------------------------------------------------------------------------------------------------- single claims


def test_pcgrad_s_gradient_equals_torchjd_s(tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchjd")
    setup = pcgrad_step.Setup(Options(data, str(tiny)))
    assert max(setup.difference_from_torchjd(sign) for sign in (1.0, -1.0)) < 1e-5
    monkeypatch.setattr(pcgrad_step, "pcgrad_weights", lambda gramian, orders: torch.ones(3, dtype=torch.float64))
    assert min(setup.difference_from_torchjd(sign) for sign in (1.0, -1.0)) > 1e-3


def test_libmtl_is_measured_where_it_is_installed(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that looks like LibMTL, image models that cannot be imported included; its treatment is the sum."""
    weighting = """
class PCGrad:
    def backward(self, losses):
        assert self.task_num == len(losses) and not self.rep_grad and self.device.type == "cpu"
        sums = 0
        for loss in losses:
            loss.backward(retain_graph=True)
            sums = sums + sum(float(p.grad.sum()) for p in self.get_share_params())
            self.zero_grad_share_params()
            assert not any(p.grad.any() for p in self.get_share_params())
        PCGrad.found = sums
"""
    (tmp_path / "LibMTL").mkdir()
    (tmp_path / "LibMTL" / "__init__.py").write_text("import torchvision_that_is_not_there")
    (tmp_path / "LibMTL" / "weighting.py").write_text(weighting)
    assert pcgrad_step.LIBMTL not in pcgrad_step.variants(Options(data, str(tiny)))
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("LibMTL", "LibMTL.weighting"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    makers = pcgrad_step.variants(Options(data, str(tiny)))
    makers[pcgrad_step.LIBMTL]()(0)
    assert sys.modules["LibMTL.weighting"].PCGrad.found != 0
    for name in ("LibMTL", "LibMTL.weighting"):
        del sys.modules[name]


def test_the_methods_are_what_they_are_called(
    checkpoint: workload.Checkpoint, rows: Mapping[str, TokenizedRows]
) -> None:
    def fresh(adapters: PalConfig | None) -> Any:
        return checkpoint.model(tuple(rows), adapters)

    trainers = {n: make() for n, make in step_cost.Methods(checkpoint.config, fresh, rows).makers().items()}
    assert {name for name, trainer in trainers.items() if trainer.is_treated} == {"pcgrad"}
    assert {name for name, trainer in trainers.items() if trainer.regularizers} == {"smart"}
    assert {name for name, t in trainers.items() if any("adapters" in p for p in t.parameters)} == {"pal"}
    records = {name: trainer.take_step(1, 0) for name, trainer in trainers.items()}
    assert {record["task"] for record in records.values()} == {"sst+para+sts"}
    assert {record["examples"] for record in records.values()} == {3 * 26}


def test_copied_tasks_are_known_for_a_while_only(checkpoint: workload.Checkpoint) -> None:
    with scaling.copied_tasks(["para0", "para1"]):
        assert set(checkpoint.model(["para0", "para1"]).heads) == {"para0", "para1"}
        assert "para1" in engine.TASKS and "sst" in model_module.TASKS
    assert "para0" not in engine.TASKS and "para0" not in model_module.TASKS


def test_a_curve_says_in_words_how_it_grows() -> None:
    curve = scaling.Curve("tokens a row", "a step", "tokens a row", {n: [1e-6 * n**2] * 3 for n in (16, 64, 256)})
    words = "a step: grows like tokens a row to the power 2.00 from 16 to 256, faster (2.00 between the two largest)"
    assert curve.in_words() == words
    linear = replace(curve, seconds={n: [float(n)] for n in (1000, 140_000)})
    assert "in proportion" in linear.in_words() and "140,000" in linear.in_words()
    assert "more slowly" in replace(curve, seconds={n: [float(n) ** 0.5] for n in (1, 4)}).in_words()


def test_the_files_of_scaling_hold_as_many_rows_as_they_say(tiny: Path, data: Path, tmp_path: Path) -> None:
    setup = scaling.Setup(Options(data, str(tiny), 1, 1, True, None))
    task = TASKS[scaling.TASK]
    path = setup._file(tmp_path, 60)
    examples = scaling.read_examples(path, task, labelled=True).examples
    own = scaling.read_examples(data / task.file_name("train"), task, labelled=True).examples
    assert [(e.texts, e.label) for e in examples] == [(own[i % 26].texts, own[i % 26].label) for i in range(60)]


def test_the_rows_of_one_length_have_it(tiny: Path, data: Path) -> None:
    rows = scaling.Setup(Options(data, str(tiny), 1, 1, True, None))._rows_of(9, 4)[scaling.TASK]
    assert rows.tokens.lengths.tolist() == [9] * 4
    assert rows.batch([0, 3]).tokens.input_ids.shape == (18,)  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------------ start-up


def test_both_commands_reach_their_first_step(tiny: Path, data: Path, tmp_path: Path) -> None:
    setup = start_up.Setup(Options(data, str(tiny), 1, 1, True, None), tmp_path)
    setup.ours("off")
    log = (tmp_path / "run1" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(log[0])["stage"] == "finetune" and json.loads(log[0])["step"] == 1
    setup.ordinary(0)


def test_start_up_reports_every_command(
    tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[str] = []
    monkeypatch.setattr(start_up, "until_first_step", lambda command, log: commands.append(" ".join(command)))
    monkeypatch.setattr(start_up.Setup, "_wait", lambda self, *arguments: commands.append(" ".join(arguments)))
    assert start_up.main(quick(tiny, data)) == 0
    shown = capsys.readouterr().out
    kinds = (start_up.MAIN, start_up.COLD, start_up.WARM, start_up.ORDINARY, start_up.FLOOR)
    assert all(kind in shown for kind in kinds)
    assert any("--option finetune --scheduler pal --pcgrad" in command and "sample" in command for command in commands)
    caches = [command.split("--cache ")[1].split()[0] for command in commands if "--cache" in command]
    assert sorted({Path(cache).name for cache in caches}) == ["cache", "off"]


def test_a_command_that_fails_before_its_first_step_is_named(
    tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MeasurementError, match="no first step; went wrong"):
        start_up.until_first_step([sys.executable, "-c", "raise SystemExit('went wrong')"], tmp_path / "none")
    setup = start_up.Setup(Options(data, str(tiny)), tmp_path)
    with pytest.raises(MeasurementError, match="went wrong"):
        setup._wait("-c", "raise SystemExit('went wrong')")
    monkeypatch.setattr(start_up, "until_first_step", lambda command, log: setup._wait("-c", "raise SystemExit('no')"))
    assert start_up.main(quick(tiny, data)) == 1
    assert capsys.readouterr().err.startswith("error: ")


# ----------------------------------------------------------------------------------------------------------- gpu


def test_the_gpu_script_goes_its_way_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--tiny", "--device", "cpu", "--rounds", "1", "--out", str(tmp_path)]) == 0
    report = saved_results(tmp_path)["benchmarks"]["gpu"]
    correct = [check for check in report["checks"] if check["must_hold"]]
    assert len(correct) == 9 and all(check["holds"] and check["found"] > 0 for check in correct)
    units = {line["what"]: line["unit"] for line in report["lines"]}
    assert [what for what, unit in units.items() if unit == "rows/s"] == [
        f"{what}, {name}"
        for what in ("training step, 4 random rows", "training step, 8 random rows", "prediction, batches of 128")
        for name in (gpu.OURS, gpu.PADDED)
    ]
    assert all(line["matmul_share"] > 0 for line in report["lines"] if line["unit"] == "rows/s")


def test_the_gpu_script_counts_real_rows_and_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind takes a second a round: rows per second are the rows of a round."""
    size = gpu.TINY
    rows = gpu.random_rows(gpu.row_lengths(), size, torch.device("cpu"))
    setup = gpu.Setup(size, torch.device("cpu"), rows, rounds=2)
    monkeypatch.setattr(gpu, "alternate", lambda kinds, rounds, **options: {name: [1.0] * rounds for name in kinds})
    ours, theirs = setup.training(8)
    assert (ours.values, theirs.values) == ([16.0, 16.0], [16.0, 16.0])  # 2 steps of 8 rows
    assert setup.evaluation()[0].values == [48.0, 48.0]
    draws = workload.Draws(rows, batch_size=8)
    first = [workload.lengths_of(rows, draws(step)) for step in range(setup.num_steps)]
    expected = np.concatenate(first[2 * harness.WARM_UP : 2 * harness.WARM_UP + 2])
    assert np.concatenate(setup._of_round(first, 0)).tolist() == expected.tolist()
    limit = setup.limit(first, training=True)
    with FlopCounterMode(display=False) as counter:
        limit.run(*first[4:6])
    whole = harness.training_flops(size.config, expected)
    assert ours.matmul_share == pytest.approx(whole / counter.get_total_flops(), rel=0.05)


def test_wrong_weights_fail_the_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = gpu.random_rows(gpu.row_lengths(), gpu.TINY, torch.device("cpu"))
    setup = gpu.Setup(gpu.TINY, torch.device("cpu"), rows, 1)
    assert all(check.holds for check in setup.parity())
    build = PaddedBert.from_model

    def changed(model: Any) -> PaddedBert:
        padded = build(model)
        with torch.no_grad():
            padded.get_parameter("encoder.encoder.layer.1.attention.output.dense.weight").mul_(1.1)
        return padded

    monkeypatch.setattr(PaddedBert, "from_model", changed)
    failed = [check.what for check in setup.parity() if not check.holds]
    assert failed == [
        f"{t}: {what}, float32" for t in TASKS for what in ("pooled output", "gradient of the first queries")
    ]


def test_a_difference_that_is_not_a_number_never_passes() -> None:
    nan = torch.tensor([1.0, float("nan")])
    assert gpu.difference(nan, torch.ones(2)) == float("inf")
    assert gpu.difference(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.8)


def test_row_lengths_come_back_as_they_were_counted(
    rows: Mapping[str, TokenizedRows], tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "LENGTHS", tmp_path / "row_lengths.json")
    assert gpu.main(["--save_lengths", "--data", str(data), "--model", str(tiny)]) == 0
    found = gpu.row_lengths(tmp_path / "row_lengths.json")
    assert {t: sorted(of.tolist()) for t, of in found.items()} == {
        task: sorted(of.tokens.lengths.tolist()) for task, of in rows.items()
    }
    assert [path.name for path in tmp_path.iterdir()] == ["row_lengths.json"]


def test_the_stored_row_lengths_are_those_of_the_course_s_training_rows() -> None:
    lengths = gpu.row_lengths()
    assert {task: len(of) for task, of in lengths.items()} == {"sst": 7690, "para": 14000, "sts": 5436}
    assert min(of.min() for of in lengths.values()) >= 3


def test_random_rows_are_as_long_as_the_real_ones_and_use_no_special_token() -> None:
    lengths = {"sst": np.array([4, 9]), "para": np.array([600]), "sts": np.array([12])}
    rows = gpu.random_rows(lengths, gpu.TINY, torch.device("cpu"))
    assert set(rows["sst"].tokens.lengths.tolist()) == {4, 9}
    assert set(rows["para"].tokens.lengths.tolist()) == {512}
    assert min(int(of.tokens.ids.min()) for of in rows.values()) >= gpu.FIRST_WORD
    assert rows["sst"].batch([0]).tokens.token_type_ids.sum() == 0  # type: ignore[union-attr]
    assert set(rows["para"].labels.tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rounds", "0"], "--rounds 0: expected 1 or more"),
        (["--save_lengths"], "--save_lengths: expected with --data"),
        (["--device", "cuda"], "--device cuda: no CUDA GPU found"),
    ],
)
def test_the_gpu_script_says_in_a_line_what_it_lacks(
    given: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--tiny", *given]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_packed_attention_agrees_with_transformers_on_a_gpu() -> None:
    device = torch.device("cuda")
    setup = gpu.Setup(gpu.TINY, device, gpu.random_rows(gpu.row_lengths(), gpu.TINY, device), 1)
    assert all(check.holds for check in setup.parity())


# ------------------------------------------------------------------------------------------------- all of them


def test_every_script_is_run_by_the_whole_and_runs_alone() -> None:
    folder = Path(everything.__file__).parent
    scripts = {path.stem for path in folder.glob("*.py") if "BENCHMARK = " in path.read_text()}
    assert set(everything.SCRIPTS) == scripts
    assert all(script(name).BENCHMARK.name == name for name in scripts)


def test_the_whole_runs_each_script_and_shows_what_they_left(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        name = command[2].removeprefix("benchmarks.")
        assert options["cwd"] == harness.ROOT
        status = harness.publish(name, REPORT, harness.environment(), Path(command[command.index("--out") + 1]))
        return subprocess.CompletedProcess(command, int(name == "scaling") or status)

    monkeypatch.setattr(everything.subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status = everything.main(["--quick", "--data", str(data), "--model", str(tiny), "--out", str(tmp_path)])
    shown = capsys.readouterr()
    assert (status, shown.err) == (1, "failed: scaling\n")
    assert [command[2] for command in commands] == [f"benchmarks.{name}" for name in everything.SCRIPTS]
    assert all({"--quick", str(data), str(tiny)} <= set(command) for command in commands)
    assert set(saved_results(tmp_path)["benchmarks"]) == set(everything.SCRIPTS)
    assert "| **step_cost**: seconds; ratios to ours |" in shown.out.replace("  ", "").replace(" |", " |")
    assert "- step_cost: cost: 3.50, at most 3.00: DOES NOT HOLD" in shown.out
