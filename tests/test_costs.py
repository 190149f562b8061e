"""Costs and memory against closed forms and hand counts on a model of two linears."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from autopar.capture.export import capture
from autopar.cost_models import Cluster, axis_link, collective_seconds, op_seconds
from autopar.costs.tables import BUCKET_NBYTES, CostTables, local_nbytes
from autopar.ir.facts import Exchange
from autopar.ir.graph import Graph, Op, OpKind
from autopar.ir.graph import Tensor as IrTensor
from autopar.ir.layout import PARTIAL, REPLICATE, REPLICATE_PARTIAL_GRAD, Layout, Mesh, Split, fits, format_layout, shard
from autopar.ir.reshard import Collective, journey
from autopar.plans.plan import Plan
from autopar.rules.table import find_spaces
from autopar.structure.layers import fold
from autopar.structure.model import AnalyzedGraph, find_constants
from autopar.structure.roles import find_roles
from tests.planning import make_plan

BATCH, WIDTH, HIDDEN = 64, 256, 1024
SHARED = Cluster.parse("8xH100")
DEVICE = SHARED.machine.device


class TwoLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


@functools.cache
def graph() -> Graph:
    return capture(TwoLinears(), (torch.randn(BATCH, WIDTH),)).graph


def model_of(found: Graph) -> AnalyzedGraph:
    spaces, _ = find_spaces(found)
    return AnalyzedGraph(fold(found), spaces, find_roles(found, spaces), find_constants(found))


def tables(*sizes: int, cluster: Cluster = SHARED) -> CostTables:
    return CostTables(model_of(graph()), Mesh(("x", "y", "z")[: len(sizes)], sizes), cluster)


def linears() -> list[Op]:
    return [op for op in graph().of_kind(OpKind.CALL) if op.target == "aten.linear.default"]


@pytest.mark.parametrize(("loop", "ways"), [("o", (1, 8, 8)), ("i", (8, 8, 1)), ("n", (8, 1, 8))])
def test_seconds_of_a_split_linear(loop: str, ways: tuple[int, int, int]) -> None:
    up, down = linears()
    x, weight, y = (4 * size // n for size, n in zip((BATCH * WIDTH, WIDTH * HIDDEN, BATCH * HIDDEN), ways, strict=True))
    flops = 2 * BATCH * WIDTH * HIDDEN / 8
    ahead = op_seconds(DEVICE, flops=flops, nbytes=x + weight + y, dtype="float32", family="matmul")
    # The first linear's input needs no gradient: one product goes back; the second's does: two.
    assert tables(8).op_seconds(up, (Split(loop),)) == (ahead, ahead)
    swapped = {"o": "i", "i": "o", "n": "n"}[loop]
    twice = op_seconds(DEVICE, flops=2 * flops, nbytes=2 * (x + weight + y), dtype="float32", family="matmul")
    assert tables(8).op_seconds(down, (Split(swapped),)) == (ahead, twice)


def by_steps(costs: CostTables, tensor: IrTensor, start: Layout, need: Layout) -> tuple[float, float]:
    """The sum over the journey's own steps, sizes taken from the shapes that they carry."""
    ahead = back = 0.0
    for step in journey(tensor.shape, start, need, costs.mesh):
        nbytes = max(IrTensor(shape, tensor.dtype).nbytes for shape in (step.shape_before, step.shape_after))
        ahead += costs.collective_seconds(step.forward, step.axis, nbytes)
        back += costs.collective_seconds(step.backward, step.axis, nbytes)
    return ahead, back


