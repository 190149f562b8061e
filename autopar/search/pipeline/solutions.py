"""Placements of one micro-batch for pipeline configurations: how fast any can be, which blocks may mix, and the block options they give.

Comes in: configurations, one after another. Goes out: to ``configurations``, which ranks them by what is made of these options.
Configurations whose ranks see the same share one search of their placements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from autopar.cost_models import Cluster, axis_link
from autopar.costs import CostTables, call_seconds
from autopar.errors import AutoparError, InputError
from autopar.ir import MICRO, Mesh, Op, OpKind, Split, fits, with_pipeline
from autopar.search.meshes import Trial
from autopar.search.options import AxisKind, Constraints, call_options
from autopar.search.pipeline.assignment import BlockOptions
from autopar.search.pipeline.variants import Choices, Menus, choices_of, find_shared, join_menus, once_seconds, output_seconds, read_chain
from autopar.search.placement import FORBIDDEN, Problem, Search, Solution, build_problem, restrict
from autopar.structure import Chain, MicroSplitter, Model, batch_size, in_time

# Placements of a micro-batch that blocks may mix, at most, and the highest price of memory at which they are searched, as a multiple of the
# step over the budget.
SOLUTIONS = 6
LEAN_PRICE = 128.0


@dataclass(frozen=True, eq=False)
class Configuration:
    """A pipeline to look at: groups of ranks, the trial of each group, micro-batches."""

    ranks: int
    trial: Trial
    microbatches: int

    def __str__(self) -> str:
        return f"{with_pipeline(self.trial.mesh, self.ranks)}, {self.microbatches} micro-batches"


@dataclass(frozen=True, eq=False)
class _Placed:
    """The placement problem of a configuration, with bytes of all groups together.

    `once`: seconds of a step that micro-batches don't add to; `outputs`: those that a micro-batch takes to hand the outputs over.
    """

    configuration: Configuration
    model: Model
    problem: Problem
    search: Search
    once: float
    outputs: float


@dataclass(frozen=True, eq=False)
class SolutionSet:
    """Placements of one micro-batch that blocks may mix, from fast to lean, and the proof of the one that decided on what all share."""

    choices: tuple[Choices, ...]
    solution: Solution


class SolutionCache:
    """Searches placements of one model on one cluster; what was found serves every configuration that sees the same."""

    def __init__(
        self,
        model: Model,
        chain: Chain,
        cluster: Cluster,
        recompute: Sequence[str],
        stages: Mapping[str, int],
        refusals: list[AutoparError],
    ) -> None:
        """`recompute`: kinds of recomputation that blocks may take; `stages`: pinned ones, by block; `refusals` gets what can't be had."""
        self.model = model
        self.graph = model.folded.graph
        self.chain = chain
        self.reading = read_chain(model, chain)
        self.cluster = cluster
        self.recompute = recompute
        self.stages = stages
        self.refusals = refusals
        # Bytes of inputs and buffers, which every rank has whole, and those of a rank that they leave.
        self.beside = sum(op.results[0].nbytes for kind in (OpKind.INPUT, OpKind.BUFFER) for op in self.graph.of_kind(kind))
        self.budget = cluster.machine.device.usable_bytes - self.beside
        self._splitter = MicroSplitter(self.graph, model.spaces, model.factors)
        self._products = [op for op in model.folded.ops if op.name in model.spaces and model.spaces[op.name].is_product]
        self._models: dict[int, Model | None] = {}
        self._splits: dict[tuple[object, ...], bool] = {}
        self._placed: dict[object, _Placed | None] = {}
        self._known: dict[object, list[SolutionSet]] = {}
        self._costed: dict[tuple[Configuration, SolutionSet], list[Menus]] = {}
        self._made: dict[tuple[Configuration, SolutionSet, bool], tuple[BlockOptions, ...]] = {}

    def model_in_time(self, count: int) -> Model | None:
        """The model as `count` micro-batches see it; None, with the reasons noted, where it can't be split so."""
        if count not in self._models:
            micro = self._splitter.split(count)
            self.refusals += map(InputError, micro.reasons)
            self._models[count] = None if micro.reasons else replace(self.model, micro=micro)
        return self._models[count]

    # --- bounds ---

    def least_work(self, configuration: Configuration) -> float | None:
        """Seconds that one group's share of a micro-batch takes at least, were products all there is; None where it can't be split so.

        Takes every axis for used by every product that it can split alone, so that no placement splits more.
        """
        model = self.model_in_time(configuration.microbatches)
        if model is None:
            return None
        seconds = 0.0
        for op in self._products:
            ways = self._most_ways(model, op, configuration)
            seconds += model.folded.count[op.name] * sum(call_seconds(model, self.cluster.machine.device, op, ways, 0))
        return seconds / configuration.ranks

    def _most_ways(self, model: Model, op: Op, configuration: Configuration) -> int:
        assert model.micro is not None
        mesh = configuration.trial.mesh
        ways = configuration.microbatches if isinstance(model.micro.parts[op.name], Split) else 1
        for name, size, kind in zip(mesh.names, mesh.sizes, configuration.trial.constraints.kinds, strict=True):
            key = op.name, configuration.microbatches, size, kind
            if key not in self._splits:
                alone = Mesh((MICRO, name), (configuration.microbatches, size))
                options = call_options(model, op, alone, Constraints((AxisKind.TIME, kind)))
                self._splits[key] = any(isinstance(option[1], Split) for option in options)
            ways *= size if self._splits[key] else 1
        return ways

    def fastest_work(self, configuration: Configuration) -> tuple[float, float] | None:
        """Seconds that one group's share of a micro-batch takes in the fastest placements, with memory no matter, and those once per step.

        None where some op has no placement.
        """
        placed = self._placed_like(configuration)
        if placed is None:
            return None
        work = (placed.search.bound_ns / 1e9 - placed.once) / placed.configuration.microbatches
        if placed.configuration.trial.mesh == configuration.trial.mesh:
            return work / configuration.ranks, placed.once / configuration.ranks
        # What ranks that split the batch do together at the ends of a step, or with its outputs, depends on how many they are.
        return (work - placed.outputs) / configuration.ranks, 0.0

    def _key(self, configuration: Configuration) -> object:
        """Equal for configurations whose ranks see micro-batches of the same size on the same axes, but for ranks that split the batch.

        What a rank computes and exchanges for a micro-batch is then the same, but for the parameters' storage.
        """
        mesh = configuration.trial.mesh
        ways = math.prod(size for name, size in zip(mesh.names, mesh.sizes, strict=True) if name == AxisKind.DP.value)
        # Ranks that can't split the batch have no whole number of rows each.
        rows = Fraction(batch_size(self.graph, self.model.factors), configuration.microbatches * ways)
        sizes = tuple(size for name, size in zip(mesh.names, mesh.sizes, strict=True) if name != AxisKind.DP.value)
        # One micro-batch splits no op.
        return mesh.names, sizes, rows, configuration.trial.name, configuration.microbatches == 1

    # --- solutions ---

    def _placed_like(self, configuration: Configuration) -> _Placed | None:
        """The problem of a configuration, or of another with the same key; None where some op has no placement."""
        key = self._key(configuration)
        if key not in self._placed:
            self._placed[key] = self._place(configuration)
        return self._placed[key]

    def _place(self, configuration: Configuration) -> _Placed | None:
        """The fastest placements of a micro-batch; None where some op has none."""
        model = self.model_in_time(configuration.microbatches)
        if model is None:
            return None
        constraints = replace(configuration.trial.constraints, kinds=(AxisKind.TIME, *configuration.trial.constraints.kinds))
        problem = build_problem(model, in_time(configuration.trial.mesh, configuration.microbatches), self.cluster, constraints)
        search = Search(problem)
        if search.bound_ns >= FORBIDDEN:
            return None
        fastest = choices_of(problem, search.solution_at(0.0).choice)
        tables = CostTables(model, problem.mesh, self.cluster)
        return _Placed(configuration, model, problem, search, once_seconds(model, tables, fastest), output_seconds(model, tables, fastest))

    def _answers(self, placed: _Placed) -> list[SolutionSet]:
        """Placements of a micro-batch: sets of solutions that blocks may mix, those of the fastest boundaries first."""
        found: list[SolutionSet] = []
        model, problem, search = placed.model, placed.problem, placed.search
        highest = LEAN_PRICE * search.bound_ns / (placed.configuration.ranks * self.cluster.machine.device.usable_bytes)
        for base in (0.0, highest):
            solution = search.solution_at(base)
            inner = restrict(problem, find_shared(model, self.reading, problem, solution.choice))
            choices = tuple(choices_of(inner, one.choice) for one in Search(inner).frontier(highest, SOLUTIONS))
            if choices not in (one.choices for one in found):
                found.append(SolutionSet(choices, solution))
        return found

    def solutions_of(self, configuration: Configuration) -> list[SolutionSet]:
        """Placements for this very configuration."""
        placed = self._placed.get(self._key(configuration))
        if placed is not None and placed.configuration is configuration:
            return self.solutions_like(configuration)  # those of its drafts are its own
        placed = self._place(configuration)
        return self._answers(placed) if placed is not None else []

    def solutions_like(self, configuration: Configuration) -> list[SolutionSet]:
        """Placements for a draft: those of another configuration with the same key, where they are legal here."""
        key = self._key(configuration)
        model, placed = self.model_in_time(configuration.microbatches), self._placed_like(configuration)
        if model is None or placed is None:
            return []
        if key not in self._known:
            self._known[key] = self._answers(placed)
        if not all(self._is_legal(one, model, configuration.trial.mesh) for solutions in self._known[key] for one in solutions.choices):
            placed = self._placed[key] = self._place(configuration)
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

    # --- block options ---

    def block_options(self, configuration: Configuration, solutions: SolutionSet, splits_backward: bool) -> tuple[BlockOptions, ...]:
        """Every block's options, each solution with each kind of recomputation, for whole backwards or for split ones."""
        key = configuration, solutions, splits_backward
        if key not in self._made:
            makers = self.makers(configuration, solutions)
            self._made[key] = join_menus([maker.make(self.recompute, splits_backward, self.stages) for maker in makers])
        return self._made[key]

    def makers(self, configuration: Configuration, solutions: SolutionSet) -> list[Menus]:
        """What makes the block options of each solution."""
        if (configuration, solutions) not in self._costed:
            model = self.model_in_time(configuration.microbatches)
            assert model is not None
            tables = CostTables(model, in_time(configuration.trial.mesh, configuration.microbatches), self.cluster)
            link = (
                axis_link(self.cluster, with_pipeline(configuration.trial.mesh, configuration.ranks).sizes, 0)
                if configuration.ranks > 1
                else None
            )
            self._costed[configuration, solutions] = [
                Menus(model, self.chain, self.reading, tables, choices, link, number) for number, choices in enumerate(solutions.choices)
            ]
        return self._costed[configuration, solutions]
