"""Searches hyper-parameters with Optuna: each trial is a run of its own, hopeless ones are ended early.

    python sweeps/search.py --trials 30 --out runs/search -- --data DIR --epochs 3

Flags of multitask_classifier.py behind `--` hold for every trial and leave the search, those of a TOML file that a
--config among them names as well. The first trial has the default flags, so that a search shows what it gained.
Stopped or killed, the same command goes on; on several machines, start it on each with the same --storage and --study,
and a trial that one of them lost is repeated after a minute.
"""

import argparse
import ctypes
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import BaseTrial, FixedTrial, FrozenTrial, Trial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bert import CheckpointError
from config import FlagError, make_parser, parse, written_out
from messages import SCRIPT, command, here, print_error
from run import resolve
from run_record import CONFIG, METRICS, RESULTS, RunError, parse_records, read_json

COMMAND = (sys.executable, str(SCRIPT))
POLL_SECONDS = 0.5
RANDOM_TRIALS = 10  # before the sampler goes by what it has seen
TRIALS_BEFORE_PRUNING = 5
FIRST_PRUNED_EPOCH = 2
TAKEN_OVER = "Cannot tell a FAIL trial."  # what Optuna says at the end of a trial that another worker took for lost
START_SECONDS = 2.0  # in which workers that begin at once make the database's tables and the first trial
HEARTBEAT: Any = {"heartbeat_interval": 10, "grace_period": 60}  # seconds; a machine silent for longer lost its trial

SPACE: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(1 / 4, 15 / 4, log=True),  # times the default: 2e-5 to 3e-4 for the embedded model
    "batch_size": CategoricalDistribution((16, 32, 64)),
    "scheduler": CategoricalDistribution(("pal", "random", "round_robin")),
    "warmup": FloatDistribution(0.0, 0.3),
    "weight_decay": FloatDistribution(1e-3, 0.1, log=True),
    "treatment": CategoricalDistribution(("sum", "pcgrad", "gradvac")),
    "gradvac_beta": FloatDistribution(1e-3, 0.5, log=True),
    "smart": CategoricalDistribution((False, True)),
    "smart_weight": FloatDistribution(0.1, 10.0, log=True),
    "drop_longest": CategoricalDistribution((0.0, 0.02)),
    "pretrain_epochs": CategoricalDistribution((0, 3, 25)),
}
ONLY_WITH: dict[str, tuple[str, Any]] = {"gradvac_beta": ("treatment", "gradvac"), "smart_weight": ("smart", True)}


class SearchError(ValueError):
    """The search cannot begin or go on; the message is one line for the user."""


@dataclass(frozen=True)
class Space:
    """What is searched where some flags are fixed. settings: of a run with only these flags, without its directory."""

    fixed: tuple[str, ...]
    settings: Mapping[str, Any]
    distributions: dict[str, BaseDistribution]

    @classmethod
    def under(cls, fixed: Sequence[str]) -> "Space":
        """The parameters that the fixed flags leave open. Raises FlagError if these flags make no sense in a search."""
        fixed = written_out(fixed)
        given = vars(make_parser().parse_args(fixed))
        for name in ("out", "resume", "option"):
            if given.get(name, "finetune") != "finetune":
                reason = "expected no such flag behind --, a search fine-tunes in directories of its own"
                raise FlagError(f"--{name} {given[name]}: {reason}")
        settings = resolve(parse(fixed))[0].to_dict()
        del settings["out"]  # named after the time, and each trial has its own
        in_vain = {name for name, (other, needed) in ONLY_WITH.items() if given.get(other, needed) != needed}
        narrow = {name: narrowed(name, fixed, settings[name]) for name in SPACE if name not in {*given, *in_vain}}
        return cls(tuple(fixed), settings, {name: item for name, item in narrow.items() if item is not None})

    def suggest(self, trial: BaseTrial) -> dict[str, Any]:
        """Values for a trial, of the parameters that do something together; numbers to three digits."""
        values: dict[str, Any] = {}
        for name, item in self.distributions.items():
            other, needed = ONLY_WITH.get(name, ("", None))
            if other and values.get(other, self.settings[other]) != needed:
                continue
            if isinstance(item, CategoricalDistribution):
                values[name] = trial.suggest_categorical(name, item.choices)
            elif isinstance(item, FloatDistribution):
                values[name] = float(f"{trial.suggest_float(name, item.low, item.high, log=item.log):.3g}")
        return values

    def flags(self, values: Mapping[str, Any]) -> list[str]:
        """The flags of values that are not the defaults."""
        others = {name: value for name, value in values.items() if value != self.settings[name]}
        return [part for name, value in others.items() for part in as_flag(name, value)]


