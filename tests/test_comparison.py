"""Runs grouped by setting, and tests of differences against scipy, formulas, and plain resampling."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score

from config import Config
from helpers import THREE, Patch
from made_runs import made_run, write_dev_files
from reports.comparison import (
    NOT_COMPARED,
    NUM_RESAMPLES,
    Difference,
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


def names(setting: Setting) -> list[str]:
    return [run.path.name for run in setting.runs]


def run_on_other_data(folder: Path, **flags: Any) -> FinishedRun:
    (folder / "b").mkdir()
    return made_run(write_dev_files(folder / "b" / "data", 300, seed=1), "other", **flags)


def test_runs_that_differ_in_nothing_that_is_learned_but_the_seed_are_one_setting(files: Path) -> None:
    """A treatment is named once, and places and speed are not; the same run again is a setting of its own."""
    others = {"threads": 7, "out": "elsewhere", "resume": "x", "save_every": 5, "cache": "off", "commit": "f00"}
    kinds = ({"treatment": "pcgrad", "pcgrad": True, "smart": True}, {"treatment": "sum", "smart": False})
    seeds = [(seed, i, kind) for seed in (2, 0, 1) for i, kind in enumerate(kinds)]
    settings = settings_of(
        [made_run(files, f"r{i}{s}", seed=s, **kind, **(others if s else {})) for s, i, kind in seeds]
    )
    assert sorted(map(names, settings)) == [[f"r{i}{seed}" for seed in (0, 1, 2)] for i in range(2)]
    shown = {names(setting)[0]: setting.flags for setting in settings}
    assert shown["r00"] == {"treatment": "pcgrad", "smart": "yes"}
    assert shown["r10"] == {"treatment": "sum", "smart": "no"}
    settings = settings_of([made_run(files, "a"), made_run(files, "b"), made_run(files, "c", seed=1)])
    assert sorted(map(names, settings)) == [["a", "c"], ["b"]]
    assert sorted(setting.name for setting in settings) == ["a, c", "b"]


def test_a_flag_that_an_older_program_did_not_have_has_its_default(files: Path) -> None:
    old = made_run(files, "old")
    values = json.loads((old.path / "config.json").read_text())
    del values["smart_eta"], values["pooling"], values["pairs"], values["pretrain_weight_decay"]
    (old.path / "config.json").write_text(json.dumps(values))
    then = {"pooling": "pooler", "pairs": "cross", "pretrain_weight_decay": values["weight_decay"]}
    (same,) = settings_of([FinishedRun.read(old.path), made_run(files, "new", seed=1, **then)])
    assert names(same) == ["old", "new"]
    assert len(settings_of([FinishedRun.read(old.path), made_run(files, "other", seed=1, smart_eta=0.5)])) == 2


def test_every_entry_of_a_real_configuration_is_a_flag_or_known_to_be_none(treated_run: Path) -> None:
    entries = set(FinishedRun.read(treated_run).config)
    flags = set(Config().to_dict())
    assert flags <= entries and entries - flags <= NOT_COMPARED


def test_checkpoints_of_other_seeds_are_one_setting_and_hide_the_flag_of_the_model(files: Path) -> None:
    starts = [made_run(files, f"start-seed{seed}", seed=seed).path for seed in (0, 1)]
    runs = [made_run(files, f"r{s}", seed=s, checkpoint=str(start), model="minilm") for s, start in enumerate(starts)]
    settings = settings_of([*runs, made_run(files, "plain", noise=0.9, model="bert", checkpoint="")])
    assert [names(setting) for setting in settings] == [["r0", "r1"], ["plain"]]
    assert settings[0].flags == {"model": "-", "checkpoint": "start-seed*"}


def test_a_run_that_does_not_fine_tune_is_not_named_by_what_it_did_not_use(files: Path) -> None:
    short = {"epochs": 2, "pretrain_epochs": 3, "batch_size": 8, "lr": 1e-4, "treatment": "pcgrad", "pcgrad": True}
    runs = [made_run(files, "smart", noise=0.2, smart=True, **short), made_run(files, "plain", noise=0.4, **short)]
    runs += [made_run(files, "scored", noise=0.3, option="test", checkpoint="start")]
    runs += [made_run(files, "frozen", noise=0.5, option="pretrain", pretrain_epochs=3, batch_size=8)]
    found = {names(setting)[0]: setting for setting in settings_of(runs)}
    assert {name: setting.name for name, setting in found.items()} == {
        "smart": "smart, option finetune",
        "plain": "option finetune",
        "scored": "option test and 1 more",
        "frozen": "option pretrain",
    }
    assert found["frozen"].flags == {"option": "pretrain", "model": "minilm", "checkpoint": "-", "smart": "no"}
    of_scored = {"option": "test", "model": "-", "checkpoint": "start", "smart": "no"}
    assert found["scored"].flags == of_scored
    longer = made_run(files, "longer", noise=0.6, **{**short, "epochs": 9})
    with_longer = {names(setting)[0]: setting for setting in settings_of([*runs, longer])}
    assert with_longer["scored"].flags == {**of_scored, "epochs": "-"}


def test_soups_of_other_seeds_are_one_setting(files: Path) -> None:
    def soup(seed: int, *of: str) -> Any:
        starts = [str(files / f"{name}-seed{seed}") for name in of]
        return made_run(files, f"s{seed}{len(of)}", seed=seed, checkpoints=starts, model="minilm")

    settings = settings_of([soup(0, "pal", "random"), soup(1, "pal", "random"), soup(1, "pal", "random", "ema")])
    assert [len(setting.runs) for setting in settings] == [2, 1]
    soups = [setting.flags["checkpoints"] for setting in settings]
    assert soups == ["pal-seed* random-seed*", "pal-seed* random-seed* ema-seed*"]


def test_data_of_own_tasks_are_named_by_their_folder(monkeypatch: Patch) -> None:
    own = replace(TASKS["sts"], name="valence", folder="/x/own")
    monkeypatch.setitem(TASKS, "valence", own)

    def run(sums: dict[str, str], *tasks: str, data: str = "sample") -> Any:
        return SimpleNamespace(tasks=tasks, config={"data": data}, data_checksums=lambda *splits: sums)

    alone, beside = run({"valence-dev": "a"}, "valence"), run({"valence-dev": "a", "sst-dev": "b"}, "valence", "sst")
    assert data_names([alone]) == ["own"] and data_names([beside]) == ["own + sample"]
    sst, para = run({"sst-dev": "b"}, "sst"), run({"para-dev": "c"}, "para")
    assert data_names([sst, para]) == ["sample", "sample"] and data_names([sst, alone]) == ["sample #1", "own #2"]
    assert data_names([sst, run({"para-dev": "c"}, "para", data="/y/other")]) == ["sample #1", "other #2"]
    both = run({"sst-dev": "b", "para-dev": "c"}, "sst", "para", data="/y/other")
    for some in itertools.permutations([beside, para, both, alone]):
        (name,) = {*data_names(some)}  # what joins two may come last
        assert {"own"} < {*name.split(" + ")} < {"own", "sample", "other", ""}
    other = run({"sst-dev": "d"}, "sst")
    for some in itertools.permutations([sst, other, both]):
        numbers = dict(zip(map(id, some), (of[-1] for of in data_names(some)), strict=True))
        assert numbers[id(sst)] == numbers[id(both)] != numbers[id(other)]


def test_of_paths_the_last_part_is_shown_where_that_tells_them_apart(files: Path) -> None:
    runs = [made_run(files, name, model=model) for name, model in (("a", "/x/one"), ("b", "/y/two"))]
    assert {s.flags["model"] for s in settings_of(runs)} == {"one", "two"}
    runs.append(made_run(files, "c", model="/z/two"))
    assert {s.flags["model"] for s in settings_of(runs)} == {"/x/one", "/y/two", "/z/two"}


def test_data_are_told_apart_by_their_content(files: Path, tmp_path: Path) -> None:
    first, fewer = made_run(files, "first"), made_run(files, "fewer", tasks=("sst",))
    elsewhere = made_run(write_dev_files(tmp_path / "copy", 300), "elsewhere")
    other = run_on_other_data(tmp_path)
    assert data_names([first, fewer, elsewhere, first]) == ["data"] * 4
    assert data_names([first, fewer, other]) == ["data #1", "data #1", "data #2"]
    settings = settings_of([first, elsewhere, other])
    assert [(s.data, s.flags["data"]) for s in settings] == [("data #1", "data #1")] * 2 + [("data #2", "data #2")]


def test_the_best_mean_comes_first_and_more_tasks_before_fewer(files: Path) -> None:
    bad, good = made_run(files, "bad", 0.5, lr=1.0), made_run(files, "good", 0.1, lr=2.0)
    single = made_run(files, "single", 0.01, tasks=("sst",), lr=3.0)
    settings = settings_of([single, bad, good])
    assert [names(setting)[0] for setting in settings] == ["good", "bad", "single"]
    assert [best_of(settings, name) for name in ("mean", "sst", "sts")] == [{0}, {2}, {0}]
    assert best_of(settings[:1], "sts") == set()
    twins = settings_of([good, made_run(files, "twin", 0.1, lr=9.0), bad])
    assert best_of(twins, "mean") == {0, 1} and best_of(twins[:2], "mean") == set()


def test_a_setting_has_the_name_that_its_runs_were_given_and_none_is_merged_by_it(files: Path) -> None:
    given = [made_run(files, f"a{s}", seed=s, lr=1.0, name="mine", processor=f"p{s}") for s in (0, 1)]
    other, third = made_run(files, "b", lr=2.0), made_run(files, "c", lr=3.0, name="mine")
    assert sorted(s.name for s in settings_of([*given, other])) == ["lr 2.0", "mine"]
    found = {s.name: names(s) for s in settings_of([*given, other, third])}
    assert found == {"mine a0, a1": ["a0", "a1"], "lr 2.0": ["b"], "mine c": ["c"]}
    mixed = settings_of([made_run(files, f"d{s}", seed=s, lr=4.0, name=f"n{s}") for s in (0, 1)] + [other])
    assert sorted(s.name for s in mixed) == ["lr 2.0", "lr 4.0"]


def test_heads_that_were_not_chosen_are_called_by_their_kind(files: Path) -> None:
    def layout(kind: str) -> dict[str, Any]:
        return {"layout": {"tasks": {task: {"head": {"name": kind, "parameters": {}}} for task in THREE}}}

    runs = [made_run(files, "default", **layout("linear")), made_run(files, "mlp", head=["mlp"], **layout("mlp"))]
    assert sorted(setting.name for setting in settings_of(runs)) == ["head linear", "head mlp"]
    runs.append(made_run(files, "again", seed=1, head=["linear"], **layout("linear")))
    assert [len(setting.runs) for setting in settings_of(runs) if setting.flags["head"] == "linear"] == [2]


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
        # What is told apart by having none of what the others are named by is named by what it has.
        (
            {"scheduler": "pal pal random", "copied": "0 2 0", "smart": "yes no no"},
            ["smart", "copied 2", "scheduler random"],
        ),
        ({"lr": "1 2 1 2 1", "pal": "no no yes yes yes", "seeds": "3 4 3 4 5"},
         ["no pal, seeds 3", "no pal, seeds 4 and 1 more", "seeds 3", "seeds 4 and 1 more", "seeds 5"]),
        # A flag without a value names nothing, unless there is nothing else.
        ({"model": "minilm - -", "checkpoint": "- one two"}, ["model minilm", "checkpoint one", "checkpoint two"]),
        ({"head": "lstm lstm -", "lr": "1 2 1"}, ["base", "lr 2", "no head"]),
        # Long names are cut down to the flags that are needed, and never to equal ones.
        ({"model": f"{'a' * 50} {'b' * 50}", "head": "mlp lstm"}, [f"model {x * 50} and 1 more" for x in "ab"]),
    ],
)  # fmt: skip
def test_names_are_short_and_different(columns: dict[str, str], names: list[str]) -> None:
    settings = flags(**columns)
    assert short_names(settings, [{"draws"}] * len(settings)) == names


def test_a_name_says_how_many_flags_it_leaves_out() -> None:
    """But for what means that a method is not used, and what the program chose."""
    settings = flags(treatment="sum pcgrad", smart="no yes", scale="equal own", average="none ema", draws="1 16")
    assert short_names(settings, [{"draws"}, set()]) == ["treatment sum and 1 more", "treatment pcgrad and 4 more"]


def test_names_of_any_settings_are_different() -> None:
    draw, answers = np.random.default_rng(0), ["yes", "no", "word", "7", "8.5"]
    for _ in range(50):
        settings = flags(**{f"flag{'x' * 9 * k}": " ".join(draw.choice(answers, 6)) for k in range(5)})
        assert len(set(short_names(settings, [set()] * 6))) == len({tuple(of.values()) for of in settings})


def by_seed(values: np.ndarray, first: int = 0) -> dict[int, float]:
    return {first + i: float(value) for i, value in enumerate(values)}


@pytest.mark.parametrize("is_paired", [True, False])
def test_scores_of_the_same_seeds_are_paired_and_others_tested_by_welch(is_paired: bool) -> None:
    a = DRAW.normal(0.7, 0.05, 6)
    b = a + DRAW.normal(0.01, 0.01, 6)
    second = by_seed(b, first=0 if is_paired else 3)
    found = seed_difference(by_seed(a), dict(reversed(second.items())))
    expected = stats.ttest_rel(a, b) if is_paired else stats.ttest_ind(a, b, equal_var=False)
    assert (found.value, found.p) == pytest.approx((float(np.mean(a - b)), expected.pvalue))
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_p_is_twice_the_share_of_resamples_on_the_rarer_side_of_zero() -> None:
    differences = np.repeat([0.1, 0.0, -0.1], [1950, 20, 29])
    found = row_difference(0.1, differences, np.zeros(1999))
    assert found.p == pytest.approx(2 * (49 + 1) / 2000)
    assert row_difference(-0.1, -differences, np.zeros(1999)).p == found.p
    assert row_difference(0.0, np.zeros(99), np.zeros(99)).p == 1


@pytest.mark.parametrize(
    ("numbers", "verdict"),
    [((-0.1, -0.2, -0.01, 0.03), "worse"), ((0.1, 0.05, 0.2, 0.03), "better"), ((0.1, -0.1, 0.2, 0.05), "within noise"),
     ((0, 0, 0, 1), "no difference"), ((0.1,), "untested")],
)  # fmt: skip
def test_a_verdict_follows_from_p_and_the_sign(numbers: tuple[float, ...], verdict: str) -> None:
    found = Difference(*numbers)
    assert found.verdict == verdict
    low, high = numbers[1:3] if len(numbers) > 1 else (0, 0)
    parts = (verdict, f"p {found.p:.3f}", f"{low:+.3f} to {high:+.3f}")
    assert found.parts == (parts if verdict != "untested" else ())


@pytest.mark.filterwarnings("error")
def test_too_few_seeds_or_none_that_vary_allow_no_test() -> None:
    one, two = {0: 0.5}, {0: 0.5, 1: 0.6}
    for a, b in ((one, two), (two, one), (two, {0: 0.4, 1: 0.5})):
        assert seed_difference(a, b).verdict == "untested"
    for a, b in ((two, dict(two)), ({0: 0.5, 1: 0.5}, {2: 0.5, 3: 0.5})):
        assert (seed_difference(a, b).value, seed_difference(a, b).verdict) == (0, "no difference")


def rows_of(labels: np.ndarray, predictions: np.ndarray) -> DevRows:
    return DevRows(tuple(map(str, range(len(labels)))), labels, predictions, None)


def two_runs(task: str, num_rows: int) -> list[DevRows]:
    draw = np.random.default_rng(num_rows)
    if task == "sts":
        labels = draw.uniform(0, 5, num_rows)
        return [rows_of(labels, labels + draw.normal(0, noise, num_rows)) for noise in (1.0, 2.0)]
    labels = draw.integers(0, TASKS[task].output.num_classes or 0, num_rows).astype(float)
    return [rows_of(labels, np.where(draw.random(num_rows) < 0.7, labels, 0.0)) for _ in range(2)]


@pytest.mark.parametrize("task", ["sst", "para", "sts"])
def test_scores_on_resamples_are_those_of_the_rows_drawn(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs are scored on the same draws, in parts as large as memory allows, and on the same draws again."""
    first, second = two_runs(task, 50)
    whole = resampled_scores(task, first)
    monkeypatch.setattr("reports.comparison.ROWS_AT_ONCE", 50 * 7)
    assert np.array_equal(resampled_scores(task, first), whole) and len(whole) == NUM_RESAMPLES
    generator = np.random.default_rng([list(TASKS).index(task), 50])
    drawn = generator.integers(50, size=(NUM_RESAMPLES, 50))
    for rows in (first, second):
        found = resampled_scores(task, rows)
        for number in range(0, NUM_RESAMPLES, 100):
            y, p = rows.labels[drawn[number]], rows.predictions[drawn[number]]
            expected = stats.pearsonr(p, y).statistic if task == "sts" else accuracy_score(y, p)
            assert found[number] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("task", "metric"), [("sst", "macro_f1"), ("para", "macro_f1"), ("sts", "spearman")])
