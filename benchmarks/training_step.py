"""An optimizer step: ours on packed tokens against the ordinary loop with transformers on padded batches.

    python -m benchmarks.training_step [--data DIR] [--rounds N] [--threads N]

Both train the same encoder from the same checkpoint on batches of 32 random rows of one task, drawn in turn, the very
same rows in each step: forward with dropout, backward, clipping, AdamW. The ordinary loop is transformers' BertModel
with scaled-dot-product attention, batches padded to their longest row, torch.optim.AdamW as it comes. Its second form
makes batches of rows of similar length (group_by_length), which pad less and see other rows; it is compared by the row.

The matmul limit is what the matrix products of a step over its real tokens take at the rate at which torch.mm does
those of the dense layers, measured in every round on the same number of tokens.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import numpy as np

from benchmarks import workload
from benchmarks.harness import (
    WARM_UP,
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
    ratio_of_totals,
    ratios,
    run,
    significant,
    spread,
)
from benchmarks.reference import OrdinaryLoop, PaddedBert, length_grouped_batches
from datasets import TokenizedRows

OURS, PADDED, GROUPED = "ours", "transformers, padded", "transformers, grouped by length"
LIMIT = "matrix products alone"


class Setup:
    """The checkpoint, the rows, and what each step sees of them."""

    def __init__(self, options: Options) -> None:
        self.checkpoint = workload.Checkpoint.find(options.model)
        self.rows = self.checkpoint.rows(options.data, "train")
        self.draws = workload.Draws(self.rows)
        self.num_steps = WARM_UP + options.rounds

    def ours(self) -> Step:
        trainer = workload.full_trainer(self.checkpoint.model(tuple(self.rows)), self.rows)
        return lambda step: trainer.take_step(1, step)

    def loop(self) -> OrdinaryLoop:
        like = self.checkpoint.model(tuple(self.rows))
        return OrdinaryLoop(PaddedBert.from_checkpoint(self.checkpoint.folder, like), self.rows, workload.CPU)

    def padded(self) -> Step:
        loop = self.loop()
        return lambda step: [loop.take_step(*draw) for draw in self.draws(step)]

    def grouped(self) -> Step:
        loop, batches = self.loop(), self.grouped_draws()
        return lambda step: loop.take_step(*batches[step % len(batches)])

    def grouped_draws(self) -> list[workload.Draw]:
        """A batch of similar length for each step, the tasks in turn."""
        return grouped_draws(self.rows, self.num_steps)


def grouped_draws(rows: Mapping[str, TokenizedRows], num_steps: int) -> list[workload.Draw]:
    """For each step rows of similar length of one task, the tasks in turn, all lengths in their proportion."""
    num_batches = -(-num_steps // len(rows))
    batches = {
        task: length_grouped_batches(of.tokens.lengths, workload.BATCH_SIZE, num_batches) for task, of in rows.items()
    }
    return [(task, batches[task][i]) for i in range(num_batches) for task in rows][:num_steps]


def variants(options: Options) -> Mapping[str, Callable[[], Step]]:
    setup = Setup(options)
    return {OURS: setup.ours, PADDED: setup.padded, GROUPED: setup.grouped}


def measure(options: Options) -> Report:
    setup = Setup(options)
    counted = range(WARM_UP, setup.num_steps)
    lengths = [workload.lengths_of(setup.rows, setup.draws(step)) for step in range(setup.num_steps)]
    grouped = setup.grouped_draws()
    limit = MatmulLimit(setup.checkpoint.config, lengths)
    loop = setup.loop()
    kinds: dict[str, Step] = {
        OURS: setup.ours(),
        PADDED: lambda step: [loop.take_step(*draw) for draw in setup.draws(step)],
        GROUPED: lambda step: loop.take_step(*grouped[step]),
        LIMIT: lambda step: limit.run(lengths[step]),
    }
    seconds = alternate(kinds, options.rounds)
    least = [limit.seconds([lengths[step]], of) for step, of in zip(counted, seconds[LIMIT], strict=True)]
    shares = {name: Summary.of(ratios(least, seconds[name])).median for name in (OURS, PADDED)}
    seen = [lengths[step] for step in counted]
    seen_grouped = [workload.lengths_of(setup.rows, [grouped[step]]) for step in counted]
    of_kind = {OURS: seen, PADDED: seen, GROUPED: seen_grouped}
    memory = {name: BENCHMARK.memory(name, options) for name in of_kind}
    by_row, by_token = (
        ratio_of_totals(seconds[GROUPED], sizes(seen_grouped, size), seconds[OURS], sizes(seen, size))
        for size in (len, np.sum)
    )
    compared = {PADDED: Summary.of(ratios(seconds[PADDED], seconds[OURS])), GROUPED: by_row}
    lines = [Line(n, seconds[n], "s", compared.get(n), shares.get(n), memory[n]) for n in of_kind]
    padding = Summary.of([len(of) * int(of.max()) / int(of.sum()) for of in seen])
    notes = [
        per_unit("row", len, seconds, of_kind),
        per_unit("real token", np.sum, seconds, of_kind),
        f"the ratio of {GROUPED} is by the row, all rounds together; by the real token it is "
        + spread(asdict(by_token)),
        f"a random batch padded to its longest row has {significant(padding.median)} times its real tokens; "
        f"the median batch has {Summary.of(sizes(seen, np.sum)).median:.0f} real tokens",
        left_out(setup.checkpoint.config, seen, shares[OURS]),
    ]
    settings = {"rounds": options.rounds, "batch_size": workload.BATCH_SIZE, "rows": workload.row_counts(setup.rows)}
    checks = [
        Check("our step over that with random padded batches", 1 / compared[PADDED].median, 1 / 2.7),
        Check("our step over that with batches grouped by length, by the row", 1 / by_row.median, 1 / 1.5),
        Check("our step over the matmul limit", 1 / shares[OURS], 1 / 0.6),
    ]
    return Report("seconds of an optimizer step on 32 rows; ratios to ours", lines, checks, notes, settings)


Size = Callable[[np.ndarray], float]  # of a batch, from the lengths of its rows


def sizes(batches: Sequence[np.ndarray], size: Size) -> list[float]:
    return [float(size(lengths)) for lengths in batches]


def per_unit(
    unit: str, size: Size, seconds: Mapping[str, Sequence[float]], batches: Mapping[str, Sequence[np.ndarray]]
) -> str:
    """A sentence: what a unit of size takes in each kind, all rounds together."""
    each = {name: sum(seconds[name]) / sum(sizes(of, size)) for name, of in batches.items()}
    return f"per {unit}: " + ", ".join(f"{name} {significant(1000 * of)} ms" for name, of in each.items())


BENCHMARK = Benchmark("training_step", measure, variants)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(BENCHMARK, __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(main())
