"""What all ranks must do alike: where they meet, and the error on every rank where they don't.

Comes in: an event, such as a call of a compiled model, and a few numbers about it. Goes out: the numbers of all ranks. Ranks that come to
different events at the same time, such as a read of an output on one rank only, get an error that says who does what, instead of waiting
for each other until a timeout. All of this runs on the host over a process group of its own, so that nothing else can be mixed up with it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise, zip_longest

import torch
import torch.distributed as dist

from autopar import torch_compat
from autopar.errors import ERROR_TYPES, AutoparError, CommError
from autopar.ops import GroupAxis
from autopar.runtime.failures import Alarm, within
from autopar.runtime.world import default_timeout

FACTS = 7
"""How many numbers a rank can tell the others at an event."""
PATIENCE = 2.0
"""Seconds for which a rank whose wait has failed listens to what other ranks wait for."""
_READ_REMEDY = (
    "Reading a split output gathers it from all ranks: read it on every rank, outside of an `if rank == 0`, or compile with "
    'outputs="sharded" and use the part that a rank has'
)
_REMEDY = (
    "Every rank must make the same calls, in training and in evaluation, run the same backwards and read the same outputs, in one order, "
    "outside of an `if rank == 0`"
)


@dataclass(frozen=True, slots=True)
class Difference:
    """What the first rank has where another one has something else, as text, and the number of that rank."""

    rank: int
    first: str
    other: str


class Agreement:
    """The ranks of the default process group, which meet at the events of all compiled models.

    Args:
        group: a gloo process group of all ranks, used for nothing else.
        store: the key-value store over which ranks say what they wait for when a wait has failed.
    """

    def __init__(self, group: dist.ProcessGroup, store: torch_compat.Store) -> None:
        self._axis = GroupAxis("all ranks", group)
        self._store = store
        self._models: dict[str, int] = {}
        self._alarms: list[Alarm] = []

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._axis.size

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self._axis.index == 0

    def name_model(self, name: str) -> str:
        """A name for a model of this class, which tells it from others of the same class: all ranks compile in one order."""
        number = self._models[name] = self._models.get(name, 0) + 1
        return name if number == 1 else f"{name} (number {number})"

    def join(self, alarm: Alarm) -> None:
        """When the pipeline of this alarm fails on a rank, let the ranks that wait here fail too, with what failed there."""
        alarm.watch([self._axis.group])
        self._alarms.append(alarm)

    def meet(self, event: str, facts: Sequence[int] = ()) -> list[tuple[int, ...]]:
        """Wait until all ranks have come to this event, and return their facts, in rank order.

        Args:
            event: what this rank does, after "rank 0": ``calls Net``.
            facts: at most `FACTS` integers of 64 bits, the rest are zeros.

        Raises CommError when another rank comes to another event, or to none before the timeout of the default process group, and
        PipelineError when a pipeline has failed on another rank.
        """
        row = torch.tensor([digest(event), *facts, *(0 for _ in range(FACTS - len(facts)))])
        rows = self._wait(event, lambda: self._axis.gather_stack(row)).tolist()
        if any(other[0] != rows[0][0] for other in rows):
            events = group_by(self.gather(event))
            remedy = _READ_REMEDY if any(text.startswith("reads") for text in events) else _REMEDY
            raise CommError(f"the ranks do different things: {'; '.join(f'{who} {text}' for text, who in events.items())}. {remedy}")
        return [tuple(other[1:]) for other in rows]

    def find_difference(self, event: str, lines: Sequence[str], texts: Sequence[str] | None = None) -> Difference | None:
        """The first of `lines` in which some rank differs from the first rank, the same on every rank; None where all have the same lines.

        Args:
            event: as in `meet`.
            lines: what is compared.
            texts: what is told of each line; by default the line itself.
        """
        if len(set(self.meet(event, [digest("\n".join(lines))]))) == 1:
            return None
        expected = self.gather("\n".join(lines) if self.is_first else "")[0].split("\n")
        differing = (number for number, (line, other) in enumerate(zip_longest(lines, expected)) if line != other)
        numbers = [number for number, *_ in self.meet(event, [next(differing, -1)])]
        rank, number = next((rank, number) for rank, number in enumerate(numbers) if number >= 0)
        told = self.gather([*(lines if texts is None else texts), *["nothing"] * (number + 1)][number])
        return Difference(rank, told[0], told[rank])

    @contextmanager
    def share_errors(self, event: str) -> Iterator[None]:
        """At the end, wait for all ranks: if what ran inside failed on one of them, every rank raises an error, its own if it has one."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        try:
            failures = [failed for failed, *_ in self.meet(event, [failure is not None])]
        except CommError as error:
            raise error from failure or error.__cause__
        if any(failures):
            reasons = self.gather("" if failure is None else f"{type(failure).__name__}:{failure}")
            if failure is not None:
                raise failure
            rank = next(rank for rank, reason in enumerate(reasons) if reason)
            name, _, message = reasons[rank].partition(":")
            raise ERROR_TYPES.get(name, AutoparError)(f"on rank {rank}: {message if name in ERROR_TYPES else reasons[rank]}")

    def gather(self, text: str) -> list[str]:
        """The texts of all ranks, in rank order; all ranks must ask."""
        data = torch.tensor(list(text.encode()), dtype=torch.uint8)
        sizes = self._axis.gather_stack(torch.tensor(data.numel())).tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: data.numel()] = data
        rows = self._axis.gather_stack(padded)
        return [bytes(row[:size].tolist()).decode() for row, size in zip(rows, sizes, strict=True)]

    def _wait(self, event: str, gather: Callable[[], torch.Tensor]) -> torch.Tensor:
        start = time.monotonic()
        try:
            return gather()
        except RuntimeError as error:
            seconds = time.monotonic() - start
            alarm = next((alarm for alarm in self._alarms if alarm.has_been_raised()), None)
            with nullcontext() if alarm is None else alarm.guard(f"rank {self._axis.index} {event}"):
                reason = str(error).splitlines()[0].rpartition("] ")[2]
                raise CommError(
                    f"rank {self._axis.index} {event}, and waited {seconds:.1f} s for {self._find_missing(event)}. {_REMEDY}; a rank that "
                    f"has ended or hangs says so in its own log ({reason})"
                ) from error

    def _find_missing(self, event: str) -> str:
        """The ranks that don't wait at this event, as text: those that don't say so within `PATIENCE`."""
        key = f"autopar/waits {digest(event)} {{}}"

        def listen() -> list[int]:
            self._store.set(key.format(self._axis.index), "")
            missing = list(range(self.size))
            end = time.monotonic() + PATIENCE / 2
            while missing and time.monotonic() < end:
                missing = [rank for rank in missing if not self._store.check([key.format(rank)])]
                time.sleep(0.05)
            return missing

        nobody: list[int] = []
        missing = within(PATIENCE, listen, nobody)
        return name_ranks(missing) if missing else "another rank"


