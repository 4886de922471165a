"""The training step and the training loop, one for every scheduler, treatment, regularizer and precision.

_launch            plan = scheduler.plan(...): how often each task is drawn, {"para": 9, "sst": 4, "sts": 3}; its rows
_passes            which rows go through the model together: those of a task, or without a treatment of all tasks
                   (on a GPU also with one: `_bounds` then tells the tasks' rows apart, see ops/task_gradients.py)
_forward_backward  forward, loss (+ regularizers), backward: each parameter's `grad` is its part of the task's row of
                   the shared gradients (FlatParameters.point_to), and what the backward pass finds is added to it
                   (of several processes each takes a part of every task's rows, and the gradients are summed over them)
_treat             Gram matrix -> treatment -> weighted sum, in the first row
_move              clip once -> AdamW -> average of weights
_record            what is logged, when the device has come that far

Shape letters: T tasks of a step, P shared parameters, B rows.
"""

import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ops
from datasets import Batch, BetweenBatches, OutputError, Rows, RowStream, TokenizedRows, no_stop
from distributed import ALONE, ProcessGroup
from evaluation import Precision, evaluate, mean_score
from flat_parameters import FlatParameters, WeightAverage, clip_factor, gradient_norm
from messages import counted, shown
from model import TaskModel, Trained
from ops import DropoutMasks, Reading, Replayed, TaskBounds, adamw_step, has_fused_operations, to_device
from pcgrad import Treatment, combine, cosines, equal_lengths, gramians_of, removed_shares, without_vanishing
from schedulers import Draws, Plan, Scheduler
from seeding import derive_seed
from smart import Regularizer
from tasks import TASKS

Record = dict[str, Any]  # a line of metrics.jsonl
PassKey = tuple[tuple[str, ...], int, int]  # tasks, rows and tokens of a pass


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


def losses_of_task(task: str, logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) as the task's entry has them."""
    return TASKS[task].output.losses(logits, labels)


@dataclass(frozen=True)
class Methods:
    """How a stage trains. treatment: None for the plain sum. segments: names of the shared parameters that a treatment
    takes on their own, such as those of a layer; one segment of all by default. scales_equally: the task gradients are
    brought to their mean length before it sees them. ema_decay: of the average of weights that is evaluated; 0 for
    none. loss_weights: of each task the factor on its loss, 1 by default; they count in the gradients, also in those of
    equal length, and not in what is logged. losses: (B,) of a task, from its outputs (B, K) and the labels (B,)."""

    scheduler: Scheduler
    treatment: Treatment | None = None
    regularizers: Sequence[Regularizer] = ()
    segments: Sequence[Sequence[str]] | None = None
    scales_equally: bool = False
    ema_decay: float = 0.0
    loss_weights: Mapping[str, float] = field(default_factory=dict)
    losses: Callable[[str, Tensor, Tensor], Tensor] = losses_of_task


@dataclass(frozen=True)
class StageData:
    """The rows of each task that a stage trains and evaluates on; without dev rows its epochs have no scores."""

    train: Mapping[str, Rows]
    dev: Mapping[str, Rows]


@dataclass
class Progress:
    """Where a stage stands: all that a resumed run needs besides tensors.

    step: finished optimizer steps. closed_epochs: epochs whose evaluation is done. rows: of each task, drawn so far.
    micro_batch: rows of a forward pass at most, below the batch size after the device ran out of memory; replays:
    whether passes may still be CUDA graphs then. seconds: spent training and evaluating. loss_sum: of the steps since a
    mean was told. conflicts: sums of what a treatment found.
    """

    step: int = 0
    closed_epochs: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    micro_batch: int = 0
    replays: bool = True
    best_score: float | None = None
    best_epoch: int = 0
    ended: bool = False
    seconds: float = 0.0
    loss_sum: float = 0.0
    conflicts: dict[str, Any] = field(default_factory=dict)

    def problem(self, stage: Stage) -> str:
        """Which of the numbers cannot be of this stage, in words, or ""."""
        epochs, place = divmod(self.step, stage.steps_per_epoch)
        is_right = {
            "step": 0 <= self.step <= stage.num_steps,
            "closed_epochs": self.closed_epochs in (epochs, epochs - (place == 0)) and self.closed_epochs >= 0,
            "rows": self.rows.keys() == {*stage.tasks} and min(self.rows.values()) >= 0,
            "micro_batch": 1 <= self.micro_batch <= stage.batch_size,
            "best_epoch": 0 <= self.best_epoch <= epochs and (self.best_epoch > 0) == (self.best_score is not None),
            "seconds": self.seconds >= 0,
        }
        is_right["rows"] = is_right["rows"] and sum(self.rows.values()) == self.step * stage.rows_per_step
        return next((f"{name} is {shown(getattr(self, name))}" for name, of in is_right.items() if not of), "")


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


