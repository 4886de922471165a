"""All benchmarks, one after the other, each in a process of its own.

    python -m benchmarks [--data DIR] [--model NAME] [--rounds N] [--threads N] [--out DIR]

Writes <out>/<device>.json (out: benchmarks/results). On a machine with a CUDA GPU, python -m benchmarks.gpu is run too
and writes the GPU's own file.
"""

import subprocess
import sys
from collections.abc import Sequence

import torch

from benchmarks.harness import result_parser

SCRIPTS = ("training_step", "evaluation_throughput", "frozen_stage", "pcgrad_step", "step_cost", "start_up")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 if a benchmark failed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    out = result_parser("benchmarks", __doc__, "as each script has it").parse_args(given).out
    commands = {**dict.fromkeys(SCRIPTS, given), **({"gpu": ["--out", str(out)]} if torch.cuda.is_available() else {})}
    failed = [
        name
        for name, flags in commands.items()
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *flags], check=False).returncode
    ]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
