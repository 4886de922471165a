"""MultitaskBert: one encoder that the tasks share, and of each task a head and, where wanted, an adapter and the layers
nearest the head.

Shape letters: N packed tokens, B rows, S sequences (B or 2 B), D hidden, F features, K outputs.
"""

import copy
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

import ops
from bert import CheckpointError, Encoder, LayerAdapter, Uninitialized
from datasets import Batch
from heads import HEADS, Encoded, Head, Reads, pair_features
from messages import shown
from ops import DropoutMasks, PackedTokens
from pal import ADAPTERS, Adapter
from parameters import Choice
from task_files import TaskFileError, add_saved_tasks
from tasks import TASKS

POOLINGS = {
    "pooler": "[CLS] behind the encoder's pooler",
    "cls": "[CLS] as the last layer leaves it",
    "mean": "the mean over the tokens, special ones included",
}
PAIRS = {
    "cross": "one sequence, [CLS] a [SEP] b [SEP]",
    "siamese": "each sentence alone; the head reads both, their difference and product",
}


@dataclass(frozen=True)
class Trained:
    """The parameters that a stage of training moves, by name: those that all tasks share, and each task's own."""

    shared: Mapping[str, nn.Parameter]
    own: Mapping[str, Mapping[str, nn.Parameter]]

    def freeze_others(self, model: nn.Module) -> None:
        """Makes these, and no others of the model's parameters, require gradients."""
        trained = {id(parameter) for part in (self.shared, *self.own.values()) for parameter in part.values()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)


class TaskModel(Protocol):
    """What training and evaluation need of a model."""

    def __call__(
        self, task: str, batch: Batch, masks: DropoutMasks | None = None, perturbation: Tensor | None = None
    ) -> Tensor:
        """Logits (B, K). masks: for training; None for evaluation. perturbation: (N, D) on the input embeddings."""
        ...

    def logits_of(self, tasks: Sequence[str], batch: Batch, masks: DropoutMasks | None = None) -> list[Tensor]:
        """Of each of the tasks the logits (B, K) of all rows, from one pass through what the tasks share."""
        ...

    @property
    def shares_passes(self) -> bool:
        """Whether rows of several tasks can go through the model together."""
        ...


