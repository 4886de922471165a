"""The functions of kernels.c on tensors; attention, GELU and dropout + residual sum + LayerNorm can be differentiated.

kernels.c is compiled when it is first needed, in a second, for the processor at hand, and kept in the user's cache
folder. Where that cannot be done (no GCC, no Linux) `usable` is false, and the modules that call these functions do the
same with torch's operations and the same random draws.

Shape letters: N packed tokens, B rows, D hidden, H heads, W width of a layer's output.
"""

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SOURCE = Path(__file__).resolve().with_suffix(".c")
FLAGS = (
    "-O3",
    "-std=gnu11",
    "-ffp-contract=fast",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
)
FLAGS_OF = {"x86_64": ("-march=native", "-mprefer-vector-width=512"), "aarch64": ("-mcpu=native",)}


class BuildError(Exception):
    """The kernels cannot be had here; the message says why."""


# ------------------------------------------------------------------------------------------------------ compiling


class Build(NamedTuple):
    """The loaded kernels, or why there are none."""

    library: ctypes.CDLL | None
    problem: str


@cache
def build() -> Build:
    """Compiles the kernels, or finds them in the cache folder, and loads them."""
    try:
        path = _path()
        if path.is_file():
            try:
                return Build(_load(path), "")
            except OSError:  # damaged: made again
                pass
        _compile(path)
        return Build(_load(path), "")
    except (BuildError, OSError, ValueError, RuntimeError) as error:  # ValueError: CC; RuntimeError: no home directory
        return Build(None, str(error))


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name in SIGNATURES:
        getattr(library, name).argtypes = SIGNATURES[name]
        getattr(library, name).restype = None
    return library


def _path() -> Path:
    """Where the shared library is kept, by what it is made from: source, flags and processor."""
    if platform.system() != "Linux" or platform.machine() not in FLAGS_OF:
        found = f"{platform.system()} on {platform.machine()}"
        raise BuildError(f"made for Linux on {' and '.join(FLAGS_OF)}, this is {found}")
    made_from = (SOURCE.read_bytes(), *map(str.encode, (*_compiler(), *_flags(), _openmp(), _processor())))
    digest = hashlib.sha256(b"\0".join(made_from)).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "multitask-bert"
    return folder / f"kernels-{digest}.so"


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CC", "gcc"))


def _flags() -> tuple[str, ...]:
    return (*FLAGS, *FLAGS_OF[platform.machine()])


def _compile(path: Path) -> None:
    compiler = _compiler()
    if not compiler or shutil.which(compiler[0]) is None:
        raise BuildError(f"no C compiler: {' '.join(compiler)} was not found")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / "kernels.so"
        _run([*compiler, *_flags(), "-c", str(SOURCE), "-o", f"{scratch}/kernels.o"])
        # Linked by hand: the OpenMP that torch has loaded is the one to use, two pools of threads would compete.
        _run([*compiler, "-shared", f"{scratch}/kernels.o", _openmp(), "-lm", "-o", str(made)])
        os.replace(made, path)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise BuildError(f"{command[0]} failed: {next((line for line in lines if 'error' in line), lines[0])}")


def _openmp() -> str:
    """The OpenMP library of this process."""
    pattern = r"^\S+ \S+ \S+ \S+ \S+ +(/.*/lib(?:gomp|iomp5)[^/]*\.so[^/]*)$"
    loaded = re.findall(pattern, Path("/proc/self/maps").read_text(), re.MULTILINE)
    if not loaded:
        raise BuildError("torch has loaded no OpenMP library")
    of_torch = [path for path in loaded if "torch" in path]
    return str((of_torch or loaded)[0])


