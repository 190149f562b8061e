"""The differentiable collectives that emitted programs call: each is a step between two layouts, its backward the dual step.

The pairs are those of `autopar.ir.reshard`; here is what they do. Axes are names, looked up in `autopar.ops.comm` when the forward
runs and kept for the backward, which may run on another thread. `outer` is always the number of outer blocks of the dim
that this rank's part has (`autopar.ir.layout.local_outer`): the dim is split inside each of them. Results are contiguous.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from autopar.errors import InputError
from autopar.ops import comm
from autopar.torch_compat import StorageRef


def take_part(x: Tensor, dim: int, outer: int, index: int, size: int) -> Tensor:
    """Part `index` of `size` of `x` along `dim`, inside each of its `outer` equal blocks; a fresh contiguous tensor.

    Raises InputError when the dim doesn't divide evenly.
    """
    part = _blocks(x, dim, outer, size).select(dim + 1, index)
    return part.flatten(dim, dim + 1).clone(memory_format=torch.contiguous_format)


def join_parts(parts: Sequence[Tensor], dim: int, outer: int) -> Tensor:
    """The tensor whose parts along `dim`, inside each of `outer` equal blocks, are `parts`, in order."""
    return _join(torch.stack(list(parts)), dim, outer)


def _blocks(x: Tensor, dim: int, outer: int, size: int) -> Tensor:
    """`x` with `dim` unfolded to (outer, size, rest)."""
    if x.shape[dim] % (outer * size):
        raise InputError(f"dim {dim} of a tensor of shape {tuple(x.shape)} can't be split {size} ways in {outer} blocks")
    return x.reshape(*x.shape[:dim], outer, size, x.shape[dim] // (outer * size), *x.shape[dim + 1 :])


def _split(x: Tensor, dim: int, outer: int, size: int) -> Tensor:
    """All parts, stacked along a new first dim; free of copies where the layout in memory allows."""
    return _blocks(x, dim, outer, size).movedim(dim + 1, 0).flatten(dim + 1, dim + 2)


def _join(stack: Tensor, dim: int, outer: int) -> Tensor:
    """The reverse of `_split`, contiguous; free of copies for dim 0 with one outer block."""
    if outer == 1:
        return stack.movedim(0, dim).flatten(dim, dim + 1).contiguous()
    # The first dim counts ranks, so the tensor's own dim is one further.
    return _blocks(stack, dim + 1, outer, 1).movedim(0, dim + 1).flatten(dim, dim + 3).contiguous()


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: comm.Axis, dim: int, outer: int, grad: str, save: bool) -> Tensor:
        ctx.step = (axis, dim, outer, grad)
        recipe = _Recipe(x.detach(), axis, dim, outer)
        full = recipe.gather()
        if not save:
            _free_after_forward(full, recipe)
        return full

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        axis, dim, outer, grad = ctx.step
        if grad == "slice":
            part = take_part(grads[0], dim, outer, axis.index, axis.size)
        else:
            part = axis.reduce_stack(_split(grads[0], dim, outer, axis.size))
        return part, None, None, None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: comm.Axis, dim: int, outer: int) -> Tensor:
        ctx.step = (axis, dim, outer)
        return axis.reduce_stack(_split(x, dim, outer, axis.size))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        axis, dim, outer = ctx.step
        return _join(axis.gather_stack(grads[0]), dim, outer), None, None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: comm.Axis, grad: str) -> Tensor:
        ctx.step = (axis, grad)
        return axis.all_reduce(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        axis, grad = ctx.step
        return axis.all_reduce(grads[0]) if grad == "all_reduce" else grads[0], None, None


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: comm.Axis, dim: int, outer: int) -> Tensor:
        ctx.step = (axis, dim, outer)
        return take_part(x, dim, outer, axis.index, axis.size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        axis, dim, outer = ctx.step
        return _join(axis.gather_stack(grads[0]), dim, outer), None, None, None


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: comm.Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.axis.all_reduce(grads[0]), None


class _KeepFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, axis: comm.Axis) -> Tensor:
        return x.view_as(x) if axis.index == 0 else torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: comm.Axis, from_dim: int, to_dim: int, from_outer: int, to_outer: int) -> Tensor:
        ctx.step = (axis, from_dim, to_dim, from_outer, to_outer)
        received = axis.exchange_stack(_split(x, to_dim, to_outer, axis.size))
        return _join(received, from_dim, from_outer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        axis, from_dim, to_dim, from_outer, to_outer = ctx.step
        received = axis.exchange_stack(_split(grads[0], from_dim, from_outer, axis.size))
        return _join(received, to_dim, to_outer), None, None, None, None, None


def all_gather(
    x: Tensor,
    axis: str,
    dim: int,
    outer: int = 1,
    grad: Literal["reduce_scatter", "slice"] = "reduce_scatter",
    save: bool = True,
) -> Tensor:
    """Shard -> Replicate: every rank's parts joined along `dim`.

    The gradient is summed over the ranks and split (``reduce_scatter``), or is whole on every rank already and only split
    (``slice``). With ``save=False``, inside `regather`, what autograd saves of the result is the part `x` only.
    """
    mesh_axis = comm.axis(axis)
    return x.contiguous() if mesh_axis.size == 1 else _apply(_AllGather, x, mesh_axis, dim, outer, grad, save)


def reduce_scatter(x: Tensor, axis: str, dim: int, outer: int = 1) -> Tensor:
    """Partial -> Shard: this rank's part of the sum over the ranks; the gradient is gathered."""
    mesh_axis = comm.axis(axis)
    return x.contiguous() if mesh_axis.size == 1 else _apply(_ReduceScatter, x, mesh_axis, dim, outer)


