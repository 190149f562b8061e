"""The order in which the blocks of a chain run: layers that stay whole, and the single calls between and around them.

Comes in: a folded graph and its calls. Goes out: a list of `Unit`s such that each comes after all that it reads. A layer becomes a unit of
several calls if it can run in one go and holds enough of the model's work; every other call is a unit of its own, for ``chain_cuts`` to
join.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from autopar.ir import Graph, Op, Space, Value
from autopar.structure.layers import Folded
from autopar.structure.measures import count_flops, is_heavy

# Layers are blocks of their own if one of them has this share of the model's flops, as any block needs (`chain_cuts`), or all like ones
# together this larger share: a model of many small repeats is cut as if there were none.
WORK_SHARE = 1 / 64
LAYERS_SHARE = 1 / 8


@dataclass(frozen=True)
class Unit:
    """Calls that stay together.

    Attributes:
        ops: in the order in which they run.
        path: of the layer that the unit is; empty for other calls.
    """

    ops: tuple[Op, ...]
    path: str = ""


@dataclass(frozen=True)
class _Layers:
    """The layers of a folded graph, numbered.

    Attributes:
        paths: per layer.
        layer_of: call -> number of its layer; calls outside of layers, and those that aren't to be in blocks, are left out.
        groups: per group of like layers their numbers.
    """

    paths: tuple[str, ...]
    layer_of: Mapping[str, int]
    groups: tuple[range, ...]


def order_units(folded: Folded, spaces: Mapping[str, Space], calls: Sequence[Op]) -> list[Unit]:
    """The units of `calls`, some of the graph's calls in its order, in an order in which they can run.

    Args:
        folded: the graph.
        spaces: of every call that has a rule.
        calls: all calls that are to be in blocks.
    """
    units = _make_units(folded, spaces, calls)
    return _delay_calls(folded.graph, spaces, _sort_units(folded.graph, units))


def _make_units(folded: Folded, spaces: Mapping[str, Space], calls: Sequence[Op]) -> list[Unit]:
    """The layers that can run in one go, and single calls for all the rest; in no order that they could run in."""
    layers = _number_layers(folded, calls)
    before, after = _find_reach(calls, layers.layer_of)
    dissolved = _find_parallel(layers, before) | _find_slight(folded.graph, spaces, calls, layers)
    member_of: dict[str, int] = {}
    for op in calls:
        # The call's own layer, and layers that it depends on and that depend on it: such a call belongs between calls of theirs.
        around = [layer for layer in _read_bits(before[op.name] & after[op.name]) if layer not in dissolved]
        if len(around) == 1:
            member_of[op.name] = around[0]
        elif around:
            # Layers that depend on each other can't run one after the other.
            dissolved.update(around)
    members: dict[int, list[Op]] = defaultdict(list)
    single: list[Unit] = []
    for op in calls:
        if op.name in member_of and member_of[op.name] not in dissolved:
            members[member_of[op.name]].append(op)
        else:
            single.append(Unit((op,)))
    return [Unit(tuple(ops), layers.paths[layer]) for layer, ops in members.items()] + single


def _number_layers(folded: Folded, calls: Sequence[Op]) -> _Layers:
    names = {op.name for op in calls}
    paths: list[str] = []
    layer_of: dict[str, int] = {}
    groups: list[range] = []
    for group in folded.layer_groups:
        groups.append(range(len(paths), len(paths) + len(group.paths)))
        for path, instance in zip(group.paths, group.instances, strict=True):
            layer_of.update((name, len(paths)) for name in instance if name in names)
            paths.append(path)
    return _Layers(tuple(paths), layer_of, tuple(groups))


def _find_reach(calls: Sequence[Op], layer_of: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Per call the layers that it depends on, and those that depend on it, as sets of bits; its own layer is in both."""
    before: dict[str, int] = {}
    after: dict[str, int] = {op.name: 1 << layer_of[op.name] if op.name in layer_of else 0 for op in calls}
    for op in calls:
        before[op.name] = after[op.name]
        for value in op.operands:
            before[op.name] |= before.get(value.op, 0)
    for op in reversed(calls):
        for value in op.operands:
            if value.op in after:
                after[value.op] |= after[op.name]
    return before, after


def _read_bits(bits: int) -> Iterator[int]:
    """The positions of the ones in a number, ascending."""
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest


