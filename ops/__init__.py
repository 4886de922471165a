"""What the encoder computes with. Each file has an operation's plain torch form: it is the definition, what runs where
nothing faster is to be had, and what tests compare with. Beside it one dispatch decides who answers: torch, oneDNN, a
kernel of our own for the CPU that is compiled when it is first needed (kernels.py), or one for CUDA
(triton_kernels.py). Outside this package one question is asked of it, `has_fused_operations`: whether passes can be
recorded and task gradients taken apart within one, which the training step is laid out by.

                                CPU                                         CUDA
attention, residual norm, GELU  kernels.c in float32 if compiled, or torch  triton_kernels.py
linear                          oneDNN where it is faster, or torch         torch, or linear.py in half precision
task gradients of one pass      none: a pass for each task                  triton_kernels.py, linear.py
AdamW                           torch's fused kernel                        triton_kernels.py
Gram matrix, weighted sum       torch                                       triton_kernels.py
dropout                         bits of numpy's, dropout.py                 triton_kernels.py
embedding, pooling, layer norm  torch                                       torch

Shape letters: N packed tokens, B rows, L longest row of a group, D hidden, H heads, E = D / H.
"""

from ops.activation import ACTIVATIONS, activated_linear, gated_linear
from ops.adamw import Moments, Vector, adamw_step
from ops.attention import attention, first_token_attention, rotated
from ops.dispatch import has_fused_operations
from ops.dropout import DropoutMasks, dropout
from ops.embedding import embedding
from ops.gramian import gramian, is_exact, weighted_sum
from ops.graphs import Replayed
from ops.kernels import speed_report
from ops.linear import Linear, linear
from ops.packed import PackedTokens, Packing, Padded, TokenStore
from ops.pooling import padded, row_means
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
    "gated_linear",
    "gradients_by_task",
    "gramian",
    "has_fused_operations",
    "is_exact",
    "layer_norm",
    "linear",
    "linear_residual_norm",
    "padded",
    "rotated",
    "row_means",
    "speed_report",
    "to_device",
    "weighted_sum",
]
