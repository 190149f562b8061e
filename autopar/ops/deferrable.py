"""The operators whose weight gradients can wait: functions with the names and arguments of the aten operators that they replace.

Comes in: an operator's own arguments. Goes out: its result; the gradient of the weight, and of the bias, is left to the current `Deferred`
of `autopar.ops.weight_gradients`. Where the weight needs no gradient, and where gradients are off, the aten operator itself runs. The table
at the end is what a program's rewrite replaces; adding an operator is a function here and a row there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from autopar.ops.padded import run_padded
from autopar.ops.weight_gradients import Gradients, Product, defer

aten = torch.ops.aten


def _can_wait(weight: Tensor) -> bool:
    """Whether the weight gets a gradient at all, so that there is something to defer."""
    return torch.is_grad_enabled() and weight.requires_grad and weight.is_floating_point()


def _is_trained(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad


# --- products -----------------------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``aten.linear``: x is (..., in), weight (out, in), bias (out,)."""
    if not _can_wait(weight):
        return aten.linear.default(x, weight, bias)  # type: ignore[no-any-return]
    return defer(aten.linear.default, partial(_of_linear, _is_trained(bias)), x, weight, bias, product=_LINEAR)


_LINEAR = Product(aten.linear.default, lambda gradient, weight: gradient @ weight)


def _of_linear(has_bias: bool, x: Tensor, gradient: Tensor) -> Gradients:
    x_rows, gradient_rows = _as_rows(x), _as_rows(gradient)
    return gradient_rows.T @ x_rows, gradient_rows.sum(0) if has_bias else None


