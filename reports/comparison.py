"""Several runs side by side: what differs between their settings, and whether their scores differ by more than noise.

Two kinds of noise are told apart. Another seed gives another model: t tests over the seeds. Another sample of dev rows
gives another score of the same model: paired bootstrap over the rows.

Shape letters: R rows of a dev file, S resamples of them, U runs.
"""

import functools
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reports.finished_run import MEAN, FinishedRun
from run_record import CONFIG, DevRows, RunError, read_json
from tasks import TASKS

NUM_RESAMPLES = 2000
LEVEL = 0.05  # a smaller p is called a difference
ROUNDING = 1e-12  # scores that lie no further apart are equal
ROWS_AT_ONCE = 4_000_000  # resampled row numbers held in memory
LONGEST_NAME = 40  # characters of a setting's name, where it can be told apart by as few

# What config.json holds besides settings, and the settings that do not change what is learned.
NO_SETTINGS = {"versions", "machine", "commit", "kernels", "data_files", "layout", "stages"}
WITHOUT_EFFECT = {"out", "resume", "threads", "seed", "tensorboard", "cache", "save_every", "eval_batch_size"}
WITHOUT_EFFECT |= {"name", "log", "format", "config"}
NAMED_ELSEWHERE = {"pcgrad", "gradvac", "data"}  # by the treatment; by the files' checksums


# ---------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Setting:
    """Runs that differ in nothing but the seed.

    name: tells it apart from the others that it is compared with. flags: the settings in which any of those differ, as
    they are shown. data: the name of its data, the same for all runs on the same dev files.
    """

    runs: tuple[FinishedRun, ...]
    name: str
    flags: Mapping[str, str]
    data: str

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
    data, flags = data_names(runs), _flags(runs)
    groups: dict[Any, list[int]] = {}
    seen: Counter[Any] = Counter()
    for i in sorted(range(len(runs)), key=lambda i: (runs[i].config["seed"], str(runs[i].path))):
        same = (data[i], *map(repr, flags[i].values()))
        repeat = (runs[i].config["seed"], same)
        groups.setdefault((seen[repeat], same), []).append(i)
        seen[repeat] += 1
    columns = {"data": data} | {name: _cells([of[name] for of in flags]) for name in flags[0]}
    shown = [{n: cells[group[0]] for n, cells in columns.items() if len(set(cells)) > 1} for group in groups.values()]
    settings = []
    for group, name, of in zip(groups.values(), names := short_names(shown), shown, strict=True):
        own = tuple(runs[i] for i in group)
        if names.count(name) > 1 or not of:
            name = f"{name} {', '.join(run.path.name for run in own)}".strip()
        settings.append(Setting(own, name, of, data[group[0]]))
    return sorted(settings, key=lambda s: (s.data, -len(s.tasks), s.tasks, -float(s.scores(MEAN).mean())))


def short_names(flags: Sequence[Mapping[str, str]]) -> list[str]:
    """Names of settings: the flags in which they are unlike most others, the shortest first; "base" without any.

    A number such as a learning rate is named only where words leave settings alike, and where the names would be long,
    so is every flag: names are as different as the settings. flags: of each setting the same flags.
    """

    def num_kinds(names: Sequence[str]) -> int:
        return len({tuple(of[name] for name in names) for of in flags})

    columns = {name: [of[name] for of in flags] for name in flags[0]}
    words = [name for name, cells in columns.items() if not all(re.fullmatch(r"[-+.e\d]+", cell) for cell in cells)]
    common = {n: cell for n, cells in columns.items() for cell in set(cells) if 2 * cells.count(cell) > len(cells)}
    names: list[str] = []
    for chosen in (list(words), []):
        for name in sorted(columns, key=lambda name: (name not in words, -len(set(columns[name])))):
            if num_kinds([*chosen, name]) > num_kinds(chosen):
                chosen.append(name)
        parts = [[_part(n, of[n]) for n in chosen if of[n] != common.get(n)] for of in flags]
        names = [", ".join(sorted(own, key=len)) or ("base" if chosen else "") for own in parts]
        if max(map(len, names)) <= LONGEST_NAME:
            break
    return names


def _part(flag: str, value: str) -> str:
    return {"yes": flag, "no": f"no {flag}"}.get(value, f"{flag} {value}")


