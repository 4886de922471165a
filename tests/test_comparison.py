"""Runs grouped by setting, and tests of differences against scipy, formulas, and plain resampling."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score

from config import Config
from made_runs import noisy, write_dev_files, write_run
from reports.comparison import (
    NAMED_ELSEWHERE,
    NO_SETTINGS,
    NUM_RESAMPLES,
    Setting,
    best_of,
    compare,
    data_names,
    resampled_scores,
    row_difference,
    row_intervals,
    seed_difference,
    settings_of,
    short_names,
)
from reports.finished_run import FinishedRun
from run_record import DevRows, RunError
from tasks import TASKS

DRAW = np.random.default_rng(11)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return write_dev_files(tmp_path / "data", 300)


def made(data: Path, name: str, noise: float = 0.3, tasks: tuple[str, ...] = tuple(TASKS), **flags: Any) -> FinishedRun:
    """A run whose predictions are wrong as often as `noise`; with the same seed and noise, the same predictions."""
    seed = flags.get("seed", 0)
    predictions = {task: noisy(data, task, noise, 100 + seed) for task in tasks}
    return FinishedRun.read(write_run(data.parent / name, data, predictions, **flags))


def names(setting: Setting) -> list[str]:
    return [run.path.name for run in setting.runs]


# ---------------------------------------------------------------------------------------------------- settings


def test_runs_that_differ_only_in_the_seed_are_one_setting(files: Path) -> None:
    runs = [made(files, f"r{seed}{lr}", seed=seed, lr=lr, threads=seed) for seed in (2, 0, 1) for lr in (1e-4, 2e-4)]
    settings = settings_of(runs)
    assert sorted(map(names, settings)) == [[f"r{seed}{lr}" for seed in (0, 1, 2)] for lr in (1e-4, 2e-4)]
    assert all(setting.seeds == (0, 1, 2) for setting in settings)
    assert {setting.flags["lr"] for setting in settings} == {"0.0001", "0.0002"}
    assert all(list(setting.flags) == ["lr"] for setting in settings)


def test_settings_without_effect_and_places_tell_no_runs_apart(files: Path) -> None:
    others = {"threads": 7, "out": "elsewhere", "resume": "x", "tensorboard": False, "save_every": 5, "cache": "off"}
    (setting,) = settings_of([made(files, "a"), made(files, "b", seed=1, eval_batch_size=3, commit="f00", **others)])
    assert names(setting) == ["a", "b"] and setting.flags == {}


def test_only_flags_that_differ_are_shown_and_a_treatment_once(files: Path) -> None:
    a = made(files, "a", treatment="pcgrad", pcgrad=True, draws_per_step=16, smart=True)
    b = made(files, "b", treatment="sum", draws_per_step=1, smart=False, checkpoint="")
    shown = {names(setting)[0]: setting.flags for setting in settings_of([a, b])}
    assert shown["a"] == {"draws_per_step": "16", "treatment": "pcgrad", "smart": "yes"}
    assert shown["b"] == {"draws_per_step": "1", "treatment": "sum", "smart": "no"}


def test_the_same_run_again_is_a_setting_of_its_own(files: Path) -> None:
    settings = settings_of([made(files, "a"), made(files, "b"), made(files, "c", seed=1)])
    assert sorted(map(names, settings)) == [["a", "c"], ["b"]]
    assert sorted(setting.name for setting in settings) == ["a, c", "b"]


def test_a_flag_that_an_older_program_did_not_have_has_its_default(files: Path) -> None:
    old = made(files, "old")
    values = json.loads((old.path / "config.json").read_text())
    del values["smart_eta"]
    (old.path / "config.json").write_text(json.dumps(values))
    (same,) = settings_of([FinishedRun.read(old.path), made(files, "new", seed=1)])
    assert names(same) == ["old", "new"]
    assert len(settings_of([FinishedRun.read(old.path), made(files, "other", seed=1, smart_eta=0.5)])) == 2


def test_every_entry_of_a_real_configuration_is_a_flag_or_known_to_be_none(treated_run: Path) -> None:
    entries = set(FinishedRun.read(treated_run).config)
    flags = set(Config().to_dict())
    assert flags <= entries and entries - flags <= NO_SETTINGS and flags >= NAMED_ELSEWHERE


def test_checkpoints_of_other_seeds_are_one_setting_and_hide_the_flag_of_the_model(files: Path) -> None:
    starts = [made(files, f"start-seed{seed}", seed=seed).path for seed in (0, 1)]
    runs = [made(files, f"r{s}", seed=s, checkpoint=str(start), model="minilm") for s, start in enumerate(starts)]
    settings = settings_of([*runs, made(files, "plain", noise=0.9, model="bert", checkpoint="")])
    assert [names(setting) for setting in settings] == [["r0", "r1"], ["plain"]]
    assert settings[0].flags == {"model": "-", "checkpoint": "start-seed*"}


def test_of_paths_the_last_part_is_shown_where_that_tells_them_apart(files: Path) -> None:
    runs = [made(files, name, model=model) for name, model in (("a", "/x/one"), ("b", "/y/two"))]
    assert {s.flags["model"] for s in settings_of(runs)} == {"one", "two"}
    runs.append(made(files, "c", model="/z/two"))
    assert {s.flags["model"] for s in settings_of(runs)} == {"/x/one", "/y/two", "/z/two"}


def test_data_are_told_apart_by_their_content(files: Path, tmp_path: Path) -> None:
    first, fewer = made(files, "first"), made(files, "fewer", tasks=("sst",))
    copy = write_dev_files(tmp_path / "copy", 300)
    elsewhere = made(copy, "elsewhere")
    (tmp_path / "b").mkdir()
    other = made(write_dev_files(tmp_path / "b" / "data", 300, seed=1), "other")
    assert data_names([first, fewer, elsewhere, first]) == ["data"] * 4
    assert data_names([first, fewer, other]) == ["data #1", "data #1", "data #2"]
    settings = settings_of([first, elsewhere, other])
    assert [(s.data, s.flags["data"]) for s in settings] == [("data #1", "data #1")] * 2 + [("data #2", "data #2")]


def test_the_best_mean_comes_first_and_more_tasks_before_fewer(files: Path) -> None:
    bad, good = made(files, "bad", 0.5, lr=1.0), made(files, "good", 0.1, lr=2.0)
    single = made(files, "single", 0.01, tasks=("sst",), lr=3.0)
    settings = settings_of([single, bad, good])
    assert [names(setting)[0] for setting in settings] == ["good", "bad", "single"]
    assert best_of(settings, "mean") == {0}
    assert best_of(settings, "sst") == {2}
    assert best_of(settings, "sts") == {0}
    assert best_of(settings[:1], "sts") == set()
    twins = settings_of([good, made(files, "twin", 0.1, lr=9.0), bad])
    assert best_of(twins, "mean") == {0, 1} and best_of(twins[:2], "mean") == set()


def flags(**columns: str) -> list[dict[str, str]]:
    """Of each setting its flags, from columns of words."""
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*map(str.split, columns.values()), strict=True)]


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        ({"lr": "1e-4 2e-4"}, ["lr 1e-4", "lr 2e-4"]),
        ({"smart": "no yes"}, ["no smart", "smart"]),
        # What most settings have is not named, nor is a number that follows from words.
        (
            {"scheduler": "pal pal pal random", "treatment": "sum pcgrad sum sum", "smart": "no no yes no",
             "draws": "1 16 1 1"},
            ["base", "treatment pcgrad", "smart", "scheduler random"],
        ),
        ({"lr": "1 2 1 2 1", "pal": "no no yes yes yes", "seeds": "3 4 3 4 5"},
         ["no pal, seeds 3", "no pal, seeds 4", "seeds 3", "seeds 4", "seeds 5"]),
        # Long names are cut down to the flags that are needed, and never to equal ones.
        ({"model": f"{'a' * 50} {'b' * 50}", "head": "mlp lstm"}, [f"model {'a' * 50}", f"model {'b' * 50}"]),
    ],
)  # fmt: skip
def test_names_are_short_and_different(columns: dict[str, str], names: list[str]) -> None:
    assert short_names(flags(**columns)) == names


def test_names_of_any_settings_are_different() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        columns = {f"flag{'x' * 9 * k}": " ".join(draw.choice(["yes", "no", "word", "7", "8.5"], 6)) for k in range(5)}
        settings = flags(**columns)
        assert len(set(short_names(settings))) == len({tuple(of.values()) for of in settings})


# ---------------------------------------------------------------------------------------------- tests over seeds


def by_seed(values: np.ndarray, first: int = 0) -> dict[int, float]:
    return {first + i: float(value) for i, value in enumerate(values)}


def test_scores_of_the_same_seeds_are_paired() -> None:
    a = DRAW.normal(0.7, 0.05, 6)
    b = a + DRAW.normal(0.01, 0.01, 6)
    found = seed_difference(by_seed(a), dict(reversed(by_seed(b).items())))
    expected = stats.ttest_rel(a, b)
    assert found is not None and found.test == "paired t, n = 6"
    assert (found.value, found.p) == pytest.approx((float(np.mean(a - b)), expected.pvalue))
    half = stats.t.ppf(0.975, 5) * np.std(a - b, ddof=1) / math.sqrt(6)
    assert (found.low, found.high) == pytest.approx((np.mean(a - b) - half, np.mean(a - b) + half))


@pytest.mark.parametrize("sizes", [(4, 7), (2, 2), (3, 3)])
def test_scores_of_other_seeds_are_tested_by_welch(sizes: tuple[int, int]) -> None:
    a, b = DRAW.normal(0.7, 0.01, sizes[0]), DRAW.normal(0.69, 0.04, sizes[1])
    found = seed_difference(by_seed(a), by_seed(b, first=1))
    assert found is not None and found.test == f"Welch's t, n = {sizes[0]} and {sizes[1]}"
    assert found.p == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue)
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))


@pytest.mark.filterwarnings("error")
def test_too_few_seeds_or_none_that_vary_allow_no_test() -> None:
    one, two = {0: 0.5}, {0: 0.5, 1: 0.6}
    assert seed_difference(one, two) is None and seed_difference(two, one) is None
    shifted = seed_difference({0: 0.5, 1: 0.6}, {0: 0.4, 1: 0.5})
    assert shifted is not None and math.isnan(shifted.p) and shifted.verdict == "untested"
    equal = seed_difference(two, dict(two))
    assert equal is not None and (equal.value, equal.p, equal.verdict) == (0, 1, "no difference")
    constant = seed_difference({0: 0.5, 1: 0.5}, {2: 0.5, 3: 0.5})
    assert constant is not None and constant.verdict == "no difference"


def test_a_difference_between_seeds_is_found_and_noise_is_not() -> None:
    a = DRAW.normal(0.70, 0.002, 5)
    far, near = seed_difference(by_seed(a), by_seed(a - 0.02 + DRAW.normal(0, 0.002, 5))), None
    near = seed_difference(by_seed(a), by_seed(a + np.array([0.01, -0.011, 0.012, -0.009, 0.0])))
    assert far is not None and far.verdict == "better" and near is not None and near.verdict == "within noise"


# -------------------------------------------------------------------------------------------- tests over dev rows


def rows_of(labels: np.ndarray, predictions: np.ndarray) -> DevRows:
    return DevRows(tuple(map(str, range(len(labels)))), labels, predictions, None)


def three_runs(task: str, num_rows: int) -> list[DevRows]:
    draw = np.random.default_rng(num_rows)
    if task == "sts":
        labels = draw.uniform(0, 5, num_rows)
        return [rows_of(labels, labels + draw.normal(0, noise, num_rows)) for noise in (1.0, 1.3, 2.0)]
    labels = draw.integers(0, TASKS[task].output.num_classes or 0, num_rows).astype(float)
    return [rows_of(labels, np.where(draw.random(num_rows) < 0.7, labels, 0.0)) for _ in range(3)]


@pytest.mark.parametrize("task", ["sst", "para", "sts"])
def test_scores_on_resamples_are_those_of_the_rows_drawn(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs are scored on the same draws, in parts as large as memory allows, and on the same draws again."""
    first, second, _ = three_runs(task, 50)
    whole = resampled_scores(task, first)
    monkeypatch.setattr("reports.comparison.ROWS_AT_ONCE", 50 * 7)
    assert np.array_equal(resampled_scores(task, first), whole) and len(whole) == NUM_RESAMPLES
    generator = np.random.default_rng([list(TASKS).index(task), 50])
    drawn = generator.integers(50, size=(NUM_RESAMPLES, 50))
    for rows in (first, second):
        found = resampled_scores(task, rows)
        for number in range(0, NUM_RESAMPLES, 40):
            y, p = rows.labels[drawn[number]], rows.predictions[drawn[number]]
            expected = stats.pearsonr(p, y).statistic if task == "sts" else accuracy_score(y, p)
            assert found[number] == pytest.approx(expected, abs=1e-12)


