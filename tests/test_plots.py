"""Pictures: what their lines, cells and labels show, against the records and plain counting."""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex

from helpers import run_python
from made_runs import made_run, training_records, write_dev_files
from reports import plots
from reports.comparison import row_intervals, settings_of
from reports.finished_run import FinishedRun
from run_record import DevRows
from tasks import TASKS

METRICS = ("sst accuracy", "para accuracy", "sts pearson")
RECORDS = training_records()
TREATED = training_records(is_treated=True)
NAMES = ["dev-scores", "training-loss", "learning-rate", "gradient-cosine", "confusion", "similarity-sts"]


@pytest.fixture
def made(tmp_path: Path) -> FinishedRun:
    return made_run(write_dev_files(tmp_path / "data"), "run")


def lines(axis: Any) -> dict[str, Any]:
    """The lines of the legend by label."""
    return {str(line.get_label()): line for line in axis.lines if not str(line.get_label()).startswith("_")}


def texts(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.texts]


def test_dev_scores_are_the_metrics_that_count_and_the_best_mean_is_marked() -> None:
    figure = plots.draw_dev_scores(RECORDS, {"sst": 0.3, "para": 0.6}, {"sts": (0.2, 0.4)}).figure
    assert [axis.get_title() for axis in figure.axes] == ["pretrain", "finetune"]
    for axis, stage in zip(figure.axes, ("pretrain", "finetune"), strict=True):
        dev = [record for record in RECORDS if record["stage"] == stage and "dev" in record]
        drawn = lines(axis)
        assert set(drawn) == {*METRICS, "mean", "best mean", "sst majority class", "para majority class"}
        assert [drawn[f"{t} majority class"].get_ydata()[0] for t in ("sst", "para")] == [0.3, 0.6]
        for label in METRICS:
            task, metric = label.split()
            assert drawn[label].get_xdata().tolist() == [1, 2]  # epochs
            assert drawn[label].get_ydata().tolist() == [record["dev"][task][metric] for record in dev]
        best = max(dev, key=lambda record: record["dev"]["mean"])
        assert (drawn["best mean"].get_xdata()[0], drawn["best mean"].get_ydata()[0]) == (
            best["epoch"], best["dev"]["mean"]
        )  # fmt: skip
        bars = [bar.get_segments()[0].tolist() for bar in axis.collections]  # of the score at the run's end
        assert bars == ([[[best["epoch"], 0.2], [best["epoch"], 0.4]]] if stage == "finetune" else [])
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 7  # each line once


def test_a_moving_mean_takes_the_finite_values_of_its_window() -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(size=40)
    values[draw.integers(0, 40, 12)] = np.nan
    values[20:24] = np.inf
    for window in (1, 2, 5, 8, 39, 100):
        half = window // 2
        for i, found in enumerate(plots.moving_mean(values, window)):
            near = [v for j, v in enumerate(values) if abs(i - j) <= half and np.isfinite(v)]
            assert found == pytest.approx(np.mean(near)) if near else np.isnan(found)


@pytest.mark.parametrize(("key", "name", "caption", "share", "size"), plots.OVER_STEPS)
def test_what_a_log_holds_is_drawn_in_a_panel_for_each_stage_and_entry(
    key: str, name: str, caption: str, share: float, size: tuple[float, float]
) -> None:
    plot = plots.draw_over_steps(TREATED, key, name, caption, share, size)
    entries = [(r["stage"], n) for r in TREATED if key in r for n in (r[key] if isinstance(r[key], dict) else [key])]
    stages = dict.fromkeys(stage for stage, _ in entries)
    held = [(stage, name) for stage in stages for name in (*TASKS, key) if (stage, name) in entries]
    assert [axis.get_title() for axis in plot.figure.axes] == [f"{stage}: {entry}" for stage, entry in held]
    for axis, (stage, entry) in zip(plot.figure.axes, held, strict=True):
        own = [record for record in TREATED if record["stage"] == stage and key in record]
        values = [(r["step"], r[key] if key == "lr" else r[key][entry]) for r in own if key == "lr" or entry in r[key]]
        np.testing.assert_allclose(np.transpose(axis.lines[1].get_data()), values)  # a window of one
        low, high = axis.get_ylim()
        assert low <= min(v for _, v in values) and max(v for _, v in values) <= high
    assert "optimizer step" in plot.figure.get_supxlabel() and plot.figure.get_supylabel() == name.replace("-", " ")


