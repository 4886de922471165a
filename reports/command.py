"""What the commands of this package have in common: one line for an error, new files only, readers that have enough."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from messages import discard_output, ensure_output, print_error


class ReportError(ValueError):
    """What a command was given cannot be used; the message is one line for the user."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        print_error(ReportError(f"{message} (--help lists what is allowed)"))
        self.exit(2)


def run_command(command: Callable[[], None], *errors: type[Exception]) -> int:
    """Runs it. Returns 0, or 2 after a line on standard error for an exception of these, whose message the line is."""
    expected: tuple[type[Exception], ...] = (OSError, MemoryError, ReportError, *errors)
    ensure_output()
    try:
        command()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        discard_output()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except expected as error:
        print_error(error)
        try:
            sys.stdout.flush()
        except OSError:  # which was the error
            discard_output()
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
