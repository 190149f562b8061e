"""Where, inside a dim, a split makes sense, and what is split there: the batch, the sequence or features.

Comes in: a `Graph` and the spaces of its calls. Goes out: `GraphRoles`: for every dim of a value and every loop of a call its *boundaries*,
each with a `Role`.

A view that merges ``b s`` into one dim, or splits ``o`` into ``(three heads head_dim)``, tells something about every tensor that the dim
flows through. Boundary ``k`` of a dim says that the dim consists of ``k`` equal outer blocks, and that splitting inside of each of them
may be useful (`State.outer`); boundary 1 is the split of the dim as a whole. Dim ``(b s)`` of sizes 8 and 16 has the boundaries

    {1: BATCH, 8: SEQUENCE}      split the 128 rows as they are, or the 16 rows of each of 8 samples

`find_roles` carries boundaries from tensors to loops and back, through all ops, forward and backward, until nothing changes. Roles let a
user say "split the batch" without knowing any op.

With grouped queries (Ainslie et al. 2023) the heads of q are ``(g r)``: r heads for each of g heads of keys and values. Where an axis has
more ranks than g divides into, r is worth splitting too: each rank then has all keys and values of its groups, and some of their queries.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass
from enum import IntEnum

from autopar.ir import Dims, Family, Graph, LoopKind, Meaning, Op, OpKind, Space, Value


class Role(IntEnum):
    """What a split at a boundary divides; the larger role wins where two meet.

    BATCH is dim 0 of every input, unless it is the sequence of the others (`_find_sequences`). SEQUENCE is dim 1 of integer and bool inputs
    of two or three dims (a mask with more has heads there), and what attends to itself, of which no input may tell: sounds, patches of
    images, embeddings. FEATURE is every dim of the parameters that are vectors or that a product, convolution or lookup reads. INNER is
    what comes from none of these: the size of a head inside of a fused dim, the height of an image. Splitting that helps nobody, so the
    search leaves it whole unless an op has nothing else.
    """

    INNER = 0
    FEATURE = 1
    SEQUENCE = 2
    BATCH = 3


Boundaries = dict[int, Role]
"""Boundary, a number of equal outer blocks -> the role of what a split inside of each block divides."""

# More boundaries than this on one dim make placements that nobody wants and slow the search; those found first are kept.
MAX_BOUNDARIES = 4


@dataclass(frozen=True)
class GraphRoles:
    """Boundaries of dims and loops.

    Attributes:
        of_dims: value -> per dim its boundaries.
        of_loops: call that has a rule -> loop -> its boundaries.
    """

    of_dims: Mapping[Value, tuple[Boundaries, ...]]
    of_loops: Mapping[str, Mapping[str, Boundaries]]


def find_roles(graph: Graph, spaces: Mapping[str, Space], ranks: int = 1) -> GraphRoles:
    """Carry boundaries and roles through `graph`.

    Args:
        graph: the captured program.
        spaces: the space of every call that has a rule, by name.
        ranks: of the widest axis that may split heads. Query heads inside of a group get a boundary of their own where the number of groups
            isn't a multiple of it.

    Ends, as every pass but the last adds one of at most `MAX_BOUNDARIES` boundaries to a dim or loop or raises a role.
    """
    weights = _find_weights(graph, spaces)
    of_dims, of_loops = _spread(graph, spaces, weights, _find_sequences(graph, spaces, weights), ranks)
    for op in graph.ops:
        for name, loop in spaces[op.name].loops.items() if op.name in spaces else ():
            if loop.joins:  # blocks that other loops make inside of it are of no use to a kernel that needs positions
                of_loops[op.name][name] = {1: max(of_loops[op.name][member].get(1, Role.INNER) for member in loop.joins)}
    return GraphRoles(of_dims, of_loops)


_Dims = dict[Value, tuple[Boundaries, ...]]
_Loops = dict[str, dict[str, Boundaries]]


def _find_sequences(graph: Graph, spaces: Mapping[str, Space], weights: Set[str]) -> frozenset[str]:
    """Inputs whose dim 0 is no batch, but the sequence of the others: positions, tables of them, masks of rows and keys.

    The batch has the size that dim 0 of most inputs has; if dim 0 of no other input meets dim 1 of tokens then, the size of the next
    most, as tables may outnumber tokens. Dim 0 of inputs that don't meet it is a batch of its own, as of patches. Nothing tells a sequence
    from a batch of the same size: all of these inputs have a batch.
    """
    inputs = [op for op in graph.of_kind(OpKind.INPUT) if op.results[0].shape]
    sizes = Counter(op.results[0].shape[0] for op in inputs)
    for size, _ in sizes.most_common() if len(sizes) > 1 else ():
        others = frozenset(op.name for op in inputs if op.results[0].shape[0] != size)
        of_dims, _ = _spread(graph, spaces, weights, others)
        if found := frozenset(name for name in others if of_dims[Value(name)][0].get(1) is Role.SEQUENCE):
            return found
    return frozenset()


def _spread(
    graph: Graph, spaces: Mapping[str, Space], weights: Set[str], sequences: Set[str], ranks: int | None = None
) -> tuple[_Dims, _Loops]:
    """Carry what the ops' own dims and loops are to all others.

    Args:
        graph: the captured program.
        spaces: the space of every call that has a rule, by name.
        weights: names of parameters whose dims are features.
        sequences: names of inputs whose dim 0 isn't the batch.
        ranks: as `find_roles` has it; None leaves out what attention says of its own loops.
    """
    of_dims: _Dims = {}
    for op in graph.ops:
        for index, tensor in enumerate(op.results):
            roles = _own_roles(op, len(tensor.shape), tensor.dtype, op.name in weights, has_batch=op.name not in sequences)
            of_dims[Value(op.name, index)] = tuple({1: role} for role in roles)
    calls = [(op, spaces[op.name]) for op in graph.ops if op.name in spaces]
    of_loops: _Loops = {op.name: {name: {} for name in space.loops} for op, space in calls}
    if ranks is not None:
        for op, space in calls:
            groups, queries = grouped_heads(space)
            if queries is not None and groups % ranks:
                of_loops[op.name][queries][1] = Role.FEATURE
            for name in _own_tokens(space):
                of_loops[op.name][name][1] = Role.SEQUENCE
    changed = True
    order = calls
    while changed:
        changed = False
        for op, space in order:
            changed |= _unify(op, space, of_dims, of_loops[op.name])
        order = order[::-1]
    return of_dims, of_loops


def _own_tokens(space: Space) -> tuple[str, ...]:
    """The loops of rows and keys of an attention that has as many of both, which are those of one sequence; none of other calls."""
    if space.family is not Family.ATTENTION:
        return ()
    rows, keys = space.operands[0][-2], space.operands[1][-2]
    return (*rows, *keys) if space.shape((rows,)) == space.shape((keys,)) else ()


def grouped_heads(space: Space) -> tuple[int, str | None]:
    """(number of groups, loop of the query heads in each group) of an attention with grouped queries; (1, None) of other calls.

    A single head of keys and values is one group, of all query heads.
    """
    heads = space.facts.loops_of(Meaning.HEADS)
    if not heads:
        return 1, None
    queries, keys = ([name for dim in dims for name in dim if name in heads] for dims in space.operands[:2])
    inner = [name for name in queries if name not in keys]
    groups = math.prod(space.loops[name].size for name in keys)
    return (groups, inner[0]) if inner else (1, None)


def _find_weights(graph: Graph, spaces: Mapping[str, Space]) -> set[str]:
    """Names of parameters whose dims are features: vectors, and what products, convolutions and lookups read.

    A product may read its second operand through views of a parameter, as in ``x @ weight.T``. Others may be added to activations, such
    as a table of positions: their dims get the roles of what they meet. Names of activations that products read are in the set too, where
    nobody asks for them.
    """
    weights = {op.name for op in graph.of_kind(OpKind.PARAMETER) if len(op.results[0].shape) == 1}
    second = set[str]()
    for op in reversed(graph.of_kind(OpKind.CALL)):  # readers before what they read
        if op.name in spaces and spaces[op.name].is_contraction:
            weights.update(value.op for value in op.operands)
            second.update(value.op for value in op.operands[1:])
        elif op.name in second and len(op.operands) == 1:
            weights.add(op.operands[0].op)
            second.add(op.operands[0].op)
    return weights


def _own_roles(op: Op, rank: int, dtype: str, is_weight: bool, *, has_batch: bool) -> list[Role]:
    """Per dim of a result with `rank` dims the role that it has of itself; dim 0 of an input with `has_batch` is the batch."""
    roles = [Role.FEATURE if op.kind is OpKind.PARAMETER and is_weight else Role.INNER] * rank
    if op.kind is OpKind.INPUT and rank:
        roles[0] = Role.BATCH if has_batch else Role.INNER
        if rank in (2, 3) and dtype in ("int64", "int32", "bool"):  # token ids, labels, padding masks
            roles[1] = Role.SEQUENCE
    return roles


def _unify(op: Op, space: Space, of_dims: dict[Value, tuple[Boundaries, ...]], loops: dict[str, Boundaries]) -> bool:
    """Carry the boundaries of an op's operands and results to its loops, and those of its loops to all of them; True on any change."""
    tensors = list(zip(op.operands, space.operands, strict=True))
    tensors += [(Value(op.name, index), dims) for index, dims in enumerate(space.results)]
    changed = False
    for value, dims in tensors:
        changed |= _carry(space, dims, of_dims[value], loops, into_loops=True)
    for value, dims in tensors:
        changed |= _carry(space, dims, of_dims[value], loops, into_loops=False)
    return changed


