"""The frozen stage: features computed once and heads trained on them, against computing them anew in every epoch.

    python -m benchmarks.frozen_stage [--data DIR] [--rounds N] [--threads N]

Both train the same heads on batches of 32 rows, over a random subset of 2,000 training rows. With features that are
kept the whole stage of 25 epochs is timed. Without, one epoch is timed and counted 25 times: every epoch does the same
work. The encoder is ours in both, in the same batches, so that only keeping the features is compared.
"""

import sys
from collections.abc import Callable
from functools import partial

from benchmarks import workload
from benchmarks.harness import Benchmark, Check, Line, Options, Report, Step, Summary, alternate
from evaluation import compute_features
from model import FrozenEncoder, Trained

KEPT, ANEW = "features computed once", "features computed in every epoch"
EPOCHS = 25
NUM_ROWS = 2000
EVAL_BATCH_SIZE = 64


class Setup:
    """The checkpoint and the rows. A run of a stage begins with new heads, the same every time."""

    def __init__(self, options: Options) -> None:
        checkpoint = workload.Checkpoint.find(options.model)
        self.rows = workload.subset(checkpoint.rows(options.data, "train"), NUM_ROWS)
        self.model = checkpoint.model(tuple(self.rows))
        self.heads = {name: value.clone() for name, value in self.model.heads.state_dict().items()}
        self.steps_per_epoch = -(-sum(map(len, self.rows.values())) // workload.BATCH_SIZE)

    def train(self, epochs: int, number: int = 0) -> None:
        """Computes the features and trains new heads on them. number: that of the round."""
        self.model.heads.load_state_dict(self.heads)
        trained = Trained({}, {task: self.model.head_parameters(task) for task in self.rows})
        features = {
            task: compute_features(self.model, task, of, EVAL_BATCH_SIZE, workload.CPU)
            for task, of in self.rows.items()
        }
        trainer = workload.make_trainer(FrozenEncoder(self.model), trained, features)
        for step in range(epochs * self.steps_per_epoch):
            trainer.take_step(1, step)


def variants(options: Options) -> dict[str, Callable[[], Step]]:
    """An epoch of the stage."""
    return {KEPT: lambda: partial(Setup(options).train, 1)}


def measure(options: Options) -> Report:
    setup = Setup(options)
    kinds: dict[str, Step] = {KEPT: partial(setup.train, EPOCHS), ANEW: partial(setup.train, 1)}
    seconds = alternate(kinds, options.rounds, warm_up=0)
    whole = [took * EPOCHS for took in seconds[ANEW]]
    ratio = Summary.of_ratios(whole, seconds[KEPT])
    lines = [
        Line(f"{KEPT}, {EPOCHS} epochs", seconds[KEPT], memory=BENCHMARK.memory(KEPT, options)),
        Line(f"{ANEW}, {EPOCHS} epochs (one measured)", whole, ratio=ratio),
    ]
    checks = [Check("a stage with features over one that computes them in every epoch", 1 / ratio.median, 1 / 15)]
    rows = workload.row_counts(setup.rows)
    settings = {"rounds": options.rounds, "epochs": EPOCHS, "batch_size": workload.BATCH_SIZE, "rows": rows}
    title = f"seconds of the frozen stage over {sum(rows.values())} rows; ratios to the first line"
    return Report(title, lines, checks, (), settings)


BENCHMARK = Benchmark("frozen_stage", __doc__, measure, variants, rounds=5)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
