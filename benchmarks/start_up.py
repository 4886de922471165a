"""From the command to the end of the first training step, imports included, each in a process of its own.

    python -m benchmarks.start_up [--data DIR] [--rounds N] [--threads N]

The main job on the sample, `multitask_classifier.py --option finetune --scheduler pal --pcgrad`, until its log has a
line, and `--option finetune --pretrain_epochs 0` on the given data, with files that are tokenized then and with those
that an earlier run has left in the cache. `import torch` alone is the floor of them all.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks import harness, workload
from benchmarks.harness import ROOT, Check, MeasurementError, Options, Report, Step, Summary
from datasets import SAMPLE

MAIN, COLD, WARM = "the main job on the sample", "files tokenized", "files from the cache"
FLOOR = "import torch"
MAIN_FLAGS = "--option finetune --scheduler pal --pcgrad"
SHORT_FLAGS = "--option finetune --pretrain_epochs 0 --epochs 1 --steps_per_epoch 1 --eval_every 0"
PROGRAM = ROOT / "multitask_classifier.py"
AT_MOST = 6.0  # seconds, of the main job
TIME_OUT = 600  # seconds
POLL = 0.005


def until_first_step(command: Sequence[str], log: Path) -> None:
    """Runs a command until its log holds a line, then ends it. Raises MeasurementError if it ends before, or hangs."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        started = time.monotonic()
        while not (log.is_file() and log.stat().st_size):
            if process.poll() is not None or time.monotonic() - started > TIME_OUT:
                process.kill()
                raise MeasurementError(f"{' '.join(command)}: no first step; {process.communicate()[1].strip()}")
            time.sleep(POLL)
        process.kill()


def take_first_step(
    folder: Path, options: Options, checkpoint: Path, flags: str, data: Path, cache: str, number: int
) -> None:
    """folder: for the run's directory. cache: a folder, or "off"."""
    out = folder / f"run-{len(list(folder.iterdir()))}"
    given = ["--data", str(data), "--model", str(checkpoint), "--out", str(out), "--cache", cache, "--device", "cpu"]
    given += ["--threads", str(options.threads)]
    until_first_step([sys.executable, str(PROGRAM), *flags.split(), *given], out / "metrics.jsonl")


def measure(options: Options) -> Report:
    checkpoint = workload.Checkpoint.find(options.model).folder
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        step = partial(take_first_step, folder, options, checkpoint)
        kinds: dict[str, Step] = {
            MAIN: partial(step, MAIN_FLAGS, SAMPLE, "off"),
            COLD: partial(step, SHORT_FLAGS, options.data, "off"),
            WARM: partial(step, SHORT_FLAGS, options.data, str(folder / "cache")),
            FLOOR: lambda number: subprocess.run([sys.executable, "-c", "import torch"], check=True),
        }
        seconds = harness.alternate(kinds, options.rounds, warm_up=1)
    notes = ["files of Python and of the model come from the system's file cache: a round went before"]
    title = f"seconds from the command to the end of the first training step; ratios to {COLD}"
    checks = [Check("seconds of the main job on the sample", Summary.of(seconds[MAIN]).median, AT_MOST)]
    return Report(title, harness.lines_of(seconds, COLD, {}), checks, notes, {"rounds": options.rounds})


BENCHMARK = harness.Benchmark("start_up", __doc__, measure, rounds=7)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
