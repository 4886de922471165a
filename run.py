"""One run: its stages, what is shown of them and what is saved."""

import itertools
import json
import os
import platform
import re
import resource
import signal
import subprocess
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor

from checkpoints import (
    EMBEDDED_MODEL,
    checkpoint_folder,
    find_checkpoint,
    load_model,
    read_bert_config,
    read_layout,
    save_checkpoint,
)
from config import Config, FlagError, automatic, has_frozen_stage
from console import Console, duration, size
from datasets import (
    DataError,
    DeferredRows,
    FeatureRows,
    Rows,
    TokenizedRows,
    Tokenizer,
    data_folder,
    read_examples,
    tasks_in,
)
from distributed import ALONE, ProcessGroup
from engine import Event, Methods, Stage, StageData, Trainer, TrainingError, mean_conflicts
from evaluation import (
    Precision,
    compute_features,
    confusion_matrices,
    evaluate,
    format_scores,
    format_table,
    mean_score,
    metrics_of,
    predict_all,
    write_dev_rows,
    write_predictions,
)
from heads import PooledHead, absorb_scale
from messages import counted, machine_failure, resume_command, shown
from mlm import MLM, MaskedHead, make_masked_head, masked_trainer
from model import FrozenEncoder, Layout, MultitaskBert, TaskModel, Trained, parameter_counts
from ops import speed_report
from parameters import Choice
from pcgrad import find_treatment
from remarks import guess_scores, remarks
from run_data import Data, load_data
from run_record import CONFIG, MetricsLog, RunDirectory, RunError, read_json, replace_folder, run_of
from run_state import read_state, saved_settings, write_state
from schedulers import SCHEDULERS, Setting
from seeding import derive_seed
from smart import REGULARIZERS
from soup import check_ingredients, cook
from tasks import SPLITS, TASKS
from trackers import Tracking

NUM_TRIED = 64  # rows on which a head that has absorbed a scale is tried
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Stopped(Exception):
    """The run was told to stop; its last finished step is in the checkpoint."""


class StopSignals:
    """Ctrl-C and SIGTERM ask the run to stop after the step that is running; a second one stops at once.

    (Not a SIGTERM right behind the first signal: those who stop a group of processes often send two.)
    """

    def __init__(self, processes: ProcessGroup = ALONE) -> None:
        self.processes = processes
        self.number: signal.Signals | None = None
        self.way = ""  # the command that goes on, as soon as there is a run
        self._first = 0.0
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}

    @property
    def status(self) -> int:
        """The exit status of a stopped run."""
        return 128 + (self.number or signal.SIGINT)

    def restore(self) -> None:
        """Gives the signals back to those who had them. (torchrun sends one to all whose neighbour has ended.)"""
        for number, handler in self._before.items():
            signal.signal(number, handler if self.processes.size == 1 else signal.SIG_IGN)

    def check(self) -> None:
        """Raises Stopped if the run was told to stop: in all processes, wherever the signal went."""
        if number := self.processes.greatest(self.number or 0):
            self.number = signal.Signals(number)
            raise Stopped

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._first = signal.Signals(number), time.monotonic()
            self._tell(b"stopping after this step; a second time stops at once, without saving\n")
        elif self._is_another(number):
            way = f"; to go on from the last checkpoint: {self.way}" if self.way else ""
            self._tell(f"stopped at once{way}\n".encode())
            os._exit(128 + number)

    def _tell(self, line: bytes) -> None:
        """(An exception could come up anywhere, such as in C code, and print is not for signals.)"""
        if self.processes.is_first:
            os.write(2, line)

    def _is_another(self, number: int) -> bool:
        """Whether a signal behind the first is meant as one more. (Of a Ctrl-C torchrun sends a second one itself.)"""
        lasted = time.monotonic() - self._first
        return lasted > 1 or (number == signal.SIGINT and self.processes.size == 1)


# ---------------------------------------------------------------------------------------------- flags to objects


