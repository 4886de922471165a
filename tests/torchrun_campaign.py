"""One of three processes of a run under torchrun killed in a step, in an evaluation or while a checkpoint is written:
`python tests/torchrun_campaign.py FOLDER [KILLS] [SEED]`.

Minutes, and therefore not part of the tests. The others must end within a minute with one line, and the resumed run
must be to the bit what an undisturbed one is.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kill_campaign import contents

from helpers import ROOT, write_checkpoint, write_data

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
FLAGS = "--pcgrad --bregman --average ema --epochs 12 --pretrain_epochs 2 --steps_per_epoch 12 --batch_size 4"
FLAGS += " --eval_batch_size 1 --device cpu --cache off --no-tensorboard --threads 1 --save_every 6"
LINE = "error: another process of this run has ended or cannot be reached ("


def last_record(run: Path) -> dict[str, object]:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    try:
        return json.loads(lines[-1])  # type: ignore[no-any-return]
    except (IndexError, ValueError):
        return {}


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "step": lambda run: "loss" in (record := last_record(run)) and record["step"] % 12 != 0,  # type: ignore[operator]
    "evaluation": lambda run: "loss" in (record := last_record(run)) and record["step"] % 12 == 0,  # type: ignore[operator]
    "checkpoint": lambda run: (run / "last.tmp").exists(),
}


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            [*TORCHRUN, str(ROOT / "multitask_classifier.py"), *arguments], stdout=file, stderr=file
        )


def workers(agent: int) -> list[int]:
    """The processes of the command, in the order of their ranks."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            variables = dict(
                item.split(b"=", 1) for item in (path / "environ").read_bytes().split(b"\0") if b"=" in item
            )
        except OSError:
            continue
        if parent == agent and b"RANK" in variables:
            found.append((int(variables[b"RANK"]), int(path.name)))
    return [process for _, process in sorted(found)]


def kill_at(run: Path, agent: subprocess.Popen[bytes], moment: str, num_steps: int, rank: int) -> bool:
    """Whether it was killed: at the first such moment after so many steps."""
    while agent.poll() is None:
        log = run / "metrics.jsonl"
        if log.exists() and log.read_bytes().count(b"\n") >= num_steps and MOMENTS[moment](run):
            os.kill(workers(agent.pid)[rank], signal.SIGKILL)
            return True
        time.sleep(0.001)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a new one, for the runs")
    parser.add_argument("kills", type=int, nargs="?", default=10)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    args = parser.parse_args()
    folder, num_kills, seed = args.folder, args.kills, args.seed
    folder.mkdir()
    (folder / "model").mkdir()
    model, data = write_checkpoint(folder / "model"), write_data(folder / "data")
    base = [*FLAGS.split(), "--model", str(model), "--data", str(data)]
    whole, draw, problems = folder / "whole", random.Random(seed), []
    assert start([*base, "--out", str(whole)], folder / "log").wait() == 0
    expected = contents(whole)
    for number in range(num_kills):
        out, log, moment = folder / f"run{number}", folder / f"log{number}", [*MOMENTS][number % len(MOMENTS)]
        agent, rank = start([*base, "--out", str(out)], log), draw.randrange(3)
        was_killed = kill_at(out, agent, moment, draw.randrange(10, 150), rank)
        killed = time.monotonic()
        status, lasted = agent.wait(), time.monotonic() - killed
        text, stands = log.read_text(), last_record(out)
        resumed = start(["--resume", str(out)], folder / f"log{number}.resumed").wait()
        found = contents(out)
        different = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
        is_right = was_killed and status != 0 and lasted < 60 and text.count(LINE) == text.count("error: ") == 1
        where = f"{moment} of {stands.get('stage')} step {stands.get('step')}, process {rank}"
        how = f"status {status} after {lasted:.1f} s, lines {text.count(LINE)}, resumed {resumed}"
        print(f"{where}: {how}, {different or 'the same'}", flush=True)
        problems += [] if is_right and not resumed and not different else [str(out)]
    print(f"{num_kills} kills; wrong: {problems or 'none'}")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
