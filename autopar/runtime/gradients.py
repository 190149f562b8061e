"""Sums the gradients of which each rank has a summand: once per step, in buckets, while the backward is still running.

Comes in: the leaves that a program computes with, plain tensors that share the storage of the parameters' local parts, and over which ranks
the gradient of each is Partial. Goes out: the ``grad`` of the parameters, complete, with their hooks called. As in DDP, a bucket is
all-reduced as soon as the backward has made its last gradient. A pipeline's gradients, which are made before the user's backward, wait in
`StashedGradients` until that comes.
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
from autopar.runtime import dispatch


@dataclass(frozen=True, slots=True, eq=False)
class TrackedParameter:
    """A parameter and the leaf that stands for it in a program.

    Attributes:
        name: the parameter's name.
        parameter: the user's parameter, a DTensor or, without process groups, a plain tensor.
        leaf: the tensor that the program computes with; it shares the storage of the parameter's local part.
        group: the ranks over which the leaf's gradient is Partial and must be summed; None when it is complete.
    """

    name: str
    parameter: nn.Parameter
    leaf: Tensor
    group: dist.ProcessGroup | None


@dataclass(slots=True, eq=False)
class _Bucket:
    """Parameters whose gradients are summed by one all-reduce; `ready` counts those that this backward has computed."""

    members: tuple[TrackedParameter, ...]
    ready: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _PendingSum:
    """An all-reduce that was started: `flat` holds the gradients of the members, one after the other."""

    members: tuple[TrackedParameter, ...]
    flat: Tensor
    work: dist.Work


@dataclass(slots=True, eq=False)
class _Program:
    """The buckets of one program's leaves, in the order in which they are summed, and how many were started in this backward."""

    tracked: tuple[TrackedParameter, ...]
    buckets: tuple[_Bucket, ...]
    started: int = 0
    handles: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)


class GradientReducer:
    """Sums the gradients of the leaves of all programs of a model, and adds them to the parameters' ``grad``.

    Every rank must track the same parameters and run the same backwards, as programs of one plan do.
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
        """Begin to sum the gradients of a program's leaves, `bucket_nbytes` bytes at a time; leaves without gradients are ignored."""
        trainable = tuple(entry for entry in tracked if entry.leaf.requires_grad)
        buckets = _fill_buckets(trainable, bucket_nbytes)
        program = _Program(trainable, buckets)
        bucket_of = {id(member.leaf): bucket for bucket in buckets for member in bucket.members}
        for entry in trainable:
            bucket = bucket_of.get(id(entry.leaf))

            def on_gradient(_: Tensor, program: _Program = program, bucket: _Bucket | None = bucket) -> None:
                self._on_gradient(program, bucket)

            handle = entry.leaf.register_post_accumulate_grad_hook(on_gradient)  # type: ignore[no-untyped-call]
            program.handles.append(handle)
        self._programs.append(program)

    def close(self) -> None:
        """Stop tracking all programs; gradients accumulated under `no_sync` are dropped."""
        for program in self._programs:
            for handle in program.handles:
                handle.remove()
            for entry in program.tracked:
                entry.leaf.grad = None
        self._programs.clear()

    def zero(self) -> None:
        """Drop the gradients accumulated under `no_sync`."""
        for program in self._programs:
            for entry in program.tracked:
                entry.leaf.grad = None
        for stash in self._stashes:
            stash.zero()

    def add_stash(self, stash: StashedGradients) -> None:
        """Sum a pipeline's gradients accumulated under `no_sync` together with those of all programs."""
        self._stashes.append(stash)

    def remove_stash(self, stash: StashedGradients) -> None:
        """Remove a stash; the gradients accumulated in it are dropped."""
        self._stashes.remove(stash)

    def reduce_unsynced(self) -> None:
        """Sum over the ranks what any program accumulated under `no_sync`, and add it to the parameters' ``grad``."""
        self._finish()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside accumulate on this rank only; the next one outside sums everything over the ranks (as in DDP)."""
        before, self._synced = self._synced, False
        try:
            yield
        finally:
            self._synced = before

    def _on_gradient(self, program: _Program, bucket: _Bucket | None) -> None:
        """A leaf got its gradient: start the sums of full buckets, in the same order on every rank."""
        this_backward = torch_compat.backward_id()
        if this_backward != self._backward:
            self._backward = this_backward
            self._pending_sums.clear()
            for tracked_program in self._programs:
                tracked_program.started = 0
                for bucket_to_reset in tracked_program.buckets:
                    bucket_to_reset.ready = 0
            torch_compat.after_backward(self._finish if self._synced else self._end)
        if bucket is None or not self._synced:
            return
        bucket.ready += 1
        while program.started < len(program.buckets) and _is_full(program.buckets[program.started]):
            self._start(program.buckets[program.started].members)
            program.started += 1

    def recover(self) -> None:
        """Called before a forward: drop the gradients that a failed backward put into the leaves."""
        if self._backward != -1 and torch_compat.backward_id() == -1:
            self._backward = -1
            self._pending_sums.clear()
            for program in self._programs:
                for entry in program.tracked:
                    entry.leaf.grad = None

    def _end(self) -> None:
        self._backward = -1

    def _start(self, members: Sequence[TrackedParameter]) -> None:
        """Start the sum of these members' gradients, all of one group and dtype; the leaves have none afterwards."""
        pending_sum = _start_sum(members)
        if pending_sum is not None:
            self._pending_sums.append(pending_sum)

    def _finish(self) -> None:
        """At the end of a backward: start the remaining sums, wait for all, and add to every parameter's ``grad``."""
        for program in self._programs:
            # Buckets with a parameter that this backward didn't reach, and what other programs accumulated under `no_sync`.
            for bucket in program.buckets:
                self._start(bucket.members)
        for pending_sum in self._pending_sums:
            for entry, gradient in _end_sum(pending_sum):
                _add_to_grad(entry.parameter, gradient)
        self._pending_sums.clear()
        for program in self._programs:
            for entry in program.tracked:
                if entry.leaf.grad is not None:
                    _add_to_grad(entry.parameter, entry.leaf.grad.detach())
                    entry.leaf.grad = None
        for stash in self._stashes:
            stash.reduce_unsynced()
        self._backward = -1


