"""One vector of a row's tokens."""

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
        return (hidden_states.view(*packing.is_real.shape, -1) * is_real).sum(1) / is_real.sum(1)  # (B, D)
    offsets = F.pad(packing.ends, (1, 0))  # (B,) -> (B + 1,)
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    return torch.segment_reduce(hidden_states.to(wide), "mean", offsets=offsets, unsafe=True)  # checks would wait
