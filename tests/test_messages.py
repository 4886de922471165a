"""Lines for the user: values of any length, commands for bash, what the machine could not do."""

import errno
import subprocess
from pathlib import Path

import pytest
import torch

from config import FlagError
from console import Console
from helpers import ROOT, Capture
from messages import LINE_WIDTH, command, counted, machine_failure, print_error, printable, resume_command, shown

WORDS = [
    "plain",
    "a b",
    "$(touch pwned)",
    "`x`",
    'it\'s "so"',
    "line\nend",
    "tab\t",
    "\x1b[31mred",
    "größe",
    "\udcff",
    "",
]


def test_a_command_gives_its_words_to_bash_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    line = command("printf", "%s\\0", *WORDS)
    assert line.isprintable()
    found = subprocess.run(["bash", "-c", line], capture_output=True, check=True).stdout
    assert found.decode("utf-8", "surrogateescape").split("\0")[:-1] == WORDS
    assert resume_command("runs/a b") == "python multitask_classifier.py '--resume=runs/a b'"
    expected = "torchrun --nproc_per_node=8 -- multitask_classifier.py --resume=run"
    assert resume_command("run", 8) == expected
    assert resume_command("run", 8, 2) == expected.replace("--nproc", "--nnodes=2 --nproc")
    assert resume_command("run", 1, 2) == expected.replace("--nproc_per_node=8", "--nnodes=2 --nproc_per_node=1")
    monkeypatch.chdir(tmp_path)  # from elsewhere it names where the program is
    assert resume_command("run") == f"python {ROOT / 'multitask_classifier.py'} --resume=run"
    assert resume_command("run", 8) == expected.replace("multitask", f"{ROOT}/multitask")


def test_one_is_not_told_as_many() -> None:
    told = [counted(number, noun) for number, noun in ((1, "row"), (0, "row"), (2, "epoch"), (1, "process"))]
    assert [*told, counted(3, "process")] == ["1 row", "0 rows", "2 epochs", "1 process", "3 processes"]


def test_a_value_is_shown_to_60_characters_with_its_control_characters_escaped() -> None:
    assert shown("x" * 60) == "x" * 60 and shown("x" * 61) == "x" * 60 + "..." and shown(10**99) == f"1{'0' * 59}..."
    assert shown("a\x1b[2J\r\nb\0") == r"a\x1b[2J\r\nb\x00" and printable("größe\u202e") == r"größe\u202e"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), "runs/x: No space left on device"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (OSError("the reason"), "the reason"),
        (MemoryError(), "out of memory ()"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "out of memory (CUDA out of memory. Tried)"),
        (RuntimeError("[x] . DefaultCPUAllocator: can't allocate memory: you"), "out of memory ([x] . DefaultCPUAllo"),
        (RuntimeError("std::bad_alloc"), "out of memory (std::bad_alloc)"),
        (RuntimeError("shape mismatch"), ""),
        (ValueError("out of range"), ""),
    ],
)
def test_a_failure_of_the_machine_is_told_from_other_errors(error: BaseException, line: str) -> None:
    found = machine_failure(error)
    assert found.startswith(line) and bool(found) == bool(line) and "\n" not in found


def test_an_error_is_a_line_for_each_problem_with_its_notes_and_none_is_too_long(capsys: Capture) -> None:
    print_error(FlagError("--lr x: wrong", "--seed y:\nwrong"))
    assert capsys.readouterr().err == "error: --lr x: wrong\nerror: --seed y:\\nwrong\n"
    error = OSError(errno.EIO, "broken", "f\x1b")
    error.add_note("; to go on: x")
    print_error(error)
    print_error(ValueError("a" * 10**6 + "the end"))
    first, second = capsys.readouterr().err.splitlines()
    assert first == r"error: f\x1b: broken; to go on: x"
    assert second.startswith("error: aaa") and second.endswith("the end") and len(second) < LINE_WIDTH + 20


def test_what_a_run_says_has_its_line_ends_and_no_control_characters(capsys: Capture) -> None:
    Console().say("runs/\x1b[2J\n  größe")
    assert capsys.readouterr().out == "runs/\\x1b[2J\n  größe\n"
