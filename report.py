"""Reports on runs that have ended: `python evaluation.py RUN` on one, `python evaluation.py runs/*` on several.

The other modules find numbers; this one chooses what of them is shown, and how.
"""

import argparse
import io
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from comparison import LEVEL, NUM_RESAMPLES, Comparison, Difference, Setting, best_of, compare, settings_of
from console import duration
from document import Picture, Section, Table, to_csv, to_html, to_markdown, to_text
from error_analysis import Part, agreement, by_class, by_length, most_wrong, num_words
from finished_run import MEAN, DevRows, FinishedRun
from run_record import RunError
from tasks import TASKS

NUM_WRONG = 5  # rows listed of each task
NUM_PICTURED = 4  # settings with plots of a run on the page
LONGEST_TEXT = 300  # characters shown of a row


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
        f"training {duration(results['seconds']['training'])}, {_size(results['parameters']['total'])} parameters"
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
        blocks += ["Largest errors:" if certainty == "error" else "Wrong and surest of it:"]
        blocks += [Table(("row", "true", "predicted", certainty, "text"), cells)]
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
    names = _score_names(settings)
    columns = ("runs", "n", *settings[0].flags, *map(_score_title, names), "training", "parameters")
    rows = []
    for setting in settings:
        scores = [_scores_cell(setting, name) for name in names]
        size = _size(setting.runs[0].results["parameters"]["total"])
        start = [_runs_name(setting), str(len(setting.runs)), *setting.flags.values()]
        rows.append((*start, *scores, duration(_training_seconds(setting)), size))
    first = len(columns) - 2 - len(names)
    marked = {(row, first + i) for i, name in enumerate(names) for row in best_of(settings, name)}
    return Table(columns, tuple(rows), frozenset(marked))


def _score_names(settings: Sequence[Setting]) -> list[str]:
    return [*(task for task in TASKS if any(task in setting.tasks for setting in settings)), MEAN]


def _score_title(name: str) -> str:
    return name if name == MEAN else f"{name} {TASKS[name].output.selection_metric}"


def _runs_name(setting: Setting) -> str:
    names = [run.path.name for run in setting.runs]
    return ", ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} more"


def _training_seconds(setting: Setting) -> float:
    return float(np.mean([run.results["seconds"]["training"] for run in setting.runs]))


def _scores_cell(setting: Setting, name: str) -> str:
    if name not in (*setting.tasks, MEAN):
        return "-"
    values = setting.scores(name)
    return _number(values.mean()) + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")


def numbers_table(settings: Sequence[Setting]) -> Table:
    """The same for other programs: every number in a cell of its own, in full."""
    names = _score_names(settings)
    titles = [title + end for title in map(_score_title, names) for end in ("", " sd")]
    columns = ("runs", "seeds", "n", *settings[0].flags, *titles, "training_seconds", "parameters")
    rows = []
    for setting in settings:
        start = [" ".join(str(run.path) for run in setting.runs), " ".join(map(str, setting.seeds))]
        scores = [cell for name in names for cell in _full_numbers(setting, name)]
        end = [f"{_training_seconds(setting):.3f}", str(setting.runs[0].results["parameters"]["total"])]
        rows.append((*start, str(len(setting.runs)), *setting.flags.values(), *scores, *end))
    return Table(columns, tuple(rows))


def _full_numbers(setting: Setting, name: str) -> tuple[str, str]:
    """Mean and standard deviation over seeds; empty where there is none."""
    if name not in (*setting.tasks, MEAN):
        return "", ""
    values = setting.scores(name)
    return repr(float(values.mean())), repr(float(values.std(ddof=1))) if len(values) > 1 else ""


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
    rows = []
    for c in comparisons:
        tests = (*_interval(c.over_seeds), *_interval(c.over_rows))
        rows.append((_beside(c.best, c.other), c.name, f"{c.value:+.3f}", c.verdict, *tests))
    columns = ("setting", "score", "difference", "in words", "95% over seeds", "p", "95% over dev rows", "p")
    best = "; on other data ".join(dict.fromkeys(f"{_runs_name(c.best)} ({c.best.name})" for c in comparisons))
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


def _beside(best: Setting, other: Setting) -> str:
    """The flags in which a setting differs from the best, or else its runs."""
    flags = [f"{flag} {value}" for flag, value in other.flags.items() if value != best.flags[flag]]
    return ", ".join(flags) or _runs_name(other)


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
    from plots import draw_comparison, draw_curves, written_plots

    settings = settings_of(runs)
    pictures = [Picture("scores", _png(draw_comparison(settings)))]
    if any(record.get("dev") for run in runs for record in run.records()):
        pictures.append(Picture("dev scores over the last stage", _png(draw_curves(settings))))
    sections = [Section("Scores", tuple(pictures))]
    for setting in settings[:NUM_PICTURED]:
        own = tuple(Picture(path.stem, path.read_bytes()) for path in written_plots(setting.runs[0]))
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


def _size(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters / 1e3:.1f} k"


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
        if args.html is not None or not args.csv:
            sections = run_sections(runs[0], draw_plots(runs[0])) if len(runs) == 1 else comparison_sections(runs)
        if args.html is not None:
            write_page(args.html, runs, sections, problems)
        if args.csv:
            shown = to_csv(numbers_table(settings_of(runs)))
        else:
            shown = to_markdown(sections) if args.markdown else to_text(sections)
        print(shown, end="", flush=True)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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
