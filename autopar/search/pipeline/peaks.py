"""When the memory of a pipeline rank is fullest: what its stages hold at each moment of a schedule, block by block.

Comes in: the options that the blocks of every stage run in, and the moments of a schedule (`AssignmentProblem.holdings`). Goes out: the
`Peak`.

Without a schedule, with the blocks numbered in the order of the forward, s what a block saves and g the gradients of its parameters, there
is while the backward runs block b

    sum over i <= b of s(i)  +  sum over i > b of g(i)  +  workspace(b)

and after it all gradients, while the optimizer updates the parameters. In the forward of block b there is what is saved, and no gradients,
but also copies of parameters that the backward doesn't need. Gradients that are summed over ranks in buckets are copied into one; those of
ZeRO levels 1 and 2 are whole until then.

In a schedule, with h micro-batches in flight on a stage, all but one of them hold everything, and that one goes through its backward. The
model of assignments takes every block to hold most at the same time (`BlockRun.held`), which is no less. Gradients that are summed over
ranks in the backward of every micro-batch are beside it, in the place of what this backward has freed: those that wait for their bucket,
their copy in it, those that are being sent, and the parts that come of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from autopar.costs import BUCKET_NBYTES, BlockMemory
from autopar.plans import StageBytes
from autopar.search.pipeline.block_options import BlockOption

Ints = npt.NDArray[np.int64]


class Peak(NamedTuple):
    """Bytes of a pipeline rank beside what is there all the time.

    Attributes:
        held: the most that micro-batches hold for their backward.
        workspace: the most that is needed only while something runs.
        apart: bytes of these, of gradients of parameters and of parameters' copies, that aren't there at the same time as the others.
    """

    held: int
    workspace: int
    apart: int


class _Moment(NamedTuple):
    """Bytes at one moment; `absent` are gradients and copies of parameters that aren't there."""

    held: int
    workspace: int
    absent: int


