"""SMART: divergences, the bound on the perturbation, and what the terms must not measure.

(Both terms in training, against a naive computation: test_wiring.py.)
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from helpers import THREE, generator, random_batch, shaken, tiny_model
from model import MultitaskBert
from ops import DropoutMasks
from smart import BregmanProximal, Smoothness, ascend, held_still
from tasks import TASKS

PAPER = Smoothness.Parameters()
WIDE = Smoothness.Parameters(eps=0.05, sigma=0.03, eta=0.04)  # large enough for a comparison in float32


def without_dropout() -> MultitaskBert:
    model: MultitaskBert = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return model


def smoothness_of(model: MultitaskBert, config: Smoothness.Parameters) -> Smoothness:
    return Smoothness(config, model, 10)


def naive_divergence(task: str) -> Callable[[Tensor, Tensor], Tensor]:
    def kl_both_ways(first: Tensor, second: Tensor) -> Tensor:
        p, q = torch.softmax(first, -1), torch.softmax(second, -1)
        return (p * (p / q).log() + q * (q / p).log()).sum(-1)

    def of_one_logit(first: Tensor, second: Tensor) -> Tensor:
        return kl_both_ways(torch.cat([first, 0 * first], -1), torch.cat([second, 0 * second], -1))

    def of_scores(first: Tensor, second: Tensor) -> Tensor:
        return ((first - second) ** 2).squeeze(-1)

    return {"sst": kl_both_ways, "para": of_one_logit, "sts": of_scores}[task]


@pytest.mark.parametrize("task", THREE)
@pytest.mark.parametrize("distance", [2.0, 1e-4])
def test_divergences_are_those_of_the_paper_and_keep_their_digits_for_close_predictions(
    task: str, distance: float
) -> None:
    output = TASKS[task].output
    first = torch.randn(50, output.num_outputs, generator=generator()).double()
    second = first + distance * torch.randn(first.shape, generator=generator(1))
    exact = naive_divergence(task)(first, second)
    found = output.divergence(first.float(), second.float()).double()
    assert found.shape == (50,) and float((found - exact).norm() / exact.norm()) < 1e-2
    assert torch.allclose(found.float(), output.divergence(second.float(), first.float()))
    assert (exact > 0).all() and not output.divergence(first, first.clone()).any()


def test_the_perturbation_starts_normal_and_ends_within_eps_and_the_paper_s_sizes_are_the_default() -> None:
    assert (PAPER.eps, PAPER.sigma, PAPER.eta, PAPER.steps, PAPER.weight) == (1e-5, 1e-5, 1e-3, 1, 1.0)
    assert BregmanProximal.Parameters().weight == 1.0
    model, batch, masks = tiny_model(), random_batch("sst", 60), DropoutMasks(0)
    logits, seen = model("sst", batch, masks), list[Tensor]()
    model.register_forward_pre_hook(lambda _, given: seen.append(given[3].detach().clone()))
    smoothness_of(model, replace(PAPER, sigma=2e-5)).term("sst", batch, masks, logits)
    start, end = seen
    assert batch.tokens is not None and start.shape == end.shape == (len(batch.tokens.row_of_token), 32)
    assert float(start.std()) == pytest.approx(2e-5, rel=0.03)
    assert float(start.mean()) == pytest.approx(0, abs=1e-6)
    assert float((start.abs() < 2e-5).float().mean()) == pytest.approx(0.683, abs=0.02)
    reached = torch.stack([end[batch.tokens.row_of_token == row].abs().max() for row in range(60)])
    assert torch.allclose(reached, torch.full((60,), 1e-5), rtol=1e-6, atol=0)


def test_a_step_goes_along_the_gradient_over_its_largest_entry_in_the_row_and_is_projected() -> None:
    config = Smoothness.Parameters(eps=0.5, eta=0.4)
    start = torch.tensor([[0.3, -0.3], [0.0, 0.1], [0.2, -0.45], [0.7, 0.1]])
    gradient = torch.tensor([[4.0, -1.0], [2.0, 0.0], [1e-6, -2e-6], [0.0, 0.0]])
    found = ascend(start, gradient, torch.tensor([0, 0, 1, 2]), 3, config)
    expected = torch.tensor([[0.5, -0.4], [0.2, 0.1], [0.4, -0.5], [0.5, 0.1]])  # 0.7 and -0.85 are cut off
    assert torch.allclose(found, expected)


def test_the_search_for_the_perturbation_needs_no_gradient_of_the_parameters_and_gives_them_back() -> None:
    model, batch, masks, trained = without_dropout(), random_batch("sst", 8), DropoutMasks(0), list[int]()
    logits, parameters = model("sst", batch, masks), list(model.parameters())
    still = parameters[3].requires_grad_(False)
    model.register_forward_pre_hook(lambda *_: trained.append(sum(p.requires_grad for p in parameters)))
    term = smoothness_of(model, replace(WIDE, steps=2)).term("sst", batch, masks, logits)
    assert trained == [0, 0, len(parameters) - 1] and not still.requires_grad
    assert all(parameter.grad is None for parameter in parameters)
    assert torch.autograd.grad(term, parameters[0])[0].any()


def test_a_search_that_fails_gives_the_parameters_back() -> None:
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(torch.OutOfMemoryError), held_still([parameter]):
        raise torch.OutOfMemoryError
    assert parameter.requires_grad


@pytest.mark.parametrize("task", THREE)
def test_with_dropout_the_term_measures_the_perturbation_and_not_the_noise(task: str) -> None:
    model, batch, masks = tiny_model(), random_batch(task, 6), DropoutMasks(5)
    logits = model(task, batch, masks)
    other_draw = TASKS[task].output.divergence(model(task, batch, DropoutMasks(6)), logits).mean().detach()
    assert float(other_draw) > 1e-3
    assert float(smoothness_of(model, replace(PAPER, eps=0.0)).term(task, batch, masks, logits).detach()) == 0
    something = smoothness_of(model, PAPER).term(task, batch, masks, logits)
    assert 0 < float(something.detach()) < 1e-2 * float(other_draw)
    assert any(gradient.any() for gradient in torch.autograd.grad(something, list(model.encoder.layers.parameters())))


def test_the_term_depends_on_the_seed_of_the_masks_and_on_no_global_generator() -> None:
    model, batch = without_dropout(), random_batch("sst", 4)

    def term(seed: int) -> Tensor:
        masks = DropoutMasks(seed)
        return smoothness_of(model, WIDE).term("sst", batch, masks, model("sst", batch, masks))

    torch.manual_seed(0)
    before, first = torch.get_rng_state(), term(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(term(1), first)
    assert not torch.equal(term(2), first)


@pytest.mark.parametrize("task", THREE)
def test_with_dropout_the_proximal_term_is_0_until_the_weights_move(task: str) -> None:
    model, batch, masks = tiny_model(), random_batch(task, 6), DropoutMasks(5)
    term = BregmanProximal(BregmanProximal.Parameters(), model, 10)
    assert not any(value.requires_grad for value in term.state.values())
    assert float(term.term(task, batch, masks, model(task, batch, masks)).detach()) < 1e-9  # rounding
    shaken(model, 0)
    assert float(term.term(task, batch, masks, model(task, batch, masks)).detach()) > 1e-3
