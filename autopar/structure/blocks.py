"""A folded graph -> its calls as a chain of blocks, which pipeline stages are runs of.

Repeated layers are blocks of their own. What lies between them is cut where few bytes are alive. Every block knows which values travel
when a stage ends after it. Calls that need no parameter and do little work (masks, position ids, rotary tables, shifted labels) are in no
block: every stage that needs them makes them for itself.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from autopar.ir import Family, Graph, Op, OpKind, Space, Value
from autopar.structure.layers import Folded


@dataclass(frozen=True, slots=True)
class Block:
    """Calls that stay on one stage.

    Attributes:
        name: the path of the layer, or of the module that does most of the work; unique.
        ops: names of the calls, in the order in which they run.
        like: blocks with the same number are instances of the same layer: isomorphic, and planned as one.
        crossing: values made up to here and read later: what travels when a stage ends after this block.
        crossing_nbytes: bytes of these, of the whole batch.
    """

    name: str
    ops: tuple[str, ...]
    like: int
    crossing: tuple[Value, ...]
    crossing_nbytes: int


@dataclass(frozen=True)
class Chain:
    """Blocks in the order in which they run, and the calls that every stage makes for itself."""

    blocks: tuple[Block, ...]
    cheap: frozenset[str]


# A call is made again on every stage that needs it only when it makes at most this share of all elements that calls with parameters make:
# one pass over memory is cheaper than a message, but many large ones add up.
CHEAP_SHARE = 0.1

# Outside of repeated layers: no more blocks than this, each with at least one of these shares of the model's work and parameters, unless
# it stands between two layers. Parameters count less, as they matter for memory only.
MAX_PIECES = 64
WORK_SHARE = 1 / 64
PARAMETER_SHARE = 1 / 10

# A cut isn't made where cheaper ones stand close on both sides, as inside a residual branch: with at most this share of the model's work
# between them, or this many products behind each other (an attention). The skips of a U-Net span more, and cuts below them are made.
BRANCH_SHARE = 1 / 6
BRANCH_DEPTH = 4

# Repeated layers that hold less of the model's work in all, and less than a piece each, are not blocks of their own: a model of many small
# repeats is cut as if there were none.
LAYERS_SHARE = 1 / 8


def find_chain(folded: Folded, spaces: Mapping[str, Space]) -> Chain:
    """Cut the calls of `folded.graph` into a chain of blocks; `spaces` gives the space of every call that has a rule."""
    graph = folded.graph
    cheap = _find_cheap(folded, spaces)
    calls = [op for op in graph.of_kind(OpKind.CALL) if op.name not in cheap]
    units = _find_units(folded, spaces, calls)
    order = _delay(graph, spaces, _sort(graph, calls, units))
    return Chain(_make_blocks(folded, spaces, _cut(folded, spaces, order)), cheap)


def relabel(chain: Chain, folded: Folded) -> Chain:
    """The chain, with only those blocks alike that `folded`, another folding of the same graph, takes for one."""
    likes: dict[tuple[str, ...], int] = {}
    blocks = (replace(block, like=_like(block.ops, folded, likes)) for block in chain.blocks)
    return replace(chain, blocks=tuple(blocks))


def _like(ops: Iterable[str], folded: Folded, likes: dict[tuple[str, ...], int]) -> int:
    return likes.setdefault(tuple(folded.representative[name] for name in ops), len(likes))


@dataclass(frozen=True)
class _Unit:
    """Calls that stay together: a layer, with its path, or a single call."""

    ops: tuple[Op, ...]
    path: str = ""


def _find_cheap(folded: Folded, spaces: Mapping[str, Space]) -> frozenset[str]:
    """Calls of little work that depend on no parameter; of ops that one stands for either all are cheap or none is."""
    graph = folded.graph
    calls = graph.of_kind(OpKind.CALL)
    free: set[str] = {op.name for op in graph.ops if op.kind in (OpKind.INPUT, OpKind.BUFFER)}
    for op in calls:
        if all(value.op in free for value in op.operands):
            free.add(op.name)
    limit = CHEAP_SHARE * sum(_numel(op) for op in calls if op.name not in free)
    # The new value of a buffer is made once, where the layer is that owns the buffer.
    kept = {
        value.op for op in graph.of_kind(OpKind.OUTPUT) for value in op.operands[len(op.operands) - len(op.kwargs.get("updates", ())) :]
    }

    def is_light(op: Op) -> bool:
        space = spaces.get(op.name)
        return space is not None and not space.is_contraction and not space.random and op.name not in kept and _numel(op) <= limit

    barred: set[str] = set()  # representatives
    while True:
        cheap: set[str] = set()
        for op in calls:
            local = all(value.op in cheap or graph.by_name[value.op].kind in (OpKind.INPUT, OpKind.BUFFER) for value in op.operands)
            if local and is_light(op) and folded.representative[op.name] not in barred:
                cheap.add(op.name)
        # The first layer may read an input where the others read the layer before: it keeps its calls then, as they do.
        more = {folded.representative[op.name] for op in calls if op.name not in cheap}
        if not any(folded.representative[name] in more for name in cheap):
            return frozenset(cheap)
        barred |= more


def _numel(op: Op) -> int:
    return sum(tensor.numel for tensor in op.results)


def _find_units(folded: Folded, spaces: Mapping[str, Space], calls: Sequence[Op]) -> list[_Unit]:
    """The layers that can be run in one go, and single calls for all the rest."""
    inside = {op.name for op in calls}
    paths: list[str] = []
    home: dict[str, int] = {}  # call -> number of its layer
    classes: list[range] = []  # numbers of the layers that are alike
    for layer in folded.classes:
        classes.append(range(len(paths), len(paths) + len(layer.paths)))
        for path, instance in zip(layer.paths, layer.instances, strict=True):
            home.update((name, len(paths)) for name in instance if name in inside)
            paths.append(path)
    before, after = _reach(calls, home)
    loose = _find_parallel(classes, home, before) | _find_slight(folded, spaces, calls, classes, home)
    joined: dict[str, int] = {}
    for op in calls:
        around = [number for number in _bits(before[op.name] & after[op.name]) if number not in loose]
        if len(around) == 1:
            # A call that needs a layer and is needed by it belongs to it.
            joined[op.name] = around[0]
        elif around:
            # Layers that need each other can't run one after the other.
            loose.update(around)
    members: dict[int, list[Op]] = defaultdict(list)
    alone: list[_Unit] = []
    for op in calls:
        if op.name in joined and joined[op.name] not in loose:
            members[joined[op.name]].append(op)
        else:
            alone.append(_Unit((op,)))
    return [_Unit(tuple(ops), paths[number]) for number, ops in members.items()] + alone


def _reach(calls: Sequence[Op], home: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Per call the layers that it needs, and those that need it, as bits; its own layer is among both."""
    before: dict[str, int] = {}
    after: dict[str, int] = {op.name: 1 << home[op.name] if op.name in home else 0 for op in calls}
    for op in calls:
        before[op.name] = after[op.name]
        for value in op.operands:
            before[op.name] |= before.get(value.op, 0)
    for op in reversed(calls):
        for value in op.operands:
            if value.op in after:
                after[value.op] |= after[op.name]
    return before, after


