"""A captured graph and a cluster to the best plan found: over meshes and baselines without a pipeline, then over pipelines.

Comes in: a `Graph`, a cluster, pins. Goes out: a `Plan` with its proof. Opens no process group, touches no device, reads no environment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from autopar.cost_models import Cluster
from autopar.errors import InfeasibleError, InputError, SolverError, UnknownOpError
from autopar.garbage import no_garbage_collection
from autopar.ir import AS_MODEL, Graph, Layout, Mesh, Op, OpKind, Precision, Space, format_mesh
from autopar.plans import NO_PINS, BlockChoice, Candidate, Pins, Pipeline, Plan, fingerprint
from autopar.rules import find_spaces, readable_name
from autopar.schedules import make_schedule
from autopar.search.assemble import assemble
from autopar.search.attention import note_attention, note_unused
from autopar.search.attribution import Chosen
from autopar.search.candidates import name_axes
from autopar.search.loss_chunks import plan_with_chunks
from autopar.search.meshes import can_free, find_free_trials, find_kind_trials, find_pipeline_trials, find_trials
from autopar.search.pipeline import Configuration, Pipelined, find_configurations, make_pipeline_problem, search_pipelines
from autopar.search.trials import Progress, SolvedTrial, TrialResults, name_request, solve_trials
from autopar.structure import (
    AnalyzedGraph,
    Chain,
    batch_size,
    find_chain,
    find_constants,
    find_roles,
    first_rank_axis,
    fold,
    regroup,
    relabel,
)
from autopar.texts import printable
from autopar.units import format_bytes

# Where memory is short, so many meshes without a pipeline, those of the least bounds, are also tried with recomputation and mixtures of
# solutions.
RECOMPUTED = 4

# Where a plan takes more than the share FULL of the memory that isn't reserved, and the parameters of a mean block more than the share
# GATHERED, plans that begin no gather ahead are looked at too. Of more than FEW_BLOCKS one is too small a part of the model to be worth it.
FULL = 0.8
GATHERED = 0.02
FEW_BLOCKS = 16

LOSS_OUTSIDE = (
    "the model returns no loss, so every forward of schedule {} runs before the first backward, and as many micro-batches are held as under"
    " gpipe; return the loss to change this"
)


@dataclass(frozen=True)
class _Request:
    """What to plan, and under what.

    Attributes:
        model: the folded graph.
        chain: its blocks.
        cluster: all devices.
        pins: what the user fixed, or what an earlier program over the same parameters decided.
        mesh: the only mesh of a pipeline rank to try; None leaves it to the search.
        stored: layouts in which parameters are stored already, by name.
    """

    model: AnalyzedGraph
    chain: Chain
    cluster: Cluster
    pins: Pins
    mesh: Mesh | None
    stored: Mapping[str, Layout]

    @property
    def is_open(self) -> bool:
        """Whether the search may choose a pipeline though none is pinned."""
        return self.mesh is None and not self.stored


_WAITS = "gathers of parameters are not begun ahead (prefetch=0), as memory is short"


@no_garbage_collection()
def make_plan(
    graph: Graph,
    cluster: Cluster,
    *,
    model_name: str = "model",
    precision: Precision = AS_MODEL,
    pins: Pins = NO_PINS,
    mesh: Mesh | None = None,
    stored: Mapping[str, Layout] | None = None,
    first_plan: Plan | None = None,
    strict: bool = False,
    notes: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> Plan:
    """The cheapest plan for `graph` on `cluster`.

    Args:
        graph: the captured program.
        cluster: the devices and links; its size is the number of ranks.
        model_name: for the report.
        precision: with which the program was captured.
        pins: what the user fixed (`autopar.plans.reconcile` brings a mesh and pins together that are given side by side).
        mesh: the mesh of a pipeline rank, instead of searching meshes; axes called dp, tp and cp have that kind, others are free.
        stored: layouts in which parameters are stored already, by name; needs `mesh`.
        first_plan: the plan that the parameters are stored by, whose pipeline ranks, schedule and stages are obeyed.
        strict: raise UnknownOpError when an op has no rule, instead of running it replicated.
        notes: what capture dropped or changed, for the report.
        progress: called with a line of text for each thing that is tried.

    Raises InfeasibleError when nothing fits the memory, InputError on pins that can't be had, its subclass HardwareError on dtypes that the
    machine's profile doesn't know, UnknownOpError as `strict` says.
    """
    tell = progress or (lambda _: None)
    graph = graph.on_device(cluster.machine.device.kind)
    if pins.half_batches:
        pins = replace(pins, pp=None, schedule=None, microbatches=None, chunks=None, recompute=None)  # they say that there is no pipeline

    def attempt(graph: Graph) -> Plan:
        asked = _Asked(cluster, model_name, precision, pins, mesh, stored or {}, first_plan, strict, notes)
        try:
            plan = _plan_graph(graph, asked, tell)
            if pins.prefetch is None and first_plan is None and _gathers_weigh(plan, graph):
                with suppress(InfeasibleError, SolverError):  # a search that was cut short
                    return min(plan, _plan_graph(graph, asked.waiting(), tell), key=lambda plan: plan.proof.objective_ns)
            return plan
        except InputError as error:
            if first_plan is None or not pins.half_batches:
                raise
            # Another kind of call, such as a smaller last batch, runs whole where it can't run in halves.
            whole = replace(asked, pins=replace(pins, half_batches=False), notes=(*notes, f"the batch runs whole: {error}"))
            return _plan_graph(graph, whole, tell)

    memory_nbytes = cluster.world_size * cluster.machine.device.memory_bytes
    plan = plan_with_chunks(graph, pins, first_plan, memory_nbytes, attempt)
    return replace(plan, fingerprint=fingerprint(graph))


@dataclass(frozen=True)
class _Asked:
    """The arguments of `make_plan` but for the graph."""

    cluster: Cluster
    model_name: str
    precision: Precision
    pins: Pins
    mesh: Mesh | None
    stored: Mapping[str, Layout]
    first_plan: Plan | None
    strict: bool
    notes: tuple[str, ...]

    def waiting(self) -> _Asked:
        """The same, but no gather is begun ahead."""
        return replace(self, pins=replace(self.pins, prefetch=0), notes=(*self.notes, _WAITS))


def _gathers_weigh(plan: Plan, graph: Graph) -> bool:
    """Whether a plan gathers ahead and takes nearly all memory, and the parameters of a block are much of it."""
    usable, blocks = plan.memory.budget - plan.memory.reserved, len(plan.pipeline.blocks)
    block_nbytes = sum(op.results[0].nbytes for op in graph.of_kind(OpKind.PARAMETER)) / blocks
    is_full = plan.memory.total - plan.memory.reserved > FULL * usable
    return plan.prefetch > 0 and is_full and blocks <= FEW_BLOCKS and block_nbytes > GATHERED * usable


def _plan_graph(graph: Graph, asked: _Asked, tell: Progress) -> Plan:
    """The cheapest plan for a graph whose losses are computed in as many chunks as it says."""
    cluster, pins, mesh, first_plan, notes = asked.cluster, asked.pins, asked.mesh, asked.first_plan, asked.notes
    tell("rules and costs")
    spaces, unruled = _read_rules(graph, strict=asked.strict)
    model, chain = _fold(graph, spaces, asked.stored, _widest_axis(cluster, pins, mesh))
    if first_plan is not None and not (first_plan.pipeline.is_trivial and first_plan.pipeline.keeps_all):
        batch, parts = batch_size(graph, model.roles), first_plan.pipeline.microbatches
        pins = pin_pipeline(pins, first_plan, chain, batch)
        if pins.microbatches != parts:
            fewer = f"a batch of {batch} can't be split into {parts} micro-batches, as the first plan's: it runs in {pins.microbatches}"
            notes = (*notes, fewer)
    notes = (*notes, *note_attention(model, pins, mesh, cluster.world_size // (pins.pp or 1), is_later=first_plan is not None))
    request = _Request(model, chain, cluster, pins, mesh, asked.stored)
    results = _search_placements(request, tell)
    pipelined, candidates = _search_pipelines(request, results, tell)
    candidates = (*results.candidates, *candidates)
    if pipelined is not None:
        chosen, trial, halves = _choose_pipelined(pipelined, model, chain), pipelined.configuration.trial, False
        candidate = len(results.candidates) + pipelined.candidate
    elif results.best is not None:
        chosen, trial, halves = _choose_solved(results.best, model, chain), results.best.trial, results.best.half_batches
        candidate = results.best.candidate
    elif pins.prefetch is None and any(candidate.memory_bytes is not None for candidate in candidates):
        # What is in flight takes memory.
        return _plan_graph(graph, asked.waiting(), tell)
    else:
        raise _infeasible(request, candidates)
    # Axes that the user named keep their names.
    rename = trial.freed or (trial.name == "search" and request.is_open and not pins.asks_for_pipeline)
    if rename and pipelined is not None and trial.free_mesh:
        candidates = _name_freed(candidates, candidate, chosen)
    return assemble(
        chosen,
        rename=rename,
        cluster=cluster,
        model_name=asked.model_name,
        precision=asked.precision,
        prefetch=pins.ahead,
        half_batches=halves,
        fingerprint=fingerprint(graph),
        candidates=candidates,
        candidate=candidate,
        unruled=unruled,
        notes=(*notes, *note_unused(chosen.model, pins, chosen.sharding.placements), *_note_loss(graph, chosen.pipeline)),
    )


def _name_freed(candidates: Sequence[Candidate], number: int, chosen: Chosen) -> tuple[Candidate, ...]:
    """The candidates, of which the chosen pipeline says what its free axes do, and that they were free."""
    first_axis = first_rank_axis(chosen.mesh)
    named = name_axes(chosen.model, chosen.mesh, chosen.sharding.placements)
    tried, found = (format_mesh(Mesh(mesh.names[first_axis:], mesh.sizes[first_axis:])) for mesh in (chosen.mesh, named))
    candidate = candidates[number]
    candidate = replace(candidate, mesh=f"{candidate.mesh.replace(tried, found)}, free axes")
    return (*candidates[:number], candidate, *candidates[number + 1 :])


def pin_pipeline(pins: Pins, first_plan: Plan, chain: Chain, batch: int) -> Pins:
    """The pins of a later program over parameters that are stored by an earlier plan.

    Args:
        pins: to which those of the pipeline are added.
        first_plan: the earlier plan, whose pipeline ranks, schedule and stages of blocks are pinned.
        chain: the blocks of the later program.
        batch: rows of its batch. It has as many micro-batches as these can be split into, but not more than the earlier plan.

    Recomputation is left to the search.
    """
    pipeline = first_plan.pipeline
    stage_of = {block.name: block.stage for block in pipeline.blocks}
    stages: dict[str, int] = {}
    stage = 0
    for block in chain.blocks:
        # A block that the first program didn't have, such as a loss, is on the stage of the block before it.
        stage = stages[block.name] = stage_of.get(printable(block.name), stage)
    mesh = first_plan.mesh
    parts = math.prod(size for name, size in zip(mesh.names, mesh.sizes, strict=True) if name in first_plan.batch_axes)
    rows = batch // parts if batch % parts == 0 else batch
    count = max(n for n in range(1, min(pipeline.microbatches, rows) + 1) if rows % n == 0)
    return replace(
        pins,
        pp=pipeline.ranks,
        schedule=pipeline.schedule,
        microbatches=count,
        chunks=pipeline.chunks,
        recompute=None,
        stages=stages,
    )


def _read_rules(graph: Graph, *, strict: bool) -> tuple[Mapping[str, Space], tuple[Op, ...]]:
    """The space of every op with a rule, by name, and the ops without one; raises UnknownOpError if there are any and `strict`."""
    spaces, unruled = find_spaces(graph)
    if unruled and strict:
        lines = "\n".join(f"  {op.target} at {op.source or op.name}" for op in unruled)
        raise UnknownOpError(
            f"{len(unruled)} ops have no rule and strict=True was asked for:\n{lines}\n"
            f'Say how they split with autopar.register_rule("{readable_name(unruled[0].target)}", ...), or leave out strict=True'
        )
    return spaces, unruled


def _widest_axis(cluster: Cluster, pins: Pins, mesh: Mesh | None) -> int:
    """The largest number of ranks that may split heads together; without a pin as many as a machine has."""
    if mesh is not None:
        return mesh.world_size if pins.attention == "ulysses" else max(mesh.sizes)
    ranks = pins.tp or min(cluster.devices_per_node, cluster.world_size)
    # Heads that tp splits can be split further by cp then.
    return ranks * (pins.cp or 1) if pins.attention == "ulysses" else ranks


def _fold(graph: Graph, spaces: Mapping[str, Space], stored: Mapping[str, Layout], ranks: int) -> tuple[AnalyzedGraph, Chain]:
    """What depends on no more of the mesh than the `ranks` of its widest axis: the folded graph, the roles of its dims, its blocks."""
    folded = fold(graph)
    chain = find_chain(folded, spaces)
    if stored:
        # Like blocks whose parameters are stored differently are not folded into one.
        numbers = {layout: number for number, layout in enumerate(dict.fromkeys(stored.values()))}
        folded = regroup(folded, {op.name: numbers[stored[op.target]] for op in graph.of_kind(OpKind.PARAMETER) if op.target in stored})
        chain = relabel(chain, folded)
    return AnalyzedGraph(folded, spaces, find_roles(graph, spaces, ranks), find_constants(graph)), chain


def _search_placements(request: _Request, tell: Progress) -> TrialResults:
    """Solve every mesh without a pipeline; none when pins ask for a pipeline. Raises InputError on pins that can't be had."""
    cluster, pins = request.cluster, request.pins
    pipeline_ranks = pins.pp or 1
    # Also where a pipeline is asked for, since this checks the pins against the model and the cluster.
    trials = find_trials(request.model, cluster, pins, request.mesh, request.stored, pipeline_ranks)
    if pins.asks_for_pipeline:
        return TrialResults()
    results = solve_trials(request.model, request.chain, trials, cluster, pins, tell, is_open=request.is_open)
    if request.is_open and not pins.axis_sizes and results.is_tight and results.by_bound:
        # Where memory is short, a search that knows what each axis splits comes closer than one of free axes.
        tried = {trial.mesh for trial in trials if not trial.baseline}
        kinds = [trial for trial in find_kind_trials(request.model, cluster, cluster, pins, "search") if trial.mesh not in tried]
        results = solve_trials(request.model, request.chain, kinds, cluster, pins, tell, is_open=True, so_far=results)
    return results


