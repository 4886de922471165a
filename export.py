"""`--option export`: the model of a run as files for a phone, with the proof of what they give.

The folder is written beside its place and renamed: whatever goes wrong, nothing half-written has its name.
"""

import filecmp
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from checkpoints import TOKENIZER_FILES, checkpoint_folder
from config import Config
from console import Console
from datasets import SAMPLE, DataFile, TokenizedRows, Tokenizer, data_folder, read_examples, tokenize
from evaluation import Precision, predict_all
from onnx_graph import answer, one_task, write_graph
from onnx_proof import FLOAT, PROGRAM, ProofError, compare, losses, measure_memory, measure_times, prove, write_within
from predictor import Predictor, load
from run_record import CONFIG, read_json, run_of, write_json
from tasks import TASKS
from vocabulary import VocabularyError, kept_pieces, without_others

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
INT8, BATCH_SIZE = "model.int8.onnx", 32
SMALLER = {
    INT8: (8, 1),
    "model.small.onnx": (4, 2),
}  # bits in their tables, how many --max_loss it may lose

EXPLAINED = {  # in labels.json, for whoever has nothing but the folder
    "inputs": "whole numbers of (sequences, places), 0 where nothing is said",
    "rows": "one at a time and not padded, a file in eight bits answers as it was tried: padding and other rows beside "
    "it move its answers a little",
    "input_ids": "tokenizer.json's of each text, without its special tokens, between special_tokens for so many texts",
    "attention_mask": "1 at each of input_ids, special ones included",
    "token_type_ids": "1 at those of the second text and the special tokens behind it; with two_sequences 0",
    "two_sequences": "a row is two sequences, each with one of its texts",
    "max_length": "input_ids of a sequence at most, which tokenizer.json does not see to: as long as there are more, "
    "the longer text loses its last, of two as long the second",
    "probability": "of the second class",
}
Texts = Callable[[Tokenizer], Mapping[str, TokenizedRows]]  # the rows of a split, by a tokenizer


class ExportError(ValueError):
    """There can be no export; the message is one line for the user."""


def export(config: Config, console: Console) -> int:
    """Writes the folder and shows what is in it. Returns the exit status."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ExportError(
            f"--option export: {', '.join(missing)} not installed: pip install -r requirements-export.txt"
        )
    from reports.export_report import draw, ended, show, write_card

    whole = run_of(Path(config.checkpoint))
    target = Path(config.out or whole / "export")
    if os.path.lexists(target):
        raise ExportError(f"--out {target}: exists already, expected a new directory")
    run = None if Path(config.checkpoint) == whole / "last" else ended(whole)
    predictor = load(config.checkpoint, "cpu", max_length=config.max_length)
    folder = _data_of(config)
    files = {split: _read(folder, predictor, split) for split in ("train", "dev")}
    texts: dict[str, Texts] = {split: partial(_tokenized, of) for split, of in files.items()}
    console.say(f"{target}: a file in float32 and smaller ones, each tried on every dev row; that takes minutes")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{target.name}.", dir=target.parent) as place:
            beside = Path(place) / target.name
            beside.mkdir()
            report, failures = write_files(beside, config, predictor, texts, console.say)
            read = {TASKS[task].file_key("dev"): file for task, file in files["dev"].items()}
            sums = {key: {"rows": len(file.examples), "sha256": file.sha256} for key, file in read.items()}
            report[PROGRAM] |= {"data": "sample" if folder == SAMPLE else folder.name, "data_files": sums}
            write_json(beside / "report.json", report)
            draw(report, beside / "report.png")
            if run:
                write_card(beside, run, report)
            os.rename(beside, target)
    except (VocabularyError, ProofError) as error:
        raise ExportError(str(error)) from None
    except OSError as error:
        raise ExportError(f"--out {target}: cannot be written ({error.strerror or error})") from None
    console.say(show(report))
    console.say(f"the files are in {target}")
    if INT8 in failures:
        raise ExportError(*failures.values())
    for line in failures.values():
        console.say(line)
    return 0


def _data_of(config: Config) -> Path:
    """The folder of `--data`, or of the run's data."""
    record = run_of(Path(config.checkpoint)) / CONFIG
    return data_folder(config.data or (read_json(record).get("data") if record.is_file() else None) or "sample")


