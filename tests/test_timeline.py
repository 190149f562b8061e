"""Simulated time: against a naive simulation, closed forms of bubbles, and the longest paths that it reports."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import InputError, ScheduleError
from autopar.schedules.actions import COMPUTING, SENDS, Action, Kind, Schedule, StageEdge, chain
from autopar.schedules.families import SCHEDULES, forward_only, make_schedule
from autopar.schedules.messages import add_messages
from autopar.schedules.timeline import StageTimes, Timeline, bubble, simulate

Transfers = Mapping[tuple[int, int], tuple[float, float]]


def even(schedule: Schedule, forward: float = 1, inputs: float = 1, weight: float = 1) -> Timeline:
    """The time of a schedule whose stages are all alike, without transfers."""
    return simulate(schedule, [StageTimes(forward, inputs, weight)] * schedule.stages)


def seconds_of(action: Action, times: Sequence[StageTimes]) -> float:
    one = times[action.stage]
    return {"F": one.forward, "B": one.input + one.weight, "I": one.input, "W": one.weight}[action.kind.value]


def naive(schedule: Schedule, times: Sequence[StageTimes], transfers: Transfers, edges: Sequence[StageEdge]) -> dict[Action, float]:
    """The end of every action of lowered lists, by waiting for what isn't there yet until nothing changes."""
    ends: dict[Action, float] = {}
    arrivals: dict[Action, float] = {}  # per send
    while True:
        before = len(ends) + len(arrivals)
        for rank, actions in enumerate(schedule.actions):
            clock = 0.0
            links: dict[int, float] = {}
            for action in actions:
                if action.kind in COMPUTING:
                    messages = []
                    for edge in edges:
                        if edge.consumer == action.stage and action.kind is Kind.FORWARD:
                            messages.append(Action(edge.producer, Kind.SEND_FORWARD, action.microbatch, edge.consumer))
                        if edge.producer == action.stage and action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT) and edge.has_gradient:
                            messages.append(Action(edge.consumer, Kind.SEND_BACKWARD, action.microbatch, edge.producer))
                    messages = [one for one in messages if schedule.rank_of[one.stage] != rank]
                    if any(one not in arrivals for one in messages):
                        break
                    clock = ends[action] = max([clock, *(arrivals[one] for one in messages)]) + seconds_of(action, times)
                elif action.kind in SENDS:
                    forward = action.kind is Kind.SEND_FORWARD
                    pair = (action.stage, action.peer) if forward else (action.peer, action.stage)
                    target = schedule.rank_of[action.peer]
                    links[target] = max(clock, links.get(target, 0.0)) + transfers.get(pair, (0.0, 0.0))[not forward]
                    arrivals[action] = links[target]
        if before == len(ends) + len(arrivals):
            return ends


def weigh(timeline: Timeline, times: Sequence[StageTimes], transfers: Transfers) -> float:
    """The seconds of what lies on the longest path, under any times."""
    total = 0.0
    for part, count in timeline.critical.items():
        if len(part) == 3:
            total += count * transfers.get(part[:2], (0.0, 0.0))[part[2] is Kind.SEND_BACKWARD]
        else:
            total += count * seconds_of(Action(part[0], part[1], 0), times)
    return total


@st.composite
def cases(draw: st.DrawFn) -> tuple[Schedule, list[StageEdge], random.Random]:
    name = draw(st.sampled_from([*SCHEDULES, "forward"]))
    ranks = draw(st.integers(1, 4))
    microbatches = ranks * draw(st.integers(1, 2)) if name == "interleaved" else draw(st.integers(1, 6))
    schedule = (
        forward_only([*range(ranks), *reversed(range(ranks))], microbatches)
        if name == "forward"
        else make_schedule(name, ranks, microbatches, draw(st.integers(2, 3)) if name == "interleaved" else None)
    )
    edges = [
        StageEdge(producer, consumer, consumer == producer + 1 or draw(st.booleans()))
        for consumer in range(schedule.stages)
        for producer in range(consumer)
        if consumer == producer + 1 or draw(st.booleans())
    ]
    return schedule, edges, random.Random(draw(st.integers(0, 2**16)))