def addmm(bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``aten.addmm``: x is (rows, in), weight (in, out), bias what broadcasts to (rows, out)."""
    if not _can_wait(weight):
        return aten.addmm.default(bias, x, weight, beta=beta, alpha=alpha)  # type: ignore[no-any-return]

    def operator(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return aten.addmm.default(bias, x, weight, beta=beta, alpha=alpha)  # type: ignore[no-any-return]

    shape = tuple(bias.shape) if _is_trained(bias) else None
    product = _ADDMM if beta == alpha == 1 else None
    return defer(operator, partial(_of_addmm, shape, beta, alpha), x, weight, bias, product=product)


_ADDMM = Product(lambda x, weight, bias: aten.addmm.default(bias, x, weight), lambda gradient, weight: gradient @ weight.T)


def _of_addmm(bias: tuple[int, ...] | None, beta: float, alpha: float, x: Tensor, gradient: Tensor) -> Gradients:
    for_weight = x.T @ gradient
    # Of a bias of the result's size it is the gradient itself, which others may use too: as a view it counts as a user of the storage.
    for_bias = None if bias is None else gradient.sum_to_size(bias).view(bias)
    return _times(for_weight, alpha), None if for_bias is None else _times(for_bias, beta)


def mm(x: Tensor, weight: Tensor) -> Tensor:
    """``aten.mm``: x is (rows, in), weight (in, out)."""
    return _matrix_product(aten.mm.default, x, weight, _MM)


_MM = Product(aten.mm.default, lambda gradient, weight: gradient @ weight.T)


def bmm(x: Tensor, weight: Tensor) -> Tensor:
    """``aten.bmm``: x is (batch, rows, in), weight (batch, in, out)."""
    return _matrix_product(aten.bmm.default, x, weight)


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """``aten.matmul``: x and weight have any number of dims; those before the last two are broadcast."""
    return _matrix_product(aten.matmul.default, x, weight)


def _matrix_product(operator: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, product: Product | None = None) -> Tensor:
    if not _can_wait(weight):
        return operator(x, weight)
    return defer(operator, partial(_of_matrix_product, tuple(weight.shape)), x, weight, product=product)


def _of_matrix_product(weight: tuple[int, ...], x: Tensor, gradient: Tensor) -> Gradients:
    if len(weight) == 1:
        return (_of_matrix_product((*weight, 1), x, gradient.unsqueeze(-1))[0].squeeze(-1),)  # type: ignore[union-attr]
    if x.dim() == 1:
        x, gradient = x.unsqueeze(0), gradient.unsqueeze(-2)
    if len(weight) == 2:
        return (_as_rows(x).T @ _as_rows(gradient),)
    return ((x.mT @ gradient).sum_to_size(weight),)


def _as_rows(x: Tensor) -> Tensor:
    """A matrix: all dims but the last flattened into one."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


# --- convolutions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Window:
    """The sizes of a convolution, as its gradient needs them.

    Attributes:
        weight: the weight's shape.
        bias: the bias' shape; None when it needs no gradient.
        stride, padding, dilation, output_padding: a number per spatial dim.
        transposed: whether it is a transposed convolution.
        groups: number of groups.
    """

    weight: tuple[int, ...]
    bias: tuple[int, ...] | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


def convolution(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """``aten.convolution``: x is (batch, in, ...), weight (out, in / groups, ...) or, transposed, (in, out / groups, ...)."""
    return _convolve(aten.convolution.default, x, weight, *rest)


def conv1d(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """``aten.conv1d``, sizes as `convolution`; the batch may be left out."""
    return _convolve(aten.conv1d.default, x, weight, *rest)


def conv2d(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """``aten.conv2d``, as `conv1d`."""
    return _convolve(aten.conv2d.default, x, weight, *rest)


def conv3d(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """``aten.conv3d``, as `conv1d`."""
    return _convolve(aten.conv3d.default, x, weight, *rest)


def padded_conv1d(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """`autopar.ops.padded.padded_conv1d`."""
    return run_padded(conv1d, x, weight, *rest)


def conv_transpose1d(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """``aten.conv_transpose1d``, as `conv1d`."""
    return _convolve(aten.conv_transpose1d.default, x, weight, *rest)


def conv_transpose2d(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """``aten.conv_transpose2d.input``, as `conv1d`."""
    return _convolve(aten.conv_transpose2d.input, x, weight, *rest)


def conv_transpose3d(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """``aten.conv_transpose3d.input``, as `conv1d`."""
    return _convolve(aten.conv_transpose3d.input, x, weight, *rest)


def _convolve(target: torch._ops.OpOverload, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    if not _can_wait(weight):
        return target(x, weight, *rest)  # type: ignore[no-any-return]
    given = _defaults(target) | dict(zip(_defaults(target), rest, strict=False))
    bias = given["bias"]
    window = _Window(
        weight=tuple(weight.shape),
        bias=tuple(bias.shape) if _is_trained(bias) else None,
        stride=_per_spatial_dim(given["stride"], weight),
        padding=_per_spatial_dim(given["padding"], weight),
        dilation=_per_spatial_dim(given["dilation"], weight),
        transposed=given.get("transposed", "output_padding" in given),
        output_padding=_per_spatial_dim(given.get("output_padding", (0,)), weight),
        groups=given["groups"],
    )

    def operator(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return target(x, weight, bias, *rest[1:])  # type: ignore[no-any-return]

    return defer(operator, partial(_of_convolution, window), x, weight, bias)


@cache
def _defaults(target: torch._ops.OpOverload) -> dict[str, Any]:
    """The defaults of the arguments that follow input and weight, by name; None where an argument has no default."""
    return {argument.name: argument.default_value for argument in target._schema.arguments[2:]}


def _per_spatial_dim(value: Sequence[int], weight: Tensor) -> tuple[int, ...]:
    """A number per spatial dim; a single number holds for all of them."""
    return tuple(value) * (weight.dim() - 2) if len(value) == 1 else tuple(value)


def _of_convolution(window: _Window, x: Tensor, gradient: Tensor) -> Gradients:
    if x.dim() < len(window.weight):
        x, gradient = x.unsqueeze(0), gradient.unsqueeze(0)
    # Only the sizes of this weight are read.
    weight = gradient.new_empty(1).expand(window.weight)
    output_mask = [False, True, window.bias is not None]
    _, for_weight, for_bias = aten.convolution_backward.default(
        gradient,
        x,
        weight,
        window.bias,
        window.stride,
        window.padding,
        window.dilation,
        window.transposed,
        window.output_padding,
        window.groups,
        output_mask,
    )
    return for_weight, for_bias


# --- tables -------------------------------------------------------------------------------------------------------------


def embedding(weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False) -> Tensor:
    """``aten.embedding``: weight is (rows, width), indices of any shape. A sparse gradient isn't deferred."""
    if not _can_wait(weight) or sparse:
        return aten.embedding.default(weight, indices, padding_idx, scale_grad_by_freq, sparse)  # type: ignore[no-any-return]

    def operator(indices: Tensor, weight: Tensor) -> Tensor:
        return aten.embedding.default(weight, indices, padding_idx, scale_grad_by_freq)  # type: ignore[no-any-return]

    return defer(operator, partial(_of_embedding, weight.shape[0], padding_idx, scale_grad_by_freq), indices, weight)


def _of_embedding(rows: int, padding_idx: int, scale_grad_by_freq: bool, indices: Tensor, gradient: Tensor) -> Gradients:
    return (aten.embedding_dense_backward.default(gradient, indices, rows, padding_idx, scale_grad_by_freq),)


DEFERRABLE: Mapping[str, Callable[..., Tensor]] = {
    "aten.linear.default": linear,
    "aten.addmm.default": addmm,
    "aten.mm.default": mm,
    "aten.bmm.default": bmm,
    "aten.matmul.default": matmul,
    "aten.convolution.default": convolution,
    "aten.conv1d.default": conv1d,
    "aten.conv2d.default": conv2d,
    "aten.conv3d.default": conv3d,
    "autopar.padded_conv1d.default": padded_conv1d,
    "aten.conv_transpose1d.default": conv_transpose1d,
    "aten.conv_transpose2d.input": conv_transpose2d,
    "aten.conv_transpose3d.input": conv_transpose3d,
    "aten.embedding.default": embedding,
}
"""Name of an operator -> the function that replaces it in calls that can wait (`autopar.structure.weights.is_deferrable`).

The rules of these operators, and of no others, say which operands are their weights (`autopar.ir.facts.Facts.weights`).
"""
