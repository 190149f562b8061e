"""A DTensor placement for what lives on one rank of a mesh axis: that rank has all of it, the others have parts of size zero.

Comes in: DTensors with `Owned` among their placements. Goes out: torch's own results for them, since to every rank they are whole tensors
of one global shape: optimizers, gradient clipping and checkpoints work unchanged. A rank that isn't the owner has a part whose dim 0 has
size zero, and of a scalar one of shape (0,)::

    Owned(1) of a (4, 8) weight on three ranks:   rank 0: (0, 8)   rank 1: (4, 8)   rank 2: (0, 8)

Torch refuses ops on placements that it doesn't know. The first `Owned` registers how it behaves: elementwise ops and norms keep the owner,
all other ops run on gathered copies; how values move to and from it; and what of them a checkpoint holds. Tensors without it get torch's
own results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as checkpoint_state
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate

from autopar import torch_compat
from autopar.errors import InputError
from autopar.runtime import dtensor
from autopar.torch_compat import DTensorSpec, state_dict_utils, with_placements


class Owned(Placement):
    """A tensor that lives on one rank of a mesh axis: the one at `index` has all of it, every other rank a part of size zero."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self._index = index
        _register()

    @property
    def index(self) -> int:
        """The owner's position along the axis."""
        return self._index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Owned) and other.index == self.index

    def __hash__(self) -> int:
        return hash((Owned, self.index))

    def __repr__(self) -> str:
        return f"Owned({self.index})"

    def __str__(self) -> str:
        return f"O({self.index})"

    def __reduce__(self) -> tuple[type[Owned], tuple[int]]:
        return Owned, (self.index,)


AxisOwner = tuple[int, Owned]
"""A mesh axis, and the placement that names the owner along it."""


def as_owned(
    local: Tensor | None,
    device_mesh: DeviceMesh,
    k: int,
    inner_placements: Sequence[Placement],
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str,
) -> DTensor:
    """The DTensor that the ranks at position `k` of the first mesh axis own, without communication.

    Args:
        local: on the owners, their part, as `inner_placements` split it over the other axes; on other ranks it isn't read.
        device_mesh: the mesh of all ranks.
        k: the owners' position along the first axis.
        inner_placements: a placement per other axis.
        shape: global sizes.
        dtype: of all parts.
        device: where a rank that isn't an owner makes its part of size zero.

    Raises InputError when an owner's part is missing or has other sizes or another dtype, or when there is no such owner.
    """
    placements = (Owned(k), *inner_placements)
    if len(placements) != device_mesh.ndim or not 0 <= k < device_mesh.size(0):
        raise InputError(f"index {k} of the first axis and {len(inner_placements)} inner placements don't fit the mesh {device_mesh}")
    coordinate = device_mesh.get_coordinate()
    if coordinate is None or coordinate[0] != k:
        local = _empty_part(shape, device_mesh, placements, dtype, device)
    else:
        sizes = torch_compat.local_sizes(shape, device_mesh, replicated(placements))
        if local is None or tuple(local.shape) != sizes or local.dtype != dtype:
            given = "nothing" if local is None else f"{tuple(local.shape)} of {local.dtype}"
            raise InputError(f"the owner's part of a tensor {tuple(shape)} as {placements} is {sizes} of {dtype}: {given} was passed")
    return dtensor.as_dtensor(local, device_mesh, placements, shape)


def owner_of(x: Tensor) -> int | None:
    """The owner's position along its axis; None for a tensor that isn't owned."""
    axis_owner = find_owner(x.placements) if isinstance(x, DTensor) else None
    return None if axis_owner is None else axis_owner[1].index


def find_owner(placements: Sequence[Placement]) -> AxisOwner | None:
    """The mesh axis with an `Owned` placement, and that placement; None without one. Raises InputError when there are several."""
    owners = [(axis, placement) for axis, placement in enumerate(placements) if isinstance(placement, Owned)]
    if len(owners) > 1:
        raise InputError(f"a tensor has one owner, along one mesh axis: {tuple(placements)}")
    return owners[0] if owners else None


