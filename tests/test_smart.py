"""SMART: both terms against a naive computation, the bound on the perturbation, and what the terms must not measure."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from regularizers import BregmanProximal, Smoothness
from scipy.stats import entropy
from torch import Tensor, nn

from bert import DropoutMasks, PackedTokens
from datasets import Batch
from helpers import generator, random_batch, random_tokens, tiny_encoder, tiny_model
from model import MultitaskBert
from smart import ProximalPoint, SmartConfig, ascend, held_still, proximity, smoothness
from tasks import TASKS, task_loss

WIDE = SmartConfig(weight=1.0, eps=0.05, sigma=0.03, eta=0.04)  # large enough for a comparison in float32
PAPER = SmartConfig()


def without_dropout(seed: int = 0) -> MultitaskBert:
    return tiny_model(seed=seed, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


class Spy:
    """A model that keeps the perturbations it was called with."""

    def __init__(self, model: MultitaskBert, task: str, batch: Batch, masks: DropoutMasks) -> None:
        self.model = model
        self.predict: Callable[[Tensor], Tensor] = lambda d: model(task, batch, masks.again(), d)
        self.logits = model(task, batch, masks.again())
        self.seen: list[Tensor] = []
        assert batch.tokens is not None
        self.row_of_token = batch.tokens.row_of_token
        self.divergence = TASKS[task].output.divergence

    def __call__(self, perturbation: Tensor) -> Tensor:
        self.seen.append(perturbation.detach().clone())
        return self.predict(perturbation)

    def term(self, config: SmartConfig, seed: int = 0) -> Tensor:
        return smoothness(self, self.logits, self.divergence, self.row_of_token, 32, config, generator(seed))


# --------------------------------------------------------------------------------------------------- divergences


def test_the_divergence_of_classes_is_the_kl_both_ways() -> None:
    logits, reference = torch.randn(6, 5, generator=generator()) * 2, torch.randn(6, 5, generator=generator(1)) * 2
    p, q = torch.softmax(logits, -1).numpy(), torch.softmax(reference, -1).numpy()
    found = TASKS["sst"].output.divergence(logits, reference)
    assert found.tolist() == pytest.approx((entropy(p, q, axis=1) + entropy(q, p, axis=1)).tolist(), rel=1e-5)


def test_the_divergence_of_one_logit_is_the_bernoulli_kl_both_ways_and_not_0() -> None:
    logits, reference = torch.randn(6, 1, generator=generator()) * 2, torch.randn(6, 1, generator=generator(1)) * 2
    p, q = torch.sigmoid(logits).numpy(), torch.sigmoid(reference).numpy()
    p, q = np.concatenate([p, 1 - p], 1), np.concatenate([q, 1 - q], 1)
    found = TASKS["para"].output.divergence(logits, reference)
    assert found.tolist() == pytest.approx((entropy(p, q, axis=1) + entropy(q, p, axis=1)).tolist(), rel=1e-5)
    assert float(found.min()) > 1e-3


def test_the_divergence_of_numbers_is_the_squared_difference() -> None:
    found = TASKS["sts"].output.divergence(torch.tensor([[1.0], [7.0]]), torch.tensor([[3.0], [6.5]]))
    assert found.tolist() == [4.0, 0.25]


@pytest.mark.parametrize("task", TASKS)
def test_a_divergence_is_symmetric_and_0_for_equal_predictions_only(task: str) -> None:
    output = TASKS[task].output
    first = torch.randn(7, output.num_outputs, generator=generator())
    second = torch.randn(7, output.num_outputs, generator=generator(1))
    assert output.divergence(first, second).shape == (7,)
    assert torch.allclose(output.divergence(first, second), output.divergence(second, first))
    assert not output.divergence(first, first.clone()).any()
    assert (output.divergence(first, second) > 0).all()


@pytest.mark.parametrize("task", TASKS)
def test_a_divergence_keeps_its_digits_for_predictions_that_differ_by_a_ten_thousandth(task: str) -> None:
    output = TASKS[task].output
    first = torch.randn(50, output.num_outputs, generator=generator()).double()
    second = first + 1e-4 * torch.randn(first.shape, generator=generator(1))
    if task == "sst":
        p, q = torch.softmax(first, -1), torch.softmax(second, -1)
        exact = ((p - q) * (p.log() - q.log())).sum(-1)
    elif task == "para":
        exact = ((first.sigmoid() - second.sigmoid()) * (first - second)).squeeze(-1)
    else:
        exact = (first - second).square().squeeze(-1)
    found = output.divergence(first.float(), second.float()).double()
    assert float((found - exact).norm() / exact.norm()) < 1e-2


# ---------------------------------------------------------------------------------------------- the perturbation


@pytest.mark.parametrize("config", [PAPER, WIDE, replace(PAPER, steps=3), replace(PAPER, sigma=1e-3)])
def test_the_perturbation_is_never_larger_than_eps(config: SmartConfig) -> None:
    spy = Spy(tiny_model(), "sst", random_batch("sst", 5), DropoutMasks(0))
    spy.term(config)
    assert len(spy.seen) == config.steps + 1
    for perturbation in spy.seen[1:]:
        assert float(perturbation.abs().max()) <= config.eps * (1 + 1e-6)
    reached = torch.stack([spy.seen[-1][spy.row_of_token == row].abs().max() for row in range(5)])
    assert torch.allclose(reached, torch.full((5,), config.eps))


def test_the_paper_s_sizes_are_the_default() -> None:
    assert (PAPER.eps, PAPER.sigma, PAPER.eta, PAPER.steps, PAPER.weight) == (1e-5, 1e-5, 1e-3, 1, 1.0)


def test_the_perturbation_starts_normal_with_deviation_sigma_for_every_input_embedding() -> None:
    batch = random_batch("sst", 60)
    spy = Spy(tiny_model(), "sst", batch, DropoutMasks(0))
    spy.term(replace(PAPER, sigma=2e-5))
    assert batch.tokens is not None
    assert spy.seen[0].shape == (len(batch.tokens.input_ids), 32)
    assert float(spy.seen[0].std()) == pytest.approx(2e-5, rel=0.03)
    assert float(spy.seen[0].mean()) == pytest.approx(0, abs=1e-6)
    assert float((spy.seen[0].abs() < 2e-5).float().mean()) == pytest.approx(0.683, abs=0.02)


def test_a_step_goes_along_the_gradient_over_its_largest_entry_in_the_row_and_is_projected() -> None:
    config = SmartConfig(eps=0.5, eta=0.4)
    start = torch.tensor([[0.3, -0.3], [0.0, 0.1], [0.2, -0.45]])
    gradient = torch.tensor([[4.0, -1.0], [2.0, 0.0], [1e-6, -2e-6]])
    found = ascend(start, gradient, torch.tensor([0, 0, 1]), 2, config)
    expected = torch.tensor([[0.5, -0.4], [0.2, 0.1], [0.4, -0.5]])  # 0.7 and -0.85 are cut off
    assert torch.allclose(found, expected)


def test_a_step_along_a_zero_gradient_goes_nowhere() -> None:
    start = torch.tensor([[0.3, -0.3], [0.7, 0.1]])
    found = ascend(start, torch.zeros(2, 2), torch.tensor([0, 1]), 2, SmartConfig(eps=0.5))
    assert torch.equal(found, torch.tensor([[0.3, -0.3], [0.5, 0.1]]))


def test_the_perturbation_is_added_to_the_input_embeddings_and_goes_through_the_whole_network() -> None:
    encoder, ids = tiny_encoder(), torch.arange(12).tolist()
    tokens = PackedTokens.from_rows([ids[:5], ids[5:]], [[0] * 5, [0] * 3 + [1] * 4])
    perturbation = torch.randn(12, 32, generator=generator())
    found = encoder(tokens, perturbation=perturbation)
    with torch.no_grad():
        encoder.word_embeddings.weight[:12] += perturbation
    assert torch.allclose(found, encoder(tokens), atol=1e-5)


# ------------------------------------------------------------------------------------------------------- the term


def single_rows(tokens: PackedTokens) -> list[PackedTokens]:
    """Each row of a batch as a batch of its own."""
    ids, types = (
        [part.tolist() for part in values.split(tokens.layout.lengths.tolist())]
        for values in (tokens.input_ids, tokens.token_type_ids)
    )
    return [PackedTokens.from_rows([row], [kind]) for row, kind in zip(ids, types, strict=True)]


def naive_smoothness(model: MultitaskBert, task: str, batch: Batch, config: SmartConfig, start: Tensor) -> Tensor:
    """The term, one row after the other."""
    assert batch.tokens is not None
    divergence, terms = TASKS[task].output.divergence, []
    for tokens, d in zip(single_rows(batch.tokens), start.split(batch.tokens.layout.lengths.tolist()), strict=True):
        row = Batch([0], batch.labels[:1], tokens=tokens)
        logits = model(task, row)
        for _ in range(config.steps):
            d = d.detach().requires_grad_()
            gradient = torch.autograd.grad(divergence(model(task, row, None, d), logits.detach()).sum(), d)[0]
            d = (d + config.eta * gradient / gradient.abs().max()).detach()
            d = torch.maximum(torch.minimum(d, torch.tensor(config.eps)), torch.tensor(-config.eps))
        terms.append(divergence(model(task, row, None, d), logits))
    return torch.cat(terms).mean()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("steps", [1, 2])
def test_the_smoothness_term_and_its_gradient_equal_the_naive_ones(task: str, steps: int) -> None:
    model, batch, masks = without_dropout(), random_batch(task, 6), DropoutMasks(3)
    config = replace(WIDE, steps=steps, weight=2.5)
    parameters = list(model.shared_parameters().values())
    term = Smoothness(model, config).term(task, batch, masks, model(task, batch, masks))
    assert batch.tokens is not None
    start = torch.randn(len(batch.tokens.input_ids), 32, generator=generator(3)) * config.sigma
    expected = 2.5 * naive_smoothness(model, task, batch, config, start)
    assert float(term.detach()) == pytest.approx(float(expected.detach()), rel=1e-3)
    assert float(term.detach()) > 1e-5
    found, wanted = (torch.cat([g.flatten() for g in torch.autograd.grad(t, parameters)]) for t in (term, expected))
    assert float((found - wanted).norm() / wanted.norm()) < 1e-2


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
    found = smoothness(spy, spy.logits, spy.divergence, spy.row_of_token, 32, config, generator(0), parameters)
    assert trained == [len(parameters) - 1] * 3 + [0, 0, len(parameters) - 1] and not still.requires_grad
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(of, parameters[0], retain_graph=True)[0] for of in (found, expected)]
    assert gradients[0].any() and torch.equal(*gradients)


def test_a_search_that_fails_gives_the_parameters_back() -> None:
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(torch.OutOfMemoryError), held_still([parameter]):
        raise torch.OutOfMemoryError
    assert parameter.requires_grad


def test_the_perturbation_raises_the_divergence_above_that_of_its_start() -> None:
    spy = Spy(without_dropout(), "sst", random_batch("sst", 8), DropoutMasks(0))
    config = replace(WIDE, sigma=0.01)
    adversarial = float(spy.term(config))
    assert adversarial > 3 * float(spy.term(replace(config, steps=0)))


@pytest.mark.parametrize("task", TASKS)
def test_with_dropout_the_term_measures_the_perturbation_and_not_the_noise(task: str) -> None:
    model, batch, masks = tiny_model(), random_batch(task, 6), DropoutMasks(5)
    logits = model(task, batch, masks)
    other_draw = TASKS[task].output.divergence(model(task, batch, DropoutMasks(6)), logits).mean()
    assert float(other_draw) > 1e-3
    nothing = Smoothness(model, replace(PAPER, eps=0.0)).term(task, batch, masks, logits)
    assert float(nothing) == 0
    something = Smoothness(model, PAPER).term(task, batch, masks, logits)
    assert 0 < float(something) < 1e-2 * float(other_draw)


def gradient_of(model: MultitaskBert, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("task", TASKS)
def test_the_smoothness_term_reaches_the_parameters_at_the_paper_s_sizes(task: str) -> None:
    model, batch = tiny_model(), random_batch(task, 6)

    def loss(with_term: bool) -> Tensor:
        masks = DropoutMasks(0)
        logits = model(task, batch, masks)
        plain = task_loss(TASKS[task], logits, batch.labels)
        return plain + Smoothness(model, PAPER).term(task, batch, masks, logits) if with_term else plain

    off, again, on = (gradient_of(model, loss(with_term)) for with_term in (False, False, True))
    assert all(torch.equal(off[name], again[name]) for name in off)
    assert on.keys() == off.keys()
    assert any(not torch.equal(on[name], off[name]) for name in on if name.startswith("encoder.layers"))
    assert not torch.equal(on[f"heads.{task}.output.weight"], off[f"heads.{task}.output.weight"])


def test_looking_for_the_perturbation_leaves_no_gradient_behind() -> None:
    model, batch, masks = tiny_model(), random_batch("sst", 4), DropoutMasks(0)
    Smoothness(model, PAPER).term("sst", batch, masks, model("sst", batch, masks))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_term_depends_on_the_seed_of_the_masks_and_on_no_global_generator() -> None:
    model, batch = without_dropout(), random_batch("sst", 4)

    def term(seed: int) -> Tensor:
        masks = DropoutMasks(seed)
        return Smoothness(model, WIDE).term("sst", batch, masks, model("sst", batch, masks))

    torch.manual_seed(0)
    before, first = torch.get_rng_state(), term(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(term(1), first)
    assert not torch.equal(term(2), first)


def test_the_smoothness_term_has_no_state() -> None:
    assert Smoothness(tiny_model(), PAPER).state() == {}


# ------------------------------------------------------------------------------------------------ proximal point


def moved(model: MultitaskBert, seed: int) -> None:
    noise = generator(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.05)


@pytest.mark.parametrize(("num_steps", "first"), [(100, 10), (50, 5), (25, 3), (9, 1)])
def test_the_average_is_099_in_the_first_tenth_of_the_steps_and_0999_after(num_steps: int, first: int) -> None:
    model, average = torch.nn.Linear(1, 1).double(), torch.nn.Linear(1, 1).double()
    point = ProximalPoint(model, average, num_steps)
    with torch.no_grad():
        model.weight.fill_(1.0)
    for step in range(num_steps):
        with torch.no_grad():
            average.weight.zero_()
        point.update(step)
        assert float(average.weight) == pytest.approx(0.01 if step < first else 0.001), step


def test_the_average_follows_the_model_step_by_step() -> None:
    model = tiny_model()
    term = BregmanProximal(model, 1.0, 20)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(6):
        moved(model, step)
        term.after_step(step)
        beta = 0.99 if step < 2 else 0.999
        expected = {name: beta * expected[name] + (1 - beta) * p.detach() for name, p in model.named_parameters()}
    for name, parameter in term.average.named_parameters():
        assert torch.allclose(parameter, expected[name], atol=1e-6), name
        assert not parameter.requires_grad


def test_the_average_is_a_copy_that_moves_with_updates_only() -> None:
    model = tiny_model()
    term = BregmanProximal(model, 1.0, 10)
    before = {name: value.clone() for name, value in term.average.state_dict().items()}
    moved(model, 0)
    assert all(torch.equal(value, before[name]) for name, value in term.average.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def naive_divergence(task: str) -> Callable[[Tensor, Tensor], Tensor]:
    def classes(first: Tensor, second: Tensor) -> Tensor:
        p, q = torch.softmax(first, -1), torch.softmax(second, -1)
        return (p * (p / q).log() + q * (q / p).log()).sum(-1)

    if task == "sts":
        return lambda first, second: ((first - second) ** 2).squeeze(-1)
    if task == "para":
        return lambda first, second: classes(torch.cat([first, 0 * first], -1), torch.cat([second, 0 * second], -1))
    return classes


@pytest.mark.parametrize("task", TASKS)
def test_the_proximal_term_and_its_gradient_equal_the_naive_ones(task: str) -> None:
    model, batch, masks = without_dropout(), random_batch(task, 6), DropoutMasks(0)
    term = BregmanProximal(model, 1.5, 10)
    reference = model(task, batch).detach().clone()
    moved(model, 0)
    found = term.term(task, batch, masks, model(task, batch, masks))
    expected = 1.5 * naive_divergence(task)(model(task, batch), reference).mean()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-3)
    assert float(found.detach()) > 1e-3
    first, second = gradient_of(model, found), gradient_of(model, expected)
    assert first.keys() == second.keys()
    for name, value in second.items():
        assert torch.allclose(first[name], value, atol=1e-3 * float(value.abs().max()) + 1e-6), name


@pytest.mark.parametrize("task", TASKS)
def test_with_dropout_the_proximal_term_is_0_until_the_weights_move(task: str) -> None:
    model, batch, masks = tiny_model(), random_batch(task, 6), DropoutMasks(5)
    term = BregmanProximal(model, 1.0, 10)
    assert float(term.term(task, batch, masks, model(task, batch, masks))) == 0
    moved(model, 0)
    assert float(term.term(task, batch, masks, model(task, batch, masks))) > 0


def test_the_reference_has_no_gradient() -> None:
    logits, reference = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    proximity(logits, reference, TASKS["sst"].output.divergence).backward()
    assert logits.grad is not None and logits.grad.any()
    assert reference.grad is None


def test_the_average_of_a_checkpoint_is_taken_over() -> None:
    model = tiny_model()
    first, second = BregmanProximal(model, 1.0, 10), BregmanProximal(model, 1.0, 10)
    moved(model, 0)
    first.after_step(0)
    state = {name: value.clone() for name, value in first.state().items()}
    assert set(state) == set(model.state_dict())
    second.load_state(state)
    moved(model, 1)
    for term in (first, second):
        term.after_step(1)
    for one, other in zip(first.average.parameters(), second.average.parameters(), strict=True):
        assert torch.equal(one, other)


def test_rows_count_equally_however_long_they_are() -> None:
    tokens = random_tokens(5, 1)
    assert len(set(tokens.layout.lengths.tolist())) > 2
    batch = Batch(list(range(5)), torch.zeros(5), tokens=tokens)
    spy = Spy(without_dropout(), "sts", batch, DropoutMasks(0))
    of_rows = spy.divergence(spy.predict(spy.seen[-1]), spy.logits) if spy.term(WIDE) is not None else None
    assert of_rows is not None and of_rows.shape == (5,)
    assert float(spy.term(WIDE)) == pytest.approx(float(of_rows.mean()), rel=1e-5)
