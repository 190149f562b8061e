"""Where the threads of one axis exchange tensors, when all ranks of a mesh are threads of one process.

Comes in: a tensor of each thread, and what the collective is called. Goes out: what a function makes of the tensors of all.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from autopar.errors import CommError

_EMPTY = ("", torch.empty(0))


@final
class Rendezvous:
    """Where the threads of one axis exchange tensors: a slot per rank for collectives, an inbox per pair of ranks for messages.

    In a collective every rank fills its slot, all wait for each other, all read the slots, and all wait again before the next one.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._slots: list[tuple[str, Tensor]] = [_EMPTY] * size
        # threading.Barrier can't be closed safely: its abort also fails threads that were let through but haven't woken yet.
        self._changed = threading.Condition()
        self._arrived = 0
        self._rounds = 0
        self._ended: set[int] = set()
        # Per (sender, receiver) the messages not received yet, by number, and how many were sent and are expected.
        self._inboxes: dict[tuple[int, int], dict[int, Tensor]] = {}
        self._sent: Counter[tuple[int, int]] = Counter()
        self._expected_counts: Counter[tuple[int, int]] = Counter()

    def meet(self, index: int, label: str, value: Tensor, read: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """Run one collective: hand in `value`, wait for all ranks, and return ``read(values)``, the values being in rank order.

        No rank continues before all have read. `label` says which collective it is, and of what.

        Raises CommError when another rank runs a collective with another label, has failed, or has ended.
        """
        self._slots[index] = (label, value)
        self._wait(label)
        labels = {slot[0] for slot in self._slots}
        if len(labels) > 1:
            raise CommError(f"ranks of one axis run different collectives at the same time: {', '.join(sorted(labels))}")
        result = read([slot[1] for slot in self._slots])
        self._wait(label)
        self._slots[index] = _EMPTY
        return result

    def send(self, source: int, to: int, x: Tensor) -> None:
        """Put the next message from `source` into the inbox of `to`; nobody waits."""
        with self._changed:
            self._inboxes.setdefault((source, to), {})[self._sent[source, to]] = x
            self._sent[source, to] += 1
            self._changed.notify_all()

    def expect(self, source: int, to: int) -> int:
        """The number of the next message from `source` to `to` that no receive expects yet."""
        self._expected_counts[source, to] += 1
        return self._expected_counts[source, to] - 1

    def has_arrived(self, source: int, to: int, number: int) -> bool:
        """Whether message `number` was sent and not received yet."""
        return number in self._inboxes.get((source, to), {})

    def receive(self, source: int, to: int, number: int) -> Tensor:
        """Wait for message `number` and return it. Raises CommError when its sender has failed or ended."""
        with self._changed:
            while not self.has_arrived(source, to, number):
                if source in self._ended:
                    raise CommError(f"rank {source} of the axis ended without sending message {number} to rank {to}")
                self._changed.wait()
            return self._inboxes[source, to].pop(number)

    def close(self, index: int) -> None:
        """Declare that rank `index` has ended: every rank that waits for it, now or later, fails with a CommError."""
        with self._changed:
            self._ended.add(index)
            self._changed.notify_all()

    def _wait(self, label: str) -> None:
        with self._changed:
            this_round = self._rounds
            self._arrived += 1
            if self._arrived == self.size:
                self._arrived = 0
                self._rounds += 1
                self._changed.notify_all()
            while this_round == self._rounds:
                if self._ended:
                    raise CommError(f"another rank ended without coming to the {label}")
                self._changed.wait()
