"""Models at the edges: parameters that are returned, buffers that are written, lists of layers, tiny meshes, pins in conflict."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autopar.capture.export import capture
from autopar.checks.verification import verify_plan
from autopar.cost_models import Cluster
from autopar.errors import InputError
from autopar.ir.layout import REPLICATE, Mesh, StateKind
from autopar.ops import collectives
from autopar.plans.fits import fingerprint
from autopar.rewrite.emit import rewrite
from autopar.search.placement.eliminate import eliminate
from autopar.search.placement.problem import Arc, Decision, DecisionKind, Node, Problem
from autopar.search.placement.solve import PlacementSolver, evaluate
from autopar.structure.layers import fold
from tests.planning import make_plan


class ReturnsItsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.out(x @ self.weight), self.weight


class Remembers(nn.Module):
    """Writes a mean over the batch and the whole of its activations to buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("last", torch.zeros(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(x)
        self.mean.copy_(y.detach().mean(0))
        self.last.copy_(y.detach())
        return y.sum()


class Tied(nn.Module):
    """A look-up table that is the last layer's weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(16, 8), nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.linear(self.mix(self.table(tokens)).relu(), self.table.weight)


class Shared(nn.Module):
    """Layers of their own that hold one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        for layer in self.layers:
            layer.weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


class Untouched(nn.Module):
    """A parameter that nothing reads, and one without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.unused, self.empty = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.zeros(0, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.out(x), self.empty])


class WithoutBatch(nn.Module):
    """A product in which no loop is of a batch, a sequence or a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("basis", torch.randn(1, 64, 64))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.basis) * self.scale


def rows(*shape: int) -> tuple[Tensor]:
    return (torch.randn(*shape, dtype=torch.float64),)


CASES: Mapping[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
    "returned parameter": (ReturnsItsWeight(), rows(4, 8)),
    "written buffers": (Remembers(), rows(4, 8)),
    "list of layers": (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)), rows(4, 8)),
    "tied": (Tied(), (torch.randint(0, 16, (4, 4)),)),
    "shared by layers": (Shared(), rows(4, 8)),
    "untouched": (Untouched(), rows(4, 8)),
    "without batch": (WithoutBatch(), rows(1, 64, 64)),
    "scalar": (WithoutBatch(), rows(64, 64)),
    "nothing divides": (nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 9)), rows(4, 7)),
}
PINS: Mapping[str, dict[str, object]] = {
    "free": {},
    "dp": {"dp": 4, "fsdp": False},
    "fsdp": {"dp": 4, "fsdp": True},
    "tp": {"tp": 4},
    "both": {"dp": 2, "tp": 2, "fsdp": True},
}


@pytest.mark.parametrize("pins", PINS)
@pytest.mark.parametrize("name", CASES)
def test_every_plan_computes_what_the_model_does(name: str, pins: str) -> None:
    model, inputs = CASES[name]
    model = model.double()
    if "dp" in PINS[pins] and inputs[0].shape[0] == 1:
        with pytest.raises(InputError, match="doesn't divide"):
            make_plan(capture(model, inputs).graph, Cluster.parse("4xcpu"), pins=PINS[pins])
        return
    plan = make_plan(capture(model, inputs).graph, Cluster.parse("4xcpu"), pins=PINS[pins])
    verify_plan(model, inputs, plan).check()
    if name == "nothing divides" and PINS[pins].get("fsdp"):
        assert {str(state) for layout in plan.layouts.values() for state in layout} >= {"S0p"}


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_few_and_odd_ranks(ranks: int) -> None:
    model, inputs = nn.Sequential(nn.Linear(15, 30), nn.ReLU(), nn.Linear(30, 15)).double(), rows(30, 15)
    plan = make_plan(capture(model, inputs).graph, Cluster.parse(f"{ranks}xcpu"))
    assert plan.mesh.world_size == ranks
    verify_plan(model, inputs, plan).check()


def test_an_axis_of_one_rank_splits_nothing() -> None:
    graph = capture(*CASES["tied"]).graph
    plan = make_plan(graph, Cluster.parse("4xcpu"), mesh={"x": 1, "y": 4})
    assert {layout[0] for layout in plan.layouts.values()} <= {REPLICATE}
    assert {placement[0] for placement in plan.placements.values()} == {None}


