"""Gradients that come to a parameter before their sum over ranks is complete, while the backward goes on.

Comes in: sums that were begun, in the order of the backward, with the block of the program that each is of. Goes out: each gradient, to
whom it is for, when it is complete. So that memory is bounded, those of a block are waited for when the backward has gone on too far.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from autopar.ops import Message

_Arrival = tuple[Message, torch.dtype, Callable[[Tensor], None]]


class Arrivals:
    """Sums of gradients that are under way; every rank adds the same ones in the same order."""

    def __init__(self) -> None:
        # The blocks in the order of the backward, each with its sums.
        self._blocks: deque[tuple[int, list[_Arrival]]] = deque()

    def add(self, begin: Callable[[], Message], dtype: torch.dtype, hand_over: Callable[[Tensor], None], block: int, ahead: int) -> None:
        """Begin a sum, after those are waited for that are too far behind.

        Args:
            begin: begins the sum.
            dtype: to which it is cast then.
            hand_over: takes it.
            block: whose gradient it is.
            ahead: how many blocks the backward may go on meanwhile.
        """
        self.reach(block, ahead)
        if not self._blocks or self._blocks[-1][0] != block:
            self._blocks.append((block, []))
        self._blocks[-1][1].append((begin(), dtype, hand_over))

    def reach(self, block: int, ahead: int) -> None:
        """The backward comes to a block, before it makes gradients there: wait for the sums of those that are too far behind."""
        while self._blocks and len(self._blocks) - (self._blocks[-1][0] == block) > ahead:
            self._finish_first()

    def finish(self) -> None:
        """Wait for all, and hand them over."""
        while self._blocks:
            self._finish_first()

    def clear(self) -> None:
        """Forget all, after a backward that failed."""
        self._blocks.clear()

    def _finish_first(self) -> None:
        _, arrivals = self._blocks.popleft()
        for gradient, dtype, hand_over in arrivals:
            hand_over(gradient.wait().to(dtype))
