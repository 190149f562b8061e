"""The only place that touches private parts of torch, or parts whose names differ between its versions 2.11 to 2.13."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._state_dict_utils as state_dict_utils
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = [
    "StorageRef",
    "StridedShard",
    "address_of",
    "after_backward",
    "all_gather_single",
    "all_to_all_single",
    "backward_id",
    "group_over",
    "local_of",
    "reduce_scatter_single",
    "run_hooks",
    "run_post_accumulate_hooks",
    "state_dict_utils",
    "uncompiled",
]

# torch 2.13 renames the flat collectives and warns about the old names, which are all that 2.11 has.
all_gather_single: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_to_all_single: Callable[..., Any] = dist.all_to_all_single


class StorageRef:
    """Recognises the storage of a tensor without keeping it alive; `key` isn't used again while this object lives."""

    def __init__(self, x: Tensor) -> None:
        self._ref = StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]
        self.key = self.key_of(x)

    @staticmethod
    def key_of(x: Tensor) -> int:
        """What two tensors on one storage have in common."""
        return int(x.untyped_storage()._cdata)

    def expired(self) -> bool:
        """Whether no tensor uses the storage any more."""
        return bool(self._ref.expired())  # type: ignore[no-untyped-call]


def after_backward(callback: Callable[[], None]) -> None:
    """Call `callback` when the backward that runs now has ended; only to be called from within a backward."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def backward_id() -> int:
    """A number that tells the backward that runs now from every other; only to be called from within a backward."""
    return int(torch._C._current_graph_task_id())


# Makes `torch.compile` run a function as it is, in a break of its graph. The public `torch.compiler.disable` imports the compiler,
# which takes seconds, where the function is defined; this imports it at the first call, when capture has already.
uncompiled: Callable[..., Any] = _disable_dynamo


def run_hooks(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient after the user's ``register_hook`` hooks of `parameter`, which autograd itself never sees."""
    for hook in tuple((parameter._backward_hooks or {}).values()):
        changed = hook(gradient)
        gradient = gradient if changed is None else changed
    return gradient


def run_post_accumulate_hooks(parameter: Tensor) -> None:
    """Call the user's ``register_post_accumulate_grad_hook`` hooks of `parameter`."""
    hooks: Mapping[int, Callable[[Tensor], None]] = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    for hook in tuple(hooks.values()):
        hook(parameter)


def local_of(x: Tensor) -> Tensor:
    """The rank's own part of a DTensor, sharing its storage and unknown to autograd; a plain tensor as it is."""
    return x._local_tensor.detach() if isinstance(x, DTensor) else x.detach()


def address_of(x: Tensor) -> int:
    """Where the rank's own part of a tensor lies in memory."""
    return int((x._local_tensor if isinstance(x, DTensor) else x).data_ptr())


def group_over(mesh: DeviceMesh, names: tuple[str, ...]) -> dist.ProcessGroup:
    """The process group of the ranks that differ along these axes only. All ranks must ask for the same ones in one order."""
    if len(names) == 1:
        return mesh.get_group(names[0])
    return mesh[names]._flatten("_".join(names)).get_group()
