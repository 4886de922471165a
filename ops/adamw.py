"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) on one vector."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

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


@torch.no_grad()
def adamw_step(
    parameters: Tensor,
    gradient: Tensor,
    moments: Moments,
    lr: float,
    weight_decay: float,
    num_decayed: int,
    factor: float,
) -> None:
    """`adamw_by_definition`, with weight decay for the first num_decayed parameters only, by torch's fused kernel.

    (torch.optim.AdamW calls it too; its base class imports torch's compiler, the longest part of a run's start.)
    What `gradient` holds is undefined afterwards.
    """
    if factor != 1:
        gradient.mul_(factor)
    step = moments.step.clone()
    for part, decay in ((slice(0, num_decayed), weight_decay), (slice(num_decayed, None), 0.0)):
        moments.step.copy_(step)  # the kernel counts it up for each part
        adamw(
            [parameters[part]],
            [gradient[part]],
            [moments.exp_avg[part]],
            [moments.exp_avg_sq[part]],
            [],
            [moments.step],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=lr,
            weight_decay=decay,
            eps=EPSILON,
            maximize=False,
        )
