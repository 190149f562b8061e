"""Parameters that are stored in parts and gathered for their use: begun ahead, freed after the forward, gathered again in the backward.

Comes in: this rank's part of a parameter. Goes out: the whole parameter, when a call of the program or of the backward reads it.

A program is a list of blocks that run one after the other. While one computes, the gathers of the next ``ahead`` ones run: in the forward
`collectives.begin_all_gather` begins them, where the program says so; in the backward the first read of a block begins the gathers of the
blocks before it. Gradients go the same way back: the sum over ranks of a block's gradients runs while the blocks before it compute theirs,
if somebody takes a gradient before it is complete (`GradientSink`).

Ranks must begin the same collectives in the same order. So what is begun depends only on the program and on what its forward saved, which
are the same on all ranks, and not on how far other ranks are. What was begun and isn't read, since a backward reaches only a part of the
model, is waited for at the end of the backward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from autopar import torch_compat
from autopar.ops import comm
from autopar.ops.parts import join_stack, pad_part
from autopar.torch_compat import StorageRef


class Gather:
    """How to gather a parameter from this rank's part, as often as it is needed, and the gathered tensor while a backward reads it.

    Args:
        part: this rank's part.
        axis: the mesh axis.
        dim, outer: the dim that is joined, and the number of its outer blocks in `part`.
        dtype: to which parts are cast before they are sent.
        size: the size of the joined dim, where parts aren't of one size: they are padded before they are sent.
    """

    def __init__(self, part: Tensor, axis: comm.Axis, dim: int, outer: int, dtype: torch.dtype, size: int | None = None) -> None:
        self.part, self.axis, self.dim, self.outer, self.dtype, self.size = part, axis, dim, outer, dtype, size
        # Whether the forward's region that reads it is run again in the backward, which then gathers it again.
        self.runs_again = False
        self._version = 0 if part.is_inference() else part._version
        self._saves = 0
        self._unread = 0
        self._begun: comm.Message | None = None
        self._full: Tensor | None = None

    @property
    def is_read_again(self) -> bool:
        """Whether the backward reads it, if it comes to the calls that do."""
        return self.runs_again or self._saves > 0

    def begin(self) -> None:
        """Begin to gather, unless that has been begun, or a backward is reading the gathered tensor."""
        if self._begun is None and self._full is None:
            self._begun = self.axis.begin_gather_stack(self._sent())

    def take(self) -> Tensor:
        """The gathered tensor, which is the caller's alone."""
        if self._begun is None:
            stack = self.axis.gather_stack(self._sent())
        else:
            begun, self._begun = self._begun, None
            stack = begun.wait()
        return join_stack(stack, self.dim, self.outer, self.size)

    def _sent(self) -> Tensor:
        part = self.part.to(self.dtype)
        return part if self.size is None else pad_part(part, self.dim, self.size, self.axis.size)

    def drop(self) -> None:
        """Wait for what was begun, and release it."""
        if self._begun is not None:
            begun, self._begun = self._begun, None
            begun.wait()

    def note_save(self) -> None:
        """Autograd saves the gathered tensor, or a view of it, once more."""
        self._saves += 1

    def read(self) -> Tensor:
        """The gathered tensor, for a backward. The first read gathers it; it is freed after as many reads as there were saves."""
        if self._full is None:
            if self.part._version != self._version:
                raise RuntimeError(
                    "a parameter that the backward gathers again has been modified by an inplace operation since the forward"
                )
            self._full, self._unread = self.take(), self._saves
        full = self._full
        self._unread -= 1
        if self._unread <= 0:
            self._full = None
        return full


class Forward:
    """The gathers of one run of a program, by block; its backwards begin those of blocks that come next before they are read.

    Args:
        ahead: how many blocks; 0 begins nothing.
    """

    def __init__(self, ahead: int) -> None:
        self.ahead = ahead
        self._blocks: dict[int, list[Gather]] = {}
        self._sinks: dict[int, GradientSink] = {}
        # The backward that runs now, and the blocks that it has come to, and those whose gathers it has begun.
        self._backward = -1
        self._reached: set[int] = set()
        self._begun: set[int] = set()

    def add(self, gather: Gather, block: int, sink: GradientSink | None) -> None:
        """A gather of a block, in program order, and who takes gradients of what it gathers."""
        self._blocks.setdefault(block, []).append(gather)
        if sink is not None:
            self._sinks[block] = sink

    def reach(self, block: int) -> None:
        """A backward comes to a block: begin its gathers, and those of the next ones, unless this backward has."""
        this_backward = torch_compat.backward_id()
        if this_backward == -1:
            return  # autograd's graph is only looked at
        if self._backward != this_backward:
            self._backward, self._reached, self._begun = this_backward, set(), set()
            torch_compat.after_backward(self._end)
        if block in self._reached:
            return
        self._reached.add(block)
        # Before more is gathered: what is in flight of the blocks behind is as much as the plan says.
        if (sink := self._sinks.get(block)) is not None:
            sink.reach(block, self.ahead)
        for number in range(block, block - 1 - self.ahead, -1):
            if number not in self._begun:
                self._begun.add(number)
                for gather in reversed(self._blocks.get(number, ())):
                    if gather.is_read_again:
                        gather.begin()

    def _end(self) -> None:
        self._backward = -1
        for gathers in self._blocks.values():
            for gather in gathers:
                gather.drop()


