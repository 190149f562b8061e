"""Runs all ranks of a mesh in one process, one thread per rank, so that a parallel program can be checked without a process group.

Comes in: a mesh, and a function of a rank. Goes out: the results of all ranks, or the first error with its rank. CPU autograd runs a
backward in the thread that called it, so the function may call ``backward()``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TypeVar

from autopar.errors import AutoparError
from autopar.ir import Mesh
from autopar.ops import comm, rendezvous

T = TypeVar("T")


def axes_by_rank(mesh: Mesh) -> list[dict[str, comm.ThreadAxis]]:
    """Per rank its axes by name; ranks that differ along one axis only share the `Rendezvous` of that axis."""
    exchanges: dict[tuple[int, tuple[int, ...]], rendezvous.Rendezvous] = {}
    ranks: list[dict[str, comm.ThreadAxis]] = []
    for rank in range(mesh.world_size):
        coordinates = mesh.coordinates(rank)
        axes: dict[str, comm.ThreadAxis] = {}
        for position, (name, size) in enumerate(zip(mesh.names, mesh.sizes, strict=True)):
            line = (position, coordinates[:position] + coordinates[position + 1 :])
            exchange = exchanges.setdefault(line, rendezvous.Rendezvous(size))
            axes[name] = comm.ThreadAxis(name, coordinates[position], exchange)
        ranks.append(axes)
    return ranks


def run(mesh: Mesh, fn: Callable[[int], T]) -> list[T]:
    """Call ``fn(rank)`` for every rank of `mesh` at once, with its axes active; returns the results in rank order.

    The first error of any rank ends all of them and is raised with a note that names the rank. When a rank returns while another waits
    for it, the one that waits fails.
    """
    ranks = axes_by_rank(mesh)
    results: dict[int, T] = {}
    errors: list[tuple[int, BaseException]] = []
    # Ranks that wait for a failed one fail too; only the first error is of interest.
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
