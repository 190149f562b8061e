"""The backward in two passes, input gradients first and weight gradients later, for zero-bubble schedules (arXiv 2401.10241, section 2).

Comes in: calls of operators that contract with parameters, through `defer` (`autopar.ops.deferrable` has one function per operator). Goes
out: the same results. A backward inside `deferring` computes the gradients of everything but those parameters, and yields a `Deferred` that
computes the rest when it is run. Any other backward runs its own `Deferred` at its end, so that ``backward()`` alone gives all gradients.

The operator itself runs on parameters that are detached from autograd's graph, so torch's own formula gives the input gradient, and what
the weight gradient needs is saved on the side: the input x and the gradient of the result y. ::

    x ──> _SaveInput ──> operator ──> y      a hook on y saves its gradient; the backward of _SaveInput saves x and hands the call over

`_SaveInput` comes before the operator: the recomputation of a region that ends with the call stops at x. Outside of such regions products
are one node, `_ProductOfLeaves`, which costs less. From what was saved, `Deferred.run` computes the gradients and adds them to the leaves.
Where parameters are made of leaves (by a gather, a cast), or a leaf has hooks, autograd must carry the gradients to the leaves::

    weight, bias ──> _ParametersOf ──> handle      the backward from the handle computes the parameters' gradients from what was saved

The handle isn't part of y, so a backward from y doesn't reach the parameters.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autopar import torch_compat
from autopar.errors import AutoparError
from autopar.ops.double_backward import refuse_double_backward

Gradients = tuple[Tensor | None, ...]
"""The gradient of each parameter of a call, in order; None where it needs none."""


@dataclass(slots=True, eq=False)
class _Call:
    """One call of an operator, between its forward and the computation of its weight gradients.

    Attributes:
        formula: from the call's input and its result's gradient to the gradients of its parameters.
        parameters: the parameters that the gradients are added to; empty with a handle.
        handle: an empty tensor whose backward hands the gradients to autograd, where parameters aren't leaves; None where they are.
        x: the call's input, saved since the backward has passed the call.
        gradient: the gradient of the call's result, saved likewise.
    """

    formula: Callable[[Tensor, Tensor], Gradients]
    parameters: tuple[Tensor | None, ...]
    handle: Tensor | None = None
    x: Tensor | None = None
    gradient: Tensor | None = None

    def pop_saved(self) -> tuple[Tensor, Tensor]:
        """The saved input and gradient, which are then released. Raises AutoparError when they aren't there any more."""
        x, gradient = self.x, self.gradient
        if x is None or gradient is None:
            raise AutoparError("the weight gradients of one pass were asked for twice; each `Deferred` runs once")
        self.x = self.gradient = None
        return x, gradient


