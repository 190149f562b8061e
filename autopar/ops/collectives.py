"""The differentiable collectives that emitted programs call.

Comes in: this rank's part of a tensor in one layout. Goes out: its part in another layout, with autograd. Each function is a step on one
axis between two states of `autopar.ir.layout`, and its backward is the dual step for the gradient; `autopar.ir.reshard.PAIRS` lists which.
The dual of the dual is the step itself, so a backward that calls the dual can be differentiated again, any number of times.

Axes are names, looked up in `autopar.ops.comm` when the forward runs; the backward, which may run on another thread, uses the same axes.
`dim` is split inside each of `outer` equal blocks, `outer` being the number of those blocks in this rank's part
(`autopar.ir.layout.local_outer`). Results are contiguous.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from autopar.errors import InputError
from autopar.ops import comm
from autopar.torch_compat import StorageRef


def take_part(x: Tensor, dim: int, outer: int, index: int, size: int) -> Tensor:
    """Part `index` of the `size` parts of `x` along `dim`, which is split inside each of its `outer` equal blocks; a contiguous copy.

    >>> take_part(torch.arange(12), 0, 3, 1, 2).tolist()
    [2, 3, 6, 7, 10, 11]

    Raises InputError when the dim doesn't divide evenly.
    """
    part = _blocks(x, dim, outer, size).select(dim + 1, index)
    return part.flatten(dim, dim + 1).clone(memory_format=torch.contiguous_format)


def join_parts(parts: Sequence[Tensor], dim: int, outer: int) -> Tensor:
    """The tensor of which `parts` are all parts along `dim`, in order; the reverse of `take_part`."""
    return _join(torch.stack(list(parts)), dim, outer)


def _blocks(x: Tensor, dim: int, outer: int, size: int) -> Tensor:
    """`x` with `dim` unfolded to (outer, size, rest)."""
    if x.shape[dim] % (outer * size):
        raise InputError(f"dim {dim} of a tensor of shape {tuple(x.shape)} can't be split {size} ways in {outer} blocks")
    return x.reshape(*x.shape[:dim], outer, size, x.shape[dim] // (outer * size), *x.shape[dim + 1 :])


def _split(x: Tensor, dim: int, outer: int, size: int) -> Tensor:
    """All parts, stacked along a new first dim; without a copy where the strides allow it."""
    return _blocks(x, dim, outer, size).movedim(dim + 1, 0).flatten(dim + 1, dim + 2)


def _join(stack: Tensor, dim: int, outer: int) -> Tensor:
    """The reverse of `_split`, contiguous; without a copy for dim 0 with one outer block."""
    if outer == 1:
        return stack.movedim(0, dim).flatten(dim, dim + 1).contiguous()
    # The first dim counts ranks, so the tensor's own dim is one further.
    return _blocks(stack, dim + 1, outer, 1).movedim(0, dim + 1).flatten(dim, dim + 3).contiguous()


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, axis: comm.Axis, dim: int, outer: int, grad: str, save: bool, dtype: torch.dtype, reduce_dtype: torch.dtype
    ) -> Tensor:
        ctx.step = (axis, dim, outer, grad, x.dtype, reduce_dtype)
        recipe = _Recipe(x.detach(), axis, dim, outer, dtype)
        full = recipe.gather()
        if not save:
            _free_after_forward(full, recipe)
        return full

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        axis, dim, outer, grad, dtype, reduce_dtype = ctx.step
        if grad == "slice":
            gradient = _apply(_Shard, grads[0], axis, dim, outer)
        else:
            gradient = _apply(_ReduceScatter, grads[0].to(reduce_dtype), axis, dim, outer)
        return gradient.to(dtype), None, None, None, None, None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: comm.Axis, dim: int, outer: int) -> Tensor:
        ctx.step = (axis, dim, outer)
        return axis.reduce_stack(_split(x, dim, outer, axis.size))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        axis, dim, outer = ctx.step
        return _gather(grads[0], axis, dim, outer, "reduce_scatter"), None, None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: comm.Axis, grad: str) -> Tensor:
        ctx.step = (axis, grad)
        return axis.all_reduce(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        axis, grad = ctx.step
        if grad == "all_reduce":
            return _apply(_AllReduce, grads[0], axis, grad), None, None
        return _pass_on(_SumGradient, grads[0], axis, grads[0].dtype), None, None


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: comm.Axis, dim: int, outer: int) -> Tensor:
        ctx.step = (axis, dim, outer)
        return take_part(x, dim, outer, axis.index, axis.size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        axis, dim, outer = ctx.step
        return _gather(grads[0], axis, dim, outer, "slice"), None, None, None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: comm.Axis, reduce_dtype: torch.dtype) -> Tensor:
        ctx.axis, ctx.dtypes = axis, (x.dtype, reduce_dtype)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dtype, reduce_dtype = ctx.dtypes
        return _apply(_AllReduce, grads[0].to(reduce_dtype), ctx.axis, "identity").to(dtype), None, None


class _KeepFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: comm.Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x) if axis.index == 0 else torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _pass_on(_KeepFirstGradient, grads[0], ctx.axis), None


class _KeepFirstGradient(torch.autograd.Function):
    """The dual of `_KeepFirst`: a whole tensor whose gradient, whole on every rank, becomes summands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: comm.Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _apply(_KeepFirst, grads[0], ctx.axis), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: comm.Axis, from_dim: int, to_dim: int, from_outer: int, to_outer: int) -> Tensor:
        ctx.step = (axis, from_dim, to_dim, from_outer, to_outer)
        received = axis.exchange_stack(_split(x, to_dim, to_outer, axis.size))
        return _join(received, from_dim, from_outer)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        axis, from_dim, to_dim, from_outer, to_outer = ctx.step
        return _apply(_AllToAll, grads[0], axis, to_dim, from_dim, to_outer, from_outer), None, None, None, None, None


