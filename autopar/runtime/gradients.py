"""Sums the gradients that ranks hold in part: once per step, in buckets, while the backward still runs.

A program computes with leaves, plain tensors that share the storage of the parameters' local parts. A leaf's gradient is
complete along some mesh axes and Partial along others; here it is summed over those and becomes the ``grad`` of its parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autopar import torch_compat


@dataclass(frozen=True, slots=True, eq=False)
class TrackedParameter:
    """A parameter and the leaf that stands for it in a program.

    Attributes:
        name: the parameter's name.
        parameter: the user's parameter, a DTensor or, without process groups, a plain tensor.
        leaf: the tensor that the program computes with; shares the storage of the parameter's local part.
        group: the ranks over which the leaf's gradient is Partial; None when it is complete.
    """

    name: str
    parameter: nn.Parameter
    leaf: Tensor
    group: dist.ProcessGroup | None


@dataclass(slots=True, eq=False)
class _Bucket:
    """Parameters whose gradients travel together; `ready` counts those that this backward has computed."""

    members: tuple[TrackedParameter, ...]
    ready: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _PendingSum:
    """A sum under way: the members' gradients lie in `flat`, one after the other."""

    members: tuple[TrackedParameter, ...]
    flat: Tensor
    work: dist.Work


@dataclass(slots=True, eq=False)
class _Program:
    """The buckets of one program's leaves, and how many of them have been sent in this backward."""

    tracked: tuple[TrackedParameter, ...]
    buckets: tuple[_Bucket, ...]
    sent: int = 0
    handles: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)


class GradientReducer:
    """Watches the leaves of one or more programs and keeps the gradients of their parameters complete.

    Every rank must track the same parameters and run the same backwards, which programs of one plan do.
    """

    def __init__(self) -> None:
        self._programs: list[_Program] = []
        self._pending_sums: list[_PendingSum] = []
        self._stashes: list[StashedGradients] = []
        self._backward = -1
        self._synced = True

    @property
    def is_synced(self) -> bool:
        """Whether backwards sum over the ranks, not only on this one (`no_sync`)."""
        return self._synced

    def track(self, tracked: Sequence[TrackedParameter], bucket_nbytes: int) -> None:
        """Watch these leaves and sum their gradients so many bytes at a time; leaves that need no gradient are left out."""
        trainable = tuple(each for each in tracked if each.leaf.requires_grad)
        buckets = _fill_buckets(trainable, bucket_nbytes)
        program = _Program(trainable, buckets)
        bucket_of = {id(member.leaf): bucket for bucket in buckets for member in bucket.members}
        for each in trainable:
            bucket = bucket_of.get(id(each.leaf))

            def on_gradient(_: Tensor, program: _Program = program, bucket: _Bucket | None = bucket) -> None:
                self._on_gradient(program, bucket)

            handle = each.leaf.register_post_accumulate_grad_hook(on_gradient)  # type: ignore[no-untyped-call]
            program.handles.append(handle)
        self._programs.append(program)

    def close(self) -> None:
        """Stop watching; gradients that wait under `no_sync` are dropped."""
        for program in self._programs:
            for handle in program.handles:
                handle.remove()
            for each in program.tracked:
                each.leaf.grad = None
        self._programs.clear()

    def zero(self) -> None:
        """Drop the gradients that wait under `no_sync`."""
        for program in self._programs:
            for each in program.tracked:
                each.leaf.grad = None
        for stash in self._stashes:
            stash.zero()

    def add_stash(self, stash: StashedGradients) -> None:
        """Let a pipeline's gradients that wait under `no_sync` be summed with all others."""
        self._stashes.append(stash)

    def remove_stash(self, stash: StashedGradients) -> None:
        """Forget a stash, and drop what waits in it."""
        self._stashes.remove(stash)

    def settle(self) -> None:
        """Sum over the ranks what waits under `no_sync`, whichever program left it, and give it to the parameters."""
        self._finish()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside only add up on this rank; the next one outside sums everything over the ranks."""
        before, self._synced = self._synced, False
        try:
            yield
        finally:
            self._synced = before

    def _on_gradient(self, program: _Program, bucket: _Bucket | None) -> None:
        """A leaf got its gradient: send the buckets that are full, in the same order on every rank."""
        this_backward = torch_compat.backward_id()
        if this_backward != self._backward:
            self._backward = this_backward
            self._pending_sums.clear()
            for each in self._programs:
                each.sent = 0
                for other in each.buckets:
                    other.ready = 0
            torch_compat.after_backward(self._finish if self._synced else self._end)
        if bucket is None or not self._synced:
            return
        bucket.ready += 1
        while program.sent < len(program.buckets) and _is_full(program.buckets[program.sent]):
            self._send(program.buckets[program.sent].members)
            program.sent += 1

    def recover(self) -> None:
        """Before a forward: what a backward that failed half-way left in the leaves must not count in the next one."""
        if self._backward != -1 and torch_compat.backward_id() == -1:
            self._backward = -1
            self._pending_sums.clear()
            for program in self._programs:
                for each in program.tracked:
                    each.leaf.grad = None

    def _end(self) -> None:
        self._backward = -1

    def _send(self, members: Sequence[TrackedParameter]) -> None:
        """Start the sum of these members' gradients, all of one group and dtype, and take them from the leaves."""
        pending_sum = _start_sum(members)
        if pending_sum is not None:
            self._pending_sums.append(pending_sum)

    def _finish(self) -> None:
        """At the end of a backward: send what is left, wait for all sums, and give every parameter its gradient."""
        for program in self._programs:
            # Buckets with a parameter that this backward didn't reach, and gradients left from `no_sync` by other programs.
            for bucket in program.buckets:
                self._send(bucket.members)
        for pending_sum in self._pending_sums:
            for each, part in _end_sum(pending_sum):
                _add_to_grad(each.parameter, part)
        self._pending_sums.clear()
        for program in self._programs:
            for each in program.tracked:
                if each.leaf.grad is not None:
                    _add_to_grad(each.parameter, each.leaf.grad.detach())
                    each.leaf.grad = None
        for stash in self._stashes:
            stash.settle()
        self._backward = -1


