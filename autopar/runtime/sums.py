"""A parameter's local gradient, and its sum over ranks: buckets, sums that were started, and the `grad` that they end in.

Comes in: local gradients of parameters (`TrackedParameter`), and over which ranks each is a summand. Goes out: sums that run while
something else computes, and complete gradients added to the parameters' ``grad``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autopar import torch_compat
from autopar.ir import MESSAGE_NBYTES
from autopar.ops import GroupAxis, join_stack, pad_part, pad_whole, rows_of_part, rows_of_rank, split_parts, take_part
from autopar.runtime import dispatch


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """How a parameter is stored that a program is given whole: ZeRO levels 1 and 2 (Rajbhandari et al. 2020).

    Attributes:
        axis: the axis along which it is stored in parts.
        dim: the dim that is split.
        level: 1: local gradients add up whole under `no_sync` and over micro-batches, until they are summed; 2: every backward, of a
            micro-batch too, leaves each rank its part of the sum.
        is_summed: whether the local gradient is a summand along the axis; otherwise every rank has all of it.
        whole: the size of the split dim where the parts aren't of one size (`State.padded`): what is sent is padded; else None.
    """

    axis: GroupAxis
    dim: int
    level: int
    is_summed: bool
    whole: int | None = None

    def sent(self, part: Tensor) -> Tensor:
        """A rank's part as all ranks send it, of one size."""
        return part if self.whole is None else pad_part(part, self.dim, self.whole, self.axis.size)

    def kept(self, sent: Tensor) -> Tensor:
        """Of a part as it is sent, what this rank stores."""
        if self.whole is None:
            return sent
        # Fused optimizers go through memory as if gradients had no gaps, which those of a short part along a later dim would have.
        return sent.narrow(self.dim, 0, rows_of_rank(self.whole, self.axis.index, self.axis.size)).contiguous()

    def join(self, stack: Tensor) -> Tensor:
        """The whole tensor from all ranks' parts as they are sent."""
        return join_stack(stack, self.dim, 1, self.whole)

    def split(self, gradient: Tensor) -> Tensor:
        """A rank's whole gradient as (ranks, elements of a part)."""
        return split_parts(self.pad(gradient), self.dim, 1, self.axis.size).flatten(1)

    def pad(self, gradient: Tensor) -> Tensor:
        """A rank's whole gradient, padded so that it has parts of one size."""
        return gradient if self.whole is None else pad_whole(gradient, self.dim, self.axis.size)

    def take(self, gradient: Tensor) -> Tensor:
        """This rank's part of a gradient that is whole on every rank."""
        return self.kept(take_part(self.pad(gradient), self.dim, 1, self.axis.index, self.axis.size))


@dataclass(slots=True, eq=False)
class TrackedParameter:
    """A parameter and its local gradient, until that is complete.

    Attributes:
        name: the parameter's name.
        parameter: the user's parameter, a DTensor or, without process groups, a plain tensor.
        leaf: a plain leaf on the storage of the parameter's local part; the stages of a pipeline compute with it.
        group: the ranks over which the local gradient is Partial and must be summed, beside those of `held`; None when it is complete.
        held: how the parameter is stored when the program is given more than the stored part; None when it is given that.
        receiver: in a pipeline, the leaf without memory that gets the gradients of a parameter that is `held`.
        reduced: the dtype in which local gradients are summed; None for their own.
        gradient: the local gradient, of what the program is given; None when there is none.
    """

    name: str
    parameter: nn.Parameter
    leaf: Tensor
    group: dist.ProcessGroup | None
    reduced: torch.dtype | None = None
    held: Held | None = None
    receiver: Tensor | None = None
    gradient: Tensor | None = None

    @property
    def reduce_dtype(self) -> torch.dtype:
        """The dtype in which local gradients are summed."""
        return self.reduced or self.leaf.dtype

    @property
    def sent_shape(self) -> torch.Size:
        """Sizes of this rank's part as it is sent, which are the same on all ranks."""
        if self.held is None or self.held.whole is None:
            return self.leaf.shape
        dim, rows = self.held.dim, rows_of_part(self.held.whole, self.held.axis.size)
        return torch.Size((*self.leaf.shape[:dim], rows, *self.leaf.shape[dim + 1 :]))

    @property
    def summed_nbytes(self) -> int:
        """Bytes of the local gradient in the sum."""
        return self.sent_shape.numel() * self.reduce_dtype.itemsize * (1 if self.held is None else self.held.axis.size)

    @property
    def is_scattered(self) -> bool:
        """Whether every backward leaves each rank its part of the sum: ZeRO level 2."""
        return self.held is not None and self.held.level == 2

    @property
    def collector(self) -> Tensor:
        """The leaf in whose ``grad`` a pipeline's micro-batches add up their gradients."""
        return self.leaf if self.receiver is None or self.is_scattered else self.receiver

    @property
    def is_deferred(self) -> bool:
        """Whether something is left to be summed over ranks when a backward has made the local gradient."""
        return self.group is not None or (self.held is not None and self.held.is_summed)

    def complete_part(self, gradient: Tensor) -> Tensor:
        """This rank's part of a gradient that isn't to be summed."""
        return gradient if self.held is None else self.held.take(gradient)


