"""Rules that users declare for operators of their own, as text.

Comes in: an operator's name, and the text of its loops. Goes out: a `DeclaredRule`, whose `space_of` gives the space of a call. That it is
well formed is checked here; that the operator does what it says is checked by running it (`autopar.check_rule`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from autopar.errors import InputError
from autopar.ir import Family, Op, Space, Tensor, parse

_NAME = re.compile(r"([A-Za-z_]\w*)(?:::|\.)([A-Za-z_]\w*)(?:\.([A-Za-z_]\w*))?")
_TOKEN = re.compile(r"\(([^()]*)\)|([^\s()]+)|(\S)")
_LOOP = re.compile(r"[A-Za-z_]\w*!?")


@dataclass(frozen=True)
class DeclaredRule:
    """What a user says about an operator; the fields are the arguments of `autopar.rules.register_rule`."""

    target: str
    texts: tuple[str, ...]
    flops: float
    family: Family
    sizes: Mapping[str, int]
    linear: tuple[int, ...]
    added: tuple[int, ...]
    shape_arg: int | None
    random: bool

    def space_of(self, op: Op, operands: Sequence[Tensor]) -> Space:
        """The loops of a call, from the first text that fits its tensors. Raises InputError, naming the call's line, when none does."""
        shapes = [tensor.shape for tensor in operands]
        results = [tensor.shape for tensor in op.results]
        reasons = []
        for text in self.texts:
            try:
                return self._parse(text, shapes, results, len(op.args))
            except ValueError as error:
                reasons.append(f"{text!r}: {error}")
        tensors = f"{', '.join(map(str, operands))} -> {', '.join(map(str, op.results))}"
        raise InputError(
            f"no text of the rule registered for {self.target} fits its call at {op.source or op.layer or op.name}, {tensors}"
            f" ({'; '.join(reasons)}); give register_rule a list of texts, one per form of the call"
        )

    def _parse(self, text: str, operands: Sequence[tuple[int, ...]], results: Sequence[tuple[int, ...]], arguments: int) -> Space:
        left, right = (list(_read_tensors(side)) for side in text.split("->"))
        for named, shapes, what in ((left, operands, "operands"), (right, results, "results")):
            if len(named) != len(shapes) and (shapes or any(named)):
                raise ValueError(f"it has {len(named)} {what}, the call {len(shapes)}")
        if unknown := [index for index in (*self.linear, *self.added) if index >= len(operands)]:
            raise ValueError(f"linear or added names operand {unknown[0]}, the call has {len(operands)}")
        if self.shape_arg is not None and self.shape_arg >= arguments:
            raise ValueError(f"shape_arg={self.shape_arg}, but the call has {arguments} positional arguments, counted from 0")
        sizes = _find_sizes([*left, *right], [*operands, *results], self.sizes)
        return parse(
            text,
            operands,
            results,
            sizes=sizes,
            flops=self.flops,
            family=self.family,
            linear=self.linear,
            added=self.added,
            shape_arg=self.shape_arg,
            kernel_loops=[name for name in sizes if name not in _whole_loops(text)] if self.random else (),
            random=self.random,
        )

    def __str__(self) -> str:
        options = f"{self.family.value} {sorted(self.sizes.items())} {self.linear} {self.added} {self.shape_arg} {self.random}"
        return f"{self.target}: {' | '.join(self.texts)} ({options})"


def read_rule(
    name: str,
    texts: Sequence[str],
    *,
    flops: float,
    family: str,
    sizes: Mapping[str, int],
    linear: Sequence[int],
    added: Sequence[int],
    shape_arg: int | None,
    random: bool,
) -> DeclaredRule:
    """The rule that these arguments of `autopar.rules.register_rule` state. Raises InputError that says what is wrong with which."""
    target = read_target(name)
    if family not in tuple(Family):
        raise InputError(f"{name}: family {family!r} is unknown; there are {', '.join(Family)}")
    if not isinstance(flops, (int, float)) or not math.isfinite(flops) or flops < 0:
        raise InputError(f"{name}: flops={flops!r}; a number from 0 is needed, the operations per point of all loops")
    if wrong := [(loop, size) for loop, size in sizes.items() if not isinstance(size, int) or size < 1]:
        raise InputError(f"{name}: sizes has {wrong[0][0]}={wrong[0][1]!r}; a loop's size is an integer from 1")
    if shape_arg is not None and (not isinstance(shape_arg, int) or shape_arg < 0):
        raise InputError(f"{name}: shape_arg={shape_arg!r}; the position of an argument is needed, from 0")
    if not all(isinstance(given, Sequence) for given in (linear, added)):
        raise InputError(f"{name}: linear and added are lists of numbers of operands, such as [0]")
    if wrong_index := [index for index in (*linear, *added) if not isinstance(index, int) or index < 0]:
        raise InputError(f"{name}: linear and added have numbers of operands, from 0; not {wrong_index[0]!r}")
    if not texts:
        raise InputError(f"{name}: there is no text; b s i, o i -> b s o is one")
    for text in texts:
        if fault := _find_fault(text):
            raise InputError(f"{name}: the rule {text!r} {fault}")
    return DeclaredRule(target, tuple(texts), flops, Family(family), dict(sizes), tuple(linear), tuple(added), shape_arg, random)


