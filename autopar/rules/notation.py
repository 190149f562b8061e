"""Helpers to write rules: an op's arguments by position or name, and the text of dims that broadcast or share loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from autopar.ir import Op, Operand, Space, Tensor, parse

Rule = Callable[[Op, tuple[Tensor, ...]], Space | None]
"""From an op and the tensors it reads to its loops; None when this call of the op has no rule."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def named(targets: str, function: Rule) -> dict[str, Rule]:
    """Rows of a table: one rule for several targets, written as words."""
    return dict.fromkeys(targets.split(), function)


def argument(op: Op, position: int, name: str, default: Any = None) -> Any:
    """The argument at `position`, or called `name` when it was given by keyword."""
    return op.args[position] if position < len(op.args) else op.kwargs.get(name, default)


def operand(op: Op, position: int, name: str) -> int | None:
    """Index of the operand given for an argument; None when no tensor was given."""
    value = argument(op, position, name)
    return value.index if isinstance(value, Operand) else None


def normal(dim: int, rank: int) -> int:
    """A dim counted from the front."""
    return dim + rank if dim < 0 else dim


def normals(dims: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """Dims counted from the front; all of them when `dims` is None or empty, as torch's reductions read it."""
    if dims is None or (not isinstance(dims, int) and not dims):
        return tuple(range(rank))
    return tuple(normal(dim, rank) for dim in ([dims] if isinstance(dims, int) else dims))


def is_float(tensor: Tensor) -> bool:
    """Whether the values are real or complex floating-point numbers; only those have Partial sums worth keeping."""
    return tensor.dtype.startswith(("float", "bfloat", "complex"))


def floats(operands: Sequence[Tensor], *wanted: int) -> tuple[int, ...]:
    """`wanted` when all those operands hold floating-point numbers, else nothing: the `linear` of an op."""
    return wanted if all(is_float(operands[index]) for index in wanted) else ()


def letters(rank: int) -> list[str]:
    """Names of the loops of an op that has one loop per dim."""
    return list(LETTERS[:rank])


def fresh() -> Iterator[str]:
    """Names of loops, one after another."""
    yield from LETTERS


def broadcast(shape: Sequence[int], tokens: Sequence[str], full: Sequence[int]) -> list[str]:
    """Dims of a tensor of sizes `shape` that broadcasts to sizes `full` with dims `tokens`."""
    if not shape:
        return []
    aligned = list(zip(shape, tokens[-len(shape) :], full[-len(shape) :], strict=True))
    return [token if size == target else "1" for size, token, target in aligned]


def grouped(*factors: tuple[str, int]) -> str:
    """A dim that is the product of these loops, those of one iteration left out."""
    kept = [name for name, size in factors if size > 1]
    if not kept:
        return "1"
    return kept[0] if len(kept) == 1 else f"({' '.join(kept)})"


def text(tensors: Sequence[Sequence[str]]) -> str:
    """Tensors' dims as a rule writes them."""
    return ", ".join(" ".join(dims) for dims in tensors)


def space(op: Op, operands: Sequence[Tensor], left: Sequence[Sequence[str]], right: Sequence[Sequence[str]], **options: Any) -> Space:
    """Build the space of an op whose operands have dims `left` and whose results have dims `right`; `options` as in `parse`."""
    shapes = [tensor.shape for tensor in operands]
    return parse(f"{text(left)} -> {text(right)}", shapes, [tensor.shape for tensor in op.results], **options)


def per_point(flops: float, *shapes: Sequence[int]) -> float:
    """Operations per point of the space whose loops' sizes are in `shapes`, for an op that does `flops` in all."""
    return flops / max(1, math.prod(size for shape in shapes for size in shape))
