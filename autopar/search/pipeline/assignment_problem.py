"""The problem of assigning blocks to stages and options, and what an assignment costs in seconds and bytes.

Comes in: the options of every block (seconds of one micro-batch, bytes), a schedule, budgets. Goes out: an `AssignmentProblem`, in which
like blocks stand together, and for any assignment its seconds and its bytes per rank, which brute force can compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from autopar.errors import InfeasibleError, InputError
from autopar.schedules import Kind, Schedule, StageTimes, peaks_in_flight, simulate
from autopar.search.pipeline.block_options import BlockOptions, Cut

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

PHASES = 3
"""Forward, input gradients, weight gradients."""
RECEIVES_AT_ONCE = 2
"""Receive buffers that a rank has at once: of the message in use, and of the next one, posted one computing action ahead."""


@dataclass(frozen=True, slots=True)
class BlockRun:
    """Consecutive blocks with equal options, which a solver need not tell apart.

    Attributes:
        first: index of the first block; `length`: number of blocks.
        indices: indices into `BlockOptions.options` of the options that are worth choosing; there are `options` of them.
        seconds: forward, input, weight of each, shape (options, 3); `once` of each, shape (options,).
        saved, waiting, static, workspace: bytes of each, shape (options,).
        cut: what it takes to end a stage after one of the blocks; `stage`: the one that the user pinned them to.
    """

    first: int
    length: int
    indices: tuple[int, ...]
    seconds: Floats
    once: Floats
    saved: Ints
    waiting: Ints
    static: Ints
    workspace: Ints
    cut: Cut
    stage: int | None


@dataclass(frozen=True)
class AssignmentProblem:
    """Blocks to assign to the stages of a schedule, each in one of its options.

    *Columns* are the seconds that determine how long the schedule takes: forward, input gradients and weight gradients of each of S stages
    (3 S), then the transfers from each stage to the next, then those of gradients back (S - 1 each).

    Attributes:
        budgets: bytes per rank.
        stages_of: per rank its stages.
        holdings: per rank, per combination that it holds at once and per stage of it, the micro-batches between forward and backward,
            and those between input and weight gradients; shape (combinations, stages of the rank, 2).
    """

    blocks: tuple[BlockOptions, ...]
    runs: tuple[BlockRun, ...]
    schedule: Schedule
    budgets: tuple[int, ...]
    stages_of: tuple[tuple[int, ...], ...]
    holdings: tuple[Ints, ...]

    @cached_property
    def has_backward(self) -> bool:
        """Whether the schedule has backward passes."""
        return self.schedule.has_backward

    @cached_property
    def messages_to(self) -> tuple[tuple[int, ...], ...]:
        """Per rank the stages at whose end there is a cut that a message to the rank crosses."""
        of, last = self.schedule.rank_of, self.schedule.stages - 1
        stages = []
        for rank, own in enumerate(self.stages_of):
            forward = [stage - 1 for stage in own if stage and of[stage - 1] != rank]
            backward = [stage for stage in own if self.has_backward and stage < last and of[stage + 1] != rank]
            stages.append(tuple(sorted({*forward, *backward})))
        return tuple(stages)


class RankMemory(NamedTuple):
    """Bytes of a rank at its peak: what is there all the time, what micro-batches hold, receive buffers, the largest block's workspace."""

    static: int
    held: int
    messages: int
    workspace: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


@dataclass(frozen=True, slots=True)
class AssignmentCost:
    """An assignment in numbers.

    Attributes:
        columns: as `AssignmentProblem` numbers them, shape (3 S + 2 (S - 1),).
        once: the longest `once` of a rank.
        memory: bytes of each rank at its peak, by kind.
    """

    columns: Floats
    once: float
    memory: tuple[RankMemory, ...]

    @property
    def peak(self) -> tuple[int, ...]:
        """Bytes of each rank at its peak."""
        return tuple(rank.total for rank in self.memory)


