"""One vector of a row's tokens."""

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
