"""Schedulers: shares, plans and weights of draws, against the formulas and by simulation; passes over the rows."""

import math
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from datasets import RowStream
from schedulers import SCHEDULERS, PalScheduler, RandomScheduler, RoundRobinScheduler, Setting, shares_with_floor

TASKS = ("sst", "para", "sts")
SIZES = (8544, 283010, 6040)


def setting(draws: int = 1, every_task: bool = False, epochs: int = 5, sizes: tuple[int, ...] = SIZES) -> Setting:
    return Setting(TASKS, sizes, epochs, draws, every_task)


def simulated_shares(name: str, of: Setting, epoch: int, num_plans: int = 20000) -> list[float]:
    scheduler = SCHEDULERS[name](of)
    counts: Counter[str] = Counter()
    generator = random.Random(0)
    for step in range(num_plans):
        counts.update(scheduler.plan(epoch, step, generator))
    return [counts[task] / counts.total() for task in of.tasks]


# ------------------------------------------------------------------------------------------------------ shares


@pytest.mark.parametrize("epochs", [2, 3, 5, 10])
def test_pal_shares_are_proportional_to_the_sizes_to_the_power_alpha(epochs: int) -> None:
    scheduler = PalScheduler(setting(epochs=epochs))
    for epoch in range(1, epochs + 1):
        alpha = 1 - 0.8 * (epoch - 1) / (epochs - 1)
        powers = [n**alpha for n in SIZES]
        assert scheduler.shares(epoch) == pytest.approx([power / sum(powers) for power in powers])


def test_pal_starts_with_the_shares_of_the_examples_and_ends_with_alpha_one_fifth() -> None:
    scheduler = PalScheduler(setting(epochs=4))
    assert scheduler.shares(1) == pytest.approx([n / sum(SIZES) for n in SIZES])
    assert scheduler.shares(4)[1] / scheduler.shares(4)[2] == pytest.approx((SIZES[1] / SIZES[2]) ** 0.2)


def test_pal_with_a_single_epoch_has_alpha_1() -> None:
    assert PalScheduler(setting(epochs=1)).shares(1) == pytest.approx([n / sum(SIZES) for n in SIZES])


def test_pal_counts_examples_and_not_batches() -> None:
    # 9 and 16 examples are one batch of 16 each; their shares are 9 to 16 all the same.
    shares = PalScheduler(setting(sizes=(9, 16, 25))).shares(1)
    assert shares == pytest.approx([0.18, 0.32, 0.5])


@pytest.mark.parametrize("name", ["random", "round_robin"])
def test_random_and_round_robin_give_equal_shares_whatever_the_sizes(name: str) -> None:
    scheduler = SCHEDULERS[name](setting())
    for epoch in (1, 5):
        assert scheduler.shares(epoch) == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("name", ["random", "pal", "round_robin"])
@pytest.mark.parametrize("epoch", [1, 3, 5])
@pytest.mark.parametrize(("draws", "every_task"), [(1, False), (4, False), (3, True), (4, True), (16, True)])
def test_draws_have_the_expected_shares(name: str, epoch: int, draws: int, every_task: bool) -> None:
    of = setting(draws, every_task)
    num_plans = 32000 // draws
    found = simulated_shares(name, of, epoch, num_plans)
    expected = SCHEDULERS[name](of).shares(epoch)
    tolerance = [4 * math.sqrt(p * (1 - p) / 32000) + 1e-3 for p in expected]
    assert all(abs(f - e) < t for f, e, t in zip(found, expected, tolerance, strict=True)), (found, expected)


def test_shares_of_plans_with_every_task_are_the_schedulers_where_these_allow_it() -> None:
    # In the last epoch every task has more than 1/16: the certain draws cost nothing.
    free, certain = PalScheduler(setting(16)), PalScheduler(setting(16, every_task=True))
    assert min(free.shares(5)) > 1 / 16
    assert certain.shares(5) == pytest.approx(free.shares(5))
    assert min(free.shares(1)) < 1 / 16
    assert certain.shares(1) == pytest.approx([1 / 16, 14 / 16, 1 / 16])


# ------------------------------------------------------------------------------------------- shares with a floor


