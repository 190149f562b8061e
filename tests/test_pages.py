"""A page of a plan: its numbers are the plan's own, and whatever the plan's names hold, it stays one page without requests."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache, partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from autopar.capture.export import capture
from autopar.cli import main
from autopar.cost_models import Cluster
from autopar.ir import parse_layout
from autopar.pages import content, page, tables, timeline
from autopar.pages.page import make_page
from autopar.pictures import words
from autopar.pictures.layers import draw_layers
from autopar.pictures.outline import EdgeKind, make_outline
from autopar.plans import Plan, Purpose
from autopar.plans.plan import BlockChoice
from autopar.timelines import predict
from tests.planning import make_plan as search
from tests.plans import make_pipelined_plan, make_plan
from tests.zoo import DEEP

PINS: dict[str, dict[str, object]] = {
    "fsdp": {"dp": 4, "fsdp": True},
    "tp": {"dp": 2, "tp": 2},
    "pp": {"pp": 2, "tp": 2, "microbatches": 4},
    "interleaved": {"pp": 2, "dp": 2, "microbatches": 4, "schedule": "interleaved", "chunks": 2, "recompute": "full"},
}
HOSTILE = "</script><!--<script>alert(1)</script>{{data}}&amp;\"'`\\ \u2029"


@cache
def plan_of(pins: str) -> Plan:
    return search(capture(*DEEP["gpt2_deep"]()).graph, Cluster.parse("4xcpu"), pins=PINS[pins])


class Page(HTMLParser):
    """Elements of a page, and the text of its scripts, as a browser's parser cuts them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script":
            self.scripts[-1] += data

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts[0])
        return found


def table_of(data: dict[str, Any], name: str) -> dict[str, Any]:
    (table,) = [table for table in data["tables"] if table["name"] == name]
    return table


def column_of(table: dict[str, Any], heading: str) -> list[Any]:
    column = [name for name, _ in table["columns"]].index(heading)
    return [row[column] for row in table["rows"]]


def total_of(table: dict[str, Any], heading: str) -> Any:
    return table["total"][[name for name, _ in table["columns"]].index(heading)]


@pytest.mark.parametrize("pins", PINS)
def test_numbers_are_the_plans_own(pins: str) -> None:
    plan = plan_of(pins)
    data = Page(make_page(plan)).data
    assert data["figures"][0][:3] == ["step, predicted", plan.seconds.step, "seconds"]
    assert total_of(table_of(data, "step"), "time") == plan.seconds.step
    assert sum(column_of(table_of(data, "step"), "time")) == pytest.approx(plan.seconds.step)
    assert total_of(table_of(data, "memory"), "bytes") == plan.memory.total == sum(column_of(table_of(data, "memory"), "bytes"))
    assert total_of(table_of(data, "costs"), "exposed") == pytest.approx(plan.seconds.step)
    assert [row[:1] + row[5:] for row in table_of(data, "costs")["rows"]] == [
        [row.layer or "outside of layers", row.count, row.nbytes, row.seconds, row.hidden] for row in plan.costs
    ]
    assert total_of(table_of(data, "traffic"), "exposed") == pytest.approx(plan.seconds.communication)
    assert total_of(table_of(data, "groups"), "compute") == pytest.approx(plan.seconds.forward + plan.seconds.backward)
    assert column_of(table_of(data, "blocks"), "stage") == [block.stage for block in plan.pipeline.blocks]
    assert len(table_of(data, "candidates")["rows"]) == len(plan.proof.candidates)
    chosen = [row for row in table_of(data, "candidates")["rows"] if row[-1].endswith("chosen")]
    assert [row[5] for row in chosen] == [0.0]
    assert len(table_of(data, "layouts")["rows"]) == len(plan.layouts)


