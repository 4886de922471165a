"""The training step and the loop around it, on tiny random models and rows, with a listener that records."""

import math
import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import kernels
import numpy as np
import pytest
import torch
from regularizers import BregmanProximal, Regularizer, Smoothness
from torch import Tensor

import engine
from datasets import Batch, RowStream, TokenizedRows, TokenRows
from engine import LossScaler, Progress, StageSettings, Trainer, TrainingError, learning_rate_factor
from evaluation import Precision, compute_features
from helpers import random_batch, tiny_model
from model import FrozenEncoder, MultitaskBert, TaskModel
from pal import PalConfig
from pcgrad import Sum, TaskGradients, Treatment, make_treatment
from schedulers import SCHEDULERS, Scheduler, Setting
from seeding import derive_seed
from smart import SmartConfig
from tasks import TASKS, task_loss

ALL = ("sst", "para", "sts")
CPU = torch.device("cpu")
TREATMENTS = ("sum", "pcgrad", "gradvac", *(["UPGrad"] if find_spec("torchjd") else []))


# ------------------------------------------------------------------------------------------------------ harness


@dataclass
class Recorder:
    """A listener that keeps what it hears."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[tuple[dict[str, Any], bool]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    num_saves: int = 0
    stop_requested: bool = False
    on_save: Callable[[], None] = lambda: None

    def on_step(self, record: Mapping[str, Any]) -> None:
        self.steps.append(dict(record))

    def on_evaluation(self, record: Mapping[str, Any], is_best: bool) -> None:
        self.evaluations.append((dict(record), is_best))

    def say(self, line: str) -> None:
        self.lines.append(line)

    def save(self) -> None:
        self.num_saves += 1
        self.on_save()

    def check_stop(self) -> None:
        pass


@dataclass
class Setup:
    trainer: Trainer
    heard: Recorder
    model: MultitaskBert

    def parameters(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def step(self, number: int = 0) -> dict[str, Any]:
        return self.trainer.take_step(1, number)

    def gradients_of_step(self, number: int = 0) -> dict[str, Tensor]:
        """The gradients that the optimizer sees in a step, which is not taken."""
        seen: dict[str, Tensor] = {}

        def record(lr: float, factor: float, lines: Mapping[str, Tensor]) -> None:
            seen.update({n: p.grad * factor for n, p in self.model.named_parameters() if p.grad is not None})

        step, self.trainer.optimizer.step = self.trainer.optimizer.step, record  # type: ignore[method-assign,assignment]
        self.step(number)
        self.trainer.optimizer.step = step  # type: ignore[method-assign]
        return seen


def random_rows(task: str, num_rows: int, seed: int) -> TokenizedRows:
    """Rows of 4 to 12 tokens with the labels of a random batch."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(4, 13, num_rows).astype(np.int32)
    ids = draw.integers(0, 100, int(lengths.sum())).astype(np.int32)
    firsts = draw.integers(1, lengths).astype(np.int32)
    labels = random_batch(task, num_rows, seed).labels.numpy()
    return TokenizedRows(TASKS[task], [str(i) for i in range(num_rows)], labels, TokenRows(ids, lengths, firsts), CPU)


def make(
    *,
    tasks: Sequence[str] = ALL,
    num_rows: int = 24,
    scheduler: str = "round_robin",
    treatment: str | Treatment = "sum",
    draws: int = 1,
    smart: bool = False,
    bregman: bool = False,
    adapters: bool = False,
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
    frozen: bool = False,
    head_layers: int = 0,
    eval_batch_size: int = 8,
    wrap: Callable[[TaskModel], TaskModel] = lambda model: model,
    **settings: Any,
) -> Setup:
    """A trainer of a tiny model, put together as the command does it."""
    defaults: dict[str, Any] = {
        "name": "pretrain" if frozen else "finetune", "epochs": 1, "steps_per_epoch": 2, "batch_size": 4,
        "accumulation_steps": 1, "lr": 1e-3, "warmup": 0.0, "weight_decay": 0.0, "max_grad_norm": 0.0, "patience": 0,
        "eval_every": 0, "save_every": 0, "seed": 0,
    }  # fmt: skip
    stage = StageSettings(tasks=tuple(tasks), **{**defaults, **settings})
    pal = PalConfig("attention", 8, 2, 2) if adapters else None
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = tiny_model(tasks, pal, head_layers, **rates)
    if adapters:  # fresh ones have a zero up-projection, and with it no gradient elsewhere
        noise = torch.Generator().manual_seed(5)
        for name, parameter in model.adapters.named_parameters():
            if ".up." in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=noise)
    precision = Precision(CPU, dtype)
    train: dict[str, Any] = {task: random_rows(task, num_rows, 10 + i) for i, task in enumerate(tasks)}
    dev: dict[str, Any] = {task: random_rows(task, 10, 20 + i) for i, task in enumerate(tasks)}
    shared = {} if frozen else model.shared_parameters()
    of_tasks = {task: model.task_parameters(task) for task in tasks}
    seen: TaskModel = model
    if frozen:
        train, dev = (
            {t: compute_features(model, t, rows, 8, precision) for t, rows in of.items()} for of in (train, dev)
        )
        of_tasks = {t: {n: p for n, p in own.items() if n.startswith("heads.")} for t, own in of_tasks.items()}
        seen = FrozenEncoder(model)
    terms: list[Regularizer] = []
    if smart:
        terms.append(Smoothness(model, SmartConfig()))
    if bregman:
        terms.append(BregmanProximal(model, 1.0, stage.num_steps))
    setting = Setting(tuple(tasks), (num_rows,) * len(tasks), stage.epochs, draws, every_task=treatment != "sum")
    heard = Recorder()
    trainer = Trainer(
        stage, wrap(seen), shared, of_tasks, [len(shared)], train, dev, SCHEDULERS[scheduler](setting),
        make_treatment(treatment, len(tasks), 1, 0.01) if isinstance(treatment, str) else treatment,
        precision, eval_batch_size, heard, terms, keeps_best=frozen,
        embedding=model.sparse_embedding_gradient(bool(shared)),
    )  # fmt: skip
    return Setup(trainer, heard, model)


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(
            found[name], value, rtol=rtol, atol=1e-5 * scale + 1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(after[name], value)}


