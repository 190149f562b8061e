"""Questions to a plan are answered by plans that are really made: equal to fresh ones, and compared by the plans' own numbers."""

from __future__ import annotations

import itertools
import json
import shlex
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar import counterfactuals
from autopar.counterfactuals import keep_best
from autopar.errors import HardwareError, InfeasibleError, InputError, PlanError
from autopar.plans import Pins, Plan, Request
from autopar.report import Answer, Frontier
from autopar.report.answers import word_command
from autopar.report.charts import Axis, Point, draw_line_chart, find_ticks
from autopar.report.comparison import Difference, compare_memory, compare_steps, decides_alike, word_ratio, word_terms
from tests.plans import make_pipelined_plan, make_plan, make_timed_plan

Golden = Callable[[str, str], None]

CLUSTER = "4xcpu"


class Net(nn.Module):
    def __init__(self, depth: int = 2, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


def make_batch(rows: int = 64) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, 32)}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return autopar.plan(Net(), make_batch(), CLUSTER)


@pytest.mark.parametrize("pins", [{"tp": 4}, {"dp": 4, "zero": 3}, {"pp": 2, "microbatches": 4}, {"tp": 2, "recompute": "full"}], ids=str)
def test_why_not_equals_a_fresh_plan(plan: Plan, pins: dict[str, object]) -> None:
    answer = autopar.why_not(plan, Net(), make_batch(), pins)
    fresh = autopar.plan(Net(), make_batch(), CLUSTER, pins=pins)
    assert answer.other == fresh  # the step, memory, mesh, placements and all else
    assert answer.plan is plan
    assert answer.question == str(Pins.parse(pins))


def test_new_pins_take_the_place_of_those_of_their_name_and_axis_sizes_that_of_a_mesh() -> None:
    asked = Request(pins=Pins.parse({"dp": 2, "fsdp": True, "prefetch": 0}))
    assert str(asked.override(Pins.parse({"dp": 4, "zero": 1})).pins) == "dp=4, zero=1, prefetch=0"
    made = autopar.plan(Net(), make_batch(), CLUSTER, mesh={"dp": 4}, pins={"prefetch": 0})
    assert made.request.mesh_sizes == {"dp": 4}
    kept = autopar.why_not(made, Net(), make_batch(), {"zero": 0}).other
    assert kept == autopar.plan(Net(), make_batch(), CLUSTER, mesh={"dp": 4}, pins={"prefetch": 0, "zero": 0})
    replaced = autopar.why_not(made, Net(), make_batch(), {"tp": 4}).other
    assert replaced == autopar.plan(Net(), make_batch(), CLUSTER, pins={"prefetch": 0, "tp": 4})


def test_what_if_equals_a_fresh_plan(plan: Plan) -> None:
    double = Net().to(torch.float64)
    for answer, fresh in (
        (autopar.what_if(plan, Net(), make_batch(256)), autopar.plan(Net(), make_batch(256), CLUSTER)),
        (autopar.what_if(plan, Net(), make_batch(), cluster="2x4xcpu"), autopar.plan(Net(), make_batch(), "2x4xcpu")),
        (autopar.what_if(plan, Net(), make_batch(), precision="mixed"), autopar.plan(Net(), make_batch(), CLUSTER, precision="mixed")),
        (
            autopar.what_if(plan, double, {"x": make_batch()["x"].double()}),
            autopar.plan(double, {"x": make_batch()["x"].double()}, CLUSTER),
        ),
    ):
        assert answer.other == fresh
    assert autopar.what_if(plan, Net(), make_batch(256)).question == "x=float32[256, 32]"


def test_what_if_memory_equals_a_fresh_plan(plan: Plan) -> None:
    nbytes = round(0.8 * plan.memory.total)
    answer = autopar.what_if(plan, Net(), make_batch(), memory=nbytes)
    fresh = autopar.plan(Net(), make_batch(), autopar.Cluster.parse(CLUSTER).with_memory(nbytes))
    assert answer.other is not None
    assert replace(answer.other, request=fresh.request) == fresh
    assert answer.other.memory.total <= nbytes == answer.other.memory.budget == answer.other.request.memory
    assert answer.question == f"memory={nbytes}"


