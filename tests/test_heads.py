"""Heads against their formula."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from datasets import Batch
from heads import HEADS, Encoded, LinearHead, LstmHead, MlpHead, Reads, RoutingHead, absorb_scale
from helpers import (
    RecordedMasks,
    generator,
    outputs,
    pack,
    random_batch,
    randomize_vectors,
    shaken,
    tiny_config,
    tiny_encoder,
    tiny_model,
)
from model import FrozenEncoder, Layout, MultitaskBert
from ops import DropoutMasks, Packing
from pal import ProjectedAttention
from parameters import Choice, NoParameters, parameters_type
from routing import Routing

LSTM = Choice("lstm", LstmHead.Parameters(6))
ROUTING = Choice("routing", RoutingHead.Parameters(5, 3))
LENGTHS = [3, 1, 9, 4, 9, 2]


@pytest.mark.parametrize(("name", "num_hidden"), [("linear", 0), ("mlp", 1), ("mlp", 3)])
def test_a_head_is_dropout_and_linear_behind_its_hidden_layers(name: str, num_hidden: int) -> None:
    parameters = MlpHead.Parameters(num_hidden) if num_hidden else NoParameters()
    head = HEADS[name](parameters, tiny_config(hidden_dropout_prob=0.4), 40, 5)
    assert isinstance(head, torch.nn.Module)
    randomize_vectors(head, 3)
    pooled, masks = torch.randn(7, 40, generator=generator(1)), RecordedMasks(2)
    logits = head(pooled, masks)
    assert [prob for prob, _ in masks.drawn] == [0.4] * (num_hidden + 1)
    tensors = list(head.parameters())  # weight, bias of each layer, from the input on
    widths = [40, *[32] * num_hidden, 5]
    assert [tuple(weight.shape) for weight in tensors[::2]] == list(zip(widths[1:], widths, strict=False))
    for found, factors in ((logits, [mask.view(7, -1) for _, mask in masks.drawn]), (head(pooled, None), None)):
        expected = pooled
        for i in range(num_hidden + 1):
            expected = expected.clamp(min=0) if i else expected
            expected = (expected * factors[i] if factors else expected) @ tensors[2 * i].T + tensors[2 * i + 1]
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", [name for name, head in HEADS.items() if head.reads == Reads.POOLED])
def test_a_head_that_absorbs_a_scale_gives_for_features_what_it_gave_for_standardized_ones(name: str) -> None:
    parameters = MlpHead.Parameters(2) if name == "mlp" else parameters_type(HEADS[name])()
    head = HEADS[name](parameters, tiny_config(), 40, 5)
    assert isinstance(head, torch.nn.Module)
    randomize_vectors(head, 3)
    features, scale = torch.randn(7, 40, generator=generator(1)), torch.rand(40, generator=generator(2)) + 0.1
    shift = torch.randn(40, generator=generator(3))
    expected = head((features - shift) / scale, None)
    head.absorb(shift, scale)
    torch.testing.assert_close(head(features, None), expected, rtol=1e-4, atol=1e-4)


def test_a_head_whose_absorb_does_not_fit_is_refused() -> None:
    class Unfit(LinearHead):
        def forward(self, pooled: Tensor, masks: Any) -> Tensor:
            return super().forward(nn.functional.normalize(pooled), masks)

    features, moments = torch.randn(7, 40, generator=generator(1)) + 3, (torch.full((40,), 3.0), torch.ones(40))
    for kind in (LinearHead, Unfit):
        head = kind(NoParameters(), tiny_config(), 40, 5)
        randomize_vectors(head, 3)
        with pytest.raises(ValueError, match="gives other logits") if kind is Unfit else nullcontext():
            absorb_scale(head, features, *moments)


# ------------------------------------------------------------------------------------------ on hidden states


def last_states(sizes: list[Any], states: Tensor) -> Tensor:
    """torch's bidirectional LSTM of these parameters on one row (L, D): both last states (2 E,)."""
    lstm = nn.LSTM(states.shape[1], 6, bidirectional=True)
    for name, one, other in sizes:
        getattr(lstm, name).data, getattr(lstm, f"{name}_reverse").data = one, other
    return lstm(states)[1][0].flatten()  # type: ignore[no-any-return]


