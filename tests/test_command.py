"""The command, from flags to a full run directory, on a tiny model and tiny files; stopped, killed and resumed."""

import functools
import json
import os
import pkgutil
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

import engine
import multitask_classifier
import run as running
import token_cache
from config import TABLES, Config, parse
from helpers import ROOT, THREE, Capture, Patch, Terminal, cases, forked, run_forked, write_data
from parameters import flags_of, parameters_type
from reports.report import main as report_main
from run_record import CHECKSUMS, settings_checksum, write_checksums
from tasks import TASKS

ErrorLine = Callable[..., str]


def rows(name: str) -> list[list[str]]:
    """A table of cases."""
    return [[part.strip() for part in line.split("|")] for line in cases(name)]


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def run(arguments: Sequence[str]) -> None:
    before = handlers()
    assert multitask_classifier.main(arguments) == 0
    assert handlers() == before, "the signals were not given back"


class Runs:
    """Short runs by the command on a tiny model and tiny files."""

    def __init__(self, tiny: Path, data: Path, factory: pytest.TempPathFactory) -> None:
        self.tiny, self.data, self.factory = tiny, data, factory
        self.made: dict[str, Path] = {}

    def arguments(self, out: Path, flags: str = "") -> list[str]:
        """Of a short run into a directory, with more flags or others."""
        given = flags.split()
        base = {"--data": str(self.data), "--device": "cpu", "--cache": "off", "--out": str(out)}
        if "--checkpoint" not in given:
            base["--model"] = str(self.tiny)
        if "test" not in given:
            base |= {"--steps_per_epoch": "3", "--batch_size": "4"}
            base |= {} if {"pretrain", "individual_pretrain"} & set(given) else {"--epochs": "2"}
            base |= {} if "--checkpoint" in given else {"--pretrain_epochs": "2"}
        line = [part for name, value in base.items() if name not in given for part in (name, value)]
        return [*line, *given, *([] if "--tensorboard" in given else ["--no-tensorboard"])]

    def run(self, out: Path, flags: str = "") -> Path:
        run(self.arguments(out, flags))
        return out

    def whole(self, flags: str = "") -> Path:
        """The run under some flags, made once. Not to be changed."""
        if flags not in self.made:
            self.made[flags] = self.run(self.factory.mktemp("whole") / "run", flags)
        return self.made[flags]

    def signalled(
        self, arguments: Sequence[str], point: str, number: int, what: int, times: int = 1
    ) -> tuple[int, str]:
        """Runs the command in a process until it signals itself; returns exit status and output."""
        log = self.factory.mktemp("signalled") / "log"
        process = forked(log, main_with_signal, list(arguments), point, number, what, times)
        process.join(300)
        assert process.exitcode is not None, "the process hangs"
        return process.exitcode, log.read_text()

    def kill(self, out: Path, flags: str, point: str, number: int) -> None:
        assert self.signalled(self.arguments(out, flags), point, number, signal.SIGKILL)[0] == -signal.SIGKILL
        assert not (out / "results.json").exists()


DRAW_PLOTS = running.Run.draw_plots


@pytest.fixture(scope="module")
def runs(tiny: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny, data, tmp_path_factory)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def error_line(capsys: Capture) -> Callable[..., str]:
    """The one line of a command that fails."""

    def error_line(arguments: Sequence[str], expected: int = 2) -> str:
        capsys.readouterr()
        before = handlers()
        status = multitask_classifier.main(arguments)
        shown = capsys.readouterr()
        lines = shown.err.splitlines()
        assert status == expected and len(lines) == 1 and lines[0].startswith("error: "), (status, shown)
        assert "Traceback" not in shown.out + shown.err and handlers() == before
        return lines[0].removeprefix("error: ")

    return error_line


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


