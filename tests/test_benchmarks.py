"""The benchmarks: their statistics, that ours and the reference see the same rows, and every script on a tiny model."""

import io
import json
import re
import runpy
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as everything
from benchmarks import compare, cpu, encoders, gpu, harness, matmul_limit, reference, step_cost, workload
from benchmarks.harness import Check, Line, Memory, Options, Report, Summary
from benchmarks.matmul_limit import MatmulLimit, matmul_flops
from benchmarks.reference import OrdinaryLoop, PaddedBert
from config import parse
from datasets import TokenizedRows
from evaluation import predict_logits
from helpers import THREE, Capture, Patch, tiny_config
from tasks import TASKS

LINEAR = sys.modules["ops.linear"]  # the package has a function of that name
RANDOM = np.random.default_rng(0)
Checkpoint, Rows = workload.Checkpoint, Mapping[str, TokenizedRows]


@pytest.fixture(scope="module")
def checkpoint(tiny: Path) -> workload.Checkpoint:
    return workload.Checkpoint.find(str(tiny))


@pytest.fixture(scope="module")
def rows(checkpoint: Checkpoint, data: Path) -> dict[str, TokenizedRows]:
    return checkpoint.rows(data, "train")


def test_ratios_are_taken_round_by_round_or_of_all_rounds_together() -> None:
    found = Summary.of_ratios([2.0, 9.0, 4.0], [1.0, 3.0, 8.0])
    assert (found.smallest, found.median, found.largest) == (0.5, 2.0, 3.0)
    assert (found.lower, found.upper, found.count) == (1.25, 2.5, 3)
    exact = harness.ratio_of_totals([3.0, 3.0], [2.0, 2.0])
    assert (exact.median, exact.smallest, exact.largest) == pytest.approx((1.5, 1.5, 1.5))
    found = harness.ratio_of_totals([1.0, 5.0, 2.0], [4.0, 1.0, 1.0])
    assert found.median == pytest.approx(8 / 6) and found.smallest < found.lower < found.upper < found.largest


def test_numbers_are_shown_with_three_significant_digits() -> None:
    values = (0.288, 2, 45.67, 999.7, 1234.5, 3.2e-7)
    assert [harness.significant(of) for of in values] == ["0.288", "2.00", "45.7", "1000", "1234", "3.20e-07"]


def test_kinds_alternate_and_a_device_s_work_counts_for_the_step_that_asked_for_it(monkeypatch: Patch) -> None:
    """A clock that only the steps move: "a" works at once, the work of "b" is done when it is waited for."""
    now, waiting, calls = 0.0, 0.0, list[tuple[str, int]]()
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now)

    def step(name: str, number: int) -> None:
        nonlocal now, waiting
        calls.append((name, number))
        if name == "a":
            now += number + 1
        else:
            waiting += 10 * (number + 1)

    def synchronize() -> None:
        nonlocal now, waiting
        now, waiting = now + waiting, 0.0

    kinds = {name: partial(step, name) for name in "ab"}
    found = harness.alternate(kinds, rounds=3, warm_up=1, synchronize=synchronize)
    assert found == {"a": [2.0, 3.0, 4.0], "b": [20.0, 30.0, 40.0]}
    assert calls == [(name, n) for n in range(4) for name in ("ab" if n % 2 == 0 else "ba")]


