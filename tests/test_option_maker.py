"""Block options of a small model by hand: bytes and seconds of every block, with and without recomputation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar.capture.export import capture
from autopar.cost_models import Cluster, Link, collective_seconds
from autopar.costs.blocks import cost_block
from autopar.costs.cuts import cost_cut, travel_layout
from autopar.costs.memory import find_memory, recompute_memory
from autopar.costs.solved import SolvedChain
from autopar.costs.tables import CostTables, local_nbytes
from autopar.ir.graph import OpKind, Value
from autopar.ir.layout import Mesh
from autopar.ir.precision import MOMENTS
from autopar.plans.rows import Phase
from autopar.rules.table import find_spaces
from autopar.search.options import AxisKind, Constraints
from autopar.search.pipeline.block_options import BlockOptions
from autopar.search.pipeline.option_maker import BlockOptionMaker
from autopar.search.placement.problem import build_problem, least_bytes, saved_nbytes, sharding_of
from autopar.search.placement.solve import PlacementSolver
from autopar.structure.blocks import find_chain
from autopar.structure.chain_reads import read_chain
from autopar.structure.layers import fold
from autopar.structure.microbatches import split_microbatches
from autopar.structure.model import AnalyzedGraph, find_constants, with_microbatch_axis
from autopar.structure.roles import find_roles

WIDTH, TOKENS, ROWS = 16, 48, 8
CLUSTER = Cluster.parse("2xcpu")
LINK = CLUSTER.link_of(2, 1)
# Of a micro-batch, of two: an activation and the logits. A weight of a layer, and the table.
HIDDEN, LOGITS = 4 * 4 * WIDTH, 4 * 4 * TOKENS
MATRIX, TABLE = 4 * WIDTH * WIDTH, 4 * TOKENS * WIDTH
TRAINED = 2 + MOMENTS


class Layer(nn.Module):
    """A layer that saves its own input, what all layers read, and the result of its tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x)) * skip


class Tied(nn.Module):
    """Three layers that read the table's sines, and the table again as the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table(ids)
        skip = torch.sin(x)
        for layer in self.layers:
            x = layer(x, skip)
        return nn.functional.cross_entropy(self.head(x), labels), x


class Twice(nn.Module):
    """Layers that read their input in two products."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for first, second in self.pairs:
            x = x + torch.tanh(first(x)) * second(x)
        return x.sum()


def make_maker(
    module: nn.Module, *inputs: Tensor, tensor_parallel: bool = False, link: Link = LINK, whole: tuple[str, ...] = ()
) -> BlockOptionMaker:
    """On one rank or two, for two micro-batches, by the fastest solution; the results of the calls in `whole` are on both ranks."""
    graph = capture(module, inputs).graph
    spaces, _ = find_spaces(graph)
    roles = find_roles(graph, spaces)
    model = AnalyzedGraph(fold(graph), spaces, roles, find_constants(graph), split_microbatches(graph, spaces, roles, 2))
    mesh = with_microbatch_axis(Mesh(("tp",), (2,)) if tensor_parallel else Mesh(("dp",), (1,)), 2)
    problem = build_problem(model, mesh, CLUSTER, Constraints((AxisKind.MICROBATCH, AxisKind.TP if tensor_parallel else AxisKind.DP)))
    chain = find_chain(model.folded, spaces)
    sharding = sharding_of(problem, PlacementSolver(problem).solution_at(0.0).choice)
    placements = {name: (placement[0], None) if name in whole else placement for name, placement in sharding.placements.items()}
    sharding = replace(sharding, placements=placements)
    reads = read_chain(graph, spaces, chain)
    return BlockOptionMaker(SolvedChain(model, chain, reads, CostTables(model, mesh, CLUSTER), sharding, is_one_stage=False), link)


def make_tied(frozen: bool = False, **options: Any) -> BlockOptionMaker:
    module = Tied()
    module.table.weight.requires_grad_(not frozen)
    return make_maker(module, torch.arange(ROWS), torch.arange(ROWS), **options)


