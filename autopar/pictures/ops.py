"""The picture of one layer's ops: calls coloured by what is split, and between them what their values' layouts change by.

Comes in: a `Plan` and the name of a layer. Goes out: a graph in the language of Graphviz. Layers that are alike are split alike, so the
first of a group is drawn for all.

A change of layout is a node of its own, since it is made once for all calls that read the value in the new layout. Bytes are those that the
plan's costs count: the larger of a rank's parts before and after, for one micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pydot

from autopar.errors import InputError
from autopar.ir import ITEMSIZE, Collective, Layout, StateKind, format_layout, journey
from autopar.pictures.labels import make_label, markup
from autopar.pictures.layers import draw_swatches, make_graph
from autopar.pictures.outline import find_kind
from autopar.pictures.palette import FILLS, MUTED, PAPER
from autopar.plans import OUTSIDE, Group, OpCost, Plan, Read
from autopar.report import describe_header, select_groups
from autopar.rules import short_name
from autopar.units import format_bytes, format_seconds

_STATES = {
    StateKind.SHARD: "and a dim: split along it",
    StateKind.REPLICATE: "whole on every rank",
    StateKind.PARTIAL: "summands, one on each rank",
    StateKind.REPLICATE_PARTIAL_GRAD: "whole, of its gradient a summand on each rank",
}

# Other steps are copies, which a rank makes alone.
_EXCHANGES = (Collective.ALL_GATHER, Collective.REDUCE_SCATTER, Collective.ALL_REDUCE, Collective.ALL_TO_ALL)


def draw_ops(plan: Plan, layer: str | None) -> pydot.Dot:
    """The graph of the ops of the layer that `layer` names; None is the group of layers that takes most of the step.

    Raises InputError when no layer matches, when what matches has no calls, and for a plan without operands, made by hand.
    """
    if not plan.reads:
        raise InputError("this plan doesn't say what its ops read, so they can't be drawn; plan again with `autopar plan`")
    if layer is None:
        groups = tuple(sorted(plan.groups, key=lambda group: (group.name == OUTSIDE, -sum(plan.group_seconds(group)))))
    else:
        groups = select_groups(plan, layer)
    group = groups[0]
    ops = {op.op: op for op in plan.ops if op.group == group.name and op.op in plan.reads}
    if not ops:
        raise InputError(f"{group.name!r} has no ops to draw; `autopar explain --layer` shows its tensors")
    graph = make_graph(_word_title(plan, group, ops))
    for op in ops.values():
        graph.add_node(_draw_call(group, op))
    outside: dict[str, str] = {}
    changes: dict[tuple[str, Layout, str], str] = {}
    for name in ops:
        for read in plan.reads[name]:
            _add_read(graph, plan, group, ops, name, read, outside, changes)
    return graph


def _word_title(plan: Plan, group: Group, ops: Mapping[str, OpCost]) -> str:
    used = {find_kind(op.splits) for op in ops.values()}
    shown = group.name if not group.paths else f"{group.paths[0]}, one of {group.count} alike" if group.count > 1 else group.paths[0]
    # The letters of layouts, as far as they occur; docs/concepts.md says more of each.
    states = {state.kind for reads in plan.reads.values() for read in reads for state in (*read.made, *read.need)}
    letters = [f"{kind.value} {text}" for kind, text in _STATES.items() if kind in states]
    layouts = f"layouts, a state per axis ({', '.join(plan.mesh.names)}): {'; '.join(letters)}"
    lines = [
        [markup(f"ops of {shown}", bold=True, size=15, most=140)],
        [markup(describe_header(plan), size=12, most=140)],
        [draw_swatches(used, ["bold: ranks exchange, bytes of one rank"])],
        *([[markup(layouts, size=11, most=200)]] if letters else []),
    ]
    return make_label(lines, align=("CENTER",))


def _draw_call(group: Group, op: OpCost) -> pydot.Node:
    module = _shorten_path(group, op.path)
    lines = [[markup(_name_call(op, module), bold=True, size=12)]]
    if "." in module:
        lines.append([markup(module, color=MUTED)])
    if op.splits:
        lines.append([markup(", ".join(f"{axis} splits {text}" for axis, text in op.splits.items()))])
    if op.seconds.step:
        alike = f", {op.count} alike" if op.count > 1 else ""
        lines.append([markup(f"{format_seconds(op.seconds.step)} of the step{alike}")])
    return pydot.Node(_name(op.op), label=make_label(lines, align=("CENTER",)), fillcolor=f'"{FILLS[find_kind(op.splits)]}"')


def _shorten_path(group: Group, path: str) -> str:
    """The path of a module inside of the layer; empty for the layer's own."""
    first = group.paths[0] if group.paths else ""
    return path.removeprefix(first).removeprefix(".") if f"{path}.".startswith(f"{first}.") or not first else ""


