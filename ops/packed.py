"""Packed batches: the rows of a batch stand one behind the other, without padding between them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ops.linear import rows_multiple

FILL = 0.75  # a row joins a group while it fills at least this share of the group's length


@dataclass(frozen=True)
class Group:
    """Rows of similar length that attention can handle as one padded block of b rows and L places.

    rows: (b,) which of the batch's. tokens: (b, L) the packed token at each place; a place behind the end of its row
    shows the row's first token. is_real: (b, L) whether the place is within its row.
    """

    rows: Tensor
    tokens: Tensor
    is_real: Tensor


class Packing:
    """Where the B rows of a batch of N packed tokens lie; the last few tokens may belong to no row.

    lengths: (B,) int64 tokens of each row. starts: (B,) its first token.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, device: torch.device | str = "cpu") -> None:
        self.lengths = np.array(lengths, dtype=np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens that belong to a row."""
        return int(self.lengths.sum())

    @cached_property
    def groups_of_rows(self) -> list[np.ndarray]:
        """Row numbers in groups of similar length, longest first."""
        return list(group_by_length(self.lengths))

    @cached_property
    def groups(self) -> list[Group]:
        return [self._group(rows) for rows in self.groups_of_rows]

    def _group(self, rows: np.ndarray) -> Group:
        place = np.arange(self.lengths[rows].max())
        is_real = place < self.lengths[rows, None]  # (b, L)
        tokens = self.starts[rows, None] + np.where(is_real, place, 0)  # (b, L)
        return Group(*(torch.from_numpy(array).to(self.device) for array in (rows, tokens, is_real)))

    @cached_property
    def grouped_order(self) -> tuple[Tensor, Tensor]:
        """Numbers in the order of the groups, rows' (B,) and real tokens' (num_tokens,)."""
        rows = torch.cat([group.rows for group in self.groups])
        return rows, torch.cat([group.tokens[group.is_real] for group in self.groups])

    def num_scores(self, num_heads: int, first_only: bool = False) -> int:
        """Attention scores of all groups' blocks and heads; first_only: of the first queries alone."""
        longest = [(len(rows), int(self.lengths[rows].max())) for rows in self.groups_of_rows]
        return sum(b * num_heads * length * (1 if first_only else length) for b, length in longest)


def group_by_length(lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Row numbers in groups of similar length, longest first."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    for i in range(1, len(order) + 1):
        if i == len(order) or lengths[order[i]] < FILL * lengths[order[start]]:
            yield order[start:i]
            start = i


@dataclass(frozen=True)
class PackedTokens:
    """The tokens of B rows, one row behind the other, then the few that belong to no row.

    input_ids, token_type_ids, position_ids: (N,); first_tokens: (B,) index of each row's [CLS].
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    first_tokens: Tensor
    packing: Packing = field(repr=False)

    @classmethod
    def from_arrays(
        cls, ids: np.ndarray, types: np.ndarray, lengths: np.ndarray, device: torch.device | str = "cpu"
    ) -> "PackedTokens":
        """ids, types: of all rows in order; lengths: (B,), each at least 1. Positions count from 0 in a row."""
        packing = Packing(lengths, device)
        positions = np.arange(len(ids)) - np.repeat(packing.starts, packing.lengths)
        unowned = -len(ids) % rows_multiple(packing.device)
        columns = [np.pad(np.asarray(array, np.int64), (0, unowned)) for array in (ids, types, positions)]  # (N,)
        first, second, third, starts = (
            torch.from_numpy(array).to(device, non_blocking=True) for array in (*columns, packing.starts)
        )
        return cls(first, second, third, starts, packing)

    @property
    def row_of_token(self) -> Tensor:
        """(N,) which of the B rows a token belongs to; B for a token that belongs to none."""
        counts = torch.from_numpy(self.packing.lengths).to(self.input_ids.device)
        rows = torch.arange(len(self), device=counts.device).repeat_interleave(counts, output_size=self.num_tokens)
        return torch.nn.functional.pad(rows, (0, len(self.input_ids) - self.num_tokens), value=len(self))

    @property
    def num_tokens(self) -> int:
        return self.packing.num_tokens

    def __len__(self) -> int:
        return len(self.packing)
