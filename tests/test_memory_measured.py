"""The peak memory that plans predict against every allocation of a process that trains."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar.ops.gathers import Forward
from tests.benchmarks.memory import Case, measure, trace
from tests.processes import Outcomes, run_cases

ROWS, WIDTH, WORDS = 128, 64, 512
# Beside what plans count: four bytes of an optimizer's counter per parameter, a loss, a gradient of it.
SCALARS = 1000


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """A loss of words; the head may be the table of words."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return torch.nn.functional.cross_entropy(self.head(x), labels)


def make(tied: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    ids = torch.randint(WORDS, (ROWS,), generator=torch.Generator().manual_seed(0))
    return Model(tied), {"ids": ids, "labels": ids}


def check(ranks: int, pins: dict[str, Any], most: float, tied: bool = False, precision: str | None = None) -> None:
    measured = measure(Case("", partial(make, tied), ranks, pins, precision))
    assert measured.total + SCALARS >= measured.peak, (measured.total, measured.peak, measured.living[:20])
    assert measured.total <= most * measured.peak, (measured.total, measured.peak, measured.living[:20])


def test_allocations_are_counted_to_the_byte() -> None:
    with torch.random.fork_rng():

        def run() -> None:
            with torch.profiler.record_function("step backward"):
                weight = torch.zeros(100, 100, requires_grad=True)  # 40,000 bytes
                x = torch.zeros(200, 100)  # 80,000
                y = x @ weight  # 80,000
                y.backward(torch.ones_like(y))  # 80,000, and the gradient of the weight

        seen = trace(run)
    assert 0 <= seen.peak("backward") - (40_000 + 80_000 + 80_000 + 80_000 + 40_000) < 100


@pytest.mark.parametrize(
    ("pins", "most", "tied", "precision"),
    [
        ({}, 1.05, False, None),
        ({"recompute": "full"}, 1.05, True, None),
        # Under a schedule blocks are taken to hold most at the same time.
        ({"microbatches": 4}, 1.1, True, None),
        ({}, 1.05, False, "mixed"),
    ],
)
def test_one_rank(pins: dict[str, Any], most: float, tied: bool, precision: str | None) -> None:
    check(1, pins, most, tied, precision)


# --- two processes, each case in both ---


def data_parallel() -> None:
    check(2, {"dp": 2, "zero": 0}, 1.05)


def zero_3() -> None:
    # Gathers of two blocks are counted as if all of both were in flight at once.
    check(2, {"dp": 2, "zero": 3}, 1.15)


def tensor_parallel() -> None:
    check(2, {"tp": 2}, 1.05)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_cases(tmp_path_factory.mktemp("ranks"), [data_parallel, zero_3, tensor_parallel])


@pytest.mark.parametrize("name", ["data_parallel", "zero_3", "tensor_parallel"])
def test_two_ranks(name: str, outcomes: Outcomes) -> None:
    outcomes.check(name)


def test_sums_that_are_behind_are_waited_for_when_a_backward_comes_to_a_block() -> None:
    reached: list[tuple[int, int]] = []

    class Sink:
        def takes(self) -> bool:
            return True

        def reach(self, block: int, ahead: int) -> None:
            reached.append((block, ahead))

        def receive(self, *_: Any) -> None:
            raise AssertionError("nothing is sent here")

    class Read(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, forward: Forward, block: int) -> Tensor:
            ctx.forward_of, ctx.block = forward, block
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            ctx.forward_of.reach(ctx.block)
            return grads[0], None, None

    forward = Forward(1)
    for block in range(3):
        forward._sinks[block] = Sink()
    x = torch.ones(1, requires_grad=True)
    y = x
    for block in (0, 1, 2, 2):
        y = Read.apply(y, forward, block)
    y.sum().backward()
    assert reached == [(2, 1), (1, 1), (0, 1)]
