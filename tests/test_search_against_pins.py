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


def test_a_pinned_axis_may_be_a_free_one_that_does_what_is_pinned() -> None:
    """Two of the ranks split the batch in most of the work, as the plan's own name of the axis says: pinned by that name it comes back."""
    graph, cluster = captured("gpt2 deep").graph, Cluster.parse("2xcpu")
    free, strict = make_plan(graph, cluster), make_plan(graph, cluster, mesh={"dp": 2})
    pinned = make_plan(graph, cluster, pins={"dp": 2})
    assert str(free.mesh) == str(pinned.mesh) == "dp=2"
    assert pinned.placements == free.placements
    assert pinned.layouts == free.layouts
    assert pinned.proof.objective_ns == free.proof.objective_ns < strict.proof.objective_ns
    # What isn't pinned by that number isn't taken.
    assert make_plan(graph, cluster, pins={"tp": 2}).proof.objective_ns > free.proof.objective_ns
