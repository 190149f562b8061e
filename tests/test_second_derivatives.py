"""Second derivatives of what emitted programs call: collectives, kernels, recomputed regions, gathers that aren't saved, whole programs.

``gradgradcheck`` compares the backward of a backward, run by all ranks as threads, with differences of the backward itself. All in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from autopar.capture.export import capture
from autopar.checks import threads
from autopar.checks.oracle import describe, splits_of, trace
from autopar.checks.shards import cut, join
from autopar.cost_models import Cluster
from autopar.errors import InputError
from autopar.ir.graph import Operand
from autopar.ir.layout import PARTIAL, Mesh, operand_layout, parse_layout, parse_placement, result_layout
from autopar.ops import collectives as c
from autopar.ops import comm, deferrable, kernels, regather, rng
from autopar.ops.weight_gradients import deferring
from autopar.rewrite.emit import rewrite
from autopar.rewrite.program import Program
from autopar.rules.table import rule
from autopar.runtime.dtensor import shard_whole
from tests.helpers import tree_allclose
from tests.on_ranks import OnRanks
from tests.planning import make_plan

TWO = Mesh(("x",), (2,))


GENERATOR = torch.Generator().manual_seed(4)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=GENERATOR, requires_grad=True)


def _check(function: Callable[..., Any], *inputs: Tensor) -> None:
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


# --- collectives ---

# Each with the states before and after it. Curved on at least one side, so that there is a second derivative; a summand can't be curved.
STEPS: Mapping[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    "all_gather": ("S0", "B", lambda x: c.all_gather(x, "x", 0)),
    "all_gather, strided": ("S1/3", "B", lambda x: c.all_gather(x, "x", 1, 3)),
    "all_gather, not saved": ("S1", "B", lambda x: c.all_gather(x, "x", 1, save=False)),
    "all_gather, whole gradient": ("S0", "R", lambda x: c.all_gather(x, "x", 0, grad="slice")),
    "all_gather, whole gradient, strided": ("S1/3", "R", lambda x: c.all_gather(x, "x", 1, 3, "slice")),
    "reduce_scatter": ("P", "S0", lambda x: c.reduce_scatter(x, "x", 0)),
    "reduce_scatter, strided": ("P", "S1/3", lambda x: c.reduce_scatter(x, "x", 1, 3)),
    "all_reduce": ("P", "R", lambda x: c.all_reduce(x, "x")),
    "all_reduce, Partial gradient": ("P", "B", lambda x: c.all_reduce(x, "x", "all_reduce")),
    "shard": ("R", "S0", lambda x: c.shard(x, "x", 0)),
    "shard, strided": ("R", "S1/3", lambda x: c.shard(x, "x", 1, 3)),
    "sum_gradient": ("R", "B", lambda x: c.sum_gradient(x, "x")),
    "keep_first": ("R", "P", lambda x: c.keep_first(x, "x")),
    "all_to_all": ("S0", "S1", lambda x: c.all_to_all(x, "x", 0, 1)),
    "all_to_all, strided": ("S1/3", "S0", lambda x: c.all_to_all(x, "x", 1, 0, from_outer=3)),
    "all_to_all, to strided": ("S0", "S1/3", lambda x: c.all_to_all(x, "x", 0, 1, to_outer=3)),
}


@pytest.mark.parametrize("name", STEPS)
def test_collectives(name: str) -> None:
    before, after, step = STEPS[name]

    def function(x: Tensor) -> tuple[Tensor, ...]:
        y = step(x if before == "P" else x.sin())
        return (y if after == "P" else y.exp(),)

    _check(OnRanks(TWO, function, (parse_layout(before),), (parse_layout(after),)), _random(2, 6))


@pytest.mark.parametrize("name", STEPS)
def test_a_third_derivative(name: str) -> None:
    before, after, step = STEPS[name]

    def function(x: Tensor) -> tuple[Tensor, ...]:
        y = step(x if before == "P" else x.sin())
        return (y if after == "P" else y.exp(),)

    def first(x: Tensor) -> Tensor:
        y = OnRanks(TWO, function, (parse_layout(before),), (parse_layout(after),))(x)
        return torch.autograd.grad(y.sum(), x, create_graph=True)[0]

    assert gradgradcheck(first, (_random(2, 6),), fast_mode=True)


@pytest.mark.parametrize("step", [lambda x: c.all_reduce(x, "x"), lambda x: c.keep_first(x, "x")], ids=["all_reduce", "keep_first"])
def test_a_gradient_that_passes_unchanged_is_not_copied(step: Callable[[Tensor], Tensor]) -> None:
    """Not even as a view, so that a leaf may take it for its own ``grad``."""

    def run(rank: int) -> None:
        x, seen = _random(4), list[Tensor]()
        step(x).register_hook(seen.append)  # type: ignore[no-untyped-call]
        y = step(x)
        y.register_hook(seen.append)  # type: ignore[no-untyped-call]
        (gradient,) = torch.autograd.grad(y, x, torch.ones(4, dtype=torch.float64))
        assert gradient is seen[-1]

    threads.run(TWO, run)


# --- kernels ---


def _classes(*shape: int, high: int) -> Tensor:
    made = torch.arange(torch.Size(shape).numel()).view(shape) % high
    made.view(-1)[0] = -100
    return made


def _kernel_case(target: str, *args: Any, split: str, mesh: Mesh = TWO, name: str = "") -> Any:
    return pytest.param(target, args, split, mesh, id=f"{name or target.split('.')[1]} {split}")


GRID = Mesh(("x", "y"), (2, 2))
LOSS, NORM = "aten.cross_entropy_loss.default", "aten.batch_norm.default"


def _loss(reduction: int = 1, smoothing: float = 0.0, *extra: int) -> tuple[Any, ...]:
    return _random(4, 6, *extra), _classes(4, *extra, high=6), None, reduction, -100, smoothing


def _norm(*shape: int) -> tuple[Any, ...]:
    running = torch.zeros(shape[1], dtype=torch.float64), torch.ones(shape[1], dtype=torch.float64)
    return _random(*shape), _random(shape[1]), _random(shape[1]), *running, True, 0.1, 1e-5, False


@pytest.mark.parametrize(
    ("target", "args", "split", "mesh"),
    [
        _kernel_case("aten.embedding.default", _random(6, 2), torch.tensor([[0, 3], [5, 1]]), split="v"),
        _kernel_case("aten.embedding.default", _random(6, 2), torch.tensor([[0, 3], [5, 1]]), split="v,b", mesh=GRID),
        *(_kernel_case(LOSS, *_loss(reduction), split="v", name=f"loss {reduction}") for reduction in (0, 1, 2)),
        _kernel_case(LOSS, *_loss(1), split="n"),
        _kernel_case(LOSS, *_loss(1, 0.3), split="v", name="smoothed loss"),
        _kernel_case(LOSS, *_loss(1, 0.3, 4), split="v,n", mesh=GRID, name="smoothed loss of a grid"),
        _kernel_case(LOSS, *_loss(0, 0.0, 4), split="x0,v", mesh=GRID, name="loss of a grid"),
        _kernel_case("aten.nll_loss_nd.default", *_loss()[:2], split="n"),
        _kernel_case("aten.mean.dim", _random(4, 6), [1], split="b"),
        _kernel_case("aten.mse_loss.default", _random(4, 6), _random(4, 6), split="a"),
        _kernel_case("aten.smooth_l1_loss.default", _random(4, 6), _random(4, 6), split="a"),
        _kernel_case("aten.binary_cross_entropy_with_logits.default", _random(4, 6), torch.ones(4, 6).double(), split="b"),
        *(_kernel_case(NORM, *_norm(4, 6), split=split) for split in ("n", "c")),
        _kernel_case(NORM, *_norm(4, 2, 4), split="x0,n", mesh=GRID),
        _kernel_case(NORM, *_norm(4, 6), split="n,c", mesh=GRID),
        _kernel_case("autopar.attention.default", *(_random(1, 2, 4, 2) for _ in range(3)), None, None, True, 3, 0.5, 2.0, 0.0, split="s"),
        _kernel_case("aten.dropout.default", _random(4, 6), 0.5, True, split="b"),
        _kernel_case("aten.conv1d.default", _random(2, 4, 5), _random(8, 2, 3), _random(8), [1], [1], [1], 2, split="g"),
    ],
)
def test_kernels(target: str, args: tuple[Any, ...], split: str, mesh: Mesh) -> None:
    op, operands = trace(target, *args)
    space, placement = rule(op, describe(operands)), parse_placement(split)
    assert space is not None
    assert space.kernel is not None
    kernel, splits = getattr(kernels, space.kernel), splits_of(space, mesh, placement)
    assert splits
    layouts = [operand_layout(space, placement, index) for index in range(len(operands))]
    trained = [index for index, operand in enumerate(operands) if operand.requires_grad]
    fixed = [[cut(x.detach(), layout, mesh, rank) for x, layout in zip(operands, layouts, strict=True)] for rank in range(mesh.world_size)]

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        parts = list(fixed[comm.index(mesh.names)])
        for index, x in zip(trained, given, strict=True):
            parts[index] = x
        filled = [parts[argument.index] if isinstance(argument, Operand) else argument for argument in op.args]
        with rng.isolated(0):
            return (kernel(*filled, splits=splits),)

    inputs = tuple(layouts[index] for index in trained)
    _check(OnRanks(mesh, function, inputs, (result_layout(space, placement, 0),)), *(operands[index] for index in trained))


# --- programs: a critic with a gradient penalty ---


class Critic(nn.Module):
    """A score of rows, through a layer norm, products and a batch norm or an attention."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.up, self.down, self.head = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 1)
        self.batch_norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x + self.down(torch.tanh(self.up(self.norm(x)))))
        if self.kind == "batch norm":
            hidden = self.batch_norm(hidden)
        if self.kind == "attention":
            rows = hidden.view(2, -1, 8)
            hidden = (rows @ rows.transpose(1, 2)).softmax(-1) @ rows
        return self.head(torch.tanh(hidden)).sum()


