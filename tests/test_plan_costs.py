"""A plan's seconds are the sums of its cost rows, whatever kind of plan it is."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from autopar.capture.export import capture
from autopar.cost_models import Cluster
from autopar.ir.graph import Graph
from autopar.plans.plan import RECOMPUTE, Plan
from autopar.plans.rows import Phase, Purpose
from autopar.schedules.families import SCHEDULES
from tests.planning import make_plan
from tests.zoo import DEEP, ZOO

PLACED: dict[str, dict[str, object]] = {
    "free": {},
    "dp": {"dp": 4, "fsdp": False},
    "fsdp": {"dp": 4, "fsdp": True},
    "tp": {"tp": 4},
    "both": {"dp": 2, "tp": 2, "fsdp": True},
    "sequence": {"cp": 2, "tp": 2},
    "micro-batches": {"pp": 1, "microbatches": 2, "dp": 2, "tp": 2},
    "recomputed": {"pp": 1, "dp": 2, "tp": 2, "recompute": "full"},
}


@cache
def graph_of(name: str) -> Graph:
    return capture(*(DEEP | ZOO)[name]()).graph


def plan_for(name: str, **pins: Any) -> Plan:
    return make_plan(graph_of(name), Cluster.parse("4xcpu"), pins=pins)


def check(plan: Plan) -> None:
    rows = plan.costs
    assert all(row.seconds >= 0 and row.hidden >= 0 for row in rows)
    assert len({(row.layer, row.phase, row.purpose, row.axis, row.collective) for row in rows}) == len(rows)
    step = sum(row.seconds for row in rows)
    assert plan.seconds.step == pytest.approx(step, rel=1e-12)
    assert plan.proof.objective_ns == pytest.approx(1e9 * step, abs=1)
    # What the groups take, what waits for messages, and nothing else.
    grouped = [row for group in plan.groups for row in plan.rows_of(group)]
    waiting = sum(row.seconds for row in rows if row.purpose in (Purpose.BUBBLE, Purpose.MESSAGES))
    assert sum(row.seconds for row in grouped) + waiting == pytest.approx(step, rel=1e-12)
    assert sum(traffic.seconds for traffic in plan.traffic) == pytest.approx(plan.seconds.communication, rel=1e-12)
    assert plan.memory.total <= plan.memory.budget


CASES = [(name, kind) for name in ("gpt2", "llama", "bert", "t5") for kind in PLACED]
# These have no sequence or features that all axes divide, or no micro-batches.
CASES += [(name, kind) for name in ("resnet", "lstm", "dlrm") for kind in ("free", "dp", "fsdp")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_rows_add_up(name: str, kind: str) -> None:
    check(plan_for(name, **PLACED[kind]))


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rows_of_pipelines_add_up(schedule: str, recompute: str) -> None:
    for name in ("llama_tied", "t5_deep"):
        plan = plan_for(name, pp=2, tp=2, schedule=schedule, recompute=recompute, microbatches=4)
        check(plan)
        assert plan.seconds.bubble > 0
        assert (plan.seconds.recompute > 0) == any(block.recompute != "none" for block in plan.pipeline.blocks)
        assert {row.axis for row in plan.costs if row.purpose == Purpose.MESSAGES} == {"pp"}


def test_rows_say_when_and_what_for() -> None:
    plan = plan_for("llama", dp=2, tp=2, fsdp=True)
    kinds = {(row.phase, row.purpose, row.axis) for row in plan.costs}
    assert {
        (Phase.FORWARD, Purpose.PARAMETERS, "dp"),  # gathered
        (Phase.BACKWARD_INPUT, Purpose.PARAMETERS, "dp"),  # and again
        (Phase.BACKWARD_INPUT, Purpose.GRADIENTS, "dp"),  # scattered
        (Phase.STEP, Purpose.OPTIMIZER, ""),
    } <= kinds
    layers = {row.layer for row in plan.costs}
    assert "" in layers
    assert layers - {""} == {group.name for group in plan.groups if group.name != "outside of layers"}
