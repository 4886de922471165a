"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) on clipped gradients.

By our own kernel where there is one, which clips in the same pass over memory; else by torch's fused one, which
torch.optim.AdamW calls too: its base class imports torch's compiler when it is made, the longest part of a run's start.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

import kernels

BETAS, EPSILON = (0.9, 0.999), 1e-8


def gradient_norm(gradients: Sequence[Tensor]) -> float:
    """Euclidean norm of all gradients together; infinite or NaN where one of them is."""
    if kernels.usable(*gradients):
        return math.sqrt(sum(kernels.squared_norm(gradient.contiguous()) for gradient in gradients))
    norm = float(nn.utils.get_total_norm(gradients, foreach=True))
    if math.isfinite(norm):
        return norm
    return float(nn.utils.get_total_norm([gradient.double() for gradient in gradients]))  # float32 ends at 1e19 here


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of this norm are multiplied by so that it is at most max_norm; 0 for no limit."""
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0


class AdamW:
    """AdamW without weight decay for biases and LayerNorms, which are the parameters of one dimension.

    A parameter without a gradient is left alone, its moments and its count of steps too.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], weight_decay: float) -> None:
        self.parameters = parameters
        self.weight_decay = weight_decay
        self._moments: dict[str, dict[str, Tensor]] = {}
        self._has_moments: dict[str, Tensor] = {}  # of parameters with `lines`: (V,) uint8, 0 where moments are zero

    @torch.no_grad()
    def step(self, lr: float, factor: float = 1.0, lines: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Moves the parameters along their gradients times `factor`. What `grad` holds afterwards is nobody's.

        lines: of matrices by name the lines whose gradient may not be zero; nothing else of it has to be looked at.
        """
        present = [name for name, parameter in self.parameters.items() if parameter.grad is not None]
        decayed = [name for name in present if self.parameters[name].dim() > 1]
        others = [name for name in present if self.parameters[name].dim() <= 1]
        for names, weight_decay in ((decayed, self.weight_decay), (others, 0.0)):
            if names:
                self._step(names, lr, factor, weight_decay, lines)

    def _step(
        self, names: Sequence[str], lr: float, factor: float, weight_decay: float, lines: Mapping[str, Tensor]
    ) -> None:
        parameters = [self.parameters[name] for name in names]
        # Contiguous, as the parameters are: torch's kernel too goes by addresses alone.
        gradients = [parameter.grad.contiguous() for parameter in parameters if parameter.grad is not None]
        moments = [self._moments_of(name) for name in names]
        if kernels.usable(*parameters, *gradients):
            for name, parameter, gradient, of in zip(names, parameters, gradients, moments, strict=True):
                state = self._line_states(name, lines.get(name))
                _kernel_step(parameter, gradient, of, lr, factor, weight_decay, state)
            return
        self._has_moments.clear()
        if factor != 1:
            torch._foreach_mul_(gradients, factor)
        adamw(
            parameters,  # type: ignore[arg-type]
            gradients,
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

    def _line_states(self, name: str, lines: Tensor | None) -> Tensor | None:
        """(V,) uint8, as the kernel wants them: 0 zero moments and gradient, 1 zero gradient, 2 neither; None where any
        line may have a gradient."""
        if lines is None:
            self._has_moments.pop(name, None)
            return None
        if name not in self._has_moments:
            moments = self._moments[name]
            self._has_moments[name] = (moments["exp_avg"].any(1) | moments["exp_avg_sq"].any(1)).to(torch.uint8)
        states = self._has_moments[name].clone()
        states[lines] = 2
        self._has_moments[name][lines] = 1
        return states

    def state(self) -> dict[str, Tensor]:
        """ "<parameter>:<moment>" to tensor, for all parameters that have been moved."""
        return {f"{name}:{key}": value for name, of in self._moments.items() for key, value in of.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up what `state` gave."""
        self._moments, self._has_moments = {}, {}
        for name, value in tensors.items():
            parameter, key = name.rsplit(":", 1)
            self._moments.setdefault(parameter, {})[key] = value.to(self.parameters[parameter].device)


def _kernel_step(
    parameter: Tensor,
    gradient: Tensor,
    moments: Mapping[str, Tensor],
    lr: float,
    factor: float,
    weight_decay: float,
    line_states: Tensor | None,
) -> None:
    step = float(moments["step"].add_(1))
    kernels.adamw(
        parameter,
        gradient,
        moments["exp_avg"],
        moments["exp_avg_sq"],
        line_states,
        factor=factor,
        decay=1 - lr * weight_decay,
        betas=BETAS,
        step_size=lr / (1 - BETAS[0] ** step),
        root_correction=math.sqrt(1 - BETAS[1] ** step),
        epsilon=EPSILON,
    )
