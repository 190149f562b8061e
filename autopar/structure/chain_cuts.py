"""Where the blocks of a chain end: between layers, and elsewhere where few bytes are alive.

Comes in: the units of ``chain_order``, in the order in which they run. Goes out: the units that become blocks. Layers are taken as they
are. Each stretch of single calls between two layers, before the first or after the last, is cut in four steps:

1. between every two heavy calls (`is_heavy`), at the place with the fewest bytes alive;
2. without cuts inside of a branch, as from q to k: those that have cheaper cuts close by on both sides;
3. without blocks that are too small: their weight is below 1, where ::

       weight = max(share of the model's flops / WORK_SHARE, share of the bytes of its parameters / PARAMETER_SHARE)

4. without the cuts that part the least weight, until there are at most MAX_BLOCKS such blocks in all.

At last what stands between two layers and is too small for a block joins one of the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from autopar.ir import Graph, Op, OpKind, Space
from autopar.structure.chain_order import WORK_SHARE, Unit
from autopar.structure.layers import Folded
from autopar.structure.measures import Alive, count_flops, find_alive, is_heavy

MAX_BLOCKS = 64
"""Blocks that aren't repeated layers: a model has at most so many."""

# A block has at least `WORK_SHARE` of the model's flops or this share of the bytes of its parameters, which matter for memory only, unless
# it is a layer or stands between two.
PARAMETER_SHARE = 1 / 10

# A cut with cheaper ones on both sides isn't made when these are close: when the calls between them have at most this share of the model's
# flops, or at most this many heavy calls follow one another between them (an attention has q, scores, values and output). The skips of a
# U-Net span more, and cuts below them are made.
BRANCH_SHARE = 1 / 6
BRANCH_DEPTH = 4


def cut_units(folded: Folded, spaces: Mapping[str, Space], order: Sequence[Unit]) -> list[Unit]:
    """The units that become blocks: the layers of `order`, and between them runs of its single calls that end where few bytes are alive.

    Args:
        folded: the graph.
        spaces: of every call that has a rule.
        order: layers and single calls, as they run (`order_units`).
    """
    ops = [op for unit in order for op in unit.ops]
    alive = find_alive(folded.graph, ops)
    sizes = _Sizes(folded.graph, spaces, ops)
    stretches: list[list[int]] = []  # per run of single calls [start, end], as numbers of calls before
    units: dict[int, Unit] = {}  # by the number of calls before
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
    cuts = [_drop_small(sizes, alive, _drop_branches(sizes, alive, _find_cuts(sizes, alive, *stretch))) for stretch in stretches]
    _drop_excess(sizes, cuts)
    units |= {start: Unit(tuple(ops[start:end])) for ends in cuts for start, end in pairwise(ends)}
    return _join_light(folded, sizes, alive, units)


class _Sizes:
    """Work and parameters of any run of calls, as shares of the model's: running sums, made once.

    A run is given by the numbers of calls before its first and before the first after it.
    """

    def __init__(self, graph: Graph, spaces: Mapping[str, Space], ops: Sequence[Op]) -> None:
        self.ops = ops
        self.heavy = [index for index, op in enumerate(ops) if is_heavy(graph, spaces, op)]
        self.heavy_names = {ops[index].name for index in self.heavy}
        self.flops = [0.0]  # entry n: of the first n calls
        self.parameters = [0]  # bytes; a parameter counts with the first call that reads it
        seen: set[str] = set()
        for op in ops:
            self.flops.append(self.flops[-1] + count_flops(spaces, op))
            new = {value.op for value in op.operands if graph.by_name[value.op].kind is OpKind.PARAMETER} - seen
            seen |= new
            self.parameters.append(self.parameters[-1] + sum(graph.by_name[name].results[0].nbytes for name in new))

    def work(self, start: int, end: int) -> float:
        """Share of the model's flops."""
        return (self.flops[end] - self.flops[start]) / max(1.0, self.flops[-1])

    def depth(self, start: int, end: int) -> int:
        """Most heavy calls of which each depends on the one before."""
        depths: dict[str, int] = {}
        for op in self.ops[start:end]:
            depths[op.name] = max((depths.get(value.op, 0) for value in op.operands), default=0) + (op.name in self.heavy_names)
        return max(depths.values(), default=0)

    def weight(self, start: int, end: int) -> float:
        """At least 1 when the calls are worth a block; see the module's docstring."""
        parameters = (self.parameters[end] - self.parameters[start]) / max(1, self.parameters[-1])
        return max(self.work(start, end) / WORK_SHARE, parameters / PARAMETER_SHARE)


