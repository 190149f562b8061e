"""What the calls of a chosen plan read, for the plan.

Comes in: a `Chosen`, what the search decided. Goes out: the operands of every call that stands for like ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from autopar.costs import operand_layout_of, result_layout_of
from autopar.ir import Layout, Mesh, OpKind, StateKind, Tensor, Value, local_outer, local_shape, program_layout
from autopar.plans import Read
from autopar.search.attribution import Chosen
from autopar.structure import first_rank_axis


def find_reads(chosen: Chosen) -> Mapping[str, tuple[Read, ...]]:
    """Per call that stands for like ones its operands, in their order."""
    model, placements = chosen.model, chosen.sharding.placements
    graph = model.folded.graph
    first_axis = first_rank_axis(chosen.mesh)
    return {
        op.name: tuple(
            _make_read(
                value,
                graph.tensor(value),
                _made(chosen, value),
                operand_layout_of(model, op, placements[op.name], index),
                chosen.mesh,
                first_axis,
            )
            for index, value in enumerate(op.operands)
        )
        for op in model.folded.ops
        if op.kind is OpKind.CALL
    }


def _made(chosen: Chosen, value: Value) -> Layout:
    """The layout in which a value is made, or in which the program is given it; like values are made alike."""
    folded = chosen.model.folded
    op = folded.graph.by_name[folded.representative[value.op]]
    if op.kind is OpKind.CALL:
        return result_layout_of(chosen.model, op, chosen.sharding.placements[op.name], value.index)
    return program_layout(chosen.sharding.layouts[op.name])


def _make_read(value: Value, tensor: Tensor, made: Layout, need: Layout, mesh: Mesh, first_axis: int) -> Read:
    """An operand without the axis of micro-batches, which comes first if there is one: of what it splits, a micro-batch's part is left."""
    micro = Mesh(mesh.names[:first_axis], mesh.sizes[:first_axis])
    in_parts = need if any(state.kind is StateKind.SHARD for state in need[:first_axis]) else made
    part = Tensor(local_shape(tensor.shape, in_parts[:first_axis], micro), tensor.dtype)
    gradient = tensor.reduced_dtype if tensor.requires_grad else ""
    states = in_parts[:first_axis]
    return Read(str(value), str(part), _inside(made[first_axis:], states, micro), _inside(need[first_axis:], states, micro), gradient)


def _inside(layout: Layout, states: Layout, micro: Mesh) -> Layout:
    """`layout` as a micro-batch's part of a tensor has it: of the outer blocks of a dim that micro-batches split too, it has fewer."""
    return tuple(
        replace(state, outer=local_outer((*states, state), Mesh((*micro.names, ""), (*micro.sizes, 1)), len(states)))
        if state.kind is StateKind.SHARD
        else state
        for state in layout
    )
