"""Random ops: every part of a tensor draws from a stream of its own, replicas of a part draw from the same stream.

Comes in: the op's own arguments, of this rank's part, and ``splits`` (`autopar.ops.kernels`). Goes out: this rank's part of the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from autopar.ops import rng
from autopar.ops.losses import Splits, all_axes


def dropout(x: Tensor, p: float, train: bool, *, splits: Splits) -> Tensor:
    """Dropout, with a mask that is this part's own."""
    with rng.stream(all_axes(splits), x.device):
        return F.dropout(x, p, train)


def bernoulli(x: Tensor, *args: Any, splits: Splits, **kwargs: Any) -> Tensor:
    """Zeros and ones; 1 has the probability `x`, per element, or the common probability among the arguments."""
    with rng.stream(all_axes(splits), x.device):
        return torch.bernoulli(x, *args, **kwargs)


def rand_like(x: Tensor, *, splits: Splits, **kwargs: Any) -> Tensor:
    """Uniform numbers in the shape of this part of a tensor."""
    with rng.stream(all_axes(splits), x.device):
        return torch.rand_like(x, **kwargs)


def randn_like(x: Tensor, *, splits: Splits, **kwargs: Any) -> Tensor:
    """Normal numbers in the shape of this part of a tensor."""
    with rng.stream(all_axes(splits), x.device):
        return torch.randn_like(x, **kwargs)


def rand(size: Sequence[int], *, splits: Splits, device: Any = None, **kwargs: Any) -> Tensor:
    """Uniform numbers; `size` is the shape of this part."""
    with rng.stream(all_axes(splits), torch.device(device or "cpu")):
        return torch.rand(size, device=device, **kwargs)


def randn(size: Sequence[int], *, splits: Splits, device: Any = None, **kwargs: Any) -> Tensor:
    """Normal numbers; `size` is the shape of this part."""
    with rng.stream(all_axes(splits), torch.device(device or "cpu")):
        return torch.randn(size, device=device, **kwargs)


def draw(op: Callable[..., Any], *args: Any, splits: Splits, **kwargs: Any) -> Any:
    """A random operator itself, on this part of its tensors: for operators that take nothing which depends on the part.

    Operators without a rule run whole on every rank, so `splits` is empty and all ranks draw the same.
    """
    tensors = (value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor))
    device = next((tensor.device for tensor in tensors), torch.device(kwargs.get("device") or "cpu"))
    with rng.stream(all_axes(splits), device):
        return op(*args, **kwargs)
