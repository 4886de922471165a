"""Heads, parts, parameters, and checkpoints of the multi-task model."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from bert import CheckpointError, DropoutMasks, PackedTokens, read_config, to_huggingface
from datasets import Batch
from helpers import (
    RecordedMasks,
    generator,
    random_batch,
    random_tokens,
    randomize_vectors,
    tiny_config,
    tiny_encoder,
    tiny_model,
)
from model import (
    FrozenEncoder,
    Head,
    Layout,
    MultitaskBert,
    checkpoint_folder,
    load_model,
    parameter_counts,
    read_layout,
    save_checkpoint,
)
from pal import PalConfig
from tasks import TASKS

ALL = tuple(TASKS)
PAL = PalConfig.for_encoder(tiny_config())


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A folder with a tokenizer's files."""
    folder = tmp_path / "words"
    folder.mkdir()
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def saved(model: MultitaskBert, words: Path, name: str = "saved") -> Path:
    folder = words.parent / name
    folder.mkdir()
    save_checkpoint(model, words, folder)
    return folder


def trained(model: MultitaskBert, seed: int = 40) -> MultitaskBert:
    """The model with every parameter moved, as training does it: also the ones that start at zero."""
    noise = generator(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.05)
    return model


@torch.no_grad()
def outputs(model: MultitaskBert, tasks: Sequence[str] = ALL) -> list[Tensor]:
    return [model(task, random_batch(task, 6)) for task in tasks]


def all_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# -------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("num_hidden", [0, 1, 3])
def test_a_head_is_dropout_and_linear_behind_its_hidden_layers(num_hidden: int) -> None:
    config = tiny_config(hidden_dropout_prob=0.4)
    head = Head(config, 5, num_hidden)
    randomize_vectors(head, 3)
    pooled, masks = torch.randn(7, 32, generator=generator(1)), RecordedMasks(2)
    logits = head(pooled, masks)
    assert [prob for prob, _ in masks.drawn] == [0.4] * (num_hidden + 1)
    assert [tuple(layer.weight.shape) for layer in head.hidden] == [(32, 32)] * num_hidden
    expected, plain = pooled, pooled
    for layer, (_, mask) in zip(head.hidden, masks.drawn, strict=False):
        expected = (expected * mask.view(7, 32) @ layer.weight.T + layer.bias).clamp(min=0)
        plain = (plain @ layer.weight.T + layer.bias).clamp(min=0)
    expected = expected * masks.drawn[-1][1].view(7, 32) @ head.output.weight.T + head.output.bias
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(head(pooled, None), plain @ head.output.weight.T + head.output.bias)


def test_heads_read_the_pooled_output_and_have_the_widths_of_their_tasks() -> None:
    model = tiny_model(head_layers=1)
    for task in ALL:
        batch = random_batch(task, 6)
        assert batch.tokens is not None
        pooled = model.encoder.pool(model.encoder(batch.tokens)[batch.tokens.first_tokens])
        logits = model(task, batch)
        torch.testing.assert_close(logits, model.heads[task](pooled, None))
        assert logits.shape == (6, TASKS[task].output.num_outputs)


def test_training_applies_dropout_in_encoder_and_head_and_evaluation_applies_none() -> None:
    model, batch = tiny_model(), random_batch("sst", 6)
    assert torch.equal(model("sst", batch), model("sst", batch))
    assert not torch.equal(model("sst", batch, DropoutMasks(1)), model("sst", batch))
    masks = RecordedMasks(1)
    model("sst", batch, masks)
    assert masks.drawn[-1][1].shape == (6 * 32,)
    assert len(masks.drawn) == 1 + 3 * 2 + 1


def test_new_heads_depend_on_the_generator_only() -> None:
    first, second, third = (MultitaskBert(tiny_encoder(), Layout(ALL, 1), generator(seed)) for seed in (1, 1, 2))
    torch.randn(5)
    assert all_equal(list(first.heads.state_dict().values()), list(second.heads.state_dict().values()))
    for task in ALL:
        assert not torch.equal(first.heads[task].output.weight, third.heads[task].output.weight)
        assert first.heads[task].hidden[0].weight.std().item() == pytest.approx(0.02, rel=0.2)
        assert not first.heads[task].output.bias.any()


