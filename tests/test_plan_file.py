"""Plans as files: what is written comes back, and what isn't a whole plan is refused by a message that says why."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import autopar
from autopar.errors import PlanError
from autopar.ir.layout import PARTIAL, PASS_PARTIAL, REPLICATE, Layout, Mesh, Placement, Split, shard
from autopar.ir.precision import FLOATS, PRECISIONS, Precision
from autopar.plans import OUTSIDE, CostRow, Phase, Pins, Purpose, Request, Work
from autopar.plans.plan import (
    BASES,
    KINDS,
    RECOMPUTE,
    VERSION,
    BlockChoice,
    Candidate,
    Group,
    Memory,
    Pipeline,
    Plan,
    Proof,
    RepeatedWork,
    Seconds,
    Unruled,
    from_json,
    to_json,
)
from autopar.schedules.families import SCHEDULES, make_schedule
from tests.plans import make_pipelined_plan, make_plan, set_field

_TEXT = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), max_size=8)
_NAME = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=8)
_COUNT = st.integers(0, 2**60)
_TIME = st.floats(0, 1e6)
_SPLIT = st.builds(shard, st.integers(0, 9), st.integers(1, 9))
_STORED = st.one_of(_SPLIT, st.just(REPLICATE))
_STATE = st.one_of(_STORED, st.just(PARTIAL))
_PART = st.one_of(st.none(), st.just(PASS_PARTIAL), st.builds(Split, st.sampled_from(["b", "o", "head_dim"]), st.integers(1, 9)))
_VALUE = st.from_regex(r"[a-z_]{1,4}(\.[0-9]{1,2})?", fullmatch=True)


def _make_tables(axes: int, state: st.SearchStrategy[Any], names: st.SearchStrategy[str] = _NAME) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(names, st.tuples(*[state] * axes), max_size=3)


@st.composite
def _pipelines(draw: st.DrawFn, axes: int) -> Pipeline:
    """Any that `make_schedule` can make, with one to three blocks on each stage."""
    schedule = draw(st.sampled_from(sorted(SCHEDULES)))
    ranks, microbatches = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    chunks = SCHEDULES[schedule].chunks or draw(st.integers(2, 3))
    microbatches *= ranks if schedule == "interleaved" else 1
    assert len(make_schedule(schedule, ranks, microbatches, chunks).rank_of) == ranks * chunks
    stages = [stage for stage in range(ranks * chunks) for _ in range(draw(st.integers(1, 3)))]
    blocks = tuple(
        BlockChoice(f"{draw(_TEXT)}#{index}", draw(_NAME), stage, draw(st.sampled_from(RECOMPUTE))) for index, stage in enumerate(stages)
    )
    travel = draw(_make_tables(axes, _STATE, _VALUE)) if ranks * chunks > 1 else {}
    return Pipeline(ranks, schedule, chunks, microbatches, blocks, travel)


@st.composite
def _memories(draw: st.DrawFn) -> Memory:
    """Any whose parts fit the budget."""
    parts = [draw(_COUNT) for _ in range(7)]
    return Memory(*parts, budget=sum(parts) + draw(st.integers(1, 2**60)))


def _make_rows(axes: tuple[str, ...], layers: list[str], *, recomputes: bool) -> st.SearchStrategy[CostRow]:
    """Of work of one rank alone, and of communication; some are of recomputation if the plan `recomputes`."""
    purposes = [purpose for purpose in Purpose if recomputes or purpose != Purpose.RECOMPUTE]
    what = st.sampled_from(["", *layers]), st.sampled_from(Phase), st.sampled_from(purposes)
    exchanged = [purpose for purpose in purposes if purpose not in (Purpose.COMPUTE, Purpose.OPTIMIZER, Purpose.BUBBLE)]
    alone = st.builds(CostRow, *what, st.just(""), st.just(""), *[_TIME] * 4)
    return alone | st.builds(CostRow, *what[:2], st.sampled_from(exchanged), st.sampled_from(axes), _NAME, *[_TIME] * 4)


@st.composite
def _groups(draw: st.DrawFn, axes: tuple[str, ...], layouts: Mapping[str, Layout]) -> tuple[Group, ...]:
    """Up to two groups of layers and what is outside, each with some of the stored tensors."""
    names = draw(st.lists(_NAME, max_size=2, unique=True))
    paths = iter(draw(st.lists(_NAME, min_size=6, max_size=6, unique=True)))
    owner = {op: draw(st.sampled_from([*names, OUTSIDE])) for op in layouts}
    return tuple(
        Group(
            name,
            tuple(next(paths) for _ in range(draw(st.integers(1, 3)))) if name != OUTSIDE else (),
            {op: f"{op}.weight" for op in layouts if owner[op] == name},
            draw(st.dictionaries(st.sampled_from(axes), _TEXT, max_size=2)),
            draw(_COUNT),
            draw(_COUNT),
        )
        for name in (*names, OUTSIDE)
    )


@st.composite
def _proofs(draw: st.DrawFn, costs: tuple[CostRow, ...]) -> Proof:
    seconds = replace(make_plan(), costs=costs).seconds.step
    objective = round(1e9 * seconds)
    kinds = st.sampled_from(KINDS), st.none(), st.sampled_from(BASES)
    candidate = st.builds(Candidate, _TEXT, _TEXT, st.none() | _TIME, st.none() | _COUNT, _TEXT, *kinds)
    bound = draw(st.integers(0, objective))
    gap = (objective - bound) / max(1, objective)
    candidates = draw(st.lists(candidate, max_size=2))
    chosen = draw(st.integers(0, len(candidates)))
    candidates.insert(chosen, replace(draw(candidate), step_seconds=seconds))
    return Proof(objective, bound, gap, draw(_TEXT), draw(_TEXT), draw(_COUNT), draw(_COUNT), tuple(candidates), chosen)


_REQUESTS = st.builds(
    Request,
    model=_TEXT,
    batch=st.none() | st.integers(1, 2**60),
    seq=st.none() | st.integers(1, 2**60),
    dtype=st.none() | st.sampled_from(FLOATS),
    cluster=_TEXT,
    memory=st.none(),
    pins=st.builds(
        Pins,
        tp=st.none() | st.integers(1, 16),
        zero=st.none() | st.integers(0, 3),
        vocabulary=st.none() | st.booleans(),
        recompute=st.none() | st.sampled_from(RECOMPUTE),
        placements=st.dictionaries(st.sampled_from(["layers.*", "head", "a.b=c"]), st.just({"tp": "o", "dp": "b"}), max_size=2),
        stages=st.dictionaries(st.sampled_from(["layers.*", "layers.3"]), st.integers(0, 3), max_size=2),
    ),
    mesh=st.none() | st.just(Mesh(("free", "cp"), (4, 2))),
    strict=st.booleans(),
).filter(lambda request: request.mesh is None or request.pins.tp is None)


@st.composite
def _plans(draw: st.DrawFn) -> Plan:
    names = tuple(draw(st.lists(st.sampled_from(["dp", "tp", "cp", "axis_3"]), min_size=1, max_size=3, unique=True)))
    mesh = Mesh(names, tuple(draw(st.integers(1, 16)) for _ in names))
    pipeline = draw(_pipelines(len(names)))
    layouts: dict[str, Layout] = draw(_make_tables(len(names), _STORED))
    placements: dict[str, Placement] = draw(_make_tables(len(names), _PART))
    groups = draw(_groups(names, layouts))
    rows = _make_rows(names, [group.name for group in groups], recomputes=not pipeline.keeps_all)
    costs = tuple(draw(st.lists(rows, max_size=3)))
    tensors = st.lists(st.integers(0, 99), max_size=3).map(lambda sizes: f"int64[{', '.join(map(str, sizes))}]")
    return Plan(
        model=draw(_NAME),
        fingerprint=draw(_NAME),
        cluster=f"{pipeline.ranks}x{mesh.world_size}x{draw(_NAME)}",
        precision=draw(st.sampled_from([*PRECISIONS.values(), Precision(param_dtype="float16", cast_forward_inputs=False)])),
        mesh=mesh,
        pipeline=pipeline,
        inputs=draw(st.dictionaries(_NAME, tensors, max_size=2)),
        layouts=layouts,
        outputs=tuple(draw(st.lists(st.tuples(*[_STORED] * len(names)), max_size=2))),
        placements=placements,
        batch_axes=names[: draw(st.integers(0, len(names)))],
        bucket_nbytes=draw(st.integers(0, 2**40)),
        prefetch=draw(st.integers(0, 4)),
        costs=costs,
        memory=draw(_memories()),
        groups=groups,
        proof=draw(_proofs(costs)),
        repeated=tuple(
            draw(st.lists(st.builds(RepeatedWork, *[_TEXT] * 5, st.integers(1, 9), st.integers(1, 9), st.floats(0, 1)), max_size=2))
        ),
        unruled=tuple(draw(st.lists(st.builds(Unruled, _TEXT, _TEXT, _TEXT), max_size=2))),
        notes=tuple(draw(st.lists(_TEXT, max_size=2))),
        work=draw(st.builds(Work, _TIME, st.integers(1, 2**40), st.none() | _COUNT, _NAME, _TIME)),
        half_batches=pipeline.is_trivial and pipeline.keeps_all and draw(st.booleans()),
        request=draw(_REQUESTS),
    )


@given(_plans())
@settings(max_examples=50, deadline=None)
def test_what_is_written_comes_back(plan: Plan) -> None:
    found = from_json(to_json(plan))
    assert found == plan
    assert found.world_size == math.prod([plan.pipeline.ranks, *plan.mesh.sizes])
    assert found.pipeline.stages == len({block.stage for block in found.pipeline.blocks})


def test_a_saved_plan_loads(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    make_plan().save(path)
    assert Plan.load(path) == make_plan()
    assert Plan.load(path).placements["addmm"] == (Split("b"), Split("o", 3))


def test_a_plan_that_could_not_be_loaded_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    make_plan().save(path)
    plan = make_plan()
    for wrong, message in [
        (replace(plan, cluster="1x4xh100"), "plan.mesh is dp=2 x tp=4, 8 ranks; plan.cluster is '1x4xh100', 4 devices"),
        (replace(plan, notes=("two\nlines",)), r"plan.notes\[0\] holds '\\n', which is no printable character"),
        (replace(plan, bucket_nbytes=-1), "plan.bucket_nbytes is -1, an integer from 0 is needed"),
    ]:
        with pytest.raises(PlanError, match=message):
            wrong.save(path)
    assert Plan.load(path) == plan


def test_a_pipeline_is_written_in_words(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    make_pipelined_plan().save(path)
    assert Plan.load(path) == make_pipelined_plan()
    pipeline = json.loads(path.read_text(encoding="utf-8"))["plan"]["pipeline"]
    assert pipeline["blocks"][4] == {"name": "transformer.h.3", "path": "transformer.h.3", "stage": 1, "recompute": "none"}
    assert pipeline["travel"] == {"add_3": "S0,R", "add_7": "S0,S2"}


def test_a_model_without_calls_has_no_blocks() -> None:
    plan = make_plan()
    plan = replace(plan, pipeline=replace(plan.pipeline, blocks=()))
    assert from_json(to_json(plan)) == plan
    assert not plan.pipeline.blocks
    assert plan.pipeline.is_trivial


def test_the_step_is_the_sum_of_its_parts() -> None:
    assert Seconds(1.0, 2.0, 4.0, 8.0, 16.0, 32.0).step == 63.0


def test_equal_plans_are_equal_files() -> None:
    assert to_json(make_plan()) == to_json(from_json(to_json(make_plan())))


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_truncated_plan_is_refused(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.json"
    path.write_text(to_json(make_plan())[:kept], encoding="utf-8")
    with pytest.raises(PlanError, match=r"cut\.json: not whole JSON: .* was the file cut off\?"):
        Plan.load(path)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match=r"weights\.bin: can't be read"):
        Plan.load(path)
    with pytest.raises(PlanError, match=r"absent\.json: can't be read: No such file"):
        Plan.load(tmp_path / "absent.json")
    with pytest.raises(PlanError, match="not whole JSON"):
        from_json("[" * 100_000)


@pytest.mark.parametrize("text", ["[]", "3", "null", '{"plan": {}}', '{"format": "something else", "version": 1}'])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="not an autopar plan"):
        from_json(text)


@pytest.mark.parametrize("version", [0, VERSION + 1, "1", None, str(VERSION), float(VERSION), True, -1])
def test_another_version_is_refused_with_both_versions(version: object) -> None:
    document = {**json.loads(to_json(make_plan())), "version": version}
    with pytest.raises(PlanError, match=rf"plan version {version!r}, this autopar reads version {VERSION}"):
        from_json(json.dumps(document))


def test_the_version_before_lacks_fields() -> None:
    document = {**json.loads(to_json(make_plan())), "version": 5}
    with pytest.raises(
        PlanError, match=r"\(a plan of version 5 has no fields work, ops, reads, request and pipeline.timing\); make the plan again"
    ):
        from_json(json.dumps(document))


@pytest.mark.parametrize(("version", "lacks"), [(1, "pipeline, outputs, bucket_nbytes and costs"), (2, "outputs, bucket_nbytes and costs")])
def test_an_older_version_is_refused_with_what_it_lacks(version: int, lacks: str) -> None:
    document = {**json.loads(to_json(make_plan())), "version": version}
    with pytest.raises(PlanError) as caught:
        from_json(json.dumps(document))
    assert f"(a plan of version {version} has no fields {lacks}); make the plan again with `autopar plan`" in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (set_field("model", to=3), "plan.model: str is needed, not int"),
        (set_field("costs", to={}), "plan.costs: a list is needed, not dict"),
        (set_field("costs", 0, to=[]), "plan.costs[0]: an object is needed, not list"),
        (set_field("costs", 0, "seconds", to="0.1"), "plan.costs[0].seconds: float is needed, not str"),
        (set_field("costs", 0, "seconds", to=float("nan")), "plan.costs[0].seconds: a finite number is needed, not nan"),
        (set_field("memory", "budget", to=1.5), "plan.memory.budget: int is needed, not float"),
        (set_field("memory", "budget", to=True), "plan.memory.budget: int is needed, not bool"),
        (set_field("notes", to="text"), "plan.notes: a list is needed, not str"),
        (set_field("notes", 0, to=None), "plan.notes[0]: str is needed, not NoneType"),
        (set_field("costs", 1, "count", to=None), "plan.costs[1].count: float is needed, not NoneType"),
        (set_field("proof", "candidates", 0, "outcome", to=1), "plan.proof.candidates[0].outcome: str is needed, not int"),
        (set_field("groups", 0, "axes", to={"tp": 1}), "plan.groups[0].axes['tp']: str is needed, not int"),
        (set_field("layouts", to=[]), "plan.layouts: an object is needed, not list"),
        (set_field("layouts", "input_ids", to=1), "plan.layouts['input_ids']: str is needed, not int"),
        (set_field("layouts", "input_ids", to="S0,Q"), "plan.layouts['input_ids']: 'Q' is no state of a layout"),
        (set_field("outputs", 1, to="S0,Q"), "plan.outputs[1]: 'Q' is no state of a layout"),
        (set_field("outputs", 1, to="S0"), "plan.outputs: 'output 1' has 1 axes, the mesh has 2 (dp=2 x tp=4)"),
        (set_field("placements", "view", to="b,1"), "plan.placements['view']: '1' is no part of a placement"),
        (set_field("mesh", to="dp=2"), "plan.mesh: an object with lists names (texts) and sizes (integers from 1) is needed"),
        (
            set_field("mesh", "sizes", to=[2, 0]),
            "plan.mesh: an object with lists names (texts) and sizes (integers from 1) is needed",
        ),
        (set_field("mesh", "sizes", to=[2]), "don't match"),
        (set_field("surprise", to=1), "plan: fields unknown: surprise"),
        (set_field("proof", "why", to=""), "plan.proof: fields unknown: why"),
        (lambda plan: plan.pop("notes"), "plan: fields missing: notes"),
        (set_field("layouts", "input_ids", to="S0"), "plan.layouts: 'input_ids' has 1 axes, the mesh has 2 (dp=2 x tp=4)"),
        (set_field("placements", "view", to="b,-,-"), "plan.placements: 'view' has 3 axes, the mesh has 2 (dp=2 x tp=4)"),
        (set_field("batch_axes", to=["pp"]), "plan.batch_axes names 'pp', the mesh has dp=2 x tp=4"),
        (lambda plan: plan.pop("request"), "plan: fields missing: request"),
        (set_field("request", "model", to=None), "plan.request.model: str is needed, not NoneType"),
        (set_field("request", "batch", to=0), "plan.request.batch is 0, an integer from 1 is needed"),
        (set_field("request", "seq", to="128"), "plan.request.seq: int is needed, not str"),
        (set_field("request", "dtype", to="int8"), "plan.request.dtype is 'int8'; known are float16, bfloat16, float32, float64"),
        (set_field("request", "memory", to=40_000_000_000), "plan.request.memory is 40000000000, but plan.memory.budget is 80000000000"),
        (set_field("request", "pins", to=[]), "plan.request.pins: an object is needed, not list"),
        (set_field("request", "pins", "tp", to=4), "plan.request.pins['tp']: str is needed, not int"),
        (set_field("request", "pins", "tp", to="0"), "plan.request.pins: pin tp=0: the size of an axis is needed, an integer from 1"),
        (set_field("request", "pins", "tq", to="2"), "plan.request.pins: unknown pin 'tq'"),
        (set_field("request", "mesh", to={"names": ["dp"], "sizes": [8]}), "plan.request: the mesh {'dp': 8} and the pins tp=4 contradict"),
        (set_field("request", "mesh", to="dp=8"), "plan.request.mesh: an object with lists names (texts) and sizes"),
        (set_field("request", "strict", to=1), "plan.request.strict: true or false is needed, not int"),
    ],
)
def test_damage_is_named(damage: Callable[[dict[str, Any]], Any], message: str) -> None:
    document = json.loads(to_json(make_plan()))
    damage(document["plan"])
    with pytest.raises(PlanError) as caught:
        from_json(json.dumps(document))
    assert message in str(caught.value)


def _shift_stages(pipeline: dict[str, Any]) -> None:
    for block in pipeline["blocks"]:
        block["stage"] += 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (dict.clear, "plan.pipeline: fields missing: blocks, chunks, microbatches, ranks, schedule, timing, travel"),
        (set_field("ranks", to=0), "plan.pipeline.ranks is 0, an integer from 1 is needed"),
        (set_field("chunks", to=-2), "plan.pipeline.chunks is -2, an integer from 1 is needed"),
        (set_field("microbatches", to=-1), "plan.pipeline.microbatches is -1, an integer from 1 is needed"),
        (set_field("microbatches", to=2.0), "plan.pipeline.microbatches: int is needed, not float"),
        (set_field("microbatches", to=True), "plan.pipeline.microbatches: int is needed, not bool"),
        (set_field("schedule", to="2f2b"), f"unknown schedule '2f2b'; there are {', '.join(SCHEDULES)}"),
        (set_field("schedule", to=["1f1b"]), "plan.pipeline.schedule: str is needed, not list"),
        (set_field("schedule", to="1f1b"), "schedule '1f1b' has 1 stages per rank, not 2"),
        (set_field("chunks", to=1), "schedule 'interleaved' needs 2 or more stages per rank, not 1"),
        (
            set_field("chunks", to=3),
            "plan.pipeline.blocks must be on stages 0 to 5, ascending and none left out; they are on [0, 0, 0, 0, 1",
        ),
        (set_field("chunks", to=10**12), "plan.pipeline.blocks must be on stages 0 to 1999999999999, "),
        (set_field("blocks", to=[]), "plan.pipeline.blocks must be on stages 0 to 3, ascending and none left out; they are on []"),
        (set_field("blocks", 3, "stage", to=2), "plan.pipeline.blocks must be on stages 0 to 3, ascending"),
        (set_field("blocks", 0, "stage", to=-1), "plan.pipeline.blocks[0].stage is -1, an integer from 0 is needed"),
        (set_field("blocks", 13, "stage", to=4), "plan.pipeline.blocks must be on stages 0 to 3, ascending"),
        (_shift_stages, "ascending and none left out; they are on [1, 1, 1, 1, 2"),
        (set_field("blocks", 13, "stage", to="3"), "plan.pipeline.blocks[13].stage: int is needed, not str"),
        (
            lambda one: one.update(blocks=[block for block in one["blocks"] if block["stage"] != 2]),
            "none left out; they are on [0, 0, 0, 0, 1",
        ),
        (set_field("blocks", 1, "recompute", to="half"), "plan.pipeline.blocks[1].recompute is 'half'; known are none, selective, full"),
        (set_field("blocks", 1, "recompute", to=True), "plan.pipeline.blocks[1].recompute: str is needed, not bool"),
        (set_field("blocks", 1, to="transformer.h.0"), "plan.pipeline.blocks[1]: an object is needed, not str"),
        (set_field("travel", "add_3", to="S0,Q"), "plan.pipeline.travel['add_3']: 'Q' is no state of a layout"),
        (set_field("travel", "add_3", to="S0"), "plan.pipeline.travel: 'add_3' has 1 axes, the mesh has 2 (dp=2 x tp=4)"),
    ],
)
def test_damage_to_a_pipeline_is_named(damage: Callable[[dict[str, Any]], Any], message: str) -> None:
    document = json.loads(to_json(make_pipelined_plan()))
    damage(document["plan"]["pipeline"])
    with pytest.raises(PlanError) as caught:
        from_json(json.dumps(document))
    assert message in str(caught.value)


def test_a_pipeline_may_be_edited() -> None:
    """What still is a pipeline loads: a block moved to the next stage, another schedule of as many stages."""
    document = json.loads(to_json(make_pipelined_plan()))
    pipeline = document["plan"]["pipeline"]
    pipeline["blocks"][3]["stage"] = 1
    pipeline |= {"schedule": "zb-v", "microbatches": 5}
    found = from_json(json.dumps(document)).pipeline
    assert [block.stage for block in found.blocks] == [0] * 3 + [1] * 4 + [2] * 3 + [3] * 4
    assert (found.schedule, found.microbatches) == ("zb-v", 5)


@pytest.mark.parametrize("plan", [None, [], "plan"])
def test_a_document_without_a_plan_is_refused(plan: object) -> None:
    document = {**json.loads(to_json(make_plan())), "plan": plan}
    with pytest.raises(PlanError, match="plan: an object is needed"):
        from_json(json.dumps(document))


def test_names_that_no_terminal_should_see_are_escaped_in_a_plan() -> None:
    names = ("a\tb", "joined \u200d emoji", "\x1b[2J")
    model: Any = type("", (nn.Module,), {})()
    model.layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
    model.forward = lambda batch: functools.reduce(lambda x, layer: layer(x), model.layers.values(), batch["in\tput"]).sum()
    for pins in ({}, {"pp": 2}):
        plan = autopar.plan(model, ({"in\tput": torch.randn(4, 4)},), "2xcpu", pins=pins)
        text = to_json(plan)
        assert from_json(text) == plan
        assert plan.model == "model"
        assert list(plan.inputs) == ["batch.in\\tput"]
        assert text.replace("\n", "").isprintable()
        autopar.verify(model, ({"in\tput": torch.randn(4, 4)},), plan).check()
