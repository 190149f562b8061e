"""What the user gets of a program's outputs: plain tensors of the whole batch or of this rank's samples, some made when they are read.

Comes in: this rank's part of each output. Goes out: the tensor that one device would return, or under ``inputs="local"`` this rank's
samples of it; with ``outputs="sharded"`` a DTensor. What is split beside a loss, such as logits, is an `UnreadOutput`, which is gathered
from all ranks when it is first used.

Gradients: every rank is taken to compute the same loss from a whole output, so each takes its part of the gradient that comes back, and the
first backwards check that all ranks send the same one. A loss of a rank's own samples is one of `count`, whose mean is trained, as under
DDP.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autopar import torch_compat
from autopar.errors import InputError
from autopar.ir import REPLICATE, Layout, local_shape
from autopar.ops import collectives, comm
from autopar.rewrite import Program, Slot
from autopar.runtime.agreement import Agreement, name_ranks
from autopar.runtime.dispatch import take_plain_gradients
from autopar.runtime.dtensor import as_dtensor, shard_whole
from autopar.runtime.fingerprints import ROUNDING, Projections, project
from autopar.runtime.parts import (
    count_shares,
    gather_parts,
    has_samples,
    part_to_samples,
    samples_layout,
    samples_to_part,
    splits_over_ranks,
)
from autopar.runtime.storage import Deployment

GRADIENT_SAMPLE = 1 << 16
"""Elements of a gradient, at most, of which ranks compare projections."""
SCALAR_ROUNDING = 1e-5
"""The same share as `ROUNDING` for the gradient of a single number, such as a loss."""


class Step:
    """One call of the model, from its outputs to its backward.

    Args:
        name: ``call 3 of Net``.
        agreement: of all ranks; None with one rank.

    Attributes:
        checks: whether backwards compare the gradients that the ranks send.
        unread: positions of outputs that were handed out and not gathered; the same on all ranks.
        has_own_loss: whether a backward came through outputs of this rank's samples.
    """

    def __init__(self, name: str, agreement: Agreement | None = None) -> None:
        self.name = name
        self.agreement = agreement
        self.checks = False
        self.unread: set[int] = set()
        self.has_own_loss = False

    def share(self, number: int) -> int:
        """The first rank's number, on every rank, which all must ask for. It goes between hosts: no device is waited for."""
        return number if self.agreement is None else self.agreement.meet(f"draws random numbers in {self.name}", [number])[0][0]

    def begin_read(self, position: int, output: str) -> None:
        """Wait until all ranks read this output. Raises CommError when another rank does something else."""
        if self.agreement is not None:
            self.agreement.meet(f"reads {output} of {self.name}")
        self.unread.discard(position)

    def begin_backward(self, output: str, gradient: Tensor | None) -> None:
        """Where other ranks might still read an output, or gradients are checked: wait until all ranks run this backward.

        Args:
            output: through which the backward comes.
            gradient: what the user's backward sends; None where ranks may send different ones.

        Raises CommError when another rank does something else, InputError when the ranks' gradients differ by more than rounding.
        """
        is_checked = self.checks and gradient is not None
        if self.agreement is None or not (self.unread or is_checked):
            return
        event = f"runs the backward through {output} of {self.name}"
        if not is_checked or gradient is None:
            self.agreement.meet(event)
            return
        every = [Projections.from_bits(bits) for bits in self.agreement.meet(event, project(gradient, GRADIENT_SAMPLE).to_bits())]
        tolerance = ROUNDING if gradient.numel() > 1 else SCALAR_ROUNDING
        unlike = [rank for rank, other in enumerate(every) if not every[0].agrees(other, tolerance)]
        if unlike:
            raise InputError(
                f'rank 0 and {name_ranks(unlike)} send different gradients back into {output} of {self.name}: with inputs="global" every '
                "rank gets the whole output, and must compute the same loss from it, with the targets of the whole batch. If each rank has "
                'targets of its own, compile with inputs="local"'
            )


@dataclass(frozen=True, slots=True, eq=False)
class _Route:
    """How an output gets from a program to the user, and its gradient back.

    Attributes:
        position, name: of the output.
        layout: in which the program makes it.
        samples: the layout in which the user gets it where that is this rank's samples; None where it is whole.
        is_local: whether the ranks compute losses of their own.
        step: the call that made it.
    """

    position: int
    name: str
    layout: Layout
    samples: Layout | None
    is_local: bool
    deployment: Deployment
    step: Step

    def to_user(self, x: Tensor) -> Tensor:
        """What the user gets, a tensor of its own, given this rank's part. A collective unless the part is what the user gets."""
        with torch.inference_mode(False), torch.no_grad():
            whole = x.detach()
            if self.samples is None:
                made = gather_parts(whole, self.layout, self.deployment)
            else:
                made = part_to_samples(whole, self.layout, self.samples, self.deployment)
            # Not a view, as autograd refuses to change one in place that a custom function made.
            return made.clone() if made is whole else made.data

    def to_program(self, gradient: Tensor) -> Tensor:
        """The gradient of this rank's part, given the one that the user's backward sends."""
        deployment = self.deployment
        self.step.begin_backward(self.name, None if self.is_local else gradient)
        if self.samples is not None:
            self.step.has_own_loss = True
            return samples_to_part(gradient / count_shares(deployment), self.samples, self.layout, deployment)
        if self.is_local:
            with comm.active(deployment.axes):
                for name in deployment.batch_axes:
                    gradient = collectives.all_reduce(gradient / deployment.axes[name].size, name, "all_reduce")
        return shard_whole(gradient, self.layout, deployment.mesh, deployment.axes)


