"""Meshes, placements and layouts: what splitting the loops of an op means for each of its tensors.

An *axis* belongs to the mesh, a *dim* to a tensor, a *loop* to an op's iteration space. Comes in: an op's `Space` and a `Placement`, which
says per mesh axis which loop of the op it splits. Goes out: a `Layout` of each of the op's tensors, which says per mesh axis what a rank
has of it, and whether the sizes allow that.

The states of a tensor on one axis, with their text forms:

- Shard (``S1``, ``S0/3``): ``S1`` splits dim 1 into equal parts; ``S0/3`` splits dim 0 inside each of its 3 equal outer blocks, the
  strided shard that a fused weight ``(three heads head_dim)`` needs. The gradient is sharded alike. On two ranks, a dim of 12::

      S0     rank 0: 0 1 2 3 4 5                     rank 1: 6 7 8 9 10 11
      S0/3   rank 0: 0 1     4 5     8 9             rank 1: 2 3     6 7     10 11

  ``S0~`` splits zigzag: each rank has two pieces, the i-th from the front and the i-th from the end, so that ranks have equal work where
  later elements are more of it, as rows under a causal mask are. No parameter, input or output is stored so::

      S0~    rank 0: 0 1 2             9 10 11       rank 1: 3 4 5 6 7 8

  A parameter that is stored split and needed whole is gathered at each use (ZeRO-3). ``S1z1`` and ``S1z2`` are the lower ZeRO levels
  (Rajbhandari et al. 2020): it is stored in the same parts, and so are gradient and optimizer state, but a program is given it whole,
  as ``R`` (`program_layout`). With ``z1`` a rank's gradients are kept whole until they are summed, with ``z2`` every backward leaves
  each rank its part of the sum. A parameter of which no dim divides is stored padded, ``S0p``: on n ranks of an axis, rank i has the i-th
  n-th of the rows that a multiple of n would be, without those that aren't there, as ``torch.chunk`` cuts it::

      S0p    a dim of 5 on three ranks: 0 1          2 3          4

- Replicate (``R``): every rank has the whole tensor, and its gradient is whole on every rank.
- Replicate with a partial gradient (``B``), only as what a consumer needs: every rank has the whole tensor but computes a part of what
  follows, so that its gradient is Partial. This is what data parallelism needs of a weight.
- Partial (``P``): every rank has a summand, the tensor is the sum over the axis. Its gradient is whole on every rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from autopar.ir.space import Dims, LoopKind, Space


@dataclass(frozen=True, slots=True)
class Mesh:
    """Named axes and their sizes. The first axis is the outermost, whose neighbours are farthest apart; ranks are row-major indices.

    Raises ValueError on construction when names and sizes differ in number or a name is there twice.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.sizes) or len(set(self.names)) != len(self.names):
            raise ValueError(f"axes {self.names} and sizes {self.sizes} don't match")

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return math.prod(self.sizes)

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """Position of `rank` on each axis."""
        position = []
        for size in reversed(self.sizes):
            position.append(rank % size)
            rank //= size
        return tuple(reversed(position))

    def __str__(self) -> str:
        return " x ".join(f"{name}={size}" for name, size in zip(self.names, self.sizes, strict=True))


PIPELINE = "pp"
"""Name of the axis of pipeline ranks, each of which runs some stages on a mesh of its own; no placement splits anything over it."""

MICROBATCH = "micro"
"""Name of the axis of micro-batches, the outermost of a mesh. Its parts are computed one after the other by the same ranks, so what is
split over it can never be exchanged."""

HALVES = ("half_0", "half_1")
"""Names of the axis of micro-batches as the two halves of a batch see it that take turns in one program."""

MESSAGE_NBYTES = 2**20
"""From this many bytes on, a whole parameter of ZeRO levels 1 and 2, or its gradient, is a message of its own: sending it takes longer than
beginning to."""


def with_pipeline(mesh: Mesh, ranks: int) -> Mesh:
    """The mesh of the whole world: `ranks` pipeline ranks along the outermost axis ``pp``, each of which is a `mesh` of devices.

    A plan's mesh is the one that each pipeline rank runs; with a single pipeline rank that is the whole world.

    >>> str(with_pipeline(Mesh(("dp", "tp"), (2, 4)), 3))
    'pp=3 x dp=2 x tp=4'
    """
    return Mesh((PIPELINE, *mesh.names), (ranks, *mesh.sizes)) if ranks > 1 else mesh