def test_another_task_of_as_many_rows_has_other_resamples() -> None:
    rows = three_runs("para", 60)[0]
    assert not np.array_equal(resampled_scores("para", rows), resampled_scores("sst", rows))


@pytest.mark.filterwarnings("error")
def test_predictions_that_are_all_equal_have_no_correlation() -> None:
    labels = DRAW.uniform(0, 5, 30)
    assert np.array_equal(resampled_scores("sts", rows_of(labels, np.full(30, 2.7))), np.zeros(NUM_RESAMPLES))


def test_a_single_dev_row_allows_no_test() -> None:
    with pytest.raises(RunError, match="fewer than two dev rows"):
        resampled_scores("sst", rows_of(np.zeros(1), np.zeros(1)))


def test_the_interval_of_a_score_is_the_middle_of_its_resamples(files: Path) -> None:
    runs = [made(files, f"r{s}", seed=s) for s in range(2)]
    found = row_intervals(runs)
    assert list(found) == [*TASKS, "mean"]
    samples = {t: np.mean([resampled_scores(t, run.dev_rows(t)) for run in runs], axis=0) for t in TASKS}
    assert found["sst"] == pytest.approx(np.quantile(samples["sst"], [0.025, 0.975]))
    assert found["mean"] == pytest.approx(np.quantile(np.mean(list(samples.values()), axis=0), [0.025, 0.975]))
    (runs[0].path / "predictions" / "para-dev-rows.csv").unlink()
    assert list(row_intervals([FinishedRun.read(runs[0].path)])) == ["sst", "sts"]


