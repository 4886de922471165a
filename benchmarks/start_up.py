"""From the command to the end of the first training step, imports included, each in a process of its own.

    python -m benchmarks.start_up [--data DIR] [--rounds N] [--threads N]

Ours is `multitask_classifier.py --option finetune --pretrain_epochs 0`, until its log has a line: with data files that
are tokenized then, and with those that an earlier run has left in the cache. The reference is the ordinary script with
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

COLD, WARM, ORDINARY, FLOOR = (
    "ours, files tokenized",
    "ours, files from the cache",
    "transformers script",
    "import torch",
)
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

    def ours(self, cache: str, number: int = 0) -> None:
        self.num_runs += 1
        out = self.folder / f"run{self.num_runs}"
        flags = "--option finetune --pretrain_epochs 0 --epochs 1 --steps_per_epoch 1 --eval_every 0 --device cpu"
        given = ["--data", str(self.options.data), "--model", str(self.checkpoint), "--out", str(out), "--cache", cache]
        given += ["--threads", str(self.options.threads)]
        command = [sys.executable, "multitask_classifier.py", *flags.split(), *given]
        until_first_step(command, out / "metrics.jsonl")

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
            COLD: partial(setup.ours, "off"),
            WARM: partial(setup.ours, str(Path(folder) / "cache")),
            ORDINARY: setup.ordinary,
            FLOOR: setup.floor,
        }
        seconds = alternate(kinds, options.rounds, warm_up=1)
    compared = {name: Summary.of(ratios(of, seconds[COLD])) for name, of in seconds.items()}
    lines = [Line(name, of, ratio=None if name == COLD else compared[name]) for name, of in seconds.items()]
    notes = ["files of Python and of the model come from the system's file cache: a round went before"]
    title = "seconds from the command to the end of the first training step; ratios to the first line"
    return Report(title, lines, notes=notes, settings={"rounds": options.rounds})


BENCHMARK = Benchmark("start_up", measure, rounds=7)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(BENCHMARK, __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(main())