def closest_shares(probabilities: Sequence[float], floor: float, reverse: bool) -> np.ndarray:
    """The minimum of the divergence between shares and probabilities over shares >= floor, found numerically."""
    p = np.array(probabilities)

    def divergence(s: np.ndarray) -> float:
        return float((p * np.log(p / s)).sum() if reverse else (s * np.log(s / p)).sum())

    start = np.full(len(p), 1 / len(p))
    sums_to_one = {"type": "eq", "fun": lambda s: s.sum() - 1}
    bounds = [(max(floor, 1e-9), 1.0)] * len(p)
    return np.asarray(minimize(divergence, start, bounds=bounds, constraints=[sums_to_one], tol=1e-13).x)


@pytest.mark.parametrize("seed", range(12))
def test_shares_with_a_floor_are_the_closest_ones(seed: int) -> None:
    generator = np.random.default_rng(seed)
    num_tasks = int(generator.integers(2, 7))
    p = generator.dirichlet(np.full(num_tasks, 0.7)) + 1e-4
    p /= p.sum()
    floor = float(generator.uniform(0.2, 1) / num_tasks)
    found = shares_with_floor(p.tolist(), floor)
    assert sum(found) == pytest.approx(1)
    assert min(found) >= floor - 1e-12
    assert found == pytest.approx(closest_shares(p.tolist(), floor, reverse=False), abs=2e-4)
    assert found == pytest.approx(closest_shares(p.tolist(), floor, reverse=True), abs=2e-4)


def test_raising_one_share_can_push_another_below_the_floor() -> None:
    # Scaling down for the first raises the need of the second, which was above the floor before.
    found = shares_with_floor([0.05, 0.21, 0.74], 0.2)
    assert found == pytest.approx([0.2, 0.2, 0.6])


def test_shares_above_the_floor_stay_as_they_are() -> None:
    assert shares_with_floor([0.2, 0.3, 0.5], 0.1) == pytest.approx([0.2, 0.3, 0.5])
    assert shares_with_floor([0.1, 0.2, 0.7], 1 / 3) == pytest.approx([1 / 3] * 3)


def test_a_floor_that_cannot_be_met_is_refused() -> None:
    with pytest.raises(ValueError, match="exceed 1"):
        shares_with_floor([0.5, 0.3, 0.2], 0.34)


# ------------------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("draws", [3, 4, 16])
def test_a_plan_for_a_treatment_holds_every_task(name: str, draws: int) -> None:
    scheduler = SCHEDULERS[name](setting(draws, every_task=True))
    generator = random.Random(1)
    for step in range(300):
        plan = scheduler.plan(1, step, generator)
        assert len(plan) == draws
        assert set(plan) == set(TASKS)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("draws", [1, 2, 5])
def test_a_plan_has_as_many_draws_as_asked_for(name: str, draws: int) -> None:
    assert len(SCHEDULERS[name](setting(draws)).plan(1, 0, random.Random(0))) == draws


@pytest.mark.parametrize("draws", [1, 2, 3, 4])
def test_round_robin_takes_the_tasks_in_turn_across_steps(draws: int) -> None:
    scheduler = RoundRobinScheduler(setting(draws))
    flat = [task for step in range(12) for task in scheduler.plan(1, step, random.Random(0))]
    assert flat == [TASKS[i % 3] for i in range(12 * draws)]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("every_task", [False, True])
