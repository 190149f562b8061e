"""Which pipelines the search looks at, and what each comes to: stages, micro-batches, schedule, recomputation.

For every number of groups, mesh of a group and number of micro-batches, the placements of one micro-batch are searched as they are without
a pipeline, at several prices of memory; from the solutions, blocks get their options. All configurations are ranked by stages made at once
(`greedy`) under one schedule, the most promising are drafted under every schedule, and `assignment` searches the best of these.
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
from autopar.search.pipeline.assignment import Assignment, BlockOptions, assign
from autopar.search.pipeline.assignment_problem import PHASES, compute_cost, longest_path, make_problem
from autopar.search.pipeline.greedy import assign_greedily, find_leanest
from autopar.search.pipeline.solutions import Configuration, SolutionCache, SolutionSet
from autopar.search.pipeline.variants import Choices, join_menus, mix
from autopar.search.placement import Solution
from autopar.structure import Chain, Model, batch_size, in_time

# Rows of a micro-batch on one rank that are tried when nobody says: more fill the device better, fewer make bubbles smaller.
ROWS = (1, 2, 4, 8, 16)
# Schedules that are tried, the one that configurations are ranked by first; and one that needs little memory.
FAMILIES = ("1f1b", "interleaved", "zb-h1", "zb-v", "v-half")
LEAN_FAMILY = "v-half"
# Stages per rank that an interleaved schedule is tried with.
INTERLEAVED = (2, 3, 4, 6, 8)
# Configurations that are drafted under every schedule, at most.
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

    `model` is folded as blocks are split, `choices` are of its representatives; `solution` is one of the solutions that blocks mix.
    `recompute_seconds` are those that all blocks together take more for a micro-batch than if they kept everything.
    """

    configuration: Configuration
    mesh: Mesh
    solution: Solution
    model: Model
    choices: Choices
    pipeline: Pipeline
    assignment: Assignment
    blocks: tuple[BlockOptions, ...]
    recompute_seconds: float

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.assignment.simulated


@dataclass(frozen=True, eq=False)
class GreedyPipeline:
    """Stages made at once for a configuration under one schedule: seconds, those under the best schedule, bytes of the fullest rank.

    `hope` is the least that any schedule comes to with these options, in equal stages; `promise` what a schedule of as many stages as
    there are blocks for is likely to, if more stages need no more memory.
    """

    configuration: Configuration
    family: str
    chunks: int
    seconds: float
    hope: float
    promise: float
    nbytes: int

    def __str__(self) -> str:
        return f"{self.family} x{self.chunks}" if self.chunks > 1 else self.family


