"""Seconds and bytes of single decisions on one mesh: a call under a placement, a tensor's journey, a parameter's update.

Comes in: an `AnalyzedGraph`, a mesh, a cluster. Goes out: `CostTables`, whose prices the placement problem asks for, and of which
``costs.blocks`` makes rows.

Seconds are those of one rank. On a mesh with micro-batches as its first axis (`with_microbatch_axis`) they are those of one micro-batch,
bytes too. The formulas of devices and links are those of `autopar.cost_models`; here stands what they are applied to:

- a call: flops / parts that its placement makes, bytes of a rank's parts of operands and results; what its kernel exchanges;
- a journey: every step as its collective over the larger of a rank's parts before and after it;
- a parameter stored split and needed whole (ZeRO-3): gather in the forward, gather in the backward, reduce-scatter of the gradient;
- a parameter stored whole whose gradient is a part of a sum: one all-reduce per step, of which the share `Device.overlap` is overlapped
  with the backward and costs nothing;
- AdamW's update of a rank's part of a parameter: the bytes that it reads and writes; with mixed precision the casts of a step too.

Under mixed precision (`Tensor.storage`) a parameter is gathered in the dtype in which the program reads it, its gradient is summed in
another, and what is stored and updated is counted in a third.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autopar.cost_models import Cluster, Device, Link, axis_link, collective_seconds, op_seconds
from autopar.ir import (
    ITEMSIZE,
    MESSAGE_NBYTES,
    REPLICATE,
    Collective,
    Exchange,
    Family,
    Layout,
    Mesh,
    Op,
    OpKind,
    Placement,
    RouteStep,
    Space,
    Split,
    State,
    StateKind,
    Tensor,
    local_shape,
    operand_layout,
    program_layout,
    result_layout,
    route,
)
from autopar.plans import Purpose
from autopar.structure import AnalyzedGraph, RouteKey, first_rank_axis

# Bytes of gradients that the runtime sums together (`Plan.bucket_nbytes`); DDP's default: large enough to hide latency, small enough
# to overlap.
BUCKET_NBYTES = 25 * 10**6

COLLECTIVE_KIND: Mapping[Collective, str] = {
    Collective.ALL_GATHER: "all_gather",
    Collective.REDUCE_SCATTER: "reduce_scatter",
    Collective.ALL_REDUCE: "all_reduce",
    Collective.ALL_TO_ALL: "all_to_all",
}


_BESIDE_COMPUTING = (Collective.ALL_GATHER, Collective.REDUCE_SCATTER)


def operand_layout_of(model: AnalyzedGraph, op: Op, placement: Placement, index: int) -> Layout:
    """The layout in which `op` reads its operand number `index`; an op without a rule reads it whole."""
    space = model.spaces.get(op.name)
    return tuple(REPLICATE for _ in placement) if space is None else operand_layout(space, placement, index)


def result_layout_of(model: AnalyzedGraph, op: Op, placement: Placement, index: int) -> Layout:
    """The layout in which `op` makes its result number `index`; an op without a rule makes it whole."""
    space = model.spaces.get(op.name)
    return tuple(REPLICATE for _ in placement) if space is None else result_layout(space, placement, index)


def local_nbytes(tensor: Tensor, layout: Layout, mesh: Mesh) -> int:
    """Bytes of one rank's part of a tensor; where micro-batches are an axis of the mesh, of one micro-batch's part."""
    return math.prod(local_shape(tensor.shape, layout, mesh)) * ITEMSIZE[tensor.dtype]


@dataclass(frozen=True, slots=True)
class KeptBytes:
    """Bytes that one rank keeps of a parameter from step to step.

    Attributes:
        stored: the parameter itself.
        copy: its copy as the program is given it, where that is another dtype or, at ZeRO levels 1 and 2, more than the stored part; a
            program that gathers the parameter has none.
        gradient: its gradient, with ZeRO level 1 also the whole one that adds up until it is summed; 0 for a parameter that isn't trained.
        optimizer: the optimizer's states; 0 likewise.
    """

    stored: int
    copy: int
    gradient: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.stored + self.copy + self.gradient + self.optimizer


def kept_nbytes(tensor: Tensor, layout: Layout, mesh: Mesh) -> KeptBytes:
    """Bytes that one rank keeps of its part of a parameter."""
    numel = math.prod(local_shape(tensor.shape, layout, mesh))
    given = math.prod(local_shape(tensor.shape, program_layout(layout), mesh))
    stored = numel * ITEMSIZE[tensor.stored_dtype]
    level = max((state.level for state in layout), default=0)
    unsummed = given * ITEMSIZE[tensor.stored_dtype] if level == 1 else 0
    return KeptBytes(
        stored=stored,
        copy=given * ITEMSIZE[tensor.dtype] if level or tensor.stored_dtype != tensor.dtype else 0,
        gradient=stored + unsummed if tensor.requires_grad else 0,
        optimizer=numel * sum(ITEMSIZE[dtype] for dtype in tensor.states) if tensor.requires_grad else 0,
    )


def reduced_nbytes(tensor: Tensor, nbytes: int) -> int:
    """Bytes in which a parameter's gradient is summed over ranks, of a part that has `nbytes` in the dtype that the program reads."""
    return nbytes * ITEMSIZE[tensor.reduced_dtype] // ITEMSIZE[tensor.dtype]


