"""The search never loses to its own pins: a sample of the draws of ``tests.benchmarks.pins``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autopar.capture.export import capture
from autopar.cost_models import Cluster
from tests.benchmarks.pins import ROUNDING, captured, draw, plan_free
from tests.planning import make_plan


@pytest.mark.parametrize(
    ("model", "cluster", "share"),
    [
        ("residual", "4xcpu", None),
        ("gpt2 deep", "2xcpu", None),
        ("gpt2 deep", "4xcpu", None),
        ("dlrm", "2x4xH100", None),
    ],
)
def test_no_drawn_pins_are_faster_and_stated_choices_return_the_plan(model: str, cluster: str, share: float | None) -> None:
    draws = list(draw(model, cluster, share, seed=0, count=4))
    assert len(draws) > 4
    for one in draws:
        assert one.outcome in ("kept", "refused"), one


@pytest.mark.parametrize("pins", [{"tp": 1}, {"pp": 2}], ids=str)
def test_axes_of_pipeline_ranks_are_free_without_pins_too(pins: dict[str, int]) -> None:
    """Under tp=1 the two ranks of each pipeline rank split anything but features; without pins they had to split the batch."""
    graph, cluster = captured("gpt2 deep").graph, Cluster.parse("4xcpu")
    free, pinned = make_plan(graph, cluster), make_plan(graph, cluster, pins=pins)
    assert free.proof.bound_ns <= pinned.proof.objective_ns * (1 + ROUNDING)


@pytest.mark.parametrize(("devices", "pins"), [("2xcpu", {}), ("4xcpu", {"pp": 2})])
def test_free_axes_come_back_as_a_mesh(devices: str, pins: dict[str, int]) -> None:
    """What the axes called dp do in most of the work they don't do in all of it, so the name asks for less."""
    graph, cluster = captured("gpt2 deep").graph, Cluster.parse(devices)
    free, again = make_plan(graph, cluster), make_plan(graph, cluster, mesh={"x": 2}, pins=pins)
    assert str(free.mesh) == "dp=2"
    assert again.placements == free.placements
    assert again.layouts == free.layouts
    assert again.proof.objective_ns == free.proof.objective_ns
    assert make_plan(graph, cluster, pins={**pins, "dp": 2}).proof.objective_ns > free.proof.objective_ns


@pytest.mark.parametrize(
    ("model", "devices", "share", "pins"),
    [("residual", "2xcpu", 0.5, {"tp": 1}), ("dlrm", "4xcpu", 0.5, {"pp": 2}), ("gpt2 deep", "8xA100", 0.7, {"prefetch": 0})],
    ids=str,
)
def test_free_axes_and_late_gathers_are_looked_at_under_want_of_memory(
    model: str, devices: str, share: float, pins: dict[str, int]
) -> None:
    cluster, free = plan_free(model, devices, share)
    pinned = make_plan(captured(model).graph, cluster, pins=pins)
    assert free is not None
    assert free.proof.objective_ns <= pinned.proof.objective_ns


class Attending(nn.Module):
    """Two layers of attention, of eight heads."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(64, 64)
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(64, 192), nn.Linear(64, 64)]) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for layer in self.layers:
            before, behind = layer.children()
            q, k, v = before(x).unflatten(2, (24, 8)).transpose(1, 2).chunk(3, 1)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + behind(mixed.transpose(1, 2).flatten(2))
        return x.square().mean()


def test_no_mesh_is_solved_twice_under_want_of_memory() -> None:
    """A long sequence has meshes with cp among the first ones, and among those of kinds that are added then."""
    with torch.device("meta"):
        graph = capture(Attending(), {"tokens": torch.zeros(1, 16384, dtype=torch.int64)}).graph
    cluster = Cluster.parse("4xcpu")
    memory = make_plan(graph, cluster).memory
    short = cluster.with_memory(memory.reserved + (memory.total - memory.reserved) * 9 // 10)
    candidates = make_plan(graph, short).proof.candidates
    meshes = [(candidate.mesh, candidate.free_mesh) for candidate in candidates if candidate.name == "search"]
    assert ("dp=2 x tp=2", None) in meshes, "meshes of kinds weren't added"
    assert ("cp=4", None) in meshes
    assert len(meshes) == len(set(meshes))


class Products(nn.Sequential):
    """Six products, each of which is a block whose parameters are a sixth of all."""

    def __init__(self) -> None:
        super().__init__(*(nn.Sequential(nn.Linear(256, 256), nn.ReLU()) for _ in range(6)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square().mean()


def test_plans_without_gathers_ahead_are_searched_once() -> None:
    """Where nothing else fits, they aren't searched again because parameters weigh."""
    graph, cluster, pins = capture(Products(), {"x": torch.randn(8, 256)}).graph, Cluster.parse("2xcpu"), {"dp": 2, "zero": 3}
    memory = make_plan(graph, cluster, pins=pins).memory
    told: list[str] = []
    short = cluster.with_memory(memory.reserved + (memory.total - memory.reserved) * 95 // 100)
    assert make_plan(graph, short, pins=pins, progress=told.append).prefetch == 0
    assert told.count("rules and costs") == 2


def test_a_schedule_of_one_stage_can_be_pinned_under_want_of_memory() -> None:
    """Its moments are those of the program, which runs without a schedule."""
    cluster, free = plan_free("llama", "4xcpu", 0.7)
    pins = {"schedule": "zb-h1", "pp": 1, "microbatches": 1}
    plan = make_plan(captured("llama").graph, cluster, pins=pins)
    assert free is not None
    assert plan.memory.total <= plan.memory.budget == free.memory.budget
    assert plan.pipeline.ranks == 1
