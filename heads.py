"""Heads: from what the encoder gives of a row to the task's logits. A new head is a class and an entry of HEADS.

A row of one sequence has F = D features, one of two has F = 4 D (`pair_features`): a head on those is not symmetric in
the two by itself.

Shape letters: N packed tokens, B rows, S sequences (B or 2 B), D hidden, F features, K outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Flag, auto
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

import ops
from bert import BertConfig, initialize
from ops import DropoutMasks, Packing
from parameters import NoParameters, parameter
from routing import Routing

ABSORBED = 1e-2  # of the largest logit, as which two logits are the same but for rounding


class Reads(Flag):
    """What a head reads; the encoder computes no more than that."""

    POOLED = auto()  # one vector of each row
    LAST = auto()  # the hidden states of the last layer
    LAYERS = auto()  # the embeddings and the hidden states of every layer


@dataclass(frozen=True)
class Encoded:
    """What a head reads of B rows.

    pooled: (B, F); None where it is not read. hidden_states: (N, D) each, of the last layer alone, or of all from the
    embeddings on. packing: where the S sequences lie in them. is_split: a row is two of them.
    """

    pooled: Tensor | None
    hidden_states: Sequence[Tensor]
    packing: Packing
    is_split: bool


class Head(Protocol):
    """A module. reads: what it is called with."""

    reads: ClassVar[Reads]

    def __init__(self, parameters: Any, encoder: BertConfig, num_features: int, num_outputs: int) -> None:
        """Raises ValueError, naming the flag, for rows that it cannot read."""
        ...

    def initialize(self, std: float, generator: torch.Generator) -> None:
        """Fresh values."""
        ...

    def __call__(self, read: Any, masks: DropoutMasks | None) -> Tensor:
        """(B, K) logits. read: pooled (B, F) where it reads no more, else `Encoded`."""
        ...


class PooledHead(Head, Protocol):
    """One that reads pooled alone."""

    def absorb(self, mean: Tensor, deviation: Tensor) -> None:
        """From here on it gives for x what it gave for (x - mean) / deviation, both (F,)."""
        ...


class LinearHead(nn.Module):
    """Dropout and a linear layer."""

    reads: ClassVar[Reads] = Reads.POOLED

    def __init__(self, parameters: NoParameters, encoder: BertConfig, num_features: int, num_outputs: int) -> None:
        super().__init__()
        self.dropout_prob = encoder.hidden_dropout_prob
        self.output = nn.Linear(num_features, num_outputs)

    def initialize(self, std: float, generator: torch.Generator) -> None:
        initialize(self, std, generator)

    def forward(self, pooled: Tensor, masks: DropoutMasks | None) -> Tensor:
        return self.output(ops.dropout(pooled, self.dropout_prob, masks))  # type: ignore[no-any-return]  # (B, F) -> (B, K)

    def absorb(self, mean: Tensor, deviation: Tensor) -> None:
        _absorb(self.output, mean, deviation)


class MlpHead(nn.Module):
    """Dropout and a linear layer behind hidden layers, each of dropout, a linear layer to D and ReLU."""

    reads: ClassVar[Reads] = Reads.POOLED

    @dataclass(frozen=True)
    class Parameters:
        layers: int = parameter(1, "hidden layers of the head", ">= 1")

    def __init__(self, parameters: Parameters, encoder: BertConfig, num_features: int, num_outputs: int) -> None:
        super().__init__()
        size = encoder.hidden_size
        self.dropout_prob = encoder.hidden_dropout_prob
        self.hidden = nn.ModuleList(nn.Linear(size if i else num_features, size) for i in range(parameters.layers))
        self.output = nn.Linear(size, num_outputs)

    def initialize(self, std: float, generator: torch.Generator) -> None:
        initialize(self, std, generator)

    def forward(self, pooled: Tensor, masks: DropoutMasks | None) -> Tensor:
        for layer in self.hidden:
            pooled = torch.relu(layer(ops.dropout(pooled, self.dropout_prob, masks)))  # (B, F) -> (B, D)
        return self.output(ops.dropout(pooled, self.dropout_prob, masks))  # type: ignore[no-any-return]  # (B, F) -> (B, K)

    def absorb(self, mean: Tensor, deviation: Tensor) -> None:
        _absorb(cast(nn.Linear, self.hidden[0]), mean, deviation)


@torch.no_grad()
def absorb_scale(head: PooledHead, features: Tensor, mean: Tensor, deviation: Tensor) -> None:
    """`absorb`, tried on features (B, F). Raises ValueError if the head does not give for them what it gave before."""
    before = head((features - mean) / deviation, None)  # (B, K)
    head.absorb(mean, deviation)
    if float((head(features, None) - before).abs().max()) > ABSORBED * float(before.abs().max()):
        raise ValueError("after absorb(mean, deviation) it gives other logits, expected those of standardized features")


@torch.no_grad()
def _absorb(layer: nn.Linear, mean: Tensor, deviation: Tensor) -> None:
    layer.weight.div_(deviation)  # (O, F)
    layer.bias.sub_(layer.weight @ mean)  # (O,)


def pair_features(vectors: Tensor) -> Tensor:
    """[u, v, |u - v|, u * v] (B, 4 D) of the two vectors of each row, one row behind the other in (2 B, D).

    As in InferSent (Conneau et al. 2017, arXiv 1705.02364). u and v have places of their own in it: a head on these is
    not symmetric in the two sentences by itself.
    """
    u, v = vectors.view(-1, 2, vectors.shape[1]).unbind(1)  # (2 B, D) -> (B, D) each
    return torch.cat([u, v, (u - v).abs(), u * v], 1)  # (B, 4 D)


class LstmHead(nn.Module):
    """Dropout and a linear layer on the pooled output and, beside it, the last states of two LSTMs (Hochreiter and
    Schmidhuber 1997) over the last layer's hidden states, one from the first token on and one from the last."""

    reads: ClassVar[Reads] = Reads.POOLED | Reads.LAST

    @dataclass(frozen=True)
    class Parameters:
        size: int = parameter(128, "width of the LSTM head in each direction", ">= 1")

    def __init__(self, parameters: Parameters, encoder: BertConfig, num_features: int, num_outputs: int) -> None:
        super().__init__()
        self.dropout_prob, size = encoder.hidden_dropout_prob, encoder.hidden_size
        self.forwards = nn.LSTM(size, parameters.size, batch_first=True)
        self.backwards = nn.LSTM(size, parameters.size, batch_first=True)
        num_states = 2 * parameters.size * num_features // size
        self.output = nn.Linear(num_features + num_states, num_outputs)

    def initialize(self, std: float, generator: torch.Generator) -> None:
        """torch's own for the LSTMs, BERT's for the linear layer."""
        initialize(self.output, std, generator)
        for weight in (*self.forwards.parameters(), *self.backwards.parameters()):
            nn.init.uniform_(weight, -(bound := self.forwards.hidden_size**-0.5), bound, generator=generator)

    def forward(self, read: Encoded, masks: DropoutMasks | None) -> Tensor:
        (hidden_states,), ends = read.hidden_states, []
        for lstm, is_backwards in ((self.forwards, False), (self.backwards, True)):
            block, is_token = ops.padded(hidden_states, read.packing, is_backwards)  # (S, L, D), (S, L)
            states, _ = lstm(block)  # (S, L, D) -> (S, L, E)
            ends.append(states[torch.arange(states.shape[0], device=states.device), is_token.sum(1) - 1])  # (S, E)
        last = torch.cat(ends, 1)  # (S, 2 E)
        assert read.pooled is not None
        features = torch.cat([read.pooled, pair_features(last) if read.is_split else last], 1)  # (B, F + 2 E or 8 E)
        return self.output(ops.dropout(features, self.dropout_prob, masks))  # type: ignore[no-any-return]  # (B, F) -> (B, K)


