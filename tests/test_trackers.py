"""Trackers beside metrics.jsonl: what each is given, also by a resumed run, and that none of them can end a run."""

import json
import sqlite3
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from test_command import Runs, assert_same_run, runs

import multitask_classifier
from config import FlagError, parse
from helpers import Capture, Patch
from run_record import parse_records, scalars
from trackers import PROJECT, STATE, TRACKERS, Tracking

__all__ = ["runs"]  # the fixture


class Kept:
    """A tracker that keeps what it is given in a file; settings of a run may tell it when to fail."""

    def __init__(self, run: Path, id: str, settings: Mapping[str, Any]) -> None:
        self.id, self.file = id or "made-up", run / "kept.jsonl"
        self.add(["begin", id])

    def add(self, what: Any) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(what) + "\n")

    def log(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        self.add([stage, step, dict(numbers)])

    def finish(self, scores: Mapping[str, float]) -> None:
        self.add(["finish", dict(scores)])


@pytest.fixture
def kept(monkeypatch: Patch) -> None:
    monkeypatch.setitem(TRACKERS, "wandb", Kept)
    monkeypatch.setattr("config.importlib.util.find_spec", lambda name: name)


def lines(out: Path) -> list[Any]:
    return [json.loads(line) for line in (out / "kept.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("kept")
def test_a_tracker_gets_every_record_once_and_the_final_scores(runs: Runs, tmp_path: Path, monkeypatch: Patch) -> None:
    """Stopped, it is taken up again by its name, and what is trained once more is not logged once more."""
    whole, out = runs.run(tmp_path / "whole", "--log wandb"), tmp_path / "run"
    records = parse_records((whole / "metrics.jsonl").read_bytes())
    logged = [[record["stage"], record["step"], dict(scalars(record))] for record in records]
    dev = json.loads((whole / "results.json").read_text())["dev"]
    assert lines(whole)[0] == ["begin", ""] and lines(whole)[1:-1] == logged
    assert lines(whole)[-1][0] == "finish" and lines(whole)[-1][1]["results/mean"] == dev["mean"]
    write, calls = Tracking.write, []

    def killed(tracking: Tracking, record: Mapping[str, Any]) -> None:
        write(tracking, record)
        calls.append(record)
        if len(calls) == 10:  # in the midst of an epoch, as a power cut: nothing is saved of its steps
            raise SystemExit

    monkeypatch.setattr(Tracking, "write", killed)
    with pytest.raises(SystemExit):
        runs.run(out, "--log wandb")
    monkeypatch.setattr(Tracking, "write", write)
    assert multitask_classifier.main(["--resume", str(out)]) == 0
    found = lines(out)
    assert [line for line in found if line[0] in ("begin", "finish")][2] == ["begin", "made-up"]
    assert [line[:2] for line in found if line[0] not in ("begin", "finish")] == [line[:2] for line in logged]
    assert_same_run(out, whole)


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("name", ["__init__", "log", "finish"])
def test_a_tracker_that_fails_costs_a_line_and_not_the_run(
    name: str, runs: Runs, tmp_path: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    def fail(*given: Any) -> None:
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(Kept, name, fail)
    out = runs.run(tmp_path / "run", "--log wandb")
    shown = capsys.readouterr().out
    line = "warning: --log wandb failed, the run goes on without it (ConnectionError: no route)"
    assert shown.split("\n").count(line) == 1
    assert_same_run(out, runs.whole())


def test_a_package_that_is_not_there_is_said_before_anything_starts(monkeypatch: Patch) -> None:
    monkeypatch.setattr("config.importlib.util.find_spec", lambda name: None)
    with pytest.raises(FlagError, match="--log trackio: the package trackio is not installed"):
        parse(["--log", "trackio"])
    with pytest.raises(FlagError, match=r"--log wandbb: .*did you mean wandb\?"):
        parse(["--log", "wandbb"])


def track(name: str, run: Path) -> list[str]:
    """A run of five records that is stopped, and its going on from the third to eight; what was said."""
    said: list[str] = []
    for numbers in (range(5), range(2, 8)):
        tracking = Tracking(name, run, {"lr": 1e-3, "tasks": ["sst"]}, numbers.start, said.append)
        for i in numbers:
            tracking.write({"stage": "finetune", "epoch": 1, "step": i, "losses": {"sst": i / 2}})
        tracking.finish({"mean": 0.75} if numbers.start else {})
    assert json.loads((run / STATE).read_text())["sent"] == 8
    return said


def stand_in(module: str, monkeypatch: Patch) -> MagicMock:
    """A module that notes how it is called, in the place of a tracker's package."""
    monkeypatch.setitem(sys.modules, module, standing := MagicMock())
    return standing


def calls(standing: MagicMock, name: str) -> list[Any]:
    return [call for call in standing.mock_calls if call[0].endswith(name)]


LOSSES = [{"finetune/loss/sst": i / 2, "finetune/step": i} for i in range(8)]


def test_what_wandb_is_called_with(tmp_path: Path, monkeypatch: Patch) -> None:
    wandb = stand_in("wandb", monkeypatch)
    wandb.init.return_value.id = "made-up"
    assert track("wandb", tmp_path) == []
    first, again = calls(wandb, "init")
    assert (first.kwargs["project"], first.kwargs["dir"]) == (PROJECT, str(tmp_path)) and "id" not in first.kwargs
    assert (again.kwargs["id"], again.kwargs["resume"]) == ("made-up", "allow")
    assert [call.args for call in calls(wandb, "().log")] == [(numbers,) for numbers in LOSSES]
    assert [call.args for call in calls(wandb, "summary.update")] == [({},), ({"results/mean": 0.75},)]
    assert len(calls(wandb, "().finish")) == 2


def test_what_mlflow_is_called_with(tmp_path: Path, monkeypatch: Patch) -> None:
    mlflow, entities = stand_in("mlflow", monkeypatch), stand_in("mlflow.entities", monkeypatch)
    entities.Param.side_effect, entities.Metric.side_effect = (lambda *given: given), (lambda *given: given)
    mlflow.MlflowClient.return_value.create_run.return_value.info.run_id = "made-up"
    assert track("mlflow", tmp_path) == []
    assert len(calls(mlflow, "create_run")) == 1
    logged = calls(mlflow, "log_batch")
    assert {call.args for call in logged} == {("made-up",)}
    assert [call.kwargs["params"] for call in logged if "params" in call.kwargs] == [
        [("lr", "0.001"), ("tasks", "['sst']")]
    ]
    numbers = [(name, value, step) for call in logged for name, value, _, step in call.kwargs.get("metrics", [])]
    losses = [("finetune/loss/sst", i / 2, i) for i in range(8)]
    assert numbers == [*losses, ("results/mean", 0.75, 0)]
    assert [call.args for call in calls(mlflow, "set_terminated")] == [("made-up", "KILLED"), ("made-up", "FINISHED")]


def test_what_trackio_is_called_with(tmp_path: Path, monkeypatch: Patch) -> None:
    trackio = stand_in("trackio", monkeypatch)
    assert track("trackio", tmp_path) == []
    first, again = (call.kwargs for call in calls(trackio, "init"))
    assert first["project"] == PROJECT and first["name"].startswith(tmp_path.name) and first["resume"] == "allow"
    assert again == first
    assert [call.args for call in calls(trackio, "().log")] == [*((row,) for row in LOSSES), ({"results/mean": 0.75},)]
    assert len(calls(trackio, "().finish")) == 2


def test_wandb_offline(tmp_path: Path, monkeypatch: Patch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert track("wandb", tmp_path) == []
    name = json.loads((tmp_path / STATE).read_text())["id"]
    written = [path.read_bytes() for path in (tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb")]
    assert len(written) == 2 and sum(content.count(b"finetune/loss/sst") for content in written) >= 8


def test_mlflow_on_this_machine(tmp_path: Path, monkeypatch: Patch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert track("mlflow", tmp_path) == []
    (loss,) = (tmp_path / "mlruns").glob("*/*/metrics/finetune/loss/sst")
    assert [line.split()[1:] for line in loss.read_text().splitlines()] == [[str(i / 2), str(i)] for i in range(8)]


def test_trackio_on_this_machine(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read when it is imported, which nothing else does
    pytest.importorskip("trackio")
    assert track("trackio", tmp_path) == []
    with sqlite3.connect(tmp_path / f"{PROJECT}.db") as base:
        rows = [json.loads(row[0]) for row in base.execute("select metrics from metrics order by id")]
    assert [row["finetune/loss/sst"] for row in rows if "finetune/loss/sst" in row] == [i / 2 for i in range(8)]
