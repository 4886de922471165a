"""The frozen stage: features computed once and heads trained on them, against running the encoder every epoch.

    python -m benchmarks.frozen_stage [--data DIR] [--rounds N] [--threads N]

Both train the same heads on the same batches of 32 rows, over a random subset of 2,000 training rows. With features the
whole stage of 25 epochs is timed, the features included. Without, one epoch is timed and counted 25 times: every epoch
does the same work. The encoder is ours in both, without dropout and without gradients, so that only keeping the
features is compared.
"""

import sys
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from benchmarks import workload
from benchmarks.harness import Benchmark, Check, Line, Options, Report, Step, Summary, alternate
from datasets import Batch, Rows
from evaluation import compute_features
from model import FrozenEncoder, TaskModel, Trained
from ops import DropoutMasks

KEPT, RUNNING = "features computed once", "encoder run every epoch"
EPOCHS = 25
NUM_ROWS = 2000
EVAL_BATCH_SIZE = 64


class RunningEncoder(FrozenEncoder):
    """The heads of a model whose frozen encoder runs for every batch."""

    def __call__(
        self, task: str, batch: Batch, masks: DropoutMasks | None = None, perturbation: Tensor | None = None
    ) -> Tensor:
        with torch.no_grad():
            pooled = self.model.pooled(task, batch)
        return self.model.predict(task, pooled, masks)


class Setup:
    """The checkpoint and the rows. A run of a stage begins with new heads, the same every time."""

    def __init__(self, options: Options) -> None:
        checkpoint = workload.Checkpoint.find(options.model)
        rows = checkpoint.rows(options.data, "train")
        self.rows = workload.subset(rows, NUM_ROWS)
        self.model = checkpoint.model(tuple(rows))
        self.heads = {name: value.clone() for name, value in self.model.heads.state_dict().items()}
        self.steps_per_epoch = -(-sum(map(len, self.rows.values())) // workload.BATCH_SIZE)

    def _train(self, seen: TaskModel, rows: Mapping[str, Rows], epochs: int) -> list[float]:
        """Trains new heads; returns the loss of each step."""
        self.model.heads.load_state_dict(self.heads)
        trained = Trained({}, {task: self.model.head_parameters(task) for task in rows})
        trainer = workload.make_trainer(seen, trained, rows)
        return [trainer.take_step(1, step)["loss"] for step in range(epochs * self.steps_per_epoch)]

    def with_features(self, epochs: int) -> list[float]:
        features = {
            task: compute_features(self.model, task, of, EVAL_BATCH_SIZE, workload.CPU)
            for task, of in self.rows.items()
        }
        return self._train(FrozenEncoder(self.model), features, epochs)

    def without(self, epochs: int) -> list[float]:
        return self._train(RunningEncoder(self.model), self.rows, epochs)

    def difference(self) -> float:
        """The largest relative difference between the losses of a step of the two ways, over an epoch."""
        losses = np.array([self.with_features(1), self.without(1)])
        return float((np.abs(losses[0] - losses[1]) / losses[1]).max())

    def makers(self) -> Mapping[str, Callable[[], Step]]:
        """An epoch of either way."""
        ways = {KEPT: self.with_features, RUNNING: self.without}
        return {name: lambda train=train: lambda number: train(1) for name, train in ways.items()}  # type: ignore[misc]


def measure(options: Options) -> Report:
    setup = Setup(options)
    difference = setup.difference()
    kinds: dict[str, Step] = {
        KEPT: lambda number: setup.with_features(EPOCHS),
        RUNNING: lambda number: setup.without(1),
    }
    seconds = alternate(kinds, options.rounds, warm_up=0)
    whole = [took * EPOCHS for took in seconds[RUNNING]]
    ratio = Summary.of_ratios(whole, seconds[KEPT])
    kept_memory, running_memory = (BENCHMARK.memory(name, options) for name in (KEPT, RUNNING))
    lines = [
        Line(f"{KEPT}, {EPOCHS} epochs", seconds[KEPT], memory=kept_memory),
        Line(f"{RUNNING}, {EPOCHS} epochs (one measured)", whole, ratio=ratio, memory=running_memory),
    ]
    checks = [
        Check("a stage with features over one that runs the encoder every epoch", 1 / ratio.median, 1 / 15),
        Check("relative difference of the losses over an epoch", difference, 1e-3, must_hold=True),
    ]
    rows = workload.row_counts(setup.rows)
    settings = {"rounds": options.rounds, "epochs": EPOCHS, "batch_size": workload.BATCH_SIZE, "rows": rows}
    title = f"seconds of the frozen stage over {sum(rows.values())} rows; ratios to the first line"
    return Report(title, lines, checks, (), settings)


BENCHMARK = Benchmark("frozen_stage", __doc__, measure, lambda options: Setup(options).makers(), rounds=5)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
