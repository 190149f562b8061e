"""Parallel plans against one device, for every architecture of the zoo: loss, every gradient and every updated buffer, in float64.

Three kinds of plans, all ranks in one process: plans under pins that force each way of splitting (a case says what it split),
plans drawn at random from all that can be emitted, and the layouts that people use today.
"""

from __future__ import annotations

import pytest

from autopar.plans.plan import Plan
from tests.emitted import subject
from tests.exactness import ARCHITECTURES, PLANS, make, missing
from tests.zoo import ZOO

SPLIT_WAYS = ((2,), (4,), (2, 2))
DRAWN = ("gpt2", "llama", "mistral", "falcon", "bert", "t5", "vit", "resnet", "lstm", "dlrm")


def _check(name: str, plan: Plan) -> None:
    """Verify a plan, and that nothing was left out of the comparison."""
    model = subject(name)
    found = model.verify(plan)
    found.check()
    compared = {key.removeprefix("gradient of ") for key in found.errors if key.startswith("gradient of ")}
    assert len(model.with_gradient) >= 10
    assert model.with_gradient <= compared
    assert "output 0" in found.errors


def test_the_table_has_every_architecture() -> None:
    assert set(ARCHITECTURES) == set(ZOO)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("kind", PLANS)
def test_pinned_plans_compute_what_one_device_does(name: str, kind: str, record_property: pytest.RecordProperty) -> None:
    plan = make(name, kind)
    assert plan.mesh.world_size == 4
    uses = subject(name).uses(plan)
    record_property("splits", ", ".join(sorted(uses)))
    assert not missing(name, kind, uses)
    assert not plan.unruled
    _check(name, plan)


@pytest.mark.parametrize("sizes", SPLIT_WAYS, ids=str)
@pytest.mark.parametrize("name", DRAWN)
def test_random_plans_compute_what_one_device_does(name: str, sizes: tuple[int, ...]) -> None:
    distinct = set()
    for seed in range(8):
        plan = subject(name).random(sizes, seed)
        distinct.add(tuple(plan.placements.items()))
        _check(name, plan)
    assert len(distinct) == 8


def test_random_plans_on_three_axes() -> None:
    for seed in range(4):
        _check("gpt2", subject("gpt2").random((2, 2, 2), seed))


@pytest.mark.parametrize("cluster", ["4xcpu", "2x2xcpu"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_baselines_compute_what_one_device_does(name: str, cluster: str) -> None:
    plans = subject(name).baselines(cluster)
    assert {key.split()[0] for key in plans} == {"DDP", "FSDP", "Megatron", "Redco"}
    for key, plan in plans.items():
        assert subject(name).uses(plan), key
        _check(name, plan)
