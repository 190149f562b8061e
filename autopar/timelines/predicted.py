"""The step that a plan predicts, event by event: the schedule as the search simulated it, with the plan's own seconds.

Comes in: a `Plan`. Goes out: a `Trace`. Every number is the plan's own: per phase and purpose the events add up to `Plan.costs`, the last
one ends with the step, and the most memory of any rank is `Plan.memory`'s total.

In a plan with a schedule, each pass of a stage for a micro-batch is a few events: what it computes, what it runs again, and the
communication that it waits for, by axis and collective. The order of these within the pass isn't known to the plan: computing is shown
first. Without a schedule (one stage, the whole batch at once) the same is shown block by block. What is done once per step, sums of
gradients and the optimizer, begins on all ranks when the schedule has ended, as the search counts it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from autopar.errors import InputError, PlanError
from autopar.plans import LOCAL_COPY, CostRow, Phase, Plan, Purpose, RowSums, Timing
from autopar.schedules import Action, Kind, Schedule, StageTimes, Timeline, forwards_first, make_schedule, simulate
from autopar.timelines.memory import Ran, sample_memory
from autopar.timelines.trace import COMMUNICATION, COMPUTE, COPIES, OVERLAPPED, Arrow, Event, Sample, Trace, show_message

# How far the simulated step may be from the plan's, as a share: sums in another order.
_ROUNDING = 1e-6

MOST_EVENTS = 200_000
"""Events of a predicted step at most: more than a viewer shows well, and than a trace of some 50 MB has."""

_PHASES_OF = {
    Kind.FORWARD: (Phase.FORWARD,),
    Kind.BACKWARD: (Phase.BACKWARD_INPUT, Phase.BACKWARD_WEIGHT),
    Kind.BACKWARD_INPUT: (Phase.BACKWARD_INPUT,),
    Kind.BACKWARD_WEIGHT: (Phase.BACKWARD_WEIGHT,),
}
# In which order what is done once per step is shown: gradients are summed before the optimizer reads them.
_STEP_ORDER = (Purpose.GRADIENTS, Purpose.OPTIMIZER, Purpose.PARAMETERS)


def predict(plan: Plan) -> Trace:
    """The step of a plan.

    Raises PlanError for a plan that says nothing of single blocks, or whose blocks' seconds don't make the plan's step; InputError for a
    step of more than `MOST_EVENTS` events.
    """
    timing = plan.pipeline.timing
    if timing is None:
        raise PlanError(
            "the plan has no plan.pipeline.timing, so it doesn't say how long single blocks take; make it again with `autopar plan`"
        )
    layouts = _Layouts(plan, timing)
    if (count := layouts.count_events()) > MOST_EVENTS:
        pipeline = plan.pipeline
        raise InputError(
            f"a step of {pipeline.microbatches} micro-batches on {pipeline.stages} stages has about {count:,} events, and a timeline up to"
            f" {MOST_EVENTS:,}; plan with fewer micro-batches (--pin microbatches=N) to see one"
        )
    schedule = _make_schedule(plan, timing)
    timeline = _simulate(plan, timing, schedule)
    events: list[Event] = []
    samples: list[Sample] = []
    for rank, spans in enumerate(timeline.spans):
        stages = [stage for stage, owner in enumerate(schedule.rank_of) if owner == rank]
        ran: list[Ran] = []
        for span in spans:
            found, starts = layouts.of_pass(rank, span.action, span.start)
            events += found
            ran.append(Ran(span.action, starts, span.end))
        events += layouts.of_step(rank, stages, timeline.seconds)
        samples += sample_memory(plan, timing, rank, stages, ran, timeline.seconds)
    events = _disentangle(events, plan.seconds.step)
    arrows = _find_arrows(timing, schedule, timeline)
    events += (show_message(arrow, arrow.arrived - arrow.sent) for arrow in arrows)
    return Trace(f"{plan.model} on {plan.cluster}, predicted", _name_ranks(plan), plan.seconds.step, tuple(events), arrows, tuple(samples))


def _make_schedule(plan: Plan, timing: Timing) -> Schedule:
    pipeline = plan.pipeline
    schedule = make_schedule(pipeline.schedule, pipeline.ranks, pipeline.microbatches, pipeline.chunks)
    return forwards_first(schedule) if timing.forwards_first else schedule


def _simulate(plan: Plan, timing: Timing, schedule: Schedule) -> Timeline:
    """The schedule with the stages' seconds. Raises PlanError when that isn't the plan's step."""
    seconds = _sum_phases(plan, timing)
    times = [StageTimes(phases[Phase.FORWARD], phases[Phase.BACKWARD_INPUT], phases[Phase.BACKWARD_WEIGHT]) for phases in seconds]
    rank_of = schedule.rank_of
    transfers = {
        (stage, stage + 1): (message.forward, message.backward)
        for stage, message in enumerate(timing.messages)
        if rank_of[stage] != rank_of[stage + 1]
    }
    timeline = simulate(schedule, times, transfers)
    per_step = [0.0] * schedule.ranks
    for stage, phases in enumerate(seconds):
        per_step[rank_of[stage]] += phases[Phase.STEP]
    step = timeline.seconds + max(per_step)
    if abs(step - plan.seconds.step) > _ROUNDING * plan.seconds.step:
        raise PlanError(
            f"the seconds in plan.pipeline.timing make a step of {step} s, but plan.costs add up to {plan.seconds.step} s; plan again"
        )
    return timeline


