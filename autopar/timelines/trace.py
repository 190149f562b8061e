"""What happens on each rank during a step: events, messages between ranks, and memory, as plain data.

Comes in: what `predicted` reads off a plan, or what a run has recorded. Goes out: a `Trace`, which `chrome` writes as a file that trace
viewers open, and `picture` draws. Times are seconds since the start of the step.
"""

from __future__ import annotations

from dataclasses import dataclass

from autopar.ir import PIPELINE
from autopar.plans import Phase, Purpose
from autopar.schedules import Kind, parse_action

COMPUTE = "compute"
COMMUNICATION = "communication"
OVERLAPPED = "communication behind computing"
COPIES = "copies"
MESSAGES = "messages to rank {}"
MEETINGS = "meetings of ranks"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that takes time on a rank.

    Attributes:
        rank: index into `Trace.ranks`.
        thread: what the rank does it with. Events of one rank and thread don't overlap. `COMPUTE`; `COMMUNICATION`, for which computing
            waits; `OVERLAPPED`, communication while the rank computes; `COPIES` (a rank takes its part of a tensor); `MESSAGES` with the
            rank that the messages go to; `MEETINGS`, of real runs alone, where ranks wait for each other for what no plan counts, such as
            to compare what they are called with.
        name: to be shown: ``F3`` is the forward of micro-batch 3, others are a block's name, or a collective and its axis.
        phase: ``forward``, ``input gradient``, ``weight gradient``, ``backward`` (both, where they aren't told apart) or ``step``.
        purpose: as `autopar.plans.Purpose` has it: ``compute``, ``recompute``, ``optimizer``, ``activations`` and so on.
        start, seconds: when it starts, and how long it takes.
        stage: the stage that it is done for; None for what is done for none or several.
        microbatch: the micro-batch that it is done for; None for what is done once per step.
        layer: name of the group of layers, or the block's name; empty for a whole stage.
        axis, collective: of communication; empty otherwise.
        nbytes: bytes that communication moves; 0 otherwise.
    """

    rank: int
    thread: str
    name: str
    phase: str
    purpose: str
    start: float
    seconds: float
    stage: int | None = None
    microbatch: int | None = None
    layer: str = ""
    axis: str = ""
    collective: str = ""
    nbytes: float = 0.0

    @property
    def end(self) -> float:
        """When it ends."""
        return self.start + self.seconds


@dataclass(frozen=True, slots=True)
class Arrow:
    """A message from one rank to another.

    Attributes:
        name: the send, as schedules write it: ``0SF3>1`` is sent by stage 0 to stage 1 for the forward of micro-batch 3.
        source, target: ranks, as indices into `Trace.ranks`.
        sent: when its content was made.
        arrived: when it is there.
        used: when the action starts that needed it.
        nbytes: its bytes.
    """

    name: str
    source: int
    target: int
    sent: float
    arrived: float
    used: float
    nbytes: float


@dataclass(frozen=True, slots=True)
class Sample:
    """Bytes on a device of rank `rank` from `time` until the rank's next sample."""

    rank: int
    time: float
    nbytes: int


@dataclass(frozen=True, slots=True)
class Trace:
    """A step on all ranks.

    Attributes:
        title: what the trace is of.
        ranks: name of each rank; of a predicted step the pipeline ranks, since all ranks of one are alike.
        seconds: the length of the step.
        events: in no special order across ranks; per rank and thread in the order of their starts.
        arrows: messages between ranks.
        memory: samples, per rank in order of time; a rank may have none.
    """

    title: str
    ranks: tuple[str, ...]
    seconds: float
    events: tuple[Event, ...]
    arrows: tuple[Arrow, ...]
    memory: tuple[Sample, ...]

    def busy(self, rank: int) -> float:
        """Seconds in which a rank computes or waits for its collectives: the rest of the step it waits for other ranks."""
        return sum(event.seconds for event in self.events if event.rank == rank and event.thread in BUSY)

    def exchanging(self, rank: int) -> float:
        """Of the busy seconds those in which a rank waits for its collectives; in the rest it computes or copies."""
        return sum(event.seconds for event in self.events if event.rank == rank and event.thread == COMMUNICATION)

    def threads(self, rank: int) -> tuple[str, ...]:
        """The threads of a rank that have events, computing first."""
        names = dict.fromkeys(event.thread for event in self.events if event.rank == rank)
        return tuple(sorted(names, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)))


BUSY = (COMPUTE, COMMUNICATION, COPIES)
"""Threads whose events fill a rank's step, one after the other; the others run beside them."""

_ORDER = (COMPUTE, COMMUNICATION, COPIES, OVERLAPPED)


def show_message(arrow: Arrow, seconds: float) -> Event:
    """A message as an event of the rank that sends it, which takes so many seconds from when it is sent."""
    send = parse_action(arrow.name)
    return Event(
        arrow.source,
        MESSAGES.format(arrow.target),
        arrow.name,
        Phase.FORWARD if send.kind is Kind.SEND_FORWARD else Phase.BACKWARD_INPUT,
        Purpose.MESSAGES,
        arrow.sent,
        seconds,
        send.stage,
        send.microbatch,
        axis=PIPELINE,
        collective="send",
        nbytes=arrow.nbytes,
    )
