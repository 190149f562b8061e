"""The options of single decisions: legal placements of calls, layouts of parameters and outputs, under pins and kinds of axes.

Comes in: an `AnalyzedGraph`, a mesh, `Constraints`. Goes out: lists of placements and layouts, over all axes of the mesh. For example, a
linear layer ``m k, n k -> m n`` on a mesh of one axis may be run whole or be split by m, n or k; on an axis of kind DP only by m, if that
is the loop over the batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from fnmatch import fnmatchcase

from autopar.errors import InputError
from autopar.ir import (
    MICROBATCH,
    PASS_PARTIAL,
    REPLICATE,
    AxisPlacement,
    Family,
    Layout,
    Meaning,
    Mesh,
    Op,
    Placement,
    Space,
    Split,
    State,
    StateKind,
    Tensor,
    Value,
    fits,
    is_legal,
    shard,
)
from autopar.plans import NO_PINS, Pins
from autopar.structure import AnalyzedGraph, Role, first_rank_axis, role_of


class AxisKind(Enum):
    """What an axis of the mesh may split."""

    MICROBATCH = "micro-batches"
    FREE = "free"  # anything
    DP = "dp"  # the batch
    TP = "tp"  # features
    CP = "cp"  # the sequence


def kind_of(axis: str) -> AxisKind:
    """The kind of an axis by its name: ``dp``, ``tp`` and ``cp``, also with a number behind (``tp2``), have that kind, others are free."""
    name = axis.rstrip("0123456789")
    return AxisKind(name) if name in ("dp", "tp", "cp") else AxisKind.FREE


@dataclass(frozen=True, slots=True)
class Constraints:
    """What the user, or a named baseline, demands of decisions on a mesh.

    Attributes:
        kinds: per axis what it may split.
        pins: `fsdp` and `zero`, `vocabulary`, `placements` and axis sizes of 1 are obeyed here, other pins elsewhere.
        copies: axes of kind DP along which every rank stores the same: the groups of the pin `zero_group` are copies of each other.
        stored: layouts in which parameters are stored already, by name of the parameter (for a second program over the same parameters).
        baseline_filter: a baseline's own rule, whether a call may have a placement.
    """

    kinds: tuple[AxisKind, ...]
    pins: Pins = NO_PINS
    copies: frozenset[int] = frozenset()
    stored: Mapping[str, Layout] = field(default_factory=dict)
    baseline_filter: Callable[[Op, Placement], bool] | None = None

    def with_microbatches(self) -> Constraints:
        """The same on a mesh whose first axis is one of micro-batches, before those that this is about."""
        return replace(self, kinds=(AxisKind.MICROBATCH, *self.kinds), copies=frozenset(axis + 1 for axis in self.copies))

    @property
    def unused_kinds(self) -> frozenset[AxisKind]:
        """Kinds pinned to one rank, such as tp=1: free axes may not split what these would. None where parameters are stored already."""
        return frozenset(AxisKind(name) for name, size in self.pins.axis_sizes.items() if size == 1)


def zigzag_axes(model: AnalyzedGraph, constraints: Constraints) -> frozenset[int]:
    """The axes that may split the sequence zigzag (`State.zigzag`): those of kind CP, as free ones would have twice the options for it."""
    if constraints.pins.zigzag is False or not (constraints.pins.zigzag or model.balances_rows):
        return frozenset()
    return frozenset(axis for axis, kind in enumerate(constraints.kinds) if kind is AxisKind.CP)


def call_options(model: AnalyzedGraph, op: Op, mesh: Mesh, constraints: Constraints) -> list[Placement]:
    """The legal placements of a call that the constraints allow.

    A call without a rule, and one that makes a small constant table, has one placement: replicated.
    """
    first_axis = first_rank_axis(mesh)
    # How micro-batches split a call is no decision: the model says it (`structure.microbatches`).
    time: Placement = () if model.micro_split is None else (model.micro_split.placements[op.name],)
    replicated: Placement = (*time, *(None for _ in mesh.sizes[first_axis:]))
    space = model.spaces.get(op.name)
    if space is None or op.name in model.constants:
        return [replicated]
    loops = model.roles.of_loops[op.name]
    parts: list[AxisPlacement] = [None]
    splits = [(Split(loop.name, outer), role) for loop in space.splittable for outer, role in loops[loop.name].items()]
    parts += [split for split, role in splits if role is not Role.INNER] or [split for split, _ in splits]
    zigzags = [replace(split, zigzag=True) for split, role in splits if role is Role.SEQUENCE]
    if space.linear:
        parts.append(PASS_PARTIAL)
    balanced = zigzag_axes(model, constraints)
    # What an axis may not do is left out before combinations are made: there are many.
    per_axis = [
        [part for part in ([*parts, *zigzags] if axis in balanced else parts) if _may_do(constraints.kinds[axis], part, space, loops)]
        for axis in range(first_axis, len(mesh.sizes))
    ]
    options: list[Placement] = [(*time, *option) for option in itertools.product(*per_axis)]
    legal = [option for option in options if is_legal(space, option, mesh)]
    for axis in range(len(constraints.kinds)):
        legal = _of_kind(legal, space, loops, axis, constraints)
    if constraints.pins.vocabulary is not None:
        legal = _of_vocabulary(legal, space, splits_vocabulary=constraints.pins.vocabulary)
    if (constraints.pins.attention is not None or constraints.pins.zigzag) and space.family is Family.ATTENTION:
        legal = _of_attention(legal, op, space, mesh, loops, constraints)
    legal = _of_modules(legal, op, space, mesh, constraints.pins.placements)
    if constraints.baseline_filter is not None:
        accept = constraints.baseline_filter
        legal = [option for option in legal if accept(op, option)] or legal
    return legal


_ROLES = {AxisKind.DP: Role.BATCH, AxisKind.CP: Role.SEQUENCE, AxisKind.TP: Role.FEATURE}


def _may_do(kind: AxisKind, part: AxisPlacement, space: Space, loops: Mapping[str, Mapping[int, Role]]) -> bool:
    """Whether an axis of a kind may do this to a call: dp split the batch, cp the sequence, tp anything but the batch.

    Over cp an attention may split heads instead: an all-to-all before and after (Jacobs et al. 2023). Over tp, pointwise ops and norms may
    be split by the sequence (sequence parallelism, Korthikanti et al. 2022), contractions may not.
    """
    if not isinstance(part, Split) or kind is AxisKind.FREE:
        return True
    role = role_of(loops, part)
    if kind is AxisKind.TP:
        return role is not Role.BATCH and not (space.is_contraction and role is Role.SEQUENCE)
    is_head = kind is AxisKind.CP and space.family is Family.ATTENTION and part.loop in space.facts.loops_of(Meaning.HEADS)
    return role is _ROLES[kind] or is_head


def _of_kind(
    options: list[Placement], space: Space, loops: Mapping[str, Mapping[int, Role]], axis: int, constraints: Constraints
) -> list[Placement]:
    """Of placements in which an axis does what it may (`_may_do`), those in which it does what it must, where there are such.

    A dp or cp axis must split a call, a tp axis a contraction by features. A free axis must not split what kinds that are pinned to one
    rank would.
    """

    def role(option: Placement) -> Role | None:
        part = option[axis]
        return role_of(loops, part) if isinstance(part, Split) else None

    kind = constraints.kinds[axis]
    chosen = options
    if kind is AxisKind.FREE:
        roles = {_ROLES[unused_kinds] for unused_kinds in constraints.unused_kinds}
        chosen = [option for option in options if role(option) not in roles]
    elif kind is AxisKind.TP and space.is_contraction:
        chosen = [option for option in options if role(option) is Role.FEATURE]
    elif kind in (AxisKind.DP, AxisKind.CP):
        chosen = [option for option in options if isinstance(option[axis], Split)]
    return chosen or options


def _of_attention(
    options: list[Placement],
    op: Op,
    space: Space,
    mesh: Mesh,
    loops: Mapping[str, Mapping[int, Role]],
    constraints: Constraints,
) -> list[Placement]:
    """The placements of an attention that run as pinned over axes that split the sequence, or may split it.

    Where keys and values can't be passed around (`Facts.ring_refusal`), all of them: the plan has a note. Raises InputError where the heads
    can't be split as pinned.
    """
    heads = space.facts.loops_of(Meaning.HEADS)
    how = "ring" if constraints.pins.zigzag else constraints.pins.attention

    def is_allowed(option: Placement) -> bool:
        # Beside a zigzag ring another axis may split heads, unless a ring is pinned for all axes.
        is_zigzag = any(isinstance(part, Split) and part.zigzag for part in option)
        takes_heads = how in ("ulysses", None) or (constraints.pins.attention is None and is_zigzag)
        for part, kind in zip(option, constraints.kinds, strict=True):
            if not isinstance(part, Split):
                continue
            is_sequence = role_of(loops, part) is Role.SEQUENCE
            is_joined = bool(space.loops[part.loop].joins)
            if is_sequence and how is not None and (how == "ulysses" or is_joined != (how == "ring")):
                return False
            if is_joined and constraints.pins.zigzag and not part.zigzag:
                return False
            if kind is AxisKind.CP and part.loop in heads and not takes_heads:
                return False
        return True

    allowed = [option for option in options if is_allowed(option)]
    for axis, kind in enumerate(constraints.kinds):
        if how == "ulysses" and kind is AxisKind.CP and not any(isinstance(option[axis], Split) for option in allowed):
            sizes = " and ".join(f"{loop}={space.loops[loop].size}" for loop in sorted(heads))
            has = f"heads {sizes}" if sizes else "no loop of heads"
            where, wanted = f"{op.target} at {op.source or op.layer}", f"{mesh.names[axis]}={mesh.sizes[axis]}"
            axes = zip(mesh.names, mesh.sizes, constraints.kinds, strict=True)
            others = [f"{name}={ranks}" for name, ranks, other in axes if other is AxisKind.TP]
            beside = f" beside {' and '.join(others)}" if others else ""
            raise InputError(
                f"pin attention=ulysses splits heads over {wanted}{beside}, but {where} has {has};"
                " pin a size that divides the heads of keys and values, or attention=ring"
            )
    return allowed or options


def _of_vocabulary(options: list[Placement], space: Space, *, splits_vocabulary: bool) -> list[Placement]:
    """The placements that split, or that don't split, the vocabulary of a lookup or loss; all of them for other ops."""
    vocabulary = space.facts.loops_of(Meaning.VOCABULARY)
    if not vocabulary:
        return options

    def splits(option: Placement) -> bool:
        return any(isinstance(part, Split) and part.loop in vocabulary for part in option)

    return [option for option in options if splits(option) == splits_vocabulary] or options


