"""Dense layers in float32 on the CPU: the faster library's product, and gradients that are added where they belong.

torch multiplies float32 matrices with MKL, which uses the 512-bit registers of Intel's processors only; oneDNN, which
torch carries for other precisions, uses them wherever they are. Where a processor that is not Intel's has AVX-512, the
product is oneDNN's. The mathematics is the same, sums are taken in another order.

Shape letters: N packed tokens, I inputs, O outputs of a layer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import kernels

ROWS_MULTIPLE = 32  # see `padded_rows`
_adds_in_place = ContextVar("adds_in_place", default=False)


@contextmanager
def weight_gradients_in_place() -> Iterator[None]:
    """Within it a backward pass adds the gradients of dense layers' weights straight to `weight.grad`.

    It saves a matrix for each layer and a pass over it. For a plain `backward()` only: torch.autograd.grad and
    `backward(inputs=...)` would change `grad` too, which they promise not to. Weights without a `grad`, with a hook on
    it, or multiplied by oneDNN, which cannot add, get theirs as ever.
    """
    token = _adds_in_place.set(True)
    try:
        yield
    finally:
        _adds_in_place.reset(token)


@cache
def _onednn() -> Callable[..., Tensor] | None:
    """oneDNN's x W^T + b, where torch has it."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(getattr(torch.ops, "mkldnn", None), "_linear_pointwise", None)


@cache
def _onednn_is_faster() -> bool:
    """Whether it is the faster one: with AVX-512 everywhere but on Intel's processors, where MKL is."""
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_avx512 and _onednn() is not None and not (torch.backends.mkl.is_available() and _is_intel())


def _is_intel() -> bool:
    """Whether the processor is Intel's; it is taken for one where there is no telling."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True


def product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: str | None = None) -> Tensor:
    """inputs weight^T + bias by oneDNN: (N, I), (O, I), (O,) -> (N, O); `uses_onednn` has to be true.

    gelu: the approximation ("none", "tanh") of a GELU on the result; None for no GELU. Either factor may be a
    transposed view.
    """
    onednn = _onednn()
    assert onednn is not None
    return onednn(inputs, weight, bias, "none" if gelu is None else "gelu", [], gelu or "")


def _is_ours(inputs: Tensor) -> bool:
    """Whether these inputs are a case for this module; torch's own layer does all others."""
    return (
        inputs.dtype == torch.float32
        and inputs.device.type == "cpu"
        and inputs.dim() == 2
        and len(inputs) > 0
        and not torch.is_autocast_enabled("cpu")
    )


def uses_onednn(inputs: Tensor) -> bool:
    """Whether a layer multiplies these inputs with oneDNN."""
    return _is_ours(inputs) and _onednn_is_faster() and bool(torch.backends.mkldnn.enabled)


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
        return product(inputs, weight, bias) if uses_onednn(inputs) else F.linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs, weight = ctx.saved_tensors
        wants_inputs, wants_weight, wants_bias = ctx.needs_input_grad
        grad_inputs = grad_weight = None
        if wants_inputs:
            grad_inputs = product(grad, weight.t()) if uses_onednn(grad) else grad.mm(weight)
        if wants_weight:
            grad_weight = _weight_gradient(grad, inputs, weight)
        return grad_inputs, grad_weight, grad.sum(0) if wants_bias else None


def _weight_gradient(grad: Tensor, inputs: Tensor, weight: Tensor) -> Tensor | None:
    """(O, I) from (N, O) and (N, I); None where it has been added to weight.grad."""
    if not uses_onednn(grad):
        if _adds_in_place.get() and weight.is_leaf and weight.grad is not None and not weight._backward_hooks:
            weight.grad.addmm_(grad.t(), inputs)
            return None
        return grad.t().mm(inputs)
    if grad.shape[1] <= inputs.shape[1]:  # oneDNN's first factor is copied when it is transposed: the smaller one
        return product(grad.t(), inputs.t())
    return product(inputs.t(), grad.t()).t()


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """inputs weight^T + bias: (N, I), (O, I), (O,) -> (N, O)."""
    if not _is_ours(inputs):
        return F.linear(inputs, weight, bias)
    if torch.is_grad_enabled():
        return _Linear.apply(inputs, weight, bias)  # type: ignore[no-any-return]
    return product(inputs, weight, bias) if uses_onednn(inputs) else F.linear(inputs, weight, bias)


class Linear(nn.Linear):
    """A dense layer with torch's parameters, and with the faster product."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, I) -> (N, O)."""
        return linear(inputs, self.weight, self.bias)

    def split(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """The output (N, O), and the bias (O,) that it still lacks where a kernel is to add it."""
        if inputs.dim() == 2 and kernels.usable(inputs):
            return linear(inputs, self.weight, None), self.bias
        return self(inputs), None

    def with_gelu(self, inputs: Tensor, approximate: str = "none") -> Tensor:
        """GELU of the layer's output: (N, I) -> (N, O)."""
        if uses_onednn(inputs) and not torch.is_grad_enabled():
            return product(inputs, self.weight, self.bias, approximate)
        output, bias = self.split(inputs) if approximate == "none" else (self(inputs), None)
        if bias is not None:
            return kernels.bias_gelu(output, bias)
        return F.gelu(output, approximate=approximate)
