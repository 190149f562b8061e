"""The picture of a plan's layers: boxes by stage, coloured by what is split, edges with what moves along them.

Comes in: an `Outline`. Goes out: a graph in the language of Graphviz. Nothing is rendered here.

Stages stand in columns, so that pictures of many stages are about as wide as high. An arrow that would cross the picture from the end of
a column to the top of the next one is cut in two, with the other stage's name at both ends:

    stage 0     from stage 1
       |             |
    stage 1       stage 2
       |             |
    to stage 2    stage 3
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import pydot

from autopar.pictures.labels import make_label, markup
from autopar.pictures.outline import Box, Edge, EdgeKind, Kind, Outline, Stage
from autopar.pictures.palette import FILLS, MUTED, PANEL, PAPER, TEXT
from autopar.pictures.words import word_box, word_exchanges, word_messages, word_stage
from autopar.units import format_bytes, format_seconds

FONT = "Helvetica,Arial,sans-serif"
"""Fonts of pictures, the first that is there."""

# Characters of a line of the title at most.
_LINE = 140

# Between an edge and its label.
_GAP = "&#160;"

_BORDERS = {"none": "solid", "selective": "dashed", "full": "dotted"}

_RECOMPUTED = {"selective": "dashed: the attention core is run again", "full": "dotted: all is run again"}


def draw_layers(outline: Outline) -> pydot.Dot:
    """The graph of a plan's layers; the same outline gives the same text."""
    graph = make_graph(_word_title(outline))
    for stage in outline.stages:
        graph.add_subgraph(_draw_stage(outline, stage))
    for edge in outline.edges:
        start, end = outline.boxes[edge.start].stage, outline.boxes[edge.end].stage
        if start != end and end % _count_rows(outline) == 0:
            _add_cut(graph, edge, start, end)
        else:
            graph.add_edge(_draw_edge(edge, f"box{edge.start}", f"box{edge.end}", start, end))
    return graph


def make_graph(title: str) -> pydot.Dot:
    """An empty graph under a title, which is a label of `make_label`."""
    graph = pydot.Dot("plan", graph_type="digraph", compound=True, newrank=True, nodesep=0.3, ranksep=0.4, bgcolor=PAPER)
    graph.set("label", title)
    graph.set("labelloc", "t")
    graph.set("fontname", f'"{FONT}"')
    graph.set_node_defaults(
        shape="box", style='"filled,rounded"', fontname=f'"{FONT}"', fontsize=11, color=f'"{TEXT}"', fontcolor=f'"{TEXT}"'
    )
    graph.set_edge_defaults(fontname=f'"{FONT}"', fontsize=10, color=f'"{TEXT}"', fontcolor=f'"{TEXT}"', arrowsize=0.7)
    return graph


def _word_title(outline: Outline) -> str:
    """The title of the picture with its legend, as the label of the graph."""
    parts = [f"step {format_seconds(outline.step_seconds)}"]
    if outline.bubble_seconds:
        parts.append(f"of which bubble {format_seconds(outline.bubble_seconds)}")
    parts.append(f"memory {format_bytes(outline.memory_bytes)} of {format_bytes(outline.budget_bytes)} per device")
    if outline.microbatches > 1:
        parts.append(f"schedule {outline.schedule}, {outline.microbatches} micro-batches")
    inputs = "inputs " + ", ".join(f"{name} {kind}" for name, kind in outline.inputs.items())
    lines = [
        markup(outline.title, bold=True, size=15, most=_LINE),
        markup(", ".join(parts), size=12, most=_LINE),
        markup(inputs, size=12, most=_LINE),
        _draw_legend(outline),
    ]
    return make_label([[line] for line in lines], align=("CENTER",))


def _draw_legend(outline: Outline) -> str:
    """What colours, borders and numbers mean, as a part of the title."""
    texts = [_RECOMPUTED[kind] for kind in outline.recompute]
    if outline.has_costs:
        texts.append("compute: of one rank in a step, forward and backward")
        texts.append("4 × 1 MB: of one rank in a step, calls × bytes of each")
    return draw_swatches(outline.kinds, texts)