def replicated(placements: Sequence[Placement]) -> tuple[Placement, ...]:
    """The placements with Replicate for `Owned`: how the owner's part is split over the other axes."""
    return tuple(Replicate() if isinstance(placement, Owned) else placement for placement in placements)


def with_placement(spec: DTensorSpec, axis: int, placement: Placement) -> DTensorSpec:
    """The spec with another placement on one axis."""
    return with_placements(spec, (*spec.placements[:axis], placement, *spec.placements[axis + 1 :]))


def _is_owner(axis_owner: AxisOwner, mesh: DeviceMesh) -> bool:
    coordinate = mesh.get_coordinate()
    return coordinate is not None and coordinate[axis_owner[0]] == axis_owner[1].index


def _empty_part(
    shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement], dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """The part of a rank that isn't the owner: as the owner's, but of size 0 along dim 0."""
    return torch.empty((0, *torch_compat.local_sizes(shape, mesh, replicated(placements))[1:]), dtype=dtype, device=device)


# --- moving values ------------------------------------------------------------------------------------------------------------


def _redistribute_part(local: Tensor, current_spec: DTensorSpec, target_spec: DTensorSpec, **options: Any) -> Tensor:
    """This rank's part when a DTensor goes from one spec to another; replaces torch's function."""
    current_owner, target_owner = find_owner(current_spec.placements), find_owner(target_spec.placements)
    if current_owner is None and target_owner is None:
        return torch_compat.redistribute_part(local, current_spec, target_spec, **options)
    mesh, shape = current_spec.mesh, current_spec.shape
    if mesh.get_coordinate() is None:
        return local
    inner, target = (with_placements(spec, replicated(spec.placements)) for spec in (current_spec, target_spec))
    if current_owner == target_owner and current_owner is not None and not _is_owner(current_owner, mesh):
        # The process groups of all other axes consist of ranks that aren't owners, so there is nothing to exchange.
        return _empty_part(shape, mesh, target.placements, local.dtype, local.device)
    if current_owner != target_owner and current_owner is not None:
        local = _broadcast(local, current_owner, inner)
    moved = _redistribute_inner(local, inner, target, options)
    if target_owner is None or current_owner == target_owner:
        return moved
    if not _is_owner(target_owner, mesh):
        return _empty_part(shape, mesh, target.placements, local.dtype, local.device)
    return moved.clone() if moved is local else moved


def _broadcast(local: Tensor, axis_owner: AxisOwner, inner: DTensorSpec) -> Tensor:
    axis, owner = axis_owner
    if _is_owner(axis_owner, inner.mesh):
        # A copy: what comes of it must not share memory with the tensor on one rank only.
        whole = local.detach().clone(memory_format=torch.contiguous_format)
    else:
        whole = local.new_empty(torch_compat.local_sizes(inner.shape, inner.mesh, inner.placements))
    dist.broadcast(whole, group=inner.mesh.get_group(axis), group_src=owner.index)
    return whole


def _redistribute_inner(local: Tensor, current: DTensorSpec, target: DTensorSpec, options: Mapping[str, Any]) -> Tensor:
    if not dtensor.is_beyond_torch(current.placements, target.placements):
        return torch_compat.redistribute_part(local, current, target, **options)
    with torch.no_grad():
        x = dtensor.as_dtensor(local, current.mesh, current.placements, current.shape)
        return dtensor.redistribute(x, placements=target.placements).to_local()


def _redistribute(
    self: DTensor, device_mesh: DeviceMesh | None = None, placements: Sequence[Placement] | None = None, **options: Any
) -> DTensor:
    owned = find_owner(self.placements) or find_owner(placements or ())
    return (dtensor.TORCH_REDISTRIBUTE if owned else dtensor.redistribute)(self, device_mesh, placements, **options)


def _full_tensor(self: DTensor, **options: Any) -> Tensor:
    return (dtensor.TORCH_FULL_TENSOR if find_owner(self.placements) else dtensor.full_tensor)(self, **options)


# --- checkpoints --------------------------------------------------------------------------------------------------------------