def predictions(out: Path, task: str = "sts", split: str = "dev") -> bytes:
    return (out / "predictions" / f"{task}-{split}-output.csv").read_bytes()


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def everything(folder: Path) -> dict[str, bytes]:
    """The content of all files, but for the lock."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_run_leaves_everything_in_its_directory(runs: Runs, out: Path, capsys: Capture) -> None:
    runs.run(out, "--pcgrad --scheduler pal --tensorboard")
    shown = capsys.readouterr()
    names = "config.json metrics.jsonl results.json best last predictions tensorboard"
    assert {path.name for path in out.iterdir()} - {".lock"} == set(names.split())
    for folder in ("best", "last"):
        assert {"model.safetensors", "config.json", "vocab.txt"} <= {path.name for path in (out / folder).iterdir()}
    assert steps(out) == both()
    results = read(out / "results.json")
    assert set(results) >= {"dev", "best_epoch", "parameters", "seconds", "peak_memory_mb", "confusion", "gradients"}
    assert list(results["dev"]) == ["sst", "para", "sts", "mean"]
    main_metrics = (("sst", "accuracy"), ("para", "accuracy"), ("sts", "pearson"))
    assert results["dev"]["mean"] == pytest.approx(np.mean([results["dev"][t][m] for t, m in main_metrics]))
    counts = results["parameters"]
    assert set(counts) == {"total", "shared", "per_task", "separate_models"}
    assert counts["separate_models"] == counts["total"] + 2 * counts["shared"]
    assert results["best_epoch"] in (1, 2) and results["peak_memory_mb"] > 10
    assert [sum(map(sum, results["confusion"][task])) for task in ("sst", "para")] == [8, 8]
    guessed = [task for task in ("sst", "para") if sum(map(any, zip(*results["confusion"][task], strict=True))) == 1]
    told = re.findall(r"^warning: (\w+): one class predicted throughout", shown.out, flags=re.MULTILINE)
    assert guessed == told != []
    config = read(out / "config.json")
    assert config["treatment"] == "pcgrad" and config["draws_per_step"] == 4
    assert config["lr"] == running.default_learning_rate(32)  # no value is left to be chosen
    assert config["threads"] > 0 and config["max_length"] == 64
    assert config["versions"].keys() >= {"torch", "torchjd"} and config["processor"] and config["gpu"] is None
    labels = read(out / "best" / "config.json")["multitask_bert"]["tasks"]
    assert labels["para"]["id2label"] == {"0": "no", "1": "yes"} and "id2label" not in labels["sts"]
    assert config["versions"]["torch"] == torch.__version__ and "commit" in config
    assert config["data_files"]["quora-train.csv"]["rows"] == 26
    assert len(config["data_files"]["quora-train.csv"]["sha256"]) == 64
    (events,) = (out / "tensorboard").iterdir()
    assert events.stat().st_size > 1000
    check_shown(shown.out, shown.err, str(out))
    check_predictions(out)


def check_shown(out: str, err: str, directory: str) -> None:
    """Quiet and line-based: no bar, no control characters; what was used, a line an evaluation, a table."""
    assert err == "" and "\r" not in out and "\x1b" not in out and "%|" not in out
    for word in ("model", "parameters", "data", "pretrain", "finetune", "methods", "run", "pcgrad", "separate models"):
        assert word in out
    assert "(best of pretrain)" in out and "(best of finetune)" in out and "  constant" in out
    start_block = out.partition("\n\n")[0].splitlines()
    assert all(len(line) < 100 for line in start_block if directory not in line)
    assert "26 train" in out and "epochs of 3 steps of 4 rows, 4 draws" in out
    assert len([line for line in out.splitlines() if ": dev " in line]) == 4
    assert "dev rows" in out and directory in out


def check_predictions(out: Path) -> None:
    """(What stands in a row: test_evaluation.py.)"""
    titles = {"sst": "Predicted_Sentiment", "para": "Predicted_Is_Paraphrase", "sts": "Predicted_Similiary"}
    assert len(list((out / "predictions").iterdir())) == 9
    for task, title in titles.items():
        for split, num_rows in (("dev", 8), ("test", 6)):
            header, *rows = predictions(out, task, split).decode().splitlines()
            assert header == f"id \t {title} "
            assert [row.split(" , ")[0] for row in rows] == [f"{task}{split}{i}" for i in range(num_rows)]


def test_a_run_says_and_records_what_it_lacks(runs: Runs, tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """Compiled code, and pictures: neither costs the run."""
    problem = "no C compiler: gcc was not found"
    monkeypatch.setattr(running.Run, "draw_plots", DRAW_PLOTS)
    for name in ("reports", "reports.plots"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it was not there
    for report in ("compiled", problem):
        monkeypatch.setattr(running, "speed_report", lambda device, report=report: report)
        out = runs.run(tmp_path / str(report == problem), "--option pretrain --tasks sst --pretrain_epochs 1")
        shown = capsys.readouterr().out
        words = " ".join(shown.split())  # a long line of the start is broken
        assert ("slower than it could be" in words) == (f": {problem}" in words) == (report == problem)
        assert read(out / "config.json")["compiled"] == report
        assert "warning: no plots: " in shown


def test_the_program_rounds_numbers_that_are_not_normal_to_zero() -> None:
    """In all threads."""
    script = f"""
import runpy, sys, torch
torch.set_num_threads(2)
sys.argv = ["multitask_classifier.py", "--help"]
try:
    runpy.run_path({str(ROOT / "multitask_classifier.py")!r}, run_name="__main__")
except SystemExit:
    pass
