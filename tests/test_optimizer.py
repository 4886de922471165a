"""AdamW against torch.optim.AdamW."""

import math

import kernels
import pytest
import torch
from torch import nn

from helpers import generator, tiny_model
from optimizer import AdamW, clip_factor, gradient_norm
from pal import PalConfig


def parameters_with_gradients(seed: int) -> dict[str, nn.Parameter]:
    model = tiny_model(adapters=PalConfig("attention", 8, 2, 2), head_layers=1)
    named = dict(model.named_parameters())
    set_gradients(named, seed)
    return named


def set_gradients(named: dict[str, nn.Parameter], seed: int) -> None:
    """Random gradients; of every fifth parameter none, another fifth in each step."""
    noise = generator(seed)
    for i, parameter in enumerate(named.values()):
        gradient = torch.randn(parameter.shape, generator=noise)
        parameter.grad = None if (i + seed) % 5 == 0 else gradient


def reference(named: dict[str, nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
    """Biases and LayerNorms by name, not by dimension."""
    vectors = [p for name, p in named.items() if name.endswith(".bias") or "norm" in name]
    matrices = [p for p in named.values() if not any(p is vector for vector in vectors)]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, fused=False, foreach=False)


@pytest.fixture(params=["kernels", "torch"], autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By our kernels and by torch's."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "usable", lambda *tensors: False)
    elif kernels.build().library is None:
        pytest.skip(f"no kernels: {kernels.build().problem}")
    return str(request.param)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_steps_are_those_of_torch_with_decay_for_matrices_only(weight_decay: float) -> None:
    ours, theirs = parameters_with_gradients(0), parameters_with_gradients(0)
    optimizer, expected = AdamW(ours, weight_decay), reference(theirs, weight_decay)
    for step in range(7):
        lr = 1e-3 * (step + 1)
        for named in (ours, theirs):
            set_gradients(named, step)
        for group in expected.param_groups:
            group["lr"] = lr
        optimizer.step(lr)
        expected.step()
        for name, parameter in ours.items():
            torch.testing.assert_close(parameter, theirs[name], rtol=1e-5, atol=1e-7)


def test_a_parameter_without_a_gradient_stays_and_has_no_moments() -> None:
    named = parameters_with_gradients(0)
    still = [name for name, parameter in named.items() if parameter.grad is None]
    before = {name: named[name].detach().clone() for name in still}
    optimizer = AdamW(named, 0.5)
    optimizer.step(0.1)
    assert still and all(torch.equal(named[name], before[name]) for name in still)
    assert {name.split(":")[0] for name in optimizer.state()} == set(named) - set(still)


def test_a_restored_optimizer_goes_on_bit_for_bit() -> None:
    whole, stopped = parameters_with_gradients(0), parameters_with_gradients(0)
    first, second = AdamW(whole, 0.1), AdamW(stopped, 0.1)
    for optimizer in (first, second):
        optimizer.step(1e-2)
    restored = AdamW(stopped, 0.1)
    restored.load_state({name: value.clone() for name, value in second.state().items()})
    for optimizer, named in ((first, whole), (restored, stopped)):
        set_gradients(named, 1)
        optimizer.step(1e-2)
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e9])
def test_norm_and_clipping_are_torchs(max_norm: float) -> None:
    named = parameters_with_gradients(1)
    gradients = [parameter.grad for parameter in named.values() if parameter.grad is not None]
    before = torch.cat([gradient.flatten() for gradient in gradients])
    norm = gradient_norm(gradients)
    assert norm == pytest.approx(float(before.double().norm()), rel=1e-6)
    factor = clip_factor(norm, max_norm)
    nn.utils.clip_grad_norm_(named.values(), max_norm or float("inf"))
    torch.testing.assert_close(before * factor, torch.cat([gradient.flatten() for gradient in gradients]))


def test_the_norm_of_what_is_not_finite_is_not_finite() -> None:
    for wrong in (float("nan"), float("inf")):
        assert not math.isfinite(gradient_norm([torch.ones(3), torch.tensor([[1.0, wrong]])]))


def test_the_norm_of_large_gradients_is_finite_as_long_as_they_are() -> None:
    assert gradient_norm([torch.full((4, 4), 1e20), torch.zeros(3)]) == pytest.approx(4e20)
    assert clip_factor(0.0, 1.0) == 1.0


