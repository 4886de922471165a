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
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reports.finished_run import MEAN, FinishedRun
from run_record import RECORD_KEYS, DevRows, RunError, mismatch
from tasks import TASKS

NUM_RESAMPLES = 2000
NUM_NOTES = 5  # on what could not be tested, at most
LEVEL = 0.05  # a smaller p is called a difference
ROUNDING = 1e-12  # scores that lie no further apart are equal
NOTHING = "-"  # the cell of a flag without a value
NONE = ("no", "none", "off")  # values that say that a method is not used
AND = "and"  # in a setting's name before the number of its flags that are not in it
FINETUNE = "finetune"  # the --option of most runs
ROWS_AT_ONCE = 4_000_000  # resampled row numbers held in memory

# Entries of config.json that are no settings, that change nothing of what is learned, or that are named elsewhere: by
# the treatment, and data by the checksums of their files.
NOT_COMPARED = RECORD_KEYS | {"data", "out", "resume", "threads", "seed", "tensorboard", "cache", "save_every"}
NOT_COMPARED |= {"eval_batch_size", "cuda_graphs", "name", "names", "log", "format", "config", "task_file"}
NOT_COMPARED |= {"pcgrad", "gradvac", "regularizers", "adapter"}  # other flags say the same


@dataclass(frozen=True)
class Setting:
    """Runs that differ in nothing but the seed.

    name: its runs' --name, or what tells it apart from the others that it is compared with. flags: the settings in
    which any of those differ, as they are shown. data: the name of its data, the same for all runs on the
    same dev files.
    """

    runs: tuple[FinishedRun, ...]
    name: str
    flags: Mapping[str, str]
    data: str

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.runs[0].tasks

    def scores(self, name: str) -> np.ndarray:
        """(U,) scores of its runs: of a task, or their mean over the tasks."""
        return np.array([run.score(name) for run in self.runs])


def settings_of(runs: Sequence[FinishedRun]) -> list[Setting]:
    """The runs by setting: by data, more tasks first, better means first. A seed twice makes two settings."""
    data, flags = data_names(runs), _flags(runs)
    groups: dict[Any, list[int]] = {}
    repeats: Counter[Any] = Counter()
    for i in sorted(range(len(runs)), key=lambda i: (runs[i].config["seed"], str(runs[i].path))):
        same = (data[i], *map(repr, flags[i].values()))
        repeat = (runs[i].config["seed"], same)
        groups.setdefault((repeats[repeat], same), []).append(i)
        repeats[repeat] += 1
    columns = {"data": data} | {name: _cells([of[name] for of in flags]) for name in flags[0]}
    shown = [{n: cells[group[0]] for n, cells in columns.items() if len(set(cells)) > 1} for group in groups.values()]
    automatic = [{n for j in group for n in runs[j].config.get("automatic", ())} for group in groups.values()]
    names = short_names(shown, automatic)
    for i, group in enumerate(groups.values()):
        given = {str(runs[j].config.get("name") or "") for j in group} - {""}
        names[i] = given.pop() if len(given) == 1 else names[i]
    settings = []
    for group, name, of in zip(groups.values(), names, shown, strict=True):
        own = tuple(runs[i] for i in group)
        if names.count(name) > 1 or not name:
            name = f"{name} {', '.join(run.path.name for run in own)}".strip()
        settings.append(Setting(own, name, of, data[group[0]]))
    return sorted(settings, key=lambda s: (s.data, -len(s.tasks), s.tasks, -float(s.scores(MEAN).mean())))


def titles(settings: Sequence[Setting]) -> list[str]:
    """The names of settings, with their data where those differ."""
    is_same = len({s.data for s in settings}) == 1
    return [s.name if is_same or s.data in s.name else f"{s.name} ({s.data})" for s in settings]


