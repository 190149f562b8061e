"""Runs one rank's list of a schedule: stages forward and backward over micro-batches, messages between groups of ranks.

Comes in: the programs of the rank's stages, the tensors that stand for parameters, buffers and inputs, and the pipeline axis. Goes out:
outputs joined over micro-batches; gradients are left in the leaves. The rules are those of `autopar.schedules`: sends never wait, a
receive only begins, a computing action waits for what it needs. Whatever fails is raised as a PipelineError that names the stage, the
action and the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from autopar.errors import AutoparError, CommError, PipelineError
from autopar.ir import MICROBATCH, PIPELINE, StateKind
from autopar.ops import Axis, Deferred, Message, MicrobatchAxis, comm, deferring, join_parts, regather, rng, take_part
from autopar.rewrite import PipelineProgram, StageOutput, StageProgram
from autopar.schedules import SENDS, Action, Kind, Schedule

Key = tuple[int, int]
"""A stage and a micro-batch."""


@dataclass(frozen=True, slots=True)
class StageTensors:
    """What a stage computes with: leaves for its parameters, its buffers, and all inputs, in the order of the program's slots."""

    parameters: Sequence[Tensor]
    buffers: Sequence[Tensor]
    inputs: Sequence[Tensor]


@dataclass(slots=True)
class _Flow:
    """A micro-batch on its way through a stage.

    Attributes:
        received: what came in, per stage that it came from.
        going: what is still to be sent, per stage on another rank. Nothing else of the results is held: the backward needs their place in
            the graph, not their values.
        ends: results that need a gradient, by number -> that place.
    """

    received: dict[int, list[Tensor]]
    going: dict[int, list[Tensor]]
    ends: dict[int, GradientEdge] = field(default_factory=dict)


class Step(NamedTuple):
    """A forward, or a backward (of inputs at least), of a stage and a micro-batch."""

    is_forward: bool
    stage: int
    microbatch: int


Taken = Mapping[Step, tuple[Action, ...]]
"""Per step of a group: its sends that have been taken once the messages that the step waits for have come."""


def find_taken(schedule: Schedule, group: int) -> Taken:
    """Which sends of a group are known to be over, and when: a rank that sends has used what it waited for before.

    A send over gloo can't be asked whether it is over, only be waited for, and keeps its tensor until then. Waiting where it is known
    to be over takes no time. What no message follows (the last gradients) isn't known of before the end.
    """
    found: dict[Step, tuple[Action, ...]] = {}
    sends: dict[Step, list[Action]] = {}
    for action in schedule.actions[group]:
        if action.kind in SENDS:
            sends.setdefault(Step(action.kind is Kind.SEND_FORWARD, action.peer, action.microbatch), []).append(action)
    for rank, actions in enumerate(schedule.actions):
        used: list[Action] = []
        for action in actions if rank != group else ():
            if action.kind in (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT):
                used += sends.get(Step(action.kind is Kind.FORWARD, action.stage, action.microbatch), ())
            elif action.kind in SENDS and schedule.rank_of[action.peer] == group and used:
                step = Step(action.kind is Kind.SEND_FORWARD, action.peer, action.microbatch)
                found[step] = (*found.get(step, ()), *used)
                used = []
    return found