def _penalised(score: Tensor, x: Tensor) -> Tensor:
    """The score with WGAN-GP's penalty (Gulrajani et al. 2017): the gradient of every row should have length 1."""
    (gradient,) = torch.autograd.grad(score, x, create_graph=True)
    return score + 10 * (gradient.norm(dim=1) - 1).square().mean()


def _run_rank(program: Program, tensors: Mapping[str, Tensor], x: Tensor, rank: int) -> dict[str, Tensor]:
    """The gradients of one rank's parameters and of the input."""
    mesh, axes = program.mesh, comm.current()
    leaves = [cut(tensors[slot.name].detach(), slot.layout, mesh, rank).clone().requires_grad_() for slot in program.parameters]
    buffers = [cut(tensors[slot.name], slot.layout, mesh, rank).clone() for slot in program.buffers]
    whole = x.detach().clone().requires_grad_()
    with regather():
        score = program.module(*leaves, *buffers, *(shard_whole(whole, slot.layout, mesh, axes) for slot in program.inputs))
    _penalised(score[0] if isinstance(score, (list, tuple)) else score, whole).backward()
    assert whole.grad is not None
    gradients = {slot.name: leaf.grad for slot, leaf in zip(program.parameters, leaves, strict=True) if leaf.grad is not None}
    return {**gradients, "input": whole.grad}