def test_memory_that_was_asked_for_stays_asked_for_on_another_cluster(plan: Plan) -> None:
    small = autopar.Cluster.parse(CLUSTER).with_memory(10**9)
    made = autopar.plan(Net(), make_batch(), small)
    assert made.request.memory == 10**9
    other = autopar.what_if(made, Net(), make_batch(), cluster="8xcpu").other
    assert other is not None
    assert (other.memory.budget, other.request.cluster) == (10**9, "8xcpu")
    assert plan.request.memory is None
    other = autopar.what_if(plan, Net(), make_batch(), cluster="8xH200").other
    assert other is not None
    assert other.memory.budget == autopar.Cluster.parse("8xH200").machine.device.memory_bytes


def test_what_does_not_fit_says_what_it_needs(plan: Plan) -> None:
    answer = autopar.what_if(plan, Net(), make_batch(), memory="10kB")
    assert answer.other is None
    assert answer.needed_bytes > 10_000
    assert "can't be had: no plan fits: the leanest found needs" in str(answer)
    lean = autopar.plan(Net(), make_batch(), CLUSTER, pins={"tp": 4}).memory.total
    tight = autopar.plan(Net(), make_batch(), autopar.Cluster.parse(CLUSTER).with_memory(lean), pins={"tp": 4})
    answer = autopar.why_not(tight, Net(), make_batch(), {"dp": 4, "tp": 1, "zero": 0, "recompute": "none", "microbatches": 1})
    assert answer.other is None
    assert answer.needed_bytes > lean
    assert json.loads(json.dumps(answer.to_data()))["needed_bytes"] == answer.needed_bytes
    # Less than the device itself takes.
    gpu = autopar.plan(Net(), make_batch(), "2xH100")
    assert "are reserved" in str(autopar.what_if(gpu, Net(), make_batch(), memory="1MB"))


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"tp": 3}, "need a multiple of 3 ranks"),
        ({"tq": 2}, "unknown pin 'tq'"),
        ({"zero": 3, "dp": 1}, "but dp is pinned to 1"),
        ({}, "no pins are given"),
        ({"layers.9": {"tp": "o"}, "tp": 4}, "layers.9"),
    ],
)
def test_pins_that_cannot_be_had_are_the_usual_errors(plan: Plan, pins: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        autopar.why_not(plan, Net(), make_batch(), pins)
    assert message in str(caught.value)


def test_another_model_is_refused(plan: Plan) -> None:
    for ask in (
        lambda model, batch: autopar.why_not(plan, model, batch, {"tp": 4}),
        lambda model, batch: autopar.memory_frontier(plan, model, batch),
    ):
        with pytest.raises(PlanError, match="the plan was made for another model: Net with fingerprint"):
            ask(Net(3), make_batch())
        with pytest.raises(PlanError, match=r"input x is float32\[64, 32\] in the plan, float32\[8, 32\] here"):
            ask(Net(), make_batch(8))
    with pytest.raises(PlanError, match="the plan was made for another model"):
        autopar.what_if(plan, Net(3), make_batch(), memory="1GB")
    with pytest.raises(PlanError, match="the plan was made for a Net, not for a Linear"):
        autopar.what_if(plan, nn.Linear(32, 1), (make_batch()["x"],))


def test_another_cluster_is_refused(plan: Plan) -> None:
    with pytest.raises(PlanError, match="the plan is for 1x4xcpu, not for 1x8xcpu"):
        autopar.why_not(plan, Net(), make_batch(), {"tp": 4}, cluster="8xcpu")
    with pytest.raises(HardwareError, match=r"can't be read any more: .*absent.toml"):
        autopar.why_not(replace(plan, request=replace(plan.request, cluster="4x./absent.toml")), Net(), make_batch(), {"tp": 4})
    same = autopar.why_not(plan, Net(), make_batch(), {"tp": 4}, cluster=autopar.Cluster.parse(CLUSTER)).other
    assert same == autopar.why_not(plan, Net(), make_batch(), {"tp": 4}).other


def test_a_profile_that_has_changed_since_is_refused(tmp_path: Path) -> None:
    profile = tmp_path / "my.toml"
    text = (resources.files("cost_models.machines") / "cpu.toml").read_text(encoding="utf-8")
    profile.write_text(text, encoding="utf-8")
    cluster = f"4x{profile}"
    made = autopar.plan(Net(), make_batch(), cluster)
    assert made.request.machine == autopar.Cluster.parse(CLUSTER).machine.digest
    # Comments, sources and the memory, which a plan says itself, aren't what costs are computed from.
    profile.write_text(text.replace("memory_bytes = 4_000", "memory_bytes = 5_000") + "\n# later\n", encoding="utf-8")
    assert autopar.why_not(made, Net(), make_batch(), {"tp": 4}).other is not None
    changed = text.replace("launch_seconds = 8e-6", "launch_seconds = 9e-6")
    assert changed != text
    profile.write_text(changed, encoding="utf-8")
    for ask in (
        lambda: autopar.why_not(made, Net(), make_batch(), {"tp": 4}),
        lambda: autopar.what_if(made, Net(), make_batch(128)),
        lambda: autopar.memory_frontier(made, Net(), make_batch()),
    ):
        with pytest.raises(PlanError, match="the profile of the machine cpu has other numbers than when the plan was made"):
            ask()


@pytest.mark.parametrize("memory", [0, -5, 1.5, True])
def test_what_is_no_memory_is_refused(plan: Plan, memory: Any) -> None:
    with pytest.raises(InputError, match=f"memory={memory}: bytes of a device are needed, from 1"):
        autopar.what_if(plan, Net(), make_batch(), memory=memory)


def test_probes_are_no_budgets(plan: Plan, measured: tuple[Frontier, list[str]]) -> None:
    frontier, _ = measured
    assert 1 <= len(frontier.budgets) <= 3
    assert min(frontier.budgets) >= frontier.points[-1].memory.total
    assert f"Planned for {len(frontier.budgets)} budgets of memory." in str(frontier)


def test_a_frontier_without_a_word_on_the_leanest_plan(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that ends without knowing what is needed leaves all budgets to be tried."""
    made = counterfactuals.plan_captured

    def forget(*args: Any) -> Plan:
        try:
            return made(*args)
        except InfeasibleError as error:
            raise InfeasibleError(f"{error}") from error

    monkeypatch.setattr(counterfactuals, "plan_captured", forget)
    frontier = autopar.memory_frontier(plan, Net(), make_batch(), budgets=2)
    assert len(frontier.budgets) == 2
    assert frontier.points


@pytest.fixture(scope="module")
def measured(plan: Plan) -> tuple[Frontier, list[str]]:
    """A frontier, and what was told while it was made."""
    told: list[str] = []
    return autopar.memory_frontier(plan, Net(), make_batch(), budgets=3, progress=told.append), told


def test_the_frontier_is_monotone(plan: Plan, measured: tuple[Frontier, list[str]]) -> None:
    frontier, told = measured
    assert len(frontier.points) >= 3
    for more, less in itertools.pairwise(frontier.points):
        assert more.memory.total > less.memory.total
        assert more.seconds.step < less.seconds.step
    fastest = [frontier.at(nbytes) for nbytes in range(0, 2 * plan.memory.total, plan.memory.total // 50)]
    steps = [point.seconds.step for point in fastest if point is not None]
    assert steps == sorted(steps, reverse=True)
    assert fastest[0] is None
    assert all(point.memory.total <= point.memory.budget for point in frontier.points)
    assert frontier.points[0].seconds.step <= plan.seconds.step
    # Captured once, however many plans are made.
    assert told.count("capture") == 1
    assert any(text.startswith("the leanest: ") for text in told)


def test_points_of_the_frontier_are_fresh_plans(plan: Plan, measured: tuple[Frontier, list[str]]) -> None:
    frontier, _ = measured
    point = next(point for point in frontier.points if point is not plan)
    fresh = autopar.plan(Net(), make_batch(), autopar.Cluster.parse(CLUSTER).with_memory(point.memory.budget))
    assert replace(point, request=fresh.request) == fresh
    assert all(point is plan or point.memory.budget in frontier.budgets for point in frontier.points)
    with pytest.raises(InputError, match="budgets=0"):
        autopar.memory_frontier(plan, Net(), make_batch(), budgets=0)


def _with(plan: Plan, memory: int, nanoseconds: int) -> Plan:
    return replace(plan, memory=replace(plan.memory, activations=memory), proof=replace(plan.proof, objective_ns=nanoseconds))


def test_a_plan_that_needs_less_and_is_as_fast_takes_the_place_of_others() -> None:
    plan = make_plan()
    a, b, c, d = (_with(plan, *numbers) for numbers in ((400, 10), (300, 10), (200, 30), (100, 20)))
    assert keep_best([a, b, c, d]) == (b, d)
    assert keep_best([a]) == (a,)


def test_parts_add_up_to_the_plans_numbers(plan: Plan) -> None:
    other = autopar.why_not(plan, Net(), make_batch(), {"pp": 2}).other
    assert other is not None
    for first, second in ((plan, other), (make_plan(), make_pipelined_plan())):
        steps, memory = compare_steps(first, second), compare_memory(first, second)
        assert sum(part.first for part in steps) == pytest.approx(first.seconds.step)
        assert sum(part.second for part in steps) == pytest.approx(second.seconds.step)
        assert sum(part.first for part in memory) == first.memory.total
        assert sum(part.second for part in memory) == second.memory.total
        data = Answer("", first, second).to_data()
        assert sum(data["difference_seconds"].values()) == pytest.approx(second.seconds.step - first.seconds.step)
        assert sum(data["difference_bytes"].values()) == second.memory.total - first.memory.total


def test_the_answer_in_text(golden: Golden) -> None:
    plan, other = make_plan(), make_pipelined_plan()
    golden("answer.txt", f"{Answer('pp=2, schedule=interleaved', plan, other)}\n")
    assert str(Answer("tp=8", plan, None, "no plan fits", 5)) == "tp=8 can't be had: no plan fits"


def test_the_answer_has_the_notes_that_only_the_other_plan_has() -> None:
    plan = make_plan()
    other = replace(plan, notes=(*plan.notes, "gathers wait, since memory is short"))
    answer = Answer("tp=8", plan, other)
    assert "Notes on this one\n- gathers wait, since memory is short\n" in str(answer)
    assert answer.to_data()["notes"] == ["gathers wait, since memory is short"]
    assert not any(note in str(answer) for note in plan.notes)
    assert "Notes" not in str(Answer("tp=8", other, plan))


def test_the_answer_says_when_it_is_faster_and_when_it_is_the_plan() -> None:
    plan = make_plan()
    faster = replace(plan, proof=replace(plan.proof, objective_ns=10), mesh=replace(plan.mesh, sizes=(4, 2)))
    assert Answer("dp=4", plan, faster).is_better
    text = str(Answer("dp=4", plan, faster))
    assert "It is faster than the plan and could take its place" in text
    assert "autopar plan hf:gpt2 --cluster 8xH100 --batch 8 --seq 128 --precision mixed --memory 80GB --pin tp=4" in text
    for other in (
        replace(faster, cluster="1x8xh200"),
        replace(faster, fingerprint="4567"),
        replace(faster, memory=replace(plan.memory, activations=10**12)),
    ):
        assert not Answer("dp=4", plan, other).is_better
    assert "Both decide the same." in str(Answer("dp=2", plan, plan))
    assert decides_alike(plan, replace(plan, mesh=replace(plan.mesh, names=("a", "b"))))
    assert not decides_alike(plan, faster)
    timed = make_timed_plan()
    assert timed.pipeline.timing is not None
    messages = tuple(replace(message, forward=2 * message.forward) for message in timed.pipeline.timing.messages)
    elsewhere = replace(timed, pipeline=replace(timed.pipeline, timing=replace(timed.pipeline.timing, messages=messages)))
    assert elsewhere.pipeline != timed.pipeline
    assert decides_alike(timed, elsewhere)  # what is decided isn't how long it takes


def test_a_batch_of_another_size_is_compared_per_sample() -> None:
    plan = make_plan()
    other = replace(plan, work=replace(plan.work, samples=16))
    assert "; per sample 688 µs instead of 1.38 ms" in str(Answer("batch=16", plan, other)).splitlines()[0]
    assert "per sample" not in str(Answer("tp=4", plan, plan))


def test_the_frontier_in_text_and_as_a_picture(golden: Golden) -> None:
    plan, lean = make_plan(), replace(make_pipelined_plan(), memory=replace(make_plan().memory, activations=3_000_000_000))
    frontier = Frontier(plan, (plan, lean), (40_000_000_000, 20_000_000_000))
    golden("frontier.txt", f"{frontier}\n")
    golden("frontier.svg", frontier.to_svg())
    dominated = Frontier(plan, (lean,), (20_000_000_000,))
    assert "The plan itself, with 19.6 GB and 11.0 ms, isn't among them" in str(dominated)
    assert '<circle class="mark"' in dominated.to_svg()
    assert [point["memory_bytes"]["total"] for point in frontier.to_data()["points"]] == [plan.memory.total, lean.memory.total]


def test_a_frontier_says_that_a_faster_plan_was_found() -> None:
    plan = make_plan()
    faster = replace(plan, proof=replace(plan.proof, objective_ns=10), memory=replace(plan.memory, activations=5))
    frontier = Frontier(plan, keep_best([plan, faster]), (1,))
    assert frontier.fastest is faster
    text = str(frontier)
    assert "A faster plan was found, with 7.25 GB and 11.0 ms" in text
    assert "-o FILE.json writes it; it is made by: autopar plan hf:gpt2 --cluster 8xH100" in text
    assert "faster" not in str(Frontier(plan, (plan,), (1,)))
    as_fast = replace(plan, memory=faster.memory)
    assert "faster" not in str(Frontier(plan, keep_best([plan, as_fast]), (1,)))


def test_points_of_a_chart_are_where_their_numbers_are() -> None:
    points = [Point(1, 40, "a < b & c"), Point(5, 20), Point(10, 10, label="last")]
    root = ElementTree.fromstring(draw_line_chart("A & B", Axis("x", str), Axis("y", str), points))
    space = "{http://www.w3.org/2000/svg}"
    circles = [(float(circle.attrib["cx"]), float(circle.attrib["cy"])) for circle in root.iter(f"{space}circle")]
    (xs, ys) = zip(*circles, strict=True)
    assert (xs[1] - xs[0]) / (xs[2] - xs[0]) == pytest.approx(4 / 9, abs=1e-3)
    assert (ys[1] - ys[0]) / (ys[2] - ys[0]) == pytest.approx(20 / 30, abs=1e-3)
    assert next(root.iter(f"{space}title")).text == "A & B"
    assert "a < b & c" in [title.text for title in root.iter(f"{space}title")]
    assert "last" in [text.text for text in root.iter(f"{space}text")]
    stepped = draw_line_chart("", Axis("x", str), Axis("y", str), points, stepped=True)
    corners = ElementTree.fromstring(stepped).find(f"{space}polyline").attrib["points"].split()  # type: ignore[union-attr]
    assert len(corners) == 5
    assert corners[1].split(",")[1] == corners[0].split(",")[1]
    assert find_ticks(0) == [0.0, 1.0]
    assert all(find_ticks(value)[-1] >= value > find_ticks(value)[-2] for value in (1e-9, 0.3, 7, 60, 4.5e9, 1e15))


def test_a_compiled_models_plan_says_how_it_was_asked_for() -> None:
    compiled = autopar.compile(Net(), make_batch(), pins={"zero": 0, "recompute": "full"}, fuse=False, progress=lambda _: None)
    request = compiled.plan.request
    assert (request.cluster, request.pins.texts, request.model) == ("1x1xcpu", {"zero": "0", "recompute": "full"}, "")
    # The memory of this machine, not that of the profile.
    assert request.memory == compiled.plan.memory.budget
    answer = autopar.why_not(compiled.plan, Net(), make_batch(), {"recompute": "none"})
    assert answer.is_better
    assert answer.other is not None
    assert answer.other.request.pins.texts == {"zero": "0", "recompute": "none"}


def test_names_that_no_terminal_should_see_are_escaped_in_a_request() -> None:
    pins = Pins.parse({"a\tb": {"tp": "o"}, "c\x1b": {"pp": 1}})
    request = Request(model="x\ty.py:f", cluster="8x./\x07.toml", pins=pins).in_print()
    assert (request.model, request.cluster) == (r"x\ty.py:f", r"8x./\x07.toml")
    assert set(request.pins.texts) == {r"a\tb", r"c\x1b"}


def test_words() -> None:
    assert [word_ratio(1, other) for other in (1.0004, 1.003, 1.12, 0.5, 3.14, 314)] == [
        "the same",
        "0.3% more",
        "12% more",
        "50% less",
        "3.1 times as much",
        "314 times as much",
    ]
    parts = [Difference("compute", 1.0, 0.9), Difference("bubble", 0.0, 0.2), Difference("optimizer", 0.1, 0.101)]
    assert word_terms(parts) == "bubble +200 ms, compute -100 ms"
    assert word_terms([]) == word_terms([Difference("compute", 1.0, 1.0)]) == ""


def test_the_command_has_everything_that_was_asked_for() -> None:
    plan = make_plan()
    request = replace(
        plan.request, model="my model.py:f", dtype="float32", mesh=autopar.plan(Net(), make_batch(), CLUSTER).mesh, memory=1001, strict=True
    )
    words = shlex.split(word_command(request, plan.precision))
    assert words[:5] == ["autopar", "plan", "my model.py:f", "--cluster", "8xH100"]
    assert words[words.index("--memory") :][:2] == ["--memory", "1001"]
    assert "transformer.h.*.mlp=tp:o,pp:0" in words
    assert words[-1] == "--strict"
    assert "--mesh" in words
    assert word_command(Request(), autopar.Precision.parse(None)) == "autopar plan MODEL --cluster CLUSTER"