def evaluate(
    blocks: Sequence[BlockOptions], schedule: Schedule, stages: Sequence[int], options: Sequence[int]
) -> tuple[float, tuple[int, ...]]:
    """(seconds of a step, bytes of each rank at its peak) of an assignment, from the blocks' options alone."""
    problem = make_problem(blocks, schedule, 0)
    cost = compute_cost(problem, stages, options)
    return longest_path(problem, cost.columns)[0] + cost.once, cost.peak


def make_problem(blocks: Sequence[BlockOptions], schedule: Schedule, budget: int | Sequence[int]) -> AssignmentProblem:
    """The problem of these blocks under a schedule: like blocks are joined to runs, options that aren't worth choosing are dropped.

    Raises InfeasibleError when stages would stay empty or pins can't be met, InputError when a pin or the budgets aren't of this schedule.
    """
    budgets = (budget,) * schedule.ranks if isinstance(budget, int) else tuple(budget)
    if len(budgets) != schedule.ranks:
        raise InputError(f"{len(budgets)} budgets of memory for {schedule.ranks} pipeline ranks; give one number, or one for each")
    _check_pins(blocks, schedule)
    has_backward, splits_backward = schedule.has_backward, schedule.splits_backward
    runs: list[BlockRun] = []
    for number, block in enumerate(blocks):
        if number and block == replace(blocks[number - 1], name=block.name):
            runs[-1] = replace(runs[-1], length=runs[-1].length + 1)
        else:
            runs.append(_make_run(number, block, has_backward, splits_backward))
    stages_of = tuple(tuple(stage for stage, of in enumerate(schedule.rank_of) if of == rank) for rank in range(schedule.ranks))
    holdings = tuple(np.array(combinations, dtype=np.int64).reshape(len(combinations), -1, 2) for combinations in peaks_in_flight(schedule))
    return AssignmentProblem(tuple(blocks), tuple(runs), schedule, budgets, stages_of, holdings)


def compute_cost(problem: AssignmentProblem, stages: Sequence[int], options: Sequence[int]) -> AssignmentCost:
    """The seconds and bytes of an assignment; `stages` and `options` have one entry per block, the latter indices into its options."""
    count = problem.schedule.stages
    seconds = np.zeros((PHASES, count))
    cuts = np.zeros((2, count))
    once = np.zeros(count)
    saved, waiting, static, workspace, message, read_before = np.zeros((6, count), dtype=np.int64)
    for block, stage, index in zip(problem.blocks, stages, options, strict=True):
        option = block.options[index]
        seconds[:, stage] += (option.forward, option.input, option.weight)
        once[stage] += option.once
        saved[stage] += option.saved
        waiting[stage] += option.waiting
        static[stage] += option.static
        workspace[stage] = max(workspace[stage], option.workspace)
        cuts[:, stage], message[stage], read_before[stage] = block.cut[:2], block.cut.nbytes, block.cut.saved
    saved[1:] += read_before[:-1]
    memory, longest = [], 0.0
    for own, holdings, messages in zip(problem.stages_of, problem.holdings, problem.messages_to, strict=True):
        at = list(own)
        lived = holdings[:, :, 0] @ saved[at] + holdings[:, :, 1] @ waiting[at]
        buffers = RECEIVES_AT_ONCE * max((int(message[stage]) for stage in messages), default=0)
        memory.append(RankMemory(int(static[at].sum()), int(lived.max(initial=0)), buffers, int(workspace[at].max())))
        longest = max(longest, float(once[at].sum()))
    return AssignmentCost(np.concatenate([seconds.ravel(), cuts[:, : count - 1].ravel()]), longest, tuple(memory))


