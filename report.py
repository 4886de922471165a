"""Reports on runs that have ended: `python evaluation.py RUN` on one, `python evaluation.py runs/*` on several.

A report is a list of sections, which are printed as text or markdown, or become one HTML page with the pictures in it.
"""

import argparse
import base64
import csv
import html
import io
import math
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from comparison import Comparison, Difference, Setting, best_of, compare, settings_of
from console import duration
from error_analysis import Part, agreement, by_class, by_length, most_wrong, num_words
from finished_run import MEAN, DevRows, FinishedRun
from run_record import RunError
from tasks import TASKS

NUM_WRONG = 5  # rows listed of each task
NUM_PICTURED = 4  # settings with plots of a run on the page
WIDTH = 120  # columns of text
LONGEST_TEXT = 300  # characters shown of a row


# ---------------------------------------------------------------------------------------------------- a document


@dataclass(frozen=True)
class Table:
    """Cells as text. marked: (row, column) of cells that stand out. Texts to be read may stand in the last column."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True)
class Picture:
    """A PNG file's content. Shown on pages only."""

    name: str
    png: bytes


@dataclass(frozen=True)
class Section:
    """A title over paragraphs, tables and pictures."""

    title: str
    blocks: tuple[str | Table | Picture, ...]


def to_text(sections: Sequence[Section]) -> str:
    """For a terminal: columns aligned, marked cells with a star."""
    lines: list[str] = []
    for section in sections:
        lines += [section.title, "-" * len(section.title)]
        for block in section.blocks:
            if not isinstance(block, Picture):
                lines += [*(_table_lines(block) if isinstance(block, Table) else _wrapped(block)), ""]
    return "\n".join(lines).rstrip() + "\n"


def _wrapped(text: str) -> list[str]:
    return [part for line in text.split("\n") for part in textwrap.wrap(line, WIDTH) or [""]]


def _table_lines(table: Table) -> Iterator[str]:
    cells = [
        [_printable(cell) + ("*" if (i, j) in table.marked else "") for j, cell in enumerate(row)]
        for i, row in enumerate(table.rows)
    ]
    starred = {j for _, j in table.marked}
    cells = [[c if c.endswith("*") or j not in starred else c + " " for j, c in enumerate(row)] for row in cells]
    widths = [max(len(row[j]) for row in [list(table.columns), *cells]) for j in range(len(table.columns))]
    left = [not all(_is_number(row[j]) for row in cells) for j in range(len(widths))]
    indent = sum(widths[:-1]) + 2 * (len(widths) - 1)
    for row in [list(table.columns), *cells]:
        padded = [
            cell.ljust(w) if is_left else cell.rjust(w) for cell, w, is_left in zip(row, widths, left, strict=True)
        ]
        line = "  ".join(padded).rstrip()
        if len(line) > WIDTH and indent < WIDTH // 2 and left[-1]:
            start = "  ".join(padded[:-1]) + "  "
            yield from textwrap.wrap(row[-1], WIDTH, initial_indent=start, subsequent_indent=" " * indent)
        else:
            yield line


def _is_number(cell: str) -> bool:
    return not cell.strip(" -") or cell.strip().lstrip("<+-")[:1].isdigit()


def _printable(text: str) -> str:
    """The text without line ends and control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in text)


def to_markdown(sections: Sequence[Section]) -> str:
    """Tables as GitHub's markdown has them, marked cells bold."""
    lines: list[str] = []
    for section in sections:
        lines += [f"## {section.title}", ""]
        for block in section.blocks:
            if isinstance(block, Table):
                rows = [
                    [f"**{_escaped(c)}**" if (i, j) in block.marked else _escaped(c) for j, c in enumerate(row)]
                    for i, row in enumerate(block.rows)
                ]
                body = [list(block.columns), ["---"] * len(block.columns), *rows]
                lines += [*("| " + " | ".join(row) + " |" for row in body), ""]
            elif isinstance(block, str):
                lines += [*(line + "  " for line in block.split("\n")), ""]
    return "\n".join(lines).rstrip() + "\n"


def _escaped(cell: str) -> str:
    return "".join("\\" + c if c in "\\|*_`<>[]#" else c for c in _printable(cell))