def _sum_phases(plan: Plan, timing: Timing) -> list[dict[str, float]]:
    """Per stage the seconds of each phase, of one micro-batch."""
    seconds: list[dict[str, float]] = [dict.fromkeys(Phase, 0.0) for _ in range(plan.pipeline.stages)]
    for number, block in enumerate(plan.pipeline.blocks):
        for row in timing.rows(number):
            seconds[block.stage][row.phase] += row.seconds
    return seconds


def _name_ranks(plan: Plan) -> tuple[str, ...]:
    width, ranks = plan.mesh.world_size, plan.pipeline.ranks
    if ranks == 1:
        return ("the rank" if width == 1 else f"each of {width} ranks",)
    if width == 1:
        return tuple(f"pipeline rank {rank}" for rank in range(ranks))
    return tuple(f"pipeline rank {rank}, each of ranks {rank * width} to {(rank + 1) * width - 1}" for rank in range(ranks))


@dataclass
class _Part:
    """What is laid out one after the other: a block, or all blocks of a stage together."""

    layer: str
    rows: list[CostRow] = field(default_factory=list)


class _Layouts:
    """Lays out the rows of stages over the time of a pass."""

    def __init__(self, plan: Plan, timing: Timing) -> None:
        self.is_whole = plan.pipeline.stages == plan.pipeline.microbatches == 1
        self.microbatches = plan.pipeline.microbatches
        self.parts: list[list[_Part]] = [[] if self.is_whole else [_Part("")] for _ in range(plan.pipeline.stages)]
        for number, block in enumerate(plan.pipeline.blocks):
            parts = self.parts[block.stage]
            if self.is_whole:
                parts.append(_Part(block.name))
            parts[-1].rows += timing.rows(number)

    def count_events(self) -> int:
        """Events of all passes and messages of a step, before any is made: what is done once per step is few beside them."""
        merged = [row for parts in self.parts for part in parts for _, row in _merge(row for row in part.rows if row.phase != Phase.STEP)]
        of_passes = sum(bool(row.seconds) + bool(row.hidden) for row in merged)
        return self.microbatches * (of_passes + 2 * (len(self.parts) - 1))

    def of_pass(self, rank: int, action: Action, start: float) -> tuple[list[Event], tuple[float, ...]]:
        """The events of an action, and when each of its parts starts."""
        parts = self.parts[action.stage]
        if action.kind is not Kind.FORWARD:
            parts = parts[::-1]
        name = "" if self.is_whole else f"{'B' if action.kind is Kind.BACKWARD else action.kind.value}{action.microbatch}"
        microbatch = None if self.is_whole else action.microbatch
        return _lay_out(parts, _PHASES_OF[action.kind], rank, (action.stage, microbatch), name, start)

    def of_step(self, rank: int, stages: Sequence[int], start: float) -> list[Event]:
        """The events of what a rank does once per step."""
        rows = [row for stage in stages for part in self.parts[stage] for row in part.rows if row.phase == Phase.STEP]
        rows.sort(key=lambda row: _STEP_ORDER.index(row.purpose) if row.purpose in _STEP_ORDER else len(_STEP_ORDER))
        parts = [_Part("", [row for row in rows if row.purpose == purpose]) for purpose in dict.fromkeys(row.purpose for row in rows)]
        stage = stages[0] if len(stages) == 1 else None
        return _lay_out(parts, (Phase.STEP,), rank, (stage, None), "", start)[0]