def resolve(config: Config, processes: ProcessGroup = ALONE) -> tuple[Config, Path]:
    """The settings with nothing left to be chosen automatically, and the folder that the model comes from."""
    start = config.checkpoint or next(iter(config.checkpoints), "")
    folder = checkpoint_folder(Path(start)) if start else find_checkpoint(config.model)
    model = model_behind(folder) if start else config.model
    encoder, layout = read_bert_config(folder), read_layout(folder) or Layout({}, pooling=default_pooling(model))
    if config.max_length > (most := encoder.num_positions):
        raise FlagError(f"--max_length {config.max_length}: the model has {most} positions, expected no more")
    out = config.out or free_name(Path("runs"), f"{time.strftime('%Y%m%d-%H%M%S')}-{config.option}")
    settled = replace(
        config,
        device=resolve_device(config.device),
        out=processes.of_first(str(Path(out))),
        model=str(folder.resolve()) if not start and Path(model).is_dir() else model,
        data=config.data if config.data == "sample" else str(Path(config.data).resolve()),
        task_file=tuple(str(Path(name).resolve()) for name in config.task_file),
        checkpoint=str(Path(config.checkpoint).resolve()) if config.checkpoint else "",
        checkpoints=tuple(str(Path(name).resolve()) for name in config.checkpoints),
        lr=config.lr or default_learning_rate(encoder.hidden_size),
        pretrain_epochs=0 if config.option == "finetune" and config.checkpoint else config.pretrain_epochs,
        mlm_lr=config.mlm_lr or (default_learning_rate(encoder.hidden_size) if config.mlm_epochs else 0.0),
        draws_per_step=config.draws,
        max_length=config.max_length or most,
        copy_top_layers=config.copy_top_layers or layout.copy_top_layers,
        pooling=config.pooling or layout.pooling,
        pairs=config.pairs or layout.pairs,
        threads=torch.get_num_threads(),
        eval_batch_size=config.eval_batch_size or default_eval_batch_size(resolve_device(config.device)),
    )
    if settled.mlm_epochs and settled.copy_top_layers:
        raise FlagError(
            f"--mlm_epochs {settled.mlm_epochs}: the top {settled.copy_top_layers} layers of --checkpoint are each "
            "task's own, expected one whole encoder"
        )
    return settled, folder


def resolve_device(name: str) -> str:
    """ "cpu" or "cuda". Raises FlagError if there is no GPU where one is asked for."""
    if name == "cuda" and not torch.cuda.is_available():
        raise FlagError("--device cuda: no CUDA GPU found, expected cpu or auto")
    return name if name != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def default_eval_batch_size(device: str) -> int:
    """As many rows as keep a device busy."""
    return 64 if device == "cpu" else 1024


def model_behind(checkpoint: Path) -> str:
    """The --model with which the run of a checkpoint began, or "" where that is not known."""
    with suppress(RunError):
        values = read_json(run_of(checkpoint) / CONFIG)
        if isinstance(values, dict) and isinstance(model := values.get("model"), str):
            return model
    return ""


def default_pooling(model: str) -> str:
    """Of a new model: the embedded one was made with means of its tokens, and its pooler is what that left behind."""
    return "mean" if model == EMBEDDED_MODEL else Layout.pooling


def default_learning_rate(width: int) -> float:
    """Peak learning rate of the whole encoder: 8e-5 for a hidden size of 384, 2.8e-5 for 768, 1.8e-5 for 1024."""
    return float(f"{8e-5 * (384 / width) ** 1.5:.2g}")


def free_name(folder: Path, name: str) -> Path:
    """The name in the folder, with a number behind it where runs that began in the same second have it already."""
    candidates = (folder / (name if number == 1 else f"{name}-{number}") for number in itertools.count(1))
    return next(path for path in candidates if not path.exists())


def model_layout(config: Config, folder: Path) -> Layout:
    """Heads, adapters and top layers: what the checkpoint holds, with what the flags add to it."""
    saved = read_layout(folder) or Layout({})
    asked = {task: config.choice("head", name) for task, name in config.heads.items()}
    heads = {task: asked.get(task) or saved.heads.get(task) or config.choice("head", "linear") for task in config.tasks}
    adapter = config.choice("adapter", config.adapter) if config.adapter else saved.adapter
    if saved.adapter and adapter == Choice(saved.adapter.name, type(saved.adapter.parameters)()):
        adapter = saved.adapter  # asked for by name alone
    return Layout(heads, adapter, config.copy_top_layers, config.pooling, config.pairs)


def plan_stages(config: Config, data: Data) -> list[Stage]:
    """What `--option` runs, in order."""
    if not config.trains:
        return []
    first = [mlm_stage(config, data)] if config.mlm_epochs else []
    if config.option == "individual_pretrain":
        each = [make_stage(config, data, f"pretrain_{task}", (task,), is_frozen=True) for task in config.tasks]
        return [*first, *each]
    frozen = make_stage(config, data, "pretrain", config.tasks, is_frozen=True)
    if config.option == "pretrain":
        return [*first, frozen]
    first += [frozen] if has_frozen_stage(config) else []
    return [*first, make_stage(config, data, "finetune", config.tasks, is_frozen=False)]


def mlm_stage(config: Config, data: Data) -> Stage:
    """Masked-language modelling on the training texts of all tasks."""
    texts = replace(data, train={task: rows.by_sequence() for task, rows in data.train.items()})
    stage = make_stage(config, texts, MLM, config.tasks, is_frozen=False)
    return replace(stage, tasks=(MLM,), epochs=config.mlm_epochs, lr=config.mlm_lr)


