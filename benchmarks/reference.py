"""The ordinary way: transformers' BERT on padded batches, and the loop around it that its documentation teaches.

transformers is imported where it is needed, so that ours can be measured in a process without it.

Shape letters: B rows, L longest row of a batch, D hidden, K outputs.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from bert import BertConfig
from checkpoints import to_huggingface
from datasets import TokenizedRows
from evaluation import Precision
from heads import LinearHead
from model import MultitaskBert
from tasks import TASKS


@dataclass(frozen=True)
class PaddedBatch:
    """input_ids, token_type_ids, attention_mask: (B, L), each row padded to the longest; labels: (B,)."""

    input_ids: Tensor
    token_type_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def pad(rows: TokenizedRows, numbers: np.ndarray, device: torch.device | str = "cpu") -> PaddedBatch:
    """The rows of these numbers as one rectangle."""
    lengths = rows.tokens.lengths[numbers].astype(np.int64)[:, None]  # (B, 1)
    place = np.arange(int(lengths.max()))
    is_real = place < lengths
    ids = np.where(is_real, rows.tokens.ids[rows.tokens.starts[numbers][:, None] + np.minimum(place, lengths - 1)], 0)
    types = is_real & (place >= rows.tokens.firsts[numbers][:, None])
    arrays = (*(array.astype(np.int64) for array in (ids, types, is_real)), rows.labels[numbers])
    return PaddedBatch(*(torch.from_numpy(array).to(device) for array in arrays))


class PaddedBert(nn.Module):
    """transformers' encoder with scaled-dot-product attention, and a linear head a task on dropout(pooler_output)."""

    def __init__(self, model: MultitaskBert) -> None:
        """With the weights of a model of ours, whose pooler stands in where theirs has none."""
        import transformers

        super().__init__()
        config, tensors = model.encoder.config, to_huggingface(model.encoder)
        theirs = transformers.AutoConfig.for_model(**config.to_dict())
        self.encoder = transformers.AutoModel.from_config(theirs, attn_implementation="sdpa")
        self.encoder.load_state_dict({name: tensors[name] for name in self.encoder.state_dict()})
        self.pooler = None if hasattr(self.encoder, "pooler") else copy.deepcopy(model.encoder.pooler)
        self.has_types = config.model_type == BertConfig.model_type
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        outputs = {task: cast(LinearHead, head).output for task, head in model.heads.items()}
        self.heads = nn.ModuleDict({task: copy.deepcopy(output) for task, output in outputs.items()})

    def forward(self, task: str, batch: PaddedBatch) -> Tensor:
        """Logits (B, K) of a task."""
        return self.heads[task](self.dropout(self.pooled(batch)))  # type: ignore[no-any-return]

    def pooled(self, batch: PaddedBatch) -> Tensor:
        """(B, D) pooler output."""
        types = {"token_type_ids": batch.token_type_ids} if self.has_types else {}
        output = self.encoder(batch.input_ids, batch.attention_mask, **types)
        if self.pooler is None:
            return output.pooler_output  # type: ignore[no-any-return]
        return torch.tanh(self.pooler(output.last_hidden_state[:, 0]))


class OrdinaryLoop:
    """The loop as it is mostly written: AdamW as torch gives it, clipping to 1, a linear schedule, dropout on.

    The rows are token ids already; a step pads them.
    """

    def __init__(
        self, model: PaddedBert, rows: Mapping[str, TokenizedRows], precision: Precision, fused: bool = False
    ) -> None:
        """fused: AdamW by torch's fused kernel, which is not its default."""
        self.model = model.to(precision.device).train()
        self.rows, self.precision = rows, precision
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=fused or None)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 - step / 10**6)

    def take_step(self, task: str, numbers: np.ndarray) -> float:
        """One optimizer step on rows of a task; returns the loss."""
        loss = self.loss(task, numbers)
        self.move(loss)
        return float(loss.detach())

    def move(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()

    def loss(self, task: str, numbers: np.ndarray) -> Tensor:
        """Mean loss of rows of a task, a scalar."""
        batch = pad(self.rows[task], numbers, self.precision.device)
        with self.precision.autocast():
            logits = self.model(task, batch)
        return TASKS[task].output.losses(logits, batch.labels).mean()


@torch.inference_mode()
def predict_logits(model: PaddedBert, task: str, rows: TokenizedRows, batch_size: int, precision: Precision) -> Tensor:
    """(R, K) logits of all rows, in batches in the order of the file, padded."""
    parts = []
    for start in range(0, len(rows), batch_size):
        batch = pad(rows, np.arange(start, min(start + batch_size, len(rows))), precision.device)
        with precision.autocast():
            parts.append(model(task, batch).float())
    return torch.cat(parts).cpu()


def length_grouped_batches(lengths: np.ndarray, batch_size: int, num_batches: int) -> list[np.ndarray]:
    """Some of the batches that transformers' group_by_length makes of a data set, evenly spread from the longest to the
    shortest, in random order.

    An epoch has batches of all lengths: a few that stand for it must too. lengths: (R,); batches of row numbers (B,).
    """
    from transformers.trainer_pt_utils import get_length_grouped_indices

    order = np.array(get_length_grouped_indices(lengths.tolist(), batch_size, generator=torch.Generator()))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    batches = sorted((b for b in batches if len(b) == batch_size), key=lambda b: int(lengths[b].sum())) or batches
    ranks = (np.arange(num_batches) + 0.5) * len(batches) / num_batches
    return [batches[int(ranks[i])] for i in np.random.default_rng(1).permutation(num_batches)]
