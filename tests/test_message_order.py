"""Rings and halos where a send waits for its receive, as over NCCL: with a group per direction their messages wait in no circle."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from autopar.checks import threads
from autopar.ir.layout import Mesh
from autopar.ops import comm
from autopar.ops.attention_blocks import Scores
from autopar.ops.halo import Halo, fetch, give_back
from autopar.ops.positions import Positions
from autopar.ops.ring import ring_attention

Begun = tuple[bool, int]
"""Whether a rank sends or receives, and the other rank."""


class _Noting(comm.Axis):
    """An axis that notes in which order messages are begun."""

    def __init__(self, axis: comm.Axis) -> None:
        self.axis, self.name, self.size, self.index = axis, axis.name, axis.size, axis.index
        self.begun: list[Begun] = []

    def send(self, x: Tensor, to: int) -> comm.Message:
        self.begun.append((True, to))
        return self.axis.send(x, to)

    def receive(self, source: int, shape: Any, dtype: torch.dtype, device: torch.device) -> comm.Message:
        self.begun.append((False, source))
        return self.axis.receive(source, shape, dtype, device)

    def all_reduce(self, x: Tensor, op: comm.Reduction = "sum") -> Tensor:
        raise NotImplementedError

    gather_stack = reduce_stack = exchange_stack = all_reduce  # type: ignore[assignment]


def _ring(*, causal: bool, window: int | None, zigzag: bool) -> Callable[[comm.Axis], None]:
    def run(axis: comm.Axis) -> None:
        q, k, v = (torch.randn(1, 1, 4, 8, requires_grad=True) for _ in range(3))
        positions = Positions.of(causal=causal, window=window)
        ring_attention(q, k, v, None, None, positions, Scores(0.3), axis, zigzag=zigzag).sum().backward()

    return run


def _halo(before: int, behind: int) -> Callable[[comm.Axis], None]:
    def run(axis: comm.Axis) -> None:
        halo = Halo(2, before, behind, axis)
        fetch(torch.randn(1, 1, 4), halo)
        give_back(torch.randn(1, 1, 4 + before + behind), halo)

    return run


EXCHANGES: Mapping[str, Callable[[comm.Axis], None]] = {
    "causal": _ring(causal=True, window=None, zigzag=False),
    "zigzag": _ring(causal=True, window=None, zigzag=True),
    "bidirectional": _ring(causal=False, window=None, zigzag=False),
    "causal window": _ring(causal=True, window=6, zigzag=False),
    "zigzag window": _ring(causal=True, window=6, zigzag=True),
    "window": _ring(causal=False, window=3, zigzag=False),
    "looks back": _halo(3, 0),
    "both ways": _halo(1, 1),
    "longer than a part": _halo(6, 5),
}


def _begin(exchange: Callable[[comm.Axis], None], ranks: int) -> Sequence[Sequence[Begun]]:
    """Per rank its messages in the order in which it begins them, forward and backward."""

    def work(rank: int) -> Sequence[Begun]:
        axis = _Noting(comm.axis("cp"))
        exchange(axis)
        return axis.begun

    return threads.run(Mesh(("cp",), (ranks,)), work)


def _stuck(begun: Sequence[Sequence[Begun]], *, directions: bool) -> int:
    """How many messages never come if those between two ranks run one after the other, in each direction or in both together."""
    queues: dict[tuple[int, int, bool], list[bool]] = defaultdict(list)  # what a rank has begun with another, True is a send

    def queue(rank: int, other: int, *, is_send: bool) -> list[bool]:
        return queues[rank, other, directions and (other > rank) == is_send]

    for rank, messages in enumerate(begun):
        for is_send, other in messages:
            queue(rank, other, is_send=is_send).append(is_send)
    has_moved = True
    while has_moved:
        has_moved = False
        for rank, other in itertools.permutations(range(len(begun)), 2):
            here, there = queue(rank, other, is_send=True), queue(other, rank, is_send=False)
            if here[:1] == [True] and there[:1] == [False]:
                del here[0], there[0]
                has_moved = True
    return sum(map(len, queues.values()))


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("exchange", EXCHANGES.values(), ids=EXCHANGES)
def test_messages_wait_in_no_circle(exchange: Callable[[comm.Axis], None], ranks: int) -> None:
    begun = _begin(exchange, ranks)
    assert any(begun)
    assert _stuck(begun, directions=True) == 0


def test_one_group_for_both_directions_would_be_a_circle() -> None:
    assert _stuck(_begin(EXCHANGES["both ways"], 2), directions=False) > 0
    assert _stuck(_begin(EXCHANGES["causal"], 3), directions=False) > 0