class Deferred:
    """The weight gradients that the backwards inside one `deferring` block haven't computed yet."""

    def __init__(self) -> None:
        self._pending: list[_Call] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the saved inputs and result gradients; memory that several calls share counts once."""
        return sum(dict(map(_storage_of, self._saved_tensors())).values())

    def run(self) -> None:
        """Compute the weight gradients and add them to the parameters' ``grad``; what was saved is released call by call.

        Gradients of parameters that aren't leaves, or whose leaves have hooks, go through one backward of autograd.

        Raises AutoparError when the weight gradients of a call are computed a second time.
        """
        handles: list[Tensor] = []
        calls, self._pending = self._pending[::-1], []
        while calls:
            call = calls.pop()
            if call.handle is None and any(p is not None and torch_compat.has_hooks(p) for p in call.parameters):
                with torch.enable_grad():
                    call.handle = _ParametersOf.apply(call, *call.parameters)  # type: ignore[no-untyped-call]
            if call.handle is not None:
                handles.append(call.handle)
                continue
            with torch.no_grad():
                for parameter, gradient in zip(call.parameters, call.formula(*call.pop_saved()), strict=False):
                    if parameter is not None and gradient is not None:
                        _accumulate(parameter, gradient)
        if handles:
            torch.autograd.backward(handles, [torch.empty_like(handle) for handle in handles])

    def _saved_tensors(self) -> Iterator[Tensor]:
        for call in self._pending:
            if call.x is not None and call.gradient is not None:
                yield from (call.x, call.gradient)

    def _add(self, call: _Call) -> None:
        self._pending.append(call)

    def _copy_shared(self) -> None:
        """Copy the saved gradients whose memory anything else uses.

        Autograd may make a gradient the ``grad`` of a leaf without a copy, and adds the next micro-batch's to it in place. Where the leaf's
        gradient is a view of one that is saved here (of an added bias of the result's size), that would change the saved one.
        """
        # Few are shared, so the cheap test comes before the one that counts our own users.
        shared = [(call, call.gradient) for call in self._pending if call.gradient is not None]
        shared = [(call, gradient) for call, gradient in shared if torch_compat.storage_users(gradient) > 1]
        if not shared:
            return
        own_users: dict[int, set[int]] = {}
        for x in self._saved_tensors():
            own_users.setdefault(torch_compat.StorageRef.key_of(x), set()).add(id(x))
        for call, gradient in shared:
            if torch_compat.storage_users(gradient) > len(own_users[torch_compat.StorageRef.key_of(gradient)]):
                call.gradient = gradient.clone()


def _accumulate(leaf: Tensor, gradient: Tensor) -> None:
    """Add to a leaf's ``grad`` as autograd does: the first gradient becomes ``grad`` without a copy if nothing else uses its memory."""
    if leaf.grad is not None:
        leaf.grad += gradient
    else:
        leaf.grad = gradient if torch_compat.storage_users(gradient) == 1 else gradient.clone()


def _storage_of(x: Tensor) -> tuple[int, int]:
    """A number that identifies the storage of a tensor, and the storage's bytes."""
    return torch_compat.StorageRef.key_of(x), x.untyped_storage().nbytes()


# A context variable, since torch makes those of the caller of a backward readable on the backward's threads.
_ACTIVE: ContextVar[Deferred | None] = ContextVar("_ACTIVE", default=None)


@contextmanager
def deferring() -> Iterator[Deferred]:
    """Inside, backwards don't compute the weight gradients of calls of `deferrable`'s functions; the `Deferred` that this yields does.

    ::

        with deferring() as deferred:
            loss.backward()  # gradients of inputs
        deferred.run()  # gradients of weights
    """
    deferred = Deferred()
    token = _ACTIVE.set(deferred)
    try:
        yield deferred
    finally:
        _ACTIVE.reset(token)
    deferred._copy_shared()


class _LastBackward(threading.local):
    """The last backward on this thread that ran outside `deferring`, and its own `Deferred`, which runs at its end."""

    backward: int = -1
    deferred: weakref.ref[Deferred] | None = None


_LAST_BACKWARD = _LastBackward()


def _find_deferred() -> Deferred:
    """The `Deferred` of the backward that runs now: of the active `deferring`, else one that runs when this backward ends."""
    active = _ACTIVE.get() or torch_compat.read_in_backward(_ACTIVE)
    if active is not None:
        return active
    this_backward = torch_compat.backward_id()
    if _LAST_BACKWARD.deferred is not None and _LAST_BACKWARD.backward == this_backward:
        deferred = _LAST_BACKWARD.deferred()
        if deferred is not None:
            return deferred
    deferred = Deferred()
    # Only the callback holds a reference, so that a backward that fails releases it.
    _LAST_BACKWARD.backward, _LAST_BACKWARD.deferred = this_backward, weakref.ref(deferred)
    run = deferred.run
    # A callback from within a callback comes after all others: one of somebody else may finish what this backward began.
    torch_compat.after_backward(lambda: torch_compat.after_backward(run))
    return deferred


_IN_TWO_PASSES = "a call whose weight gradients are left to a pass of their own"


class _SaveInput(torch.autograd.Function):
    """The identity before an operator: saves the call's input, and in the backward hands the call to the current `Deferred`."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor) -> Tensor:
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, Tensor | None]:
        refuse_double_backward(_IN_TWO_PASSES)
        _save_input(ctx.call, *ctx.saved_tensors)
        return None, grads[0]


class _ProductOfLeaves(torch.autograd.Function):
    """A product with parameters that are leaves, as one node that saves the call's input and its result's gradient."""

    @staticmethod
    def forward(ctx: Any, call: _Call, product: Product, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.call, ctx.product = call, product
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        return product.operator(x, weight) if bias is None else product.operator(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, None, Tensor | None, None, None]:
        refuse_double_backward(_IN_TWO_PASSES)
        x, weight = ctx.saved_tensors
        (gradient,) = grads
        if gradient is None:
            return None, None, None, None, None
        ctx.call.gradient = gradient
        _save_input(ctx.call, x)
        return None, None, ctx.product.to_input(gradient, weight), None, None


@dataclass(frozen=True, slots=True)
class Product:
    """A product that runs as one node of autograd's graph.

    Attributes:
        operator: from input, weight and, if there is one, bias to the result.
        to_input: from the result's gradient and the weight to the input's gradient.
    """

    operator: Callable[..., Tensor]
    to_input: Callable[[Tensor, Tensor], Tensor]


class _SaveBoth(torch.autograd.Function):
    """The identity after an operator whose input needs no gradient, such as the indices of an embedding: saves both for the call.

    The anchor, an empty tensor that requires a gradient, puts the node into autograd's graph.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, y: Tensor, anchor: Tensor) -> Tensor:
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, None, None, None]:
        refuse_double_backward(_IN_TWO_PASSES)
        ctx.call.gradient = grads[0]
        _save_input(ctx.call, *ctx.saved_tensors)
        return None, None, None, None