def make_stage(config: Config, data: Data, name: str, tasks: tuple[str, ...], is_frozen: bool) -> Stage:
    num_rows = sum(len(data.train[task]) for task in tasks)
    return Stage(
        name=name,
        tasks=tasks,
        epochs=config.pretrain_epochs if is_frozen else config.epochs,
        steps_per_epoch=config.steps_per_epoch or -(-num_rows // config.rows_per_step),
        batch_size=config.batch_size,
        accumulation_steps=config.accumulation_steps,
        lr=config.pretrain_lr if is_frozen else config.lr,
        warmup=config.warmup,
        weight_decay=config.pretrain_weight_decay if is_frozen else config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        patience=config.patience,
        eval_every=config.eval_every,
        eval_batch_size=config.eval_batch_size,
        seed=config.seed,
        is_frozen=is_frozen,
    )


def make_methods(config: Config, stage: Stage, model: MultitaskBert, data: StageData) -> Methods:
    """The methods of a stage; the frozen one, which ends with its best epoch's heads, has the scheduler alone."""
    is_treated = config.is_treated and not stage.is_frozen
    num_examples = tuple(len(data.train[task]) for task in stage.tasks)
    draws = 1 if stage.is_frozen else config.draws
    setting = Setting(stage.tasks, num_examples, stage.epochs, draws, every_task=is_treated)
    scheduler = SCHEDULERS[config.scheduler](config.choice("scheduler", config.scheduler).parameters, setting)
    if stage.is_frozen:
        return Methods(scheduler)
    segments = model.parameters_by_part() if config.granularity == "layer" else [list(model.shared_parameters())]
    treatment = None
    if is_treated:
        parameters = config.choice("treatment", config.treatment).parameters
        try:
            found = find_treatment(config.treatment, config.treatment_arguments)
            treatment = found(parameters, len(stage.tasks), len(segments))
        except ValueError as error:  # a resumed run where torchjd is not installed
            raise FlagError(str(error)) from None
    chosen = [(name, config.choice("regularizer", name).parameters) for name in config.regularizers]
    regularizers = [REGULARIZERS[name](parameters, model, stage.num_steps) for name, parameters in chosen]
    ema_decay = config.ema_decay if config.average == "ema" else 0.0
    scales_equally = config.gradient_scale == "equal"
    return Methods(scheduler, treatment, regularizers, segments, scales_equally, ema_decay, config.loss_weights)


def trained_parameters(config: Config, stage: Stage, model: MultitaskBert) -> Trained:
    """What a stage moves."""
    if stage.is_frozen:
        return Trained({}, {task: model.head_parameters(task) for task in stage.tasks})
    if config.train == config.adapter:
        return Trained({}, {task: model.adapter_parameters(task) for task in stage.tasks})
    return model.trained()


# ------------------------------------------------------------------------------------------------------ the run


class Run:
    """One run from loaded data to results."""

    def __init__(
        self,
        config: Config,
        model: MultitaskBert,
        tokenizer_folder: Path,
        data: Data,
        directory: RunDirectory,
        console: Console,
        stop: StopSignals,
        saved: tuple[dict[str, Tensor], dict[str, Any]] = ({}, {}),
        processes: ProcessGroup = ALONE,
    ) -> None:
        """saved: what `read_state` gives of a run that is resumed. processes: that train together; the first alone
        writes and shows."""
        self.config, self.model, self.data, self.directory = config, model, data, directory
        self.processes = processes
        self.tensors, self.saved = saved
        self.tokenizer_folder, self.console, self.stop = tokenizer_folder, console, stop
        self.precision = Precision(processes.device(config.device), AMP[config.amp])
        self.stages = plan_stages(config, data)
        self.seconds: dict[str, float] = {}
        self.best_epochs: dict[str, int] = {}
        self.conflicts: dict[str, Any] = {}
        self.soup: list[dict[str, Any]] = []
        self.known_features: dict[int, FeatureRows] = {}
        self.masked_head: MaskedHead | None = None  # while masked-language modelling runs
        self.start_lines: list[str] = []
        self.metrics: MetricsLog
        self.tracking = Tracking("", Path(), {}, 0, console.say)

    def train(self) -> None:
        """All stages, from the checkpoint on where there is one."""
        for line in self.start_lines:
            wrapped: Any = {"subsequent_indent": " " * 12, "break_long_words": False, "break_on_hyphens": False}
            whole = re.sub("`.*?`", lambda found: found[0].replace(" ", "\0"), line)  # a command, to be pasted
            self.console.say(textwrap.fill(whole, 99, **wrapped).replace("\0", " "))
        state, first = self.saved, self.first_stage()
        if self.processes.is_first:
            self.metrics = self.directory.open_metrics(state.get("metrics_size", 0), self.config.tensorboard)
            config, num_records = self.config, len(self.metrics.records())
            self.tracking = Tracking(config.log, self.directory.path, config.to_dict(), num_records, self.console.say)
        for name in ("seconds", "best_epochs", "conflicts"):
            getattr(self, name).update(state.get(name, {}))
        if self.config.option == "soup":
            self.make_soup()
        for number in range(first, len(self.stages)):
            if number > first:
                self.save(number, None)  # a stage that has ended is not begun again, nor are its features computed
            trainer = self.make_trainer(number)
            if number == first and state.get("progress"):
                self.load_trainer(trainer, self.tensors, state["progress"])
            self.tensors = {}
            self.run_stage(number, trainer)
        if self.stages and self.stages[-1].is_frozen:
            self.save_best()
            self.save(len(self.stages), None)  # heads of an ended stage read features as they are

    def first_stage(self) -> int:
        """The stage that the run begins or goes on with. Raises RunError if the saved state is not one of this run."""
        first, progress, num_stages = self.saved.get("stage", 0), self.saved.get("progress"), len(self.stages)
        if not 0 <= first <= num_stages - (progress is not None) or (progress is None) == bool(self.tensors):
            raise RunError(f"{self.directory.last}: stage {shown(first)} of {num_stages} and what it holds do not fit")
        has_best = first == num_stages > 0 or (progress and progress["best_epoch"] and not self.stages[first].is_frozen)
        if has_best and not self.directory.best.is_dir():
            raise RunError(f"{self.directory.best}: missing, expected the best checkpoint of the run so far")
        return int(first)

    def make_soup(self) -> None:
        """Gives the model the mean of the checkpoints, and saves it."""
        config, data, started = self.config, self.data.dev, time.perf_counter()

        def scores() -> dict[str, dict[str, float]]:
            with self.console.bar("soup", sum(map(len, data.values())), unit="row"):
                size, say = config.eval_batch_size, self.console.say
                return evaluate(self.model, data, size, self.precision, say, self.between, self.processes)

        self.soup = cook(self.model, config.checkpoints, config.soup == "greedy", scores, self.console.say)
        self.save_best()
        self.seconds["soup"] = round(time.perf_counter() - started, 3)

    def between(self) -> None:
        """Called between the batches of an evaluation."""
        self.stop.check()
        self.console.advance(self.config.eval_batch_size * self.processes.size)

    def load_trainer(self, trainer: Trainer, tensors: dict[str, Any], progress: dict[str, Any]) -> None:
        try:
            trainer.load_state(tensors, progress)
        except ValueError as error:
            raise RunError(f"{self.directory.last}: not the state of this run's training ({error})") from None

    def make_trainer(self, number: int) -> Trainer:
        """The trainer of a stage."""
        stage, model = self.stages[number], self.model
        if stage.name == MLM:
            return self.make_mlm_trainer(stage)
        rows: list[dict[str, Rows]] = [{t: of[t] for t in stage.tasks} for of in (self.data.train, self.data.dev)]
        stage_model: TaskModel = model
        on_features = stage.is_frozen and any(map(model.has_features, stage.tasks))
        if stage.is_frozen:
            rows = [{t: self.features(stage, t, of[t]) for t in stage.tasks} for of in (self.data.train, self.data.dev)]
            stage_model = FrozenEncoder(model)
        data = StageData(*rows)
        trained = trained_parameters(self.config, stage, model)
        trained.freeze_others(model)
        methods = make_methods(self.config, stage, model, data)
        how = self.precision, self.records_passes, self.processes, not on_features
        return Trainer(stage, stage_model, trained, data, methods, *how)

    @property
    def records_passes(self) -> bool:
        """Whether passes on a GPU may be CUDA graphs. (Of heads that read hidden states, and of
        several processes, nobody has tried it.)"""
        is_simple = self.model.encoder.can_be_recorded and all(map(self.model.has_features, self.config.tasks))
        return self.config.cuda_graphs and is_simple and self.processes.size == 1

    def make_mlm_trainer(self, stage: Stage) -> Trainer:
        folder, device = self.tokenizer_folder, self.precision.device
        head, is_new = make_masked_head(self.model.encoder.config, folder, stage.seed)
        if is_new:
            self.console.say(f"{stage.name}: transform and output bias are new, the checkpoint has none")
        self.masked_head = head.to(device)
        tokenizer = Tokenizer(folder, self.config.max_length)
        how = self.precision, self.processes
        return masked_trainer(stage, self.model, self.masked_head, tokenizer, self.data.train, *how)

    def features(self, stage: Stage, task: str, rows: TokenizedRows) -> Rows:
        """Features of the frozen encoder, computed when they are first needed, and in units of the training rows'
        deviations: as they come a head would take hundreds of epochs. The rows themselves for a head that reads hidden
        states: of 100,000 tokens those of BERT-base's layers are 4 GB."""
        if not self.model.has_features(task):
            return rows

        def standardized() -> Rows:
            return self.raw_features(stage, rows).standardized(*self.raw_features(stage, self.data.train[task]).moments)

        return DeferredRows(rows.labels, standardized)

    def raw_features(self, stage: Stage, rows: TokenizedRows) -> FeatureRows:
        """The features as the encoder gives them."""
        if id(rows) not in self.known_features:
            name, size = rows.task.name, self.config.eval_batch_size
            started = time.perf_counter()
            with self.console.bar(f"features of the frozen encoder, {name}", len(rows), unit="row"):
                found = compute_features(self.model, name, rows, size, self.precision, self.between, self.processes)
            self.known_features[id(rows)] = found
            key = f"{stage.name}_features"
            self.seconds[key] = round(self.seconds.get(key, 0) + time.perf_counter() - started, 3)
        return self.known_features[id(rows)]

    def run_stage(self, number: int, trainer: Trainer) -> None:
        """Trains a stage to its end; stopped, or at an error, the last finished step is saved."""
        stage, progress, save_every = trainer.stage, trainer.progress, self.config.save_every
        with self.console.bar(stage.name, stage.num_steps, progress.step):
            try:
                for event in trainer.run(self.stop.check, save_every):
                    self.show(stage, event)
                    if event.is_best and not stage.is_frozen:
                        with trainer.averaged():
                            self.save_best()
                    if event.is_epoch or (save_every and event.record and event.record["step"] % save_every == 0):
                        self.save(number, trainer)
                    self.stop.check()
            except (Stopped, TrainingError, BrokenPipeError) as error:
                if isinstance(error, BrokenPipeError) and self.processes.size > 1:
                    raise  # the others are in the next step
                try:
                    for event in trainer.settle():
                        self.show(stage, event)
                finally:
                    self.save(number, trainer)
                raise
        if stage.is_frozen:
            for task in filter(self.model.has_features, stage.tasks):
                rows = self.raw_features(stage, self.data.train[task])
                try:
                    absorb_scale(cast(PooledHead, self.model.heads[task]), rows.features[:NUM_TRIED], *rows.moments)
                except ValueError as error:
                    raise RunError(f"head {self.model.layout.heads[task].name}: {error}") from None
            self.known_features.clear()
        self.masked_head = None
        self.seconds[stage.name] = round(progress.seconds, 3)
        if progress.best_epoch:
            self.best_epochs[stage.name] = progress.best_epoch
        if trainer.is_treated:
            self.conflicts[stage.name] = mean_conflicts(progress.conflicts)

    def show(self, stage: Stage, event: Event) -> None:
        """Logs and prints what has just been done."""
        for note in event.notes:
            self.console.say(note)
        if event.record is None or not self.processes.is_first:
            return
        self.metrics.write(event.record)
        self.tracking.write(event.record)
        if not event.is_epoch:
            self.console.advance(1, event.record)
            return
        of = f"{stage.name} epoch {event.record['epoch']}/{stage.epochs}"
        if "dev" not in event.record:
            self.console.say(f"{of}: mean loss {event.record['mean_loss']:.3f}")
            return
        scores = {task: event.record["dev"][task] for task in stage.tasks}
        mark = f"  (best of {stage.name})" if event.is_best else ""
        self.console.say(f"{of}: dev {format_scores(scores)}{mark}")

    def save_best(self) -> None:
        self.replace(self.directory.best, lambda folder: save_checkpoint(self.model, self.tokenizer_folder, folder))

    def replace(self, folder: Path, write: Callable[[Path], None]) -> None:
        """Writes a folder of the run; the other processes wait until it is there."""
        if self.processes.is_first:
            replace_folder(folder, write)
        self.processes.greatest(0)

    def save(self, number: int, trainer: Trainer | None) -> None:
        """Writes `last/`: the model, and where stage `number` stands; without a trainer, that it has not begun."""
        tensors = trainer.state_tensors() if trainer else {}

        def write(folder: Path) -> None:
            save_checkpoint(self.model, self.tokenizer_folder, folder, self.masked_head)
            state = {
                "stage": number,
                "progress": asdict(trainer.progress) if trainer else None,
                **self.metrics.state,
                "seconds": self.seconds,
                "best_epochs": self.best_epochs,
                "conflicts": self.conflicts,
            }
            write_state(folder, tensors, state)

        self.replace(self.directory.last, write)

    def finish(self) -> None:
        """Scores of the best checkpoint, prediction files, results, and the table."""
        config, folder, size = self.config, self.directory.predictions, self.config.eval_batch_size
        if self.stages and not self.stages[-1].is_frozen:
            device = self.precision.device
            self.model = load_model(self.directory.best, self.model.layout, torch.Generator()).model.to(device)
        started = time.perf_counter()
        num_rows = sum(len(rows) for of in (self.data.dev, self.data.test) for rows in of.values())
        with self.console.bar("predictions", num_rows, unit="row"):
            how = size, self.precision, self.between, self.processes
            logits, test_logits = (predict_all(self.model, of, *how) for of in (self.data.dev, self.data.test))
        self.processes.leave()
        if not self.processes.is_first:
            return
        dev = metrics_of(logits, self.data.dev, lambda line: None)  # what there is to say stands below the table
        confusion = confusion_matrices(logits, self.data.dev)
        folder.mkdir(exist_ok=True)
        for task, rows in self.data.dev.items():
            write_predictions(task, rows, logits[task], folder / f"{task}-dev-output.csv")
            write_dev_rows(task, rows, logits[task], folder, self.dev_texts(task))
        for task, rows in self.data.test.items():
            write_predictions(task, rows, test_logits[task], folder / f"{task}-test-output.csv")
        self.seconds["final_evaluation"] = round(time.perf_counter() - started, 3)
        main_stages = [stage.name for stage in self.stages if stage.is_frozen == self.stages[-1].is_frozen]
        epochs = {name: self.best_epochs[name] for name in main_stages if name in self.best_epochs}
        training = round(sum(self.seconds.get(stage.name, 0) for stage in self.stages), 3)
        results: dict[str, Any] = {
            "dev": {**dev, "mean": mean_score(dev)},
            "best_epoch": next(iter(epochs.values()), None) if len(epochs) < 2 else epochs,
            "parameters": parameter_counts(self.model),
            "seconds": {**self.seconds, "training": training},
            "peak_memory_mb": peak_memory_mb(self.precision.device),
            "confusion": confusion,
            **({"gradients": self.conflicts} if self.conflicts else {}),
            **({"soup": self.soup} if self.soup else {}),
        }
        self.metrics.write_hyperparameters(config.to_dict(), results["dev"])
        self.tracking.finish(results["dev"])
        self.metrics.close()
        num_rows_of = {task: len(rows) for task, rows in self.data.dev.items()}
        gap = "\n" if self.stages or self.soup else ""  # below the lines of the work
        self.console.say(gap + format_table(dev, num_rows_of, guess_scores(dev, confusion)) + "\n")
        for line in remarks(dev, confusion, self.metrics.records()):
            self.console.say(line)
        self.draw_plots(results)
        self.directory.write_results(results)  # last: with it the run has ended
        with_test_file = [task for task in config.tasks if TASKS[task].file_name("test")]
        if missing := [task for task in with_test_file if task not in self.data.test]:
            whose = "it" if len(missing) == 1 else "them"
            self.console.say(f"no test file of {', '.join(missing)} in {config.data}: no test predictions for {whose}")
        has_best = self.directory.best.exists()
        holds = "results, predictions and the best checkpoint are" if has_best else "results and predictions are"
        times = f"training {duration(training)}, " if self.stages else ""
        memory = f"peak memory {results['peak_memory_mb']:.0f} MB"
        self.console.say(f"{times}{memory}; {holds} in {self.directory.path}")

    def dev_texts(self, task: str) -> list[tuple[str, ...]]:
        """The texts of the dev file, none if it has changed since it was read."""
        path = TASKS[task].path("dev", data_folder(self.config.data))
        with suppress(DataError):
            file = read_examples(path, TASKS[task], labelled=True)
            if file.sha256 == self.data.files[TASKS[task].file_key("dev")]["sha256"]:
                return [example.texts for example in file.examples]
        return []

    def draw_plots(self, results: Mapping[str, Any]) -> None:
        """Pictures of the run. Whatever may go wrong with them costs a line, not the run."""
        try:
            from reports.plots import write_run_plots

            write_run_plots(self.directory.path, results, self.config.format)
        except Exception as error:
            self.console.say(f"warning: no plots: {machine_failure(error) or error}")


def peak_memory_mb(device: torch.device) -> float:
    """Most memory that the process held: on the GPU by torch's count, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        return resident_memory_mb("VmHWM")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Darwin" else 2**10)


def resident_memory_mb(name: str) -> float:
    """Resident memory of this process by Linux: VmRSS, what it holds now, or VmHWM, the most that it held.

    (The peak that getrusage knows begins with that of the process that started this one.)
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(name))


