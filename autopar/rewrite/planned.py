"""A captured graph with a plan's decisions: per op its placement, per value the layout in which it is made and needed.

Comes in: `Captured` and a `Plan`. Goes out: a `PlannedGraph`, from which the functions of this module read every decision that the rewrite
carries out. No other module of this package reads the plan's placements and layouts.

A plan decides for representatives of like layers and for mesh axes of ranks. The functions here answer for every op. With micro-batches
they answer for the axes of `with_microbatch_axis`: what a micro-batch does or has on the first, what the plan says on the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import fx

from autopar.capture import Captured
from autopar.errors import PlanError
from autopar.ir import (
    MICROBATCH,
    PARTIAL,
    PIPELINE,
    REPLICATE,
    Collective,
    Graph,
    Layout,
    Mesh,
    Op,
    OpKind,
    Placement,
    Space,
    Split,
    StateKind,
    Tensor,
    Value,
    fits,
    format_layout,
    is_legal,
    journey,
    operand_layout,
    program_layout,
    result_layout,
)
from autopar.plans import Plan
from autopar.structure import Folded, MicroSplit, find_roles, fold_as_planned, split_microbatches, with_microbatch_axis


@dataclass(frozen=True)
class PlannedGraph:
    """A captured graph and what was decided for it: all that the rewrite reads.

    Attributes:
        captured: the model as an fx graph and as an `autopar.ir.Graph`, whose ops have the names of the fx nodes.
        plan: the decisions.
        folded: the graph with those layers folded into one that share decisions in `plan`.
        spaces: the loops of every call that has a rule; other calls run whole on every rank.
        device: where new tensors are made; None leaves it to the call.
        micro_split: how the graph splits into micro-batches; None for programs that run on the whole batch at once.
    """

    captured: Captured
    plan: Plan
    folded: Folded
    spaces: Mapping[str, Space]
    device: torch.device | None = None
    micro_split: MicroSplit | None = None

    @property
    def graph(self) -> Graph:
        """The captured graph."""
        return self.captured.graph

    @property
    def microbatches(self) -> int:
        """Number of micro-batches; two halves of the batch are such too."""
        return 2 if self.plan.half_batches else self.plan.pipeline.microbatches

    @cached_property
    def mesh(self) -> Mesh:
        """The plan's mesh; with micro-batches, these are its outermost axis."""
        return self.plan.mesh if self.micro_split is None else with_microbatch_axis(self.plan.mesh, self.microbatches)

    @cached_property
    def fx_nodes(self) -> Mapping[str, fx.Node]:
        """Op name -> the captured node of that name."""
        return {node.name: node for node in self.captured.fx.graph.nodes}

    @cached_property
    def partial_axes(self) -> Mapping[str, frozenset[str]]:
        """Parameter's op name -> the axes over which its gradient is summed after the backward instead of at each use."""
        return {op.name: _find_partial_axes(self, op) for op in self.graph.of_kind(OpKind.PARAMETER)}

    @cached_property
    def cast_when_gathered(self) -> frozenset[str]:
        """Op names of the parameters that the program takes in the stored dtype, and casts itself, since some reader gathers them.

        So what is gathered is the narrower dtype, and the gradient's sum over ranks arrives in that of sums. Other parameters that are
        read in another dtype than the stored one are cast before they enter the program.
        """
        parameters = (op for op in self.graph.of_kind(OpKind.PARAMETER) if op.results[0].stored_dtype != op.results[0].dtype)
        return frozenset(op.name for op in parameters if _is_gathered(self, op))


def read_plan(captured: Captured, plan: Plan, folded: Folded, spaces: Mapping[str, Space], device: torch.device | None) -> PlannedGraph:
    """`captured` with the decisions of `plan`, which was made for it; for programs that run on the whole batch.

    Args:
        captured: the model.
        plan: a file that anyone may have edited.
        folded: the graph of `captured` as `autopar.structure.fold` folds it; the plan may tell more layers apart.
        spaces: the loops of every call that has a rule.
        device: where new tensors are made; None leaves it to the call.

    Raises:
        PlanError: the plan decides too little, or what can't be carried out.
    """
    planned = PlannedGraph(captured, plan, fold_as_planned(folded, {*plan.placements, *plan.layouts}), spaces, device)
    _check_decisions(planned)
    return planned


