"""The backward in two passes, input gradients now and weight gradients later, as zero-bubble schedules want it (arXiv 2401.10241, 2).

Comes in: the calls of an emitted program that contract with parameters, here under the names and arguments of the aten operators
that they replace. Goes out: the same values; and from a backward inside `deferring` the gradients of everything but those
parameters, with a `Deferred` that computes the rest when it is run. Any other backward runs it at its own end.

Each call is the operator itself on parameters cut out of the graph, so torch's own formulas give the input gradient. Beside it two notes
are taken of what the weight gradient needs::

    x ──> _Keep ──> operator ──> y        a hook on y notes its gradient
                                          _Keep saves x and notes it: the pass of the inputs ends here

`_Keep` comes before the operator: a recomputed region that ends with it isn't run further than x. Outside of such regions products are one
node, `_Product`, which takes both notes and costs less. Later the notes give the gradients, which leaves take at once. Where parameters are
made of leaves (a gather, a cast), or somebody watches a leaf, autograd takes them there::

    weight, bias ──> _Weigh ──> ticket    _Weigh computes from the notes what the parameters get

The ticket is no part of y, so a backward from y doesn't come to the parameters; one from the ticket does.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from autopar import torch_compat
from autopar.errors import AutoparError

aten = torch.ops.aten

Gradients = tuple[Tensor | None, ...]
"""Of each parameter of a call, in order: its gradient, None where it needs none."""


@dataclass(slots=True, eq=False)
class _Call:
    """One call on its way through both passes: how its parameters' gradients come from its input and its result's gradient.

    With a ticket, autograd knows where they go.
    """

    formula: Callable[[Tensor, Tensor], Gradients]
    parameters: tuple[Tensor | None, ...]
    ticket: Tensor | None = None
    x: Tensor | None = None
    gradient: Tensor | None = None

    def take(self) -> tuple[Tensor, Tensor]:
        """Both notes, which are then gone."""
        x, gradient = self.x, self.gradient
        if x is None or gradient is None:
            raise AutoparError("the weight gradients of one pass were asked for twice; each `Deferred` runs once")
        self.x = self.gradient = None
        return x, gradient


class Deferred:
    """The weight gradients that backwards inside one `deferring` have left to be computed."""

    def __init__(self) -> None:
        self._left: list[_Call] = []

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds: inputs of calls and gradients of their results, each once however many calls share it."""
        return sum(dict(map(_storage_of, self._held())).values())

    def run(self) -> None:
        """Compute the weight gradients and add them to the leaves' ``grad``; what is held goes bit by bit.

        Those that autograd has to take to their leaves come in one backward.
        """
        tickets: list[Tensor] = []
        calls, self._left = self._left[::-1], []
        while calls:
            call = calls.pop()
            if call.ticket is None and any(p is not None and torch_compat.has_hooks(p) for p in call.parameters):
                with torch.enable_grad():
                    call.ticket = _Weigh.apply(call, *call.parameters)  # type: ignore[no-untyped-call]
            if call.ticket is not None:
                tickets.append(call.ticket)
                continue
            with torch.no_grad():
                for parameter, gradient in zip(call.parameters, call.formula(*call.take()), strict=False):
                    if parameter is not None and gradient is not None:
                        _accumulate(parameter, gradient)
        if tickets:
            torch.autograd.backward(tickets, [torch.empty_like(ticket) for ticket in tickets])

    def _held(self) -> Iterator[Tensor]:
        for call in self._left:
            if call.x is not None and call.gradient is not None:
                yield from (call.x, call.gradient)

    def _add(self, call: _Call) -> None:
        self._left.append(call)

    def _own(self) -> None:
        """Copy the gradients that share their memory with anything else.

        Autograd hands a gradient that it takes for its own to a leaf as its ``grad``, and adds the next one in place. Where that was a
        view of a gradient held here (an added bias of the result's size), the wait must not let the next micro-batch change it.
        """
        # Few are, so first those that anything shares, then those that more than ours share.
        shared = [(call, call.gradient) for call in self._left if call.gradient is not None]
        shared = [(call, gradient) for call, gradient in shared if torch_compat.storage_users(gradient) > 1]
        if not shared:
            return
        ours: dict[int, set[int]] = {}
        for x in self._held():
            ours.setdefault(torch_compat.StorageRef.key_of(x), set()).add(id(x))
        for call, gradient in shared:
            if torch_compat.storage_users(gradient) > len(ours[torch_compat.StorageRef.key_of(gradient)]):
                call.gradient = gradient.clone()


