"""The operator ``autopar::padded_conv1d``: a convolution whose padding differs at both ends, as that of one that looks back does.

Comes in: an input that models pad, or a result that they cut, before or behind torch's convolution (`autopar.capture.padding`). Goes out:
one op in the captured graph whose input and result are made of the same parts, so that both can be split alike. The operator is
CompositeImplicitAutograd: `torch.export`'s training IR has it as one call, and autograd sees the torch operators inside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten

_LIBRARY = torch.library.Library("autopar", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "padded_conv1d(Tensor x, Tensor weight, Tensor? bias, int stride, int before, int behind, int dilation, int groups) -> Tensor"
)


def padded_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, before: int, behind: int, dilation: int, groups: int
) -> Tensor:
    """A convolution over one dim.

    Args:
        x: (batch, channels, length).
        weight: (features, channels / groups, size).
        bias: (features,) or None.
        stride: distance of two positions of the result.
        before: number of zeros that are added before the first element.
        behind: number of those behind the last one.
        dilation: distance of the elements that a position reads.
        groups: of channels.
    """
    return run_padded(aten.conv1d.default, x, weight, bias, stride, before, behind, dilation, groups)


def run_padded(
    convolve: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    before: int,
    behind: int,
    dilation: int,
    groups: int,
) -> Tensor:
    """`padded_conv1d` by a function with the arguments of ``aten.conv1d``.

    The function pads both ends alike, and what is too much is cut off the result: a padded copy of the input would be saved.
    """
    most = max(before, behind)
    if (most - before) % stride:
        return convolve(F.pad(x, (before, behind)), weight, bias, [stride], [0], [dilation], groups)
    positions = (x.shape[2] + before + behind - dilation * (weight.shape[2] - 1) - 1) // stride + 1
    return convolve(x, weight, bias, [stride], [most], [dilation], groups).narrow(2, (most - before) // stride, positions)


_LIBRARY.impl("padded_conv1d", padded_conv1d, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