def test_p_is_twice_the_share_of_resamples_on_the_rarer_side_of_zero() -> None:
    differences = np.concatenate([np.full(1950, 0.1), np.full(20, 0.0), np.full(29, -0.1)])
    found = row_difference(0.1, differences, np.zeros(1999))
    assert found.p == pytest.approx(2 * (49 + 1) / 2000)
    assert row_difference(-0.1, -differences, np.zeros(1999)).p == found.p
    assert row_difference(0.0, np.zeros(99), np.zeros(99)).p == 1


# ------------------------------------------------------------------------------------------------- comparisons


def test_identical_runs_come_out_as_no_difference(files: Path) -> None:
    for seeds in ((0,), (0, 1, 2)):
        first = [made(files, f"a{seeds}{s}", seed=s, lr=1.0) for s in seeds]
        second = [made(files, f"b{seeds}{s}", seed=s, lr=2.0) for s in seeds]
        comparisons, notes = compare(settings_of([*first, *second]))
        assert [c.name for c in comparisons] == ["sst", "para", "sts", "mean"] and notes == []
        for c in comparisons:
            assert c.value == 0 and c.over_rows is not None and c.over_rows.verdict == "no difference"
            assert (c.over_rows.low, c.over_rows.high, c.over_rows.p) == (0, 0, 1)
            assert (c.over_seeds is None) == (len(seeds) == 1)


