"""Greedy assignments of blocks to stages and options, made in milliseconds without a solver.

The cutting planes of `assignment` start from them, and pipeline configurations are ranked by them.

Comes in: an `AssignmentProblem`. Goes out: assignments that fit the memory, as the stage and the option of every block. Two greedy steps
take turns:

- Options, given the stages (`_GreedySearch.choose`). A pipeline rank starts with the fastest option of every block. While it needs too many
  bytes, it exchanges the option of some blocks for a leaner one: the exchange with the least *slope*, more seconds / fewer bytes, as in the
  greedy algorithm for a knapsack. Pipeline ranks are independent of each other.
- Stages, given the bytes that each stage may use, its *share* (`_GreedySearch.split`). The least seconds that no stage exceeds are found by
  bisection; for given seconds each stage, in order, gets as many blocks as it can.

Where pipeline ranks hold several stages, their first stages have one weight, their second ones another, and so on: a round takes about the
sum of the slowest first, second and third stage. So for eight blocks on each rank of three stages, 3, 3 and 2 on all ranks are better than
3, 3 and 2 on some and 2, 3 and 3 on others. On a V of stages (ZB-V, V-Half), where the last stage is on the rank of the first, the sums of
ranks matter more: the last stage of a rank may use the seconds that its others leave (`is_pooled`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from autopar.search.pipeline.assignment_problem import RECEIVES_AT_ONCE, AssignmentProblem, BlockRun
from autopar.search.pipeline.peaks import has_first_backward

# Halvings of the interval of seconds that no stage exceeds, doublings to find one that can be met, and turns of the two steps.
BISECTIONS = 12
DOUBLINGS = 8
TURNS = 3

Ends = tuple[int, ...]
"""Per stage the number of blocks on it and on the stages before it."""


def assign_greedily(problem: AssignmentProblem) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Assignments that fit the memory and meet the pins, if there are any.

    Each is a pair: the stages of all blocks, and the options of all blocks as indices into `BlockOptions.options`.
    """
    search = _GreedySearch(problem)
    seen: set[Ends] = set()
    for weights, is_pooled in search.find_weights():
        shares: Sequence[float] = [math.inf] * problem.schedule.stages
        ends: Ends | None = search.split_evenly(weights)
        for turn in range(TURNS + 1):
            if turn:
                ends = search.split(weights, shares, is_pooled)
            if ends is None or ends in seen:
                continue
            seen.add(ends)
            options = search.choose(ends)
            if options is not None:
                yield _stages_of(ends), options
            if turn:
                shares = search.share(ends, options)


