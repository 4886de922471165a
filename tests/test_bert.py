"""The encoder against transformers: values, gradients, dropout; and that a row is alone in its batch."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import ops
from bert import Bert, BertConfig, CheckpointError, empty_bert, initialize
from checkpoints import find_checkpoint, huggingface_names, load_bert, load_huggingface
from datasets import SAMPLE, Tokenizer, read_examples, tokenize
from helpers import (
    THREE,
    Patch,
    RecordedMasks,
    generator,
    pack,
    random_tokens,
    randomize_vectors,
    tiny_config,
    tiny_encoder,
)
from ops import DropoutMasks, PackedTokens
from ops.packed import group_by_length
from tasks import TASKS

LENGTHS = [5, 60, 1, 17, 16, 2, 33, 59, 1, 12, 13, 45]
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one head, one layer": {"num_attention_heads": 1, "num_hidden_layers": 1},
    "eight heads, three layers": {"num_attention_heads": 8, "num_hidden_layers": 3},
    "narrow feed-forward, gelu_new": {"intermediate_size": 40, "hidden_act": "gelu_new"},
    "relu": {"hidden_act": "relu"},
    "silu": {"hidden_act": "silu"},
    "one token type": {"type_vocab_size": 1},
    "four token types": {"type_vocab_size": 4},
    "coarse epsilon": {"layer_norm_eps": 0.05},
    "odd width": {"hidden_size": 21, "num_attention_heads": 3, "intermediate_size": 50},
}


def reference_model(config: BertConfig, std: float = 0.3) -> transformers.BertModel:
    """transformers' model with random weights, large enough that attention is far from uniform."""
    values = {**config.to_dict(), "initializer_range": std}
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**values, attn_implementation="eager"))  # type: ignore[call-arg]
    randomize_vectors(model, 0)
    return model.eval()  # type: ignore[no-any-return]


def same_encoder(reference: transformers.BertModel) -> Bert:
    """Ours with the same weights."""
    encoder = empty_bert(BertConfig.from_dict(reference.config.to_dict()))
    assert load_huggingface(encoder, reference.state_dict(), "here") == []
    return encoder


def tokens_of(lengths: Sequence[int], config: BertConfig, seed: int = 0) -> PackedTokens:
    """Token ids from 1 (transformers gives its padding token 0 no gradient) and token types."""
    random = np.random.default_rng(seed)
    ids = [random.integers(1, config.vocab_size, length).tolist() for length in lengths]
    types = [np.sort(random.integers(0, config.type_vocab_size, length)).tolist() for length in lengths]
    return pack(ids, types)


def by_row(tokens: PackedTokens, values: Tensor) -> Sequence[Tensor]:
    """Of (N, ...) the part of each row."""
    return list(values[: tokens.num_tokens].split(tokens.packing.lengths.tolist()))


def padded_outputs(model: transformers.BertModel, tokens: PackedTokens) -> tuple[Tensor, Tensor]:
    """(tokens, D) hidden states of the tokens of rows and (B, D) pooled output, of a padded batch."""
    ids, types, mask = (
        nn.utils.rnn.pad_sequence(list(by_row(tokens, part)), batch_first=True)
        for part in (tokens.input_ids, tokens.token_type_ids, torch.ones_like(tokens.input_ids))
    )  # (B, L) each
    output = model(input_ids=ids, token_type_ids=types, attention_mask=mask)
    return output.last_hidden_state[mask.bool()], output.pooler_output


def packed_outputs(encoder: Bert, tokens: PackedTokens, masks: DropoutMasks | None = None) -> tuple[Tensor, Tensor]:
    hidden_states = encoder(tokens, masks)
    return hidden_states[: tokens.num_tokens], encoder.pool(hidden_states[tokens.first_tokens])


