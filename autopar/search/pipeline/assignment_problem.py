r"""The problem of assigning blocks to stages and options, and what an assignment costs in seconds and bytes.

Comes in: the options of every block (seconds and bytes of one micro-batch), a schedule, memory budgets. Goes out: an `AssignmentProblem`,
in which consecutive blocks with equal options are one run, and the cost of any assignment.

An *assignment* gives every block a stage and one of its options. A pipeline rank :math:`k` holds :math:`h_s` micro-batches of its stage
:math:`s` between their forward and their (input) backward and :math:`w_s` between input and weight gradients, in several combinations in
the course of a schedule. With sums over the blocks of a stage, its peak is

.. math:: \sum_{s \in k} \mathit{static}_s + \max_{(h, w)} \sum_{s \in k} (h_s\, \mathit{saved}_s + w_s\, \mathit{waiting}_s)
    + 2 \max \mathit{message} + \max \mathit{workspace}

bytes. The saved bytes of a stage include its own copies of values that blocks on earlier stages read too (`CutCost.saved`), and receive
buffers are of the size of the largest message to the rank. The step takes the seconds of the simulated schedule, and those of the rank
whose :math:`\sum \mathit{per\_step}` is longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from autopar.costs import CutCost
from autopar.errors import InfeasibleError, InputError
from autopar.schedules import Kind, Schedule, StageTimes, peaks_in_flight, simulate
from autopar.search.pipeline.block_options import BlockOption, BlockOptions
from autopar.search.pipeline.peaks import StageProfile, find_peak

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

PHASES = 3
"""Forward, input gradients, weight gradients."""
RECEIVES_AT_ONCE = 2
"""Receive buffers that a pipeline rank has at once: of the message in use, and of the next one, posted one computing action ahead."""


@dataclass(frozen=True, slots=True)
class BlockRun:
    """Consecutive blocks with equal options, which a solver need not tell apart.

    Arrays have an entry per option that is worth choosing, of which there are `options`.

    Attributes:
        first: index of the first block.
        length: number of blocks.
        indices: of these options in `BlockOptions.options`.
        seconds: forward, input and weight gradients of one micro-batch, shape (options, 3).
        per_step: seconds per step outside of the schedule, shape (options,).
        saved, waiting, static, arriving, workspace, first_workspace: bytes as in `BlockOption`, shape (options,) each.
        cut: what it takes to end a stage after one of the blocks.
        stage: the stage that the user pinned them to, if any.
    """

    first: int
    length: int
    indices: tuple[int, ...]
    seconds: Floats
    per_step: Floats
    saved: Ints
    waiting: Ints
    static: Ints
    arriving: Ints
    workspace: Ints
    first_workspace: Ints
    cut: CutCost
    stage: int | None

    def held(self, in_flight: Ints, waiting: Ints, has_gradients: Ints) -> Ints:
        """Bytes of a block in each option at moments of a schedule, without its workspace, shape (moments, options).

        The arguments are a column of `AssignmentProblem.holdings` each. In a step's first backward gradients come as what is saved goes.
        """
        saved, arriving = self.saved[None], self.arriving[None]
        in_flight, waiting = in_flight[:, None], waiting[:, None]
        of_gradients = np.where(has_gradients[:, None] > 0, arriving, np.where(in_flight > 0, np.maximum(arriving - saved, 0), 0))
        nbytes: Ints = self.static - arriving + of_gradients + in_flight * saved + waiting * self.waiting
        return nbytes


@dataclass(frozen=True)
class AssignmentProblem:
    """Blocks to assign to the stages of a schedule, each in one of its options.

    *Columns* are the seconds that determine how long the schedule takes: forward, input gradients and weight gradients of each of S stages
    (3 S), then the transfers from each stage to the next, then those of gradients back (S - 1 each).

    Attributes:
        blocks: the options of every block, in the order of the chain.
        runs: the same blocks, those with equal options together.
        schedule: computing actions of each pipeline rank; its stages stand in a chain.
        budgets: bytes of each pipeline rank.
        stages_of: per pipeline rank its stages, ascending.
        holdings: per pipeline rank the numbers (h, w) of micro-batches that it holds at once, and whether there are gradients from an
            earlier backward, per combination in the course of the schedule and per stage of the rank, shape (combinations, stages of the
            rank, 3).
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

    @property
    def is_whole(self) -> bool:
        """Whether there is one stage and one micro-batch: the program runs without a schedule."""
        return self.schedule.stages == self.schedule.microbatches == 1 and self.has_backward

    def held(self, index: int, moments: Ints) -> Ints:
        """Bytes of a block of run `index` in each option, without its workspace, shape (moments, options).

        The moments are those of a stage in the schedule, as in `holdings`; of a program without one the backwards of each run, before which
        the runs before it hold what they save, and those after it the gradients of their parameters.
        """
        run = self.runs[index]
        if not self.is_whole:
            return run.held(*moments.T)
        now = np.arange(len(self.runs))[:, None]
        begun = np.where(now > index, run.saved, np.where(now < index, run.arriving, np.maximum(run.saved, run.arriving)))
        return run.static - run.arriving + begun

    @cached_property
    def messages_to(self) -> tuple[tuple[int, ...], ...]:
        """Per pipeline rank the cuts that messages to it cross, each by the stage that ends there."""
        rank_of, last = self.schedule.rank_of, self.schedule.stages - 1
        cuts = []
        for rank, stages in enumerate(self.stages_of):
            forward = [stage - 1 for stage in stages if stage and rank_of[stage - 1] != rank]
            backward = [stage for stage in stages if self.has_backward and stage < last and rank_of[stage + 1] != rank]
            cuts.append(tuple(sorted({*forward, *backward})))
        return tuple(cuts)