NO_MEMORY = BlockMemory(0, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class StageProfile:
    """The blocks of a stage in the order of the forward, an entry each, in bytes as in `BlockMemory`; `update` is of the whole stage."""

    saved: Ints
    waiting: Ints
    gradients: Ints
    arriving: Ints
    copies: Ints
    unsaved: Ints
    workspace: Ints
    first_workspace: Ints
    forward_workspace: Ints
    bucketed: Ints
    unsummed: Ints
    scattered: Ints
    scattered_each: Ints
    together: Ints
    largest: Ints
    parts: Ints
    update: int

    @classmethod
    def of(cls, options: Sequence[BlockOption], read_before: int) -> StageProfile:
        """The profile of blocks in these options; the stage saves its own copies of `read_before` bytes of values made before it."""
        memories = [NO_MEMORY if option.cost is None else option.cost.memory for option in options]
        rows = [
            (
                option.saved,
                option.waiting,
                memory.gradients,
                option.arriving,
                memory.copies,
                memory.unsaved,
                option.workspace,
                option.workspace if option.cost is None else option.first_workspace,
                memory.forward_workspace,
                memory.bucketed,
                memory.unsummed,
                memory.scattered,
                memory.scatters.whole,
                memory.scatters.together,
                memory.scatters.largest,
                memory.scatters.parts,
            )
            for option, memory in zip(options, memories, strict=True)
        ]
        columns = np.array(rows, dtype=np.int64).reshape(-1, len(_COLUMNS)).T
        columns[0, :1] += read_before
        update = max((memory.update for memory in memories), default=0) + sum(memory.masters for memory in memories)
        return cls(**dict(zip(_COLUMNS, columns, strict=True)), update=update)


_COLUMNS = tuple(name for name in StageProfile.__dataclass_fields__ if name != "update")


def find_peak(stages: Sequence[StageProfile], holdings: Ints, *, is_whole: bool, is_bound: bool) -> Peak:
    """The moment at which a pipeline rank with these stages needs most.

    Args:
        stages: of the rank.
        holdings: of its schedule (`AssignmentProblem.holdings`).
        is_whole: whether there is one stage and one micro-batch, which run without a schedule.
        is_bound: whether to take all blocks of a schedule to hold most at the same time, as the model of assignments does.
    """
    moments = _find_moments_after(stages, is_whole)
    if is_whole:
        moments += _find_moments_of_blocks(stages[0])
    else:
        moments += _bound_moments_of_schedule(stages, holdings) if is_bound else _find_moments_of_schedule(stages, holdings)
    held, workspace = max(moment.held for moment in moments), max(moment.workspace for moment in moments)
    return Peak(held, workspace, held + workspace - max(moment.held + moment.workspace - moment.absent for moment in moments))


def find_levels(stage: StageProfile, static: int, *, is_whole: bool) -> StageBytes:
    """The bytes of a stage at the moments that `find_peak` looks at block by block, as a plan has them; `static` are there all the time."""
    if is_whole:
        arriving, count = int(stage.gradients.sum()), len(stage.saved)
        levels = [moment.held + moment.workspace + arriving - moment.absent for moment in _find_moments_of_blocks(stage)]
        forward, first = levels[:count], levels[count:]
        backward = first
    else:
        arriving = int(stage.arriving.sum())
        forward = (stage.saved.sum() + stage.forward_workspace).tolist()
        first, backward = (_find_backward_levels(stage, has_gradients, arriving) for has_gradients in (False, True))
    return StageBytes(
        static=static,
        arriving=arriving,
        saved=int(stage.saved.sum()),
        waiting=int(stage.waiting.sum()),
        weight=int(stage.workspace.max(initial=0)),
        forward=tuple(forward),
        first_backward=tuple(max(0, nbytes) for nbytes in first),
        backward=tuple(max(0, nbytes) for nbytes in backward),
    )


def _find_backward_levels(stage: StageProfile, has_gradients: bool, arriving: int) -> list[int]:
    """Bytes during the backward of each block of a stage with one micro-batch in flight and no others; those of the first also after it."""
    _, *moments, at_end = _find_moments_of_schedule([stage], np.array([[[1, 0, has_gradients]]]))
    missing = 0 if has_gradients else arriving
    levels = [moment.held + moment.workspace + missing - moment.absent for moment in (*moments, at_end)]
    return [max(levels[0], levels[-1]), *levels[1:-1]]


def find_update(stages: Sequence[StageProfile], static: int, *, is_whole: bool) -> int:
    """Bytes of a pipeline rank with these stages after the last backward, of which `static` are there all the time."""
    return static + max(moment.held + moment.workspace - moment.absent for moment in _find_moments_after(stages, is_whole))


def _bound_moments_of_schedule(stages: Sequence[StageProfile], holdings: Ints) -> list[_Moment]:
    """The moments as `BlockRun.held` has them."""
    has_first = has_first_backward(holdings)
    needed = max(_find_needed(stage, has_first) for stage in stages)
    moments = []
    for numbers in holdings.tolist():
        held = absent = 0
        for stage, (in_flight, waiting, has_gradients) in zip(stages, numbers, strict=True):
            held += in_flight * int(stage.saved.sum()) + waiting * int(stage.waiting.sum())
            if not has_gradients:
                absent += int((np.minimum(stage.arriving, stage.saved) if in_flight else stage.arriving).sum())
        moments.append(_Moment(held, needed, absent))
    return moments


def _find_moments_of_schedule(stages: Sequence[StageProfile], holdings: Ints) -> list[_Moment]:
    """What stages hold while any of them runs a forward, or the backward of any of its blocks.

    The forward has ended before a backward begins, so both count as many micro-batches. Gradients come with a stage's first backward.
    """
    moments = []
    forward = max((int(stage.forward_workspace.max(initial=0)) for stage in stages), default=0)
    for numbers in holdings.tolist():
        full = sum(h * int(stage.saved.sum()) + w * int(stage.waiting.sum()) for stage, (h, w, _) in zip(stages, numbers, strict=True))
        absent = [0 if has_gradients else int(stage.arriving.sum()) for stage, (*_, has_gradients) in zip(stages, numbers, strict=True)]
        weights = (int(stage.workspace.max(initial=0)) for stage, (_, w, _) in zip(stages, numbers, strict=True) if w)
        moments.append(_Moment(full, max(forward, *weights, 0), sum(absent)))
        for stage, (in_flight, _, has_gradients), own_absent in zip(stages, numbers, absent, strict=True):
            if in_flight:
                held = full - _behind(stage.saved) + _behind(stage.waiting)
                sums, at_end = _find_sums(stage)
                workspace = sums + (stage.workspace if has_gradients else stage.first_workspace)
                others_absent = sum(absent) - own_absent
                not_yet = others_absent + (0 if has_gradients else own_absent - _behind(stage.arriving)) + np.zeros_like(held)
                moments += [_Moment(*row) for row in zip(held.tolist(), workspace.tolist(), not_yet.tolist(), strict=True)]
                moments.append(_Moment(int(held[0]), at_end, int(not_yet[0])))
    return moments


def _find_needed(stage: StageProfile, has_first: bool) -> int:
    """The most that a stage needs while it runs, with gradients that every micro-batch sums, beyond what its backward has freed.

    In a first backward, `_bound_moments_of_schedule` has gradients come into what is freed; sums take what these leave.
    """
    sums, at_end = _find_sums(stage)
    workspace = stage.first_workspace if has_first else stage.workspace
    kept = stage.waiting + (np.minimum(stage.arriving, stage.saved) if has_first else 0)
    freed = _behind(np.maximum(stage.saved - kept, 0))
    backward = int((workspace + np.maximum(sums - freed, 0)).max(initial=0))
    return max(int(stage.forward_workspace.max(initial=0)), backward, at_end - int(freed.max(initial=0)))


def _find_sums(stage: StageProfile) -> tuple[Ints, int]:
    """Bytes of gradients that are summed after every micro-batch, during the backward of each block and when it has ended."""
    if not stage.scattered_each.any():
        return stage.scattered_each, 0
    whole, together, parts = (_behind(column) + column for column in (stage.scattered_each, stage.together, stage.parts))
    waiting = np.minimum(together, BUCKET_NBYTES)
    # A sum begins when those before it hold no more than a bucket.
    sent = np.minimum(whole - waiting, BUCKET_NBYTES + int(stage.largest.max()))
    sums = waiting + sent + sent * parts // np.maximum(whole, 1)
    # What waits is copied when there is enough of it, or when the backward has ended.
    return sums + np.where(together < BUCKET_NBYTES, 0, waiting), int(sums[0] + waiting[0])


def has_first_backward(holdings: Ints) -> bool:
    """Whether a rank is as full as ever in a first backward, in which the gradients of parameters come into being."""
    return bool((holdings[:, :, 2] == 0).any()) if len(holdings) else False


def _find_moments_after(stages: Sequence[StageProfile], is_whole: bool) -> list[_Moment]:
    """When the backward has ended: the last buckets of gradients are summed, then the optimizer updates the parameters."""
    unsummed = sum(_limited(int(stage.unsummed.sum())) for stage in stages)
    copied = max((_limited(int(stage.bucketed.sum())) for stage in stages), default=0)
    update = max((stage.update for stage in stages), default=0)
    if not is_whole:
        return [_Moment(0, max(unsummed + copied, update), 0)]
    (stage,) = stages
    # A backward under `no_sync` would leave gradients whole at ZeRO level 1; this one doesn't.
    absent = int((stage.gradients - stage.arriving + stage.copies).sum())
    # What is left of one bucket doesn't come before it is summed.
    no_parts = int(stage.scattered.sum()) if unsummed < BUCKET_NBYTES else 0
    return [_Moment(0, unsummed + copied, absent + no_parts), _Moment(0, update, absent)]


def _find_moments_of_blocks(stage: StageProfile) -> list[_Moment]:
    """Forward and backward of each block of a program without a schedule; autograd's graph alone holds the copies of parameters."""
    saved, all_gradients = np.cumsum(stage.saved), int(stage.gradients.sum())
    forward = zip(saved.tolist(), stage.forward_workspace.tolist(), strict=True)
    moments = [_Moment(held, workspace, all_gradients) for held, workspace in forward]
    absent = all_gradients - _behind(stage.arriving) + _behind(stage.copies) + np.cumsum(stage.unsaved)
    # Gradients of blocks that the backward has come past wait in buckets; one that is full is summed.
    unsummed = _behind(stage.unsummed)
    filled = _behind(stage.bucketed) + stage.bucketed
    in_sums = np.minimum(unsummed, FULLEST_BUCKET) + np.where(filled >= BUCKET_NBYTES, np.minimum(filled, FULLEST_BUCKET), 0)
    absent = absent + np.where(unsummed < BUCKET_NBYTES, _behind(stage.scattered), 0)
    columns = zip(saved.tolist(), (stage.first_workspace + in_sums).tolist(), absent.tolist(), strict=True)
    return moments + [_Moment(*numbers) for numbers in columns]


def _behind(numbers: Ints) -> Ints:
    """Per block the sum of the blocks after it: what the backward has come past."""
    return np.cumsum(numbers[::-1])[::-1] - numbers


FULLEST_BUCKET = 2 * BUCKET_NBYTES


def _limited(nbytes: int) -> int:
    """Bytes of what waits in a bucket: it is summed when it is full."""
    return min(nbytes, FULLEST_BUCKET)
