"""Pictures of a run, one small function each, on figures of their own: no window, no state shared with other code.

Colours are Okabe's and Ito's, told apart by the colour-blind; line styles and markers tell lines apart in grey print.

Shape letters: T tasks, C classes.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reports.comparison import Setting, row_intervals
from reports.finished_run import MEAN, FinishedRun
from run_record import DevRows, RunError, write_atomically
from tasks import TASKS, Task, is_degenerate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]
Intervals = Mapping[str, tuple[float, float]]  # by task

FOLDER = "plots"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))
MARKERS = "os^DvPX"
PANEL = (3.9, 3.1)  # inches
LOSS_WINDOW, COSINE_WINDOW = 0.02, 0.05  # of a stage's steps, in a moving mean
NUM_PALE = 600  # single values in a line: more make a wall of it
WIDE: dict[str, Any] = {"linewidth": 5, "alpha": 0.25}  # the line of an interval
NUM_CURVES = 7  # settings in one picture of curves


@dataclass(frozen=True)
class Plot:
    """A figure with the name of its file and what it shows."""

    name: str
    caption: str
    figure: Figure


def content(figure: Figure, format: str) -> bytes:
    """The figure as a file of this format: png, pdf or svg."""
    file = io.BytesIO()
    figure.savefig(file, format=format)
    return file.getvalue()


def _style(what: int | str) -> dict[str, Any]:
    """Colour, line and marker of a task or of a number."""
    number = list(TASKS).index(what) if isinstance(what, str) else what
    kinds = (("color", COLORS), ("linestyle", LINES), ("marker", MARKERS))
    return {name: of[number % len(of)] for name, of in kinds} | {"linewidth": 1.6, "markersize": 4.5}


def new_figure(width: float, height: float) -> Figure:
    """width, height: inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _panels(titles: Sequence[str], columns: int = 0, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each title, `columns` of them side by side, or all."""
    columns = min(columns or len(titles), len(titles))
    rows = -(-len(titles) // columns)
    # A single panel is wider: its title and legend need the room.
    figure = new_figure(PANEL[0] * columns if columns > 1 else 1.35 * PANEL[0], PANEL[1] * rows + 0.4)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat)
    for axis in axes[len(titles) :]:
        axis.remove()
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.grid(color="0.9", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes[: len(titles)]


def _legend_below(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels. What has the same label in several panels is the same; within one it is not."""
    entries: list[tuple[str, Any]] = []
    for axis in axes:
        known = {label for label, _ in entries}
        handles, labels = axis.get_legend_handles_labels()
        entries += [(label, of) for label, of in zip(labels, handles, strict=True) if label not in known]
    entries.sort(key=lambda entry: (entry[0].startswith("best"), entry[0].endswith("majority class")))
    longest = max((len(line) for label, _ in entries for line in label.split("\n")), default=1)
    columns = min(len(entries), max(1, int(figure.get_figwidth() * 14 / (longest + 7))))
    shown: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "fontsize": 8, "frameon": False}
    figure.legend([of for _, of in entries], [label for label, _ in entries], **shown)


def by_stage(records: Records, key: str) -> dict[str, list[Mapping[str, Any]]]:
    """The records that hold a key, by stage."""
    result: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if record.get(key) is not None:
            result.setdefault(record["stage"], []).append(record)
    return result


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the finite values among the `window` values around each place, NaN where there are none.

    An even window takes one value more. Towards the ends the window is cut off.
    """
    half, finite = window // 2, np.isfinite(values)
    first, last = (np.clip(np.arange(len(values)) + by, 0, len(values)) for by in (-half, half + 1))
    totals, counts = (np.append(0.0, np.cumsum(of)) for of in (np.where(finite, values, 0.0), finite))
    total, count = totals[last] - totals[first], counts[last] - counts[first]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _series(records: Records, *keys: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of an entry of the records that have it, null as NaN."""
    steps, values = [], []
    for record in records:
        value: Any = record
        for key in keys:
            value = value.get(key, ...) if isinstance(value, Mapping) else ...
        if value is None or isinstance(value, int | float):
            steps.append(record["step"])
            values.append(np.nan if value is None else value)
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def _names(records: Records, key: str) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record.get(key) or ()))


