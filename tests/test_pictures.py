"""Pictures of plans: texts against golden files, names of any characters, files that can't be made."""

from __future__ import annotations

import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pydot
import pytest

from autopar.capture.export import capture
from autopar.cost_models import Cluster
from autopar.errors import InputError
from autopar.ir import parse_layout
from autopar.pictures import View, find_writer
from autopar.pictures.labels import make_label, markup, shorten
from autopar.pictures.layers import draw_layers
from autopar.pictures.ops import draw_ops
from autopar.pictures.outline import EdgeKind, Kind, make_outline
from autopar.pictures.palette import FILLS, PANEL, PAPER, TEXT
from autopar.pictures.rendering import render
from autopar.pictures.writers import WRITERS
from autopar.plans import BlockRows, Message, Phase, Plan, Purpose, RankBytes, StageBytes, Timing
from autopar.plans.plan import BlockChoice, Group
from autopar.rules import short_name
from autopar.units import format_bytes, format_seconds
from tests.commands import refuse, run
from tests.planning import make_plan as search
from tests.plans import make_pipelined_plan, make_plan, make_row
from tests.zoo import DEEP

Golden = Callable[[str, str], None]

needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz' program dot isn't installed")

PINS: dict[str, dict[str, object]] = {
    "whole": {"dp": 2, "tp": 2, "zero": 2},
    "stages": {"pp": 2, "tp": 2, "microbatches": 4, "recompute": "full"},
    "many stages": {"pp": 4, "microbatches": 4, "schedule": "interleaved", "chunks": 2},
}


@cache
def plan_of(pins: str, name: str = "gpt2_deep") -> Plan:
    return search(capture(*DEEP[name]()).graph, Cluster.parse("4xcpu"), pins=PINS[pins])


def make_timed_plan() -> Plan:
    """A plan of four stages whose blocks have rows and whose stages have bytes."""
    plan = make_pipelined_plan()
    layer = BlockRows(
        (
            make_row("transformer.h.*", Phase.FORWARD, Purpose.COMPUTE, 0.001),
            make_row("transformer.h.*", Phase.FORWARD, Purpose.ACTIVATIONS, 0.0002, "tp", "all_reduce", 2, 8_000_000),
            make_row("transformer.h.*", Phase.BACKWARD_INPUT, Purpose.ACTIVATION_GRADIENTS, 0.0002, "tp", "all_reduce", 2, 8_000_000),
            make_row("transformer.h.*", Phase.FORWARD, Purpose.PARAMETERS, 0.0001, "tp", "local copy", 1, 1000),
            make_row("transformer.h.*", Phase.STEP, Purpose.GRADIENTS, 0.0001, "dp", "reduce_scatter", 3, 90_000_000, 0.0005),
        )
    )
    end = BlockRows((make_row("", Phase.FORWARD, Purpose.COMPUTE, 0.0005),))
    level = StageBytes(1_000_000_000, 0, 50_000_000, 0, 0, (), (), ())
    sent, none = Message(0.001, 0.001, 4_000_000, 4_000_000), Message(0.0, 0.0, 0, 0)
    timing = Timing(False, (end, layer), (0, *(1,) * 12, 0), (sent, none, sent), (level,) * 4, (RankBytes(0, 0),) * 2)
    return replace(plan, pipeline=replace(plan.pipeline, timing=timing))


def text_of(plan: Plan) -> str:
    return draw_layers(make_outline(plan)).to_string()


