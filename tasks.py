"""The language tasks: one entry of `TASKS` says everything that is particular to a task.

Flags, heads, loaders, losses, metrics and output files derive from these entries. A task is a name, the files and
columns that it is read from, and an `Output`: what the numbers of its head mean. `--task_file` and what runs have saved
add entries (task_files.py). torch is imported where a loss needs it, so that the commands that only read what runs have
left start at once.

Shape letters: B rows of a batch, K outputs of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class Output(Protocol):
    """What the K outputs of a head mean: how they are read, trained, compared, decoded and scored."""

    @property
    def num_outputs(self) -> int:
        """K, the width of the head."""
        ...

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None for a number on a scale."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """What each class is called; empty on a scale."""
        ...

    @property
    def allowed(self) -> str:
        """The labels that `parse` accepts, in words."""
        ...

    @property
    def scale(self) -> tuple[float, float] | None:
        """Its ends, or None for classes."""
        ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what `scores` gives."""
        ...

    @property
    def selection_metric(self) -> str:
        """The metric that counts in the mean over tasks, by which the best checkpoint is chosen."""
        ...

    def parse(self, text: str) -> float:
        """The label that a cell of a file holds. Raises ValueError if it is not one of the allowed labels."""
        ...

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B,) loss of each row, for logits (B, K) and labels (B,)."""
        ...

    def divergence(self, logits: Tensor, reference: Tensor) -> Tensor:
        """(B,) how far two predictions for the same row lie apart: symmetric, zero for equal ones, both (B, K)."""
        ...

    def decode(self, logits: Tensor) -> Tensor:
        """(B,) the prediction in the units of the label."""
        ...

    def probabilities(self, logits: Tensor) -> Tensor | None:
        """(B, num_classes) probability of each class, or None on a scale."""
        ...

    def format(self, prediction: float) -> str:
        """The prediction as it stands in a prediction file."""
        ...

    def scores(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Metrics of predictions, both (R,) in the units of the label."""
        ...


CLASS_METRICS = ("accuracy", "macro_f1")
NUM_NAMED = 12  # classes that an error names


