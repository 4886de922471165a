"""Lookup of rows of a matrix."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.task_gradients import TaskBounds, task_bounds


def embedding(ids: Tensor, weight: Tensor, is_vocabulary: bool = True) -> Tensor:
    """weight[ids]: (N,), (V, D) -> (N, D). is_vocabulary: the matrix has far more lines than there are ids.

    On a CPU a backward pass into a gradient that is there then adds its N rows to it, instead of making a matrix of the
    whole vocabulary first. (A GPU would wait for the host to add them.)
    """
    if (bounds := task_bounds()) is not None:
        return _EmbeddingByTask.apply(ids, weight, bounds)  # type: ignore[no-any-return]
    adds_rows = is_vocabulary and weight.device.type == "cpu" and weight.is_leaf and weight.grad is not None
    return F.embedding(ids, weight, sparse=adds_rows)


class _EmbeddingByTask(torch.autograd.Function):
    """Adds each task's gradient to its own: as of a matrix with a copy of every line for each task."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, bounds: TaskBounds) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.bounds = weight, bounds
        return weight[ids]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        (ids,), weight, ends = ctx.saved_tensors, ctx.weight, ctx.bounds.tokens[1:]
        task = torch.searchsorted(ends, torch.arange(len(ids), device=ids.device, dtype=ends.dtype), right=True)  # (N,)
        into, size = ctx.bounds.gradients(weight.grad), len(weight)  # (T, V, D), V
        found = torch.ops.aten.embedding_dense_backward(grad, ids + size * task, len(ends) * size, -1, False)
        into.add_(found.view_as(into))
        return None, None, None
