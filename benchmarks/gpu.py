"""All that a CUDA GPU has to show, checked and timed: BERT-base with random weights, bfloat16, rows of real lengths.

    python -m benchmarks.gpu [--data DIR] [--rounds N] [--device cuda|cpu] [--tiny]

It needs no checkpoint, no tokenizer and no data: weights and token ids are random, the lengths of the rows are those of
row_lengths.json (CS224N's training files), or with --data those of a directory's files.

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

from benchmarks import reference, step_cost, workload
from benchmarks.harness import (
    RESULTS,
    USER_ERRORS,
    WARM_UP,
    Check,
    Line,
    MatmulLimit,
    Memory,
    OptionError,
    Report,
    Step,
    Summary,
    alternate,
    environment,
    publish,
    ratios,
    significant,
)
from benchmarks.reference import OrdinaryLoop, PaddedBert
from bert import BertConfig, empty_bert, initialize
from datasets import TokenizedRows, TokenRows
from evaluation import Precision, predict_logits
from model import Layout, MultitaskBert
from pal import PalConfig
from tasks import TASKS

LENGTHS = Path(__file__).resolve().parent / "row_lengths.json"
EVAL_BATCH_SIZE = 128
PARITY_STD = 1.2  # of the weights' product with a vector of unit variance; BERT-base begins with 0.55
FIRST_WORD = 1000  # the ids below are special tokens
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


def random_rows(lengths: Mapping[str, np.ndarray], size: Size, device: torch.device) -> dict[str, TokenizedRows]:
    """Rows of random words, whose lengths are drawn from these; labels that the task allows."""
    draw = np.random.default_rng(0)
    rows = {}
    for name, of_task in lengths.items():
        drawn = np.minimum(draw.choice(of_task, size.num_rows), size.config.max_position_embeddings).astype(np.int32)
        ids = draw.integers(FIRST_WORD, size.config.vocab_size, int(drawn.sum()), dtype=np.int32)
        firsts = drawn if len(TASKS[name].text_columns) == 1 else np.maximum(drawn // 2, 1)
        classes = TASKS[name].output.num_classes or 6
        labels = draw.integers(0, classes, size.num_rows).astype(np.float32)
        names = [str(i) for i in range(size.num_rows)]
        rows[name] = TokenizedRows(TASKS[name], names, labels, TokenRows(ids, drawn, firsts), device)
    return rows


def random_model(
    config: BertConfig, device: torch.device, adapters: PalConfig | None = None, std: float = 0.0
) -> MultitaskBert:
    """The same random weights every time. std: of the encoder's matrices; 0: BERT's own."""
    generator = torch.Generator().manual_seed(workload.SEED)
    encoder = empty_bert(config)
    initialize(encoder, std or config.initializer_range, generator)
    return MultitaskBert(encoder, Layout(tuple(TASKS), 0, adapters), generator).to(device)


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

    def model(self, adapters: PalConfig | None = None) -> MultitaskBert:
        return random_model(self.size.config, self.device, adapters)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def parity(self) -> list[Check]:
        """Relative differences from transformers, and of bfloat16 from float32, without dropout.

        transformers is compared with on larger weights than BERT's new ones: with those attention is next to uniform,
        and hardly anything that is wrong in it would show.
        """
        std = PARITY_STD / self.size.config.hidden_size**0.5
        ours = random_model(self.size.config, self.device, std=std)
        theirs = PaddedBert.from_model(ours).to(self.device).eval()
        numbers = np.arange(min(64, self.size.num_rows))
        checks = []
        for task, of in self.rows.items():
            found, expected = (
                self._hidden_gradient(pooled, parameters)
                for pooled, parameters in (
                    (ours.pooled(task, of.batch(numbers)), ours.encoder.get_parameter("layers.0.qkv.weight")),
                    (theirs.pooled(reference.pad(of, numbers, self.device)), _query_weight(theirs)),
                )
            )
            rows = self.size.config.hidden_size
            checks.append(Check(f"{task}: pooled output, float32", difference(found[0], expected[0]), 1e-4, True))
            gradient = difference(found[1][:rows], expected[1])
            checks.append(Check(f"{task}: gradient of the first queries, float32", gradient, 1e-3, True))
            half = self._half_difference(task, of)
            checks.append(Check(f"{task}: logits in bfloat16, of their norm in float32", half, 5e-2, True))
        return checks

    @staticmethod
    def _hidden_gradient(pooled: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """The pooled output, and the gradient of a parameter under a fixed random weighting of it."""
        weights = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1)).to(pooled.device)
        (gradient,) = torch.autograd.grad((pooled * weights).sum(), parameter)
        return pooled.detach(), gradient

    def _half_difference(self, task: str, rows: TokenizedRows) -> float:
        model, precisions = self.model(), (self.half, Precision(self.device))
        return difference(*(predict_logits(model, task, rows, EVAL_BATCH_SIZE, of) for of in precisions))

    # --------------------------------------------------------------------------------------------------- timing

    def training(self, batch_size: int) -> list[Line]:
        """Rows per second of optimizer steps, ours and transformers', on the same rows."""
        draws = workload.Draws(self.rows, batch_size=batch_size)
        trainer = workload.full_trainer(self.model(), self.rows, precision=self.half, batch_size=batch_size)
        fused = self.device.type == "cuda"
        loop = OrdinaryLoop(PaddedBert.from_model(self.model()), self.rows, self.half, fused)
        lengths = [workload.lengths_of(self.rows, draws(step)) for step in range(self.num_steps)]
        limit = self.limit(lengths, training=True)
        kinds: dict[str, Step] = {
            OURS: lambda step: trainer.take_step(1, step),
            PADDED: lambda step: [loop.take_step(*draw) for draw in draws(step)],
            LIMIT: lambda step: limit.run(lengths[step]),
        }
        what = f"training step, {batch_size} random rows"
        return self._lines(what, {name: self._several(step) for name, step in kinds.items()}, lengths, limit)

    @property
    def num_steps(self) -> int:
        return (WARM_UP + self.rounds) * self.size.steps

    def _several(self, step: Step) -> Step:
        """A round of as many steps as make launches and waiting for the device small."""
        steps = self.size.steps
        return lambda number: [step(number * steps + i) for i in range(steps)]

    def limit(self, lengths: Sequence[np.ndarray], training: bool) -> MatmulLimit:
        return MatmulLimit(self.size.config, lengths, training, self.device, torch.bfloat16)

    def evaluation(self) -> list[Line]:
        """Rows per second of predictions, without dropout and gradients."""
        model, other = self.model(), PaddedBert.from_model(self.model()).to(self.device).eval()
        task, rows = next((task, of) for task, of in self.rows.items() if task == "para")
        order = rows.tokens.lengths[rows.by_length()]
        lengths = [order[start : start + EVAL_BATCH_SIZE] for start in range(0, len(order), EVAL_BATCH_SIZE)]
        limit = self.limit(lengths, training=False)
        kinds: dict[str, Step] = {
            OURS: lambda number: predict_logits(model, task, rows, EVAL_BATCH_SIZE, self.half),
            PADDED: lambda number: reference.predict_logits(other, task, rows, EVAL_BATCH_SIZE, self.half),
            LIMIT: lambda number: limit.run(*lengths),
        }
        return self._lines(f"prediction, batches of {EVAL_BATCH_SIZE}", kinds, [np.concatenate(lengths)], limit)

    def _lines(
        self, what: str, kinds: Mapping[str, Step], lengths: Sequence[np.ndarray], limit: MatmulLimit
    ) -> list[Line]:
        """Rows per second of ours and of the reference. lengths: of all steps of all rounds, or of every round."""
        memory: dict[str, Memory] = {}
        watched = {name: self._watched(name, step, memory) for name, step in kinds.items()}
        seconds = alternate(watched, self.rounds, synchronize=self.synchronize)
        per_round = [np.concatenate(self._of_round(lengths, i)) for i in range(self.rounds)]
        least = [limit.seconds([of], measured) for of, measured in zip(per_round, seconds[LIMIT], strict=True)]
        rates = {n: [len(of) / s for of, s in zip(per_round, seconds[n], strict=True)] for n in (OURS, PADDED)}
        return [
            Line(
                f"{what}, {name}",
                rates[name],
                "rows/s",
                None if name == OURS else Summary.of(ratios(rates[name], rates[OURS])),
                Summary.of(ratios(least, seconds[name])).median,
                memory.get(name),
            )
            for name in (OURS, PADDED)
        ]

    def _of_round(self, lengths: Sequence[np.ndarray], number: int) -> Sequence[np.ndarray]:
        if len(lengths) == 1:
            return lengths
        first = (WARM_UP + number) * self.size.steps
        return lengths[first : first + self.size.steps]

    def _watched(self, name: str, step: Step, memory: dict[str, Memory]) -> Step:
        """The step, after which `memory` says how much of the GPU's it took at most."""
        if self.device.type != "cuda":
            return step

        def watched(number: int) -> None:
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            step(number)
            peak = torch.cuda.max_memory_allocated(self.device) / 2**20
            if name not in memory or peak > memory[name].peak_mb:
                memory[name] = Memory(peak, before / 2**20)

        return watched

    def method_costs(self) -> Report:
        """What a step of each method takes."""
        chosen = step_cost.Methods(self.size.config, self.model, self.rows, self.half, min(self.size.batch_sizes))
        trainers = {name: make() for name, make in chosen.makers().items()}
        memory: dict[str, Memory] = {}
        kinds = {
            name: self._watched(name, self._several(step_cost.step_of(trainer)), memory)
            for name, trainer in trainers.items()
        }
        seconds = alternate(kinds, self.rounds, synchronize=self.synchronize)
        each = {name: [of / self.size.steps for of in seconds[name]] for name in seconds}
        return step_cost.report("", trainers, each, {name: memory.get(name) for name in trainers})


