"""What watches what this rank does, if anything does.

Comes in: a `Watcher`, which `autopar.runtime.recording` makes. Goes out: to whatever runs, the one that watches now. It stands apart from
what records, since emitted packages run schedules too and have nothing to record them with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from torch import Tensor

from autopar.schedules import Action


class Watcher(Protocol):
    """Is told what this rank does."""

    def now(self) -> float:
        """The time, in seconds."""
        ...

    def action(self, action: Action) -> AbstractContextManager[None]:
        """Inside, an action of a schedule runs."""
        ...

    def arrive(self, send: Action) -> None:
        """The message of this send is there: the action that waited for it starts now."""
        ...

    def send(self, action: Action, tensors: Sequence[Tensor], start: float) -> None:
        """A send began at `start` and keeps this rank no longer."""
        ...

    def forward(self) -> AbstractContextManager[None]:
        """Inside, the forward of a whole program runs."""
        ...

    def watch_backward(self, results: Sequence[Any]) -> None:
        """The backward will come through any of these results."""
        ...


_WATCHERS: list[Watcher] = []


def current() -> Watcher | None:
    """What watches now."""
    return _WATCHERS[-1] if _WATCHERS else None


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """Inside, this one watches."""
    _WATCHERS.append(watcher)
    try:
        yield
    finally:
        _WATCHERS.remove(watcher)