class _HandOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, route: _Route, unread: tuple[Tensor, ...]) -> Tensor:
        # Tensors in a tuple are none of the function's inputs.
        ctx.route = route
        return unread[0] if unread else route.to_user(part)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.route.to_program(grads[0]), None, None


class _Reveal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, unread: Tensor, read: Tensor) -> Tensor:
        return read.data

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


class UnreadOutput(Tensor):
    """An output that is gathered from all ranks when it is first used, and from then on stands for the gathered tensor.

    Sizes, dtype, device and whether it requires a gradient are answered without communication. Everything else, printing and pickling
    included, sees the gathered tensor, a plain one. So does what goes past ``__torch_function__``, such as a custom autograd function.
    """

    _take: Callable[[], Tensor] | None
    _made: Tensor | None
    _plain: Tensor | None

    @staticmethod
    def of(part: Tensor, shape: Sequence[int], route: _Route, bring: Callable[[], Tensor] | None) -> Tensor:
        """The output of which this rank has `part`; `bring` gets the part when it is read, where another pipeline rank has it."""
        with torch.inference_mode(False):
            unread = torch_compat.make_wrapper(UnreadOutput, shape, part)
        own = part.detach()

        def take() -> Tensor:
            if route.position in route.step.unread:
                route.step.begin_read(route.position, route.name)
            return route.to_user(own if bring is None else bring())

        unread._take, unread._made, unread._plain = take, None, None
        handed: Tensor = _HandOut.apply(part, route, (unread,)) if part.requires_grad else unread  # type: ignore[no-untyped-call]
        return handed

    def make(self) -> Tensor:
        """The gathered tensor, without a place in autograd's graph."""
        if self._made is None:
            assert self._take is not None
            self._made, self._take = self._take(), None
        return self._made

    def read(self) -> Tensor:
        """The gathered tensor, with this one's place in autograd's graph: the same object each time."""
        if self._plain is None:
            with torch.inference_mode(False), torch.enable_grad(), torch_compat.without_torch_function():
                made = self.make()
                self._plain = _Reveal.apply(self, made) if self.requires_grad else made  # type: ignore[no-untyped-call]
                take_plain_gradients([self._plain])
        assert self._plain is not None
        return self._plain

    @classmethod
    @torch_compat.uncompiled
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What a function of torch says of the gathered tensor, or of the sizes alone."""
        if function in _ANSWERED_UNREAD:
            with torch_compat.without_torch_function():
                return function(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_map_only(UnreadOutput, UnreadOutput.read, (args, kwargs or {}))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """An operator below autograd, on the gathered tensors."""
        args, kwargs = pytree.tree_map_only(UnreadOutput, UnreadOutput.make, (args, kwargs or {}))
        return function(*args, **kwargs)


_ATTRIBUTES = (
    "device",
    "dtype",
    "grad_fn",
    "is_cpu",
    "is_cuda",
    "is_leaf",
    "is_meta",
    "itemsize",
    "layout",
    "nbytes",
    "ndim",
    "requires_grad",
    "shape",
)
_METHODS = (
    "__hash__",
    "__len__",
    "dim",
    "element_size",
    "get_device",
    "is_complex",
    "is_floating_point",
    "ndimension",
    "nelement",
    "numel",
    "size",
)
_ANSWERED_UNREAD = {getattr(Tensor, name).__get__ for name in _ATTRIBUTES} | {getattr(Tensor, name) for name in _METHODS}


@dataclass(frozen=True, slots=True, eq=False)
class Handover:
    """How the outputs of one call are handed out.

    Attributes:
        step: the call.
        deployment: where the model runs.
        is_local: whether ranks get their own samples.
        is_sharded: whether split outputs are DTensors.
        names: of the outputs, for messages.
        has_loss: whether the model returns a loss, so that other outputs may stay unread.
    """

    step: Step
    deployment: Deployment
    is_local: bool
    is_sharded: bool
    names: Sequence[str]
    has_loss: bool

    def give(self, position: int, slot: Slot, part: Tensor, bring: Callable[[], Tensor] | None = None) -> Tensor:
        """What the user gets of an output.

        Args:
            position: among the outputs.
            slot: what the output is.
            part: this rank's part; with `bring` a stand-in of its sizes.
            bring: a collective over the pipeline that gets this rank's part from the pipeline rank that made it.
        """
        deployment = self.deployment
        is_split = splits_over_ranks(slot.layout, deployment)
        if self.is_sharded and is_split:
            assert deployment.device_mesh is not None
            # A DTensor knows no zigzag: what is split so is joined.
            zigzag = [name for name, state in zip(deployment.mesh.names, slot.layout, strict=True) if state.zigzag]
            if zigzag:
                others = [name for name in deployment.mesh.names if name not in zigzag]
                part = gather_parts(part, slot.layout, deployment, others)
                slot = replace(slot, layout=tuple(REPLICATE if state.zigzag else state for state in slot.layout))
            return as_dtensor(part, deployment.device_mesh, deployment.placements_of(slot.layout, None), slot.shape)
        is_local = self.is_local and not self.is_sharded and count_shares(deployment) > 1
        samples = None
        if is_local and slot.batch is not None and has_samples(slot.shape, slot.batch, deployment):
            samples = samples_layout(slot.batch, deployment)
        route = _Route(position, self.names[position], slot.layout, samples, is_local, deployment, self.step)
        if not is_split and samples is None and bring is None:
            return self._give_whole(part, route)
        if self.has_loss and math.prod(slot.shape) > 1:
            if bring is not None or slot.layout != samples:
                self.step.unread.add(position)
            return UnreadOutput.of(part, local_shape(slot.shape, samples, deployment.mesh) if samples else slot.shape, route, bring)
        assert bring is None, "only what may stay unread is brought later"
        if not part.requires_grad:
            return part if slot.layout == samples else route.to_user(part)
        handed: Tensor = _HandOut.apply(part, route, ())  # type: ignore[no-untyped-call]
        return handed

    def _give_whole(self, x: Tensor, route: _Route) -> Tensor:
        """An output that every rank has whole."""
        if not x.requires_grad or self.step.agreement is None:
            return x
        if route.is_local:
            handed: Tensor = _HandOut.apply(x, route, ())  # type: ignore[no-untyped-call]
            return handed
        if x.numel() > 1 and not self.step.checks:
            return x
        # A tensor of the user's own: a hook on the program's tensor would see gradients from inside of the program too. A loss may be
        # changed in place, after which a view would have lost its hook.
        x = x.clone() if x.numel() == 1 else x.view_as(x)
        take_plain_gradients([x])
        x.register_hook(lambda gradient: route.step.begin_backward(route.name, gradient))  # type: ignore[no-untyped-call]
        return x


def watch_hooks(program: Program, parts: Sequence[Tensor | None], outputs: Sequence[Tensor], names: Sequence[str], call: str) -> None:
    """Let a backward through an output raise InputError where a hook on another output would miss what the backward sends into that.

    On one device a tensor that the model returns, and goes on to compute with, is one place in autograd's graph. What the user gets here is
    another place than what the program went on with, unless it is the same object as the program's part.
    """
    watched = set[int]().union(*(slot.made_from for slot in program.outputs)) if torch.is_grad_enabled() else set()
    inside = {i: _Inside(names[i], weakref.ref(outputs[i])) for i in watched if outputs[i] is not parts[i]}
    if not inside:
        return
    for slot, output in zip(program.outputs, outputs, strict=True):
        before = [inside[i] for i in slot.made_from if i in inside]
        if before and not isinstance(output, UnreadOutput) and output.grad_fn is not None:
            output.register_hook(functools.partial(_refuse_hooks, before, call))  # type: ignore[no-untyped-call]
    for i, entry in inside.items():
        # One that is gathered when it is read gets `take_plain_gradients` then.
        entry.hooks = 1 if isinstance(outputs[i], UnreadOutput) else len(outputs[i]._backward_hooks or ())


@dataclass(slots=True)
class _Inside:
    """An output that others are computed from; `hooks` of it are none of the user's."""

    name: str
    output: weakref.ref[Tensor]
    hooks: int = 0


