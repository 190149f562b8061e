"""The outline of a plan has the plan's own numbers, and folds what is alike."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from autopar.capture.export import capture
from autopar.cost_models import Cluster
from autopar.errors import PlanError
from autopar.ir.layout import parse_layout
from autopar.pictures.outline import EdgeKind, Kind, find_kind, make_outline
from autopar.plans import OUTSIDE, Purpose, Read, RowSums, from_json, to_json
from autopar.plans.plan import BlockChoice, Plan
from tests.planning import make_plan as search
from tests.plans import make_pipelined_plan, make_plan
from tests.zoo import DEEP, ZOO

PINS: dict[str, dict[str, object]] = {
    "fsdp": {"dp": 4, "fsdp": True},
    "tp": {"dp": 2, "tp": 2},
    "pp": {"pp": 2, "tp": 2, "microbatches": 4},
    "interleaved": {"pp": 2, "dp": 2, "microbatches": 4, "schedule": "interleaved", "chunks": 2, "recompute": "full"},
}


@cache
def plan_of(name: str, pins: str) -> Plan:
    return search(capture(*(DEEP | ZOO)[name]()).graph, Cluster.parse("4xcpu"), pins=PINS[pins])


@pytest.mark.parametrize("pins", PINS)
@pytest.mark.parametrize("name", ["gpt2_deep", "t5_deep"])
def test_the_numbers_are_those_of_the_plan(name: str, pins: str) -> None:
    plan = plan_of(name, pins)
    outline = make_outline(plan)
    sums = RowSums()
    for box in outline.boxes:
        for row in box.rows:
            sums.add_row(row, 1 / plan.pipeline.ranks)
    for edge in outline.edges:
        for row in edge.rows if edge.kind is EdgeKind.MESSAGE else ():
            sums.add_row(row)
    found = {(row.layer, row.phase, row.purpose, row.axis, row.collective): row for row in sums.rows()}
    of_plan = [row for row in plan.costs if row.purpose != Purpose.BUBBLE]
    assert len(found) == len(of_plan)
    for row in of_plan:
        other = found[row.layer, row.phase, row.purpose, row.axis, row.collective]
        numbers = [(each.count, each.nbytes, each.seconds, each.hidden) for each in (row, other)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-9, abs=1e-15)
    busy = sum(stage.seconds for stage in outline.stages) / plan.pipeline.ranks
    assert busy + outline.bubble_seconds == pytest.approx(outline.step_seconds) == pytest.approx(plan.seconds.step)
    assert sum(box.compute_seconds for box in outline.boxes) > 0


@pytest.mark.parametrize("pins", PINS)
def test_every_block_is_in_one_box_of_its_stage(pins: str) -> None:
    plan = plan_of("gpt2_deep", pins)
    outline = make_outline(plan)
    assert [name for box in outline.boxes for name in box.blocks] == [block.name for block in plan.pipeline.blocks]
    stage_of = {block.name: block.stage for block in plan.pipeline.blocks}
    for box in outline.boxes:
        assert {stage_of[name] for name in box.blocks} == {box.stage}
        assert outline.boxes[box.number] is box
        assert box.number in outline.stages[box.stage].boxes
    layers = sum(box.count for box in outline.boxes if box.group != OUTSIDE)
    assert layers == sum(len(group.paths) for group in plan.groups)
    assert len(outline.boxes) < len(plan.pipeline.blocks)
    assert outline.recompute == (("full",) if pins == "interleaved" else ())


@pytest.mark.parametrize("pins", PINS)
def test_bytes_of_layers_add_up_to_those_of_their_group(pins: str) -> None:
    plan = plan_of("gpt2_deep", pins)
    boxes = make_outline(plan).boxes
    for group in plan.groups:
        own = [box for box in boxes if box.group == group.name]
        if group.name != OUTSIDE:
            assert sum(box.parameter_bytes or 0 for box in own) == group.parameter_bytes
            assert sum(box.activation_bytes or 0 for box in own) == group.activation_bytes
        else:  # an embedding and a head: the plan has the bytes of both together
            assert len(own) > 1
            assert {box.parameter_bytes for box in own} == {None}


def test_layers_that_are_run_again_are_apart() -> None:
    outline = make_outline(make_pipelined_plan())
    assert [(box.stage, box.name, box.recompute) for box in outline.boxes[:4]] == [
        (0, "transformer.wte", "none"),
        (0, "transformer.h.0", "selective"),
        (0, "transformer.h.1-2", "full"),
        (1, "transformer.h.3", "none"),
    ]
    assert outline.recompute == ("selective", "full")
    assert [stage.ranks for stage in outline.stages] == [(0, 7), (8, 15), (0, 7), (8, 15)]


def test_a_plan_without_rows_of_blocks_has_boxes_without_rows() -> None:
    outline = make_outline(make_plan())
    assert not outline.has_costs
    assert [box.name for box in outline.boxes] == ["transformer.wte", "transformer.h.0-11", "lm_head"]
    assert [box.rows for box in outline.boxes] == [(), (), ()]
    assert outline.boxes[1].parameter_bytes == 900_000_000
    assert {edge.kind for edge in outline.edges} == {EdgeKind.NEXT}
    assert outline.kinds == (Kind.NOTHING, Kind.FEATURES, Kind.BATCH_FEATURES)


@pytest.mark.parametrize("pins", PINS)
@pytest.mark.parametrize("name", ["gpt2_deep", "llama_deep"])
def test_what_is_split_of_a_box_is_split_of_its_own_calls(name: str, pins: str) -> None:
    plan = plan_of(name, pins)
    for box in make_outline(plan).boxes:
        if box.group != OUTSIDE:
            continue
        (path,) = (block.path for block in plan.pipeline.blocks if block.name in box.blocks)
        calls = [op for op in plan.ops if op.op in plan.placements and f"{op.path}.".startswith(f"{path}.")]
        assert calls
        for axis, text in box.axes.items():
            work = {word for word in text.split(", ") if not word.endswith("storage")} - {"nothing"}
            assert work == {op.splits[axis] for op in calls if axis in op.splits}


def test_an_embedding_that_is_split_otherwise_than_the_head_says_so() -> None:
    plan = plan_of("llama_deep", "tp")
    changed = {"embed_tokens": {"tp": "features"}, "lm_head": {"dp": "batch", "tp": "vocabulary"}}
    ops = tuple(
        replace(op, splits=changed.get(op.path.rpartition(".")[2], op.splits)) if op.op in plan.placements else op for op in plan.ops
    )
    boxes = make_outline(replace(plan, ops=ops)).boxes
    assert (boxes[0].kind, boxes[-1].kind) == (Kind.FEATURES, Kind.BATCH_FEATURES)
    assert [box.axes["tp"].split(", ")[-1] for box in (boxes[0], boxes[-1])] == ["features", "vocabulary"]


def test_parts_of_a_layer_have_no_bytes_of_their_own() -> None:
    plan = make_plan()
    blocks = (
        BlockChoice("transformer.h.0.attn", "transformer.h.0.attn", 0, "none"),
        BlockChoice("transformer.h.0", "transformer.h.0", 0, "none"),
    )
    boxes = make_outline(replace(plan, pipeline=replace(plan.pipeline, blocks=blocks))).boxes
    assert [(box.group, box.parameter_bytes) for box in boxes] == [("transformer.h.*", None), ("transformer.h.*", None)]


def test_a_model_without_blocks_has_no_boxes() -> None:
    plan = make_plan()
    outline = make_outline(replace(plan, pipeline=replace(plan.pipeline, blocks=())))
    assert outline.boxes == outline.edges == ()


def test_storage_is_no_work() -> None:
    assert find_kind({"dp": "optimizer storage", "tp": "nothing"}) is Kind.NOTHING
    assert find_kind({"dp": "batch, parameter storage", "cp": "sequence", "tp": "heads"}) is Kind.ALL
    assert find_kind({"cp": "sequence", "tp": "vocabulary"}) is Kind.FEATURES_SEQUENCE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": ".1"}, "value is '.1', which is no value"),
        ({"tensor": "bfloat[2"}, r"tensor is .bfloat\[2., which is no type of a tensor"),
        ({"tensor": "double[8, 16]"}, "tensor is of type 'double'; known are bool"),
        ({"gradient": "double"}, "gradient is of type 'double'; known are bool"),
        ({"made": parse_layout("S0")}, "'made' has 1 axes, the mesh has 2"),
        ({"made": parse_layout("S0,S2")}, "made is S0,S2, in which no float32\\[8, 16\\] is made or read"),
        ({"need": parse_layout("S0z2,R")}, "need is S0z2,R, in which no float32"),
        ({"tensor": "float32[7, 16]"}, "made is S0,R, in which no float32\\[7, 16\\]"),
        ({"made": parse_layout("B,R")}, "made has the state B"),
    ],
)
def test_what_calls_read_is_checked(change: dict[str, Any], message: str) -> None:
    read = Read("x", "float32[8, 16]", parse_layout("S0,R"), parse_layout("S0,B"), "float32")
    plan = make_plan()
    assert from_json(to_json(replace(plan, reads={"addmm": (read, replace(read, need=parse_layout("S0,P")))}))).reads["addmm"][0] == read
    with pytest.raises(PlanError, match=message):
        to_json(replace(plan, reads={"addmm": (replace(read, **change),)}))
    with pytest.raises(PlanError, match="'nothing' has no placement"):
        to_json(replace(plan, reads={"nothing": (read,)}))