@dataclass(frozen=True, slots=True)
class KernelExchange:
    """What an op's kernel exchanges along an axis in forward and backward together.

    Attributes:
        axis: index of the mesh axis.
        collective: its kind.
        nbytes: bytes of a rank's part, times how often it is exchanged; of a ring and a halo what the rank sends that sends most.
        seconds: that the op waits for it.
        hidden: seconds that run beside the op's own computing.
    """

    axis: int
    collective: str
    nbytes: int
    seconds: float
    hidden: float


def _largest_part(space: Space | None, placement: Placement, mesh: Mesh) -> float:
    """The work of the part that has most of it, as a multiple of the mean (`Facts.triangular`)."""
    if space is None or not space.facts.triangular:
        return 1.0
    ways = math.prod(
        size
        for part, size in zip(placement, mesh.sizes, strict=True)
        if isinstance(part, Split) and part.loop in space.facts.triangular and not part.zigzag
    )
    return 2.0 - 1.0 / ways


def call_seconds(model: AnalyzedGraph, device: Device, op: Op, ways: int, nbytes: int, dearest: float = 1.0) -> tuple[float, float]:
    """(forward, backward) seconds of a part of a call on one device.

    The backward takes as many flops and bytes as the forward, times a factor of the op's family (`Family.backward_work`), and once more
    where it computes the forward again (`Facts.recomputes`); none when no operand or no result needs a gradient.

    Args:
        model: with the space of the call.
        device: that runs it.
        op: the call.
        ways: number of equal parts into which the call's work is split.
        nbytes: that one part reads and writes in the forward.
        dearest: the work of the part that has most of it, as a multiple of the mean.
    """
    space = model.spaces.get(op.name)
    flops = dearest * space.flops * space.points() / ways if space is not None else float(sum(t.numel for t in op.results))
    family = Family.POINTWISE if space is None else space.family
    operands = model.folded.graph.operand_tensors(op)
    # A product is computed in the dtype of what it reads, also where its result is a loss in a wider one.
    dtype = operands[0].dtype if operands and family is not Family.POINTWISE else op.results[0].dtype if op.results else "float32"
    chunks, worked = _read_workspace(space, ways)

    def seconds(factor: float) -> float:
        parts = op_seconds(device, flops=factor * flops / chunks, nbytes=int(factor * nbytes / chunks), dtype=dtype, family=family)
        passes = op_seconds(device, flops=0, nbytes=worked, dtype=dtype, family="pointwise") if worked else 0.0
        return chunks * parts + passes

    forward = seconds(1.0)
    needing = sum(tensor.requires_grad for tensor in operands)
    if not needing or not any(tensor.requires_grad for tensor in op.results):
        return forward, 0.0
    again = 1.0 if space is not None and space.facts.recomputes else 0.0
    return forward, seconds(family.backward_work(needing) + again)


def _read_workspace(space: Space | None, ways: int) -> tuple[int, int]:
    """Of a part of an op: the number of chunks in which it is worked off, and the bytes of its workspace that it reads and writes."""
    workspace = None if space is None else space.facts.workspace
    if space is None or workspace is None:
        return 1, 0
    return workspace.chunks, workspace.passes * workspace.itemsize * math.prod(space.loops[name].size for name in workspace.loops) // ways


