"""All benchmarks, one after the other, each in a process of its own, and a Markdown table of what they found.

    python -m benchmarks [--data DIR] [--model NAME] [--rounds N] [--threads N] [--quick] [--out DIR]

Writes <out>/<device>.json (out: benchmarks/results). On a machine with a CUDA GPU, python -m benchmarks.gpu is run too
and writes the GPU's own file.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import (
    HEADER,
    ROOT,
    USER_ERRORS,
    Check,
    add_flags,
    cells,
    device_name,
    file_name,
    options_of,
    table,
)
from run_record import read_json

SCRIPTS = (
    "training_step",
    "evaluation_throughput",
    "frozen_stage",
    "pcgrad_step",
    "step_cost",
    "start_up",
    "scaling",
)


def markdown(results: dict[str, Any]) -> str:
    """The table for the README, and below it what was claimed. results: the content of a result file."""
    rows = []
    for name, report in results["benchmarks"].items():
        rows.append([f"**{name}**: {report['title']}", *[""] * len(HEADER)])
        rows += [[line["what"], *cells(line)] for line in report["lines"]]
    checks = [
        f"- {name}: {Check.from_dict(check)}"
        for name, report in results["benchmarks"].items()
        for check in report["checks"]
    ]
    return "\n".join([f"{results['device']}:", "", table(("", *HEADER), rows), "", *checks])


def run_all(arguments: Sequence[str], rounds: int, out: Path) -> list[str]:
    """Runs every script; returns the names of those that failed."""
    given = [*arguments, *(["--rounds", str(rounds)] if rounds else []), "--out", str(out)]
    commands = dict.fromkeys(SCRIPTS, given)
    if torch.cuda.is_available():
        commands["gpu"] = ["--out", str(out), *(["--tiny"] if "--quick" in arguments else [])]
    failed = []
    for name, of_script in commands.items():
        command = [sys.executable, "-m", f"benchmarks.{name}", *of_script]
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if a benchmark failed, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser, 0)
    given = parser.parse_args(arguments)
    try:
        options = options_of(given, 1)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        out = options.out or Path(scratch)
        shared = ["--data", str(options.data), "--model", options.model, "--threads", str(options.threads)]
        failed = run_all([*shared, *(["--quick"] if options.quick else [])], given.rounds, out)
        for device in [device_name(), *([device_name("cuda")] if torch.cuda.is_available() else [])]:
            path = out / file_name(device)
            if path.is_file():
                print(markdown(read_json(path)))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