@pytest.mark.parametrize("sizes", [(4,), (2, 2), (4, 2), (2, 4), (2, 3)])
def test_a_route_costs_what_its_journey_does(sizes: tuple[int, ...]) -> None:
    costs = tables(*sizes, cluster=Cluster.parse(f"{torch.Size(sizes).numel()}xcpu"))
    compared = 0
    # One set of tables for all shapes: routes are remembered, and what serves one tensor must be right for the others.
    for shape in [(8, 8), (24, 8), (8, 24), (12, 12), (6, 4)]:
        tensor = IrTensor(shape, "float32", requires_grad=True)
        states = [REPLICATE, PARTIAL, *(shard(dim, outer) for dim in range(2) for outer in (1, 2, 3))]
        starts = [x for x in itertools.product(states, repeat=len(sizes)) if fits(shape, x, costs.mesh)]
        needs = [x for x in itertools.product([*states, REPLICATE_PARTIAL_GRAD], repeat=len(sizes)) if fits(shape, x, costs.mesh)]
        for start, need in itertools.product(starts, needs):
            expected = by_steps(costs, tensor, start, need)
            got = costs.journey_seconds(tensor, start, need, backward=True)
            assert got == pytest.approx(expected, rel=1e-12), f"{shape}: {format_layout(start)} to {format_layout(need)}"
            compared += 1
    assert compared > 100


def test_zero_is_two_gathers_and_a_reduce_scatter() -> None:
    costs = tables(8)
    weight = IrTensor((HIDDEN, WIDTH), "float32", requires_grad=True)
    link = axis_link(SHARED, (8,), 0)
    gathered, deferred = costs.parameter_seconds(weight, (shard(0),), (REPLICATE_PARTIAL_GRAD,), 1)
    gather, scatter = (collective_seconds(kind, weight.nbytes, 8, link) for kind in ("all_gather", "reduce_scatter"))
    assert (gathered, deferred) == (pytest.approx(2 * gather + scatter), 0.0)
    frozen = IrTensor((HIDDEN, WIDTH), "float32")
    assert costs.parameter_seconds(frozen, (shard(0),), (REPLICATE_PARTIAL_GRAD,), 1) == (pytest.approx(gather), 0.0)


def test_a_partial_gradient_is_reduced_once_a_step_in_its_share_of_a_bucket() -> None:
    costs = tables(8)
    weight = IrTensor((HIDDEN, WIDTH), "float32", requires_grad=True)
    bucket = collective_seconds("all_reduce", BUCKET_NBYTES, 8, axis_link(SHARED, (8,), 0))
    exposed = bucket * weight.nbytes / BUCKET_NBYTES * (1 - DEVICE.overlap)
    for uses in (1, 2, 5):
        gathered, deferred = costs.parameter_seconds(weight, (REPLICATE,), (REPLICATE_PARTIAL_GRAD,), uses)
        assert gathered == 0.0
        assert uses * deferred == pytest.approx(exposed)


def test_one_rank_talks_to_nobody() -> None:
    costs = tables(1, cluster=Cluster.parse("1xH100"))
    for collective in (Collective.ALL_GATHER, Collective.REDUCE_SCATTER, Collective.ALL_REDUCE, Collective.ALL_TO_ALL):
        assert costs.collective_seconds(collective, 0, 10**9) == 0.0
    plan = make_plan(graph(), Cluster.parse("1xH100"))
    assert plan.seconds.communication == pytest.approx(0.0, abs=1e-9)
    assert plan.traffic == ()


