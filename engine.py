"""The training step and the training loop, one for every scheduler, treatment, regularizer and precision.

plan = scheduler.plan(...)                              how often each task is drawn: {"para": 9, "sst": 4, "sts": 3}
for each task of the plan: its rows of the step, forward, loss (+ regularizers), backward into that task's gradient
unscale -> treatment -> clip once -> optimizer step -> after-step updates

Shape letters: T tasks of a step, P shared parameters, B rows.
"""

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets import BetweenBatches, Rows, RowStream, no_stop
from evaluation import Precision, evaluate, mean_score
from model import TaskModel, Trained
from ops import DropoutMasks
from optimizer import FlatParameters, clip_factor, gradient_norm
from pcgrad import Treatment, combine, cosines, gramians_of, removed_shares
from schedulers import Draws, Plan, Scheduler
from seeding import derive_seed
from smart import Regularizer
from tasks import TASKS, task_loss

Record = dict[str, Any]  # a line of metrics.jsonl


class TrainingError(ValueError):
    """Training cannot go on; the message is one line for the user."""


@dataclass(frozen=True)
class Stage:
    """What one stage of training is asked to do.

    batch_size: rows of an optimizer step, times accumulation_steps; a forward pass takes batch_size rows at most.
    warmup: share of the steps. patience: epochs without a gain after which the stage ends, 0 for never. eval_every:
    epochs between evaluations, 0 for the last epoch only. is_frozen: the encoder is; of the few parameters that are
    trained those of the best epoch are kept, and restored at the end.
    """

    name: str
    tasks: tuple[str, ...]
    epochs: int
    steps_per_epoch: int
    batch_size: int
    accumulation_steps: int
    lr: float
    warmup: float
    weight_decay: float
    max_grad_norm: float
    patience: int
    eval_every: int
    eval_batch_size: int
    seed: int
    is_frozen: bool = False

    @property
    def num_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.accumulation_steps

    def learning_rate(self, step: int) -> float:
        """Linear warm-up over the first share `warmup` of the steps, then linear decay to 0. step: counted from 0."""
        warmup_steps = int(self.warmup * self.num_steps)
        if step < warmup_steps:
            return self.lr * (step + 1) / (warmup_steps + 1)
        return self.lr * (self.num_steps - step) / max(1, self.num_steps - warmup_steps)


@dataclass(frozen=True)
class Methods:
    """How a stage trains. treatment: None for the plain sum. segments: names of the shared parameters that a treatment
    takes on their own, such as those of a layer; one segment of all by default."""

    scheduler: Scheduler
    treatment: Treatment | None = None
    regularizers: Sequence[Regularizer] = ()
    segments: Sequence[Sequence[str]] | None = None


@dataclass(frozen=True)
class StageData:
    """The rows of each task that a stage trains and evaluates on."""

    train: Mapping[str, Rows]
    dev: Mapping[str, Rows]


@dataclass
class Progress:
    """Where a stage stands: all that a resumed run needs besides tensors.

    step: finished optimizer steps. closed_epochs: epochs whose evaluation is done. rows: of each task, drawn so far.
    micro_batch: rows of a forward pass at most, below the batch size after the device ran out of memory. seconds: spent
    training and evaluating. conflicts: sums of what a treatment found.
    """

    step: int = 0
    closed_epochs: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    micro_batch: int = 0
    loss_scale: float = 2.0**16
    steps_since_overflow: int = 0
    best_score: float | None = None
    best_epoch: int = 0
    ended: bool = False
    seconds: float = 0.0
    conflicts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """What the loop has just done: a step, or the end of an epoch.

    record: its line for the log; None for an epoch that is not evaluated. is_epoch: an epoch has ended. is_best: its
    dev scores are the best so far. notes: lines for the user.
    """

    record: Record | None
    is_epoch: bool = False
    is_best: bool = False
    notes: Sequence[str] = ()


class LossScaler:
    """Dynamic loss scaling for float16 gradients in several vectors.

    torch's GradScaler unscales the gradients that an optimizer holds; here those of all tasks must be unscaled, and
    overflow found, before they become one gradient.
    """

    GROWTH_INTERVAL = 2000

    def __init__(self, is_enabled: bool, progress: Progress) -> None:
        self.is_enabled, self.progress = is_enabled, progress

    @property
    def scale(self) -> float:
        return self.progress.loss_scale if self.is_enabled else 1.0

    def unscale(self, gradients: Iterable[Tensor]) -> bool:
        """Divides the gradients by the scale; whether they are all finite. Adjusts the scale for the next step."""
        if not self.is_enabled:
            return True
        finite, progress = True, self.progress
        for gradient in gradients:
            gradient.mul_(1 / self.scale)
            finite = finite and bool(torch.linalg.vector_norm(gradient).isfinite())
        progress.steps_since_overflow = progress.steps_since_overflow + 1 if finite else 0
        if not finite:
            progress.loss_scale = max(1.0, progress.loss_scale / 2)
        elif progress.steps_since_overflow % self.GROWTH_INTERVAL == 0:
            progress.loss_scale *= 2
        return finite