class CostTables:
    """Costs of single decisions on one mesh; what was asked for once is remembered.

    Attributes:
        first_axis: number of the first axis that consists of ranks (`first_rank_axis`).
        links: per axis of the mesh the link between its ranks.
        ahead: how many blocks ahead the program begins gathers of parameters (`Plan.prefetch`).
        halved: the calls that the program runs once for each half of the batch (`Plan.half_batches`); none without.
    """

    def __init__(self, model: AnalyzedGraph, mesh: Mesh, cluster: Cluster, ahead: int = 0, halved: frozenset[str] = frozenset()) -> None:
        self.model = model
        self.mesh = mesh
        self.device = cluster.machine.device
        self.ahead = ahead
        self.halved = halved
        self.first_axis = first_rank_axis(mesh)
        ranks = mesh.sizes[self.first_axis :]
        links = tuple(axis_link(cluster, ranks, axis) for axis in range(len(ranks)))
        self.links: tuple[Link, ...] = (*links[: self.first_axis], *links)  # an axis of micro-batches has no link: its entry is never used
        self._collectives: dict[tuple[str, int, int], float] = {}
        self._calls: dict[tuple[str, Placement], tuple[float, float]] = {}
        self._computing: dict[tuple[str, Placement], tuple[float, float]] = {}
        self._steps: dict[RouteKey, list[tuple[RouteStep, int]]] = {}

    @property
    def gather_overlap(self) -> float:
        """The share of gathers of parameters, and of sums of their gradients, that runs beside computing where there is enough of that."""
        return self.device.overlap if self.ahead else 0.0

    def op_seconds(self, op: Op, placement: Placement) -> tuple[float, float]:
        """(forward, backward) seconds of one call under a placement; what its kernel exchanges in both directions is in the second."""
        key = op.name, placement
        if key not in self._calls:
            forward, backward = self._computing_seconds(op, placement)
            self._calls[key] = forward, backward + sum(exchange.seconds for exchange in self.exchanges(op, placement))
        return self._calls[key]

    def _computing_seconds(self, op: Op, placement: Placement) -> tuple[float, float]:
        """(forward, backward) seconds of one call without what its kernel exchanges."""
        key = op.name, placement
        if key not in self._computing:
            self._computing[key] = self._compute_call(op, placement)
        return self._computing[key]

    def _compute_call(self, op: Op, placement: Placement) -> tuple[float, float]:
        space = self.model.spaces.get(op.name)
        operands = self.model.folded.graph.operand_tensors(op)
        if space is not None and space.view:
            return 0.0, 0.0
        needs = [operand_layout_of(self.model, op, placement, i) for i in range(len(operands))]
        made = [result_layout_of(self.model, op, placement, i) for i in range(len(op.results))]
        nbytes = sum(local_nbytes(*pair, self.mesh) for pair in zip((*operands, *op.results), (*needs, *made), strict=True))
        ways = math.prod(size for part, size in zip(placement, self.mesh.sizes, strict=True) if isinstance(part, Split))
        dearest = _largest_part(space, placement, self.mesh)
        if op.name not in self.halved:
            return call_seconds(self.model, self.device, op, ways, nbytes, dearest)
        return self._halved_seconds(op, needs, ways, nbytes, dearest)

    def _halved_seconds(self, op: Op, needs: Sequence[Layout], ways: int, nbytes: int, dearest: float) -> tuple[float, float]:
        """Seconds of a call that runs for each half of the batch: both read all of its parameters, whose two gradients are added."""
        graph = self.model.folded.graph
        parameters = [
            local_nbytes(graph.tensor(value), need, self.mesh)
            for value, need in zip(op.operands, needs, strict=True)
            if graph.by_name[value.op].kind is OpKind.PARAMETER
        ]
        forward, backward = call_seconds(self.model, self.device, op, 2 * ways, (nbytes + sum(parameters)) // 2, dearest)
        added = sum(op_seconds(self.device, flops=0, nbytes=3 * size, dtype="float32", family="pointwise") for size in parameters)
        return 2 * forward, 2 * backward + (added if backward else 0.0)

    def exchanges(self, op: Op, placement: Placement) -> list[KernelExchange]:
        """The collectives inside of an op's kernel under a placement, as the op's rule states them (`Facts.exchanges`)."""
        space = self.model.spaces.get(op.name)
        if space is None or not space.facts.exchanges:
            return []
        computing = dict(zip(("forward", "backward"), self._computing_seconds(op, placement), strict=True))
        made: list[KernelExchange] = []
        halves = 2 if op.name in self.halved else 1
        for exchange in space.facts.exchanges:
            part_nbytes = self._exchanged_nbytes(space, exchange, placement)
            for axis, part in enumerate(placement):
                if axis >= self.first_axis and isinstance(part, Split) and part.loop in exchange.split:
                    size = self.mesh.sizes[axis]
                    collective, nbytes = exchange.collective, part_nbytes
                    if (halo := exchange.halo) is not None and not part.zigzag:
                        collective, nbytes = "halo", part_nbytes * size // halo.length * halo.most_sent(size)
                    total = nbytes if collective == "all_reduce" else nbytes * size
                    once = halves * collective_seconds(collective, total / halves, size, self.links[axis])
                    seconds = hidden = 0.0
                    for direction, times in (("forward", exchange.forward), ("backward", exchange.backward)):
                        # Nothing is there to hide the first part's arrival but the part that a rank has itself.
                        beside = computing[direction] * (size - 1) / size if exchange.is_hidden else 0.0
                        covered = min(beside, self.device.overlap * times * once)
                        computing[direction] -= covered * size / (size - 1)
                        hidden += covered
                        seconds += times * once - covered
                    times = exchange.forward + exchange.backward
                    moved = times * nbytes * (size - 1 if collective == "ring" else 1)
                    made.append(KernelExchange(axis, collective, moved, seconds, hidden))
        return made

    def _exchanged_nbytes(self, space: Space, exchange: Exchange, placement: Placement) -> int:
        """Bytes of a rank's part of the tensor that an op's kernel exchanges: a number per point of the loops `Exchange.loops`."""
        points = math.prod(space.loops[name].size for name in exchange.loops)
        ways = math.prod(
            size for part, size in zip(placement, self.mesh.sizes, strict=True) if isinstance(part, Split) and part.loop in exchange.loops
        )
        return exchange.itemsize * points // ways

    def collective_seconds(self, collective: Collective, axis: int, nbytes: int) -> float:
        """Seconds of one step of a journey.

        Args:
            collective: or a copy on the rank itself, which is a pass over memory; NONE costs nothing.
            axis: along which it goes.
            nbytes: of the larger of a rank's parts before and after it.
        """
        if collective is Collective.NONE:
            return 0.0
        key = (collective.value, axis, nbytes)
        if key not in self._collectives:
            if collective in COLLECTIVE_KIND:
                size = self.mesh.sizes[axis]
                # A rank's part of an all-to-all is one n-th of what the ranks exchange together.
                total = nbytes * size if collective is Collective.ALL_TO_ALL else nbytes
                seconds = collective_seconds(COLLECTIVE_KIND[collective], total, size, self.links[axis])
            else:
                seconds = op_seconds(self.device, flops=0, nbytes=nbytes, dtype="float32", family="pointwise")
            self._collectives[key] = seconds
        return self._collectives[key]

    def steps(self, tensor: Tensor, start: Layout, need: Layout) -> list[tuple[RouteStep, int]]:
        """The steps that take a tensor from one layout to another, each with the bytes of the larger of a rank's parts before and after."""
        # Along the axis of micro-batches nothing is exchanged: a micro-batch takes its part of what is there. Ranks' parts lie inside of
        # that part, so what ranks have split of the whole batch they must gather first.
        if not (self.first_axis and start[0] == REPLICATE and need[0].kind is StateKind.SHARD):
            start = (*need[: self.first_axis], *start[self.first_axis :])
        # Whether blocks fit into one another on the way depends on the sizes; without blocks, all tensors go the same way.
        has_blocks = any(state.outer > 1 or state.zigzag for state in (*start, *need))
        key = (start, need, (tensor.shape, self.mesh.sizes) if has_blocks else None)
        steps = self._steps.get(key)
        if steps is None:
            path = self.model.routes.get(key)
            if path is None:
                path = self.model.routes[key] = route(tensor.shape, start, need, self.mesh)
            steps = self._steps[key] = [
                (step, min(self._ways(step.split_before), self._ways(step.split_after))) for step in path if step.axis >= self.first_axis
            ]
        nbytes = tensor.nbytes
        return [(step, nbytes // ways) for step, ways in steps]

    def _ways(self, axes: tuple[int, ...]) -> int:
        """Number of parts that splits along these axes make."""
        return math.prod(self.mesh.sizes[axis] for axis in axes)

    def journey_seconds(self, tensor: Tensor, start: Layout, need: Layout, *, backward: bool) -> tuple[float, float]:
        """(seconds of taking a tensor from one layout to another, those of its gradient's way back; 0 without `backward`)."""
        forward_s = backward_s = 0.0
        for step, nbytes in self.steps(tensor, start, need):
            forward_s += self.collective_seconds(step.forward, step.axis, nbytes)
            if backward:
                backward_s += self.collective_seconds(step.backward, step.axis, nbytes)
        return forward_s, backward_s

    def parameter_seconds(self, tensor: Tensor, start: Layout, need: Layout, uses: int) -> tuple[float, float]:
        """Seconds of one use of a parameter, as (those of every micro-batch, those once per step).

        Every micro-batch takes the steps from the stored layout to the one that is read, and what `parameter_backward` says for each. The
        gradient of a parameter that is stored whole may be a part of a sum over ranks: it is added up once per step, in a bucket, and
        overlapped with the backward as far as the device can. Of gathers that are begun ahead, and of their gradients' sums, the share
        `gather_overlap` counts as hidden, whether there is computing enough or not: ``costs.ahead`` knows, as it knows the blocks.
        At ZeRO level 2 the gradients of every micro-batch are summed (`sums_each`), and nothing of that counts as hidden.

        Args:
            tensor: the parameter.
            start: the layout in which it is stored.
            need: the layout in which it is read.
            uses: how many ops read the parameter: they share its one sum per step.
        """
        deferred = gathered = 0.0
        # Blocks under micro-batches may be on stages of their own, where nothing runs beside what is gathered.
        gather_overlap = 0.0 if self.first_axis else self.gather_overlap
        for step, nbytes in self.steps(tensor, program_layout(start), need):
            if step.forward is Collective.NONE:
                if tensor.requires_grad:
                    summed = reduced_nbytes(tensor, nbytes)
                    seconds = self.bucket_seconds(sum_of(start[step.axis], step), step.axis, summed) / uses
                    if self.sums_each(start):
                        gathered += seconds
                    else:
                        deferred += seconds
            else:
                in_backward = parameter_backward(tensor, step, nbytes)
                for collective, moved in ((step.forward, nbytes), *((collective, moved) for _, collective, moved in in_backward)):
                    seconds = self.collective_seconds(collective, step.axis, moved)
                    gathered += seconds * (1 - gather_overlap) if collective in _BESIDE_COMPUTING else seconds
        return gathered, deferred * (1 - self.device.overlap)

    @property
    def has_microbatches(self) -> bool:
        """Whether a step is more than one micro-batch."""
        return self.first_axis > 0 and self.mesh.sizes[0] > 1

    def sums_each(self, layout: Layout) -> bool:
        """Whether the gradient of a parameter that is stored so is summed over ranks after every micro-batch, and added up in parts."""
        return self.has_microbatches and any(state.level == 2 for state in layout)

    def bucket_seconds(self, collective: Collective, axis: int, nbytes: int) -> float:
        """Seconds of a collective that a parameter takes part in once per step, together with others.

        An all-reduce of a gradient is the share, by bytes, of a full bucket. Gathers and scatters of ZeRO levels 1 and 2 are messages of
        their own from `MESSAGE_NBYTES` on; smaller ones share one with others of their block, counted as an eighth of it.
        """
        if collective is Collective.ALL_REDUCE:
            full = max(nbytes, BUCKET_NBYTES)
            return self.collective_seconds(collective, axis, full) * nbytes / full
        together = 1 if nbytes >= MESSAGE_NBYTES else 8
        return self.collective_seconds(collective, axis, together * nbytes) / together

    def optimizer_seconds(self, tensor: Tensor, layout: Layout) -> float:
        """Seconds of AdamW's update of a rank's part of one parameter; 0 for one that isn't trained.

        The update reads the parameter, its gradient and the states, and writes the parameter and the states. Where the program reads
        another dtype than the stored one, the parameter is cast once per step, and its gradient back.
        """
        if not tensor.requires_grad:
            return 0.0
        kept = kept_nbytes(tensor, layout, self.mesh)
        nbytes = 3 * kept.stored + 2 * kept.optimizer
        if tensor.stored_dtype != tensor.dtype:
            nbytes += 2 * kept.stored + 2 * local_nbytes(tensor, layout, self.mesh)
        return op_seconds(self.device, flops=0, nbytes=nbytes, dtype=tensor.stored_dtype, family="pointwise")

    def held_gathers(self, tensor: Tensor, layout: Layout) -> list[tuple[int, int, float]]:
        """The gathers, once per step, of a parameter of ZeRO level 1 or 2, which programs are given whole.

        Each is (axis, bytes of the whole, seconds).
        """
        nbytes = local_nbytes(tensor, program_layout(layout), self.mesh)
        axes = [axis for axis, state in enumerate(layout) if state.level]
        return [(axis, nbytes, self.bucket_seconds(Collective.ALL_GATHER, axis, nbytes)) for axis in axes]

    def step_seconds(self, tensor: Tensor, layout: Layout) -> float:
        """Seconds once per step of a parameter that is stored so: AdamW's update, and the gathers of ZeRO levels 1 and 2."""
        exposed = 1.0 if self.first_axis else 1 - self.gather_overlap
        return self.optimizer_seconds(tensor, layout) + exposed * sum(seconds for *_, seconds in self.held_gathers(tensor, layout))


def sum_of(stored: State, step: RouteStep) -> Collective:
    """The collective of the sum over ranks, once per step, of a gradient that a step leaves: every rank needs what it stores of it."""
    return Collective.REDUCE_SCATTER if stored.level and step.backward is Collective.ALL_REDUCE else step.backward


def parameter_backward(tensor: Tensor, step: RouteStep, nbytes: int) -> tuple[tuple[Purpose, Collective, int], ...]:
    """What the backward of every micro-batch does, in this order, for a step of the way from a parameter's stored layout to a reader's.

    What was gathered in the forward isn't saved, so it is gathered again; then the gradient goes back, as with ZeRO-3 (Rajbhandari et al.
    2020): for an all-gather, (all-gather of the parameter, reduce-scatter of its gradient). A step that moves nothing in the forward leaves
    its gradient to the sum over ranks once per step.

    Args:
        tensor: the parameter.
        step: the step.
        nbytes: of the larger of a rank's parts before and after the step.

    Returns per collective what it is for, which it is, and the bytes of the larger part.
    """
    if not tensor.requires_grad or step.forward is Collective.NONE:
        return ()
    again = ((Purpose.PARAMETERS, step.forward, nbytes),) if step.forward is Collective.ALL_GATHER else ()
    # Only where parts are added up is the dtype that of sums.
    moved = reduced_nbytes(tensor, nbytes) if step.backward is Collective.REDUCE_SCATTER else nbytes
    back = ((Purpose.GRADIENTS, step.backward, moved),) if step.backward is not Collective.NONE else ()
    return again + back


def count_uses(model: AnalyzedGraph) -> Counter[str]:
    """Per representative how many operands read a result of one of the ops that it stands for, on average, rounded down; at least 1.

    What nothing reads isn't there: its count is 0.
    """
    uses: Counter[str] = Counter()
    for edge in model.folded.edges:
        uses[edge.value.op] += edge.count
    return Counter({name: max(1, number // model.folded.count[name]) for name, number in uses.items()})


def layout_numbers(layouts: Sequence[Layout]) -> tuple[list[Layout], list[int]]:
    """The distinct layouts of a list, and the position of each entry among them."""
    distinct: dict[Layout, int] = {}
    numbers = [distinct.setdefault(layout, len(distinct)) for layout in layouts]
    return list(distinct), numbers