def _of_modules(options: list[Placement], op: Op, space: Space, mesh: Mesh, placements: Mapping[str, Mapping[str, str]]) -> list[Placement]:
    """The placements of a contraction that the user pinned for its module; InputError if it has the loop but can't be split so."""
    for pattern, loops in placements.items():
        if not space.is_contraction or not is_inside(op.layer, pattern):
            continue
        for name, loop in loops.items():
            axis = mesh.names.index(name)
            pinned = [option for option in options if isinstance(part := option[axis], Split) and part.loop == loop]
            if not pinned and loop in space.loops:
                raise InputError(
                    f"pin {pattern!r} splits loop {loop} over {name}={mesh.sizes[axis]}, but {op.target} ({space}, {loop} has size "
                    f"{space.loops[loop].size}) at {op.source or op.layer} can't be split so beside the other pins; "
                    "pin a size that divides the loop, or another loop"
                )
            options = pinned or options
    return options


def is_inside(path: str, pattern: str) -> bool:
    """Whether the module at `path` is one that the glob `pattern` names, or is inside of one."""
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}.*")


def parameter_options(model: AnalyzedGraph, op: Op, mesh: Mesh, constraints: Constraints) -> list[Layout]:
    """The layouts that a parameter may be stored in: the one it is stored in already, or sharded and replicated ones as pinned.

    Along an axis of kind DP or CP every op needs it whole, and ZeRO stores it in parts: the ranks of both compute with different tokens.
    """
    if op.target in constraints.stored:
        return [(*(REPLICATE,) * first_rank_axis(mesh), *constraints.stored[op.target])]
    tensor = op.results[0]
    states = [REPLICATE]
    for dim, bounds in enumerate(model.roles.of_dims[Value(op.name)]):
        states += [shard(dim, outer) for outer in bounds]
    layouts = _fitting(tensor, states, mesh)
    pinned = constraints.pins.zero_level
    is_grouped = constraints.pins.zero_group is not None  # groups are of dp ranks alone
    # With micro-batches, level 1 holds whole gradients and sums them once, level 2 sums those of each; else 2 is 1 with less memory.
    held = (1, 2) if math.prod(mesh.sizes[: first_rank_axis(mesh)]) > 1 else (2,)
    for axis, kind in enumerate(constraints.kinds):
        whole = [layout for layout in layouts if layout[axis] == REPLICATE]
        if axis in constraints.copies or (kind is AxisKind.CP and is_grouped):
            layouts = whole
        elif kind in (AxisKind.DP, AxisKind.CP, AxisKind.FREE) and mesh.sizes[axis] > 1:
            if pinned != 0:
                layouts = layouts + _padded_layouts(tensor, layouts, axis, mesh)
            if kind is AxisKind.FREE:
                levels = held if pinned is None else ()
                layouts = layouts + [layout for level in levels for layout in _split_layouts(layouts, axis, level)]
            elif pinned is None:
                layouts = [*whole, *(layout for level in (3, *held) for layout in _split_layouts(layouts, axis, level))]
            else:
                layouts = (_split_layouts(layouts, axis, pinned) if pinned else whole) or whole or layouts
    return layouts


