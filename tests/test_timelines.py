"""Traces of steps: every number is the plan's own, files keep to the Trace Event Format, pictures show all of it."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import autopar
from autopar.errors import InputError, PlanError
from autopar.pages.content import describe_page
from autopar.plans import Phase, Plan, Purpose, from_json, to_json
from autopar.timelines import RankRecord, Sent, Trace, draw, from_chrome, from_text, merge, predict, to_chrome, to_text
from autopar.timelines.picture import _COLOURS, _name_block
from autopar.timelines.recorded import align
from autopar.timelines.trace import BUSY, COMMUNICATION, COMPUTE, COPIES, OVERLAPPED, Event, Sample
from examples.mlp import build
from tests.commands import refuse, run
from tests.plans import make_plan, make_timed_plan
from tests.zoo import DEEP

Golden = Callable[[str, str], None]

PINS: Mapping[str, Mapping[str, Any]] = {
    "free": {},
    "zero 3": {"dp": 4, "fsdp": True},
    "zero 2": {"dp": 4, "zero": 2},
    "zero 1": {"dp": 4, "zero": 1},
    "tensors": {"tp": 4, "vocabulary": True},
    "halves": {"tp": 2, "half_batches": True},
    "recompute": {"dp": 2, "tp": 2, "recompute": "full"},
    "micro-batches": {"pp": 1, "microbatches": 4, "dp": 2},
    "1f1b": {"pp": 2, "tp": 2, "schedule": "1f1b", "microbatches": 4, "recompute": "selective"},
    "interleaved": {"pp": 2, "dp": 2, "schedule": "interleaved", "chunks": 2, "microbatches": 4, "zero": 2},
    "zb-h1": {"pp": 4, "schedule": "zb-h1", "microbatches": 4},
    "zb-v": {"pp": 2, "dp": 2, "fsdp": True, "schedule": "zb-v", "microbatches": 4},
    "v-half": {"pp": 2, "dp": 2, "schedule": "v-half", "microbatches": 4},
}


@pytest.fixture(scope="module", params=list(PINS))
def plan(request: pytest.FixtureRequest) -> Plan:
    model, inputs = DEEP["gpt2_deep"]()
    cluster = "4xcpu" if request.param != "halves" else "2xH100"
    return from_json(to_json(autopar.plan(model, inputs, cluster, pins=PINS[request.param])))


# --- the plan's own numbers ---


def test_events_add_up_to_the_plan(plan: Plan) -> None:
    trace = predict(plan)
    ranks = plan.pipeline.ranks
    sums: dict[tuple[str, ...], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for event in trace.events:
        if event.purpose != Purpose.MESSAGES:
            entry = sums[event.phase, event.purpose, event.axis, event.collective]
            entry[0] += event.seconds * (event.thread in BUSY) / ranks
            entry[1] += event.seconds * (event.thread == OVERLAPPED) / ranks
            entry[2] += event.nbytes / ranks
    expected: dict[tuple[str, ...], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for row in plan.costs:
        if row.purpose not in (Purpose.MESSAGES, Purpose.BUBBLE) and (row.seconds or row.hidden):
            where = (row.axis, row.collective) if row.is_communication else ("", "")
            entry = expected[row.phase, row.purpose, *where]
            for index, number in enumerate((row.seconds, row.hidden, row.nbytes) if row.is_communication else (row.seconds, 0.0, 0.0)):
                entry[index] += number
    assert sums.keys() == expected.keys()
    for key, numbers in sums.items():
        assert numbers == pytest.approx(expected[key], rel=1e-9, abs=1e-15), key


def test_the_step_and_the_bubble_are_the_plans(plan: Plan) -> None:
    trace = predict(plan)
    ranks = range(len(trace.ranks))
    assert trace.seconds == plan.seconds.step
    assert max(event.end for event in trace.events) == pytest.approx(plan.seconds.step, rel=1e-9)
    assert sum(trace.seconds - trace.busy(rank) for rank in ranks) / len(ranks) == pytest.approx(plan.seconds.bubble, abs=1e-12)


def test_messages_are_the_plans(plan: Plan) -> None:
    trace = predict(plan)
    rows = [row for row in plan.costs if row.purpose == Purpose.MESSAGES]
    assert len(trace.arrows) == sum(row.count for row in rows)
    assert sum(arrow.nbytes for arrow in trace.arrows) == sum(row.nbytes for row in rows)
    seconds = sum(event.seconds for event in trace.events if event.purpose == Purpose.MESSAGES)
    assert seconds == pytest.approx(sum(row.hidden for row in rows), rel=1e-9)
    for arrow in trace.arrows:
        assert arrow.sent <= arrow.arrived <= arrow.used
        assert arrow.source != arrow.target


def test_memory_peaks_at_the_plans_total(plan: Plan) -> None:
    trace = predict(plan)
    peaks = [max(sample.nbytes for sample in trace.memory if sample.rank == rank) for rank in range(len(trace.ranks))]
    assert max(peaks) == plan.memory.total
    assert all(sample.nbytes > 0 for sample in trace.memory)


@pytest.mark.parametrize(
    "pins", [{"dp": 4, "zero": 1}, {"dp": 2, "tp": 2, "zero": 1}, {"dp": 4, "zero": 1, "zero_group": 2}, {"dp": 4, "zero": 2}], ids=str
)
def test_parts_of_gradients_count_once(pins: Mapping[str, Any]) -> None:
    """A model with little beside its parameters is fullest after the backward."""
    plan = autopar.plan(*build(batch=32), "4xcpu", pins=pins)
    assert max(sample.nbytes for sample in predict(plan).memory) == plan.memory.total


def test_what_a_rank_does_doesnt_overlap(plan: Plan) -> None:
    _check_threads(predict(plan))


def _check_threads(trace: Trace) -> None:
    by_thread: dict[tuple[int, str], list[Event]] = defaultdict(list)
    for event in trace.events:
        by_thread[event.rank, "busy" if event.thread in BUSY else event.thread].append(event)
        assert event.start >= 0
        assert event.end <= trace.seconds * (1 + 1e-9)
    for events in by_thread.values():
        for event, following in pairwise(sorted(events, key=lambda event: (event.start, event.end))):
            assert following.start >= event.end - 1e-12, (event, following)


def test_a_step_by_hand(golden: Golden) -> None:
    """The events, messages and memory of two stages, worked out in the comments of `make_timed_plan`."""
    trace = predict(make_timed_plan())
    lines = [
        f"rank {event.rank}  {1e3 * event.start:5.2f} to {1e3 * event.end:5.2f} ms  {event.name:15} {event.thread:30} {event.phase}"
        for event in sorted(trace.events, key=lambda event: (event.rank, event.thread, event.start))
    ]
    lines += [f"{arrow.name} {1e3 * arrow.sent:.2f} {1e3 * arrow.arrived:.2f} {1e3 * arrow.used:.2f}" for arrow in trace.arrows]
    lines += [f"rank {sample.rank} at {1e3 * sample.time:5.2f} ms: {sample.nbytes}" for sample in trace.memory]
    golden("timeline.txt", "\n".join(lines) + "\n")
    assert max(sample.nbytes for sample in trace.memory) == make_timed_plan().memory.total


def test_a_loss_outside_has_all_forwards_first() -> None:
    plan = make_timed_plan()
    assert plan.pipeline.timing is not None
    outside = replace(plan, pipeline=replace(plan.pipeline, timing=replace(plan.pipeline.timing, forwards_first=True)))
    # On stage 1 the second forward runs before the first backward, from 5 to 7 ms: stage 0 gets both gradients by 12 ms, and ends at 16.
    with pytest.raises(PlanError, match=r"make a step of 0\.018\d* s, but plan.costs add up to 0\.017 s"):
        predict(outside)


def test_plans_without_timing_are_refused() -> None:
    with pytest.raises(PlanError, match=r"no plan.pipeline.timing, .* make it again with `autopar plan`"):
        predict(make_plan())


def test_a_step_of_too_many_events_is_refused_at_once() -> None:
    plan = make_timed_plan()
    assert predict(plan)
    long = replace(plan, pipeline=replace(plan.pipeline, microbatches=2**19))
    with pytest.raises(
        InputError, match=r"a step of 524288 micro-batches on 2 stages has about 5,767,168 events, and a timeline up to 200,000"
    ):
        predict(long)
    page = describe_page(long)
    assert page["timeline"] is None
    assert any("no timeline: a step of 524288 micro-batches" in note for note in page["notes"])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("kind_of",), [0], "plan.pipeline.timing.kind_of has 1 entries, and there are 2 blocks"),
        (("kind_of",), [0, 2], "plan.pipeline.timing.kind_of names 2, but there are 2 kinds, numbered from 0"),
        (("messages",), [], "plan.pipeline.timing.messages has 0 entries, and there are 1 stages but the last"),
        (("stages",), [], "plan.pipeline.timing.stages has 0 entries, and there are 2 stages"),
        (("ranks",), [], "plan.pipeline.timing.ranks has 0 entries, and there are 2 pipeline ranks"),
        (("stages", 1, "backward"), [1, 2], "plan.pipeline.timing.stages[1].backward has 2 entries; the stage has 1 blocks"),
        (("kinds", 0, "rows", 0, "phase"), "later", "plan.pipeline.timing.kinds[0].rows[0].phase is 'later'; known are"),
        (("kinds", 1, "rows", 1, "axis"), "x", "plan.pipeline.timing.kinds[1].rows[1].axis is 'x', the mesh has dp=2 x tp=4"),
        (
            ("kinds", 0, "rows", 0, "seconds"),
            0.003,
            "plan.pipeline.timing adds up to 0.004 s of forward compute, but plan.costs has 0.003 s",
        ),
        (("kinds", 1, "rows", 1, "hidden"), 0.0, "plan.pipeline.timing adds up to 0.0 s of forward activations tp all_reduce"),
        (("forwards_first",), 1, "plan.pipeline.timing.forwards_first: true or false is needed, not int"),
        (("ranks", 0, "update"), -1, "plan.pipeline.timing.ranks[0].update is -1, an integer from 0 is needed"),
    ],
)
def test_damage_is_named(path: tuple[Any, ...], value: Any, message: str) -> None:
    document = json.loads(to_json(make_timed_plan()))
    target = document["plan"]["pipeline"]["timing"]
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(PlanError) as caught:
        from_json(json.dumps(document))
    assert message in str(caught.value)


# --- files ---


def validate(text: str) -> dict[str, Any]:
    """The document of a trace file, which keeps to the Trace Event Format as Perfetto reads it."""
    document: dict[str, Any] = json.loads(text)
    events = document["traceEvents"]
    processes, threads, used = set(), set(), set()
    flows: dict[Any, dict[str, Any]] = defaultdict(dict)
    slices: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    counters: dict[tuple[int, str], list[float]] = defaultdict(list)
    for event in events:
        assert isinstance(event["name"], str)
        assert event["ph"] in ("X", "M", "s", "f", "C")
        assert type(event["pid"]) is int
        assert type(event["tid"]) is int
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "process_sort_index", "thread_name", "thread_sort_index")
            value = event["args"]["name" if event["name"].endswith("name") else "sort_index"]
            assert isinstance(value, str if event["name"].endswith("name") else int)
            (processes if event["name"] == "process_name" else threads).add((event["pid"], event["tid"]))
            continue
        assert isinstance(event["ts"], int | float)
        assert math.isfinite(event["ts"])
        assert event["ts"] >= 0
        used.add((event["pid"], event["tid"]))
        if event["ph"] == "X":
            assert event["dur"] >= 0
            assert isinstance(event["args"], dict)
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        elif event["ph"] == "C":
            assert event["args"]
            assert all(isinstance(value, int | float) for value in event["args"].values())
            counters[event["pid"], event["name"]].append(event["ts"])
        else:
            assert event["ph"] not in flows[event["id"]], "a flow begins once and ends once"
            assert event["ph"] == "s" or event["bp"] == "e"
            flows[event["id"]][event["ph"]] = event
    assert {pid for pid, _ in used} == {pid for pid, _ in processes}
    assert used <= threads
    for own in slices.values():
        own.sort()
        # Within a microsecond's thousandth, to which times are rounded.
        assert all(after[0] >= before[1] - 1e-6 for before, after in pairwise(own)), "slices of a thread may nest, but these don't"
    for times in counters.values():
        assert times == sorted(times)
    for flow in flows.values():
        start, end = flow["s"], flow["f"]
        assert (start["cat"], start["name"]) == (end["cat"], end["name"])
        assert start["ts"] <= end["ts"]
        for event in (start, end):
            own = slices[event["pid"], event["tid"]]
            assert any(begin - 1e-6 <= event["ts"] <= finish + 1e-6 for begin, finish in own), f"no slice around {event}"
    return document


def test_files_keep_to_the_format(plan: Plan) -> None:
    trace = predict(plan)
    document = validate(to_chrome([trace]))
    events = document["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == len(trace.events)
    assert sum(event["ph"] == "s" for event in events) == len(trace.arrows)
    longest = max(event["ts"] + event["dur"] for event in events if event["ph"] == "X")
    assert longest == pytest.approx(1e6 * plan.seconds.step, abs=2e-3)


def test_traces_lie_side_by_side() -> None:
    first, second = predict(make_timed_plan()), replace(predict(make_timed_plan()), title="recorded")
    events = validate(to_chrome([first, second]))["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names[2:] == [f"recorded: {name}" for name in second.ranks]
    assert {event["pid"] for event in events} == {0, 1, 2, 3}


def test_a_file_is_read_back(plan: Plan) -> None:
    _compare(from_chrome(to_chrome([predict(plan), predict(plan)])), (predict(plan), predict(plan)))


def _compare(found: tuple[Trace, ...], expected: tuple[Trace, ...]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.title, one.ranks, one.seconds, one.memory) == (
            other.title,
            other.ranks,
            other.seconds,
            tuple(replace(sample, time=round(1e6 * sample.time, 3) / 1e6) for sample in other.memory),
        )
        assert len(one.arrows) == len(other.arrows)
        in_order = sorted(other.events, key=lambda event: (event.start, -event.seconds))
        for event, same in zip(one.events, in_order, strict=True):
            assert replace(event, start=0, seconds=0) == replace(same, start=0, seconds=0)
            assert (event.start, event.seconds) == pytest.approx((same.start, same.seconds), abs=2e-9)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no JSON", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"traceEvents": []}', "KeyError: 'otherData'"),
        ('{"traceEvents": [], "otherData": {"format": "something"}}', "another program has written it"),
        (to_chrome([predict(make_timed_plan())]).replace('"dur":2000.0', '"dur":-1', 1), "-1 is no number from 0"),
        (to_chrome([predict(make_timed_plan())]).replace('"stage":0', '"stage":"a"', 1), "'a' is no whole number"),
    ],
)
def test_other_files_are_refused(text: str, reason: str) -> None:
    with pytest.raises(InputError, match="not a trace that autopar has written") as caught:
        from_chrome(text)
    assert reason in str(caught.value)


# --- pictures ---


def test_a_picture_has_every_event(plan: Plan) -> None:
    trace = predict(plan)
    picture = ElementTree.fromstring(draw([trace]))
    width, height = float(picture.attrib["width"]), float(picture.attrib["height"])
    hints = [box.find("{*}title") for box in picture.iter("{http://www.w3.org/2000/svg}rect")]
    assert sum(hint is not None for hint in hints) == len(trace.events)
    for box in picture.iter("{http://www.w3.org/2000/svg}rect"):
        assert 0 <= float(box.get("x", 0)) <= float(box.get("x", 0)) + float(box.attrib["width"]) <= width + 0.2
        assert 0 <= float(box.get("y", 0)) <= float(box.get("y", 0)) + float(box.attrib["height"]) <= height
    labels = ["".join(text.itertext()) for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert trace.title in labels
    for rank in range(len(trace.ranks)):
        seconds = trace.exchanging(rank)
        assert f"computes {(trace.busy(rank) - seconds) / trace.seconds:.0%}" in labels
        assert f"exchanges {seconds / trace.seconds:.0%}" in labels
    assert (trace.exchanging(0) > 0) == any(event.thread == "communication" and event.rank == 0 for event in trace.events)
    # Numbers are those of micro-batches.
    numbers = {int(label) for label in labels if label.isdecimal() and label != "0"}
    assert numbers <= {event.microbatch for event in trace.events}


def test_colours_tell_kinds_apart() -> None:
    assert len(set(_COLOURS.values())) == len(_COLOURS)


def test_a_block_with_a_number_is_named() -> None:
    names = {"model.layers.12": "layers.12", "h.0": "h.0", "lm_head": "lm_head", "model.embed_tokens": "embed_tokens", "3": "3", "": ""}
    assert {path: _name_block(path) for path in names} == names


def test_a_picture_by_hand(golden: Golden) -> None:
    golden("timeline.svg", draw([predict(make_timed_plan())]))


# --- records of runs ---


def test_records_become_a_trace() -> None:
    def computes(rank: int, name: str, start: float, seconds: float) -> Event:
        return Event(rank, COMPUTE, name, "forward", "compute", start, seconds, rank, 0)

    waits = Event(1, COMMUNICATION, "all_reduce tp", "forward", "communication", 3.25, 0.5, 1, 0, "", "tp", "all_reduce", 8)
    records = [
        RankRecord(0, 0, 1, (computes(0, "F0", 0.0, 1.0),), (Sent("0SF0>1", 1.0, 0.25, 64),), (), (Sample(0, 1.0, 5),)),
        RankRecord(1, 1, 1, (computes(1, "F0", 3.0, 1.0), waits), (), (("0SF0>1", 2.5),), (Sample(1, 9.0, 7),)),
    ]
    assert [from_text(to_text(record)) for record in records] == records
    trace = merge("two ranks", records)
    assert trace.ranks == ("rank 0, pipeline rank 0", "rank 1, pipeline rank 1")
    assert trace.seconds == 4.0
    # What was computed before and after the collective.
    assert [(event.start, event.seconds) for event in trace.events if event.rank == 1 and event.thread == COMPUTE] == [
        (3.0, 0.25),
        (3.75, 0.25),
    ]
    (arrow,) = trace.arrows
    assert (arrow.source, arrow.target, arrow.sent, arrow.arrived, arrow.used, arrow.nbytes) == (0, 1, 1.0, 2.5, 3.0, 64)
    assert [sample.time for sample in trace.memory] == [1.0, 4.0]
    _check_threads(trace)
    validate(to_chrome([trace]))


def test_clocks_are_compared_at_meetings() -> None:
    """Rank 1's clock is 100 s ahead; the second meeting is the quicker one."""
    event = Event(0, COMPUTE, "forward", "forward", "compute", 10.0, 1.0)
    meetings = ((0.0, 3.0), (5.0, 5.2)), ((101.0, 103.0), (105.1, 105.3))
    records = [
        RankRecord(rank, 0, 2, (replace(event, rank=rank, start=10.0 + 100 * rank),), (), (), (), meetings[rank]) for rank in range(2)
    ]
    first, second = align(records)
    assert first.events[0].start == pytest.approx(0.1)
    assert second.events[0].start == 0.0  # from 9.7 to 10.1 s by the first rank's clock
    assert merge("two", records).seconds == pytest.approx(1.1)


