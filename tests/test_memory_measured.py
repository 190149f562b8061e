"""The peak memory that plans predict against every allocation of a process that trains."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import autopar
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


class Attending(nn.Module):
    """Attention with dropout, for which torch has no fused kernel on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        return self.out(attended.transpose(1, 2).flatten(2)).square().mean()


class Biased(nn.Module):
    """Layers that all add one value, whose gradient passes through the backward of each."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.layers = nn.Linear(WIDTH, WIDTH), nn.ModuleList(Layer() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.tanh(self.bias(x))
        for layer in self.layers:
            x = layer(x + bias)
        return x.square().mean()


class Wide(nn.Module):
    """Parameters that are much more than activations: the update needs most."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)), nn.Linear(WIDTH, 4096, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x).square().mean()


def make_attending() -> tuple[nn.Module, dict[str, Tensor]]:
    return Attending(), {"x": torch.randn(4, 64, WIDTH)}


def make_biased() -> tuple[nn.Module, dict[str, Tensor]]:
    return Biased(), {"x": torch.randn(512, WIDTH)}


def make_wide() -> tuple[nn.Module, dict[str, Tensor]]:
    return Wide(), {"x": torch.randn(8, WIDTH)}


def make_wide_in_bfloat16() -> tuple[nn.Module, dict[str, Tensor]]:
    return Wide(), {"x": torch.randn(8, WIDTH, dtype=torch.bfloat16)}


def make(tied: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    ids = torch.randint(WORDS, (ROWS,), generator=torch.Generator().manual_seed(0))
    return Model(tied), {"ids": ids, "labels": ids}


def _in_float32(made: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    model, batch = made()
    return model.to(torch.float32), batch


def check(ranks: int, pins: dict[str, Any], most: float, tied: bool = False, precision: str | None = None, made: Any = None) -> None:
    made = made or partial(make, tied)
    if precision == "mixed":
        made = partial(_in_float32, made)
    measured = measure(Case("", made, ranks, pins, precision))
    peaks: list[Any] = [measured.peak] * ranks
    if ranks > 1:
        dist.all_gather_object(peaks, measured.peak)
    # What is predicted is that of the fullest rank.
    assert measured.total + SCALARS >= max(peaks), (measured.total, peaks, measured.living[:20])
    assert measured.total <= most * max(peaks), (measured.total, peaks, measured.living[:20])


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
        ({"microbatches": 4}, 1.05, True, None),
        ({"microbatches": 4, "schedule": "gpipe"}, 1.05, False, None),
        ({}, 1.05, False, "mixed"),
    ],
)
def test_one_rank(pins: dict[str, Any], most: float, tied: bool, precision: str | None) -> None:
    check(1, pins, most, tied, precision)


@pytest.mark.parametrize(
    ("made", "pins", "most", "precision"),
    [
        (make_attending, {}, 1.05, None),
        (make_biased, {"recompute": "full"}, 1.05, None),
        (make_wide, {}, 1.01, None),
        (make_wide_in_bfloat16, {}, 1.01, "bfloat16"),
    ],
)
def test_what_needs_most(made: Any, pins: dict[str, Any], most: float, precision: str | None) -> None:
    check(1, pins, most, precision=precision, made=made)


def test_a_gpu_has_a_fused_kernel_for_attention_with_dropout() -> None:
    model, batch = make_attending()
    clusters = ("1xcpu", "1xa100")
    dropped = [autopar.plan(model.train(), batch, cluster).memory for cluster in clusters]
    kept = [autopar.plan(model.eval(), batch, cluster).memory for cluster in clusters]
    scores = 4 * 4 * 64 * 64 * 4  # batch, heads, queries, keys, bytes
    assert dropped[1].activations == kept[1].activations
    assert dropped[0].activations > kept[0].activations + 2 * scores


# --- two processes, each case in both ---


def data_parallel() -> None:
    check(2, {"dp": 2, "zero": 0}, 1.05)


def zero_3() -> None:
    # Gathers of two blocks are counted as if all of both were in flight at once.
    check(2, {"dp": 2, "zero": 3}, 1.15)


def zero_2() -> None:
    # The last bucket is the peak: of its gradients, what is summed, and then of the parts that come.
    check(2, {"dp": 2, "zero": 2}, 1.05)
    check(2, {"dp": 2, "zero": 2, "recompute": "full"}, 1.05, tied=True)


def tensor_parallel() -> None:
    check(2, {"tp": 2}, 1.05)
    # The copies of parameters in bfloat16 are there through the whole forward, which needs most.
    check(2, {"tp": 2}, 1.05, precision="mixed")


def pipelined() -> None:
    check(2, {"pp": 2, "schedule": "gpipe", "microbatches": 4}, 1.05)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_cases(tmp_path_factory.mktemp("ranks"), [data_parallel, zero_2, zero_3, tensor_parallel, pipelined])


@pytest.mark.parametrize("name", ["data_parallel", "zero_2", "zero_3", "tensor_parallel", "pipelined"])
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