def _processor() -> str:
    """What the processor can do: the compiled kernels may not run on another one."""
    found = re.search(r"^(?:flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[0] if found else platform.processor()


def record(device: str) -> str:
    """What the record of a run on a device says of the kernels: "compiled", why there are none, or "not used"."""
    return (build().problem or "compiled") if device == "cpu" else "not used"


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels can work on these: float32 on the CPU, no autocast, and compiled."""
    return (
        all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
        and not torch.is_autocast_enabled("cpu")
        and build().library is not None
    )


def _function(name: str) -> Any:
    library = build().library
    assert library is not None, "asked for where `usable` is false"
    return getattr(library, name)


class _Rows(ctypes.Structure):
    """`Rows` of kernels.c."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("num_rows", "num_heads", "head_size")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "query_starts",
                "num_queries",
                "starts",
                "lengths",
                "bits_starts",
                "bits_queries",
                "bits_strides",
                "bits",
            )
        ),
        ("threshold", ctypes.c_int),
        ("keep", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("query_bias", "key_bias", "value_bias")),
    )


_LONG, _POINTER, _INT, _FLOAT = ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_float
_DROPOUT = (_POINTER, _INT, _FLOAT)
SIGNATURES: dict[str, Sequence[Any]] = {
    "gelu_forward": (_LONG, _LONG, *[_POINTER] * 3, _INT),
    "gelu_backward": (_LONG, _LONG, *[_POINTER] * 5, _INT),
    "residual_norm_forward": (
        *(_LONG, _LONG, *[_POINTER] * 4),
        *(*_DROPOUT, _POINTER, _POINTER, _FLOAT, *[_POINTER] * 4, _INT),
    ),
    "residual_norm_backward": (_LONG, _LONG, *[_POINTER] * 5, *_DROPOUT, *[_POINTER] * 5, _INT),
    "attention_forward": (
        *(ctypes.POINTER(_Rows), _POINTER, _LONG, _POINTER, _POINTER, _LONG),
        *(_POINTER, _LONG, _POINTER, _INT),
    ),
    "random_words": (ctypes.c_uint64, ctypes.c_uint64, _LONG, _POINTER, _INT),
    "block_gramians": (*[_LONG] * 4, _POINTER, _POINTER, _INT),
    "weighted_sum": (_LONG, _LONG, _POINTER, _POINTER, _INT),
    "squared_sums": (_LONG, _LONG, _POINTER, _POINTER, _INT),
    "adamw": (_LONG, _LONG, *[_POINTER] * 5, *[_FLOAT] * 8, _INT),
    "attention_backward": (
        *(ctypes.POINTER(_Rows), _POINTER, _LONG, _POINTER, _POINTER, _LONG, _POINTER),
        *(_POINTER, _LONG, _POINTER, _POINTER, _POINTER, _INT),
    ),
}


def _address(tensor: Tensor | None, offset: int = 0) -> int | None:
    """Of a tensor's element `offset`; None for none."""
    return None if tensor is None else tensor.data_ptr() + offset * tensor.element_size()


# -------------------------------------------------------------------------------------------------------- dropout


SLACK = 16  # LANES of kernels.c
_GOLDEN, _MIX = 0x9E3779B97F4A7C15, ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # SplitMix64's


def random_words(key: int, first: int, count: int) -> np.ndarray:
    """Numbers first to first + count - 1, counted from 0, of SplitMix64's sequence from a 64-bit key: (count,) uint64.

    Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators". With and without the kernels the same.
    """
    key %= 2**64
    if build().library is not None:
        words = np.empty(count, np.uint64)
        _function("random_words")(key, first, count, words.ctypes.data, torch.get_num_threads())
        return words
    words = np.arange(first + 1, first + count + 1, dtype=np.uint64)
    words *= np.uint64(_GOLDEN)
    words += np.uint64(key)
    for shift, factor in _MIX:
        words ^= words >> np.uint64(shift)
        words *= np.uint64(factor)
    words ^= words >> np.uint64(31)
    return words