def test_gradients_that_do_not_lie_in_one_piece_are_clipped_and_followed_too() -> None:
    gradient = torch.randn(6, 4, generator=generator()).T
    ours, theirs = ({"weight": nn.Parameter(torch.ones(4, 6))} for _ in range(2))
    ours["weight"].grad, theirs["weight"].grad = gradient.clone(), gradient.contiguous()
    ours["weight"].grad = torch.empty(6, 4).T.copy_(gradient)
    assert not ours["weight"].grad.is_contiguous()
    assert gradient_norm([ours["weight"].grad]) == pytest.approx(float(gradient.norm()), rel=1e-6)
    for named in (ours, theirs):
        AdamW(named, 0.1).step(1e-2, 0.5)
    torch.testing.assert_close(ours["weight"], theirs["weight"])


def test_a_step_along_clipped_gradients_is_that_of_the_smaller_ones() -> None:
    ours, theirs = parameters_with_gradients(2), parameters_with_gradients(2)
    for parameter in theirs.values():
        if parameter.grad is not None:
            parameter.grad.mul_(0.25)
    AdamW(ours, 0.1).step(1e-2, 0.25)
    AdamW(theirs, 0.1).step(1e-2)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name])


def test_steps_that_know_which_lines_have_gradients_are_the_same() -> None:
    """Also after a checkpoint, which does not say which lines have been moved."""
    whole, by_lines = ({"words": nn.Parameter(torch.ones(9, 20))} for _ in range(2))
    first, second = AdamW(whole, 0.1), AdamW(by_lines, 0.1)
    for number, lines in enumerate(([1, 4], [4, 7], [], [1, 8])):
        gradient = torch.zeros(9, 20)
        gradient[lines] = torch.randn(len(lines), 20, generator=generator(number))
        whole["words"].grad, by_lines["words"].grad = gradient, gradient.clone()
        first.step(1e-2)
        second.step(1e-2, 1.0, {"words": torch.tensor(lines, dtype=torch.long)})
        torch.testing.assert_close(by_lines["words"], whole["words"], rtol=1e-7, atol=0)
        if number == 1:
            state = {name: value.clone() for name, value in second.state().items()}
            second = AdamW(by_lines, 0.1)
            second.load_state(state)
    for name, value in first.state().items():
        torch.testing.assert_close(second.state()[name], value, rtol=1e-6, atol=0)


def test_lines_whose_average_gradient_has_vanished_go_on_after_a_checkpoint() -> None:
    """exp_avg is zero there, exp_avg_sq is not."""
    whole, stopped = ({"words": nn.Parameter(torch.ones(3, 4))} for _ in range(2))
    state = {
        "words:step": torch.tensor(900.0),
        "words:exp_avg": torch.zeros(3, 4),
        "words:exp_avg_sq": torch.tensor([[0.5], [0.0], [2.0]]).expand(3, 4).contiguous(),
    }
    first, second = AdamW(whole, 0.1), AdamW(stopped, 0.1)
    for optimizer, named in ((first, whole), (second, stopped)):
        optimizer.load_state({name: value.clone() for name, value in state.items()})
        named["words"].grad = torch.zeros(3, 4)
    first.step(1e-2)
    second.step(1e-2, 1.0, {"words": torch.empty(0, dtype=torch.long)})
    for name, value in first.state().items():
        torch.testing.assert_close(second.state()[name], value, rtol=1e-7, atol=0)


def test_steps_that_do_not_name_lines_are_remembered_by_those_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, by_lines = ({"words": nn.Parameter(torch.ones(5, 4))} for _ in range(2))
    first, second = AdamW(whole, 0.0), AdamW(by_lines, 0.0)
    usable = kernels.usable
    for line, named, compiled in ((1, True, True), (2, True, False), (3, False, True), (1, True, True)):
        monkeypatch.setattr(kernels, "usable", usable if compiled else lambda *tensors: False)
        for parameters in (whole, by_lines):
            parameters["words"].grad = torch.zeros(5, 4).index_fill_(0, torch.tensor([line]), 1.0)
        first.step(1e-2)
        second.step(1e-2, 1.0, {"words": torch.tensor([line])} if named else {})
    torch.testing.assert_close(by_lines["words"], whole["words"], rtol=1e-6, atol=0)