def _find_cuts(sizes: _Sizes, alive: Sequence[Alive], start: int, end: int) -> list[int]:
    """Both ends of a stretch, and between every two of its heavy calls the place with the fewest bytes alive, the last of equals."""
    heavy = [index for index in sizes.heavy if start <= index < end]
    cuts = [min(range(earlier + 1, later + 1), key=lambda place: (alive[place], -place)) for earlier, later in pairwise(heavy)]
    return [start, *cuts, end]


def _drop_branches(sizes: _Sizes, alive: Sequence[Alive], cuts: Sequence[int]) -> list[int]:
    """The cuts without those that have cheaper ones on both sides, close by; the dearest are dropped first."""
    remaining = list(cuts)
    for cut in sorted(cuts[1:-1], key=lambda place: alive[place], reverse=True):
        # Nothing is alive before the first call, which says nothing about the cuts after it.
        cheaper = [place for place in remaining if place and alive[place] < alive[cut]]
        left = max((place for place in cheaper if place < cut), default=None)
        right = min((place for place in cheaper if place > cut), default=None)
        if left is None or right is None:
            continue
        if sizes.work(left, right) <= BRANCH_SHARE or sizes.depth(left, right) <= BRANCH_DEPTH:
            remaining.remove(cut)
    return remaining


def _drop_small(sizes: _Sizes, alive: Sequence[Alive], cuts: Sequence[int]) -> list[int]:
    """The cuts without one end of every run that isn't worth a block: of its two ends the one where more bytes are alive."""
    remaining = list(cuts)
    while len(remaining) > 2:
        weights = [sizes.weight(start, end) for start, end in pairwise(remaining)]
        smallest = min(range(len(weights)), key=weights.__getitem__)
        if weights[smallest] >= 1:
            break
        inner_ends = [end for end in (smallest, smallest + 1) if 0 < end < len(remaining) - 1]
        del remaining[max(inner_ends, key=lambda end: alive[remaining[end]])]
    return remaining


def _drop_excess(sizes: _Sizes, stretches: list[list[int]]) -> None:
    """Drop cuts, in place, until at most MAX_BLOCKS runs remain or each stretch is one: those first whose two neighbours hold least."""
    while sum(len(cuts) - 1 for cuts in stretches) > MAX_BLOCKS:
        joins = [
            (sizes.weight(cuts[cut - 1], cuts[cut + 1]), stretch, cut)
            for stretch, cuts in enumerate(stretches)
            for cut in range(1, len(cuts) - 1)
        ]
        if not joins:
            break
        _, stretch, cut = min(joins)
        del stretches[stretch][cut]


def _join_light(folded: Folded, sizes: _Sizes, alive: Sequence[Alive], units: Mapping[int, Unit]) -> list[Unit]:
    """The units in order, where what stands between two layers and isn't worth a block has joined one of them.

    It joins across the place where more bytes are alive, so that the block ends at the other. `units` are by the number of calls before.
    """
    starts = sorted(units)
    order: list[Unit] = []
    joins_next: tuple[Op, ...] = ()
    for number, start in enumerate(starts):
        unit = units[start]
        if not unit.path and 0 < number < len(starts) - 1:
            before, after = units[starts[number - 1]], units[starts[number + 1]]
            end = starts[number + 1]
            # A lookup between encoder and decoder stays alone: with it a layer would be unlike the others.
            is_alike = folded.representative[before.ops[0].name] == folded.representative[after.ops[0].name]
            has_heavy = any(op.name in sizes.heavy_names for op in unit.ops)
            if before.path and after.path and sizes.weight(start, end) < 1 and (is_alike or not has_heavy):
                if alive[start] >= alive[end]:
                    order[-1] = Unit(order[-1].ops + unit.ops, order[-1].path)
                else:
                    joins_next = unit.ops
                continue
        order.append(Unit(joins_next + unit.ops, unit.path))
        joins_next = ()
    return order
