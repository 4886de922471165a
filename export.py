"""`--option export`: the model of a run as files for a phone, with the proof of what they give.

The folder is written beside its place and renamed: whatever goes wrong, nothing half-written has its name.
"""

import importlib.util
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoints import TOKENIZER_FILES, checkpoint_folder
from config import Config
from console import Console
from datasets import TokenizedRows, Tokenizer, data_folder, read_examples, tokenize
from evaluation import Precision, mean_score, predict_all
from onnx_graph import answer, answers, decoded, open_session, write_graph, write_smaller
from predictor import Predictor, load
from run_record import CONFIG, read_json, write_json
from tasks import TASKS

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
FLOAT, BATCH_SIZE = "model.onnx", 32
SMALLER = {"model.int8.onnx": 8, "model.small.onnx": 4}  # and the bits of the numbers in their tables


class ExportError(ValueError):
    """There can be no export; the message is one line for the user."""


def export(config: Config, console: Console) -> int:
    """Writes the folder and shows what is in it. Returns the exit status."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ExportError(
            f"--option export: {', '.join(missing)} not installed: pip install -r requirements-export.txt"
        )
    target = Path(config.out or Path(config.checkpoint) / "export")
    if os.path.lexists(target):
        raise ExportError(f"--out {target}: exists already, expected a new directory")
    predictor = load(config.checkpoint, "cpu", max_length=config.max_length)
    dev = dev_rows(config, predictor)
    beside = target.with_name(target.name + ".tmp")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        report = write_files(beside, checkpoint_folder(Path(config.checkpoint)), predictor, dev)
        os.rename(beside, target)
    except OSError as error:
        raise ExportError(f"--out {target}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    console.say(format_report(report))
    console.say(f"\nthe files are in {target}")
    return 0


def dev_rows(config: Config, predictor: Predictor) -> dict[str, TokenizedRows]:
    """The dev rows of the run's data, or of `--data`."""
    record = Path(config.checkpoint) / CONFIG
    folder = data_folder(config.data or (read_json(record).get("data") if record.is_file() else None) or "sample")
    files = {task: read_examples(TASKS[task].path("dev", folder), TASKS[task], True) for task in predictor.tasks}
    cpu = torch.device("cpu")
    return {task: tokenize(TASKS[task], file.examples, predictor.tokenizer, cpu) for task, file in files.items()}


def write_files(folder: Path, source: Path, predictor: Predictor, dev: Mapping[str, TokenizedRows]) -> dict[str, Any]:
    """Writes everything into an empty folder. Returns report.json."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    Tokenizer(folder, predictor.tokenizer.max_length)  # raises for one that is not whole
    labels = {task: describe(task, predictor) for task in predictor.tasks}
    write_json(folder / "labels.json", {"max_length": predictor.tokenizer.max_length, "tasks": labels})
    logits = predict_all(predictor.model, dev, BATCH_SIZE, Precision(torch.device("cpu")))
    program = {task: answer(TASKS[task].output, of).numpy() for task, of in logits.items()}
    write_graph(predictor.model, folder / FLOAT)
    report = {"program": compare(program, program, dev)}
    for name, bits in {FLOAT: 32, **SMALLER}.items():
        if name in SMALLER:
            write_smaller(folder / FLOAT, folder / name, bits)
        session, size = open_session(folder / name), BATCH_SIZE if name == FLOAT else 1
        found = {task: answers(session, task, rows.tokens, size) for task, rows in dev.items()}
        report[name] = {"bytes": (folder / name).stat().st_size, **compare(found, program, dev)}
    write_json(folder / "report.json", report)
    return report


def describe(task: str, predictor: Predictor) -> dict[str, Any]:
    """What labels.json says of a task: its texts, and what its output is."""
    output, is_split = TASKS[task].output, predictor.model.layout.is_split(task)
    kind = "score" if output.num_classes is None else "probability" if output.num_outputs == 1 else "probabilities"
    columns = list(TASKS[task].text_columns)
    return {
        "title": TASKS[task].title,
        "texts": columns,
        "two_sequences": is_split,
        "output": kind,
        "labels": output.allowed,
    }


def compare(
    found: Mapping[str, np.ndarray], program: Mapping[str, np.ndarray], dev: Mapping[str, TokenizedRows]
) -> dict[str, Any]:
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


def format_report(report: Mapping[str, Any]) -> str:
    """The table: size, scores and the mean of each form, and what lies farthest from the program."""
    tasks = [task for task in report["program"]["dev"] if task != "mean"]
    lines = [
        f"{'':<18}{'MB':>7}{''.join(f'{task:>8}' for task in (*tasks, 'mean'))}{'largest difference':>20}{'changed':>9}"
    ]
    for name, of in report.items():
        size = f"{of['bytes'] / 1e6:.1f}" if "bytes" in of else ""
        scores = [of["dev"][task][TASKS[task].output.selection_metric] for task in tasks] + [of["dev"]["mean"]]
        ends = f"{max(of['largest_difference'].values()):>20.1e}{sum(of['changed_classes'].values()):>9}"
        lines.append(f"{name:<18}{size:>7}{''.join(f'{score:>8.4f}' for score in scores)}{ends}")
    return "\n".join(lines)
