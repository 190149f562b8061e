"""Whole states for files of their own, and what becomes of a part that is saved by itself.

Comes in: a compiled model, its optimizer, DTensors that are pickled. Goes out: plain tensors. `full_state_dict` gathers one tensor at a
time onto the first rank. ``torch.save`` runs on one rank alone and can't gather: it saves what every rank has whole as a plain tensor, and
of other tensors this rank's part, with a note whose part it is, so that loading it elsewhere is an error instead of a wrong weight.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.optim import Optimizer

from autopar import torch_compat
from autopar.errors import InputError
from autopar.runtime.dispatch import adopt, find_ours, gather, is_ours
from autopar.runtime.owned import Owned
from autopar.runtime.world import rank
from autopar.torch_compat import StridedShard

REMEDY = "autopar.full_state_dict(model) gives whole tensors to save on the first rank, and torch.distributed.checkpoint saves all parts"


def full_state_dict(source: nn.Module | Optimizer | Mapping[str, Any]) -> dict[str, Any]:
    """The state of a model or an optimizer as one device has it: plain tensors on the CPU, on the first rank; empty on the others.

    Every rank must call it. Whole tensors are gathered one after the other, so no other rank needs memory for more than the largest. Files
    of such states load into models and optimizers that aren't compiled, and with ``load_state_dict`` into compiled ones of any plan.

    Args:
        source: the module or optimizer, or any nest of dicts, lists, tuples, dataclasses and tensors, such as a moving average of weights.

    Raises InputError for a model on the meta device, which has no values before its first plan.
    """
    if isinstance(source, nn.Module):
        # Tied parameters are one object under several names only as they are, not detached.
        state: Any = source.state_dict(keep_vars=True)
    else:
        state = source.state_dict() if isinstance(source, Optimizer) else source
    is_first = rank() == 0
    whole = _gather_nest(state, is_first, {})
    return whole if is_first else {}


def _gather_nest(x: Any, is_first: bool, whole_of: dict[int, tuple[Tensor, Tensor]]) -> Any:
    """The nest with whole tensors on the CPU on the first rank; anything on the others, which take part in gathering."""
    if isinstance(x, Tensor):
        if id(x) not in whole_of:
            if x.is_meta:
                raise InputError("a tensor on the meta device has no values to save yet: the model gets them with its first plan")
            whole = gather(x) if isinstance(x, DTensor) else x.detach()
            # A copy, so that later steps don't change it. The tensor itself is noted too: its id stays its own while it lives.
            whole_of[id(x)] = x, (whole.cpu() if whole.device.type != "cpu" else whole.clone()) if is_first else whole.new_empty(0)
        return whole_of[id(x)][1]
    if isinstance(x, Mapping):
        made: dict[Any, Any] = OrderedDict() if isinstance(x, OrderedDict) else {}
        for key, value in x.items():
            made[key] = _gather_nest(value, is_first, whole_of)
        if hasattr(x, "_metadata"):
            made._metadata = x._metadata  # type: ignore[attr-defined]
        return made
    if isinstance(x, list | tuple):
        items = [_gather_nest(item, is_first, whole_of) for item in x]
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        copied = copy.copy(x)
        for field in dataclasses.fields(x):
            object.__setattr__(copied, field.name, _gather_nest(getattr(x, field.name), is_first, whole_of))
        return copied
    return x


# --- pickling -----------------------------------------------------------------------------------------------------------------------

_TORCH_REDUCE: Any = DTensor.__reduce_ex__

_Text = tuple[str, int, int]
"""A placement as plain data, which loads under ``weights_only``: (kind, dim or owner, outer blocks)."""


def _reduce(self: DTensor, protocol: Any) -> Any:
    """What pickle saves of a DTensor: of a compiled model's, a plain tensor where it is whole, else a part that knows its place."""
    mesh = self.device_mesh
    if not is_ours(mesh) or type(self) is not DTensor:
        return _TORCH_REDUCE(self, protocol)
    local = torch_compat.local_of(self)
    if all(mesh.size(axis) == 1 or isinstance(placement, Replicate) for axis, placement in enumerate(self.placements)):
        whole = nn.Parameter(local, self.requires_grad) if isinstance(self, nn.Parameter) else local
        return whole.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]
    _warn_once()
    placements = [_to_text(placement) for placement in self.placements]
    names, where = list(mesh.mesh_dim_names or ()), list(mesh.get_coordinate() or ())
    return load_part, (
        local,
        tuple(self.shape),
        tuple(self.stride()),
        placements,
        list(mesh.shape),
        names,
        where,
        isinstance(self, nn.Parameter),
    )


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        f"this pickles a tensor of which rank {rank()} has a part: the file loads on this rank of this mesh only. {REMEDY}", stacklevel=4
    )


