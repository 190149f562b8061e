"""Estimates of pipeline configurations, each closer than those before, up to greedy assignments.

Comes in: a `SearchState`, a configuration. Goes out: seconds; `GreedyPipeline`s. Numbers in parentheses are those of `configurations`,
which states what they are and which of them are bounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from autopar.errors import InfeasibleError, InputError
from autopar.schedules import Schedule, splits_backward
from autopar.search.pipeline.assignment_problem import (
    PHASES,
    AssignmentProblem,
    Floats,
    compute_cost,
    longest_path,
    make_problem,
)
from autopar.search.pipeline.block_options import BlockOptions
from autopar.search.pipeline.configurations import (
    LEAN_FAMILY,
    Configuration,
    PipelineProblem,
    ScheduleChoice,
    build_schedule,
    estimate_fastest_s,
    estimate_finest_s,
    find_schedules,
)
from autopar.search.pipeline.greedy import assign_greedily, find_leanest
from autopar.search.pipeline.search_state import GreedyPipeline, SearchState

# If a step has more micro-batches than this per pipeline rank, so many are simulated, and one round (a micro-batch per rank) less: from
# there on every round takes as long as the one before.
SIMULATED_ROUNDS = 4


def estimate_from_products(state: SearchState, configuration: Configuration) -> float:
    """Estimate (3) in seconds; infinite where the batch can't be split so, or no schedule can be had."""
    work_s = state.solutions.work_lower_bound_s(configuration)
    return math.inf if work_s is None else estimate_fastest_s(configuration, schedules_of(state, configuration), work_s)


def estimate_from_placements(state: SearchState, configuration: Configuration) -> float:
    """Estimate (4) in seconds, without (3); infinite where some op has no placement."""
    work = state.solutions.estimate_work(configuration)
    if work is None:
        return math.inf
    state.works.setdefault((configuration.ranks, configuration.trial.mesh), {})[configuration.microbatches] = work
    return estimate_fastest_s(configuration, schedules_of(state, configuration), work.microbatch_s) + work.step_s


def estimate_from_fewer(state: SearchState, configuration: Configuration) -> float:
    """Estimate (4) in seconds as if parts of a micro-batch took just as long together as whole: none takes less. 0 where none is known.

    So of many micro-batches the placements needn't be looked at, if fewer are too slow already.
    """
    estimate_s = 0.0
    for count, work in state.works.get((configuration.ranks, configuration.trial.mesh), {}).items():
        if configuration.microbatches % count == 0:
            part_s = work.microbatch_s * count / configuration.microbatches
            estimate_s = max(estimate_s, estimate_fastest_s(configuration, schedules_of(state, configuration), part_s) + work.step_s)
    return estimate_s


def schedules_of(state: SearchState, configuration: Configuration) -> list[ScheduleChoice]:
    """The schedules to try, first the one that configurations are ranked by; refusals of a configuration are recorded once."""
    if configuration not in state.schedules:
        state.schedules[configuration], refusals = find_schedules(state.problem, configuration)
        state.refusals += refusals
    return state.schedules[configuration]


def first_schedules(state: SearchState, configuration: Configuration) -> list[ScheduleChoice]:
    """The schedule that configurations are ranked by, and the one that needs the least memory."""
    schedules = schedules_of(state, configuration)
    return [*schedules[:1], *(schedule for schedule in schedules[1:] if schedule.family == LEAN_FAMILY)]


# --- greedy assignments ---


def try_first_schedules(state: SearchState, configuration: Configuration) -> GreedyPipeline | None:
    """A greedy assignment under the first schedule that one fits under: the ranking one, else the leanest. None if neither."""
    for schedule in first_schedules(state, configuration):
        greedy = try_schedule(state, configuration, schedule)
        if greedy is not None:
            state.leanest_bytes.pop(configuration, None)
            return greedy
    return None


