"""Moves values from the layout in which they are held to the one in which an op needs them.

Over ranks that is the journey of `autopar.ir.journey`, a collective per step. Over micro-batches nothing is exchanged: a micro-batch takes
its part of what is there whole. A value that several ops need in one layout is moved once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from autopar.ir import (
    MICROBATCH,
    REPLICATE,
    Collective,
    Layout,
    Mesh,
    Op,
    OpKind,
    ReshardStep,
    State,
    StateKind,
    Value,
    fits,
    journey,
    local_outer,
)
from autopar.ops import collectives
from autopar.rewrite.builder import GraphBuilder, LocalValue
from autopar.rewrite.planned import made_layout, needed_layout
from autopar.rewrite.whole_batch import BatchValue, needs_whole_batch

_GRADIENT_OF_GATHER = {Collective.REDUCE_SCATTER: "reduce_scatter", Collective.SLICE: "slice"}


def read_operand(builder: GraphBuilder, op: Op, operand: int) -> fx.Node:
    """The node from which `op` reads its operand of this number, in the layout in which it needs it.

    Before, in the captured graph, a product whose inner loop `tp` splits makes parts of a sum (``P``), and the norm after it needs a part
    of dim 1 (``S1``)::

        linear = linear(gelu, weight)
        layer_norm = layer_norm(linear, ...)

    After::

        linear = linear(gelu, weight)
        reduce_scatter = reduce_scatter(linear, 'tp', 1)
        layer_norm = layer_norm(reduce_scatter, ...)

    With micro-batches, an op that needs the whole batch reads what the prologue computed; others begin with their micro-batch's part.
    """
    value, need = op.operands[operand], needed_layout(builder.planned, op, operand)
    if builder.planned.micro_split is None:
        return move(builder, builder.made[value], need, op).node
    if needs_whole_batch(builder.planned, value, need):
        made = made_layout(builder.planned, value)
        return _carry(builder, LocalValue(value, (need[0], *made[1:]), builder.whole_batch[BatchValue(value)]), need, op).node
    return move(builder, cut_in_time(builder, builder.made[value], need[0], op), need, op).node


def move(builder: GraphBuilder, local: LocalValue, need: Layout, reader: Op) -> LocalValue:
    """`local` in layout `need`: moved before, for another reader, or else moved now.

    Before, the query and the key projection need whole (``B``) what the norm made in parts of dim 1 (``S1``)::

        q = linear(layer_norm, q_weight)
        k = linear(layer_norm, k_weight)

    After, there is one all-gather forward, and one reduce-scatter of the summed gradients backward::

        all_gather = all_gather(layer_norm, 'tp', 1, grad='reduce_scatter')
        q = linear(all_gather, q_weight)
        k = linear(all_gather, k_weight)
    """
    gathers_parameter = _gathers_parameter(builder, local, need)
    if local.value.op in builder.planned.cast_when_gathered and not gathers_parameter:
        local = _cast(builder, local, reader)
    if local.layout == need:
        return local
    key = (local.value, need)
    if key in builder.moved:
        return builder.moved[key]
    moved = _carry(builder, local, need, reader)
    # A gathered parameter is gathered for each use, as it was priced: held for a later one, a tied embedding would lie
    # whole in memory from the first layer to the last.
    if not gathers_parameter:
        builder.moved[key] = moved
    return moved


def cut_in_time(builder: GraphBuilder, local: LocalValue, need: State, reader: Op) -> LocalValue:
    """A value of which all micro-batches have the same (``R`` in time), in the state in which a micro-batch needs it.

    Before, an input is whole, and the lookup works on the rows of one micro-batch (``S0``)::

        embedding = embedding(weight, tokens)

    After::

        take_microbatch = take_microbatch(tokens, 'micro', 0, 1)
        embedding = embedding(weight, take_microbatch)

    A summand (``P``) is the whole in the first micro-batch and zeros in the others (``keep_in_first_microbatch``).
    """
    after = (need, *local.layout[1:])
    if local.layout == after:
        return local
    if need.kind is StateKind.SHARD and (local.value, after) not in builder.moved:
        shape = builder.planned.graph.tensor(local.value).shape
        local = move(builder, local, _cuttable_layout(shape, local.layout, need, builder.planned.mesh), reader)
        after = (need, *local.layout[1:])
    key = (local.value, after)
    if key not in builder.moved:
        builder.moved[key] = LocalValue(local.value, after, _take_microbatch(builder, local.node, after, reader))
    return builder.moved[key]


def _take_microbatch(builder: GraphBuilder, node: fx.Node, after: Layout, reader: Op) -> fx.Node:
    need = after[0]
    if need.kind is StateKind.SHARD:
        return builder.call(reader, collectives.take_microbatch, (node, MICROBATCH, need.dim, local_outer(after, builder.planned.mesh, 0)))
    if need.kind is StateKind.PARTIAL:
        return builder.call(reader, collectives.keep_in_first_microbatch, (node, MICROBATCH))
    return node


def _cuttable_layout(shape: tuple[int, ...], layout: Layout, time: State, mesh: Mesh) -> Layout:
    """The layout from which the state `time` can be cut: ranks' parts must lie inside of a micro-batch's, not around them.

    Where they don't, the value is gathered first: from ``R,S0`` with `time` ``S0``, a rank's rows belong to a few micro-batches only.
    """
    along = [state for state in layout if state.kind is StateKind.SHARD and state.dim == time.dim]
    nests = fits(shape, (time, *layout[1:]), mesh) and all(state.outer != time.outer for state in along)
    return layout if nests else tuple(REPLICATE if state in along else state for state in layout)


def _cast(builder: GraphBuilder, local: LocalValue, reader: Op) -> LocalValue:
    """A parameter in the dtype in which ops read it; cast once for all of them."""
    if local.value not in builder.casts:
        dtype = getattr(torch, builder.planned.graph.tensor(local.value).dtype)
        builder.casts[local.value] = replace(local, node=builder.call(reader, collectives.cast, (local.node, dtype)))
    return builder.casts[local.value]


def _gathers_parameter(builder: GraphBuilder, local: LocalValue, need: Layout) -> bool:
    if builder.planned.graph.by_name[local.value.op].kind is not OpKind.PARAMETER:
        return False
    return any(step.forward is Collective.ALL_GATHER for step in _steps(builder, local, need))


def _steps(builder: GraphBuilder, local: LocalValue, need: Layout) -> tuple[ReshardStep, ...]:
    return journey(builder.planned.graph.tensor(local.value).shape, local.layout, need, builder.planned.mesh)


def _carry(builder: GraphBuilder, local: LocalValue, need: Layout, reader: Op) -> LocalValue:
    """`local` in layout `need`, by a collective per step; it isn't noted for other readers."""
    node, steps = local.node, _steps(builder, local, need)
    if local.value.op in builder.planned.cast_when_gathered and node is builder.made[local.value].node:
        # The first gather casts; what moves nothing comes after it.
        steps = tuple(sorted(steps, key=lambda step: step.forward is Collective.NONE))
        if steps[0].forward is not Collective.ALL_GATHER:
            node = _cast(builder, local, reader).node
    for step in steps:
        node = _take_step(builder, node, step, local.value, reader)
    return replace(local, layout=need, node=node)


