"""Work that several ranks do alike, because an axis of the mesh could split nothing of an op.

Comes in: an `AnalyzedGraph` and placements on a mesh. Goes out: rows for the plan, so that its reader sees what more ranks don't speed up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from autopar.ir import LoopKind, Mesh, Op, Placement, Space, Split
from autopar.plans import RepeatedWork
from autopar.structure import AnalyzedGraph, count_flops, first_rank_axis
from autopar.texts import printable

# Shares of the work below this aren't listed: what small projections repeat costs nothing that a reader would change.
LEAST_SHARE = 1e-3


def find_repeated(model: AnalyzedGraph, mesh: Mesh, placements: Mapping[str, Placement]) -> tuple[RepeatedWork, ...]:
    """The contractions that several ranks do alike, those that waste most first.

    Every rank of an axis that doesn't split a contraction runs the same flops. A row's share is of the flops that all ranks run together in
    contractions: with 8 ranks that do the same work, 7/8 of it are repeated.
    """
    sizes = mesh.sizes[first_rank_axis(mesh) :]
    repeated: list[tuple[float, Op, int]] = []
    executed = 0.0
    for op in model.folded.ops:
        space = model.spaces.get(op.name)
        if space is None or not space.is_contraction or op.name not in placements:
            continue
        placement = placements[op.name][len(mesh.sizes) - len(sizes) :]
        ranks = math.prod(size for size, part in zip(sizes, placement, strict=True) if not isinstance(part, Split))
        flops = count_flops(model.spaces, op) * model.folded.count[op.name]
        executed += flops * ranks
        if ranks > 1:
            repeated.append((flops * (ranks - 1), op, ranks))
    rows = []
    for flops, op, ranks in sorted(repeated, key=lambda entry: -entry[0]):
        if flops > LEAST_SHARE * executed:  # lookups do none
            loops = ", ".join(
                f"{name} {loop.size}" for name, loop in model.spaces[op.name].loops.items() if loop.kind is not LoopKind.WHOLE
            )
            count = model.folded.count[op.name]
            texts = op.name, op.target, printable(op.layer), printable(op.source), loops
            could_split = _could_split(model.spaces[op.name], sizes, placements[op.name][len(mesh.sizes) - len(sizes) :])
            rows.append(RepeatedWork(*texts, count, ranks, flops / executed, could_split))
    return tuple(rows)


def _could_split(space: Space, sizes: Sequence[int], placement: Placement) -> bool:
    """Whether an axis that splits nothing of an op divides what the others leave of one of its loops."""
    left = {name: loop.size for name, loop in space.loops.items() if loop.kind is not LoopKind.WHOLE}
    for size, part in zip(sizes, placement, strict=True):
        if isinstance(part, Split) and part.loop in left:
            left[part.loop] //= size
    idle = [size for size, part in zip(sizes, placement, strict=True) if not isinstance(part, Split) and size > 1]
    return any(loop % size == 0 for loop in left.values() for size in idle)
