"""Reports on runs that have ended: `python evaluation.py RUN` on one, `python evaluation.py runs/*` on several.

The other modules find numbers; this one chooses what of them is shown, and how.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from console import duration
from reports.command import FORMATS, Parser, check_new_file, run_command, write_file
from reports.comparison import (
    LEVEL,
    NUM_RESAMPLES,
    Comparison,
    Difference,
    Setting,
    best_of,
    compare,
    row_intervals,
    settings_of,
)
from reports.document import Picture, Section, Table, to_csv, to_html, to_markdown, to_text
from reports.error_analysis import Part, agreement, by_class, by_length, most_wrong, num_words
from reports.finished_run import MEAN, FinishedRun
from run_record import RunError
from tasks import TASKS

NUM_WRONG = 5  # rows listed of each task
NUM_PICTURED = 4  # settings with plots of a run on the page
LONGEST_TEXT = 300  # characters shown of a row
CSV_SETTINGS = ("option", "model", "data", "scheduler", "treatment", "seed", "epochs", "batch_size", "lr")


# ------------------------------------------------------------------------------------------------------- one run


def run_sections(run: FinishedRun, plots: Sequence[Path]) -> list[Section]:
    """Scores, what the treatment found, errors, and where everything is."""
    errors = [_errors_section(run, task) for task in run.tasks]
    found = [_gradients_section(run)] if run.results.get("gradients") else []
    files = [*plots, run.path / "results.json", run.path / "metrics.jsonl", run.path / "predictions", run.path / "best"]
    paths = "\n".join(str(path) for path in files if path.exists())
    return [_scores_section(run), *found, *errors, Section("Plots and files", (paths,))]


def _scores_section(run: FinishedRun) -> Section:
    config, results = run.config, run.results
    intervals = row_intervals([run])
    rows = []
    for task in run.tasks:
        num_rows = config["data_files"].get(TASKS[task].file_name("dev"), {}).get("rows")
        for name, value in results["dev"][task].items():
            is_first = name == TASKS[task].output.selection_metric
            interval = _range(intervals.get(task)) if is_first else ""
            rows.append((TASKS[task].title, _number(num_rows, ","), name, _number(value), interval))
    rows.append(("mean", "", "", _number(results["dev"][MEAN]), _range(intervals.get(MEAN))))
    table = Table(("task", "dev rows", "metric", "value", "95% over dev rows"), tuple(rows))
    source = config.get("checkpoint") or config.get("model")
    best = results.get("best_epoch")
    epochs = ", ".join(f"{stage} {epoch}" for stage, epoch in best.items()) if isinstance(best, dict) else best
    text = (
        f"{config['option']} of {source} on {config['data']}, seed {config['seed']}\n"
        f"training {duration(results['seconds']['training'])}, {_size(results['parameters']['total'])} parameters"
        + (f", best epoch {epochs}" if best else "")
    )
    return Section(f"Run {run.path}", (text, table))


def _gradients_section(run: FinishedRun) -> Section:
    """Means over a stage of what its gradient treatment found."""
    blocks: list[Table] = []
    for found in run.results["gradients"].values():
        rates, removed = found.get("conflict_rate", {}), found.get("removed", {})
        pairs = tuple(
            (pair, _number(c), _number(rates.get(pair), ".1%")) for pair, c in found.get("cosine", {}).items()
        )
        blocks.append(Table(("tasks", "mean cosine", "steps in conflict"), pairs))
        blocks.append(
            Table(("task", "removed of its gradient"), tuple((t, _number(s, ".1%")) for t, s in removed.items()))
        )
    return Section(f"Task gradients under {run.config.get('treatment')}", tuple(b for b in blocks if b.rows))


def _errors_section(run: FinishedRun, name: str) -> Section:
    task = TASKS[name]
    title, is_scale = f"{task.title}: errors", task.output.num_classes is None
    try:
        rows = run.dev_rows(name)
    except RunError as error:
        return Section(title, (f"No error analysis: {error}",))
    blocks: list[str | Table] = [
        _parts_table(f"true {task.label_column}" if is_scale else "class", by_class(task, rows))
    ]
    try:
        examples = run.dev_examples(name)
        if len(examples) != len(rows.ids):
            raise RunError(f"{run.data_path(name)}: {len(examples)} rows, the run has predictions for {len(rows.ids)}")
    except RunError as error:
        return Section(title, (*blocks, f"Nothing by length, and no texts: {error}"))
    blocks.append(_parts_table("words", by_length(task, rows, num_words(examples))))
    cells = []
    for i, certainty in most_wrong(task, rows, NUM_WRONG):
        text = " / ".join(examples[i].texts)
        shown = text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"
        place = f"{run.data_path(name).name}:{examples[i].line}"
        cells.append((place, f"{rows.labels[i]:.3g}", f"{rows.predictions[i]:.3g}", _number(certainty), shown))
    if cells:
        blocks.append("Largest errors:" if is_scale else "Wrong and surest of it:")
        blocks.append(Table(("row", "true", "predicted", "error" if is_scale else "probability", "text"), tuple(cells)))
    return Section(title, tuple(blocks))


def _parts_table(what: str, parts: Sequence[Part]) -> Table:
    rows = ((part.name, _number(part.num_rows, ","), *map(_number, part.numbers.values())) for part in parts)
    return Table((what, "dev rows", *parts[0].numbers), tuple(rows))


# ------------------------------------------------------------------------------------------------- several runs


def settings_tables(settings: Sequence[Setting]) -> tuple[Table, Table]:
    """Of each setting scores with standard deviations over seeds, time, parameters; and what its name stands for."""
    names = [*(task for task in TASKS if any(task in setting.tasks for setting in settings)), MEAN]
    titles = [name if name == MEAN else f"{name} {TASKS[name].output.selection_metric}" for name in names]
    rows, key = [], []
    for s in settings:
        scores = [_scores_cell(s, name) for name in names]
        seconds = float(np.mean([run.results["seconds"]["training"] for run in s.runs]))
        size = _size(s.runs[0].results["parameters"]["total"])
        rows.append((s.name, *scores, str(len(s.runs)), duration(seconds), size))
        key.append(
            (
                s.name,
                ", ".join(run.path.name for run in s.runs),
                ", ".join(f"{flag} {value}" for flag, value in s.flags.items()) or "-",
            )
        )
    marked = frozenset((row, 1 + i) for i, name in enumerate(names) for row in best_of(settings, name))
    scores_table = Table(("setting", *titles, "n", "training", "parameters"), tuple(rows), marked)
    return scores_table, Table(("setting", "runs", "flags that differ"), tuple(key))


def _scores_cell(setting: Setting, name: str) -> str:
    if name not in (*setting.tasks, MEAN):
        return "-"
    values = setting.scores(name)
    return _number(values.mean()) + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")


def runs_table(runs: Sequence[FinishedRun]) -> Table:
    """For other programs: a row a run, the same columns whatever the runs are, every number in full.

    The last column holds all settings of the run as JSON. What a run does not have is empty.
    """
    metrics = [(task, m) for task in TASKS for m in _metrics(task)]
    columns = ("run", *CSV_SETTINGS, "tasks", *(f"{task}_{metric}" for task, metric in metrics), MEAN)
    rows = []
    for run in runs:
        config, results = run.config, run.results
        numbers = [results["dev"].get(task, {}).get(metric) for task, metric in metrics]
        ends = (results["seconds"]["training"], results.get("peak_memory_mb"), results["parameters"]["total"])
        cells = (
            *(config.get(name) for name in CSV_SETTINGS),
            " ".join(run.tasks),
            *numbers,
            results["dev"][MEAN],
            *ends,
        )
        shown = ("" if cell is None else str(cell) for cell in cells)
        rows.append((str(run.path), *shown, json.dumps(config)))
    return Table((*columns, "training_seconds", "peak_memory_mb", "parameters", "settings"), tuple(rows))


def _metrics(task: str) -> tuple[str, str]:
    return ("pearson", "spearman") if TASKS[task].output.num_classes is None else ("accuracy", "macro_f1")


def comparison_sections(runs: Sequence[FinishedRun]) -> list[Section]:
    """The settings side by side, tests of their differences from the best, and how far their predictions agree."""
    settings = settings_of(runs)
    comparisons, notes = compare(settings)
    scores, key = settings_tables(settings)
    remarks = {
        "± is the sample standard deviation over the n seeds.": any(len(s.runs) > 1 for s in settings),
        "* is the best of a column.": bool(scores.marked),
        "Runs on different data are listed apart and not compared.": len({s.data for s in settings}) > 1,
        "Means over different tasks are not compared.": len({s.tasks for s in settings}) > 1,
    }
    said = "\n".join(text for text, is_so in remarks.items() if is_so)
    blocks: list[str | Table] = [scores, *([said] if said else []), key]
    sections = [Section(f"{len(runs)} runs of {len(settings)} settings", tuple(blocks))]
    if comparisons:
        sections.append(Section("Differences from the best", _difference_blocks(comparisons, notes)))
    elif len(settings) == 1:
        text = "All runs have the same settings but for the seed: there are no settings to compare."
        sections.append(Section("Differences from the best", (text,)))
    pairs = [(c.best.runs[0], c.other.runs[0]) for c in comparisons]
    pairs = pairs or [(s.runs[0], s.runs[1]) for s in settings if len(s.runs) > 1]
    table = _agreement_table(list(dict.fromkeys(pairs)))
    return [*sections, *([Section("Agreement between two runs", (table,))] if table.rows else [])]


def _difference_blocks(comparisons: Sequence[Comparison], notes: Sequence[str]) -> tuple[str | Table, ...]:
    rows = []
    for c in comparisons:
        rows.append((c.other.name, c.name, f"{c.value:+.3f}", *_test(c.over_seeds), *_test(c.over_rows)))
    columns = ("setting", "score", "difference", "over seeds", "95%", "over dev rows", "95%")
    best = "; on other data ".join(dict.fromkeys(c.best.name for c in comparisons))
    seed_tests = ", ".join(dict.fromkeys(c.over_seeds.test for c in comparisons if c.over_seeds))
    num_others = len({id(c.other) for c in comparisons})
    lines = [
        f"Each setting minus the best, which is {best}. Over seeds: {seed_tests or 'one seed only, no test'}. "
        f"Over dev rows: paired bootstrap, {NUM_RESAMPLES:,} resamples of the rows, the same for all runs."
    ]
    if num_others > 2:
        lines.append(
            f"The best of {num_others + 1} settings tends to look better than it is, and p is not corrected for that: "
            f"of {len(rows)} tests about {len(rows) * LEVEL:.0f} would call two equal settings different."
        )
    return ("\n".join(lines), Table(columns, tuple(rows)), *(["\n".join(notes)] if notes else []))


def _agreement_table(pairs: Sequence[tuple[FinishedRun, FinishedRun]]) -> Table:
    rows = []
    for first, second in pairs:
        for task in (task for task in first.tasks if task in second.tasks):
            with suppress(RunError):  # the comparison has named it
                a, b = first.dev_rows(task), second.dev_rows(task)
                if a.ids == b.ids:
                    cells = [cell for name, value in agreement(task, a, b).items() for cell in (name, _number(value))]
                    rows.append((f"{first.path.name}, {second.path.name}", task, *cells))
    return Table(("runs", "task", "measure", "value", "measure", "value"), tuple(rows))


# ------------------------------------------------------------------------------------------------------- numbers


def _number(value: Any, form: str = ".3f") -> str:
    return format(value, form) if isinstance(value, int | float) and math.isfinite(value) else "-"


def _size(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters / 1e3:.1f} k"


def _range(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _test(test: Difference | None) -> tuple[str, str]:
    """Verdict with p, and the interval."""
    if test is None or math.isnan(test.p):
        return "-", "-"
    p = "p < 0.001" if test.p < 0.001 else f"p {test.p:.3f}"
    return f"{test.verdict}, {p}", f"{test.low:+.3f} to {test.high:+.3f}"


# ------------------------------------------------------------------------------------------------------ command


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog="evaluation.py",
        description="Report on a run that has ended: draw its plots, analyse its errors. On several: compare them.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run directory")
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--csv", action="store_true", help="print a row a run only, as csv for other programs")
    formats.add_argument("--markdown", action="store_true", help="print as markdown")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a new page with tables and pictures too")
    parser.add_argument("--format", choices=FORMATS, default="png", help="of a run's plots (default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 0, or 2 where no run can be used or the page cannot be written."""
    args = build_parser().parse_args(arguments)
    return run_command(lambda: report(args), RunError)