def _accumulate(leaf: Tensor, gradient: Tensor) -> None:
    """Add to a leaf's ``grad`` as autograd does: the first one is taken for its own if nobody else has it."""
    if leaf.grad is not None:
        leaf.grad += gradient
    else:
        leaf.grad = gradient if torch_compat.storage_users(gradient) == 1 else gradient.clone()


def _storage_of(x: Tensor) -> tuple[int, int]:
    """A number that tells the memory of a tensor from that of others, and its bytes."""
    return torch_compat.StorageRef.key_of(x), x.untyped_storage().nbytes()


# A context variable, as torch takes those of the caller along to the threads of a backward.
_ACTIVE: ContextVar[Deferred | None] = ContextVar("_ACTIVE", default=None)


@contextmanager
def deferring() -> Iterator[Deferred]:
    """Backwards inside leave the weight gradients of the calls below to the `Deferred` that this gives."""
    deferred = Deferred()
    token = _ACTIVE.set(deferred)
    try:
        yield deferred
    finally:
        _ACTIVE.reset(token)
    deferred._own()


class _AtOnce(threading.local):
    """The backward that last ran here outside `deferring`, and what it left."""

    backward: int = -1
    deferred: weakref.ref[Deferred] | None = None


_AT_ONCE = _AtOnce()


def _find_deferred() -> Deferred:
    """Where the backward that runs now leaves weight gradients."""
    active = _ACTIVE.get() or torch_compat.read_in_backward(_ACTIVE)
    if active is not None:
        return active
    this_backward = torch_compat.backward_id()
    found = _AT_ONCE.deferred() if _AT_ONCE.deferred is not None and _AT_ONCE.backward == this_backward else None
    if found is None:
        found = Deferred()
        # Held by the callback alone, so a backward that fails takes it along.
        _AT_ONCE.backward, _AT_ONCE.deferred = this_backward, weakref.ref(found)
        run = found.run
        # The last of all: a callback of somebody else may finish what this backward began, a second one must not come between.
        torch_compat.after_backward(lambda: torch_compat.after_backward(run))
    return found


class _Keep(torch.autograd.Function):
    """Saves the input of a call, and hands the call over when the backward has come by."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor) -> Tensor:
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, Tensor | None]:
        _note(ctx.call, *ctx.saved_tensors)
        return None, grads[0]


class _Product(torch.autograd.Function):
    """A product with leaves, and both its notes."""

    @staticmethod
    def forward(ctx: Any, call: _Call, kind: _Kind, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.call, ctx.kind = call, kind
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        return kind.operator(x, weight) if bias is None else kind.operator(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        (gradient,) = grads
        if gradient is None:
            return None, None, None, None, None
        ctx.call.gradient = gradient
        _note(ctx.call, x)
        return None, None, ctx.kind.to_input(gradient, weight), None, None


@dataclass(frozen=True, slots=True)
class _Kind:
    """A product: the operator, and how its input's gradient comes from the result's and the weight."""

    operator: Callable[..., Tensor]
    to_input: Callable[[Tensor, Tensor], Tensor]


class _Watch(torch.autograd.Function):
    """Both notes of a call whose input needs no gradient, and whose result needs one all the same: a table of token numbers."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, y: Tensor, anchor: Tensor) -> Tensor:
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, None, None, None]:
        ctx.call.gradient = grads[0]
        _note(ctx.call, *ctx.saved_tensors)
        return None, None, None, None


def _note(call: _Call, x: Tensor) -> None:
    if call.x is not None:
        raise AutoparError("a second backward came by before the weight gradients of the first were computed: run its `Deferred` first")
    if call.gradient is not None:
        call.x = x
        _find_deferred()._add(call)


def _catch(call: _Call, gradient: Tensor) -> None:
    call.gradient = gradient