_FORMED: list[tuple[dist.ProcessGroup, Agreement]] = []


def form_agreement() -> Agreement | None:
    """The agreement of the default process group's ranks, formed by its first use; None with one rank. All ranks must call it."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    world = dist.group.WORLD
    assert world is not None
    if not _FORMED or _FORMED[0][0] is not world:
        group = dist.new_group(backend="gloo", timeout=default_timeout())
        _FORMED[:] = [(world, Agreement(group, torch_compat.default_store()))]
    return _FORMED[0][1]


def digest(text: str) -> int:
    """A number of 64 bits that stands for a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def group_by(texts: Sequence[str]) -> dict[str, str]:
    """From what each rank says, by rank, to who says it: ``{"8 rows": "rank 0", "6 rows": "ranks 1-3"}``."""
    return {text: name_ranks([rank for rank, other in enumerate(texts) if other == text]) for text in dict.fromkeys(texts)}


def name_ranks(ranks: Iterable[int]) -> str:
    """Ranks as text: ``rank 3``, ``ranks 0, 4-7``."""
    ordered = sorted(ranks)
    starts = [ordered[0], *(rank for before, rank in pairwise(ordered) if rank != before + 1)]
    ends = [*(before for before, rank in pairwise(ordered) if rank != before + 1), ordered[-1]]
    runs = ", ".join(str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True))
    return f"{'rank' if len(ordered) == 1 else 'ranks'} {runs}"
