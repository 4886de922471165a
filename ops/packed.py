"""Packed batches: the rows of a batch stand one behind the other, without padding between them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from ops.linear import rows_multiple
from ops.transfer import to_device

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

    ends: (B,) int64 behind each row's last token. longest: no row has more tokens. On the host, for the CPU's kernels
    and for groups, lengths: (B,) int64 tokens of each row, and starts: (B,) its first token.
    """

    def __init__(self, ends: Tensor, longest: int) -> None:
        self.ends, self.longest = ends, longest

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Packing":
        """Rows of these lengths, on the CPU."""
        return cls(torch.tensor(lengths).cumsum(0), max(lengths))

    @property
    def num_rows(self) -> int:
        return self.ends.shape[0]

    def __len__(self) -> int:
        return self.num_rows

    @cached_property
    def lengths(self) -> np.ndarray:
        lengths: np.ndarray = np.diff(self.ends.cpu().numpy(), prepend=0)
        return lengths

    @cached_property
    def starts(self) -> np.ndarray:
        return np.array(np.cumsum(self.lengths) - self.lengths)

    @property
    def longest_row(self) -> int:
        """No row has more tokens: those of the longest, on a GPU, whose host does not know it, `longest`."""
        return int(self.lengths.max()) if self.ends.device.type == "cpu" else self.longest

    def bounds(self) -> tuple[Tensor, Tensor]:
        """(B,) each row's first token, and how many it has, on the device."""
        lengths = torch.diff(self.ends, prepend=self.ends.new_zeros(1))
        return self.ends - lengths, lengths

    def positions(self, num_places: int) -> Tensor:
        """(N,) each token's place in its row, from 0."""
        place = torch.arange(num_places, device=self.ends.device)
        row = torch.searchsorted(self.ends, place, right=True)  # (N,), B for no row
        return place - nn.functional.pad(self.ends, (1, 0))[row]

    @property
    def num_tokens(self) -> int:
        """Tokens that belong to a row."""
        return int(self.ends[-1])

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
        return Group(*(to_device(array, self.ends.device) for array in (rows, tokens, is_real)))

    @cached_property
    def grouped_order(self) -> tuple[Tensor, Tensor]:
        """Numbers in the order of the groups, rows' (B,) and real tokens' (num_tokens,)."""
        rows = torch.cat([group.rows for group in self.groups])
        return rows, torch.cat([group.tokens[group.is_real] for group in self.groups])

    def num_scores(self, num_heads: int, first_only: bool = False) -> int:
        """Attention scores of all groups' blocks and heads; first_only: of the first queries alone."""
        longest = [(len(rows), int(self.lengths[rows].max())) for rows in self.groups_of_rows]
        return sum(b * num_heads * length * (1 if first_only else length) for b, length in longest)


class Padded(Packing):
    """B rows of L places each, place behind place: (B L) tokens. What an exported model reads: no shape in its graph
    depends on the lengths of the rows.

    is_real: (B, L) whether the place is within its row.
    """

    def __init__(self, is_real: Tensor) -> None:
        self.is_real = is_real

    @property
    def num_rows(self) -> int:
        return self.is_real.shape[0]

    @property
    def longest_row(self) -> int:
        return self.is_real.shape[1]

    def bounds(self) -> tuple[Tensor, Tensor]:
        num_rows, longest = self.is_real.shape
        return torch.arange(num_rows) * longest, self.is_real.sum(1)

    def positions(self, num_places: int) -> Tensor:
        return torch.arange(self.is_real.shape[1]).expand(*self.is_real.shape).flatten()  # (B L,)


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

    A row is one sequence, or two, which do not see each other: those are the rows of the packing. input_ids,
    token_type_ids, position_ids: (N,); row_of_token: (N,) which of the B rows a token belongs to, B for none;
    first_tokens: (B,) or (2 B,) index of each sequence's [CLS].
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    row_of_token: Tensor
    first_tokens: Tensor
    packing: Packing = field(repr=False)

    @property
    def num_tokens(self) -> int:
        return self.packing.num_tokens

    def __len__(self) -> int:
        return len(self.packing)


@dataclass(frozen=True)
class TokenStore:
    """The tokens of R rows on a device, one row behind the other, which batches are gathered from.

    ids: (tokens of all rows,); starts, lengths, firsts: (R,) a row's first token, its tokens, and those of type 0.
    host_lengths: (R,) the lengths, on the host. longest: no sequence has more tokens. is_split: what would be of type 0
    and of type 1 is a sequence each, of type 0.
    """

    ids: Tensor
    starts: Tensor
    lengths: Tensor
    firsts: Tensor
    host_lengths: np.ndarray = field(repr=False)
    longest: int
    is_split: bool

    @classmethod
    def of(
        cls,
        ids: np.ndarray,
        lengths: np.ndarray,
        firsts: np.ndarray,
        device: torch.device | str = "cpu",
        is_split: bool = False,
    ) -> "TokenStore":
        lengths = np.array(lengths, np.int64)
        longest = int(np.maximum(firsts, lengths - firsts).max() if is_split else lengths.max())
        columns = (ids, np.cumsum(lengths) - lengths, lengths, firsts)
        first, second, third, fourth = (torch.from_numpy(np.array(column, np.int64)).to(device) for column in columns)
        return cls(first, second, third, fourth, lengths, longest, is_split)

    def num_places(self, rows: np.ndarray) -> int:
        """N for these rows: their tokens, filled up."""
        num_tokens = int(self.host_lengths[rows].sum())
        multiple = rows_multiple(self.ids.device, num_tokens)
        return -(-num_tokens // multiple) * multiple

    def batch(self, rows: np.ndarray) -> PackedTokens:
        """The rows of these numbers, in this order."""
        return self.gather(to_device(rows, self.ids.device), self.num_places(rows))

    def gather(self, rows: Tensor, num_places: int) -> PackedTokens:
        """The same for rows (B,) on the device: all that depends on them is computed there, and nothing waits for
        it."""
        count, lengths, firsts = len(rows), self.lengths[rows], self.firsts[rows]
        ends = lengths.cumsum(0)  # (B,)
        place = torch.arange(num_places, device=rows.device)  # (N,)
        row_of_token = torch.searchsorted(ends, place, right=True)  # (N,)
        row = row_of_token.clamp(max=count - 1)
        first_tokens = ends - lengths  # (B,)
        is_owned = row_of_token < count
        position = torch.where(is_owned, place - first_tokens[row], 0)
        ids = torch.where(is_owned, self.ids[self.starts[rows][row] + position], 0)
        types = (is_owned & (position >= firsts[row])).long()
        if self.is_split:
            position, types = position - types * firsts[row], torch.zeros_like(types)
            middles = first_tokens + firsts  # (B,)
            ends = torch.stack([middles, ends], 1).flatten()  # (B,) -> (2 B,)
            first_tokens = torch.stack([first_tokens, middles], 1).flatten()
        packing = Packing(ends, self.longest)
        return PackedTokens(ids, types, position, row_of_token, first_tokens, packing)
