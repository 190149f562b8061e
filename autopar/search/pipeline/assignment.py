"""Block options, a schedule, a budget -> the assignment of blocks to stages and options of least simulated time, with a bound.

A step of a fixed schedule takes as long as the longest path through it: a maximum of linear functions of the stages' seconds, of which
there are too many to write down. So the model (`assignment_model`, which states it) starts with few paths; its solution is simulated, the
longest path joins the model, and so on, until the best assignment's simulated time is the model's bound: the cutting planes of
Kelley (1960).
In this order:

1. greedy assignments (`greedy assignments`), all that fit: something to return, and paths that matter;
2. the relaxed model, where a round is cheap and most paths are found;
3. the steps after this one on the model with those options alone that the relaxed model or the best greedy assignment uses: quick;
4. where ranks hold one stage each, the model with whole blocks per stage in fractions of options: its bound is nearly that of the whole
   model, at a fraction of the time; its stages, with whole options, make an assignment;
5. where ranks hold several stages, the model with a guess: there the paths are so many that the model's own solutions stay poor for long;
6. the whole model.

All paths are paths of the schedule, so every bound of the model with all options holds, to the solver's tolerance; the guess of step 5 and
the few options of step 3 only propose assignments. One exception: where the tolerance let a solution use a little more memory than there
is, the model is built again for that much less (`_AssignmentSearch.tighten`), and later bounds are of assignments that fit that.
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

# Rounds of the relaxed models at most, and the share of the gap asked for at which a round has gained nothing.
RELAXED_ROUNDS = 40
PLACED_ROUNDS = 8
GAP_SHARE = 0.25
# Beside an assignment's own times, those with one rank this much slower are simulated: the paths that would matter next. That many actions
# are walked at most.
TILT = 0.03
TILTED_ACTIONS = 300_000
# Share of the time left for the model with few options; and how many blocks must use an option in the relaxed model to make it one of
# them.
NARROW_SHARE = 0.6
TRACE = 1e-3
# Of the guided models: rounds, share of the time, and gap. A guess needs no proof.
GUIDED_ROUNDS = 3
GUIDED_SHARE = 0.2
GUIDED_GAP = 0.003
# Of the leanest assignment's bytes above the budgets.
LEANEST_GAP = 1e-4
# The search ends when neither the best assignment nor the bound has got better for so many rounds and seconds.
PATIENT_ROUNDS = 3
PATIENCE = 2.0


@dataclass(frozen=True, slots=True)
class Assignment:
    """A stage and an option per block, and what is known about them.

    Attributes:
        stages: of each block; `options`: of each block, as index into its options.
        objective: seconds by the paths that the model has; `simulated`: by the whole schedule; both with the longest `once` of a rank.
        bound: no assignment within the budget takes less; where the model was tightened, within the budget less the bytes of that.
        status: ``optimal`` when `simulated` is within the gap asked for of the bound, ``feasible`` when the time was over first,
            ``beyond`` when nothing can be better than the cutoff.
        iterations: models solved.
        peak: bytes per rank.
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
        schedule: of computing actions; its stages stand in a chain.
        budget: bytes of every rank, or of each.
        time_limit: seconds; when they are over, the best assignment found is returned with the bound that was reached.
        gap: relative distance of `simulated` from `bound` at which the search ends.
        cutoff: seconds; the search ends as soon as nothing better than this can be found.

    Raises InfeasibleError when nothing fits, with the bytes that the leanest assignment needs in its ``needed`` attribute, or when there
    are fewer blocks than stages, or pins that can't be met; InputError for a pin or budgets that aren't of this schedule; SolverError
    when the time was over, or nothing better than the cutoff was left, before any assignment was found.
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
        # Where something was found, it is the model for a little less memory that nothing fits.
        if search.best is None:
            _settle(search, time_limit)
    return search.result()


