"""The processes of a job and the groups in which they communicate.

Ranks are numbered row by row over the axes, the pipeline's first: with ``pp=2 x dp=2 x tp=2``, rank 5 has position 1 along ``pp``, 0 along
``dp`` and 1 along ``tp``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from autopar.emit.support.described import Model
from autopar.errors import InputError
from autopar.ir import parse_layout, with_pipeline
from autopar.ops import Axis, GroupAxis
from autopar.runtime import world


@dataclass(frozen=True, slots=True, eq=False)
class Ranks:
    """This process among the others.

    Attributes:
        rank: its number.
        place: its number inside of its pipeline rank.
        pipeline_rank: its position along the pipeline.
        device: where it computes.
        axes: name of an axis -> the axis as this rank sees it.
        pipeline: the axis between pipeline ranks; None without.
        groups: names of axes -> the ranks that differ along these only.
    """

    rank: int
    place: int
    pipeline_rank: int
    device: torch.device
    axes: Mapping[str, Axis]
    pipeline: Axis | None
    groups: Mapping[tuple[str, ...], dist.ProcessGroup]


def join(model: Model) -> Ranks:
    """Join the job that torchrun started. Raises PlanError where it has another number of processes than the model is written for."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    world.join_world(device_type)
    if not dist.is_initialized():
        raise InputError("start this with torchrun, as README.md says: it says to every process which rank it is")
    device_mesh = world.form_mesh(with_pipeline(model.mesh, model.pipeline_ranks), device_type)
    device = torch.device(device_type, torch.cuda.current_device()) if device_type == "cuda" else torch.device("cpu")
    assert device_mesh is not None
    axes = {name: GroupAxis(name, device_mesh.get_group(name)) for name in model.mesh.names}
    pipeline = world.pipeline_axis(device_mesh) if model.pipeline_ranks > 1 else None
    # Forming a group is a collective: every rank forms the same ones in the same order.
    wanted = {
        names for parameter in model.parameters for names in (parameter.summed, beside_stored(model, parameter.layout, parameter.summed))
    }
    groups = {names: world.group_over(device_mesh, names) for names in sorted(wanted) if names}
    rank = dist.get_rank()
    return Ranks(rank, rank % model.mesh.world_size, rank // model.mesh.world_size, device, axes, pipeline, groups)


def beside_stored(model: Model, layout: str, summed: tuple[str, ...]) -> tuple[str, ...]:
    """The axes over which a gradient is summed, but for one along which the parameter is stored in parts and computed with whole."""
    held = {name for name, state in zip(model.mesh.names, parse_layout(layout), strict=True) if state.level}
    return tuple(axis for axis in summed if axis not in held)
