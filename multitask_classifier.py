"""Trains one BERT for three language tasks: flags become objects, objects become stages, stages fill a run directory.

python multitask_classifier.py --option finetune --scheduler pal --pcgrad
"""

import itertools
import platform
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

import kernels
from bert import BertConfig, CheckpointError, find_checkpoint, read_config
from config import Config, FlagError, from_dict, parse
from console import Console, duration
from datasets import SPLITS, DataError, DeferredRows, Rows, TokenizedRows, Tokenizer
from engine import ConflictSummary, Metrics, StageSettings, Stopped, Trainer, TrainingError
from evaluation import (
    Precision,
    compute_features,
    confusion_matrices,
    format_scores,
    format_table,
    mean_score,
    metrics_of,
    predict_all,
    write_dev_rows,
    write_predictions,
)
from model import (
    FrozenEncoder,
    Layout,
    MultitaskBert,
    Predictor,
    TaskModel,
    checkpoint_folder,
    load,
    load_model,
    parameter_counts,
    read_layout,
    save_checkpoint,
)
from pal import PalConfig
from pcgrad import Sum, make_treatment
from prediction import PredictionError, predict_lines
from regularizers import BregmanProximal, Regularizer, Smoothness
from run_data import Data, load_data
from run_record import MetricsLog, RunDirectory, RunError, read_trainer, replace_folder, write_json, write_trainer
from schedulers import SCHEDULERS, Setting
from seeding import derive_seed
from smart import SmartConfig

USER_ERRORS = (FlagError, DataError, CheckpointError, RunError, TrainingError, PredictionError)
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


# ------------------------------------------------------------------------------------------------------- model


def resolve(config: Config) -> tuple[Config, Path]:
    """The settings with nothing left to be chosen automatically, and the folder that the model comes from."""
    folder = checkpoint_folder(Path(config.checkpoint)) if config.checkpoint else find_checkpoint(config.model)
    width = BertConfig.from_dict(read_config(folder), str(folder / "config.json")).hidden_size
    device = resolve_device(config.device)
    out = config.out or free_name(Path("runs"), f"{time.strftime('%Y%m%d-%H%M%S')}-{config.option}")
    data = config.data if config.data == "sample" else str(Path(config.data).resolve())
    settled = replace(
        config,
        device=device,
        out=str(Path(out)),
        data=data,
        checkpoint=str(Path(config.checkpoint).resolve()) if config.checkpoint else "",
        lr=config.lr or default_learning_rate(width, config.draws),
        draws_per_step=config.draws,
        pcgrad=config.treatment == "pcgrad",
        gradvac=config.treatment == "gradvac",
    )
    return settled, folder


def resolve_device(name: str) -> str:
    """ "cpu" or "cuda". Raises FlagError if there is no GPU where one is asked for."""
    if name == "cuda" and not torch.cuda.is_available():
        raise FlagError("--device cuda: no CUDA GPU found, expected cpu or auto")
    return name if name != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def default_learning_rate(width: int, draws: int) -> float:
    """Peak learning rate of fine-tuning: 8e-5 for a hidden size of 384, 2.8e-5 for 768, 1.8e-5 for 1024.

    It grows with the square root of the draws of a step, as is usual for Adam and larger batches.
    """
    return float(f"{8e-5 * (384 / width) ** 1.5 * draws**0.5:.2g}")


def free_name(folder: Path, name: str) -> Path:
    """The name in the folder, with a number behind it where runs that began in the same second have it already."""
    candidates = (folder / (name if number == 1 else f"{name}-{number}") for number in itertools.count(1))
    return next(path for path in candidates if not path.exists())