# -------------------------------------------------------------------------------------------------------- start


def prepare(config: Config, console: Console, stop: StopSignals, processes: ProcessGroup = ALONE) -> Run:
    """A new run, or the one to resume, with everything loaded."""
    resumed = None
    if config.resume:
        path = run_of(Path(config.resume))
        resumed = RunDirectory.existing(path) if processes.is_first else RunDirectory(path)
        processes.greatest(0)  # nobody reads before it is whole
    saved: tuple[dict[str, Tensor], dict[str, Any]] = ({}, {})
    if resumed is not None:
        flags = config
        config, begun = saved_settings(resumed)
        saved = read_state(resumed)
        config = replace(config, out=str(resumed.path))
        is_open = "threads" in begun.get("automatic", ()) and begun.get("processes", 1) != processes.size
        config = replace(config, threads=flags.threads or (0 if is_open else config.threads))
        config = replace(config, device=flags.device if flags.device != "auto" else config.device)
        if config.data != "sample" and not Path(config.data).is_dir():
            where = "expected the run's data where it began; a link will do"
            raise RunError(f"--resume {config.out}: {config.data}: no such directory, {where}")
    if config.threads:
        torch.set_num_threads(config.threads)
    asked, (config, folder) = config, resolve(config, processes)
    if resumed is None and processes.is_first:
        RunDirectory.check_new(Path(config.out))
    if config.checkpoints:
        check_ingredients(config.checkpoints, config.tasks)
    if saved[1]:
        folder = Path(config.out) / "last"
    layout = model_layout(config, folder)
    try:
        device = processes.device(config.device)
    except ValueError as error:
        raise FlagError(str(error)) from None
    tokenizer = Tokenizer(folder, config.max_length, layout.is_siamese)
    if not processes.is_first:
        processes.greatest(0)  # the first has filled the token cache
    data = load_data(config, tokenizer, device)
    if processes.is_first:
        processes.greatest(0)
    try:
        loaded = load_model(folder, layout, torch.Generator().manual_seed(derive_seed(config.seed, "parameters")))
    except ValueError as error:  # an adapter that does not fit, or a checkpoint: one line
        raise FlagError(str(error)) from None
    if config.option == "test" and loaded.new_parts:
        known = ", ".join(saved_layout.tasks) if (saved_layout := read_layout(folder)) else "no task"
        new = ", ".join(loaded.new_parts)
        raise FlagError(f"--checkpoint {config.checkpoint}: has no {new}, expected a trained one; its heads: {known}")
    record = {**config.to_dict(), **environment(config.device), "processes": processes.size}
    record |= {"automatic": automatic(asked, config), "data_files": data.files, "layout": layout.to_dict()}
    check_same({**config.to_dict(), "data_files": data.files}, processes)
    if resumed is not None and begun["data_files"] != data.files:
        names = {**data.files, **begun["data_files"]}
        changed = [name for name in names if begun["data_files"].get(name) != data.files.get(name)]
        raise RunError(
            f"--resume {config.out}: {shown(', '.join(changed))} changed since the run began, expected the same files"
        )
    if resumed is not None and not saved[1]:
        data.notes.append(f"{resumed.last}: there is no checkpoint yet, the run begins once more")
    if resumed is not None and (number := begun.get("processes", 1)) != processes.size:
        data.notes.append(
            f"begun with {counted(number, 'process')}, going on with {processes.size}: the same rows, but other draws "
            "of dropout, and sums in another order"
        )
    record["stages"] = [asdict(stage) for stage in plan_stages(config, data)]
    path = Path(config.out)
    directory = resumed or (RunDirectory.create(path, record) if processes.is_first else RunDirectory(path))
    stop.way = resume_command(directory.path, processes.local_size, processes.size // processes.local_size)
    run = Run(config, loaded.model.to(device), folder, data, directory, console, stop, saved, processes)
    run.first_stage()
    run.start_lines = start_block(run, loaded.new_parts)
    return run


def check_same(settings: dict[str, Any], processes: ProcessGroup) -> None:
    """Raises RunError if this process has other settings than the first, such as those of a machine with other data."""
    of_first = json.loads(processes.of_first(json.dumps(settings)))
    if names := [name for name in settings if name != "threads" and settings[name] != of_first.get(name)]:
        found = f"process {processes.rank} has other {shown(', '.join(names))} than process 0"
        raise RunError(f"{found}, expected the same flags and data files on all machines")
    processes.greatest(0)  # nothing is written before all have come as far


def start_block(run: Run, new_parts: Sequence[str]) -> list[str]:
    """What a run is about to do: model, data, batch, methods, parameters."""
    config, encoder, counts = run.config, run.model.encoder.config, parameter_counts(run.model)
    is_cpu = config.device == "cpu"
    precision = "float32" if config.amp == "off" else config.amp
    threads = f", {counted(torch.get_num_threads(), 'thread')}" if is_cpu else ""
    threads = f", {run.processes.size} processes{threads}" if run.processes.size > 1 else threads
    speed = speed_report(config.device)
    is_slow = is_cpu and config.amp == "off" and speed != "compiled"
    source = config.checkpoint or config.model
    if config.checkpoints:
        source = f"{config.soup} soup of {len(config.checkpoints)} checkpoints"
    total, shared, own, separate = (size(counts[of]) for of in ("total", "shared", "per_task", "separate_models"))
    layers = f"{encoder.num_hidden_layers} layers, {encoder.hidden_size} wide"
    layers += f", pooling {config.pooling}, pairs {config.pairs}"
    is_equal = counts["total"] - counts["shared"] == counts["per_task"] * len(config.tasks)
    up_to = "" if is_equal else "up to "
    lines = [
        f"model       {source}: {layers}; {config.device}{threads}, {precision}",
        *([f"            slower than it could be, nothing is compiled for this processor: {speed}"] if is_slow else []),
        f"parameters  {total}: {shared} shared, {up_to}{own} a task (separate models would hold {separate})",
        f"data        {', '.join(dict.fromkeys(TASKS[task].folder or config.data for task in config.tasks))}",
    ]
    for task in config.tasks:
        rows = [f"{len(of[task])} {name}" for name in SPLITS if task in (of := getattr(run.data, name))]
        lines.append(f"            {task:<{max(5, *map(len, config.tasks))}} {', '.join(rows)}")
    if absent := [task for task in TASKS if task not in tasks_in(config.data)]:
        lines.append(f"            (no files of {', '.join(absent)}: left out)")
    for stage in run.stages:
        passes = f", {stage.accumulation_steps} passes" if stage.accumulation_steps > 1 else ""
        draws = f", {config.draws} draws" if config.draws > 1 and len(stage.tasks) > 1 and not stage.is_frozen else ""
        note = ", encoder frozen" if stage.is_frozen else ""
        note = ", its head is dropped afterwards" if stage.name == MLM else note
        lines.append(
            f"{stage.name:<11} {counted(stage.epochs, 'epoch')} of {counted(stage.steps_per_epoch, 'step')} of "
            f"{counted(stage.rows_per_step, 'row')}"
            f"{passes}{draws}, learning rate {stage.lr:g}{note}"
        )
    if run.stages:
        is_fixed = config.is_treated and config.draws == len(config.tasks)
        sampling = "every task once in each step" if is_fixed else f"tasks sampled by {config.scheduler}"
        sampling = "each task alone" if config.option == "individual_pretrain" else sampling
        sampling = sampling if len(config.tasks) > 1 else "single task"
        lines.append(f"methods     {', '.join([sampling, *_methods(config, run.model.layout)])}")
    if new_parts:
        lines.append(f"new         {', '.join(new_parts)}: not in the checkpoint, initialized")
    return [*lines, f"run         {config.out}", *run.data.notes, ""]


def _methods(config: Config, layout: Layout) -> list[str]:
    """What is chosen beside the scheduler, in words."""
    heads = {task: head.name for task, head in layout.heads.items() if head.name != "linear"}
    is_same = len(set(heads.values())) == 1 and len(heads) == len(layout.tasks)
    treatment = f"gradients aggregated by {config.treatment} ({config.granularity}, {config.gradient_scale} lengths)"
    weights = ", ".join(f"{task} {weight:.4g}" for task, weight in config.loss_weights.items())
    return [
        *([f"losses weighted ({weights})"] if config.task_weights else []),
        *([treatment] if config.is_treated else []),
        *config.regularizers,
        *([f"head {heads[layout.tasks[0]]}"] if is_same else [f"head {task} {name}" for task, name in heads.items()]),
        *([f"adapters {config.adapter}"] if config.adapter else []),
        *([f"the top {config.copy_top_layers} layers each task's own"] if config.copy_top_layers else []),
        *([f"training only {config.train}"] if config.train == config.adapter else []),
        *([f"weights averaged (decay {config.ema_decay:g})"] if config.average == "ema" else []),
        *(f"augmentation {name}" for name in config.chosen("augment")),
        *([f"the longest {config.drop_longest:.3g} of the rows dropped"] if config.drop_longest else []),
    ]


def environment(device: str) -> dict[str, Any]:
    """Versions, machine, commit and whether operations are compiled, for config.json."""
    packages = ("numpy", "tokenizers", "safetensors", "scikit-learn", "scipy", "torchjd")
    own = {"python": platform.python_version(), "torch": torch.__version__}  # which build it is too
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    return {
        "versions": {**own, **{name: _version(name) for name in packages}},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "processor": processor_name(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "commit": commit or None,
        "compiled": speed_report(device),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor_name() -> str:
    """The processor's model, as Linux says it or else Python."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
