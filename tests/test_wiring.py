"""The engine against the methods as their papers have them: a run put together as the command does it, followed step
by step by a naive one, which is written here on plain gradients, with float64 in place of float32 on both sides.

The naive run takes nothing from schedulers.py, pcgrad.py, smart.py, flat_parameters.py or engine.py. It shares the
model, the losses and the seeds: derive_seed(seed, stage, purpose, ...) for the plan of a step, the order of a task's
rows, the dropout of a forward pass and the treatment of a step.
"""

import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_engine import fill_adapters, random_rows
from test_jacobian_descent import skip_without, torchjd_object
from test_pcgrad import vector_gradvac, vector_pcgrad
from torch import Tensor

import config as flags
from console import Console
from datasets import Batch
from helpers import generator, randomize_vectors, tiny_model
from jacobian_descent import METHODS, SCALARIZERS
from model import MultitaskBert
from ops import DropoutMasks
from run import Run, plan_stages, start_block
from run_data import Data
from seeding import derive_seed
from tasks import TASKS

SIZES = {"sst": 17, "para": 41, "sts": 9}


# ------------------------------------------------------------------------------------------------- the run itself


@pytest.fixture(autouse=True)
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """float64 for all that is float32: a difference beyond its rounding is one of method."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_run(arguments: str, dropout: float = 0.0, width: int = 16) -> Run:
    """A run of these flags on a tiny model and data sets of unequal sizes, as run.prepare would make it."""
    tuning = "" if "--option" in arguments else "--epochs 3 --lr 0.003"
    config = flags.parse(f"{BASE} {tuning} {arguments}".split())
    sizes = {"hidden_size": width, "intermediate_size": width * 3 // 2}
    rates: Any = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    adapter = config.choice("adapter", config.adapter) if config.adapter else None
    head = config.choice("head", config.head[0] if config.head else "linear")
    read = {"pooling": config.pooling or "pooler", "pairs": config.pairs or "cross"}
    copied = config.copy_top_layers
    model = tiny_model(config.tasks, adapter, head, copied=copied, **read, **sizes, **rates).double()
    is_split = {task: config.pairs == "siamese" and task != "sst" for task in config.tasks}
    fill_adapters(model)
    randomize_vectors(model.top_layers, 7)
    data = Data(
        train={task: random_rows(task, SIZES[task], 10 + i, is_split[task]) for i, task in enumerate(config.tasks)},
        dev={task: random_rows(task, 4, 20 + i, is_split[task]) for i, task in enumerate(config.tasks)},
    )
    for rows in (*data.train.values(), *data.dev.values()):
        rows.labels = rows.labels.astype(np.float64)
    nothing: Any = None
    stop: Any = type("NeverStopped", (), {"check": lambda self: None})()
    return Run(config, model, Path(), data, nothing, Console(), stop)


BASE = """--batch_size 7 --accumulation_steps 2 --pretrain_epochs 3 --pretrain_lr 0.02 --pretrain_weight_decay 0.4
--warmup 0.3 --weight_decay 0.1 --max_grad_norm 0.3 --eval_every 0 --eval_batch_size 9 --seed 3 --device cpu"""
ROWS = 14  # of a step


# ---------------------------------------------------------------------------------------------------- a naive run


@dataclass
class Adam:
    """AdamW of some parameters, flat."""

    mean: Tensor
    square: Tensor
    num_steps: int = 0

    def step(self, values: Tensor, gradient: Tensor, lr: float, decay: Tensor) -> Tensor:
        self.num_steps += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient**2
        mean, square = self.mean / (1 - 0.9**self.num_steps), self.square / (1 - 0.999**self.num_steps)
        return values - lr * decay * values - lr * mean / (square.sqrt() + 1e-8)


@dataclass
class Naive:
    """One stage of a run, on gradients that are dictionaries of tensors or flat vectors."""

    model: MultitaskBert
    data: Data
    stage: str = "finetune"
    tasks: Sequence[str] = ("sst", "para", "sts")
    scheduler: str = "pal"
    tau: float = 2.0
    draws: int = 1
    treatment: str = ""
    beta: float = 0.01
    scale: str = "equal"
    by_layer: bool = False
    smart: bool = False
    bregman: bool = False
    ema: float = 0.0
    rdrop: float = 0.0
    weights: Mapping[str, float] = field(default_factory=dict)
    epochs: int = 3
    lr: float = 0.003
    warmup: float = 0.3
    max_norm: float = 0.3
    moves: Sequence[str] = ("encoder", "heads", "adapters", "top_layers")
    adams: dict[str, Adam] = field(default_factory=dict)
    num_rows: Counter[str] = field(default_factory=Counter)
    targets: dict[int, Tensor] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    of_torchjd: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.values = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.averages = {name: value.clone() for name, value in self.values.items()}
        self.scored = dict(self.values)
        moving = [name for name in self.values if name.split(".")[0] in self.moves]
        own = {task: [name for name in moving if name.split(".")[1] == task] for task in self.tasks}
        head = self.model.layout.heads[self.tasks[0]].name
        self.reads_states = head in ("lstm", "routing")
        is_unread = self.model.layout.pooling != "pooler" or head == "routing"
        unread = "encoder.pooler." if is_unread else "-"
        shared = [name for name in moving if name.startswith("encoder.") and not name.startswith(unread)]
        self.groups = {"shared": shared, **own}
        self.num_steps = self.epochs * -(-sum(len(self.data.train[task]) for task in self.tasks) // ROWS)

    def seed(self, *purpose: str | int) -> int:
        return derive_seed(3, self.stage, *purpose)

    def shares(self, epoch: int) -> np.ndarray:
        alpha = 1 - 0.8 * (epoch - 1) / (self.epochs - 1) if self.epochs > 1 else 1.0
        power = {"random": 0.0, "round_robin": 0.0, "pal": alpha, "temperature": 1 / self.tau}[self.scheduler]
        powers = np.array([len(self.data.train[task]) for task in self.tasks]) ** power
        return np.asarray(powers / powers.sum())

    def drawn(self, epoch: int, step: int) -> list[str]:
        """The tasks of the step's draws, those of a task one behind the other."""
        draw, shares, tasks = random.Random(self.seed("plan", step)), self.shares(epoch), list(self.tasks)
        if self.scheduler == "round_robin":
            names = [tasks[i % len(tasks)] for i in range(step * self.draws, (step + 1) * self.draws)]
        elif not self.treatment:
            names = draw.choices(tasks, shares.tolist(), k=self.draws)
        else:  # each task once, and more so that its expected share is max(1 / draws, c * share)
            low, high = 0.0, 2.0
            while high - low > 1e-14:
                c = (low + high) / 2
                low, high = (c, high) if np.maximum(1 / self.draws, c * shares).sum() < 1 else (low, c)
            lacking = np.maximum(0, self.draws * np.maximum(1 / self.draws, low * shares) - 1)
            names = tasks + (draw.choices(tasks, lacking.tolist(), k=self.draws - 3) if self.draws > 3 else [])
        return sorted(names, key=names.index)

    def next_rows(self, task: str, count: int) -> np.ndarray:
        """Pass after pass over the rows of a task, each in an order of its own."""
        size, first = len(self.data.train[task]), self.num_rows[task]
        orders = [np.random.default_rng([self.seed("rows", task), number]).permutation(size) for number in range(60)]
        self.num_rows[task] += count
        return np.concatenate(orders)[first : first + count]

    def losses(self, task: str, batch: Batch, seed: int) -> Tensor:
        """(B,) of the rows of one forward pass, regularizers included."""
        output = TASKS[task].output
        if "encoder" not in self.moves and "adapters" not in self.moves:
            if self.reads_states:
                with torch.no_grad():
                    read = self.model.read(task, batch)
                return output.losses(self.model.predict(task, read, DropoutMasks(seed)), batch.labels)
            with torch.no_grad():
                if task not in self.features:
                    whole = self.data.train[task].batch(range(len(self.data.train[task])))
                    self.features[task] = self.model.pooled(task, whole)
                features, pooled = self.features[task], self.model.pooled(task, batch)
                pooled = (pooled - features.mean(0)) / features.var(0, correction=0).sqrt()
            return output.losses(self.model.predict(task, pooled, DropoutMasks(seed)), batch.labels)
        masks = DropoutMasks(seed)
        logits = self.model(task, batch, masks)
        losses = output.losses(logits, batch.labels)
        if self.rdrop:
            other = self.model(task, batch, masks)
            losses = (losses + output.losses(other, batch.labels) + self.rdrop * output.divergence(logits, other)) / 2
        if self.smart:
            assert batch.tokens is not None
            row_of_token, noise = batch.tokens.row_of_token, generator(derive_seed(seed, "smart"))
            d = 0.03 * torch.randn(len(row_of_token), 16, generator=noise)
            for _ in range(2):
                d.requires_grad_(True)
                far = output.divergence(self.model(task, batch, DropoutMasks(seed), d), logits.detach())
                (ascent,) = torch.autograd.grad(far.sum(), d)
                largest = torch.stack([ascent[row_of_token == row].abs().max() for row in row_of_token])
                d = (d.detach() + 0.04 * ascent / largest[:, None].clamp(min=1e-30)).clamp(-0.05, 0.05)
            losses = losses + 2.5 * output.divergence(self.model(task, batch, DropoutMasks(seed), d), logits)
        if self.bregman:
            given = (task, batch, DropoutMasks(seed))
            reference = torch.func.functional_call(self.model, self.averages, given).detach()
            losses = losses + 30 * output.divergence(logits, reference)
        return losses

    def loss_and_gradient(self, task: str, rows: np.ndarray, step: int) -> tuple[float, dict[str, Tensor]]:
        """The mean loss of the rows, and its gradient by parameter."""
        parts = {first: self.data.train[task].batch(rows[first : first + 7]) for first in range(0, len(rows), 7)}
        losses = [self.losses(task, part, self.seed("dropout", step, task, first)) for first, part in parts.items()]
        names, parameters = [*self.groups["shared"], *self.groups[task]], dict(self.model.named_parameters())
        loss = torch.cat(losses).mean()
        found = torch.autograd.grad(loss, [parameters[name] for name in names])
        return float(loss.detach()), dict(zip(names, found, strict=True))

    def treated_sum(
        self, gradients: dict[str, dict[str, Tensor]], step: int, found: dict[str, Any]
    ) -> dict[str, Tensor]:
        """The sum of the treated gradients of the shared parameters. found: what a step records of them."""
        draw, num_tasks, result = random.Random(self.seed("treatment", step)), len(gradients), {}
        orders = [[j for j in range(num_tasks) if j != i] for i in range(num_tasks)]
        for order in orders:
            draw.shuffle(order)
        kept = torch.zeros(num_tasks)
        originals = {task: flat(of_task, self.groups["shared"]) for task, of_task in gradients.items()}
        for number, part in enumerate(by_layer(self.groups["shared"]) if self.by_layer else [self.groups["shared"]]):
            vectors = torch.stack([flat(of_task, part) for of_task in gradients.values()])  # (T, P)
            if self.treatment == "pcgrad":
                treated = vector_pcgrad(vectors, orders)
            elif self.treatment == "gradvac":
                targets = self.targets.get(number, torch.zeros(num_tasks, num_tasks))
                treated, self.targets[number] = vector_gradvac(vectors, targets, self.beta, orders)
            else:
                combined = self.torchjd_s(number, vectors, torch.tensor(list(found["losses"].values())), step)
                result.update(unflat(combined, self.values, part))
                continue
            kept = kept + (treated * vectors).sum(1)
            result.update(unflat(treated.sum(0), self.values, part))
        found["cosines"] = {
            f"{one}-{other}": float(torch.cosine_similarity(originals[one], originals[other], 0))
            for one, other in combinations(gradients, 2)
        }
        if not self.of_torchjd:
            squares = torch.stack([original @ original for original in originals.values()])
            found["removed"] = dict(zip(gradients, (1 - kept / squares).clamp(min=0).tolist(), strict=True))
        return result

    def torchjd_s(self, number: int, vectors: Tensor, losses: Tensor, step: int) -> Tensor:
        """(P,) what torchjd makes of the Jacobian (T, P) of a segment, or of the losses (T,)."""
        made = self.of_torchjd.setdefault(number, torchjd_object(self.treatment))
        if number == 0:
            torch.manual_seed(random.Random(self.seed("treatment", step)).getrandbits(63))
        if self.treatment not in SCALARIZERS:
            return made(vectors)  # type: ignore[no-any-return]
        if self.treatment == "DWA" and step and step % (self.num_steps // self.epochs) == 0:
            made.step()
        losses.requires_grad_()
        weights, *slopes = torch.autograd.grad(made(losses), [losses, *made.parameters()])
        for parameter, slope in zip(made.parameters(), slopes, strict=True):
            parameter.data -= 0.01 * slope
        return weights @ vectors

    def step(self, epoch: int, step: int) -> dict[str, Any]:
        """Takes a step and returns what is to be recorded of it."""
        drawn, gradients, total = self.drawn(epoch, step), {}, dict[str, Tensor]()
        lengths: dict[str, float] = {}
        found: dict[str, Any] = {"draws": Counter(drawn), "losses": {}, "loss": 0.0}
        ends = [i * ROWS // len(drawn) for i in range(len(drawn) + 1)]
        b = 0.2 + 0.8 * (epoch - 1) / (self.epochs - 1) if self.scheduler == "pal" and self.epochs > 1 else 1.0
        for task in (task for task in self.tasks if task in drawn):
            k = drawn.count(task)
            num_rows = sum(ends[i + 1] - ends[i] for i, name in enumerate(drawn) if name == task)
            weight = (k * k**-b if self.treatment else num_rows / ROWS) * self.weights.get(task, 1)
            loss, of_task = self.loss_and_gradient(task, self.next_rows(task, num_rows), step)
            found["losses"][task], found["loss"] = loss, found["loss"] + loss * num_rows / ROWS
            gradients[task] = {name: weight * gradient for name, gradient in of_task.items()}
            lengths[task] = float(flat(of_task, self.groups["shared"]).norm()) if self.groups["shared"] else 0.0
            total.update(gradients[task])
        for name in self.groups["shared"]:
            total[name] = torch.stack([of_task[name] for of_task in gradients.values()]).sum(0)
        if self.treatment and self.scale == "equal":
            mean = sum(lengths.values()) / len(lengths)
            for task, of_task in gradients.items():
                of_task.update({name: mean / lengths[task] * of_task[name] for name in self.groups["shared"]})
        if self.treatment:
            total.update(self.treated_sum(gradients, step, found))
        norm = float(flat(total, list(total)).norm())
        factor = min(1.0, self.max_norm / (norm + 1e-6)) if self.max_norm else 1.0
        rising = int(self.warmup * self.num_steps)
        share = (step + 1) / (rising + 1) if step < rising else (self.num_steps - step) / (self.num_steps - rising)
        for group, names in self.groups.items():
            if names and (group == "shared" or group in gradients):
                values, zeros = flat(self.values, names), torch.zeros_like(flat(self.values, names))
                adam = self.adams.setdefault(group, Adam(zeros, zeros))
                decay = 0.1 if {"encoder", "adapters"} & set(self.moves) else 0.4
                decays = {name: torch.full_like(self.values[name], decay * is_decayed(name)) for name in names}
                values = adam.step(values, factor * flat(total, names), share * self.lr, flat(decays, names))
                self.values.update(unflat(values, self.values, names))
        beta = 0.99 if step < 0.1 * self.num_steps else 0.999
        self.averages = {n: beta * average + (1 - beta) * self.values[n] for n, average in self.averages.items()}
        d = min(self.ema, (2 + step) / (11 + step))  # t is step + 1
        self.scored = {name: d * average + (1 - d) * self.values[name] for name, average in self.scored.items()}
        self.model.load_state_dict(self.values)
        return found | {"gradient_norm": norm, "lr": share * self.lr}


def is_decayed(name: str) -> bool:
    return "norm" not in name and "bias" not in name


def by_layer(names: Sequence[str]) -> list[list[str]]:
    """Those of the embeddings, of each layer that is shared, of the pooler."""
    prefixes = ("encoder.layers.0.", "encoder.layers.1.", "encoder.pooler.")
    parts = [
        [name for name in names if not name.startswith(prefixes)],
        *([name for name in names if name.startswith(prefix)] for prefix in prefixes),
    ]
    return [part for part in parts if part]


def flat(values: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([values[name].flatten() for name in names])


def unflat(vector: Tensor, like: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    parts = vector.split([like[name].numel() for name in names])
    return {name: part.view_as(like[name]) for name, part in zip(names, parts, strict=True)}


# ------------------------------------------------------------------------------------------------------- the cases


SMART = "--smart --smart_eps 0.05 --smart_sigma 0.03 --smart_eta 0.04 --smart_steps 2 --smart_weight 2.5"
PAL = "--pal --pal_size 6 --pal_heads 2"
OWN = "--gradient_scale own --draws_per_step 4"
BREGMAN = "--bregman --bregman_weight 30"
WEIGHTS = {"sst": 2, "para": 0.5, "sts": 0.5}
FROZEN: dict[str, Any] = {"epochs": 3, "lr": 0.02, "moves": ["heads"]}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pcgrad": (f"{PAL} --pcgrad --draws_per_step 5", {"treatment": "pcgrad", "draws": 5}),
    "gradvac": ("--gradvac --gradvac_beta 0.3 --draws_per_step 5", {"treatment": "gradvac", "beta": 0.3, "draws": 5}),
    "own lengths": (
        "--pcgrad --gradient_scale own --draws_per_step 5",
        {"treatment": "pcgrad", "scale": "own", "draws": 5},
    ),
    "default draws": ("--gradvac", {"treatment": "gradvac", "draws": 14}),
    "every task once": ("--pcgrad --draws_per_step 3", {"treatment": "pcgrad", "draws": 3}),
    **{name: (f"{OWN} --treatment {name}", {"treatment": name, "scale": "own", "draws": 4}) for name in METHODS},
    "Constant": (
        f"{OWN} --treatment Constant --treatment_arguments weights=1,2,0.5",
        {"treatment": "Constant", "scale": "own", "draws": 4},
    ),
    "UPGrad, equal lengths": ("--treatment UPGrad --draws_per_step 4", {"treatment": "UPGrad", "draws": 4}),
    "PCD, layer": (
        "--treatment PCD --granularity layer --draws_per_step 4",
        {"treatment": "PCD", "by_layer": True, "draws": 4},
    ),
    "pal": (PAL, {}),
    "pal, draws": ("--draws_per_step 4", {"draws": 4}),
    "pal, one epoch": ("--pcgrad --draws_per_step 9 --epochs 1", {"treatment": "pcgrad", "draws": 9, "epochs": 1}),
    "random": ("--scheduler random --draws_per_step 3", {"scheduler": "random", "draws": 3}),
    "random, pcgrad": (
        "--scheduler random --pcgrad --draws_per_step 6",
        {"scheduler": "random", "treatment": "pcgrad", "draws": 6},
    ),
    "round_robin": ("--scheduler round_robin --draws_per_step 2", {"scheduler": "round_robin", "draws": 2}),
    "round_robin, gradvac": (
        "--scheduler round_robin --gradvac --gradvac_beta 0.4 --draws_per_step 5",
        {"scheduler": "round_robin", "treatment": "gradvac", "beta": 0.4, "draws": 5},
    ),
    "temperature": (
        "--scheduler temperature --temperature_tau 4 --draws_per_step 2",
        {"scheduler": "temperature", "tau": 4, "draws": 2},
    ),
    "temperature, pcgrad": (
        "--scheduler temperature --pcgrad --draws_per_step 8",
        {"scheduler": "temperature", "treatment": "pcgrad", "draws": 8},
    ),
    "pcgrad, layer": (
        "--pcgrad --granularity layer --draws_per_step 5",
        {"treatment": "pcgrad", "by_layer": True, "draws": 5},
    ),
    "gradvac, layer": (
        "--gradvac --gradvac_beta 0.3 --granularity layer --draws_per_step 5",
        {"treatment": "gradvac", "beta": 0.3, "by_layer": True, "draws": 5},
    ),
    "smart": (f"{SMART} --draws_per_step 2", {"smart": True, "draws": 2}),
    "bregman": (f"{BREGMAN} --draws_per_step 2", {"bregman": True, "draws": 2}),
    "rdrop": ("--rdrop --rdrop_alpha 4 --draws_per_step 4", {"rdrop": 4, "draws": 4}),
    "rdrop without dropout": ("--rdrop --draws_per_step 2", {"draws": 2}),
    "all regularizers, pcgrad": (
        f"{SMART} {BREGMAN} --rdrop --pcgrad --draws_per_step 4",
        {"smart": True, "bregman": True, "rdrop": 1, "treatment": "pcgrad", "draws": 4},
    ),
    "weights": ("--task_weights sst=4 --draws_per_step 5", {"weights": WEIGHTS, "draws": 5}),
    "weights, rdrop": (
        "--task_weights sst=2 para=0.5 sts=0.5 --rdrop --draws_per_step 2",
        {"weights": WEIGHTS, "rdrop": 1, "draws": 2},
    ),
    "weights, pcgrad": (
        "--task_weights sts=2 sst=8 para=2 --pcgrad --draws_per_step 5",
        {"weights": WEIGHTS, "treatment": "pcgrad", "draws": 5},
    ),
    "weights, own lengths": (
        "--task_weights sst=4 --gradvac --gradvac_beta 0.3 --gradient_scale own --draws_per_step 5",
        {"weights": WEIGHTS, "treatment": "gradvac", "beta": 0.3, "scale": "own", "draws": 5},
    ),
    "copied layer": ("--copy_top_layers 1 --draws_per_step 4", {"draws": 4}),
    "copied layer, pcgrad": (
        f"--copy_top_layers 1 {PAL} {SMART} {BREGMAN} --rdrop --pcgrad --granularity layer --draws_per_step 5",
        {"smart": True, "bregman": True, "rdrop": 1, "treatment": "pcgrad", "by_layer": True, "draws": 5},
    ),
    "copied layers": ("--copy_top_layers 2 --gradvac --draws_per_step 4", {"treatment": "gradvac", "draws": 4}),
    "never clipped": ("--max_grad_norm 0 --draws_per_step 2", {"max_norm": 0.0, "draws": 2}),
    "no warm-up": ("--warmup 0", {"warmup": 0.0}),
    "ema": (f"{PAL} --average ema --ema_decay 0.2 --draws_per_step 2", {"ema": 0.2, "draws": 2}),
    "ema, adapters alone": (f"{PAL} --average ema --train pal", {"ema": 0.999, "moves": ["adapters"]}),
    "adapters alone": (f"{PAL} --train pal --draws_per_step 2", {"moves": ["adapters"], "draws": 2}),
    "siamese": ("--pooling mean --pairs siamese --draws_per_step 4", {"draws": 4}),
    "siamese, smart, pcgrad, layer": (
        f"--pooling cls --pairs siamese {SMART} {BREGMAN} {PAL} --pcgrad --granularity layer --draws_per_step 4",
        {"smart": True, "bregman": True, "treatment": "pcgrad", "by_layer": True, "draws": 4},
    ),
    "lstm": (
        f"--head lstm --lstm_size 5 {SMART} {BREGMAN} --rdrop {PAL} --pcgrad --draws_per_step 4",
        {"smart": True, "bregman": True, "rdrop": 1, "treatment": "pcgrad", "draws": 4},
    ),
    "lstm, siamese": ("--head lstm --lstm_size 5 --pairs siamese --draws_per_step 4", {"draws": 4}),
    "routing": (
        f"--head routing --routing_capsules 3 {SMART} --copy_top_layers 1 --pcgrad --draws_per_step 4",
        {"smart": True, "treatment": "pcgrad", "draws": 4},
    ),
    "frozen, lstm": ("--option pretrain --head lstm --lstm_size 5", FROZEN),
    "frozen, routing": ("--option pretrain --head routing --routing_capsules 3", FROZEN),
    "frozen, siamese": ("--option pretrain --head mlp --pooling mean --pairs siamese", FROZEN),
    "frozen": ("--option pretrain --head mlp --scheduler temperature", {"scheduler": "temperature", **FROZEN}),
    "frozen, before fine-tuning": (
        f"{SMART} {BREGMAN} {PAL} --pcgrad --task_weights sst=4 --copy_top_layers 1",
        FROZEN,
    ),
    "frozen, one task": ("--option individual_pretrain", {"tasks": ["sst"], **FROZEN}),
}


WITH_DROPOUT = {"pal", "rdrop", "weights, rdrop", "all regularizers, pcgrad", "siamese", "lstm"}
WITH_DROPOUT |= {"frozen, lstm", "frozen, before fine-tuning"}


@pytest.mark.parametrize("case", CASES)
def test_the_parameters_after_every_step_are_those_of_a_naive_run(case: str) -> None:
    """Fine-tuning through the first epoch and into the second, the frozen stage to its end; a method of torchjd's, most
    of which know of no epochs, for three steps."""
    arguments, how = CASES[case]
    if how.get("treatment") in METHODS:
        skip_without(how["treatment"])
    run, is_frozen = make_run(arguments, 0.2 if case in WITH_DROPOUT else 0.0), "frozen" in case
    number = 0 if is_frozen else len(run.stages) - 1
    naive = Naive(run.model.duplicate(), run.data, run.stages[number].name, **how)
    trainer = run.make_trainer(number)
    parameters = dict(run.model.named_parameters())
    moving = {name for names in naive.groups.values() for name in names}
    assert {name for name, parameter in parameters.items() if parameter.requires_grad} == moving
    steps_per_epoch = naive.num_steps // naive.epochs
    to_the_end = is_frozen or naive.epochs == 1 or case == "DWA"
    last = naive.num_steps - 1 if to_the_end else 2 if case in METHODS else steps_per_epoch + 1
    rounding = 1e-6 if case == "NashMTL" else 1e-8  # its solver ends within 1e-8 of the solution
    for record in (event.record for event in trainer.run() if event.record and not event.is_epoch):
        step = trainer.progress.step - 1
        expected = naive.step(1 + step // steps_per_epoch, step)
        with trainer.averaged():
            wrong = [name for name, value in naive.scored.items() if not near(parameters[name], value, rounding)]
            assert wrong == [], step
        assert [name for name, value in naive.values.items() if not near(parameters[name], value, rounding)] == [], step
        assert {name: record[name] for name in expected} == {
            n: pytest.approx(v, rounding, rounding / 10) for n, v in expected.items()
        }
        if step == last:
            return
    pytest.fail("the stage ended early")


def near(found: Tensor, expected: Tensor, rounding: float) -> bool:
    return torch.allclose(found, expected, rtol=rounding, atol=rounding / 10)


# ------------------------------------------------------------------------------------------------- flags to stages


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("", ["pretrain", "finetune"]),
        ("--pretrain_epochs 0", ["finetune"]),
        ("--checkpoint runs/other", ["finetune"]),
        ("--option pretrain", ["pretrain"]),
        ("--mlm_epochs 2", ["mlm", "pretrain", "finetune"]),
        ("--option pretrain --mlm_epochs 2", ["mlm", "pretrain"]),
        ("--option individual_pretrain", ["pretrain_sst", "pretrain_para", "pretrain_sts"]),
        ("--option test --checkpoint runs/other", []),
        ("--option soup --checkpoints runs/one runs/other", []),
    ],
)
def test_an_option_runs_its_stages(arguments: str, names: list[str]) -> None:
    assert [stage.name for stage in plan_stages(flags.parse(arguments.split()), make_run("").data)] == names


def test_stages_have_the_settings_of_the_flags() -> None:
    run = make_run("--patience 2 --eval_every 3 --eval_batch_size 5 --steps_per_epoch 6")
    for stage, is_frozen in zip(run.stages, (True, False), strict=True):
        assert (stage.patience, stage.eval_every, stage.eval_batch_size) == (2, 3, 5)
        assert (stage.steps_per_epoch, stage.is_frozen) == (6, is_frozen)


def test_masked_language_modelling_has_its_own_flags_and_counts_the_sentences_of_split_pairs() -> None:
    stage = make_run("--mlm_epochs 2 --mlm_lr 0.5 --pairs siamese").stages[0]
    num_sentences = SIZES["sst"] + 2 * (SIZES["para"] + SIZES["sts"])
    assert (stage.name, stage.epochs, stage.lr) == ("mlm", 2, 0.5)
    assert stage.steps_per_epoch == -(-num_sentences // ROWS)


def test_the_start_of_a_run_says_what_a_loss_counts() -> None:
    assert "losses weighted (sst 2, para 0.5, sts 0.5)" in "\n".join(start_block(make_run("--task_weights sst=4"), []))


def test_a_treatment_that_has_gone_since_the_run_began_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchjd.aggregation")
    run = make_run("--treatment UPGrad")
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    with pytest.raises(flags.FlagError, match="--treatment UPGrad: torchjd is not installed"):
        run.make_trainer(1)
