"""Schedules by name: numbers of ranks, micro-batches and stages to a list of computing actions per pipeline rank.

Comes in: a name of `SCHEDULES` and the numbers. Goes out: a `Schedule` without messages, which `add_messages` adds. A family is a pure
function of the numbers, found in the table at the end of this module. Each rank's order is one in which a chain of stages can run, so edges
from any stage to any later one are served too. Each list also has a REDUCE per stage, right after the stage's last backward action.

The pictures show a rank per row and time from left to right, as `timeline.simulate` gives it where forward (F), input gradient (I) and
weight gradient (W) of a stage take one unit each, a whole backward (B) two, and messages none. ``F1`` is the forward of micro-batch 1;
where a rank holds several stages, ``3F1`` is that of stage 3.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from autopar.errors import InputError
from autopar.schedules.actions import Action, Kind, Schedule

StagePass = tuple[int, Kind]
"""A pass of a stage, such as its forward, for whichever micro-batch is its next."""


@dataclass(frozen=True, slots=True)
class Family:
    """How the schedules of one name are made.

    Attributes:
        chunks: stages per rank; None where any number from 2 on will do.
        build: from numbers of ranks, micro-batches and chunks to the schedule.
        splits_backward: whether a backward runs as two actions, BACKWARD_INPUT and BACKWARD_WEIGHT.
    """

    chunks: int | None
    build: Callable[[int, int, int], Schedule]
    splits_backward: bool = False


def make_schedule(name: str, ranks: int, microbatches: int, chunks: int | None = None) -> Schedule:
    """The schedule of a family for these numbers, without messages.

    >>> print(*make_schedule("1f1b", 2, 3).actions[0])
    0F0 0F1 0B0 0F2 0B1 0B2 0G0

    Args:
        name: a key of `SCHEDULES`.
        ranks: pipeline ranks.
        microbatches: micro-batches per step.
        chunks: stages per rank; by default the family's own number, or 2 where the family takes any.

    Raises InputError when the name is unknown or the numbers don't fit the family.
    """
    return _build(name, ranks, microbatches, check_schedule(name, ranks, microbatches, chunks))


# A search makes the same few over and over.
@lru_cache(maxsize=32)
def _build(name: str, ranks: int, microbatches: int, chunks: int) -> Schedule:
    return SCHEDULES[name].build(ranks, microbatches, chunks)


def check_schedule(name: str, ranks: int, microbatches: int, chunks: int | None = None) -> int:
    """Raise the errors of `make_schedule` without making anything; returns the stages per rank that the schedule would have."""
    if name not in SCHEDULES:
        raise InputError(f"unknown schedule {name!r}; there are {', '.join(SCHEDULES)}")
    if ranks < 1 or microbatches < 1:
        raise InputError(f"schedule {name!r} needs at least one rank and one micro-batch, not {ranks} and {microbatches}")
    family = SCHEDULES[name]
    if chunks is None:
        chunks = family.chunks or 2
    if family.chunks is not None and chunks != family.chunks:
        free = ", ".join(repr(free_name) for free_name, free_family in SCHEDULES.items() if free_family.chunks is None)
        raise InputError(f"schedule {name!r} has {family.chunks} stages per rank, not {chunks}; {free} takes any number from 2")
    if chunks < 1 or (family.chunks is None and chunks < 2):
        raise InputError(f"schedule {name!r} needs 2 or more stages per rank, not {chunks}; with one, '1f1b' is the same idea")
    return chunks


def splits_backward(name: str) -> bool:
    """Whether schedules called `name` run backwards in two passes."""
    return SCHEDULES[name].splits_backward


def forward_only(stages: Schedule | Sequence[int], microbatches: int) -> Schedule:
    """A schedule of forwards alone, for inference.

    A rank with several stages runs the last of them that is ready, so that micro-batches leave the pipeline early and few are in flight.

    >>> print(*forward_only((0, 1, 1, 0), 2).actions[0])
    0F0 0F1 3F0 3F1

    Args:
        stages: each stage's pipeline rank, or a schedule whose stages are placed alike.
        microbatches: micro-batches per call.

    Raises InputError when a rank has no stage or there is no micro-batch.
    """
    rank_of = stages.rank_of if isinstance(stages, Schedule) else tuple(stages)
    if not rank_of or microbatches < 1 or set(rank_of) != set(range(max(rank_of) + 1)):
        raise InputError(f"forwards need a stage on every rank and a micro-batch, not stages on ranks {rank_of} and {microbatches}")
    ranks = max(rank_of) + 1
    passes = [[(stage, Kind.FORWARD) for stage in reversed(range(len(rank_of))) if rank_of[stage] == rank] for rank in range(ranks)]
    return Schedule("forward", microbatches, rank_of, tuple(map(tuple, _run_ahead(rank_of, microbatches, [()] * ranks, passes))))


def forwards_first(schedule: Schedule) -> Schedule:
    """The schedule with all forwards of a rank moved before all else, each in its order.

    This is what runs when the loss is computed outside of the model: no backward can begin before the user has all outputs. It is for
    pricing; `runtime.pipeline` runs the two halves of the schedule itself, the second when the user calls backward.

    >>> print(*forwards_first(make_schedule("1f1b", 2, 3)).actions[0])
    0F0 0F1 0F2 0B0 0B1 0B2 0G0
    """
    lists = (sorted(actions, key=lambda action: action.kind is not Kind.FORWARD) for actions in schedule.actions)
    return replace(schedule, actions=tuple(map(tuple, lists)))


def _gpipe(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """GPipe (arXiv 1811.06965): all forwards, then all backwards.

    ::

        0  F0 F1 F2                   B0    B1    B2
        1     F0 F1 F2          B0    B1    B2
        2        F0 F1 F2 B0    B1    B2
    """
    lists = [[*_repeat(rank, Kind.FORWARD, microbatches), *_repeat(rank, Kind.BACKWARD, microbatches)] for rank in range(ranks)]
    return _finish("gpipe", microbatches, range(ranks), lists)


def _one_forward_one_backward(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """1F1B (PipeDream-Flush, Megatron-LM): after a warm-up of forwards, a forward and a backward in turns.

    The warm-up of a rank is ``ranks - rank - 1`` forwards, so at most ``ranks - rank`` micro-batches are in flight on it::

        0  F0 F1 F2             B0    F3 B1       B2       B3
        1     F0 F1       B0    F2 B1    F3 B2       B3
        2        F0 B0    F1 B1    F2 B2    F3 B3
    """
    lists = []
    for rank in range(ranks):
        forward, backward = _repeat(rank, Kind.FORWARD, microbatches), _repeat(rank, Kind.BACKWARD, microbatches)
        lists.append(_alternate(forward, backward, ranks - rank - 1))
    return _finish("1f1b", microbatches, range(ranks), lists)


def _interleaved(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """Interleaved 1F1B (Megatron-LM, arXiv 2104.04473): every rank holds several stages, so the bubble is shorter.

    Stage s is on rank ``s mod ranks``. Micro-batches go in rounds of `ranks`, each round through all stages (chunks) of a rank before the
    next round begins: the k-th forward of a rank is of its chunk ``(k mod (ranks * chunks)) // ranks``. Backwards take the chunks in
    reverse. The warm-up is ``2 * (ranks - rank - 1) + (chunks - 1) * ranks`` forwards::

        0  0F0 0F1 2F0 2F1 0F2     2B0     0F3 2B1     2F2 0B0     2F3 0B1         2B2         2B3     0B2     0B3
        1      1F0 1F1 3F0 3B0     3F1 3B1     1F2 1B0     1F3 1B1     3F2 3B2     3F3 3B3     1B2     1B3

    Where the micro-batches don't make whole rounds, the first rounds are larger, as in torch, since a smaller one would leave ranks idle.
    """
    rounds = max(1, microbatches // ranks)
    bounds = [-(-microbatches * number // rounds) for number in range(rounds + 1)]
    order = [(chunk, index) for start, end in pairwise(bounds) for chunk in range(chunks) for index in range(start, end)]
    lists = []
    for rank in range(ranks):
        forward = [Action(chunk * ranks + rank, Kind.FORWARD, index) for chunk, index in order]
        backward = [Action((chunks - 1 - chunk) * ranks + rank, Kind.BACKWARD, index) for chunk, index in order]
        lists.append(_alternate(forward, backward, 2 * (ranks - rank - 1) + (chunks - 1) * bounds[1]))
    return _finish("interleaved", microbatches, [stage % ranks for stage in range(ranks * chunks)], lists)


def _zero_bubble_h1(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """ZB-H1 (arXiv 2401.10241, section 3.1): 1F1B with split backwards, whose weight gradients fill the bubble.

    Rank r runs a W only when r more micro-batches have had their I, so every rank holds as many micro-batches as rank 0 of 1F1B does::

        0  F0 F1 F2       I0 W0 F3 I1 W1 I2 W2 I3 W3
        1     F0 F1    I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
        2        F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3
    """
    lists = []
    for rank in range(ranks):
        forward, inputs = _repeat(rank, Kind.FORWARD, microbatches), _repeat(rank, Kind.BACKWARD_INPUT, microbatches)
        pending_weights = deque(_repeat(rank, Kind.BACKWARD_WEIGHT, microbatches))
        actions = []
        for action in _alternate(forward, inputs, ranks - rank - 1):
            actions.append(action)
            if action.kind is Kind.BACKWARD_INPUT and action.microbatch >= rank:
                actions.append(pending_weights.popleft())
        lists.append([*actions, *pending_weights])
    return _finish("zb-h1", microbatches, range(ranks), lists)


def _zero_bubble_v(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """ZB-V (arXiv 2401.10241, section 6): split backwards on stages that run down the ranks and up again, in a V.

    Rank r holds stages ``r`` and ``2 * ranks - 1 - r``. When F, I and W take the same time, ranks are idle only until their first forward::

        0  0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2
        1      1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2

    The published order is for at least ``2 * ranks - 1`` micro-batches. With fewer, it is that order without the actions of the others.
    """
    full = max(2 * ranks - 1, microbatches)
    lists = []
    for rank in range(ranks):
        down, up = rank, 2 * ranks - 1 - rank
        forward, inputs, weight = (
            [(stage, kind) for stage in (down, up)] for kind in (Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
        )
        passes = [forward[0]] * (2 * (ranks - rank) - 1)
        passes += [forward[1], forward[0]] * rank
        passes += [forward[1], inputs[1], weight[1]] * (ranks - rank)
        for turn in range(full - ranks):
            # The first chunk runs out of forwards before the second does.
            passes += [forward[0]] * (turn <= full - 2 * ranks + rank)
            passes += [inputs[0], weight[0], forward[1], inputs[1], weight[1]]
        passes += [inputs[0], inputs[1]] * rank
        passes += [inputs[0], weight[0]] * (ranks - rank)
        passes += [weight[1]] * rank + [weight[0]] * rank
        lists.append([action for action in _number(passes) if action.microbatch < microbatches])
    return _finish("zb-v", microbatches, _v_shape(ranks), lists)


def _v_half(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """V-Half (arXiv 2405.15362, controllable memory): a V of stages as in ZB-V, with about half of 1F1B's memory.

    Here 2 ranks and 4 micro-batches::

        0  0F0         3F0 0F1 3I0 3W0 3F1 0F2     0I0 3I1 0W0 3F2 3W1 0F3 0I1 3I2 0W1 3F3 3I3 0I2 0W2 0I3 0W3 3W2 3W3
        1      1F0 2F0         1F1 2F1 2I0 2W0 1I0 1W0 1F2 2F2 2I1 2W1 1I1 1W1 1F3 2F3 2I2 1I2 2I3 1I3 1W2 1W3 2W2 2W3

    Every micro-batch runs by one building block, and a new one starts every six units of time. With p ranks, the block has on rank r

    - F of the first chunk at unit 2 r and of the second at 3 p - 2 - r: two units per rank on the way down, one on the way up,
    - I of the second chunk at 3 p - 1 + 2 r + x and of the first at 6 p - 3 - r + y: again two per rank, then one.

    So rank r holds the second chunk's activations for about 3 r units and the first chunk's for about 6 p - 3 r. At a period of six that is
    p chunks in flight together, half of the memory of p micro-batches on rank 0 of 1F1B, where each is two chunks' worth.

    The delays x and y are such that no two of the four passes fall on the same unit modulo six: y and x + 1 aren't multiples of 3, y - x
    isn't 2 modulo 3, and neither is 1 (p even) or 4 (p odd) modulo six. Of the smallest solutions, (x, y) = (0, 1) for odd p and (3, 4) for
    even p have at most the published (p + 2) // 2 micro-batches in flight; (0, 4) for even p would have half a micro-batch more.

    W runs in the other two units of six. Units of the building block in which a rank is idle cost nothing, as each rank runs its list as
    early as it can. After its last forward a rank prefers I, which frees memory on earlier ranks sooner, and W only fills the waits.
    """
    x, y = (0, 1) if ranks % 2 else (3, 4)
    heads, rests = [], []
    for rank in range(ranks):
        down, up = rank, 2 * ranks - 1 - rank
        offsets: dict[StagePass, int] = {
            (down, Kind.FORWARD): 2 * rank,
            (up, Kind.FORWARD): 3 * ranks - 2 - rank,
            (up, Kind.BACKWARD_INPUT): 3 * ranks - 1 + 2 * rank + x,
            (down, Kind.BACKWARD_INPUT): 6 * ranks - 3 - rank + y,
        }
        units = {6 * index + offset: stage_pass for stage_pass, offset in offsets.items() for index in range(microbatches)}
        head: list[StagePass] = []
        pending_weights: deque[StagePass] = deque()
        for unit in range(6 * (microbatches - 1) + offsets[up, Kind.FORWARD] + 1):
            if unit in units:
                stage, kind = units[unit]
                head.append((stage, kind))
                if kind is Kind.BACKWARD_INPUT:
                    pending_weights.append((stage, Kind.BACKWARD_WEIGHT))
            elif pending_weights:
                head.append(pending_weights.popleft())
        heads.append(_number(head))
        rests.append([(stage, kind) for kind in (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT) for stage in (down, up)])
    return _finish("v-half", microbatches, _v_shape(ranks), _run_ahead(_v_shape(ranks), microbatches, heads, rests))


def _run_ahead(
    rank_of: Sequence[int], microbatches: int, heads: Sequence[Sequence[Action]], rests: Sequence[Sequence[StagePass]]
) -> list[list[Action]]:
    """Simulate ranks that choose their actions as they go, with passes that all take one unit of time; the list of each rank.

    A rank runs its head in the given order, waiting where an action isn't ready. Then, in each unit of time, it runs the first pass of its
    rest whose next micro-batch is ready, or idles.

    Args:
        rank_of: per stage its rank; stages form a chain.
        microbatches: how often each pass runs in all.
        heads: per rank the actions that come first, in this order.
        rests: per rank the passes to choose from after them, in the order of preference.
    """
    counts = [Counter((action.stage, action.kind) for action in head) for head in heads]
    lists: list[list[Action]] = [[] for _ in heads]
    done: set[tuple[int, Kind, int]] = set()
    pending = sum(len(head) for head in heads) + sum(
        microbatches - count[stage_pass] for count, rest in zip(counts, rests, strict=True) for stage_pass in rest
    )
    last = len(rank_of) - 1

    def is_ready(stage: int, kind: Kind, index: int) -> bool:
        if kind is Kind.FORWARD:
            return stage == 0 or (stage - 1, kind, index) in done
        if kind is Kind.BACKWARD_INPUT:
            return ((stage, Kind.FORWARD, index) if stage == last else (stage + 1, kind, index)) in done
        return (stage, Kind.BACKWARD_INPUT, index) in done

    while pending:
        chosen = []
        for actions, head, count, rest in zip(lists, heads, counts, rests, strict=True):
            if len(actions) < len(head):
                action = head[len(actions)]
                if is_ready(action.stage, action.kind, action.microbatch):
                    actions.append(action)
                    chosen.append(action)
                continue
            for stage, kind in rest:
                index = count[stage, kind]
                if index < microbatches and is_ready(stage, kind, index):
                    count[stage, kind] += 1
                    action = Action(stage, kind, index)
                    actions.append(action)
                    chosen.append(action)
                    break
        # Only now, so that nothing is used in the unit of time that makes it.
        done.update((action.stage, action.kind, action.microbatch) for action in chosen)
        pending -= len(chosen)
    return lists


def _repeat(stage: int, kind: Kind, microbatches: int) -> list[Action]:
    """A pass of a stage for every micro-batch, in order."""
    return [Action(stage, kind, index) for index in range(microbatches)]


def _number(passes: Iterable[StagePass]) -> list[Action]:
    """Actions of passes, of which each takes the next micro-batch of its stage and kind."""
    counts: Counter[StagePass] = Counter()
    actions = []
    for stage, kind in passes:
        actions.append(Action(stage, kind, counts[stage, kind]))
        counts[stage, kind] += 1
    return actions


def _alternate(forward: Sequence[Action], backward: Sequence[Action], warmup: int) -> list[Action]:
    """`warmup` forwards, or all if there are fewer, then a forward and a backward in turns, then the remaining backwards."""
    warmup = min(warmup, len(forward))
    pairs = zip(forward[warmup:], backward, strict=False)
    return [*forward[:warmup], *(action for pair in pairs for action in pair), *backward[len(forward) - warmup :]]


def _v_shape(ranks: int) -> list[int]:
    """The rank of each of ``2 * ranks`` stages: down the ranks and up again."""
    return [*range(ranks), *reversed(range(ranks))]


def _finish(name: str, microbatches: int, rank_of: Iterable[int], lists: Sequence[Sequence[Action]]) -> Schedule:
    """The schedule, with a REDUCE right after the last backward action of each stage."""
    finished_lists = []
    for actions in lists:
        last_of_stage = {action.stage: position for position, action in enumerate(actions)}
        finished: list[Action] = []
        for position, action in enumerate(actions):
            finished.append(action)
            if last_of_stage[action.stage] == position:
                finished.append(Action(action.stage, Kind.REDUCE, 0))
        finished_lists.append(tuple(finished))
    return Schedule(name, microbatches, tuple(rank_of), tuple(finished_lists))


SCHEDULES: Mapping[str, Family] = {
    "gpipe": Family(1, _gpipe),
    "1f1b": Family(1, _one_forward_one_backward),
    "interleaved": Family(None, _interleaved),
    "zb-h1": Family(1, _zero_bubble_h1, splits_backward=True),
    "zb-v": Family(2, _zero_bubble_v, splits_backward=True),
    "v-half": Family(2, _v_half, splits_backward=True),
}
"""Every family of schedules by name."""