def test_a_planted_difference_is_found(files: Path) -> None:
    good = [made(files, f"good{s}", 0.1, seed=s, lr=1.0) for s in range(3)]
    bad = [made(files, f"bad{s}", 0.35, seed=s, lr=2.0) for s in range(3)]
    comparisons, _ = compare(settings_of([*bad, *good]))
    for c in comparisons:
        assert names(c.best)[0] == "good0" and c.value == pytest.approx(
            c.other.scores(c.name).mean() - c.best.scores(c.name).mean()
        )
        assert c.over_seeds is not None and c.over_rows is not None
        assert c.value < -0.1 and c.over_seeds.verdict == c.over_rows.verdict == "worse"
        assert c.over_rows.low < c.value < c.over_rows.high < 0


def test_a_difference_within_noise_is_called_so(files: Path) -> None:
    first, second = made(files, "a", 0.30, lr=1.0), made(files, "b", 0.30, lr=2.0, seed=2)
    comparisons, _ = compare(settings_of([first, second]))
    assert all(c.over_seeds is None for c in comparisons)  # of different seeds, one each
    assert {c.over_rows.verdict for c in comparisons if c.over_rows is not None} == {"within noise"}


def test_the_score_of_several_seeds_on_a_resample_is_their_mean(files: Path) -> None:
    runs = [made(files, f"r{s}", 0.1 + 0.1 * s, seed=s, lr=float(s == 2)) for s in range(3)]
    (mean,) = [c for c in compare(settings_of(runs))[0] if c.name == "mean"]
    samples = [np.mean([resampled_scores(task, run.dev_rows(task)) for task in TASKS], axis=0) for run in runs]
    differences = samples[2] - np.mean(samples[:2], axis=0)
    assert mean.over_rows is not None
    assert mean.over_rows.low == pytest.approx(np.quantile(differences, 0.025), abs=1e-9)
    assert mean.over_rows.high == pytest.approx(np.quantile(differences, 0.975), abs=1e-9)


