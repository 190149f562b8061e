"""Solutions of the placement problem of one micro-batch for pipeline configurations, and the block options that they give.

Comes in: configurations, one after another. Goes out: bounds and estimates of their work, numbers (1) and (4) of `configurations`; sets of
solutions that blocks may mix (`mixing`); block options for `assignment`.

Configurations whose devices compute and exchange the same for a micro-batch have the same *key*, and share one search of their placements:
two pipeline ranks of four devices with 8 micro-batches of a batch of 64 see 2 rows per device and micro-batch, and so do four
pipeline ranks of two devices with 16 micro-batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

from autopar.cost_models import axis_link
from autopar.costs import CostTables, Sharding, SolvedChain, call_seconds, count_uses, given_nbytes, operand_layout_of, result_layout_of
from autopar.errors import AutoparError, InputError
from autopar.ir import MICROBATCH, Mesh, Op, OpKind, Split, fits, with_pipeline
from autopar.search.options import AxisKind, Constraints, call_options
from autopar.search.pipeline.block_options import BlockOptions
from autopar.search.pipeline.configurations import Configuration, PipelineProblem
from autopar.search.pipeline.mixing import find_compatible_options, join_block_options
from autopar.search.pipeline.option_maker import BlockOptionMaker
from autopar.search.placement import FORBIDDEN, PlacementSolver, Problem, Solution, build_problem, restrict, sharding_of
from autopar.structure import AnalyzedGraph, MicroSplitter, batch_size, read_chain, with_microbatch_axis

# The most solutions that blocks may mix; and the highest price of memory at which these are searched, in units of the fastest step's
# seconds per device's memory (at price 1 all of a device's memory costs as much as the step).
SOLUTIONS = 6
LEAN_PRICE = 128.0
# Where axes are free, so much of that price is a base's too: of many options the leanest take far more time.
MIDDLE = 0.1


@dataclass(frozen=True, eq=False)
class SolutionSet:
    """Solutions of a placement problem that blocks may mix, from fast to lean: they agree on all that blocks share (see `mixing`).

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
class _PlacementSearch:
    """The placement problem of a configuration, whose seconds and bytes are of all its pipeline ranks together.

    Attributes:
        configuration: the one that the problem was built for; others with the same key use it too.
        model: split into the configuration's micro-batches.
        search: what solves the problem.
        once_s: in the fastest solution, seconds of a step that don't grow with the number of micro-batches.
        outputs_s: in the fastest solution, seconds per micro-batch to bring outputs to the layouts in which the user gets them.
    """

    configuration: Configuration
    model: AnalyzedGraph
    problem: Problem
    search: PlacementSolver
    once_s: float
    outputs_s: float