def to_csv(table: Table) -> str:
    """One table as comma-separated values, nothing marked."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([table.columns, *table.rows])
    return file.getvalue()


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1200px; margin: 0 auto;
       padding: 0 16px 48px; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin: 2em 0 .6em; border-bottom: 1px solid #ccc; }
p { max-width: 75ch; overflow-wrap: anywhere; }
.box { overflow-x: auto; margin: 0 0 1.2em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93em; }
th, td { padding: .3em .7em; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
th { white-space: nowrap; border-bottom: 2px solid #888; }
td { white-space: nowrap; } td.text { white-space: normal; min-width: 16em; } .number { text-align: right; }
.marked { font-weight: 700; background: #e6f1f8; }
img { max-width: 100%; min-width: min(520px, 160vw); height: auto; }
figure { margin: 0 0 1em; } figcaption { font-size: .85em; color: #555; }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def to_html(title: str, sections: Sequence[Section]) -> str:
    """One page that needs nothing else: styles and pictures are in it. Wide tables scroll within their box."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [_html_block(block) for block in section.blocks]
    body = "\n".join(parts)
    return PAGE.format(title=html.escape(title), style=STYLE, body=body)


def _html_block(block: str | Table | Picture) -> str:
    if isinstance(block, str):
        return f"<p>{html.escape(block).replace(chr(10), '<br>')}</p>"
    if isinstance(block, Picture):
        name, data = html.escape(block.name, quote=True), base64.b64encode(block.png).decode()
        image = f'<img src="data:image/png;base64,{data}" alt="{name}">'
        return f'<figure class="box">{image}<figcaption>{name}</figcaption></figure>'
    numeric = {j for j in range(len(block.columns)) if all(_is_number(row[j]) for row in block.rows)}
    rows = ["".join(f"<th{_classes(j in numeric)}>{html.escape(c)}</th>" for j, c in enumerate(block.columns))]
    for i, row in enumerate(block.rows):
        rows.append(
            "".join(
                f"<td{_classes(j in numeric, (i, j) in block.marked, len(c) > 60)}>{html.escape(c)}</td>"
                for j, c in enumerate(row)
            )
        )
    return f'<div class="box"><table>{"".join(f"<tr>{row}</tr>" for row in rows)}</table></div>'


def _classes(is_number: bool, is_marked: bool = False, is_long: bool = False) -> str:
    names = [n for n, is_on in (("number", is_number), ("marked", is_marked), ("text", is_long)) if is_on]
    return f' class="{" ".join(names)}"' if names else ""


# ------------------------------------------------------------------------------------------------------- one run


def run_sections(run: FinishedRun, plots: Sequence[Path]) -> list[Section]:
    """Scores, what the treatment found, errors, and where everything is."""
    errors = [_errors_section(run, task) for task in run.tasks]
    found = [_gradients_section(run)] if run.results.get("gradients") else []
    pictures = tuple(Picture(path.stem, path.read_bytes()) for path in plots)
    files = [*plots, run.path / "results.json", run.path / "metrics.jsonl", run.path / "predictions", run.path / "best"]
    paths = "\n".join(str(path) for path in files if path.exists())
    return [_scores_section(run), *found, *errors, Section("Plots and files", (*pictures, paths))]


