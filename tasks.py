"""The language tasks: one entry of `TASKS` says everything that is particular to a task.

Flags, heads, loaders, losses, metrics and output files derive from these entries. A task is a name, the files and
columns that it is read from, and an `Output`: what the numbers of its head mean. torch is imported where a loss needs
it, so that the commands that only read what runs have left start at once.

Shape letters: B rows of a batch, K outputs of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

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


@dataclass(frozen=True)
class Classes:
    """One of several classes: cross entropy over K logits. names: of each class, or none for their numbers."""

    num_outputs: int
    names: tuple[str, ...] = ()
    selection_metric: str = "accuracy"

    @property
    def num_classes(self) -> int:
        return self.num_outputs

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.names or tuple(map(str, range(self.num_outputs)))

    @property
    def allowed(self) -> str:
        return f"a whole number from 0 to {self.num_outputs - 1}"

    def parse(self, text: str) -> float:
        label = float(text)
        if label not in range(self.num_outputs):
            raise ValueError(text)
        return label

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
    """Yes or no: binary cross entropy on one logit."""

    num_outputs: int = 1
    num_classes: int = 2
    class_names: tuple[str, ...] = ("no", "yes")
    selection_metric: str = "accuracy"
    allowed: str = "0 or 1"

    def parse(self, text: str) -> float:
        label = float(text)
        if label not in (0.0, 1.0):
            raise ValueError(text)
        return label

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


@dataclass(frozen=True)
class Task:
    """One task: where its rows stand and what its labels mean.

    file_prefix: the CS224N files are named `<file_prefix>-{train,dev,test-student}.csv`.
    prediction_header: the second column's title in the prediction file that CS224N grades (its spelling is theirs).
    """

    name: str
    title: str
    file_prefix: str
    text_columns: tuple[str, ...]
    label_column: str
    output: Output
    prediction_header: str

    def file_name(self, split: str) -> str:
        """Name of the file of a split: "train", "dev" or "test"."""
        return f"{self.file_prefix}-{'test-student' if split == 'test' else split}.csv"


_PAIR = ("sentence1", "sentence2")
_SENTIMENTS = Classes(5, ("very negative", "negative", "neutral", "positive", "very positive"))
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("sst", "SST-5 sentiment", "ids-sst", ("sentence",), "sentiment", _SENTIMENTS, "Predicted_Sentiment"),
        Task("para", "Quora paraphrase", "quora", _PAIR, "is_duplicate", Binary(), "Predicted_Is_Paraphrase"),
        Task("sts", "STS similarity", "sts", _PAIR, "similarity", Score(0.0, 5.0), "Predicted_Similiary"),
    )
}
