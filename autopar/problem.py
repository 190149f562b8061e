"""The search problem as plain tables: per node its options with their cost and bytes, per arc the cost of each pair of options.

Comes in: a folded graph with the space of every op, a mesh and a cluster. Goes out: a `Problem` that ``search`` solves and brute force
can check. Nodes are the representatives of ops, one per output tensor, and one *fan-out* per value that several like consumers
read: what is gathered for the first of them serves the others.

Costs are integer nanoseconds of a whole training step, bytes are at one device's peak, both for all the ops that a node stands for.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from autopar.cost_models import Cluster, Link, axis_link, collective_seconds, op_seconds
from autopar.factors import Factors, Role
from autopar.ir import ITEMSIZE, Op, OpKind, Tensor, Value
from autopar.layers import Edge, Folded
from autopar.layout import (
    PASS,
    REPLICATE,
    Layout,
    Mesh,
    Placement,
    Split,
    StateKind,
    fits,
    is_legal,
    local_shape,
    operand_layout,
    result_layout,
    shard,
)
from autopar.reshard import Collective, Step, journey
from autopar.space import LoopKind, Space

Table = npt.NDArray[np.int64]

FORBIDDEN = 1 << 50
"""Cost of a pair of options that no journey connects; far above any real cost in nanoseconds, far below overflow."""

# AdamW keeps two moments of the parameter's own dtype (torch.optim.AdamW).
OPTIMIZER_COPIES = 2
# AdamW reads parameter, gradient and both moments, and writes parameter and both moments.
OPTIMIZER_PASSES = 7

COLLECTIVE_KIND: Mapping[Collective, str] = {
    Collective.ALL_GATHER: "all_gather",
    Collective.REDUCE_SCATTER: "reduce_scatter",
    Collective.ALL_REDUCE: "all_reduce",
    Collective.ALL_TO_ALL: "all_to_all",
}


class AxisKind(Enum):
    """What an axis may be used for (design section 8)."""

    FREE = "free"
    DP = "dp"
    TP = "tp"
    CP = "cp"


@dataclass(frozen=True, slots=True)
class Constraints:
    """What the user, or a named baseline, asks of a mesh.

    Attributes:
        kinds: per axis what it may do.
        fsdp: True stores every parameter split over the dp axes, False whole, None leaves it to the search.
        vocabulary: True splits the vocabulary over the tp axes, False never does, None leaves it to the search.
        modules: glob of module paths -> axis -> loop: placements that the user pins.
        stored: layouts that parameters already have and keep (a second program over the same parameters).
        accept: a baseline's own rule: (op, axis, part) -> allowed.
    """

    kinds: tuple[AxisKind, ...]
    fsdp: bool | None = None
    vocabulary: bool | None = None
    modules: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    stored: Mapping[str, Layout] = field(default_factory=dict)
    accept: Callable[[Op, Placement], bool] | None = None


@dataclass(frozen=True)
class Node:
    """A decision.

    Attributes:
        key: op name; for an output tensor ``output:<position>``, for a fan-out ``fan:<value>:<target>``.
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
    """Everything the search needs; `tables` stays behind for the report, which looks up the same numbers."""

    nodes: tuple[Node, ...]
    arcs: tuple[Arc, ...]
    mesh: Mesh
    fixed_ns: int
    fixed_bytes: int


@dataclass(frozen=True)
class Model:
    """The parts of a problem that no mesh changes: computed once, shared by all meshes."""

    folded: Folded
    spaces: Mapping[str, Space]
    factors: Factors


