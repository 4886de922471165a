"""The training step and the loop around it, on tiny random models and rows. (What a step computes: test_wiring.py.)"""

import json
import math
import random
import signal
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import engine
import multitask_classifier
from datasets import Batch, RowStream, TokenizedRows, TokenRows
from engine import Methods, Stage, StageData, Trainer, TrainingError
from evaluation import Precision, compute_features
from heads import HEADS
from helpers import LINEAR, Patch, generator, random_batch, tiny_model
from model import FrozenEncoder, MultitaskBert, TaskModel, Trained
from ops import DropoutMasks
from pal import ADAPTERS
from parameters import Choice, parameters_type
from pcgrad import TREATMENTS, find_treatment
from run import Run
from schedulers import SCHEDULERS, Setting
from seeding import derive_seed
from smart import REGULARIZERS, RDrop
from tasks import TASKS

ALL = ("sst", "para", "sts")
CPU = torch.device("cpu")
TREATED = ("pcgrad", "gradvac", *(["UPGrad"] if find_spec("torchjd") else []))


@dataclass
class Forward:
    """A model with something done before each forward pass."""

    model: TaskModel
    before: Callable[[str, Batch], None]

    def __call__(self, task: str, batch: Batch, masks: Any = None, perturbation: Tensor | None = None) -> Tensor:
        self.before(task, batch)
        return self.model(task, batch, masks, perturbation)

    def logits_of(self, tasks: Sequence[str], batch: Batch, masks: Any = None) -> list[Tensor]:
        self.before("+".join(tasks), batch)
        return self.model.logits_of(tasks, batch, masks)

    @property
    def shares_passes(self) -> bool:
        return self.model.shares_passes


@dataclass
class Setup:
    trainer: Trainer
    model: MultitaskBert

    def parameters(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.trainer.state_tensors().items()}

    def step(self, number: int = 0) -> dict[str, Any]:
        return self.trainer.take_step(1, number)

    def gradient_of_first_step(self) -> Tensor:
        """What the optimizer was given: a tenth of it is its average gradient after one step."""
        self.step()
        return torch.cat([10 * value for name, value in self.state().items() if name.endswith("exp_avg")])

    def run(self) -> list[engine.Event]:
        return list(self.trainer.run())


