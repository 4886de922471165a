"""Projected attention layers (Stickland and Murray 2019, arXiv 1902.02671, sections 2 and 3): small task adapters.

A layer with its task term is LN(h' + FFN(h') + TS(h)), h the layer's input and h' = LN(h + MHA(h)); bert.py adds the
term at the final LayerNorm. TS(h) = V_D g(V_E h): V_E projects D down to d, g is a small multi-head attention without
output matrix, V_D projects up again.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from bert import AttentionLayout, BertConfig, DropoutMasks, Uninitialized, initialize, packed_attention
from dense import Linear

KINDS = ("attention", "low_rank")
PAPER_HEAD_SIZE = 17  # 204 wide with 12 heads beside BERT-base's 768 with 12
PAPER_LOW_RANK = 100


@dataclass(frozen=True)
class PalConfig:
    """Shape of the adapters.

    kind: "attention" (V_E and V_D shared by all layers of a task, g an attention of each layer's own) or "low_rank" (g
    the identity, V_E and V_D of each layer's own). size: d. num_heads: of g. num_layers: how many of the top layers.
    """

    kind: str
    size: int
    num_heads: int
    num_layers: int

    @classmethod
    def for_encoder(
        cls, config: BertConfig, kind: str = "attention", size: int = 0, num_heads: int = 0, num_layers: int = 0
    ) -> "PalConfig":
        """Sizes for an encoder; what is 0 takes the paper's proportions. Raises ValueError naming the flag."""
        proportional_heads = max(1, round(config.hidden_size / 64))
        if size == 0:
            low_rank = max(1, round(PAPER_LOW_RANK * config.hidden_size / 768))
            size = low_rank if kind == "low_rank" else PAPER_HEAD_SIZE * (num_heads or proportional_heads)
        if kind not in KINDS:
            raise ValueError(f"--pal_kind {kind}: expected one of {', '.join(KINDS)}")
        if not 0 < size < config.hidden_size:
            raise ValueError(f"--pal_size {size}: expected 1 to {config.hidden_size - 1}, less than the hidden size")
        if num_heads == 0:
            num_heads = next(n for n in range(min(proportional_heads, size), 0, -1) if size % n == 0)
        if size % num_heads:
            raise ValueError(f"--pal_size {size}: not a multiple of --pal_heads {num_heads}")
        if not 0 <= num_layers <= config.num_hidden_layers:
            raise ValueError(f"--pal_layers {num_layers}: the encoder has {config.num_hidden_layers} layers")
        return cls(kind, size, num_heads, num_layers or config.num_hidden_layers)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class ProjectedAttention(nn.Module):
    """One task's adapters. `adapter(i, h, layout, masks)` is TS(h) of layer i, or None below the adapted layers."""

    def __init__(self, config: PalConfig, encoder: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.first_layer = encoder.num_hidden_layers - config.num_layers
        self.dropout_prob = encoder.attention_probs_dropout_prob
        hidden, size = encoder.hidden_size, config.size
        num_projections = 1 if config.kind == "attention" else config.num_layers
        self.down = nn.ModuleList(Linear(hidden, size) for _ in range(num_projections))  # V_E
        self.up = nn.ModuleList(Linear(size, hidden) for _ in range(num_projections))  # V_D
        num_attentions = config.num_layers if config.kind == "attention" else 0
        self.qkv = nn.ModuleList(Linear(size, 3 * size) for _ in range(num_attentions))

    def initialize(self, std: float, generator: torch.Generator) -> None:
        """Only V_D starts at zero: the term is exactly zero at first, and V_D has a gradient from the first step."""
        initialize(self, std, generator)
        for up in self.up:
            assert isinstance(up, nn.Linear)
            nn.init.zeros_(up.weight)

    def forward(
        self, layer: int, hidden_states: Tensor, layout: AttentionLayout, masks: DropoutMasks | None
    ) -> Tensor | None:
        """(N, D) term of a layer from its input (N, D)."""
        place = layer - self.first_layer
        if place < 0:
            return None
        if self.config.kind == "low_rank":
            return self.up[place](self.down[place](hidden_states))  # type: ignore[no-any-return]
        projected = self.down[0](hidden_states)  # (N, d)
        qkv = cast(Linear, self.qkv[place])
        attended = packed_attention(qkv, projected, layout, self.config.num_heads, self.dropout_prob, masks)
        return self.up[0](attended)  # type: ignore[no-any-return]


def make_adapters(
    config: PalConfig, encoder: BertConfig, tasks: Sequence[str], generator: torch.Generator
) -> nn.ModuleDict:
    """Fresh adapters of every task; the model's output is that of the plain encoder until they are trained."""
    with Uninitialized():
        adapters = nn.ModuleDict({task: ProjectedAttention(config, encoder) for task in tasks})
    for adapter in adapters.values():
        assert isinstance(adapter, ProjectedAttention)
        adapter.initialize(encoder.initializer_range, generator)
    return adapters
