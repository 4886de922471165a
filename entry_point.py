"""The installed command `multitask-bert`: the same as `python multitask_classifier.py`.

The modules call each other by short names, so that the folder reads like one program; installed, they stand in a folder
of their own, which is no place that Python looks into.
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Runs the command, and exits with its status."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    runpy.run_module("multitask_classifier", run_name="__main__", alter_sys=True)