def random_rows(task: str, num_rows: int, seed: int, is_split: bool = False) -> TokenizedRows:
    """Rows of 4 to 12 tokens with the labels of a random batch."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(4, 13, num_rows).astype(np.int32)
    ids = draw.integers(0, 100, int(lengths.sum())).astype(np.int32)
    firsts = draw.integers(1, lengths).astype(np.int32)
    labels = random_batch(task, num_rows, seed).labels.numpy()
    tokens = TokenRows(ids, lengths, firsts, is_split)
    return TokenizedRows(TASKS[task], [str(i) for i in range(num_rows)], labels, tokens, CPU)


def make(
    *,
    tasks: Sequence[str] = ALL,
    num_rows: int = 24,
    scheduler: str = "round_robin",
    treatment: str = "",
    draws: int = 3,
    regularizers: Sequence[str] = (),
    adapters: bool = False,
    copied: int = 0,
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
    head: Choice = LINEAR,
    before: Callable[[str, Batch], None] = lambda task, batch: None,
    ema_decay: float = 0.0,
    **of_stage: Any,
) -> Setup:
    """A trainer of a tiny model, put together as the command does it."""
    defaults: dict[str, Any] = {
        "name": "finetune", "epochs": 1, "steps_per_epoch": 2, "batch_size": 12, "accumulation_steps": 1, "lr": 1e-3,
        "warmup": 0.0, "weight_decay": 0.0, "max_grad_norm": 0.0, "patience": 0, "eval_every": 0, "eval_batch_size": 8,
        "seed": 0,
    }  # fmt: skip
    stage = Stage(tasks=tuple(tasks), **{**defaults, **of_stage})
    rates: Any = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = tiny_model(
        ALL, Choice("pal", parameters_of("pal", size=8, heads=2)) if adapters else None, head, copied=copied, **rates
    )
    fill_adapters(model)
    precision, used = Precision(CPU, dtype), Forward(model, before)
    rows: list[dict[str, Any]] = [
        {task: random_rows(task, size, first + ALL.index(task)) for task in tasks}
        for size, first in ((num_rows, 10), (10, 20))
    ]
    trained = Trained(model.shared_parameters(), {task: model.trained().own[task] for task in tasks})
    if stage.is_frozen:
        rows = [{t: compute_features(model, t, of, 8, precision) for t, of in part.items()} for part in rows]
        used = Forward(FrozenEncoder(model), before)
        trained = Trained({}, {task: model.head_parameters(task) for task in tasks})
    trained.freeze_others(model)
    setting = Setting(stage.tasks, (num_rows,) * len(tasks), stage.epochs, draws, every_task=bool(treatment))
    methods = Methods(
        SCHEDULERS[scheduler](parameters_type(SCHEDULERS[scheduler])(), setting),
        find_treatment(treatment)(parameters_type(TREATMENTS.get(treatment))(), len(tasks), 1) if treatment else None,
        [REGULARIZERS[name](parameters_of(name), model, stage.num_steps) for name in regularizers],
        ema_decay=ema_decay,
    )
    return Setup(Trainer(stage, used, trained, StageData(*rows), methods, precision), model)


def fill_adapters(model: MultitaskBert) -> None:
    """Fresh up-projections are zero, and leave the other matrices of an adapter without a gradient."""
    for name, parameter in model.adapters.named_parameters():
        if ".up." in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator(len(name)))


def parameters_of(name: str, **values: Any) -> Any:
    return parameters_type({**REGULARIZERS, **ADAPTERS, **HEADS}[name])(**values)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).norm()) < 1e-5 * float(expected.norm())


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(after[name], value)}


@pytest.mark.parametrize("treatment", ["", "pcgrad"])
def test_a_forward_pass_takes_at_most_batch_size_rows_of_a_task_or_without_a_treatment_of_all(treatment: str) -> None:
    passes: list[tuple[str, int]] = []
    options: dict[str, Any] = {"treatment": treatment, "before": lambda t, batch: passes.append((t, len(batch)))}
    make(draws=5, batch_size=10, **options).step()
    assert passes == ([("sst", 4), ("para", 4), ("sts", 2)] if treatment else [("sst+para+sts", 10)])
    passes.clear()
    make(draws=5, batch_size=5, accumulation_steps=3, **options).step()
    alone = [("sst", 5), ("sst", 1), ("para", 5), ("para", 1), ("sts", 3)]
    assert passes == (alone if treatment else [("sst+para+sts", 5)] * 3)


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


@pytest.mark.parametrize("treatment", ["", "pcgrad", "gradvac"])
def test_the_graph_of_a_micro_batch_is_freed_before_the_next(treatment: str) -> None:
    counts: list[int] = []
    with live_saved_tensors() as live:
        setup = make(
            treatment=treatment, batch_size=2, accumulation_steps=6, dropout=0.1,
            before=lambda task, batch: counts.append(len(live)),
        )  # fmt: skip
        setup.step()
        assert counts == [0] * 6
        logits = setup.model("sst", setup.trainer.data.train["sts"].batch(np.arange(2)), DropoutMasks(0))
        assert len(live) > 10 and bool(logits.isfinite().all())  # the count does see a graph where there is one


def draws_of(**options: Any) -> list[Any]:
    setup = make(scheduler="random", draws=4, epochs=2, steps_per_epoch=2, **{"batch_size": 4, **options})
    return [event.record["draws"] for event in setup.run() if event.record and not event.is_epoch]


def test_the_plan_depends_on_its_own_generator_only() -> None:
    plain = draws_of()
    assert len({str(draws) for draws in plain}) > 1
    others: list[dict[str, Any]] = [{"eval_every": 1}, {"regularizers": ["smart", "bregman"]}, {"batch_size": 5}]
    for options in (*others, {"dropout": 0.5}, {"adapters": True}):
        random.seed(len(options))
        np.random.seed(3)
        torch.manual_seed(7)
        assert draws_of(**options) == plain, options
    assert draws_of(seed=1) != plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward_runs_inside_autocast_and_backward_and_regularizers_outside(dtype: torch.dtype) -> None:
    forward, backward, given = list[bool](), list[bool](), list[torch.dtype]()
    setup = make(
        treatment="pcgrad", dtype=dtype, regularizers=["bregman"],
        before=lambda task, batch: forward.append(torch.is_autocast_enabled("cpu")),
    )  # fmt: skip
    regularizer: Any = setup.trainer.methods.regularizers[0]

    def term(task: str, batch: Batch, masks: DropoutMasks, logits: Tensor) -> Tensor:
        given.append(logits.dtype)
        return logits.sum()

    regularizer.term = term
    for parameter in setup.model.parameters():
        parameter.register_hook(lambda grad: backward.append(torch.is_autocast_enabled("cpu")))
    setup.step()
    assert forward == [True, False] * 3 and backward and not any(backward)
    assert given == [torch.float32] * 3


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_r_drop_draws_on_behind_the_pass_of_its_logits(dtype: torch.dtype | None, monkeypatch: Patch) -> None:
    tasks, original = list[str](), RDrop.term

    def term(regularizer: RDrop, task: str, batch: Batch, masks: DropoutMasks, logits: Tensor) -> Tensor:
        again = masks.again()
        assert torch.equal(regularizer.model(task, batch, again), logits)
        assert torch.equal(again.mask((99,), 0.5), masks.mask((99,), 0.5))
        tasks.append(task)
        return original(regularizer, task, batch, masks, logits)

    monkeypatch.setattr(RDrop, "term", term)
    make(regularizers=list(REGULARIZERS), dtype=dtype, dropout=0.3).step()
    assert tasks == list(ALL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("treatment", ["", *TREATED])
def test_mixed_precision_takes_nearly_the_step_of_full_precision(dtype: torch.dtype, treatment: str) -> None:
    full, mixed = make(treatment=treatment), make(treatment=treatment, dtype=dtype)
    mixed.trainer.scaler.scale.fill_(2.0**8)
    expected, found = full.gradient_of_first_step(), mixed.gradient_of_first_step()
    assert 0 < float((found - expected).norm()) < 0.1 * float(expected.norm())


@pytest.mark.parametrize("treatment", ["", "pcgrad", "gradvac"])
def test_the_loss_scale_cancels_before_anything_looks_at_the_gradients(treatment: str) -> None:
    """A power of two changes no digit of a float16 gradient: the step must not depend on it."""
    gradients, records = [], []
    for scale in (2.0**6, 2.0**9):
        setup = make(treatment=treatment, dtype=torch.float16, max_grad_norm=0.5)
        setup.trainer.scaler.scale.fill_(scale)
        gradients.append(setup.gradient_of_first_step())
        records.append(setup.step(1))
    assert [float(gradient.norm()) for gradient in gradients] == pytest.approx([0.5, 0.5], rel=1e-3)
    assert float((gradients[0] - gradients[1]).norm()) < 0.02
    assert records[0]["gradient_norm"] == pytest.approx(records[1]["gradient_norm"], rel=0.02)
    assert records[0]["losses"] == pytest.approx(records[1]["losses"], rel=0.02)


@pytest.mark.parametrize("treatment", ["", "gradvac"])
def test_an_overflow_skips_the_step_and_moves_no_running_average(treatment: str) -> None:
    setup = make(
        treatment=treatment, dtype=torch.float16, regularizers=["bregman"], steps_per_epoch=9, ema_decay=0.9
    )  # fmt: skip
    scale = setup.trainer.scaler.scale.fill_(2.0**8)
    setup.step(0)
    state, parameters = setup.state(), setup.parameters()
    assert {name.split(".")[0] for name in state} >= {"regularizer", "optimizer", "average"}
    scale.fill_(2.0**60)
    record = setup.step(1)
    assert (record["skipped"], record["loss_scale"]) == ("overflow", 2.0**60)
    assert not moved(parameters, setup.parameters())
    assert moved(state, setup.state()) == {"scaler.scale", "scaler.steps"}
    assert scale == 2.0**59
    scale.fill_(2.0**8)
    assert "skipped" not in setup.step(2)
    assert moved(parameters, setup.parameters()) == set(parameters)
    assert {n.split(".")[0] for n in moved(state, setup.state())} == {n.split(".")[0] for n in state} - {"scaler"}


def test_the_scale_doubles_after_long_without_an_overflow() -> None:
    scaler, fine, overflow = engine.LossScaler(True, CPU), torch.zeros(()), torch.ones(())
    scaler.scale.fill_(8)
    for _ in range(engine.LossScaler.GROWTH_INTERVAL):
        assert scaler.scale == 8
        scaler.update(fine)
    assert (scaler.scale, scaler.steps) == (16, 0)
    scaler.update(fine)
    scaler.update(overflow)
    assert (scaler.scale, scaler.steps) == (8, 0)
    without = engine.LossScaler(False, CPU)
    without.update(overflow)
    assert without.scale == 1


def test_evaluation_every_epoch_or_never_gives_the_same_weights() -> None:
    weights = []
    for eval_every, evaluated in ((0, [3]), (1, [1, 2, 3]), (2, [2, 3])):
        setup = make(
            epochs=3, eval_every=eval_every, dropout=0.2, treatment="gradvac", draws=4, scheduler="pal",
            regularizers=["smart"],
        )  # fmt: skip
        epochs = [event for event in setup.run() if event.is_epoch]
        weights.append(setup.parameters())
        assert len(epochs) == 3
        assert [event.record["epoch"] for event in epochs if event.record is not None] == evaluated
    assert not moved(weights[0], weights[1]) and not moved(weights[0], weights[2])


def test_the_log_has_every_step_once_and_every_epoch_s_end() -> None:
    setup = make(epochs=2, steps_per_epoch=3, treatment="pcgrad", draws=4, scheduler="pal", max_grad_norm=0.01)
    events = setup.run()
    assert [event.is_epoch for event in events] == [False, False, False, True] * 2
    records = [event.record for event in events if event.record and not event.is_epoch]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["epoch"] for record in records] == [1, 1, 1, 2, 2, 2]
    for record in records:
        assert record["task"] == "sst+para+sts" and record["stage"] == "finetune"
        assert record["gradient_norm"] > 0.01 and record["examples_per_second"] > 0
    assert setup.trainer.progress.seconds > sum(12 / record["examples_per_second"] for record in records)
    cosine = engine.mean_conflicts(setup.trainer.progress.conflicts)["cosine"]["sst-sts"]
    assert cosine == pytest.approx(sum(record["cosines"]["sst-sts"] for record in records) / 6)


def test_conflicts_are_averaged_over_the_steps_in_which_they_are_defined() -> None:
    sums: dict[str, Any] = {}
    for cosine, removed in ((-0.6, 0.25), (0.1, 0.0), (0.2, 0.5), (math.nan, math.nan)):
        engine.add_conflicts(sums, {"cosines": {"sst-sts": cosine}, "removed": {"sst": removed}})
    mean = pytest.approx
    assert engine.mean_conflicts(sums) == {
        "cosine": {"sst-sts": mean(-0.1)}, "conflict_rate": {"sst-sts": mean(1 / 3)}, "removed": {"sst": mean(0.25)}
    }  # fmt: skip


def score_epochs(monkeypatch: Patch, setup: Setup, scores: Sequence[float]) -> list[dict[str, Tensor]]:
    """Makes the dev score of epoch e scores[e - 1]; the parameters of each evaluation will be kept in the result."""
    kept: list[dict[str, Tensor]] = []

    def evaluate(*args: Any) -> dict[str, dict[str, float]]:
        kept.append(setup.parameters())
        tasks = setup.trainer.stage.tasks
        return {task: {TASKS[task].output.selection_metric: scores[len(kept) - 1]} for task in tasks}

    monkeypatch.setattr(engine, "evaluate", evaluate)
    return kept


def test_the_best_head_comes_back_with_all_that_was_trained_with_it(monkeypatch: Patch) -> None:
    head = Choice("mlp", parameters_of("mlp", layers=2))
    setup = make(tasks=["sst"], is_frozen=True, head=head, epochs=4, eval_every=1, draws=1, dropout=0.3)
    before = setup.parameters()
    kept = score_epochs(monkeypatch, setup, [0.1, 0.7, 0.5, 0.6])
    assert [event.is_best for event in setup.run() if event.is_epoch] == [True, True, False, False]
    assert len(moved(kept[1], kept[3])) == 6  # two hidden layers and the output layer, weight and bias each
    assert not moved(setup.parameters(), kept[1])
    assert moved(before, kept[3]) == {name for name in before if name.startswith("heads.sst.")}
    assert (setup.trainer.progress.best_epoch, setup.trainer.progress.best_score) == (2, 0.7)


def test_what_is_scored_is_the_average_and_training_goes_on_with_the_raw_weights(monkeypatch: Patch) -> None:
    plain, averaged = make(epochs=3, eval_every=1, adapters=True), make(epochs=3, ema_decay=0.9, adapters=True)
    plain.run()
    kept = score_epochs(monkeypatch, averaged, [0.1])
    averaged.run()
    assert not moved(plain.parameters(), averaged.parameters())
    assert moved(kept[0], plain.parameters()) == set(kept[0])
    with averaged.trainer.averaged():
        assert not moved(kept[0], averaged.parameters())


def test_fine_tuning_ends_after_patience_epochs_without_a_gain_with_its_last_parameters(monkeypatch: Patch) -> None:
    setup = make(epochs=9, eval_every=1, patience=2)
    kept = score_epochs(monkeypatch, setup, [0.1, 0.3, 0.2, 0.3, 0.9, 0.9, 0.9, 0.9, 0.9])
    last = setup.run()[-1]
    assert len(kept) == 4 and setup.trainer.progress.step == 8 and setup.trainer.progress.ended
    assert any("--patience" in line and "epoch 2" in line for line in last.notes)
    assert not moved(setup.parameters(), kept[3]) and setup.run() == []  # taken up again, it has ended
    patient = make(epochs=6, eval_every=1, patience=2)
    kept = score_epochs(monkeypatch, patient, [0.1, 0.05, 0.2, 0.15, 0.3, 0.25])
    patient.run()
    assert len(kept) == 6 and not patient.trainer.progress.ended


def test_warnings_of_an_evaluation_are_among_the_notes() -> None:
    setup = make(tasks=["sts"], lr=1e-12)
    torch.nn.init.zeros_(setup.model.head_parameters("sts")["heads.sts.output.weight"])
    (event,) = (event for event in setup.run() if event.is_epoch)
    assert event.record is not None and event.record["dev"]["sts"]["pearson"] == 0.0
    assert any(line.startswith("warning: sts") for line in event.notes)


def test_an_evaluation_that_is_stopped_is_done_again_and_no_step_twice() -> None:
    def stop() -> None:
        raise InterruptedError

    stopped, whole = make(epochs=2, eval_every=1), make(epochs=2, eval_every=1)
    with pytest.raises(InterruptedError):
        list(stopped.trainer.run(stop))
    assert (stopped.trainer.progress.step, stopped.trainer.progress.closed_epochs) == (2, 0)
    assert [event.is_epoch for event in stopped.run()] == [True, False, False, True]
    whole.run()
    assert not moved(stopped.parameters(), whole.parameters())


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_stage_taken_up_from_its_state_ends_with_the_same_parameters(is_frozen: bool, monkeypatch: Patch) -> None:
    """After an event: a step, of four in both epochs, or the evaluation behind them, of which the first is better."""
    scores = cycle([0.7, 0.1])
    monkeypatch.setattr(engine, "evaluate", lambda *_: {"sst": {"accuracy": next(scores)}})
    options: dict[str, Any] = {"epochs": 2, "steps_per_epoch": 4, "batch_size": 5, "eval_every": 1, "dropout": 0.2}
    tuning = {"treatment": "gradvac", "draws": 5, "scheduler": "pal", "regularizers": ["smart", "bregman"]}
    tuning |= {"adapters": True, "ema_decay": 0.9}
    options |= {"is_frozen": True, "scheduler": "random"} if is_frozen else {**tuning, "copied": 1}
    whole = make(**options)
    events = whole.run()
    for stop in (4, 5, 7):
        first, second = make(**options), make(**options)
        for _ in zip(range(stop), first.trainer.run(), strict=False):
            pass
        second.model.load_state_dict(first.model.state_dict())
        second.trainer.load_state(first.state(), vars(first.trainer.progress))
        assert len(second.run()) == len(events) - stop
        assert not moved(second.parameters(), whole.parameters())
        assert not moved(second.state(), whole.state())


def test_the_state_of_another_stage_is_refused() -> None:
    plain = make()
    others: list[dict[str, Any]] = [{"adapters": True}, {"regularizers": ["bregman"]}, {"ema_decay": 0.9}]
    for options in others:
        with pytest.raises(ValueError, match=r"the tensor .* is missing"):
            make(**options).trainer.load_state(plain.state(), asdict(plain.trainer.progress))


@pytest.mark.parametrize("treatment", ["", "gradvac"])
def test_a_loss_that_is_not_finite_stops_with_step_task_and_rows(treatment: str) -> None:
    setup = make(treatment=treatment, num_rows=12, steps_per_epoch=5)
    bad = int(RowStream(12, derive_seed(0, "finetune", "rows", "sts")).rows(4, 1)[0])
    setup.trainer.data.train["sts"].labels[bad] = np.nan
    with pytest.raises(TrainingError) as caught:
        setup.run()
    message = str(caught.value)
    assert "finetune step 2" in message and "sts is nan" in message and "\n" not in message
    assert str(bad) in message.split("training rows ")[1].split(" (")[0].split(", ")
    assert setup.trainer.progress.step == 1


@pytest.mark.parametrize("treatment", ["", "gradvac"])
def test_a_step_may_be_told_of_when_the_next_one_has_been_ordered(treatment: str) -> None:
    """As on a GPU: the same records; where the trainer is to stand still, or a step fails, none is under way."""
    lines = []
    for num_waiting in (0, 1):
        setup = make(treatment=treatment, epochs=2, steps_per_epoch=5, regularizers=["bregman"], ema_decay=0.9)
        setup.trainer.num_waiting, found = num_waiting, []
        for event in setup.trainer.run(settle_every=2):
            if event.record is None:
                continue
            ahead = setup.trainer.progress.step - event.record["step"]
            assert event.is_epoch or ahead == (num_waiting if event.record["step"] in (1, 3, 7, 9) else 0)
            found.append({key: value for key, value in event.record.items() if "examples_per_second" not in key})
        lines.append((found, setup.state()))
    assert lines[0][0] == lines[1][0] and not moved(lines[0][1], lines[1][1])
    setup = make(treatment=treatment, num_rows=12, steps_per_epoch=5)
    bad = int(RowStream(12, derive_seed(0, "finetune", "rows", "sts")).rows(8, 1)[0])
    setup.trainer.data.train["sts"].labels[bad] = np.nan
    setup.trainer.num_waiting = 1
    with pytest.raises(TrainingError, match="finetune step 3: the loss of sts is nan"):
        setup.run()
    assert [event.record["step"] for event in setup.trainer.settle() if event.record] == ([2] if treatment else [])
    assert setup.trainer.progress.step == 2 and setup.trainer.progress.rows == dict.fromkeys(ALL, 8)
    expected = make(treatment=treatment, num_rows=12, steps_per_epoch=5)
    for number in range(2):
        expected.step(number)
    assert not moved(expected.parameters(), setup.parameters())


@pytest.mark.parametrize("part", ["encoder.pooler.weight", "heads.para.output.weight"])
@pytest.mark.parametrize("treatment", ["", "pcgrad", "gradvac"])
def test_a_gradient_that_is_not_finite_stops_before_anything_moves(part: str, treatment: str) -> None:
    setup = make(treatment=treatment, regularizers=["bregman"], ema_decay=0.9)
    setup.step(0)
    parameters, state = setup.parameters(), setup.state()
    dict(setup.model.named_parameters())[part].register_hook(lambda grad: grad * math.nan)
    with pytest.raises(TrainingError, match=r"finetune step 2: the gradient of .*para.* is nan"):
        setup.step(1)
    assert not moved(parameters, setup.parameters()) and not moved(state, setup.state())


@pytest.mark.parametrize("treatment", ["pcgrad", "gradvac"])
@pytest.mark.parametrize("size", [1e-38, 1e-20])
def test_a_task_that_is_solved_leaves_the_step_to_the_others(treatment: str, size: float) -> None:
    """No float32 holds what would bring its gradient to their length."""

    def after(of_para: float) -> dict[str, Tensor]:
        setup = make(treatment=treatment)
        own = setup.trainer.methods

        def losses(task: str, logits: Tensor, labels: Tensor) -> Tensor:
            return own.losses(task, logits, labels) * (of_para if task == "para" else 1.0)

        setup.trainer.methods = replace(own, losses=losses, scales_equally=True)
        before = setup.parameters()
        for step in range(2):
            setup.step(step)
        assert len(moved(before, setup.parameters())) > 10
        return setup.parameters()

    found, expected = after(size), after(0.0)
    assert all(torch.allclose(found[name], expected[name], rtol=0, atol=1e-7) for name in expected)


class Memory:
    """Raises out of memory for forward passes of more than `limit` rows, from the second pass on."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.sizes: list[int] = []

    def __call__(self, task: str, batch: Batch) -> None:
        if self.sizes and len(batch) > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        self.sizes.append(len(batch))


