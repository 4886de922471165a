"""Several processes: together they compute what one does, send little, and end together.

They are forked by helpers.forked and find in their environment what torchrun would have put there.
"""

import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_command import Runs, assert_same_run, main_with_signal, read, run, runs
from test_wiring import PAL, make_run
from torch import Tensor
from torch.distributed import TCPStore, is_initialized
from torch.distributed.run import get_args_parser

import engine
import run as running
from config import make_parser
from distributed import ALONE, VARIABLES, LostProcess, ProcessGroup, _reaching_others
from engine import Trainer
from evaluation import Precision, predict_logits
from flat_parameters import FlatParameters
from helpers import ROOT, Capture, Patch, forked
from messages import resume_command

__all__ = ["runs"]  # a fixture
NUM_STEPS = 5
SIZES = (2, 4)
CPU = torch.device("cpu")
STORES: list[TCPStore] = []  # they end with their objects


# ------------------------------------------------------------------------------------------------- the processes


def start(size: int, log: Path, function: Callable[..., Any], *args: Any) -> list[BaseProcess]:
    """A group of processes that call a function each, with its rank before the arguments. Its store is in this one, as
    it is in torchrun's."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    STORES.append(store)
    return [forked(log, enter, rank, size, store.port, function, args) for rank in range(size)]


def enter(rank: int, size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    values = (rank, size, rank, size, "127.0.0.1", port)
    os.environ.update(zip(VARIABLES, map(str, values), strict=True), TORCHELASTIC_USE_AGENT_STORE="True")
    function(rank, *args)


def statuses(group: list[BaseProcess], log: Path, seconds: float = 60) -> list[int | None]:
    """How the processes ended."""
    deadline = time.monotonic() + seconds
    for process in group:
        process.join(max(0.0, deadline - time.monotonic()))
    found = [process.exitcode for process in group]
    for process in group:
        process.kill()
    assert None not in found, f"processes hang: {log.read_text()}"
    return found


# ------------------------------------------------------------------------------------------- what one process computes

EPSILON = 1e-4  # AdamW's own, 1e-8, makes a whole step of what is rounding alone
SPOILED = "--pcgrad --draws_per_step 5 --max_grad_norm 0 --lr 0.0005"
CASES = {
    "sum": "",
    "adapters": f"{PAL} --draws_per_step 3",
    "pcgrad": f"--pcgrad --draws_per_step 5 {PAL}",
    "pcgrad, layer": "--pcgrad --draws_per_step 5 --granularity layer --gradient_scale own",
    "gradvac": "--gradvac --gradvac_beta 0.3 --draws_per_step 5",
    "no accumulation": "--pcgrad --draws_per_step 3 --accumulation_steps 1",
    "fewer rows than processes": "--pcgrad --draws_per_step 3 --accumulation_steps 1 --batch_size 3",
    "smart": "--smart --bregman --bregman_weight 30 --pcgrad --draws_per_step 4",
    "own layers, average": "--rdrop --copy_top_layers 1 --average ema --ema_decay 0.2 --draws_per_step 4",
    "siamese": f"--pooling mean --pairs siamese {PAL} --gradvac --draws_per_step 4",
    "adapters alone": f"{PAL} --train pal --draws_per_step 2",
    "frozen": "--option pretrain --head mlp",
    "frozen, lstm": "--option pretrain --head lstm --lstm_size 5",
    "to be spoiled": SPOILED,
}
if find_spec("torchjd"):
    CASES |= {
        "UPGrad": "--treatment UPGrad --draws_per_step 4",
        "UW": "--treatment UW --gradient_scale own --draws_per_step 4",
    }


def make_trainer(flags: str, processes: ProcessGroup, width: int = 16) -> Trainer:
    """Of the last stage of a run."""
    made = make_run(f"--warmup 0 {flags}", width=width)
    made.processes = processes
    made.model.float()
    for rows in (*made.data.train.values(), *made.data.dev.values()):
        rows.labels = rows.labels.astype(np.float32)
    return made.make_trainer(len(made.stages) - 1)


def model_of(trainer: Trainer) -> Any:
    return getattr(trainer.model, "model", trainer.model)


def take_steps(trainer: Trainer, first: int = 0, last: int = NUM_STEPS) -> dict[str, Tensor]:
    """The model's parameters after the steps, and what else a checkpoint holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ops.adamw.EPSILON", EPSILON)
        for step in range(first, last):
            trainer.take_step(1 + step // trainer.stage.steps_per_epoch, step)
    parameters = {name: value.detach().clone() for name, value in model_of(trainer).named_parameters()}
    return parameters | {name: value.clone() for name, value in trainer.state_tensors().items()}


def halfway(trainer: Trainer) -> dict[str, Any]:
    """A checkpoint after three steps."""
    take_steps(trainer, last=3)
    trainer.progress.step = 3
    tensors = {name: value.clone() for name, value in trainer.state_tensors().items()}
    return {"model": model_of(trainer).state_dict(), "tensors": tensors, "progress": asdict(trainer.progress)}


def taken_up(trainer: Trainer, saved: dict[str, Any]) -> dict[str, Tensor]:
    """What the other two steps give."""
    model_of(trainer).load_state_dict(saved["model"])
    trainer.load_state(saved["tensors"], saved["progress"])
    return take_steps(trainer, first=3)


# ------------------------------------------------------------------------------ what would be wrong, and be noticed


def project_before_reducing(trainer: Trainer, patch: Patch) -> None:
    """Each process treats the gradients of its rows, and the results are summed."""
    group, shared = trainer.processes, trainer.shared
    trainer.shared = FlatParameters(dict(zip(shared.names, shared._parameters, strict=True)), len(shared.gradients))
    trainer.segments = [trainer.shared.columns(set(shared.names))]
    add, combine = group.add, engine.combine
    patch.setattr(group, "begin_sum", lambda vector: None)
    patch.setattr(group, "add", lambda numbers: numbers if numbers.dim() == 3 else add(numbers))
    patch.setattr(engine, "combine", lambda gradients, *how: (combine(gradients, *how), add(gradients[0])))


def draw_the_same_rows(trainer: Trainer, patch: Patch) -> None:
    """Every process takes the rows of the first."""
    size = trainer.processes.size
    patch.setattr(trainer.processes, "share", lambda rows, before=0: rows[-before % size :: size])


def leave_heads_unreduced(trainer: Trainer, patch: Patch) -> None:
    """The gradients of heads stay those of each process's rows."""
    add, heads = trainer.processes.add, {own.gradients.data_ptr() for own in trainer.own.values()}
    patch.setattr(trainer.processes, "add", lambda numbers: numbers if numbers.data_ptr() in heads else add(numbers))


WRONG = {
    "projected before reduced": project_before_reducing,
    "the same rows": draw_the_same_rows,
    "heads not reduced": leave_heads_unreduced,
}


# ---------------------------------------------------------------------------------------- what several compute


def compute(rank: int, folder: Path) -> None:
    """All that the tests of a group compare, into a file."""
    group = ProcessGroup.join()
    found: dict[str, Any] = {name: take_steps(make_trainer(flags, group)) for name, flags in CASES.items()}
    for name, spoil in WRONG.items():
        with pytest.MonkeyPatch.context() as patch:
            trainer = make_trainer(SPOILED, ProcessGroup(group.rank, group.size))
            spoil(trainer, patch)
            found[name] = take_steps(trainer)
    found["out of memory"] = take_steps(short_of_memory(make_trainer(CASES["pcgrad"], group), rank == 1))
    found["overflow"] = overflow(make_trainer("--amp fp16 --pcgrad", group), rank == 1)
    found["taken up"] = taken_up(make_trainer(CASES["gradvac"], group), torch.load(folder / "halfway.pt"))
    found["halfway"] = halfway(make_trainer(CASES["gradvac"], group))
    found["predictions"] = predictions(group)
    found["sent"] = bytes_of_a_step(group)
    found["told"] = group.greatest(10 + rank), group.of_first(f"of {rank}"), group.is_first_to_tell()
    torch.save(found, folder / f"{group.size}-{rank}.pt")


def short_of_memory(trainer: Trainer, is_short: bool) -> Trainer:
    """A pass of more than two rows has no memory in some of the processes."""
    take = trainer._take_pass

    def take_or_fail(key: engine.PassKey, *inputs: Tensor) -> Tensor:
        if is_short and key[1] > 2:
            raise torch.OutOfMemoryError
        return take(key, *inputs)

    trainer._take_pass = trainer._pass_on_device = take_or_fail  # type: ignore[method-assign]
    return trainer


def overflow(trainer: Trainer, is_here: bool) -> tuple[list[str], Any]:
    """What a step with an infinite gradient in some process moves, and what it says of itself."""
    take = trainer._take_pass

    def take_and_spoil(*inputs: Any) -> Tensor:
        losses = take(*inputs)
        trainer.shared.gradients[:, 40] += torch.inf if is_here else 0
        return losses

    before = {name: value.clone() for name, value in trainer.state_tensors().items()}
    trainer._take_pass = take_and_spoil
    record = trainer.take_step(1, 0)
    after = trainer.state_tensors()
    return [name for name, value in before.items() if not torch.equal(after[name], value)], record.get("skipped")


def predictions(group: ProcessGroup) -> dict[str, Tensor]:
    """Logits of rows of different lengths, also of fewer rows than there are processes."""
    made = make_run("")
    made.model.float()
    rows = {**made.data.train, "few": made.data.dev["sst"].select(np.arange(3))}
    precision = Precision(CPU)
    return {
        name: predict_logits(made.model, of.task.name, of, 2, precision, processes=group) for name, of in rows.items()
    }


def bytes_of_a_step(group: ProcessGroup) -> tuple[int, int]:
    """What this process writes in a step of three tasks, and for all-reducing the gradient of each."""
    trainer = make_trainer("--pcgrad --draws_per_step 3", group, width=192)
    written = [bytes_written()]
    trainer.take_step(1, 0)
    written.append(bytes_written())
    for gradient in trainer.shared.gradients:
        group.add(gradient)
    for own in trainer.own.values():
        group.add(own.gradients[0])
    written.append(bytes_written())
    return written[1] - written[0], written[2] - written[1]


def bytes_written() -> int:
    """By this process so far, to sockets too."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    """What one process computes."""
    return {name: take_steps(make_trainer(flags, ALONE)) for name, flags in CASES.items()}


@pytest.fixture(scope="module", params=SIZES)
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of some processes has found."""
    folder = tmp_path_factory.mktemp("several")
    torch.save(halfway(make_trainer(CASES["gradvac"], ALONE)), folder / "halfway.pt")
    group = start(request.param, folder / "log", compute, folder)
    assert statuses(group, folder / "log", 180) == [0] * request.param, (folder / "log").read_text()
    return [torch.load(folder / f"{request.param}-{rank}.pt") for rank in range(request.param)]


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], most: float = 1e-6) -> None:
    assert greatest_difference(found, expected) < most