@dataclass(frozen=True)
class DropoutBits:
    """Which elements dropout keeps: those whose word, (numel,) int16, is at least `threshold`. They are multiplied by
    `keep`. There have to be `SLACK` more words, which mean nothing."""

    words: Tensor
    threshold: int
    keep: float

    @classmethod
    def of(cls, words: Tensor, prob: float) -> "DropoutBits":
        """words: (numel + SLACK,) int16, random. prob: of dropping an element; met to within 1/131072."""
        dropped = min(round(prob * 2**16), 2**16 - 1)
        return cls(words, dropped - 2**15, 2**16 / (2**16 - dropped))

    def mask(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """`keep` where an element is kept, else 0."""
        mask = torch.empty(tuple(shape), dtype=dtype)
        torch.ge(self.words[: mask.numel()].view(mask.shape), self.threshold, out=mask)
        return mask.mul_(self.keep)


def _arguments(bits: DropoutBits | None) -> tuple[int | None, int, float]:
    return (None, 0, 1.0) if bits is None else (_address(bits.words), bits.threshold, bits.keep)


# ----------------------------------------------------------------------------------------------------------- GELU


def bias_gelu(inputs: Tensor, bias: Tensor) -> Tensor:
    """GELU(inputs + bias), exact, not the tanh approximation: (N, W), (W,) -> (N, W)."""
    return _BiasGelu.apply(inputs, bias)  # type: ignore[no-any-return]


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, bias: Tensor) -> Tensor:
        inputs, bias = inputs.contiguous(), bias.contiguous()
        assert bias.shape == inputs.shape[1:]
        ctx.save_for_backward(inputs, bias)
        output = torch.empty_like(inputs)
        pointers = map(_address, (inputs, bias, output))
        _function("gelu_forward")(*inputs.shape, *pointers, torch.get_num_threads())
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        inputs, bias = ctx.saved_tensors
        grad, threads = grad.contiguous(), torch.get_num_threads()
        grad_inputs, grad_bias = torch.empty_like(inputs), bias.new_zeros(threads, len(bias))
        pointers = map(_address, (inputs, bias, grad, grad_inputs, grad_bias))
        _function("gelu_backward")(*inputs.shape, *pointers, threads)
        return grad_inputs, grad_bias.sum(0)


# -------------------------------------------------------------------------------------------------- residual norm


def residual_norm(
    update: Tensor,
    bias: Tensor,
    residual: Tensor,
    term: Tensor | None,
    bits: DropoutBits | None,
    norm: nn.LayerNorm,
) -> Tensor:
    """norm(residual + dropout(update + bias) + term), bias (D,), the others (N, D).

    bits: of N * D elements; None for no dropout.
    """
    return _ResidualNorm.apply(update, bias, residual, term, norm.weight, norm.bias, bits, norm.eps)  # type: ignore[no-any-return]


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        update: Tensor,
        offset: Tensor,
        residual: Tensor,
        term: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        bits: DropoutBits | None,
        eps: float,
    ) -> Tensor:
        update, residual, weight, bias, offset = (t.contiguous() for t in (update, residual, weight, bias, offset))
        term = None if term is None else term.contiguous()
        assert residual.shape == update.shape and (term is None or term.shape == update.shape)
        assert weight.shape == bias.shape == offset.shape == update.shape[1:]
        sums, output = torch.empty_like(update), torch.empty_like(update)
        mean, scale = update.new_empty(len(update)), update.new_empty(len(update))
        _function("residual_norm_forward")(
            *update.shape,
            *map(_address, (update, offset, residual, term)),
            *_arguments(bits),
            *map(_address, (weight, bias)),
            eps,
            *map(_address, (sums, mean, scale, output)),
            torch.get_num_threads(),
        )
        ctx.save_for_backward(sums, mean, scale, weight)
        ctx.bits, ctx.has_term = bits, term is not None
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sums, mean, scale, weight = ctx.saved_tensors
        grad, threads = grad.contiguous(), torch.get_num_threads()
        grad_sums = torch.empty_like(sums)
        grad_update = grad_sums if ctx.bits is None else torch.empty_like(sums)
        parts = weight.new_zeros(3, threads, len(weight))
        _function("residual_norm_backward")(
            *sums.shape,
            *map(_address, (grad, sums, mean, scale, weight)),
            *_arguments(ctx.bits),
            *map(_address, (grad_sums, grad_update, *parts)),
            threads,
        )
        grad_offset, grad_weight, grad_bias = parts.sum(1)
        grad_term = grad_sums if ctx.has_term else None
        return grad_update, grad_offset, grad_sums, grad_term, grad_weight, grad_bias, None, None


