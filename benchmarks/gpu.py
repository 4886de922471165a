"""All that a CUDA GPU has to show, checked and timed: BERT-base with random weights, bfloat16, rows of real lengths.

    python -m benchmarks.gpu [--rounds N] [--device cuda|cpu] [--tiny]

It needs no checkpoint, no tokenizer and no data: weights and token ids are random, the lengths of the rows are those of
CS224N's training files (row_lengths.json, written by python -m benchmarks.gpu --save_lengths DIR).

Checked first: pooled outputs and gradients of the encoder on packed rows against transformers' on padded ones in
float32, and our predictions in bfloat16 against those in float32. Then timed, ours and transformers alternately:
optimizer steps on the same random batches of 32 and of 128 rows, and predictions in batches of 128. AdamW is torch's
fused kernel in both. The matmul limit is measured in every round with bfloat16 matrices of the same shapes. Last, what
a step of each method costs over a plain one.

--tiny with --device cpu goes through all of it in seconds, on a tiny encoder.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
from evaluation import Precision, predict_logits
from model import Layout, MultitaskBert
from parameters import Choice
from tasks import TASKS

LENGTHS = Path(__file__).resolve().parent / "row_lengths.json"
EVAL_BATCH_SIZE = 128
PARITY_STD = 1.2  # of the weights' product with a vector of unit variance; BERT-base begins with 0.55
OURS, PADDED, LIMIT = "ours", "transformers", "matrix products alone"


@dataclass(frozen=True)
class Size:
    """What is run. num_rows: of each task; steps: optimizer steps of a round."""

    config: BertConfig
    num_rows: int
    steps: int
    batch_sizes: tuple[int, ...]


BASE = Size(BertConfig(), 4096, 10, (32, 128))
TINY = Size(
    BertConfig(vocab_size=2000, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64),
    48,
    2,
    (4, 8),
)


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
        """Relative differences from transformers, and of bfloat16 from float32, without dropout.

        transformers is compared with on larger weights than BERT's new ones: with those attention is next to uniform,
        and hardly anything that is wrong in it would show.
        """
        size = self.size.config.hidden_size
        ours = random_model(self.size.config, self.device, std=PARITY_STD / size**0.5)
        theirs = PaddedBert(ours).to(self.device).eval()
        our_query = ours.encoder.get_parameter("layers.0.qkv.weight")  # (3 D, D)
        their_query = theirs.encoder.get_parameter("encoder.layer.0.attention.self.query.weight")  # (D, D)
        plain, precisions = self.model(), (self.half, Precision(self.device))
        numbers = np.arange(min(64, self.size.num_rows))
        checks = []
        for task, of in self.rows.items():
            pooled, gradient = _gradient(ours.pooled(task, of.batch(numbers)), our_query)
            wanted, wanted_gradient = _gradient(theirs.pooled(reference.pad(of, numbers, self.device)), their_query)
            half, whole = (predict_logits(plain, task, of, EVAL_BATCH_SIZE, precision) for precision in precisions)
            query_difference = difference(gradient[:size], wanted_gradient)
            checks += [
                Check(f"{task}: pooled output, float32", difference(pooled, wanted), 1e-4, True),
                Check(f"{task}: gradient of the first queries, float32", query_difference, 1e-3, True),
                Check(f"{task}: logits in bfloat16, of their norm in float32", difference(half, whole), 5e-2, True),
            ]
        return checks

    # --------------------------------------------------------------------------------------------------- timing

    def training(self, batch_size: int) -> list[Line]:
        """Rows per second of optimizer steps, ours and transformers', on the same rows."""
        draws = workload.Draws(self.rows, batch_size=batch_size)
        trainer = workload.full_trainer(self.model(), self.rows, precision=self.half, batch_size=batch_size)
        is_fused = self.device.type == "cuda"
        loop = OrdinaryLoop(PaddedBert(self.model()), self.rows, self.half, is_fused)
        steps = self.size.steps
        lengths = [workload.lengths_of(self.rows, draws(step)) for step in range((WARM_UP + self.rounds) * steps)]
        limit = self._limit(lengths, training=True)
        kinds: dict[str, Step] = {
            OURS: workload.step_of(trainer),
            PADDED: lambda step: [loop.take_step(*draw) for draw in draws(step)],
            LIMIT: lambda step: limit.run(lengths[step]),
        }
        passes = [lengths[first : first + steps] for first in range(WARM_UP * steps, len(lengths), steps)]
        what = f"training step, {batch_size} random rows"
        return self._lines(what, {name: self._several(step) for name, step in kinds.items()}, passes, limit)

    def evaluation(self) -> list[Line]:
        """Rows per second of predictions, without dropout and gradients."""
        model, other = self.model(), PaddedBert(self.model()).to(self.device).eval()
        task, rows = "para", self.rows["para"]
        lengths = workload.batch_lengths(rows, EVAL_BATCH_SIZE)
        limit = self._limit(lengths, training=False)
        kinds: dict[str, Step] = {
            OURS: lambda number: predict_logits(model, task, rows, EVAL_BATCH_SIZE, self.half),
            PADDED: lambda number: reference.predict_logits(other, task, rows, EVAL_BATCH_SIZE, self.half),
            LIMIT: lambda number: limit.run(*lengths),
        }
        return self._lines(f"prediction, batches of {EVAL_BATCH_SIZE}", kinds, [lengths] * self.rounds, limit)

    def _limit(self, lengths: Sequence[np.ndarray], training: bool) -> MatmulLimit:
        return MatmulLimit(self.size.config, lengths, training, self.device, torch.bfloat16)

    def _several(self, step: Step) -> Step:
        """A round of as many steps as make launches and waiting for the device small."""
        steps = self.size.steps
        return lambda number: [step(number * steps + i) for i in range(steps)]

    def _lines(
        self, what: str, kinds: Mapping[str, Step], passes: Sequence[Sequence[np.ndarray]], limit: MatmulLimit
    ) -> list[Line]:
        """Rows per second of ours and of the reference. passes: of each round that counts, the lengths of its rows."""
        seconds, memory = self._alternate(kinds)
        least = [limit.seconds(of, took) for of, took in zip(passes, seconds[LIMIT], strict=True)]
        num_rows = [sum(map(len, of)) for of in passes]
        names = (OURS, PADDED)
        rates = {name: [n / took for n, took in zip(num_rows, seconds[name], strict=True)] for name in names}
        ratios = {PADDED: Summary.of_ratios(rates[PADDED], rates[OURS])}
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
        makers = step_cost.makers_of(self.model, self.rows, self.half, min(self.size.batch_sizes))
        trainers = {name: make() for name, make in makers.items()}
        kinds = {name: self._several(workload.step_of(trainer)) for name, trainer in trainers.items()}
        seconds, memory = self._alternate(kinds)
        each = {name: [took / self.size.steps for took in seconds[name]] for name in seconds}
        return step_cost.report("", trainers, each, memory, {})


