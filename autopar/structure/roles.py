"""Dims as ordered products of loops: where, inside a dim, a split makes sense, and what is split there.

A view that merges ``b s`` into one dim, or splits ``o`` into ``(three heads head_dim)``, tells something about every tensor that
the dim flows through. `find_factors` carries these *boundaries* through the whole graph, forward and backward, to a fixpoint: a
boundary ``k`` of a dim means that the dim is made of ``k`` equal outer blocks, and splitting inside each of them may be useful. Each
boundary has a `Role`, so that a user can say "split the batch" without knowing any op.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from autopar.ir import Dims, Graph, LoopKind, Op, OpKind, Space, Value


class Role(IntEnum):
    """What the part of a dim that starts at a boundary stands for; a larger one wins where two meet.

    INNER parts touch no dim of a parameter, of the batch or of the sequence: the size of a head inside of a fused dim, the height
    of an image. Splitting them helps nobody, so the search leaves them whole.
    """

    INNER = 0
    FEATURE = 1
    SEQUENCE = 2
    BATCH = 3


Boundaries = dict[int, Role]
"""Outer block counts, each with the role of what a split there divides."""

# More boundaries than this on one dim make placements that nobody wants and slow the search; those found first are kept.
MAX_BOUNDARIES = 4


@dataclass(frozen=True)
class Factors:
    """Boundaries of every value's dims and of every call's loops."""

    of_dims: Mapping[Value, tuple[Boundaries, ...]]
    of_loops: Mapping[str, Mapping[str, Boundaries]]


def find_factors(graph: Graph, spaces: Mapping[str, Space]) -> Factors:
    """Carry boundaries and roles through `graph`; `spaces` gives the space of every call that has a rule."""
    of_dims: dict[Value, tuple[Boundaries, ...]] = {}
    weights = _find_weights(graph, spaces)
    for op in graph.ops:
        for index, tensor in enumerate(op.results):
            roles = _own_roles(op, len(tensor.shape), tensor.dtype, op.name in weights)
            of_dims[Value(op.name, index)] = tuple({1: role} for role in roles)
    calls = [(op, spaces[op.name]) for op in graph.ops if op.name in spaces]
    of_loops: dict[str, dict[str, Boundaries]] = {op.name: {name: {} for name in space.loops} for op, space in calls}
    changed = True
    order = calls
    while changed:  # every pass either adds a boundary, raises a role or ends
        changed = False
        for op, space in order:
            changed |= _exchange(op, space, of_dims, of_loops[op.name])
        order = order[::-1]
    return Factors(of_dims, of_loops)


def _find_weights(graph: Graph, spaces: Mapping[str, Space]) -> set[str]:
    """Parameters whose dims are features: vectors, and what a product, convolution or lookup reads; not a table of positions."""
    found = {op.name for op in graph.of_kind(OpKind.PARAMETER) if len(op.results[0].shape) == 1}
    for op in graph.of_kind(OpKind.CALL):
        if op.name in spaces and spaces[op.name].is_contraction:
            found.update(value.op for value in op.operands)
    return found


def _own_roles(op: Op, rank: int, dtype: str, is_weight: bool) -> list[Role]:
    roles = [Role.FEATURE if op.kind is OpKind.PARAMETER and is_weight else Role.INNER] * rank
    if op.kind is OpKind.INPUT and rank:
        roles[0] = Role.BATCH
        if rank > 1 and dtype in ("int64", "int32", "bool"):  # token ids, labels, padding masks
            roles[1] = Role.SEQUENCE
    return roles


def _exchange(op: Op, space: Space, of_dims: dict[Value, tuple[Boundaries, ...]], loops: dict[str, Boundaries]) -> bool:
    """Bring the boundaries of an op's tensors and loops to agreement; True when something new was learnt."""
    tensors = list(zip(op.operands, space.operands, strict=True))
    tensors += [(Value(op.name, index), dims) for index, dims in enumerate(space.results)]
    changed = False
    for value, dims in tensors:
        changed |= _move(space, dims, of_dims[value], loops, into_loops=True)
    for value, dims in tensors:
        changed |= _move(space, dims, of_dims[value], loops, into_loops=False)
    return changed


def _move(space: Space, dims: Dims, bounds: tuple[Boundaries, ...], loops: dict[str, Boundaries], *, into_loops: bool) -> bool:
    changed = False
    for dim, of_dim in zip(dims, bounds, strict=True):
        outer = 1
        passed: Role | None = None  # what a loop that can't be split hands on to the one inside of it
        for name in dim:
            loop = space.loops[name]
            if loop.size > 1 and into_loops:
                for boundary, role in [*of_dim.items(), *([(outer, passed)] if passed is not None else [])]:
                    inner, rest = divmod(boundary, outer)
                    if rest == 0 and 1 <= inner < loop.size and loop.size % inner == 0:
                        changed |= _learn(loops[name], inner, role)
                passed = loops[name].get(1) if loop.kind is LoopKind.WHOLE else None
            elif loop.size > 1:
                for boundary, role in list(loops[name].items()):
                    if outer == 1 or role is not Role.INNER:
                        changed |= _learn(of_dim, boundary * outer, role)
            outer *= loop.size
    return changed


def _learn(bounds: Boundaries, boundary: int, role: Role) -> bool:
    if boundary not in bounds:
        if len(bounds) >= MAX_BOUNDARIES:
            return False
        bounds[boundary] = role
        return True
    if role > bounds[boundary]:
        bounds[boundary] = role
        return True
    return False