def _take_step(builder: GraphBuilder, node: fx.Node, step: ReshardStep, value: Value, reader: Op) -> fx.Node:
    """One step of a journey: a collective along one axis, or nothing where neither value nor gradient need one there."""
    planned = builder.planned
    axis = planned.mesh.names[step.axis]
    assert axis != MICROBATCH, "ranks can't exchange along time"
    producer, requires_grad = planned.graph.by_name[value.op], planned.graph.tensor(value).requires_grad
    is_parameter = producer.kind is OpKind.PARAMETER
    tensor = planned.graph.tensor(value)
    summed = {"reduce_dtype": getattr(torch, tensor.reduced_dtype)} if tensor.reduced_dtype != tensor.dtype else {}
    if step.forward is not Collective.NONE:
        args, kwargs = _arguments_of(step, is_parameter=is_parameter, requires_grad=requires_grad)
        if step.forward is Collective.ALL_GATHER and is_parameter:
            if node is builder.made[value].node and producer.name in planned.cast_when_gathered:
                kwargs = {**kwargs, "dtype": getattr(torch, tensor.dtype)}
            if step.backward is Collective.REDUCE_SCATTER and requires_grad:
                kwargs = {**kwargs, **summed}
            if step.padded:
                kwargs = {**kwargs, "size": step.shape_after[step.dim]}
        moved = builder.call(reader, getattr(collectives, step.forward.value), (node, axis, *args), kwargs)
        moved.meta["gathers_stored"] = step.forward is Collective.ALL_GATHER and is_parameter and node is builder.made[value].node
        return moved
    is_summed_later = is_parameter and axis in planned.partial_axes[producer.name]
    if step.backward is Collective.NONE or not requires_grad or is_summed_later:
        return node
    return builder.call(reader, collectives.sum_gradient, (node, axis), summed)


def _arguments_of(step: ReshardStep, *, is_parameter: bool, requires_grad: bool) -> tuple[tuple[int, ...], Mapping[str, Any]]:
    """What the step's collective takes beside the tensor and the axis; arguments that equal their defaults are left out."""
    if step.forward is Collective.ALL_TO_ALL:
        blocks = {"from_outer": step.outer, "to_outer": step.to_outer}
        zigzags = {"from_zigzag": step.zigzag, "to_zigzag": step.to_zigzag}
        return (step.dim, step.to_dim), {
            **{name: outer for name, outer in blocks.items() if outer != 1},
            **{name: True for name, is_zigzag in zigzags.items() if is_zigzag},
        }
    if step.forward is Collective.KEEP_FIRST:
        return (), {}
    if step.forward is Collective.ALL_REDUCE:
        sums_gradient = step.backward is Collective.ALL_REDUCE and requires_grad
        return (), {"grad": "all_reduce"} if sums_gradient else {}
    kwargs: dict[str, Any] = {} if step.outer == 1 else {"outer": step.outer}
    if step.zigzag:
        kwargs["zigzag"] = True
    if step.forward is Collective.ALL_GATHER:
        kwargs["grad"] = _GRADIENT_OF_GATHER[step.backward]
        if is_parameter and requires_grad:
            kwargs["save"] = False  # the backward gathers it again (ZeRO-3)
    return (step.dim,), kwargs
