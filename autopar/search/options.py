"""What may be decided: the legal placements of every op and layouts of every stored tensor, under the user's constraints."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase

from autopar.errors import InputError
from autopar.ir import (
    MICROBATCH,
    PASS_PARTIAL,
    REPLICATE,
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
from autopar.structure import Model, Role, first_rank_axis, role_of


class AxisKind(Enum):
    """What an axis may be used for: splits of the batch, features or the sequence, or any; TIME is that of micro-batches."""

    TIME = "time"
    FREE = "free"
    DP = "dp"
    TP = "tp"
    CP = "cp"


@dataclass(frozen=True, slots=True)
class Constraints:
    """What the user, or a named baseline, asks of a mesh.

    Attributes:
        kinds: per axis what it may do.
        pins: of which `fsdp`, `vocabulary`, `placements` and kinds of one rank are obeyed here; a baseline pins too.
        stored: layouts that parameters already have and keep (a second program over the same parameters).
        accept: a baseline's own rule: (op, axis, part) -> allowed.
    """

    kinds: tuple[AxisKind, ...]
    pins: Pins = NO_PINS
    stored: Mapping[str, Layout] = field(default_factory=dict)
    accept: Callable[[Op, Placement], bool] | None = None

    @property
    def barred(self) -> frozenset[AxisKind]:
        """Kinds that free axes may not be: a kind that is pinned to one rank is none at all, so what ranks are left over do is another."""
        return frozenset(AxisKind(name) for name, size in self.pins.axis_sizes.items() if size == 1 and not self.stored)


def call_options(model: Model, op: Op, mesh: Mesh, constraints: Constraints) -> list[Placement]:
    """The legal placements of a call, those that the constraints allow."""
    first = first_rank_axis(mesh)
    # What a micro-batch does isn't open: along time nothing can be exchanged, so one choice is as good as another.
    time: Placement = () if model.micro is None else (model.micro.placements[op.name],)
    replicated: Placement = (*time, *(None for _ in mesh.sizes[first:]))
    space = model.spaces.get(op.name)
    if space is None or op.name in model.tables:
        return [replicated]
    loops = model.factors.of_loops[op.name]
    parts: list[Split | object | None] = [None]
    splits = [(Split(loop.name, outer), role) for loop in space.splittable for outer, role in loops[loop.name].items()]
    parts += [split for split, role in splits if role is not Role.INNER] or [split for split, _ in splits]
    if space.linear:
        parts.append(PASS_PARTIAL)
    options = [(*time, *option) for option in itertools.product(parts, repeat=len(mesh.sizes) - first)]
    legal: list[Placement] = [option for option in options if is_legal(space, option, mesh)]  # type: ignore[misc, arg-type]
    for axis in range(len(constraints.kinds)):
        legal = _of_kind(legal, space, loops, axis, constraints)
    if constraints.pins.vocabulary is not None:
        legal = _of_vocabulary(legal, space, splits_vocabulary=constraints.pins.vocabulary)
    legal = _of_modules(legal, op, space, mesh, constraints.pins.placements)
    if constraints.accept is not None:
        accept = constraints.accept
        legal = [option for option in legal if accept(op, option)] or legal
    return legal


_ROLES = {AxisKind.DP: Role.BATCH, AxisKind.CP: Role.SEQUENCE, AxisKind.TP: Role.FEATURE}


def _of_kind(
    options: list[Placement], space: Space, loops: Mapping[str, Mapping[int, Role]], axis: int, constraints: Constraints
) -> list[Placement]:
    """Keep what an axis of this kind may do; a kind is really used wherever it can be."""
    kind = constraints.kinds[axis]
    if kind is AxisKind.TIME:
        return options

    def role(option: Placement) -> Role | None:
        part = option[axis]
        return role_of(loops, part) if isinstance(part, Split) else None

    if kind is AxisKind.FREE:
        roles = {_ROLES[barred] for barred in constraints.barred}
        return [option for option in options if role(option) not in roles] or options
    if kind is AxisKind.TP:
        allowed = [option for option in options if role(option) is not Role.BATCH]
        if space.is_contraction:
            # Between the blocks a tensor axis may split the sequence, as Megatron does; the work itself it splits by features.
            allowed = [option for option in allowed if role(option) is not Role.SEQUENCE]
            return [option for option in allowed if role(option) is Role.FEATURE] or allowed
        return allowed
    used = [option for option in options if role(option) is _ROLES[kind]]
    return used or [option for option in options if role(option) is None]


def _of_vocabulary(options: list[Placement], space: Space, *, splits_vocabulary: bool) -> list[Placement]:
    """Split, or keep whole, the vocabulary of lookups and losses."""
    vocabulary = space.facts.loops_of(Meaning.VOCABULARY)
    if not vocabulary:
        return options

    def splits(option: Placement) -> bool:
        return any(isinstance(part, Split) and part.loop in vocabulary for part in option)

    return [option for option in options if splits(option) == splits_vocabulary] or options


def _of_modules(options: list[Placement], op: Op, space: Space, mesh: Mesh, placements: Mapping[str, Mapping[str, str]]) -> list[Placement]:
    """Keep the placements that the user pinned for the op's module; InputError where an op has the loop but can't be split so."""
    for pattern, loops in placements.items():
        if not space.is_contraction or not is_inside(op.layer, pattern):
            continue
        for name, loop in loops.items():
            axis = mesh.names.index(name)
            pinned = [option for option in options if isinstance(p := option[axis], Split) and p.loop == loop]
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


def parameter_options(model: Model, op: Op, mesh: Mesh, constraints: Constraints) -> list[Layout]:
    """The layouts that a parameter may be stored in."""
    if op.target in constraints.stored:
        return [(*(REPLICATE,) * first_rank_axis(mesh), *constraints.stored[op.target])]
    tensor = op.results[0]
    states = [REPLICATE]
    for dim, bounds in enumerate(model.factors.of_dims[Value(op.name)]):
        states += [shard(dim, outer) for outer in bounds]
    layouts = _fitting(tensor, states, mesh)
    for axis, kind in enumerate(constraints.kinds):
        if kind is AxisKind.DP and constraints.pins.fsdp is not None:
            split = [x for x in layouts if (x[axis].kind is StateKind.SHARD) == constraints.pins.fsdp]
            layouts = split or layouts
        if kind is AxisKind.CP:
            layouts = [x for x in layouts if x[axis] == REPLICATE]
    return layouts


def output_options(tensor: Tensor, mesh: Mesh, time: State = REPLICATE) -> list[Layout]:
    """The layouts that an output may be handed over in: scalars whole, larger tensors as the search likes.

    Where time is an axis, `time` is what a micro-batch has of it; ranks split no more than that.
    """
    states = [REPLICATE, *(shard(dim) for dim in range(len(tensor.shape)))]
    options = _fitting(tensor, states, mesh)
    if time.kind is not StateKind.SHARD:
        return options
    return [option for option in options if fits(tensor.shape, (time, *option[1:]), mesh)]


def _fitting(tensor: Tensor, states: Sequence[State], mesh: Mesh) -> list[Layout]:
    """Layouts of these states, the whole one first; an axis of one rank splits nothing."""
    per_axis = [states if size > 1 and name != MICROBATCH else [REPLICATE] for name, size in zip(mesh.names, mesh.sizes, strict=True)]
    return [option for option in itertools.product(*per_axis) if fits(tensor.shape, option, mesh)]