def _bits(mask: int) -> Iterator[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def _find_parallel(classes: Sequence[range], home: Mapping[str, int], before: Mapping[str, int]) -> set[int]:
    """Layers that stand beside those like them (experts, heads): only layers that stand behind each other make a chain."""
    needs: dict[int, int] = defaultdict(int)
    for name, number in home.items():
        needs[number] |= before[name] & ~(1 << number)
    parallel: set[int] = set()
    for numbers in classes:
        alike = sum(1 << number for number in numbers)
        first = [number for number in numbers if not needs[number] & alike]
        # Several chains of the same layers each have a first one.
        if 2 * len(first) > len(numbers):
            parallel.update(numbers)
    return parallel


def _find_slight(
    folded: Folded, spaces: Mapping[str, Space], calls: Sequence[Op], classes: Sequence[range], home: Mapping[str, int]
) -> set[int]:
    """Layers that hold too little work to be blocks."""
    work: dict[int, float] = defaultdict(float)
    for op in calls:
        if op.name in home and _is_heavy(folded.graph, spaces, op):
            work[home[op.name]] += _flops_of(spaces, op)
    total = sum(_flops_of(spaces, op) for op in calls)
    slight: set[int] = set()
    for numbers in classes:
        if max(work[number] for number in numbers) < WORK_SHARE * total and sum(work[number] for number in numbers) < LAYERS_SHARE * total:
            slight.update(numbers)
    return slight


def _sort(graph: Graph, calls: Sequence[Op], units: Sequence[_Unit]) -> list[_Unit]:
    """The units in an order in which each comes after what it needs, as near to the graph's order as possible."""
    position = {op.name: index for index, op in enumerate(graph.ops)}
    unit_of = {op.name: number for number, unit in enumerate(units) for op in unit.ops}
    readers: dict[int, set[int]] = defaultdict(set)
    for op in calls:
        for value in op.operands:
            if value.op in unit_of and unit_of[value.op] != unit_of[op.name]:
                readers[unit_of[value.op]].add(unit_of[op.name])
    waiting = Counter(reader for numbers in readers.values() for reader in numbers)
    ready = [(position[unit.ops[0].name], number) for number, unit in enumerate(units) if not waiting[number]]
    heapq.heapify(ready)
    order: list[_Unit] = []
    while ready:
        _, number = heapq.heappop(ready)
        order.append(units[number])
        for reader in readers[number]:
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, (position[units[reader].ops[0].name], reader))
    if len(order) != len(units):
        raise AssertionError("blocks that need each other were not taken apart")
    return order


