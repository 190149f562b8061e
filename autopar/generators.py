"""Schedules by name: ranks and micro-batches to a list of computing actions per pipeline rank.

Pure functions of a few numbers. Each list also has one REDUCE per stage, right after the stage's last backward action;
`schedules.lower` adds the messages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from autopar.errors import InputError
from autopar.schedules import Action, Kind, Schedule


def make_schedule(name: str, ranks: int, microbatches: int, chunks: int | None = None) -> Schedule:
    """The schedule called `name`; `chunks` is the number of stages per rank, where the family leaves a choice.

    Raises InputError when the name is unknown or the numbers don't fit the family.
    """
    if name not in SCHEDULES:
        raise InputError(f"unknown schedule {name!r}; there are {', '.join(SCHEDULES)}")
    if ranks < 1 or microbatches < 1:
        raise InputError(f"schedule {name!r} needs at least one rank and one micro-batch, not {ranks} and {microbatches}")
    return SCHEDULES[name](ranks, microbatches, chunks)


def _gpipe(ranks: int, microbatches: int, chunks: int | None) -> Schedule:
    _only_one_chunk("gpipe", chunks)
    lists = [
        [Action(rank, kind, index) for kind in (Kind.FORWARD, Kind.BACKWARD) for index in range(microbatches)] for rank in range(ranks)
    ]
    return _finish("gpipe", microbatches, range(ranks), lists)


def _one_forward_one_backward(ranks: int, microbatches: int, chunks: int | None) -> Schedule:
    _only_one_chunk("1f1b", chunks)
    lists = []
    for rank in range(ranks):
        forward = [Action(rank, Kind.FORWARD, index) for index in range(microbatches)]
        backward = [Action(rank, Kind.BACKWARD, index) for index in range(microbatches)]
        lists.append(_alternate(forward, backward, min(ranks - rank - 1, microbatches)))
    return _finish("1f1b", microbatches, range(ranks), lists)


def _alternate(forward: Sequence[Action], backward: Sequence[Action], warmup: int) -> list[Action]:
    """`warmup` forwards, then pairs of one forward and one backward, then the backwards that are left."""
    mixed = list(forward[:warmup])
    for ahead, behind in zip(forward[warmup:], backward, strict=False):
        mixed += [ahead, behind]
    return mixed + list(backward[len(forward) - warmup :])


def _only_one_chunk(name: str, chunks: int | None) -> None:
    if chunks not in (None, 1):
        raise InputError(f"schedule {name!r} has one stage per rank, not {chunks}; 'interleaved' takes any number")


def _finish(name: str, microbatches: int, rank_of: Sequence[int], lists: Sequence[Sequence[Action]]) -> Schedule:
    """The schedule, with a REDUCE right after the last backward action of each stage."""
    finished = []
    for actions in lists:
        last = {action.stage: position for position, action in enumerate(actions) if action.kind is not Kind.FORWARD}
        done: list[Action] = []
        for position, action in enumerate(actions):
            done.append(action)
            if last.get(action.stage) == position:
                done.append(Action(action.stage, Kind.REDUCE, 0))
        finished.append(tuple(done))
    return Schedule(name, microbatches, tuple(rank_of), tuple(finished))


SCHEDULES: Mapping[str, Callable[[int, int, int | None], Schedule]] = {"gpipe": _gpipe, "1f1b": _one_forward_one_backward}
"""Every schedule by name: a function of the ranks, the micro-batches and the stages per rank (None: as the family has it)."""
