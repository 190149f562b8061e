r"""Exact elimination of nodes before the solver sees the problem: no optimum is lost.

Comes in: the nodes and arcs of a `Problem`, a price of memory in nanoseconds per byte. Goes out: a `Core`, the few nodes that are left, and
how to complete a choice of options for them to one for all nodes.

With :math:`w_v` the weights of a node's options and :math:`w_{uv}` those of an arc's pairs of options,

- a node with one option adds its arcs to its neighbours: :math:`w_u(i) \leftarrow w_u(i) + w_{uv}(i, 0)`;
- a node :math:`v` with one neighbour :math:`u` folds into it: :math:`w_u(i) \leftarrow w_u(i) + \min_k (w_{uv}(i, k) + w_v(k))`;
- a node :math:`v` with two neighbours becomes an arc between them:
  :math:`w_{tu}(i, j) \leftarrow w_{tu}(i, j) + \min_k (w_{tv}(i, k) + w_v(k) + w_{uv}(j, k))`.

The last two are reductions RI and RII of partitioned boolean quadratic programming (Scholz and Eckstein 2002, "Register allocation for
irregular architectures"). Most ops of a model sit in chains; what is left is where a layer's branches meet.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autopar.search.placement.problem import FORBIDDEN, Arc, Node, Table


@dataclass(frozen=True)
class Costs:
    """Three tables of one shape: weights, which are minimised (nanoseconds, and bytes at their price), nanoseconds and bytes.

    The shape is (options,) for a node and (options, options) for an arc.
    """

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
    """A node that was eliminated.

    Attributes:
        node: its index.
        neighbours: indices of the nodes that it had arcs to then; none, one or two.
        best: its best option for every combination of their options, an axis for each neighbour.
    """

    node: int
    neighbours: tuple[int, ...]
    best: Table


@dataclass(frozen=True)
class Core:
    """What is left of a problem.

    Attributes:
        nodes: costs of each node left, by its index in the problem.
        arcs: costs of each arc left, by the indices of its ends, the smaller first.
        removed: nodes that were eliminated, in that order.
    """

    nodes: Mapping[int, Costs]
    arcs: Mapping[tuple[int, int], Costs]
    removed: tuple[Removed, ...]

    def complete(self, choice: Mapping[int, int]) -> dict[int, int]:
        """The options of all nodes (index of the node -> index of the option), given those of the nodes left."""
        complete = dict(choice)
        for removed in reversed(self.removed):
            complete[removed.node] = int(removed.best[tuple(complete[neighbour] for neighbour in removed.neighbours)])
        return complete


def eliminate(nodes: Sequence[Node], arcs: Sequence[Arc], price: float, keep: Collection[int] = ()) -> Core:
    """Eliminate all nodes that can be.

    Args:
        nodes: the nodes of a problem.
        arcs: its arcs, which name nodes by their index.
        price: nanoseconds per byte of memory; an infinite price counts bytes alone.
        keep: indices of nodes that aren't eliminated.
    """
    costs_of = {i: _priced(node.cost, node.nbytes, price) for i, node in enumerate(nodes)}  # of the nodes left
    arcs_of: dict[int, dict[int, Costs]] = {i: {} for i in costs_of}  # per node left, its arcs by the other end

    def connect(a: int, b: int, costs: Costs) -> None:
        if b in arcs_of[a]:
            costs = arcs_of[a][b] + costs
        arcs_of[a][b] = costs
        arcs_of[b][a] = costs.transposed

    for arc in arcs:
        connect(arc.a, arc.b, _priced(arc.cost, arc.nbytes, price))
    removed: list[Removed] = []
    for node in [i for i, costs in costs_of.items() if len(costs.weight) == 1 and i not in keep]:
        for neighbour, table in arcs_of[node].items():
            options = np.arange(len(costs_of[neighbour].weight))
            costs_of[neighbour] = costs_of[neighbour] + table.transposed.pick(options, np.zeros(1, dtype=np.int64))
            del arcs_of[neighbour][node]
        arcs_of[node] = {}
    pending = [i for i in costs_of if len(arcs_of[i]) <= 2]
    while pending:
        node = pending.pop()
        if node not in costs_of or node in keep or len(arcs_of[node]) > 2 or len(costs_of) == 1:
            continue
        node_costs = costs_of.pop(node)
        neighbours = tuple(arcs_of.pop(node))
        tables = [arcs_of[neighbour].pop(node) for neighbour in neighbours]  # (neighbour's options, the node's options)
        if len(neighbours) == 1:
            removal, costs = _fold(node, neighbours[0], tables[0], node_costs)
            costs_of[neighbours[0]] = costs_of[neighbours[0]] + costs
        elif len(neighbours) == 2:
            removal, costs = _bridge(node, neighbours, tables, node_costs)
            connect(*neighbours, costs)
        else:
            # The costs of a node without arcs are added to those of any node left, whatever its option.
            removal = Removed(node, (), np.array(np.argmin(node_costs.weight)))
            anchor = next(iter(costs_of))
            shape = costs_of[anchor].cost.shape
            least = (np.broadcast_to(table[removal.best], shape) for table in (node_costs.weight, node_costs.cost, node_costs.nbytes))
            costs_of[anchor] = costs_of[anchor] + Costs(*least)
        removed.append(removal)
        pending.extend(neighbour for neighbour in neighbours if len(arcs_of[neighbour]) <= 2)
    core_arcs = {(a, b): costs for a, arcs_of_a in arcs_of.items() for b, costs in arcs_of_a.items() if a < b}
    return Core(costs_of, core_arcs, tuple(removed))


def _priced(cost: Table, nbytes: Table, price: float) -> Costs:
    """The tables with their weights at a price of memory."""
    if price == math.inf:
        weight = np.where(cost >= FORBIDDEN, FORBIDDEN, nbytes)
    else:
        # Rounded down, so that a lower bound on the weights is one on cost + price * bytes.
        weight = np.floor(cost + price * nbytes).astype(np.int64) if price else cost
    return Costs(np.minimum(weight, FORBIDDEN), cost, nbytes)


def _fold(node: int, neighbour: int, table: Costs, node_costs: Costs) -> tuple[Removed, Costs]:
    """Reduction RI: what the node at its best, and its arc, cost for each option of its only neighbour."""
    total = table + Costs(node_costs.weight[None], node_costs.cost[None], node_costs.nbytes[None])
    best = np.argmin(total.weight, axis=1)
    return Removed(node, (neighbour,), best), total.pick(np.arange(len(best)), best)


def _bridge(node: int, neighbours: tuple[int, ...], tables: Sequence[Costs], node_costs: Costs) -> tuple[Removed, Costs]:
    """Reduction RII: what the node at its best, and its two arcs, cost for each pair of options of its neighbours."""
    with_node = tables[0] + Costs(node_costs.weight[None], node_costs.cost[None], node_costs.nbytes[None])
    arc = tables[1]
    total = with_node.weight[:, None, :] + arc.weight[None, :, :]  # (options of either neighbour, the node's options)
    best = np.argmin(total, axis=2)
    rows, columns = np.indices(best.shape)
    return Removed(node, neighbours, best), with_node.pick(rows, best) + arc.pick(columns, best)
