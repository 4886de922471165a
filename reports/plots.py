"""Pictures of a run and of several, on figures of their own: no window, no state shared with other code.

Colours are Okabe's and Ito's, told apart by the colour-blind; line styles and markers tell lines apart in grey print.
"""

from __future__ import annotations

import base64
import io
import itertools
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reports.comparison import Setting, row_intervals, score_names, titles
from reports.finished_run import MEAN, FinishedRun
from run_record import CONFIG, DevRows, RunError, read_json, write_atomically
from tasks import TASKS, Task, is_degenerate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))
MARKERS = "os^DvPX"
PANEL = (3.9, 3.1)  # inches
WINDOW = 0.03  # of a stage's steps, in a moving mean
NUM_PALE = 600  # single values in a line: more make a wall of it
WIDE: dict[str, Any] = {"linewidth": 5, "alpha": 0.25}  # the line of an interval
MOVING = f"pale: single steps; line: mean over {WINDOW:.0%} of the steps"
OVER_STEPS = (  # key of a record, name of its picture, caption, share of the steps in a mean, inches of a panel
    ("losses", "training-loss", f"Training losses, in nats or squared points of a scale; {MOVING}.", WINDOW, PANEL),
    ("lr", "learning-rate", "Learning rate over the steps of each stage.", 0.0, (2.6, 1.5)),
)
SPAN = 0.05  # a difference of scores that may fill a panel; smaller ones do not


@dataclass(frozen=True)
class Plot:
    """A figure with the name of its file and a caption."""

    name: str
    caption: str
    figure: Figure
    files: dict[str, bytes] = field(default_factory=dict, compare=False, repr=False)

    def content(self, format: str) -> bytes:
        """The figure as a file of this format: png, pdf or svg. It is drawn once, which takes a second."""
        if format not in self.files:
            file = io.BytesIO()
            self.figure.savefig(file, format=format)
            self.files[format] = file.getvalue()
        return self.files[format]

    @property
    def source(self) -> str:
        """The picture as an address that a page can hold."""
        return f"data:image/png;base64,{base64.b64encode(self.content('png')).decode()}"

    @property
    def alt(self) -> str:
        """The figure in words: of each panel its title, and where its named lines begin and end."""
        panels = []
        for axis in self.figure.axes:
            found = [axis.get_title()]
            for line in axis.lines:
                values = np.asarray(line.get_ydata(), dtype=float)
                values, label = values[np.isfinite(values)], str(line.get_label())
                if len(values) and not label.startswith("_"):
                    ends = f"from {values[0]:.3g} to {values[-1]:.3g}" if np.ptp(values) else f"{values[0]:.3g}"
                    found.append(f"{label} {ends}")
            found += [text for tick in axis.get_yticklabels() if any(map(str.isalpha, text := tick.get_text()))]
            panels.append(", ".join(filter(None, found)).replace("\n", " "))
        return "; ".join(filter(None, panels))


