"""What is known of a captured model before any mesh is: its folded graph, the loops and roles of its ops, its micro-batches.

Comes in: what the other modules of this package found. Goes out: an `AnalyzedGraph`, which every mesh's costs and search start from, and
the meaning of the mesh axis of micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from autopar.ir import MICROBATCH, Graph, Layout, Mesh, OpKind, Route, Space, Split
from autopar.structure.layers import Folded
from autopar.structure.microbatches import MicroSplit
from autopar.structure.roles import GraphRoles, Role
from autopar.structure.saved import SavedTensors, count_saved

RouteKey = tuple[Layout, Layout, tuple[tuple[int, ...], tuple[int, ...]] | None]
"""Layouts at both ends of a journey and, where one of them is blocked (``S0/3``), the sizes of the tensor and of the mesh; else None."""


@dataclass(frozen=True)
class AnalyzedGraph:
    """What is computed once and shared by all meshes.

    Attributes:
        folded: the graph, like layers folded into one.
        spaces: of every call that has a rule.
        roles: boundaries and roles of dims and loops.
        constants: the calls that every rank computes whole (`find_constants`).
        micro_split: how the step splits into micro-batches, which are then the first axis of every mesh (`with_microbatch_axis`); None for
            a step in one piece.
        routes: how to get from one layout to another, as far as was asked; the same on all meshes, but for blocked layouts. A cache that
            users of the model fill.
    """

    folded: Folded
    spaces: Mapping[str, Space]
    roles: GraphRoles
    constants: frozenset[str]
    micro_split: MicroSplit | None = None
    routes: dict[RouteKey, Route] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def saved(self) -> SavedTensors:
        """What autograd saves for the backward, counted once for all meshes and solutions."""
        return count_saved(self.folded, self.spaces)

    @cached_property
    def balances_rows(self) -> bool:
        """Whether some call has most to do for the last of its rows, and can run on parts of them that balance this (`State.zigzag`)."""
        return any(
            space.loops[loop].joins for name, space in self.spaces.items() if name not in self.constants for loop in space.facts.triangular
        )

    def saves_operand(self, consumer: str, operand: int) -> bool:
        """Whether the op `consumer`, a representative, may save its operand number `operand` for its backward.

        The derivative of an op that is linear in an operand doesn't need that operand. A view is linear too, but counts as saving: its
        result shares the operand's storage, and whoever reads the view may save it.
        """
        space = self.spaces.get(consumer)
        if not any(tensor.requires_grad for tensor in self.folded.graph.by_name[consumer].results):
            return False
        return space is None or space.view or operand not in space.linear


def with_microbatch_axis(mesh: Mesh, count: int) -> Mesh:
    """The mesh of ranks with an axis of `count` micro-batches before its own."""
    return Mesh((MICROBATCH, *mesh.names), (count, *mesh.sizes))


def first_rank_axis(mesh: Mesh) -> int:
    """Number of the first axis that consists of ranks: 1 where micro-batches are an axis (`with_microbatch_axis`), else 0."""
    return int(mesh.names[:1] == (MICROBATCH,))


# Elements of a table that every rank makes for itself; a larger one is worth splitting.
TABLE_ELEMENTS = 1 << 24


def find_constants(graph: Graph) -> frozenset[str]:
    """Calls that depend on no input and no parameter and are small: position ids, rotary tables, masks of a fixed form.

    Every rank computes these whole, which costs next to nothing, and takes its part where it needs one. They touch every layer, so
    leaving their placement open would tie everything to everything.
    """
    constants: set[str] = set()
    for op in graph.of_kind(OpKind.CALL):
        is_constant = all(value.op in constants or graph.by_name[value.op].kind is OpKind.BUFFER for value in op.operands)
        if is_constant and all(tensor.numel <= TABLE_ELEMENTS for tensor in op.results):
            constants.add(op.name)
    return frozenset(constants)


def role_of(loops: Mapping[str, Mapping[int, Role]], part: Split) -> Role:
    """What a split of a call divides; `loops` has the boundaries of the call's loops (`GraphRoles.of_loops`)."""
    return loops[part.loop].get(part.outer, Role.FEATURE)
