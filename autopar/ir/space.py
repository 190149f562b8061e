"""The iteration space of an op: its named loops, and which dims of which tensors each loop runs over.

Comes in: the text by which a rule states an op, and the sizes of the op's tensors. Goes out: a `Space`. The one idea: an op is a nest of
loops, and to parallelize it is to split loops. What that means for each tensor follows from where its dims have the loop.

The text lists operands, ``->``, then results, with a token per dim: ``b s i, o i, o -> b s o`` is a linear layer with bias.

- ``(t h d)`` is a dim that is an ordered product of loops, the outermost first: a merged or split view, a fused weight.
- ``1`` is a dim of size one, which no loop runs over.
- ``x!`` is a loop that must stay whole, such as the dim that a softmax normalises.
- ``v*`` is a loop that can be split only by replacing the op with a kernel that communicates (`autopar.ops.kernels`), such as the batch
  loop of a batch norm. A result that lacks the loop is complete on every rank.
- A loop without a mark that no result has is summed, such as ``i`` above. Where it is split, each rank has a Partial result.

Two loops may be *joined* under a further name: splitting that name splits both at once, and the kernel brings what a rank lacks. Ring
attention splits its rows ``s`` and its keys ``t`` so.

The notation follows einops and Shardy's sharding rules. Meshes, costs and torch are unknown here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from autopar.ir.facts import Facts, Family

Dims = tuple[tuple[str, ...], ...]
"""Per dim the names of its loops, outermost first; an empty tuple is a dim of size one."""


class LoopKind(Enum):
    """What splitting a loop over ranks means."""

    FREE = "free"  # each rank computes its part of the results, without communication
    SUM = "sum"  # each rank computes a summand of the results, which are Partial
    KERNEL = "kernel"  # a kernel that communicates replaces the op; results that lack the loop are complete on every rank
    WHOLE = "whole"  # can't be split


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop of `size` iterations.

    Attributes:
        joins: loops of this size that are split together where this name is split; it is no further loop of the nest.
    """

    name: str
    size: int
    kind: LoopKind = LoopKind.FREE
    joins: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Space:
    """The loops of one op, which of its tensors run over them, and what else must be known to split it.

    Raises ValueError on construction when a tensor runs over a loop twice, when KERNEL loops and the kernel don't fit together, or when the
    facts name a loop that isn't there.

    Attributes:
        loops: every loop, by name.
        operands, results: per tensor, per dim, the names of the dim's loops, outermost first.
        flops: floating-point operations of the forward per point of the iteration space; the op's work is ``flops * points()``.
        family: products, attention and lookups hold a model's work; all else is pointwise.
        kernel: name of the function in `autopar.ops.kernels` that replaces the op when a loop in `kernel_loops` is split; None where no
            split needs one, and for ops that draw random numbers and whose parts are the op itself (`autopar.ops.kernels.draw` runs them).
        kernel_loops: loops whose split needs the kernel; every KERNEL loop is among them.
        added: indices of operands that are added once to a sum, such as a bias: when a SUM loop is split they must be Partial, so that
            the sum over the ranks holds them once.
        linear: indices of operands in which the op is jointly linear. When all of them are Partial the results are Partial too and
            nothing is communicated. Empty when the op isn't linear.
        shape_arg: position in `Op.args` of the result's sizes (``view``, ``expand``); a program replaces them by a rank's own sizes.
        view: the op copies nothing, its result shares storage with operand 0.
        positional: loops whose kernel must know which part of the loop a rank has (rows of a causal mask, ranges of a vocabulary); they
            can be split at the outermost boundary only, never inside outer blocks.
        random: the op draws random numbers; the kernel replaces it in every parallel program, split or not, so that replicas
            draw the same numbers and shards different ones.
        facts: what must be known of the op beside its loops.
        splittable: the loops that may be split: those that aren't WHOLE and have more than one iteration.
        along_one_axis: loops that a single axis of the mesh may split, because their kernel sends from neighbour to neighbour.
    """

    loops: Mapping[str, Loop]
    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    flops: float = 0.0
    family: Family = Family.POINTWISE
    kernel: str | None = None
    kernel_loops: frozenset[str] = frozenset()
    added: frozenset[int] = frozenset()
    linear: frozenset[int] = frozenset()
    shape_arg: int | None = None
    view: bool = False
    positional: frozenset[str] = frozenset()
    random: bool = False
    facts: Facts = field(default_factory=Facts)
    splittable: tuple[Loop, ...] = field(init=False, compare=False, repr=False)
    along_one_axis: frozenset[str] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        for dims in (*self.operands, *self.results):
            names = [name for dim in dims for name in dim]
            if len(set(names)) != len(names):
                raise ValueError(f"a tensor runs twice over one loop: {format_dims(dims)}")
        if any(loop.kind is LoopKind.KERNEL and loop.name not in self.kernel_loops for loop in self.loops.values()):
            raise ValueError("every KERNEL loop must be named in kernel_loops")
        if self.kernel_loops and self.kernel is None and not self.random:
            raise ValueError("kernel_loops are given but no kernel")
        if unknown := _loops_of(self.facts) - self.loops.keys():
            raise ValueError(f"facts name loops {', '.join(sorted(unknown))}, which the op doesn't have")
        splittable = tuple(loop for loop in self.loops.values() if loop.kind is not LoopKind.WHOLE and loop.size > 1)
        object.__setattr__(self, "splittable", splittable)
        along_one_axis = (exchange.split for exchange in self.facts.exchanges if exchange.is_between_neighbours)
        object.__setattr__(self, "along_one_axis", frozenset[str]().union(*along_one_axis))

    @property
    def is_contraction(self) -> bool:
        """Whether the op is one of those that hold a model's work and its weights: products, attention, lookups."""
        return self.family is not Family.POINTWISE

    @property
    def is_product(self) -> bool:
        """Whether the op is a product or an attention: one of those that compute most."""
        return self.family in (Family.MATMUL, Family.ATTENTION)

    def points(self) -> int:
        """Iterations of the whole space."""
        return math.prod(loop.size for loop in self.loops.values() if not loop.joins)

    def shape(self, dims: Dims) -> tuple[int, ...]:
        """Sizes of a tensor with these dims."""
        return tuple(math.prod(self.loops[name].size for name in dim) for dim in dims)

    def find(self, dims: Dims, loop: str) -> tuple[int, int] | None:
        """Where `loop` is in a tensor: (dim, product of the sizes of the loops before it in that dim), or None when it isn't there.

        >>> space = parse("b (h d) -> b h d", [(2, 12)], [(2, 3, 4)])
        >>> space.find(space.operands[0], "d"), space.find(space.results[0], "d")
        ((1, 3), (2, 1))
        """
        names = self.loops[loop].joins or (loop,) if loop in self.loops else ()
        for position, dim in enumerate(dims):
            for name in names:
                if name in dim:
                    return position, math.prod(self.loops[outer].size for outer in dim[: dim.index(name)])
        return None

    def __str__(self) -> str:
        marks = {LoopKind.WHOLE: "!", LoopKind.KERNEL: "*"}
        text = f"{', '.join(map(format_dims, self.operands))} -> {', '.join(map(format_dims, self.results))}"
        for loop in self.loops.values():
            if loop.kind in marks:
                text = re.sub(rf"\b{re.escape(loop.name)}\b", loop.name + marks[loop.kind], text)
        return text