class _Weigh(torch.autograd.Function):
    """The place of a call's parameters in the graph: nothing flows forward, the notes of the call become their gradients."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *parameters: Tensor | None) -> Tensor:
        ctx.call = call
        return torch.empty(0, device=next(p.device for p in parameters if p is not None))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        return None, *call.formula(*call.take())


class _Inside(threading.local):
    """Whether a region runs here that the backward will run again."""

    region: bool = False


_INSIDE = _Inside()


@contextmanager
def inside_region() -> Iterator[None]:
    """Calls below are of a region that the backward will run again, as far as it must."""
    before, _INSIDE.region = _INSIDE.region, True
    try:
        yield
    finally:
        _INSIDE.region = before


def _split(
    operator: Callable[..., Tensor],
    formula: Callable[[Tensor, Tensor], Gradients],
    x: Tensor,
    *parameters: Tensor | None,
    kind: _Kind | None = None,
) -> Tensor:
    """``operator(x, *parameters)``, whose backward leaves the parameters' gradients, ``formula(x, gradient of the result)``."""
    call = _Call(formula, parameters)
    if kind is not None and x.requires_grad and not _INSIDE.region and all(p is None or p.is_leaf for p in parameters):
        weight, bias = parameters if len(parameters) == 2 else (*parameters, None)
        assert weight is not None
        cut_bias = None if bias is None else bias.detach()
        product: Tensor = _Product.apply(call, kind, x, weight.detach(), cut_bias)  # type: ignore[no-untyped-call]
        return product
    if not all(p is None or p.is_leaf for p in parameters):
        call.ticket, call.parameters = _Weigh.apply(call, *parameters), ()  # type: ignore[no-untyped-call]
    cut = [None if p is None else p.detach() for p in parameters]
    result: Tensor
    if x.requires_grad:
        result = operator(_Keep.apply(call, x), *cut)  # type: ignore[no-untyped-call]
        result.register_hook(partial(_catch, call))  # type: ignore[no-untyped-call]
    else:
        anchor = torch.empty(0, device=x.device, requires_grad=True)
        result = _Watch.apply(call, x, operator(x, *cut), anchor)  # type: ignore[no-untyped-call]
    return result


def _can_wait(weight: Tensor) -> bool:
    return torch.is_grad_enabled() and weight.requires_grad and weight.is_floating_point()


def _is_trained(bias: Tensor | None) -> bool:
    return bias is not None and bias.requires_grad


