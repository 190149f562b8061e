"""Sums the gradients of which each rank has a summand: once per step, in buckets, while the backward is still running.

Comes in: the local gradients of parameters, which a backward hands over one by one, and over which ranks each is Partial. Goes out: the
``grad`` of the parameters, complete. As in DDP, a bucket is all-reduced as soon as the backward has made its last gradient. A pipeline's
gradients, which are made before the user's backward, wait in `StashedGradients` until that comes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autopar import torch_compat
from autopar.errors import InputError
from autopar.ops import Message
from autopar.runtime.arrivals import Arrivals
from autopar.runtime.sums import (
    Bucket,
    PendingSum,
    TrackedParameter,
    add_to_grad,
    end_sum,
    fill_buckets,
    is_ordinary,
    like,
    note_changes,
    start_sum,
)

_SPARSE = "the gradient of {} is sparse, and only dense ones are summed over ranks: leave out sparse=True"


@dataclass(slots=True, eq=False)
class _Program:
    """The buckets of one program's parameters, in the order in which they are summed, and how many were started in this backward.

    It is active while there are local gradients, from the backward that runs now or from earlier ones under `no_sync`.
    """

    tracked: tuple[TrackedParameter, ...]
    buckets: tuple[Bucket, ...]
    bucket_nbytes: int
    started: int = 0
    is_active: bool = False


class Receiver:
    """Takes the local gradients of a parameter in a backward of one program."""

    def __init__(self, reducer: GradientReducer, program: _Program, bucket: Bucket | None, entry: TrackedParameter) -> None:
        self.reducer, self.entry = reducer, entry
        self._program, self._bucket = program, bucket
        self._use_count, self._stride = torch_compat.use_count_of_a_gradient(), entry.leaf.stride()

    def __call__(self, gradient: Tensor) -> None:
        """Take a gradient from autograd."""
        if gradient.layout is not torch.strided:
            raise InputError(_SPARSE.format(self.entry.name))
        self.reducer.begin_backward()
        # Autograd may have handed the same tensor to others too.
        self._add(gradient, is_own=gradient._use_count() == self._use_count)  # type: ignore[attr-defined]

    def receive_later(self, begin: Callable[[], Message], dtype: torch.dtype, block: int, ahead: int) -> None:
        """Begin the sum of a gradient over ranks, and take it when it is complete (`Arrivals.add`)."""
        self.reducer.begin_backward()
        self.reducer.arrivals.add(begin, dtype, self._add, block, ahead)

    def _add(self, gradient: Tensor, is_own: bool = True) -> None:
        entry = self.entry
        if entry.gradient is not None:
            # Sums are in the stored dtype, also where a program's gradients aren't.
            entry.gradient = entry.gradient.to(entry.leaf.dtype).add_(gradient)
        elif is_own and self._is_as_stored(gradient):
            entry.gradient = gradient
        elif entry.held is not None:
            entry.gradient = gradient.clone(memory_format=torch.contiguous_format)
        else:
            entry.gradient = torch.empty_like(entry.leaf, requires_grad=False).copy_(gradient)
        self.reducer.note_gradient(self._program, self._bucket)

    def _is_as_stored(self, gradient: Tensor) -> bool:
        """Whether a gradient lies in memory as that of this parameter shall: kernels of optimizers may go by the parameter's strides."""
        return gradient.is_contiguous() if self.entry.held is not None else gradient.stride() == self._stride


