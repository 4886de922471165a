"""Tasks from a TOML file (`--task_file`), and from the runs and checkpoints of such tasks, which hold their definition.

    [nli]
    title = "Entailment"
    files = { train = "nli-train.jsonl", dev = "nli-dev.jsonl" }
    texts = ["premise", "hypothesis"]
    label = "relation"
    kind = "classes"
    classes = ["entailment", "neutral", "contradiction"]

docs/tasks.md describes the keys. A definition joins TASKS; from there on nothing tells its task from the others.
"""

import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from messages import shown
from parameters import nearest
from run_record import read_file
from tasks import CLASS_METRICS, SPLITS, TASKS, Binary, Classes, Output, Score, Task
from tsv import DELIMITERS

RESERVED = ("mean", "mlm")  # a score beside those of the tasks, and a stage


class TaskFileError(ValueError):
    """A task file, or a task in a run or checkpoint, cannot be used; the message is one line for the user."""


@dataclass(frozen=True)
class Kind:
    """What `kind` allows. labels: the key that describes the labels. make: the output from that and the metric."""

    labels: str
    metrics: tuple[str, ...]
    make: Callable[[Any, str], Output]


KINDS = {
    "classes": Kind("classes", CLASS_METRICS, lambda names, metric: Classes(len(names), tuple(names), metric, True)),
    "binary": Kind(
        "classes", CLASS_METRICS, lambda names, metric: Binary(1, 2, tuple(names or Binary.class_names), metric, True)
    ),
    "score": Kind(
        "range", Score.metrics, lambda ends, metric: Score(float(ends[0]), float(ends[1]), selection_metric=metric)
    ),
}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def _are_names(value: Any, fewest: int, most: int) -> bool:
    """Whether it is a list of so many different texts."""
    return isinstance(value, list) and all(map(_is_text, value)) and fewest <= len(set(value)) == len(value) <= most


def _are_files(value: Any) -> bool:
    """Whether it is a table of files that can be read."""
    return isinstance(value, dict) and {"train", "dev"} <= {*value} <= {*SPLITS} and all(map(_is_text, value.values()))


def _is_range(value: Any) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2 and all(type(end) in (int, float) for end in value)
    return is_pair and all(map(math.isfinite, value)) and value[0] < value[1]


KEYS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # what is expected, and whether a value is that
    "title": ("a text", _is_text),
    "folder": ("a directory", _is_text),
    "files": ('{ train = "FILE", dev = "FILE", test = "FILE" }, or without test', _are_files),
    "texts": ("a list of one or two different columns", lambda value: _are_names(value, 1, 2)),
    "label": ("a column", _is_text),
    "id": ("a column", _is_text),
    "kind": (f"one of {', '.join(KINDS)}", lambda value: isinstance(value, str) and value in KINDS),
    "classes": ("a list of two or more different names", lambda value: _are_names(value, 2, 10_000)),
    "range": ("[LOW, HIGH], two numbers, the lower one first", _is_range),
    "metric": ("a text", _is_text),
    "delimiter": ("one character", lambda value: isinstance(value, str) and len(value) == 1 and value not in '\r\n"'),
    "prediction_header": ("a text", _is_text),
}
REQUIRED = ("files", "texts", "label", "kind")


def read_task_file(path: Path) -> list[Task]:
    """The tasks of a file, in its order. Raises TaskFileError for anything that is wrong."""
    try:
        content = tomllib.loads(read_file(path).decode())
    except OSError as error:
        raise TaskFileError(f"--task_file {path}: {error.strerror}, expected a TOML file") from None
    except (ValueError, RecursionError) as error:  # of TOML or UTF-8
        raise TaskFileError(f"--task_file {path}: not readable as TOML ({error})") from None
    if not content:
        raise TaskFileError(f"--task_file {path}: no tasks, expected a table [NAME] for each")
    return [_task(f"--task_file {path}: ", name, values, path.parent) for name, values in content.items()]


def add_task_file(path: Path) -> list[str]:
    """Its tasks join TASKS; returns their names. Raises TaskFileError."""
    tasks = read_task_file(path)
    for task in tasks:
        if task.name in TASKS and not TASKS[task.name].definition:
            raise TaskFileError(f"--task_file {path}: task {task.name} is built in, expected another name")
        TASKS[task.name] = task
    return [task.name for task in tasks]


