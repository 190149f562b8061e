"""Torch's own modules under capture: those that read values of tensors do the same without.

Comes in: nothing. Goes out: within `readable_modules`, transformer layers that don't look at their masks, and batch norms that average over
all batches so far with tensors alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def readable_modules() -> Iterator[None]:
    """Inside, torch's modules can be exported that otherwise read values of tensors."""
    transformer = torch.nn.modules.transformer
    detect, normalize = transformer._detect_is_causal_mask, _BatchNorm.forward

    @functools.wraps(normalize)  # inputs are named by the signature
    def forward(module: _BatchNorm, *args: Tensor, **kwargs: Tensor) -> Tensor:
        is_cumulative = module.training and module.momentum is None and module.num_batches_tracked is not None
        return _average_over_batches(module, *args, *kwargs.values()) if is_cumulative else normalize(module, *args, **kwargs)

    transformer._detect_is_causal_mask = _trust_flag
    _BatchNorm.forward = forward  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = detect
        _BatchNorm.forward = normalize  # type: ignore[method-assign]


def _trust_flag(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    """Instead of comparing a mask with a causal one; `autopar.capture.masks` does so later."""
    return bool(is_causal)


def _average_over_batches(module: _BatchNorm, x: Tensor) -> Tensor:
    """A batch norm with ``momentum=None``, whose running statistics are averages over all batches: it divides by their number, a buffer."""
    module._check_input_dim(x)  # type: ignore[no-untyped-call]
    number, mean, variance = module.num_batches_tracked, module.running_mean, module.running_var
    assert number is not None, "it counts batches"
    assert mean is not None, "it averages means"
    assert variance is not None, "it averages variances"
    with torch.no_grad():
        number.add_(1)
        dims = [dim for dim in range(x.ndim) if dim != 1]
        count = x.numel() // x.shape[1]
        batch_mean = x.mean(dims, keepdim=True)
        batch_variance = (x - batch_mean).square().mean(dims) * (count / max(count - 1, 1))  # one value per channel is refused below
        share = 1.0 / number.to(mean.dtype)
        mean.add_((batch_mean.flatten().to(mean.dtype) - mean) * share)
        variance.add_((batch_variance.to(variance.dtype) - variance) * share)
    return nn.functional.batch_norm(x, None, None, module.weight, module.bias, True, 0.0, module.eps)
