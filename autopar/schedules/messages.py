"""Messages between stages added to schedules, the proof that the lists run to their end, and the micro-batches that ranks hold.

Comes in: a schedule of computing actions, from `families` or from the user, and the edges of the stage graph. Goes out: the same lists with
sends and receives (`add_messages`), which the executor runs; errors that name the action at fault (`validate`); and the micro-batches in
flight on each rank at its peaks (`peaks_in_flight`), from which a search gets the memory.

The rules under which lists run: a send never blocks; a receive posts a buffer and doesn't block either; a computing action waits until the
messages that it needs have arrived; per ordered pair of ranks the k-th send meets the k-th receive. Stages of one rank exchange no
messages, so their actions must stand in an order in which they can run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import zip_longest

from autopar.errors import InputError, ScheduleError
from autopar.schedules.actions import (
    COMPUTING,
    PASSES,
    RECEIVES,
    SENDS,
    Action,
    Kind,
    Schedule,
    StageEdge,
    counterpart,
    draw_table,
)


def add_messages(schedule: Schedule, edges: Sequence[StageEdge]) -> Schedule:
    """The schedule with the messages that its edges need.

    >>> from autopar.schedules import make_schedule
    >>> print(*add_messages(make_schedule("1f1b", 2, 2), [StageEdge(0, 1)]).actions[1])
    1RF0<0 1F0 1RF1<0 1B0 1SB0>0 1F1 1B1 1SB1>0 1G0

    A send follows the action that makes its content: F, or for a gradient B or I. A receive stands one computing action before the one
    that needs it: so the transfer runs while that one computes, and no buffer is posted earlier than that. Receives from a rank are in the
    order of its sends; where they are needed in another order, the receives of what was sent before are posted too. Stages of one rank
    exchange no messages.

    I and W of a stage are joined into one B where splitting them gains nothing: each W follows right after its I, and no other rank waits
    for what I makes.

    Args:
        schedule: computing actions and reductions only.
        edges: which stages read what other stages compute.

    Raises InputError when the schedule has messages already, or an edge isn't from an earlier to a later stage.
    """
    if any(action.kind not in COMPUTING and action.kind is not Kind.REDUCE for actions in schedule.actions for action in actions):
        raise InputError(f"schedule {schedule.name!r} has messages already; add_messages takes computing actions and reductions only")
    links = _StageLinks(schedule, edges)
    schedule = _join_passes(schedule, links)
    sent: dict[tuple[int, int], list[Action]] = defaultdict(list)  # per ordered pair of ranks: its sends in order
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            for send in links.sends_after(action):
                sent[rank, schedule.rank_of[send.peer]].append(send)
    lists_with_messages = []
    for rank, actions in enumerate(schedule.actions):
        place = {
            counterpart(send): (source, index)
            for (source, target), sends in sent.items()
            if target == rank
            for index, send in enumerate(sends)
        }
        posted: dict[int, int] = defaultdict(int)
        before: dict[int, list[Action]] = defaultdict(list)  # per position in `actions`: the receives that stand before it
        earlier = 0
        for position, action in enumerate(actions):
            if action.kind not in COMPUTING:
                continue
            for receive in links.needs(action):
                if receive not in place:
                    continue  # nobody sends it, as `validate` tells
                source, index = place[receive]
                before[earlier] += [counterpart(send) for send in sent[source, rank][posted[source] : index + 1]]
                posted[source] = max(posted[source], index + 1)
            earlier = position
        with_messages: list[Action] = []
        for position, action in enumerate(actions):
            with_messages += [*before[position], action, *links.sends_after(action)]
        lists_with_messages.append(tuple(with_messages))
    return replace(schedule, actions=tuple(lists_with_messages))


def _join_passes(schedule: Schedule, links: _StageLinks) -> Schedule:
    """The schedule with I and W joined into B on the stages where nothing comes between them and no other rank waits for I."""
    apart = {stage for stage in range(schedule.stages) if links.returning[stage]}
    for actions in schedule.actions:
        for action, following in zip_longest(actions, actions[1:]):
            if action.kind is Kind.BACKWARD_INPUT and following != replace(action, kind=Kind.BACKWARD_WEIGHT):
                apart.add(action.stage)
    return replace(
        schedule,
        actions=tuple(
            tuple(
                replace(action, kind=Kind.BACKWARD) if action.kind is Kind.BACKWARD_INPUT and action.stage not in apart else action
                for action in actions
                if action.kind is not Kind.BACKWARD_WEIGHT or action.stage in apart
            )
            for actions in schedule.actions
        ),
    )


InFlight = tuple[tuple[int, int, int], ...]
"""Micro-batches in flight on a rank at one moment. Per stage of the rank, in order, three numbers: those between F and B or I, whose
activations are saved; those between I and W, of which only what the weight gradients need is saved; and 1 if a backward has run before, so
that the gradients of all parameters are there, 0 if the one that runs now or next is the first."""


# A search looks at one schedule many times.
@lru_cache(maxsize=32)
def peaks_in_flight(schedule: Schedule) -> tuple[tuple[InFlight, ...], ...]:
    """Per pipeline rank the moments with the most micro-batches in flight: those that no other moment exceeds in every number.

    A rank's peak memory is the largest, over its moments, of the sum of numbers times bytes of a micro-batch on each stage. Which of the
    moments it is depends on those bytes. A micro-batch still counts while the action runs that ends it, which is its forward where there
    is no backward.

    >>> from autopar.schedules import make_schedule
    >>> peaks_in_flight(make_schedule("1f1b", 3, 8))
    ((((3, 0, 1),),), (((2, 0, 1),),), (((1, 0, 1),),))
    """
    trains = schedule.has_backward
    peaks = []
    for rank, actions in enumerate(schedule.actions):
        counts = {stage: (0, 0, int(not trains)) for stage, owner in enumerate(schedule.rank_of) if owner == rank}
        moments: set[InFlight] = set()
        for action in actions:
            if action.kind not in COMPUTING:
                continue
            full, waiting, has_gradients = counts[action.stage]
            if action.kind is Kind.FORWARD:
                counts[action.stage] = (full + 1, waiting, has_gradients)
                if not trains:
                    moments.add(tuple(counts.values()))
                    counts[action.stage] = (0, 0, 1)
                continue
            # A backward follows each forward, so only a moment before something is let go can be a peak.
            moments.add(tuple(counts.values()))
            if action.kind is Kind.BACKWARD_WEIGHT:
                counts[action.stage] = (full, waiting - 1, 1)
            else:
                counts[action.stage] = (full - 1, waiting + (action.kind is Kind.BACKWARD_INPUT), 1)
        rank_peaks: list[InFlight] = []
        # From the largest sum down, so that whoever exceeds a moment stands before it.
        for moment in sorted(
            moments, key=lambda moment: (-sum(full + waiting for full, waiting, _ in moment), -sum(g for *_, g in moment), moment)
        ):
            if not any(_exceeds(peak, moment) for peak in rank_peaks):
                rank_peaks.append(moment)
        peaks.append(tuple(rank_peaks))
    return tuple(peaks)


def _exceeds(peak: InFlight, moment: InFlight) -> bool:
    """Whether `peak` has at least as much of everything as `moment`."""
    return all(a >= b for numbers, others in zip(peak, moment, strict=True) for a, b in zip(numbers, others, strict=True))


def validate(schedule: Schedule, edges: Sequence[StageEdge]) -> None:
    """Prove that a schedule with messages runs to its end.

    Every stage runs every pass for every micro-batch once, after what it needs; messages match at both ends; no ranks wait for each other
    in a circle.

    Raises ScheduleError with a table of the ranks' actions around the step at fault, and InputError when an edge isn't from an earlier to a
    later stage.
    """
    links = _StageLinks(schedule, edges)
    _check_places(schedule)
    steps = {action: step for actions in schedule.actions for step, action in enumerate(actions)}
    _check_computing(schedule, links, steps)
    _check_messages(schedule, links, steps)
    _check_progress(schedule, links)


def _check_places(schedule: Schedule) -> None:
    """Every action is of a stage of its rank and of one of the micro-batches, and stands in the lists once."""
    seen: dict[Action, int] = {}
    for rank, actions in enumerate(schedule.actions):
        for step, action in enumerate(actions):
            here = [(rank, step)]
            if not 0 <= action.stage < schedule.stages:
                raise _fault(schedule, here, f"there is no stage {action.stage}, only 0 to {schedule.stages - 1}")
            if schedule.rank_of[action.stage] != rank:
                raise _fault(schedule, here, f"stage {action.stage} is on rank {schedule.rank_of[action.stage]}")
            if action.kind is Kind.REDUCE and action.microbatch:
                raise _fault(schedule, here, f"a stage's gradients are reduced once; write {action.stage}G0")
            if not 0 <= action.microbatch < schedule.microbatches:
                raise _fault(schedule, here, f"there is no micro-batch {action.microbatch}, only 0 to {schedule.microbatches - 1}")
            if action in seen:
                raise _fault(schedule, [(rank, seen[action]), *here], "it stands in the list twice")
            seen[action] = step


def _check_computing(schedule: Schedule, links: _StageLinks, steps: Mapping[Action, int]) -> None:
    """Every part of every micro-batch is computed, after what it needs of its own rank; gradients are reduced after the last backward."""
    trains = schedule.has_backward
    for stage, rank in enumerate(schedule.rank_of):
        end = [(rank, len(schedule.actions[rank]))]
        last = 0
        for index in range(schedule.microbatches):
            forward, backward, inputs, weight = (Action(stage, kind, index) for kind in PASSES)
            if forward not in steps:
                raise _fault(schedule, end, f"{forward} is missing")
            is_whole, split = backward in steps, (inputs in steps, weight in steps)
            if is_whole and any(split):
                raise _fault(schedule, [(rank, steps[backward])], f"the backward also runs as {inputs if split[0] else weight}")
            if trains and not is_whole and not all(split):
                missing = f"{inputs}" if split[1] else f"{weight}" if split[0] else f"{backward}, or {inputs} and {weight},"
                raise _fault(schedule, end, f"{missing} is missing")
            last = max(last, steps.get(backward, 0), steps.get(weight, 0))
        reduce = Action(stage, Kind.REDUCE, 0)
        if trains and reduce not in steps:
            raise _fault(schedule, end, f"{reduce} is missing: stage {stage}'s gradients are never reduced")
        if not trains and reduce in steps:
            raise _fault(schedule, [(rank, steps[reduce])], "there is no backward, so no gradient to reduce")
        if trains and steps[reduce] < last:
            raise _fault(schedule, [(rank, steps[reduce]), (rank, last)], f"stage {stage}'s gradients aren't complete before step {last}")
    for rank, actions in enumerate(schedule.actions):
        for step, action in enumerate(actions):
            for alternatives in links.needs_here(action):
                # What is needed may run as B or as I.
                ran = next((steps[alternative] for alternative in alternatives if alternative in steps), -1)
                if ran > step:
                    raise _fault(schedule, [(rank, step), (rank, ran)], f"it needs {schedule.actions[rank][ran]}, which runs at step {ran}")


def _check_messages(schedule: Schedule, links: _StageLinks, steps: Mapping[Action, int]) -> None:
    """Every edge's messages are there and no others: sent once made, awaited before they are needed, in one order at both ends."""
    required: set[Action] = set()
    sends: dict[tuple[int, int], list[Action]] = defaultdict(list)
    receives: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for rank, actions in enumerate(schedule.actions):
        for step, action in enumerate(actions):
            for send in links.sends_after(action):
                required.add(send)
                if send not in steps:
                    raise _fault(schedule, [(rank, step)], f"{send} is missing after it")
                if steps[send] < step:
                    raise _fault(schedule, [(rank, steps[send]), (rank, step)], f"its content is made by {action}, at step {step}")
            for receive in links.needs(action):
                required.add(receive)
                if receive not in steps:
                    raise _fault(schedule, [(rank, step)], f"{receive} is missing before it")
                if steps[receive] > step:
                    raise _fault(
                        schedule, [(rank, step), (rank, steps[receive])], f"it needs {receive}, which is posted at step {steps[receive]}"
                    )
    for rank, actions in enumerate(schedule.actions):
        for step, action in enumerate(actions):
            if action.kind in SENDS or action.kind in RECEIVES:
                if action not in required:
                    raise _fault(schedule, [(rank, step)], "no edge between stages asks for this message")
                peer = schedule.rank_of[action.peer]
                (sends[rank, peer] if action.kind in SENDS else receives[peer, rank]).append(action)
    for (source, target), sent in sends.items():
        for place, (send, receive) in enumerate(zip(sent, receives[source, target], strict=True)):
            if receive != counterpart(send):
                why = f"message {place} from rank {source} to rank {target} is {send} there, and {receive} here"
                raise _fault(schedule, [(target, steps[receive]), (source, steps[send])], why)