class RankMemory(NamedTuple):
    """Bytes of a pipeline rank at its peak.

    Attributes:
        static: what is there all the time: parameters, gradients, optimizer state, outputs.
        held: what micro-batches hold for their backward.
        messages: receive buffers.
        workspace: what is needed only while something runs.
        apart: bytes of all these that aren't there at the same time.
    """

    static: int
    held: int
    messages: int
    workspace: int
    apart: int = 0

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.static + self.held + self.messages + self.workspace - self.apart


@dataclass(frozen=True, slots=True)
class AssignmentCost:
    """An assignment in numbers.

    Attributes:
        columns: seconds, in the order that `AssignmentProblem` states, shape (3 S + 2 (S - 1),).
        per_step: seconds of the pipeline rank whose `per_step` add up to most.
        memory: bytes of each pipeline rank at its peak, by kind.
    """

    columns: Floats
    per_step: float
    memory: tuple[RankMemory, ...]

    @property
    def peak(self) -> tuple[int, ...]:
        """Bytes of each pipeline rank at its peak."""
        return tuple(rank.total for rank in self.memory)


def evaluate(
    blocks: Sequence[BlockOptions], schedule: Schedule, stages: Sequence[int], options: Sequence[int]
) -> tuple[float, tuple[int, ...]]:
    """(seconds of a step, bytes of each pipeline rank at its peak) of an assignment: a stage and the number of an option per block."""
    problem = make_problem(blocks, schedule, 0)
    cost = compute_cost(problem, stages, options)
    return longest_path(problem, cost.columns)[0] + cost.per_step, cost.peak