def add_saved_tasks(layout: Any, where: str) -> None:
    """The tasks that a layout, as a run or checkpoint holds it, defines join TASKS, unless they are there.

    Raises TaskFileError where one is there whose labels mean something else.
    """
    saved = layout.get("tasks") if isinstance(layout, dict) else None
    for name, values in saved.items() if isinstance(saved, dict) else ():
        definition = values.get("definition") if isinstance(values, dict) else None
        if definition is not None:
            task = _task(f"{where}: ", name, definition, Path())
            known = TASKS.setdefault(name, task)
            if (known.output, len(known.text_columns)) != (task.output, len(task.text_columns)):
                raise TaskFileError(
                    f"{where}: task {name} is {_in_words(task)}, in use is {name} with {_in_words(known)}; "
                    "expected tasks of the same name to mean the same"
                )


def _in_words(task: Task) -> str:
    labels = task.output.class_names and ", ".join(task.output.class_names)
    return f"{len(task.text_columns)} texts, {labels or task.output.allowed}, by {task.output.selection_metric}"


def _task(where: str, name: str, values: Any, base: Path) -> Task:
    """The task of a definition. base: where relative folders begin. Raises TaskFileError."""
    if problem := next(_problems(name, values), ""):
        raise TaskFileError(f"{where}{problem}")
    kind, label = KINDS[values["kind"]], values["label"]
    folder = str((base / values.get("folder", "")).resolve())
    return Task(
        name,
        values.get("title", name),
        (values["files"]["train"], values["files"]["dev"], values["files"].get("test", "")),
        tuple(values["texts"]),
        label,
        kind.make(values.get(kind.labels), values.get("metric", kind.metrics[0])),
        values.get("prediction_header", f"Predicted_{label.title()}"),
        values.get("id", ""),
        values.get("delimiter", ""),
        folder,
        {**values, "folder": folder},
    )


def _problems(name: str, values: Any) -> Iterator[str]:
    """What is wrong with a definition, in lines."""
    if not re.fullmatch("[a-z][a-z0-9_]*", name) or name in RESERVED:
        yield f"task {shown(repr(name))}: expected a name of a-z, 0-9 and _ that is not {' or '.join(RESERVED)}"
    if not isinstance(values, Mapping):
        yield f"{name} is {shown(repr(values))}, expected a table [{name}] with {', '.join(REQUIRED)}"
        return
    for key in [key for key in values if key not in KEYS]:
        yield f"task {name}: unknown {shown(repr(key))}, expected {', '.join(KEYS)}{nearest(key, [*KEYS])}"
    for key in [key for key in REQUIRED if key not in values]:
        yield f"task {name}: no {key!r}, expected {KEYS[key][0]}"
    for key, (expected, is_allowed) in KEYS.items():
        if key in values and not is_allowed(values[key]):
            guess = nearest(values[key], [*KINDS]) if key == "kind" and isinstance(values[key], str) else ""
            yield f"task {name}: {key} is {shown(repr(values[key]))}, expected {expected}{guess}"
    kind = KINDS[values["kind"]]
    if kind.labels not in values and values["kind"] != "binary":
        yield f"task {name}: no {kind.labels!r}, expected {KEYS[kind.labels][0]}"
    if values["kind"] == "binary" and len(values.get("classes", "ab")) != 2:
        yield f"task {name}: {len(values['classes'])} classes, expected two for kind binary, the one for 0 first"
    for key in {"classes", "range"} - {kind.labels}:
        if key in values:
            yield f"task {name}: kind {values['kind']} has no {key!r}, expected {kind.labels!r}"
    if (metric := values.get("metric", kind.metrics[0])) not in kind.metrics:
        guess = nearest(metric, kind.metrics)
        yield f"task {name}: metric is {shown(repr(metric))}, expected one of {', '.join(kind.metrics)}{guess}"
    if values["label"] in values["texts"]:
        yield f"task {name}: column {values['label']!r} is text and label, expected different columns"
    for file in values["files"].values():
        if Path(file).suffix not in DELIMITERS and "delimiter" not in values:
            endings = ", ".join(DELIMITERS)
            yield f"task {name}: file {shown(repr(file))}, expected one that ends in {endings}, or a 'delimiter'"