def _padded_layouts(tensor: Tensor, layouts: Sequence[Layout], axis: int, mesh: Mesh) -> list[Layout]:
    """The layouts that store a parameter of which no dim divides in unequal parts over an axis, along a dim that no other axis splits.

    It is the first dim with a row for every rank, whose parts need not be copied when they are joined, or else the largest dim.
    """
    ranks = mesh.sizes[axis]
    if ranks == 1 or any(layout[axis].kind is StateKind.SHARD for layout in layouts):
        return []
    dims = sorted(range(len(tensor.shape)), key=lambda dim: (-min(tensor.shape[dim], ranks), dim))
    padded = []
    for layout in layouts:
        tried = ((*layout[:axis], shard(dim, padded=True), *layout[axis + 1 :]) for dim in dims)
        padded += list(itertools.islice((one for one in tried if fits(tensor.shape, one, mesh)), 1))
    return padded


def _split_layouts(layouts: Sequence[Layout], axis: int, level: int) -> list[Layout]:
    """The layouts that store a parameter split over an axis along which all ops need it whole, by a ZeRO level.

    By which dim it is split makes no difference to what is sent, so of all dims one is enough: the first that no other axis splits. At
    level 3 several axes may split one dim, where there is no other.
    """
    found: dict[Layout, Layout] = {}

    def is_shared(layout: Layout) -> bool:
        return any(place != axis and state.kind is StateKind.SHARD and state.dim == layout[axis].dim for place, state in enumerate(layout))

    for layout in sorted(layouts, key=lambda layout: (is_shared(layout), layout[axis].dim, layout[axis].outer)):
        state, others = layout[axis], (*layout[:axis], *layout[axis + 1 :])
        if state.kind is not StateKind.SHARD:
            continue
        if level == 3:
            found.setdefault(others, layout)
        elif state.outer == 1 and not is_shared(layout) and not any(other.level for other in others):
            found.setdefault(others, (*layout[:axis], replace(state, level=level), *layout[axis + 1 :]))
    return list(found.values())