@pytest.mark.parametrize("treatment", ["", "pcgrad"])
def test_out_of_memory_halves_the_forward_pass_and_keeps_the_gradient(treatment: str) -> None:
    memory = Memory(3)
    options: dict[str, Any] = {"treatment": treatment, "batch_size": 10, "accumulation_steps": 3}
    setup = make(before=memory, **options)
    notes = setup.trainer._launch(1, 0).notes
    expected = make(**options)
    expected.step()
    again = [3, 3, 3, 1] * 3 if treatment else [3] * 10
    assert memory.sizes == [10, *again]
    assert notes == [
        f"finetune step 1: out of memory; going on with at most {size} rows a forward pass, and the same rows a step"
        for size in (5, 3)
    ]
    for name, value in expected.state().items():
        torch.testing.assert_close(setup.state()[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))
    assert not setup.trainer._launch(1, 1).notes and memory.sizes == [10, *again, *again]


def test_out_of_memory_with_one_row_is_an_error() -> None:
    with pytest.raises(TrainingError, match=r"finetune step 1: .*out of memory"):
        make(before=Memory(0), treatment="pcgrad").step()


@pytest.mark.parametrize("treatment", ["", *TREATED])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_and_treatment_takes_a_step_and_touches_no_global_generator(
    scheduler: str, treatment: str
) -> None:
    setup = make(
        scheduler=scheduler, treatment=treatment, draws=5 if treatment else 1, regularizers=list(REGULARIZERS),
        adapters=True, copied=1, accumulation_steps=2, batch_size=4, weight_decay=0.01, max_grad_norm=1.0, dropout=0.1,
    )  # fmt: skip
    generators = random.getstate(), repr(np.random.get_state()), torch.random.get_rng_state().tolist()
    before, record = setup.parameters(), setup.step()
    assert generators == (random.getstate(), repr(np.random.get_state()), torch.random.get_rng_state().tolist())
    present = set(record["losses"])
    assert len(present) == (3 if treatment else 1)
    own = {name for task in present for name in setup.model.trained().own[task]}
    assert moved(before, setup.parameters()) == own | set(setup.model.shared_parameters())