def make_problem(blocks: Sequence[BlockOptions], schedule: Schedule, budget: int | Sequence[int]) -> AssignmentProblem:
    """The problem of these blocks under a schedule: equal blocks are joined to runs, options that aren't worth choosing are left out.

    Args:
        blocks: the options of every block, in the order of the chain.
        schedule: its actions; sends and receives don't matter.
        budget: bytes of every pipeline rank, or of each.

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
    stages_of = tuple(tuple(stage for stage, rank_of in enumerate(schedule.rank_of) if rank_of == rank) for rank in range(schedule.ranks))
    holdings = tuple(np.array(combinations, dtype=np.int64).reshape(len(combinations), -1, 3) for combinations in peaks_in_flight(schedule))
    return AssignmentProblem(tuple(blocks), tuple(runs), schedule, budgets, stages_of, holdings)


def compute_cost(problem: AssignmentProblem, stages: Sequence[int], options: Sequence[int], *, is_bound: bool = True) -> AssignmentCost:
    """The seconds and bytes of an assignment; `stages` and `options` have one entry per block, the latter indices into its options.

    Where it `is_bound`, the bytes under a schedule are those of the model of assignments, which are no less than what is needed.
    """
    count = problem.schedule.stages
    seconds = np.zeros((PHASES, count))
    cuts = np.zeros((2, count))
    per_step = np.zeros(count)
    static, message, read_before = np.zeros((3, count), dtype=np.int64)
    on_stage: list[list[BlockOption]] = [[] for _ in range(count)]
    for block, stage, index in zip(problem.blocks, stages, options, strict=True):
        option = block.options[index]
        seconds[:, stage] += (option.forward, option.backward_input, option.backward_weight)
        per_step[stage] += option.per_step
        static[stage] += option.static
        on_stage[stage].append(option)
        cuts[:, stage], message[stage], read_before[stage] = block.cut.seconds, block.cut.nbytes, block.cut.saved
    profiles = [StageProfile.of(options_of, int(before)) for options_of, before in zip(on_stage, (0, *read_before[:-1]), strict=True)]
    memory, longest_per_step = [], 0.0
    for stages_of_rank, holdings, messages in zip(problem.stages_of, problem.holdings, problem.messages_to, strict=True):
        own = list(stages_of_rank)
        buffers = RECEIVES_AT_ONCE * max((int(message[stage]) for stage in messages), default=0)
        peak = find_peak([profiles[stage] for stage in own], holdings, is_whole=problem.is_whole, is_bound=is_bound)
        memory.append(RankMemory(int(static[own].sum()), peak.held, buffers, peak.workspace, peak.apart))
        longest_per_step = max(longest_per_step, float(per_step[own].sum()))
    return AssignmentCost(np.concatenate([seconds.ravel(), cuts[:, : count - 1].ravel()]), longest_per_step, tuple(memory))


def longest_path(problem: AssignmentProblem, columns: Floats) -> tuple[float, Floats]:
    """Simulate the schedule with these seconds; returns its seconds, and how often each column lies on its longest path, shape (columns,).

    The seconds are the product of the two: ``path @ columns``.
    """
    count = problem.schedule.stages
    seconds = columns[: PHASES * count].reshape(PHASES, count)
    cuts = columns[PHASES * count :].reshape(2, count - 1)
    stage_times = [StageTimes(*phases) for phases in seconds.T.tolist()]
    rank_of = problem.schedule.rank_of
    transfers = {
        (stage, stage + 1): (forward, backward)
        for stage, (forward, backward) in enumerate(cuts.T.tolist())
        if rank_of[stage] != rank_of[stage + 1]
    }
    timeline = simulate(problem.schedule, stage_times, transfers)
    path = np.zeros_like(columns)
    for activity, times_on_path in timeline.critical.items():
        match activity:
            case (producer, int(), kind):
                path[PHASES * count + (count - 1) * (kind is Kind.SEND_BACKWARD) + producer] += times_on_path
            case (stage, kind):
                path[[phase * count + stage for phase in _PHASES_OF[kind]]] += times_on_path
    return timeline.seconds, path


_PHASES_OF = {Kind.FORWARD: (0,), Kind.BACKWARD_INPUT: (1,), Kind.BACKWARD_WEIGHT: (2,), Kind.BACKWARD: (1, 2)}


def _check_pins(blocks: Sequence[BlockOptions], schedule: Schedule) -> None:
    """Raise InfeasibleError if no assignment fills every stage and meets the pins, InputError for pins to stages that there aren't."""
    stages = schedule.stages
    if len(blocks) < stages:
        raise InfeasibleError(
            f"{len(blocks)} blocks can't fill the {stages} stages of schedule {schedule.name!r}: each stage needs one; take fewer stages"
        )
    pins = [(number, block.stage) for number, block in enumerate(blocks) if block.stage is not None]
    for number, stage in pins:
        if not 0 <= stage < stages:
            raise InputError(f"block {blocks[number].name!r} is pinned to stage {stage}; the stages are 0 to {stages - 1}")
    # No stage is empty: the first block is on stage 0, the last on the last, and each other on the stage of the block before or the next.
    for (number, stage), (next_number, next_stage) in pairwise([(-1, -1), *pins, (len(blocks), stages)]):
        if next_stage < stage:
            raise InfeasibleError(
                f"block {blocks[next_number].name!r} is pinned to stage {next_stage}, block {blocks[number].name!r} before it to stage "
                f"{stage}; stages are in order; move a pin"
            )
        if next_stage - stage > next_number - number:
            start = "the chain's start" if number < 0 else f"block {blocks[number].name!r} pinned to stage {stage}"
            is_end = next_number == len(blocks)
            end = "the chain's end" if is_end else f"block {blocks[next_number].name!r} pinned to stage {next_stage}"
            raise InfeasibleError(
                f"between {start} and {end} are {next_number - number - 1} blocks for {next_stage - stage - 1} stages, and stages are in "
                "order, with a block at least; move a pin"
            )


def _make_run(number: int, block: BlockOptions, has_backward: bool, splits_backward: bool) -> BlockRun:
    """A run of one block, without dominated options: those that another option is no worse than in all that counts under this schedule."""
    seconds = np.array([(option.forward, option.backward_input, option.backward_weight) for option in block.options])
    per_step = np.array([option.per_step for option in block.options])
    saved, waiting, static, arriving, workspace, first_workspace = np.array(
        [
            (option.saved, option.waiting, option.static, option.arriving, option.workspace, max(option.workspace, option.first_workspace))
            for option in block.options
        ],
        dtype=np.int64,
    ).T
    criteria = [seconds[:, 0], per_step, static, workspace, first_workspace]
    if has_backward:
        criteria += [saved, static - arriving]
    if splits_backward:
        criteria += [seconds[:, 1], seconds[:, 2], waiting]
    elif has_backward:
        criteria.append(seconds[:, 1] + seconds[:, 2])
    table = np.stack(criteria, axis=1)
    no_worse = (table[:, None] <= table[None]).all(axis=2)  # of each pair: the first option is no worse than the second
    numbers = np.arange(len(table))
    dominates = no_worse & (~no_worse.T | (numbers[:, None] < numbers[None]))  # of equal options the first is kept
    np.fill_diagonal(dominates, False)
    worthwhile = np.flatnonzero(~dominates.any(axis=0))
    return BlockRun(
        first=number,
        length=1,
        indices=tuple(worthwhile.tolist()),
        seconds=seconds[worthwhile],
        per_step=per_step[worthwhile],
        saved=saved[worthwhile],
        waiting=waiting[worthwhile],
        static=static[worthwhile],
        arriving=arriving[worthwhile],
        workspace=workspace[worthwhile],
        first_workspace=first_workspace[worthwhile],
        cut=block.cut,
        stage=block.stage,
    )
