"""Gradients summed over real processes, in buckets, and what optimizers then see."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from autopar import torch_compat
from autopar.costs.tables import BUCKET_NBYTES
from autopar.runtime.dtensor import as_dtensor
from autopar.runtime.gradients import GradientReducer
from autopar.runtime.parameters import enter_stored
from autopar.runtime.sums import TrackedParameter, fill_buckets
from tests.helpers import tree_allclose
from tests.processes import spawn

SHAPES = {"first": (4, 3), "second": (5,), "third": (6, 2), "unused": (3,)}


def _enter(tracked: Sequence[TrackedParameter], reducer: GradientReducer, bucket_nbytes: int) -> dict[str, Tensor]:
    return enter_stored(tracked, reducer.track(tracked, bucket_nbytes))


def _make(group: dist.ProcessGroup | None) -> dict[str, TrackedParameter]:
    """Parameters on two ranks: `third` is stored Shard and needs no sum, the others are whole and Partial."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("x",))
    tracked = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        whole = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        split = name == "third"
        local = whole.chunk(2)[dist.get_rank()].clone() if split else whole
        parameter = nn.Parameter(as_dtensor(local, mesh, [Shard(0) if split else Replicate()], shape))
        leaf = torch_compat.local_of(parameter).requires_grad_()
        tracked[name] = TrackedParameter(name, parameter, leaf, None if split else group)
    return tracked


def _loss(parts: dict[str, Tensor], rank: int, scale: float = 1.0) -> Tensor:
    """Differs between the ranks, so that a gradient that isn't summed is seen."""
    first, second, third = (parts[name] for name in ("first", "second", "third"))
    return scale * ((rank + 1) * first.square().sum() + (rank + 2) * (second**3).sum() + third.square().sum())


def _expected(tracked: dict[str, TrackedParameter], scale: float = 1.0) -> dict[str, Tensor]:
    """The sum over both ranks, by hand."""
    return {
        "first": scale * 3 * 2 * tracked["first"].leaf.detach(),
        "second": scale * 5 * 3 * tracked["second"].leaf.detach().square(),
        "third": scale * 2 * tracked["third"].leaf.detach(),
    }


def _held(tracked: dict[str, TrackedParameter]) -> dict[str, Tensor]:
    assert tracked["unused"].parameter.grad is None
    assert all(each.gradient is None for each in tracked.values())
    held = {}
    for name in ("first", "second", "third"):
        gradient = tracked[name].parameter.grad
        assert isinstance(gradient, DTensor)
        assert gradient.placements == tracked[name].parameter.placements
        held[name] = gradient.to_local()
    return held


def _reduce(rank: int, bucket_nbytes: int, sums: int) -> None:
    tracked = _make(dist.group.WORLD)
    sent: list[int] = []
    reducer = GradientReducer()
    parts = _enter(list(tracked.values()), reducer, bucket_nbytes)
    _loss(parts, rank).backward()
    tree_allclose(_held(tracked), _expected(tracked), rtol=1e-12)
    # A second backward adds, and sends as many buckets.
    send = dist.all_reduce

    def count(x: Tensor, **options: Any) -> dist.Work | None:
        sent.append(x.numel())
        return send(x, **options)

    dist.all_reduce = count
    _loss(parts, rank, 0.5).backward()
    dist.all_reduce = send
    assert len(sent) == sums
    assert sum(sent) == 12 + 5
    tree_allclose(_held(tracked), _expected(tracked, 1.5), rtol=1e-12)
    for each in tracked.values():
        each.parameter.grad = None
    # Backwards without a sum, then one with it: all three count once.
    with reducer.no_sync():
        for _ in range(2):
            _loss(parts, rank).backward()
    assert all(each.parameter.grad is None for each in tracked.values())
    _loss(parts, rank).backward()
    tree_allclose(_held(tracked), _expected(tracked, 3.0), rtol=1e-12)
    # A backward that fails half-way leaves nothing behind that would count later.
    for each in tracked.values():
        each.parameter.grad = None
    broken = parts["first"].clone()
    broken.register_hook(_fail)
    with pytest.raises(ArithmeticError):
        ((parts["second"] ** 3).sum() + broken.sum()).backward()
    reducer.zero()
    _loss(parts, rank).backward()
    tree_allclose(_held(tracked), _expected(tracked), rtol=1e-12)


def _overlap(rank: int) -> None:
    """The sum of a gradient begins before the backward computes the next one."""
    tracked, order = _make(dist.group.WORLD), list[str]()
    del tracked["unused"]
    parts = _enter(list(tracked.values()), GradientReducer(), 1)
    first = parts["first"].clone()
    first.register_hook(lambda _: order.append("first"))
    send = dist.all_reduce

    def note(x: Tensor, **options: Any) -> dist.Work | None:
        order.append("sum")
        return send(x, **options)

    dist.all_reduce = note
    (first.sum() * parts["second"].sum()).backward()
    dist.all_reduce = send
    assert order == ["sum", "first", "sum"]


def _fail(_: Tensor) -> None:
    raise ArithmeticError


def _optimize(rank: int) -> None:
    tracked = _make(dist.group.WORLD)
    del tracked["unused"]
    reducer = GradientReducer()
    parts = _enter(list(tracked.values()), reducer, BUCKET_NBYTES)
    parameters = [each.parameter for each in tracked.values()]
    wholes = [nn.Parameter(parameter.detach().full_tensor().clone()) for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, foreach=True)
    oracle = torch.optim.AdamW(wholes, lr=0.1, foreach=False)
    for _ in range(3):
        _loss(parts, rank).backward()
        (3 * wholes[0].square().sum() + 5 * (wholes[1] ** 3).sum() + wholes[2].square().sum()).backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        tree_allclose(norm.full_tensor(), nn.utils.clip_grad_norm_(wholes, 1.0), rtol=1e-12)
        optimizer.step()
        oracle.step()
        optimizer.zero_grad()
        oracle.zero_grad()
    tree_allclose([parameter.detach().full_tensor() for parameter in parameters], list(wholes), rtol=1e-12)


def _on_two_ranks(rank: int) -> None:
    for bucket_nbytes, sums in ((1, 2), (100, 1), (25_000_000, 1)):
        _reduce(rank, bucket_nbytes, sums)
    _overlap(rank)
    _optimize(rank)


@pytest.mark.processes
def test_gradients_are_summed_once_and_optimizers_work(tmp_path: Path) -> None:
    spawn(2, tmp_path, _on_two_ranks)


def test_buckets_hold_the_last_parameters_first_and_split_by_dtype() -> None:
    group = object()
    tracked = [
        TrackedParameter(str(index), nn.Parameter(torch.zeros(10)), torch.zeros(10, dtype=dtype), group if index != 2 else None)
        for index, dtype in enumerate([torch.float32, torch.float64, torch.float32, torch.float32, torch.float32])
    ]
    names = [[member.name for member in bucket.members] for bucket in fill_buckets(tracked, 80)]
    assert names == [["4", "3"], ["1"], ["0"]]


def test_without_a_group_gradients_pass_to_plain_parameters() -> None:
    parameter = nn.Parameter(torch.ones(3))
    leaf = torch_compat.local_of(parameter).requires_grad_()
    entry = TrackedParameter("weight", parameter, leaf, None)
    part = _enter([entry], GradientReducer(), BUCKET_NBYTES)["weight"]
    part.sum().backward()
    part.sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [2.0] * 3
    assert entry.gradient is None
