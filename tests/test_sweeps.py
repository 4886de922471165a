"""The shell sweeps: finished runs are not repeated, stopped ones go on, failed ones are named."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from config import parse
from helpers import ROOT
from jacobian_descent import METHODS
from pcgrad import TREATMENTS


class Sweep:
    """`sweeps/methods.sh` with runs that behave as such and take milliseconds."""

    def __init__(self, folder: Path) -> None:
        self.out, self.plan = folder / "out", folder / "plan.json"
        python, program = folder / "python", shutil.copy(ROOT / "tests" / "cases" / "fake_run.py", folder)
        run = f'shift; exec "{sys.executable}" -S "{program}" "$@"'
        python.write_text(f'#!/bin/sh\ncase $1 in *evaluation.py) echo "$@" ;; *) {run} ;; esac\n')
        python.chmod(0o755)
        self.plan.write_text("{}")
        settings = {"OUT": str(self.out), "PYTHON": str(python), "FLAGS": "--device cpu"}
        settings |= {"SEEDS": "3", "RUNS": "pcgrad", "EPOCHS": "1", "STEPS": "1", "BATCH": "4"}
        self.environment = {**os.environ, **settings}

    def start(self, **settings: str) -> subprocess.Popen[str]:
        command, environment = ["bash", str(ROOT / "sweeps" / "methods.sh")], {**self.environment, **settings}
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=environment, start_new_session=True, **streams)

    def run(self, **settings: str) -> tuple[int, str]:
        process = self.start(**settings)
        shown, _ = process.communicate(timeout=300)
        return process.returncode, shown

    def finished(self) -> dict[str, float]:
        """When each finished run wrote its results."""
        return {path.parent.name: path.stat().st_mtime for path in sorted(self.out.glob("*/results.json"))}


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path)


def test_a_finished_run_is_not_repeated_and_a_failed_one_is_named_while_the_others_run(sweep: Sweep) -> None:
    status, shown = sweep.run()
    assert status == 0, shown
    finished = sweep.finished()
    assert list(finished) == ["heads-seed3", "pcgrad-seed3"]
    assert "all runs are finished" in shown and "evaluation.py" in (sweep.out / "comparison.txt").read_text()

    (sweep.out / "random-seed3").mkdir()  # a directory that is no run: the run refuses it
    status, shown = sweep.run(RUNS="random pcgrad drop_longest")
    assert status == 1
    assert shown.count("finished before") == 2
    assert "random-seed3: exit status 1, FileExistsError" in shown.split("failed:")[1]
    assert {name: time for name, time in sweep.finished().items() if name in finished} == finished
    assert "drop_longest-seed3" in sweep.finished()

    status, shown = sweep.run(FLAGS=f"{sweep.environment['FLAGS']} --weight_decay 0.5")
    assert status == 1
    first, second = shown.split("failed:\n")[1].splitlines()
    assert "heads-seed3: was made with other flags" in first
    assert second == "  pcgrad-seed3: not started, it needs heads-seed3"


def test_what_needs_a_failed_run_is_not_started_and_named(sweep: Sweep) -> None:
    (sweep.out / "heads-seed3").mkdir(parents=True)
    status, shown = sweep.run(RUNS="pcgrad late_adapters")
    assert status == 1
    reasons = dict(line.strip().split(": ", 1) for line in shown.split("failed:\n")[1].splitlines())
    assert reasons.pop("heads-seed3").startswith("exit status 1, FileExistsError")
    assert reasons == {
        "pcgrad-seed3": "not started, it needs heads-seed3",
        "late_adapters-first-seed3": "not started, it needs heads-seed3",
        "late_adapters-seed3": "not started, it needs late_adapters-first-seed3",
    }
    assert [path.name for path in sweep.out.iterdir() if path.is_dir()] == ["heads-seed3"]


def test_a_setting_that_does_not_exist_is_refused_with_those_that_do(sweep: Sweep) -> None:
    status, shown = sweep.run(RUNS="pcgrad typo")
    assert status == 2
    assert shown.startswith("RUNS: typo is no setting, expected some of: pal random ") and shown.count("\n") == 1
    assert not sweep.out.exists()


def test_settings_differ_are_accepted_and_take_the_same_number_of_rows(sweep: Sweep) -> None:
    status, shown = sweep.run(RUNS="", EPOCHS="4", STEPS="2")
    assert status == 0, shown
    names = sweep.run(RUNS="typo")[1].split("expected some of: ")[1].split()
    configs = {path.parent.name: json.loads(path.read_text()) for path in sweep.out.glob("*/config.json")}
    lines = {name.removesuffix("-seed3"): config["argv"] for name, config in configs.items()}
    assert set(lines) == {*names, "heads", "heads-individual", "late_adapters-first"}
    assert lines["soup"][-5:-2] == [str(sweep.out / f"{name}-seed3") for name in ("pal", "random", "temperature")]
    runs = {name: parse(words) for name, words in lines.items()}
    treatments = {run.treatment for run in runs.values()}
    assert treatments == {"sum", *TREATMENTS, *METHODS} - {"GradVac", "PCGrad", "Sum", "Mean", "Constant"}  # said twice
    assert all((run.name, run.seed, Path(run.out).name) == (n, 3, f"{n}-seed3") for n, run in runs.items())
    tuned = {name: run for name, run in runs.items() if not name.startswith("heads") and name != "soup"}
    rows = {name: run.epochs * run.steps_per_epoch * run.rows_per_step for name, run in tuned.items()}
    assert rows == {name: 16 if name.startswith("late") else 32 for name in rows}
    first = {name: Path(run.checkpoint).name.removesuffix("-seed3") for name, run in tuned.items()}
    others = {"individual": "heads-individual", "late_adapters": "late_adapters-first"}
    assert first == {name: others.get(name, "heads") for name in rows} | dict.fromkeys(("mlm", "siamese", "mlp"), "")
    assert len({str(replace(run, out="", name="")) for run in runs.values()}) == len(runs)


def test_a_stopped_sweep_goes_on_where_it_was(sweep: Sweep) -> None:
    first = "late_adapters-first-seed3"
    sweep.plan.write_text(json.dumps({first: {"means": [0.1, 0.2], "pause": 60, "saving": 0.3}}))
    process, log = sweep.start(RUNS="late_adapters"), sweep.out / first / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130, shown
    assert "the same command goes on" in shown
    assert f"{first}: exit status 143, stopped\n" in shown, "the run had time to save"
    before = sweep.finished()
    assert list(before) == ["heads-seed3"]
    sweep.plan.write_text(json.dumps({first: {"means": [0.1, 0.2]}}))
    status, shown = sweep.run(RUNS="late_adapters")
    assert status == 0, shown
    assert "heads-seed3: finished before" in shown and f"{first}: goes on" in shown
    assert sorted(sweep.finished()) == ["heads-seed3", first, "late_adapters-seed3"]
    assert sweep.finished()["heads-seed3"] == before["heads-seed3"]
    assert [json.loads(line)["epoch"] for line in log.read_text().splitlines()] == [1, 2]
