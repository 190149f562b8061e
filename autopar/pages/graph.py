"""The graph of a page: stages, their boxes and what moves between them, with what a click on a box shows.

Comes in: a `Plan`. Goes out: data for JSON. The boxes and edges are those of the pictures (`autopar.pictures`).
"""

from __future__ import annotations

from typing import Any

from autopar.ir import format_layout
from autopar.pictures import outline, words
from autopar.plans import CostRow, Plan


def describe_graph(plan: Plan) -> dict[str, Any]:
    """The stages and boxes of a plan, and per group of layers how its tensors are stored.

    Rows of costs are of one step on one rank of the stage: lists of phase, purpose, axis, collective, calls, bytes, exposed and hidden
    seconds. Lines are texts, the same as in the pictures.
    """
    drawn = outline.make_outline(plan)
    return {
        "kinds": list(drawn.kinds),
        "recompute": list(drawn.recompute),
        "stages": [
            {
                "number": stage.number,
                "pipelineRank": stage.pipeline_rank,
                "ranks": list(stage.ranks),
                "seconds": stage.seconds if drawn.has_costs else None,
                "staticBytes": stage.static_bytes,
                "savedBytes": stage.saved_bytes,
                "boxes": list(stage.boxes),
                "lines": words.word_stage(drawn, stage),
                "messages": _messages_from(drawn, stage.boxes[-1]) if stage.boxes else [],
            }
            for stage in drawn.stages
        ],
        "boxes": [_describe_box(box, drawn) for box in drawn.boxes],
        "tensors": {group.name: [[name, format_layout(plan.layouts[op])] for op, name in group.tensors.items()] for group in plan.groups},
    }


def _describe_row(row: CostRow) -> list[str | float]:
    return [row.phase, row.purpose, row.axis, row.collective, row.count, row.nbytes, row.seconds, row.hidden]


def _describe_box(box: outline.Box, drawn: outline.Outline) -> dict[str, Any]:
    exchanges = [edge.rows for edge in drawn.edges if edge.kind == outline.EdgeKind.EXCHANGE and edge.start == box.number]
    return {
        "name": box.name,
        "stage": box.stage,
        "group": box.group,
        "blocks": list(box.blocks),
        "axes": dict(box.axes),
        "kind": box.kind,
        "recompute": box.recompute,
        "parameterBytes": box.parameter_bytes,
        "activationBytes": box.activation_bytes,
        "seconds": box.seconds if drawn.has_costs else None,
        "lines": words.word_box(box),
        "rows": [_describe_row(row) for row in box.rows],
        "exchanges": [" ".join(row) for rows in exchanges for row in words.word_exchanges(rows)],
    }


def _messages_from(drawn: outline.Outline, box: int) -> list[tuple[str, str, str]]:
    """What crosses to and from the next stage in a step, as the pictures word it."""
    edges = [edge for edge in drawn.edges if edge.kind == outline.EdgeKind.MESSAGE and edge.start == box]
    return [row for edge in edges for row in words.word_messages(edge.rows)]
