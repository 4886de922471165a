"""Projected attention layers (Stickland and Murray 2019, arXiv 1902.02671, sections 2 and 3): small task adapters.

A layer with its task term is LN(h' + FFN(h') + TS(h)), h the layer's input and h' = LN(h + MHA(h)); bert.py adds the
term at the final LayerNorm. TS(h) = V_D g(V_E h): V_E projects D down to d, g is a small multi-head attention without
output matrix, V_D projects up again.

(`--pal` is these adapters; `--scheduler pal` is the same paper's way to sample tasks, in schedulers.py.)

Shape letters: N packed tokens, D hidden, d width of the adapter.
"""

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

import ops
from bert import BertConfig, initialize
from ops import DropoutMasks, Linear, Packing
from parameters import parameter

PAPER_HEAD_SIZE = 17  # 204 wide with 12 heads beside BERT-base's 768 with 12
PAPER_LOW_RANK = 100


class Adapter(Protocol):
    """A module with a task's addition to the encoder's layers (bert.LayerAdapter)."""

    def __init__(self, parameters: Any, encoder: BertConfig) -> None:
        """Raises ValueError, naming the flag, for parameters that do not fit the encoder."""
        ...

    def initialize(self, std: float, generator: torch.Generator) -> None:
        """Fresh values, with which the model predicts as it would without the adapter."""
        ...

    def __call__(
        self, layer: int, hidden_states: Tensor, packing: Packing, masks: DropoutMasks | None
    ) -> Tensor | None:
        """(N, D) term of a layer, counted from 0, from its input (N, D); None for no term."""
        ...


class ProjectedAttention(nn.Module):
    """One task's adapters: V_E and V_D shared by all its layers, g an attention of each layer's own. The paper's other
    kind, low_rank, has g the identity, and V_E and V_D of each layer's own."""

    @dataclass(frozen=True)
    class Parameters:
        kind: str = parameter(
            "attention",
            "attention: projections shared by the layers; low_rank: a bottleneck in each layer",
            choices=("attention", "low_rank"),
        )
        size: int = parameter(0, "width of the adapters; 0: the paper's proportion to the hidden size", ">= 0")
        heads: int = parameter(
            0,
            "heads of an adapter's attention, where it has one; 0: one for every 64 of the hidden size",
            ">= 0",
            only_with=("kind", "attention"),
        )
        layers: int = parameter(0, "adapters in that many top layers; 0: in all", ">= 0")

    def __init__(self, parameters: Parameters, encoder: BertConfig) -> None:
        super().__init__()
        self.is_attention = parameters.kind == "attention"
        size, self.num_heads = adapter_sizes(parameters, encoder)
        if parameters.layers > encoder.num_hidden_layers:
            raise ValueError(f"--pal_layers {parameters.layers}: the encoder has {encoder.num_hidden_layers} layers")
        num_layers = parameters.layers or encoder.num_hidden_layers
        self.first_layer = encoder.num_hidden_layers - num_layers
        self.dropout_prob = encoder.attention_probs_dropout_prob
        num_projections, num_attentions = (1, num_layers) if self.is_attention else (num_layers, 0)
        self.down = nn.ModuleList(Linear(encoder.hidden_size, size) for _ in range(num_projections))  # V_E
        self.up = nn.ModuleList(Linear(size, encoder.hidden_size) for _ in range(num_projections))  # V_D
        self.qkv = nn.ModuleList(Linear(size, 3 * size) for _ in range(num_attentions))

    def initialize(self, std: float, generator: torch.Generator) -> None:
        """Only V_D starts at zero: the term is exactly zero at first, and V_D has a gradient from the first step."""
        initialize(self, std, generator)
        for up in self.up:
            nn.init.zeros_(cast(Linear, up).weight)

    def forward(self, layer: int, hidden_states: Tensor, packing: Packing, masks: DropoutMasks | None) -> Tensor | None:
        place = layer - self.first_layer
        if place < 0:
            return None
        if not self.is_attention:
            return self.up[place](self.down[place](hidden_states))  # type: ignore[no-any-return]  # (N, d) -> (N, D)
        projected = self.down[0](hidden_states)  # (N, D) -> (N, d)
        qkv = self.qkv[place](projected)  # (N, d) -> (N, 3 d)
        context = ops.attention(qkv, packing, self.num_heads, self.dropout_prob, masks)  # (N, d)
        return self.up[0](context)  # type: ignore[no-any-return]  # (N, d) -> (N, D)


def adapter_sizes(parameters: ProjectedAttention.Parameters, encoder: BertConfig) -> tuple[int, int]:
    """d and the heads of g; what is 0 takes the paper's proportions. Raises ValueError naming the flag."""
    size, num_heads = parameters.size, parameters.heads
    proportional_heads = max(1, round(encoder.hidden_size / 64))
    if size == 0 and parameters.kind == "low_rank":
        size = max(1, round(PAPER_LOW_RANK * encoder.hidden_size / 768))
    elif size == 0:
        size = PAPER_HEAD_SIZE * (num_heads or proportional_heads)
    if not 0 < size < encoder.hidden_size:
        raise ValueError(f"--pal_size {size}: expected 1 to {encoder.hidden_size - 1}, less than the hidden size")
    if num_heads == 0:
        num_heads = next(n for n in range(min(proportional_heads, size), 0, -1) if size % n == 0)
    if size % num_heads:
        raise ValueError(f"--pal_size {size}: not a multiple of --pal_heads {num_heads}")
    return size, num_heads


ADAPTERS: dict[str, type[Adapter]] = {"pal": ProjectedAttention}
