"""A task and an entry of each table of methods, added from here alone: they have their flags, train and are resumed."""

import os
import random
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import engine
import multitask_classifier
from bert import BertConfig, initialize
from config import FlagError, make_parser, parse
from datasets import Batch
from heads import HEADS, LinearHead
from helpers import Capture, Patch, server, write_data
from model import MultitaskBert
from ops import DropoutMasks, Linear, Packing
from pal import ADAPTERS
from parameters import NoParameters, parameter
from pcgrad import TREATMENTS
from schedulers import SCHEDULERS, Draws, Plan, Setting, sampled_counts
from smart import REGULARIZERS
from tasks import TASKS, Classes, Task, cs224n_files

Command = Callable[..., list[str]]


class Favorite:
    """One task more often than the others."""

    @dataclass(frozen=True)
    class Parameters:
        share: float = parameter(0.4, "share of the first task", "0 < x < 1")

    def __init__(self, parameters: Parameters, setting: Setting) -> None:
        self.setting, others = setting, len(setting.tasks) - 1
        self.probabilities = [parameters.share, *[(1 - parameters.share) / others] * others]

    def plan(self, epoch: int, step: int, generator: random.Random) -> Plan:
        counts = sampled_counts(self.probabilities, self.setting, generator)
        return {task: Draws(count) for task, count in counts.items()}


class Evened:
    """Divides each task's gradient by the running average of its norm."""

    @dataclass(frozen=True)
    class Parameters:
        rate: float = parameter(0.5, "how far a step moves the averages", "0 < x <= 1")

    def __init__(self, parameters: Parameters, num_tasks: int, num_segments: int) -> None:
        self.rate = parameters.rate
        self.state = {"norms": torch.ones(num_segments, num_tasks, dtype=torch.float64)}

    def coefficients(
        self, gramians: Tensor, places: Sequence[int], generator: random.Random, losses: Tensor, epoch: int
    ) -> Tensor:
        norms, present = self.state["norms"], list(places)
        norms[:, present] += self.rate * (gramians.diagonal(dim1=1, dim2=2).sqrt() - norms[:, present])
        return torch.diag_embed(1 / norms[:, present])  # (S, T, T)


class Calm:
    """Holds logits near their running mean."""

    @dataclass(frozen=True)
    class Parameters:
        weight: float = parameter(1.0, "factor of the term", "> 0")

    def __init__(self, parameters: Parameters, model: MultitaskBert, num_steps: int) -> None:
        self.weight, self.state = parameters.weight, {"mean": torch.zeros(1)}
        self.found = torch.zeros(1)

    def term(self, task: str, batch: Batch, masks: DropoutMasks, logits: Tensor) -> Tensor:
        self.found = logits.detach().mean().view(1)
        return self.weight * (logits - self.state["mean"]).square().mean()

    def after_step(self, step: int) -> None:
        self.state["mean"].lerp_(self.found, 0.1)


class ScaledHead(LinearHead):
    """A linear layer, scaled."""

    @dataclass(frozen=True)
    class Parameters:
        factor: float = parameter(2.0, "factor on the logits", "> 0")

    def __init__(self, parameters: Parameters, encoder: BertConfig, num_features: int, num_outputs: int) -> None:
        super().__init__(NoParameters(), encoder, num_features, num_outputs)
        self.factor = parameters.factor

    def forward(self, pooled: Tensor, masks: DropoutMasks | None) -> Tensor:
        return self.factor * super().forward(pooled, masks)


class Bottleneck(nn.Module):
    """Down and up again, the same in all layers."""

    @dataclass(frozen=True)
    class Parameters:
        size: int = parameter(4, "width between the projections", ">= 1")

    def __init__(self, parameters: Parameters, encoder: BertConfig) -> None:
        super().__init__()
        self.down, self.up = Linear(encoder.hidden_size, parameters.size), Linear(parameters.size, encoder.hidden_size)

    def initialize(self, std: float, generator: torch.Generator) -> None:
        initialize(self, std, generator)
        nn.init.zeros_(self.up.weight)

    def forward(self, layer: int, hidden_states: Tensor, packing: Packing, masks: DropoutMasks | None) -> Tensor:
        return self.up(self.down(hidden_states))  # type: ignore[no-any-return]


MOOD = Task("mood", "Mood of a sentence", cs224n_files("moods"), ("sentence",), "mood", Classes(3), "Predicted_Mood")
ADDED: list[tuple[Any, str, Any]] = [
    (TASKS, "mood", MOOD),
    (SCHEDULERS, "favorite", Favorite),
    (TREATMENTS, "evened", Evened),
    (REGULARIZERS, "calm", Calm),
    (HEADS, "scaled", ScaledHead),
    (ADAPTERS, "bottleneck", Bottleneck),
]
ENTRIES = [  # how each is chosen, its parameter, and another value of it
    ("--scheduler favorite", "--favorite_share", "0.9"),
    ("--evened", "--evened_rate", "0.9"),
    ("--calm", "--calm_weight", "9.0"),
    ("--head scaled", "--scaled_factor", "3.0"),
    ("--bottleneck", "--bottleneck_size", "5"),
]
EVERYTHING = "--scheduler favorite --favorite_share 0.3 --evened --evened_rate 0.2 --calm --calm_weight 0.5"
EVERYTHING += " --head scaled sst=mlp --scaled_factor 1.5 --bottleneck --bottleneck_size 3"