def find_leanest(problem: AssignmentProblem) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(stages, options) of all blocks, in equal numbers per stage, each in the option that needs the fewest bytes; they may not fit."""
    search = _GreedySearch(problem)
    stages = _stages_of(search.clip([search.blocks * (stage + 1) // search.stages for stage in range(search.stages)]))
    options = []
    for block, stage in enumerate(stages):
        run = problem.runs[search.run_of[block]]
        moment = np.array([search.held[stage]], dtype=np.int64)
        options.append(run.indices[int((run.held(*moment.T) + run.first_workspace).argmin())])
    return stages, tuple(options)


def _stages_of(ends: Sequence[int]) -> tuple[int, ...]:
    """The stage of each block."""
    return tuple(np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0)).tolist())


@dataclass(frozen=True, slots=True)
class _OptionSwap:
    """An exchange of one option for a leaner one, that any block of a run can make: `seconds` more and `nbytes` less."""

    slope: float
    seconds: float
    nbytes: int


@dataclass(slots=True)
class _RunOnStage:
    """The blocks of one run on one stage.

    Attributes:
        stage: the stage; `position`: its index among the stages of its pipeline rank.
        first: index of the first of these blocks.
        index: of the run.
        counts: number of blocks in each option of the run.
    """

    stage: int
    position: int
    first: int
    index: int
    run: BlockRun
    counts: list[int]


class _GreedySearch:
    """The two greedy steps on one problem.

    Attributes:
        stages, ranks, blocks: numbers of stages, pipeline ranks and blocks.
        run_of: per block the index of its run.
        seconds: per block the seconds of its fastest option.
        least, most: per stage the bounds of the number of blocks on it and on the stages before.
        held: per stage the micro-batches between forward and backward, and between input and weight gradients, at the moment at which its
            pipeline rank would hold most if all blocks were alike.
    """

    def __init__(self, problem: AssignmentProblem) -> None:
        self.problem = problem
        self.stages = problem.schedule.stages
        self.ranks = problem.schedule.ranks
        self.blocks = len(problem.blocks)
        self.run_of = [index for index, run in enumerate(problem.runs) for _ in range(run.length)]
        self.seconds = [float(run.seconds.sum(axis=1).min()) for run in problem.runs for _ in range(run.length)]
        self.least, self.most = _find_limits(problem)
        self.held = [(0, 0, 1)] * self.stages
        for stages, holdings in zip(problem.stages_of, problem.holdings, strict=True):
            if len(holdings):
                fullest = holdings[int(holdings.sum(axis=(1, 2)).argmax())]
                for stage, (in_flight, waiting, has_gradients) in zip(stages, fullest.tolist(), strict=True):
                    self.held[stage] = (in_flight, waiting, has_gradients)
        # Per block, the number of blocks of its run from it on.
        self._left_of_run = [run.length - position for run in problem.runs for position in range(run.length)]
        self._stage_seconds_of: dict[tuple[object, ...], float] = {}
        self._exchanges: dict[tuple[int, tuple[int, int, int]], tuple[float, int, tuple[_OptionSwap, ...]]] = {}

    # --- stages ---

    def find_weights(self) -> Iterator[tuple[tuple[int, ...], bool]]:
        """Arguments of `split` to try: weights of a pipeline rank's first stage, second stage and so on, and `is_pooled`."""
        rounds = self.stages // self.ranks
        if rounds == 1:
            yield (1,), False
            return
        blocks_of_stage, remainder = divmod(-(-self.blocks // self.ranks), rounds)
        # Stages with a block more come first, or last.
        larger_first, larger_last = (
            tuple(blocks_of_stage + (number in larger) for number in range(rounds))
            for larger in (range(remainder), range(rounds - remainder, rounds))
        )
        is_v = self.problem.schedule.rank_of[-1] == 0
        for weights in dict.fromkeys(((1,) * rounds, larger_first, larger_last)) if remainder else [(1,) * rounds]:
            yield weights, False
            if is_v:
                yield weights, True

    def _clip(self, end: int, stage: int) -> int:
        return min(max(end, self.least[stage]), self.most[stage])

    def split_evenly(self, weights: Sequence[int]) -> Ends:
        """Ends of stages whose seconds are about in proportion to the weights, without regard to memory."""
        seconds = np.cumsum(self.seconds)
        weight = np.cumsum([weights[stage // self.ranks] for stage in range(self.stages)])
        return self.clip([1 + int(np.abs(seconds - seconds[-1] * part / weight[-1]).argmin()) for part in weight.tolist()])

    def clip(self, ends_without_limits: Sequence[int]) -> Ends:
        """Ends close to these that leave no stage empty and meet the pins."""
        ends: list[int] = []
        for stage, end in enumerate(ends_without_limits):
            ends.append(max(self._clip(end, stage), ends[-1] + 1 if ends else 1))
        return tuple(ends)

    def split(self, weights: Sequence[int], shares: Sequence[float], is_pooled: bool) -> Ends | None:
        """Ends of stages such that the largest seconds / weight of any is as small as can be.

        Args:
            weights: of a pipeline rank's first stage, second stage and so on.
            shares: bytes that each stage may use.
            is_pooled: whether a rank's last stage may use the seconds that the others leave of those for the whole rank.

        Returns None when no stages fit the shares.
        """
        low, high = 0.0, sum(self.seconds) / self.ranks
        best_ends = None
        for _ in range(DOUBLINGS):
            best_ends = self._fill(weights, shares, is_pooled, high)
            if best_ends is not None:
                break
            low, high = high, 2 * high
        if best_ends is None:
            return None
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            ends = self._fill(weights, shares, is_pooled, middle)
            if ends is None:
                low = middle
            else:
                best_ends, high = ends, middle
        return best_ends

    def _fill(self, weights: Sequence[int], shares: Sequence[float], is_pooled: bool, seconds: float) -> Ends | None:
        """Ends of stages that have as many blocks each as fit their part of a pipeline rank's `seconds`; None if blocks are left over."""
        ends: list[int] = []
        used = [0.0] * self.ranks
        start = 0
        for stage, rank in enumerate(self.problem.schedule.rank_of):
            number = stage // self.ranks
            limit = seconds * weights[number] / sum(weights)
            if is_pooled and number == len(weights) - 1:
                limit = seconds - used[rank]
            least, most = max(start + 1, self.least[stage]), self.most[stage]
            if least > most or self._stage_seconds(stage, start, least, shares[stage]) > limit:
                return None
            while least < most:
                middle = (least + most + 1) // 2
                if self._stage_seconds(stage, start, middle, shares[stage]) > limit:
                    most = middle - 1
                else:
                    least = middle
            if is_pooled:
                used[rank] += self._stage_seconds(stage, start, least, shares[stage])
            start = least
            ends.append(start)
        return tuple(ends)

    def _stage_seconds(self, stage: int, start: int, end: int, share: float) -> float:
        """Seconds of a micro-batch on a stage of blocks `start` to `end` - 1, in options that fit `share` bytes; infinite if none do."""
        first_run, last_run = self.run_of[start], self.run_of[end - 1]
        # Only how many blocks of each run there are matters.
        counts = (self._left_of_run[start], end - self.problem.runs[last_run].first) if first_run < last_run else (end - start,)
        key = first_run, last_run, counts, self.held[stage], share
        if key not in self._stage_seconds_of:
            self._stage_seconds_of[key] = self._find_stage_seconds(start, end, self.held[stage], share)
        return self._stage_seconds_of[key]

    def _find_stage_seconds(self, start: int, end: int, held: tuple[int, int, int], share: float) -> float:
        """As `_stage_seconds`, when `held` micro-batches are held: exchanges are made in order of their slopes until the bytes fit."""
        seconds, excess = 0.0, -share
        exchanges: list[tuple[_OptionSwap, int]] = []
        for index in range(self.run_of[start], self.run_of[end - 1] + 1):
            run = self.problem.runs[index]
            count = min(end, run.first + run.length) - max(start, run.first)
            fastest, nbytes, exchanges_of_run = self._find_exchanges(index, held)
            seconds += count * fastest
            excess += count * nbytes
            exchanges += [(exchange, count) for exchange in exchanges_of_run]
        if excess <= 0:
            return seconds
        for exchange, count in sorted(exchanges, key=lambda pair: pair[0].slope):
            exchanged = min(count, math.ceil(excess / exchange.nbytes))
            seconds += exchanged * exchange.seconds
            excess -= exchanged * exchange.nbytes
            if excess <= 0:
                return seconds
        return math.inf

    def _find_exchanges(self, index: int, held: tuple[int, int, int]) -> tuple[float, int, tuple[_OptionSwap, ...]]:
        """(seconds of a run's fastest option, its bytes, exchanges from it to leaner ones by slope), with `held` micro-batches held."""
        key = index, held
        if key not in self._exchanges:
            run = self.problem.runs[index]
            seconds = run.seconds.sum(axis=1)
            nbytes = run.held(*np.array([held], dtype=np.int64).T)[0]
            fastest = option = int(np.lexsort((nbytes, seconds))[0])
            exchanges = []
            while True:
                leaner = np.flatnonzero(nbytes < nbytes[option])
                if not len(leaner):
                    break
                slopes = (seconds[leaner] - seconds[option]) / (nbytes[option] - nbytes[leaner])
                best = int(leaner[slopes.argmin()])
                exchanges.append(
                    _OptionSwap(float(slopes.min()), float(seconds[best] - seconds[option]), int(nbytes[option] - nbytes[best]))
                )
                option = best
            self._exchanges[key] = float(seconds[fastest]), int(nbytes[fastest]), tuple(exchanges)
        return self._exchanges[key]

    # --- options ---

    def choose(self, ends: Ends) -> tuple[int, ...] | None:
        """An option per block with which every pipeline rank is within its budget; None when a rank can't be."""
        options = [0] * self.blocks
        for rank in range(self.ranks):
            runs_on_stages = self._find_runs_on_stages(rank, ends)
            if not self._fit(rank, ends, runs_on_stages):
                return None
            for part in runs_on_stages:
                chosen = [option for option, count in zip(part.run.indices, part.counts, strict=True) for _ in range(count)]
                options[part.first : part.first + len(chosen)] = chosen
        return tuple(options)

    def _find_runs_on_stages(self, rank: int, ends: Ends) -> list[_RunOnStage]:
        """The blocks on a pipeline rank, by stage and run, all in the fastest option of their run."""
        parts = []
        for position, stage in enumerate(self.problem.stages_of[rank]):
            start = ends[stage - 1] if stage else 0
            for index in range(self.run_of[start], self.run_of[ends[stage] - 1] + 1):
                run = self.problem.runs[index]
                first = max(start, run.first)
                counts = [0] * len(run.indices)
                counts[int(run.seconds.sum(axis=1).argmin())] = min(ends[stage], run.first + run.length) - first
                parts.append(_RunOnStage(stage, position, first, index, run, counts))
        return parts

    def _fit(self, rank: int, ends: Ends, parts: Sequence[_RunOnStage]) -> bool:
        """Exchange options, in `parts`, until the pipeline rank's bytes are within its budget; returns False if they can't be."""
        holdings = self.problem.holdings[rank]
        # A program without a schedule has moments of its own (`AssignmentProblem.held`), and receives nothing.
        has_moments = len(holdings) and not self.problem.is_whole
        moments = holdings if has_moments else np.zeros((1, len(self.problem.stages_of[rank]), 3), dtype=np.int64)
        # Per part the bytes of each option at each moment of the schedule, shape (moments, options).
        nbytes = [self.problem.held(part.index, moments[:, part.position]) for part in parts]
        seconds = [part.run.seconds.sum(axis=1) for part in parts]
        received = moments[:, :, 0] @ np.array([_received_bytes(self.problem, stage, ends) for stage in self.problem.stages_of[rank]])
        budget = self.problem.budgets[rank] - _message_bytes(self.problem, rank, ends)
        needed = attrgetter("first_workspace" if has_first_backward(holdings) else "workspace")
        for _ in range(sum(len(part.counts) for part in parts) * 4):
            used = received + np.sum([table @ np.array(part.counts) for table, part in zip(nbytes, parts, strict=True)], axis=0)
            workspace = max(int(needed(part.run)[option]) for part in parts for option, count in enumerate(part.counts) if count)
            moment = int(used.argmax())
            excess = int(used[moment]) + workspace - budget
            if excess <= 0:
                return True
            best: tuple[float, _RunOnStage, int, int, int] | None = None
            for part, table, seconds_of in zip(parts, nbytes, seconds, strict=True):
                option_nbytes = table[moment]
                for option, count in enumerate(part.counts):
                    if not count:
                        continue
                    fewer_bytes = option_nbytes[option] - option_nbytes
                    for leaner in np.flatnonzero(fewer_bytes > 0).tolist():
                        slope = float((seconds_of[leaner] - seconds_of[option]) / fewer_bytes[leaner])
                        if best is None or slope < best[0]:
                            best = slope, part, option, leaner, int(fewer_bytes[leaner])
            if best is None:
                return False
            _, part, option, leaner, fewer_per_block = best
            exchanged = min(part.counts[option], -(-excess // fewer_per_block))
            part.counts[option] -= exchanged
            part.counts[leaner] += exchanged
        return False

    def share(self, ends: Ends, options: Sequence[int] | None) -> list[float]:
        """Bytes of its pipeline rank that each stage may use: what it uses now, and an equal part of what the rank has unused.

        Without `options`, blocks count in their leanest ones.
        """
        shares = [0.0] * self.stages
        for rank, stages in enumerate(self.problem.stages_of):
            used, received, workspace = [], 0, 0
            for stage in stages:
                in_flight, waiting, _ = self.held[stage]
                received += in_flight * _received_bytes(self.problem, stage, ends)
                stage_nbytes = 0
                for number in range(ends[stage - 1] if stage else 0, ends[stage]):
                    block_options = self.problem.blocks[number].options
                    nbytes_of = [o.static + in_flight * o.saved + waiting * o.waiting for o in block_options]
                    chosen = nbytes_of.index(min(nbytes_of)) if options is None else options[number]
                    stage_nbytes += nbytes_of[chosen]
                    workspace = max(workspace, block_options[chosen].workspace)
                used.append(stage_nbytes)
            unused = self.problem.budgets[rank] - _message_bytes(self.problem, rank, ends) - workspace - received - sum(used)
            for stage, nbytes in zip(stages, used, strict=True):
                shares[stage] = nbytes + unused / len(stages)
        return shares


def _message_bytes(problem: AssignmentProblem, rank: int, ends: Ends) -> int:
    """Bytes of a pipeline rank's receive buffers."""
    cuts = (problem.blocks[ends[stage] - 1].cut.nbytes for stage in problem.messages_to[rank])
    return RECEIVES_AT_ONCE * max(cuts, default=0)


def _received_bytes(problem: AssignmentProblem, stage: int, ends: Ends) -> int:
    """Bytes per micro-batch that a stage holds of values which blocks on earlier stages read too."""
    return problem.blocks[ends[stage - 1] - 1].cut.saved if stage else 0


def _find_limits(problem: AssignmentProblem) -> tuple[list[int], list[int]]:
    """Per stage the least and the most blocks on it and the stages before, such that no stage is empty and pins are met."""
    stages, blocks = problem.schedule.stages, len(problem.blocks)
    least, most = list(range(1, stages + 1)), [blocks - (stages - 1 - stage) for stage in range(stages)]
    least[-1] = blocks
    for number, block in enumerate(problem.blocks):
        if block.stage is not None:
            least[block.stage] = max(least[block.stage], number + 1)
            if block.stage:
                most[block.stage - 1] = min(most[block.stage - 1], number)
    for stage in range(stages - 2, -1, -1):
        most[stage] = min(most[stage], most[stage + 1] - 1)
    for stage in range(1, stages):
        least[stage] = max(least[stage], least[stage - 1] + 1)
    return least, most