def with_microbatches(planned: PlannedGraph) -> PlannedGraph:
    """`planned` for programs that run on one micro-batch, or on the halves of a batch.

    Raises PlanError when the batch can't be split into so many, or a micro-batch not as the plan's placements say.
    """
    graph, spaces, count = planned.graph, planned.spaces, planned.microbatches
    wanted = "runs in half batches" if planned.plan.half_batches else f"has {count} micro-batches"
    micro_split = split_microbatches(graph, spaces, find_roles(graph, spaces), count, half_batches=planned.plan.half_batches)
    if micro_split.reasons:
        raise PlanError(f"the plan {wanted}, but {'; '.join(micro_split.reasons)}")
    planned = replace(planned, micro_split=micro_split)
    for op in graph.of_kind(OpKind.CALL) if count > 1 else ():
        if op.name in spaces and not is_legal(spaces[op.name], placement_of(planned, op), planned.mesh):
            field = "half_batches is true" if planned.plan.half_batches else f"pipeline.microbatches is {count}"
            raise PlanError(
                f"plan.{field}: a micro-batch of {op.target} at {op.source or op.layer or op.name} can't be"
                " split as plan.placements says, as its sizes don't divide; take fewer micro-batches"
            )
    return planned


# What the plan says, over the axes of ranks alone.


def stored_layout(planned: PlannedGraph, op: Op) -> Layout:
    """The layout in which a parameter, buffer or input is stored."""
    return planned.plan.layouts[planned.folded.representative[op.name]]


def returned_layout(planned: PlannedGraph, position: int) -> Layout:
    """The layout in which an output is returned, or the new value of a buffer; over the axes of ranks."""
    return planned.plan.outputs[position]


# What an op of the program does and needs, over all axes of `PlannedGraph.mesh`.


def placement_of(planned: PlannedGraph, op: Op) -> Placement:
    """How a call is split."""
    placement = planned.plan.placements[planned.folded.representative[op.name]]
    return placement if planned.micro_split is None else (planned.micro_split.placements[op.name], *placement)


def made_layout(planned: PlannedGraph, value: Value) -> Layout:
    """The layout in which an op makes `value`, or in which the program is given it; every micro-batch sees all of what is given."""
    op = planned.graph.by_name[value.op]
    if op.kind is not OpKind.CALL:
        layout = program_layout(stored_layout(planned, op))
        return layout if planned.micro_split is None else (REPLICATE, *layout)
    space = planned.spaces.get(op.name)
    return _whole(planned) if space is None else result_layout(space, placement_of(planned, op), value.index)


def needed_layout(planned: PlannedGraph, op: Op, operand: int) -> Layout:
    """The layout in which `op` reads its operand of this number; the output reads what a micro-batch makes, as it makes it."""
    if op.kind is OpKind.OUTPUT:
        layout = returned_layout(planned, operand)
        return layout if planned.micro_split is None else (made_layout(planned, op.operands[operand])[0], *layout)
    space = planned.spaces.get(op.name)
    return _whole(planned) if space is None else operand_layout(space, placement_of(planned, op), operand)


def sent_layout(planned: PlannedGraph, value: Value) -> Layout:
    """The layout in which `value` is sent from stage to stage. Raises PlanError when the plan has none."""
    layout = planned.plan.pipeline.travel.get(str(value))
    if layout is None:
        raise PlanError(f"plan.pipeline.travel has no layout for {str(value)!r}, which crosses from a stage to another; plan again")
    return layout if planned.micro_split is None else (planned.micro_split.states[value], *layout)


def _whole(planned: PlannedGraph) -> Layout:
    return tuple(REPLICATE for _ in planned.mesh.sizes)


def _is_gathered(planned: PlannedGraph, parameter: Op) -> bool:
    """Whether some reader gathers the parameter from its parts."""
    value, start = Value(parameter.name), made_layout(planned, Value(parameter.name))
    for name in dict.fromkeys(planned.graph.readers.get(value, ())):
        op = planned.graph.by_name[name]
        for index, operand in enumerate(op.operands):
            if operand == value:
                steps = journey(parameter.results[0].shape, start, needed_layout(planned, op, index), planned.mesh)
                if any(step.forward is Collective.ALL_GATHER for step in steps):
                    return True
    return False


def _find_partial_axes(planned: PlannedGraph, parameter: Op) -> frozenset[str]:
    """Axes along which `parameter` is stored Replicate and every reader needs it so that its gradient comes back Partial.

    Being returned is a use too: the output needs the parameter Replicate, and this part of the gradient comes back whole on every rank.
    To sum it over ranks would count it several times, so then the other readers' gradients are summed where they read.
    """
    value = Value(parameter.name)
    readers = [planned.graph.by_name[name] for name in dict.fromkeys(planned.graph.readers.get(value, ()))]
    needs = [needed_layout(planned, op, index) for op in readers for index, operand in enumerate(op.operands) if operand == value]
    axes = [_find_partial_gradient_axes(planned, parameter, need) for need in needs]
    return frozenset.intersection(*axes) if axes else frozenset()


def _find_partial_gradient_axes(planned: PlannedGraph, parameter: Op, need: Layout) -> frozenset[str]:
    """Axes along which a reader has nothing to do to get from the stored parameter to `need`, though the gradient has to be summed."""
    stored = program_layout(stored_layout(planned, parameter))
    # Gradients of micro-batches add up where they arrive, whatever the layout says of time.
    start = stored if planned.micro_split is None else (need[0], *stored)
    steps = journey(parameter.results[0].shape, start, need, planned.mesh)
    return frozenset(planned.mesh.names[step.axis] for step in steps if step.forward is Collective.NONE)


