"""Records what this rank does in a real step, in the form in which a plan's step is predicted.

Comes in: passes of the executor, calls of a program, backwards, collectives, messages, steps of optimizers, as they run. Goes out: a
`RankRecord`. Where nothing is recorded, an action of a schedule costs one look at a variable more, and a collective nothing: the methods of
its axis are others only while something is recorded.

Times are those of this process's clock. All ranks meet some times before the first is taken, from which it is known how far their clocks
are apart (`autopar.timelines.recorded.align`), to about what such a meeting takes: some hundred microseconds. On a GPU the host waits for
the device at both ends of whatever is timed, so that a recorded step is slower than others, and what runs beside computing isn't seen.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from autopar import torch_compat
from autopar.ops import GroupAxis, Message
from autopar.plans import Phase, Purpose
from autopar.replaced import replaced
from autopar.runtime.watching import current, watched_by
from autopar.schedules import COMPUTING, SENDS, Action, Kind
from autopar.timelines import COMMUNICATION, COMPUTE, MEETINGS, Event, RankRecord, Sample, Sent

ROUNDS = 8
"""How often all ranks meet to compare their clocks."""
_STATM = Path("/proc/self/statm")
_WHOLE_BACKWARD = "backward"

_PHASES = {
    Kind.FORWARD: Phase.FORWARD.value,
    Kind.BACKWARD: _WHOLE_BACKWARD,
    Kind.BACKWARD_INPUT: Phase.BACKWARD_INPUT.value,
    Kind.BACKWARD_WEIGHT: Phase.BACKWARD_WEIGHT.value,
    Kind.REDUCE: Phase.STEP.value,
}


class Recorder:
    """What this rank does from now on.

    Args:
        device: on which the model computes.
        meet: where all ranks meet.
    """

    def __init__(self, device: torch.device, meet: Callable[[], object]) -> None:
        self._device = device
        self._events: list[Event] = []
        self._sent: list[Sent] = []
        self._arrived: list[tuple[str, float]] = []
        self._memory: list[Sample] = []
        self._pass: tuple[str, int | None, int | None] = (Phase.STEP, None, None)
        self._pass_start = 0.0
        self._backward_start: float | None = None
        self._is_in_collective = False
        self._zero = time.perf_counter()
        self._meetings = []
        for _ in range(ROUNDS):
            came = self.now()
            meet()
            self._meetings.append((came, self.now()))

    def now(self) -> float:
        """Seconds since the recorder was made, when the device has done what it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - self._zero

    def record(self, rank: int, pipeline_rank: int, width: int, axes: Collection[str]) -> RankRecord:
        """All that was recorded, of rank `rank` in pipeline rank `pipeline_rank`, which has `width` ranks and a mesh of these axes."""
        events = tuple(
            replace(event, rank=rank, thread=MEETINGS if event.axis and event.axis not in axes else event.thread) for event in self._events
        )
        memory = tuple(replace(sample, rank=rank) for sample in self._memory)
        meetings = tuple(self._meetings)
        return RankRecord(rank, pipeline_rank, width, events, tuple(self._sent), tuple(self._arrived), memory, meetings)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, collectives, messages, actions and optimizers are recorded."""
        self._memory += _read_memory(self._device, self.now())
        with ExitStack() as stack:
            for name in _COLLECTIVES:
                stack.enter_context(replaced(GroupAxis, name, _noting(self, name, getattr(GroupAxis, name))))
            for hook in (
                register_optimizer_step_pre_hook(lambda *_: self.begin_step()),
                register_optimizer_step_post_hook(lambda *_: self.add_pass("optimizer", Phase.STEP, Purpose.OPTIMIZER)),
            ):
                stack.callback(hook.remove)
            stack.enter_context(watched_by(self))
            yield

    # --- schedules ---

    @contextmanager
    def action(self, action: Action) -> Iterator[None]:
        """Inside, an action of a schedule runs. What it waits for before it computes isn't counted, see `arrive`."""
        if action.kind not in COMPUTING and action.kind is not Kind.REDUCE:
            yield  # receives only begin; sends are noted where it is known what is sent
            return
        phase = _PHASES[action.kind]
        with self._running_pass(phase, action.stage, None if action.kind is Kind.REDUCE else action.microbatch):
            yield
        is_reduce = action.kind is Kind.REDUCE
        name = f"{action.kind.value}{'' if is_reduce else action.microbatch}"
        purpose = Purpose.GRADIENTS if is_reduce else Purpose.COMPUTE
        self.add_pass(name, phase, purpose, action.stage, None if is_reduce else action.microbatch)

    def arrive(self, send: Action) -> None:
        """Note that the message of this send is there: the action that waited for it starts now."""
        now = self.now()
        self._arrived.append((str(send), now))
        self._pass_start = now

    def send(self, action: Action, tensors: Sequence[Tensor], start: float) -> None:
        """Note that a send began at `start` and keeps this rank no longer."""
        assert action.kind in SENDS
        self._sent.append(Sent(str(action), start, self.now() - start, sum(x.nbytes for x in tensors)))

    # --- programs without a schedule ---

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Inside, the forward of a whole program runs."""
        with self._running_pass(Phase.FORWARD, None, None):
            yield
        self.add_pass("forward", Phase.FORWARD, Purpose.COMPUTE)

    def watch_backward(self, results: Sequence[Any]) -> None:
        """Record the backward that comes through any of these results."""
        for x in results:
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(lambda _: self._begin_backward())  # type: ignore[no-untyped-call]

    def _begin_backward(self) -> None:
        if self._backward_start is None and current() is self:
            self._backward_start = self.now()
            self._pass = (_WHOLE_BACKWARD, None, None)
            torch_compat.after_backward(self._end_backward)

    def _end_backward(self) -> None:
        assert self._backward_start is not None
        self._pass_start, self._backward_start = self._backward_start, None
        self._pass = (Phase.STEP, None, None)
        self.add_pass("backward", _WHOLE_BACKWARD, Purpose.COMPUTE)

    # --- all ---

    def begin_step(self) -> None:
        """Note that a step of an optimizer begins."""
        self._pass_start = self.now()

    @contextmanager
    def _running_pass(self, phase: str, stage: int | None, microbatch: int | None) -> Iterator[None]:
        self._pass, before = (phase, stage, microbatch), self._pass
        self._pass_start = self.now()
        try:
            yield
        finally:
            self._pass = before

    def add_pass(self, name: str, phase: str, purpose: str, stage: int | None = None, microbatch: int | None = None) -> None:
        """Note that what began last has ended."""
        end = self.now()
        self._events.append(Event(0, COMPUTE, name, phase, purpose, self._pass_start, end - self._pass_start, stage, microbatch))
        self._memory += _read_memory(self._device, end)

    @contextmanager
    def collective(self, axis: GroupAxis, collective: str, nbytes: int) -> Iterator[None]:
        """Inside, this rank waits for a collective; of those inside of another one, the outer counts."""
        if self._is_in_collective or current() is not self:
            yield
            return
        self._is_in_collective = True
        start = self.now()
        try:
            yield
        finally:
            self._is_in_collective = False
            phase, stage, microbatch = self._pass
            # What the tensor is isn't known here.
            purpose = Purpose.GRADIENTS if phase == Phase.STEP else "communication"
            details = (stage, microbatch, "", axis.name, collective, nbytes)
            self._events.append(Event(0, COMMUNICATION, f"{collective} {axis.name}", phase, purpose, start, self.now() - start, *details))


_COLLECTIVES = {
    "begin_all_reduce": "all_reduce",
    "begin_gather_stack": "all_gather",
    "begin_reduce_stack": "reduce_scatter",
    "begin_exchange_stack": "all_to_all",
    "all_reduce": "all_reduce",
    "exchange_pieces": "halo",
}


def _read_memory(device: torch.device, now: float) -> list[Sample]:
    """Bytes that a device holds for this process: resident memory on a CPU, where it is known, and what torch has allocated on a GPU."""
    if device.type == "cuda":
        return [Sample(0, now, torch.cuda.memory_allocated(device))]
    if not _STATM.exists():
        return []
    pages = int(_STATM.read_text(encoding="ascii").split()[1])
    return [Sample(0, now, pages * os.sysconf("SC_PAGE_SIZE"))]


def _noting(recorder: Recorder, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of `GroupAxis` that also records when this rank waits in it, or for the message that it returns."""
    collective = _COLLECTIVES[name]

    def noting(axis: GroupAxis, x: Tensor | Mapping[int, Tensor], *args: Any, **kwargs: Any) -> Any:
        # As in a plan, the larger of a rank's parts before and after it; what it sends of a halo.
        nbytes = x.nbytes * (axis.size if collective == "all_gather" else 1) if isinstance(x, Tensor) else sum(y.nbytes for y in x.values())
        with recorder.collective(axis, collective, nbytes):
            result = method(axis, x, *args, **kwargs)
        return _NotedMessage(recorder, result, axis, collective) if name.startswith("begin") else result

    return noting


class _NotedMessage:
    """A collective that was begun, whose wait is recorded; its bytes have been counted when it began."""

    def __init__(self, recorder: Recorder, message: Message, axis: GroupAxis, collective: str) -> None:
        self._recorder, self._message, self._noted = recorder, message, (axis, collective, 0)

    def is_done(self) -> bool:
        return self._message.is_done()

    def wait(self) -> Tensor:
        with self._recorder.collective(*self._noted):
            return self._message.wait()
