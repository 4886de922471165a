"""SMART: divergences, the bound on the perturbation, and what the terms must not measure.

(Both terms in training, against a naive computation: test_wiring.py.)
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from datasets import Batch
from helpers import generator, random_batch, shaken, tiny_model
from model import MultitaskBert
from ops import DropoutMasks
from smart import BregmanProximal, Smoothness, ascend, held_still, proximity, smoothness
from tasks import TASKS

PAPER = Smoothness.Parameters()
WIDE = Smoothness.Parameters(eps=0.05, sigma=0.03, eta=0.04)  # large enough for a comparison in float32


def without_dropout() -> MultitaskBert:
    model: MultitaskBert = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return model


def smoothness_of(model: MultitaskBert, config: Smoothness.Parameters) -> Smoothness:
    return Smoothness(config, model, 10)


def bregman_of(model: MultitaskBert, weight: float = 1.0, num_steps: int = 10) -> BregmanProximal:
    return BregmanProximal(BregmanProximal.Parameters(weight), model, num_steps)


class Spy:
    """A model that keeps the perturbations it was called with."""

    def __init__(self, model: MultitaskBert, task: str, batch: Batch, masks: DropoutMasks) -> None:
        self.model = model
        self.predict: Callable[[Tensor], Tensor] = lambda d: model(task, batch, masks.again(), d)
        self.logits = model(task, batch, masks.again())
        self.perturbations: list[Tensor] = []
        assert batch.tokens is not None
        self.row_of_token = batch.tokens.row_of_token
        self.divergence = TASKS[task].output.divergence

    def __call__(self, perturbation: Tensor) -> Tensor:
        self.perturbations.append(perturbation.detach().clone())
        return self.predict(perturbation)

    def term(self, config: Smoothness.Parameters) -> Tensor:
        return smoothness(self, self.logits, self.divergence, self.row_of_token, 32, config, generator())


def naive_divergence(task: str) -> Callable[[Tensor, Tensor], Tensor]:
    def kl_both_ways(first: Tensor, second: Tensor) -> Tensor:
        p, q = torch.softmax(first, -1), torch.softmax(second, -1)
        return (p * (p / q).log() + q * (q / p).log()).sum(-1)

    def of_one_logit(first: Tensor, second: Tensor) -> Tensor:
        return kl_both_ways(torch.cat([first, 0 * first], -1), torch.cat([second, 0 * second], -1))

    def of_scores(first: Tensor, second: Tensor) -> Tensor:
        return ((first - second) ** 2).squeeze(-1)

    return {"sst": kl_both_ways, "para": of_one_logit, "sts": of_scores}[task]


@pytest.mark.parametrize("task", TASKS)
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


@pytest.mark.parametrize("config", [PAPER, WIDE, replace(PAPER, steps=3), replace(PAPER, sigma=1e-3)])
def test_the_perturbation_is_never_larger_than_eps(config: Smoothness.Parameters) -> None:
    spy = Spy(tiny_model(), "sst", random_batch("sst", 5), DropoutMasks(0))
    spy.term(config)
    assert len(spy.perturbations) == config.steps + 1
    for perturbation in spy.perturbations[1:]:
        assert float(perturbation.abs().max()) <= config.eps * (1 + 1e-6)
    reached = torch.stack([spy.perturbations[-1][spy.row_of_token == row].abs().max() for row in range(5)])
    assert torch.allclose(reached, torch.full((5,), config.eps))


def test_the_perturbation_starts_normal_with_deviation_sigma_and_the_paper_s_sizes_are_the_default() -> None:
    assert (PAPER.eps, PAPER.sigma, PAPER.eta, PAPER.steps, PAPER.weight) == (1e-5, 1e-5, 1e-3, 1, 1.0)
    assert BregmanProximal.Parameters().weight == 1.0
    spy = Spy(tiny_model(), "sst", random_batch("sst", 60), DropoutMasks(0))
    spy.term(replace(PAPER, sigma=2e-5))
    start = spy.perturbations[0]
    assert start.shape == (len(spy.row_of_token), 32)
    assert float(start.std()) == pytest.approx(2e-5, rel=0.03)
    assert float(start.mean()) == pytest.approx(0, abs=1e-6)
    assert float((start.abs() < 2e-5).float().mean()) == pytest.approx(0.683, abs=0.02)


def test_a_step_goes_along_the_gradient_over_its_largest_entry_in_the_row_and_is_projected() -> None:
    config = Smoothness.Parameters(eps=0.5, eta=0.4)
    start = torch.tensor([[0.3, -0.3], [0.0, 0.1], [0.2, -0.45], [0.7, 0.1]])
    gradient = torch.tensor([[4.0, -1.0], [2.0, 0.0], [1e-6, -2e-6], [0.0, 0.0]])
    found = ascend(start, gradient, torch.tensor([0, 0, 1, 2]), 3, config)
    expected = torch.tensor([[0.5, -0.4], [0.2, 0.1], [0.4, -0.5], [0.5, 0.1]])  # 0.7 and -0.85 are cut off
    assert torch.allclose(found, expected)


def test_the_search_for_the_perturbation_needs_no_gradient_of_the_parameters_and_gives_them_back() -> None:
    spy = Spy(without_dropout(), "sst", random_batch("sst", 8), DropoutMasks(0))
    parameters = list(spy.model.parameters())
    still = parameters[3].requires_grad_(False)
    trained: list[int] = []
    predict = spy.predict

    def watched(perturbation: Tensor) -> Tensor:
        trained.append(sum(parameter.requires_grad for parameter in parameters))
        return predict(perturbation)

    spy.predict = watched
    config = replace(WIDE, steps=2)
    expected = spy.term(config)
    found = smoothness(spy, spy.logits, spy.divergence, spy.row_of_token, 32, config, generator(), parameters)
    assert trained == [len(parameters) - 1] * 3 + [0, 0, len(parameters) - 1] and not still.requires_grad
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(of, parameters[0], retain_graph=True)[0] for of in (found, expected)]
    assert gradients[0].any() and torch.equal(*gradients)
    assert all(parameter.grad is None for parameter in parameters)


def test_a_search_that_fails_gives_the_parameters_back() -> None:
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(torch.OutOfMemoryError), held_still([parameter]):
        raise torch.OutOfMemoryError
    assert parameter.requires_grad


def test_the_perturbation_raises_the_divergence_above_that_of_its_start() -> None:
    spy = Spy(without_dropout(), "sst", random_batch("sst", 8), DropoutMasks(0))
    config = replace(WIDE, sigma=0.01)
    assert float(spy.term(config).detach()) > 3 * float(spy.term(replace(config, steps=0)).detach())


@pytest.mark.parametrize("task", TASKS)
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


@pytest.mark.parametrize(("num_steps", "first"), [(100, 10), (50, 5), (25, 3), (9, 1)])
def test_the_average_is_099_in_the_first_tenth_of_the_steps_and_0999_after(num_steps: int, first: int) -> None:
    model = tiny_model()
    term = bregman_of(model, num_steps=num_steps)
    before = {name: value.clone() for name, value in term.state.items()}
    shaken(model, 0)
    assert all(torch.equal(value, before[name]) for name, value in term.state.items())
    assert not any(value.requires_grad for value in term.state.values())
    for step in range(num_steps):
        beta = 0.99 if step < first else 0.999
        expected = {n: beta * term.state[n] + (1 - beta) * p.detach() for n, p in model.named_parameters()}
        term.after_step(step)
        assert [n for n, value in term.state.items() if not torch.allclose(value, expected[n], atol=1e-7)] == [], step


@pytest.mark.parametrize("task", TASKS)
def test_with_dropout_the_proximal_term_is_0_until_the_weights_move_and_its_reference_has_no_gradient(
    task: str,
) -> None:
    model, batch, masks = tiny_model(), random_batch(task, 6), DropoutMasks(5)
    term = bregman_of(model)
    assert float(term.term(task, batch, masks, model(task, batch, masks)).detach()) < 1e-9  # rounding
    shaken(model, 0)
    assert float(term.term(task, batch, masks, model(task, batch, masks)).detach()) > 1e-3
    logits, reference = (torch.randn(3, TASKS[task].output.num_outputs, requires_grad=True) for _ in range(2))
    proximity(logits, reference, TASKS[task].output.divergence).backward()
    assert logits.grad is not None and logits.grad.any() and reference.grad is None