# --- the command ---


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    make_timed_plan().save(path)
    return path


def test_the_command_writes_a_trace_and_a_picture(saved: Path, tmp_path: Path) -> None:
    trace, picture = tmp_path / "trace.json", tmp_path / "step.svg"
    out = run("timeline", saved, "-o", trace).stdout
    assert "GPT2LMHeadModel on 2x8xh100, predicted: step 17.0 ms, of which ranks compute 52.9% and exchange 8.8%" in out
    validate(trace.read_text(encoding="utf-8"))
    assert run("timeline", saved, "-o", picture, "--beside", trace).exit_code == 0
    assert picture.read_text(encoding="utf-8").count(">GPT2LMHeadModel on 2x8xh100, predicted</text>") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda plan: ["-o", str(plan.parent / "step.png")], "end it with .json for a trace, or with .svg for a picture"),
        (lambda plan: ["-o", str(plan.parent / "nowhere" / "step.svg")], "there is no folder"),
        (lambda plan: ["-o", str(plan.parent / "step.svg"), "--beside", str(plan)], "plan.json: not a trace that autopar has written"),
        (lambda plan: ["-o", str(plan.parent / "step.svg"), "--beside", str(plan.parent / "absent.json")], "absent.json: can't be read"),
    ],
)
def test_the_command_refuses(arguments: Callable[[Path], list[str]], message: str, saved: Path) -> None:
    assert message in refuse("timeline", saved, *arguments(saved))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_file_that_cannot_be_written_is_named(saved: Path, tmp_path: Path) -> None:
    full = tmp_path / "full.svg"
    full.symlink_to("/dev/full")
    for command in (("timeline", saved, "-o", full), ("emit", saved, "--to", "megatron", "-o", full)):
        result = run(*command)
        assert result.exit_code == 2
        assert result.stderr == f"error: {full} can't be written: No space left on device\n"


def test_phases_and_threads_are_known() -> None:
    trace = predict(make_timed_plan())
    assert {event.phase for event in trace.events} <= set(Phase)
    assert trace.threads(1) == (COMPUTE, COMMUNICATION, OVERLAPPED, "messages to rank 0")
    assert COPIES in BUSY
