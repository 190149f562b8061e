"""Plans with pipelines, micro-batches and recomputation: what is asked for is had, what can't be had says why, memory decides."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import DEEP, ZOO

from autopar.capture.export import capture
from autopar.checks.verification import verify_plan
from autopar.cost_models import Cluster
from autopar.errors import InfeasibleError, InputError
from autopar.ir.graph import Graph, OpKind
from autopar.ir.layout import REPLICATE, StateKind, shard
from autopar.plans.pins import NO_PINS
from autopar.plans.plan import Plan
from autopar.rules.table import find_spaces
from autopar.schedules.families import SCHEDULES
from autopar.search.planner import pin_pipeline
from autopar.structure.blocks import find_chain
from autopar.structure.layers import fold
from tests.planning import make_plan


class Layers(nn.Module):
    """Linear layers of one width on a residual stream, and a loss over classes."""

    def __init__(self, count: int = 8, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, width)) for _ in range(count)
        )
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        logits = self.head(x)
        return logits if y is None else nn.functional.cross_entropy(logits, y)


@pytest.fixture(scope="module")
def layers() -> Graph:
    return capture(Layers(), (torch.randn(16, 32), torch.randint(0, 8, (16,)))).graph


def plan_for(graph: Graph, cluster: str = "4xcpu", memory: int | None = None, **pins: object) -> Plan:
    found = Cluster.parse(cluster)
    return make_plan(graph, found if memory is None else found.with_memory(memory), pins=pins)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_pinned_schedule_is_had(layers: Graph, schedule: str) -> None:
    pipeline = plan_for(layers, pp=2, microbatches=4, schedule=schedule).pipeline
    assert (pipeline.ranks, pipeline.schedule, pipeline.microbatches) == (2, schedule, 4)
    assert {block.stage for block in pipeline.blocks} == set(range(pipeline.stages))


def test_pins_of_axes_and_of_the_pipeline_go_together(layers: Graph) -> None:
    plan = plan_for(layers, pp=2, tp=2, recompute="full")
    assert (plan.pipeline.ranks, plan.mesh.names, plan.mesh.sizes, plan.world_size) == (2, ("tp",), (2,), 4)
    assert {block.recompute for block in plan.pipeline.blocks} == {"full"}
    assert plan.seconds.recompute > 0


def test_micro_batches_without_a_pipeline_add_gradients_up(layers: Graph) -> None:
    plan = plan_for(layers, microbatches=4, pp=1)
    assert (plan.pipeline.ranks, plan.pipeline.microbatches) == (1, 4)


def test_a_layer_goes_where_the_user_wants_it(layers: Graph) -> None:
    plan = make_plan(layers, Cluster.parse("4xcpu"), pins={"pp": 2, "schedule": "1f1b", "layers.6": {"pp": 0}})
    stages = {block.name: block.stage for block in plan.pipeline.blocks}
    assert stages["layers.6"] == 0
    assert max(stages.values()) == 1


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"pp": 3}, "multiple of 3 ranks"),
        ({"pp": 0}, "an integer from 1"),
        ({"pp": 4, "chunks": 4}, "blocks at most"),
        ({"pp": 2, "schedule": "zigzag"}, "there are gpipe"),
        ({"pp": 2, "schedule": "zb-v", "chunks": 3}, "zb-v"),
        ({"pp": 2, "microbatches": 3}, r"batch of 16 .* take a divisor"),
        ({"recompute": "half"}, "there are none, selective, full"),
        ({"pp": 2, "layers.77": {"pp": 1}}, "puts no block on stage 1"),
        ({"pp": 2, "layers.*": {"pp": -1}}, "an integer from 0"),
    ],
)
def test_what_can_not_be_had_says_why(layers: Graph, pins: Mapping[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_plan(layers, Cluster.parse("4xcpu"), pins=pins)


def test_a_mesh_of_all_ranks_goes_with_micro_batches_and_recomputation(layers: Graph) -> None:
    for pins in ({"microbatches": 4}, {"recompute": "full"}):
        plan = make_plan(layers, Cluster.parse("4xcpu"), mesh={"dp": 2, "tp": 2}, pins=pins)
        assert (plan.pipeline.ranks, str(plan.mesh)) == (1, "dp=2 x tp=2")


@pytest.mark.parametrize(
    ("mesh", "pins", "message"),
    [
        ({"pp": 2, "dp": 2}, {"pp": 4}, "the mesh has pp=2 and pin pp=4"),
        ({"dp": 4}, {"tp": 2}, "the pins tp=2 contradict each other"),
        ({"micro": 4}, {}, "mesh axis 'micro': the name is taken"),
        (["dp"], {}, "a dict is needed"),
        (None, ["dp=4"], "a dict is needed"),
        (None, {"schedule": ["1f1b"]}, "is unknown; there are gpipe"),
        (None, {"layers.*": {"tp": 3}}, "tp=3 is no loop"),
        (None, {"pp": 2, "tp": 4}, "pins tp=4 need a multiple of 4 ranks, each of the 2 pipeline ranks of 1x4xcpu has 2"),
        ({"pp": 2, "tp": 4}, {}, "mesh tp=4 has 4 ranks, each of the 2 pipeline ranks of 1x4xcpu has 2"),
    ],
)
def test_meshes_and_pins_that_can_not_be_used_say_why(layers: Graph, mesh: Any, pins: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_plan(layers, Cluster.parse("4xcpu"), mesh=mesh, pins=pins)


def test_layers_out_of_order_can_not_be_had(layers: Graph) -> None:
    with pytest.raises(
        InfeasibleError, match=r"'layers.5' is pinned to stage 0, block 'layers.2' before it to stage 1; stages are in order"
    ):
        make_plan(layers, Cluster.parse("4xcpu"), pins={"pp": 2, "layers.2": {"pp": 1}, "layers.5": {"pp": 0}})


def test_a_loss_outside_gets_a_schedule_that_can_wait_for_it() -> None:
    graph = capture(Layers(), (torch.randn(16, 32),)).graph
    assert plan_for(graph, pp=2).pipeline.schedule == "gpipe"


def test_batch_statistics_keep_a_batch_whole() -> None:
    model, inputs = ZOO["resnet"]()
    with pytest.raises(InputError, match=r"batch_norm.*tests/zoo.py"):
        make_plan(capture(model, inputs).graph, Cluster.parse("4xcpu"), pins={"pp": 2, "microbatches": 2})


def test_short_memory_is_met_by_recomputation() -> None:
    model = Layers(count=6, width=64)
    inputs = (torch.randn(4096, 64), torch.randint(0, 8, (4096,)))
    graph = capture(model, inputs).graph
    roomy = plan_for(graph, "1xcpu")
    assert {block.recompute for block in roomy.pipeline.blocks} == {"none"}
    tight = plan_for(graph, "1xcpu", memory=roomy.memory.total * 6 // 10)
    assert tight.memory.total <= roomy.memory.total * 6 // 10
    assert tight.seconds.step >= roomy.seconds.step
    assert tight.pipeline.microbatches > 1 or {block.recompute for block in tight.pipeline.blocks} != {"none"}


def test_a_later_program_recomputes_too() -> None:
    model = Layers(count=6, width=64)
    graphs = [capture(model, (torch.randn(rows, 64), torch.randint(0, 8, (rows,)))).graph for rows in (4096, 4092)]
    roomy = plan_for(graphs[0], "1xcpu")
    cluster = Cluster.parse("1xcpu").with_memory(roomy.memory.total * 9 // 10)
    first = make_plan(graphs[0], cluster, pins={"recompute": "full", "microbatches": 1})
    assert first.pipeline.is_trivial
    stored = {op.target: first.layouts[op.name] for op in graphs[0].of_kind(OpKind.PARAMETER) if op.name in first.layouts}
    whole = {op.target: stored.get(op.target, (REPLICATE,)) for op in graphs[0].of_kind(OpKind.PARAMETER)}
    later = make_plan(graphs[1], cluster, mesh={"free": 1}, stored=whole, first_plan=first)
    assert later.memory.total <= later.memory.budget
    assert not later.pipeline.keeps_all


def test_too_little_memory_says_how_much_is_missing(layers: Graph) -> None:
    with pytest.raises(InfeasibleError, match="would have to grow by") as caught:
        plan_for(layers, memory=20_000, pp=2)
    assert caught.value.needed > 20_000


def test_the_plans_seconds_are_the_simulators(layers: Graph) -> None:
    plan = plan_for(layers, pp=4, microbatches=8, schedule="1f1b")
    assert plan.seconds.step == pytest.approx(plan.proof.objective_ns / 1e9, rel=1e-9, abs=1e-9)
    assert plan.seconds.bubble > 0


def test_what_layers_communicate_adds_up_over_micro_batches(layers: Graph) -> None:
    plan = plan_for(layers, dp=2, pp=2, microbatches=4, schedule="1f1b")
    inside = sum(one.seconds for one in plan.traffic if one.axis != "pp")
    assert sum(plan.group_seconds(group)[1] for group in plan.groups) == pytest.approx(inside, rel=1e-9)


def test_stages_of_one_rank_exchange_no_messages(layers: Graph) -> None:
    plan = plan_for(layers, pp=2, microbatches=4, schedule="zb-v")
    (sent,) = (one for one in plan.traffic if one.axis == "pp")
    assert sent.count == 2 * 4 * 2  # of the three cuts, the one at the point of the V crosses to no other rank


def test_a_later_batch_keeps_the_stages(layers: Graph) -> None:
    first = plan_for(layers, pp=2, microbatches=8, schedule="1f1b", dp=2)
    graph = capture(Layers(), (torch.randn(6, 32), torch.randint(0, 8, (6,)))).graph
    chain = find_chain(fold(graph), find_spaces(graph)[0])
    pins = pin_pipeline(NO_PINS, first, chain, 6)
    assert (pins.pp, pins.schedule, pins.microbatches) == (2, "1f1b", 3)
    assert pins.stages == {block.name: block.stage for block in first.pipeline.blocks}


def test_what_the_planner_prefers_is_exact() -> None:
    model = Layers(count=4).double()
    inputs = (torch.randn(16, 32, dtype=torch.float64), torch.randint(0, 8, (16,)))
    graph = capture(model, inputs).graph
    for pins in ({"pp": 2}, {"pp": 2, "tp": 2}, {"pp": 2, "schedule": "v-half"}, {"microbatches": 2, "dp": 4}):
        verify_plan(model, inputs, make_plan(graph, Cluster.parse("4xcpu"), pins=pins)).check()


def test_what_every_rank_has_travels_in_parts_over_a_slow_link() -> None:
    model = Layers(count=4, width=512).double()
    inputs = (torch.randn(256, 512, dtype=torch.float64), torch.randint(0, 8, (256,)))
    graph = capture(model, inputs).graph
    # Whole between the blocks, as plain tensor parallelism has it; two machines with a stage each.
    pins = {"pp": 2, "tp": 2, "schedule": "1f1b", "microbatches": 2}
    plan = make_plan(graph, Cluster.parse("2x2xH100"), pins=pins)
    whole = dict.fromkeys(plan.pipeline.travel, (REPLICATE,))
    parts = {name: (shard(1),) for name in plan.pipeline.travel}
    for travel in (whole, parts):
        forced = dataclasses.replace(plan, pipeline=dataclasses.replace(plan.pipeline, travel=travel))
        verify_plan(model, inputs, forced).check()
    near = make_plan(graph, Cluster.parse("4xH100"), pins=pins)
    assert all(state.kind is StateKind.SHARD for layout in plan.pipeline.travel.values() for state in layout)
    assert near.seconds.step < plan.seconds.step


def test_in_little_memory_the_search_finds_what_a_pin_does() -> None:
    # Six ranks can't split eight rows alone, but two can beside three stages.
    torch.manual_seed(0)
    graph = capture(*DEEP["gpt2_deep"]()).graph
    cluster = Cluster.parse("6xcpu")
    reserved = cluster.machine.device.reserved_bytes
    small = cluster.with_memory(reserved + (make_plan(graph, cluster).memory.total - reserved) * 9 // 10)
    pinned = make_plan(graph, small, pins={"pp": 3, "dp": 2})
    assert make_plan(graph, small).seconds.step <= 1.01 * pinned.seconds.step
