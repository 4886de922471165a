"""All that a CUDA GPU has to show, checked and timed: BERT-base with random weights, bfloat16, rows of real lengths.

    python -m benchmarks.gpu [--rounds N] [--device cuda|cpu] [--tiny]

It needs no checkpoint, no tokenizer and no data: weights and token ids are random, the lengths of the rows are those of
CS224N's training files (row_lengths.json, written by python -m benchmarks.gpu --save_lengths DIR).

Checked first: pooled outputs and gradients of the encoder, also in bfloat16, and transformers' pooled outputs of padded
rows against our own on the CPU; replayed steps against launched ones, bit for bit; that a step waits for nothing.
(Whether each kernel is its formula, and a killed run goes on to the same bits: python -m pytest -m cuda.) Then timed,
alternately, on the same rows: mixed steps of all tasks, ours, ours with PCGrad and transformers' on one padded batch
that lies ready on the device; predictions; AdamW is torch's fused kernel in theirs. The matmul limit is measured in
every round with bfloat16 matrices of the same shapes. Then what a step of each method costs over a plain one, and a
profile of a step, which goes beside the result file.

--tiny with --device cpu goes through all of it in seconds, on a tiny encoder.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness, reference, step_cost, workload
from benchmarks.harness import WARM_UP, Check, Line, Memory, Report, Step, Summary
from benchmarks.matmul_limit import MatmulLimit
from benchmarks.reference import OrdinaryLoop, PaddedBert
from bert import BertConfig, empty_bert, initialize
from checkpoints import EMBEDDED_MODEL
from datasets import TokenizedRows
from engine import Trainer
from evaluation import Precision, predict_logits
from model import Layout, MultitaskBert
from parameters import Choice
from tasks import TASKS

LENGTHS = Path(__file__).resolve().parent / "row_lengths.json"
QUERIES = "layers.0.qkv.weight"
PARITY_STD = 1.2  # of the weights' product with a vector of unit variance; BERT-base begins with 0.55
OURS, PCGRAD, PADDED, LIMIT = "ours", "ours with PCGrad", "transformers", "matrix products alone"


@dataclass(frozen=True)
class Size:
    """What is run. num_rows: of each task; steps: of each number of rows a step, the steps of a round."""

    config: BertConfig
    num_rows: int
    steps: Mapping[int, int]
    eval_batch_size: int


BASE = Size(BertConfig(), 4096, {32: 20, 128: 12, 512: 5, 1024: 3}, 1024)
TINY = Size(
    BertConfig(vocab_size=2000, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64),
    48,
    {9: 2},
    16,
)
# What was aimed at on an H200: rows a second by rows a step, and of predictions.
GOALS = {32: 10_000, 128: 20_000, 512: 28_000, 1024: 28_000}
EVALUATION_GOAL = 70_000
OVER_TRANSFORMERS, PCGRAD_OVER_PLAIN = 2.5, 1.05


# ------------------------------------------------------------------------------------------------------- inputs


def row_lengths(path: Path = LENGTHS) -> dict[str, np.ndarray]:
    """(R,) tokens of each task's training rows, from counts by length."""
    counts = json.loads(path.read_text("utf-8"))["counts"]
    return {task: np.repeat([int(n) for n in of], list(of.values())) for task, of in counts.items()}


def write_row_lengths(data: Path, path: Path) -> None:
    """What `row_lengths` reads: how many training rows of each task have how many of the embedded model's tokens."""
    rows = workload.Checkpoint.find(EMBEDDED_MODEL).rows(data, "train")
    counts = {task: zip(*np.unique(of.tokens.lengths, return_counts=True), strict=True) for task, of in rows.items()}
    named = {task: {str(value): int(number) for value, number in of} for task, of in counts.items()}
    text = json.dumps({"what": "tokens of the training rows of CS224N's files: rows by length", "counts": named})
    path.write_text(text + "\n", "utf-8")


def random_model(
    config: BertConfig, device: torch.device, adapter: Choice | None = None, std: float = 0.0
) -> MultitaskBert:
    """The same random weights every time. std: of the encoder's matrices; 0: BERT's own."""
    generator = torch.Generator().manual_seed(workload.SEED)
    encoder = empty_bert(config)
    initialize(encoder, std or config.initializer_range, generator)
    layout = Layout(dict.fromkeys(TASKS, Choice("linear")), adapter)
    return MultitaskBert(encoder, layout, generator).to(device)


# ------------------------------------------------------------------------------------------------------- parity