class SolutionCache:
    """Searches placements of a micro-batch, once for all configurations with the same key.

    Attributes:
        reads: who reads what in the chain of blocks.
        given_nbytes: bytes of inputs and buffers, which every device has whole.
        budget: bytes that they leave of a device's memory.
    """

    def __init__(self, pipelines: PipelineProblem, refusals: list[AutoparError]) -> None:
        """`refusals` is a list to append to: InputErrors that say why the model can't be split into some number of micro-batches."""
        model, cluster = pipelines.model, pipelines.cluster
        self.model = model
        self.graph = model.folded.graph
        self.chain = pipelines.chain
        self.reads = read_chain(model.folded.graph, model.spaces, pipelines.chain)
        self.cluster = cluster
        self.recompute = pipelines.recompute
        self.stages = pipelines.stages
        self.refusals = refusals
        self.given_nbytes = given_nbytes(self.graph)
        self.budget = cluster.machine.device.usable_bytes - self.given_nbytes
        self._splitter = MicroSplitter(self.graph, model.spaces, model.roles)
        self._products = [op for op in model.folded.ops if op.name in model.spaces and model.spaces[op.name].is_product]
        self._models: dict[int, AnalyzedGraph | None] = {}
        self._splits: dict[tuple[object, ...], bool] = {}  # whether an axis can split an op
        self._searches: dict[object, _PlacementSearch | None] = {}  # by key
        self._sets: dict[object, list[SolutionSet]] = {}  # by key
        self._makers: dict[tuple[Configuration, SolutionSet], list[BlockOptionMaker]] = {}
        self._block_options: dict[tuple[Configuration, SolutionSet, bool], tuple[BlockOptions, ...]] = {}

    def model_of_microbatch(self, count: int) -> AnalyzedGraph | None:
        """The model split into `count` micro-batches; None, with the reasons in `refusals`, where it can't be split so."""
        if count not in self._models:
            micro_split = self._splitter.split(count)
            self.refusals += map(InputError, micro_split.reasons)
            self._models[count] = None if micro_split.reasons else replace(self.model, micro_split=micro_split)
        return self._models[count]

    # --- work of a configuration ---

    def work_lower_bound_s(self, configuration: Configuration) -> float | None:
        """Lower bound (1): mean seconds that a pipeline rank works on a micro-batch; None where the batch can't be split into so many.

        Each product is counted as split by every axis that can split it alone: no placement splits it further.
        """
        model = self.model_of_microbatch(configuration.microbatches)
        if model is None:
            return None
        seconds = 0.0
        for op in self._products:
            parts = self._count_most_parts(model, op, configuration)
            seconds += model.folded.count[op.name] * sum(call_seconds(model, self.cluster.machine.device, op, parts, 0))
        return seconds / configuration.ranks

    def _count_most_parts(self, model: AnalyzedGraph, op: Op, configuration: Configuration) -> int:
        """The most parts into which micro-batches and the axes of a configuration's mesh can split an op."""
        assert model.micro_split is not None
        mesh = configuration.trial.mesh
        parts = configuration.microbatches if isinstance(model.micro_split.placements[op.name], Split) else 1
        for name, size, kind in zip(mesh.names, mesh.sizes, configuration.trial.constraints.kinds, strict=True):
            key = op.name, configuration.microbatches, size, kind
            if key not in self._splits:
                alone = Mesh((MICROBATCH, name), (configuration.microbatches, size))
                options = call_options(model, op, alone, Constraints((AxisKind.MICROBATCH, kind)))
                self._splits[key] = any(isinstance(option[1], Split) for option in options)
            parts *= size if self._splits[key] else 1
        return parts

    def estimate_work(self, configuration: Configuration) -> WorkEstimate | None:
        """The work of estimate (4): that of the fastest placements without a memory limit; None where some op has no placement."""
        placement = self._search_placements_alike(configuration)
        if placement is None:
            return None
        work = (placement.search.bound_ns / 1e9 - placement.once_s) / placement.configuration.microbatches
        if placement.configuration.trial.mesh == configuration.trial.mesh:
            return WorkEstimate(work / configuration.ranks, placement.once_s / configuration.ranks)
        # Gradient reductions once per step and gathered outputs depend on how many devices split the batch, which differs here.
        return WorkEstimate((work - placement.outputs_s) / configuration.ranks, 0.0)

    def _key(self, configuration: Configuration) -> object:
        """Equal for configurations of equal axes, except the sizes of dp axes, whose devices see equally many rows of a micro-batch.

        A device then computes and exchanges the same for a micro-batch; only the storage of parameters over dp axes differs.
        """
        mesh = configuration.trial.mesh
        dp_size = math.prod(size for name, size in zip(mesh.names, mesh.sizes, strict=True) if name == AxisKind.DP.value)
        # A fraction, since the batch may not be divisible.
        rows = Fraction(batch_size(self.graph, self.model.roles), configuration.microbatches * dp_size)
        other_sizes = tuple(size for name, size in zip(mesh.names, mesh.sizes, strict=True) if name != AxisKind.DP.value)
        # A single micro-batch splits no op, and an axis of one rank none; several do.
        return mesh.names, other_sizes, rows, configuration.trial.name, configuration.microbatches == 1, dp_size == 1

    # --- solutions ---

    def _search_placements_alike(self, configuration: Configuration) -> _PlacementSearch | None:
        """The problem of a configuration, or of another with the same key; None where some op has no placement."""
        key = self._key(configuration)
        if key not in self._searches:
            self._searches[key] = self._search_placements(configuration)
        return self._searches[key]

    def _search_placements(self, configuration: Configuration) -> _PlacementSearch | None:
        """The placement problem of this very configuration; None where some op has no placement."""
        model = self.model_of_microbatch(configuration.microbatches)
        if model is None:
            return None
        constraints = configuration.trial.constraints.with_microbatches()
        problem = build_problem(
            model, with_microbatch_axis(configuration.trial.mesh, configuration.microbatches), self.cluster, constraints
        )
        search = PlacementSolver(problem)
        if search.bound_ns >= FORBIDDEN:
            return None
        fastest = sharding_of(problem, search.solution_at(0.0).choice)
        tables = CostTables(model, problem.mesh, self.cluster, constraints.pins.ahead)
        once_s, outputs_s = _once_seconds(model, tables, fastest), _output_seconds(model, tables, fastest)
        return _PlacementSearch(configuration, model, problem, search, once_s, outputs_s)

    def _find_sets(self, placement: _PlacementSearch) -> list[SolutionSet]:
        """Sets of solutions that blocks may mix: one whose base is the fastest solution, and those of leaner bases, if these differ."""
        sets: list[SolutionSet] = []
        model, problem, search = placement.model, placement.problem, placement.search
        highest = LEAN_PRICE * search.bound_ns / (placement.configuration.ranks * self.cluster.machine.device.usable_bytes)
        is_free = AxisKind.FREE in placement.configuration.trial.constraints.kinds
        for price in (0.0, MIDDLE * highest, highest) if is_free else (0.0, highest):
            base = search.solution_at(price)
            inner = restrict(problem, find_compatible_options(model, self.reads, problem, base.choice))
            shardings = tuple(sharding_of(inner, solution.choice) for solution in PlacementSolver(inner).frontier(highest, SOLUTIONS))
            if shardings not in (solutions.shardings for solutions in sets):
                sets.append(SolutionSet(shardings, base))
        return sets

    def solution_sets(self, configuration: Configuration) -> list[SolutionSet]:
        """Sets of solutions for this very configuration."""
        placement = self._searches.get(self._key(configuration))
        if placement is not None and placement.configuration is configuration:
            return self.solution_sets_alike(configuration)  # the search that is shared was made for this configuration
        placement = self._search_placements(configuration)
        return self._find_sets(placement) if placement is not None else []

    def solution_sets_alike(self, configuration: Configuration) -> list[SolutionSet]:
        """Sets of solutions for greedy assignments: those of another configuration with the same key, where they are legal here."""
        key = self._key(configuration)
        model, placement = self.model_of_microbatch(configuration.microbatches), self._search_placements_alike(configuration)
        if model is None or placement is None:
            return []
        if key not in self._sets:
            self._sets[key] = self._find_sets(placement)
        shardings = [sharding for solutions in self._sets[key] for sharding in solutions.shardings]
        if not all(self._is_legal(sharding, model, configuration.trial.mesh) for sharding in shardings):
            placement = self._searches[key] = self._search_placements(configuration)
            self._sets[key] = self._find_sets(placement) if placement is not None else []
        return self._sets[key]

    def _is_legal(self, sharding: Sharding, model: AnalyzedGraph, mesh: Mesh) -> bool:
        """Whether a sharding can be used for this number of micro-batches and this mesh, though it was found for others.

        Each call must be split over micro-batches as the model says, and the sizes of the mesh must divide parameters as they are stored.
        """
        assert model.micro_split is not None
        over_batches = model.micro_split.placements
        parameters = (op for op in self.model.folded.ops if op.kind is OpKind.PARAMETER)
        return all(placement[0] == over_batches[name] for name, placement in sharding.placements.items()) and all(
            fits(op.results[0].shape, sharding.layouts[op.name][1:], mesh) for op in parameters
        )

    # --- block options ---

    def block_options(self, configuration: Configuration, solutions: SolutionSet, splits_backward: bool) -> tuple[BlockOptions, ...]:
        """Every block's options: each solution of the set with each kind of recomputation.

        With `splits_backward`, weight gradients are a pass of their own, as the schedule has it; otherwise part of the backward.
        """
        key = configuration, solutions, splits_backward
        if key not in self._block_options:
            makers = self.makers(configuration, solutions)
            self._block_options[key] = join_block_options([maker.make(self.recompute, splits_backward, self.stages) for maker in makers])
        return self._block_options[key]

    def makers(self, configuration: Configuration, solutions: SolutionSet) -> list[BlockOptionMaker]:
        """Per solution of a set, what makes its block options."""
        if (configuration, solutions) not in self._makers:
            model = self.model_of_microbatch(configuration.microbatches)
            assert model is not None
            mesh, link = configuration.trial.mesh, None
            if configuration.ranks > 1:
                link = axis_link(self.cluster, with_pipeline(mesh, configuration.ranks).sizes, 0)
            tables = CostTables(
                model, with_microbatch_axis(mesh, configuration.microbatches), self.cluster, configuration.trial.constraints.pins.ahead
            )
            self._makers[configuration, solutions] = [
                BlockOptionMaker(SolvedChain(model, self.chain, self.reads, tables, sharding, is_one_stage=link is None), link, number)
                for number, sharding in enumerate(solutions.shardings)
            ]
        return self._makers[configuration, solutions]