@torch.no_grad()
def test_a_prediction_does_not_depend_on_the_batch() -> None:
    model = trained(tiny_model(adapters=PAL, head_layers=1))
    tokens = random_tokens(9)
    lengths = tokens.layout.lengths.tolist()
    rows = [part.tolist() for part in tokens.input_ids.split(lengths)]
    types = [part.tolist() for part in tokens.token_type_ids.split(lengths)]
    labels = torch.zeros(9)
    for task in ALL:
        together = model(task, Batch(range(9), labels, tokens=tokens))
        for i in range(9):
            alone = Batch([i], labels[:1], tokens=PackedTokens.from_rows([rows[i]], [types[i]]))
            torch.testing.assert_close(model(task, alone)[0], together[i], rtol=0, atol=1e-5)


def test_a_frozen_encoder_gives_the_logits_of_the_whole_model() -> None:
    model = tiny_model(adapters=PAL, head_layers=1)
    for task in ALL:
        batch = random_batch(task, 5)
        features = Batch(batch.rows, batch.labels, features=model.pooled(task, batch).detach())
        assert torch.equal(FrozenEncoder(model)(task, features), model(task, batch))
        masked = FrozenEncoder(model)(task, features, DropoutMasks(4))
        assert torch.equal(masked, model.predict(task, model.pooled(task, batch), DropoutMasks(4)))
        assert not torch.equal(masked, model(task, batch))


# --------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("adapters", [None, PAL])
def test_every_parameter_is_shared_or_one_task_s(adapters: PalConfig | None) -> None:
    model = tiny_model(adapters=adapters, head_layers=1)
    groups = [model.shared_parameters(), *(model.task_parameters(task) for task in ALL)]
    names = [name for group in groups for name in group]
    named = dict(model.named_parameters())
    assert sorted(names) == sorted(named) and len(set(names)) == len(names)
    assert all(group[name] is named[name] for group in groups for name in group)
    for task, group in zip(ALL, groups[1:], strict=True):
        assert all(name.split(".")[1] == task for name in group)
        assert any(name.startswith("adapters.") for name in group) == (adapters is not None)


def test_only_a_task_s_own_head_and_adapter_have_a_gradient_from_it() -> None:
    model = trained(tiny_model(adapters=PAL, head_layers=1))
    model("para", random_batch("para", 4)).square().sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    embeddings_of_absent = {"encoder.word_embeddings.weight"}
    assert moved | embeddings_of_absent == {*model.shared_parameters(), *model.task_parameters("para")}


def test_segments_are_embeddings_layers_and_pooler_in_order() -> None:
    model = tiny_model(num_hidden_layers=3)
    sizes, names = model.segment_sizes(), list(model.shared_parameters())
    assert sizes == [5, 12, 12, 12, 2]
    first, *layers, last = [set(names[sum(sizes[:i]) : sum(sizes[: i + 1])]) for i in range(len(sizes))]
    assert {name.split(".")[1].split("_")[-1] for name in first} == {"embeddings", "norm"}
    assert last == {"encoder.pooler.weight", "encoder.pooler.bias"}
    for i, layer in enumerate(layers):
        assert all(name.startswith(f"encoder.layers.{i}.") for name in layer)


def test_parameter_counts_add_up() -> None:
    model = tiny_model(("sst", "sts"), adapters=PAL, head_layers=1)
    counts = parameter_counts(model)
    alone = [tiny_model((task,), adapters=PAL, head_layers=1) for task in ("sst", "sts")]
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["shared"] == sum(p.numel() for p in model.encoder.parameters())
    assert counts["separate_models"] == sum(p.numel() for single in alone for p in single.parameters())
    assert counts["per_task"] == sum(p.numel() for p in alone[0].parameters()) - counts["shared"]


def test_a_duplicate_has_parameters_of_its_own() -> None:
    model = tiny_model()
    before, copy = outputs(model), model.duplicate()
    assert all_equal(outputs(copy), before)
    trained(copy)
    assert all_equal(outputs(model), before)


# -------------------------------------------------------------------------------------------------- checkpoints