class GradientReducer:
    """Sums the local gradients of the parameters of all programs of a model, and adds them to the parameters' ``grad``.

    Every rank must track the same parameters and run the same backwards, as programs of one plan do.

    Attributes:
        arrivals: gradients whose sums over ranks, of one plan's parts, are under way.
    """

    def __init__(self) -> None:
        self._programs: list[_Program] = []  # those that are active
        self._pending_sums: list[PendingSum] = []
        self._stashes: list[StashedGradients] = []
        self.arrivals = Arrivals()
        self._backward = -1
        # What the backward that runs now will call when it has ended. It is gone when that has failed.
        self._end_of_backward: Callable[[], Callable[[], None] | None] = _gone
        self._synced = True
        # A backward, and whether it adds to ``grad``.
        self._adds = (-1, False)

    @property
    def is_synced(self) -> bool:
        """Whether backwards sum over the ranks, not only on this one (`no_sync`)."""
        return self._synced

    def track(self, tracked: Sequence[TrackedParameter], bucket_nbytes: int) -> dict[str, Receiver]:
        """Prepare to sum the gradients of a program's parameters, `bucket_nbytes` bytes at a time.

        Returns the functions to call with the gradients, by the names of those parameters that require one.
        """
        trainable = tuple(entry for entry in tracked if entry.leaf.requires_grad)
        buckets = fill_buckets(trainable, bucket_nbytes)
        program = _Program(trainable, buckets, bucket_nbytes)
        bucket_of = {entry.name: bucket for bucket in buckets for entry in bucket.members}
        return {entry.name: Receiver(self, program, bucket_of.get(entry.name), entry) for entry in trainable}

    def adds(self, node: Any) -> bool:
        """Whether the backward that runs now adds to ``grad``, or returns gradients; `node` is one of its graph, just before a leaf."""
        this_backward = torch_compat.backward_id()
        if self._adds[0] != this_backward:
            self._adds = this_backward, torch_compat.use_of_gradient(node.next_functions[0][0]) == "added"
        return self._adds[1]

    def zero(self) -> None:
        """Drop the gradients accumulated under `no_sync`."""
        self._drop()
        for stash in self._stashes:
            stash.zero()

    def add_stash(self, stash: StashedGradients) -> None:
        """Sum a pipeline's gradients accumulated under `no_sync` together with those of all programs."""
        self._stashes.append(stash)

    def remove_stash(self, stash: StashedGradients) -> None:
        """Remove a stash; the gradients accumulated in it are dropped."""
        self._stashes.remove(stash)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards inside accumulate on this rank only; the next one outside sums everything over the ranks (as in DDP)."""
        before, self._synced = self._synced, False
        try:
            yield
        finally:
            self._synced = before

    def begin_backward(self) -> None:
        """Called before every gradient; at the first one of a backward, see to it that something is called at its end."""
        this_backward = torch_compat.backward_id()
        if this_backward != self._backward:
            self.recover()
            self._backward = this_backward
            # Sums of a backward inside which this one runs, as in a checkpoint that is reentrant, end with this one.
            for active_program in self._programs:
                _begin(active_program)
            end = self.finish if self._synced else self._end
            self._end_of_backward = weakref.ref(end)
            torch_compat.after_backward(end)

    def note_gradient(self, program: _Program, bucket: Bucket | None) -> None:
        """A parameter got its local gradient: start the sums of full buckets, in the same order on every rank."""
        if not program.is_active:
            program.is_active = True
            _begin(program)
            self._programs.append(program)
        if bucket is None:
            return
        bucket.ready += 1
        while program.started < len(program.buckets):
            first = program.buckets[program.started]
            if self._synced or first.sums_always:
                if not _is_full(first):
                    break
                start_sum(first.members, self._pending_sums, program.bucket_nbytes)
            program.started += 1

    def recover(self) -> None:
        """Called before a forward or a backward: drop the local gradients of a backward that failed."""
        if self._backward != -1 and self._end_of_backward() is None:
            self._backward = -1
            self.arrivals.clear()
            self._pending_sums.clear()
            self._drop()

    def _drop(self) -> None:
        for program in self._programs:
            for entry in program.tracked:
                entry.gradient = None
            program.is_active = False
        self._programs.clear()

    def _end(self) -> None:
        """At the end of a backward under `no_sync`: finish what is summed in every backward."""
        self.arrivals.finish()
        for program in self._programs:
            for bucket in program.buckets:
                if bucket.sums_always:
                    start_sum(bucket.members, self._pending_sums, program.bucket_nbytes)
        self._add_sums()
        self._backward = -1

    def _add_sums(self) -> None:
        """Wait for the sums that were started, and add them to the parameters' ``grad``."""
        for pending_sum in self._pending_sums:
            for entry, gradient in end_sum(pending_sum):
                add_to_grad(entry.parameter, gradient)
        self._pending_sums.clear()

    def finish(self) -> None:
        """At the end of a backward: start the remaining sums, wait for all, and add to every parameter's ``grad``.

        That includes what any program accumulated under `no_sync`.
        """
        self.arrivals.finish()
        for program in self._programs:
            # Buckets with a parameter that this backward didn't reach, and what other programs accumulated under `no_sync`.
            for bucket in program.buckets:
                start_sum(bucket.members, self._pending_sums, program.bucket_nbytes)
        self._add_sums()
        for program in self._programs:
            for entry in program.tracked:
                if entry.gradient is not None:
                    add_to_grad(entry.parameter, entry.complete_part(entry.gradient))
                    entry.gradient = None
            program.is_active = False
        self._programs.clear()
        for stash in self._stashes:
            stash.reduce_unsynced()
        self._backward = -1


