"""What the encoder computes with. Each operation's plain torch form stands first: it is the definition, what runs where
nothing faster is to be had, and what tests compare with. Below it one dispatch, in each file, decides who answers:
torch, oneDNN, a kernel of our own for the CPU that is compiled when it is first needed (kernels.py), or one for CUDA
(triton_kernels.py). Nobody outside this package knows which.

                                CPU                               CUDA with Triton          else
attention, residual norm, GELU  kernels.c in float32              triton_kernels.py         torch
linear                          oneDNN where it is faster         half precision: linear.py torch
a task's part of a gradient     a pass for each task              triton_kernels.py         a pass for each task
AdamW                           torch's fused kernel              triton_kernels.py         torch's fused kernel
Gram matrix, weighted sum       torch                             triton_kernels.py         torch
dropout                         bits of numpy's, dropout.py       triton_kernels.py         torch

Shape letters: N packed tokens, B rows, L longest row of a group, D hidden, H heads, E = D / H.
"""

from ops.activation import ACTIVATIONS, activated_linear
from ops.adamw import Moments, Vector, adamw_step
from ops.attention import attention, first_token_attention
from ops.dispatch import has_fused_operations
from ops.dropout import DropoutMasks, dropout
from ops.embedding import embedding
from ops.gradients import gramian, is_exact, weighted_sum
from ops.graphs import Replayed
from ops.kernels import speed_report
from ops.linear import Linear, linear
from ops.packed import PackedTokens, Packing, Padded, TokenStore
from ops.pooling import row_means
from ops.residual_norm import layer_norm, linear_residual_norm
from ops.task_gradients import TaskBounds, gradients_by_task
from ops.transfer import Reading, to_device

__all__ = [
    "ACTIVATIONS",
    "DropoutMasks",
    "Linear",
    "Moments",
    "PackedTokens",
    "Packing",
    "Padded",
    "Reading",
    "Replayed",
    "TaskBounds",
    "TokenStore",
    "Vector",
    "activated_linear",
    "adamw_step",
    "attention",
    "dropout",
    "embedding",
    "first_token_attention",
    "gradients_by_task",
    "gramian",
    "has_fused_operations",
    "is_exact",
    "layer_norm",
    "linear",
    "linear_residual_norm",
    "row_means",
    "speed_report",
    "to_device",
    "weighted_sum",
]
