"""Calls of the captured graph, each as the call that a rank runs on its parts."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from autopar.capture import takes
from autopar.ir import Mesh, Op, Placement, Space, Split, Value, local_shape
from autopar.ops import DEFERRABLE, kernels, losses
from autopar.rewrite.builder import GraphBuilder, LocalValue
from autopar.rewrite.moves import read_operand
from autopar.rewrite.planned import made_layout, placement_of
from autopar.rewrite.whole_batch import BatchValue, target_mean_of
from autopar.rules import facts_of, is_random
from autopar.structure import is_deferrable


def call(builder: GraphBuilder, op: Op, *, splits_backward: bool = False) -> None:
    """Append the call `op` on local parts, after the collectives that its operands need, and note what it makes.

    Before, with `tp` over the loops ``v`` (vocabulary) of the lookup and ``h`` (heads) of the view, 4 ranks::

        embedding = embedding(weight, tokens)
        view = reshape(linear, [8, 16, 4, 8])

    After, the lookup in a part of the table is done by its kernel, and sizes among a call's arguments are local ones::

        embedding = kernels.embedding(weight, tokens, splits={'v': ('tp',)})
        view = reshape(linear, [8, 16, 1, 8])

    With `splits_backward`, an op whose weight gradient can wait (`is_deferrable`) is replaced by its function in
    `autopar.ops.deferrable`, whose backward leaves the weight gradient to a pass of its own::

        linear = deferrable.linear(x, weight)
    """
    planned = builder.planned
    captured, space = planned.fx_nodes[op.name], planned.spaces.get(op.name)
    args, kwargs = _read_arguments(builder, op, captured)
    if space is not None and space.shape_arg is not None:
        args[space.shape_arg] = list(local_shape(op.results[0].shape, made_layout(planned, Value(op.name)), planned.mesh))
    target: Any = captured.target
    splits = _kernel_splits(space, placement_of(planned, op), planned.mesh)
    if splits or is_random(op, space):
        if space is not None and space.kernel is not None:
            target = getattr(kernels, space.kernel)
        else:
            target, args = kernels.draw, [target, *args]
        kwargs["splits"] = splits
        if space is not None and any(
            isinstance(part, Split) and part.zigzag and space.loops[part.loop].joins for part in placement_of(planned, op)
        ):
            kwargs["zigzag"] = True
        if planned.micro_split is not None and op.name in planned.micro_split.counted:
            kwargs["counted"] = builder.whole_batch[BatchValue(planned.micro_split.counted[op.name], op.name)]
    elif splits_backward and is_deferrable(planned.graph, planned.spaces, op):
        target = DEFERRABLE[op.target]
    if planned.device is not None and not op.operands and takes(captured.target, "device"):
        kwargs["device"] = planned.device
    node = builder.call(op, target, args, kwargs, name=op.name)
    node.meta["writes"] = facts_of(op, space).writes  # for `Recomputed`
    _note_results(builder, op, node)


def count_targets(builder: GraphBuilder, loss: Op) -> fx.Node:
    """The number of targets that the mean `loss` divides by, or the sum of their class weights, counted on the whole batch.

    Before, the captured graph::

        cross_entropy = cross_entropy(logits, labels)

    After, in the prologue, while the stage's ``cross_entropy`` takes the number as its argument ``counted``::

        count_targets = losses.count_targets(labels, None, -100)
    """
    mean = target_mean_of(builder.planned, loss.name)
    target = read_operand(builder, loss, mean.target)
    weight = None if mean.weight is None else read_operand(builder, loss, mean.weight)
    return builder.call(loss, losses.count_targets, (target, weight, mean.ignore_index))


def _read_arguments(builder: GraphBuilder, op: Op, captured: fx.Node) -> tuple[list[Any], dict[str, Any]]:
    """The captured node's own arguments with the tensors replaced: they hold dtypes and the like, which the IR keeps as text."""
    operands = iter([read_operand(builder, op, index) for index in range(len(op.operands))])  # in the order in which `map_arg` meets them
    args = fx.map_arg(captured.args, lambda _: next(operands))
    kwargs = fx.map_arg(captured.kwargs, lambda _: next(operands))
    return list(args), dict(kwargs)


def _note_results(builder: GraphBuilder, op: Op, node: fx.Node) -> None:
    """Note the values that a call makes; those of a call that returns several are picked from its result."""
    returns_several = isinstance(builder.planned.fx_nodes[op.name].meta["val"], (list, tuple))
    for index in range(len(op.results)):
        value = Value(op.name, index)
        item = builder.call(op, operator.getitem, (node, index)) if returns_several else node
        builder.made[value] = LocalValue(value, made_layout(builder.planned, value), item)


def _kernel_splits(space: Space | None, placement: Placement, mesh: Mesh) -> dict[str, tuple[str, ...]]:
    """The split loops that need the op's kernel, with the axes that split them, outermost first."""
    splits: dict[str, tuple[str, ...]] = {}
    for part, axis in zip(placement, mesh.names, strict=True):
        if space is not None and isinstance(part, Split) and part.loop in space.kernel_loops:
            splits[part.loop] = (*splits.get(part.loop, ()), axis)
    return splits
