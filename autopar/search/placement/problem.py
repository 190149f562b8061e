"""The search problem as plain tables: per node its options with their cost and bytes, per arc the cost of each pair of options.

Comes in: a folded graph with the space of every op, a mesh and a cluster. Goes out: a `Problem` that ``solve`` solves and brute force
can check. Decisions are the placements of ops, the layouts of stored tensors and of outputs, and one *fan-out* per value that several
ops read: a second layout in which the value is made once for all who need it so. Beside that second layout, and the one in which it is
made, every reader pays for its own; the program, which makes a value once per distinct layout, is then cheaper than the table says.

Costs are integer nanoseconds of a whole training step, bytes are at one device's peak, both for all the ops that a node stands for.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from autopar.cost_models import Cluster
from autopar.costs import (
    OPTIMIZER_COPIES,
    CostTables,
    SavedTensors,
    Sharding,
    count_saved,
    count_uses,
    layout_numbers,
    local_nbytes,
    operand_layout_of,
    result_layout_of,
    saves_operand,
)
from autopar.ir import REPLICATE, Layout, Mesh, Op, OpKind, Placement, Split, StateKind, Tensor, Value
from autopar.search.options import Constraints, call_options, output_options, parameter_options
from autopar.structure import Edge, Model

Table = npt.NDArray[np.int64]
Option = Placement | Layout | tuple[Layout, Layout]

FORBIDDEN = 1 << 50
"""Cost of a pair of options that no journey connects; far above any real cost in nanoseconds, far below overflow."""


class DecisionKind(StrEnum):
    """What is decided about the subject of a decision."""

    CALL = "call"  # the placement of a call
    STORED = "stored"  # the layout in which a parameter, buffer or input is
    OUTPUT = "output"  # the layout in which an output is handed over
    FAN_OUT = "fan-out"  # the layout in which a value is made once more for several of its readers


@dataclass(frozen=True, slots=True)
class Decision:
    """What the search decides about: a kind and its subject.

    Attributes:
        kind: what is decided.
        op: name of the call or of what is stored; of the op that makes the value for a fan-out; empty for an output.
        number: position of the output; number of the fan-out's value among its op's results, and of its readers' set.
    """

    kind: DecisionKind
    op: str = ""
    number: tuple[int, ...] = ()

    def __str__(self) -> str:
        return " ".join([self.kind.value, *filter(None, [self.op]), *map(str, self.number)])


def decision_of(op: Op) -> Decision:
    """The decision about an op that isn't the output."""
    return Decision(DecisionKind.CALL if op.kind is OpKind.CALL else DecisionKind.STORED, op.name)


def output_decision(position: int) -> Decision:
    """The decision about the output at `position`."""
    return Decision(DecisionKind.OUTPUT, number=(position,))


# Pairs of layouts that a fan-out may choose among, at most. Where there are more, as on several free axes, the linear model would grow too
# large: only readers of one kind of op then share a copy, and others pay for theirs, which is never too little.
FULL_FAN_OUT = 64


@dataclass(frozen=True)
class Node:
    """A decision and its options.

    Attributes:
        decision: what is decided.
        options: placements of a call; layouts of what is stored or handed over; of a fan-out pairs (made, copied) of layouts, alike where
            there is no copy, or the layout of a copy that all of its readers take.
        cost: nanoseconds per option; `nbytes`: bytes per option; shape (options,).
    """

    decision: Decision
    options: tuple[Option, ...]
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