def test_a_plan_depends_on_its_own_generator_only(name: str, every_task: bool) -> None:
    def plans(noise: int) -> list[list[str]]:
        scheduler, generator = SCHEDULERS[name](setting(8, every_task)), random.Random(7)
        result = []
        for step in range(30):
            random.seed(noise * step)
            np.random.seed(noise * step)
            torch.manual_seed(noise * step)
            if noise == 2:  # as logging or evaluation might
                scheduler.shares(3)
                scheduler.draw_weight(2, 5)
                random.random()
            result.append(scheduler.plan(1 + step // 10, step, generator))
        return result

    assert plans(1) == plans(2)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_plan_touches_no_global_generator(name: str) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    SCHEDULERS[name](setting(8, every_task=True)).plan(1, 0, random.Random(0))
    SCHEDULERS[name](setting(8)).plan(1, 0, random.Random(0))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("name", ["random", "pal"])
def test_a_plan_is_a_function_of_epoch_step_and_generator_without_memory(name: str) -> None:
    scheduler = SCHEDULERS[name](setting(8, every_task=True))
    first = scheduler.plan(4, 10, random.Random(5))
    for step in range(10):
        scheduler.plan(1, step, random.Random(step))
    assert scheduler.plan(4, 10, random.Random(5)) == first
    assert len({tuple(scheduler.plan(4, 10, random.Random(seed))) for seed in range(40)}) > 5


# ------------------------------------------------------------------------------------------- weights of the draws


@pytest.mark.parametrize("epochs", [2, 5])
def test_a_task_drawn_k_times_by_pal_counts_its_sum_over_k_to_the_power_b(epochs: int) -> None:
    scheduler = PalScheduler(setting(16, every_task=True, epochs=epochs))
    for epoch in range(1, epochs + 1):
        b = 0.2 + 0.8 * (epoch - 1) / (epochs - 1)
        for k in (1, 2, 7, 14):
            assert scheduler.draw_weight(epoch, k) == pytest.approx(1 / k**b)


def test_a_single_epoch_of_pal_weighs_by_the_mean() -> None:
    scheduler = PalScheduler(setting(16, every_task=True, epochs=1))
    assert [scheduler.draw_weight(1, k) for k in (1, 2, 8)] == pytest.approx([1, 1 / 2, 1 / 8])


@pytest.mark.parametrize("make", [RandomScheduler, RoundRobinScheduler])
@pytest.mark.parametrize("epoch", [1, 3, 5])
def test_random_and_round_robin_weigh_by_the_mean(
    make: type[RandomScheduler] | type[RoundRobinScheduler], epoch: int
) -> None:
    scheduler = make(setting(16))
    assert [scheduler.draw_weight(epoch, k) for k in (1, 2, 8)] == pytest.approx([1, 1 / 2, 1 / 8])


# ----------------------------------------------------------------------------------------------- wrong settings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_examples": (1, 0, 1)}, "at least one training example"),
        ({"num_examples": (1, 1)}, "at least one training example"),
        ({"draws_per_step": 0}, "--draws_per_step 0"),
        ({"draws_per_step": 2, "every_task": True}, "expected at least 3"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object], message: str) -> None:
    values: dict[str, object] = {"tasks": TASKS, "num_examples": SIZES, "num_epochs": 3, **wrong}
    with pytest.raises(ValueError, match=message):
        Setting(**values)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- passes over the rows


def passes(stream: RowStream, num_passes: int) -> list[list[int]]:
    draws = [stream.rows(i).tolist() for i in range(num_passes * stream.draws_per_pass)]
    n = stream.draws_per_pass
    return [[row for draw in draws[p * n : (p + 1) * n] for row in draw] for p in range(num_passes)]


@pytest.mark.parametrize(("num_rows", "rows_per_draw"), [(50, 8), (48, 8), (50, 1), (3, 8)])
def test_a_pass_takes_every_row_once(num_rows: int, rows_per_draw: int) -> None:
    stream = RowStream(num_rows, rows_per_draw, seed=3)
    for order in passes(stream, 3):
        assert sorted(order) == list(range(num_rows))


def test_a_data_set_that_runs_out_starts_again_in_a_new_order_every_time() -> None:
    orders = passes(RowStream(50, 8, seed=3), 6)
    assert len({tuple(order) for order in orders}) == 6
    assert list(range(50)) not in orders


def test_draws_of_a_pass_are_different_rows_and_the_last_may_be_shorter() -> None:
    stream = RowStream(50, 8, seed=0)
    assert stream.draws_per_pass == 7
    assert [len(stream.rows(i)) for i in range(7)] == [8] * 6 + [2]


def test_rows_of_a_draw_depend_on_seed_and_number_only() -> None:
    stream, again = RowStream(50, 8, seed=3), RowStream(50, 8, seed=3)
    later = again.rows(20).tolist()  # as a resumed run begins
    assert [stream.rows(i).tolist() for i in range(21)][20] == later
    assert RowStream(50, 8, seed=4).rows(20).tolist() != later
