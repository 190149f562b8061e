"""Collectives of activations in two calls, so that what stands between the two computes while the ranks exchange.

Comes in: this rank's part of a tensor, and the name of a function of `autopar.ops.collectives`. Goes out: what that function gives, with
the same gradient, from `end`.

In the backward the two change places: the backward of `end` begins the dual collective for the gradient, that of `begin` waits for it.
Autograd runs what was recorded last first, so what stood between `begin` and `end` in the forward has its backward between the two in the
backward. A collective that exchanges nothing in the forward needs nothing to stand there: ``behind`` says what its backward waits behind.
A begin and its end are joined in autograd's graph by an empty tensor, the token, since what is exchanged isn't there yet.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from autopar import torch_backward
from autopar.ops import comm
from autopar.ops.parts import join_stack, split_parts, take_part


class _Step(ABC):
    """A step between two states of a layout on one axis, for a tensor; its dual is that for the gradient."""

    axis: comm.Axis

    @abstractmethod
    def begin(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin the step; the function that is returned waits for it, and gives its result."""

    @property
    @abstractmethod
    def dual(self) -> _Step:
        """The step of the gradient."""


@dataclass(frozen=True, slots=True)
class _Pass(_Step):
    """Nothing, whose gradient is summed (Megatron's f)."""

    axis: comm.Axis

    def begin(self, x: Tensor) -> Callable[[], Tensor]:
        detached = x.detach()
        return lambda: detached.view_as(detached)

    @property
    def dual(self) -> _Step:
        return _Sum(self.axis, "identity")


@dataclass(frozen=True, slots=True)
class _Sum(_Step):
    axis: comm.Axis
    grad: str

    def begin(self, x: Tensor) -> Callable[[], Tensor]:
        return self.axis.begin_all_reduce(x).wait

    @property
    def dual(self) -> _Step:
        return self if self.grad == "all_reduce" else _Pass(self.axis)


@dataclass(frozen=True, slots=True)
class _Gather(_Step):
    axis: comm.Axis
    dim: int
    outer: int
    grad: str

    def begin(self, x: Tensor) -> Callable[[], Tensor]:
        begun = self.axis.begin_gather_stack(x.detach())
        return lambda: join_stack(begun.wait(), self.dim, self.outer)

    @property
    def dual(self) -> _Step:
        return _Take(self.axis, self.dim, self.outer) if self.grad == "slice" else _Scatter(self.axis, self.dim, self.outer)


@dataclass(frozen=True, slots=True)
class _Scatter(_Step):
    axis: comm.Axis
    dim: int
    outer: int

    def begin(self, x: Tensor) -> Callable[[], Tensor]:
        return self.axis.begin_reduce_stack(split_parts(x.detach(), self.dim, self.outer, self.axis.size)).wait

    @property
    def dual(self) -> _Step:
        return _Gather(self.axis, self.dim, self.outer, "reduce_scatter")


@dataclass(frozen=True, slots=True)
class _Take(_Step):
    axis: comm.Axis
    dim: int
    outer: int

    def begin(self, x: Tensor) -> Callable[[], Tensor]:
        part = take_part(x.detach(), self.dim, self.outer, self.axis.index, self.axis.size)
        return lambda: part

    @property
    def dual(self) -> _Step:
        return _Gather(self.axis, self.dim, self.outer, "slice")


@dataclass(frozen=True, slots=True)
class _Exchange(_Step):
    axis: comm.Axis
    from_dim: int
    to_dim: int
    from_outer: int
    to_outer: int

    def begin(self, x: Tensor) -> Callable[[], Tensor]:
        begun = self.axis.begin_exchange_stack(split_parts(x.detach(), self.to_dim, self.to_outer, self.axis.size))
        return lambda: join_stack(begun.wait(), self.from_dim, self.from_outer)

    @property
    def dual(self) -> _Step:
        return _Exchange(self.axis, self.to_dim, self.from_dim, self.to_outer, self.from_outer)


