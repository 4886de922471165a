"""Reports on runs that have ended: `python evaluation.py RUN` on one, `python evaluation.py runs/*` on several.

The other modules find numbers; this one chooses what of them is shown, and how.
"""

import argparse
import csv
import itertools
import json
import math
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from console import duration, size
from messages import counted, machine_failure, printable
from remarks import GUESS, GUESS_IN_WORDS
from reports.command import Parser, check_new_file, run_command
from reports.comparison import (
    AND,
    FINETUNE,
    LEVEL,
    NOTHING,
    NUM_RESAMPLES,
    Difference,
    Setting,
    best_of,
    common_values,
    compare,
    in_vain,
    row_intervals,
    score_names,
    settings_of,
    titles,
)
from reports.document import NO_BREAK, Section, Table, to_html, to_text
from reports.error_analysis import by_class, by_length, most_wrong
from reports.finished_run import MEAN, FinishedRun
from reports.model_card import push
from reports.plots import Plot, draw_comparison, run_plots, write_plots
from run_record import FORMATS, RunError, run_of, write_atomically
from tasks import TASKS, Task

NUM_WRONG = 5  # rows listed of each task
LONGEST_TEXT = 300  # characters shown of a row
INTERVAL = "95% over dev rows"
GRADIENTS = {"cosine": "mean cosine", "conflict_rate": "share of steps in conflict", "removed": "share removed"}
CSV_SETTINGS = ("name", "option", "model", "data", "scheduler", "treatment", "seed", "epochs", "batch_size", "lr")


def run_sections(run: FinishedRun, files: Sequence[Path]) -> list[Section]:
    """Scores, what the treatment found, errors, and where everything is. files: the plots."""
    sections = [_scores_section(run)]
    if stages := run.results.get("gradients"):
        rows = [
            {"stage": stage, "tasks": name} | {title: of.get(kind, {}).get(name) for kind, title in GRADIENTS.items()}
            for stage, of in stages.items()
            for name in dict.fromkeys(itertools.chain(*of.values()))
        ]
        sections.append(Section(f"Task gradients under {run.config.get('treatment')}", [_table(rows)]))
    sections += [Section(f"{TASKS[name].title}: errors", _error_blocks(run, name)) for name in run.tasks]
    kept = (run.path / name for name in ("results.json", "metrics.jsonl", "predictions", "best"))
    paths = "\n".join(str(path) for path in [*files, *kept] if path.exists())
    return [*sections, Section("Files", [paths])]


def _scores_section(run: FinishedRun) -> Section:
    config, results, intervals = run.config, run.results, row_intervals([run])
    rows: list[dict[str, Any]] = []
    for task in (TASKS[name] for name in run.tasks):
        num_rows = config["data_files"].get(task.file_key("dev"), {}).get("rows")
        for name, value in results["dev"][task.name].items():
            rows.append({"task": task.title, "dev rows": num_rows, "metric": name, "value": value})
            if name == task.output.selection_metric:
                rows[-1] |= {INTERVAL: intervals.get(task.name), GUESS: run.guesses.get(task.name)}
    mean = {"value": results["dev"][MEAN], INTERVAL: intervals.get(MEAN), GUESS: _mean_guess(run)}
    rows.append({"task": MEAN, **mean})
    best = results.get("best_epoch")
    epochs = ", ".join(f"{stage} {epoch}" for stage, epoch in best.items()) if isinstance(best, dict) else best
    text = (
        f"{config['option']} of {_source(config)} on {config['data']}, seed {config['seed']}\n"
        f"training {duration(results['seconds']['training'])}, {size(results['parameters']['total'])} parameters"
        + (f", best epoch {epochs}" if best else "")
    )
    return Section(f"Run {run.path}", [text, _table(rows), "\n".join([f"({GUESS_IN_WORDS})", *_remarks(run)])])


def _source(config: Mapping[str, Any]) -> str:
    """What a run began with: checkpoints in place of the model that its flag names."""
    return config.get("checkpoint") or " ".join(config.get("checkpoints") or []) or str(config.get("model"))


