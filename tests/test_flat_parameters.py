"""AdamW against its formula and torch's own; parameters as views of vectors; norms and clipping."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from flat_parameters import FlatParameters, WeightAverage, clip_factor, gradient_norm
from helpers import generator, tiny_model
from ops.adamw import Moments, Vector, adamw_by_definition, adamw_step
from pal import ProjectedAttention
from parameters import Choice

PAL = Choice("pal", ProjectedAttention.Parameters())


def model_parameters() -> dict[str, nn.Parameter]:
    return dict(tiny_model(adapter=PAL).named_parameters())


def set_gradients(named: dict[str, nn.Parameter], seed: int) -> None:
    """Random ones, as a backward pass leaves them: in the tensors that are there."""
    noise = generator(seed)
    for parameter in named.values():
        gradient = torch.randn(parameter.shape, generator=noise)
        parameter.grad = gradient if parameter.grad is None else parameter.grad.copy_(gradient)


@pytest.mark.parametrize("num_decayed", [0, 4, 7])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_a_step_is_that_of_the_definition(num_decayed: int, factor: float) -> None:
    """Each part's length may be nothing; the steps are counted once."""
    ours = torch.randn(7, generator=generator())
    theirs, decay = ours.double(), torch.tensor([0.3] * num_decayed + [0.0] * (7 - num_decayed))
    moments, exact = Moments.zeros_like(ours), Moments.zeros_like(theirs)
    for step in range(5):
        gradient = torch.randn(7, generator=generator(step)) * 10.0 ** (step - 2)
        adamw_by_definition(theirs, gradient.double(), exact, 1e-2 * (step + 1), decay, factor)
        vector, lr = Vector(ours, gradient, moments, num_decayed), torch.tensor(1e-2 * (step + 1), dtype=torch.float64)
        adamw_step([vector], lr, 0.3, torch.tensor(factor), torch.zeros(()))
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-6)
        assert moments.step.item() == exact.step.item() == step + 1
    for name, value in vars(moments).items():
        torch.testing.assert_close(value, vars(exact)[name].float(), rtol=1e-5, atol=1e-12)
    before = [ours.clone(), *(value.clone() for value in vars(moments).values())]
    vector = Vector(ours, torch.full_like(ours, torch.nan), moments, num_decayed)
    adamw_step([vector], torch.ones(()), 0.3, torch.ones(()), is_skipped=torch.ones(()))
    assert all(torch.equal(x, y) for x, y in zip(before, (ours, *vars(moments).values()), strict=True))


def small() -> dict[str, nn.Parameter]:
    shapes: dict[str, Sequence[int]] = {"a": (2, 3), "b": (3,), "c": (1, 4), "d": (2,), "e": (2, 2)}
    noise = generator()
    return {name: nn.Parameter(torch.randn(*shape, generator=noise)) for name, shape in shapes.items()}


def test_parameters_and_gradients_are_views_of_vectors_matrices_first_in_few_ranges() -> None:
    named, before = small(), {name: p.detach().clone() for name, p in small().items()}
    flat = FlatParameters(named, num_gradients=3)
    assert flat.columns(["e", "c", "d"]) == [slice(6, 14), slice(17, 19)]  # a, c, e, b, d of 6, 4, 4, 3, 2
    assert flat.columns(named) == [slice(0, 19)] and flat.columns([]) == []
    assert flat.names == ["a", "c", "e", "b", "d"] and flat.num_decayed == 14 and len(flat) == 19
    assert torch.equal(flat.values, torch.cat([before[name].flatten() for name in flat.names]))
    assert all(torch.equal(named[name], before[name]) for name in named)
    assert flat.gradients.shape == (3, 19) and not flat.gradients.any()
    for row, factor in ((0, 1.0), (2, 3.0), (0, 4.0)):
        flat.point_to(row)
        sum((p * before[name]).sum() * factor for name, p in named.items()).backward()  # type: ignore[union-attr]
    expected = torch.cat([before[name].flatten() for name in flat.names])
    torch.testing.assert_close(flat.gradients, expected * torch.tensor([5.0, 0.0, 3.0])[:, None])
    flat.values.zero_()
    assert not any(p.any() for p in named.values())


@pytest.mark.parametrize(("names", "num_decayed"), [("ace", 14), ("bd", 0), ("", 0)])
def test_there_may_be_no_matrices_no_biases_and_nothing_at_all(names: str, num_decayed: int) -> None:
    named = {name: parameter for name, parameter in small().items() if name in names}
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    flat = FlatParameters(named)
    assert flat.num_decayed == num_decayed
    flat.gradients.fill_(1)
    adamw_step([flat.moved_by(flat.gradients[0])], torch.tensor(0.1), 0.5, torch.ones(()), torch.zeros(()))
    for name, value in before.items():  # the first step of AdamW is of length lr
        torch.testing.assert_close(named[name].detach(), value * (0.95 if value.dim() > 1 else 1) - 0.1)


def test_the_average_is_its_formula_moves_with_no_skipped_step_and_goes_into_the_parameters_and_out_again() -> None:
    """The decay is the warm-up's for the first steps, then the flag's; there may be a vector of nothing."""
    named, noise = small(), generator(5)
    vectors = {"shared": FlatParameters({}), "own": FlatParameters(named)}
    values, average = vectors["own"].values, WeightAverage(vectors, decay=0.4)
    expected, num_steps = values.double(), 0
    for is_skipped in (0, 0, 1, 0, 0, 1, 0, 0, 0, 0):
        values.add_(torch.randn(len(values), generator=noise))
        before = average.state["own"].clone()
        average.after_step(torch.tensor(float(is_skipped)))
        num_steps += 1 - is_skipped
        if not is_skipped:
            decay = min(0.4, (1 + num_steps) / (10 + num_steps))
            expected = decay * expected + (1 - decay) * values.double()
        assert torch.equal(average.state["own"], before) == bool(is_skipped) and average.state["step"] == num_steps
        torch.testing.assert_close(average.state["own"], expected.float(), rtol=1e-5, atol=1e-6)
    raw = values.clone()
    with average.in_place():
        assert torch.equal(named["b"], average.state["own"][14:17]) and not torch.equal(values, raw)
    assert torch.equal(values, raw)
    with pytest.raises(InterruptedError), average.in_place():
        raise InterruptedError
    assert torch.equal(values, raw)


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e9])
def test_norm_and_clipping_are_torchs(max_norm: float) -> None:
    named = model_parameters()
    set_gradients(named, 1)
    gradients: list[Tensor] = [parameter.grad for parameter in named.values() if parameter.grad is not None]
    before = torch.cat([gradient.flatten() for gradient in gradients])
    norm = gradient_norm(gradients)
    assert float(norm) == pytest.approx(float(before.double().norm()), rel=1e-6)
    factor = clip_factor(norm, max_norm)
    nn.utils.clip_grad_norm_(named.values(), max_norm or float("inf"))
    torch.testing.assert_close(before * factor, torch.cat([gradient.flatten() for gradient in gradients]))


def test_the_norm_is_finite_exactly_as_long_as_the_gradients_are() -> None:
    for wrong in (float("nan"), float("inf")):
        assert not gradient_norm([torch.ones(3), torch.tensor([[1.0, wrong]])]).isfinite()
    assert float(gradient_norm([torch.full((4, 4), 1e20), torch.zeros(3)])) == pytest.approx(4e20)
    assert clip_factor(torch.zeros(()), 1.0) == 1.0