class StashedGradients:
    """The gradients of a schedule that has run, until the user's backward says by what they are to be scaled.

    Args:
        tracked: the parameters of this rank's stages; the leaves collect what the micro-batches add up to.
        reducer: of the other programs over the same parameters.
        bucket_nbytes: gradients that are summed together.
    """

    def __init__(self, tracked: Sequence[TrackedParameter], bucket_nbytes: int, reducer: GradientReducer | None = None) -> None:
        self._reducer = reducer or GradientReducer()
        self._reducer.add_stash(self)
        self._tracked = {each.name: each for each in tracked if each.leaf.requires_grad}
        self._bucket_nbytes = bucket_nbytes
        # Under `no_sync`: what earlier backwards left, on this rank only.
        self._unsynced: dict[str, Tensor] = {}
        self._pending_sums: list[_PendingSum] = []

    def begin(self) -> None:
        """Before a schedule: gradients of one that failed, or whose backward never came, count no longer."""
        self._pending_sums.clear()
        for each in self._tracked.values():
            each.leaf.grad = None

    def zero(self) -> None:
        """Drop the gradients that wait under `no_sync`."""
        self._unsynced.clear()

    def start(self, names: Sequence[str]) -> None:
        """Begin to sum these gradients over the ranks that have parts of them; every rank of a stage starts the same ones."""
        members = [self._tracked[name] for name in names if name in self._tracked]
        for bucket in _fill_buckets(members, self._bucket_nbytes):
            pending_sum = _start_sum(bucket.members)
            if pending_sum is not None:
                self._pending_sums.append(pending_sum)

    def collect(self) -> dict[str, Tensor]:
        """The gradients, those that were started summed; the leaves are empty again."""
        found: dict[str, Tensor] = {}
        for pending_sum in self._pending_sums:
            found.update({each.name: part for each, part in _end_sum(pending_sum)})
        self._pending_sums.clear()
        for each in self._tracked.values():
            if each.leaf.grad is not None:
                found[each.name] = each.leaf.grad.detach()
                each.leaf.grad = None
        return found

    def zeros(self, name: str) -> Tensor:
        """A gradient of nothing for a parameter, of the size of this rank's part."""
        return torch.zeros_like(self._tracked[name].leaf)

    def accumulate(self, gradients: Mapping[str, Tensor], scale: Tensor) -> None:
        """Under `no_sync`: add to what waits on this rank."""
        for name, gradient in gradients.items():
            scaled = gradient * scale
            self._unsynced[name] = self._unsynced[name] + scaled if name in self._unsynced else scaled

    def settle(self) -> None:
        """Sum over the ranks what waited, and add it to the parameters' own."""
        if not self._unsynced:
            return
        for name, gradient in self._unsynced.items():
            self._tracked[name].leaf.grad = gradient
        self._unsynced = {}
        self.start(list(self._tracked))
        for name, gradient in self.collect().items():
            _add_to_grad(self._tracked[name].parameter, gradient)

    @property
    def is_synced(self) -> bool:
        """Whether gradients are summed now: not under `no_sync`."""
        return self._reducer.is_synced

    def apply(self, gradients: Mapping[str, Tensor], scale: Tensor) -> None:
        """Add summed gradients, scaled, and all that waited in any program, to the parameters' own."""
        self._reducer.settle()
        for name, gradient in gradients.items():
            _add_to_grad(self._tracked[name].parameter, gradient.mul_(scale))