def panels(
    titles: Sequence[str], xlabel: str, ylabel: str, rows: int = 1, size: tuple[float, float] = PANEL, **axes: Any
) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each title, in so many rows. size: of a panel, in inches."""
    from matplotlib.figure import Figure

    columns = -(-len(titles) // rows)
    # A single panel is wider: its title and legend need the room.
    figure = Figure((size[0] * max(columns, 1.35), size[1] * rows + 0.4), dpi=150, layout="constrained")
    all_axes = list(figure.subplots(rows, columns, squeeze=False, **axes).flat)
    for axis, title in zip_longest(all_axes, titles):
        if title is None:
            axis.remove()
            continue
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.grid(color="0.9", linewidth=0.6)
        axis.set_axisbelow(True)
    figure.supxlabel(xlabel, fontsize=9)
    figure.supylabel(ylabel, fontsize=9)
    return figure, all_axes[: len(titles)]


def style(what: int | str) -> dict[str, Any]:
    """Colour, line and marker of a task or of a number."""
    number = list(TASKS).index(what) if isinstance(what, str) else what
    kinds = (("color", COLORS), ("linestyle", LINES), ("marker", MARKERS))
    return {name: of[number % len(of)] for name, of in kinds} | {"linewidth": 1.6, "markersize": 4.5}


def curves(records: Records, key: str, over: str = "step") -> dict[str, dict[str, np.ndarray]]:
    """By stage and entry of a key (2, points): steps and values, null as NaN; of dev scores the metric that counts.

    Tasks come in their order, whichever was drawn first. A key with a single number is its only entry. A stage
    without any, as of the cosines of steps with one task each, is left out. over: "step" or "epoch".
    """
    points: dict[str, dict[str, list[tuple[Any, Any]]]] = {}
    for record in (record for record in records if record.get(key) is not None):
        entries = record[key] if isinstance(record[key], Mapping) else {key: record[key]}
        for name, value in entries.items():
            number = value.get(TASKS[name].output.selection_metric) if isinstance(value, Mapping) else value
            points.setdefault(record["stage"], {}).setdefault(name, []).append((record[over], number))
    order = [*TASKS, *(name for of_stage in points.values() for name in of_stage)]
    in_order = {stage: sorted(of_stage, key=order.index) for stage, of_stage in points.items()}
    return {s: {name: np.array(points[s][name], dtype=float).T for name in names} for s, names in in_order.items()}


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the finite values among the `window` values around each place, NaN where there are none.

    An even window takes one value more. Towards the ends the window is cut off.
    """
    half, finite = min(window // 2, len(values)), np.isfinite(values)
    near = np.ones(2 * half + 1)
    total, count = (np.convolve(of, near)[half : half + len(values)] for of in (np.where(finite, values, 0.0), finite))
    return np.where(count > 0.5, total / np.maximum(count, 1), np.nan)


def draw_dev_scores(records: Records, majority: Mapping[str, float], intervals: Mapping[str, Any]) -> Plot:
    """majority, intervals: by task the accuracy of always predicting the largest class, and ends of an interval."""
    stages = curves(records, "dev", "epoch")
    last_stage = {task: stage for stage, of_stage in stages.items() for task in of_stage}
    figure, axes = panels(list(stages), "epoch", "score on the dev file", sharey=True)
    for axis, (stage, of_stage) in zip(axes, stages.items(), strict=True):
        epochs, means = of_stage.get(MEAN, np.empty((2, 0)))
        best = int(np.nanargmax(means)) if np.isfinite(means).any() else None
        for task in (task for task in TASKS if task in of_stage):
            look = style(task)
            axis.plot(*of_stage[task], **look, label=f"{task} {TASKS[task].output.selection_metric}")
            if best is not None and task in intervals and last_stage[task] == stage:
                axis.vlines(epochs[best], *intervals[task], **WIDE, color=look["color"])
            if task in majority:
                dotted: dict[str, Any] = {"linewidth": 1.2, "linestyle": (0, (1, 2)), "color": look["color"]}
                axis.axhline(majority[task], **dotted, label=f"{task} majority class")
        axis.plot(epochs, means, color="black", linestyle=":", linewidth=1.8, label="mean")
        if best is not None:
            axis.plot(epochs[best], means[best], "*", color="black", markersize=11, label="best mean", zorder=3)
        axis.set_xlim(left=0)
        axis.locator_params(axis="x", integer=True)
        axis.margins(y=0.08)
    entries = {x: of for axis in axes for of, x in zip(*axis.get_legend_handles_labels(), strict=True)}
    look = {"loc": "outside upper center", "ncols": 1 + 2 * len(stages), "fontsize": 8, "frameon": False}
    figure.legend(entries.values(), entries.keys(), **look)  # above: below it would cover the label of the axis
    caption = (
        "Scores on the dev files over the epochs of each stage. Star: the best mean; wide bar: 95% bootstrap interval "
        "of the final score over the dev rows; dotted: always predicting the largest class."
    )
    return Plot("dev-scores", caption, figure)


def draw_over_steps(
    records: Records, key: str, name: str, caption: str, share: float, size: tuple[float, float]
) -> Plot:
    """The entries of a key over the steps of each stage, a panel each: a strong moving mean, single values pale."""
    stages = curves(records, key)
    drawn = {f"{stage}: {entry}": (entry, *of_stage[entry]) for stage, of_stage in stages.items() for entry in of_stage}
    figure, axes = panels(list(drawn), "optimizer step", name.replace("-", " "), rows=len(stages), size=size)
    for axis, (entry, steps, values) in zip(axes, drawn.values(), strict=True):
        color = style(entry if entry in TASKS else 3)["color"]
        strong = _plot_moving_mean(axis, steps, values, color, entry, share)
        if np.isfinite(strong).any():  # the strong line fills the panel; the noise around it may run out of it
            low, high = float(np.nanmin(strong)), float(np.nanmax(strong))
            margin = 0.25 * (high - low) or 0.1 * abs(high) or 0.1
            axis.set_ylim(max(0.0, low - margin) if low >= 0 else low - margin, high + margin)
    return Plot(name, caption, figure)


def _plot_moving_mean(
    axis: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str, share: float = WINDOW
) -> np.ndarray:
    """Single values pale, their mean over a share of the steps strong; returns it."""
    strong, some = moving_mean(values, round(share * len(values))), -(-len(values) // NUM_PALE)
    axis.plot(steps[::some], values[::some], color=color, linewidth=0.5, alpha=0.25)
    axis.plot(steps, strong, color=color, linewidth=1.6, label=label, marker="." if len(steps) == 1 else "")
    return strong


def draw_cosines(records: Records) -> Iterator[Plot]:
    """Of each stage with a treatment the cosines of its task gradients over the steps, a pair of tasks a panel, below
    the diagonal of a table of the tasks."""
    for stage, pairs in curves(records, "cosines").items():
        ends = [(f"{task}-", f"-{task}") for task in TASKS]
        found = [any(pair.startswith(first) or pair.endswith(last) for pair in pairs) for first, last in ends]
        tasks = list(itertools.compress(TASKS, found))
        cells = [(first, second) for second in tasks[1:] for first in tasks[:-1]]
        titles = ["-".join(cell) for cell in cells]
        figure, axes = panels(
            titles, "optimizer step", "cosine", rows=len(tasks) - 1, size=(3.4, 2.2), sharex=True, sharey=True
        )
        for axis, cell, title in zip(axes, cells, titles, strict=True):
            name = next((name for name in (title, "-".join(reversed(cell))) if name in pairs), None)
            if name is None or tasks.index(cell[0]) > tasks.index(cell[1]):
                axis.remove()
                continue
            steps, values = pairs[name]
            _plot_moving_mean(axis, steps, values, COLORS[3], title)
            window, finite = max(1, round(WINDOW * len(values))), values[np.isfinite(values)]
            noise = 1.96 * float(finite.std() if len(finite) else 0) / window**0.5
            axis.axhspan(-noise, noise, color="0.85", zorder=0)
            axis.axhline(0, color="0.4", linewidth=0.8)
        caption = (
            f"Cosines between the tasks' gradients in {stage}, {MOVING}; below 0 they conflict. Grey: where the line "
            "would run in 95 of 100 steps if the cosines were 0 on average."
        )
        yield Plot("gradient-cosine", caption, figure)


def draw_confusion(matrices: Mapping[str, np.ndarray]) -> Plot:
    """matrices: by task the counts of dev rows by true class (rows) and predicted class."""
    figure, axes = panels([TASKS[task].title for task in matrices], "predicted class", "true class", size=(3.9, 3.4))
    for axis, (task, counts) in zip(axes, matrices.items(), strict=True):
        shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
        image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        for (i, j), count in np.ndenumerate(counts):
            color = "white" if shares[i, j] > 62 else "black"
            axis.text(j, i, f"{count}\n{shares[i, j]:.0f}%", ha="center", va="center", fontsize=7, color=color)
        axis.grid(False)
        names = [name.replace(" ", "\n") for name in TASKS[task].output.class_names]
        axis.set_xticks(range(len(counts)), names)
        axis.set_yticks(range(len(counts)), names)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class's dev rows (%)")
    caption = "Confusion matrices: dev rows by true and predicted class, coloured by their share of the true class."
    return Plot("confusion", caption, figure)


def draw_scale(task: Task, rows: DevRows) -> Plot:
    """Predictions against labels on a scale."""
    r = task.output.scores(rows.predictions, rows.labels)["pearson"]
    shown = "undefined" if is_degenerate(rows.predictions) or is_degenerate(rows.labels) else f"{r:.3f}"
    title, label = f"{task.title}: Pearson r = {shown}, {len(rows.labels):,} dev rows", task.label_column
    figure, (axis,) = panels([title], f"true {label} (points)", f"predicted {label} (points)", size=(3.4, 4.2))
    values = np.concatenate([rows.labels, rows.predictions])
    margin = 0.04 * float(np.ptp(values)) or 0.5
    limits = (float(values.min()) - margin, float(values.max()) + margin)
    axis.plot(limits, limits, color="black", linestyle="--", linewidth=1, label="predicted = true")
    axis.scatter(rows.labels, rows.predictions, s=12, color=COLORS[0], alpha=0.4, linewidths=0)
    axis.set(xlim=limits, ylim=limits, aspect="equal")
    axis.legend(fontsize=8, frameon=False, loc="upper left")
    caption = f"Predicted over true {label} of the dev rows; the line is where they are equal."
    return Plot(f"{label}-{task.name}", caption, figure)


def run_plots(run: FinishedRun) -> Iterator[Plot]:
    """Every picture of the run that there is something to draw for. Raises RunError for a damaged log."""
    records = run.records()
    if curves(records, "dev"):
        yield draw_dev_scores(records, {t: run.guesses[t] for t in run.confusion}, row_intervals([run]))
    for key, name, caption, share, size in OVER_STEPS:
        if curves(records, key):
            yield draw_over_steps(records, key, name, caption, share, size)
    yield from draw_cosines(records)
    if run.confusion:
        yield draw_confusion(run.confusion)
    for task in (task for task in run.tasks if TASKS[task].output.num_classes is None):
        with suppress(RunError):  # the report of the run says why there are no rows
            yield draw_scale(TASKS[task], run.dev_rows(task))


def write_plots(plots: Iterable[Plot], run: Path, format: str) -> list[Path]:
    """Writes pictures anew into a run's folder of plots; returns the files."""
    folder, paths = run / "plots", []
    folder.mkdir(exist_ok=True)
    for plot in plots:
        paths.append(folder / f"{plot.name}.{format}")
        write_atomically(paths[-1], plot.content(format))
    return paths


def write_run_plots(path: Path, results: Mapping[str, Any], format: str) -> None:
    """Draws a run whose results are not in its directory yet: once they are, it has ended."""
    write_plots(run_plots(FinishedRun(path, read_json(path / CONFIG), results)), path, format)


def draw_comparison(settings: Sequence[Setting]) -> Plot:
    """Scores of each setting."""
    names = score_names(settings)
    labels = [textwrap.fill(title, 36) for title in titles(settings)]
    height = 0.14 * sum(1 + text.count("\n") for text in labels) + 0.25 * len(settings) + 0.8
    size = (2.1 + 2.6 / len(names), height)
    figure, axes = panels(list(names.values()), "score on the dev file", "", size=size, sharey=True)
    intervals = [row_intervals(setting.runs) for setting in settings]
    for axis, name in zip(axes, names, strict=True):
        axis.grid(False, axis="y")
        axis.locator_params(axis="x", nbins=3)
        axis.margins(x=0.12)
        color = "black" if name == MEAN else style(name)["color"]
        for place, setting in ((i, s) for i, s in enumerate(settings) if name in (*s.tasks, MEAN)):
            values, spread = setting.scores(name), None
            if name in intervals[place]:
                axis.hlines(place, *intervals[place][name], **WIDE, color=color)
            if len(values) > 1:
                spread = float(values.std(ddof=1))
                axis.scatter(values, np.full(len(values), place + 0.25), s=8, color="0.5", linewidths=0)
            axis.errorbar(values.mean(), place, xerr=spread, fmt="o", color=color, markersize=5, capsize=3)
        low, high = axis.get_xlim()
        gap = max(0.0, SPAN - (high - low)) / 2
        axis.set_xlim(low - gap, high + gap)
    axes[0].set_yticks(range(len(settings)), labels)
    axes[0].set_ylim(len(settings) - 0.5, -0.5)
    caption = (
        "Scores on the dev files. Dot, whiskers: mean and standard deviation over the seeds, which are the grey dots; "
        "wide bar: 95% bootstrap interval over the dev rows."
    )
    return Plot("scores", caption, figure)
