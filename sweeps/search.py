"""Searches hyper-parameters with Optuna: each trial is a run of its own, hopeless ones are ended early.

    python sweeps/search.py --trials 30 --out runs/search -- --data DIR --epochs 3

Flags of multitask_classifier.py behind `--` hold for every trial and leave the search. The first trial has the default
flags, so that a search shows what it gained. Stopped or killed, the same command goes on; on several machines, start it
on each with the same --storage and --study.
"""

import argparse
import ctypes
import fcntl
import platform
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

try:
    import optuna
except ImportError:
    sys.exit("error: optuna is not installed, expected `pip install -r requirements-dev.txt`")
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import BaseTrial, FixedTrial, FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bert import CheckpointError
from config import FlagError, make_parser, parse
from run import resolve
from run_record import CONFIG, METRICS, RESULTS, RunError, parse_records, read_json

COMMAND = (sys.executable, str(Path(__file__).resolve().parent.parent / "multitask_classifier.py"))
POLL_SECONDS = 0.5
RANDOM_TRIALS = 10  # before the sampler goes by what it has seen
TRIALS_BEFORE_PRUNING = 5
FIRST_PRUNED_EPOCH = 2
HEARTBEAT, GRACE_PERIOD = 10, 60  # seconds; a machine that was silent for longer has lost its trial

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
    "pretrain_epochs": CategoricalDistribution((0, 3, 10)),
}
ONLY_WITH: dict[str, tuple[str, Any]] = {"gradvac_beta": ("treatment", "gradvac"), "smart_weight": ("smart", True)}


class SearchError(ValueError):
    """The search cannot begin or go on; the message is one line for the user."""


class DefaultsFailed(SearchError):
    """The run with the default flags failed: so would most others."""


class RunFailed(Exception):
    """The run of a trial failed; the search goes on."""


@dataclass(frozen=True)
class Space:
    """What is searched where some flags are fixed. settings: of a run with only these flags."""

    fixed: tuple[str, ...]
    settings: Mapping[str, Any]
    distributions: dict[str, BaseDistribution]

    @classmethod
    def under(cls, fixed: Sequence[str]) -> "Space":
        """The parameters that the fixed flags leave open. Raises FlagError if these flags make no sense in a search."""
        given = vars(make_parser().parse_args(fixed))
        refused: list[str] = [name for name in ("out", "resume") if name in given]
        if given.get("option", "finetune") != "finetune":
            refused.append("option")
        if refused:
            reason = "expected no such flag behind --, a search fine-tunes in directories of its own"
            raise FlagError("\n".join(f"--{name} {given[name]}: {reason}" for name in refused))
        settings = resolve(parse(fixed))[0].to_dict()
        left_open = {
            name: narrowed(name, fixed, given, settings)
            for name in SPACE
            if name not in given and (name not in ONLY_WITH or given.get(*ONLY_WITH[name]) == ONLY_WITH[name][1])
        }
        return cls(tuple(fixed), settings, {name: item for name, item in left_open.items() if item is not None})

    def default_values(self) -> dict[str, Any]:
        """The defaults, as the first trial has them."""
        return self.suggest(FixedTrial({name: self.settings[name] for name in self.distributions}))

    def suggest(self, trial: BaseTrial) -> dict[str, Any]:
        """Values for a trial, of the parameters that do something together; numbers to three digits."""
        values: dict[str, Any] = {}
        for name, item in self.distributions.items():
            if name in ONLY_WITH:
                other, needed = ONLY_WITH[name]
                if values.get(other, self.settings[other]) != needed:
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


def narrowed(name: str, fixed: Sequence[str], given: Mapping[str, Any], settings: Mapping[str, Any]) -> BaseDistribution | None:
    """The parameter's values that go with the fixed flags, or None if these leave nothing to choose."""
    condition = as_flag(*ONLY_WITH[name]) if name in ONLY_WITH else []

    def is_accepted(value: Any) -> bool:
        try:
            parse([*fixed, *condition, *as_flag(name, value)])
        except FlagError:
            return False
        return True

    item, default = SPACE[name], settings[name]
    if isinstance(item, CategoricalDistribution):
        choices = [value for value in item.choices if is_accepted(value)]
        return CategoricalDistribution(choices) if len(choices) > 1 else None
    if name == "lr" and isinstance(item, FloatDistribution):
        item = FloatDistribution(item.low * default, item.high * default, log=item.log)
    return item if is_accepted(default) else None