def report(args: argparse.Namespace) -> None:
    """Draws, writes the page where one is wanted, and prints."""
    if args.html is not None:
        check_new_file("--html", args.html, (".html", ".htm"))
    runs, problems = read_runs(args.runs)
    if not runs and len(problems) == 1:
        raise RunError(problems[0])
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    if not runs:
        raise RunError("no run to report on, expected at least one directory of a run that has ended")
    sections: list[Section] = []
    if args.html is not None or not args.csv:
        is_one = len(runs) == 1
        sections = run_sections(runs[0], draw_plots(runs[0], args.format)) if is_one else comparison_sections(runs)
    if args.html is not None:
        write_page(args.html, runs, sections, problems)
    print(to_csv(runs_table(runs)) if args.csv else (to_markdown if args.markdown else to_text)(sections), end="")


def read_runs(paths: Sequence[Path]) -> tuple[list[FinishedRun], list[str]]:
    """The runs that can be used, each once, and a line for each directory that cannot."""
    runs, problems = [], []
    for path in {path.resolve(): path for path in reversed(paths)}.values():
        try:
            runs.append(FinishedRun.read(path))
        except RunError as error:
            problems.append(str(error))
    return runs[::-1], problems[::-1]


def draw_plots(run: FinishedRun, format: str) -> list[Path]:
    """Draws the run's plots; where that cannot be done, says so."""
    from reports.plots import write_plots

    try:
        return write_plots(run, format)
    except (OSError, RunError) as error:
        print(f"warning: no plots: {error}", file=sys.stderr)
        return []


def write_page(path: Path, runs: Sequence[FinishedRun], sections: Sequence[Section], problems: Sequence[str]) -> None:
    """Writes a page of the sections and pictures: of one run its plots, of several also those of the best settings."""
    from reports.plots import Plot, comparison_plots, content, in_words, run_plots

    def section(title: str, plots: Iterable[Plot]) -> Section:
        return Section(title, tuple(Picture(p.caption, in_words(p.figure), content(p.figure, "png")) for p in plots))

    settings = settings_of(runs)
    pictures = [section("Plots of the settings", comparison_plots(settings))] if len(runs) > 1 else []
    for run in [setting.runs[0] for setting in settings[:NUM_PICTURED]]:
        try:
            pictures.append(section(f"Plots of {run.path.name}", run_plots(run)))
        except RunError as error:
            pictures.append(Section(f"Plots of {run.path.name}", (f"None: {error}",)))
    left_out = [Section("Left out", ("\n".join(problems),))] if problems else []
    title = f"Run {runs[0].path.name}" if len(runs) == 1 else f"Comparison of {len(runs)} runs"
    write_file("--html", path, to_html(title, [*sections, *pictures, *left_out]))
