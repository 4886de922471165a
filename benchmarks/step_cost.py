"""What a step of each method costs against plain passes, measured alternately in one process on the same rows.

    python -m benchmarks.step_cost [--data DIR] [--rounds N] [--threads N]

Every step draws each task once, 32 rows, in a forward and a backward pass, and ends with one optimizer step:
  plain     nothing else
  pcgrad    a PCGrad step over the tasks
  smart     a step with SMART's smoothness term
  pal       a step with projected attention layers
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from regularizers import Smoothness

from benchmarks import workload
from benchmarks.harness import Benchmark, Check, Line, Memory, Options, Report, Step, Summary, alternate, ratios, run
from bert import BertConfig
from datasets import TokenizedRows
from engine import Trainer
from evaluation import Precision
from model import MultitaskBert
from pal import PalConfig
from smart import SmartConfig

AT_MOST = {"pcgrad": 1.10, "smart": 3.0, "pal": 1.25}  # times a plain step


class Methods:
    """A trainer for each method, each with a model of its own."""

    def __init__(
        self,
        config: BertConfig,
        fresh: Callable[[PalConfig | None], MultitaskBert],
        rows: Mapping[str, TokenizedRows],
        precision: Precision = workload.CPU,
        batch_size: int = workload.BATCH_SIZE,
    ) -> None:
        """fresh: makes a model, with adapters of this shape or without. config: of its encoder."""
        self.config, self.fresh, self.rows = config, fresh, rows
        self.options = {"draws_per_step": len(rows), "precision": precision, "batch_size": batch_size}

    def makers(self) -> dict[str, Callable[[], Trainer]]:
        """By name, what makes a method's trainer."""
        return {
            "plain": lambda: self._trainer(self.fresh(None)),
            "pcgrad": lambda: self._trainer(self.fresh(None), treatment="pcgrad"),
            "smart": self._with_smart,
            "pal": lambda: self._trainer(self.fresh(PalConfig.for_encoder(self.config))),
        }

    def _with_smart(self) -> Trainer:
        model = self.fresh(None)
        return self._trainer(model, regularizers=[Smoothness(model, SmartConfig())])

    def _trainer(self, model: MultitaskBert, **options: Any) -> Trainer:
        return workload.full_trainer(model, self.rows, **self.options, **options)


def methods(options: Options) -> Methods:
    checkpoint = workload.Checkpoint.find(options.model)
    rows = checkpoint.rows(options.data, "train")
    return Methods(checkpoint.config, lambda adapters: checkpoint.model(tuple(rows), adapters), rows)


def variants(options: Options) -> dict[str, Callable[[], Step]]:
    return {name: lambda make=make: step_of(make()) for name, make in methods(options).makers().items()}  # type: ignore[misc]


def step_of(trainer: Trainer) -> Step:
    return lambda number: trainer.take_step(1, number)


def report(
    title: str,
    trainers: Mapping[str, Trainer],
    seconds: Mapping[str, Sequence[float]],
    memory: Mapping[str, Memory | None],
) -> Report:
    """seconds: of each method's step, round by round; memory: of each."""
    compared = {name: Summary.of(ratios(of, seconds["plain"])) for name, of in seconds.items()}
    lines = [
        Line(name, of, ratio=None if name == "plain" else compared[name], memory=memory[name])
        for name, of in seconds.items()
    ]
    checks = [Check(f"a step with {name} over a plain one", compared[name].median, m) for name, m in AT_MOST.items()]
    plain, pcgrad = (trainers[name].gradients.rows.numel() for name in ("plain", "pcgrad"))
    note = f"gradient buffers of pcgrad beyond plain: {(pcgrad - plain) / plain:.0f} copies of the shared gradient"
    return Report(title, lines, checks, [note])


def measure(options: Options) -> Report:
    chosen = methods(options)
    trainers = {name: make() for name, make in chosen.makers().items()}
    seconds = alternate({name: step_of(trainer) for name, trainer in trainers.items()}, options.rounds)
    memory: dict[str, Memory | None] = {name: BENCHMARK.memory(name, options) for name in trainers}
    title = "seconds of a step with each task once, 32 rows a task; ratios to plain"
    found = report(title, trainers, seconds, memory)
    return replace(found, settings={"rounds": options.rounds, "rows": workload.row_counts(chosen.rows)})


BENCHMARK = Benchmark("step_cost", measure, variants)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(BENCHMARK, __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(main())
