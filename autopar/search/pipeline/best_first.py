"""Best-first search over pipeline configurations: the fastest pipeline found, and how closely each configuration was looked at.

Comes in: a `PipelineProblem`, configurations, the seconds to beat. Goes out: a `SearchedPipelines`. Numbers in parentheses are those of
`configurations`, which states what they are and which of them are bounds. Configurations wait in a queue ordered by estimates of their
step, and the one with the least estimate gets the next, closer one:

1. from products (3) to the fastest placements (4);
2. from placements to a greedy assignment (5) under the first schedule, which (7) then ranks;
3. from there to greedy assignments under all schedules, for the first `EXPLORED` whose optimistic estimate (6) is below the best.

A configuration whose estimate (3) or (4) is no better than the best greedy assignment isn't tried. The stages of the best greedy ones
are then searched by cutting planes (8), whose bound is the only number of these that the plan's proof gives.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from autopar.costs import Sharding
from autopar.errors import AutoparError, InfeasibleError, SolverError
from autopar.ir import Layout, Mesh
from autopar.plans import BlockChoice, Candidate, Pipeline
from autopar.schedules import Schedule
from autopar.search.meshes import free_axes
from autopar.search.pipeline.assignment import Assignment, assign_by_block
from autopar.search.pipeline.assignment_problem import (
    AssignmentCost,
)
from autopar.search.pipeline.block_options import BlockOptions
from autopar.search.pipeline.configurations import (
    Configuration,
    PipelineProblem,
    ScheduleChoice,
    build_schedule,
)
from autopar.search.pipeline.estimates import (
    estimate_from_fewer,
    estimate_from_placements,
    estimate_from_products,
    find_simulated_schedules,
    first_schedules,
    schedules_of,
    try_blocks,
    try_first_schedules,
    try_schedule,
)
from autopar.search.pipeline.mixing import mix_solutions
from autopar.search.pipeline.search_state import GreedyPipeline, Level, QueuedConfiguration, SearchState, note
from autopar.search.pipeline.solutions import SolutionSet
from autopar.search.placement import Solution
from autopar.structure import AnalyzedGraph, with_microbatch_axis
from autopar.texts import printable

# The most configurations that get greedy assignments under every schedule.
EXPLORED = 6
# So many of the best greedy assignments are searched by cutting planes, if within this factor of the best: a search gains some percent.
# On one pipeline rank it gains more and takes less.
SEARCHED, SEARCHED_WITHIN = 3, 1.05
SEARCHED_ALONE, SEARCHED_ALONE_WITHIN = 6, 1.25
# Of so many of the best configurations it is seen whether free axes' fastest placements promise a step below the best. The best one is
# looked at with free axes anyhow, if within this factor: under want of memory they gain more.
FREED = 6
FREED_WITHIN = 1.05
# Seconds for these searches together: with axes of kinds, with all axes free, with one free; and the relative gap at which each ends.
SEARCH_SECONDS = 3.0
FREED_SECONDS = 0.5
ASSIGN_GAP = 5e-3


@dataclass(frozen=True)
class Pipelined:
    """The pipeline that was chosen: placements, stages, recomputation, and their costs.

    Attributes:
        configuration: pipeline ranks, the mesh of each, micro-batches.
        mesh: that mesh with micro-batches as its outermost axis.
        solution: the solution of the placement problem that decided on what blocks share.
        model: the model, folded so that like blocks with different placements are apart.
        sharding: the placements and layouts of its representatives, a mixture of solutions.
        pipeline: the pipeline as a plan has it.
        assignment: stages and options of the blocks.
        blocks: the options that `assignment` chose from.
        cost: seconds and bytes of the assignment.
        candidate: position of this pipeline among the candidates of the search.
    """

    configuration: Configuration
    mesh: Mesh
    solution: Solution
    model: AnalyzedGraph
    sharding: Sharding
    pipeline: Pipeline
    assignment: Assignment
    blocks: tuple[BlockOptions, ...]
    cost: AssignmentCost
    candidate: int

    @property
    def seconds(self) -> float:
        """Seconds of a step, simulated."""
        return self.assignment.simulated


@dataclass(frozen=True)
class SearchedPipelines:
    """The outcome of a search.

    Attributes:
        best: the fastest pipeline; None where none takes less than the seconds to beat.
        candidates: the outcome of every configuration, for the plan.
        refusals: errors that say why some schedules, stages and numbers of micro-batches can't be had.
    """

    best: Pipelined | None
    candidates: tuple[Candidate, ...]
    refusals: tuple[AutoparError, ...]


def search_pipelines(
    problem: PipelineProblem,
    configurations: Sequence[Configuration],
    cutoff_s: float,
    tell: Callable[[str], None],
    free: Sequence[Configuration] | None,
) -> SearchedPipelines:
    """The fastest pipeline found that takes less than `cutoff_s` seconds.

    Args:
        problem: the model, the cluster and the pins.
        configurations: what to look at.
        cutoff_s: seconds to beat.
        tell: told what is being tried.
        free: further configurations of free axes; the best of `configurations` are then looked at with free axes too. None where axes
            may not be free.
    """
    state = SearchState(problem, tell, cutoff_s)
    rank_configurations(state, configurations)
    greedy = sorted(state.greedy, key=lambda assignment: assignment.estimate_s)
    if not greedy and state.leanest_bytes:
        # Cutting planes may find an assignment where greedy steps don't, and otherwise say what the leanest one needs. Without a greedy
        # assignment there are no estimates.
        configuration = min(state.leanest_bytes, key=state.leanest_bytes.__getitem__)
        del state.leanest_bytes[configuration]
        greedy = [GreedyPipeline(configuration, schedule, 0.0, 0.0, 0.0, 0) for schedule in schedules_of(state, configuration)]
    fitting = {assignment.configuration for assignment in greedy}
    for configuration, needed in state.leanest_bytes.items():
        if configuration not in fitting:  # else it fits under some schedule
            note(state, configuration, None, needed, "out of memory")
    best = search_best(state, greedy, cutoff_s, SEARCH_SECONDS)
    if free is not None and greedy:
        best = search_freed(state, greedy, cutoff_s, best, free)
    return SearchedPipelines(best, tuple(state.candidates), tuple(state.refusals))


# --- best first ---


def rank_configurations(state: SearchState, configurations: Sequence[Configuration]) -> None:
    """Make greedy assignments of all configurations whose estimates are below the best of them."""
    state.tell(f"estimates: {len(configurations)} pipeline configurations")
    queue = [
        QueuedConfiguration(estimate_from_products(state, configuration), number, configuration, Level.PRODUCTS)
        for number, configuration in enumerate(configurations)
    ]
    heapq.heapify(queue)
    unfit: list[QueuedConfiguration] = []
    while queue:
        queued = heapq.heappop(queue)
        if queued.greedy is not None:
            explore(state, queued.configuration, queued.greedy.optimistic_estimate_s, known=[queued.greedy.schedule])
        elif queued.estimate_s >= state.best_s:
            if math.isfinite(queued.estimate_s):
                note(state, queued.configuration, queued.estimate_s, None, "not tried: estimated to take this at best", basis="estimate")
        elif (refined := refine(state, queued)) is not None:
            heapq.heappush(queue, refined)
        else:
            unfit.append(queued)
    # A configuration that fits under neither of the first schedules may fit under another.
    for queued in unfit:
        explore(state, queued.configuration, queued.estimate_s, known=first_schedules(state, queued.configuration))


def refine(state: SearchState, queued: QueuedConfiguration) -> QueuedConfiguration | None:
    """The configuration with an estimate from the next level; None when no greedy assignment fits under the first schedules."""
    configuration = queued.configuration
    if queued.level is Level.PRODUCTS:
        if (known_s := estimate_from_fewer(state, configuration)) > queued.estimate_s:
            return replace(queued, estimate_s=known_s)
        state.tell(f"costs: {configuration}")
        estimate_s = max(queued.estimate_s, estimate_from_placements(state, configuration))
        return replace(queued, estimate_s=estimate_s, level=Level.PLACEMENTS)
    state.tell(f"greedy: {configuration}")
    greedy = try_first_schedules(state, configuration)
    if greedy is None:
        return None
    add_greedy(state, greedy)
    return replace(queued, estimate_s=greedy.ranking_estimate_s, level=Level.GREEDY, greedy=greedy)


def explore(state: SearchState, configuration: Configuration, estimate_s: float, known: Sequence[ScheduleChoice]) -> None:
    """Make greedy assignments under all schedules that aren't `known`, if `estimate_s` is below the best and few were explored."""
    if estimate_s >= state.best_s or state.explored >= EXPLORED:
        return
    state.explored += 1
    state.tell(f"schedules: {configuration}")
    for schedule in schedules_of(state, configuration):
        if schedule not in known and (greedy := try_schedule(state, configuration, schedule)) is not None:
            add_greedy(state, greedy)


