"""SMART (Jiang et al. 2020, arXiv 1911.03437): smoothness-inducing regularization and Bregman proximal point steps.

Both compare two predictions of the same rows by the task's own divergence (`Output.divergence` in tasks.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Divergence = Callable[[Tensor, Tensor], Tensor]  # two predictions (B, K) -> (B,)


@dataclass(frozen=True)
class SmartConfig:
    """The paper's parameters.

    weight: lambda, factor of the term. eps: largest perturbation of any coordinate. sigma: standard deviation of the
    perturbation's start. eta: step size of the ascent. steps: ascent steps.
    """

    weight: float = 1.0
    eps: float = 1e-5
    sigma: float = 1e-5
    eta: float = 1e-3
    steps: int = 1


def smoothness(
    predict: Callable[[Tensor], Tensor],
    logits: Tensor,
    divergence: Divergence,
    row_of_token: Tensor,
    hidden_size: int,
    config: SmartConfig,
    generator: torch.Generator,
    parameters: Sequence[nn.Parameter] = (),
) -> Tensor:
    """Mean over rows of max over |d|_inf <= eps of divergence(f(x + d), f(x)), a scalar, without the factor lambda.

    predict: logits (B, K) under a perturbation (N, D) of the input embeddings, with the dropout masks that `logits`
    (B, K), the prediction without perturbation, was made with. row_of_token: (N,) which row a token belongs to.
    Gradients flow through both predictions. parameters: of the model behind `predict`; the search for the perturbation
    needs no gradients of theirs, and computes none of those that are named.
    """
    start = torch.randn(len(row_of_token), hidden_size, generator=generator, device=row_of_token.device)
    perturbation = start * config.sigma
    for _ in range(config.steps):
        perturbation.requires_grad_(True)
        with held_still(parameters):
            distance = divergence(predict(perturbation), logits.detach()).sum()
        (gradient,) = torch.autograd.grad(distance, perturbation)
        perturbation = ascend(perturbation.detach(), gradient, row_of_token, len(logits), config)
    return divergence(predict(perturbation), logits).mean()


@contextmanager
def held_still(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within it these parameters are constants."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def ascend(perturbation: Tensor, gradient: Tensor, row_of_token: Tensor, num_rows: int, config: SmartConfig) -> Tensor:
    """project(d + eta * gradient / |gradient|_inf), the projection onto |d|_inf <= eps, each row on its own.

    Code that only divides by the norm, without projecting, perturbs by about 1 where the paper perturbs by 1e-5.
    perturbation, gradient: (N, D).
    """
    largest = gradient.abs().amax(-1)  # (N,)
    norms = torch.zeros(num_rows, device=largest.device).scatter_reduce(0, row_of_token, largest, "amax")
    norms = norms.clamp(min=torch.finfo(norms.dtype).tiny)[row_of_token, None]  # (N, 1)
    return (perturbation + config.eta * (gradient / norms)).clamp(-config.eps, config.eps)


class ProximalPoint:
    """The Bregman proximal term's reference: a moving average of the weights, theta~ := b theta~ + (1 - b) theta.

    The average b is 0.99 in the first tenth of the steps and 0.999 after that. Buffers are none: BERT has only weights.
    """

    def __init__(self, model: nn.Module, average: nn.Module, num_steps: int) -> None:
        """average: a copy of the model, which this object owns from here on."""
        self.average = average.requires_grad_(False)
        self.num_steps = num_steps
        self._targets: list[Tensor] = list(average.parameters())
        self._sources: list[Tensor] = list(model.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After an optimizer step; step: counted from 0."""
        beta = 0.99 if step < 0.1 * self.num_steps else 0.999
        torch._foreach_lerp_(self._targets, self._sources, 1 - beta)


def proximity(logits: Tensor, reference: Tensor, divergence: Divergence) -> Tensor:
    """Mean over rows of divergence(f(x; theta), f(x; theta~)), a scalar. logits, reference: (B, K)."""
    return divergence(logits, reference.detach()).mean()
