"""Simulated time of a schedule: when each action runs, how long a step takes, and which seconds it depends on.

Comes in: a schedule of computing actions, the seconds of each stage's passes and of each transfer between stages. Goes out: a `Timeline`.
The rules are those by which the executor runs lists: a rank computes in the order of its list, one action after the other; a transfer
starts when its content is made and the earlier transfers between the same two ranks, in the same direction, have arrived; computing goes on
meanwhile; an action starts when its rank is free and all its messages are there.

So a step's time is the longest path through a graph of passes and transfers, and `Timeline.critical` counts what lies on that path. The
same path exists whatever the seconds, so for a fixed schedule ``sum(count * seconds)`` over it is a lower bound of the step's time under
any other seconds: a simulation gives a search one linear constraint, a cutting plane.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType

from autopar.errors import InputError, ScheduleError
from autopar.schedules.actions import COMPUTING, PASSES, Action, Kind, Schedule, StageEdge, chain

Activity = tuple[int, Kind] | tuple[int, int, Kind]
"""What takes time: a pass (stage, F, B, I or W), or a transfer (producer, consumer, SEND_FORWARD or SEND_BACKWARD)."""


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of one micro-batch on one stage: of its forward, its input gradients and its weight gradients.

    A whole backward takes ``input + weight``.
    """

    forward: float
    input: float
    weight: float


