"""How ranks exchange tensors: collectives and messages over the axes of a mesh, without autograd.

Comes in: a tensor of each rank. Goes out: a tensor on each rank. An `Axis` is one mesh axis as one of its ranks sees it. `GroupAxis`
communicates over a torch.distributed process group; `ThreadAxis` over the memory of one process in which every rank is a thread, which is
how tests and ``verify`` run all ranks without a process group; `MicrobatchAxis` numbers the micro-batches of a step, between which nothing
can be exchanged.

A program names axes by text, and `active` says for a thread which objects the names stand for::

    with active({"dp": GroupAxis("dp", group)}):
        axis("dp").all_reduce(x)
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol, final

import torch
import torch.distributed as dist
from torch import Tensor

from autopar import torch_compat
from autopar.errors import CommError
from autopar.ir import HALVES
from autopar.ops.moved import as_moved, from_moved
from autopar.ops.rendezvous import Rendezvous

Reduction = Literal["sum", "max"]
"""How `Axis.all_reduce` combines the ranks' tensors."""


class Message(Protocol):
    """A tensor that is being sent to another rank, or received from one."""

    def is_done(self) -> bool:
        """Whether the tensor was received, or was sent and may change again."""
        ...

    def wait(self) -> Tensor:
        """Wait until it is done; returns the tensor."""
        ...


