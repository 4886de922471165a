"""Masked-language modelling (Devlin et al. 2019, 3.1) on the tasks' own training texts, before the tasks are trained:
task-adaptive pretraining (Gururangan et al. 2020, arXiv 2004.10964).

It moves the encoder, without pooler and adapters, and a head that is dropped afterwards.

Shape letters: N packed tokens, B rows, M chosen pieces, D hidden, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert import BertConfig, Encoder, Uninitialized, initialize
from checkpoints import load_masked_head
from datasets import Batch, TokenizedRows, Tokenizer
from distributed import ALONE, ProcessGroup
from engine import Methods, Stage, StageData, Trainer
from evaluation import Precision
from model import MultitaskBert, Trained
from ops import ACTIVATIONS, DropoutMasks, PackedTokens
from parameters import NoParameters
from schedulers import RandomScheduler, Setting
from seeding import derive_seed

MLM = "mlm"  # the stage, and what it has for a task
CHOSEN_PROB, MASK_SHARE, RANDOM_SHARE = 0.15, 0.8, 0.1


class MaskedHead(nn.Module):
    """From hidden states to logits over the vocabulary, whose matrix is the word embeddings.

    Its parameters have the names that they have under "cls.predictions." in a Hugging Face checkpoint.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.activation = ACTIVATIONS[config.hidden_act]
        norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.transform = nn.ModuleDict({"dense": nn.Linear(size, size), "LayerNorm": norm})
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, states: Tensor, word_embeddings: Tensor) -> Tensor:
        """(M, D), (V, D) -> (M, V)."""
        transformed = self.transform["LayerNorm"](self.activation(self.transform["dense"](states)))  # (M, D)
        return F.linear(transformed, word_embeddings, self.bias)


def make_masked_head(config: BertConfig, folder: Path, seed: int) -> tuple[MaskedHead, bool]:
    """The head in a checkpoint folder, or a new one where there is none; whether it is new."""
    with Uninitialized():
        head = MaskedHead(config)
    initialize(head, config.initializer_range, torch.Generator().manual_seed(derive_seed(seed, MLM, "parameters")))
    return head, not load_masked_head(head, folder)


def mask_pieces(
    tokens: PackedTokens, is_piece: Tensor, mask_id: int, generator: torch.Generator
) -> tuple[PackedTokens, Tensor]:
    """15% of the pieces are chosen; of these 80% become [MASK], 10% a random piece, and 10% stay.

    is_piece: (V,) of each id whether it is a piece, and no special token. Returns the tokens as the encoder sees them,
    and which of them are chosen, (M,).
    """
    ids, device = tokens.input_ids, tokens.input_ids.device
    draw = torch.rand(ids.shape, generator=generator, device=device) / CHOSEN_PROB  # (N,): below 1 it is chosen
    draw[~is_piece[ids] | (tokens.row_of_token == len(tokens))] = 1.0
    pieces = is_piece.nonzero().squeeze(1)
    others = pieces[torch.randint(len(pieces), ids.shape, generator=generator, device=device)]  # (N,)
    masked = torch.where(draw < MASK_SHARE, mask_id, torch.where(draw < MASK_SHARE + RANDOM_SHARE, others, ids))
    return replace(tokens, input_ids=masked), (draw < 1).nonzero().squeeze(1)


class MaskedLanguageModel:
    """An encoder that guesses masked pieces. Its one task is MLM, its outputs are the losses themselves."""

    shares_passes = False

    def __init__(self, encoder: Encoder, head: MaskedHead, tokenizer: Tokenizer) -> None:
        self.encoder, self.head, special = encoder, head, tokenizer.special_ids()
        self.mask_id = special["MASK"]
        self.is_piece = torch.arange(len(head.bias), device=head.bias.device) < tokenizer.vocab_size  # (V,)
        self.is_piece[list(special.values())] = False

    def __call__(
        self, task: str, batch: Batch, masks: DropoutMasks | None = None, perturbation: Tensor | None = None
    ) -> Tensor:
        """(B,) for every row the mean cross entropy of the chosen pieces of all; 0 where none is.

        Pieces are chosen anew in every training pass, by a seed that follows from its dropout's.
        """
        assert batch.tokens is not None and masks is not None and perturbation is None, "there is training only"
        ids = batch.tokens.input_ids
        generator = torch.Generator(ids.device).manual_seed(derive_seed(masks.seed, MLM))
        tokens, chosen = mask_pieces(batch.tokens, self.is_piece, self.mask_id, generator)
        logits = self.logits(tokens, chosen, masks).float()  # (M, V)
        total = F.cross_entropy(logits, ids[chosen], reduction="sum")
        return (total / max(1, len(chosen))).expand(len(batch))

    def logits(self, tokens: PackedTokens, chosen: Tensor, masks: DropoutMasks | None = None) -> Tensor:
        """(M, V) for these tokens (M,) alone."""
        states = self.encoder(tokens, masks).index_select(0, chosen)  # (N, D) -> (M, D)
        return self.head(states, self.encoder.word_embeddings.weight)  # type: ignore[no-any-return]

    def logits_of(self, tasks: Sequence[str], batch: Batch, masks: DropoutMasks | None = None) -> list[Tensor]:
        return [self(task, batch, masks) for task in tasks]


def masked_trainer(
    stage: Stage,
    model: MultitaskBert,
    head: MaskedHead,
    tokenizer: Tokenizer,
    train: Mapping[str, TokenizedRows],
    precision: Precision,
    processes: ProcessGroup = ALONE,
) -> Trainer:
    """Trains the encoder and the head on the texts of all tasks' training rows."""
    rows = reduce(TokenizedRows.followed_by, (of.by_sequence() for of in train.values()))
    encoder = {name: p for name, p in model.shared_parameters().items() if not name.startswith("encoder.pooler.")}
    trained = Trained(encoder, {MLM: dict(head.named_parameters())})
    trained.freeze_others(model)
    setting = Setting(stage.tasks, (len(rows),), stage.epochs, 1, every_task=False)
    methods = Methods(RandomScheduler(NoParameters(), setting), losses=lambda task, losses, labels: losses)
    masked = MaskedLanguageModel(model.encoder, head, tokenizer)
    return Trainer(stage, masked, trained, StageData({MLM: rows}, {}), methods, precision, processes=processes)