@dataclass(frozen=True)
class Pass:
    """A forward and a backward pass. numbers: (B,) of its rows; weights: (T, B) of each task the factor of a row's
    loss; seed: of its dropout."""

    tasks: tuple[str, ...]
    numbers: np.ndarray
    weights: np.ndarray
    seed: int


@dataclass(frozen=True)
class Launched:
    """A step that has been ordered of the device. numbers: each task's weighted loss, then the gradient's norm, whether
    the step was left out, and the loss scale. rows: of each task, its training rows; drawn: how many before the
    step."""

    step: int
    record: Record
    numbers: Reading
    weights: Mapping[str, float]
    rows: Mapping[str, np.ndarray]
    drawn: Mapping[str, int]
    notes: Sequence[str]


class LossScaler:
    """Dynamic loss scaling for float16 gradients, on the device: halved after an overflow, doubled after long without.

    torch's GradScaler unscales the gradients that an optimizer holds, and waits for the device; here the scale goes
    into the factor that the clipped gradient is multiplied by.
    """

    GROWTH_INTERVAL = 2000
    LEAST = 2.0**-10  # below it an overflow is no longer one of the scale's making

    def __init__(self, is_enabled: bool, device: torch.device) -> None:
        self.is_enabled = is_enabled
        self.scale = torch.full((), 2.0**16 if is_enabled else 1.0, dtype=torch.float32, device=device)
        self.steps = torch.zeros((), dtype=torch.int32, device=device)  # since the last overflow

    def update(self, is_overflow: Tensor) -> None:
        """is_overflow: (), 1 where a gradient was not finite."""
        if self.is_enabled:
            torch._amp_update_scale_(self.scale, self.steps, is_overflow, 2.0, 0.5, self.GROWTH_INTERVAL)


