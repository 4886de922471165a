"""Pictures: what their lines, cells and labels show, against the records and plain counting."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex

from made_runs import noisy, training_records, write_dev_files, write_run
from reports import plots
from reports.comparison import row_intervals, settings_of
from reports.finished_run import FinishedRun
from run_record import DevRows
from tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
METRICS = ("sst accuracy", "para accuracy", "sts pearson")
PAIRS = ("sst-para", "sst-sts", "para-sts")
RECORDS = training_records()
TREATED = training_records(is_treated=True)


@pytest.fixture
def made(tmp_path: Path) -> FinishedRun:
    data = write_dev_files(tmp_path / "data")
    predictions = {task: noisy(data, task, 0.3, 1) for task in TASKS}
    return FinishedRun.read(write_run(tmp_path / "run", data, predictions, TREATED))


def lines(axis: Any) -> dict[str, Any]:
    """The lines of the legend by label."""
    return {str(line.get_label()): line for line in axis.lines if not str(line.get_label()).startswith("_")}


def texts(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.texts]


# ------------------------------------------------------------------------------------------------- over the steps


def test_dev_scores_are_the_metrics_that_count_and_the_best_mean_is_marked() -> None:
    figure = plots.draw_dev_scores(RECORDS, {"sst": 0.3, "para": 0.6}, {"sts": (0.2, 0.4)})
    assert [axis.get_title() for axis in figure.axes] == ["pretrain", "finetune"]
    for axis, stage in zip(figure.axes, ("pretrain", "finetune"), strict=True):
        dev = [record for record in RECORDS if record["stage"] == stage and "dev" in record]
        drawn = lines(axis)
        assert set(drawn) == {*METRICS, "mean", "best mean", "sst majority class", "para majority class"}
        assert [drawn[f"{t} majority class"].get_ydata()[0] for t in ("sst", "para")] == [0.3, 0.6]
        for label in METRICS:
            task, metric = label.split()
            assert drawn[label].get_xdata().tolist() == [20, 40]
            assert drawn[label].get_ydata().tolist() == [record["dev"][task][metric] for record in dev]
        best = max(dev, key=lambda record: record["dev"]["mean"])
        assert (drawn["best mean"].get_xdata()[0], drawn["best mean"].get_ydata()[0]) == (
            best["step"], best["dev"]["mean"]
        )  # fmt: skip
        bars = [bar.get_segments()[0].tolist() for bar in axis.collections]  # of the score at the run's end
        assert bars == ([[[best["step"], 0.2], [best["step"], 0.4]]] if stage == "finetune" else [])
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 7  # each line once


def test_losses_are_drawn_for_each_stage_and_task_with_their_unit() -> None:
    figure = plots.draw_losses(RECORDS)
    assert [axis.get_title() for axis in figure.axes] == [f"{s}: {t}" for s in ("pretrain", "finetune") for t in TASKS]
    for axis in figure.axes:
        stage, task = axis.get_title().split(": ")
        own = [record for record in RECORDS if record["stage"] == stage and task in record.get("losses", {})]
        line = lines(axis)[task]
        assert line.get_xdata().tolist() == [record["step"] for record in own]
        np.testing.assert_allclose(line.get_ydata(), [record["losses"][task] for record in own])  # a window of one
        assert ("squared error" in axis.get_ylabel()) == (task == "sts") and "loss" in axis.get_ylabel()
    assert "optimizer step" in figure.get_supxlabel()


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
    assert plots.moving_mean(np.array([]), 3).tolist() == []


def test_a_long_log_is_smoothed_and_its_noise_pale() -> None:
    draw = np.random.default_rng(0)
    records = [{"stage": "s", "epoch": 1, "step": i, "losses": {"sst": 1 + draw.normal() / 5}} for i in range(4000)]
    (axis,) = plots.draw_losses(records).axes
    pale, strong = axis.lines
    assert len(strong.get_ydata()) == 4000 and np.std(strong.get_ydata()) < 0.04
    assert len(pale.get_ydata()) <= plots.NUM_PALE and pale.get_alpha() < 0.5 < np.std(pale.get_ydata()) * 5


def test_shares_are_the_tasks_parts_of_an_epochs_draws() -> None:
    figure = plots.draw_shares(TREATED)
    for axis, stage in zip(figure.axes, ("pretrain", "finetune"), strict=True):
        drawn = lines(axis)
        assert list(drawn) == list(TASKS)
        total = np.sum([line.get_ydata() for line in drawn.values()], axis=0)
        np.testing.assert_allclose(total, [100, 100])
        for task, line in drawn.items():
            for epoch, share in zip(line.get_xdata(), line.get_ydata(), strict=True):
                of = [r["draws"] for r in TREATED if r["stage"] == stage and r["epoch"] == epoch and "draws" in r]
                assert share == pytest.approx(100 * sum(d.get(task, 0) for d in of) / sum(sum(d.values()) for d in of))


def test_the_learning_rate_is_drawn_as_it_was() -> None:
    for axis, stage in zip(plots.draw_learning_rate(RECORDS).axes, ("pretrain", "finetune"), strict=True):
        own = [record for record in RECORDS if record["stage"] == stage and "lr" in record]
        (line,) = axis.lines
        assert [*map(float, line.get_ydata())] == [record["lr"] for record in own]


def test_mean_cosines_are_those_that_the_run_summed_up_itself(treated_run: Path) -> None:
    run = FinishedRun.read(treated_run)
    left = plots.draw_cosines(run.records()).axes[0]
    found = run.results["gradients"]["finetune"]
    expected = [f"{pair}\n{found['cosine'][pair]:.3f}, {found['conflict_rate'][pair]:.0%} below 0" for pair in PAIRS]
    assert [tick.get_text() for tick in left.get_yticklabels()] == expected
    np.testing.assert_allclose([bar.get_width() for bar in left.patches], [found["cosine"][pair] for pair in PAIRS])


def test_cosines_over_time_have_a_line_for_each_pair() -> None:
    right = plots.draw_cosines(TREATED).axes[1]
    drawn = lines(right)
    assert tuple(drawn) == PAIRS
    values = np.array([record["cosines"]["sst-sts"] for record in TREATED if "cosines" in record])
    np.testing.assert_allclose(drawn["sst-sts"].get_ydata(), plots.moving_mean(values, 2))
    low, high = right.get_ylim()
    assert low == -high and high >= max(np.abs(line.get_ydata()).max() for line in drawn.values())


@pytest.mark.parametrize("key", ["losses", "cosines", "dev"])
def test_null_in_the_log_leaves_a_gap(key: str, made: FinishedRun) -> None:
    for record in (records := made.records()):
        if key == "dev" and key in record:
            record["dev"]["mean"] = None
        elif isinstance(record.get(key), dict):
            record[key] = dict.fromkeys(record[key], None)
    (made.path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"stage": "finet')
    assert len(plots.write_plots(made)) == 7


# -------------------------------------------------------------------------------------------- at the end of a run


def test_a_confusion_matrix_shows_counts_and_the_shares_of_each_true_class() -> None:
    figure = plots.draw_confusion({"para": np.array([[30, 10], [0, 0]]), "sst": np.eye(5, dtype=int)})
    para, sst, bar = figure.axes
    assert texts(para) == ["30\n75%", "10\n25%", "0\n0%", "0\n0%"]
    assert (para.get_xlabel(), para.get_ylabel()) == ("predicted class", "true class")
    assert len(texts(sst)) == 25 and "%" in bar.get_ylabel()
    assert [(t.get_position(), t.get_text()) for t in para.texts][1] == ((1, 0), "10\n25%")


def test_a_scale_is_drawn_with_its_correlation_and_the_line_of_equality() -> None:
    draw = np.random.default_rng(0)
    labels = draw.uniform(0, 5, 50)
    rows = DevRows(("",) * 50, labels, np.clip(labels + draw.normal(size=50), 0, 5), None)
    (axis,) = plots.draw_scale(TASKS["sts"], rows).axes
    assert f"r = {np.corrcoef(labels, rows.predictions)[0, 1]:.3f}, 50 dev rows" in axis.get_title()
    np.testing.assert_array_equal(axis.collections[0].get_offsets(), np.stack([labels, rows.predictions], 1))
    np.testing.assert_array_equal(axis.lines[0].get_xdata(), axis.lines[0].get_ydata())
    assert axis.get_xlim() == axis.get_ylim() and axis.get_aspect() == 1
    constant = DevRows(("",) * 50, labels, np.full(50, 2.0), None)
    assert "r = undefined" in plots.draw_scale(TASKS["sts"], constant).axes[0].get_title()


# --------------------------------------------------------------------------------------------------- several runs


def settings(tmp_path: Path, num_settings: int) -> list[Any]:
    data = write_dev_files(tmp_path / "data")
    runs = []
    for i in range(num_settings):
        for seed in (0, 1):
            predictions = {task: noisy(data, task, 0.05 * (i + 1), seed) for task in TASKS}
            path = tmp_path / f"r{i}{seed}"
            runs.append(FinishedRun.read(write_run(path, data, predictions, RECORDS, seed=seed, lr=float(i))))
    return settings_of(runs)


def test_settings_are_drawn_with_mean_and_sample_standard_deviation(tmp_path: Path) -> None:
    made = settings(tmp_path, 3)
    axes = plots.draw_comparison(made).axes
    assert [axis.get_title() for axis in axes] == ["sst accuracy", "para accuracy", "sts pearson", "mean"]
    assert [tick.get_text() for tick in axes[0].get_yticklabels()] == ["lr 0.0", "lr 1.0", "lr 2.0"]
    for place, setting in enumerate(made):
        values = setting.scores("mean")
        container = axes[3].containers[place]
        assert container.lines[0].get_xdata()[0] == pytest.approx(values.mean())
        (segment,) = container.lines[2][0].get_segments()
        assert segment[1][0] - segment[0][0] == pytest.approx(2 * values.std(ddof=1))
        bars = [
            of.get_segments()[0]
            for of in axes[3].collections
            if len(of.get_linewidths()) and of.get_linewidths()[0] == 5
        ]
        assert bars[place][:, 0] == pytest.approx(row_intervals(setting.runs)["mean"])


def test_curves_are_the_mean_dev_scores_of_the_last_stage_averaged_over_seeds(tmp_path: Path) -> None:
    (axis,) = plots.draw_curves(settings(tmp_path, 9)).axes
    expected = [record["dev"]["mean"] for record in RECORDS if record["stage"] == "finetune" and "dev" in record]
    drawn = lines(axis)
    assert len(drawn) == plots.NUM_CURVES
    for line in drawn.values():
        np.testing.assert_allclose(line.get_ydata(), expected)


def test_curves_of_settings_with_long_names_keep_a_line_and_a_label_each(tmp_path: Path) -> None:
    made = settings(tmp_path, 3)
    named = [replace(of, name=f"{'the same long beginning of all names ' * 3}{i}") for i, of in enumerate(made)]
    figure = plots.draw_curves(named)
    labels = [" ".join(text.get_text().split()) for text in figure.legends[0].get_texts()]
    assert labels == [of.name for of in named] and len(figure.axes[0].lines) == 3


def test_lines_that_are_shown_alike_in_one_panel_are_not_merged() -> None:
    figure, axes = plots._panels(["a", "b"])
    for axis in axes:
        axis.plot([0], [0], label="equal")
        axis.plot([0], [1], label="equal")
    plots._legend_below(figure, axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["equal", "equal"]


# ---------------------------------------------------------------------------------------------------- all pictures


NAMES = ("dev-scores", "losses", "learning-rate", "gradient-cosines", "task-shares", "confusion", "similarity-sts")


@pytest.mark.parametrize(("format", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_a_treated_run_has_every_picture_and_nothing_else_is_left(format: str, start: bytes, made: FinishedRun) -> None:
    before, state = np.random.get_state()[1].tolist(), dict(matplotlib.rcParams)
    paths = plots.write_plots(made, format)
    assert [path.name for path in paths] == [f"{name}.{format}" for name in NAMES]
    assert sorted(paths) == sorted((made.path / "plots").iterdir())
    assert all(path.read_bytes().startswith(start) for path in paths)
    assert np.random.get_state()[1].tolist() == before and dict(matplotlib.rcParams) == state


def test_pictures_are_told_in_words(made: FinishedRun) -> None:
    words = {plot.name: plots.in_words(plot.figure) for plot in plots.run_plots(made)}
    dev = [record["dev"] for record in TREATED if "dev" in record and record["stage"] == "finetune"]
    first, last = (of["para"]["accuracy"] for of in (dev[0], dev[-1]))
    assert f"finetune, sst accuracy from {dev[0]['sst']['accuracy']:.3g} to" in words["dev-scores"]
    assert f"para accuracy from {first:.3g} to {last:.3g}" in words["dev-scores"]
    assert re.search(r"sst-para -?0\.\d+, \d+% below 0", words["gradient-cosines"])
    assert "Pearson r = " in words["similarity-sts"] and all(words.values())
    majority = max(np.sum(made.results["confusion"]["para"], axis=1)) / 60
    assert f"para majority class {majority:.3g}" in words["dev-scores"]


def test_the_command_leaves_the_pictures_of_its_run(treated_run: Path) -> None:
    assert {path.name for path in (treated_run / "plots").iterdir()} == {f"{name}.png" for name in NAMES}


def test_what_a_run_does_not_have_is_not_drawn(made: FinishedRun) -> None:
    records = [r for r in RECORDS if "dev" not in r]
    one_task = [{**r, "draws": {"sst": 1}, "losses": {"sst": 1.0}} for r in records]
    for log, expected in ((one_task, {"losses", "learning-rate"}), ([], set())):
        (made.path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
        assert {plot.name for plot in plots.run_plots(made)} == expected | {"confusion", "similarity-sts"}
    (made.path / "predictions" / "sts-dev-rows.csv").write_text("broken")
    assert [plot.name for plot in plots.run_plots(made)] == ["confusion"]


def test_every_axis_is_named_and_lines_differ_in_more_than_colour(made: FinishedRun) -> None:
    for name, figure in ((plot.name, plot.figure) for plot in plots.run_plots(made)):
        for axis in figure.axes:
            shared = axis.get_shared_y_axes().get_siblings(axis)
            assert axis.get_xlabel() or figure.get_supxlabel() or "colorbar" in axis.get_label(), name
            assert any(other.get_ylabel() for other in shared), name
            drawn = list(lines(axis).values())
            drawn = [line for line in drawn if not str(line.get_label()).startswith(("best", "mean"))]
            scores = [line for line in drawn if "majority" not in str(line.get_label())]
            assert len({to_hex(line.get_color()) for line in scores}) == len(scores), name
            drawn = scores
            assert len({(line.get_linestyle(), line.get_marker()) for line in drawn}) == len(drawn), name


def test_no_window_system_and_no_shared_figure_is_touched(made: FinishedRun) -> None:
    script = f"""
import sys
from pathlib import Path
from reports.finished_run import FinishedRun
from reports.plots import write_plots
write_plots(FinishedRun.read(Path({str(made.path)!r})))
print([name for name in ("matplotlib.pyplot", "torch", "tkinter") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
