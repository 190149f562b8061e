"""Pipeline schedules as data: what each pipeline rank does, in which order.

In comes a schedule of computing actions (`generators` makes them) and the edges of the stage graph; out come the lists with their messages
(`lower`), the proof that they run to the end (`validate`), and how many micro-batches each rank holds at once (`held`).

The rules under which lists run: a send never blocks; a receive posts a buffer and doesn't block either; a computing action waits until the
messages it needs have arrived; per ordered pair of ranks the k-th send meets the k-th receive. Between stages of one rank no message is
needed: the order of the list must do.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from autopar.errors import InputError


class Kind(StrEnum):
    """What an action does; the letters are those of its text."""

    FORWARD = "F"
    BACKWARD = "B"
    """The whole backward: gradients of inputs and of weights."""
    INPUT = "I"
    """The first half of a split backward: gradients of inputs."""
    WEIGHT = "W"
    """The second half of a split backward: gradients of weights."""
    SEND_FORWARD = "SF"
    RECEIVE_FORWARD = "RF"
    SEND_BACKWARD = "SB"
    RECEIVE_BACKWARD = "RB"
    REDUCE = "G"
    """The stage's gradients are complete and may be reduced over the ranks that share its parameters."""


COMPUTING = frozenset({Kind.FORWARD, Kind.BACKWARD, Kind.INPUT, Kind.WEIGHT})
SENDS: Mapping[Kind, Kind] = {Kind.SEND_FORWARD: Kind.RECEIVE_FORWARD, Kind.SEND_BACKWARD: Kind.RECEIVE_BACKWARD}
"""Each kind of send, and the receive that it meets."""
RECEIVES: Mapping[Kind, Kind] = {receive: send for send, receive in SENDS.items()}


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that a rank does for one micro-batch of one stage; `peer` is the stage at the other end of a message.

    >>> str(Action(2, Kind.FORWARD, 0)), str(Action(2, Kind.SEND_FORWARD, 0, 3)), str(Action(3, Kind.RECEIVE_FORWARD, 0, 2))
    ('2F0', '2SF0>3', '3RF0<2')
    """

    stage: int
    kind: Kind
    microbatch: int
    peer: int = -1

    def __str__(self) -> str:
        end = f">{self.peer}" if self.kind in SENDS else f"<{self.peer}" if self.kind in RECEIVES else ""
        return f"{self.stage}{self.kind.value}{self.microbatch}{end}"


_ACTION = re.compile(r"(\d+)([A-Z]+)(\d+)(?:([<>])(\d+))?")


def parse_action(text: str) -> Action:
    """Read the text of an action, such as ``2F0`` or ``2SF0>3``. Raises InputError when it isn't one.

    >>> parse_action("3RB1<4")
    Action(stage=3, kind=<Kind.RECEIVE_BACKWARD: 'RB'>, microbatch=1, peer=4)
    """
    match = _ACTION.fullmatch(text.strip())
    if match is not None and match[2] in list(Kind):
        kind = Kind(match[2])
        if match[4] == (">" if kind in SENDS else "<" if kind in RECEIVES else None):
            return Action(int(match[1]), kind, int(match[3]), int(match[5]) if match[5] else -1)
    raise InputError(f"{text!r} is no action of a schedule; write stage, kind, micro-batch and a message's other end: 2F0, 2SF0>3, 3RF0<2")


@dataclass(frozen=True, slots=True)
class StageEdge:
    """Something that stage `producer` computes and stage `consumer` reads; `has_gradient` says if a gradient comes back."""

    producer: int
    consumer: int
    has_gradient: bool = True


@dataclass(frozen=True, slots=True)
class Schedule:
    """What every rank does, in order: `rank_of` gives each stage's pipeline rank, `actions` each rank's list."""

    name: str
    microbatches: int
    rank_of: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]

    def __hash__(self) -> int:
        # Hashing 100,000 actions would take longer than simulating them; these three tell almost all schedules apart.
        return hash((self.name, self.microbatches, self.rank_of))

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.rank_of)

    @property
    def ranks(self) -> int:
        """Number of pipeline ranks."""
        return len(self.actions)

    @property
    def chunks(self) -> int:
        """The most stages that one rank holds."""
        return max(self.rank_of.count(rank) for rank in range(self.ranks))

    @property
    def splits_backward(self) -> bool:
        """Whether any backward runs in two passes, INPUT and WEIGHT."""
        return any(action.kind is Kind.INPUT for actions in self.actions for action in actions)

    @property
    def has_backward(self) -> bool:
        """Whether there are backward passes at all."""
        return any(action.kind in (Kind.BACKWARD, Kind.INPUT) for actions in self.actions for action in actions)


def chain(stages: int) -> tuple[StageEdge, ...]:
    """The edges of a plain pipeline: each stage feeds the next."""
    return tuple(StageEdge(stage, stage + 1) for stage in range(stages - 1))


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


def meet(action: Action) -> Action:
    """The receive that meets a send, or the send that meets a receive.

    >>> str(meet(parse_action("2SF0>3")))
    '3RF0<2'
    """
    return Action(action.peer, SENDS.get(action.kind) or RECEIVES[action.kind], action.microbatch, action.stage)


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
