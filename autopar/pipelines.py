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
from autopar.cost_models import Cluster, Link, axis_link
from autopar.costs import CostTables, local_nbytes
from autopar.errors import InfeasibleError, InputError, SolverError
from autopar.generators import SCHEDULES, make_schedule
from autopar.ir import OpKind
from autopar.layout import PIPELINE, REPLICATE, Mesh, fits, with_pipeline
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
REFINED = 2
# Shapes for which stages are searched: those that an even split makes fastest, unless it takes more than this share of the best.
TRIED = 4
HOPE = 1.2
# Stages per rank that an interleaved schedule is tried with.
INTERLEAVED = (2, 3, 4, 6, 8)
# Prices of memory at which placements are searched, as multiples of the step over the budget: from fast to lean.
PRICES = (0.0, 2.0, 128.0)
# Seconds for one assignment; what it finds by then is taken with the bound that it has.
ASSIGN_SECONDS = 3.0
ASSIGN_GAP = 5e-3


@dataclass(frozen=True)
class Pipelined:
    """A pipeline that was found: its placements, and what its blocks do.

    `recompute_seconds` are those that all blocks together take more for a micro-batch than if they kept everything.
    """

    shape: Shape
    problem: Problem
    solution: Solution
    model: Model
    pipeline: Pipeline
    assignment: Assignment
    menus: tuple[BlockMenu, ...]
    recompute_seconds: float

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
        self._models: dict[int, Model | None] = {}
        self._choices: dict[object, list[Choices]] = {}
        self._problems: dict[Shape, tuple[Model, Problem, Search] | None] = {}
        self.pinned = self._read_stages()

    def run(self, shapes: Sequence[Shape], cutoff: float) -> Pipelined | None:
        """The fastest pipeline that takes less than `cutoff` seconds; None when none does."""
        if len(shapes) > TRIED:
            shapes = self._most_promising(shapes, cutoff)
        found: list[Pipelined] = []
        for shape in shapes:
            best = min((one.seconds for one in found), default=cutoff)
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
                self.tell(f"schedules: {one.shape}")
                answer = self._try(one.shape, self._other_families(one.shape), best)
                if answer is not None:
                    refined.append(answer)
        return min(refined, key=lambda one: one.seconds, default=None)

    def _most_promising(self, shapes: Sequence[Shape], cutoff: float) -> list[Shape]:
        """Shapes that stages of about equal work make fast, the fastest first; why the others aren't tried is noted."""
        ranked: list[tuple[float, Shape]] = []
        for shape in shapes:
            self.tell(f"costs: {shape}")
            seconds, needed = self._estimate(shape)
            if seconds is not None:
                ranked.append((seconds, shape))
            elif needed is not None:
                self._note(shape, None, needed, "out of memory")
        ranked.sort(key=lambda one: one[0])
        hopeful = [shape for seconds, shape in ranked if seconds < min(cutoff, ranked[0][0]) * HOPE][:TRIED]
        for seconds, shape in ranked:
            if shape not in hopeful:
                self._note(shape, seconds, None, "not tried: stages of equal work take about this")
        return hopeful

    def _estimate(self, shape: Shape) -> tuple[float | None, int | None]:
        """(seconds, None) of stages of about equal work under 1F1B; (None, bytes needed) where none of them fits."""
        model = self._model_in_time(shape.microbatches)
        if model is None:
            return None, None
        tables = CostTables(model, in_time(shape.trial.mesh, shape.microbatches), self.cluster)
        budget = self.cluster.machine.device.usable_bytes - self._held_bytes(tables.mesh)
        best: float | None = None
        leanest: int | None = None
        for choices in self._known_choices(shape, model):
            makers = Menus(model, self.chain, tables, choices, self._link(shape))
            menus = makers.make(self._recompute(), False, {})
            for number in range(max(len(menu.variants) for menu in menus)):
                seconds, needed = even_stages(menus, shape.groups, shape.microbatches, number)
                leanest = needed if leanest is None else min(leanest, needed)
                if needed <= budget and (best is None or seconds < best):
                    best = seconds
        return best, leanest

    def _known_choices(self, shape: Shape, model: Model) -> list[Choices]:
        """Placements for a shape: those of another shape whose ranks see micro-batches of the same size, where they are legal here.

        What a rank computes and exchanges for a micro-batch is then the same, but for the parameters' storage.
        """
        mesh = shape.trial.mesh
        rows = batch_size(self.graph, self.model.factors) // shape.microbatches
        rows //= math.prod(size for name, size in zip(mesh.names, mesh.sizes, strict=True) if name == AxisKind.DP.value)
        key = (mesh.names, tuple(size for name, size in zip(mesh.names, mesh.sizes, strict=True) if name != AxisKind.DP.value), rows)
        known = self._choices.get(key)
        if known is None or not all(self._is_legal(choices, model, mesh) for choices in known):
            prepared = self._prepare(shape)
            if prepared is None:
                return []
            _, problem, search = prepared
            budget = shape.groups * self.cluster.machine.device.usable_bytes
            known = self._choices[key] = [choices_of(model, problem, solution) for solution in self._answers(search, budget)]
        return known

    def _is_legal(self, choices: Choices, model: Model, mesh: Mesh) -> bool:
        """Whether micro-batches split every call so (one micro-batch splits none), and another mesh with these axes stores parameters so."""
        assert model.micro is not None
        parts = model.micro.parts
        parameters = self.graph.of_kind(OpKind.PARAMETER)
        representative = self.model.folded.representative
        return all(placement[0] == parts[name] for name, placement in choices.placements.items()) and all(
            fits(op.results[0].shape, choices.layouts[representative[op.name]][1:], mesh) for op in parameters
        )

    def _link(self, shape: Shape) -> Link | None:
        return axis_link(self.cluster, with_pipeline(shape.trial.mesh, shape.groups).sizes, 0) if shape.groups > 1 else None

    def _recompute(self) -> Sequence[str]:
        return RECOMPUTE if self.wanted.recompute is None else (self.wanted.recompute,)

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

    def _prepare(self, shape: Shape) -> tuple[Model, Problem, Search] | None:
        if shape not in self._problems:
            self._problems[shape] = self._build(shape)
        return self._problems[shape]

    def _model_in_time(self, count: int) -> Model | None:
        """The model as `count` micro-batches see it; None, with the reasons noted, where it can't be split so."""
        if count not in self._models:
            micro = split_microbatches(self.graph, self.model.spaces, self.model.factors, count)
            if micro.reasons:
                self.reasons[count] = micro.reasons
            self._models[count] = None if micro.reasons else replace(self.model, micro=micro)
        return self._models[count]

    def _build(self, shape: Shape) -> tuple[Model, Problem, Search] | None:
        model = self._model_in_time(shape.microbatches)
        if model is None:
            return None
        constraints = replace(shape.trial.constraints, kinds=(AxisKind.TIME, *shape.trial.constraints.kinds))
        problem = build_problem(model, in_time(shape.trial.mesh, shape.microbatches), self.cluster, constraints)
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
        blocks = len(self.chain.blocks)
        if self.wanted.chunks is not None:
            chunks: Sequence[int] = (self.wanted.chunks,)
        else:
            chunks = {"interleaved": INTERLEAVED, "zb-v": (2,), "v-half": (2,)}.get(family, (1,))
            chunks = [count for count in chunks if count * shape.groups <= blocks] or chunks[:1]
        for count in chunks:
            try:
                make_schedule(family, shape.groups, shape.microbatches, count)
                if count * shape.groups > blocks:
                    raise InputError(
                        f"schedule {family} on {shape.groups} groups has {count * shape.groups} stages, but the model can be cut into "
                        f"{blocks} blocks at most; pin a smaller pp, or another schedule"
                    )
            except InputError:
                if self.wanted.schedule is not None:
                    raise
                continue
            yield family, count

    def _try(self, shape: Shape, families: Sequence[tuple[str, int]], best: float) -> Pipelined | None:
        """The best of these schedules for a shape, if it is better than `best`."""
        prepared = self._prepare(shape)
        if prepared is None:
            return None
        model, problem, search = prepared
        tables = CostTables(model, problem.mesh, self.cluster)
        budget = self.cluster.machine.device.usable_bytes - self._held_bytes(tables.mesh)
        found: Pipelined | None = None
        leanest: int | None = None
        for family, chunks in families:
            schedule = make_schedule(family, shape.groups, shape.microbatches, chunks)
            for solution in self._answers(search, shape.groups * budget):
                makers = Menus(model, self.chain, tables, choices_of(model, problem, solution), self._link(shape))
                blocks = makers.make(self._recompute(), schedule.splits_backward, self.pinned)
                limit = min(best, found.seconds if found is not None else math.inf)
                try:
                    assignment = assign(blocks, schedule, budget, time_limit=ASSIGN_SECONDS, gap=ASSIGN_GAP, cutoff=limit)
                except InfeasibleError as error:
                    if error.needed == 0:
                        raise
                    leanest = error.needed if leanest is None else min(leanest, error.needed)
                    continue
                except SolverError:
                    continue  # none in the time given, or none below the best
                if assignment.simulated < limit:
                    names = [blocks[i].variants[v].name for i, v in enumerate(assignment.variants)]
                    choices = tuple(
                        BlockChoice(block.name, stage, name)
                        for block, stage, name in zip(self.chain.blocks, assignment.stages, names, strict=True)
                    )
                    travel = {name: layout[1:] for name, layout in makers.travel().items()} if shape.groups * chunks > 1 else {}
                    pipeline = Pipeline(shape.groups, family, chunks, shape.microbatches, choices, travel)
                    plain = makers.make(("none",), schedule.splits_backward, {})
                    longer = (blocks[i].variants[v].input - plain[i].variants[0].input for i, v in enumerate(assignment.variants))
                    found = Pipelined(shape, problem, solution, model, pipeline, assignment, blocks, sum(longer))
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
        blocks = len(self.chain.blocks)
        least = wanted.groups or 1
        if least * (wanted.chunks or 1) > blocks:
            raise InputError(
                f"pins pp={least}, chunks={wanted.chunks or 1} make {least * (wanted.chunks or 1)} stages, but the model can be cut into "
                f"{blocks} blocks at most ({', '.join(block.name for block in self.chain.blocks[:8])}, ...); pin fewer"
            )
        batch = batch_size(self.graph, self.model.factors)
        shapes = []
        sizes = (
            [wanted.groups]
            if wanted.groups is not None
            else [n for n in range(1 if alone else 2, min(blocks, world) + 1) if world % n == 0]
        )
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


