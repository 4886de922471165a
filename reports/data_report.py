"""What is in a data directory: `python datasets.py DIR [--plot FILE]`.

Rows, classes, token lengths, how much of a padded batch would be padding, repeated rows, rows that stand in the
training and the dev file both, and rows without a label, with line numbers.

Shape letters: R rows of a file.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bert import CheckpointError
from checkpoints import EMBEDDED_MODEL, find_checkpoint, read_bert_config
from datasets import (
    SPLITS,
    DataError,
    DataFile,
    Tokenizer,
    data_folder,
    epoch_order,
    read_examples,
    text_hashes,
    tokenize,
)
from reports.command import FORMATS, Parser, ReportError, check_new_file, run_command, write_file
from reports.plots import content, new_figure
from tasks import TASKS, Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PERCENTILES = (50, 90, 98, 99)
NUM_NAMED = 10  # rows named one by one in a list
STYLES = {
    "train": ("#0072B2", "-"),
    "dev": ("#E69F00", "--"),
    "test": ("#009E73", ":"),
}  # told apart by the colour-blind


@dataclass(frozen=True)
class Description:
    """What is known of one file. lengths: (R,) tokens; labels: (R,), NaN without; hashes: (R,), equal for equal texts.

    num_truncated: rows that have more tokens than the model takes.
    """

    task: Task
    split: str
    file: DataFile
    lengths: np.ndarray
    labels: np.ndarray
    hashes: np.ndarray
    num_truncated: int


def describe_file(path: Path, task: Task, split: str, tokenizer: Tokenizer) -> Description:
    """Reads and tokenizes a file. Raises DataError if it cannot be used."""
    file = read_examples(path, task, labelled=split != "test")
    rows = tokenize(task, file.examples, tokenizer, torch.device("cpu"))
    lengths = rows.tokens.lengths
    at_limit = np.flatnonzero(lengths == tokenizer.max_length)
    truncated = sum(tokenizer.num_tokens(file.examples[i].texts) > tokenizer.max_length for i in at_limit)
    return Description(task, split, file, lengths, rows.labels, text_hashes(file.examples), truncated)


def describe_folder(folder: Path, tokenizer: Tokenizer) -> list[Description]:
    """All files of all tasks that are there. Raises DataError if there are none."""
    result = []
    for task in TASKS.values():
        paths = [(split, folder / task.file_name(split)) for split in SPLITS]
        result += [describe_file(path, task, split, tokenizer) for split, path in paths if path.exists()]
    if not result:
        expected = ", ".join(task.file_name("train") for task in TASKS.values())
        raise DataError(f"{folder}: no data file, expected such as {expected}")
    return result


def padding_share(lengths: np.ndarray, batch_size: int, seed: int = 0) -> float:
    """Share of a padded batch's tokens that is padding, over one pass of random batches padded to their longest row."""
    order = epoch_order(len(lengths), np.random.default_rng(seed))
    batches = [lengths[order[i : i + batch_size]] for i in range(0, len(order), batch_size)]
    padded = sum(int(batch.max()) * len(batch) for batch in batches)
    return 1 - int(lengths.sum()) / padded


def repeated_rows(description: Description) -> list[tuple[int, int]]:
    """(row, earlier row) for each row whose texts stood in the file before."""
    first: dict[int, int] = {}
    return [(row, first[x]) for row, x in enumerate(description.hashes.tolist()) if first.setdefault(x, row) != row]


def shared_rows(train: Description, dev: Description) -> list[tuple[int, int]]:
    """(dev row, training row) for each dev row whose texts stand in the training file."""
    first = {x: row for row, x in reversed(list(enumerate(train.hashes.tolist())))}
    return [(row, first[x]) for row, x in enumerate(dev.hashes.tolist()) if x in first]


def report(descriptions: Sequence[Description], batch_size: int) -> Iterator[str]:
    """The description in lines."""
    for task in dict.fromkeys(d.task.name for d in descriptions):
        of_task = {d.split: d for d in descriptions if d.task.name == task}
        yield f"{task}  {TASKS[task].title}"
        for description in of_task.values():
            yield from _file_lines(description, batch_size)
        if "train" in of_task and "dev" in of_task:
            yield from _leak_lines(of_task["train"], of_task["dev"])
        yield ""


def _file_lines(of: Description, batch_size: int) -> Iterator[str]:
    yield f"  {of.split:<6}{of.file.path.name:<26}{len(of.lengths):>8,} rows"
    if of.split != "test":
        yield f"        {'labels':<10}{label_summary(of)}"
    percentiles = ", ".join(f"{q}% {int(np.percentile(of.lengths, q))}" for q in PERCENTILES)
    cut = f"; {_rows(of.num_truncated)} longer than the model takes" if of.num_truncated else ""
    yield f"        {'tokens':<10}{percentiles}, longest {of.lengths.max()}, mean {of.lengths.mean():.1f}{cut}"
    share = padding_share(of.lengths, batch_size)
    yield f"        {'padding':<10}{share:.0%} of random batches of {batch_size}, which packing saves"
    repeats = repeated_rows(of)
    differing = sum(of.labels[row] != of.labels[earlier] for row, earlier in repeats) if of.split != "test" else 0
    others = f", {differing} with another label" if differing else ""
    if repeats:
        lines = [f"{of.file.examples[row].line} = {of.file.examples[earlier].line}" for row, earlier in repeats]
        yield f"        {'repeated':<10}{_rows(len(repeats))}{others}; lines {_some(lines)}"
    if of.file.skipped:
        lines = [f"{of.file.path.name}:{line}" for line in of.file.skipped]
        yield f"        {'skipped':<10}{_rows(len(of.file.skipped))} without a label: {_some(lines)}"


