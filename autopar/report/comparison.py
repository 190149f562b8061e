"""Two plans beside each other: which parts of the step and which kinds of memory differ, and by how much.

Every number is a plan's own, or the difference of two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from autopar.plans import Plan
from autopar.report.reasons import split_terms
from autopar.report.summary import MEMORY_KINDS
from autopar.units import format_bytes, format_seconds

# Parts that differ by less than this share of what differs most decide nothing, and aren't named in a sentence.
_NAMED = 0.05

# From this ratio on, two times are compared as a multiple.
_MULTIPLE = 2.0


@dataclass(frozen=True, slots=True)
class Difference:
    """One part of two plans: seconds of a step, or bytes of a device.

    Attributes:
        name: of the part, as the report calls it.
        first, second: what it is in either plan.
    """

    name: str
    first: float
    second: float

    @property
    def change(self) -> float:
        """By how much the second plan has more."""
        return self.second - self.first


def compare_steps(first: Plan, second: Plan) -> tuple[Difference, ...]:
    """The parts of a step of two plans, in seconds; those of one plan add up to its step."""
    one, other = split_terms(first.seconds), split_terms(second.seconds)
    return tuple(Difference(name, one[name], other[name]) for name in ("compute", "recompute", "communication", "bubble", "optimizer"))


def compare_memory(first: Plan, second: Plan) -> tuple[Difference, ...]:
    """Bytes of a device of two plans by kind; those of one plan, less what isn't there at the same time, add up to its total."""
    kinds = [Difference(kind, getattr(first.memory, kind), getattr(second.memory, kind)) for kind in MEMORY_KINDS]
    return (*kinds, Difference("not at once", -first.memory.apart, -second.memory.apart))


def decides_alike(first: Plan, second: Plan) -> bool:
    """Whether two plans make the same program, whatever their axes are called and their devices take for it."""
    return (
        (first.fingerprint, first.mesh.sizes, first.layouts, first.outputs, first.placements)
        == (second.fingerprint, second.mesh.sizes, second.layouts, second.outputs, second.placements)
        and replace(first.pipeline, timing=None) == replace(second.pipeline, timing=None)
        and (first.prefetch, first.loss_chunks, first.half_batches) == (second.prefetch, second.loss_chunks, second.half_batches)
    )


def word_ratio(first: float, second: float) -> str:
    """How much more or less the second number is, in words: ``12% more``, ``3.1 times as much``.

    >>> word_ratio(1.0, 1.12), word_ratio(1.0, 0.5), word_ratio(1.0, 1.0), word_ratio(1.0, 3.14)
    ('12% more', '50% less', 'the same', '3.1 times as much')
    """
    if first <= 0:
        return "more" if second > 0 else "the same"
    ratio = second / first
    if ratio >= _MULTIPLE:
        return f"{ratio:.1f} times as much" if ratio < 9.95 else f"{ratio:,.0f} times as much"
    percent = 100 * abs(ratio - 1)
    if percent < 0.05:
        return "the same"
    digits = 0 if percent >= 9.95 else 1
    return f"{percent:.{digits}f}% {'more' if ratio > 1 else 'less'}"


def word_terms(parts: Iterable[Difference], write: Callable[[float], str] = format_seconds) -> str:
    """The parts that differ most, the largest difference first: ``communication +200 ms, bubble +100 ms``; empty if none differs."""
    ordered = sorted(parts, key=lambda part: -abs(part.change))
    largest = abs(ordered[0].change) if ordered else 0.0
    texts = [(part.name, _sign(part.change, write)) for part in ordered if abs(part.change) >= max(_NAMED * largest, 0.5e-9)]
    return ", ".join(f"{name} {text}" for name, text in texts)


def tabulate_plans(first: Plan, second: Plan, names: tuple[str, str]) -> str:
    """The step and the memory of two plans, part by part, as aligned text; parts that neither has are left out."""
    rows = [["", *names, "difference"]]
    for parts, total, write in (
        (compare_steps(first, second), Difference("step", first.seconds.step, second.seconds.step), format_seconds),
        (compare_memory(first, second), Difference("memory", first.memory.total, second.memory.total), format_bytes),
    ):
        shown = [part for part in parts if part.first or part.second]
        rows += [[part.name, write(part.first), write(part.second), _sign(part.change, write)] for part in (*shown, total)]
    return align(rows, left={0}, rules=[index for index, row in enumerate(rows) if row[0] in ("", "step", "memory")])


def align(rows: Sequence[Sequence[str]], *, left: Collection[int], rules: Collection[int] = (0,)) -> str:
    """Rows of text as columns of equal width, the numbered ones of `left` flush left; a line under the rows `rules`, the last excepted."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for number, row in enumerate(rows):
        cells = [f"{cell:{'<' if column in left else '>'}{width}}" for column, (cell, width) in enumerate(zip(row, widths, strict=True))]
        lines.append("   ".join(cells).rstrip())
        if number in rules and number < len(rows) - 1:
            lines.append("─" * (sum(widths) + 3 * (len(widths) - 1)))
    return "\n".join(lines)


def _sign(change: float, write: Callable[[float], str]) -> str:
    """A difference with its sign; nothing where there is none."""
    text = write(abs(change))
    return "=" if text in ("0 s", "0 B") else f"{'+' if change > 0 else '-'}{text}"
