"""Traces as files in the Trace Event Format, which Perfetto (https://ui.perfetto.dev) and ``chrome://tracing`` open, and back.

Comes in: one or more `Trace`s. Goes out: JSON text. Ranks are processes, threads of a rank are threads; what takes time is a complete
event (``X``), a message also a flow (``s`` to ``f``), memory a counter (``C``). Times are microseconds, rounded to nanoseconds. Everything
else of an event is in its ``args``, under the names of `Event`'s fields, so that a file can be read back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from autopar.errors import InputError
from autopar.texts import printable
from autopar.timelines.trace import COMPUTE, MESSAGES, Arrow, Event, Sample, Trace

FORMAT = "autopar-trace"
MOST_BYTES = 2**30
"""Of a file that is read back."""

_ARGS = ("phase", "purpose", "stage", "microbatch", "layer", "axis", "collective", "nbytes")
_UNIT = 1e6  # microseconds in a second


def to_chrome(traces: Sequence[Trace]) -> str:
    """The JSON text of traces that lie side by side: the ranks of the first, then those of the second, and so on."""
    events: list[dict[str, Any]] = []
    described: list[dict[str, Any]] = []
    first = 0
    for trace in traces:
        events += _list_events(trace, first, len(events), f"{trace.title}: " if len(traces) > 1 else "")
        described.append({"title": trace.title, "ranks": list(trace.ranks), "seconds": trace.seconds})
        first += len(trace.ranks)
    # An event per line, so that a file can be looked through.
    lines = ",\n".join(json.dumps(event, separators=(",", ":")) for event in events)
    other = json.dumps({"format": FORMAT, "traces": json.dumps(described)})
    return f'{{"displayTimeUnit":"ms","otherData":{other},"traceEvents":[\n{lines}\n]}}\n'


def _list_events(trace: Trace, first: int, number: int, prefix: str) -> Iterator[dict[str, Any]]:
    """The events of one trace, whose ranks are processes from `first` on, and whose flows are numbered from `number` on."""
    threads = [trace.threads(rank) or (COMPUTE,) for rank in range(len(trace.ranks))]
    for rank, name in enumerate(trace.ranks):
        pid = first + rank
        yield _metadata("process_name", pid, 0, {"name": printable(prefix + name)})
        yield _metadata("process_sort_index", pid, 0, {"sort_index": pid})
        for tid, thread in enumerate(threads[rank]):
            yield _metadata("thread_name", pid, tid, {"name": thread})
            yield _metadata("thread_sort_index", pid, tid, {"sort_index": tid})
    for event in sorted(trace.events, key=lambda event: (event.start, -event.seconds)):
        start = _microseconds(event.start)
        yield {
            "name": printable(event.name),
            "cat": event.phase,
            "ph": "X",
            "pid": first + event.rank,
            "tid": threads[event.rank].index(event.thread),
            "ts": start,
            # The difference of rounded times, so that an event ends where the next one starts.
            "dur": round(_microseconds(event.end) - start, 3),
            "args": {name: value for name in _ARGS if (value := getattr(event, name)) not in (None, "")},
        }
    for index, arrow in enumerate(trace.arrows):
        common = {"name": "message", "cat": "message", "id": number + index}
        sender = threads[arrow.source]
        thread = MESSAGES.format(arrow.target)
        details = {"send": arrow.name, "arrived": _microseconds(arrow.arrived), "nbytes": arrow.nbytes}
        tid = sender.index(thread) if thread in sender else 0
        yield {**common, "ph": "s", "pid": first + arrow.source, "tid": tid, "ts": _microseconds(arrow.sent), "args": details}
        yield {**common, "ph": "f", "bp": "e", "pid": first + arrow.target, "tid": 0, "ts": _microseconds(arrow.used)}
    for sample in trace.memory:
        time = _microseconds(sample.time)
        yield {"name": "memory", "ph": "C", "pid": first + sample.rank, "tid": 0, "ts": time, "args": {"bytes": sample.nbytes}}


def _metadata(name: str, pid: int, tid: int, args: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": pid, "tid": tid, "args": args}


def _microseconds(seconds: float) -> float:
    return round(seconds * _UNIT, 3)


def from_chrome(text: str) -> tuple[Trace, ...]:
    """The traces of a file that `to_chrome` made. Raises InputError for another one."""
    try:
        document = json.loads(text)
        if document["otherData"]["format"] != FORMAT:
            raise ValueError("another program has written it")
        described = json.loads(document["otherData"]["traces"])
        return tuple(_read_traces(document["traceEvents"], described))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise InputError(
            f"not a trace that autopar has written ({type(error).__name__}: {error}); `autopar timeline` and `model.trace` make one"
        ) from error


def _read_traces(items: Sequence[Mapping[str, Any]], described: Sequence[Mapping[str, Any]]) -> Iterator[Trace]:
    threads = {(item["pid"], item["tid"]): item["args"]["name"] for item in items if item["name"] == "thread_name" and item["ph"] == "M"}
    first = 0
    for trace in described:
        count = len(trace["ranks"])
        own = [item for item in items if first <= item["pid"] < first + count]
        events = [_read_event(item, threads[item["pid"], item["tid"]], first) for item in own if item["ph"] == "X"]
        starts = {item["id"]: item for item in own if item["ph"] == "s"}
        arrows = [_read_arrow(starts[item["id"]], item, first) for item in own if item["ph"] == "f"]
        memory = [Sample(item["pid"] - first, _seconds(item["ts"]), _whole(item["args"]["bytes"])) for item in own if item["ph"] == "C"]
        yield Trace(
            printable(str(trace["title"])),
            tuple(printable(str(name)) for name in trace["ranks"]),
            _number(trace["seconds"]),
            tuple(events),
            tuple(arrows),
            tuple(memory),
        )
        first += count


def _read_event(item: Mapping[str, Any], thread: str, first: int) -> Event:
    args = item["args"]
    stage, microbatch = (None if args.get(name) is None else _whole(args[name]) for name in ("stage", "microbatch"))
    texts = {name: printable(str(args.get(name, ""))) for name in ("phase", "purpose", "layer", "axis", "collective")}
    return Event(
        rank=item["pid"] - first,
        thread=printable(thread),
        name=printable(str(item["name"])),
        start=_seconds(item["ts"]),
        seconds=_seconds(item["dur"]),
        stage=stage,
        microbatch=microbatch,
        nbytes=_number(args.get("nbytes", 0)),
        **texts,
    )


def _read_arrow(start: Mapping[str, Any], end: Mapping[str, Any], first: int) -> Arrow:
    args = start["args"]
    times = _seconds(start["ts"]), _seconds(args["arrived"]), _seconds(end["ts"])
    return Arrow(printable(str(args["send"])), start["pid"] - first, end["pid"] - first, *times, _number(args["nbytes"]))


def _seconds(value: Any) -> float:
    return _number(value) / _UNIT


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{value!r} is no number from 0")
    return float(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is no whole number")
    return value
