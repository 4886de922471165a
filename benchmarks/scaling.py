"""How cost grows: with the rows of a file, the tokens of a row, the tasks of a PCGrad step, the rows of a batch.

    python -m benchmarks.scaling [--data DIR] [--rounds N] [--threads N]

Along each of the four only that number changes; its sizes are measured alternately. Writes scaling.png beside the
result file: four panels, both axes logarithmic, and the exponent k of the power law, size ** k, that fits best.
"""

import csv
import itertools
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks import workload
from benchmarks.harness import Benchmark, Line, Options, Report, Step, Summary, alternate
from datasets import TokenizedRows, read_examples
from tasks import TASKS
from token_cache import TokenCache, tokenize_file

TASK = "para"
COLORS = ("#0072B2", "#D55E00")  # Okabe and Ito: told apart by the colour-blind
MARKERS = ("o", "s")


@dataclass(frozen=True)
class Sizes:
    """What is measured along each axis. fixed_rows, task_rows: of a step whose tokens or tasks grow."""

    rows: tuple[int, ...] = (1000, 10_000, 140_000)
    tokens: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    tasks: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    batch: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    fixed_rows: int = 8  # few enough that the longest fit into memory
    task_rows: int = workload.BATCH_SIZE


@dataclass(frozen=True)
class Curve:
    """Seconds along an axis. seconds: of each size, round by round."""

    axis: str
    what: str
    unit: str
    seconds: Mapping[int, Sequence[float]]

    @property
    def medians(self) -> list[float]:
        return [Summary.of(of).median for of in self.seconds.values()]

    def exponent(self, last: int = 0) -> float:
        """The k of the power law, seconds ~ size ** k, that fits best in logarithms; last: to the last few sizes."""
        sizes = list(self.seconds)
        return float(np.polyfit(np.log(sizes[-last:]), np.log(self.medians[-last:]), 1)[0])

    def __str__(self) -> str:
        return (
            f"{self.what}: grows like {self.unit} to the power {self.exponent():.2f} from {min(self.seconds):,} to "
            f"{max(self.seconds):,} ({self.exponent(last=2):.2f} between the two largest)"
        )


