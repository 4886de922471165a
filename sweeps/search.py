"""Searches hyper-parameters with Optuna: each trial is a run of its own, hopeless ones are ended early.

    python sweeps/search.py --trials 30 --out runs/search -- --data DIR --epochs 3

Flags of multitask_classifier.py behind `--` hold for every trial and leave the search. The first trial has the default
flags, so that a search shows what it gained. Stopped or killed, the same command goes on; on several machines, start it
on each with the same --storage and --study.
"""

import argparse
import ctypes
import fcntl
import importlib.util
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bert import CheckpointError
from config import Config, FlagError, make_parser, parse
from multitask_classifier import resolve
from run_record import CONFIG, METRICS, RESULTS, RunError, parse_records, read_json
from seeding import derive_seed

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

OPTUNA = "optuna==5.0.0"
COMMAND = (sys.executable, str(Path(__file__).resolve().parent.parent / "multitask_classifier.py"))
POLL_SECONDS = 0.2
RANDOM_TRIALS = 10  # before the sampler goes by what it has seen
TRIALS_BEFORE_PRUNING = 5
FIRST_PRUNED_EPOCH = 2


class SearchError(ValueError):
    """The search cannot begin or go on; the message is one line for the user."""


class DefaultsFailed(SearchError):
    """The run with the default flags failed: so would most others."""


# ------------------------------------------------------------------------------------------------- search space


@dataclass(frozen=True)
class Parameter:
    """A flag that is searched: among choices, or between bounds.

    relative: the bounds are factors of the flag's default. only_with: another flag and the value of it without which
    this one does nothing.
    """

    name: str
    choices: tuple[Any, ...] = ()
    bounds: tuple[float, float] = (0.0, 0.0)
    log: bool = False
    relative: bool = False
    only_with: tuple[str, Any] | None = None

    def suggest(self, trial: "Trial", default: Any) -> Any:
        """A value for the trial; numbers to three digits."""
        if self.choices:
            return trial.suggest_categorical(self.name, self.choices)
        low, high = (bound * (default if self.relative else 1) for bound in self.bounds)
        return float(f"{trial.suggest_float(self.name, low, high, log=self.log):.3g}")


SPACE = (
    Parameter("lr", bounds=(1 / 4, 15 / 4), log=True, relative=True),  # 2e-5 to 3e-4 for the embedded model
    Parameter("batch_size", choices=(16, 32, 64)),
    Parameter("scheduler", choices=("pal", "random", "round_robin")),
    Parameter("warmup", bounds=(0.0, 0.3)),
    Parameter("weight_decay", bounds=(1e-3, 0.1), log=True),
    Parameter("treatment", choices=("sum", "pcgrad", "gradvac")),
    Parameter("gradvac_beta", bounds=(1e-3, 0.5), log=True, only_with=("treatment", "gradvac")),
    Parameter("smart", choices=(False, True)),
    Parameter("smart_weight", bounds=(0.1, 10.0), log=True, only_with=("smart", True)),
    Parameter("drop_longest", choices=(0.0, 0.02)),
    Parameter("pretrain_epochs", choices=(0, 3, 10)),
)


@dataclass(frozen=True)
class Space:
    """What is searched where some flags are fixed. settings: of a run with only these flags."""

    fixed: tuple[str, ...]
    settings: Config
    parameters: tuple[Parameter, ...]

    @classmethod
    def under(cls, fixed: Sequence[str]) -> "Space":
        """The parameters that the fixed flags leave open. Raises FlagError if these flags make no sense in a search."""
        given = vars(make_parser().parse_args(fixed))
        problems = [
            f"--{name}: expected no such flag behind --, a search makes a directory for each run"
            for name in ("out", "resume")
            if name in given
        ]
        if given.get("option", "finetune") != "finetune":
            problems.append(f"--option {given['option']}: a search fine-tunes, expected finetune")
        if problems:
            raise FlagError("\n".join(problems))
        settings, _ = resolve(parse(fixed))
        left_open = [_narrowed(item, fixed, given, settings) for item in SPACE if item.name not in given]
        return cls(tuple(fixed), settings, tuple(item for item in left_open if item is not None))

    def default_values(self) -> dict[str, Any]:
        """The defaults, as the first trial has them."""
        return {item.name: getattr(self.settings, item.name) for item in self.parameters if self._applies(item, {})}

    def suggest(self, trial: "Trial") -> dict[str, Any]:
        """Values for a trial, of the parameters that do something together."""
        values: dict[str, Any] = {}
        for item in self.parameters:
            if self._applies(item, values):
                values[item.name] = item.suggest(trial, getattr(self.settings, item.name))
        return values

    def _applies(self, item: Parameter, values: Mapping[str, Any]) -> bool:
        if item.only_with is None:
            return True
        name, value = item.only_with
        return bool(values.get(name, getattr(self.settings, name)) == value)

    def flags(self, values: Mapping[str, Any]) -> list[str]:
        """The flags of values that are not the defaults."""
        others = {name: value for name, value in values.items() if value != getattr(self.settings, name)}
        return [part for name, value in others.items() for part in _flag(name, value)]


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]


