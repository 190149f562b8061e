"""Between a tensor's part in a program's layout, the samples of it that a rank passes or gets under ``inputs="local"``, and all of it.

Comes in: a tensor of one rank in one of the three forms. Goes out: the tensor in another one, with autograd. A rank's *samples* of a tensor
are its part over the axes that split the batch, and whole along all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from autopar.ir import REPLICATE, Layout, State, StateKind
from autopar.ops import gather_along
from autopar.runtime.dtensor import shard_whole, split_steps
from autopar.runtime.storage import Deployment


def samples_layout(batch: State, deployment: Deployment) -> Layout:
    """The layout of a rank's samples of a tensor whose batch is split by `batch`."""
    return tuple(batch if name in deployment.batch_axes else REPLICATE for name in deployment.mesh.names)


def count_shares(deployment: Deployment) -> int:
    """Number of shares that the batch is split into, each the samples of one rank or of several."""
    return math.prod(deployment.axes[name].size for name in deployment.batch_axes)


def has_samples(shape: Sequence[int], batch: State | None, deployment: Deployment) -> bool:
    """Whether each rank can have its samples of a tensor of these global sizes, in equal numbers."""
    if batch is None or batch.dim >= len(shape):
        return False
    size = shape[batch.dim]
    return size > 0 and size % (batch.outer * count_shares(deployment)) == 0


def splits_over_ranks(layout: Layout, deployment: Deployment) -> bool:
    """Whether a rank has a part only of a tensor in this layout."""
    return any(deployment.axes[deployment.mesh.names[axis]].size > 1 for axis, _, _ in split_steps(layout, deployment.mesh))


def gather_parts(x: Tensor, layout: Layout, deployment: Deployment, skipped: Sequence[str] = ()) -> Tensor:
    """The whole tensor of which `x` is this rank's part; its gradient is whole on every rank, which takes its part. A collective.

    What the axes `skipped` split stays split.
    """
    for axis, dim, outer in reversed(split_steps(layout, deployment.mesh)):
        name = deployment.mesh.names[axis]
        if name not in skipped and deployment.axes[name].size > 1:
            x = gather_along(x, deployment.axes[name], dim, outer, zigzag=layout[axis].zigzag)
    return x


def samples_to_part(x: Tensor, samples: Layout, layout: Layout, deployment: Deployment) -> Tensor:
    """This rank's part in `layout`, given its samples; other samples are gathered only where the layout doesn't split the batch so."""
    if _splits_alike(samples, layout, deployment):
        return shard_whole(x, layout, deployment.mesh, deployment.axes, deployment.batch_axes)
    return shard_whole(gather_parts(x, samples, deployment), layout, deployment.mesh, deployment.axes)


def part_to_samples(x: Tensor, layout: Layout, samples: Layout, deployment: Deployment) -> Tensor:
    """This rank's samples, given its part in `layout`; the reverse of `samples_to_part`."""
    if _splits_alike(samples, layout, deployment):
        return gather_parts(x, layout, deployment, deployment.batch_axes)
    return shard_whole(gather_parts(x, layout, deployment), samples, deployment.mesh, deployment.axes)


def _splits_alike(samples: Layout, layout: Layout, deployment: Deployment) -> bool:
    """Whether a rank's part in `layout` is a part of its samples."""
    split_before: set[int] = set()
    for name, wanted, state in zip(deployment.mesh.names, samples, layout, strict=True):
        if name in deployment.batch_axes:
            if state != wanted or state.dim in split_before:
                return False
        elif state.kind is StateKind.SHARD:
            split_before.add(state.dim)
    return True