@dataclass
class Setup:
    """Where and on what everything runs."""

    size: Size
    device: torch.device
    rows: Mapping[str, TokenizedRows]
    rounds: int

    @property
    def half(self) -> Precision:
        return Precision(self.device, torch.bfloat16)

    def model(self, adapter: Choice | None = None) -> MultitaskBert:
        return random_model(self.size.config, self.device, adapter)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def parity(self) -> list[Check]:
        """Relative differences of ours and of transformers' from ours on the CPU in float32, without dropout.

        On larger weights than BERT's new ones: with those attention is next to uniform, and hardly anything that is
        wrong in it would show.
        """
        numbers, cpu = np.arange(min(32, self.size.num_rows)), torch.device("cpu")
        std = PARITY_STD / self.size.config.hidden_size**0.5
        ours, on_cpu = (random_model(self.size.config, device, std=std) for device in (self.device, cpu))
        theirs, checks = PaddedBert(ours).to(self.device).eval(), []
        our_query, cpu_query = (model.encoder.get_parameter(QUERIES) for model in (ours, on_cpu))
        for task, of in self.rows.items():
            expected, wanted = _gradient(on_cpu.pooled(task, replace(of, device=cpu).batch(numbers)), cpu_query)
            found, gradient = _gradient(ours.pooled(task, of.batch(numbers)), our_query)
            padded = theirs.pooled(reference.pad(of, numbers, self.device))
            with self.half.autocast():
                half = ours.pooled(task, of.batch(numbers))
            checks += [
                Check(f"{task}: pooled output in float32", difference(found, expected), 1e-5, True),
                Check(f"{task}: gradient in float32", difference(gradient, wanted), 1e-5, True),
                Check(f"{task}: pooled output in bfloat16", difference(half, expected), 2e-2, True),
                Check(f"{task}: transformers' pooled output in float32", difference(padded, expected), 1e-4, True),
            ]
        return checks

    def replayed(self) -> list[Check]:
        """Whether steps as CUDA graphs move the parameters to the same bits; and whether one waits for the device."""
        num_rows = min(self.size.steps)
        kinds = {"launched": False, "replayed": True}
        trainers = {name: self.trainer(num_rows, cuda_graphs=is_replayed) for name, is_replayed in kinds.items()}
        for trainer in trainers.values():
            for step in range(8):
                trainer.take_step(1, step)
        values = [trainer.shared.values for trainer in trainers.values()]
        checks = [Check("differing parameters after replayed steps", float((values[0] != values[1]).sum()), 0, True)]
        treated = self.trainer(num_rows, treatment="pcgrad")
        treated.take_step(1, 0)
        for name, trainer in {**trainers, "PCGrad": treated}.items():
            checks.append(Check(f"waits of a step, {name}", self.waits(trainer), 0, True))
        return checks

    def waits(self, trainer: Trainer) -> int:
        """1 if a step waits for the device elsewhere than where it reads what it has ordered, else 0."""
        if self.device.type != "cuda":
            return 0
        trainer.take_step(1, 8)
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.take_step(1, 8)
        except RuntimeError as error:
            print(f"waited: {error}")
            return 1
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return 0

    # --------------------------------------------------------------------------------------------------- timing

    def trainer(self, num_rows: int, **options: Any) -> Trainer:
        """Mixed steps of that many rows: a draw of each task."""
        shared = {"draws_per_step": len(self.rows), "rows_per_step": num_rows, "precision": self.half}
        return workload.full_trainer(self.model(), self.rows, **{"cuda_graphs": True, **shared, **options})

    def training(self, num_rows: int) -> tuple[list[Line], list[Check]]:
        """Rows per second of mixed steps, ours and transformers', on the same rows."""
        count = self.size.steps[num_rows]
        plan = workload.Draws(self.rows, len(self.rows), rows_per_step=num_rows)
        draws = [plan(step) for step in range((WARM_UP + self.rounds) * count)]
        lengths = [workload.lengths_of(self.rows, of) for of in draws]
        loop = MixedLoop(self, draws)
        limit = self._limit(lengths, training=True)

        def several(take_step: Callable[[int], Any]) -> Step:
            return lambda number: [take_step(step) for step in range(number * count, (number + 1) * count)]

        kinds: dict[str, Step] = {
            OURS: workload.steps_of(self.trainer(num_rows), count),
            PCGRAD: workload.steps_of(self.trainer(num_rows, treatment="pcgrad"), count),
            PADDED: several(loop.take_step),
            LIMIT: several(lambda step: limit.run(lengths[step])),
        }
        passes = [lengths[first : first + count] for first in range(WARM_UP * count, len(lengths), count)]
        lines = self._lines(f"mixed step, {num_rows} rows", kinds, passes, limit)
        rate = Summary.of(lines[0].values).median
        over = {line.what.split(", ")[-1]: line.ratio.median for line in lines if line.ratio}
        checks = [
            Check(f"{num_rows} rows a step: over transformers' time", 1 / over[PADDED], 1 / OVER_TRANSFORMERS),
            Check(f"{num_rows} rows a step: PCGrad over plain", over[PCGRAD], PCGRAD_OVER_PLAIN),
        ]
        if num_rows in GOALS:
            checks.append(Check(f"{num_rows} rows a step: the goal over the rows/s", GOALS[num_rows] / rate, 1.0))
        return lines, checks

    def evaluation(self) -> tuple[list[Line], list[Check]]:
        """Rows per second of predictions, without dropout and gradients."""
        model, other, batch_size = (
            self.model(),
            PaddedBert(self.model()).to(self.device).eval(),
            self.size.eval_batch_size,
        )
        task, rows = "para", self.rows["para"]
        lengths = workload.batch_lengths(rows, batch_size)
        limit = self._limit(lengths, training=False)
        kinds: dict[str, Step] = {
            OURS: lambda number: predict_logits(model, task, rows, batch_size, self.half),
            PADDED: lambda number: reference.predict_logits(other, task, rows, batch_size, self.half),
            LIMIT: lambda number: limit.run(*lengths),
        }
        lines = self._lines(f"prediction, batches of {batch_size}", kinds, [lengths] * self.rounds, limit)
        rate = Summary.of(lines[0].values).median
        return lines, [Check("prediction: the goal over the rows/s", EVALUATION_GOAL / rate, 1.0)]

    def profile(self, num_rows: int, treatment: str = "") -> str:
        """A table of where the time of a few steps goes, by torch.profiler."""
        from torch.profiler import ProfilerActivity, profile

        take_steps = workload.steps_of(self.trainer(num_rows, treatment=treatment), 4)
        for number in range(8):
            take_steps(number)
        self.synchronize()
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        with profile(activities=kinds, acc_events=True) as found:
            take_steps(8)
            self.synchronize()
        key = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=80)
        return f"4 steps of {num_rows} rows {treatment}\n{table}\n"

    def _limit(self, lengths: Sequence[np.ndarray], training: bool) -> MatmulLimit:
        return MatmulLimit(self.size.config, lengths, training, self.device, torch.bfloat16)

    def _lines(
        self, what: str, kinds: Mapping[str, Step], passes: Sequence[Sequence[np.ndarray]], limit: MatmulLimit
    ) -> list[Line]:
        """Rows per second of ours and of the reference. passes: of each round that counts, the lengths of its rows."""
        seconds, memory = self._alternate(kinds)
        least = [limit.seconds(of, took) for of, took in zip(passes, seconds[LIMIT], strict=True)]
        num_rows = [sum(map(len, of)) for of in passes]
        names = [name for name in kinds if name != LIMIT]
        rates = {name: [n / took for n, took in zip(num_rows, seconds[name], strict=True)] for name in names}
        ratios = {name: Summary.of_ratios(seconds[name], seconds[OURS]) for name in names if name != OURS}
        shares = {name: Summary.of_ratios(least, seconds[name]).median for name in names}
        return [
            Line(f"{what}, {name}", rates[name], "rows/s", ratios.get(name), shares[name], memory.get(name))
            for name in names
        ]

    def _alternate(self, kinds: Mapping[str, Step]) -> tuple[dict[str, list[float]], dict[str, Memory]]:
        """Seconds of the rounds, and how much of the GPU's memory each kind took at most."""
        memory: dict[str, Memory] = {}

        def watched(name: str, step: Step) -> Step:
            def take_step(number: int) -> None:
                before = torch.cuda.memory_allocated(self.device)
                torch.cuda.reset_peak_memory_stats(self.device)
                step(number)
                peak = torch.cuda.max_memory_allocated(self.device) / 2**20
                if name not in memory or peak > memory[name].peak_mb:
                    memory[name] = Memory(peak, before / 2**20)

            return take_step if self.device.type == "cuda" else step

        steps = {name: watched(name, step) for name, step in kinds.items()}
        return harness.alternate(steps, self.rounds, synchronize=self.synchronize), memory

    def method_costs(self) -> Report:
        """What a step of each method takes."""
        num_rows, count = min(self.size.steps), 5
        makers = step_cost.makers_of(self.model, self.rows, self.half, num_rows)
        trainers = {name: make() for name, make in makers.items()}
        seconds, memory = self._alternate({name: workload.steps_of(of, count) for name, of in trainers.items()})
        each = {name: [took / count for took in seconds[name]] for name in seconds}
        return step_cost.report("", trainers, each, memory, {})


