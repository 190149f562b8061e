"""What notebooks show of plans and clusters: the plan's own numbers, and names as text only."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autopar.cost_models import Cluster
from autopar.plans import Plan
from autopar.units import format_bytes, format_seconds
from tests.plans import make_pipelined_plan, make_plan


@pytest.mark.parametrize("plan", [make_plan(), make_pipelined_plan()], ids=["plain", "pipelined"])
def test_a_plan_shows_its_step_and_memory(plan: Plan) -> None:
    shown = plan._repr_html_()
    assert f"<caption>{plan.model} on {plan.cluster}</caption>" in shown
    assert f"<td>{format_seconds(plan.seconds.step)}</td>" in shown
    assert f"<td>{format_bytes(plan.memory.total)} of {format_bytes(plan.memory.budget)}</td>" in shown
    for axis, words in plan.splits.items():
        assert f"<td>{axis} splits {words}</td>" in shown
    assert ("of stages and recomputation alone" in shown) == plan.proof.candidates[plan.proof.chosen].is_spread
    assert ("bubble" in shown) == ("stages" in shown) == (plan.pipeline.ranks > 1)


def test_a_cluster_shows_its_devices_and_links() -> None:
    shown = Cluster.parse("4x8xH100")._repr_html_()
    assert "<caption>4x8xh100</caption>" in shown
    assert "link between nodes" in shown
    assert "link between nodes" not in Cluster.parse("8xH100")._repr_html_()


def test_names_are_text() -> None:
    shown = replace(make_plan(), model="<script>&\u202e")._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;&amp;\\u202e on" in shown