def _start_sum(members: Sequence[TrackedParameter]) -> _PendingSum | None:
    """Start the sum of these members' gradients, all of one group and dtype, and take them from the leaves."""
    present = tuple(each for each in members if each.leaf.grad is not None)
    if not present:
        return None
    gradients = [each.leaf.grad.detach() for each in present if each.leaf.grad is not None]
    alone = len(gradients) == 1 and gradients[0].is_contiguous()
    flat = gradients[0].view(-1) if alone else torch.cat([gradient.reshape(-1) for gradient in gradients])
    for each in present:
        each.leaf.grad = None
    work = dist.all_reduce(flat, group=present[0].group, async_op=True)
    assert work is not None
    return _PendingSum(present, flat, work)


def _end_sum(pending_sum: _PendingSum) -> Iterator[tuple[TrackedParameter, Tensor]]:
    """Wait for a sum; the members with their gradients."""
    pending_sum.work.wait()
    parts = torch.split(pending_sum.flat, [each.leaf.numel() for each in pending_sum.members])
    for each, part in zip(pending_sum.members, parts, strict=True):
        yield each, part.view(each.leaf.shape)


def _is_full(bucket: _Bucket) -> bool:
    return bucket.ready >= len(bucket.members)


def _fill_buckets(tracked: Sequence[TrackedParameter], limit: int) -> tuple[_Bucket, ...]:
    """Group parameters with Partial gradients by group and dtype, last parameter first: about the backward's order."""
    filling: dict[tuple[int, torch.dtype], list[TrackedParameter]] = {}
    full: list[_Bucket] = []
    for each in reversed(tracked):
        if each.group is None:
            continue
        members = filling.setdefault((id(each.group), each.leaf.dtype), [])
        members.append(each)
        if sum(member.leaf.nbytes for member in members) >= limit:
            full.append(_Bucket(tuple(members)))
            members.clear()
    return (*full, *(_Bucket(tuple(members)) for members in filling.values() if members))


def _add_to_grad(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add a complete local gradient to the parameter's, and call the parameter's hooks as a backward through it would."""
    if isinstance(parameter, DTensor):
        gradient = torch_compat.make_like(gradient, parameter)
    gradient = torch_compat.run_hooks(parameter, gradient)
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        torch_compat.local_of(parameter.grad).add_(torch_compat.local_of(gradient))
    torch_compat.run_post_accumulate_hooks(parameter)
