"""Pipeline schedules: lists of actions per pipeline rank, by name, with their messages, and proven to run to the end.

A schedule of computing actions comes from `make_schedule` or `forward_only`, or from the user. With the edges of the stage graph, `lower`
adds the messages, `validate` proves the lists, and `held` counts the micro-batches that each rank holds at once.

The rules under which lists run: a send never blocks; a receive posts a buffer and doesn't block either; a computing action waits until the
messages it needs have arrived; per ordered pair of ranks the k-th send meets the k-th receive. Stages of one rank exchange no messages: the
order of the list must do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from autopar.actions import COMPUTING, Action, Kind, Schedule, StageEdge, chain, meet, parse_action
from autopar.errors import InputError
from autopar.generators import SCHEDULES, forward_only, make_schedule

__all__ = [
    "COMPUTING",
    "SCHEDULES",
    "Action",
    "Kind",
    "Schedule",
    "StageEdge",
    "chain",
    "forward_only",
    "lower",
    "make_schedule",
    "meet",
    "parse_action",
]


def lower(schedule: Schedule, edges: Sequence[StageEdge]) -> Schedule:
    """The schedule with its messages.

    A send stands right after the action that makes its content: F, or B or I for a gradient. A receive stands one computing action before
    the one that needs it, so that the transfer runs beside that one, and no earlier, which bounds the buffers. Receives from a rank stand
    in the order of its sends; where the needs come in another order, those sent before are posted too. Stages of one rank exchange no
    messages.

    Raises InputError when the schedule has messages already, or an edge names a stage that isn't there.
    """
    if any(action.kind not in COMPUTING and action.kind is not Kind.REDUCE for actions in schedule.actions for action in actions):
        raise InputError(f"schedule {schedule.name!r} has messages already; lower takes computing actions and reductions only")
    routes = _Routes(schedule, edges)
    sent: dict[tuple[int, int], list[Action]] = defaultdict(list)  # per ordered pair of ranks: its sends in order
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            for send in routes.sends_after(action):
                sent[rank, schedule.rank_of[send.peer]].append(send)
    lowered = []
    for rank, actions in enumerate(schedule.actions):
        place = {
            meet(send): (source, index) for (source, target), sends in sent.items() if target == rank for index, send in enumerate(sends)
        }
        posted: dict[int, int] = defaultdict(int)
        before: dict[int, list[Action]] = defaultdict(list)  # per position in `actions`: the receives that stand before it
        earlier = 0
        for position, action in enumerate(actions):
            if action.kind not in COMPUTING:
                continue
            for receive in routes.needs(action):
                if receive not in place:
                    continue  # nobody sends it, as `validate` tells
                source, index = place[receive]
                before[earlier] += [meet(send) for send in sent[source, rank][posted[source] : index + 1]]
                posted[source] = max(posted[source], index + 1)
            earlier = position
        lists: list[Action] = []
        for position, action in enumerate(actions):
            lists += [*before[position], action, *routes.sends_after(action)]
        lowered.append(tuple(lists))
    return replace(schedule, actions=tuple(lowered))


class _Routes:
    """Which messages follow an action, and which it needs, by the edges of a stage graph."""

    def __init__(self, schedule: Schedule, edges: Sequence[StageEdge]) -> None:
        self.readers: dict[int, list[int]] = defaultdict(list)  # per stage: the stages of other ranks that read what it makes
        self.makers: dict[int, list[int]] = defaultdict(list)
        self.returning: dict[int, list[int]] = defaultdict(list)  # per stage: the stages of other ranks that it sends gradients to
        self.awaited: dict[int, list[int]] = defaultdict(list)
        for edge in sorted(edges, key=lambda edge: (edge.producer, edge.consumer)):
            if not 0 <= edge.producer < edge.consumer < schedule.stages:
                raise InputError(f"edge {edge.producer} -> {edge.consumer} isn't between two stages in order; there are {schedule.stages}")
            if schedule.rank_of[edge.producer] == schedule.rank_of[edge.consumer]:
                continue
            self.readers[edge.producer].append(edge.consumer)
            self.makers[edge.consumer].append(edge.producer)
            if edge.has_gradient:
                self.returning[edge.consumer].append(edge.producer)
                self.awaited[edge.producer].append(edge.consumer)

    def sends_after(self, action: Action) -> Iterator[Action]:
        """The sends that stand right after a computing action."""
        if action.kind is Kind.FORWARD:
            for peer in self.readers[action.stage]:
                yield Action(action.stage, Kind.SEND_FORWARD, action.microbatch, peer)
        elif action.kind in (Kind.BACKWARD, Kind.INPUT):
            for peer in self.returning[action.stage]:
                yield Action(action.stage, Kind.SEND_BACKWARD, action.microbatch, peer)

    def needs(self, action: Action) -> Iterator[Action]:
        """The receives that a computing action waits for."""
        if action.kind is Kind.FORWARD:
            for peer in self.makers[action.stage]:
                yield Action(action.stage, Kind.RECEIVE_FORWARD, action.microbatch, peer)
        elif action.kind in (Kind.BACKWARD, Kind.INPUT):
            for peer in self.awaited[action.stage]:
                yield Action(action.stage, Kind.RECEIVE_BACKWARD, action.microbatch, peer)