@dataclass(frozen=True, slots=True)
class Use:
    """The use of a gathered parameter by a block of a program; `collectives.begin_all_gather` gives it to `collectives.all_gather`.

    Attributes:
        gather: it.
        block: the number of the block, among those of the program that gather; None for a gather that isn't begun ahead.
        forward: the run of the program, if its backward may gather again ahead.
    """

    gather: Gather
    block: int | None = None
    forward: Forward | None = None

    def take(self) -> Tensor:
        """The gathered tensor: in the forward what was begun; in a region that is run again, what the backward has begun."""
        if self.gather.runs_again:
            self._reach()
        return self.gather.take()

    def read(self) -> Tensor:
        """The gathered tensor, for a backward that didn't find it saved."""
        self._reach()
        return self.gather.read()

    def note_run_again(self) -> None:
        """The backward will run the region that reads it again."""
        self.gather.runs_again = True

    def _reach(self) -> None:
        if self.forward is not None and self.block is not None:
            self.forward.reach(self.block)


class GradientSink(Protocol):
    """Who takes the gradient of a parameter's part before it is complete."""

    def takes(self) -> bool:
        """Whether it does in the backward that runs now; if not, autograd gets the complete gradient."""
        ...

    def reach(self, block: int, ahead: int) -> None:
        """The backward that runs now comes to a block, and makes its gradients next."""
        ...

    def receive(self, begin: Callable[[], comm.Message], dtype: torch.dtype, block: int, ahead: int) -> None:
        """Take a gradient.

        Args:
            begin: begins its sum over ranks; the message's tensor is this rank's part.
            dtype: to which it must be cast then.
            block: of the program, whose gradient it is; backwards come from later blocks to earlier ones.
            ahead: of how many blocks before it sums may be begun while it isn't waited for.
        """
        ...


_SINK = "_autopar_gradient_sink"


def deliver_to(part: Tensor, sink: GradientSink) -> None:
    """Let gathers of `part` that a program begins ahead hand its gradients to `sink`, past autograd, where the sink takes them."""
    setattr(part, _SINK, sink)


def find_sink(part: Tensor) -> GradientSink | None:
    """Who takes the gradients of a tensor."""
    return getattr(part, _SINK, None)


# --- gathered tensors that autograd doesn't save --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _View:
    """What autograd saves in the place of a tensor that is a view of a gathered one."""

    use: Use
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Current(threading.local):
    def __init__(self) -> None:
        # Storages of the gathers made inside `regather` on this thread; None outside of it.
        self.uses: dict[int, tuple[StorageRef, Use]] | None = None
        self.forward: Forward | None = None


_CURRENT = _Current()


def current_forward() -> Forward | None:
    """The run of a program inside `regather` on this thread."""
    return _CURRENT.forward


def free_after_forward(full: Tensor, use: Use) -> None:
    """Inside of `regather`, let autograd save nothing of `full`, which was gathered for `use`."""
    if _CURRENT.uses is None:
        return
    for key in [key for key, (ref, _) in _CURRENT.uses.items() if ref.expired()]:
        del _CURRENT.uses[key]
    ref = StorageRef(full)
    _CURRENT.uses[ref.key] = ref, use


def _pack(x: Tensor) -> Tensor | _View:
    _, use = (_CURRENT.uses or {}).get(StorageRef.key_of(x), (None, None))
    if use is None or x.dtype != use.gather.dtype:
        return x
    use.gather.note_save()
    return _View(use, tuple(x.shape), x.stride(), int(x.storage_offset()))


def _unpack(saved: Tensor | _View) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    return saved.use.read().as_strided(saved.size, saved.stride, saved.offset)


@contextmanager
def regather(ahead: int = 0) -> Iterator[None]:
    """Inside, autograd saves nothing of the results of ``all_gather(..., save=False)``.

    Where a call saves such a tensor, or a view of it, this rank's part is saved instead, and the backward gathers it again. This is
    ZeRO-3's way with parameters (FSDP's ``reshard_after_forward``). What the program begins ahead, the backward begins `ahead` blocks
    before it is read.
    """
    before = _CURRENT.uses, _CURRENT.forward
    _CURRENT.uses, _CURRENT.forward = {}, Forward(ahead)
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _CURRENT.uses, _CURRENT.forward = before
