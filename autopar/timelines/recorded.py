"""What ranks have recorded of a real run, put together to one trace.

Comes in: a `RankRecord` of each rank. Goes out: a `Trace`, with the names and threads of a predicted one. In it, what a pass computes is
what is left of it beside the collectives that it waits for; where nothing is shown on a rank, it waits for messages or does what isn't
seen.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from autopar.timelines.trace import COMMUNICATION, COMPUTE, MEETINGS, Arrow, Event, Sample, Trace, show_message


@dataclass(frozen=True, slots=True)
class Sent:
    """A message as its sender sees it: the send as text, when it began, how long that kept the sender, and its bytes."""

    name: str
    start: float
    seconds: float
    nbytes: int


@dataclass(frozen=True, slots=True)
class RankRecord:
    """What a rank has recorded; times are seconds of its own clock.

    Attributes:
        rank: among all ranks.
        pipeline_rank: the pipeline rank that it is in.
        width: how many ranks a pipeline rank has.
        events: passes, collectives (`COMMUNICATION`), `MEETINGS` and the optimizer; collectives are inside of passes or between them.
        sent: messages that were sent.
        arrived: send as text, and when the rank that waited for it had it, in the order of waiting.
        memory: samples.
        meetings: when it came to each meeting of all ranks, and when it left it: nobody leaves before all have come.
    """

    rank: int
    pipeline_rank: int
    width: int
    events: tuple[Event, ...]
    sent: tuple[Sent, ...]
    arrived: tuple[tuple[str, float], ...]
    memory: tuple[Sample, ...]
    meetings: tuple[tuple[float, float], ...] = ()


def to_text(record: RankRecord) -> str:
    """The record as text, for another rank."""
    return json.dumps(asdict(record))


def from_text(text: str) -> RankRecord:
    """The record that `to_text` has written."""
    data: dict[str, Any] = json.loads(text)
    return RankRecord(
        data["rank"],
        data["pipeline_rank"],
        data["width"],
        tuple(Event(**event) for event in data["events"]),
        tuple(Sent(**sent) for sent in data["sent"]),
        tuple((name, time) for name, time in data["arrived"]),
        tuple(Sample(**sample) for sample in data["memory"]),
        tuple((came, left) for came, left in data["meetings"]),
    )


def align(records: Sequence[RankRecord]) -> list[RankRecord]:
    """The records by one clock, that of the first rank, which begins with what was recorded first.

    A rank leaves a meeting after all have come. So with o what has to be added to a rank's clock, ``came + o <= left of the first rank``
    and ``came of the first rank <= left + o`` for every meeting: o is taken in the middle of what these leave.
    """
    first = records[0].meetings
    offsets = []
    for record in records:
        low = max((came - left for (came, _), (_, left) in zip(first, record.meetings, strict=True)), default=0.0)
        high = min((left - came for (_, left), (came, _) in zip(first, record.meetings, strict=True)), default=0.0)
        offsets.append((low + high) / 2)
    starts = [event.start + offset for record, offset in zip(records, offsets, strict=True) for event in record.events]
    zero = min(starts, default=0.0)
    return [_shift(record, offset - zero) for record, offset in zip(records, offsets, strict=True)]


def _shift(record: RankRecord, seconds: float) -> RankRecord:
    return replace(
        record,
        events=tuple(replace(event, start=event.start + seconds) for event in record.events),
        sent=tuple(replace(sent, start=sent.start + seconds) for sent in record.sent),
        arrived=tuple((name, time + seconds) for name, time in record.arrived),
        memory=tuple(replace(sample, time=max(0.0, sample.time + seconds)) for sample in record.memory),
        meetings=(),
    )


def merge(title: str, records: Sequence[RankRecord]) -> Trace:
    """The trace of all ranks; `records` has one of each, in their order."""
    records = align(records)
    ranks = len(records) // max(1, records[0].width)
    names = tuple(f"rank {record.rank}" + (f", pipeline rank {record.pipeline_rank}" if ranks > 1 else "") for record in records)
    events: list[Event] = []
    arrivals: dict[tuple[int, str], list[tuple[int, float]]] = defaultdict(list)
    starts: list[list[float]] = []
    for record in records:
        own = list(_cut_out(record.events))
        events += own
        starts.append(sorted(event.start for event in own if event.thread == COMPUTE))
        for name, time in record.arrived:
            arrivals[record.rank % record.width, name].append((record.rank, time))
    arrows: list[Arrow] = []
    for record in records:
        for sent in record.sent:
            waiting = arrivals[record.rank % record.width, sent.name]
            if not waiting:
                continue
            target, time = waiting.pop(0)
            # What needed it begins when all that it needs has arrived.
            place = bisect_left(starts[target], time)
            used = starts[target][place] if place < len(starts[target]) else time
            # Clocks may be apart by more than a message takes.
            arrived, used = max(sent.start, time), max(sent.start, used)
            arrows.append(Arrow(sent.name, record.rank, target, sent.start, arrived, used, sent.nbytes))
            events.append(show_message(arrows[-1], sent.seconds))
    seconds = max((event.end for event in events), default=0.0)
    memory = tuple(replace(sample, time=min(sample.time, seconds)) for record in records for sample in record.memory)
    return Trace(title, names, seconds, tuple(events), tuple(arrows), memory)


def _cut_out(events: Sequence[Event]) -> Iterator[Event]:
    """The events of a rank; those that compute, without the times of collectives: one event becomes what is left before and after them."""
    waits = sorted((event for event in events if event.thread == COMMUNICATION), key=lambda event: event.start)
    yield from waits
    yield from (event for event in events if event.thread == MEETINGS)
    for event in events:
        if event.thread != COMPUTE:
            continue
        now = event.start
        for wait in waits:
            if wait.start >= event.end or wait.end <= now:
                continue
            if wait.start > now:
                yield replace(event, start=now, seconds=wait.start - now)
            now = wait.end
        if now < event.end:
            yield replace(event, start=now, seconds=event.end - now)