def test_cosines_stand_in_a_triangle_of_task_pairs_with_a_band_of_what_noise_would_do() -> None:
    draw = np.random.default_rng(0)
    values = {"sst-para": draw.normal(0.3, 0.1, 200), "sst-sts": np.zeros(200), "para-sts": draw.normal(0, 0.2, 200)}
    names = {"para-sst": "sst-para", "sst-sts": "sst-sts", "para-sts": "para-sts"}  # of a run of --tasks para sst sts
    records = [
        {
            "stage": "finetune",
            "epoch": 1,
            "step": i + 1,
            "cosines": {n: float(values[of][i]) for n, of in names.items()},
        }
        for i in range(200)
    ]
    (plot,) = plots.draw_cosines([*RECORDS, *records])
    axes: dict[str, Any] = {axis.get_title(): axis for axis in plot.figure.axes}
    places = {title: axis.get_subplotspec() for title, axis in axes.items()}
    rows_and_columns = {title: (place.rowspan.start, place.colspan.start) for title, place in places.items()}
    assert rows_and_columns == {"sst-para": (0, 0), "sst-sts": (1, 0), "para-sts": (1, 1)}
    for title, axis in axes.items():
        assert axis.lines[1].get_ydata() == pytest.approx(plots.moving_mean(values[title], 6))
        (band,) = axis.patches
        assert band.get_y() + band.get_height() == pytest.approx(-band.get_y())
        assert band.get_height() / 2 == pytest.approx(1.96 * values[title].std() / 6**0.5)


def test_a_small_difference_of_scores_does_not_fill_a_panel(tmp_path: Path) -> None:
    data = write_dev_files(tmp_path / "data", 400)
    runs = [made_run(data, f"r{i}", 0.3 + i / 100, tasks=("sst",), lr=float(i)) for i in range(2)]
    for run in runs:
        (run.path / "predictions" / "sst-dev-rows.csv").unlink()  # no intervals, which would make room
    assert 0 < abs(runs[0].score("sst") - runs[1].score("sst")) < plots.SPAN / 2
    axes = plots.draw_comparison(settings_of(runs)).figure.axes
    assert all(np.ptp(axis.get_xlim()) >= plots.SPAN - 1e-9 for axis in axes)


def test_a_long_log_is_smoothed_and_its_noise_pale() -> None:
    draw = np.random.default_rng(0)
    records = [{"stage": "s", "epoch": 1, "step": i, "losses": {"sst": 1 + draw.normal() / 5}} for i in range(4000)]
    (axis,) = plots.draw_over_steps(records, *plots.OVER_STEPS[0]).figure.axes
    pale, strong = axis.lines
    assert len(strong.get_ydata()) == 4000 and np.std(strong.get_ydata()) < 0.04
    assert len(pale.get_ydata()) <= plots.NUM_PALE and pale.get_alpha() < 0.5 < np.std(pale.get_ydata()) * 5


def test_a_confusion_matrix_shows_counts_and_the_shares_of_each_true_class() -> None:
    figure = plots.draw_confusion({"para": np.array([[30, 10], [0, 0]]), "sst": np.eye(5, dtype=int)}).figure
    para, sst, bar = figure.axes
    assert [tick.get_text() for tick in para.get_yticklabels()] == ["no", "yes"]
    assert [tick.get_text() for tick in sst.get_xticklabels()][:2] == ["very\nnegative", "negative"]
    assert texts(para) == ["30\n75%", "10\n25%", "0\n0%", "0\n0%"]
    assert (figure.get_supxlabel(), figure.get_supylabel()) == ("predicted class", "true class")
    assert len(texts(sst)) == 25 and "%" in bar.get_ylabel()
    assert [(t.get_position(), t.get_text()) for t in para.texts][1] == ((1, 0), "10\n25%")


def test_a_scale_is_drawn_with_its_correlation_and_the_line_of_equality() -> None:
    draw = np.random.default_rng(0)
    labels = draw.uniform(0, 5, 50)
    rows = DevRows(("",) * 50, labels, np.clip(labels + draw.normal(size=50), 0, 5), None)
    (axis,) = plots.draw_scale(TASKS["sts"], rows).figure.axes
    assert f"r = {np.corrcoef(labels, rows.predictions)[0, 1]:.3f}, 50 dev rows" in axis.get_title()
    np.testing.assert_array_equal(axis.collections[0].get_offsets(), np.stack([labels, rows.predictions], 1))
    np.testing.assert_array_equal(axis.lines[0].get_xdata(), axis.lines[0].get_ydata())
    assert axis.get_xlim() == axis.get_ylim() and axis.get_aspect() == 1
    constant = DevRows(("",) * 50, labels, np.full(50, 2.0), None)
    assert "r = undefined" in plots.draw_scale(TASKS["sts"], constant).figure.axes[0].get_title()