def format_sizes(sizes: Mapping[str, object]) -> str:
    """Sizes of axes by name as options and pins take them.

    >>> format_sizes({"dp": 2, "tp": 4})
    'dp=2,tp=4'
    """
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def format_mesh(mesh: Mesh) -> str:
    """The axes of more than one rank, as text for people.

    >>> format_mesh(Mesh(("dp", "tp"), (1, 4))), format_mesh(Mesh(("dp",), (1,)))
    ('tp=4', 'one rank')
    """
    return " x ".join(f"{name}={size}" for name, size in zip(mesh.names, mesh.sizes, strict=True) if size > 1) or "one rank"


class StateKind(StrEnum):
    """What a rank has of a tensor, along one axis; the module's docstring says what each means for the gradient."""

    SHARD = "S"
    REPLICATE = "R"
    REPLICATE_PARTIAL_GRAD = "B"
    PARTIAL = "P"


@dataclass(frozen=True, slots=True)
class State:
    """What a rank has of a tensor along one axis.

    Attributes:
        kind: the kind of state.
        dim: of a Shard, the dim that is split.
        outer: of a Shard, the number of equal outer blocks of the dim.
        level: of a parameter that is stored split and given whole to programs, its ZeRO level, 1 or 2; else 0.
        padded: of a parameter that is stored split, whether the parts are unequal: they are padded when they are gathered.
        zigzag: of an activation, whether a rank has two pieces of each block, the i-th from the front and the i-th from the end.
    """

    kind: StateKind
    dim: int = -1
    outer: int = 1
    level: int = 0
    padded: bool = False
    zigzag: bool = False

    def __str__(self) -> str:
        if self.kind is not StateKind.SHARD:
            return self.kind.value
        text = f"S{self.dim}" if self.outer == 1 else f"S{self.dim}/{self.outer}"
        text = f"{text}~" if self.zigzag else text
        text = f"{text}p" if self.padded else text
        return f"{text}z{self.level}" if self.level else text


REPLICATE = State(StateKind.REPLICATE)
REPLICATE_PARTIAL_GRAD = State(StateKind.REPLICATE_PARTIAL_GRAD)
PARTIAL = State(StateKind.PARTIAL)


def shard(dim: int, outer: int = 1, level: int = 0, *, padded: bool = False, zigzag: bool = False) -> State:
    """The Shard state that splits `dim` inside each of its `outer` equal blocks; `level`, `padded`, `zigzag` are as in `State`."""
    return State(StateKind.SHARD, dim, outer, level, padded, zigzag)


Layout = tuple[State, ...]
"""What every rank has of a tensor: a state per mesh axis, in the mesh's order."""

_STATE = re.compile(r"^(?:S(\d+)(?:/(\d+))?(~)?(p)?(?:z([12]))?|([RBP]))$")


def parse_layout(text: str) -> Layout:
    """Read ``S0/3,R`` back. Raises ValueError on anything else."""
    layout = []
    for state_text in text.split(",") if text else []:
        match = _STATE.match(state_text.strip())
        if match is None:
            raise ValueError(f"{state_text!r} is no state of a layout (S<dim>, S<dim>/<outer>, either with ~, p, z1 or z2, R, B or P)")
        dim, outer, zigzag, padded, level, kind = match.groups()
        numbers = () if kind else (int(dim), int(outer or 1), int(level or 0))
        layout.append(State(StateKind(kind)) if kind else shard(*numbers, padded=bool(padded), zigzag=bool(zigzag)))
    return tuple(layout)


def format_layout(layout: Layout) -> str:
    """Text of a layout, ``S0/3,R``."""
    return ",".join(map(str, layout))


def program_layout(layout: Layout) -> Layout:
    """The layout in which a program is given a parameter that is stored in `layout`.

    >>> format_layout(program_layout(parse_layout("S0z2,S1")))
    'R,S1'
    """
    return tuple(REPLICATE if state.level else state for state in layout)