def even_stages(menus: Sequence[BlockMenu], groups: int, microbatches: int, variant: int) -> tuple[float, int]:
    """(seconds, bytes of the fullest rank) of stages of about equal work under 1F1B, all blocks in one variant where they have it.

    The step is that of a pipeline in which every stage waits for the slowest: sum of the stages' times once, then the slowest for each
    further micro-batch.
    """
    chosen = [menu.variants[min(variant, len(menu.variants) - 1)] for menu in menus]
    work = [one.forward + one.input + one.weight for one in chosen]
    stages: list[list[int]] = [[] for _ in range(groups)]
    total, done, stage = sum(work), 0.0, 0
    for block, seconds in enumerate(work):
        left = len(menus) - block
        is_full = done + seconds / 2 > (stage + 1) * total / groups and stages[stage]
        if stage + 1 < groups and (is_full or (left <= groups - stage - 1 and stages[stage])):
            stage += 1
        stages[stage].append(block)
        done += seconds
    times = [sum(work[block] for block in blocks) for blocks in stages]
    messages = sum(sum(menus[blocks[-1]].cut[:2]) for blocks in stages[:-1] if blocks)
    once = max(sum(chosen[block].once for block in blocks) for blocks in stages)
    needed = 0
    for number, blocks in enumerate(stages):
        held = min(groups - number, microbatches)
        nbytes = sum(chosen[block].static + held * chosen[block].kept for block in blocks)
        needed = max(needed, nbytes + max((chosen[block].workspace for block in blocks), default=0))
    return sum(times) + messages + (microbatches - 1) * max(times) + once, needed


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
