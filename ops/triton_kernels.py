"""Kernels for CUDA in Triton, which torch brings along there.

Their definitions are the torch forms beside the calls, each in its operation's file.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.task_gradients import TaskBounds

PROGRAMS = 8 * 132  # of a backward pass at most, each with a part of the sums over rows


@triton.jit
def _keep(seed, number, lines, first, prob, width, BLOCK: tl.constexpr):
    """(lines, BLOCK) 1 / (1 - prob) where an element is kept, else 0, for elements `first` and on of lines (lines, 1),
    each width elements long. Eight of 16 bits come from a call of Philox with 7 rounds, the least that passes the known
    tests."""
    places = (lines * width + first) // 8 + tl.arange(0, BLOCK // 8)[None, :]
    r0, r1, r2, r3 = tl.randint4x(tl.load(seed) + number, places, n_rounds=7)
    words = tl.join(tl.join(r0, r1), tl.join(r2, r3)).to(tl.uint32, bitcast=True)
    draws = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [places.shape[0], BLOCK])
    return tl.where(draws.to(tl.float32) >= prob * 65536, 1 / (1 - prob), 0.0)


@triton.jit(do_not_specialize=["number"])
def _dropout(values, seed, number, prob, count, output, BLOCK: tl.constexpr):
    line = tl.program_id(0)
    place = line.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = tl.reshape(_keep(seed, number, line + tl.zeros([1, 1], tl.int32), 0, prob, BLOCK, BLOCK), [BLOCK])
    kept *= tl.load(values + place, place < count, 0.0).to(tl.float32)
    tl.store(output + place, kept.to(output.dtype.element_ty), place < count)


def dropout(values: Tensor, key: tuple[Tensor, int], prob: float) -> Tensor:
    """Of values of any shape, which lie in one piece; or of the gradient of what that gave."""
    output, count = torch.empty_like(values), values.numel()
    _dropout[(triton.cdiv(count, 1024),)](values, *key, _drawn(prob), count, output, BLOCK=1024)
    return output


@triton.jit(do_not_specialize=["number"])
def _residual_norm_forward(
    update, bias, residual, term, weight, shift, seed, number, prob, eps, size, sums, output, moments,
    HAS_TERM: tl.constexpr, DROPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside, place = column < size, row.to(tl.int64) * size + column
    x = tl.load(update + place, inside, 0.0).to(tl.float32) + tl.load(bias + column, inside, 0.0)
    if DROPS:
        x *= tl.reshape(_keep(seed, number, row + tl.zeros([1, 1], tl.int32), 0, prob, BLOCK, BLOCK), [BLOCK])
    x += tl.load(residual + place, inside, 0.0).to(tl.float32)
    if HAS_TERM:
        x += tl.load(term + place, inside, 0.0).to(tl.float32)
    tl.store(sums + place, x.to(sums.dtype.element_ty), inside)
    mean = tl.sum(x) / size
    centered = tl.where(inside, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centered * centered) / size + eps)
    tl.store(moments + 2 * row, mean)
    tl.store(moments + 2 * row + 1, scale)
    y = centered * scale * tl.load(weight + column, inside, 0.0) + tl.load(shift + column, inside, 0.0)
    tl.store(output + place, y.to(output.dtype.element_ty), inside)


@triton.jit
def _lines(bounds, task, num_lines, SPLITS: tl.constexpr):
    """The first of a task's lines, and behind its last: all of them where lines are not split by tasks."""
    if SPLITS:
        return tl.load(bounds + task), tl.load(bounds + task + 1)
    return 0 * num_lines, num_lines


