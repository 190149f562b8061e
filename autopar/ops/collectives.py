"""The differentiable collectives that emitted programs call.

Comes in: this rank's part of a tensor in one layout. Goes out: its part in another layout, with autograd. Each function takes a step
(`autopar.ops.steps`) and waits for it, and its backward takes the dual step for the gradient. The gather of a stored parameter is more than
a step: it may be begun ahead, it casts, and its result needn't be saved (`autopar.ops.gathers`).

Axes are names, looked up in `autopar.ops.comm` when the forward runs; the backward, which may run on another thread, uses the same axes.
`dim` is split inside each of `outer` equal blocks, `outer` being the number of those blocks in this rank's part
(`autopar.ir.layout.local_outer`); `zigzag` says that a part has two pieces of each of them. Results are contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from autopar.errors import InputError
from autopar.ops import comm, steps
from autopar.ops.gathers import Gather, GradientSink, Use, current_forward, find_sink, free_after_forward
from autopar.ops.parts import blocks_of, join_parts, pad_whole, split_parts
from autopar.ops.steps import AllGather, AllReduce, AllToAll, KeepFirst, PassOn, ReduceScatter, Shard, Step


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, use: Use, grad: str, save: bool, reduce_dtype: torch.dtype, sink: GradientSink | None) -> Tensor:
        gather = use.gather
        ctx.step = (gather.axis, gather.dim, gather.outer, grad, x.dtype, reduce_dtype)
        # Where parts are padded: the rows of this rank.
        ctx.rows = None if gather.size is None else x.shape[gather.dim]
        ctx.sink, ctx.block, ctx.ahead = sink, use.block, use.forward.ahead if use.forward is not None else 0
        full = use.take()
        if not save:
            free_after_forward(full, use)
        return full

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        axis, dim, outer, grad, dtype, reduce_dtype = ctx.step
        rows, whole = ctx.rows, grads[0] if ctx.rows is None else pad_whole(grads[0], dim, axis.size)
        if grad == "slice":
            gradient = _take(Shard(axis, dim, outer), whole)
        elif ctx.sink is not None and ctx.sink.takes():
            summands = split_parts(whole.to(reduce_dtype), dim, outer, axis.size)
            ctx.sink.receive(lambda: _Narrowed.of(axis.begin_reduce_stack(summands), dim, rows), dtype, ctx.block, ctx.ahead)
            return None, None, None, None, None, None
        else:
            gradient = _take(ReduceScatter(axis, dim, outer), whole.to(reduce_dtype))
        return (gradient if rows is None else gradient.narrow(dim, 0, rows)).to(dtype), None, None, None, None, None


@dataclass(frozen=True, slots=True)
class _Narrowed:
    """A message of whose tensor only the first rows along a dim are meant: the others pad it."""

    message: comm.Message
    dim: int
    rows: int

    @staticmethod
    def of(message: comm.Message, dim: int, rows: int | None) -> comm.Message:
        """The message itself where nothing is padded."""
        return message if rows is None else _Narrowed(message, dim, rows)

    def is_done(self) -> bool:
        return self.message.is_done()

    def wait(self) -> Tensor:
        return self.message.wait().narrow(self.dim, 0, self.rows)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Step) -> Tensor:
        ctx.step = step
        return step.begin(x)()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _take(ctx.step.dual, grads[0]), None


def _take(step: Step, x: Tensor) -> Tensor:
    """Take a step and wait for it, differentiable. What it passes unchanged is passed as itself, so that autograd may still own it."""
    if isinstance(step, PassOn) and not torch.is_grad_enabled():
        return x
    result: Tensor = _Step.apply(x, step)  # type: ignore[no-untyped-call]
    return result


def begin_all_gather(
    x: Tensor, axis: str, dim: int, outer: int = 1, dtype: torch.dtype | None = None, size: int | None = None, *, block: int
) -> Use | None:
    """Begin the gather of a stored parameter that `all_gather` waits for: give it the result as ``begun``.

    Args:
        x: this rank's part.
        axis: the mesh axis; with one rank on it there is nothing to begin, and the result is None.
        dim: the dim that is joined.
        outer: number of its outer blocks in `x`.
        dtype: to which parts are cast before they are sent; by default that of `x`.
        size: the size of the joined dim, where parts aren't of one size.
        block: the number of the block of the program that reads it, from 0, in the order in which they run.
    """
    mesh_axis = comm.axis(axis)
    if mesh_axis.size == 1:
        return None
    use = Use(Gather(x.detach(), mesh_axis, dim, outer, dtype or x.dtype, size), block, current_forward())
    if use.forward is not None:
        use.forward.add(use.gather, block, find_sink(x))
    use.gather.begin()
    return use


def all_gather(
    x: Tensor,
    axis: str,
    dim: int,
    outer: int = 1,
    grad: Literal["reduce_scatter", "slice"] = "reduce_scatter",
    save: bool = True,
    dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    size: int | None = None,
    begun: Use | None = None,
    zigzag: bool = False,
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
        size: the size of the joined dim, where parts aren't of one size but as ``torch.chunk`` makes them: they are padded while they move.
        begun: this gather, where `begin_all_gather` has begun it.
        zigzag: whether each rank has two pieces, the i-th from the front and the i-th from the end; not for parameters.
    """
    mesh_axis = comm.axis(axis)
    dtype = dtype or x.dtype
    if mesh_axis.size == 1:
        return x.to(dtype).contiguous()
    if zigzag:
        return _take(AllGather(mesh_axis, dim, outer, grad, zigzag), x)
    use = begun or Use(Gather(x.detach(), mesh_axis, dim, outer, dtype, size))
    sink = find_sink(x) if begun is not None else None
    result: Tensor = _AllGather.apply(x, use, grad, save, reduce_dtype or dtype, sink)  # type: ignore[no-untyped-call]
    return result


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter that other ops gather, in the dtype in which an op reads it that needs only this rank's part."""
    return x.to(dtype)