def _loops_of(facts: Facts) -> set[str]:
    """All loops that `facts` name."""
    exchanged = (name for exchange in facts.exchanges for name in (*exchange.split, *exchange.loops))
    worked = () if facts.workspace is None else facts.workspace.loops
    return {*facts.coupled, *facts.meanings, *exchanged, *worked}


def format_dims(dims: Dims) -> str:
    """Text of a tensor's dims, ``b (h d) 1``."""
    return " ".join("1" if not dim else dim[0] if len(dim) == 1 else f"({' '.join(dim)})" for dim in dims)


_TOKEN = re.compile(r"\(([^()]*)\)|(\S+)")


def parse(
    text: str,
    operands: Sequence[tuple[int, ...]],
    results: Sequence[tuple[int, ...]],
    *,
    sizes: Mapping[str, int] | None = None,
    flops: float = 0.0,
    family: Family = Family.POINTWISE,
    kernel: str | None = None,
    kernel_loops: Iterable[str] = (),
    added: Iterable[int] = (),
    linear: Iterable[int] = (),
    shape_arg: int | None = None,
    view: bool = False,
    positional: Iterable[str] = (),
    random: bool = False,
    facts: Facts | None = None,
    joined: Mapping[str, tuple[str, ...]] | None = None,
) -> Space:
    """The `Space` that `text` states for tensors of these shapes.

    >>> print(parse("b s i, o i -> b s o", [(2, 3, 4), (5, 4)], [(2, 3, 5)]))
    b s i, o i -> b s o

    Args:
        text: the op in the notation of this module.
        operands: the shape of each operand.
        results: the shape of each result.
        sizes: loop name -> size, for loops that occur only inside groups such as ``(t h d)``, whose sizes the shapes don't tell. A name
            that no tensor has becomes a WHOLE loop, which counts in the op's work.
        flops: floating-point operations per point, as in `Space`.
        family: the kind of work.
        kernel: name of the kernel that may replace the op.
        kernel_loops: loops whose split needs the kernel, beside those marked ``*``.
        added: indices of operands that are added once.
        linear: indices of operands in which the op is jointly linear.
        shape_arg: position of the result's sizes among the arguments.
        view: whether the op copies nothing.
        positional: loops whose kernel must know its part.
        random: whether the op draws random numbers.
        facts: what must be known of the op beside its loops.
        joined: name -> loops of one size that a split of the name splits together.

    Raises ValueError when the text and the shapes disagree.
    """
    left, _, right = text.partition("->")
    marks: dict[str, LoopKind] = {}
    operand_dims = tuple(_parse_dims(tensor_text, marks) for tensor_text in _tensors(left, len(operands)))
    result_dims = tuple(_parse_dims(tensor_text, marks) for tensor_text in _tensors(right, len(results)))
    known = dict(sizes or {})
    tensors = list(zip(operand_dims, operands, strict=True)) + list(zip(result_dims, results, strict=True))
    for dims, shape in tensors:
        if len(dims) != len(shape):
            raise ValueError(f"{format_dims(dims)!r} has {len(dims)} dims, the tensor has shape {shape}")
        for dim, size in zip(dims, shape, strict=True):
            if len(dim) == 1:
                known.setdefault(dim[0], size)
    for dims, shape in tensors:
        for dim, size in zip(dims, shape, strict=True):
            if math.prod(known[name] for name in dim) != size:
                raise ValueError(f"{text!r}: {format_dims((dim,))!r} doesn't have size {size} (loops: {known})")
    loops = _make_loops(known, marks, operand_dims, result_dims)
    loops |= {name: Loop(name, loops[members[0]].size, joins=members) for name, members in (joined or {}).items()}
    marked_for_kernel = {name for name, loop in loops.items() if loop.kind is LoopKind.KERNEL}
    return Space(
        loops=loops,
        operands=operand_dims,
        results=result_dims,
        flops=flops,
        family=family,
        kernel=kernel,
        kernel_loops=frozenset(kernel_loops) | marked_for_kernel,
        added=frozenset(added),
        linear=frozenset(linear),
        shape_arg=shape_arg,
        view=view,
        positional=frozenset(positional),
        random=random,
        facts=facts or Facts(),
    )


