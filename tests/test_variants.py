"""Menus of a small model by hand: bytes and seconds of every block, with and without recomputation."""

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
from autopar.costs.memory import find_memory, recompute_memory, workspace_nbytes
from autopar.costs.solved import SolvedChain
from autopar.costs.tables import OPTIMIZER_COPIES, CostTables, local_nbytes
from autopar.ir.graph import OpKind, Value
from autopar.ir.layout import Mesh
from autopar.plans.rows import Phase
from autopar.rules.table import find_spaces
from autopar.search.options import AxisKind, Constraints
from autopar.search.pipeline.block_options import BlockOptions
from autopar.search.pipeline.variants import BlockOptionMaker, sharding_of
from autopar.search.placement.problem import build_problem, least_bytes, saved_nbytes
from autopar.search.placement.solve import Search
from autopar.structure.blocks import find_chain
from autopar.structure.chain_reads import read_chain
from autopar.structure.layers import fold
from autopar.structure.microbatches import split_microbatches
from autopar.structure.model import Model, find_tables, in_time
from autopar.structure.roles import find_factors

WIDTH, TOKENS, ROWS = 16, 48, 8
CLUSTER = Cluster.parse("2xcpu")
LINK = CLUSTER.link_of(2, 1)
# Of a micro-batch, of two: an activation and the logits. A weight of a layer, and the table.
HIDDEN, LOGITS = 4 * 4 * WIDTH, 4 * 4 * TOKENS
MATRIX, TABLE = 4 * WIDTH * WIDTH, 4 * TOKENS * WIDTH
TRAINED = 2 + OPTIMIZER_COPIES


class Layer(nn.Module):
    """A layer that keeps its own input, what all layers read, and the result of its tanh."""

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


def make_menus(
    module: nn.Module, *inputs: Tensor, tensor_parallel: bool = False, link: Link = LINK, whole: tuple[str, ...] = ()
) -> BlockOptionMaker:
    """On one rank or two, for two micro-batches, by the fastest answer; the results of the calls in `whole` are on both ranks."""
    graph = capture(module, inputs).graph
    spaces, _ = find_spaces(graph)
    factors = find_factors(graph, spaces)
    model = Model(fold(graph), spaces, factors, find_tables(graph), split_microbatches(graph, spaces, factors, 2))
    mesh = in_time(Mesh(("tp",), (2,)) if tensor_parallel else Mesh(("dp",), (1,)), 2)
    problem = build_problem(model, mesh, CLUSTER, Constraints((AxisKind.TIME, AxisKind.TP if tensor_parallel else AxisKind.DP)))
    chain = find_chain(model.folded, spaces)
    sharding = sharding_of(problem, Search(problem).solution_at(0.0).choice)
    placements = {name: (one[0], None) if name in whole else one for name, one in sharding.placements.items()}
    sharding = replace(sharding, placements=placements)
    reads = read_chain(graph, spaces, chain)
    return BlockOptionMaker(SolvedChain(model, chain, reads, CostTables(model, mesh, CLUSTER), sharding, is_one_stage=False), link)


def make_tied(frozen: bool = False, **options: Any) -> BlockOptionMaker:
    module = Tied()
    module.table.weight.requires_grad_(not frozen)
    return make_menus(module, torch.arange(ROWS), torch.arange(ROWS), **options)


@pytest.fixture(scope="module")
def menus() -> BlockOptionMaker:
    return make_tied()


@pytest.fixture(scope="module")
def made(menus: BlockOptionMaker) -> dict[str, BlockOptions]:
    made = {menu.name: menu for menu in menus.make(("none", "full"), True, {})}
    assert list(made) == ["table", "layers.0", "layers.1", "layers.2", "head"]
    assert all([one.name for one in menu.options] == ["none", "full"] for menu in made.values())
    return made


def test_what_crosses_is_first_read_by_one_block(menus: BlockOptionMaker) -> None:
    assert {str(value): number for value, number in menus.solved.reads.first_reader.items()} == {
        "embedding": 1,
        "sin": 1,
        "add": 2,
        "add_1": 3,
        "add_2": 4,
    }
    assert [len(values) for values in menus.solved.reads.first_read] == [0, 2, 1, 1, 1]


def test_a_value_is_kept_by_the_first_block_that_reads_it(made: dict[str, BlockOptions]) -> None:
    # The sine keeps the table's rows; a layer its input and its tanh, the first one the sines for all; the loss what it saves itself.
    loss = made["head"].options[0].kept - HIDDEN
    assert LOGITS <= loss < LOGITS + 16
    assert [menu.options[0].kept for menu in made.values()] == [HIDDEN, 3 * HIDDEN, 2 * HIDDEN, 2 * HIDDEN, HIDDEN + loss]


def test_a_block_that_is_run_again_keeps_what_comes_in(made: dict[str, BlockOptions]) -> None:
    assert [menu.options[1].kept for menu in made.values()] == [0, 2 * HIDDEN, HIDDEN, HIDDEN, HIDDEN]