class Forward:
    """A model with something done before each forward pass: `before(number, task, batch)`."""

    def __init__(self, model: TaskModel, before: Callable[[int, str, Batch], None]) -> None:
        self.model, self.before, self.number = model, before, 0

    def __call__(self, task: str, batch: Batch, masks: Any = None, perturbation: Tensor | None = None) -> Tensor:
        self.before(self.number, task, batch)
        self.number += 1
        return self.model(task, batch, masks, perturbation)


def wrapped(before: Callable[[int, str, Batch], None]) -> Callable[[TaskModel], TaskModel]:
    return lambda model: Forward(model, before)


# ------------------------------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize(("treatment", "draws"), [("sum", 2), ("pcgrad", 3), ("gradvac", 5)])
@pytest.mark.parametrize(("batch_size", "passes"), [(4, 3), (3, 4), (1, 12)])
def test_micro_batches_give_the_gradient_of_the_large_batch(
    treatment: str, draws: int, batch_size: int, passes: int
) -> None:
    whole = make(treatment=treatment, draws=draws, batch_size=12).gradients_of_step()
    parts = make(treatment=treatment, draws=draws, batch_size=batch_size, accumulation_steps=passes).gradients_of_step()
    assert_close(parts, whole)


@pytest.mark.parametrize(("batch_size", "passes"), [(4, 3), (8, 2), (3, 4)])
def test_a_shorter_last_micro_batch_counts_for_the_rows_it_has(batch_size: int, passes: int) -> None:
    """10 rows in all: a draw of 12 finds 10, the last forward pass has 2 of them (or 1)."""
    setup = make(tasks=["sst", "sts"], num_rows=10, draws=2, batch_size=batch_size, accumulation_steps=passes)
    whole = make(tasks=["sst", "sts"], num_rows=10, draws=2, batch_size=batch_size * passes).gradients_of_step()
    assert_close(setup.gradients_of_step(), whole)


def test_the_gradient_is_that_of_the_mean_loss_written_out() -> None:
    setup = make(tasks=["para"], num_rows=8, batch_size=3, accumulation_steps=2)
    found = setup.gradients_of_step()
    rows = RowStream(8, 6, derive_seed(0, "rows", "finetune", "para")).rows(0)
    batch = setup.trainer.train_rows["para"].batch(rows)
    setup.model.zero_grad()
    setup.model.sparse_embedding_gradient(False)
    task_loss(TASKS["para"], setup.model("para", batch), batch.labels).backward()
    assert_close(found, {n: p.grad for n, p in setup.model.named_parameters() if p.grad is not None})


def test_micro_batches_of_a_draw_are_different_rows() -> None:
    seen: list[int] = []
    make(tasks=["sst"], batch_size=4, accumulation_steps=3, wrap=wrapped(lambda n, t, b: seen.extend(b.rows))).step()
    assert len(seen) == len(set(seen)) == 12


def test_every_pass_over_the_rows_holds_each_once_and_comes_in_a_new_order() -> None:
    seen: list[int] = []
    setup = make(tasks=["sst"], num_rows=10, steps_per_epoch=9, wrap=wrapped(lambda n, t, b: seen.extend(b.rows)))
    for number in range(9):
        setup.step(number)
        assert setup.heard.steps == []
    passes = [seen[i : i + 10] for i in range(0, 30, 10)]
    assert all(sorted(rows) == list(range(10)) for rows in passes)
    assert len({tuple(rows) for rows in passes}) == 3


