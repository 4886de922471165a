"""MultitaskBert: one encoder, one head a task, and, where wanted, adapters a task. Reads and writes checkpoint folders.

A checkpoint folder is a Hugging Face BERT checkpoint with more in it: `transformers.BertModel.from_pretrained` reads
the encoder, and config.json says under "multitask_bert" which heads and adapters the other tensors are.

Shape letters: N packed tokens, B rows, D hidden, K outputs.
"""

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from bert import (
    Bert,
    BertConfig,
    CheckpointError,
    DropoutMasks,
    LayerAdapter,
    Uninitialized,
    dropout,
    empty_bert,
    initialize,
    load_bert,
    load_huggingface,
    read_config,
    read_tensors,
    to_huggingface,
)
from datasets import Batch, TokenizedRows, Tokenizer, by_batches
from pal import PalConfig, make_adapters
from tasks import TASKS

FORMAT = 1
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


class TaskModel(Protocol):
    """What training and evaluation need of a model."""

    def __call__(
        self, task: str, batch: Batch, masks: DropoutMasks | None = None, perturbation: Tensor | None = None
    ) -> Tensor:
        """Logits (B, K). masks: for training; None for evaluation. perturbation: (N, D) on the input embeddings."""
        ...


class Head(nn.Module):
    """Dropout and a linear layer over the pooled output, behind `num_hidden` layers of ReLU and dropout."""

    def __init__(self, config: BertConfig, num_outputs: int, num_hidden: int) -> None:
        super().__init__()
        self.dropout_prob = config.hidden_dropout_prob
        self.hidden = nn.ModuleList(nn.Linear(config.hidden_size, config.hidden_size) for _ in range(num_hidden))
        self.output = nn.Linear(config.hidden_size, num_outputs)

    def forward(self, pooled: Tensor, masks: DropoutMasks | None) -> Tensor:
        """pooled (B, D) -> logits (B, K)."""
        for layer in self.hidden:
            pooled = torch.relu(layer(dropout(pooled, self.dropout_prob, masks)))
        return self.output(dropout(pooled, self.dropout_prob, masks))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Layout:
    """Which heads and adapters a model has."""

    tasks: tuple[str, ...]
    head_layers: int = 0
    adapters: PalConfig | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "tasks": {task: TASKS[task].output.num_outputs for task in self.tasks},
            "head_layers": self.head_layers,
            "adapters": None if self.adapters is None else self.adapters.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> "Layout":
        """Raises CheckpointError if the values are not of this format or name tasks that the program does not know."""
        try:
            for task, num_outputs in values["tasks"].items():
                if task not in TASKS or TASKS[task].output.num_outputs != num_outputs:
                    known = ", ".join(f"{t.name} ({t.output.num_outputs})" for t in TASKS.values())
                    raise CheckpointError(f"{where}: head {task!r} with {num_outputs} outputs, expected among {known}")
            adapters = values["adapters"]
            return cls(
                tuple(values["tasks"]), int(values["head_layers"]), None if adapters is None else PalConfig(**adapters)
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{where}: multitask_bert is not of format {FORMAT} ({error})") from None


class MultitaskBert(nn.Module):
    """An encoder that the tasks share, and of each task a head and, with adapters, a projected attention."""

    def __init__(self, encoder: Bert, layout: Layout, generator: torch.Generator) -> None:
        """generator: for the new heads and adapters, each initialized in the order of the tasks."""
        super().__init__()
        self.encoder = encoder
        self.layout = layout
        config = encoder.config
        outputs = {task: TASKS[task].output.num_outputs for task in layout.tasks}
        with Uninitialized():
            self.heads = nn.ModuleDict({t: Head(config, k, layout.head_layers) for t, k in outputs.items()})
        initialize(self.heads, config.initializer_range, generator)
        self.adapters = nn.ModuleDict()
        if layout.adapters is not None:
            self.adapters = make_adapters(layout.adapters, config, layout.tasks, generator)

    def forward(
        self, task: str, batch: Batch, masks: DropoutMasks | None = None, perturbation: Tensor | None = None
    ) -> Tensor:
        """Logits (B, K) of a task."""
        return self.predict(task, self.pooled(task, batch, masks, perturbation), masks)

    def pooled(
        self, task: str, batch: Batch, masks: DropoutMasks | None = None, perturbation: Tensor | None = None
    ) -> Tensor:
        """(B, D) what the head of a task reads."""
        assert batch.tokens is not None, "a batch of features is for the heads alone"
        states = self.encoder(batch.tokens, masks, self.adapter(task), perturbation, first_only=True)
        return self.encoder.pool(states)

    def predict(self, task: str, pooled: Tensor, masks: DropoutMasks | None = None) -> Tensor:
        """Logits (B, K) of a task's head from (B, D)."""
        return self.heads[task](pooled, masks)  # type: ignore[no-any-return]

    def adapter(self, task: str) -> LayerAdapter | None:
        """The task's addition to each encoder layer, or None for a model without adapters."""
        return cast(LayerAdapter, self.adapters[task]) if self.layout.adapters is not None else None

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """By name, the parameters that all tasks train."""
        return {f"encoder.{name}": parameter for name, parameter in self.encoder.named_parameters()}

    def task_parameters(self, task: str) -> dict[str, nn.Parameter]:
        """By name, the parameters of one task's head and adapter."""
        parts = {f"heads.{task}": self.heads[task]}
        if task in self.adapters:
            parts[f"adapters.{task}"] = self.adapters[task]
        return {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}

    def sparse_embedding_gradient(self, wanted: bool) -> str | None:
        """Whether the word embeddings' gradient is added to `grad` row by row, not as a matrix of the whole vocabulary.

        `grad` must be there then, as it is for parameters that a `TaskGradients` points to. Returns the name that the
        parameter has among the shared ones if it is wanted, else None.
        """
        self.encoder.word_embeddings.sparse = wanted
        return "encoder.word_embeddings.weight" if wanted else None

    def segment_sizes(self) -> list[int]:
        """How many tensors of `shared_parameters` belong to the embeddings, to each layer and to the pooler."""
        names = [name.removeprefix("encoder.") for name in self.shared_parameters()]
        parts = [".".join(name.split(".")[:2]) if name.startswith("layers.") else name.split("_")[0] for name in names]
        embeddings = [part for part in parts if not part.startswith(("layers.", "pooler"))]
        layers = [parts.count(f"layers.{i}") for i in range(self.encoder.config.num_hidden_layers)]
        return [len(embeddings), *layers, len(parts) - len(embeddings) - sum(layers)]

    def duplicate(self) -> "MultitaskBert":
        """A copy with parameters of its own."""
        return copy.deepcopy(self)


class FrozenEncoder:
    """The heads of a model on features computed before: what is trained and evaluated while the encoder is frozen."""

    def __init__(self, model: MultitaskBert) -> None:
        self.model = model

    def __call__(
        self, task: str, batch: Batch, masks: DropoutMasks | None = None, perturbation: Tensor | None = None
    ) -> Tensor:
        assert batch.features is not None and perturbation is None, "a frozen encoder has features only"
        return self.model.predict(task, batch.features, masks)


def parameter_counts(model: MultitaskBert) -> dict[str, int]:
    """Numbers of parameters: total, shared, per task, and what single-task models of the same encoder would hold."""
    shared = sum(p.numel() for p in model.shared_parameters().values())
    of_tasks = {task: sum(p.numel() for p in model.task_parameters(task).values()) for task in model.layout.tasks}
    return {
        "total": shared + sum(of_tasks.values()),
        "shared": shared,
        "per_task": max(of_tasks.values()),
        "separate_models": shared * len(of_tasks) + sum(of_tasks.values()),
    }


# ------------------------------------------------------------------------------------------------ checkpoints


def save_checkpoint(model: MultitaskBert, tokenizer_folder: Path, folder: Path) -> None:
    """Writes model.safetensors, config.json and the tokenizer's files into an existing folder."""
    from safetensors.torch import save_file

    tensors = {f"bert.{name}": value for name, value in to_huggingface(model.encoder).items()}
    for part, module in (("heads", model.heads), ("adapters", model.adapters)):
        tensors.update({f"{part}.{name}": value for name, value in module.state_dict().items()})
    host = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    save_file(host, folder / "model.safetensors", metadata={"format": "pt"})
    values = {**model.encoder.config.to_dict(), "multitask_bert": model.layout.to_dict()}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    for name in TOKENIZER_FILES:
        if (tokenizer_folder / name).is_file() and not (folder / name).exists():
            shutil.copyfile(tokenizer_folder / name, folder / name)


def checkpoint_folder(path: Path) -> Path:
    """The checkpoint that a path names: the best one of a run directory, or the folder itself.

    A process killed while it replaced a checkpoint may have left the whole new one as `<name>.new` and none under its
    name (run_record.replace_folder); it is read where it is.
    """
    for folder in (path / "best", path / "best.new", path, path.with_name(f"{path.name}.new")):
        if folder.is_dir():
            return folder
    raise CheckpointError(f"{path}: no such directory, expected a run or a checkpoint folder")


def read_layout(folder: Path) -> Layout | None:
    """The heads and adapters in a checkpoint folder, or None for a plain encoder."""
    values = read_config(folder).get("multitask_bert")
    return None if values is None else Layout.from_dict(values, str(folder / "config.json"))


@dataclass(frozen=True)
class Loaded:
    """A model from a checkpoint, and which parts of it the checkpoint did not hold and had to be made new."""

    model: MultitaskBert
    new_parts: tuple[str, ...]


def load_model(folder: Path, layout: Layout, generator: torch.Generator) -> Loaded:
    """The model of a layout with all that a checkpoint folder holds for it.

    A plain Hugging Face BERT checkpoint gives the encoder. Heads of the layout that the checkpoint lacks are new; so
    are adapters, if it has none at all: the model then predicts exactly as before. Raises CheckpointError if the
    checkpoint holds a head or adapter of another shape.
    """
    saved = read_layout(folder)
    if saved is None:
        encoder, lacking = load_bert(folder, generator)
        new = (*(["pooler"] if lacking else []), *(f"head {t}" for t in layout.tasks))
        return Loaded(MultitaskBert(encoder, layout, generator), (*new, *(["adapters"] if layout.adapters else [])))
    _check_compatible(saved, layout, folder)
    encoder = empty_bert(BertConfig.from_dict(read_config(folder), str(folder / "config.json")))
    tensors = read_tensors(folder)
    load_huggingface(encoder, tensors, str(folder))
    model = MultitaskBert(encoder, layout, generator)
    new_parts = [f"head {task}" for task in layout.tasks if task not in saved.tasks]
    if layout.adapters is not None:
        new_parts += [f"adapter {task}" for task in layout.tasks if saved.adapters is None or task not in saved.tasks]
    for part, module in (("heads", model.heads), ("adapters", model.adapters)):
        _load_parts(part, module, tensors, saved, folder)
    return Loaded(model, tuple(new_parts))


def _check_compatible(saved: Layout, layout: Layout, folder: Path) -> None:
    if saved.head_layers != layout.head_layers and set(saved.tasks) & set(layout.tasks):
        raise CheckpointError(
            f"{folder}: its heads have {saved.head_layers} hidden layers, --head_layers is {layout.head_layers}"
        )
    if saved.adapters is not None and saved.adapters != layout.adapters:
        found = saved.adapters.to_dict()
        wanted = "no adapters" if layout.adapters is None else str(layout.adapters.to_dict())
        raise CheckpointError(f"{folder}: it holds projected attention layers {found}, the flags ask for {wanted}")


def _load_parts(part: str, module: nn.ModuleDict, tensors: Mapping[str, Tensor], saved: Layout, folder: Path) -> None:
    has_part = part == "heads" or saved.adapters is not None
    for name, target in module.state_dict().items():
        if not has_part or name.split(".")[0] not in saved.tasks:
            continue
        value = tensors.get(f"{part}.{name}")
        if value is None or value.shape != target.shape:
            found = "missing" if value is None else f"of shape {tuple(value.shape)}"
            raise CheckpointError(f"{folder}: {part}.{name} is {found}, expected {tuple(target.shape)}")
        target.copy_(value)


# ------------------------------------------------------------------------------------------------- predictions

TEXTS_AT_A_TIME = 4096  # among so many texts batches of similar length are formed


class Prediction(NamedTuple):
    """A text's prediction in the units of the label, and the probability of that class; None on a scale."""

    value: float
    probability: float | None


class Predictor:
    """A trained model for new texts; `load` makes one from a run."""

    def __init__(
        self,
        model: MultitaskBert,
        tokenizer: Tokenizer,
        device: torch.device,
        batch_size: int,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """batch_size: texts of one forward pass. autocast: the context of a forward pass, for mixed precision."""
        self.model, self.tokenizer, self.device = model.to(device), tokenizer, device
        self.batch_size, self.autocast = batch_size, autocast

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that the model has heads for."""
        return self.model.layout.tasks

    def predict(
        self, task: str, texts: Sequence[str] | Sequence[tuple[str, ...]], probabilities: bool = False
    ) -> list[Any]:
        """The prediction for each text, in order: a class as an int, a score as a float.

        texts: strings, or pairs of strings where the task compares two. probabilities: pairs (class, its probability)
        instead. Raises ValueError for a task without a head, a text that is none, and probabilities of a score.
        """
        if task not in self.tasks:
            raise ValueError(f"task {task!r}: the checkpoint has heads for {', '.join(self.tasks)}")
        if isinstance(texts, str):
            raise ValueError(f"texts is the string {texts!r}, expected a list")
        is_scale = TASKS[task].output.num_classes is None
        if is_scale and probabilities:
            raise ValueError(f"task {task!r}: a score has no probability")
        rows = [_texts_of_row(i, row, len(TASKS[task].text_columns)) for i, row in enumerate(texts)]
        found = self.predictions(task, rows)
        if is_scale:
            return [row.value for row in found]
        return [(int(row.value), row.probability) if probabilities else int(row.value) for row in found]

    def predictions(self, task: str, rows: Sequence[tuple[str, ...]]) -> list[Prediction]:
        """Of each row of texts its prediction, decoded as in the prediction files."""
        parts = [rows[start : start + TEXTS_AT_A_TIME] for start in range(0, len(rows), TEXTS_AT_A_TIME)]
        return [prediction for part in parts for prediction in self._predictions(task, part)]

    def _predictions(self, task: str, rows: Sequence[tuple[str, ...]]) -> list[Prediction]:
        unknown = np.full(len(rows), np.nan, np.float32)
        tokenized = TokenizedRows(TASKS[task], [""] * len(rows), unknown, self.tokenizer.encode(rows), self.device)

        def compute(index: np.ndarray) -> Tensor:
            with self.autocast():
                return self.model(task, tokenized.batch(index))  # type: ignore[no-any-return]

        logits = by_batches(compute, tokenized, self.batch_size).cpu()  # (R, K)
        values = TASKS[task].output.decode(logits)
        probabilities = TASKS[task].output.probabilities(logits)
        if probabilities is None:
            return [Prediction(value, None) for value in values.tolist()]
        chosen = probabilities.gather(1, values.long()[:, None])[:, 0]
        return [Prediction(*pair) for pair in zip(values.tolist(), chosen.tolist(), strict=True)]


def _texts_of_row(number: int, row: object, num_texts: int) -> tuple[str, ...]:
    """A row of `Predictor.predict` as its texts. Raises ValueError if it is not so many strings."""
    texts = (row,) if isinstance(row, str) else tuple(row) if isinstance(row, tuple | list) else ()
    if len(texts) != num_texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"texts[{number}] is {row!r}, expected {'a string' if num_texts == 1 else 'a pair of strings'}"
        )
    if not any(text.strip() for text in texts):
        raise ValueError(f"texts[{number}] is {row!r}, expected some text")
    return texts


def load(
    path: str | Path,
    device: str | torch.device = "auto",
    batch_size: int = 64,
    max_length: int = 0,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Predictor:
    """The model of a run or checkpoint folder, ready to predict.

    device: "auto" takes CUDA where there is a GPU. batch_size: texts of one forward pass. max_length: tokens of a row
    at most; 0: as in the run that the checkpoint is part of, else as many as the model has positions. autocast: the
    context of a forward pass, for mixed precision. Raises CheckpointError if there are no trained heads.
    """
    folder = checkpoint_folder(Path(path))
    layout = read_layout(folder)
    if layout is None:
        raise CheckpointError(f"{folder}: an encoder without heads, expected the checkpoint of a run")
    model = load_model(folder, layout, torch.Generator()).model
    max_positions = model.encoder.config.max_position_embeddings
    tokenizer = Tokenizer(folder, min(max_length or _max_length_of_run(folder) or max_positions, max_positions))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Predictor(model, tokenizer, torch.device(device), batch_size, autocast)


def _max_length_of_run(folder: Path) -> int:
    """The `--max_length` of the run whose checkpoint this is, or 0 where it is none or was not limited."""
    try:
        values = read_config(folder.parent)
    except CheckpointError:
        return 0
    return int(values.get("max_length", 0)) if "option" in values else 0