def test_a_region_that_is_run_again_keeps_what_comes_in_and_what_goes_out(menus: BlockOptionMaker) -> None:
    block = menus.solved.chain.blocks[1]
    linear, tanh, mul, add = block.ops
    # The product reads the table's rows, the tanh is read by the product of both, which keeps it anyway, and the sum keeps nothing.
    plain = find_memory(menus.solved, 1)
    assert recompute_memory(menus.solved, 1, plain, ((linear, tanh),)).saved == 3 * HIDDEN
    assert recompute_memory(menus.solved, 1, plain, ((tanh, mul),)).saved == 2 * HIDDEN + HIDDEN
    assert recompute_memory(menus.solved, 1, plain, ((tanh, mul, add),)).saved == 2 * HIDDEN + HIDDEN
    assert recompute_memory(menus.solved, 1, plain, ((linear, tanh, mul, add),)).saved == 2 * HIDDEN


def test_a_stage_holds_what_a_block_before_has_read(made: dict[str, BlockOptions]) -> None:
    assert [menu.cut.nbytes for menu in made.values()] == [2 * HIDDEN, 2 * HIDDEN, 2 * HIDDEN, HIDDEN, 0]
    assert [menu.cut.kept for menu in made.values()] == [0, HIDDEN, HIDDEN, 0, 0]


def test_inputs_and_gradients_of_results_wait(made: dict[str, BlockOptions]) -> None:
    assert [made[name].options[0].waiting for name in ("table", "layers.0")] == [HIDDEN, 2 * HIDDEN]


def test_an_input_that_several_read_waits_once(made: dict[str, BlockOptions]) -> None:
    assert [made[name].options[0].waiting for name in ("layers.1", "head")] == [2 * HIDDEN, HIDDEN + LOGITS]


def test_stored_bytes_are_parameters_gradients_and_the_optimizers(made: dict[str, BlockOptions]) -> None:
    # The head has a copy of the table and its gradient, and makes the loss; the optimizer is where the table is read first.
    stored = [made[name].options[0].static for name in ("table", "layers.0", "layers.1", "head")]
    assert stored == [TRAINED * TABLE, TRAINED * MATRIX, TRAINED * MATRIX, 2 * TABLE + 4]
    assert [menu.options[0].once > 0 for menu in made.values()] == [True, True, True, True, False]


def test_an_output_counts_where_it_is_made(made: dict[str, BlockOptions]) -> None:
    assert made["layers.2"].options[0].static == TRAINED * MATRIX + 4 * ROWS * WIDTH


def test_running_again_takes_the_forward_and_room_for_what_it_saves(made: dict[str, BlockOptions]) -> None:
    for menu in made.values():
        none, full = menu.options
        assert full.input == pytest.approx(none.forward + none.input)
        assert (full.forward, full.weight, full.once, full.static) == (none.forward, none.weight, none.once, none.static)
    saved = [menu.options[1].workspace - menu.options[0].workspace for menu in made.values()]
    loss = made["head"].options[0].kept - HIDDEN
    assert saved == [2 * HIDDEN, 2 * HIDDEN, 2 * HIDDEN, 2 * HIDDEN, loss]


def test_weight_gradients_take_half_a_products_backward(menus: BlockOptionMaker, made: dict[str, BlockOptions]) -> None:
    whole = menus.make(("none",), False, {})
    for menu, one in zip(made.values(), whole, strict=True):
        none = menu.options[0]
        assert (one.options[0].weight, one.options[0].waiting) == (0.0, 0)
        assert one.options[0].input == pytest.approx(none.input + none.weight)
    # Nothing needs the gradient of a row's number.
    assert [menu.options[0].weight > 0 for menu in made.values()] == [False, True, True, True, True]