@pytest.mark.parametrize("is_split", [False, True])
def test_lstm_states_are_those_of_torch_s_on_each_sequence_alone(is_split: bool) -> None:
    head = LstmHead(LSTM.parameters, tiny_config(hidden_dropout_prob=0.4), 32 * (4 if is_split else 1), 5)
    head.initialize(0.2, generator(1))
    pairs = zip(head.forwards.named_parameters(), head.backwards.parameters(), strict=True)
    weights = [(name, one.data, other.data) for (name, one), other in pairs]
    packing = Packing.of(LENGTHS)
    states = torch.randn(sum(LENGTHS) + 3, 32, generator=generator(2), requires_grad=True)  # three belong to no row
    pooled = torch.randn(3, 128, generator=generator(3)) if is_split else torch.randn(6, 32, generator=generator(3))
    masks = RecordedMasks(4)
    found = head(Encoded(pooled, [states], packing, is_split), masks)

    rows = states[: sum(LENGTHS)].split(LENGTHS)
    last = torch.stack([last_states(weights, row) for row in rows])  # (6, 12)
    if is_split:
        u, v = last[::2], last[1::2]
        last = torch.cat([u, v, (u - v).abs(), u * v], 1)
    features = torch.cat([pooled, last], 1)
    ((prob, mask),) = masks.drawn
    expected = (features * mask.view(features.shape)) @ head.output.weight.T + head.output.bias
    assert prob == 0.4
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    gradients = [torch.autograd.grad(of.square().sum(), states, retain_graph=True)[0] for of in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)


def naive_routing(routing: Routing, inputs: Tensor) -> Tensor:
    """The paper's algorithm on one row (I, D) -> (J, E), as its equations stand, one number at a time."""
    num_inputs, num_outputs = len(inputs), routing.num_outputs
    p: dict[str, Tensor] = dict(routing.named_parameters())
    for name in ("vote_bias", "prediction_bias"):
        p[name] = p[name].view(num_outputs, -1)
    p["score_bias"] = p["score_bias"].view(-1, num_outputs)
    scaled = inputs / num_inputs**0.5
    kinds = [0] * num_inputs if "benefit" not in p else list(range(num_inputs))
    activation, votes, benefit, cost = [], [], [], []
    for i, kind in enumerate(kinds):
        activation.append(1 / (1 + torch.exp(-(p["activation_weight"][kind] @ scaled[i] + p["activation_bias"][kind]))))
        votes.append([])
        benefit.append([])
        cost.append([])
        for j in range(num_outputs):
            votes[i].append((p["vote_factor"][j] * scaled[i]) @ p["vote_matrix"] + p["vote_bias"][j])  # (E,)
            if "benefit" in p:
                benefit[i].append(p["benefit"][i, j])
                cost[i].append(p["cost"][i, j])
            else:
                benefit[i].append(p["benefit_of.weight"][j] @ inputs[i] + p["benefit_of.bias"][j])
                cost[i].append(p["cost_of.weight"][j] @ inputs[i] + p["cost_of.bias"][j])
    outputs: list[Tensor] = []
    for iteration in range(routing.iterations):
        after = [torch.zeros_like(votes[0][0]) for _ in range(num_outputs)]
        for i, kind in enumerate(kinds):
            shares = [torch.tensor(1 / num_outputs, dtype=torch.float64)] * num_outputs
            if iteration:
                scores = []
                for j in range(num_outputs):
                    predicted = (outputs[j] @ p["prediction_matrix"]) * p["prediction_factor"][j] + p[
                        "prediction_bias"
                    ][j]
                    score = p["score_factor"][kind, j] * (inputs[i] @ predicted) + p["score_bias"][kind, j]
                    scores.append(1 / (1 + torch.exp(-score)))  # exp of the logarithm of the logistic function
                shares = [score / sum(scores) for score in scores]
            for j in range(num_outputs):
                used = activation[i] * shares[j]
                ignored = activation[i] - used
                after[j] = after[j] + (benefit[i][j] * used - cost[i][j] * ignored) * votes[i][j]
        if len(after[0]) > 1:
            after = [(x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() for x in after]
        outputs = after
    return torch.stack(outputs)


def random_routing(module: nn.Module) -> None:
    noise = generator(8)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.7, generator=noise)


@pytest.mark.parametrize(
    ("num_inputs", "output_size", "iterations"), [(None, 4, 3), (7, 4, 2), (7, 1, 3), (None, 4, 1)]
)
def test_routing_is_the_paper_s_algorithm(num_inputs: int | None, output_size: int, iterations: int) -> None:
    routing = Routing(num_inputs, 3, 6, output_size, iterations).double()
    random_routing(routing)
    inputs = torch.randn(2, 7, 6, generator=generator(1), dtype=torch.float64)
    expected = torch.stack([naive_routing(routing, row) for row in inputs])
    torch.testing.assert_close(routing(inputs), expected, rtol=0, atol=1e-6)
    assert expected.std() > 0.1