def _refuse_hooks(entries: Sequence[_Inside], call: str, gradient: Tensor | None) -> None:
    if gradient is None:
        return  # the backward comes through another output of a pipeline, whose outputs are one node of the graph
    for entry in entries:
        output = entry.output()
        read = output._plain if isinstance(output, UnreadOutput) else output
        if read is not None and (len(read._backward_hooks or ()) > entry.hooks or read.retains_grad):
            raise InputError(
                f"{entry.name} of {call} has a hook or retains its gradient, and would miss what comes from inside of the model, which "
                "goes on to compute with it: register the hook where forward makes the tensor, or compute the loss from this output outside"
            )


def name_outputs(program: Program) -> tuple[str, ...]:
    """Per output how messages call it: by its place in what the model returns."""
    markers = [torch.empty(0, device="meta") for _ in program.outputs]
    names = [f"output {position}" for position in range(len(markers))]
    with suppress(Exception):  # a class of the user's may not take these
        paths, _ = pytree.tree_flatten_with_path(program.captured.unflatten(markers))
        found = {id(leaf): pytree.keystr(path) for path, leaf in paths}
        names = [f"the output{found[id(marker)]}" for marker in markers]
    return tuple(names)


def returns_loss(program: Program) -> bool:
    """Whether the model returns a loss: an output of one element that requires a gradient."""
    return any(slot.requires_grad and math.prod(slot.shape) == 1 for slot in program.outputs)