def greatest_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - value).abs().max()) for name, value in expected.items() if value.numel())


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_one_process(case: str, several: list[dict[str, Any]], one: dict[str, Any]) -> None:
    for found in several:
        assert_equal(found[case], one[case])
        assert all(torch.equal(value, several[0][case][name]) for name, value in found[case].items())


@pytest.mark.parametrize("case", WRONG)
def test_the_comparison_would_notice(case: str, several: list[dict[str, Any]], one: dict[str, Any]) -> None:
    differences = [greatest_difference(found[case], one["to be spoiled"]) for found in several]
    assert max(differences) > 1e-4


def test_out_of_memory_in_one_process_halves_the_passes_of_all(several: list[dict[str, Any]], one: Any) -> None:
    for found in several:
        assert_equal(found["out of memory"], one["pcgrad"])


def test_an_overflow_in_one_process_is_one_of_all(several: list[dict[str, Any]]) -> None:
    for found in several:
        assert found["overflow"] == (["scaler.scale"], "overflow")


def test_a_checkpoint_is_taken_up_by_another_number_of_processes(several: list[dict[str, Any]], one: Any) -> None:
    for found in several:
        assert_equal(found["taken up"], one["gradvac"])
    assert_equal(taken_up(make_trainer(CASES["gradvac"], ALONE), several[1]["halfway"]), one["gradvac"])


