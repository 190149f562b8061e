"""What goes into and comes out of a program and its stages: slots, tensors that cross between stages, outputs of stages."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx, nn

from autopar.capture import Captured
from autopar.ir import Graph, Layout, OpKind, State, StateKind, Value, local_outer, local_shape, program_layout, shard
from autopar.rewrite.planned import PlannedGraph, needed_layout, sent_layout, stored_layout
from autopar.rewrite.program import CrossingTensor, Program, Slot, StageOutput
from autopar.rewrite.stages import Stage
from autopar.rules import find_spaces
from autopar.structure import find_roles, find_samples


def make_program(planned: PlannedGraph, module: nn.Module) -> Program:
    """The program around `module`, which is the graph of the whole program or holds those of stages."""
    return Program(
        module=module,
        mesh=planned.plan.mesh,
        parameters=find_slots(planned, OpKind.PARAMETER),
        buffers=find_slots(planned, OpKind.BUFFER),
        inputs=find_slots(planned, OpKind.INPUT),
        outputs=find_output_slots(planned),
        mutated_buffers=planned.captured.mutated_buffers,
        batch_axes=planned.plan.batch_axes,
        bucket_nbytes=planned.plan.bucket_nbytes,
        regather=_regathers(module),
        prefetch=planned.plan.prefetch,
        captured=planned.captured,
        constants=planned.captured.constants,
        settings=planned.captured.settings,
    )


def find_slots(planned: PlannedGraph, kind: OpKind) -> tuple[Slot, ...]:
    """The program's parameters, buffers or inputs, in placeholder order."""
    slots = []
    for op in planned.graph.of_kind(kind):
        (tensor,) = op.results
        summed = planned.partial_axes.get(op.name, ())
        partial_axes = tuple(axis for axis in planned.plan.mesh.names if axis in summed)
        stored = stored_layout(planned, op)
        slot = Slot(op.target, program_layout(stored), tensor.shape, tensor.dtype, partial_axes, tensor.requires_grad)
        if stored != slot.layout:
            slot = replace(slot, stored=stored)
        if tensor.storage is not None:
            dtype = tensor.stored_dtype if op.name in planned.cast_when_gathered else tensor.dtype
            slot = replace(slot, dtype=dtype, reduced_dtype=tensor.reduced_dtype)
        slots.append(slot)
    return tuple(slots)


def find_output_slots(planned: PlannedGraph) -> tuple[Slot, ...]:
    """The outputs that the user gets, in order; of micro-batches joined."""
    graph, slots = planned.graph, []
    made_from = _find_makers(graph)
    for position, value in enumerate(graph.returned):
        tensor = graph.tensor(value)
        layout = _joined_layout(planned, needed_layout(planned, graph.output, position))
        slot = Slot(f"output {position}", layout, tensor.shape, tensor.dtype, (), tensor.requires_grad)
        slots.append(replace(slot, made_from=made_from[value]) if value in made_from else slot)
    return tuple(slots)


def _find_makers(graph: Graph) -> dict[Value, tuple[int, ...]]:
    """Returned value -> positions of the returned values that it is computed from, as far as gradients pass; where there are any."""
    positions: dict[Value, set[int]] = {}
    for position, value in enumerate(graph.returned):
        positions.setdefault(value, set()).add(position)
    behind: dict[Value, set[int]] = {}
    for op in graph.ops:
        operands = [value for value in op.operands if graph.tensor(value).requires_grad]
        found = set[int]().union(*(behind.get(value, set()) | positions.get(value, set()) for value in operands))
        if found:
            behind.update((value, found) for value in op.values if graph.tensor(value).requires_grad)
    return {value: tuple(sorted(behind[value])) for value in positions if value in behind}


def mark_samples(program: Program, captured: Captured) -> Program:
    """The program with what is known of the batch in its inputs and outputs (`Slot.batch`), for ranks that pass their own samples."""
    graph = captured.graph
    spaces, _ = find_spaces(graph)
    samples = find_samples(graph, spaces, find_roles(graph, spaces))
    inputs = [samples[Value(op.name)] for op in graph.of_kind(OpKind.INPUT)]
    outputs = [samples[value] for value in graph.returned]
    return replace(
        program,
        inputs=tuple(replace(slot, batch=batch) for slot, batch in zip(program.inputs, inputs, strict=True)),
        outputs=tuple(replace(slot, batch=batch) for slot, batch in zip(program.outputs, outputs, strict=True)),
    )


def make_crossing(planned: PlannedGraph, value: Value) -> CrossingTensor:
    """What a stage that reads `value` receives of it per micro-batch."""
    tensor = planned.graph.tensor(value)
    shape = local_shape(tensor.shape, sent_layout(planned, value), planned.mesh)
    return CrossingTensor(str(value), shape, getattr(torch, tensor.dtype), tensor.requires_grad)


def find_stage_outputs(planned: PlannedGraph, stage: Stage) -> tuple[StageOutput, ...]:
    """The outputs among the results of a stage's graph, which follow what it sends."""
    output = planned.graph.output
    return tuple(
        StageOutput(position, number, _state_in_time(planned, needed_layout(planned, output, position)))
        for number, position in enumerate(stage.outputs, start=len(stage.sent))
    )


def _joined_layout(planned: PlannedGraph, layout: Layout) -> Layout:
    """The layout over ranks of what a rank has when the results of all its micro-batches are joined.

    Ranks split each micro-batch, so of the whole batch they have a part inside of each of as many blocks as there are micro-batches:
    with 4 micro-batches, ``S0,S0`` becomes ``S0/4``.
    """
    if planned.micro_split is None:
        return layout
    time, *states = layout
    count = planned.mesh.sizes[0]
    return tuple(shard(state.dim, state.outer * count) if time.kind is StateKind.SHARD and state == time else state for state in states)


def _state_in_time(planned: PlannedGraph, layout: Layout) -> State:
    """What a micro-batch has of a rank's part of a tensor; a Shard's blocks are those of the rank's part."""
    time = layout[0]
    return shard(time.dim, local_outer(layout, planned.mesh, 0)) if time.kind is StateKind.SHARD else time


def _regathers(module: nn.Module) -> bool:
    """Whether some parameter is gathered again in the backward."""
    graphs = [child.graph for child in module.modules() if isinstance(child, fx.GraphModule)]
    return any(node.kwargs.get("save") is False for graph in graphs for node in graph.nodes)
