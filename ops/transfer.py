"""Numbers between the host and a device, without the one waiting for the other."""

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor on a device; what is launched after this call finds it there."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Reading:
    """Numbers that the host will want from a device: the copy is ordered now and waited for when it is asked for."""

    def __init__(self, values: Tensor) -> None:
        self._host, self._is_there = values.detach(), None
        if values.device.type != "cpu":
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values.detach(), non_blocking=True)
            self._is_there = torch.cuda.Event()
            self._is_there.record()

    def wait(self) -> Tensor:
        """The numbers, on the CPU."""
        if self._is_there is not None:
            self._is_there.synchronize()
        return self._host