def _carry(space: Space, dims: Dims, bounds: tuple[Boundaries, ...], loops: dict[str, Boundaries], *, into_loops: bool) -> bool:
    """Carry boundaries between the dims of one tensor and the loops that they are made of; True on any change.

    A dim is an ordered product of loops. Boundary ``k`` of the dim is boundary ``k / outer`` of a loop, where ``outer`` is the product of
    the sizes of the loops before it in the dim.

    Args:
        space: of the op that reads or makes the tensor.
        dims: per dim of the tensor the names of its loops, outermost first.
        bounds: per dim its boundaries; changed in place, as `loops` is.
        loops: loop -> its boundaries.
        into_loops: from dims to loops; else from loops to dims.
    """
    changed = False
    for dim, of_dim in zip(dims, bounds, strict=True):
        outer = 1
        whole_role: Role | None = None  # of a loop that can't be split: the next loop inside of it gets it
        for name in dim:
            loop = space.loops[name]
            if loop.size > 1 and into_loops:
                for boundary, role in [*of_dim.items(), *([(outer, whole_role)] if whole_role is not None else [])]:
                    inner, rest = divmod(boundary, outer)
                    if rest == 0 and 1 <= inner < loop.size and loop.size % inner == 0:
                        changed |= _add_boundary(loops[name], inner, role)
                whole_role = loops[name].get(1) if loop.kind is LoopKind.WHOLE else None
            elif loop.size > 1:
                for boundary, role in list(loops[name].items()):
                    if outer == 1 or role is not Role.INNER:
                        changed |= _add_boundary(of_dim, boundary * outer, role)
            outer *= loop.size
    return changed


def _add_boundary(bounds: Boundaries, boundary: int, role: Role) -> bool:
    """Add a boundary if there is room for it, or raise its role if it is there; True if either was done."""
    if boundary not in bounds:
        if len(bounds) >= MAX_BOUNDARIES:
            return False
        bounds[boundary] = role
        return True
    if role > bounds[boundary]:
        bounds[boundary] = role
        return True
    return False
