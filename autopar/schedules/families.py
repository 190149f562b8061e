"""Schedules by name: ranks and micro-batches to a list of computing actions per pipeline rank.

Pure functions of a few numbers. Each list also has one REDUCE per stage, right after the stage's last backward action;
`schedules.lower` adds the messages. The order on a rank is one in which a chain of stages can run, so edges from any earlier stage to any
later one are served too.
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
"""A stage and what is done for its next micro-batch."""


@dataclass(frozen=True, slots=True)
class Family:
    """How schedules of one name are made.

    `chunks` is the stages per rank, None where any number from 2 does; `splits_backward` says that backwards run in two passes.
    """

    chunks: int | None
    build: Callable[[int, int, int], Schedule]
    splits_backward: bool = False


def make_schedule(name: str, ranks: int, microbatches: int, chunks: int | None = None) -> Schedule:
    """The schedule called `name` (see `SCHEDULES`); `chunks` is the stages per rank, by default the family's own or 2.

    >>> print(*make_schedule("1f1b", 2, 3).actions[0])
    0F0 0F1 0B0 0F2 0B1 0B2 0G0

    Raises InputError when the name is unknown or the numbers don't fit the family.
    """
    return _build(name, ranks, microbatches, check_schedule(name, ranks, microbatches, chunks))


# A search makes the same few over and over.
@lru_cache(maxsize=32)
def _build(name: str, ranks: int, microbatches: int, chunks: int) -> Schedule:
    return SCHEDULES[name].build(ranks, microbatches, chunks)


def check_schedule(name: str, ranks: int, microbatches: int, chunks: int | None = None) -> int:
    """The stages per rank of the schedule that `make_schedule` would make of the same arguments, and its errors; nothing is made."""
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
    """Forwards alone, for inference: `stages` is a schedule with the same ranks, or each stage's rank.

    A rank with several stages runs the last of them that is ready, so micro-batches stream through and few are held at once.

    >>> print(*forward_only((0, 1, 1, 0), 2).actions[0])
    0F0 0F1 3F0 3F1
    """
    rank_of = stages.rank_of if isinstance(stages, Schedule) else tuple(stages)
    if not rank_of or microbatches < 1 or set(rank_of) != set(range(max(rank_of) + 1)):
        raise InputError(f"forwards need a stage on every rank and a micro-batch, not stages on ranks {rank_of} and {microbatches}")
    ranks = max(rank_of) + 1
    passes = [[(stage, Kind.FORWARD) for stage in reversed(range(len(rank_of))) if rank_of[stage] == rank] for rank in range(ranks)]
    return Schedule("forward", microbatches, rank_of, tuple(map(tuple, _run_ahead(rank_of, microbatches, [()] * ranks, passes))))


def forwards_first(schedule: Schedule) -> Schedule:
    """All forwards of every rank, then the rest, in their orders: what runs when the loss is computed outside of the model.

    >>> print(*forwards_first(make_schedule("1f1b", 2, 3)).actions[0])
    0F0 0F1 0F2 0B0 0B1 0B2 0G0
    """
    lists = (sorted(actions, key=lambda action: action.kind is not Kind.FORWARD) for actions in schedule.actions)
    return replace(schedule, actions=tuple(map(tuple, lists)))


def _gpipe(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """All forwards, then all backwards (GPipe, arXiv 1811.06965).

    ::

        0  F0 F1 F2             B0 B1 B2
        1     F0 F1 F2 B0 B1 B2
    """
    lists = [[*_repeat(rank, Kind.FORWARD, microbatches), *_repeat(rank, Kind.BACKWARD, microbatches)] for rank in range(ranks)]
    return _finish("gpipe", microbatches, range(ranks), lists)


def _one_forward_one_backward(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """Warm-up of ranks - rank - 1 forwards, then one forward and one backward in turns (PipeDream-Flush, Megatron-LM).

    ::

        0  F0 F1       B0 F2 B1    B2
        1     F0 B0 F1 B1 F2 B2
    """
    lists = []
    for rank in range(ranks):
        forward, backward = _repeat(rank, Kind.FORWARD, microbatches), _repeat(rank, Kind.BACKWARD, microbatches)
        lists.append(_alternate(forward, backward, ranks - rank - 1))
    return _finish("1f1b", microbatches, range(ranks), lists)


def _interleaved(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """1F1B over rounds of micro-batches, each round through all stages of a rank (Megatron-LM, arXiv 2104.04473).

    A round is of `ranks` micro-batches, with which the k-th forward of a rank is of its chunk (k mod ranks chunks) // ranks; the backwards
    take the chunks in reverse. Warm-up is 2 (ranks - rank - 1) + (chunks - 1) ranks forwards. Micro-batches that don't make whole rounds
    make the first rounds larger, as in torch, since a smaller one would leave ranks idle.
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
    """1F1B with split backwards, W delayed by `rank` micro-batches so that every rank holds as many as rank 0 (arXiv 2401.10241, 3.1).

    ::

        0  F0 F1    I0 W0 F2 I1 W1    I2 W2
        1     F0 I0 F1 I1 W0 F2 I2 W1 W2
    """
    lists = []
    for rank in range(ranks):
        forward, inputs = _repeat(rank, Kind.FORWARD, microbatches), _repeat(rank, Kind.INPUT, microbatches)
        pending_weights = deque(_repeat(rank, Kind.WEIGHT, microbatches))
        actions = []
        for action in _alternate(forward, inputs, ranks - rank - 1):
            actions.append(action)
            if action.kind is Kind.INPUT and action.microbatch >= rank:
                actions.append(pending_weights.popleft())
        lists.append([*actions, *pending_weights])
    return _finish("zb-h1", microbatches, range(ranks), lists)


