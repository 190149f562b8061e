"""What pipeline configurations are ranked by: placements that they share, estimates, greedy assignments of many micro-batches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import DEEP

from autopar.capture.export import capture
from autopar.cost_models import Cluster
from autopar.costs.cuts import CutCost
from autopar.ir.graph import OpKind
from autopar.ir.layout import StateKind, fits, is_legal
from autopar.plans.pins import NO_PINS, Pins
from autopar.rules.table import find_spaces
from autopar.schedules.families import make_schedule, splits_backward
from autopar.search.meshes import find_pipeline_trials
from autopar.search.pipeline.assignment_problem import evaluate, make_problem
from autopar.search.pipeline.block_options import BlockOption, BlockOptions
from autopar.search.pipeline.configurations import (
    Configuration,
    ScheduleChoice,
    build_schedule,
    estimate_fastest_s,
    estimate_schedule_s,
    find_configurations,
    make_pipeline_problem,
)
from autopar.search.pipeline.estimates import (
    SIMULATED_ROUNDS,
    estimate_from_placements,
    estimate_from_products,
    schedules_of,
    try_first_schedules,
    try_schedule,
)
from autopar.search.pipeline.greedy import assign_greedily
from autopar.search.pipeline.search_state import SearchState
from autopar.structure.blocks import find_chain
from autopar.structure.layers import fold
from autopar.structure.model import AnalyzedGraph, find_constants, with_microbatch_axis
from autopar.structure.roles import find_roles


class Odd(nn.Module):
    """Layers whose parameters six ranks can store in parts, but four can't, under a batch that all can split."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 18), nn.Tanh(), nn.Linear(18, 6)) for _ in range(count))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return nn.functional.cross_entropy(x, labels)


