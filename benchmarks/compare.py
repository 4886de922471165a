"""This checkout against another one, on the same machine in the same hour.

    python -m benchmarks.compare OTHER_CHECKOUT [--data DIR] [--model NAME] [--rounds N]

Each checkout has a process of its own, which imports that checkout's modules (worker.py). They take turns, one waiting
while the other works. Printed: medians, and how many times as long the other one takes, two rounds at a time: who comes
second in a round does so first in the next.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.harness import ERRORS, ROOT, MeasurementError, Summary, alternate, make_parser, significant, spread

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


def measure(other: Path, data: Path, model: str, rounds: int) -> str:
    """A table, a line for each kind."""
    from tabulate import tabulate

    workers = {"this": Worker(ROOT, data, model), "other": Worker(other, data, model)}
    rows = []
    try:
        for kind, what in KINDS.items():
            steps = {name: partial(of.take_step, kind) for name, of in workers.items()}
            seconds = alternate(steps, rounds + rounds % 2)
            medians = [f"{significant(1000 * Summary.of(of).median)} ms" for of in seconds.values()]
            pairs = {name: np.add(of[::2], of[1::2]).tolist() for name, of in seconds.items()}
            rows.append([what, *medians, spread(Summary.of_ratios(pairs["other"], pairs["this"]))])
    finally:
        for worker in workers.values():
            worker.process.kill()
            worker.process.wait()
    header = ["", "this checkout", "the other", "the other over this (quartiles)"]
    return str(tabulate(rows, header, tablefmt="pipe", disable_numparse=True))


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