def all_gather(
    x: Tensor,
    axis: str,
    dim: int,
    outer: int = 1,
    grad: Literal["reduce_scatter", "slice"] = "reduce_scatter",
    save: bool = True,
    dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> Tensor:
    """Shard -> Replicate, with a whole or a partial gradient: the parts of all ranks joined along `dim`.

    Args:
        x: this rank's part.
        axis: the mesh axis.
        dim: the dim that is joined.
        outer: number of its outer blocks in `x`.
        grad: what the gradient does. ``reduce_scatter``: it is summed over the ranks, and each rank gets its part (each used the result in
            part). ``slice``: it is whole on every rank, which takes its part (each used all of the result).
        save: whether autograd may save the joined tensor for the backward. If not, and inside `regather`, it saves the part `x` instead.
        dtype: to which parts are cast before they are sent, that of the result; by default that of `x`, which its gradient has.
        reduce_dtype: in which gradients are summed by ``reduce_scatter``; by default the dtype of the result.
    """
    mesh_axis = comm.axis(axis)
    dtype = dtype or x.dtype
    if mesh_axis.size == 1:
        return x.to(dtype).contiguous()
    return _apply(_AllGather, x, mesh_axis, dim, outer, grad, save, dtype, reduce_dtype or dtype)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter that other ops gather, in the dtype in which an op reads it that needs only this rank's part."""
    return x.to(dtype)


def reduce_scatter(x: Tensor, axis: str, dim: int, outer: int = 1) -> Tensor:
    """Partial -> Shard: the summands of all ranks are added, and each rank gets its part along `dim`; the gradient is gathered."""
    mesh_axis = comm.axis(axis)
    return x.contiguous() if mesh_axis.size == 1 else _apply(_ReduceScatter, x, mesh_axis, dim, outer)


def all_reduce(x: Tensor, axis: str, grad: Literal["identity", "all_reduce"] = "identity") -> Tensor:
    """Partial -> Replicate, with a whole or a partial gradient: the sum over the ranks.

    With ``grad="identity"`` the gradient is whole on every rank and passes unchanged (Megatron's g); with ``"all_reduce"`` each rank has a
    summand of the gradient, and the sum is passed on.
    """
    mesh_axis = comm.axis(axis)
    return x.contiguous() if mesh_axis.size == 1 else _apply(_AllReduce, x, mesh_axis, grad)


def shard(x: Tensor, axis: str, dim: int, outer: int = 1) -> Tensor:
    """Replicate -> Shard: this rank's part along `dim`, without communication; the gradient is gathered."""
    mesh_axis = comm.axis(axis)
    return x.contiguous() if mesh_axis.size == 1 else _apply(_Shard, x, mesh_axis, dim, outer)


def sum_gradient(x: Tensor, axis: str, reduce_dtype: torch.dtype | None = None) -> Tensor:
    """Whole to whole, for ranks that each use a part of `x`: no communication, but their gradients are summed (Megatron's f).

    They are summed in `reduce_dtype`, by default that of `x`.
    """
    mesh_axis = comm.axis(axis)
    return x if mesh_axis.size == 1 else _apply(_SumGradient, x, mesh_axis, reduce_dtype or x.dtype)


def keep_first(x: Tensor, axis: str) -> Tensor:
    """Replicate -> Partial: `x` on the first rank of the axis, zeros on the others; the gradient passes unchanged."""
    mesh_axis = comm.axis(axis)
    return x if mesh_axis.size == 1 else _apply(_KeepFirst, x, mesh_axis)


def take_microbatch(x: Tensor, axis: str, dim: int, outer: int = 1) -> Tensor:
    """Replicate -> Shard on the axis of micro-batches: the part of `x` that this micro-batch has, a view.

    The gradient is zero outside of that part, and the micro-batches' gradients add up in what `x` was made from.
    """
    mesh_axis = comm.axis(axis)
    if outer == 1:
        size = x.shape[dim] // mesh_axis.size
        return x.narrow(dim, mesh_axis.index * size, size)
    return _blocks(x, dim, outer, mesh_axis.size).select(dim + 1, mesh_axis.index).flatten(dim, dim + 1)


def keep_in_first_microbatch(x: Tensor, axis: str) -> Tensor:
    """Replicate -> Partial on the axis of micro-batches: `x` in the first micro-batch, zeros in the others."""
    return x if comm.axis(axis).index == 0 else torch.zeros_like(x)


def all_to_all(x: Tensor, axis: str, from_dim: int, to_dim: int, from_outer: int = 1, to_outer: int = 1) -> Tensor:
    """Shard of `from_dim` -> Shard of `to_dim`: every rank exchanges a block with every other; the gradient makes the reverse exchange.

    Args:
        x: this rank's part, split along `from_dim`.
        axis: the mesh axis.
        from_dim: the dim that becomes whole.
        to_dim: the dim that is split instead.
        from_outer: number of outer blocks of `from_dim` in `x`.
        to_outer: number of outer blocks of `to_dim` in the result.

    Raises InputError when both dims are the same one.
    """
    if from_dim == to_dim:
        raise InputError(f"an all-to-all goes between two dims of a tensor, both are {to_dim}: gather and shard instead")
    mesh_axis = comm.axis(axis)
    return x.contiguous() if mesh_axis.size == 1 else _apply(_AllToAll, x, mesh_axis, from_dim, to_dim, from_outer, to_outer)


def gather_along(x: Tensor, axis: comm.Axis, dim: int, outer: int) -> Tensor:
    """`all_gather` with ``grad="slice"``, given the axis itself instead of its name."""
    return _gather(x, axis, dim, outer, "slice")


def shard_along(x: Tensor, axis: comm.Axis, dim: int, outer: int) -> Tensor:
    """`shard`, given the axis itself instead of its name."""
    return _apply(_Shard, x, axis, dim, outer)


def reduce_scatter_along(x: Tensor, axis: comm.Axis, dim: int, outer: int) -> Tensor:
    """`reduce_scatter`, given the axis itself instead of its name."""
    return _apply(_ReduceScatter, x, axis, dim, outer)


def sum_along(x: Tensor, axis: comm.Axis) -> Tensor:
    """`all_reduce` with ``grad="identity"``, given the axis itself instead of its name."""
    return _apply(_AllReduce, x, axis, "identity")


def sum_gradient_along(x: Tensor, axis: comm.Axis) -> Tensor:
    """`sum_gradient`, given the axis itself instead of its name."""
    return _apply(_SumGradient, x, axis, x.dtype)


def _gather(x: Tensor, axis: comm.Axis, dim: int, outer: int, grad: str) -> Tensor:
    return _apply(_AllGather, x, axis, dim, outer, grad, True, x.dtype, x.dtype)


def _apply(function: type[torch.autograd.Function], x: Tensor, *arguments: object) -> Tensor:
    result: Tensor = function.apply(x, *arguments)  # type: ignore[no-untyped-call]
    return result


def _pass_on(dual: type[torch.autograd.Function], gradient: Tensor, *arguments: object) -> Tensor:
    """A gradient that passes a step unchanged, as itself, so that autograd may still own it; by the dual if it is differentiated."""
    return _apply(dual, gradient, *arguments) if torch.is_grad_enabled() else gradient


# --- gathered parameters that are freed after the forward, and gathered again in the backward --------------------------------


class _Recipe:
    """How to gather a parameter again from this rank's part, and the gathered tensor while a backward reads it."""

    def __init__(self, part: Tensor, axis: comm.Axis, dim: int, outer: int, dtype: torch.dtype) -> None:
        self.part, self.axis, self.dim, self.outer, self.dtype = part, axis, dim, outer, dtype
        self._version = 0 if part.is_inference() else part._version
        self._saves = 0
        self._unread = 0
        self._full: Tensor | None = None

    def gather(self) -> Tensor:
        return _join(self.axis.gather_stack(self.part.to(self.dtype)), self.dim, self.outer)

    def note_save(self) -> None:
        self._saves += 1

    def read(self) -> Tensor:
        """The gathered tensor. The first read of a backward gathers it; it is freed after as many reads as there were saves."""
        if self._full is None:
            if self.part._version != self._version:
                raise RuntimeError(
                    "a parameter that the backward gathers again has been modified by an inplace operation since the forward"
                )
            self._full, self._unread = self.gather(), self._saves
        full = self._full
        self._unread -= 1
        if self._unread <= 0:
            self._full = None
        return full


@dataclass(frozen=True, slots=True)
class _View:
    """What autograd saves in the place of a tensor that is a view of a gathered one."""

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
    if entry is None or x.dtype != entry[1].dtype:
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
    """Inside, autograd saves nothing of the results of ``all_gather(..., save=False)``.

    Where a call saves such a tensor, or a view of it, this rank's part is saved instead, and the backward gathers it again. This is
    ZeRO-3's way with parameters (FSDP's ``reshard_after_forward``).
    """
    before = _GATHERED.recipes
    _GATHERED.recipes = {}
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _GATHERED.recipes = before
