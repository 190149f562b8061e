"""Which pipelines the search looks at, and what each comes to: stages, micro-batches, schedule, recomputation.

For every number of groups, mesh of a group and number of micro-batches, the placements of one micro-batch are searched as they are
without a pipeline; from the answer, blocks get their menus, and `assignment` spreads them over stages. Lower bounds decide what is tried
first and what isn't tried: the work of a step can at best be spread evenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

from autopar.assignment import Assignment, BlockMenu, assign
from autopar.blocks import Chain
from autopar.cost_models import Cluster, axis_link
from autopar.costs import CostTables, local_nbytes
from autopar.errors import InfeasibleError, InputError, SolverError
from autopar.generators import SCHEDULES, make_schedule
from autopar.ir import OpKind
from autopar.layout import PIPELINE, REPLICATE, Mesh, with_pipeline
from autopar.meshes import Trial
from autopar.microbatch import batch_size, split_microbatches
from autopar.options import AxisKind, Model, in_time, is_inside
from autopar.plans import RECOMPUTE, BlockChoice, Candidate, Pipeline, Plan
from autopar.problem import FORBIDDEN, Problem, build_problem
from autopar.search import Search, Solution
from autopar.variants import Choices, Menus

PINS = ("pp", "schedule", "microbatches", "chunks", "recompute")

# Rows of a micro-batch on one rank that are tried when nobody says: more fill the device better, fewer make bubbles smaller.
ROWS = (1, 2, 4, 8, 16)
# Schedules tried beside the first, for this many of the best pipelines.
FAMILIES = ("interleaved", "zb-h1", "zb-v", "v-half")
REFINED = 3
# Prices of memory at which placements are searched, as multiples of the step over the budget: from fast to lean.
PRICES = (0.0, 2.0, 128.0)
# Seconds for one assignment; what it finds by then is taken with the bound that it has.
ASSIGN_SECONDS = 3.0


@dataclass(frozen=True)
class Pipelined:
    """A pipeline that was found: its placements, and what its blocks do."""

    shape: Shape
    problem: Problem
    solution: Solution
    model: Model
    pipeline: Pipeline
    assignment: Assignment
    menus: tuple[BlockMenu, ...]

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.assignment.simulated


@dataclass(frozen=True)
class Wanted:
    """What the user asked of the pipeline; None is left to the search."""

    groups: int | None = None
    schedule: str | None = None
    microbatches: int | None = None
    chunks: int | None = None
    recompute: str | None = None
    stages: Mapping[str, int] | None = None

    @property
    def asks(self) -> bool:
        """Whether anything was asked for."""
        return any(value is not None for value in (self.groups, self.schedule, self.microbatches, self.chunks, self.recompute, self.stages))

    def __str__(self) -> str:
        names = {"groups": "pp", "stages": "stages"}
        given = ((names.get(one.name, one.name), getattr(self, one.name)) for one in fields(self))
        return "the pins " + ", ".join(f"{name}={value}" for name, value in given if value is not None)


def read_pipeline(pins: Mapping[str, object], mesh: Mapping[str, int] | None) -> tuple[Wanted, dict[str, object], dict[str, int] | None]:
    """What the user asks of the pipeline; the pins and the mesh of one group of ranks that are left."""
    wanted = read_pins({**pins, **({PIPELINE: mesh[PIPELINE]} if mesh is not None and PIPELINE in mesh else {})})
    left: dict[str, object] = {}
    for name, value in pins.items():
        if name in PINS:
            continue
        loops = {axis: loop for axis, loop in value.items() if axis != PIPELINE} if isinstance(value, Mapping) else value
        if loops or not isinstance(value, Mapping):
            left[name] = loops
    inner = None if mesh is None else {name: size for name, size in mesh.items() if name != PIPELINE}
    return wanted, left, inner if inner is None or inner else {"free": 1}


def read_pins(pins: Mapping[str, object]) -> Wanted:
    """What `pins` say about pipelines. Raises InputError for values that can't be used."""
    for name in ("pp", "microbatches", "chunks"):
        value = pins.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"pin {name}={value!r}: an integer from 1 is needed")
    schedule, recompute = pins.get("schedule"), pins.get("recompute")
    if schedule is not None and schedule not in SCHEDULES:
        raise InputError(f"pin schedule={schedule!r} is unknown; there are {', '.join(SCHEDULES)}")
    if isinstance(recompute, bool):
        recompute = "full" if recompute else "none"
    if recompute is not None and recompute not in RECOMPUTE:
        raise InputError(f"pin recompute={recompute!r} is unknown; there are {', '.join(RECOMPUTE)}, true (full) and false (none)")
    stages = {name: value["pp"] for name, value in pins.items() if isinstance(value, Mapping) and "pp" in value}
    for name, stage in stages.items():
        if isinstance(stage, bool) or not isinstance(stage, int) or stage < 0:
            raise InputError(f"pin {name!r}: pp={stage!r} isn't the number of a stage, which is an integer from 0")

    def size(name: str) -> int | None:
        value = pins.get(name)
        return value if isinstance(value, int) else None

    return Wanted(
        size("pp"),
        str(schedule) if schedule is not None else None,
        size("microbatches"),
        size("chunks"),
        str(recompute) if recompute is not None else None,
        stages or None,
    )


