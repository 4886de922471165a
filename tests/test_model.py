"""The multi-task model: what a prediction depends on, whose each parameter is, and the frozen encoder."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from test_bert import LENGTHS, assert_same_gradients, by_row, gradients, reference_model, same_encoder, tokens_of
from torch import Tensor, nn

import ops
from bert import CheckpointError
from datasets import Batch, Example, Tokenizer, tokenize
from heads import MlpHead
from helpers import (
    LINEAR,
    THREE,
    RecordedMasks,
    generator,
    outputs,
    pack,
    random_batch,
    random_tokens,
    shaken,
    tiny_config,
    tiny_encoder,
    tiny_model,
    write_vocabulary,
)
from model import POOLINGS, FrozenEncoder, Layout, MultitaskBert, Trained, parameter_counts
from ops import DropoutMasks
from pal import ProjectedAttention
from parameters import Choice
from tasks import TASKS

MLP = Choice("mlp", MlpHead.Parameters(1))
PAL = Choice("pal", ProjectedAttention.Parameters())


# -------------------------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize("pooling", POOLINGS)
def test_poolings_equal_those_of_transformers_on_a_padded_batch(pooling: str) -> None:
    """In values and in the gradients of the encoder."""
    reference = reference_model(tiny_config(num_attention_heads=2))
    model = MultitaskBert(same_encoder(reference), Layout({"sst": LINEAR}, pooling=pooling), generator())
    tokens = tokens_of(LENGTHS, tiny_config())
    ids, types, mask = (
        nn.utils.rnn.pad_sequence(list(by_row(tokens, part)), batch_first=True)
        for part in (tokens.input_ids, tokens.token_type_ids, torch.ones_like(tokens.input_ids))
    )  # (B, L) each
    output = reference(input_ids=ids, token_type_ids=types, attention_mask=mask)
    states = output.last_hidden_state  # (B, L, D)
    expected = {
        "pooler": output.pooler_output,
        "cls": states[:, 0],
        "mean": (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True),
    }[pooling]
    found = model.pooled("sst", Batch(torch.zeros(len(LENGTHS)), tokens=tokens))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(model.encoder, [found]), gradients(reference, [expected]))


@pytest.mark.parametrize(("pooling", "adapter"), [("pooler", None), ("cls", PAL), ("mean", PAL), ("mean", None)])
def test_siamese_logits_are_those_of_sentences_encoded_alone(
    pooling: str, adapter: Choice | None, tmp_path: Path
) -> None:
    """Whatever the rows beside a row; in the gradients too."""
    model = shaken(tiny_model(adapter=adapter, head=MLP, pooling=pooling, pairs="siamese"))
    write_vocabulary(tmp_path)
    texts = [("the film", "a very good song"), ("not", ""), ("bad bad bad bad bad bad bad", "do i cook"), ("a", "a")]
    examples = [Example("", row, 0.0, 0) for row in texts]
    rows = tokenize(TASKS["sts"], examples, Tokenizer(tmp_path, 7, is_siamese=True), torch.device("cpu"))
    alone = Tokenizer(tmp_path, 7)

    def sentence(text: str) -> Tensor:
        ids = alone.encode([(text,)]).ids.tolist()
        states = model.encoder(pack([ids], [[0] * len(ids)]), adapter=model.adapter("sts"))[: len(ids)]
        first = states[0] if pooling == "cls" else torch.tanh(model.encoder.pooler(states[0]))
        return states.mean(0) if pooling == "mean" else first  # (D,)

    pairs = [(sentence(a), sentence(b)) for a, b in texts]
    features = torch.stack([torch.cat([u, v, (u - v).abs(), u * v]) for u, v in pairs])
    expected = model.heads["sts"](features, None)
    for order in ([0, 1, 2, 3], [3, 0], [2], [1]):
        torch.testing.assert_close(model("sts", rows.batch(order)), expected[order], rtol=0, atol=1e-5)
    ours, theirs = gradients(model, [model("sts", rows.batch(range(3)))]), gradients(model, [expected[:3]])
    assert_same_gradients(ours, theirs)  # of u = v, in the last row, |u - v| has none but by rounding
    batch, plain = random_batch("sst", 4), shaken(tiny_model(("sst",), adapter, MLP, pooling=pooling))
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    assert torch.equal(model("sst", batch), plain("sst", batch))  # one text is one sequence


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_last_layer_is_computed_for_all_tokens_only_where_their_mean_is_wanted(pooling: str) -> None:
    model, batch, masks = tiny_model(pooling=pooling), random_batch("sst", 6), RecordedMasks(1)
    model("sst", batch, masks)
    assert batch.tokens is not None
    assert len(masks.drawn[-2][1]) == 32 * (len(batch.tokens.input_ids) if pooling == "mean" else 6)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_pooler_that_is_not_read_is_neither_trained_nor_counted(pooling: str) -> None:
    model, plain = tiny_model(pooling=pooling), tiny_model()
    unread = {"encoder.pooler.weight", "encoder.pooler.bias"}
    assert plain.shared_parameters().keys() - model.shared_parameters().keys() == unread
    model.trained().freeze_others(model)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == unread
    counts, with_pooler = parameter_counts(model), parameter_counts(plain)
    assert with_pooler["shared"] - counts["shared"] == with_pooler["total"] - counts["total"] == 32 * 33
    assert model.parameters_by_part() == plain.parameters_by_part()[:-1]


def test_heads_read_the_pooled_output_and_have_the_widths_of_their_tasks() -> None:
    model = shaken(tiny_model(adapter=PAL, head=MLP))
    for task in THREE:
        batch = random_batch(task, 6)
        assert batch.tokens is not None
        states = model.encoder(batch.tokens, adapter=model.adapter(task))[batch.tokens.first_tokens]
        logits = model(task, batch)
        expected = model.heads[task](torch.tanh(model.encoder.pooler(states)), None)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        assert logits.shape == (6, TASKS[task].output.num_outputs)


@pytest.mark.parametrize("copied", [1, 2])
@pytest.mark.parametrize("adapter", [None, PAL])
def test_copied_top_layers_start_with_the_identical_output(copied: int, adapter: Choice | None) -> None:
    plain, model = tiny_model(adapter=adapter), tiny_model(adapter=adapter, copied=copied)
    assert torch.equal(outputs(model), outputs(plain))
    for task in THREE:
        batch = random_batch(task, 6)
        assert torch.equal(model(task, batch, DropoutMasks(1)), plain(task, batch, DropoutMasks(1)))
        for i, layer in enumerate(model.top_layers_of(task), 2 - copied):
            for ours, theirs in zip(layer.parameters(), plain.encoder.layers[i].parameters(), strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("copied", [1, 2, 3])
def test_each_task_reads_through_the_shared_layers_and_then_its_own(copied: int) -> None:
    model = shaken(tiny_model(adapter=PAL, copied=copied, num_hidden_layers=3))
    assert len(model.encoder.layers) == 3 - copied and not model.shares_passes
    for task in THREE:
        batch, whole = random_batch(task, 6), tiny_encoder(num_hidden_layers=3)
        state = model.encoder.state_dict()
        for i in range(copied):
            layer = model.top_layers_of(task)[i].state_dict()
            state.update({f"layers.{3 - copied + i}.{name}": value for name, value in layer.items()})
        whole.load_state_dict(state)
        assert batch.tokens is not None
        states = whole(batch.tokens, adapter=model.adapter(task))[batch.tokens.first_tokens]
        torch.testing.assert_close(model.pooled(task, batch), whole.pool(states), rtol=0, atol=1e-5)


def test_more_top_layers_than_there_are_is_one_line() -> None:
    with pytest.raises(CheckpointError, match=r"^--copy_top_layers 3: the encoder has 2 layers$"):
        tiny_model(copied=3)


def test_training_applies_dropout_in_encoder_and_head_and_evaluation_applies_none() -> None:
    model, batch, masks = tiny_model(), random_batch("sst", 6), RecordedMasks(1)
    assert torch.equal(model("sst", batch), model("sst", batch))
    assert not torch.equal(model("sst", batch, masks), model("sst", batch))
    assert masks.drawn[-1][1].shape == (6 * 32,) and len(masks.drawn) == 1 + 3 * 2 + 1


@torch.no_grad()
def test_a_prediction_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on how many tokens belong to no row."""
    model, together = shaken(tiny_model(adapter=PAL, head=MLP)), random_tokens(9)
    rows = together.input_ids[: together.num_tokens].split(together.packing.lengths.tolist())
    types = together.token_type_ids[: together.num_tokens].split(together.packing.lengths.tolist())
    for task in THREE:
        expected = model(task, Batch(torch.zeros(9), tokens=together))
        for i, multiple in zip(range(9), (1, 7, 32) * 3, strict=True):
            monkeypatch.setattr(ops.packed, "rows_multiple", lambda *_, multiple=multiple: multiple)
            alone = Batch(torch.zeros(1), tokens=pack([rows[i].tolist()], [types[i].tolist()]))
            torch.testing.assert_close(model(task, alone)[0], expected[i], rtol=0, atol=1e-5)


