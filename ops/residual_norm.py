"""A dense layer, and LayerNorm of its residual sum."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ops import kernels
from ops.dispatch import triton_kernels
from ops.dropout import DropoutBits, DropoutMasks, dropout
from ops.linear import Linear, linear, sums_of_parts
from ops.task_gradients import TaskBounds, task_bounds


def linear_residual_norm(
    inputs: Tensor,
    layer: Linear,
    residual: Tensor,
    norm: nn.LayerNorm,
    prob: float,
    masks: DropoutMasks | None,
    term: Tensor | None = None,
) -> Tensor:
    """norm(residual + dropout(layer(inputs)) + term): inputs (N, I), residual and term (N, D) -> (N, D).

    term: None for no term.
    """
    if inputs.device.type != "cuda":
        return residual_norm(layer(inputs), residual, norm, prob, masks, term)
    update = linear(inputs, layer.weight, None)  # (N, D); the kernel adds the bias
    return _TritonResidualNorm.apply(update, layer.bias, residual, term, norm.weight, norm.bias, prob, masks, norm.eps)  # type: ignore[no-any-return]


def residual_norm(
    update: Tensor, residual: Tensor, norm: nn.LayerNorm, prob: float, masks: DropoutMasks | None, term: Tensor | None
) -> Tensor:
    """norm(residual + dropout(update) + term), all (N, D)."""
    tensors = [update, residual, norm.weight, norm.bias, *([] if term is None else [term])]
    if kernels.can_run(*tensors):
        bits = masks.bits(update.numel(), prob) if masks is not None and prob > 0 else None
        return _ResidualNorm.apply(update, residual, term, norm.weight, norm.bias, bits, norm.eps)  # type: ignore[no-any-return]
    sums = residual + dropout(update, prob, masks)
    return norm(sums if term is None else sums + term)  # type: ignore[no-any-return]


def layer_norm(inputs: Tensor, norm: nn.LayerNorm) -> Tensor:
    """norm(inputs), (N, D)."""
    bounds = task_bounds()
    if bounds is None:
        return norm(inputs)  # type: ignore[no-any-return]
    normalized = F.layer_norm(inputs, norm.normalized_shape, eps=norm.eps)
    return _ScaleAndShift.apply(normalized, norm.weight, norm.bias, bounds)  # type: ignore[no-any-return]


class _ScaleAndShift(torch.autograd.Function):
    """values * weight + shift, (N, D), or without a shift, with each task's gradients of weight and shift (D,)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, shift: Tensor | None, bounds: TaskBounds) -> Tensor:
        ctx.save_for_backward(values, weight)
        ctx.parameters, ctx.bounds = (weight, shift), bounds
        return values * weight if shift is None else values * weight + shift

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, weight = ctx.saved_tensors
        for parameter, lines in zip(ctx.parameters, (grad * values, grad), strict=True):
            if parameter is None:
                continue
            parts = triton_kernels().column_parts(lines.contiguous(), ctx.bounds)
            sums_of_parts(parts, [parameter], [True], ctx.bounds)
        return grad * weight, None, None, None


class _ResidualNorm(torch.autograd.Function):
    """The same by our kernel, in one pass over memory forward and one backward."""

    @staticmethod
    def forward(
        ctx: Any,
        update: Tensor,
        residual: Tensor,
        term: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        bits: DropoutBits | None,
        eps: float,
    ) -> Tensor:
        update, residual, weight, bias = (t.contiguous() for t in (update, residual, weight, bias))
        term = None if term is None else term.contiguous()
        assert residual.shape == update.shape and (term is None or term.shape == update.shape)
        sums, output = torch.empty_like(update), torch.empty_like(update)  # (N, D)
        mean, scale = update.new_empty(len(update)), update.new_empty(len(update))  # (N,)
        arguments = (update, residual, term, *kernels.bits_arguments(bits), weight, bias, eps)
        kernels.call("residual_norm_forward", *update.shape, *arguments, sums, mean, scale, output)
        ctx.save_for_backward(sums, mean, scale, weight)
        ctx.bits, ctx.has_term = bits, term is not None
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sums, mean, scale, weight = ctx.saved_tensors
        grad_sums = torch.empty_like(sums)
        grad_update = grad_sums if ctx.bits is None else torch.empty_like(sums)
        parts = weight.new_zeros(2, torch.get_num_threads(), len(weight))  # each thread's part of the sum over rows
        arguments = (grad.contiguous(), sums, mean, scale, weight, *kernels.bits_arguments(ctx.bits))
        kernels.call("residual_norm_backward", *sums.shape, *arguments, grad_sums, grad_update, *parts)
        grad_weight, grad_bias = parts.sum(1)  # (2, threads, D) -> (D,), (D,)
        return grad_update, grad_sums, grad_sums if ctx.has_term else None, grad_weight, grad_bias, None, None


class _TritonResidualNorm(torch.autograd.Function):
    """The same on a GPU, where the bias of the update's layer is added too. Sums and output have the type of the
    update, a half one under mixed precision; statistics are float32. The backward pass draws dropout's mask again."""

    @staticmethod
    def forward(
        ctx: Any,
        update: Tensor,
        bias: Tensor,
        residual: Tensor,
        term: Tensor | None,
        weight: Tensor,
        shift: Tensor,
        prob: float,
        masks: DropoutMasks | None,
        eps: float,
    ) -> Tensor:
        update, residual = update.contiguous(), residual.contiguous()
        term = None if term is None else term.contiguous()
        ctx.prob, ctx.masks = 0.0 if masks is None else prob, None if prob == 0 else masks
        ctx.key = (weight, 0) if masks is None or prob == 0 else masks.key()
        forward = triton_kernels().residual_norm_forward
        sums, output, moments = forward(update, bias, residual, term, weight, shift, ctx.key, ctx.prob, eps)
        ctx.save_for_backward(sums, moments, weight)
        ctx.bounds = task_bounds()
        ctx.types, ctx.parameters = (residual.dtype, None if term is None else term.dtype), (weight, shift, bias)
        return output  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sums, moments, weight = ctx.saved_tensors
        if ctx.masks is not None:
            ctx.masks.check_seed()
        backward = triton_kernels().residual_norm_backward
        grad_update, grad_sums, parts = backward(
            grad.contiguous(), sums, moments, weight, ctx.key, ctx.prob, ctx.bounds
        )
        residual, term = (None if dtype is None else grad_sums.to(dtype) for dtype in ctx.types)
        are_wanted = [ctx.needs_input_grad[place] for place in (4, 5, 1)]
        grad_weight, grad_shift, grad_bias = sums_of_parts(
            parts, ctx.parameters, are_wanted, ctx.bounds
        )  # (T, programs, 3, D) -> (D,)
        return grad_update, grad_bias, residual, term, grad_weight, grad_shift, None, None, None
