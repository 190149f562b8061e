"""Placements of ops and layouts of tensors on one mesh: tables of costs, exact elimination, LP or MIP, prices of memory.

Comes in: an `AnalyzedGraph`, a mesh, constraints. Goes out: a `Solution` with its bound.

Modules, in reading order: ``problem``, ``eliminate``, ``solve``.
"""

from autopar.search.placement.problem import (
    FORBIDDEN,
    Decision,
    DecisionKind,
    Problem,
    build_problem,
    least_bytes,
    nanoseconds,
    restrict,
    saved_nbytes,
    sharding_of,
)
from autopar.search.placement.solve import PlacementSolver, Solution

__all__ = [
    "FORBIDDEN",
    "Decision",
    "DecisionKind",
    "PlacementSolver",
    "Problem",
    "Solution",
    "build_problem",
    "least_bytes",
    "nanoseconds",
    "restrict",
    "saved_nbytes",
    "sharding_of",
]
