"""Predictions for new texts, line by line: what `--option predict` reads, writes and says of broken lines.

Line n of the output belongs to line n of the input. Input is read ahead by a thread while the model computes; output
is written chunk by chunk, as the input arrives.
"""

import codecs
import math
import os
import queue
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from predictor import TEXTS_AT_A_TIME, Prediction, Predictor
from tasks import TASKS, Task

BLOCK_BYTES = 1 << 16
READ_AHEAD = 16  # blocks
LINE_BYTES = 1 << 20  # a longer line is broken
CHUNK_BYTES = 1 << 24
PATIENCE = 0.1  # seconds that a line from a pipe or a terminal waits for others to be predicted with
SIGPIPE_STATUS = 128 + 13

Write = Callable[[str], object]


class PredictionError(ValueError):
    """The input or the output cannot be used; the message is one line for the user."""


def predict_lines(make_predictor: Callable[[], Predictor], task: str, source: str, target: str) -> int:
    """Predicts the lines of a file into a file; "-" are the standard streams. Returns the exit status.

    Raises PredictionError before the model is loaded if the source cannot be read or the target exists.
    """
    if target != "-" and os.path.lexists(target):
        raise PredictionError(f"--output {target}: exists already, expected a new file")
    name, lines = _open_input(source)
    predictor = make_predictor()
    if task not in predictor.tasks:
        raise PredictionError(f"--task {task}: the checkpoint has heads for {', '.join(predictor.tasks)} only")
    try:
        with _output(target) as write:
            num_broken = _predict_chunks(predictor, TASKS[task], lines.chunks(), name, write)
    except BrokenPipeError:
        _forget_output()
        return SIGPIPE_STATUS
    return 1 if num_broken else 0


def _predict_chunks(predictor: Predictor, task: Task, chunks: Iterable[list[bytes]], name: str, write: Write) -> int:
    """Writes a line for each line of the chunks; returns how many were broken, each told on standard error."""
    start, num_broken = 1, 0
    for chunk in chunks:
        rows: dict[int, tuple[str, ...]] = {}
        for number, line in enumerate(chunk, start):
            try:
                rows[number] = texts_of_line(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, task)
            except ValueError as error:
                print(f"error: {name}:{number}: {error}", file=sys.stderr)
        predicted = dict(zip(rows, predictor.predictions(task.name, list(rows.values())), strict=True))
        numbers = range(start, start + len(chunk))
        write("".join(output_line(predicted.get(number), task) for number in numbers))
        start, num_broken = start + len(chunk), num_broken + len(chunk) - len(rows)
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
        raise ValueError(f"{len(texts) - 1} tabs, expected {len(task.text_columns) - 1}: {expected}")
    return texts


def output_line(prediction: Prediction | None, task: Task) -> str:
    """The prediction as it stands in a prediction file and, of a class, its probability; None leaves them empty."""
    if task.output.num_classes is None:
        return "\n" if prediction is None else f"{task.output.format(prediction.value)}\n"
    return "\t\n" if prediction is None else f"{task.output.format(prediction.value)}\t{prediction.probability:.6f}\n"


# -------------------------------------------------------------------------------------------------------- input


class LineReader:
    """The lines of a file, read ahead by a thread and given out in chunks.

    A chunk of a regular file is full. From a pipe or a terminal it holds what came within PATIENCE of its first line.
    """

    def __init__(self, file: FileIO, name: str) -> None:
        """file: closed at its end. name: for error messages."""
        self._name = name
        self._is_regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        self._blocks: queue.Queue[bytes | OSError] = queue.Queue(READ_AHEAD)
        self._lines: list[bytes] = []
        self._rest = b""
        self._ended = False
        # A daemon on the raw descriptor: it may hang in a read for good and does not keep the process from ending.
        threading.Thread(target=self._read, args=(file,), daemon=True).start()

    def _read(self, file: FileIO) -> None:
        try:
            with file:
                while block := os.read(file.fileno(), BLOCK_BYTES):
                    self._blocks.put(block)
            self._blocks.put(b"")
        except OSError as error:
            self._blocks.put(error)

    def chunks(self) -> Iterator[list[bytes]]:
        """All lines, without their line feeds. Raises PredictionError if reading fails."""
        while chunk := self._chunk():
            yield chunk

    def _chunk(self) -> list[bytes]:
        """The next lines, none at the end of the file."""
        deadline, size = math.inf, 0
        while not self._ended and len(self._lines) < TEXTS_AT_A_TIME and (size < CHUNK_BYTES or not self._lines):
            if self._lines and not self._is_regular:
                deadline = min(deadline, time.monotonic() + PATIENCE)
            try:
                block = self._blocks.get(timeout=None if deadline == math.inf else max(0, deadline - time.monotonic()))
            except queue.Empty:
                break
            size += self._add(block)
        chunk, self._lines = self._lines[:TEXTS_AT_A_TIME], self._lines[TEXTS_AT_A_TIME:]
        return chunk

    def _add(self, block: bytes | OSError) -> int:
        """Takes in what the thread has read; returns its size in bytes."""
        if isinstance(block, OSError):
            raise PredictionError(f"{self._name}: {block.strerror}")
        *lines, rest = (self._rest + block).split(b"\n")
        self._ended = not block
        self._lines += [*lines, rest] if self._ended and rest else lines
        self._rest = rest[: LINE_BYTES + 1]  # enough to see that the line is too long
        return len(block)


def _open_input(source: str) -> tuple[str, LineReader]:
    """The input's name in messages, and its lines. Raises PredictionError if it cannot be read."""
    name = "standard input" if source == "-" else source
    try:
        reader = LineReader(FileIO(0, closefd=False) if source == "-" else FileIO(source), name)
    except OSError as error:
        raise PredictionError(f"--input {source}: {error.strerror}, expected a file with a text a line") from None
    if source == "-" and os.isatty(0):
        print("reading from the terminal, a text a line; Ctrl-D ends", file=sys.stderr)
    return name, reader


# ------------------------------------------------------------------------------------------------------- output


@contextmanager
def _output(target: str) -> Iterator[Write]:
    """Writes to standard output, or to a file that takes its name when it is whole and is gone if that fails."""
    if target == "-":
        yield _write_to_standard_output
        return
    path = Path(target)
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            yield file.write
        if os.path.lexists(path):
            raise FileExistsError(0, "exists now, expected a new file")
        os.rename(beside, path)
    except OSError as error:
        raise PredictionError(f"--output {target}: {error.strerror}") from None
    finally:
        beside.unlink(missing_ok=True)


def _write_to_standard_output(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _forget_output()
        raise PredictionError(f"--output -: {error.strerror}") from None


def _forget_output() -> None:
    """Whatever is left for standard output goes nowhere; Python would fail on it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
