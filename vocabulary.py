"""A smaller vocabulary for an exported model: the word pieces that its texts have, and what spells all others."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from model import MultitaskBert

# Characters that always stay: up to Latin Extended-B; punctuation, such as a phone's quotes, and currencies.
KEPT = (range(0x250), range(0x2010, 0x20D0))


class VocabularyError(ValueError):
    """The vocabulary cannot be made smaller; the message is one line for the user."""


def kept_pieces(folder: Path, ids: Iterable[np.ndarray]) -> np.ndarray:
    """(V',) the ids that stay, in their order: those of the texts, special tokens, and every single character of Latin
    script, punctuation and currencies, at a word's start and within, so that no word of the language is unknown.
    Raises VocabularyError for a tokenizer without word pieces."""
    tokenizer = _read(folder)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    pieces = tokenizer["model"]["vocab"]
    is_kept = np.zeros(max(pieces.values()) + 1, bool)
    is_kept[np.unique(np.concatenate(list(ids)))] = True
    for piece, number in pieces.items():
        character = piece.removeprefix("##")
        is_single = len(character) == 1 and any(ord(character) in of for of in KEPT)
        is_kept[number] |= piece in special or is_single
    return np.flatnonzero(is_kept)


def without_others(model: MultitaskBert, folder: Path, kept: np.ndarray) -> MultitaskBert:
    """The model with these rows of its word embeddings alone; the tokenizer in the folder gets their new ids."""
    tokenizer = _read(folder)
    names = {number: piece for piece, number in tokenizer["model"]["vocab"].items()}
    new = {names[number]: place for place, number in enumerate(kept.tolist())}
    tokenizer["model"]["vocab"] = new
    tokenizer["added_tokens"] = [token | {"id": new[token["content"]]} for token in tokenizer["added_tokens"]]
    processor = tokenizer["post_processor"] or {}
    for token in processor.get("special_tokens", {}).values():  # of a template
        token["ids"] = [new[name] for name in token["tokens"]]
    processor |= {key: [name, new[name]] for key in ("sep", "cls") for name, _ in [processor.get(key, ("", 0))] if name}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece in new), "utf-8")
    smaller = model.duplicate()
    weight = smaller.encoder.word_embeddings.weight[torch.from_numpy(kept)].detach()  # (V, D) -> (V', D)
    smaller.encoder.word_embeddings = nn.Embedding.from_pretrained(weight)
    return smaller


def _read(folder: Path) -> Any:
    """What tokenizer.json says."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    if tokenizer["model"].get("type") != "WordPiece":
        raise VocabularyError("--vocabulary data: the tokenizer has no word pieces, expected that of a BERT")
    return tokenizer
