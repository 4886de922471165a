"""Damage of every kind to run directories, checkpoints, data: one line that says so, no traceback, nothing silent.

Of the wrong values, hundreds, a test takes some; all of them with the environment variable EVERY_FAULT set, in minutes.
"""

import errno
import itertools
import json
import os
import pkgutil
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import multitask_classifier
import run as running
from bert import CheckpointError
from config import Config
from datasets import Tokenizer
from engine import Trainer
from helpers import ROOT, Capture, Patch
from predictor import load
from reports import comparison, report
from run import Stopped
from run_record import CHECKSUMS, settings_checksum, write_checksums

Damage = Callable[[Path], None]


class Accepted(Exception):
    """The run would train now."""


def command(*arguments: object) -> int:
    return multitask_classifier.main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def stopped(tiny: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in its second epoch of fine-tuning."""
    out, original = tmp_path_factory.mktemp("stopped") / "run", Trainer._launch

    def launch(trainer: Trainer, epoch: int, step: int) -> Any:
        if (trainer.stage.name, step) == ("finetune", 3):
            raise Stopped
        return original(trainer, epoch, step)

    flags = "--epochs 3 --pretrain_epochs 1 --steps_per_epoch 2 --batch_size 4 --gradvac --average ema --no-tensorboard"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_launch", launch)
        base = ("--model", tiny, "--data", data, "--out", out, "--device", "cpu", "--cache", "off")
        assert command(*base, *flags.split()) == 130  # as by Ctrl-C
    state = json.loads((out / "last" / "trainer.json").read_text())
    assert (state["stage"], state["progress"]["step"]) == (1, 3) and (out / "best").is_dir()
    return out


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for place in range(0, len(content), max(1, len(content) // 64)):
        content[place] ^= 1
    path.write_bytes(content)


def replaced(make: Damage) -> Damage:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


DAMAGES: dict[str, Damage] = {
    "deleted": Path.unlink,
    "emptied": lambda path: os.truncate(path, 0),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "flipped": flip,
    "a folder": replaced(Path.mkdir),
    "a pipe": replaced(os.mkfifo),
    "a device": replaced(lambda path: path.symlink_to("/dev/zero")),
    "a link to itself": replaced(lambda path: path.symlink_to(path)),
    "text": lambda path: path.write_text("what is this\n") and None,
    "deep": lambda path: path.write_text("[" * 100_000) and None,
}


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


@contextmanager
def restored(path: Path) -> Iterator[None]:
    """Puts a file back as it was."""
    content = path.read_bytes()
    try:
        yield
    finally:
        remove(path)
        path.write_bytes(content)


def damaged(paths: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """(name, kind of damage) of each file with each kind, while it is damaged so."""
    for path in paths:
        for kind, damage in DAMAGES.items():
            with restored(path):
                damage(path)
                yield path.name, kind


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(place, value) of everything in a JSON value, and of the mappings and lists that hold it."""
    if place:
        yield place, value
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from leaves(part, (*place, key))


def wrong_values(value: Any) -> list[Any]:
    """No value, values of other types, and of its own those that are allowed nowhere, a few of each."""
    kinds = (int, float) if isinstance(value, float) else (type(value),)
    others = [x for x in (None, "what?", {"what": 1}, [5], True, 1.5) if type(x) not in kinds]
    ranges: dict[type, list[Any]] = {int: [-1, 2**70], float: [-1.0, float("nan")], str: ["what?"]}
    return [..., *others[1:2], *ranges.get(type(value), [])]


def some(cases: Iterable[Any]) -> Iterator[Any]:
    """Each seventh case, so that every kind of value and of damage is among them."""
    return itertools.islice(cases, 0, None, 1 if "EVERY_FAULT" in os.environ else 7)


def edited(path: Path, is_meant: Callable[[Any, Any], bool] = lambda place, wrong: True) -> Iterator[tuple[str, str]]:
    """(place, its wrong value) of a JSON file, or the first line of several, for some of those that are meant, while it
    is edited so."""
    first, end, rest = path.read_text(), "", ""
    if path.suffix == ".jsonl":
        first, end, rest = first.partition("\n")
    values = json.loads(first)
    wrongs = ((place, wrong) for place, value in leaves(values) for wrong in wrong_values(value))
    for place, wrong in some(of for of in wrongs if is_meant(*of)):
        with restored(path):
            path.write_text(json.dumps(changed(values, place, wrong)) + end + rest)
            yield ".".join(map(str, place)), "no value" if wrong is ... else str(wrong)


def changed(values: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value in that place; without it for `...`."""
    copy = json.loads(json.dumps(values))
    holder = copy
    for key in place[:-1]:
        holder = holder[key]
    if value is ...:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value
    return copy


def assert_none(failures: dict[Any, str]) -> None:
    assert "\n".join(f"{case}: {of}" for case, of in failures.items() if of) == ""


def problem(capsys: Capture, status: int, allowed: tuple[int, ...] = (1, 2)) -> str:
    """What is wrong with how a command has refused its input, or ""."""
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    is_one = len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 700 and lines[0].isprintable()
    return "" if status in allowed and is_one else f"status {status}: {shown.err[-300:]}"


@pytest.fixture
def resume(stopped: Path, capsys: Capture, monkeypatch: Patch) -> Callable[[], str]:
    """What is wrong with how the damaged run is refused, or ""."""

    def run(trainer: Trainer, *_: Any) -> None:
        raise Accepted

    monkeypatch.setattr(Trainer, "run", run)
    monkeypatch.setattr(running, "environment", lambda device: {})
    monkeypatch.setattr(multitask_classifier, "parse", lambda arguments: Config(resume=str(stopped)))

    def attempt() -> str:
        try:
            return problem(capsys, command())
        except Accepted:
            capsys.readouterr()
            return "accepted"
        except Exception as error:
            return f"traceback: {error!r}"

    return attempt


def test_a_run_with_a_damaged_file_is_not_resumed(stopped: Path, resume: Callable[[], str]) -> None:
    assert resume() == "accepted"
    files = [path for path in sorted(stopped.rglob("*")) if path.is_file() and path.name != ".lock"]
    assert len(files) == 2 + 4 + 6
    failures: dict[Any, str] = {(*case, i): resume() for i, case in enumerate(damaged(files))}
    with restored(config := stopped / "config.json"):
        config.write_text(config.read_text().replace('"seed": 0', '"seed": 1'))
        failures["another seed"] = resume()
    with restored(stopped / "metrics.jsonl"):
        for folder in ("best", "last"):
            shutil.move(stopped / folder, stopped / "aside")
            failures[folder] = resume()
            shutil.move(stopped / "aside", stopped / folder)
    assert failures.pop("last") == "accepted"  # as of a run that was killed early; it says so
    assert_none(failures)
    assert resume() == "accepted"


# Entries of config.json that only tell what was, and texts that can be anything.
RECORDS = {"versions", "machine", "processor", "gpu", "commit", "compiled", "stages", "layout", "automatic"}
SUMS = {"conflicts", "seconds", "best_epochs", "loss_sum", "best_score"}
FREE = {"config", "out", "resume", "input", "output", "cache", "name", "wordnet"}


def is_wrong(place: tuple[Any, ...], value: Any) -> bool:
    """Whether a place must not have this value: any text is allowed in some, any number in a sum that is only told."""
    if place[0] in RECORDS:
        return False
    if place == ("processes",):  # only told; runs of before have none
        return type(value) is not int and value is not ...
    if SUMS & {*place}:
        return type(value) not in (int, float, type(...))
    may_miss = place[0] in ("pooling", "pairs", "pretrain_weight_decay")
    return not (value is ... and may_miss) and not (value == "what?" and place[0] in FREE)


def test_a_run_with_a_wrong_value_is_not_resumed_even_if_checksums_fit(
    stopped: Path, resume: Callable[[], str]
) -> None:
    failures, config, state = {}, stopped / "config.json", stopped / "last" / "trainer.json"
    for place, wrong in edited(config, is_wrong):
        new = json.loads(config.read_text())
        config.write_text(json.dumps({**new, **({"checksum": settings_checksum(new)} if place != "checksum" else {})}))
        failures["config.json", place, wrong] = resume()
    with restored(stopped / "last" / CHECKSUMS):
        for place, wrong in edited(state, is_wrong):
            write_checksums(stopped / "last")
            failures["trainer.json", place, wrong] = resume()
    assert len(failures) > 60
    assert_none(failures)
    assert resume() == "accepted"


@pytest.fixture
def checkpoint(stopped: Path, tmp_path: Path) -> Path:
    """The best checkpoint with a tokenizer in one file too; without checksums, as most checkpoints are."""
    folder = shutil.copytree(stopped / "best", tmp_path / "checkpoint")
    (folder / CHECKSUMS).unlink()
    Tokenizer(folder, 64)._tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"cls_token": "[CLS]", "sep_token": {"content": "[SEP]"}}))
    return folder


@pytest.fixture
def predict(checkpoint: Path) -> Callable[[], str]:
    """What the checkpoint predicts, or "" where it is refused by a line, as it should be."""

    def attempt() -> str:
        try:
            return str(load(checkpoint, "cpu").predict("sst", ["a good film", "very bad"], probabilities=True))
        except CheckpointError as error:
            line = str(error)
            return "" if line.isprintable() and len(line) < 700 else f"line: {line}"
        except Exception as error:
            return f"traceback: {error!r}"

    return attempt


def test_a_checkpoint_with_a_damaged_file_is_refused_or_predicts_the_same(
    checkpoint: Path, predict: Callable[[], str]
) -> None:
    expected, found = predict(), {}
    for has_sums in (False, True):
        if has_sums:
            write_checksums(checkpoint)
        for name, kind in damaged(sorted(checkpoint.iterdir())):
            if has_sums or kind != "flipped":  # which nothing but a checksum can tell
                found[name, kind, has_sums] = predict()
    assert len(found) > 80 and predict() == expected
    assert_none({case: of for case, of in found.items() if of != expected})


def test_a_checkpoint_with_a_damaged_vocabulary_is_refused(checkpoint: Path, predict: Callable[[], str]) -> None:
    """Where there is no tokenizer in one file."""
    (checkpoint / "tokenizer.json").unlink()
    vocabulary, path = checkpoint / "vocab.txt", checkpoint / "tokenizer_config.json"
    settings = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}
    path.write_text(json.dumps(settings))
    expected = predict()
    kinds = (kind for _, kind in damaged([vocabulary]) if kind not in ("cut", "flipped"))  # other words, or fewer
    found = {kind: predict() for kind in kinds}
    with restored(vocabulary):
        vocabulary.write_bytes(vocabulary.read_bytes() + "café\n".encode("latin-1"))
        found["no UTF-8"] = predict()
    assert predict() == expected
    for name in settings:
        path.write_text(json.dumps({**settings, name: "what?"}))
        found[name] = predict()
    assert len(found) == 12
    assert_none(found)


def test_a_checkpoint_with_a_wrong_value_is_refused_or_predicts_the_same(
    checkpoint: Path, predict: Callable[[], str]
) -> None:
    def is_meant(place: tuple[Any, ...], _: Any) -> bool:
        """Another task's head is none, a tokenizer that splits nowhere is one too, and a word can be any."""
        is_other = place in (("multitask_bert", "tasks", "sst"), ("pre_tokenizer",))
        return not is_other and (len(place) < 3 or place[0] == "multitask_bert")

    expected, found = predict(), {}
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        found |= {(name, *case): predict() for case in edited(checkpoint / name, is_meant)}
    assert len(found) > 30 and predict() == expected
    assert_none({case: of for case, of in found.items() if of != expected})


def test_a_checkpoint_with_a_wrong_tensor_is_refused(checkpoint: Path, predict: Callable[[], str]) -> None:
    path = checkpoint / "model.safetensors"
    tensors, found = load_file(path), {}
    for name, i in some(itertools.product(tensors, range(5))):
        value, others = tensors[name], {n: of for n, of in tensors.items() if n != name}
        wrong = [None, value[:-1].clone(), value > 0, value.to(torch.complex64), value * float("nan")][i]
        save_file(others if wrong is None else {**others, name: wrong}, path)
        found[name, i] = predict()
    assert_none(found)


def test_a_damaged_index_of_a_checkpoint_in_shards_is_refused_or_changes_nothing(
    checkpoint: Path, predict: Callable[[], str]
) -> None:
    expected, index = predict(), checkpoint / "model.safetensors.index.json"
    names = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").rename(checkpoint / "model-1-of-1.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-1-of-1.safetensors")}))
    found = {case: predict() for case in itertools.chain(damaged([index]), edited(index))}
    assert_none({case: of for case, of in found.items() if of != expected})
    assert len(found) > 20 and "" in found.values()


def test_a_tokenizer_with_more_words_than_the_model_is_refused(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    with (checkpoint / "vocab.txt").open("a") as file:
        file.writelines(f"more{i}\n" for i in range(100))
    with pytest.raises(CheckpointError, match=r"the tokenizer has token ids up to \d+, expected less than the model"):
        load(checkpoint, "cpu")


def test_a_tokenizer_whose_expressions_explode_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "tokenizer.json"
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+(b+)+c"}, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps({**json.loads(path.read_text()), "pre_tokenizer": pattern}))
    with pytest.raises(CheckpointError, match="the tokenizer cannot be used"):
        load(checkpoint, "cpu").predict("sst", ["a" * 40 + "b" * 40 + " " + "a" * 3000])


# ------------------------------------------------------------------------------------------------ data, machine, end


@pytest.fixture
def line(capsys: Capture) -> Callable[..., str]:
    """The one line of a command that fails."""

    def line(*arguments: object, status: int = 2) -> str:
        capsys.readouterr()
        found, shown = command(*arguments), capsys.readouterr()
        lines = shown.err.splitlines()
        assert found == status and len(lines) == 1 and lines[0].isprintable() and len(lines[0]) < 1100, (found, shown)
        return lines[0].removeprefix("error: ")

    return line


@pytest.fixture
def flags(tiny: Path, data: Path, tmp_path: Path) -> list[object]:
    """Of a short run without a frozen stage, into tmp_path/run."""
    short = (
        "--device cpu --cache off --no-tensorboard --pretrain_epochs 0 --epochs 2 --steps_per_epoch 2 --batch_size 4"
    )
    return ["--model", tiny, "--data", data, "--out", tmp_path / "run", *short.split()]


def test_data_that_is_no_file_of_rows_is_refused(
    tiny: Path, data: Path, tmp_path: Path, capsys: Capture, flags: list[object]
) -> None:
    folder, found = shutil.copytree(data, tmp_path / "data"), {}
    for name, kind in damaged(paths := sorted(folder.iterdir())):
        if kind not in ("cut", "flipped") and (kind, "test" in name) != ("deleted", True):  # other rows, or none
            found[name, kind] = problem(capsys, command(*flags, "--data", folder))
    paths[0].write_bytes(bytes(2 * 10**7))
    found["zeros"] = problem(capsys, command(*flags, "--data", folder))
    paths[0].write_text("id\tid\tsentence\tsentiment\n1\t1\ta\t2\n")
    found["a column twice"] = problem(capsys, command(*flags, "--data", folder))
    assert_none(found)
    assert len(found) > 60 and not (tmp_path / "run").exists()


def test_a_model_whose_numbers_are_not_finite_is_neither_kept_nor_used(
    flags: list[object], line: Callable[..., str], checkpoint: Path, tmp_path: Path
) -> None:
    run, told = tmp_path / "run", "finetune epoch 1: the model's outputs are not finite for 8 of 8 rows"
    assert line(*flags, "--lr", "1e38", "--steps_per_epoch", "1", status=1) == told
    assert "holds numbers that are not finite" in line(f"--resume={run}") and not (run / "best").exists()
    (tmp_path / "input").write_text("a film\n")
    tensors, name = load_file(checkpoint / "model.safetensors"), "heads.sst.output.weight"
    for value, told in ((3e38, "outputs are not finite"), (float("inf"), f"{name} holds numbers that are not finite")):
        save_file({**tensors, name: torch.full_like(tensors[name], value)}, checkpoint / "model.safetensors")
        base = ("--checkpoint", checkpoint, "--device", "cpu", "--option")
        assert told in line(*base, "predict", "--task", "sst", "--input", tmp_path / "input")
        assert told in line(*base, "test", "--data", flags[3], "--cache", "off", "--out", tmp_path / str(value))


@pytest.mark.parametrize("size", [0, 1000, 20_000, 60_000])
def test_a_run_whose_disk_is_full_says_so_and_goes_on_later(
    size: int, stopped: Path, tmp_path: Path, line: Callable[..., str], undisturbed: Path
) -> None:
    """The system's limit on the size of a file stands for the end of the disk."""
    out = shutil.copytree(stopped, tmp_path / "a run")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        told = line(f"--resume={out}", status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in told and str(out) in told
    assert told.endswith(f"; to go on: python multitask_classifier.py '--resume={out}'")
    assert not list(out.glob("*.tmp")) and not (out / "results.json").exists()
    assert command(f"--resume={out}") == 0
    for name in ("best/model.safetensors", "last/trainer.safetensors", "predictions/sts-dev-rows.csv"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes()


@pytest.mark.parametrize("call", ["pathlib:Path.open", "os:mkdir"])
def test_a_run_whose_disk_is_read_only_says_so_and_goes_on_later(
    call: str, stopped: Path, tmp_path: Path, line: Callable[..., str], monkeypatch: Patch
) -> None:
    """At its log, and where only its checkpoints lie there."""
    out, original = shutil.copytree(stopped, tmp_path / "run"), pkgutil.resolve_name(call)

    def refuse(path: Any, mode: Any = "r", *args: Any, **kwargs: Any) -> Any:
        if Path(path).is_relative_to(out) and (call == "os:mkdir" or "r" not in mode):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return original(path, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(call.replace(":", "."), refuse)
        told = line(f"--resume={out}", status=1)
    place = out / ("best.tmp" if call == "os:mkdir" else "metrics.jsonl")
    assert told == f"{place}: Read-only file system; to go on: python multitask_classifier.py --resume={out}"
    assert not (out / "results.json").exists() and command(f"--resume={out}") == 0


@pytest.fixture(scope="module")
def undisturbed(stopped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = shutil.copytree(stopped, tmp_path_factory.mktemp("undisturbed") / "run")
    assert command(f"--resume={out}") == 0
    return out


def test_a_lack_of_memory_is_a_line(
    checkpoint: Path, flags: list[object], line: Callable[..., str], monkeypatch: Patch, tmp_path: Path
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "hidden_size": 10**7}))
    assert line("--model", checkpoint, *flags[2:], status=1).startswith("out of memory (")

    def fail(trainer: Trainer, *_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Trainer, "_launch", fail)
    told = line(*flags, status=1)
    assert (
        told.startswith("out of memory") and f"; to go on: python multitask_classifier.py --resume={tmp_path}" in told
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_an_output_that_takes_nothing_more_is_a_line(flags: list[object], capsys: Capture) -> None:
    with open("/dev/full", "w") as full, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", full)
        status = command(*flags)
    assert status == 1 and "error: standard output: No space left on device" in capsys.readouterr().err


def test_a_run_whose_reader_leaves_says_how_to_go_on_and_one_without_output_ends(
    flags: list[object], tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", pipe)
        assert command(*flags) == 1
    told = f"error: standard output: Broken pipe; to go on: python multitask_classifier.py --resume={tmp_path / 'run'}"
    assert capsys.readouterr().err == f"{told}\n"
    monkeypatch.setattr("sys.stdout", None)  # closed before the command began
    assert command(f"--resume={tmp_path / 'run'}") == 0
    assert (tmp_path / "run" / "results.json").exists() and capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_report_whose_output_is_full_is_a_line_and_without_output_there_is_none(
    treated_run: Path, capsys: Capture
) -> None:
    for name, status, told in (("/dev/full", 2, "error: No space left on device\n"), ("", 0, "")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdout", os.fdopen(os.open(name, os.O_WRONLY), "w") if name else None)
            assert report.main(["--csv", str(treated_run)]) == status
            sys.stdout.close()  # as Python does at its end
        assert capsys.readouterr().err == told


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def test_a_run_killed_while_plots_are_drawn_draws_them_when_it_goes_on(
    stopped: Path, tmp_path: Path, monkeypatch: Patch, undisturbed: Path
) -> None:
    out, drawn = shutil.copytree(stopped, tmp_path / "run"), list[Any]()

    def kill(run: running.Run, results: Any) -> None:
        drawn.append(results)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(running.Run, "draw_plots", kill)
        with pytest.raises(Killed):
            command(f"--resume={out}")
    assert not (out / "results.json").exists()
    monkeypatch.setattr(running.Run, "draw_plots", lambda run, results: drawn.append(results))
    assert command(f"--resume={out}") == 0 and len(drawn) == 2
    results = [json.loads((run / "results.json").read_text()) for run in (out, undisturbed)]
    assert results[0]["dev"] == results[1]["dev"] == drawn[1]["dev"]


def test_ctrl_c_while_modules_are_loaded_says_nothing() -> None:
    arguments = [sys.executable, ROOT / "multitask_classifier.py", "--help"]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while "numpy" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None and process.stderr.read() == b"" and process.wait() == -signal.SIGINT


# ------------------------------------------------------------------------------------------------ runs that have ended


@pytest.fixture
def ended(treated_run: Path, tmp_path: Path, monkeypatch: Patch) -> Path:
    """A run whose report draws no pictures."""
    monkeypatch.setattr(report, "run_plots", lambda run: run.records() and [])
    monkeypatch.setattr(comparison, "NUM_RESAMPLES", 20)
    return shutil.copytree(treated_run, tmp_path / "ended", ignore=shutil.ignore_patterns("best", "last", "plots"))


@pytest.fixture
def reported(ended: Path, treated_run: Path, capsys: Capture) -> Callable[[], str]:
    """What is wrong with a report on the run, which may be damaged, or "". By turns it is of one run, two, or a csv."""
    forms = itertools.cycle([[ended], [ended, treated_run], ["--csv", ended]])

    def attempt() -> str:
        try:
            status = report.main(list(map(str, next(forms))))
        except Exception as error:
            return f"traceback: {error!r}"
        lines = capsys.readouterr().err.splitlines()
        is_told = all(line.isprintable() and len(line) < 1100 for line in lines) and (lines or not status)
        return "" if is_told else f"status {status}: {lines[-1:]}"

    return attempt


def test_reports_on_damaged_runs_say_what_is_wrong(ended: Path, reported: Callable[[], str]) -> None:
    files = [*ended.glob("*.json*"), *ended.glob("predictions/*rows.csv")]
    found = {case: reported() for case in damaged(files)}
    assert_none(found)
    assert len(found) == 60


def test_reports_on_edited_runs_say_what_is_wrong(ended: Path, reported: Callable[[], str], monkeypatch: Patch) -> None:
    monkeypatch.setattr(report, "_error_blocks", lambda run, task: [])  # which take long, and read other files
    names = ("results.json", "config.json", "metrics.jsonl")
    found = {(name, *case): reported() for name in names for case in edited(ended / name)}
    assert_none(found)
    assert len(found) > 100
