"""Gradient treatments: coefficients from Gram matrices against the vector form of each method."""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ops import gramian, is_exact
from parameters import parameters_type
from pcgrad import (
    TREATMENTS,
    Treatment,
    combine,
    cosines,
    equal_lengths,
    find_treatment,
    gradvac_coefficients,
    gramians_of,
    pcgrad_coefficients,
    random_orders,
    removed_shares,
    without_vanishing,
)

KINDS = ("random", "conflicting", "nearly parallel", "nearly opposite", "opposite", "zero", "large", "mixed sizes")
P = 158
UNUSED = (torch.zeros(0), 1)  # losses and epoch


def vector_pcgrad(gradients: Tensor, orders: Sequence[Sequence[int]]) -> Tensor:
    """Algorithm 1 of Yu et al. (2020), (T, P) -> (T, P)."""
    treated = []
    for i in range(len(gradients)):
        g = gradients[i].double().clone()
        for j in orders[i]:
            other = gradients[j].double()
            if g @ other < 0:
                g = g - (g @ other) / (other @ other) * other
        treated.append(g)
    return torch.stack(treated)


def vector_gradvac(
    gradients: Tensor, targets: Tensor, beta: float, orders: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of Wang et al. (2021), (T, P) and (T, T) -> (T, P) and (T, T)."""
    treated, targets = [], targets.clone()
    for i in range(len(gradients)):
        g = gradients[i].double().clone()
        for j in orders[i]:
            other = gradients[j].double()
            if g.norm() == 0 or other.norm() == 0:
                continue
            phi = float((g @ other / g.norm() / other.norm()).clamp(-1, 1))
            t = float(targets[i, j])
            targets[i, j] = (1 - beta) * t + beta * phi
            if phi < t:
                up = t * math.sqrt(1 - phi**2) - phi * math.sqrt(1 - t**2)
                g = g + g.norm() * up / (other.norm() * math.sqrt(1 - t**2)) * other
        treated.append(g)
    return torch.stack(treated), targets


def gradients_of(kind: str, num_tasks: int, size: int = P, seed: int = 0) -> Tensor:
    """(T, P) float32."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_tasks, size, generator=generator)
    direction = torch.randn(size, generator=generator)
    if kind == "conflicting":  # most pairs disagree
        return rows - rows.mean(0) * 1.05
    if kind == "nearly parallel":
        return direction + 1e-3 * rows
    if kind == "nearly opposite":
        return direction * torch.tensor([(-1.0) ** i for i in range(num_tasks)])[:, None] + 1e-3 * rows
    if kind == "opposite":
        rows[1] = -2 * rows[0]
    if kind == "zero":
        rows[seed % num_tasks] = 0
    if kind == "large":
        rows *= 1e25
    if kind == "mixed sizes":
        rows *= 10.0 ** torch.linspace(-6, 25, num_tasks)[:, None]
    return rows


def make(name: str, num_tasks: int, num_segments: int = 1, **parameters: Any) -> Treatment:
    kind = parameters_type(TREATMENTS.get(name))
    return find_treatment(name)(kind(**parameters), num_tasks, num_segments)


def update(
    treatment: Treatment, rows: Tensor, tasks: Sequence[int], seed: int, segments: Sequence[Sequence[slice]]
) -> Tensor:
    """(P,) what the treatment makes of the gradients of these tasks."""
    gradients = rows[list(tasks)].clone()
    gramians = exact(lambda dtype: gramians_of(gradients, segments, dtype))
    combine(gradients, treatment.coefficients(gramians, tasks, random.Random(seed), *UNUSED).sum(1), segments)
    return gradients[0]


def exact(inner_products: Callable[[torch.dtype], Tensor]) -> Tensor:
    """In float64 where float32 is not enough, as a step takes them."""
    found = inner_products(torch.float32)
    return found if is_exact(found) else inner_products(torch.float64)


def assert_same_update(found: Tensor, expected: Tensor, gradients: Tensor) -> None:
    """Equal to float32 rounding of the largest gradient."""
    assert found.isfinite().all()
    scale = float(gradients.double().norm(dim=1).max())
    assert float((found - expected).norm()) < 3e-6 * scale * len(gradients)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tasks", [2, 3, 5, 8])
def test_pcgrad_equals_the_vector_form(kind: str, num_tasks: int) -> None:
    for seed in range(5):
        rows = gradients_of(kind, num_tasks, seed=seed)
        found = update(make("pcgrad", num_tasks), rows, range(num_tasks), seed, [[slice(0, P)]])
        expected = vector_pcgrad(rows, random_orders(num_tasks, random.Random(seed)))
        assert_same_update(found, expected.sum(0), rows)


def test_pcgrad_leaves_agreeing_gradients_and_removes_the_whole_conflict_of_two() -> None:
    agreeing, orders = torch.tensor([[1.0, 0.5], [0.5, 2.0]]), [[1], [0]]
    assert torch.equal(pcgrad_coefficients(agreeing, orders), torch.eye(2).double())
    g = torch.tensor([[1.0, 0.0], [-1.0, 1.0]]).double()
    treated = pcgrad_coefficients(g @ g.T, orders) @ g
    assert treated.tolist() == [[0.5, 0.5], [0.0, 1.0]]
    removed = removed_shares((g @ g.T).diagonal(), (treated * g).sum(1))  # the squared cosine
    assert torch.allclose(removed, torch.full((2,), 0.5).double())
    assert removed_shares(torch.tensor([1.0]), torch.tensor([1.5])).tolist() == [0]


def test_a_gradient_without_length_takes_nothing_away() -> None:
    gram = torch.tensor([[1.0, -1e-30], [-1e-30, 0.0]], dtype=torch.float64)  # an inner product of mere rounding
    assert torch.equal(pcgrad_coefficients(gram, [[1], [0]])[0], torch.tensor([1.0, 0.0]).double())


def test_orders_are_random_and_never_hold_the_task_itself() -> None:
    generator = random.Random(0)
    drawn: list[set[tuple[int, ...]]] = [set() for _ in range(4)]
    for _ in range(300):
        orders = random_orders(4, generator)
        for i, order in enumerate(orders):
            assert sorted(order) == [j for j in range(4) if j != i]
            drawn[i].add(tuple(order))
    assert [len(orders_of_task) for orders_of_task in drawn] == [6] * 4


@pytest.mark.parametrize("shape", [(2, 3), (4,), (1, 2, 2)])
def test_a_gramian_that_is_not_square_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected \\(T, T\\)"):
        pcgrad_coefficients(torch.zeros(shape), [[1], [0]])
    with pytest.raises(ValueError, match="expected \\(T, T\\)"):
        gradvac_coefficients(torch.zeros(shape), torch.zeros(2, 2), 0.01, [[1], [0]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tasks", [2, 3, 5, 8])
@pytest.mark.parametrize("beta", [0.01, 0.3])
def test_gradient_vaccine_equals_the_vector_form(kind: str, num_tasks: int, beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(4):
        # float64, as the angle between nearly opposite gradients has only half of the digits of their cosine.
        rows = gradients_of(kind, num_tasks, seed=seed).double()
        treatment = make("gradvac", num_tasks, beta=beta)
        targets = treatment.state["targets"]
        targets.copy_(torch.rand(1, num_tasks, num_tasks, generator=generator) * 1.6 - 0.7)
        before = targets[0].clone()
        coefficients = treatment.coefficients((rows @ rows.T)[None], range(num_tasks), random.Random(seed), *UNUSED)
        expected, moved = vector_gradvac(rows, before, beta, random_orders(num_tasks, random.Random(seed)))
        assert_same_update(coefficients[0].sum(0) @ rows, expected.sum(0), torch.cat([rows, expected]))
        # Nothing but rounding is left of a gradient after its opposite; no cosine of that is worth comparing.
        if "opposite" not in kind:
            assert torch.allclose(targets[0], moved, atol=1e-5)


def test_two_tasks_that_agree_see_their_target_rise_from_0_to_their_cosine() -> None:
    gram = torch.tensor([[[1.0, 1.2], [1.2, 4.0]]], dtype=torch.float64)  # cosine 0.6
    treatment = make("gradvac", 2)
    targets = treatment.state["targets"]
    assert not targets.any()
    for step in range(1500):
        coefficients = treatment.coefficients(gram, [0, 1], random.Random(step), *UNUSED)
        if step == 9:
            assert targets[0, 1, 0] == pytest.approx(0.6 * (1 - 0.99**10))  # beta is 0.01 by default
        assert torch.allclose(coefficients[0], torch.eye(2).double(), atol=1e-12)
    assert targets[0].flatten().tolist() == pytest.approx([0, 0.6, 0.6, 0], abs=1e-6)


@pytest.mark.parametrize("above", [0.0, 1e-12, 1e-7, 1e-3])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("target", [-1.0, 0.0, 0.5, 1 - 1e-12, 1.0])
def test_a_cosine_that_rounding_puts_beyond_1_gives_finite_numbers(above: float, sign: int, target: float) -> None:
    gram = torch.tensor([[4.0, sign * 2 * (1 + above)], [sign * 2 * (1 + above), 1.0]])
    coefficients, targets = gradvac_coefficients(gram, torch.full((2, 2), target), 1.0, [[1], [0]])
    assert coefficients.isfinite().all()
    assert targets[0, 1] == targets[1, 0] == sign


def test_tasks_that_are_absent_keep_their_targets() -> None:
    treatment = make("gradvac", 4, 2, beta=0.5)
    targets = treatment.state["targets"]
    targets.copy_(torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)))
    before = targets.clone()
    g = gradients_of("random", 3, 8).double()
    gram = g @ g.T
    present = [0, 2, 3]
    treatment.coefficients(torch.stack([gram, 2 * gram]), present, random.Random(0), *UNUSED)
    for i, j in itertools.product(range(4), range(4)):
        is_moved = i != j and i in present and j in present
        assert torch.equal(targets[:, i, j], before[:, i, j]) != is_moved, (i, j)
    _, expected = vector_gradvac(g, before[0][present][:, present], 0.5, random_orders(3, random.Random(0)))
    assert torch.allclose(targets[0][present][:, present], expected)


@pytest.mark.parametrize("present", [[0], [2], [0, 2], [3, 1], [0, 1, 2, 3]])
@pytest.mark.parametrize("name", ["pcgrad", "gradvac"])
def test_any_subset_of_the_tasks_is_treated_as_if_it_were_all(name: str, present: list[int]) -> None:
    rows = gradients_of("conflicting", 4, seed=3)
    found = update(make(name, 4), rows, present, 5, [[slice(0, P)]])
    orders, of_step = random_orders(len(present), random.Random(5)), rows[present]
    expected = {
        "pcgrad": vector_pcgrad(of_step, orders),
        "gradvac": vector_gradvac(of_step, torch.zeros(len(present), len(present)), 0.01, orders)[0],
    }[name]
    assert_same_update(found, expected.sum(0), of_step)


SEGMENTS = [[slice(0, 30), slice(140, P)], [slice(30, 100)], [slice(100, 140)]]  # the first lies in two places


@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 100])
@pytest.mark.parametrize("scales", [(1.0,) * 3, (1e25,) * 3, (1e-25,) * 3, (1e-20,) * 3, (1e25, 1.0, 1e-25)])
def test_a_gramian_is_right_at_every_size_and_scale(size: int, scales: tuple[float, ...]) -> None:
    rows = gradients_of("random", 3, size, size) * torch.tensor(scales)[:, None]
    expected = rows.double() @ rows.double().T
    norms = expected.diagonal().sqrt()
    found = exact(lambda dtype: gramian(rows, dtype, chunk=8))
    assert float(((found - expected) / norms / norms[:, None]).abs().max()) < 1e-6