def longest_path(problem: AssignmentProblem, columns: Floats) -> tuple[float, Floats]:
    """(seconds of the schedule, how often each column lies on its longest path), shape of both as of `columns`."""
    count = problem.schedule.stages
    seconds = columns[: PHASES * count].reshape(PHASES, count)
    cuts = columns[PHASES * count :].reshape(2, count - 1)
    times = [StageTimes(*phases) for phases in seconds.T.tolist()]
    of = problem.schedule.rank_of
    transfers = {
        (stage, stage + 1): (forward, backward) for stage, (forward, backward) in enumerate(cuts.T.tolist()) if of[stage] != of[stage + 1]
    }
    timeline = simulate(problem.schedule, times, transfers)
    path = np.zeros_like(columns)
    for part, often in timeline.critical.items():
        match part:
            case (producer, int(), kind):
                path[PHASES * count + (count - 1) * (kind is Kind.SEND_BACKWARD) + producer] += often
            case (stage, kind):
                path[[phase * count + stage for phase in _PHASES_OF[kind]]] += often
    return timeline.seconds, path


_PHASES_OF = {Kind.FORWARD: (0,), Kind.INPUT: (1,), Kind.WEIGHT: (2,), Kind.BACKWARD: (1, 2)}


def _check_pins(blocks: Sequence[BlockOptions], schedule: Schedule) -> None:
    stages = schedule.stages
    if len(blocks) < stages:
        raise InfeasibleError(
            f"{len(blocks)} blocks can't fill the {stages} stages of schedule {schedule.name!r}: each stage needs one; take fewer stages"
        )
    pins = [(number, block.stage) for number, block in enumerate(blocks) if block.stage is not None]
    for number, stage in pins:
        if not 0 <= stage < stages:
            raise InputError(f"block {blocks[number].name!r} is pinned to stage {stage}; the stages are 0 to {stages - 1}")
    # From a block to the next the stage stays or goes on by one: none is empty. The first block is on the first, the last on the last.
    for (number, stage), (later, last) in pairwise([(-1, -1), *pins, (len(blocks), stages)]):
        if last < stage:
            raise InfeasibleError(
                f"block {blocks[later].name!r} is pinned to stage {last}, block {blocks[number].name!r} before it to stage {stage}; "
                "stages are in order; move a pin"
            )
        if last - stage > later - number:
            start = "the chain's start" if number < 0 else f"block {blocks[number].name!r} pinned to stage {stage}"
            end = "the chain's end" if later == len(blocks) else f"block {blocks[later].name!r} pinned to stage {last}"
            raise InfeasibleError(
                f"between {start} and {end} are {later - number - 1} blocks for {last - stage - 1} stages, and stages are in order, with a"
                " block at least; move a pin"
            )


def _make_run(number: int, block: BlockOptions, has_backward: bool, splits_backward: bool) -> BlockRun:
    """A run of one block, without the options that another one beats in all that counts under this schedule."""
    seconds = np.array([(option.forward, option.input, option.weight) for option in block.options])
    once = np.array([option.once for option in block.options])
    saved, waiting, static, workspace = np.array(
        [(option.saved, option.waiting, option.static, option.workspace) for option in block.options], dtype=np.int64
    ).T
    merits = [seconds[:, 0], once, static, workspace]
    if has_backward:
        merits.append(saved)
    if splits_backward:
        merits += [seconds[:, 1], seconds[:, 2], waiting]
    elif has_backward:
        merits.append(seconds[:, 1] + seconds[:, 2])
    merit = np.stack(merits, axis=1)
    no_worse = (merit[:, None] <= merit[None]).all(axis=2)
    # Of equal ones the first stays.
    beaten = no_worse & (~no_worse.T | (np.arange(len(merit))[:, None] < np.arange(len(merit))[None]))
    np.fill_diagonal(beaten, False)
    worthwhile = np.flatnonzero(~beaten.any(axis=0))
    return BlockRun(
        first=number,
        length=1,
        indices=tuple(worthwhile.tolist()),
        seconds=seconds[worthwhile],
        once=once[worthwhile],
        saved=saved[worthwhile],
        waiting=waiting[worthwhile],
        static=static[worthwhile],
        workspace=workspace[worthwhile],
        cut=block.cut,
        stage=block.stage,
    )