def _check_progress(schedule: Schedule, links: _StageLinks) -> None:
    """No ranks wait for each other in a circle: all lists run to their ends."""
    at = [0] * schedule.ranks
    sent: set[Action] = set()
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule.actions):
            while at[rank] < len(actions) and all(counterpart(receive) in sent for receive in links.needs(actions[at[rank]])):
                if actions[at[rank]].kind in SENDS:
                    sent.add(actions[at[rank]])
                at[rank] += 1
                moved = True
    stuck = [(rank, step) for rank, step in enumerate(at) if step < len(schedule.actions[rank])]
    if stuck:
        waits = []
        for rank, step in stuck:
            action = schedule.actions[rank][step]
            send = next(counterpart(receive) for receive in links.needs(action) if counterpart(receive) not in sent)
            waits.append(f"{action} of rank {rank} waits for {send} of rank {schedule.rank_of[send.stage]}")
        raise _fault(schedule, stuck, f"it never starts, since ranks wait for each other: {'; '.join(waits)}")


def _fault(schedule: Schedule, marks: Sequence[tuple[int, int]], why: str) -> ScheduleError:
    """The error about the action at the first of `marks` (rank, step); the table shows them all."""
    rank, step = marks[0]
    actions = schedule.actions[rank]
    what = f"{actions[step]}: " if step < len(actions) else ""
    where = f"rank {rank}, step {step}" if what else f"rank {rank}, at its end"
    return ScheduleError(f"schedule {schedule.name!r} can't run. {where}: {what}{why}\n\n{draw_table(schedule, marks)}")