@pytest.mark.parametrize("pins", PINS)
def test_timeline_and_memory_are_the_plans_own(pins: str) -> None:
    plan = plan_of(pins)
    data = Page(make_page(plan)).data
    shown = data["timeline"]
    trace = predict(plan)
    events = shown["events"]
    kinds = [shown["kinds"][kind] for kind in events["kind"]]
    assert sorted(zip(events["rank"], events["start"], (kind[-1] for kind in kinds), strict=True)) == sorted(
        (event.rank, event.start, event.seconds) for event in trace.events
    )
    assert {shown["names"][name] for name in events["name"]} == {event.name for event in trace.events}
    assert shown["until"] == shown["seconds"] == plan.seconds.step
    assert max(max(rank["bytes"]) for rank in shown["memory"]) == plan.memory.total
    ranks = table_of(data, "ranks")
    assert max(column_of(ranks, "most memory")) == plan.memory.total
    assert sum(column_of(ranks, "waits")) / plan.pipeline.ranks == pytest.approx(plan.seconds.bubble, abs=1e-9)
    work = sum(kind[-1] for kind in kinds if kind[0] == "compute") / plan.pipeline.ranks
    seconds = plan.seconds
    again = sum(row.seconds for row in plan.costs if row.purpose == Purpose.RECOMPUTE)
    assert work == pytest.approx(seconds.forward + seconds.backward + seconds.optimizer + again)


@pytest.mark.parametrize("pins", PINS)
def test_ops_are_the_plans_own(pins: str) -> None:
    plan = plan_of(pins)
    data = Page(make_page(plan)).data
    assert [op["op"] for op in data["ops"]] == [op.op for op in plan.ops]
    groups = {box["group"] for box in data["graph"]["boxes"]}
    for shown, op in zip(data["ops"], plan.ops, strict=True):
        assert shown["group"] in groups
        assert (shown["loops"], shown["splits"], shown["source"]) == (dict(op.loops), dict(op.splits), op.source)
        assert sum(seconds for _, seconds in shown["seconds"]) == pytest.approx(op.seconds.step)
    waiting = sum(row.seconds for row in plan.costs if row.purpose in (Purpose.BUBBLE, Purpose.MESSAGES))
    assert total_of(table_of(data, "ops"), "exposed") == pytest.approx(plan.seconds.step - waiting)


@pytest.mark.parametrize("pins", PINS)
def test_boxes_add_up_to_the_step(pins: str) -> None:
    plan = plan_of(pins)
    graph = Page(make_page(plan)).data["graph"]
    assert [name for box in graph["boxes"] for name in box["blocks"]] == [block.name for block in plan.pipeline.blocks]
    assert sum(box["seconds"] for box in graph["boxes"]) / plan.pipeline.ranks == pytest.approx(plan.seconds.step - plan.seconds.bubble)
    for box in graph["boxes"]:
        assert box["seconds"] == pytest.approx(sum(row[6] for row in box["rows"]))
    assert [box for stage in graph["stages"] for box in stage["boxes"]] == list(range(len(graph["boxes"])))


@pytest.mark.parametrize("pins", PINS)
def test_a_page_says_of_boxes_what_a_picture_says(pins: str) -> None:
    plan = plan_of(pins)
    drawn, graph = make_outline(plan), Page(make_page(plan)).data["graph"]
    picture = draw_layers(drawn).to_string()
    for box, shown in zip(drawn.boxes, graph["boxes"], strict=True):
        assert shown["lines"]
        assert [line for line in shown["lines"] if f'<TD ALIGN="CENTER">{line}</TD>' not in picture] == []
        assert box.seconds == pytest.approx(box.compute_seconds + box.exchange_seconds + box.optimizer_seconds)
    exchanges = [row for edge in drawn.edges if edge.kind is EdgeKind.EXCHANGE for row in words.word_exchanges(edge.rows)]
    assert [line for box in graph["boxes"] for line in box["exchanges"]] == [" ".join(row) for row in exchanges]
    messages = [row for edge in drawn.edges if edge.kind is EdgeKind.MESSAGE for row in words.word_messages(edge.rows)]
    assert [tuple(line) for stage in graph["stages"] for line in stage["messages"]] == messages
    assert [cell for row in (*exchanges, *messages) for cell in row if not re.search(f">{re.escape(cell)} ?<", picture)] == []
    assert [line for stage in graph["stages"] for line in stage["lines"] if f">{line}<" not in picture] == []


@pytest.mark.parametrize("plan", [make_plan(), make_pipelined_plan()], ids=["plain", "pipelined"])
def test_plans_without_timing_have_a_page_without_a_timeline(plan: Plan) -> None:
    data = Page(make_page(plan)).data
    assert data["timeline"] is None
    assert all(box["seconds"] is None for box in data["graph"]["boxes"])


