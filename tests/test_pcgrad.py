"""Gradient treatments: coefficients from Gram matrices against the vector form of each method, and task gradients."""

import itertools
import math
import random
from collections.abc import Sequence

import kernels
import pytest
import torch
from torch import Tensor, nn

from helpers import random_batch, tiny_model
from pcgrad import (
    GradientVaccine,
    PCGrad,
    Sum,
    TaskGradients,
    cosines,
    gradvac_coefficients,
    gramian,
    gramian_weightings,
    make_treatment,
    pcgrad_coefficients,
    pcgrad_weights,
    random_orders,
    removed_shares,
)
from tasks import TASKS, task_loss

KINDS = ("random", "conflicting", "nearly parallel", "nearly opposite", "opposite", "zero", "large", "mixed sizes")
SIZES = ((5, 7), (40,), (3, 4, 6), (11,))  # shapes of the shared parameters


# ----------------------------------------------------------------------------------------- methods in vector form


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


def gradients_of(kind: str, num_tasks: int, size: int, seed: int) -> Tensor:
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


def task_gradients(rows: Tensor, segment_sizes: Sequence[int] = (4,)) -> TaskGradients:
    """A buffer that holds these gradients."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SIZES]
    gradients = TaskGradients(parameters, len(rows), segment_sizes)
    gradients.rows.copy_(rows)
    return gradients


def flat(parameters: Sequence[nn.Parameter]) -> Tensor:
    grads = [parameter.grad for parameter in parameters]
    return torch.cat([grad.flatten() for grad in grads if grad is not None]).double()


NUM_PARAMETERS = sum(math.prod(shape) for shape in SIZES)


def assert_same_update(found: Tensor, expected: Tensor, gradients: Tensor) -> None:
    """Equal to float32 rounding of the largest gradient."""
    assert found.isfinite().all()
    scale = float(gradients.double().norm(dim=1).max())
    assert float((found - expected).norm()) < 3e-6 * scale * len(gradients)


# --------------------------------------------------------------------------------------------------------- PCGrad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tasks", [2, 3, 5, 8])
def test_pcgrad_equals_the_vector_form(kind: str, num_tasks: int) -> None:
    for seed in range(5):
        rows = gradients_of(kind, num_tasks, NUM_PARAMETERS, seed)
        gradients = task_gradients(rows)
        tasks = list(range(num_tasks))
        coefficients = PCGrad().coefficients(gradients.gramians(tasks), tasks, random.Random(seed))
        gradients.combine(tasks, coefficients.sum(1))
        expected = vector_pcgrad(rows, random_orders(num_tasks, random.Random(seed)))
        assert_same_update(flat(gradients.parameters), expected.sum(0), rows)


def test_pcgrad_leaves_agreeing_gradients_and_removes_the_whole_conflict_of_two() -> None:
    agreeing = torch.tensor([[1.0, 0.5], [0.5, 2.0]])
    orders = [[1], [0]]
    assert torch.equal(pcgrad_coefficients(agreeing, orders), torch.eye(2).double())
    g = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    treated = pcgrad_coefficients(g @ g.T, orders) @ g.double()
    assert treated.tolist() == [[0.5, 0.5], [0.0, 1.0]]


def test_a_gradient_without_length_takes_nothing_away() -> None:
    gram = torch.tensor([[1.0, -1e-30], [-1e-30, 0.0]], dtype=torch.float64)  # an inner product of mere rounding
    assert torch.equal(pcgrad_coefficients(gram, [[1], [0]])[0], torch.tensor([1.0, 0.0]).double())


def test_pcgrad_projects_away_from_the_original_gradients_in_the_given_order() -> None:
    g = gradients_of("conflicting", 4, 6, 0).double()
    results = []
    for orders in ([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]], [[3, 2, 1], [3, 2, 0], [3, 1, 0], [2, 1, 0]]):
        treated = pcgrad_coefficients(g @ g.T, orders) @ g
        assert torch.allclose(treated, vector_pcgrad(g, orders), atol=1e-12)
        results.append(treated)
    assert not torch.allclose(results[0], results[1], atol=1e-2)


def test_pcgrad_weights_are_the_sum_over_the_tasks() -> None:
    g = gradients_of("conflicting", 5, 9, 1).double()
    orders = random_orders(5, random.Random(0))
    expected = vector_pcgrad(g, orders).sum(0)
    assert torch.allclose(pcgrad_weights(g @ g.T, orders) @ g, expected, atol=1e-12)


def test_orders_are_random_and_never_hold_the_task_itself() -> None:
    generator = random.Random(0)
    seen: list[set[tuple[int, ...]]] = [set() for _ in range(4)]
    for _ in range(300):
        orders = random_orders(4, generator)
        for i, order in enumerate(orders):
            assert sorted(order) == [j for j in range(4) if j != i]
            seen[i].add(tuple(order))
    assert [len(orders_of_task) for orders_of_task in seen] == [6] * 4
    assert random_orders(6, random.Random(3)) == random_orders(6, random.Random(3))


@pytest.mark.parametrize("shape", [(2, 3), (4,), (1, 2, 2)])
def test_a_gramian_that_is_not_square_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected \\(T, T\\)"):
        pcgrad_coefficients(torch.zeros(shape), [[1], [0]])
    with pytest.raises(ValueError, match="expected \\(T, T\\)"):
        gradvac_coefficients(torch.zeros(shape), torch.zeros(2, 2), 0.01, [[1], [0]])


# ----------------------------------------------------------------------------------------------- Gradient Vaccine


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tasks", [2, 3, 5, 8])
@pytest.mark.parametrize("beta", [0.01, 0.3])
def test_gradient_vaccine_equals_the_vector_form(kind: str, num_tasks: int, beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for seed in range(4):
        # float64, as the angle between nearly opposite gradients has only half of the digits of their cosine.
        rows = gradients_of(kind, num_tasks, NUM_PARAMETERS, seed).double()
        treatment = GradientVaccine(num_tasks, 1, beta)
        treatment.targets.copy_(torch.rand(1, num_tasks, num_tasks, generator=generator) * 1.6 - 0.7)
        before = treatment.targets[0].clone()
        coefficients = treatment.coefficients((rows @ rows.T)[None], range(num_tasks), random.Random(seed))
        expected, targets = vector_gradvac(rows, before, beta, random_orders(num_tasks, random.Random(seed)))
        assert_same_update(coefficients[0].sum(0) @ rows, expected.sum(0), torch.cat([rows, expected]))
        # Nothing but rounding is left of a gradient after its opposite; no cosine of that is worth comparing.
        if "opposite" not in kind:
            assert torch.allclose(treatment.targets[0], targets, atol=1e-5)


def test_gradient_vaccine_follows_the_vector_form_over_many_steps() -> None:
    treatment, targets = GradientVaccine(4, 1, 0.2), torch.zeros(4, 4, dtype=torch.float64)
    num_corrected = 0
    for step in range(100):
        g = gradients_of("random", 4, 6, step).double() + 0.5
        gram = (g @ g.T)[None]
        coefficients = treatment.coefficients(gram, range(4), random.Random(step))[0]
        expected, targets = vector_gradvac(g, targets, 0.2, random_orders(4, random.Random(step)))
        assert torch.allclose(coefficients @ g, expected, atol=1e-9)
        assert torch.allclose(treatment.targets[0], targets, atol=1e-12)
        num_corrected += int((coefficients - torch.eye(4)).abs().max() > 1e-3)
    assert num_corrected > 20


def test_the_corrected_gradient_has_the_target_as_its_cosine() -> None:
    g = torch.tensor([[1.0, 0.0, 0.0], [-0.5, 1.0, 0.3]], dtype=torch.float64)
    targets = torch.tensor([[0.0, 0.4], [-0.9, 0.0]], dtype=torch.float64)
    coefficients, _ = gradvac_coefficients(g @ g.T, targets, 0.01, [[1], [0]])
    treated = coefficients @ g
    assert float(torch.cosine_similarity(treated[0], g[1], 0)) == pytest.approx(0.4)
    assert torch.equal(treated[1], g[1])  # its cosine, -0.43, is above its target


def test_two_tasks_that_agree_see_their_target_rise_to_their_cosine() -> None:
    gram = torch.tensor([[[1.0, 1.2], [1.2, 4.0]]], dtype=torch.float64)  # cosine 0.6
    treatment = GradientVaccine(2, 1)
    for step in range(1500):
        coefficients = treatment.coefficients(gram, [0, 1], random.Random(step))
        if step == 0:
            assert treatment.targets[0, 0, 1] == pytest.approx(0.006)
        if step == 9:
            assert treatment.targets[0, 1, 0] == pytest.approx(0.6 * (1 - 0.99**10))
        assert torch.allclose(coefficients[0], torch.eye(2).double(), atol=1e-12)
    assert treatment.targets[0, 0, 1] == pytest.approx(0.6, abs=1e-6)
    assert treatment.targets[0, 1, 0] == pytest.approx(0.6, abs=1e-6)
    assert treatment.targets.diagonal(dim1=1, dim2=2).tolist() == [[0, 0]]


def test_targets_start_at_0_and_move_by_a_hundredth_by_default() -> None:
    treatment = make_treatment("gradvac", 3, 2, 0.01)
    assert isinstance(treatment, GradientVaccine)
    assert treatment.targets.shape == (2, 3, 3)
    assert not treatment.targets.any()
    assert GradientVaccine(2, 1).beta == 0.01
    assert make_treatment("gradvac", 2, 1, 0.5).beta == 0.5  # type: ignore[attr-defined]


def test_targets_move_where_the_condition_fires_and_where_it_does_not() -> None:
    g = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    targets = torch.tensor([[0.0, 0.9], [0.2, 0.0]], dtype=torch.float64)
    coefficients, moved = gradvac_coefficients(g @ g.T, targets, 0.1, [[1], [0]])
    assert coefficients[0, 1] > 0
    assert coefficients[1].tolist() == [0, 1]
    assert moved[0, 1] == pytest.approx(0.9 * 0.9 + 0.1 * 0.6)
    assert moved[1, 0] == pytest.approx(0.9 * 0.2 + 0.1 * 0.6)


@pytest.mark.parametrize("above", [0.0, 1e-12, 1e-7, 1e-3])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("target", [-1.0, 0.0, 0.5, 1 - 1e-12, 1.0])
def test_a_cosine_that_rounding_puts_beyond_1_gives_finite_numbers(above: float, sign: int, target: float) -> None:
    gram = torch.tensor([[4.0, sign * 2 * (1 + above)], [sign * 2 * (1 + above), 1.0]])
    coefficients, targets = gradvac_coefficients(gram, torch.full((2, 2), target), 1.0, [[1], [0]])
    assert coefficients.isfinite().all()
    assert targets[0, 1] == sign
    assert targets[1, 0] == sign


def test_tasks_that_are_absent_keep_their_targets() -> None:
    treatment = GradientVaccine(4, 2, 0.5)
    treatment.targets.copy_(torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0)))
    before = treatment.targets.clone()
    g = gradients_of("random", 3, 8, 0).double()
    gram = g @ g.T
    present = [0, 2, 3]
    treatment.coefficients(torch.stack([gram, 2 * gram]), present, random.Random(0))
    for i, j in itertools.product(range(4), range(4)):
        is_moved = i != j and i in present and j in present
        assert torch.equal(treatment.targets[:, i, j], before[:, i, j]) != is_moved, (i, j)
    _, targets = vector_gradvac(g, before[0][present][:, present], 0.5, random_orders(3, random.Random(0)))
    assert torch.allclose(treatment.targets[0][present][:, present], targets)


def test_pairs_with_a_zero_gradient_keep_their_targets() -> None:
    g = torch.tensor([[1.0, 2.0], [0.0, 0.0], [-1.0, 1.0]]).double()
    orders = random_orders(3, random.Random(0))
    coefficients, targets = gradvac_coefficients(g @ g.T, torch.full((3, 3), 0.3), 0.5, orders)
    assert coefficients.isfinite().all()
    assert (targets[1] == 0.3).all() or torch.allclose(targets[1], torch.full((3,), 0.3).double(), atol=1e-7)
    assert targets[0, 2] != pytest.approx(0.3, abs=1e-3)
    assert float(targets[0, 1]) == pytest.approx(0.3, abs=1e-7)


def test_the_targets_of_a_checkpoint_are_taken_over() -> None:
    g = gradients_of("random", 3, 5, 0).double()
    gram = (g @ g.T)[None]
    first, second = GradientVaccine(3, 1, 0.5), GradientVaccine(3, 1, 0.5)
    first.coefficients(gram, range(3), random.Random(0))
    second.load_state({name: value.clone() for name, value in first.state().items()})
    assert second.targets.any()
    results = [treatment.coefficients(gram, range(3), random.Random(1)) for treatment in (first, second)]
    assert torch.equal(*results)
    assert torch.equal(first.targets, second.targets)
    assert PCGrad().state() == Sum().state() == {}


# -------------------------------------------------------------------------------------- subsets, segments, sum


@pytest.mark.parametrize("present", [[0], [2], [0, 2], [3, 1], [0, 1, 2, 3]])
@pytest.mark.parametrize("name", ["pcgrad", "gradvac", "sum"])
def test_any_subset_of_the_tasks_is_treated_as_if_it_were_all(name: str, present: list[int]) -> None:
    rows = gradients_of("conflicting", 4, NUM_PARAMETERS, 3)
    gradients = task_gradients(rows)
    treatment = make_treatment(name, 4, 1, 0.01)
    coefficients = treatment.coefficients(gradients.gramians(present), present, random.Random(5))
    gradients.combine(present, coefficients.sum(1))
    orders, of_step = random_orders(len(present), random.Random(5)), rows[present]
    expected = {
        "pcgrad": vector_pcgrad(of_step, orders),
        "gradvac": vector_gradvac(of_step, torch.zeros(len(present), len(present)), 0.01, orders)[0],
        "sum": of_step.double(),
    }[name]
    assert_same_update(flat(gradients.parameters), expected.sum(0), of_step)


@pytest.mark.parametrize("name", ["pcgrad", "gradvac"])
def test_each_segment_is_treated_on_its_own(name: str) -> None:
    rows = gradients_of("conflicting", 3, NUM_PARAMETERS, 2)
    gradients, tasks, sizes = task_gradients(rows, (1, 2, 1)), [0, 1, 2], [35, 112, 11]
    treatment = make_treatment(name, 3, 3, 0.5)
    if isinstance(treatment, GradientVaccine):
        treatment.targets.copy_(torch.tensor([-0.2, 0.1, 0.3])[:, None, None].expand(3, 3, 3))
    gramians = gradients.gramians(tasks)
    coefficients = treatment.coefficients(gramians, tasks, random.Random(1))
    gradients.combine(tasks, coefficients.sum(1))
    orders, expected = random_orders(3, random.Random(1)), []
    for number, (segment, target) in enumerate(zip(rows.split(sizes, 1), (-0.2, 0.1, 0.3), strict=True)):
        assert torch.allclose(gramians[number], segment.double() @ segment.double().T, rtol=1e-5, atol=1e-5)
        if isinstance(treatment, GradientVaccine):
            treated, targets = vector_gradvac(segment, torch.full((3, 3), target).double(), 0.5, orders)
            assert torch.allclose(treatment.targets[number], targets, atol=1e-6)
        else:
            treated = vector_pcgrad(segment, orders)
        expected.append(treated.sum(0))
    assert_same_update(flat(gradients.parameters), torch.cat(expected), rows)
    assert float((torch.cat(expected) - vector_pcgrad(rows, orders).sum(0)).norm()) > 1e-2


def test_the_sum_is_the_plain_sum() -> None:
    rows = gradients_of("conflicting", 3, NUM_PARAMETERS, 0)
    gradients = task_gradients(rows, (2, 2))
    coefficients = Sum().coefficients(gradients.gramians([0, 1, 2]), [0, 1, 2], random.Random(0))
    assert coefficients.shape == (2, 3, 3)
    gradients.combine([0, 1, 2], coefficients.sum(1))
    assert_same_update(flat(gradients.parameters), rows.double().sum(0), rows)


# ------------------------------------------------------------------------------------------------- task gradients


def test_backward_passes_accumulate_straight_into_the_row() -> None:
    layer = nn.Linear(4, 3)
    parameters = list(layer.parameters())
    gradients = TaskGradients(parameters, 2, [1, 1])
    first, second = torch.randn(5, 4), torch.randn(2, 4)
    expected = []
    for row, inputs in ((0, first), (1, second)):
        expected.append(torch.cat([g.flatten() for g in torch.autograd.grad(layer(inputs).square().sum(), parameters)]))
        gradients.point_to(row)
        layer(inputs).square().sum().backward()
        assert parameters[0].grad is not None
        assert parameters[0].grad.data_ptr() == gradients.rows[row].data_ptr()
    assert torch.allclose(gradients.rows, torch.stack(expected))
    gradients.point_to(0)
    layer(second).square().sum().backward()  # a further draw of the first task
    assert torch.allclose(gradients.rows, torch.stack([expected[0] + expected[1], expected[1]]), atol=1e-5)
    gradients.zero()
    assert not gradients.rows.any()


def test_gramians_are_inner_products_of_the_chosen_rows_over_each_segment() -> None:
    rows = gradients_of("random", 4, NUM_PARAMETERS, 0)
    gradients = task_gradients(rows, (1, 1, 2))
    found = gradients.gramians([3, 1])
    assert found.dtype == torch.float64
    assert found.shape == (3, 2, 2)
    for segment, part in zip(found, rows[[3, 1]].double().split([35, 40, 83], 1), strict=True):
        assert torch.allclose(segment, part @ part.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 100])
@pytest.mark.parametrize("scale", [1.0, 1e25, 1e-25, 1e-20])
def test_a_gramian_is_right_at_every_size_and_scale(size: int, scale: float) -> None:
    rows = (gradients_of("random", 3, size, size) * scale).float()
    exact = rows.double() @ rows.double().T
    found = gramian(rows, chunk=8)
    norms = exact.diagonal().sqrt()
    assert float(((found - exact) / norms / norms[:, None]).abs().max()) < 1e-6


def test_a_gramian_of_rows_of_very_different_sizes_keeps_the_digits_of_each() -> None:
    rows = gradients_of("random", 3, 1000, 0) * torch.tensor([[1e25], [1.0], [1e-25]])
    exact = rows.double() @ rows.double().T
    norms = exact.diagonal().sqrt()
    assert float(((gramian(rows, chunk=64) - exact) / norms / norms[:, None]).abs().max()) < 1e-6


def test_long_rows_are_summed_without_losing_digits() -> None:
    rows = torch.full((2, 3_000_000), 0.1)
    rows[1, ::2] = -0.3
    exact = rows.double() @ rows.double().T
    assert torch.allclose(gramian(rows), exact, rtol=5e-5)  # one float32 sum is off by 2e-3


def test_combining_weighs_the_rows_by_segment_and_shows_the_result_as_the_gradient() -> None:
    rows = gradients_of("random", 4, NUM_PARAMETERS, 0)
    gradients = task_gradients(rows, (2, 2))
    weights = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]])
    gradients.combine([2, 0, 1], weights)
    first, second = (rows[[2, 0, 1]].split([75, 83], 1)[s].T @ weights[s] for s in range(2))
    assert torch.allclose(flat(gradients.parameters).float(), torch.cat([first, second]), atol=1e-5)
    assert torch.equal(gradients.rows[3], rows[3])
    for parameter in gradients.parameters:
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("segment_sizes", [(4,), (1, 1, 2), (2, 2)])
@pytest.mark.parametrize("compiled", [True, False])
def test_an_embedding_whose_lines_are_named_gives_what_all_of_it_would(
    place: int, segment_sizes: tuple[int, ...], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over two steps, so that what the first one left behind would be seen."""
    if not compiled:
        monkeypatch.setattr(kernels, "usable", lambda *tensors: False)
    sizes = [(7, 5), (8, 5), (5,), (13, 6)]
    whole, by_lines = (
        TaskGradients(parameters, 3, segment_sizes, parameters[place] if named else None)
        for named in (False, True)
        for parameters in [[nn.Parameter(torch.zeros(size)) for size in sizes]]
    )
    noise, pick = torch.Generator().manual_seed(place), random.Random(place)
    for present in ([0, 1, 2], [2, 0]):
        whole.zero()
        by_lines.zero()
        assert not by_lines.rows.any()
        for row in present:
            for number, size in enumerate(sizes):
                lines = sorted(pick.sample(range(size[0]), 3)) if number == place else list(range(size[0]))
                added = torch.randn(len(lines), *size[1:], generator=noise)
                for gradients in (whole, by_lines):
                    gradients.point_to(row)
                    gradients.parameters[number].grad[lines] += added  # type: ignore[index]
                if number == place:
                    by_lines.touch(row, torch.tensor([*lines, lines[0]]))
        assert_near_gramians(by_lines.gramians(present), whole.gramians(present))
        weights = torch.randn(len(segment_sizes), len(present), generator=noise)
        for gradients in (whole, by_lines):
            gradients.combine(present, weights)
        assert torch.allclose(flat(by_lines.parameters), flat(whole.parameters), atol=1e-6)
        parts = by_lines.parts(present[0])
        norm = float(flat(whole.parameters).norm())
        assert float(torch.cat([part.flatten() for part in parts]).norm()) == pytest.approx(norm, rel=1e-6)
        assert sum(part.numel() for part in parts) < whole.rows.shape[1]
        shown = by_lines.parameters[place].grad
        assert shown is not None
        moved = {i for i, line in enumerate(shown) if line.any()}
        assert 3 <= len(moved) < len(shown) and moved == set(by_lines.touched(present[:1]).tolist())


