"""A tensor to its parts along a dim, and back: how a dim is split over ranks, inside each of `outer` equal blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autopar.errors import InputError


def take_part(x: Tensor, dim: int, outer: int, index: int, size: int, zigzag: bool = False) -> Tensor:
    """Part `index` of the `size` parts of `x` along `dim`, which is split inside each of its `outer` equal blocks; a contiguous copy.

    A zigzag part has two pieces of each block, the `index`-th from the front and the `index`-th from the end.

    >>> take_part(torch.arange(12), 0, 3, 1, 2).tolist(), take_part(torch.arange(8), 0, 1, 1, 2, zigzag=True).tolist()
    ([2, 3, 6, 7, 10, 11], [2, 3, 4, 5])

    Raises InputError when the dim doesn't divide evenly.
    """
    if zigzag:
        pieces = torch.tensor([index, 2 * size - 1 - index], device=x.device)
        return blocks_of(x, dim, outer, 2 * size).index_select(dim + 1, pieces).flatten(dim, dim + 2)
    part = blocks_of(x, dim, outer, size).select(dim + 1, index)
    return part.flatten(dim, dim + 1).clone(memory_format=torch.contiguous_format)


def take_rows(x: Tensor, dim: int, index: int, size: int) -> Tensor:
    """Part `index` of `x` cut along `dim` as ``torch.chunk`` cuts it in `size` parts, of which the last ones may be short; a view.

    >>> [take_rows(torch.arange(5), 0, index, 4).tolist() for index in range(4)]
    [[0, 1], [2, 3], [4], []]
    """
    whole = x.shape[dim]
    return x.narrow(dim, min(index * rows_of_part(whole, size), whole), rows_of_rank(whole, index, size))


def rows_of_part(whole: int, size: int) -> int:
    """Of a dim that is cut in `size` parts, the size of the largest."""
    return -(-whole // size)


def rows_of_rank(whole: int, index: int, size: int) -> int:
    """Of a dim that is cut in `size` parts, the size of part `index`."""
    rows = rows_of_part(whole, size)
    return max(0, min(rows, whole - index * rows))


def pad_part(part: Tensor, dim: int, whole: int, size: int) -> Tensor:
    """One of `size` parts of a dim of `whole` rows, with zeros behind it, as large as the largest part. Differentiable."""
    return _pad_to(part, dim, rows_of_part(whole, size))


def pad_whole(x: Tensor, dim: int, size: int) -> Tensor:
    """`x` with zeros behind it along `dim`, so that it has `size` equal parts; itself where it has. Differentiable."""
    return _pad_to(x, dim, rows_of_part(x.shape[dim], size) * size)


def _pad_to(x: Tensor, dim: int, length: int) -> Tensor:
    missing = length - x.shape[dim]
    return torch.nn.functional.pad(x, [*(0, 0) * (x.ndim - 1 - dim), 0, missing]) if missing else x


def join_parts(parts: Sequence[Tensor], dim: int, outer: int, *, zigzag: bool = False) -> Tensor:
    """The tensor of which `parts` are all parts along `dim`, in order; the reverse of `take_part`."""
    return join_stack(torch.stack(list(parts)), dim, outer, zigzag=zigzag)


def blocks_of(x: Tensor, dim: int, outer: int, size: int) -> Tensor:
    """`x` with `dim` unfolded to (outer, size, rest)."""
    if x.shape[dim] % (outer * size):
        raise InputError(f"dim {dim} of a tensor of shape {tuple(x.shape)} can't be split {size} ways in {outer} blocks")
    return x.reshape(*x.shape[:dim], outer, size, x.shape[dim] // (outer * size), *x.shape[dim + 1 :])


def split_parts(x: Tensor, dim: int, outer: int, size: int, zigzag: bool = False) -> Tensor:
    """All parts, stacked along a new first dim; without a copy where the strides allow it."""
    if zigzag:
        pieces = blocks_of(x, dim, outer, 2 * size).index_select(dim + 1, _zigzag(size, x.device))
        return torch.unflatten(pieces, dim + 1, (size, 2)).movedim(dim + 1, 0).flatten(dim + 1, dim + 3)
    return blocks_of(x, dim, outer, size).movedim(dim + 1, 0).flatten(dim + 1, dim + 2)


def _zigzag(size: int, device: torch.device) -> Tensor:
    """Of ``2 * size`` pieces those of the first part, those of the second, and so on."""
    first = torch.arange(size, device=device)
    return torch.stack([first, 2 * size - 1 - first], dim=1).flatten()


def join_stack(stack: Tensor, dim: int, outer: int, whole: int | None = None, zigzag: bool = False) -> Tensor:
    """The reverse of `split_parts`, contiguous; without a copy for dim 0 with one outer block.

    Of parts that were padded (`pad_part`), `whole` is the size of the dim without the padding.
    """
    if zigzag:
        size = stack.shape[0]
        pieces = blocks_of(stack, dim + 1, outer, 2).movedim(0, dim + 1).flatten(dim + 1, dim + 2)
        return pieces.index_select(dim + 1, _zigzag(size, stack.device).argsort()).flatten(dim, dim + 2)
    if whole is not None:
        return join_stack(stack, dim, outer).narrow(dim, 0, whole).contiguous()
    if outer == 1:
        return stack.movedim(0, dim).flatten(dim, dim + 1).contiguous()
    # The first dim counts ranks, so the tensor's own dim is one further.
    return blocks_of(stack, dim + 1, outer, 1).movedim(0, dim + 1).flatten(dim, dim + 3).contiguous()
