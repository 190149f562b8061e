"""Repeated blocks of a graph, found from structure and folded into one.

Module paths suggest the blocks (``model.layers.0``, ``model.layers.1``, ...), and the sequence of calls suggests more where these leave
something over; an isomorphism check decides which of them are alike: same ops with the same attributes and shapes, wired alike inside.
Everything after this sees each distinct block once, with the number of times it occurs, so that planning doesn't grow with depth.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

from autopar.ir import Graph, Op, OpKind, Value
from autopar.structure.repeats import Instances, find_repeats, signature


@dataclass(frozen=True, slots=True)
class LayerClass:
    """Blocks that are alike.

    Attributes:
        name: the paths they share, ``model.layers.*``, with a suffix when there are several kinds of blocks under it.
        instances: per block the names of its ops, like ones at the same place; the first stands for all.
        paths: the blocks' module paths; where a block is no module, numbers under the module that all are in, ``model.blocks.0``. Unique.
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


Readers = tuple[tuple[str, int], ...]
"""Representatives that read one value, each with the operand's position; sorted."""


@dataclass(frozen=True)
class Folded:
    """A graph with like blocks folded into one.

    Attributes:
        classes: the distinct repeated blocks.
        representative: op name -> name of the op that stands for it (itself outside of repeated blocks).
        count: representative -> how many ops it stands for.
        edges: between representatives, also those from one block to the next like one.
        readers: value -> the sets of (consumer, operand) that read some of the values that it stands for -> how many values each set
            reads. A value that all layers read is one value with one reader; a layer's result may have other readers after the last.
    """

    graph: Graph
    classes: tuple[LayerClass, ...]
    representative: Mapping[str, str]
    count: Mapping[str, int]
    edges: tuple[Edge, ...]
    readers: Mapping[Value, Mapping[Readers, int]]

    @cached_property
    def layer_of(self) -> Mapping[str, str]:
        """Op name -> name of the class of its layer, for the ops that are in one."""
        return {name: layer.name for layer in self.classes for instance in layer.instances for name in instance}

    def representative_of(self, value: Value) -> Value:
        """The value that stands for `value`."""
        return Value(self.representative[value.op], value.index)

    @cached_property
    def ops(self) -> tuple[Op, ...]:
        """The representatives, in graph order."""
        return tuple(op for op in self.graph.ops if self.representative[op.name] == op.name)


def fold(graph: Graph) -> Folded:
    """Fold the repeated blocks of `graph`."""
    paths = {op.name: _module_path(op) for op in graph.ops}
    classes = _find_classes(graph, [op for op in graph.ops if paths[op.name]], paths, depth=0)
    if repeats := find_repeats(graph, [layer.instances for layer in classes]):
        classes = _add_repeats(graph, classes, repeats)
    return _count(graph, classes)


def regroup(folded: Folded, group_of: Mapping[str, int]) -> Folded:
    """Fold like blocks only as long as one follows another of its group: each run of them may be split differently.

    Args:
        folded: as made by `fold`.
        group_of: op name -> its group; 0 for those left out.
    """
    classes: list[LayerClass] = []
    for layer in folded.classes:
        groups = [tuple(group_of.get(name, 0) for name in instance) for instance in layer.instances]
        starts = [0, *(i for i in range(1, len(groups)) if groups[i] != groups[i - 1])]
        for start, end in zip(starts, [*starts[1:], len(groups)], strict=True):
            name = f"{layer.name}[{start}]" if end == start + 1 else f"{layer.name}[{start}-{end - 1}]"
            name = layer.name if len(starts) == 1 else name
            classes.append(LayerClass(name, layer.instances[start:end], layer.paths[start:end]))
    return _count(folded.graph, classes)


def fold_as_planned(folded: Folded, planned: Collection[str]) -> Folded:
    """Fold as a plan does that holds decisions for the ops `planned`: a block without any follows the last one like it that has some."""
    group_of: dict[str, int] = {}
    for layer in folded.classes:
        number = 0
        for instance in layer.instances[1:]:
            number += any(name in planned for name in instance)
            group_of.update(dict.fromkeys(instance, number))
    return regroup(folded, group_of)