def _narrowed(item: Parameter, fixed: Sequence[str], given: Mapping[str, Any], settings: Config) -> Parameter | None:
    """The parameter with the choices that go with the fixed flags, or None if they leave nothing to choose."""
    condition: list[str] = []
    if item.only_with:
        name, value = item.only_with
        if name in given and given[name] != value:
            return None
        condition = _flag(name, value)

    def is_accepted(value: Any) -> bool:
        try:
            parse([*fixed, *condition, *_flag(item.name, value)])
        except FlagError:
            return False
        return True

    if not item.choices:
        return item if is_accepted(getattr(settings, item.name)) else None
    choices = tuple(value for value in item.choices if is_accepted(value))
    return replace(item, choices=choices) if len(choices) > 1 else None


# -------------------------------------------------------------------------------------------------------- a run


class DevMeans:
    """Mean dev scores of fine-tuning, epoch by epoch, as a run writes them to its metrics.jsonl."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._epoch = 0

    def new(self) -> list[tuple[int, float]]:
        """(epoch, mean) of the evaluations since the last call."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self._offset:  # a resumed run cuts off what follows its checkpoint
                self._offset = 0
            file.seek(self._offset)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        records = [record for record in parse_records(whole) if record["stage"] == "finetune" and "dev" in record]
        found = [(int(r["epoch"]), float(r["dev"]["mean"])) for r in records if r["epoch"] > self._epoch]
        self._epoch = max([self._epoch, *(epoch for epoch, _ in found)])
        return found


