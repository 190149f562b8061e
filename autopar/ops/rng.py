"""Random numbers of a parallel program: different on the parts of a split op, the same on replicas of a part.

An op that draws does so from a stream of its own, seeded by one number drawn from the default CPU generator together with the
part's place in the mesh. Ranks whose default generators agree therefore agree on replicas: `agreed` makes them, for a call. What
saves and restores the default generator, such as activation checkpointing, repeats the same masks; `recorded` and `replayed` do so
without touching any generator: they keep the few numbers that were drawn.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from autopar.ops import comm

# Threads that stand for ranks share torch's generators, so only one of them may draw at a time.
_DRAWING = threading.RLock()


class _Base(threading.local):
    generator: torch.Generator | None = None
    agreement: _Agreement | None = None
    records: tuple[list[int], ...] = ()
    replay: Iterator[int] | None = None


_BASE = _Base()


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Inside, this thread seeds its streams from a generator of its own: the default generator of a simulated rank."""
    before, _BASE.generator = _BASE.generator, torch.Generator().manual_seed(seed)
    try:
        yield
    finally:
        _BASE.generator = before


def derive(number: int, *parts: int) -> int:
    """A seed of its own for each combination of `parts`, the same wherever `number` is the same."""
    text = "|".join(map(str, (number, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


@dataclass(slots=True)
class _Agreement:
    """Seeds the default generator alike on all ranks at the first draw; `before` is its state from then on."""

    share: Callable[[int], int]
    before: Tensor | None = None

    def begin(self) -> None:
        if self.before is None:
            seed = self.share(int(torch.randint(2**62, ())))
            self.before = torch.default_generator.get_state()
            torch.default_generator.manual_seed(seed)

    def end(self) -> None:
        if self.before is not None:
            torch.default_generator.set_state(self.before)


@contextmanager
def agreed(share: Callable[[int], int]) -> Iterator[None]:
    """Inside, streams are the same on all ranks whatever each drew before; the default generator ends one draw further, or none.

    Args:
        share: gives every rank the first rank's number; called at the first draw, so a program without any costs nothing.
    """
    before, agreement = _BASE.agreement, _Agreement(share)
    _BASE.agreement = agreement
    try:
        yield
    finally:
        _BASE.agreement = before
        agreement.end()


@contextmanager
def recorded() -> Iterator[list[int]]:
    """Inside, the numbers that seed this thread's streams are noted, in order, in the list that this gives."""
    numbers: list[int] = []
    before, _BASE.records = _BASE.records, (*_BASE.records, numbers)
    try:
        yield numbers
    finally:
        _BASE.records = before


@contextmanager
def replayed(numbers: Sequence[int]) -> Iterator[None]:
    """Inside, this thread seeds its streams from `numbers`, in order, as `recorded` noted them; no generator moves on.

    May run on another thread than the recording, and while other programs draw. Asking for more numbers than there are is an error
    of the caller: what is replayed must be what was recorded, or a beginning of it.
    """
    before, _BASE.replay = _BASE.replay, iter(numbers)
    try:
        yield
    finally:
        _BASE.replay = before


def _draw() -> int:
    """The next number that seeds a stream."""
    if _BASE.replay is not None:
        number = next(_BASE.replay)
    else:
        if _BASE.agreement is not None:
            _BASE.agreement.begin()
        number = int(torch.randint(2**62, (), generator=_BASE.generator))
    for numbers in _BASE.records:
        numbers.append(number)
    return number


@contextmanager
def stream(axes: Sequence[str], device: torch.device) -> Iterator[None]:
    """Inside, ops on `device` draw from the stream of this rank's part of an op that `axes` split (none: all agree)."""
    with _DRAWING:
        place = f"{_draw()}|{','.join(axes)}|{comm.index(axes) if axes else 0}"
        seed = int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest()) >> 1
        generator = _generator(device)
        if generator is None:  # a device without generators of its own, such as meta, draws nothing
            yield
            return
        state = generator.get_state()
        generator.manual_seed(seed)
        try:
            yield
        finally:
            generator.set_state(state)


def _generator(device: torch.device) -> torch.Generator | None:
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda":
        number = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[number]
    return None
