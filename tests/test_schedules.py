"""Schedules: orders against torch's, memory against the papers', the validator against threads that run the lists."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as theirs

from autopar.errors import InputError, ScheduleError
from autopar.schedules.actions import (
    COMPUTING,
    RECEIVES,
    SENDS,
    Action,
    Kind,
    Schedule,
    StageEdge,
    chain,
    counterpart,
    draw_table,
    parse_action,
)
from autopar.schedules.families import SCHEDULES, forward_only, make_schedule
from autopar.schedules.messages import add_messages, peaks_in_flight, validate
from autopar.schedules.timeline import StageTimes, simulate

RANKS = range(1, 9)


def read(*lists: str, microbatches: int = 1, rank_of: Sequence[int] = ()) -> Schedule:
    """A schedule from the text of its lists."""
    actions = tuple(tuple(parse_action(word) for word in text.split()) for text in lists)
    return Schedule("test", microbatches, tuple(rank_of or range(len(lists))), actions)


def write(schedule: Schedule) -> list[str]:
    return [" ".join(map(str, actions)) for actions in schedule.actions]


def sizes(name: str, ranks: int) -> Iterator[tuple[int, int | None]]:
    """(micro-batches, chunks) to try for a family."""
    for microbatches in (1, 2, ranks - 1, ranks, ranks + 1, 2 * ranks, 3 * ranks + 1, 4 * ranks):
        if microbatches < 1:
            continue
        for chunks in (2, 3, 4) if name == "interleaved" else (None,):
            yield microbatches, chunks


def skips(stages: int) -> list[StageEdge]:
    """A chain with edges over one, two and all stages; those over two carry no gradient."""
    far = {(stage, stage + step) for step in (1, 2, 3) for stage in range(stages - step)} | ({(0, stages - 1)} if stages > 1 else set())
    return [StageEdge(producer, consumer, consumer - producer != 3) for producer, consumer in far]


# Orders as torch's


class Recorder:
    """Stands for torch's stage, and writes down what its schedule runs."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.stage_index, self.num_stages, self.is_last = rank, ranks, rank == ranks - 1
        self.ran: list[str] = []

    def forward_one_chunk(self, index: int, *_: object, **__: object) -> None:
        self.ran.append(f"{self.stage_index}F{index}")

    def backward_one_chunk(self, index: int, **_: object) -> None:
        self.ran.append(f"{self.stage_index}B{index}")

    def perform_reduce_grad(self, _: object) -> None:
        self.ran.append(f"{self.stage_index}G0")

    def _no_messages(self, _: int) -> list[object]:
        return []

    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = _no_messages


def run_torch(kind: Any, rank: int, ranks: int, microbatches: int) -> str:
    """What a schedule of torch with one stage per rank runs on a rank."""
    made = kind.__new__(kind)
    stage = Recorder(rank, ranks)
    made.__dict__.update(
        _n_microbatches=microbatches, _num_stages=ranks, _stage=stage, _loss_fn=None, _internal_losses=[], scale_grads=True
    )
    made._initialize_stage = lambda *_: None
    made._step_microbatches([()] * microbatches, [{}] * microbatches)
    return " ".join(stage.ran)


def order_of_torch(kind: Any, rank: int, ranks: int, microbatches: int, chunks: int) -> str:
    """The list of a rank in a schedule of torch with several stages per rank."""
    made = SimpleNamespace(
        n_local_stages=chunks,
        pp_group_size=ranks,
        num_stages=chunks * ranks,
        microbatches_per_round=microbatches // max(1, microbatches // ranks),
        _n_microbatches=microbatches,
    )
    return " ".join(str(action) for action in kind._calculate_single_rank_operations(made, rank) if action is not None)


def without_reduce(actions: Sequence[Action]) -> str:
    return " ".join(str(action) for action in actions if action.kind is not Kind.REDUCE)