# Checks.


def _check_decisions(planned: PlannedGraph) -> None:
    """Raise PlanError where the plan decides too little, or what can't be carried out."""
    plan, graph, mesh = planned.plan, planned.graph, planned.plan.mesh
    if reserved := {MICROBATCH, PIPELINE} & set(mesh.names):
        raise PlanError(f"plan.mesh has an axis {reserved.pop()!r}, which is no axis of the mesh of a pipeline rank; plan again")
    for op in planned.folded.ops:
        if op.kind is OpKind.CALL:
            _check_placement(plan, op, planned.spaces.get(op.name))
    for op in planned.folded.ops:
        if op.kind not in (OpKind.CALL, OpKind.OUTPUT):
            if op.name not in plan.layouts:
                raise PlanError(f"plan.layouts has nothing for {op.name!r}; plan again")
            _check_layout(f"plan.layouts[{op.name!r}]", plan.layouts[op.name], op.results[0], mesh)
            _check_levels(plan, op)
    outputs = graph.operand_tensors(graph.output)
    if len(plan.outputs) != len(outputs):
        raise PlanError(f"plan.outputs has {len(plan.outputs)} layouts, the model has {len(outputs)} outputs; plan again")
    for position, (tensor, layout) in enumerate(zip(outputs, plan.outputs, strict=True)):
        _check_layout(f"plan.outputs[{position}]", layout, tensor, mesh)
        for state in layout:
            if state == PARTIAL or state.level or state.padded:
                raise PlanError(
                    f"plan.outputs[{position}] has the state {state}; what is returned has equal parts (S0, S1, ...) or is whole (R)"
                )
    buffers = {op.target: op for op in graph.of_kind(OpKind.BUFFER)}
    for position, name in enumerate(graph.updates, start=len(graph.returned)):
        if plan.outputs[position] != stored_layout(planned, buffers[name]):
            raise PlanError(
                f"plan.outputs[{position}], the new value of the buffer {name!r}, must have the layout in which it is stored,"
                f" plan.layouts[{planned.folded.representative[buffers[name].name]!r}]; plan again"
            )
    for name, layout in plan.pipeline.travel.items():
        sent = _find_tensor(graph, name)
        if sent is None or any(state.padded for state in layout) or not fits(sent.shape, layout, mesh):
            raise PlanError(f"plan.pipeline.travel[{name!r}] doesn't fit the mesh {mesh} or names nothing of the model; plan again")


def _check_placement(plan: Plan, op: Op, space: Space | None) -> None:
    mesh, placement = plan.mesh, plan.placements.get(op.name)
    if placement is None:
        raise PlanError(f"plan.placements has nothing for {op.name} ({op.target} at {op.source or op.layer}); plan again")
    split = {part.loop for part in placement if isinstance(part, Split)}
    known = set() if space is None else set(space.loops)
    if len(placement) != len(mesh.sizes) or split - known or (space is not None and not is_legal(space, placement, mesh)):
        raise PlanError(
            f"plan.placements[{op.name!r}] is no way to split {op.target} at {op.source or op.layer} over the mesh {mesh}"
            f" (it has {space or 'no rule and runs whole'}); plan again"
        )


def _check_layout(where: str, layout: Layout, tensor: Tensor, mesh: Mesh) -> None:
    if len(layout) != len(mesh.sizes) or not fits(tensor.shape, layout, mesh):
        raise PlanError(f"{where} doesn't fit {tensor} on the mesh {mesh}; plan again")


def _check_levels(plan: Plan, op: Op) -> None:
    """Raise PlanError for a ZeRO level where it can't be: of what is no parameter, of several axes, of a dim that another axis splits."""
    layout = plan.layouts[op.name]
    held = [state for state in layout if state.level]
    if any(state.padded for state in layout) and op.kind is not OpKind.PARAMETER:
        raise PlanError(f"plan.layouts[{op.name!r}] is {format_layout(layout)}: only parameters are stored padded; plan again")
    if not held:
        return
    same_dim = [state for state in layout if state.kind is StateKind.SHARD and state.dim == held[0].dim]
    if op.kind is not OpKind.PARAMETER or len(held) > 1 or len(same_dim) > 1 or held[0].outer > 1:
        raise PlanError(
            f"plan.layouts[{op.name!r}] is {format_layout(layout)}: a ZeRO level (z1, z2) is for one axis of a parameter, whose dim no"
            " other axis splits; plan again"
        )


def _find_tensor(graph: Graph, name: str) -> Tensor | None:
    """The tensor of the value whose text is `name`, ``split`` or ``split.1``; None when the graph has none."""
    producer, _, index = name.partition(".")
    results = graph.by_name[producer].results if producer in graph.by_name else ()
    number = int(index) if index.isdecimal() else 0
    return results[number] if number < len(results) else None
