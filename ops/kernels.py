"""Compiles, loads and calls kernels.c.

It is compiled when it is first needed, in a second, for the processor at hand, and kept in the user's cache folder.
Where that cannot be done (no GCC, no Linux) `can_run` is false, and the operations answer with their torch forms.
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
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ops.dropout import DropoutBits

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

_LONG, _POINTER, _INT, _FLOAT = ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_float
_BITS = (_POINTER, _INT, _FLOAT)
_PLACES = (_POINTER, _POINTER, _LONG, _POINTER, _POINTER, _LONG)
SIGNATURES: dict[str, Sequence[Any]] = {  # the number of threads, which all take last, is not in it
    "gelu_forward": (_LONG, _POINTER, _POINTER),
    "gelu_backward": (_LONG, *[_POINTER] * 3),
    "residual_norm_forward": (_LONG, _LONG, *[_POINTER] * 3, *_BITS, _POINTER, _POINTER, _FLOAT, *[_POINTER] * 4),
    "residual_norm_backward": (_LONG, _LONG, *[_POINTER] * 5, *_BITS, *[_POINTER] * 4),
    "attention_forward": (*_PLACES, _POINTER, _POINTER),
    "attention_backward": (*_PLACES, *[_POINTER] * 5),
}


class BuildError(Exception):
    """The kernels cannot be had here; the message says why."""


def can_run(*tensors: Tensor) -> bool:
    """Whether the kernels can work on these: float32 on the CPU, no autocast, no export, and compiled."""
    return (
        all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
        and build().library is not None
    )


def call(name: str, *arguments: Any) -> None:
    """Calls a kernel. Tensors are handed over by the address of their first element."""
    library = build().library
    assert library is not None, "called where `can_run` is false"
    getattr(library, name)(*map(plain, arguments), torch.get_num_threads())


def plain(argument: Any) -> Any:
    return argument.data_ptr() if isinstance(argument, Tensor) else argument


def bits_arguments(bits: DropoutBits | None) -> tuple[Tensor | None, int, float]:
    """Dropout's bits as the kernels take them; without bits nothing is dropped."""
    return (None, 0, 1.0) if bits is None else (bits.words, bits.threshold, bits.keep)


def speed_report(device: str) -> str:
    """For the record of a run on a device: "compiled", why the kernels are not, or "not used"."""
    return (build().problem or "compiled") if device == "cpu" else "not used"


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
        if not _is_whole(path):
            _compile(path)
        return Build(_load(path), "")
    except (BuildError, OSError, ValueError, RuntimeError) as error:  # ValueError: CC; RuntimeError: no home directory
        return Build(None, str(error))


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, types in SIGNATURES.items():
        getattr(library, name).argtypes = (*types, _INT)
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


def _checksum_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _is_whole(path: Path) -> bool:
    """Whether the library is there as it was written: a damaged one would end the process without a word."""
    try:
        return _checksum_file(path).read_text() == hashlib.sha256(path.read_bytes()).hexdigest()
    except (FileNotFoundError, UnicodeDecodeError):
        return False


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
        made, checksum = Path(scratch) / "kernels.so", Path(scratch) / "sha256"
        _run([*compiler, *_flags(), "-c", str(SOURCE), "-o", f"{scratch}/kernels.o"])
        # Linked by hand: the OpenMP that torch has loaded is the one to use, two pools of threads would compete.
        _run([*compiler, "-shared", f"{scratch}/kernels.o", _openmp(), "-lm", "-o", str(made)])
        checksum.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        os.replace(made, path)
        os.replace(checksum, _checksum_file(path))


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
