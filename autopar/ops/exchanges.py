"""Collectives of activations in two calls, so that what stands between the two computes while the ranks exchange.

Comes in: this rank's part of a tensor, and the name of a function of `autopar.ops.collectives`. Goes out: what that function gives, with
the same gradient, from `end`.

In the backward the two change places: the backward of `end` begins the dual collective for the gradient, that of `begin` waits for it.
Autograd runs what was recorded last first, so what stood between `begin` and `end` in the forward has its backward between the two in the
backward. A collective that exchanges nothing in the forward needs nothing to stand there: ``behind`` says what its backward waits behind.
A begin and its end are joined in autograd's graph by an empty tensor, the token, since what is exchanged isn't there yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from autopar import torch_backward
from autopar.ops import comm
from autopar.ops.steps import AllGather, AllReduce, AllToAll, ReduceScatter, Shard, Step, sum_gradient

# The arguments are those of the functions of `autopar.ops.collectives`, behind the tensor.
_STEPS: Mapping[str, Callable[..., Step]] = {
    "all_reduce": AllReduce,
    "sum_gradient": sum_gradient,
    "all_gather": AllGather,
    "reduce_scatter": ReduceScatter,
    "shard": Shard,
    "all_to_all": AllToAll,
}

KINDS = frozenset(_STEPS)
"""Names of the collectives that `begin` knows."""
KINDS_OF_GRADIENTS = frozenset({"sum_gradient", "shard"})
"""Those which exchange nothing in the forward."""


@final
class _Run:
    """One run of a step, from its begin to its end, and the one of the dual step in the backward that runs now."""

    def __init__(self, step: Step) -> None:
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
