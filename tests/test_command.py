"""The command, from flags to a full run directory, on a tiny model and tiny files; stopped, killed and resumed."""

import functools
import json
import multiprocessing
import os
import pkgutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import engine
import kernels
import multitask_classifier
import run_data
import token_cache
from helpers import WORDS, write_data
from reports import plots
from tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent


# ----------------------------------------------------------------------------------------------------- fixtures


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer to draw than these runs take; test_plots.py has those of a run."""
    monkeypatch.setattr(plots, "write_plots", lambda run: [])


Command = Callable[..., list[str]]


@pytest.fixture
def command(tiny: Path, data: Path) -> Command:
    """Arguments of a short run into a directory, with more flags or others."""

    def arguments(out: Path, flags: str = "", model: bool = True) -> list[str]:
        given = flags.split()
        base = {"--data": str(data), "--device": "cpu", "--batch_size": "4", "--cache": "off", "--out": str(out)}
        if model:
            base["--model"] = str(tiny)
        if "test" not in given:
            base |= {"--steps_per_epoch": "3"}
            base |= {} if {"pretrain", "individual_pretrain"} & set(given) else {"--epochs": "2"}
            base |= {} if "--checkpoint" in given else {"--pretrain_epochs": "2"}
        line = [part for name, value in base.items() if name not in given for part in (name, value)]
        return [*line, *given, *([] if "--tensorboard" in given else ["--no-tensorboard"])]

    return arguments


def run(arguments: Sequence[str]) -> None:
    assert multitask_classifier.main(arguments) == 0


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def steps(out: Path) -> list[tuple[str, int]]:
    return [(record["stage"], record["step"]) for record in records(out) if "loss" in record]


def both(num_pretrain: int = 6, num_finetune: int = 6) -> list[tuple[str, int]]:
    counts = (("pretrain", num_pretrain), ("finetune", num_finetune))
    return [(stage, step) for stage, count in counts for step in range(1, count + 1)]


def weights(out: Path, folder: str = "last") -> dict[str, Tensor]:
    return load_file(out / folder / "model.safetensors")


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> set[str]:
    assert first.keys() == second.keys()
    return {name for name, value in first.items() if not torch.equal(value, second[name])}


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def error_line(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that fails."""
    capsys.readouterr()
    status = multitask_classifier.main(arguments)
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert status in (1, 2) and len(lines) == 1 and lines[0].startswith("error: "), (status, shown)
    assert "Traceback" not in shown.out + shown.err
    return lines[0].removeprefix("error: ")


# ------------------------------------------------------------------------------------------------ run directory