def short_names(flags: Sequence[Mapping[str, str]], automatic: Sequence[Set[str]]) -> list[str]:
    """Names of settings: as few flags as tell them apart, words before numbers such as a learning rate.

    A value that most settings have is not named; "base" has no other. A setting that is told apart by having none of
    what the others are named by has the name of its first other value. What else a setting has is counted. flags: of
    each setting the same flags. automatic: of each those that were left to the program, and are not counted.
    """
    columns = {name: [of[name] for of in flags] for name in flags[0]}
    numbers = {name for name, cells in columns.items() if all(re.fullmatch(r"[-+.e\d]+", cell) for cell in cells)}
    common = common_values(flags)
    shown, chosen = {"yes": "{0}", "no": "no {0}", NOTHING: "no {0}"}, list[str]()
    ordered = sorted(columns, key=lambda name: (name in numbers, -len(set(columns[name]))))
    for name in ordered:
        before, after = ({tuple(of[n] for n in names) for of in flags} for names in (chosen, [*chosen, name]))
        chosen += [name] if len(after) > len(before) else []
    found = []
    for of, own in zip(flags, automatic, strict=True):
        rare = [name for name in ordered if of[name] != common.get(name)]
        has = [name for name in rare if of[name] != NOTHING]
        named = [name for name in has if name in chosen] or has[:1] or rare[:1]
        parts = sorted((shown.get(of[name], "{0} {1}").format(name, of[name]) for name in named), key=len)
        others = [name for name in has if name not in (*named, *own) and of[name] not in NONE]
        more = f" {AND} {len(others)} more" if others else ""
        found.append(", ".join(parts) + more if parts else "base" if chosen else "")
    return found


