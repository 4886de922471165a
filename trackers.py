"""Experiment trackers (`--log`): optional packages that are given what metrics.jsonl gets.

Each keeps to the machine if it is told so in its own way: WANDB_MODE=offline; MLFLOW_TRACKING_URI=sqlite:///FILE, or
file:DIR with MLFLOW_ALLOW_FILE_STORE=true; TRACKIO_DIR=DIR. Whatever fails costs a line, never the run.
"""

import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from run_record import flatten, mismatch, read_json, scalars, write_json

PROJECT = "multitask-bert"
STATE = "tracker.json"  # of a run: what its tracker calls it, and how many records of its log it has
Numbers = Mapping[str, float]


class Tracker(Protocol):
    """A run in a tracker. id: what the tracker calls it, from where it is taken up again when the run is resumed."""

    id: str

    def __init__(self, run: Path, id: str, settings: Mapping[str, Any]) -> None: ...

    def log(self, stage: str, step: int, numbers: Numbers) -> None:
        """Numbers of a step or evaluation, by names that begin with the stage's."""
        ...

    def finish(self, scores: Numbers) -> None:
        """The end; scores: final ones, none where the run was stopped."""
        ...


class Wandb:
    """Weights & Biases."""

    def __init__(self, run: Path, id: str, settings: Mapping[str, Any]) -> None:
        import wandb

        quiet, known = wandb.Settings(silent=True, console="off"), {"id": id, "resume": "allow"} if id else {}
        self.run = wandb.init(
            project=PROJECT, name=run.name, dir=str(run), config=dict(settings), settings=quiet, **known
        )
        self.id = self.run.id

    def log(self, stage: str, step: int, numbers: Numbers) -> None:
        self.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self.run.log({**numbers, f"{stage}/step": step})

    def finish(self, scores: Numbers) -> None:
        self.run.summary.update(dict(scores))
        self.run.finish()


class Mlflow:
    """MLflow."""

    def __init__(self, run: Path, id: str, settings: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient()
        found = self.client.get_experiment_by_name(PROJECT)
        experiment = found.experiment_id if found else self.client.create_experiment(PROJECT)
        self.id = id or self.client.create_run(experiment, run_name=run.name).info.run_id
        parameters = [Param(name, str(value)[:500]) for name, value in settings.items()]
        for start in range(0, len(parameters) if not id else 0, 100):  # as many as it takes at a time
            self.client.log_batch(self.id, params=parameters[start : start + 100])

    def log(self, stage: str, step: int, numbers: Numbers) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in numbers.items()])

    def finish(self, scores: Numbers) -> None:
        self.log("results", 0, scores)
        self.client.set_terminated(self.id, "FINISHED" if scores else "KILLED")


class Trackio:
    """Trackio."""

    def __init__(self, run: Path, id: str, settings: Mapping[str, Any]) -> None:
        import trackio

        self.id = id or f"{run.name}-{uuid.uuid4().hex[:8]}"
        self.run = trackio.init(
            project=PROJECT, name=self.id, config=dict(settings), resume="allow", embed=False, auto_log_gpu=False
        )

    def log(self, stage: str, step: int, numbers: Numbers) -> None:
        self.run.log({**numbers, f"{stage}/step": step})

    def finish(self, scores: Numbers) -> None:
        if scores:
            self.run.log(dict(scores))
        self.run.finish()


TRACKERS: dict[str, type[Tracker]] = {"wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}


class Tracking:
    """A run's tracker, if it has one. A resumed run goes on in the same place, and logs nothing twice."""

    def __init__(
        self, name: str, run: Path, settings: Mapping[str, Any], num_records: int, say: Callable[[str], None]
    ) -> None:
        """num_records: of metrics.jsonl, which a resumed run has kept. say: takes the line of a failure."""
        self.num_records = num_records
        self.name, self.say, self.path = name, say, run / STATE
        self.state: dict[str, Any] = {"id": "", "sent": 0}
        self.tracker: Tracker | None = None
        if name:
            self._try(lambda: self._begin(run, settings))

    def _begin(self, run: Path, settings: Mapping[str, Any]) -> None:
        if self.path.exists():
            self.state = read_json(self.path)
            if problem := mismatch(self.state, {"id": str, "sent": int}):
                raise ValueError(f"{self.path}: {problem}")
        self.tracker = TRACKERS[self.name](run, self.state["id"], settings)
        self.state["id"] = self.tracker.id
        write_json(self.path, self.state)

    def write(self, record: Mapping[str, Any]) -> None:
        """The next record of metrics.jsonl."""
        self.num_records += 1
        if self.tracker is not None and self.num_records > self.state["sent"]:
            tracker = self.tracker
            self._try(lambda: tracker.log(record["stage"], int(record["step"]), dict(scalars(record))))
            self.state["sent"] = self.num_records
            self._try(lambda: write_json(self.path, self.state))

    def finish(self, scores: Mapping[str, Any]) -> None:
        """The end of the run, or of this process; scores: those of the dev files, none where it was stopped."""
        if self.tracker is not None:
            tracker, self.tracker = self.tracker, None
            self._try(lambda: tracker.finish({f"results/{name}": value for name, value in flatten(scores)}))

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self.tracker = None
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self.say(f"warning: --log {self.name} failed, the run goes on without it ({reason})")
