"""Every differentiable collective, forward and backward, against the formula of what it means, on threads and processes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from autopar.checks import threads
from autopar.errors import InputError
from autopar.ir.layout import Mesh
from autopar.ops import collectives as c
from autopar.ops import comm, join_parts, regather, take_part
from autopar.torch_compat import StorageRef
from tests.helpers import tree_allclose
from tests.processes import spawn

SHAPE = (12, 24, 12)


def _values(count: int, shape: tuple[int, ...], seed: int) -> list[Tensor]:
    """The same random tensors on every rank: one per rank."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(count)]


def _parts(x: Tensor, dim: int, outer: int, size: int) -> list[Tensor]:
    """The meaning of a strided shard, in words of chunk and cat alone."""
    blocks = [block.chunk(size, dim) for block in x.chunk(outer, dim)]
    return [torch.cat([block[rank] for block in blocks], dim) for rank in range(size)]


def _differentiate(fn: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    result = fn(leaf)
    result.backward(grad)
    assert leaf.grad is not None
    assert result.is_contiguous()
    return result.detach(), leaf.grad


def _check_steps(rank: int, size: int, dim: int, outer: int) -> None:
    """Run every collective on this rank of axis ``x`` and compare with what all ranks' data make of it."""
    (whole,) = _values(1, SHAPE, 0)
    wholes = _values(size, SHAPE, 1)
    parts = _parts(whole, dim, outer, size)
    part_grads = _values(size, tuple(parts[0].shape), 2)
    total = torch.stack(wholes).sum(0)
    gathered = torch.empty_like(whole)
    for target, source in zip(_parts(torch.arange(whole.shape[dim]), 0, outer, size), part_grads, strict=True):
        gathered.index_copy_(dim, target, source)
    expected = {
        "gather": (whole, _parts(total, dim, outer, size)[rank]),
        "gather, whole gradient": (whole, _parts(total, dim, outer, size)[rank]),
        "scatter": (_parts(total, dim, outer, size)[rank], gathered),
        "reduce": (total, wholes[rank]),
        "reduce, Partial gradient": (total, total),
        "shard": (parts[rank], gathered),
        "sum gradient": (wholes[rank], total),
        "keep first": (wholes[rank] * (rank == 0), wholes[rank]),
    }
    actual = {
        "gather": _differentiate(lambda x: c.all_gather(x, "x", dim, outer), parts[rank], wholes[rank]),
        "gather, whole gradient": _differentiate(lambda x: c.all_gather(x, "x", dim, outer, "slice"), parts[rank], total),
        "scatter": _differentiate(lambda x: c.reduce_scatter(x, "x", dim, outer), wholes[rank], part_grads[rank]),
        "reduce": _differentiate(lambda x: c.all_reduce(x, "x"), wholes[rank], wholes[rank]),
        "reduce, Partial gradient": _differentiate(lambda x: c.all_reduce(x, "x", "all_reduce"), wholes[rank], wholes[rank]),
        "shard": _differentiate(lambda x: c.shard(x, "x", dim, outer), whole, part_grads[rank]),
        "sum gradient": _differentiate(lambda x: c.sum_gradient(x, "x"), wholes[rank], wholes[rank]),
        "keep first": _differentiate(lambda x: c.keep_first(x, "x"), wholes[rank], wholes[rank]),
    }
    assert tree_allclose(actual, expected, rtol=1e-12) == 16


def _check_all_to_all(rank: int, size: int, outers: tuple[int, int]) -> None:
    from_outer, to_outer = outers
    for from_dim, to_dim in ((0, 1), (1, 0), (2, 1)):
        (x,), (grad,) = _values(1, SHAPE, 3), _values(1, SHAPE, 4)
        before, after = _parts(x, from_dim, from_outer, size), _parts(x, to_dim, to_outer, size)
        actual = _differentiate(
            lambda x, dims=(from_dim, to_dim): c.all_to_all(x, "x", *dims, from_outer, to_outer),
            before[rank],
            _parts(grad, to_dim, to_outer, size)[rank],
        )
        tree_allclose(actual, (after[rank], _parts(grad, from_dim, from_outer, size)[rank]), rtol=0)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("dim", "outer"), [(0, 1), (1, 1), (2, 1), (0, 3), (1, 3), (2, 3), (1, 6)])
def test_every_step_and_its_gradient(size: int, dim: int, outer: int) -> None:
    threads.run(Mesh(("x",), (size,)), lambda rank: _check_steps(rank, size, dim, outer))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("outers", [(1, 1), (3, 1), (1, 3), (3, 3)])
def test_all_to_all_and_its_gradient(size: int, outers: tuple[int, int]) -> None:
    threads.run(Mesh(("x",), (size,)), lambda rank: _check_all_to_all(rank, size, outers))


def _on_group(rank: int) -> None:
    axis = comm.GroupAxis("x", dist.group.WORLD)
    assert (axis.size, axis.index) == (2, rank)
    with comm.active({"x": axis}):
        for dim, outer in ((0, 1), (1, 1), (1, 3)):
            _check_steps(rank, 2, dim, outer)
        _check_all_to_all(rank, 2, (3, 1))
        _check_whole_numbers()
        _check_complex_numbers()
        _check_forgetting()
    assert [x.tolist() for x in axis.all_gather(torch.tensor([rank == 1]))] == [[False], [True]]
    assert axis.all_reduce(torch.tensor([rank == 1, False])).tolist() == [True, False]
    assert axis.all_reduce(torch.tensor([rank, -rank]), "max").tolist() == [1, 0]