def try_schedule(state: SearchState, configuration: Configuration, schedule: ScheduleChoice) -> GreedyPipeline | None:
    """The fastest greedy assignment under a schedule, over all sets of solutions that blocks may mix; None where none fits."""
    fastest: GreedyPipeline | None = None
    for solutions in state.solutions.solution_sets_alike(configuration):
        blocks = state.solutions.block_options(configuration, solutions, splits_backward(schedule.family))
        greedy = try_blocks(state, configuration, schedule, blocks)
        if greedy is not None and (fastest is None or greedy.estimate_s < fastest.estimate_s):
            fastest = greedy
    return fastest


def try_blocks(
    state: SearchState, configuration: Configuration, schedule: ScheduleChoice, blocks: tuple[BlockOptions, ...]
) -> GreedyPipeline | None:
    """The fastest greedy assignment of blocks with these options; None, with the reason recorded in `state`, where none fits."""
    simulated = find_simulated_schedules(state.problem, configuration, schedule)
    try:
        problem = make_problem(blocks, simulated[0], state.solutions.budget)
    except (InfeasibleError, InputError) as error:
        state.refusals.append(error)
        return None
    fastest: GreedyPipeline | None = None
    for stages, options in assign_greedily(problem):
        greedy = _estimate_greedy(state, configuration, schedule, problem, simulated, stages, options)
        if fastest is None or greedy.estimate_s < fastest.estimate_s:
            fastest = greedy
    if fastest is None:
        needed = max(compute_cost(problem, *find_leanest(problem)).peak) + state.solutions.given_nbytes
        state.leanest_bytes[configuration] = min(state.leanest_bytes.get(configuration, needed), needed)
    return fastest


def _estimate_greedy(
    state: SearchState,
    configuration: Configuration,
    schedule: ScheduleChoice,
    problem: AssignmentProblem,
    simulated: Sequence[Schedule],
    stages: Sequence[int],
    options: Sequence[int],
) -> GreedyPipeline:
    """A greedy assignment with its numbers (5) to (7); `simulated` are the schedules to simulate it with."""
    cost = compute_cost(problem, stages, options)
    estimate_s = simulate_schedules_s(problem, simulated, cost.columns, configuration) + cost.per_step
    work = cost.columns[: PHASES * problem.schedule.stages].reshape(PHASES, -1).sum(axis=0)
    schedules = schedules_of(state, configuration)
    optimistic_s = estimate_fastest_s(configuration, schedules, float(work.sum()) / configuration.ranks) + cost.per_step
    ranking_s = estimate_finest_s(configuration, schedules, [float(work[list(own)].sum()) for own in problem.stages_of]) + cost.per_step
    return GreedyPipeline(
        configuration=configuration,
        schedule=schedule,
        estimate_s=estimate_s,
        optimistic_estimate_s=min(optimistic_s, estimate_s),
        ranking_estimate_s=min(ranking_s, estimate_s),
        nbytes=max(cost.peak) + state.solutions.given_nbytes,
        costs=tuple(block.options[index].cost for block, index in zip(problem.blocks, options, strict=True)),
    )


def find_simulated_schedules(problem: PipelineProblem, configuration: Configuration, schedule: ScheduleChoice) -> list[Schedule]:
    """The schedule itself; instead of one of very many micro-batches, two shorter ones, the longer first."""
    ranks, counts = configuration.ranks, [configuration.microbatches]
    # Where all forwards come first there are no rounds that could repeat.
    if schedule.family != "gpipe" and problem.returns_loss and configuration.microbatches > SIMULATED_ROUNDS * ranks:
        counts = [SIMULATED_ROUNDS * ranks, (SIMULATED_ROUNDS - 1) * ranks]
    return [build_schedule(problem, schedule, ranks, count) for count in counts]


def simulate_schedules_s(problem: AssignmentProblem, schedules: Sequence[Schedule], columns: Floats, configuration: Configuration) -> float:
    """Seconds of a configuration's schedule from those of `schedules`: simulated, or extrapolated at the pace of the last round."""
    seconds = [longest_path(replace(problem, schedule=schedule), columns)[0] for schedule in schedules]
    rounds_left = (configuration.microbatches - schedules[0].microbatches) / configuration.ranks
    return seconds[0] + rounds_left * (seconds[0] - seconds[-1])
