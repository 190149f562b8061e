"""Which keys a row of attention attends to by their positions, and what of a mask has to be computed.

Comes in: the pieces of the sequence that rows and keys are, and what a mask says of positions (causal, a window). Goes out: the blocks of
rows and keys in which something is attended to, as few as the mask allows; most of them need no mask of elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Consecutive tokens of the sequence: the position of the first, and how many."""

    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Positions:
    """Which keys a row attends to by their positions: a row minus a key is from `least` to `most`.

    >>> causal_window = Positions.of(causal=True, window=4)
    >>> causal_window.least, causal_window.most
    (0, 3)
    """

    least: float
    most: float

    @staticmethod
    def of(*, causal: bool, window: int | None) -> Positions:
        """Of a mask as `autopar.ops.attention.attention` states it."""
        if causal:
            return Positions(0, float("inf") if window is None else window - 1)
        return Positions(float("-inf"), float("inf")) if window is None else Positions(-window, window)

    def excludes(self, rows: Span, keys: Span) -> bool:
        """Whether no row attends to any key."""
        return rows.start + rows.length - 1 - keys.start < self.least or rows.start - keys.start - keys.length + 1 > self.most

    def includes(self, rows: Span, keys: Span) -> bool:
        """Whether every row attends to every key."""
        return rows.start - keys.start - keys.length + 1 >= self.least and rows.start + rows.length - 1 - keys.start <= self.most

    def meet(self, rows: Span, keys: Span) -> tuple[Span, Span]:
        """The rows that attend to some of the keys, and the keys that some of the rows attend to, where there are any.

        >>> Positions.of(causal=True, window=4).meet(Span(16, 16), Span(0, 16))
        (Span(start=16, length=3), Span(start=13, length=3))
        """
        first_row, last_row = rows.start, rows.start + rows.length - 1
        first_key, last_key = keys.start, keys.start + keys.length - 1
        return (
            _between(max(first_row, first_key + self.least), min(last_row, last_key + self.most)),
            _between(max(first_key, first_row - self.most), min(last_key, last_row - self.least)),
        )

    def is_causal(self, rows: Sequence[Span], keys: Sequence[Span]) -> bool:
        """Whether row i of these spans, one after the other in the order of the sequence, attends to keys 0..i."""
        return tuple(rows) == tuple(keys) and self.least == 0 and self.most >= rows[-1].start + rows[-1].length - 1 - rows[0].start

    def allow(self, rows: Sequence[Span], keys: Sequence[Span], device: torch.device) -> Tensor:
        """The mask of elements, (rows, keys), True where a row attends to a key."""
        distance = _positions(rows, device)[:, None] - _positions(keys, device)
        return (distance >= self.least) & (distance <= self.most)


def _between(first: float, last: float) -> Span:
    return Span(int(first), int(last - first) + 1)


def _positions(spans: Sequence[Span], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(span.start, span.start + span.length, device=device) for span in spans])


def spans_of(rank: int, ranks: int, length: int, *, zigzag: bool) -> tuple[Span, ...]:
    """The pieces of the sequence that a rank has.

    >>> spans_of(1, 2, 4, zigzag=False), spans_of(1, 2, 4, zigzag=True)
    ((Span(start=4, length=4),), (Span(start=2, length=2), Span(start=4, length=2)))
    """
    if not zigzag:
        return (Span(rank * length, length),)
    half = length // 2
    return Span(rank * half, half), Span((2 * ranks - 1 - rank) * half, half)


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows and keys of two ranks' parts that are computed at once.

    Attributes:
        rows, keys: the pieces of the sequence, one or two.
        first_row, first_key: where they begin in the parts.
        is_causal, is_partial: whether row i attends to keys 0..i; whether rows attend to some keys only, otherwise.
    """

    rows: tuple[Span, ...]
    keys: tuple[Span, ...]
    first_row: int
    first_key: int
    is_causal: bool = False
    is_partial: bool = False

    @property
    def row_slice(self) -> slice:
        """The rows in the part that has them."""
        return slice(self.first_row, self.first_row + sum(span.length for span in self.rows))

    @property
    def key_slice(self) -> slice:
        """The keys in the part that has them."""
        return slice(self.first_key, self.first_key + sum(span.length for span in self.keys))


def find_blocks(rows: Sequence[Span], keys: Sequence[Span], positions: Positions) -> tuple[Block, ...]:
    """What is to be computed of one rank's rows and another's keys: as few blocks as the mask allows."""
    if positions.is_causal(rows, keys):
        # Two pieces of a rank, too: of its own keys the first one's rows attend to none of the second.
        return (Block(tuple(rows), tuple(keys), 0, 0, is_causal=True),)
    blocks: list[Block] = []
    first_key = 0
    for key in keys:
        first_row, column = 0, list[Block]()
        for row in rows:
            if not positions.excludes(row, key):
                attending, attended = positions.meet(row, key)
                is_causal = positions.is_causal((attending,), (attended,))
                is_partial = not is_causal and not positions.includes(attending, attended)
                first = first_row + attending.start - row.start, first_key + attended.start - key.start
                block = Block((attending,), (attended,), *first, is_causal, is_partial)
                if (
                    column
                    and column[-1].row_slice.stop == block.first_row
                    and column[-1].keys == block.keys
                    and not (_is_masked(column[-1]) or _is_masked(block))
                ):
                    column[-1] = replace(column[-1], rows=(*column[-1].rows, attending))
                else:
                    column.append(block)
            first_row += row.length
        for block in column:
            before = next((known for known in blocks if _continues(known, block)), None)
            if before is None:
                blocks.append(block)
            else:
                blocks[blocks.index(before)] = replace(before, keys=(*before.keys, *block.keys))
        first_key += key.length
    return tuple(blocks)


def _is_masked(block: Block) -> bool:
    return block.is_causal or block.is_partial


def _continues(known: Block, block: Block) -> bool:
    return known.rows == block.rows and known.key_slice.stop == block.first_key and not (_is_masked(known) or _is_masked(block))
