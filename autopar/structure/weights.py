"""Whether the gradients of an op's weights can wait for a pass of their own."""

from __future__ import annotations

from collections.abc import Mapping

from autopar.ir import Graph, Op, OpKind, Space, Value
from autopar.rules import facts_of


def is_deferrable(graph: Graph, spaces: Mapping[str, Space], op: Op) -> bool:
    """Whether an op's weight gradient can wait for a pass of its own, after the input gradients.

    The weight must be trained, and weight and bias must be made from parameters alone, through nothing but views, gathers and
    casts: the later pass goes back through what made them, and an activation there (a product of two activations) would get its
    gradient too late.
    """
    weights = [op.operands[index] for index in facts_of(op, spaces.get(op.name)).weights]
    sources = [graph.by_name[find_source(graph, spaces, value).op] for value in weights]
    return bool(sources) and all(source.kind is OpKind.PARAMETER for source in sources) and sources[0].results[0].requires_grad


def find_source(graph: Graph, spaces: Mapping[str, Space], value: Value) -> Value:
    """What a value is a view of; the value itself when it is none."""
    while value.op in spaces and spaces[value.op].view:
        value = graph.by_name[value.op].operands[0]
    return value
