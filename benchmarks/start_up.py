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
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks import workload
from benchmarks.harness import (
    ROOT,
    Benchmark,
    Check,
    Line,
    MeasurementError,
    Options,
    Report,
    Step,
    Summary,
    alternate,
    ratios,
    run,
)
from datasets import SAMPLE

MAIN, COLD, WARM, ORDINARY, FLOOR = (
    "ours, the main job on the sample",
    "ours, files tokenized",
    "ours, files from the cache",
    "transformers script",
    "import torch",
)
AT_MOST = 6.0  # seconds, of the main job
TIME_OUT = 600  # seconds
POLL = 0.005


def until_first_step(command: Sequence[str], log: Path) -> None:
    """Runs a command until its log holds a line, then ends it."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        started = time.monotonic()
        while not (log.is_file() and log.stat().st_size):
            if process.poll() is not None or time.monotonic() - started > TIME_OUT:
                process.kill()
                raise MeasurementError(f"{' '.join(command)}: no first step; {process.communicate()[1].strip()}")
            time.sleep(POLL)
        process.kill()


class Setup:
    """Commands that write below a temporary folder."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.checkpoint = workload.Checkpoint.find(options.model).folder
        self.num_runs = 0

    def main_job(self, number: int) -> None:
        self._ours("--option finetune --scheduler pal --pcgrad", str(SAMPLE), "off")

    def ours(self, cache: str, number: int = 0) -> None:
        flags = "--option finetune --pretrain_epochs 0 --epochs 1 --steps_per_epoch 1 --eval_every 0"
        self._ours(flags, str(self.options.data), cache)

    def _ours(self, flags: str, data: str, cache: str) -> None:
        self.num_runs += 1
        out = self.folder / f"run{self.num_runs}"
        given = ["--data", data, "--model", str(self.checkpoint), "--out", str(out), "--cache", cache]
        given += ["--threads", str(self.options.threads), "--device", "cpu"]
        until_first_step([sys.executable, "multitask_classifier.py", *flags.split(), *given], out / "metrics.jsonl")

    def ordinary(self, number: int) -> None:
        self._wait("-m", "benchmarks.ordinary_script", str(self.options.data), str(self.checkpoint))

    def floor(self, number: int) -> None:
        self._wait("-c", "import torch; print('step', flush=True)")

    def _wait(self, *arguments: str) -> None:
        """Runs Python until it ends, or says that its step is done."""
        command = [sys.executable, *arguments]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            if process.stdout.readline() == "step\n":
                process.kill()
            elif process.wait():
                assert process.stderr is not None
                raise MeasurementError(f"{' '.join(command)}: {process.stderr.read().strip()}")


def measure(options: Options) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(options, Path(folder))
        kinds: dict[str, Step] = {
            MAIN: setup.main_job,
            COLD: partial(setup.ours, "off"),
            WARM: partial(setup.ours, str(Path(folder) / "cache")),
            ORDINARY: setup.ordinary,
            FLOOR: setup.floor,
        }
        seconds = alternate(kinds, options.rounds, warm_up=1)
    compared = {name: Summary.of(ratios(of, seconds[COLD])) for name, of in seconds.items()}
    lines = [Line(name, of, ratio=None if name == COLD else compared[name]) for name, of in seconds.items()]
    notes = ["files of Python and of the model come from the system's file cache: a round went before"]
    title = f"seconds from the command to the end of the first training step; ratios to {COLD}"
    checks = [Check("seconds of the main job on the sample", Summary.of(seconds[MAIN]).median, AT_MOST)]
    return Report(title, lines, checks, notes, {"rounds": options.rounds})


BENCHMARK = Benchmark("start_up", measure, rounds=7)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(BENCHMARK, __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(main())
