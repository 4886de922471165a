"""Task schedulers: which tasks make up one optimizer step (Stickland and Murray 2019, arXiv 1902.02671, section 4.2).

A scheduler returns the plan of a step, a list of task names with one entry a draw. A plan is a function of the epoch,
the step and a generator of its own: nothing that happens elsewhere in the program (logging, evaluation, another flag)
can change it, and a resumed run finds the same plans without any saved state.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol


class Scheduler(Protocol):
    """Decides which tasks make up an optimizer step."""

    def shares(self, epoch: int) -> list[float]:
        """Expected share of each task in the draws of an epoch (counted from 1), in the order of the tasks."""
        ...

    def plan(self, epoch: int, step: int, generator: random.Random) -> list[str]:
        """Task names of one optimizer step. step: counted from 0 over the whole stage."""
        ...

    def draw_weight(self, epoch: int, num_draws: int) -> float:
        """Factor on each loss of a task that is drawn num_draws times in a step."""
        ...


@dataclass(frozen=True)
class Setting:
    """What a scheduler decides about.

    num_examples: training examples of each task (examples, not batches).
    every_task: a step holds every task at least once, as a gradient treatment needs it.
    """

    tasks: tuple[str, ...]
    num_examples: tuple[int, ...]
    num_epochs: int
    draws_per_step: int = 1
    every_task: bool = False

    def __post_init__(self) -> None:
        if len(self.tasks) != len(self.num_examples) or min(self.num_examples, default=0) < 1:
            raise ValueError("every task needs at least one training example")
        if self.draws_per_step < 1:
            raise ValueError(f"--draws_per_step {self.draws_per_step}: expected at least 1")
        if self.every_task and self.draws_per_step < len(self.tasks):
            raise ValueError(
                f"--draws_per_step {self.draws_per_step}: a gradient treatment takes every task in every step, "
                f"expected at least {len(self.tasks)}"
            )


def shares_with_floor(probabilities: Sequence[float], floor: float) -> list[float]:
    """The shares closest to `probabilities` (in Kullback-Leibler divergence) of which none is below `floor`.

    These are max(floor, c * p) with the one c for which they sum to 1: tasks above the floor keep their proportions.
    Raises ValueError if the floors alone exceed 1.
    """
    num_tasks = len(probabilities)
    if floor * num_tasks > 1 + 1e-12:
        raise ValueError(f"{num_tasks} shares of at least {floor} exceed 1")
    raised: set[int] = set()
    while True:
        free = sum(p for i, p in enumerate(probabilities) if i not in raised)
        scale = (1 - floor * len(raised)) / free if free > 0 else 0.0
        below = {i for i, p in enumerate(probabilities) if i not in raised and p * scale < floor}
        if not below:
            return [floor if i in raised else p * scale for i, p in enumerate(probabilities)]
        raised |= below


class _Drawn:
    """Tasks drawn independently by probability; with `every_task`, one of each first and the rest drawn."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def probabilities(self, epoch: int) -> list[float]:
        raise NotImplementedError

    def shares(self, epoch: int) -> list[float]:
        if not self.setting.every_task:
            return self.probabilities(epoch)
        return shares_with_floor(self.probabilities(epoch), 1 / self.setting.draws_per_step)

    def plan(self, epoch: int, step: int, generator: random.Random) -> list[str]:
        tasks, draws = self.setting.tasks, self.setting.draws_per_step
        if not self.setting.every_task:
            return generator.choices(tasks, weights=self.probabilities(epoch), k=draws)
        rest = draws - len(tasks)
        if rest == 0:
            return list(tasks)
        # One draw of each task is certain; the remaining ones make up what its share still lacks.
        lacking = [max(0.0, draws * share - 1) for share in self.shares(epoch)]
        return [*tasks, *generator.choices(tasks, weights=lacking, k=rest)]

    def draw_weight(self, epoch: int, num_draws: int) -> float:
        return 1 / num_draws


class RandomScheduler(_Drawn):
    """Each task equally likely."""

    def probabilities(self, epoch: int) -> list[float]:
        return [1 / len(self.setting.tasks)] * len(self.setting.tasks)


class PalScheduler(_Drawn):
    """Annealed sampling: p_i proportional to N_i ** alpha, alpha = 1 - 0.8 (e - 1) / (E - 1).

    Early epochs follow the sizes of the training sets, late ones come close to equal shares. With more draws a step
    than tasks, a task drawn k times counts k / k ** b times its mean gradient, b = 0.2 + 0.8 (e - 1) / (E - 1): the
    gradient compromise between following the shares (b = 0) and giving each task one vote (b = 1).
    """

    def _progress(self, epoch: int, single: float) -> float:
        last = self.setting.num_epochs - 1
        return (epoch - 1) / last if last > 0 else single

    def probabilities(self, epoch: int) -> list[float]:
        alpha = 1 - 0.8 * self._progress(epoch, single=0.0)
        largest = max(self.setting.num_examples)
        sizes = [(n / largest) ** alpha for n in self.setting.num_examples]
        return [size / sum(sizes) for size in sizes]

    def draw_weight(self, epoch: int, num_draws: int) -> float:
        return float(num_draws ** -(0.2 + 0.8 * self._progress(epoch, single=1.0)))


class RoundRobinScheduler:
    """The tasks in turn, going on in the next step where the last one ended."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def shares(self, epoch: int) -> list[float]:
        return [1 / len(self.setting.tasks)] * len(self.setting.tasks)

    def plan(self, epoch: int, step: int, generator: random.Random) -> list[str]:
        tasks, draws = self.setting.tasks, self.setting.draws_per_step
        return [tasks[i % len(tasks)] for i in range(step * draws, (step + 1) * draws)]

    def draw_weight(self, epoch: int, num_draws: int) -> float:
        return 1 / num_draws


SCHEDULERS: Mapping[str, Callable[[Setting], Scheduler]] = MappingProxyType(
    {"random": RandomScheduler, "round_robin": RoundRobinScheduler, "pal": PalScheduler}
)
