"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) on vectors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

BETAS, EPSILON = (0.9, 0.999), 1e-8


@dataclass
class Moments:
    """Running averages of a vector's gradient and of its square, both (P,), and how many steps they have seen, (2,): those
    of the parameters with weight decay, and of the others."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor

    @classmethod
    def zeros_like(cls, parameters: Tensor) -> "Moments":
        step = torch.zeros(2, device=parameters.device)
        return cls(torch.zeros_like(parameters), torch.zeros_like(parameters), step)


def adamw_by_definition(
    parameters: Tensor, gradient: Tensor, moments: Moments, lr: float, decay: Tensor | float, factor: float
) -> None:
    """One step in place along factor * gradient, all (P,). decay: the weight decay, of each parameter or of all."""
    gradient = gradient * factor
    moments.step += 1
    moments.exp_avg.lerp_(gradient, 1 - BETAS[0])
    moments.exp_avg_sq.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    corrected = moments.exp_avg / (1 - BETAS[0] ** moments.step[0])
    root = (moments.exp_avg_sq / (1 - BETAS[1] ** moments.step[0])).sqrt()
    parameters.mul_(1 - lr * decay).sub_(lr * corrected / (root + EPSILON))


@dataclass(frozen=True)
class Vector:
    """What a step moves: parameters (P,) along gradient (P,); the first num_decayed of them have weight decay."""

    parameters: Tensor
    gradient: Tensor
    moments: Moments
    num_decayed: int


@torch.no_grad()
def adamw_step(
    vectors: Sequence[Vector], lr: float, weight_decay: float, factor: Tensor, is_skipped: Tensor | None = None
) -> None:
    """`adamw_by_definition` of each vector, by torch's fused kernel.

    factor: (), on the parameters' device. is_skipped: (), where 1 nothing moves. What a gradient holds is undefined
    afterwards. (torch.optim.AdamW calls the same kernel; its base class imports torch's compiler, the longest part of a
    run's start.)
    """
    grad_scale = None
    if factor.device.type == "cuda":
        grad_scale = 1 / factor.to(torch.float32)  # what the kernel divides by
    elif factor != 1:
        for vector in vectors:
            vector.gradient.mul_(factor)
    for number, decay in enumerate((weight_decay, 0.0)):
        parts = [slice(0, v.num_decayed) if number == 0 else slice(v.num_decayed, None) for v in vectors]
        adamw(
            [v.parameters[part] for v, part in zip(vectors, parts, strict=True)],
            [v.gradient[part] for v, part in zip(vectors, parts, strict=True)],
            [v.moments.exp_avg[part] for v, part in zip(vectors, parts, strict=True)],
            [v.moments.exp_avg_sq[part] for v, part in zip(vectors, parts, strict=True)],
            [],
            [v.moments.step[number] for v in vectors],
            fused=True,
            grad_scale=grad_scale,
            found_inf=is_skipped,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=lr,
            weight_decay=decay,
            eps=EPSILON,
            maximize=False,
        )