def test_scores_on_resamples_are_by_the_metric_that_counts(
    task: str, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output: Any = TASKS[task].output
    monkeypatch.setitem(TASKS, task, replace(TASKS[task], output=replace(output, selection_metric=metric)))
    rows, _ = two_runs(task, 50)
    found, generator = resampled_scores(task, rows), np.random.default_rng([list(TASKS).index(task), 50])
    for number, drawn in enumerate(generator.integers(50, size=(NUM_RESAMPLES, 50))[:20]):
        expected = output.scores(rows.predictions[drawn], rows.labels[drawn])[metric]
        assert found[number] == pytest.approx(expected, abs=1e-12)


@pytest.mark.filterwarnings("error")
def test_predictions_that_are_all_equal_have_no_correlation() -> None:
    labels = DRAW.uniform(0, 5, 30)
    with pytest.raises(RunError, match="fewer than two dev rows"):
        resampled_scores("sst", rows_of(np.zeros(1), np.zeros(1)))
    assert np.array_equal(resampled_scores("sts", rows_of(labels, np.full(30, 2.7))), np.zeros(NUM_RESAMPLES))


def test_the_interval_of_a_score_is_the_middle_of_its_resamples(files: Path) -> None:
    runs = [made_run(files, f"r{s}", seed=s) for s in range(2)]
    found = row_intervals(runs)
    assert list(found) == [*THREE, "mean"]
    samples = {t: np.mean([resampled_scores(t, run.dev_rows(t)) for run in runs], axis=0) for t in THREE}
    assert found["sst"] == pytest.approx(np.quantile(samples["sst"], [0.025, 0.975]))
    assert found["mean"] == pytest.approx(np.quantile(np.mean(list(samples.values()), axis=0), [0.025, 0.975]))
    (runs[0].path / "predictions" / "para-dev-rows.csv").unlink()
    assert list(row_intervals([FinishedRun.read(runs[0].path)])) == ["sst", "sts"]


def test_a_planted_difference_is_found(files: Path) -> None:
    good = [made_run(files, f"good{s}", 0.1, seed=s, lr=1.0) for s in range(3)]
    bad = [made_run(files, f"bad{s}", 0.35, seed=s, lr=2.0) for s in range(3)]
    comparisons, notes = compare(settings_of([*bad, *good]))
    assert [c.name for c in comparisons] == ["sst", "para", "sts", "mean"] and notes == []
    for c in comparisons:
        value = c.other.scores(c.name).mean() - c.best.scores(c.name).mean()
        assert names(c.best)[0] == "good0" and value < -0.1
        for found in (c.over_seeds, c.over_rows):
            assert found.value == pytest.approx(value) and found.verdict == "worse"
            assert found.low < value < found.high < 0


def test_the_score_of_several_seeds_on_a_resample_is_their_mean(files: Path) -> None:
    runs = [made_run(files, f"r{s}", 0.1 + 0.1 * s, seed=s, lr=float(s == 2)) for s in range(3)]
    (mean,) = [c for c in compare(settings_of(runs))[0] if c.name == "mean"]
    samples = [np.mean([resampled_scores(task, run.dev_rows(task)) for task in THREE], axis=0) for run in runs]
    differences = samples[2] - np.mean(samples[:2], axis=0)
    assert mean.over_rows.low == pytest.approx(np.quantile(differences, 0.025), abs=1e-9)
    assert mean.over_rows.high == pytest.approx(np.quantile(differences, 0.975), abs=1e-9)


def test_tasks_in_common_are_compared_and_means_of_equal_tasks_only(files: Path, tmp_path: Path) -> None:
    both = made_run(files, "all", lr=1.0)
    pair = made_run(files, "pair", tasks=("sst", "sts"), lr=2.0)
    single = made_run(files, "single", tasks=("para",), lr=3.0)
    other = run_on_other_data(tmp_path, lr=4.0)
    comparisons, _ = compare(settings_of([both, pair, single, other]))
    assert [(names(c.other)[0], c.name) for c in comparisons] == [("pair", "sst"), ("pair", "sts"), ("single", "para")]
    assert all(names(c.best) == ["all"] for c in comparisons)


def test_what_cannot_be_tested_over_dev_rows_is_named_and_tested_over_seeds(files: Path, monkeypatch: Patch) -> None:
    """A file that is broken, and dev rows in another order."""
    runs = [made_run(files, f"r{lr}{s}", 0.3, seed=s, lr=float(lr)) for lr in (1, 2) for s in range(2)]
    (runs[0].path / "predictions" / "sst-dev-rows.csv").write_text("broken")
    comparisons, notes = compare(settings_of(runs))
    assert len(notes) == 1 and notes[0].startswith("Not tested over dev rows: ") and "r10" in notes[0]
    tested = {c.name: (c.over_rows.verdict != "untested", c.over_seeds.verdict != "untested") for c in comparisons}
    assert tested == {"sst": (False, True), "para": (True, True), "sts": (True, True), "mean": (False, True)}
    (runs[1].path / "predictions" / "para-dev-rows.csv").write_text("broken")
    runs = [replace(run) for run in runs]  # nothing of them is known yet
    two = compare(settings_of(runs))[1]
    monkeypatch.setattr("reports.comparison.NUM_NOTES", 1)
    assert len(two) == 2 and compare(settings_of(runs))[1] == [f"{two[0]} (and 1 more such lines)"]
    runs = [made_run(files, "a", lr=1.0), made_run(files, "b", lr=2.0)]
    path = runs[1].path / "predictions" / "sst-dev-rows.csv"
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *reversed(rows)]) + "\n")
    comparisons, notes = compare(settings_of(runs))
    assert "other dev rows of sst than" in notes[0] and len(notes) == 1
    assert [c.name for c in comparisons if c.over_rows.verdict == "untested"] == ["sst", "mean"]
