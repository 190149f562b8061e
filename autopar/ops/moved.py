"""Element types that process groups don't know, moved as others of the same width."""

from __future__ import annotations

import torch
from torch import Tensor

# Element types that move between ranks but that gloo or nccl don't know -> a type of the same width that they do.
_MOVED_AS = {
    torch.bool: torch.uint8,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2: torch.uint8,
    torch.int16: torch.float16,
    torch.uint16: torch.float16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
    torch.complex32: torch.int32,
    torch.complex64: torch.int64,
}


def as_moved(x: Tensor) -> Tensor:
    """The same bits in a type that moves; a number of 16 bytes becomes two in a last dim."""
    x = x.resolve_conj()
    return torch.view_as_real(x) if x.dtype is torch.complex128 else x.view(_MOVED_AS.get(x.dtype, x.dtype))


def from_moved(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What `as_moved` was given, which was of this dtype."""
    return torch.view_as_complex(x) if dtype is torch.complex128 else x.view(dtype)
