"""Plans of every kind for a model of the zoo, verified against one reference run: what the tests of exactness share."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections import defaultdict
from collections.abc import Mapping
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt
import torch

from autopar.capture.export import capture
from autopar.checks.verification import Reference, Verification, prepare_reference, verify_against
from autopar.cost_models import Cluster
from autopar.errors import InputError
from autopar.ir.graph import Op, OpKind, Value
from autopar.ir.layout import REPLICATE, Layout, Mesh, Placement, Split, StateKind, fits, shard
from autopar.plans.pins import NO_PINS, Pins
from autopar.plans.plan import RECOMPUTE, BlockChoice, Pipeline, Plan
from autopar.rules.table import find_spaces
from autopar.schedules.families import SCHEDULES, make_schedule
from autopar.search.meshes import find_trials
from autopar.search.options import AxisKind, Constraints
from autopar.search.placement.problem import FORBIDDEN, DecisionKind, Problem, build_problem, sharding_of
from autopar.search.placement.solve import solve
from autopar.structure.blocks import Chain, find_chain
from autopar.structure.layers import fold, regroup
from autopar.structure.microbatches import MicroSplit, split_microbatches
from autopar.structure.model import AnalyzedGraph, find_constants, role_of, with_microbatch_axis
from autopar.structure.roles import Role, find_roles
from tests.planning import make_plan
from tests.zoo import DEEP, ZOO

GROUPS = ((), (("dp", 2),), (("tp", 2),), (("cp", 2),), (("x", 2),), (("x", 2), ("y", 2)))
"""Meshes of pipeline ranks that `Subject.random_pipeline` draws from, by name and size of the axes."""


@cache
def subject(name: str) -> Subject:
    """The model of the zoo called `name`, captured and run once per process."""
    return Subject(name)


class Subject:
    """A captured model of the zoo, what it computes on one device, and plans for it.

    Attributes:
        reference: what plans are compared with.
        with_gradient: names of the parameters that the model itself gives a gradient.
    """

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        model, inputs = (ZOO | DEEP)[name]()
        self.reference: Reference = prepare_reference(model, inputs, capture(model, inputs))
        self.graph = self.reference.captured.graph
        spaces, _ = find_spaces(self.graph)
        self.model = AnalyzedGraph(fold(self.graph), spaces, find_roles(self.graph, spaces), find_constants(self.graph))
        output = model(**inputs)
        (output if isinstance(output, torch.Tensor) else output.loss).backward()
        self.with_gradient = frozenset(name for name, p in model.named_parameters() if p.grad is not None)
        self._problems: dict[tuple[int, ...], Problem] = {}
        self._bases: dict[Mesh, Plan] = {}
        self._micro: dict[int, MicroSplit] = {}
        self._timed: dict[tuple[tuple[tuple[str, int], ...], int, bool], Problem] = {}

    @cached_property
    def chain(self) -> Chain:
        """The blocks that stages are runs of."""
        return find_chain(self.model.folded, self.model.spaces)

    def verify(self, plan: Plan) -> Verification:
        """Compare `plan` with the reference."""
        return verify_against(self.reference, plan)

    def pinned(self, pins: Mapping[str, object], cluster: str = "4xcpu") -> Plan:
        """The plan that the search finds under `pins`."""
        return make_plan(self.graph, Cluster.parse(cluster), pins=pins)

    def cramped(self, sizes: tuple[int, ...], share: float) -> Plan:
        """The search's plan on free axes of these sizes, given `share` of the memory that it would take if it were free to.

        Models as small as these run fastest replicated; what makes the search split them is the want of memory.
        """
        axes = dict(zip("xyz", sizes, strict=False))
        cluster = _cluster(sizes)
        wanted = make_plan(self.graph, cluster, mesh=axes).memory
        device = cluster.machine.device
        budget = int(share * (wanted.total - wanted.reserved)) + device.reserved_bytes
        machine = dataclasses.replace(cluster.machine, device=dataclasses.replace(device, memory_bytes=budget))
        return make_plan(self.graph, dataclasses.replace(cluster, machine=machine), mesh=axes)

    def baselines(self, cluster: str = "4xcpu") -> dict[str, Plan]:
        """The layouts that people use today, by name."""
        trials = find_trials(self.model, Cluster.parse(cluster), NO_PINS, None, {})
        plans = {}
        for trial in trials:
            if trial.baseline:
                problem = build_problem(self.model, trial.mesh, Cluster.parse(cluster), trial.constraints)
                chosen = solve(problem, 1 << 60).choice
                choice = {i: chosen[node.decision] for i, node in enumerate(problem.nodes)}
                plans[f"{trial.name} {trial.mesh}"] = self._written(problem, choice)
        return plans

    def random(self, sizes: tuple[int, ...], seed: int) -> Plan:
        """A plan on free axes of these sizes in which every decision is drawn evenly from its legal options."""
        if sizes not in self._problems:
            mesh = Mesh(tuple("xyz"[: len(sizes)]), sizes)
            self._problems[sizes] = build_problem(self.model, mesh, _cluster(sizes), Constraints((AxisKind.FREE,) * len(sizes)))
        problem = self._problems[sizes]
        choice = draw(problem, random.Random(f"{sizes} {seed}"))
        return self._written(problem, choice)

    def pipelined(self, pipeline_ranks: int, tp: int, schedule: str, recompute: str, microbatches: int = 4) -> Plan:
        """The plan that the search finds for pipeline ranks of `tp` devices, with two stages on each where a schedule has several."""
        pins: dict[str, object] = {"pp": pipeline_ranks, "schedule": schedule, "microbatches": microbatches, "recompute": recompute}
        if tp > 1:
            pins.update(tp=tp, vocabulary=True)
        if schedule == "interleaved":
            pins.update(chunks=2)
        return self.pinned(pins, f"{pipeline_ranks * tp}xcpu")

    def random_pipeline(self, seed: int) -> Plan:
        """A pipeline of which all is drawn: ranks and their mesh, schedule, micro-batches, cuts, recomputation, placements, travel."""
        generator = random.Random(f"pipeline {seed}")
        draws = generator.choice
        axes, fsdp = draws(GROUPS), draws((True, False))
        schedule, pipeline = "", None
        while pipeline is None:
            ranks, microbatches, schedule = draws((1, 2, 2, 3, 4, 4)), draws((1, 2, 4, 4, 8)), draws(tuple(SCHEDULES))
            chunks = SCHEDULES[schedule].chunks or draws((2, 3))
            fitting = ranks * chunks <= len(self.chain.blocks) and ranks * math.prod(size for _, size in axes) <= 8
            fitting = fitting and not self._in_time(microbatches).reasons
            try:
                make_schedule(schedule, ranks, microbatches, chunks)
            except InputError:
                fitting = False
            if fitting and ranks * microbatches > 1:
                pipeline = Pipeline(ranks, schedule, chunks, microbatches, (), {})
        plan = self._drawn_in_time(axes, pipeline.microbatches, fsdp, generator, is_mixed=draws((True, False)))
        blocks = self.chain.blocks
        cuts = sorted(generator.sample(range(1, len(blocks)), pipeline.stages - 1))
        stages = [sum(cut <= number for cut in cuts) for number in range(len(blocks))]
        choices = tuple(BlockChoice(block.name, block.path, stage, draws(RECOMPUTE)) for block, stage in zip(blocks, stages, strict=True))
        crossing = dict.fromkeys(value for block in blocks for value in block.crossing)
        mesh = with_microbatch_axis(plan.mesh, pipeline.microbatches)
        travel = {str(value): self._draw_travel(value, mesh, generator) for value in crossing}
        return dataclasses.replace(plan, pipeline=dataclasses.replace(pipeline, blocks=choices, travel=travel))

    def _in_time(self, microbatches: int) -> MicroSplit:
        """How the graph splits into micro-batches."""
        if microbatches not in self._micro:
            self._micro[microbatches] = split_microbatches(self.graph, self.model.spaces, self.model.roles, microbatches)
        return self._micro[microbatches]

    def _drawn_in_time(
        self, axes: tuple[tuple[str, int], ...], microbatches: int, fsdp: bool, generator: random.Random, *, is_mixed: bool
    ) -> Plan:
        """Placements of one micro-batch on a pipeline rank's mesh; `is_mixed` splits like layers differently, by drawn runs."""
        mesh = Mesh(tuple(name for name, _ in axes) or ("x",), tuple(size for _, size in axes) or (1,))
        key = (axes, microbatches, fsdp)
        if key not in self._timed or is_mixed:
            kinds = tuple(AxisKind(name) if name in ("dp", "tp", "cp") else AxisKind.FREE for name in mesh.names)
            constraints = Constraints((AxisKind.MICROBATCH, *kinds), Pins(fsdp=fsdp))
            folded = self.model.folded
            if is_mixed:
                instances = [instance for layer in folded.layer_groups for instance in layer.instances]
                folded = regroup(folded, {name: number for one in instances for number in [generator.randrange(2)] for name in one})
            model = dataclasses.replace(self.model, folded=folded, micro_split=self._in_time(microbatches))
            problem = build_problem(model, with_microbatch_axis(mesh, microbatches), _cluster(mesh.sizes), constraints)
            if is_mixed:
                return self._written(problem, draw(problem, generator), mesh)
            self._timed[key] = problem
        problem = self._timed[key]
        return self._written(problem, draw(problem, generator), mesh)

    def _draw_travel(self, value: Value, mesh: Mesh, generator: random.Random) -> Layout:
        """A layout in which a value may travel between pipeline ranks, beside what time, the first axis of `mesh`, does to it."""
        shape = self.graph.tensor(value).shape
        states = (REPLICATE, *(shard(dim) for dim in range(len(shape))))
        time = self._in_time(mesh.sizes[0]).states[value]
        ways = [
            one
            for one in itertools.product(states, repeat=len(mesh.sizes) - 1)
            if fits(shape, (time if time.kind is StateKind.SHARD else REPLICATE, *one), mesh)
        ]
        return generator.choice(ways)

    def _written(self, problem: Problem, choice: Mapping[int, int], mesh: Mesh | None = None) -> Plan:
        """A plan of these choices; what the search would predict of it isn't filled in. `mesh` is the problem's, without time."""
        mesh = mesh or problem.mesh
        first = len(problem.mesh.names) - len(mesh.names)
        if mesh not in self._bases:
            axes = dict(zip(mesh.names, mesh.sizes, strict=True))
            self._bases[mesh] = make_plan(self.graph, _cluster(mesh.sizes), mesh=axes)
        sharding = sharding_of(problem, {problem.nodes[i].decision: option for i, option in choice.items()})
        return dataclasses.replace(
            self._bases[mesh],
            placements={name: placement[first:] for name, placement in sharding.placements.items()},
            layouts={name: layout[first:] for name, layout in sharding.layouts.items()},
            outputs=tuple(layout[first:] for layout in sharding.outputs),
        )

    def uses(self, plan: Plan) -> frozenset[str]:
        """What each axis of `plan` really splits: work by role (``tp features``), and stored parameters (``dp storage``).

        Of the ops that hold a model's work, lookups, losses and attention are told apart: ``tp vocabulary``, ``tp heads``.
        """
        found = set()
        for op in self.model.folded.ops:
            if op.kind is OpKind.CALL and self._does_work(op):
                placement = plan.placements[op.name]
                found |= {f"{axis} {use}" for axis, use in zip(plan.mesh.names, self._uses_of(op, placement), strict=True) if use}
            elif op.kind is OpKind.PARAMETER:
                layout = zip(plan.mesh.names, plan.layouts[op.name], strict=True)
                found |= {f"{axis} storage" for axis, state in layout if state.kind is StateKind.SHARD}
        return frozenset(found)

    def _does_work(self, op: Op) -> bool:
        space = self.model.spaces.get(op.name)
        return space is not None and (space.is_contraction or _is_attention(op))

    def _uses_of(self, op: Op, placement: Placement) -> list[str | None]:
        space = self.model.spaces[op.name]
        uses: list[str | None] = []
        for part in placement:
            if not isinstance(part, Split):
                uses.append(None)
            elif part.loop == "v" and space.kernel in ("embedding", "cross_entropy"):
                uses.append("vocabulary")
            elif part.loop in ("h", "g", "r") and _is_attention(op):
                uses.append("heads")
            else:
                role = role_of(self.model.roles.of_loops[op.name], part)
                uses.append("features" if role is Role.FEATURE else role.name.lower())
        return uses