print(bool((torch.full((100_000,), 1e-38) * 0.5).any()))
"""
    assert run_forked(script).splitlines()[-1] == "False"


@pytest.mark.parametrize(
    "flags",
    [
        "--option pretrain",
        "--option individual_pretrain --head mlp --mlp_layers 2",
        "--option pretrain --pooling mean --pairs siamese",
        "--option pretrain --pooling cls --pairs siamese --head mlp",
        "--option pretrain --head lstm sst=linear para=routing",
    ],
)
def test_pretraining_moves_heads_only_and_leaves_a_best_checkpoint(flags: str, runs: Runs, out: Path) -> None:
    before, after = load_file(runs.tiny / "model.safetensors"), weights(runs.run(out, flags), "best")
    assert {name for name in after if not name.startswith("heads.")} == set(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    stages = ["pretrain"] if "--option pretrain" in flags else [f"pretrain_{task}" for task in THREE]
    assert steps(out) == [(stage, step) for stage in stages for step in range(1, 7)]
    dev = [json.loads(line).get("dev") for line in (out / "metrics.jsonl").read_text().splitlines()]
    results = read(out / "results.json")
    if len(stages) > 1:
        assert set(results["best_epoch"]) == set(stages)
    else:  # the saved head scores on the encoder's output what it scored on standardized features
        assert results["dev"]["mean"] == pytest.approx(max(of["mean"] for of in dev if of), abs=1e-6)


Evaluations = dict[tuple[str, int], dict[str, Tensor]]


@pytest.fixture
def made_up(monkeypatch: Patch) -> Callable[..., Evaluations]:
    """Evaluations with made-up scores; gives the parameters at each, by the tasks that are evaluated and its number."""

    def install(score: Callable[[str, int], float]) -> Evaluations:
        kept: Evaluations = {}

        def evaluate(model: Any, dev_rows: dict[str, Any], *_: Any) -> Any:
            tasks = "+".join(dev_rows)
            epoch = 1 + sum(key[0] == tasks for key in kept)
            state = getattr(model, "model", model).state_dict()
            kept[tasks, epoch] = {name: value.clone() for name, value in state.items()}
            return {task: {TASKS[task].output.selection_metric: score(tasks, epoch)} for task in dev_rows}

        monkeypatch.setattr(engine, "evaluate", evaluate)
        return kept

    return install


def test_each_head_keeps_the_epoch_that_was_best_for_its_task(
    runs: Runs, out: Path, made_up: Any, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(running, "absorb_scale", lambda *given: None)  # of the features
    best = {"sst": 1, "para": 2, "sts": 3}
    kept = made_up(lambda task, epoch: 0.9 if epoch == best[task] else 0.1)
    after = weights(runs.run(out, "--option individual_pretrain --pretrain_epochs 3 --head mlp"), "best")
    for task in THREE:
        names = [name for name in after if name.startswith(f"heads.{task}.")]
        assert len(names) == 4
        for epoch in (1, 2, 3):
            assert all(torch.equal(kept[task, epoch][n], after[n]) for n in names) == (epoch == best[task])
    assert read(out / "results.json")["best_epoch"] == {f"pretrain_{task}": epoch for task, epoch in best.items()}


def test_the_best_checkpoint_is_the_best_epochs_and_a_test_of_it_gives_what_the_run_gave(
    runs: Runs, out: Path, tmp_path: Path, made_up: Any, capsys: Capture
) -> None:
    kept = made_up(lambda tasks, epoch: {1: 0.3, 2: 0.8, 3: 0.8, 4: 0.5}[epoch])
    runs.run(out, "--pretrain_epochs 0 --epochs 4 --lr 1e-3 --warmup 0 --pal")
    assert read(out / "results.json")["best_epoch"] == 2
    names = {"heads.sts.output.weight": "heads.sts.output.weight", "bert.pooler.dense.weight": "encoder.pooler.weight"}
    data = write_data(tmp_path / "data")
    for path in data.glob("*-train.csv"):  # which a test does not need
        path.unlink()
    for checkpoint, epoch in ((out, 2), (out / "best", 2), (out / "last", 4)):
        found = weights(checkpoint, "best" if checkpoint == out else ".")
        assert all(torch.equal(found[name], kept["sst+para+sts", epoch][ours]) for name, ours in names.items())
        flags = f"--option test --checkpoint {checkpoint} --eval_batch_size 3 --data {data}"
        tested = runs.run(tmp_path / f"of_{checkpoint.name}", flags)
        end = capsys.readouterr().out.splitlines()[-1]
        assert re.fullmatch(rf"peak memory \d+ MB; results and predictions are in {tested}", end)
        check_predictions(tested)
        for split in ("dev", "test"):
            assert (predictions(tested, split=split) == predictions(out, split=split)) == (epoch == 2)
        first, second = (read(folder / "results.json")["dev"] for folder in (out, tested))
        assert epoch != 2 or all(second[task] == pytest.approx(first[task], abs=1e-6) for task in THREE)


class EveryMove(tqdm):
    """A bar that is drawn at each of its moves."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, mininterval=0, miniters=1)