def test_a_pinned_axis_keeps_its_name_and_its_kind() -> None:
    graph = capture(*CASES["list of layers"]).graph
    assert "tp" in make_plan(graph, Cluster.parse("4xcpu"), pins={"tp": 2}).mesh.names
    with pytest.raises(InputError, match=r"fsdp=True .* mesh tp=4 are pinned to other kinds"):
        make_plan(graph, Cluster.parse("4xcpu"), pins={"tp": 4, "fsdp": True})
    whole = make_plan(graph, Cluster.parse("4xcpu"), pins={"tp": 4, "fsdp": False})
    assert whole.mesh == Mesh(("tp",), (4,))


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"tp": 4, "*.nothing": {"tp": "o"}}, r"matches no module that holds work; there are 0, 1, 2"),
        ({"tp": 4, "1": {"tp": "o"}}, r"takes one of '0' and '1', which are alike and planned as one; pin all of such layers"),
        ({"tp": 4, "*": {"tp": "z"}}, r"splits loop z; the ops of its modules have i, n, o"),
        ({"tp": 3, "*": {"tp": "o"}}, r"over tp=3, but aten.linear.default .* o has size 8\) at .* can't be split so"),
    ],
)
def test_pins_of_modules_are_had_or_refused(pins: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_plan(capture(*CASES["list of layers"]).graph, Cluster.parse("12xcpu" if pins["tp"] == 3 else "4xcpu"), pins=pins)


@pytest.mark.parametrize("sizes", [{"dp": -2, "tp": -2}, {"dp": 4.0}, {"dp": True, "tp": 4}])
def test_sizes_of_axes_are_numbers_from_one(sizes: dict[str, int]) -> None:
    with pytest.raises(InputError, match="sizes are integers from 1"):
        make_plan(capture(*CASES["tied"]).graph, Cluster.parse("4xcpu"), mesh=sizes)


class Soft(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.out = dim, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x).softmax(self.dim)


def test_a_fingerprint_tells_arguments_apart() -> None:
    first, second, again = (capture(Soft(dim).double(), rows(8, 8)).graph for dim in (0, 1, 0))
    assert fingerprint(first) == fingerprint(again) != fingerprint(second)


def test_a_gathered_parameter_is_not_held_between_its_uses() -> None:
    model, inputs = CASES["tied"]
    plan = make_plan(capture(model.double(), inputs).graph, Cluster.parse("4xcpu"), pins={"dp": 4, "fsdp": True})
    table = next(name for name in plan.layouts if name.endswith("table_weight"))
    assert plan.layouts[table][0].kind is StateKind.SHARD
    program = rewrite(capture(model, inputs), plan)
    placeholder = next(node for node in program.module.graph.nodes if node.name == table)  # type: ignore[union-attr]
    gathers = [node for node in placeholder.users if node.target is collectives.all_gather]
    assert len(gathers) == 2
    assert all(len(gather.users) == 1 for gather in gathers)


def test_layers_that_keep_more_than_the_first_are_counted() -> None:
    class Uneven(nn.Module):
        """Both layers are alike inside, but only what the second makes is kept, by the product after it."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x: Tensor) -> Tensor:
            a, b = (layer(x) for layer in self.layers)
            return a.sum() + b.exp().sum() + b.square().sum()

    graph = capture(Uneven(), (torch.randn(4, 8),)).graph
    assert [len(layer.instances) for layer in fold(graph).layer_groups] == [2]
    # Kept: the second layer's result and its exponentials.
    assert make_plan(graph, Cluster.parse("1xcpu")).memory.activations >= 2 * 4 * 8 * 4


def test_bounds_hold_when_bytes_have_a_price() -> None:
    nodes = tuple(Node(Decision(DecisionKind.CALL, f"n{i}"), ((None,), (None,)), np.array([1, 1]), np.array([1, 1])) for i in range(40))
    problem = Problem(
        nodes,
        tuple(Arc(i, i + 1, np.ones((2, 2), np.int64), np.ones((2, 2), np.int64)) for i in range(39)),
        Mesh(("x",), (2,)),
    )
    cost, nbytes = evaluate(problem, dict.fromkeys(range(40), 0))
    for price in (0.5, 0.6, 0.9):
        core = eliminate(problem.nodes, problem.arcs, price)
        assert sum(int(left.weight.min()) for left in core.nodes.values()) <= cost + price * nbytes
    assert PlacementSolver(problem).fit(nbytes) is not None


PLAN = """
import torch
from torch import nn
from autopar.capture import capture
from autopar.cost_models import Cluster
from autopar.search import make_plan
from autopar.plans import to_json
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.LayerNorm(256), nn.Linear(256, 64))
plan = make_plan(capture(model, (torch.randn(8, 64),)).graph, Cluster.parse("4xcpu"))
print(to_json(plan))
"""


def test_the_hash_seed_changes_nothing() -> None:
    texts = []
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", PLAN], env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
        )
        texts.append(done.stdout)
    assert texts[0] == texts[1]
    assert '"placements"' in texts[0]
