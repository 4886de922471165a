"""The shell sweeps on a tiny model: finished runs are not repeated, stopped ones go on, failed ones are named."""

import json
import os
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

LATE = ["heads", "late_adapters-first", "late_adapters"]


class Sweep:
    """`sweeps/methods.sh` with tiny settings."""

    def __init__(self, folder: Path, tiny: Path, data: Path) -> None:
        self.out = folder / "out"
        settings = {"MODEL": str(tiny), "DATA": str(data), "OUT": str(self.out), "PYTHON": sys.executable}
        settings |= {"SEEDS": "3", "RUNS": "pcgrad", "EPOCHS": "1", "STEPS": "1", "BATCH": "4"}
        settings |= {"FLAGS": "--no-tensorboard --device cpu --threads 1 --cache off"}
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
def sweep(tmp_path: Path, tiny: Path, data: Path) -> Sweep:
    return Sweep(tmp_path, tiny, data)


@pytest.fixture
def fake(sweep: Sweep) -> Sweep:
    """Its runs are a program that prints its arguments and claims to have trained, in a new directory only."""
    program = sweep.out.parent / "python"
    lines = ["#!/bin/sh", 'echo "$@"', "for out; do :; done"]
    lines += [
        'if [ -d "$out" ]; then echo "error: --out $out: exists"; exit 2; fi',
        'mkdir "$out" && >"$out/results.json"',
    ]
    program.write_text("\n".join(lines))
    program.chmod(0o755)
    sweep.environment["PYTHON"] = str(program)
    return sweep


def test_a_finished_run_is_not_repeated_and_a_failed_one_is_named_while_the_others_run(fake: Sweep) -> None:
    status, shown = fake.run()
    assert status == 0, shown
    finished = fake.finished()
    assert list(finished) == ["heads-seed3", "pcgrad-seed3"]
    assert "all runs are finished" in shown and "evaluation.py" in (fake.out / "comparison.txt").read_text()

    (fake.out / "random-seed3").mkdir()  # a directory that is no run: the run refuses it
    status, shown = fake.run(RUNS="random pcgrad drop_longest")
    assert status == 1
    assert shown.count("finished before") == 2
    assert "random-seed3: exit status 2, error: --out" in shown.split("failed:")[1]
    assert {name: time for name, time in fake.finished().items() if name in finished} == finished
    assert "drop_longest-seed3" in fake.finished()

    status, shown = fake.run(FLAGS=f"{fake.environment['FLAGS']} --weight_decay 0.5")
    assert status == 1
    first, second = shown.split("failed:\n")[1].splitlines()
    assert "heads-seed3: was made with other flags" in first
    assert second == "  pcgrad-seed3: not started, it needs heads-seed3"


def test_what_needs_a_failed_run_is_not_started_and_named(fake: Sweep) -> None:
    (fake.out / "heads-seed3").mkdir(parents=True)
    status, shown = fake.run(RUNS="pcgrad late_adapters")
    assert status == 1
    reasons = dict(line.strip().split(": ", 1) for line in shown.split("failed:\n")[1].splitlines())
    assert reasons.pop("heads-seed3").startswith("exit status 2, error: --out")
    assert reasons == {
        "pcgrad-seed3": "not started, it needs heads-seed3",
        "late_adapters-first-seed3": "not started, it needs heads-seed3",
        "late_adapters-seed3": "not started, it needs late_adapters-first-seed3",
    }
    assert [path.name for path in fake.out.iterdir() if path.is_dir()] == ["heads-seed3"]


def test_a_setting_that_does_not_exist_is_refused_with_those_that_do(sweep: Sweep) -> None:
    status, shown = sweep.run(RUNS="pcgrad typo")
    assert status == 2
    assert shown.startswith("RUNS: typo is no setting, expected some of: pal random ") and shown.count("\n") == 1
    assert not sweep.out.exists()


def test_settings_differ_are_accepted_and_take_the_same_number_of_rows(fake: Sweep) -> None:
    status, shown = fake.run(RUNS="", EPOCHS="4", STEPS="2")
    assert status == 0, shown
    names = "pal random round_robin temperature pcgrad gradvac smart adapters eda drop_longest individual late_adapters"
    lines = {path.stem.removesuffix("-seed3"): path.read_text().split() for path in fake.out.glob("*.log")}
    assert set(lines) == {*names.split(), "heads", "heads-individual", "late_adapters-first"}
    runs = {name: parse(words[1:]) for name, words in lines.items()}
    assert (runs["pcgrad"].treatment, runs["pcgrad"].seed) == ("pcgrad", 3)
    assert all(Path(run.out).name == f"{name}-seed3" for name, run in runs.items())
    tuned = {name: run for name, run in runs.items() if not name.startswith("heads")}
    rows = {name: run.epochs * run.steps_per_epoch * run.rows_per_step for name, run in tuned.items()}
    assert rows == {name: 16 if name.startswith("late") else 32 for name in rows}
    first = {name: Path(run.checkpoint).name.removesuffix("-seed3") for name, run in runs.items() if run.checkpoint}
    others = {"individual": "heads-individual", "late_adapters": "late_adapters-first"}
    assert first == {name: others.get(name, "heads") for name in rows}
    assert len({str(replace(run, out="")) for run in runs.values()}) == len(runs)


def test_a_stopped_sweep_goes_on_where_it_was(sweep: Sweep) -> None:
    flags = sweep.environment["FLAGS"] + " --eval_every 0"
    settings = {"RUNS": "late_adapters", "EPOCHS": "40", "STEPS": "8", "FLAGS": flags}
    process = sweep.start(**settings)
    log = sweep.out / "late_adapters-first-seed3" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130, shown
    assert "the same command goes on" in shown
    stopped = shown[shown.index("late_adapters-first-seed3: exit status") :]
    assert ", stopped; to go on" in stopped.splitlines()[0], "the run had time to save"
    before = sweep.finished()
    assert list(before) == ["heads-seed3"]
    status, shown = sweep.run(**settings)
    assert status == 0, shown
    assert "heads-seed3: finished before" in shown and "late_adapters-first-seed3: goes on" in shown
    assert sorted(sweep.finished()) == sorted(f"{name}-seed3" for name in LATE)
    assert sweep.finished()["heads-seed3"] == before["heads-seed3"]
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 161))
