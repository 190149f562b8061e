"""Which pipelines the search looks at, and what each comes to: stages, micro-batches, schedule, recomputation.

For every number of groups, mesh of a group and number of micro-batches, the placements of one micro-batch are searched as they are without
a pipeline, at several prices of memory; from the answers, blocks get their menus. All shapes are ranked by stages made at once (`drafts`)
under one schedule, the most promising are drafted under every schedule, and `assignment` searches the best of these.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from autopar.actions import Schedule
from autopar.assignment import Assignment, BlockMenu, assign
from autopar.blocks import Chain
from autopar.cost_models import Cluster, Link, axis_link
from autopar.costs import CostTables, local_nbytes
from autopar.drafts import draft, find_leanest
from autopar.errors import AutoparError, InfeasibleError, InputError, SolverError
from autopar.generators import check_schedule, forwards_first, make_schedule, splits_backward
from autopar.ir import OpKind
from autopar.layout import REPLICATE, Layout, Mesh, fits, with_pipeline
from autopar.menus import PHASES, longest_path, make_problem, measure
from autopar.meshes import Trial
from autopar.microbatch import batch_size, split_microbatches
from autopar.options import AxisKind, Model, in_time, is_inside
from autopar.plans import RECOMPUTE, BlockChoice, Candidate, Pipeline
from autopar.problem import FORBIDDEN, Problem, build_problem, restrict
from autopar.search import Search, Solution
from autopar.variants import Choices, Menus, choices_of, find_shared, join_menus, mix, once_seconds, read_chain
from autopar.wanted import Wanted

# Rows of a micro-batch on one rank that are tried when nobody says: more fill the device better, fewer make bubbles smaller.
ROWS = (1, 2, 4, 8, 16)
# Schedules that are tried, the one that shapes are ranked by first; and one that needs little memory.
FAMILIES = ("1f1b", "interleaved", "zb-h1", "zb-v", "v-half")
LEAN_FAMILY = "v-half"
# Stages per rank that an interleaved schedule is tried with.
INTERLEAVED = (2, 3, 4, 6, 8)
# Placements of a micro-batch that blocks may mix, at most, and the highest price of memory at which they are searched, as a multiple of the
# step over the budget.
ANSWERS = 6
LEAN_PRICE = 128.0
# Shapes that are drafted under every schedule, at most.
DRAFTED = 6
# A step of very many micro-batches is drafted with this many for each group, and one round less: from there on it grows evenly.
ROUNDS = 4
# Drafts whose stages are searched, at most: of those within this share of the best. A search gains some percent.
SEARCHED = 3
HOPE = 1.05
# Seconds for these searches together; what is found by then is taken with the bound that it has.
SEARCH_SECONDS = 3.0
ASSIGN_GAP = 5e-3


@dataclass(frozen=True)
class Pipelined:
    """A pipeline that was found: its placements, and what its blocks do.

    `model` is folded as blocks are split, `choices` are of its representatives; `solution` is one of the answers that blocks mix.
    `recompute_seconds` are those that all blocks together take more for a micro-batch than if they kept everything.
    """

    shape: Shape
    mesh: Mesh
    solution: Solution
    model: Model
    choices: Choices
    pipeline: Pipeline
    assignment: Assignment
    menus: tuple[BlockMenu, ...]
    recompute_seconds: float

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.assignment.simulated


@dataclass(frozen=True, eq=False)
class Shape:
    """A pipeline to look at: groups of ranks, the trial of each group, micro-batches."""

    groups: int
    trial: Trial
    microbatches: int

    def __str__(self) -> str:
        return f"{with_pipeline(self.trial.mesh, self.groups)}, {self.microbatches} micro-batches"


@dataclass(frozen=True, eq=False)
class _Placed:
    """The placement problem of a shape, with bytes of all groups together; `once`: seconds of a step that micro-batches don't add to."""

    shape: Shape
    model: Model
    problem: Problem
    search: Search
    budget: int
    once: float


@dataclass(frozen=True, eq=False)
class _Answers:
    """Placements of one micro-batch that blocks may mix, from fast to lean, and the proof of the one that decided on what all share."""

    choices: tuple[Choices, ...]
    solution: Solution