def main_killed_at(number: int, arguments: Sequence[str]) -> None:
    """In a process of its own: the command with all that is added, killed before its step of this number, from 1."""
    torch.set_num_threads(1)
    for table, name, entry in ADDED:
        table[name] = entry
    original, calls = engine.Trainer._launch, iter(range(1, 1000))

    def launch(trainer: engine.Trainer, *given: Any) -> engine.Launched:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(trainer, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Trainer, "_launch", launch)
        sys.exit(multitask_classifier.main(arguments))


@pytest.fixture(scope="module")
def moods(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of the four tasks."""
    folder = write_data(tmp_path_factory.mktemp("moods"))
    for split in ("train", "dev", "test"):
        header, *rows = (folder / TASKS["sst"].file_name(split)).read_text().splitlines()
        labelled = [row[:-1] + str(int(row[-1]) % 3) for row in rows] if split != "test" else rows
        lines = [header.replace("sentiment", "mood"), *labelled]
        (folder / MOOD.file_name(split)).write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def command(monkeypatch: Patch, tiny: Path, moods: Path) -> Command:
    """Everything is in its table; gives the arguments of a short run."""
    for table, name, entry in ADDED:
        monkeypatch.setitem(table, name, entry)

    def arguments(out: Path, flags: str, start: str = f"--model {tiny}") -> list[str]:
        return f"{start} --data {moods} --out {out} --device cpu --cache off --no-tensorboard {flags}".split()

    return arguments


def run(arguments: Sequence[str]) -> None:
    assert multitask_classifier.main(arguments) == 0


def tensors(out: Path, name: str = "last/model.safetensors") -> dict[str, Tensor]:
    return load_file(out / name)


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.usefixtures("command")
def test_everything_added_has_its_flags_and_help(moods: Path) -> None:
    shown = make_parser().format_help()
    for _, name, _ in ADDED[1:]:
        assert name in shown
    for way, flag, _ in ENTRIES:
        assert f"  {flag} " in shown and (f"  {way} " in shown or " " in way)
    assert "how far a step moves the averages (default 0.5)" in shown
    assert parse(["--data", str(moods)]).tasks[-1] == "mood"


@pytest.mark.usefixtures("command")
@pytest.mark.parametrize(("way", "flag", "value"), ENTRIES)
def test_a_parameter_without_its_method_or_outside_its_limits_is_one_line(way: str, flag: str, value: str) -> None:
    with pytest.raises(FlagError) as error:
        parse([flag, value])
    assert str(error.value) == f"{flag}: expected only with {way}"
    with pytest.raises(FlagError) as error:
        parse([*way.split(), flag, "0"])
    assert str(error.value).startswith(f"{flag} 0") and "\n" not in str(error.value)


@pytest.mark.parametrize(("way", "flag", "value"), ENTRIES)
def test_it_and_its_parameter_change_a_training_step(
    way: str, flag: str, value: str, command: Command, tmp_path: Path
) -> None:
    """With the treatment only the second step has averages that depend on the rate."""
    found, base = [], "--pretrain_epochs 0 --epochs 1 --steps_per_epoch 2 --batch_size 8 --draws_per_step 8"
    for number, flags in enumerate(("", way, f"{way} {flag} {value}")):
        run(command(tmp_path / str(number), f"{base} {flags}"))
        weights = tensors(tmp_path / str(number))
        found.append({name: value for name, value in weights.items() if name.startswith("bert.")})
    assert not same(found[0], found[1]) and not same(found[1], found[2])


def test_killed_in_both_stages_and_resumed_it_equals_the_undisturbed_run(command: Command, tmp_path: Path) -> None:
    flags = f"{EVERYTHING} --epochs 2 --pretrain_epochs 2 --steps_per_epoch 3 --batch_size 8 --save_every 2 --lr 1e-3"
    whole, out = tmp_path / "whole", tmp_path / "run"
    run(command(whole, flags))
    for number, arguments in ((4, command(out, flags)), (3 + 4, ["--resume", str(out)])):  # the fourth step of a stage
        process = server().Process(target=main_killed_at, args=(number, arguments))
        process.start()
        process.join(300)
        assert process.exitcode == -signal.SIGKILL
    run(["--resume", str(out)])
    for name in ("last/model.safetensors", "best/model.safetensors", "last/trainer.safetensors"):
        assert same(tensors(out, name), tensors(whole, name)), name
    state = tensors(out, "last/trainer.safetensors")
    assert not state["treatment.norms"].eq(1).any() and state["regularizer.0.mean"].any()


def test_its_checkpoint_is_tested_and_predicts_and_is_refused_with_other_parameters(
    command: Command, tmp_path: Path, capsys: Capture
) -> None:
    out, start = tmp_path / "run", f"--checkpoint {tmp_path / 'run'}"
    run(command(out, f"{EVERYTHING} --epochs 1 --pretrain_epochs 0 --steps_per_epoch 2"))
    run(command(tmp_path / "test", "--option test", start))
    name = "predictions/mood-test-output.csv"
    assert (tmp_path / "test" / name).read_bytes() == (out / name).read_bytes()
    (tmp_path / "texts").write_text("a good film\nbad\n")
    capsys.readouterr()
    run(f"--option predict {start} --task mood --input {tmp_path / 'texts'} --device cpu".split())
    assert [line.split("\t")[0] in ("0", "1", "2") for line in capsys.readouterr().out.splitlines()] == [True, True]
    for other in ("--head mood=scaled --scaled_factor 9", "--bottleneck --bottleneck_size 9"):
        assert multitask_classifier.main(command(tmp_path / "other", other, start)) == 2
        assert "the flags ask for" in capsys.readouterr().err