def test_predictions_are_gathered_in_order(several: list[dict[str, Any]]) -> None:
    expected = predictions(ALONE)
    for found in several:
        assert_equal(found["predictions"], expected, 1e-5)


def test_a_step_sends_as_much_as_it_must(several: list[dict[str, Any]]) -> None:
    """T vectors are reduced and scattered, half the way of an all-reduce, and one is gathered, the other half."""
    of_step, of_all_reduces = (sum(found["sent"][i] for found in several) for i in (0, 1))
    assert of_all_reduces > 1e6
    assert of_step / of_all_reduces < 1.02 * (3 + 1) / (2 * 3)


def test_rows_are_divided_evenly_task_after_task() -> None:
    counts, before, size = (5, 1, 1, 6), 0, 4
    shares: list[list[int]] = [[] for _ in range(size)]
    for count in counts:
        parts = [ProcessGroup(rank, size).share(np.arange(count), before) for rank in range(size)]
        assert sorted(np.concatenate(parts)) == [*range(count)]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        for share, part in zip(shares, parts, strict=True):
            share.extend(part)
        before += count
    assert sorted(map(len, shares)) == [3, 3, 3, 4]


def test_each_pass_of_each_process_has_a_dropout_of_its_own() -> None:
    rows = {"sst": np.arange(17), "sts": np.arange(9)}
    trainers = [make_trainer("--batch_size 3", ProcessGroup(rank, 3)) for rank in range(3)]
    seeds = [part.seed for of in trainers for part in of._passes(rows, dict.fromkeys(rows, 1.0), 0)]
    assert len(set(seeds)) == len(seeds) > 6