def assert_close(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def gradients(module: nn.Module, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """By name, of a sum of the outputs with random weights."""
    module.zero_grad()
    for output in outputs:
        (output * torch.randn(output.shape, generator=generator(len(output)))).sum().backward(retain_graph=True)
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """In units of each parameter's largest one, but of no less than a tenth of the largest of all: one that is zero in
    exact arithmetic, as a key's bias, holds what rounding left of others. Theirs may have Hugging Face's names."""
    if not ours.keys() & theirs.keys():
        theirs = {name: torch.cat([theirs[n] for n in huggingface_names(name)]) for name in ours}
    assert ours.keys() == theirs.keys()
    least = 0.1 * max(gradient.abs().max().item() for gradient in theirs.values())
    for name, gradient in ours.items():
        scale = max(least, theirs[name].abs().max().item())
        torch.testing.assert_close(gradient / scale, theirs[name] / scale, rtol=0, atol=1e-5, msg=name)


# --------------------------------------------------------------------------------------------------- the values


@pytest.mark.parametrize("name", CONFIGURATIONS)
@torch.no_grad()
def test_outputs_equal_transformers(name: str) -> None:
    reference = reference_model(tiny_config(**CONFIGURATIONS[name]))
    encoder = same_encoder(reference)
    for lengths in (LENGTHS, [1], [60], [1, 1, 1], [64, 1]):
        tokens = tokens_of(lengths, encoder.config)
        assert_close(packed_outputs(encoder, tokens), padded_outputs(reference, tokens))


def test_gradients_equal_those_of_transformers() -> None:
    reference = reference_model(tiny_config(num_attention_heads=2))
    encoder, tokens = same_encoder(reference), tokens_of(LENGTHS, tiny_config())
    ours = gradients(encoder, packed_outputs(encoder, tokens))
    theirs = gradients(reference, padded_outputs(reference, tokens))
    assert len(theirs) == sum(len(huggingface_names(name)) for name in ours) == len(list(reference.parameters()))
    assert_same_gradients(ours, theirs)
    attentions = reference(tokens.input_ids[None, :20], output_attentions=True).attentions
    assert all(p.max(-1).values.mean() > 3 / 20 for p in attentions), "attention is far from uniform in these tests"


@torch.no_grad()
def test_embedded_weights_give_the_outputs_of_transformers_on_sample_rows() -> None:
    folder = find_checkpoint("minilm")
    encoder, lacking = load_bert(folder, generator())
    assert lacking == []
    reference = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    for task in (TASKS[name] for name in THREE):
        examples = read_examples(SAMPLE / task.file_name("dev"), task, labelled=True).examples[::40]
        rows = tokenize(task, examples, Tokenizer(folder, 128), torch.device("cpu"))
        tokens = rows.batch(range(len(rows))).tokens
        assert tokens is not None and len(set(tokens.packing.lengths.tolist())) > 2
        assert_close(packed_outputs(encoder, tokens), padded_outputs(reference, tokens))


@torch.no_grad()
def test_a_perturbation_is_added_before_the_first_layer_norm() -> None:
    encoder, moved, tokens = tiny_encoder(), tiny_encoder(), random_tokens(4)
    shift = torch.randn(len(tokens.input_ids), 32, generator=generator(5))
    moved.word_embeddings = nn.Embedding.from_pretrained(encoder.word_embeddings(tokens.input_ids) + shift)
    ids = torch.arange(len(shift))
    moved_tokens = dataclasses.replace(tokens, input_ids=ids)
    assert_close([encoder(tokens, perturbation=shift)], [moved(moved_tokens)])
    assert not torch.allclose(encoder(tokens, perturbation=shift), encoder(tokens), atol=1e-2)


# --------------------------------------------------------------------------------------------- rows and batches


@pytest.mark.parametrize("first_only", [False, True])
def test_nothing_depends_on_the_number_of_tokens_that_belong_to_no_row(first_only: bool, monkeypatch: Patch) -> None:
    found = []
    for multiple in (1, 32, 7):
        encoder = tiny_encoder()
        monkeypatch.setattr(ops.packed, "rows_multiple", lambda *_, multiple=multiple: multiple)
        tokens = tokens_of([5, 9, 1, 3], encoder.config)
        assert len(tokens.input_ids) == {1: 18, 32: 32, 7: 21}[multiple] and tokens.num_tokens == 18
        states = encoder(tokens, first_only=first_only)
        outputs = [states[: 4 if first_only else 18]]
        found.append((outputs, gradients(encoder, outputs)))
    (expected, expected_gradients), *others = found
    for outputs, of_parameters in others:
        assert_close(outputs, expected, 3e-6)
        assert_same_gradients(of_parameters, expected_gradients)


@pytest.mark.parametrize("lengths", [LENGTHS, [4, 4, 4], [1]])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_first_tokens_alone_are_those_of_all_hidden_states(name: str, lengths: list[int]) -> None:
    """In value and gradients."""
    encoder = tiny_encoder(**CONFIGURATIONS[name])
    tokens = tokens_of(lengths, encoder.config)
    whole = [encoder(tokens)[tokens.first_tokens]]
    first = [encoder(tokens, first_only=True)]
    assert_close(first, whole)
    assert_same_gradients(gradients(encoder, first), gradients(encoder, whole))
    with torch.no_grad():
        assert_close([encoder(tokens, first_only=True)], whole)


# ------------------------------------------------------------------------------------------------------ dropout


class PlayedBack:
    """Stands in for torch's dropout and applies recorded masks, brought into the padded shapes of transformers."""

    def __init__(self, recorded: RecordedMasks, lengths: Sequence[int], num_heads: int) -> None:
        self.left = list(recorded.drawn)
        self.lengths, self.num_heads = np.array(lengths), num_heads

    def __call__(self, values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        assert training
        prob, mask = self.left.pop(0)
        assert prob == p
        padded = torch.ones_like(values)
        if values.dim() == 3:  # (B, L, D)
            self._play_hidden(mask.view(-1, values.shape[-1]), padded)
        else:  # (B, H, L, L)
            self._play_attention(mask, padded)
        return values * padded

    def _play_hidden(self, mask: Tensor, padded: Tensor) -> None:
        if len(mask) == len(self.lengths) < self.lengths.sum():  # of the first tokens only
            padded[:, 0] = mask
            return
        of_rows = mask[: self.lengths.sum()]  # behind them, those of tokens that belong to no row
        for row, part in enumerate(of_rows.split(self.lengths.tolist())):
            padded[row, : len(part)] = part

    def _play_attention(self, mask: Tensor, padded: Tensor) -> None:
        groups = [(rows, int(self.lengths[rows].max())) for rows in group_by_length(self.lengths)]
        first_only = len(mask) == sum(len(rows) * length for rows, length in groups) * self.num_heads
        start = 0
        for rows, length in groups:
            num_queries = 1 if first_only else length
            size = len(rows) * self.num_heads * num_queries * length
            shape = (-1, self.num_heads, num_queries, length)
            padded[rows, :, :num_queries, :length] = mask[start : start + size].view(shape)
            start += size
        assert start == len(mask)


@pytest.mark.parametrize("first_only", [False, True])
def test_dropout_stands_where_transformers_has_it(first_only: bool, monkeypatch: Patch) -> None:
    config = tiny_config(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.15)
    reference = reference_model(config).train()
    encoder, masks, tokens = same_encoder(reference), RecordedMasks(3), tokens_of(LENGTHS, config)
    if first_only:
        ours: Sequence[Tensor] = [encoder.pool(encoder(tokens, masks, first_only=True))]
    else:
        ours = packed_outputs(encoder, tokens, masks)
    assert [prob for prob, _ in masks.drawn] == [0.3] + [0.15, 0.3, 0.3] * config.num_hidden_layers
    played = PlayedBack(masks, LENGTHS, config.num_attention_heads)
    monkeypatch.setattr(torch.nn.functional, "dropout", played)
    theirs = padded_outputs(reference, tokens)[int(first_only) :]
    assert played.left == []
    assert_close(ours, theirs)
    assert_same_gradients(gradients(encoder, ours), gradients(reference, theirs))


# ------------------------------------------------------------------------------- configuration, initialization


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta', expected 'bert'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key', expected 'absolute'"),
        ({"hidden_act": "tanhshrink"}, "hidden_act is 'tanhshrink', expected one of gelu"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a whole number from 1 to"),
        ({"num_hidden_layers": 1001}, "num_hidden_layers is 1001, expected a whole number from 1 to 1000"),
        ({"hidden_size": 10**7 + 1}, "hidden_size is 10000001, expected a whole number from 1 to 10000000"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1, expected a whole number from 1 to"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a whole number from 1 to"),
        ({"hidden_size": 32.0}, "hidden_size is 32.0, expected a whole number from 1 to"),
        ({"hidden_size": "32"}, "hidden_size is '32', expected a whole number from 1 to"),
        ({"vocab_size": True}, "vocab_size is True, expected a whole number from 1 to"),
        ({"layer_norm_eps": "1e-12"}, "layer_norm_eps is '1e-12', expected a number of at least 0"),
        ({"layer_norm_eps": -1e-9}, "layer_norm_eps is -1e-09, expected a number of at least 0"),
        ({"hidden_dropout_prob": float("nan")}, "hidden_dropout_prob is nan, expected a number of at least 0"),
        ({"hidden_dropout_prob": 2}, "hidden_dropout_prob is 2, expected a probability below 1"),
        ({"attention_probs_dropout_prob": 1}, "attention_probs_dropout_prob is 1, expected a probability below 1"),
    ],
)
def test_a_configuration_that_is_no_berts_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^here: {message}"):
        BertConfig.from_dict({**tiny_config().to_dict(), **values}, "here")


def test_a_configuration_survives_its_file_and_what_it_lacks_is_bert_base_s() -> None:
    config = tiny_config(hidden_act="relu", layer_norm_eps=1e-5)
    assert BertConfig.from_dict({**config.to_dict(), "use_cache": True}) == config
    assert BertConfig.from_dict({}) == BertConfig()
    ours, theirs = BertConfig().to_dict(), transformers.BertConfig().to_dict()
    assert {name: theirs[name] for name in ours if name != "architectures"} == {
        name: value for name, value in ours.items() if name != "architectures"
    }


def test_new_parameters_are_normal_matrices_zero_biases_and_identity_norms() -> None:
    first, second = (empty_bert(tiny_config()) for _ in range(2))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    initialize(first, 0.05, generator(1))
    initialize(empty_bert(tiny_config()), 0.05, generator(2))
    initialize(second, 0.05, generator(1))
    assert torch.equal(torch.get_rng_state(), before)
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
        if one.dim() == 2:
            assert one.detach().std().item() == pytest.approx(0.05, rel=0.25) and abs(one.mean()) < 0.02
        else:
            assert (one == float("norm.weight" in name)).all(), name
