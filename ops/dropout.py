"""Dropout whose masks come from a seed of their own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.dispatch import triton_kernels

SLACK = 16  # words behind the last element's that a kernel may read


def dropout(hidden_states: Tensor, prob: float, masks: "DropoutMasks | None") -> Tensor:
    """Inverted dropout where masks are given (training); nothing without (evaluation)."""
    if masks is None or prob == 0:
        return hidden_states
    if hidden_states.device.type == "cuda":
        return _TritonDropout.apply(hidden_states, prob, masks)  # type: ignore[no-any-return]
    return hidden_states * masks.mask(hidden_states.shape, prob, hidden_states.dtype)


@dataclass(frozen=True)
class DropoutBits:
    """A mask as the kernels take it: an element is kept where its word is at least `threshold`, and multiplied by
    `keep`. words: (numel + SLACK,) int16; the last SLACK mean nothing."""

    words: Tensor
    threshold: int
    keep: float


class DropoutMasks:
    """Masks drawn one after the other from a seed: 1 / (1 - prob) where an element is kept, else 0.

    On the CPU a mask compares 16 random bits an element with the probability, several times as fast as drawing
    Bernoulli variables. The probability is met to within 1/131072; the scale is exact for the one that is met.

    A GPU's kernels draw for themselves from a seed in its memory and a mask's number, and once more in their backward
    pass. The seed is set when masks are made, outside of what a CUDA graph records, so that a replayed pass draws anew;
    until its backward pass is done no masks of another seed can be made for the device. The device's default generator
    is set to the seed as well, for what else a pass draws.
    """

    _seeds: ClassVar[dict[torch.device, tuple[int, Tensor]]] = {}  # of the masks made last, and where kernels find it

    def __init__(self, seed: int, device: torch.device | str = "cpu", is_again: bool = False) -> None:
        """seed: from 0 to 2**63 - 1. is_again: it is the device's already."""
        self.seed, self.device = seed, torch.device(device)
        self._num_keys = 0
        if self.device.type == "cpu":
            self._words = np.random.SFC64(seed)
        elif not is_again:
            torch.cuda.default_generators[self.device.index or 0].manual_seed(seed)
            _, place = self._seeds.get(self.device) or (0, torch.empty(1, dtype=torch.int64, device=self.device))
            self._seeds[self.device] = seed, place.fill_(seed)

    def again(self) -> "DropoutMasks":
        """Masks that repeat this object's from its first on: two passes with the same draw can be compared."""
        return DropoutMasks(self.seed, self.device, is_again=True)

    def mask(self, shape: Sequence[int], prob: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """A mask of a shape, on the CPU. prob: probability of dropping an element, from 0 to below 1."""
        mask = torch.empty(tuple(shape), dtype=dtype)
        bits = self.bits(math.prod(shape), prob)
        torch.ge(bits.words[: mask.numel()].view(mask.shape), bits.threshold, out=mask)
        return mask.mul_(bits.keep)

    def bits(self, numel: int, prob: float) -> DropoutBits:
        """The draw that `mask` would make."""
        words = self._words.random_raw(-(-(numel + SLACK) // 4)).view(np.int16)  # four of 16 bits in each of 64
        dropped = min(round(prob * 2**16), 2**16 - 1)
        return DropoutBits(torch.from_numpy(words), dropped - 2**15, 2**16 / (2**16 - dropped))

    def key(self) -> tuple[Tensor, int]:
        """What a kernel of ours draws a mask by, on a GPU: a seed in the device's memory, and the mask's number."""
        self.check_seed()
        self._num_keys += 1
        return self._seeds[self.device][1], self._num_keys

    def check_seed(self) -> None:
        """On a GPU, before a pass draws by a key."""
        assert self._seeds[self.device][0] == self.seed, "other masks of this device were made after these"


class _TritonDropout(torch.autograd.Function):
    """By a kernel of ours, on a GPU."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, prob: float, masks: DropoutMasks) -> Tensor:
        ctx.masks, ctx.arguments = masks, (masks.key(), prob)
        return triton_kernels().dropout(values.contiguous(), *ctx.arguments)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.masks.check_seed()
        return triton_kernels().dropout(grad.contiguous(), *ctx.arguments), None, None