@dataclass(frozen=True, slots=True)
class Split:
    """One axis splits the op's loop called `loop`, inside each of the loop's `outer` equal blocks; `zigzag` is as in `State`."""

    loop: str
    outer: int = 1
    zigzag: bool = False

    def __str__(self) -> str:
        text = self.loop if self.outer == 1 else f"{self.loop}/{self.outer}"
        return f"{text}~" if self.zigzag else text


@dataclass(frozen=True, slots=True)
class PassPartial:
    """One axis on which a linear op computes with Partial operands and gives Partial results, without communication."""

    def __str__(self) -> str:
        return "+"


PASS_PARTIAL = PassPartial()

AxisPlacement = Split | PassPartial | None
"""What one mesh axis does to an op: split a loop, pass Partial sums through, or nothing (every rank of the axis runs all of it)."""

Placement = tuple[AxisPlacement, ...]
"""How an op is spread over the mesh: an entry per mesh axis, in the mesh's order."""


def format_placement(placement: Placement) -> str:
    """Text of a placement, ``b,o/3``; ``-`` where the op is replicated."""
    return ",".join("-" if entry is None else str(entry) for entry in placement)


_SPLIT = re.compile(r"^([A-Za-z_]\w*)(?:/(\d+))?(~)?$")


def parse_placement(text: str) -> Placement:
    """Read ``b,o/3`` back. Raises ValueError on anything else."""
    placement: list[AxisPlacement] = []
    for entry in text.split(",") if text else []:
        match = _SPLIT.match(entry.strip())
        if entry.strip() == "-":
            placement.append(None)
        elif entry.strip() == "+":
            placement.append(PASS_PARTIAL)
        elif match is not None:
            placement.append(Split(match[1], int(match[2] or 1), bool(match[3])))
        else:
            raise ValueError(f"{entry!r} is no part of a placement (a loop, loop/outer, either with ~, + or -)")
    return tuple(placement)


def operand_layout(space: Space, placement: Placement, index: int) -> Layout:
    """The layout in which the op needs operand `index` when it is placed so.

    >>> from autopar.ir.space import parse
    >>> linear = parse("b i, o i -> b o", [(8, 4), (6, 4)], [(8, 6)])
    >>> [format_layout(operand_layout(linear, parse_placement("b,i"), index)) for index in range(2)]
    ['S0,S1', 'B,S1']
    """
    return tuple(_operand_state(space, axis_placement, index) for axis_placement in placement)


def result_layout(space: Space, placement: Placement, index: int) -> Layout:
    """The layout in which the op makes result `index` when it is placed so; the linear layer above makes ``S0,P``."""
    return tuple(_result_state(space, axis_placement, space.results[index]) for axis_placement in placement)


def _operand_state(space: Space, axis_placement: AxisPlacement, index: int) -> State:
    if axis_placement is None:
        return REPLICATE
    if isinstance(axis_placement, PassPartial):
        return PARTIAL if index in space.linear else REPLICATE_PARTIAL_GRAD
    if index in space.added and space.loops[axis_placement.loop].kind is LoopKind.SUM:
        return PARTIAL
    return _split_state(space, axis_placement, space.operands[index]) or REPLICATE_PARTIAL_GRAD


def _result_state(space: Space, axis_placement: AxisPlacement, dims: Dims) -> State:
    if axis_placement is None:
        return REPLICATE
    if isinstance(axis_placement, PassPartial):
        return PARTIAL
    # A kernel makes results that lack its KERNEL loop complete on every rank. Rules must not leave a FREE loop out of one of several
    # results: each rank would make another value of it, and only a SUM loop says that these add up.
    without_the_loop = PARTIAL if space.loops[axis_placement.loop].kind is LoopKind.SUM else REPLICATE
    return _split_state(space, axis_placement, dims) or without_the_loop


def _split_state(space: Space, split: Split, dims: Dims) -> State | None:
    """The Shard state of a tensor with these dims when its op is split so; None when the tensor doesn't run over the loop."""
    place = space.find(dims, split.loop)
    if place is None:
        return None
    dim, outer = place
    return shard(dim, outer * split.outer, zigzag=split.zigzag)