def start_run(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts multitask_classifier.py. Its lines go to the log; where the system can, it stops if this process dies."""
    # A session of its own: Ctrl-C reaches this process only, which then stops the run.
    with log.open("ab") as file:
        return subprocess.Popen(
            [*COMMAND, *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent(),
        )


def _die_with_parent() -> Callable[[], None] | None:
    """What asks Linux, in a child, for SIGTERM at its parent's death."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    set_death_signal = 1
    return None if prctl is None else lambda: prctl(set_death_signal, signal.SIGTERM)


def follow(process: subprocess.Popen[bytes], means: DevMeans, is_hopeless: Callable[[int, float], bool]) -> bool:
    """Waits for a run's end; returns whether it was stopped as hopeless. Interrupted, it stops the run.

    is_hopeless: is told each epoch and its mean.
    """
    try:
        while True:
            has_ended = process.poll() is not None
            verdicts = [is_hopeless(epoch, mean) for epoch, mean in means.new()]
            if has_ended:
                return False
            if any(verdicts):
                stop(process)
                return True
            time.sleep(POLL_SECONDS)
    except BaseException:
        stop(process)
        raise


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a run, which writes its checkpoint first; interrupted while it waits for that, it kills the run."""
    process.terminate()
    try:
        process.wait()
    except BaseException:
        process.kill()
        raise


def last_line(log: Path) -> str:
    """The error in a log, or whatever stands last in it."""
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return [*lines, *errors][-1] if lines else "no output"


# ------------------------------------------------------------------------------------------------------- trials


class Search:
    """A study, and the directory on this machine that holds the runs of its trials."""

    def __init__(self, study: "Study", space: Space, out: Path, seed: int, is_shared: bool) -> None:
        """is_shared: whether other machines may work on the study."""
        self.study, self.space, self.out, self.seed, self.is_shared = study, space, out, seed, is_shared
        self.place = f"{platform.node()}:{out}"

    def run(self, num_trials: int) -> None:
        """Trials until so many have ended. Raises DefaultsFailed if the one with the defaults fails."""
        from optuna.samplers import TPESampler

        self.take_up_killed_trials()
        self.ensure_defaults()
        while sum(has_ended(trial) for trial in self.study.trials) < num_trials:
            # A sampler for each trial: one that began again with its seed would draw the first trials once more.
            seed = derive_seed(self.seed, "trial", len(self.study.trials)) % 2**32
            self.study.sampler = TPESampler(n_startup_trials=RANDOM_TRIALS, seed=seed)
            self.run_trial(self.study.ask())

    def ensure_defaults(self) -> None:
        """Puts a trial with the defaults before all others, unless there is one that has not failed."""
        from optuna.trial import TrialState

        if not any(is_default(trial) and trial.state != TrialState.FAIL for trial in self.study.trials):
            self.study.enqueue_trial(self.space.default_values(), {"defaults": True})

    def run_trial(self, trial: "Trial") -> None:
        """A run with the flags that the study suggests, and what came of it told to the study."""
        trial.set_user_attr("place", self.place)
        flags = self.space.flags(self.space.suggest(trial))
        trial.set_user_attr("flags", flags)
        folder = self.folder(trial.number)
        log = folder.with_name(f"{folder.name}.log")
        arguments = self.taken_up(trial, folder) or [*self.space.fixed, *flags, "--out", str(folder)]
        say(f"trial {trial.number}: {shlex.join(flags) or 'the defaults'}")
        process = start_run(arguments, log)
        is_pruned = follow(
            process, DevMeans(folder / METRICS), lambda epoch, mean: self.is_hopeless(trial, epoch, mean)
        )
        self.tell(trial, folder, is_pruned, f"exit status {process.returncode}: {last_line(log)}")

    def is_hopeless(self, trial: "Trial", epoch: int, mean: float) -> bool:
        """Tells the study of an epoch; returns whether to stop the trial, but never the defaults or a last epoch."""
        trial.report(mean, epoch)
        is_last = epoch == self.space.settings.epochs
        return not is_last and not is_default(trial) and trial.should_prune()

    def tell(self, trial: "Trial", folder: Path, is_pruned: bool, problem: str) -> None:
        """The end of a trial. Raises DefaultsFailed if it had the defaults and failed."""
        from optuna.trial import TrialState

        mean = result_mean(folder)
        if mean is not None:
            self.study.tell(trial, mean)
            is_best = self.study.best_trial.number == trial.number
            say(f"trial {trial.number}: mean {mean:.4f}" + (", the best so far" if is_best else ""))
        elif is_pruned:
            pruned = self.study.tell(trial, state=TrialState.PRUNED)
            say(f"trial {trial.number}: ended early, mean {pruned.value:.4f} after epoch {pruned.last_step}")
        else:
            trial.set_user_attr("error", problem)
            self.study.tell(trial, state=TrialState.FAIL)
            if is_default(trial):
                raise DefaultsFailed(f"trial {trial.number}, with the default flags, failed: {problem}")
            say(f"trial {trial.number}: failed, {problem}")

    def folder(self, number: int) -> Path:
        return self.out / f"trial-{number}"

    # trials that were running when a search was killed

    def take_up_killed_trials(self) -> None:
        """Ends the trials that this directory's last search left running; others with the same flags replace them."""
        from optuna.trial import TrialState

        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
            if self.is_shared and trial.user_attrs.get("place") != self.place:
                continue  # of another machine
            folder = self.folder(trial.number)
            wait_until_free(folder)
            mean = result_mean(folder)
            if mean is not None:
                self.study.tell(trial.number, mean)
                say(f"trial {trial.number}: had ended, mean {mean:.4f}")
                continue
            self.study.tell(trial.number, state=TrialState.FAIL)
            attributes: dict[str, Any] = {"defaults": True} if is_default(trial) else {}
            if (folder / CONFIG).is_file():
                attributes["resumes"] = trial.number
            elif folder.exists():
                folder.rename(folder.with_name(f"{folder.name}-killed"))
            self.study.enqueue_trial(trial.params, attributes)

    def taken_up(self, trial: "Trial", folder: Path) -> list[str]:
        """The arguments that resume the run of a killed trial, now this one's; none if there is no such run."""
        number = trial.user_attrs.get("resumes")
        if number is None or not self.folder(number).is_dir():
            return []
        killed = self.folder(number)
        killed.rename(folder)
        log = killed.with_name(f"{killed.name}.log")
        if log.is_file():
            log.rename(folder.with_name(f"{folder.name}.log"))
        say(f"trial {trial.number}: goes on with the run of trial {number}, which was killed")
        return ["--resume", str(folder)]


def is_default(trial: "Trial | FrozenTrial") -> bool:
    """Whether a trial has the default flags."""
    return bool(trial.user_attrs.get("defaults"))


def has_ended(trial: "FrozenTrial") -> bool:
    """Whether a trial counts: finished, pruned, or failed of its own. One that was killed is replaced."""
    from optuna.trial import TrialState

    if trial.state == TrialState.FAIL:
        return "error" in trial.user_attrs and not is_default(trial)
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED)


def result_mean(folder: Path) -> float | None:
    """The mean dev score of a run that has ended, or None."""
    return float(read_json(folder / RESULTS)["dev"]["mean"]) if (folder / RESULTS).is_file() else None


def wait_until_free(folder: Path) -> None:
    """Waits while a process runs in a run's directory: it may outlive a search that was killed by a step."""
    told = False
    while folder.is_dir() and (descriptor := hold(folder)) is None:
        if not told:
            say(f"{folder.name}: waiting for its run, which has outlived the last search")
        told = True
        time.sleep(POLL_SECONDS)
    if folder.is_dir() and descriptor is not None:
        os.close(descriptor)


