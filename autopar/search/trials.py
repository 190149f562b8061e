"""Placements without a pipeline: the placement problem of every mesh to try is solved within the memory of a device.

Comes in: `Trial`s. Goes out: `TrialResults`: a solution of each trial that has one within the memory and wasn't pruned, and the outcome of
every trial.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from autopar.cost_models import Cluster
from autopar.costs import CostTables, Sharding, SolvedChain, given_nbytes
from autopar.errors import InfeasibleError, InputError
from autopar.ir import Mesh, OpKind, format_mesh, is_legal
from autopar.plans import Candidate, Pins, Purpose
from autopar.schedules import make_schedule
from autopar.search.candidates import find_kinds, find_parts, name_axes, word_kind, word_kind_of_trial
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
from autopar.search.placement import FORBIDDEN, PlacementSolver, Problem, Solution, build_problem, least_bytes, nanoseconds, sharding_of
from autopar.structure import AnalyzedGraph, Chain, MicroSplit, read_chain, split_microbatches, with_microbatch_axis
from autopar.units import format_bytes

Progress = Callable[[str], None]
"""Told what is being tried, a line of text at a time."""


COPIES_SHARE = 0.03
"""The search may count a copy more than once that several readers share (``docs/search.md``, fan-outs), so that a plan costs less than its
bound; of plans seen, by no more than this share of its step."""

PRUNED = "pruned: costs at least this for the search"
"""The outcome of a trial whose bound is above the cost of one that was solved by `COPIES_SHARE`: both in the search's costs."""


@dataclass(frozen=True)
class SolvedTrial:
    """A trial with a solution that fits the memory, or comes closest to it.

    Attributes:
        problem: the placement problem of the trial.
        solution: a solution of it.
        sharding: what the solution decides.
        blocks: every block with a single option, without recomputation.
        cost: seconds and bytes of all blocks on one stage.
        step_seconds: seconds of a step.
        given_nbytes: bytes of inputs and buffers, which every rank has whole.
        candidate: position of the trial among the candidates of the plan.
        halved: representatives of the calls that run for each half of the batch, where these take turns.
    """

    trial: Trial
    problem: Problem
    solution: Solution
    sharding: Sharding
    blocks: tuple[BlockOptions, ...]
    cost: AssignmentCost
    step_seconds: float
    given_nbytes: int
    candidate: int = 0
    halved: frozenset[str] = frozenset()

    @property
    def half_batches(self) -> bool:
        """Whether two halves of the batch take turns."""
        return bool(self.halved)

    @property
    def needed_nbytes(self) -> int:
        """Bytes of a rank at its peak."""
        return self.cost.peak[0] + self.given_nbytes


@dataclass(frozen=True)
class TrialResults:
    """The outcome of all trials.

    Attributes:
        solved: the trials with a solution within the memory.
        candidates: the outcome of every trial, for the plan.
        by_bound: trials that aren't baselines, in the order of their bounds without a memory limit.
    """

    solved: Sequence[SolvedTrial] = ()
    candidates: tuple[Candidate, ...] = ()
    by_bound: Sequence[Trial] = ()

    @property
    def is_tight(self) -> bool:
        """Whether the memory limits the best, or nothing fits."""
        return self.best is None or self.best.solution.status != "optimal"

    @property
    def best(self) -> SolvedTrial | None:
        """The fastest by its tables of costs; of equally fast ones a trial of the search rather than a baseline, then the fewest axes."""

        def rank(solved: SolvedTrial) -> tuple[int, bool, int]:
            return nanoseconds(solved.step_seconds), solved.trial.baseline, len(solved.trial.mesh.names)

        return min(self.solved, key=rank, default=None)


NOTHING_TRIED = TrialResults()


