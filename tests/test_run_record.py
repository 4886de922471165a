"""The run directory: nothing is overwritten, and a process killed at any moment leaves something to resume."""

import csv
import errno
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import ROOT, Patch
from run_record import (
    CHECKSUMS,
    DevRows,
    MetricsLog,
    RunDirectory,
    RunError,
    finite,
    read_json,
    recover_folder,
    replace_folder,
    settings_checksum,
    write_atomically,
    write_json,
)
from run_state import read_state, write_state


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but the checksums, which say no more."""
    paths = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != CHECKSUMS)
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def test_a_new_run_directory_holds_its_configuration(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "runs" / "deep" / "one", {"seed": 3})
    settings = read_json(run.path / "config.json")
    assert settings == {"seed": 3, "checksum": settings_checksum({"seed": 3})} and contents(run.path).keys() == {
        "config.json",
        ".lock",
    }
    assert (run.best, run.last) == (run.path / "best", run.path / "last")


@pytest.mark.parametrize("kind", ["run", "folder", "file"])
def test_an_existing_out_is_refused_and_untouched(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    if kind == "file":
        path.write_text("precious")
    else:
        path.mkdir()
    if kind == "folder":
        (path / "notes").write_text("precious")
    if kind == "run":
        (path / "config.json").write_text("precious")
        (path / "best").mkdir()
    before, others = contents(tmp_path), sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError, match=f"--out {path}: exists already, expected a new or an empty dir") as error:
        RunDirectory.create(path, {"seed": 1})
    assert (f"--resume={path}" in str(error.value)) == (kind == "run") and "\n" not in str(error.value)
    if kind == "file":
        with pytest.raises(RunError, match=r"--out .*out/run: cannot be made \(Not a directory\)"):
            RunDirectory.create(path / "run", {})
    assert contents(tmp_path) == before and sorted(tmp_path.rglob("*")) == others


def test_only_a_run_that_has_not_ended_can_be_resumed(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "absent", "no run directory"), (tmp_path, r"expected one with config\.json")):
        with pytest.raises(RunError, match=f"--resume {path}: no run directory.*{message}|{message}"):
            RunDirectory.existing(path)
    run = RunDirectory.create(tmp_path / "run", {"seed": 5})
    run.close()
    assert RunDirectory.existing(run.path).path == run.path
    run.write_results({"dev": {"sts": {"pearson": math.nan}}, "confusion": [[1, 2], [3, 4]]})
    assert read_json(run.path / "results.json") == {"dev": {"sts": {"pearson": None}}, "confusion": [[1, 2], [3, 4]]}
    with pytest.raises(RunError, match=r"the run has ended, its results are in .*results\.json"):
        RunDirectory.existing(run.path)


def test_resuming_takes_up_checkpoints_whose_replacement_was_cut_off(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", {})
    for name in ("best", "last"):
        (run.path / f"{name}.new").mkdir()
        (run.path / f"{name}.new" / "weights").write_text(name)
    run.close()
    again = RunDirectory.existing(run.path)
    assert [contents(folder) for folder in (again.best, again.last)] == [{"weights": b"best"}, {"weights": b"last"}]


def version(number: int) -> Callable[[Path], None]:
    """Writes a folder of two files that must belong together."""

    def write(folder: Path) -> None:
        for name in ("first", "second"):
            (folder / name).write_text(str(number))

    return write


def kill_at(place: int, monkeypatch: Patch) -> list[str]:
    """The process ends before call number `place` that moves or removes a folder; returns the calls made so far."""
    calls: list[str] = []

    def watch(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if len(calls) == place:
                raise Killed
            calls.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    watch(os, "rename")
    watch(shutil, "rmtree")
    return calls


def leave_leftovers(folder: Path) -> None:
    """What earlier kills can leave beside a folder."""
    for suffix in (".tmp", ".old"):
        folder.with_name(folder.name + suffix).mkdir()
        (folder.with_name(folder.name + suffix) / "first").write_text("leftover")


def test_a_replaced_folder_holds_the_new_files_only_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "last"
    replace_folder(folder, version(1))
    (folder / "third").write_text("of the old one")
    leave_leftovers(folder)
    replace_folder(folder, version(2))
    assert contents(tmp_path) == {"last/first": b"2", "last/second": b"2"}
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


@pytest.mark.parametrize("place", range(10))
def test_a_kill_at_any_stage_leaves_the_old_folder_or_the_new_one(
    place: int, tmp_path: Path, monkeypatch: Patch
) -> None:
    folder = tmp_path / "last"
    replace_folder(folder, version(1))
    leave_leftovers(folder)
    with monkeypatch.context() as patch:
        calls = kill_at(place, patch)
        try:
            replace_folder(folder, version(2))
            assert len(calls) <= place < 10 and calls.count("rename") == 3  # places beyond all stages are tried too
        except Killed:
            assert len(calls) == place < 9
    recover_folder(folder)
    assert contents(folder) in ({"first": b"1", "second": b"1"}, {"first": b"2", "second": b"2"})
    replace_folder(folder, version(3))
    assert contents(tmp_path) == {"last/first": b"3", "last/second": b"3"}


@pytest.mark.parametrize("old", [{}, {"best/first": b"1", "best/second": b"1"}])
def test_a_kill_while_the_new_folder_is_written_leaves_the_old_one(old: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "best"
    if old:
        replace_folder(folder, version(1))

    def half(path: Path) -> None:
        (path / "first").write_text("2")
        raise Killed

    with pytest.raises(Killed):
        replace_folder(folder, half)
    recover_folder(folder)
    assert folder.exists() == bool(old)
    assert {name: of for name, of in contents(tmp_path).items() if name.startswith("best/")} == old
    replace_folder(folder, version(3))
    assert contents(tmp_path) == {"best/first": b"3", "best/second": b"3"}


@pytest.mark.parametrize("is_named", [True, False])
def test_recovery_removes_what_is_left_of_the_old_folder(is_named: bool, tmp_path: Path) -> None:
    """Nothing may be written again after it: a run that had only its plots to draw."""
    folder, old = tmp_path / "last", tmp_path / "last.old"
    replace_folder(folder, version(2))
    old.mkdir()
    (old / "first").write_text("1")
    if not is_named:  # cut off between the renames
        folder.rename(tmp_path / "last.new")
    recover_folder(folder)
    assert contents(tmp_path) == {"last/first": b"2", "last/second": b"2"} and not old.exists()


def test_recovery_leaves_a_whole_folder_alone(tmp_path: Path) -> None:
    folder = tmp_path / "last"
    replace_folder(folder, version(1))
    beside = tmp_path / "last.new"
    beside.mkdir()
    recover_folder(folder)
    assert contents(folder) == {"first": b"1", "second": b"1"}
    recover_folder(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_what_a_killed_run_logged_after_its_checkpoint_is_logged_again_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0, None)
    log.write({"stage": "finetune", "step": 1, "loss": 0.5})
    size = log.state["metrics_size"]
    log.write({"stage": "finetune", "step": 2, "loss": 0.25})
    log.close()
    with path.open("ab") as file:
        file.write(b'{"stage": "fine')  # a record that the kill cut off
    resumed = MetricsLog(path, size, None)
    assert resumed.state["metrics_size"] == size
    for step in (2, 3):
        resumed.write({"stage": "finetune", "step": step, "loss": 1 / step})
    resumed.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_record_is_in_the_file_as_soon_as_it_is_written_and_nan_and_infinities_are_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0, None)
    log.write({"stage": "pretrain", "step": 1, "loss": float("nan"), "dev": {"sts": {"pearson": float("inf")}}})
    assert path.read_text() == '{"stage": "pretrain", "step": 1, "loss": null, "dev": {"sts": {"pearson": null}}}\n'
    assert log.state["metrics_size"] == path.stat().st_size
    log.close()
    values = {"a": math.nan, "b": [1, -math.inf, "text", None], "c": {"d": (math.inf, 2.5, True)}, "e": 3}
    assert finite(values) == {"a": None, "b": [1, None, "text", None], "c": {"d": [None, 2.5, True]}, "e": 3}
    assert values["a"] is math.nan


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: Patch) -> None:
    path = tmp_path / "file"
    for content, expected in (("größer\n", "größer\n".encode()), (b"\x00\xff", b"\x00\xff")):
        write_atomically(path, content)
        assert contents(tmp_path) == {"file": expected}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"step": math.nan})
    for fault, num_left in ((Killed(), 2), (OSError(28, "No space left"), 1)):

        def fail(*args: object, fault: BaseException = fault) -> None:
            raise fault

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(type(fault)):
            write_atomically(path, "new")
        assert path.read_bytes() == b"\x00\xff" and len(contents(tmp_path)) == num_left


def test_absent_and_damaged_json_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    with pytest.raises(RunError, match=r"state\.json: no such file"):
        read_json(path)
    for content in (b"{", b"\xff\xfe", b""):
        path.write_bytes(content)
        with pytest.raises(RunError, match=r"state\.json: not readable as JSON"):
            read_json(path)


def test_the_trainer_s_state_comes_back_bit_identical(tmp_path: Path) -> None:
    tensors = {"moment": torch.randn(3, 4).t(), "step": torch.tensor(7), "half": torch.ones(2, dtype=torch.bfloat16)}
    run = RunDirectory.create(tmp_path / "run", {})
    log = run.open_metrics(0, False)
    state = {"stage": 1, "progress": None, "seconds": {"a": 1 / 3}, "best_epochs": {}, "conflicts": {}, **log.state}
    replace_folder(run.last, lambda folder: write_state(folder, tensors, state))
    found, found_state = read_state(run)
    assert found_state == {"format": 3, **state} and found.keys() == tensors.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in tensors.items())
    assert contents(run.last).keys() == {"trainer.safetensors", "trainer.json"}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_tensors_can_be_read_by_whom_other_files_can(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_state(tmp_path, {"moment": torch.ones(2)}, {})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", "config.json.tmp"]])
def test_a_run_killed_before_it_had_settings_begins_once_more(left: list[str], tmp_path: Path) -> None:
    for name in left:
        (tmp_path / name).touch()
    run = RunDirectory.create(tmp_path, {"seed": 1})
    assert read_json(run.path / "config.json")["seed"] == 1


def test_a_run_is_not_resumed_while_a_process_runs_it_and_the_lock_of_a_killed_one_is_gone(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", {})
    refused = r"--resume .*run: another process is running it, expected a stopped run"
    with pytest.raises(RunError, match=refused):
        RunDirectory.existing(run.path)
    run.close()
    again = RunDirectory.existing(run.path)
    del again  # forgotten, as by a run that failed
    script = (
        "import pathlib, run_record, sys, time; run = run_record.RunDirectory.existing(pathlib.Path(sys.argv[1]))\n"
    )
    script += "print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", script, str(run.path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=refused):
            RunDirectory.existing(run.path)
        holder.kill()
    RunDirectory.existing(run.path).close()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_no_error(number: int, tmp_path: Path, monkeypatch: Patch) -> None:
    def flock(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", flock)
    run = RunDirectory.create(tmp_path / "run", {})
    RunDirectory.existing(tmp_path / "run")  # nothing holds it, though the first is still there
    run.close()


def test_dev_rows_hold_labels_as_they_were_written_and_the_texts(tmp_path: Path) -> None:
    labels, predictions = np.array([3.2, 4, 0.35], np.float32), np.array([1 / 3, 5, 1e-7], np.float32)
    texts = [('a "film", so', "b"), ("two\nlines", ""), ("c", "d")]
    (rows := DevRows(("x", "y,z", "0"), labels, predictions, None)).write(
        path := tmp_path / "rows.csv", ("s", "t"), texts
    )
    with path.open(newline="") as file:
        header, *found = list(csv.reader(file))
    assert header == ["id", "label", "prediction", "s", "t"]
    assert [row[:2] for row in found] == [["x", "3.2"], ["y,z", "4"], ["0", "0.35"]]
    assert [tuple(row[3:]) for row in found] == texts
    assert [np.float32(row[2]) for row in found] == predictions.tolist()
    read = DevRows.read(path)
    assert read.ids == rows.ids and read.probabilities is None
    assert np.array_equal(read.labels.astype(np.float32), labels)
    shares = np.array([[0.1, 0.9], [1, 0], [1e-6, 1 - 1e-6]], np.float32)
    DevRows(rows.ids, np.array([1.0, 0, 1], np.float32), np.array([1.0, 0, 1], np.float32), shares).write(path)
    found_shares = DevRows.read(path).probabilities
    assert found_shares is not None and np.array_equal(found_shares.astype(np.float32), shares)
