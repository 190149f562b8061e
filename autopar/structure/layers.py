"""Repeated layers of a graph, folded into one: like ops of like layers share one decision, so that planning doesn't grow with depth.

Comes in: a `Graph`. Goes out: a `Folded`, which maps every op to a *representative*, the op at its place in the first layer of its group,
with the number of ops that each representative stands for. Everything after this decides about representatives only.

Layers are suggested by module paths that differ in an index (``model.layers.0``, ``model.layers.1``, ...) and, where these leave ops over,
by the sequence of calls (``structure.repeats``). Which of them are alike is decided by isomorphism: same operators with the same arguments
on the same shapes, wired alike inside (`signature`). Names decide nothing.
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
class LayerGroup:
    """Layers that are alike.

    Attributes:
        name: the paths of the layers with a star for the index, such as ``model.layers.*``. Where several groups would have one name, as
            where encoder layers of two kinds alternate, ``#0``, ``#1``, ... follow.
        instances: per layer the names of its ops, in an order in which ops at the same place are alike; those of the first are the
            representatives.
        paths: per layer the path of its module; where it is no module, a number under the module that all layers of the group are in, such
            as ``model.blocks.0``. No two layers of a graph have the same path.
    """

    name: str
    instances: Instances
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Edge:
    """`count` ops that `consumer` stands for read, as their operand number `operand`, a value that `value` stands for."""

    value: Value
    consumer: str
    operand: int
    count: int


ReaderSet = tuple[tuple[str, int], ...]
"""All that read one value: the readers' representatives, each with the number of its operand; sorted, without repetitions."""


@dataclass(frozen=True)
class Folded:
    """A graph whose like layers are folded into one.

    Of six layers, ``relu`` to ``relu_5`` are folded into ``relu``: ``representative["relu_3"] == "relu"``, ``count["relu"] == 6``.

    Attributes:
        graph: the whole graph, with all layers.
        layer_groups: the groups of like layers, each with two layers or more unless `regroup` has divided it.
        representative: op -> the op that decisions about it name; itself outside of repeated layers.
        count: representative -> how many ops it stands for.
        edges: what reads what, by representatives. The edge from one layer to the next like it leads from the representative of a layer's
            last op to that of a first op: the folded graph has cycles.
        reader_sets: value of a representative -> sets of readers -> how many of the values that it stands for are read by just this set.
            The results of five layers may be read by the layer after them, and that of the sixth by a norm: two sets, with counts 5 and 1.
            A value that is read by all six layers is one value with one set, of one reader.
    """

    graph: Graph
    layer_groups: tuple[LayerGroup, ...]
    representative: Mapping[str, str]
    count: Mapping[str, int]
    edges: tuple[Edge, ...]
    reader_sets: Mapping[Value, Mapping[ReaderSet, int]]

    @cached_property
    def layer_of(self) -> Mapping[str, str]:
        """Op -> name of the group of its layer, for the ops that are in one."""
        return {name: group.name for group in self.layer_groups for instance in group.instances for name in instance}

    def representative_of(self, value: Value) -> Value:
        """The value that stands for `value`."""
        return Value(self.representative[value.op], value.index)

    @cached_property
    def ops(self) -> tuple[Op, ...]:
        """The representatives, in graph order."""
        return tuple(op for op in self.graph.ops if self.representative[op.name] == op.name)


def fold(graph: Graph) -> Folded:
    """Fold the repeated layers of `graph`."""
    paths = {op.name: _module_path(op) for op in graph.ops}
    groups = _group_modules(graph, [op for op in graph.ops if paths[op.name]], paths, depth=0)
    if repeats := find_repeats(graph, [group.instances for group in groups]):
        groups = _add_repeats(graph, groups, repeats)
    return _fold_groups(graph, groups)


def regroup(folded: Folded, run_of: Mapping[str, int]) -> Folded:
    """Divide the groups of like layers into runs, each of which may be split over the mesh in its own way.

    A layer begins a new run where one of its ops has another number than the like op of the layer before it. Runs of a divided group are
    named by their first and last layer: ``layers.*[0-2]``, ``layers.*[3]``.

    Args:
        folded: as made by `fold`.
        run_of: op -> number of its run; ops that aren't there have 0.
    """
    runs: list[LayerGroup] = []
    for group in folded.layer_groups:
        numbers = [tuple(run_of.get(name, 0) for name in instance) for instance in group.instances]
        starts = [0, *(layer for layer in range(1, len(numbers)) if numbers[layer] != numbers[layer - 1])]
        for start, end in zip(starts, [*starts[1:], len(numbers)], strict=True):
            name = f"{group.name}[{start}]" if end == start + 1 else f"{group.name}[{start}-{end - 1}]"
            name = group.name if len(starts) == 1 else name
            runs.append(LayerGroup(name, group.instances[start:end], group.paths[start:end]))
    return _fold_groups(folded.graph, runs)


def fold_as_planned(folded: Folded, planned: Collection[str]) -> Folded:
    """Divide the groups of like layers as a plan does that decides about the ops `planned` only.

    A plan holds decisions for the first layer of each run (`regroup`): a layer without any takes those of the last like layer that has
    some.
    """
    run_of: dict[str, int] = {}
    for group in folded.layer_groups:
        run = 0
        for instance in group.instances[1:]:
            run += any(name in planned for name in instance)
            run_of.update(dict.fromkeys(instance, run))
    return regroup(folded, run_of)


