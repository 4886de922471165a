"""What is made of each row's tokens: their mean, or a block of all rows."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.packed import Packing, Padded


def row_means(hidden_states: Tensor, packing: Packing) -> Tensor:
    """(B, D) mean over each row's tokens of (N, D), in float32 where that is half precision.

    Each mean is one sum in the order of the row: no atomic additions, and nothing of another row or of the tokens that
    belong to none.
    """
    if isinstance(packing, Padded):
        is_real = packing.is_real.to(hidden_states.dtype)[..., None]  # (B, L, 1)
        sums: Tensor = (hidden_states.unflatten(0, packing.is_real.shape) * is_real).sum(1)  # (B, D)
        return sums / is_real.sum(1)
    offsets = F.pad(packing.ends, (1, 0))  # (B,) -> (B + 1,)
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    return torch.segment_reduce(hidden_states.to(wide), "mean", offsets=offsets, unsafe=True)  # checks would wait


def padded(hidden_states: Tensor, packing: Packing, is_backwards: bool = False) -> tuple[Tensor, Tensor]:
    """(N, D) -> (B, L, D): each row's tokens, from its last one on where is_backwards, and behind them its first token
    over and over; (B, L) whether a place is one of the row's tokens."""
    starts, lengths = (of[:, None] for of in packing.bounds())  # (B, 1) each
    place = torch.arange(packing.longest_row, device=starts.device)  # (L,)
    is_token = place < lengths  # (B, L)
    tokens = starts + torch.where(is_token, lengths - 1 - place if is_backwards else place, 0)  # (B, L)
    return hidden_states.index_select(0, tokens.flatten()).unflatten(0, tokens.shape), is_token