def read_target(name: str) -> str:
    """``mylib.op.default`` for ``mylib::op``, as ops of a graph are called. Raises InputError when `name` is no operator's name."""
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise InputError(f"{name!r} is no operator's name; library::name is one, or library::name.overload")
    library, operator, overload = match.groups()
    return f"{library}.{operator}.{overload or 'default'}"


def readable_name(target: str) -> str:
    """The reverse, ``mylib::op``."""
    library, _, operator = target.partition(".")
    return f"{library}::{operator.removesuffix('.default')}"


def short_name(target: str) -> str:
    """An operator's name without its overload, and without the library's name if that is torch's own.

    >>> short_name("aten.add.Tensor"), short_name("mylib.op.default")
    ('add', 'mylib.op.default')
    """
    library, _, name = target.partition(".")
    name = name.partition(".")[0]
    return name if library == "aten" and name else target


def _find_fault(text: str) -> str:
    """What is wrong with a rule's text, whatever the sizes are; empty when nothing is."""
    if not isinstance(text, str) or text.count("->") != 1:
        return "must have operands, one ->, and results, such as b s i, o i -> b s o"
    left, right = text.split("->")
    for token in (token for side in (left, right) for tensor in side.split(",") for token in _split_tokens(tensor)):
        if token.endswith("*"):
            return f"has {token}; a loop marked * is split by a kernel of autopar's own, a registered rule has none: write {token[:-1]}!"
        if token != "1" and _LOOP.fullmatch(token) is None:
            return f"has {token!r}, which is no loop; b and b! are loops, (h d) is a dim of two, 1 a dim of size one"
    operands, results = (list(_read_tensors(side)) for side in (left, right))
    for dims in (*operands, *results):
        names = [name for dim in dims for name in dim]
        if twice := [name for name in names if names.count(name) > 1]:
            return f"has the loop {twice[0]} twice in one tensor"
    whole = _whole_loops(text)
    read = {name for dims in operands for dim in dims for name in dim}
    made = [{name for dim in dims for name in dim} for dims in results]
    for names_made in made:
        if unread := sorted(names_made - read - whole):
            return f"has the loop {unread[0]} in a result and in no operand, so that no part of it can be told; write {unread[0]}!"
    if partly := sorted(name for name in set().union(*made) - whole if not all(name in names for names in made)):
        return f"has the loop {partly[0]} in some results only, so that its parts make different values of the others; write {partly[0]}!"
    return ""


def _whole_loops(text: str) -> set[str]:
    return set(re.findall(r"([A-Za-z_]\w*)!", text))


def _split_tokens(tensor: str) -> Iterator[str]:
    for group, single, stray in _TOKEN.findall(tensor):
        yield from group.split() if not single and not stray else [single or stray]


def _read_tensors(side: str) -> Iterator[list[tuple[str, ...]]]:
    """Per tensor the loops of its dims, without their marks."""
    for tensor in side.split(","):
        dims = ((group.split() if not single else [single]) for group, single, _ in _TOKEN.findall(tensor))
        yield [tuple(name.rstrip("!") for name in dim if name != "1") for dim in dims]


def _find_sizes(tensors: Sequence[list[tuple[str, ...]]], shapes: Sequence[tuple[int, ...]], given: Mapping[str, int]) -> dict[str, int]:
    """The sizes of all loops: those given, those of dims of their own, and a last unknown one of a merged dim.

    Raises ValueError when dims and shapes disagree, or where a merged dim doesn't tell the sizes of its loops.
    """
    sizes = {name: size for name, size in given.items() if any(name in dim for dims in tensors for dim in dims)}
    pairs: list[tuple[tuple[str, ...], int]] = []
    for dims, shape in zip(tensors, shapes, strict=True):
        if len(dims) != len(shape):
            raise ValueError(f"{len(dims)} dims for a tensor of shape {shape}")
        pairs += zip(dims, shape, strict=True)
    for dim, size in sorted(pairs, key=lambda pair: len(pair[0])):
        unknown = [name for name in dim if name not in sizes]
        known = math.prod(sizes[name] for name in dim if name in sizes)
        if len(unknown) > 1:
            raise ValueError(f"the sizes of {' and '.join(unknown)} in ({' '.join(dim)}) aren't known; give them as sizes={{...}}")
        if unknown and size % known == 0:
            sizes[unknown[0]] = size // known
        elif unknown or known != size:
            raise ValueError(f"({' '.join(dim)}) doesn't have size {size}; loops are {sizes}")
    return sizes