@pytest.fixture(scope="module")
def maker() -> BlockOptionMaker:
    return make_tied()


@pytest.fixture(scope="module")
def by_name(maker: BlockOptionMaker) -> dict[str, BlockOptions]:
    by_name = {block.name: block for block in maker.make(("none", "full"), True, {})}
    assert list(by_name) == ["table", "layers.0", "layers.1", "layers.2", "head"]
    assert all([option.name for option in block.options] == ["none", "full"] for block in by_name.values())
    return by_name


def test_what_crosses_is_first_read_by_one_block(maker: BlockOptionMaker) -> None:
    assert {str(value): number for value, number in maker.solved.reads.first_reader.items()} == {
        "embedding": 1,
        "sin": 1,
        "add": 2,
        "add_1": 3,
        "add_2": 4,
    }
    assert [len(values) for values in maker.solved.reads.first_read] == [0, 2, 1, 1, 1]


def test_a_value_is_saved_by_the_first_block_that_reads_it(by_name: dict[str, BlockOptions]) -> None:
    # The sine saves the table's rows; a layer its input and its tanh, the first one the sines for all; the loss what it saves itself.
    loss = by_name["head"].options[0].saved - HIDDEN
    assert LOGITS <= loss < LOGITS + 16
    assert [block.options[0].saved for block in by_name.values()] == [HIDDEN, 3 * HIDDEN, 2 * HIDDEN, 2 * HIDDEN, HIDDEN + loss]


def test_a_block_that_is_run_again_saves_its_inputs(by_name: dict[str, BlockOptions]) -> None:
    assert [block.options[1].saved for block in by_name.values()] == [0, 2 * HIDDEN, HIDDEN, HIDDEN, HIDDEN]


def test_a_region_that_is_run_again_saves_its_inputs_and_what_later_calls_save_of_its_results(maker: BlockOptionMaker) -> None:
    block = maker.solved.chain.blocks[1]
    linear, tanh, mul, add = block.ops
    # The product reads the table's rows, the tanh is read by the product of both, which saves it anyway, and the sum saves nothing.
    plain = find_memory(maker.solved, 1)
    assert recompute_memory(maker.solved, 1, plain, ((linear, tanh),)).saved == 3 * HIDDEN
    assert recompute_memory(maker.solved, 1, plain, ((tanh, mul),)).saved == 2 * HIDDEN + HIDDEN
    assert recompute_memory(maker.solved, 1, plain, ((tanh, mul, add),)).saved == 2 * HIDDEN + HIDDEN
    assert recompute_memory(maker.solved, 1, plain, ((linear, tanh, mul, add),)).saved == 2 * HIDDEN


def test_a_stage_holds_what_a_block_before_has_read(by_name: dict[str, BlockOptions]) -> None:
    assert [block.cut.nbytes for block in by_name.values()] == [2 * HIDDEN, 2 * HIDDEN, 2 * HIDDEN, HIDDEN, 0]
    assert [block.cut.saved for block in by_name.values()] == [0, HIDDEN, HIDDEN, 0, 0]


def test_inputs_and_gradients_of_results_wait(by_name: dict[str, BlockOptions]) -> None:
    assert [by_name[name].options[0].waiting for name in ("table", "layers.0")] == [HIDDEN, 2 * HIDDEN]


def test_an_input_that_several_read_waits_once(by_name: dict[str, BlockOptions]) -> None:
    assert [by_name[name].options[0].waiting for name in ("layers.1", "head")] == [2 * HIDDEN, HIDDEN + LOGITS]


def test_stored_bytes_are_parameters_gradients_and_the_optimizers(by_name: dict[str, BlockOptions]) -> None:
    # The head has a copy of the table and its gradient, and makes the loss; the optimizer is where the table is read first.
    stored = [by_name[name].options[0].static for name in ("table", "layers.0", "layers.1", "head")]
    assert stored == [TRAINED * TABLE, TRAINED * MATRIX, TRAINED * MATRIX, 2 * TABLE + 4]
    assert [block.options[0].per_step > 0 for block in by_name.values()] == [True, True, True, True, False]


