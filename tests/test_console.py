"""What a run shows of itself at a terminal."""

import io
import re
import sys
import time

from console import Console
from helpers import Patch, Terminal


def test_a_bar_waits_while_a_part_of_it_has_its_own(monkeypatch: Patch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    console = Console()
    with console.bar("stage", 2):
        with console.bar("features", 300, unit="row"):
            time.sleep(1.2)
            console.advance(300)
        time.sleep(0.2)
        console.advance()
    shown = terminal.getvalue()
    assert "features: 100%" in shown and "300/300" in shown
    (elapsed,) = set(re.findall(r"stage:  50%.* 1/2 \[(\d\d:\d\d)<", shown))
    assert elapsed == "00:00"


def test_without_a_terminal_there_is_no_bar(monkeypatch: Patch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := io.StringIO())
    console = Console()
    with console.bar("stage", 2), console.bar("features", 3):
        console.advance()
    assert terminal.getvalue() == ""