@dataclass
class _AssignmentSearch:
    """One search on its way: the model with the paths so far, the best assignment, the bound."""

    problem: AssignmentProblem
    model: AssignmentModel
    gap: float
    cutoff: float
    deadline: float
    best: Assignment | None = None
    bound: float = 0.0
    rounds: int = 0
    slack: int = 0
    used: list[frozenset[int]] | None = None

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.perf_counter()

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to be gained, or no time."""
        closed = self.best is not None and self.best.simulated <= self.bound * (1 + self.gap)
        return closed or self.bound >= self.cutoff or self.seconds_left <= 0

    def start(self) -> None:
        """Offer the greedy assignments."""
        for stages, options in assign_greedily(self.problem):
            self.offer(stages, options)

    def relax(self) -> None:
        """Find paths with continuous counts, as long as the bound moves."""
        before = 0.0
        for _ in range(RELAXED_ROUNDS):
            point = self.solve(self.model, self.seconds_left, free=self.model.integers)
            if point is None or self.is_over:
                return
            self.used = _used_options(self.problem, point)
            simulated = self.add_paths(point.columns) + point.once
            if simulated <= point.bound * (1 + GAP_SHARE * self.gap) or point.bound <= before * (1 + GAP_SHARE * self.gap):
                return
            before = point.bound

    def narrow(self) -> None:
        """Solve the model with those options alone that the relaxed model or the best assignment uses: most are of no use here."""
        if self.best is None or self.used is None or self.is_over:
            return
        runs = []
        for run, used_relaxed in zip(self.problem.runs, self.used, strict=True):
            used = used_relaxed | set(self.best.options[run.first : run.first + run.length])
            runs.append(_only(run, [index in used for index in run.indices]))
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
            pass  # beside what is there already
        self.best, self.rounds = inner.best, self.rounds + inner.rounds
        for path in inner.model.paths:
            self.model.add_path(path)

    def place(self) -> None:
        """Find paths, and assignments, with whole blocks per stage in fractions of options."""
        for _ in range(PLACED_ROUNDS):
            if self.is_over:
                return
            point = self.solve(self.model, self.seconds_left, free=self.model.option_counts, gap=GAP_SHARE * self.gap)
            if point is None:
                return
            simulated = self.add_paths(point.columns) + point.once
            whole = self.model.solve(self.seconds_left, fixed=point, gap=GAP_SHARE * self.gap)
            if whole is not None:
                self.offer(*expand_counts(self.problem, whole.counts))
            if simulated <= point.bound * (1 + GAP_SHARE * self.gap):
                return

    def guide(self, seconds: float) -> None:
        """Assignments from models that guess what a schedule of several stages per rank takes."""
        for _ in range(GUIDED_ROUNDS):
            if self.is_over:
                return
            before = self.best
            guided = AssignmentModel(self.problem, self.problem.budgets, self.model.paths, is_guided=True)
            point = self.solve(guided, min(seconds, self.seconds_left), gap=GUIDED_GAP)
            if point is None:
                return
            self.offer(*expand_counts(self.problem, point.counts))
            if self.best is before:
                return

    def finish(self) -> None:
        """Rounds of the model with integers."""
        moved, since = time.perf_counter(), 0
        while not self.is_over and (since < PATIENT_ROUNDS or time.perf_counter() - moved < PATIENCE):
            best, bound = self.best, self.bound
            point = self.solve(self.model, self.seconds_left, gap=GAP_SHARE * self.gap)
            if point is None:
                return
            expanded = expand_counts(self.problem, point.counts)
            since += 1
            if not self.offer(*expanded):
                self.tighten(*expanded)
            elif self.best is not best or self.bound > bound * (1 + GAP_SHARE * self.gap):
                moved, since = time.perf_counter(), 0

    def solve(self, model: AssignmentModel, seconds: float, *, free: Ints | None = None, gap: float = 0.0) -> Point | None:
        """One round; its bound counts where the model is no guess."""
        self.rounds += 1
        point = model.solve(seconds, free=free, gap=gap)
        if point is not None and not model.is_guided:
            self.bound = max(self.bound, point.bound)
        return point

    def offer(self, stages: Sequence[int], options: Sequence[int]) -> bool:
        """Simulate an assignment, for its paths and for its time; False when it doesn't fit."""
        cost = compute_cost(self.problem, stages, options)
        if any(used > there for used, there in zip(cost.peak, self.problem.budgets, strict=True)):
            return False
        simulated = self.add_paths(cost.columns) + cost.once
        if self.best is None or simulated < self.best.simulated:
            objective = max(float(path @ cost.columns) for path in self.model.paths) + cost.once
            self.best = Assignment(tuple(stages), tuple(options), objective, simulated, 0.0, "", 0, cost.peak)
        return True

    def tighten(self, stages: Sequence[int], options: Sequence[int]) -> None:
        """Build the model again for a little less memory: the solver keeps a row only as far as its tolerances go.

        Bounds from here on are of assignments that fit this memory.
        """
        peak = compute_cost(self.problem, stages, options).peak
        self.slack += max(used - there for used, there in zip(peak, self.problem.budgets, strict=True))
        self.model = AssignmentModel(self.problem, [there - self.slack for there in self.problem.budgets], self.model.paths)

    def add_paths(self, columns: Floats) -> float:
        """Seconds of the schedule; its longest path joins the model, and those with one rank a little slower."""
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
        """The best assignment, with what was proven."""
        if self.best is None:
            reason = "nothing takes less than the cutoff" if self.bound >= self.cutoff else "the time is over"
            raise SolverError(f"no assignment of {len(self.problem.blocks)} blocks to {self.problem.schedule.stages} stages: {reason}")
        closed = self.best.simulated <= self.bound * (1 + self.gap)
        status = "optimal" if closed else "beyond" if self.bound >= self.cutoff else "feasible"
        return replace(self.best, bound=min(self.bound, self.best.simulated), status=status, iterations=self.rounds)