def hold(folder: Path) -> int | None:
    """A descriptor that holds the folder for this process until it is closed; None if another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a file system without locks
        pass
    return descriptor


# ------------------------------------------------------------------------------------------------------- report


def report(study: "Study", space: Space) -> list[str]:
    """A table of the trials, and the command of the best."""
    from optuna.trial import TrialState

    lines = [f"{'trial':>5}  {'state':<9}{'mean':>7}  flags"]
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
    defaults = [trial.value for trial in study.trials if is_default(trial) and trial.value is not None]
    if defaults and best.value is not None and best.value <= max(defaults):
        lines.append("no trial beat the defaults")
    return lines


# -------------------------------------------------------------------------------------------------- command line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise SearchError(f"{message.replace('argument ', '', 1)}; flags of multitask_classifier.py stand behind --")


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The search's own flags, and those of multitask_classifier.py behind `--`. Raises SearchError."""
    place = arguments.index("--") if "--" in arguments else len(arguments)
    parser = _Parser(
        prog="sweeps/search.py",
        usage="%(prog)s [--trials N] [--study NAME] [--storage URL] [--out DIR] [--seed N] -- FLAGS",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=f"searched: {', '.join(item.name for item in SPACE)}, as far as FLAGS leave them open",
        allow_abbrev=False,
    )
    parser.add_argument("--trials", type=int, default=30, help="trials in all, those of earlier starts counted")
    parser.add_argument("--study", default="search", help="name of the study in the database")
    parser.add_argument("--storage", default="", metavar="URL", help="database; default an SQLite file in --out")
    parser.add_argument("--out", default="runs/search", metavar="DIR", help="where the runs go, one search a directory")
    parser.add_argument("--seed", type=int, default=0, help="seed of the search; the runs' own stands behind --")
    own = parser.parse_args(list(arguments[:place]))
    for name, lowest in (("trials", 1), ("seed", 0)):
        if getattr(own, name) < lowest:
            raise SearchError(f"--{name} {getattr(own, name)}: expected {lowest} or more")
    return own, list(arguments[place + 1 :])


def open_study(own: argparse.Namespace, space: Space, out: Path) -> "Study":
    """The study in the database, new or from earlier starts. Raises SearchError if it cannot be had or is another's."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.MedianPruner(TRIALS_BEFORE_PRUNING, n_warmup_steps=FIRST_PRUNED_EPOCH)
    try:
        study = optuna.create_study(
            storage=own.storage or f"sqlite:///{out / 'study.db'}",
            study_name=own.study,
            pruner=pruner,
            direction="maximize",
            load_if_exists=True,
        )
    except (ImportError, SQLAlchemyError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise SearchError(f"--storage {own.storage or out}: cannot be used ({reason})") from None
    check_same_search(study, {"flags": shlex.join(space.fixed), "space": repr(space.parameters)}, own, out)
    return study


def check_same_search(study: "Study", searched: Mapping[str, str], own: argparse.Namespace, out: Path) -> None:
    """Notes in a new study what is searched. Raises SearchError if the study, or the directory, is another search's."""
    if not study.trials:
        runs = sorted(path.name for path in out.glob("trial-*"))
        if runs:
            raise SearchError(f"--out {own.out}: {runs[0]} in it is another search's, expected another directory")
        for name, value in searched.items():
            study.set_user_attr(name, value)
    begun = study.user_attrs
    if begun.get("flags") != searched["flags"]:
        raise SearchError(
            f"--study {own.study}: was begun with `{begun.get('flags', '')}` behind --, expected these flags "
            "or another --study and --out"
        )
    if begun.get("space") != searched["space"]:
        raise SearchError(
            f"--study {own.study}: was begun with another search space, expected another --study and --out"
        )


def say(line: str) -> None:
    print(line, flush=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def search(own: argparse.Namespace, fixed: Sequence[str]) -> None:
    """The whole search, from its flags to the table at its end."""
    space = Space.under(fixed)
    out = Path(own.out).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SearchError(f"--out {own.out}: cannot be made ({error.strerror})") from None
    descriptor = hold(out)
    if descriptor is None:
        raise SearchError(f"--out {own.out}: another search is running in it, expected a directory of its own")
    try:
        study = open_study(own, space, out)
        Search(study, space, out, own.seed, is_shared=bool(own.storage)).run(own.trials)
    finally:
        os.close(descriptor)
    for line in ["", *report(study, space)]:
        say(line)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0, 1 if the defaults fail, 2 for bad input, 130 when stopped."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        own, fixed = parse_arguments(arguments)
        if importlib.util.find_spec("optuna") is None:
            raise SearchError(f"optuna is not installed, expected `pip install {OPTUNA}`")
        search(own, fixed)
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
