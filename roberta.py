"""RoBERTa (Liu et al. 2019, arXiv 1907.11692): BERT, trained longer on more text and without the next sentence.

What differs in the computation: positions count from behind the number of the padding token, 2 in the published models,
and tokens have no types. A pair is `<s> a </s></s> b </s>`, which is the tokenizer's business (datasets.py).
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bert import Bert, BertConfig
from ops import DropoutMasks, PackedTokens


@dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """The fields of a Hugging Face RoBERTa config.json."""

    model_type: ClassVar[str] = "roberta"
    architecture: ClassVar[str] = "RobertaModel"
    prefix: ClassVar[str] = "roberta"

    vocab_size: int = 50265
    pad_token_id: int = 1

    @property
    def first_position(self) -> int:
        return self.pad_token_id + 1

    @property
    def num_positions(self) -> int:
        return self.max_position_embeddings - self.first_position

    def make_encoder(self) -> "Roberta":
        return Roberta(self)


class Roberta(Bert):
    """BERT with other positions and a single token type."""

    config: RobertaConfig

    def embed(self, tokens: PackedTokens, masks: DropoutMasks | None, perturbation: Tensor | None) -> Tensor:
        places: dict[str, Any] = {
            "position_ids": tokens.position_ids + self.config.first_position,
            "token_type_ids": torch.zeros_like(tokens.token_type_ids),
        }
        return super().embed(replace(tokens, **places), masks, perturbation)