def _fold_groups(graph: Graph, groups: Sequence[LayerGroup]) -> Folded:
    """The graph folded by these groups of like layers, which have no op in common."""
    representative = {op.name: op.name for op in graph.ops}
    for group in groups:
        for instance in group.instances[1:]:
            representative.update(zip(instance, group.instances[0], strict=True))
    edges: Counter[tuple[Value, str, int]] = Counter()
    readers: dict[Value, set[tuple[str, int]]] = defaultdict(set)  # per value of the whole graph
    for op in graph.ops:
        for operand, value in enumerate(op.operands):
            reader = representative[op.name], operand
            edges[Value(representative[value.op], value.index), *reader] += 1
            readers[value].add(reader)
    reader_sets: dict[Value, Counter[ReaderSet]] = defaultdict(Counter)
    for value, reader_set in readers.items():
        reader_sets[Value(representative[value.op], value.index)][tuple(sorted(reader_set))] += 1
    return Folded(
        graph=graph,
        layer_groups=tuple(groups),
        representative=representative,
        count=dict(Counter(representative.values())),
        edges=tuple(Edge(value, consumer, operand, number) for (value, consumer, operand), number in edges.items()),
        reader_sets=reader_sets,
    )


def _module_path(op: Op) -> str:
    """The path of the module that a call is made in or a parameter or buffer belongs to; empty for others, and at the root."""
    if op.kind in (OpKind.PARAMETER, OpKind.BUFFER):
        return op.target.rpartition(".")[0]
    return op.layer if op.kind is OpKind.CALL else ""


_INDEX = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")


def _group_modules(graph: Graph, ops: Sequence[Op], paths: Mapping[str, str], depth: int) -> list[LayerGroup]:
    """Groups of like modules among those whose paths differ in an index.

    The modules told apart by the index number `depth` of their paths are compared first; inside of those that are like no other, the
    modules that the next index tells apart.

    Args:
        graph: the whole graph.
        ops: those to look at.
        paths: op -> path of its module.
        depth: number of the index, 0 for the outermost.
    """
    modules: dict[str, dict[str, list[Op]]] = defaultdict(lambda: defaultdict(list))  # container's path -> module's path -> ops
    for op in ops:
        indices = list(_INDEX.finditer(paths[op.name]))
        if len(indices) > depth:
            index = indices[depth]
            container, module = paths[op.name][: index.start(1)].rstrip("."), paths[op.name][: index.end(1)]
            modules[container][module].append(op)
    groups: list[LayerGroup] = []
    for container, ops_of in modules.items():
        alike: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for module, block in ops_of.items():
            alike[signature(graph, block)].append(module)
        name = f"{container}.*" if container else "*"
        is_ambiguous = sum(len(like_modules) > 1 for like_modules in alike.values()) > 1
        for number, like_modules in enumerate(alike.values()):
            if len(like_modules) > 1:
                instances = tuple(tuple(op.name for op in ops_of[module]) for module in like_modules)
                groups.append(LayerGroup(name + (f"#{number}" if is_ambiguous else ""), instances, tuple(like_modules)))
            else:
                groups += _group_modules(graph, ops_of[like_modules[0]], paths, depth + 1)
    return groups


def _add_repeats(graph: Graph, groups: Sequence[LayerGroup], repeats: Sequence[Instances]) -> list[LayerGroup]:
    """The groups without the layers that lie inside of repeated parts, and a group for each repeated part."""
    covered = {name for instances in repeats for instance in instances for name in instance}
    result: list[LayerGroup] = []
    for group in groups:
        layers = zip(group.instances, group.paths, strict=True)
        rest = [(instance, path) for instance, path in layers if covered.isdisjoint(instance)]
        if len(rest) > 1:
            result.append(LayerGroup(group.name, tuple(instance for instance, _ in rest), tuple(path for _, path in rest)))
    calls_in = Counter(path for op in graph.of_kind(OpKind.CALL) for path in enclosing_modules(op.layer))
    names = {group.name for group in result}
    used = {path for group in result for path in group.paths}
    for instances in repeats:
        paths = [_find_module(graph, instance, calls_in) for instance in instances]
        calls = (op for instance in instances for op in map(graph.by_name.__getitem__, instance) if op.kind is OpKind.CALL)
        common = _common_module(op.layer for op in calls)
        if "" in paths or len(set(paths)) < len(paths) or not used.isdisjoint(paths):
            stem = _make_unique(f"{common}.blocks" if common else "blocks", {path.rpartition(".")[0] for path in used})
            paths = [f"{stem}.{number}" for number in range(len(instances))]
        container = _common_module(paths)
        name = _make_unique(f"{container}.*" if container else "*", names)
        names.add(name)
        used.update(paths)
        result.append(LayerGroup(name, instances, tuple(paths)))
    return result


def enclosing_modules(path: str) -> list[str]:
    """The path of a module and those of the modules around it, outermost first, without the root.

    >>> enclosing_modules("model.layers.0")
    ['model', 'model.layers', 'model.layers.0']
    """
    parts = path.split(".") if path else []
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _find_module(graph: Graph, instance: Sequence[str], calls_in: Mapping[str, int]) -> str:
    """The path of the outermost module all of whose calls are in the instance, and make up half of its calls or more; empty without one.

    `calls_in` has the number of calls of every module in the whole graph.
    """
    calls = [graph.by_name[name] for name in instance if graph.by_name[name].kind is OpKind.CALL]
    calls_here = Counter(path for op in calls for path in enclosing_modules(op.layer))
    whole = [path for path in calls_here if calls_here[path] == calls_in[path] and 2 * calls_here[path] >= len(calls)]
    return min(whole, key=len, default="")


def _common_module(paths: Iterable[str]) -> str:
    """The path of the innermost module that all paths lead through; empty for the root."""
    common: list[str] = []
    for parts in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _make_unique(name: str, used: Collection[str]) -> str:
    """The name, with the first of ``#2``, ``#3``, ... that makes it differ from the used ones if it is among them."""
    names = (name if number == 1 else f"{name}#{number}" for number in count(1))
    return next(candidate for candidate in names if candidate not in used)