def _make_loops(
    sizes: Mapping[str, int], marks: Mapping[str, LoopKind], operands: Sequence[Dims], results: Sequence[Dims]
) -> dict[str, Loop]:
    """The loops by name; a loop without a mark is FREE if a result has it, SUM if only operands do, and WHOLE if no tensor does."""
    in_results = {name for dims in results for dim in dims for name in dim}
    in_operands = {name for dims in operands for dim in dims for name in dim}

    def kind_of(name: str) -> LoopKind:
        default = LoopKind.FREE if name in in_results else LoopKind.SUM if name in in_operands else LoopKind.WHOLE
        return marks.get(name, default)

    return {name: Loop(name, size, kind_of(name)) for name, size in sizes.items()}


def _tensors(text: str, count: int) -> list[str]:
    # Blank text is one scalar or no tensor at all: only the number of tensors tells.
    return [tensor_text.strip() for tensor_text in text.split(",")] if count else []


def _parse_dims(text: str, marks: dict[str, LoopKind]) -> Dims:
    dims = []
    for match in _TOKEN.finditer(text):
        group, single = match.groups()
        dims.append(tuple(_parse_loop(token, marks) for token in (group.split() if single is None else [single]) if token != "1"))
    return tuple(dims)


def _parse_loop(token: str, marks: dict[str, LoopKind]) -> str:
    kinds = {"!": LoopKind.WHOLE, "*": LoopKind.KERNEL}
    if token[-1] in kinds:
        marks[token[:-1]] = kinds[token[-1]]
        return token[:-1]
    return token
