"""Lookup of rows of a matrix."""

import torch.nn.functional as F
from torch import Tensor


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """weight[ids]: (N,), (V, D) -> (N, D).

    On a CPU a backward pass into a gradient that is there adds its N rows to it, instead of making a matrix of the
    whole vocabulary first. (A GPU would wait for the host to add them.)
    """
    adds_rows = weight.device.type == "cpu" and weight.is_leaf and weight.grad is not None
    return F.embedding(ids, weight, sparse=adds_rows)
