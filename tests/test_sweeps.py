"""The shell sweeps: finished runs are not repeated, stopped ones go on, failed ones are named."""

import itertools
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
from helpers import ROOT, THREE
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
        gpus = {"CUDA_VISIBLE_DEVICES": "", "SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
        self.environment = {**os.environ, **gpus, **settings}

    def start(self, *under: str, **settings: str) -> subprocess.Popen[str]:
        command = ["bash", *under, str(ROOT / "sweeps" / "methods.sh")]
        environment = {**self.environment, **settings}
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=environment, start_new_session=True, **streams)

    def run(self, **settings: str) -> tuple[int, str]:
        process = self.start(**settings)
        shown, _ = process.communicate(timeout=300)
        return process.returncode, shown

    def lives(self) -> list[dict[str, Any]]:
        """Of each process that was a run its name, its GPU, and when it began and ended, in the order of their ends."""
        return [json.loads(line) for line in (self.plan.with_name("lives.jsonl")).read_text().splitlines()]

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
    status, shown = sweep.run(RUNS="pcgrad late_adapters pcgrad")
    assert status == 1
    lines = [line.strip() for line in shown.split("failed:\n")[1].splitlines()]
    assert len(lines) == 4, "each once"
    reasons = dict(line.split(": ", 1) for line in lines)
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


def test_jobs_and_locks_that_make_no_sense_are_one_line(sweep: Sweep) -> None:
    for jobs in ("0", "two"):
        assert sweep.run(JOBS=jobs) == (2, f"JOBS: {jobs}, expected a number above 0\n")
    folder = sweep.plan.parent / "bin"
    folder.mkdir()
    (folder / "flock").write_text("#!/bin/sh\necho 'flock: 9: No locks available' >&2\nexit 71\n")
    (folder / "flock").chmod(0o755)
    status, shown = sweep.run(RUNS="mlm", PATH=f"{folder}:{os.environ['PATH']}")
    assert status == 1
    reason = f"{sweep.out}/mlm-seed3.lock cannot be locked, expected OUT on a file system with locks (flock)"
    assert shown.endswith(f"failed:\n  heads-seed3: {reason.replace('mlm', 'heads')}\n  mlm-seed3: {reason}\n")
    assert not sweep.finished()


def test_settings_differ_are_accepted_and_take_the_same_number_of_rows(sweep: Sweep) -> None:
    status, shown = sweep.run(RUNS="", EPOCHS="4", STEPS="2")
    assert status == 0, shown
    names = sweep.run(RUNS="typo")[1].split("expected some of: ")[1].split()
    configs = {path.parent.name: json.loads(path.read_text()) for path in sweep.out.glob("*/config.json")}
    lines = {name.removesuffix("-seed3"): config["argv"] for name, config in configs.items()}
    separate = {f"separate-{task}": task for task in THREE}
    assert set(lines) == {*names, *separate, "heads", "heads-individual", "late_adapters-first"} - {"separate"}
    assert lines["soup"][-5:-2] == [str(sweep.out / f"{name}-seed3") for name in ("pal", "random", "temperature")]
    runs = {name: parse(words) for name, words in lines.items()}
    treatments = {run.treatment for run in runs.values()}
    assert treatments == {"sum", *TREATMENTS, *METHODS} - {"GradVac", "PCGrad", "Sum", "Mean", "Constant"}  # said twice
    assert all((run.name, run.seed, Path(run.out).name) == (n, 3, f"{n}-seed3") for n, run in runs.items())
    tuned = {name: run for name, run in runs.items() if not name.startswith("heads") and name != "soup"}
    rows = {name: run.epochs * run.steps_per_epoch * run.rows_per_step for name, run in tuned.items()}
    assert rows == {name: 16 if name.startswith("late") else 32 for name in rows}
    first = {name: Path(run.checkpoint).name.removesuffix("-seed3") for name, run in tuned.items()}
    others = dict.fromkeys(("individual", *separate), "heads-individual") | {"late_adapters": "late_adapters-first"}
    assert all(run.tasks == ((separate[name],) if name in separate else THREE) for name, run in tuned.items())
    assert first == {name: others.get(name, "heads") for name in rows} | dict.fromkeys(("mlm", "siamese", "mlp"), "")
    assert len({str(replace(run, out="", name="")) for run in runs.values()}) == len(runs)


def test_a_stopped_sweep_goes_on_where_it_was(sweep: Sweep) -> None:
    first = "late_adapters-first-seed3"
    sweep.plan.write_text(json.dumps({first: {"means": [0.1, 0.2], "pause": 60, "saving": 0.3}}))
    process, log = sweep.start(RUNS="late_adapters"), sweep.out / first / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    for _ in range(2):  # Slurm sends it to every process
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.1)
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


