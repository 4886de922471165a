"""The training step and the training loop, one for every scheduler, treatment, regularizer and precision.

plan = scheduler.plan(...)                             which tasks, e.g. ["para", "sst", "para", "sts"]
for each task of the plan: forward, loss (+ regularizers), backward into that task's gradient buffer
unscale -> treatment -> clip once -> optimizer step -> after-step updates
"""

import math
import random
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from bert import DropoutMasks
from datasets import BetweenBatches, Rows, RowStream
from dense import weight_gradients_in_place
from evaluation import Precision, evaluate, mean_score
from model import TaskModel
from optimizer import AdamW, clip_factor, gradient_norm
from pcgrad import Sum, TaskGradients, Treatment, cosines, removed_shares
from regularizers import Regularizer
from schedulers import Scheduler
from seeding import derive_seed
from tasks import TASKS, task_loss

Metrics = dict[str, dict[str, float]]


class TrainingError(ValueError):
    """Training cannot go on; the message is one line for the user."""


class Stopped(Exception):
    """The run was told to stop; its last finished step is in the checkpoint."""


@dataclass(frozen=True)
class StageSettings:
    """What one stage of training is asked to do.

    batch_size: rows of a forward pass; accumulation_steps: forward passes of a draw. warmup: share of the steps.
    patience: epochs without a gain after which the stage ends, 0 for never. eval_every: epochs between evaluations, 0
    for the last epoch only. save_every: steps between checkpoints, 0 for epochs' ends only.
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
    save_every: int
    seed: int

    @property
    def num_steps(self) -> int:
        return self.epochs * self.steps_per_epoch


@dataclass
class Progress:
    """Where a stage stands: all that a resumed run needs besides tensors.

    step: finished optimizer steps; closed_epochs: epochs whose evaluation is done. draws: draws of each task so far.
    micro_batch: rows of a forward pass, below the batch size after the device ran out of memory.
    seconds: spent training and evaluating.
    """

    step: int = 0
    closed_epochs: int = 0
    draws: dict[str, int] = field(default_factory=dict)
    micro_batch: int = 0
    loss_scale: float = 2.0**16
    steps_since_overflow: int = 0
    best_score: float | None = None
    best_epoch: int = 0
    ended: bool = False
    seconds: float = 0.0
    conflicts: dict[str, Any] = field(default_factory=dict)


class Listener(Protocol):
    """What happens around the loop: logging, display, checkpoints."""

    def on_step(self, record: Mapping[str, Any]) -> None: ...

    def on_evaluation(self, record: Mapping[str, Any], is_best: bool) -> None: ...

    def say(self, line: str) -> None: ...

    def save(self) -> None:
        """Writes the checkpoint that a resumed run starts from."""
        ...

    def check_stop(self) -> None:
        """Raises Stopped if the run was told to stop."""
        ...

    @property
    def stop_requested(self) -> bool: ...


def learning_rate_factor(step: int, num_steps: int, warmup: float) -> float:
    """Linear warm-up over the first share `warmup` of the steps, then linear decay to 0. step: counted from 0."""
    warmup_steps = int(warmup * num_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return (num_steps - step) / max(1, num_steps - warmup_steps)


class LossScaler:
    """Dynamic loss scaling for float16 gradients over several task buffers.

    torch's GradScaler unscales the gradients that an optimizer holds; here the buffers of all tasks must be unscaled,
    and overflow found, before they become one gradient.
    """

    GROWTH_INTERVAL = 2000

    def __init__(self, enabled: bool, progress: Progress) -> None:
        self.enabled = enabled
        self.progress = progress

    @property
    def scale(self) -> float:
        return self.progress.loss_scale if self.enabled else 1.0

    def unscale(self, gradients: Iterable[Tensor]) -> bool:
        """Divides the gradients by the scale; whether they are all finite."""
        if not self.enabled:
            return True
        finite = True
        for gradient in gradients:
            gradient.mul_(1 / self.scale)
            finite = finite and bool(torch.linalg.vector_norm(gradient).isfinite())
        return finite

    def update(self, finite: bool) -> None:
        """Halves the scale after an overflow, doubles it after long without one."""
        if not self.enabled:
            return
        progress = self.progress
        progress.steps_since_overflow = progress.steps_since_overflow + 1 if finite else 0
        if not finite:
            progress.loss_scale = max(1.0, progress.loss_scale / 2)
        elif progress.steps_since_overflow % self.GROWTH_INTERVAL == 0:
            progress.loss_scale *= 2


class Trainer:
    """One stage of training: a model, the rows of its tasks, and how they are scheduled and combined."""

    def __init__(
        self,
        settings: StageSettings,
        model: TaskModel,
        shared: Mapping[str, nn.Parameter],
        of_tasks: Mapping[str, Mapping[str, nn.Parameter]],
        segment_sizes: Sequence[int],
        train_rows: Mapping[str, Rows],
        dev_rows: Mapping[str, Rows],
        scheduler: Scheduler,
        treatment: Treatment,
        precision: Precision,
        eval_batch_size: int,
        listener: Listener,
        regularizers: Sequence[Regularizer] = (),
        keeps_best: bool = False,
        embedding: str | None = None,
    ) -> None:
        """shared: parameters that all tasks train, by name; of_tasks: each task's own. keeps_best: the parameters of
        the best epoch are kept in memory and restored at the end. embedding: the name of a shared parameter of which a
        batch has gradients in the lines of its tokens only, if there is one."""
        self.settings = settings
        self.model = model
        self.of_tasks = of_tasks
        self.parameters = {**shared, **{name: p for own in of_tasks.values() for name, p in own.items()}}
        self.train_rows, self.dev_rows = train_rows, dev_rows
        self.scheduler, self.treatment = scheduler, treatment
        self.precision, self.eval_batch_size = precision, eval_batch_size
        self.listener, self.regularizers = listener, regularizers
        self.keeps_best = keeps_best
        self.best: dict[str, Tensor] = {}
        self.progress = Progress(draws=dict.fromkeys(settings.tasks, 0), micro_batch=settings.batch_size)
        self.scaler = LossScaler(precision.dtype == torch.float16, self.progress)
        self.optimizer = AdamW(self.parameters, settings.weight_decay)
        self.is_treated = type(treatment) is not Sum and bool(shared)
        rows = len(settings.tasks) if self.is_treated else 1
        self.embedding = embedding
        self.gradients = TaskGradients(
            list(shared.values()),
            rows,
            segment_sizes if shared else [],
            None if embedding is None else shared[embedding],
        )
        rows_per_draw = settings.batch_size * settings.accumulation_steps
        self._streams = {
            task: RowStream(
                len(train_rows[task]), rows_per_draw, derive_seed(settings.seed, "rows", settings.name, task)
            )
            for task in settings.tasks
        }

    # ------------------------------------------------------------------------------------------------- the loop

    def run(self) -> None:
        """Trains to the end of the stage, from where `progress` stands."""
        settings, progress, listener = self.settings, self.progress, self.listener
        while True:
            epoch = progress.step // settings.steps_per_epoch
            if progress.step % settings.steps_per_epoch == 0 and progress.closed_epochs < epoch:
                self._end_epoch(epoch)
                progress.closed_epochs = epoch
                listener.save()
            if progress.ended or progress.step == settings.num_steps:
                break
            started = time.perf_counter()
            try:
                record = self.take_step(epoch + 1, progress.step)
            except TrainingError:
                listener.save()  # nothing of the failed step has moved: this is the last good state
                raise
            progress.step += 1
            seconds = time.perf_counter() - started
            progress.seconds += seconds
            record["examples_per_second"] = record.pop("examples") / seconds
            listener.on_step(record)
            if listener.stop_requested or self._is_save_step():
                listener.save()
            listener.check_stop()
        if self.keeps_best and self.best:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(self.best[name])

    def _is_save_step(self) -> bool:
        return self.settings.save_every > 0 and self.progress.step % self.settings.save_every == 0

    def _end_epoch(self, epoch: int) -> None:
        settings, progress = self.settings, self.progress
        is_last = epoch == settings.epochs
        if not is_last and (settings.eval_every == 0 or epoch % settings.eval_every):
            return
        started = time.perf_counter()
        metrics = self.evaluate(self.stop_if_requested)
        seconds = time.perf_counter() - started
        progress.seconds += seconds
        score = mean_score(metrics)
        is_best = progress.best_score is None or score > progress.best_score
        if is_best:
            progress.best_score, progress.best_epoch = score, epoch
            if self.keeps_best:
                self.best = {name: p.detach().clone() for name, p in self.parameters.items()}
        num_rows = sum(len(rows) for rows in self.dev_rows.values())
        record = {"stage": settings.name, "epoch": epoch, "step": progress.step, "dev": {**metrics, "mean": score}}
        self.listener.on_evaluation({**record, "dev_examples_per_second": num_rows / seconds}, is_best)
        if settings.patience and epoch - progress.best_epoch >= settings.patience and not is_last:
            progress.ended = True
            self.listener.say(
                f"{settings.name}: no gain for {settings.patience} epochs (--patience), the best was epoch "
                f"{progress.best_epoch}"
            )

    def stop_if_requested(self) -> None:
        """A stop between batches that train nothing goes back to the last finished step; resuming runs them again."""
        if self.listener.stop_requested:
            self.listener.save()
            self.listener.check_stop()

    def evaluate(self, between: BetweenBatches = lambda: None) -> Metrics:
        """Metrics on the dev rows of the stage's tasks."""
        return evaluate(self.model, self.dev_rows, self.eval_batch_size, self.precision, self.listener.say, between)

    # ------------------------------------------------------------------------------------------------- one step

    def take_step(self, epoch: int, step: int) -> dict[str, Any]:
        """One optimizer step; returns its record for the log. Raises TrainingError if a loss is not finite."""
        settings, progress = self.settings, self.progress
        lr = settings.lr * learning_rate_factor(step, settings.num_steps, settings.warmup)
        plan = self.scheduler.plan(epoch, step, random.Random(self._seed("plan", step)))
        draws = self._draw_rows(plan)
        losses = self._losses_with_memory(plan, draws, epoch, step)
        self._check_finite(losses, plan, draws, step)
        norm, diagnostics = self._update(plan, step, lr)
        for task in plan:
            progress.draws[task] += 1
        per_task = {
            t: float(np.mean([x for x, u in zip(losses, plan, strict=True) if u == t])) for t in dict.fromkeys(plan)
        }
        return {
            "stage": settings.name,
            "epoch": epoch,
            "step": step + 1,
            "task": "+".join(per_task),
            "loss": float(np.mean(losses)),
            "losses": per_task,
            "draws": dict(Counter(plan)),
            "lr": lr,
            "gradient_norm": norm,
            **diagnostics,
            "examples": sum(len(rows) for rows in draws),
        }

    def _seed(self, *purpose: str | int) -> int:
        return derive_seed(self.settings.seed, self.settings.name, *purpose)

    def _draw_rows(self, plan: Sequence[str]) -> list[np.ndarray]:
        """Row numbers of each draw of the plan."""
        position = dict(self.progress.draws)
        draws = []
        for task in plan:
            draws.append(self._streams[task].rows(position[task]))
            position[task] += 1
        return draws

    def _losses_with_memory(
        self, plan: Sequence[str], draws: Sequence[np.ndarray], epoch: int, step: int
    ) -> list[float]:
        """The backward passes of a step; out of memory, the step begins again with passes of half the rows."""
        while True:
            try:
                return self._backward(plan, draws, epoch, step)
            except torch.OutOfMemoryError:
                if self.progress.micro_batch == 1:
                    raise TrainingError(
                        f"{self.settings.name} step {step + 1}: the device is out of memory with one row a forward pass"
                    ) from None
            self._halve_batch(step)

    def _halve_batch(self, step: int) -> None:
        progress, settings = self.progress, self.settings
        progress.micro_batch = -(-progress.micro_batch // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        passes = -(-settings.batch_size * settings.accumulation_steps // progress.micro_batch)
        self.listener.say(
            f"{settings.name} step {step + 1}: out of memory; going on with --batch_size {progress.micro_batch} "
            f"--accumulation_steps {passes}, the same rows a draw"
        )

    def _backward(self, plan: Sequence[str], draws: Sequence[np.ndarray], epoch: int, step: int) -> list[float]:
        """Gradients of all draws; returns the mean loss of each."""
        counts = Counter(plan)
        self.gradients.zero()
        for own in self.of_tasks.values():
            for parameter in own.values():
                parameter.grad = None
        losses: list[Tensor] = []
        for number, (task, rows) in enumerate(zip(plan, draws, strict=True)):
            self.gradients.point_to(self._row(task))
            weight = self.scheduler.draw_weight(epoch, counts[task])
            parts = [rows[i : i + self.progress.micro_batch] for i in range(0, len(rows), self.progress.micro_batch)]
            total = torch.zeros((), device=self.precision.device)
            for i, part in enumerate(parts):
                loss = self._loss(
                    task, part, DropoutMasks(self._seed("dropout", step, number, i), self.precision.device)
                )
                share = len(part) / len(rows)
                with weight_gradients_in_place():
                    (loss * (weight * share * self.scaler.scale)).backward()
                total += loss.detach() * share
            losses.append(total)
        return [float(loss) for loss in torch.stack(losses).tolist()]

    def _row(self, task: str) -> int:
        return self.settings.tasks.index(task) if self.is_treated else 0

    def _loss(self, task: str, rows: np.ndarray, masks: DropoutMasks) -> Tensor:
        """Mean loss of some rows, regularizers included, a scalar."""
        batch = self.train_rows[task].batch(rows)
        if self.embedding is not None and batch.tokens is not None:
            self.gradients.touch(self._row(task), batch.tokens.input_ids)
        with self.precision.autocast():
            logits = self.model(task, batch, masks)
        loss = task_loss(TASKS[task], logits, batch.labels)
        if self.regularizers and self.precision.dtype is not None:
            logits = self.model(task, batch, masks.again())
        for regularizer in self.regularizers:
            loss = loss + regularizer.term(task, batch, masks, logits)
        return loss

    def _check_finite(
        self, losses: Sequence[float], plan: Sequence[str], draws: Sequence[np.ndarray], step: int
    ) -> None:
        for loss, task, rows in zip(losses, plan, draws, strict=True):
            if not math.isfinite(loss):
                shown = ", ".join(str(int(row)) for row in sorted(rows)[:40]) + (", ..." if len(rows) > 40 else "")
                raise TrainingError(
                    f"{self.settings.name} step {step + 1}: the loss of {task} is {loss}; training rows {shown} "
                    "(counted from 0, after filtering)"
                )

    def _update(self, plan: Sequence[str], step: int, lr: float) -> tuple[float, dict[str, Any]]:
        """From task gradients to new parameters; returns the gradient's norm before clipping, and diagnostics."""
        present = [task for task in self.settings.tasks if task in plan]
        own = [p.grad for task in present for p in self.of_tasks[task].values() if p.grad is not None]
        rows = [self._row(task) for task in present] if self.is_treated else [0]
        finite = self.scaler.unscale([*(self.gradients.rows[row] for row in rows), *own])
        self.scaler.update(finite)
        if not finite:
            return math.nan, {"skipped": "overflow", "loss_scale": self.scaler.scale}
        diagnostics = self._treat(present, rows, own, step) if self.is_treated else {}
        norm = gradient_norm([*self.gradients.parts(rows[0]), *own])
        if not math.isfinite(norm):
            raise self._gradient_error(present, norm, step)
        lines = {} if self.embedding is None else {self.embedding: self.gradients.touched(rows[:1])}
        self.optimizer.step(lr, clip_factor(norm, self.settings.max_grad_norm), lines)
        for regularizer in self.regularizers:
            regularizer.after_step(step)
        return norm, diagnostics

    def _gradient_error(self, tasks: Sequence[str], norm: float, step: int) -> TrainingError:
        return TrainingError(f"{self.settings.name} step {step + 1}: the gradient of {'+'.join(tasks)} is {norm}")

    def _treat(self, present: Sequence[str], rows: Sequence[int], own: Sequence[Tensor], step: int) -> dict[str, Any]:
        """Combines the task gradients; returns what the treatment found and did.

        own: gradients of the tasks' own parameters. Raises TrainingError before a running average moves if any gradient
        is not finite.
        """
        gramians = self.gradients.gramians(rows)
        norm = float(gramians.sum() + torch.stack(torch._foreach_norm(list(own))).sum().cpu())
        if not math.isfinite(norm):
            raise self._gradient_error(present, norm, step)
        generator = random.Random(self._seed("treatment", step))
        coefficients = self.treatment.coefficients(gramians, rows, generator)
        self.gradients.combine(rows, coefficients.sum(1))
        whole = gramians.sum(0)
        between = cosines(whole)
        # Over all segments: each segment's own Gram matrix under its own coefficients.
        kept = (coefficients * gramians).sum(2).sum(0)
        removed = removed_shares(whole.diagonal(), kept)
        pairs = [(i, j) for i in range(len(present)) for j in range(i + 1, len(present))]
        return {
            "cosines": {f"{present[i]}-{present[j]}": float(between[i, j]) for i, j in pairs},
            "removed": {task: float(share) for task, share in zip(present, removed, strict=True)},
        }

    # ------------------------------------------------------------------------------------------------ checkpoints

    def state_tensors(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint besides the model's: optimizer, treatment, regularizers, best parameters."""
        tensors = {f"treatment.{name}": value for name, value in self.treatment.state().items()}
        for i, regularizer in enumerate(self.regularizers):
            tensors.update({f"regularizer.{i}.{name}": value for name, value in regularizer.state().items()})
        tensors.update({f"optimizer.{name}": value for name, value in self.optimizer.state().items()})
        tensors.update({f"best.{name}": value for name, value in self.best.items()})
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        """Takes up a checkpoint of this stage."""
        for name, value in progress.items():
            setattr(self.progress, name, value)
        self.treatment.load_state(_part(tensors, "treatment."))
        for i, regularizer in enumerate(self.regularizers):
            regularizer.load_state(_part(tensors, f"regularizer.{i}."))
        self.best = {name: value.to(self.precision.device) for name, value in _part(tensors, "best.").items()}
        self.optimizer.load_state(_part(tensors, "optimizer."))


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


class ConflictSummary:
    """Means over a stage of what a treatment found: cosines, share of steps in conflict, share removed."""

    def __init__(self, sums: dict[str, Any]) -> None:
        """sums: where the running sums are kept, so that a checkpoint holds them."""
        self.sums = sums

    def add(self, record: Mapping[str, Any]) -> None:
        """Takes in a step's record."""
        for pair, cosine in record.get("cosines", {}).items():
            if math.isfinite(cosine):
                self._add("cosine", pair, cosine)
                self._add("conflict_rate", pair, float(cosine < 0))
        for task, share in record.get("removed", {}).items():
            if math.isfinite(share):
                self._add("removed", task, share)

    def _add(self, kind: str, key: str, value: float) -> None:
        total, count = self.sums.setdefault(kind, {}).get(key, (0.0, 0))
        self.sums[kind][key] = [total + value, count + 1]

    def means(self) -> dict[str, dict[str, float]]:
        return {kind: {k: total / count for k, (total, count) in of.items()} for kind, of in self.sums.items()}
