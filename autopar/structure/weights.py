"""Which calls may compute the gradients of their weights in a pass of its own, after the gradients of their inputs.

Comes in: a `Graph` and the spaces of its calls. Zero-bubble schedules (Qi et al. 2024, "Zero Bubble Pipeline Parallelism") split the
backward into such passes; the costs read here what can wait, and the rewrite replaces just these calls.
"""

from __future__ import annotations

from collections.abc import Mapping

from autopar.ir import Graph, Op, OpKind, Space, Value
from autopar.rules import facts_of


def is_deferrable(graph: Graph, spaces: Mapping[str, Space], op: Op) -> bool:
    """Whether the gradients of an op's weight and bias can be computed in a pass of its own, after the input gradients.

    The weight must be trained, and weight and bias must each be a parameter or a view of one. The later pass carries their gradients back
    to what they were made from; an activation there, as in a product of two activations, would get its gradient too late.
    """
    weights = [op.operands[index] for index in facts_of(op, spaces.get(op.name)).weights]
    sources = [graph.by_name[find_source(graph, spaces, value).op] for value in weights]
    return bool(sources) and all(source.kind is OpKind.PARAMETER for source in sources) and sources[0].results[0].requires_grad


def find_source(graph: Graph, spaces: Mapping[str, Space], value: Value) -> Value:
    """What a value is a view of, through any number of views; the value itself when it is none."""
    while value.op in spaces and spaces[value.op].view:
        value = graph.by_name[value.op].operands[0]
    return value