@dataclass(slots=True, eq=False)
class Bucket:
    """Parameters whose gradients are summed by one all-reduce; `ready` counts those that this backward has computed."""

    members: tuple[TrackedParameter, ...]
    ready: int = 0

    @property
    def sums_always(self) -> bool:
        """Whether every backward sums, under `no_sync` too: ZeRO level 2."""
        held = self.members[0].held
        return held is not None and self.members[0].is_scattered and held.is_summed


@dataclass(slots=True, eq=False)
class PendingSum:
    """A sum that was started.

    Attributes:
        members: the parameters whose gradients are summed.
        wait: waits for it, and gives the stored parts of the gradients, one after the other; None after that.
        sent_nbytes: what is held for it until it is waited for, and not after.
        flat: what `wait` gave.
    """

    members: tuple[TrackedParameter, ...]
    wait: Callable[[], Tensor] | None
    sent_nbytes: int = 0
    flat: Tensor | None = None

    @property
    def is_settled(self) -> bool:
        """Whether it was waited for."""
        return self.wait is None

    def settle(self) -> Tensor:
        """Wait for it, and let go of what was sent."""
        if self.wait is not None:
            self.flat, self.wait, self.sent_nbytes = self.wait(), None, 0
        assert self.flat is not None
        return self.flat


def is_ordinary(parameter: nn.Parameter) -> bool:
    """Whether nothing but ``grad`` gets a parameter's gradient: it has no hooks, and wasn't frozen since the forward."""
    return parameter.requires_grad and not torch_compat.has_hooks(parameter)


_VERSION = "_autopar_version"
"""The attribute of a parameter that says of how many changes in place autograd knows by way of its part."""


def note_changes(tracked: Iterable[TrackedParameter]) -> None:
    """Let autograd know of changes in place of parameters, before a forward and before a backward.

    Torch counts those of a DTensor, and not of its part, which programs save. Autograd refuses a backward that reads what has changed since
    it was saved, as it does on one device. A plain parameter and its leaf are counted as one.
    """
    changed = []
    for entry in tracked:
        if not isinstance(entry.parameter, DTensor):
            continue
        attributes, version = entry.parameter.__dict__, entry.parameter._version
        if attributes.get(_VERSION) != version:
            attributes[_VERSION] = version
            changed.append(entry.leaf)
    if changed:
        torch.autograd.graph.increment_version(changed)


def start_sum(members: Sequence[TrackedParameter], pending_sums: list[PendingSum], in_flight_nbytes: int) -> None:
    """Start the sum of these members' gradients, all of one group and of the same dtypes, and note it; the entries have none afterwards.

    Whole gradients of which each rank gets its part are let go when their sums have come: of those that are noted, the first ones are
    waited for until what they hold is no more than `in_flight_nbytes`.
    """
    present, gradients = [], []
    for entry in members:
        if entry.gradient is not None:
            present.append(entry)
            gradients.append(entry.gradient)
            entry.gradient = None
    if not present:
        return
    if present[0].held is not None:
        _settle_first(pending_sums, in_flight_nbytes)
        pending_sums.append(_start_scatter(present, gradients, present[0].held))
        return
    flat = _flatten(gradients, present[0].reduce_dtype)
    pending_sums.append(PendingSum(tuple(present), _begin_all_reduce(flat, present[0].group)))


def _settle_first(pending_sums: Sequence[PendingSum], in_flight_nbytes: int) -> None:
    """Wait for the first of some sums until the others hold no more than some bytes."""
    excess = sum(pending_sum.sent_nbytes for pending_sum in pending_sums) - in_flight_nbytes
    for pending_sum in pending_sums:
        if excess <= 0:
            break
        excess -= pending_sum.sent_nbytes
        pending_sum.settle()