class Setup:
    """The checkpoint and training rows."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.checkpoint = workload.Checkpoint.find(options.model)
        self.sizes = Sizes()
        self.rows = {TASK: self.checkpoint.rows(options.data, "train")[TASK]}

    def _curve(self, axis: str, what: str, unit: str, kinds: Mapping[int, Step], rounds: int = 0) -> Curve:
        """Measures the sizes alternately."""
        seconds = alternate({str(size): step for size, step in kinds.items()}, rounds or self.options.rounds, warm_up=1)
        return Curve(axis, what, unit, {int(size): of for size, of in seconds.items()})

    def reading(self) -> list[Curve]:
        """Files of many rows: read and tokenized, and taken from the cache."""
        task, tokenizer, device = TASKS[TASK], self.checkpoint.tokenizer(), torch.device("cpu")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            paths = {size: self.file(folder, size) for size in self.sizes.rows}
            cache = TokenCache(folder / "cache", tokenizer, print)
            rounds = min(3, self.options.rounds)

            def read(path: Path) -> Step:
                return lambda number: tokenize_file(read_examples(path, task, True), task, tokenizer, device)

            def cached(path: Path) -> Step:
                return lambda number: cache.load(path, task, True, device)

            return [
                self._curve("rows", what, "rows", {size: kind(path) for size, path in paths.items()}, rounds)
                for what, kind in (("reading and tokenizing a file", read), ("loading it from the cache", cached))
            ]

    def file(self, folder: Path, num_rows: int) -> Path:
        """A file of that many rows: those of the training file, again and again."""
        task, path = TASKS[TASK], folder / f"{num_rows}.csv"
        examples = read_examples(self.options.data / task.file_name("train"), task, labelled=True).examples
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(["", "id", *task.text_columns, task.label_column])
            for i, example in zip(range(num_rows), itertools.cycle(examples), strict=False):
                writer.writerow([i, example.id, *example.texts, example.label])
        return path

    def tokens(self) -> Curve:
        """Rows of one length."""
        num_rows, longest = self.sizes.fixed_rows, self.checkpoint.config.max_position_embeddings
        lengths = [n for n in self.sizes.tokens if n <= longest]
        rows_of = {n: workload.random_rows({TASK: np.array([n])}, num_rows, self.checkpoint.config) for n in lengths}
        kinds = {n: self._step(rows, num_rows) for n, rows in rows_of.items()}
        return self._curve("tokens a row", f"training step of {num_rows} rows", "tokens a row", kinds)

    def batches(self) -> Curve:
        kinds = {size: self._step(self.rows, size) for size in self.sizes.batch}
        return self._curve("rows a batch", "training step", "rows a batch", kinds)

    def tasks(self) -> Curve:
        """PCGrad over copies of one task, with heads of their own."""
        names, num_rows = [f"{TASK}{i}" for i in range(max(self.sizes.tasks))], self.sizes.task_rows
        with mock.patch.dict(TASKS, {name: replace(TASKS[TASK], name=name) for name in names}):
            rows_of = {n: dict.fromkeys(names[:n], self.rows[TASK]) for n in self.sizes.tasks}
            kinds = {n: self._step(of, num_rows, draws_per_step=n, treatment="pcgrad") for n, of in rows_of.items()}
            return self._curve("tasks", f"PCGrad step, {num_rows} rows a task", "tasks", kinds)

    def _step(self, rows: Mapping[str, TokenizedRows], batch_size: int, **options: Any) -> Step:
        model = self.checkpoint.model(tuple(rows))
        return workload.step_of(workload.full_trainer(model, rows, batch_size=batch_size, **options))


def draw_panels(curves: Sequence[Curve], path: Path) -> None:
    """A panel for each axis: medians with quartiles, and the fitted power law."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    by_axis = itertools.groupby(curves, key=lambda curve: curve.axis)
    for panel, (axis, of_axis) in zip(figure.subplots(2, 2).flat, by_axis, strict=True):
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="seconds")
        for curve, color, marker in zip(of_axis, COLORS, MARKERS, strict=False):
            _draw(panel, curve, color, marker)
        panel.xaxis.minorticks_off()
        panel.grid(color="0.9", linewidth=0.6)
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def _draw(panel: Any, curve: Curve, color: str, marker: str) -> None:
    sizes, middle, k = np.array(list(curve.seconds)), np.array(curve.medians), curve.exponent()
    parts = [Summary.of(of) for of in curve.seconds.values()]
    errors = [middle - [of.lower for of in parts], [of.upper for of in parts] - middle]
    panel.errorbar(sizes, middle, yerr=np.abs(errors), color=color, marker=marker, linestyle="none", capsize=2)
    scale = np.exp(np.mean(np.log(middle) - k * np.log(sizes)))
    panel.plot(sizes, scale * sizes**k, color=color, linewidth=1, label=f"{curve.what}: {curve.unit}^{k:.2f}")
    panel.set_xticks(sizes, labels=[f"{size:,}" for size in sizes])


def measure(options: Options) -> Report:
    setup = Setup(options)
    curves = [*setup.reading(), setup.tokens(), setup.tasks(), setup.batches()]
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        draw_panels(curves, options.out / "scaling.png")
    lines = [Line(f"{c.what}, {size:,} {c.unit}", of) for c in curves for size, of in c.seconds.items()]
    settings = {"rounds": options.rounds, "exponents": {curve.what: curve.exponent() for curve in curves}}
    return Report("seconds as one number grows", lines, notes=list(map(str, curves)), settings=settings)


BENCHMARK = Benchmark("scaling", __doc__, measure, rounds=5)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
