"""Heads: from the pooled output of a row to the task's logits. A new head is a class and an entry of HEADS.

A row of one sequence has F = D features, one of two has F = 4 D (model.pair_features): a head on those is not symmetric
in the two by itself.

Shape letters: B rows, D hidden, F features, K outputs.
"""

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

import ops
from bert import BertConfig
from ops import DropoutMasks
from parameters import NoParameters, parameter


class Head(Protocol):
    """A module. Its matrices, biases and LayerNorms are initialized as BERT's are after it has been made."""

    def __init__(self, parameters: Any, encoder: BertConfig, num_features: int, num_outputs: int) -> None: ...

    def __call__(self, pooled: Tensor, masks: DropoutMasks | None) -> Tensor:
        """pooled (B, F) -> logits (B, K)."""
        ...

    def absorb(self, mean: Tensor, deviation: Tensor) -> None:
        """From here on it gives for x what it gave for (x - mean) / deviation, both (F,)."""
        ...


class LinearHead(nn.Module):
    """Dropout and a linear layer."""

    def __init__(self, parameters: NoParameters, encoder: BertConfig, num_features: int, num_outputs: int) -> None:
        super().__init__()
        self.dropout_prob = encoder.hidden_dropout_prob
        self.output = nn.Linear(num_features, num_outputs)

    def forward(self, pooled: Tensor, masks: DropoutMasks | None) -> Tensor:
        return self.output(ops.dropout(pooled, self.dropout_prob, masks))  # type: ignore[no-any-return]  # (B, K)

    def absorb(self, mean: Tensor, deviation: Tensor) -> None:
        _absorb(self.output, mean, deviation)


class MlpHead(nn.Module):
    """Dropout and a linear layer behind hidden layers, each of dropout, a linear layer to D and ReLU."""

    @dataclass(frozen=True)
    class Parameters:
        layers: int = parameter(1, "hidden layers of the head", ">= 1")

    def __init__(self, parameters: Parameters, encoder: BertConfig, num_features: int, num_outputs: int) -> None:
        super().__init__()
        size = encoder.hidden_size
        self.dropout_prob = encoder.hidden_dropout_prob
        self.hidden = nn.ModuleList(nn.Linear(size if i else num_features, size) for i in range(parameters.layers))
        self.output = nn.Linear(size, num_outputs)

    def forward(self, pooled: Tensor, masks: DropoutMasks | None) -> Tensor:
        for layer in self.hidden:
            pooled = torch.relu(layer(ops.dropout(pooled, self.dropout_prob, masks)))  # (B, F) -> (B, D)
        return self.output(ops.dropout(pooled, self.dropout_prob, masks))  # type: ignore[no-any-return]  # (B, K)

    def absorb(self, mean: Tensor, deviation: Tensor) -> None:
        _absorb(cast(nn.Linear, self.hidden[0]), mean, deviation)


@torch.no_grad()
def _absorb(layer: nn.Linear, mean: Tensor, deviation: Tensor) -> None:
    layer.weight.div_(deviation)  # (O, F)
    layer.bias.sub_(layer.weight @ mean)  # (O,)


HEADS: dict[str, type[Head]] = {"linear": LinearHead, "mlp": MlpHead}
