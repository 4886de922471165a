"""This checkout against another one, on the same machine in the same hour.

    python -m benchmarks.compare OTHER_CHECKOUT [--data DIR] [--model NAME] [--rounds N]

Each checkout has a process of its own, which imports that checkout's modules (worker.py). They take turns, one waiting
while the other works. Two rounds count as one: who comes second in a round does so first in the next.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.harness import ERRORS, ROOT, MeasurementError, Report, alternate, lines_of, make_parser

ROUNDS = 25
WORKER = Path(__file__).resolve().with_name("worker.py")
KINDS = {
    "training": "training step, 32 rows of one task",
    "pcgrad": "PCGrad step, 32 rows of each task",
    "prediction": "prediction of 1,200 rows",
}


class Worker:
    """The process of a checkout. (-P: what lies beside worker.py is not among its modules.)"""

    def __init__(self, checkout: Path, data: Path, model: str) -> None:
        self.checkout = checkout
        command = [sys.executable, "-P", str(WORKER), str(data.resolve()), model]
        environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)

    def take_step(self, kind: str, number: int) -> None:
        """Raises MeasurementError if the process ends instead; it says why on standard error."""
        requests, answers = self.process.stdin, self.process.stdout
        assert requests is not None and answers is not None
        with contextlib.suppress(BrokenPipeError):
            print(kind, number, file=requests, flush=True)
        if answers.readline() != "done\n":
            raise MeasurementError(f"{self.checkout}: its process ended at a {KINDS[kind]}")


def measure(other: Path, data: Path, model: str, rounds: int) -> Report:
    """Two lines for each kind."""
    workers = {"this checkout": Worker(ROOT, data, model), "the other": Worker(other, data, model)}
    lines = []
    try:
        for kind, what in KINDS.items():
            steps = {f"{what}, {name}": partial(of.take_step, kind) for name, of in workers.items()}
            seconds = alternate(steps, rounds + rounds % 2)
            pairs = {name: (np.add(of[::2], of[1::2]) / 2).tolist() for name, of in seconds.items()}
            lines += lines_of(pairs, next(iter(steps)))
    finally:
        for worker in workers.values():
            worker.process.kill()
            worker.process.wait()
    return Report("seconds, the mean of two rounds; ratios to this checkout", lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for an error."""
    parser = make_parser("benchmarks.compare", __doc__, ROUNDS)
    parser.add_argument("other", type=Path, metavar="OTHER_CHECKOUT")
    given = parser.parse_args(arguments)
    if not (given.other / "benchmarks" / "workload.py").is_file():
        parser.error(f"{given.other}: no benchmarks/workload.py, expected another checkout of this project")
    try:
        print(measure(given.other, given.data, given.model, given.rounds or ROUNDS))
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
