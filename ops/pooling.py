"""What is made of each row's tokens: their mean, or a block of all rows."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.packed import Packing


def row_means(hidden_states: Tensor, packing: Packing) -> Tensor:
    """(B, D) mean over each row's tokens of (N, D), in float32 where that is half precision.

    Each mean is one sum in the order of the row: no atomic additions, and nothing of another row or of the tokens that
    belong to none.
    """
    offsets = F.pad(packing.ends, (1, 0))  # (B,) -> (B + 1,)
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    return torch.segment_reduce(hidden_states.to(wide), "mean", offsets=offsets, unsafe=True)  # checks would wait


def padded(hidden_states: Tensor, packing: Packing, is_backwards: bool = False) -> tuple[Tensor, Tensor]:
    """(N, D) -> (B, L, D): each row's tokens, from its last one on where is_backwards, and behind them its first token
    over and over; (B, L) whether a place is one of the row's tokens."""
    lengths = torch.diff(packing.ends, prepend=packing.ends.new_zeros(1))  # (B,)
    place = torch.arange(packing.longest_row, device=packing.ends.device)  # (L,)
    is_token = place < lengths[:, None]  # (B, L)
    starts = (packing.ends - lengths)[:, None]  # (B, 1)
    forwards = starts + torch.where(is_token, place, 0)
    tokens = torch.where(is_token, packing.ends[:, None] - 1 - place, starts) if is_backwards else forwards  # (B, L)
    return hidden_states.index_select(0, tokens.flatten()).unflatten(0, tokens.shape), is_token
