"""Gradients of a pipeline's micro-batches of which each rank gets its part of the sum after every backward: ZeRO level 2.

Comes in: the local gradients of parameters, which the backwards of micro-batches hand over one by one. Goes out: in the ``grad`` of each
parameter's leaf, the stored part of the sum over ranks and micro-batches. So a rank never has more whole gradients than a bucket and what
is under way. The gradients of one micro-batch are summed over ranks in the dtype of sums; what comes of the micro-batches is added up in
the stored dtype.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from autopar.runtime.sums import Bucket, PendingSum, TrackedParameter, end_sum, fill_buckets, start_sum


class ScatteredSums:
    """Sums of the gradients of parameters that this rank's stages are given whole and that are scattered after every backward.

    All ranks of a stage run the same backwards in the same order, so they start the same sums.

    Args:
        tracked: the parameters; some may be stored on another pipeline rank, whose leaves are of the stored part, and only get gradients.
        stages: stage of this rank -> names of the parameters that it uses.
        bucket_nbytes: bytes of gradients that are summed by one reduce-scatter.
    """

    def __init__(self, tracked: Sequence[TrackedParameter], stages: Mapping[int, Sequence[str]], bucket_nbytes: int) -> None:
        self._tracked = {entry.name: entry for entry in tracked if entry.leaf.requires_grad}
        self._bucket_nbytes = bucket_nbytes
        uses = Counter(name for names in stages.values() for name in names)
        # What several stages use waits for no other parameter: their backwards take turns.
        own = {
            stage: [self._tracked[name] for name in names if name in self._tracked and uses[name] == 1] for stage, names in stages.items()
        }
        self._buckets = {stage: fill_buckets(entries, bucket_nbytes) for stage, entries in own.items()}
        self._bucket_of = {entry.name: bucket for buckets in self._buckets.values() for bucket in buckets for entry in bucket.members}
        self._bucket_of |= {name: Bucket((entry,)) for name, entry in self._tracked.items() if uses[name] > 1 and entry.is_deferred}
        self._pending_sums: list[PendingSum] = []

    def find_receiver(self, name: str) -> Callable[[Tensor], None] | None:
        """What takes the gradients of a parameter in a backward; None for one that isn't among these."""
        entry = self._tracked.get(name)
        return None if entry is None else partial(self._receive, entry)

    def find_leaf(self, name: str, other: Tensor) -> Tensor:
        """The leaf in whose ``grad`` the stored part of a parameter's gradient adds up; `other` for one that isn't among these."""
        entry = self._tracked.get(name)
        return other if entry is None else entry.leaf

    def _receive(self, entry: TrackedParameter, gradient: Tensor) -> None:
        """Take a local gradient of what the program was given, and start the sum of its bucket if that is full."""
        bucket = self._bucket_of.get(entry.name)
        if bucket is None:  # complete on every rank
            part = entry.complete_part(gradient).to(entry.leaf.dtype, copy=True, memory_format=torch.contiguous_format)
            _add(entry, part)
            return
        if entry.gradient is not None:
            # Of a micro-batch whose weight gradients are left to a pass of their own; others may have what is added up.
            entry.gradient = entry.gradient.to(entry.leaf.dtype) + gradient
            return
        entry.gradient = gradient
        bucket.ready += 1
        if bucket.ready == len(bucket.members):
            self._start(bucket)

    def flush(self, stage: int) -> None:
        """After a backward of a stage: start the sums of what is left in its buckets, which run while messages are sent."""
        for bucket in self._buckets.get(stage, ()):
            if bucket.ready:
                self._start(bucket)

    def _start(self, bucket: Bucket) -> None:
        bucket.ready = 0
        start_sum(bucket.members, self._pending_sums, self._bucket_nbytes)
        while self._pending_sums and self._pending_sums[0].is_settled:
            self._end_first()

    def finish(self) -> None:
        """Wait for all sums that were started, before anything else computes, as what they hold is memory too."""
        while self._pending_sums:
            self._end_first()

    def _end_first(self) -> None:
        for entry, part in end_sum(self._pending_sums.pop(0)):
            _add(entry, part)

    def clear(self) -> None:
        """Drop all gradients, after a run that failed or whose backward never came."""
        self._pending_sums.clear()
        for entry in self._tracked.values():
            entry.leaf.grad = entry.gradient = None
        for bucket in self._bucket_of.values():
            bucket.ready = 0


def _add(entry: TrackedParameter, part: Tensor) -> None:
    """Add this rank's part of a sum to the leaf's ``grad``, which takes what comes first as it is."""
    if entry.leaf.grad is None:
        entry.leaf.grad = part
    else:
        entry.leaf.grad.add_(part)
