"""What a step of each method costs against plain passes, measured alternately in one process on the same rows.

    python -m benchmarks.step_cost [--data DIR] [--rounds N] [--threads N]

Prints the median seconds of each kind of step and the median of its ratio, round by round, to the plain one:
  pcgrad    a PCGrad step over the tasks, against as many plain forward and backward passes and one optimizer step
  smart     a step with SMART's smoothness term, against the same step without
  pal       a step with projected attention layers, against the same step without
and the peak memory of a PCGrad step over a plain one, in copies of the shared gradient.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bert import find_checkpoint
from datasets import SAMPLE, TokenizedRows, Tokenizer, read_examples, tokenize
from engine import StageSettings, Trainer
from evaluation import Precision
from model import Layout, MultitaskBert, load_model
from pal import PalConfig
from pcgrad import make_treatment
from regularizers import Regularizer, Smoothness
from schedulers import RoundRobinScheduler, Setting
from smart import SmartConfig
from tasks import TASKS

BATCH_SIZE = 32


class Silent:
    """A listener that does nothing."""

    stop_requested = False

    def on_step(self, record: Mapping[str, Any]) -> None: ...

    def on_evaluation(self, record: Mapping[str, Any], is_best: bool) -> None: ...

    def say(self, line: str) -> None: ...

    def save(self) -> None: ...

    def check_stop(self) -> None: ...


def make_trainer(
    model: MultitaskBert, rows: Mapping[str, TokenizedRows], treatment: str, regularizers: list[Regularizer]
) -> Trainer:
    """A trainer whose steps draw each task once."""
    tasks = tuple(rows)
    settings = StageSettings("benchmark", tasks, 1, 10**6, BATCH_SIZE, 1, 1e-5, 0.0, 0.01, 1.0, 0, 1, 0, 0)
    setting = Setting(tasks, tuple(len(of) for of in rows.values()), 1, len(tasks), every_task=True)
    shared = model.shared_parameters()
    return Trainer(
        settings,
        model,
        shared,
        {task: model.task_parameters(task) for task in tasks},
        [len(shared)],
        rows,
        {},
        RoundRobinScheduler(setting),
        make_treatment(treatment, len(tasks), 1, 0.01),
        Precision(torch.device("cpu")),
        64,
        Silent(),
        regularizers,
    )


def read_rows(folder: Path, checkpoint: Path) -> dict[str, TokenizedRows]:
    """The training rows of all tasks."""
    tokenizer = Tokenizer(checkpoint, 512)
    rows = {}
    for task in TASKS.values():
        file = read_examples(folder / task.file_name("train"), task, labelled=True)
        rows[task.name] = tokenize(task, file.examples, tokenizer, torch.device("cpu"))
    return rows


def alternate(kinds: Mapping[str, Callable[[int], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each kind in each round, after two rounds that do not count; all kinds see the same rows."""
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds + 2):
        for name, take_step in kinds.items():
            started = time.perf_counter()
            take_step(number)
            if number >= 2:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SAMPLE)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    checkpoint = find_checkpoint("minilm")
    rows = read_rows(arguments.data, checkpoint)

    def fresh(adapters: PalConfig | None = None) -> MultitaskBert:
        return load_model(checkpoint, Layout(tuple(rows), 0, adapters), torch.Generator().manual_seed(0)).model

    plain, with_smart = fresh(), fresh()
    adapters = PalConfig.for_encoder(plain.encoder.config)
    trainers = {
        "plain": make_trainer(plain, rows, "sum", []),
        "pcgrad": make_trainer(fresh(), rows, "pcgrad", []),
        "smart": make_trainer(with_smart, rows, "sum", [Smoothness(with_smart, SmartConfig())]),
        "pal": make_trainer(fresh(adapters), rows, "sum", []),
    }
    kinds = {name: lambda step, of=trainer: of.take_step(1, step) for name, trainer in trainers.items()}
    seconds = alternate(kinds, arguments.rounds)
    print(f"{'step':<10}{'median s':>10}{'ratio':>8}{'from':>8}{'to':>8}")
    for name, values in seconds.items():
        ratios = sorted(a / b for a, b in zip(values, seconds["plain"], strict=True))
        middle = statistics.median(ratios)
        print(f"{name:<10}{statistics.median(values):>10.3f}{middle:>8.2f}{ratios[0]:>8.2f}{ratios[-1]:>8.2f}")
    extra = trainers["pcgrad"].gradients.rows.numel() - trainers["plain"].gradients.rows.numel()
    shared = sum(parameter.numel() for parameter in plain.shared_parameters().values())
    print(f"gradient buffers of pcgrad beyond plain: {extra / shared:.0f} copies of the shared gradient")


if __name__ == "__main__":
    main()