def _once_seconds(model: AnalyzedGraph, tables: CostTables, sharding: Sharding) -> float:
    """Seconds of a step that don't grow with the number of micro-batches: optimizer updates, and gradient reductions not overlapped."""
    folded, uses, total = model.folded, count_uses(model), 0.0
    for op in folded.ops:
        if op.kind is OpKind.PARAMETER:
            total += folded.count[op.name] * tables.step_seconds(op.results[0], sharding.layouts[op.name])
    for edge in folded.edges:
        producer, reader = folded.graph.by_name[edge.value.op], folded.graph.by_name[edge.consumer]
        if producer.kind is OpKind.PARAMETER and reader.kind is OpKind.CALL:
            need = operand_layout_of(model, reader, sharding.placements[reader.name], edge.operand)
            start = sharding.layouts[producer.name]
            total += edge.count * tables.parameter_seconds(producer.results[0], start, need, uses[producer.name])[1]
    return total


def _output_seconds(model: AnalyzedGraph, tables: CostTables, sharding: Sharding) -> float:
    """Seconds per micro-batch to bring the model's outputs from the layouts in which they are made to those in which the user gets them."""
    total = 0.0
    for position, value in enumerate(model.folded.graph.output.operands):
        producer = model.folded.graph.by_name[model.folded.representative[value.op]]
        if producer.kind is OpKind.CALL:
            start = result_layout_of(model, producer, sharding.placements[producer.name], value.index)
            need = sharding.outputs[position]
            total += tables.journey_seconds(model.folded.graph.tensor(value), start, need, backward=False)[0]
    return total