class StashedGradients:
    """The gradients of a schedule that has run, until the user's backward says by which factor they are scaled.

    Args:
        tracked: the parameters of this rank's stages; their leaves accumulate the gradients of the micro-batches.
        bucket_nbytes: bytes of gradients that are summed by one all-reduce.
        reducer: the reducer of the model's other programs.
    """

    def __init__(self, tracked: Sequence[TrackedParameter], bucket_nbytes: int, reducer: GradientReducer | None = None) -> None:
        self._reducer = reducer or GradientReducer()
        self._reducer.add_stash(self)
        self._tracked = {entry.name: entry for entry in tracked if entry.leaf.requires_grad}
        self._bucket_nbytes = bucket_nbytes
        # What earlier backwards accumulated under `no_sync`, on this rank only.
        self._unsynced: dict[str, Tensor] = {}
        self._pending_sums: list[_PendingSum] = []

    def begin(self) -> None:
        """Called before a schedule: drop the gradients of an earlier one that failed, or whose backward never came."""
        self._pending_sums.clear()
        for entry in self._tracked.values():
            entry.leaf.grad = None

    def zero(self) -> None:
        """Drop the gradients accumulated under `no_sync`."""
        self._unsynced.clear()

    def start(self, names: Sequence[str]) -> None:
        """Start to sum these parameters' gradients over the ranks that have summands; all ranks of a stage start the same ones."""
        members = [self._tracked[name] for name in names if name in self._tracked]
        for bucket in _fill_buckets(members, self._bucket_nbytes):
            pending_sum = _start_sum(bucket.members)
            if pending_sum is not None:
                self._pending_sums.append(pending_sum)

    def collect(self) -> dict[str, Tensor]:
        """All gradients by name, after waiting for the sums that were started; the leaves have none afterwards."""
        gradients: dict[str, Tensor] = {}
        for pending_sum in self._pending_sums:
            gradients.update({entry.name: gradient for entry, gradient in _end_sum(pending_sum)})
        self._pending_sums.clear()
        for entry in self._tracked.values():
            if entry.leaf.grad is not None:
                gradients[entry.name] = entry.leaf.grad.detach()
                entry.leaf.grad = None
        return gradients

    def zeros(self, name: str) -> Tensor:
        """A gradient of zeros for a parameter, in the shape of this rank's part."""
        return torch.zeros_like(self._tracked[name].leaf)

    def accumulate(self, gradients: Mapping[str, Tensor], scale: Tensor) -> None:
        """Under `no_sync`: add the scaled gradients to what this rank has accumulated."""
        for name, gradient in gradients.items():
            scaled = gradient * scale
            self._unsynced[name] = self._unsynced[name] + scaled if name in self._unsynced else scaled

    def reduce_unsynced(self) -> None:
        """Sum over the ranks what was accumulated, and add it to the parameters' ``grad``."""
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
        """Whether backwards sum over the ranks, that is, not under `no_sync`."""
        return self._reducer.is_synced

    def apply(self, gradients: Mapping[str, Tensor], scale: Tensor) -> None:
        """Add summed gradients, scaled, and all that any program accumulated under `no_sync`, to the parameters' ``grad``."""
        self._reducer.reduce_unsynced()
        for name, gradient in gradients.items():
            _add_to_grad(self._tracked[name].parameter, gradient.mul_(scale))