def _lay_out(
    parts: Iterable[_Part], phases: Sequence[str], rank: int, done_for: tuple[int | None, int | None], name: str, start: float
) -> tuple[list[Event], tuple[float, ...]]:
    """The events of parts, one after the other from `start`, and when each part starts.

    Hidden communication begins with its part here. Of collectives that are hidden in part, the bytes are shared out by seconds.
    """
    stage, microbatch = done_for
    events: list[Event] = []
    starts: list[float] = []
    now = start
    for part in parts:
        starts.append(now)
        begun = now
        for thread, row in _merge(row for row in part.rows if row.phase in phases):
            share = row.seconds / (row.seconds + row.hidden) if row.hidden else 1.0
            event = Event(
                rank,
                thread,
                f"{row.collective} {row.axis}" if row.axis else name or part.layer or row.purpose,
                row.phase,
                row.purpose,
                now,
                row.seconds,
                stage,
                microbatch,
                part.layer,
                row.axis,
                row.collective,
                share * row.nbytes,
            )
            if row.seconds:
                events.append(event)
                now += row.seconds
            if row.hidden:
                events.append(replace(event, thread=OVERLAPPED, start=begun, seconds=row.hidden, nbytes=row.nbytes - event.nbytes))
    return events, tuple(starts)


def _disentangle(events: Iterable[Event], seconds: float) -> list[Event]:
    """The events of a step of so many seconds, with those of hidden communication moved to earlier where they overlap on a rank.

    When they run isn't known to the plan, only that they are behind computing.
    """
    hidden = [event for event in events if event.thread == OVERLAPPED]
    moved = [event for event in events if event.thread != OVERLAPPED]
    for rank in dict.fromkeys(event.rank for event in hidden):
        own = sorted((event for event in hidden if event.rank == rank), key=lambda event: event.start)
        limit = seconds
        for event in reversed(own):
            limit = min(event.start, limit - event.seconds)
            moved.append(replace(event, start=max(0.0, limit)))
    return moved


def _merge(rows: Iterable[CostRow]) -> list[tuple[str, CostRow]]:
    """(thread, sum of the rows of one kind), in the order in which they are shown: what is run again, computing, communication."""
    sums: dict[str, RowSums] = {}
    for row in rows:
        if row.is_communication:
            sums.setdefault(COPIES if row.collective == LOCAL_COPY else COMMUNICATION, RowSums()).add_row(row, layer="")
        else:
            sums.setdefault(COMPUTE, RowSums()).add(row.phase, row.purpose, row.seconds)
    merged = [(thread, row) for thread, of_thread in sums.items() for row in of_thread.rows()]
    merged.sort(key=lambda pair: (pair[0] != COMPUTE, pair[1].purpose != Purpose.RECOMPUTE))
    return merged


def _find_arrows(timing: Timing, schedule: Schedule, timeline: Timeline) -> tuple[Arrow, ...]:
    """The messages of the step, and the actions that wait for them."""
    starts = {span.action: span.start for spans in timeline.spans for span in spans}
    arrows = []
    for transfer in timeline.transfers:
        send = transfer.send
        is_forward = send.kind is Kind.SEND_FORWARD
        message = timing.messages[min(send.stage, send.peer)]
        readers = (Kind.FORWARD,) if is_forward else (Kind.BACKWARD, Kind.BACKWARD_INPUT)
        used = next(starts[action] for kind in readers if (action := Action(send.peer, kind, send.microbatch)) in starts)
        nbytes = message.forward_nbytes if is_forward else message.backward_nbytes
        source, target = schedule.rank_of[send.stage], schedule.rank_of[send.peer]
        arrows.append(Arrow(str(send), source, target, transfer.start, transfer.end, used, nbytes))
    return tuple(arrows)
