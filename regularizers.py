"""SMART's two terms as the training step sees them: something to add to a task's loss, something to do after a step.

Both work in float32 also under mixed precision: a perturbation of 1e-5 would be lost in the rounding of half precision.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from bert import DropoutMasks
from datasets import Batch
from model import MultitaskBert
from smart import ProximalPoint, SmartConfig, proximity, smoothness
from tasks import TASKS


class Regularizer(Protocol):
    """A term of the loss."""

    def term(self, task: str, batch: Batch, masks: DropoutMasks, logits: Tensor) -> Tensor:
        """A scalar to add to the loss. logits: (B, K) float32 prediction made with these masks."""
        ...

    def after_step(self, step: int) -> None:
        """Called after optimizer step number `step`, counted from 0."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None: ...


class Smoothness:
    """lambda times the smoothness-inducing adversarial term."""

    def __init__(self, model: MultitaskBert, config: SmartConfig) -> None:
        self.model = model
        self.config = config

    def term(self, task: str, batch: Batch, masks: DropoutMasks, logits: Tensor) -> Tensor:
        assert batch.tokens is not None, "smoothness perturbs input embeddings"
        generator = torch.Generator(logits.device).manual_seed(masks.seed)
        term = smoothness(
            lambda perturbation: self.model(task, batch, masks.again(), perturbation),
            logits,
            TASKS[task].output.divergence,
            batch.tokens.row_of_token,
            self.model.encoder.config.hidden_size,
            self.config,
            generator,
            list(self.model.parameters()),
        )
        return self.config.weight * term

    def after_step(self, step: int) -> None:
        pass

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        pass


class BregmanProximal:
    """mu times the divergence from the prediction of the averaged weights."""

    def __init__(self, model: MultitaskBert, weight: float, num_steps: int) -> None:
        self.weight = weight
        self.average = model.duplicate()
        self.point = ProximalPoint(model, self.average, num_steps)

    def term(self, task: str, batch: Batch, masks: DropoutMasks, logits: Tensor) -> Tensor:
        with torch.no_grad():
            reference = self.average(task, batch, masks.again())
        return self.weight * proximity(logits, reference, TASKS[task].output.divergence)

    def after_step(self, step: int) -> None:
        self.point.update(step)

    def state(self) -> dict[str, Tensor]:
        return dict(self.average.state_dict())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.average.load_state_dict(dict(state))