# ------------------------------------------------------------------------------------------------------ attention


@dataclass(frozen=True)
class AttentionRows:
    """Where the B rows of a batch lie, without gaps between them, each array (B,) int64; see `Rows` in kernels.c.

    query_starts, num_queries: in lines of the queries; starts, lengths: in lines of keys and values. The random bits of
    query q and key k in head h are at bits_starts + (h * bits_queries + q) * bits_strides + k.
    """

    query_starts: np.ndarray
    num_queries: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    bits_starts: np.ndarray
    bits_queries: np.ndarray
    bits_strides: np.ndarray

    def __post_init__(self) -> None:
        for array in self._arrays:
            assert array.dtype == np.int64 and array.flags.c_contiguous and array.shape == self.starts.shape

    @property
    def _arrays(self) -> list[np.ndarray]:
        return [getattr(self, name) for name in self.__dataclass_fields__]

    @property
    def num_lines(self) -> int:
        """Lines of keys and values that belong to a row."""
        return int(self.lengths.sum())

    def for_kernel(self, num_heads: int, head_size: int, bits: DropoutBits | None, bias: Tensor | None = None) -> _Rows:
        """`Rows` of kernels.c. bias: (3 D,) of queries, keys and values."""
        width, addresses = num_heads * head_size, (array.ctypes.data for array in self._arrays)
        biases = (None,) * 3 if bias is None else (_address(bias, i * width) for i in range(3))
        return _Rows(len(self.starts), num_heads, head_size, *addresses, *_arguments(bits), *biases)


def self_attention(
    qkv: Tensor, bias: Tensor | None, rows: AttentionRows, num_heads: int, bits: DropoutBits | None
) -> Tensor:
    """softmax(Q K^T / sqrt(E)) V within each row, with dropout on the probabilities.

    qkv: (N, 3 D) queries, keys and values, to which the bias (3 D,) is still to be added where there is one. Returns
    (N, D); the lines behind the last row are zero.
    """
    return _Attention.apply(qkv, None, bias, rows, num_heads, bits)  # type: ignore[no-any-return]