def _remarks(run: FinishedRun) -> list[str]:
    with suppress(RunError):  # of a damaged log, which the plots tell of
        return run.remarks
    return []


def _mean_guess(run: FinishedRun) -> float | None:
    return float(np.mean(list(run.guesses.values()))) if len(run.guesses) == len(run.tasks) else None


def _error_blocks(run: FinishedRun, name: str) -> list[str | Table]:
    task, blocks = TASKS[name], list[str | Table]()
    is_scale = task.output.num_classes is None
    try:
        rows = run.dev_rows(name)
        blocks.append(_table(by_class(task, rows)))
        examples = run.dev_examples(name)
        if len(examples) != len(rows.ids):
            raise RunError(f"{run.path}: predictions of {len(rows.ids)} dev rows of {name}, expected {len(examples)}")
    except RunError as error:
        return [*blocks, f"{'Nothing by length, and no texts' if blocks else 'No error analysis'}: {error}"]
    blocks.append(_table(by_length(task, rows, examples)))
    wrong = [
        {
            "row": f"{task.file_name('dev')}:{examples[i].line}",
            "true": _answer(task, rows.labels[i]),
            "predicted": _answer(task, rows.predictions[i]),
            "error" if is_scale else "probability": certainty,
            "text": textwrap.shorten(" / ".join(examples[i].texts), LONGEST_TEXT, placeholder="…"),
        }
        for i, certainty in most_wrong(task, rows, NUM_WRONG)
    ]
    return [*blocks, "Largest errors:" if is_scale else "Wrong and surest of it:", _table(wrong)] if wrong else blocks


def _answer(task: Task, value: float) -> str:
    """A label or prediction as it is read: the class by its name, or the number on the scale."""
    return task.output.class_names[int(value)] if task.output.class_names else f"{value:.3g}"


def comparison_sections(runs: Sequence[FinishedRun], settings: Sequence[Setting]) -> list[Section]:
    """The settings side by side, what their names stand for, and tests of their differences from the best."""
    names, rows, key = score_names(settings), list[dict[str, Any]](), []
    common = common_values([s.flags for s in settings])
    all_data = dict.fromkeys(s.data for s in settings)
    for s, own_title in zip(settings, titles(settings), strict=True):
        rows.append({"setting": own_title, **{title: _scores_cell(s, name) for name, title in names.items()}})
        seconds = float(np.mean([run.results["seconds"]["training"] for run in s.runs]))
        is_full = s.runs[0].config.get("option") == FINETUNE  # of others, what does nothing there is not named
        others = {flag: value for flag, value in s.flags.items() if value != common.get(flag)}
        flags = ", ".join(f"{flag} {value}" for flag, value in others.items() if is_full or value != NOTHING) or NOTHING
        training = duration(seconds) if seconds else NOTHING  # none of a run that scores what others trained
        own = {"runs": ", ".join(r.path.name for r in s.runs), "training": training}
        key.append({"setting": s.name, **own, "parameters": size(s.runs[0].results["parameters"]["total"])})
        key[-1]["differs in"] = flags
    for data in all_data:
        on_data = [s for s in settings if s.data == data]
        of_mean = _mean_guess(on_data[0].runs[0]) if len({s.tasks for s in on_data}) == 1 else None
        guesses = {**on_data[0].runs[0].guesses, MEAN: of_mean}
        row = {"setting": f"{GUESS} ({data})" if len(all_data) > 1 else GUESS}
        rows.append({**row, **{title: guesses.get(name) for name, title in names.items()}})
    marked = {(row, 1 + i) for i, name in enumerate(names) for row in best_of(settings, name)}
    remarks = {
        "± is the sample standard deviation over the seeds.": any(len(s.runs) > 1 for s in settings),
        "What is marked is the best of its column.": bool(marked),
        f"{GUESS_IN_WORDS}.": True,
        f"{AND} N more: flags that a setting's name leaves out; those in which it differs stand below.": any(
            re.search(rf" {AND} \d+ more$", s.name) for s in settings
        ),
        "Runs on different data are listed apart and not compared.": len(all_data) > 1,
        "Means over different tasks are not compared.": len({s.tasks for s in settings}) > 1,
        "All runs have the same settings but for the seed: there are no settings to compare.": len(settings) == 1,
    }
    remarked: dict[str, list[str]] = {}
    for run in runs:
        for line in _remarks(run):
            remarked.setdefault(line.partition(" (")[0], []).append(run.path.name)
    notes = [f"{line}: {', '.join(of)}" for line, of in remarked.items()]
    text = "\n".join([*(text for text, is_so in remarks.items() if is_so), *notes])
    blocks = [_table(rows, marked), *filter(None, [text]), _table(key)]
    differences = _differences(settings)
    sections = [Section(f"{counted(len(runs), 'run')} of {counted(len(settings), 'setting')}", blocks)]
    return [*sections, Section("Differences from the best", differences)] if differences else sections


