"""Runs of ten settings, killed at random moments and resumed: `python tests/kill_campaign.py FOLDER [KILLS] [SEED]`.

Minutes, and therefore not part of the tests. Each process is forked from this one, which has imported everything. A
killed run, once it has ended, must be to the bit what an undisturbed one is, and hold the same files.
"""

import argparse
import itertools
import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib
import scipy.stats  # noqa: F401
import sklearn.metrics  # noqa: F401
import torch
from matplotlib.backends import backend_agg, backend_svg  # noqa: F401
from matplotlib.figure import Figure
from test_command import METHODS
from torch.utils import tensorboard  # noqa: F401

import multitask_classifier
from helpers import write_checkpoint, write_data

TIMED = {"seconds", "peak_memory_mb", "examples_per_second", "dev_examples_per_second", "metrics_size"}
TIMED |= {"metrics_sha256", "out", "checksum"}
SETTINGS = {name: METHODS[name] for name in METHODS if name not in ("PCD", "UW")} | {
    "plain": "--save_every 5 --tensorboard",
    "heads": "--option individual_pretrain --format svg",
}


FIGURE = Figure.__init__


def plain_figure(figure: Figure, *args: Any, **options: Any) -> None:
    """A small figure without a layout, which takes longer than all else in these runs."""
    FIGURE(figure, *args, **{**options, "dpi": 30, "layout": None})


def start(arguments: Sequence[str], log: Path) -> int:
    """The process of a command, whose output goes to a file."""
    if process := os.fork():
        return process
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    status = 99
    try:
        status = multitask_classifier.main(arguments)
    finally:
        sys.stdout.flush()
        os._exit(status)


def killed(process: int, after: float, until: Path | None = None) -> bool:
    """Whether the process still ran after so many seconds, or until something was there, and was killed. Raises
    SystemExit if it failed."""
    deadline = time.monotonic() + after
    while time.monotonic() < deadline and not (until and until.exists()):
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            if status:
                raise SystemExit(f"status {status}")
            return False
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return True


def untimed(value: Any) -> Any:
    """Without what a clock has measured, and the name of the directory."""
    if isinstance(value, dict):
        return {name: untimed(part) for name, part in value.items() if name not in TIMED}
    return value


def contents(run: Path) -> dict[str, Any]:
    """Of each file of a run what has to be the same."""
    found: dict[str, Any] = {}
    for path in run.rglob("*"):
        name = re.sub(r"tfevents.*", "tfevents", str(path.relative_to(run)))
        if path.suffix in (".json", ".jsonl"):
            found[name] = [untimed(json.loads(line)) for line in _documents(path)]
        elif path.is_file():
            found[name] = (
                name if {"tensorboard", "SHA256SUMS", ".lock"} & {path.parent.name, path.name} else path.read_bytes()
            )
    return found


def _documents(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]


def place(run: Path) -> str:
    """How far a run had come when it was killed."""
    if not (run / "config.json").exists():
        return "before its settings"
    if (run / "results.json").exists():
        return "after its results"
    if (run / "plots").exists():
        return "plots"
    if (run / "predictions").exists():
        return "last evaluation"
    log = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return json.loads(log[-2])["stage"] if len(log) > 1 else "start"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a new one, for the runs")
    parser.add_argument("kills", type=int, nargs="?", default=100)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    args = parser.parse_args()
    folder, num_kills, seed = args.folder, args.kills, args.seed
    torch.set_num_threads(1)
    os.environ["SOURCE_DATE_EPOCH"], matplotlib.rcParams["svg.hashsalt"] = "0", "salt"  # of pictures as svg
    Figure.__init__ = plain_figure  # type: ignore[method-assign]
    folder.mkdir()
    (folder / "model").mkdir()
    model, data = write_checkpoint(folder / "model"), write_data(folder / "data")
    draw, places, wrong = random.Random(seed), Counter[str](), list[str]()
    base = f"--model {model} --data {data} --device cpu --cache off --steps_per_epoch 12 --batch_size 4"
    for name, flags in SETTINGS.items():
        epochs = "--pretrain_epochs 2" + ("" if "individual" in flags else " --epochs 2")
        arguments = [*base.split(), *epochs.split(), *flags.split()]
        arguments += [] if "--tensorboard" in arguments else ["--no-tensorboard"]
        first, whole, times = folder / name / "first", folder / name / "whole", [time.monotonic()]
        for out, until in ((first, first / "predictions"), (whole, None)):  # as far as the last evaluation; all
            killed(start([*arguments, "--out", str(out)], folder / "log"), 600, until)
            times.append(time.monotonic())
        trained, lasted = times[1] - times[0], (times[2] - times[1]) * 0.9
        expected = contents(whole)
        kills = 0
        for number in itertools.count():
            if kills == num_kills // len(SETTINGS):
                break
            out, chain = folder / name / f"run{number}", list[str]()
            while True:
                again = ["--resume", str(out)] if (out / "config.json").exists() else [*arguments, "--out", str(out)]
                is_last = kills == num_kills // len(SETTINGS) or len(chain) == 3
                after = 600 if is_last else draw.uniform(0, draw.choice([trained, trained, lasted]))
                if (out / "results.json").exists() or not killed(start(again, folder / "log"), after):
                    break
                kills += 1
                chain.append(place(out))
            places.update(chain)
            found = contents(out)
            different = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
            print(f"{name}, killed in {', '.join(chain)}: {different or 'the same'}", flush=True)
            wrong += [f"{out}: {different}"] if different else []
    print(f"{sum(places.values())} kills ({dict(places)}); runs that differ: {wrong or 'none'}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