def _delay(graph: Graph, spaces: Mapping[str, Space], order: Sequence[_Unit]) -> list[_Unit]:
    """The same units, in which a call runs right before its first reader where that lessens what is alive in between."""
    unit_of = {op.name: number for number, unit in enumerate(order) for op in unit.ops}
    readers: dict[Value, set[int]] = defaultdict(set)
    for number, unit in enumerate(order):
        for op in unit.ops:
            for value in op.operands:
                if value.op in unit_of and unit_of[value.op] != number:
                    readers[value].add(number)
    # Cuts lie between layers and heavy calls: where none of these is in between, nothing is gained.
    stops = [0, *accumulate(bool(unit.path) or _is_heavy(graph, spaces, unit.ops[0]) for unit in order)]
    # Where a unit runs: right before unit `anchor` of the order, `steps` before it; (own number, 0) when it isn't moved.
    place: list[tuple[int, int]] = [(number, 0) for number in range(len(order))]
    for number in reversed(range(len(order))):
        unit = order[number]
        if unit.path:
            continue
        (op,) = unit.ops
        results = [Value(op.name, index) for index in range(len(op.results))]
        targets = [place[reader] for value in results for reader in readers[value]]
        if not targets:
            continue
        anchor, steps = min((anchor, -steps) for anchor, steps in targets)
        gained = sum(graph.tensor(value).nbytes for value in results if readers[value])
        longer = sum(
            graph.tensor(value).nbytes
            for value in set(op.operands)
            if value.op in unit_of and not any(place[reader][0] >= anchor for reader in readers[value] if reader != number)
        )
        if longer < gained and stops[anchor] > stops[number + 1]:
            place[number] = (anchor, 1 - steps)
    return [order[number] for number in sorted(range(len(order)), key=lambda number: (place[number][0], -place[number][1], number))]


def _cut(folded: Folded, spaces: Mapping[str, Space], order: Sequence[_Unit]) -> list[_Unit]:
    """The layers, and between them units that end where few bytes are alive."""
    ops = [op for unit in order for op in unit.ops]
    alive = _find_alive(folded.graph, ops)
    sizes = _Sizes(folded.graph, spaces, ops)
    stretches: list[list[int]] = []  # per run of single calls the ends of its units, as counts of calls
    units: dict[int, _Unit] = {}  # by the number of calls before
    start = 0
    for unit in order:
        end = start + len(unit.ops)
        if unit.path:
            units[start] = unit
        elif stretches and stretches[-1][-1] == start:
            stretches[-1][-1] = end
        else:
            stretches.append([start, end])
        start = end
    cuts = [_join_small(sizes, alive, _join_branches(sizes, alive, _find_cuts(sizes, alive, *stretch))) for stretch in stretches]
    _join_most(sizes, cuts)
    units |= {a: _Unit(tuple(ops[a:b])) for bounds in cuts for a, b in pairwise(bounds)}
    return _join_light(folded, sizes, alive, units)