def _flatten(gradients: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Gradients one after the other, in a dtype; without a copy of a single one in it."""
    is_single = len(gradients) == 1 and gradients[0].is_contiguous()
    flat = gradients[0].view(-1) if is_single else torch.cat([gradient.reshape(-1) for gradient in gradients])
    return flat.to(dtype)


def _start_scatter(members: Sequence[TrackedParameter], gradients: list[Tensor], held: Held) -> PendingSum:
    """Start to bring every rank the sums of its parts of these gradients, over all ranks that have summands of them."""
    # Members have axis, level and dtypes in common, not the dim that is split.
    parts = [(entry.held or held).split(gradient) for entry, gradient in zip(members, gradients, strict=True)]
    gradients.clear()
    first = members[0]
    if not held.is_summed:
        assert first.group is not None, "what is complete is in no bucket"
        # A copy, which the sum may change, and which doesn't hold the whole gradients.
        flat = torch.cat([rows[held.axis.index] for rows in parts]).to(first.reduce_dtype)
        return PendingSum(tuple(members), _begin_all_reduce(flat, first.group))
    # What is large is a bucket by itself, and isn't copied.
    sent = (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).to(first.reduce_dtype)
    parts.clear()  # a rank's part of the sum comes into other memory: of the gradients, only the copy is there with it
    scattered = held.axis.begin_reduce_stack(sent)

    def wait() -> Tensor:
        flat = scattered.wait()
        if first.group is not None:
            dist.all_reduce(flat, group=first.group)
        return flat.view(-1)

    return PendingSum(tuple(members), wait, sent.nbytes)


def _begin_all_reduce(flat: Tensor, group: dist.ProcessGroup | None) -> Callable[[], Tensor]:
    """Begin to sum `flat` over the ranks of a group, in place; returns a function that waits for it and gives the sum."""
    work = dist.all_reduce(flat, group=group, async_op=True)
    assert work is not None

    def wait() -> Tensor:
        work.wait()
        return flat

    return wait


def end_sum(pending_sum: PendingSum) -> Iterator[tuple[TrackedParameter, Tensor]]:
    """Wait for a sum; yields each member with its gradient, which is a view of the sum where that has the parameter's dtype."""
    shapes = [entry.sent_shape for entry in pending_sum.members]
    parts = torch.split(pending_sum.settle(), [shape.numel() for shape in shapes])
    for entry, shape, gradient in zip(pending_sum.members, shapes, parts, strict=True):
        part = gradient.view(shape)
        yield entry, (part if entry.held is None else entry.held.kept(part)).to(entry.leaf.dtype)


def fill_buckets(tracked: Sequence[TrackedParameter], limit: int) -> tuple[Bucket, ...]:
    """Buckets of parameters with Partial gradients, by process group and dtypes; the last parameter first, as the backward comes.

    A large gradient of which each rank gets its part is a bucket by itself.
    """
    filling: dict[tuple[Hashable, ...], list[TrackedParameter]] = {}
    full: list[Bucket] = []
    for entry in reversed(tracked):
        if not entry.is_deferred:
            continue
        if entry.held is not None and entry.summed_nbytes >= MESSAGE_NBYTES:
            full.append(Bucket((entry,)))
            continue
        held = entry.held and (entry.held.axis.name, entry.held.level, entry.held.is_summed)
        members = filling.setdefault((id(entry.group), held, entry.leaf.dtype, entry.reduce_dtype), [])
        members.append(entry)
        if sum(member.summed_nbytes for member in members) >= limit:
            full.append(Bucket(tuple(members)))
            members.clear()
    return (*full, *(Bucket(tuple(members)) for members in filling.values() if members))


def add_to_grad(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add a complete local gradient to the parameter's ``grad``."""
    if gradient.dtype != parameter.dtype:
        gradient = gradient.to(parameter.dtype)  # the user changed the model's since the call
    before = parameter.grad
    if before is None:
        parameter.grad = like(gradient, parameter)
        return
    if isinstance(parameter, DTensor) and not (isinstance(before, DTensor) and before.placements == parameter.placements):
        # What autograd or the user put there, such as the gradient of a term of weights, may be stored otherwise, or be a plain tensor.
        before = parameter.grad = dispatch.as_stored(before, parameter)
    torch_compat.local_of(before).add_(gradient)


def like(gradient: Tensor, parameter: nn.Parameter) -> Tensor:
    """A complete gradient of the stored part as autograd takes it: a DTensor, if the parameter is one."""
    return torch_compat.make_like(gradient, parameter) if isinstance(parameter, DTensor) else gradient