@dataclass(frozen=True)
class Layout:
    """Which head each task has, which adapter all of them have, and how many of the top layers are each task's own.

    pooling: what heads read of a sequence (POOLINGS). pairs: how the encoder reads a pair (PAIRS). The defaults are
    those of a checkpoint that says nothing of them.
    """

    heads: Mapping[str, Choice]
    adapter: Choice | None = None
    copy_top_layers: int = 0
    pooling: str = "pooler"
    pairs: str = "cross"

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.heads)

    @property
    def is_siamese(self) -> bool:
        return self.pairs == "siamese"

    def is_split(self, task: str) -> bool:
        """Whether a row of the task is two sequences."""
        return self.is_siamese and len(TASKS[task].text_columns) == 2

    def reads(self, task: str) -> Reads:
        """What the head of the task reads."""
        return HEADS[self.heads[task].name].reads

    @property
    def reads_pooler(self) -> bool:
        return self.pooling == "pooler" and any(Reads.POOLED in self.reads(task) for task in self.tasks)

    def to_dict(self) -> dict[str, Any]:
        """As config.json of a checkpoint holds it."""
        tasks: dict[str, dict[str, Any]] = {}
        for task, head in self.heads.items():
            output = TASKS[task].output
            tasks[task] = {"outputs": output.num_outputs, "head": head.to_dict()}
            if output.class_names:
                tasks[task]["id2label"] = {str(k): name for k, name in enumerate(output.class_names)}
            if TASKS[task].definition:
                tasks[task]["definition"] = dict(TASKS[task].definition)
        adapter = None if self.adapter is None else self.adapter.to_dict()
        more: dict[str, Any] = {"copy_top_layers": self.copy_top_layers} if self.copy_top_layers else {}
        more |= {"pooling": self.pooling, "pairs": self.pairs}
        return {"format": 2, "tasks": tasks, "adapter": adapter, **more}

    @classmethod
    def from_dict(cls, values: Any, where: str) -> "Layout":
        """Raises CheckpointError if the values are not of a known format or name what is not known."""
        try:
            if values["format"] not in (1, 2):
                raise ValueError(f"format is {shown(repr(values['format']))}, expected 1 or 2")
            if values["format"] == 1:
                values = _of_format_2(values)
            add_saved_tasks(values, where)
            for task, saved in values["tasks"].items():
                if task not in TASKS or TASKS[task].output.num_outputs != saved["outputs"]:
                    known = ", ".join(f"{t.name} ({t.output.num_outputs})" for t in TASKS.values())
                    raise ValueError(
                        f"head {shown(repr(task))} with {shown(saved['outputs'])} outputs, expected among {known}"
                    )
            heads = {task: Choice.from_dict(saved["head"], HEADS) for task, saved in values["tasks"].items()}
            adapter = None if values["adapter"] is None else Choice.from_dict(values["adapter"], ADAPTERS)
            copied = values.get("copy_top_layers", 0)
            if type(copied) is not int or copied < 0:
                raise ValueError(f"copy_top_layers is {shown(repr(copied))}, expected a whole number of at least 0")
            pooling, pairs = values.get("pooling", cls.pooling), values.get("pairs", cls.pairs)
            for read, choices in ((pooling, POOLINGS), (pairs, PAIRS)):
                if read not in choices:
                    raise ValueError(f"{shown(repr(read))}, expected one of {', '.join(choices)}")
            return cls(heads, adapter, copied, pooling, pairs)
        except TaskFileError as error:
            raise CheckpointError(str(error)) from None
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{where}: multitask_bert is not of a known format ({error})") from None