def _query_weight(model: PaddedBert) -> Tensor:
    return model.encoder.get_parameter("encoder.layer.0.attention.self.query.weight")


def difference(found: Tensor, expected: Tensor) -> float:
    """In norms of what was expected; infinite where anything is not a number."""
    value = float((found.double() - expected.double()).norm() / expected.double().norm())
    return value if np.isfinite(value) else float("inf")


def measure(setup: Setup) -> Report:
    checks = setup.parity()
    lines = [line for batch_size in setup.size.batch_sizes for line in setup.training(batch_size)]
    lines += setup.evaluation()
    methods = setup.method_costs()
    lines += [
        replace(line, what=f"step of {min(setup.size.batch_sizes)} rows a task, {line.what}") for line in methods.lines
    ]
    tokens = np.concatenate([of.tokens.lengths for of in setup.rows.values()])
    notes = [
        f"{significant(float(tokens.mean()))} tokens a row on average, the longest row {int(tokens.max())}",
        "memory on the GPU holds the models and optimizers of all that is compared: the difference is a step's own",
        *methods.notes,
    ]
    settings = {"rounds": setup.rounds, "steps_per_round": setup.size.steps, "encoder": setup.size.config.to_dict()}
    title = "BERT on random weights, bfloat16; ratios to ours, of the methods to plain"
    return Report(title, lines, [*checks, *methods.checks], notes, settings)