def test_signals_are_given_back_at_the_end_of_a_run(command: Command, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run(command(tmp_path / "run", "--option pretrain --tasks sst"))
    assert multitask_classifier.main(command(tmp_path / "run", "--option pretrain --tasks sst")) == 2
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_run_leaves_everything_in_its_directory(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run(command(out, "--pcgrad --scheduler pal --tensorboard"))
    shown = capsys.readouterr()
    assert {path.name for path in out.iterdir()} == {
        "config.json", "metrics.jsonl", "results.json", "best", "last", "predictions", "tensorboard"
    }  # fmt: skip
    for folder in ("best", "last"):
        assert {"model.safetensors", "config.json", "vocab.txt"} <= {path.name for path in (out / folder).iterdir()}
    assert steps(out) == both()
    results = json.loads((out / "results.json").read_text())
    assert set(results) >= {"dev", "best_epoch", "parameters", "seconds", "peak_memory_mb", "confusion", "gradients"}
    assert set(results["dev"]) == {"sst", "para", "sts", "mean"}
    assert "accuracy" in results["dev"]["sst"] and "accuracy" in results["dev"]["para"]
    assert "pearson" in results["dev"]["sts"]
    main_metrics = (("sst", "accuracy"), ("para", "accuracy"), ("sts", "pearson"))
    assert results["dev"]["mean"] == pytest.approx(np.mean([results["dev"][t][m] for t, m in main_metrics]))
    counts = results["parameters"]
    assert set(counts) == {"total", "shared", "per_task", "separate_models"}
    assert counts["separate_models"] == counts["total"] + 2 * counts["shared"]
    assert results["best_epoch"] in (1, 2) and results["peak_memory_mb"] > 10
    assert [sum(map(sum, results["confusion"][task])) for task in ("sst", "para")] == [8, 8]
    config = json.loads((out / "config.json").read_text())
    assert config["treatment"] == "pcgrad" and config["draws_per_step"] == 16 and config["lr"] > 0
    assert config["versions"]["torch"] == torch.__version__ and "commit" in config
    assert config["data_files"]["quora-train.csv"]["rows"] == 26
    assert len(config["data_files"]["quora-train.csv"]["sha256"]) == 64
    events = list((out / "tensorboard").iterdir())
    assert len(events) == 1 and events[0].stat().st_size > 1000
    check_shown(shown.out, shown.err, str(out))
    check_predictions(out)


def check_shown(out: str, err: str, directory: str) -> None:
    """Quiet and line-based: no bar, no control characters; what was used, a line an evaluation, a table."""
    assert err == "" and "\r" not in out and "\x1b" not in out and "%|" not in out
    for word in ("model", "parameters", "data", "pretrain", "finetune", "methods", "run", "pcgrad", "separate models"):
        assert word in out
    assert "26 train" in out and "64 rows (4 rows x 1 passes x 16 draws)" in out
    assert len([line for line in out.splitlines() if ": dev " in line]) == 4
    assert "dev rows" in out and directory in out


def check_predictions(out: Path) -> None:
    titles = {"sst": "Predicted_Sentiment", "para": "Predicted_Is_Paraphrase", "sts": "Predicted_Similiary"}
    assert len(list((out / "predictions").iterdir())) == 9
    for task, title in titles.items():
        for split, num_rows in (("dev", 8), ("test", 6)):
            header, *rows = (out / "predictions" / f"{task}-{split}-output.csv").read_text().splitlines()
            assert header == f"id \t {title} "
            cells = [row.split(" , ") for row in rows]
            assert [name for name, _ in cells] == [f"{task}{split}{i}" for i in range(num_rows)]
            values = [value.removesuffix(" ") for _, value in cells]
            allowed = {"sst": list("01234"), "para": list("01")}
            assert all(0 <= float(v) <= 5 if task == "sts" else v in allowed[task] for v in values)
            assert all(value.endswith(" ") for _, value in cells)


def test_a_run_says_and_records_why_it_has_no_compiled_kernels(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = "no C compiler: gcc was not found"
    found = []
    for build in (kernels.build(), kernels.Build(None, problem)):
        monkeypatch.setattr(kernels, "build", lambda build=build: build)
        out = tmp_path / f"run{len(found)}"
        run(command(out, "--option pretrain --tasks sst --pretrain_epochs 1"))
        shown = f"slower than it could be, without compiled kernels: {problem}" in capsys.readouterr().out
        found.append((shown, json.loads((out / "config.json").read_text())["kernels"]))
    assert found[0] == (False, "compiled") or kernels.build().library is None
    assert found[1] == (True, problem)


def test_the_embedding_gradient_is_kept_by_lines_where_the_encoder_is_trained(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    class Watched(multitask_classifier.Trainer):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            made.append((self.settings.name, self.embedding))

    monkeypatch.setattr(multitask_classifier, "Trainer", Watched)
    run(command(tmp_path / "run", "--pretrain_epochs 1 --epochs 1"))
    assert made == [("pretrain", None), ("finetune", "encoder.word_embeddings.weight")]


def test_the_program_rounds_numbers_that_are_not_normal_to_zero() -> None:
    script = """
import runpy, sys, torch
sys.argv = ["multitask_classifier.py", "--help"]
try:
    runpy.run_path("multitask_classifier.py", run_name="__main__")
except SystemExit:
    pass
print(bool((torch.full((100_000,), 1e-38) * 0.5).any()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(multitask_classifier.__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "False"


def test_tensorboard_on_or_off_gives_the_same_weights(command: Command, tmp_path: Path) -> None:
    run(command(tmp_path / "on", "--tensorboard"))
    run(command(tmp_path / "off"))
    for folder in ("best", "last"):
        assert differing(weights(tmp_path / "on", folder), weights(tmp_path / "off", folder)) == set()


@pytest.mark.parametrize("flags", ["--option pretrain", "--option individual_pretrain --head_layers 2"])
def test_pretraining_moves_heads_only_and_leaves_a_best_checkpoint(
    flags: str, command: Command, tmp_path: Path, tiny: Path
) -> None:
    run(command(tmp_path / "run", flags))
    before, after = load_file(tiny / "model.safetensors"), weights(tmp_path / "run", "best")
    assert {name for name in after if not name.startswith("heads.")} == set(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    stages = ["pretrain"] if flags == "--option pretrain" else [f"pretrain_{task}" for task in TASKS]
    assert steps(tmp_path / "run") == [(stage, step) for stage in stages for step in range(1, 7)]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    if len(stages) > 1:
        assert set(results["best_epoch"]) == set(stages)


def test_each_head_keeps_the_epoch_that_was_best_for_its_task(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores are made up: epoch 1 is the best for one task, epoch 2 for another, epoch 3 for the third."""
    best = {"sst": 1, "para": 2, "sts": 3}
    kept: dict[str, dict[str, Tensor]] = {}

    def evaluate(trainer: engine.Trainer, *args: Any) -> engine.Metrics:
        (task,) = trainer.settings.tasks
        epoch = trainer.progress.step // 3
        if epoch == best[task]:
            kept[task] = {name: p.detach().clone() for name, p in trainer.parameters.items()}
        return {task: {TASKS[task].output.selection_metric: 0.9 if epoch == best[task] else 0.1}}

    monkeypatch.setattr(engine.Trainer, "evaluate", evaluate)
    run(command(tmp_path / "run", "--option individual_pretrain --pretrain_epochs 3 --head_layers 1"))
    after = weights(tmp_path / "run", "best")
    for task in TASKS:
        assert len(kept[task]) == 4 and all(torch.equal(after[name], value) for name, value in kept[task].items())
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["best_epoch"] == {"pretrain_sst": 1, "pretrain_para": 2, "pretrain_sts": 3}


def test_the_best_checkpoint_is_the_best_epochs(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {1: 0.3, 2: 0.8, 3: 0.8, 4: 0.5}

    def evaluate(trainer: engine.Trainer, *args: Any) -> engine.Metrics:
        value = scores[trainer.progress.step // 3]
        return {task: {TASKS[task].output.selection_metric: value} for task in trainer.settings.tasks}

    monkeypatch.setattr(engine.Trainer, "evaluate", evaluate)
    run(command(tmp_path / "long", "--pretrain_epochs 0 --epochs 4 --lr 1e-3 --warmup 0"))
    assert json.loads((tmp_path / "long" / "results.json").read_text())["best_epoch"] == 2
    best, last = weights(tmp_path / "long", "best"), weights(tmp_path / "long", "last")
    assert differing(best, last)
    tested = {}
    for name in ("best", "last"):
        checkpoint = tmp_path / "long" / name
        run(command(tmp_path / name, f"--option test --checkpoint {checkpoint}", model=False))
        tested[name] = (tmp_path / name / "predictions" / "sts-dev-output.csv").read_text()
    assert (tmp_path / "long" / "predictions" / "sts-dev-output.csv").read_text() == tested["best"] != tested["last"]
    original = engine.Trainer.take_step

    def keep_after_two_epochs(trainer: engine.Trainer, epoch: int, step: int) -> dict[str, Any]:
        if step == 6:
            kept.update({name: p.detach().clone() for name, p in trainer.parameters.items()})
        return original(trainer, epoch, step)

    kept: dict[str, Tensor] = {}
    monkeypatch.setattr(engine.Trainer, "take_step", keep_after_two_epochs)
    run(command(tmp_path / "again", "--pretrain_epochs 0 --epochs 4 --lr 1e-3 --warmup 0"))
    assert torch.equal(best["heads.sts.output.weight"], kept["heads.sts.output.weight"])
    assert torch.equal(best["bert.pooler.dense.weight"], kept["encoder.pooler.weight"])


def test_testing_a_run_gives_the_scores_and_predictions_of_the_run(command: Command, tmp_path: Path) -> None:
    run(command(tmp_path / "run", "--pal --pretrain_epochs 1"))
    for name, checkpoint in (("of_run", tmp_path / "run"), ("of_folder", tmp_path / "run" / "best")):
        run(command(tmp_path / name, f"--option test --checkpoint {checkpoint} --eval_batch_size 3", model=False))
        first, second = (json.loads((tmp_path / part / "results.json").read_text()) for part in ("run", name))
        for task in TASKS:
            assert second["dev"][task] == pytest.approx(first["dev"][task], abs=1e-6)
        check_predictions(tmp_path / name)
        for split in ("dev", "test"):
            files = [tmp_path / part / "predictions" / f"sst-{split}-output.csv" for part in ("run", name)]
            assert files[0].read_bytes() == files[1].read_bytes()


def test_late_adapters_train_alone_on_a_plain_fine_tuned_checkpoint(command: Command, tmp_path: Path) -> None:
    run(command(tmp_path / "plain", "--head_layers 1"))
    flags = f"--checkpoint {tmp_path / 'plain'} --pal --train pal --lr 1e-2 --warmup 0 --draws_per_step 3"
    run(command(tmp_path / "late", flags + " --scheduler round_robin", model=False))
    before, after = weights(tmp_path / "plain", "best"), weights(tmp_path / "late", "last")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    new = {name: value for name, value in after.items() if name not in before}
    ups = [value for name, value in new.items() if ".up." in name]
    assert new and all(name.startswith("adapters.") for name in new)
    assert len(ups) == 6 and all(bool(value.any()) for value in ups)


def test_fewer_tasks_make_a_smaller_run(command: Command, tmp_path: Path) -> None:
    run(command(tmp_path / "run", "--tasks sts"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["dev"]) == {"sts", "mean"}
    assert results["parameters"]["total"] == results["parameters"]["separate_models"]
    assert sorted(path.name for path in (tmp_path / "run" / "predictions").iterdir()) == [
        "sts-dev-output.csv", "sts-dev-rows.csv", "sts-test-output.csv"
    ]  # fmt: skip


def test_without_a_test_file_there_are_no_test_predictions(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_data(tmp_path / "data")
    (folder / "quora-test-student.csv").unlink()
    run(command(tmp_path / "run", f"--data {folder} --option pretrain"))
    assert not (tmp_path / "run" / "predictions" / "para-test-output.csv").exists()
    assert "no test file of para" in capsys.readouterr().out


def test_rows_without_a_label_are_skipped_and_counted(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_data(tmp_path / "data")
    path = folder / "quora-train.csv"
    lines = path.read_text().splitlines()
    lines[4] = lines[4].rsplit("\t", 1)[0] + "\t"
    path.write_text("\n".join(lines) + "\n")
    run(command(tmp_path / "run", f"--data {folder} --option pretrain"))
    assert f"skipped 1 rows without a label: {path}:5" in capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data_files"]["quora-train.csv"] | {"sha256": ""} == {"rows": 25, "skipped": [5], "sha256": ""}


def test_dev_rows_that_stand_in_the_training_file_are_told(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_data(tmp_path / "data")
    train, dev = ((folder / f"sts-{split}.csv") for split in ("train", "dev"))
    rows = [line.split("\t") for line in train.read_text().splitlines()[1:3]]
    swapped = ["\t".join([*row[:2], row[3].upper(), row[2], "0"]) for row in rows]
    dev.write_text(dev.read_text() + "\n".join(swapped) + "\n")
    run(command(tmp_path / "run", f"--data {folder} --option pretrain"))
    shown = capsys.readouterr().out
    assert "warning: 2 of 10 dev rows of sts stand in its training file too" in shown
    assert shown.count("training file too") == 1


def test_the_second_run_reads_no_csv_file_and_is_the_same(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = command(tmp_path / "runs" / "first")
    place = arguments.index("--cache")
    del arguments[place : place + 2]
    run(arguments)
    assert len(list((tmp_path / "runs" / ".cache").iterdir())) == 9
    monkeypatch.setattr(token_cache, "parse_examples", lambda *_: pytest.fail("a csv file was read"))
    run([part.replace("first", "second") for part in arguments])
    first, second = (tmp_path / "runs" / name for name in ("first", "second"))
    assert differing(weights(first), weights(second)) == set()
    for name in ("results.json", "config.json"):
        values = [json.loads((out / name).read_text()) for out in (first, second)]
        for key in ("out", "seconds", "peak_memory_mb"):
            for value in values:
                value.pop(key, None)
        assert values[0] == values[1]
    for path in (first / "predictions").iterdir():
        assert path.read_bytes() == (second / "predictions" / path.name).read_bytes()


# -------------------------------------------------------------------------------------------------- every flag

BASE = "--pretrain_epochs 0 --epochs 1 --scheduler round_robin --draws_per_step 3 --lr 1e-3"
CHANGES = [
    ("", "--scheduler random"),
    ("", "--scheduler pal"),
    ("", "--draws_per_step 4"),
    ("", "--pcgrad"),
    ("", "--gradvac"),
    ("", "--treatment UPGrad"),
    ("--gradvac", "--gradvac_beta 1"),
    ("--pcgrad", "--granularity layer"),
    ("", "--smart"),
    ("--smart", "--smart_weight 50"),
    ("--smart", "--smart_eps 1e-2"),
    ("--smart --smart_eps 1", "--smart_sigma 0.1"),
    ("--smart --smart_eps 1", "--smart_eta 0.1"),
    ("--smart --smart_eps 1", "--smart_steps 2"),
    ("", "--bregman"),
    ("--bregman", "--bregman_weight 50"),
    ("", "--pal"),
    ("--pal", "--pal_kind low_rank"),
    ("--pal", "--pal_size 6"),
    ("--pal --pal_size 8", "--pal_heads 4"),
    ("--pal", "--pal_layers 1"),
    ("--pal", "--train pal"),
    ("", "--head_layers 1"),
    ("", "--augment eda"),
    ("--augment eda", "--eda_alpha 0.5"),
    ("--augment eda", "--eda_deletion_prob 0.6"),
    ("", "--drop_longest 0.2"),
    ("", "--max_length 6"),
    ("", "--epochs 2"),
    ("", "--pretrain_epochs 1"),
    ("--pretrain_epochs 1", "--pretrain_lr 0.1"),
    ("", "--steps_per_epoch 2"),
    ("", "--batch_size 5"),
    ("", "--accumulation_steps 2"),
    ("", "--lr 2e-3"),
    ("", "--warmup 0.5"),
    ("", "--weight_decay 0.5"),
    ("--max_grad_norm 0", "--max_grad_norm 1e-9"),
    ("--epochs 5 --lr 1e-9 --tasks sst para --draws_per_step 2", "--patience 1"),
    ("", "--seed 1"),
    ("", "--tasks sst sts"),
    ("", "--amp"),
    ("", "--amp fp16"),
]
KEEPS = ["--eval_every 0", "--save_every 1", "--eval_batch_size 3", "--tensorboard"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Command, str], dict[str, Tensor]]:
    """The final weights under some flags, each computed once. The last value given for a flag counts."""
    cache: dict[str, dict[str, Tensor]] = {}

    def outcome(command: Command, flags: str) -> dict[str, Tensor]:
        if flags not in cache:
            out = tmp_path_factory.mktemp("flags") / "run"
            run(command(out, flags))
            cache[flags] = weights(out)
        return cache[flags]

    return outcome


@pytest.fixture
def _small_wordnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Synonyms without WordNet's files."""
    monkeypatch.setattr(run_data, "WordNet", lambda folder: lambda word: ("a", "the") if word in WORDS else ())


@pytest.mark.usefixtures("_small_wordnet")
@pytest.mark.parametrize(("context", "flag"), CHANGES)
def test_every_flag_changes_the_run(context: str, flag: str, command: Command, outcomes: Any) -> None:
    without = outcomes(command, f"{BASE} {context}".strip())
    with_flag = outcomes(command, f"{BASE} {context} {flag}")
    common = [name for name in without if name in with_flag and with_flag[name].shape == without[name].shape]
    assert any(not torch.equal(without[name], with_flag[name]) for name in common)


@pytest.mark.parametrize("flag", KEEPS)
def test_what_is_no_matter_of_training_changes_nothing(flag: str, command: Command, outcomes: Any) -> None:
    assert differing(outcomes(command, BASE), outcomes(command, f"{BASE} {flag}")) == set()


@pytest.mark.parametrize(
    ("width", "draws", "expected"), [(384, 1, 8e-5), (768, 1, 2.8e-5), (1024, 1, 1.8e-5), (384, 16, 3.2e-4)]
)
def test_the_default_learning_rate_follows_width_and_draws(width: int, draws: int, expected: float) -> None:
    assert multitask_classifier.default_learning_rate(width, draws) == pytest.approx(expected)


def test_a_step_of_more_draws_has_a_higher_default_rate(command: Command, tmp_path: Path) -> None:
    rates = []
    for draws in (1, 4):
        run(command(tmp_path / str(draws), f"--pretrain_epochs 0 --draws_per_step {draws}"))
        rates.append(json.loads((tmp_path / str(draws) / "config.json").read_text())["lr"])
    assert rates[1] == pytest.approx(2 * rates[0], rel=0.05)


def test_the_two_short_flags_are_their_treatments(command: Command, outcomes: Any) -> None:
    for name in ("pcgrad", "gradvac"):
        short, long = outcomes(command, f"{BASE} --{name}"), outcomes(command, f"{BASE} --treatment {name}")
        assert differing(short, long) == set()


# ---------------------------------------------------------------------------------- stopped, killed and resumed

# Where a process can be made to send itself a signal: before the n-th call of that function.
POINTS = {
    "step": "engine:Trainer.take_step",
    "log": "run_record:MetricsLog.write",
    "rename": "os:rename",
    "write": "os:replace",
    "evaluation": "evaluation:predict_logits",
    "features": "multitask_classifier:compute_features",
}


def main_with_signal(arguments: Sequence[str], point: str, number: int, what: int, log: str) -> None:
    """Runs in a process of its own: the command, which signals itself before call `number` of a point, from 1."""
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    owner, _, name = POINTS[point].replace(":", ".", 1).rpartition(".")
    place = pkgutil.resolve_name(owner)
    original = getattr(place, name)
    calls = 0

    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), what)
        return original(*args, **kwargs)

    setattr(place, name, counted)
    sys.exit(multitask_classifier.main(arguments))


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Processes forked from a server that has imported everything: fresh, and cheap."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_command", "sklearn.metrics", "scipy.stats"])
    with pytest.MonkeyPatch.context() as patch:  # the server does not hear of sys.path otherwise
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        forkserver.ensure_running()
    return context


@pytest.fixture
def signalled(processes: multiprocessing.context.ForkServerContext, tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Runs the command until it signals itself; returns exit status and output."""

    def start(arguments: Sequence[str], point: str, number: int, what: int) -> tuple[int, str]:
        log = tmp_path / f"log-{time.monotonic_ns()}"
        process = processes.Process(target=main_with_signal, args=(list(arguments), point, number, what, str(log)))
        process.start()
        process.join(300)
        assert process.exitcode is not None, "the process hangs"
        return process.exitcode, log.read_text()

    return start


METHODS = {
    "plain": "",
    "pcgrad": "--pcgrad --scheduler pal --draws_per_step 4",
    "gradvac": "--gradvac --scheduler random --granularity layer --pal --warmup 0",
    "bregman": "--bregman --accumulation_steps 2 --scheduler round_robin",
    "smart": "--smart --gradvac --gradvac_beta 0.5 --bregman --amp bf16",
}


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Command, str], Path]:
    """The run directory of the uninterrupted run under some flags."""
    cache: dict[str, Path] = {}

    def whole(command: Command, flags: str) -> Path:
        if flags not in cache:
            cache[flags] = tmp_path_factory.mktemp("whole") / "run"
            run(command(cache[flags], flags))
        return cache[flags]

    return whole


def assert_same_run(found: Path, expected: Path) -> None:
    """Bit-identical parameters and trainer state, the same scores and log."""
    for folder in ("best", "last"):
        assert differing(weights(found, folder), weights(expected, folder)) == set()
    tensors = [load_file(out / "last" / "trainer.safetensors") for out in (found, expected)]
    assert differing(*tensors) == set()
    assert steps(found) == steps(expected)
    numbers = ("stage", "epoch", "step", "loss", "lr", "gradient_norm", "dev", "cosines", "draws")
    logs = [[{k: r.get(k) for k in numbers} for r in records(out)] for out in (found, expected)]
    assert logs[0] == logs[1]
    dev = [json.loads((out / "results.json").read_text())["dev"] for out in (found, expected)]
    assert dev[0] == dev[1]
    for name in ("sst", "para", "sts"):
        files = [(out / "predictions" / f"{name}-test-output.csv").read_bytes() for out in (found, expected)]
        assert files[0] == files[1]


@pytest.mark.parametrize(
    ("method", "save_every", "point", "number"),
    [
        ("plain", 0, "step", 1),  # before anything is saved
        ("plain", 0, "features", 4),
        ("plain", 3, "step", 5),  # in the frozen stage
        ("plain", 2, "log", 8),
        ("pcgrad", 3, "step", 9),
        ("pcgrad", 0, "step", 11),
        ("gradvac", 3, "step", 12),
        ("gradvac", 2, "log", 12),
        ("gradvac", 1, "step", 8),
        ("bregman", 3, "step", 10),
        ("bregman", 2, "step", 12),
        ("smart", 3, "step", 12),
        ("smart", 1, "evaluation", 8),
        ("plain", 0, "evaluation", 16),  # in the last evaluation
        ("plain", 0, "write", 3),
        *[("plain", 2, "rename", number) for number in (1, 2, 4, 5, 19, 22)],
    ],
)
def test_a_killed_and_resumed_run_equals_the_uninterrupted_run(
    method: str, save_every: int, point: str, number: int, command: Command, whole_runs: Any, signalled: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    arguments = command(out, f"{METHODS[method]} --save_every {save_every}")
    assert signalled(arguments, point, number, signal.SIGKILL)[0] == -signal.SIGKILL
    assert not (out / "results.json").exists()
    run(["--resume", str(out)])
    assert steps(out) == both()
    assert_same_run(out, whole_runs(command, METHODS[method]))
    assert not list(out.glob("*.tmp")) + list(out.glob("*.new")) + list(out.glob("*.old"))


@pytest.mark.parametrize(("number", "finished"), [(1, 0), (2, 2), (4, 2), (5, 3)])
def test_a_checkpoint_whose_replacement_was_cut_off_is_not_lost(
    number: int, finished: int, command: Command, signalled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saves after steps 2 and 3; before renames 2 and 5 the folder has no name of its own, and its content is whole."""
    out, taken, original = tmp_path / "run", [], engine.Trainer.take_step
    arguments = command(out, "--option pretrain --save_every 2")
    assert signalled(arguments, "rename", number, signal.SIGKILL)[0] == -signal.SIGKILL

    def take_step(trainer: engine.Trainer, epoch: int, step: int) -> dict[str, Any]:
        taken.append(step)
        return original(trainer, epoch, step)

    monkeypatch.setattr(engine.Trainer, "take_step", take_step)
    run(["--resume", str(out)])
    assert taken == list(range(finished, 6))


def test_a_stage_that_has_ended_is_not_begun_again(
    command: Command, whole_runs: Any, signalled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert signalled(command(out), "step", 7, signal.SIGKILL)[0] == -signal.SIGKILL  # in fine-tuning
    monkeypatch.setattr(multitask_classifier, "compute_features", lambda *_: pytest.fail("features were computed"))
    run(["--resume", str(out)])
    assert_same_run(out, whole_runs(command, ""))


def test_other_kinds_of_runs_resume_too(command: Command, whole_runs: Any, signalled: Any, tmp_path: Path) -> None:
    plain = whole_runs(command, "")
    kinds = [
        ("--option individual_pretrain --head_layers 1 --patience 1", True, 9),
        (f"--checkpoint {plain} --pal --train pal --smart", False, 4),
    ]
    for i, (flags, model, number) in enumerate(kinds):
        out, whole = tmp_path / f"run{i}", tmp_path / f"whole{i}"
        run(command(whole, flags, model=model))
        arguments = command(out, f"{flags} --save_every 2", model=model)
        assert signalled(arguments, "step", number, signal.SIGKILL)[0] == -signal.SIGKILL
        run(["--resume", str(out)])
        assert_same_run(out, whole)


def test_a_run_killed_twice_still_equals_the_uninterrupted_run(
    command: Command, whole_runs: Any, signalled: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    resume = ["--resume", str(out)]
    assert signalled(command(out, "--save_every 2"), "step", 4, signal.SIGKILL)[0] == -signal.SIGKILL
    assert signalled(resume, "step", 7, signal.SIGKILL)[0] == -signal.SIGKILL
    assert signalled(resume, "rename", 2, signal.SIGKILL)[0] == -signal.SIGKILL
    run(resume)
    assert steps(out) == both()
    assert_same_run(out, whole_runs(command, ""))


@pytest.mark.parametrize("what", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("method", "point", "number", "finished"),
    [
        ("plain", "step", 5, ("pretrain", 5)),
        ("gradvac", "step", 11, ("finetune", 5)),
        ("plain", "evaluation", 8, ("finetune", 3)),  # in the evaluation of the first epoch of fine-tuning
        ("plain", "evaluation", 4, ("pretrain", 6)),
        ("plain", "evaluation", 13, ("finetune", 6)),  # in the last evaluation
        ("plain", "features", 1, ("pretrain", 0)),
        ("plain", "features", 2, ("pretrain", 1)),  # of the second step's task
        ("plain", "features", 5, ("pretrain", 3)),  # of dev rows, in the evaluation of the first epoch
    ],
)
def test_a_stop_writes_the_last_finished_step_and_the_resumed_run_equals_the_uninterrupted_run(
    what: signal.Signals, method: str, point: str, number: int, finished: tuple[str, int], command: Command,
    whole_runs: Any, signalled: Any, tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    status, shown = signalled(command(out, METHODS[method]), point, number, what)
    assert status == 128 + what
    assert shown.splitlines()[-1] == f"stopped; to go on: python multitask_classifier.py --resume {out}"
    assert "Traceback" not in shown
    state = json.loads((out / "last" / "trainer.json").read_text())
    assert (["pretrain", "finetune"][state["stage"]], state["progress"]["step"]) == finished
    assert steps(out)[-1:] == ([finished] if finished[1] else [])
    run(["--resume", str(out)])
    assert_same_run(out, whole_runs(command, METHODS[method]))


def start_process(arguments: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "multitask_classifier.py"), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for_steps(out: Path, number: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_bytes().count(b"\n") >= number:
            return
        time.sleep(0.005)
    raise AssertionError(f"the run did not come to step {number}: {process.poll()}")


def test_a_real_process_is_killed_from_outside_and_stopped_by_ctrl_c(command: Command, tmp_path: Path) -> None:
    """No hooks: whatever the process is doing when the signal comes."""
    flags = "--steps_per_epoch 40 --save_every 7 --epochs 1 --pretrain_epochs 1 --pcgrad --scheduler pal --threads 1"
    out, whole = tmp_path / "run", tmp_path / "whole"
    killed = start_process(command(out, flags))
    wait_for_steps(out, 52, killed)
    killed.kill()
    killed.communicate()
    stopped = start_process(["--resume", str(out)])
    wait_for_steps(out, 61, stopped)
    stopped.send_signal(signal.SIGINT)
    shown, errors = stopped.communicate()
    assert stopped.returncode == 130 and errors == "" and shown.splitlines()[-1].endswith(f"--resume {out}")
    run(["--resume", str(out)])
    run(command(whole, flags))
    assert steps(out) == both(40, 40)
    assert_same_run(out, whole)


def test_changed_data_is_refused_on_resume(
    command: Command, tmp_path: Path, signalled: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = write_data(tmp_path / "data"), tmp_path / "run"
    signalled(command(out, f"--data {folder}"), "step", 4, signal.SIGINT)
    path = folder / "sts-dev.csv"
    path.write_text(path.read_text().replace("film", "song", 1))
    before = everything(out)
    line = error_line(["--resume", str(out)], capsys)
    assert "sts-dev.csv" in line and "changed" in line
    assert everything(out) == before


def test_a_finished_run_is_not_resumed(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(command(tmp_path / "run", "--option pretrain"))
    before = everything(tmp_path / "run")
    assert "has ended" in error_line(["--resume", str(tmp_path / "run")], capsys)
    assert everything(tmp_path / "run") == before
    assert "no run directory" in error_line(["--resume", str(tmp_path / "none")], capsys)


@pytest.mark.parametrize("method", ["plain", "gradvac"])
def test_a_loss_that_is_not_finite_ends_the_run_with_its_last_good_checkpoint(
    method: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    whole_runs: Any,
) -> None:  # fmt: skip
    out, original = tmp_path / "run", engine.Trainer._loss

    def broken(trainer: engine.Trainer, *args: Any) -> Tensor:
        loss = original(trainer, *args)
        return loss * float("nan") if trainer.progress.step == 4 and trainer.settings.name == "finetune" else loss

    with monkeypatch.context() as patch:
        patch.setattr(engine.Trainer, "_loss", broken)
        line = error_line(command(out, METHODS[method]), capsys)
    assert "finetune step 5" in line and " is nan" in line and "training rows" in line
    state = json.loads((out / "last" / "trainer.json").read_text())
    assert state["progress"]["step"] == 4
    run(["--resume", str(out)])  # what broke the run is gone
    assert_same_run(out, whole_runs(command, METHODS[method]))


# ---------------------------------------------------------------------------------------------------- bad input


def edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def last_cell(content: bytes, value: bytes) -> bytes:
    """The file with another label in its last row."""
    return content.rstrip(b"\n").rsplit(b"\t", 1)[0] + b"\t" + value + b"\n"


BAD_FILES: dict[str, tuple[str, Callable[[bytes], bytes], Sequence[str]]] = {
    "missing column": (
        "sts-dev.csv",
        lambda c: c.replace(b"similarity", b"likeness", 1),
        ["sts-dev.csv:1", "'similarity'"],
    ),
    "label out of range": ("sts-dev.csv", lambda c: last_cell(c, b"6.2"), ["sts-dev.csv:9", "'6.2'", "0 to 5"]),
    "class out of range": (
        "ids-sst-train.csv",
        lambda c: last_cell(c, b"5"),
        ["ids-sst-train.csv:27", "'5'", "0 to 4"],
    ),
    "label not a number": (
        "quora-train.csv",
        lambda c: last_cell(c, b"yes"),
        ["quora-train.csv:27", "'yes'", "0 or 1"],
    ),
    "label nan": ("sts-train.csv", lambda c: last_cell(c, b"nan"), ["sts-train.csv:27", "'nan'"]),
    "empty file": ("quora-dev.csv", lambda c: b"", ["quora-dev.csv", "empty"]),
    "header only": ("ids-sst-dev.csv", lambda c: c.split(b"\n")[0] + b"\n", ["ids-sst-dev.csv", "no rows"]),
    "wrong delimiter": ("quora-train.csv", lambda c: c.replace(b"\t", b","), ["quora-train.csv:1", "tab"]),
    "invalid UTF-8": (
        "sts-train.csv",
        lambda c: c.replace(b"film", b"fi\xfflm", 1),
        ["sts-train.csv:", "0xff", "UTF-8"],
    ),
    "too few columns": ("sts-train.csv", lambda c: c.rstrip(b"\n") + b"\n26\tx\n", ["sts-train.csv:28", "2 columns"]),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_one_line_with_file_line_and_what_is_allowed(
    kind: str, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, change, words = BAD_FILES[kind]
    folder = write_data(tmp_path / "data")
    edit(folder / name, change)
    line = error_line(command(tmp_path / "run", f"--data {folder}"), capsys)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--scheduler fair", ["--scheduler", "fair", "round_robin"]),
        ("--epochs two", ["--epochs", "two"]),
        ("--pcgrad --gradvac", ["--pcgrad", "--gradvac"]),
        ("--gradvac --gradvac_beta 1.5", ["--gradvac_beta 1.5", "at most 1"]),
        ("--treatment nonsense", ["--treatment nonsense", "pcgrad"]),
        ("--data /nowhere/at/all", ["--data /nowhere/at/all", "no such directory"]),
        ("--seed 99999999999999999999 --data /nowhere", ["--data /nowhere"]),  # no seed is too large
        ("--model /nowhere/at/all", ["--model /nowhere/at/all"]),
        ("--checkpoint /nowhere/at/all", ["/nowhere/at/all"]),
        ("--pal --pal_size 32", ["--pal_size 32", "31"]),
        ("--pal --pal_layers 3", ["--pal_layers 3", "2 layers"]),
        ("--device cuda", ["--device cuda"]),
    ],
)
def test_a_bad_command_line_is_one_line_that_names_the_flag(
    flags: str, words: Sequence[str], command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = error_line(command(tmp_path / "run", flags, model="--checkpoint" not in flags), capsys)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_all_contradictions_are_told_at_once(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = multitask_classifier.main(command(tmp_path / "run", "--pal_size 8 --smart_eps 1e-4 --warmup 3"))
    lines = capsys.readouterr().err.splitlines()
    assert status == 2 and len(lines) == 3 and all(line.startswith("error: --") for line in lines)
    assert not (tmp_path / "run").exists()


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda folder: change_config(folder, model_type="roberta"), ["config.json", "'roberta'"]),
        (lambda folder: change_config(folder, hidden_size=48, intermediate_size=96), ["shape"]),
        (lambda folder: change_config(folder, num_hidden_layers=3), ["missing"]),
        (lambda folder: edit(folder / "model.safetensors", lambda c: c[: len(c) // 2]), ["model.safetensors"]),
        (lambda folder: (folder / "vocab.txt").unlink(), ["tokenizer"]),
        (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
        (lambda folder: edit(folder / "config.json", lambda c: c[:-5]), ["config.json", "JSON"]),
    ],
    ids=["architecture", "width", "depth", "cut off", "no tokenizer", "no config", "broken config"],
)
def test_a_checkpoint_that_does_not_fit_is_one_line(
    break_it: Callable[[Path], Any], words: Sequence[str], command: Command, tiny: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    break_it(folder)
    line = error_line(command(tmp_path / "run", f"--model {folder}"), capsys)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_a_run_with_other_heads_or_adapters_is_one_line(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(command(tmp_path / "run", "--option pretrain --head_layers 1"))
    flags = f"--checkpoint {tmp_path / 'run'} --head_layers 2"
    assert "--head_layers" in error_line(command(tmp_path / "other", flags, model=False), capsys)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", ["run", "empty", "file"])
def test_an_existing_out_is_refused_and_untouched(
    kind: str, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    if kind == "run":
        run(command(out, "--option pretrain"))
    elif kind == "empty":
        out.mkdir()
    else:
        out.write_text("mine")
    before = everything(tmp_path)
    line = error_line(command(out), capsys)
    assert f"--out {out}" in line and "exists" in line
    assert everything(tmp_path) == before


def test_a_real_process_ends_with_status_2_and_one_line(command: Command, tmp_path: Path) -> None:
    process = start_process(command(tmp_path / "run", "--warmup 7"))
    shown, errors = process.communicate()
    assert (process.returncode, shown) == (2, "")
    assert errors == "error: --warmup 7.0: expected a number from 0 to below 1\n"
