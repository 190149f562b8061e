"""Random numbers of a parallel program: different on the parts of a split op, the same on replicas of a part.

Comes in: the axes that split a random op. Goes out: a generator state in which the op runs, by `stream`. Every random op gets a stream of
its own, seeded by one number from torch's default CPU generator together with the part's position on those axes. So replicas draw the
same where the default generators of the ranks agree, which `agreed` ensures for a call. Whatever saves and restores the default generator,
such as activation checkpointing, repeats the same masks; `recorded` and `replayed` repeat them without any generator, from the few numbers
that seeded the streams.
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
    """Inside, this thread seeds its streams from a generator of its own, seeded with `seed`, in the place of torch's default one.

    Threads that stand for ranks share torch's default generator, so each needs its own.
    """
    before, _BASE.generator = _BASE.generator, torch.Generator().manual_seed(seed)
    try:
        yield
    finally:
        _BASE.generator = before


def derive(number: int, *parts: int) -> int:
    """A seed for each combination of `number` and `parts`, such as a stage and a micro-batch; the same wherever these are the same."""
    return _hash("|".join(map(str, (number, *parts))))


def _hash(text: str) -> int:
    """A seed of 63 bits; Python's own ``hash`` of a text differs between processes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


@dataclass(slots=True)
class _Agreement:
    """Seeds the default generator alike on all ranks at the first draw; `before` is the state that it gets back at the end."""

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
    """Inside, replicas draw alike on all ranks, whatever each rank has drawn before.

    Afterwards the default generator is one draw further if anything was drawn, and unchanged if not.

    Args:
        share: returns the first rank's argument on every rank. It is called at the first draw, so that a program without random ops
            communicates nothing.
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
    """Inside, the numbers that seed this thread's streams are appended, in order, to the list that this yields."""
    numbers: list[int] = []
    before, _BASE.records = _BASE.records, (*_BASE.records, numbers)
    try:
        yield numbers
    finally:
        _BASE.records = before


@contextmanager
def replayed(numbers: Sequence[int]) -> Iterator[None]:
    """Inside, this thread seeds its streams with the `numbers` that `recorded` gave, in order, and no generator changes its state.

    The thread may be another than that of the recording, and other programs may draw meanwhile. What runs inside must be what was recorded,
    or the beginning of it; drawing more is a mistake of the caller.
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
    """Inside, ops on `device` draw from the stream of this rank's part of a random op.

    Args:
        axes: the axes that split the op. Ranks at different positions on them draw different numbers, ranks at the same position the same.
        device: where the op's tensors are.
    """
    with _DRAWING:
        seed = _hash(f"{_draw()}|{','.join(axes)}|{comm.index(axes) if axes else 0}")
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
    """Torch's default generator of a device; None for devices that have none."""
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda":
        number = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[number]
    return None
