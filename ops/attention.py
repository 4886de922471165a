"""Multi-head self-attention within each row of a packed batch, without an output matrix."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops import kernels
from ops.dispatch import triton_kernels
from ops.dropout import DropoutBits, DropoutMasks
from ops.linear import rows_multiple
from ops.packed import Packing, Padded


def attention(
    qkv: Tensor,
    packing: Packing,
    num_heads: int,
    prob: float,
    masks: DropoutMasks | None,
    reach: int | None = None,
) -> Tensor:
    """softmax(Q K^T / sqrt(E)) V of every token over the tokens of its row: (N, 3 D) -> (N, D).

    prob: of dropping an attention probability. reach: so many tokens to each side are seen; None for the whole row.
    What the tokens that belong to no row get is finite, and means nothing.
    """
    if isinstance(packing, Padded):
        query, key, value = (part.unflatten(0, packing.is_real.shape) for part in qkv.chunk(3, -1))  # (B, L, D) each
        is_seen = _seen(packing.is_real, reach)
        return _block_attention(query, key, value, is_seen, num_heads).flatten(0, 1)  # (B, L, D) -> (N, D)
    is_local = reach is not None and reach < packing.longest_row - 1
    if not is_local and kernels.can_run(qkv):
        return _Attention.apply(qkv, None, packing, num_heads, _bits(packing, num_heads, prob, masks, False))  # type: ignore[no-any-return]
    if not is_local and qkv.device.type == "cuda":
        return _TritonAttention.apply(qkv, None, packing, num_heads, prob, masks)  # type: ignore[no-any-return]
    query, key, value = qkv.chunk(3, -1)  # (N, D) each
    contexts = _by_groups(query, key, value, packing, num_heads, prob, masks, False, reach)
    tokens = packing.grouped_order[1]
    context = torch.cat([c[group.is_real] for c, group in zip(contexts, packing.groups, strict=True)])  # (tokens, D)
    return torch.zeros_like(query).index_copy(0, tokens, context.to(query.dtype))  # (N, D)


def first_token_attention(
    query: Tensor, key_value: Tensor, packing: Packing, num_heads: int, prob: float, masks: DropoutMasks | None
) -> Tensor:
    """The same for the first token of each row alone: query (B, D), key_value (N, 2 D) -> (B, D)."""
    if isinstance(packing, Padded):
        key, value = (part.unflatten(0, packing.is_real.shape) for part in key_value.chunk(2, -1))  # (B, L, D) each
        is_seen = _seen(packing.is_real, None)
        return _block_attention(query[:, None], key, value, is_seen, num_heads)[:, 0]  # (B, 1, D) -> (B, D)
    if kernels.can_run(query, key_value):
        bits = _bits(packing, num_heads, prob, masks, True)
        return _Attention.apply(query, key_value, packing, num_heads, bits)  # type: ignore[no-any-return]
    if query.device.type == "cuda":
        return _TritonAttention.apply(query, key_value, packing, num_heads, prob, masks)  # type: ignore[no-any-return]
    key, value = key_value.chunk(2, -1)  # (N, D) each
    contexts = _by_groups(query, key, value, packing, num_heads, prob, masks, first_only=True)
    context = torch.cat([context[:, 0] for context in contexts])  # (B, D) in the order of the groups
    return torch.zeros_like(query).index_copy(0, packing.grouped_order[0], context.to(query.dtype))


def _by_groups(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    num_heads: int,
    prob: float,
    masks: DropoutMasks | None,
    first_only: bool,
    reach: int | None = None,
) -> list[Tensor]:
    """The definition, on padded blocks of rows of similar length: of each group the context (b, L or 1, D).

    query: (N, D), or (B, D) where only the first tokens are wanted. One mask is drawn for the scores of all groups.
    """
    mask = None
    if masks is not None and prob > 0:
        mask = masks.mask((packing.num_scores(num_heads, first_only),), prob, query.dtype)
    contexts, first = [], 0
    for group in packing.groups:
        q = query[group.rows][:, None] if first_only else query[group.tokens]  # (b, L or 1, D)
        size = num_heads * q.shape[:2].numel() * group.tokens.shape[1]  # b H (L or 1) L
        part = None if mask is None else mask[first : first + size]
        is_seen = _seen(group.is_real, reach)
        contexts.append(_block_attention(q, key[group.tokens], value[group.tokens], is_seen, num_heads, part))
        first += size
    return contexts


def _seen(is_real: Tensor, reach: int | None) -> Tensor:
    """Which keys a query sees: (b, 1, 1, L), of a reach (b, 1, L, L), from which places are within their row (b, L)."""
    is_seen = is_real[:, None, None]  # (b, 1, 1, L)
    if reach is None:
        return is_seen
    place = torch.arange(is_real.shape[1], device=is_real.device)
    is_near = (place - place[:, None]).abs() <= reach  # (L, L)
    return is_seen & (is_near | ~is_real[:, None, :, None])  # (b, 1, L, L); no query sees nothing


def _block_attention(
    query: Tensor, key: Tensor, value: Tensor, is_seen: Tensor, num_heads: int, mask: Tensor | None = None
) -> Tensor:
    """Context (b, L or 1, D) of a block of padded rows: query (b, L or 1, D), key, value (b, L, D); is_seen of `_seen`.

    mask: of dropout, for all probabilities one behind the other.
    """
    heads = num_heads, query.shape[-1] // num_heads
    q, k, v = (part.unflatten(-1, heads).transpose(1, 2) for part in (query, key, value))  # (b, H, L or 1, E), ...
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (b, H, L or 1, L)
    probs = scores.masked_fill(~is_seen, -torch.inf).softmax(-1)
    if mask is not None:
        probs = probs * mask.view(probs.shape)
    context: Tensor = probs @ v  # (b, H, L or 1, E)
    return context.transpose(1, 2).flatten(2)  # (b, L or 1, D)


def rotated(qkv: Tensor, packing: Packing, num_heads: int, theta: float) -> Tensor:
    """Queries and keys turned by their places in the row (Su et al. 2021, arXiv 2104.09864): (N, 3 D) -> (N, 3 D).

    Numbers i and i + E / 2 of a head are a point in the plane, which turns by theta^(-2 i / E) from token to token.
    """
    size = qkv.shape[1] // 3 // num_heads  # E
    speeds = theta ** (-torch.arange(0, size, 2, device=qkv.device, dtype=torch.float32) / size)  # (E / 2,)
    angles = packing.positions(qkv.shape[0])[:, None] * speeds  # (N, E / 2)
    cos, sin = (of[:, None].to(qkv.dtype) for of in (angles.cos(), angles.sin()))  # (N, 1, E / 2)
    num_turned = 2 * num_heads * size
    points, values = qkv[:, :num_turned].unflatten(1, (2 * num_heads, 2, -1)), qkv[:, num_turned:]
    x, y = points[:, :, 0], points[:, :, 1]  # (N, 2 H, E / 2) each
    turned = torch.stack([x * cos - y * sin, y * cos + x * sin], 2)  # (N, 2 H, 2, E / 2)
    return torch.cat([turned.flatten(1), values], 1)


# ------------------------------------------------------------------------------------------------------- kernel


def _bits(
    packing: Packing, num_heads: int, prob: float, masks: DropoutMasks | None, first_only: bool
) -> DropoutBits | None:
    """The mask that `_by_groups` draws."""
    if masks is None or prob == 0:
        return None
    return masks.bits(packing.num_scores(num_heads, first_only), prob)


class _Rows(ctypes.Structure):
    """`Rows` of kernels.c."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("num_rows", "num_heads", "head_size", "first_only")),
        *((name, ctypes.c_void_p) for name in ("starts", "lengths", "bits_starts", "bits_strides", "bits")),
        ("threshold", ctypes.c_int),
        ("keep", ctypes.c_float),
    )