@triton.jit(do_not_specialize=["number", "num_rows"])
def _residual_norm_backward(
    grad, sums, moments, weight, seed, number, prob, num_rows, bounds, size, grad_update, grad_sums, parts,
    DROPS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < size
    of_weight = tl.load(weight + column, column < size, 0.0).to(tl.float32)
    for_weight, for_shift = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for_bias = tl.zeros([BLOCK], tl.float32)
    first, end = _lines(bounds, tl.program_id(1), num_rows, SPLITS)
    for row in range(first + tl.program_id(0), end, tl.num_programs(0)):
        place = tl.cast(row, tl.int64) * size + column
        g = tl.load(grad + place, inside, 0.0).to(tl.float32)
        x = tl.load(sums + place, inside, 0.0).to(tl.float32)
        mean, scale = tl.load(moments + 2 * row), tl.load(moments + 2 * row + 1)
        normalized = tl.where(inside, (x - mean) * scale, 0.0)
        for_weight += g * normalized
        for_shift += g
        g *= of_weight
        found = (g - tl.sum(g) / size - normalized * (tl.sum(g * normalized) / size)) * scale
        tl.store(grad_sums + place, found.to(grad_sums.dtype.element_ty), inside)
        if DROPS:
            found *= tl.reshape(_keep(seed, number, row + tl.zeros([1, 1], tl.int32), 0, prob, BLOCK, BLOCK), [BLOCK])
            tl.store(grad_update + place, found.to(grad_update.dtype.element_ty), inside)
        for_bias += tl.where(inside, found, 0.0)
    place = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * 3 * size + column
    tl.store(parts + place, for_weight, inside)
    tl.store(parts + place + size, for_shift, inside)
    tl.store(parts + place + 2 * size, for_bias, inside)


def _drawn(prob: float) -> float:
    """The probability that 16 bits can tell."""
    return round(prob * 2**16) / 2**16


def residual_norm_forward(
    update: Tensor,
    bias: Tensor,
    residual: Tensor,
    term: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    key: tuple[Tensor, int],
    prob: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (N, D), output (N, D) and moments (N, 2), a row's mean and inverse deviation. prob: 0 for no dropout."""
    num_rows, size = update.shape
    sums, output = torch.empty_like(update), torch.empty_like(update)
    moments = torch.empty(num_rows, 2, dtype=torch.float32, device=update.device)
    block, prob = triton.next_power_of_2(size), _drawn(prob)
    _residual_norm_forward[(num_rows,)](
        update, bias, residual, update if term is None else term, weight, shift, *key, prob, eps, size, sums, output,
        moments, HAS_TERM=term is not None, DROPS=prob > 0, BLOCK=block,
    )  # fmt: skip
    return sums, output, moments


def _by_task(bounds: TaskBounds | None, values: Tensor) -> tuple[Tensor, bool, int]:
    """What a kernel needs to sum over lines of values (N, ...) by task: the bounds, whether there are any, and T."""
    within = values if bounds is None else bounds.within(values)
    return within, bounds is not None, 1 if bounds is None else len(within) - 1


def residual_norm_backward(
    grad: Tensor,
    sums: Tensor,
    moments: Tensor,
    weight: Tensor,
    key: tuple[Tensor, int],
    prob: float,
    bounds: TaskBounds | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the update and of the sums, both (N, D), and parts (T, programs, 3, D) of those of weight, shift
    and bias, each task's or, without bounds, of all lines together (T = 1)."""
    num_rows, size = sums.shape
    grad_sums = torch.empty_like(sums)
    grad_update = torch.empty_like(sums) if prob > 0 else grad_sums
    within, is_split, num_tasks = _by_task(bounds, sums)
    programs = min(PROGRAMS, triton.cdiv(num_rows, 8))
    parts = torch.empty(num_tasks, programs, 3, size, dtype=torch.float32, device=sums.device)
    block, prob = triton.next_power_of_2(size), _drawn(prob)
    _residual_norm_backward[(programs, num_tasks)](
        grad, sums, moments, weight, *key, prob, num_rows, within, size, grad_update, grad_sums, parts,
        DROPS=prob > 0, SPLITS=is_split, BLOCK=block,
    )  # fmt: skip
    return grad_update, grad_sums, parts


# ------------------------------------------------------------------------------------------------------ attention
#
# A program has a head and a block of a row's queries (or, for the gradients of keys and values, of its keys) and goes
# through the row's blocks of the others: rows of the usual two dozen tokens are one block, and nothing is padded.

TILE = tl.constexpr(32)  # queries or keys of a block
WARPS = 4


@triton.jit
def _row(ends, number, num_rows, num_tokens, FIRST_ONLY: tl.constexpr):
    """A row's first token, its tokens, its first query and its queries. Behind the rows the tokens of none make more of
    them, a block each."""
    start = tl.load(ends + tl.minimum(number, num_rows) - 1, number > 0, 0)
    length = tl.load(ends + number, number < num_rows, 0) - start
    if number >= num_rows:
        start += (number - num_rows) * TILE
        length = tl.maximum(tl.minimum(num_tokens - start, TILE), 0)
    if FIRST_ONLY:
        return start, length, number + 0 * start, tl.where(number < num_rows, 1, 0) + 0 * length
    return start, length, start, length


@triton.jit
def _block(pointer, stride, start, first, length, head, size, E: tl.constexpr):
    """(TILE, E) lines `first` and on of a row, one head's columns; zeros beyond the row's end and the head's."""
    line, column = first + tl.arange(0, TILE)[:, None], tl.arange(0, E)[None, :]
    place = (start + line) * stride + head * size + column
    return tl.load(pointer + place, (line < length) & (column < size), 0.0)


@triton.jit
def _put(pointer, values, stride, start, first, length, head, size, E: tl.constexpr):
    line, column = first + tl.arange(0, TILE)[:, None], tl.arange(0, E)[None, :]
    place = (start + line) * stride + head * size + column
    tl.store(pointer + place, values.to(pointer.dtype.element_ty), (line < length) & (column < size))


@triton.jit
def _mask(seed, number, first, head, first_key, prob, num_heads, width):
    """(TILE, TILE) dropout of the probabilities of queries `first` and on of the batch, keys `first_key` and on of a
    row."""
    lines = ((first + tl.arange(0, TILE)) * num_heads + head).to(tl.int32)[:, None]
    return _keep(seed, number, lines, first_key, prob, width, TILE)


@triton.jit(do_not_specialize=["number", "num_rows", "num_tokens", "width"])
def _attention_forward(
    query, key, value, ends, seed, number, prob, scale, num_rows, num_tokens, num_heads, size, width,
    query_stride, key_stride, context, normalizers,
    FIRST_ONLY: tl.constexpr, DROPS: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * TILE, tl.program_id(1)
    start, length, start_of_queries, num_queries = _row(ends, tl.program_id(2), num_rows, num_tokens, FIRST_ONLY)
    if first < num_queries:
        q = _block(query, query_stride, start_of_queries, first, num_queries, head, size, E)
        largest, total = tl.full([TILE], float("-inf"), tl.float32), tl.zeros([TILE], tl.float32)
        found = tl.zeros([TILE, E], tl.float32)
        for first_key in range(0, length, TILE):
            k = _block(key, key_stride, start, first_key, length, head, size, E)
            v = _block(value, key_stride, start, first_key, length, head, size, E)
            is_key = first_key + tl.arange(0, TILE)[None, :] < length
            scores = tl.where(is_key, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
            new_largest = tl.maximum(largest, tl.max(scores, 1))
            shares = tl.exp(scores - new_largest[:, None])
            shrunk = tl.exp(largest - new_largest)
            total = total * shrunk + tl.sum(shares, 1)
            if DROPS:
                shares *= _mask(seed, number, start_of_queries + first, head, first_key, prob, num_heads, width)
            found = found * shrunk[:, None] + tl.dot(shares.to(v.dtype), v, input_precision="ieee")
            largest = new_largest
        _put(context, found / total[:, None], num_heads * size, start_of_queries, first, num_queries, head, size, E)
        line = first + tl.arange(0, TILE)
        place = (start_of_queries + line) * num_heads + head
        tl.store(normalizers + place, largest + tl.log(total), line < num_queries)


@triton.jit
def _shares(
    q, k, normalizers, start_of_queries, first, num_queries, first_key, length, head, num_heads, scale
):  # fmt: skip
    """(TILE, TILE) attention probabilities, zero beyond a row's ends."""
    line = first + tl.arange(0, TILE)
    normalizer = tl.load(normalizers + (start_of_queries + line) * num_heads + head, line < num_queries, 0.0)
    is_there = (line[:, None] < num_queries) & (first_key + tl.arange(0, TILE)[None, :] < length)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    return tl.where(is_there, tl.exp(scores - normalizer[:, None]), 0.0)


@triton.jit(do_not_specialize=["number", "num_rows", "num_tokens", "width"])
def _attention_backward_queries(
    query, key, value, ends, seed, number, prob, scale, num_rows, num_tokens, num_heads, size, width,
    query_stride, key_stride, context, normalizers, grad, removed, grad_query,
    FIRST_ONLY: tl.constexpr, DROPS: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries; removed (N, H): what the softmax takes off, the inner products of context and
    gradient."""
    first, head = tl.program_id(0) * TILE, tl.program_id(1)
    start, length, start_of_queries, num_queries = _row(ends, tl.program_id(2), num_rows, num_tokens, FIRST_ONLY)
    if first < num_queries:
        q = _block(query, query_stride, start_of_queries, first, num_queries, head, size, E)
        g = _block(grad, num_heads * size, start_of_queries, first, num_queries, head, size, E)
        o = _block(context, num_heads * size, start_of_queries, first, num_queries, head, size, E)
        less = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
        line = first + tl.arange(0, TILE)
        tl.store(removed + (start_of_queries + line) * num_heads + head, less, line < num_queries)
        found = tl.zeros([TILE, E], tl.float32)
        for first_key in range(0, length, TILE):
            k = _block(key, key_stride, start, first_key, length, head, size, E)
            v = _block(value, key_stride, start, first_key, length, head, size, E)
            shares = _shares(
                q, k, normalizers, start_of_queries, first, num_queries, first_key, length, head, num_heads, scale
            )
            of_shares = tl.dot(g, tl.trans(v), input_precision="ieee")
            if DROPS:
                of_shares *= _mask(seed, number, start_of_queries + first, head, first_key, prob, num_heads, width)
            of_scores = shares * (of_shares - less[:, None])
            found += tl.dot(of_scores.to(k.dtype), k, input_precision="ieee")
        _put(grad_query, found * scale, query_stride, start_of_queries, first, num_queries, head, size, E)


@triton.jit(do_not_specialize=["number", "num_rows", "num_tokens", "width"])
def _attention_backward_keys(
    query, key, value, ends, seed, number, prob, scale, num_rows, num_tokens, num_heads, size, width,
    query_stride, key_stride, normalizers, grad, removed, grad_key, grad_value,
    FIRST_ONLY: tl.constexpr, DROPS: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    first_key, head = tl.program_id(0) * TILE, tl.program_id(1)
    start, length, start_of_queries, num_queries = _row(ends, tl.program_id(2), num_rows, num_tokens, FIRST_ONLY)
    if first_key < length:
        k = _block(key, key_stride, start, first_key, length, head, size, E)
        v = _block(value, key_stride, start, first_key, length, head, size, E)
        of_key, of_value = tl.zeros([TILE, E], tl.float32), tl.zeros([TILE, E], tl.float32)
        for first in range(0, num_queries, TILE):
            q = _block(query, query_stride, start_of_queries, first, num_queries, head, size, E)
            g = _block(grad, num_heads * size, start_of_queries, first, num_queries, head, size, E)
            line = first + tl.arange(0, TILE)
            less = tl.load(removed + (start_of_queries + line) * num_heads + head, line < num_queries, 0.0)
            shares = _shares(
                q, k, normalizers, start_of_queries, first, num_queries, first_key, length, head, num_heads, scale
            )
            of_shares = tl.dot(g, tl.trans(v), input_precision="ieee")
            kept = shares
            if DROPS:
                mask = _mask(seed, number, start_of_queries + first, head, first_key, prob, num_heads, width)
                kept, of_shares = shares * mask, of_shares * mask
            of_value += tl.dot(tl.trans(kept).to(g.dtype), g, input_precision="ieee")
            of_scores = shares * (of_shares - less[:, None])
            of_key += tl.dot(tl.trans(of_scores).to(q.dtype), q, input_precision="ieee")
        _put(grad_key, of_key * scale, key_stride, start, first_key, length, head, size, E)
        _put(grad_value, of_value, key_stride, start, first_key, length, head, size, E)


def _attention_arguments(
    query: Tensor, key: Tensor, ends: Tensor, longest: int, unowned: int, num_heads: int, prob: float,
    seed: tuple[Tensor, int],
) -> tuple[tuple[int, int, int], tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """The grid over blocks of keys, what the kernels share behind the three tensors, and what they are compiled for."""
    size, first_only = query.shape[1] // num_heads, len(query) != len(key)
    num_blocks, num_more = (triton.cdiv(length, TILE.value) for length in (longest, unowned))
    numbers = (len(ends), len(key), num_heads, size, num_blocks * TILE.value, query.stride(0), key.stride(0))
    block = max(16, triton.next_power_of_2(size))
    constants = {"FIRST_ONLY": first_only, "DROPS": prob > 0, "E": block, "num_warps": WARPS}
    return (num_blocks, num_heads, len(ends) + num_more), (ends, *seed, _drawn(prob), size**-0.5, *numbers), constants


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, unowned: int, num_heads: int,
    prob: float, seed: tuple[Tensor, int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Context, as query, and each query's and head's logarithm of the softmax's sum.

    query: (N, D), or (B, D) of the first tokens; key, value: (N, D); all may be columns of wider tensors. ends: (B,)
    behind each row's last token. longest: no row has more tokens; unowned: so many at most belong to none. prob: 0 for
    no dropout.
    """
    grid, arguments, constants = _attention_arguments(query, key, ends, longest, unowned, num_heads, prob, seed)
    context = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    normalizers = torch.empty(len(query), num_heads, dtype=torch.float32, device=query.device)
    grid = (1, *grid[1:]) if constants["FIRST_ONLY"] else grid
    _attention_forward[grid](query, key, value, *arguments, context, normalizers, **constants)
    return context, normalizers


def attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, context: Tensor, normalizers: Tensor, into:
    Sequence[Tensor], ends: Tensor, longest: int, unowned: int, num_heads: int, prob: float, seed: tuple[Tensor, int],
) -> None:  # fmt: skip
    """Writes the gradients of query, key and value into tensors that lie as they do."""
    grid, arguments, constants = _attention_arguments(query, key, ends, longest, unowned, num_heads, prob, seed)
    removed = torch.empty_like(normalizers)
    given = (query, key, value, *arguments)
    of_queries = (1, *grid[1:]) if constants["FIRST_ONLY"] else grid
    _attention_backward_queries[of_queries](*given, context, normalizers, grad, removed, into[0], **constants)
    _attention_backward_keys[grid](*given, normalizers, grad, removed, *into[1:], **constants)


# ------------------------------------------------------------------------------------------------- sums of columns


@triton.jit(do_not_specialize=["num_rows"])
def _column_sums(
    values, num_rows, bounds, size, parts, SPLITS: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([LINES, BLOCK], tl.float32)
    first, end = _lines(bounds, tl.program_id(2), num_rows, SPLITS)
    for begin in range(first + tl.program_id(0) * LINES, end, tl.num_programs(0) * LINES):
        row = (begin + tl.arange(0, LINES))[:, None]
        place = row.to(tl.int64) * size + column
        total += tl.load(values + place, (row < end) & (column < size), 0.0).to(tl.float32)
    place = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * size + column
    tl.store(parts + place, tl.sum(total, 0)[None, :], column < size)


@triton.jit(do_not_specialize=["num_parts", "turns"])
def _add_parts(
    parts, num_parts, size, turns, stride, into0, into1, into2,
    K: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column, vector = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :], tl.program_id(1)
    parts += tl.program_id(2) * num_parts * K * size
    total = tl.zeros([LINES, BLOCK], tl.float32)
    for turn in range(turns):
        row = (turn * LINES + tl.arange(0, LINES))[:, None]
        total += tl.load(parts + (row * K + vector) * size + column, (row < num_parts) & (column < size), 0.0)
    into = into0
    if vector == 1:
        into = into1
    if vector == 2:
        into = into2
    into += tl.program_id(2).to(tl.int64) * stride
    sums = tl.load(into + column, column < size, 0.0) + tl.sum(total, 0)[None, :]
    tl.store(into + column, sums, column < size)


def column_parts(values: Tensor, bounds: TaskBounds | None = None) -> Tensor:
    """(T, programs, 1, O) float32 parts of the sums over the lines of (N, O)."""
    num_rows, size = values.shape
    lines, block = 16, 256
    num_blocks = triton.cdiv(size, block)
    programs = min(triton.cdiv(1024, num_blocks), triton.cdiv(num_rows, lines))
    within, is_split, num_tasks = _by_task(bounds, values)
    parts = torch.empty(num_tasks, programs, 1, size, dtype=torch.float32, device=values.device)
    grid = (programs, num_blocks, num_tasks)
    _column_sums[grid](values, num_rows, within, size, parts, SPLITS=is_split, LINES=lines, BLOCK=block)
    return parts


def add_parts(parts: Tensor, into: Sequence[Tensor], stride: int = 0) -> None:
    """Adds the sums of (T, programs, K, D) over the programs to K vectors (D,) of float32, at most three, and those of
    a task to what lies stride numbers behind the one before."""
    num_tasks, programs, count, size = parts.shape
    targets = (*into, *[into[0]] * (3 - count))
    grid = (triton.cdiv(size, 32), count, num_tasks)
    _add_parts[grid](parts, programs, size, triton.cdiv(programs, 32), stride, *targets, K=count, LINES=32, BLOCK=32)


# ------------------------------------------------------------------------------------- gradients of matrices by task


@triton.jit(do_not_specialize=["stride"])
def _add_products(
    left, right, bounds, num_left, num_right, into, stride,
    PRECISION: tl.constexpr, LINES: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * LEFT + tl.arange(0, LEFT), tl.program_id(1) * RIGHT + tl.arange(0, RIGHT)
    total = tl.zeros([LEFT, RIGHT], tl.float32)
    first, end = _lines(bounds, tl.program_id(2), 0, True)
    for begin in range(first, end, LINES):
        line = (begin + tl.arange(0, LINES))[:, None]
        one = tl.load(left + line.to(tl.int64) * num_left + row, (line < end) & (row < num_left), 0.0)
        other = tl.load(right + line.to(tl.int64) * num_right + column, (line < end) & (column < num_right), 0.0)
        total = tl.dot(tl.trans(one), other, total, input_precision=PRECISION)
    place = into + tl.program_id(2).to(tl.int64) * stride + row[:, None].to(tl.int64) * num_right + column
    inside = (row[:, None] < num_left) & (column < num_right)
    tl.store(place, tl.load(place, inside, 0.0) + total, inside)


def add_products(left: Tensor, right: Tensor, into: Tensor, bounds: TaskBounds) -> None:
    """Adds left^T right over each task's lines, (N, O), (N, I) -> (O, I), to into (float32) and to what lies as far
    behind it as the bounds say."""
    num_left, num_right = left.shape[1], right.shape[1]
    is_float = left.dtype == torch.float32
    tile, lines = (64, 32) if is_float else (128, 64)
    within, _, num_tasks = _by_task(bounds, left)
    grid = (triton.cdiv(num_left, tile), triton.cdiv(num_right, tile), num_tasks)
    _add_products[grid](
        left, right, within, num_left, num_right, into, bounds.stride, PRECISION="ieee" if is_float else "tf32",
        LINES=lines, LEFT=tile, RIGHT=tile, num_warps=4 if is_float else 8,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- GELU


@triton.jit
def _gelu_forward(inputs, bias, count, size, output, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(inputs + place, place < count, 0.0).to(tl.float32) + tl.load(bias + place % size, place < count, 0.0)
    y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    tl.store(output + place, y.to(output.dtype.element_ty), place < count)


@triton.jit(do_not_specialize=["num_rows"])
def _gelu_backward(
    grad, inputs, bias, num_rows, bounds, size, grad_inputs, parts,
    SPLITS: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    shift = tl.load(bias + column, column < size, 0.0)
    total = tl.zeros([LINES, BLOCK], tl.float32)
    first, end = _lines(bounds, tl.program_id(2), num_rows, SPLITS)
    for begin in range(first + tl.program_id(0) * LINES, end, tl.num_programs(0) * LINES):
        row = (begin + tl.arange(0, LINES))[:, None]
        place, inside = row.to(tl.int64) * size + column, (row < end) & (column < size)
        x = tl.load(inputs + place, inside, 0.0).to(tl.float32) + shift
        slope = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
        found = tl.load(grad + place, inside, 0.0).to(tl.float32) * slope
        tl.store(grad_inputs + place, found.to(grad_inputs.dtype.element_ty), inside)
        total += found
    place = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * size + column
    tl.store(parts + place, tl.sum(total, 0)[None, :], column < size)


def gelu_forward(inputs: Tensor, bias: Tensor) -> Tensor:
    """GELU(inputs + bias), (N, O)."""
    output = torch.empty_like(inputs)
    grid = (triton.cdiv(inputs.numel(), 2048),)
    _gelu_forward[grid](inputs, bias, inputs.numel(), inputs.shape[1], output, BLOCK=2048)
    return output


def gelu_backward(grad: Tensor, inputs: Tensor, bias: Tensor, bounds: TaskBounds | None) -> tuple[Tensor, Tensor]:
    """The gradient of the inputs (N, O), and parts (T, programs, 1, O) of that of the bias."""
    num_rows, size = inputs.shape
    lines, block = 8, 256
    num_blocks = triton.cdiv(size, block)
    programs = min(triton.cdiv(2048, num_blocks), triton.cdiv(num_rows, lines))
    within, is_split, num_tasks = _by_task(bounds, inputs)
    parts, grad_inputs = grad.new_empty(num_tasks, programs, 1, size, dtype=torch.float32), torch.empty_like(inputs)
    grid = (programs, num_blocks, num_tasks)
    _gelu_backward[grid](
        grad, inputs, bias, num_rows, within, size, grad_inputs, parts, SPLITS=is_split, LINES=lines, BLOCK=block
    )
    return grad_inputs, parts


# ---------------------------------------------------------------------------------------------------------- AdamW


@triton.jit
def _adamw(
    values, gradient, mean, square, step, lr, factor, is_skipped, count, num_decayed, decay, beta1, beta2, log1, log2,
    eps, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(is_skipped) == 0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < count
        g = tl.load(gradient + place, inside, 0.0) * tl.load(factor).to(tl.float32)
        m = tl.load(mean + place, inside, 0.0)
        v = tl.load(square + place, inside, 0.0)
        m += (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g * g
        tl.store(mean + place, m, inside)
        tl.store(square + place, v, inside)
        num_steps = tl.load(step).to(tl.float64)
        rate = tl.load(lr).to(tl.float32)
        of_mean = (1 / (1 - tl.exp(num_steps * log1))).to(tl.float32)
        of_square = (1 / (1 - tl.exp(num_steps * log2))).to(tl.float32)
        x = tl.load(values + place, inside, 0.0) * (1 - tl.where(place < num_decayed, rate * decay, 0.0))
        tl.store(values + place, x - rate * m * of_mean / (tl.sqrt(v * of_square) + eps), inside)


def adamw(
    values: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor, Tensor], lr: Tensor, factor: Tensor, is_skipped:
    Tensor, num_decayed: int, decay: float, betas: tuple[float, float], eps: float,
) -> None:  # fmt: skip
    """One step of (P,) float32; moments: of the gradient, of its square, and the number of steps, this one included."""
    logarithms = tuple(math.log(beta) for beta in betas)
    scalars = (len(values), num_decayed, decay, *betas, *logarithms, eps)
    grid = (triton.cdiv(len(values), 1024),)
    _adamw[grid](values, gradient, *moments, lr, factor, is_skipped, *scalars, BLOCK=1024)


# -------------------------------------------------------------------------------------------- gradient treatments


@triton.jit
def _gramian(rows, num_columns, stride, parts, T: tl.constexpr, BLOCK: tl.constexpr):
    """Each program's part of the T x T inner products, in parts (programs, T, T)."""
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < num_columns
    for i in tl.static_range(T):
        one = tl.load(rows + i * stride + column, inside, 0.0)
        for j in tl.static_range(i, T):
            product = tl.sum(one * tl.load(rows + j * stride + column, inside, 0.0))
            tl.store(parts + (tl.program_id(0) * T + i) * T + j, product)
            tl.store(parts + (tl.program_id(0) * T + j) * T + i, product)


@triton.jit
def _weighted_sum(rows, num_columns, stride, weights, T: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < num_columns
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(T):
        total += tl.load(weights + i) * tl.load(rows + i * stride + column, inside, 0.0)
    tl.store(rows + column, total, inside)


def gramian(rows: Tensor) -> Tensor:
    """(T, T) inner products of the rows of (T, P), float64; each line of rows lies in one piece."""
    count, size = rows.shape
    block = 4096
    programs = triton.cdiv(size, block)
    parts = torch.empty(programs, count, count, dtype=torch.float32, device=rows.device)
    _gramian[(programs,)](rows, size, rows.stride(0), parts, T=count, BLOCK=block)
    return parts.sum(0, dtype=torch.float64)  # (programs, T, T) -> (T, T)


def weighted_sum(rows: Tensor, weights: Tensor) -> None:
    """The sum of weights[t] * rows[t], in place of the first row. rows: (T, P), weights: (T,) float32, both on the
    GPU."""
    count, size = rows.shape
    block = 4096
    _weighted_sum[(triton.cdiv(size, block),)](rows, size, rows.stride(0), weights, T=count, BLOCK=block)