def test_long_rows_are_summed_without_losing_digits() -> None:
    rows = torch.full((2, 3_000_000), 0.1)
    rows[1, ::2] = -0.3
    expected = rows.double() @ rows.double().T
    assert torch.allclose(gramian(rows), expected, rtol=5e-5)  # one float32 sum is off by 2e-3


def test_equal_lengths_bring_the_gradients_to_the_mean_of_theirs_and_leave_weights_and_zeros() -> None:
    rows = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    weights = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)  # lengths without weights: 5, 1, 0, their mean 2
    factors = equal_lengths(gramians_of(rows, [[slice(0, 2)], [slice(2, 3)]]), weights)
    assert factors.tolist() == pytest.approx([0.4, 2.0, 1.0])


@pytest.mark.parametrize("name", ["pcgrad", "gradvac"])
@pytest.mark.parametrize("length", [1e-38, 1e-25, 1e-16])
def test_a_vanishing_gradient_counts_as_zero_and_takes_nothing_from_the_others(name: str, length: float) -> None:
    """It points against them, so that each of them would lose its part along it."""
    rows = gradients_of("random", 3)
    rows[1] = -(rows[0] + rows[2]) / (rows[0] + rows[2]).norm() * length
    found = []
    for middle in (rows[1], torch.zeros(P)):
        gradients, segments = torch.stack([rows[0], middle, rows[2]]), [[slice(0, P)]]
        gramians = without_vanishing(gramians_of(gradients, segments, torch.float64))
        factors = equal_lengths(gramians, torch.ones(3, dtype=torch.float64))
        gramians = gramians * factors[:, None] * factors
        treatment = TREATMENTS[name](parameters_type(TREATMENTS[name])(), 3, 1)
        coefficients = treatment.coefficients(gramians, [0, 1, 2], random.Random(1), torch.zeros(3), 1)
        combine(gradients, coefficients.sum(1) * factors, segments)
        found.append(gradients[0])
    assert bool(found[1].isfinite().all()) and found[1].norm() > 0
    assert torch.allclose(*found, rtol=1e-6, atol=1e-6)


