"""Projected attention layers: the layer with its task term against plain torch, sizes, and what a step moves."""

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert import Bert, BertConfig, DropoutMasks, PackedTokens, initialize
from helpers import generator, random_batch, random_tokens, randomize_vectors, tiny_config, tiny_encoder, tiny_model
from model import MultitaskBert
from pal import PalConfig, ProjectedAttention, make_adapters
from tasks import TASKS, task_loss

ATTENTION = PalConfig("attention", size=12, num_heads=3, num_layers=3)
LOW_RANK = PalConfig("low_rank", size=5, num_heads=1, num_layers=3)
TOP = PalConfig("attention", size=12, num_heads=3, num_layers=1)
TOP_LOW_RANK = PalConfig("low_rank", size=5, num_heads=1, num_layers=2)
KINDS = pytest.mark.parametrize(
    "config", [ATTENTION, LOW_RANK, TOP, TOP_LOW_RANK], ids=lambda c: f"{c.kind}-{c.num_layers}"
)


def pal_model(config: PalConfig | None, seed: int = 0) -> MultitaskBert:
    return tiny_model(adapters=config, seed=seed, num_hidden_layers=3)


def trained(module: nn.Module, seed: int = 7) -> None:
    """Random numbers everywhere, as after training."""
    initialize(module, 0.3, generator(seed))
    randomize_vectors(module, seed)


def adapter_of(model: MultitaskBert, task: str) -> ProjectedAttention:
    adapter = model.adapters[task]
    assert isinstance(adapter, ProjectedAttention)
    return adapter


# ---------------------------------------------------------------------------------------------- the plain formula