class Executor:
    """One run of a schedule on one rank.

    Args:
        pipeline: the stages and their schedules.
        schedule: which of them to run.
        group: this rank's group along the pipeline.
        axis: the pipeline's axis; None with one group.
        axes: the axes of the mesh.
        tensors: per stage of this rank what it computes with.
        seeds: gradients of outputs, by position: this rank's part, for the whole batch. What is absent gets none.
        number: seeds the random ops; the same on all ranks.
        regathers: gathered parameters are gathered again in the backward instead of kept.
        reduce: called with a stage when its gradients are complete on this rank.
        taken: what `find_taken` says of this schedule and group; without it, sends that can't tell when they are done last to the end.
    """

    def __init__(
        self,
        pipeline: PipelineProgram,
        schedule: Schedule,
        group: int,
        axis: Axis | None,
        axes: Mapping[str, Axis],
        tensors: Mapping[int, StageTensors],
        *,
        seeds: Mapping[int, Tensor] | None = None,
        number: int = 0,
        regathers: bool = False,
        reduce: Callable[[int], None] | None = None,
        taken: Taken | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.schedule = schedule
        self.actions = schedule.actions[group]
        self.group = group
        self.axis = axis or comm.alone(PIPELINE)
        self.axes = axes
        self.tensors = tensors
        self.seeds = dict(seeds or {})
        self.number = number
        self.regathers = regathers
        self.reduce = reduce or (lambda stage: None)
        self.trains = schedule.has_backward
        self.count = schedule.microbatches
        self.parts: dict[int, dict[int, Tensor]] = {}
        self._times = [{**axes, MICROBATCH: MicrobatchAxis(MICROBATCH, self.count, i)} for i in range(self.count)]
        self._wholes: dict[int, tuple[Tensor, ...]] = {}
        self._flows: dict[Key, _Flow] = {}
        self._coming: dict[tuple[Kind, int, int, int], list[Message]] = {}  # kind, stage, peer, micro-batch
        self._here: dict[tuple[Kind, int, int, int], list[Tensor]] = {}  # the same, from a stage of this rank
        self._going: dict[Action, list[Message]] = {}
        self._taken = taken or {}
        self._left: dict[Key, Deferred] = {}

    def run(self, actions: Sequence[Action] | None = None) -> None:
        """Run these actions (all of this rank's), one after the other, and wait for what was sent. Raises PipelineError."""
        for action in self.actions if actions is None else actions:
            try:
                self._act(action)
            except Exception as error:
                raise self._explain(action, error) from error
        for action, messages in self._going.items():
            try:
                for message in messages:
                    message.wait()
            except Exception as error:
                lost = CommError(f"stage {action.peer} (group {self.schedule.rank_of[action.peer]}) never took it: {error}")
                raise self._explain(action, lost) from error
        self._going.clear()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is held any more: every forward had its backward, every message was used."""
        return not (self._flows and self.trains) and not self._coming and not self._here and not self._left

    def join(self, position: int) -> Tensor:
        """This rank's part of an output of the whole batch, made of those of the micro-batches, which are let go."""
        state = next(out.state for stage in self.tensors for out in self.pipeline.stages[stage].outputs if out.position == position)
        made = self.parts.pop(position)
        parts = [made[i] for i in range(self.count)]
        if state.kind is StateKind.SHARD:
            return join_parts(parts, state.dim, state.outer)
        if state.kind is StateKind.PARTIAL:
            total = parts[0].clone()
            for part in parts[1:]:
                total += part
            return total
        return parts[0]

    def close(self) -> None:
        """Let go of what the stages compute with, when nothing is left to run: a loss that is kept for a log keeps its executor."""
        self.tensors, self._wholes = {}, {}

    # --- actions ---

    def _act(self, action: Action) -> None:
        getattr(self, _ACTS[action.kind])(action)

    def _forward(self, action: Action) -> None:
        program, tensors = self.pipeline.stages[action.stage], self.tensors[action.stage]
        received: dict[int, list[Tensor]] = {}
        for peer, boundaries in sorted(program.receives.items()):
            values = self._arrived(Kind.FORWARD, action.stage, peer, action.microbatch)
            received[peer] = [
                x.requires_grad_() if self.trains and boundary.requires_grad else x for x, boundary in zip(values, boundaries, strict=True)
            ]
        self._let_go(Step(True, action.stage, action.microbatch))
        wholes = self._find_wholes(action.stage, program, tensors)
        flat = [x for peer in sorted(received) for x in received[peer]]
        with comm.active(self._times[action.microbatch]), self._draws(action), self._keeps(), torch.set_grad_enabled(self.trains):
            results = list(program.module(*tensors.parameters, *tensors.buffers, *tensors.inputs, *wholes, *flat))
        for out in program.outputs:
            self.parts.setdefault(out.position, {})[action.microbatch] = results[out.result].detach()
        flow = _Flow(received if self.trains else {}, {})
        for consumer, sent in program.sends.items():
            values = [results[index].detach() for index, _ in sent]
            if self.schedule.rank_of[consumer] == self.group:
                self._here[Kind.FORWARD, consumer, action.stage, action.microbatch] = values
            else:
                flow.going[consumer] = values
        if self.trains:
            ends = {out.result for out in program.outputs}.union(index for sent in program.sends.values() for index, _ in sent)
            flow.ends = {index: get_gradient_edge(results[index]) for index in sorted(ends) if results[index].requires_grad}
        if self.trains or flow.going:
            self._flows[action.stage, action.microbatch] = flow

    def _find_wholes(self, stage: int, program: StageProgram, tensors: StageTensors) -> tuple[Tensor, ...]:
        if program.prologue is None:
            return ()
        if stage not in self._wholes:
            with comm.active(self.axes), torch.no_grad():
                self._wholes[stage] = program.prologue(*tensors.buffers, *tensors.inputs)
        return self._wholes[stage]

    def _draws(self, action: Action) -> AbstractContextManager[None]:
        if not self.pipeline.random:
            return nullcontext()
        return rng.isolated(rng.derive(self.number, action.stage))

    def _keeps(self) -> AbstractContextManager[None]:
        return regather() if self.regathers and self.trains else nullcontext()

    def _seed(self, out: StageOutput, microbatch: int) -> Tensor:
        """A micro-batch's part of the gradient of an output."""
        seed, state = self.seeds[out.position], out.state
        if state.kind is StateKind.SHARD:
            return take_part(seed, state.dim, state.outer, microbatch, self.count)
        # An output that every micro-batch makes whole counts once.
        return torch.zeros_like(seed) if state.kind is StateKind.REPLICATE and microbatch else seed

    def _backward(self, action: Action) -> None:
        flow = self._flows.pop((action.stage, action.microbatch))
        program = self.pipeline.stages[action.stage]
        gradients: dict[int, Tensor] = {}
        for out in program.outputs:
            if out.position in self.seeds and out.result in flow.ends:
                _add(gradients, out.result, self._seed(out, action.microbatch))
        for consumer, sent in sorted(program.sends.items()):
            wanted = [index for index, boundary in sent if boundary.requires_grad]
            if wanted:
                arrived = self._arrived(Kind.BACKWARD, action.stage, consumer, action.microbatch)
                for index, gradient in zip(wanted, arrived, strict=True):
                    _add(gradients, index, gradient)
        self._let_go(Step(False, action.stage, action.microbatch))
        if gradients:
            with comm.active(self._times[action.microbatch]):
                torch.autograd.backward([flow.ends[index] for index in gradients], [*gradients.values()])
        for peer, values in flow.received.items():
            back = [x.grad if x.grad is not None else torch.zeros_like(x) for x in values if x.requires_grad]
            if back:
                self._here[Kind.BACKWARD, peer, action.stage, action.microbatch] = back

    def _input(self, action: Action) -> None:
        with deferring() as left:
            self._backward(action)
        self._left[action.stage, action.microbatch] = left

    def _weight(self, action: Action) -> None:
        with comm.active(self._times[action.microbatch]):
            self._left.pop((action.stage, action.microbatch)).run()

    def _reduce(self, action: Action) -> None:
        self.reduce(action.stage)

    # --- messages ---

    def _send_forward(self, action: Action) -> None:
        flow = self._flows[action.stage, action.microbatch]
        self._send(action, flow.going.pop(action.peer))
        if not self.trains and not flow.going:
            del self._flows[action.stage, action.microbatch]

    def _send_backward(self, action: Action) -> None:
        self._send(action, self._here.pop((Kind.BACKWARD, action.peer, action.stage, action.microbatch)))

    def _send(self, action: Action, tensors: Sequence[Tensor]) -> None:
        while self._going and all(message.is_done() for message in next(iter(self._going.values()))):
            del self._going[next(iter(self._going))]
        to = self.schedule.rank_of[action.peer]
        self._going[action] = [self.axis.send(x, to) for x in tensors]

    def _let_go(self, step: Step) -> None:
        """The messages of a step have come: forget what was taken before they were sent."""
        for send in self._taken.get(step, ()):
            for message in self._going.pop(send, ()):
                message.wait()

    def _receive(self, action: Action) -> None:
        """Begin to receive: values from a stage before, or gradients from one after, in the shapes in which they were sent there."""
        source = self.schedule.rank_of[action.peer]
        device = self._device(action.stage)
        program = self.pipeline.stages[action.stage]
        if action.kind is Kind.RECEIVE_FORWARD:
            kind, boundaries = Kind.FORWARD, program.receives[action.peer]
        else:
            kind, boundaries = Kind.BACKWARD, tuple(boundary for _, boundary in program.sends[action.peer] if boundary.requires_grad)
        messages = [self.axis.receive(source, boundary.shape, boundary.dtype, device) for boundary in boundaries]
        self._coming[kind, action.stage, action.peer, action.microbatch] = messages

    def _arrived(self, kind: Kind, stage: int, peer: int, microbatch: int) -> list[Tensor]:
        key = (kind, stage, peer, microbatch)
        if key in self._here:
            return self._here.pop(key)
        try:
            return [message.wait() for message in self._coming.pop(key)]
        except Exception as error:
            what = "values" if kind is Kind.FORWARD else "gradients"
            raise CommError(f"the {what} of stage {peer} (group {self.schedule.rank_of[peer]}) never came: {error}") from error

    def _device(self, stage: int) -> torch.device:
        tensors = self.tensors[stage]
        return next((x.device for x in (*tensors.parameters, *tensors.buffers, *tensors.inputs)), torch.device("cpu"))

    def _explain(self, action: Action, error: Exception) -> AutoparError:
        words = {
            Kind.FORWARD: "forward",
            Kind.BACKWARD: "backward",
            Kind.INPUT: "backward of inputs",
            Kind.WEIGHT: "backward of weights",
            Kind.SEND_FORWARD: "send",
            Kind.SEND_BACKWARD: "send of gradients",
            Kind.RECEIVE_FORWARD: "receive",
            Kind.RECEIVE_BACKWARD: "receive of gradients",
            Kind.REDUCE: "sum of gradients",
        }
        return PipelineError(
            f"stage {action.stage} of {self.schedule.stages}, {words[action.kind]} of micro-batch {action.microbatch} ({action}, group "
            f"{self.group} of the pipeline): {type(error).__name__}: {error}{OUT_OF_MEMORY if _is_out_of_memory(error) else ''}"
        )


# By name: bound methods kept by an executor would keep it, and all its tensors, until the garbage collector comes by.
_ACTS = {
    Kind.FORWARD: "_forward",
    Kind.BACKWARD: "_backward",
    Kind.INPUT: "_input",
    Kind.WEIGHT: "_weight",
    Kind.SEND_FORWARD: "_send_forward",
    Kind.RECEIVE_FORWARD: "_receive",
    Kind.SEND_BACKWARD: "_send_backward",
    Kind.RECEIVE_BACKWARD: "_receive",
    Kind.REDUCE: "_reduce",
}


OUT_OF_MEMORY = (
    ". Use more micro-batches, a schedule that holds fewer of them at once (1f1b instead of gpipe, v-half), recompute='full' or more groups"
)


def _is_out_of_memory(error: Exception) -> bool:
    # For memory of the host torch has no error of its own.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _add(gradients: dict[int, Tensor], index: int, gradient: Tensor) -> None:
    gradients[index] = gradients[index] + gradient if index in gradients else gradient