def all_reduce(x: Tensor, axis: str, grad: Literal["identity", "all_reduce"] = "identity") -> Tensor:
    """Partial -> Replicate: the sum over the ranks; the gradient is whole on every rank (``identity``) or Partial too."""
    mesh_axis = comm.axis(axis)
    return x.contiguous() if mesh_axis.size == 1 else _apply(_AllReduce, x, mesh_axis, grad)


def shard(x: Tensor, axis: str, dim: int, outer: int = 1) -> Tensor:
    """Replicate -> Shard: this rank's part; the gradient is gathered."""
    mesh_axis = comm.axis(axis)
    return x.contiguous() if mesh_axis.size == 1 else _apply(_Shard, x, mesh_axis, dim, outer)


def broadcast(x: Tensor, axis: str) -> Tensor:
    """Replicate -> Broadcast: `x` itself; its gradient, of which every rank has a part of the sum, is summed (Megatron's f)."""
    mesh_axis = comm.axis(axis)
    return x if mesh_axis.size == 1 else _apply(_Broadcast, x, mesh_axis)


def keep_first(x: Tensor, axis: str) -> Tensor:
    """Replicate -> Partial: `x` on the first rank of the axis, zeros on the others; the gradient passes as it is."""
    mesh_axis = comm.axis(axis)
    return x if mesh_axis.size == 1 else _apply(_KeepFirst, x, mesh_axis)


def take_microbatch(x: Tensor, axis: str, dim: int, outer: int = 1) -> Tensor:
    """Replicate -> Shard along time: this micro-batch's part; the gradients of all micro-batches add up where they arrive."""
    mesh_axis = comm.axis(axis)
    if outer == 1:
        size = x.shape[dim] // mesh_axis.size
        return x.narrow(dim, mesh_axis.index * size, size)
    return _blocks(x, dim, outer, mesh_axis.size).select(dim + 1, mesh_axis.index).flatten(dim, dim + 1)


def keep_in_first_microbatch(x: Tensor, axis: str) -> Tensor:
    """Replicate -> Partial along time: `x` in the first micro-batch, zeros in the others."""
    return x if comm.axis(axis).index == 0 else torch.zeros_like(x)