def test_settings_are_drawn_with_mean_and_sample_standard_deviation(tmp_path: Path) -> None:
    data = write_dev_files(tmp_path / "data")
    noise = (0.05, 0.1, 0.2)
    runs = [made_run(data, f"r{i}{s}", noise[i], seed=s, lr=float(i)) for i in range(3) for s in (0, 1)]
    made = settings_of(runs)
    axes = plots.draw_comparison(made).figure.axes
    assert [axis.get_title() for axis in axes] == ["sst accuracy", "para accuracy", "sts pearson", "mean"]
    assert [tick.get_text() for tick in axes[0].get_yticklabels()] == ["lr 0.0", "lr 1.0", "lr 2.0"]
    for place, setting in enumerate(made):
        values = setting.scores("mean")
        container = axes[3].containers[place]
        assert container.lines[0].get_xdata()[0] == pytest.approx(values.mean())
        (segment,) = container.lines[2][0].get_segments()
        assert segment[1][0] - segment[0][0] == pytest.approx(2 * values.std(ddof=1))
        bars = [of.get_segments()[0] for of in axes[3].collections if 5 in of.get_linewidths()]
        assert bars[place][:, 0] == pytest.approx(row_intervals(setting.runs)["mean"])


def test_a_treated_run_has_every_picture_and_nothing_else_is_left(made: FinishedRun) -> None:
    before, state = np.random.get_state()[1].tolist(), dict(matplotlib.rcParams)
    paths = plots.write_plots(plots.run_plots(made), made.path, "png")
    assert [path.name for path in paths] == [f"{name}.png" for name in NAMES]
    for format in ("pdf", "svg"):
        paths += plots.write_plots([next(plots.run_plots(made))], made.path, format)
    assert sorted(paths) == sorted((made.path / "plots").iterdir())
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    assert all(path.read_bytes().startswith(starts[path.suffix]) for path in paths)
    assert np.random.get_state()[1].tolist() == before and dict(matplotlib.rcParams) == state


def test_pictures_are_named_and_told_in_words_and_lines_differ_in_more_than_colour(made: FinishedRun) -> None:
    for plot in plots.run_plots(made):
        assert plot.figure.get_supxlabel() and plot.figure.get_supylabel() and plot.caption, plot.name
        for axis in plot.figure.axes:
            drawn = [line for name, line in lines(axis).items() if name in METRICS]
            assert len({to_hex(line.get_color()) for line in drawn}) == len(drawn), plot.name
            assert len({(line.get_linestyle(), line.get_marker()) for line in drawn}) == len(drawn), plot.name
    words = {plot.name: plot.alt for plot in plots.run_plots(made)}
    dev = [record["dev"] for record in TREATED if "dev" in record and record["stage"] == "finetune"]
    first, last = (of["para"]["accuracy"] for of in (dev[0], dev[-1]))
    assert f"finetune, sst accuracy from {dev[0]['sst']['accuracy']:.3g} to" in words["dev-scores"]
    assert f"para accuracy from {first:.3g} to {last:.3g}" in words["dev-scores"]
    assert re.search(r"sst-sts, sst-sts from -?0\.\d+ to ", words["gradient-cosine"])
    assert "Pearson r = " in words["similarity-sts"] and all(words.values())
    majority = max(np.sum(made.results["confusion"]["para"], axis=1)) / 60
    assert f"para majority class {majority:.3g}" in words["dev-scores"]


def test_what_a_run_does_not_have_is_not_drawn_and_null_in_the_log_leaves_a_gap(made: FinishedRun) -> None:
    for record in (records := made.records()):
        for key in {"losses", "cosines", "dev"} & record.keys():
            record[key] = {**record[key], "mean": None} if key == "dev" else dict.fromkeys(record[key])
    (made.path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"stage": "finet')
    drawn = list(plots.run_plots(made))
    assert [plot.name for plot in drawn] == NAMES and drawn[0].content("png")
    for log, expected in ((RECORDS[:2], ["training-loss", "learning-rate"]), ([], [])):
        (made.path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
        assert [plot.name for plot in plots.run_plots(made)] == [*expected, "confusion", "similarity-sts"]
    (made.path / "predictions" / "sts-dev-rows.csv").write_text("broken")
    assert [plot.name for plot in plots.run_plots(made)] == ["confusion"]


def test_no_window_system_and_no_shared_figure_is_touched(made: FinishedRun) -> None:
    script = f"""
import sys
from pathlib import Path
from reports.finished_run import FinishedRun
from reports.plots import run_plots, write_plots
write_plots([next(run_plots(FinishedRun.read(Path({str(made.path)!r}))))], Path({str(made.path)!r}), "png")
print([name for name in ("matplotlib.pyplot", "torch", "tkinter") if name in sys.modules])
"""
    assert run_python("-c", script) == "[]\n"


def test_steps_of_one_task_each_have_no_cosines_to_draw() -> None:
    assert [*plots.draw_cosines([{"stage": "finetune", "step": step, "cosines": {}} for step in (1, 2)])] == []