def add_greedy(state: SearchState, greedy: GreedyPipeline) -> None:
    """Add a greedy assignment, whose estimate may be the new one to beat."""
    state.greedy.append(greedy)
    state.best_s = min(state.best_s, greedy.estimate_s)


# --- assignments by cutting planes ---


def search_best(state: SearchState, greedy: Sequence[GreedyPipeline], cutoff_s: float, time_left_s: float) -> Pipelined | None:
    """Search assignments by cutting planes, for the best greedy ones and for all that are faster than the best found so far.

    Args:
        state: the search; outcomes are added to its candidates.
        greedy: greedy assignments, the fastest first.
        cutoff_s: seconds to beat.
        time_left_s: seconds for all searches together.

    Each search but the last may use half of the time left.
    """
    best: Pipelined | None = None
    for number, assignment in enumerate(greedy):
        limit_s = cutoff_s if best is None else min(cutoff_s, best.seconds)
        is_alone = assignment.configuration.ranks == 1
        first, within = (SEARCHED_ALONE, SEARCHED_ALONE_WITHIN) if is_alone else (SEARCHED, SEARCHED_WITHIN)
        if assignment.estimate_s >= (within if number < first else 1) * limit_s:
            outcome = f"{assignment.schedule}: greedy assignment, not searched"
            # Of very many micro-batches the step is extrapolated from shorter schedules.
            is_long = len(find_simulated_schedules(state.problem, assignment.configuration, assignment.schedule)) > 1
            basis = "estimate" if is_long else "predicted"
            note(
                state,
                assignment.configuration,
                assignment.estimate_s,
                assignment.nbytes,
                outcome,
                costs=assignment.costs,
                basis=basis,
            )
            continue
        state.tell(f"stages: {assignment.configuration}, {assignment.schedule}")
        start = time.perf_counter()
        is_last = assignment is greedy[-1]
        best = search_stages(state, assignment, limit_s, time_left_s if is_last else time_left_s / 2) or best
        time_left_s = max(0.0, time_left_s - (time.perf_counter() - start))
    return best


