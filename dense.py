"""Dense layers: torch's own product, or oneDNN's in float32 where the processor has AVX-512.

torch multiplies float32 matrices with MKL, which uses the 512-bit registers of Intel's processors only; oneDNN, which
torch carries for other precisions, uses them wherever they are. The mathematics is the same, sums are taken in another
order.

Shape letters: N packed tokens, I inputs, O outputs of a layer.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ROWS_MULTIPLE = 32  # see `padded_rows`


@cache
def _onednn() -> Callable[..., Tensor] | None:
    """oneDNN's x W^T + b, where torch has it and it is the faster one."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    operations = getattr(torch.ops, "mkldnn", None)
    return getattr(operations, "_linear_pointwise", None)


def product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: str | None = None) -> Tensor:
    """inputs weight^T + bias by oneDNN: (N, I), (O, I), (O,) -> (N, O); `uses_onednn` has to be true.

    gelu: the approximation ("none", "tanh") of a GELU on the result; None for no GELU. Either factor may be a
    transposed view.
    """
    onednn = _onednn()
    assert onednn is not None
    return onednn(inputs, weight, bias, "none" if gelu is None else "gelu", [], gelu or "")


def uses_onednn(inputs: Tensor) -> bool:
    """Whether a layer multiplies these inputs with oneDNN."""
    return (
        inputs.dtype == torch.float32
        and inputs.device.type == "cpu"
        and inputs.dim() == 2
        and len(inputs) > 0
        and _onednn() is not None
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
    )


def padded_rows(inputs: Tensor) -> int:
    """How many rows of zeros to append to (N, I) so that few different shapes occur.

    oneDNN compiles a kernel for each shape it meets, which takes as long as a layer's products; packed batches have
    another number of tokens every time.
    """
    return -len(inputs) % ROWS_MULTIPLE if uses_onednn(inputs) else 0


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return product(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs, weight = ctx.saved_tensors
        wants_inputs, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            product(grad, weight.t()) if wants_inputs else None,
            _weight_gradient(grad, inputs) if wants_weight else None,
            grad.sum(0) if wants_bias else None,
        )


def _weight_gradient(grad: Tensor, inputs: Tensor) -> Tensor:
    """(O, I) from (N, O) and (N, I). oneDNN's first factor is copied when it is transposed: the smaller one."""
    if grad.shape[1] <= inputs.shape[1]:
        return product(grad.t(), inputs.t())
    return product(inputs.t(), grad.t()).t()


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """inputs weight^T + bias: (N, I), (O, I), (O,) -> (N, O)."""
    if not uses_onednn(inputs):
        return F.linear(inputs, weight, bias)
    if not torch.is_grad_enabled():
        return product(inputs, weight, bias)
    return _Linear.apply(inputs, weight, bias)  # type: ignore[no-any-return]


class Linear(nn.Linear):
    """A dense layer with torch's parameters, and with the faster product."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, I) -> (N, O)."""
        return linear(inputs, self.weight, self.bias)

    def with_gelu(self, inputs: Tensor, approximate: str = "none") -> Tensor:
        """GELU of the layer's output: (N, I) -> (N, O); in one pass where no gradient is wanted."""
        if uses_onednn(inputs) and not torch.is_grad_enabled():
            return product(inputs, self.weight, self.bias, approximate)
        return F.gelu(self(inputs), approximate=approximate)