def assert_near_gramians(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == torch.float64
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_segments_must_hold_all_parameters() -> None:
    with pytest.raises(ValueError, match="segments of 3 tensors for 4 parameters"):
        task_gradients(torch.zeros(1, NUM_PARAMETERS), (1, 2))


def test_without_shared_parameters_there_is_nothing_to_point_to() -> None:
    gradients = TaskGradients([], 1, [])
    gradients.point_to(0)
    gradients.zero()
    assert gradients.rows.shape == (1, 0)


def test_heads_and_adapters_keep_their_own_gradient_and_stay_out_of_the_treatment() -> None:
    def step(head_scale: float) -> tuple[Tensor, dict[str, dict[str, Tensor]], Tensor]:
        model = tiny_model(head_layers=1)
        shared = list(model.shared_parameters().values())
        gradients = TaskGradients(shared, len(TASKS), [len(shared)])
        own, rows = {}, []
        for number, task in enumerate(TASKS):
            batch = random_batch(task, 4, number)
            pooled = model.pooled(task, batch)
            cut = pooled.detach().requires_grad_()
            head_loss = task_loss(TASKS[task], model.predict(task, cut), batch.labels)
            head = model.task_parameters(task)
            gradients.point_to(number)
            (task_loss(TASKS[task], model.predict(task, pooled), batch.labels)).backward()
            exact = torch.autograd.grad(head_loss, list(head.values()))
            for parameter, value in zip(head.values(), exact, strict=True):
                assert parameter.grad is not None
                assert torch.allclose(parameter.grad, value, atol=1e-6)
                parameter.grad.mul_(head_scale)
            rows.append(gradients.rows[number].clone())
            own[task] = {name: p.grad.clone() for name, p in head.items() if p.grad is not None}
        gramians = gradients.gramians([0, 1, 2])
        coefficients = PCGrad().coefficients(gramians, [0, 1, 2], random.Random(0))
        gradients.combine([0, 1, 2], coefficients.sum(1))
        for task in TASKS:
            for name, parameter in model.task_parameters(task).items():
                assert torch.equal(parameter.grad, own[task][name])  # type: ignore[arg-type]
        expected = vector_pcgrad(torch.stack(rows), random_orders(3, random.Random(0))).sum(0)
        assert_same_update(flat(shared), expected, torch.stack(rows))
        return flat(shared), own, gramians

    small, large = step(1.0), step(1e6)
    assert torch.equal(small[0], large[0])
    assert torch.equal(small[2], large[2])


# -------------------------------------------------------------------------------------------------------- torchjd


class RecordedOrders:
    """Stands in for torch.randperm and keeps what it returned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drawn: list[list[int]] = []
        self._randperm = torch.randperm
        monkeypatch.setattr(torch, "randperm", self)

    def __call__(self, size: int) -> Tensor:
        order = self._randperm(size)
        self.drawn.append(order.tolist())
        return order


def random_gramian(num_tasks: int, generator: torch.Generator) -> Tensor:
    g = torch.randn(num_tasks, num_tasks + 3, generator=generator, dtype=torch.float64)
    g = g * 10 ** torch.randn(num_tasks, 1, generator=generator, dtype=torch.float64)
    return g @ g.T


def test_pcgrad_weights_equal_torchjd_s(monkeypatch: pytest.MonkeyPatch) -> None:
    weighting = pytest.importorskip("torchjd.aggregation").PCGradWeighting()
    recorded, generator = RecordedOrders(monkeypatch), torch.Generator().manual_seed(0)
    for number in range(1000):
        num_tasks = 2 + number % 7
        gram = random_gramian(num_tasks, generator)
        recorded.drawn.clear()
        expected = weighting(gram)
        orders = [[j for j in order if j != i] for i, order in enumerate(recorded.drawn)]
        scale = float(expected.abs().max())
        assert torch.allclose(pcgrad_weights(gram, orders), expected, rtol=1e-9, atol=1e-9 * scale)


def test_gradient_vaccine_equals_torchjd_s(monkeypatch: pytest.MonkeyPatch) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    recorded, generator = RecordedOrders(monkeypatch), torch.Generator().manual_seed(0)
    weightings = {n: aggregation.GradVacWeighting(beta=0.1, eps=0.0) for n in range(2, 9)}  # it keeps its targets
    targets = {n: torch.zeros(n, n, dtype=torch.float64) for n in range(2, 9)}
    for number in range(1000):
        num_tasks = 2 + number % 7
        gram = random_gramian(num_tasks, generator)
        recorded.drawn.clear()
        expected = weightings[num_tasks](gram)
        others = [[j for j in range(num_tasks) if j != i] for i in range(num_tasks)]
        orders = [[others[i][place] for place in order] for i, order in enumerate(recorded.drawn)]
        coefficients, targets[num_tasks] = gradvac_coefficients(gram, targets[num_tasks], 0.1, orders)
        scale = float(expected.abs().max())
        assert torch.allclose(coefficients.sum(0), expected, rtol=1e-8, atol=1e-8 * scale)


@pytest.mark.parametrize("scale", [1.0, 1e-14, 1e40])
def test_a_weighting_of_torchjd_gives_its_weights_at_any_scale(scale: float) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    g = gradients_of("conflicting", 3, 8, 0).double()
    gram = g @ g.T
    treatment = make_treatment("UPGrad", 3, 1, 0.01)
    coefficients = treatment.coefficients(gram[None] * scale, [0, 1, 2], random.Random(0))
    expected = aggregation.UPGradWeighting()(gram / gram.diagonal().mean())
    assert torch.allclose(coefficients[0], torch.diag(expected), atol=1e-6)
    assert not torch.allclose(expected, torch.full((3,), float(expected[0])).double(), atol=1e-2)


def test_weightings_of_torchjd_draw_from_the_step_s_generator_and_from_no_other() -> None:
    pytest.importorskip("torchjd.aggregation")
    g = gradients_of("conflicting", 5, 8, 0).double()
    before, results = torch.get_rng_state(), []
    for noise, seed in enumerate((1, 1, 2)):
        torch.manual_seed(noise)
        treatment = make_treatment("PCGrad", 5, 1, 0.01)
        results.append(treatment.coefficients((g @ g.T)[None], range(5), random.Random(seed)))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    torch.set_rng_state(before)
    make_treatment("PCGrad", 5, 1, 0.01).coefficients((g @ g.T)[None], range(5), random.Random(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_weightings_of_torchjd_that_can_be_named_all_give_finite_weights_and_keep_no_averages() -> None:
    pytest.importorskip("torchjd.aggregation")
    names = gramian_weightings()
    assert {"UPGrad", "MGDA", "PCGrad"} <= set(names)
    assert "GradVac" not in names  # ours is in the checkpoint, torchjd's would start anew when a run is resumed
    g = gradients_of("conflicting", 3, 8, 0).double()
    for name in names:
        treatment = make_treatment(name, 3, 1, 0.01)
        results = [treatment.coefficients((g @ g.T)[None], range(3), random.Random(0)) for _ in range(2)]
        assert results[0].isfinite().all()
        assert torch.equal(*results), name


@pytest.mark.parametrize("name", ["nonsense", "Gramian", "GradVac", "CAGrad", "Random", ""])
def test_an_unknown_treatment_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="--treatment"):
        make_treatment(name, 3, 1, 0.01)


# ---------------------------------------------------------------------------------------------------- diagnostics


def test_cosines_stay_within_1_and_are_nan_for_a_zero_gradient() -> None:
    gram = torch.tensor([[4.0, -2.0 - 1e-6, 0.0], [-2.0 - 1e-6, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    found = cosines(gram)
    assert found[0, 1] == -1
    assert found[0, 0] == 1
    assert found[2].isnan().all()


def test_the_removed_share_is_the_squared_cosine_after_one_projection() -> None:
    g = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    coefficients = pcgrad_coefficients(g @ g.T, [[1], [0]])
    kept = ((coefficients @ g) * g).sum(1)
    assert torch.allclose(removed_shares((g @ g.T).diagonal(), kept), torch.full((2,), 0.5).double())
    assert removed_shares(torch.tensor([1.0]), torch.tensor([1.5])).tolist() == [0]