@contextmanager
def live_saved_tensors() -> Iterator["weakref.WeakSet[Any]"]:
    """The tensors that some autograd graph still holds for its backward pass."""

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    live: weakref.WeakSet[Any] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        live.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        yield live


@pytest.mark.parametrize(("treatment", "draws"), [("sum", 2), ("pcgrad", 3), ("gradvac", 4)])
def test_the_graph_of_a_micro_batch_is_freed_before_the_next(treatment: str, draws: int) -> None:
    counts: list[int] = []
    with live_saved_tensors() as live:
        setup = make(
            treatment=treatment, draws=draws, batch_size=2, accumulation_steps=3, dropout=0.1,
            wrap=wrapped(lambda number, task, batch: counts.append(len(live))),
        )  # fmt: skip
        setup.step()
        assert counts == [0] * (3 * draws)
        setup.trainer._loss("sst", np.arange(2), engine.DropoutMasks(0))
        loss = setup.trainer._loss("sst", np.arange(2), engine.DropoutMasks(0))
        assert len(live) > 10 and bool(loss.isfinite())  # the count does see a graph where there is one


# ------------------------------------------------------------------------------------------------------ the plan


class Watched:
    """A scheduler that keeps its plans."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.plans: list[list[str]] = []

    def plan(self, epoch: int, step: int, generator: random.Random) -> list[str]:
        self.plans.append(self.scheduler.plan(epoch, step, generator))
        return self.plans[-1]

    def draw_weight(self, epoch: int, num_draws: int) -> float:
        return self.scheduler.draw_weight(epoch, num_draws)

    def shares(self, epoch: int) -> list[float]:
        return self.scheduler.shares(epoch)


def plans_of(**options: Any) -> list[list[str]]:
    setup = make(scheduler="random", draws=2, epochs=2, steps_per_epoch=4, **options)
    watched = setup.trainer.scheduler = Watched(setup.trainer.scheduler)
    setup.trainer.run()
    return watched.plans


def test_the_plan_depends_on_its_own_generator_only() -> None:
    plain = plans_of()
    assert len({tuple(plan) for plan in plain}) > 1
    for options in (
        {"eval_every": 1},
        {"smart": True, "bregman": True},
        {"batch_size": 3},
        {"dropout": 0.5},
        {"adapters": True},
    ):
        random.seed(len(options))
        np.random.seed(3)
        torch.manual_seed(7)
        assert plans_of(**options) == plain, options
    assert plans_of(seed=1) != plain


def test_a_step_touches_no_global_generator() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()
    for treatment in TREATMENTS:
        make(treatment=treatment, draws=1 if treatment == "sum" else 3, smart=True, dropout=0.3).step()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.random.get_rng_state(), before[2])


# ---------------------------------------------------------------------------------------------- precision, order


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward_runs_inside_autocast_and_backward_outside(dtype: torch.dtype) -> None:
    forward: list[bool] = []
    backward: list[bool] = []
    setup = make(
        treatment="pcgrad", draws=3, dtype=dtype,
        wrap=wrapped(lambda number, task, batch: forward.append(torch.is_autocast_enabled("cpu"))),
    )  # fmt: skip
    for parameter in setup.model.parameters():
        parameter.register_hook(lambda grad: backward.append(torch.is_autocast_enabled("cpu")))
    setup.step()
    assert forward == [True] * 3 and backward and not any(backward)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("treatment", TREATMENTS)
def test_mixed_precision_takes_nearly_the_step_of_full_precision(dtype: torch.dtype, treatment: str) -> None:
    draws = 3
    full = make(treatment=treatment, draws=draws).gradients_of_step()
    mixed, again = (make(treatment=treatment, draws=draws, dtype=dtype) for _ in range(2))
    mixed.trainer.progress.loss_scale = again.trainer.progress.loss_scale = 2.0**8
    before = mixed.parameters()
    record = mixed.step()
    assert math.isfinite(record["loss"]) and "skipped" not in record
    assert moved(before, mixed.parameters()) == set(before)
    found = again.gradients_of_step()
    for name, expected in full.items():
        assert float((found[name] - expected).norm()) < 0.15 * float(expected.norm()) + 1e-3, name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_unscale_then_treatment_then_clip_once_then_step(
    dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    setup = make(treatment="pcgrad", draws=5, accumulation_steps=2, dtype=dtype, scheduler="pal", max_grad_norm=1.0)
    trainer = setup.trainer
    trainer.progress.loss_scale = 2.0**6

    def spy(name: str, target: Any, attribute: str) -> None:
        original = getattr(target, attribute)

        def call(*args: Any, **kwargs: Any) -> Any:
            events.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(target, attribute, call)

    spy("unscale", trainer.scaler, "unscale")
    spy("treatment", trainer.treatment, "coefficients")
    spy("clip", engine, "clip_factor")
    spy("step", trainer.optimizer, "step")
    spy("backward", torch.Tensor, "backward")
    setup.step()
    assert events == ["backward"] * 10 + ["unscale", "treatment", "clip", "step"]


@pytest.mark.parametrize("treatment", ["sum", "pcgrad", "gradvac"])
def test_the_loss_scale_cancels_before_anything_looks_at_the_gradients(treatment: str) -> None:
    """A power of two changes no digit of a float16 gradient: the step must not depend on it."""
    gramians: list[Tensor] = []
    gradients, norms = [], []
    for scale in (2.0**6, 2.0**9):
        setup = make(treatment=treatment, draws=3, dtype=torch.float16, max_grad_norm=0.5)
        setup.trainer.progress.loss_scale = scale
        original = setup.trainer.treatment.coefficients

        def record(gram: Tensor, *rest: Any, original: Any = original) -> Tensor:
            gramians.append(gram)
            return original(gram, *rest)

        setup.trainer.treatment.coefficients = record  # type: ignore[method-assign]
        gradients.append(setup.gradients_of_step())
        norms.append(float(torch.cat([g.flatten() for g in gradients[-1].values()]).norm()))
    assert norms == pytest.approx([0.5, 0.5], rel=1e-3)
    assert_close(gradients[0], gradients[1], rtol=0.05)
    if treatment != "sum":
        torch.testing.assert_close(gramians[0], gramians[1], rtol=0.02, atol=1e-6)


def test_clipping_scales_the_whole_gradient_to_the_norm() -> None:
    free, clipped = make(draws=3), make(draws=3, max_grad_norm=0.25)
    raw = free.gradients_of_step()
    norm = float(torch.cat([g.flatten() for g in raw.values()]).norm())
    assert norm > 0.25
    assert_close(clipped.gradients_of_step(), {name: g * (0.25 / norm) for name, g in raw.items()})
    assert make(draws=3, max_grad_norm=0.25).step()["gradient_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("treatment", ["sum", "gradvac"])
def test_an_overflow_skips_the_step_and_moves_no_running_average(treatment: str) -> None:
    setup = make(treatment=treatment, draws=3, dtype=torch.float16, bregman=True, steps_per_epoch=9)
    trainer = setup.trainer
    trainer.progress.loss_scale = 2.0**8
    setup.step(0)
    state = {name: value.clone() for name, value in trainer.state_tensors().items()}
    parameters = setup.parameters()
    assert {name.split(".")[0] for name in state} >= {"regularizer", "optimizer"}
    trainer.progress.loss_scale = 2.0**60
    record = setup.step(1)
    assert record["skipped"] == "overflow"
    assert_same(setup.parameters(), parameters)
    assert_same(trainer.state_tensors(), state)
    assert trainer.progress.loss_scale == 2.0**59
    trainer.progress.loss_scale = 2.0**8
    assert "skipped" not in setup.step(2)
    assert moved(parameters, setup.parameters()) == set(parameters)
    assert {n.split(".")[0] for n in moved(state, trainer.state_tensors())} == {n.split(".")[0] for n in state}


def test_the_scale_comes_down_until_a_step_is_taken() -> None:
    setup = make(draws=3, dtype=torch.float16, steps_per_epoch=60)
    setup.trainer.progress.loss_scale = 2.0**40
    setup.trainer.run()
    skipped = [("skipped" in record) for record in setup.heard.steps]
    assert skipped[0] and not skipped[-1] and skipped == sorted(skipped, reverse=True)
    assert len(setup.heard.steps) == 60


def test_the_scale_doubles_after_long_without_an_overflow() -> None:
    progress = Progress(loss_scale=8.0)
    scaler = LossScaler(True, progress)
    for _ in range(LossScaler.GROWTH_INTERVAL):
        assert progress.loss_scale == 8.0
        scaler.update(True)
    assert progress.loss_scale == 16.0
    scaler.update(False)
    assert (progress.loss_scale, progress.steps_since_overflow) == (8.0, 0)


def test_without_float16_the_scale_stays_out_of_it() -> None:
    progress = Progress()
    scaler = LossScaler(False, progress)
    for _ in range(LossScaler.GROWTH_INTERVAL + 1):
        scaler.update(True)
    assert scaler.scale == 1.0 and progress == Progress()


# ----------------------------------------------------------------------------------------------- the whole loop


def test_evaluation_every_epoch_or_never_gives_the_same_weights() -> None:
    weights = []
    for eval_every in (0, 1, 2):
        setup = make(
            epochs=3, eval_every=eval_every, dropout=0.2, treatment="gradvac", draws=4, scheduler="pal", smart=True
        )
        setup.trainer.run()
        weights.append(setup.parameters())
        assert len(setup.heard.evaluations) == {0: 1, 1: 3, 2: 2}[eval_every]
    assert_same(weights[1], weights[0])
    assert_same(weights[2], weights[0])


def test_the_log_has_every_step_once_with_its_numbers() -> None:
    setup = make(epochs=2, steps_per_epoch=3, treatment="pcgrad", draws=4, accumulation_steps=2, scheduler="pal")
    setup.trainer.run()
    assert [record["step"] for record in setup.heard.steps] == [1, 2, 3, 4, 5, 6]
    assert [record["epoch"] for record in setup.heard.steps] == [1, 1, 1, 2, 2, 2]
    for record in setup.heard.steps:
        assert set(record["task"].split("+")) == set(record["losses"]) == set(record["draws"]) == set(ALL)
        assert sum(record["draws"].values()) == 4 and record["examples_per_second"] > 0
        assert math.isfinite(record["loss"]) and record["gradient_norm"] > 0 and record["stage"] == "finetune"
        assert set(record["cosines"]) == {"sst-para", "sst-sts", "para-sts"} and set(record["removed"]) == set(ALL)


def test_a_checkpoint_is_written_at_every_epochs_end_and_every_save_step() -> None:
    setup = make(epochs=2, steps_per_epoch=5, save_every=2)
    at: list[int] = []
    setup.heard.on_save = lambda: at.append(setup.trainer.progress.step)
    setup.trainer.run()
    assert at == [2, 4, 5, 6, 8, 10, 10]


@pytest.mark.parametrize("head_layers", [0, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_frozen_stage_moves_heads_only(head_layers: int, dropout: float) -> None:
    setup = make(
        frozen=True, head_layers=head_layers, epochs=2, steps_per_epoch=6, draws=1, adapters=True, dropout=dropout
    )
    before = setup.parameters()
    setup.trainer.run()
    assert moved(before, setup.parameters()) == {name for name in before if name.startswith("heads.")}


def score_epochs(setup: Setup, scores: Sequence[float]) -> list[dict[str, Tensor]]:
    """Makes the dev score of epoch e scores[e - 1]; returns where the parameters at each evaluation will be kept."""
    kept: list[dict[str, Tensor]] = []
    names = setup.trainer.settings.tasks

    def evaluate(*args: Any) -> dict[str, dict[str, float]]:
        kept.append(setup.parameters())
        return {task: {TASKS[task].output.selection_metric: scores[len(kept) - 1]} for task in names}

    setup.trainer.evaluate = evaluate  # type: ignore[method-assign]
    return kept


def test_the_best_head_comes_back_with_all_that_was_trained_with_it() -> None:
    setup = make(tasks=["sst"], frozen=True, head_layers=2, epochs=4, eval_every=1)
    kept = score_epochs(setup, [0.1, 0.7, 0.5, 0.6])
    setup.trainer.run()
    assert [is_best for _, is_best in setup.heard.evaluations] == [True, True, False, False]
    assert len(moved(kept[1], kept[3])) == 6  # two hidden layers and the output layer, weight and bias each
    assert_same(setup.parameters(), kept[1])
    assert setup.trainer.progress.best_epoch == 2 and setup.trainer.progress.best_score == 0.7


def test_fine_tuning_ends_with_its_last_parameters() -> None:
    setup = make(epochs=3, eval_every=1)
    kept = score_epochs(setup, [0.7, 0.1, 0.1])
    setup.trainer.run()
    assert_same(setup.parameters(), kept[2])


def test_a_stage_ends_after_patience_epochs_without_a_gain() -> None:
    setup = make(epochs=9, eval_every=1, patience=2)
    kept = score_epochs(setup, [0.1, 0.3, 0.2, 0.3, 0.9, 0.9, 0.9, 0.9, 0.9])
    setup.trainer.run()
    assert len(kept) == 4 and len(setup.heard.steps) == 8 and setup.trainer.progress.ended
    assert any("--patience" in line and "epoch 2" in line for line in setup.heard.lines)
    patient = make(epochs=6, eval_every=1, patience=2)
    kept = score_epochs(patient, [0.1, 0.05, 0.2, 0.15, 0.3, 0.25])
    patient.trainer.run()
    assert len(kept) == 6 and not patient.trainer.progress.ended


def test_constant_predictions_count_as_no_correlation_and_warn() -> None:
    setup = make(tasks=["sts"], eval_every=1)
    torch.nn.init.zeros_(setup.model.heads["sts"].output.weight)
    metrics = setup.trainer.evaluate()
    assert metrics["sts"]["pearson"] == 0.0
    assert any(line.startswith("warning: sts") for line in setup.heard.lines)


def test_a_stage_taken_up_from_its_state_ends_with_the_same_parameters() -> None:
    options: dict[str, Any] = {
        "epochs": 2, "steps_per_epoch": 4, "treatment": "gradvac", "draws": 5, "scheduler": "pal", "bregman": True,
        "smart": True, "dropout": 0.2, "eval_every": 1, "adapters": True,
    }  # fmt: skip
    whole = make(**options)
    whole.trainer.run()
    for stop in (3, 4, 7):
        first = make(**options)
        for number in range(stop):
            first.trainer.take_step(1 + number // 4, number)
            first.trainer.progress.step += 1
            first.trainer.progress.closed_epochs = first.trainer.progress.step // 4
        second = make(**options)
        second.model.load_state_dict(first.model.state_dict())
        tensors = {name: value.clone() for name, value in first.trainer.state_tensors().items()}
        second.trainer.load_state(tensors, vars(first.trainer.progress))
        second.trainer.run()
        assert_same(second.parameters(), whole.parameters())
        assert_same(second.trainer.state_tensors(), whole.trainer.state_tensors())


# ------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("treatment", ["sum", "gradvac"])
def test_a_loss_that_is_not_finite_stops_with_step_task_and_rows(treatment: str) -> None:
    setup = make(treatment=treatment, draws=3, num_rows=12, steps_per_epoch=5, accumulation_steps=2)
    labels = setup.trainer.train_rows["sts"].labels
    bad = int(RowStream(12, 8, derive_seed(0, "rows", "finetune", "sts")).rows(1)[0])
    labels[bad] = np.nan
    with pytest.raises(TrainingError) as caught:
        setup.trainer.run()
    message = str(caught.value)
    assert "finetune step 2" in message and "sts is nan" in message and "\n" not in message
    assert str(bad) in message.split("training rows ")[1].split(" (")[0].split(", ")
    assert setup.trainer.progress.step == len(setup.heard.steps) == 1


@pytest.mark.parametrize("part", ["encoder.pooler.weight", "heads.para.output.weight"])
@pytest.mark.parametrize("treatment", ["sum", "pcgrad", "gradvac"])
def test_a_gradient_that_is_not_finite_stops_before_anything_moves(part: str, treatment: str) -> None:
    setup = make(treatment=treatment, draws=3, bregman=True)
    setup.step(0)
    parameters, state = setup.parameters(), {n: v.clone() for n, v in setup.trainer.state_tensors().items()}
    dict(setup.model.named_parameters())[part].register_hook(lambda grad: grad * math.nan)
    with pytest.raises(TrainingError, match=r"finetune step 2: the gradient of .*para.* is nan"):
        setup.step(1)
    assert_same(setup.parameters(), parameters)
    assert_same(setup.trainer.state_tensors(), state)


def test_a_training_error_leaves_the_checkpoint_of_the_last_good_step() -> None:
    setup = make(num_rows=12, draws=3, steps_per_epoch=5)
    bad = int(RowStream(12, 4, derive_seed(0, "rows", "finetune", "sst")).rows(2)[0])
    setup.trainer.train_rows["sst"].labels[bad] = 3
    dict(setup.model.named_parameters())["heads.sst.output.bias"].register_hook(
        lambda grad: grad * math.nan if setup.trainer.progress.step == 2 else grad
    )
    kept: list[tuple[int, dict[str, Tensor]]] = []
    setup.heard.on_save = lambda: kept.append((setup.trainer.progress.step, setup.parameters()))
    with pytest.raises(TrainingError):
        setup.trainer.run()
    good = make(num_rows=12, draws=3, steps_per_epoch=5)
    good.trainer.train_rows["sst"].labels[bad] = 3
    good.step(0)
    good.step(1)
    assert [step for step, _ in kept] == [2]
    assert_same(kept[0][1], good.parameters())


class Memory:
    """Raises out of memory for forward passes of more than `limit` rows, from the second pass on."""

    def __init__(self, limit: int) -> None:
        self.limit, self.sizes = limit, []

    def __call__(self, number: int, task: str, batch: Batch) -> None:
        if number >= 1 and len(batch) > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        self.sizes.append(len(batch))


@pytest.mark.parametrize(("treatment", "draws"), [("sum", 3), ("pcgrad", 3)])
def test_out_of_memory_halves_the_batch_and_keeps_the_gradient(treatment: str, draws: int) -> None:
    memory = Memory(3)
    setup = make(treatment=treatment, draws=draws, batch_size=10, accumulation_steps=2, wrap=wrapped(memory))
    expected = make(treatment=treatment, draws=draws, batch_size=10, accumulation_steps=2).gradients_of_step()
    assert_close(setup.gradients_of_step(), expected)
    assert memory.sizes == [10] + [3] * 0 + ([3, 3, 3, 3, 3, 3, 2]) * draws
    assert setup.heard.lines == [
        "finetune step 1: out of memory; going on with --batch_size 5 --accumulation_steps 4, the same rows a draw",
        "finetune step 1: out of memory; going on with --batch_size 3 --accumulation_steps 7, the same rows a draw",
    ]
    before = setup.parameters()
    setup.step(1)
    assert len(setup.heard.lines) == 2 and moved(before, setup.parameters())


def test_out_of_memory_with_one_row_is_an_error() -> None:
    with pytest.raises(TrainingError, match=r"finetune step 1: .*out of memory"):
        make(draws=2, wrap=wrapped(Memory(0))).step()


# ---------------------------------------------------------------------------------------------------- optimizer


@pytest.mark.parametrize(("num_steps", "warmup"), [(10, 0.0), (10, 0.25), (7, 0.5), (1, 0.1), (100, 0.99), (3, 0.4)])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero(num_steps: int, warmup: float) -> None:
    factors = [learning_rate_factor(step, num_steps, warmup) for step in range(num_steps)]
    rising = int(warmup * num_steps)
    assert factors[rising] == 1.0 == max(factors)
    assert all(0 < factor <= 1 for factor in factors)
    gaps = np.diff([0.0, *factors[: rising + 1]])
    assert np.allclose(gaps, 1 / (rising + 1))
    assert np.allclose(np.diff([*factors[rising:], 0.0]), -1 / (num_steps - rising))


@pytest.mark.parametrize("plan", [["para", "sts", "sts"], ["sts"], ["sts", "sst"]])
@pytest.mark.parametrize("treatment", ["pcgrad", "sum"])
def test_a_step_without_some_tasks_is_clipped_and_followed_in_all_its_lines(treatment: str, plan: list[str]) -> None:
    """As the step that looks at every line of the embedding, in weights and moments."""
    by_lines, whole = (make(treatment=treatment, draws=3, max_grad_norm=0.1, weight_decay=0.1) for _ in range(2))
    whole.trainer.embedding, whole.trainer.gradients = (
        None,
        TaskGradients(
            whole.trainer.gradients.parameters,
            len(whole.trainer.gradients.rows),
            [len(whole.trainer.gradients.parameters)],
        ),
    )
    for setup in (by_lines, whole):
        setup.step(0)
        setup.trainer.scheduler = Planned(setup.trainer.scheduler, plan)
        record = setup.step(1)
        assert record["gradient_norm"] > 0.1
        assert set(record["draws"]) == set(plan)
        setup.step(2)
    assert_close(by_lines.parameters(), whole.parameters())
    assert_close(by_lines.trainer.optimizer.state(), whole.trainer.optimizer.state())


class Planned:
    """A scheduler of one plan."""

    def __init__(self, scheduler: Any, names: list[str]) -> None:
        self.scheduler, self.names = scheduler, names

    def plan(self, *_: Any) -> list[str]:
        return self.names

    def draw_weight(self, *given: Any) -> float:
        return float(self.scheduler.draw_weight(*given))


@pytest.mark.parametrize("option", [{}, {"treatment": "pcgrad", "smart": True, "bregman": True}, {"adapters": True}])
def test_steps_with_and_without_compiled_kernels_are_the_same(
    option: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    setups = []
    for usable in (kernels.usable, lambda *tensors: False):
        monkeypatch.setattr(kernels, "usable", usable)
        setups.append(make(draws=3, dropout=0.2, max_grad_norm=1.0, weight_decay=0.1, lr=1e-4, **option))
        records = [setups[-1].step(number) for number in range(3)]
        setups[-1].heard.steps = records
    ours, theirs = setups
    for one, other in zip(ours.heard.steps, theirs.heard.steps, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)
    names = [name for name in ours.parameters() if not name.endswith("qkv.bias")]  # keys' biases have no true gradient
    found, expected = ({name: setup.parameters()[name] for name in names} for setup in setups)
    assert_close(found, expected, rtol=1e-3)


def test_every_step_is_taken_at_the_scheduled_rate() -> None:
    setup = make(steps_per_epoch=5, epochs=2, warmup=0.3, lr=2e-3)
    rates: list[float] = []
    step = setup.trainer.optimizer.step
    setup.trainer.optimizer.step = lambda lr, *rest: (rates.append(lr), step(lr, *rest))  # type: ignore
    setup.trainer.run()
    expected = [2e-3 * f for f in (0.25, 0.5, 0.75, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7)]
    assert rates == pytest.approx(expected) and [r["lr"] for r in setup.heard.steps] == pytest.approx(expected)


def test_the_first_step_is_adamws() -> None:
    """After one step Adam has moved by lr * g / (|g| + eps), on top of the decay."""
    setup = make(draws=3, lr=1e-3, weight_decay=0.1)
    gradients, before = make(draws=3).gradients_of_step(), setup.parameters()
    setup.step()
    after = setup.parameters()
    for name in ("encoder.layers.0.qkv.weight", "heads.sst.output.weight", "encoder.layers.1.output.bias"):
        decay = 0.1 if name.endswith("weight") else 0.0
        expected = before[name] * (1 - 1e-3 * decay) - 1e-3 * gradients[name] / (gradients[name].abs() + 1e-8)
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------- the matrix


@pytest.mark.parametrize("accumulation_steps", [1, 3])
@pytest.mark.parametrize("adapters", [False, True], ids=["plain", "adapters"])
@pytest.mark.parametrize("smart", [False, True], ids=["nosmart", "smart"])
@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("scheduler", sorted(SCHEDULERS))
def test_every_scheduler_and_treatment_takes_a_step(
    scheduler: str, treatment: str, smart: bool, adapters: bool, accumulation_steps: int
) -> None:
    draws = 1 if treatment == "sum" else 5 if scheduler == "pal" else 3
    setup = make(
        scheduler=scheduler, treatment=treatment, draws=draws, smart=smart, adapters=adapters,
        accumulation_steps=accumulation_steps, batch_size=2, weight_decay=0.01, max_grad_norm=1.0, dropout=0.1,
    )  # fmt: skip
    before = setup.parameters()
    record = setup.step()
    present = set(record["losses"])
    assert len(present) == (1 if treatment == "sum" else 3)
    should = {name for name in before if name.startswith("encoder.")}
    should |= {name for task in present for name in setup.model.task_parameters(task)}
    assert moved(before, setup.parameters()) == should
    assert record["examples"] == draws * 2 * accumulation_steps


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_heads_and_adapters_keep_their_own_tasks_gradient(treatment: str) -> None:
    """The treatment changes the shared gradient, and of a task's own parameters nothing."""
    plain = make(draws=3, adapters=True).gradients_of_step()
    treated = make(treatment=treatment, draws=3, adapters=True).gradients_of_step()
    own = {name for name in plain if not name.startswith("encoder.")}
    assert own and own < set(plain)
    assert_close({n: treated[n] for n in own}, {n: plain[n] for n in own}, rtol=1e-5)


