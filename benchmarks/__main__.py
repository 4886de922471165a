"""What the program costs, each claim measured beside its reference, one benchmark after the other.

    python -m benchmarks [NAME ...] [--data DIR] [--model NAME] [--rounds N] [--threads N] [--out DIR]

Writes <out>/<device>.json (out: benchmarks/results). On a machine with a CUDA GPU all of them include benchmarks.gpu,
which writes the GPU's own file.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import cpu, harness
from benchmarks.encoders import encoders
from benchmarks.harness import ERRORS, RESULTS, Options, Report
from benchmarks.step_cost import step_cost

BENCHMARKS: dict[str, tuple[Callable[[Options], Report], int]] = {  # what measures it, rounds by default
    "training_step": (cpu.training_step, 15),
    "evaluation": (cpu.evaluation, 5),
    "frozen_stage": (cpu.frozen_stage, 5),
    "step_cost": (step_cost, 10),
    "encoders": (encoders, 15),
    "start_up": (cpu.start_up, 7),
}


def run(name: str, options: Options) -> int:
    """Returns the exit status: 0, 1 if a check that must hold does not, 2 for an error."""
    measure, rounds = BENCHMARKS[name]
    options = replace(options, rounds=options.rounds or rounds)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    environment = {**harness.environment_of(torch.device("cpu")), "rounds": options.rounds}
    try:
        return harness.publish(name, measure(options), environment, options.out)
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; several benchmarks have a process each. Returns the exit status, 1 if one of several failed."""
    parser = harness.make_parser("benchmarks", __doc__, "as each has it")
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"default all: {', '.join(BENCHMARKS)}")
    parser.add_argument("--threads", type=harness.count, default=0, help="CPU threads; 0: torch's default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file (default: %(default)s)")
    given = vars(parser.parse_args(arguments))
    names = given.pop("names") or [*BENCHMARKS, *(["gpu"] if torch.cuda.is_available() else [])]
    if unknown := [name for name in names if name not in BENCHMARKS and name != "gpu"]:
        parser.error(f"{unknown[0]}: no benchmark, expected some of {', '.join(BENCHMARKS)}")
    if len(names) == 1 and names[0] in BENCHMARKS:
        return run(names[0], Options(**given))
    flags = [f"--{name}={value}" for name, value in given.items()]
    commands = {name: ["benchmarks", name, *flags] for name in names}
    if "gpu" in commands:
        commands["gpu"] = ["benchmarks.gpu", f"--out={given['out']}"]
    failed = [n for n, of in commands.items() if subprocess.run([sys.executable, "-m", *of], check=False).returncode]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
