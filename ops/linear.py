"""Dense layers. On a CPU the product is that of the faster library.

torch multiplies float32 matrices with MKL, which uses the 512-bit registers of Intel's processors only; oneDNN, which
torch carries for other precisions, uses them wherever they are: there the product is oneDNN's. The mathematics is the
same, sums are taken in another order. On a GPU under mixed precision the gradient of a matrix stays in float32, and is
added to what is there by its product.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ops.dispatch import triton_kernels
from ops.task_gradients import TaskBounds, task_bounds

WHOLE = slice(None)


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None, part: slice = WHOLE) -> Tensor:
    """inputs weight^T + bias: (N, I), (O, I), (O,) -> (N, O). part: which of the outputs are wanted."""
    if inputs.device.type == "cuda" and (torch.is_autocast_enabled("cuda") or task_bounds() is not None):
        return _CudaLinear.apply(inputs, weight, bias, part)  # type: ignore[no-any-return]
    if part != WHOLE:
        weight, bias = weight[part], None if bias is None else bias[part]
    if uses_onednn(inputs):
        return _OnednnLinear.apply(inputs, weight, bias)  # type: ignore[no-any-return]
    return F.linear(inputs, weight, bias)


class Linear(nn.Linear):
    """A dense layer with torch's parameters."""

    def forward(self, inputs: Tensor) -> Tensor:
        return linear(inputs, self.weight, self.bias)


# ------------------------------------------------------------------------------------------------------- oneDNN


@cache
def _onednn_is_faster() -> bool:
    """With AVX-512 everywhere but on Intel's processors, where MKL is. Where there is no telling it is one."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        is_intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        is_intel = True
    return not (is_intel and torch.backends.mkl.is_available())


def uses_onednn(inputs: Tensor) -> bool:
    """Whether these inputs are multiplied by oneDNN."""
    return (
        not torch.compiler.is_exporting()
        and inputs.dtype == torch.float32
        and inputs.device.type == "cpu"
        and inputs.dim() == 2
        and len(inputs) > 0
        and _onednn_is_faster()
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
    )


def rows_multiple(device: torch.device, num_tokens: int = 0) -> int:
    """The number of tokens of a batch is filled up to a multiple of this, so that few different shapes occur.

    oneDNN compiles a kernel for each shape it meets, which takes as long as a layer's products; packed batches have
    another number of tokens every time.
    """
    if device.type == "cuda":
        return max(64, 1 << num_tokens.bit_length() >> 5)  # 3% on average, for the sake of few CUDA graphs
    return 32 if device.type == "cpu" and _onednn_is_faster() else 1


def onednn_product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: str | None = None) -> Tensor:
    """inputs weight^T + bias: (N, I), (O, I), (O,) -> (N, O). Either factor may be a transposed view.

    gelu: the approximation ("none", "tanh") of a GELU on the result; None for no GELU.
    """
    attribute = "none" if gelu is None else "gelu"
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, attribute, [], gelu or "")  # type: ignore[no-any-return]


class _OnednnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return onednn_product(inputs, weight, bias)  # (N, O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs, weight = ctx.saved_tensors
        wants_inputs, wants_weight, wants_bias = ctx.needs_input_grad
        grad_inputs = onednn_product(grad, weight.t()) if wants_inputs else None  # (N, I)
        grad_weight = None
        if wants_weight and grad.shape[1] <= inputs.shape[1]:  # a transposed first factor is copied: the smaller one
            grad_weight = onednn_product(grad.t(), inputs.t())  # (O, I)
        elif wants_weight:
            grad_weight = onednn_product(inputs.t(), grad.t()).t()  # (O, I)
        return grad_inputs, grad_weight, grad.sum(0) if wants_bias else None


# --------------------------------------------------------------------------------------------------------- CUDA


class _CudaLinear(torch.autograd.Function):
    """Under autocast factors are in half precision; parameters and their gradients are float32. Gradients are added to
    what is there, each task's to its own within `gradients_by_task`."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, part: slice) -> Tensor:
        is_half = torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if is_half else inputs.dtype
        factors = inputs.to(dtype), weight[part].to(dtype)
        ctx.save_for_backward(*factors)
        ctx.weight, ctx.bias, ctx.part, ctx.type_of_inputs, ctx.bounds = weight, bias, part, inputs.dtype, task_bounds()
        with torch.autocast("cuda", enabled=False):
            return F.linear(*factors, None if bias is None else bias[part].to(dtype))  # (N, O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        grad = grad.contiguous()
        wants_inputs, wants_weight, wants_bias, _ = ctx.needs_input_grad
        grad_inputs = (grad @ weight).to(ctx.type_of_inputs) if wants_inputs else None  # (N, I)
        of_weight, is_added = None, wants_weight and _holds_gradient(ctx.weight)
        if wants_weight:
            of_weight = ctx.weight.grad if is_added else torch.zeros_like(ctx.weight)
            into = of_weight[ctx.part]  # (O, I)
            if ctx.bounds is None:
                torch.addmm(into, grad.t(), inputs, out_dtype=torch.float32, out=into)
            else:
                triton_kernels().add_products(grad, inputs.contiguous(), into, ctx.bounds)
        grad_bias = _bias_gradient(grad, ctx.bias, ctx.part, ctx.bounds) if wants_bias else None
        return grad_inputs, None if is_added else of_weight, grad_bias, None


def _holds_gradient(parameter: Tensor) -> bool:
    """Whether there is a gradient to add to."""
    return parameter.is_leaf and parameter.grad is not None


def _bias_gradient(grad: Tensor, bias: Tensor, part: slice, bounds: TaskBounds | None) -> Tensor | None:
    """(N, O) -> (O,) float32, or None where it has been added to what is there."""
    return sums_of_parts(triton_kernels().column_parts(grad, bounds), [bias], [True], bounds, part)[0]


def sums_of_parts(
    parts: Tensor,
    parameters: Sequence[Tensor],
    are_wanted: Sequence[bool],
    bounds: TaskBounds | None,
    part: slice = WHOLE,
) -> list[Tensor | None]:
    """Gradients of K vectors (D,) from parts of sums, (T, programs, K, D) -> (D,) float32 each; None where none is
    wanted, and where it has been added to what is there. part: of the vectors, what the sums are for."""
    pairs = list(zip(parameters, are_wanted, strict=True))
    are_added = [is_wanted and _holds_gradient(p) for p, is_wanted in pairs]
    assert bounds is None or all(are_added)
    into: list[Any] = [
        p.grad if is_added else torch.zeros_like(p) for p, is_added in zip(parameters, are_added, strict=True)
    ]
    triton_kernels().add_parts(parts, [of[part] for of in into], 0 if bounds is None else bounds.stride)
    are_returned = [is_wanted and not is_added for is_wanted, is_added in zip(are_wanted, are_added, strict=True)]
    return [sums if is_returned else None for sums, is_returned in zip(into, are_returned, strict=True)]
