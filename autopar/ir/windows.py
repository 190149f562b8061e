"""Which elements of a dim the positions of a sliding window read, as those of a convolution.

Position i of the result reads ``size`` elements, ``dilation`` apart, the first of them ``stride * i - before``. Of n equal parts of the
dim, a rank's positions read its own part and what is next to it, its halo::

    stride 1, size 4, 3 zeros before, 2 parts of 4      rank 1 reads 1 2 3 | 4 5 6 7
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HaloSize:
    """How many elements of its neighbours a rank needs beside its own part of a dim.

    Attributes:
        before, behind: how many it needs before its part, and behind it.
        length: of the whole dim.
    """

    before: int
    behind: int
    length: int

    def sent(self, rank: int, ranks: int) -> int:
        """How many elements a rank sends to others, each counted as often as it is sent. Halos longer than parts reach further ranks.

        >>> [HaloSize(before=3, behind=0, length=16).sent(rank, 4) for rank in range(4)]
        [3, 3, 3, 0]
        >>> [HaloSize(before=6, behind=1, length=16).sent(rank, 4) for rank in range(4)]
        [6, 7, 5, 1]
        """
        part = self.length // ranks
        return min(self.before, (ranks - 1 - rank) * part) + min(self.behind, rank * part)

    def most_sent(self, ranks: int) -> int:
        """How many elements the rank sends that sends most."""
        return max(self.sent(rank, ranks) for rank in range(ranks))


def find_halo(length: int, positions: int, *, size: int, stride: int, dilation: int, before: int) -> HaloSize | None:
    """The halo of equal parts of a dim; None where equal parts of the result aren't made of equal parts of the dim.

    >>> find_halo(16, 8, size=3, stride=2, dilation=1, before=1)
    HaloSize(before=1, behind=0, length=16)

    Args:
        length: of the dim that is read.
        positions: number of positions of the result.
        size: number of elements that a position reads.
        stride: distance of the first elements of two positions.
        dilation: distance of two elements of one position.
        before: zeros that stand before the first element.
    """
    behind = dilation * (size - 1) - before - stride + 1
    if length != stride * positions or before < 0 or behind <= -stride:
        return None
    return HaloSize(before, max(0, behind), length)


def find_pads(padding: str | int | Sequence[int], sizes: Sequence[int], dilations: Sequence[int]) -> list[tuple[int, int]]:
    """The zeros before and behind each dim of a convolution of these sizes, as torch's argument `padding` states them.

    >>> find_pads("same", [4], [1]), find_pads([2], [3, 3], [1, 1])
    ([(1, 2)], [(2, 2), (2, 2)])
    """
    if padding == "same":
        both = [dilation * (size - 1) for size, dilation in zip(sizes, dilations, strict=True)]
        return [(amount // 2, amount - amount // 2) for amount in both]
    amounts = per_dim(0 if isinstance(padding, str) else padding, len(sizes))
    return [(amount, amount) for amount in amounts]


def per_dim(value: int | Sequence[int], dims: int) -> list[int]:
    """An argument of torch that is a number for all dims, or one per dim, as one per dim."""
    return [value] * dims if isinstance(value, int) else list(value) * (dims // len(value))