def common_values(flags: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Of each flag the value that most of the settings have, if there is one."""
    columns = {name: [of[name] for of in flags] for name in flags[0]}
    return {n: cell for n, cells in columns.items() for cell in set(cells) if 2 * cells.count(cell) > len(cells)}


def _flags(runs: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    """The settings of each run that change what it learns; a flag that a run's program did not have has its default.

    Those that do nothing under a run's --option have the value that all others agree on, or none. The checkpoints
    that a run started from replace the flag of the model; where they are named after the run's seed, those of other
    seeds are the same.
    """
    names = [name for name in dict.fromkeys(n for run in runs for n in run.config) if name not in NOT_COMPARED]
    configs = [run.config for run in runs]
    if any(name not in config for config in configs for name in names):
        from config import Config, completed  # loads torch

        configs = [{**Config().to_dict(), **completed(config)} for config in configs]
    flags: list[dict[str, Any]] = [{name: config.get(name) for name in names} for config in configs]
    for run, of in zip(runs, flags, strict=True):
        of["head"] = of.get("head") or _heads(run.config)
    idle = [in_vain(config) for config in configs]
    for name in names:
        used = [of[name] for of, unused in zip(flags, idle, strict=True) if name not in unused]
        same = used[0] if used and all(value == used[0] for value in used) else None
        for of, unused in zip(flags, idle, strict=True):
            of[name] = same if name in unused else of[name]
    for run, of in zip(runs, flags, strict=True):
        own_seed = re.compile(rf"seed{run.config['seed']}(?!\d)")
        starts = [Path(path) for path in (of.get("checkpoint"), *(of.get("checkpoints") or ())) if path]
        cleaned = [str(path.with_name(own_seed.sub("seed*", path.name))) for path in starts]
        if of.get("checkpoint"):
            of.update(model="", checkpoint=cleaned[0])
        elif cleaned:
            of.update(model="", checkpoints=cleaned)
    return flags


def _heads(config: Mapping[str, Any]) -> list[str]:
    """The kind of the heads of a run that was not told of any, by its layout."""
    layout: Any = config.get("layout")
    if mismatch(layout, {"tasks": {...: {"head": {"name": str}}}}):
        return []
    kinds = {of["head"]["name"] for of in layout["tasks"].values()}
    return sorted(kinds) if len(kinds) == 1 else []


def in_vain(config: Mapping[str, Any]) -> set[str]:
    """The flags that do nothing under a run's --option."""
    if config.get("option", FINETUNE) == FINETUNE:
        return {"soup", *(["pretrain_epochs"] if config.get("checkpoint") else [])}
    from config import from_dict, idle_flags  # loads torch

    return idle_flags(from_dict(config), config)


def _cells(values: Sequence[Any]) -> list[str]:
    """A flag's values as they are shown; of paths the last part where that tells them apart."""
    words = {"True": "yes", "False": "no", "": NOTHING, "None": NOTHING}
    items = [[str(item) for item in (value if isinstance(value, list) else [value])] for value in values]
    ends = [[Path(item).name or item for item in of] for of in items]
    cells, short = ([words.get(text := " ".join(of), text) for of in kind] for kind in (items, ends))
    return short if len(set(short)) == len(set(cells)) else cells


def data_names(runs: Sequence[FinishedRun]) -> list[str]:
    """Of each run the directories of the data of all that belong to it, and a number where there are several such.

    Runs belong together that read the same files, or others of one directory; not where they read train or dev files
    of one name that differ.
    """
    kinds: list[tuple[list[int], dict[str, str], dict[str, str]]] = []  # runs, and by file its directory and checksum
    for i, run in enumerate(runs):
        folder_of = {task: Path(TASKS[task].folder or run.config["data"]).name for task in run.tasks}
        folders = {TASKS[task].file_key(split): of for task, of in folder_of.items() for split in ("train", "dev")}
        own, sums = [i], run.data_checksums("train", "dev")
        for kind in [*kinds]:
            others, places, known = kind
            is_near = {*places.values()} & {*folders.values()} or known.keys() & sums.keys()
            if is_near and all(known.get(file, x) == x for file, x in sums.items()):
                own, folders, sums = others + own, folders | places, known | sums
                kinds.remove(kind)
        kinds.append((own, folders, sums))
    kinds.sort(key=lambda kind: min(kind[0]))
    names: dict[int, str] = {}
    for number, (own, folders, _) in enumerate(kinds, 1):
        name = " + ".join(dict.fromkeys(folders.values()))
        names |= dict.fromkeys(own, f"{name} #{number}" if len(kinds) > 1 else name)
    return [names[i] for i in range(len(runs))]


def score_names(settings: Sequence[Setting]) -> dict[str, str]:
    """The tasks of any of them and the mean, and how their scores are called."""
    tasks = [name for name in TASKS if any(name in s.tasks for s in settings)]
    return {**{name: f"{name} {TASKS[name].output.selection_metric}" for name in tasks}, MEAN: MEAN}


def best_of(settings: Sequence[Setting], name: str) -> set[int]:
    """Numbers of the settings with the best score on their data, a mean among equal tasks; none where all are equal."""
    scores: dict[Any, dict[int, float]] = {}
    for i, s in enumerate(settings):
        if name in (*s.tasks, MEAN):
            scores.setdefault((s.data, s.tasks if name == MEAN else name), {})[i] = s.scores(name).mean()
    return {i for of in scores.values() for i in of if min(of.values()) < max(of.values()) == of[i]}


@dataclass(frozen=True)
class Difference:
    """A difference of two scores: its 95% interval and the two-sided p of no difference, NaN where there is no test."""

    value: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan

    @property
    def verdict(self) -> str:
        """How the first does beside the second."""
        if math.isnan(self.p):
            return "untested"
        if max(abs(self.value), abs(self.low), abs(self.high)) < ROUNDING:
            return "no difference"
        return "within noise" if self.p >= LEVEL else "worse" if self.value < 0 else "better"

    @property
    def parts(self) -> tuple[str, ...]:
        """Verdict, p and the interval, in words; nothing where nothing was tested."""
        if math.isnan(self.p):
            return ()
        p = "p < 0.001" if self.p < 0.001 else f"p {self.p:.3f}"
        return self.verdict, p, f"{self.low:+.3f} to {self.high:+.3f}"


def seed_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """First minus second, tested over seeds: paired where both have the same seeds, else Welch's t test.

    first, second: scores by seed. One seed allows no test, nor do scores that do not vary, unless they are equal.
    """
    from scipy.stats import ttest_ind, ttest_rel

    a, b = (np.array([of[seed] for seed in sorted(of)]) for of in (first, second))
    is_paired, value = set(first) == set(second), float(a.mean() - b.mean())
    if min(len(a), len(b)) < 2:
        return Difference(value)
    if max(map(np.ptp, [a - b] if is_paired else [a, b])) < ROUNDING:
        return Difference(value, 0, 0, 1) if abs(value) < ROUNDING else Difference(value)
    with warnings.catch_warnings(action="ignore"):  # of digits lost where scores hardly vary
        result = ttest_rel(a, b) if is_paired else ttest_ind(a, b, equal_var=False)
    low, high = map(float, result.confidence_interval(1 - LEVEL))
    return Difference(value, low, high, float(result.pvalue))


def resampled_scores(task: str, rows: DevRows) -> np.ndarray:
    """(S,) scores on S resamples of the dev rows by the metric that counts, 0 where a correlation is undefined.

    The resamples depend on the task and the number of rows alone, so the scores of two runs are paired.
    """
    from scipy.stats import bootstrap, pearsonr, rankdata

    num_rows, metric, classes = len(rows.labels), TASKS[task].output.selection_metric, TASKS[task].output.num_classes
    if num_rows < 2:
        raise RunError("fewer than two dev rows")

    def score(index: np.ndarray, axis: int) -> Any:  # index (S, R)
        predictions, labels = rows.predictions[index], rows.labels[index]
        if metric == "accuracy":
            return (predictions == labels).mean(axis)
        if metric == "macro_f1":
            of_classes = [(predictions == k, labels == k) for k in range(classes or 0)]
            return np.mean([2 * (p & t).sum(axis) / np.maximum(p.sum(axis) + t.sum(axis), 1) for p, t in of_classes], 0)
        if metric == "spearman":
            predictions, labels = rankdata(predictions, axis=axis), rankdata(labels, axis=axis)
        return np.nan_to_num(pearsonr(predictions, labels, axis=axis).statistic)

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


def mean_samples(runs: Sequence[FinishedRun], tasks: Sequence[str], like: FinishedRun) -> np.ndarray:
    """(S,) mean score of the runs on these tasks, on the same resamples of the dev rows.

    Raises RunError if a run has no dev rows, or others than the run `like`.
    """
    for run, task in ((run, task) for run in runs for task in tasks):
        if run_samples(run, task)[0] != run_samples(like, task)[0]:
            raise RunError(f"{run.path}: other dev rows of {task} than {like.path}")
    return np.asarray(np.mean([run_samples(run, task)[1] for run in runs for task in tasks], axis=0))


def middle(samples: np.ndarray) -> tuple[float, float]:
    """The interval that holds the middle 95% of the samples (S,)."""
    low, high = np.quantile(samples, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def row_intervals(runs: Sequence[FinishedRun]) -> dict[str, tuple[float, float]]:
    """95% intervals over dev rows of the mean score of runs of one setting: by task and of the mean, where known."""
    intervals = {}
    for name in (*(tasks := runs[0].tasks), MEAN):
        with suppress(RunError):
            intervals[name] = middle(mean_samples(runs, tasks if name == MEAN else [name], runs[0]))
    return intervals


def row_difference(value: float, first: np.ndarray, second: np.ndarray) -> Difference:
    """First minus second, which is the value, tested over dev rows. first, second: (S,) scores on the same resamples.

    The interval holds the middle 95% of the resampled differences; p is twice the share on the rarer side of zero.
    """
    rarer = min(int((first <= second).sum()), int((first >= second).sum()))
    p = min(1.0, 2 * (rarer + 1) / (len(first) + 1))
    return Difference(value, *middle(first - second), p)


@dataclass(frozen=True)
class Comparison:
    """A setting against the best one, on a task or the mean. Differences are the other's score minus the best's."""

    best: Setting
    other: Setting
    name: str
    over_seeds: Difference
    over_rows: Difference


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
                a, b = ({run.config["seed"]: run.score(name) for run in s.runs} for s in (other, best))
                over_seeds = seed_difference(a, b)
                try:
                    of_name = tasks if name == MEAN else [name]
                    samples = [mean_samples(s.runs, of_name, best.runs[0]) for s in (other, best)]
                    over_rows = row_difference(over_seeds.value, samples[0], samples[1])
                except RunError as error:
                    over_rows = Difference(over_seeds.value)
                    notes.append(f"Not tested over dev rows: {error}")
                comparisons.append(Comparison(best, other, name, over_seeds, over_rows))
    notes = list(dict.fromkeys(notes))
    if len(notes) > NUM_NOTES:
        notes[NUM_NOTES - 1 :] = [f"{notes[NUM_NOTES - 1]} (and {len(notes) - NUM_NOTES:,} more such lines)"]
    return comparisons, notes
