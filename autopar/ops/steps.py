"""Steps between two states of a layout on one axis, each with the step of its gradient, its dual; without autograd.

Comes in: this rank's part of a tensor in one state of `autopar.ir.layout`. Goes out: its part in another; `autopar.ir.reshard.PAIRS` lists
which step is whose dual. A step is begun and waited for, at once (`autopar.ops.collectives`) or later (`autopar.ops.exchanges`). The dual
of the dual is the step itself, so gradients can be differentiated again, any number of times.

`dim` is split inside each of `outer` equal blocks, `outer` being the number of those blocks in this rank's part
(`autopar.ir.layout.local_outer`); `zigzag` says that a part has two pieces of each of them. Results are contiguous.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from autopar.ops import comm
from autopar.ops.parts import join_stack, split_parts, take_part


class Step(ABC):
    """A step on one axis."""

    axis: comm.Axis

    @abstractmethod
    def begin(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin the step; the function that is returned waits for it, and gives its result. `x` must not change until then."""

    @property
    @abstractmethod
    def dual(self) -> Step:
        """The step of the gradient."""


@dataclass(frozen=True, slots=True)
class PassOn(Step):
    """Nothing: the result is the tensor itself. `gradient` is the step of its gradient."""

    axis: comm.Axis
    gradient: Step

    def begin(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin the step, as `Step` says."""
        detached = x.detach()
        return lambda: detached.view_as(detached)

    @property
    def dual(self) -> Step:
        """The step of the gradient."""
        return self.gradient


@dataclass(frozen=True, slots=True)
class AllReduce(Step):
    """Partial -> Replicate: the sum over the ranks, whose gradient passes unchanged (``identity``) or is summed too (``all_reduce``).

    It is made in `dtype`, by default that of the tensor, which the result has.
    """

    axis: comm.Axis
    grad: str = "identity"
    dtype: torch.dtype | None = None

    def begin(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin the step, as `Step` says."""
        own = x.dtype
        begun = self.axis.begin_all_reduce(x if self.dtype is None else x.to(self.dtype))
        return lambda: begun.wait().to(own)

    @property
    def dual(self) -> Step:
        """The step of the gradient."""
        return self if self.grad == "all_reduce" else PassOn(self.axis, self)


@dataclass(frozen=True, slots=True)
class AllGather(Step):
    """Shard -> Replicate: the parts of all ranks joined, whose gradient is summed (``reduce_scatter``) or whole (``slice``)."""

    axis: comm.Axis
    dim: int
    outer: int = 1
    grad: str = "reduce_scatter"
    zigzag: bool = False

    def begin(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin the step, as `Step` says."""
        begun = self.axis.begin_gather_stack(x.detach())
        return lambda: join_stack(begun.wait(), self.dim, self.outer, zigzag=self.zigzag)

    @property
    def dual(self) -> Step:
        """The step of the gradient."""
        dual = Shard if self.grad == "slice" else ReduceScatter
        return dual(self.axis, self.dim, self.outer, self.zigzag)


@dataclass(frozen=True, slots=True)
class ReduceScatter(Step):
    """Partial -> Shard: the sum over the ranks, of which each gets its part."""

    axis: comm.Axis
    dim: int
    outer: int = 1
    zigzag: bool = False

    def begin(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin the step, as `Step` says."""
        return self.axis.begin_reduce_stack(split_parts(x.detach(), self.dim, self.outer, self.axis.size, self.zigzag)).wait

    @property
    def dual(self) -> Step:
        """The step of the gradient."""
        return AllGather(self.axis, self.dim, self.outer, "reduce_scatter", self.zigzag)


@dataclass(frozen=True, slots=True)
class Shard(Step):
    """Replicate -> Shard: this rank's part, without communication."""

    axis: comm.Axis
    dim: int
    outer: int = 1
    zigzag: bool = False

    def begin(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin the step, as `Step` says."""
        part = take_part(x.detach(), self.dim, self.outer, self.axis.index, self.axis.size, self.zigzag)
        return lambda: part

    @property
    def dual(self) -> Step:
        """The step of the gradient."""
        return AllGather(self.axis, self.dim, self.outer, "slice", self.zigzag)


@dataclass(frozen=True, slots=True)
class KeepFirst(Step):
    """Replicate -> Partial: the tensor itself on the first rank, zeros on the others, without communication."""

    axis: comm.Axis

    def begin(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin the step, as `Step` says."""
        kept = x.detach() if self.axis.index == 0 else torch.zeros_like(x, requires_grad=False)
        return lambda: kept.view_as(kept)

    @property
    def dual(self) -> Step:
        """The step of the gradient."""
        return PassOn(self.axis, self)


@dataclass(frozen=True, slots=True)
class AllToAll(Step):
    """Shard of one dim -> Shard of another: every rank exchanges a block with every other."""

    axis: comm.Axis
    from_dim: int
    to_dim: int
    from_outer: int = 1
    to_outer: int = 1
    from_zigzag: bool = False
    to_zigzag: bool = False

    def begin(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin the step, as `Step` says."""
        begun = self.axis.begin_exchange_stack(split_parts(x.detach(), self.to_dim, self.to_outer, self.axis.size, self.to_zigzag))
        return lambda: join_stack(begun.wait(), self.from_dim, self.from_outer, zigzag=self.from_zigzag)

    @property
    def dual(self) -> Step:
        """The step of the gradient."""
        return AllToAll(self.axis, self.to_dim, self.from_dim, self.to_outer, self.from_outer, self.to_zigzag, self.from_zigzag)


def sum_gradient(axis: comm.Axis, dtype: torch.dtype | None = None) -> PassOn:
    """Nothing, but the gradient is summed over the ranks, in `dtype` (Megatron's f)."""
    return PassOn(axis, AllReduce(axis, dtype=dtype))