def test_each_run_has_a_gpu_of_its_own_and_a_free_gpu_takes_the_next(sweep: Sweep) -> None:
    pauses = {"pal": 0.2, "random": 1.2, "round_robin": 0.2, "pcgrad": 0.2}
    plans = {f"{name}-seed3": {"means": [0.1], "pause": pause} for name, pause in pauses.items()}
    sweep.plan.write_text(json.dumps(plans))
    status, shown = sweep.run(RUNS=" ".join(pauses), CUDA_VISIBLE_DEVICES="0,1")
    assert status == 0, shown
    of_gpu: dict[str, list[Any]] = {}
    for life in sorted(sweep.lives()[1:], key=lambda life: life["began"]):
        of_gpu.setdefault(life["gpu"], []).append(life)
    assert [life["name"] for life in of_gpu["1"]] == ["random-seed3"]
    assert [life["name"] for life in of_gpu["0"]] == ["pal-seed3", "round_robin-seed3", "pcgrad-seed3"]
    gaps = [after["began"] - before["ended"] for before, after in itertools.pairwise(of_gpu["0"])]
    assert all(0 <= gap < 2 for gap in gaps)


def test_gpus_are_those_of_nvidia_smi_and_shared_by_more_jobs(sweep: Sweep) -> None:
    folder = sweep.plan.parent / "bin"
    folder.mkdir()
    (folder / "nvidia-smi").write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    (folder / "nvidia-smi").chmod(0o755)
    del sweep.environment["CUDA_VISIBLE_DEVICES"]
    sweep.plan.write_text(json.dumps({"*": {"pause": 0.5}}))
    status, shown = sweep.run(RUNS="pal random pcgrad", JOBS="3", PATH=f"{folder}:{os.environ['PATH']}")
    assert status == 0, shown
    assert sorted(life["gpu"] for life in sweep.lives()[1:]) == ["0", "0", "1"]


def test_tasks_of_an_array_make_every_run_once_and_a_killed_one_goes_on_when_it_is_queued_again(sweep: Sweep) -> None:
    names = ["pal", "random", "round_robin", "soup", "temperature"]
    sweep.plan.write_text(json.dumps({"heads-seed3": {"means": [0.1, 0.2], "pause": 1}, "*": {"pause": 0.3}}))
    slurm = str(ROOT / "sweeps" / "slurm.sh")
    tasks = [sweep.start(slurm, RUNS=" ".join(names)) for _ in range(4)]
    deadline = time.monotonic() + 60
    while not list(sweep.out.glob("heads-seed3/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    session = json.loads((sweep.out / "heads-seed3" / "config.json").read_text())["session"]
    killed = next(task for task in tasks if task.pid == session)
    os.killpg(session, signal.SIGKILL)
    tasks.append(sweep.start(slurm, RUNS=" ".join(names)))
    shown = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks if task is not killed] == [0] * 4, shown
    assert list(sweep.finished()) == [f"{name}-seed3" for name in sorted([*names, "heads"])]
    assert sorted(life["name"] for life in sweep.lives()) == list(sweep.finished()), "each came to its end once"
    assert "heads-seed3: goes on" in "".join(shown)
    assert "all runs are finished" in "".join(shown)


def test_an_array_without_a_sweep_is_refused() -> None:
    done = subprocess.run(["bash", str(ROOT / "sweeps" / "slurm.sh")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("no sweep given, expected: sbatch")


def test_a_task_whose_time_is_up_lets_its_run_save_and_queues_again(sweep: Sweep) -> None:
    folder = sweep.plan.parent / "bin"
    folder.mkdir()
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >"{folder}/called"\n')
    (folder / "scontrol").chmod(0o755)
    sweep.plan.write_text(json.dumps({"heads-seed3": {"means": [0.1, 0.2], "pause": 60, "saving": 0.3}}))
    task = sweep.start(str(ROOT / "sweeps" / "slurm.sh"), PATH=f"{folder}:{os.environ['PATH']}")
    log = sweep.out / "heads-seed3" / "metrics.jsonl"
    while not (log.exists() and log.stat().st_size):
        time.sleep(0.02)
    task.send_signal(signal.SIGUSR1)
    shown, _ = task.communicate(timeout=60)
    assert task.returncode == 130 and "heads-seed3: exit status 143, stopped" in shown
    assert (folder / "called").read_text() == "requeue 7_3\n", "7 is the whole array"