def _flags(runs: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    """The settings of each run that change what it learns; a flag that a run's program did not have has its default."""
    left_out = NO_SETTINGS | WITHOUT_EFFECT | NAMED_ELSEWHERE
    names = [name for name in dict.fromkeys(n for run in runs for n in run.config) if name not in left_out]
    defaults: dict[str, Any] = {}
    if any(name not in run.config for run in runs for name in names):
        from config import Config

        defaults = Config().to_dict()
    flags = [{name: run.config.get(name, defaults.get(name)) for name in names} for run in runs]
    return [{**of, **_start(Path(str(of["checkpoint"])))} if of.get("checkpoint") else of for of in flags]


def _start(checkpoint: Path) -> dict[str, str]:
    """The checkpoint that a run started from, whatever its flag of the model says.

    Checkpoints of runs that differ in the seed alone, as their names say, are one.
    """
    with suppress(RunError, KeyError, TypeError):
        seed = read_json(checkpoint / CONFIG)["seed"]
        checkpoint = checkpoint.with_name(checkpoint.name.replace(f"seed{seed}", "seed*"))
    return {"model": "", "checkpoint": str(checkpoint)}


def _cells(values: Sequence[Any]) -> list[str]:
    """A flag's values as they are shown; of paths the last part where that tells them apart."""
    words = {"True": "yes", "False": "no", "": "-", "None": "-"}
    texts = [" ".join(map(str, value)) if isinstance(value, list) else str(value) for value in values]
    cells = [words.get(text, text) for text in texts]
    short = [Path(cell).name or cell for cell in cells]
    return short if len(set(short)) == len(set(cells)) else cells


def data_names(runs: Sequence[FinishedRun]) -> list[str]:
    """A name of each run's data: the directory's, and a number where runs have different data.

    Data are the same if no train or dev file that two runs both read differs.
    """
    kinds: list[dict[str, str]] = []
    numbers = []
    for run in runs:
        sums = run.data_checksums("train", "dev")
        fits = [
            i for i, kind in enumerate(kinds) if all(kind.get(file, value) == value for file, value in sums.items())
        ]
        numbers.append(fits[0] if fits else len(kinds))
        kinds += [] if fits else [{}]
        kinds[numbers[-1]].update(sums)
    folders = [Path(runs[numbers.index(number)].config["data"]).name for number in numbers]
    return [f"{of} #{number + 1}" if len(kinds) > 1 else of for of, number in zip(folders, numbers, strict=True)]


def best_of(settings: Sequence[Setting], name: str) -> set[int]:
    """Numbers of the settings with the best score on their data; a mean is the best among settings of equal tasks.

    Where all that could be the best are equal, none is.
    """
    best = set()
    for i, setting in enumerate(settings):
        if name in (*setting.tasks, MEAN):
            rivals = [s for s in settings if s.data == setting.data and name in (*s.tasks, MEAN)]
            scores = [s.scores(name).mean() for s in rivals if name != MEAN or s.tasks == setting.tasks]
            if min(scores) < max(scores) == setting.scores(name).mean():
                best.add(i)
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
        """How the first does beside the second."""
        if math.isnan(self.p):
            return "untested"
        if max(abs(self.value), abs(self.low), abs(self.high)) < ROUNDING:
            return "no difference"
        return "within noise" if self.p >= LEVEL else "worse" if self.value < 0 else "better"


def seed_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """First minus second, tested over seeds: paired where both have the same seeds, else Welch's t test.

    first, second: scores by seed. None if one of them has fewer than two seeds. Scores that do not vary allow no test
    unless they are equal.
    """
    if len(first) < 2 or len(second) < 2:
        return None
    from scipy.stats import ttest_ind, ttest_rel

    a, b = (np.array([of[seed] for seed in sorted(of)]) for of in (first, second))
    is_paired, value = set(first) == set(second), float(a.mean() - b.mean())
    test = f"paired t, n = {len(a)}" if is_paired else f"Welch's t, n = {len(a)} and {len(b)}"
    if max(np.ptp(a - b) if is_paired else max(np.ptp(a), np.ptp(b)), 0) < ROUNDING:
        p, bound = (1.0, 0.0) if abs(value) < ROUNDING else (math.nan, math.nan)
        return Difference(value, bound, bound, p, test)
    with warnings.catch_warnings(action="ignore"):
        result = ttest_rel(a, b) if is_paired else ttest_ind(a, b, equal_var=False)
    interval = result.confidence_interval(1 - LEVEL)
    return Difference(value, float(interval.low), float(interval.high), float(result.pvalue), test)


def resampled_scores(task: str, rows: DevRows) -> np.ndarray:
    """(S,) scores on S resamples of the dev rows: accuracy or Pearson r, 0 where a correlation is undefined.

    The resamples depend on the task and the number of rows alone, so the scores of two runs are paired.
    """
    from scipy.stats import bootstrap, pearsonr

    num_rows, hits = len(rows.labels), rows.predictions == rows.labels
    if num_rows < 2:
        raise RunError("fewer than two dev rows")

    def score(index: np.ndarray, axis: int) -> Any:  # index (S, R)
        if TASKS[task].output.num_classes is not None:
            return hits[index].mean(axis)
        return np.nan_to_num(pearsonr(rows.predictions[index], rows.labels[index], axis=axis).statistic)

    drawn = {"n_resamples": NUM_RESAMPLES, "batch": max(1, ROWS_AT_ONCE // num_rows), "method": "percentile"}
    generator = np.random.default_rng([list(TASKS).index(task), num_rows])
    with warnings.catch_warnings(action="ignore"):  # undefined correlations
        result = bootstrap((np.arange(num_rows),), score, vectorized=True, rng=generator, **drawn)
    return np.asarray(result.bootstrap_distribution)


@functools.cache
def run_samples(run: FinishedRun, task: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the dev rows, and (S,) scores of the run on resamples of them. Raises RunError if there are no rows."""
    rows = run.dev_rows(task)
    return rows.ids, resampled_scores(task, rows)


def middle(samples: np.ndarray) -> tuple[float, float]:
    """The interval that holds the middle 95% of the samples (S,)."""
    low, high = np.quantile(samples, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def row_intervals(runs: Sequence[FinishedRun]) -> dict[str, tuple[float, float]]:
    """95% intervals over dev rows of the mean score of runs of one setting: by task and of the mean, where known."""
    samples = {}
    for task in runs[0].tasks:
        with suppress(RunError):
            samples[task] = np.mean([run_samples(run, task)[1] for run in runs], axis=0)
    if len(samples) == len(runs[0].tasks):
        samples[MEAN] = np.mean(list(samples.values()), axis=0)
    return {name: middle(of) for name, of in samples.items()}


def paired_samples(first: Setting, second: Setting, tasks: Sequence[str]) -> list[np.ndarray]:
    """(S,) scores of both on the same resamples of the dev rows, the mean over their runs and these tasks.

    Raises RunError if a run has no dev rows, or others.
    """
    ids = [run_samples(second.runs[0], task)[0] for task in tasks]
    for run in (*first.runs, *second.runs):
        if [run_samples(run, task)[0] for task in tasks] != ids:
            raise RunError(f"{run.path}: other dev rows of {' or '.join(tasks)} than {second.runs[0].path}")
    return [np.mean([run_samples(run, task)[1] for task in tasks for run in s.runs], axis=0) for s in (first, second)]


def row_difference(value: float, first: np.ndarray, second: np.ndarray) -> Difference:
    """First minus second, tested over dev rows. first, second: (S,) scores on the same resamples.

    The interval holds the middle 95% of the resampled differences; p is twice the share on the rarer side of zero.
    """
    rarer = min(int((first <= second).sum()), int((first >= second).sum()))
    p = min(1.0, 2 * (rarer + 1) / (len(first) + 1))
    return Difference(value, *middle(first - second), p, "paired bootstrap")


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


def compare(settings: Sequence[Setting]) -> tuple[list[Comparison], list[str]]:
    """Each setting against the best on its data, and lines on what could not be tested.

    The best is the first: among the settings with the most tasks that with the best mean. Single tasks are compared
    wherever both have them, means between settings of the same tasks only.
    """
    comparisons, notes = [], []
    for data in dict.fromkeys(setting.data for setting in settings):
        best, *others = [setting for setting in settings if setting.data == data]
        for other in others:
            tasks = [task for task in best.tasks if task in other.tasks]
            for name in [*tasks, MEAN] if best.tasks == other.tasks and len(tasks) > 1 else tasks:
                value = float(other.scores(name).mean() - best.scores(name).mean())
                over_seeds = seed_difference(*(dict(zip(s.seeds, s.scores(name), strict=True)) for s in (other, best)))
                over_rows = None
                try:
                    over_rows = row_difference(value, *paired_samples(other, best, tasks if name == MEAN else [name]))
                except RunError as error:
                    notes.append(f"Not tested over dev rows: {error}")
                comparisons.append(Comparison(best, other, name, value, over_seeds, over_rows))
    return comparisons, list(dict.fromkeys(notes))