def _search_pipelines(request: _Request, results: TrialResults, tell: Progress) -> tuple[Pipelined | None, tuple[Candidate, ...]]:
    """(the fastest pipeline that is faster than the best of `results`, if there is one; the outcome of every pipeline looked at).

    No pipeline is looked at when the mesh is given and pins don't ask for one.
    """
    model, pins, best = request.model, request.pins, results.best
    if not (pins.asks_for_pipeline or (request.is_open and not pins.half_batches)):
        return None, ()
    problem = make_pipeline_problem(model, request.chain, request.cluster, pins, returns_loss=model.folded.graph.loss is not None)
    # On one pipeline rank, micro-batches and recomputation only save memory.
    configurations = find_configurations(
        problem,
        lambda ranks: find_pipeline_trials(model, request.cluster, ranks, pins, request.mesh, request.stored),
        alone=pins.asks_for_pipeline or results.is_tight,
    )
    if results.is_tight:
        known = {configuration.trial.mesh for configuration in configurations if configuration.ranks == 1}
        configurations += [Configuration(1, trial, 1) for trial in results.by_bound[:RECOMPUTED] if trial.mesh not in known]
    free: list[Configuration] | None = None
    if request.is_open and can_free(pins):
        # Without pins those of one pipeline rank are among the meshes of `results`. Of several, only a request that says as much as a plan
        # does is worth the time.
        ranks = pins.pp or 1
        is_told = pins.asks_for_pipeline and (ranks == 1 or pins.microbatches is not None)
        meshes = find_free_trials(request.cluster.part(ranks), pins) if is_told else []
        free = [Configuration(ranks, trial, pins.microbatches or 1) for trial in meshes]
    searched = search_pipelines(problem, configurations, math.inf if best is None else best.step_seconds, tell, free)
    is_refused = searched.best is None and all(candidate.memory_bytes is None for candidate in searched.candidates)
    if is_refused and pins.asks_for_pipeline and searched.refusals:
        raise type(searched.refusals[0])(f"the pins {pins} can't be had: {searched.refusals[0]}")
    return searched.best, searched.candidates