def test_a_step_that_is_told_of_late_is_in_the_log_of_a_run_that_is_stopped_or_fails(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever step the stop comes after; and one under way that cannot be taken is not what the run stands at."""
    flags = "--epochs 2 --pretrain_epochs 0 --steps_per_epoch 4 --batch_size 4 --save_every 3 --cache off --device cpu"
    base = [*flags.split(), "--no-tensorboard", "--model", str(tiny), "--data", str(data)]
    original, init = Run.show, Trainer.__init__

    def late(trainer: Trainer, *given: Any) -> None:
        init(trainer, *given)
        trainer.num_waiting = 1

    def steps_of(out: Path) -> list[int]:
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        return [line["step"] for line in lines if "loss" in line]

    monkeypatch.setattr(Trainer, "__init__", late)
    assert multitask_classifier.main([*base, "--out", str(tmp_path / "whole")]) == 0
    for stop in (1, 3, 4, 6):
        out, left = tmp_path / f"stopped{stop}", iter(range(stop - 1, -9, -1))

        def show(run: Run, stage: Stage, event: engine.Event, left: Iterator[int] = left) -> None:
            original(run, stage, event)
            if not event.is_epoch and next(left) == 0:
                run.stop.number = signal.SIGINT

        with monkeypatch.context() as patch:
            patch.setattr(Run, "show", show)
            assert multitask_classifier.main([*base, "--out", str(out)]) == 130
        stands_at = json.loads((out / "last" / "trainer.json").read_text())["progress"]["step"]
        assert steps_of(out) == list(range(1, stands_at + 1))
        assert multitask_classifier.main(["--resume", str(out)]) == 0
        assert steps_of(out) == list(range(1, 9))
        for name in ("last/model.safetensors", "last/trainer.safetensors"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_scale_that_cannot_help_ends_a_run_of_float16() -> None:
    setup = make(dtype=torch.float16, steps_per_epoch=90)
    setup.model.get_parameter("encoder.pooler.weight").register_hook(lambda grad: grad * math.nan)
    with pytest.raises(TrainingError, match=r"finetune step 27: the gradient of .* is nan"):
        setup.run()
    assert setup.trainer.progress.step == 26


def test_a_row_that_is_not_finite_is_its_own_tasks() -> None:
    setup = make()
    original = setup.model.pooled

    def pooled(task: str, batch: Batch, *given: Any) -> Tensor:
        states = original(task, batch, *given)
        return torch.where(torch.arange(len(states))[:, None] == len(states) - 1, math.inf, states)

    setup.model.pooled = pooled  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="the loss of sts is"):
        setup.step()
