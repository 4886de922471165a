"""RoBERTa and ModernBERT against transformers: values, gradients, checkpoints, token ids; dropout; runs of each."""

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_bert import LENGTHS, assert_close, assert_same_gradients, gradients
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn

import multitask_classifier
import run as running
from bert import BertConfig, CheckpointError, Encoder, empty_bert, initialize
from checkpoints import (
    ENCODERS,
    load_bert,
    load_huggingface,
    load_model,
    read_bert_config,
    read_layout,
    save_checkpoint,
    to_huggingface,
)
from datasets import Batch, Tokenizer
from helpers import (
    LINEAR,
    STD,
    TEXT,
    Capture,
    Patch,
    RecordedMasks,
    generator,
    pack,
    randomize_vectors,
    write_data,
)
from model import Layout, MultitaskBert
from modernbert import ModernBertConfig
from ops import PackedTokens
from pal import ProjectedAttention
from parameters import Choice
from roberta import RobertaConfig

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 66,
    "pad_token_id": 1,
}
CONFIGURATIONS: dict[str, BertConfig] = {
    "roberta": RobertaConfig(**SIZES, num_hidden_layers=2),
    "roberta, later positions": RobertaConfig(**{**SIZES, "pad_token_id": 4}, num_hidden_layers=1, hidden_act="relu"),
    "modernbert": ModernBertConfig(**SIZES, num_hidden_layers=4),
    "modernbert, windows": ModernBertConfig(**SIZES, num_hidden_layers=5, local_attention=6, hidden_act="silu"),
    "modernbert, other turns": ModernBertConfig(
        **SIZES,
        num_hidden_layers=3,
        global_attn_every_n_layers=2,
        local_attention=9,
        global_rope_theta=90.0,
        local_rope_theta=7.0,
    ),
}
KINDS = ["roberta", "modernbert, windows"]
PAL = Choice("pal", ProjectedAttention.Parameters())


def reference_model(config: BertConfig, std: float = 0.3) -> Any:
    """transformers' model with random weights, large enough that attention is far from uniform."""
    torch.manual_seed(0)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 2)
    values = {**config.to_dict(), **ids, "initializer_range": std}
    theirs = transformers.AutoConfig.for_model(**values)
    model = transformers.AutoModel.from_config(theirs, attn_implementation="eager")
    randomize_vectors(model, 0)
    return model.eval()


def same_encoder(reference: Any) -> Encoder:
    """Ours with the same weights; a pooler that transformers has none of is zero."""
    encoder = empty_bert(ENCODERS[reference.config.model_type][0].from_dict(reference.config.to_dict()))
    nn.init.zeros_(encoder.pooler.weight), nn.init.zeros_(encoder.pooler.bias)
    lacking = load_huggingface(encoder, reference.state_dict(), "here")
    assert lacking == ([] if hasattr(reference, "pooler") else ["pooler.weight", "pooler.bias"])
    return encoder


