"""Several runs side by side: what differs between their settings, and whether their scores differ by more than noise.

Two kinds of noise are told apart. Another seed gives another model: t tests over the seeds. Another sample of dev rows
gives another score of the same model: paired bootstrap over the rows.

Shape letters: R rows of a dev file, S resamples of them, U runs.
"""

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from finished_run import MEAN, DevRows, FinishedRun
from run_record import CONFIG, RunError, read_json
from tasks import TASKS

NUM_RESAMPLES = 2000
LEVEL = 0.05  # a smaller p is called a difference
ROUNDING = 1e-12  # scores that lie no further apart are equal
COUNTS_AT_ONCE = 4_000_000  # resampled row numbers held in memory

# What config.json holds besides settings, and the settings that do not change what is learned.
NO_SETTINGS = {"versions", "machine", "commit", "kernels", "data_files", "layout", "stages"}
WITHOUT_EFFECT = {"out", "resume", "threads", "seed", "tensorboard", "cache", "save_every", "eval_batch_size"}
NAMED_ELSEWHERE = {"pcgrad", "gradvac", "data"}  # by the treatment; by the files' checksums


# ---------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Setting:
    """Runs that differ in nothing but the seed.

    flags: the settings in which it differs from others that it is compared with, as they are shown. data: the name of
    its data, the same for all runs on the same dev files.
    """

    runs: tuple[FinishedRun, ...]
    flags: Mapping[str, str]
    data: str

    @property
    def name(self) -> str:
        """What tells it apart: the flags that differ, or else its runs' directories."""
        return ", ".join(f"{flag} {value}" for flag, value in self.flags.items()) or ", ".join(
            run.path.name for run in self.runs
        )

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.runs[0].tasks

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.config["seed"] for run in self.runs)

    def scores(self, name: str) -> np.ndarray:
        """(U,) scores of its runs: of a task, or their mean over the tasks."""
        return np.array([run.score(name) for run in self.runs])


def settings_of(runs: Sequence[FinishedRun]) -> list[Setting]:
    """The runs by setting, the best mean first; settings with more tasks and with the same data stand together.

    A run with the seed of another run of its setting is a setting of its own: the same run again, or the same flags in
    another version of the program.
    """
    data = data_names(runs)
    flags = _flags(runs)
    groups: dict[Any, list[int]] = {}
    seen: Counter[Any] = Counter()
    for i in sorted(range(len(runs)), key=lambda i: (runs[i].config["seed"], str(runs[i].path))):
        same = (data[i], *map(repr, flags[i].values()))
        repeat = (runs[i].config["seed"], same)
        groups.setdefault((seen[repeat], same), []).append(i)
        seen[repeat] += 1
    differing = [name for name in flags[0] if len({repr(of[name]) for of in flags}) > 1]
    shown = [dict(zip(differing, cells, strict=True)) for cells in _shown(flags, differing)]
    if len(set(data)) > 1:
        shown = [{"data": name, **of} for name, of in zip(data, shown, strict=True)]
    settings = [Setting(tuple(runs[i] for i in group), shown[group[0]], data[group[0]]) for group in groups.values()]
    return sorted(settings, key=lambda s: (s.data, -len(s.tasks), s.tasks, -float(s.scores(MEAN).mean())))


