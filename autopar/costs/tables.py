"""Seconds and bytes of single decisions on one mesh: an op under a placement, a tensor's journey, a parameter's update.

Comes in: the model's spaces and layouts, a mesh, a cluster. Goes out: to ``problem``, which tables them, and to ``assemble``, which
reports the very same numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from autopar.cost_models import Cluster, Device, Link, axis_link, collective_seconds, op_seconds
from autopar.ir import (
    ITEMSIZE,
    REPLICATE,
    Collective,
    Exchange,
    Family,
    Layout,
    Mesh,
    Op,
    Placement,
    RouteStep,
    Space,
    Split,
    StateKind,
    Tensor,
    local_shape,
    operand_layout,
    result_layout,
    route,
)
from autopar.structure import Model, RouteKey, first_rank_axis

# AdamW keeps two moments of the parameter's own dtype (torch.optim.AdamW).
OPTIMIZER_COPIES = 2
# AdamW reads parameter, gradient and both moments, and writes parameter and both moments.
OPTIMIZER_PASSES = 7

# Bytes of gradients that the runtime sums together (`Plan.bucket_nbytes`); DDP's default: large enough to hide latency, small enough
# to overlap.
BUCKET_NBYTES = 25 * 10**6

COLLECTIVE_KIND: Mapping[Collective, str] = {
    Collective.ALL_GATHER: "all_gather",
    Collective.REDUCE_SCATTER: "reduce_scatter",
    Collective.ALL_REDUCE: "all_reduce",
    Collective.ALL_TO_ALL: "all_to_all",
}


def operand_layout_of(model: Model, op: Op, placement: Placement, index: int) -> Layout:
    """What `op` needs operand `index` to be; an op without a rule needs it whole."""
    space = model.spaces.get(op.name)
    return tuple(REPLICATE for _ in placement) if space is None else operand_layout(space, placement, index)


def result_layout_of(model: Model, op: Op, placement: Placement, index: int) -> Layout:
    """What `op` makes of result `index`."""
    space = model.spaces.get(op.name)
    return tuple(REPLICATE for _ in placement) if space is None else result_layout(space, placement, index)


def local_nbytes(tensor: Tensor, layout: Layout, mesh: Mesh) -> int:
    """Bytes of one rank's part."""
    return math.prod(local_shape(tensor.shape, layout, mesh)) * ITEMSIZE[tensor.dtype]


def call_seconds(model: Model, device: Device, op: Op, ways: int, nbytes: int) -> tuple[float, float]:
    """(forward, backward) seconds of one of `ways` parts of a call, which reads and writes so many bytes."""
    space = model.spaces.get(op.name)
    flops = space.flops * space.points() / ways if space is not None else float(sum(t.numel for t in op.results))
    family = Family.POINTWISE if space is None else space.family
    dtype = op.results[0].dtype if op.results else "float32"
    forward = op_seconds(device, flops=flops, nbytes=nbytes, dtype=dtype, family=family)
    needing = sum(tensor.requires_grad for tensor in model.folded.graph.operand_tensors(op))
    if not needing or not any(tensor.requires_grad for tensor in op.results):
        return forward, 0.0
    factor = family.backward_work(needing)
    return forward, op_seconds(device, flops=factor * flops, nbytes=int(factor * nbytes), dtype=dtype, family=family)


