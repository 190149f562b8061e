"""Between whole tensors, the parts of them that ranks store, and torch's DTensors.

Comes in: a layout of Shard and Replicate states, or a DTensor's placements. Goes out: parts, whole tensors and DTensors. The one idea: a
stored tensor is split along the mesh axes from the first to the last, each axis splitting what those before it left to a rank; that is
also how torch reads a DTensor's placements. What torch's DTensor can't do with strided shards is added in the second half.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from autopar import torch_compat
from autopar.ir import Layout, Mesh, StateKind, local_shape, outer_when_cut
from autopar.ops import Axis, GroupAxis, collectives, join_parts, pad_whole, rows_of_rank, take_part, take_rows
from autopar.torch_compat import StridedShard, state_dict_utils

AxisSplit = tuple[int, int, int]
"""One split of a tensor: (mesh axis, dim, number of outer blocks of the dim in the part that earlier axes left to a rank)."""


def split_steps(layout: Layout, mesh: Mesh) -> tuple[AxisSplit, ...]:
    """The splits by which a rank's part is cut out of the whole tensor, first axis first.

    A layout counts outer blocks in the whole tensor. Where an earlier axis splits between such blocks, its part has fewer of them.

    Raises ValueError for a layout with other states than Shard and Replicate.
    """
    steps: list[AxisSplit] = []
    for position, state in enumerate(layout):
        if state.kind is StateKind.REPLICATE:
            continue
        if state.kind is not StateKind.SHARD:
            raise ValueError(f"a stored tensor is split or whole along every axis, not {state}")
        steps.append((position, state.dim, outer_when_cut(layout, mesh, position)))
    return tuple(steps)


def read_as(dtype: str, part: Tensor) -> Tensor:
    """A part of a parameter in the dtype in which a program takes it: itself, or a cast of it, whose gradient is cast back.

    It is cast in every call and not kept: there are changes of parameters that nothing tells of, such as those of ``parameter.data``.
    """
    wanted = getattr(torch, dtype)
    if part.dtype == wanted:
        return part
    cast = part.to(wanted)
    if cast.grad_fn is not None:
        # As the part's own: its gradient is then left to the sum as soon as it is there.
        torch_compat.run_early_in_backward(cast)
    return cast


def stand_in(receiver: Tensor, whole: Tensor, take: Callable[[Tensor], None] | None = None) -> Tensor:
    """`whole`, whose gradient is that of the leaf `receiver`, cast to its dtype, or is taken by a function as soon as it is known."""
    part: Tensor = _StandIn.apply(receiver, whole, take)  # type: ignore[no-untyped-call]
    if take is not None and part.requires_grad:
        torch_compat.run_early_in_backward(part)
    return part


class _StandIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, receiver: Tensor, whole: Tensor, take: Callable[[Tensor], None] | None) -> Tensor:
        ctx.dtype, ctx.take = receiver.dtype, take
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        if ctx.take is not None:
            ctx.take(grads[0])
            return None, None, None
        return grads[0].to(ctx.dtype), None, None


def take_local(x: Tensor, layout: Layout, mesh: Mesh, rank: int) -> Tensor:
    """The part of the whole tensor `x` that `rank` stores; `x` itself where nothing is split."""
    coordinate = mesh.coordinates(rank)
    for axis, dim, outer in split_steps(layout, mesh):
        if layout[axis].padded:
            x = take_rows(x, dim, coordinate[axis], mesh.sizes[axis]).clone(memory_format=torch.contiguous_format)
        else:
            x = take_part(x, dim, outer, coordinate[axis], mesh.sizes[axis], layout[axis].zigzag)
    return x


def shape_of_part(shape: Sequence[int], layout: Layout, mesh: Mesh, rank: int) -> tuple[int, ...]:
    """Sizes of the part of a tensor that `rank` stores, which `take_local` takes."""
    local = list(local_shape(tuple(shape), layout, mesh))
    for state, index, size in zip(layout, mesh.coordinates(rank), mesh.sizes, strict=True):
        if state.padded:
            local[state.dim] = rows_of_rank(shape[state.dim], index, size)
    return tuple(local)


def shard_whole(x: Tensor, layout: Layout, mesh: Mesh, axes: Mapping[str, Axis], skipped: Sequence[str] = ()) -> Tensor:
    """This rank's part of the whole tensor `x`, whose gradient is gathered; the axes `skipped` have split `x` already."""
    for axis, dim, outer in split_steps(layout, mesh):
        name = mesh.names[axis]
        if layout[axis].padded:
            rows = rows_of_rank(x.shape[dim], axes[name].index, axes[name].size)
            x = collectives.shard_along(pad_whole(x, dim, axes[name].size), axes[name], dim, 1).narrow(dim, 0, rows)
        elif name not in skipped and axes[name].size > 1:
            x = collectives.shard_along(x, axes[name], dim, outer, zigzag=layout[axis].zigzag)
    return x