def model_layout(config: Config, folder: Path) -> Layout:
    """Heads and adapters: what the checkpoint holds, with what the flags add to it."""
    saved = read_layout(folder)
    encoder = BertConfig.from_dict(read_config(folder), str(folder / "config.json"))
    adapters = saved.adapters if saved else None
    if config.pal:
        try:
            adapters = PalConfig.for_encoder(
                encoder, config.pal_kind, config.pal_size, config.pal_heads, config.pal_layers
            )
        except ValueError as error:
            raise FlagError(str(error)) from None
    head_layers = config.head_layers if config.head_layers or saved is None else saved.head_layers
    return Layout(config.tasks, head_layers, adapters)


# ------------------------------------------------------------------------------------------------------ stages


@dataclass(frozen=True)
class Stage:
    """A stage of the run: on frozen features or on the whole model, for these tasks."""

    name: str
    tasks: tuple[str, ...]
    is_frozen: bool


def plan_stages(config: Config) -> list[Stage]:
    """What `--option` runs, in order."""
    if config.option == "test":
        return []
    if config.option == "individual_pretrain":
        return [Stage(f"pretrain_{task}", (task,), True) for task in config.tasks]
    frozen = [Stage("pretrain", config.tasks, True)] if config.pretrain_epochs and not config.checkpoint else []
    if config.option == "pretrain":
        return [Stage("pretrain", config.tasks, True)]
    return [*frozen, Stage("finetune", config.tasks, False)]


