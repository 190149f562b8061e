"""The iteration space of an op: named loops, and the tensor dims that they run over.

A rule states an op as text, ``b s i, o i, o -> b s o`` for a linear layer with bias: operands, then results; a token per dim.

- ``(t h d)`` is a dim that is an ordered product of loops, the outermost first: a merged or split view, a fused weight.
- ``1`` is a dim of size one with no loop.
- ``x!`` is a loop that must stay whole, such as the dim that a softmax normalises.
- ``v*`` is a loop that the op's kernel can split with communication of its own (`autopar.ops.kernels`), such as the batch loop of
  a batch norm. A result that lacks it is complete on every rank.
- A loop that no result has is summed, unless it is marked: its split leaves a Partial result.

The notation follows einops and Shardy's sharding rules; nothing here knows meshes, costs or torch.
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
    """What splitting a loop means."""

    FREE = "free"  # every part runs alone
    SUM = "sum"  # every part runs alone, the results are summed
    KERNEL = "kernel"  # the op's kernel communicates; results that lack the loop come out complete
    WHOLE = "whole"  # can't be split


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop of `size` iterations."""

    name: str
    size: int
    kind: LoopKind = LoopKind.FREE


@dataclass(frozen=True, slots=True)
class Space:
    """The loops of one op and how its tensors run over them.

    Attributes:
        loops: every loop, by name.
        operands, results: per tensor, per dim, the names of its loops, outermost first.
        flops: floating-point operations per point of the whole iteration space, forward.
        family: products, attention and lookups hold a model's work; all else is pointwise.
        kernel: name of the function in `autopar.ops.kernels` that replaces the op when a loop in `kernel_loops` is split.
        kernel_loops: loops whose split needs the kernel (every KERNEL loop is one).
        added: operands that are added once to a sum (a bias): when a SUM loop is split they are needed as Partial.
        linear: operands in which the op is jointly linear. When they all arrive Partial the results are Partial and nothing
            is communicated; empty when the op isn't linear.
        shape_arg: position in `Op.args` of the result's sizes (``view``, ``expand``); they become the local sizes.
        view: the op makes no copy, its result shares storage with operand 0.
        positional: loops whose kernel must know which part it works on (rows of a causal mask, ranges of a vocabulary); they
            can be split at the outermost boundary only, never inside blocks.
        random: the op draws random numbers; the kernel replaces it in every parallel program, split or not, so that replicas
            draw the same and shards draw differently.
        facts: what must be known of the op beside its loops.
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

    def __post_init__(self) -> None:
        for dims in (*self.operands, *self.results):
            names = [name for dim in dims for name in dim]
            if len(set(names)) != len(names):
                raise ValueError(f"a tensor runs twice over one loop: {format_dims(dims)}")
        if any(loop.kind is LoopKind.KERNEL and loop.name not in self.kernel_loops for loop in self.loops.values()):
            raise ValueError("every KERNEL loop must be named in kernel_loops")
        if self.kernel_loops and self.kernel is None:
            raise ValueError("kernel_loops are given but no kernel")
        if unknown := _loops_of(self.facts) - self.loops.keys():
            raise ValueError(f"facts name loops {', '.join(sorted(unknown))}, which the op doesn't have")
        splittable = tuple(loop for loop in self.loops.values() if loop.kind is not LoopKind.WHOLE and loop.size > 1)
        object.__setattr__(self, "splittable", splittable)

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
        return math.prod(loop.size for loop in self.loops.values())

    def shape(self, dims: Dims) -> tuple[int, ...]:
        """Sizes of a tensor with these dims."""
        return tuple(math.prod(self.loops[name].size for name in dim) for dim in dims)

    def find(self, dims: Dims, loop: str) -> tuple[int, int] | None:
        """Where `loop` is in a tensor: (dim, product of the sizes of the loops outside it), or None when absent."""
        for position, dim in enumerate(dims):
            if loop in dim:
                outer = math.prod(self.loops[name].size for name in dim[: dim.index(loop)])
                return position, outer
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
    return {*facts.coupled, *facts.meanings, *exchanged}


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
) -> Space:
    """Build the space that `text` describes for tensors of these shapes.

    `operands` and `results` are the tensors' sizes; `sizes` gives those of loops that occur in groups only. Raises ValueError
    when the text and the shapes disagree.

    >>> print(parse("b s i, o i -> b s o", [(2, 3, 4), (5, 4)], [(2, 3, 5)]))
    b s i, o i -> b s o
    """
    left, _, right = text.partition("->")
    marks: dict[str, LoopKind] = {}
    operand_dims = tuple(_parse_dims(part, marks) for part in _tensors(left, len(operands)))
    result_dims = tuple(_parse_dims(part, marks) for part in _tensors(right, len(results)))
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
    in_results = {name for dims in result_dims for dim in dims for name in dim}
    in_tensors = in_results | {name for dims in operand_dims for dim in dims for name in dim}
    loops = {}
    for name, size in known.items():
        default = LoopKind.FREE if name in in_results else LoopKind.SUM
        if name not in in_tensors:
            default = LoopKind.WHOLE  # named for its size only
        loops[name] = Loop(name, size, marks.get(name, default))
    inside = {name for name, loop in loops.items() if loop.kind is LoopKind.KERNEL}
    return Space(
        loops=loops,
        operands=operand_dims,
        results=result_dims,
        flops=flops,
        family=family,
        kernel=kernel,
        kernel_loops=frozenset(kernel_loops) | inside,
        added=frozenset(added),
        linear=frozenset(linear),
        shape_arg=shape_arg,
        view=view,
        positional=frozenset(positional),
        random=random,
        facts=facts or Facts(),
    )


def _tensors(text: str, count: int) -> list[str]:
    # Blank text is one scalar or no tensor at all: only the number of tensors tells.
    return [part.strip() for part in text.split(",")] if count else []


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
