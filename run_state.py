"""The state of a run that is to be resumed: what a checkpoint says besides the model, checked before any of it is used.

`last/` holds, beside the model in Hugging Face's format and the tokenizer:

    SHA256SUMS           of every other file in it
    trainer.json         SHAPE below: the stage, how much of metrics.jsonl belongs to it, seconds, and within a stage
                         engine.Progress (null between stages)
    trainer.safetensors  engine.Trainer.state_tensors, empty between stages:
        optimizer.V.{exp_avg,exp_avg_sq,step}  AdamW's moments of the vector V: shared, or own.TASK
        scaler.{scale,steps}                   of the loss under fp16
        treatment.K, regularizer.I.K           running averages of the treatment and of the I-th regularizer
        average.V, average.step                the averaged weights of --average ema
        best.V                                 frozen stage: the heads at its best epoch (fine-tuning's are in best/)

Nothing random is kept: every draw follows from the seed, the epoch and the step. Every file is compared with its
checksum, every setting with what its flag allows; engine.Trainer.load_state looks whether tensors and numbers are those
of the stage.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from config import Config, FlagError, checked, completed
from messages import command, machine_failure, shown
from model import Layout
from run_record import (
    CHECKSUM,
    CONFIG,
    GAP,
    METRICS,
    NUMBER,
    RunDirectory,
    RunError,
    checksum_problem,
    mismatch,
    read_file,
    read_json,
    settings_checksum,
    write_json,
    write_tensors,
)

FORMAT = 3  # of what `last/` holds besides the model
TENSORS, STATE = "trainer.safetensors", "trainer.json"
FILES = {"layout": {"format": int}, "data_files": {...: {"sha256": str}}, "processes": (None, int)}
SHAPE = {
    "stage": int,
    "metrics_size": int,
    "metrics_sha256": str,
    "seconds": {...: NUMBER},
    "best_epochs": {...: int},
    "conflicts": {...: {...: {...: NUMBER}}},
    "progress": (
        None,
        {
            **dict.fromkeys(("step", "closed_epochs", "micro_batch", "best_epoch"), int),
            **{"rows": {...: int}, "replays": bool, "ended": bool, "seconds": NUMBER, "loss_sum": NUMBER},
            **{"best_score": GAP, "conflicts": {...: {...: [NUMBER]}}},
        },
    ),
}


def saved_settings(directory: RunDirectory) -> tuple[Config, dict[str, Any]]:
    """The settings of a run, as its flags and as config.json holds them. Raises RunError if they are damaged."""
    path = directory.path / CONFIG
    saved = read_json(path)
    if mismatch(saved, FILES) or saved["layout"]["format"] != Layout({}).to_dict()["format"] or CHECKSUM not in saved:
        raise _of_another_version(directory, path)
    if saved[CHECKSUM] != settings_checksum(saved):
        raise RunError(f"{path}: not as it was written, expected the settings that the run began with")
    try:
        Layout.from_dict(saved["layout"], str(path))  # its tasks are known from here on
        return checked(completed(saved)), saved
    except FlagError as error:
        raise RunError(f"{path}: {'; '.join(error.args)}") from None


def read_state(directory: RunDirectory) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and numbers of the last checkpoint, none where there is no checkpoint yet. Raises RunError if anything
    in the directory that the rest of the run builds on is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    last, best = directory.last, directory.best
    if not last.exists():
        return {}, {}
    state = read_json(last / STATE)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise _of_another_version(directory, last / STATE)
    problem = checksum_problem(last) or (checksum_problem(best) if best.exists() else "")
    problem = problem or mismatch(state, SHAPE) or _log_problem(directory.path / METRICS, state)
    if problem:
        raise RunError(f"{directory.path}: its last checkpoint cannot be used: {problem}")
    try:
        return load_file(last / TENSORS), state
    except (SafetensorError, OSError) as error:
        raise RunError(f"{last / TENSORS}: not readable as safetensors ({shown(error)})") from None


def write_state(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """What `read_state` reads, beside a checkpoint: tensors as safetensors, the rest as JSON."""
    write_tensors(folder / TENSORS, tensors)
    write_json(folder / STATE, {"format": FORMAT, **state})


def _log_problem(path: Path, state: Mapping[str, Any]) -> str:
    try:
        kept = read_file(path)[: max(0, state["metrics_size"])]
    except OSError as error:
        return machine_failure(error)
    is_same = len(kept) == state["metrics_size"] and hashlib.sha256(kept).hexdigest() == state["metrics_sha256"]
    return "" if is_same else f"{path}: not as it was written"


def _of_another_version(directory: RunDirectory, path: Path) -> RunError:
    anew = command(f"--checkpoint={directory.path}")
    return RunError(
        f"{path}: not of a run of this version of the program, which alone can be resumed ({anew} starts a new run "
        "from its model)"
    )