@dataclass(frozen=True)
class Classes:
    """One of several classes: cross entropy over K logits. names: of each class, or none for their numbers.

    reads_names: whether files may hold the names, too.
    """

    num_outputs: int
    names: tuple[str, ...] = ()
    selection_metric: str = "accuracy"
    reads_names: bool = False
    scale: ClassVar[None] = None
    metrics: ClassVar[tuple[str, ...]] = CLASS_METRICS

    @property
    def num_classes(self) -> int:
        return self.num_outputs

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.names or tuple(map(str, range(self.num_outputs)))

    @property
    def allowed(self) -> str:
        return _allowed_names(self.names) if self.reads_names else f"a whole number from 0 to {self.num_outputs - 1}"

    def parse(self, text: str) -> float:
        return _class_label(text, self.names if self.reads_names else (), self.num_outputs)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        import torch.nn.functional as F

        return F.cross_entropy(logits.float(), labels.long(), reduction="none")

    def divergence(self, logits: Tensor, reference: Tensor) -> Tensor:
        """Symmetric KL: sum over classes of (p - q)(log p - log q), which loses no digits where p is close to q."""
        log_p, log_q = logits.float().log_softmax(-1), reference.float().log_softmax(-1)
        return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)

    def decode(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1).float()

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.float().softmax(-1)

    def format(self, prediction: float) -> str:
        return str(int(prediction))

    def scores(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return class_scores(predictions, labels, self.num_outputs)


@dataclass(frozen=True)
class Binary:
    """Yes or no: binary cross entropy on one logit. reads_names: as of `Classes`."""

    num_outputs: int = 1
    num_classes: int = 2
    class_names: tuple[str, ...] = ("no", "yes")
    selection_metric: str = "accuracy"
    reads_names: bool = False
    scale: ClassVar[None] = None
    metrics: ClassVar[tuple[str, ...]] = CLASS_METRICS

    @property
    def allowed(self) -> str:
        return _allowed_names(self.class_names) if self.reads_names else "0 or 1"

    def parse(self, text: str) -> float:
        return _class_label(text, self.class_names if self.reads_names else (), 2)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        import torch.nn.functional as F

        return F.binary_cross_entropy_with_logits(logits.float().squeeze(-1), labels, reduction="none")

    def divergence(self, logits: Tensor, reference: Tensor) -> Tensor:
        """Symmetric KL of two Bernoulli distributions, (p - q)(logit p - logit q).

        A softmax over the single logit would give a divergence of zero for any two predictions.
        """
        logits, reference = logits.float().squeeze(-1), reference.float().squeeze(-1)
        return (logits.sigmoid() - reference.sigmoid()) * (logits - reference)

    def decode(self, logits: Tensor) -> Tensor:
        return (logits.squeeze(-1) > 0).float()

    def probabilities(self, logits: Tensor) -> Tensor:
        import torch

        logits = logits.float().squeeze(-1)
        return torch.stack([(-logits).sigmoid(), logits.sigmoid()], -1)

    def format(self, prediction: float) -> str:
        return str(int(prediction))

    def scores(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return class_scores(predictions, labels, self.num_classes)


@dataclass(frozen=True)
class Score:
    """A number on a scale: squared error in the units of the scale; predictions are clipped to it."""

    low: float
    high: float
    num_outputs: int = 1
    num_classes: None = None
    class_names: tuple[str, ...] = ()
    selection_metric: str = "pearson"
    metrics: ClassVar[tuple[str, ...]] = ("pearson", "spearman")

    @property
    def scale(self) -> tuple[float, float]:
        return self.low, self.high

    @property
    def allowed(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"

    def parse(self, text: str) -> float:
        label = float(text)
        if not math.isfinite(label) or not self.low <= label <= self.high:
            raise ValueError(text)
        return label

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        import torch.nn.functional as F

        return F.mse_loss(logits.float().squeeze(-1), labels, reduction="none")

    def divergence(self, logits: Tensor, reference: Tensor) -> Tensor:
        return (logits.float() - reference.float()).squeeze(-1).square()

    def decode(self, logits: Tensor) -> Tensor:
        return logits.float().squeeze(-1).clamp(self.low, self.high)

    def probabilities(self, logits: Tensor) -> None:
        return None

    def format(self, prediction: float) -> str:
        return f"{prediction:.6f}"

    def scores(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Pearson and Spearman correlation; one that is undefined (`is_degenerate`) counts as 0."""
        if is_degenerate(predictions) or is_degenerate(labels):
            return {"pearson": 0.0, "spearman": 0.0}
        from scipy.stats import pearsonr, spearmanr

        predictions, labels = predictions.astype(np.float64), labels.astype(np.float64)
        return {
            "pearson": float(pearsonr(predictions, labels).statistic),
            "spearman": float(spearmanr(predictions, labels).statistic),
        }


def _class_label(text: str, names: tuple[str, ...], num_classes: int) -> float:
    """The number of a class from its name or, unless names are numbers themselves, its number."""
    if text in names:
        return float(names.index(text))
    label = float(text)
    if label not in range(num_classes) or any(map(_is_number, names)):
        raise ValueError(text)
    return label


def _allowed_names(names: tuple[str, ...]) -> str:
    listed = ", ".join(names[:NUM_NAMED]) + (f" and {len(names) - NUM_NAMED} more" * (len(names) > NUM_NAMED))
    numbers = "" if any(map(_is_number, names)) else f", or a number from 0 to {len(names) - 1}"
    return f"one of {listed}{numbers}"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def class_scores(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> dict[str, float]:
    """Accuracy and macro F1."""
    from sklearn.metrics import accuracy_score, f1_score

    classes = list(range(num_classes))
    return {
        "accuracy": float(accuracy_score(labels, predictions)),
        "macro_f1": float(f1_score(labels, predictions, labels=classes, average="macro", zero_division=0)),
    }


def is_degenerate(values: np.ndarray) -> bool:
    """Whether a correlation with these values is undefined: they are all equal, or fewer than two."""
    return len(values) < 2 or bool(np.ptp(values) <= 1e-9 * max(1.0, float(np.abs(values).max())))


SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Task:
    """One task: where its rows stand and what its labels mean.

    files: of each of SPLITS the name of its file, "" where there is none. folder: where they stand; "": in --data.
    prediction_header: the second column's title in the prediction file that CS224N grades (its spelling is theirs).
    id_column: what names a row; "": its line. delimiter: between columns; "": by the ending of the file.
    definition: the entry of the task file that it comes from, for checkpoints; empty for those of this module.
    """

    name: str
    title: str
    files: tuple[str, str, str]
    text_columns: tuple[str, ...]
    label_column: str
    output: Output
    prediction_header: str
    id_column: str = "id"
    delimiter: str = "\t"
    folder: str = ""
    definition: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def file_name(self, split: str) -> str:
        """Name of the file of a split, "" where the task has none."""
        return self.files[SPLITS.index(split)]

    def path(self, split: str, folder: Path) -> Path:
        """Where the file of a split stands. folder: that of --data."""
        return Path(self.folder or folder) / self.file_name(split)

    def file_key(self, split: str) -> str:
        """What a run's record calls the file: tasks from other folders may have files of the same name."""
        return f"{self.name}-{split}" if self.folder else self.file_name(split)

    def columns(self, labelled: bool) -> list[str]:
        """The columns that a file must have. labelled: whether the split has labels."""
        return [*filter(None, [self.id_column]), *self.text_columns, *([self.label_column] if labelled else [])]


def cs224n_files(prefix: str) -> tuple[str, str, str]:
    """The names that CS224N gives to a task's files."""
    return f"{prefix}-train.csv", f"{prefix}-dev.csv", f"{prefix}-test-student.csv"


_PAIR = ("sentence1", "sentence2")
_SENTIMENTS = Classes(5, ("very negative", "negative", "neutral", "positive", "very positive"))
_SST, _PARA, _STS = map(cs224n_files, ("ids-sst", "quora", "sts"))
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("sst", "SST-5 sentiment", _SST, ("sentence",), "sentiment", _SENTIMENTS, "Predicted_Sentiment"),
        Task("para", "Quora paraphrase", _PARA, _PAIR, "is_duplicate", Binary(), "Predicted_Is_Paraphrase"),
        Task("sts", "STS similarity", _STS, _PAIR, "similarity", Score(0.0, 5.0), "Predicted_Similiary"),
    )
}