def label_summary(of: Description) -> str:
    """Numbers of rows by class, or the range and mean on a scale."""
    if of.task.output.num_classes is None:
        low, high = of.labels.min(), of.labels.max()
        return f"from {low:g} to {high:g}, mean {of.labels.mean():.2f}, standard deviation {of.labels.std():.2f}"
    counts = Counter(int(label) for label in of.labels)
    classes = range(of.task.output.num_classes)
    return ", ".join(f"{k}: {counts[k]:,} ({counts[k] / len(of.labels):.1%})" for k in classes)


def _leak_lines(train: Description, dev: Description) -> Iterator[str]:
    shared = shared_rows(train, dev)
    if not shared:
        yield "  no dev row stands in the training file"
        return
    lines = [f"{dev.file.examples[row].line} = {train.file.examples[other].line}" for row, other in shared]
    yield (
        f"  warning: {len(shared)} of {len(dev.lengths)} dev rows stand in the training file too; "
        f"lines (dev = train) {_some(lines)}"
    )


def _rows(number: int) -> str:
    return f"{number:,} row" + "s" * (number != 1)


def _some(items: Sequence[str]) -> str:
    more = len(items) - NUM_NAMED
    return ", ".join(items[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


# --------------------------------------------------------------------------------------------------------- plot


def draw(descriptions: Sequence[Description]) -> Figure:
    """A picture: of each task the distribution of labels above, of token lengths below, in shares of the rows."""
    tasks = list(dict.fromkeys(d.task.name for d in descriptions))
    figure = new_figure(4 * len(tasks), 6.4)
    axes = figure.subplots(2, len(tasks), squeeze=False)
    for column, name in enumerate(tasks):
        of_task = {d.split: d for d in descriptions if d.task.name == name}
        axes[0, column].set_title(TASKS[name].title)
        _draw_labels(axes[0, column], TASKS[name], of_task)
        _draw_lengths(axes[1, column], of_task)
    for row in axes:
        row[0].set_ylabel("share of the rows (%)")
    return figure


def _draw_labels(axis: Axes, task: Task, of_task: Mapping[str, Description]) -> None:
    labelled = {split: of for split, of in of_task.items() if split != "test"}
    num_classes = task.output.num_classes
    edges = np.arange(6.0) if num_classes is None else np.arange(num_classes + 1) - 0.5
    width = 0.8 / max(1, len(labelled))
    for number, (split, of) in enumerate(labelled.items()):
        shares = 100 * np.histogram(of.labels, edges)[0] / len(of.labels)
        middles = (edges[:-1] + edges[1:]) / 2 + (number - (len(labelled) - 1) / 2) * width
        style: dict[str, Any] = {
            "color": STYLES[split][0],
            "hatch": "///" if split == "dev" else None,
            "edgecolor": "white",
        }
        axis.bar(middles, shares, width, label=f"{split}, {len(of.labels):,} rows", **style)
    axis.set_xlabel(f"{task.label_column} (0 to 5)" if num_classes is None else "class")
    if num_classes is not None:
        axis.set_xticks(range(num_classes))
    if labelled:
        axis.set_ylim(top=axis.get_ylim()[1] * 1.25)  # room for the legend
        axis.legend(fontsize=8, frameon=False, loc="upper right")


def _draw_lengths(axis: Axes, of_task: Mapping[str, Description]) -> None:
    longest = max(int(of.lengths.max()) for of in of_task.values())
    edges = np.linspace(0, longest + 1, min(longest + 1, 40) + 1)
    for split, of in of_task.items():
        style: dict[str, Any] = {"color": STYLES[split][0], "linestyle": STYLES[split][1], "histtype": "step"}
        weights = np.full(len(of.lengths), 100 / len(of.lengths))
        axis.hist(of.lengths, edges.tolist(), weights=weights, label=split, linewidth=1.6, **style)
    axis.set_xlabel("length (tokens)")
    axis.legend(fontsize=8, frameon=False)


# ------------------------------------------------------------------------------------------------------ command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="datasets.py", description="Describe the data files of a directory.", allow_abbrev=False)
    parser.add_argument("folder", metavar="DIR", help="a directory with CS224N's files, or sample")
    parser.add_argument(
        "--plot", metavar="FILE", type=Path, help=f"draw labels and lengths into a new file: {', '.join(FORMATS)}"
    )
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="whose tokenizer counts (default: %(default)s)")
    parser.add_argument(
        "--batch_size", metavar="N", type=int, default=32, help="rows of a batch (default: %(default)s)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 0, or 2 for an input that cannot be used."""
    args = build_parser().parse_args(arguments)
    return run_command(lambda: describe(args), DataError, CheckpointError)


def describe(args: argparse.Namespace) -> None:
    """Draws where that is wanted, and prints."""
    if args.batch_size < 1:
        raise ReportError(f"--batch_size {args.batch_size}: expected 1 or more")
    if args.plot is not None:
        check_new_file("--plot", args.plot, [f".{format}" for format in FORMATS])
    folder = data_folder(args.folder, flag="")
    checkpoint = find_checkpoint(args.model)
    tokenizer = Tokenizer(checkpoint, read_bert_config(checkpoint).max_position_embeddings)
    descriptions = describe_folder(folder, tokenizer)
    lines = list(report(descriptions, args.batch_size))
    if args.plot is not None:
        write_file("--plot", args.plot, content(draw(descriptions), args.plot.suffix.lower()[1:]))
        lines.append(f"picture: {args.plot}")
    print("\n".join(lines))