def _is_attention(op: Op) -> bool:
    return op.target.endswith("attention.default")


def _cluster(sizes: tuple[int, ...]) -> Cluster:
    return Cluster.parse(f"{math.prod(sizes)}xcpu")


def draw(problem: Problem, generator: random.Random) -> dict[int, int]:
    """An option per node, drawn evenly, such that no arc is forbidden.

    Only fan-outs forbid anything. Where none of their options fits what was drawn for their readers, the readers are drawn again.
    """
    around: dict[int, list[tuple[int, npt.NDArray[np.bool_]]]] = defaultdict(list)
    for arc in problem.arcs:
        for fan, other, cost in ((arc.a, arc.b, arc.cost), (arc.b, arc.a, arc.cost.T)):
            if problem.nodes[fan].decision.kind is DecisionKind.FAN_OUT:
                around[fan].append((other, cost < FORBIDDEN))
    choice = {i: generator.randrange(len(node.options)) for i, node in enumerate(problem.nodes)}
    stuck = True
    while stuck:
        stuck = False
        for fan, others in around.items():
            allowed = np.ones(len(problem.nodes[fan].options), dtype=bool)
            for other, may in others:
                allowed &= may[:, choice[other]]
            if allowed.any():
                choice[fan] = generator.choice(np.flatnonzero(allowed).tolist())
            else:
                stuck = True
                for other, _ in others:
                    choice[other] = generator.randrange(len(problem.nodes[other].options))
    assert all(arc.cost[choice[arc.a], choice[arc.b]] < FORBIDDEN for arc in problem.arcs)
    return choice
