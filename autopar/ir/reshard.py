"""From the layout in which a tensor was made to the one in which it is needed: the one place where collectives are chosen.

Comes in: the layout that an op makes and the layout that its consumer needs. Goes out: a *journey*, the list of `ReshardStep`s from one to
the other. A step changes the state on one axis by one collective, and its backward does the dual for the gradient; `PAIRS` is the whole
table. Steps that shrink a rank's part come first and steps that grow it last, so that the fewest bytes are moved::

    S0,P -> S0,S1   reduce_scatter on axis 1                              (backward: all_gather)
    P,S0 -> S1,R    reduce_scatter on axis 0, then all_gather on axis 1   (backward: shard on axis 1, all_gather on axis 0)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from autopar.ir.layout import REPLICATE, Layout, Mesh, State, StateKind, fits, format_layout, local_outer, local_shape


class Collective(Enum):
    """What the ranks of an axis do with their parts; the value is the name of the function in `autopar.ops.collectives`."""

    NONE = "none"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_REDUCE = "all_reduce"
    ALL_TO_ALL = "all_to_all"
    SLICE = "shard"
    KEEP_FIRST = "keep_first"


S, R, B, P = StateKind.SHARD, StateKind.REPLICATE, StateKind.REPLICATE_PARTIAL_GRAD, StateKind.PARTIAL

# (producer's state, consumer's need) -> (what the value does, what its gradient does on the way back).
# A Shard or a Replicate value has a gradient of the same state; a Partial value's gradient is Replicate; a need of kind B returns
# a Partial gradient. Megatron's f is (R, B), its g is (P, R) (Shoeybi et al. 2019, section 3); with sequence parallelism they
# become (S, B) and (P, S) (Korthikanti et al. 2022, section 4.2.2).
PAIRS: Mapping[tuple[StateKind, StateKind], tuple[Collective, Collective]] = {
    (R, R): (Collective.NONE, Collective.NONE),
    (R, B): (Collective.NONE, Collective.ALL_REDUCE),
    (R, S): (Collective.SLICE, Collective.ALL_GATHER),
    (R, P): (Collective.KEEP_FIRST, Collective.NONE),
    (P, R): (Collective.ALL_REDUCE, Collective.NONE),
    (P, B): (Collective.ALL_REDUCE, Collective.ALL_REDUCE),
    (P, S): (Collective.REDUCE_SCATTER, Collective.ALL_GATHER),
    (P, P): (Collective.NONE, Collective.NONE),
    (S, R): (Collective.ALL_GATHER, Collective.SLICE),
    (S, B): (Collective.ALL_GATHER, Collective.REDUCE_SCATTER),
    (S, S): (Collective.ALL_TO_ALL, Collective.ALL_TO_ALL),
}

SHRINKS = frozenset({Collective.SLICE, Collective.REDUCE_SCATTER})
"""Collectives after which a rank has less of the tensor than before."""


@dataclass(frozen=True, slots=True)
class ReshardStep:
    """A change of a tensor's state on one axis by one collective.

    Attributes:
        axis: index of the mesh axis.
        forward, backward: the collective of the value, and that of its gradient on the way back.
        dim, outer: the dim that is gathered, scattered or sliced, and the number of its outer blocks in a rank's part
            (`layout.local_outer`); of an all-to-all the dim that becomes whole.
        to_dim, to_outer: likewise the dim that an all-to-all splits; -1 and 1 for other collectives.
        after: the axis' state after the step.
        shape_before, shape_after: sizes of a rank's part before and after the step.
        zigzag, to_zigzag: whether parts of `dim`, of `to_dim`, have two pieces of each of their blocks.
        padded: whether parts of unequal sizes are gathered, padded to the size of the largest.
    """

    axis: int
    forward: Collective
    backward: Collective
    dim: int
    outer: int
    to_dim: int
    to_outer: int
    after: State
    shape_before: tuple[int, ...]
    shape_after: tuple[int, ...]
    padded: bool = False
    zigzag: bool = False
    to_zigzag: bool = False


def journey(shape: tuple[int, ...], start: Layout, need: Layout, mesh: Mesh) -> tuple[ReshardStep, ...]:
    """The steps by which a tensor goes from one layout to another; empty when nothing has to change.

    Args:
        shape: global sizes of the tensor.
        start: the layout in which it was made: Shard, Replicate and Partial states.
        need: the layout in which it is needed; may have states of kind B too. Both layouts must fit the shape (`layout.fits`).
        mesh: the mesh whose axes the layouts are of.
    """
    return _journey(shape, start, need, mesh)


@dataclass(frozen=True, slots=True)
class RouteStep:
    """A `ReshardStep` without sizes. A rank's part is the tensor's bytes over the sizes of the axes that split it.

    Attributes:
        axis: index of the mesh axis.
        forward, backward: the collective of the value, and that of its gradient on the way back.
        split_before, split_after: indices of the mesh axes on which the tensor is a Shard before and after the step.
    """

    axis: int
    forward: Collective
    backward: Collective
    split_before: tuple[int, ...]
    split_after: tuple[int, ...]


Route = tuple[RouteStep, ...]
"""A journey without sizes, which can be priced for every tensor that makes it."""


def route(shape: tuple[int, ...], start: Layout, need: Layout, mesh: Mesh) -> Route:
    """The steps of `journey` without sizes, for use as a key: tensors and meshes of other sizes may have the same route."""
    current = list(start)
    steps = []
    for step in journey(shape, start, need, mesh):
        before = _splitting(current)
        current[step.axis] = step.after
        steps.append(RouteStep(step.axis, step.forward, step.backward, before, _splitting(current)))
    return tuple(steps)


def _splitting(layout: Sequence[State]) -> tuple[int, ...]:
    return tuple(axis for axis, state in enumerate(layout) if state.kind is S)


@lru_cache(maxsize=20_000)
def _journey(shape: tuple[int, ...], start: Layout, need: Layout, mesh: Mesh) -> tuple[ReshardStep, ...]:
    current = list(start)
    steps: list[ReshardStep] = []
    for _ in range(4 * len(current) + 1):
        if current == list(need):
            return tuple(steps)
        axis, target = _next_step(shape, tuple(current), need, mesh)
        steps.append(_step(shape, tuple(current), axis, target, mesh))
        current[axis] = target
    raise AssertionError(f"no journey from {format_layout(start)} to {format_layout(need)} for {shape} on {mesh}")


def _next_step(shape: tuple[int, ...], current: Layout, need: Layout, mesh: Mesh) -> tuple[int, State]:
    """The axis that changes its state next, and the new state.

    Steps that shrink a rank's part come first, since every later step then moves fewer bytes; then steps that keep its size, and last
    those that grow it, the innermost axis first.
    """
    candidates: list[tuple[int, int, State]] = []  # (priority: the lowest goes first, axis, its new state)
    for axis, (state, target) in enumerate(zip(current, need, strict=True)):
        if state == target or not _can_step(shape, current, need, axis, mesh):
            continue
        forward = PAIRS.get((state.kind, target.kind), (Collective.ALL_GATHER, Collective.SLICE))[0]
        if state.kind is S and target.kind is S and state.dim != target.dim and not state.padded:
            candidates.append((100 + axis, axis, target))
        elif state.kind is S and target.kind in (S, P):
            candidates.append((300 - axis, axis, REPLICATE))  # no single collective does it: gather, then slice or keep the first
        elif state.kind is S:
            candidates.append((300 - axis, axis, target))
        elif forward in SHRINKS:
            candidates.append((axis, axis, target))
        else:
            candidates.append((200 + axis, axis, target))
    if candidates:
        _, axis, target = min(candidates, key=lambda candidate: candidate[0])
        return axis, target
    # Axes nest on one dim in an order that no single step can change: gather the innermost that stands in the way of another.
    return max(_blockers(current, need)), REPLICATE


def _blockers(current: Layout, need: Layout) -> list[int]:
    """Axes to gather so that other axes can change: those that must change anyway, else those nested inside one that must."""
    moving = [axis for axis, (state, target) in enumerate(zip(current, need, strict=True)) if state != target]
    sharded = [axis for axis, state in enumerate(current) if state.kind is S and _is_innermost(current, axis)]

    def is_inside(axis: int, outer: int) -> bool:
        splits = (current[outer], need[outer])
        return outer < axis and any(_split_same_blocks(current[axis], split) for split in splits)

    inside = [axis for axis in sharded if any(is_inside(axis, outer) for outer in moving)]
    return [axis for axis in sharded if axis in moving] or inside


def _is_innermost(current: Layout, axis: int) -> bool:
    """Whether no axis further in splits the blocks that `axis` splits; only then can `axis` be gathered or exchanged."""
    return not any(_split_same_blocks(current[axis], inner) for inner in current[axis + 1 :])


def _split_same_blocks(state: State, other_state: State) -> bool:
    return other_state.kind is S and (state.dim, state.outer) == (other_state.dim, other_state.outer)


def _can_step(shape: tuple[int, ...], current: Layout, need: Layout, axis: int, mesh: Mesh) -> bool:
    """Whether `axis` can go to the state that is needed now, given how axes nest that split the same blocks of a dim."""
    state, target = current[axis], need[axis]
    if state.kind is S and not _is_innermost(current, axis):
        return False
    if target.kind is S and not (state.kind is S and state.dim == target.dim):
        # Splits of one block nest in mesh order: those further in come later, those further out must be there.
        if any(_split_same_blocks(target, inner) for inner in current[axis + 1 :]):
            return False
        outside = zip(current[:axis], need[:axis], strict=True)
        if any(now != goal and (_split_same_blocks(target, goal) or _split_same_blocks(target, now)) for now, goal in outside):
            return False
        return fits(shape, (*current[:axis], target, *current[axis + 1 :]), mesh)
    return True


def _step(shape: tuple[int, ...], current: Layout, axis: int, target: State, mesh: Mesh) -> ReshardStep:
    state = current[axis]
    after = (*current[:axis], target, *current[axis + 1 :])
    forward, backward = PAIRS[state.kind, target.kind]
    dim, outer, to_dim, to_outer = -1, 1, -1, 1
    zigzag = state.zigzag if state.kind is S else target.zigzag
    if state.kind is S:
        dim, outer = state.dim, local_outer(current, mesh, axis)
        if target.kind is S:
            to_dim, to_outer = target.dim, local_outer(after, mesh, axis)
    elif target.kind is S:
        dim, outer = target.dim, local_outer(after, mesh, axis)
    return ReshardStep(
        axis=axis,
        forward=forward,
        backward=backward,
        dim=dim,
        outer=outer,
        to_dim=to_dim,
        to_outer=to_outer,
        after=target,
        shape_before=local_shape(shape, current, mesh),
        shape_after=local_shape(shape, after, mesh),
        padded=state.padded,
        zigzag=zigzag,
        to_zigzag=state.kind is S and target.zigzag,
    )
