"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) on vectors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ops.dispatch import triton_kernels

BETAS, EPSILON = (0.9, 0.999), 1e-8


@dataclass
class Moments:
    """Running averages of a vector's gradient and of its square, both (P,), and how many steps they have seen, ()."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor

    @classmethod
    def zeros_like(cls, parameters: Tensor) -> "Moments":
        zero = torch.zeros((), device=parameters.device)
        return cls(torch.zeros_like(parameters), torch.zeros_like(parameters), zero)


def adamw_by_definition(
    parameters: Tensor, gradient: Tensor, moments: Moments, lr: float, decay: Tensor | float, factor: float
) -> None:
    """One step in place along factor * gradient, all (P,). decay: the weight decay, of each parameter or of all."""
    gradient = gradient * factor
    moments.step += 1
    moments.exp_avg.lerp_(gradient, 1 - BETAS[0])
    moments.exp_avg_sq.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    corrected = moments.exp_avg / (1 - BETAS[0] ** moments.step)
    root = (moments.exp_avg_sq / (1 - BETAS[1] ** moments.step)).sqrt()
    parameters.mul_(1 - lr * decay).sub_(lr * corrected / (root + EPSILON))


@dataclass(frozen=True)
class Vector:
    """What a step moves: parameters (P,) along gradient (P,); the first num_decayed of them have weight decay."""

    parameters: Tensor
    gradient: Tensor
    moments: Moments
    num_decayed: int


@torch.no_grad()
def adamw_step(vectors: Sequence[Vector], lr: Tensor, weight_decay: float, factor: Tensor, is_skipped: Tensor) -> None:
    """`adamw_by_definition` of each vector; nothing moves where is_skipped is 1. lr, factor, is_skipped: (), on the
    device.

    What a gradient holds is undefined afterwards.
    """
    for vector in vectors:
        if lr.device.type == "cpu":
            _fused_step(vector, float(lr), weight_decay, factor, is_skipped)
            continue
        vector.moments.step.add_(1 - is_skipped)
        moments = (vector.moments.exp_avg, vector.moments.exp_avg_sq, vector.moments.step)
        decay = (vector.num_decayed, weight_decay, BETAS, EPSILON)
        triton_kernels().adamw(vector.parameters, vector.gradient, moments, lr, factor, is_skipped, *decay)


def _fused_step(vector: Vector, lr: float, weight_decay: float, factor: Tensor, is_skipped: Tensor) -> None:
    """By torch's fused kernel. (torch.optim.AdamW calls it too; its base class imports torch's compiler, the longest
    part of a run's start.)"""
    moments = vector.moments
    divisor = None  # the kernel takes one of float32 only
    if factor != 1 and vector.gradient.dtype == torch.float32:
        divisor = (1 / factor).to(torch.float32)
    elif factor != 1:
        vector.gradient.mul_(factor)
    step = moments.step.clone()
    for part, decay in ((slice(0, vector.num_decayed), weight_decay), (slice(vector.num_decayed, None), 0.0)):
        moments.step.copy_(step)  # the kernel counts it up for each part
        adamw(
            [vector.parameters[part]],
            [vector.gradient[part]],
            [moments.exp_avg[part]],
            [moments.exp_avg_sq[part]],
            [],
            [moments.step],
            fused=True,
            grad_scale=divisor,
            found_inf=is_skipped,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=lr,
            weight_decay=decay,
            eps=EPSILON,
            maximize=False,
        )
