"""Pictures of a run, one small function each, on figures of their own: no window, no state shared with other code.

Colours are Okabe's and Ito's, told apart by the colour-blind; line styles and markers tell lines apart in grey print.

Shape letters: T tasks, C classes.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from comparison import Setting
from finished_run import MEAN, DevRows, FinishedRun
from run_record import RunError
from tasks import TASKS, Task, is_degenerate, scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]

FOLDER = "plots"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))
MARKERS = "os^DvPX"
PANEL = (3.9, 3.1)  # inches
DPI = 150
LOSS_WINDOW, COSINE_WINDOW = 0.02, 0.05  # of a stage's steps, in a moving mean
NUM_PALE = 600  # single values in a line: more make a wall of it
NUM_CURVES = 7  # settings in one picture of curves


def _style(number: int) -> dict[str, Any]:
    return {"color": COLORS[number % len(COLORS)], "linestyle": LINES[number % len(LINES)], "linewidth": 1.6}


def _marker(number: int) -> dict[str, Any]:
    return {"marker": MARKERS[number % len(MARKERS)], "markersize": 4.5}


def _task_number(task: str) -> int:
    return list(TASKS).index(task)


def _new_figure(width: float, height: float) -> Figure:
    """width, height: inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _panels(titles: Sequence[str], columns: int = 0, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each title, `columns` of them side by side, or all."""
    columns = min(columns or len(titles), len(titles))
    rows = -(-len(titles) // columns)
    # A single panel is wider: its title and legend need the room.
    width = PANEL[0] * columns if columns > 1 else 1.35 * PANEL[0]
    figure = _new_figure(width, PANEL[1] * rows + 0.4)
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
    """One legend for all panels, each label once."""
    entries: dict[str, Any] = {}
    for axis in axes:
        entries.update({label: line for line, label in zip(*axis.get_legend_handles_labels(), strict=True)})
    entries = dict(sorted(entries.items(), key=lambda entry: entry[0].startswith("best")))
    per_row = max(1, int(figure.get_figwidth() * 14 / (max(map(len, entries), default=1) + 7)))
    columns = min(len(entries), per_row)
    figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )


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
    half, places = window // 2, np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    finite = np.isfinite(values)
    totals = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    total, count = totals[last] - totals[first], counts[last] - counts[first]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _numbers(records: Records, key: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of an entry of the records that have it, null as NaN."""
    pairs = [(r["step"], r[key][name]) for r in records if isinstance(r.get(key), Mapping) and name in r[key]]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(steps, dtype=float), np.array([np.nan if v is None else v for v in values], dtype=float)


def _names(records: Records, key: str) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record[key]))


def _tasks(records: Records, key: str) -> list[str]:
    return sorted(_names(records, key), key=_task_number)