# The arguments are those of the functions of `autopar.ops.collectives`, behind the tensor.
_STEPS: Mapping[str, Callable[..., _Step]] = {
    "all_reduce": lambda axis, grad="identity": _Sum(axis, grad),
    "sum_gradient": _Pass,
    "all_gather": lambda axis, dim, outer=1, grad="reduce_scatter": _Gather(axis, dim, outer, grad),
    "reduce_scatter": lambda axis, dim, outer=1: _Scatter(axis, dim, outer),
    "shard": lambda axis, dim, outer=1: _Take(axis, dim, outer),
    "all_to_all": lambda axis, from_dim, to_dim, from_outer=1, to_outer=1: _Exchange(axis, from_dim, to_dim, from_outer, to_outer),
}

KINDS = frozenset(_STEPS)
"""Names of the collectives that `begin` knows."""
KINDS_OF_GRADIENTS = frozenset({"sum_gradient", "shard"})
"""Those which exchange nothing in the forward."""


@final
class _Run:
    """One run of a step, from its begin to its end, and the one of the dual step in the backward that runs now."""

    def __init__(self, step: _Step) -> None:
        self.step = step
        self._finish: Callable[[], Tensor] | None = None
        self._dual: _Run | None = None

    def begin(self, x: Tensor) -> Tensor:
        """Begin; the token."""
        self._finish = self.step.begin(x)
        return x.new_empty(0)

    def end(self) -> Tensor:
        """Wait; the result."""
        assert self._finish is not None, "a step is begun before it ends, in the backward too"
        finish, self._finish = self._finish, None
        return finish()

    def begin_dual(self, gradient: Tensor) -> Tensor:
        """Begin the step of the gradient."""
        self._dual = _Run(self.step.dual)
        token: Tensor = _Begin.apply(gradient, self._dual)  # type: ignore[no-untyped-call]
        return token

    def end_dual(self, token: Tensor) -> Tensor:
        """End it."""
        assert self._dual is not None, "autograd comes to the end of a step before it comes to its begin"
        dual, self._dual = self._dual, None
        gradient: Tensor = _End.apply(token, dual)  # type: ignore[no-untyped-call]
        return gradient


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, run: _Run) -> Tensor:
        ctx.run = run
        return run.begin(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.run.end_dual(grads[0]), None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, run: _Run) -> Tensor:
        ctx.run = run
        return run.end()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.run.begin_dual(grads[0]), None


@dataclass(frozen=True, slots=True)
class Begun:
    """A collective that was begun.

    Attributes:
        token: stands for it in autograd's graph; with one rank on the axis, the result itself.
        run: None with one rank.
        place: of its begin in the order of backwards; None without one.
    """

    token: Tensor
    run: _Run | None
    place: int | None = None


def begin(kind: str, x: Tensor, axis: str, *arguments: Any, behind: Begun | None = None, **options: Any) -> Begun:
    """Begin a collective.

    Args:
        kind: its name; the other arguments are those of the function of that name in `autopar.ops.collectives`.
        x: this rank's part of a tensor.
        axis: the mesh axis.
        arguments: further ones.
        behind: a collective begun before. In the backward this one is waited for when that of the gradient of `behind` was begun, and so
            runs while the backward of what came after `behind` computes.
        options: further arguments.
    """
    mesh_axis = comm.axis(axis)
    if mesh_axis.size == 1:
        return Begun(x if kind == "sum_gradient" else x.contiguous(), None)
    run = _Run(_STEPS[kind](mesh_axis, *arguments, **options))
    token: Tensor = _Begin.apply(x, run)  # type: ignore[no-untyped-call]
    place = torch_backward.backward_place(token)
    if behind is not None and behind.place is not None:
        torch_backward.run_in_place(token, behind.place)
    return Begun(token, run, place)


def end(begun: Begun) -> Tensor:
    """Wait for a collective; its result."""
    if begun.run is None:
        return begun.token
    result: Tensor = _End.apply(begun.token, begun.run)  # type: ignore[no-untyped-call]
    return result
