"""Graph and cluster -> the best plan over all meshes tried, baselines included.

Pure: opens no process group, touches no device, reads no environment.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from autopar.cost_models import Cluster
from autopar.errors import InfeasibleError, InputError, UnknownOpError
from autopar.ir import Graph, Layout, OpKind, Space
from autopar.plans import BlockChoice, Candidate, Pipeline, Plan, fingerprint
from autopar.rules import find_spaces
from autopar.schedules import make_schedule
from autopar.search.assemble import Chosen, Spread, assemble, workspace_bytes
from autopar.search.meshes import Trial, find_trials, group_trials
from autopar.search.pins import keep_pipeline, read_pipeline
from autopar.search.pipeline import Pipelined, PipelineSearch, Shape, choices_of
from autopar.search.placement import FORBIDDEN, Problem, Search, Solution, build_problem, least_bytes
from autopar.structure import Chain, Model, batch_size, find_chain, find_factors, find_tables, fold, regroup, relabel
from autopar.units import format_bytes

Progress = Callable[[str], None]

# Meshes of all ranks that are looked at with recomputation and a mixture of placements too, where memory is short.
RECOMPUTED = 2


@dataclass(frozen=True)
class Found:
    """A trial that was solved."""

    trial: Trial
    problem: Problem
    solution: Solution
    workspace: int

    @property
    def needed(self) -> int:
        """Bytes at the peak."""
        return self.solution.nbytes + self.workspace


@contextmanager
def _uncollected() -> Iterator[None]:
    """Collect no garbage meanwhile: planning makes little, and looking through a large graph for it again and again takes its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


LOSS_OUTSIDE = (
    "the model returns no loss, so every forward of schedule {} runs before the first backward, and as many micro-batches are held as under"
    " gpipe; return the loss to change this"
)


