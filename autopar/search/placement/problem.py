"""The placement problem of one mesh as plain tables: per node its options with their cost and bytes, per arc those of each pair of options.

Comes in: an `AnalyzedGraph`, a mesh, a cluster, constraints. Goes out: a `Problem`, which ``solve`` solves and brute force can check.

A node is a decision: the placement of a call, the layout of a stored tensor or of an output, or a *fan-out*. An arc joins a decision about
a value's producer and one about its reader; its costs are those of resharding from the layout in which the value is made to the one in
which it is read, forward and backward.

Arcs alone would charge every reader of a value for resharding it, but a program makes a value once per layout that is needed. So between a
value and its readers, if it has several, stands a fan-out. Its options are pairs of layouts: the one in which the value is made, and a
second one, which is made from it once and which all readers that need it share::

    made (S0, R)  --all-gather, paid once-->  copy (B, R)  --free-->  q, k and v, which read (B, R)
                  --paid by this reader---------------------------->  a reader that needs (R, S1)

Readers that need neither of the two pay each for itself. If several of these need the same third layout, the program makes that once too,
and is then cheaper than the tables say.

Costs are integer nanoseconds of a whole training step, bytes are at one device's peak, both of all the ops that a node stands for.
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
    CostTables,
    Sharding,
    count_uses,
    kept_nbytes,
    layout_numbers,
    local_nbytes,
    operand_layout_of,
    result_layout_of,
)
from autopar.ir import REPLICATE, Layout, Mesh, Op, OpKind, Placement, Split, StateKind, Tensor, Value
from autopar.search.options import Constraints, call_options, output_options, parameter_options, zigzag_axes
from autopar.structure import AnalyzedGraph, Edge

Table = npt.NDArray[np.int64]
Option = Placement | Layout | tuple[Layout, Layout]

FORBIDDEN = 1 << 50
"""Cost of a pair of options between whose layouts there is no resharding: far above any real cost in nanoseconds, far below overflow."""


_ONE_RANK = Mesh((), ())


class DecisionKind(StrEnum):
    """What is decided about the subject of a decision."""

    CALL = "call"  # the placement of a call
    STORED = "stored"  # the layout in which a parameter, buffer or input is stored
    OUTPUT = "output"  # the layout in which an output is returned
    FAN_OUT = "fan-out"  # the second layout in which a value is made, for several of its readers


@dataclass(frozen=True, slots=True)
class Decision:
    """What the search decides about: a kind and its subject.

    Attributes:
        kind: what is decided.
        op: name of the call, or of the parameter, buffer or input; of the op that makes the value for a fan-out; empty for an output.
        number: for an output its position; for a fan-out the value's index among its op's results, the number of the set of readers
            (like calls may have different readers), and the number of the readers' group within that set; empty for other kinds.
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


# The most pairs of layouts that one fan-out for all readers of a value may have. Where there would be more, as on several free axes, the
# linear model would grow too large. Readers then share a copy only with readers of the same operator, and what several operators need
# alike is charged to each of them: never less than the program costs.
FULL_FAN_OUT = 64


@dataclass(frozen=True)
class Node:
    """A decision and its options.

    Attributes:
        decision: what is decided.
        options: placements of a call; layouts of what is stored or returned; of a fan-out for all readers pairs of layouts (made, copied),
            equal where there is no copy; of a fan-out for readers of one operator the layout of the copy that all of them read.
        cost: nanoseconds per option, shape (options,).
        nbytes: bytes per option, shape (options,).
    """

    decision: Decision
    options: tuple[Option, ...]
    cost: Table
    nbytes: Table


@dataclass(frozen=True)
class Arc:
    """Two decisions whose costs depend on each other.

    Attributes:
        a, b: indices of the two nodes.
        cost: nanoseconds per pair of options, shape (options of a, options of b); `FORBIDDEN` where a pair can't be chosen.
        nbytes: bytes per pair of options, same shape.
    """

    a: int
    b: int
    cost: Table
    nbytes: Table


@dataclass(frozen=True)
class Problem:
    """The placement problem of one mesh.

    Attributes:
        nodes: the decisions, one option of each of which is to be chosen.
        arcs: pairs of decisions, at most one for each two nodes.
        mesh: the axes that options refer to by position.
    """

    nodes: tuple[Node, ...]
    arcs: tuple[Arc, ...]
    mesh: Mesh


