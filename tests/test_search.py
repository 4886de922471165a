"""The search over hyper-parameters: what it searches, prunes, survives and reports.

Most trials are a script that behaves as a run does and takes milliseconds; one test has real runs and kills the search.
"""

import json
import os
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy

from config import Config, parse
from sweeps import search
from sweeps.search import ONLY_WITH, SPACE, CategoricalDistribution, Space, dev_means, last_line

ROOT = Path(__file__).resolve().parent.parent
optuna.logging.set_verbosity(optuna.logging.WARNING)

# A run: a mean an epoch, then its end. What run number n does stands in plan.json under n, else under "*".
FAKE_RUN = """
import json, os, signal, sys, time
resumed = "--resume" in sys.argv
folder = sys.argv[sys.argv.index("--resume" if resumed else "--out") + 1]
plans = json.load(open(os.path.dirname(os.path.abspath(__file__)) + "/plan.json"))
plan = plans.get(folder.rsplit("-", 1)[1], plans.get("*", {}))
def stop(*_):
    print("stopped", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
if not resumed:
    os.mkdir(folder)
    json.dump({"argv": sys.argv[1:]}, open(folder + "/config.json", "w"))
log = folder + "/metrics.jsonl"
done = open(log).read().count("dev") if os.path.exists(log) else 0
with open(log, "a") as file:
    for epoch, mean in enumerate(plan.get("means", [0.5]), 1):
        if epoch > done:
            record = {"stage": "finetune", "epoch": epoch, "step": epoch, "dev": {"mean": mean}}
            print(json.dumps(record), file=file, flush=True)
        time.sleep(plan.get("pause", 0))
if "error" in plan:
    print("error: " + plan["error"], file=sys.stderr)
    sys.exit(plan["status"])
json.dump({"dev": {"mean": max(plan.get("means", [0.5]))}, "argv": sys.argv[1:]}, open(folder + "/results.json", "w"))
"""


@pytest.fixture(autouse=True)
def _signal_handlers() -> Iterator[None]:
    """A search takes over SIGTERM; pytest gets it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module", autouse=True)
def _hasty_database() -> Iterator[None]:
    """SQLite does not wait for the disk."""

    def configure(connection: sqlite3.Connection, record: Any) -> None:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA journal_mode = MEMORY")

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", configure)
    yield
    sqlalchemy.event.remove(sqlalchemy.Engine, "connect", configure)


class Fake:
    """A search of fake runs."""

    def __init__(self, folder: Path, tiny: Path, empty_database: Path) -> None:
        self.folder, self.out, self.empty_database = folder, folder / "out", empty_database
        self.script = folder / "run.py"
        self.script.write_text(FAKE_RUN)
        self.fixed = ["--model", str(tiny), "--epochs", "5"]
        self.plan()

    def plan(self, plans: dict[Any, dict[str, Any]] | None = None) -> None:
        (self.folder / "plan.json").write_text(json.dumps({str(k): v for k, v in (plans or {}).items()}))

    def run(self, trials: int, *more: str, fixed: list[str] | None = None) -> int:
        if not self.out.exists() and not more:
            self.out.mkdir()
            shutil.copyfile(self.empty_database, self.out / "study.db")  # tables take a while to make
        own = ["--trials", str(trials), "--out", str(self.out), *more]
        return search.main([*own, "--", *(self.fixed if fixed is None else fixed)])

    def trials(self, storage: str = "", study: str = "search") -> list[optuna.trial.FrozenTrial]:
        found = optuna.load_study(study_name=study, storage=storage or f"sqlite:///{self.out / 'study.db'}")
        return found.trials

    def states(self) -> list[str]:
        return [trial.state.name for trial in self.trials()]


@pytest.fixture(scope="module")
def empty_database(_hasty_database: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Optuna's tables."""
    path = tmp_path_factory.mktemp("database") / "empty.db"
    optuna.storages.RDBStorage(f"sqlite:///{path}")
    return path


