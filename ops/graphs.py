"""CUDA graphs: a function that is called over and over is recorded once for each shape of its inputs, and replayed.

A replay costs the host one launch, where the function itself costs it a thousand.
"""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class Replayed:
    """A function of tensors on a GPU and of a key, from the second call with a key on as a CUDA graph.

    All that the function does must follow from the key and from the tensors, and it must not wait for the device; what
    it changes in place lies where it lies. It returns a tensor, which the next call may overwrite.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self._seen: set[Hashable] = set()
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, key: Hashable, *inputs: Tensor) -> Tensor:
        if key not in self._seen:  # libraries prepare at a first call what must not be recorded
            self._seen.add(key)
            self._stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(self._stream):  # what autograd makes for a parameter stays on its first stream
                    return self.function(key, *inputs)
            finally:
                torch.cuda.current_stream().wait_stream(self._stream)
        if key not in self._recorded:
            places = [tensor.clone() for tensor in inputs]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                output = self.function(key, *places)
            self._recorded[key] = graph, places, output
        graph, places, output = self._recorded[key]
        for place, tensor in zip(places, inputs, strict=True):
            place.copy_(tensor)
        graph.replay()
        return output