# ------------------------------------------------------------------------------------------------------ command


def lengths_of_files(data: Path, model: str) -> dict[str, np.ndarray]:
    """(R,) tokens of the rows of each training file."""
    rows = workload.Checkpoint.find(model).rows(data, "train")
    return {task: of.tokens.lengths for task, of in rows.items()}


def write_row_lengths(lengths: Mapping[str, np.ndarray], path: Path) -> None:
    """What `row_lengths` reads: how many rows of each task have how many tokens."""
    counts = {}
    for task, of in lengths.items():
        values, numbers = np.unique(of, return_counts=True)
        counts[task] = {str(value): int(number) for value, number in zip(values, numbers, strict=True)}
    text = json.dumps({"what": "tokens of the training rows of CS224N's files: rows by length", "counts": counts})
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text + "\n", "utf-8")
    beside.replace(path)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="directory whose training rows give the lengths (needs --model)")
    parser.add_argument(
        "--model", default="minilm", help="checkpoint whose tokenizer counts them (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=10, help="rounds that count (default %(default)s)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a tiny encoder and few rows: to see that it works")
    parser.add_argument("--out", type=Path, help="folder of the result file (default benchmarks/results; --tiny: none)")
    parser.add_argument("--save_lengths", action="store_true", help=f"write {LENGTHS.name} from --data, and end")
    return parser


def execute(given: argparse.Namespace) -> int:
    if given.rounds < 1:
        raise OptionError(f"--rounds {given.rounds}: expected 1 or more")
    if given.save_lengths and given.data is None:
        raise OptionError("--save_lengths: expected with --data")
    if given.save_lengths:
        write_row_lengths(lengths_of_files(given.data, given.model), LENGTHS)
        return 0
    if given.device == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device cuda: no CUDA GPU found, expected cpu (with --tiny)")
    device, size = torch.device(given.device), TINY if given.tiny else BASE
    lengths = lengths_of_files(given.data, given.model) if given.data else row_lengths()
    setup = Setup(size, device, random_rows(lengths, size, device), given.rounds)
    found = environment(device)
    return publish("gpu", measure(setup), found, given.out or (None if given.tiny else RESULTS))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 for a check that must hold and does not, 2 for bad input."""
    try:
        return execute(make_parser().parse_args(arguments))
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
