"""Predicting the dev files: ours on packed rows of similar length against transformers on padded batches.

    python -m benchmarks.evaluation_throughput [--data DIR] [--rounds N] [--threads N]

Both predict every dev row of every task in batches of 64, without dropout and without gradients, with the same weights.
The reference takes the rows in the order of their file and pads each batch to its longest row. Ours predicts as the
program does: the rows that share a batch are its own business, as no prediction depends on them.
"""

import sys
from collections.abc import Callable

from benchmarks import reference, workload
from benchmarks.harness import Benchmark, Check, Line, Options, Report, Step, Summary, alternate
from benchmarks.matmul_limit import MatmulLimit, left_out
from evaluation import predict_all

OURS, PADDED, LIMIT = "ours", "transformers, padded, file order", "matrix products alone"
BATCH_SIZE = 64


class Setup:
    """The checkpoint and the dev rows; a step returns the logits of each task."""

    def __init__(self, options: Options) -> None:
        self.checkpoint = workload.Checkpoint.find(options.model)
        self.rows = self.checkpoint.rows(options.data, "dev")
        self.model = self.checkpoint.model(tuple(self.rows))

    def padded(self) -> Step:
        model, size = reference.PaddedBert(self.model).eval(), (BATCH_SIZE, workload.CPU)
        return lambda number: {t: reference.predict_logits(model, t, of, *size) for t, of in self.rows.items()}

    def makers(self) -> dict[str, Callable[[], Step]]:
        size = (BATCH_SIZE, workload.CPU)
        return {OURS: lambda: lambda number: predict_all(self.model, self.rows, *size), PADDED: self.padded}


def measure(options: Options) -> Report:
    setup = Setup(options)
    batches = [lengths for of in setup.rows.values() for lengths in workload.batch_lengths(of, BATCH_SIZE)]
    limit = MatmulLimit(setup.checkpoint.config, batches, training=False)
    makers = setup.makers()
    kinds: dict[str, Step] = {name: make() for name, make in makers.items()}
    seconds = alternate({**kinds, LIMIT: lambda number: limit.run(*batches)}, options.rounds, warm_up=1)

    least = [limit.seconds(batches, took) for took in seconds[LIMIT]]
    shares = {name: Summary.of_ratios(least, seconds[name]).median for name in makers}
    num_rows = sum(map(len, batches))
    rates = {name: [num_rows / took for took in seconds[name]] for name in makers}
    ratios = {PADDED: Summary.of_ratios(rates[PADDED], rates[OURS])}
    memory = {name: BENCHMARK.memory(name, options) for name in makers}
    lines = [Line(name, rates[name], "rows/s", ratios.get(name), shares[name], memory[name]) for name in makers]
    ours, other = kinds[OURS](0), kinds[PADDED](0)
    difference = max(float((ours[task] - other[task]).abs().max()) for task in ours)
    gain = Summary.of_ratios(rates[OURS], rates[PADDED])
    checks = [
        Check("the reference's rows in a second over ours", 1 / gain.median, 1 / 2.5),
        Check("largest difference of two logits for one row", difference, 1e-4, must_hold=True),
    ]
    notes = [
        left_out(setup.checkpoint.config, batches, shares[OURS]),
        f"ours predicts {gain.median:.2f} times as many rows a second ({gain.smallest:.2f} to {gain.largest:.2f})",
    ]
    settings = {"rounds": options.rounds, "batch_size": BATCH_SIZE, "rows": workload.row_counts(setup.rows)}
    return Report("rows predicted in a second, all dev files; ratios to ours", lines, checks, notes, settings)


BENCHMARK = Benchmark("evaluation_throughput", __doc__, measure, lambda options: Setup(options).makers(), rounds=5)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
