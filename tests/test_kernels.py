"""The kernels: when they can run, and how they are compiled, kept, and checked before they are loaded."""

import hashlib
import sys
from pathlib import Path

import pytest
import torch

from helpers import run_forked
from ops import kernels

needs_kernels = pytest.mark.skipif(kernels.build().library is None, reason=f"no kernels: {kernels.build().problem}")


def test_other_types_and_autocast_are_left_to_torch() -> None:
    assert kernels.can_run(torch.zeros(2)) == (kernels.build().library is not None)
    assert (kernels.speed_report("cpu") == "compiled") == kernels.can_run(torch.zeros(2))
    assert not kernels.can_run(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert not kernels.can_run(torch.zeros(2, device="meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels.can_run(torch.zeros(2))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's kernels are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "multitask-bert"


def build() -> kernels.Build:
    return kernels.build.__wrapped__()


@needs_kernels
def test_kernels_are_compiled_once_and_kept_with_their_checksum(folder: Path) -> None:
    assert build().problem == ""
    checksum, library = sorted(folder.iterdir())
    whole, made = library.read_bytes(), library.stat().st_mtime_ns
    assert checksum.read_text() == hashlib.sha256(whole).hexdigest()
    assert build().problem == "" and library.stat().st_mtime_ns == made and len(list(folder.iterdir())) == 2
    checksum.unlink()
    assert not kernels._is_whole(library)


@needs_kernels
def test_a_damaged_library_is_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, which the damaged one would end."""
    whole, checksum = kernels._path(), kernels._checksum_file(kernels._path())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = kernels._path()
    library.parent.mkdir()
    library.with_name(checksum.name).write_bytes(checksum.read_bytes())
    content, middle = whole.read_bytes(), whole.stat().st_size // 2
    flipped = bytes(byte ^ 0xFF for byte in content[middle // 2 : middle])
    one_bit = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for damaged in (content[:middle], one_bit, content[: middle // 2] + flipped + content[middle:]):
        library.write_bytes(damaged)
        assert not kernels._is_whole(library)
    script = "import torch; from ops import kernels, attention, Packing; print(repr(kernels.build().problem))\n"
    script += "print(attention(torch.tensor([[1., 1., 4.], [1., 1., 6.]]), Packing.of([2]), 1, 0.0, None).tolist())"
    assert run_forked(script, XDG_CACHE_HOME=str(tmp_path)) == "''\n[[5.0], [5.0]]\n"
    assert kernels._is_whole(library)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernels are made for Linux")
def test_without_a_compiler_that_works_there_are_none_and_the_reason_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for compiler, problem in (
        ("no-such-compiler", "no C compiler: no-such-compiler was not found"),
        ("false", "false failed: no message"),
        ('gcc "', "No closing quotation"),
    ):
        monkeypatch.setenv("CC", compiler)
        assert build() == (None, problem)
    assert list(folder.iterdir()) == []
    monkeypatch.setenv("XDG_CACHE_HOME", str(kernels.SOURCE))  # no folder
    monkeypatch.delenv("CC")
    library, problem = build()
    assert library is None and "kernels.c" in problem
    monkeypatch.setattr(kernels, "build", lambda: kernels.Build(library, problem))
    assert not kernels.can_run(torch.zeros(2))
    assert kernels.speed_report("cpu") == problem and kernels.speed_report("cuda") == "not used"


@needs_kernels
def test_another_processor_compiler_or_source_is_another_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [kernels._path()]
    monkeypatch.setattr(kernels, "_processor", lambda: "flags: none")
    paths.append(kernels._path())
    monkeypatch.setenv("CC", "gcc -g")
    paths.append(kernels._path())
    (tmp_path / "kernels.c").write_text(kernels.SOURCE.read_text() + "\n")
    monkeypatch.setattr(kernels, "SOURCE", tmp_path / "kernels.c")
    paths.append(kernels._path())
    assert len(set(paths)) == 4


@needs_kernels
def test_the_openmp_library_is_torchs_also_where_its_path_has_a_space(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "7f00-7f01 r-xp 00000000 08:01 17                         /usr/lib/libgomp.so.1.0.0",
        "7f02-7f03 r-xp 00000000 08:01 18                         /home/a b/torch/lib/libgomp-24e.so.1",
        "7f04-7f05 r-xp 00000000 08:01 19                         /home/a b/torch/lib/libtorch.so",
    ]
    monkeypatch.setattr(Path, "read_text", lambda path: "\n".join(lines))
    assert kernels._openmp() == "/home/a b/torch/lib/libgomp-24e.so.1"
    lines.clear()
    with pytest.raises(kernels.BuildError, match="no OpenMP"):
        kernels._openmp()