def _join_light(folded: Folded, sizes: _Sizes, alive: Sequence[_Alive], units: Mapping[int, _Unit]) -> list[_Unit]:
    """What stands between two layers and isn't worth a block joins one of them, across the dearer cut: an activation, a sum."""
    starts = sorted(units)
    heavy = {sizes.ops[index].name for index in sizes.heavy}
    order: list[_Unit] = []
    waiting: tuple[Op, ...] = ()  # joins the next layer
    for number, start in enumerate(starts):
        unit = units[start]
        if not unit.path and 0 < number < len(starts) - 1:
            before, after = units[starts[number - 1]], units[starts[number + 1]]
            end = starts[number + 1]
            # A lookup between encoder and decoder stays alone: with it a layer would be unlike the others.
            alike = folded.representative[before.ops[0].name] == folded.representative[after.ops[0].name]
            is_light = sizes.weight(start, end) < 1 and (alike or not any(op.name in heavy for op in unit.ops))
            if before.path and after.path and is_light:
                if alive[start] >= alive[end]:
                    order[-1] = _Unit(order[-1].ops + unit.ops, order[-1].path)
                else:
                    waiting = unit.ops
                continue
        order.append(_Unit(waiting + unit.ops, unit.path))
        waiting = ()
    return order


_Alive = tuple[int, int]
"""Bytes and number of the values that are alive; one value is better than two that hold as much."""


def _find_alive(graph: Graph, ops: Sequence[Op]) -> list[_Alive]:
    """What is made by the first n calls and read by the others, for every n."""
    position = {op.name: index for index, op in enumerate(ops)}
    last = {value: index for index, op in enumerate(ops) for value in op.operands if value.op in position}
    nbytes, values = [0] * (len(ops) + 1), [0] * (len(ops) + 1)
    for value, index in last.items():
        for at, sign in ((position[value.op] + 1, 1), (index + 1, -1)):
            nbytes[at] += sign * graph.tensor(value).nbytes
            values[at] += sign
    return list(zip(accumulate(nbytes), accumulate(values), strict=True))


class _Sizes:
    """Work and parameters of any run of the calls, as shares of the whole model's."""

    def __init__(self, graph: Graph, spaces: Mapping[str, Space], ops: Sequence[Op]) -> None:
        self.ops = ops
        self.heavy = [index for index, op in enumerate(ops) if _is_heavy(graph, spaces, op)]
        self.flops = [0.0]
        self.parameters = [0]
        seen: set[str] = set()
        for op in ops:
            self.flops.append(self.flops[-1] + _flops_of(spaces, op))
            new = {value.op for value in op.operands if graph.by_name[value.op].kind is OpKind.PARAMETER} - seen
            seen |= new
            self.parameters.append(self.parameters[-1] + sum(graph.by_name[name].results[0].nbytes for name in new))

    def work(self, start: int, end: int) -> float:
        return (self.flops[end] - self.flops[start]) / max(1.0, self.flops[-1])

    def depth(self, start: int, end: int) -> int:
        """How many heavy calls stand behind each other."""
        heavy = {self.ops[index].name for index in self.heavy}
        depths: dict[str, int] = {}
        for op in self.ops[start:end]:
            depths[op.name] = max((depths.get(value.op, 0) for value in op.operands), default=0) + (op.name in heavy)
        return max(depths.values(), default=0)

    def weight(self, start: int, end: int) -> float:
        """At least one when the calls are worth a block."""
        parameters = (self.parameters[end] - self.parameters[start]) / max(1, self.parameters[-1])
        return max(self.work(start, end) / WORK_SHARE, parameters / PARAMETER_SHARE)


def _is_heavy(graph: Graph, spaces: Mapping[str, Space], op: Op) -> bool:
    """Whether a block may be made for this call: a product, or a lookup in a parameter."""
    space = spaces.get(op.name)
    if space is None or not space.is_contraction:
        return False
    return space.family is not Family.LOOKUP or any(graph.by_name[value.op].kind is OpKind.PARAMETER for value in op.operands)


def _flops_of(spaces: Mapping[str, Space], op: Op) -> float:
    """Operations of a call; one per element of its results when it has no rule."""
    space = spaces.get(op.name)
    return float(_numel(op)) if space is None else space.flops * space.points()


def _find_cuts(sizes: _Sizes, alive: Sequence[_Alive], start: int, end: int) -> list[int]:
    """Between every two heavy calls the place with the fewest bytes alive, the last of several."""
    inside = [index for index in sizes.heavy if start <= index < end]
    cuts = [min(range(a + 1, b + 1), key=lambda n: (alive[n], -n)) for a, b in pairwise(inside)]
    return [start, *cuts, end]


