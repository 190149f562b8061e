"""Traces as an SVG picture: a row per rank, time to the right, a colour per phase, memory below each row.

Comes in: one or more `Trace`s, which are drawn one below the other on one scale of time. Goes out: the text of an SVG file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from xml.sax.saxutils import escape

from autopar.texts import printable
from autopar.timelines.trace import BUSY, COPIES, MEETINGS, Event, Trace
from autopar.units import find_tick_step, format_bytes, format_seconds

# Pixels.
_WIDTH, _LEFT, _RIGHT = 1280, 128, 92
_ROW, _STRIP, _MEMORY, _GAP = 26, 5, 16, 8
_TITLE, _LEGEND, _AXIS, _PANEL = 30, 24, 26, 24
_CHARACTER = 6.2
_TICKS = 8

# What is drawn in which colour, in the order of the legend.
_FORWARD, _INPUT, _WEIGHT, _BACKWARD = "forward", "input gradient", "weight gradient", "backward"
_RECOMPUTE, _OPTIMIZER, _COMMUNICATION, _BESIDE, _COPY = "forward run again", "optimizer", "communication", "communication beside", "copies"
_MEMORY_NAME, _WAITING = "memory", "waiting"
_COLOURS = {
    _FORWARD: "#4878a8",
    _INPUT: "#e8853a",
    _WEIGHT: "#edc04f",
    _BACKWARD: "#d9634c",
    _RECOMPUTE: "#a678b0",
    _OPTIMIZER: "#8a6a50",
    _COMMUNICATION: "#4f9f57",
    _BESIDE: "#5cb8b2",
    _COPY: "#9a9a9a",
    _WAITING: "#f1f1f1",
    _MEMORY_NAME: "#c9d2e3",
}
_DARK = {_FORWARD, _OPTIMIZER}  # on these, text is white


def draw(traces: Sequence[Trace]) -> str:
    """The SVG text of traces, all on one scale of time."""
    seconds = max((trace.seconds for trace in traces), default=0.0) or 1.0
    scale = (_WIDTH - _LEFT - _RIGHT) / seconds
    parts: list[str] = []
    y = _TITLE + _LEGEND
    for trace in traces:
        parts.append(_text(_LEFT, y + 12, trace.title, size=12, weight="bold"))
        y += _PANEL
        largest = max((sample.nbytes for sample in trace.memory), default=0)
        for rank in range(len(trace.ranks)):
            parts += _draw_rank(trace, rank, y, scale, largest)
            y += _ROW + (_MEMORY + 2 if trace.memory else 0) + _GAP
        # The end of the step.
        x = _LEFT + trace.seconds * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - _GAP - 3}" y2="{y - _GAP + 3}" stroke="#000"/>')
        parts += _draw_axis(seconds, scale, y - _GAP + 4)
        y += _AXIS
    height = y + 4
    shown = {_WAITING, *(_kind_of(event) for trace in traces for event in trace.events)}
    shown |= {_MEMORY_NAME} if any(trace.memory for trace in traces) else set()
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
        ' font-family="DejaVu Sans, Verdana, sans-serif">'
    )
    steps = "; ".join(f"{trace.title}: step {format_seconds(trace.seconds)}" for trace in traces)
    title = f"<title>{escape(printable(steps))}</title>"
    return "\n".join([head, title, f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>', *_draw_legend(shown), *parts, "</svg>", ""])


def _draw_legend(shown: Iterable[str]) -> Iterator[str]:
    x = 16.0
    for name in (name for name in _COLOURS if name in shown):
        yield f'<rect x="{x:.1f}" y="14" width="14" height="14" fill="{_COLOURS[name]}" stroke="#999" stroke-width="0.5"/>'
        yield _text(x + 19, 25, name, size=11)
        x += 19 + _CHARACTER * 1.15 * len(name) + 10


def _draw_rank(trace: Trace, rank: int, y: float, scale: float, largest: int) -> Iterator[str]:
    """The row of a rank, with its memory below."""
    yield _text(_LEFT - 8, y + _ROW / 2 + 4, _shorten(trace.ranks[rank], _LEFT - 14), size=11, anchor="end", hint=trace.ranks[rank])
    yield f'<rect x="{_LEFT}" y="{y}" width="{trace.seconds * scale:.2f}" height="{_ROW}" fill="{_COLOURS[_WAITING]}"/>'
    own = [event for event in trace.events if event.rank == rank]
    chunks = sorted({event.stage for event in own if event.stage is not None and event.microbatch is not None})
    for event in own:
        if event.thread in BUSY:
            yield from _draw_event(event, y, scale, chunks)
    for event in own:
        if event.thread not in BUSY:
            yield _box(event, y + _ROW - _STRIP, _STRIP, scale, 1.0)
    if trace.seconds:
        exchanging = trace.exchanging(rank)
        lines = ("computes", trace.busy(rank) - exchanging), ("exchanges", exchanging)
        for number, (what, seconds) in enumerate(lines):
            yield _text(_WIDTH - _RIGHT + 6, y + 10 + 12 * number, f"{what} {seconds / trace.seconds:.0%}", size=10, colour="#555")
    samples = [sample for sample in trace.memory if sample.rank == rank]
    if samples and largest:
        yield from _draw_memory([(sample.time, sample.nbytes) for sample in samples], y + _ROW + 2, trace.seconds, scale, largest)


def _draw_event(event: Event, y: float, scale: float, chunks: Sequence[int]) -> Iterator[str]:
    """A box, lighter for later stages of a rank, with the micro-batch or the block's name where it fits."""
    place = chunks.index(event.stage) if event.stage in chunks else 0
    yield _box(event, y, _ROW, scale, 1.0 - 0.45 * place / max(1, len(chunks)))
    kind, width = _kind_of(event), event.seconds * scale
    label = _name_block(event.layer) if event.microbatch is None else str(event.microbatch)
    if kind not in (_COMMUNICATION, _COPY) and label and width >= _CHARACTER * len(label) + 2:
        x = _LEFT + (event.start + event.seconds / 2) * scale
        yield _text(x, y + _ROW / 2 + 4, label, size=10, anchor="middle", colour="#fff" if kind in _DARK and not place else "#222")


