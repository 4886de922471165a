"""What is in a data directory: `python datasets.py DIR [--plot FILE]`.

Rows, classes, token lengths, repeated rows, rows that stand in the training and the dev file both, and rows without a
label, with line numbers.

Shape letters: R rows of a file.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bert import CheckpointError
from checkpoints import EMBEDDED_MODEL, find_checkpoint, read_bert_config
from datasets import (
    DataError,
    DataFile,
    Tokenizer,
    data_folder,
    read_content,
    read_examples,
    tasks_in,
    text_hashes,
    tokenize,
)
from reports.command import Parser, check_new_file, run_command
from reports.document import filled
from reports.plots import Plot, panels, style
from run_record import FORMATS, write_atomically
from task_files import TaskFileError, add_task_file
from tasks import SPLITS, TASKS, Task

PERCENTILES = (50, 90, 98, 99)
NUM_NAMED = 10  # rows named one by one in a list
NUM_BANDS = 5  # of a scale in the picture
NUM_BINS = 40  # of token lengths in the picture, at most


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
    named = [(task, split) for task in TASKS.values() for split in SPLITS if task.file_name(split)]
    files = [(task.path(split, folder), task, split) for task, split in named]
    found = [describe_file(path, task, split, tokenizer) for path, task, split in files if path.exists()]
    if not found:
        raise DataError(f"{folder}: no data file, expected such as {', '.join(path.name for path, *_ in files[::3])}")
    return found


def same_texts(rows: Description, among: Description) -> list[tuple[int, int]]:
    """(row, first row with its texts among the others) for each row that has one, which within a file comes before."""
    first = {x: row for row, x in reversed(list(enumerate(among.hashes.tolist())))}
    pairs = [(row, first[x]) for row, x in enumerate(rows.hashes.tolist()) if x in first]
    return [(row, other) for row, other in pairs if rows is not among or row != other]


def report(descriptions: Sequence[Description]) -> Iterator[str]:
    """The description in lines."""
    for task in dict.fromkeys(d.task.name for d in descriptions):
        of_task = {d.split: d for d in descriptions if d.task.name == task}
        yield f"{task}  {TASKS[task].title}"
        for of in of_task.values():
            yield f"  {of.split:<6}{of.file.path.name:<26}{len(of.lengths):>8,} rows"
            yield from (filled(f"        {title:<10}{text}", 18) for title, text in _facts(of) if text)
        for split in (split for split in ("train", "dev") if split not in of_task):
            yield f"  {split:<6}{TASKS[task].file_name(split):<26} warning: not there, training needs it"
        if {"train", "dev"} <= of_task.keys():
            train, dev = of_task["train"], of_task["dev"]
            shared, lines = same_texts(dev, train), _lines(dev, train)
            found = f"warning: {len(shared)} of {len(dev.lengths)} dev rows stand in the training file too"
            yield f"  {found}; lines (dev = train) {lines}" if shared else "  no dev row stands in the training file"
        yield ""


def _facts(of: Description) -> Iterator[tuple[str, str]]:
    """What a line is about, and the line, empty where there is nothing to say."""
    labelled, num_classes = of.split != "test", of.task.output.num_classes
    if num_classes is None and labelled:
        low, high = of.labels.min(), of.labels.max()
        spread = f"mean {of.labels.mean():.2f}, standard deviation {of.labels.std():.2f}"
        yield "labels", f"from {low:g} to {high:g}, {spread}"
    elif labelled:
        counts = np.bincount(of.labels.astype(int), minlength=num_classes or 0)
        named = zip(of.task.output.class_names, counts, strict=True)
        yield "labels", ", ".join(f"{name} {count:,} ({count / len(of.labels):.1%})" for name, count in named)
    percentiles = ", ".join(f"{q}% {int(np.percentile(of.lengths, q))}" for q in PERCENTILES)
    cut = f"; {_rows(of.num_truncated)} longer than the model takes" if of.num_truncated else ""
    yield "tokens", f"{percentiles}, longest {of.lengths.max()}, mean {of.lengths.mean():.1f}{cut}"
    repeats = same_texts(of, of)
    differing = sum(of.labels[row] != of.labels[earlier] for row, earlier in repeats) if labelled else 0
    others = f", {differing} with another label" if differing else ""
    yield "repeated", f"{_rows(len(repeats))}{others}; lines {_lines(of, of)}" if repeats else ""
    empty = [str(row.line) for row in of.file.examples if not all(map(str.strip, row.texts))]
    yield "empty", f"{_rows(len(empty))} with a text of nothing but spaces; lines {_some(empty)}" if empty else ""
    by_id = Counter(row.id for row in of.file.examples)
    shared = [str(row.line) for row in of.file.examples if by_id[row.id] > 1]
    yield "ids", f"{_rows(len(shared))} with the id of another; lines {_some(shared)}" if shared else ""
    skipped = [f"{of.file.path.name}:{line}" for line in of.file.skipped]
    yield "skipped", f"{_rows(len(skipped))} without a label: {_some(skipped)}" if skipped else ""


def _rows(number: int) -> str:
    return f"{number:,} row" + "s" * (number != 1)


def _lines(rows: Description, among: Description) -> str:
    pairs = same_texts(rows, among)
    return _some([f"{rows.file.examples[i].line} = {among.file.examples[j].line}" for i, j in pairs])


def _some(items: Sequence[str]) -> str:
    more = len(items) - NUM_NAMED
    return ", ".join(items[:NUM_NAMED]) + (f" and {more} more" if more > 0 else "")


def draw(descriptions: Sequence[Description]) -> Plot:
    """Of each task the distribution of labels above, of token lengths below, in shares of the rows."""
    tasks = list(dict.fromkeys(d.task for d in descriptions))
    titles = [f"{task.title}: {what}" for what in ("labels", "tokens of a row") for task in tasks]
    figure, axes = panels(titles, "label, number of tokens", "share of the rows (%)", rows=2)
    for i, of in itertools.product(range(len(axes)), descriptions):
        above, split = i < len(tasks), of.split
        if of.task is not tasks[i % len(tasks)] or (above and split == "test"):
            continue
        longest = max(int(d.lengths.max()) for d in descriptions if d.task is of.task)
        classes, scale = of.task.output.num_classes or 0, of.task.output.scale
        labels = np.linspace(*scale, NUM_BANDS + 1) if scale else np.arange(classes + 1) - 0.5
        width = -(-(longest + 1) // NUM_BINS)  # whole, so that every bin holds as many lengths
        lengths = np.arange(0, longest + 1 + width, width) - 0.5
        edges, values = (labels, of.labels) if above else (lengths, of.lengths)
        look = {key: style(SPLITS.index(split))[key] for key in ("color", "linestyle", "linewidth")}
        shares = 100 * np.histogram(values, edges)[0] / len(values)
        axes[i].stairs(shares, edges, **look, label=f"{split}, {len(values):,} rows")
        axes[i].legend(fontsize=8, frameon=False)
        if above and classes:
            axes[i].set_xticks(range(classes))
    return Plot("data", "", figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 0, or 2 for an input that cannot be used."""
    parser = Parser(prog="datasets.py", description="Describe the data files of a directory.", allow_abbrev=False)
    parser.add_argument("folder", metavar="DIR", help="a directory with CS224N's files, or sample")
    formats = ", ".join(FORMATS)
    parser.add_argument("--plot", metavar="FILE", type=Path, help=f"draw labels and lengths into a new file: {formats}")
    parser.add_argument("--model", default=EMBEDDED_MODEL, help="whose tokenizer counts (default: %(default)s)")
    text = "tasks of your own, described too"
    parser.add_argument("--task_file", metavar="FILE", type=Path, nargs="+", action="extend", default=[], help=text)
    args = parser.parse_args(arguments)
    return run_command(lambda: describe(args), DataError, CheckpointError, TaskFileError)


def describe(args: argparse.Namespace) -> None:
    """Draws where that is wanted, and prints."""
    own = [name for path in args.task_file for name in add_task_file(path)]
    if args.plot is not None:
        check_new_file("--plot", args.plot, [f".{format}" for format in FORMATS])
    checkpoint = find_checkpoint(args.model)
    tokenizer = Tokenizer(checkpoint, read_bert_config(checkpoint).num_positions)
    folder = data_folder(args.folder, flag="")
    for task in (TASKS[name] for name in own if name not in tasks_in(args.folder)):
        read_content(task.path("train", folder), task)  # raises: there is none of its files
    descriptions = describe_folder(folder, tokenizer)
    lines = list(report(descriptions))
    if args.plot is not None:
        write_atomically(args.plot, draw(descriptions).content(args.plot.suffix.lower()[1:]))
        lines.append(f"picture: {args.plot}")
    print("\n".join(lines))
