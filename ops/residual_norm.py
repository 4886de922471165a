"""LayerNorm of a residual sum."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ops import kernels
from ops.dropout import DropoutBits, DropoutMasks, dropout
from ops.linear import triton_kernels


def residual_norm(
    update: Tensor, residual: Tensor, norm: nn.LayerNorm, prob: float, masks: DropoutMasks | None, term: Tensor | None
) -> Tensor:
    """norm(residual + dropout(update) + term), all (N, D). term: None for no term."""
    tensors = [update, residual, norm.weight, norm.bias, *([] if term is None else [term])]
    if kernels.can_run(*tensors):
        bits = masks.bits(update.numel(), prob) if masks is not None and prob > 0 else None
        return _ResidualNorm.apply(update, residual, term, norm.weight, norm.bias, bits, norm.eps)  # type: ignore[no-any-return]
    if update.device.type == "cuda" and (triton := triton_kernels()) is not None:
        return _FusedResidualNorm.apply(update, residual, term, norm.weight, norm.bias, prob, masks, norm.eps, triton)  # type: ignore[no-any-return]
    sums = residual + dropout(update, prob, masks)
    return norm(sums if term is None else sums + term)  # type: ignore[no-any-return]


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


class _FusedResidualNorm(torch.autograd.Function):
    """The same on a GPU. Sums and output have the type of the update, a half one under mixed precision; statistics are
    float32. The backward pass draws dropout's mask again."""

    @staticmethod
    def forward(
        ctx: Any,
        update: Tensor,
        residual: Tensor,
        term: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        prob: float,
        masks: DropoutMasks | None,
        eps: float,
        triton: Any,
    ) -> Tensor:
        update, residual = update.contiguous(), residual.contiguous()
        term = None if term is None else term.contiguous()
        key = (weight, 0) if masks is None or prob == 0 else masks.key()
        ctx.prob, ctx.key, ctx.triton = 0.0 if masks is None else prob, key, triton
        sums, output, moments = triton.residual_norm_forward(update, residual, term, weight, bias, key, ctx.prob, eps)
        ctx.save_for_backward(sums, moments, weight)
        ctx.types = residual.dtype, None if term is None else term.dtype
        return output  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sums, moments, weight = ctx.saved_tensors
        found = ctx.triton.residual_norm_backward(grad.contiguous(), sums, moments, weight, ctx.key, ctx.prob)
        grad_update, grad_sums, grad_weight, grad_bias = found
        residual, term = (None if dtype is None else grad_sums.to(dtype) for dtype in ctx.types)
        return grad_update, residual, term, grad_weight, grad_bias, None, None, None, None
