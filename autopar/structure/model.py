"""What no mesh changes about a captured model: its folded graph, the loops and roles of its ops, its micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from autopar.ir import MICROBATCH, Graph, Layout, Mesh, OpKind, Route, Space, Split
from autopar.structure.layers import Folded
from autopar.structure.microbatches import MicroSplit
from autopar.structure.roles import Factors, Role

RouteKey = tuple[Layout, Layout, tuple[tuple[int, ...], tuple[int, ...]] | None]
"""Layouts at both ends and, where it matters, the sizes of the tensor and of the mesh."""


@dataclass(frozen=True)
class Model:
    """The parts of a problem that no mesh changes: computed once, shared by all meshes.

    `tables` are the calls that `find_tables` found. With `micro`, time is the first axis of every mesh (`in_time`), and the split says what
    it does to each op. `routes` fills up as costs are asked for: how to get from one layout to another
    is the same on all meshes, but for blocked layouts, whose sizes are then part of the key.
    """

    folded: Folded
    spaces: Mapping[str, Space]
    factors: Factors
    tables: frozenset[str]
    micro: MicroSplit | None = None
    routes: dict[RouteKey, Route] = field(default_factory=dict, compare=False, repr=False)


def in_time(mesh: Mesh, count: int) -> Mesh:
    """The mesh with `count` micro-batches as its outermost axis."""
    return Mesh((MICROBATCH, *mesh.names), (count, *mesh.sizes))


def first_rank_axis(mesh: Mesh) -> int:
    """Position of the first axis that is made of ranks: 1 where time is an axis too."""
    return int(mesh.names[:1] == (MICROBATCH,))


# Elements of a table that every rank makes for itself; a larger one is worth splitting.
TABLE_ELEMENTS = 1 << 24


def find_tables(graph: Graph) -> frozenset[str]:
    """Calls that depend on no input and no parameter and are small: position ids, rotary tables, masks of a fixed form.

    Every rank computes these whole, which costs next to nothing, and takes its part where it needs one. They touch every layer, so
    leaving their placement open would tie everything to everything.
    """
    found: set[str] = set()
    for op in graph.of_kind(OpKind.CALL):
        before = [graph.by_name[value.op] for value in op.operands]
        constant = all(one.kind is OpKind.BUFFER or one.name in found for one in before)
        if constant and all(tensor.numel <= TABLE_ELEMENTS for tensor in op.results):
            found.add(op.name)
    return frozenset(found)


def role_of(loops: Mapping[str, Mapping[int, Role]], part: Split) -> Role:
    """What splitting `part` divides."""
    return loops[part.loop].get(part.outer, Role.FEATURE)
