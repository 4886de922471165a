"""Activations, and a dense layer with its activation."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops import kernels
from ops.dispatch import triton_kernels
from ops.linear import Linear, linear, onednn_product, sums_of_parts, uses_onednn
from ops.task_gradients import task_bounds

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "gelu": F.gelu,
        "gelu_new": partial(F.gelu, approximate="tanh"),
        "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
        "relu": F.relu,
        "silu": F.silu,
        "swish": F.silu,
    }
)


def activated_linear(inputs: Tensor, layer: Linear, activation: str) -> Tensor:
    """activation(layer(inputs)): (N, I) -> (N, O). activation: one of ACTIVATIONS."""
    if activation == "gelu" and uses_onednn(inputs) and not torch.is_grad_enabled():
        return onednn_product(inputs, layer.weight, layer.bias, gelu="none")
    if activation == "gelu" and inputs.device.type == "cuda":
        return _TritonGelu.apply(linear(inputs, layer.weight, None), layer.bias)  # type: ignore[no-any-return]
    output = layer(inputs)  # (N, O)
    if activation == "gelu" and kernels.can_run(output):
        return _Gelu.apply(output)  # type: ignore[no-any-return]
    return ACTIVATIONS[activation](output)


def gated_linear(inputs: Tensor, layer: Linear, activation: str) -> Tensor:
    """activation(v) * g, v and g the halves of layer(inputs): (N, I) -> (N, O / 2)."""
    output: Tensor = layer(inputs)  # (N, O)
    values, gates = output.chunk(2, 1)
    return ACTIVATIONS[activation](values) * gates


class _Gelu(torch.autograd.Function):
    """The exact GELU, by our kernel."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        inputs = inputs.contiguous()
        ctx.save_for_backward(inputs)
        output = torch.empty_like(inputs)
        kernels.call("gelu_forward", inputs.numel(), inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inputs,) = ctx.saved_tensors
        grad_inputs = torch.empty_like(inputs)
        kernels.call("gelu_backward", inputs.numel(), inputs, grad.contiguous(), grad_inputs)
        return grad_inputs


class _TritonGelu(torch.autograd.Function):
    """The exact GELU of a sum with a bias, on a GPU: (N, O), (O,) -> (N, O)."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, bias: Tensor) -> Tensor:
        inputs = inputs.contiguous()
        ctx.save_for_backward(inputs, bias)
        ctx.bounds = task_bounds()
        return triton_kernels().gelu_forward(inputs, bias)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        inputs, bias = ctx.saved_tensors
        grad_inputs, parts = triton_kernels().gelu_backward(grad.contiguous(), inputs, bias, ctx.bounds)
        return grad_inputs, sums_of_parts(parts, [bias], ctx.needs_input_grad[1:], ctx.bounds)[0]