def reduce_scatter(x: Tensor, axis: str, dim: int, outer: int = 1, zigzag: bool = False) -> Tensor:
    """Partial -> Shard: the summands of all ranks are added, and each rank gets its part along `dim`; the gradient is gathered."""
    mesh_axis = comm.axis(axis)
    return x.contiguous() if mesh_axis.size == 1 else _take(ReduceScatter(mesh_axis, dim, outer, zigzag), x)


def all_reduce(x: Tensor, axis: str, grad: Literal["identity", "all_reduce"] = "identity") -> Tensor:
    """Partial -> Replicate, with a whole or a partial gradient: the sum over the ranks.

    With ``grad="identity"`` the gradient is whole on every rank and passes unchanged (Megatron's g); with ``"all_reduce"`` each rank has a
    summand of the gradient, and the sum is passed on.
    """
    mesh_axis = comm.axis(axis)
    return x.contiguous() if mesh_axis.size == 1 else _take(AllReduce(mesh_axis, grad), x)


def shard(x: Tensor, axis: str, dim: int, outer: int = 1, zigzag: bool = False) -> Tensor:
    """Replicate -> Shard: this rank's part along `dim`, without communication; the gradient is gathered."""
    mesh_axis = comm.axis(axis)
    return x.contiguous() if mesh_axis.size == 1 else _take(Shard(mesh_axis, dim, outer, zigzag), x)


def sum_gradient(x: Tensor, axis: str, reduce_dtype: torch.dtype | None = None) -> Tensor:
    """Whole to whole, for ranks that each use a part of `x`: no communication, but their gradients are summed (Megatron's f).

    They are summed in `reduce_dtype`, by default that of `x`.
    """
    mesh_axis = comm.axis(axis)
    return x if mesh_axis.size == 1 else _take(steps.sum_gradient(mesh_axis, reduce_dtype), x)


def keep_first(x: Tensor, axis: str) -> Tensor:
    """Replicate -> Partial: `x` on the first rank of the axis, zeros on the others; the gradient passes unchanged."""
    mesh_axis = comm.axis(axis)
    return x if mesh_axis.size == 1 else _take(KeepFirst(mesh_axis), x)


