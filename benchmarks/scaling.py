"""How cost grows: with the rows of a file, the tokens of a row, the tasks of a PCGrad step, the rows of a batch.

    python -m benchmarks.scaling [--data DIR] [--rounds N] [--threads N]

Along each of the four only that number changes; its sizes are measured alternately. Writes scaling.png beside the
result file: four panels, both axes logarithmic, and the exponent k of the power law, size ** k, that fits best.
"""

import csv
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import engine
import model
from benchmarks import workload
from benchmarks.harness import Benchmark, Line, Options, Report, Step, Summary, alternate, fitted_exponent, run
from datasets import TokenizedRows, TokenRows, read_examples
from tasks import TASKS
from token_cache import TokenCache, tokenize_file

TASK = "para"
COLORS = ("#0072B2", "#D55E00")  # Okabe and Ito: told apart by the colour-blind
MARKERS = ("o", "s")


@dataclass(frozen=True)
class Sizes:
    """What is measured along each axis."""

    rows: tuple[int, ...] = (1000, 10_000, 140_000)
    tokens: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    tasks: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    batch: tuple[int, ...] = (8, 16, 32, 64, 128, 256)

    @classmethod
    def quick(cls) -> "Sizes":
        return cls((20, 60), (8, 16), (1, 2), (2, 4))


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

    @property
    def exponent(self) -> float:
        return fitted_exponent(list(self.seconds), self.medians)

    def in_words(self) -> str:
        k = self.exponent
        kind = "in proportion" if abs(k - 1) <= 0.05 else "more slowly" if k < 1 else "faster"
        sizes = list(self.seconds)
        last = fitted_exponent(sizes[-2:], self.medians[-2:])
        return (
            f"{self.what}: grows like {self.unit} to the power {k:.2f} from {sizes[0]:,} to {sizes[-1]:,}, {kind} "
            f"({last:.2f} between the two largest)"
        )

    def lines(self) -> list[Line]:
        return [Line(f"{self.what}, {size:,} {self.unit}", of) for size, of in self.seconds.items()]


