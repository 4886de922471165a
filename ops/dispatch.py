"""Whether a device has kernels of ours in Triton."""

import importlib
from functools import cache
from typing import Any

import torch


@cache
def triton_kernels() -> Any:
    """The module of our kernels in Triton, or None where it cannot be imported."""
    try:
        return importlib.import_module("ops.triton_kernels")
    except ImportError:
        return None


def has_fused_operations(device: torch.device) -> bool:
    """Where it has, passes can be recorded as CUDA graphs (graphs.py; the torch forms of some operations wait for the
    host), and one pass gives each task's gradients (task_gradients.py)."""
    return device.type == "cuda" and triton_kernels() is not None
