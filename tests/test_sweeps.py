"""The shell sweeps on a tiny model: finished runs are not repeated, stopped ones go on, failed ones are named."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LATE = ["heads", "late_adapters-first", "late_adapters"]


class Sweep:
    """`sweeps/methods.sh` with tiny settings."""

    def __init__(self, folder: Path, tiny: Path, data: Path) -> None:
        self.out = folder / "out"
        settings = {
            "MODEL": str(tiny),
            "DATA": str(data),
            "OUT": str(self.out),
            "SEEDS": "3",
            "RUNS": "pcgrad",
            "EPOCHS": "1",
            "DRAWS": "1",
            "BATCH": "2",
            "FLAGS": "--no-tensorboard --device cpu --threads 1 --cache off",
            "PYTHON": sys.executable,
        }
        self.environment = {**os.environ, **settings}

    def start(self, **settings: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(ROOT / "sweeps" / "methods.sh")],
            env={**self.environment, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

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


def test_a_finished_run_is_not_repeated_and_a_failed_one_is_named_while_the_others_run(sweep: Sweep) -> None:
    status, shown = sweep.run()
    assert status == 0, shown
    finished = sweep.finished()
    assert list(finished) == ["heads-seed3", "pcgrad-seed3"]
    config = json.loads((sweep.out / "pcgrad-seed3" / "config.json").read_text())
    assert (config["treatment"], config["seed"], config["draws_per_step"], config["steps_per_epoch"]) == (
        "pcgrad",
        3,
        16,
        1,
    )
    assert config["checkpoint"] == str(sweep.out / "heads-seed3")

    (sweep.out / "random-seed3").mkdir()  # a directory that is no run: the run refuses it
    status, shown = sweep.run(RUNS="random pcgrad drop_longest")
    assert status == 1
    assert shown.count("finished before") == 2
    assert "random-seed3: exit status 2, error: --out" in shown.split("failed:")[1]
    assert {name: time for name, time in sweep.finished().items() if name in finished} == finished
    assert "drop_longest-seed3" in sweep.finished()


def test_a_run_made_with_other_flags_is_no_run_of_this_sweep(sweep: Sweep) -> None:
    assert sweep.run(RUNS="none")[0] == 0
    status, shown = sweep.run(RUNS="none", FLAGS=f"{sweep.environment['FLAGS']} --weight_decay 0.5")
    assert status == 1
    assert "heads-seed3: was made with other flags" in shown.split("failed:")[1]


def test_a_stopped_sweep_goes_on_where_it_was(sweep: Sweep) -> None:
    settings = {"RUNS": "late_adapters", "EPOCHS": "40", "FLAGS": sweep.environment["FLAGS"] + " --eval_every 0"}
    process = sweep.start(**settings)
    log = sweep.out / "late_adapters-first-seed3" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130, shown
    assert "the same command goes on" in shown
    before = sweep.finished()
    assert list(before) == ["heads-seed3"]
    status, shown = sweep.run(**settings)
    assert status == 0, shown
    assert "heads-seed3: finished before" in shown and "late_adapters-first-seed3: goes on" in shown
    assert sorted(sweep.finished()) == sorted(f"{name}-seed3" for name in LATE)
    assert sweep.finished()["heads-seed3"] == before["heads-seed3"]
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 321))
