"""Repeated blocks of a graph, found from structure and folded into one.

Module paths suggest the blocks (``model.layers.0``, ``model.layers.1``, ...); an isomorphism check decides which of them are alike:
same ops with the same attributes and shapes, wired alike inside. Everything after this sees each distinct block once, with
the number of times it occurs, so that planning doesn't grow with depth.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autopar.ir import Graph, Op, Operand, OpKind, Value


@dataclass(frozen=True, slots=True)
class LayerClass:
    """Blocks that are alike.

    Attributes:
        name: the paths they share, ``model.layers.*``, with a suffix when there are several kinds of blocks under it.
        instances: per block the names of its ops, in order; the first stands for all.
        paths: the blocks' module paths.
    """

    name: str
    instances: tuple[tuple[str, ...], ...]
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Edge:
    """Result `value` is read as operand `operand` of op `consumer`; both ops are representatives; `count` such edges exist."""

    value: Value
    consumer: str
    operand: int
    count: int


@dataclass(frozen=True)
class Folded:
    """A graph with like blocks folded into one.

    Attributes:
        classes: the distinct repeated blocks.
        representative: op name -> name of the op that stands for it (itself outside of repeated blocks).
        count: representative -> how many ops it stands for.
        edges: between representatives, also those from one block to the next like one.
    """

    graph: Graph
    classes: tuple[LayerClass, ...]
    representative: Mapping[str, str]
    count: Mapping[str, int]
    edges: tuple[Edge, ...]

    def representative_of(self, value: Value) -> Value:
        """The value that stands for `value`."""
        return Value(self.representative[value.op], value.index)

    @property
    def ops(self) -> tuple[Op, ...]:
        """The representatives, in graph order."""
        return tuple(op for op in self.graph.ops if self.representative[op.name] == op.name)


def fold(graph: Graph) -> Folded:
    """Fold the repeated blocks of `graph`."""
    paths = {op.name: _module_path(op) for op in graph.ops}
    classes = tuple(_find_classes(graph, [op for op in graph.ops if paths[op.name]], paths, depth=0))
    representative = {op.name: op.name for op in graph.ops}
    for layer in classes:
        for instance in layer.instances[1:]:
            representative.update(zip(instance, layer.instances[0], strict=True))
    count = Counter(representative.values())
    edges: Counter[tuple[Value, str, int]] = Counter()
    for op in graph.ops:
        for index, value in enumerate(op.operands):
            edges[Value(representative[value.op], value.index), representative[op.name], index] += 1
    return Folded(
        graph=graph,
        classes=classes,
        representative=representative,
        count=dict(count),
        edges=tuple(Edge(value, consumer, operand, n) for (value, consumer, operand), n in edges.items()),
    )


def _module_path(op: Op) -> str:
    if op.kind in (OpKind.PARAMETER, OpKind.BUFFER):
        return op.target.rpartition(".")[0]
    return op.layer if op.kind is OpKind.CALL else ""


_INDEX = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


def _find_classes(graph: Graph, ops: Sequence[Op], paths: Mapping[str, str], depth: int) -> list[LayerClass]:
    """Classes among the blocks that the `depth`-th index in the module paths tells apart, then inside the blocks left alone."""
    blocks: dict[str, dict[str, list[Op]]] = defaultdict(lambda: defaultdict(list))  # container -> block path -> ops
    for op in ops:
        indices = list(_INDEX.finditer(paths[op.name]))
        if len(indices) > depth:
            end = indices[depth].end(1)
            path = paths[op.name][:end]
            blocks[paths[op.name][: indices[depth].start(1)].rstrip(".")][path].append(op)
    found: list[LayerClass] = []
    for container, members in blocks.items():
        alike: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for path, block in members.items():
            alike[_signature(graph, block)].append(path)
        name = f"{container}.*" if container else "*"
        several = sum(len(group) > 1 for group in alike.values()) > 1
        for number, group in enumerate(alike.values()):
            if len(group) > 1:
                instances = tuple(tuple(op.name for op in members[path]) for path in group)
                found.append(LayerClass(name + (f"#{number}" if several else ""), instances, tuple(group)))
            else:
                found += _find_classes(graph, members[group[0]], paths, depth + 1)
    return found


def _signature(graph: Graph, block: Sequence[Op]) -> tuple[Any, ...]:
    """Equal for blocks that compute the same function of what they read from outside."""
    position = {op.name: index for index, op in enumerate(block)}
    outside: dict[Value, int] = {}
    lines = []
    for op in block:
        reads: list[tuple[Any, ...]] = []
        for value in op.operands:
            if value.op in position:
                reads.append(("in", position[value.op], value.index))
            else:
                tensor = graph.tensor(value)
                # Numbered by first use: two operands that are one value in this block are one value in the other.
                reads.append(("out", outside.setdefault(value, len(outside)), tensor.shape, tensor.dtype))
        results = tuple((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in op.results)
        target = op.target if op.kind is OpKind.CALL else op.kind.value
        lines.append((target, tuple(reads), results, freeze(op.args), freeze(op.kwargs)))
    return tuple(lines)


def freeze(value: Any) -> Any:
    """A hashable stand-in for an op's argument; equal arguments give equal stand-ins."""
    if isinstance(value, Operand | int | float | str | bool | type(None)):
        return (type(value).__name__, value)
    if isinstance(value, Mapping):
        return tuple(sorted((key, freeze(item)) for key, item in value.items()))
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    return repr(value)


def fan_key(value: Value, target: str, operand: int) -> str:
    """The name, in problems and plans, of what `value` is turned into for all consumers that read it alike."""
    return f"fan:{value}:{target}:{operand}"