def _name_call(op: OpCost, module: str) -> str:
    """The operator and the last part of its module's path, such as ``mul in norm``."""
    place = module.rpartition(".")[2]
    return f"{short_name(op.target)}{f' in {place}' if place else ''}"


def _name(op: str) -> str:
    """A node's name, quoted: ops are called as Python names, but a file may hold any."""
    return '"' + op.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _add_read(
    graph: pydot.Dot,
    plan: Plan,
    group: Group,
    ops: Mapping[str, OpCost],
    reader: str,
    read: Read,
    outside: dict[str, str],
    changes: dict[tuple[str, Layout, str], str],
) -> None:
    """Add the edge from what makes a value to a call that reads it, by way of the change of its layout if there is one."""
    maker = read.value.partition(".")[0]
    is_parameter = any(maker in each.tensors for each in plan.groups)
    if maker in ops:
        start = _name(maker)
    else:
        if read.value not in outside:
            outside[read.value] = f"outside{len(outside)}"
            graph.add_node(_draw_outside(plan, group, outside[read.value], maker, read))
        start = outside[read.value]
    if steps := _word_steps(plan, read, maker if is_parameter else ""):
        # A parameter is moved for each use.
        key = read.value, read.need, reader if is_parameter else ""
        if key not in changes:
            changes[key] = f"change{len(changes)}"
            label = make_label([[markup(step, bold=True)] for step in steps], align=("CENTER",))
            graph.add_node(pydot.Node(changes[key], label=label, fillcolor=f'"{PAPER}"', style='"filled,bold"', shape="box"))
            graph.add_edge(_draw_value(start, changes[key], read, read.made))
        graph.add_edge(_draw_value(changes[key], _name(reader), read, read.need, is_bold=True))
    else:
        graph.add_edge(_draw_value(start, _name(reader), read, read.made))


def _draw_outside(plan: Plan, group: Group, node: str, maker: str, read: Read) -> pydot.Node:
    """What a layer is given: a parameter under the user's name, below the layer's, or a value that another layer makes."""
    call = next((op for op in plan.ops if op.op == maker and op.op in plan.reads), None)
    if call is not None:
        name = _name_call(call, call.path)
    else:
        name = group.tensors.get(maker, read.value)
        if group.paths:
            name = name.removeprefix(f"{group.paths[0]}.")
    return pydot.Node(node, label=make_label([[markup(name)]]), shape="box", style='"rounded"', color=f'"{MUTED}"')


def _draw_value(start: str, end: str, read: Read, layout: Layout, *, is_bold: bool = False) -> pydot.Edge:
    lines = [["&#160;", markup(read.tensor, color=MUTED)]]
    if layout:
        lines.append(["&#160;", markup(format_layout(layout), color=MUTED)])
    return pydot.Edge(start, end, label=make_label(lines), penwidth=2 if is_bold else 1)


def _word_steps(plan: Plan, read: Read, parameter: str) -> list[str]:
    """A line per step and direction by which an operand gets into the layout in which it is read; none where no ranks exchange.

    `parameter` is the op of the parameter that is read, if one is: of some, ZeRO leaves each rank its part of the summed gradient only.
    """
    lines = []
    for step in journey(read.shape, read.made, read.need, plan.mesh):
        axis, numel = plan.mesh.names[step.axis], max(math.prod(step.shape_before), math.prod(step.shape_after))
        if step.forward in _EXCHANGES:
            lines.append(f"{axis} {step.forward.value} {format_bytes(numel * ITEMSIZE[read.dtype])}")
        if step.backward in _EXCHANGES and read.gradient:
            is_owned = parameter and plan.layouts[parameter][step.axis].level and step.backward is Collective.ALL_REDUCE
            backward = Collective.REDUCE_SCATTER if is_owned else step.backward
            # Only where gradients are added up is the dtype that of sums.
            dtype = read.gradient if backward in (Collective.REDUCE_SCATTER, Collective.ALL_REDUCE) else read.dtype
            lines.append(f"{axis} {'gradient' if parameter else 'back'} {backward.value} {format_bytes(numel * ITEMSIZE[dtype])}")
    return lines