class StashedGradients:
    """The gradients of a schedule that has run, until the user's backward says by which factor they are scaled.

    Args:
        tracked: the parameters of this rank's stages; their leaves accumulate the gradients of the micro-batches in ``grad``. Of those of
            ZeRO level 2 these are parts of sums over ranks already (`autopar.runtime.scattered`).
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
        self._pending_sums: list[PendingSum] = []

    def note_changes(self) -> None:
        """Let autograd know of changes in place of parameters, before a forward and before a backward."""
        note_changes(self._tracked.values())

    def begin(self) -> None:
        """Called before a schedule: drop the gradients of an earlier one that failed, or whose backward never came."""
        self._pending_sums.clear()
        for entry in self._tracked.values():
            entry.collector.grad = entry.gradient = None

    def zero(self) -> None:
        """Drop the gradients accumulated under `no_sync`."""
        self._unsynced.clear()

    def start(self, names: Sequence[str]) -> None:
        """Start to sum these parameters' gradients over the ranks that have summands; all ranks of a stage start the same ones."""
        members = [self._tracked[name] for name in names if name in self._tracked and not self._tracked[name].is_scattered]
        for entry in members:
            if entry.collector.grad is not None:
                entry.gradient, entry.collector.grad = entry.collector.grad.detach(), None
        for bucket in fill_buckets(members, self._bucket_nbytes):
            start_sum(bucket.members, self._pending_sums, self._bucket_nbytes)

    def collect(self, *, is_summed: bool = True) -> dict[str, Tensor]:
        """All gradients by name, after waiting for the sums that were started; the leaves have none afterwards.

        They are those of the stored parts, or of all that programs are given if nothing `is_summed` yet; at ZeRO level 2 always the former.
        """
        gradients: dict[str, Tensor] = {}
        for pending_sum in self._pending_sums:
            gradients.update({entry.name: gradient for entry, gradient in end_sum(pending_sum)})
        self._pending_sums.clear()
        for entry in self._tracked.values():
            if entry.collector.grad is not None:
                entry.gradient, entry.collector.grad = entry.collector.grad.detach(), None
            if entry.gradient is not None:
                gradient, entry.gradient = entry.gradient, None
                gradients[entry.name] = entry.complete_part(gradient) if is_summed and not entry.is_scattered else gradient
        return gradients

    def is_summed(self, name: str) -> bool:
        """Whether a parameter's gradient is a part of the sum after every backward."""
        return self._tracked[name].is_scattered

    def zeros(self, name: str, *, is_summed: bool) -> Tensor:
        """A gradient of zeros for a parameter, as `collect` gives it."""
        entry = self._tracked[name]
        return torch.zeros_like(entry.leaf if is_summed else entry.collector, requires_grad=False)

    def accumulate(self, gradients: Mapping[str, Tensor]) -> None:
        """Under `no_sync`: add gradients to what this rank has accumulated."""
        for name, gradient in gradients.items():
            self._unsynced[name] = self._unsynced[name] + gradient if name in self._unsynced else gradient

    def reduce_unsynced(self) -> None:
        """Sum over the ranks what was accumulated, and add it to the parameters' ``grad``."""
        if not self._unsynced:
            return
        unsynced, self._unsynced = self._unsynced, {}
        for name, gradient in self.sum(unsynced).items():
            add_to_grad(self._tracked[name].parameter, gradient)

    def sum(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums over the ranks of gradients that are this rank's only."""
        for name, gradient in gradients.items():
            self._tracked[name].gradient = gradient
        self.start(list(gradients))
        return self.collect()

    def end_unsynced(self) -> None:
        """In a backward that isn't under `no_sync`: sum over the ranks what any program accumulated there, and add it to ``grad``."""
        if self._reducer.is_synced:
            self._reducer.finish()

    def is_ordinary(self, name: str) -> bool:
        """Whether nothing but ``grad`` gets the gradient of a parameter; otherwise autograd must pass it on."""
        return is_ordinary(self._tracked[name].parameter)

    def as_gradient(self, name: str, gradient: Tensor) -> Tensor:
        """A complete gradient as autograd takes it: a DTensor, if the parameter is one."""
        return like(gradient, self._tracked[name].parameter)

    def apply(self, gradients: Mapping[str, Tensor]) -> None:
        """Add summed gradients to the parameters' ``grad``."""
        for name, gradient in gradients.items():
            add_to_grad(self._tracked[name].parameter, gradient)


def _gone() -> None:
    """A weak reference to nothing."""


def refuse_sparse_gradients(model: nn.Module) -> None:
    """Raise InputError for a table whose gradient would be sparse, before a step has begun."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            raise InputError(_SPARSE.format(f"{path}.weight".lstrip(".")))


def _begin(program: _Program) -> None:
    """Count the gradients of a backward from its first one."""
    program.started = 0
    for bucket in program.buckets:
        bucket.ready = 0


def _is_full(bucket: Bucket) -> bool:
    return bucket.ready >= len(bucket.members)
