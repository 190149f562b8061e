"""Methods of torch's DTensor that refuse to work, or do nothing in silence, and work on the whole tensor here.

Comes in: DTensors, such as the parameters of a compiled model. Goes out: what the method of a plain tensor gives. ``x.data = value``
takes effect; ``x.numpy()``, ``x.tolist()`` and ``f"{x:.3f}"`` show the whole tensor, which is gathered, so every rank must call them.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from autopar import torch_compat
from autopar.errors import InputError
from autopar.runtime.dispatch import as_stored, gather, is_ours

_TORCH_DATA: Any = Tensor.data


def _get_data(self: DTensor) -> Any:
    return _TORCH_DATA.__get__(self)


def _set_data(self: DTensor, value: Tensor) -> None:
    """``x.data = value``: `x` shares the storage of a DTensor that is stored as it is, or of its part of another value."""
    if not is_ours(self.device_mesh):
        _TORCH_DATA.__set__(self, value)
        return
    if value.shape != self.shape:
        raise InputError(
            f"a tensor of sizes {tuple(self.shape)} that ranks store parts of keeps its sizes: {tuple(value.shape)} was assigned"
        )
    stored: DTensor = as_stored(value.detach(), self)
    # Torch exchanges what it knows of the whole tensor, such as the dtype, and leaves the part as it was.
    _TORCH_DATA.__set__(self, stored)
    torch_compat.exchange_part(self, torch_compat.local_of(stored), stored._spec)


def _numpy(self: DTensor, *, force: bool = False) -> Any:
    return _require_no_grad(self, force).numpy(force=force)


def _require_no_grad(x: DTensor, force: bool) -> Tensor:
    """The whole tensor; raises torch's own error for one with a gradient, as ``numpy`` of a plain tensor does."""
    if x.requires_grad and not force:
        raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
    return gather(x)


def _tolist(self: DTensor) -> Any:
    return gather(self).tolist()


def _format(self: DTensor, spec: str) -> str:
    """A scalar as its number, as a plain tensor does."""
    return format(self.item() if spec and self.dim() == 0 else str(self), spec)


@functools.cache
def teach_methods() -> None:
    """Replace these methods of DTensor; a second call changes nothing."""
    for name, method in (
        ("data", property(_get_data, _set_data)),
        ("numpy", _numpy),
        ("tolist", _tolist),
        ("__format__", _format),
        ("__array__", _array),
    ):
        setattr(DTensor, name, method)


def _array(self: DTensor, dtype: Any = None, *_: Any, **__: Any) -> Any:
    whole = self.numpy()
    return whole if dtype is None else whole.astype(dtype, copy=False)