def _scores_cell(setting: Setting, name: str) -> str:
    if name not in (*setting.tasks, MEAN):
        return "-"
    values = setting.scores(name)
    return f"{values.mean():.3f}" + (f" ±{values.std(ddof=1):.3f}" if len(values) > 1 else "")


def _tested(difference: Difference) -> str:
    """Verdict, p and interval, which a narrow table sets below each other."""
    return ", ".join(part.replace(" ", NO_BREAK) for part in difference.parts) or "-"


def _differences(settings: Sequence[Setting]) -> list[str | Table]:
    comparisons, notes = compare(settings)
    if not comparisons:
        return []
    columns = ("setting", "score", "difference", "over seeds, 95% interval", "over dev rows, 95% interval")
    rows = [
        (c.other.name, c.name, f"{c.over_rows.value:+.3f}", _tested(c.over_seeds), _tested(c.over_rows))
        for c in comparisons
    ]
    best = "the best of those with the most tasks" if len({s.tasks for s in settings}) > 1 else "the best"
    text = (
        f"Each setting minus {best}, which is {'; on other data '.join({c.best.name: 0 for c in comparisons})}. Over "
        "seeds: t test, paired where both have the same seeds, else Welch's. Over dev rows: paired bootstrap, "
        f"{NUM_RESAMPLES:,} resamples of the rows, the same for all runs."
    )
    held = dict.fromkeys((id(c.best), id(c.other)) for c in comparisons)
    numbers = [1 + others for others in Counter(best for best, _ in held).values()]
    if max(numbers) > 3:
        text += (
            f"\nThe best of {' and of '.join(map(str, numbers))} settings tends to look better than it is and p is not "
            f"corrected for that: of {len(rows)} tests about {len(rows) * LEVEL:g} would call two equal settings "
            "different."
        )
    return [text, Table(columns, rows), *(["\n".join(notes)] if notes else [])]