def saved_nbytes(model: Model, saved: SavedTensors, op: Op, placement: Placement, mesh: Mesh) -> int:
    """Bytes on a rank that autograd saves of the calls that `op` stands for, without copies made for their readers."""
    ways = math.prod(size for part, size in zip(placement, mesh.sizes, strict=True) if isinstance(part, Split))
    of_results = sum(
        saved.times[Value(op.name, index)] * local_nbytes(tensor, result_layout_of(model, op, placement, index), mesh)
        for index, tensor in enumerate(op.results)
        if saved.times[Value(op.name, index)]
    )
    return of_results + -(-saved.extra_nbytes[op.name] // ways)


def least_bytes(model: Model, ranks: int) -> int:
    """Bytes that a rank needs at least where everything is split over all ranks and nothing is run again: no placement needs less."""
    graph = model.folded.graph
    saved = count_saved(model)
    total = sum(times * graph.tensor(value).nbytes for value, times in saved.times.items()) + sum(saved.extra_nbytes.values())
    for op in graph.of_kind(OpKind.PARAMETER):
        total += op.results[0].nbytes * (2 + OPTIMIZER_COPIES if op.results[0].requires_grad else 1)
    return -(-total // ranks)


def restrict(problem: Problem, allowed: Mapping[Decision, Sequence[int]]) -> Problem:
    """The problem with these options alone, by decision and position; decisions that aren't named keep all."""
    rows = [np.array(allowed.get(node.decision, range(len(node.options))), dtype=np.int64) for node in problem.nodes]
    nodes = tuple(
        Node(node.decision, tuple(node.options[i] for i in left.tolist()), node.cost[left], node.nbytes[left])
        for node, left in zip(problem.nodes, rows, strict=True)
    )
    arcs = tuple(
        Arc(arc.a, arc.b, arc.cost[np.ix_(rows[arc.a], rows[arc.b])], arc.nbytes[np.ix_(rows[arc.a], rows[arc.b])]) for arc in problem.arcs
    )
    return replace(problem, nodes=nodes, arcs=arcs)


def sharding_of(problem: Problem, chosen_options: Mapping[Decision, int]) -> Sharding:
    """The placements and layouts that a solution of the problem chose, by decision the number of the option."""
    chosen: dict[DecisionKind, dict[Decision, Any]] = {kind: {} for kind in DecisionKind}
    for node in problem.nodes:
        chosen[node.decision.kind][node.decision] = node.options[chosen_options[node.decision]]
    placements = {decision.op: option for decision, option in chosen[DecisionKind.CALL].items()}
    layouts = {decision.op: option for decision, option in chosen[DecisionKind.STORED].items()}
    outputs = chosen[DecisionKind.OUTPUT]
    return Sharding(placements, layouts, tuple(outputs[output_decision(position)] for position in range(len(outputs))))


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
        self.index: dict[Decision, int] = {}
        self.saved = count_saved(model)
        self.made: dict[Value, list[Layout]] = {}  # per value, per option of its op, the layout made
        self.output = self.graph.output.name
        self.uses = count_uses(model)
        self.first = tables.first
        self.times = mesh.sizes[0] if tables.first else 1
        self.pairs: dict[tuple[object, ...], Table] = {}  # per tensor type and layouts, the cost of one journey
        self.needs: dict[tuple[Decision, int], list[Layout]] = {}  # per operand, per option of its op, the layout needed

    def build(self) -> Problem:
        for op in self.model.folded.ops:
            if op.kind is OpKind.CALL:
                self._add_call(op)
            elif op.kind is OpKind.OUTPUT:
                self._add_outputs(op)
            else:
                self._add_stored(op)
        for edge in self.model.folded.edges:
            if self.graph.by_name[edge.value.op].kind is OpKind.PARAMETER or edge.consumer == self.output:
                self._add_arc(edge)
        for value, sets in self.model.folded.reader_sets.items():
            if self.graph.by_name[value.op].kind is not OpKind.PARAMETER:
                for number, (readers, count) in enumerate(sets.items()):
                    self._connect(value, number, [reader for reader in readers if reader[0] != self.output], count)
        arcs = tuple(Arc(a, b, cost, nbytes) for (a, b), (cost, nbytes) in self.arcs.items())
        return Problem(tuple(self.nodes), arcs, self.mesh, fixed_ns=0, fixed_bytes=0)

    def _add(self, decision: Decision, options: Sequence[Option], cost: Iterable[int], nbytes: Iterable[int]) -> None:
        self.index[decision] = len(self.nodes)
        self.nodes.append(
            Node(
                decision,
                tuple(options),
                np.fromiter(cost, dtype=np.int64, count=len(options)),
                np.fromiter(nbytes, dtype=np.int64, count=len(options)),
            )
        )

    def _add_call(self, op: Op) -> None:
        count = self.model.folded.count[op.name]
        options = call_options(self.model, op, self.mesh, self.constraints)
        for i in range(len(op.operands)):
            self.needs[decision_of(op), i] = [operand_layout_of(self.model, op, option, i) for option in options]
        for i in range(len(op.results)):
            self.made[Value(op.name, i)] = [result_layout_of(self.model, op, option, i) for option in options]
        costs = [nanoseconds(count * self.times * sum(self.tables.op_seconds(op, option))) for option in options]
        self._add(decision_of(op), options, costs, [saved_nbytes(self.model, self.saved, op, option, self.mesh) for option in options])

    def _add_stored(self, op: Op) -> None:
        count = self.model.folded.count[op.name]
        tensor = op.results[0]
        is_parameter = op.kind is OpKind.PARAMETER
        options = parameter_options(self.model, op, self.mesh, self.constraints) if is_parameter else [self.whole]
        self.made[Value(op.name)] = list(options)
        copies = 2 + OPTIMIZER_COPIES if is_parameter and tensor.requires_grad else 1
        costs = [nanoseconds(count * self.tables.optimizer_seconds(tensor, layout)) for layout in options]
        self._add(decision_of(op), options, costs, [count * copies * local_nbytes(tensor, layout, self.mesh) for layout in options])

    def _add_outputs(self, op: Op) -> None:
        returned = len(self.graph.returned)
        for position, value in enumerate(op.operands):
            decision = output_decision(position)
            # The new value of a buffer goes where the old one was, and buffers are whole on every rank.
            time = REPLICATE if self.model.micro is None else self.model.micro.states[value]
            options = output_options(self.graph.tensor(value), self.mesh, time) if position < returned else [self.whole]
            self.needs[decision, 0] = list(options)
            self._add(decision, options, [0] * len(options), [0] * len(options))

    def _connect(self, value: Value, number: int, readers: Sequence[tuple[str, int]], count: int) -> None:
        """Arcs from `count` values like this one to those who read them all: straight to a single reader, to several by a fan-out."""
        needs_of = [self.needs[decision_of(self.graph.by_name[consumer]), operand] for consumer, operand in readers]
        asked = Counter(need for needs in needs_of for need in set(needs))
        shared = sorted((need for need, times in asked.items() if times > 1), key=str)
        is_full = len(set(self.made[value])) * len(shared) <= FULL_FAN_OUT
        groups: dict[object, list[tuple[str, int]]] = defaultdict(list)
        for consumer, operand in readers:
            # Every rank makes a table and cuts its parts out of it, so that its readers have nothing to share.
            alone = (consumer, operand) if value.op in self.model.tables else (self.graph.by_name[consumer].target, operand)
            groups[None if is_full and value.op not in self.model.tables else alone].append((consumer, operand))
        for part, group in enumerate(groups.values()):
            decision = Decision(DecisionKind.FAN_OUT, value.op, (value.index, number, part))
            if len(group) == 1:
                self._connect_reader(value, *group[0], count)
            elif is_full:
                self._add_fan_out(decision, value, group, shared, count)
            else:
                self._add_hub(decision, value, group, count)

    def _add_hub(self, decision: Decision, value: Value, readers: Sequence[tuple[str, int]], count: int) -> None:
        """A node whose options are the one layout that a value is brought to for all of its readers."""
        needs_of = [self.needs[decision_of(self.graph.by_name[consumer]), operand] for consumer, operand in readers]
        options = sorted({need for needs in needs_of for need in needs}, key=str)
        self._add(decision, options, [0] * len(options), [0] * len(options))
        hub, tensor, made = self.index[decision], self.graph.tensor(value), self.made[value]
        nbytes = self._copy_nbytes(value, made, options, count, is_saved=True)
        self._store(self.index[decision_of(self.graph.by_name[value.op])], hub, self._pair_costs(tensor, made, options, count), nbytes)
        for (consumer, operand), needs in zip(readers, needs_of, strict=True):
            nbytes = self._copy_nbytes(value, options, needs, count, is_saved=saves_operand(self.model, consumer, operand))
            reader = self.index[decision_of(self.graph.by_name[consumer])]
            self._store(hub, reader, self._pair_costs(tensor, options, needs, count), nbytes)

    def _connect_reader(self, value: Value, consumer: str, operand: int, count: int) -> None:
        reader = decision_of(self.graph.by_name[consumer])
        starts, needs = self.made[value], self.needs[reader, operand]
        cost = self._pair_costs(self.graph.tensor(value), starts, needs, count)
        nbytes = self._copy_nbytes(value, starts, needs, count, is_saved=saves_operand(self.model, consumer, operand))
        self._store(self.index[decision_of(self.graph.by_name[value.op])], self.index[reader], cost, nbytes)

    def _add_fan_out(
        self, decision: Decision, value: Value, readers: Sequence[tuple[str, int]], shared: Sequence[Layout], count: int
    ) -> None:
        """A node whose options are the layout in which a value is made, and beside it one of `shared` that is made for several readers."""
        tensor, (made, made_of) = self.graph.tensor(value), layout_numbers(self.made[value])
        is_saved = any(saves_operand(self.model, consumer, operand) for consumer, operand in readers)
        prices = self._pair_costs(tensor, made, shared, count)
        copies = self._copy_nbytes(value, made, shared, count, is_saved=is_saved)
        # What costs nothing to make need not be shared.
        priced = [(row, column) for row in range(len(made)) for column in range(len(shared)) if prices[row, column] > 0]
        options = [(start, start) for start in made] + [(made[row], shared[column]) for row, column in priced]
        none = [0] * len(made)
        costs, nbytes = ([*none, *(int(table[pair]) for pair in priced)] for table in (prices, copies))
        self._add(decision, options, costs, nbytes)
        fan, starts = self.index[decision], [start for start, _ in options]
        # The producer decides how the value is made.
        rows = [*range(len(made)), *(row for row, _ in priced)]
        differ = np.where(np.array(made_of)[:, None] == np.array(rows)[None], 0, FORBIDDEN)
        self._store(self.index[decision_of(self.graph.by_name[value.op])], fan, differ, np.zeros(differ.shape, np.int64))
        for consumer, operand in readers:
            reader = decision_of(self.graph.by_name[consumer])
            needs = self.needs[reader, operand]
            own = self._pair_costs(tensor, starts, needs, count)
            own_bytes = self._copy_nbytes(value, starts, needs, count, is_saved=saves_operand(self.model, consumer, operand))
            _, kind_of = layout_numbers([*needs, *(copy for _, copy in options)])
            has = np.array(kind_of[len(needs) :])[:, None] == np.array(kind_of[: len(needs)])[None]  # the copy is what the reader needs
            self._store(fan, self.index[reader], np.where(has, 0, own), np.where(has, 0, own_bytes))

    def _copy_nbytes(self, value: Value, starts: Sequence[Layout], needs: Sequence[Layout], count: int, *, is_saved: bool) -> Table:
        """Bytes of the copies that a journey makes: a consumer that saves its operand saves the copy that was made for it."""
        tensor = self.graph.tensor(value)

        def copied(start: Layout, need: Layout) -> int:
            is_made = is_saved and self.saved.saves_copy(self.graph.by_name[value.op].kind, value, start[self.first :], need[self.first :])
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
            return min(nanoseconds(count * self.times * (forward + backward)), FORBIDDEN)

        row_kinds, row_of = layout_numbers(starts)
        column_kinds, column_of = layout_numbers(needs)
        key = (tensor, tuple(row_kinds), tuple(column_kinds), count)
        if key not in self.pairs:
            self.pairs[key] = _expand(row_kinds, column_kinds, cost)
        return self.pairs[key][np.ix_(row_of, column_of)]

    def _add_arc(self, edge: Edge) -> None:
        """The arc of a parameter that is read, or of a value that is returned."""
        value, tensor = edge.value, self.graph.tensor(edge.value)
        producer = self.graph.by_name[value.op]
        is_output = edge.consumer == self.output
        reader = output_decision(edge.operand) if is_output else decision_of(self.graph.by_name[edge.consumer])
        starts, needs = self.made[value], self.needs[reader, 0 if is_output else edge.operand]
        if producer.kind is OpKind.PARAMETER:
            uses = self.uses[producer.name]

            def parameter_cost(start: Layout, need: Layout) -> int:
                if start == need:
                    return 0
                gathered, deferred = self.tables.parameter_seconds(tensor, start, need, uses)
                return nanoseconds(edge.count * (self.times * gathered + deferred))

            cost = _expand(starts, needs, parameter_cost)
        else:

            def output_cost(start: Layout, need: Layout) -> int:
                # Whether a gradient comes back depends on the user's loop; what is returned beside a loss gets none.
                return nanoseconds(edge.count * self.times * self.tables.journey_seconds(tensor, start, need, backward=False)[0])

            cost = _expand(starts, needs, output_cost)
        if is_output:
            nbytes = self._output_nbytes(value, starts, needs)
        else:
            is_saved = saves_operand(self.model, edge.consumer, edge.operand)
            nbytes = self._copy_nbytes(value, starts, needs, edge.count, is_saved=is_saved)
        self._store(self.index[decision_of(producer)], self.index[reader], cost, nbytes)

    def _output_nbytes(self, value: Value, starts: Sequence[Layout], needs: Sequence[Layout]) -> Table:
        """Bytes of an output while the backward runs, where nobody else saves them."""
        tensor = self.graph.tensor(value)
        is_held = value in self.saved.times or self.graph.by_name[value.op].kind is not OpKind.CALL

        def held(start: Layout, need: Layout) -> int:
            return 0 if is_held and start[self.first :] == need[self.first :] else local_nbytes(tensor, need, self.mesh)

        return _expand(starts, needs, held)

    def _store(self, a: int, b: int, cost: Table, nbytes: Table) -> None:
        if a == b:  # a layer that feeds the next like one: both ends are the same decision
            node = self.nodes[a]
            self.nodes[a] = Node(node.decision, node.options, node.cost + np.diagonal(cost), node.nbytes + np.diagonal(nbytes))
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
