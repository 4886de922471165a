"""What exported models are worth: their answers to the dev rows, milliseconds, bytes on disk and in memory."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import onnx_answers
from datasets import TokenizedRows, TokenRows
from evaluation import mean_score
from onnx_answers import answers, example, feed, open_session
from onnx_graph import decoded, layers_of, write_smaller
from predictor import Predictor
from tasks import TASKS

LENGTHS, TURNS, FIRST_TURNS = (16, 32, 128), 60, 3  # tokens of a row that is timed; how often, and how often before
PROGRAM, FLOAT = "program", "model.onnx"
NUM_ROWS = 50  # of each task by which layers are compared

Rows = Mapping[str, TokenizedRows]
Answers = Mapping[str, np.ndarray]


class ProofError(ValueError):
    """A form is not worth enough; the message is one line for the user."""


def compare(found: Answers, program: Answers, dev: Rows) -> dict[str, Any]:
    """Scores of answers, and how far they lie from the program's: the largest difference, and changed classes."""
    scores, largest, changed = {}, {}, {}
    for task, rows in dev.items():
        output = TASKS[task].output
        predicted = decoded(output, found[task])
        scores[task] = output.scores(predicted.astype(np.float64), rows.labels)
        largest[task] = float(np.abs(found[task] - program[task]).max())
        if output.num_classes is not None:
            changed[task] = int((predicted != decoded(output, program[task])).sum())
    return {"dev": {**scores, "mean": mean_score(scores)}, "largest_difference": largest, "changed_classes": changed}


def prove(path: Path, batch_size: int, program: Answers, dev: Rows) -> dict[str, Any]:
    """A file's size, and what its answers to the dev rows are worth. Raises ProofError if some are no numbers."""
    session = open_session(path)
    found = {task: answers(session, task, rows.tokens, batch_size) for task, rows in dev.items()}
    for task, of in found.items():
        if num_bad := int((~np.isfinite(of)).reshape(len(of), -1).any(1).sum()):
            raise ProofError(f"{path.name}: its answers to {num_bad} of {len(of)} dev rows of {task} are not finite")
    return {"bytes": path.stat().st_size, **compare(found, program, dev)}


def losses(found: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, float]:
    """What a form loses of another's score, by task; 2 of 400 rows are .005, not a little more."""
    return {task: round(score_of(whole, task) - score_of(found, task), 9) for task in whole["dev"] if task != "mean"}


def score_of(found: Mapping[str, Any], task: str) -> float:
    """The score of a task, or the mean."""
    return float(found["dev"][task] if task == "mean" else found["dev"][task][TASKS[task].output.selection_metric])


def write_within(
    max_loss: float,
    source: Path,
    target: Path,
    table_bits: int,
    whole: Mapping[str, Any],
    program: Answers,
    dev: Rows,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Writes a smaller form. While a task loses more than max_loss, the layer that moves answers most stays in float.

    Raises ProofError if it loses more with all of them in float.
    """
    layers = layers_of(source)

    def attempt(in_float: Collection[str]) -> dict[str, Any]:
        write_smaller(source, target, table_bits, [name for layer in in_float for name in layers[layer]])
        found = prove(target, 1, program, dev)
        return found | {"in_float": list(in_float), "largest_loss": max(losses(found, whole).values())}

    found = attempt([])
    if found["largest_loss"] <= max_loss:
        return found
    say(f"{target.name}: a task loses {found['largest_loss']:.5f}, {max_loss:g} may be lost: which layers need floats?")
    if (least := attempt([*layers])["largest_loss"]) > max_loss:
        raise ProofError(
            f"{target.name}: a task loses {least:.4f} of its dev score, also with all layers in float; expected at "
            f"most {max_loss:g} (--max_loss)"
        )
    for layer in _by_movement(source, target, layers, program, dev):
        found = attempt([*found["in_float"], layer])
        say(f"{target.name}: {layer} stays in float: largest loss {found['largest_loss']:.5f}")
        if found["largest_loss"] <= max_loss:
            break
    return found


def _by_movement(
    source: Path, target: Path, layers: Mapping[str, Sequence[str]], program: Answers, dev: Rows
) -> list[str]:
    """Layers by how far each, made smaller alone, moves the answers to some rows, from the farthest on."""

    def movement(layer: str) -> float:
        write_smaller(source, target, 8, [name for other in layers if other != layer for name in layers[other]])
        session, moved = open_session(target), 0.0
        for task, rows in dev.items():
            some = range(min(NUM_ROWS, len(rows)))
            found = np.concatenate([session.run([task], feed(rows.tokens, [row]))[0] for row in some])
            moved += float(np.abs(found - program[task][: len(some)]).mean() / (program[task].std() or 1))
        return moved

    return sorted(layers, key=movement, reverse=True)


def measure_times(predictor: Predictor, paths: Sequence[Path]) -> dict[str, dict[str, dict[str, float]]]:
    """Of each file and of the program, by tokens of a row, the milliseconds to all answers: median, 99th percentile.

    One row at a time on one thread, in turns. The program is left out where its pairs are two sequences.
    """
    is_siamese = predictor.model.layout.is_siamese
    sessions = {path.name: open_session(path) for path in paths}
    found: dict[str, dict[str, dict[str, float]]] = {}
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for length in (of for of in LENGTHS if of <= predictor.model.encoder.config.num_positions):
        given = example(length // 2, 2) if is_siamese else example(length)
        ways: dict[str, Callable[[], Any]] = {} if is_siamese else {PROGRAM: _eager(predictor, given)}
        ways |= {name: partial(session.run, None, given) for name, session in sessions.items()}
        seconds = np.array([[_seconds(way) for way in ways.values()] for _ in range(FIRST_TURNS + TURNS)])
        median, slow = np.percentile(seconds[FIRST_TURNS:], [50, 99], axis=0) * 1000
        for name, *times in zip(ways, median, slow, strict=True):
            found.setdefault(name, {})[str(length)] = dict(zip(("median", "p99"), map(float, times), strict=True))
    torch.set_num_threads(num_threads)
    return found


def _seconds(way: Callable[[], Any]) -> float:
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


def _eager(predictor: Predictor, given: onnx_answers.Feed) -> Callable[[], Any]:
    """The program's own answers of all tasks to a row of one sequence."""
    ids, model, tasks = given["input_ids"][0], predictor.model.eval(), predictor.tasks
    length = np.array([len(ids)])
    rows = TokenizedRows(
        TASKS[tasks[0]], [""], np.zeros(1, np.float32), TokenRows(ids, length, length), torch.device("cpu")
    )

    @torch.inference_mode()
    def way() -> None:
        batch = rows.batch([0])
        if model.shares_passes:
            model.logits_of(tasks, batch)
        else:
            for task in tasks:
                model(task, batch)

    return way


def measure_memory(paths: Sequence[Path]) -> int | None:
    """Bytes that these models hold after each has answered once, in a process of their own; None without Linux."""
    if not Path("/proc/self/status").exists():
        return None
    command = [sys.executable, onnx_answers.__file__, *map(str, paths)]
    environment = {**os.environ, **onnx_answers.FREED_AT_ONCE}
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)
