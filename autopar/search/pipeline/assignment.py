"""The assignment of blocks to stages and options that takes the least simulated time, by cutting planes, with a lower bound.

Comes in: the options of every block, a schedule, memory budgets. Goes out: an `Assignment`.

Under a fixed schedule a step takes as long as the longest path through it: a maximum of linear functions of the stages' seconds, one for
each path, of which there are too many to write down. So the model (stated in `assignment_model`) starts with few paths. Its solution is
simulated, the longest path of the simulation is added to the model, and so on, until the simulated time of the best assignment is the
model's bound: the cutting-plane method of Kelley (1960, "The cutting-plane method for solving convex programs"). The steps are:

1. `start`: greedy assignments (`greedy`), all that fit: something to return, and paths that matter;
2. `relax`: the model without integers, in which a round is cheap and most paths are found;
3. `narrow`: steps 4 and 6 on a smaller model, of the options alone that the relaxed model or the best greedy assignment uses;
4. `place`, if pipeline ranks hold one stage each: the model with whole blocks per stage in fractions of options. Its bound is nearly that
   of the whole model in a fraction of the time, and its stages, with whole options, are an assignment;
5. `guide`, if they hold several: the model with a guess of the schedule's seconds. Here paths are so many that without it the model's
   solutions stay poor for long;
6. `finish`: the whole model.

All paths are paths of the schedule, so every bound of the model with all options holds, up to the solver's tolerance. The guess of step 5
and the few options of step 3 only propose assignments. One exception: if the tolerance lets a solution use a little more memory than the
budget, the model is built again for that much less (`_AssignmentSearch.tighten`), and later bounds are of assignments that fit that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from autopar.errors import InfeasibleError, SolverError
from autopar.schedules import Schedule
from autopar.search.pipeline.assignment_model import AssignmentModel, Point, expand_counts
from autopar.search.pipeline.assignment_problem import (
    PHASES,
    AssignmentCost,
    AssignmentProblem,
    BlockRun,
    Floats,
    Ints,
    compute_cost,
    longest_path,
    make_problem,
)
from autopar.search.pipeline.block_options import BlockOptions
from autopar.search.pipeline.greedy import assign_greedily
from autopar.units import format_bytes

# The most rounds of `relax` and `place`; a round that gains less than this share of the requested gap has gained nothing.
RELAXED_ROUNDS = 40
PLACED_ROUNDS = 8
GAP_SHARE = 0.25
# After an assignment, the same with one pipeline rank slower by this factor is simulated: its longest path would matter next. The number of
# ranks for which this is done is such that at most so many actions are simulated.
TILT = 0.03
TILTED_ACTIONS = 300_000
# `narrow` may use this share of the time left, on options of which the relaxed model has more than so many blocks on some stage.
NARROW_SHARE = 0.6
TRACE = 1e-3
# `guide` has so many rounds at most, this share of the time, and stops at this gap: a guess needs no proof.
GUIDED_ROUNDS = 3
GUIDED_SHARE = 0.2
GUIDED_GAP = 0.003
# The gap at which the search for the assignment of the fewest bytes stops.
LEANEST_GAP = 1e-4
# `finish` ends when neither the best assignment nor the bound has improved for so many rounds and seconds.
PATIENT_ROUNDS = 3
PATIENCE = 2.0


@dataclass(frozen=True, slots=True)
class Assignment:
    """A stage and an option per block, and what is known about them.

    Attributes:
        stages: stage of each block.
        options: option of each block, as an index into its options.
        objective: seconds of a step by the paths that the model has.
        simulated: seconds of a step by the simulated schedule.
        bound: a lower bound on the seconds of any assignment within the budget; where the model was tightened, of any within the tightened
            budget.
        status: ``optimal`` when `simulated` is within the requested gap of the bound, ``feasible`` when the time was up first,
            ``beyond`` when it is known that nothing takes less than the cutoff.
        iterations: number of models solved.
        peak: bytes of each pipeline rank.
    """

    stages: tuple[int, ...]
    options: tuple[int, ...]
    objective: float
    simulated: float
    bound: float
    status: str
    iterations: int
    peak: tuple[int, ...]


def assign(
    blocks: Sequence[BlockOptions],
    schedule: Schedule,
    budget: int | Sequence[int],
    *,
    time_limit: float = 10.0,
    gap: float = 1e-3,
    cutoff: float = math.inf,
) -> Assignment:
    """The assignment of blocks to stages and options that takes the least simulated time and fits the budget.

    Args:
        blocks: the options of every block, in the order of the chain.
        schedule: computing actions of each pipeline rank; its stages stand in a chain.
        budget: bytes of every pipeline rank, or of each.
        time_limit: seconds; when they are up, the best assignment found is returned with the bound that was reached.
        gap: relative distance of `simulated` from `bound` at which the search ends.
        cutoff: seconds; the search ends as soon as it is known that no assignment takes less.

    Raises InfeasibleError when nothing fits, with the bytes that the leanest assignment needs in its ``needed`` attribute, or when there
    are fewer blocks than stages, or pins that can't be met; InputError for a pin or budgets that aren't of this schedule; SolverError
    when the time was up, or nothing took less than the cutoff, before any assignment was found.
    """
    problem = make_problem(blocks, schedule, budget)
    search = _AssignmentSearch(problem, AssignmentModel(problem, problem.budgets), gap, cutoff, time.perf_counter() + time_limit)
    try:
        search.start()
        search.relax()
        search.narrow()
        if schedule.chunks > 1:
            search.guide(GUIDED_SHARE * time_limit)
        else:
            search.place()
        search.finish()
    except InfeasibleError:
        # If there is an assignment, it is only the tightened model, for a little less memory, that nothing fits.
        if search.best is None:
            _offer_leanest(search, time_limit)
    return search.result()


def assign_by_block(
    blocks: Sequence[BlockOptions], schedule: Schedule, budget: int, *, time_limit: float, gap: float, cutoff: float
) -> tuple[Assignment, AssignmentCost]:
    """The assignment that fits the budget when the memory of its stages is gone through block by block, and what it costs so.

    That is nearly always what `assign` finds, whose model of memory is coarser and needs no less. Only where a schedule runs weight
    gradients apart may what waits for them be more, half-way through a backward, than the model has: then the model gets as much less.
    Arguments and errors are those of `assign`.
    """
    problem, left = make_problem(blocks, schedule, budget), budget
    while True:
        try:
            assignment = assign(blocks, schedule, left, time_limit=time_limit, gap=gap, cutoff=cutoff)
        except InfeasibleError as error:
            error.needed += budget - left if error.needed else 0
            raise
        cost = compute_cost(problem, assignment.stages, assignment.options, is_bound=False)
        excess = max(cost.peak) - budget
        if excess <= 0:
            return assignment, cost
        left -= excess


@dataclass
class _AssignmentSearch:
    """The state of one search.

    Attributes:
        model: the model with the paths so far.
        gap, cutoff: as of `assign`.
        deadline: when to stop, in seconds of `time.perf_counter`.
        best: the best assignment so far; `bound`, `status` and `iterations` are filled in by `result`.
        bound: the lower bound so far.
        rounds: number of models solved.
        tightened_nbytes: bytes that the model's budgets are less than those of the problem.
        relaxed_options: per run the options that the relaxed model uses.
    """

    problem: AssignmentProblem
    model: AssignmentModel
    gap: float
    cutoff: float
    deadline: float
    best: Assignment | None = None
    bound: float = 0.0
    rounds: int = 0
    tightened_nbytes: int = 0
    relaxed_options: list[frozenset[int]] | None = None

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.perf_counter()

    @property
    def is_over(self) -> bool:
        """Whether the gap is closed, the cutoff out of reach, or the time up."""
        closed = self.best is not None and self.best.simulated <= self.bound * (1 + self.gap)
        return closed or self.bound >= self.cutoff or self.seconds_left <= 0

    def start(self) -> None:
        """Step 1: offer the greedy assignments."""
        for stages, options in assign_greedily(self.problem):
            self.offer(stages, options)

    def relax(self) -> None:
        """Step 2: find paths with counts in fractions, as long as the bound improves."""
        previous_bound = 0.0
        for _ in range(RELAXED_ROUNDS):
            point = self.solve(self.model, self.seconds_left, free=self.model.integers)
            if point is None or self.is_over:
                return
            self.relaxed_options = _used_options(self.problem, point)
            simulated = self.add_paths(point.columns) + point.per_step
            if simulated <= point.bound * (1 + GAP_SHARE * self.gap) or point.bound <= previous_bound * (1 + GAP_SHARE * self.gap):
                return
            previous_bound = point.bound

    def narrow(self) -> None:
        """Step 3: solve the model with those options alone that the relaxed model or the best assignment uses."""
        if self.best is None or self.relaxed_options is None or self.is_over:
            return
        runs = []
        for run, relaxed in zip(self.problem.runs, self.relaxed_options, strict=True):
            used = relaxed | set(self.best.options[run.first : run.first + run.length])
            runs.append(_select_options(run, [index in used for index in run.indices]))
        problem = replace(self.problem, runs=tuple(runs))
        if sum(len(run.indices) for run in runs) == sum(len(run.indices) for run in self.problem.runs):
            return
        model = AssignmentModel(problem, problem.budgets, self.model.paths)
        inner = _AssignmentSearch(problem, model, self.gap, self.cutoff, time.perf_counter() + NARROW_SHARE * self.seconds_left, self.best)
        try:
            if self.problem.schedule.chunks == 1:
                inner.place()
            inner.finish()
        except InfeasibleError:
            pass  # the best assignment is kept
        self.best, self.rounds = inner.best, self.rounds + inner.rounds
        for path in inner.model.paths:
            self.model.add_path(path)

    def place(self) -> None:
        """Step 4: find paths and assignments with whole blocks per stage in fractions of options."""
        for _ in range(PLACED_ROUNDS):
            if self.is_over:
                return
            point = self.solve(self.model, self.seconds_left, free=self.model.option_counts, gap=GAP_SHARE * self.gap)
            if point is None:
                return
            simulated = self.add_paths(point.columns) + point.per_step
            rounded = self.model.solve(self.seconds_left, fixed=point, gap=GAP_SHARE * self.gap)
            if rounded is not None:
                self.offer(*expand_counts(self.problem, rounded.counts))
            if simulated <= point.bound * (1 + GAP_SHARE * self.gap):
                return

    def guide(self, seconds: float) -> None:
        """Step 5: find assignments with models that guess what a schedule of several stages per pipeline rank takes."""
        for _ in range(GUIDED_ROUNDS):
            if self.is_over:
                return
            previous_best = self.best
            guided = AssignmentModel(self.problem, self.problem.budgets, self.model.paths, is_guided=True)
            point = self.solve(guided, min(seconds, self.seconds_left), gap=GUIDED_GAP)
            if point is None:
                return
            self.offer(*expand_counts(self.problem, point.counts))
            if self.best is previous_best:
                return

    def finish(self) -> None:
        """Step 6: rounds of the whole model, as long as the best assignment or the bound improves."""
        improved_at, rounds_since = time.perf_counter(), 0
        while not self.is_over and (rounds_since < PATIENT_ROUNDS or time.perf_counter() - improved_at < PATIENCE):
            previous_best, previous_bound = self.best, self.bound
            point = self.solve(self.model, self.seconds_left, gap=GAP_SHARE * self.gap)
            if point is None:
                return
            stages, options = expand_counts(self.problem, point.counts)
            rounds_since += 1
            if not self.offer(stages, options):
                self.tighten(stages, options)
            elif self.best is not previous_best or self.bound > previous_bound * (1 + GAP_SHARE * self.gap):
                improved_at, rounds_since = time.perf_counter(), 0

    def solve(self, model: AssignmentModel, seconds: float, *, free: Ints | None = None, gap: float = 0.0) -> Point | None:
        """Solve a model once, in at most `seconds`; unless the model has a guess, its bound is one for the search."""
        self.rounds += 1
        point = model.solve(seconds, free=free, gap=gap)
        if point is not None and not model.is_guided:
            self.bound = max(self.bound, point.bound)
        return point

    def offer(self, stages: Sequence[int], options: Sequence[int]) -> bool:
        """Simulate an assignment, add its paths to the model, and keep it if it is the best.

        Returns False, and does none of this, if it doesn't fit the budgets.
        """
        cost = compute_cost(self.problem, stages, options)
        if any(peak > budget for peak, budget in zip(cost.peak, self.problem.budgets, strict=True)):
            return False
        simulated = self.add_paths(cost.columns) + cost.per_step
        if self.best is None or simulated < self.best.simulated:
            objective = max(float(path @ cost.columns) for path in self.model.paths) + cost.per_step
            self.best = Assignment(tuple(stages), tuple(options), objective, simulated, 0.0, "", 0, cost.peak)
        return True

    def tighten(self, stages: Sequence[int], options: Sequence[int]) -> None:
        """Build the model again with less memory, by what an assignment exceeds the budgets: the solver meets rows up to its tolerance.

        Bounds from here on are of assignments that fit this memory.
        """
        peaks = compute_cost(self.problem, stages, options).peak
        self.tightened_nbytes += max(peak - budget for peak, budget in zip(peaks, self.problem.budgets, strict=True))
        budgets = [budget - self.tightened_nbytes for budget in self.problem.budgets]
        self.model = AssignmentModel(self.problem, budgets, self.model.paths)

    def add_paths(self, columns: Floats) -> float:
        """Simulate the schedule, and add its longest path to the model, and those with one pipeline rank a little slower.

        Returns the seconds of the schedule.
        """
        seconds, path = longest_path(self.problem, columns)
        self.model.add_path(path)
        stages, ranks = self.problem.schedule.stages, self.problem.schedule.ranks
        actions = sum(map(len, self.problem.schedule.actions))
        for rank in np.linspace(0, ranks - 1, min(ranks, TILTED_ACTIONS // actions)).round().astype(int).tolist():
            tilted = columns.copy()
            for stage in self.problem.stages_of[rank]:
                tilted[stage : PHASES * stages : stages] *= 1 + TILT
            self.model.add_path(longest_path(self.problem, tilted)[1])
        return seconds

    def result(self) -> Assignment:
        """The best assignment, with what was proven; raises SolverError if there is none."""
        if self.best is None:
            reason = "nothing takes less than the cutoff" if self.bound >= self.cutoff else "the time is over"
            raise SolverError(f"no assignment of {len(self.problem.blocks)} blocks to {self.problem.schedule.stages} stages: {reason}")
        closed = self.best.simulated <= self.bound * (1 + self.gap)
        status = "optimal" if closed else "beyond" if self.bound >= self.cutoff else "feasible"
        return replace(self.best, bound=min(self.bound, self.best.simulated), status=status, iterations=self.rounds)


def _used_options(problem: AssignmentProblem, point: Point) -> list[frozenset[int]]:
    """Per run the options of which a point has more than `TRACE` blocks on some stage."""
    used: list[set[int]] = [set() for _ in problem.runs]
    for (index, _), counts in point.counts.items():
        used[index].update(option for option, count in zip(problem.runs[index].indices, counts.tolist(), strict=True) if count > TRACE)
    return [frozenset(options) for options in used]


def _select_options(run: BlockRun, is_selected: Sequence[bool]) -> BlockRun:
    """The run with some of its options alone; `is_selected` has an entry per option."""
    mask = np.array(is_selected)
    return replace(
        run,
        indices=tuple(index for index, selected in zip(run.indices, is_selected, strict=True) if selected),
        seconds=run.seconds[mask],
        per_step=run.per_step[mask],
        saved=run.saved[mask],
        waiting=run.waiting[mask],
        static=run.static[mask],
        arriving=run.arriving[mask],
        workspace=run.workspace[mask],
        first_workspace=run.first_workspace[mask],
    )


def _offer_leanest(search: _AssignmentSearch, time_limit: float) -> None:
    """Offer the assignment that exceeds budgets least; raises InfeasibleError, with the bytes that it needs, when it doesn't fit."""
    problem = search.problem
    where = f"{len(problem.blocks)} blocks on {problem.schedule.stages} stages under schedule {problem.schedule.name!r}"
    point = AssignmentModel(problem, problem.budgets, is_leanest=True).solve(time_limit, gap=LEANEST_GAP)
    if point is None:
        raise InfeasibleError(f"{where} don't fit the memory")
    leanest = expand_counts(problem, point.counts)
    if search.offer(*leanest):
        return
    peaks = compute_cost(problem, *leanest).peak
    rank = int(np.argmax([peak - budget for peak, budget in zip(peaks, problem.budgets, strict=True)]))
    error = InfeasibleError(
        f"{where} need {format_bytes(peaks[rank])} on pipeline rank {rank} at the leanest, {format_bytes(problem.budgets[rank])} are there"
    )
    error.needed = peaks[rank]
    raise error