def test_processes_agree(several: list[dict[str, Any]]) -> None:
    greatest, texts, tellers = zip(*(found["told"] for found in several), strict=True)
    assert set(greatest) == {10 + len(several) - 1} and set(texts) == {"of 0"} and sum(tellers) == 1


class Gone:
    """A store whose process has ended."""

    def add(self, key: str, amount: int) -> int:
        raise RuntimeError


def test_one_on_each_machine_tells_when_the_store_is_gone() -> None:
    tellers = [ProcessGroup(rank, 4, rank % 2, 2, Gone()).is_first_to_tell() for rank in range(4)]
    assert tellers == [False, True, False, True]


def test_what_torch_says_of_another_process_is_told() -> None:
    found = r"cannot be reached \(Connection closed by peer \[127.0.0.1\]:9\)$"
    with pytest.raises(LostProcess, match=found), _reaching_others():
        raise RuntimeError("[/pytorch/gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:9")


# ----------------------------------------------------------------------------------------------------- the command


def command(rank: int, arguments: list[str], who: int, point: str, number: int, what: int) -> None:
    """The command without pictures, in which process `who` signals itself before call `number` of a point. {rank} in
    arguments stands for the process's own."""
    running.Run.draw_plots = lambda run, results: None  # type: ignore[method-assign]
    arguments = [part.replace("{rank}", str(rank)) for part in arguments]
    status = main_with_signal(arguments, point, number if rank == who else 0, what)
    sys.exit("the group has not ended" if status not in (1, 2) and is_initialized() else status)


def run_in_three(
    arguments: list[str], log: Path, who: int = 0, point: str = "step", number: int = 0, what: int = 0
) -> tuple[list[int | None], list[str]]:
    """How its processes ended, and what they have said."""
    group = start(3, log, command, arguments, who, point, number, what)
    return statuses(group, log), log.read_text().splitlines()