def test_a_gradient_vanishes_by_segment_and_an_ordinary_one_does_not() -> None:
    rows = torch.tensor([[3.0, 1e-9], [1e-14, 2e-9], [2e-16, 1e-25]])
    whole = gramians_of(rows, [[slice(0, 1)], [slice(1, 2)]], torch.float64)
    found = without_vanishing(whole)
    assert torch.equal(found[0, :2, :2], whole[0, :2, :2]) and torch.equal(found[1, :2, :2], whole[1, :2, :2])
    assert bool((found[:, 2] == 0).all()) and bool((found[:, :, 2] == 0).all())
    assert bool((without_vanishing(torch.zeros(1, 2, 2)) == 0).all())


def test_combining_weighs_the_gradients_by_segment_in_the_first_of_them() -> None:
    rows = gradients_of("random", 3)
    weights = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0], [1.0, 1.0, 1.0]])
    gradients = rows.clone()
    combine(gradients, weights, SEGMENTS)
    found = gradients[0]
    assert torch.equal(gradients[1:], rows[1:])
    for parts, of_segment in zip(SEGMENTS, weights, strict=True):
        for part in parts:
            assert torch.allclose(found[part], of_segment @ rows[:, part], atol=1e-5)


def test_cosines_stay_within_1_and_are_nan_for_a_zero_gradient() -> None:
    gram = torch.tensor([[4.0, -2.0 - 1e-6, 0.0], [-2.0 - 1e-6, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    found = cosines(gram)
    assert found[0].tolist()[:2] == [1, -1] and bool(found[2].isnan().all())