def as_flag(name: str, value: Any) -> list[str]:
    """How a value stands on the command line."""
    return [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]


def narrowed(name: str, fixed: Sequence[str], default: Any) -> BaseDistribution | None:
    """The parameter's values that go with the fixed flags, or None if these leave nothing to choose."""
    item, flags = SPACE[name], [*fixed, *(as_flag(*ONLY_WITH[name]) if name in ONLY_WITH else [])]

    def is_accepted(value: Any) -> bool:
        try:
            return bool(parse([*flags, *as_flag(name, value)]))
        except FlagError:
            return False

    if isinstance(item, CategoricalDistribution):
        choices = [value for value in item.choices if is_accepted(value)]
        return CategoricalDistribution(choices) if len(choices) > 1 else None
    if name == "lr" and isinstance(item, FloatDistribution):
        item = FloatDistribution(item.low * default, item.high * default, log=item.log)
    return item if is_accepted(default) else None


def start_run(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts multitask_classifier.py. On Linux it stops if this process dies."""
    libc, set_death_signal = ctypes.CDLL(None), 1
    return subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=log.open("ab"),
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches this process only, which then stops the run
        preexec_fn=(lambda: libc.prctl(set_death_signal, signal.SIGTERM)) if sys.platform == "linux" else None,
    )


def dev_means(metrics: Path) -> dict[int, float]:
    """The mean dev score of each epoch of fine-tuning, as far as a run has written them."""
    lines = metrics.read_bytes().split(b"\n") if metrics.is_file() else []
    records = parse_records(b"\n".join(line for line in lines if b'"dev"' in line))
    means = {r["epoch"]: r["dev"]["mean"] for r in records if r["stage"] == "finetune" and "dev" in r}
    return {epoch: mean for epoch, mean in means.items() if mean is not None}  # None: not a number


def result_mean(folder: Path) -> float | None:
    """The mean dev score of a run that has ended, or None."""
    mean: float | None = read_json(folder / RESULTS)["dev"]["mean"] if (folder / RESULTS).is_file() else None
    return mean


def last_line(log: Path) -> str:
    """What stands last in a log, which is the error of a run that failed."""
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else "no output"


class Search:
    """A study, and the directory on this machine that holds the runs of its trials."""

    def __init__(self, study: optuna.Study, space: Space, out: Path, seed: int) -> None:
        self.study, self.space, self.out, self.seed = study, space, out, seed
        self.retry = RetryHeartbeatStaleTrialCallback()

    def run(self, num_trials: int, is_alone: bool, is_new: bool) -> None:
        """Trials until so many have ended. is_alone: a trial of this study that is said to be running was killed.
        is_new: this worker has begun the study."""
        for trial in self.study.get_trials(states=(TrialState.RUNNING,)) if is_alone else ():
            self.study.tell(trial.number, state=TrialState.FAIL)
            self.retry(self.study, trial)
        if not self.has_defaults():
            time.sleep(0 if is_alone or is_new else START_SECONDS)  # who has begun the study may be about to do it
        if not self.has_defaults():
            defaults = FixedTrial({name: self.space.settings[name] for name in self.space.distributions})
            self.study.enqueue_trial(self.space.suggest(defaults), {"defaults": True})
        show = [lambda _, trial: print(described(trial), flush=True)]
        while sum(has_ended(trial) for trial in self.study.trials) < num_trials:
            try:
                self.study.optimize(self.run_trial, 1, catch=(subprocess.CalledProcessError,), callbacks=show)
            except ValueError as error:
                if str(error) != TAKEN_OVER:
                    raise
                print("its worker had been silent: the trial was taken for lost and is repeated", flush=True)

    def has_defaults(self) -> bool:
        """Whether a trial of the default flags is there, or will be."""
        return any(is_default(trial) and trial.state != TrialState.FAIL for trial in self.study.trials)

    def run_trial(self, trial: Trial) -> float:
        """The mean dev score of a run with the flags that the study suggests; a trial's repetition resumes its run.

        Raises TrialPruned if the run is stopped as hopeless, CalledProcessError or, for the defaults, SearchError.
        """
        # A sampler for each trial: workers that begin together, or one that begins again, would draw the same trials.
        number = random.Random(f"{self.seed} {trial.number}").getrandbits(32)
        self.study.sampler = optuna.samplers.TPESampler(n_startup_trials=RANDOM_TRIALS, seed=number)
        flags = self.space.flags(self.space.suggest(trial))
        trial.set_user_attr("flags", flags)
        print(f"trial {trial.number}: {shlex.join(flags) or 'the defaults'}", flush=True)
        history = [*self.retry.retry_history(self.study.trials[trial.number]), trial.number]
        folder = self.out / f"trial-{history[0]}"
        arguments, log = [*self.space.fixed, *flags, "--out", str(folder)], folder.with_suffix(".log")
        if (folder / CONFIG).is_file():
            print(f"trial {trial.number}: goes on with the run of trial {history[0]}", flush=True)
            arguments = ["--resume", str(folder)]
        if result_mean(folder) is None:
            process = start_run(arguments, log)
            try:
                self.follow(trial, folder / METRICS, process)
            except KeyboardInterrupt:
                self.retry(self.study, self.study.trials[trial.number])
                raise
            finally:
                process.terminate()  # it writes its checkpoint first
                process.wait()
        if (mean := result_mean(folder)) is not None:
            return mean
        problem = f"exit status {process.returncode}: {last_line(log)}"
        trial.set_user_attr("error", problem)
        if is_default(trial):
            raise SearchError(f"trial {trial.number}, with the default flags, failed: {problem}")
        raise subprocess.CalledProcessError(process.returncode, arguments)

    def follow(self, trial: Trial, metrics: Path, process: subprocess.Popen[bytes]) -> None:
        """Tells the study of each epoch until the run's end. Raises TrialPruned, but never for the defaults."""
        reported, has_ended = set[int](), False
        while not has_ended:
            has_ended = process.poll() is not None
            new = {epoch: mean for epoch, mean in dev_means(metrics).items() if epoch not in reported}
            for epoch, mean in new.items():
                trial.report(mean, epoch)
                is_last = has_ended or epoch == self.space.settings["epochs"]
                if not is_last and not is_default(trial) and trial.should_prune():
                    raise optuna.TrialPruned
            reported |= new.keys()
            time.sleep(0 if has_ended else POLL_SECONDS)


def is_default(trial: Trial | FrozenTrial) -> bool:
    """Whether a trial has the default flags."""
    return bool(trial.user_attrs.get("defaults"))


def has_ended(trial: FrozenTrial) -> bool:
    """Whether a trial counts: finished, pruned, or failed of its own; killed ones and defaults are repeated."""
    failed = "error" in trial.user_attrs and not is_default(trial)
    return failed or trial.state in (TrialState.COMPLETE, TrialState.PRUNED)


def described(trial: FrozenTrial) -> str:
    """A line of the table of trials."""
    mean = "" if trial.value is None else f"{trial.value:.4f}"
    flags = "the defaults" if is_default(trial) else shlex.join(trial.user_attrs.get("flags", []))
    problem = f"  ({trial.user_attrs['error']})" if "error" in trial.user_attrs else ""
    is_stopped = trial.state == TrialState.FAIL and not problem  # a later trial repeats it
    state = "stopped" if is_stopped else trial.state.name.lower()
    return f"{trial.number:>5}  {state:<9}{mean:>7}  {flags}{problem}".rstrip()


def report(study: optuna.Study, space: Space) -> list[str]:
    """A table of the trials, and the command of the best."""
    lines = ["", f"{'trial':>5}  {'state':<9}{'mean':>7}  flags", *map(described, study.trials)]
    if any(is_default(trial) and trial.state == TrialState.RUNNING for trial in study.trials):
        lines += ["", "another worker has the defaults; if it was killed, a larger --trials repeats them"]
    if not study.get_trials(states=(TrialState.COMPLETE,)):
        return [*lines, "", "no trial has finished"]
    best = study.best_trial
    flags = [*space.fixed, *best.user_attrs["flags"]]
    lines += ["", f"best: trial {best.number}, mean {best.value:.4f}", f"    {command('python', here(), *flags)}"]
    if any(is_default(trial) and trial.value == best.value for trial in study.trials):
        lines.append("no trial beat the defaults")
    return lines


def open_study(own: argparse.Namespace, space: Space, out: Path) -> tuple[optuna.Study, bool]:
    """The study in the database, and whether it is new. Raises SearchError if it cannot be had or is another's."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    url, place = own.storage or f"sqlite:///{out / 'study.db'}", place_of(own, out)
    pruner = optuna.pruners.MedianPruner(TRIALS_BEFORE_PRUNING, n_warmup_steps=FIRST_PRUNED_EPOCH)
    options: Any = {"study_name": own.study, "pruner": pruner}
    try:
        storage = make_storage(url)
        try:
            study, is_new = optuna.create_study(storage=storage, direction="maximize", **options), True
        except optuna.exceptions.DuplicatedStudyError:
            study, is_new = optuna.load_study(storage=storage, **options), False
    except ImportError as error:
        problem = f"its driver is not installed ({error.__cause__ or error})"
        raise SearchError(f'{place}: {problem}; for PostgreSQL: pip install "psycopg[binary]"') from None
    except (SQLAlchemyError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise SearchError(f"{place}: cannot be used ({reason})") from None
    searched = f"{shlex.join(space.fixed)} {space.distributions}"
    failed = all(trial.state == TrialState.FAIL and not has_ended(trial) for trial in study.trials)
    if failed and not list(out.glob(f"trial-*/{CONFIG}")):  # no more than defaults that could not be trained with
        study.set_user_attr("searched", searched)
    if study.user_attrs.get("searched") != searched:
        problem = "was begun with other flags behind --, or another's runs are in --out"
        raise SearchError(f"--study {own.study}: {problem}, expected another --study and --out")
    return study, is_new


def without_password(url: str) -> str:
    """The address of a database as it may be shown."""
    try:
        return make_url(url).render_as_string()
    except ArgumentError:
        return url


def place_of(own: argparse.Namespace, out: Path) -> str:
    """Where the study is, for a message."""
    return f"--storage {without_password(own.storage) or out}"


def make_storage(url: str) -> RDBStorage:
    """The database at the address, its tables made if need be; its restart between two statements is not noticed."""
    retry, engine = RetryHeartbeatStaleTrialCallback(), {"pool_pre_ping": True}
    try:
        return RDBStorage(url, engine, heartbeat_stale_trial_callback=retry, **HEARTBEAT)
    except DBAPIError:  # another worker has been making them
        time.sleep(START_SECONDS)
        return RDBStorage(url, engine, heartbeat_stale_trial_callback=retry, **HEARTBEAT)


def first_cause(error: BaseException) -> str:
    """The first line of what the database's driver said, or else of the error that all others came from."""
    chain = [error]
    while (before := chain[-1].__context__) is not None:
        chain.append(before)
    of_driver = [of.orig for of in chain if isinstance(of, DBAPIError)]
    return str((of_driver or chain)[-1]).split("\n")[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0, 2 for bad input or if the defaults fail, 130 when stopped."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    summary, epilog = (__doc__ or "").split("\n\n")[0], f"searched: {', '.join(SPACE)}, as far as FLAGS leave them open"
    usage = "sweeps/search.py [-h] [--trials N] [--study NAME] [--storage URL] [--out DIR] [--seed N] [-- FLAGS ...]"
    parser = argparse.ArgumentParser(usage=usage, description=summary, epilog=epilog, allow_abbrev=False)
    add = parser.add_argument
    add("--trials", type=int, default=30, help="trials in all, those of earlier starts counted (default 30)")
    add("--study", default="search", help="name of the study in the database (default search)")
    add("--storage", default="", metavar="URL", help="database; default an SQLite file in --out")
    add("--out", default="runs/search", metavar="DIR", help="runs of this one search (default runs/search)")
    add("--seed", type=int, default=0, help="seed of the search; the runs' own stands behind --")
    add("fixed", metavar="FLAGS", nargs="*", help="flags of multitask_classifier.py for every trial")
    own = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.excepthook = lambda _: None  # the heartbeat's thread: where the database fails it, it fails the search
    out = Path(own.out).resolve()
    try:
        if own.trials < 1:
            raise SearchError(f"--trials {own.trials}: expected a number above 0")
        space = Space.under(own.fixed)
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / "search.lock", timeout=0):
            study, is_new = open_study(own, space, out)
            Search(study, space, out, own.seed).run(own.trials, is_alone=not own.storage, is_new=is_new)
        print("\n".join(report(study, space)))
        return 0
    except Timeout:
        print_error(SearchError(f"--out {own.out}: another search is running there, expected another directory"))
        return 2
    except (SearchError, FlagError, CheckpointError, RunError, OSError) as error:
        print_error(error)
        return 2
    except (StorageInternalError, UnboundLocalError) as error:  # the second is Optuna's, at the end of a trial
        problem = f"has failed ({first_cause(error)}); the same command goes on"
        print_error(SearchError(f"{place_of(own, out)}: {problem}"))
        return 2
    except KeyboardInterrupt:
        shown = without_password(own.storage)
        words = [word.replace(own.storage, shown) if own.storage else word for word in arguments]
        print(f"stopped; to go on: {command('python', here(Path(__file__).resolve()), *words)}")
        return 130


if __name__ == "__main__":
    sys.exit(main())
