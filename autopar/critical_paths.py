"""A schedule and many sets of stage times -> the step time of each and what lies on its longest path, in one sweep.

`timeline.simulate` says what happens when; this says the same of the end alone, for a search that asks for dozens of stage times of one
schedule. Comes in: a schedule of computing actions. `Paths` holds its actions in levels, an action's level above those that it waits
for, so that a sweep over the levels times all of a level, for all sets of stage times, at once.

The stages stand in a chain. Rules as in ``timeline``: a rank computes in the order of its list; a message leaves when its content is
made and those before it, between the same two ranks, have arrived; computing goes on meanwhile.

Columns of times, with S stages: forward, input gradient and weight gradient of each stage (3 S), then the transfer from each stage to the
next, then that of the gradient back (S - 1 each). A whole backward takes the input and the weight gradient's time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autopar.schedules import Kind, Schedule

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

PHASES = 3
"""Columns of times per stage: forward, input gradient, weight gradient."""


@dataclass(frozen=True)
class Paths:
    """The graph of a schedule's actions; node 0 stands for the start, the others are in the order of their levels.

    Attributes:
        stages: number of stages.
        levels: first node of each level, and the number of nodes.
        before: per node the one before it on its rank; `needs`: the one whose message it waits for; `ahead`: the one whose message
            goes before its own, between the same ranks; 0 where there is none.
        kind: per node the column of what it does, `columns` for a whole backward of stage s at ``columns + s``.
        message: per node the column of its message's transfer, -1 when it sends none.
    """

    stages: int
    levels: tuple[int, ...]
    before: Ids
    needs: Ids
    ahead: Ids
    kind: Ids
    message: Ids

    @property
    def columns(self) -> int:
        """Number of columns of times."""
        return PHASES * self.stages + 2 * (self.stages - 1)

    def longest(self, times: Floats) -> tuple[Floats, Floats]:
        """Seconds of a step, shape (sets,), and how often each column lies on the longest path, shape (sets, columns).

        `times` has shape (sets, columns); seconds are ``(counts * times).sum(1)`` up to rounding.
        """
        stages = self.stages
        whole = times[:, stages : 2 * stages] + times[:, 2 * stages : 3 * stages]
        table = np.concatenate([times, whole, np.zeros((len(times), 1))], axis=1).T
        taken, moved = table[self.kind], table[self.message]
        end = np.zeros((len(self.before), len(times)))
        arrived = np.zeros_like(end)
        for first, last in zip(self.levels, self.levels[1:], strict=False):
            here = slice(first, last)
            done = np.maximum(end[self.before[here]], arrived[self.needs[here]])
            done += taken[here]
            end[here] = done
            np.maximum(done, arrived[self.ahead[here]], out=done)
            done += moved[here]
            arrived[here] = done
        counts = np.zeros((len(times), self.columns + stages))
        for index in range(len(times)):
            counts[index] = self._trace(end[:, index], arrived[:, index])
        counts[:, stages : 2 * stages] += counts[:, self.columns :]
        counts[:, 2 * stages : 3 * stages] += counts[:, self.columns :]
        return end.max(axis=0), counts[:, : self.columns]

    def _trace(self, end: Floats, arrived: Floats) -> Floats:
        """How often each column, whole backwards apart, lies on one longest path; shape (columns + stages,)."""
        ends, arrivals = end.tolist(), arrived.tolist()
        before, needs, ahead = self.before.tolist(), self.needs.tolist(), self.ahead.tolist()
        message = self.message.tolist()
        computed: list[int] = []
        sent: list[int] = []
        node = int(np.argmax(end))
        while node:
            computed.append(node)
            if ends[before[node]] >= arrivals[needs[node]]:
                node = before[node]
                continue
            node = needs[node]
            while message[node] >= 0:
                sent.append(node)
                if arrivals[ahead[node]] <= ends[node]:
                    break
                node = ahead[node]
        counts = np.bincount(self.kind[computed], minlength=self.columns + self.stages)
        counts += np.bincount(self.message[sent], minlength=len(counts))
        return counts.astype(float)


def find_paths(schedule: Schedule) -> Paths:
    """The graph of a schedule that runs to its end (see `schedules.validate`)."""
    stages, microbatches, ranks = schedule.stages, schedule.microbatches, schedule.ranks
    rank_of = np.array(schedule.rank_of)
    forward, backward = np.zeros((2, stages + 1, microbatches), dtype=np.int64)  # node of an action; the last row for no stage
    columns = PHASES * stages + 2 * (stages - 1)
    offset = {Kind.FORWARD: 0, Kind.INPUT: stages, Kind.WEIGHT: 2 * stages, Kind.BACKWARD: columns}
    starts, kinds, stage_of, microbatch_of, passes = [1], [columns], [0], [0], [0]
    for actions in schedule.actions:
        for action in actions:
            if action.kind in offset:
                kinds.append(offset[action.kind] + action.stage)
                stage_of.append(action.stage)
                microbatch_of.append(action.microbatch)
                passes.append(1 if action.kind is Kind.FORWARD else 0 if action.kind is Kind.WEIGHT else 2)
        starts.append(len(kinds))
    size = len(kinds)
    kind, stage, microbatch, direction = np.array(kinds), np.array(stage_of), np.array(microbatch_of), np.array(passes)
    is_forward, is_backward = direction == 1, direction == 2
    forward[stage[is_forward], microbatch[is_forward]] = np.flatnonzero(is_forward)
    backward[stage[is_backward], microbatch[is_backward]] = np.flatnonzero(is_backward)
    needs = np.where(is_forward, forward[stage - 1, microbatch], np.where(is_backward, backward[stage + 1, microbatch], 0))
    before = np.arange(size) - 1
    before[starts[:-1]] = 0
    before[0] = 0
    # The stage that a message goes to, and its column; none between stages of one rank.
    target = np.where(is_forward, stage + 1, np.where(is_backward, stage - 1, -1))
    target[(target < 0) | (target >= stages)] = -1
    target[rank_of[target] == rank_of[stage]] = -1
    target[0] = -1
    sends = target >= 0
    message = np.where(sends, np.where(is_forward, PHASES * stages + stage, (PHASES + 1) * stages - 1 + stage - 1), -1)
    rank = np.repeat(np.arange(ranks + 1), [1, *np.diff(starts)]) - 1
    channel = np.where(sends, rank * ranks + rank_of[target], -1)
    ahead = np.zeros(size, dtype=np.int64)
    for one in np.unique(channel[sends]):
        nodes = np.flatnonzero(channel == one)
        ahead[nodes[1:]] = nodes[:-1]
    level = _levels(needs, starts)
    order = np.argsort(level, kind="stable")
    place = np.empty(size, dtype=np.int64)
    place[order] = np.arange(size)
    bounds = np.searchsorted(level[order], np.arange(1, level.max() + 2))
    return Paths(
        stages=stages,
        levels=tuple(bounds.tolist()),
        before=place[before][order],
        needs=place[needs][order],
        ahead=place[ahead][order],
        kind=kind[order],
        message=message[order],
    )


def _levels(needs: Ids, starts: list[int]) -> Ids:
    """Per node the tick at which it runs if every action takes one: all ranks go on in step, each until it must wait."""
    level = np.zeros(len(needs), dtype=np.int64)
    at, stop = np.array(starts[:-1]), np.array(starts[1:])
    at = at[(active := at < stop)]
    stop = stop[active]
    tick = 0
    level[1:] = -1
    while len(at):
        tick += 1
        wait = level[needs[at]]
        ready = wait >= 0
        assert ready.any(), "the schedule doesn't run to its end"
        level[at[ready]] = tick
        at = at + ready
        if (at >= stop).any():
            at, stop = at[(active := at < stop)], stop[active]
    return level
