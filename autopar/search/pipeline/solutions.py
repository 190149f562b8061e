"""Solutions of the placement problem of one micro-batch for pipeline configurations, and the block options that they give.

Comes in: configurations, one after another. Goes out: bounds and estimates of their work, numbers (1) and (4) of `configurations`; sets of
solutions that blocks may mix; block options for `assignment`. Configurations whose devices compute and exchange the same for a
micro-batch have the same *key* and share one search of their placements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

from autopar.cost_models import axis_link
from autopar.costs import CostTables, Sharding, SolvedChain, call_seconds, given_nbytes
from autopar.errors import AutoparError, InputError
from autopar.ir import MICROBATCH, Mesh, Op, OpKind, Split, fits, with_pipeline
from autopar.search.options import AxisKind, Constraints, call_options
from autopar.search.pipeline.block_options import BlockOptions
from autopar.search.pipeline.configurations import Configuration, PipelineProblem
from autopar.search.pipeline.variants import (
    BlockOptionMaker,
    find_shared,
    join_menus,
    once_seconds,
    output_seconds,
    sharding_of,
)
from autopar.search.placement import FORBIDDEN, Problem, Search, Solution, build_problem, restrict
from autopar.structure import MicroSplitter, Model, batch_size, in_time, read_chain

# Solutions of a micro-batch that blocks may mix, at most, and the highest price of memory at which they are searched, as a multiple of the
# step over the budget.
SOLUTIONS = 6
LEAN_PRICE = 128.0


@dataclass(frozen=True, eq=False)
class SolutionSet:
    """Solutions of a placement problem that blocks may mix, from fast to lean: they agree on all that blocks share.

    Attributes:
        shardings: placements and layouts of each solution.
        base: the solution that decided on what blocks share.
    """

    shardings: tuple[Sharding, ...]
    base: Solution


class WorkEstimate(NamedTuple):
    """Mean seconds that a pipeline rank works: on each micro-batch, and once per step."""

    microbatch_s: float
    step_s: float


@dataclass(frozen=True, eq=False)
class _Placed:
    """The placement problem of a configuration, with the seconds and bytes of all its pipeline ranks together.

    Attributes:
        search: what solves it.
        once_s: seconds of a step that micro-batches don't add to, in the fastest solution.
        outputs_s: seconds that a micro-batch takes there to bring the outputs to the layouts that the user gets.
    """

    configuration: Configuration
    model: Model
    problem: Problem
    search: Search
    once_s: float
    outputs_s: float


class SolutionCache:
    """Searches placements of a micro-batch; what was found serves every configuration with the same key.

    Attributes:
        reads: who reads what in the chain of blocks.
        beside: bytes of inputs and buffers, which every device has whole; `budget`: bytes of a device that they leave.
    """

    def __init__(self, pipelines: PipelineProblem, refusals: list[AutoparError]) -> None:
        """`refusals` gets an InputError for each reason why the model can't be split into so many micro-batches."""
        model, cluster = pipelines.model, pipelines.cluster
        self.model = model
        self.graph = model.folded.graph
        self.chain = pipelines.chain
        self.reads = read_chain(model.folded.graph, model.spaces, pipelines.chain)
        self.cluster = cluster
        self.recompute = pipelines.recompute
        self.stages = pipelines.stages
        self.refusals = refusals
        self.beside = given_nbytes(self.graph)
        self.budget = cluster.machine.device.usable_bytes - self.beside
        self._splitter = MicroSplitter(self.graph, model.spaces, model.factors)
        self._products = [op for op in model.folded.ops if op.name in model.spaces and model.spaces[op.name].is_product]
        self._models: dict[int, Model | None] = {}
        self._splits: dict[tuple[object, ...], bool] = {}
        self._placed: dict[object, _Placed | None] = {}
        self._sets: dict[object, list[SolutionSet]] = {}
        self._makers: dict[tuple[Configuration, SolutionSet], list[BlockOptionMaker]] = {}
        self._block_options: dict[tuple[Configuration, SolutionSet, bool], tuple[BlockOptions, ...]] = {}

    def model_in_time(self, count: int) -> Model | None:
        """The model split into `count` micro-batches; None, with the reasons in `refusals`, where it can't be split so."""
        if count not in self._models:
            micro = self._splitter.split(count)
            self.refusals += map(InputError, micro.reasons)
            self._models[count] = None if micro.reasons else replace(self.model, micro=micro)
        return self._models[count]

    # --- work of a configuration ---

    def work_lower_bound_s(self, configuration: Configuration) -> float | None:
        """Lower bound (1): mean seconds of a pipeline rank for a micro-batch; None where the batch can't be split into so many.

        Every axis is taken to split every product that it can split alone, so that no placement splits one further.
        """
        model = self.model_in_time(configuration.microbatches)
        if model is None:
            return None
        seconds = 0.0
        for op in self._products:
            ways = self._count_most_parts(model, op, configuration)
            seconds += model.folded.count[op.name] * sum(call_seconds(model, self.cluster.machine.device, op, ways, 0))
        return seconds / configuration.ranks

    def _count_most_parts(self, model: Model, op: Op, configuration: Configuration) -> int:
        """Parts into which micro-batches and the axes of a configuration's mesh split an op at most."""
        assert model.micro is not None
        mesh = configuration.trial.mesh
        ways = configuration.microbatches if isinstance(model.micro.placements[op.name], Split) else 1
        for name, size, kind in zip(mesh.names, mesh.sizes, configuration.trial.constraints.kinds, strict=True):
            key = op.name, configuration.microbatches, size, kind
            if key not in self._splits:
                alone = Mesh((MICROBATCH, name), (configuration.microbatches, size))
                options = call_options(model, op, alone, Constraints((AxisKind.TIME, kind)))
                self._splits[key] = any(isinstance(option[1], Split) for option in options)
            ways *= size if self._splits[key] else 1
        return ways

    def estimate_work(self, configuration: Configuration) -> WorkEstimate | None:
        """The work of estimate (4): that of the fastest placements without a limit of memory; None where some op has no placement."""
        placed = self._place_alike(configuration)
        if placed is None:
            return None
        work = (placed.search.bound_ns / 1e9 - placed.once_s) / placed.configuration.microbatches
        if placed.configuration.trial.mesh == configuration.trial.mesh:
            return WorkEstimate(work / configuration.ranks, placed.once_s / configuration.ranks)
        # What devices that split the batch do together at the ends of a step, or with its outputs, depends on how many they are.
        return WorkEstimate((work - placed.outputs_s) / configuration.ranks, 0.0)

    def _key(self, configuration: Configuration) -> object:
        """Equal for configurations whose devices see micro-batches of the same size on the same axes, but for those that split the batch.

        What a device computes and exchanges for a micro-batch is then the same, but for the parameters' storage.
        """
        mesh = configuration.trial.mesh
        ways = math.prod(size for name, size in zip(mesh.names, mesh.sizes, strict=True) if name == AxisKind.DP.value)
        # Devices that can't split the batch have no whole number of rows each.
        rows = Fraction(batch_size(self.graph, self.model.factors), configuration.microbatches * ways)
        sizes = tuple(size for name, size in zip(mesh.names, mesh.sizes, strict=True) if name != AxisKind.DP.value)
        # One micro-batch splits no op.
        return mesh.names, sizes, rows, configuration.trial.name, configuration.microbatches == 1

    # --- solutions ---

    def _place_alike(self, configuration: Configuration) -> _Placed | None:
        """The problem of a configuration, or of another with the same key; None where some op has no placement."""
        key = self._key(configuration)
        if key not in self._placed:
            self._placed[key] = self._place(configuration)
        return self._placed[key]

    def _place(self, configuration: Configuration) -> _Placed | None:
        """The placement problem of this very configuration; None where some op has no placement."""
        model = self.model_in_time(configuration.microbatches)
        if model is None:
            return None
        constraints = replace(configuration.trial.constraints, kinds=(AxisKind.TIME, *configuration.trial.constraints.kinds))
        problem = build_problem(model, in_time(configuration.trial.mesh, configuration.microbatches), self.cluster, constraints)
        search = Search(problem)
        if search.bound_ns >= FORBIDDEN:
            return None
        fastest = sharding_of(problem, search.solution_at(0.0).choice)
        tables = CostTables(model, problem.mesh, self.cluster)
        return _Placed(configuration, model, problem, search, once_seconds(model, tables, fastest), output_seconds(model, tables, fastest))

    def _find_sets(self, placed: _Placed) -> list[SolutionSet]:
        """Sets of solutions that blocks may mix: those that share what the fastest solution decides, and what a lean one does."""
        sets: list[SolutionSet] = []
        model, problem, search = placed.model, placed.problem, placed.search
        highest = LEAN_PRICE * search.bound_ns / (placed.configuration.ranks * self.cluster.machine.device.usable_bytes)
        for price in (0.0, highest):
            base = search.solution_at(price)
            inner = restrict(problem, find_shared(model, self.reads, problem, base.choice))
            shardings = tuple(sharding_of(inner, solution.choice) for solution in Search(inner).frontier(highest, SOLUTIONS))
            if shardings not in (known.shardings for known in sets):
                sets.append(SolutionSet(shardings, base))
        return sets

    def solution_sets(self, configuration: Configuration) -> list[SolutionSet]:
        """Sets of solutions for this very configuration."""
        placed = self._placed.get(self._key(configuration))
        if placed is not None and placed.configuration is configuration:
            return self.solution_sets_alike(configuration)  # its greedy assignments were made from its own
        placed = self._place(configuration)
        return self._find_sets(placed) if placed is not None else []

    def solution_sets_alike(self, configuration: Configuration) -> list[SolutionSet]:
        """Sets of solutions for greedy assignments: those of another configuration with the same key, where they are legal here."""
        key = self._key(configuration)
        model, placed = self.model_in_time(configuration.microbatches), self._place_alike(configuration)
        if model is None or placed is None:
            return []
        if key not in self._sets:
            self._sets[key] = self._find_sets(placed)
        known = [sharding for solutions in self._sets[key] for sharding in solutions.shardings]
        if not all(self._is_legal(sharding, model, configuration.trial.mesh) for sharding in known):
            placed = self._placed[key] = self._place(configuration)
            self._sets[key] = self._find_sets(placed) if placed is not None else []
        return self._sets[key]

    def _is_legal(self, sharding: Sharding, model: Model, mesh: Mesh) -> bool:
        """Whether micro-batches split every call so (one micro-batch splits none), and a mesh with these axes can store parameters so."""
        assert model.micro is not None
        over_batches = model.micro.placements
        parameters = (op for op in self.model.folded.ops if op.kind is OpKind.PARAMETER)
        return all(placement[0] == over_batches[name] for name, placement in sharding.placements.items()) and all(
            fits(op.results[0].shape, sharding.layouts[op.name][1:], mesh) for op in parameters
        )

    # --- block options ---

    def block_options(self, configuration: Configuration, solutions: SolutionSet, splits_backward: bool) -> tuple[BlockOptions, ...]:
        """Every block's options: each solution of the set with each kind of recomputation, for whole backwards or for split ones."""
        key = configuration, solutions, splits_backward
        if key not in self._block_options:
            makers = self.makers(configuration, solutions)
            self._block_options[key] = join_menus([maker.make(self.recompute, splits_backward, self.stages) for maker in makers])
        return self._block_options[key]

    def makers(self, configuration: Configuration, solutions: SolutionSet) -> list[BlockOptionMaker]:
        """What makes the block options of each solution of a set."""
        if (configuration, solutions) not in self._makers:
            model = self.model_in_time(configuration.microbatches)
            assert model is not None
            mesh, link = configuration.trial.mesh, None
            if configuration.ranks > 1:
                link = axis_link(self.cluster, with_pipeline(mesh, configuration.ranks).sizes, 0)
            tables = CostTables(model, in_time(mesh, configuration.microbatches), self.cluster)
            self._makers[configuration, solutions] = [
                BlockOptionMaker(SolvedChain(model, self.chain, self.reads, tables, sharding, is_one_stage=link is None), link, number)
                for number, sharding in enumerate(solutions.shardings)
            ]
        return self._makers[configuration, solutions]
