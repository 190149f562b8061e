"""Which operands of an op are its weights, and whether their gradients can wait for a pass of their own."""

from __future__ import annotations

from collections.abc import Mapping

from autopar.ir import Graph, Op, Operand, OpKind, Space, Value

PARAMETERS_AT: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(
        (
            "aten.linear.default",
            "aten.convolution.default",
            "aten.conv1d.default",
            "aten.conv2d.default",
            "aten.conv3d.default",
            "aten.conv_transpose1d.default",
            "aten.conv_transpose2d.input",
            "aten.conv_transpose3d.input",
        ),
        (1, 2),
    ),
    **dict.fromkeys(("aten.mm.default", "aten.bmm.default", "aten.matmul.default"), (1,)),
    "aten.addmm.default": (2, 0),
    "aten.embedding.default": (0,),
}
"""Positions of an operator's weight and bias.

Both must come from parameters alone, through nothing but gathers, casts and the like, for what made them is gone back through in the
later pass: an activation there (a product of two activations) would get its gradient too late.
"""


def is_deferrable(graph: Graph, spaces: Mapping[str, Space], op: Op) -> bool:
    """Whether an op's weight gradient can wait for a pass of its own: what it reads as parameters are such, and the weight is trained."""
    at = PARAMETERS_AT.get(op.target)
    if at is None:
        return False
    given = [op.args[position] for position in at if position < len(op.args)]
    operands = [op.operands[argument.index] for argument in given if isinstance(argument, Operand)]
    sources = [graph.by_name[find_source(graph, spaces, value).op] for value in operands]
    return bool(sources) and all(one.kind is OpKind.PARAMETER for one in sources) and sources[0].results[0].requires_grad


def find_source(graph: Graph, spaces: Mapping[str, Space], value: Value) -> Value:
    """What a value is a view of; the value itself when it is none."""
    while value.op in spaces and spaces[value.op].view:
        value = graph.by_name[value.op].operands[0]
    return value