def take_microbatch(x: Tensor, axis: str, dim: int, outer: int = 1) -> Tensor:
    """Replicate -> Shard on the axis of micro-batches: the part of `x` that this micro-batch has, a view.

    The gradient is zero outside of that part, and the micro-batches' gradients add up in what `x` was made from.
    """
    mesh_axis = comm.axis(axis)
    if outer == 1:
        size = x.shape[dim] // mesh_axis.size
        return x.narrow(dim, mesh_axis.index * size, size)
    return blocks_of(x, dim, outer, mesh_axis.size).select(dim + 1, mesh_axis.index).flatten(dim, dim + 1)


def keep_in_first_microbatch(x: Tensor, axis: str) -> Tensor:
    """Replicate -> Partial on the axis of micro-batches: `x` in the first micro-batch, zeros in the others."""
    return x if comm.axis(axis).index == 0 else torch.zeros_like(x)


def join_halves(first: Tensor, second: Tensor, dim: int, outer: int) -> Tensor:
    """What the whole batch has of a tensor of which the two halves have parts along `dim`, inside each of its `outer` blocks."""
    return join_parts((first, second), dim, outer)


def add_halves(first: Tensor, second: Tensor) -> Tensor:
    """What the whole batch has of a tensor of which the two halves have summands."""
    return first + second


def all_to_all(
    x: Tensor,
    axis: str,
    from_dim: int,
    to_dim: int,
    from_outer: int = 1,
    to_outer: int = 1,
    from_zigzag: bool = False,
    to_zigzag: bool = False,
) -> Tensor:
    """Shard of `from_dim` -> Shard of `to_dim`: every rank exchanges a block with every other; the gradient makes the reverse exchange.

    Args:
        x: this rank's part, split along `from_dim`.
        axis: the mesh axis.
        from_dim: the dim that becomes whole.
        to_dim: the dim that is split instead.
        from_outer: number of outer blocks of `from_dim` in `x`.
        to_outer: number of outer blocks of `to_dim` in the result.
        from_zigzag: whether a part of `from_dim` has two pieces of each of its blocks.
        to_zigzag: the same of `to_dim`.

    Raises InputError when both dims are the same one.
    """
    if from_dim == to_dim:
        raise InputError(f"an all-to-all goes between two dims of a tensor, both are {to_dim}: gather and shard instead")
    mesh_axis = comm.axis(axis)
    if mesh_axis.size == 1:
        return x.contiguous()
    return _take(AllToAll(mesh_axis, from_dim, to_dim, from_outer, to_outer, from_zigzag, to_zigzag), x)


def gather_along(x: Tensor, axis: comm.Axis, dim: int, outer: int, *, zigzag: bool = False) -> Tensor:
    """`all_gather` with ``grad="slice"``, given the axis itself instead of its name."""
    return _take(AllGather(axis, dim, outer, "slice", zigzag), x)


def gather_read_along(x: Tensor, axis: comm.Axis, dim: int, *, zigzag: bool) -> Tensor:
    """`all_gather` with ``grad="reduce_scatter"``, given the axis itself instead of its name."""
    return _take(AllGather(axis, dim, zigzag=zigzag), x)


def shard_along(x: Tensor, axis: comm.Axis, dim: int, outer: int, *, zigzag: bool = False) -> Tensor:
    """`shard`, given the axis itself instead of its name."""
    return _take(Shard(axis, dim, outer, zigzag), x)


def reduce_scatter_along(x: Tensor, axis: comm.Axis, dim: int, outer: int) -> Tensor:
    """`reduce_scatter`, given the axis itself instead of its name."""
    return _take(ReduceScatter(axis, dim, outer), x)


def sum_along(x: Tensor, axis: comm.Axis) -> Tensor:
    """`all_reduce` with ``grad="identity"``, given the axis itself instead of its name."""
    return _take(AllReduce(axis), x)


def sum_gradient_along(x: Tensor, axis: comm.Axis) -> Tensor:
    """`sum_gradient`, given the axis itself instead of its name."""
    return _take(steps.sum_gradient(axis), x)
