"""The search problem as plain tables: per node its options with their cost and bytes, per arc the cost of each pair of options.

Comes in: a folded graph with the space of every op, a mesh and a cluster. Goes out: a `Problem` that ``search`` solves and brute force
can check. Nodes are the representatives of ops, one per output tensor, and one *fan-out* per value that several like consumers
read: what is gathered for the first of them serves the others.

Costs are integer nanoseconds of a whole training step, bytes are at one device's peak, both for all the ops that a node stands for.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from autopar.cost_models import Cluster
from autopar.costs import (
    OPTIMIZER_COPIES,
    CostTables,
    Kept,
    count_kept,
    keeps_operand,
    layout_numbers,
    local_nbytes,
    operand_layout_of,
    result_layout_of,
)
from autopar.ir import REPLICATE, Layout, Mesh, Op, OpKind, Placement, Split, StateKind, Tensor, Value
from autopar.search.options import Constraints, call_options, output_options, parameter_options
from autopar.structure import Edge, Model, fan_key

Table = npt.NDArray[np.int64]

FORBIDDEN = 1 << 50
"""Cost of a pair of options that no journey connects; far above any real cost in nanoseconds, far below overflow."""


@dataclass(frozen=True)
class Node:
    """A decision.

    Attributes:
        key: op name; for an output tensor ``output:<position>``, for a fan-out ``fan:<value>:<target>:<operand>``.
        options: placements of a call; layouts of anything else.
        cost: nanoseconds per option; `nbytes`: bytes per option; shape (options,).
    """

    key: str
    options: tuple[Placement | Layout, ...]
    cost: Table
    nbytes: Table


@dataclass(frozen=True)
class Arc:
    """Two decisions that meet: nanoseconds and bytes per pair of options, shape (options of a, options of b)."""

    a: int
    b: int
    cost: Table
    nbytes: Table


@dataclass(frozen=True)
class Problem:
    """Everything the search needs.

    Attributes:
        mesh: the axes that options name.
        fixed_ns, fixed_bytes: nanoseconds and bytes of whatever is chosen.
    """

    nodes: tuple[Node, ...]
    arcs: tuple[Arc, ...]
    mesh: Mesh
    fixed_ns: int
    fixed_bytes: int


def nanoseconds(seconds: float) -> int:
    """Seconds as the solver's integers; with seconds as floats solvers return wrong choices as optimal."""
    return round(seconds * 1e9)


def build_problem(model: Model, mesh: Mesh, cluster: Cluster, constraints: Constraints) -> Problem:
    """The tables of one mesh."""
    return _Builder(model, mesh, CostTables(model, mesh, cluster), constraints).build()


