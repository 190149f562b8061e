"""Journeys between layouts: every pair arrives, and the ranks' parts are right at every step."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from autopar.checks import threads
from autopar.checks.shards import cut, join
from autopar.ir.layout import PARTIAL, REPLICATE, REPLICATE_PARTIAL_GRAD, Layout, Mesh, StateKind, fits, format_layout, parse_layout, shard
from autopar.ir.reshard import PAIRS, Collective, journey
from autopar.ops import collectives

MESH = Mesh(("x", "y"), (2, 2))
SHAPE = (8, 12)
CUBE = Mesh(("x", "y", "z"), (2, 2, 2))
CUBE_SHAPE = (16, 24)
STARTS = (REPLICATE, PARTIAL, shard(0), shard(1), shard(1, 3))
NEEDS = (*STARTS, REPLICATE_PARTIAL_GRAD)


def pairs() -> list[tuple[Layout, Layout]]:
    starts = [s for s in itertools.product(STARTS, repeat=2) if fits(SHAPE, s, MESH)]
    needs = [n for n in itertools.product(NEEDS, repeat=2) if fits(SHAPE, n, MESH)]
    return list(itertools.product(starts, needs))


def pairs_on_three_axes() -> list[tuple[Layout, Layout]]:
    """A part of all pairs, and some in which an axis that has arrived must make way for one outside of it."""
    states = (REPLICATE, PARTIAL, shard(0), shard(0, 2), shard(0, 4), shard(1), shard(1, 3))
    starts = [s for s in itertools.product(states, repeat=3) if fits(CUBE_SHAPE, s, CUBE)]
    needs = [n for n in itertools.product((*states, REPLICATE_PARTIAL_GRAD), repeat=3) if fits(CUBE_SHAPE, n, CUBE)]
    hard = [
        ("R,S0,R", "S0,S0,S1"),
        ("R,S0/2,R", "S0/2,S0/2,S0"),
        ("S0,S0,S0", "S1,S0,S0"),
        ("R,S0/2,S0", "S0/2,S0/2,S0"),
        ("S0,S1,R", "S1/3,S0,S0/4"),
    ]
    every = list(itertools.product(starts, needs))
    return [*((parse_layout(a), parse_layout(b)) for a, b in hard), *random.Random(0).sample(every, 600)]


def move(x: torch.Tensor, start: Layout, need: Layout, mesh: Mesh, shape: tuple[int, ...]) -> torch.Tensor:
    """Run a journey on one rank, as the rewriter emits it."""
    for step in journey(shape, start, need, mesh):
        axis = mesh.names[step.axis]
        assert tuple(x.shape) == step.shape_before
        if step.forward is Collective.NONE:
            x = x if step.backward is Collective.NONE else collectives.sum_gradient(x, axis)
        elif step.forward is Collective.ALL_REDUCE:
            x = collectives.all_reduce(x, axis, grad="all_reduce" if step.backward is Collective.ALL_REDUCE else "identity")
        elif step.forward is Collective.KEEP_FIRST:
            x = collectives.keep_first(x, axis)
        elif step.forward is Collective.ALL_TO_ALL:
            x = collectives.all_to_all(x, axis, step.dim, step.to_dim, step.outer, step.to_outer)
        elif step.forward is Collective.ALL_GATHER:
            grad = "slice" if step.backward is Collective.SLICE else "reduce_scatter"
            x = collectives.all_gather(x, axis, step.dim, step.outer, grad=grad)
        else:
            x = getattr(collectives, step.forward.value)(x, axis, step.dim, step.outer)
        assert tuple(x.shape) == step.shape_after
    return x


@pytest.mark.parametrize(
    ("mesh", "shape", "cases"), [(MESH, SHAPE, pairs()), (CUBE, CUBE_SHAPE, pairs_on_three_axes())], ids=["2 x 2", "2 x 2 x 2"]
)
def test_every_journey_carries_value_and_gradient(mesh: Mesh, shape: tuple[int, ...], cases: list[tuple[Layout, Layout]]) -> None:
    torch.manual_seed(0)
    whole = torch.randn(shape, dtype=torch.float64)
    weight = torch.randn(shape, dtype=torch.float64)
    assert len(cases) > 400

    def run(rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        results = []
        for start, need in cases:
            x = cut(whole, start, mesh, rank).clone().requires_grad_()
            y = move(x, start, need, mesh, shape)
            # A need of kind B is used in parts: the gradient that comes back is a share. A Partial value's gradient is whole.
            back = tuple(PARTIAL if s == REPLICATE_PARTIAL_GRAD else REPLICATE if s == PARTIAL else s for s in need)
            y.backward(cut(weight, back, mesh, rank).contiguous())
            assert x.grad is not None
            results.append((y.detach(), x.grad))
        return results

    ranks = threads.run(mesh, run)
    for number, (start, need) in enumerate(cases):
        name = f"{format_layout(start)} -> {format_layout(need)}"
        value = join([r[number][0] for r in ranks], tuple(REPLICATE if s == REPLICATE_PARTIAL_GRAD else s for s in need), mesh)
        torch.testing.assert_close(value.whole, whole, rtol=1e-12, atol=1e-12, msg=name)
        gradient = join([r[number][1] for r in ranks], tuple(REPLICATE if s == PARTIAL else s for s in start), mesh)
        torch.testing.assert_close(gradient.whole, weight, rtol=1e-12, atol=1e-12, msg=name)
        assert max(value.disagreement, gradient.disagreement) < 1e-12, name


def test_every_journey_on_three_axes_ends() -> None:
    states = (REPLICATE, shard(0), shard(0, 2), shard(1), shard(1, 3))
    layouts = [s for s in itertools.product(states, repeat=3) if fits(CUBE_SHAPE, s, CUBE)]
    assert len(layouts) > 90
    for start, need in itertools.product(layouts, repeat=2):
        assert len(journey(CUBE_SHAPE, start, need, CUBE)) <= 6


@pytest.mark.parametrize("layout", [s for s in itertools.product(STARTS, repeat=2) if fits(SHAPE, s, MESH)], ids=format_layout)
def test_cut_and_join_are_inverse(layout: Layout) -> None:
    whole = torch.arange(96.0).reshape(SHAPE)
    parts = [cut(whole, layout, MESH, rank) for rank in range(4)]
    assert torch.equal(join(parts, layout, MESH).whole, whole)


def test_the_table_has_every_pair_that_one_collective_carries() -> None:
    kinds = set(StateKind)
    missing = {(a, b) for a in kinds - {StateKind.REPLICATE_PARTIAL_GRAD} for b in kinds} - set(PAIRS)
    assert missing == {(StateKind.SHARD, StateKind.PARTIAL)}  # gathered first