class RoutingHead(nn.Module):
    """Routes the hidden states of all tokens and layers to hidden capsules, these to others, and those to a capsule of
    size 1 for each class (Heinsen 2022, arXiv 2211.11754, section 5).

    A single output is the difference of two capsules: one alone would get every input's whole share.
    """

    reads: ClassVar[Reads] = Reads.LAYERS

    @dataclass(frozen=True)
    class Parameters:
        capsules: int = parameter(64, "hidden capsules of the routing head", ">= 2")
        iterations: int = parameter(2, "iterations of each routing", ">= 1")

    def __init__(self, parameters: Parameters, encoder: BertConfig, num_features: int, num_outputs: int) -> None:
        super().__init__()
        size, num_hidden, iterations = encoder.hidden_size, parameters.capsules, parameters.iterations
        if num_features != size:
            raise ValueError("--head routing: routes the tokens of one sequence, expected --pairs cross")
        num_states = encoder.num_hidden_layers + 1
        self.norm_weight = nn.Parameter(torch.empty(num_states * size))  # of a LayerNorm for each layer
        self.norm_bias = nn.Parameter(torch.empty(num_states * size))
        self.is_single = num_outputs == 1
        self.routings = nn.ModuleList(
            [
                Routing(None, num_hidden, size, size, iterations),
                Routing(num_hidden, num_hidden, size, size, iterations),
                Routing(num_hidden, max(2, num_outputs), size, 1, iterations),
            ]
        )

    def initialize(self, std: float, generator: torch.Generator) -> None:
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)
        for routing in self.routings:
            cast(Routing, routing).initialize(generator)

    def forward(self, read: Encoded, masks: DropoutMasks | None) -> Tensor:
        states = torch.stack(list(read.hidden_states), 1)  # (N, layers + 1, D)
        normalized = nn.functional.layer_norm(states, states.shape[-1:]).flatten(1) * self.norm_weight + self.norm_bias
        block, is_token = ops.padded(normalized, read.packing)  # (B, L, (layers + 1) D), (B, L)
        capsules = block.unflatten(2, states.shape[1:]).flatten(1, 2)  # (B, L (layers + 1), D)
        is_real: Tensor | None = is_token[..., None].expand(-1, -1, states.shape[1]).flatten(1)  # (B, L (layers + 1))
        for routing in self.routings:
            capsules, is_real = routing(capsules, is_real), None  # (B, 64, D) twice, (B, K or 2, 1)
        logits: Tensor = capsules.squeeze(-1)  # (B, K or 2, 1) -> (B, K or 2)
        return logits[:, :1] - logits[:, 1:] if self.is_single else logits  # (B, K)


HEADS: dict[str, type[Head]] = {
    "linear": LinearHead,
    "mlp": MlpHead,
    "lstm": LstmHead,
    "routing": RoutingHead,
}