class _StageLinks:
    """The edges of a stage graph, by stage: which messages an action waits for, and which follow it."""

    def __init__(self, schedule: Schedule, edges: Sequence[StageEdge]) -> None:
        self.readers: dict[int, list[int]] = defaultdict(list)  # per stage: the stages of other ranks that read what it makes
        self.makers: dict[int, list[int]] = defaultdict(list)
        self.returning: dict[int, list[int]] = defaultdict(list)  # per stage: the stages of other ranks that it sends gradients to
        self.awaited: dict[int, list[int]] = defaultdict(list)
        self.makers_here: dict[int, list[int]] = defaultdict(list)  # the same between stages of one rank
        self.awaited_here: dict[int, list[int]] = defaultdict(list)
        seen: set[tuple[int, int]] = set()
        for edge in sorted(edges, key=lambda edge: (edge.producer, edge.consumer)):
            ends = (edge.producer, edge.consumer)
            if not 0 <= edge.producer < edge.consumer < schedule.stages:
                raise InputError(f"edge {ends[0]} -> {ends[1]} isn't from an earlier to a later of the {schedule.stages} stages")
            if ends in seen:
                raise InputError(f"edge {ends[0]} -> {ends[1]} is there twice; all that crosses it travels in one message")
            seen.add(ends)
            on_one_rank = schedule.rank_of[edge.producer] == schedule.rank_of[edge.consumer]
            (self.makers_here if on_one_rank else self.makers)[edge.consumer].append(edge.producer)
            if not on_one_rank:
                self.readers[edge.producer].append(edge.consumer)
            if edge.has_gradient:
                (self.awaited_here if on_one_rank else self.awaited)[edge.producer].append(edge.consumer)
                if not on_one_rank:
                    self.returning[edge.consumer].append(edge.producer)

    def sends_after(self, action: Action) -> Iterator[Action]:
        """The sends that stand right after a computing action."""
        if action.kind is Kind.FORWARD:
            for peer in self.readers[action.stage]:
                yield Action(action.stage, Kind.SEND_FORWARD, action.microbatch, peer)
        elif action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
            for peer in self.returning[action.stage]:
                yield Action(action.stage, Kind.SEND_BACKWARD, action.microbatch, peer)

    def needs(self, action: Action) -> Iterator[Action]:
        """The receives that a computing action waits for."""
        if action.kind is Kind.FORWARD:
            for peer in self.makers[action.stage]:
                yield Action(action.stage, Kind.RECEIVE_FORWARD, action.microbatch, peer)
        elif action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
            for peer in self.awaited[action.stage]:
                yield Action(action.stage, Kind.RECEIVE_BACKWARD, action.microbatch, peer)

    def needs_here(self, action: Action) -> Iterator[tuple[Action, ...]]:
        """What must have run before on the same rank: alternatives, such as B or I, of which the rank's list has one."""
        index = action.microbatch
        if action.kind is Kind.FORWARD:
            for stage in self.makers_here[action.stage]:
                yield (Action(stage, Kind.FORWARD, index),)
        elif action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
            yield (Action(action.stage, Kind.FORWARD, index),)
            for stage in self.awaited_here[action.stage]:
                yield Action(stage, Kind.BACKWARD, index), Action(stage, Kind.BACKWARD_INPUT, index)
        elif action.kind is Kind.BACKWARD_WEIGHT:
            yield (Action(action.stage, Kind.BACKWARD_INPUT, index),)