def _save_input(call: _Call, x: Tensor) -> None:
    """Complete a call, whose result's gradient was saved, with its input, and give it to the current `Deferred`."""
    if call.x is not None:
        raise AutoparError("a second backward came by before the weight gradients of the first were computed: run its `Deferred` first")
    if call.gradient is not None:
        call.x = x
        _find_deferred()._add(call)


def _save_gradient(call: _Call, gradient: Tensor) -> None:
    call.gradient = gradient


class _ParametersOf(torch.autograd.Function):
    """From a call's parameters to its handle, an empty tensor; the backward computes the parameters' gradients from what was saved."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *parameters: Tensor | None) -> Tensor:
        ctx.call = call
        return torch.empty(0, device=next(p.device for p in parameters if p is not None))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward(_IN_TWO_PASSES)
        call: _Call = ctx.call
        return None, *call.formula(*call.pop_saved())


class _InRegion(threading.local):
    """Whether this thread is inside a region that the backward will run again."""

    region: bool = False


_IN_REGION = _InRegion()


@contextmanager
def in_recomputed_region() -> Iterator[None]:
    """Inside, calls belong to a region that the backward will run again.

    They save their input before the operator, so that the recomputation can stop there, without the operator.
    """
    before, _IN_REGION.region = _IN_REGION.region, True
    try:
        yield
    finally:
        _IN_REGION.region = before


def defer(
    operator: Callable[..., Tensor],
    formula: Callable[[Tensor, Tensor], Gradients],
    x: Tensor,
    *parameters: Tensor | None,
    product: Product | None = None,
) -> Tensor:
    """Call an operator so that the backward leaves the gradients of its parameters to the current `Deferred`.

    Args:
        operator: called as ``operator(x, *parameters)``.
        formula: from `x` and the gradient of the result to the gradients of the parameters.
        x: the input that gets its gradient in the backward itself.
        parameters: weight, and bias or None.
        product: the same operator as one node, which is used where it can be.
    """
    call = _Call(formula, parameters)
    are_leaves = all(parameter is None or parameter.is_leaf for parameter in parameters)
    detached = [None if parameter is None else parameter.detach() for parameter in parameters]
    result: Tensor
    if product is not None and x.requires_grad and not _IN_REGION.region and are_leaves:
        weight, bias = detached if len(detached) == 2 else (*detached, None)
        result = _ProductOfLeaves.apply(call, product, x, weight, bias)  # type: ignore[no-untyped-call]
        return result
    if not are_leaves:
        call.handle, call.parameters = _ParametersOf.apply(call, *parameters), ()  # type: ignore[no-untyped-call]
    if x.requires_grad:
        result = operator(_SaveInput.apply(call, x), *detached)  # type: ignore[no-untyped-call]
        result.register_hook(partial(_save_gradient, call))  # type: ignore[no-untyped-call]
    else:
        anchor = torch.empty(0, device=x.device, requires_grad=True)
        result = _SaveBoth.apply(call, x, operator(x, *detached), anchor)  # type: ignore[no-untyped-call]
    return result