def test_an_output_counts_where_it_is_made(by_name: dict[str, BlockOptions]) -> None:
    assert by_name["layers.2"].options[0].static == TRAINED * MATRIX + 4 * ROWS * WIDTH


def test_running_again_takes_the_forward_and_room_for_what_it_saves(by_name: dict[str, BlockOptions]) -> None:
    for block in by_name.values():
        none, full = block.options
        assert full.backward_input == pytest.approx(none.forward + none.backward_input)
        assert (full.forward, full.backward_weight, full.per_step, full.static) == (
            none.forward,
            none.backward_weight,
            none.per_step,
            none.static,
        )
    saved = [block.options[1].workspace - block.options[0].workspace for block in by_name.values()]
    loss = by_name["head"].options[0].saved - HIDDEN
    # What a layer saves is as much as two results; one of them takes the place of a gradient that isn't there yet.
    assert saved == [HIDDEN, HIDDEN, HIDDEN, HIDDEN, loss]


def test_weight_gradients_take_half_a_products_backward(maker: BlockOptionMaker, by_name: dict[str, BlockOptions]) -> None:
    joined = maker.make(("none",), False, {})
    for block, joined_block in zip(by_name.values(), joined, strict=True):
        none, whole = block.options[0], joined_block.options[0]
        assert (whole.backward_weight, whole.waiting) == (0.0, 0)
        assert whole.backward_input == pytest.approx(none.backward_input + none.backward_weight)
    # Nothing needs the gradient of a row's number.
    assert [block.options[0].backward_weight > 0 for block in by_name.values()] == [False, True, True, True, True]


