"""What stands in a line for the user: values, commands to go on with, failures of the machine."""

import os
import re
import shlex
import sys
from pathlib import Path

IS_INSTALLED = Path(__file__).parent.name == "multitask_bert"  # by entry_point.py
SCRIPT = Path(__file__).with_name("multitask_classifier.py")
COMMAND = ("multitask-bert",) if IS_INSTALLED else ("python", SCRIPT.name)
VALUE_WIDTH, LINE_WIDTH = 60, 1000  # characters shown


def printable(text: str) -> str:
    """The text with escapes for line ends and control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown(value: object) -> str:
    """A value of any length, as far as an error line shows it."""
    text = str(value)
    return printable(text if len(text) <= VALUE_WIDTH else f"{text[:VALUE_WIDTH]}...")


def counted(number: int, noun: str) -> str:
    """So many of what the noun names."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}es" if noun.endswith("s") else f"{number} {noun}s"


def command(*words: object) -> str:
    """A command line for bash, whatever is in its words."""
    return " ".join(map(_quoted, map(str, words)))


def _quoted(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    hexes = ("".join(f"\\x{byte:02x}" for byte in os.fsencode(c)) for c in word)
    return "$'" + "".join(c if c.isalnum() else code for c, code in zip(word, hexes, strict=True)) + "'"


def here(script: Path = SCRIPT) -> Path:
    """How a script of ours is called from the working directory: from our folder short, else with its whole path."""
    short = script.relative_to(SCRIPT.parent)
    return short if short.exists() and script.samefile(short) else script


def resume_command(path: object, num_processes: int = 1, num_machines: int = 1) -> str:
    """The command that goes on with a run, with so many processes on each of so many machines."""
    machines = (f"--nnodes={num_machines}",) if num_machines > 1 else ()
    how = (*machines, f"--nproc_per_node={num_processes}", *(("--no-python",) if IS_INSTALLED else ()))
    program = COMMAND[-1] if IS_INSTALLED else here()
    words = (*COMMAND[:-1],) if num_processes == num_machines == 1 else ("torchrun", *how, "--")
    return command(*words, program, f"--resume={path}")


def machine_failure(error: BaseException) -> str:
    """What the machine could not do: read or write a file, allocate memory. Empty for any other error."""
    text = str(error).strip().split("\n")[0]
    if isinstance(error, OSError):
        return ": ".join(str(part) for part in (error.filename, error.strerror or text) if part is not None)
    is_memory = isinstance(error, MemoryError) or re.search(r"out of memory|n(o|')t allocate memory|bad.alloc", text)
    return f"out of memory ({shown(text)})" if is_memory else ""


def print_error(error: BaseException) -> None:
    """A line on standard error for each problem of an error, with its notes; one that is far too long is cut."""
    failure, notes = machine_failure(error), "".join(getattr(error, "__notes__", ()))
    for line in [failure] if failure else map(str, error.args):
        whole = printable(line + notes)
        cut = f"{whole[: LINE_WIDTH // 2]} ... {whole[-LINE_WIDTH // 2 :]}"
        print(f"error: {whole if len(whole) <= LINE_WIDTH else cut}", file=sys.stderr)


def ensure_output(is_shown: bool = True) -> None:
    """A standard output that is closed or not to be shown takes what it is given, and its number is no other file's."""
    if not (is_shown and sys.stdout):
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def discard_output() -> None:
    """Sends what is left for standard output nowhere: Python would fail on it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