def solve_trials(
    model: AnalyzedGraph,
    chain: Chain,
    trials: Sequence[Trial],
    cluster: Cluster,
    pins: Pins,
    tell: Progress,
    *,
    is_open: bool,
    so_far: TrialResults = NOTHING_TRIED,
) -> TrialResults:
    """Solve all trials in which every op has a placement.

    None is solved if `is_open` and even everything split over all ranks needs more memory than there is without recomputation.

    Args:
        model: the model to place.
        chain: its blocks.
        trials: meshes of all devices, with constraints.
        cluster: the devices and links.
        pins: for messages; the trials obey them already.
        tell: told what is being tried.
        is_open: whether the search may choose a pipeline or a mixture of solutions instead, which save memory in finer steps; then less
            effort is spent on fitting trials into the memory.
        so_far: the outcome of other trials, which these are added to.

    Raises InfeasibleError when some op has no placement in any of the trials.
    """
    least = least_bytes(model, cluster.world_size)
    if is_open and least > cluster.machine.device.usable_bytes:
        outcome = f"out of memory: without recomputation {format_bytes(least)} and more on each device, however it is split"
        return TrialResults(candidates=(Candidate("search", f"any of {len(trials)} meshes", None, None, outcome),))
    searches = _find_solvers(model, trials, cluster, tell)
    if not searches and so_far.candidates:
        return so_far
    if not searches:
        raise InfeasibleError(
            f"{name_request(pins)} leave some op no placement that its neighbours' can be connected with, on any of "
            f"{len(trials)} meshes tried; pin fewer modules, or pin ops that read the same tensor alike"
        )
    reads = read_chain(model.folded.graph, model.spaces, chain)
    halves = Halves(model, cluster, pins)

    def measure(trial: Trial, problem: Problem, solution: Solution) -> SolvedTrial:
        sharding = sharding_of(problem, solution.choice)

        def run(halved: frozenset[str]) -> SolvedTrial:
            tables = CostTables(model, problem.mesh, cluster, pins.ahead, halved)
            return _measure(trial, problem, solution, SolvedChain(model, chain, reads, tables, sharding, is_one_stage=True))

        return halves.choose(run, sharding, problem.mesh)

    solved, candidates = [*so_far.solved], [*so_far.candidates]
    refusals: list[InputError] = []
    for trial, search in searches:
        tell(f"memory: {trial.name} on {trial.mesh}")
        best_ns = min((solved_trial.solution.cost_ns for solved_trial in solved), default=None)
        cutoff_ns = None if best_ns is None else round(best_ns * (1 + COPIES_SHARE))
        try:
            solved_trial = _solve_trial(partial(measure, trial, search.problem), search, cluster, cutoff_ns, tighten=not is_open)
        except InputError as error:
            refusals.append(error)
            candidates.append(_unsolved(trial, None, "can't run in half batches"))
            continue
        if solved_trial is None:
            candidates.append(_unsolved(trial, search.bound_in_memory_ns / 1e9, PRUNED))
            continue
        fits = solved_trial.needed_nbytes <= cluster.machine.device.usable_bytes
        if fits:
            solved.append(replace(solved_trial, candidate=len(candidates)))
        candidates.append(_candidate(model, solved_trial, fits=fits, rename=is_open and not trial.baseline))
    if len(refusals) == len(searches) and not so_far.candidates:
        raise refusals[0]
    return TrialResults(solved, tuple(candidates), so_far.by_bound or [trial for trial, _ in searches if not trial.baseline])


def _find_solvers(model: AnalyzedGraph, trials: Sequence[Trial], cluster: Cluster, tell: Progress) -> list[tuple[Trial, PlacementSolver]]:
    """The trials in which every op has a placement, in the order of their bounds: the costs of the first prune the others."""
    searches: list[tuple[Trial, PlacementSolver]] = []
    for trial in trials:
        tell(f"costs: {trial.name} on {trial.mesh}")
        problem = build_problem(model, trial.mesh, cluster, trial.constraints)
        tell(f"search: {trial.name} on {trial.mesh}")
        search = PlacementSolver(problem)
        if search.bound_ns < FORBIDDEN:
            searches.append((trial, search))
    return sorted(searches, key=lambda pair: pair[1].bound_ns)


def _unsolved(trial: Trial, bound_seconds: float | None, outcome: str) -> Candidate:
    """The candidate of a trial without a solution."""
    basis = "predicted" if bound_seconds is None else "bound"
    kind = word_kind_of_trial(trial)
    return Candidate(trial.name, format_mesh(trial.mesh), bound_seconds, None, outcome, kind, None, basis, trial.free_mesh)


def _candidate(model: AnalyzedGraph, solved: SolvedTrial, *, fits: bool, rename: bool) -> Candidate:
    """The candidate of a trial with a solution; `rename` names free axes after what they split, as the plan would."""
    mesh, placements = solved.trial.mesh, solved.sharding.placements
    return Candidate(
        name=solved.trial.name,
        mesh=format_mesh(name_axes(model, mesh, placements) if rename else mesh),
        step_seconds=solved.step_seconds if fits else None,
        memory_bytes=solved.needed_nbytes,
        outcome=solved.solution.status if fits else "out of memory",
        kind=word_kind(find_kinds(model, mesh, placements)),
        parts=find_parts([block.options[0].cost for block in solved.blocks], 1, 1, solved.step_seconds) if fits else None,
        free_mesh=solved.trial.free_mesh,
    )