def gather_whole(x: Tensor, layout: Layout, mesh: Mesh, axes: Mapping[str, Axis]) -> Tensor:
    """The whole tensor, of which `x` is this rank's part; a collective, so every rank must call it. Not differentiable."""
    for axis, dim, outer in reversed(split_steps(layout, mesh)):
        x = join_parts(axes[mesh.names[axis]].all_gather(x), dim, outer, zigzag=layout[axis].zigzag)
    return x


def placements_of(layout: Layout, mesh: Mesh) -> tuple[Placement, ...]:
    """The DTensor placements of a tensor that is stored in a layout."""
    placements: list[Placement] = [Replicate()] * len(layout)
    for axis, dim, outer in split_steps(layout, mesh):
        assert not layout[axis].zigzag, "what is stored or handed over as a DTensor isn't split zigzag"
        placements[axis] = Shard(dim) if outer == 1 else StridedShard(dim, split_factor=outer)
    return tuple(placements)


def as_dtensor(local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]) -> DTensor:
    """The DTensor of global sizes `shape` whose part on this rank is `local`, without communication.

    It is differentiable, except for a scalar with a placement that isn't torch's own.
    """
    if not shape and not all(placement.is_replicate() or placement.is_partial() for placement in placements):
        # ``from_local`` ignores the sizes of a scalar, and would derive them from the part.
        return torch_compat.make_dtensor(local, mesh, placements, (), ())
    # The strides of a contiguous tensor of these sizes, without making one.
    stride = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def placement_steps(placements: Sequence[Placement]) -> tuple[AxisSplit, ...]:
    """The splits that a DTensor's placements mean, first axis first."""
    steps: list[AxisSplit] = []
    for axis, placement in enumerate(placements):
        if isinstance(placement, StridedShard):
            steps.append((axis, placement.dim, int(placement.split_factor)))
        elif isinstance(placement, Shard):
            steps.append((axis, placement.dim, 1))
    return tuple(steps)


# --- what torch's DTensor can't do with strided shards ----------------------------------------------------------------------
#
# A fused weight (three heads head_dim) under tensor parallelism and ZeRO is strided along one or two mesh axes. torch 2.13
# then (a) refuses to checkpoint it, because it takes a rank's part for one box of the whole tensor ("overlapping chunks"),
# (b) gathers it in a wrong order, silently, when two axes split one dim and both are strided, (c) can't go from a plain shard
# to a strided one, and (d) loads a wrong part, silently, under ``StateDictOptions(broadcast_from_rank0=True)``. Optimizer
# states and gradients are plain DTensors that reach these functions without passing through our module, so torch's own
# functions are replaced for these cases; every other DTensor gets torch's result.


def _has_strided(placements: Sequence[Placement]) -> bool:
    return any(isinstance(placement, StridedShard) for placement in placements)


def _is_crossed(placements: Sequence[Placement]) -> bool:
    """Whether two axes split one dim and one of them is strided."""
    dims = [step[1] for step in placement_steps(placements)]
    strided = {placement.dim for placement in placements if isinstance(placement, StridedShard)}
    return any(dims.count(dim) > 1 for dim in strided)


def _is_to_strided(placements: tuple[Placement, ...], target: tuple[Placement, ...]) -> bool:
    return _has_strided(target) and target != placements


def is_beyond_torch(placements: tuple[Placement, ...], target: tuple[Placement, ...]) -> bool:
    """Whether torch's own redistribution from `placements` to `target` is refused or wrong, so that `redistribute` does it here."""
    return _is_crossed(placements) or _is_to_strided(placements, target)


TORCH_REDISTRIBUTE = DTensor.redistribute
TORCH_FULL_TENSOR = DTensor.full_tensor
_WRITE_ITEMS: Callable[..., Any] = DTensor.__create_write_items__
_CHUNK_LIST: Callable[..., Any] = DTensor.__create_chunk_list__
_TENSOR_SHARD: Callable[..., Any] = DTensor.__get_tensor_shard__


def redistribute(
    self: DTensor, device_mesh: DeviceMesh | None = None, placements: Sequence[Placement] | None = None, **options: Any
) -> DTensor:
    """``DTensor.redistribute``, also for strided shards."""
    target = tuple(self.placements if placements is None else placements)
    if not is_beyond_torch(self.placements, target) or device_mesh not in (None, self.device_mesh):
        return TORCH_REDISTRIBUTE(self, device_mesh, placements, **options)
    mesh, replicate = self.device_mesh, [Replicate()] * self.device_mesh.ndim
    axes = [GroupAxis(str(axis), mesh.get_group(axis)) for axis in range(mesh.ndim)]
    if _is_crossed(self.placements):
        whole = self.to_local()
        for axis, dim, outer in reversed(placement_steps(self.placements)):
            whole = collectives.gather_along(whole, axes[axis], dim, outer)
    else:
        whole = TORCH_REDISTRIBUTE(self, mesh, replicate).to_local()
    if _is_to_strided(self.placements, target):
        for axis, dim, outer in placement_steps(target):
            whole = collectives.shard_along(whole, axes[axis], dim, outer)
        return as_dtensor(whole, mesh, target, self.shape)
    return TORCH_REDISTRIBUTE(as_dtensor(whole, mesh, replicate, self.shape), mesh, target, **options)


