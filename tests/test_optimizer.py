"""AdamW against torch.optim.AdamW."""

import pytest
import torch
from torch import nn

from helpers import generator, tiny_model
from optimizer import AdamW
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