def _count(graph: Graph, classes: Sequence[LayerClass]) -> Folded:
    representative = {op.name: op.name for op in graph.ops}
    for layer in classes:
        for instance in layer.instances[1:]:
            representative.update(zip(instance, layer.instances[0], strict=True))
    counts = Counter(representative.values())
    edges: Counter[tuple[Value, str, int]] = Counter()
    readers_of: dict[Value, dict[tuple[str, int], None]] = defaultdict(dict)
    for op in graph.ops:
        for index, value in enumerate(op.operands):
            alike = Value(representative[value.op], value.index)
            edges[alike, representative[op.name], index] += 1
            readers_of[value][representative[op.name], index] = None
    readers: dict[Value, Counter[Readers]] = defaultdict(Counter)
    for value, names in readers_of.items():
        readers[Value(representative[value.op], value.index)][tuple(sorted(names))] += 1
    return Folded(
        graph=graph,
        classes=tuple(classes),
        representative=representative,
        count=dict(counts),
        edges=tuple(Edge(value, consumer, operand, n) for (value, consumer, operand), n in edges.items()),
        readers=readers,
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
            alike[signature(graph, block)].append(path)
        name = f"{container}.*" if container else "*"
        several = sum(len(group) > 1 for group in alike.values()) > 1
        for number, group in enumerate(alike.values()):
            if len(group) > 1:
                instances = tuple(tuple(op.name for op in members[path]) for path in group)
                found.append(LayerClass(name + (f"#{number}" if several else ""), instances, tuple(group)))
            else:
                found += _find_classes(graph, members[group[0]], paths, depth + 1)
    return found


def _add_repeats(graph: Graph, classes: Sequence[LayerClass], repeats: Sequence[Instances]) -> list[LayerClass]:
    """The classes without the blocks that are inside of repeated parts, and these parts."""
    covered = {name for instances in repeats for instance in instances for name in instance}
    kept: list[LayerClass] = []
    for layer in classes:
        rest = [(one, path) for one, path in zip(layer.instances, layer.paths, strict=True) if covered.isdisjoint(one)]
        if len(rest) > 1:
            kept.append(LayerClass(layer.name, tuple(one for one, _ in rest), tuple(path for _, path in rest)))
    sizes = Counter(path for op in graph.of_kind(OpKind.CALL) for path in _modules_of(op.layer))
    names = {layer.name for layer in kept}
    used = {path for layer in kept for path in layer.paths}
    for instances in repeats:
        paths = [_find_path(graph, instance, sizes) for instance in instances]
        common = _common([graph.by_name[name].layer for one in instances for name in one if graph.by_name[name].kind is OpKind.CALL])
        if "" in paths or len(set(paths)) < len(paths) or not used.isdisjoint(paths):
            stem = _unused(f"{common}.blocks" if common else "blocks", {path.rpartition(".")[0] for path in used})
            paths = [f"{stem}.{number}" for number in range(len(instances))]
        # The paths differ in one place if they are siblings, and that is where the star goes.
        container = _common(paths)
        name = _unused(f"{container}.*" if container else "*", names)
        names.add(name)
        used.update(paths)
        kept.append(LayerClass(name, instances, tuple(paths)))
    return kept


def _modules_of(path: str) -> list[str]:
    """The path of a module and of those around it, outermost first."""
    parts = path.split(".") if path else []
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _find_path(graph: Graph, instance: Sequence[str], sizes: Mapping[str, int]) -> str:
    """The module that half of the block's calls or more belong to and no others, the outermost of several; empty without one."""
    calls = [graph.by_name[name] for name in instance if graph.by_name[name].kind is OpKind.CALL]
    here = Counter(path for op in calls for path in _modules_of(op.layer))
    whole = [path for path in here if here[path] == sizes[path] and 2 * here[path] >= len(calls)]
    return min(whole, key=len, default="")


def _common(paths: Iterable[str]) -> str:
    """The innermost module that all are in."""
    kept: list[str] = []
    for parts in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        kept.append(parts[0])
    return ".".join(kept)


def _unused(name: str, used: Collection[str]) -> str:
    """The name, with a number when it is taken."""
    return next(one for number in count(1) if (one := name if number == 1 else f"{name}#{number}") not in used)