def _gradient(pooled: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor]:
    """The pooled output, and the gradient of a parameter under a fixed random weighting of it."""
    weights = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1)).to(pooled.device)
    (gradient,) = torch.autograd.grad((pooled * weights).sum(), parameter)
    return pooled.detach(), gradient


def difference(found: Tensor, expected: Tensor) -> float:
    """In norms of what was expected; infinite where anything is not a number."""
    value = float((found.double() - expected.double()).norm() / expected.double().norm())
    return value if np.isfinite(value) else float("inf")


def measure(setup: Setup) -> Report:
    checks, size = setup.parity(), setup.size
    lines = [line for batch_size in size.batch_sizes for line in setup.training(batch_size)]
    lines += setup.evaluation()
    methods, smallest = setup.method_costs(), min(size.batch_sizes)
    lines += [replace(line, what=f"step of {smallest} rows a task, {line.what}") for line in methods.lines]
    tokens = np.concatenate([of.tokens.lengths for of in setup.rows.values()])
    notes = [
        f"{harness.significant(float(tokens.mean()))} tokens a row on average, the longest row {int(tokens.max())}",
        "memory on the GPU holds the models and optimizers of all that is compared: the difference is a step's own",
        *methods.notes,
    ]
    settings = {"rounds": setup.rounds, "steps_per_round": size.steps, "encoder": size.config.to_dict()}
    title = "BERT on random weights, bfloat16; ratios to ours, of the methods to plain"
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
    report = measure(Setup(size, device, rows, given.rounds or 10))
    return harness.publish("gpu", report, harness.environment_of(device), None if given.tiny else given.out)


if __name__ == "__main__":
    sys.exit(main())