def draw_swatches(kinds: Collection[Kind], texts: Iterable[str]) -> str:
    """The legend of a picture, as a part of its title: the colours that occur, and further texts beside them."""
    colours = [f'<TD BORDER="1" BGCOLOR="{FILLS[kind]}">{markup(kind.value, size=11)}</TD>' for kind in Kind if kind in kinds]
    cells = [f"<TD>{markup('split of the work:', size=11)}</TD>", *colours] if colours else []
    cells += [f"<TD>{markup(text, size=11)}</TD>" for text in texts]
    return f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="6"><TR>{"".join(cells)}</TR></TABLE>' if cells else ""


def _draw_stage(outline: Outline, stage: Stage) -> pydot.Subgraph:
    cluster = pydot.Subgraph(
        f"cluster_stage{stage.number}", style='"rounded,filled"', fillcolor=f'"{PANEL}"', color=f'"{MUTED}"', margin=10, label='""'
    )
    if len(outline.stages) > 1:
        lines = [[markup(f"stage {stage.number}", bold=True, size=13)], *([markup(text, size=11)] for text in word_stage(outline, stage))]
        cluster.set("label", make_label(lines, align=("CENTER",)))
    for number in stage.boxes:
        cluster.add_node(_draw_box(outline.boxes[number]))
    return cluster


def _draw_box(box: Box) -> pydot.Node:
    return pydot.Node(
        f"box{box.number}",
        label=make_label([[markup(box.name, bold=True, size=12)], *([markup(text)] for text in word_box(box))], align=("CENTER",)),
        fillcolor=f'"{FILLS[box.kind]}"',
        style=f'"filled,rounded,{_BORDERS[box.recompute]}"',
        penwidth=1.0 if box.recompute == "none" else 2.0,
    )


def _draw_edge(edge: Edge, first: str, last: str, start: int | None, end: int | None) -> pydot.Edge:
    """An edge between two nodes; a message leaves and enters at the borders of the stages `start` and `end`, None of which is a node."""
    drawn = pydot.Edge(first, last)
    if edge.kind is EdgeKind.EXCHANGE:
        label = _label_rows(word_exchanges(edge.rows), ("LEFT", "LEFT", "RIGHT", "RIGHT"))
        drawn.set("dir", "both")
        drawn.set("color", f'"{MUTED}"')
        if not label:
            drawn.set("style", "invis")  # local copies alone
    elif edge.kind is EdgeKind.MESSAGE:
        label = _label_rows(word_messages(edge.rows), ("LEFT", "RIGHT", "RIGHT"))
        drawn.set("penwidth", 2)
        if start is not None:
            drawn.set("ltail", f"cluster_stage{start}")
        if end is not None:
            drawn.set("lhead", f"cluster_stage{end}")
    else:
        label = ""
    if label:
        drawn.set("label", label)
    return drawn


def _add_cut(graph: pydot.Dot, edge: Edge, start: int, end: int) -> None:
    """Add a message as two arrows, to and from nodes that name the other stage."""
    for name, text in ((f"to{end}", f"to stage {end}"), (f"from{start}", f"from stage {start}")):
        graph.add_node(pydot.Node(name, label=make_label([[markup(text)]]), shape="plain", style="solid"))
    graph.add_edge(_draw_edge(edge, f"box{edge.start}", f"to{end}", start, None))
    graph.add_edge(_draw_edge(replace(edge, rows=()), f"from{start}", f"box{edge.end}", None, end))


def _count_rows(outline: Outline) -> int:
    """Stages in a column of the picture."""
    count = len(outline.stages)
    return math.ceil(count / max(1, round(math.sqrt(count))))


def _label_rows(rows: Iterable[Sequence[str]], align: Sequence[str]) -> str:
    """A label of rows of words; empty where there are none. Words are parted from numbers by a space, numbers are not from each other."""
    lines = [[_GAP, *(markup(f"{cell} " if where == "LEFT" else cell) for cell, where in zip(row, align, strict=True))] for row in rows]
    return make_label(lines, align=("LEFT", *align)) if lines else ""