class MixedLoop(OrdinaryLoop):
    """transformers' encoder on one padded batch of all tasks' rows a step; every batch lies on the device before it
    begins, and no step waits for its loss."""

    def __init__(self, setup: Setup, draws: Sequence[Sequence[workload.Draw]]) -> None:
        super().__init__(PaddedBert(setup.model()), setup.rows, setup.half, fused=setup.device.type == "cuda")
        starts = dict(zip(setup.rows, np.cumsum([0, *map(len, setup.rows.values())]).tolist(), strict=False))
        rows, device = reduce(TokenizedRows.followed_by, setup.rows.values()), setup.device
        numbers = [np.concatenate([starts[task] + of for task, of in step]) for step in draws]
        self.batches = [reference.pad(rows, of_step, device) for of_step in numbers]
        self.sizes = [[(task, len(of)) for task, of in step] for step in draws]

    def take_step(self, step: int) -> None:  # type: ignore[override]
        batch, first = self.batches[step], 0
        with self.precision.autocast():
            pooled = self.model.dropout(self.model.pooled(batch))  # (B, D)
            losses = []
            for task, count in self.sizes[step]:
                place = slice(first, first := first + count)
                losses.append(
                    TASKS[task].output.losses(self.model.heads[task](pooled[place]), batch.labels[place]).sum()
                )
        self.move(torch.stack(losses).sum() / len(batch.labels))