def tokens_of(lengths: Sequence[int], config: BertConfig) -> PackedTokens:
    """Ids that are no padding; the second half of each row is of type 1, which these models do not know."""
    draw = generator(3)
    ids = [torch.randint(5, config.vocab_size, (length,), generator=draw).tolist() for length in lengths]
    return pack(ids, [[0] * (length - length // 2) + [1] * (length // 2) for length in lengths])


def padded_outputs(model: Any, tokens: PackedTokens) -> list[Tensor]:
    """(tokens, D) hidden states of each layer from the embeddings on, of a padded batch."""
    rows = tokens.input_ids[: tokens.num_tokens].split(tokens.packing.lengths.tolist())
    ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=model.config.pad_token_id)  # (B, L)
    mask = ids != model.config.pad_token_id
    output = model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
    return [states[mask] for states in (*output.hidden_states[:-1], output.last_hidden_state)]


# --------------------------------------------------------------------------------------------------- the values


@pytest.mark.parametrize("name", CONFIGURATIONS)
@torch.no_grad()
def test_hidden_states_of_every_layer_equal_those_of_transformers(name: str) -> None:
    reference = reference_model(CONFIGURATIONS[name])
    encoder = same_encoder(reference)
    for lengths in (LENGTHS, [1], [60], [1, 1, 1], [60, 1]):
        tokens = tokens_of(lengths, encoder.config)
        ours = [states[: tokens.num_tokens] for states in encoder.states(tokens)]
        assert len(ours) == encoder.config.num_hidden_layers + 1
        assert_close(ours, padded_outputs(reference, tokens))
        assert_close([encoder(tokens)[: tokens.num_tokens]], ours[-1:])


@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_gradients_equal_those_of_transformers(name: str, first_only: bool) -> None:
    reference = reference_model(CONFIGURATIONS[name])
    encoder, tokens = same_encoder(reference), tokens_of(LENGTHS, CONFIGURATIONS[name])
    ours, theirs = encoder(tokens, first_only=first_only), padded_outputs(reference, tokens)[-1]
    if first_only:
        theirs = theirs[tokens.first_tokens]
        assert_close([ours], [theirs])
    found, expected = gradients(encoder, [ours[: len(theirs)]]), gradients(reference, [theirs])
    encoder.zero_grad()
    for parameter_name, parameter in encoder.named_parameters():
        if parameter_name in found:
            parameter.data = found[parameter_name]
        else:
            nn.init.zeros_(parameter)
    assert_same_gradients({n: t for n, t in to_huggingface(encoder).items() if n in expected}, expected)
    assert len(expected) >= len(found) > 10


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_perturbation_is_added_before_the_first_layer_norm_and_an_adapter_behind_each_layer(name: str) -> None:
    encoder, moved = (same_encoder(reference_model(CONFIGURATIONS[name])) for _ in range(2))
    tokens = tokens_of(LENGTHS, encoder.config)
    shift = torch.randn(len(tokens.input_ids), 32, generator=generator(5))
    moved.word_embeddings = nn.Embedding.from_pretrained(encoder.word_embeddings(tokens.input_ids) + shift)
    as_words = dataclasses.replace(tokens, input_ids=torch.arange(len(shift)))
    assert_close([encoder(tokens, perturbation=shift)], [moved(as_words)])
    assert not torch.allclose(encoder(tokens, perturbation=shift), encoder(tokens), atol=1e-2)

    terms = {i: torch.randn(len(shift), 32, generator=generator(i)) for i in range(encoder.config.num_hidden_layers)}
    *_, before, last = encoder.states(tokens, adapter=lambda i, *_: terms[i])
    layer = encoder.layers[-1]
    plain = layer(before, tokens.packing, None)
    if name == "roberta":
        inner: list[Tensor] = []
        hook = layer.output_norm.register_forward_pre_hook(lambda module, inputs: inner.append(inputs[0]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ops.kernels.can_run", lambda *tensors: False)
            layer(before, tokens.packing, None)
        hook.remove()
        expected = layer.output_norm(inner[0] + terms[len(terms) - 1])
    else:
        expected = encoder.final_norm(plain + terms[len(terms) - 1])
    assert_close([last], [expected])
    assert_close([encoder(tokens, adapter=lambda i, *_: terms[i], first_only=True)], [last[tokens.first_tokens]])


def test_dropout_stands_where_each_paper_has_it() -> None:
    rates = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.15}
    for config, expected in (
        (dataclasses.replace(CONFIGURATIONS["roberta"], **rates), [0.3] + [0.15, 0.3, 0.3] * 2),
        (
            dataclasses.replace(CONFIGURATIONS["modernbert"], embedding_dropout=0.4, **rates),
            [0.4] + [0.15, 0.15, 0.3] * 4,
        ),
    ):
        encoder, masks = same_encoder(reference_model(config)), RecordedMasks(3)
        tokens = tokens_of([3, 5], config)
        encoder(tokens, masks)
        assert [prob for prob, _ in masks.drawn] == expected
        sizes = [len(mask) // len(tokens.input_ids) for prob, mask in masks.drawn]
        assert sizes[3] == (64 if config.model_type == "modernbert" else 32) and sizes[2] == 32  # inside the GeGLU


@pytest.mark.parametrize("name", KINDS)
def test_nothing_depends_on_tokens_that_belong_to_no_row(name: str, monkeypatch: Patch) -> None:
    found = []
    for multiple in (1, 32):
        encoder = same_encoder(reference_model(CONFIGURATIONS[name]))
        monkeypatch.setattr("ops.packed.rows_multiple", lambda *_, multiple=multiple: multiple)
        tokens = tokens_of([5, 9, 1, 3], encoder.config)
        assert len(tokens.input_ids) == {1: 18, 32: 32}[multiple]
        outputs = [encoder(tokens)[:18]]
        found.append((outputs[0], gradients(encoder, outputs)))
    (first, of_first), (second, of_second) = found
    assert_close([first], [second], 3e-6)
    assert_same_gradients(of_first, of_second)


# --------------------------------------------------------------------------------------------------- checkpoints


def write_tokenizer(folder: Path, kind: str, texts: Sequence[str] = (TEXT,), size: int = 320) -> Any:
    """A byte-level tokenizer of these models, trained on the texts and saved by transformers, which has it loaded."""
    is_roberta = kind == "roberta"
    special = (
        ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if is_roberta else ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
    )
    fast = Fast(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(texts, trainer)
    folder.mkdir(exist_ok=True)
    if is_roberta:  # as the published folders were at first
        model = json.loads(fast.to_str())["model"]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
        loaded = transformers.RobertaTokenizerFast.from_pretrained(folder)
    else:
        fast.normalizer = normalizers.NFC()
        fast.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
        )
        names = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token", "mask_token"), special, strict=True))
        loaded = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **names)
        loaded.save_pretrained(folder)
    return loaded


def write_model(folder: Path, kind: str) -> Any:
    """transformers' own checkpoint of a random model, with a tokenizer."""
    config = dataclasses.replace(CONFIGURATIONS[kind], vocab_size=320, initializer_range=STD)
    reference = reference_model(config, STD)
    reference.save_pretrained(folder)
    write_tokenizer(folder, config.model_type)
    return reference


@pytest.mark.parametrize("name", KINDS)
def test_checkpoints_go_both_ways(name: str, tmp_path: Path) -> None:
    reference = write_model(tmp_path / "theirs", name)
    encoder, lacking = load_bert(tmp_path / "theirs", generator())
    assert bool(lacking) == (name != "roberta") and encoder.config == read_bert_config(tmp_path / "theirs")
    model = MultitaskBert(encoder, Layout({"sst": LINEAR}, PAL, 1), generator())
    (tmp_path / "ours").mkdir()
    save_checkpoint(model, tmp_path / "theirs", tmp_path / "ours")
    again, info = transformers.AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(again) is type(reference) and not info["missing_keys"] and not info["mismatched_keys"]
    state = again.state_dict()
    assert all(torch.equal(state[key], value) for key, value in reference.state_dict().items())
    kept = {"vocab_size", "hidden_size", "num_hidden_layers", "rope_parameters", "layer_types", "local_attention"}
    ours, theirs = again.config.to_dict(), reference.config.to_dict()
    assert {key: ours.get(key) for key in kept} == {key: theirs.get(key) for key in kept}
    layout = read_layout(tmp_path / "ours")
    assert layout is not None
    found = load_model(tmp_path / "ours", layout, generator(7))
    assert found.new_parts == ()
    batch = Batch(torch.zeros(12), tokens=tokens_of(LENGTHS, encoder.config))
    assert torch.equal(found.model("sst", batch), model("sst", batch))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "xlnet"}, "model_type is 'xlnet', expected one of bert, roberta, modernbert"),
    ({"model_type": "modernbert", "norm_bias": True}, "norm_bias is True, expected False"),
    ({"model_type": "modernbert", "layer_types": ["sliding_attention"] * 2}, "layer_types is .* from the first"),
    (
        {"model_type": "modernbert", "rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
        "rope_type is 'yarn', expected 'default'",
    ),
    ({"model_type": "modernbert", "layer_types": 5}, "not the configuration of a modernbert"),
    ({"model_type": "modernbert", "rope_parameters": {"full_attention": [5]}}, "not the configuration of a modernbert"),
    ({"model_type": "modernbert", "norm_eps": -1}, "layer_norm_eps is -1, expected a number of at least 0"),
    ({"model_type": "roberta", "pad_token_id": 0}, "pad_token_id is 0, expected a whole number from 1 to"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_a_configuration_of_another_model_is_one_line(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=f"config.json: {message}") as error:
        read_bert_config(tmp_path)
    assert "\n" not in str(error.value)


def test_what_a_configuration_lacks_is_the_base_model_s() -> None:
    theirs = transformers.ModernBertConfig().to_dict()
    assert ModernBertConfig.from_dict(theirs) == ModernBertConfig.from_dict({}) == ModernBertConfig()
    assert RobertaConfig.from_dict({}).vocab_size == 50265
    old = {"global_attn_every_n_layers": 4, "global_rope_theta": 5.0, "local_rope_theta": 6.0}
    found = ModernBertConfig.from_dict(old)
    assert (found.global_attn_every_n_layers, found.global_rope_theta, found.local_rope_theta) == (4, 5.0, 6.0)


def test_a_configuration_says_how_long_rows_are_and_which_layers_see_them_whole() -> None:
    assert RobertaConfig.from_dict({"max_position_embeddings": 514}).num_positions == 512
    whole, near = "full_attention", "sliding_attention"
    for kinds, every in (([whole], 1), ([whole, whole], 1), ([whole, near, near], 3), ([whole, near, near, whole], 3)):
        assert ModernBertConfig.from_dict({"layer_types": kinds}).global_attn_every_n_layers == every


# ----------------------------------------------------------------------------------------------------- token ids


def hostile_texts(number: int) -> list[str]:
    """Words, punctuation, other scripts, combining marks, emoji, control signs, special tokens' names, nothing."""
    draw = random.Random(0)
    parts = [*TEXT.split(), "don't", "it's", "  ", "\t", "\n", "\u00a0", "\u200b", "\u200d", "\ufeff", "e\u0301", "É"]
    parts += [
        "北京",
        "ß",
        "İ",
        "😀",
        "👩‍👩‍👧",
        "\x00",
        "\x7f",
        "\ud7ff",
        "\U0010ffff",
        "<s>",
        "</s>",
        "<mask>",
        "<pad>",
    ]
    parts += ["[CLS]", "[SEP]", "[MASK]", "[PAD]", "Ġ", "Ċ", "''", "``", "1234567", "3.14", "a" * 60, ".", ",", "?!"]
    texts = []
    for _ in range(number):
        words = [
            draw.choice(parts) if draw.random() < 0.8 else chr(draw.randrange(0x2FFF)) for _ in range(draw.randrange(9))
        ]
        texts.append(draw.choice(["", " "]).join(words))
    return texts


@pytest.mark.parametrize("kind", ["roberta", "modernbert"])
def test_token_ids_of_10_000_hostile_texts_equal_those_of_transformers(kind: str, tmp_path: Path) -> None:
    texts = hostile_texts(10_000)
    theirs = write_tokenizer(tmp_path / "first", kind, texts[:500], 700)
    folders = [tmp_path / "first"]
    if kind == "roberta":  # with vocab.json and merges.txt alone, and with tokenizer.json
        theirs.save_pretrained(tmp_path / "second")
        folders.append(tmp_path / "second")
        assert not (folders[0] / "tokenizer.json").exists() and (folders[1] / "tokenizer.json").exists()
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    single = theirs(texts, truncation=True, max_length=50)["input_ids"]
    double = theirs([a for a, _ in pairs], [b for _, b in pairs])["input_ids"]
    for folder in folders:
        ours = Tokenizer(folder, 50)
        found = ours.encode([(text,) for text in texts])
        assert found.ids.tolist() == [token for row in single for token in row]
        assert found.lengths.tolist() == [len(row) for row in single]
        whole = Tokenizer(folder, 5000)
        assert whole.encode(pairs).ids.tolist() == [token for row in double for token in row]
        assert [whole.num_tokens(pair) for pair in pairs] == [len(row) for row in double]
        assert ours.special_ids() == {
            name: theirs.convert_tokens_to_ids(getattr(theirs, f"{name.lower()}_token"))
            for name in ("PAD", "UNK", "CLS", "SEP", "MASK")
        }
        siamese = Tokenizer(folder, 50, is_siamese=True).encode(pairs)
        assert siamese.ids.tolist() == found.ids.tolist()
        assert siamese.firsts.tolist() == found.lengths[::2].tolist()


# ----------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module", params=KINDS)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Callable[..., Path]]:
    """A checkpoint folder, and a short run of flags on it."""
    folder = tmp_path_factory.mktemp("run")
    write_model(folder / "model", request.param)
    data = write_data(folder / "data")

    def train(name: str, flags: str, status: int = 0) -> Path:
        out = folder / name
        base = f"--model {folder / 'model'} --data {data} --out {out} --device cpu --no-tensorboard --cache off"
        sizes = "--pretrain_epochs 1 --steps_per_epoch 3 --batch_size 6"
        sizes += "" if "--option" in flags else " --epochs 1 --lr 1e-3"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(running.Run, "draw_plots", lambda run, results: None)
            assert multitask_classifier.main([*base.split(), *sizes.split(), *flags.split()]) == status
        return out

    return folder / "model", train


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_everything_works_together_and_the_frozen_stage_leaves_the_encoder_as_it_is(
    trained: tuple[Path, Callable[..., Path]], capsys: Capture
) -> None:
    model, train = trained
    prefix = read_bert_config(model).prefix
    flags = "--pcgrad --smart --bregman --rdrop --pal --copy_top_layers 1 --head routing para=lstm --routing_capsules 3"
    out = train("everything", f"{flags} --average ema")
    before, after = weights(model), weights(out / "best")
    moved = [name for name, value in before.items() if not torch.equal(after[f"{prefix}.{name}"], value)]
    assert len(moved) > len(before) / 2
    frozen = weights(train("frozen", "--option pretrain --head lstm sst=linear") / "best")
    assert all(torch.equal(frozen[f"{prefix}.{name}"], value) for name, value in before.items())
    mlm = weights(train("mlm", "--mlm_epochs 1 --pairs siamese --pooling mean") / "best")
    name = next(name for name in before if "embeddings.weight" in name)
    assert not torch.equal(mlm[f"{prefix}.{name}"], before[name])
    capsys.readouterr()
    texts = out.parent / "texts"
    texts.write_text("a good film\na bad one\n")
    assert multitask_classifier.main(f"--option predict --checkpoint {out} --task sst --input {texts}".split()) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert multitask_classifier.main(f"--model {model} --max_length 67 --out {out.parent / 'no'}".split()) == 2
    assert "positions, expected no more" in capsys.readouterr().err


def test_a_resumed_run_equals_the_whole_run(trained: tuple[Path, Callable[..., Path]], monkeypatch: Patch) -> None:
    _, train = trained
    whole = train("whole", "--pal --head lstm --save_every 1")
    original, calls = running.Run.save, iter(range(100))

    def save(run: running.Run, *arguments: Any) -> None:
        original(run, *arguments)
        if next(calls) == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running.Run, "save", save)
        train("cut", "--pal --head lstm --save_every 1", 128 + 2)
    cut = whole.parent / "cut"
    assert not (cut / "results.json").exists()
    assert multitask_classifier.main(["--resume", str(cut)]) == 0
    for name in ("best", "last"):
        first, second = weights(whole / name), weights(cut / name)
        assert first.keys() == second.keys() and all(torch.equal(first[key], value) for key, value in second.items())


def test_a_masked_head_comes_from_roberta_s(tmp_path: Path) -> None:
    from mlm import make_masked_head

    theirs = transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(**{**CONFIGURATIONS["roberta"].to_dict(), "bos_token_id": 2})
    )
    randomize_vectors(theirs, 1)
    theirs.save_pretrained(tmp_path)
    head, is_new = make_masked_head(read_bert_config(tmp_path), tmp_path, 0)
    assert not is_new
    states = torch.randn(5, 32, generator=generator(1))
    encoder, _ = load_bert(tmp_path, generator())
    assert_close([head(states, encoder.word_embeddings.weight)], [theirs.lm_head(states)])
    initialize(encoder, STD, generator())