class Run:
    """One run from loaded data to results. Listens to the trainer: logs, shows, saves, stops."""

    def __init__(
        self,
        config: Config,
        model: MultitaskBert,
        tokenizer_folder: Path,
        data: Data,
        directory: RunDirectory,
        console: Console,
        stop: "StopSignals",
    ) -> None:
        self.config, self.model, self.data, self.directory = config, model, data, directory
        self.tokenizer_folder, self.console, self.stop = tokenizer_folder, console, stop
        self.device = torch.device(config.device)
        self.precision = Precision(self.device, AMP[config.amp])
        self.seconds: dict[str, float] = {}
        self.best_epochs: dict[str, int] = {}
        self.summaries: dict[str, Any] = {}
        self.stages = plan_stages(config)
        self.stage_number = 0
        self.trainer: Trainer | None = None
        self.metrics: MetricsLog

    # the trainer's listener

    def say(self, line: str) -> None:
        self.console.say(line)

    @property
    def stop_requested(self) -> bool:
        return self.stop.requested

    def check_stop(self) -> None:
        if self.stop.requested:
            raise Stopped

    def on_step(self, record: Mapping[str, Any]) -> None:
        assert self.trainer is not None
        ConflictSummary(self.trainer.progress.conflicts).add(record)
        self.metrics.write(record)
        self.console.advance(1, record)

    def on_evaluation(self, record: Mapping[str, Any], is_best: bool) -> None:
        assert self.trainer is not None
        self.metrics.write(record)
        scores: Metrics = {task: record["dev"][task] for task in self.trainer.settings.tasks}
        mark = "  (best)" if is_best else ""
        of = f"epoch {record['epoch']}/{self.trainer.settings.epochs}"
        self.say(f"{record['stage']} {of}: dev {format_scores(scores)}{mark}")
        if is_best and not self.trainer.keeps_best:
            self.save_best()

    def save_best(self) -> None:
        replace_folder(self.directory.best, lambda folder: save_checkpoint(self.model, self.tokenizer_folder, folder))

    def save(self) -> None:
        """Writes `last/`: the model, and where the stage stands, or that it has not begun."""
        trainer = self.trainer

        def write(folder: Path) -> None:
            save_checkpoint(self.model, self.tokenizer_folder, folder)
            state = {
                "stage": self.stage_number,
                "progress": asdict(trainer.progress) if trainer else None,
                "metrics_size": self.metrics.size,
                "seconds": self.seconds,
                "best_epochs": self.best_epochs,
                "summaries": self.summaries,
            }
            write_trainer(folder, trainer.state_tensors() if trainer else {}, state)

        replace_folder(self.directory.last, write)

    # the run

    def train(self) -> None:
        """All stages, from the checkpoint on where there is one."""
        tensors, state = read_trainer(self.directory.last) if self.directory.last.exists() else ({}, {})
        self.metrics = self.directory.open_metrics(state.get("metrics_size", 0), self.config.tensorboard)
        for name in ("seconds", "best_epochs", "summaries"):
            getattr(self, name).update(state.get(name, {}))
        first = state.get("stage", 0)
        for number, stage in enumerate(self.stages):
            if number < first:
                continue
            self.stage_number, self.trainer = number, None
            if number > first:
                self.save()  # a stage that has ended is not begun again, nor are its features computed
            self.trainer = self.make_trainer(stage)
            if number == first and state.get("progress"):
                self.trainer.load_state(tensors, state["progress"])
            self.run_stage(stage, self.trainer)
        if self.stages and self.stages[-1].is_frozen:
            self.save_best()

    def run_stage(self, stage: Stage, trainer: Trainer) -> None:
        self.console.start(stage.name, trainer.settings.num_steps, trainer.progress.step)
        try:
            trainer.run()
        finally:
            self.console.finish()
        self.seconds[stage.name] = round(trainer.progress.seconds, 3)
        self.best_epochs[stage.name] = trainer.progress.best_epoch
        if trainer.is_treated:
            self.summaries[stage.name] = ConflictSummary(trainer.progress.conflicts).means()

    def make_trainer(self, stage: Stage) -> Trainer:
        """The trainer of a stage."""
        config, model = self.config, self.model
        train_rows: Mapping[str, Rows] = {task: self.data.train[task] for task in stage.tasks}
        dev_rows: Mapping[str, Rows] = {task: self.data.dev[task] for task in stage.tasks}
        seen: TaskModel = model
        if stage.is_frozen:
            train_rows, dev_rows = self._features(stage)
            seen = FrozenEncoder(model)
        settings = self.stage_settings(stage)
        setting = Setting(
            stage.tasks,
            tuple(len(train_rows[task]) for task in stage.tasks),
            settings.epochs,
            1 if stage.is_frozen else config.draws,
            every_task=not stage.is_frozen and config.treatment != "sum",
        )
        shared = {} if stage.is_frozen or config.train == "pal" else model.shared_parameters()
        of_tasks = {task: model.task_parameters(task) for task in stage.tasks}
        prefix = "heads." if stage.is_frozen else "adapters." if config.train == "pal" else ""
        of_tasks = {t: {n: p for n, p in own.items() if n.startswith(prefix)} for t, own in of_tasks.items()}
        trained = {id(p) for own in (shared, *of_tasks.values()) for p in own.values()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        # On the CPU only: adding rows makes a GPU wait for the host.
        embedding = model.sparse_embedding_gradient(bool(shared) and self.precision.device.type == "cpu")
        sizes = model.segment_sizes() if config.granularity == "layer" else [len(shared)]
        treatment = (
            Sum()
            if stage.is_frozen
            else make_treatment(config.treatment, len(stage.tasks), len(sizes), config.gradvac_beta)
        )
        return Trainer(
            settings,
            seen,
            shared,
            of_tasks,
            sizes,
            train_rows,
            dev_rows,
            SCHEDULERS[config.scheduler](setting),
            treatment,
            self.precision,
            config.eval_batch_size,
            self,
            () if stage.is_frozen else self._regularizers(settings.num_steps),
            keeps_best=stage.is_frozen,
            embedding=embedding,
        )

    def stage_settings(self, stage: Stage) -> StageSettings:
        config = self.config
        draws = 1 if stage.is_frozen else config.draws
        rows_per_step = config.batch_size * config.accumulation_steps * draws
        num_rows = sum(len(self.data.train[task]) for task in stage.tasks)
        return StageSettings(
            name=stage.name,
            tasks=stage.tasks,
            epochs=config.pretrain_epochs if stage.is_frozen else config.epochs,
            steps_per_epoch=config.steps_per_epoch or -(-num_rows // rows_per_step),
            batch_size=config.batch_size,
            accumulation_steps=config.accumulation_steps,
            lr=config.pretrain_lr if stage.is_frozen else config.lr,
            warmup=config.warmup,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            patience=config.patience,
            eval_every=config.eval_every,
            save_every=config.save_every,
            seed=config.seed,
        )

    def _features(self, stage: Stage) -> tuple[dict[str, Rows], dict[str, Rows]]:
        """Features of the frozen encoder for training and dev rows, each task's computed when they are first needed."""

        def later(rows: TokenizedRows) -> Rows:
            return DeferredRows(rows.labels, lambda: self._compute_features(stage, rows))

        train, dev = ({task: later(of[task]) for task in stage.tasks} for of in (self.data.train, self.data.dev))
        return train, dev

    def _compute_features(self, stage: Stage, rows: TokenizedRows) -> Rows:
        size, name = self.config.eval_batch_size, rows.task.name

        def between() -> None:
            assert self.trainer is not None
            self.trainer.stop_if_requested()
            self.console.advance(size)

        started = time.perf_counter()
        self.console.start(f"features of the frozen encoder, {name}", len(rows), 0, "row")
        try:
            return compute_features(self.model, name, rows, size, self.precision, between)
        finally:
            self.console.finish()
            key = f"{stage.name}_features"
            self.seconds[key] = round(self.seconds.get(key, 0) + time.perf_counter() - started, 3)

    def _regularizers(self, num_steps: int) -> list[Regularizer]:
        config = self.config
        terms: list[Regularizer] = []
        if config.smart:
            smart = SmartConfig(
                config.smart_weight, config.smart_eps, config.smart_sigma, config.smart_eta, config.smart_steps
            )
            terms.append(Smoothness(self.model, smart))
        if config.bregman:
            terms.append(BregmanProximal(self.model, config.bregman_weight, num_steps))
        return terms

    def finish(self) -> None:
        """Scores of the best checkpoint, prediction files, results, and the table."""
        config = self.config
        if self.stages and not self.stages[-1].is_frozen:
            self.model = load_model(self.directory.best, self.model.layout, torch.Generator()).model.to(self.device)
        started = time.perf_counter()
        size, folder = config.eval_batch_size, self.directory.predictions
        logits = predict_all(self.model, self.data.dev, size, self.precision, self.check_stop)
        dev, confusion = metrics_of(logits, self.data.dev, self.say), confusion_matrices(logits, self.data.dev)
        test_logits = predict_all(self.model, self.data.test, size, self.precision, self.check_stop)
        folder.mkdir(exist_ok=True)
        for task, rows in self.data.dev.items():
            write_predictions(task, rows, logits[task], folder / f"{task}-dev-output.csv")
            write_dev_rows(task, rows, logits[task], folder)
        for task, rows in self.data.test.items():
            write_predictions(task, rows, test_logits[task], folder / f"{task}-test-output.csv")
        self.seconds["final_evaluation"] = round(time.perf_counter() - started, 3)
        main_stages = [stage.name for stage in self.stages if stage.is_frozen == self.stages[-1].is_frozen]
        epochs = {name: self.best_epochs[name] for name in main_stages}
        training = round(sum(self.seconds.get(stage.name, 0) for stage in self.stages), 3)
        results: dict[str, Any] = {
            "dev": {**dev, "mean": mean_score(dev)},
            "best_epoch": next(iter(epochs.values()), None) if len(epochs) < 2 else epochs,
            "parameters": parameter_counts(self.model),
            "seconds": {**self.seconds, "training": training},
            "peak_memory_mb": peak_memory_mb(self.device),
            "confusion": confusion,
            **({"gradients": self.summaries} if self.summaries else {}),
        }
        self.directory.write_results(results)
        self.metrics.write_hyperparameters(config.to_dict(), results["dev"])
        self.say("")
        self.say(format_table(dev, {task: len(rows) for task, rows in self.data.dev.items()}))
        missing = [task for task in config.tasks if task not in self.data.test]
        self.say("")
        if missing:
            self.say(f"no test file of {', '.join(missing)} in {config.data}: no test predictions for it")
        self.say(
            f"training {duration(training)}, peak memory {peak_memory_mb(self.device):.0f} MB; "
            f"results, predictions and the best checkpoint are in {self.directory.path}"
        )
        self.draw_plots()

    def draw_plots(self) -> None:
        """Pictures of the run. Whatever may go wrong with them costs a line, not the run."""
        try:
            from reports.finished_run import FinishedRun
            from reports.plots import write_plots

            write_plots(FinishedRun.read(self.directory.path))
        except Exception as error:
            self.say(f"warning: no plots: {error}")


def peak_memory_mb(device: torch.device) -> float:
    """Most memory that the process held: on the GPU by torch's count, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if platform.system() == "Darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# --------------------------------------------------------------------------------------------------- start, stop


class StopSignals:
    """Ctrl-C and SIGTERM ask the run to stop after the step that is running; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self.number = signal.SIGINT
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore(self) -> None:
        """Gives the signals back to those who had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested, self.number = True, signal.Signals(number)


def start_block(config: Config, run: Run, new_parts: Sequence[str]) -> list[str]:
    """What a run is about to do: model, data, batch, methods, parameters."""
    encoder, counts = run.model.encoder.config, parameter_counts(run.model)
    threads = f", {torch.get_num_threads()} threads" if config.device == "cpu" else ""
    slow = config.device == "cpu" and config.amp == "off" and kernels.build().problem
    source = config.checkpoint or config.model
    lines = [
        f"model       {source}: {encoder.num_hidden_layers} layers, {encoder.hidden_size} wide; "
        f"{config.device}{threads}, {'float32' if config.amp == 'off' else config.amp}",
        *([f"            slower than it could be, without compiled kernels: {slow}"] if slow else []),
        f"parameters  {counts['total'] / 1e6:.1f} M: {counts['shared'] / 1e6:.1f} M shared, "
        f"{counts['per_task'] / 1e3:.1f} k a task (separate models would hold {counts['separate_models'] / 1e6:.1f} M)",
        f"data        {config.data}",
    ]
    for task in config.tasks:
        rows = [f"{len(of[task])} {name}" for name in SPLITS if task in (of := getattr(run.data, name))]
        lines.append(f"            {task:<5} {', '.join(rows)}")
    for stage in run.stages:
        settings = run.stage_settings(stage)
        draws = 1 if stage.is_frozen else config.draws
        product = f"{settings.batch_size} rows x {settings.accumulation_steps} passes x {draws} draws"
        size = settings.batch_size * settings.accumulation_steps * draws
        lines.append(
            f"{stage.name:<11} {settings.epochs} epochs of {settings.steps_per_epoch} steps, each {size} rows "
            f"({product}), learning rate {settings.lr:g}{', encoder frozen' if stage.is_frozen else ''}"
        )
    if run.stages:
        methods = [config.scheduler if len(config.tasks) > 1 else "single task", *_methods(config)]
        lines.append(f"methods     {', '.join(methods)}")
    if new_parts:
        lines.append(f"new         {', '.join(new_parts)}: not in the checkpoint, initialized")
    return [*lines, f"run         {config.out}", *run.data.notes, ""]


def _methods(config: Config) -> list[str]:
    named = {
        f"{config.treatment} ({config.granularity})": config.treatment != "sum",
        "SMART": config.smart,
        "Bregman": config.bregman,
        f"adapters {config.pal_kind}": config.pal,
        f"training only {config.train}": config.train != "all",
        "EDA": config.augment == "eda",
    }
    return [name for name, is_on in named.items() if is_on]


def environment(device: str) -> dict[str, Any]:
    """Versions, machine, commit and what there is of kernels, for config.json."""
    packages = ("torch", "numpy", "tokenizers", "safetensors", "scikit-learn", "scipy")
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "machine": f"{platform.system()} {platform.machine()}",
        "commit": commit or None,
        "kernels": kernels.record(device),
    }


def prepare(config: Config, console: Console, stop: StopSignals) -> Run:
    """A new run, or the one to resume, with everything loaded and its start told."""
    resumed = RunDirectory.existing(Path(config.resume)) if config.resume else None
    if resumed is not None:
        device, threads = config.device, config.threads
        saved = resumed.config()
        config = replace(from_dict(saved), out=str(resumed.path), threads=threads or saved["threads"])
        config = replace(config, device=device) if device != "auto" else config
    if config.threads:
        torch.set_num_threads(config.threads)
    config, folder = resolve(config)
    if resumed is None and Path(config.out).exists():
        RunDirectory.create(Path(config.out), {})  # raises before anything is loaded
    if resumed is not None and resumed.last.exists():
        folder = resumed.last
    layout = model_layout(config, folder)
    target = torch.device(config.device)
    max_positions = BertConfig.from_dict(read_config(folder)).max_position_embeddings
    tokenizer = Tokenizer(folder, min(config.max_length or max_positions, max_positions))
    data = load_data(config, tokenizer, target)
    loaded = load_model(folder, layout, torch.Generator().manual_seed(derive_seed(config.seed, "parameters")))
    record = {**config.to_dict(), **environment(config.device), "data_files": data.files, "layout": layout.to_dict()}
    if resumed is not None and saved["data_files"] != data.files:
        changed = [name for name in data.files if saved["data_files"].get(name) != data.files[name]]
        raise RunError(
            f"--resume {config.out}: {', '.join(changed)} changed since the run began, expected the same files"
        )
    directory = resumed or RunDirectory.create(Path(config.out), record)
    run = Run(config, loaded.model.to(target), folder, data, directory, console, stop)
    if resumed is None:
        stages = [asdict(run.stage_settings(stage)) for stage in run.stages]
        write_json(directory.path / "config.json", {**record, "stages": stages})
    for line in start_block(config, run, loaded.new_parts):
        console.say(line)
    return run


def predict(config: Config) -> int:
    """`--option predict`: lines in, predictions out, no run. Returns the exit status."""
    if config.threads:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    precision = Precision(torch.device(device), AMP[config.amp])

    def make_predictor() -> Predictor:
        return load(config.checkpoint, device, config.eval_batch_size, config.max_length, precision.autocast)

    return predict_lines(make_predictor, config.task, config.input, config.output)


def execute(config: Config, console: Console) -> int:
    """Runs to the end or to a stop; returns the exit status."""
    if config.option == "predict":
        return predict(config)
    stop = StopSignals()
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed % 2**63)
    run: Run | None = None
    try:
        run = prepare(config, console, stop)
        run.train()
        run.finish()
        run.metrics.close()
        return 0
    except Stopped:
        assert run is not None
        console.say(f"stopped; to go on: python multitask_classifier.py --resume {run.directory.path}")
        return 128 + stop.number
    finally:
        stop.restore()
        if run is not None:
            run.directory.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 0, 1 for a run that failed, 2 for bad input, 128 + signal when stopped."""
    console = Console()
    try:
        return execute(parse(sys.argv[1:] if arguments is None else arguments), console)
    except USER_ERRORS as error:
        for line in str(error).split("\n"):
            print(f"error: {line}", file=sys.stderr)
        return 1 if isinstance(error, TrainingError) else 2
    except KeyboardInterrupt:
        print("stopped at once", file=sys.stderr)
        return 130


if __name__ == "__main__":
    # The moments of words that have not been seen for 800 steps are too small for normal numbers, and a processor takes
    # ten times as long for them. It has to be said before there are threads.
    torch.set_flush_denormal(True)
    sys.exit(main())