# -------------------------------------------------------------------------------------------------------- a run


def start_run(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts multitask_classifier.py, which holds its log until it ends. On Linux it stops if this process dies."""
    libc, set_death_signal = ctypes.CDLL(None), 1
    with log.open("ab") as file:
        hold(file)
        return subprocess.Popen(
            [*COMMAND, *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process only, which then stops the run
            preexec_fn=(lambda: libc.prctl(set_death_signal, signal.SIGTERM)) if sys.platform == "linux" else None,
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a run, which writes its checkpoint first; interrupted while it waits for that, it kills the run."""
    process.terminate()
    try:
        process.wait()
    except BaseException:
        process.kill()
        raise


def hold(file: IO[bytes]) -> bool:
    """Locks a file for this process, and for children that inherit it; False if others hold it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


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
    """The error in a log, or whatever stands last in it."""
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return [*lines, *errors][-1] if lines else "no output"


# ------------------------------------------------------------------------------------------------------- trials


class Search:
    """A study, and the directory on this machine that holds the runs of its trials."""

    def __init__(self, study: optuna.Study, space: Space, out: Path, seed: int) -> None:
        self.study, self.space, self.out, self.seed = study, space, out, seed
        self.place = f"{platform.node()}:{out}"

    def run(self, num_trials: int) -> None:
        """Trials until so many have ended. Raises DefaultsFailed if the one with the defaults fails."""
        self.queue_killed_trials()
        if not any(is_default(trial) and trial.state != TrialState.FAIL for trial in self.study.trials):
            self.study.enqueue_trial(self.space.default_values(), {"defaults": True})
        while sum(has_ended(trial) for trial in self.study.trials) < num_trials:
            # A sampler for each trial: one that began again with its seed would draw the first trials once more.
            (seed,) = np.random.SeedSequence((self.seed, len(self.study.trials))).generate_state(1)
            self.study.sampler = optuna.samplers.TPESampler(n_startup_trials=RANDOM_TRIALS, seed=int(seed))
            self.study.optimize(self.run_trial, n_trials=1, catch=(RunFailed,), callbacks=[show])

    def queue_killed_trials(self) -> None:
        """Queues once more what this directory's last search left unfinished; Optuna does so for other machines."""
        retry = RetryHeartbeatStaleTrialCallback()
        queued = {number for trial in self.study.trials for number in retry.retry_history(trial)}
        for trial in self.study.trials:
            if trial.user_attrs.get("place") != self.place:
                continue
            if trial.state == TrialState.RUNNING:
                self.study.tell(trial.number, state=TrialState.FAIL)
            elif not was_killed(trial) or trial.number in queued:
                continue
            retry(self.study, trial)

    def run_trial(self, trial: Trial) -> float:
        """The mean dev score of a run with the flags that the study suggests.

        Raises TrialPruned if the run is stopped as hopeless, RunFailed or, for the defaults, DefaultsFailed.
        """
        trial.set_user_attr("place", self.place)
        flags = self.space.flags(self.space.suggest(trial))
        trial.set_user_attr("flags", flags)
        say(f"trial {trial.number}: {shlex.join(flags) or 'the defaults'}")
        folder = self.folder(trial.number)
        arguments = [*self.space.fixed, *flags, "--out", str(folder)]
        if self.take_over(trial.number):
            if (mean := result_mean(folder)) is not None:
                return mean
            arguments = ["--resume", str(folder)]
        process = start_run(arguments, folder.with_suffix(".log"))
        try:
            self.follow(trial, process)
        finally:
            stop(process)
        mean = result_mean(folder)
        if mean is None:
            problem = f"exit status {process.returncode}: {last_line(folder.with_suffix('.log'))}"
            trial.set_user_attr("error", problem)
            if is_default(trial):
                raise DefaultsFailed(f"trial {trial.number}, with the default flags, failed: {problem}")
            raise RunFailed
        return mean

    def follow(self, trial: Trial, process: subprocess.Popen[bytes]) -> None:
        """Tells the study of each epoch until the run's end. Raises TrialPruned, but never for the defaults."""
        reported: set[int] = set()
        has_ended = False
        while not has_ended:
            has_ended = process.poll() is not None
            for epoch, mean in dev_means(self.folder(trial.number) / METRICS).items():
                if epoch not in reported:
                    trial.report(mean, epoch)
                    reported.add(epoch)
                    can_stop = not has_ended and epoch < self.space.settings["epochs"] and not is_default(trial)
                    if can_stop and trial.should_prune():
                        raise optuna.TrialPruned
            time.sleep(0 if has_ended else POLL_SECONDS)

    def take_over(self, number: int) -> bool:
        """Gives a trial the run of the killed trial that it repeats; returns whether there is one that can go on."""
        for earlier in reversed(RetryHeartbeatStaleTrialCallback.retry_history(self.study.trials[number])):
            folder = self.folder(earlier)
            if not folder.is_dir():
                continue
            log = folder.with_suffix(".log")
            with log.open("ab") as file:
                if not hold(file):
                    say(f"{folder.name}: waiting for its run, which has outlived the last search")
                    fcntl.flock(file, fcntl.LOCK_EX)
            if (folder / CONFIG).is_file():
                log.rename(self.folder(number).with_suffix(".log"))
                folder.rename(self.folder(number))
                say(f"trial {number}: goes on with the run of trial {earlier}, which was killed")
                return True
            folder.rename(folder.with_name(f"{folder.name}-killed"))
        return False

    def folder(self, number: int) -> Path:
        return self.out / f"trial-{number}"


def is_default(trial: Trial | FrozenTrial) -> bool:
    """Whether a trial has the default flags."""
    return bool(trial.user_attrs.get("defaults"))


def was_killed(trial: FrozenTrial) -> bool:
    """Whether a trial ended without its run having failed; another has its flags, or will have."""
    return trial.state == TrialState.FAIL and "error" not in trial.user_attrs


def has_ended(trial: FrozenTrial) -> bool:
    """Whether a trial counts: finished, pruned, or failed of its own."""
    return trial.state.is_finished() and not was_killed(trial) and not (trial.value is None and is_default(trial))


def show(study: optuna.Study, trial: FrozenTrial) -> None:
    """A line on a trial that has ended."""
    if trial.state == TrialState.COMPLETE:
        is_best = study.best_trial.number == trial.number
        say(f"trial {trial.number}: mean {trial.value:.4f}" + (", the best so far" if is_best else ""))
    elif trial.state == TrialState.PRUNED:
        say(f"trial {trial.number}: ended early, mean {trial.value:.4f} after epoch {trial.last_step}")
    else:
        say(f"trial {trial.number}: failed, {trial.user_attrs['error']}")


def report(study: optuna.Study, space: Space) -> list[str]:
    """A table of the trials, and the command of the best."""
    lines = ["", f"{'trial':>5}  {'state':<9}{'mean':>7}  flags"]
    for trial in study.trials:
        mean = f"{trial.value:.4f}" if trial.value is not None else ""
        shown = "the defaults" if is_default(trial) else shlex.join(trial.user_attrs.get("flags", []))
        problem = f"  ({trial.user_attrs['error']})" if "error" in trial.user_attrs else ""
        lines.append(f"{trial.number:>5}  {trial.state.name.lower():<9}{mean:>7}  {shown}{problem}".rstrip())
    if not study.get_trials(states=(TrialState.COMPLETE,)):
        return [*lines, "", "no trial has finished"]
    best = study.best_trial
    command = ["python", "multitask_classifier.py", *space.fixed, *best.user_attrs["flags"]]
    lines += ["", f"best: trial {best.number}, mean {best.value:.4f}", f"    {shlex.join(command)}"]
    if any(is_default(trial) and trial.value == best.value for trial in study.trials):
        lines.append("no trial beat the defaults")
    return lines


# -------------------------------------------------------------------------------------------------- command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise SearchError(f"{message.replace('argument ', '', 1)}; flags of multitask_classifier.py stand behind --")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The search's own flags, and in `fixed` those of multitask_classifier.py behind `--`. Raises SearchError."""
    parser = _Parser(
        prog="sweeps/search.py",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=f"searched: {', '.join(SPACE)}, as far as FLAGS leave them open",
        allow_abbrev=False,
    )
    parser.add_argument("--trials", type=int, default=30, help="trials in all, those of earlier starts counted")
    parser.add_argument("--study", default="search", help="name of the study in the database")
    parser.add_argument("--storage", default="", metavar="URL", help="database; default an SQLite file in --out")
    parser.add_argument("--out", default="runs/search", metavar="DIR", help="where the runs go, one search a directory")
    parser.add_argument("--seed", type=int, default=0, help="seed of the search; the runs' own stands behind --")
    parser.add_argument("fixed", metavar="FLAGS", nargs="*", help="flags of multitask_classifier.py for every trial")
    own = parser.parse_args(arguments)
    for name, lowest in (("trials", 1), ("seed", 0)):
        if getattr(own, name) < lowest:
            raise SearchError(f"--{name} {getattr(own, name)}: expected {lowest} or more")
    return own


def open_study(own: argparse.Namespace, space: Space, out: Path) -> optuna.Study:
    """The study in the database, new or from earlier starts. Raises SearchError if it cannot be had or is another's."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    try:
        storage = RDBStorage(
            own.storage or f"sqlite:///{out / 'study.db'}",
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE_PERIOD,
            heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
        )
        pruner = optuna.pruners.MedianPruner(TRIALS_BEFORE_PRUNING, n_warmup_steps=FIRST_PRUNED_EPOCH)
        study = optuna.create_study(
            storage=storage, study_name=own.study, pruner=pruner, direction="maximize", load_if_exists=True
        )
    except (ImportError, SQLAlchemyError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise SearchError(f"--storage {own.storage or out}: cannot be used ({reason})") from None
    searched = {"flags": shlex.join(space.fixed), "space": repr(space.distributions)}
    if not study.trials:
        if runs := sorted(path.name for path in out.glob("trial-*")):
            raise SearchError(f"--out {own.out}: {runs[0]} in it is another search's, expected another directory")
        for name, value in searched.items():
            study.set_user_attr(name, value)
    begun = study.user_attrs
    if begun != searched:
        problem = f"`{begun.get('flags', '')}` behind --" if begun["flags"] != searched["flags"] else "another space"
        raise SearchError(f"--study {own.study}: was begun with {problem}, expected another --study and --out")
    return study


def say(line: str) -> None:
    print(line, flush=True)


def search(own: argparse.Namespace) -> None:
    """The whole search, from its flags to the table at its end."""
    space = Space.under(own.fixed)
    out = Path(own.out).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SearchError(f"--out {own.out}: cannot be made ({error.strerror})") from None
    with (out / "search.lock").open("ab") as lock:
        if not hold(lock):
            raise SearchError(f"--out {own.out}: another search is running in it, expected a directory of its own")
        study = open_study(own, space, out)
        Search(study, space, out, own.seed).run(own.trials)
    say("\n".join(report(study, space)))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0, 1 if the defaults fail, 2 for bad input, 130 when stopped."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        search(parse_arguments(arguments))
        return 0
    except (SearchError, FlagError, CheckpointError, RunError) as error:
        for line in str(error).split("\n"):
            print(f"error: {line}", file=sys.stderr)
        return 1 if isinstance(error, DefaultsFailed) else 2
    except KeyboardInterrupt:
        say(f"stopped; to go on: {shlex.join(['python', 'sweeps/search.py', *arguments])}")
        return 130


if __name__ == "__main__":
    sys.exit(main())