class CostTables:
    """Costs of single decisions on one mesh; what was asked for once is remembered."""

    def __init__(self, model: Model, mesh: Mesh, cluster: Cluster) -> None:
        self.model = model
        self.mesh = mesh
        self.device = cluster.machine.device
        self.links: tuple[Link, ...] = tuple(axis_link(cluster, mesh.sizes, axis) for axis in range(len(mesh.sizes)))
        self._journeys: dict[tuple[object, ...], tuple[float, float]] = {}

    def op_seconds(self, op: Op, placement: Placement) -> tuple[float, float]:
        """(forward, backward) seconds of one call under `placement`."""
        space = self.model.spaces.get(op.name)
        graph = self.model.folded.graph
        operands = graph.operand_tensors(op)
        if space is not None and space.view:
            return 0.0, 0.0
        needs = [self._operand_layout(op, placement, i) for i in range(len(operands))]
        made = [self._result_layout(op, placement, i) for i in range(len(op.results))]
        nbytes = sum(map(self.local_nbytes, operands, needs)) + sum(map(self.local_nbytes, op.results, made))
        ways = math.prod(size for part, size in zip(placement, self.mesh.sizes, strict=True) if isinstance(part, Split))
        flops = space.flops * space.points() / ways if space is not None else float(sum(t.numel for t in op.results))
        family = "matmul" if space is not None and space.flops >= 2 else "pointwise"
        dtype = op.results[0].dtype if op.results else "float32"
        forward = op_seconds(self.device, flops=flops, nbytes=nbytes, dtype=dtype, family=family)
        needing = sum(tensor.requires_grad for tensor in operands)
        backward = 0.0
        if needing and any(tensor.requires_grad for tensor in op.results):
            # One product per operand that needs a gradient; a pointwise op makes all of them in one pass over twice the bytes.
            factor = float(min(needing, 2)) if family == "matmul" else 1.5
            backward = op_seconds(self.device, flops=factor * flops, nbytes=int(factor * nbytes), dtype=dtype, family=family)
        return forward, backward + 2 * self._kernel_seconds(op, placement)

    def _kernel_seconds(self, op: Op, placement: Placement) -> float:
        """Seconds of the small all-reduces inside a kernel, per direction."""
        space = self.model.spaces.get(op.name)
        if space is None:
            return 0.0
        seconds = 0.0
        for axis, part in enumerate(placement):
            if isinstance(part, Split) and space.loops[part.loop].kind is LoopKind.KERNEL and not space.results[0]:
                points = math.prod(loop.size for loop in space.loops.values() if loop.name != part.loop)
                others = math.prod(self.mesh.sizes[i] for i, p in enumerate(placement) if i != axis and isinstance(p, Split))
                seconds += 2 * collective_seconds("all_reduce", 4 * points // others, self.mesh.sizes[axis], self.links[axis])
        return seconds

    def _operand_layout(self, op: Op, placement: Placement, index: int) -> Layout:
        space = self.model.spaces.get(op.name)
        return tuple(REPLICATE for _ in placement) if space is None else operand_layout(space, placement, index)

    def _result_layout(self, op: Op, placement: Placement, index: int) -> Layout:
        space = self.model.spaces.get(op.name)
        return tuple(REPLICATE for _ in placement) if space is None else result_layout(space, placement, index)

    def local_nbytes(self, tensor: Tensor, layout: Layout) -> int:
        """Bytes of one rank's part."""
        return math.prod(local_shape(tensor.shape, layout, self.mesh)) * ITEMSIZE[tensor.dtype]

    def step_seconds(self, step: Step, collective: Collective, itemsize: int) -> float:
        """Seconds of one collective of a journey; the bytes are those of its larger side."""
        if collective is Collective.NONE:
            return 0.0
        nbytes = max(math.prod(step.shape_before), math.prod(step.shape_after)) * itemsize
        if collective in COLLECTIVE_KIND:
            if collective is Collective.ALL_TO_ALL:
                nbytes = math.prod(step.shape_before) * itemsize * self.mesh.sizes[step.axis]
            return collective_seconds(COLLECTIVE_KIND[collective], nbytes, self.mesh.sizes[step.axis], self.links[step.axis])
        return op_seconds(self.device, flops=0, nbytes=nbytes, dtype="float32", family="pointwise")

    def journey_seconds(self, tensor: Tensor, start: Layout, need: Layout, *, backward: bool) -> tuple[float, float]:
        """(forward, backward) seconds of taking `tensor` from `start` to `need`."""
        if start == need:
            return 0.0, 0.0
        key = (tensor.shape, tensor.dtype, start, need, backward)
        if key not in self._journeys:
            itemsize = ITEMSIZE[tensor.dtype]
            steps = journey(tensor.shape, start, need, self.mesh)
            self._journeys[key] = (
                sum(self.step_seconds(step, step.forward, itemsize) for step in steps),
                sum(self.step_seconds(step, step.backward, itemsize) for step in steps) if backward else 0.0,
            )
        return self._journeys[key]

    def parameter_seconds(self, tensor: Tensor, start: Layout, need: Layout, uses: int) -> tuple[float, float]:
        """(gathers and scatters, deferred gradient reduction) seconds of one use of a parameter.

        A parameter that is stored split and needed whole is gathered in the forward, again in the backward (it isn't kept), and
        its gradient is reduce-scattered (ZeRO-3, Rajbhandari et al. 2020). A gradient that is Partial for a parameter stored
        whole is reduced once per step, whatever the number of `uses`, and hides behind the backward as far as the device can.
        """
        deferred = gathered = 0.0
        itemsize = ITEMSIZE[tensor.dtype]
        for step in journey(tensor.shape, start, need, self.mesh):
            forward = self.step_seconds(step, step.forward, itemsize)
            backward = self.step_seconds(step, step.backward, itemsize) if tensor.requires_grad else 0.0
            if step.forward is Collective.NONE:
                deferred += backward / uses
            else:
                again = forward if step.forward is Collective.ALL_GATHER and tensor.requires_grad else 0.0
                gathered += forward + again + backward
        return gathered, deferred * (1 - self.device.overlap)

    def optimizer_seconds(self, tensor: Tensor, layout: Layout) -> float:
        """Seconds of the optimizer's update of one parameter."""
        if not tensor.requires_grad:
            return 0.0
        nbytes = OPTIMIZER_PASSES * self.local_nbytes(tensor, layout)
        return op_seconds(self.device, flops=0, nbytes=nbytes, dtype=tensor.dtype, family="pointwise")


def nanoseconds(seconds: float) -> int:
    """Seconds as the solver's integers; with seconds as floats solvers return wrong choices as optimal."""
    return round(seconds * 1e9)


def build_problem(model: Model, mesh: Mesh, cluster: Cluster, constraints: Constraints) -> Problem:
    """The tables of one mesh."""
    return _Builder(model, mesh, CostTables(model, mesh, cluster), constraints).build()


class _Builder:
    """Collects nodes and arcs; lives only while one problem is built."""

    def __init__(self, model: Model, mesh: Mesh, tables: CostTables, constraints: Constraints) -> None:
        self.model = model
        self.graph = model.folded.graph
        self.mesh = mesh
        self.tables = tables
        self.constraints = constraints
        self.nodes: list[Node] = []
        self.arcs: dict[tuple[int, int], tuple[Table, Table]] = {}
        self.index: dict[str, int] = {}
        self.made: dict[Value, list[Layout]] = {}  # per value, per option of its op, the layout made
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
        space = self.model.spaces.get(op.name)
        options = call_options(self.model, op, self.mesh, self.constraints)
        for i in range(len(op.operands)):
            self.needs[op.name, i] = [self.tables._operand_layout(op, option, i) for option in options]
        for i in range(len(op.results)):
            self.made[Value(op.name, i)] = [self.tables._result_layout(op, option, i) for option in options]
        costs, kept = [], []
        for number, option in enumerate(options):
            costs.append(count * nanoseconds(sum(self.tables.op_seconds(op, option))))
            ways = math.prod(size for part, size in zip(option, self.mesh.sizes, strict=True) if isinstance(part, Split))
            saved = sum(
                self.tables.local_nbytes(op.results[i], self.made[Value(op.name, i)][number])
                for i in op.saved
                if not (space is not None and space.view)
            )
            kept.append(count * (saved + op.saved_nbytes // ways))
        self._add(op.name, options, costs, kept)

    def _add_stored(self, op: Op) -> None:
        count = self.model.folded.count[op.name]
        tensor = op.results[0]
        if op.kind is OpKind.PARAMETER:
            options = parameter_options(self.model, op, self.mesh, self.constraints)
        else:
            options = [tuple(REPLICATE for _ in self.mesh.sizes)]
        self.made[Value(op.name)] = list(options)
        copies = 2 + OPTIMIZER_COPIES if op.kind is OpKind.PARAMETER and tensor.requires_grad else 1
        costs = [count * nanoseconds(self.tables.optimizer_seconds(tensor, layout)) for layout in options]
        self._add(op.name, options, costs, [count * copies * self.tables.local_nbytes(tensor, layout) for layout in options])

    def _add_outputs(self, op: Op) -> None:
        for position, value in enumerate(op.operands):
            key = f"output:{position}"
            options = output_options(self.graph.tensor(value), self.mesh)
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
            if len(group) == 1 or producer.kind is OpKind.PARAMETER or target == "output":
                for edge in group:
                    key = f"output:{edge.operand}" if target == "output" else edge.consumer
                    self._add_arc(value, key, 0 if target == "output" else operand, edge.count, max(1, uses))
                continue
            self._add_fan_out(value, f"fan:{value}:{target}:{operand}", operand, group)

    def _add_fan_out(self, value: Value, key: str, operand: int, group: Sequence[Edge]) -> None:
        options = sorted({need for edge in group for need in self.needs[edge.consumer, operand]}, key=str)
        self.needs[key, 0] = options
        self._add(key, options, [0] * len(options), [0] * len(options))
        self._add_arc(value, key, 0, max(edge.count for edge in group), 1)
        tensor = self.graph.tensor(value)
        for edge in group:
            needs = self.needs[edge.consumer, operand]
            cost = self._pair_costs(tensor, options, needs, edge.count)
            self._store(self.index[key], self.index[edge.consumer], cost, np.zeros_like(cost))

    def _pair_costs(self, tensor: Tensor, starts: Sequence[Layout], needs: Sequence[Layout], count: int) -> Table:
        """Cost of getting from each of `starts` to each of `needs`, looked up once per distinct pair."""

        def cost(start: Layout, need: Layout) -> int:
            if start == need:
                return 0
            if any(state.kind is StateKind.BROADCAST for state in start):
                return FORBIDDEN  # what was gathered to work on in parts can't be handed on as a whole
            forward, backward = self.tables.journey_seconds(tensor, start, need, backward=tensor.requires_grad)
            return count * nanoseconds(forward + backward)

        return _expand(starts, needs, cost)

    def _add_arc(self, value: Value, key: str, operand: int, count: int, uses: int) -> None:
        producer = self.graph.by_name[value.op]
        tensor = producer.results[value.index]
        starts, needs = self.made[value], self.needs[key, operand]
        if producer.kind is OpKind.PARAMETER:

            def parameter_cost(start: Layout, need: Layout) -> int:
                if start == need:
                    return 0
                return count * nanoseconds(sum(self.tables.parameter_seconds(tensor, start, need, uses)))

            cost = _expand(starts, needs, parameter_cost)
        elif key.startswith("output:"):

            def output_cost(start: Layout, need: Layout) -> int:
                # Whether a gradient comes back depends on the user's loop; what is returned beside a loss gets none.
                return count * nanoseconds(self.tables.journey_seconds(tensor, start, need, backward=False)[0])

            cost = _expand(starts, needs, output_cost)
        else:
            cost = self._pair_costs(tensor, starts, needs, count)
        nbytes = np.zeros_like(cost)
        if value.index in producer.saved and producer.kind is OpKind.CALL:

            def copy_nbytes(start: Layout, need: Layout) -> int:
                # A consumer that keeps its operand keeps the copy that was made for it.
                moved = any(s != n and not _same_part(s.kind, n.kind) for s, n in zip(start, need, strict=True))
                return count * self.tables.local_nbytes(tensor, need) if moved else 0

            nbytes = _expand(starts, needs, copy_nbytes)
        self._store(self.index[value.op], self.index[key], cost, nbytes)

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


def _same_part(start: StateKind, need: StateKind) -> bool:
    return (start, need) in ((StateKind.REPLICATE, StateKind.BROADCAST),)


def _expand(rows: Sequence[Layout], columns: Sequence[Layout], cost: Callable[[Layout, Layout], int]) -> Table:
    """The table of `cost` over all pairs, calling it once per distinct pair."""
    row_kinds, column_kinds = list(dict.fromkeys(rows)), list(dict.fromkeys(columns))
    small = np.array([[cost(row, column) for column in column_kinds] for row in row_kinds], dtype=np.int64)
    row_of = {layout: i for i, layout in enumerate(row_kinds)}
    column_of = {layout: i for i, layout in enumerate(column_kinds)}
    return small[np.ix_([row_of[row] for row in rows], [column_of[column] for column in columns])]


def call_options(model: Model, op: Op, mesh: Mesh, constraints: Constraints) -> list[Placement]:
    """The legal placements of a call, those that the constraints allow."""
    replicated: Placement = tuple(None for _ in mesh.sizes)
    space = model.spaces.get(op.name)
    if space is None:
        return [replicated]
    loops = model.factors.of_loops[op.name]
    parts: list[Split | object | None] = [None]
    parts += [Split(loop.name, outer) for loop in space.splittable for outer in loops[loop.name] or {1: Role.FEATURE}]
    if space.linear:
        parts.append(PASS)
    options = [option for option in itertools.product(parts, repeat=len(mesh.sizes)) if is_legal(space, option, mesh)]  # type: ignore[arg-type]
    legal: list[Placement] = options  # type: ignore[assignment]
    for axis, kind in enumerate(constraints.kinds):
        legal = _of_kind(legal, op, space, loops, axis, kind)
    if constraints.vocabulary is not None:
        legal = _of_vocabulary(legal, op, space, constraints)
    legal = _of_modules(legal, op, space, mesh, constraints)
    if constraints.accept is not None:
        accept = constraints.accept
        legal = [option for option in legal if accept(op, option)] or legal
    return legal


def is_contraction(space: Space) -> bool:
    """Whether an op is one of those that hold a model's work: products, convolutions, attention, lookups."""
    return space.flops >= 2 or space.kernel in ("embedding", "cross_entropy")


def role_of(loops: Mapping[str, Mapping[int, Role]], part: Split) -> Role:
    """What splitting `part` divides."""
    return loops[part.loop].get(part.outer, Role.FEATURE)


def _of_kind(
    options: list[Placement], op: Op, space: Space, loops: Mapping[str, Mapping[int, Role]], axis: int, kind: AxisKind
) -> list[Placement]:
    """Keep what an axis of this kind may do; a kind is really used wherever it can be."""
    if kind is AxisKind.FREE:
        return options

    def role(option: Placement) -> Role | None:
        part = option[axis]
        return role_of(loops, part) if isinstance(part, Split) else None

    if kind is AxisKind.TP:
        allowed = [option for option in options if role(option) is not Role.BATCH]
        if is_contraction(space):
            # Between the blocks a tensor axis may split the sequence, as Megatron does; the work itself it splits by features.
            allowed = [option for option in allowed if role(option) is not Role.SEQUENCE]
            return [option for option in allowed if role(option) is Role.FEATURE] or allowed
        return allowed
    wanted = Role.BATCH if kind is AxisKind.DP else Role.SEQUENCE
    used = [option for option in options if role(option) is wanted]
    return used or [option for option in options if role(option) is None]


def _of_vocabulary(options: list[Placement], op: Op, space: Space, constraints: Constraints) -> list[Placement]:
    """Split, or keep whole, the vocabulary of lookups and losses."""
    if space.kernel not in ("embedding", "cross_entropy") or "v" not in space.loops:
        return options

    def splits(option: Placement) -> bool:
        return any(isinstance(part, Split) and part.loop == "v" for part in option)

    return [option for option in options if splits(option) == constraints.vocabulary] or options


def _of_modules(options: list[Placement], op: Op, space: Space, mesh: Mesh, constraints: Constraints) -> list[Placement]:
    """Keep the placements that the user pinned for the op's module."""
    from fnmatch import fnmatchcase

    for pattern, wanted in constraints.modules.items():
        if is_contraction(space) and fnmatchcase(op.layer, pattern):
            for name, loop in wanted.items():
                axis = mesh.names.index(name)
                pinned = [option for option in options if isinstance(p := option[axis], Split) and p.loop == loop]
                options = pinned or options
    return options


def parameter_options(model: Model, op: Op, mesh: Mesh, constraints: Constraints) -> list[Layout]:
    """The layouts that a parameter may be stored in."""
    if op.target in constraints.stored:
        return [constraints.stored[op.target]]
    tensor = op.results[0]
    states = [REPLICATE]
    for dim, bounds in enumerate(model.factors.of_dims[Value(op.name)]):
        states += [shard(dim, outer) for outer in bounds]
    layouts = [option for option in itertools.product(states, repeat=len(mesh.sizes)) if fits(tensor.shape, option, mesh)]
    for axis, kind in enumerate(constraints.kinds):
        if kind is AxisKind.DP and constraints.fsdp is not None:
            split = [x for x in layouts if (x[axis].kind is StateKind.SHARD) == constraints.fsdp]
            layouts = split or layouts
        if kind is AxisKind.CP:
            layouts = [x for x in layouts if x[axis] == REPLICATE]
    return layouts


def output_options(tensor: Tensor, mesh: Mesh) -> list[Layout]:
    """The layouts that an output may be handed over in: scalars whole, larger tensors as the search likes."""
    states = [REPLICATE, *(shard(dim) for dim in range(len(tensor.shape)))]
    return [option for option in itertools.product(states, repeat=len(mesh.sizes)) if fits(tensor.shape, option, mesh)]