class CostTables:
    """Costs of single decisions on one mesh; what was asked for once is remembered."""

    def __init__(self, model: Model, mesh: Mesh, cluster: Cluster) -> None:
        self.model = model
        self.mesh = mesh
        self.device = cluster.machine.device
        self.first = first_rank_axis(mesh)
        ranks = mesh.sizes[self.first :]
        links = tuple(axis_link(cluster, ranks, axis) for axis in range(len(ranks)))
        self.links: tuple[Link, ...] = (*links[: self.first], *links)  # the first stands for time too, over which nothing goes
        self._collectives: dict[tuple[str, int, int], float] = {}
        self._calls: dict[tuple[str, Placement], tuple[float, float]] = {}
        self._legs: dict[RouteKey, list[tuple[RouteStep, int]]] = {}

    def op_seconds(self, op: Op, placement: Placement) -> tuple[float, float]:
        """(forward, backward) seconds of one call under `placement`; the second has what a kernel exchanges in both directions."""
        key = op.name, placement
        if key not in self._calls:
            self._calls[key] = self._op_seconds(op, placement)
        return self._calls[key]

    def _op_seconds(self, op: Op, placement: Placement) -> tuple[float, float]:
        space = self.model.spaces.get(op.name)
        operands = self.model.folded.graph.operand_tensors(op)
        if space is not None and space.view:
            return 0.0, 0.0
        needs = [operand_layout_of(self.model, op, placement, i) for i in range(len(operands))]
        made = [result_layout_of(self.model, op, placement, i) for i in range(len(op.results))]
        nbytes = sum(local_nbytes(*pair, self.mesh) for pair in zip((*operands, *op.results), (*needs, *made), strict=True))
        ways = math.prod(size for part, size in zip(placement, self.mesh.sizes, strict=True) if isinstance(part, Split))
        forward, backward = call_seconds(self.model, self.device, op, ways, nbytes)
        return forward, backward + sum(seconds for *_, seconds in self.exchanges(op, placement))

    def exchanges(self, op: Op, placement: Placement) -> list[tuple[int, str, int, float]]:
        """The collectives inside of an op's kernel, of both directions together, as its rule states them.

        As (axis, collective, bytes that all calls move together, seconds of all calls together).
        """
        space = self.model.spaces.get(op.name)
        if space is None or not space.facts.exchanges:
            return []
        made: list[tuple[int, str, int, float]] = []
        for exchange in space.facts.exchanges:
            nbytes = self._exchanged_nbytes(space, exchange, placement)
            for axis, part in enumerate(placement):
                if axis >= self.first and isinstance(part, Split) and part.loop in exchange.split:
                    size = self.mesh.sizes[axis]
                    total = nbytes if exchange.collective == "all_reduce" else nbytes * size
                    times = exchange.forward + exchange.backward
                    seconds = times * collective_seconds(exchange.collective, total, size, self.links[axis])
                    made.append((axis, exchange.collective, times * nbytes, seconds))
        return made

    def _exchanged_nbytes(self, space: Space, exchange: Exchange, placement: Placement) -> int:
        """Bytes of a rank's part of the tensor that an op's kernel exchanges."""
        points = math.prod(space.loops[name].size for name in exchange.loops)
        ways = math.prod(
            size for part, size in zip(placement, self.mesh.sizes, strict=True) if isinstance(part, Split) and part.loop in exchange.loops
        )
        return exchange.itemsize * points // ways

    def collective_seconds(self, collective: Collective, axis: int, nbytes: int) -> float:
        """Seconds of one step of a journey along `axis`; `nbytes` is the larger of a rank's parts before and after it."""
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

    def legs(self, tensor: Tensor, start: Layout, need: Layout) -> list[tuple[RouteStep, int]]:
        """The moves of a tensor's journey, each with the bytes of the larger of a rank's parts before and after it."""
        # Along time nothing moves: a micro-batch takes its part of what is there. Ranks' parts lie inside of that, so that what ranks
        # have split of the whole batch they must bring together first.
        if not (self.first and start[0] == REPLICATE and need[0].kind is StateKind.SHARD):
            start = (*need[: self.first], *start[self.first :])
        # Whether blocks fit into one another on the way depends on the sizes; without blocks, all tensors go the same way.
        has_blocks = any(state.outer > 1 for state in start) or any(state.outer > 1 for state in need)
        key = (start, need, (tensor.shape, self.mesh.sizes) if has_blocks else None)
        legs = self._legs.get(key)
        if legs is None:
            moves = self.model.routes.get(key)
            if moves is None:
                moves = self.model.routes[key] = route(tensor.shape, start, need, self.mesh)
            legs = self._legs[key] = [
                (move, min(self._ways(move.split_before), self._ways(move.split_after))) for move in moves if move.axis >= self.first
            ]
        nbytes = tensor.nbytes
        return [(move, nbytes // ways) for move, ways in legs]

    def _ways(self, axes: tuple[int, ...]) -> int:
        return math.prod(self.mesh.sizes[axis] for axis in axes)

    def journey_seconds(self, tensor: Tensor, start: Layout, need: Layout, *, backward: bool) -> tuple[float, float]:
        """(forward, backward) seconds of taking `tensor` from `start` to `need`."""
        ahead = back = 0.0
        for move, nbytes in self.legs(tensor, start, need):
            ahead += self.collective_seconds(move.forward, move.axis, nbytes)
            if backward:
                back += self.collective_seconds(move.backward, move.axis, nbytes)
        return ahead, back

    def parameter_seconds(self, tensor: Tensor, start: Layout, need: Layout, uses: int) -> tuple[float, float]:
        """(gathers and scatters, deferred gradient reduction) seconds of one use of a parameter.

        A parameter that is stored split and needed whole is gathered in the forward, again in the backward (it isn't kept), and
        its gradient is reduce-scattered (ZeRO-3, Rajbhandari et al. 2020). A gradient that is Partial for a parameter stored
        whole is reduced once per step, whatever the number of `uses`, and hides behind the backward as far as the device can.
        """
        deferred = gathered = 0.0
        for move, nbytes in self.legs(tensor, start, need):
            forward = self.collective_seconds(move.forward, move.axis, nbytes)
            if move.forward is Collective.NONE:
                deferred += self.bucket_seconds(move.backward, move.axis, nbytes) / uses if tensor.requires_grad else 0.0
            else:
                backward = self.collective_seconds(move.backward, move.axis, nbytes) if tensor.requires_grad else 0.0
                again = forward if move.forward is Collective.ALL_GATHER and tensor.requires_grad else 0.0
                gathered += forward + again + backward
        return gathered, deferred * (1 - self.device.overlap)

    def bucket_seconds(self, collective: Collective, axis: int, nbytes: int) -> float:
        """Seconds of a gradient's share of a bucket: small gradients travel together."""
        full = max(nbytes, BUCKET_NBYTES)
        return self.collective_seconds(collective, axis, full) * nbytes / full

    def optimizer_seconds(self, tensor: Tensor, layout: Layout) -> float:
        """Seconds of the optimizer's update of one parameter."""
        if not tensor.requires_grad:
            return 0.0
        nbytes = OPTIMIZER_PASSES * local_nbytes(tensor, layout, self.mesh)
        return op_seconds(self.device, flops=0, nbytes=nbytes, dtype=tensor.dtype, family="pointwise")


def count_uses(model: Model) -> Counter[str]:
    """How often each op's results are read, by representative and for one of the ops that it stands for; at least once."""
    uses: Counter[str] = Counter()
    for edge in model.folded.edges:
        uses[edge.value.op] += edge.count
    return Counter({name: max(1, n // model.folded.count[name]) for name, n in uses.items()})


def layout_numbers(layouts: Sequence[Layout]) -> tuple[list[Layout], list[int]]:
    """The distinct layouts of a list, and the position of each entry among them."""
    distinct: dict[Layout, int] = {}
    numbers = [distinct.setdefault(layout, len(distinct)) for layout in layouts]
    return list(distinct), numbers