def _tasks(records: Records, key: str) -> list[str]:
    return [task for task in TASKS if task in _names(records, key)]


def _draw_smoothed(axis: Axes, series: tuple[np.ndarray, np.ndarray], share: float, style: Any, label: str) -> None:
    """A strong line of the moving mean over a share of the values, and single values as a pale one."""
    steps, values = series
    window = max(1, round(share * len(values)))
    if window > 1:
        some = slice(None, None, -(-len(values) // NUM_PALE))
        axis.plot(steps[some], values[some], color=style["color"], linewidth=0.5, alpha=0.2, zorder=1)
    axis.plot(steps, moving_mean(values, window), **style, label=label, zorder=2)


# ------------------------------------------------------------------------------------------------ over the steps


def draw_dev_scores(records: Records, majority: Mapping[str, float], intervals: Intervals) -> Figure:
    """The metric that counts of each task and their mean over the steps of each stage, the best mean marked.

    majority: accuracy by task of always predicting the largest class. intervals: by task, of the final score.
    """
    stages = by_stage(records, "dev")
    last_stage = {task: stage for stage, of in stages.items() for task in _tasks(of, "dev")}
    figure, axes = _panels(list(stages), sharey=True)
    for axis, (stage, of_stage) in zip(axes, stages.items(), strict=True):
        steps, means = _series(of_stage, "dev", MEAN)
        best = int(np.nanargmax(means)) if np.isfinite(means).any() else None
        for task in (tasks := _tasks(of_stage, "dev")):
            metric, style = TASKS[task].output.selection_metric, _style(task)
            axis.plot(*_series(of_stage, "dev", task, metric), **style, label=f"{task} {metric}")
            if task in majority:
                label = f"{task} majority class"
                axis.axhline(majority[task], linewidth=1.2, linestyle=(0, (1, 2)), color=style["color"], label=label)
            if best is not None and task in intervals and last_stage[task] == stage:
                axis.vlines(steps[best], *intervals[task], **WIDE, color=style["color"])
        if len(tasks) > 1:
            axis.plot(steps, means, color="black", linestyle=":", linewidth=1.8, label="mean")
        if best is not None:
            label = "best mean" if len(tasks) > 1 else "best"
            axis.plot(steps[best], means[best], "*", color="black", markersize=11, label=label, zorder=3)
        axis.set_xlabel("optimizer step")
        axis.set_xlim(left=0)
        axis.margins(y=0.08)
    axes[0].set_ylabel("score on the dev file")
    _legend_below(figure, axes)
    return figure


def draw_losses(records: Records) -> Figure:
    """The training loss of each task in each stage, lightly smoothed."""
    stages = by_stage(records, "losses")
    pairs = [(stage, task) for stage, of in stages.items() for task in _tasks(of, "losses")]
    figure, axes = _panels([f"{stage}: {task}" for stage, task in pairs], len({task for _, task in pairs}))
    for axis, (stage, task) in zip(axes, pairs, strict=True):
        style = _style(task) | {"linestyle": "-", "marker": ""}
        _draw_smoothed(axis, _series(stages[stage], "losses", task), LOSS_WINDOW, style, task)
        is_scale = TASKS[task].output.num_classes is None
        axis.set_ylabel("training loss (squared error)" if is_scale else "training loss (nats)", fontsize=9)
        # The strong line fills the axis; the noise around it may run out of it.
        values = np.asarray(axis.lines[-1].get_ydata(), dtype=float)
        if np.isfinite(values).any():
            low, high = float(np.nanmin(values)), float(np.nanmax(values))
            margin = 0.25 * (high - low) or 0.1 * abs(high) or 0.1
            axis.set_ylim(max(0.0, low - margin) if low >= 0 else low - margin, high + margin)
    figure.supxlabel(
        f"optimizer step (pale: single steps; line: moving mean over {LOSS_WINDOW:.0%} of the steps)", fontsize=9
    )
    return figure


def draw_learning_rate(records: Records) -> Figure:
    """The learning rate over the steps of each stage."""
    stages = by_stage(records, "lr")
    figure, axes = _panels(list(stages))
    for axis, of_stage in zip(axes, stages.values(), strict=True):
        axis.plot(*_series(of_stage, "lr"), color=COLORS[0])
        axis.set_xlabel("optimizer step")
        axis.set_ylim(bottom=0)
        axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axis.set_ylabel("learning rate")
    return figure


def draw_shares(records: Records) -> Figure:
    """Each task's share of the draws of an epoch, in the stages that train several tasks."""
    from matplotlib.ticker import MaxNLocator

    stages = _shared_stages(records)
    figure, axes = _panels(list(stages), sharey=True)
    for axis, of_stage in zip(axes, stages.values(), strict=True):
        epochs = sorted({record["epoch"] for record in of_stage})
        tasks = _tasks(of_stage, "draws")
        drawn = np.zeros((len(tasks), len(epochs)))
        for record in of_stage:
            drawn[:, epochs.index(record["epoch"])] += [record["draws"].get(task, 0) for task in tasks]
        for task, shares in zip(tasks, 100 * drawn / np.maximum(drawn.sum(0), 1), strict=True):
            axis.plot(epochs, shares, **_style(task), label=task)
        axis.set_xlabel("epoch")
        axis.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("share of the draws (%)")
    _legend_below(figure, axes)
    return figure


def _shared_stages(records: Records) -> dict[str, list[Mapping[str, Any]]]:
    return {stage: of for stage, of in by_stage(records, "draws").items() if len(_tasks(of, "draws")) > 1}


def draw_cosines(records: Records) -> Figure:
    """Cosines between the tasks' gradients: their means and the share of steps in conflict, and how they move."""
    from matplotlib.ticker import MaxNLocator

    cosines = {pair: _series(records, "cosines", pair) for pair in _names(records, "cosines")}
    figure, (left, right) = _panels(["mean cosine, and share of steps below 0", "cosine between task gradients"])
    figure.set_size_inches(2.4 * PANEL[0], PANEL[1] + 0.6)
    spread, texts = 0.05, []
    for number, (pair, series) in enumerate(cosines.items()):
        # The tasks have the first colours; pairs of tasks are something else and have others.
        style = _style(number + 3) | {"linestyle": "-", "markevery": max(1, len(series[0]) // 8)}
        _draw_smoothed(right, series, COSINE_WINDOW, style, pair)
        spread = np.nanmax([spread, *np.abs(np.asarray(right.lines[-1].get_ydata(), dtype=float))])
        finite = series[1][np.isfinite(series[1])]
        left.barh(number, finite.mean() if len(finite) else 0, color=style["color"], alpha=0.6, height=0.6)
        found = f"{finite.mean():.3f}, {np.mean(finite < 0):.0%} below 0" if len(finite) else "undefined"
        texts.append(f"{pair}\n{found}")
    left.set_yticks(range(len(cosines)), texts)
    left.xaxis.set_major_locator(MaxNLocator(4))
    left.set_xlabel("mean cosine over the steps", fontsize=9)
    left.set_ylabel("pair of tasks")
    for line in (left.axvline, right.axhline):
        line(0, color="0.4", linewidth=0.8)
    right.set_ylim(-1.4 * spread, 1.4 * spread)
    right.set_xlabel(f"optimizer step\n(pale: single steps; line: moving mean over {COSINE_WINDOW:.0%})", fontsize=9)
    right.set_ylabel("cosine")
    right.legend(fontsize=8, loc="upper center", ncols=3)
    return figure


# --------------------------------------------------------------------------------------------- at the end of a run


def draw_confusion(matrices: Mapping[str, np.ndarray]) -> Figure:
    """Confusion matrices, (C, C) counts each: rows are true classes and coloured by their shares."""
    figure, axes = _panels([TASKS[task].title for task in matrices])
    figure.set_figheight(PANEL[1] + 0.7)
    for axis, counts in zip(axes, matrices.values(), strict=True):
        shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
        image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        for (i, j), count in np.ndenumerate(counts):
            color = "white" if shares[i, j] > 62 else "black"
            axis.text(j, i, f"{count}\n{shares[i, j]:.0f}%", ha="center", va="center", fontsize=7, color=color)
        axis.grid(False)
        axis.set_xticks(range(len(counts)))
        axis.set_yticks(range(len(counts)))
        axis.set_xlabel("predicted class")
        axis.set_ylabel("true class")
    bar = figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class's dev rows (%)")
    bar.ax.tick_params(labelsize=8)
    return figure


def draw_scale(task: Task, rows: DevRows) -> Figure:
    """Predictions against labels on a scale, with the line where they are equal."""
    r = task.output.scores(rows.predictions, rows.labels)["pearson"]
    shown = "undefined" if is_degenerate(rows.predictions) or is_degenerate(rows.labels) else f"{r:.3f}"
    figure, (axis,) = _panels([f"{task.title}: Pearson r = {shown}, {len(rows.labels):,} dev rows"])
    figure.set_size_inches(4.6, 4.6)
    values = np.concatenate([rows.labels, rows.predictions])
    margin = 0.04 * float(np.ptp(values)) or 0.5
    limits = (float(values.min()) - margin, float(values.max()) + margin)
    axis.plot(limits, limits, color="black", linestyle="--", linewidth=1, label="predicted = true")
    axis.scatter(rows.labels, rows.predictions, s=12, color=COLORS[0], alpha=0.4, linewidths=0)
    axis.set(xlim=limits, ylim=limits, aspect="equal")
    axis.set_xlabel(f"true {task.label_column} (points)")
    axis.set_ylabel(f"predicted {task.label_column} (points)")
    axis.legend(fontsize=8, frameon=False, loc="upper left")
    return figure


# ------------------------------------------------------------------------------------------------- several runs


def draw_comparison(settings: Sequence[Setting]) -> Figure:
    """Scores of each setting: mean and standard deviation over its seeds, each seed, and the interval over dev rows."""
    from matplotlib.ticker import MaxNLocator

    names = [*(task for task in TASKS if any(task in s.tasks for s in settings)), MEAN]
    labels = [textwrap.fill(setting.name, 36) for setting in settings]
    intervals = [row_intervals(setting.runs) for setting in settings]
    num_lines = sum(1 + text.count("\n") for text in labels)
    figure = new_figure(2.1 * len(names) + 2.6, 0.14 * num_lines + 0.25 * len(settings) + 1.2)
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        axis.set_title(name if name == MEAN else f"{name} {TASKS[name].output.selection_metric}", fontsize=10)
        axis.grid(axis="x", color="0.9", linewidth=0.6)
        axis.tick_params(labelsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(3))
        axis.set_xlabel("score on the dev file", fontsize=8)
        axis.margins(x=0.12)
        color = "black" if name == MEAN else _style(name)["color"]
        for place, setting in enumerate(settings):
            if name not in (*setting.tasks, MEAN):
                continue
            values = setting.scores(name)
            if name in intervals[place]:
                axis.hlines(place, *intervals[place][name], **WIDE, color=color)
            if len(values) > 1:
                axis.scatter(values, np.full(len(values), place + 0.25), s=8, color="0.5", linewidths=0)
            spread = float(values.std(ddof=1)) if len(values) > 1 else None
            axis.errorbar(values.mean(), place, xerr=spread, fmt="o", color=color, markersize=5, capsize=3)
    axes[0].set_yticks(range(len(settings)), labels)
    axes[0].set_ylim(len(settings) - 0.5, -0.5)
    return figure


def draw_curves(settings: Sequence[Setting]) -> Figure:
    """The mean dev score over the steps of the last stage of the first settings, averaged over their seeds."""
    figure, (axis,) = _panels(["mean dev score over the last stage"])
    figure.set_size_inches(6.4, 4.2)
    for number, setting in enumerate(settings[:NUM_CURVES]):
        curves = [curve for run in setting.runs if (curve := _last_curve(run.records()))]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        means = [np.mean([curve[step] for curve in curves]) for step in steps]
        if steps:
            axis.plot(steps, means, **_style(number), label=textwrap.fill(setting.name, 60))
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("mean score on the dev files")
    _legend_below(figure, [axis])
    return figure


def _last_curve(records: Records) -> dict[float, float]:
    """Mean dev score by step, of the last stage that was evaluated."""
    stages = list(by_stage(records, "dev").values())
    points = zip(*_series(stages[-1], "dev", MEAN), strict=True) if stages else ()
    return {step: value for step, value in points if np.isfinite(value)}


# ---------------------------------------------------------------------------------------------------- all plots


def in_words(figure: Figure) -> str:
    """What can be read from a figure: of each panel its title, and where its named lines begin and end."""
    panels = []
    for axis in figure.axes:
        found = [axis.get_title()]
        for line in axis.lines:
            values = [float(y) for y in np.asarray(line.get_ydata(), dtype=float) if np.isfinite(y)]
            if values and not str(line.get_label()).startswith("_"):
                moves = f"from {values[0]:.3g} to {values[-1]:.3g}" if len(set(values)) > 1 else f"{values[0]:.3g}"
                found.append(f"{line.get_label()} {moves}")
        found += [text for tick in axis.get_yticklabels() if any(map(str.isalpha, text := tick.get_text()))]
        panels.append(", ".join(filter(None, found)).replace("\n", " "))
    return "; ".join(filter(None, panels))


def comparison_plots(settings: Sequence[Setting]) -> Iterator[Plot]:
    """The pictures of several settings."""
    yield Plot(
        "scores",
        "Scores on the dev files. Dot, whiskers: mean and standard deviation over the seeds, which are the grey dots; "
        "wide bar: 95% bootstrap interval over the dev rows.",
        draw_comparison(settings),
    )
    if any(record.get("dev") for setting in settings for run in setting.runs for record in run.records()):
        number = min(NUM_CURVES, len(settings))
        caption = f"Mean dev score over the last stage and over the seeds, {number} of {len(settings)} settings."
        yield Plot("curves", caption, draw_curves(settings))


def run_plots(run: FinishedRun) -> Iterator[Plot]:
    """Every picture of the run that there is something to draw for. Raises RunError for a damaged log."""
    records = run.records()
    confusion = {task: np.array(of) for task, of in (run.results.get("confusion") or {}).items() if task in run.tasks}
    if by_stage(records, "dev"):
        majority = {task: of.sum(1).max() / of.sum() for task, of in confusion.items() if of.sum()}
        yield Plot(
            "dev-scores",
            "Scores on the dev files over the steps of each stage. Star: the best mean; wide bar: 95% bootstrap "
            "interval of the final score over the dev rows; dotted: always predicting the largest class.",
            draw_dev_scores(records, majority, row_intervals([run])),
        )
    if by_stage(records, "losses"):
        caption = "Training loss of each task and stage: single steps pale, their moving mean strong."
        yield Plot("losses", caption, draw_losses(records))
    if by_stage(records, "lr"):
        yield Plot(
            "learning-rate", "Learning rate over the optimizer steps of each stage.", draw_learning_rate(records)
        )
    if _names(records, "cosines"):
        caption = (
            "Cosines between the tasks' gradients: their means with the share of steps below 0, and over the steps."
        )
        yield Plot("gradient-cosines", caption, draw_cosines(records))
    if _shared_stages(records):
        yield Plot("task-shares", "Each task's share of the draws of an epoch.", draw_shares(records))
    if confusion:
        caption = "Confusion matrices: dev rows by true and predicted class, coloured by their share of the true class."
        yield Plot("confusion", caption, draw_confusion(confusion))
    for task in (TASKS[name] for name in run.tasks if TASKS[name].output.num_classes is None):
        with suppress(RunError):  # the report of the run says why there are no rows
            rows = run.dev_rows(task.name)
            caption = f"Predicted over true {task.label_column} of the dev rows; the line is where they are equal."
            yield Plot(f"{task.label_column}-{task.name}", caption, draw_scale(task, rows))


def write_plots(run: FinishedRun, format: str = "png") -> list[Path]:
    """Draws the run anew into its folder of plots; returns the files."""
    folder = run.path / FOLDER
    folder.mkdir(exist_ok=True)
    paths = []
    for plot in run_plots(run):
        paths.append(folder / f"{plot.name}.{format}")
        write_atomically(paths[-1], content(plot.figure, format))
    return paths


def write_run_plots(path: Path) -> None:
    """Draws a run directory."""
    write_plots(FinishedRun.read(path))