def kept_nbytes(model: Model, kept: Kept, op: Op, placement: Placement, mesh: Mesh) -> int:
    """Bytes on a rank that autograd keeps of the calls that `op` stands for, without copies made for their readers."""
    ways = math.prod(size for part, size in zip(placement, mesh.sizes, strict=True) if isinstance(part, Split))
    saved = sum(
        kept.times[Value(op.name, index)] * local_nbytes(tensor, result_layout_of(model, op, placement, index), mesh)
        for index, tensor in enumerate(op.results)
        if kept.times[Value(op.name, index)]
    )
    return saved + -(-kept.beside[op.name] // ways)


def least_bytes(model: Model, ranks: int) -> int:
    """Bytes that a rank needs at least where everything is split over all ranks and nothing is run again: no placement needs less."""
    graph = model.folded.graph
    kept = count_kept(model)
    total = sum(times * graph.tensor(value).nbytes for value, times in kept.times.items()) + sum(kept.beside.values())
    for op in graph.of_kind(OpKind.PARAMETER):
        total += op.results[0].nbytes * (2 + OPTIMIZER_COPIES if op.results[0].requires_grad else 1)
    return -(-total // ranks)


def restrict(problem: Problem, allowed: Mapping[str, Sequence[int]]) -> Problem:
    """The problem with these options alone, by node key and position; nodes that aren't named keep all."""
    rows = [np.array(allowed.get(node.key, range(len(node.options))), dtype=np.int64) for node in problem.nodes]
    nodes = tuple(
        Node(node.key, tuple(node.options[i] for i in left.tolist()), node.cost[left], node.nbytes[left])
        for node, left in zip(problem.nodes, rows, strict=True)
    )
    arcs = tuple(
        Arc(arc.a, arc.b, arc.cost[np.ix_(rows[arc.a], rows[arc.b])], arc.nbytes[np.ix_(rows[arc.a], rows[arc.b])]) for arc in problem.arcs
    )
    return replace(problem, nodes=nodes, arcs=arcs)


class _Builder:
    """Collects nodes and arcs; lives only while one problem is built."""

    def __init__(self, model: Model, mesh: Mesh, tables: CostTables, constraints: Constraints) -> None:
        self.model = model
        self.graph = model.folded.graph
        self.mesh = mesh
        self.tables = tables
        self.constraints = constraints
        self.whole: Layout = tuple(REPLICATE for _ in mesh.sizes)
        self.nodes: list[Node] = []
        self.arcs: dict[tuple[int, int], tuple[Table, Table]] = {}
        self.index: dict[str, int] = {}
        self.kept = count_kept(model)
        self.made: dict[Value, list[Layout]] = {}  # per value, per option of its op, the layout made
        self.first = tables.first
        self.times = mesh.sizes[0] if tables.first else 1
        self.pairs: dict[tuple[object, ...], Table] = {}  # per tensor type and layouts, the cost of one journey
        self.needs: dict[tuple[str, int], list[Layout]] = {}  # per operand, per option of its op, the layout needed

    def build(self) -> Problem:
        for op in self.model.folded.ops:
            if op.kind is OpKind.CALL:
                self._add_call(op)
            elif op.kind is OpKind.OUTPUT:
                self._add_outputs(op)
            else:
                self._add_stored(op)
        by_value: dict[Value, list[Edge]] = defaultdict(list)
        for edge in self.model.folded.edges:
            by_value[edge.value].append(edge)
        for value, edges in by_value.items():
            self._connect(value, edges)
        arcs = tuple(Arc(a, b, cost, nbytes) for (a, b), (cost, nbytes) in self.arcs.items())
        return Problem(tuple(self.nodes), arcs, self.mesh, fixed_ns=0, fixed_bytes=0)

    def _add(self, key: str, options: Sequence[Placement | Layout], cost: Iterable[int], nbytes: Iterable[int]) -> None:
        self.index[key] = len(self.nodes)
        self.nodes.append(
            Node(
                key,
                tuple(options),
                np.fromiter(cost, dtype=np.int64, count=len(options)),
                np.fromiter(nbytes, dtype=np.int64, count=len(options)),
            )
        )

    def _add_call(self, op: Op) -> None:
        count = self.model.folded.count[op.name]
        options = call_options(self.model, op, self.mesh, self.constraints)
        for i in range(len(op.operands)):
            self.needs[op.name, i] = [operand_layout_of(self.model, op, option, i) for option in options]
        for i in range(len(op.results)):
            self.made[Value(op.name, i)] = [result_layout_of(self.model, op, option, i) for option in options]
        costs = [count * self.times * nanoseconds(sum(self.tables.op_seconds(op, option))) for option in options]
        self._add(op.name, options, costs, [kept_nbytes(self.model, self.kept, op, option, self.mesh) for option in options])

    def _add_stored(self, op: Op) -> None:
        count = self.model.folded.count[op.name]
        tensor = op.results[0]
        is_parameter = op.kind is OpKind.PARAMETER
        options = parameter_options(self.model, op, self.mesh, self.constraints) if is_parameter else [self.whole]
        self.made[Value(op.name)] = list(options)
        copies = 2 + OPTIMIZER_COPIES if is_parameter and tensor.requires_grad else 1
        costs = [count * nanoseconds(self.tables.optimizer_seconds(tensor, layout)) for layout in options]
        self._add(op.name, options, costs, [count * copies * local_nbytes(tensor, layout, self.mesh) for layout in options])

    def _add_outputs(self, op: Op) -> None:
        updates = len(op.operands) - len(op.kwargs.get("updates", ()))
        for position, value in enumerate(op.operands):
            key = f"output:{position}"
            # The new value of a buffer goes where the old one was, and buffers are whole on every rank.
            time = REPLICATE if self.model.micro is None else self.model.micro.states[value]
            options = output_options(self.graph.tensor(value), self.mesh, time) if position < updates else [self.whole]
            self.needs[key, 0] = list(options)
            self._add(key, options, [0] * len(options), [0] * len(options))

    def _connect(self, value: Value, edges: Sequence[Edge]) -> None:
        """Arcs from `value` to everything that reads it, like consumers through a fan-out."""
        producer = self.graph.by_name[value.op]
        alike: dict[tuple[str, int], list[Edge]] = defaultdict(list)
        for edge in edges:
            consumer = self.graph.by_name[edge.consumer]
            alike[consumer.target, edge.operand].append(edge)
        uses = sum(edge.count for edge in edges) // max(1, self.model.folded.count[producer.name])
        for (target, operand), group in alike.items():
            if len(group) == 1 or producer.kind is OpKind.PARAMETER or target == "output" or producer.name in self.model.tables:
                for edge in group:
                    key = f"output:{edge.operand}" if target == "output" else edge.consumer
                    self._add_arc(value, key, 0 if target == "output" else operand, edge.count, max(1, uses))
                continue
            self._add_fan_out(value, target, operand, group)

    def _add_fan_out(self, value: Value, target: str, operand: int, group: Sequence[Edge]) -> None:
        key = fan_key(value, target, operand)
        options = sorted({need for edge in group for need in self.needs[edge.consumer, operand]}, key=str)
        self.needs[key, 0] = options
        self._add(key, options, [0] * len(options), [0] * len(options))
        self._add_arc(value, key, 0, self.model.folded.read[value, target, operand], 1)
        tensor = self.graph.tensor(value)
        for edge in group:
            needs = self.needs[edge.consumer, operand]
            cost = self._pair_costs(tensor, options, needs, edge.count)
            nbytes = self._copy_nbytes(value, options, needs, edge.count, is_kept=keeps_operand(self.model, edge.consumer, operand))
            self._store(self.index[key], self.index[edge.consumer], cost, nbytes)

    def _copy_nbytes(self, value: Value, starts: Sequence[Layout], needs: Sequence[Layout], count: int, *, is_kept: bool) -> Table:
        """Bytes of the copies that a journey makes: a consumer that keeps its operand keeps the copy that was made for it."""
        tensor = self.graph.tensor(value)

        def copied(start: Layout, need: Layout) -> int:
            is_made = is_kept and self.kept.is_copied(self.graph.by_name[value.op].kind, value, start[self.first :], need[self.first :])
            return count * local_nbytes(tensor, need, self.mesh) if is_made else 0

        return _expand(starts, needs, copied)

    def _pair_costs(self, tensor: Tensor, starts: Sequence[Layout], needs: Sequence[Layout], count: int) -> Table:
        """Cost of getting from each of `starts` to each of `needs`; like tensors between like layouts share one table."""

        def cost(start: Layout, need: Layout) -> int:
            if start == need:
                return 0
            if any(state.kind is StateKind.BROADCAST for state in start[self.first :]):
                return FORBIDDEN  # what was gathered to work on in parts can't be handed on as a whole
            forward, backward = self.tables.journey_seconds(tensor, start, need, backward=tensor.requires_grad)
            return self.times * nanoseconds(forward + backward)

        row_kinds, row_of = layout_numbers(starts)
        column_kinds, column_of = layout_numbers(needs)
        key = (tensor, tuple(row_kinds), tuple(column_kinds))
        if key not in self.pairs:
            self.pairs[key] = _expand(row_kinds, column_kinds, cost)
        once = self.pairs[key][np.ix_(row_of, column_of)]
        # Times the count, FORBIDDEN itself would overflow for the many thousand experts of a large model.
        return np.where(once >= FORBIDDEN, FORBIDDEN, np.minimum(once, FORBIDDEN // count) * count)

    def _add_arc(self, value: Value, key: str, operand: int, count: int, uses: int) -> None:
        producer = self.graph.by_name[value.op]
        tensor = producer.results[value.index]
        starts, needs = self.made[value], self.needs[key, operand]
        is_output = key.startswith("output:")
        if producer.kind is OpKind.PARAMETER:

            def parameter_cost(start: Layout, need: Layout) -> int:
                if start == need:
                    return 0
                gathered, deferred = self.tables.parameter_seconds(tensor, start, need, uses)
                return count * nanoseconds(self.times * gathered + deferred)

            cost = _expand(starts, needs, parameter_cost)
        elif is_output:

            def output_cost(start: Layout, need: Layout) -> int:
                # Whether a gradient comes back depends on the user's loop; what is returned beside a loss gets none.
                return count * self.times * nanoseconds(self.tables.journey_seconds(tensor, start, need, backward=False)[0])

            cost = _expand(starts, needs, output_cost)
        else:
            cost = self._pair_costs(tensor, starts, needs, count)
        if is_output:
            nbytes = self._output_nbytes(value, starts, needs)
        else:
            is_kept = key.startswith("fan:") or keeps_operand(self.model, key, operand)
            nbytes = self._copy_nbytes(value, starts, needs, count, is_kept=is_kept)
        self._store(self.index[value.op], self.index[key], cost, nbytes)

    def _output_nbytes(self, value: Value, starts: Sequence[Layout], needs: Sequence[Layout]) -> Table:
        """Bytes of an output while the backward runs, where nobody else keeps them."""
        tensor = self.graph.tensor(value)
        is_held = value in self.kept.times or self.graph.by_name[value.op].kind is not OpKind.CALL

        def held(start: Layout, need: Layout) -> int:
            return 0 if is_held and start[self.first :] == need[self.first :] else local_nbytes(tensor, need, self.mesh)

        return _expand(starts, needs, held)

    def _store(self, a: int, b: int, cost: Table, nbytes: Table) -> None:
        if a == b:  # a layer that feeds the next like one: both ends are the same decision
            node = self.nodes[a]
            self.nodes[a] = Node(node.key, node.options, node.cost + np.diagonal(cost), node.nbytes + np.diagonal(nbytes))
            return
        if a > b:
            a, b, cost, nbytes = b, a, cost.T, nbytes.T
        if (a, b) in self.arcs:
            before = self.arcs[a, b]
            self.arcs[a, b] = (np.minimum(before[0] + cost, FORBIDDEN), before[1] + nbytes)
        else:
            self.arcs[a, b] = (cost, nbytes)


def _expand(rows: Sequence[Layout], columns: Sequence[Layout], cost: Callable[[Layout, Layout], int]) -> Table:
    """The table of `cost` over all pairs, calling it once per distinct pair."""
    row_kinds, row_of = layout_numbers(rows)
    column_kinds, column_of = layout_numbers(columns)
    small = np.array([[cost(row, column) for column in column_kinds] for row in row_kinds], dtype=np.int64)
    return small[np.ix_(row_of, column_of)]