@dataclass(frozen=True, eq=False)
class _Draft:
    """Stages made at once for a shape under one schedule: seconds of a step, those under the best schedule, bytes of the fullest rank.

    `hope` takes it that ranks hold as many stages as there are blocks for, and that more stages need no more memory.
    """

    shape: Shape
    family: str
    chunks: int
    seconds: float
    hope: float
    nbytes: int

    def __str__(self) -> str:
        return f"{self.family} x{self.chunks}" if self.chunks > 1 else self.family


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
        self.reading = read_chain(model, chain)
        self.cluster = cluster
        self.wanted = wanted
        self.returns_loss = returns_loss
        self.tell = tell
        self.candidates: list[Candidate] = []
        self.refusals: list[AutoparError] = []
        self._models: dict[int, Model | None] = {}
        self._placed: dict[object, _Placed | None] = {}
        self._known: dict[object, list[_Answers]] = {}
        self._costed: dict[tuple[Shape, _Answers], list[Menus]] = {}
        self._made: dict[tuple[Shape, _Answers, bool], tuple[BlockMenu, ...]] = {}
        self._needs: dict[Shape, int] = {}
        self.pinned = self._read_stages()

    def run(self, shapes: Sequence[Shape], cutoff: float) -> Pipelined | None:
        """The fastest pipeline that takes less than `cutoff` seconds; None when none does."""
        drafts: list[_Draft] = []
        best = cutoff
        for number, first in enumerate(self._rank(shapes, cutoff)):
            found = [first]
            if number < DRAFTED and first.hope < best:
                self.tell(f"schedules: {first.shape}")
                others = (one for one in self._families(first.shape) if one != (first.family, first.chunks))
                found += [one for family, chunks in others if (one := self._draft(first.shape, family, chunks)) is not None]
            drafts += found
            best = min(best, *(one.seconds for one in found))
        if not drafts and self._needs:
            # The search may find what a draft doesn't, and knows what the leanest stages need.
            shape = min(self._needs, key=self._needs.__getitem__)
            del self._needs[shape]
            drafts = [_Draft(shape, *self._families(shape)[0], 0.0, 0.0, 0)]
        for shape, needed in self._needs.items():
            self._note(shape, None, needed, "out of memory")
        return self._search(sorted(drafts, key=lambda one: one.seconds), cutoff)

    def _rank(self, shapes: Sequence[Shape], cutoff: float) -> list[_Draft]:
        """Drafts under the first schedule of all shapes that may be faster than any of these drafts, the most hopeful first."""
        ranked: list[_Draft] = []
        best = cutoff
        for least, shape in sorted(self._floors(shapes), key=lambda one: one[0]):
            if least >= best:
                self._note(shape, least, None, "not tried: takes about this at best")
                continue
            self.tell(f"drafts: {shape}")
            one = self._draft_first(shape)
            if one is not None:
                ranked.append(one)
                best = min(best, one.seconds)
        return sorted(ranked, key=lambda one: one.hope)

    def _search(self, drafts: Sequence[_Draft], cutoff: float) -> Pipelined | None:
        """Search the stages of the best drafts, and of all that promise more than what was found: each may take half of the time left."""
        best: Pipelined | None = None
        left = SEARCH_SECONDS
        for number, one in enumerate(drafts):
            limit = cutoff if best is None else min(cutoff, best.seconds)
            if one.seconds >= (HOPE if number < SEARCHED else 1) * limit:
                self._note(one.shape, one.seconds, one.nbytes, f"{one}: drafted")
                continue
            self.tell(f"stages: {one.shape}, {one}")
            start = time.perf_counter()
            best = self._assign(one, limit, left if one is drafts[-1] else left / 2) or best
            left = max(0.0, left - (time.perf_counter() - start))
        return best

    # --- placements ---

    def _model_in_time(self, count: int) -> Model | None:
        """The model as `count` micro-batches see it; None, with the reasons noted, where it can't be split so."""
        if count not in self._models:
            micro = split_microbatches(self.graph, self.model.spaces, self.model.factors, count)
            self.refusals += map(InputError, micro.reasons)
            self._models[count] = None if micro.reasons else replace(self.model, micro=micro)
        return self._models[count]

    def _floors(self, shapes: Sequence[Shape]) -> Iterator[tuple[float, Shape]]:
        """Per shape whose ops have placements, about the seconds that it takes at best: its fastest placements, with memory no matter."""
        for shape in shapes:
            self.tell(f"costs: {shape}")
            key = self._key(shape)
            if key not in self._placed:
                self._placed[key] = self._place(shape)
            placed = self._placed[key]
            if placed is not None:
                work = (placed.search.bound_ns / 1e9 - placed.once) / placed.shape.microbatches / shape.groups
                # How long the ends of its steps take doesn't tell those of another mesh.
                once = placed.once / shape.groups if placed.shape.trial.mesh == shape.trial.mesh else 0.0
                yield self._hope(shape, [work] * shape.groups) + once, shape

    def _key(self, shape: Shape) -> object:
        """Equal for shapes whose ranks see micro-batches of the same size on the same axes, but for ranks that split the batch.

        What a rank computes and exchanges for a micro-batch is then the same, but for the parameters' storage.
        """
        mesh = shape.trial.mesh
        ways = math.prod(size for name, size in zip(mesh.names, mesh.sizes, strict=True) if name == AxisKind.DP.value)
        # Ranks that can't split the batch have no whole number of rows each.
        rows = Fraction(batch_size(self.graph, self.model.factors), shape.microbatches * ways)
        sizes = tuple(size for name, size in zip(mesh.names, mesh.sizes, strict=True) if name != AxisKind.DP.value)
        return mesh.names, sizes, rows, shape.trial.name

    def _place(self, shape: Shape) -> _Placed | None:
        """The fastest placements of a micro-batch; None where some op has none."""
        model = self._model_in_time(shape.microbatches)
        if model is None:
            return None
        constraints = replace(shape.trial.constraints, kinds=(AxisKind.TIME, *shape.trial.constraints.kinds))
        problem = build_problem(model, in_time(shape.trial.mesh, shape.microbatches), self.cluster, constraints)
        search = Search(problem)
        budget = shape.groups * self.cluster.machine.device.usable_bytes
        if search.bound_ns >= FORBIDDEN:
            return None
        fastest = choices_of(model, problem, search.solution_at(0.0))
        return _Placed(shape, model, problem, search, budget, once_seconds(model, CostTables(model, problem.mesh, self.cluster), fastest))

    def _answers(self, placed: _Placed) -> list[_Answers]:
        """Placements of a micro-batch: sets of answers that blocks may mix, those of the fastest boundaries first."""
        found: list[_Answers] = []
        model, problem, search = placed.model, placed.problem, placed.search
        highest = LEAN_PRICE * search.bound_ns / placed.budget
        for base in (0.0, highest):
            solution = search.solution_at(base)
            inner = restrict(problem, find_shared(model, self.reading, problem, solution.choice))
            choices = tuple(choices_of(model, inner, one) for one in Search(inner).frontier(highest, ANSWERS))
            if choices not in (one.choices for one in found):
                found.append(_Answers(choices, solution))
        return found

    def _reuse(self, shape: Shape) -> list[_Answers]:
        """Placements for a draft: those of another shape with the same key, where they are legal here."""
        key = self._key(shape)
        model, placed = self._model_in_time(shape.microbatches), self._placed.get(key)
        if model is None or placed is None:
            return []
        if key not in self._known:
            self._known[key] = self._answers(placed)
        if not all(self._is_legal(one, model, shape.trial.mesh) for answers in self._known[key] for one in answers.choices):
            placed = self._placed[key] = self._place(shape)
            self._known[key] = self._answers(placed) if placed is not None else []
        return self._known[key]

    def _is_legal(self, choices: Choices, model: Model, mesh: Mesh) -> bool:
        """Whether micro-batches split every call so (one micro-batch splits none), and a mesh with these axes can store parameters so."""
        assert model.micro is not None
        parts = model.micro.parts
        parameters = (op for op in self.model.folded.ops if op.kind is OpKind.PARAMETER)
        return all(placement[0] == parts[name] for name, placement in choices.placements.items()) and all(
            fits(op.results[0].shape, choices.layouts[op.name][1:], mesh) for op in parameters
        )

    def _menus(self, shape: Shape, answers: _Answers, is_split: bool) -> tuple[BlockMenu, ...]:
        """Every block's variants, each answer with each kind of recomputation, for whole backwards or for split ones."""
        key = shape, answers, is_split
        if key not in self._made:
            recompute = RECOMPUTE if self.wanted.recompute is None else (self.wanted.recompute,)
            self._made[key] = join_menus([maker.make(recompute, is_split, self.pinned) for maker in self._makers(shape, answers)])
        return self._made[key]

    def _makers(self, shape: Shape, answers: _Answers) -> list[Menus]:
        if (shape, answers) not in self._costed:
            self._costed[shape, answers] = self._cost(shape, answers)
        return self._costed[shape, answers]

    def _cost(self, shape: Shape, answers: _Answers) -> list[Menus]:
        model = self._model_in_time(shape.microbatches)
        assert model is not None
        tables = CostTables(model, in_time(shape.trial.mesh, shape.microbatches), self.cluster)
        link = self._link(shape)
        return [Menus(model, self.chain, self.reading, tables, choices, link, number) for number, choices in enumerate(answers.choices)]

    def _budget(self, shape: Shape) -> int:
        """Bytes of a rank that inputs and buffers, which every rank has, leave."""
        mesh = in_time(shape.trial.mesh, shape.microbatches)
        whole = tuple(REPLICATE for _ in mesh.sizes)
        stored = (op for kind in (OpKind.INPUT, OpKind.BUFFER) for op in self.graph.of_kind(kind))
        return self.cluster.machine.device.usable_bytes - sum(local_nbytes(op.results[0], whole, mesh) for op in stored)

    def _link(self, shape: Shape) -> Link | None:
        return axis_link(self.cluster, with_pipeline(shape.trial.mesh, shape.groups).sizes, 0) if shape.groups > 1 else None

    # --- stages ---

    def _schedule(self, family: str, groups: int, count: int, chunks: int) -> Schedule:
        schedule = make_schedule(family, groups, count, chunks)
        return schedule if self.returns_loss else forwards_first(schedule)

    def _draft_first(self, shape: Shape) -> _Draft | None:
        """A draft under the first schedule, or where that needs too much memory under one that needs less."""
        families = self._families(shape)
        for family, chunks in (*families[:1], *(one for one in families[1:] if one[0] == LEAN_FAMILY)):
            one = self._draft(shape, family, chunks)
            if one is not None:
                self._needs.pop(shape, None)
                return one
        return None

    def _draft(self, shape: Shape, family: str, chunks: int) -> _Draft | None:
        """The best of the drafts under a schedule; None where none fits."""
        found: _Draft | None = None
        for answers in self._reuse(shape):
            menus = self._menus(shape, answers, splits_backward(family))
            one = self._draft_with(shape, family, chunks, menus)
            if one is not None and (found is None or one.seconds < found.seconds):
                found = one
        return found

    def _draft_with(self, shape: Shape, family: str, chunks: int, menus: tuple[BlockMenu, ...]) -> _Draft | None:
        # From some rounds on every further one takes as long as the one before.
        counts = [shape.microbatches]
        if family != "gpipe" and self.returns_loss and shape.microbatches > ROUNDS * shape.groups:
            counts = [ROUNDS * shape.groups, (ROUNDS - 1) * shape.groups]
        schedules = [self._schedule(family, shape.groups, count, chunks) for count in counts]
        try:
            problem = make_problem(menus, schedules[0], self._budget(shape))
        except (InfeasibleError, InputError) as error:
            self.refusals.append(error)
            return None
        found: _Draft | None = None
        for stages, variants in draft(problem):
            measured = measure(problem, stages, variants)
            took = [longest_path(replace(problem, schedule=schedule), measured.columns)[0] for schedule in schedules]
            more = (shape.microbatches - counts[0]) / shape.groups * (took[0] - took[-1])
            seconds = took[0] + more + measured.once
            if found is None or seconds < found.seconds:
                work = measured.columns[: PHASES * problem.schedule.stages].reshape(PHASES, -1).sum(axis=0)
                hope = self._hope(shape, [float(work[list(own)].sum()) for own in problem.stages_of]) + measured.once
                found = _Draft(shape, family, chunks, seconds, min(hope, seconds), max(measured.peak))
        if found is None:
            needed = max(measure(problem, *find_leanest(problem)).peak)
            self._needs[shape] = min(self._needs.get(shape, needed), needed)
        return found

    def _hope(self, shape: Shape, work: Sequence[float]) -> float:
        """Seconds of all micro-batches when ranks work so long on each and bubbles are as small as stages can be."""
        chunks = max((chunks for _, chunks in self._families(shape)), default=1)
        slowest, count = max(work), shape.microbatches
        return max(count * slowest + (shape.groups - 1) * slowest / chunks, sum(work) + (count - 1) * slowest / chunks)

    def _assign(self, drafted: _Draft, limit: float, seconds: float) -> Pipelined | None:
        """The best stages and variants for a shape under a schedule, if they take less than `limit`, searched for so many seconds."""
        shape, family, chunks = drafted.shape, drafted.family, drafted.chunks
        schedule = self._schedule(family, shape.groups, shape.microbatches, chunks)
        best: tuple[float, _Answers, tuple[BlockMenu, ...]] | None = None
        placed = self._placed[self._key(shape)]
        if placed is None or placed.shape is not shape:
            placed = self._place(shape)
        for answers in self._answers(placed) if placed is not None else ():
            menus = self._menus(shape, answers, schedule.splits_backward)
            again = self._draft_with(shape, family, chunks, menus)
            takes = again.seconds if again is not None else math.inf
            if best is None or takes < best[0]:
                best = takes, answers, menus
        if best is None:
            return None
        _, answers, menus = best
        try:
            assignment = assign(menus, schedule, self._budget(shape), time_limit=seconds, gap=ASSIGN_GAP, cutoff=limit)
        except InfeasibleError as error:
            if error.needed == 0:
                raise
            self._note(shape, None, error.needed, "out of memory")
            return None
        except SolverError:
            self._note(shape, None, None, f"{drafted}: no better one found in {seconds:.0f} s")
            return None
        self._note(shape, assignment.simulated, max(assignment.peak), f"{drafted}: {assignment.status}")
        return self._finish(drafted, answers, menus, assignment) if assignment.simulated < limit else None

    def _finish(self, drafted: _Draft, answers: _Answers, menus: tuple[BlockMenu, ...], assignment: Assignment) -> Pipelined:
        """What an assignment means: placements of the blocks as they mix answers, and what is run again."""
        shape = drafted.shape
        base = self._model_in_time(shape.microbatches)
        assert base is not None
        chosen = [menu.variants[number] for menu, number in zip(menus, assignment.variants, strict=True)]
        model, choices = mix(base, self.reading, answers.choices, [one.answer for one in chosen])
        makers = self._makers(shape, answers)
        plain = join_menus([maker.make(("none",), splits_backward(drafted.family), {}) for maker in makers])
        travel: Mapping[str, Layout] = {}
        if shape.groups * drafted.chunks > 1:
            travel = {name: layout[1:] for name, layout in makers[0].travel().items()}
        blocks = tuple(
            BlockChoice(block.name, stage, one.name) for block, stage, one in zip(self.chain.blocks, assignment.stages, chosen, strict=True)
        )
        return Pipelined(
            shape=shape,
            mesh=in_time(shape.trial.mesh, shape.microbatches),
            solution=answers.solution,
            model=model,
            choices=choices,
            pipeline=Pipeline(shape.groups, drafted.family, drafted.chunks, shape.microbatches, blocks, travel),
            assignment=assignment,
            menus=menus,
            recompute_seconds=sum(one.input - menu.variants[one.answer].input for one, menu in zip(chosen, plain, strict=True)),
        )

    # --- what is looked at ---

    def _families(self, shape: Shape) -> list[tuple[str, int]]:
        """(family, stages per group) of the schedules to try, the one that shapes are ranked by first."""
        if self.wanted.schedule is not None:
            return list(self._of_family(self.wanted.schedule, shape))
        if not self.returns_loss:
            return [("gpipe", 1)]
        if shape.groups == 1 and self.wanted.chunks in (None, 1):
            return [("1f1b", 1)]
        return [one for family in FAMILIES for one in self._of_family(family, shape)]

    def _of_family(self, family: str, shape: Shape) -> Iterator[tuple[str, int]]:
        """(family, stages per group) that can be had for this shape; why a pinned one can't is noted."""
        blocks = len(self.chain.blocks)
        chunks: Sequence[int | None] = (self.wanted.chunks,)
        if family == "interleaved" and self.wanted.chunks is None:
            chunks = [count for count in INTERLEAVED if count * shape.groups <= blocks] or INTERLEAVED[:1]
        for wanted in chunks:
            try:
                count = check_schedule(family, shape.groups, shape.microbatches, wanted)
                if count * shape.groups > blocks:
                    raise InputError(
                        f"schedule {family} on {shape.groups} groups has {count * shape.groups} stages, but the model can be cut into "
                        f"{blocks} blocks at most; pin a smaller pp, or another schedule"
                    )
            except InputError as error:
                if self.wanted.schedule is not None:
                    self.refusals.append(error)
                continue
            yield family, count

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
        rows = batch if batch % ways else batch // ways  # where ranks can't split the batch, each sees all of it
        counts = {rows // one for one in ROWS if rows % one == 0}
        if groups > 1:
            # Fewer micro-batches than groups leave most of them idle most of the time.
            counts = {count for count in counts if count >= groups} or {rows}
        else:
            counts |= {1}
        return sorted(counts)