def test_tasks_in_common_are_compared_and_means_of_equal_tasks_only(files: Path, tmp_path: Path) -> None:
    both = made(files, "all", lr=1.0)
    pair = made(files, "pair", tasks=("sst", "sts"), lr=2.0)
    single = made(files, "single", tasks=("para",), lr=3.0)
    (tmp_path / "b").mkdir()
    other = made(write_dev_files(tmp_path / "b" / "data", 300, seed=1), "other", lr=4.0)
    comparisons, _ = compare(settings_of([both, pair, single, other]))
    assert [(names(c.other)[0], c.name) for c in comparisons] == [("pair", "sst"), ("pair", "sts"), ("single", "para")]
    assert all(names(c.best) == ["all"] for c in comparisons)


def test_the_order_in_which_tasks_were_named_does_not_keep_means_apart(files: Path) -> None:
    runs = [made(files, "a", tasks=("sst", "sts")), made(files, "b", tasks=("sts", "sst"), seed=1)]
    assert [c.name for c in compare(settings_of(runs))[0]] == ["sst", "sts", "mean"]


def test_what_cannot_be_tested_over_dev_rows_is_named_and_tested_over_seeds(files: Path) -> None:
    runs = [made(files, f"r{lr}{s}", 0.3, seed=s, lr=float(lr)) for lr in (1, 2) for s in range(2)]
    (runs[0].path / "predictions" / "sst-dev-rows.csv").write_text("broken")
    comparisons, notes = compare(settings_of(runs))
    assert len(notes) == 1 and notes[0].startswith("Not tested over dev rows: ") and "r10" in notes[0]
    tested = {c.name: (c.over_rows is not None, c.over_seeds is not None) for c in comparisons}
    assert tested == {"sst": (False, True), "para": (True, True), "sts": (True, True), "mean": (False, True)}


def test_dev_rows_in_another_order_are_not_paired(files: Path) -> None:
    runs = [made(files, "a", lr=1.0), made(files, "b", lr=2.0)]
    path = runs[1].path / "predictions" / "sst-dev-rows.csv"
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *reversed(rows)]) + "\n")
    comparisons, notes = compare(settings_of(runs))
    assert "other dev rows of sst than" in notes[0] and len(notes) == 2  # of sst, and of all tasks together
    assert [c.name for c in comparisons if c.over_rows is None] == ["sst", "mean"]