class Halves:
    """Whether two halves of the batch take turns in a trial: as pinned, or where that is faster.

    Only a solution that is there is asked; the placement problem knows nothing of halves.
    """

    def __init__(self, model: AnalyzedGraph, cluster: Cluster, pins: Pins) -> None:
        self._model = model
        self._pinned = pins.half_batches
        self._overlap = cluster.machine.device.overlap

    def choose(self, run: Callable[[frozenset[str]], SolvedTrial], sharding: Sharding, mesh: Mesh) -> SolvedTrial:
        """A trial as it is or in halves.

        Args:
            run: measures it, given the calls that run for each half.
            sharding: its solution.
            mesh: its mesh.

        Raises InputError for pinned halves of a batch that can't be split.
        """
        if self._pinned:
            return run(self._halved(sharding, mesh))
        whole = run(frozenset())
        if self._pinned is False or not self._overlap or self._split.reasons or not _exposes(whole):
            return whole
        halved = self._halved(sharding, mesh)
        return min(whole, run(halved), key=lambda solved: solved.step_seconds) if halved else whole

    @cached_property
    def _split(self) -> MicroSplit:
        model = self._model
        return split_microbatches(model.folded.graph, model.spaces, model.roles, 2, half_batches=True)

    def _halved(self, sharding: Sharding, mesh: Mesh) -> frozenset[str]:
        """Representatives of the calls that run for each half; empty if some placement doesn't fit a half, and halves aren't pinned."""
        if self._split.reasons:
            raise InputError(f"pin half_batches=True can't be had: {'; '.join(self._split.reasons)}")
        folded, spaces = self._model.folded, self._model.spaces
        parts = {op.name: self._split.placements[op.name] for op in folded.ops if op.kind is OpKind.CALL}
        for op in folded.ops:
            if op.name in parts and op.name in spaces:
                placement = parts[op.name], *sharding.placements[op.name]
                if not is_legal(spaces[op.name], placement, with_microbatch_axis(mesh, 2)):
                    if not self._pinned:
                        return frozenset()
                    where = f"{op.target} at {op.source or op.layer or op.name}"
                    raise InputError(
                        f"pin half_batches=True can't be had: {where} can't be split over {mesh} in each half; take a larger batch"
                    )
        return frozenset(name for name, part in parts.items() if part is not None)


# Exchanges of activations that take less of a step aren't worth a second program.
_WORTH = 0.01


def _exposes(solved: SolvedTrial) -> bool:
    """Whether exchanges of activations take a part of the step that is worth hiding."""
    rows = [row for block in solved.blocks for option in block.options if option.cost is not None for row in option.cost.rows]
    exchanged = sum(row.seconds for row in rows if row.axis and row.purpose in (Purpose.ACTIVATIONS, Purpose.ACTIVATION_GRADIENTS))
    return exchanged > _WORTH * solved.step_seconds


def _solve_trial(
    measure: Callable[[Solution], SolvedTrial], search: PlacementSolver, cluster: Cluster, cutoff_ns: int | None, *, tighten: bool
) -> SolvedTrial | None:
    """Solve one trial within the memory of a device.

    Returns the solution with the least cost that fits; if none does, the one that needs the least memory; None if it is known that none
    costs less than `cutoff_ns`.

    The placement problem adds up bytes of single decisions. What a solution needs in blocks, with the workspace of calls, is known only
    with the solution (`measure`). So the problem is solved again with a budget that is smaller by the difference, in four rounds at most.
    """
    budget = cluster.machine.device.usable_bytes
    set_aside = 0
    for _ in range(4):
        try:
            solution = search.fit(budget - set_aside, cutoff_ns, tighten=tighten)
        except InfeasibleError:
            break
        if solution is None:
            return None
        solved = measure(solution)
        if solved.needed_nbytes <= budget:
            return solved
        set_aside = max(solved.needed_nbytes - solution.nbytes, set_aside + 1)
    # What was set aside is what faster solutions need; a lean one may do with less.
    lean = [measure(solution) for solution in search.find_lean(budget)]
    fitting = [solved for solved in lean if solved.needed_nbytes <= budget]
    if fitting:
        return min(fitting, key=lambda solved: solved.step_seconds)
    return min(lean, key=lambda solved: solved.needed_nbytes)


def _measure(trial: Trial, problem: Problem, solution: Solution, solved: SolvedChain) -> SolvedTrial:
    """Seconds and bytes of a solution with all blocks on one stage, by their tables of costs."""
    given = given_nbytes(solved.graph)
    blocks = BlockOptionMaker(solved, None).make(("none",), False, {})
    if not blocks:
        no_cost = AssignmentCost(np.zeros(PHASES), 0.0, (RankMemory(0, 0, 0, 0),))
        return SolvedTrial(trial, problem, solution, solved.sharding, blocks, no_cost, 0.0, given)
    assignment = make_problem(blocks, make_schedule("gpipe", 1, 1, 1), 0)
    cost = compute_cost(assignment, [0] * len(blocks), [0] * len(blocks))
    step_seconds = longest_path(assignment, cost.columns)[0] + cost.per_step
    return SolvedTrial(trial, problem, solution, solved.sharding, blocks, cost, step_seconds, given, halved=solved.tables.halved)


def name_request(pins: Pins) -> str:
    """What the user requested, for messages that say why there is no plan."""
    return f"the pins {pins}" if pins else "the mesh and the stored layouts given"