def _rows(packing: Packing, num_heads: int, head_size: int, first_only: bool, bits: DropoutBits | None) -> Any:
    """Where the kernel finds the rows, and the random bits of each, which lie as the scores of the padded blocks do."""
    bits_starts, bits_strides = np.empty_like(packing.starts), np.empty_like(packing.starts)  # (B,)
    first = 0
    for rows in packing.groups_of_rows:
        length = int(packing.lengths[rows].max())
        size = num_heads * length * (1 if first_only else length)  # scores of a row
        bits_starts[rows], bits_strides[rows] = first + size * np.arange(len(rows)), length
        first += size * len(rows)
    arrays = (packing.starts, packing.lengths, bits_starts, bits_strides)
    addresses = (array.ctypes.data for array in arrays)
    structure = _Rows(
        len(packing), num_heads, head_size, first_only, *addresses, *map(kernels.plain, kernels.bits_arguments(bits))
    )
    structure.arrays = arrays, bits  # alive for as long as their addresses are
    return structure


class _Attention(torch.autograd.Function):
    """From row to row: nothing is gathered or padded, and the backward pass computes the probabilities again."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys_values: Tensor | None,
        packing: Packing,
        num_heads: int,
        bits: DropoutBits | None,
    ) -> Tensor:
        """queries: (N, 3 D) with keys and values beside them, or (B, D) where keys_values (N, 2 D) are given."""
        first_only = keys_values is not None
        queries = queries.contiguous()
        keys_values = None if keys_values is None else keys_values.contiguous()
        places = _places(queries, keys_values)
        width = places[0].shape[1]
        num_queries = len(packing) if first_only else packing.num_tokens
        assert num_queries <= len(queries)
        assert packing.num_tokens <= len(queries if keys_values is None else keys_values)
        context = queries.new_empty(len(queries), width)
        context[num_queries:].zero_()
        softmax = queries.new_empty(len(queries), num_heads, 2)  # what the backward pass finds the probabilities by
        rows = _rows(packing, num_heads, width // num_heads, first_only, bits)
        kernels.call("attention_forward", ctypes.byref(rows), *places, context, softmax)
        ctx.save_for_backward(queries, keys_values, softmax)
        ctx.rows, ctx.num_queries, ctx.num_tokens = rows, num_queries, packing.num_tokens
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys_values, softmax = ctx.saved_tensors
        grad_queries = torch.empty_like(queries)
        grad_queries[ctx.num_queries :].zero_()
        grad_keys_values = None
        if keys_values is not None:
            grad_keys_values = torch.empty_like(keys_values)
            grad_keys_values[ctx.num_tokens :].zero_()
        places, into = _places(queries, keys_values), _parts(grad_queries, grad_keys_values)
        kernels.call("attention_backward", ctypes.byref(ctx.rows), *places, softmax, grad.contiguous(), *into)
        return grad_queries, grad_keys_values, None, None, None


def _places(queries: Tensor, keys_values: Tensor | None) -> tuple[Tensor, int, Tensor, Tensor, int]:
    """Query and the stride of its lines; key, value, and the stride of theirs. Views tell their addresses."""
    query, key, value = _parts(queries, keys_values)
    return query, query.stride(0), key, value, key.stride(0)


def _parts(queries: Tensor, keys_values: Tensor | None) -> Sequence[Tensor]:
    """Query, key and value, as views."""
    return queries.chunk(3, 1) if keys_values is None else (queries, *keys_values.chunk(2, 1))


# --------------------------------------------------------------------------------------------------------- CUDA


class _TritonAttention(torch.autograd.Function):
    """On a GPU, of any type: the tokens that belong to no row attend to each other."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys_values: Tensor | None,
        packing: Packing,
        num_heads: int,
        prob: float,
        masks: DropoutMasks | None,
    ) -> Tensor:
        """queries: (N, 3 D) with keys and values beside them, or (B, D) where keys_values (N, 2 D) are given."""
        queries = queries.contiguous()
        keys_values = None if keys_values is None else keys_values.contiguous()
        query, key, value = _parts(queries, keys_values)
        seed = (packing.ends, 0) if masks is None or prob == 0 else masks.key()
        unowned = rows_multiple(key.device, len(key))
        prob = 0.0 if masks is None else prob
        ctx.arguments = (packing.ends, packing.longest, unowned, num_heads, prob, seed)
        context, normalizers = triton_kernels().attention_forward(query, key, value, *ctx.arguments)
        ctx.save_for_backward(queries, keys_values, context, normalizers)
        ctx.masks = None if prob == 0 else masks
        return context  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys_values, context, normalizers = ctx.saved_tensors
        if ctx.masks is not None:
            ctx.masks.check_seed()
        grad_queries = torch.empty_like(queries)
        grad_keys_values = None if keys_values is None else torch.empty_like(keys_values)
        given, into = _parts(queries, keys_values), _parts(grad_queries, grad_keys_values)
        triton_kernels().attention_backward(grad.contiguous(), *given, context, normalizers, into, *ctx.arguments)
        return grad_queries, grad_keys_values, None, None, None, None