def cross_attention(
    queries: Tensor, keys_values: Tensor, rows: AttentionRows, num_heads: int, bits: DropoutBits | None
) -> Tensor:
    """The same with queries (M, D) of their own beside keys and values (N, 2 D). Returns (M, D)."""
    return _Attention.apply(queries, keys_values, None, rows, num_heads, bits)  # type: ignore[no-any-return]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys_values: Tensor | None,
        bias: Tensor | None,
        rows: AttentionRows,
        num_heads: int,
        bits: DropoutBits | None,
    ) -> Tensor:
        queries = queries.contiguous()
        keys_values = None if keys_values is None else keys_values.contiguous()
        bias = None if bias is None else bias.contiguous()
        width = queries.shape[1] // (3 if keys_values is None else 1)
        context = queries.new_empty(len(queries), width)
        assert rows.num_lines <= (len(queries) if keys_values is None else len(keys_values))
        assert bias is None or bias.shape == queries.shape[1:]
        context[int(rows.num_queries.sum()) :].zero_()
        softmax = queries.new_empty(len(queries), num_heads, 2)
        _function("attention_forward")(
            rows.for_kernel(num_heads, width // num_heads, bits, bias),
            *_lines(queries, keys_values, width),
            _address(context),
            width,
            _address(softmax),
            torch.get_num_threads(),
        )
        ctx.save_for_backward(queries, keys_values, bias, softmax)
        ctx.rows, ctx.num_heads, ctx.bits = rows, num_heads, bits
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys_values, bias, softmax = ctx.saved_tensors
        grad, width = grad.contiguous(), grad.shape[1]
        grad_queries, grad_keys_values = torch.empty_like(queries), None
        grad_queries[int(ctx.rows.num_queries.sum()) :].zero_()
        if keys_values is not None:
            grad_keys_values = torch.empty_like(keys_values)
            grad_keys_values[ctx.rows.num_lines :].zero_()
        into_queries, _, into_keys, into_values, _ = _lines(grad_queries, grad_keys_values, width)
        _function("attention_backward")(
            ctx.rows.for_kernel(ctx.num_heads, width // ctx.num_heads, ctx.bits, bias),
            *_lines(queries, keys_values, width),
            _address(softmax),
            _address(grad),
            width,
            into_queries,
            into_keys,
            into_values,
            torch.get_num_threads(),
        )
        return grad_queries, grad_keys_values, None if bias is None else grad_queries.sum(0), None, None, None


def _lines(queries: Tensor, keys_values: Tensor | None, width: int) -> tuple[int | None, ...]:
    """Addresses and strides: of queries, the stride of their lines; of keys, of values, the stride of theirs."""
    others, first = (queries, width) if keys_values is None else (keys_values, 0)
    return (
        *(_address(queries), queries.shape[1]),
        *(_address(others, first), _address(others, first + width), others.shape[1]),
    )


# ------------------------------------------------------------------------------------------- gradients, optimizer

BLOCK = 2**16  # numbers whose squares are summed together: the result does not depend on the number of threads
LINE = 2**10  # numbers that the optimizer's kernel takes at a time where there are no lines
FEW = 2**15  # numbers that a second thread would not make faster


def squared_norm(tensor: Tensor) -> float:
    """Sum of squares of a contiguous tensor, in float64."""
    squares = torch.empty(-(-tensor.numel() // BLOCK), dtype=torch.float64)
    _function("squared_sums")(tensor.numel(), BLOCK, _address(tensor), _address(squares), _threads_for(tensor))
    return float(squares.sum())


def block_gramians(rows: Tensor, block: int) -> Tensor:
    """(blocks, T, T) float64 inner products of rows (T, P) over each block of columns. rows: each contiguous."""
    products = torch.zeros(-(-rows.shape[1] // block), len(rows), len(rows), dtype=torch.float64)
    _function("block_gramians")(
        *rows.shape, rows.stride(0), block, _address(rows), _address(products), _threads_for(rows)
    )
    return products


def weighted_sum_in_first(rows: Sequence[Tensor], weights: Sequence[float]) -> None:
    """Makes the first of these contiguous vectors the sum of weights[t] * rows[t]."""
    addresses = (ctypes.c_void_p * len(rows))(*map(_address, rows))
    factors = (ctypes.c_float * len(rows))(*weights)
    _function("weighted_sum")(len(rows), rows[0].numel(), addresses, factors, _threads_for(rows[0]))


def adamw(
    parameter: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    line_states: Tensor | None,
    *,
    factor: float,
    decay: float,
    betas: tuple[float, float],
    step_size: float,
    root_correction: float,
    epsilon: float,
) -> None:
    """One step in place, on contiguous tensors of one shape: with g = factor * gradient, mean := b1 mean + (1 - b1) g,
    square := b2 square + (1 - b2) g^2, parameter := decay * parameter - step_size * mean / (sqrt(square) /
    root_correction + epsilon).

    line_states: (V,) uint8 of the lines of matrices (V, D): 0 where gradient and moments are zero, 1 where the gradient
    is, 2 where neither has to be.
    """
    width = LINE if line_states is None else parameter.shape[1]
    _function("adamw")(
        parameter.numel(),
        width,
        *map(_address, (line_states, parameter, gradient, mean, square)),
        factor,
        decay,
        1 - betas[0],
        betas[1],
        1 - betas[1],
        step_size,
        root_correction,
        epsilon,
        _threads_for(parameter),
    )


def _threads_for(tensor: Tensor) -> int:
    return 1 if tensor.numel() < FEW else torch.get_num_threads()