def _read(folder: Path, predictor: Predictor, split: str) -> dict[str, DataFile]:
    return {task: read_examples(TASKS[task].path(split, folder), TASKS[task], True) for task in predictor.tasks}


def _tokenized(files: Mapping[str, DataFile], tokenizer: Tokenizer) -> dict[str, TokenizedRows]:
    cpu = torch.device("cpu")
    return {task: tokenize(TASKS[task], file.examples, tokenizer, cpu) for task, file in files.items()}


def write_files(
    folder: Path, config: Config, predictor: Predictor, texts: Mapping[str, Texts], say: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Writes models, tokenizer and labels into an empty folder, and proves the models.

    Returns what was found, and a line for each smaller form that is not there: it loses too much, or is another one.
    """
    source, tokenizer, model = checkpoint_folder(Path(config.checkpoint)), predictor.tokenizer, predictor.model
    rows = texts["dev"](tokenizer)
    logits = predict_all(model, rows, BATCH_SIZE, Precision(torch.device("cpu")))
    program = {task: answer(TASKS[task].output, of).numpy() for task, of in logits.items()}
    report: dict[str, Any] = {PROGRAM: compare(program, program, rows)}
    failures: dict[str, str] = {}
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    tokenizer.save(folder / "tokenizer.json")
    if config.vocabulary == "data":
        pieces = model.encoder.config.vocab_size
        kept = kept_pieces(folder, [of.tokens.ids for of in texts["train"](tokenizer).values()])
        model = without_others(model, folder, kept)
    tokenizer = Tokenizer(folder, tokenizer.max_length, tokenizer.is_siamese)  # raises for one that is not whole
    rows = texts["dev"](tokenizer)
    labels = {task: describe(task, predictor) for task in predictor.tasks}
    around = {"max_length": tokenizer.max_length, "special_tokens": tokenizer.special_tokens}
    what = {"explained": EXPLAINED, **around, "tasks": labels}
    write_json(folder / "labels.json", what)

    write_graph(model, folder / FLOAT)
    report[FLOAT] = prove(folder / FLOAT, BATCH_SIZE, program, rows)
    if config.vocabulary == "data":
        report[FLOAT] |= {"max_loss": config.max_loss, "vocabulary": {"kept": len(kept), "pieces": pieces}}
    say(f"{FLOAT}: tried on every dev row")
    lost, task = max((loss, task) for task, loss in losses(report[FLOAT], report[PROGRAM]).items())
    if config.vocabulary == "data" and lost > config.max_loss:
        raise ExportError(
            f"--vocabulary data: {task} loses {lost:.4f} of its dev score, expected at most {config.max_loss:g} "
            "(--max_loss): too many words of the dev rows are in no training text"
        )
    for name, (bits, factor) in SMALLER.items():
        paths = folder / FLOAT, folder / name
        try:
            found = write_within(config.max_loss * factor, *paths, bits, report[PROGRAM], program, rows, say)
            say(f"{name}: tried on every dev row")
            if same := [of for of in SMALLER if of in report and filecmp.cmp(folder / of, folder / name, False)]:
                raise ProofError(f"{name}: the same as {same[0]}, no table of it is large enough for {bits} bits")
            report[name] = {**found, "max_loss": config.max_loss * factor}
        except ProofError as error:
            (folder / name).unlink()
            failures[name] = f"{error}; it was left out"
    say("milliseconds and memory, one model against several")
    for name, times in measure_times(predictor, [folder / name for name in report if name != PROGRAM]).items():
        report[name]["milliseconds"] = times
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for name in (of for of in report if of != PROGRAM):
            alone = [one_task(folder / name, Path(place) / f"{task}.onnx", task) for task in predictor.tasks]
            report[name]["memory"] = measure_memory([folder / name])
            size = sum(path.stat().st_size for path in alone)
            report[name]["separate"] = {"bytes": size, "memory": measure_memory(alone)}
    return report, failures


def describe(task: str, predictor: Predictor) -> dict[str, Any]:
    """What labels.json says of a task: its texts, and what its output is."""
    output, is_split = TASKS[task].output, predictor.model.layout.is_split(task)
    kind = "score" if output.num_classes is None else "probability" if output.num_outputs == 1 else "probabilities"
    return {
        "title": TASKS[task].title,
        "texts": list(TASKS[task].text_columns),
        "two_sequences": is_split,
        "output": kind,
        "classes": list(output.class_names),
        "scale": output.scale,
    }
