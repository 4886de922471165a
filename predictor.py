"""A trained model for new texts: `load("RUN").predict("sst", ["a fine film"])`.

Shape letters: R rows of texts, K outputs.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bert import CheckpointError
from checkpoints import checkpoint_folder, load_model, read_config, read_layout
from datasets import TokenizedRows, Tokenizer, by_batches
from messages import shown
from model import MultitaskBert
from tasks import TASKS

Autocast = Callable[[], AbstractContextManager[object]]  # the context of a forward pass, for mixed precision


class Prediction(NamedTuple):
    """A text's prediction in the units of the label, and the probability of that class; None on a scale."""

    value: float
    probability: float | None


class Predictor:
    """A trained model for new texts; `load` makes one from a run."""

    def __init__(
        self, model: MultitaskBert, tokenizer: Tokenizer, device: torch.device, batch_size: int, autocast: Autocast
    ) -> None:
        self.model, self.tokenizer, self.device = model.to(device), tokenizer, device
        self.batch_size, self.autocast = batch_size, autocast

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that the model has heads for."""
        return self.model.layout.tasks

    def predict(
        self, task: str, texts: Sequence[str] | Sequence[tuple[str, ...]], probabilities: bool = False
    ) -> list[Any]:
        """The prediction for each text, in order: a class as an int, a score as a float.

        texts: strings, or pairs of strings where the task compares two. probabilities: pairs (class, its probability)
        instead. Raises ValueError for a task without a head, a text that is none, and probabilities of a score.
        """
        rows = self._rows(task, texts)
        is_scale = TASKS[task].output.num_classes is None
        if is_scale and probabilities:
            raise ValueError(f"task {task!r}: a score has no probability")
        found = self.predictions(task, rows)
        if is_scale:
            return [row.value for row in found]
        return [(int(row.value), row.probability) if probabilities else int(row.value) for row in found]

    def encode(self, texts: Sequence[str], task: str = "") -> np.ndarray:
        """(R, D) float32 vectors of sentences, each pooled as the run's --pooling says.

        task: whose adapters and own top layers read them, where there are some; the first by default. Raises ValueError
        for a task without a head, and a text that is none.
        """
        task = task or self.tasks[0]
        rows = self._rows(task, texts, 1)
        if not rows:
            return np.empty((0, self.model.encoder.config.hidden_size), np.float32)
        if self.model.layout.is_split(task):  # the features of a pair begin with the vector of its first sentence
            rows = [row * 2 for row in rows]
        return self._of_rows(task, rows, self.model.pooled)[:, : self.model.encoder.config.hidden_size].numpy()

    def _rows(self, task: str, texts: Sequence[Any], num_texts: int = 0) -> list[tuple[str, ...]]:
        """The texts as rows of so many each, by default as many as the task reads."""
        if task not in self.tasks:
            raise ValueError(f"task {shown(repr(task))}: the checkpoint has heads for {', '.join(self.tasks)}")
        if isinstance(texts, str):
            raise ValueError(f"texts is the string {shown(repr(texts))}, expected a list")
        return [_texts_of_row(i, row, num_texts or len(TASKS[task].text_columns)) for i, row in enumerate(texts)]

    def predictions(self, task: str, rows: Sequence[tuple[str, ...]]) -> list[Prediction]:
        """Of each row of texts its prediction, decoded as in the prediction files."""
        if not rows:
            return []
        logits = self._of_rows(task, rows, self.model)  # (R, K)
        values = TASKS[task].output.decode(logits)
        probabilities = TASKS[task].output.probabilities(logits)
        if probabilities is None:
            return [Prediction(value, None) for value in values.tolist()]
        chosen = probabilities.gather(1, values.long()[:, None])[:, 0]
        return [Prediction(*pair) for pair in zip(values.tolist(), chosen.tolist(), strict=True)]

    def _of_rows(self, task: str, rows: Sequence[tuple[str, ...]], forward: Callable[..., Tensor]) -> Tensor:
        """What a forward pass gives for each row of texts, on the CPU."""
        unknown = np.full(len(rows), np.nan, np.float32)
        tokenized = TokenizedRows(TASKS[task], [""] * len(rows), unknown, self.tokenizer.encode(rows), self.device)

        def compute(index: np.ndarray) -> Tensor:
            with self.autocast():
                return forward(task, tokenized.batch(index))

        return by_batches(compute, tokenized, self.batch_size).cpu()


def _texts_of_row(number: int, row: object, num_texts: int) -> tuple[str, ...]:
    """A row of `Predictor.predict` as its texts. Raises ValueError if it is not so many strings, or blank."""
    texts = (row,) if isinstance(row, str) else tuple(row) if isinstance(row, tuple | list) else ()
    if len(texts) != num_texts or not all(isinstance(text, str) for text in texts) or not "".join(texts).strip():
        expected = "a string" if num_texts == 1 else "a pair of strings"
        raise ValueError(f"texts[{number}] is {shown(repr(row))}, expected {expected} with some text")
    return texts


def load(
    path: str | Path,
    device: str | torch.device = "auto",
    batch_size: int = 64,
    max_length: int = 0,
    autocast: Autocast = nullcontext,
) -> Predictor:
    """The model of a run or checkpoint folder, ready to predict.

    device: "auto" takes CUDA where there is a GPU. batch_size: texts of one forward pass. max_length: tokens of a row
    at most; 0: as in the run that the checkpoint is part of, else as many as the model has positions. Raises
    CheckpointError if there are no trained heads, or not so many positions.
    """
    folder = checkpoint_folder(Path(path))
    layout = read_layout(folder)
    if layout is None:
        raise CheckpointError(f"{folder}: an encoder without heads, expected the checkpoint of a run")
    model = load_model(folder, layout, torch.Generator()).model
    max_positions = model.encoder.config.num_positions
    max_length = max_length or _max_length_of_run(folder) or max_positions
    if max_length > max_positions:
        raise CheckpointError(f"max_length {max_length}: {folder} has {max_positions} positions, expected no more")
    tokenizer = Tokenizer(folder, max_length, layout.is_siamese)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Predictor(model, tokenizer, torch.device(device), batch_size, autocast)


def _max_length_of_run(folder: Path) -> int:
    """The `--max_length` of the run whose checkpoint this is, or 0 where it is none or was not limited."""
    try:
        values = read_config(folder.parent)
    except CheckpointError:
        return 0
    return int(values.get("max_length", 0)) if "option" in values else 0
