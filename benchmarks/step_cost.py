"""What a step of each method costs against plain passes, and PCGrad's against torchjd's, on the same rows.

Every step draws each task once, 32 rows, in a forward and a backward pass, and ends with one optimizer step.
torchjd's PCGrad runs on our encoder in both ways of its documentation: `backward` over the losses, and `mtl_backward`;
they differentiate one loss at a time, as its own vmap does not pass through our attention. AdamW is torch's fused
kernel there and here: the gradients alone are compared.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import workload
from benchmarks.harness import Check, Memory, Options, Report, Step, Summary, alternate, lines_of
from datasets import TokenizedRows
from engine import Trainer
from evaluation import Precision
from model import MultitaskBert
from ops import DropoutMasks
from pal import ProjectedAttention
from parameters import Choice
from smart import Smoothness
from tasks import TASKS, task_loss

AT_MOST = {"pcgrad": 1.10, "smart": 3.0, "pal": 1.25}  # times a plain step


def makers_of(
    fresh: Callable[[Choice | None], MultitaskBert],
    rows: Mapping[str, TokenizedRows],
    precision: Precision = workload.CPU,
    batch_size: int = workload.BATCH_SIZE,
) -> Mapping[str, Callable[[], Trainer]]:
    """By a method's name, what makes its trainer. fresh: makes a model, with this adapter or without."""

    def trainer(model: MultitaskBert, **options: Any) -> Trainer:
        shared = {"draws_per_step": len(rows), "precision": precision, "batch_size": batch_size, "cuda_graphs": True}
        return workload.full_trainer(model, rows, **shared, **options)

    def smart() -> Trainer:
        model = fresh(None)
        return trainer(model, regularizers=[Smoothness(Smoothness.Parameters(), model, 1)])

    return {
        "plain": lambda: trainer(fresh(None)),
        "pcgrad": lambda: trainer(fresh(None), treatment="pcgrad"),
        "smart": smart,
        "pal": lambda: trainer(fresh(Choice("pal", ProjectedAttention.Parameters()))),
    }


def report(
    title: str,
    trainers: Mapping[str, Trainer],
    seconds: Mapping[str, Sequence[float]],
    memory: Mapping[str, Memory],
    settings: Mapping[str, Any],
) -> Report:
    """seconds: of each method's step, round by round."""
    lines = lines_of(seconds, "plain", memory)
    ratios = {line.what: line.ratio.median for line in lines if line.ratio}
    checks = [Check(f"a step with {name} over a plain one", ratios[name], most) for name, most in AT_MOST.items()]
    plain, pcgrad = (trainers[name].shared.gradients.numel() for name in ("plain", "pcgrad"))
    note = f"gradient buffers of pcgrad beyond plain: {(pcgrad - plain) / plain:.0f} copies of the shared gradient"
    return Report(title, lines, checks, [note], settings)


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


def torchjd_backward(of: Passes, losses: list[Tensor], features: list[Tensor]) -> None:
    """torchjd's Jacobian of all losses."""
    from torchjd.aggregation import PCGrad, Sum
    from torchjd.autojac import backward, jac_to_grad

    own = [parameter for parameters in of.own for parameter in parameters]
    backward(losses, inputs=[*of.shared, *own], parallel_chunk_size=1)
    jac_to_grad(own, Sum())
    jac_to_grad(of.shared, PCGrad())


def torchjd_mtl_backward(of: Passes, losses: list[Tensor], features: list[Tensor]) -> None:
    """torchjd's way for shared features and heads."""
    from torchjd.aggregation import PCGrad
    from torchjd.autojac import jac_to_grad, mtl_backward

    mtl_backward(losses, features=features, tasks_params=of.own, shared_params=of.shared, parallel_chunk_size=1)
    jac_to_grad(of.shared, PCGrad())


TORCHJD = {"pcgrad by torchjd's backward": torchjd_backward, "pcgrad by torchjd's mtl_backward": torchjd_mtl_backward}


def torchjd_step(
    backward: Callable[[Passes, list[Tensor], list[Tensor]], None],
    model: MultitaskBert,
    rows: Mapping[str, TokenizedRows],
    draws: workload.Draws,
) -> Step:
    """A step with torchjd's treatment. backward: from losses and features to every parameter's gradient."""
    of = Passes(model, rows)
    parameters = [*of.shared, *(parameter for own in of.own for parameter in own)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.01, fused=True)

    def take_step(step: int) -> None:
        optimizer.zero_grad()
        backward(of, *of(draws(step), step))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return take_step


def step_cost(options: Options) -> Report:
    """A step of each method, and PCGrad's by torchjd."""
    checkpoint = workload.Checkpoint.find(options.model)
    rows = checkpoint.rows(options.data, "train")
    draws, fresh = workload.Draws(rows, len(rows)), partial(checkpoint.model, tuple(rows))
    trainers = {name: make() for name, make in makers_of(fresh, rows).items()}
    ours = {name: workload.step_of(trainer) for name, trainer in trainers.items()}
    theirs = {name: torchjd_step(backward, fresh(), rows, draws) for name, backward in TORCHJD.items()}
    seconds = alternate({**ours, **theirs}, options.rounds)
    title = "seconds of a step with each task once, 32 rows a task; ratios to plain"
    found = report(title, trainers, seconds, {}, {"rows": workload.row_counts(rows)})
    faster = max(Summary.of_ratios(seconds["pcgrad"], seconds[name]).median for name in TORCHJD)
    claim = Check("a step with pcgrad over torchjd's, the faster of backward and mtl_backward", faster, 1 / 2.5)
    return replace(found, checks=[*found.checks, claim])