@pytest.fixture
def fake(tmp_path: Path, tiny: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake(tmp_path, tiny, empty_database)
    monkeypatch.setattr(search, "COMMAND", (sys.executable, "-S", str(made.script)))
    monkeypatch.setattr(search, "POLL_SECONDS", 0.01)
    return made


# ------------------------------------------------------------------------------------------------- search space


def space_of(line: str, tiny: Path) -> Space:
    return Space.under([*(() if "--checkpoint" in line else ("--model", str(tiny))), *line.split()])


def sampled(space: Space, number: int) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    return [space.suggest(study.ask()) for _ in range(number)]


def test_whatever_is_suggested_is_accepted_by_the_command(tiny: Path) -> None:
    lines = [
        "", "--pcgrad", "--gradvac", "--smart", "--tasks sst", "--tasks sst sts --scheduler random",
        "--draws_per_step 2", "--pal --train pal", "--pretrain_lr 0.01", "--treatment UPGrad", "--draws_per_step 3",
        "--granularity layer --pcgrad", "--option finetune --no-smart --lr 1e-4",
    ]  # fmt: skip
    for line in lines:
        space = space_of(line, tiny)
        for values in [space.default_values(), *sampled(space, 10)]:
            config = parse([*space.fixed, *space.flags(values)])
            for name, value in values.items():
                assert config.to_dict()[name] == value or (name == "lr" and value == space.settings["lr"]), (line, values)


def test_every_value_of_the_space_is_reached_and_none_does_nothing(tiny: Path) -> None:
    space = space_of("", tiny)
    found = sampled(space, 200)
    assert set(space.distributions) == set(SPACE) == {name for values in found for name in values}
    for name, item in space.distributions.items():
        values = {of[name] for of in found if name in of}
        if isinstance(item, CategoricalDistribution):
            assert values == set(item.choices) and Config().to_dict()[name] in values
        else:
            assert isinstance(item, optuna.distributions.FloatDistribution)
            span = item.high - item.low
            assert item.low * 0.99 <= min(values) < item.low + 0.2 * span
            assert item.low + 0.7 * span < max(values) <= item.high * 1.01
            assert item.low <= space.settings[name] <= item.high
    for name, (other, value) in ONLY_WITH.items():
        assert all((name in of) == (of[other] == value) for of in found)


def test_the_learning_rate_is_searched_around_the_models_default(tiny: Path) -> None:
    rate = space_of("", tiny).distributions["lr"]
    assert isinstance(rate, optuna.distributions.FloatDistribution)
    default = 8e-5 * (384 / 32) ** 1.5  # 8e-5 is the embedded model's, which is 384 wide
    assert [rate.low / default * 8e-5, rate.high / default * 8e-5] == pytest.approx([2e-5, 3e-4], rel=0.05)


@pytest.mark.parametrize(
    ("line", "gone"),
    [
        ("--lr 1e-4", "lr"),
        ("--pcgrad", "treatment gradvac_beta"),
        ("--gradvac", "treatment"),
        ("--gradvac --gradvac_beta 0.1", "treatment gradvac_beta"),
        ("--treatment sum", "treatment gradvac_beta"),
        ("--tasks sst", "scheduler treatment gradvac_beta"),
        ("--smart", "smart"),
        ("--no-smart", "smart smart_weight"),
        ("--draws_per_step 2", "treatment gradvac_beta"),
        ("--checkpoint {tiny}", "pretrain_epochs"),
        ("--batch_size 8 --warmup 0 --weight_decay 0", "batch_size warmup weight_decay"),
    ],
)
def test_fixed_flags_and_values_that_contradict_them_leave_the_search(line: str, gone: str, tiny: Path) -> None:
    space = space_of(line.format(tiny=tiny), tiny)
    assert set(space.distributions) == set(SPACE) - set(gone.split())
    epochs = space_of("--pretrain_lr 0.1", tiny).distributions["pretrain_epochs"]
    assert isinstance(epochs, CategoricalDistribution) and epochs.choices == (3, 10), "0 contradicts --pretrain_lr"


# ------------------------------------------------------------------------------------------------------- trials


def flags_of(out: Path, number: int) -> str:
    return shlex.join(json.loads((out / f"trial-{number}" / "config.json").read_text())["argv"])


def test_the_first_trial_has_the_defaults_and_the_end_shows_the_best_command(
    fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.plan({0: {"means": [0.4, 0.6]}, 2: {"means": [0.7, 0.65]}, "*": {"means": [0.3]}})
    assert fake.run(4) == 0
    shown = capsys.readouterr().out
    fixed = shlex.join(fake.fixed)
    assert flags_of(fake.out, 0) == f"{fixed} --out {fake.out}/trial-0"
    assert [trial.value for trial in fake.trials()] == [0.6, 0.3, 0.7, 0.3]
    best = flags_of(fake.out, 2).removesuffix(f" --out {fake.out}/trial-2")
    assert best != fixed and "--" in best
    assert f"best: trial 2, mean 0.7000\n    python multitask_classifier.py {best}\n" in shown
    assert "no trial beat the defaults" not in shown
    rows = [line.split(maxsplit=3) for line in shown.split("flags\n")[1].split("\n\n")[0].splitlines()]
    means = ("0.6000", "0.3000", "0.7000", "0.3000")
    assert [row[:3] for row in rows] == [[str(n), "complete", mean] for n, mean in enumerate(means)]
    assert rows[0][3] == "the defaults" and f"{fixed} {rows[2][3]}" == best
    assert sorted(path.name for path in fake.out.glob("trial-*")) == [
        f"trial-{n}{end}" for n in range(4) for end in ("", ".log")
    ]


def test_the_same_seed_searches_the_same_and_another_does_not(fake: Fake) -> None:
    found = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        fake.out = fake.folder / name
        assert fake.run(3, "--seed", str(seed)) == 0
        found.append([trial.params for trial in fake.trials()])
    assert found[0] == found[1] and found[0][0] == found[2][0]
    assert len({str(params) for params in [*found[0], *found[2]]}) == 5


def test_a_search_goes_on_to_the_number_of_trials_in_all_and_draws_no_trial_twice(
    fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fake.run(2) == 0 and fake.run(3) == 0 and len(fake.trials()) == 3
    assert len({str(trial.params) for trial in fake.trials()}) == 3
    capsys.readouterr()
    assert fake.run(3) == 0 and len(fake.trials()) == 3
    shown = capsys.readouterr().out
    assert f"best: trial 0, mean 0.5000\n    python multitask_classifier.py {shlex.join(fake.fixed)}\n" in shown
    assert shown.endswith("no trial beat the defaults\n")


def test_a_hopeless_trial_is_stopped_after_an_epoch_below_the_median_but_not_in_its_last(
    fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two good trials, then one that is worse from the first epoch on; the first epoch never decides."""
    monkeypatch.setattr(search, "TRIALS_BEFORE_PRUNING", 2)
    bad = {"means": [0.1, 0.2, 0.2], "pause": 0.2}
    fake.plan({2: bad, "*": {"means": [0.5, 0.6, 0.7]}, 3: {**bad, "means": [0.6, 0.65, 0.65]}})
    assert fake.run(4, fixed=[*fake.fixed[:-1], "3"]) == 0
    trials = fake.trials()
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE", "PRUNED", "COMPLETE"]
    assert (trials[2].value, trials[2].last_step, trials[3].value) == (0.2, 2, 0.65)
    assert "trial 2: ended early, mean 0.2000 after epoch 2" in capsys.readouterr().out
    assert (fake.out / "trial-2.log").read_text() == "stopped\n"
    assert trials[0].intermediate_values == {1: 0.5, 2: 0.6, 3: 0.7}


def test_a_failing_trial_is_recorded_with_its_last_line_and_the_search_goes_on(
    fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.plan({1: {"status": 1, "error": "finetune step 3: the loss of sst is nan"}})
    assert fake.run(3) == 0
    assert fake.states() == ["COMPLETE", "FAIL", "COMPLETE"]
    message = "exit status 1: finetune step 3: the loss of sst is nan"
    assert fake.trials()[1].user_attrs["error"] == message
    shown = capsys.readouterr().out
    assert f"trial 1: failed, {message}" in shown and f"({message})" in shown.split("flags\n")[1]


def test_defaults_that_fail_end_the_search_and_are_tried_again_by_the_next(
    fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.plan({0: {"status": 2, "error": "--data x: no such directory"}})
    assert fake.run(3) == 1
    expected = "error: trial 0, with the default flags, failed: exit status 2: --data x: no such directory\n"
    assert capsys.readouterr().err == expected
    assert fake.states() == ["FAIL"]
    assert fake.run(2) == 0
    assert fake.states() == ["FAIL", "COMPLETE", "COMPLETE"]
    assert fake.trials()[1].user_attrs["defaults"] and fake.trials()[1].params == fake.trials()[0].params
    assert flags_of(fake.out, 1).endswith(f"--epochs 5 --out {fake.out}/trial-1")


def test_dev_means_are_those_of_fine_tuning_as_far_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert dev_means(path) == {}
    records: list[dict[str, Any]] = [
        {"stage": "pretrain", "epoch": 1, "step": 1, "dev": {"mean": 0.1}},
        {"stage": "finetune", "epoch": 1, "step": 1, "loss": 2},
        {"stage": "finetune", "epoch": 1, "step": 1, "dev": {"mean": 0.4}},
        {"stage": "finetune", "epoch": 2, "step": 2, "dev": {"mean": None}},
        {"stage": "finetune", "epoch": 3, "step": 3, "dev": {"mean": 0.6}},
        {"stage": "finetune", "epoch": 4, "step": 4, "dev": {"mean": 0.7}},
    ]
    path.write_text("\n".join(map(json.dumps, records))[:-9])
    assert dev_means(path) == {1: 0.4, 3: 0.6}


def test_the_last_line_of_a_log_is_its_error(tmp_path: Path) -> None:
    for text, line in (("a\nerror: b\n\nc\n", "b"), ("a\nValueError: c\n", "ValueError: c"), ("", "no output")):
        (tmp_path / "log").write_text(text)
        assert last_line(tmp_path / "log") == line


# -------------------------------------------------------------------------------------------- stopped and killed


@pytest.mark.parametrize("what", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_the_run_cleanly_and_the_same_command_resumes_it(
    what: signal.Signals, fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.plan({1: {"means": [0.2, 0.9], "pause": 30}, 2: {"means": [0.2, 0.9]}})

    def stop_after_an_epoch(metrics: Path) -> dict[int, float]:
        if (found := dev_means(metrics)) == {1: 0.2}:
            os.kill(os.getpid(), what)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(search, "dev_means", stop_after_an_epoch)
        assert fake.run(2) == 130
    arguments = shlex.join(["--trials", "2", "--out", str(fake.out), "--", *fake.fixed])
    assert capsys.readouterr().out.endswith(f"stopped; to go on: python sweeps/search.py {arguments}\n")
    assert (fake.out / "trial-1.log").read_text() == "stopped\n"

    assert fake.run(2) == 0
    assert fake.states() == ["COMPLETE", "FAIL", "COMPLETE"]
    trials = fake.trials()
    assert trials[1].params == trials[2].params and trials[2].intermediate_values == {1: 0.2, 2: 0.9}
    assert "trial 2: goes on with the run of trial 1, which was killed" in capsys.readouterr().out
    assert not (fake.out / "trial-1").exists()
    results = json.loads((fake.out / "trial-2" / "results.json").read_text())
    assert results["argv"] == ["--resume", str(fake.out / "trial-2")]
    assert f"--out {fake.out}/trial-1" in flags_of(fake.out, 2)


class Killed(BaseException):
    """Ends a search as SIGKILL does: nothing is told to the study."""


def kill(fake: Fake, number: int, monkeypatch: pytest.MonkeyPatch, before: str = "start_run") -> None:
    """A search of three trials is killed before it calls that function for that trial."""
    original = getattr(search, before)

    def cut(*args: Any) -> Any:
        if any(f"trial-{number}" in str(arg) for arg in args):
            raise Killed
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(search, before, cut)
        with pytest.raises(Killed):
            fake.run(3)


@pytest.mark.parametrize("number", [0, 1])
def test_a_trial_killed_before_its_run_began_is_repeated(
    number: int, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill(fake, number, monkeypatch)
    assert fake.states() == ["COMPLETE", "RUNNING"][-number - 1 :]
    (fake.out / f"trial-{number}").mkdir()  # what a run leaves that was killed before it could be resumed
    assert fake.run(2) == 0
    expected = ["COMPLETE", "COMPLETE"]
    expected.insert(number, "FAIL")
    assert fake.states() == expected
    trials = fake.trials()
    assert trials[number].params == trials[number + 1].params
    assert [bool(trial.user_attrs.get("defaults")) for trial in trials] == [True, number == 0, False]
    assert f"--out {fake.out}/trial-{number + 1}" in flags_of(fake.out, number + 1)
    assert (fake.out / f"trial-{number}-killed").is_dir() and not (fake.out / f"trial-{number}").exists()


def test_a_trial_killed_twice_goes_on_with_its_first_run(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.plan({1: {"means": [0.2], "error": "killed", "status": 9}, 3: {"means": [0.2, 0.9]}})
    kill(fake, 1, monkeypatch, before="last_line")
    kill(fake, 2, monkeypatch, before="result_mean")
    fake.out.joinpath("trial-2").rename(fake.out / "trial-1")  # as if it was killed before it took the run over
    assert fake.run(2) == 0
    assert fake.states() == ["COMPLETE", "FAIL", "FAIL", "COMPLETE"]
    assert fake.trials()[3].params == fake.trials()[1].params and fake.trials()[3].value == 0.9
    assert f"--out {fake.out}/trial-1" in flags_of(fake.out, 3)


def test_a_run_that_had_ended_when_the_search_was_killed_is_not_repeated(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.plan({1: {"means": [0.8]}})
    kill(fake, 1, monkeypatch, before="result_mean")
    assert fake.states() == ["COMPLETE", "RUNNING"] and (fake.out / "trial-1" / "results.json").exists()
    assert fake.run(2) == 0
    assert [trial.value for trial in fake.trials()] == [0.5, None, 0.8]
    assert json.loads((fake.out / "trial-2" / "results.json").read_text())["argv"][-1] == str(fake.out / "trial-1")


@pytest.mark.parametrize("is_alive", [True, False])
def test_a_trial_of_another_machine_is_repeated_only_if_that_has_fallen_silent(is_alive: bool, fake: Fake) -> None:
    path = fake.folder / "shared.db"
    storage = f"sqlite:///{path}"
    assert fake.run(1, "--storage", storage) == 0
    elsewhere = optuna.load_study(study_name="search", storage=storage).ask()
    elsewhere.suggest_categorical("batch_size", (16, 32, 64))
    elsewhere.set_user_attr("place", "elsewhere:/out")
    optuna.storages.RDBStorage(storage, heartbeat_interval=9).record_heartbeat(elsewhere._trial_id)
    if not is_alive:
        with sqlite3.connect(path) as database:
            database.execute("update trial_heartbeats set heartbeat = datetime('now', '-70 seconds')")
    assert fake.run(2, "--storage", storage) == 0
    trials = fake.trials(storage)
    assert [trial.state.name for trial in trials] == ["COMPLETE", "RUNNING" if is_alive else "FAIL", "COMPLETE"]
    if not is_alive:
        assert trials[2].params["batch_size"] == trials[1].params["batch_size"]
        assert trials[2].user_attrs["place"].endswith(str(fake.out))


def test_only_one_search_runs_in_a_directory(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.out.mkdir()
    with (fake.out / "search.lock").open("ab") as lock:
        assert search.hold(lock)
        assert fake.run(1) == 2
    assert "another search is running in it" in capsys.readouterr().err
    assert fake.run(1) == 0


def test_a_run_that_outlived_its_search_is_waited_for(
    fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kill(fake, 1, monkeypatch)
    (fake.out / "trial-1.log").touch()
    fake.plan({1: {"means": [0.3, 0.8], "pause": 1.5}})
    search.start_run(["--out", str(fake.out / "trial-1")], fake.out / "trial-1.log")
    while not (fake.out / "trial-1" / "config.json").exists():
        time.sleep(0.01)
    assert fake.run(2) == 0
    assert "trial-1: waiting for its run, which has outlived the last search\n" in capsys.readouterr().out
    assert fake.trials()[2].value == 0.8


def test_a_killed_search_ends_its_run_and_the_same_command_finishes_the_search(
    tiny: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real runs: the search is killed in its first trial, whose run writes its checkpoint and is resumed."""
    out = tmp_path / "out"
    fixed = f"--model {tiny} --data {data} --device cpu --threads 1 --no-tensorboard --cache off --pretrain_epochs 0 "
    fixed += "--epochs 2 --steps_per_epoch 60 --batch_size 4"
    arguments = ["--trials", "1", "--out", str(out), "--", *fixed.split()]
    process = subprocess.Popen([sys.executable, str(ROOT / "sweeps" / "search.py"), *arguments], stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (out / "trial-0" / "metrics.jsonl").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    with (out / "trial-0.log").open("ab") as log:
        while not search.hold(log):
            time.sleep(0.02)
    if sys.platform == "linux":
        assert not (out / "trial-0" / "results.json").exists()
        assert (out / "trial-0.log").read_text().splitlines()[-1].startswith("stopped; to go on")
    assert search.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "trial 1: goes on with the run of trial 0" in shown and "best: trial 1" in shown
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{out / 'study.db'}")
    assert [trial.state.name for trial in study.trials] == ["FAIL", "COMPLETE"]
    results = json.loads((out / "trial-1" / "results.json").read_text())
    assert study.trials[1].value == results["dev"]["mean"]
    assert list(study.trials[1].intermediate_values) == [1, 2]
    config = json.loads((out / "trial-1" / "config.json").read_text())
    assert (config["weight_decay"], config["warmup"], config["drop_longest"]) == (0.01, 0.1, 0.0)
    assert config["lr"] == study.trials[1].params["lr"]


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("own", "fixed", "message"),
    [
        ("--trials 0", "", "--trials 0: expected 1 or more"),
        ("--trials x", "", "--trials: invalid int value: 'x'"),
        ("--lr 1", "", "unrecognized arguments: --lr; flags of multitask_classifier.py stand behind --"),
        ("", "--out x", "--out x: expected no such flag behind --"),
        ("", "--resume x", "--resume x: expected no such flag behind --"),
        ("", "--option pretrain", "--option pretrain: expected no such flag behind --, a search fine-tunes"),
        ("", "--warmup 3", "--warmup 3.0: expected a number from 0 to below 1"),
        ("", "--model /nowhere/at/all", "--model /nowhere/at/all: no such directory"),
        ("--storage nonsense", "", "--storage nonsense: cannot be used"),
        ("--storage sqlite:////nowhere/x.db", "", "--storage sqlite:////nowhere/x.db: cannot be used"),
        ("--storage sqlite:///{folder}/study.db", "", "--storage sqlite:///{folder}/study.db: cannot be used"),
        ("--out /dev/null/x", "", "--out /dev/null/x: cannot be made"),
    ],
)
def test_bad_input_is_one_line(
    own: str, fixed: str, message: str, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    given = fixed.split() if "--model" in fixed else [*fake.fixed, *fixed.split()]
    (fake.folder / "study.db").write_text("no database, but long enough to be taken for one " * 20)
    assert fake.run(1, *own.format(folder=fake.folder).split(), fixed=given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message.format(folder=fake.folder)}")


def test_without_optuna_the_line_says_what_to_install() -> None:
    script = "import sys; sys.modules['optuna'] = None; import sweeps.search"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: optuna is not installed, expected `pip install -r requirements-dev.txt`\n"
    assert "\noptuna==" in (ROOT / "requirements-dev.txt").read_text()


def test_another_search_is_told_apart_by_its_flags_its_space_and_its_directory(
    fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fake.run(1) == 0
    other = [*fake.fixed, "--weight_decay", "0.1"]
    assert fake.run(2, fixed=other) == 2
    assert f"--study search: was begun with `{shlex.join(fake.fixed)}` behind --" in capsys.readouterr().err
    assert fake.run(2, "--study", "other", fixed=other) == 2
    assert "trial-0 in it is another search's, expected another directory" in capsys.readouterr().err
    monkeypatch.delitem(SPACE, "warmup")
    assert fake.run(2) == 2
    assert "was begun with another space, expected another --study" in capsys.readouterr().err
    assert fake.states() == ["COMPLETE"]
