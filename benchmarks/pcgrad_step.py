"""A PCGrad step over three tasks: ours against plain passes, and against other libraries on the same encoder and rows.

    python -m benchmarks.pcgrad_step [--data DIR] [--rounds N] [--threads N]

Every step sees 32 rows of each task. The plain step is a forward and a backward pass for each task and one optimizer
step. torchjd's PCGrad runs in each of the ways that its documentation offers: `backward` over the losses, with and
without its saving of memory, and `mtl_backward`; on our encoder they differentiate one loss at a time, as its own vmap
does not pass through our attention. AdamW is torch's fused kernel in all of them: the gradients alone are compared.

The wrapper around an optimizer that most PyTorch code has copied keeps a flat clone of each task's gradient and
projects in the full P-dimensional space: T x T passes over memory instead of the two of the Gram matrix. It is only
described here, neither copied nor measured.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import workload
from benchmarks.harness import Benchmark, Check, Options, Report, Step, Summary, alternate, lines_of
from datasets import TokenizedRows
from model import MultitaskBert
from ops import DropoutMasks
from tasks import TASKS, task_loss

PLAIN, OURS = "plain passes", "ours"
BACKWARD, SAVING, MTL = "torchjd backward", "torchjd backward, memory saving", "torchjd mtl_backward"
AT_MOST = 1.10


class Passes:
    """The forward passes of a step by our encoder."""

    def __init__(self, model: MultitaskBert, rows: Mapping[str, TokenizedRows]) -> None:
        self.model, self.rows, trained = model, rows, model.trained()
        self.shared = list(trained.shared.values())
        self.own = [list(trained.own[task].values()) for task in rows]

    def __call__(self, draws: Sequence[workload.Draw], step: int) -> tuple[list[Tensor], list[Tensor]]:
        """The loss of each draw, and the pooled features that it follows from."""
        losses, features = [], []
        for i, (task, numbers) in enumerate(draws):
            batch, masks = self.rows[task].batch(numbers), DropoutMasks(1000 * step + i)
            features.append(self.model.pooled(task, batch, masks))
            losses.append(task_loss(TASKS[task], self.model.predict(task, features[-1], masks), batch.labels))
        return losses, features


Backward = Callable[[Passes, list[Tensor], list[Tensor]], None]  # losses, features -> every parameter's gradient


def torchjd_backward(of: Passes, losses: list[Tensor], features: list[Tensor], saving: bool = False) -> None:
    """torchjd's Jacobian of all losses. saving: its option that saves memory."""
    from torchjd.aggregation import PCGrad, Sum
    from torchjd.autojac import backward, jac_to_grad

    own = [parameter for parameters in of.own for parameter in parameters]
    backward(losses, inputs=[*of.shared, *own], parallel_chunk_size=1)
    jac_to_grad(own, Sum())
    jac_to_grad(of.shared, PCGrad(), optimize_gramian_computation=saving)


def torchjd_mtl_backward(of: Passes, losses: list[Tensor], features: list[Tensor]) -> None:
    """torchjd's way for shared features and heads."""
    from torchjd.aggregation import PCGrad
    from torchjd.autojac import jac_to_grad, mtl_backward

    mtl_backward(losses, features=features, tasks_params=of.own, shared_params=of.shared, parallel_chunk_size=1)
    jac_to_grad(of.shared, PCGrad())


class Setup:
    """The checkpoint, the rows, and what each step sees of them."""

    def __init__(self, options: Options) -> None:
        self.checkpoint = workload.Checkpoint.find(options.model)
        self.rows = self.checkpoint.rows(options.data, "train")
        self.draws = workload.Draws(self.rows, len(self.rows))

    def model(self) -> MultitaskBert:
        return self.checkpoint.model(tuple(self.rows))

    def ours(self, treatment: str) -> Step:
        options: dict[str, Any] = {"draws_per_step": len(self.rows), "treatment": treatment}
        return workload.step_of(workload.full_trainer(self.model(), self.rows, **options))

    def by(self, backward: Backward) -> Step:
        """A step with another library's treatment."""
        of = Passes(self.model(), self.rows)
        parameters = [*of.shared, *(parameter for own in of.own for parameter in own)]
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.01, fused=True)

        def take_step(step: int) -> None:
            optimizer.zero_grad()
            backward(of, *of(self.draws(step), step))
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

        return take_step

    def makers(self) -> dict[str, Callable[[], Step]]:
        """By name, what makes a step."""
        return {
            PLAIN: lambda: self.ours(""),
            OURS: lambda: self.ours("pcgrad"),
            BACKWARD: lambda: self.by(torchjd_backward),
            SAVING: lambda: self.by(partial(torchjd_backward, saving=True)),
            MTL: lambda: self.by(torchjd_mtl_backward),
        }


def measure(options: Options) -> Report:
    setup = Setup(options)
    makers = setup.makers()
    seconds = alternate({name: make() for name, make in makers.items()}, options.rounds)
    memory = {name: BENCHMARK.memory(name, options) for name in makers}
    over_plain = Summary.of_ratios(seconds[OURS], seconds[PLAIN]).median
    over_ours = {name: Summary.of_ratios(seconds[name], seconds[OURS]).median for name in (BACKWARD, SAVING, MTL)}
    faster = min(over_ours[BACKWARD], over_ours[MTL])
    checks = [
        Check("a PCGrad step over the plain passes", over_plain, AT_MOST),
        Check("a PCGrad step over torchjd's, the faster of backward and mtl_backward", 1 / faster, 1 / 2.5),
    ]
    times = ", ".join(f"{name} {of:.2f}" for name, of in over_ours.items())
    notes = [f"times as long as ours on the same encoder, the median of the rounds: {times}"]
    settings = {"rounds": options.rounds, "batch_size": workload.BATCH_SIZE, "rows": workload.row_counts(setup.rows)}
    title = "seconds of a step over three tasks, 32 rows each; ratios to plain"
    return Report(title, lines_of(seconds, PLAIN, memory), checks, notes, settings)


BENCHMARK = Benchmark("pcgrad_step", __doc__, measure, lambda options: Setup(options).makers(), rounds=10)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