def nanoseconds(seconds: float) -> int:
    """Seconds as integer nanoseconds: with seconds as floats, solvers return wrong choices as optimal."""
    return round(seconds * 1e9)


def build_problem(model: AnalyzedGraph, mesh: Mesh, cluster: Cluster, constraints: Constraints) -> Problem:
    """The placement problem of a model on one mesh, under the constraints.

    Where these leave some op no placement that fits its neighbours', every choice costs `FORBIDDEN` nanoseconds or more.
    """
    return _Builder(model, mesh, CostTables(model, mesh, cluster, constraints.pins.ahead), constraints).build()


def saved_nbytes(model: AnalyzedGraph, op: Op, placement: Placement, mesh: Mesh) -> int:
    """Bytes on one rank that autograd saves of the calls that `op` stands for under a placement, without resharded copies of operands."""
    saved = model.saved
    parts = math.prod(size for part, size in zip(placement, mesh.sizes, strict=True) if isinstance(part, Split))
    of_results = sum(
        saved.times[Value(op.name, index)] * local_nbytes(tensor, result_layout_of(model, op, placement, index), mesh)
        for index, tensor in enumerate(op.results)
        if saved.times[Value(op.name, index)]
    )
    return of_results + -(-saved.extra_nbytes[op.name] // parts)


def least_bytes(model: AnalyzedGraph, ranks: int) -> int:
    """A lower bound on the bytes that one rank needs without recomputation: everything split evenly over all ranks.

    That is (parameters and optimizer state + the larger of saved tensors and gradients) / ranks, rounded up: before the backward there are
    no gradients, and after it nothing is saved.
    """
    graph = model.folded.graph
    saved = sum(times * graph.tensor(value).nbytes for value, times in model.saved.times.items()) + sum(model.saved.extra_nbytes.values())
    kept = [kept_nbytes(op.results[0], (), _ONE_RANK) for op in graph.of_kind(OpKind.PARAMETER)]
    total = sum(parameter.stored + parameter.optimizer for parameter in kept) + max(saved, sum(parameter.gradient for parameter in kept))
    return -(-total // ranks)


def restrict(problem: Problem, allowed: Mapping[Decision, Sequence[int]]) -> Problem:
    """The problem with fewer options: those whose numbers are in `allowed`, and all options of decisions that aren't."""
    rows = [np.array(allowed.get(node.decision, range(len(node.options))), dtype=np.int64) for node in problem.nodes]
    nodes = tuple(
        Node(node.decision, tuple(node.options[i] for i in numbers.tolist()), node.cost[numbers], node.nbytes[numbers])
        for node, numbers in zip(problem.nodes, rows, strict=True)
    )
    arcs = tuple(
        Arc(arc.a, arc.b, arc.cost[np.ix_(rows[arc.a], rows[arc.b])], arc.nbytes[np.ix_(rows[arc.a], rows[arc.b])]) for arc in problem.arcs
    )
    return replace(problem, nodes=nodes, arcs=arcs)


def sharding_of(problem: Problem, choice: Mapping[Decision, int]) -> Sharding:
    """The placements and layouts that a solution chose; `choice` has per decision the number of its option (`Solution.choice`)."""
    chosen: dict[DecisionKind, dict[Decision, Any]] = {kind: {} for kind in DecisionKind}
    for node in problem.nodes:
        chosen[node.decision.kind][node.decision] = node.options[choice[node.decision]]
    placements = {decision.op: option for decision, option in chosen[DecisionKind.CALL].items()}
    layouts = {decision.op: option for decision, option in chosen[DecisionKind.STORED].items()}
    outputs = chosen[DecisionKind.OUTPUT]
    return Sharding(placements, layouts, tuple(outputs[output_decision(position)] for position in range(len(outputs))))


class _Builder:
    """Collects nodes and arcs of one problem.

    Attributes:
        made: per value, the layout in which each option of its op's decision makes it.
        needs: per operand of a call (its decision, the operand's position), the layout in which each option reads it; of an output its own.
        first_axis: the first axis of ranks; an axis before it is that of micro-batches.
        times: number of micro-batches, for costs that each of them adds to.
    """

    def __init__(self, model: AnalyzedGraph, mesh: Mesh, tables: CostTables, constraints: Constraints) -> None:
        self.model = model
        self.graph = model.folded.graph
        self.mesh = mesh
        self.tables = tables
        self.constraints = constraints
        self.replicated: Layout = tuple(REPLICATE for _ in mesh.sizes)
        self.nodes: list[Node] = []
        self.arcs: dict[tuple[int, int], tuple[Table, Table]] = {}
        self.index: dict[Decision, int] = {}  # of each decision's node
        self.made: dict[Value, list[Layout]] = {}
        self.output = self.graph.output.name
        self.uses = count_uses(model)
        self.first_axis = tables.first_axis
        self.microbatches = mesh.sizes[0] if tables.first_axis else 1
        self.pair_costs: dict[tuple[object, ...], Table] = {}  # tables of `_pair_costs` made so far
        self.needs: dict[tuple[Decision, int], list[Layout]] = {}

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
        return Problem(tuple(self.nodes), arcs, self.mesh)

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
        costs = [nanoseconds(count * self.microbatches * sum(self.tables.op_seconds(op, option))) for option in options]
        self._add(decision_of(op), options, costs, [saved_nbytes(self.model, op, option, self.mesh) for option in options])

    def _add_stored(self, op: Op) -> None:
        count = self.model.folded.count[op.name]
        tensor = op.results[0]
        is_parameter = op.kind is OpKind.PARAMETER
        options = parameter_options(self.model, op, self.mesh, self.constraints) if is_parameter else [self.replicated]
        self.made[Value(op.name)] = list(options)
        costs = [nanoseconds(count * self.tables.step_seconds(tensor, layout)) for layout in options]
        nbytes = [
            count * (kept_nbytes(tensor, layout, self.mesh).total if is_parameter else local_nbytes(tensor, layout, self.mesh))
            for layout in options
        ]
        self._add(decision_of(op), options, costs, nbytes)

    def _add_outputs(self, op: Op) -> None:
        returned = len(self.graph.returned)
        for position, value in enumerate(op.operands):
            decision = output_decision(position)
            # Outputs after those that the model returns are new values of buffers, which are replicated.
            time = REPLICATE if self.model.micro_split is None else self.model.micro_split.states[value]
            options = [self.replicated]
            if position < returned:
                options = output_options(self.graph.tensor(value), self.mesh, time, zigzag_axes(self.model, self.constraints))
            self.needs[decision, 0] = list(options)
            self._add(decision, options, [0] * len(options), [0] * len(options))

    def _connect(self, value: Value, number: int, readers: Sequence[tuple[str, int]], count: int) -> None:
        """Connect a value with its readers: with a single one by an arc, with several by a fan-out.

        Args:
            value: what is read.
            number: like values may have several sets of readers; this is the number of the set, which tells their fan-outs apart.
            readers: names of calls, and positions of the operand that is the value.
            count: how many values like it have these readers.
        """
        needs_of = [self.needs[decision_of(self.graph.by_name[consumer]), operand] for consumer, operand in readers]
        needed_by = Counter(need for needs in needs_of for need in set(needs))
        shared = sorted((need for need, reader_count in needed_by.items() if reader_count > 1), key=str)
        is_full = len(set(self.made[value])) * len(shared) <= FULL_FAN_OUT
        groups: dict[object, list[tuple[str, int]]] = defaultdict(list)
        for consumer, operand in readers:
            if value.op in self.model.constants:
                group: object = consumer, operand  # every rank makes a table whole and cuts its part out: there is no copy to share
            else:
                group = None if is_full else (self.graph.by_name[consumer].target, operand)
            groups[group].append((consumer, operand))
        for group_number, group_readers in enumerate(groups.values()):
            decision = Decision(DecisionKind.FAN_OUT, value.op, (value.index, number, group_number))
            if len(group_readers) == 1:
                self._connect_reader(value, *group_readers[0], count)
            elif is_full:
                self._add_fan_out(decision, value, group_readers, shared, count)
            else:
                self._add_single_layout_fan_out(decision, value, group_readers, count)

    def _add_single_layout_fan_out(self, decision: Decision, value: Value, readers: Sequence[tuple[str, int]], count: int) -> None:
        """A fan-out whose options are one layout, to which a value is brought once for all of these readers."""
        needs_of = [self.needs[decision_of(self.graph.by_name[consumer]), operand] for consumer, operand in readers]
        options = sorted({need for needs in needs_of for need in needs}, key=str)
        self._add(decision, options, [0] * len(options), [0] * len(options))
        fan_out, tensor, made = self.index[decision], self.graph.tensor(value), self.made[value]
        nbytes = self._copy_nbytes(value, made, options, count, is_saved=True)
        self._store(self.index[decision_of(self.graph.by_name[value.op])], fan_out, self._pair_costs(tensor, made, options, count), nbytes)
        for (consumer, operand), needs in zip(readers, needs_of, strict=True):
            nbytes = self._copy_nbytes(value, options, needs, count, is_saved=self.model.saves_operand(consumer, operand))
            reader = self.index[decision_of(self.graph.by_name[consumer])]
            self._store(fan_out, reader, self._pair_costs(tensor, options, needs, count), nbytes)

    def _connect_reader(self, value: Value, consumer: str, operand: int, count: int) -> None:
        """An arc from a value's producer to one reader."""
        reader = decision_of(self.graph.by_name[consumer])
        starts, needs = self.made[value], self.needs[reader, operand]
        cost = self._pair_costs(self.graph.tensor(value), starts, needs, count)
        nbytes = self._copy_nbytes(value, starts, needs, count, is_saved=self.model.saves_operand(consumer, operand))
        self._store(self.index[decision_of(self.graph.by_name[value.op])], self.index[reader], cost, nbytes)

    def _add_fan_out(
        self, decision: Decision, value: Value, readers: Sequence[tuple[str, int]], shared: Sequence[Layout], count: int
    ) -> None:
        """A fan-out for all readers of a value: its options are pairs of the layout made and a copy in one of `shared`, or no copy."""
        tensor, (made, made_of) = self.graph.tensor(value), layout_numbers(self.made[value])
        is_saved = any(self.model.saves_operand(consumer, operand) for consumer, operand in readers)
        copy_costs = self._pair_costs(tensor, made, shared, count)
        copy_nbytes = self._copy_nbytes(value, made, shared, count, is_saved=is_saved)
        # A copy that costs nothing needn't be shared: each reader makes its own.
        copies = [(row, column) for row in range(len(made)) for column in range(len(shared)) if copy_costs[row, column] > 0]
        options = [(start, start) for start in made] + [(made[row], shared[column]) for row, column in copies]
        without_copy = [0] * len(made)
        costs, nbytes = ([*without_copy, *(int(table[pair]) for pair in copies)] for table in (copy_costs, copy_nbytes))
        self._add(decision, options, costs, nbytes)
        fan_out, starts = self.index[decision], [start for start, _ in options]
        # Only options with the layout in which the producer makes the value may be chosen.
        rows = [*range(len(made)), *(row for row, _ in copies)]
        differ = np.where(np.array(made_of)[:, None] == np.array(rows)[None], 0, FORBIDDEN)
        self._store(self.index[decision_of(self.graph.by_name[value.op])], fan_out, differ, np.zeros(differ.shape, np.int64))
        for consumer, operand in readers:
            reader = decision_of(self.graph.by_name[consumer])
            needs = self.needs[reader, operand]
            own_costs = self._pair_costs(tensor, starts, needs, count)
            own_nbytes = self._copy_nbytes(value, starts, needs, count, is_saved=self.model.saves_operand(consumer, operand))
            _, number_of = layout_numbers([*needs, *(copied for _, copied in options)])
            is_needed = np.array(number_of[len(needs) :])[:, None] == np.array(number_of[: len(needs)])[None]  # the copy is
            self._store(fan_out, self.index[reader], np.where(is_needed, 0, own_costs), np.where(is_needed, 0, own_nbytes))

    def _copy_nbytes(self, value: Value, starts: Sequence[Layout], needs: Sequence[Layout], count: int, *, is_saved: bool) -> Table:
        """Bytes of resharded copies, per pair of `starts` and `needs`: a consumer that saves its operand saves its copy."""
        tensor = self.graph.tensor(value)

        def copy_nbytes(start: Layout, need: Layout) -> int:
            is_made = is_saved and self.model.saved.saves_copy(
                self.graph.by_name[value.op].kind, value, start[self.first_axis :], need[self.first_axis :]
            )
            return count * local_nbytes(tensor, need, self.mesh) if is_made else 0

        return _expand(starts, needs, copy_nbytes)

    def _pair_costs(self, tensor: Tensor, starts: Sequence[Layout], needs: Sequence[Layout], count: int) -> Table:
        """Nanoseconds of resharding from each of `starts` to each of `needs`; equal tensors and layouts share one table."""

        def cost(start: Layout, need: Layout) -> int:
            if start == need:
                return 0
            if any(state.kind is StateKind.REPLICATE_PARTIAL_GRAD for state in start[self.first_axis :]):
                return FORBIDDEN  # gathered for ops that each work on a part of it: not a replicated value that others may read
            forward, backward = self.tables.journey_seconds(tensor, start, need, backward=tensor.requires_grad)
            return min(nanoseconds(count * self.microbatches * (forward + backward)), FORBIDDEN)

        distinct_starts, row_of = layout_numbers(starts)
        distinct_needs, column_of = layout_numbers(needs)
        key = (tensor, tuple(distinct_starts), tuple(distinct_needs), count)
        if key not in self.pair_costs:
            self.pair_costs[key] = _expand(distinct_starts, distinct_needs, cost)
        return self.pair_costs[key][np.ix_(row_of, column_of)]

    def _add_arc(self, edge: Edge) -> None:
        """The arc of an edge that no fan-out is for: from a parameter to a reader, or from a value to the output."""
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
                return nanoseconds(edge.count * (self.microbatches * gathered + deferred))

            cost = _expand(starts, needs, parameter_cost)
        else:

            def output_cost(start: Layout, need: Layout) -> int:
                # Whether a gradient comes back depends on the user's loop; what is returned beside a loss gets none.
                return nanoseconds(edge.count * self.microbatches * self.tables.journey_seconds(tensor, start, need, backward=False)[0])

            cost = _expand(starts, needs, output_cost)
        if is_output:
            nbytes = self._output_nbytes(value, starts, needs)
        else:
            is_saved = self.model.saves_operand(edge.consumer, edge.operand)
            nbytes = self._copy_nbytes(value, starts, needs, edge.count, is_saved=is_saved)
        self._store(self.index[decision_of(producer)], self.index[reader], cost, nbytes)

    def _output_nbytes(self, value: Value, starts: Sequence[Layout], needs: Sequence[Layout]) -> Table:
        """Bytes of an output, which lives through the backward; none where they count already, as saved or as a stored tensor's."""
        tensor = self.graph.tensor(value)
        is_held = value in self.model.saved.times or self.graph.by_name[value.op].kind is not OpKind.CALL

        def held(start: Layout, need: Layout) -> int:
            return 0 if is_held and start[self.first_axis :] == need[self.first_axis :] else local_nbytes(tensor, need, self.mesh)

        return _expand(starts, needs, held)

    def _store(self, a: int, b: int, cost: Table, nbytes: Table) -> None:
        """Add an arc between nodes `a` and `b`, with tables of shape (options of a, options of b), to what is between them already."""
        if a == b:  # from a layer to the next like it: both ends are the same decision
            node = self.nodes[a]
            self.nodes[a] = Node(node.decision, node.options, node.cost + np.diagonal(cost), node.nbytes + np.diagonal(nbytes))
            return
        if a > b:
            a, b, cost, nbytes = b, a, cost.T, nbytes.T
        if (a, b) in self.arcs:
            previous_cost, previous_nbytes = self.arcs[a, b]
            self.arcs[a, b] = (np.minimum(previous_cost + cost, FORBIDDEN), previous_nbytes + nbytes)
        else:
            self.arcs[a, b] = (cost, nbytes)


def _expand(rows: Sequence[Layout], columns: Sequence[Layout], cost: Callable[[Layout, Layout], int]) -> Table:
    """The table of `cost` over all pairs, shape (rows, columns); `cost` is called once per distinct pair."""
    distinct_rows, row_of = layout_numbers(rows)
    distinct_columns, column_of = layout_numbers(columns)
    table = np.array([[cost(row, column) for column in distinct_columns] for row in distinct_rows], dtype=np.int64)
    return table[np.ix_(row_of, column_of)]
