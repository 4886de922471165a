"""What a gradient treatment computes on task gradients: their inner products, and a weighted sum."""

import torch
from torch import Tensor

from ops.dispatch import triton_kernels
from ops.transfer import to_device

CHUNK = 2**14


def gramian(rows: Tensor, dtype: torch.dtype = torch.float32, chunk: int = CHUNK) -> Tensor:
    """(T, T) inner products of rows (T, P), float64, in one pass over memory.

    Products are summed in this dtype within chunks, and in float64 over them. float32 cannot hold the products of
    entries beyond 1e19 or below 1e-19: see `is_exact`.
    """
    if dtype != rows.dtype:
        pieces = [
            gramian(piece.to(dtype), dtype, chunk) for piece in rows.split(chunk * 64, dim=1)
        ]  # for the memory's sake
        return torch.stack(pieces).sum(0)
    if rows.device.type == "cuda" and dtype == torch.float32:
        return triton_kernels().gramian(rows)  # type: ignore[no-any-return]
    num_rows, size = rows.shape
    whole = size // chunk * chunk
    blocks = rows[:, :whole].view(num_rows, -1, chunk).transpose(0, 1)  # (T, P) -> (P / chunk, T, chunk)
    rest = rows[:, whole:]
    return torch.bmm(blocks, blocks.transpose(1, 2)).double().sum(0) + (rest @ rest.T).double()


def is_exact(gramians: Tensor) -> bool:
    """Whether float32 held all products of these inner products (..., T, T), which are on the host."""
    diagonal = gramians.diagonal(dim1=-2, dim2=-1)
    return bool(gramians.isfinite().all()) and bool((diagonal > 1e-30).all())


def weighted_sum(rows: Tensor, weights: Tensor) -> None:
    """The sum over t of weights[t] * rows[t], in place of the first of the rows (T, P). weights: (T,), on the host."""
    if rows.device.type == "cuda":
        triton_kernels().weighted_sum(rows, to_device(weights.float().numpy(), rows.device))
        return
    first, *others = weights.tolist()
    rows[0].mul_(first)
    for row, weight in zip(rows[1:], others, strict=True):
        rows[0].add_(row, alpha=weight)
