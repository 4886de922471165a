"""The processes that train one model together under torchrun, and what they tell each other.

Each takes its part of the rows of a step, and of every long vector a part is its own: there the sums over all processes
of task gradients arrive, and there the optimizer moves the parameters, which then go to all. A process on its own
(ALONE) is a group of one, to which all of this is nothing to do.

Shape letters: P numbers of a vector, R rows.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets them
ALIGNMENT = 16  # numbers: no part of a vector begins where a GPU reads it slowly


class LostProcess(ConnectionError):
    """Another process of the group has ended, or cannot be reached."""


class ProcessGroup:
    """Processes of which every one calls the same methods in the same order."""

    def __init__(
        self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1, store: Any = None
    ) -> None:
        """local_rank, local_size: rank and size among those of this machine. store: what all can write to."""
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self._store = store
        self._pending: Callable[[], object] | None = None
        self._buffers: dict[tuple[int, torch.dtype], Tensor] = {}

    @classmethod
    def join(cls) -> "ProcessGroup":
        """The group that torchrun started this process for; one of its own without torchrun."""
        if any(name not in os.environ for name in VARIABLES) or os.environ["WORLD_SIZE"] == "1":
            return ALONE
        import torch.distributed as dist

        with _reaching_others():
            store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
            backend = "cpu:gloo,cuda:nccl" if dist.is_nccl_available() and torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        return cls(rank, size, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]), store)

    @cached_property
    def _collectives(self) -> Any:
        import torch.distributed  # a tenth of a second that one process does not need

        return torch.distributed

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and shows."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """This process's device of a kind, "cpu" or "cuda". Raises ValueError if there are more processes than GPUs."""
        if self.size == 1 or name == "cpu":
            return torch.device(name)
        if self.local_rank >= (count := torch.cuda.device_count()):
            raise ValueError(f"{self.local_size} processes on this machine, expected as many as it has GPUs ({count})")
        torch.cuda.set_device(self.local_rank)
        return torch.device(name, self.local_rank)

    # --------------------------------------------------------------------------------------------- on the host

    def greatest(self, number: int) -> int:
        """The greatest of all processes' numbers. Who has it knows that the others have come as far."""
        if self.size == 1:
            return number
        of_all = torch.tensor(number)
        with _reaching_others():
            self._collectives.all_reduce(of_all, self._collectives.ReduceOp.MAX)
        return int(of_all)

    def of_first(self, text: str) -> str:
        """The text that the first process has."""
        if self.size == 1:
            return text
        texts = [text]
        with _reaching_others():
            self._collectives.broadcast_object_list(texts, src=0)
        return texts[0]

    def is_first_to_tell(self) -> bool:
        """Whether no other process has asked: what ends all of them is told once."""
        if self._store is None:
            return True
        try:
            return int(self._store.add("told", 1)) == 1
        except RuntimeError:  # it went with its process
            return True

    # --------------------------------------------------------------------------------------------------- rows

    def share(self, rows: np.ndarray, before: int = 0) -> np.ndarray:
        """This process's of some rows (R,): every size-th, so that it has long and short ones. before: how many rows
        have been shared out in the step already; what is left over is not always the same process's."""
        return rows[(self.rank - before) % self.size :: self.size]

    def compute_rows(self, compute: Callable[[np.ndarray], Tensor], rows: np.ndarray) -> Tensor:
        """(R, ...) what `compute` gives for these rows (R,), of which each process computes as many."""
        if self.size == 1:
            return compute(rows)
        count = -(-len(rows) // self.size)
        of_own = compute(self.share(np.resize(rows, count * self.size)))  # repeats rows where some lack
        whole = of_own.new_empty(self.size, *of_own.shape)  # (processes, R / processes, ...)
        whole[self.rank] = of_own
        self.gather(whole.flatten())
        return whole.transpose(0, 1).flatten(0, 1)[: len(rows)]

    # ------------------------------------------------------------------------------------------------ vectors

    def padded(self, length: int) -> int:
        """The least length of a vector from this on that can be divided."""
        unit = 1 if self.size == 1 else self.size * ALIGNMENT
        return -(-length // unit) * unit

    def part(self, length: int) -> slice:
        """Which of the numbers of a vector of such a length are this process's."""
        size = length // self.size
        return slice(self.rank * size, (self.rank + 1) * size)

    def add(self, numbers: Tensor) -> Tensor:
        """Their sums over all processes, in place; for few numbers."""
        if self.size > 1 and numbers.numel():
            with _reaching_others():
                self._collectives.all_reduce(numbers)
        return numbers

    def begin_sum(self, vector: Tensor) -> None:
        """Begins to sum a vector (P,) over all processes; `finish_sums` waits for it. Then the sums stand in the part
        that is this process's, and the rest means nothing."""
        if self.size == 1 or len(vector) == 0:
            return
        self.finish_sums()
        dist, parts = self._collectives, vector.view(self.size, -1)  # (processes, P / processes)
        with _reaching_others():
            if vector.device.type == "cuda":
                self._pending = _single("reduce_scatter")(parts[self.rank], vector, async_op=True).wait
                return
            if (key := (len(vector), vector.dtype)) not in self._buffers:
                self._buffers[key] = torch.empty_like(parts)
            received = self._buffers[key]
            # gloo's own reduce_scatter sends twice as much, and its all_to_all takes twice as long
            others = [rank for rank in range(self.size) if rank != self.rank]
            sent = [dist.isend(parts[rank], rank) for rank in others]
            arriving = [dist.irecv(received[rank], rank) for rank in others]

        def finish() -> None:
            for rank, of_other in zip(others, arriving, strict=True):
                of_other.wait()
                parts[self.rank].add_(received[rank])
            for to_other in sent:
                to_other.wait()

        self._pending = finish

    def finish_sums(self) -> None:
        """Waits for what `begin_sum` has begun."""
        if self._pending is not None:
            finish, self._pending = self._pending, None
            with _reaching_others():
                finish()

    def gather(self, vector: Tensor) -> Tensor:
        """Gives each process the parts of a vector (P,) that are the others', in place."""
        if self.size == 1 or len(vector) == 0:
            return vector
        dist, parts = self._collectives, vector.view(self.size, -1)  # (processes, P / processes)
        with _reaching_others():
            if vector.device.type == "cuda":
                _single("all_gather")(vector, parts[self.rank])
            else:  # gloo's own all_gather takes eight times as long
                for sending in [dist.broadcast(part, rank, async_op=True) for rank, part in enumerate(parts)]:
                    sending.wait()
        return vector

    def joint_norm(self, norm: Tensor) -> Tensor:
        """Euclidean norm, (), of what each process has a part of this norm of."""
        return norm if self.size == 1 else self.add(norm.square()).sqrt()


def _single(name: str) -> Callable[..., Any]:
    """A collective on one tensor by its name of torch 2.13, or by its older one."""
    import torch.distributed as dist

    older = {"reduce_scatter": "reduce_scatter_tensor", "all_gather": "all_gather_into_tensor"}
    found: Callable[..., Any] = getattr(dist, f"{name}_single", None) or getattr(dist, older[name])
    return found


@contextmanager
def _reaching_others() -> Iterator[None]:
    """Raises LostProcess where torch could not reach another process."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        raise LostProcess("another process of this run has ended or cannot be reached") from None


ALONE = ProcessGroup()
