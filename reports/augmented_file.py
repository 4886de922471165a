"""A training file and the rows that fill up its rarer classes, to look at: `python eda.py IN.csv OUT.csv`."""

import argparse
import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from datasets import DataError, read_content, read_examples
from eda import EdaConfig, Synonyms, edited_rows
from parameters import flags_of
from reports.command import Parser, ReportError, run_command
from tasks import TASKS
from tsv import numbered_rows


def augmented(path: Path, config: EdaConfig, seed: int, synonyms: Synonyms) -> tuple[str, list[str]]:
    """A file's content and the new rows, named after those that they were made of; and what to tell, in lines.

    Raises DataError for a file that cannot be used, ReportError for one that no task with classes has.
    """
    tasks = [task for task in TASKS.values() if task.output.num_classes is not None]
    content = read_content(path, tasks[0])
    _, header = next(numbered_rows(path, content, DataError), (1, []))
    names = [name.strip() for name in header]
    task = next((task for task in tasks if {task.label_column, *task.text_columns} <= {*names}), None)
    if task is None:
        expected = "; or ".join(", ".join(("id", *task.text_columns, task.label_column)) for task in tasks)
        raise ReportError(
            f"{path}:1: found the columns {', '.join(filter(None, names)) or 'none'}; expected {expected}"
        )
    file = read_examples(path, task, labelled=True)
    labels = [int(example.label) for example in file.examples]
    end, rows, added = "\r\n" if b"\r\n" in content else "\n", io.StringIO(), Counter[int]()
    writer = csv.DictWriter(rows, names, restval="", delimiter="\t")  # whose own line ends make it quote \r and \n
    new = edited_rows([example.texts for example in file.examples], labels, config, seed, synonyms)
    for number, (source, texts) in enumerate(new, 1):
        cells = {"id": f"{file.examples[source].id}-eda{number}", task.label_column: labels[source]}
        writer.writerow(cells | dict(zip(task.text_columns, texts, strict=True)))
        added[labels[source]] += 1
    text = content.decode("utf-8-sig")
    told = [f"class {x}: {count:,} rows + {added[x]:,} new" for x, count in sorted(Counter(labels).items())]
    told += [f"{len(labels):,} rows, {len(file.skipped):,} without a label, + {added.total():,} new, seed {seed}"]
    return text + ("" if text.endswith("\n") else end) + rows.getvalue().replace("\r\n", end), told


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 0, or 2 for an input that cannot be used."""
    text = "Append augmented rows to a CS224N training file, so that its classes are equal in number."
    parser = Parser(prog="eda.py", description=text, allow_abbrev=False)
    add, default = parser.add_argument, "(default: %(default)s)"
    add("source", metavar="IN.csv", type=Path, help="a training file of a task with classes")
    add("target", metavar="OUT.csv", type=Path, help="new file; an existing one is never replaced")
    for _, flag in flags_of(EdaConfig, "eda_"):
        shown = flag.help + ("" if "(default" in flag.help else f" {default}")
        add(f"--{flag.name}", metavar=flag.metavar or "X", type=type(flag.default), default=flag.default, help=shown)
    add("--seed", metavar="N", type=int, default=0, help=f"the same seed writes the same bytes {default}")
    args = parser.parse_args(arguments)
    return run_command(lambda: write(args), DataError)


def write(args: argparse.Namespace) -> None:
    """Writes the file and prints what is in it."""
    if args.target.exists():
        raise ReportError(f"{args.target}: exists already, expected the name of a new file")
    config = EdaConfig(**{name: getattr(args, flag.name) for name, flag in flags_of(EdaConfig, "eda_")})
    content, told = augmented(args.source, config, args.seed, config.synonyms())
    with args.target.open("x", encoding="utf-8", newline="") as file:
        file.write(content)
    print("\n".join(told))