@dataclass(frozen=True, slots=True)
class Span:
    """An action, and when it starts and ends in seconds since the start of the step."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Transfer:
    """A message between two pipeline ranks: its send, when it starts to be transferred, and when it has arrived."""

    send: Action
    start: float
    end: float


@dataclass(frozen=True, eq=False)
class Timeline:
    """A simulated step.

    Attributes:
        seconds: from the start of the first action to the end of the last.
        idle: per rank the seconds in which it computes nothing.
        critical: activity -> how often it lies on the longest path; `seconds` is the sum of these counts times the activities' seconds.
    """

    seconds: float
    idle: tuple[float, ...]
    critical: Mapping[Activity, int]
    _graph: _Graph
    _ends: Sequence[float]

    @cached_property
    def spans(self) -> tuple[tuple[Span, ...], ...]:
        """Per rank its computing actions in order, with the times at which they start and end."""
        return tuple(
            tuple(Span(action, max(self._ends[waited] for waited in self._graph.before[node]), self._ends[node]) for action, node in pairs)
            for pairs in self._graph.nodes
        )

    @cached_property
    def transfers(self) -> tuple[Transfer, ...]:
        """All messages between ranks, those of two ranks in the order in which they are sent."""
        graph = self._graph
        maker_of = {node: action for pairs in graph.nodes for action, node in pairs}
        found = []
        for node, index in enumerate(graph.activity_of, start=1):
            match graph.activities[index]:
                case (producer, consumer, kind):
                    source, target = (producer, consumer) if kind is Kind.SEND_FORWARD else (consumer, producer)
                    waits = graph.before[node]
                    send = Action(source, kind, maker_of[waits[0]].microbatch, target)
                    found.append(Transfer(send, max(self._ends[waited] for waited in waits), self._ends[node]))
        return tuple(found)


def simulate(
    schedule: Schedule,
    times: Sequence[StageTimes],
    transfers: Mapping[tuple[int, int], tuple[float, float]] = MappingProxyType({}),
    edges: Sequence[StageEdge] | None = None,
) -> Timeline:
    """Simulate one step of a schedule.

    >>> from autopar.schedules import make_schedule
    >>> simulate(make_schedule("gpipe", 2, 3), [StageTimes(1.0, 1.0, 1.0)] * 2).seconds
    12.0

    Args:
        schedule: computing actions; messages in its lists are ignored, since transfers are timed from the edges.
        times: per stage the seconds of its passes.
        transfers: edge (producer, consumer) -> seconds of a forward and of a backward message; 0 where an edge isn't given. Stages of one
            rank exchange no messages, so their edges take no time.
        edges: the stage graph; by default a chain.

    Raises InputError when times or transfers don't fit the stages, ScheduleError when the ranks wait for each other.
    """
    if len(times) != schedule.stages:
        raise InputError(f"schedule {schedule.name!r} has {schedule.stages} stages, and there are times for {len(times)}")
    graph = _build_graph(schedule, chain(schedule.stages) if edges is None else tuple(edges))
    unknown = [pair for pair in transfers if pair not in graph.pairs]
    if unknown:
        raise InputError(f"there are transfer times for {unknown[0][0]} -> {unknown[0][1]}, and no such edge between stages")
    seconds = [_seconds_of(activity, times, transfers) for activity in graph.activities]
    ends = [0.0]
    append = ends.append
    # Written out, since a search comes here most of all.
    for index, (node_a, node_b, node_c) in zip(graph.activity_of, graph.before[1:], strict=True):
        start = ends[node_a]
        if ends[node_b] > start:
            start = ends[node_b]
        if ends[node_c] > start:
            start = ends[node_c]
        append(start + seconds[index])
    lasts = [pairs[-1][1] for pairs in graph.nodes if pairs]
    node = max(lasts, key=ends.__getitem__, default=0)
    total = ends[node]
    counts = [0] * len(graph.activities)
    while node:
        counts[graph.activity_of[node - 1]] += 1
        node = max(graph.before[node], key=ends.__getitem__)
    busy = [sum(count * seconds[index] for index, count in work.items()) for work in graph.work]
    critical = {activity: count for activity, count in zip(graph.activities, counts, strict=True) if count and activity is not None}
    return Timeline(total, tuple(total - rank_busy for rank_busy in busy), critical, graph, ends)


def bubble(timeline: Timeline) -> float:
    """The share of all ranks' time that is idle, between 0 and 1.

    >>> from autopar.schedules import make_schedule
    >>> round(bubble(simulate(make_schedule("1f1b", 4, 12), [StageTimes(1.0, 1.0, 1.0)] * 4)), 3)
    0.2
    """
    whole = timeline.seconds * len(timeline.idle)
    return sum(timeline.idle) / whole if whole else 0.0


def _seconds_of(activity: Activity | None, times: Sequence[StageTimes], transfers: Mapping[tuple[int, int], tuple[float, float]]) -> float:
    match activity:
        case (producer, consumer, kind):
            return transfers.get((producer, consumer), (0.0, 0.0))[kind is Kind.SEND_BACKWARD]
        case (stage, Kind.FORWARD):
            return times[stage].forward
        case (stage, Kind.BACKWARD_INPUT):
            return times[stage].input
        case (stage, Kind.BACKWARD_WEIGHT):
            return times[stage].weight
        case (stage, _):
            return times[stage].input + times[stage].weight
    return 0.0


@dataclass(frozen=True, eq=False, slots=True)
class _Graph:
    """Actions and transfers as numbered nodes, each after the nodes that it waits for; node 0 is the start of the step.

    Attributes:
        activities: what nodes do. A node waits for three others at most; where an action waits for more, further nodes join them, whose
            activity is None and takes no time.
        activity_of: per node from 1 the index of its activity.
        before: per node from 0 the three nodes that it waits for; the start stands for those that aren't needed.
        nodes: per rank its computing actions with their nodes, in order.
        work: per rank the index of each activity that it computes -> how often it does.
        pairs: the edges.
    """

    activities: Sequence[Activity | None]
    activity_of: Sequence[int]
    before: Sequence[tuple[int, int, int]]
    nodes: Sequence[Sequence[tuple[Action, int]]]
    work: Sequence[Mapping[int, int]]
    pairs: frozenset[tuple[int, int]]


def _index_of(stage: int, kind: Kind) -> int:
    """The index of a stage's pass among all activities; 0 is None's."""
    return 1 + len(PASSES) * stage + PASSES.index(kind)


# A search simulates the same few schedules under many times, and building the graph takes longer than walking it.
@lru_cache(maxsize=16)
def _build_graph(schedule: Schedule, edges: tuple[StageEdge, ...]) -> _Graph:
    """The graph of a schedule, found by running the ranks in turns, each as far as it gets."""
    activities: list[Activity | None] = [None, *((stage, kind) for stage in range(schedule.stages) for kind in PASSES)]
    needs: dict[int, list[int]] = defaultdict(list)  # per pass of a stage: the messages that it waits for
    makes: dict[int, list[tuple[int, int]]] = defaultdict(list)  # per pass of a stage: the messages that it makes, and for which rank
    for edge in edges:
        if not 0 <= edge.producer < edge.consumer < schedule.stages:
            raise InputError(f"edge {edge.producer} -> {edge.consumer} isn't from an earlier to a later of the {schedule.stages} stages")
        ways: list[tuple[int, int, Kind, tuple[Kind, ...]]] = [(edge.producer, edge.consumer, Kind.SEND_FORWARD, (Kind.FORWARD,))]
        if edge.has_gradient:
            ways.append((edge.consumer, edge.producer, Kind.SEND_BACKWARD, (Kind.BACKWARD, Kind.BACKWARD_INPUT)))
        for source, target, send, kinds in ways:
            for kind in kinds:
                makes[_index_of(source, kind)].append((len(activities), schedule.rank_of[target]))
                needs[_index_of(target, kind)].append(len(activities))
            activities.append((edge.producer, edge.consumer, send))

    activity_of: list[int] = []
    before = [(0, 0, 0)]
    lists = [[action for action in actions if action.kind in COMPUTING] for actions in schedule.actions]
    nodes: list[list[tuple[Action, int]]] = [[] for _ in lists]
    work: list[dict[int, int]] = [defaultdict(int) for _ in lists]
    arrived: dict[tuple[int, int], int] = {}  # per message and micro-batch: the node after which it is there
    latest: dict[tuple[int, int], int] = defaultdict(int)  # per ordered pair of ranks: the node of the last transfer

    def add(activity: int, waits: Sequence[int]) -> int:
        while len(waits) > 3:
            waits = [*waits[3:], add(0, waits[:3])]
        activity_of.append(activity)
        before.append((waits[0], waits[1] if len(waits) > 1 else 0, waits[2] if len(waits) > 2 else 0))
        return len(activity_of)

    def run_next(rank: int, action: Action) -> bool:
        activity, microbatch = _index_of(action.stage, action.kind), action.microbatch
        waits = [nodes[rank][-1][1] if nodes[rank] else 0]
        for message in needs.get(activity, ()):
            if (message, microbatch) not in arrived:
                return False
            waits.append(arrived[message, microbatch])
        node = add(activity, waits)
        nodes[rank].append((action, node))
        work[rank][activity] += 1
        for message, target in makes.get(activity, ()):
            if target != rank:
                latest[rank, target] = add(message, [node, latest[rank, target]])
            arrived[message, microbatch] = node if target == rank else latest[rank, target]
        return True

    progressed = True
    while progressed:
        progressed = False
        for rank, actions in enumerate(lists):
            while len(nodes[rank]) < len(actions) and run_next(rank, actions[len(nodes[rank])]):
                progressed = True
    stuck = [f"rank {rank} at {actions[len(nodes[rank])]}" for rank, actions in enumerate(lists) if len(nodes[rank]) < len(actions)]
    if stuck:
        raise ScheduleError(f"schedule {schedule.name!r} can't run: {', '.join(stuck)} wait for each other; `validate` shows why")
    return _Graph(activities, activity_of, before, nodes, work, frozenset((edge.producer, edge.consumer) for edge in edges))