def _scores_section(run: FinishedRun) -> Section:
    config, results = run.config, run.results
    rows = []
    for task in run.tasks:
        num_rows = config["data_files"].get(TASKS[task].file_name("dev"), {}).get("rows")
        cells = [cell for name, value in results["dev"][task].items() for cell in (name, _number(value))]
        rows.append((TASKS[task].title, _count(num_rows), *cells))
    rows.append(("mean", "", "", _number(results["dev"][MEAN])))
    width = max(map(len, rows))
    columns = ("task", "dev rows", *("metric", "value") * ((width - 2) // 2))
    table = Table(columns, tuple((*row, *[""] * (width - len(row))) for row in rows))
    source = config.get("checkpoint") or config.get("model")
    best = results.get("best_epoch")
    text = (
        f"{config['option']} of {source} on {config['data']}, seed {config['seed']}\n"
        f"training {duration(results['seconds']['training'])}, {results['parameters']['total'] / 1e6:.1f} M parameters"
        + (f", best epoch {_epochs(best)}" if best else "")
    )
    return Section(f"Run {run.path}", (text, table))


def _epochs(best: Any) -> str:
    return ", ".join(f"{stage} {epoch}" for stage, epoch in best.items()) if isinstance(best, dict) else str(best)


def _gradients_section(run: FinishedRun) -> Section:
    """Means over a stage of what its gradient treatment found."""
    blocks: list[Table] = []
    for found in run.results["gradients"].values():
        rates, removed = found.get("conflict_rate", {}), found.get("removed", {})
        pairs = tuple((pair, _number(c), _percent(rates.get(pair))) for pair, c in found.get("cosine", {}).items())
        blocks.append(Table(("tasks", "mean cosine", "steps in conflict"), pairs))
        blocks.append(Table(("task", "removed of its gradient"), tuple((t, _percent(s)) for t, s in removed.items())))
    return Section(f"Task gradients under {run.config.get('treatment')}", tuple(b for b in blocks if b.rows))


def _errors_section(run: FinishedRun, name: str) -> Section:
    task = TASKS[name]
    title = f"{task.title}: errors"
    try:
        rows = run.dev_rows(name)
    except RunError as error:
        return Section(title, (f"No error analysis: {error}",))
    what = "class" if task.output.num_classes is not None else f"true {task.label_column}"
    blocks: list[str | Table] = [_parts_table(what, by_class(task, rows))]
    try:
        examples = run.dev_examples(name)
        if len(examples) != len(rows.ids):
            raise RunError(f"{run.data_path(name)}: {len(examples)} rows, the run has predictions for {len(rows.ids)}")
    except RunError as error:
        return Section(title, (*blocks, f"Nothing by length, and no texts: {error}"))
    blocks.append(_parts_table("words", by_length(task, rows, num_words(examples))))
    wrong = most_wrong(task, rows, NUM_WRONG)
    certainty = "error" if task.output.num_classes is None else "probability"
    cells = tuple(
        (
            f"{run.data_path(name).name}:{examples[w.row].line}",
            f"{w.label:.3g}",
            f"{w.prediction:.3g}",
            _number(w.confidence),
            _shortened(" / ".join(examples[w.row].texts)),
        )
        for w in wrong
    )
    if cells:
        blocks += ["Wrong and surest of it:", Table(("row", "true", "predicted", certainty, "text"), cells)]
    elif rows.probabilities is None and task.output.num_classes is not None:
        blocks.append(
            "The run left no probabilities, so its surest errors are not known; "
            f"--option test --checkpoint {run.path} makes a run that has them."
        )
    return Section(title, tuple(blocks))


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"


def _parts_table(what: str, parts: Sequence[Part]) -> Table:
    names = list(parts[0].numbers)
    rows = ((part.name, _count(part.num_rows), *(_number(part.numbers[n]) for n in names)) for part in parts)
    return Table((what, "dev rows", *names), tuple(rows))


# ------------------------------------------------------------------------------------------------- several runs


def settings_table(settings: Sequence[Setting]) -> Table:
    """A line for each setting: the flags that differ, scores with standard deviations over seeds, time, parameters."""
    tasks = [task for task in TASKS if any(task in setting.tasks for setting in settings)]
    names = [*tasks, MEAN]
    titles = [f"{task} {TASKS[task].output.selection_metric}" for task in tasks]
    flags = list(settings[0].flags)
    has_data = len({setting.data for setting in settings}) > 1
    columns = ("runs", "n", *(["data"] if has_data else []), *flags, *titles, MEAN, "training", "parameters")
    rows = []
    for setting in settings:
        cells = [_scores_cell(setting, name) for name in names]
        seconds = float(np.mean([run.results["seconds"]["training"] for run in setting.runs]))
        size = f"{setting.runs[0].results['parameters']['total'] / 1e6:.1f} M"
        own = [setting.data] if has_data else []
        shown = [setting.name, str(len(setting.runs)), *own, *setting.flags.values(), *cells, duration(seconds), size]
        rows.append(tuple(shown))
    first = len(columns) - 2 - len(names)
    marked = {(row, first + i) for i, name in enumerate(names) for row in best_of(settings, name)}
    return Table(columns, tuple(rows), frozenset(marked))


def _scores_cell(setting: Setting, name: str) -> str:
    if name not in (*setting.tasks, MEAN):
        return "-"
    values = setting.scores(name)
    return _number(values.mean()) + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")


def numbers_table(settings: Sequence[Setting]) -> Table:
    """The same for other programs: every number in a cell of its own, in full."""
    names = [*(task for task in TASKS if any(task in setting.tasks for setting in settings)), MEAN]
    titles = [f"{name} {part}" for name in names for part in (MEAN, "sd")]
    columns = ("runs", "seeds", "n", "data", *settings[0].flags, *titles, "training_seconds", "parameters")
    rows = []
    for setting in settings:
        cells: list[str] = []
        for name in names:
            values = setting.scores(name) if name in (*setting.tasks, MEAN) else np.array([])
            cells += [repr(float(values.mean())) if len(values) else ""]
            cells += [repr(float(values.std(ddof=1))) if len(values) > 1 else ""]
        seconds = float(np.mean([run.results["seconds"]["training"] for run in setting.runs]))
        size = str(setting.runs[0].results["parameters"]["total"])
        start = [" ".join(str(run.path) for run in setting.runs), " ".join(map(str, setting.seeds))]
        shown = [*start, str(len(setting.runs)), setting.data, *setting.flags.values(), *cells, f"{seconds:.3f}", size]
        rows.append(tuple(shown))
    return Table(columns, tuple(rows))


def comparison_sections(runs: Sequence[FinishedRun]) -> list[Section]:
    """The settings side by side, tests of their differences from the best, and how far their predictions agree."""
    settings = settings_of(runs)
    comparisons, notes = compare(settings)
    blocks: list[str | Table] = [settings_table(settings)]
    if len({setting.data for setting in settings}) > 1:
        blocks.append("Runs on different data are listed apart and not compared.")
    if len({setting.tasks for setting in settings}) > 1:
        blocks.append("Means over different tasks are not compared.")
    if any(len(setting.runs) > 1 for setting in settings):
        blocks.append("± is the sample standard deviation over the n seeds.")
    sections = [Section(f"{len(runs)} runs of {len(settings)} settings", tuple(blocks))]
    if comparisons:
        sections.append(Section("Differences from the best", _difference_blocks(comparisons, notes)))
    elif len(settings) == 1:
        text = "All runs have the same settings but for the seed: there are no settings to compare."
        sections.append(Section("Differences from the best", (text,)))
    pairs = [(c.best, c.other) for c in comparisons] or [(s, s) for s in settings if len(s.runs) > 1]
    table = _agreement_table(list(dict.fromkeys((_first_pair(*pair)) for pair in pairs)))
    return [*sections, *([Section("Agreement between two runs", (table,))] if table.rows else [])]


def _difference_blocks(comparisons: Sequence[Comparison], notes: Sequence[str]) -> tuple[str | Table, ...]:
    rows = tuple(
        (c.other.name, c.name, f"{c.value:+.3f}", *_interval(c.over_seeds), *_interval(c.over_rows), c.verdict)
        for c in comparisons
    )
    columns = ("setting", "score", "difference", "95% over seeds", "p", "95% over dev rows", "p", "in words")
    best = ", ".join(dict.fromkeys(f"{c.best.name} ({c.best.data})" for c in comparisons))
    tests = ", ".join(dict.fromkeys(c.over_seeds.test for c in comparisons if c.over_seeds))
    num_others = len({id(c.other) for c in comparisons})
    lines = [
        f"Each setting minus the best, which is {best}. Over seeds: {tests or 'one seed only, no test'}. "
        "Over dev rows: paired bootstrap, 2,000 resamples of the rows, the same for all runs."
    ]
    if num_others > 2:
        lines.append(
            f"The best of {num_others + 1} settings tends to look better than it is, and p is not corrected for that: "
            f"of {len(rows)} tests about {len(rows) * 0.05:.0f} would call two equal settings different."
        )
    return ("\n".join(lines), Table(columns, rows), *(["\n".join(notes)] if notes else []))


def _first_pair(first: Setting, second: Setting) -> tuple[FinishedRun, FinishedRun]:
    """A run of each with the same seed where there is one; of a single setting, its first two."""
    if first is second:
        return first.runs[0], first.runs[1]
    shared = [(a, b) for a in first.runs for b in second.runs if a.config["seed"] == b.config["seed"]]
    return shared[0] if shared else (first.runs[0], second.runs[0])


def _agreement_table(pairs: Sequence[tuple[FinishedRun, FinishedRun]]) -> Table:
    rows = []
    for first, second in pairs:
        for task in (task for task in first.tasks if task in second.tasks):
            both = [_rows_or_none(run, task) for run in (first, second)]
            a, b = both
            if a is not None and b is not None and a.ids == b.ids:
                cells = [cell for name, value in agreement(task, a, b).items() for cell in (name, _number(value))]
                rows.append((f"{first.path.name}, {second.path.name}", task, *cells))
    return Table(("runs", "task", "measure", "value", "measure", "value"), tuple(rows))


def _rows_or_none(run: FinishedRun, task: str) -> DevRows | None:
    try:
        return run.dev_rows(task)
    except RunError:
        return None  # the comparison has named it


def comparison_pictures(runs: Sequence[FinishedRun]) -> list[Section]:
    """Pictures of all settings, and the plots that the first run of each of the best settings has in its directory."""
    from plots import FOLDER, draw_comparison, draw_curves

    settings = settings_of(runs)
    pictures = [Picture("scores", _png(draw_comparison(settings)))]
    if any(record.get("dev") for run in runs for record in run.records()):
        pictures.append(Picture("dev scores over the last stage", _png(draw_curves(settings))))
    sections = [Section("Scores", tuple(pictures))]
    for setting in settings[:NUM_PICTURED]:
        files = sorted((setting.runs[0].path / FOLDER).glob("*.png"))
        own = tuple(Picture(path.stem, path.read_bytes()) for path in files)
        if own:
            sections.append(Section(f"Run {setting.runs[0].path.name}", own))
    return sections


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------- numbers


def _number(value: Any) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _interval(test: Difference | None) -> tuple[str, str]:
    """Interval and p of a difference."""
    if test is None or math.isnan(test.p):
        return "-", "-"
    return f"{test.low:+.3f} to {test.high:+.3f}", "<0.001" if test.p < 0.001 else f"{test.p:.3f}"


# ------------------------------------------------------------------------------------------------------ command


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help lists what is allowed)\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = _Parser(
        prog="evaluation.py",
        description="Report on a run that has ended: draw its plots, analyse its errors. On several: compare them.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run directory")
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--csv", action="store_true", help="print the table of settings only, as csv")
    formats.add_argument("--markdown", action="store_true", help="print as markdown")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page with tables and pictures too")
    return parser


def read_runs(paths: Sequence[Path]) -> tuple[list[FinishedRun], list[str]]:
    """The runs that can be used, each once, and a line for each directory that cannot."""
    runs, problems = [], []
    for path in {path.resolve(): path for path in reversed(paths)}.values():
        try:
            runs.append(FinishedRun.read(path))
        except RunError as error:
            problems.append(str(error))
    return runs[::-1], problems[::-1]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 0, or 2 where no run can be used or the page cannot be written."""
    args = build_parser().parse_args(arguments)
    try:
        if args.html is not None and args.html.suffix not in (".html", ".htm"):
            raise RunError(f"--html {args.html}: expected a file name that ends in .html")
        runs, problems = read_runs(args.runs)
        for problem in problems:
            print(f"left out: {problem}", file=sys.stderr)
        if not runs:
            raise RunError("no run to report on, expected at least one directory of a run that has ended")
        if args.csv:
            print(to_csv(numbers_table(settings_of(runs))), end="")
        if args.html is not None or not args.csv:
            sections = run_sections(runs[0], draw_plots(runs[0])) if len(runs) == 1 else comparison_sections(runs)
        if not args.csv:
            print(to_markdown(sections) if args.markdown else to_text(sections), end="")
        if args.html is not None:
            write_page(args.html, runs, sections, problems)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def draw_plots(run: FinishedRun) -> list[Path]:
    """Draws the run's plots; where its directory cannot be written to, says so."""
    from plots import write_plots

    try:
        return write_plots(run)
    except OSError as error:
        print(f"warning: no plots: {error}", file=sys.stderr)
        return []


def write_page(path: Path, runs: Sequence[FinishedRun], sections: Sequence[Section], problems: Sequence[str]) -> None:
    """Writes the page. Raises RunError where it cannot."""
    if len(runs) > 1:
        sections = [*sections, *comparison_pictures(runs)]
    left_out = [Section("Left out", ("\n".join(problems),))] if problems else []
    title = f"Run {runs[0].path.name}" if len(runs) == 1 else f"Comparison of {len(runs)} runs"
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_text(to_html(title, [*sections, *left_out]), "utf-8")
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise RunError(f"--html {path}: cannot be written ({error.strerror})") from None