def fits(shape: tuple[int, ...], layout: Layout, mesh: Mesh) -> bool:
    """Whether a tensor of sizes `shape` can be split by `layout` into parts of equal size, but for states that are padded.

    Where two axes split one dim at different numbers of outer blocks, neither cuts through the other's blocks. A dim that is padded is
    split by one axis alone.
    """
    shards = [(state, size) for state, size in zip(layout, mesh.sizes, strict=True) if state.kind is StateKind.SHARD]
    for state, _ in shards:
        if state.dim >= len(shape):
            return False
        same_dim = [(neighbour, size) for neighbour, size in shards if neighbour.dim == state.dim]
        if state.padded:
            if len(same_dim) > 1 or state.outer > 1 or not shape[state.dim]:
                return False
            continue
        # Everything split at this boundary must divide one block; coarser boundaries must be split on whole finer blocks.
        ways = math.prod(size * (1 + neighbour.zigzag) for neighbour, size in same_dim if neighbour.outer == state.outer)
        if shape[state.dim] % state.outer or (shape[state.dim] // state.outer) % ways:
            return False
        for neighbour, _ in same_dim:
            if neighbour.outer > state.outer and neighbour.outer % (state.outer * ways):
                return False
    return True


def local_shape(shape: tuple[int, ...], layout: Layout, mesh: Mesh) -> tuple[int, ...]:
    """Sizes of a rank's part of a tensor of sizes `shape`: the same on every rank (see `fits`); where it is padded, those of the first."""
    local = list(shape)
    for state, size in zip(layout, mesh.sizes, strict=True):
        if state.kind is StateKind.SHARD:
            local[state.dim] = -(-local[state.dim] // size)
    return tuple(local)


def local_outer(layout: Layout, mesh: Mesh, axis: int) -> int:
    """Number of outer blocks inside which axis `axis` splits a rank's part of a tensor.

    It is the state's own `outer`, divided by the sizes of the axes that split the same dim further out. Collectives work on a rank's part,
    so this is the number that they are given.

    >>> local_outer(parse_layout("S0,S0/4"), Mesh(("dp", "tp"), (2, 2)), 1)
    2
    """
    state = layout[axis]
    outer = state.outer
    for neighbour, size in zip(layout, mesh.sizes, strict=True):
        if neighbour.kind is StateKind.SHARD and neighbour.dim == state.dim and neighbour.outer < state.outer:
            outer //= size
    return outer


def outer_when_cut(layout: Layout, mesh: Mesh, axis: int) -> int:
    """The `local_outer` with which a whole tensor is cut along `axis` when axes are cut in the mesh's order, the later ones not yet."""
    return local_outer((*layout[: axis + 1], *(REPLICATE for _ in layout[axis + 1 :])), mesh, axis)


def is_legal(space: Space, placement: Placement, mesh: Mesh) -> bool:
    """Whether an op can be placed so: every loop may be split in that way, and every operand and result splits evenly (see `fits`)."""
    for axis_placement, size in zip(placement, mesh.sizes, strict=True):
        if size == 1 and axis_placement is not None:
            return False
        if isinstance(axis_placement, PassPartial) and not space.linear:
            return False
        if isinstance(axis_placement, Split):
            loop = space.loops[axis_placement.loop]
            if loop.kind is LoopKind.WHOLE or loop.size % axis_placement.outer:
                return False
            if axis_placement.loop in space.positional and (axis_placement.outer > 1 or (axis_placement.zigzag and not loop.joins)):
                return False
    splits = [(entry, size) for entry, size in zip(placement, mesh.sizes, strict=True) if isinstance(entry, Split)]
    for split, _ in splits:
        alone = (split.loop, *space.loops[split.loop].joins) if split.loop in space.along_one_axis else ()
        if sum(other_split.loop in alone for other_split, _ in splits) > 1:
            return False
        ways = math.prod(size for other_split, size in splits if other_split == split)
        if (space.loops[split.loop].size // split.outer) % ways:
            return False
    # SUM with Partial pass-through on another axis is fine; shapes decide the rest.
    tensors = [(dims, operand_layout(space, placement, index)) for index, dims in enumerate(space.operands)]
    tensors += [(dims, result_layout(space, placement, index)) for index, dims in enumerate(space.results)]
    return all(fits(space.shape(dims), layout, mesh) for dims, layout in tensors)
