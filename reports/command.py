"""What the commands of this package have in common: one line for an error, new files only, readers that have enough."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from run_record import write_atomically

FORMATS = ("png", "pdf", "svg")


class ReportError(ValueError):
    """What a command was given cannot be used; the message is one line for the user."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help lists what is allowed)\n")


def run_command(command: Callable[[], None], *errors: type[Exception]) -> int:
    """Runs it and returns its exit status: 0, or 2 and a line on standard error for input that cannot be used.

    errors: further exceptions whose message is a line for the user.
    """
    caught: tuple[type[Exception], ...] = (ReportError, *errors)
    try:
        command()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except caught as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def check_new_file(flag: str, path: Path, endings: Sequence[str]) -> None:
    """Raises ReportError if a file of that name is not allowed or exists."""
    if path.suffix.lower() not in endings:
        raise ReportError(f"{flag} {path}: expected a file name that ends in {' or '.join(endings)}")
    if path.exists():
        raise ReportError(f"{flag} {path}: exists already, expected the name of a new file")
    if not path.parent.is_dir():
        raise ReportError(f"{flag} {path}: no directory {path.parent}")


def write_file(flag: str, path: Path, content: bytes | str) -> None:
    """Raises ReportError if the file cannot be written."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise ReportError(f"{flag} {path}: cannot be written ({error.strerror})") from None