@pytest.mark.parametrize("ranks", RANKS)
def test_gpipe_and_1f1b_run_as_in_torch(ranks: int) -> None:
    for microbatches, _ in sizes("1f1b", ranks):
        for rank in range(ranks):
            gpipe, alternating = (make_schedule(name, ranks, microbatches).actions[rank] for name in ("gpipe", "1f1b"))
            assert " ".join(map(str, gpipe)) == run_torch(theirs.ScheduleGPipe, rank, ranks, microbatches)
            assert " ".join(map(str, alternating)) == run_torch(theirs.Schedule1F1B, rank, ranks, microbatches)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("interleaved", theirs.ScheduleInterleaved1F1B),
        ("zb-v", theirs.ScheduleZBVZeroBubble),
        ("zb-h1", theirs.ScheduleInterleavedZeroBubble),
    ],
)
def test_orders_of_several_stages_are_those_of_torch(name: str, kind: Any, ranks: int) -> None:
    for microbatches, chunks in sizes(name, ranks):
        if name == "interleaved" and microbatches % max(1, microbatches // ranks):
            continue  # torch has rounds of one size only
        schedule = make_schedule(name, ranks, microbatches, chunks)
        for rank in range(ranks):
            assert without_reduce(schedule.actions[rank]) == order_of_torch(kind, rank, ranks, microbatches, schedule.chunks)


# Memory as published


def most(schedule: Schedule, rank: int) -> int:
    """The most micro-batches times stages that a rank holds, before F's or I's part of them is let go."""
    return max(sum(full + waiting for full, waiting, _ in moment) for moment in peaks_in_flight(schedule)[rank])


@pytest.mark.parametrize("ranks", RANKS)
def test_micro_batches_in_flight_are_as_published(ranks: int) -> None:
    for microbatches, _ in sizes("1f1b", ranks):
        for rank in range(ranks):
            # The first backward, and the second, where the gradients of the first are there.
            second = [((microbatches - 1, 0, 1),)] if microbatches > 1 else []
            assert peaks_in_flight(make_schedule("gpipe", ranks, microbatches))[rank] == (((microbatches, 0, 0),), *second)
            moments = peaks_in_flight(make_schedule("1f1b", ranks, microbatches))[rank]
            assert moments[0] == ((min(ranks - rank, microbatches), 0, int(ranks - rank < microbatches)),)
            # Delayed W fill every rank up to what the first one holds (arXiv 2401.10241, section 3.1).
            assert most(make_schedule("zb-h1", ranks, microbatches), rank) == min(ranks, microbatches)
            # As much as 1F1B's first rank: `ranks` micro-batches of two half stages (section 6).
            assert most(make_schedule("zb-v", ranks, microbatches), rank) <= min(2 * ranks, 2 * microbatches)
            # (p + 2) // 2 micro-batches (arXiv 2405.15362).
            assert most(make_schedule("v-half", ranks, microbatches), rank) <= 2 * ((ranks + 2) // 2)
    assert {most(make_schedule("zb-v", ranks, 4 * ranks), rank) for rank in range(ranks)} == {2 * ranks}
    assert max(most(make_schedule("v-half", ranks, 4 * ranks), rank) for rank in range(ranks)) == 2 * ((ranks + 2) // 2)


@pytest.mark.parametrize("ranks", RANKS)
def test_interleaved_holds_its_warm_up_and_one_more(ranks: int) -> None:
    for microbatches, chunks in sizes("interleaved", ranks):
        assert chunks
        in_a_round = -(-microbatches // max(1, microbatches // ranks))
        for rank in range(ranks):
            warmup = 2 * (ranks - rank - 1) + (chunks - 1) * in_a_round
            assert most(make_schedule("interleaved", ranks, microbatches, chunks), rank) == min(warmup + 1, microbatches * chunks)


def test_held_keeps_the_moments_that_none_exceeds() -> None:
    # Two whole ones, or one whole and two waiting: neither is more than the other. One whole and one waiting is less.
    schedule = read("0F0 0F1 0I0 0W0 0F2 0I1 0I2 0F3 0W1 0W2 0B3 0G0", microbatches=4)
    assert peaks_in_flight(schedule) == ((((1, 2, 1),), ((2, 0, 1),)),)
    # Stages of a rank are counted apart, and a forward of one beside the other's backward.
    schedule = read("0F0 0F1 1F0 1B0 0B0 1F1 1B1 0B1 0G0 1G0", microbatches=2, rank_of=(0, 0))
    assert peaks_in_flight(schedule) == ((((2, 0, 0), (1, 0, 0)), ((1, 0, 1), (1, 0, 1)), ((2, 0, 0), (0, 0, 1))),)


def test_without_a_backward_nothing_is_held_but_what_runs() -> None:
    assert peaks_in_flight(forward_only((0, 1, 0), 5)) == ((((0, 0, 1), (1, 0, 1)), ((1, 0, 1), (0, 0, 1))), (((1, 0, 1),),))


def test_held_is_the_largest_sum_at_any_moment() -> None:
    for name in SCHEDULES:
        schedule = make_schedule(name, 4, 8)
        for rank, moments in enumerate(peaks_in_flight(schedule)):
            stages = [stage for stage in range(schedule.stages) if schedule.rank_of[stage] == rank]
            for nbytes in ([5, 1], [1, 5], [3, 7]):
                full = {stage: nbytes[place] for place, stage in enumerate(stages)}
                waiting = {stage: 2 * (5 - place) for place, stage in enumerate(stages)}
                now = peak = 0
                for action in schedule.actions[rank]:
                    match action.kind:
                        case Kind.FORWARD:
                            now += full[action.stage]
                        case Kind.BACKWARD:
                            now -= full[action.stage]
                        case Kind.BACKWARD_INPUT:
                            now += waiting[action.stage] - full[action.stage]
                        case Kind.BACKWARD_WEIGHT:
                            now -= waiting[action.stage]
                    peak = max(peak, now)
                sums = [
                    sum(a * full[stage] + b * waiting[stage] for stage, (a, b, _) in zip(stages, moment, strict=True)) for moment in moments
                ]
                assert max(sums) == peak


# Generated schedules run


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_every_schedule_runs_over_a_chain_and_over_skips(name: str, ranks: int) -> None:
    for microbatches, chunks in sizes(name, ranks):
        schedule = make_schedule(name, ranks, microbatches, chunks)
        assert (schedule.ranks, schedule.stages, schedule.microbatches) == (ranks, ranks * schedule.chunks, microbatches)
        assert schedule.has_backward
        assert schedule.splits_backward == (name in ("zb-h1", "zb-v", "v-half"))
        for edges in (chain(schedule.stages), skips(schedule.stages)):
            for one in (schedule, forward_only(schedule, microbatches)):
                validate(add_messages(one, edges), edges)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 6, 7, 8, 11, 16])
def test_v_half_places_no_two_passes_on_one_unit(ranks: int) -> None:
    x, y = (0, 1) if ranks % 2 else (3, 4)
    for rank in range(ranks):
        units = (2 * rank, 3 * ranks - 2 - rank, 3 * ranks - 1 + 2 * rank + x, 6 * ranks - 3 - rank + y)
        assert len({unit % 6 for unit in units}) == 4
        assert units == tuple(sorted(units))


def test_forwards_alone_stream() -> None:
    schedule = forward_only(make_schedule("interleaved", 2, 4), 4)
    assert write(schedule) == ["0F0 0F1 2F0 2F1 0F2 0F3 2F2 2F3", "1F0 1F1 3F0 3F1 1F2 1F3 3F2 3F3"]
    assert not schedule.has_backward
    assert write(forward_only((0, 1, 1, 0), 3)) == ["0F0 0F1 0F2 3F0 3F1 3F2", "1F0 2F0 1F1 2F1 1F2 2F2"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("2f2b", 2, 2), "unknown schedule '2f2b'; there are gpipe, 1f1b"),
        (("1f1b", 0, 2), "at least one rank and one micro-batch, not 0 and 2"),
        (("1f1b", 2, 0), "not 2 and 0"),
        (("1f1b", 2, 4, 2), "has 1 stages per rank, not 2; 'interleaved' takes"),
        (("zb-v", 2, 4, 3), "has 2 stages per rank, not 3"),
        (("interleaved", 2, 4, 1), "2 or more stages per rank, not 1"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(arguments: tuple[Any, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_schedule(*arguments)


def test_forwards_alone_need_stages() -> None:
    for stages in ((), (0, 2)):
        with pytest.raises(InputError, match="a stage on every rank"):
            forward_only(stages, 2)


def test_actions_round_trip_and_others_are_refused() -> None:
    for text in ("2F0", "10B3", "0I11", "0W0", "2SF0>3", "3RF0<2", "3SB0>2", "2RB0<3", "2G0"):
        assert str(parse_action(text)) == text
    for text in ("", "F0", "2X0", "2F", "2F0>3", "2SF0", "2SF0<3", "2RF0>3", "-1F0", "2F0 3F0"):
        with pytest.raises(InputError, match="is no action"):
            parse_action(text)


# Messages


def test_messages_follow_what_makes_them_and_lead_what_needs_them_by_one() -> None:
    assert write(add_messages(make_schedule("1f1b", 2, 3), chain(2))) == [
        "0F0 0SF0>1 0RB0<1 0F1 0SF1>1 0B0 0RB1<1 0F2 0SF2>1 0RB2<1 0B1 0B2 0G0",
        "1RF0<0 1F0 1RF1<0 1B0 1SB0>0 1F1 1RF2<0 1B1 1SB1>0 1F2 1B2 1SB2>0 1G0",
    ]


def test_stages_of_one_rank_exchange_nothing_and_skips_travel_directly() -> None:
    edges = [StageEdge(0, 1), StageEdge(1, 2), StageEdge(2, 3), StageEdge(0, 3), StageEdge(0, 2, False)]
    assert write(add_messages(make_schedule("zb-v", 2, 1), edges)) == [
        "3RF0<2 0F0 0SF0>1 0SF0>2 3F0 3I0 3SB0>2 0RB0<1 3W0 3G0 0B0 0G0",
        "1RF0<0 2RF0<0 1F0 2RB0<3 2F0 2SF0>3 2B0 2G0 1I0 1SB0>0 1W0 1G0",
    ]


def test_passes_that_nothing_parts_are_one() -> None:
    """Rank 0's first stage sends no gradient; rank 1's second hands its own over, but ends with inputs alone. The others send."""
    lowered = add_messages(make_schedule("zb-v", 2, 8), chain(4))
    kinds = {
        stage: {action.kind for actions in lowered.actions for action in actions if action.stage == stage} & COMPUTING for stage in range(4)
    }
    split = {Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT}
    assert kinds == {0: {Kind.FORWARD, Kind.BACKWARD}, 1: split, 2: split, 3: split}
    validate(lowered, chain(4))
    # No more is peaks_in_flight, and the time is the same.
    joined = replace(lowered, actions=tuple(tuple(action for action in actions if action.kind in COMPUTING) for actions in lowered.actions))
    for found, before in zip(peaks_in_flight(joined), peaks_in_flight(make_schedule("zb-v", 2, 8)), strict=True):
        assert set(found) <= set(before)
    times = [StageTimes(1.0, 2.0 + stage, 1.5) for stage in range(4)]
    assert simulate(joined, times).seconds == simulate(make_schedule("zb-v", 2, 8), times).seconds


def test_passes_with_another_stages_between_them_stay_two() -> None:
    schedule = read("0F0 1F0 1I0 0I0 1W0 0W0 0G0 1G0", rank_of=(0, 0))
    assert add_messages(schedule, chain(2)) == schedule


def test_receives_stand_in_the_order_of_the_sends() -> None:
    # Rank 1 needs stage 2's message of micro-batch 0 first, which leaves after that of micro-batch 1 to stage 1.
    schedule = read("0F1 0F0", "1F0 2F0 1F1 2F1", microbatches=2, rank_of=(0, 1, 1))
    edges = [StageEdge(0, 1)]
    lowered = add_messages(schedule, edges)
    assert write(lowered) == ["0F1 0SF1>1 0F0 0SF0>1", "1RF1<0 1RF0<0 1F0 2F0 1F1 2F1"]
    validate(lowered, edges)


@pytest.mark.parametrize("name", SCHEDULES)
def test_few_receives_are_posted_at_once(name: str) -> None:
    # One for what runs next and one for what runs after it. In ZB-V forwards are sent long before gradients of the same two ranks
    # and needed after them, which takes one more.
    schedule = make_schedule(name, 4, 16)
    for actions in add_messages(schedule, chain(schedule.stages)).actions:
        posted = peak = 0
        for step, action in enumerate(actions):
            posted += action.kind in RECEIVES
            peak = max(peak, posted)
            ahead = (Kind.RECEIVE_FORWARD,) if action.kind is Kind.FORWARD else (Kind.RECEIVE_BACKWARD,)
            if action.kind in (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT):
                posted -= any(
                    one.kind in ahead and (one.stage, one.microbatch) == (action.stage, action.microbatch) for one in actions[:step]
                )
        assert peak <= (3 if name == "zb-v" else 2)


def test_lowering_refuses_messages_and_odd_edges() -> None:
    lowered = add_messages(make_schedule("1f1b", 2, 2), chain(2))
    with pytest.raises(InputError, match="has messages already"):
        add_messages(lowered, chain(2))
    with pytest.raises(InputError, match=r"1 -> 0 isn't from an earlier to a later of the 2 stages"):
        add_messages(make_schedule("1f1b", 2, 2), [StageEdge(1, 0)])
    with pytest.raises(InputError, match="0 -> 1 is there twice"):
        validate(lowered, [StageEdge(0, 1), StageEdge(0, 1, False)])


# Broken schedules

FINE = ("0F0 0SF0>1 0RB0<1 0B0 0G0", "1RF0<0 1F0 1B0 1SB0>0 1G0")


@pytest.mark.parametrize(
    ("lists", "said"),
    [
        ((FINE[0], "1RF0<0 1F0 1B0 1SB0>0 9G0"), "rank 1, step 4: 9G0: there is no stage 9, only 0 to 1"),
        ((FINE[0] + " 1F0", FINE[1]), "rank 0, step 5: 1F0: stage 1 is on rank 1"),
        ((FINE[0].replace("0G0", "0G1"), FINE[1]), "write 0G0"),
        ((FINE[0] + " 0F1", FINE[1]), "0F1: there is no micro-batch 1, only 0 to 0"),
        ((FINE[0] + " 0F0", FINE[1]), "rank 0, step 0: 0F0: it stands in the list twice"),
        ((FINE[0], "1RF0<0 1B0 1SB0>0 1G0"), "rank 1, at its end: 1F0 is missing"),
        ((FINE[0], "1RF0<0 1F0 1SB0>0 1G0"), "rank 1, at its end: 1B0, or 1I0 and 1W0, is missing"),
        ((FINE[0], "1RF0<0 1F0 1I0 1SB0>0 1G0"), "rank 1, at its end: 1W0 is missing"),
        ((FINE[0], "1RF0<0 1F0 1W0 1SB0>0 1G0"), "rank 1, at its end: 1I0 is missing"),
        ((FINE[0], FINE[1] + " 1W0"), "rank 1, step 2: 1B0: the backward also runs as 1W0"),
        ((FINE[0], "1RF0<0 1F0 1B0 1SB0>0"), "rank 1, at its end: 1G0 is missing"),
        ((FINE[0], "1RF0<0 1F0 1G0 1B0 1SB0>0"), "rank 1, step 2: 1G0: stage 1's gradients aren't complete before step 3"),
        (("0F0 0SF0>1 0W0", "1RF0<0 1F0"), "rank 0, at its end: 0I0 is missing"),
        (("0F0 0SF0>1 0G0", "1RF0<0 1F0"), "0G0: there is no backward"),
        ((FINE[0], "1RF0<0 1B0 1F0 1SB0>0 1G0"), "rank 1, step 1: 1B0: it needs 1F0, which runs at step 2"),
        ((FINE[0], "1RF0<0 1F0 1W0 1I0 1SB0>0 1G0"), "rank 1, step 2: 1W0: it needs 1I0, which runs at step 3"),
        (("0F0 0RB0<1 0B0 0G0", FINE[1]), "rank 0, step 0: 0F0: 0SF0>1 is missing after it"),
        (("0SF0>1 0F0 0RB0<1 0B0 0G0", FINE[1]), "rank 0, step 0: 0SF0>1: its content is made by 0F0, at step 1"),
        ((FINE[0], "1F0 1B0 1SB0>0 1G0"), "rank 1, step 0: 1F0: 1RF0<0 is missing before it"),
        (("0F0 0SF0>1 0B0 0RB0<1 0G0", FINE[1]), "rank 0, step 2: 0B0: it needs 0RB0<1, which is posted at step 3"),
        ((FINE[0], "1RF0<0 1RB0<0 1F0 1B0 1SB0>0 1G0"), "rank 1, step 1: 1RB0<0: no edge between stages asks for this message"),
    ],
)
def test_faults_are_named_with_their_step(lists: tuple[str, str], said: str) -> None:
    validate(read(*FINE), chain(2))
    with pytest.raises(ScheduleError) as caught:
        validate(read(*lists), chain(2))
    assert said in str(caught.value)
    assert "step  rank 0" in str(caught.value)
    assert f"<-- rank {said.split('rank ')[1][0] if said.startswith('rank') else '0'}" in str(caught.value)


def test_a_backward_before_that_of_the_next_stage_on_its_rank_is_named() -> None:
    for later in ("1B0", "1I0 1W0"):
        broken = read(f"0F0 1F0 0B0 {later} 0G0 1G0", rank_of=(0, 0))
        with pytest.raises(ScheduleError, match=f"rank 0, step 2: 0B0: it needs {later[:3]}, which runs at step 3"):
            validate(broken, chain(2))


def test_one_message_of_two_is_not_enough() -> None:
    # Stage 3 has what stage 0 sends, but stage 2 waits for what stage 3's rank runs after it.
    edges = [StageEdge(0, 1), StageEdge(1, 2), StageEdge(2, 3), StageEdge(0, 3)]
    lowered = add_messages(read("0F0", "3F0 1F0", "2F0", rank_of=(0, 1, 2, 1)), edges)
    with pytest.raises(ScheduleError, match="3F0 of rank 1 waits for 2SF0>3 of rank 2; 2F0 of rank 2 waits for 1SF0>2 of rank 1"):
        validate(lowered, edges)


def test_messages_out_of_order_are_named() -> None:
    lists = ("0F0 0SF0>1 0F1 0SF1>1", "1RF1<0 1RF0<0 1F0 1F1")
    with pytest.raises(ScheduleError, match="rank 1, step 0: 1RF1<0: message 0 from rank 0 to rank 1 is 0SF0>1 there, and 1RF1<0 here"):
        validate(read(*lists, microbatches=2), chain(2))


def test_a_circle_of_waits_is_named_and_drawn() -> None:
    # Each rank runs the later micro-batch's half first.
    schedule = read("0F0 3F0 0F1 3F1", "2F0 1F0 1F1 2F1", microbatches=2, rank_of=(0, 1, 1, 0))
    edges = [StageEdge(0, 1), StageEdge(0, 2), StageEdge(1, 3), StageEdge(2, 3)]
    validate(add_messages(schedule, edges), edges)
    broken = read("0F0 3F0 0F1 3F1", "1F1 1F0 2F1 2F0", microbatches=2, rank_of=(0, 1, 1, 0))
    with pytest.raises(ScheduleError) as caught:
        validate(add_messages(broken, edges), edges)
    assert str(caught.value) == (
        "schedule 'test' can't run. rank 0, step 7: 3F0: it never starts, since ranks wait for each other: "
        "3F0 of rank 0 waits for 1SF0>3 of rank 1; 1F1 of rank 1 waits for 0SF1>1 of rank 0\n"
        "\n"
        "step  rank 0  rank 1\n"
        "0     3RF1<1  1RF0<0\n"
        "1     3RF0<1  2RF0<0\n"
        "2     3RF1<2  1RF1<0\n"
        "3     3RF0<2  1F1     <-- rank 1\n"
        "4     0F0     1SF1>3\n"
        "5     0SF0>1  2RF1<0\n"
        "6     0SF0>2  1F0\n"
        "7     3F0     1SF0>3  <-- rank 0\n"
        "8     0F1     2F1\n"
        "9     0SF1>1  2SF1>3\n"
        "10    0SF1>2  2F0\n"
        "11    3F1     2SF0>3"
    )


def test_tables_of_long_schedules_show_what_is_near_the_fault() -> None:
    schedule = make_schedule("1f1b", 32, 100)
    table = draw_table(schedule, [(20, 50), (21, 90)]).splitlines()
    assert len(table) == 1 + 9 + 1 + 9
    assert table[0].split("  ")[1].strip() == "rank 15"
    assert len(table[0].split("rank")) == 13
    assert table[5].endswith("<-- rank 20")
    assert table[10].split() == ["..."] * 13
    assert table[15].endswith("<-- rank 21")
    assert len(draw_table(schedule).splitlines()) == 202


# The validator against threads that run the lists


class Refused(Exception):
    """A list can't be run to its end with the right data."""


class Threads:
    """Runs lowered lists, a thread per rank, with a queue per ordered pair of ranks and a label in each message."""

    def __init__(self, schedule: Schedule, edges: Sequence[StageEdge]) -> None:
        self.schedule, self.edges = schedule, edges
        self.lock = threading.Condition()
        self.queues: dict[tuple[int, int], list[tuple[str, int, int, int]]] = defaultdict(list)
        self.posted: dict[tuple[int, int], int] = defaultdict(int)
        self.alive, self.waiting = schedule.ranks, list[Callable[[], bool]]()
        self.refused: list[str] = []
        self.ran: dict[str, set[tuple[int, int]]] = defaultdict(set)  # per kind the (stage, micro-batch) that ran
        self.reduced: set[int] = set()

    def finish(self) -> bool:
        threads = [threading.Thread(target=self._run, args=(rank,)) for rank in range(self.schedule.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        everything = {(stage, index) for stage in range(self.schedule.stages) for index in range(self.schedule.microbatches)}
        complete = self.ran["F"] == everything
        if self.ran["grad"] or self.ran["I"] or self.reduced:
            complete = complete and self.ran["grad"] == everything and self.reduced == set(range(self.schedule.stages))
        return complete and not self.refused and all(len(queue) == self.posted[pair] for pair, queue in self.queues.items())

    def _run(self, rank: int) -> None:
        inbox: dict[tuple[str, int, int, int], tuple[tuple[int, int], int]] = {}
        with self.lock:
            try:
                for action in self.schedule.actions[rank]:
                    self._do(rank, action, inbox)
                self._need(not inbox, f"rank {rank} never uses {inbox}")
            except Refused as error:
                self.refused.append(str(error))
            self.alive -= 1
            self.lock.notify_all()

    def _need(self, fine: bool, why: str) -> None:
        if not fine:
            raise Refused(why)

    def _wait(self, ready: Callable[[], bool]) -> None:
        self.waiting.append(ready)
        while not ready():
            if self.refused or (len(self.waiting) == self.alive and not any(other() for other in self.waiting)):
                self.waiting.remove(ready)
                raise Refused("nobody can go on")
            assert self.lock.wait(timeout=20)
        self.waiting.remove(ready)

    def _take(self, inbox: dict[Any, Any], what: str, stage: int, index: int, peer: int) -> None:
        pair, place = inbox.pop((what, stage, index, peer), (None, 0))
        self._need(pair is not None, f"no receive of {what} for {stage}, {index}")
        self._wait(lambda: len(self.queues[pair]) > place)
        self._need(self.queues[pair][place] == (what, peer, index, stage), "another message came")

    def _do(self, rank: int, action: Action, inbox: dict[Any, Any]) -> None:
        stage, index, ran = action.stage, action.microbatch, self.ran
        rank_of = self.schedule.rank_of
        self._need(stage < self.schedule.stages and rank_of[stage] == rank and index < self.schedule.microbatches, f"{action} isn't here")
        here = (stage, index)
        if action.kind is Kind.FORWARD:
            self._need(here not in ran["F"], f"{action} again")
            for edge in self.edges:
                if edge.consumer == stage:
                    if rank_of[edge.producer] == rank:
                        self._need((edge.producer, index) in ran["F"], f"{action} has no input")
                    else:
                        self._take(inbox, "activation", stage, index, edge.producer)
            ran["F"].add(here)
        elif action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
            self._need(here in ran["F"] and here not in ran["back"], f"{action} without forward, or again")
            for edge in self.edges:
                if edge.producer == stage and edge.has_gradient:
                    if rank_of[edge.consumer] == rank:
                        self._need((edge.consumer, index) in ran["back"], f"{action} has no gradient")
                    else:
                        self._take(inbox, "gradient", stage, index, edge.consumer)
            ran["back"].add(here)
            ran["I" if action.kind is Kind.BACKWARD_INPUT else "grad"].add(here)
        elif action.kind is Kind.BACKWARD_WEIGHT:
            self._need(here in ran["I"] and here not in ran["grad"], f"{action} without I, or again")
            ran["grad"].add(here)
        elif action.kind is Kind.REDUCE:
            whole = all((stage, one) in ran["grad"] for one in range(self.schedule.microbatches))
            self._need(whole and index == 0 and stage not in self.reduced, f"{action} early, or again")
            self.reduced.add(stage)
        else:
            ahead = action.kind in (Kind.SEND_FORWARD, Kind.RECEIVE_FORWARD)
            sends = action.kind in SENDS
            self._need(action.peer < self.schedule.stages and rank_of[action.peer] != rank, f"{action} has no other end")
            producer, consumer = (stage, action.peer) if ahead == sends else (action.peer, stage)
            edge = next((edge for edge in self.edges if (edge.producer, edge.consumer) == (producer, consumer)), None)
            self._need(edge is not None and (ahead or edge.has_gradient), f"{action} is on no edge")
            what = "activation" if ahead else "gradient"
            if sends:
                self._need(here in ran["F" if ahead else "back"], f"{action} before it is made")
                self.queues[rank, rank_of[action.peer]].append((what, stage, index, action.peer))
                self.lock.notify_all()
            else:
                pair = (rank_of[action.peer], rank)
                self._need((what, stage, index, action.peer) not in inbox, f"{action} again")
                inbox[what, stage, index, action.peer] = (pair, self.posted[pair])
                self.posted[pair] += 1


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Schedule, list[StageEdge]]:
    """A lowered schedule over a random stage graph, and up to three things done to its lists."""
    name = draw(st.sampled_from([*SCHEDULES, "forward"]))
    ranks = draw(st.integers(1, 3))
    microbatches = ranks * draw(st.integers(1, 2)) if name == "interleaved" else draw(st.integers(1, 4))
    if name == "forward":
        schedule = forward_only(draw(st.sampled_from([(0, 1, 2), (0, 1, 0, 1), (0, 1, 1, 0)])), microbatches)
    else:
        schedule = make_schedule(name, ranks, microbatches)
    edges = [
        StageEdge(producer, consumer, draw(st.booleans()))
        for consumer in range(schedule.stages)
        for producer in range(consumer)
        if consumer == producer + 1 or draw(st.integers(0, 3)) == 0
    ]
    lists = [list(actions) for actions in add_messages(schedule, edges).actions]
    for _ in range(draw(st.integers(0, 3))):
        actions = draw(st.sampled_from([one for one in lists if one] or [[Action(0, Kind.FORWARD, 0)]]))
        step = draw(st.integers(0, len(actions) - 1))
        other = draw(st.integers(0, len(actions) - 1))
        match draw(st.sampled_from(["swap", "swap next", "move", "drop", "duplicate", "another micro-batch", "another kind"])):
            case "swap":
                actions[step], actions[other] = actions[other], actions[step]
            case "swap next":
                other = min(step + 1, len(actions) - 1)
                actions[step], actions[other] = actions[other], actions[step]
            case "move":
                actions.insert(other, actions.pop(step))
            case "drop":
                actions.pop(step)
            case "duplicate":
                actions.insert(other, actions[step])
            case "another micro-batch":
                actions[step] = replace(actions[step], microbatch=draw(st.integers(0, microbatches)))
            case "another kind" if actions[step].kind in COMPUTING:
                actions[step] = replace(actions[step], kind=draw(st.sampled_from(sorted(COMPUTING))))
    return replace(schedule, actions=tuple(map(tuple, lists))), edges


@settings(max_examples=400, deadline=None)
@given(schedules())
def test_the_validator_accepts_what_threads_finish(case: tuple[Schedule, list[StageEdge]]) -> None:
    schedule, edges = case
    finished = Threads(schedule, edges).finish()
    if finished:
        validate(schedule, edges)
    else:
        with pytest.raises(ScheduleError, match=r"(?s)step  rank 0.*<-- rank"):
            validate(schedule, edges)


def test_counterpart_is_its_own_inverse() -> None:
    for text in ("2SF0>3", "3SB1>0"):
        send = parse_action(text)
        assert counterpart(send).kind in RECEIVES
        assert counterpart(counterpart(send)) == send
