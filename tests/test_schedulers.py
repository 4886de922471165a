"""Schedulers: plans, against the formulas and by simulation. (The weights of the draws: test_wiring.py.)"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from parameters import parameters_type
from schedulers import SCHEDULERS, PalScheduler, Plan, Scheduler, Setting, shares_with_floor

TASKS = ("sst", "para", "sts")
OWN = ("random", "round_robin", "pal", "temperature")
SIZES = (8544, 283010, 6040)


def make(
    name: str,
    draws: int = 1,
    every_task: bool = False,
    epochs: int = 5,
    sizes: tuple[int, ...] = SIZES,
    **parameters: Any,
) -> Scheduler:
    kind = SCHEDULERS[name]
    return kind(parameters_type(kind)(**parameters), Setting(TASKS, sizes, epochs, draws, every_task))


def counts_of(plan: Plan) -> dict[str, int]:
    return {task: draws.count for task, draws in plan.items()}


def shares(name: str, epoch: int, sizes: Sequence[int] = SIZES, epochs: int = 5, tau: float = 2.0) -> list[float]:
    """Of each task, as the papers say."""
    alpha = 1 - 0.8 * (epoch - 1) / (epochs - 1) if epochs > 1 else 1.0
    power = {"random": 0.0, "round_robin": 0.0, "pal": alpha, "temperature": 1 / tau}[name]
    return [size**power / sum(size**power for size in sizes) for size in sizes]


@pytest.mark.parametrize("epochs", [1, 2, 3, 10])
def test_pal_shares_are_proportional_to_the_sizes_to_the_power_alpha(epochs: int) -> None:
    scheduler = make("pal", epochs=epochs)
    assert isinstance(scheduler, PalScheduler)
    for epoch in range(1, epochs + 1):
        assert scheduler.probabilities(epoch) == pytest.approx(shares("pal", epoch, epochs=epochs))


def test_pal_counts_examples_and_not_batches() -> None:
    scheduler = make("pal", sizes=(9, 16, 25))  # 9 and 16 examples are one batch of 16 each
    assert isinstance(scheduler, PalScheduler)
    assert scheduler.probabilities(1) == pytest.approx([0.18, 0.32, 0.5])


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("epoch", [1, 4])
@pytest.mark.parametrize(("draws", "every_task"), [(1, False), (4, False), (3, True), (4, True), (16, True)])
def test_draws_have_the_expected_shares(name: str, epoch: int, draws: int, every_task: bool) -> None:
    """As many draws a step as asked for; with every task at least once the shares are the nearest that allow it."""
    scheduler, generator, num_draws, found = make(name, draws, every_task), random.Random(0), 8000, Counter[str]()
    for step in range(num_draws // draws):
        counts = counts_of(scheduler.plan(epoch, step, generator))
        assert sum(counts.values()) == draws and min(counts.values()) >= 1 and (not every_task or len(counts) == 3)
        found.update(counts)
    expected = shares(name, epoch)
    if every_task:
        expected = shares_with_floor(expected, 1 / draws)
    for task, p in zip(TASKS, expected, strict=True):
        assert found[task] / found.total() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / num_draws) + 1e-3)


def test_certain_draws_of_a_small_task_leave_the_proportions_of_the_others() -> None:
    scheduler, generator, found = make("pal", 4, every_task=True, sizes=(35, 60, 5)), random.Random(0), Counter[str]()
    for step in range(2000):
        found.update(counts_of(scheduler.plan(1, step, generator)))
    assert [found[task] / 8000 for task in TASKS] == pytest.approx([0.75 * 35 / 95, 0.75 * 60 / 95, 0.25], abs=0.02)


def test_raising_one_share_can_push_another_below_the_floor_and_one_that_cannot_be_met_is_refused() -> None:
    # Scaling down for the first raises the need of the second, which was above the floor before.
    assert shares_with_floor([0.05, 0.21, 0.74], 0.2) == pytest.approx([0.2, 0.2, 0.6])
    with pytest.raises(ValueError, match="exceed 1"):
        shares_with_floor([0.5, 0.3, 0.2], 0.34)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("every_task", [False, True])
def test_a_plan_is_a_function_of_epoch_step_and_its_own_generator(name: str, every_task: bool) -> None:
    first, other = make(name, 8, every_task), make(name, 8, every_task)
    expected = [first.plan(4, step, random.Random(step)) for step in range(12)]
    state = random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()
    assert len({tuple(counts_of(plan).items()) for plan in expected}) > 1
    for step in reversed(range(12)):  # as a resumed run begins: what came before leaves no trace
        assert other.plan(4, step, random.Random(step)) == expected[step]
    assert (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()) == state


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_examples": (1, 0, 1)}, "at least one training example"),
        ({"num_examples": (1, 1)}, "at least one training example"),
        ({"draws_per_step": 0}, "--draws_per_step 0"),
        ({"draws_per_step": 2, "every_task": True}, "expected at least 3"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"tasks": TASKS, "num_examples": SIZES, "num_epochs": 3, **wrong}
    with pytest.raises(ValueError, match=message):
        Setting(**values)