PLANS: Mapping[str, Mapping[str, object]] = {
    "dp": {"dp": 2},
    "fsdp": {"dp": 2, "fsdp": True},
    "tp": {"tp": 2},
    "dp x tp": {"dp": 2, "tp": 2},
    "fsdp x tp": {"dp": 2, "tp": 2, "fsdp": True},
    "recompute": {"dp": 2, "recompute": "full"},
    "fsdp, recompute": {"dp": 2, "fsdp": True, "recompute": "full"},
    "tp, recompute": {"tp": 2, "recompute": "full"},
}


@pytest.mark.parametrize("kind", ["plain", "batch norm", "attention"])
@pytest.mark.parametrize("name", PLANS)
def test_a_gradient_penalty(name: str, kind: str) -> None:
    torch.manual_seed(0)
    model, x = Critic(kind).double(), _random(8, 8)
    _penalised(model(x), x).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"input": x.grad}
    captured = capture(model, (x,))
    pins = PLANS[name]
    ranks = 4 if {"dp", "tp"} <= set(pins) else 2
    program = rewrite(captured, make_plan(captured.graph, Cluster.parse(f"{ranks}xcpu"), pins=pins))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), **captured.constants}
    parts = threads.run(program.mesh, lambda rank: _run_rank(program, tensors, x, rank))
    actual = {"input": parts[0]["input"]}
    for slot in program.parameters:
        if slot.name in expected:
            layout = tuple(PARTIAL if axis in slot.partial_axes else s for axis, s in zip(program.mesh.names, slot.layout, strict=True))
            actual[slot.name] = join([part[slot.name] for part in parts], layout, program.mesh).whole
    tree_allclose(actual, expected, rtol=1e-9)


# --- what has no second derivative ---


@pytest.mark.parametrize("trains_input", [True, False])
@pytest.mark.parametrize("is_leaf", [True, False])
def test_weight_gradients_that_wait_are_refused(trains_input: bool, is_leaf: bool) -> None:
    """Neither the pass of the inputs nor that of the weights gives gradients that look differentiable."""
    x, weight = _random(5, 4).detach().requires_grad_(trains_input), _random(3, 4)
    weight = weight if is_leaf else weight * 2
    y = deferrable.linear(x, weight).square().sum()
    with deferring(), pytest.raises(InputError, match=r"create_graph=True asks for gradients that .* pass of their own can't: pin pp=1"):
        torch.autograd.backward(y, create_graph=True)
