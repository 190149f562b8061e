"""What a picture and a page say of stages, boxes and edges: one text for both.

Comes in: parts of an `Outline`. Goes out: lines of text, or rows of texts that stand in columns. Seconds and counts are those of a step on
one rank of the stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from autopar.ir import PIPELINE
from autopar.pictures.outline import Box, Outline, Stage
from autopar.plans import LOCAL_COPY, CostRow, Phase, Purpose
from autopar.units import format_bytes, format_seconds

# What exchanges are for: gradients of activations travel as these do, back.
_WHAT: Mapping[str, str] = {
    Purpose.KERNEL: "activations",
    Purpose.ACTIVATIONS: "activations",
    Purpose.ACTIVATION_GRADIENTS: "activations",
    Purpose.RECOMPUTE: "run again",
    Purpose.PARAMETERS: "parameters",
    Purpose.GRADIENTS: "gradients",
}


def word_box(box: Box) -> list[str]:
    """The lines of a box below its name: what is split, what it stores, and what makes up its time."""
    lines = [f"{box.count} layers alike"] if box.count > 1 else []
    lines += [f"{axis} splits {text}" for axis, text in box.axes.items() if text != "nothing"]
    if box.recompute != "none":
        lines.append(f"recompute {box.recompute}")
    if box.parameter_bytes is not None:
        lines.append(f"parameters {format_bytes(box.parameter_bytes)}")
    if box.rows:
        lines.append(f"compute {format_seconds(box.compute_seconds)}, exposed exchanges {format_seconds(box.exchange_seconds)}")
        if box.optimizer_seconds:
            lines.append(f"optimizer {format_seconds(box.optimizer_seconds)}")
    return lines


def word_stage(outline: Outline, stage: Stage) -> list[str]:
    """Where a stage runs, and how long it is busy; nothing for a model in one piece."""
    if len(outline.stages) == 1:
        return []
    first, last = stage.ranks
    ranks = f"ranks {first}-{last}" if last > first else f"rank {first}"
    lines = [f"pipeline rank {stage.pipeline_rank}, {ranks}" if outline.axes.get(PIPELINE) else ranks]
    if outline.has_costs:
        lines.append(f"busy {format_seconds(stage.seconds)} of a step")
    return lines


def word_exchanges(rows: Iterable[CostRow]) -> list[tuple[str, str, str, str]]:
    """(axis and collective, what it moves, calls, mean bytes of one), those that take longest first; without copies within a rank."""
    sums: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        if row.collective != LOCAL_COPY and row.count:
            entry = sums.setdefault((row.axis, row.collective, _WHAT.get(row.purpose, row.purpose)), [0.0, 0.0, 0.0])
            for index, number in enumerate((row.count, row.nbytes, row.seconds + row.hidden)):
                entry[index] += number
    return [
        (f"{axis} {collective}", what, *_word_calls(count, nbytes))
        for (axis, collective, what), (count, nbytes, _) in sorted(sums.items(), key=lambda item: (-item[1][2], item[0]))
    ]


def word_messages(rows: Sequence[CostRow]) -> list[tuple[str, str, str]]:
    """(what is sent, how often, bytes of one) of what two stages send each other, first on and then back."""
    return [(f"send {'values' if row.phase == Phase.FORWARD else 'gradients back'}", *_word_calls(row.count, row.nbytes)) for row in rows]


def _word_calls(count: float, nbytes: float) -> tuple[str, str]:
    return f"{count:,.0f} ×", format_bytes(nbytes / count)
