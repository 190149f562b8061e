"""Raw collectives over threads, and the runner that gives every rank a thread."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from autopar.checks import threads
from autopar.errors import CommError
from autopar.ir.layout import Mesh
from autopar.ops import comm

torch.set_num_threads(1)


def _on_ranks(size: int, fn: Callable[[comm.Axis], object]) -> list[object]:
    return threads.run(Mesh(("x",), (size,)), lambda rank: fn(comm.axis("x")))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_reduce_sums_and_leaves_its_input(size: int) -> None:
    def reduce(axis: comm.Axis) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = torch.tensor([1.0, -axis.index])
        return axis.all_reduce(x), axis.all_reduce(x, "max"), x

    for rank, (total, largest, x) in enumerate(_on_ranks(size, reduce)):
        assert total.tolist() == [size, -size * (size - 1) / 2]
        assert largest.tolist() == [1.0, 0.0]
        assert x.tolist() == [1.0, -rank]


def test_all_reduce_of_flags_is_any() -> None:
    results = _on_ranks(3, lambda axis: axis.all_reduce(torch.tensor([axis.index == 1, False])))
    assert all(result.tolist() == [True, False] for result in results)


def test_gather_scatter_and_exchange_in_rank_order() -> None:
    def collect(axis: comm.Axis) -> tuple[list[int], int, list[int], int]:
        here = axis.index
        gathered = [int(part) for part in axis.all_gather(torch.tensor(here))]
        scattered = int(axis.reduce_scatter([torch.tensor(10 * here + there) for there in range(axis.size)]))
        exchanged = [int(part) for part in axis.all_to_all([torch.tensor(10 * here + there) for there in range(axis.size)])]
        return gathered, scattered, exchanged, int(axis.begin_rotate(torch.tensor(here)).wait())

    for rank, (gathered, scattered, exchanged, rotated) in enumerate(_on_ranks(3, collect)):
        assert gathered == [0, 1, 2]
        assert scattered == 30 + 3 * rank
        assert exchanged == [rank, 10 + rank, 20 + rank]
        assert rotated == (rank - 1) % 3


def test_axes_of_a_mesh_are_independent_and_row_major() -> None:
    mesh = Mesh(("a", "b", "one"), (2, 3, 1))

    def look(rank: int) -> tuple[int, int, int, int]:
        value = torch.tensor(rank)
        over_a, over_b = int(comm.axis("a").all_reduce(value)), int(comm.axis("b").all_reduce(value))
        assert comm.count(("a", "b", "one")) == 6
        assert comm.count(()) == 1
        assert comm.index(()) == 0
        return comm.index(("a", "one", "b")), comm.index(("b", "a")), over_a, over_b

    assert threads.run(mesh, look) == [(rank, rank % 3 * 2 + rank // 3, 2 * (rank % 3) + 3, 9 * (rank // 3) + 3) for rank in range(6)]


def test_a_failing_rank_ends_all_and_is_named() -> None:
    def fail(rank: int) -> None:
        if rank == 1:
            raise KeyError("lost")
        comm.axis("b").all_reduce(torch.ones(1))
        comm.axis("a").all_reduce(torch.ones(1))

    with pytest.raises(KeyError, match="lost") as caught:
        threads.run(Mesh(("a", "b"), (2, 2)), fail)
    assert caught.value.__notes__ == ["on rank 1 of a=2 x b=2"]


def test_different_collectives_are_reported_not_deadlocked() -> None:
    def disagree(axis: comm.Axis) -> None:
        axis.all_reduce(torch.ones(2 + axis.index))

    with pytest.raises(CommError, match=r"float32\[2\].*float32\[3\]"):
        _on_ranks(2, disagree)


def test_a_rank_that_ends_early_is_noticed() -> None:
    def stop(axis: comm.Axis) -> None:
        if axis.index:
            axis.all_reduce(torch.ones(1))

    with pytest.raises(CommError):
        _on_ranks(2, stop)


def test_unknown_axis_and_no_axes_are_errors() -> None:
    with pytest.raises(CommError, match="no axes are active"):
        comm.axis("x")
    with comm.active({"x": comm.alone("x")}), pytest.raises(CommError, match="no axis 'y'"):
        comm.axis("y")
