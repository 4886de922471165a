"""The search over hyper-parameters: what it searches, prunes, survives and reports.

Trials are a script that behaves as a run does and takes milliseconds.
"""

import functools
import itertools
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from filelock import FileLock

from config import Config, FlagError, parse
from helpers import ROOT, Capture, Patch, forked
from run_record import write_json
from sweeps import search
from sweeps.search import ONLY_WITH, SPACE, CategoricalDistribution, Space, dev_means, last_line

optuna.logging.set_verbosity(optuna.logging.WARNING)


@pytest.fixture(autouse=True)
def _handlers(monkeypatch: Patch) -> Iterator[None]:
    """A search takes over SIGTERM and what threads raise; pytest gets them back."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


class Fake:
    """A search of fake runs."""

    def __init__(self, folder: Path, tiny: Path, empty_database: Path) -> None:
        self.folder, self.out, self.empty_database = folder, folder / "out", empty_database
        shutil.copyfile(ROOT / "tests" / "cases" / "fake_run.py", folder / "run.py")
        self.fixed = ["--model", str(tiny), "--epochs", "5"]
        self.plan()

    def plan(self, plans: dict[Any, dict[str, Any]] | None = None) -> None:
        of_trials = {k if k == "*" else f"trial-{k}": v for k, v in (plans or {}).items()}
        write_json(self.folder / "plan.json", of_trials)

    def run(self, trials: int, *more: str, fixed: list[str] | None = None) -> int:
        if not self.out.exists() and not more:
            self.out.mkdir()
            shutil.copyfile(self.empty_database, self.out / "study.db")
        own = ["--trials", str(trials), "--out", str(self.out), *more]
        return search.main([*own, "--", *(self.fixed if fixed is None else fixed)])

    def trials(self, database: str = "out/study.db") -> list[optuna.trial.FrozenTrial]:
        return optuna.load_study(study_name="search", storage=f"sqlite:///{self.folder / database}").trials

    def states(self, database: str = "out/study.db") -> list[str]:
        return [trial.state.name for trial in self.trials(database)]


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Optuna's tables, which take a while to make; SQLite does not wait for the disk."""

    def configure(connection: sqlite3.Connection, record: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute("PRAGMA journal_mode = MEMORY")

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", configure)
    path = tmp_path_factory.mktemp("database") / "empty.db"
    optuna.storages.RDBStorage(f"sqlite:///{path}")
    yield path
    sqlalchemy.event.remove(sqlalchemy.Engine, "connect", configure)


@pytest.fixture
def fake(tmp_path: Path, tiny: Path, empty_database: Path, monkeypatch: Patch) -> Fake:
    made = Fake(tmp_path, tiny, empty_database)
    monkeypatch.setattr(search, "COMMAND", (sys.executable, "-S", str(tmp_path / "run.py")))
    monkeypatch.setattr(search, "POLL_SECONDS", 0.01)
    return made


def space_of(line: str, tiny: Path) -> Space:
    return Space.under([*(() if "--checkpoint" in line else ("--model", str(tiny))), *line.split()])


def sampled(space: Space, number: int) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    return [space.suggest(study.ask()) for _ in range(number)]


def test_whatever_is_suggested_is_accepted_by_the_command(tiny: Path) -> None:
    lines = [
        "", "--pcgrad", "--gradvac", "--smart", "--tasks sst sts --scheduler random", "--draws_per_step 2",
        "--pal --train pal", "--treatment UPGrad", "--granularity layer --pcgrad", "--no-smart --lr 1e-4",
    ]  # fmt: skip
    for line in lines:
        space = space_of(line, tiny)
        for values in sampled(space, 4):
            config = parse([*space.fixed, *space.flags(values)])
            for name, value in values.items():
                assert config.to_dict()[name] == value or (name == "lr" and value == space.settings["lr"]), line


def test_every_value_of_the_space_is_reached_and_none_does_nothing(tiny: Path) -> None:
    space = space_of("", tiny)
    found = sampled(space, 200)
    assert set(space.distributions) == set(SPACE) == {name for values in found for name in values}
    for name, item in space.distributions.items():
        values = {of[name] for of in found if name in of}
        if isinstance(item, CategoricalDistribution):
            assert values == set(item.choices) and Config().to_dict()[name] in values
            continue
        assert isinstance(item, optuna.distributions.FloatDistribution)
        span = item.high - item.low
        assert item.low * 0.99 <= min(values) < item.low + 0.2 * span
        assert item.low + 0.7 * span < max(values) <= item.high * 1.01 and item.low <= space.settings[name] <= item.high
    low_rate = 8e-5 * (384 / 32) ** 1.5 / 4  # a quarter of the default: 8e-5 for the embedded model, which is 384 wide
    assert space.distributions["lr"].low == pytest.approx(low_rate, rel=0.05)  # type: ignore[attr-defined]
    for name, (other, value) in ONLY_WITH.items():
        assert all((name in of) == (of[other] == value) for of in found)


def test_fixed_flags_and_values_that_contradict_them_leave_the_search(tiny: Path) -> None:
    cases = {
        "--pcgrad": "treatment gradvac_beta",
        "--gradvac": "treatment",
        "--gradvac --gradvac_beta 0.1": "treatment gradvac_beta",
        "--tasks sst": "scheduler treatment gradvac_beta",
        "--no-smart": "smart smart_weight",
        "--draws_per_step 2": "treatment gradvac_beta",
        f"--checkpoint {tiny}": "pretrain_epochs",
        "--batch_size 8 --warmup 0 --lr 1e-4": "batch_size warmup lr",
    }
    for line, gone in cases.items():
        assert set(space_of(line, tiny).distributions) == set(SPACE) - set(gone.split()), line
    epochs = space_of("--pretrain_lr 0.1", tiny).distributions["pretrain_epochs"]
    assert isinstance(epochs, CategoricalDistribution) and epochs.choices == (3, 25), "0 contradicts --pretrain_lr"


def test_a_file_behind_the_dashes_fixes_what_its_flags_would(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text('batch_size = 8\ntreatment = "gradvac"\nno_such = 1\n')
    with pytest.raises(FlagError, match=r"^--config .*own.toml: --no_such: unknown"):
        space_of(f"--config {path}", tiny)
    path.write_text('batch_size = 8\ntreatment = "gradvac"\nepochs = 2\n')
    for beside, on_line in (("", "--gradvac"), ("--pcgrad", "--pcgrad"), ("--epochs 4", "--gradvac")):
        epochs = beside if "epochs" in beside else "--epochs 2"
        found, wanted = (space_of(line, tiny) for line in (
            f"--config {path} {beside}", f"--batch_size 8 {on_line} {epochs}"
        ))  # fmt: skip
        assert found.settings == wanted.settings and found.distributions == wanted.distributions
        assert "out" not in found.settings, "a directory is named after the time"
        assert str(path) not in shlex.join(found.fixed), "what is searched is told apart by what the file says"
        assert parse(found.fixed).to_dict() == parse(wanted.fixed).to_dict()
    assert space_of("--batch-size 8", tiny).distributions == space_of("--batch_size 8", tiny).distributions
    path.write_text('option = "pretrain"\n')
    with pytest.raises(FlagError, match="--option pretrain: expected no such flag"):
        space_of(f"--config {path}", tiny)
    (tmp_path / "config.json").write_text('{"layout": {}}')
    with pytest.raises(FlagError, match=r"--config .*config.json: all settings of a run"):
        space_of(f"--config {tmp_path / 'config.json'}", tiny)


def flags_of(out: Path, number: int) -> str:
    return shlex.join(json.loads((out / f"trial-{number}" / "config.json").read_text())["argv"])


def test_the_first_trial_has_the_defaults_and_the_end_shows_the_best_command(fake: Fake, capsys: Capture) -> None:
    fake.plan({0: {"means": [0.4, 0.6]}, 2: {"means": [0.7, 0.65]}, "*": {"means": [0.3]}})
    assert fake.run(3) == 0
    shown = capsys.readouterr().out
    fixed = shlex.join(fake.fixed)
    assert flags_of(fake.out, 0) == f"{fixed} --out {fake.out}/trial-0"
    assert [trial.value for trial in fake.trials()] == [0.6, 0.3, 0.7]
    best = flags_of(fake.out, 2).removesuffix(f" --out {fake.out}/trial-2")
    assert best != fixed and f"best: trial 2, mean 0.7000\n    python multitask_classifier.py {best}\n" in shown
    assert "no trial beat the defaults" not in shown
    rows = [line.split(maxsplit=3) for line in shown.split("flags\n")[1].split("\n\n")[0].splitlines()]
    assert rows[0] == ["0", "complete", "0.6000", "the defaults"]
    assert rows[2] == ["2", "complete", "0.7000", best.removeprefix(f"{fixed} ")]


def test_a_search_goes_on_to_the_number_of_trials_in_all_as_its_seed_says(fake: Fake, capsys: Capture) -> None:
    found = []
    for name, seed, numbers in (("a", 3, (2, 3, 3)), ("b", 3, (3,)), ("c", 4, (2,))):
        fake.out = fake.folder / name
        assert [fake.run(number, "--seed", str(seed)) for number in numbers] == [0] * len(numbers)
        found.append([trial.params for trial in fake.trials(f"{name}/study.db")])
    assert found[0] == found[1] and found[0][0] == found[2][0] and found[0][1] != found[2][1]
    assert len({str(params) for params in found[0]}) == len(found[0]) == 3, "no trial is drawn twice"
    shown = capsys.readouterr().out
    assert f"best: trial 0, mean 0.5000\n    python multitask_classifier.py {shlex.join(fake.fixed)}\n" in shown
    assert shown.endswith("no trial beat the defaults\n")


def test_a_hopeless_trial_is_stopped_after_an_epoch_below_the_median_but_not_in_its_last(
    fake: Fake, monkeypatch: Patch
) -> None:
    """Two good trials, then one that is worse from the first epoch on; the first epoch never decides."""
    monkeypatch.setattr(search, "TRIALS_BEFORE_PRUNING", 2)
    bad = {"means": [0.1, 0.2, 0.2], "pause": 0.2}
    fake.plan({2: bad, "*": {"means": [0.5, 0.6, 0.7]}, 3: {**bad, "means": [0.6, 0.65, 0.65]}})
    assert fake.run(4, fixed=[*fake.fixed[:-1], "3"]) == 0
    assert fake.states() == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE"]
    last_epochs = [trial.intermediate_values for trial in fake.trials()[1:]]
    assert last_epochs == [{1: 0.5, 2: 0.6, 3: 0.7}, {1: 0.1, 2: 0.2}, {1: 0.6, 2: 0.65, 3: 0.65}]
    assert (fake.out / "trial-2.log").read_text() == "stopped\n"


def test_a_failing_trial_is_recorded_and_the_search_goes_on_but_not_without_its_defaults(
    fake: Fake, capsys: Capture
) -> None:
    fake.plan({0: {"status": 2, "error": "no such directory"}, 2: {"status": 1, "error": "the loss of sst is nan"}})
    assert fake.run(3) == 2
    expected = "error: trial 0, with the default flags, failed: exit status 2: no such directory\n"
    assert capsys.readouterr().err == expected
    assert fake.run(3) == 0
    assert fake.states() == ["FAIL", "COMPLETE", "FAIL", "COMPLETE"]
    trials = fake.trials()
    assert trials[1].user_attrs["defaults"] and trials[1].params == trials[0].params
    assert trials[2].user_attrs["error"] == "exit status 1: the loss of sst is nan"
    assert "(exit status 1: the loss of sst is nan)" in capsys.readouterr().out.split("flags\n")[1]


def test_flags_with_which_nothing_could_be_trained_may_be_corrected(fake: Fake, capsys: Capture) -> None:
    fake.plan({0: {"status": 2, "error": "no such directory"}})
    assert fake.run(1, fixed=[*fake.fixed, "--data", "typo"]) == 2
    assert fake.run(1, fixed=[*fake.fixed, "--data", "sample", "--weight_decay", "0.1"]) == 0
    assert fake.states() == ["FAIL", "COMPLETE"] and "weight_decay" not in fake.trials()[1].params
    capsys.readouterr()
    assert fake.run(2, fixed=[*fake.fixed, "--data", "typo"]) == 2
    assert ": was begun with other flags behind --, or another" in capsys.readouterr().err


def test_dev_means_are_those_of_fine_tuning_as_far_as_they_are_written_and_the_last_line_of_a_log_its_error(
    tmp_path: Path,
) -> None:
    path, means = tmp_path / "metrics.jsonl", [("pretrain", 0.1), *(("finetune", of) for of in (0.4, None, 0.6, 0.7))]
    assert dev_means(path) == {}
    records = [{"stage": s, "epoch": max(i, 1), "step": i, "dev": {"mean": mean}} for i, (s, mean) in enumerate(means)]
    path.write_text("\n".join(map(json.dumps, records))[:-9])
    assert dev_means(path) == {1: 0.4, 3: 0.6}
    for text, line in (("a\nerror: b\n\n", "b"), ("a\nValueError: c\n", "ValueError: c"), ("", "no output")):
        (tmp_path / "log").write_text(text)
        assert last_line(tmp_path / "log") == line


def test_a_stop_ends_the_run_cleanly_and_the_same_command_resumes_it(
    fake: Fake, capsys: Capture, monkeypatch: Patch
) -> None:
    fake.plan({1: {"means": [0.2, 0.9], "pause": 30}})

    def stop_after_an_epoch(metrics: Path) -> dict[int, float]:
        if (found := dev_means(metrics)) == {1: 0.2}:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(search, "dev_means", stop_after_an_epoch)
        patch.chdir(fake.folder)  # from elsewhere it names where the program is
        assert fake.run(2) == 130
    arguments = shlex.join(["--trials", "2", "--out", str(fake.out), "--", *fake.fixed])
    assert capsys.readouterr().out.endswith(f"stopped; to go on: python {search.__file__} {arguments}\n")
    assert (fake.out / "trial-1.log").read_text() == "stopped\n"
    fake.plan({1: {"means": [0.2, 0.9]}})
    assert fake.run(2) == 0
    assert fake.states() == ["COMPLETE", "FAIL", "COMPLETE"]
    trials = fake.trials()
    assert trials[1].params == trials[2].params and trials[2].intermediate_values == {1: 0.2, 2: 0.9}
    assert "trial 2: goes on with the run of trial 1" in capsys.readouterr().out
    results = json.loads((fake.out / "trial-1" / "results.json").read_text())
    assert results["argv"] == ["--resume", str(fake.out / "trial-1")] and not (fake.out / "trial-2").exists()


class Killed(BaseException):
    """Ends a search as SIGKILL does: nothing is told to the study."""


@pytest.mark.parametrize(("number", "name"), [(0, "start_run"), (1, "result_mean")])
def test_a_killed_trial_is_repeated_and_a_run_that_had_ended_is_not(
    number: int, name: str, fake: Fake, monkeypatch: Patch
) -> None:
    fake.plan({number: {"means": [0.8]}})
    original = getattr(search, name)

    def kill(*args: Any) -> Any:
        if f"trial-{number}" in str(args) and (number == 0 or (args[0] / "results.json").exists()):
            raise Killed
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(search, name, kill)
        with pytest.raises(Killed):
            fake.run(3)
    assert fake.run(2) == 0
    trials = fake.trials()
    assert [trial.state.name == "FAIL" for trial in trials] == [n == number for n in range(3)]
    assert trials[number].params == trials[number + 1].params and trials[number + 1].value == 0.8
    assert [bool(trial.user_attrs.get("defaults")) for trial in trials] == [True, number == 0, False]
    assert (fake.out / f"trial-{number}.log").read_text() == "", "the run was made once"


def test_a_trial_of_another_machine_is_repeated_only_if_that_has_fallen_silent(fake: Fake) -> None:
    storage = f"sqlite:///{fake.folder}/shared.db"
    assert fake.run(1, "--storage", storage) == 0
    elsewhere = optuna.load_study(study_name="search", storage=storage).ask()
    elsewhere.suggest_categorical("batch_size", (16, 32, 64))
    optuna.storages.RDBStorage(storage, heartbeat_interval=9).record_heartbeat(elsewhere._trial_id)
    assert fake.run(2, "--storage", storage) == 0
    with sqlite3.connect(fake.folder / "shared.db") as database:
        database.execute("update trial_heartbeats set heartbeat = datetime('now', '-70 seconds')")
    assert fake.run(3, "--storage", storage) == 0
    trials = fake.trials("shared.db")
    assert fake.states("shared.db") == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert trials[3].params["batch_size"] == trials[1].params["batch_size"]


def test_defaults_that_another_machine_has_are_missing_and_a_larger_search_repeats_lost_ones(
    fake: Fake, capsys: Capture
) -> None:
    storage = f"sqlite:///{fake.folder}/shared.db"
    assert fake.run(1, "--storage", storage) == 0
    with sqlite3.connect(fake.folder / "shared.db") as database:
        database.execute("delete from trial_values")
        database.execute("update trials set state = 'RUNNING', datetime_complete = null")
        database.execute("update trial_heartbeats set heartbeat = datetime('now')")
    shutil.rmtree(fake.out)
    missing = "another worker has the defaults; if it was killed, a larger --trials repeats them\n"
    assert missing not in capsys.readouterr().out
    assert fake.run(1, "--storage", storage) == 0 and fake.states("shared.db") == ["RUNNING", "COMPLETE"]
    assert missing in capsys.readouterr().out
    with sqlite3.connect(fake.folder / "shared.db") as database:
        database.execute("update trial_heartbeats set heartbeat = datetime('now', '-70 seconds')")
    assert fake.run(2, "--storage", storage) == 0
    trials = fake.trials("shared.db")
    assert [trial.state.name for trial in trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert [bool(trial.user_attrs.get("defaults")) for trial in trials] == [True, False, True]
    assert trials[2].params == trials[0].params and missing not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_workers_that_begin_at_the_same_instant_draw_different_trials(fake: Fake) -> None:
    storage, space = f"sqlite:///{fake.folder}/shared.db", Space.under(fake.fixed)
    shutil.copyfile(fake.empty_database, fake.folder / "shared.db")
    optuna.create_study(study_name="search", storage=storage, direction="maximize")
    studies = [optuna.load_study(study_name="search", storage=storage) for _ in range(3)]
    begun = [(study, study.ask()) for study in studies]
    for study, trial in begun:
        search.Search(study, space, fake.folder, seed=0).run_trial(trial)
    drawn = [{name: trial.params[name] for name in ("lr", "warmup", "weight_decay")} for _, trial in begun]
    assert all(first != second for first, second in itertools.combinations(drawn, 2))


def test_a_worker_whose_trial_was_taken_for_lost_goes_on_with_the_next(
    fake: Fake, capsys: Capture, monkeypatch: Patch
) -> None:
    """The other worker, which repeats the trial, is this one again."""
    fake.plan({1: {"means": [0.2, 0.9], "pause": 0.5}})
    storage, taken = f"sqlite:///{fake.folder}/shared.db", list[int]()

    def take_over(metrics: Path) -> dict[int, float]:
        if metrics.parent.name == "trial-1" and not taken:
            study = optuna.load_study(study_name="search", storage=storage)
            taken.append(study.trials[1].number)
            study.tell(1, state=optuna.trial.TrialState.FAIL)
            optuna.storages.RetryHeartbeatStaleTrialCallback()(study, study.trials[1])
        return dev_means(metrics)

    monkeypatch.setattr(search, "dev_means", take_over)
    assert fake.run(3, "--storage", storage) == 0
    assert fake.states("shared.db") == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    trials = fake.trials("shared.db")
    assert trials[2].params == trials[1].params and trials[2].value == 0.9
    assert "the trial was taken for lost and is repeated\n" in capsys.readouterr().out


@pytest.mark.parametrize("is_back", [False, True])
def test_a_database_that_fails_ends_the_search_with_a_line(
    is_back: bool, fake: Fake, capsys: Capture, monkeypatch: Patch
) -> None:
    """is_back: at the end of the trial."""

    def fail(metrics: Path) -> dict[int, float]:
        if is_back:
            raise optuna.exceptions.StorageInternalError("no such table: trials")
        with sqlite3.connect(fake.out / "study.db") as database:
            database.execute("alter table trials rename to gone")
        return {1: 0.5}

    monkeypatch.setattr(search, "dev_means", fail)
    assert fake.run(1) == 2
    problem = "has failed (no such table: trials); the same command goes on"
    assert capsys.readouterr().err == f"error: --storage {fake.out}: {problem}\n"


def test_what_the_driver_of_a_database_said_is_named() -> None:
    outer = optuna.exceptions.StorageInternalError("during the commit")
    assert search.first_cause(outer) == "during the commit"
    lost = sqlite3.OperationalError("the server closed the connection\nunexpectedly")
    outer.__context__ = sqlalchemy.exc.OperationalError("SELECT 1", {}, lost)
    outer.__context__.__context__ = KeyError(())  # a cache of SQLAlchemy's
    assert search.first_cause(outer) == "the server closed the connection"


def search_apart(command: tuple[str, ...], arguments: list[str]) -> int:
    """In a process of its own: a search of fake runs, by a worker that is lost after three seconds of silence."""
    search.COMMAND, search.POLL_SECONDS = command, 0.05
    search.HEARTBEAT = {"heartbeat_interval": 1, "grace_period": 3}
    return search.main(arguments)


def test_a_killed_search_ends_its_run_and_the_same_command_finishes_the_search(fake: Fake, capsys: Capture) -> None:
    fake.plan({0: {"means": [0.2, 0.9], "pause": 60}})
    arguments = ["--trials", "1", "--out", str(fake.out), "--", *fake.fixed]
    process = forked(fake.folder / "log", search_apart, search.COMMAND, arguments)
    log, deadline = fake.out / "trial-0.log", time.monotonic() + 120
    while not (fake.out / "trial-0" / "metrics.jsonl").exists() and process.is_alive():
        time.sleep(0.02)
    process.kill()
    process.join()
    while sys.platform == "linux" and log.read_text() != "stopped\n":
        assert time.monotonic() < deadline, "its run goes on"
        time.sleep(0.02)
    fake.plan({0: {"means": [0.2, 0.9]}})
    assert search.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "trial 1: goes on with the run of trial 0" in shown and "best: trial 1" in shown
    assert fake.trials()[1].value == 0.9 and list(fake.trials()[1].intermediate_values) == [1, 2]


@pytest.fixture
def postgresql() -> Iterator[tuple[str, Callable[[], object]]]:
    """The address of a database of a server of its own, and what restarts that."""
    programs = [*Path("/usr/lib/postgresql").glob("*/bin"), *map(Path, os.environ["PATH"].split(":"))]
    place = next((folder for folder in programs if (folder / "initdb").exists()), None)
    if place is None:
        pytest.skip("PostgreSQL is not installed")
    pytest.importorskip("psycopg")
    with tempfile.TemporaryDirectory() as name:
        folder, user = Path(name), dict[str, Any]()
        if os.getuid() == 0:  # the server refuses to be root's
            user = {"user": "postgres", "extra_groups": []}
            shutil.chown(folder, "postgres")
        data, log = folder / "data", folder / "log"
        server = f"-k {folder} -c listen_addresses= -c fsync=off"
        control = [place / "pg_ctl", "-D", data, "-w", "-l", log]
        run = functools.partial(subprocess.run, check=True, stdout=subprocess.DEVNULL, **user)
        run([place / "initdb", "-D", data, "-A", "trust", "-U", "search"])
        run([*control, "-o", server, "start"])
        yield f"postgresql://search@/postgres?host={folder}", lambda: run([*control, "-o", server, "restart"])
        run([*control, "-m", "immediate", "stop"])


def test_workers_share_a_study_in_postgresql_and_one_may_be_killed(
    fake: Fake, postgresql: tuple[str, Callable[[], object]]
) -> None:
    url, restart = postgresql
    plan = {"means": [0.1, 0.3, 0.2], "pause": 0.3}
    fake.plan({0: {**plan, "pause": 60}, "*": plan})

    def worker(name: str) -> multiprocessing.context.ForkServerProcess:
        own = ["--trials", "9", "--storage", url, "--out", str(fake.folder / name), "--", *fake.fixed]
        return forked(fake.folder / f"{name}.log", search_apart, search.COMMAND, own)

    workers = {name: worker(name) for name in "abc"}
    while not (found := list(fake.folder.glob("?/trial-0/metrics.jsonl"))):
        assert any(process.is_alive() for process in workers.values())
        time.sleep(0.02)
    first = found[0].parent.parent.name
    workers[first].kill()
    workers[first].join()
    fake.plan({"*": plan})
    workers[first] = worker(first)
    for process in workers.values():
        process.join(240)
    shown = [path.read_text() for path in fake.folder.glob("?.log")]
    assert all(process.exitcode == 0 for process in workers.values()), shown
    study = optuna.load_study(study_name="search", storage=search.make_storage(url))
    restart()  # which an open connection survives
    lost = [trial for trial in study.trials if trial.state.name == "FAIL"]
    kept = [trial for trial in study.trials if trial.state.name in ("COMPLETE", "PRUNED")]
    assert len(lost) == 1 and len(kept) + 1 == len(study.trials), "nothing is left running"
    assert sum(trial.user_attrs.get("defaults", False) for trial in kept) == 1
    assert 9 <= len(kept) <= 11, "the two others may have begun one more"
    repeated = [trial for trial in kept if trial.system_attrs.get("failed_trial") == lost[0].number]
    assert [trial.params for trial in repeated] == [lost[0].params]
    means = [json.loads(path.read_text())["dev"]["mean"] for path in fake.folder.glob("?/trial-*/results.json")]
    assert len(means) == len([trial for trial in kept if trial.state.name == "COMPLETE"])
    assert study.best_value == max(means) == 0.3


@pytest.mark.parametrize(
    ("own", "fixed", "message"),
    [
        ("", "--out x", "--out x: expected no such flag behind --"),
        ("", "--option pretrain", "--option pretrain: expected no such flag behind --, a search fine-tunes"),
        ("", "--warmup 3", "--warmup 3.0: expected a number from 0 to below 1"),
        ("--storage nonsense", "", "--storage nonsense: cannot be used"),
        ("--storage mysql://me:secret@host/x", "", "--storage mysql://me:***@host/x: its driver is not installed"),
        ("--storage sqlite:///{folder}/study.db", "", "--storage sqlite:///{folder}/study.db: cannot be used"),
        ("--trials 0", "", "--trials 0: expected a number above 0"),
        ("--out /dev/null/x", "", "/dev/null/x: Not a directory"),
    ],
)
def test_bad_input_is_one_line(own: str, fixed: str, message: str, fake: Fake, capsys: Capture) -> None:
    (fake.folder / "study.db").write_text("no database, but long enough to be taken for one " * 20)
    assert fake.run(1, *own.format(folder=fake.folder).split(), fixed=[*fake.fixed, *fixed.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message.format(folder=fake.folder)}")


def test_another_search_in_the_directory_or_of_other_flags_or_another_space_is_refused(
    fake: Fake, capsys: Capture, monkeypatch: Patch
) -> None:
    assert fake.run(1) == 0
    with FileLock(fake.out / "search.lock"):
        assert fake.run(2) == 2
    words = f"--out {fake.out}: another search is running there, expected another directory"
    assert capsys.readouterr().err == f"error: {words}\n"
    other = [*fake.fixed, "--weight_decay", "0.1"]
    assert fake.run(2, fixed=other) == 2
    assert fake.run(2, "--study", "other", fixed=other) == 2
    monkeypatch.delitem(SPACE, "warmup")
    assert fake.run(2) == 2
    shown = capsys.readouterr().err
    assert shown.count("error: --study") == shown.count(": was begun with other flags behind --, or another") == 3
    assert fake.states() == ["COMPLETE"]