def _flags(runs: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    """The settings of each run that change what it learns; a flag that a run's program did not have has its default."""
    left_out = NO_SETTINGS | WITHOUT_EFFECT | NAMED_ELSEWHERE
    names = [name for name in dict.fromkeys(n for run in runs for n in run.config) if name not in left_out]
    defaults: dict[str, Any] = {}
    if any(name not in run.config for run in runs for name in names):
        from config import Config

        defaults = {item.name: item.default for item in fields(Config)}
    flags = [{name: run.config.get(name, defaults.get(name)) for name in names} for run in runs]
    return [{**of, **_start(run)} if of.get("checkpoint") else of for of, run in zip(flags, runs, strict=True)]


def _start(run: FinishedRun) -> dict[str, str]:
    """The checkpoint that a run started from, whatever its flag of the model says.

    Checkpoints of runs that differ in the seed alone, as their names say, are one.
    """
    path = Path(run.config["checkpoint"])
    try:
        seed = read_json(path / CONFIG)["seed"]
    except (RunError, KeyError, TypeError):
        return {"model": "", "checkpoint": str(path)}
    return {"model": "", "checkpoint": str(path.with_name(path.name.replace(f"seed{seed}", "seed*")))}


def _shown(flags: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[tuple[str, ...]]:
    """Cells of a table of these flags; of paths the last part where that tells them apart."""
    columns = []
    for name in names:
        cells = [_cell(of[name]) for of in flags]
        short = [Path(cell).name or cell for cell in cells]
        columns.append(short if len(set(short)) == len(set(cells)) else cells)
    return list(zip(*columns, strict=True)) if columns else [()] * len(flags)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "-" if value in ("", None) else str(value)


def data_names(runs: Sequence[FinishedRun]) -> list[str]:
    """A name of each run's data: the directory's, with a number behind it for other files of the same name.

    Data are the same if no train or dev file that two runs both read differs.
    """
    kinds: list[tuple[str, dict[str, str]]] = []
    result = []
    for run in runs:
        sums = run.data_checksums("train", "dev")
        kind = next((k for k in kinds if all(k[1].get(file, value) == value for file, value in sums.items())), None)
        if kind is None:
            folder = Path(run.config["data"]).name
            number = 1 + sum(name.partition(" #")[0] == folder for name, _ in kinds)
            kind = (f"{folder} #{number}" if number > 1 else folder, {})
            kinds.append(kind)
        kind[1].update(sums)
        result.append(kind[0])
    return result


def best_of(settings: Sequence[Setting], name: str) -> set[int]:
    """Numbers of the settings with the best score on their data; a mean is the best among settings of equal tasks.

    Where all that could be the best are equal, none is.
    """
    rivals: dict[Any, list[int]] = {}
    for i, setting in enumerate(settings):
        if name in (*setting.tasks, MEAN):
            rivals.setdefault((setting.data, setting.tasks if name == MEAN else None), []).append(i)
    best = set()
    for numbers in rivals.values():
        scores = {i: float(settings[i].scores(name).mean()) for i in numbers}
        if min(scores.values()) < max(scores.values()):
            best |= {i for i, score in scores.items() if score == max(scores.values())}
    return best


# ------------------------------------------------------------------------------------------------------- tests


@dataclass(frozen=True)
class Difference:
    """A difference of two scores: its 95% interval and the two-sided p of no difference, NaN where there is no test."""

    value: float
    low: float
    high: float
    p: float
    test: str

    @property
    def verdict(self) -> str:
        if math.isnan(self.p):
            return "untested"
        if max(abs(self.value), abs(self.low), abs(self.high)) < ROUNDING:
            return "no difference"
        return "different" if self.p < LEVEL else "within noise"


def seed_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """First minus second, tested over seeds: paired where both have the same seeds, else Welch's t test.

    first, second: scores by seed. None if one of them has fewer than two seeds. Scores that do not vary allow no test
    unless they are equal.
    """
    if len(first) < 2 or len(second) < 2:
        return None
    from scipy.stats import ttest_ind, ttest_rel

    is_paired = set(first) == set(second)
    a = np.array([first[seed] for seed in sorted(first)])
    b = np.array([second[seed] for seed in sorted(second)])
    value = float(a.mean() - b.mean())
    counts = f"n = {len(a)}" if is_paired else f"n = {len(a)} and {len(b)}"
    test = f"paired t, {counts}" if is_paired else f"Welch's t, {counts}"
    spreads = [np.ptp(a - b)] if is_paired else [np.ptp(a), np.ptp(b)]
    if max(spreads) < ROUNDING:
        p, bound = (1.0, 0.0) if abs(value) < ROUNDING else (math.nan, math.nan)
        return Difference(value, bound, bound, p, test)
    with warnings.catch_warnings(action="ignore"):
        result = ttest_rel(a, b) if is_paired else ttest_ind(a, b, equal_var=False)
    interval = result.confidence_interval(1 - LEVEL)
    return Difference(value, float(interval.low), float(interval.high), float(result.pvalue), test)


def resampled_scores(task: str, rows: Sequence[DevRows], num_resamples: int = NUM_RESAMPLES) -> np.ndarray:
    """(S, U) scores of U runs on S resamples of the dev rows, the same resamples for all: accuracy or Pearson r.

    A correlation that is undefined on a resample counts as 0. The resamples depend on the task and the number of rows
    alone.
    """
    labels = rows[0].labels
    predictions = np.stack([of.predictions for of in rows], 1)  # (R, U)
    statistic = _correlations if TASKS[task].output.num_classes is None else _accuracies
    generator = np.random.default_rng([list(TASKS).index(task), len(labels)])
    at_once = max(1, COUNTS_AT_ONCE // len(labels))
    parts = []
    for start in range(0, num_resamples, at_once):
        size = min(at_once, num_resamples - start)
        drawn = generator.integers(len(labels), size=(size, len(labels)))
        drawn += np.arange(size)[:, None] * len(labels)
        counts = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
        parts.append(statistic(counts.astype(np.float64), predictions, labels))
    return np.concatenate(parts)


def _accuracies(counts: np.ndarray, predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(S, U) from how often each row was drawn (S, R), predictions (R, U) and labels (R,)."""
    return counts @ (predictions == labels[:, None]) / len(labels)  # type: ignore[no-any-return]


def _correlations(counts: np.ndarray, predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """As `_accuracies`, from the sums that Pearson's r is made of."""
    x, y = predictions - predictions.mean(0), (labels - labels.mean())[:, None]
    mean_x, mean_y = counts @ x / len(labels), counts @ y / len(labels)  # (S, U), (S, 1)
    covariance = counts @ (x * y) / len(labels) - mean_x * mean_y
    variances = (counts @ x**2 / len(labels) - mean_x**2) * (counts @ y**2 / len(labels) - mean_y**2)
    is_defined = variances > 1e-18
    return np.where(is_defined, covariance / np.sqrt(np.where(is_defined, variances, 1.0)), 0.0)


def row_difference(value: float, first: np.ndarray, second: np.ndarray) -> Difference:
    """First minus second, tested over dev rows. first, second: (S,) scores on the same resamples.

    The interval holds the middle 95% of the resampled differences; p is twice the share on the rarer side of zero.
    """
    differences = first - second
    low, high = np.quantile(differences, [LEVEL / 2, 1 - LEVEL / 2])
    rarer = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    p = min(1.0, 2 * (rarer + 1) / (len(differences) + 1))
    return Difference(value, float(low), float(high), p, "paired bootstrap")


# -------------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class Comparison:
    """A setting against the best one, on a task or the mean. Differences are the other's score minus the best's."""

    best: Setting
    other: Setting
    name: str
    value: float
    over_seeds: Difference | None
    over_rows: Difference | None

    @property
    def verdict(self) -> str:
        """In words, how the other does beside the best."""
        tests = {"seeds": self.over_seeds, "dev rows": self.over_rows}
        verdicts = {of: "untested" if test is None else test.verdict for of, test in tests.items()}
        found = set(verdicts.values()) - {"untested"}
        if "different" not in found:
            return "not tested" if not found else "no difference" if found == {"no difference"} else "within noise"
        direction = "worse" if self.value < 0 else "better"
        sure, unsure = sorted(verdicts, key=lambda of: verdicts[of] != "different")
        if verdicts[unsure] == "different":
            return direction
        return f"{direction} over the {sure}, {verdicts[unsure]} over the {unsure}"


def compare(settings: Sequence[Setting]) -> tuple[list[Comparison], list[str]]:
    """Each setting against the best on its data, and lines on what could not be tested.

    The best is the first: among the settings with the most tasks that with the best mean. Single tasks are compared
    wherever both have them, means between settings of the same tasks only.
    """
    comparisons, notes = [], []
    for data in dict.fromkeys(setting.data for setting in settings):
        best, *others = [setting for setting in settings if setting.data == data]
        if others:
            samples, problems = _samples([best, *others])
            notes.extend(problems)
            comparisons += [c for other in others for c in _compare_two(best, other, samples)]
    return comparisons, notes


def _compare_two(best: Setting, other: Setting, samples: Mapping[str, Mapping[Path, np.ndarray]]) -> list[Comparison]:
    tasks = [task for task in best.tasks if task in other.tasks]
    names = [*tasks, MEAN] if best.tasks == other.tasks and len(tasks) > 1 else tasks
    result = []
    for name in names:
        value = float(other.scores(name).mean() - best.scores(name).mean())
        over_seeds = seed_difference(*(dict(zip(s.seeds, s.scores(name), strict=True)) for s in (other, best)))
        first, second = (_mean_samples(setting, name, samples) for setting in (other, best))
        over_rows = None if first is None or second is None else row_difference(value, first, second)
        result.append(Comparison(best, other, name, value, over_seeds, over_rows))
    return result


def _mean_samples(setting: Setting, name: str, samples: Mapping[str, Mapping[Path, np.ndarray]]) -> np.ndarray | None:
    """(S,) the setting's score on each resample, averaged over its runs, and for the mean over the tasks."""
    tasks = setting.tasks if name == MEAN else (name,)
    parts = [samples.get(task, {}).get(run.path) for task in tasks for run in setting.runs]
    known = [part for part in parts if part is not None]
    return np.mean(known, axis=0) if len(known) == len(parts) else None


def _samples(settings: Sequence[Setting]) -> tuple[dict[str, dict[Path, np.ndarray]], list[str]]:
    """Of each task and run the (S,) resampled scores, and why some runs have none."""
    samples: dict[str, dict[Path, np.ndarray]] = {}
    problems: list[str] = []
    for task in dict.fromkeys(task for setting in settings for task in setting.tasks):
        rows: dict[Path, DevRows] = {}
        for run in (run for setting in settings if task in setting.tasks for run in setting.runs):
            try:
                rows[run.path] = run.dev_rows(task)
            except RunError as error:
                problems.append(f"{run.path}: {task} is not tested over dev rows ({error})")
        same = {path: of for path, of in rows.items() if of.ids == next(iter(rows.values())).ids}
        problems += [f"{path}: {task} has other dev rows and is not tested over them" for path in rows.keys() - same]
        if len(same) > 1:
            samples[task] = dict(zip(same, resampled_scores(task, list(same.values())).T, strict=True))
    return samples, problems