@_uncollected()
def make_plan(
    graph: Graph,
    cluster: Cluster,
    *,
    model_name: str = "model",
    pins: Mapping[str, object] | None = None,
    mesh: Mapping[str, int] | None = None,
    stored: Mapping[str, Layout] | None = None,
    first: Plan | None = None,
    strict: bool = False,
    notes: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> Plan:
    """The cheapest plan for `graph` on `cluster`.

    Args:
        graph: the captured program.
        cluster: the devices and links; its size is the number of ranks.
        model_name: for the report.
        pins: as in `autopar.plan`.
        mesh: axis name -> size, instead of searching meshes; dp, tp and cp are kinds, pp is the pipeline, any other is a free axis.
        stored: layouts that parameters already have and keep, by name; needs `mesh`.
        first: the plan that decided where the parameters are: its groups, schedule and stages are kept.
        strict: raise UnknownOpError when an op has no rule, instead of running it replicated.
        notes: what capture dropped or changed, for the report.
        progress: told what is being tried.

    Raises InfeasibleError when nothing fits the memory, InputError on pins that can't be had.
    """
    start = time.perf_counter()
    tell = progress or (lambda _: None)
    tell("rules and costs")
    spaces, unruled = find_spaces(graph)
    if unruled and strict:
        lines = "\n".join(f"  {op.target} at {op.source or op.name}" for op in unruled)
        raise UnknownOpError(f"{len(unruled)} ops have no rule and strict=True was asked for:\n{lines}")
    model, chain = _fold(graph, spaces, stored or {})
    wanted, pins, mesh = read_pipeline(pins or {}, mesh)
    if first is not None and not (first.pipeline.is_trivial and first.pipeline.keeps_all):
        wanted = keep_pipeline(first, chain, batch_size(graph, model.factors))
    if cluster.world_size % (wanted.groups or 1):
        raise InputError(
            f"pin pp={wanted.groups} needs a multiple of {wanted.groups} ranks, the cluster {cluster} has {cluster.world_size}"
        )
    if pins.get("fsdp") and wanted.groups == cluster.world_size > 1:
        raise InputError(
            f"pin fsdp=True stores parameters split over the ranks of a group, but pp={wanted.groups} leaves groups of one rank; "
            "pin a smaller pp, or leave fsdp out"
        )
    trials = find_trials(model, cluster, pins, mesh, stored or {}, wanted.groups or 1)
    is_open = mesh is None and not stored
    tried = _Tried()
    if not wanted.asks:
        tried = _solve_trials(model, trials, cluster, pins, tell, is_open=is_open)
    candidates = tried.candidates
    best = min(tried.found, key=lambda one: (one.solution.cost_ns, one.trial.baseline, len(one.trial.mesh.names)), default=None)
    pipelined: Pipelined | None = None
    if wanted.asks or is_open:
        search = PipelineSearch(model, chain, cluster, wanted, graph.loss is not None, tell)
        # Without a pipeline, micro-batches and recomputation only save memory.
        is_tight = best is None or best.solution.status != "optimal"
        shapes = search.find_shapes(
            lambda groups: group_trials(model, cluster, groups, pins, mesh, stored or {}), alone=wanted.asks or is_tight
        )
        shapes += [Shape(1, trial, 1) for trial in tried.promising[:RECOMPUTED] if is_tight]
        pipelined = search.run(shapes, best.solution.cost_ns / 1e9 if best is not None else math.inf)
        candidates += tuple(search.candidates)
        if pipelined is None and wanted.asks and search.refusals and all(one.memory_bytes is None for one in candidates):
            raise type(search.refusals[0])(f"{wanted} can't be had: {search.refusals[0]}")
    if best is None and pipelined is None:
        needed = [one.memory_bytes for one in candidates if one.memory_bytes is not None]
        if not needed:
            raise InfeasibleError(f"{wanted} leaves some op no placement that its neighbours' can be connected with; pin less")
        raise _infeasible(cluster, min(needed))
    trial = pipelined.shape.trial if pipelined is not None else best.trial  # type: ignore[union-attr]
    if pipelined is not None and graph.loss is None and pipelined.pipeline.schedule != "gpipe":
        notes = (*notes, LOSS_OUTSIDE.format(pipelined.pipeline.schedule))
    return assemble(
        _spread(pipelined, chain) if pipelined is not None else _unspread(best, model, chain),  # type: ignore[arg-type]
        rename=trial.name == "search" and is_open and (pipelined is None or not wanted.asks),
        cluster=cluster,
        model_name=model_name,
        fingerprint=fingerprint(graph),
        candidates=candidates,
        unruled=unruled,
        notes=notes,
        seconds=time.perf_counter() - start,
    )


def _fold(graph: Graph, spaces: Mapping[str, Space], stored: Mapping[str, Layout]) -> tuple[Model, Chain]:
    """What no mesh changes: the folded graph with its roles, and its blocks."""
    folded = fold(graph)
    chain = find_chain(folded, spaces)
    if stored:
        # Like blocks whose parameters are stored differently are no longer planned as one.
        numbers = {layout: number for number, layout in enumerate(dict.fromkeys(stored.values()))}
        folded = regroup(folded, {op.name: numbers[stored[op.target]] for op in graph.of_kind(OpKind.PARAMETER) if op.target in stored})
        chain = relabel(chain, folded)
    return Model(folded, spaces, find_factors(graph, spaces), find_tables(graph)), chain


def _spread(found: Pipelined, chain: Chain) -> Chosen:
    """A pipeline as what was chosen."""
    pipeline = found.pipeline
    rank_of = make_schedule(pipeline.schedule, pipeline.ranks, pipeline.microbatches, pipeline.chunks).rank_of
    spread = Spread(found.assignment, found.menus, chain, rank_of, found.recompute_seconds)
    return Chosen(found.model, found.mesh, found.choices, found.solution, 0, pipeline, spread)


def _unspread(found: Found, model: Model, chain: Chain) -> Chosen:
    """An answer without a pipeline as what was chosen."""
    blocks = tuple(BlockChoice(block.name, 0, "none") for block in chain.blocks)
    choices = choices_of(found.problem, found.solution.choice)
    return Chosen(model, found.problem.mesh, choices, found.solution, found.workspace, Pipeline(1, "gpipe", 1, 1, blocks, {}), None)


@dataclass(frozen=True)
class _Tried:
    """What came of trials without a pipeline: answers within the memory, every outcome, and the trials by what they cost at least."""

    found: Sequence[Found] = ()
    candidates: tuple[Candidate, ...] = ()
    promising: Sequence[Trial] = ()


def _solve_trials(
    model: Model, trials: Sequence[Trial], cluster: Cluster, pins: Mapping[str, object], tell: Progress, *, is_open: bool
) -> _Tried:
    """Solve all trials in which every op has a placement; none when pipelines are open and no split at all can save enough memory."""
    least = least_bytes(model, cluster.world_size)
    if is_open and least > cluster.machine.device.usable_bytes:
        outcome = f"out of memory: without recomputation {format_bytes(least)} and more on each device, however it is split"
        return _Tried(candidates=(Candidate("search", f"any of {len(trials)} meshes", None, None, outcome),))
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
            f"the pins {dict(pins)} leave some op no placement that its neighbours' can be connected with, on any of "
            f"{len(trials)} meshes tried; pin fewer modules, or pin ops that read the same tensor alike"
        )
    # The most promising first: what they reach prunes the others by their bounds.
    searches.sort(key=lambda one: one[1].bound_ns)
    found: list[Found] = []
    candidates: list[Candidate] = []
    for trial, search in searches:
        tell(f"memory: {trial.name} on {trial.mesh}")
        cutoff = min((one.solution.cost_ns for one in found), default=None)
        answer = _try(model, trial, search, cluster, cutoff, tighten=not is_open)
        if answer is None:
            candidates.append(Candidate(trial.name, str(trial.mesh), search.bound_in_memory_ns / 1e9, None, "pruned: costs at least this"))
        elif isinstance(answer, InfeasibleError):
            candidates.append(Candidate(trial.name, str(trial.mesh), None, answer.needed, "out of memory"))
        else:
            found.append(answer)
            seconds = answer.solution.cost_ns / 1e9
            candidates.append(Candidate(trial.name, str(trial.mesh), seconds, answer.needed, answer.solution.status))
    return _Tried(found, tuple(candidates), [trial for trial, _ in searches if not trial.baseline])


