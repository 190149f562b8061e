"""Runs all ranks of a mesh in one process, a thread each, so that a parallel program can be checked without a process group.

CPU autograd runs a backward in the thread that called it, so the ranks' functions may call ``backward()``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TypeVar

from autopar.errors import AutoparError
from autopar.ir import Mesh
from autopar.ops import comm

T = TypeVar("T")


def axes_by_rank(mesh: Mesh) -> list[dict[str, comm.ThreadAxis]]:
    """Per rank its axes: ranks that differ along one axis only share that axis' exchange."""
    exchanges: dict[tuple[int, tuple[int, ...]], comm.Exchange] = {}
    ranks: list[dict[str, comm.ThreadAxis]] = []
    for rank in range(mesh.world_size):
        where = mesh.coordinates(rank)
        axes: dict[str, comm.ThreadAxis] = {}
        for position, (name, size) in enumerate(zip(mesh.names, mesh.sizes, strict=True)):
            others = (position, where[:position] + where[position + 1 :])
            exchange = exchanges.setdefault(others, comm.Exchange(size))
            axes[name] = comm.ThreadAxis(name, where[position], exchange)
        ranks.append(axes)
    return ranks


def run(mesh: Mesh, fn: Callable[[int], T]) -> list[T]:
    """Call ``fn(rank)`` for every rank of `mesh` at once, its axes active, and return the results in rank order.

    The first error of any rank ends all of them and is raised again with a note that names the rank. A rank that returns while
    another still waits for it counts as an error of the one that waits.
    """
    ranks = axes_by_rank(mesh)
    results: dict[int, T] = {}
    errors: list[tuple[int, BaseException]] = []
    # Ranks that waited for a failed one fail too; only what came first is worth telling.
    lock = threading.Lock()

    def work(rank: int) -> None:
        try:
            with comm.active(ranks[rank]):
                results[rank] = fn(rank)
            _end(ranks[rank])
        except BaseException as error:
            with lock:
                errors.append((rank, error))
            for axes in ranks:
                _end(axes)

    threads = [threading.Thread(target=work, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(mesh.world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        rank, error = errors[0]
        error.add_note(f"on rank {rank} of {mesh}")
        raise error
    if len(results) != mesh.world_size:
        raise AutoparError(f"{mesh.world_size - len(results)} of {mesh.world_size} ranks gave no result")
    return [results[rank] for rank in range(mesh.world_size)]


def _end(axes: Mapping[str, comm.ThreadAxis]) -> None:
    for axis in axes.values():
        axis.exchange.close(axis.index)