# Products.


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``aten.linear``: x is (..., in), weight (out, in), bias (out,)."""
    if not _can_wait(weight):
        return aten.linear.default(x, weight, bias)  # type: ignore[no-any-return]
    return _split(aten.linear.default, partial(_of_linear, _is_trained(bias)), x, weight, bias, kind=_LINEAR)


_LINEAR = _Kind(aten.linear.default, lambda gradient, weight: gradient @ weight)


def _of_linear(biased: bool, x: Tensor, gradient: Tensor) -> Gradients:
    rows, slopes = _rows(x), _rows(gradient)
    return slopes.T @ rows, slopes.sum(0) if biased else None


def addmm(bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``aten.addmm``: x is (rows, in), weight (in, out), bias what broadcasts to (rows, out)."""
    if not _can_wait(weight):
        return aten.addmm.default(bias, x, weight, beta=beta, alpha=alpha)  # type: ignore[no-any-return]

    def operator(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return aten.addmm.default(bias, x, weight, beta=beta, alpha=alpha)  # type: ignore[no-any-return]

    shape = tuple(bias.shape) if _is_trained(bias) else None
    kind = _ADDMM if beta == alpha == 1 else None
    return _split(operator, partial(_of_addmm, shape, beta, alpha), x, weight, bias, kind=kind)


_ADDMM = _Kind(lambda x, weight, bias: aten.addmm.default(bias, x, weight), lambda gradient, weight: gradient @ weight.T)


def _of_addmm(bias: tuple[int, ...] | None, beta: float, alpha: float, x: Tensor, gradient: Tensor) -> Gradients:
    for_weight = x.T @ gradient
    # Of a bias of the result's size it is the gradient itself, which others may have too: a view shows in `_accumulate`.
    for_bias = None if bias is None else gradient.sum_to_size(bias).view(bias)
    return _times(for_weight, alpha), None if for_bias is None else _times(for_bias, beta)


def mm(x: Tensor, weight: Tensor) -> Tensor:
    """``aten.mm``: x is (rows, in), weight (in, out)."""
    return _product(aten.mm.default, x, weight, _MM)


_MM = _Kind(aten.mm.default, lambda gradient, weight: gradient @ weight.T)


def bmm(x: Tensor, weight: Tensor) -> Tensor:
    """``aten.bmm``: x is (batch, rows, in), weight (batch, in, out)."""
    return _product(aten.bmm.default, x, weight)


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """``aten.matmul``: of any numbers of dims; those in front of the last two are broadcast."""
    return _product(aten.matmul.default, x, weight)


def _product(operator: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, kind: _Kind | None = None) -> Tensor:
    if not _can_wait(weight):
        return operator(x, weight)
    return _split(operator, partial(_of_product, tuple(weight.shape)), x, weight, kind=kind)


def _of_product(weight: tuple[int, ...], x: Tensor, gradient: Tensor) -> Gradients:
    if len(weight) == 1:
        return (_of_product((*weight, 1), x, gradient.unsqueeze(-1))[0].squeeze(-1),)  # type: ignore[union-attr]
    if x.dim() == 1:
        x, gradient = x.unsqueeze(0), gradient.unsqueeze(-2)
    if len(weight) == 2:
        return (_rows(x).T @ _rows(gradient),)
    return ((x.mT @ gradient).sum_to_size(weight),)


def _rows(x: Tensor) -> Tensor:
    """All dims but the last as one."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


# Convolutions.


@dataclass(frozen=True, slots=True)
class _Window:
    """How a convolution slides, per spatial dim; `bias` is its bias' shape, None when that needs no gradient."""

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
        stride=_each(given["stride"], weight),
        padding=_each(given["padding"], weight),
        dilation=_each(given["dilation"], weight),
        transposed=given.get("transposed", "output_padding" in given),
        output_padding=_each(given.get("output_padding", (0,)), weight),
        groups=given["groups"],
    )

    def operator(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return target(x, weight, bias, *rest[1:])  # type: ignore[no-any-return]

    return _split(operator, partial(_of_convolution, window), x, weight, bias)


@cache
def _defaults(target: torch._ops.OpOverload) -> dict[str, Any]:
    """What follows input and weight among an operator's arguments, by name; None where there is no default."""
    return {argument.name: argument.default_value for argument in target._schema.arguments[2:]}


def _each(value: Sequence[int], weight: Tensor) -> tuple[int, ...]:
    """A number per spatial dim; one alone is for all."""
    return tuple(value) * (weight.dim() - 2) if len(value) == 1 else tuple(value)


def _of_convolution(window: _Window, x: Tensor, gradient: Tensor) -> Gradients:
    if x.dim() < len(window.weight):
        x, gradient = x.unsqueeze(0), gradient.unsqueeze(0)
    # Only its sizes are read.
    weight = gradient.new_empty(1).expand(window.weight)
    wanted = [False, True, window.bias is not None]
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
        wanted,
    )
    return for_weight, for_bias


# Tables.


def embedding(weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False) -> Tensor:
    """``aten.embedding``: weight is (rows, width), indices of any shape. A sparse gradient isn't deferred."""
    if not _can_wait(weight) or sparse:
        return aten.embedding.default(weight, indices, padding_idx, scale_grad_by_freq, sparse)  # type: ignore[no-any-return]

    def operator(indices: Tensor, weight: Tensor) -> Tensor:
        return aten.embedding.default(weight, indices, padding_idx, scale_grad_by_freq)  # type: ignore[no-any-return]

    return _split(operator, partial(_of_embedding, weight.shape[0], padding_idx, scale_grad_by_freq), indices, weight)


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
    "aten.conv_transpose1d.default": conv_transpose1d,
    "aten.conv_transpose2d.input": conv_transpose2d,
    "aten.conv_transpose3d.input": conv_transpose3d,
    "aten.embedding.default": embedding,
}
"""By an operator's name the function that replaces it where its weight gradient can wait (`autopar.structure.weights.is_deferrable`).

The rules of these operators, and of no others, say which operands are their weights (`autopar.ir.facts.Facts.weights`).
"""