def _of_format_2(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the first version of the program wrote, in today's format."""
    layers, adapter = values["head_layers"], values["adapters"]
    head = {"name": "mlp", "parameters": {"layers": layers}} if layers else {"name": "linear", "parameters": {}}
    tasks = {task: {"outputs": outputs, "head": head} for task, outputs in values["tasks"].items()}
    if adapter is not None:
        names = {"kind": "kind", "size": "size", "num_heads": "heads", "num_layers": "layers"}
        adapter = {"name": "pal", "parameters": {names[name]: value for name, value in adapter.items()}}
    return {"tasks": tasks, "adapter": adapter}


class MultitaskBert(nn.Module):
    """An encoder, and the heads, adapters and top layers of a layout. Raises ValueError for what does not fit."""

    def __init__(self, encoder: Encoder, layout: Layout, generator: torch.Generator) -> None:
        """encoder: a whole one, which gives its top layers away. generator: for the new heads and adapters, each
        initialized in the order of the tasks."""
        super().__init__()
        self.encoder = encoder
        self.layout = layout
        config, std = encoder.config, encoder.config.initializer_range
        widths = {task: config.hidden_size * (4 if layout.is_split(task) else 1) for task in layout.tasks}
        with Uninitialized():
            heads = {
                task: HEADS[head.name](head.parameters, config, widths[task], TASKS[task].output.num_outputs)
                for task, head in layout.heads.items()
            }
            self.heads = nn.ModuleDict(cast(Mapping[str, nn.Module], heads))
            chosen = layout.adapter
            adapters = {task: ADAPTERS[chosen.name](chosen.parameters, config) for task in layout.tasks if chosen}
            self.adapters = nn.ModuleDict(cast(Mapping[str, nn.Module], adapters))
        for head in self.heads.values():
            cast(Head, head).initialize(std, generator)
        for adapter in self.adapters.values():
            cast(Adapter, adapter).initialize(std, generator)
        num_shared = len(encoder.layers) - layout.copy_top_layers
        if num_shared < 0:
            raise CheckpointError(
                f"--copy_top_layers {layout.copy_top_layers}: the encoder has {len(encoder.layers)} layers"
            )
        encoder.layers, top = encoder.layers[:num_shared], encoder.layers[num_shared:]
        self.top_layers = nn.ModuleDict({task: copy.deepcopy(top) for task in layout.tasks if len(top)})

    def forward(
        self, task: str, batch: Batch, masks: DropoutMasks | None = None, perturbation: Tensor | None = None
    ) -> Tensor:
        """Logits (B, K) of a task."""
        return self.predict(task, self.read(task, batch, masks, perturbation), masks)  # (N,) -> (B, F) -> (B, K)

    def logits_of(self, tasks: Sequence[str], batch: Batch, masks: DropoutMasks | None = None) -> list[Tensor]:
        """Of each of the tasks the logits (B, K) of all rows."""
        if len(tasks) == 1:
            return [self(tasks[0], batch, masks)]
        pooled = self.pooled(tasks[0], batch, masks)  # (N,) -> (B, F)
        return [self.predict(task, pooled, masks) for task in tasks]  # (B, F) -> (B, K) each

    @property
    def shares_passes(self) -> bool:
        layout = self.layout
        is_apart = layout.adapter is not None or layout.copy_top_layers > 0 or layout.is_siamese
        return not is_apart and all(self.has_features(task) for task in layout.tasks)

    def has_features(self, task: str) -> bool:
        """Whether the head reads one vector of a row, which a frozen encoder gives once and for all."""
        return self.layout.reads(task) == Reads.POOLED

    def read(
        self,
        task: str,
        batch: Batch,
        masks: DropoutMasks | None = None,
        perturbation: Tensor | None = None,
        reads: Reads | None = None,
    ) -> Tensor | Encoded:
        """What the head of a task reads, or another that reads these."""
        assert batch.tokens is not None, "a batch of features is for the heads alone"
        reads = reads or self.layout.reads(task)
        pooling, is_split = self.layout.pooling, self.layout.is_split(task)
        first_only, top = reads == Reads.POOLED and pooling != "mean", self.top_layers_of(task)
        states = self.encoder.states(batch.tokens, masks, self.adapter(task), perturbation, first_only, top)
        kept = deque(states, maxlen=None if Reads.LAYERS in reads else 1)  # (N, D) or (S, D) each
        packing = batch.tokens.packing
        num_sequences = batch.labels.shape[0] * (2 if is_split else 1)  # a symbol in an exported graph
        assert packing.num_rows == num_sequences, "rows that were tokenized for other --pairs"
        pooled = self._pool(kept[-1], batch.tokens, first_only) if Reads.POOLED in reads else None  # (S, D)
        pooled = pair_features(pooled) if pooled is not None and is_split else pooled  # (2 B, D) -> (B, F = 4 D)
        if reads == Reads.POOLED:
            assert pooled is not None
            return pooled
        return Encoded(pooled, kept, packing, is_split)

    def _pool(self, states: Tensor, tokens: PackedTokens, first_only: bool) -> Tensor:
        """(S, D) one vector of each sequence from the last layer's states, (N, D) or of [CLS] only (S, D)."""
        if self.layout.pooling == "mean":
            return ops.row_means(states, tokens.packing)  # (N, D) -> (S, D)
        first_states = states if first_only else states.index_select(0, tokens.first_tokens)  # (N, D) -> (S, D)
        return self.encoder.pool(first_states) if self.layout.pooling == "pooler" else first_states

    def pooled(
        self, task: str, batch: Batch, masks: DropoutMasks | None = None, perturbation: Tensor | None = None
    ) -> Tensor:
        """(B, F) the pooled vectors of rows, or the features of their two; most heads read no more."""
        read = self.read(task, batch, masks, perturbation, Reads.POOLED)
        assert isinstance(read, Tensor)
        return read

    def predict(self, task: str, read: Tensor | Encoded, masks: DropoutMasks | None = None) -> Tensor:
        """Logits (B, K) of a task's head from what it reads."""
        return self.heads[task](read, masks)  # type: ignore[no-any-return]  # (B, F) -> (B, K)

    def adapter(self, task: str) -> LayerAdapter | None:
        """The task's addition to each encoder layer, or None for a model without adapters."""
        return cast(LayerAdapter, self.adapters[task]) if task in self.adapters else None

    def top_layers_of(self, task: str) -> nn.ModuleList:
        """The task's own encoder layers, none for most models."""
        return cast(nn.ModuleList, self.top_layers[task]) if task in self.top_layers else nn.ModuleList()

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """By name, the parameters that the tasks share; the pooler's only where heads read it."""
        named = {f"encoder.{name}": parameter for name, parameter in self.encoder.named_parameters()}
        is_read = self.layout.reads_pooler
        return {name: of for name, of in named.items() if is_read or not name.startswith("encoder.pooler.")}

    def head_parameters(self, task: str) -> dict[str, nn.Parameter]:
        """By name, the parameters of a task's head."""
        return {f"heads.{task}.{name}": parameter for name, parameter in self.heads[task].named_parameters()}

    def adapter_parameters(self, task: str) -> dict[str, nn.Parameter]:
        """By name, the parameters of a task's adapter."""
        adapter = self.adapters[task] if task in self.adapters else nn.Module()
        return {f"adapters.{task}.{name}": parameter for name, parameter in adapter.named_parameters()}

    def own_parameters(self, task: str) -> dict[str, nn.Parameter]:
        """By name, the parameters of a task's head, adapter and top layers."""
        of_layers = {f"top_layers.{task}.{name}": p for name, p in self.top_layers_of(task).named_parameters()}
        return {**self.head_parameters(task), **self.adapter_parameters(task), **of_layers}

    def trained(self) -> Trained:
        """All parameters that predictions depend on."""
        return Trained(self.shared_parameters(), {task: self.own_parameters(task) for task in self.layout.tasks})

    def parameters_by_part(self) -> list[list[str]]:
        """Names of the shared parameters: those of the embeddings, of each shared layer, of the pooler where it is."""
        names = list(self.shared_parameters())
        layers = [f"encoder.layers.{i}." for i in range(len(self.encoder.layers))]
        parts = [[name for name in names if name.startswith(prefix)] for prefix in (*layers, "encoder.pooler.")]
        parts = [[name for name in names if not any(name in part for part in parts)], *parts]
        return [part for part in parts if part]

    def duplicate(self) -> "MultitaskBert":
        """A copy with parameters of its own."""
        return copy.deepcopy(self)


class FrozenEncoder:
    """A model while its encoder is frozen: heads on features computed before, or, where a head reads hidden states, on
    those that the encoder gives in every pass, without dropout."""

    def __init__(self, model: MultitaskBert) -> None:
        self.model = model

    def __call__(
        self, task: str, batch: Batch, masks: DropoutMasks | None = None, perturbation: Tensor | None = None
    ) -> Tensor:
        assert perturbation is None, "a frozen encoder has no input to move"
        with torch.no_grad():
            read = self.model.read(task, batch) if batch.features is None else batch.features
        return self.model.predict(task, read, masks)

    def logits_of(self, tasks: Sequence[str], batch: Batch, masks: DropoutMasks | None = None) -> list[Tensor]:
        return [self(task, batch, masks) for task in tasks]

    @property
    def shares_passes(self) -> bool:
        return False


def parameter_counts(model: MultitaskBert) -> dict[str, int]:
    """Numbers of parameters: total, shared, per task, and what single-task models of the same encoder would hold."""
    trained = model.trained()
    shared = sum(parameter.numel() for parameter in trained.shared.values())
    own = {task: sum(parameter.numel() for parameter in of.values()) for task, of in trained.own.items()}
    return {
        "total": shared + sum(own.values()),
        "shared": shared,
        "per_task": max(own.values()),
        "separate_models": shared * len(own) + sum(own.values()),
    }