def test_a_terminal_sees_a_bar_of_rows_while_features_and_predictions_are_made(
    runs: Runs, out: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr("console.tqdm", EveryMove)
    of_features = [f"features of the frozen encoder, sst: 0 to {rows} of {rows}" for rows in (26, 8)]
    for flags, expected in (
        ("--option pretrain --tasks sst --pretrain_epochs 1", [*of_features, "predictions: 0 to 14 of 14"]),
        (f"--option test --checkpoint {out}", ["predictions: 0 to 14 of 14"]),
    ):
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        runs.run(out if "pretrain" in flags else out.with_name("test"), f"{flags} --eval_batch_size 3")
        bars, drawn = list[str](), r"([a-z ,]+): +\d+%\S* *\S*\| (\d+)/(\d+) \[[^]]*row/s"
        for title, done, total in re.findall(drawn, terminal.getvalue()):
            bars += [f"{title}: 0 to"] if done == "0" else []
            bars[-1] = f"{title}: 0 to {done} of {total}"
        assert sorted(bars) == sorted(expected)
        assert not re.search(r"\d+row \[", terminal.getvalue())  # of a bar that has moved beyond its end


NEW_HEADS = "--option pretrain --pretrain_epochs 1 --steps_per_epoch 1 --pretrain_lr 1e-9"


@pytest.mark.parametrize("kind", [NEW_HEADS, "--epochs 1 --steps_per_epoch 1 --warmup 0 --scheduler round_robin"])
def test_new_heads_and_training_follow_from_the_seed(kind: str, runs: Runs, tmp_path: Path) -> None:
    """The first checkpoint has no heads; in the second nothing is new, and rows and dropout are all that differs."""
    flags = f"{kind} --checkpoint {runs.tiny if kind == NEW_HEADS else runs.whole()}"
    found = [predictions(runs.run(tmp_path / str(i), f"{flags} --seed {seed}")) for i, seed in enumerate((1, 1, 2))]
    assert found[0] == found[1] != found[2]


def test_the_model_of_a_run_that_begins_with_a_checkpoint_is_that_of_the_checkpoints_run(
    runs: Runs, tmp_path: Path
) -> None:
    """Of a folder that belongs to no run it is not known, and a new head reads its pooler as of any new model."""
    flags = "--epochs 1 --steps_per_epoch 1"
    first = runs.run(tmp_path / "first", f"{flags} --checkpoint {runs.whole()}")
    begun = read(first / "config.json")
    assert begun["pretrain_epochs"] == 0 and "pretrain_epochs" in begun["automatic"], "there is no frozen stage"
    soup = "--option soup --checkpoints {0} {0}/last --data {1} --out {2} --no-tensorboard --cache off --device cpu"
    run(soup.format(first, runs.data, tmp_path / "soup").split())
    assert [read(of / "config.json")["model"] for of in (first, tmp_path / "soup")] == [str(runs.tiny)] * 2
    plain = read(runs.run(tmp_path / "plain", f"{flags} --checkpoint {runs.tiny}") / "config.json")
    assert (plain["model"], plain["pooling"]) == ("", "pooler")


def test_late_adapters_train_alone_on_a_plain_fine_tuned_checkpoint(runs: Runs, out: Path) -> None:
    plain = runs.whole("--head mlp")
    flags = "--pal --train pal --lr 1e-2 --warmup 0 --draws_per_step 3 --scheduler round_robin"
    before, after = weights(plain, "best"), weights(runs.run(out, f"--checkpoint {plain} {flags}"))
    assert all(torch.equal(after[name], value) for name, value in before.items())
    new = after.keys() - before.keys()
    ups = [after[name] for name in new if ".up." in name]
    assert all(name.startswith("adapters.") for name in new)
    assert len(ups) == 6 and all(bool(value.any()) for value in ups)


def test_tasks_without_files_are_left_out_and_named(runs: Runs, out: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = write_data(tmp_path / "data")
    for path in folder.glob("quora-*"):
        path.unlink()
    results = read(runs.run(out, f"--data {folder} --option pretrain") / "results.json")
    assert set(results["dev"]) == {"sst", "sts", "mean"}
    assert "(no files of para" in capsys.readouterr().out


def test_what_is_odd_about_the_data_is_told(runs: Runs, out: Path, tmp_path: Path, capsys: Capture) -> None:
    """No test file, a row without a label, and dev rows that stand in the training file."""
    folder = write_data(tmp_path / "data")
    (folder / "quora-test-student.csv").unlink()
    path = folder / "quora-train.csv"
    lines = path.read_text().splitlines()
    lines[4] = lines[4].rsplit("\t", 1)[0] + "\t"
    path.write_text("\n".join(lines) + "\n")
    train, dev = ((folder / f"sts-{split}.csv") for split in ("train", "dev"))
    rows = [train.read_text().splitlines()[number].split("\t") for number in (1, 2, 1)]
    swapped = ["\t".join([*row[:2], row[3].upper(), row[2], "0"]) for row in rows]
    dev.write_text(dev.read_text() + "\n".join(swapped) + "\n")
    runs.run(out, f"--data {folder} --option pretrain")
    shown = " ".join(capsys.readouterr().out.split())
    assert not (out / "predictions" / "para-test-output.csv").exists() and "no test file of para" in shown
    assert f"skipped 1 row without a label: {path}:5" in " ".join(shown.split())
    files = read(out / "config.json")["data_files"]
    assert files["quora-train.csv"] | {"sha256": ""} == {"rows": 25, "skipped": [5], "sha256": ""}
    shown = " ".join(shown.split())  # a long line of the start is broken
    assert "warning: 3 of 11 dev rows of sts stand in its training file too" in shown
    assert shown.count("training file too") == 1


BESIDE = ["", "--pcgrad", "--gradvac --batch_size 8 --seed 7", "--model minilm --threads 1", "--lr 0.1 --max_length 9"]


@pytest.mark.parametrize("beside", BESIDE)
def test_another_run_takes_the_settings_of_a_run(beside: str, runs: Runs) -> None:
    """As if the flags beside stood behind that run's command line, also in all that is chosen automatically."""

    def resolved(arguments: Sequence[str]) -> dict[str, Any]:
        return {**running.resolve(parse([*arguments, *beside.split()]))[0].to_dict(), "config": "", "out": ""}

    path = runs.whole() / "config.json"
    found = resolved(["--config", str(path)])
    assert found == resolved(runs.arguments(Path("new")))
    if not beside:
        assert found == {**{name: read(path)[name] for name in found}, "out": ""}


def test_the_second_run_reads_no_csv_file_and_is_the_same(runs: Runs, tmp_path: Path, monkeypatch: Patch) -> None:
    first, second = (tmp_path / "runs" / name for name in ("first", "second"))
    for out in (first, second):
        arguments = runs.arguments(out)
        place = arguments.index("--cache")
        run(arguments[:place] + arguments[place + 2 :])
        assert len(list((tmp_path / "runs" / ".cache").iterdir())) == 9
        monkeypatch.setattr(token_cache, "parse_examples", lambda *_: pytest.fail("a csv file was read"))
    assert differing(weights(first), weights(second)) == set()
    for name in ("results.json", "config.json"):
        values = [read(out / name) for out in (first, second)]
        assert (
            len({json.dumps({**of, "out": 0, "checksum": 0, "seconds": 0, "peak_memory_mb": 0}) for of in values}) == 1
        )
    for path in (first / "predictions").iterdir():
        assert path.read_bytes() == (second / "predictions" / path.name).read_bytes()


def test_the_best_checkpoint_is_that_of_the_average_and_the_last_that_of_the_raw_weights(
    runs: Runs, out: Path, made_up: Any
) -> None:
    kept = made_up(lambda tasks, epoch: {1: 0.3, 2: 0.8, 3: 0.5}[epoch])
    flags = "--pretrain_epochs 0 --epochs 3 --lr 1e-3 --pal"
    runs.run(out, f"{flags} --average ema --ema_decay 0.9")
    best = weights(out, "best")
    assert torch.equal(best["heads.sts.output.weight"], kept["sst+para+sts", 2]["heads.sts.output.weight"])
    assert torch.equal(best["bert.pooler.dense.weight"], kept["sst+para+sts", 2]["encoder.pooler.weight"])
    kept.clear()
    without = runs.run(out.with_name("without"), flags)
    assert differing(weights(out), weights(without)) == set()
    assert "bert.pooler.dense.weight" in differing(best, weights(without, "best"))


BASE = "--pretrain_epochs 0 --epochs 1 --scheduler round_robin --draws_per_step 4 --lr 1e-3 --batch_size 8"
CASES = [(context, flag) for context, *flags in rows("flags.txt") for flag in flags]
KEEPS = ["--eval_every 0", "--save_every 1", "--eval_batch_size 3", "--tensorboard", "--threads 1"]
# Where, not how.
NOT_TRIED = (
    "option model data out resume checkpoint checkpoints soup task input output names cache device cuda_graphs wordnet "
    "name format task_file config log max_loss vocabulary"
)


def outcome(run: Path) -> dict[str, Tensor]:
    return {f"{part} {name}": value for part in ("last", "best") for name, value in weights(run, part).items()}


@pytest.mark.usefixtures("small_wordnet")
@pytest.mark.parametrize(("context", "flag"), CASES)
def test_every_flag_changes_the_run(context: str, flag: str, runs: Runs, out: Path) -> None:
    without = outcome(runs.whole(f"{BASE} {context}".strip()))
    with_flag = outcome(runs.run(out, f"{BASE} {context} {flag}"))
    common = [name for name in without if name in with_flag and with_flag[name].shape == without[name].shape]
    assert any(not torch.equal(without[name], with_flag[name]) for name in common)


@pytest.mark.parametrize("flag", KEEPS)
def test_what_is_no_matter_of_training_changes_nothing(flag: str, runs: Runs, out: Path) -> None:
    assert differing(outcome(runs.whole(BASE)), outcome(runs.run(out, f"{BASE} {flag}"))) == set()


def test_every_flag_is_tried() -> None:
    entries = [(name, entry) for of, _ in TABLES.values() for name, entry in of.items()]
    flags = {name for name, _ in flags_of(Config)}
    flags |= {flag.name for name, entry in entries for _, flag in flags_of(parameters_type(entry), f"{name}_")}
    tried = {line.split()[0].removeprefix("--") for line in (*(flag for _, flag in CASES), *KEEPS)}
    assert flags - tried == set(NOT_TRIED.split())


def test_the_default_learning_rate_follows_the_width() -> None:
    rates = [running.default_learning_rate(width) for width in (384, 768, 1024)]
    assert rates == pytest.approx([8e-5, 2.8e-5, 1.8e-5])


def test_fewer_tasks_make_a_smaller_run_and_a_test_of_it_is_of_those(runs: Runs, out: Path, tmp_path: Path) -> None:
    results = read(runs.run(out, "--tasks sts") / "results.json")
    tested = read(runs.run(tmp_path / "test", f"--option test --checkpoint {out}") / "results.json")
    assert tested["dev"]["sts"] == pytest.approx(results["dev"]["sts"]) and set(tested["dev"]) == {"sts", "mean"}
    assert set(results["dev"]) == {"sts", "mean"}
    assert results["parameters"]["total"] == results["parameters"]["separate_models"]
    names = {"sts-dev-output.csv", "sts-dev-rows.csv", "sts-test-output.csv"}
    assert {path.name for path in (out / "predictions").iterdir()} == names
    written = [line.split("\t") for line in (runs.data / "sts-dev.csv").read_text().splitlines()[1:]]
    dev_rows = [line.split(",") for line in (out / "predictions" / "sts-dev-rows.csv").read_text().splitlines()[1:]]
    assert [[row[0], float(row[1]), *row[3:]] for row in dev_rows] == [[r[1], float(r[4]), *r[2:4]] for r in written]


# Where a process can be made to send itself a signal: before the n-th call of that function.
POINTS = {
    "step": "engine:Trainer._launch",
    "log": "run_record:MetricsLog.write",
    "rename": "os:rename",
    "write": "os:replace",
    "evaluation": "evaluation:predict_logits",
    "features": "run:compute_features",
    "picture": "reports.plots:Plot.content",
}


def main_with_signal(arguments: Sequence[str], point: str, number: int, what: int, times: int = 1) -> int:
    """Runs in a process of its own: the command, which signals itself before call `number` of a point, from 1."""
    owner, _, name = POINTS[point].replace(":", ".", 1).rpartition(".")
    place = pkgutil.resolve_name(owner)
    original = getattr(place, name)
    calls = 0

    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        for _ in range(times if calls == number else 0):
            os.kill(os.getpid(), what)
        return original(*args, **kwargs)

    setattr(place, name, counted)
    return multitask_classifier.main(arguments)


METHODS = {
    "plain": "",
    "pcgrad": "--pcgrad --scheduler pal",
    "gradvac": "--gradvac --scheduler random --granularity layer --pal --warmup 0",
    "ema": "--average ema --pal --ema_decay 0.6",
    "bregman": "--bregman --copy_top_layers 1 --accumulation_steps 2 --scheduler round_robin",
    "siamese": "--pairs siamese --pooling mean --mlm_epochs 1 --bregman --pal --drop_longest 0.1",
    "smart": "--smart --gradvac --gradvac_beta 0.5 --bregman --amp bf16",
    "PCD": "--treatment PCD --granularity layer",
    "lstm": "--head lstm sst=routing --lstm_size 5 --routing_capsules 3 --pcgrad --rdrop --pal",
    "routing": "--head routing --routing_capsules 3 --copy_top_layers 1 --smart --bregman --average ema",
    "UW": "--treatment UW --treatment_arguments lr=0.1 --gradient_scale own",
}


def assert_same_run(found: Path, expected: Path) -> None:
    """Bit-identical parameters and trainer state, the same scores and log."""
    for folder in ("best", "last"):
        assert differing(weights(found, folder), weights(expected, folder)) == set()
    tensors = [load_file(out / "last" / "trainer.safetensors") for out in (found, expected)]
    assert differing(*tensors) == set()
    assert steps(found) == steps(expected)
    numbers = ("stage", "epoch", "step", "loss", "mean_loss", "lr", "gradient_norm", "dev", "cosines", "draws")
    logs = [[{k: r.get(k) for k in numbers} for r in records(out)] for out in (found, expected)]
    assert logs[0] == logs[1]
    results = [read(out / "results.json") for out in (found, expected)]
    assert results[0]["seconds"].keys() == results[1]["seconds"].keys()
    first, second = ({k: v for k, v in of.items() if k not in ("seconds", "peak_memory_mb")} for of in results)
    assert first == second
    for task in THREE:
        assert predictions(found, task, "test") == predictions(expected, task, "test")


@pytest.mark.parametrize(("method", "save_every", "point", "number"), rows("killed.txt"))
def test_a_killed_and_resumed_run_equals_the_uninterrupted_run(
    method: str, save_every: str, point: str, number: str, runs: Runs, out: Path
) -> None:
    runs.kill(out, f"{METHODS[method]} --save_every {save_every}", point, int(number))
    run(["--resume", str(out)])
    assert_same_run(out, runs.whole(METHODS[method]))
    assert not list(out.glob("*.tmp")) + list(out.glob("*.new")) + list(out.glob("*.old"))


def test_a_stage_that_has_ended_is_not_begun_again(runs: Runs, out: Path, monkeypatch: Patch) -> None:
    whole = runs.whole()
    runs.kill(out, "", "step", 7)  # in fine-tuning
    monkeypatch.setattr(running, "compute_features", lambda *_: pytest.fail("features were computed"))
    run(["--resume", str(out)])
    assert_same_run(out, whole)


@pytest.mark.parametrize(
    ("flags", "number"),
    [
        ("--option individual_pretrain --head mlp --patience 1 --save_every 2", 9),
        ("--checkpoint {plain} --pal --train pal --smart --save_every 2", 4),
        ("--mlm_epochs 2 --save_every 2", 6),
    ],
)
def test_other_kinds_of_runs_resume_too(flags: str, number: int, runs: Runs, out: Path) -> None:
    flags = flags.format(plain=runs.whole())
    runs.kill(out, flags, "step", number)
    run(["--resume", str(out)])
    assert_same_run(out, runs.whole(flags))


def test_a_run_of_before_some_flags_goes_on_as_it_began(runs: Runs, out: Path, monkeypatch: Patch) -> None:
    """Whatever the defaults are by then, also where it was killed before its first checkpoint."""
    flags = "--weight_decay 0.2 --pretrain_weight_decay 0.2"
    whole = runs.whole(flags)
    monkeypatch.setattr(running, "default_pooling", lambda _: "mean")
    for number in (1, 8):
        runs.kill(out, f"{flags} --save_every 2", "step", number)
        assert (out / "last").exists() == (number == 8)
        for path in (out / "config.json", *out.glob("*/config.json")):
            values = read(path)
            for part in (values, values.get("layout", {}), values.get("multitask_bert", {})):
                for name in ("pooling", "pairs", "pretrain_weight_decay"):
                    part.pop(name, None)
            path.write_text(
                json.dumps(values | ({"checksum": settings_checksum(values)} if path.parent == out else {}))
            )
            if path.parent != out:
                write_checksums(path.parent)
        run(["--resume", str(out)])
        assert_same_run(out, whole)
        shutil.rmtree(out)


@pytest.mark.parametrize(("method", "point", "number", "what", "stage", "step"), rows("stopped.txt"))
def test_a_stop_writes_the_last_finished_step_and_the_resumed_run_equals_the_uninterrupted_run(
    method: str, point: str, number: str, what: str, stage: str, step: str, runs: Runs, tmp_path: Path
) -> None:
    out, sent, finished = tmp_path / "a run's", signal.Signals[what], (stage, int(step))
    status, shown = runs.signalled(runs.arguments(out, METHODS[method]), point, int(number), sent)
    assert status == 128 + sent and "Traceback" not in shown
    told, _, again = shown.splitlines()[-1].partition(": ")
    assert told == "stopped; to go on"
    assert shlex.split(again) == ["python", "multitask_classifier.py", f"--resume={out}"]
    state = read(out / "last" / "trainer.json")
    assert (["pretrain", "finetune"][state["stage"]], state["progress"]["step"]) == finished
    assert steps(out)[-1:] == ([finished] if finished[1] else [])
    run(shlex.split(again)[2:])
    assert_same_run(out, runs.whole(METHODS[method]))


@pytest.mark.parametrize(
    ("second", "after", "at_once"),
    [(signal.SIGINT, 0.1, True), (signal.SIGTERM, 0.1, False), (signal.SIGTERM, 2.0, True)],
)
def test_a_second_signal_stops_at_once_but_for_one_of_a_pair(
    second: signal.Signals, after: float, at_once: bool, monkeypatch: Patch
) -> None:
    times, exits = iter([5.0, 5.0 + after]), list[int]()
    monkeypatch.setattr("run.time.monotonic", lambda: next(times))
    monkeypatch.setattr("run.os._exit", exits.append)  # nothing else runs then, in whatever code the signal came
    stop = running.StopSignals()
    try:
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), second)
    finally:
        stop.restore()
    assert exits == [128 + second] * at_once and stop.status == 128 + signal.SIGTERM
    with pytest.raises(running.Stopped):
        stop.check()