def _join_branches(sizes: _Sizes, alive: Sequence[_Alive], cuts: list[int]) -> list[int]:
    """Without the cuts that have cheaper ones on both sides, close by."""
    kept = list(cuts)
    for cut in sorted(cuts[1:-1], key=lambda n: alive[n], reverse=True):
        # Nothing is alive before the first call, which says nothing about the cuts after it.
        cheaper = [n for n in kept if n and alive[n] < alive[cut]]
        left, right = max((n for n in cheaper if n < cut), default=None), min((n for n in cheaper if n > cut), default=None)
        if left is None or right is None:
            continue
        if sizes.work(left, right) <= BRANCH_SHARE or sizes.depth(left, right) <= BRANCH_DEPTH:
            kept.remove(cut)
    return kept


def _join_small(sizes: _Sizes, alive: Sequence[_Alive], cuts: list[int]) -> list[int]:
    """With every piece that isn't worth a block joined to a neighbour, across the dearer of its two cuts."""
    kept = list(cuts)
    while len(kept) > 2:
        weights = [sizes.weight(a, b) for a, b in pairwise(kept)]
        smallest = min(range(len(weights)), key=weights.__getitem__)
        if weights[smallest] >= 1:
            break
        ends = [n for n in (smallest, smallest + 1) if 0 < n < len(kept) - 1]
        del kept[max(ends, key=lambda n: alive[kept[n]])]
    return kept


def _join_most(sizes: _Sizes, stretches: list[list[int]]) -> None:
    """Join the two neighbours that hold least until there are few enough pieces, in place."""
    while sum(len(cuts) - 1 for cuts in stretches) > MAX_PIECES:
        joined = [(sizes.weight(cuts[n - 1], cuts[n + 1]), i, n) for i, cuts in enumerate(stretches) for n in range(1, len(cuts) - 1)]
        if not joined:
            break
        _, i, n = min(joined)
        del stretches[i][n]


def _make_blocks(folded: Folded, spaces: Mapping[str, Space], units: Sequence[_Unit]) -> tuple[Block, ...]:
    graph = folded.graph
    position = {op.name: index for index, op in enumerate(graph.ops)}
    last: dict[Value, int] = {}
    home = {op.name: number for number, unit in enumerate(units) for op in unit.ops}
    for number, unit in enumerate(units):
        for op in unit.ops:
            last.update((value, number) for value in op.operands if value.op in home)
    crossing: list[list[Value]] = [[] for _ in units]
    for value in sorted(last, key=lambda value: (position[value.op], value.index)):
        for number in range(home[value.op], last[value]):
            crossing[number].append(value)
    names = _make_names(graph, spaces, units)
    likes: dict[tuple[str, ...], int] = {}
    return tuple(
        Block(
            name=name,
            ops=tuple(op.name for op in unit.ops),
            like=_like((op.name for op in unit.ops), folded, likes),
            crossing=tuple(values),
            crossing_nbytes=sum(graph.tensor(value).nbytes for value in values),
        )
        for name, unit, values in zip(names, units, crossing, strict=True)
    )


def _make_names(graph: Graph, spaces: Mapping[str, Space], units: Sequence[_Unit]) -> list[str]:
    calls = Counter(path for unit in units for op in unit.ops for path in _modules_of(op))
    position = {op.name: index for index, op in enumerate(graph.ops)}
    names: list[str] = []
    used: Counter[str] = Counter()
    for unit in units:
        name = unit.path or _name_of(graph, spaces, sorted(unit.ops, key=lambda op: position[op.name]), calls)
        used[name] += 1
        names.append(name if used[name] == 1 else f"{name}#{used[name]}")
    return names


def _modules_of(op: Op) -> list[str]:
    """The module of a call and those around it."""
    parts = op.layer.split(".") if op.layer else []
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _name_of(graph: Graph, spaces: Mapping[str, Space], ops: Sequence[Op], calls: Mapping[str, int]) -> str:
    """Of the modules that are whole in `ops` the one with most work, then parameters; the outermost of equals, then the first."""
    here = Counter(path for op in ops for path in _modules_of(op))
    work: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for op in ops:
        stored = [graph.by_name[value.op] for value in op.operands if graph.by_name[value.op].kind is OpKind.PARAMETER]
        is_product = op.name in spaces and spaces[op.name].is_product
        paths = [path for path in _modules_of(op) if here[path] == calls[path]]
        for path in paths or [op.layer or (stored[0].target if stored else op.name)]:
            work[path][0] += _flops_of(spaces, op) if is_product else 0.0
            work[path][1] += sum(one.results[0].numel for one in stored)
    return max(work, key=lambda path: (*work[path], -len(path)))
