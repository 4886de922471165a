"""Projected attention layers: the layer with its task term against plain torch, sizes, and what a step moves."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from bert import Bert, BertConfig, Uninitialized, initialize
from helpers import (
    THREE,
    generator,
    random_batch,
    random_tokens,
    randomize_vectors,
    tiny_config,
    tiny_encoder,
    tiny_model,
)
from model import MultitaskBert
from ops import DropoutMasks, PackedTokens
from pal import ProjectedAttention, adapter_sizes
from parameters import Choice
from tasks import TASKS

Parameters = ProjectedAttention.Parameters
ATTENTION, LOW_RANK = Parameters("attention", 12, 3, 3), Parameters("low_rank", 5, 1, 3)
TOP, TOP_LOW_RANK = Parameters("attention", 12, 3, 1), Parameters("low_rank", 5, 1, 2)
KINDS = pytest.mark.parametrize(
    "parameters", [ATTENTION, LOW_RANK, TOP, TOP_LOW_RANK], ids=lambda p: f"{p.kind}-{p.layers}"
)


def pal_model(parameters: ProjectedAttention.Parameters | None) -> MultitaskBert:
    return tiny_model(adapter=None if parameters is None else Choice("pal", parameters), num_hidden_layers=3)


def adapter_of(model: MultitaskBert, task: str) -> ProjectedAttention:
    adapter = model.adapters[task]
    assert isinstance(adapter, ProjectedAttention)
    return adapter


def trained(adapter: ProjectedAttention) -> ProjectedAttention:
    """Random numbers everywhere, as after training."""
    initialize(adapter, 0.3, generator(7))
    randomize_vectors(adapter, 7)
    return adapter


def rows_of(tokens: PackedTokens, values: Tensor) -> Sequence[Tensor]:
    """Of (N, ...) the part of each row."""
    return list(values[: tokens.num_tokens].split(tokens.packing.lengths.tolist()))


# ---------------------------------------------------------------------------------------------- the plain formula


def plain_attention(qkv: nn.Linear, states: Tensor, num_heads: int) -> Tensor:
    """Multi-head attention without an output matrix, over one row (L, D)."""
    size = states.shape[1]
    heads = zip(*(part.split(size // num_heads, 1) for part in qkv(states).split(size, 1)), strict=True)
    return torch.cat([torch.softmax(q @ k.T / math.sqrt(size // num_heads), -1) @ v for q, k, v in heads], 1)


def plain_encoder(encoder: Bert, adapter: Any, parameters: Any, ids: list[int], types: list[int]) -> Tensor:
    """Hidden states (L, D) of one row: LN(h' + FFN(h') + TS(h)), h' = LN(h + MHA(h)); TS(h) = V_D g(V_E h)."""
    h = encoder.word_embeddings.weight[ids] + encoder.token_type_embeddings.weight[types]
    h = encoder.embedding_norm(h + encoder.position_embeddings.weight[: len(ids)])
    layers: Any = encoder.layers
    for number, layer in enumerate(layers):
        attended = layer.attention_output(plain_attention(layer.qkv, h, encoder.config.num_attention_heads))
        between = layer.attention_norm(h + attended)
        total = between + layer.output(F.gelu(layer.intermediate(between)))
        place = number - (len(layers) - parameters.layers) if parameters else -1
        if place >= 0 and parameters.kind == "attention":
            total = total + adapter.up[0](plain_attention(adapter.qkv[place], adapter.down[0](h), parameters.heads))
        elif place >= 0:
            total = total + adapter.up[place](adapter.down[place](h))
        h = layer.output_norm(total)
    return h  # type: ignore[no-any-return]


@KINDS
def test_the_task_term_enters_at_the_final_norm_of_each_adapted_layer(
    parameters: ProjectedAttention.Parameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many tokens belong to no row."""
    encoder = tiny_encoder(num_hidden_layers=3)
    adapter = trained(ProjectedAttention(parameters, encoder.config))
    for multiple in (1, 7, 32):
        monkeypatch.setattr(ops.packed, "rows_multiple", lambda *_, multiple=multiple: multiple)
        tokens = random_tokens(6, 2)
        rows = [rows_of(tokens, of) for of in (encoder(tokens, adapter=adapter), encoder(tokens))]
        ids, types = (rows_of(tokens, of) for of in (tokens.input_ids, tokens.token_type_ids))
        for row, without, *columns in zip(*rows, ids, types, strict=True):
            lists = [column.tolist() for column in columns]
            assert torch.allclose(row, plain_encoder(encoder, adapter, parameters, *lists), atol=1e-5)
            assert torch.allclose(without, plain_encoder(encoder, None, None, *lists), atol=1e-5)
            assert not torch.allclose(row, without, atol=1e-2)


# --------------------------------------------------------------------------------------------- fresh and trained


@KINDS
def test_a_fresh_pal_leaves_the_encoder_output_unchanged(parameters: ProjectedAttention.Parameters) -> None:
    plain, with_pal = pal_model(None), pal_model(parameters)
    for task in THREE:
        batch = random_batch(task, 6)
        assert torch.equal(plain.pooled(task, batch), with_pal.pooled(task, batch))
        assert torch.equal(plain(task, batch), with_pal(task, batch))


@KINDS
def test_only_the_up_projection_of_a_fresh_pal_is_zero(parameters: ProjectedAttention.Parameters) -> None:
    """The tasks start different; projections are shared by the layers, attention is each layer's own."""
    model = pal_model(parameters)
    num_matrices = 2 + parameters.layers if parameters.kind == "attention" else 2 * parameters.layers
    assert sum(parameter.dim() == 2 for parameter in adapter_of(model, "sst").parameters()) == num_matrices
    for name, parameter in model.adapters.named_parameters():
        is_zero = ".up." in name or name.endswith("bias")
        assert bool(parameter.any()) != is_zero, name
        if not is_zero and parameter.numel() > 100:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.3)
    first, second = (adapter_of(model, task).down[0].weight for task in ("sst", "para"))
    assert not torch.equal(first, second)  # type: ignore[arg-type]


