"""The search never loses to its own pins: a sample of the draws of ``tests.benchmarks.pins``."""

from __future__ import annotations

import pytest

from autopar.cost_models import Cluster
from tests.benchmarks.pins import ROUNDING, captured, draw
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