def all_to_all(x: Tensor, axis: str, from_dim: int, to_dim: int, from_outer: int = 1, to_outer: int = 1) -> Tensor:
    """Shard(from_dim) -> Shard(to_dim), two different dims; the gradient makes the journey back.

    Raises InputError when both dims are the same one.
    """
    if from_dim == to_dim:
        raise InputError(f"an all-to-all goes between two dims of a tensor, both are {to_dim}: gather and shard instead")
    mesh_axis = comm.axis(axis)
    return x.contiguous() if mesh_axis.size == 1 else _apply(_AllToAll, x, mesh_axis, from_dim, to_dim, from_outer, to_outer)


def gather_along(x: Tensor, axis: comm.Axis, dim: int, outer: int) -> Tensor:
    """Join every rank's parts, given the axis itself; the gradient is whole on every rank and is only split."""
    return _apply(_AllGather, x, axis, dim, outer, "slice", True)


def shard_along(x: Tensor, axis: comm.Axis, dim: int, outer: int) -> Tensor:
    """This rank's part, given the axis itself; the gradient is gathered."""
    return _apply(_Shard, x, axis, dim, outer)


def _apply(function: type[torch.autograd.Function], x: Tensor, *arguments: object) -> Tensor:
    result: Tensor = function.apply(x, *arguments)  # type: ignore[no-untyped-call]
    return result


# --- gathered parameters that don't outlive the forward ---------------------------------------------------------------------


class _Recipe:
    """How to make a gathered tensor again from this rank's part."""

    def __init__(self, part: Tensor, axis: comm.Axis, dim: int, outer: int) -> None:
        self.part, self.axis, self.dim, self.outer = part, axis, dim, outer
        self._saves = 0
        self._unread = 0
        self._full: Tensor | None = None

    def gather(self) -> Tensor:
        return _join(self.axis.gather_stack(self.part), self.dim, self.outer)

    def note_save(self) -> None:
        self._saves += 1

    def read(self) -> Tensor:
        """The gathered tensor, held from the first read of a backward until as many reads as there were saves."""
        if self._full is None:
            self._full, self._unread = self.gather(), self._saves
        full = self._full
        self._unread -= 1
        if self._unread <= 0:
            self._full = None
        return full


@dataclass(frozen=True, slots=True)
class _View:
    """What autograd keeps instead of a tensor that shares the storage of a gathered one."""

    recipe: _Recipe
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Gathered(threading.local):
    def __init__(self) -> None:
        # Storages of the gathers made inside `regather` on this thread; None outside of it.
        self.recipes: dict[int, tuple[StorageRef, _Recipe]] | None = None


_GATHERED = _Gathered()


def _free_after_forward(full: Tensor, recipe: _Recipe) -> None:
    if _GATHERED.recipes is None:
        return
    for key in [key for key, (ref, _) in _GATHERED.recipes.items() if ref.expired()]:
        del _GATHERED.recipes[key]
    ref = StorageRef(full)
    _GATHERED.recipes[ref.key] = ref, recipe


def _pack(x: Tensor) -> Tensor | _View:
    entry = (_GATHERED.recipes or {}).get(StorageRef.key_of(x))
    if entry is None or x.dtype != entry[1].part.dtype:
        return x
    _, recipe = entry
    recipe.note_save()
    return _View(recipe, tuple(x.shape), x.stride(), int(x.storage_offset()))


def _unpack(saved: Tensor | _View) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    return saved.recipe.read().as_strided(saved.size, saved.stride, saved.offset)


@contextmanager
def regather() -> Iterator[None]:
    """Run a forward in which the results of ``all_gather(..., save=False)`` aren't kept for the backward.

    Autograd keeps this rank's part instead, and the backward gathers it again.
    """
    before = _GATHERED.recipes
    _GATHERED.recipes = {}
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _GATHERED.recipes = before
