"""LayerNorm of a residual sum."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ops import kernels
from ops.dropout import DropoutBits, DropoutMasks, dropout


def residual_norm(
    update: Tensor, residual: Tensor, norm: nn.LayerNorm, prob: float, masks: DropoutMasks | None, term: Tensor | None
) -> Tensor:
    """norm(residual + dropout(update) + term), all (N, D). term: None for no term."""
    tensors = [update, residual, norm.weight, norm.bias, *([] if term is None else [term])]
    if kernels.can_run(*tensors):
        bits = masks.bits(update.numel(), prob) if masks is not None and prob > 0 else None
        return _ResidualNorm.apply(update, residual, term, norm.weight, norm.bias, bits, norm.eps)  # type: ignore[no-any-return]
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
