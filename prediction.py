"""Predictions for new texts, line by line: what `--option predict` reads, writes and says of broken lines.

Line n of the output belongs to line n of the input; output is written chunk by chunk, as the input arrives.
"""

import codecs
import os
import select
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from messages import counted, discard_output
from predictor import Prediction, Predictor
from tasks import TASKS, Task

TEXTS_AT_A_TIME = 4096  # among so many texts batches of similar length are formed
BLOCK_BYTES = 1 << 16
LINE_BYTES = 1 << 20  # a longer line is broken
CHUNK_BYTES = 1 << 24
PATIENCE = 0.1  # seconds that a line from a pipe or a terminal waits for others to be predicted with
SIGPIPE_STATUS = 128 + 13

Write = Callable[[str], object]


class PredictionError(ValueError):
    """The input or the output cannot be used; the message is one line for the user."""


def predict_lines(
    make_predictor: Callable[[], Predictor], task: str, source: str, target: str, names: bool = False
) -> int:
    """Predicts the lines of a file into a file; "-" are the standard streams. Returns the exit status.

    names: the class of a line is followed by its name.
    Raises PredictionError before the model is loaded if the source cannot be read or the target exists.
    """
    if target != "-" and os.path.lexists(target):
        raise PredictionError(f"--output {target}: exists already, expected a new file")
    name = "standard input" if source == "-" else source
    try:
        file = FileIO(0, closefd=False) if source == "-" else FileIO(source)
    except OSError as error:
        raise PredictionError(f"--input {source}: {error.strerror}, expected a file with a text a line") from None
    if file.isatty():
        print("reading from the terminal, a text a line; Ctrl-D ends", file=sys.stderr)
    predictor = make_predictor()
    if task not in predictor.tasks:
        raise PredictionError(f"--task {task}: the checkpoint has heads for {', '.join(predictor.tasks)} only")
    try:
        with _output(target) as write:
            chunks = chunks_of_lines(file, name)
            num_broken = _predict_chunks(predictor, TASKS[task], chunks, name, write, names)
    except BrokenPipeError:
        return SIGPIPE_STATUS
    return 1 if num_broken else 0


def _predict_chunks(
    predictor: Predictor, task: Task, chunks: Iterable[list[bytes]], name: str, write: Write, names: bool
) -> int:
    """Writes a line for each line of the chunks; returns how many were broken, each told on standard error."""
    start, num_broken, cut = 1, 0, list[int]()
    for chunk in chunks:
        rows: dict[int, tuple[str, ...]] = {}
        for number, line in enumerate(chunk, start):
            try:
                rows[number] = texts_of_line(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, task)
            except ValueError as error:
                print(f"error: {name}:{number}: {error}", file=sys.stderr)
        cut += [number for number, texts in rows.items() if predictor.tokenizer.cuts(texts)]
        predicted = dict(zip(rows, predictor.predictions(task.name, list(rows.values())), strict=True))
        numbers = range(start, start + len(chunk))
        write("".join(output_line(predicted.get(number), task, names) for number in numbers))
        start, num_broken = start + len(chunk), num_broken + len(chunk) - len(rows)
    if cut:
        found = f"{counted(len(cut), 'line')} of more than {predictor.tokenizer.max_length} tokens, first line {cut[0]}"
        print(f"warning: {name}: {found}; what is beyond was not read", file=sys.stderr)
    return num_broken


def texts_of_line(line: bytes, task: Task) -> tuple[str, ...]:
    """The texts of a task on a line, one or a tab-separated pair. Raises ValueError with what is wrong."""
    expected = " <tab> ".join(task.text_columns)
    if len(line) > LINE_BYTES:
        raise ValueError(f"longer than {LINE_BYTES} bytes, expected {expected}")
    try:
        text = line.removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte 0x{line[error.start]:02x} is not valid UTF-8, expected UTF-8") from None
    if not text.strip():
        raise ValueError(f"the line is empty, expected {expected}")
    texts = tuple(text.split("\t"))
    if len(texts) != len(task.text_columns):
        raise ValueError(f"{counted(len(texts) - 1, 'tab')}, expected {len(task.text_columns) - 1}: {expected}")
    return texts


def output_line(prediction: Prediction | None, task: Task, names: bool = False) -> str:
    """The prediction as it stands in a prediction file; of a class, behind tabs, its probability and, with names, what
    it is called. None leaves them empty."""
    if task.output.num_classes is None:
        return "\n" if prediction is None else f"{task.output.format(prediction.value)}\n"
    if prediction is None:
        return "\t\t\n" if names else "\t\n"
    name = f"\t{task.output.class_names[int(prediction.value)]}" if names else ""
    return f"{task.output.format(prediction.value)}\t{prediction.probability:.6f}{name}\n"


def chunks_of_lines(file: FileIO, name: str) -> Iterator[list[bytes]]:
    """The lines of a file without their line feeds, in chunks. name: for the PredictionError if reading fails.

    A chunk of a regular file is full. From a pipe or a terminal it holds what came within PATIENCE of its first line.
    """
    is_regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    lines, rest, has_ended = list[bytes](), b"", False
    while lines or not has_ended:
        deadline, size = 0.0, 0
        while not has_ended and len(lines) < TEXTS_AT_A_TIME and (size < CHUNK_BYTES or not lines):
            if lines and not is_regular:
                deadline = deadline or time.monotonic() + PATIENCE
                patience = deadline - time.monotonic()
                if patience < 0 or not select.select([file], [], [], patience)[0]:
                    break
            try:
                block = os.read(file.fileno(), BLOCK_BYTES)
            except OSError as error:
                raise PredictionError(f"{name}: {error.strerror}") from None
            *new, rest = (rest + block).split(b"\n")
            rest = rest[: LINE_BYTES + 1]  # enough to see that the line is too long
            has_ended, size = not block, size + len(block)
            lines += [*new, rest] if has_ended and rest else new
        if lines:
            yield lines[:TEXTS_AT_A_TIME]
        lines = lines[TEXTS_AT_A_TIME:]


@contextmanager
def _output(target: str) -> Iterator[Write]:
    """Writes to standard output, or to a file that takes its name when it is whole and is gone if that fails."""
    beside = Path(f"{target}.tmp")
    try:
        if target == "-":
            yield lambda text: print(text, end="", flush=True)
            return
        with beside.open("w", encoding="utf-8") as file:
            yield file.write
        beside.rename(target)
    except OSError as error:
        if target == "-":  # whatever is left for it goes nowhere: Python would fail on it once more at its end
            discard_output()
        if isinstance(error, BrokenPipeError):
            raise
        raise PredictionError(f"--output {target}: {error.strerror}") from None
    finally:
        if target != "-":
            beside.unlink(missing_ok=True)