@KINDS
@pytest.mark.parametrize("task", THREE)
def test_a_step_moves_the_task_s_adapter_and_no_other(parameters: ProjectedAttention.Parameters, task: str) -> None:
    model = pal_model(parameters)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fresh = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved: list[set[str]] = []
    for _ in range(2):
        batch = random_batch(task, 8)
        optimizer.zero_grad()
        TASKS[task].output.losses(model(task, batch, DropoutMasks(0)), batch.labels).mean().backward()
        optimizer.step()
        moved.append({name for name, p in model.named_parameters() if not torch.equal(p.detach(), fresh[name])})
    own = set(model.adapter_parameters(task))
    first, second = ({name for name in names if name.startswith("adapters.")} for names in moved)
    assert first == {name for name in own if ".up." in name}
    assert second == own


@KINDS
def test_each_task_reads_through_its_own_adapter(parameters: ProjectedAttention.Parameters) -> None:
    model, batch = pal_model(parameters), random_batch("para", 6)
    before = {task: model.pooled(task, batch) for task in THREE}
    trained(adapter_of(model, "para"))
    for task in THREE:
        assert torch.equal(model.pooled(task, batch), before[task]) != (task == "para")


@KINDS
def test_adapters_enter_the_pooled_output_as_they_enter_all_hidden_states(
    parameters: ProjectedAttention.Parameters,
) -> None:
    """In value and in the gradients of the adapters."""
    model, tokens = pal_model(parameters), random_tokens(7, 4)
    adapter = trained(adapter_of(model, "sst"))
    whole = model.encoder(tokens, adapter=adapter)[tokens.first_tokens]
    first = model.encoder(tokens, adapter=adapter, first_only=True)
    torch.testing.assert_close(first, whole, rtol=0, atol=1e-5)
    expected, found = (torch.autograd.grad((of**3).sum(), list(adapter.parameters())) for of in (whole, first))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_attention_of_an_adapter_has_the_dropout_of_the_encoder_s_attention() -> None:
    tokens = random_tokens(4)
    states = torch.randn(len(tokens.input_ids), 32, generator=generator())
    for prob in (0.0, 0.5):
        config = tiny_config(num_hidden_layers=3, attention_probs_dropout_prob=prob, hidden_dropout_prob=0.3)
        adapter = trained(ProjectedAttention(ATTENTION, config))
        plain = adapter(0, states, tokens.packing, None)
        first, again, other = (adapter(0, states, tokens.packing, DropoutMasks(seed)) for seed in (1, 1, 2))
        assert plain is not None and first is not None and again is not None and other is not None
        assert torch.equal(first, again)
        assert torch.allclose(first, plain) == torch.equal(first, other) == (prob == 0)


# ---------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(("kind", "size", "tolerance"), [("attention", 204, 0.005), ("low_rank", 100, 0.01)])
def test_eight_tasks_make_bert_base_1_13_times_as_large(kind: str, size: int, tolerance: float) -> None:
    with Uninitialized():
        encoder, adapter = Bert(BertConfig()), ProjectedAttention(Parameters(kind), BertConfig())
    assert adapter.down[0].out_features == size and adapter.first_layer == 0
    counts = [sum(p.numel() for p in module.parameters()) for module in (encoder, adapter)]
    assert 1 + 8 * counts[1] / counts[0] == pytest.approx(1.13, abs=tolerance)


@pytest.mark.parametrize(
    ("hidden", "heads", "size", "num_heads", "low_rank"),
    [(768, 12, 204, 12, 100), (1024, 16, 272, 16, 133), (384, 6, 102, 6, 50), (100, 5, 34, 2, 13), (64, 1, 17, 1, 8)],
)
def test_default_sizes_follow_the_hidden_size_and_given_ones_are_kept(
    hidden: int, heads: int, size: int, num_heads: int, low_rank: int
) -> None:
    config = tiny_config(hidden_size=hidden, num_attention_heads=heads)
    assert adapter_sizes(Parameters(), config) == (size, num_heads)
    assert adapter_sizes(Parameters("low_rank"), config)[0] == low_rank
    config = tiny_config(hidden_size=96, num_attention_heads=3)
    assert adapter_sizes(Parameters(size=24, heads=6), config) == (24, 6)
    assert adapter_sizes(Parameters(size=9), config) == (9, 1)  # two heads would not fit
    assert adapter_sizes(Parameters(heads=3), config) == (51, 3)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (Parameters(size=32), "--pal_size 32: expected 1 to 31, less than the hidden size"),
        (Parameters(heads=2), "--pal_size 34: expected 1 to 31"),
        (Parameters(size=12, heads=5), "--pal_size 12: not a multiple of --pal_heads 5"),
        (Parameters(size=12, layers=4), "--pal_layers 4: the encoder has 3 layers"),
    ],
)
def test_sizes_that_do_not_fit_the_encoder_are_refused(parameters: ProjectedAttention.Parameters, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProjectedAttention(parameters, tiny_config(num_hidden_layers=3))


@KINDS
def test_an_adapter_always_has_the_width_of_its_encoder(parameters: ProjectedAttention.Parameters) -> None:
    for hidden in (32, 48):
        adapter = ProjectedAttention(parameters, tiny_config(hidden_size=hidden, num_hidden_layers=3))
        assert {down.in_features for down in adapter.down} == {up.out_features for up in adapter.up} == {hidden}