@torch.no_grad()
def test_transformers_reads_the_saved_encoder(words: Path) -> None:
    model = trained(tiny_model(adapters=PAL, head_layers=1, hidden_act="gelu_new", hidden_dropout_prob=0.2))
    folder = saved(model, words)
    reference, info = transformers.BertModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert reference.config.hidden_dropout_prob == 0.2
    tokens = random_tokens(1, seed=3)
    output = reference.eval()(tokens.input_ids[None], token_type_ids=tokens.token_type_ids[None])
    hidden_states = model.encoder(tokens)
    torch.testing.assert_close(hidden_states, output.last_hidden_state[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(
        model.encoder.pool(hidden_states[tokens.first_tokens]), output.pooler_output, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("head_layers", [0, 2])
@pytest.mark.parametrize("kind", [None, "attention", "low_rank"])
def test_a_saved_model_loads_bit_identical(kind: str | None, head_layers: int, words: Path) -> None:
    adapters = None if kind is None else PalConfig.for_encoder(tiny_config(), kind)
    model = trained(tiny_model(adapters=adapters, head_layers=head_layers))
    folder = saved(model, words)
    layout = read_layout(folder)
    assert layout == model.layout
    loaded = load_model(folder, layout, generator(77))
    assert loaded.new_parts == ()
    assert all_equal(list(loaded.model.state_dict().values()), list(model.state_dict().values()))
    assert list(loaded.model.state_dict()) == list(model.state_dict())
    assert all_equal(outputs(loaded.model), outputs(model))
    assert loaded.model.encoder.config == model.encoder.config


def test_a_loaded_model_is_float32_on_the_cpu_and_trainable(words: Path) -> None:
    model = tiny_model()
    loaded = load_model(saved(model, words), model.layout, generator()).model
    assert {(p.device.type, p.dtype, p.requires_grad) for p in loaded.parameters()} == {("cpu", torch.float32, True)}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_checkpoint_written_on_a_gpu_loads_on_the_cpu(words: Path) -> None:
    model = tiny_model(adapters=PAL)
    before = outputs(model)
    loaded = load_model(saved(model.cuda(), words), model.layout, generator()).model
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    assert all_equal(outputs(loaded), before)


def test_a_checkpoint_holds_safetensors_json_and_the_tokenizer_and_nothing_else(words: Path) -> None:
    folder = saved(tiny_model(), words)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer_config.json", "vocab.txt"]
    assert (folder / "vocab.txt").read_bytes() == (words / "vocab.txt").read_bytes()
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bert"


def test_adding_adapters_to_a_fine_tuned_checkpoint_starts_from_the_identical_output(words: Path) -> None:
    plain = trained(tiny_model(head_layers=1))
    folder = saved(plain, words)
    assert read_layout(folder) == Layout(ALL, 1, None)
    for kind in ("attention", "low_rank"):
        adapters = PalConfig.for_encoder(tiny_config(), kind)
        loaded = load_model(folder, Layout(ALL, 1, adapters), generator())
        assert loaded.new_parts == tuple(f"adapter {task}" for task in ALL)
        assert all_equal(outputs(loaded.model), outputs(plain))
        assert any(p.any() for p in loaded.model.adapters.parameters())


def test_a_task_that_the_checkpoint_lacks_gets_new_parts_and_the_others_keep_theirs(words: Path) -> None:
    model = trained(tiny_model(("sst",), adapters=PAL))
    loaded = load_model(saved(model, words), Layout(("sst", "sts"), 0, PAL), generator())
    assert loaded.new_parts == ("head sts", "adapter sts")
    assert all_equal(outputs(loaded.model, ["sst"]), outputs(model, ["sst"]))
    assert loaded.model.heads["sts"].output.weight.any()
    assert not loaded.model.adapters["sts"].up[0].weight.any()


def test_some_tasks_of_a_checkpoint_load_without_the_others(words: Path) -> None:
    model = trained(tiny_model(adapters=PAL))
    loaded = load_model(saved(model, words), Layout(("sts",), 0, PAL), generator())
    assert loaded.new_parts == () and list(loaded.model.heads) == ["sts"]
    assert all_equal(outputs(loaded.model, ["sts"]), outputs(model, ["sts"]))


def test_a_plain_encoder_gets_new_heads_and_adapters(tmp_path: Path) -> None:
    encoder = tiny_encoder()
    tensors = to_huggingface(encoder)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(encoder.config.to_dict()))
    loaded = load_model(tmp_path, Layout(("sst", "para"), 0, PAL), generator())
    assert loaded.new_parts == ("head sst", "head para", "adapters")
    assert all_equal(list(loaded.model.encoder.state_dict().values()), list(encoder.state_dict().values()))
    save_file({n: v for n, v in tensors.items() if not n.startswith("pooler")}, tmp_path / "model.safetensors")
    assert load_model(tmp_path, Layout(("sst",)), generator()).new_parts == ("pooler", "head sst")


def test_loading_never_touches_the_global_generator(words: Path) -> None:
    folder = saved(tiny_model(), words)
    before = torch.get_rng_state()
    load_model(folder, Layout(ALL, 0, PAL), generator())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(ALL, 2, PAL), "its heads have 1 hidden layers, --head_layers is 2"),
        (Layout(ALL, 1, None), "it holds projected attention layers .*, the flags ask for no adapters"),
        (Layout(ALL, 1, PalConfig("attention", 10, 2, 2)), "it holds projected attention layers .*'size': 10"),
        (Layout(ALL, 1, PalConfig.for_encoder(tiny_config(), "low_rank")), "the flags ask for .*'low_rank'"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused(layout: Layout, message: str, words: Path) -> None:
    folder = saved(tiny_model(adapters=PAL, head_layers=1), words)
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(folder, layout, generator())
    assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value)


def test_heads_of_another_depth_do_not_matter_where_none_of_them_is_wanted(words: Path) -> None:
    folder = saved(tiny_model(("sst",), head_layers=1), words)
    assert load_model(folder, Layout(("sts",), 0), generator()).new_parts == ("head sts",)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("heads.sst.output.weight", r"heads.sst.output.weight is {found}, expected \(5, 32\)"),
        ("adapters.sts.up.0.bias", r"adapters.sts.up.0.bias is {found}, expected \(32,\)"),
        ("bert.encoder.layer.0.output.dense.bias", "layer.0.output.dense.bias"),
    ],
)
def test_missing_and_misshapen_tensors_are_refused(name: str, message: str, words: Path) -> None:
    model = tiny_model(adapters=PAL)
    folder = saved(model, words)
    tensors = load_file(folder / "model.safetensors")
    for changed, found in (({}, "missing"), ({name: torch.zeros(3)}, r"of shape \(3,\)")):
        save_file({**{n: v for n, v in tensors.items() if n != name}, **changed}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=message.format(found=found)):
            load_model(folder, model.layout, generator())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": {"sst": 6}}, "head 'sst' with 6 outputs, expected among sst"),
        ({"tasks": {"cola": 1}}, "head 'cola' with 1 outputs, expected among sst"),
        ({"tasks": ["sst"]}, "multitask_bert is not of format 1"),
        ({"adapters": {"width": 3}}, "multitask_bert is not of format 1"),
        ({"head_layers": None}, "multitask_bert is not of format 1"),
    ],
)
def test_a_description_that_the_program_does_not_know_is_refused(
    change: dict[str, object], message: str, words: Path
) -> None:
    folder = saved(tiny_model(), words)
    values = read_config(folder)
    values["multitask_bert"] = {**values["multitask_bert"], **change}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message) as error:
        read_layout(folder)
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


def test_a_run_directory_names_its_best_checkpoint(tmp_path: Path) -> None:
    assert checkpoint_folder(tmp_path) == tmp_path
    (tmp_path / "best").mkdir()
    assert checkpoint_folder(tmp_path) == tmp_path / "best"
    with pytest.raises(CheckpointError, match="no such directory, expected a run or a checkpoint folder"):
        checkpoint_folder(tmp_path / "absent")


def test_a_checkpoint_whose_replacement_was_cut_off_is_read_where_it_is(tmp_path: Path) -> None:
    for name in ("best.new", "last.new", "best.old", "best.tmp"):
        (tmp_path / name).mkdir()
    assert checkpoint_folder(tmp_path) == checkpoint_folder(tmp_path / "best") == tmp_path / "best.new"
    assert checkpoint_folder(tmp_path / "last") == tmp_path / "last.new"
    (tmp_path / "best").mkdir()  # resuming goes on from it, too
    assert checkpoint_folder(tmp_path) == checkpoint_folder(tmp_path / "best") == tmp_path / "best"
    assert {path.name for path in tmp_path.iterdir()} == {"best", "best.new", "last.new", "best.old", "best.tmp"}