def test_flops_are_those_that_torch_counts_in_transformers_encoder(checkpoint: Checkpoint) -> None:
    padded = PaddedBert(checkpoint.model(THREE))
    padded.encoder.set_attn_implementation("eager")  # its products are counted one by one
    ids = torch.arange(3 * 7).view(3, 7) % checkpoint.config.vocab_size
    batch = reference.PaddedBatch(ids, torch.zeros_like(ids), torch.ones_like(ids), torch.zeros(3))
    with FlopCounterMode(display=False) as forward:
        pooled = padded.pooled(batch)
    with FlopCounterMode(display=False) as backward:
        pooled.sum().backward()
    expected = matmul_flops(checkpoint.config, np.full(3, 7))
    assert (forward.get_total_flops(), backward.get_total_flops()) == (expected, 2 * expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("places", [76, 96])
def test_the_matmul_limit_runs_the_products_of_the_dense_layers_in_as_many_places_as_the_encoder(
    training: bool, places: int, monkeypatch: Patch
) -> None:
    """The limit is for the real tokens only."""
    monkeypatch.setattr(matmul_limit, "rows_multiple", lambda device, num_tokens: 32 if places == 96 else 1)
    config, lengths, times = tiny_config(), np.array([5, 2, 9, 60]), 3 if training else 1
    limit = MatmulLimit(config, [lengths], training=training)
    with FlopCounterMode(display=False) as counter:
        limit.run(lengths, lengths)
    whole, pooler = matmul_flops(config, lengths), 2 * len(lengths) * config.hidden_size**2
    attention = 4 * config.hidden_size * config.num_hidden_layers * int((lengths**2).sum())
    done = counter.get_total_flops()
    assert done == pytest.approx(2 * times * ((whole - attention - pooler) * places / 76 + pooler), rel=1e-12)
    assert limit.seconds([lengths, lengths], 2.0) == pytest.approx(2.0 * 2 * whole * times / done)


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


def cells(report: Report) -> list[list[str]]:
    lines = [line for line in str(report).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_a_report_is_shown_as_a_table_of_which_empty_columns_are_left_out() -> None:
    assert cells(REPORT)[2:] == [
        ["ours", "250 (225 to 275) ms", "", "66%", "700 MB (301)"],
        ["other", "2.00 (1.75 to 2.25) s", "8.00 (7.75 to 8.15)", "", ""],
        ["rate", "900 (900 to 900) rows/s", "", "", ""],
    ]
    checks = "difference: 1.00e-07, at most 0.000100: holds\ncost: 3.50, at most 3.00: DOES NOT HOLD\na note"
    assert str(REPORT).endswith(checks)
    assert cells(replace(REPORT, lines=[Line("ours", [0.2])]))[0] == ["", "median (quartiles)"]


def test_results_are_added_to_those_that_the_file_holds(tmp_path: Path) -> None:
    assert harness.publish("first", REPORT, FOUND, tmp_path) == 0
    assert harness.publish("second", replace(REPORT, checks=[Check("nan", float("inf"), 1)]), FOUND, tmp_path) == 0
    (path,) = tmp_path.iterdir()
    assert path.name == "some-r-processor-2-cores.json"
    saved = json.loads(path.read_text())
    assert (saved["device"], list(saved["benchmarks"])) == (FOUND["device"], ["first", "second"])
    first, second = saved["benchmarks"].values()
    assert (first["environment"], first["settings"]) == (FOUND, {"rounds": 3})
    assert (first["lines"][0]["values"], first["lines"][0]["summary"]["median"]) == ([0.2, 0.3, 0.25], 0.25)
    assert [check["holds"] for check in first["checks"]] == [True, False]
    assert (second["checks"][0]["found"], second["checks"][0]["holds"]) == (None, False)
    wrong = replace(REPORT, checks=[Check("difference", 1.0, 1e-4, must_hold=True)])
    assert harness.publish("wrong", wrong, FOUND, None) == 1


def test_the_device_s_name_is_no_host_s() -> None:
    found = json.dumps(harness.environment_of(torch.device("cpu")))
    assert socket.gethostname() not in found and "/" not in found
    assert harness.file_name("NVIDIA H200") == "nvidia-h200.json"


def test_the_stored_results_are_in_the_format_that_is_written() -> None:
    new = {"environment": FOUND, **REPORT.to_dict()}
    for path in harness.RESULTS.glob("*.json"):
        saved = json.loads(path.read_text())
        assert path.name == harness.file_name(saved["device"])
        assert set(saved["benchmarks"]) <= {*everything.BENCHMARKS, "gpu"}
        for report in saved["benchmarks"].values():
            assert set(report) == set(new)
            assert {key for line in report["lines"] for key in line} == set(new["lines"][0])


@pytest.mark.parametrize(("draws_per_step", "treatment"), [(1, ""), (3, ""), (3, "pcgrad")])
def test_the_reference_is_given_the_rows_that_ours_draws(
    checkpoint: Checkpoint, rows: Rows, draws_per_step: int, treatment: str, monkeypatch: Patch
) -> None:
    options: dict[str, Any] = {"draws_per_step": draws_per_step, "treatment": treatment, "batch_size": 12}
    trainer = workload.full_trainer(checkpoint.model(tuple(rows)), rows, **options)
    draws = workload.Draws(rows, draws_per_step, batch_size=12)
    for step in range(9):  # more than one pass over the rows
        rows_of = trainer._launch(1, step).rows
        assert {task: of.tolist() for task, of in rows_of.items()} == {task: of.tolist() for task, of in draws(step)}


@pytest.fixture
def padded(checkpoint: Checkpoint, rows: Rows) -> PaddedBert:
    """The reference with the weights of the checkpoint; `checkpoint.model` has the same heads."""
    return PaddedBert(checkpoint.model(tuple(rows)))


@pytest.mark.parametrize("task", THREE)
def test_the_reference_predicts_and_without_dropout_trains_as_ours(
    checkpoint: Checkpoint, rows: Rows, padded: PaddedBert, task: str
) -> None:
    model, numbers = checkpoint.model(tuple(rows)), np.arange(12)
    loop, of = OrdinaryLoop(padded, rows, workload.CPU), rows[task]
    padded.eval()
    expected = predict_logits(model, task, of, 5, workload.CPU)
    torch.testing.assert_close(reference.predict_logits(padded, task, of, 7, workload.CPU), expected)
    batch = of.batch(numbers)
    ours, theirs = TASKS[task].output.losses(model(task, batch), batch.labels).mean(), loop.loss(task, numbers)
    assert float(theirs.detach()) == pytest.approx(float(ours.detach()), rel=1e-5)
    (found,) = torch.autograd.grad(ours, model.encoder.get_parameter("word_embeddings.weight"))
    name = "encoder.embeddings.word_embeddings.weight"
    (wanted,) = torch.autograd.grad(theirs, padded.get_parameter(name))
    assert gpu.difference(found, wanted) < 1e-4


def test_the_reference_trains_with_dropout_clips_and_moves_its_weights(rows: Rows, padded: PaddedBert) -> None:
    loop = OrdinaryLoop(padded, rows, workload.CPU)
    before = {name: value.clone() for name, value in padded.state_dict().items()}
    numbers = np.arange(8)
    assert not torch.equal(loop.loss("sts", numbers), loop.loss("sts", numbers))
    assert padded.encoder.config._attn_implementation == "sdpa"
    loop.take_step("sts", numbers)
    gradients = [p.grad for p in padded.parameters() if p.grad is not None]
    assert float(torch.cat([g.flatten() for g in gradients]).norm()) <= 1 + 1e-5
    moved = {name for name, value in padded.state_dict().items() if not torch.equal(value, before[name])}
    assert {"heads.sts.weight", "encoder.pooler.dense.weight"} <= moved
    assert "heads.para.weight" not in moved


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
    few = reference.length_grouped_batches(np.array([4, 9, 6]), 32, 2)
    assert [sorted(batch.tolist()) for batch in few] == [[0, 1, 2]] * 2


def test_a_subset_keeps_the_tasks_proportions(rows: Rows) -> None:
    halves = {"sst": rows["sst"], "para": rows["para"].select(np.arange(13))}
    assert workload.row_counts(workload.subset(halves, 18)) == {"sst": 12, "para": 6}
    assert workload.row_counts(workload.subset(rows, 10**6)) == workload.row_counts(rows)


def test_random_rows_are_as_long_as_the_real_ones_and_use_no_special_token() -> None:
    lengths = {"sst": np.array([4, 9]), "para": np.array([600]), "sts": np.array([12])}
    rows = workload.random_rows(lengths, 48, gpu.TINY.config)
    assert set(rows["sst"].tokens.lengths.tolist()) == {4, 9}
    assert set(rows["para"].tokens.lengths.tolist()) == {512}
    assert min(int(of.tokens.ids.min()) for of in rows.values()) >= workload.FIRST_WORD
    assert rows["sst"].batch([0]).tokens.token_type_ids.sum() == 0  # type: ignore[union-attr]
    assert set(rows["para"].labels.tolist()) == {0, 1}


@pytest.fixture
def given(tiny: Path, data: Path) -> list[str]:
    """Flags of a command."""
    return ["--rounds", "1", "--model", str(tiny), "--data", str(data)]


@pytest.fixture
def options(tiny: Path, data: Path) -> Options:
    return Options(data, str(tiny), 1, 1)


@pytest.mark.parametrize("name", [name for name in everything.BENCHMARKS if name != "start_up"])
def test_a_benchmark_runs_and_leaves_its_results(
    name: str, given: list[str], options: Options, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setattr(cpu, "FROZEN_EPOCHS", 2)
    monkeypatch.setattr(encoders, "SIZES", {**encoders.SIZES, "num_hidden_layers": 2, "hidden_size": 32})
    assert everything.main([name, *given, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(f"{name}: ")
    (path,) = tmp_path.glob("*.json")
    text = path.read_text()
    report = json.loads(text)["benchmarks"][name]
    assert report["checks"] and report["environment"]["rounds"] == 1
    assert all(value > 0 for line in report["lines"] for value in line["values"])
    assert {len(line["values"]) for line in report["lines"]} == {1}
    assert not any(str(folder) in text for folder in (options.model, options.data, tmp_path, harness.ROOT))


def known_times(monkeypatch: Patch, seconds: Mapping[str, float], others: float = 1.0) -> None:
    """Each kind takes a known time."""

    def alternate(kinds: Mapping[str, Any], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
        return {name: [seconds.get(name, others)] * rounds for name in kinds}

    for module in (harness, step_cost):
        monkeypatch.setattr(module, "alternate", alternate)


def test_training_step_compares_by_the_same_rows_and_by_the_row(
    rows: Rows, options: Options, monkeypatch: Patch
) -> None:
    """Ours takes a second, padded three, grouped two."""
    known_times(monkeypatch, {cpu.OURS: 1.0, cpu.PADDED: 3.0, cpu.GROUPED: 2.0})
    assert [task for task, _ in cpu.grouped_draws(rows, 5)] == ["sst", "para", "sts", "sst", "para"]
    report = cpu.training_step(replace(options, rounds=3))
    _, padded, grouped = report.lines
    assert padded.ratio is not None and padded.ratio.median == 3.0
    assert grouped.ratio is not None and grouped.ratio.median == pytest.approx(2 * 32 / 26)  # a file has 26 rows
    assert "ours 31.2 ms, transformers, padded 93.8 ms, transformers, grouped by length 76.9 ms" in report.notes[0]
    assert [check.found for check in report.checks] == pytest.approx([1 / 3, 26 / 64])


def test_the_other_claims_are_the_ratios_that_they_name(options: Options, monkeypatch: Patch) -> None:
    times = {cpu.OURS: 2.0, cpu.PADDED: 6.0, cpu.ANEW: 3.0, cpu.KEPT: 5.0, cpu.MAIN: 7.0}
    known_times(monkeypatch, {**times, "plain": 2.0, "pcgrad": 3.0, "smart": 4.0, "pal": 5.0})
    expected = {
        cpu.evaluation: [2 / 6, 0.0],
        cpu.frozen_stage: [5 / (25 * 3)],
        step_cost.step_cost: [1.5, 2.0, 2.5],
        cpu.start_up: [7.0],
    }
    for measure, ratios in expected.items():
        report = measure(options)
        assert [check.found for check in report.checks] == pytest.approx(ratios, abs=1e-5)
        if measure is step_cost.step_cost:
            assert list(report.notes) == ["gradient buffers of pcgrad beyond plain: 2 copies of the shared gradient"]


def test_predictions_that_differ_fail_the_evaluation(given: list[str], tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(
        reference, "predict_logits", lambda *of, original=reference.predict_logits: original(*of) + 0.001
    )
    assert everything.main(["evaluation", *given, "--out", str(tmp_path)]) == 1


def test_bad_input_is_one_line(given: list[str], capsys: Capture) -> None:
    for flag, message in (("--data nowhere", "nowhere: no such directory"), ("--model ./no", "--model ./no: no such")):
        assert everything.main(["step_cost", *given, *flag.split()]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line


def test_the_methods_are_what_they_are_called(checkpoint: Checkpoint, rows: Rows) -> None:
    makers = step_cost.makers_of(partial(checkpoint.model, tuple(rows)), rows)
    trainers = {name: make() for name, make in makers.items()}
    assert {name for name, trainer in trainers.items() if trainer.is_treated} == {"pcgrad"}
    assert {name for name, trainer in trainers.items() if trainer.methods.regularizers} == {"smart"}
    assert {n for n, t in trainers.items() if any("adapters" in p for p in t.own["sst"].names)} == {"pal"}
    for trainer in trainers.values():
        record = trainer.take_step(1, 0)
        assert (record["task"], record["draws"]) == ("sst+para+sts", dict.fromkeys(rows, 1))
        assert trainer.progress.rows == dict.fromkeys(rows, 32)


def test_start_up_times_every_command(options: Options, monkeypatch: Patch) -> None:
    commands: list[Sequence[str]] = []
    monkeypatch.setattr(cpu, "until_first_step", lambda flags, log: commands.append(flags))
    monkeypatch.setattr(cpu.subprocess, "run", lambda command, check: commands.append(command))
    assert [line.what for line in cpu.start_up(options).lines] == [cpu.MAIN, cpu.COLD, cpu.WARM, cpu.FLOOR]
    assert any({*cpu.MAIN_FLAGS.split(), f"--data={cpu.SAMPLE}"} < {*command} for command in commands)
    caches = [flag.rsplit("/")[-1] for command in commands for flag in command if "--cache" in flag]
    assert sorted(caches) == ["--cache=off"] * 4 + ["cache"] * 2, "a warm-up and a round"


def test_a_command_is_ended_at_its_first_step_and_named_where_it_has_none(tmp_path: Path, monkeypatch: Patch) -> None:
    """The command is replaced by one that logs a step and goes on for ever, or ends."""
    monkeypatch.setattr(cpu, "ROOT", tmp_path)
    program = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text('a step'); time.sleep(10**6)"
    (tmp_path / "multitask_classifier.py").write_text(program)
    cpu.until_first_step([str(tmp_path / "log")], tmp_path / "log")
    with pytest.raises(harness.MeasurementError, match=r"py: no first step; (?s:.*)IndexError"):
        cpu.until_first_step([], tmp_path / "no")
    for flags in (cpu.MAIN_FLAGS, cpu.SHORT_FLAGS):
        assert parse(flags.split()).option == "finetune"


# ----------------------------------------------------------------------------------------------------------- gpu


def gpu_setup(rounds: int = 1, device: str = "cpu") -> gpu.Setup:
    on = torch.device(device)
    rows = workload.random_rows(gpu.row_lengths(), gpu.TINY.num_rows, gpu.TINY.config, on)
    return gpu.Setup(gpu.TINY, on, rows, rounds)


def test_the_gpu_script_goes_its_way_on_the_cpu(monkeypatch: Patch, capsys: Capture) -> None:
    """One step where it takes several at a time: the profiler is slow on a CPU."""
    monkeypatch.setattr(workload, "steps_of", lambda trainer, count, of=workload.steps_of: of(trainer, 1))
    assert gpu.main(["--tiny", "--device", "cpu", "--rounds", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("float32: ") == 2 * 9 and shown.count("differing parameters after replayed steps: 0.00") == 2
    whats = ("mixed step, 9 rows", "prediction, batches of 16")
    assert all(f"| {what}, {name} " in shown for what in whats for name in (gpu.OURS, gpu.PADDED))
    assert all(f"| step of 9 rows a task, {name} " in shown for name in ("plain", "pcgrad", "smart", "pal"))


def test_the_gpu_script_counts_real_rows_and_tokens(monkeypatch: Patch) -> None:
    """Every kind takes a second a round: rows per second are the rows of a round."""
    setup, passes = gpu_setup(rounds=2), list[Sequence[np.ndarray]]()
    monkeypatch.setattr(harness, "alternate", lambda kinds, rounds, **options: {n: [1.0] * rounds for n in kinds})
    measured = MatmulLimit.seconds
    monkeypatch.setattr(MatmulLimit, "seconds", lambda *given: (passes.append(given[1]), measured(*given))[1])
    lines, checks = setup.training(9)
    assert [line.values for line in lines] == [[18.0, 18.0]] * 3  # 2 steps of 9 rows
    assert {check.found for check in checks} == {1.0}
    draws = workload.Draws(setup.rows, 3, rows_per_step=9)
    expected = [workload.lengths_of(setup.rows, draws(step)).tolist() for step in range(2 * harness.WARM_UP, 8)]
    assert [lengths.tolist() for of in passes for lengths in of] == expected
    assert setup.evaluation()[0][0].values == [48.0, 48.0]


PARITY = ("pooled output", "gradient", "pooled output in bfloat16", "transformers' pooled output")


@pytest.mark.parametrize(("changed", "kinds"), [("PaddedBert", PARITY[3:]), ("random_model", PARITY)])
def test_wrong_weights_fail_the_parity(changed: str, kinds: Sequence[str], monkeypatch: Patch) -> None:
    """Of the models on the device that is checked: the reference's, or ours, from which the reference has its own."""
    setup, original, made = gpu_setup(), getattr(gpu, changed), list[torch.nn.Module]()
    assert all(check.holds for check in setup.parity())

    def make(*given: Any, **named: Any) -> torch.nn.Module:
        made.append(original(*given, **named))
        for name, parameter in made[0].named_parameters():
            if len(made) == 1 and re.search(r"1\.attention.output(\.dense)?\.weight", name):
                parameter.data *= 1.1
        return made[-1]

    monkeypatch.setattr(gpu, changed, make)
    failed = [check.what.removesuffix(" in float32") for check in setup.parity() if not check.holds]
    assert failed == [f"{task}: {what}" for task in THREE for what in kinds]


def test_a_difference_that_is_not_a_number_never_passes() -> None:
    assert gpu.difference(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")
    assert gpu.difference(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.8)


def test_row_lengths_come_back_as_they_were_counted(
    rows: Mapping[str, TokenizedRows], tiny: Path, data: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    path = tmp_path / "row_lengths.json"
    monkeypatch.setattr(gpu, "LENGTHS", path)
    monkeypatch.setattr(gpu, "EMBEDDED_MODEL", str(tiny))
    assert gpu.main(["--save_lengths", str(data)]) == 0
    found = {task: sorted(of.tolist()) for task, of in gpu.row_lengths(path).items()}
    assert found == {task: sorted(of.tokens.lengths.tolist()) for task, of in rows.items()}


def test_the_stored_row_lengths_are_those_of_the_course_s_training_rows() -> None:
    lengths = gpu.row_lengths()
    assert {task: len(of) for task, of in lengths.items()} == {"sst": 7690, "para": 14000, "sts": 5436}
    assert min(of.min() for of in lengths.values()) >= 3


def test_the_gpu_script_says_that_there_is_no_gpu(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--tiny"])
    assert "--device cuda: no CUDA GPU found" in capsys.readouterr().err


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_packed_attention_agrees_with_transformers_on_a_gpu() -> None:
    assert all(check.holds for check in gpu_setup(device="cuda").parity())


def test_the_whole_hands_its_flags_to_each_benchmark_and_names_those_that_fail(
    given: list[str], monkeypatch: Patch, capsys: Capture
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        commands.append(command[2:])
        return subprocess.CompletedProcess(command, int(command[3] == "start_up"))

    monkeypatch.setattr(everything.subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert everything.main([*given, "--out", "x"]) == 1
    assert capsys.readouterr().err == "failed: start_up\n"
    flags = [f"{name}={value}" for name, value in zip(given[::2], given[1::2], strict=True)]
    assert [command[1] for command in commands] == [*everything.BENCHMARKS, "--out=x"]
    assert all({*flags, "--out=x", "--threads=0"} < {*command} for command in commands[:-1])
    assert commands[-1] == ["benchmarks.gpu", "--out=x"]
    with pytest.raises(SystemExit):
        everything.main(["typo"])
    assert "typo: no benchmark, expected some of training_step, " in capsys.readouterr().err


def test_a_worker_takes_the_steps_that_it_is_asked_for(
    tiny: Path, data: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setattr(sys, "argv", ["worker.py", str(data), str(tiny)])
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{kind} 0\n" for kind in compare.KINDS)))
    monkeypatch.setattr(torch, "set_flush_denormal", bool)
    runpy.run_path(str(compare.WORKER))
    assert capsys.readouterr().out == "done\n" * 3


CHECKOUT = {
    "torch.py": "set_flush_denormal = bool",
    "evaluation.py": "predict_logits = None",
    "benchmarks/workload.py": """
class Checkpoint:
    find = classmethod(lambda cls, model: cls())
    rows = model = lambda *given: {}
class Trainer:
    take_step = lambda *given: None
subset, full_trainer = (lambda *given: {}), (lambda *given, **options: Trainer())
""",
}


def test_each_process_imports_its_own_checkout(
    given: list[str], tmp_path: Path, monkeypatch: Patch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Their steps are taken, and said to last one and three seconds here, two and six there."""

    def alternate(steps: Mapping[str, Any], rounds: int) -> dict[str, list[float]]:
        return {name: [step(0) or n, 3.0 * n][:rounds] for n, (name, step) in enumerate(steps.items(), 1)}

    with pytest.raises(SystemExit):
        compare.main([str(tmp_path), *given])
    assert "expected another checkout of this project" in capfd.readouterr().err
    for path, text in [(tmp_path / name / path, text) for name in ("this", "other") for path, text in CHECKOUT.items()]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(compare, "alternate", alternate)
    monkeypatch.setattr(compare, "ROOT", tmp_path / "this")
    assert compare.main([str(tmp_path / "other"), *given]) == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capfd.readouterr().out.splitlines()[4:]]
    cells = {
        "this checkout": ["2.00 (2.00 to 2.00) s", ""],
        "the other": ["4.00 (4.00 to 4.00) s", "2.00 (2.00 to 2.00)"],
    }
    assert lines == [[f"{what}, {name}", *of] for what in compare.KINDS.values() for name, of in cells.items()]
    (tmp_path / "other" / "benchmarks" / "workload.py").write_text("raise SystemExit('the other one was here')")
    assert compare.main([str(tmp_path / "other"), *given]) == 2
    error = capfd.readouterr().err
    assert "the other one was here" in error and f"{tmp_path / 'other'}: its process ended at a training step" in error
