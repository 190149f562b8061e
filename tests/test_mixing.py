"""Blocks that are alike and split differently: costs of a mixture, its plan, the program that comes of it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from autopar.capture.export import capture
from autopar.checks.verification import prepare_reference, verify_against
from autopar.cost_models import Cluster
from autopar.costs.solved import Sharding, SolvedChain
from autopar.costs.tables import CostTables
from autopar.ir.graph import Graph, OpKind, Value
from autopar.ir.layout import Mesh
from autopar.plans.plan import Plan, from_json, to_json
from autopar.rewrite.emit import rewrite
from autopar.rules.table import find_spaces
from autopar.search.options import AxisKind, Constraints
from autopar.search.pipeline.mixing import find_compatible_options, join_block_options, mix_solutions
from autopar.search.pipeline.option_maker import BlockOptionMaker
from autopar.search.placement.problem import build_problem, restrict, sharding_of
from autopar.search.placement.solve import PlacementSolver
from autopar.structure.blocks import find_chain, relabel
from autopar.structure.chain_reads import read_chain
from autopar.structure.layers import fold, fold_as_planned, regroup
from autopar.structure.microbatches import split_microbatches
from autopar.structure.model import AnalyzedGraph, find_constants, with_microbatch_axis
from autopar.structure.roles import find_roles
from tests.planning import make_plan
from tests.zoo import DEEP

# Of models that are so small, the gathers that are in flight would take the memory that mixing saves.
TINY: Mapping[str, object] = {"dp": 4, "recompute": "none", "prefetch": 0}
PIPELINE: Mapping[str, object] = {"pp": 2, "dp": 2, "recompute": "none", "prefetch": 0, "microbatches": 2, "schedule": "1f1b"}


def _graph(name: str) -> Graph:
    torch.manual_seed(0)
    return capture(*DEEP[name]()).graph


def _cramped(graph: Graph, share: float, pins: Mapping[str, object]) -> Plan:
    """A plan with this share of the memory that the fastest takes."""
    cluster = Cluster.parse("4xcpu")
    reserved = cluster.machine.device.reserved_bytes
    fastest = make_plan(graph, cluster, pins=pins).memory.total - reserved
    return make_plan(graph, cluster.with_memory(int(share * fastest) + reserved), pins=pins)


def _mixed(graph: Graph, plan: Plan) -> list[str]:
    """The runs of layers that a plan splits differently."""
    assert set(plan.placements) - set(fold(graph).representative.values())
    return [group.name for group in plan.groups if "[" in group.name]


class _Subject:
    """Solutions for a model on dp=2 x tp=2 that agree on what blocks share."""

    def __init__(self, name: str) -> None:
        graph = _graph(name)
        spaces, _ = find_spaces(graph)
        roles = find_roles(graph, spaces)
        micro_split = split_microbatches(graph, spaces, roles, 2)
        self.cluster = Cluster.parse("8xcpu")
        self.model = AnalyzedGraph(fold(graph), spaces, roles, find_constants(graph), micro_split)
        self.chain = find_chain(self.model.folded, spaces)
        self.mesh = with_microbatch_axis(Mesh(("dp", "tp"), (2, 2)), 2)
        self.reads = read_chain(graph, spaces, self.chain)
        problem = build_problem(self.model, self.mesh, self.cluster, Constraints((AxisKind.MICROBATCH, AxisKind.DP, AxisKind.TP)))
        search = PlacementSolver(problem)
        compatible = find_compatible_options(self.model, self.reads, problem, search.solution_at(0.0).choice)
        self.inner = restrict(problem, compatible)
        highest = 1000 * search.bound_ns / search.solution_at(0.0).nbytes
        self.shardings = [sharding_of(self.inner, solution.choice) for solution in PlacementSolver(self.inner).frontier(highest, 5)]

    def option_maker(self, model: AnalyzedGraph, sharding: Sharding, number: int = 0) -> BlockOptionMaker:
        chain = relabel(self.chain, model.folded)
        tables = CostTables(model, self.mesh, self.cluster)
        solved = SolvedChain(model, chain, self.reads, tables, sharding, is_one_stage=False)
        return BlockOptionMaker(solved, self.cluster.link_of(2, 1), number)


@pytest.mark.parametrize("name", DEEP)
def test_what_a_block_costs_depends_on_its_own_solution_alone(name: str) -> None:
    subject = _Subject(name)
    assert len(subject.shardings) > 2
    recompute = ("none", "selective", "full")
    makers = [subject.option_maker(subject.model, sharding, number) for number, sharding in enumerate(subject.shardings)]
    blocks = join_block_options([maker.make(recompute, True, {}) for maker in makers])
    generator = random.Random(name)
    for _ in range(3):
        numbers = [generator.randrange(len(subject.shardings)) for _ in blocks]
        model, sharding = mix_solutions(subject.model, subject.reads, subject.shardings, numbers)
        alone = subject.option_maker(model, sharding).make(recompute, True, {})
        for number, block, block_alone in zip(numbers, blocks, alone, strict=True):
            assert block.cut == block_alone.cut
            options = tuple(replace(option, solution=0) for option in block.options if option.solution == number)
            assert options == block_alone.options, block.name


@pytest.mark.parametrize("name", DEEP)
def test_solutions_agree_on_what_blocks_share(name: str) -> None:
    subject = _Subject(name)
    graph, folded, block_of = subject.model.folded.graph, subject.model.folded, subject.reads.block_of
    makers = [subject.option_maker(subject.model, sharding) for sharding in subject.shardings]
    first = subject.shardings[0]
    for sharding, maker in zip(subject.shardings, makers, strict=True):
        for op in graph.ops:
            name_of = folded.representative[op.name]
            readers = {block_of.get(reader) for reader in graph.readers.get(Value(op.name), ())}
            if op.kind is OpKind.CALL and op.name not in block_of:
                assert sharding.placements[name_of] == first.placements[name_of], op.name
            if op.kind is OpKind.PARAMETER and len(readers) > 1:
                assert sharding.layouts[name_of] == first.layouts[name_of], op.name
            for value in op.operands:
                # An output is the affair of the block that makes it.
                if (
                    block_of.get(op.name) != block_of.get(value.op)
                    and OpKind.OUTPUT is not op.kind
                    and graph.by_name[value.op].kind is OpKind.CALL
                ):
                    assert maker.solved.made(value) == makers[0].solved.made(value), str(value)


@pytest.mark.parametrize("name", DEEP)
def test_a_plan_says_by_its_ops_which_layers_it_splits_alike(name: str) -> None:
    folded = fold(_graph(name))
    generator = random.Random(name)
    instances = [instance for layer in folded.layer_groups for instance in layer.instances]
    mixed = regroup(folded, {op: number for one in instances for number in [generator.randrange(3)] for op in one})
    again = fold_as_planned(folded, set(mixed.representative.values()))
    assert again.representative == mixed.representative
    assert again.layer_groups == mixed.layer_groups
    assert fold_as_planned(folded, set(folded.representative.values())) == folded
    assert sum(mixed.count.values()) == sum(folded.count.values()) == len(folded.graph.ops)


def test_runs_of_layers_are_named_and_counted() -> None:
    folded = fold(_graph("gpt2_deep"))
    (layer,) = (one for one in folded.layer_groups if len(one.instances) == 6)
    groups = (0, 0, 1, 1, 1, 0)
    mixed = regroup(folded, {op: group for group, one in zip(groups, layer.instances, strict=True) for op in one})
    found = [(one.name, len(one.instances)) for one in mixed.layer_groups if one.name.startswith(layer.name)]
    assert found == [(f"{layer.name}[0-1]", 2), (f"{layer.name}[2-4]", 3), (f"{layer.name}[5]", 1)]


def test_layers_that_differ_in_any_op_are_apart() -> None:
    folded = fold(_graph("gpt2_deep"))
    (layer,) = (one for one in folded.layer_groups if len(one.instances) == 6)
    mixed = regroup(folded, {layer.instances[2][-1]: 1})
    found = [one.name for one in mixed.layer_groups if one.name.startswith(layer.name)]
    assert found == [f"{layer.name}[0-1]", f"{layer.name}[2]", f"{layer.name}[3-5]"]


@pytest.mark.parametrize(
    ("name", "pins", "share"),
    [
        ("gpt2_deep", TINY, 0.75),
        ("llama_tied", TINY, 0.8),
        ("bert_deep", TINY, 0.75),
        ("gpt2_deep", PIPELINE, 0.65),
        ("llama_tied", PIPELINE, 0.7),
        ("t5_deep", PIPELINE, 0.75),
    ],
)
def test_little_memory_mixes_placements_and_the_plan_is_exact(name: str, pins: Mapping[str, object], share: float) -> None:
    model, inputs = DEEP[name]()
    reference = prepare_reference(model, inputs, capture(model, inputs))
    plan = _cramped(reference.captured.graph, share, pins)
    assert _mixed(reference.captured.graph, plan)
    assert plan.memory.total <= plan.memory.budget
    verify_against(reference, plan).check()


def test_a_mixture_is_faster_than_one_placement_for_all() -> None:
    graph = _graph("gpt2_deep")
    plan = _cramped(graph, 0.75, TINY)
    assert len(_mixed(graph, plan)) > 1
    cluster = Cluster.parse("4xcpu").with_memory(plan.memory.budget)
    # A given mesh is searched with one placement for like layers.
    assert plan.seconds.step < make_plan(graph, cluster, mesh={"dp": 4}, pins={"prefetch": 0}).seconds.step


def test_a_mixed_plan_survives_its_file() -> None:
    captured = capture(*DEEP["gpt2_deep"]())
    plan = _cramped(captured.graph, 0.65, PIPELINE)
    again = from_json(to_json(plan))
    assert again == plan
    layouts = {slot.name: slot.layout for slot in rewrite(captured, again).parameters}
    kinds = [{layout for name, layout in layouts.items() if f".h.{block}." in name} for block in range(6)]
    assert len({frozenset(one) for one in kinds}) > 1


def test_a_later_program_keeps_every_layers_own_storage() -> None:
    model, inputs = DEEP["gpt2_deep"]()
    captured = capture(model, inputs)
    first = _cramped(captured.graph, 0.85, PIPELINE)
    stored = {slot.name: slot.layout for slot in rewrite(captured, first).parameters}
    shorter = {name: x[:4] for name, x in inputs.items()}
    later = prepare_reference(model, shorter, capture(model, shorter))
    mesh = dict(zip(first.mesh.names, first.mesh.sizes, strict=True))
    cluster = Cluster.parse("4xcpu")
    plan = make_plan(later.captured.graph, cluster, mesh=mesh, stored=stored, first_plan=first)
    assert {slot.name: slot.layout for slot in rewrite(later.captured, plan).parameters} == stored
    verify_against(later, plan).check()