def load_part(
    local: Tensor,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    placements: list[_Text],
    sizes: list[int],
    names: list[str],
    where: list[int],
    is_parameter: bool,
) -> DTensor:
    """A DTensor from a pickled part. Raises InputError on another rank than the one that saved it, or on another mesh."""
    axes = ", ".join(f"{name}={size}" for name, size in zip(names, sizes, strict=True))
    place = ", ".join(f"{name}={index}" for name, index in zip(names, where, strict=True))
    what = f"the file holds the part of a tensor {shape} that one rank stored, at {place} of the mesh ({axes})"
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError(f"{what}, not the tensor: {REMEDY}")
    mesh = find_ours(tuple(sizes), tuple(names))
    if mesh is None:
        if torch.Size(sizes).numel() != dist.get_world_size():
            raise InputError(f"{what}, and {dist.get_world_size()} ranks are running: {REMEDY}")
        mesh = _form_mesh(local.device.type, sizes, names)
    if list(mesh.get_coordinate() or ()) != where:
        raise InputError(f"{what}; this is rank {dist.get_rank()}, which stores another part: {REMEDY}")
    loaded = torch_compat.make_dtensor(local, mesh, [_from_text(text) for text in placements], shape, stride)
    return nn.Parameter(loaded) if is_parameter else loaded  # type: ignore[return-value]


def _form_mesh(device_type: str, sizes: list[int], names: list[str]) -> DeviceMesh:
    mesh = init_device_mesh(device_type, tuple(sizes), mesh_dim_names=tuple(names))
    adopt(mesh)
    return mesh


def _to_text(placement: Placement) -> _Text:
    if isinstance(placement, Owned):
        return "owned", placement.index, 1
    if isinstance(placement, StridedShard):
        return "strided", placement.dim, int(placement.split_factor)
    if isinstance(placement, Shard):
        return "shard", placement.dim, 1
    if isinstance(placement, Replicate):
        return "replicate", 0, 1
    raise InputError(f"a tensor placed as {placement}, whose parts must be summed, can't be pickled: x.full_tensor() is the whole")


def _from_text(text: _Text) -> Placement:
    kind, number, outer = text
    if kind == "owned":
        return Owned(number)
    if kind == "strided":
        return StridedShard(number, split_factor=outer)
    return Shard(number) if kind == "shard" else Replicate()


_TORCH_STORAGE: Any = DTensor.storage


def _storage(self: DTensor) -> Any:
    """Raises InputError for a compiled model's tensors: libraries that write files ask for a tensor's storage."""
    if is_ours(self.device_mesh):
        raise InputError(f"a tensor of which every rank stores a part has no storage to write to a file: {REMEDY}")
    return _TORCH_STORAGE(self)


@functools.cache
def teach_pickling() -> None:
    """Let DTensors be pickled so; a second call changes nothing."""
    setattr(DTensor, "__reduce_ex__", _reduce)  # noqa: B010
    setattr(DTensor, "storage", _storage)  # noqa: B010
    torch.serialization.add_safe_globals([load_part])
