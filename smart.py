"""Regularizers: R-Drop (Liang et al. 2021, arXiv 2106.14448), and the smoothness and the Bregman proximal point term of
SMART (Jiang et al. 2020, arXiv 1911.03437).

All compare two predictions of the same rows by the task's own divergence (`Output.divergence` in tasks.py), in float32
also under mixed precision: a perturbation of 1e-5 would be lost in the rounding of half precision. A new regularizer is
a class and an entry of REGULARIZERS.

Shape letters: N packed tokens, B rows, D hidden, K outputs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from datasets import Batch
from model import MultitaskBert
from ops import DropoutMasks
from parameters import parameter
from seeding import derive_seed
from tasks import TASKS


class Regularizer(Protocol):
    """A term of the loss.

    state: what a checkpoint holds besides the model; tensors that are changed in place, none for most.
    """

    state: dict[str, Tensor]

    def __init__(self, parameters: Any, model: MultitaskBert, num_steps: int) -> None:
        """num_steps: optimizer steps of the stage."""
        ...

    def term(self, task: str, batch: Batch, masks: DropoutMasks, logits: Tensor) -> Tensor:
        """A scalar to add to the loss. logits: (B, K) float32 prediction made with these masks, from their first on."""
        ...

    def after_step(self, step: int) -> None:
        """Called after optimizer step number `step`, counted from 0, unless the step was skipped."""
        ...


class RDrop:
    """Two passes with different dropout: alpha / 2 times their divergence, and the mean of both losses for the first's.

    (The paper adds both losses up; the mean is its authors' code, and leaves the learning rate what it is.)
    """

    @dataclass(frozen=True)
    class Parameters:
        alpha: float = parameter(1.0, "R-Drop: factor of half the divergence (alpha), 1 to 5 in the paper", "> 0")

    def __init__(self, parameters: Parameters, model: MultitaskBert, num_steps: int) -> None:
        self.alpha, self.model = parameters.alpha, model
        self.state: dict[str, Tensor] = {}

    def term(self, task: str, batch: Batch, masks: DropoutMasks, logits: Tensor) -> Tensor:
        output = TASKS[task].output
        other = self.model(task, batch, masks)  # draws on behind the first pass
        first, second = (output.losses(of_pass, batch.labels) for of_pass in (logits, other))  # (B,)
        return ((second - first + self.alpha * output.divergence(logits, other)) / 2).mean()

    def after_step(self, step: int) -> None:
        pass


class Smoothness:
    """lambda times the mean over rows of max over |d|_inf <= eps of divergence(f(x + d), f(x)); d: on input embeddings.

    Both predictions have the same dropout, and gradients flow through both. At the paper's values scores change in the
    sixth digit.
    """

    @dataclass(frozen=True)
    class Parameters:
        weight: float = parameter(1.0, "factor of the smoothness term (lambda)", "> 0")
        eps: float = parameter(1e-5, "largest perturbation of an embedding's coordinate", "> 0")
        sigma: float = parameter(1e-5, "standard deviation of the perturbation's start", "> 0")
        eta: float = parameter(1e-3, "step size of the perturbation's ascent", "> 0")
        steps: int = parameter(1, "ascent steps", ">= 1")

    def __init__(self, parameters: Parameters, model: MultitaskBert, num_steps: int) -> None:
        self.parameters, self.model = parameters, model
        self.state: dict[str, Tensor] = {}

    def term(self, task: str, batch: Batch, masks: DropoutMasks, logits: Tensor) -> Tensor:
        assert batch.tokens is not None, "smoothness perturbs input embeddings"
        config, divergence, row_of_token = self.parameters, TASKS[task].output.divergence, batch.tokens.row_of_token
        generator = None  # the device's default one, which the masks have seeded: a CUDA graph knows no other
        if logits.device.type == "cpu":
            generator = torch.Generator().manual_seed(derive_seed(masks.seed, "smart"))
        shape = len(row_of_token), self.model.encoder.config.hidden_size  # (N, D)
        perturbation = torch.randn(shape, generator=generator, device=row_of_token.device) * config.sigma
        for _ in range(config.steps):
            perturbation.requires_grad_(True)
            with held_still(list(self.model.parameters())):
                distance = divergence(self.model(task, batch, masks.again(), perturbation), logits.detach()).sum()
            (gradient,) = torch.autograd.grad(distance, perturbation)
            perturbation = ascend(perturbation.detach(), gradient, row_of_token, len(logits), config)
        return config.weight * divergence(self.model(task, batch, masks.again(), perturbation), logits).mean()

    def after_step(self, step: int) -> None:
        pass


@contextmanager
def held_still(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within it these parameters are constants: no gradients of theirs are computed."""
    trained = [weight for weight in parameters if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


def ascend(
    perturbation: Tensor, gradient: Tensor, row_of_token: Tensor, num_rows: int, config: Smoothness.Parameters
) -> Tensor:
    """project(d + eta * gradient / |gradient|_inf), the projection onto |d|_inf <= eps, each row on its own.

    Code that only divides by the norm, without projecting, perturbs by about 1 where the paper perturbs by 1e-5.
    perturbation, gradient: (N, D). row_of_token: (N,) which row a token belongs to, B for none.
    """
    largest = gradient.abs().amax(-1)  # (N, D) -> (N,)
    norms = torch.zeros(num_rows + 1, device=largest.device).scatter_reduce(
        0, row_of_token, largest, "amax"
    )  # (B + 1,)
    norms = norms.clamp(min=torch.finfo(norms.dtype).tiny)[row_of_token, None]  # (B + 1,) -> (N, 1)
    return (perturbation + config.eta * (gradient / norms)).clamp(-config.eps, config.eps)


class BregmanProximal:
    """mu times the divergence from the prediction of averaged weights.

    After each step theta~ := b theta~ + (1 - b) theta; b is 0.99 in the first tenth of the steps and 0.999 after that.
    """

    @dataclass(frozen=True)
    class Parameters:
        weight: float = parameter(1.0, "factor of the proximal term (mu)", "> 0")

    def __init__(self, parameters: Parameters, model: MultitaskBert, num_steps: int) -> None:
        self.weight, self.model, self.num_steps = parameters.weight, model, num_steps
        self.average = model.duplicate().requires_grad_(False)
        self.state: dict[str, Tensor] = dict(self.average.named_parameters())

    def term(self, task: str, batch: Batch, masks: DropoutMasks, logits: Tensor) -> Tensor:
        with torch.no_grad():
            reference = self.average(task, batch, masks.again())
        return self.weight * TASKS[task].output.divergence(logits, reference).mean()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        beta = 0.99 if step < 0.1 * self.num_steps else 0.999
        torch._foreach_lerp_(list(self.state.values()), list(self.model.parameters()), 1 - beta)


REGULARIZERS: dict[str, type[Regularizer]] = {
    "rdrop": RDrop,
    "smart": Smoothness,
    "bregman": BregmanProximal,
}
