"""Convolutions of which every rank has a part of the positions: it gets what it lacks of its neighbours' parts, its halo.

Comes in: this rank's part of a tensor. Goes out: its part of the result. With a window of 4 that looks back, a rank lacks the 3 elements
before its part; beyond the ends of the whole dim there are zeros, the convolution's padding. Two ranks, a dim of 8::

    rank 0    0 0 0 | 0 1 2 3          rank 1    1 2 3 | 4 5 6 7

In the backward the gradients of a halo go back to where it came from, and are added there. A halo that is longer than a part comes from
several neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.ir import find_halo, find_pads, per_dim
from autopar.ops import comm
from autopar.ops.losses import Splits

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Halo:
    """What a rank needs beside its part of a dim.

    Attributes:
        dim: the dim of the tensor.
        before, behind: how many elements it needs before its part, and behind it.
        axis: the ranks between which the dim is split.
    """

    dim: int
    before: int
    behind: int
    axis: comm.Axis

    def piece(self, owner: int, reader: int, length: int) -> slice:
        """What `reader` needs of the part of `owner`, which has `length` elements, as all parts have."""
        distance = reader - owner
        if distance > 0:
            return slice(max(0, distance * length - self.before), length)
        return slice(0, min(length, max(0, (distance + 1) * length + self.behind)))


@dataclass(frozen=True, slots=True)
class Strips:
    """The elements of a halo that are before and behind a part."""

    before: Tensor
    behind: Tensor


def _pieces(x: Tensor, halo: Halo, *, owned: bool) -> dict[int, slice]:
    """Per other rank what it needs of this rank's part, or with `owned` false what this rank needs of its part; nothing is left out."""
    this, length = halo.axis.index, x.shape[halo.dim]
    others = (rank for rank in range(halo.axis.size) if rank != this)
    pieces = {rank: halo.piece(this, rank, length) if owned else halo.piece(rank, this, length) for rank in others}
    return {rank: piece for rank, piece in pieces.items() if piece.stop > piece.start}


def _shape(x: Tensor, dim: int, length: int) -> tuple[int, ...]:
    return (*x.shape[:dim], length, *x.shape[dim + 1 :])


def fetch(x: Tensor, halo: Halo) -> Strips:
    """The halo of this rank's part `x`."""
    dim = halo.dim
    sent = {rank: x.narrow(dim, piece.start, piece.stop - piece.start) for rank, piece in _pieces(x, halo, owned=True).items()}
    awaited = {rank: _shape(x, dim, piece.stop - piece.start) for rank, piece in _pieces(x, halo, owned=False).items()}
    received = halo.axis.exchange_pieces(sent, awaited, x)

    def strip(length: int, *, is_before: bool) -> Tensor:
        pieces = [received[rank] for rank in sorted(received) if (rank < halo.axis.index) == is_before]
        missing = length - sum(piece.shape[dim] for piece in pieces)
        padding = [x.new_zeros(_shape(x, dim, missing))] if missing else []
        pieces = [*padding, *pieces] if is_before else [*pieces, *padding]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim) if pieces else x.new_empty(_shape(x, dim, 0))

    return Strips(strip(halo.before, is_before=True), strip(halo.behind, is_before=False))


def surround(x: Tensor, strips: Strips, dim: int) -> Tensor:
    """A part between the two strips of its halo."""
    return torch.cat([strips.before, x, strips.behind], dim)


def give_back(gradient: Tensor, halo: Halo) -> Tensor:
    """The gradient of this rank's part, from the gradients of all that was made of it: of a part with its halo, on every rank.

    What comes from several ranks is added up in float32 or wider.
    """
    dim, this = halo.dim, halo.axis.index
    length = gradient.shape[dim] - halo.before - halo.behind
    own = gradient.narrow(dim, halo.before, length)
    first = {rank: halo.before + (rank - this) * length for rank in range(halo.axis.size)}
    sent = {
        rank: gradient.narrow(dim, first[rank] + piece.start, piece.stop - piece.start)
        for rank, piece in _pieces(own, halo, owned=False).items()
    }
    returned = _pieces(own, halo, owned=True)
    received = halo.axis.exchange_pieces(sent, {rank: _shape(own, dim, piece.stop - piece.start) for rank, piece in returned.items()}, own)
    total = own.to(torch.promote_types(own.dtype, torch.float32), copy=True)
    for rank, piece in returned.items():
        total.narrow(dim, piece.start, piece.stop - piece.start).add_(received[rank])
    return total.to(own.dtype)