def _choose_pipelined(pipelined: Pipelined, model: AnalyzedGraph, chain: Chain) -> Chosen:
    """A pipeline, in the form that a plan is assembled from."""
    pipeline, assignment, solution = pipelined.pipeline, pipelined.assignment, pipelined.solution
    return Chosen(
        model=pipelined.model,
        mesh=pipelined.mesh,
        sharding=pipelined.sharding,
        base=model.folded,
        solution=solution,
        pipeline=pipeline,
        chain=chain,
        options=tuple(block.options[index] for block, index in zip(pipelined.blocks, assignment.options, strict=True)),
        cuts=tuple(block.cut for block in pipelined.blocks),
        rank_of=make_schedule(pipeline.schedule, pipeline.ranks, pipeline.microbatches, pipeline.chunks).rank_of,
        cost=pipelined.cost,
        step_seconds=assignment.simulated,
        bound_seconds=assignment.bound,
        status=assignment.status,
        method=f"{solution.method}; cutting planes, {assignment.iterations} round{'' if assignment.iterations == 1 else 's'}",
    )


def _choose_solved(solved: SolvedTrial, model: AnalyzedGraph, chain: Chain) -> Chosen:
    """A solution without a pipeline, in the form that a plan is assembled from: all blocks are on one stage."""
    blocks = tuple(BlockChoice(printable(block.name), printable(block.path), 0, "none") for block in chain.blocks)
    return Chosen(
        model=model,
        mesh=solved.problem.mesh,
        sharding=solved.sharding,
        base=model.folded,
        solution=solved.solution,
        pipeline=Pipeline(1, "gpipe", 1, 1, blocks, {}),
        chain=chain,
        options=tuple(block.options[0] for block in solved.blocks),
        cuts=tuple(block.cut for block in solved.blocks),
        rank_of=(0,),
        cost=solved.cost,
        step_seconds=solved.step_seconds,
        bound_seconds=solved.solution.bound_ns / 1e9,
        # The bound is that of programs that run on the whole batch.
        status=f"{solved.solution.status} without half batches" if solved.half_batches else solved.solution.status,
        method=solved.solution.method,
        halved=solved.halved,
    )


def _note_loss(graph: Graph, pipeline: Pipeline) -> tuple[str, ...]:
    """A note for the report if the loss is computed outside of the model, so that no backward can start before all forwards are done."""
    if graph.loss is not None or pipeline.schedule == "gpipe":
        return ()
    return (LOSS_OUTSIDE.format(pipeline.schedule),)


def _infeasible(request: _Request, candidates: tuple[Candidate, ...]) -> InfeasibleError:
    """The error that says why there is no plan: the memory that the leanest candidate lacks, or pins that leave some op no placement."""
    needed = min((candidate.memory_bytes for candidate in candidates if candidate.memory_bytes is not None), default=None)
    if needed is None:
        return InfeasibleError(
            f"{name_request(request.pins)} leave some op no placement that its neighbours' can be connected with; pin less"
        )
    cluster = request.cluster
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