def _start_sum(members: Sequence[TrackedParameter]) -> _PendingSum | None:
    """Start the sum of these members' gradients, all of one group and dtype; the leaves have none afterwards."""
    present = tuple(entry for entry in members if entry.leaf.grad is not None)
    if not present:
        return None
    gradients = [entry.leaf.grad.detach() for entry in present if entry.leaf.grad is not None]
    is_single = len(gradients) == 1 and gradients[0].is_contiguous()
    flat = gradients[0].view(-1) if is_single else torch.cat([gradient.reshape(-1) for gradient in gradients])
    for entry in present:
        entry.leaf.grad = None
    work = dist.all_reduce(flat, group=present[0].group, async_op=True)
    assert work is not None
    return _PendingSum(present, flat, work)


def _end_sum(pending_sum: _PendingSum) -> Iterator[tuple[TrackedParameter, Tensor]]:
    """Wait for a sum; yields each member with its gradient, which is a view of the sum."""
    pending_sum.work.wait()
    parts = torch.split(pending_sum.flat, [entry.leaf.numel() for entry in pending_sum.members])
    for entry, gradient in zip(pending_sum.members, parts, strict=True):
        yield entry, gradient.view(entry.leaf.shape)


def _is_full(bucket: _Bucket) -> bool:
    return bucket.ready >= len(bucket.members)


def _fill_buckets(tracked: Sequence[TrackedParameter], limit: int) -> tuple[_Bucket, ...]:
    """Buckets of parameters with Partial gradients, by process group and dtype; the last parameter first, as the backward comes."""
    filling: dict[tuple[int, torch.dtype], list[TrackedParameter]] = {}
    full: list[_Bucket] = []
    for entry in reversed(tracked):
        if entry.group is None:
            continue
        members = filling.setdefault((id(entry.group), entry.leaf.dtype), [])
        members.append(entry)
        if sum(member.leaf.nbytes for member in members) >= limit:
            full.append(_Bucket(tuple(members)))
            members.clear()
    return (*full, *(_Bucket(tuple(members)) for members in filling.values() if members))


def _add_to_grad(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add a complete local gradient to the parameter's ``grad``, and call the parameter's hooks as autograd would."""
    if isinstance(parameter, DTensor):
        gradient = torch_compat.make_like(gradient, parameter)
        # What autograd or the user put there, such as the gradient of a term of weights, may be stored otherwise, or be a plain tensor.
        parameter.grad = dispatch.as_stored(parameter.grad, parameter)
    gradient = torch_compat.run_hooks(parameter, gradient)
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        torch_compat.local_of(parameter.grad).add_(torch_compat.local_of(gradient))
    torch_compat.run_post_accumulate_hooks(parameter)