class _From(IntEnum):
    """What the seconds that a configuration takes at least were found from."""

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
        self.solutions = SolutionCache(model, chain, cluster, recompute, self._read_stages(), self.refusals)
        self._needs: dict[Configuration, int] = {}
        self._known_families: dict[Configuration, list[tuple[str, int]]] = {}

    def run(self, configurations: Sequence[Configuration], cutoff: float) -> Pipelined | None:
        """The fastest pipeline that takes less than `cutoff` seconds; None when none does."""
        drafts = self._draft_all(configurations, cutoff)
        if not drafts and self._needs:
            # The search may find what a draft doesn't, and knows what the leanest stages need.
            configuration = min(self._needs, key=self._needs.__getitem__)
            del self._needs[configuration]
            drafts = [GreedyPipeline(configuration, family, chunks, 0.0, 0.0, 0.0, 0) for family, chunks in self._families(configuration)]
        drafted = {one.configuration for one in drafts}
        for configuration, needed in self._needs.items():
            if configuration not in drafted:  # else some schedule fits
                self._note(configuration, None, needed, "out of memory")
        return self._search(drafts, cutoff)

    def _draft_all(self, configurations: Sequence[Configuration], cutoff: float) -> list[GreedyPipeline]:
        """Drafts of all configurations that may be faster than the best of them, best first.

        What a configuration takes at least, or about that, is found out as closely as it needs to tell that it is too slow: from its
        products, from its fastest placements, from a greedy assignment under the first schedule. Whichever promises most is looked at
        next; `DRAFTED` configurations at most are drafted under all schedules.
        """
        self.tell(f"bounds: {len(configurations)} configurations")
        found: list[GreedyPipeline] = []
        firsts: dict[int, GreedyPipeline] = {}
        unfit: list[tuple[float, Configuration]] = []
        fully, best = 0, cutoff
        waiting = [(self._bound_by_products(configuration), number, _From.PRODUCTS) for number, configuration in enumerate(configurations)]
        heapq.heapify(waiting)
        while waiting:
            least, number, found_from = heapq.heappop(waiting)
            configuration, new = configurations[number], []
            if found_from is _From.DRAFT:
                if firsts[number].hope < best and fully < DRAFTED:
                    fully += 1
                    self.tell(f"schedules: {configuration}")
                    new = self._draft_others(configuration, [(firsts[number].family, firsts[number].chunks)])
            elif least >= best:
                if math.isfinite(least):
                    self._note(configuration, least, None, "not tried: takes about this at best")
            elif found_from is _From.PRODUCTS:
                self.tell(f"costs: {configuration}")
                heapq.heappush(waiting, (max(least, self._bound_by_placements(configuration)), number, _From.PLACEMENTS))
            else:
                self.tell(f"drafts: {configuration}")
                first = self._draft_first(configuration)
                if first is None:
                    unfit.append((least, configuration))
                else:
                    new, firsts[number] = [first], first
                    heapq.heappush(waiting, (first.promise, number, _From.DRAFT))
            found += new
            best = min([best, *(one.seconds for one in new)])
        # What fits under neither the first schedule nor the leanest may fit under another.
        for least, configuration in unfit:
            if least < best and fully < DRAFTED:
                fully += 1
                self.tell(f"schedules: {configuration}")
                new = self._draft_others(configuration, self._first_families(configuration))
                found += new
                best = min([best, *(one.seconds for one in new)])
        return sorted(found, key=lambda one: one.seconds)

    def _bound_by_products(self, configuration: Configuration) -> float:
        """Seconds that a configuration takes at least, from its products alone; infinite where the batch can't be split so."""
        work = self.solutions.least_work(configuration)
        return self._hope(configuration, work) if work is not None else math.inf

    def _bound_by_placements(self, configuration: Configuration) -> float:
        """About the seconds that a configuration takes at best, from its fastest placements; infinite where some op has none."""
        found = self.solutions.fastest_work(configuration)
        return self._hope(configuration, found[0]) + found[1] if found is not None else math.inf

    def _search(self, drafts: Sequence[GreedyPipeline], cutoff: float) -> Pipelined | None:
        """Search the stages of the best drafts, and of all that promise more than what was found: each may take half of the time left."""
        best: Pipelined | None = None
        left = SEARCH_SECONDS
        for number, one in enumerate(drafts):
            limit = cutoff if best is None else min(cutoff, best.seconds)
            if one.seconds >= (HOPE if number < SEARCHED else 1) * limit:
                self._note(one.configuration, one.seconds, one.nbytes, f"{one}: drafted")
                continue
            self.tell(f"stages: {one.configuration}, {one}")
            start = time.perf_counter()
            best = self._assign(one, limit, left if one is drafts[-1] else left / 2) or best
            left = max(0.0, left - (time.perf_counter() - start))
        return best

    # --- stages ---

    def _schedule(self, family: str, groups: int, count: int, chunks: int) -> Schedule:
        schedule = make_schedule(family, groups, count, chunks)
        return schedule if self.returns_loss else forwards_first(schedule)

    def _draft_first(self, configuration: Configuration) -> GreedyPipeline | None:
        """A draft under the first schedule, or where that needs too much memory under one that needs less."""
        for family, chunks in self._first_families(configuration):
            one = self._draft(configuration, family, chunks)
            if one is not None:
                self._needs.pop(configuration, None)
                return one
        return None

    def _first_families(self, configuration: Configuration) -> list[tuple[str, int]]:
        families = self._families(configuration)
        return [*families[:1], *(one for one in families[1:] if one[0] == LEAN_FAMILY)]

    def _draft_others(self, configuration: Configuration, known: Sequence[tuple[str, int]]) -> list[GreedyPipeline]:
        """Drafts under all schedules but those that are known."""
        others = (one for one in self._families(configuration) if one not in known)
        return [one for family, chunks in others if (one := self._draft(configuration, family, chunks)) is not None]

    def _draft(self, configuration: Configuration, family: str, chunks: int) -> GreedyPipeline | None:
        """The best of the drafts under a schedule; None where none fits."""
        found: GreedyPipeline | None = None
        for solutions in self.solutions.solutions_like(configuration):
            blocks = self.solutions.block_options(configuration, solutions, splits_backward(family))
            one = self._draft_with(configuration, family, chunks, blocks)
            if one is not None and (found is None or one.seconds < found.seconds):
                found = one
        return found

    def _draft_with(
        self, configuration: Configuration, family: str, chunks: int, blocks: tuple[BlockOptions, ...]
    ) -> GreedyPipeline | None:
        # From some rounds on every further one takes as long as the one before.
        counts = [configuration.microbatches]
        if family != "gpipe" and self.returns_loss and configuration.microbatches > ROUNDS * configuration.ranks:
            counts = [ROUNDS * configuration.ranks, (ROUNDS - 1) * configuration.ranks]
        schedules = [self._schedule(family, configuration.ranks, count, chunks) for count in counts]
        try:
            problem = make_problem(blocks, schedules[0], self.solutions.budget)
        except (InfeasibleError, InputError) as error:
            self.refusals.append(error)
            return None
        found: GreedyPipeline | None = None
        for stages, options in assign_greedily(problem):
            measured = compute_cost(problem, stages, options)
            took = [longest_path(replace(problem, schedule=schedule), measured.columns)[0] for schedule in schedules]
            more = (configuration.microbatches - counts[0]) / configuration.ranks * (took[0] - took[-1])
            seconds = took[0] + more + measured.once
            if found is None or seconds < found.seconds:
                work = measured.columns[: PHASES * problem.schedule.stages].reshape(PHASES, -1).sum(axis=0)
                # Other schedules' stages may be finer, and so more equal.
                hope = self._hope(configuration, float(work.sum()) / configuration.ranks) + measured.once
                promise = self._promise(configuration, [float(work[list(own)].sum()) for own in problem.stages_of]) + measured.once
                nbytes = max(measured.peak) + self.solutions.beside
                found = GreedyPipeline(configuration, family, chunks, seconds, min(hope, seconds), min(promise, seconds), nbytes)
        if found is None:
            needed = max(compute_cost(problem, *find_leanest(problem)).peak) + self.solutions.beside
            self._needs[configuration] = min(self._needs.get(configuration, needed), needed)
        return found

    def _hope(self, configuration: Configuration, work: float) -> float:
        """Seconds of all micro-batches when every group works so long on each and bubbles are as small as some schedule makes them."""
        return min(
            (_least_seconds(configuration, family, chunks, work) for family, chunks in self._families(configuration)), default=math.inf
        )

    def _promise(self, configuration: Configuration, work: Sequence[float]) -> float:
        """Seconds of all micro-batches when ranks work so long on each, in as many stages as there are blocks for, with whole backwards."""
        chunks = max((chunks for _, chunks in self._families(configuration)), default=1)
        slowest, count = max(work), configuration.microbatches
        return max(count * slowest + (configuration.ranks - 1) * slowest / chunks, sum(work) + (count - 1) * slowest / chunks)

    def _assign(self, drafted: GreedyPipeline, limit: float, seconds: float) -> Pipelined | None:
        """The best stages and options under a schedule, if they take less than `limit`, searched for so many seconds."""
        configuration, family, chunks = drafted.configuration, drafted.family, drafted.chunks
        schedule = self._schedule(family, configuration.ranks, configuration.microbatches, chunks)
        best: tuple[float, SolutionSet, tuple[BlockOptions, ...]] | None = None
        for solutions in self.solutions.solutions_of(configuration):
            blocks = self.solutions.block_options(configuration, solutions, schedule.splits_backward)
            again = self._draft_with(configuration, family, chunks, blocks)
            takes = again.seconds if again is not None else math.inf
            if best is None or takes < best[0]:
                best = takes, solutions, blocks
        if best is None:
            return None
        _, solutions, blocks = best
        try:
            assignment = assign(blocks, schedule, self.solutions.budget, time_limit=seconds, gap=ASSIGN_GAP, cutoff=limit)
        except InfeasibleError as error:
            if error.needed == 0:
                raise
            self._note(configuration, None, error.needed + self.solutions.beside, "out of memory")
            return None
        except SolverError:
            self._note(configuration, None, None, f"{drafted}: no better one found in {seconds:.0f} s")
            return None
        outcome = "can't beat the best found" if assignment.status == "beyond" else assignment.status
        self._note(configuration, assignment.simulated, max(assignment.peak) + self.solutions.beside, f"{drafted}: {outcome}")
        return self._finish(drafted, solutions, blocks, assignment) if assignment.simulated < limit else None

    def _finish(
        self, drafted: GreedyPipeline, solutions: SolutionSet, blocks: tuple[BlockOptions, ...], assignment: Assignment
    ) -> Pipelined:
        """What an assignment means: placements of the blocks as they mix solutions, and what is run again."""
        configuration = drafted.configuration
        base = self.solutions.model_in_time(configuration.microbatches)
        assert base is not None
        chosen = [menu.options[number] for menu, number in zip(blocks, assignment.options, strict=True)]
        model, choices = mix(base, self.solutions.reading, solutions.choices, [one.solution for one in chosen])
        makers = self.solutions.makers(configuration, solutions)
        plain = join_menus([maker.make(("none",), splits_backward(drafted.family), {}) for maker in makers])
        travel: Mapping[str, Layout] = {}
        if configuration.ranks * drafted.chunks > 1:
            travel = {name: layout[1:] for name, layout in makers[0].travel().items()}
        block_choices = tuple(
            BlockChoice(block.name, stage, one.name) for block, stage, one in zip(self.chain.blocks, assignment.stages, chosen, strict=True)
        )
        return Pipelined(
            configuration=configuration,
            mesh=in_time(configuration.trial.mesh, configuration.microbatches),
            solution=solutions.solution,
            model=model,
            choices=choices,
            pipeline=Pipeline(configuration.ranks, drafted.family, drafted.chunks, configuration.microbatches, block_choices, travel),
            assignment=assignment,
            blocks=blocks,
            recompute_seconds=sum(one.input - menu.options[one.solution].input for one, menu in zip(chosen, plain, strict=True)),
        )

    # --- what is looked at ---

    def _families(self, configuration: Configuration) -> list[tuple[str, int]]:
        """(family, stages per group) of the schedules to try, the one that configurations are ranked by first."""
        if configuration not in self._known_families:
            self._known_families[configuration] = self._find_families(configuration)
        return self._known_families[configuration]

    def _find_families(self, configuration: Configuration) -> list[tuple[str, int]]:
        if self.wanted.schedule is not None:
            return list(self._of_family(self.wanted.schedule, configuration))
        if not self.returns_loss:
            return [("gpipe", 1)]
        if configuration.ranks == 1 and self.wanted.chunks in (None, 1):
            return [("1f1b", 1)]
        return [one for family in FAMILIES for one in self._of_family(family, configuration)]

    def _of_family(self, family: str, configuration: Configuration) -> Iterator[tuple[str, int]]:
        """(family, stages per group) that can be had for this configuration; why a pinned one can't is noted."""
        blocks = len(self.chain.blocks)
        chunks: Sequence[int | None] = (self.wanted.chunks,)
        if family == "interleaved" and self.wanted.chunks is None:
            chunks = [count for count in INTERLEAVED if count * configuration.ranks <= blocks] or INTERLEAVED[:1]
        for wanted in chunks:
            try:
                count = check_schedule(family, configuration.ranks, configuration.microbatches, wanted)
                if count * configuration.ranks > blocks:
                    raise InputError(
                        f"schedule {family} on {configuration.ranks} groups has {count * configuration.ranks} stages, but the model can be "
                        f"cut into {blocks} blocks at most; pin a smaller pp, or another schedule"
                    )
            except InputError as error:
                if self.wanted.schedule is not None:
                    self.refusals.append(error)
                continue
            yield family, count

    def _note(self, configuration: Configuration, seconds: float | None, nbytes: int | None, outcome: str) -> None:
        name = "pipeline" if configuration.ranks > 1 else "micro-batches" if configuration.microbatches > 1 else "recomputation"
        self.candidates.append(Candidate(name, str(configuration), seconds, nbytes, outcome))

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

    def find_configurations(self, find_group_trials: Callable[[int], Sequence[Trial]], *, alone: bool) -> list[Configuration]:
        """Every configuration to look at; `find_group_trials` gives the trials of a group of ranks, of one group only if `alone`.

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
        configurations = []
        sizes = [wanted.pp] if wanted.pp is not None else [n for n in range(1 if alone else 2, min(blocks, world) + 1) if world % n == 0]
        for groups in sizes:
            for trial in find_group_trials(groups):
                configurations += [Configuration(groups, trial, count) for count in self._counts(batch, groups, trial)]
        return configurations

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


def _least_seconds(configuration: Configuration, family: str, chunks: int, work: float) -> float:
    """Seconds of all micro-batches under a schedule when every group works so long on each, in equal stages that exchange nothing."""
    # Where weight gradients, a third of the work at most, may wait, they fill all bubbles but those before a group's first forward. That is
    # a quarter of the work or more, also where forwards are run again.
    idle, through = (1 / 4, 2 / 3) if splits_backward(family) else (1.0, 1.0)
    busiest = configuration.microbatches * work + idle * (configuration.ranks - 1) * work / chunks
    return max(busiest, through * (configuration.ranks * work + (configuration.microbatches - 1) * work / chunks))
