"""Which pipelines the search looks at, and what each comes to: stages, micro-batches, schedule, recomputation.

For every number of groups, mesh of a group and number of micro-batches, the placements of one micro-batch are searched as they are without
a pipeline, at several prices of memory; from the answers, blocks get their menus. All shapes are ranked by stages made at once (`drafts`)
under one schedule, the most promising are drafted under every schedule, and `assignment` searches the best of these.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from autopar.cost_models import Cluster
from autopar.errors import AutoparError, InfeasibleError, InputError, SolverError
from autopar.ir import Layout, Mesh
from autopar.plans import RECOMPUTE, BlockChoice, Candidate, Pins, Pipeline
from autopar.schedules import Schedule, check_schedule, forwards_first, make_schedule, splits_backward
from autopar.search.meshes import Trial
from autopar.search.options import AxisKind, is_inside
from autopar.search.pipeline.assignment import Assignment, BlockMenu, assign
from autopar.search.pipeline.drafts import draft, find_leanest
from autopar.search.pipeline.menus import PHASES, longest_path, make_problem, measure
from autopar.search.pipeline.placements import Answers, Placements, Shape
from autopar.search.pipeline.variants import Choices, join_menus, mix
from autopar.search.placement import Solution
from autopar.structure import Chain, Model, batch_size, in_time

# Rows of a micro-batch on one rank that are tried when nobody says: more fill the device better, fewer make bubbles smaller.
ROWS = (1, 2, 4, 8, 16)
# Schedules that are tried, the one that shapes are ranked by first; and one that needs little memory.
FAMILIES = ("1f1b", "interleaved", "zb-h1", "zb-v", "v-half")
LEAN_FAMILY = "v-half"
# Stages per rank that an interleaved schedule is tried with.
INTERLEAVED = (2, 3, 4, 6, 8)
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
class _Draft:
    """Stages made at once for a shape under one schedule: seconds of a step, those under the best schedule, bytes of the fullest rank.

    `hope` is the least that any schedule comes to with these variants, in equal stages; `promise` what a schedule of as many stages as
    there are blocks for is likely to, if more stages need no more memory.
    """

    shape: Shape
    family: str
    chunks: int
    seconds: float
    hope: float
    promise: float
    nbytes: int

    def __str__(self) -> str:
        return f"{self.family} x{self.chunks}" if self.chunks > 1 else self.family


class _From(IntEnum):
    """What the seconds that a shape takes at least were found from."""

    PRODUCTS = 0
    PLACEMENTS = 1
    DRAFT = 2


class PipelineSearch:
    """Looks at pipelines of one model on one cluster."""

    def __init__(
        self,
        model: Model,
        chain: Chain,
        cluster: Cluster,
        wanted: Pins,
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
        recompute = RECOMPUTE if wanted.recompute is None else (wanted.recompute,)
        self.refusals: list[AutoparError] = []
        self.placements = Placements(model, chain, cluster, recompute, self._read_stages(), self.refusals)
        self._needs: dict[Shape, int] = {}
        self._known_families: dict[Shape, list[tuple[str, int]]] = {}

    def run(self, shapes: Sequence[Shape], cutoff: float) -> Pipelined | None:
        """The fastest pipeline that takes less than `cutoff` seconds; None when none does."""
        drafts = self._draft_all(shapes, cutoff)
        if not drafts and self._needs:
            # The search may find what a draft doesn't, and knows what the leanest stages need.
            shape = min(self._needs, key=self._needs.__getitem__)
            del self._needs[shape]
            drafts = [_Draft(shape, family, chunks, 0.0, 0.0, 0.0, 0) for family, chunks in self._families(shape)]
        drafted = {one.shape for one in drafts}
        for shape, needed in self._needs.items():
            if shape not in drafted:  # else some schedule fits
                self._note(shape, None, needed, "out of memory")
        return self._search(drafts, cutoff)

    def _draft_all(self, shapes: Sequence[Shape], cutoff: float) -> list[_Draft]:
        """Drafts of all shapes that may be faster than the best of them, best first.

        What a shape takes at least, or about that, is found out as closely as it needs to tell that it is too slow: from its products, from
        its fastest placements, from a draft under the first schedule. Whichever promises most is looked at next; `DRAFTED` shapes at most
        are drafted under all schedules.
        """
        self.tell(f"bounds: {len(shapes)} shapes")
        found: list[_Draft] = []
        firsts: dict[int, _Draft] = {}
        unfit: list[tuple[float, Shape]] = []
        fully, best = 0, cutoff
        waiting = [(self._bound_by_products(shape), number, _From.PRODUCTS) for number, shape in enumerate(shapes)]
        heapq.heapify(waiting)
        while waiting:
            least, number, found_from = heapq.heappop(waiting)
            shape, new = shapes[number], []
            if found_from is _From.DRAFT:
                if firsts[number].hope < best and fully < DRAFTED:
                    fully += 1
                    self.tell(f"schedules: {shape}")
                    new = self._draft_others(shape, [(firsts[number].family, firsts[number].chunks)])
            elif least >= best:
                if math.isfinite(least):
                    self._note(shape, least, None, "not tried: takes about this at best")
            elif found_from is _From.PRODUCTS:
                self.tell(f"costs: {shape}")
                heapq.heappush(waiting, (max(least, self._bound_by_placements(shape)), number, _From.PLACEMENTS))
            else:
                self.tell(f"drafts: {shape}")
                first = self._draft_first(shape)
                if first is None:
                    unfit.append((least, shape))
                else:
                    new, firsts[number] = [first], first
                    heapq.heappush(waiting, (first.promise, number, _From.DRAFT))
            found += new
            best = min([best, *(one.seconds for one in new)])
        # What fits under neither the first schedule nor the leanest may fit under another.
        for least, shape in unfit:
            if least < best and fully < DRAFTED:
                fully += 1
                self.tell(f"schedules: {shape}")
                new = self._draft_others(shape, self._first_families(shape))
                found += new
                best = min([best, *(one.seconds for one in new)])
        return sorted(found, key=lambda one: one.seconds)

    def _bound_by_products(self, shape: Shape) -> float:
        """Seconds that a shape takes at least, from its products alone; infinite where the batch can't be split so."""
        work = self.placements.least_work(shape)
        return self._hope(shape, work) if work is not None else math.inf

    def _bound_by_placements(self, shape: Shape) -> float:
        """About the seconds that a shape takes at best, from its fastest placements; infinite where some op has none."""
        found = self.placements.fastest_work(shape)
        return self._hope(shape, found[0]) + found[1] if found is not None else math.inf

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

    # --- stages ---

    def _schedule(self, family: str, groups: int, count: int, chunks: int) -> Schedule:
        schedule = make_schedule(family, groups, count, chunks)
        return schedule if self.returns_loss else forwards_first(schedule)

    def _draft_first(self, shape: Shape) -> _Draft | None:
        """A draft under the first schedule, or where that needs too much memory under one that needs less."""
        for family, chunks in self._first_families(shape):
            one = self._draft(shape, family, chunks)
            if one is not None:
                self._needs.pop(shape, None)
                return one
        return None

    def _first_families(self, shape: Shape) -> list[tuple[str, int]]:
        families = self._families(shape)
        return [*families[:1], *(one for one in families[1:] if one[0] == LEAN_FAMILY)]

    def _draft_others(self, shape: Shape, known: Sequence[tuple[str, int]]) -> list[_Draft]:
        """Drafts under all schedules but those that are known."""
        others = (one for one in self._families(shape) if one not in known)
        return [one for family, chunks in others if (one := self._draft(shape, family, chunks)) is not None]

    def _draft(self, shape: Shape, family: str, chunks: int) -> _Draft | None:
        """The best of the drafts under a schedule; None where none fits."""
        found: _Draft | None = None
        for answers in self.placements.answers_like(shape):
            menus = self.placements.menus(shape, answers, splits_backward(family))
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
            problem = make_problem(menus, schedules[0], self.placements.budget)
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
                # Other schedules' stages may be finer, and so more equal.
                hope = self._hope(shape, float(work.sum()) / shape.groups) + measured.once
                promise = self._promise(shape, [float(work[list(own)].sum()) for own in problem.stages_of]) + measured.once
                nbytes = max(measured.peak) + self.placements.beside
                found = _Draft(shape, family, chunks, seconds, min(hope, seconds), min(promise, seconds), nbytes)
        if found is None:
            needed = max(measure(problem, *find_leanest(problem)).peak) + self.placements.beside
            self._needs[shape] = min(self._needs.get(shape, needed), needed)
        return found

    def _hope(self, shape: Shape, work: float) -> float:
        """Seconds of all micro-batches when every group works so long on each and bubbles are as small as some schedule makes them."""
        return min((_least_seconds(shape, family, chunks, work) for family, chunks in self._families(shape)), default=math.inf)

    def _promise(self, shape: Shape, work: Sequence[float]) -> float:
        """Seconds of all micro-batches when ranks work so long on each, in as many stages as there are blocks for, with whole backwards."""
        chunks = max((chunks for _, chunks in self._families(shape)), default=1)
        slowest, count = max(work), shape.microbatches
        return max(count * slowest + (shape.groups - 1) * slowest / chunks, sum(work) + (count - 1) * slowest / chunks)

    def _assign(self, drafted: _Draft, limit: float, seconds: float) -> Pipelined | None:
        """The best stages and variants for a shape under a schedule, if they take less than `limit`, searched for so many seconds."""
        shape, family, chunks = drafted.shape, drafted.family, drafted.chunks
        schedule = self._schedule(family, shape.groups, shape.microbatches, chunks)
        best: tuple[float, Answers, tuple[BlockMenu, ...]] | None = None
        for answers in self.placements.answers_of(shape):
            menus = self.placements.menus(shape, answers, schedule.splits_backward)
            again = self._draft_with(shape, family, chunks, menus)
            takes = again.seconds if again is not None else math.inf
            if best is None or takes < best[0]:
                best = takes, answers, menus
        if best is None:
            return None
        _, answers, menus = best
        try:
            assignment = assign(menus, schedule, self.placements.budget, time_limit=seconds, gap=ASSIGN_GAP, cutoff=limit)
        except InfeasibleError as error:
            if error.needed == 0:
                raise
            self._note(shape, None, error.needed + self.placements.beside, "out of memory")
            return None
        except SolverError:
            self._note(shape, None, None, f"{drafted}: no better one found in {seconds:.0f} s")
            return None
        outcome = "can't beat the best found" if assignment.status == "beyond" else assignment.status
        self._note(shape, assignment.simulated, max(assignment.peak) + self.placements.beside, f"{drafted}: {outcome}")
        return self._finish(drafted, answers, menus, assignment) if assignment.simulated < limit else None

    def _finish(self, drafted: _Draft, answers: Answers, menus: tuple[BlockMenu, ...], assignment: Assignment) -> Pipelined:
        """What an assignment means: placements of the blocks as they mix answers, and what is run again."""
        shape = drafted.shape
        base = self.placements.model_in_time(shape.microbatches)
        assert base is not None
        chosen = [menu.variants[number] for menu, number in zip(menus, assignment.variants, strict=True)]
        model, choices = mix(base, self.placements.reading, answers.choices, [one.answer for one in chosen])
        makers = self.placements.makers(shape, answers)
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
        if shape not in self._known_families:
            self._known_families[shape] = self._find_families(shape)
        return self._known_families[shape]

    def _find_families(self, shape: Shape) -> list[tuple[str, int]]:
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
        for pattern, stage in self.wanted.stages.items():
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
        least = wanted.pp or 1
        if least * (wanted.chunks or 1) > blocks:
            raise InputError(
                f"pins pp={least}, chunks={wanted.chunks or 1} make {least * (wanted.chunks or 1)} stages, but the model can be cut into "
                f"{blocks} blocks at most ({', '.join(block.name for block in self.chain.blocks[:8])}, ...); pin fewer"
            )
        batch = batch_size(self.graph, self.model.factors)
        shapes = []
        sizes = [wanted.pp] if wanted.pp is not None else [n for n in range(1 if alone else 2, min(blocks, world) + 1) if world % n == 0]
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


def _least_seconds(shape: Shape, family: str, chunks: int, work: float) -> float:
    """Seconds of all micro-batches under a schedule when every group works so long on each, in equal stages that exchange nothing."""
    # Where weight gradients, a third of the work at most, may wait, they fill all bubbles but those before a group's first forward. That is
    # a quarter of the work or more, also where forwards are run again.
    idle, through = (1 / 4, 2 / 3) if splits_backward(family) else (1.0, 1.0)
    busiest = shape.microbatches * work + idle * (shape.groups - 1) * work / chunks
    return max(busiest, through * (shape.groups * work + (shape.microbatches - 1) * work / chunks))