def _owned_part(x: DTensor) -> DTensor | None:
    """On owners, the tensor as a DTensor without `Owned`, for torch's functions; None on the other ranks."""
    axis_owner = find_owner(x.placements)
    if axis_owner is None:
        return x
    if not _is_owner(axis_owner, x.device_mesh):
        return None
    return dtensor.as_dtensor(torch_compat.local_of(x), x.device_mesh, replicated(x.placements), x.shape)


def _create_write_items(self: DTensor, fqn: str, whole: Any) -> Any:
    owned_part = _owned_part(self)
    return [] if owned_part is None else dtensor.create_write_items(owned_part, fqn, owned_part)


def _create_chunk_list(self: DTensor) -> Any:
    owned_part = _owned_part(self)
    return [] if owned_part is None else dtensor.create_chunk_list(owned_part)


def _get_tensor_shard(self: DTensor, index: MetadataIndex) -> Any:
    owned_part = _owned_part(self)
    if owned_part is None:
        raise ValueError(f"{index.fqn} has no part on this rank")
    return dtensor.get_tensor_shard(owned_part, index)


def _distribute_tensors(states: dict[str, Any], keys: Sequence[str], *options: Any, **more_options: Any) -> None:
    for key in keys:
        state = states.get(key)
        if state is None or isinstance(state, Tensor) or find_owner(state[0].placements) is None:
            continue
        # A pair (what to fill, whole value), until the value has been cut.
        target, whole = state
        owned_part = _owned_part(target)
        if owned_part is not None:
            part: dict[str, Any] = {key: (owned_part, whole)}
            dtensor.distribute_tensors(part, [key], *options, **more_options)
            local = torch_compat.local_of(part[key])
        else:
            local = _empty_part(target.shape, target.device_mesh, target.placements, whole.dtype, whole.device)
        # Only a target on the meta device has no part to fill.
        states[key] = dtensor.as_dtensor(local, target.device_mesh, target.placements, target.shape) if target.is_meta else target
    dtensor.distribute_tensors(states, keys, *options, **more_options)


_DISTRIBUTE_TENSOR: Callable[..., DTensor] = state_dict_utils.distribute_tensor  # type: ignore[attr-defined]


def _distribute_tensor(tensor: Tensor, device_mesh: DeviceMesh, placements: Sequence[Placement], **options: Any) -> DTensor:
    if find_owner(placements) is None:
        return _DISTRIBUTE_TENSOR(tensor, device_mesh, placements, **options)
    return _DISTRIBUTE_TENSOR(tensor, device_mesh, [Replicate()] * len(placements), **options).redistribute(placements=placements)


def _keep_scalars(torch_rule: Callable[..., None]) -> Callable[..., None]:
    """Wrap torch's loading of whole states, which makes plain tensors of an optimizer's scalars, so that owned scalars stay owned."""

    def load(whole: dict[str, Any], states: dict[str, Any], *options: Any, **more_options: Any) -> None:
        owned = {key: x for key, x in states.items() if isinstance(x, DTensor) and not x.shape and owner_of(x) is not None}
        torch_rule(whole, states, *options, **more_options)
        for key, x in owned.items():
            if key in states and not isinstance(states[key], DTensor):
                with torch.no_grad():
                    states[key] = x.copy_(states[key])

    return load


@functools.cache
def _register() -> None:
    """Replace the functions and methods of torch's DTensor that must know `Owned`; a second call changes nothing."""
    from autopar.runtime.owned_rules import propagate

    dtensor.teach_strided_shards()
    for name, method in (
        ("redistribute", _redistribute),
        ("full_tensor", _full_tensor),
        ("__create_write_items__", _create_write_items),
        ("__create_chunk_list__", _create_chunk_list),
        ("__get_tensor_shard__", _get_tensor_shard),
    ):
        setattr(DTensor, name, method)
    state_dict_utils._distribute_tensors = _distribute_tensors  # type: ignore[assignment]
    state_dict_utils.distribute_tensor = _distribute_tensor  # type: ignore[assignment, attr-defined]
    for name in ("_distribute_state_dict", "_broadcast_state_dict"):
        setattr(checkpoint_state, name, _keep_scalars(getattr(checkpoint_state, name)))
    torch_compat.replace_redistribution(_redistribute_part)
    torch_compat.replace_propagation(lambda torch_rule: functools.partial(propagate, torch_rule))
