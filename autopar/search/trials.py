"""Placements without a pipeline: every mesh to try is solved within the memory of a device.

Comes in: trials. Goes out: a solution per trial that fits and isn't beaten by another, and what came of every trial.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from autopar.cost_models import Cluster
from autopar.costs import CostTables, Sharding, SolvedChain, given_nbytes
from autopar.errors import InfeasibleError
from autopar.plans import Candidate, Pins
from autopar.schedules import make_schedule
from autopar.search.meshes import Trial
from autopar.search.pipeline import (
    PHASES,
    AssignmentCost,
    BlockOptionMaker,
    BlockOptions,
    RankMemory,
    compute_cost,
    longest_path,
    make_problem,
)
from autopar.search.placement import FORBIDDEN, Problem, Search, Solution, build_problem, least_bytes, sharding_of
from autopar.structure import Chain, Model, read_chain
from autopar.units import format_bytes

Progress = Callable[[str], None]


@dataclass(frozen=True)
class SolvedTrial:
    """A trial with a solution that fits the memory, or comes closest to it.

    Attributes:
        sharding: what the solution decides.
        blocks: every block's table of costs, as its only option.
        cost: of all blocks on one stage; `step_seconds`: of a step.
        beside: bytes of inputs and buffers, which every rank has whole.
        candidate: position of the trial among the candidates of the plan.
    """

    trial: Trial
    problem: Problem
    solution: Solution
    sharding: Sharding
    blocks: tuple[BlockOptions, ...]
    cost: AssignmentCost
    step_seconds: float
    beside: int
    candidate: int = 0

    @property
    def needed(self) -> int:
        """Bytes at the peak."""
        return self.cost.peak[0] + self.beside


@dataclass(frozen=True)
class TrialResults:
    """What came of trials.

    Attributes:
        solved: those with a solution within the memory.
        candidates: the outcome of every trial, for the plan.
        promising: trials that aren't baselines, those first that would cost least without a limit of memory.
    """

    solved: Sequence[SolvedTrial] = ()
    candidates: tuple[Candidate, ...] = ()
    promising: Sequence[Trial] = ()

    @property
    def best(self) -> SolvedTrial | None:
        """The cheapest; of equals one that was searched rather than a baseline, with the fewest axes."""

        def rank(solved: SolvedTrial) -> tuple[int, bool, int]:
            return solved.solution.cost_ns, solved.trial.baseline, len(solved.trial.mesh.names)

        return min(self.solved, key=rank, default=None)


def solve_trials(
    model: Model, chain: Chain, trials: Sequence[Trial], cluster: Cluster, pins: Pins, tell: Progress, *, is_open: bool
) -> TrialResults:
    """Solve all trials in which every op has a placement; none when pipelines are open and no split at all can save enough memory.

    Args:
        model: the model to place.
        chain: its blocks.
        trials: meshes and what is asked of each, all ranks one group.
        cluster: the devices and links.
        pins: for messages; the trials obey them already.
        tell: told what is being tried.
        is_open: whether a pipeline may be had instead, so that trials needn't be brought within the memory at any price.

    Raises InfeasibleError when some op has no placement in any of the trials.
    """
    least = least_bytes(model, cluster.world_size)
    if is_open and least > cluster.machine.device.usable_bytes:
        outcome = f"out of memory: without recomputation {format_bytes(least)} and more on each device, however it is split"
        return TrialResults(candidates=(Candidate("search", f"any of {len(trials)} meshes", None, None, outcome),))
    searches: list[tuple[Trial, Search]] = []
    for trial in trials:
        tell(f"costs: {trial.name} on {trial.mesh}")
        problem = build_problem(model, trial.mesh, cluster, trial.constraints)
        tell(f"search: {trial.name} on {trial.mesh}")
        search = Search(problem)
        if search.bound_ns < FORBIDDEN:
            searches.append((trial, search))
    if not searches:
        raise InfeasibleError(
            f"{name_request(pins)} leave some op no placement that its neighbours' can be connected with, on any of "
            f"{len(trials)} meshes tried; pin fewer modules, or pin ops that read the same tensor alike"
        )
    reads = read_chain(model.folded.graph, model.spaces, chain)

    def measure(trial: Trial, problem: Problem, solution: Solution) -> SolvedTrial:
        sharding = sharding_of(problem, solution.choice)
        solved = SolvedChain(model, chain, reads, CostTables(model, problem.mesh, cluster), sharding, is_one_stage=True)
        return _measure(trial, problem, solution, solved)

    # The most promising first: what they reach prunes the others by their bounds.
    searches.sort(key=lambda pair: pair[1].bound_ns)
    solved: list[SolvedTrial] = []
    candidates: list[Candidate] = []
    for trial, search in searches:
        tell(f"memory: {trial.name} on {trial.mesh}")
        cutoff = min((rival.solution.cost_ns for rival in solved), default=None)
        answer = _solve_trial(partial(measure, trial, search.problem), search, cluster, cutoff, tighten=not is_open)
        if answer is None:
            candidates.append(Candidate(trial.name, str(trial.mesh), search.bound_in_memory_ns / 1e9, None, "pruned: costs at least this"))
        elif answer.needed > cluster.machine.device.usable_bytes:
            candidates.append(Candidate(trial.name, str(trial.mesh), None, answer.needed, "out of memory"))
        else:
            solved.append(replace(answer, candidate=len(candidates)))
            outcome = answer.solution.status
            candidates.append(Candidate(trial.name, str(trial.mesh), answer.step_seconds, answer.needed, outcome))
    return TrialResults(solved, tuple(candidates), [trial for trial, _ in searches if not trial.baseline])


def _solve_trial(
    measure: Callable[[Solution], SolvedTrial], search: Search, cluster: Cluster, cutoff_ns: int | None, *, tighten: bool
) -> SolvedTrial | None:
    """Solve one trial within the memory of a device, or None when it can't beat `cutoff_ns`; if nothing fits, what needs least memory.

    The placement problem adds up bytes of single decisions. What they come to in blocks, with the space that calls need while they run, is
    known only with a solution (`measure`), so the difference is found in rounds.
    """
    budget = cluster.machine.device.usable_bytes
    more = 0
    for _ in range(4):
        try:
            solution = search.fit(budget - more, cutoff_ns, tighten=tighten)
        except InfeasibleError:
            break
        if solution is None:
            return None
        solved = measure(solution)
        if solved.needed <= budget:
            return solved
        more = max(solved.needed - solution.nbytes, more + 1)
    # What was set aside is what faster choices need; a lean one may do with less.
    lean = [measure(solution) for solution in search.find_lean(budget)]
    fitting = [solved for solved in lean if solved.needed <= budget]
    if fitting:
        return min(fitting, key=lambda solved: solved.solution.cost_ns)
    return min(lean, key=lambda solved: solved.needed)


def _measure(trial: Trial, problem: Problem, solution: Solution, solved: SolvedChain) -> SolvedTrial:
    """What a solution comes to with all blocks on one stage, by their tables of costs."""
    beside = given_nbytes(solved.graph)
    blocks = BlockOptionMaker(solved, None).make(("none",), False, {})
    if not blocks:
        nothing = AssignmentCost(np.zeros(PHASES), 0.0, (RankMemory(0, 0, 0, 0),))
        return SolvedTrial(trial, problem, solution, solved.sharding, blocks, nothing, 0.0, beside)
    assignment = make_problem(blocks, make_schedule("gpipe", 1, 1, 1), 0)
    cost = compute_cost(assignment, [0] * len(blocks), [0] * len(blocks))
    step_seconds = longest_path(assignment, cost.columns)[0] + cost.once
    return SolvedTrial(trial, problem, solution, solved.sharding, blocks, cost, step_seconds, beside)


def name_request(pins: Pins) -> str:
    """What a message blames for a choice that isn't left to the search."""
    return f"the pins {pins}" if pins else "the mesh and the stored layouts given"
