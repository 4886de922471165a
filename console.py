"""What a run prints: lines on standard output, and a progress bar on a terminal's standard error."""

import sys
from collections.abc import Mapping
from typing import Any


class Console:
    """Lines, and a bar for the stage that is running. Without a terminal there are lines only."""

    def __init__(self) -> None:
        self._bar: Any = None

    def start(self, title: str, total: int, done: int, unit: str = "step") -> None:
        """Opens the bar of a stage."""
        self.finish()
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=title, unit=unit, dynamic_ncols=True, leave=False)

    def advance(self, amount: int = 1, record: Mapping[str, Any] | None = None) -> None:
        if self._bar is None:
            return
        if record is not None:
            shown = {"loss": f"{record['loss']:.3f}", "rows/s": f"{record['examples_per_second']:.0f}"}
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(amount)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def say(self, line: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.write(line, file=sys.stdout)


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