class Trainer:
    """One stage of training: a model, the rows of its tasks, and how they are scheduled and combined."""

    def __init__(
        self,
        stage: Stage,
        model: TaskModel,
        trained: Trained,
        data: StageData,
        methods: Methods,
        precision: Precision,
        cuda_graphs: bool = False,
        processes: ProcessGroup = ALONE,
        divides_steps: bool = True,
    ) -> None:
        """trained: the parameters that move; they become views into this trainer's vectors. cuda_graphs: passes on a
        GPU are recorded and replayed. processes: that divide the rows of an evaluation, and those of a step where that
        is worth it; else each of them takes all of its rows."""
        self.stage, self.model, self.data, self.methods, self.precision = stage, model, data, methods, precision
        self.evaluating, self.processes = processes, processes if divides_steps else ALONE
        self.is_treated = methods.treatment is not None and len(trained.shared) > 0
        self.shared = FlatParameters(trained.shared, len(stage.tasks) if self.is_treated else 1, self.processes)
        self.own = {task: FlatParameters(trained.own[task]) for task in stage.tasks}
        self.segments = [self.shared.columns(set(names)) for names in methods.segments or [list(trained.shared)]]
        self.average = WeightAverage(self._vectors(), methods.ema_decay) if methods.ema_decay else None
        self.best: dict[str, Tensor] = {}
        self.progress = Progress(rows=dict.fromkeys(stage.tasks, 0), micro_batch=stage.batch_size)
        self.scaler = LossScaler(precision.dtype == torch.float16, precision.device)
        self._streams = {task: RowStream(len(data.train[task]), self._seed("rows", task)) for task in stage.tasks}
        self._halted = torch.zeros((), dtype=torch.bool, device=precision.device)  # after a step that cannot be taken
        self._launched: deque[Launched] = deque()
        self.num_waiting = 0 if precision.device.type == "cpu" else 1  # steps that have been ordered and not told of
        self._masks = DropoutMasks(0, precision.device)  # of the pass that is being taken
        self._take_pass: Callable[..., Tensor] = self._pass_on_device
        self._take_whole: Callable[..., Tensor] = self._step_on_device
        self._replays = cuda_graphs and has_fused_operations(precision.device)
        if self._replays:
            self._take_pass, self._take_whole = Replayed(self._pass_on_device), Replayed(self._step_on_device)
        self._since = time.perf_counter()  # when the work began that will be told of next

    @cached_property
    def _joined(self) -> tuple[TokenizedRows, dict[str, int]] | None:
        """The rows of all tasks in one, and where each task's begin, where a step can take them in the same passes."""
        rows = [rows for rows in self.data.train.values() if isinstance(rows, TokenizedRows)]
        splits = has_fused_operations(self.precision.device)  # a task's gradient from the rest of its pass
        is_apart = self.methods.regularizers or not self.model.shares_passes or (self.is_treated and not splits)
        if is_apart or len(rows) < len(self.data.train):
            return None
        starts = np.cumsum([0, *map(len, rows)]).tolist()
        return reduce(TokenizedRows.followed_by, rows), dict(zip(self.data.train, starts, strict=False))

    def _seed(self, *purpose: str | int) -> int:
        return derive_seed(self.stage.seed, self.stage.name, *purpose)

    def _vectors(self) -> dict[str, FlatParameters]:
        """All that moves, by name."""
        return {"shared": self.shared, **{f"own.{task}": own for task, own in self.own.items()}}

    # ------------------------------------------------------------------------------------------------- the loop

    def run(self, between: BetweenBatches = no_stop, settle_every: int = 0) -> Iterator[Event]:
        """Trains to the end of the stage, from where `progress` stands, and tells what it has done after each step.

        On a GPU a step is told of when the next one has been ordered, but for every settle_every-th one and the last of
        an epoch: then the trainer stands where the last event says. between: called between batches of an evaluation;
        what it raises leaves the stage at its last finished step.
        Raises TrainingError at a step that cannot be taken; nothing of it has moved then.
        """
        stage, progress = self.stage, self.progress
        self._since = time.perf_counter()
        while True:
            epoch, place = divmod(progress.step, stage.steps_per_epoch)
            if place == 0 and progress.closed_epochs < epoch:
                event = self._end_epoch(epoch, between)
                progress.closed_epochs = epoch
                yield event
                self._since = time.perf_counter()
            if progress.ended or progress.step == stage.num_steps:
                break
            self._launched.append(self._launch(epoch + 1, progress.step))
            progress.step += 1
            stands = progress.step % stage.steps_per_epoch == 0 or (settle_every and progress.step % settle_every == 0)
            yield from self.settle(0 if stands else self.num_waiting)
        for name, value in self.best.items():
            self._vectors()[name].values.copy_(value)

    def settle(self, num_waiting: int = 0) -> Iterator[Event]:
        """Waits for the steps that the device has been ordered to take, but for the last few, and tells of them."""
        while len(self._launched) > num_waiting:
            launched = self._launched.popleft()
            record = self._record(launched)
            seconds = time.perf_counter() - self._since
            self.progress.seconds += seconds
            self.progress.loss_sum += record["loss"]
            yield Event(record | {"examples_per_second": self.stage.rows_per_step / seconds}, notes=launched.notes)
            self._since = time.perf_counter()

    def _end_epoch(self, epoch: int, between: BetweenBatches) -> Event:
        stage, progress = self.stage, self.progress
        if not self.data.dev:
            mean, progress.loss_sum = progress.loss_sum / stage.steps_per_epoch, 0.0
            record = {"stage": stage.name, "epoch": epoch, "step": progress.step, "mean_loss": mean}
            return Event(record, is_epoch=True)
        is_last = epoch == stage.epochs
        if not is_last and (stage.eval_every == 0 or epoch % stage.eval_every):
            return Event(None, is_epoch=True)
        started, notes = time.perf_counter(), list[str]()
        with self.averaged():
            try:
                size, warn = stage.eval_batch_size, notes.append
                metrics = evaluate(self.model, self.data.dev, size, self.precision, warn, between, self.evaluating)
            except OutputError as error:
                raise TrainingError(f"{stage.name} epoch {epoch}: {error}") from None
        seconds = time.perf_counter() - started
        progress.seconds += seconds
        score = mean_score(metrics)
        is_best = score > (-math.inf if progress.best_score is None else progress.best_score)
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

    def averaged(self) -> AbstractContextManager[None]:
        """Within it the model's weights are their averages, where those are kept: what is scored and saved as best."""
        return self.average.in_place() if self.average else nullcontext()

    # ------------------------------------------------------------------------------------------------- one step

    def take_step(self, epoch: int, step: int) -> Record:
        """One optimizer step; returns its line for the log. epoch: from 1. step: counted from 0. Raises TrainingError
        if a loss or a gradient is not finite."""
        return self._record(self._launch(epoch, step))

    def _launch(self, epoch: int, step: int) -> Launched:
        """Orders a step of the device. The host waits for inner products with a treatment, for the step with
        regularizers alone, and else for nothing."""
        stage, progress = self.stage, self.progress
        plan = self.methods.scheduler.plan(epoch, step, random.Random(self._seed("plan", step)))
        tasks = [task for task in stage.tasks if task in plan]
        counts = rows_of_plan(plan, stage.rows_per_step)
        rows = {task: self._streams[task].rows(progress.rows[task], counts[task]) for task in tasks}
        weights = {task: self._weight(task, plan[task], len(rows[task])) for task in tasks}
        record = {
            "stage": stage.name,
            "epoch": epoch,
            "step": step + 1,
            "task": "+".join(tasks),
            "draws": {task: plan[task].count for task in tasks},
            "lr": stage.learning_rate(step),
        }

        lr = torch.full((), stage.learning_rate(step), dtype=torch.float64, device=self.precision.device)
        notes: list[str] = []
        losses, numbers = self._backward_within_memory(rows, weights, lr, step, notes)
        found: Record | None = {}
        if numbers is None:
            found = self._treat(rows, weights, losses, step) if self.is_treated else {}
            numbers = self._move(tasks, losses, lr, is_overflow=found is None)
        reading = Reading(numbers)
        if self.methods.regularizers and found is not None and (self.is_treated or not reading.wait()[-2]):
            for regularizer in self.methods.regularizers:
                regularizer.after_step(step)
        drawn = dict(progress.rows)
        for task in tasks:
            progress.rows[task] += counts[task]
        return Launched(step, record | (found or {}), reading, weights, rows, drawn, notes)

    def _record(self, launched: Launched) -> Record:
        """The line for the log, when the device has come that far. Raises TrainingError for a step that could not be
        taken, after which the trainer stands before it."""
        stage, progress, tasks = self.stage, self.progress, list(launched.rows)
        *losses, norm, is_skipped, scale = launched.numbers.wait().tolist()
        is_overflow = self.scaler.is_enabled and np.isfinite(losses).all() and scale > self.scaler.LEAST
        if is_skipped and not is_overflow:
            progress.step, progress.rows = launched.step, dict(launched.drawn)
            self._launched.clear()
            self._halted.zero_()
            raise self._error(launched.rows, losses, norm, launched.step)
        mean = {task: loss / launched.weights[task] for task, loss in zip(tasks, losses, strict=True)}
        total = sum(mean[task] * len(launched.rows[task]) for task in tasks) / stage.rows_per_step
        record = launched.record | {"loss": total, "losses": mean, "gradient_norm": norm}
        if is_skipped:
            return record | {"gradient_norm": math.nan, "skipped": "overflow", "loss_scale": scale}
        if "cosines" in record:
            add_conflicts(progress.conflicts, record)
        return record

    def _weight(self, task: str, draws: Draws, num_rows: int) -> float:
        """Factor on the mean loss of a task's rows: its share of the step's rows, or what the scheduler says where a
        treatment combines the tasks' gradients; times the task's own."""
        factor = draws.weight if self.is_treated else num_rows / self.stage.rows_per_step
        return factor * self.methods.loss_weights.get(task, 1.0)

    def _gradient_row(self, task: str) -> int:
        """Which of the shared gradients belongs to this task; without a treatment all accumulate in the first."""
        return self.stage.tasks.index(task) if self.is_treated else 0

    def _backward_within_memory(
        self, rows: Mapping[str, np.ndarray], weights: Mapping[str, float], lr: Tensor, step: int, notes: list[str]
    ) -> tuple[Tensor, Tensor | None]:
        """What `_backward` returns; out of memory, the step begins again without CUDA graphs, then with passes of half
        the rows."""
        progress = self.progress
        while True:
            try:
                return self._backward(list(self._passes(rows, weights, step)), list(rows), lr)
            except torch.OutOfMemoryError:
                if progress.micro_batch == 1 and not self._replays:
                    raise TrainingError(
                        f"{self.stage.name} step {step + 1}: the device is out of memory with one row a forward pass"
                    ) from None
            how = "without CUDA graphs"
            if not self._replays:
                progress.micro_batch = -(-progress.micro_batch // 2)
                how = f"with at most {counted(progress.micro_batch, 'row')} a forward pass, and the same rows a step"
            progress.replays = False
            self._launch_only()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            notes.append(f"{self.stage.name} step {step + 1}: out of memory; going on {how}")

    def _launch_only(self) -> None:
        """From here on no pass is a CUDA graph: they hold memory."""
        self._replays = False
        self._take_pass, self._take_whole = self._pass_on_device, self._step_on_device

    def _backward(self, passes: Sequence[Pass], tasks: list[str], lr: Tensor) -> tuple[Tensor, Tensor | None]:
        """Each task's gradient, of its mean loss times its weight; returns those losses (T,). A step of a single pass
        and without a treatment is taken whole: then the second is what `_move` returns. Raises OutOfMemoryError in all
        processes if one has no memory."""
        is_simple = len(passes) == 1 and not self.is_treated and not self.methods.regularizers
        if is_simple and self.processes.size == 1:
            numbers = self._take_whole(*self._prepared(passes[0]), lr)  # (T + 3,)
            return numbers[: len(tasks)], numbers
        self._forget_gradients()
        losses = torch.zeros(len(tasks), device=self.precision.device)  # (T,)
        fits = True
        for group in self._groups(tasks):
            places = slice(tasks.index(group[0]), tasks.index(group[-1]) + 1)
            fits = fits and self._take([part for part in passes if part.tasks == group], losses[places])
            for task in group:
                self._begin_sums(task, is_last=task == tasks[-1])
        self.processes.finish_sums()
        if self.processes.greatest(int(not fits)):
            raise torch.OutOfMemoryError
        return self.processes.add(losses), None

    def _take(self, passes: Sequence[Pass], losses: Tensor) -> bool:
        """Adds the losses of these passes to (T,); returns whether there was memory for them."""
        try:
            for part in passes:
                losses += self._take_pass(*self._prepared(part))
        except torch.OutOfMemoryError:
            return False
        return True

    def _begin_sums(self, task: str, is_last: bool) -> None:
        """Sums over processes what a task's passes have found: of its own parameters, which are few, at once, of the
        shared ones while the next task's passes are taken."""
        self.processes.add(self.own[task].gradients)
        if self.is_treated or is_last:
            self.processes.begin_sum(self.shared.gradients[self._gradient_row(task)])

    def _forget_gradients(self) -> None:
        for vector in self._vectors().values():
            vector.gradients.zero_()

    def _groups(self, tasks: Sequence[str]) -> list[tuple[str, ...]]:
        """Which tasks' rows go through the model together."""
        return [tuple(tasks)] if self._joined else [(task,) for task in tasks]

    def _passes(self, rows: Mapping[str, np.ndarray], weights: Mapping[str, float], step: int) -> Iterator[Pass]:
        """This process's forward passes of a step: of all tasks' rows together or of each task's, so many rows at a
        time as go."""
        starts, num_before = self._joined[1] if self._joined else dict.fromkeys(rows, 0), 0
        for group in self._groups(list(rows)):
            numbers = np.concatenate([rows[task] + starts[task] for task in group])  # (B,)
            of_task = np.repeat(range(len(group)), [len(rows[task]) for task in group])  # (B,)
            factors = np.array([[weights[task] / len(rows[task])] for task in group])  # (T, 1)
            factors = np.where(of_task == np.arange(len(group))[:, None], factors, 0)  # (T, B)
            places = self.processes.share(np.arange(len(numbers)), num_before)
            num_before += len(numbers)
            for first in range(0, len(places), self.progress.micro_batch):
                part = places[first : first + self.progress.micro_batch]
                seed = self._seed("dropout", step, "+".join(group), int(part[0]))
                yield Pass(group, numbers[part], factors[:, part], seed)

    def _rows_of(self, tasks: Sequence[str]) -> Rows:
        return self._joined[0] if self._joined else self.data.train[tasks[0]]

    def _prepared(self, part: Pass) -> tuple[PassKey, Tensor, Tensor]:
        """Sets the dropout masks of a pass, `_masks`, and returns the arguments of `_pass_on_device` as CUDA graphs
        want them: what depends on the rows in tensors (B,) and (T, B), the rest in the key."""
        device = self.precision.device
        self._masks = DropoutMasks(part.seed, device)
        key = (part.tasks, len(part.numbers), self._rows_of(part.tasks).num_places(part.numbers))
        return key, to_device(part.numbers, device), to_device(part.weights, device).to(torch.get_default_dtype())

    def _step_on_device(self, key: PassKey, numbers: Tensor, weights: Tensor, lr: Tensor) -> Tensor:
        """A step of a single pass, without a treatment."""
        self._forget_gradients()
        return self._move(key[0], self._pass_on_device(key, numbers, weights), lr, is_overflow=False)

    def _pass_on_device(self, key: PassKey, numbers: Tensor, weights: Tensor) -> Tensor:
        """Each task's weighted loss (T,), after a forward and a backward pass."""
        tasks, _, num_places = key
        batch = self._rows_of(tasks).gather(numbers, num_places)  # (B,) row numbers -> N = num_places tokens
        self.shared.point_to(0 if self._joined else self._gradient_row(tasks[0]))
        bounds = self._bounds(tasks, batch, weights) if self._joined and self.is_treated else None
        with ops.gradients_by_task(bounds):
            return self._forward_backward(tasks, batch, weights)

    def _bounds(self, tasks: Sequence[str], batch: Batch, weights: Tensor) -> TaskBounds:
        """Where each task's rows of a joined pass and its row of the shared gradients lie. weights: (T, B)."""
        assert batch.tokens is not None
        counts = dict(zip(tasks, (weights > 0).sum(1), strict=True))  # () each
        none = torch.zeros_like(counts[tasks[0]])
        num_rows = torch.stack([counts.get(task, none) for task in self.stage.tasks])  # of all tasks, (tasks,)
        tokens = batch.tokens
        return TaskBounds.of(num_rows, tokens.packing.ends, len(tokens.input_ids), self.shared.gradients.shape[1])

    def _forward_backward(self, tasks: Sequence[str], batch: Batch, weights: Tensor) -> Tensor:
        """Each task's weighted loss (T,), after its backward pass. weights: (T, B)."""
        with self.precision.autocast():
            logits = self.model.logits_of(tasks, batch, self._masks)  # T of (B, K)
        losses = []
        for task, of_task, of_row in zip(tasks, logits, weights, strict=True):
            labels = torch.where(of_row > 0, batch.labels, 0)  # (B,); another task's label is nothing to compare with
            of_rows = torch.where(of_row > 0, self.methods.losses(task, of_task, labels), 0)  # (B, K) -> (B,)
            losses.append((of_rows * of_row).sum())  # (B,) -> ()
        if self.methods.regularizers:
            losses[0] = losses[0] + weights[0].sum() * self._regularization(tasks[0], batch, logits[0])
        (sum(losses, torch.zeros((), device=weights.device)) * self.scaler.scale).backward()
        return torch.stack(losses).detach()  # (T,)

    def _regularization(self, task: str, batch: Batch, logits: Tensor) -> Tensor:
        """The regularizers' terms for these rows, a scalar."""
        if self.precision.dtype is not None:
            self._masks = self._masks.again()
            logits = self.model(task, batch, self._masks)  # (B, K), in float32
        terms = [regularizer.term(task, batch, self._masks, logits) for regularizer in self.methods.regularizers]
        return torch.stack(terms).sum()  # ()

    def _treat(
        self, rows: Mapping[str, np.ndarray], weights: Mapping[str, float], losses: Tensor, step: int
    ) -> Record | None:
        """Combines the task gradients in the first of them; returns what the treatment found and did, None where a
        gradient overflowed. Raises TrainingError before a running average moves if anything else is not finite."""
        assert self.methods.treatment is not None
        tasks, places = list(rows), [self._gradient_row(task) for task in rows]
        gramians, losses = self._gramians(losses, places)  # (S, T, T), (T,)
        if not gramians.isfinite().all():
            if self.scaler.is_enabled and losses.isfinite().all():
                return None
            raise self._error(rows, losses.tolist(), float(gramians.sum()), step)
        draw_weights = torch.tensor(list(weights.values()), dtype=torch.float64)  # (T,)
        gramians, factors = without_vanishing(gramians), torch.ones_like(draw_weights)
        if self.methods.scales_equally:
            factors = equal_lengths(gramians, draw_weights)  # (T,)
            gramians = gramians * factors[:, None] * factors  # (S, T, T)
        generator = random.Random(self._seed("treatment", step))
        coefficients = self.methods.treatment.coefficients(
            gramians, places, generator, losses / draw_weights, 1 + step // self.stage.steps_per_epoch
        )  # (S, T, T)
        combined = torch.zeros(len(gramians), len(self.shared.sums), dtype=torch.float64)  # (S, tasks)
        combined[:, places] = coefficients.sum(1) * factors  # (S, T); nothing of a task that is not in the step
        combine(self.shared.sums, combined, self.segments)  # (tasks, P) -> the first (P,)
        between = cosines(gramians.sum(0))  # (T, T)
        kept = (coefficients * gramians).sum(2).sum(0)  # (T,): each segment's Gram matrix under its own coefficients
        removed = removed_shares(gramians.sum(0).diagonal(), kept)  # (T,)
        pairs = [(i, j) for i in range(len(tasks)) for j in range(i + 1, len(tasks))]
        return {
            "cosines": {f"{tasks[i]}-{tasks[j]}": float(between[i, j]) for i, j in pairs},
            "removed": {task: float(share) for task, share in zip(tasks, removed, strict=True)},
        }

    def _gramians(self, losses: Tensor, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """On the host, (S, T, T) inner products of these of the shared gradients, NaN where any gradient or loss is not
        finite, and the losses (T,)."""
        norm = gradient_norm([of.gradients for of in self.own.values()])
        others = torch.cat([losses.double(), torch.stack([norm, self.scaler.scale.double()])])  # (T + 2,)
        for dtype in (self.shared.values.dtype, torch.float64):
            found = self.processes.add(gramians_of(self.shared.sums, self.segments, dtype))  # (S, tasks, tasks)
            numbers = Reading(torch.cat([found.flatten(), others])).wait()
            gramians = numbers[: found.numel()].view(found.shape)[:, places][:, :, places]  # (S, T, T)
            if ops.is_exact(gramians):
                break
        *on_host, of_own, scale = numbers[found.numel() :]
        losses = torch.stack(on_host)  # (T,)
        return gramians / scale**2 + 0 * (of_own + losses.sum()), losses

    def _move(self, tasks: Sequence[str], losses: Tensor, lr: Tensor, is_overflow: bool) -> Tensor:
        """Clips the gradients, the shared one and those of the tasks' own parameters, and moves the parameters, unless
        a gradient is not finite. is_overflow: it is known already that one is not.

        A task that is not in the step is left alone, its moments too. Returns the numbers of `Launched`.
        """
        stage, scale = self.stage, self.scaler.scale
        vectors = [vector for vector in (self.shared, *(self.own[task] for task in tasks)) if len(vector)]
        norms = [vector.processes.joint_norm(gradient_norm([vector.sums[0]])) for vector in vectors]
        norm = torch.linalg.vector_norm(torch.stack(norms)) / scale  # ()
        is_bad = torch.full_like(self._halted, True) if is_overflow else ~norm.isfinite()
        self._halted |= ~losses.isfinite().all() if self.scaler.is_enabled else is_bad | ~losses.isfinite().all()
        is_skipped = (self._halted | is_bad).to(torch.float32)
        factor = clip_factor(norm, stage.max_grad_norm) / scale
        moved = [vector.moved_by(vector.sums[0]) for vector in vectors]
        adamw_step(moved, lr, stage.weight_decay, factor, is_skipped)
        self.shared.spread()
        if self.average:
            self.average.after_step(is_skipped)
        numbers = torch.cat([losses.double(), torch.stack([norm, is_skipped.double(), scale.double()])])  # (T + 3,)
        self.scaler.update((is_bad & ~self._halted).to(torch.float32))
        return numbers

    def _error(self, rows: Mapping[str, np.ndarray], losses: Sequence[float], norm: float, step: int) -> TrainingError:
        place = f"{self.stage.name} step {step + 1}"
        for (task, numbers), loss in zip(rows.items(), losses, strict=True):
            if not math.isfinite(loss):
                shown = ", ".join(map(str, sorted(numbers.tolist())[:40])) + (", ..." if len(numbers) > 40 else "")
                found = f"the loss of {task} is {loss}; training rows {shown} (counted from 0, after filtering)"
                return TrainingError(f"{place}: {found}")
        return TrainingError(f"{place}: the gradient of {'+'.join(rows)} is {norm}")

    # ------------------------------------------------------------------------------------------------ checkpoints

    def state_tensors(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint besides the model's: moments, averages, best parameters."""
        return {
            **{f"optimizer.{n}.{k}": value for n, of in self._vectors().items() for k, value in of.state().items()},
            **self._in_place(),
        }

    def _in_place(self) -> dict[str, Tensor]:
        """All of them but the moments: what every process holds whole, and changes in place from step to step."""
        states: dict[str, Mapping[str, Tensor]] = {
            "scaler": {"scale": self.scaler.scale, "steps": self.scaler.steps},
            **{f"regularizer.{i}": regularizer.state for i, regularizer in enumerate(self.methods.regularizers)},
            "best": self.best,
        }
        if self.methods.treatment is not None:
            states["treatment"] = self.methods.treatment.state
        if self.average:
            states["average"] = self.average.state
        return {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}

    def load_state(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        """Takes up a checkpoint of this stage. Raises ValueError, and changes no tensor, if it is of another one."""
        self.progress = Progress(**progress)
        if problem := self.progress.problem(self.stage):
            raise ValueError(problem)
        if self.stage.is_frozen and self.progress.best_epoch:
            self.best = {name: torch.empty_like(vector.values) for name, vector in self._vectors().items()}
        mine = self.state_tensors()
        for name in sorted(mine.keys() | tensors.keys()):
            kinds = [(of.dtype, of.shape) if (of := group.get(name)) is not None else None for group in (mine, tensors)]
            if kinds[0] != kinds[1]:
                raise ValueError(f"the tensor {shown(name)} is missing, of another shape or type, or not known")
        if not self.progress.replays:
            self._launch_only()
        for name, vector in self._vectors().items():
            vector.load_state({key: tensors[f"optimizer.{name}.{key}"] for key in vars(vector.moments)})
        for name, value in self._in_place().items():
            value.copy_(tensors[name])


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