def test_the_optimizer_is_faster_on_parts() -> None:
    costs = tables(2, 4)
    weight = IrTensor((8 * HIDDEN, 8 * WIDTH), "float32", requires_grad=True)
    layouts = [(REPLICATE, REPLICATE), (shard(0), REPLICATE), (REPLICATE, shard(1)), (shard(0), shard(1))]
    seconds = [costs.optimizer_seconds(weight, layout) for layout in layouts]
    assert seconds == sorted(seconds, reverse=True)
    assert len(set(seconds)) == len(seconds)
    assert [weight.nbytes // local_nbytes(weight, layout, costs.mesh) for layout in layouts] == [1, 2, 4, 8]
    assert costs.optimizer_seconds(IrTensor((8, 8), "float32"), layouts[0]) == 0.0


def batch_norm_exchange(ranks: int) -> float:
    """Seconds that a split batch adds to a batch norm beyond the work of its part."""
    norm_graph = capture(nn.BatchNorm2d(16), (torch.randn(8, 16, 4, 4),)).graph
    (norm,) = (op for op in norm_graph.of_kind(OpKind.CALL) if "batch_norm" in op.target)
    costs = CostTables(model_of(norm_graph), Mesh(("x",), (ranks,)), SHARED)
    ahead, back = costs.op_seconds(norm, (Split("n"),))
    return back - 1.5 * ahead + 0.5 * DEVICE.launch_seconds


def test_the_statistics_of_a_batch_norm_are_paid_for() -> None:
    link = axis_link(SHARED, (8,), 0)
    # Two statistics of 16 channels in float32, in each direction.
    assert batch_norm_exchange(8) == pytest.approx(4 * collective_seconds("all_reduce", 4 * 16, 8, link), rel=1e-3)


def test_a_kernel_costs_what_its_rule_says_it_exchanges() -> None:
    """A batch norm whose rule states other exchanges: an axis splits the batch in 4, one the channels in 2."""
    norm_graph = capture(nn.BatchNorm2d(16), (torch.randn(8, 16, 4, 4),)).graph
    (norm,) = (op for op in norm_graph.of_kind(OpKind.CALL) if "batch_norm" in op.target)
    model, mesh, split = model_of(norm_graph), Mesh(("x", "y"), (4, 2)), frozenset("n")
    space = model.spaces[norm.name]

    def seconds(*exchanges: Exchange) -> tuple[float, float]:
        stated = replace(space, facts=replace(space.facts, exchanges=exchanges))
        tables = CostTables(replace(model, spaces={**model.spaces, norm.name: stated}), mesh, SHARED)
        return tables.op_seconds(norm, (Split("n"), Split("c")))

    ahead, back = seconds()
    gathers = Exchange(split, "all_gather", ("n", "c"), forward=1, backward=2, itemsize=8)
    sums = Exchange(split, "all_reduce", ("c", "x0"), forward=0, backward=1, itemsize=2)
    link = axis_link(SHARED, (4, 2), 0)
    # A rank's part is 2 rows of 8 channels, four ranks' parts are 8 rows; the sum is of 8 channels and 4 rows of the image.
    expected = 3 * collective_seconds("all_gather", 8 * 8 * 8, 4, link) + collective_seconds("all_reduce", 2 * 8 * 4, 4, link)
    assert seconds(gathers, sums) == (ahead, pytest.approx(back + expected, rel=1e-12))
    assert seconds(Exchange(frozenset(["x0"]), "all_reduce", ("c",), forward=1, backward=1)) == (ahead, back)


def plan_of(pins: dict[str, object]) -> Plan:
    return make_plan(graph(), SHARED, pins=pins)


@pytest.mark.parametrize(("fsdp", "ways"), [(True, 8), (False, 1)])
def test_memory_of_data_parallelism_by_hand(fsdp: bool, ways: int) -> None:
    memory = plan_of({"dp": 8, "fsdp": fsdp}).memory
    weights = 2 * WIDTH * HIDDEN * 4
    assert (memory.parameters, memory.gradients, memory.optimizer) == (weights // ways, weights // ways, 2 * weights // ways)
    # Kept: the input's part, which is cut out of the whole input, relu's result, and the output that the user holds.
    batch = BATCH // 8
    assert memory.buffers == BATCH * WIDTH * 4
    assert memory.activations == batch * (WIDTH + HIDDEN + WIDTH) * 4
    # The hungriest op is a linear: operands and result, and their gradients; the weight only where it had to be gathered.
    gathered = WIDTH * HIDDEN * 4 if fsdp else 0
    assert memory.workspace >= 2 * (gathered + batch * (HIDDEN + WIDTH) * 4)


def test_kept_activations_against_autograd() -> None:
    model, x = TwoLinears(), torch.randn(BATCH, WIDTH)
    parameters = {p.untyped_storage().data_ptr() for p in (*model.parameters(), x)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    real = sum(nbytes for pointer, nbytes in kept.items() if pointer not in parameters) + y.untyped_storage().nbytes()
    assert make_plan(graph(), Cluster.parse("1xH100")).memory.activations == real