@pytest.mark.parametrize("num_outputs", [5, 1])
def test_the_routing_head_routes_the_tokens_and_layers_of_each_row_alone(num_outputs: int) -> None:
    head = RoutingHead(ROUTING.parameters, tiny_config(), 32, num_outputs).double()
    random_routing(head)
    draw = generator(2)
    layers = [torch.randn(sum(LENGTHS) + 4, 32, generator=draw, dtype=torch.float64) for _ in range(3)]
    found = head(Encoded(None, layers, Packing.of(LENGTHS), False), None)
    start = 0
    for row, length in enumerate(LENGTHS):
        capsules = []
        for token in range(start, start + length):
            for depth, states in enumerate(layers):
                x = states[token]
                x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
                capsules.append(x * head.norm_weight.view(3, 32)[depth] + head.norm_bias.view(3, 32)[depth])
        routed = torch.stack(capsules)
        for routing in head.routings:
            assert isinstance(routing, Routing)
            routed = naive_routing(routing, routed)
        expected = routed[:, 0] if num_outputs == 5 else routed[:1, 0] - routed[1:, 0]
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-6)
        start += length


def test_fresh_routing_keeps_sizes_and_depends_on_the_generator_only() -> None:
    first, second = (tiny_model(("sst", "sts"), head=ROUTING, seed=1) for _ in range(2))
    for (name, one), other in zip(first.heads.named_parameters(), second.heads.parameters(), strict=True):
        assert torch.equal(one, other) and one.isfinite().all()
        assert ("bias" in name) == (not one.any()), name
    routing = Routing(None, 64, 100, 100, 2)
    routing.initialize(generator())
    inputs = torch.randn(4, 50, 100, generator=generator(1))
    votes = torch.einsum("bid,jd->bijd", inputs, routing.vote_factor) @ routing.vote_matrix
    assert votes.std().item() == pytest.approx(2, rel=0.1)


# ------------------------------------------------------------------------------------------------- in the model


@pytest.mark.parametrize(("head", "num_kept"), [(LSTM, 1), (ROUTING, 3)])
@pytest.mark.parametrize("pooling", ["pooler", "mean"])
def test_a_prediction_does_not_depend_on_the_rows_beside_it_and_no_more_is_kept_than_is_read(
    head: Choice, num_kept: int, pooling: str
) -> None:
    pal = Choice("pal", ProjectedAttention.Parameters())
    model = shaken(tiny_model(adapter=pal, head=head, copied=1, pooling=pooling))
    together = random_batch("para", 9)
    read = model.read("para", together)
    assert isinstance(read, Encoded) and len(read.hidden_states) == num_kept
    assert (read.pooled is None) == (head == ROUTING)
    assert together.tokens is not None
    lengths = together.tokens.packing.lengths.tolist()
    rows, types = (
        part[: sum(lengths)].split(lengths) for part in (together.tokens.input_ids, together.tokens.token_type_ids)
    )
    for i, expected in enumerate(model("para", together)):
        alone = Batch(torch.zeros(1), tokens=pack([rows[i].tolist()], [types[i].tolist()]))
        torch.testing.assert_close(model("para", alone)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", [LSTM, ROUTING])
def test_a_frozen_encoder_feeds_a_head_without_dropout_and_without_gradients(head: Choice) -> None:
    model, batch = shaken(tiny_model(head=head, hidden_dropout_prob=0.5)), random_batch("sst", 5)
    frozen = FrozenEncoder(model)
    torch.testing.assert_close(frozen("sst", batch), model("sst", batch), rtol=0, atol=1e-5)
    masked = frozen("sst", batch, DropoutMasks(4))
    expected = model.predict("sst", model.read("sst", batch), DropoutMasks(4))
    torch.testing.assert_close(masked, expected, rtol=0, atol=1e-5)
    masked.square().sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == set(model.head_parameters("sst"))


def test_a_pooler_is_only_shared_where_a_head_reads_it() -> None:
    mixed = {"sst": ROUTING, "sts": LSTM}
    for heads, is_read in ((mixed, True), (dict.fromkeys(mixed, ROUTING), False)):
        model = MultitaskBert(tiny_encoder(), Layout(heads), generator())
        assert ("encoder.pooler.weight" in model.shared_parameters()) == is_read and not model.shares_passes


def test_routing_reads_one_sequence_and_an_lstm_two_of_a_split_row() -> None:
    with pytest.raises(
        ValueError, match=r"^--head routing: routes the tokens of one sequence, expected --pairs cross$"
    ):
        tiny_model(head=ROUTING, pairs="siamese")
    assert outputs(tiny_model(("sst",), head=ROUTING, pairs="siamese"), ["sst"]).isfinite().all()
    assert outputs(tiny_model(head=LSTM, pairs="siamese")).isfinite().all()