class Setup:
    """The checkpoint and training rows."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.checkpoint = workload.Checkpoint.find(options.model)
        self.sizes = Sizes.quick() if options.quick else Sizes()

    def curve(self, axis: str, what: str, unit: str, kinds: Mapping[int, Step], rounds: int = 0) -> Curve:
        """Measures the sizes alternately."""
        seconds = alternate({str(size): step for size, step in kinds.items()}, rounds or self.options.rounds, warm_up=1)
        return Curve(axis, what, unit, {int(size): of for size, of in seconds.items()})

    def reading(self) -> list[Curve]:
        """Files of many rows: read and tokenized, and taken from the cache."""
        task, tokenizer, device = TASKS[TASK], self.checkpoint.tokenizer(), torch.device("cpu")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            paths = {size: self._file(folder, size) for size in self.sizes.rows}
            cache = TokenCache(folder / "cache", tokenizer, print)
            rounds = min(3, self.options.rounds)

            def read(path: Path) -> Step:
                return lambda number: tokenize_file(read_examples(path, task, True), task, tokenizer, device)

            def cached(path: Path) -> Step:
                return lambda number: cache.load(path, task, True, device)

            return [
                self.curve("rows", what, "rows", {size: kind(path) for size, path in paths.items()}, rounds)
                for what, kind in (("reading and tokenizing a file", read), ("loading it from the cache", cached))
            ]

    def _file(self, folder: Path, num_rows: int) -> Path:
        """A file of that many rows: those of the training file, again and again."""
        task, path = TASKS[TASK], folder / f"{num_rows}.csv"
        examples = read_examples(self.options.data / task.file_name("train"), task, labelled=True).examples
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(["", "id", *task.text_columns, task.label_column])
            for i in range(num_rows):
                example = examples[i % len(examples)]
                writer.writerow([i, example.id, *example.texts, example.label])
        return path

    def tokens(self) -> Curve:
        """Rows of one length, few enough that the longest fit into memory."""
        num_rows = 2 if self.options.quick else 8
        longest = self.checkpoint.config.max_position_embeddings
        kinds = {n: self._step(self._rows_of(n, num_rows), num_rows) for n in self.sizes.tokens if n <= longest}
        return self.curve("tokens a row", f"training step of {num_rows} rows", "tokens a row", kinds)

    def _rows_of(self, length: int, num_rows: int) -> dict[str, TokenizedRows]:
        ids = np.random.default_rng(0).integers(0, self.checkpoint.config.vocab_size, length * num_rows)
        lengths = np.full(num_rows, length, np.int32)
        tokens = TokenRows(ids.astype(np.int32), lengths, lengths // 2)
        labels = np.arange(num_rows, dtype=np.float32) % 2
        names = [str(i) for i in range(num_rows)]
        return {TASK: TokenizedRows(TASKS[TASK], names, labels, tokens, torch.device("cpu"))}

    def batches(self) -> Curve:
        rows = self._train_rows()
        kinds = {size: self._step(rows, size) for size in self.sizes.batch}
        return self.curve("rows a batch", "training step", "rows a batch", kinds)

    def tasks(self) -> Curve:
        """PCGrad over copies of one task, with heads of their own."""
        rows = self._train_rows()[TASK]
        names = [f"{TASK}{i}" for i in range(max(self.sizes.tasks))]
        batch_size = 4 if self.options.quick else workload.BATCH_SIZE
        with copied_tasks(names):
            kinds = {n: self._pcgrad(dict.fromkeys(names[:n], rows), batch_size) for n in self.sizes.tasks}
            return self.curve("tasks", f"PCGrad step, {batch_size} rows a task", "tasks", kinds)

    def _train_rows(self) -> dict[str, TokenizedRows]:
        return {TASK: self.checkpoint.rows(self.options.data, "train")[TASK]}

    def _step(self, rows: Mapping[str, TokenizedRows], batch_size: int) -> Step:
        trainer = workload.full_trainer(self.checkpoint.model(tuple(rows)), rows, batch_size=batch_size)
        return lambda number: trainer.take_step(1, number)

    def _pcgrad(self, rows: Mapping[str, TokenizedRows], batch_size: int) -> Step:
        trainer = workload.full_trainer(
            self.checkpoint.model(tuple(rows)),
            rows,
            draws_per_step=len(rows),
            treatment="pcgrad",
            batch_size=batch_size,
        )
        return lambda number: trainer.take_step(1, number)


@contextmanager
def copied_tasks(names: Sequence[str]) -> Iterator[None]:
    """Within it the program knows further tasks, copies of one under these names."""
    more = {**TASKS, **{name: dataclasses.replace(TASKS[TASK], name=name) for name in names}}
    with ExitStack() as stack:
        for module in (engine, model):
            stack.enter_context(mock.patch.object(module, "TASKS", more))
        yield


def draw_panels(curves: Sequence[Curve], path: Path) -> None:
    """A panel for each axis: medians with quartiles, and the fitted power law."""
    from matplotlib.figure import Figure

    axes_of: dict[str, list[Curve]] = {}
    for curve in curves:
        axes_of.setdefault(curve.axis, []).append(curve)
    figure = Figure(figsize=(9, 7), layout="constrained")
    panels = figure.subplots(2, 2).flat
    for panel, (axis, of_axis) in zip(panels, axes_of.items(), strict=True):
        for curve, color, marker in zip(of_axis, COLORS, MARKERS, strict=False):
            _draw(panel, curve, color, marker)
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="seconds")
        sizes = sorted({size for curve in of_axis for size in curve.seconds})
        panel.set_xticks(sizes, labels=[f"{size:,}" for size in sizes])
        panel.xaxis.minorticks_off()
        panel.grid(color="0.9", linewidth=0.6)
        panel.legend(fontsize=8)
    beside = path.with_name(path.name + ".tmp")
    figure.savefig(beside, dpi=150, format="png")
    os.replace(beside, path)


def _draw(panel: Any, curve: Curve, color: str, marker: str) -> None:
    sizes = np.array(list(curve.seconds))
    parts = [Summary.of(of) for of in curve.seconds.values()]
    middle = np.array(curve.medians)
    errors = [middle - [of.lower for of in parts], [of.upper for of in parts] - middle]
    label = f"{curve.what}: {curve.unit}^{curve.exponent:.2f}"
    panel.errorbar(sizes, middle, yerr=np.abs(errors), color=color, marker=marker, linestyle="none", capsize=2)
    scale = np.exp(np.mean(np.log(middle) - curve.exponent * np.log(sizes)))
    panel.plot(sizes, scale * sizes**curve.exponent, color=color, linewidth=1, label=label)


def measure(options: Options) -> Report:
    setup = Setup(options)
    curves = [*setup.reading(), setup.tokens(), setup.tasks(), setup.batches()]
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        draw_panels(curves, options.out / "scaling.png")
    lines = [line for curve in curves for line in curve.lines()]
    exponents = {curve.what: curve.exponent for curve in curves}
    settings = {"rounds": options.rounds, "exponents": exponents}
    return Report("seconds as one number grows", lines, notes=[curve.in_words() for curve in curves], settings=settings)


BENCHMARK = Benchmark("scaling", measure, rounds=5)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(BENCHMARK, __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(main())
