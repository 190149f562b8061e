"""Whole tensors to parts and back, by layout.

Comes in: a whole tensor, or the parts of all ranks. Goes out: a rank's part (`cut`), or the whole tensor and by how much replicas differ
(`join`). Nothing is communicated: all parts are in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autopar.ir import Layout, Mesh, StateKind, outer_when_cut
from autopar.ops import join_parts, take_part, take_rows


def cut(whole: Tensor, layout: Layout, mesh: Mesh, rank: int) -> Tensor:
    """The part of `whole` that `rank` has; on an axis with a Partial state the first rank has the value and the others zeros."""
    part = whole
    for axis, (state, index) in enumerate(zip(layout, mesh.coordinates(rank), strict=True)):
        if state.padded:
            part = take_rows(part, state.dim, index, mesh.sizes[axis])
        elif state.kind is StateKind.SHARD:
            part = take_part(part, state.dim, outer_when_cut(layout, mesh, axis), index, mesh.sizes[axis], state.zigzag)
        elif state.kind is StateKind.PARTIAL and index:
            part = torch.zeros_like(part)
    return part


@dataclass(frozen=True, slots=True)
class Joined:
    """A whole tensor, and the largest difference between replicas of a part."""

    whole: Tensor
    disagreement: float


def join(parts: Sequence[Tensor], layout: Layout, mesh: Mesh) -> Joined:
    """The whole tensor from the parts of all ranks, in rank order."""
    pieces = list(parts)
    disagreement = 0.0
    for axis in reversed(range(len(layout))):
        state, size = layout[axis], mesh.sizes[axis]
        groups = [pieces[start : start + size] for start in range(0, len(pieces), size)]
        if state.padded:
            pieces = [torch.cat(list(group), state.dim) for group in groups]
        elif state.kind is StateKind.SHARD:
            outer = outer_when_cut(layout, mesh, axis)
            pieces = [join_parts(group, state.dim, outer, zigzag=state.zigzag) for group in groups]
        elif state.kind is StateKind.PARTIAL:
            pieces = [torch.stack(list(group)).sum(0) for group in groups]
        else:
            for group in groups:
                disagreement = max(disagreement, *(_difference(group[0], replica) for replica in group))
            pieces = [group[0] for group in groups]
    return Joined(pieces[0], disagreement)


def _difference(a: Tensor, b: Tensor) -> float:
    if a.numel() == 0:
        return 0.0
    if not a.is_floating_point():
        return float((a != b).any())
    return float((a - b).abs().max())