def _find_parallel(layers: _Layers, before: Mapping[str, int]) -> set[int]:
    """Layers of groups that run side by side, such as experts or heads, and so make no chain."""
    depends_on: dict[int, int] = defaultdict(int)
    for name, layer in layers.layer_of.items():
        depends_on[layer] |= before[name] & ~(1 << layer)
    parallel: set[int] = set()
    for group in layers.groups:
        alike = sum(1 << layer for layer in group)
        starts = [layer for layer in group if not depends_on[layer] & alike]
        # Every chain has a first layer, which depends on none of its like, and a group may be several chains (encoders of two inputs).
        # Where most layers depend on none, they are no chains.
        if 2 * len(starts) > len(group):
            parallel.update(group)
    return parallel


def _find_slight(graph: Graph, spaces: Mapping[str, Space], calls: Sequence[Op], layers: _Layers) -> set[int]:
    """Layers of groups that hold too little of the model's flops for blocks of their own."""
    flops: dict[int, float] = defaultdict(float)
    for op in calls:
        if op.name in layers.layer_of and is_heavy(graph, spaces, op):
            flops[layers.layer_of[op.name]] += count_flops(spaces, op)
    total = sum(count_flops(spaces, op) for op in calls)
    slight: set[int] = set()
    for group in layers.groups:
        of_layers = [flops[layer] for layer in group]
        if max(of_layers) < WORK_SHARE * total and sum(of_layers) < LAYERS_SHARE * total:
            slight.update(group)
    return slight


def _sort_units(graph: Graph, units: Sequence[Unit]) -> list[Unit]:
    """The units in topological order; of those that could be next, the one whose first call comes first in the graph."""
    position = {op.name: index for index, op in enumerate(graph.ops)}
    unit_of = {op.name: number for number, unit in enumerate(units) for op in unit.ops}
    readers = [
        {unit_of[reader] for reader in _find_readers(graph, unit) if reader in unit_of} - {number} for number, unit in enumerate(units)
    ]
    missing = Counter(reader for numbers in readers for reader in numbers)  # per unit how many units that it reads aren't in order yet
    ready = [(position[unit.ops[0].name], number) for number, unit in enumerate(units) if not missing[number]]
    heapq.heapify(ready)
    order: list[Unit] = []
    while ready:
        _, number = heapq.heappop(ready)
        order.append(units[number])
        for reader in readers[number]:
            missing[reader] -= 1
            if not missing[reader]:
                heapq.heappush(ready, (position[units[reader].ops[0].name], reader))
    if len(order) != len(units):
        raise AssertionError("blocks that need each other were not taken apart")
    return order


def _find_readers(graph: Graph, unit: Unit) -> Iterator[str]:
    """Names of the ops that read a result of a unit."""
    return (reader for op in unit.ops for value in op.values for reader in graph.readers.get(value, ()))


def _delay_calls(graph: Graph, spaces: Mapping[str, Space], order: Sequence[Unit]) -> list[Unit]:
    """The same units, where single calls run right before their first reader if that leaves fewer bytes alive where blocks may end.

    A call that is delayed keeps its operands alive for longer and its results for shorter: it is delayed if the operands that would
    otherwise be dead hold fewer bytes than the results.
    """
    unit_of = {op.name: number for number, unit in enumerate(order) for op in unit.ops}

    def reading_units(value: Value) -> set[int]:
        return {unit_of[reader] for reader in graph.readers.get(value, ()) if reader in unit_of} - {unit_of[value.op]}

    # Blocks end between layers and heavy calls: a delay that passes none of these gains nothing. Entry n counts those among the first n.
    ends = [0, *accumulate(bool(unit.path) or is_heavy(graph, spaces, unit.ops[0]) for unit in order)]
    # Where a unit runs: `steps` places before unit `anchor`; a unit that isn't delayed is its own anchor. Readers are placed before what
    # they read, as they may be delayed themselves.
    place = [(number, 0) for number in range(len(order))]
    for number in reversed(range(len(order))):
        unit = order[number]
        if unit.path:
            continue
        (op,) = unit.ops
        reader_places = [place[reader] for value in op.values for reader in reading_units(value)]
        if not reader_places:
            continue
        anchor, steps = min(reader_places, key=lambda reader_place: (reader_place[0], -reader_place[1]))
        freed = sum(graph.tensor(value).nbytes for value in op.values if reading_units(value))
        held = sum(
            graph.tensor(value).nbytes
            for value in set(op.operands)
            if value.op in unit_of and not any(place[reader][0] >= anchor for reader in reading_units(value) - {number})
        )
        if held < freed and ends[anchor] > ends[number + 1]:
            place[number] = (anchor, steps + 1)
    return [order[number] for number in sorted(range(len(order)), key=lambda number: (place[number][0], -place[number][1], number))]