def test_the_least_bytes_of_all_ranks_are_those_of_one(menus: BlockOptionMaker) -> None:
    # Eight activations of the batch, what the loss saves of it, and all parameters.
    loss = menus.solved.graph.by_name["cross_entropy_loss"].saved_nbytes
    least = 8 * 2 * HIDDEN + loss + TRAINED * (TABLE + 3 * MATRIX)
    assert [least_bytes(menus.solved.model, ranks) for ranks in (1, 4, 1000)] == [least, -(-least // 4), -(-least // 1000)]
    frozen = make_tied(frozen=True)
    assert least_bytes(menus.solved.model, 1) - least_bytes(frozen.solved.model, 1) >= (TRAINED - 1) * TABLE


def test_ops_that_stand_for_others_keep_for_all(menus: BlockOptionMaker) -> None:
    kept = {
        op.name: saved_nbytes(menus.solved.model, menus.solved.saved, op, menus.solved.sharding.placements[op.name], menus.solved.mesh)
        for op in menus.solved.model.folded.ops
        if op.kind is OpKind.CALL
    }
    loss = menus.solved.graph.by_name["cross_entropy_loss"].saved_nbytes // 2
    counts = {"embedding": HIDDEN, "sin": HIDDEN, "tanh": 3 * HIDDEN, "add": 3 * HIDDEN, "cross_entropy_loss": loss}
    assert {name: nbytes for name, nbytes in kept.items() if nbytes} == counts


def test_what_needs_no_gradient_sends_none_back() -> None:
    menus = make_tied(frozen=True).make(("none",), True, {})
    one, two = (collective_seconds("p2p", count * HIDDEN, 2, LINK) for count in (1, 2))
    # The sines cross to all layers, and need none; neither do the table's rows.
    assert [menu.cut.forward for menu in menus] == pytest.approx([two, two, two, one, 0.0])
    assert [menu.cut.backward for menu in menus] == pytest.approx([0.0, one, one, one, 0.0])
    assert menus[0].options[0].static == TABLE


def test_every_crossing_value_has_a_layout_to_travel_in(menus: BlockOptionMaker) -> None:
    assert {Value(name) for name in menus.travel()} == set(menus.solved.reads.first_reader)


def test_copies_that_products_keep_are_kept_beside_the_parts() -> None:
    """On two ranks all is split but the input of a layer's product, which is gathered."""
    menus = make_tied(tensor_parallel=True).make(("none", "full"), True, {})
    part = HIDDEN // 2
    assert [menu.options[0].kept for menu in menus[:4]] == [part, 3 * part + HIDDEN, 2 * part + HIDDEN, 2 * part + HIDDEN]
    assert [menu.options[1].kept for menu in menus[:4]] == [0, 2 * part, part, part]
    assert menus[1].options[0].waiting == HIDDEN + part
    assert [menu.cut.kept for menu in menus] == [0, part, part, 0, 0]


def find_block(menus: BlockOptionMaker, call: str) -> int:
    return menus.solved.reads.block_of[call]


def test_what_two_products_need_alike_is_gathered_once() -> None:
    menus = make_menus(Twice(), torch.randn(ROWS, WIDTH), tensor_parallel=True)
    ((_, cost),) = cost_block(menus.solved, find_block(menus, "linear_2"), ["none"])
    gathers = [row for row in cost.rows if row.phase == Phase.FORWARD and row.collective == "all_gather"]
    assert [row.count for row in gathers] == [1]


def test_an_operand_that_is_gathered_for_two_takes_room_once() -> None:
    menus = make_menus(Twice(), torch.randn(ROWS, WIDTH), tensor_parallel=True)
    calls = [menus.solved.graph.by_name[name] for name in ("linear_2", "linear_3")]
    assert len({journey.need for op in calls for journey in menus.solved.journeys(op) if journey.value.op == "add"}) == 1
    # A product has its input whole and its part of the result, the product of both products three parts; gradients as much.
    assert workspace_nbytes(menus.solved, find_block(menus, "linear_2")) == 2 * (HIDDEN + HIDDEN // 2)


def test_rows_add_up_to_what_the_search_sums(made: dict[str, BlockOptions]) -> None:
    for block in made.values():
        for option in block.options:
            assert option.cost is not None
            seconds, memory = option.cost.seconds, option.cost.memory
            assert (option.forward, option.input) == (seconds[Phase.FORWARD], seconds[Phase.INPUT])
            assert (option.weight, option.once) == (seconds[Phase.WEIGHT], seconds[Phase.STEP])
            assert sum(row.seconds for row in option.cost.rows) == pytest.approx(sum(seconds.values()))
            assert option.static == memory.parameters + memory.gradients + memory.optimizer + memory.outputs


def test_what_travels_in_parts_is_gathered_where_it_is_read() -> None:
    slow = replace(LINK, bandwidth_bytes_per_s=1000.0)
    menus = make_tied(tensor_parallel=True, link=slow, whole=("add",))
    value = Value("add_1")
    tensor, made, travels = menus.solved.graph.tensor(value), menus.solved.made(value), travel_layout(menus.solved, value, slow)
    assert local_nbytes(tensor, travels, menus.solved.mesh) == local_nbytes(tensor, made, menus.solved.mesh) // 2 == HIDDEN // 2
    blocks = menus.solved.chain.blocks
    chain = replace(menus.solved.chain, blocks=(*blocks[:2], replace(blocks[2], crossing=(value,)), *blocks[3:]))
    solved = menus.solved
    alone = SolvedChain(solved.model, chain, solved.reads, solved.tables, solved.sharding, is_one_stage=False)
    cut = cost_cut(alone, 2, slow)
    there, back = (sum(menus.solved.tables.journey_seconds(tensor, *way, backward=True)) for way in ((made, travels), (travels, made)))
    assert there + back > 0
    assert cut.forward - collective_seconds("p2p", HIDDEN // 2, 2, slow) == pytest.approx((there + back) / 2, rel=1e-3)