def draw_times(schedule: Schedule, edges: Sequence[StageEdge], dice: random.Random) -> tuple[list[StageTimes], Transfers]:
    """Times in eighths, whose sums are exact, some of them zero."""
    times = [StageTimes(*(dice.randrange(9) / 8 for _ in range(3))) for _ in range(schedule.stages)]
    return times, {(edge.producer, edge.consumer): (dice.randrange(9) / 8, dice.randrange(9) / 8) for edge in edges}


@settings(max_examples=150, deadline=None)
@given(cases())
def test_times_are_those_of_a_naive_simulation(case: tuple[Schedule, list[StageEdge], random.Random]) -> None:
    schedule, edges, dice = case
    times, transfers = draw_times(schedule, edges, dice)
    lowered = add_messages(schedule, edges)
    timeline = simulate(lowered, times, transfers, edges)
    assert timeline.seconds == simulate(schedule, times, transfers, edges).seconds
    expected = naive(lowered, times, transfers, edges)
    for actions, spans in zip(lowered.actions, timeline.spans, strict=True):
        assert [span.action for span in spans] == [action for action in actions if action.kind in COMPUTING]
        assert all(span.end == expected[span.action] and span.start == span.end - seconds_of(span.action, times) for span in spans)
        assert all(one.end <= other.start for one, other in pairwise(spans))
    assert timeline.seconds == max(expected.values())
    assert timeline.idle == tuple(timeline.seconds - sum(span.end - span.start for span in spans) for spans in timeline.spans)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_the_longest_path_adds_up_and_bounds_all_other_times(case: tuple[Schedule, list[StageEdge], random.Random]) -> None:
    schedule, edges, dice = case
    times, transfers = draw_times(schedule, edges, dice)
    timeline = simulate(schedule, times, transfers, edges)
    assert weigh(timeline, times, transfers) == timeline.seconds
    for _ in range(3):
        others, moves = draw_times(schedule, edges, dice)
        assert weigh(timeline, others, moves) <= simulate(schedule, others, moves, edges).seconds


# Closed forms

RANKS = range(1, 9)


@pytest.mark.parametrize("ranks", RANKS)
def test_bubbles_of_whole_backwards(ranks: int) -> None:
    for microbatches in (1, ranks, 3 * ranks, 5 * ranks + 1):
        for name in ("gpipe", "1f1b"):
            timeline = even(make_schedule(name, ranks, microbatches))
            # (p - 1) / m of the ideal time (GPipe, arXiv 1811.06965; Megatron-LM, arXiv 2104.04473).
            assert timeline.seconds == 3 * (microbatches + ranks - 1)
            assert math.isclose(bubble(timeline), (ranks - 1) / (microbatches + ranks - 1), abs_tol=1e-12)
        if microbatches % ranks == 0:
            for chunks in (2, 3, 4):
                timeline = even(make_schedule("interleaved", ranks, microbatches, chunks))
                # (p - 1) / (v m), in chunks of a v-th of a rank's work (arXiv 2104.04473).
                assert timeline.seconds == 3 * (chunks * microbatches + ranks - 1)


@pytest.mark.parametrize("ranks", RANKS)
def test_bubbles_of_split_backwards(ranks: int) -> None:
    for microbatches in (2 * ranks, 5 * ranks + 1):
        for forward, inputs, weight in ((1, 1, 1), (2, 2, 1), (4, 4, 3), (3, 2, 1), (2, 3, 1), (4, 5, 3)):
            timeline = even(make_schedule("zb-h1", ranks, microbatches), forward, inputs, weight)
            # (p - 1)(f + b - w), table 1 of arXiv 2401.10241, where w is at most f.
            assert timeline.seconds == microbatches * (forward + inputs + weight) + (ranks - 1) * (forward + inputs - weight)
        # In half stages: only the last rank's wait for its first micro-batch remains (section 6).
        assert even(make_schedule("zb-v", ranks, microbatches)).seconds == 6 * microbatches + ranks - 1


@pytest.mark.parametrize("ranks", [2, 3, 4, 7, 8, 16])
def test_the_bubble_of_v_half_is_published_and_does_not_grow(ranks: int) -> None:
    for microbatches in (ranks, 4 * ranks):
        timeline = even(make_schedule("v-half", ranks, microbatches))
        # About p / (2 m) of the ideal six half stages per micro-batch (arXiv 2405.15362).
        assert timeline.seconds <= 6 * microbatches + 3 * ranks + 1
    for forward, inputs, weight in ((1, 1, 1), (2, 2, 1), (4, 5, 3), (3, 2, 1), (2, 3, 1)):
        few, many = (even(make_schedule("v-half", ranks, factor * ranks), forward, inputs, weight) for factor in (6, 12))
        grows = many.seconds - few.seconds > 6 * ranks * 2 * (forward + inputs + weight)
        # No bubble repeats when w + 2 b >= 2 f and w + 2 f >= 2 b (section 4 there).
        assert grows == (weight + 2 * inputs < 2 * forward or weight + 2 * forward < 2 * inputs)