def print_csv(runs: Sequence[FinishedRun]) -> None:
    """For other programs: a row a run, the same columns whatever the runs are, every number in full; metrics of tasks
    from task files come behind those of the others.

    The model is the checkpoint that a run began with, if it did. The last column holds all its settings as JSON. What
    a run does not have or use is empty.
    """
    metrics = {f"{task}_{metric}": (task, metric) for task in TASKS for metric in TASKS[task].output.metrics}
    ends = ("training_seconds", "peak_memory_mb", "parameters", "settings")
    columns = ("run", *CSV_SETTINGS, "tasks", *metrics, MEAN, *ends)
    writer = csv.DictWriter(sys.stdout, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for run in runs:
        results, dev = run.results, run.results["dev"]
        scores = {column: dev.get(task, {}).get(metric) for column, (task, metric) in metrics.items()}
        others = (results["seconds"]["training"], results.get("peak_memory_mb"), results["parameters"]["total"])
        names = {"run": str(run.path), "model": _source(run.config), "tasks": " ".join(run.tasks)}
        row = {**run.config, **dict.fromkeys(in_vain(run.config)), **names, **scores, MEAN: dev[MEAN]}
        row = {name: printable(of) if isinstance(of, str) else of for name, of in row.items()}
        writer.writerow(row | dict(zip(ends, [*others, json.dumps(run.config)], strict=True)))


def _table(rows: Sequence[Mapping[str, Any]], marked: Set[tuple[int, int]] = frozenset()) -> Table:
    """A table of rows with the entries of all of them, in the order in which they come."""
    columns = tuple(dict.fromkeys(column for row in rows for column in row))
    return Table(columns, [[_cell(row.get(column, "")) for column in columns] for row in rows], marked)


def _cell(value: Any) -> str:
    match value:
        case str():
            return value
        case int():
            return f"{value:,}"
        case (low, high):
            return f"{low:.3f} to {high:.3f}"
        case float() if math.isfinite(value):
            return f"{value:.3f}"
    return "-"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 0, or 2 where no run can be used or the page cannot be written."""
    text = "Report on a run that has ended: draw its plots, analyse its errors. On several: compare them."
    parser = Parser(prog="evaluation.py", description=text, allow_abbrev=False)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run directory")
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--csv", action="store_true", help="print a row a run only, as csv for other programs")
    formats.add_argument("--markdown", action="store_true", help="print as markdown")
    formats.add_argument("--html", metavar="FILE", type=Path, help="write a new page with tables and pictures too")
    endings = ", ".join(FORMATS)
    parser.add_argument("--plot", metavar="FILE", type=Path, help=f"draw several runs into a new file: {endings}")
    parser.add_argument("--format", choices=FORMATS, help="of a run's plots (default: png)")
    formats.add_argument("--push", metavar="NAME", help="put a run's best checkpoint with a model card on the hub")
    args = parser.parse_args(arguments)
    return run_command(lambda: report(args), RunError)


def report(args: argparse.Namespace) -> None:
    """Draws, writes the page where one is wanted, and prints."""
    if args.html is not None:
        check_new_file("--html", args.html, (".html", ".htm"))
    if args.plot is not None:
        if args.csv or args.push:
            raise RunError(f"--plot {args.plot}: {'--csv' if args.csv else '--push'} draws nothing, leave one out")
        check_new_file("--plot", args.plot, [f".{format}" for format in FORMATS])
    runs, problems = read_runs(args.runs)
    if args.plot is not None and len(runs) == 1:
        raise RunError(f"--plot {args.plot}: expected several runs; those of one are in {runs[0].path / 'plots'}")
    if args.format and (len(runs) > 1 or args.csv or args.push):
        raise RunError(
            f"--format {args.format}: for the plots of one run; several are drawn by --plot FILE.{args.format}"
        )
    if not runs:
        raise RunError("; ".join(problems))
    for problem in problems:
        print(f"left out: {printable(problem)}", file=sys.stderr)
    if args.csv:
        return print_csv(runs)
    if args.push is not None:
        if len(runs) > 1:
            raise RunError(f"--push {args.push}: {len(runs)} runs, expected one")
        return print(push(runs[0], args.push))
    settings, plots, files = settings_of(runs), list[Plot](), list[Path]()
    is_one = len(runs) == 1
    try:
        if is_one or args.html is not None or args.plot is not None:
            plots = list(run_plots(runs[0])) if is_one else [draw_comparison(settings)]
        if args.plot is not None:
            write_atomically(args.plot, plots[0].content(args.plot.suffix.lower()[1:]))
        if is_one:
            files = write_plots(plots, runs[0].path, args.format or FORMATS[0])
    except (OSError, RunError) as error:
        print(f"warning: no plots: {printable(machine_failure(error) or str(error))}", file=sys.stderr)
    sections = run_sections(runs[0], files) if is_one else comparison_sections(runs, settings)
    if args.html is not None:
        left_out = [Section("Left out", ["\n".join(problems)])] if problems else []
        title = f"Run {runs[0].path.name}" if is_one else f"Comparison of {len(runs)} runs"
        write_atomically(args.html, to_html(title, [*sections, Section("Plots", plots), *left_out]))
    print(to_text(sections, args.markdown), end="")


def read_runs(paths: Sequence[Path]) -> tuple[list[FinishedRun], list[str]]:
    """The runs that can be used, each once, and a line for each directory that cannot."""
    runs, problems = [], []
    for path in {path.resolve(): path for path in map(run_of, paths)}.values():
        try:
            runs.append(FinishedRun.read(path))
        except RunError as error:
            problems.append(str(error))
    return runs, problems
