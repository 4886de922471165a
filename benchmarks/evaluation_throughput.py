"""Predicting the dev files: ours on packed rows of similar length against transformers on padded batches.

    python -m benchmarks.evaluation_throughput [--data DIR] [--rounds N] [--threads N]

Both predict every dev row of every task in batches of 64, without dropout and without gradients, with the same weights.
The reference takes the rows in the order of their file and pads each batch to its longest row. Ours predicts as the
program does: the rows that share a batch are its own business, as no prediction depends on them.
"""

import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from benchmarks import reference, workload
from benchmarks.harness import (
    Benchmark,
    Check,
    Line,
    MatmulLimit,
    Options,
    Report,
    Step,
    Summary,
    alternate,
    left_out,
    ratios,
    run,
)
from benchmarks.reference import PaddedBert
from evaluation import predict_logits

OURS, PADDED, LIMIT = "ours", "transformers, padded, file order", "matrix products alone"
BATCH_SIZE = 64
QUICK_ROWS = 200


class Setup:
    """The checkpoint and the dev rows; predictions land in `predictions` by kind and task."""

    def __init__(self, options: Options) -> None:
        self.checkpoint = workload.Checkpoint.find(options.model)
        rows = self.checkpoint.rows(options.data, "dev")
        self.rows = workload.subset(rows, QUICK_ROWS) if options.quick else rows
        self.model = self.checkpoint.model(tuple(rows))
        self.predictions: dict[str, dict[str, torch.Tensor]] = {}

    def ours(self) -> Step:
        def predict(number: int) -> None:
            self.predictions[OURS] = {
                task: predict_logits(self.model, task, of, BATCH_SIZE, workload.CPU) for task, of in self.rows.items()
            }

        return predict

    def padded(self) -> Step:
        model = PaddedBert.from_checkpoint(self.checkpoint.folder, self.model).eval()

        def predict(number: int) -> None:
            self.predictions[PADDED] = {
                task: reference.predict_logits(model, task, of, BATCH_SIZE, workload.CPU)
                for task, of in self.rows.items()
            }

        return predict

    def batch_lengths(self) -> list[np.ndarray]:
        """(B,) tokens of the rows of each of our batches."""
        batches = []
        for of in self.rows.values():
            ordered = of.tokens.lengths[of.by_length()]
            batches += [ordered[start : start + BATCH_SIZE] for start in range(0, len(ordered), BATCH_SIZE)]
        return batches


def variants(options: Options) -> Mapping[str, Callable[[], Step]]:
    setup = Setup(options)
    return {OURS: setup.ours, PADDED: setup.padded}


def measure(options: Options) -> Report:
    setup = Setup(options)
    batches = setup.batch_lengths()
    limit = MatmulLimit(setup.checkpoint.config, batches, training=False)
    kinds = {OURS: setup.ours(), PADDED: setup.padded(), LIMIT: lambda number: limit.run(*batches)}
    seconds = alternate(kinds, options.rounds, warm_up=1)
    least = [limit.seconds(batches, of) for of in seconds[LIMIT]]
    num_rows = sum(workload.row_counts(setup.rows).values())
    rates = {name: [num_rows / of for of in seconds[name]] for name in (OURS, PADDED)}
    lines = [
        Line(
            name,
            rates[name],
            "rows/s",
            None if name == OURS else Summary.of(ratios(rates[name], rates[OURS])),
            Summary.of(ratios(least, seconds[name])).median,
            BENCHMARK.memory(name, options),
        )
        for name in (OURS, PADDED)
    ]
    ours, other = setup.predictions[OURS], setup.predictions[PADDED]
    difference = max(float((ours[task] - other[task]).abs().max()) for task in ours)
    settings = {"rounds": options.rounds, "batch_size": BATCH_SIZE, "rows": workload.row_counts(setup.rows)}
    gain = Summary.of(ratios(rates[OURS], rates[PADDED]))
    checks = [
        Check("the reference's rows in a second over ours", 1 / gain.median, 1 / 2.5),
        Check("largest difference of two logits for one row", difference, 1e-4, must_hold=True),
    ]
    assert lines[0].matmul_share is not None
    notes = [
        left_out(setup.checkpoint.config, batches, lines[0].matmul_share),
        f"ours predicts {gain.median:.2f} times as many rows a second ({gain.smallest:.2f} to {gain.largest:.2f})",
    ]
    return Report("rows predicted in a second, all dev files; ratios to ours", lines, checks, notes, settings)


BENCHMARK = Benchmark("evaluation_throughput", measure, variants, rounds=5)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(BENCHMARK, __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(main())
