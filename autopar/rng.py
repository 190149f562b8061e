"""Random numbers of a parallel program: different on the parts of a split op, the same on replicas of a part.

An op that draws does so from a stream of its own, seeded by one number drawn from the default CPU generator together with the
part's place in the mesh. Ranks whose default generators agree (same seed, same program) therefore agree on replicas; what
saves and restores the default generator, such as activation checkpointing, repeats the same masks; nothing is kept here.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from autopar import comm

# Threads that stand for ranks share torch's generators, so only one of them may draw at a time.
_DRAWING = threading.RLock()


class _Base(threading.local):
    generator: torch.Generator | None = None


_BASE = _Base()


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Inside, this thread seeds its streams from a generator of its own: the default generator of a simulated rank."""
    before, _BASE.generator = _BASE.generator, torch.Generator().manual_seed(seed)
    try:
        yield
    finally:
        _BASE.generator = before


@contextmanager
def stream(axes: Sequence[str], device: torch.device) -> Iterator[None]:
    """Inside, ops on `device` draw from the stream of this rank's part of an op that `axes` split (none: all agree)."""
    with _DRAWING:
        drawn = int(torch.randint(2**62, (), generator=_BASE.generator))
        place = f"{drawn}|{','.join(axes)}|{comm.index(axes) if axes else 0}"
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