def _zero_bubble_v(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """Split backwards on a V of stages: rank r holds stages r and 2 ranks - 1 - r (arXiv 2401.10241, section 6).

    No bubble but the start's when F, I and W take the same time. The order is that for at least 2 ranks - 1 micro-batches; with fewer, the
    actions of the others are left out.
    """
    full = max(2 * ranks - 1, microbatches)
    lists = []
    for rank in range(ranks):
        down, up = rank, 2 * ranks - 1 - rank
        forward, inputs, weight = ([(stage, kind) for stage in (down, up)] for kind in (Kind.FORWARD, Kind.INPUT, Kind.WEIGHT))
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
    """Split backwards on a V of stages with about half of 1F1B's memory (V-Half of arXiv 2405.15362, controllable memory).

    Its building block, in units in which F, I and W of a stage take one and a new micro-batch starts every six: with p ranks, on rank r

    - F of the first chunk at 2 r, of the second at 3 p - 2 - r: the way down takes two units a rank, the way back one,
    - I of the second chunk at 3 p - 1 + 2 r + x, of the first at 6 p - 3 - r + y: the same again.

    So rank r holds the second chunk for about 3 r units and the first for about 6 p - 3 r, together p stages' worth at a period of six:
    half of the p whole ranks' worth that rank 0 of 1F1B holds. No two of the four meet in the same unit modulo six when y and x + 1
    aren't multiples of 3, y - x isn't 2 modulo 3, and neither is 1 (p even) or 4 (p odd) modulo six. Of the smallest solutions, (x, y) =
    (0, 1) for odd p and (3, 4) for even p hold at most the published (p + 2) // 2 micro-batches; (0, 4) for even p would hold half a
    micro-batch more.

    W fills the two units of six that are left. Idle units vanish as each rank runs its list as early as it can. After a rank's last
    forward nothing is held longer by running I first, so W only fills the waits there.
    """
    x, y = (0, 1) if ranks % 2 else (3, 4)
    heads, rests = [], []
    for rank in range(ranks):
        down, up = rank, 2 * ranks - 1 - rank
        offsets: dict[StagePass, int] = {
            (down, Kind.FORWARD): 2 * rank,
            (up, Kind.FORWARD): 3 * ranks - 2 - rank,
            (up, Kind.INPUT): 3 * ranks - 1 + 2 * rank + x,
            (down, Kind.INPUT): 6 * ranks - 3 - rank + y,
        }
        units = {6 * index + offset: stage_pass for stage_pass, offset in offsets.items() for index in range(microbatches)}
        head: list[StagePass] = []
        pending_weights: deque[StagePass] = deque()
        for unit in range(6 * (microbatches - 1) + offsets[up, Kind.FORWARD] + 1):
            if unit in units:
                stage, kind = units[unit]
                head.append((stage, kind))
                if kind is Kind.INPUT:
                    pending_weights.append((stage, Kind.WEIGHT))
            elif pending_weights:
                head.append(pending_weights.popleft())
        heads.append(_number(head))
        rests.append([(stage, kind) for kind in (Kind.INPUT, Kind.WEIGHT) for stage in (down, up)])
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
        if kind is Kind.INPUT:
            return ((stage, Kind.FORWARD, index) if stage == last else (stage + 1, kind, index)) in done
        return (stage, Kind.INPUT, index) in done

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
    """`warmup` forwards or all there are, then one forward and one backward in turns, then the backwards that are left."""
    warmup = min(warmup, len(forward))
    pairs = zip(forward[warmup:], backward, strict=False)
    return [*forward[:warmup], *(action for pair in pairs for action in pair), *backward[len(forward) - warmup :]]


def _v_shape(ranks: int) -> list[int]:
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