def _draw_smoothed(
    axis: Axes, steps: np.ndarray, values: np.ndarray, share: float, style: Mapping[str, Any], label: str
) -> None:
    """A strong line of the moving mean over a share of the values, and single values as a pale one."""
    window = max(1, round(share * len(values)))
    if window > 1:
        some = slice(None, None, -(-len(values) // NUM_PALE))
        axis.plot(steps[some], values[some], color=style["color"], linewidth=0.5, alpha=0.2, zorder=1)
    axis.plot(steps, moving_mean(values, window), **style, label=label, zorder=2)


# ------------------------------------------------------------------------------------------------ over the steps


def draw_dev_scores(records: Records) -> Figure:
    """The metric that counts of each task and their mean over the steps of each stage, the best mean marked."""
    stages = by_stage(records, "dev")
    figure, axes = _panels(list(stages), sharey=True)
    for axis, of_stage in zip(axes, stages.values(), strict=True):
        tasks = [task for task in TASKS if task in of_stage[0]["dev"]]
        for task in tasks:
            metric = TASKS[task].output.selection_metric
            scores = [{"dev": {metric: r["dev"][task][metric]}, "step": r["step"]} for r in of_stage]
            number = _task_number(task)
            axis.plot(*_numbers(scores, "dev", metric), **_style(number), **_marker(number), label=f"{task} {metric}")
        steps, means = _numbers(of_stage, "dev", MEAN)
        if len(tasks) > 1:
            axis.plot(steps, means, color="black", linestyle=":", linewidth=1.8, label="mean")
        if np.isfinite(means).any():
            best = int(np.nanargmax(means))
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
    columns = len(dict.fromkeys(task for _, task in pairs))
    figure, axes = _panels([f"{stage}: {task}" for stage, task in pairs], columns)
    for axis, (stage, task) in zip(axes, pairs, strict=True):
        steps, values = _numbers(stages[stage], "losses", task)
        _draw_smoothed(axis, steps, values, LOSS_WINDOW, _style(_task_number(task)) | {"linestyle": "-"}, task)
        is_scale = TASKS[task].output.num_classes is None
        axis.set_ylabel("training loss (squared error)" if is_scale else "training loss (nats)", fontsize=9)
        _limit_to_lines(axis)
    window = f"moving mean over {LOSS_WINDOW:.0%} of the steps"
    figure.supxlabel(f"optimizer step (pale: single steps; line: {window})", fontsize=9)
    return figure


def _limit_to_lines(axis: Axes) -> None:
    """The strong line fills the axis; the noise around it may run out of it."""
    values = np.asarray(axis.lines[-1].get_ydata(), dtype=float)
    values = values[np.isfinite(values)]
    if len(values):
        low, high = float(values.min()), float(values.max())
        margin = 0.25 * (high - low) or 0.1 * abs(high) or 0.1
        axis.set_ylim(max(0.0, low - margin) if low >= 0 else low - margin, high + margin)


def draw_learning_rate(records: Records) -> Figure:
    """The learning rate over the steps of each stage."""
    stages = by_stage(records, "lr")
    figure, axes = _panels(list(stages))
    for axis, of_stage in zip(axes, stages.values(), strict=True):
        axis.plot([record["step"] for record in of_stage], [record["lr"] for record in of_stage], color=COLORS[0])
        axis.set_xlabel("optimizer step")
        axis.set_ylim(bottom=0)
        axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axis.set_ylabel("learning rate")
    return figure


def draw_shares(records: Records) -> Figure:
    """Each task's share of the draws of an epoch, in the stages that train several tasks."""
    from matplotlib.ticker import MaxNLocator

    stages = {stage: of for stage, of in by_stage(records, "draws").items() if len(_names(of, "draws")) > 1}
    figure, axes = _panels(list(stages), sharey=True)
    for axis, of_stage in zip(axes, stages.values(), strict=True):
        epochs = sorted({record["epoch"] for record in of_stage})
        totals = {epoch: sum(sum(r["draws"].values()) for r in of_stage if r["epoch"] == epoch) for epoch in epochs}
        for task in _tasks(of_stage, "draws"):
            drawn = [sum(r["draws"].get(task, 0) for r in of_stage if r["epoch"] == epoch) for epoch in epochs]
            shares = [100 * count / totals[epoch] for count, epoch in zip(drawn, epochs, strict=True)]
            number = _task_number(task)
            axis.plot(epochs, shares, **_style(number), **_marker(number), label=task)
        axis.set_xlabel("epoch")
        axis.set_xlim(0.5, max(epochs) + 0.5)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("share of the draws (%)")
    _legend_below(figure, axes)
    return figure


def draw_cosines(records: Records) -> Figure:
    """Cosines between the tasks' gradients: their means and the share of steps in conflict, and how they move."""
    treated = [record for record in records if record.get("cosines")]
    pairs = _names(treated, "cosines")
    figure, (left, right) = _panels(["mean cosine, and share of steps below 0", "cosine between task gradients"])
    figure.set_size_inches(2.4 * PANEL[0], PANEL[1] + 0.6)
    _draw_cosine_means(figure, left, {pair: _numbers(treated, "cosines", pair)[1] for pair in pairs})
    for number, pair in enumerate(pairs):
        # The tasks have the first colours; pairs of tasks are something else and have others.
        steps, values = _numbers(treated, "cosines", pair)
        style = _style(number + 3) | _marker(number) | {"linestyle": "-", "markevery": max(1, len(steps) // 8)}
        _draw_smoothed(right, steps, values, COSINE_WINDOW, style, pair)
    right.axhline(0, color="0.4", linewidth=0.8)
    lines = [line for line in right.lines if not str(line.get_label()).startswith("_")]
    spread = np.nanmax(np.abs(np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in lines] + [[0.05]])))
    right.set_ylim(-1.4 * spread, 1.4 * spread)
    right.set_xlabel(f"optimizer step\n(pale: single steps; line: moving mean over {COSINE_WINDOW:.0%})", fontsize=9)
    right.set_ylabel("cosine")
    right.legend(fontsize=8, loc="upper center", ncols=3)
    return figure


def _draw_cosine_means(figure: Figure, axis: Axes, cosines: Mapping[str, np.ndarray]) -> None:
    tasks = [task for task in TASKS if any(task in pair.split("-") for pair in cosines)]
    means = np.full((len(tasks), len(tasks)), np.nan)
    axis.grid(False)
    for pair, values in cosines.items():
        i, j = (tasks.index(task) for task in pair.split("-"))
        finite = values[np.isfinite(values)]
        if len(finite):
            means[i, j] = means[j, i] = finite.mean()
            text = f"{finite.mean():.3f}\n{np.mean(finite < 0):.0%}"
            for x, y in ((i, j), (j, i)):
                axis.text(x, y, text, ha="center", va="center", fontsize=9)
    limit = max(0.1, float(np.nanmax(np.abs(means)))) if np.isfinite(means).any() else 0.1
    # Twice the largest value: the colours stay pale enough for black text.
    image = axis.imshow(np.ma.masked_invalid(means), cmap="PuOr", vmin=-2 * limit, vmax=2 * limit)
    axis.set_xticks(range(len(tasks)), tasks)
    axis.set_yticks(range(len(tasks)), tasks)
    axis.set_xlabel("task")
    axis.set_ylabel("task")
    bar = figure.colorbar(image, ax=axis, shrink=0.8, label="mean cosine")
    bar.ax.set_ylim(-limit, limit)
    bar.ax.tick_params(labelsize=8)


# --------------------------------------------------------------------------------------------- at the end of a run


def draw_confusion(matrices: Mapping[str, Sequence[Sequence[int]]]) -> Figure:
    """Confusion matrices, (C, C) counts each: rows are true classes and coloured by their shares."""
    figure, axes = _panels([TASKS[task].title for task in matrices])
    figure.set_figheight(PANEL[1] + 0.7)
    for axis, matrix in zip(axes, matrices.values(), strict=True):
        counts = np.asarray(matrix)
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
    r = scores(task, rows.predictions, rows.labels)["pearson"]
    shown = "undefined" if is_degenerate(rows.predictions) or is_degenerate(rows.labels) else f"{r:.3f}"
    figure, (axis,) = _panels([f"{task.title}: Pearson r = {shown}, {len(rows.labels):,} dev rows"])
    figure.set_size_inches(4.6, 4.6)
    values = np.concatenate([rows.labels, rows.predictions])
    low, high = float(values.min()), float(values.max())
    margin = 0.04 * (high - low) or 0.5
    limits = (low - margin, high + margin)
    axis.plot(limits, limits, color="black", linestyle="--", linewidth=1, label="predicted = true")
    axis.scatter(rows.labels, rows.predictions, s=12, color=COLORS[0], alpha=0.4, linewidths=0)
    axis.set_xlim(limits)
    axis.set_ylim(limits)
    axis.set_aspect("equal")
    axis.set_xlabel(f"true {task.label_column} (points)")
    axis.set_ylabel(f"predicted {task.label_column} (points)")
    axis.legend(fontsize=8, frameon=False, loc="upper left")
    return figure


# ------------------------------------------------------------------------------------------------- several runs


def draw_comparison(settings: Sequence[Setting]) -> Figure:
    """Scores of each setting: the mean over its seeds with the standard deviation, and each seed as a small point."""
    from matplotlib.ticker import MaxNLocator

    names = [*(task for task in TASKS if any(task in s.tasks for s in settings)), MEAN]
    metrics = [f"{name} {TASKS[name].output.selection_metric}" if name in TASKS else name for name in names]
    labels = [textwrap.fill(shorten(setting.name, 90), 36) for setting in settings]
    num_lines = sum(1 + text.count("\n") for text in labels)
    figure = _new_figure(2.1 * len(names) + 2.6, 0.14 * num_lines + 0.2 * len(settings) + 1.2)
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, name, title in zip(axes, names, metrics, strict=True):
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", color="0.9", linewidth=0.6)
        axis.tick_params(labelsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(3))
        axis.set_xlabel("score on the dev file", fontsize=8)
        axis.margins(x=0.12)
        color = "black" if name == MEAN else COLORS[_task_number(name)]
        for place, setting in enumerate(settings):
            if name == MEAN or name in setting.tasks:
                _draw_setting(axis, place, setting.scores(name), color)
    axes[0].set_yticks(range(len(settings)), labels)
    axes[0].set_ylim(len(settings) - 0.5, -0.5)
    return figure


def _draw_setting(axis: Axes, place: int, values: np.ndarray, color: str) -> None:
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    if len(values) > 1:
        axis.scatter(values, np.full(len(values), place + 0.25), s=8, color="0.5", linewidths=0)
    axis.errorbar(values.mean(), place, xerr=spread or None, fmt="o", color=color, markersize=5, capsize=3)


def draw_curves(settings: Sequence[Setting]) -> Figure:
    """The mean dev score over the steps of the last stage of the first settings, averaged over their seeds."""
    figure, (axis,) = _panels(["mean dev score over the last stage"])
    figure.set_size_inches(6.4, 4.2)
    for number, setting in enumerate(settings[:NUM_CURVES]):
        curves = [curve for run in setting.runs if (curve := _last_curve(run.records()))]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        means = [np.mean([curve[step] for curve in curves]) for step in steps]
        if steps:
            axis.plot(steps, means, **_style(number), **_marker(number), label=shorten(setting.name, 60))
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("mean score on the dev files")
    _legend_below(figure, [axis])
    return figure


def _last_curve(records: Records) -> dict[int, float]:
    """Mean dev score by step, of the last stage that was evaluated."""
    stages = list(by_stage(records, "dev").values())
    points = {r["step"]: r["dev"].get(MEAN) for r in stages[-1]} if stages else {}
    return {step: float(value) for step, value in points.items() if value is not None}


def shorten(text: str, length: int) -> str:
    """The text, cut where it is longer."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


# ---------------------------------------------------------------------------------------------------- all plots


def figures(run: FinishedRun) -> Iterator[tuple[str, Figure]]:
    """(file name, figure) of every picture that there is something to draw for."""
    records = run.records()
    over_steps: list[tuple[str, str, Callable[[Records], Figure]]] = [
        ("dev", "dev-scores.png", draw_dev_scores),
        ("losses", "losses.png", draw_losses),
        ("lr", "learning-rate.png", draw_learning_rate),
        ("cosines", "gradient-cosines.png", draw_cosines),
    ]
    for key, name, draw in over_steps:
        if any(record.get(key) for record in records):
            yield name, draw(records)
    if any(len(_names(of, "draws")) > 1 for of in by_stage(records, "draws").values()):
        yield "task-shares.png", draw_shares(records)
    confusion = {task: matrix for task, matrix in run.results.get("confusion", {}).items() if task in TASKS}
    if confusion:
        yield "confusion.png", draw_confusion(confusion)
    for task in run.tasks:
        if TASKS[task].output.num_classes is None:
            try:
                rows = run.dev_rows(task)
            except RunError:
                continue  # the report of the run says why there are none
            yield f"{TASKS[task].label_column}-{task}.png", draw_scale(TASKS[task], rows)


def written_plots(run: FinishedRun) -> list[Path]:
    """The pictures in the run's directory, in the order in which they were drawn."""
    return sorted((run.path / FOLDER).glob("*.png"), key=lambda path: path.stat().st_mtime_ns)


def write_plots(run: FinishedRun) -> list[Path]:
    """Draws the run anew into its folder of plots; returns the files."""
    folder = run.path / FOLDER
    folder.mkdir(exist_ok=True)
    paths = []
    for name, figure in figures(run):
        beside = folder / (name + ".tmp")
        figure.savefig(beside, format="png")
        os.replace(beside, folder / name)
        paths.append(folder / name)
    return paths