def test_a_second_ctrl_c_while_plots_are_drawn_stops_at_once_and_the_run_ends_when_it_goes_on(
    runs: Runs, out: Path
) -> None:
    arguments = runs.arguments(out, "--option pretrain --tasks sst --pretrain_epochs 1")
    status, shown = runs.signalled(arguments, "picture", 1, signal.SIGINT, times=2)
    assert status == 128 + signal.SIGINT and shown.endswith(
        "\nstopping after this step; a second time stops at once, without saving\n"
        f"stopped at once; to go on from the last checkpoint: python multitask_classifier.py --resume={out}\n"
    )
    assert not (out / "results.json").exists()
    run(["--resume", str(out)])
    assert (out / "results.json").exists()


def test_changed_data_is_refused_on_resume(runs: Runs, out: Path, tmp_path: Path, error_line: ErrorLine) -> None:
    folder = write_data(tmp_path / "data")
    runs.kill(out, f"--data {folder}", "step", 4)
    path = folder / "sts-dev.csv"
    path.write_text(path.read_text().replace("film", "song", 1))
    before = everything(out)
    line = error_line(["--resume", str(out)])
    assert "sts-dev.csv" in line and "changed" in line
    assert everything(out) == before


def test_data_that_was_moved_is_named_on_resume(runs: Runs, out: Path, tmp_path: Path, error_line: ErrorLine) -> None:
    folder = write_data(tmp_path / "data")
    runs.kill(out, f"--data {folder}", "step", 4)
    folder.rename(tmp_path / "moved")
    line = error_line(["--resume", str(out)])
    assert line.startswith(f"--resume {out}: {folder}: no such directory, expected the run's data where it began")
    folder.symlink_to(tmp_path / "moved")
    run(["--resume", str(out)])
    assert (out / "results.json").exists()