class Shared(nn.Module):
    """Layers that all use one product."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(32, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(torch.tanh(self.shared(x))))
        return nn.functional.cross_entropy(x, labels)


def make_search(
    module: nn.Module, inputs: tuple[Any, ...], cluster: str, memory: int | None = None, pins: Pins | None = None
) -> tuple[SearchState, list[Configuration]]:
    graph = capture(module, inputs).graph
    spaces, _ = find_spaces(graph)
    folded = fold(graph)
    model = AnalyzedGraph(folded, spaces, find_roles(graph, spaces), find_constants(graph))
    found = Cluster.parse(cluster)
    if memory is not None:
        found = found.with_memory(found.machine.device.reserved_bytes + memory)
    problem = make_pipeline_problem(model, find_chain(folded, spaces), found, pins or NO_PINS, returns_loss=True)
    configurations = find_configurations(problem, lambda ranks: find_pipeline_trials(model, found, ranks, NO_PINS, None, {}), alone=True)
    return SearchState(problem, lambda _: None, math.inf), configurations


def odd(cluster: str, rows: int = 48, layers: int = 8, **options: Any) -> tuple[SearchState, list[Configuration]]:
    return make_search(Odd(layers), (torch.randn(rows, 6), torch.randint(0, 6, (rows,))), cluster, **options)


def deep(name: str, cluster: str, **options: Any) -> tuple[SearchState, list[Configuration]]:
    torch.manual_seed(0)
    return make_search(*DEEP[name](), cluster, **options)


@pytest.fixture(scope="module")
def gpt2() -> tuple[SearchState, list[Configuration]]:
    return deep("gpt2_deep", "8xcpu")


@pytest.mark.parametrize("subject", ["gpt2", "odd"])
def test_placements_that_configurations_share_are_legal_for_each(subject: str, gpt2: tuple[SearchState, list[Configuration]]) -> None:
    search, configurations = odd("12xcpu", memory=4000) if subject == "odd" else gpt2
    parameters = [op for op in search.problem.model.folded.ops if op.kind is OpKind.PARAMETER]
    keys, stores_parts = set(), set()
    for configuration in configurations:
        if search.solutions.estimate_work(configuration) is None:
            continue
        keys.add(search.solutions._key(configuration))
        model = search.solutions.model_of_microbatch(configuration.microbatches)
        assert model is not None
        assert model.micro_split is not None
        mesh = with_microbatch_axis(configuration.trial.mesh, configuration.microbatches)
        solutions = search.solutions.solution_sets_alike(configuration)
        assert solutions
        for sharding in (sharding for solution_set in solutions for sharding in solution_set.shardings):
            assert all(placement[0] == model.micro_split.placements[name] for name, placement in sharding.placements.items())
            for name, placement in sharding.placements.items():
                # A configuration with one rank on an axis may share with another that has more: it splits nothing there.
                real = tuple(part if size > 1 else None for part, size in zip(placement, mesh.sizes, strict=True))
                assert name not in model.spaces or is_legal(model.spaces[name], real, mesh), (str(configuration), name)
            for op in parameters:
                assert fits(op.results[0].shape, sharding.layouts[op.name], mesh), (str(configuration), op.name)
                stores_parts.add(any(state.kind is StateKind.SHARD for state in sharding.layouts[op.name]))
    assert len(keys) < len(configurations)
    assert True in stores_parts or subject != "odd"


@pytest.mark.parametrize("name", DEEP)
def test_without_a_pipeline_blocks_come_to_what_the_search_says(name: str) -> None:
    search, configurations = deep(name, "8xcpu")
    checked = 0
    for configuration in configurations:
        if configuration.ranks > 1 or search.solutions.model_of_microbatch(configuration.microbatches) is None:
            continue
        solutions = search.solutions.solution_sets(configuration)[0]
        blocks = search.solutions.block_options(configuration, solutions, False)
        plain = [next(option for option in block.options if option.solution == 0 and option.name == "none") for block in blocks]
        seconds = configuration.microbatches * sum(option.forward + option.backward_input for option in plain) + sum(
            option.per_step for option in plain
        )
        if name == "t5_deep":
            # Its masks are gathered for all layers at once, but a stage gathers for its own: each block is priced as if it were alone.
            assert 0.9999 <= seconds / (solutions.base.cost_ns / 1e9) < 1.5, str(configuration)
        else:
            # Costs of the search are whole nanoseconds.
            assert seconds == pytest.approx(solutions.base.cost_ns / 1e9, rel=1e-4), str(configuration)
        checked += 1
    assert checked > 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_shared_parameter_is_updated_once(ranks: int) -> None:
    search, configurations = make_search(Shared(), (torch.randn(16, 32), torch.randint(0, 32, (16,))), "8xcpu")
    configuration = next(one for one in configurations if (one.ranks, str(one.trial.mesh)) == (ranks, f"dp={8 // ranks}"))
    solutions = search.solutions.solution_sets(configuration)[0]
    plain = [
        block.options[0] for block in search.solutions.block_options(configuration, solutions, False) if block.name.startswith("blocks.")
    ]
    assert len(plain) == 6
    # A matrix and its bias in each block, in the first block twice; what is shared has a value and a gradient on every stage.
    stored = 4 * (32 * 32 + 32)
    shared = 2 * stored if ranks > 1 else 0
    assert [option.static for option in plain] == [8 * stored, *(4 * stored + shared for _ in range(5))]
    assert plain[0].per_step == pytest.approx(2 * plain[1].per_step)


@pytest.mark.parametrize(("name", "cluster"), [("gpt2_deep", "8xcpu"), ("t5_deep", "2x4xH100"), ("bert_deep", "4x1xH100")])
def test_estimates_are_below_all_greedy_assignments(name: str, cluster: str) -> None:
    search, configurations = deep(name, cluster)
    tight = 0
    for configuration in configurations:
        if search.solutions.model_of_microbatch(configuration.microbatches) is None:
            continue
        least, fastest = estimate_from_products(search, configuration), estimate_from_placements(search, configuration)
        tried = [try_schedule(search, configuration, schedule) for schedule in schedules_of(search, configuration)]
        best = min(greedy.estimate_s for greedy in tried if greedy is not None)
        assert least <= fastest * (1 + 1e-9)
        # Of a configuration that shares its placements it isn't known what comes once per step, nor how fast its own links are.
        assert fastest <= 1.01 * best, str(configuration)
        tight += best < 1.5 * fastest
    assert tight > len(configurations) // 4


@pytest.mark.parametrize(("ranks", "count"), [(2, 4), (2, 24), (4, 4), (4, 8), (4, 24), (8, 8), (8, 32)])
def test_no_schedule_of_equal_stages_takes_less_than_estimated(ranks: int, count: int) -> None:
    search, configurations = odd("8xcpu", layers=16)
    configuration = replace(next(one for one in configurations if one.ranks == ranks), microbatches=count)
    estimate, best = estimate_fastest_s(configuration, schedules_of(search, configuration), 3.0), math.inf
    for family, chunks in schedules_of(search, configuration):
        stages = ranks * chunks
        # A forward, the input gradients and the weight gradients take as long as each other.
        each, split = 1.0 / chunks, splits_backward(family)
        option = BlockOption("none", each, each if split else 2 * each, each if split else 0.0, 0.0, 0, 0, 0, 0)
        blocks = [BlockOptions(f"b{stage}", (option,), CutCost(0.0, 0.0, 0)) for stage in range(stages)]
        seconds, _ = evaluate(blocks, make_schedule(family, ranks, count, chunks), range(stages), [0] * stages)
        assert seconds >= estimate_schedule_s(configuration, ScheduleChoice(family, chunks), 3.0) * (1 - 1e-9), (family, chunks)
        best = min(best, seconds)
    assert estimate * (1 - 1e-9) <= best <= 1.2 * estimate


def test_the_estimate_of_equal_stages_bounds_no_others() -> None:
    """The example of the module's text: a first stage that is a little slower than the second."""
    _, configurations = odd("8xcpu")
    configuration = replace(next(one for one in configurations if one.ranks == 2), microbatches=2)

    def take(*seconds: float) -> float:
        options = [BlockOption("none", each / 3, 2 * each / 3, 0.0, 0.0, 0, 0, 0, 0) for each in seconds]
        blocks = [BlockOptions(f"b{stage}", (option,), CutCost(0.0, 0.0, 0)) for stage, option in enumerate(options)]
        return evaluate(blocks, make_schedule("1f1b", 2, 2), range(2), [0, 0])[0]

    assert take(1.0, 1.0) == pytest.approx(estimate_schedule_s(configuration, ScheduleChoice("1f1b", 1), 1.0))
    assert take(1.2, 0.8) == pytest.approx(2.8)