def _on_larger_group(rank: int) -> None:
    with comm.active({"x": comm.GroupAxis("x", dist.group.WORLD)}):
        for dim, outer in ((0, 1), (1, 3)):
            _check_steps(rank, 4, dim, outer)
        _check_all_to_all(rank, 4, (3, 1))
        _check_whole_numbers()
        _check_complex_numbers()


# Two CPU ranks swap messages, more of them use other collectives.
@pytest.mark.processes
@pytest.mark.parametrize(("size", "check"), [(2, _on_group), (4, _on_larger_group)])
def test_the_same_on_processes(size: int, check: Callable[[int], None], tmp_path: Path) -> None:
    spawn(size, tmp_path, check)


def _check_whole_numbers() -> None:
    axis = comm.axis("x")
    numbers = torch.arange(2 * axis.size)
    mine = c.shard(numbers, "x", 0)
    assert mine.tolist() == [2 * axis.index, 2 * axis.index + 1]
    assert axis.begin_rotate(mine).wait().tolist() == ((mine - 2) % (2 * axis.size)).tolist()
    assert c.all_gather(mine, "x", 0).tolist() == numbers.tolist()
    assert c.all_gather(mine % 2 == 0, "x", 0).tolist() == (numbers % 2 == 0).tolist()
    assert c.reduce_scatter(numbers, "x", 0).tolist() == (mine * axis.size).tolist()


def _check_complex_numbers() -> None:
    axis = comm.axis("x")
    numbers = torch.arange(2.0 * axis.size) * 1j + 1
    mine = c.shard(numbers, "x", 0)
    assert c.all_gather(mine, "x", 0).tolist() == numbers.tolist()
    assert c.reduce_scatter(numbers, "x", 0).tolist() == (mine * axis.size).tolist()
    assert c.all_reduce(numbers.conj(), "x").tolist() == (numbers.conj() * axis.size).tolist()
    stack = numbers.expand(axis.size, -1) * (axis.index + 1)
    assert axis.exchange_stack(stack)[-1].tolist() == (numbers * axis.size).tolist()
    if axis.size > 1 and axis.index < 2:
        sent = axis.send(mine, 1 - axis.index)
        assert (
            axis.receive(1 - axis.index, mine.shape, mine.dtype, mine.device).wait().tolist()
            == numbers.chunk(axis.size)[1 - axis.index].tolist()
        )
        sent.wait()


def test_whole_numbers_and_flags_travel_too() -> None:
    threads.run(Mesh(("x",), (2,)), lambda rank: _check_whole_numbers())


@pytest.mark.parametrize("outer", [1, 2, 3])
def test_parts_join_again(outer: int) -> None:
    x = torch.arange(2 * 12).view(2, 12)
    parts = [take_part(x, 1, outer, rank, 2) for rank in range(2)]
    assert [part.tolist() for part in parts] == [part.tolist() for part in _parts(x, 1, outer, 2)]
    assert torch.equal(join_parts(parts, 1, outer), x)


def test_uneven_splits_and_one_dim_twice_are_refused() -> None:
    with pytest.raises(InputError, match=r"dim 1 of a tensor of shape \(2, 5\) can't be split 2 ways in 1 blocks"):
        take_part(torch.zeros(2, 5), 1, 1, 0, 2)
    with pytest.raises(InputError, match="between two dims"):
        c.all_to_all(torch.zeros(2, 4), "x", 1, 1, 1, 2)


def _loss(x: Tensor, part: Tensor, save: bool, seen: list[StorageRef]) -> Tensor:
    weight = c.all_gather(part, "x", 0, 2, save=save)
    seen.append(StorageRef(weight))
    hidden = F.linear(x, weight).tanh()
    return (hidden @ weight).square().mean() + (weight[1] * weight[2:4]).sum()


def _check_forgetting() -> None:
    axis = comm.axis("x")
    x, whole = _values(1, (3, 6), 5)[0], _values(1, (8, 6), 6)[0]
    part = take_part(whole, 0, 2, axis.index, axis.size)
    held, gradients = [], []
    for save in (True, False):
        leaf, seen = part.clone().requires_grad_(), list[StorageRef]()
        with regather():
            loss = _loss(x, leaf, save, seen)
        gc.collect()
        held.append(not seen[0].expired())
        loss.backward()
        gradients.append(leaf.grad)
    assert held == [True, False]
    tree_allclose(gradients[1], gradients[0], rtol=0)


def test_a_gathered_weight_does_not_outlive_the_forward() -> None:
    threads.run(Mesh(("x",), (2,)), lambda rank: _check_forgetting())


def test_a_weight_that_several_ops_save_is_gathered_once_more_only(monkeypatch: pytest.MonkeyPatch) -> None:
    gathers: list[int] = []
    original = comm.ThreadAxis.gather_stack

    def count(axis: comm.ThreadAxis, x: Tensor) -> Tensor:
        gathers.append(axis.index)
        return original(axis, x)

    monkeypatch.setattr(comm.ThreadAxis, "gather_stack", count)

    def twice(rank: int) -> None:
        leaf = torch.ones(4, 6, dtype=torch.float64, requires_grad=True)
        with regather():
            loss = _loss(torch.ones(3, 6, dtype=torch.float64), leaf, False, [])
        loss.backward(retain_graph=True)
        loss.backward()

    threads.run(Mesh(("x",), (2,)), twice)
    # Each rank: the forward's gather, and one in each of the two backwards.
    assert sorted(gathers) == [0, 0, 0, 1, 1, 1]


def test_gathers_in_inference_mode() -> None:
    def run(rank: int) -> Tensor:
        with torch.inference_mode(), regather():
            return c.all_gather(torch.full((2, 3), float(rank)), "x", 0)

    assert [part[:, 0].tolist() for part in threads.run(Mesh(("x",), (2,)), run)] == [[0, 0, 1, 1]] * 2
