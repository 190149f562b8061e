"""The timeline of a page: the events of a predicted step and its memory, in columns, so that many of them stay small.

Comes in: a `Plan`. Goes out: data for JSON, and a table of the ranks.
"""

from __future__ import annotations

from typing import Any

from autopar.pages.tables import BYTES, SECONDS, TEXT, Table
from autopar.timelines import Trace

MOST_EVENTS = 40_000
"""Events that a page shows at most, which are about two megabytes. Of a longer step it shows the beginning."""


def describe_timeline(trace: Trace) -> dict[str, Any]:
    """The events and the memory of a trace.

    An event is a row of the columns `rank`, `name`, `kind`, `microbatch` (-1 where it is done once per step) and `start`. Names are
    numbers of `names`, kinds of `kinds`: what events of all micro-batches share, as lists of thread, phase, purpose, stage, layer, axis,
    collective, bytes and seconds. `until` is the time up to which events are shown: the whole step, unless there are too many.
    """
    events = sorted(trace.events, key=lambda event: event.start)
    shown = events[:MOST_EVENTS]
    until = trace.seconds if len(shown) == len(events) else events[MOST_EVENTS].start
    names: dict[str, int] = {}
    kinds: dict[tuple[Any, ...], int] = {}
    columns: dict[str, list[float]] = {"rank": [], "name": [], "kind": [], "microbatch": [], "start": []}
    for event in shown:
        kind = (
            event.thread,
            event.phase,
            event.purpose,
            event.stage,
            event.layer,
            event.axis,
            event.collective,
            event.nbytes,
            event.seconds,
        )
        columns["rank"].append(event.rank)
        columns["name"].append(names.setdefault(event.name, len(names)))
        columns["kind"].append(kinds.setdefault(kind, len(kinds)))
        columns["microbatch"].append(-1 if event.microbatch is None else event.microbatch)
        columns["start"].append(event.start)
    return {
        "ranks": list(trace.ranks),
        "seconds": trace.seconds,
        "until": until,
        "names": list(names),
        "kinds": [list(kind) for kind in kinds],
        "events": columns,
        "memory": _describe_memory(trace, until),
    }


def _describe_memory(trace: Trace, until: float) -> list[dict[str, list[float]]]:
    """Per rank the times at which its memory changes, and the bytes from then on."""
    ranks: list[dict[float, int]] = [{} for _ in trace.ranks]
    for sample in trace.memory:
        if sample.time <= until:
            ranks[sample.rank][sample.time] = sample.nbytes  # of samples at one time the last holds on
    return [{"times": list(samples), "bytes": list(samples.values())} for samples in ranks]


def tabulate_ranks(trace: Trace) -> Table:
    """How long each rank computes, waits for collectives and waits for other stages, and its most memory."""
    rows = []
    for rank, name in enumerate(trace.ranks):
        busy = trace.busy(rank)
        peak = max((sample.nbytes for sample in trace.memory if sample.rank == rank), default=None)
        exchanging = trace.exchanging(rank)
        rows.append((name, busy - exchanging, exchanging, trace.seconds - busy, peak))
    return Table(
        "ranks",
        "Ranks",
        "Exchanges are those that nothing hides; waiting is for other pipeline ranks. All ranks of a pipeline rank are alike.",
        (("rank", TEXT), ("computes", SECONDS), ("exchanges", SECONDS), ("waits", SECONDS), ("most memory", BYTES)),
        tuple(rows),
    )
