"""Small charts as SVG text, for pictures of a few numbers: no library is needed to make them or to look at them.

Comes in: points and how to write their numbers. Goes out: the text of an SVG file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.sax.saxutils import escape

from autopar.units import find_tick_step

_WIDTH, _HEIGHT = 720, 400
# Room around the plot: for the title, the axes' numbers and their titles.
_LEFT, _RIGHT, _TOP, _BOTTOM = 96, 28, 48, 64
_TICKS = 6

_STYLE = """
text { font: 13px sans-serif; fill: #222 }
.title { font-size: 16px; font-weight: bold }
.back { fill: #fff } .grid { stroke: #ddd } .line { fill: none; stroke: #1565c0; stroke-width: 2 } .point { fill: #1565c0 }
.mark { fill: none; stroke: #222; stroke-width: 2 }
@media (prefers-color-scheme: dark) {
text { fill: #ddd } .back { fill: #1b1b1b } .grid { stroke: #444 } .line { stroke: #64b5f6 } .point { fill: #64b5f6 } .mark { stroke: #ddd }
}"""


@dataclass(frozen=True, slots=True)
class Axis:
    """What one direction of a chart shows: a title with its unit in words, and how a number is written."""

    title: str
    write: Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a chart.

    Attributes:
        x, y: numbers from 0.
        hint: what is shown when it is pointed at.
        label: a word above it, or none.
        is_below: whether the label stands below it instead, where there is room.
    """

    x: float
    y: float
    hint: str = ""
    label: str = ""
    is_below: bool = False


def draw_line_chart(title: str, x: Axis, y: Axis, points: Sequence[Point], *, marks: Sequence[Point] = (), stepped: bool = False) -> str:
    """A line through points as SVG text; both axes begin at zero.

    Args:
        title: above the chart.
        x: the horizontal axis.
        y: the vertical axis.
        points: from the least x to the largest. At least one.
        marks: points that are not on the line.
        stepped: whether a point's y holds up to the next x, as that of a plan which needs so much memory; else points are joined.
    """
    shown = [*points, *marks]
    x_ticks, y_ticks = find_ticks(max(point.x for point in shown)), find_ticks(max(point.y for point in shown))
    plot_width, plot_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def across(value: float) -> float:
        return _LEFT + plot_width * value / x_ticks[-1]

    def down(value: float) -> float:
        return _TOP + plot_height * (1 - value / y_ticks[-1])

    bottom, right = down(0), across(x_ticks[-1])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}\n</style>",
        f'<rect class="back" width="{_WIDTH}" height="{_HEIGHT}"/>',
        _write(title, _WIDTH / 2, 26, "middle", "title"),
    ]
    for tick in x_ticks:
        parts.append(f'<line class="grid" x1="{across(tick):.1f}" y1="{_TOP}" x2="{across(tick):.1f}" y2="{bottom:.1f}"/>')
        parts.append(_write(x.write(tick), across(tick), bottom + 20, "middle"))
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{down(tick):.1f}" x2="{right:.1f}" y2="{down(tick):.1f}"/>')
        parts.append(_write(y.write(tick), _LEFT - 8, down(tick) + 4, "end"))
    parts.append(_write(x.title, _LEFT + plot_width / 2, _HEIGHT - 14, "middle"))
    parts.append(f'<g transform="rotate(-90 18 {_TOP + plot_height / 2})">')
    parts.append(_write(y.title, 18, _TOP + plot_height / 2, "middle"))
    parts.append("</g>")
    corners = [(across(point.x), down(point.y)) for point in points]
    if stepped:
        corners = [corner for before, after in pairwise(corners) for corner in (before, (after[0], before[1]))]
        corners.append((across(points[-1].x), down(points[-1].y)))
    parts.append(f'<polyline class="line" points="{" ".join(f"{left:.1f},{top:.1f}" for left, top in corners)}"/>')
    for point in shown:
        left, top = across(point.x), down(point.y)
        kind = "point" if point in points else "mark"
        parts.append(f'<circle class="{kind}" cx="{left:.1f}" cy="{top:.1f}" r="4"><title>{escape(point.hint)}</title></circle>')
        if point.label:
            label_top = top + 20 if point.is_below and top + 25 < bottom else top - 9
            is_left = left < _LEFT + plot_width / 2
            parts.append(_write(point.label, left + (8 if is_left else -8), label_top, "start" if is_left else "end"))
    return "\n".join([*parts, "</svg>", ""])


def find_ticks(largest: float) -> list[float]:
    """Round numbers from 0 to the first that isn't below `largest`, some six of them.

    >>> find_ticks(43.0), find_ticks(0.7)
    ([0.0, 10.0, 20.0, 30.0, 40.0, 50.0], [0.0, 0.2, 0.4, 0.6, 0.8])
    """
    if largest <= 0:
        return [0.0, 1.0]
    step = find_tick_step(largest, _TICKS)
    # Written and read again, so that 0.6 is 0.6.
    return [float(f"{number * step:.6g}") for number in range(math.ceil(largest / step - 1e-9) + 1)]


def _write(text: str, left: float, top: float, anchor: str, kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text{style} x="{left:.1f}" y="{top:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