def _try(
    model: Model, trial: Trial, search: Search, cluster: Cluster, cutoff_ns: int | None, *, tighten: bool
) -> Found | InfeasibleError | None:
    """Solve one trial, or None when it can't beat `cutoff_ns`.

    The space that ops need while they run is known only with a solution, so it is found in rounds.
    """
    budget = cluster.machine.device.usable_bytes
    workspace = 0
    for _ in range(4):
        try:
            solution = search.fit(budget - workspace, cutoff_ns, tighten=tighten)
        except InfeasibleError:
            break
        if solution is None:
            return None
        needs = workspace_bytes(model, search.problem.mesh, choices_of(search.problem, solution.choice))
        if solution.nbytes + needs <= budget:
            return Found(trial, search.problem, solution, needs)
        workspace = max(needs, workspace + 1)
    # What was set aside is what faster choices need to run; a lean one may do with less.
    lean = [
        Found(trial, search.problem, one, workspace_bytes(model, search.problem.mesh, choices_of(search.problem, one.choice)))
        for one in search.lean(budget)
    ]
    fitting = [one for one in lean if one.needed <= budget]
    if fitting:
        return min(fitting, key=lambda one: one.solution.cost_ns)
    error = InfeasibleError("no choice found fits")
    error.needed = min(one.needed for one in lean)
    return error


def _infeasible(cluster: Cluster, needed: int) -> InfeasibleError:
    device = cluster.machine.device
    total = needed + device.reserved_bytes
    error = InfeasibleError(
        f"no plan fits: the leanest found needs {format_bytes(total)} on each of {cluster.world_size} devices, "
        f"{format_bytes(device.memory_bytes)} are there ({format_bytes(device.reserved_bytes)} of them reserved); "
        f"the memory would have to grow by {format_bytes(total - device.memory_bytes)}. "
        "Use more devices, a smaller batch or sequence, or a narrower dtype"
    )
    error.needed = total
    return error
