"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) by torch's fused kernel.

torch.optim.AdamW calls the same kernel; its base class imports torch's compiler when it is made, which would be the
longest part of a run's start.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

BETAS, EPSILON = (0.9, 0.999), 1e-8


class AdamW:
    """AdamW without weight decay for biases and LayerNorms, which are the parameters of one dimension.

    A parameter without a gradient is left alone, its moments and its count of steps too.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], weight_decay: float) -> None:
        self.parameters = parameters
        self.weight_decay = weight_decay
        self._moments: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Moves the parameters along their gradients."""
        present = [name for name, parameter in self.parameters.items() if parameter.grad is not None]
        decayed = [name for name in present if self.parameters[name].dim() > 1]
        others = [name for name in present if self.parameters[name].dim() <= 1]
        for names, weight_decay in ((decayed, self.weight_decay), (others, 0.0)):
            self._step(names, lr, weight_decay)

    def _step(self, names: Sequence[str], lr: float, weight_decay: float) -> None:
        parameters = [self.parameters[name] for name in names]
        moments = [self._moments_of(name) for name in names]
        adamw(
            parameters,  # type: ignore[arg-type]
            [parameter.grad for parameter in parameters],  # type: ignore[misc]
            [of["exp_avg"] for of in moments],
            [of["exp_avg_sq"] for of in moments],
            [],
            [of["step"] for of in moments],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=EPSILON,
            maximize=False,
        )

    def _moments_of(self, name: str) -> dict[str, Tensor]:
        if name not in self._moments:
            parameter = self.parameters[name]
            self._moments[name] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return self._moments[name]

    def state(self) -> dict[str, Tensor]:
        """ "<parameter>:<moment>" to tensor, for all parameters that have been moved."""
        return {f"{name}:{key}": value for name, of in self._moments.items() for key, value in of.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up what `state` gave."""
        self._moments = {}
        for name, value in tensors.items():
            parameter, key = name.rsplit(":", 1)
            self._moments.setdefault(parameter, {})[key] = value.to(self.parameters[parameter].device)