def test_the_least_bytes_of_all_ranks_are_those_of_one(maker: BlockOptionMaker) -> None:
    # Of all parameters what is there in the whole step; and the larger of their gradients, and of eight activations of the batch with what
    # the loss saves of it.
    loss = maker.solved.graph.by_name["cross_entropy_loss"].extra_saved_nbytes
    parameters = TABLE + 3 * MATRIX
    least = (TRAINED - 1) * parameters + max(8 * 2 * HIDDEN + loss, parameters)
    assert [least_bytes(maker.solved.model, ranks) for ranks in (1, 4, 1000)] == [least, -(-least // 4), -(-least // 1000)]
    frozen = make_tied(frozen=True)
    assert least_bytes(maker.solved.model, 1) - least_bytes(frozen.solved.model, 1) >= (TRAINED - 2) * TABLE


def test_representatives_save_for_all_that_they_stand_for(maker: BlockOptionMaker) -> None:
    saved = {
        op.name: saved_nbytes(maker.solved.model, op, maker.solved.sharding.placements[op.name], maker.solved.mesh)
        for op in maker.solved.model.folded.ops
        if op.kind is OpKind.CALL
    }
    loss = maker.solved.graph.by_name["cross_entropy_loss"].extra_saved_nbytes // 2
    counts = {"embedding": HIDDEN, "sin": HIDDEN, "tanh": 3 * HIDDEN, "add": 3 * HIDDEN, "cross_entropy_loss": loss}
    assert {name: nbytes for name, nbytes in saved.items() if nbytes} == counts


def test_what_needs_no_gradient_sends_none_back() -> None:
    blocks = make_tied(frozen=True).make(("none",), True, {})
    one, two = (collective_seconds("p2p", count * HIDDEN, 2, LINK) for count in (1, 2))
    # The sines cross to all layers, and need none; neither do the table's rows.
    assert [block.cut.forward for block in blocks] == pytest.approx([two, two, two, one, 0.0])
    assert [block.cut.backward for block in blocks] == pytest.approx([0.0, one, one, one, 0.0])
    assert blocks[0].options[0].static == TABLE


def test_every_crossing_value_has_a_layout_to_travel_in(maker: BlockOptionMaker) -> None:
    assert {Value(name) for name in maker.find_travel_layouts()} == set(maker.solved.reads.first_reader)


def test_copies_that_products_save_count_beside_the_parts() -> None:
    """On two ranks all is split but the input of a layer's product, which is gathered; nothing saves its parts."""
    blocks = make_tied(tensor_parallel=True).make(("none", "full"), True, {})
    part = HIDDEN // 2
    assert [block.options[0].saved for block in blocks[:4]] == [part, 3 * part + HIDDEN, part + HIDDEN, part + HIDDEN]
    assert [block.options[1].saved for block in blocks[:4]] == [0, 2 * part, part, part]
    assert blocks[1].options[0].waiting == HIDDEN + part
    assert [block.cut.saved for block in blocks] == [0, part, part, 0, 0]


def find_block(maker: BlockOptionMaker, call: str) -> int:
    return maker.solved.reads.block_of[call]


def test_what_two_products_need_alike_is_gathered_once() -> None:
    maker = make_maker(Twice(), torch.randn(ROWS, WIDTH), tensor_parallel=True)
    ((_, cost),) = cost_block(maker.solved, find_block(maker, "linear_2"), ["none"])
    gathers = [row for row in cost.rows if row.phase == Phase.FORWARD and row.collective == "all_gather"]
    assert [row.count for row in gathers] == [1]


def test_an_operand_that_is_gathered_for_two_takes_room_once() -> None:
    maker = make_maker(Twice(), torch.randn(ROWS, WIDTH), tensor_parallel=True)
    calls = [maker.solved.graph.by_name[name] for name in ("linear_2", "linear_3")]
    assert len({journey.need for op in calls for journey in maker.solved.journeys(op) if journey.value.op == "add"}) == 1
    # The product of both products has three parts, the gradient of the last and those of both that it makes.
    assert find_memory(maker.solved, find_block(maker, "linear_2")).memory.workspace > 0


def test_rows_add_up_to_what_the_search_sums(by_name: dict[str, BlockOptions]) -> None:
    for block in by_name.values():
        for option in block.options:
            assert option.cost is not None
            seconds, memory = option.cost.seconds, option.cost.memory
            assert (option.forward, option.backward_input) == (seconds[Phase.FORWARD], seconds[Phase.BACKWARD_INPUT])
            assert (option.backward_weight, option.per_step) == (seconds[Phase.BACKWARD_WEIGHT], seconds[Phase.STEP])
            assert sum(row.seconds for row in option.cost.rows) == pytest.approx(sum(seconds.values()))
            assert option.static == memory.parameters + memory.gradients + memory.optimizer + memory.outputs


def test_what_travels_in_parts_is_gathered_where_it_is_read() -> None:
    slow = replace(LINK, bandwidth_bytes_per_s=1000.0)
    maker = make_tied(tensor_parallel=True, link=slow, whole=("add",))
    value = Value("add_1")
    tensor, made, travels = maker.solved.graph.tensor(value), maker.solved.made(value), travel_layout(maker.solved, value, slow)
    assert local_nbytes(tensor, travels, maker.solved.mesh) == local_nbytes(tensor, made, maker.solved.mesh) // 2 == HIDDEN // 2
    blocks = maker.solved.chain.blocks
    chain = replace(maker.solved.chain, blocks=(*blocks[:2], replace(blocks[2], crossing=(value,)), *blocks[3:]))
    solved = maker.solved
    alone = SolvedChain(solved.model, chain, solved.reads, solved.tables, solved.sharding, is_one_stage=False)
    cut = cost_cut(alone, 2, slow)
    there, back = (sum(maker.solved.tables.journey_seconds(tensor, *way, backward=True)) for way in ((made, travels), (travels, made)))
    assert there + back > 0
    assert cut.forward - collective_seconds("p2p", HIDDEN // 2, 2, slow) == pytest.approx((there + back) / 2, rel=1e-3)