def test_schedules_rank_as_published() -> None:
    seconds = {name: even(make_schedule(name, 8, 32)).seconds / make_schedule(name, 8, 32).chunks for name in SCHEDULES}
    assert seconds["zb-v"] < seconds["zb-h1"] < seconds["v-half"] < seconds["1f1b"] == seconds["gpipe"]


# Transfers


def test_a_transfer_runs_beside_computing_and_after_those_before_it() -> None:
    # One-second forwards, messages of three seconds: each waits for the one before it on the link, and the second rank for each.
    timeline = simulate(forward_only((0, 1), 3), [StageTimes(1, 0, 0)] * 2, {(0, 1): (3.0, 0.0)})
    assert [(span.start, span.end) for span in timeline.spans[0]] == [(0, 1), (1, 2), (2, 3)]
    assert [(span.start, span.end) for span in timeline.spans[1]] == [(4, 5), (7, 8), (10, 11)]
    assert timeline.critical == {(0, Kind.FORWARD): 1, (0, 1, Kind.SEND_FORWARD): 3, (1, Kind.FORWARD): 1}
    assert timeline.idle == (8, 8)


def test_links_to_other_ranks_and_the_way_back_do_not_wait() -> None:
    edges = [StageEdge(0, 1), StageEdge(0, 2)]
    transfers = {(0, 1): (5.0, 2.0), (0, 2): (1.0, 7.0)}
    timeline = simulate(make_schedule("gpipe", 3, 1), [StageTimes(1, 1, 0)] * 3, transfers, edges)
    assert [[span.start for span in spans] for spans in timeline.spans] == [[0, 11], [6, 7], [2, 3]]


def test_stages_of_one_rank_exchange_at_once() -> None:
    assert simulate(make_schedule("zb-v", 1, 1), [StageTimes(1, 1, 1)] * 2, {(0, 1): (9.0, 9.0)}).seconds == 6


def test_an_action_may_wait_for_many() -> None:
    edges = [StageEdge(stage, 5) for stage in range(5)]
    transfers = {(stage, 5): (float(stage == 1), 0.0) for stage in range(5)}
    timeline = simulate(forward_only(range(6), 1), [StageTimes(2, 0, 0)] * 6, transfers, edges)
    assert timeline.spans[5][0].start == 3
    assert timeline.critical == {(1, Kind.FORWARD): 1, (1, 5, Kind.SEND_FORWARD): 1, (5, Kind.FORWARD): 1}


def test_messages_in_the_lists_change_nothing() -> None:
    schedule = make_schedule("1f1b", 3, 4)
    times = [StageTimes(1, 2, 3)] * 3
    assert simulate(add_messages(schedule, chain(3)), times).spans == simulate(schedule, times).spans


def test_nothing_takes_no_time() -> None:
    timeline = even(make_schedule("1f1b", 2, 2), 0, 0, 0)
    assert (timeline.seconds, bubble(timeline)) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([StageTimes(1, 1, 1)] * 3,), "has 2 stages, and there are times for 3"),
        (([StageTimes(1, 1, 1)] * 2, {(1, 0): (1.0, 1.0)}), "transfer times for 1 -> 0, and no such edge"),
        (([StageTimes(1, 1, 1)] * 2, {}, [StageEdge(1, 0)]), "isn't from an earlier to a later of the 2 stages"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(arguments: tuple[Any, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        simulate(make_schedule("1f1b", 2, 2), *arguments)


def test_ranks_that_wait_for_each_other_are_named() -> None:
    first, second = make_schedule("1f1b", 2, 1).actions
    backwards = Schedule("odd", 1, (0, 1), (tuple(reversed(first)), second))
    with pytest.raises(ScheduleError, match="'odd' can't run: rank 0 at 0B0, rank 1 at 1F0 wait for each other"):
        even(backwards)
