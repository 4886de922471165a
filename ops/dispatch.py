"""Who has kernels of ours in Triton: every CUDA GPU, as torch brings Triton along there."""

import importlib
from functools import cache
from typing import Any

import torch


@cache
def triton_kernels() -> Any:
    """The module of our kernels in Triton. Imported when it is first needed: torch for CPUs has no Triton."""
    return importlib.import_module("ops.triton_kernels")


def has_fused_operations(device: torch.device) -> bool:
    """Where there are, passes can be recorded as CUDA graphs (graphs.py), and one pass gives each task's gradients
    (task_gradients.py)."""
    return device.type == "cuda"
