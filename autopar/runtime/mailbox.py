"""The messages of one pipeline rank: what it receives and sends, between its own stages and those of other ranks.

Comes in: sends and receives of a schedule, with their tensors. Goes out: the tensors that an action waits for. Sends never wait, receives
only begin, and what stages of one rank exchange is handed over in memory. The one idea: a sent tensor must stay until the message is done,
so it is held in `Mailbox.pending_sends`, and released as early as the schedule tells that the receiver has it (`find_finished_sends`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from autopar.errors import CommError
from autopar.ops import Axis, Message
from autopar.rewrite import CrossingTensor
from autopar.runtime import watching
from autopar.schedules import SENDS, Action, Kind, Schedule


class AwaitedPass(NamedTuple):
    """A forward, or a backward (of inputs at least), of one micro-batch on one stage, which waits for messages."""

    is_forward: bool
    stage: int
    microbatch: int


FinishedSends = Mapping[AwaitedPass, tuple[Action, ...]]
"""A pass of a pipeline rank -> the sends of that rank which are done once the messages that the pass waits for have arrived."""


def find_finished_sends(schedule: Schedule, pipeline_rank: int) -> FinishedSends:
    """When the sends of a pipeline rank are known to be done: a rank that sends has received what its earlier passes waited for.

    A send over gloo can't be asked whether it is done, only be waited for, and holds its tensor until then. Where it is known to be done,
    waiting takes no time. Of sends after which no message comes back (the last gradients) nothing is known.
    """
    finished: dict[AwaitedPass, tuple[Action, ...]] = {}
    sends: dict[AwaitedPass, list[Action]] = {}
    for action in schedule.actions[pipeline_rank]:
        if action.kind in SENDS:
            sends.setdefault(AwaitedPass(action.kind is Kind.SEND_FORWARD, action.peer, action.microbatch), []).append(action)
    for rank, actions in enumerate(schedule.actions):
        received: list[Action] = []
        for action in actions if rank != pipeline_rank else ():
            if action.kind in (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT):
                received += sends.get(AwaitedPass(action.kind is Kind.FORWARD, action.stage, action.microbatch), ())
            elif action.kind in SENDS and schedule.rank_of[action.peer] == pipeline_rank and received:
                awaited = AwaitedPass(action.kind is Kind.SEND_FORWARD, action.peer, action.microbatch)
                finished[awaited] = (*finished.get(awaited, ()), *received)
                received = []
    return finished


def connect(axis: Axis, pairs: Iterable[tuple[int, int]], device: torch.device) -> None:
    """Exchange a first message between these pairs of positions on the axis, both ways; all ranks of the axis must name the same pairs.

    NCCL connects two ranks when they first exchange a message, and holds up both until the other comes. In a schedule, whose sends mustn't
    wait, that could be a circle. Here all ranks go through the pairs in one order.
    """
    for first, second in sorted(pairs):
        for sender, receiver in ((first, second), (second, first)):
            if axis.index == sender:
                axis.send(torch.zeros(1, dtype=torch.uint8, device=device), receiver).wait()
            elif axis.index == receiver:
                axis.receive(sender, (1,), torch.uint8, device).wait()


class Delivery(NamedTuple):
    """What a message brings: values for a forward of `stage` from stage `peer`, or gradients for its backward."""

    kind: Kind
    stage: int
    peer: int
    microbatch: int


class Mailbox:
    """The messages of one rank during one run of a schedule.

    Args:
        axis: the pipeline's axis.
        schedule: the schedule that runs.
        pipeline_rank: this rank's position along the axis.
        finished_sends: what `find_finished_sends` says of this schedule and rank. Without it, sends that can't tell when they are done are
            held until the end.

    Attributes:
        pending_sends: sends that aren't known to be done -> their messages, in the order of sending.
    """

    def __init__(self, axis: Axis, schedule: Schedule, pipeline_rank: int, finished_sends: FinishedSends | None = None) -> None:
        self.pending_sends: dict[Action, list[Message]] = {}
        self._axis = axis
        self._rank_of = schedule.rank_of
        self._pipeline_rank = pipeline_rank
        self._finished_sends = finished_sends or {}
        self._inbox: dict[Delivery, list[Message]] = {}
        self._local: dict[Delivery, list[Tensor]] = {}  # from stages of this rank to stages of this rank

    @property
    def is_empty(self) -> bool:
        """Whether everything that was received was used."""
        return not self._inbox and not self._local

    def is_local(self, stage: int) -> bool:
        """Whether a stage is on this rank."""
        return self._rank_of[stage] == self._pipeline_rank

    def put(self, delivery: Delivery, tensors: Sequence[Tensor]) -> None:
        """Hand tensors to a stage of this rank, or store gradients for another rank until they are sent."""
        self._local[delivery] = list(tensors)

    def pop(self, delivery: Delivery) -> list[Tensor]:
        """The tensors that `put` stored for this delivery. Raises KeyError when there are none."""
        return self._local.pop(delivery)

    def send(self, action: Action, tensors: Sequence[Tensor]) -> None:
        """Begin a send of the schedule, and release earlier sends that are done."""
        while self.pending_sends and all(message.is_done() for message in next(iter(self.pending_sends.values()))):
            del self.pending_sends[next(iter(self.pending_sends))]
        to = self._rank_of[action.peer]
        watcher = watching.current()
        start = 0.0 if watcher is None else watcher.now()
        try:
            self.pending_sends[action] = [self._axis.send(x, to) for x in tensors]
        except Exception as error:  # a rank that has ended takes no more
            raise CommError(f"stage {action.peer} (pipeline rank {to}) never took it: {error}") from error
        if watcher is not None:
            watcher.send(action, tensors, start)

    def receive(self, action: Action, tensors: Sequence[CrossingTensor], device: torch.device) -> None:
        """Begin a receive of the schedule, of tensors with the shapes and dtypes of these tensors. Raises CommError as `wait_for` does."""
        source = self._rank_of[action.peer]
        kind = Kind.FORWARD if action.kind is Kind.RECEIVE_FORWARD else Kind.BACKWARD
        delivery = Delivery(kind, action.stage, action.peer, action.microbatch)
        try:
            self._inbox[delivery] = [self._axis.receive(source, tensor.shape, tensor.dtype, device) for tensor in tensors]
        except Exception as error:  # a rank that has ended sends no more
            raise self._never_came(delivery, error) from error

    def wait_for(self, delivery: Delivery) -> list[Tensor]:
        """Wait for the tensors of a delivery and return them. Raises CommError when they don't arrive."""
        if delivery in self._local:
            return self._local.pop(delivery)
        try:
            tensors = [message.wait() for message in self._inbox.pop(delivery)]
        except Exception as error:
            raise self._never_came(delivery, error) from error
        if (watcher := watching.current()) is not None:
            kind = Kind.SEND_FORWARD if delivery.kind is Kind.FORWARD else Kind.SEND_BACKWARD
            watcher.arrive(Action(delivery.peer, kind, delivery.microbatch, delivery.stage))
        return tensors

    def _never_came(self, delivery: Delivery, error: Exception) -> CommError:
        what = "values" if delivery.kind is Kind.FORWARD else "gradients"
        return CommError(f"the {what} of stage {delivery.peer} (pipeline rank {self._rank_of[delivery.peer]}) never came: {error}")

    def release_sends(self, awaited: AwaitedPass) -> None:
        """The messages of a pass have arrived: release the sends that are known to be done with that."""
        for send in self._finished_sends.get(awaited, ()):
            for message in self.pending_sends.pop(send, ()):
                message.wait()
