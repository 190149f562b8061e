"""Exact elimination of decisions before the solver sees the problem; nothing is lost.

Most ops of a model sit in chains. A node with one option adds its arcs to its neighbours; a node with one neighbour folds into it; a
node with two becomes an arc between them, for the best own option is known for each pair of the neighbours' options. These are
the reductions of partitioned boolean quadratic programming (Scholz and Eckstein 2002). What is left, the core, is where a layer's
branches meet.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autopar.search.placement.problem import FORBIDDEN, Arc, Node, Table


@dataclass(frozen=True)
class Costs:
    """One table three times: what is minimised (`weight`), nanoseconds and bytes."""

    weight: Table
    cost: Table
    nbytes: Table

    def __add__(self, other: Costs) -> Costs:
        weight = np.minimum(self.weight + other.weight, FORBIDDEN)
        return Costs(weight, np.minimum(self.cost + other.cost, FORBIDDEN), self.nbytes + other.nbytes)

    def pick(self, *index: Table) -> Costs:
        """The entries at `index`, numpy's advanced indexing."""
        return Costs(self.weight[index], self.cost[index], self.nbytes[index])

    @property
    def transposed(self) -> Costs:
        """The table seen from the other end."""
        return Costs(self.weight.T, self.cost.T, self.nbytes.T)


@dataclass(frozen=True)
class Removed:
    """A node that was eliminated: its best option for every combination of its neighbours' options."""

    node: int
    neighbours: tuple[int, ...]
    best: Table


@dataclass(frozen=True)
class Core:
    """What is left: costs per remaining node and arc (``a < b``), and how to find the options of the others."""

    nodes: Mapping[int, Costs]
    arcs: Mapping[tuple[int, int], Costs]
    removed: tuple[Removed, ...]

    def complete(self, choice: Mapping[int, int]) -> dict[int, int]:
        """The options of all nodes, given those of the core's."""
        full = dict(choice)
        for gone in reversed(self.removed):
            full[gone.node] = int(gone.best[tuple(full[n] for n in gone.neighbours)])
        return full


def eliminate(nodes: Sequence[Node], arcs: Sequence[Arc], price: float, keep: Collection[int] = ()) -> Core:
    """Reduce a problem in which a byte of memory costs `price` nanoseconds; an infinite price counts bytes alone.

    Nodes in `keep`, by index, stay decisions.
    """
    left = {i: _priced(node.cost, node.nbytes, price) for i, node in enumerate(nodes)}
    between: dict[int, dict[int, Costs]] = {i: {} for i in left}

    def connect(a: int, b: int, costs: Costs) -> None:
        if b in between[a]:
            costs = between[a][b] + costs
        between[a][b] = costs
        between[b][a] = costs.transposed

    for arc in arcs:
        connect(arc.a, arc.b, _priced(arc.cost, arc.nbytes, price))
    removed: list[Removed] = []
    for node in [i for i, costs in left.items() if len(costs.weight) == 1 and i not in keep]:
        for neighbour, table in between[node].items():
            left[neighbour] = left[neighbour] + table.transposed.pick(np.arange(len(left[neighbour].weight)), np.zeros(1, dtype=np.int64))
            del between[neighbour][node]
        between[node] = {}
    waiting = [i for i in left if len(between[i]) <= 2]
    while waiting:
        node = waiting.pop()
        if node not in left or node in keep or len(between[node]) > 2 or len(left) == 1:
            continue
        own = left.pop(node)
        near = tuple(between.pop(node))
        tables = [between[n].pop(node) for n in near]  # (neighbour's options, own options)
        if len(near) == 1:
            gone, costs = _fold(node, near[0], tables[0], own)
            left[near[0]] = left[near[0]] + costs
        elif len(near) == 2:
            gone, costs = _bridge(node, near, tables, own)
            connect(*near, costs)
        else:
            gone, costs = Removed(node, (), np.array(np.argmin(own.weight))), own
            anchor = next(iter(left))
            best = tuple(np.broadcast_to(t[gone.best], left[anchor].cost.shape) for t in (own.weight, own.cost, own.nbytes))
            left[anchor] = left[anchor] + Costs(*best)
        removed.append(gone)
        waiting.extend(n for n in near if len(between[n]) <= 2)
    remaining = {(a, b): costs for a, others in between.items() for b, costs in others.items() if a < b}
    return Core(left, remaining, tuple(removed))


def _priced(cost: Table, nbytes: Table, price: float) -> Costs:
    if price == math.inf:
        weight = np.where(cost >= FORBIDDEN, FORBIDDEN, nbytes)
    else:
        # Rounded down, so that what is proven of the weights holds for the numbers themselves.
        weight = np.floor(cost + price * nbytes).astype(np.int64) if price else cost
    return Costs(np.minimum(weight, FORBIDDEN), cost, nbytes)


def _fold(node: int, neighbour: int, table: Costs, own: Costs) -> tuple[Removed, Costs]:
    total = table + Costs(own.weight[None], own.cost[None], own.nbytes[None])
    best = np.argmin(total.weight, axis=1)
    return Removed(node, (neighbour,), best), total.pick(np.arange(len(best)), best)


def _bridge(node: int, near: tuple[int, ...], tables: Sequence[Costs], own: Costs) -> tuple[Removed, Costs]:
    first = tables[0] + Costs(own.weight[None], own.cost[None], own.nbytes[None])
    second = tables[1]
    total = first.weight[:, None, :] + second.weight[None, :, :]  # (options of first, options of second, own options)
    best = np.argmin(total, axis=2)
    rows, columns = np.indices(best.shape)
    return Removed(node, near, best), first.pick(rows, best) + second.pick(columns, best)
