"""An optimizer step: ours on packed tokens against the ordinary loop with transformers on padded batches.

    python -m benchmarks.training_step [--data DIR] [--rounds N] [--threads N]

Both train the same encoder from the same checkpoint on batches of 32 random rows of one task, drawn in turn, the very
same rows in each step: forward with dropout, backward, clipping, AdamW. The ordinary loop is transformers' BertModel
with scaled-dot-product attention, batches padded to their longest row, torch.optim.AdamW as it comes. Its second form
makes batches of rows of similar length (group_by_length), which pad less and see other rows; it is compared by the row.

The matmul limit is what the matrix products of a step over its real tokens take at the rate at which the faster
library does those of the dense layers, measured in every round on the same number of tokens.
"""

import sys
from collections.abc import Callable
from functools import cached_property

import numpy as np

from benchmarks import harness, workload
from benchmarks.harness import WARM_UP, Check, Line, Options, Report, Step, Summary
from benchmarks.matmul_limit import MatmulLimit, left_out
from benchmarks.reference import OrdinaryLoop, PaddedBert, length_grouped_batches

OURS, PADDED, GROUPED = "ours", "transformers, padded", "transformers, grouped by length"
LIMIT = "matrix products alone"


class Setup:
    """The checkpoint, the rows, and what each step sees of them."""

    def __init__(self, options: Options) -> None:
        self.checkpoint = workload.Checkpoint.find(options.model)
        self.rows = self.checkpoint.rows(options.data, "train")
        self.draws = workload.Draws(self.rows)
        self.num_steps = WARM_UP + options.rounds

    @cached_property
    def grouped(self) -> list[workload.Draw]:
        """For each step rows of similar length of one task, the tasks in turn, all lengths in their proportion."""
        num_batches = -(-self.num_steps // len(self.rows))
        batches = {
            task: length_grouped_batches(of.tokens.lengths, workload.BATCH_SIZE, num_batches)
            for task, of in self.rows.items()
        }
        return [(task, batches[task][i]) for i in range(num_batches) for task in self.rows][: self.num_steps]

    def ours(self) -> Step:
        return workload.step_of(workload.full_trainer(self.checkpoint.model(tuple(self.rows)), self.rows))

    def _loop(self) -> OrdinaryLoop:
        return OrdinaryLoop(PaddedBert(self.checkpoint.model(tuple(self.rows))), self.rows, workload.CPU)

    def padded(self) -> Step:
        loop = self._loop()
        return lambda step: [loop.take_step(*draw) for draw in self.draws(step)]

    def grouped_by_length(self) -> Step:
        loop, draws = self._loop(), self.grouped
        return lambda step: loop.take_step(*draws[step % self.num_steps])

    def makers(self) -> dict[str, Callable[[], Step]]:
        return {OURS: self.ours, PADDED: self.padded, GROUPED: self.grouped_by_length}


def measure(options: Options) -> Report:
    setup = Setup(options)
    steps = range(setup.num_steps)
    lengths = [workload.lengths_of(setup.rows, setup.draws(step)) for step in steps]
    grouped = [workload.lengths_of(setup.rows, [setup.grouped[step]]) for step in steps]
    limit = MatmulLimit(setup.checkpoint.config, lengths)
    makers = setup.makers()
    kinds: dict[str, Step] = {name: make() for name, make in makers.items()}
    seconds = harness.alternate({**kinds, LIMIT: lambda step: limit.run(lengths[step])}, options.rounds)

    batches = {OURS: lengths[WARM_UP:], PADDED: lengths[WARM_UP:], GROUPED: grouped[WARM_UP:]}
    least = [limit.seconds([of], took) for of, took in zip(batches[OURS], seconds[LIMIT], strict=True)]
    shares = {name: Summary.of_ratios(least, seconds[name]).median for name in (OURS, PADDED)}
    by_row = {n: [s / len(of) for s, of in zip(seconds[n], batches[n], strict=True)] for n in batches}
    ratios = {
        PADDED: Summary.of_ratios(seconds[PADDED], seconds[OURS]),
        GROUPED: harness.ratio_of_totals(by_row[GROUPED], by_row[OURS]),
    }
    memory = {name: BENCHMARK.memory(name, options) for name in makers}
    lines = [Line(name, seconds[name], "s", ratios.get(name), shares.get(name), memory[name]) for name in makers]
    checks = [
        Check("our step over that with random padded batches", 1 / ratios[PADDED].median, 1 / 2.7),
        Check("our step over that with batches grouped by length, by the row", 1 / ratios[GROUPED].median, 1 / 1.5),
        Check("our step over the matmul limit", 1 / shares[OURS], 1 / 0.6),
    ]
    per_row = [f"{name} {harness.significant(1000 * float(np.mean(of)))} ms" for name, of in by_row.items()]
    num_tokens = [int(of.sum()) for of in batches[OURS]]
    padding = np.median([len(of) * int(of.max()) / int(of.sum()) for of in batches[OURS]])
    notes = [
        f"by the row, all rounds together, as is the ratio of {GROUPED}: {', '.join(per_row)}",
        f"the median random batch has {np.median(num_tokens):.0f} real tokens; padded to its longest row it has "
        f"{harness.significant(float(padding))} times as many",
        left_out(setup.checkpoint.config, batches[OURS], shares[OURS]),
    ]
    settings = {"rounds": options.rounds, "batch_size": workload.BATCH_SIZE, "rows": workload.row_counts(setup.rows)}
    return Report("seconds of an optimizer step on 32 rows; ratios to ours", lines, checks, notes, settings)


BENCHMARK = harness.Benchmark("training_step", __doc__, measure, lambda options: Setup(options).makers())

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
