"""Work of calls, and bytes alive between them: what decides where repeated parts and blocks begin and end.

Comes in: ops of a `Graph`, in the order in which they run, and the spaces of those that have a rule. Goes out: counts of whole tensors; no
mesh is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from autopar.ir import Family, Graph, Op, OpKind, Space

Alive = tuple[int, int]
"""Bytes and number of the tensors that are alive at one place, in this order: of two places with as many bytes, the one with fewer tensors
compares as less."""


def count_elements(op: Op) -> int:
    """Number of elements of all results of an op."""
    return sum(tensor.numel for tensor in op.results)


def count_flops(spaces: Mapping[str, Space], op: Op) -> float:
    """Flops of a call: those per point of its loop nest times the number of points; one per element of its results without a rule."""
    space = spaces.get(op.name)
    return float(count_elements(op)) if space is None else space.flops * space.points()


def is_heavy(graph: Graph, spaces: Mapping[str, Space], op: Op) -> bool:
    """Whether a block may be made for the sake of this call: a product, convolution or the like, or a lookup in a parameter."""
    space = spaces.get(op.name)
    if space is None or not space.is_contraction:
        return False
    return space.family is not Family.LOOKUP or any(graph.by_name[value.op].kind is OpKind.PARAMETER for value in op.operands)


def find_alive(graph: Graph, ops: Sequence[Op]) -> list[Alive]:
    """What is alive between calls that run in the order of `ops`; entry n is what the first n of them make and the others read.

    Results that none of `ops` reads count nowhere, and neither does what is made elsewhere, such as parameters. The list has one entry more
    than `ops`; its first and its last are (0, 0).
    """
    position = {op.name: index for index, op in enumerate(ops)}
    last_reader = {value: index for index, op in enumerate(ops) for value in op.operands if value.op in position}
    nbytes, tensors = [0] * (len(ops) + 1), [0] * (len(ops) + 1)
    for value, index in last_reader.items():
        for place, sign in ((position[value.op] + 1, 1), (index + 1, -1)):
            nbytes[place] += sign * graph.tensor(value).nbytes
            tensors[place] += sign
    return list(zip(accumulate(nbytes), accumulate(tensors), strict=True))