def full_tensor(self: DTensor, **options: Any) -> Tensor:
    """``DTensor.full_tensor``, also for strided shards."""
    if _is_crossed(self.placements):
        self = redistribute(self, placements=[Replicate()] * self.device_mesh.ndim)
    return TORCH_FULL_TENSOR(self, **options)


def _runs(size: int, splits: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The contiguous runs of a dim that a rank has after some splits.

    Args:
        size: of the whole dim.
        splits: per split (number of outer blocks, number of parts, index of this rank's part), in order.

    Returns (start in the whole dim, length, start in the part) per run.
    """
    indices = torch.arange(size)
    for outer, parts, part in splits:
        indices = indices.view(outer, parts, -1)[:, part].flatten()
    cuts = [0, *(torch.nonzero(indices.diff() != 1).flatten() + 1).tolist(), indices.numel()]
    return [(int(indices[start]), end - start, start) for start, end in itertools.pairwise(cuts)]


def _boxes(x: DTensor) -> list[tuple[ChunkStorageMetadata, tuple[slice, ...]]] | None:
    """The boxes of the whole tensor that this rank has, each with its slices in the part; None without strided shards."""
    coordinate = x.device_mesh.get_coordinate()
    if coordinate is None or not _has_strided(x.placements):
        return None
    splits_of_dims: list[list[tuple[int, int, int]]] = [[] for _ in x.shape]
    for axis, dim, outer in placement_steps(x.placements):
        splits_of_dims[dim].append((outer, x.device_mesh.size(axis), coordinate[axis]))
    boxes = []
    for runs in itertools.product(*(_runs(size, splits) for size, splits in zip(x.shape, splits_of_dims, strict=True))):
        box = ChunkStorageMetadata(torch.Size(start for start, _, _ in runs), torch.Size(length for _, length, _ in runs))
        boxes.append((box, tuple(slice(start, start + length) for _, length, start in runs)))
    return boxes


def create_write_items(self: DTensor, fqn: str, whole: Any) -> Any:
    """``DTensor.__create_write_items__``: what a checkpoint writes of this rank's part."""
    boxes = _boxes(self)
    if boxes is None:
        return _WRITE_ITEMS(self, fqn, whole)
    properties = TensorProperties.create_from_tensor(self.to_local())
    return [
        WriteItem(MetadataIndex(fqn, box.offsets), WriteItemType.SHARD, tensor_data=TensorWriteData(box, properties, self.size()))
        for box, _ in boxes
    ]


def create_chunk_list(self: DTensor) -> Any:
    """``DTensor.__create_chunk_list__``: the boxes of the whole tensor that a checkpoint reads for this rank."""
    boxes = _boxes(self)
    return _CHUNK_LIST(self) if boxes is None else [box for box, _ in boxes]


def get_tensor_shard(self: DTensor, index: MetadataIndex) -> Any:
    """``DTensor.__get_tensor_shard__``: the view of this rank's part that a box of the whole tensor is."""
    boxes = _boxes(self)
    if boxes is None:
        return _TENSOR_SHARD(self, index)
    for box, slices in boxes:
        if box.offsets == index.offset:
            return self.to_local()[slices]
    raise ValueError(f"{index.fqn} has no box at {index.offset} on this rank")


_DISTRIBUTE_TENSORS: Callable[..., None] = state_dict_utils._distribute_tensors


def distribute_tensors(states: dict[str, Any], keys: Sequence[str], *options: Any, **more_options: Any) -> None:
    """Torch's function of the same name, also for strided shards: each rank cuts its parts out of whole tensors."""
    for key in keys:
        state = states.get(key)
        if state is None or isinstance(state, Tensor):
            continue
        # A pair (what to fill, whole value), until the value has been cut.
        target, part = state
        coordinate = target.device_mesh.get_coordinate()
        if coordinate is None or not _has_strided(target.placements):
            continue
        for axis, dim, outer in placement_steps(target.placements):
            part = take_part(part, dim, outer, coordinate[axis], target.device_mesh.size(axis))
        if target.is_meta:
            target = as_dtensor(part, target.device_mesh, target.placements, target.shape)
        else:
            target.to_local().copy_(part)
        states[key] = target
    _DISTRIBUTE_TENSORS(states, keys, *options, **more_options)


@functools.cache
def teach_strided_shards() -> None:
    """Replace torch's methods so that DTensors with strided shards are gathered, redistributed and checkpointed right.

    A second call changes nothing.
    """
    for name, method in (
        ("redistribute", redistribute),
        ("full_tensor", full_tensor),
        ("__create_write_items__", create_write_items),
        ("__create_chunk_list__", create_chunk_list),
        ("__get_tensor_shard__", get_tensor_shard),
    ):
        setattr(DTensor, name, method)
    state_dict_utils._distribute_tensors = distribute_tensors  # type: ignore[assignment]