def _used_options(problem: AssignmentProblem, point: Point) -> list[frozenset[int]]:
    """Per run the options of which a point has more than a trace on any stage."""
    used: list[set[int]] = [set() for _ in problem.runs]
    for (index, _), counts in point.counts.items():
        used[index].update(option for option, count in zip(problem.runs[index].indices, counts.tolist(), strict=True) if count > TRACE)
    return [frozenset(options) for options in used]


def _only(run: BlockRun, saved: Sequence[bool]) -> BlockRun:
    """A run with these of its options alone."""
    mask = np.array(saved)
    return replace(
        run,
        indices=tuple(index for index, keeps in zip(run.indices, saved, strict=True) if keeps),
        seconds=run.seconds[mask],
        once=run.once[mask],
        saved=run.saved[mask],
        waiting=run.waiting[mask],
        static=run.static[mask],
        workspace=run.workspace[mask],
    )


def _settle(search: _AssignmentSearch, time_limit: float) -> None:
    """Offer the leanest assignment; raises InfeasibleError, with what it needs, when it doesn't fit."""
    problem = search.problem
    where = f"{len(problem.blocks)} blocks on {problem.schedule.stages} stages under schedule {problem.schedule.name!r}"
    point = AssignmentModel(problem, problem.budgets, is_leanest=True).solve(time_limit, gap=LEANEST_GAP)
    if point is None:
        raise InfeasibleError(f"{where} don't fit the memory")
    leanest = expand_counts(problem, point.counts)
    if search.offer(*leanest):
        return
    peak = compute_cost(problem, *leanest).peak
    rank = int(np.argmax([used - there for used, there in zip(peak, problem.budgets, strict=True)]))
    error = InfeasibleError(
        f"{where} need {format_bytes(peak[rank])} on pipeline rank {rank} at the leanest, {format_bytes(problem.budgets[rank])} are there"
    )
    error.needed = peak[rank]
    raise error
