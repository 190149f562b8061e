"""Greedy assignments of blocks to stages and options, made in milliseconds without a solver.

The cutting planes of `assignment` start from them, and pipeline configurations are ranked by them.

Comes in: an `AssignmentProblem`. Goes out: stages and options per block that fit the memory. Two greedy steps take turns:

- Options, given the stages (`_GreedySearch.choose`): a rank begins with the fastest of every block and, while its bytes are too many, makes
  the exchange that saves most bytes for its time, as in a knapsack. Ranks are independent of each other.
- Stages, given each stage's share of its rank's bytes (`_GreedySearch.split`): the least time that no stage exceeds, by bisection; for
  a given time each stage takes as many blocks as it can.

Where ranks hold several stages, the first ones of all ranks get one weight, the second ones another: with eight layers for a rank of three
stages, 3, 3 and 2 are better than any mixture of twos and threes, since a round takes about the sum of its slowest first, second and third
stages. On a V of stages the sums of ranks matter more: its last stage may use the seconds that its first doesn't (`is_pooled`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from autopar.search.pipeline.assignment_problem import RECEIVES_AT_ONCE, AssignmentProblem, BlockRun

# Halvings of the time that no stage exceeds, doublings to find one that can be met, and turns of the two steps.
BISECTIONS = 12
DOUBLINGS = 8
TURNS = 3

Ends = tuple[int, ...]
"""Per stage the number of blocks on it and on the stages before it."""


def assign_greedily(problem: AssignmentProblem) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(stages, options) per block of assignments that fit the memory and the pins, if any; options are indices into a block's."""
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
    """(stages, options) of even numbers of blocks, each in the option that needs least; they may not fit."""
    search = _GreedySearch(problem)
    stages = _stages_of(search.clip([search.blocks * (stage + 1) // search.stages for stage in range(search.stages)]))
    options = []
    for block, stage in enumerate(stages):
        run = problem.runs[search.run_of[block]]
        full, waiting = search.held[stage]
        options.append(run.indices[int((run.static + full * run.saved + waiting * run.waiting + run.workspace).argmin())])
    return stages, tuple(options)


def _stages_of(ends: Sequence[int]) -> tuple[int, ...]:
    """The stage of each block."""
    return tuple(np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0)).tolist())


@dataclass(frozen=True, slots=True)
class _Exchange:
    """An exchange of one option for a leaner one, of every block of a run: seconds more and bytes less of each."""

    slope: float
    seconds: float
    nbytes: int


@dataclass(slots=True)
class _RunOnStage:
    """The blocks of one run on one stage: how many are in which option."""

    stage: int
    position: int  # of the stage on its rank
    first: int  # block
    run: BlockRun
    counts: list[int]


class _GreedySearch:
    """The two steps on one problem, and what both need to know of it."""

    def __init__(self, problem: AssignmentProblem) -> None:
        self.problem = problem
        self.stages = problem.schedule.stages
        self.ranks = problem.schedule.ranks
        self.blocks = len(problem.blocks)
        self.run_of = [index for index, run in enumerate(problem.runs) for _ in range(run.length)]
        self.seconds = [float(run.seconds.sum(axis=1).min()) for run in problem.runs for _ in range(run.length)]
        self.least, self.most = _find_limits(problem)
        # Micro-batches of each stage at the moment when its rank would hold most, were all blocks alike.
        self.held = [(0, 0)] * self.stages
        for own, holdings in zip(problem.stages_of, problem.holdings, strict=True):
            if len(holdings):
                fullest = holdings[int(holdings.sum(axis=(1, 2)).argmax())]
                for stage, (full, waiting) in zip(own, fullest.tolist(), strict=True):
                    self.held[stage] = (full, waiting)
        self._begins = [run.first for run in problem.runs]
        self._behind = [
            run.length - position for run in problem.runs for position in range(run.length)
        ]  # blocks of its run from each block on
        self._known_seconds: dict[tuple[object, ...], float] = {}
        self._exchanges: dict[tuple[int, tuple[int, int]], tuple[float, int, tuple[_Exchange, ...]]] = {}

    # --- stages ---

    def find_weights(self) -> Iterator[tuple[tuple[int, ...], bool]]:
        """Weights of a rank's first stage, second, and so on, and whether the last may use the seconds that the others don't."""
        rounds = self.stages // self.ranks
        if rounds == 1:
            yield (1,), False
            return
        each, more = divmod(-(-self.blocks // self.ranks), rounds)
        first, last = ([each + (number in large) for number in range(rounds)] for large in (range(more), range(rounds - more, rounds)))
        is_v = self.problem.schedule.rank_of[-1] == 0
        for weights in dict.fromkeys(((1,) * rounds, tuple(first), tuple(last))) if more else [(1,) * rounds]:
            yield weights, False
            if is_v:
                yield weights, True

    def _clip(self, end: int, stage: int) -> int:
        return min(max(end, self.least[stage]), self.most[stage])

    def split_evenly(self, weights: Sequence[int]) -> Ends:
        """Where stages of about equal time, but for the weights, end without regard to memory."""
        done = np.cumsum(self.seconds)
        parts = np.cumsum([weights[stage // self.ranks] for stage in range(self.stages)])
        return self.clip([1 + int(np.abs(done - done[-1] * part / parts[-1]).argmin()) for part in parts.tolist()])

    def clip(self, wanted: Sequence[int]) -> Ends:
        """Ends close to those wanted that leave no stage empty and keep the pins."""
        ends: list[int] = []
        for stage, end in enumerate(wanted):
            ends.append(max(self._clip(end, stage), ends[-1] + 1 if ends else 1))
        return tuple(ends)

    def split(self, weights: Sequence[int], shares: Sequence[float], is_pooled: bool) -> Ends | None:
        """Where stages end so that the slowest, but for the weights, is as fast as can be; None when blocks don't fit into the shares."""
        low, high = 0.0, sum(self.seconds) / self.ranks
        best = None
        for _ in range(DOUBLINGS):
            best = self._fill(weights, shares, is_pooled, high)
            if best is not None:
                break
            low, high = high, 2 * high
        if best is None:
            return None
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            filled = self._fill(weights, shares, is_pooled, middle)
            if filled is None:
                low = middle
            else:
                best, high = filled, middle
        return best

    def _fill(self, weights: Sequence[int], shares: Sequence[float], is_pooled: bool, seconds: float) -> Ends | None:
        """Ends of stages that each hold as many blocks as their part of a rank's seconds allows; None when they don't hold all."""
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
        """Seconds of a micro-batch on a stage of these blocks, in the options that its bytes allow; infinite when none do."""
        first, last = self.run_of[start], self.run_of[end - 1]
        # Of the blocks it matters only how many of each run there are.
        counts = (self._behind[start], end - self._begins[last]) if first < last else (end - start,)
        key = first, last, counts, self.held[stage], share
        if key not in self._known_seconds:
            self._known_seconds[key] = self._find_stage_seconds(start, end, self.held[stage], share)
        return self._known_seconds[key]

    def _find_stage_seconds(self, start: int, end: int, held: tuple[int, int], share: float) -> float:
        seconds, excess = 0.0, -share
        exchanges: list[tuple[_Exchange, int]] = []
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

    def _find_exchanges(self, index: int, held: tuple[int, int]) -> tuple[float, int, tuple[_Exchange, ...]]:
        """A run's fastest option, and the exchanges for leaner ones worth making, cheapest first, where so many micro-batches are held."""
        key = index, held
        if key not in self._exchanges:
            run = self.problem.runs[index]
            seconds = run.seconds.sum(axis=1)
            nbytes = run.static + held[0] * run.saved + held[1] * run.waiting
            at = int(np.lexsort((nbytes, seconds))[0])
            fastest, exchanges = at, []
            while True:
                leaner = np.flatnonzero(nbytes < nbytes[at])
                if not len(leaner):
                    break
                slopes = (seconds[leaner] - seconds[at]) / (nbytes[at] - nbytes[leaner])
                to = int(leaner[slopes.argmin()])
                exchanges.append(_Exchange(float(slopes.min()), float(seconds[to] - seconds[at]), int(nbytes[at] - nbytes[to])))
                at = to
            self._exchanges[key] = float(seconds[fastest]), int(nbytes[fastest]), tuple(exchanges)
        return self._exchanges[key]

    # --- options ---

    def choose(self, ends: Ends) -> tuple[int, ...] | None:
        """An option per block that lets every rank keep its budget; None when a rank can't."""
        options = [0] * self.blocks
        for rank in range(self.ranks):
            parts = self._runs_on(rank, ends)
            if not self._fit(rank, ends, parts):
                return None
            for part in parts:
                chosen = [option for option, count in zip(part.run.indices, part.counts, strict=True) for _ in range(count)]
                options[part.first : part.first + len(chosen)] = chosen
        return tuple(options)

    def _runs_on(self, rank: int, ends: Ends) -> list[_RunOnStage]:
        parts = []
        for position, stage in enumerate(self.problem.stages_of[rank]):
            start = ends[stage - 1] if stage else 0
            for index in range(self.run_of[start], self.run_of[ends[stage] - 1] + 1):
                run = self.problem.runs[index]
                first = max(start, run.first)
                counts = [0] * len(run.indices)
                counts[int(run.seconds.sum(axis=1).argmin())] = min(ends[stage], run.first + run.length) - first
                parts.append(_RunOnStage(stage, position, first, run, counts))
        return parts

    def _fit(self, rank: int, ends: Ends, parts: Sequence[_RunOnStage]) -> bool:
        """Exchange options until the rank's bytes are within its budget."""
        holdings = self.problem.holdings[rank]
        moments = holdings if len(holdings) else np.zeros((1, len(self.problem.stages_of[rank]), 2), dtype=np.int64)
        # Per part: bytes of each option at each moment, shape (moments, options).
        nbytes = [
            part.run.static + moments[:, part.position, :1] * part.run.saved + moments[:, part.position, 1:] * part.run.waiting
            for part in parts
        ]
        seconds = [part.run.seconds.sum(axis=1) for part in parts]
        received = moments[:, :, 0] @ np.array([_received_bytes(self.problem, stage, ends) for stage in self.problem.stages_of[rank]])
        budget = self.problem.budgets[rank] - _message_bytes(self.problem, rank, ends)
        for _ in range(sum(len(part.counts) for part in parts) * 4):
            used = received + np.sum([table @ np.array(part.counts) for table, part in zip(nbytes, parts, strict=True)], axis=0)
            workspace = max(int(part.run.workspace[option]) for part in parts for option, count in enumerate(part.counts) if count)
            moment = int(used.argmax())
            excess = int(used[moment]) + workspace - budget
            if excess <= 0:
                return True
            best: tuple[float, _RunOnStage, int, int, int] | None = None
            for part, table, seconds_of in zip(parts, nbytes, seconds, strict=True):
                at = table[moment]
                for option, count in enumerate(part.counts):
                    if not count:
                        continue
                    saved = at[option] - at
                    for leaner in np.flatnonzero(saved > 0).tolist():
                        slope = float((seconds_of[leaner] - seconds_of[option]) / saved[leaner])
                        if best is None or slope < best[0]:
                            best = slope, part, option, leaner, int(saved[leaner])
            if best is None:
                return False
            _, part, option, leaner, saved_bytes = best
            moved = min(part.counts[option], -(-excess // saved_bytes))
            part.counts[option] -= moved
            part.counts[leaner] += moved
        return False

    def share(self, ends: Ends, options: Sequence[int] | None) -> list[float]:
        """Bytes of its rank that each stage may use: what it uses now, and an equal part of what the rank has unused."""
        shares = [0.0] * self.stages
        for rank, own in enumerate(self.problem.stages_of):
            used, received, workspace = [], 0, 0
            for stage in own:
                full, waiting = self.held[stage]
                received += full * _received_bytes(self.problem, stage, ends)
                total = 0
                for block in range(ends[stage - 1] if stage else 0, ends[stage]):
                    options_of = self.problem.blocks[block].options
                    needs = [option.static + full * option.saved + waiting * option.waiting for option in options_of]
                    at = needs.index(min(needs)) if options is None else options[block]
                    total += needs[at]
                    workspace = max(workspace, options_of[at].workspace)
                used.append(total)
            unused = self.problem.budgets[rank] - _message_bytes(self.problem, rank, ends) - workspace - received - sum(used)
            for stage, nbytes in zip(own, used, strict=True):
                shares[stage] = nbytes + unused / len(own)
        return shares


def _message_bytes(problem: AssignmentProblem, rank: int, ends: Ends) -> int:
    """Bytes of a rank's receive buffers."""
    cuts = (problem.blocks[ends[stage] - 1].cut.nbytes for stage in problem.messages_to[rank])
    return RECEIVES_AT_ONCE * max(cuts, default=0)


def _received_bytes(problem: AssignmentProblem, stage: int, ends: Ends) -> int:
    """Bytes per micro-batch that a stage holds of values which a block before it has read."""
    return problem.blocks[ends[stage - 1] - 1].cut.saved if stage else 0


def _find_limits(problem: AssignmentProblem) -> tuple[list[int], list[int]]:
    """Per stage the least and the most blocks that may be on it and the stages before: none is empty, pins are met."""
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