class Trainer:
    """One stage of training: a model, the rows of its tasks, and how they are scheduled and combined."""

    def __init__(
        self, stage: Stage, model: TaskModel, trained: Trained, data: StageData, methods: Methods, precision: Precision
    ) -> None:
        """trained: the parameters that move; they become views into this trainer's vectors."""
        self.stage, self.model, self.data, self.methods, self.precision = stage, model, data, methods, precision
        self.is_treated = methods.treatment is not None and len(trained.shared) > 0
        self.shared = FlatParameters(trained.shared, len(stage.tasks) if self.is_treated else 1)
        self.own = {task: FlatParameters(trained.own[task]) for task in stage.tasks}
        self.segments = [self.shared.columns(set(names)) for names in methods.segments or [list(trained.shared)]]
        self.best: dict[str, Tensor] = {}
        self.progress = Progress(rows=dict.fromkeys(stage.tasks, 0), micro_batch=stage.batch_size)
        self.scaler = LossScaler(precision.dtype == torch.float16, self.progress)
        self._streams = {task: RowStream(len(data.train[task]), self._seed("rows", task)) for task in stage.tasks}

    def _seed(self, *purpose: str | int) -> int:
        return derive_seed(self.stage.seed, self.stage.name, *purpose)

    def _vectors(self) -> dict[str, FlatParameters]:
        """All that moves, by name."""
        return {"shared": self.shared, **{f"own.{task}": own for task, own in self.own.items()}}

    # ------------------------------------------------------------------------------------------------- the loop

    def run(self, between: BetweenBatches = no_stop) -> Iterator[Event]:
        """Trains to the end of the stage, from where `progress` stands, and tells what it has done after each step.

        between: called between batches of an evaluation; what it raises leaves the stage at its last finished step.
        Raises TrainingError at a step that cannot be taken; nothing of it has moved then.
        """
        stage, progress = self.stage, self.progress
        while True:
            epoch = progress.step // stage.steps_per_epoch
            if progress.step % stage.steps_per_epoch == 0 and progress.closed_epochs < epoch:
                event = self._end_epoch(epoch, between)
                progress.closed_epochs = epoch
                yield event
            if progress.ended or progress.step == stage.num_steps:
                break
            started, notes = time.perf_counter(), list[str]()
            record = self.take_step(epoch + 1, progress.step, notes.append)
            progress.step += 1
            seconds = time.perf_counter() - started
            progress.seconds += seconds
            record["examples_per_second"] = stage.rows_per_step / seconds
            yield Event(record, notes=notes)
        for name, value in self.best.items():
            self._vectors()[name].values.copy_(value)

    def _end_epoch(self, epoch: int, between: BetweenBatches) -> Event:
        stage, progress = self.stage, self.progress
        is_last = epoch == stage.epochs
        if not is_last and (stage.eval_every == 0 or epoch % stage.eval_every):
            return Event(None, is_epoch=True)
        started, notes = time.perf_counter(), list[str]()
        metrics = evaluate(self.model, self.data.dev, stage.eval_batch_size, self.precision, notes.append, between)
        seconds = time.perf_counter() - started
        progress.seconds += seconds
        score = mean_score(metrics)
        is_best = progress.best_score is None or score > progress.best_score
        if is_best:
            progress.best_score, progress.best_epoch = score, epoch
            if stage.is_frozen:
                self.best = {name: vector.values.clone() for name, vector in self._vectors().items()}
        if stage.patience and epoch - progress.best_epoch >= stage.patience and not is_last:
            progress.ended = True
            notes.append(
                f"{stage.name}: no gain for {stage.patience} epochs (--patience), the best was epoch "
                f"{progress.best_epoch}"
            )
        num_rows = sum(len(rows) for rows in self.data.dev.values())
        record = {"stage": stage.name, "epoch": epoch, "step": progress.step, "dev": {**metrics, "mean": score}}
        return Event({**record, "dev_examples_per_second": num_rows / seconds}, True, is_best, notes)

    # ------------------------------------------------------------------------------------------------- one step

    def take_step(self, epoch: int, step: int, note: Callable[[str], None] = lambda line: None) -> Record:
        """One optimizer step; returns its line for the log. epoch: from 1. step: counted from 0. note: takes lines for
        the user. Raises TrainingError if a loss or a gradient is not finite."""
        stage, progress = self.stage, self.progress
        plan = self.methods.scheduler.plan(epoch, step, random.Random(self._seed("plan", step)))
        tasks = [task for task in stage.tasks if task in plan]
        counts = rows_of_plan(plan, stage.rows_per_step)
        rows = {task: self._streams[task].rows(progress.rows[task], counts[task]) for task in tasks}
        weights = {task: self._weight(plan[task], len(rows[task])) for task in tasks}

        losses = self._backward_within_memory(rows, weights, step, note)
        gradients = [self.shared.gradients[row] for row in self._gradient_rows(tasks)]  # T of (P,), or one
        own = [self.own[task].gradients[0] for task in tasks]
        finite = self.scaler.unscale([*gradients, *own])
        record = {
            "stage": stage.name,
            "epoch": epoch,
            "step": step + 1,
            "task": "+".join(tasks),
            "loss": sum(losses[task] * counts[task] for task in tasks) / stage.rows_per_step,
            "losses": losses,
            "draws": {task: plan[task].count for task in tasks},
            "lr": stage.learning_rate(step),
        }
        if finite:
            found = self._treat(tasks, gradients, step) if self.is_treated else {}
            record |= {"gradient_norm": self._move([gradients[0], *own], tasks, step), **found}
        else:
            record |= {"gradient_norm": math.nan, "skipped": "overflow", "loss_scale": self.scaler.scale}
        for task in tasks:
            progress.rows[task] += counts[task]
        return record

    def _weight(self, draws: Draws, num_rows: int) -> float:
        """Factor on the mean loss of a task's rows: its share of the step's rows, or what the scheduler says where a
        treatment combines the tasks' gradients."""
        return draws.weight if self.is_treated else num_rows / self.stage.rows_per_step

    def _gradient_rows(self, tasks: Sequence[str]) -> list[int]:
        """Which of the shared gradients belong to these tasks; without a treatment all accumulate in the first."""
        return [self.stage.tasks.index(task) for task in tasks] if self.is_treated else [0]

    def _backward_within_memory(
        self, rows: Mapping[str, np.ndarray], weights: Mapping[str, float], step: int, note: Callable[[str], None]
    ) -> dict[str, float]:
        """The backward passes of a step; out of memory, the step begins again with passes of half the rows."""
        progress = self.progress
        while True:
            try:
                return self._backward(rows, weights, step)
            except torch.OutOfMemoryError:
                if progress.micro_batch == 1:
                    raise TrainingError(
                        f"{self.stage.name} step {step + 1}: the device is out of memory with one row a forward pass"
                    ) from None
            progress.micro_batch = -(-progress.micro_batch // 2)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            note(
                f"{self.stage.name} step {step + 1}: out of memory; going on with at most {progress.micro_batch} rows "
                "a forward pass, and the same rows a step"
            )

    def _backward(self, rows: Mapping[str, np.ndarray], weights: Mapping[str, float], step: int) -> dict[str, float]:
        """Each task's gradient, of its mean loss times its weight; returns the mean loss of each."""
        for vector in self._vectors().values():
            vector.gradients.zero_()
        losses = []
        for task, numbers in rows.items():
            self.shared.point_to(self._gradient_rows([task])[0])
            total = torch.zeros((), device=self.precision.device)
            for first in range(0, len(numbers), self.progress.micro_batch):
                part = numbers[first : first + self.progress.micro_batch]
                masks = DropoutMasks(self._seed("dropout", step, task, first), self.precision.device)
                loss = self._loss(task, part, masks) * (len(part) / len(numbers))
                (loss * (weights[task] * self.scaler.scale)).backward()
                total += loss.detach()
            losses.append(total)
        found = dict(zip(rows, torch.stack(losses).tolist(), strict=True))
        for task, loss in found.items():
            if not math.isfinite(loss):
                raise self._loss_error(task, loss, rows[task], step)
        return found

    def _loss(self, task: str, rows: np.ndarray, masks: DropoutMasks) -> Tensor:
        """Mean loss of some rows, regularizers included, a scalar."""
        batch = self.data.train[task].batch(rows)
        with self.precision.autocast():
            logits = self.model(task, batch, masks)  # (B, K)
        loss = task_loss(TASKS[task], logits, batch.labels)
        if self.methods.regularizers and self.precision.dtype is not None:
            logits = self.model(task, batch, masks.again())  # in float32
        for regularizer in self.methods.regularizers:
            loss = loss + regularizer.term(task, batch, masks, logits)
        return loss

    def _treat(self, tasks: Sequence[str], gradients: Sequence[Tensor], step: int) -> Record:
        """Combines the task gradients in the first of them; returns what the treatment found and did.

        Raises TrainingError before a running average moves if any gradient is not finite.
        """
        assert self.methods.treatment is not None
        rows = self._gradient_rows(tasks)
        index = torch.tensor(rows)
        gramians = gramians_of(self.shared.gradients, self.segments).cpu()[:, index[:, None], index]  # (S, T, T)
        own = [self.own[task].gradients[0] for task in tasks]
        self._check_norm(float(gramians.sum()) + gradient_norm(own), tasks, step)
        generator = random.Random(self._seed("treatment", step))
        coefficients = self.methods.treatment.coefficients(gramians, rows, generator)  # (S, T, T)
        combine(gradients, coefficients.sum(1), self.segments)
        between = cosines(gramians.sum(0))  # (T, T)
        kept = (coefficients * gramians).sum(2).sum(0)  # (T,): each segment's Gram matrix under its own coefficients
        removed = removed_shares(gramians.sum(0).diagonal(), kept)
        pairs = [(i, j) for i in range(len(tasks)) for j in range(i + 1, len(tasks))]
        found = {
            "cosines": {f"{tasks[i]}-{tasks[j]}": float(between[i, j]) for i, j in pairs},
            "removed": {task: float(share) for task, share in zip(tasks, removed, strict=True)},
        }
        add_conflicts(self.progress.conflicts, found)
        return found

    def _move(self, gradients: Sequence[Tensor], tasks: Sequence[str], step: int) -> float:
        """Clips the gradients, the shared one and those of the tasks' own parameters, and moves the parameters.

        Returns the norm before clipping. A task that is not in the step is left alone, its moments too.
        """
        stage = self.stage
        norm = gradient_norm(gradients)
        self._check_norm(norm, tasks, step)
        factor = clip_factor(norm, stage.max_grad_norm)
        for vector, gradient in zip([self.shared, *(self.own[task] for task in tasks)], gradients, strict=True):
            vector.step(gradient, stage.learning_rate(step), stage.weight_decay, factor)
        for regularizer in self.methods.regularizers:
            regularizer.after_step(step)
        return norm

    def _check_norm(self, norm: float, tasks: Sequence[str], step: int) -> None:
        if not math.isfinite(norm):
            raise TrainingError(f"{self.stage.name} step {step + 1}: the gradient of {'+'.join(tasks)} is {norm}")

    def _loss_error(self, task: str, loss: float, rows: np.ndarray, step: int) -> TrainingError:
        shown = ", ".join(str(int(row)) for row in sorted(rows)[:40]) + (", ..." if len(rows) > 40 else "")
        return TrainingError(
            f"{self.stage.name} step {step + 1}: the loss of {task} is {loss}; training rows {shown} "
            "(counted from 0, after filtering)"
        )

    # ------------------------------------------------------------------------------------------------ checkpoints

    def state_tensors(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint besides the model's: moments, averages, best parameters."""
        groups = {f"optimizer.{name}": vector.state() for name, vector in self._vectors().items()}
        return {
            **{f"{group}.{name}": value for group, state in groups.items() for name, value in state.items()},
            **self._averages(),
            **{f"best.{name}": value for name, value in self.best.items()},
        }

    def _averages(self) -> dict[str, Tensor]:
        """What the methods change in place from step to step."""
        states = {f"regularizer.{i}": regularizer.state for i, regularizer in enumerate(self.methods.regularizers)}
        if self.methods.treatment is not None:
            states["treatment"] = self.methods.treatment.state
        return {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}

    def load_state(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        """Takes up a checkpoint of this stage. Raises ValueError or KeyError if it is of another one."""
        for name, value in progress.items():
            setattr(self.progress, name, value)
        for name, vector in self._vectors().items():
            vector.load_state(_part(tensors, f"optimizer.{name}."))
        for name, average in self._averages().items():
            average.copy_(tensors[name])
        device = self.precision.device
        self.best = {name: value.to(device) for name, value in _part(tensors, "best.").items()}


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def rows_of_plan(plan: Plan, rows_per_step: int) -> dict[str, int]:
    """How many rows of a step each task has: the step's rows divided over its draws, as evenly as they go."""
    num_draws = sum(draws.count for draws in plan.values())
    counts, drawn = {}, 0
    for task, draws in plan.items():
        first, drawn = drawn, drawn + draws.count
        counts[task] = rows_per_step * drawn // num_draws - rows_per_step * first // num_draws
    return counts


def add_conflicts(sums: dict[str, Any], found: Mapping[str, Mapping[str, float]]) -> None:
    """Adds what a treatment found in a step: cosines, whether tasks were in conflict, the share that was removed."""
    values = {
        "cosine": found["cosines"],
        "conflict_rate": {pair: float(cosine < 0) for pair, cosine in found["cosines"].items() if cosine == cosine},
        "removed": found["removed"],
    }
    for kind, of in values.items():
        for key, value in of.items():
            if math.isfinite(value):
                total, count = sums.setdefault(kind, {}).get(key, (0.0, 0))
                sums[kind][key] = [total + value, count + 1]


def mean_conflicts(sums: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The means of what `add_conflicts` has added."""
    return {kind: {key: total / count for key, (total, count) in of.items()} for kind, of in sums.items()}