def test_the_draws_of_a_task_are_weighted_by_the_scheduler() -> None:
    """Under pal a task's gradient is the sum over its k draws divided by k ** b, b = 0.2 in the first epoch."""
    setup = make(scheduler="pal", treatment=Sum(), draws=8, epochs=3, num_rows=64)
    watched = setup.trainer.scheduler = Watched(setup.trainer.scheduler)
    found = setup.gradients_of_step()
    counts, position = Counter(watched.plans[0]), Counter[str]()
    assert len(counts) == 3 and max(counts.values()) > 1
    setup.model.zero_grad(set_to_none=True)
    setup.model.sparse_embedding_gradient(False)
    for task in watched.plans[0]:
        rows = RowStream(64, 4, derive_seed(0, "rows", "finetune", task)).rows(position[task])
        position[task] += 1
        batch = setup.trainer.train_rows[task].batch(rows)
        (task_loss(TASKS[task], setup.model(task, batch), batch.labels) / counts[task] ** 0.2).backward()
    assert_close(found, {n: p.grad for n, p in setup.model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize(
    "option", [{"smart": True}, {"dropout": 0.1}, {"treatment": "pcgrad"}, {"treatment": "gradvac"}]
)
def test_a_method_changes_the_first_step(option: dict[str, Any]) -> None:
    plain, other = make(draws=3), make(draws=3, **option)
    plain.step()
    other.step()
    names = set(plain.model.shared_parameters())
    assert moved(plain.parameters(), other.parameters()) & names


def test_the_proximal_term_changes_the_second_step_and_the_average_follows() -> None:
    plain, other = make(draws=3, steps_per_epoch=100), make(draws=3, steps_per_epoch=100, bregman=True)
    first = other.parameters()
    for number in range(2):
        plain.step(number)
        other.step(number)
    assert moved(plain.parameters(), other.parameters())
    average = other.trainer.regularizers[0].state()
    weights = other.parameters()
    name = "encoder.layers.0.qkv.weight"
    assert 0 < float((average[name] - first[name]).norm()) < 0.1 * float((weights[name] - first[name]).norm())