def search_stages(state: SearchState, greedy: GreedyPipeline, limit_s: float, time_limit_s: float) -> Pipelined | None:
    """The best assignment found in `time_limit_s` for the configuration and schedule of a greedy one.

    Returns None where none is found that takes less than `limit_s` seconds.
    """
    configuration, choice = greedy.configuration, greedy.schedule
    schedule = build_schedule(state.problem, choice, configuration.ranks, configuration.microbatches)
    solutions_and_blocks = _choose_solutions(state, configuration, choice, schedule)
    if solutions_and_blocks is None:
        return None
    solutions, blocks = solutions_and_blocks
    given_nbytes = state.solutions.given_nbytes
    try:
        assignment, cost = assign_by_block(
            blocks, schedule, state.solutions.budget, time_limit=time_limit_s, gap=ASSIGN_GAP, cutoff=limit_s
        )
    except InfeasibleError as error:
        if error.needed == 0:
            raise
        note(state, configuration, None, error.needed + given_nbytes, "out of memory")
        return None
    except SolverError:
        note(state, configuration, None, None, f"{choice}: no better one found in time")
        return None
    outcome = "can't beat the best found" if assignment.status == "beyond" else assignment.status
    costs = [block.options[index].cost for block, index in zip(blocks, assignment.options, strict=True)]
    note(state, configuration, assignment.simulated, max(cost.peak) + given_nbytes, f"{choice}: {outcome}", costs=costs)
    if assignment.simulated >= limit_s:
        return None
    return _describe(state, greedy, solutions, blocks, assignment, cost, candidate=len(state.candidates) - 1)


def search_freed(
    state: SearchState, greedy: Sequence[GreedyPipeline], cutoff_s: float, best: Pipelined | None, free: Sequence[Configuration]
) -> Pipelined | None:
    """The best configurations with free axes of the same sizes, and `free`; `best` where none of them is faster.

    Args:
        state: the search; outcomes are added to its candidates.
        greedy: greedy assignments, the fastest first.
        cutoff_s: seconds to beat.
        best: what was found so far.
        free: configurations of free axes.
    """
    limit_s = cutoff_s if best is None else min(cutoff_s, best.seconds)
    known = {(configuration.ranks, configuration.trial.mesh, configuration.microbatches) for configuration in free}
    wholly, partly = _free_configurations(state, greedy, limit_s)
    wholly = [one for one in wholly if (one.ranks, one.trial.mesh, one.microbatches) not in known]
    for configurations in ([*free, *wholly], partly):
        state.best_s, state.greedy, state.explored = limit_s, [], min(state.explored, max(0, EXPLORED - max(1, len(configurations))))
        rank_configurations(state, configurations)
        best = search_best(state, sorted(state.greedy, key=lambda one: one.estimate_s), limit_s, FREED_SECONDS) or best
        limit_s = limit_s if best is None else min(limit_s, best.seconds)
    return best