class Axis(ABC):
    """One axis of the mesh, seen from one rank.

    Attributes:
        name: the axis' name in the plan's mesh.
        size: number of ranks along it.
        index: position of this rank, 0 <= index < size.

    In a collective the tensors of all ranks have one shape and one dtype.
    """

    name: str
    size: int
    index: int

    @abstractmethod
    def all_reduce(self, x: Tensor, op: Reduction = "sum") -> Tensor:
        """Combine all ranks' `x` elementwise; `x` itself is left as it is."""

    @abstractmethod
    def gather_stack(self, x: Tensor) -> Tensor:
        """Every rank's `x` in rank order along a new first dim: (size, *x.shape), contiguous; all have one shape."""

    @abstractmethod
    def reduce_stack(self, parts: Tensor) -> Tensor:
        """Sum over the ranks of their ``parts[index]``; `parts` is (size, *shape), the result is of `shape`."""

    @abstractmethod
    def exchange_stack(self, parts: Tensor) -> Tensor:
        """Send ``parts[i]`` to rank i; returns what each rank sent here, in rank order, of the same shape (size, *shape)."""

    @abstractmethod
    def send(self, x: Tensor, to: int) -> Message:
        """Begin to send `x` to the rank at position `to`, without waiting for it. `x` must not change until the message is done."""

    @abstractmethod
    def receive(self, source: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Message:
        """Begin to receive a tensor from the rank at position `source`: the n-th call gets the n-th tensor that it sends here."""

    def exchange_pieces(self, sent: Mapping[int, Tensor], awaited: Mapping[int, Sequence[int]], like: Tensor) -> dict[int, Tensor]:
        """Send each rank in `sent` a tensor, and return one from each in `awaited`, of that shape and of the dtype and device of `like`."""
        sends = [self.send(x, rank) for rank, x in sent.items()]
        messages = {rank: self.receive(rank, shape, like.dtype, like.device) for rank, shape in awaited.items()}
        received = {rank: message.wait() for rank, message in messages.items()}
        for message in sends:
            message.wait()
        return received

    def begin_rotate(self, x: Tensor) -> Message:
        """Begin to send `x` to the next rank, the first after the last; the message's tensor is what the rank before sends so."""
        sent = self.send(x, (self.index + 1) % self.size)
        received = self.receive((self.index - 1) % self.size, x.shape, x.dtype, x.device)
        return _Begun(received.wait, sent)

    def begin_gather_stack(self, x: Tensor) -> Message:
        """Begin `gather_stack`; the message's tensor is its result. `x` must not change until it is waited for.

        All ranks begin and run the collectives of an axis in one order. An axis that can't leave one to run makes it at once.
        """
        return _DeliveredMessage(self.gather_stack(x))

    def begin_reduce_stack(self, parts: Tensor) -> Message:
        """Begin `reduce_stack`, as `begin_gather_stack` does `gather_stack`."""
        return _DeliveredMessage(self.reduce_stack(parts))

    def begin_all_reduce(self, x: Tensor) -> Message:
        """Begin to sum `x` over the ranks, as `begin_gather_stack` does `gather_stack`."""
        return _DeliveredMessage(self.all_reduce(x))

    def begin_exchange_stack(self, parts: Tensor) -> Message:
        """Begin `exchange_stack`, as `begin_gather_stack` does `gather_stack`."""
        return _DeliveredMessage(self.exchange_stack(parts))

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's `x`, in rank order; all have the same shape."""
        return list(self.gather_stack(x).unbind())

    def reduce_scatter(self, parts: Sequence[Tensor]) -> Tensor:
        """Sum over the ranks of their ``parts[index]``; `parts` has one tensor per rank, all of one shape."""
        return self.reduce_stack(torch.stack(list(parts)))

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Send ``parts[i]`` to rank i; returns what each rank sent here, in rank order. All parts have one shape."""
        return list(self.exchange_stack(torch.stack(list(parts))).unbind())


@final
class GroupAxis(Axis):
    """An axis over a torch.distributed process group (gloo or nccl) that holds exactly its ranks, in order."""

    def __init__(self, name: str, group: dist.ProcessGroup, directions: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None) -> None:
        """Communicate over `group`; `directions` are the groups for messages to later and to earlier ranks, by default `group`.

        On a GPU the messages of one group between two ranks run one after the other, so a send that waits for its receive would block the
        receive for which the other rank's send waits. With a group per direction sends never wait.
        """
        self.name = name
        self.group = group
        self.directions = directions or (group, group)
        self.size = dist.get_world_size(group)
        self.index = dist.get_rank(group)

    def send(self, x: Tensor, to: int) -> Message:
        """Begin to send `x` to the rank at position `to`, without waiting for it. `x` must not change until the message is done."""
        sent = as_moved(x.detach().contiguous())
        return _GroupMessage(sent, dist.isend(sent, group=self.directions[to < self.index], group_dst=to), x.dtype)

    def receive(self, source: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Message:
        """Begin to receive a tensor from the rank at position `source`: the n-th call gets the n-th tensor that it sends here."""
        received = as_moved(torch.empty(tuple(shape), dtype=dtype, device=device))
        return _GroupMessage(received, dist.irecv(received, group=self.directions[source > self.index], group_src=source), dtype)

    def begin_rotate(self, x: Tensor) -> Message:
        """Begin to send `x` to the next rank, the first after the last; the message's tensor is what the rank before sends so."""
        # While a program's own thread sends a message over gloo, gloo's thread polls; an all-to-all is sent by threads of its own. Over
        # NCCL messages would wait in a circle, as all ranks send before they receive.
        return self._swap(x)

    def exchange_pieces(self, sent: Mapping[int, Tensor], awaited: Mapping[int, Sequence[int]], like: Tensor) -> dict[int, Tensor]:
        """As `Axis.exchange_pieces`, in one all-to-all: all ranks of the axis must call it."""
        given = [sent[rank].numel() if rank in sent else 0 for rank in range(self.size)]
        taken = [math.prod(awaited[rank]) if rank in awaited else 0 for rank in range(self.size)]
        flat = as_moved(torch.cat([like.new_empty(0), *(sent[rank].detach().reshape(-1) for rank in sorted(sent))]))
        received = as_moved(like.new_empty(sum(taken)))
        work = torch_compat.all_to_all_single(received, flat, taken, given, group=self.group, async_op=True)
        pieces = torch.split(_GroupMessage(received, work, like.dtype, flat).wait(), taken)
        return {rank: pieces[rank].view(tuple(shape)) for rank, shape in awaited.items()}

    def all_reduce(self, x: Tensor, op: Reduction = "sum") -> Tensor:
        """Combine all ranks' `x` elementwise; `x` itself is left as it is."""
        if self._is_pair(x):
            return _combine_into(self._swap(x).wait(), x, op)
        if x.is_complex():
            return torch.view_as_complex(self.all_reduce(torch.view_as_real(x.detach().resolve_conj()), op))
        # Gloo reduces no bool: a sum or a maximum of flags is whether any rank has one.
        flags = x.dtype is torch.bool
        work = x.to(torch.uint8) if flags else x.detach().clone(memory_format=torch.contiguous_format)
        if self.size > 1:
            reduction = dist.ReduceOp.MAX if op == "max" or flags else dist.ReduceOp.SUM
            dist.all_reduce(work, reduction, group=self.group)
        return work.to(x.dtype)

    def begin_all_reduce(self, x: Tensor) -> Message:
        """Begin to sum `x` over the ranks; the message's tensor is the sum. `x` must not change until it is waited for."""
        if self._is_pair(x):
            swapped = self._swap(x)
            return _Begun(lambda: _combine_into(swapped.wait(), x, "sum"), swapped)
        if x.is_complex() or x.dtype is torch.bool or self.size == 1:
            return _DeliveredMessage(self.all_reduce(x))
        total = x.detach().clone(memory_format=torch.contiguous_format)
        return _GroupMessage(total, dist.all_reduce(total, group=self.group, async_op=True), x.dtype)

    def gather_stack(self, x: Tensor) -> Tensor:
        """Every rank's `x` in rank order along a new first dim: (size, *x.shape), contiguous; all have one shape."""
        return self.begin_gather_stack(x).wait()

    def begin_gather_stack(self, x: Tensor) -> Message:
        """Begin `gather_stack`; the message's tensor is its result. `x` must not change until it is waited for."""
        if self._is_pair(x):
            stack = x.new_empty((2, *x.shape))
            stack[self.index].copy_(x.detach())
            message = self._receive(stack[1 - self.index], x)
            return _Begun(lambda: stack, message)
        sent = as_moved(x.detach().contiguous())
        received = sent.new_empty((self.size, *sent.shape))
        if self.size > 1 and sent.device.type == "cpu":
            # Gloo gathers in a ring, one step after the other. Broadcasts of all parts take half the CPU time: measured on loopback with
            # 4 ranks and parts of 4 KiB / 128 KiB / 2 MiB 0.35 / 0.50 / 2.4 against 0.37 / 0.83 / 4.6 ms.
            received[self.index].copy_(sent)
            works = [dist.broadcast(part, group=self.group, group_src=rank, async_op=True) for rank, part in enumerate(received)]
            return _Begun(lambda: from_moved(received, x.dtype), *(_GroupMessage(received, work, received.dtype) for work in works))
        work = torch_compat.all_gather_single(received.view(-1), sent.view(-1), group=self.group, async_op=True)
        return _GroupMessage(received, work, x.dtype, sent)

    def reduce_stack(self, parts: Tensor) -> Tensor:
        """Sum over the ranks of their ``parts[index]``; `parts` is (size, *shape), the result is of `shape`."""
        return self.begin_reduce_stack(parts).wait()

    def begin_reduce_stack(self, parts: Tensor) -> Message:
        """Begin `reduce_stack`; the message's tensor is its result. `parts` must not change until it is waited for."""
        if self._is_pair(parts):
            swapped = self._swap(parts[1 - self.index])
            return _Begun(lambda: _combine_into(swapped.wait(), parts[self.index], "sum"), swapped)
        if self.size > 1 and parts.device.type == "cpu":
            # Gloo sums in a ring, one step after the other; sending every part where it is summed is one step.
            exchanged = self.begin_exchange_stack(parts)
            return _Begun(lambda: exchanged.wait().sum(0, dtype=parts.dtype), exchanged)
        if parts.is_complex():
            reduced = self.begin_reduce_stack(torch.view_as_real(parts.detach().resolve_conj()))
            return _Begun(lambda: torch.view_as_complex(reduced.wait()), reduced)
        sent = parts.detach().contiguous()
        received = sent.new_empty(sent.shape[1:])
        work = torch_compat.reduce_scatter_single(received.view(-1), sent.view(-1), group=self.group, async_op=True)
        return _GroupMessage(received, work, parts.dtype, sent)

    def exchange_stack(self, parts: Tensor) -> Tensor:
        """Send ``parts[i]`` to rank i; returns what each rank sent here, in rank order, of the same shape (size, *shape)."""
        return self.begin_exchange_stack(parts).wait()

    def begin_exchange_stack(self, parts: Tensor) -> Message:
        """Begin `exchange_stack`; the message's tensor is its result. `parts` must not change until it is waited for."""
        sent = as_moved(parts.detach().contiguous())
        received = torch.empty_like(sent)
        return _GroupMessage(received, torch_compat.all_to_all_single(received, sent, group=self.group, async_op=True), parts.dtype, sent)

    # Two CPU ranks: a collective is one message to the other rank and one from it. Measured on loopback, taking turns with gloo's
    # own, best times of 64 KiB / 2 MiB: reduce-scatter 0.27 / 0.85 against 0.39 / 1.8 ms, all-gather 0.20 / 0.98 against
    # 0.29 / 1.5 ms, all-reduce 0.22 / 1.6 against 0.31 / 1.9 ms, and no gain for larger ones. Gloo's all-to-all already is that.

    def _is_pair(self, x: Tensor) -> bool:
        return self.size == 2 and x.device.type == "cpu"

    def _swap(self, sent: Tensor) -> Message:
        """Begin to send a tensor to the next rank; the message is the one that the rank before sends, which has the same shape."""
        return self._receive(torch.empty_like(sent, memory_format=torch.contiguous_format, requires_grad=False), sent)

    def _receive(self, received: Tensor, sent: Tensor) -> Message:
        # Messages to and from all other ranks are empty.
        flat, moved = as_moved(sent.detach().contiguous()).view(-1), as_moved(received)
        given, taken = ([flat.numel() * (rank == (self.index + hop) % self.size) for rank in range(self.size)] for hop in (1, -1))
        work = torch_compat.all_to_all_single(moved.view(-1), flat, taken, given, group=self.group, async_op=True)
        return _GroupMessage(moved, work, sent.dtype, flat)


@final
class _Begun:
    """A collective that was begun, of which `finish` makes the result when its messages have come."""

    def __init__(self, finish: Callable[[], Tensor], *messages: Message) -> None:
        self._finish, self._messages = finish, messages

    def is_done(self) -> bool:
        return all(message.is_done() for message in self._messages)

    def wait(self) -> Tensor:
        for message in self._messages:
            message.wait()
        return self._finish()


@final
class _GroupMessage:
    """A tensor that torch.distributed sends or receives, and what is `sent` for it. Failures name no rank: callers say what they await."""

    def __init__(self, x: Tensor, work: dist.Work | None, dtype: torch.dtype, sent: Tensor | None = None) -> None:
        assert work is not None, "this rank is in the group"
        self._x, self._work, self._dtype, self._sent = x, work, dtype, sent

    def is_done(self) -> bool:
        return self._work.is_completed()

    def wait(self) -> Tensor:
        self._work.wait()
        self._sent = None
        return from_moved(self._x, self._dtype)


@final
class ThreadAxis(Axis):
    """An axis whose ranks are threads of this process that share a `Rendezvous`; results are the same bits on every rank."""

    def __init__(self, name: str, index: int, exchange: Rendezvous) -> None:
        self.name = name
        self.size = exchange.size
        self.index = index
        self.exchange = exchange

    def all_reduce(self, x: Tensor, op: Reduction = "sum") -> Tensor:
        """Combine all ranks' `x` elementwise; `x` itself is left as it is."""
        return self._meet(f"all_reduce({op})", x, lambda ranks: _combine(ranks, op))

    def gather_stack(self, x: Tensor) -> Tensor:
        """Every rank's `x` in rank order along a new first dim: (size, *x.shape), contiguous; all have one shape."""
        return self._meet("all_gather", x, torch.stack)

    def reduce_stack(self, parts: Tensor) -> Tensor:
        """Sum over the ranks of their ``parts[index]``; `parts` is (size, *shape), the result is of `shape`."""
        return self._meet("reduce_scatter", parts, lambda ranks: _combine([rank_parts[self.index] for rank_parts in ranks], "sum"))

    def exchange_stack(self, parts: Tensor) -> Tensor:
        """Send ``parts[i]`` to rank i; returns what each rank sent here, in rank order, of the same shape (size, *shape)."""
        return self._meet("all_to_all", parts, lambda ranks: torch.stack([rank_parts[self.index] for rank_parts in ranks]))

    def send(self, x: Tensor, to: int) -> Message:
        """Begin to send `x` to the rank at position `to`, without waiting for it. `x` must not change until the message is done."""
        copy = x.detach().clone()
        self.exchange.send(self.index, to, copy)
        return _DeliveredMessage(copy)

    def receive(self, source: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Message:
        """Begin to receive a tensor from the rank at position `source`: the n-th call gets the n-th tensor that it sends here."""
        return _ThreadMessage(self, source, self.exchange.expect(source, self.index), (tuple(shape), dtype))

    def _meet(self, label: str, x: Tensor, read: Callable[[list[Tensor]], Tensor]) -> Tensor:
        sizes = "x".join(map(str, x.shape))
        return self.exchange.meet(self.index, f"{label} of {x.dtype}[{sizes}] on {self.name!r}", x.detach(), read)


@final
class _DeliveredMessage:
    """A message sent between threads, which is done at once: the receiver has a copy."""

    def __init__(self, x: Tensor) -> None:
        self._x = x

    def is_done(self) -> bool:
        return True

    def wait(self) -> Tensor:
        return self._x


@final
class _ThreadMessage:
    """A message that is received from another thread."""

    def __init__(self, axis: ThreadAxis, source: int, number: int, expected: tuple[tuple[int, ...], torch.dtype]) -> None:
        self._axis, self._source, self._number, self._expected = axis, source, number, expected

    def is_done(self) -> bool:
        return self._axis.exchange.has_arrived(self._source, self._axis.index, self._number)

    def wait(self) -> Tensor:
        x = self._axis.exchange.receive(self._source, self._axis.index, self._number)
        if (tuple(x.shape), x.dtype) != self._expected:
            raise CommError(f"expected {self._expected} from rank {self._source} of {self._axis.name!r}, got {(tuple(x.shape), x.dtype)}")
        return x


def _combine(tensors: Sequence[Tensor], op: Reduction) -> Tensor:
    total = tensors[0].clone(memory_format=torch.contiguous_format)
    for tensor in tensors[1:]:
        _combine_into(total, tensor, op)
    return total


def _combine_into(total: Tensor, x: Tensor, op: Reduction) -> Tensor:
    """Combine `x` into `total`, in place. Swapping the two gives the same bits, so ranks that each begin with their own agree."""
    x = x.detach()
    if total.dtype is torch.bool:
        return total.logical_or_(x)
    if op == "max":
        return torch.maximum(total, x, out=total)
    return total.add_(x)


@final
class MicrobatchAxis(Axis):
    """The axis of micro-batches: its size is their number, its index the one that is computed now.

    All micro-batches are computed by the same ranks, one after the other, so a collective along it can't run: every one raises CommError.
    """

    def __init__(self, name: str, size: int, index: int) -> None:
        if not 0 <= index < size:
            raise ValueError(f"position {index} on axis {name!r}, which has {size}")
        self.name = name
        self.size = size
        self.index = index

    def all_reduce(self, x: Tensor, op: Reduction = "sum") -> Tensor:
        """Raises CommError."""
        raise self._refuse("all_reduce")

    def gather_stack(self, x: Tensor) -> Tensor:
        """Raises CommError."""
        raise self._refuse("all_gather")

    def reduce_stack(self, parts: Tensor) -> Tensor:
        """Raises CommError."""
        raise self._refuse("reduce_scatter")

    def exchange_stack(self, parts: Tensor) -> Tensor:
        """Raises CommError."""
        raise self._refuse("all_to_all")

    def send(self, x: Tensor, to: int) -> Message:
        """Raises CommError."""
        raise self._refuse("send")

    def receive(self, source: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Message:
        """Raises CommError."""
        raise self._refuse("receive")

    def _refuse(self, label: str) -> CommError:
        return CommError(f"ranks can't exchange along time: {label} on axis {self.name!r}, micro-batch {self.index} of {self.size}")


def alone(name: str) -> Axis:
    """An axis of size 1, for a process without process groups."""
    return ThreadAxis(name, 0, Rendezvous(1))


class _Stack(threading.local):
    def __init__(self) -> None:
        self.axes: list[Mapping[str, Axis]] = []


_STACK = _Stack()


@contextmanager
def active(axes: Mapping[str, Axis]) -> Iterator[None]:
    """Inside the ``with`` block and on this thread, let names of axes stand for these axes."""
    _STACK.axes.append(axes)
    try:
        yield
    finally:
        _STACK.axes.pop()


def current() -> Mapping[str, Axis]:
    """The axes that are active on this thread, by name. Raises CommError when there are none.

    What runs later on another thread, such as a recomputation, must store them and make them active there.
    """
    if not _STACK.axes:
        raise CommError("no axes are active on this thread; run the program inside `autopar.ops.comm.active`")
    return _STACK.axes[-1]


_HALVES: Mapping[str, Axis] = {name: MicrobatchAxis(name, 2, index) for index, name in enumerate(HALVES)}
"""The axis of two micro-batches as each of them sees it, for programs that compute both at once."""


def axis(name: str) -> Axis:
    """The axis that `name` stands for on this thread. Raises CommError when none of that name is active."""
    if name in _HALVES:
        return _HALVES[name]
    axes = current()
    if name not in axes:
        raise CommError(f"no axis {name!r} is active; there are {', '.join(sorted(axes))}")
    return axes[name]


def index(names: Sequence[str]) -> int:
    """Position of this rank in the row-major order over several axes, the first being the outermost."""
    position = 0
    for name in names:
        mesh_axis = axis(name)
        position = position * mesh_axis.size + mesh_axis.index
    return position


def count(names: Sequence[str]) -> int:
    """Number of ranks over several axes together."""
    return math.prod(axis(name).size for name in names)
