"""What a run prints: lines on standard output, and a progress bar on a terminal's standard error."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from messages import discard_output, printable


class Console:
    """Lines, and a bar for what is running, one below the other where a part of it has its own; the first then
    waits. Without a terminal there are lines only."""

    def __init__(self, has_bars: bool = True) -> None:
        self.has_bars = has_bars
        self._bars: list[tqdm] = []

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0, unit: str = "step") -> Iterator[None]:
        """A bar for what is done within it."""
        shown_on_a_terminal: Any = {"disable": None if self.has_bars else True, "dynamic_ncols": True, "leave": False}
        with tqdm(total=total, initial=done, desc=title, unit=unit, **shown_on_a_terminal) as bar:
            self._bars.append(bar)
            started = time.time()
            try:
                yield
            finally:
                self._bars.pop()
                for outer in self._bars if not bar.disable else ():
                    outer.start_t += time.time() - started
                    outer.last_print_t += time.time() - started

    def advance(self, amount: int = 1, record: Mapping[str, Any] | None = None) -> None:
        """Moves the newest bar."""
        if record is not None:
            shown = {"loss": f"{record['loss']:.3f}", "rows/s": f"{record['examples_per_second']:.0f}"}
            self._bars[-1].set_postfix(shown, refresh=False)
        bar = self._bars[-1]
        bar.update(min(amount, bar.total - bar.n))  # of rows, the last batch may hold fewer

    def say(self, line: str) -> None:
        """A line of its own, above the bars where there are some."""
        try:
            with tqdm.external_write_mode(file=sys.stdout):
                print("\n".join(map(printable, line.split("\n"))), flush=True)
        except OSError as error:
            discard_output()
            raise OSError(error.errno, error.strerror, "standard output") from None


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def size(parameters: int) -> str:
    """A number of parameters as a person reads it."""
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters / 1e3:.1f} k"
