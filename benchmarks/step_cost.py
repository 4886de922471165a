"""What a step of each method costs over a plain one, on the same rows.

Every step draws each task once, 32 rows, and ends with one optimizer step.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks import workload
from benchmarks.harness import Check, Memory, Options, Report, alternate, lines_of
from datasets import TokenizedRows
from engine import Trainer
from evaluation import Precision
from model import MultitaskBert
from pal import ProjectedAttention
from parameters import Choice
from smart import Smoothness

AT_MOST = {"pcgrad": 1.10, "smart": 3.0, "pal": 1.25}  # times a plain step


def makers_of(
    fresh: Callable[[Choice | None], MultitaskBert],
    rows: Mapping[str, TokenizedRows],
    precision: Precision = workload.CPU,
    batch_size: int = workload.BATCH_SIZE,
) -> Mapping[str, Callable[[], Trainer]]:
    """By a method's name, what makes its trainer. fresh: makes a model, with this adapter or without."""

    def trainer(model: MultitaskBert, **options: Any) -> Trainer:
        shared = {"draws_per_step": len(rows), "precision": precision, "batch_size": batch_size, "cuda_graphs": True}
        return workload.full_trainer(model, rows, **shared, **options)

    def smart() -> Trainer:
        model = fresh(None)
        return trainer(model, regularizers=[Smoothness(Smoothness.Parameters(), model, 1)])

    return {
        "plain": lambda: trainer(fresh(None)),
        "pcgrad": lambda: trainer(fresh(None), treatment="pcgrad"),
        "smart": smart,
        "pal": lambda: trainer(fresh(Choice("pal", ProjectedAttention.Parameters()))),
    }


def report(
    title: str,
    trainers: Mapping[str, Trainer],
    seconds: Mapping[str, Sequence[float]],
    memory: Mapping[str, Memory],
    settings: Mapping[str, Any],
) -> Report:
    """seconds: of each method's step, round by round."""
    lines = lines_of(seconds, "plain", memory)
    ratios = {line.what: line.ratio.median for line in lines if line.ratio}
    checks = [Check(f"a step with {name} over a plain one", ratios[name], most) for name, most in AT_MOST.items()]
    plain, pcgrad = (trainers[name].shared.gradients.numel() for name in ("plain", "pcgrad"))
    note = f"gradient buffers of pcgrad beyond plain: {(pcgrad - plain) / plain:.0f} copies of the shared gradient"
    return Report(title, lines, checks, [note], settings)


def step_cost(options: Options) -> Report:
    """A step of each method."""
    checkpoint = workload.Checkpoint.find(options.model)
    rows = checkpoint.rows(options.data, "train")
    trainers = {name: make() for name, make in makers_of(partial(checkpoint.model, tuple(rows)), rows).items()}
    seconds = alternate({name: workload.step_of(trainer) for name, trainer in trainers.items()}, options.rounds)
    title = "seconds of a step with each task once, 32 rows a task; ratios to plain"
    return report(title, trainers, seconds, {}, {"rows": workload.row_counts(rows)})