def test_a_frozen_encoder_gives_the_logits_of_the_whole_model() -> None:
    model = shaken(tiny_model(adapter=PAL, head=MLP, copied=1))
    for task in THREE:
        batch = random_batch(task, 5)
        features = Batch(batch.labels, features=model.pooled(task, batch).detach())
        assert torch.equal(FrozenEncoder(model)(task, features), model(task, batch))
        masked = FrozenEncoder(model)(task, features, DropoutMasks(4))
        assert torch.equal(masked, model.predict(task, model.pooled(task, batch), DropoutMasks(4)))
        assert not torch.equal(masked, model(task, batch))


# --------------------------------------------------------------------------------------------------- parameters


def test_new_heads_and_adapters_depend_on_the_generator_only() -> None:
    layout = Layout({"sst": MLP, "sts": MLP}, PAL)
    before = torch.get_rng_state()
    first, second, third = (MultitaskBert(tiny_encoder(), layout, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    others = dict(third.named_parameters())
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
        if not name.startswith("encoder."):
            assert torch.equal(one, others[name]) == (name.endswith("bias") or ".up." in name) == (not one.any())
    for name in ("heads.{}.hidden.0.weight", "adapters.{}.down.0.weight"):
        of_sst, of_sts = (first.get_parameter(name.format(task)) for task in ("sst", "sts"))
        assert not torch.equal(of_sst, of_sts)
        assert of_sst.detach().std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize(("adapter", "copied"), [(None, 0), (PAL, 0), (PAL, 1), (None, 2)])
def test_every_parameter_is_shared_or_one_task_s(adapter: Choice | None, copied: int) -> None:
    model = tiny_model(adapter=adapter, head=MLP, copied=copied)
    parts = model.trained()
    groups = [parts.shared, *parts.own.values()]
    names, named = [name for group in groups for name in group], dict(model.named_parameters())
    assert sorted(names) == sorted(named) and parts.shared == model.shared_parameters()
    assert all(group[name] is named[name] for group in groups for name in group)
    assert all(name.startswith("encoder.") for name in parts.shared) and tuple(parts.own) == THREE
    for task, own in parts.own.items():
        assert all(name.split(".")[1] == task for name in own)
        others = {**model.head_parameters(task), **model.adapter_parameters(task)}
        assert own.keys() >= others.keys() and len(own) == len(others) + 12 * copied
        assert bool(model.adapter_parameters(task)) == (adapter is not None)


def test_what_a_stage_does_not_train_requires_no_gradient() -> None:
    model = tiny_model(adapter=PAL)
    name = "encoder.pooler.weight"
    head, layer = model.head_parameters("sst"), {name: model.shared_parameters()[name]}
    for trained_ones in (Trained({}, {"sst": head}), Trained(layer, {"sst": head, "sts": {}}), model.trained()):
        trained_ones.freeze_others(model)
        wanted = {*trained_ones.shared, *(name for own in trained_ones.own.values() for name in own)}
        assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted


def test_only_the_encoder_and_a_task_s_own_parts_have_a_gradient_from_it() -> None:
    model = shaken(tiny_model(adapter=PAL, head=MLP, copied=1))
    model("para", random_batch("para", 4)).square().sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {*model.shared_parameters(), *model.trained().own["para"]}


@pytest.mark.parametrize("copied", [0, 4])
def test_parts_are_embeddings_layers_and_pooler_in_order(copied: int) -> None:
    model = tiny_model(num_hidden_layers=11, copied=copied)
    first, *layers, last = model.parameters_by_part()
    assert [*first, *(name for part in layers for name in part), *last] == list(model.shared_parameters())
    assert {name.split(".")[1].split("_")[-1] for name in first} == {"embeddings", "norm"} and len(first) == 5
    assert last == ["encoder.pooler.weight", "encoder.pooler.bias"]
    assert len(layers) == 11 - copied
    for i, part in enumerate(layers):
        assert len(part) == 12 and all(name.startswith(f"encoder.layers.{i}.") for name in part)


@pytest.mark.parametrize("copied", [0, 1])
def test_parameter_counts_add_up(copied: int) -> None:
    def count(of: Sequence[MultitaskBert]) -> int:
        return sum(p.numel() for model in of for p in model.parameters())

    model = tiny_model(("sst", "sts"), adapter=PAL, head=MLP, copied=copied)
    alone = [tiny_model((task,), adapter=PAL, head=MLP) for task in ("sst", "sts")]
    encoder = tiny_encoder()
    shared = sum(p.numel() for p in encoder.parameters())
    shared -= copied * sum(p.numel() for p in encoder.layers[1].parameters())
    assert parameter_counts(model) == {
        "total": count([model]),
        "shared": shared,
        "per_task": count(alone[:1]) - shared,  # five outputs, against one
        "separate_models": count(alone),
    }


def test_a_duplicate_has_parameters_of_its_own() -> None:
    model = tiny_model(copied=1)
    before, copy = outputs(model), model.duplicate()
    assert torch.equal(outputs(copy), before)
    shaken(copy)
    assert torch.equal(outputs(model), before)
