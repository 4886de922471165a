"""From the command to the end of the first training step, imports included, each in a process of its own.

    python -m benchmarks.start_up [--data DIR] [--rounds N] [--threads N]

Ours is the main job on the sample, `multitask_classifier.py --option finetune --scheduler pal --pcgrad`, until its log
has a line, and `--option finetune --pretrain_epochs 0` on the given data, with files that are tokenized then and with
those that an earlier run has left in the cache. The reference is the ordinary script with
transformers (ordinary_script.py), until it says that its step is done. `import torch` alone is the floor of them all.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks import harness, workload
from benchmarks.harness import ROOT, Benchmark, Check, MeasurementError, Options, Report, Step, Summary
from datasets import SAMPLE

MAIN, COLD, WARM, ORDINARY, FLOOR = (
    "ours, the main job on the sample",
    "ours, files tokenized",
    "ours, files from the cache",
    "transformers script",
    "import torch",
)
MAIN_FLAGS = "--option finetune --scheduler pal --pcgrad"
SHORT_FLAGS = "--option finetune --pretrain_epochs 0 --epochs 1 --steps_per_epoch 1 --eval_every 0"
AT_MOST = 6.0  # seconds, of the main job
TIME_OUT = 600  # seconds
POLL = 0.005


def wait_for(command: Sequence[str], is_done: Callable[[], bool]) -> None:
    """Runs a command until something is done, then ends it. Raises MeasurementError if it ends before, or hangs."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        started = time.monotonic()
        while not is_done():
            if process.poll() is not None or time.monotonic() - started > TIME_OUT:
                process.kill()
                raise MeasurementError(f"{' '.join(command)}: no first step; {process.communicate()[1].strip()}")
            time.sleep(POLL)
        process.kill()


class Setup:
    """Commands that write below a temporary folder, each into a file of its own when its step is done."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.checkpoint = workload.Checkpoint.find(options.model).folder
        self.num_runs = 0

    def _wait(self, command: Sequence[str], file: str) -> None:
        """file: below the run's folder, whose path ends the command."""
        self.num_runs += 1
        run = self.folder / f"run{self.num_runs}"
        log = run / file
        wait_for([sys.executable, *command, str(run)], lambda: log.is_file() and log.stat().st_size > 0)

    def ours(self, flags: str, data: Path, cache: str, number: int = 0) -> None:
        given = ["--data", str(data), "--model", str(self.checkpoint), "--cache", cache, "--device", "cpu"]
        given += ["--threads", str(self.options.threads), "--out"]
        self._wait([str(ROOT / "multitask_classifier.py"), *flags.split(), *given], "metrics.jsonl")

    def ordinary(self, number: int = 0) -> None:
        self._wait(["-m", "benchmarks.ordinary_script", str(self.options.data), str(self.checkpoint)], "done")

    def floor(self, number: int = 0) -> None:
        code = "import torch, pathlib, sys; p = pathlib.Path(sys.argv[1]); p.mkdir(); (p / 'done').write_text('step')"
        self._wait(["-c", code], "done")


def measure(options: Options) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(options, Path(folder))
        kinds: dict[str, Step] = {
            MAIN: partial(setup.ours, MAIN_FLAGS, SAMPLE, "off"),
            COLD: partial(setup.ours, SHORT_FLAGS, options.data, "off"),
            WARM: partial(setup.ours, SHORT_FLAGS, options.data, str(Path(folder) / "cache")),
            ORDINARY: setup.ordinary,
            FLOOR: setup.floor,
        }
        seconds = harness.alternate(kinds, options.rounds, warm_up=1)
    notes = ["files of Python and of the model come from the system's file cache: a round went before"]
    title = f"seconds from the command to the end of the first training step; ratios to {COLD}"
    checks = [Check("seconds of the main job on the sample", Summary.of(seconds[MAIN]).median, AT_MOST)]
    return Report(title, harness.lines_of(seconds, COLD), checks, notes, {"rounds": options.rounds})


BENCHMARK = Benchmark("start_up", __doc__, measure, rounds=7)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