def test_the_letters_of_layouts_are_explained() -> None:
    plan = make_plan()
    note = table_of(Page(make_page(plan)).data, "layouts")["note"]
    assert note == "Per axis (dp, tp): S<dim> split, R replicated, /N in each of N equal blocks. Layers of a group share this."
    layouts = plan.layouts | {"p_transformer_wte_weight": parse_layout("S0z2,R")}
    assert "z2 ZeRO level 2" in table_of(Page(make_page(replace(plan, layouts=layouts))).data, "layouts")["note"]


def test_tables_have_a_cell_per_column() -> None:
    for plan in (make_plan(), make_pipelined_plan(), *map(plan_of, PINS)):
        for table in (*tables.make_tables(plan), *([timeline.tabulate_ranks(predict(plan))] if plan.pipeline.timing else [])):
            assert {len(row) for row in (*table.rows, *([table.total] if table.total else []))} == {len(table.columns)}


def test_a_long_step_shows_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = predict(plan_of("pp"))
    monkeypatch.setattr(timeline, "MOST_EVENTS", 20)
    shown = timeline.describe_timeline(trace)
    assert len(shown["events"]["start"]) == 20
    assert max(shown["events"]["start"]) <= shown["until"] < shown["seconds"] == trace.seconds
    assert max(rank["times"][-1] for rank in shown["memory"]) <= shown["until"]


def make_hostile_plan() -> Plan:
    """A plan whose names try to leave the place where they are shown."""
    plan = plan_of("pp")
    groups = tuple(replace(group, tensors=dict.fromkeys(group.tensors, HOSTILE)) for group in plan.groups)
    blocks = tuple(
        BlockChoice(f"{HOSTILE}{number}", HOSTILE, block.stage, block.recompute) for number, block in enumerate(plan.pipeline.blocks)
    )
    return replace(plan, model=HOSTILE, groups=groups, notes=(HOSTILE,), pipeline=replace(plan.pipeline, blocks=blocks))


def test_names_are_never_markup() -> None:
    plain, hostile = Page(make_page(plan_of("pp"))), Page(make_page(make_hostile_plan()))
    assert [tag for tag, _ in plain.elements] == [tag for tag, _ in hostile.elements]
    assert hostile.data["notes"] == [HOSTILE]
    assert hostile.data["title"].startswith(HOSTILE)
    assert hostile.scripts[1:] == plain.scripts[1:]
    assert not re.search("[<>&\u2028\u2029]", hostile.scripts[0])


def test_encoded_data_is_the_same_data() -> None:
    value = {HOSTILE: [1.5, None, "\u2028", 10**17]}
    assert json.loads(page.encode(value)) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        page.encode(float("nan"))


def test_a_page_names_no_other_file() -> None:
    text = make_page(plan_of("pp"))
    elements = Page(text).elements
    loading = [(tag, name) for tag, attributes in elements for name in attributes if name in ("src", "srcset", "action", "data", "poster")]
    assert not loading
    assert not [tag for tag, _ in elements if tag in ("link", "img", "iframe", "object", "embed", "base", "form")]
    (policy,) = [attributes["content"] for tag, attributes in elements if attributes.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'")
    styles = text.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in styles
    assert "@import" not in styles


def test_licences_stand_in_the_page() -> None:
    text = make_page(plan_of("tp"))
    for phrase in ("Copyright (c) 2022 Leon Sorokin", "Copyright 2016-2019 Timmy Willison", "released into the public domain"):
        assert phrase in text
    assert len(page.LIBRARIES) == 3


def test_draw_writes_a_page(tmp_path: Path) -> None:
    plan_of("tp").save(tmp_path / "plan.json")
    run = partial(CliRunner().invoke, main)
    target = tmp_path / "plan.HTML"
    done = run(["draw", str(tmp_path / "plan.json"), "-o", str(target)])
    assert done.exit_code == 0, done.output
    assert target.read_text(encoding="utf-8") == make_page(plan_of("tp"))
    refused = run(["draw", str(tmp_path / "plan.json"), "-o", str(target), "--level", "ops"])
    assert refused.exit_code == 2
    assert "a page shows all layers" in refused.output
    unknown = run(["draw", str(tmp_path / "plan.json"), "-o", str(tmp_path / "plan.gif")])
    assert unknown.exit_code == 2
    assert ".html" in unknown.output


def test_content_is_json() -> None:
    for pins in PINS:
        assert json.loads(json.dumps(content.describe_page(plan_of(pins)), allow_nan=False))
