"""Each task's gradients of shared parameters from one backward pass over the rows of all tasks.

What a row's loss says of its own activations has nothing of the other rows. Tasks meet only where the gradient of a
parameter is summed over rows: within `gradients_by_task` the operations of this package sum there over each task's rows
alone, and add to each task's gradient. The definition is a pass for each task.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TaskBounds:
    """Where the rows of T tasks lie, one task's behind the other's, and where their gradients.

    rows, tokens: (T + 1,) int32, where each task's rows and tokens begin, and behind the last of all; num_tokens: N.
    stride: a parameter's gradient of the next task lies so many numbers behind its `grad`, that of the first.
    """

    rows: Tensor
    tokens: Tensor
    num_tokens: int
    stride: int

    @classmethod
    def of(cls, num_rows: Tensor, ends: Tensor, num_tokens: int, stride: int) -> "TaskBounds":
        """num_rows: (T,) of each task. ends: (B,) behind each row's last token."""
        rows = torch.cat([num_rows.new_zeros(1), num_rows.cumsum(0)])  # (T + 1,)
        tokens = torch.cat([ends.new_zeros(1), ends])[rows]  # (T + 1,)
        tokens[-1].fill_(num_tokens)  # those of no row too, so that nothing there is left undefined
        return cls(rows.int(), tokens.int(), num_tokens, stride)

    def within(self, values: Tensor) -> Tensor:
        """The bounds among the lines of values: (N, ...) of tokens or (B, ...) of rows. (A row has three tokens.)"""
        return self.tokens if len(values) == self.num_tokens else self.rows

    def gradients(self, gradient: Tensor) -> Tensor:
        """(T, ...) of all tasks, from the `grad` (...) of a parameter."""
        return gradient.as_strided((len(self.rows) - 1, *gradient.shape), (self.stride, *gradient.stride()))


_bounds: list[TaskBounds] = []


@contextmanager
def gradients_by_task(bounds: TaskBounds | None) -> Iterator[None]:
    """What is computed within it adds, in its backward pass, to each task's gradient. None: as ever."""
    _bounds[:] = [bounds] if bounds else []
    try:
        yield
    finally:
        _bounds.clear()


def task_bounds() -> TaskBounds | None:
    """Of the pass that is being computed."""
    return _bounds[0] if _bounds else None