def keep_pipeline(first: Plan, chain: Chain, batch: int) -> Wanted:
    """What a later program over the same parameters must keep: groups, schedule, and each block's stage; as many micro-batches as fit."""
    pipeline = first.pipeline
    known = {block.name: block.stage for block in pipeline.blocks}
    stages: dict[str, int] = {}
    stage = 0
    for block in chain.blocks:
        # A block that the first program didn't have (its loss, say) stays with the one before it.
        stage = stages[block.name] = known.get(block.name, stage)
    ways = math.prod(size for name, size in zip(first.mesh.names, first.mesh.sizes, strict=True) if name in first.batch_axes)
    rows = batch // ways if batch % ways == 0 else batch
    count = max(n for n in range(1, min(pipeline.microbatches, rows) + 1) if rows % n == 0)
    return Wanted(pipeline.ranks, pipeline.schedule, count, pipeline.chunks, None, stages)


@dataclass(frozen=True, eq=False)
class Shape:
    """A pipeline to look at: groups of ranks, the trial of each group, micro-batches."""

    groups: int
    trial: Trial
    microbatches: int

    def __str__(self) -> str:
        return f"{with_pipeline(self.trial.mesh, self.groups)}, {self.microbatches} micro-batches"


class PipelineSearch:
    """Looks at pipelines of one model on one cluster."""

    def __init__(
        self,
        model: Model,
        chain: Chain,
        cluster: Cluster,
        wanted: Wanted,
        returns_loss: bool,
        tell: Callable[[str], None],
    ) -> None:
        self.model = model
        self.graph = model.folded.graph
        self.chain = chain
        self.cluster = cluster
        self.wanted = wanted
        self.returns_loss = returns_loss
        self.tell = tell
        self.candidates: list[Candidate] = []
        self.reasons: dict[int, tuple[str, ...]] = {}
        self._problems: dict[Shape, tuple[Model, Problem, Search] | None] = {}
        self.pinned = self._read_stages()

    def run(self, shapes: Sequence[Shape], cutoff: float) -> Pipelined | None:
        """The fastest pipeline that takes less than `cutoff` seconds; None when none does."""
        bounded = []
        for shape in shapes:
            bound = self._bound(shape)
            if bound is not None:
                bounded.append((bound, shape))
        bounded.sort(key=lambda one: one[0])
        found: list[Pipelined] = []
        for bound, shape in bounded:
            best = min((one.seconds for one in found), default=cutoff)
            if bound >= best:
                self._note(shape, bound, None, "pruned: costs at least this")
                continue
            self.tell(f"stages: {shape}")
            answer = self._try(shape, self._first_families(shape), best)
            if answer is not None:
                found.append(answer)
        found.sort(key=lambda one: one.seconds)
        refined = list(found)
        if self.wanted.schedule is None and self.returns_loss:
            for one in found[:REFINED]:
                if one.shape.groups == 1:
                    continue
                best = min(two.seconds for two in refined)
                answer = self._try(one.shape, self._other_families(one.shape), best)
                if answer is not None:
                    refined.append(answer)
        return min(refined, key=lambda one: one.seconds, default=None)

    def _note(self, shape: Shape, seconds: float | None, nbytes: int | None, outcome: str) -> None:
        name = "pipeline" if shape.groups > 1 else "micro-batches" if shape.microbatches > 1 else "recomputation"
        self.candidates.append(Candidate(name, str(shape), seconds, nbytes, outcome))

    def _read_stages(self) -> dict[str, int]:
        """Stages by block, from those that the user gave by module."""
        pinned: dict[str, int] = {}
        for pattern, stage in (self.wanted.stages or {}).items():
            inside = [
                block.name
                for block in self.chain.blocks
                if is_inside(block.name, pattern) or any(is_inside(self.graph.by_name[name].layer, pattern) for name in block.ops)
            ]
            if not inside:
                known = ", ".join(block.name for block in self.chain.blocks[:12])
                raise InputError(f"pin {pattern!r} puts no block on stage {stage}; the blocks are {known}")
            pinned.update(dict.fromkeys(inside, stage))
        return pinned

    def _bound(self, shape: Shape) -> float | None:
        """Seconds that no assignment of this shape goes below; None when there is no placement for it."""
        prepared = self._prepare(shape)
        return None if prepared is None else prepared[2].bound_ns / 1e9 / shape.groups

    def _prepare(self, shape: Shape) -> tuple[Model, Problem, Search] | None:
        if shape not in self._problems:
            self._problems[shape] = self._build(shape)
        return self._problems[shape]

    def _build(self, shape: Shape) -> tuple[Model, Problem, Search] | None:
        count = shape.microbatches
        self.tell(f"costs: {shape}")
        micro = split_microbatches(self.graph, self.model.spaces, self.model.factors, count)
        if micro.reasons:
            self.reasons[count] = micro.reasons
            return None
        model = replace(self.model, micro=micro)
        constraints = replace(shape.trial.constraints, kinds=(AxisKind.TIME, *shape.trial.constraints.kinds))
        problem = build_problem(model, in_time(shape.trial.mesh, count), self.cluster, constraints)
        search = Search(problem)
        return (model, problem, search) if search.bound_ns < FORBIDDEN else None

    def _first_families(self, shape: Shape) -> list[tuple[str, int]]:
        if self.wanted.schedule is not None:
            return list(self._of_family(self.wanted.schedule, shape))
        if not self.returns_loss:
            return [("gpipe", 1)]
        if self.wanted.chunks is not None and self.wanted.chunks > 1:
            return list(self._of_family("interleaved", shape))
        return [("1f1b", 1)]

    def _other_families(self, shape: Shape) -> list[tuple[str, int]]:
        return [one for family in FAMILIES for one in self._of_family(family, shape)]

    def _of_family(self, family: str, shape: Shape) -> Iterator[tuple[str, int]]:
        """(family, chunks) that can be had for this shape."""
        most = len(self.chain.blocks) // shape.groups
        if self.wanted.chunks is not None:
            chunks: Sequence[int] = (self.wanted.chunks,)
        else:
            chunks = {"interleaved": [v for v in (2, 3, 4, 6, 8) if v <= most], "zb-v": [2], "v-half": [2]}.get(family, [1])
        for count in chunks:
            try:
                make_schedule(family, shape.groups, shape.microbatches, count)
            except InputError:
                if self.wanted.schedule is not None:
                    raise
                continue
            if count <= most:
                yield family, count

    def _try(self, shape: Shape, families: Sequence[tuple[str, int]], best: float) -> Pipelined | None:
        """The best of these schedules for a shape, if it is better than `best`."""
        prepared = self._prepare(shape)
        assert prepared is not None
        model, problem, search = prepared
        mesh = with_pipeline(shape.trial.mesh, shape.groups)
        link = axis_link(self.cluster, mesh.sizes, 0) if shape.groups > 1 else None
        tables = CostTables(model, problem.mesh, self.cluster)
        budget = self.cluster.machine.device.usable_bytes - self._held_bytes(tables.mesh)
        recompute = RECOMPUTE if self.wanted.recompute is None else (self.wanted.recompute,)
        found: Pipelined | None = None
        leanest: int | None = None
        for family, chunks in families:
            schedule = make_schedule(family, shape.groups, shape.microbatches, chunks)
            for solution in self._answers(search, shape.groups * budget):
                menus = self._menus(model, tables, problem, solution, link, recompute, schedule.splits_backward)
                makers, blocks = menus
                try:
                    assignment = assign(blocks, schedule, budget, time_limit=ASSIGN_SECONDS)
                except InfeasibleError as error:
                    if error.needed == 0:
                        raise
                    leanest = error.needed if leanest is None else min(leanest, error.needed)
                    continue
                except SolverError:
                    continue
                if assignment.simulated < min(best, found.seconds if found is not None else math.inf):
                    names = [blocks[i].variants[v].name for i, v in enumerate(assignment.variants)]
                    choices = tuple(
                        BlockChoice(block.name, stage, name)
                        for block, stage, name in zip(self.chain.blocks, assignment.stages, names, strict=True)
                    )
                    travel = {name: layout[1:] for name, layout in makers.travel().items()} if shape.groups * chunks > 1 else {}
                    pipeline = Pipeline(shape.groups, family, chunks, shape.microbatches, choices, travel)
                    found = Pipelined(shape, problem, solution, model, pipeline, assignment, blocks)
                self._note(
                    shape, assignment.simulated, max(assignment.peak), f"{family}{f' x{chunks}' if chunks > 1 else ''}: {assignment.status}"
                )
                # Leaner placements are slower: they are tried only where the fast ones had to recompute.
                if all(blocks[i].variants[v].name == "none" for i, v in enumerate(assignment.variants)):
                    break
        if leanest is not None and found is None:
            self._note(shape, None, leanest, "out of memory")
        return found

    def _answers(self, search: Search, budget: int) -> Iterator[Solution]:
        """Different placements, from fast to lean."""
        seen: list[Mapping[str, int]] = []
        for price in PRICES:
            solution = search.solution_at(price * search.bound_ns / budget)
            if solution.choice not in seen:
                seen.append(solution.choice)
                yield solution

    def _menus(
        self,
        model: Model,
        tables: CostTables,
        problem: Problem,
        solution: Solution,
        link: object,
        recompute: Sequence[str],
        splits_backward: bool,
    ) -> tuple[Menus, tuple[BlockMenu, ...]]:
        choices = choices_of(model, problem, solution)
        makers = Menus(model, self.chain, tables, choices, link)  # type: ignore[arg-type]
        return makers, makers.make(recompute, splits_backward, self.pinned)

    def _held_bytes(self, mesh: Mesh) -> int:
        """Bytes of the inputs and buffers, which every rank has."""
        whole = tuple(REPLICATE for _ in mesh.sizes)
        kinds = (OpKind.INPUT, OpKind.BUFFER)
        return sum(local_nbytes(op.results[0], whole, mesh) for kind in kinds for op in self.graph.of_kind(kind))

    def find_shapes(self, find_group_trials: Callable[[int], Sequence[Trial]], *, alone: bool) -> list[Shape]:
        """Every shape to look at; `find_group_trials` gives the trials of a group of ranks, of one group only if `alone`.

        Raises InputError on pins that can't be had.
        """
        wanted, world = self.wanted, self.cluster.world_size
        if wanted.groups is not None and world % wanted.groups:
            raise InputError(f"pin pp={wanted.groups} needs a multiple of {wanted.groups} ranks, the cluster {self.cluster} has {world}")
        blocks = len(self.chain.blocks)
        least = wanted.groups or 1
        if least * (wanted.chunks or 1) > blocks:
            raise InputError(
                f"pins pp={least}, chunks={wanted.chunks or 1} make {least * (wanted.chunks or 1)} stages, but the model can be cut into "
                f"{blocks} blocks at most ({', '.join(block.name for block in self.chain.blocks[:8])}, ...); pin fewer"
            )
        batch = batch_size(self.graph, self.model.factors)
        shapes = []
        sizes = [wanted.groups] if wanted.groups is not None else [n for n in range(1 if alone else 2, min(blocks, world) + 1) if world % n == 0]
        for groups in sizes:
            for trial in find_group_trials(groups):
                shapes += [Shape(groups, trial, count) for count in self._counts(batch, groups, trial)]
        return shapes

    def _counts(self, batch: int, groups: int, trial: Trial) -> list[int]:
        """Numbers of micro-batches to try."""
        if self.wanted.microbatches is not None:
            return [self.wanted.microbatches]
        ways = math.prod(
            size for size, kind in zip(trial.mesh.sizes, trial.constraints.kinds, strict=True) if kind in (AxisKind.DP, AxisKind.FREE)
        )
        rows = batch // ways
        if batch % ways or not rows:
            return [1]
        counts = {rows // one for one in ROWS if rows % one == 0}
        if groups > 1:
            # Fewer micro-batches than groups leave most of them idle most of the time.
            counts = {count for count in counts if count >= groups} or {rows}
        else:
            counts |= {1}
        return sorted(counts)


def choices_of(model: Model, problem: Problem, solution: Solution) -> Choices:
    """The placements and layouts that a solution chose."""
    placements, layouts = {}, {}
    for node in problem.nodes:
        option = node.options[solution.choice[node.key]]
        op = model.folded.graph.by_name.get(node.key)
        if op is not None and op.kind is OpKind.CALL:
            placements[node.key] = option
        else:
            layouts[node.key] = option
    return Choices(placements, layouts)  # type: ignore[arg-type]