def _gradient(pooled: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor]:
    """The pooled output, and the gradient of a parameter under a fixed random weighting of it."""
    weights = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1)).to(pooled.device)
    (gradient,) = torch.autograd.grad((pooled * weights).sum(), parameter)
    return pooled.detach(), gradient


def difference(found: Tensor, expected: Tensor) -> float:
    """In norms of what was expected; infinite where anything is not a number."""
    found, expected = (of.detach().cpu().double() for of in (found, expected))
    value = float((found - expected).norm() / expected.norm())
    return value if np.isfinite(value) else float("inf")


def measure(setup: Setup) -> Report:
    size = setup.size
    checks = [*setup.parity(), *setup.replayed()]
    print(*checks, sep="\n", flush=True)
    lines = []
    for found, judged in [*map(setup.training, size.steps), setup.evaluation()]:
        lines += found
        checks += judged
        print(*(" | ".join(line.cells()) for line in found), sep="\n", flush=True)
    methods, smallest = setup.method_costs(), min(size.steps)
    lines += [replace(line, what=f"step of {smallest} rows a task, {line.what}") for line in methods.lines]
    tokens = np.concatenate([of.tokens.lengths for of in setup.rows.values()])
    notes = [
        f"{harness.significant(float(tokens.mean()))} tokens a row on average, the longest row {int(tokens.max())}",
        "memory on the GPU holds the models and optimizers of all that is compared: the difference is a step's own",
        *methods.notes,
    ]
    settings = {"rounds": setup.rounds, "steps_per_round": dict(size.steps), "encoder": size.config.to_dict()}
    title = "BERT on random weights, bfloat16; ratios are times of ours, of the methods to plain"
    return Report(title, lines, [*checks, *methods.checks], notes, settings)


# ------------------------------------------------------------------------------------------------------ command


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 for a check that must hold and does not, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=harness.count, default=10, help="rounds that count (default: 10)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a tiny encoder and few rows: to see that it works")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the result file")
    parser.add_argument("--save_lengths", type=Path, metavar="DIR", help=f"write {LENGTHS.name} from files, and end")
    given = parser.parse_args(arguments)
    if given.save_lengths:
        write_row_lengths(given.save_lengths, LENGTHS)
        return 0
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA GPU found, expected cpu (with --tiny)")
    device, size = torch.device(given.device), TINY if given.tiny else BASE
    rows = workload.random_rows(row_lengths(), size.num_rows, size.config, device)
    setup = Setup(size, device, rows, given.rounds or 10)
    report = measure(setup)
    environment, out = harness.environment_of(device), None if given.tiny else given.out
    profiles = [setup.profile(num_rows) for num_rows in size.steps] + [setup.profile(max(size.steps), "pcgrad")]
    status = harness.publish("gpu", report, environment, out)
    if out is not None:
        path = out / harness.file_name(environment["device"])
        path.with_suffix(".profile.txt").write_text("\n".join(profiles), "utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
