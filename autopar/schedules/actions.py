"""Actions of pipeline ranks and schedules made of them: the data, its text form, and a table of it.

Comes in: text, or what `families` and `messages` put together. Goes out: `Schedule`, a list of `Action`s per pipeline rank. In this
package "rank" alone means a pipeline rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from autopar.errors import InputError


class Kind(StrEnum):
    """What an action does; the value is its letters in the text of an action."""

    FORWARD = "F"
    BACKWARD = "B"
    """The whole backward: gradients of inputs and of weights."""
    BACKWARD_INPUT = "I"
    """The first half of a split backward: gradients of inputs."""
    BACKWARD_WEIGHT = "W"
    """The second half of a split backward: gradients of weights."""
    SEND_FORWARD = "SF"
    RECEIVE_FORWARD = "RF"
    SEND_BACKWARD = "SB"
    RECEIVE_BACKWARD = "RB"
    REDUCE = "G"
    """The stage's gradients are complete and may be reduced over the ranks that share its parameters."""

    # Members equal their text, so they may hash like it; an enum's own hash is a call of Python for each lookup of an action.
    __hash__ = str.__hash__


PASSES = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
"""What a stage computes for a micro-batch: the forward, and either the whole backward or its two halves."""
COMPUTING = frozenset(PASSES)
SENDS: Mapping[Kind, Kind] = {Kind.SEND_FORWARD: Kind.RECEIVE_FORWARD, Kind.SEND_BACKWARD: Kind.RECEIVE_BACKWARD}
"""Each kind of send -> the kind of receive at the other end."""
RECEIVES: Mapping[Kind, Kind] = {receive: send for send, receive in SENDS.items()}


@dataclass(frozen=True, slots=True)
class Action:
    """Something that a rank does for one micro-batch of one of its stages.

    >>> str(Action(2, Kind.FORWARD, 0)), str(Action(2, Kind.SEND_FORWARD, 0, 3)), str(Action(3, Kind.RECEIVE_FORWARD, 0, 2))
    ('2F0', '2SF0>3', '3RF0<2')

    Attributes:
        stage: the stage that computes, sends or receives.
        kind: what is done.
        microbatch: index of the micro-batch; 0 for REDUCE, which is done once per step.
        peer: of a message, the stage at the other end; -1 otherwise.
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
    """The action of a text such as ``2F0`` or ``2SF0>3``. Raises InputError when the text is no action.

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
    """Stage `consumer` reads what the earlier stage `producer` computes; `has_gradient` says whether a gradient is sent back."""

    producer: int
    consumer: int
    has_gradient: bool = True


@dataclass(frozen=True, slots=True)
class Schedule:
    """What every pipeline rank does in one step, in order.

    Attributes:
        name: the family's name, or any name for a schedule of the user's own.
        microbatches: micro-batches per step.
        rank_of: per stage its pipeline rank.
        actions: per pipeline rank its list of actions.
    """

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
        """Stages on the rank that has the most."""
        return max(self.rank_of.count(rank) for rank in range(self.ranks))

    @property
    def splits_backward(self) -> bool:
        """Whether any backward runs as two actions, BACKWARD_INPUT and BACKWARD_WEIGHT."""
        return any(action.kind is Kind.BACKWARD_INPUT for actions in self.actions for action in actions)

    @property
    def has_backward(self) -> bool:
        """Whether there are backwards at all; a schedule for inference has none."""
        return any(action.kind in COMPUTING and action.kind is not Kind.FORWARD for actions in self.actions for action in actions)


def chain(stages: int) -> tuple[StageEdge, ...]:
    """The edges of a plain pipeline: each stage feeds the next."""
    return tuple(StageEdge(stage, stage + 1) for stage in range(stages - 1))


def counterpart(action: Action) -> Action:
    """The action at the other end of a message: the receive of a send, or the send of a receive.

    >>> str(counterpart(parse_action("2SF0>3")))
    '3RF0<2'
    """
    return Action(action.peer, SENDS.get(action.kind) or RECEIVES[action.kind], action.microbatch, action.stage)


NEAR = 4
"""Steps that a table shows before and after a marked one."""
WIDTH = 12
"""The most ranks that a table shows."""


def draw_table(schedule: Schedule, marks: Sequence[tuple[int, int]] = ()) -> str:
    """Text with a row per step, the position in the ranks' lists, and a column per rank.

    With `marks`, pairs of a rank and a step, only the rows near them are shown, with arrows, and of many ranks only those near.

    >>> print(draw_table(Schedule("two", 1, (0, 1), ((parse_action("0F0"),), (parse_action("1F0"), parse_action("1B0")))), [(1, 1)]))
    step  rank 0  rank 1
    0     0F0     1F0
    1             1B0     <-- rank 1
    """
    length = max([len(actions) for actions in schedule.actions] + [step + 1 for _, step in marks])
    rows = [step for step in range(length) if not marks or any(abs(step - marked) <= NEAR for _, marked in marks)]
    ranks = list(range(schedule.ranks))
    if marks and len(ranks) > WIDTH:
        # The marked ranks first, then their neighbours.
        ranks = sorted(sorted(ranks, key=lambda rank: min(abs(rank - marked) for marked, _ in marks))[:WIDTH])
    table = [["step", *(f"rank {rank}" for rank in ranks)]]
    for place, step in enumerate(rows):
        if place and rows[place - 1] < step - 1:
            table.append(["..."] * (len(ranks) + 1))
        lists = (schedule.actions[rank] for rank in ranks)
        table.append([str(step), *(str(actions[step]) if step < len(actions) else "" for actions in lists)])
        here = sorted({rank for rank, marked in marks if marked == step})
        if here:
            table[-1].append("<-- rank " + ", ".join(map(str, here)))
    widths = [max(len(row[column]) for row in table) for column in range(len(ranks) + 1)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=False)).rstrip() for row in table)