def _name_block(path: str) -> str:
    """The last part of a block's path; before a number, which alone would look like a micro-batch, also the part before."""
    before, _, last = path.rpartition(".")
    return f"{before.rpartition('.')[2]}.{last}" if before and last.isdecimal() else last


def _box(event: Event, y: float, height: float, scale: float, opacity: float) -> str:
    x, width = _LEFT + event.start * scale, max(event.seconds * scale, 0.15)
    edge = ' stroke="#fff" stroke-width="0.4"' if width > 3 else ""
    faded = f' fill-opacity="{opacity:.2f}"' if opacity < 1 else ""
    hint = f"{event.name}: {event.purpose}, {event.phase}, {format_seconds(event.seconds)}"
    return (
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{height}" fill="{_COLOURS[_kind_of(event)]}"{faded}{edge}>'
        f"<title>{escape(printable(hint))}</title></rect>"
    )


def _draw_memory(samples: Sequence[tuple[float, int]], y: float, seconds: float, scale: float, largest: int) -> Iterator[str]:
    """Bytes over time as steps, on the scale of the fullest rank of the trace."""
    bottom = y + _MEMORY
    points = [f"M{_LEFT},{bottom}"]
    for time, nbytes in samples:
        points.append(f"H{_LEFT + time * scale:.2f}V{bottom - nbytes / largest * _MEMORY:.2f}")
    points.append(f"H{_LEFT + seconds * scale:.2f}V{bottom}Z")
    yield f'<path d="{"".join(points)}" fill="{_COLOURS[_MEMORY_NAME]}"/>'
    yield _text(_WIDTH - _RIGHT + 6, bottom - 3, format_bytes(max(nbytes for _, nbytes in samples)), size=10, colour="#555")


def _draw_axis(seconds: float, scale: float, y: float) -> Iterator[str]:
    step = find_tick_step(seconds, _TICKS)
    yield f'<line x1="{_LEFT}" x2="{_LEFT + seconds * scale:.1f}" y1="{y}" y2="{y}" stroke="#555"/>'
    for number in range(int(seconds / step + 1e-9) + 1):
        x = _LEFT + number * step * scale
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + 4}" stroke="#555"/>'
        yield _text(x, y + 15, format_seconds(number * step) if number else "0", size=10, anchor="middle", colour="#333")


def _kind_of(event: Event) -> str:
    """The entry of the legend that an event belongs to."""
    if event.thread == COPIES:
        return _COPY
    if event.thread == MEETINGS:
        return _WAITING
    if event.thread not in BUSY:
        return _BESIDE
    if event.collective:
        return _COMMUNICATION
    if event.purpose == "recompute":
        return _RECOMPUTE
    return event.phase if event.phase in _COLOURS else _OPTIMIZER


def _shorten(text: str, width: float) -> str:
    """The first part of a rank's name that fits, up to a comma."""
    text = text.partition(",")[0]
    most = int(width / _CHARACTER)
    return text if len(text) <= most else text[: most - 1] + "…"


def _text(
    x: float, y: float, text: str, *, size: int, anchor: str = "start", colour: str = "#000", weight: str = "", hint: str = ""
) -> str:
    bold = f' font-weight="{weight}"' if weight else ""
    title = f"<title>{escape(printable(hint))}</title>" if hint else ""
    text = escape(printable(text))
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}"{bold}>{title}{text}</text>'