def _free_configurations(
    state: SearchState, greedy: Sequence[GreedyPipeline], limit_s: float
) -> tuple[list[Configuration], list[Configuration]]:
    """The configurations to look at with free axes, and with one of two axes free.

    Of the fastest greedy assignments on different meshes the best is taken always, the other ones, `FREED` together, if they would be
    faster than `limit_s` with the work of free axes' fastest placements. The best has single free axes too, if it has one pipeline rank:
    there only want of memory has it looked at, under which fewer options may come closer.
    """
    fastest: dict[tuple[int, tuple[int, ...], int], GreedyPipeline] = {}
    for one in greedy:
        if free_axes(one.configuration.trial):
            key = one.configuration.ranks, one.configuration.trial.mesh.sizes, one.configuration.microbatches
            fastest.setdefault(key, one)
    wholly: list[Configuration] = []
    partly: list[Configuration] = []
    for number, one in enumerate(list(fastest.values())[:FREED]):
        is_best = number == 0 and one.estimate_s < FREED_WITHIN * limit_s
        trial, *others = free_axes(one.configuration.trial)
        freed = replace(one.configuration, trial=trial)
        gain = estimate_from_placements(state, freed) / estimate_from_placements(state, one.configuration)
        if is_best or one.estimate_s * gain < limit_s:
            wholly.append(freed)
        if is_best and one.configuration.ranks == 1:
            partly = [replace(one.configuration, trial=other) for other in others]
    return wholly, partly


def _choose_solutions(
    state: SearchState, configuration: Configuration, choice: ScheduleChoice, schedule: Schedule
) -> tuple[SolutionSet, tuple[BlockOptions, ...]] | None:
    """Of the sets of solutions of this very configuration the one with the fastest greedy assignment, and its block options."""
    chosen: tuple[SolutionSet, tuple[BlockOptions, ...]] | None = None
    fastest_s = math.inf
    for solutions in state.solutions.solution_sets(configuration):
        blocks = state.solutions.block_options(configuration, solutions, schedule.splits_backward)
        greedy = try_blocks(state, configuration, choice, blocks)
        estimate_s = greedy.estimate_s if greedy is not None else math.inf
        if chosen is None or estimate_s < fastest_s:
            chosen, fastest_s = (solutions, blocks), estimate_s
    return chosen


def _describe(
    state: SearchState,
    greedy: GreedyPipeline,
    solutions: SolutionSet,
    blocks: tuple[BlockOptions, ...],
    assignment: Assignment,
    cost: AssignmentCost,
    candidate: int,
) -> Pipelined:
    """The pipeline that an assignment means: placements of a mixture of solutions, stages, and what is recomputed.

    `candidate` is its position among the candidates of the search.
    """
    configuration, schedule = greedy.configuration, greedy.schedule
    base = state.solutions.model_of_microbatch(configuration.microbatches)
    assert base is not None
    options = [block.options[index] for block, index in zip(blocks, assignment.options, strict=True)]
    model, sharding = mix_solutions(base, state.solutions.reads, solutions.shardings, [option.solution for option in options])
    makers = state.solutions.makers(configuration, solutions)
    travel_layouts: Mapping[str, Layout] = {}
    if configuration.ranks * schedule.chunks > 1:
        travel_layouts = {name: layout[1:] for name, layout in makers[0].find_travel_layouts().items()}
    block_choices = tuple(
        BlockChoice(printable(block.name), printable(block.path), stage, option.name)
        for block, stage, option in zip(state.problem.chain.blocks, assignment.stages, options, strict=True)
    )
    return Pipelined(
        configuration=configuration,
        mesh=with_microbatch_axis(configuration.trial.mesh, configuration.microbatches),
        solution=solutions.base,
        model=model,
        sharding=sharding,
        pipeline=Pipeline(configuration.ranks, schedule.family, schedule.chunks, configuration.microbatches, block_choices, travel_layouts),
        assignment=assignment,
        blocks=blocks,
        cost=cost,
        candidate=candidate,
    )