@pytest.fixture(scope="module")
def whole(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of three processes. Not to be changed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    found, said = run_in_three(runs.arguments(out, FLAGS), out.with_name("log"))
    assert found == [0, 0, 0] and sum(line.startswith("mean  ") for line in said) == 1, said
    return out


FLAGS = "--mlm_epochs 1 --pcgrad --bregman --average ema --save_every 2"


def test_a_run_of_several_processes_leaves_one_directory_like_any_other(whole: Path, runs: Runs) -> None:
    of_one = runs.whole(FLAGS)
    assert {path.name for path in whole.iterdir()} == {path.name for path in of_one.iterdir()}
    settings = [read(out / "config.json") for out in (whole, of_one)]
    assert [values["processes"] for values in settings] == [3, 1] and settings[0].keys() == settings[1].keys()


def test_torchrun_hands_on_every_flag_of_the_program() -> None:
    """As the documents call it, and as a stopped run says how to go on; --log without the two dashes is an error."""
    of_torchrun, flags = get_args_parser(), [*make_parser()._option_string_actions]
    documents = [(ROOT / name).read_text() for name in ("README.md", "docs/scale.md")]
    calls = [call for text in documents for call in re.findall(r"torchrun (-.*multitask_classifier\.py)\b", text)]
    assert len(calls) == 3
    for call in [*calls, resume_command("run", 8).removeprefix("torchrun ").removesuffix(" --resume=run")]:
        for flag in flags:
            parsed = of_torchrun.parse_args([*call.split(), flag, "value"])
            assert parsed.training_script == "multitask_classifier.py"
            assert parsed.training_script_args == [flag, "value"]


@pytest.mark.parametrize(("who", "point", "number"), [(2, "step", 12), (0, "rename", 9), (1, "evaluation", 8)])
def test_a_process_that_is_killed_ends_the_others_with_a_line_and_the_run_goes_on(
    who: int, point: str, number: int, runs: Runs, whole: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    found, said = run_in_three(runs.arguments(out, FLAGS), log, who, point, number, signal.SIGKILL)
    assert found == [-signal.SIGKILL if rank == who else 1 for rank in range(3)], said
    (line,) = [line for line in said if line.startswith("error:")]
    assert line.startswith("error: another process of this run has ended or cannot be reached (")
    assert line.endswith(f"); to go on: torchrun --nproc_per_node=3 -- multitask_classifier.py --resume={out}")
    assert run_in_three(["--resume", str(out)], log)[0] == [0, 0, 0]
    assert_same_run(out, whole)


def test_a_signal_to_one_process_stops_all_at_the_same_step(
    runs: Runs, whole: Path, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    found, said = run_in_three(runs.arguments(out, FLAGS), log, 1, "step", 13, signal.SIGTERM)
    assert found == [128 + signal.SIGTERM] * 3
    assert said[-1] == f"stopped; to go on: torchrun --nproc_per_node=3 -- multitask_classifier.py --resume={out}"
    assert sum(line.startswith("stopped") for line in said) == 1
    assert read(out / "last" / "trainer.json")["progress"]["step"] == 4  # of fine-tuning, behind nine others
    shutil.copytree(out, tmp_path / "alone")
    assert run_in_three(["--resume", str(out)], log)[0] == [0, 0, 0]
    assert_same_run(out, whole)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: pytest.fail("as many as each of three had"))
    run(["--resume", str(tmp_path / "alone")])
    assert "begun with 3 processes, going on with 1: the same rows" in capsys.readouterr().out


def test_what_is_wrong_with_the_flags_is_said_once(runs: Runs, whole: Path, tmp_path: Path) -> None:
    for arguments, expected in (
        (["--epochs", "-1"], "error: --epochs -1: expected"),
        (runs.arguments(whole), f"error: --out {whole}: exists already"),
        ([*runs.arguments(tmp_path / "run"), "--seed={rank}"], "error: process"),
        (["--option", "predict", "--checkpoint", str(whole), "--task", "sst"], "error: --option predict: 3 processes"),
    ):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        found, said = run_in_three(arguments, log)
        assert 2 in found and 0 not in found, said
        assert len(said) == 1 and said[0].startswith(expected), said
    assert not (tmp_path / "run").exists()
