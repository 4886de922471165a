"""Task sampling: which tasks make up one optimizer step (Stickland and Murray 2019, arXiv 1902.02671, section 4.2).

A scheduler returns the plan of a step: how often each task is drawn, and with which weight. A plan is a function of the
epoch, the step and a generator of its own: nothing that happens elsewhere in the program (logging, evaluation, another
flag) can change it, and a resumed run finds the same plans without any saved state. A new scheduler is a class and an
entry of SCHEDULERS.

(`--scheduler pal` samples tasks as this paper does; `--pal` adds its projected attention layers, in pal.py.)
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from parameters import NoParameters, parameter


@dataclass(frozen=True)
class Setting:
    """What a scheduler decides about.

    num_examples: training examples of each task (examples, not batches). every_task: a step holds every task at least
    once, as a gradient treatment needs it. Raises ValueError if that is not possible.
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


@dataclass(frozen=True)
class Draws:
    """How often a task is drawn in a step, and the factor on the mean gradient of all its rows in the step.

    The factor is for gradient treatments; without one every row of a step counts the same.
    """

    count: int
    weight: float = 1.0


Plan = Mapping[str, Draws]


class Scheduler(Protocol):
    """Decides which tasks make up an optimizer step."""

    def __init__(self, parameters: Any, setting: Setting) -> None: ...

    def plan(self, epoch: int, step: int, generator: random.Random) -> Plan:
        """The draws of one optimizer step by task. epoch: from 1. step: counted from 0 over the whole stage."""
        ...


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


def sampled_counts(probabilities: Sequence[float], setting: Setting, generator: random.Random) -> dict[str, int]:
    """How often each task is drawn when tasks are drawn independently with these probabilities.

    With `every_task` one draw of each is certain, and the remaining ones make up what its share still lacks, so that
    the expected shares stay as near to the probabilities as that allows.
    """
    tasks, num_draws = setting.tasks, setting.draws_per_step
    if not setting.every_task:
        return Counter(generator.choices(tasks, weights=probabilities, k=num_draws))
    counts = Counter(tasks)
    if num_draws > len(tasks):
        shares = shares_with_floor(probabilities, 1 / num_draws)
        lacking = [max(0.0, num_draws * share - 1) for share in shares]
        counts.update(generator.choices(tasks, weights=lacking, k=num_draws - len(tasks)))
    return counts


class RandomScheduler:
    """Each task equally likely."""

    def __init__(self, parameters: NoParameters, setting: Setting) -> None:
        self.setting = setting

    def plan(self, epoch: int, step: int, generator: random.Random) -> Plan:
        equal = [1 / len(self.setting.tasks)] * len(self.setting.tasks)
        return {task: Draws(count) for task, count in sampled_counts(equal, self.setting, generator).items()}


class RoundRobinScheduler:
    """The tasks in turn, going on in the next step where the last one ended."""

    def __init__(self, parameters: NoParameters, setting: Setting) -> None:
        self.setting = setting

    def plan(self, epoch: int, step: int, generator: random.Random) -> Plan:
        tasks, draws = self.setting.tasks, self.setting.draws_per_step
        counts = Counter(tasks[i % len(tasks)] for i in range(step * draws, (step + 1) * draws))
        return {task: Draws(count) for task, count in counts.items()}


class TemperatureScheduler:
    """p_i proportional to N_i ** (1 / tau), the same in all epochs."""

    @dataclass(frozen=True)
    class Parameters:
        tau: float = parameter(2.0, "1: by size of the training sets; larger: closer to equal shares", "> 0")

    def __init__(self, parameters: Parameters, setting: Setting) -> None:
        self.setting = setting
        self.probabilities = powers_of_sizes(setting.num_examples, 1 / parameters.tau)

    def plan(self, epoch: int, step: int, generator: random.Random) -> Plan:
        counts = sampled_counts(self.probabilities, self.setting, generator)
        return {task: Draws(count) for task, count in counts.items()}


class PalScheduler:
    """Annealed sampling: p_i proportional to N_i ** alpha, alpha = 1 - 0.8 (e - 1) / (E - 1).

    Early epochs follow the sizes of the training sets, late ones come close to equal shares. Under a gradient treatment
    the gradient of a task that is drawn k times is the sum over its draws divided by k ** b, k ** (1 - b) times their
    mean, b = 0.2 + 0.8 (e - 1) / (E - 1): a compromise between following the shares (b = 0) and giving each task one
    vote (b = 1). E = 1 gives alpha = 1 and b = 1.
    """

    def __init__(self, parameters: NoParameters, setting: Setting) -> None:
        self.setting = setting

    def _progress(self, epoch: int, single: float) -> float:
        last = self.setting.num_epochs - 1
        return (epoch - 1) / last if last > 0 else single

    def probabilities(self, epoch: int) -> list[float]:
        alpha = 1 - 0.8 * self._progress(epoch, single=0.0)
        return powers_of_sizes(self.setting.num_examples, alpha)

    def plan(self, epoch: int, step: int, generator: random.Random) -> Plan:
        b = 0.2 + 0.8 * self._progress(epoch, single=1.0)
        counts = sampled_counts(self.probabilities(epoch), self.setting, generator)
        return {task: Draws(count, count ** (1 - b)) for task, count in counts.items()}


def powers_of_sizes(num_examples: Sequence[int], exponent: float) -> list[float]:
    """Probabilities proportional to the sizes to the power of the exponent."""
    largest = max(num_examples)
    powers = [(size / largest) ** exponent for size in num_examples]
    return [power / sum(powers) for power in powers]


SCHEDULERS: dict[str, type[Scheduler]] = {
    "random": RandomScheduler,
    "round_robin": RoundRobinScheduler,
    "pal": PalScheduler,
    "temperature": TemperatureScheduler,
}