def output_options(tensor: Tensor, mesh: Mesh, time: State = REPLICATE, zigzag: Collection[int] = ()) -> list[Layout]:
    """The layouts in which an output may be returned: replicated, or with any of its dims sharded.

    Args:
        tensor: the output, of the whole batch.
        mesh: the mesh; its first axis may be that of micro-batches.
        time: the output's state along the axis of micro-batches. If that is a shard, ranks shard only what one micro-batch has.
        zigzag: axes that may also split it zigzag.
    """
    states = [REPLICATE, *(shard(dim) for dim in range(len(tensor.shape)))]
    options = _fitting(tensor, states, mesh)
    for axis in zigzag:
        folded = [
            (*option[:axis], replace(option[axis], zigzag=True), *option[axis + 1 :]) for option in options if option[axis] != REPLICATE
        ]
        options += [option for option in folded if fits(tensor.shape, option, mesh)]
    if time.kind is not StateKind.SHARD:
        return options
    return [option for option in options if fits(tensor.shape, (time, *option[1:]), mesh)]


def _fitting(tensor: Tensor, states: Sequence[State], mesh: Mesh) -> list[Layout]:
    """The legal layouts with one of these states on each axis of more than one rank, in the order of `states`."""
    per_axis = [states if size > 1 and name != MICROBATCH else [REPLICATE] for name, size in zip(mesh.names, mesh.sizes, strict=True)]
    return [option for option in itertools.product(*per_axis) if fits(tensor.shape, option, mesh)]