@pytest.mark.parametrize("family", ["1f1b", "interleaved", "zb-v"])
def test_a_greedy_assignment_of_many_micro_batches_takes_what_its_simulation_takes(family: str) -> None:
    search, configurations = odd("4xcpu")
    configuration = next(one for one in configurations if one.ranks == 2)
    configuration = replace(configuration, microbatches=6 * SIMULATED_ROUNDS * configuration.ranks)
    (choice,) = (choice for choice in schedules_of(search, configuration) if choice.family == family and choice.chunks <= 2)
    found = try_schedule(search, configuration, choice)
    assert found is not None
    seconds = []
    for solutions in search.solutions.solution_sets_alike(configuration):
        blocks = search.solutions.block_options(configuration, solutions, splits_backward(family))
        schedule = build_schedule(search.problem, choice, configuration.ranks, configuration.microbatches)
        problem = make_problem(blocks, schedule, search.solutions.budget)
        seconds += [evaluate(blocks, schedule, stages, options)[0] for stages, options in assign_greedily(problem)]
    assert found.estimate_s == pytest.approx(min(seconds), rel=0.02)
    assert found.estimate_s < 0.98 * max(seconds) or max(seconds) == pytest.approx(min(seconds))


def test_inputs_and_buffers_are_on_every_rank(gpt2: tuple[SearchState, list[Configuration]]) -> None:
    search, _ = gpt2
    graph = search.problem.model.folded.graph
    stored = sum(op.results[0].nbytes for kind in (OpKind.INPUT, OpKind.BUFFER) for op in graph.of_kind(kind))
    assert stored > 0
    assert search.problem.cluster.machine.device.usable_bytes - search.solutions.budget == stored


def test_lean_solutions_are_leaner_than_fast_ones_and_slower() -> None:
    search, configurations = deep("llama_deep", "8xcpu")
    found = [[solutions.base for solutions in search.solutions.solution_sets(configuration)] for configuration in configurations]
    pairs = [pair for pair in found if len(pair) > 1]  # where what blocks share is the same in a lean solution, there is one set
    assert pairs
    assert all(fast.cost_ns <= lean.cost_ns and fast.nbytes > lean.nbytes for fast, lean in pairs)
    assert any(fast.cost_ns < lean.cost_ns for fast, lean in pairs)


def test_stages_are_searched_with_the_placements_of_their_own_configuration() -> None:
    search, configurations = odd("12xcpu", memory=4000)
    for configuration in configurations:
        search.solutions.estimate_work(configuration)
    shared = []
    for configuration in configurations:
        placed = search.solutions._searches[search.solutions._key(configuration)]
        assert placed is not None
        if placed.configuration is not configuration:
            shared.append(configuration)
    assert shared
    for configuration in shared:
        alone, _ = odd("12xcpu", memory=4000)
        found, own = ([solutions.base.cost_ns for solutions in each.solutions.solution_sets(configuration)] for each in (search, alone))
        assert found == own, str(configuration)


def test_where_the_first_schedule_needs_too_much_the_leanest_ranks_a_configuration() -> None:
    large: dict[str, Any] = {"rows": 1024, "layers": 16, "pins": Pins(recompute="none")}
    search, configurations = odd("8xcpu", **large)
    configuration = replace(next(one for one in configurations if one.ranks == 8), microbatches=16)
    wide, lean = (try_schedule(search, configuration, ScheduleChoice(*choice)) for choice in (("1f1b", 1), ("v-half", 2)))
    assert wide is not None
    assert lean is not None
    assert lean.nbytes < wide.nbytes
    search, _ = odd("8xcpu", **large, memory=(lean.nbytes + wide.nbytes) // 2)
    first = try_first_schedules(search, configuration)
    assert first is not None
    assert first.schedule.family == "v-half"
    assert not search.leanest_bytes