def plain_attention(qkv: nn.Linear, states: Tensor, num_heads: int) -> Tensor:
    """Multi-head attention without an output matrix, over one row (L, D)."""
    size = states.shape[1]
    heads = []
    for query, key, value in zip(
        *(part.split(size // num_heads, 1) for part in qkv(states).split(size, 1)), strict=True
    ):
        heads.append(torch.softmax(query @ key.T / math.sqrt(size // num_heads), -1) @ value)
    return torch.cat(heads, 1)


def plain_task_term(adapter: ProjectedAttention, place: int, states: Tensor) -> Tensor:
    """V_D g(V_E h) of one row, the layer being number `place` among the adapted ones."""
    config = adapter.config
    if config.kind == "low_rank":
        return F.linear(
            F.linear(states, adapter.down[place].weight, adapter.down[place].bias),
            adapter.up[place].weight,
            adapter.up[place].bias,
        )
    qkv = adapter.qkv[place]
    assert isinstance(qkv, nn.Linear)
    return adapter.up[0](plain_attention(qkv, adapter.down[0](states), config.num_heads))  # type: ignore[no-any-return]


def plain_encoder(
    encoder: Bert, adapter: ProjectedAttention | None, ids: Sequence[int], types: Sequence[int]
) -> Tensor:
    """Hidden states (L, D) of one row: LN(h' + FFN(h') + TS(h)), h' = LN(h + MHA(h))."""
    h = encoder.word_embeddings.weight[list(ids)] + encoder.token_type_embeddings.weight[list(types)]
    h = encoder.embedding_norm(h + encoder.position_embeddings.weight[: len(ids)])
    for number, layer in enumerate(encoder.layers):
        attended = layer.attention_output(plain_attention(layer.qkv, h, encoder.config.num_attention_heads))
        between = layer.attention_norm(h + attended)
        total = between + layer.output(F.gelu(layer.intermediate(between)))
        if adapter is not None:
            first = encoder.config.num_hidden_layers - adapter.config.num_layers
            if number >= first:
                total = total + plain_task_term(adapter, number - first, h)
        h = layer.output_norm(total)
    return h


@KINDS
def test_the_task_term_enters_at_the_final_norm_of_each_adapted_layer(config: PalConfig) -> None:
    encoder = tiny_encoder(num_hidden_layers=3)
    adapter = ProjectedAttention(config, encoder.config)
    trained(adapter)
    tokens = random_tokens(6, 2)
    lengths = tokens.layout.lengths.tolist()
    found = encoder(tokens, adapter=adapter).split(lengths)
    with_none = encoder(tokens).split(lengths)
    for row, plain, ids, types in zip(
        found, with_none, tokens.input_ids.split(lengths), tokens.token_type_ids.split(lengths), strict=True
    ):
        assert torch.allclose(row, plain_encoder(encoder, adapter, ids.tolist(), types.tolist()), atol=1e-5)
        assert torch.allclose(plain, plain_encoder(encoder, None, ids.tolist(), types.tolist()), atol=1e-5)
        assert not torch.allclose(row, plain, atol=1e-2)


def test_the_attention_of_an_adapter_is_torch_s_without_its_output_matrix() -> None:
    encoder = tiny_config(num_hidden_layers=3)
    adapter = ProjectedAttention(ATTENTION, encoder)
    trained(adapter)
    states = torch.randn(7, 32, generator=generator())
    tokens = PackedTokens.from_rows([[1] * 7], [[0] * 7])
    for layer in range(3):
        attention = nn.MultiheadAttention(12, 3)
        with torch.no_grad():
            attention.in_proj_weight.copy_(adapter.qkv[layer].weight)
            attention.in_proj_bias.copy_(adapter.qkv[layer].bias)
            attention.out_proj.weight.copy_(torch.eye(12))
            attention.out_proj.bias.zero_()
        projected = adapter.down[0](states)
        expected = adapter.up[0](attention(projected, projected, projected)[0])
        assert torch.allclose(adapter(layer, states, tokens.layout, None), expected, atol=1e-5)


def test_projections_are_shared_by_the_layers_and_attention_is_each_layer_s_own() -> None:
    adapter = ProjectedAttention(ATTENTION, tiny_config(num_hidden_layers=3))
    names = {name.removesuffix(".weight") for name, p in adapter.named_parameters() if p.dim() == 2}
    assert names == {"down.0", "up.0", "qkv.0", "qkv.1", "qkv.2"}
    low_rank = ProjectedAttention(LOW_RANK, tiny_config(num_hidden_layers=3))
    names = {name.removesuffix(".weight") for name, p in low_rank.named_parameters() if p.dim() == 2}
    assert names == {f"{part}.{i}" for part in ("down", "up") for i in range(3)}


def test_adapters_in_the_top_layers_leave_the_lower_ones_alone() -> None:
    encoder = tiny_encoder(num_hidden_layers=3)
    adapter = ProjectedAttention(TOP, encoder.config)
    trained(adapter)
    tokens = random_tokens(4, 0)
    states = torch.randn(len(tokens.input_ids), 32, generator=generator())
    terms = [adapter(layer, states, tokens.layout, None) for layer in range(3)]
    assert terms[0] is None
    assert terms[1] is None
    assert terms[2].shape == states.shape


# --------------------------------------------------------------------------------------------- fresh and trained


@KINDS
def test_a_fresh_pal_leaves_the_encoder_output_unchanged(config: PalConfig) -> None:
    plain, with_pal = pal_model(None), pal_model(config)
    for task in TASKS:
        batch = random_batch(task, 6)
        assert torch.equal(plain.pooled(task, batch), with_pal.pooled(task, batch))
        assert torch.equal(plain(task, batch), with_pal(task, batch))


@KINDS
def test_only_the_up_projection_of_a_fresh_pal_is_zero(config: PalConfig) -> None:
    adapters = make_adapters(config, tiny_config(num_hidden_layers=3), list(TASKS), generator())
    for name, parameter in adapters.named_parameters():
        is_zero = ".up." in name or name.endswith("bias")
        assert bool(parameter.any()) != is_zero, name
        assert parameter.device.type == "cpu"
        if not is_zero and parameter.numel() > 100:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.3)


def test_the_adapters_of_the_tasks_start_different_and_depend_on_the_generator_only() -> None:
    config = tiny_config(num_hidden_layers=3)
    torch.manual_seed(0)
    first = make_adapters(ATTENTION, config, list(TASKS), generator(1)).state_dict()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    second = make_adapters(ATTENTION, config, list(TASKS), generator(1)).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["sst.down.0.weight"], first["para.down.0.weight"])


@KINDS
@pytest.mark.parametrize("task", TASKS)
def test_a_step_moves_the_task_s_adapter_and_no_other(config: PalConfig, task: str) -> None:
    model = pal_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    fresh = {name: p.detach().clone() for name, p in model.named_parameters()}

    def step() -> dict[str, bool]:
        batch = random_batch(task, 8)
        optimizer.zero_grad()
        task_loss(TASKS[task], model(task, batch, DropoutMasks(0)), batch.labels).backward()
        optimizer.step()
        return {name: not torch.equal(p.detach(), fresh[name]) for name, p in model.named_parameters()}

    first = step()
    second = step()
    for name in fresh:
        if name.startswith("adapters."):
            is_own = name.startswith(f"adapters.{task}.")
            assert second[name] == is_own, name
            if ".up." in name:
                assert first[name] == is_own, name
        elif name.startswith("heads."):
            assert first[name] == name.startswith(f"heads.{task}."), name
    assert first["encoder.layers.0.qkv.weight"]


@KINDS
def test_the_up_projection_has_a_gradient_from_the_first_step_in_every_adapted_layer(config: PalConfig) -> None:
    model = pal_model(config)
    batch = random_batch("sst", 8)
    task_loss(TASKS["sst"], model("sst", batch), batch.labels).backward()
    ups = [(name, p) for name, p in adapter_of(model, "sst").named_parameters() if name.startswith("up.")]
    assert len(ups) == 2 * (1 if config.kind == "attention" else config.num_layers)
    for name, parameter in ups:
        assert parameter.grad is not None and parameter.grad.any(), name


@KINDS
def test_each_task_reads_through_its_own_adapter(config: PalConfig) -> None:
    model = pal_model(config)
    batch = random_batch("para", 6)
    before = {task: model.pooled(task, batch) for task in TASKS}
    trained(adapter_of(model, "para"))
    for task in TASKS:
        assert torch.equal(model.pooled(task, batch), before[task]) != (task == "para")


@KINDS
def test_a_prediction_through_an_adapter_does_not_depend_on_the_other_rows(config: PalConfig) -> None:
    model = pal_model(config)
    trained(adapter_of(model, "sst"))
    tokens = random_tokens(7, 4)
    lengths = tokens.layout.lengths.tolist()
    together = model.encoder(tokens, adapter=model.adapter("sst")).split(lengths)
    for states, ids, types in zip(
        together, tokens.input_ids.split(lengths), tokens.token_type_ids.split(lengths), strict=True
    ):
        alone = PackedTokens.from_rows([ids.tolist()], [types.tolist()])
        assert torch.allclose(model.encoder(alone, adapter=model.adapter("sst")), states, atol=1e-5)


@KINDS
def test_adapters_enter_the_pooled_output_as_they_enter_all_hidden_states(config: PalConfig) -> None:
    """In value and in the gradients of the adapters."""
    model = pal_model(config)
    adapter, tokens = adapter_of(model, "sst"), random_tokens(7, 4)
    trained(adapter)
    whole = model.encoder.pool(model.encoder(tokens, adapter=adapter)[tokens.first_tokens])
    pooled = model.encoder.pool(model.encoder(tokens, adapter=adapter, first_only=True))
    torch.testing.assert_close(pooled, whole, rtol=0, atol=1e-5)
    expected, found = (torch.autograd.grad(of.square().sum(), list(adapter.parameters())) for of in (whole, pooled))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_attention_of_an_adapter_has_the_dropout_of_the_encoder_s_attention() -> None:
    tokens = random_tokens(4, 0)
    states = torch.randn(len(tokens.input_ids), 32, generator=generator())
    for prob in (0.0, 0.5):
        config = tiny_config(num_hidden_layers=3, attention_probs_dropout_prob=prob, hidden_dropout_prob=0.3)
        adapter = ProjectedAttention(ATTENTION, config)
        trained(adapter)
        plain = adapter(0, states, tokens.layout, None)
        first, again, other = (adapter(0, states, tokens.layout, DropoutMasks(seed)) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert torch.allclose(first, plain) == (prob == 0)
        assert torch.equal(first, other) == (prob == 0)


# ---------------------------------------------------------------------------------------------------------- sizes


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_eight_tasks_make_bert_base_1_13_times_as_large() -> None:
    config = BertConfig()
    pal = PalConfig.for_encoder(config)
    assert (pal.size, pal.num_heads, pal.num_layers, pal.kind) == (204, 12, 12, "attention")
    with torch.device("meta"):
        encoder, adapter = Bert(config), ProjectedAttention(pal, config)
    assert (count(encoder) + 8 * count(adapter)) / count(encoder) == pytest.approx(1.13, abs=0.005)


def test_the_low_rank_variant_is_100_wide_beside_bert_base_and_of_about_the_same_size() -> None:
    config = BertConfig()
    low_rank = PalConfig.for_encoder(config, "low_rank")
    assert (low_rank.size, low_rank.num_layers) == (100, 12)
    with torch.device("meta"):
        ratio = count(ProjectedAttention(low_rank, config)) / count(Bert(config))
    assert 1 + 8 * ratio == pytest.approx(1.13, abs=0.01)


@pytest.mark.parametrize(
    ("hidden", "size", "num_heads", "low_rank"), [(768, 204, 12, 100), (1024, 272, 16, 133), (384, 102, 6, 50)]
)
def test_default_sizes_follow_the_hidden_size(hidden: int, size: int, num_heads: int, low_rank: int) -> None:
    config = BertConfig(hidden_size=hidden, num_attention_heads=hidden // 64, num_hidden_layers=6)
    pal = PalConfig.for_encoder(config)
    assert (pal.size, pal.num_heads, pal.num_layers) == (size, num_heads, 6)
    assert PalConfig.for_encoder(config, "low_rank").size == low_rank


@pytest.mark.parametrize(("hidden", "num_heads"), [(16, 2), (32, 4), (64, 1), (96, 3), (100, 5), (312, 12)])
@pytest.mark.parametrize("kind", ["attention", "low_rank"])
def test_default_sizes_fit_any_small_encoder(hidden: int, num_heads: int, kind: str) -> None:
    config = tiny_config(hidden_size=hidden, num_attention_heads=num_heads)
    if hidden < 18 and kind == "attention":  # one head is 17 wide
        with pytest.raises(ValueError, match="less than the hidden size"):
            PalConfig.for_encoder(config, kind)
        return
    pal = PalConfig.for_encoder(config, kind)
    assert 0 < pal.size < hidden
    assert pal.size % pal.num_heads == 0
    ProjectedAttention(pal, config)


def test_given_sizes_are_kept() -> None:
    config = tiny_config(num_hidden_layers=3)
    assert PalConfig.for_encoder(config, "attention", 24, 6, 2) == PalConfig("attention", 24, 6, 2)
    assert PalConfig.for_encoder(config, "low_rank", 7, 0, 1) == PalConfig("low_rank", 7, 1, 1)
    assert PalConfig.for_encoder(config, size=9, num_heads=3).num_layers == 3
    assert PalConfig(**ATTENTION.to_dict()) == ATTENTION


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "linear"}, "--pal_kind linear"),
        ({"size": 32}, "--pal_size 32: expected 1 to 31"),
        ({"size": 768}, "--pal_size 768"),
        ({"size": -4}, "--pal_size -4"),
        ({"size": 12, "num_heads": 5}, "--pal_size 12: not a multiple of --pal_heads 5"),
        ({"num_layers": 4}, "--pal_layers 4: the encoder has 3 layers"),
        ({"num_layers": -1}, "--pal_layers -1"),
    ],
)
def test_sizes_that_do_not_fit_the_encoder_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PalConfig.for_encoder(tiny_config(num_hidden_layers=3), **arguments)  # type: ignore[arg-type]


@KINDS
@pytest.mark.parametrize("hidden", [32, 48])
def test_an_adapter_always_has_the_width_of_its_encoder(config: PalConfig, hidden: int) -> None:
    encoder = tiny_config(hidden_size=hidden, num_hidden_layers=3)
    adapter = ProjectedAttention(config, encoder)
    assert {down.in_features for down in adapter.down} == {hidden}  # type: ignore[union-attr]
    assert {up.out_features for up in adapter.up} == {hidden}  # type: ignore[union-attr]
    assert "hidden" not in " ".join(config.to_dict())  # nothing by which the width could be said differently
    other = ProjectedAttention(config, tiny_config(hidden_size=hidden + 16, num_hidden_layers=3))
    with pytest.raises(RuntimeError, match="size mismatch"):
        adapter.load_state_dict(other.state_dict())
