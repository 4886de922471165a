"""What is measured on a CPU beside step_cost.py: ours against the ordinary way, on the same rows of the same files."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness, reference, workload
from benchmarks.harness import ROOT, WARM_UP, Check, MeasurementError, Options, Report, Summary, lines_of, significant
from benchmarks.reference import OrdinaryLoop, PaddedBert, length_grouped_batches
from datasets import SAMPLE, TokenizedRows
from evaluation import compute_features, predict_all
from model import FrozenEncoder, MultitaskBert, Trained

OURS, PADDED, GROUPED = "ours", "transformers, padded", "transformers, grouped by length"
KEPT, ANEW = "features computed once", "features computed in every epoch (one measured)"
MAIN, COLD, WARM = "the main job on the sample", "files tokenized", "files from the cache"
FLOOR = "import torch"

EVAL_BATCH_SIZE = 64
FROZEN_EPOCHS, FROZEN_ROWS = 25, 2000
MAIN_FLAGS = "--option finetune --scheduler pal --pcgrad"
SHORT_FLAGS = "--option finetune --pretrain_epochs 0 --epochs 1 --steps_per_epoch 1 --eval_every 0"
TIME_OUT = 600  # seconds to a first step


def training_step(options: Options) -> Report:
    """An optimizer step on 32 random rows of one task, the tasks in turn, the very same rows in each step.

    The ordinary loop: transformers' BertModel with scaled-dot-product attention, batches padded to their longest row,
    torch.optim.AdamW as it comes. Its second form makes batches of rows of similar length (group_by_length), which pad
    less and see other rows; it is compared by the row.
    """
    checkpoint = workload.Checkpoint.find(options.model)
    rows = checkpoint.rows(options.data, "train")
    draws, num_steps = workload.Draws(rows), WARM_UP + options.rounds
    grouped = grouped_draws(rows, num_steps)
    lengths = [workload.lengths_of(rows, draws(step)) for step in range(num_steps)]
    trainer = workload.full_trainer(checkpoint.model(tuple(rows)), rows)
    padded, by_length = (OrdinaryLoop(PaddedBert(checkpoint.model(tuple(rows))), rows, workload.CPU) for _ in range(2))
    kinds: dict[str, harness.Step] = {
        OURS: workload.step_of(trainer),
        PADDED: lambda step: [padded.take_step(*draw) for draw in draws(step)],
        GROUPED: lambda step: by_length.take_step(*grouped[step]),
    }
    seconds = harness.alternate(kinds, options.rounds)

    lengths = lengths[WARM_UP:]
    batches = {OURS: lengths, PADDED: lengths, GROUPED: [workload.lengths_of(rows, [of]) for of in grouped[WARM_UP:]]}
    by_row = {n: [s / len(of) for s, of in zip(seconds[n], batches[n], strict=True)] for n in batches}
    over = {
        PADDED: Summary.of_ratios(seconds[PADDED], seconds[OURS]),
        GROUPED: harness.ratio_of_totals(by_row[GROUPED], by_row[OURS]),
    }
    checks = [
        Check("our step over that with random padded batches", 1 / over[PADDED].median, 1 / 2.7),
        Check("our step over that with batches grouped by length, by the row", 1 / over[GROUPED].median, 1 / 1.5),
    ]
    per_row = [f"{name} {significant(1000 * float(np.mean(of)))} ms" for name, of in by_row.items()]
    num_tokens = np.median([int(of.sum()) for of in lengths])
    padding = float(np.median([len(of) * int(of.max()) / int(of.sum()) for of in lengths]))
    notes = [
        f"by the row, all rounds together, as is the ratio of {GROUPED}: {', '.join(per_row)}",
        f"the median random batch has {num_tokens:.0f} real tokens; padded to its longest row it has "
        f"{significant(padding)} times as many",
    ]
    title = "seconds of an optimizer step on 32 rows; ratios to ours"
    return Report(title, lines_of(seconds, OURS, ratios=over), checks, notes, {"rows": workload.row_counts(rows)})


def grouped_draws(rows: Mapping[str, TokenizedRows], num_steps: int) -> list[workload.Draw]:
    """For each step rows of similar length of one task, the tasks in turn, all lengths in their proportion."""
    num_batches = -(-num_steps // len(rows))
    batches = {
        task: length_grouped_batches(of.tokens.lengths, workload.BATCH_SIZE, num_batches) for task, of in rows.items()
    }
    return [(task, batches[task][i]) for i in range(num_batches) for task in rows][:num_steps]


def evaluation(options: Options) -> Report:
    """Predicting every dev row of every task in batches of 64, without dropout and gradients, with the same weights.

    The reference takes the rows in the order of their file and pads each batch to its longest row; ours predicts as the
    program does, in batches of similar length.
    """
    checkpoint = workload.Checkpoint.find(options.model)
    rows, size = checkpoint.rows(options.data, "dev"), (EVAL_BATCH_SIZE, workload.CPU)
    model = checkpoint.model(tuple(rows))
    other = PaddedBert(model).eval()
    kinds: dict[str, harness.Step] = {
        OURS: lambda number: predict_all(model, rows, *size),
        PADDED: lambda number: {task: reference.predict_logits(other, task, of, *size) for task, of in rows.items()},
    }
    seconds = harness.alternate(kinds, options.rounds, warm_up=1)

    num_rows, gain = sum(map(len, rows.values())), Summary.of_ratios(seconds[PADDED], seconds[OURS]).median
    ours, theirs = kinds[OURS](0), kinds[PADDED](0)
    difference = max(float((ours[task] - theirs[task]).abs().max()) for task in rows)
    checks = [
        Check("the reference's rows in a second over ours", 1 / gain, 1 / 2.5),
        Check("largest difference of two logits for one row", difference, 1e-4, must_hold=True),
    ]
    rates = [f"{name} {significant(num_rows / Summary.of(of).median)}" for name, of in seconds.items()]
    notes = [f"rows a second: {', '.join(rates)}"]
    title = f"seconds to predict {num_rows} dev rows; ratios to ours"
    return Report(title, lines_of(seconds, OURS), checks, notes, {"rows": workload.row_counts(rows)})


def frozen_stage(options: Options) -> Report:
    """A stage that trains heads over a random subset of 2,000 rows, its features computed once or in every epoch.

    With features that are kept the whole stage of 25 epochs is timed. Without, one epoch is timed and counted 25 times:
    every epoch does the same work. The encoder is ours in both, in the same batches.
    """
    checkpoint = workload.Checkpoint.find(options.model)
    rows = workload.subset(checkpoint.rows(options.data, "train"), FROZEN_ROWS)
    model = checkpoint.model(tuple(rows))
    heads = {name: value.clone() for name, value in model.heads.state_dict().items()}
    kinds = {
        KEPT: lambda number: train_heads(model, heads, rows, FROZEN_EPOCHS),
        ANEW: lambda number: train_heads(model, heads, rows, 1),
    }
    seconds = harness.alternate(kinds, options.rounds, warm_up=0)
    seconds[ANEW] = [FROZEN_EPOCHS * took for took in seconds[ANEW]]
    ratio = Summary.of_ratios(seconds[KEPT], seconds[ANEW]).median
    checks = [Check("a stage with features over one that computes them in every epoch", ratio, 1 / 15)]
    counts = workload.row_counts(rows)
    title = f"seconds of a frozen stage of {FROZEN_EPOCHS} epochs over {sum(counts.values())} rows; ratios to {KEPT}"
    return Report(title, lines_of(seconds, KEPT), checks, (), {"rows": counts})


def train_heads(model: MultitaskBert, heads: Mapping[str, Any], rows: Mapping[str, TokenizedRows], epochs: int) -> None:
    """Computes the features and trains heads on them, that begin as `heads`."""
    model.heads.load_state_dict(heads)
    trained = Trained({}, {task: model.head_parameters(task) for task in rows})
    features = {t: compute_features(model, t, of, EVAL_BATCH_SIZE, workload.CPU) for t, of in rows.items()}
    trainer = workload.make_trainer(FrozenEncoder(model), trained, features)
    for step in range(epochs * -(-sum(map(len, rows.values())) // workload.BATCH_SIZE)):
        trainer.take_step(1, step)


def start_up(options: Options) -> Report:
    """From the command to the end of the first training step, imports included, each in a process of its own.

    The main job on the sample, and a short one on the given data, with files that are tokenized then and with those
    that an earlier run has left in the cache. `import torch` alone is the floor of them all.
    """
    with tempfile.TemporaryDirectory() as name:
        cache = Path(name) / "cache"

        def first_step(flags: str, data: Path, cache: Path | str, number: int) -> None:
            out = Path(name) / f"run-{time.monotonic_ns()}"
            places = [f"--data={data}", f"--cache={cache}", f"--out={out}", f"--threads={options.threads}"]
            model = f"--model={workload.Checkpoint.find(options.model).folder}"
            until_first_step([*flags.split(), model, "--device=cpu", *places], out / "metrics.jsonl")

        kinds: dict[str, harness.Step] = {
            MAIN: partial(first_step, MAIN_FLAGS, SAMPLE, "off"),
            COLD: partial(first_step, SHORT_FLAGS, options.data, "off"),
            WARM: partial(first_step, SHORT_FLAGS, options.data, cache),
            FLOOR: lambda number: subprocess.run([sys.executable, "-c", "import torch"], check=True),
        }
        seconds = harness.alternate(kinds, options.rounds, warm_up=1)
    checks = [Check("seconds of the main job on the sample", Summary.of(seconds[MAIN]).median, 6.0)]
    notes = ["files of Python and of the model come from the system's file cache: a round went before"]
    title = f"seconds from the command to the end of the first training step; ratios to {COLD}"
    return Report(title, lines_of(seconds, COLD), checks, notes)


def until_first_step(flags: Sequence[str], log: Path) -> None:
    """Trains until the log holds a line. Raises MeasurementError if the command ends before, or hangs."""
    command = [sys.executable, str(ROOT / "multitask_classifier.py"), *flags]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        started = time.monotonic()
        while not (log.is_file() and log.stat().st_size):
            if process.poll() is not None or time.monotonic() - started > TIME_OUT:
                process.kill()
                raise MeasurementError(f"{' '.join(command)}: no first step; {process.communicate()[1].strip()}")
            time.sleep(0.005)
        process.kill()