class _Surround(torch.autograd.Function):
    """A part with its halo, which can be differentiated any number of times: this and `_GiveBack` are each other's backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, halo: Halo) -> Tensor:
        ctx.halo = halo
        return surround(x, fetch(x, halo), halo.dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _GiveBack.apply(grads[0], ctx.halo), None  # type: ignore[no-untyped-call]


class _GiveBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, halo: Halo) -> Tensor:
        ctx.halo = halo
        return give_back(gradient, halo)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Surround.apply(grads[0], ctx.halo), None  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Window:
    """A convolution beside its tensors.

    Attributes:
        stride, padding, dilation: a number per dim of positions; dims that have a halo aren't padded.
        groups: of channels.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of one device."""
        function: Any = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
        result: Tensor = function(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return result


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, halos: Sequence[Halo]) -> Tensor:
    """A convolution of this rank's part, (batch, channels, positions, ...), of which each dim of `halos` is split.

    The gradients of weight and bias are those of this part: parts of a sum over the ranks.
    """
    result: Tensor = _Convolution.apply(x, weight, bias, window, tuple(halos))  # type: ignore[no-untyped-call]
    return result


class _Convolution(torch.autograd.Function):
    """The convolution itself. The part is saved as it is, and its halo beside it, so that no copy of the part waits for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, halos: tuple[Halo, ...]) -> Tensor:
        surrounded, strips = x.detach(), list[Strips]()
        for halo in halos:  # a later dim's halo has that of the dims before it, which are the corners
            strips.append(fetch(surrounded, halo))
            surrounded = surround(surrounded, strips[-1], halo.dim)
        ctx.save_for_backward(x, weight, bias, *(strip for pair in strips for strip in (pair.before, pair.behind)))
        ctx.window, ctx.halos = window, halos
        return window.convolve(surrounded, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = grads
        x, weight, bias, *strips = ctx.saved_tensors
        window: Window = ctx.window
        if torch.is_grad_enabled():
            surrounded = x
            for halo in ctx.halos:
                surrounded = _Surround.apply(surrounded, halo)  # type: ignore[no-untyped-call]
            needed = [tensor for tensor, is_needed in zip((x, weight, bias), ctx.needs_input_grad, strict=False) if is_needed]
            made = iter(torch.autograd.grad(window.convolve(surrounded, weight, bias), needed, gradient, create_graph=True))
            return (*(next(made) if is_needed else None for is_needed in ctx.needs_input_grad[:3]), None, None)
        surrounded = x
        for halo, before, behind in zip(ctx.halos, strips[::2], strips[1::2], strict=True):
            surrounded = surround(surrounded, Strips(before, behind), halo.dim)
        of_x, of_weight, of_bias = aten.convolution_backward.default(
            gradient,
            surrounded,
            weight,
            None if bias is None else list(bias.shape),
            window.stride,
            window.padding,
            window.dilation,
            False,
            [0] * len(window.stride),
            window.groups,
            [*ctx.needs_input_grad[:3]],
        )
        del surrounded
        for halo in reversed(ctx.halos):
            of_x = None if of_x is None else give_back(of_x, halo)
        return of_x, of_weight, of_bias, None, None


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    splits: Splits,
) -> Tensor:
    """A convolution over one, two or three dims of positions, of this rank's part of them and of its groups.

    Args:
        x: (batch, channels part, part of the positions, ...).
        weight: (features part, channels of a group, ...).
        bias: (features part,) or None.
        stride: one number, or one per dim of positions, as are `padding` and `dilation`.
        padding: at either end of the whole dim, or ``same`` or ``valid``.
        dilation: distance of the elements that a position reads.
        groups: all of them.
        splits: the axes that split the groups ``g``, and the positions ``p0``, ``p1``, ``p2``.
    """
    dims = x.dim() - 2
    dilations = per_dim(dilation, dims)
    return _convolve_parts(
        x, weight, bias, per_dim(stride, dims), find_pads(padding, weight.shape[2:], dilations), dilations, groups, splits
    )


def padded_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, before: int, behind: int, dilation: int, groups: int, *, splits: Splits
) -> Tensor:
    """`autopar.ops.padded.padded_conv1d` of a part, as `convolution`; `before` and `behind` are at the ends of the whole dim."""
    return _convolve_parts(x, weight, bias, [stride], [(before, behind)], [dilation], groups, splits)


def _convolve_parts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    strides: Sequence[int],
    pads: Sequence[tuple[int, int]],
    dilations: Sequence[int],
    groups: int,
    splits: Splits,
) -> Tensor:
    halos, padding = list[Halo](), list[int]()
    for dim, (before, behind) in enumerate(pads):
        padding.append(0)
        if axes := splits.get(f"p{dim}"):
            (name,), length = axes, x.shape[2 + dim]
            size, stride, dilation = weight.shape[2 + dim], strides[dim], dilations[dim]
            halo = find_halo(length, length // stride, size=size, stride=stride, dilation=dilation, before=before)
            assert halo is not None, "the rule splits no other convolutions"
            halos.append(Halo(2 + dim, halo.before, halo.behind, comm.axis(name)))
        elif before == behind:
            padding[dim] = before
        else:
            x = F.pad(x, [0, 0] * (len(pads) - 1 - dim) + [before, behind])
    window = Window(tuple(strides), tuple(padding), tuple(dilations), groups // comm.count(splits.get("g", ())))
    return convolve(x, weight, bias, window, halos) if halos else window.convolve(x, weight, bias)