def test_what_is_no_run_to_go_on_with_is_not_resumed_nor_an_existing_one_replaced(
    runs: Runs, out: Path, error_line: ErrorLine
) -> None:
    before = everything(runs.run(out, "--option pretrain"))
    for path in (out, out / "best", f"{out}/last/"):
        line = error_line(["--resume", str(path)])
        assert "has ended" in line and line.endswith(f"start a new run with --checkpoint={out}")
    assert "no run directory" in error_line(["--resume", str(out / "none")])
    assert f"or start a new run from its model: --checkpoint={out}" in error_line(["--resume", str(out), "--epochs=8"])
    assert error_line(runs.arguments(out)).endswith(
        f"--out {out}: exists already, expected a new or an empty directory"
    )
    assert everything(out) == before
    shutil.rmtree(out / "best")
    assert error_line(["--resume", str(out), "--epochs=8"]).endswith("takes it from the run; leave it out")


def test_a_run_is_resumed_from_another_directory(runs: Runs, out: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """Flags may name model and data from where the run was started."""
    (tmp_path / "model").symlink_to(runs.tiny)
    (tmp_path / "data").symlink_to(runs.data)
    monkeypatch.chdir(tmp_path)
    arguments = runs.arguments(Path("run"), "--option pretrain --model model --data data")
    assert runs.signalled(arguments, "step", 5, signal.SIGTERM)[0] == 128 + signal.SIGTERM
    monkeypatch.chdir(tmp_path.parent)
    run(["--resume", str(out / "last")])
    assert steps(out) == both()[:6]


def as_before(folder: Path) -> Path:
    """Turns a run with a hidden layer in its heads and with adapters into one of the version before."""
    outputs = {task: of.output.num_outputs for task, of in ((name, TASKS[name]) for name in THREE)}
    adapters = {"kind": "attention", "size": 8, "num_heads": 2, "num_layers": 2}
    layout = {"format": 1, "tasks": outputs, "head_layers": 1, "adapters": adapters}
    for part in ("best", "last"):
        change_config(folder / part, multitask_bert=layout)
        (folder / part / CHECKSUMS).unlink()
    config = read(folder / "config.json")
    for name in ("head", "mlp_layers", "adapter", "regularizers", "temperature_tau"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps({**config, "head_layers": 1, "layout": layout}))
    forget_format(folder / "last" / "trainer.json")
    return folder


def forget_format(path: Path) -> None:
    path.write_text(json.dumps({name: value for name, value in read(path).items() if name != "format"}))


@pytest.fixture(scope="module")
def old_run(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the version before."""
    flags = "--head mlp --pal --pal_size 8 --pal_heads 2 --epochs 1 --steps_per_epoch 2 --pretrain_epochs 0"
    return as_before(runs.run(tmp_path_factory.mktemp("before") / "run", flags))


def test_a_run_of_the_version_before_is_tested_and_trained_on(runs: Runs, old_run: Path, tmp_path: Path) -> None:
    runs.run(tmp_path / "test", f"--option test --checkpoint {old_run}")
    assert read(tmp_path / "test" / "results.json")["dev"] == read(old_run / "results.json")["dev"]
    runs.run(tmp_path / "next", f"--checkpoint {old_run} --epochs 1")
    assert weights(tmp_path / "next").keys() == weights(old_run).keys()


def test_a_run_of_the_version_before_is_compared_with_one_of_today(
    old_run: Path, treated_run: Path, capsys: Capture
) -> None:
    assert report_main([str(old_run), str(treated_run)]) == 0
    assert "pcgrad" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["a run of before", "one before its first checkpoint", "a state without a format"])
def test_a_run_of_the_version_before_is_not_resumed(
    what: str, old_run: Path, treated_run: Path, out: Path, error_line: ErrorLine
) -> None:
    shutil.copytree(treated_run if what == "a state without a format" else old_run, out)
    (out / "results.json").unlink()
    if what == "one before its first checkpoint":
        shutil.rmtree(out / "last")
    elif what == "a state without a format":
        forget_format(out / "last" / "trainer.json")
    before = everything(out)
    line = error_line(["--resume", str(out)])
    assert "version of the program" in line and f"--checkpoint={out}" in line and everything(out) == before


@pytest.mark.parametrize("method", ["plain", "gradvac"])
def test_a_loss_that_is_not_finite_ends_the_run_with_its_last_good_checkpoint(
    method: str, runs: Runs, out: Path, monkeypatch: Patch, error_line: ErrorLine
) -> None:
    original = engine.Trainer._forward_backward

    def broken(trainer: engine.Trainer, *args: Any) -> Tensor:
        losses = original(trainer, *args)
        return losses * float("nan") if trainer.progress.step == 4 and trainer.stage.name == "finetune" else losses

    with monkeypatch.context() as patch:
        patch.setattr(engine.Trainer, "_forward_backward", broken)
        line = error_line(runs.arguments(out, METHODS[method]), 1)
    assert "finetune step 5" in line and " is nan" in line and "training rows" in line
    assert read(out / "last" / "trainer.json")["progress"]["step"] == 4
    run(["--resume", str(out)])  # what broke the run is gone
    assert_same_run(out, runs.whole(METHODS[method]))


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**read(path), **values}))


def write_bad_label(data: Path) -> None:
    path = data / "sts-dev.csv"
    path.write_text(path.read_text().rstrip("\n").rsplit("\t", 1)[0] + "\t6.2\n")


Change = Callable[[Path, Path], Any]  # of the folder of a model and of one with data
TRAINED = "--epochs 1 --pretrain_epochs 0 --head mlp --mlp_layers 2 --pal --pal_size 8"
BAD_INPUT: list[tuple[Change | None, str, Sequence[str]]] = [
    (lambda model, data: write_bad_label(data), "", ["sts-dev.csv:9", "'6.2'"]),
    (lambda model, data: (data / "quora-test-student.csv").write_text(""), "", ["test-student.csv", "empty"]),
    (lambda model, data: change_config(model, model_type="gpt2"), "", ["config.json", "'gpt2'"]),
    (lambda model, data: os.truncate(model / "model.safetensors", 999), "", ["model.safetensors"]),
    (lambda model, data: (model / "vocab.txt").unlink(), "", ["tokenizer"]),
    (None, "--scheduler fair", ["--scheduler", "fair", "round_robin"]),
    (None, "--seed 9223372036854775807 --data /nowhere", ["--data /nowhere", "no such directory"]),  # the largest seed
    (None, "--model /nowhere/at/all", ["--model /nowhere/at/all"]),
    (None, "--pal --pal_size 32", ["--pal_size 32", "31"]),
    (None, "--pal --pal_layers 3", ["--pal_layers 3", "2 layers"]),
    (None, "--copy_top_layers 3", ["--copy_top_layers 3", "2 layers"]),
    (None, "--device cuda", ["--device cuda"]),
    (None, "--max_length 65", ["--max_length 65", "64 positions"]),
    (None, "--checkpoint {trained} --head linear", ["is mlp {'layers': 2}", "ask for linear"]),
    (None, "--checkpoint {trained} --head mlp --mlp_layers 3", ["mlp {'layers': 2}", "mlp {'layers': 3}"]),
    (None, "--checkpoint {trained} --head sts=linear", ["head of sts is mlp", "linear"]),
    (None, "--checkpoint {trained} --pooling mean", ["its --pooling is pooler", "ask for mean"]),
    (None, "--option test --checkpoint {trained} --pairs siamese", ["its --pairs is cross", "ask for siamese"]),
    (None, "--option test --checkpoint {untrained}", ["has no head sst, head para, head sts, ", "its heads: no task"]),
    (None, "--checkpoint {trained} --pal --pal_size 4", ["adapters are pal", "'size': 8", "'size': 4"]),
    (None, "--checkpoint {trained} --pal --pal_kind low_rank", ["adapters are pal", "'attention'", "'low_rank'"]),
]


@pytest.mark.parametrize(("change", "flags", "words"), BAD_INPUT)
def test_bad_input_is_one_line_with_what_is_wrong_and_no_run(
    change: Change | None, flags: str, words: Sequence[str], runs: Runs, out: Path, tmp_path: Path,
    error_line: ErrorLine, monkeypatch: Patch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if change is not None:
        model, data = shutil.copytree(runs.tiny, tmp_path / "model"), write_data(tmp_path / "data")
        change(model, data)
        flags = f"--model {model} --data {data}"
    elif "{" in flags:
        flags = flags.format(trained=runs.whole(TRAINED), untrained=runs.tiny)
    line = error_line(runs.arguments(out, flags))
    assert all(word in line for word in words), line
    assert not out.exists()


def test_all_contradictions_are_told_at_once(runs: Runs, out: Path, capsys: Capture) -> None:
    status = multitask_classifier.main(runs.arguments(out, "--pal_size 8 --smart_eps 1e-4 --warmup 3"))
    lines = capsys.readouterr().err.splitlines()
    assert status == 2 and len(lines) == 3 and all(line.startswith("error: --") for line in lines)
    assert not out.exists()
