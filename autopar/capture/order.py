"""The calls of a graph in an order, and under names, that don't depend on the process which captured it.

Comes in: a flat, functional graph, whose calls are in the order in which forward made them. Goes out: the same calls, of which those that
forward could have made in any order are in the order in which their results are read.

A forward that walks over a set of names makes the same calls in each process, but not in the same order, since the hash of a text differs
from process to process. The ranks of a job must run one program, and a plan is kept by the names of calls. So wherever calls come from one
line, or from the lines of one loop, and fall apart into groups of which none reads another's results, the groups are sorted by where the
graph's results lead back to them first, and the names of their calls are dealt out again. All other calls stay as they are::

    made = {kind: x * len(kind) for kind in set(kinds)}        mul = x * 6; mul_1 = x * 4; mul_2 = x * 7
    y = made["full"] + made["chunked"] + made["linear"]    ->  mul = x * 4; mul_1 = x * 7; mul_2 = x * 6
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import fx

aten = torch.ops.aten

# They update running statistics in place, which their schemas don't say.
_UPDATE_STATISTICS = frozenset({aten.batch_norm.default, aten.instance_norm.default})


def order_independent_calls(graph: fx.Graph) -> None:
    """Bring independent calls of a graph into an order, and under names, that every process gives them; placeholders stay as they are."""
    calls = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    if not calls:
        return
    known = _Known(
        {node: node.all_input_nodes for node in graph.nodes},
        {node: _lines(node.meta.get("stack_trace") or "") for node in calls},
        {node: _torch_module(node) for node in calls},
        _number_from_results(graph),
    )
    ordered, names = _order(calls, 0, known)
    if ordered != calls:
        output = next(iter(reversed(graph.nodes)))
        for node in ordered:
            output.prepend(node)
        for node, name in names.items():
            node.name = name


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of the nodes of a graph.

    Attributes:
        operands: the nodes that a node reads.
        lines: file and line of each forward that led to a call, the outermost first.
        modules: path of the module of torch's own that makes a call; empty for other calls.
        numbers: the place of a node in a walk from the graph's results to what they are made of; nodes that lead to none have no number.
    """

    operands: Mapping[fx.Node, Sequence[fx.Node]]
    lines: Mapping[fx.Node, tuple[tuple[str, str], ...]]
    modules: Mapping[fx.Node, str]
    numbers: Mapping[fx.Node, int]

    def line(self, call: fx.Node, depth: int) -> tuple[str, str] | None:
        """File and line of the forward at `depth` that led to a call; None where there is none."""
        lines = self.lines[call]
        return lines[depth] if depth < len(lines) else None


def _number_from_results(graph: fx.Graph) -> dict[fx.Node, int]:
    """The place of each node in a walk from the graph's results to what they are made of, depth first, operands before their readers."""
    numbers: dict[fx.Node, int] = {}
    pending = [(node, False) for node in graph.nodes if node.op == "output"]
    while pending:
        node, is_done = pending.pop()
        if node in numbers:
            continue
        if is_done:
            numbers[node] = len(numbers)
        else:
            pending.append((node, True))
            pending.extend((operand, False) for operand in reversed(node.all_input_nodes))
    return numbers


def _order(calls: Sequence[fx.Node], depth: int, known: _Known) -> tuple[list[fx.Node], dict[fx.Node, str]]:
    """Consecutive calls, which the same lines of the `depth` outer forwards made, in order; and new names of those that may have moved."""
    ordered: list[fx.Node] = []
    names: dict[fx.Node, str] = {}
    groups = _independent_groups(calls, known)
    if len(groups) > 1:
        last = len(known.numbers)
        for group in sorted(groups, key=lambda group: min(known.numbers.get(node, last) for node in group)):
            ordered += _order(group, depth, known)[0]
        return ordered, _deal_names(calls, ordered)
    for part, inner in _split(calls, depth, known):
        part_ordered, part_names = _order(part, inner, known) if len(part) > 1 else (part, {})
        ordered += part_ordered
        names |= part_names
    return ordered, names


def _independent_groups(calls: Sequence[fx.Node], known: _Known) -> list[list[fx.Node]]:
    """The calls in groups of which none reads another's results.

    All calls that update statistics are in one group, since their order counts. A module of torch's own stays together, so that a batch
    norm's counter isn't parted from its layer.
    """
    leader = {node: node for node in calls}

    def find(node: fx.Node) -> fx.Node:
        while leader[node] is not node:
            leader[node] = node = leader[leader[node]]
        return node

    updating = [node for node in calls if node.target in _UPDATE_STATISTICS]
    together = [(node, operand) for node in calls for operand in known.operands[node] if operand in leader]
    modules = [(node, path) for node in calls if (path := known.modules[node])]
    inside = [(node, other) for (node, path), (other, other_path) in pairwise(modules) if path == other_path]
    for one, other in (*together, *pairwise(updating), *inside):
        leader[find(one)] = find(other)
    groups: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in calls:
        groups[find(node)].append(node)
    return list(groups.values())


def _split(calls: Sequence[fx.Node], depth: int, known: _Known) -> Iterator[tuple[Sequence[fx.Node], int]]:
    """Parts of `calls`, with the number of outer forwards whose lines they share: calls of one line, or of the lines of a loop.

    A loop is a stretch of lines of which one after another occurs again, as in ``3 4 3 4``. Calls that are one loop are split into its
    passes, each of which ends where its last line does; so the loops inside of it become visible.
    """
    runs: list[list[fx.Node]] = []
    keys: list[tuple[str, str] | None] = []
    for node in calls:
        line = known.line(node, depth)
        if not runs or keys[-1] != line:
            runs.append([])
            keys.append(line)
        runs[-1].append(node)
    if len(runs) == 1:
        if keys[0] is not None:
            yield calls, depth + 1
        else:
            yield from (([node], depth) for node in calls)
        return
    last = {line: position for position, line in enumerate(keys)}
    starts = [0]
    end = 0
    for position, line in enumerate(keys):
        if position > end:
            starts.append(position)
        end = max(end, last[line])
    if len(starts) == 1:
        end_of_pass = max(last, key=lambda line: -1 if line is None else int(line[1]))
        starts += [position for position in range(1, len(runs)) if keys[position - 1] == end_of_pass]
    for start, stop in pairwise((*starts, len(runs))):
        yield [node for run in runs[start:stop] for node in run], depth


@functools.lru_cache(maxsize=4096)
def _lines(stack_trace: str) -> tuple[tuple[str, str], ...]:
    return tuple(re.findall(r'File "([^"]+)", line (\d+), in ', stack_trace))


def _torch_module(node: fx.Node) -> str:
    """The path of the innermost module that makes a call, if it is one of torch's own."""
    path, kind = next(reversed((node.meta.get("nn_module_stack") or {"": ("", "")}).values()))
    name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    return path if name.startswith("torch.nn.modules.") else ""


def _deal_names(before: Sequence[fx.Node], after: Sequence[fx.Node]) -> dict[fx.Node, str]:
    """The names of the calls `before`, dealt out in the order `after`: of those called ``mul_3`` and ``mul_5`` the first gets ``mul_3``."""
    names: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for node in before:
        base, number = _parse_name(node.name)
        names[base].append((number, node.name))
    dealt = {base: iter(sorted(numbered)) for base, numbered in names.items()}
    return {node: next(dealt[_parse_name(node.name)[0]])[1] for node in after}


def _parse_name(name: str) -> tuple[str, int]:
    base, _, number = name.rpartition("_")
    return (base, int(number)) if base and number.isdecimal() else (name, 0)