def read_back(text: str) -> pydot.Dot:
    """The graph that a DOT text describes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pydot's, of how it calls its parser
        graphs = pydot.graph_from_dot_data(text)
    assert graphs is not None
    (graph,) = graphs
    return graph


def list_nodes(graph: pydot.Dot) -> list[str]:
    inside = [node for part in graph.get_subgraphs() for node in part.get_nodes()]
    return [node.get_name() for node in [*graph.get_nodes(), *inside] if node.get_name() not in ("node", "edge", "graph", '"\\n"')]


def test_layers(golden: Golden) -> None:
    golden("draw_layers.dot", text_of(make_timed_plan()))


def test_a_plan_on_one_stage(golden: Golden) -> None:
    golden("draw_one_stage.dot", text_of(make_plan()))


@pytest.mark.parametrize("pins", PINS)
def test_dot_texts_can_be_read(pins: str) -> None:
    plan = plan_of(pins)
    outline = make_outline(plan)
    graph = read_back(text_of(plan))
    assert {name for name in list_nodes(graph) if name.startswith("box")} == {f"box{box.number}" for box in outline.boxes}
    assert len(graph.get_subgraphs()) == plan.pipeline.stages
    ends = [(edge.get_source(), edge.get_destination()) for edge in graph.get_edges()]
    for edge in outline.edges:
        if (f"box{edge.start}", f"box{edge.end}") not in ends:  # cut in two, between columns
            stage = outline.boxes[edge.end].stage
            assert (f"box{edge.start}", f"to{stage}") in ends
            assert (f"from{stage - 1}", f"box{edge.end}") in ends
    assert text_of(plan) == text_of(plan)


@pytest.mark.parametrize("pins", PINS)
def test_the_numbers_in_the_picture_are_the_plans(pins: str) -> None:
    plan = plan_of(pins)
    outline, text = make_outline(plan), text_of(plan)
    assert f"step {format_seconds(plan.seconds.step)}" in text
    assert f"memory {format_bytes(plan.memory.total)} of {format_bytes(plan.memory.budget)}" in text
    for box in outline.boxes:
        assert f"compute {format_seconds(box.compute_seconds)}, exposed exchanges {format_seconds(box.exchange_seconds)}" in text
    calls: Counter[tuple[str, str]] = Counter()
    for edge in outline.edges:
        for row in edge.rows:
            if row.collective != "local copy":
                calls[row.axis, row.collective] += round(row.count)
    shown: Counter[tuple[str, str]] = Counter()
    for axis, collective, count in re.findall(r">(\w+) (\w+) </TD><TD[^>]*>[\w ]+</TD><TD[^>]*>([\d,]+) ×<", text):
        shown[axis, collective] += int(count.replace(",", ""))
    for count in re.findall(r">send [\w ]+ </TD><TD[^>]*>([\d,]+) ×<", text):
        shown["pp", "send"] += int(count.replace(",", ""))
    assert shown == calls
    assert "local copy" not in text


@needs_dot
@pytest.mark.parametrize("pins", PINS)
@pytest.mark.parametrize(("form", "begins"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_pictures_are_drawn(pins: str, form: str, begins: bytes) -> None:
    graph = draw_layers(make_outline(plan_of(pins)))
    picture = render(graph, form)
    assert picture.startswith(begins)
    assert form == "pdf" or picture == render(graph, form)


HOSTILE = ['a"b', "a\\b", "\\N\\G\\l", "<b>", "a&b", "&lt;", "a]b[c", "a{b|c}", "ä → ü", "-->", "<!-- x", "'"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_any_characters_stand_for_themselves(name: str) -> None:
    plan = make_plan()
    path = f"model.{name}"
    group = Group(f"{path}.*", (f"{path}.0", f"{path}.1"), {}, {"dp": name, "tp": "batch"}, 10, 10)
    blocks = (BlockChoice(f"{path}.0", f"{path}.0", 0, "none"), BlockChoice(name, name, 0, "none"))
    hostile = replace(
        plan, model=name, cluster=name, inputs={name: "int64[8]"}, groups=(group,), pipeline=replace(plan.pipeline, blocks=blocks), costs=()
    )
    text = text_of(hostile)
    read_back(text)
    if shutil.which("dot"):
        picture = render(read_back(text), "svg").decode()
        shown = re.sub(r"&#(\d+);", lambda match: chr(int(match[1])), picture)
        shown = shown.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&amp;", "&").replace("\xa0", " ")
        assert f">{path}.0<" in shown
        assert f">{name} on {name}, mesh" in shown
        assert f">inputs {name} int64[8]<" in shown
        assert f"dp splits {name}<" in shown


def test_long_names_lose_their_middle() -> None:
    assert shorten("x" * 60) == "x" * 60
    assert len(shorten("x" * 61)) == 60
    assert shorten("abcdefgh", 5) == "ab…gh"
    assert markup("a\tb") == "a&#92;&#92;tb"
    assert make_label([["a"], ["b", "c"]]).count('COLSPAN="2"') == 1


def test_text_can_be_read_on_every_colour() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    assert set(FILLS) == set(Kind)
    assert len(set(FILLS.values())) == len(FILLS)
    for colour in (*FILLS.values(), PANEL, PAPER):
        assert (luminance(colour) + 0.05) / (luminance(TEXT) + 0.05) > 9


def test_ops_have_every_call_of_the_layer_once_and_what_they_read() -> None:
    plan = plan_of("whole")
    group = next(group for group in plan.groups if group.count > 1)
    graph = read_back(draw_ops(plan, None).to_string())
    calls = [op.op for op in plan.ops if op.group == group.name and op.op in plan.placements]
    drawn = [name.strip('"') for name in list_nodes(graph)]
    assert sorted(name for name in drawn if not re.match(r"(outside|change)\d", name)) == sorted(calls)
    assert draw_ops(plan, group.paths[1]).to_string() == draw_ops(plan, None).to_string()
    readers = {edge.get_destination().strip('"') for edge in graph.get_edges()}
    assert {name for name in calls if plan.reads[name]} <= readers


def test_boxes_of_ops_say_operator_and_module_and_letters_are_explained() -> None:
    plan = plan_of("whole", "llama_deep")
    group = next(group for group in plan.groups if group.count > 1)
    text = draw_ops(plan, None).to_string()
    calls = [op for op in plan.ops if op.group == group.name and op.op in plan.reads]
    for op in calls:
        place = op.path.removeprefix(group.paths[0]).rpartition(".")[2]
        assert f"<B>{short_name(op.target)}{f' in {place}' if place else ''}</B>" in text
    assert " in rotary_emb</TD>" in text  # what another part of the model makes
    named = {op.op for op in plan.ops if op.op in plan.reads}
    shown = set(re.findall(r"<TD[^>]*>([^<]*)</TD>", text))
    assert not shown & {name for name in named if re.search(r"_\d+$", name)}  # names of the graph say nothing
    assert ".Tensor" not in text
    used = {state.kind.value for op in calls for read in plan.reads[op.op] for state in (*read.made, *read.need)}
    assert "B" in used
    for letter in used:
        assert re.search(rf"[:;] {letter} (and|whole|summands)", text)


@pytest.mark.parametrize(("pins", "name"), [("whole", "gpt2_deep"), ("stages", "gpt2_deep"), ("whole", "llama_deep")])
def test_exchanges_of_ops_are_those_that_the_plan_counts(pins: str, name: str) -> None:
    """Per layer and micro-batch, forward: as many exchanges of activations as the group's rows have.

    Some of the first layer's are its own: it reads an embedding, which is made in another layout than a layer's result.
    """
    plan = plan_of(pins, name)
    group = next(group for group in plan.groups if group.count > 1)
    times = group.count * plan.pipeline.microbatches / plan.pipeline.ranks
    counted: Counter[str] = Counter()
    for row in plan.rows_of(group):
        if (row.phase, row.purpose) == (Phase.FORWARD, Purpose.ACTIVATIONS) and row.collective != "local copy":
            counted[f"{row.axis} {row.collective}"] += row.count / times
    graph = read_back(draw_ops(plan, group.name).to_string())
    makers = {edge.get_destination(): edge.get_source() for edge in graph.get_edges()}
    inside: Counter[str] = Counter()
    for node in graph.get_nodes():
        if node.get_name().startswith("change") and not makers[node.get_name()].startswith("outside"):
            inside.update(re.findall(r"<B>(\w+ \w+) [\d.]+ k?B</B>", node.get("label") or ""))
    assert inside
    assert inside == {what: int(count) for what, count in counted.items()}


def test_gradients_of_ops_are_those_that_are_summed() -> None:
    plan = plan_of("whole")
    name, (first, *_) = next((name, reads) for name, reads in plan.reads.items() if reads)
    read = replace(first, tensor="bfloat16[8, 16]", made=parse_layout("S0,R"), need=parse_layout("B,R"))

    def draw(gradient: str) -> str:
        changed = replace(plan, reads={**plan.reads, name: (replace(read, gradient=gradient),)})
        layer = next(op.group for op in plan.ops if op.op == name)
        return draw_ops(changed, layer).to_string()

    forward = f"{plan.mesh.names[0]} all_gather 256 B"
    assert forward in draw("float32")
    assert "reduce_scatter 512 B" in draw("float32")  # summed in another dtype than it is read in
    assert forward in draw("")
    assert draw("").count("reduce_scatter") == draw("float32").count("reduce_scatter") - 1


@needs_dot
def test_ops_are_drawn() -> None:
    for layer in (None, "outside"):
        assert render(draw_ops(plan_of("whole"), layer), "svg").startswith(b"<?xml")


def test_a_plan_without_operands_has_no_ops_to_draw() -> None:
    with pytest.raises(InputError, match="doesn't say what its ops read"):
        draw_ops(make_plan(), None)
    with pytest.raises(InputError, match="no layer of this plan matches 'nowhere'"):
        draw_ops(plan_of("whole"), "nowhere")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    plan_of("whole").save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_draw(saved: Path, tmp_path: Path) -> None:
    done = run("draw", saved, "-o", tmp_path / "plan.dot")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "plan.dot").read_text(encoding="utf-8") == text_of(Plan.load(saved))
    assert run("draw", saved, "--level", "ops", "--layer", "transformer.h.1", "-o", tmp_path / "ops.DOT").exit_code == 0
    assert "transformer.h.0, one of" in (tmp_path / "ops.DOT").read_text(encoding="utf-8")


def test_the_end_of_the_name_says_what_to_make(saved: Path, tmp_path: Path) -> None:
    for name in ("plan.jpeg", "plan", ".svg"):
        assert f"known are {', '.join(WRITERS)}" in refuse("draw", saved, "-o", tmp_path / name)
    assert find_writer(Path("x.PNG")) is WRITERS[".png"]


def test_what_cannot_be_written_is_refused(saved: Path, tmp_path: Path) -> None:
    assert "there is no folder" in refuse("draw", saved, "-o", tmp_path / "none" / "plan.dot")
    assert "add --level ops" in refuse("draw", saved, "--layer", "h.0", "-o", tmp_path / "plan.dot")
    assert not (tmp_path / "plan.dot").exists()


def test_without_graphviz_the_message_says_how_to_install_it(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for form in ("svg", "png", "pdf"):
        message = refuse("draw", saved, "-o", tmp_path / f"plan.{form}")
        assert "apt-get install graphviz" in message
        assert "brew install graphviz" in message
        assert "conda install" in message
        assert not (tmp_path / f"plan.{form}").exists()
    assert run("draw", saved, "-o", tmp_path / "plan.dot").exit_code == 0


def test_what_the_program_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "dot"
    broken.write_text("#!/bin/sh\necho 'no such \033[31mthing' >&2\nexit 3\n", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(InputError, match=r"ended with code 3 and drew nothing: no such \\x1b\[31mthing"):
        WRITERS[".svg"](make_plan(), View())
    broken.chmod(0o644)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="can't be run: Permission denied"):
        WRITERS[".svg"](make_plan(), View())


def test_rows_that_no_search_makes_are_drawn() -> None:
    outline = make_outline(make_timed_plan())
    edge = next(edge for edge in outline.edges if edge.kind is EdgeKind.EXCHANGE)
    odd = replace(edge, rows=(replace(edge.rows[0], count=0.0), replace(edge.rows[0], purpose=Purpose.COMPUTE, axis="tp", count=3.0)))
    text = draw_layers(replace(outline, edges=(odd,))).to_string()
    assert text.count("all_reduce ") == text.count(">compute </TD>") == 1  # without calls nothing is exchanged


def test_stages_are_told_apart() -> None:
    outline = make_outline(make_timed_plan())
    assert [edge.kind for edge in outline.edges if edge.start != edge.end].count(EdgeKind.MESSAGE) == 3
