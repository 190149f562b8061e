"""Runs one rank's list of a schedule: passes of its stages for micro-batches, and messages to and from other pipeline ranks.

Comes in: the programs of the rank's stages, the tensors that stand for parameters, buffers and inputs, and the pipeline's axis. Goes out:
outputs joined over micro-batches; gradients are in the ``grad`` of the leaves. The one idea: the executor decides nothing, it runs the
list. A send never waits, a receive only begins, a computing action waits for what it needs. Whatever fails is raised as a PipelineError
that names the stage, the action and the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from autopar.errors import AutoparError, CommError, PipelineError
from autopar.ir import MICROBATCH, PIPELINE, State, StateKind
from autopar.ops import Axis, Deferred, MicrobatchAxis, comm, deferring, join_parts, regather, rng, take_part
from autopar.rewrite import PipelineProgram, StageProgram
from autopar.runtime import watching
from autopar.runtime.mailbox import AwaitedPass, Delivery, FinishedSends, Mailbox
from autopar.schedules import COMPUTING, Action, Kind, Schedule

StageMicrobatch = tuple[int, int]
"""A stage and a micro-batch."""


@dataclass(frozen=True, slots=True)
class StageTensors:
    """What a stage computes with: leaves for its parameters, its buffers, and all inputs, in the order of the program's slots."""

    parameters: Sequence[Tensor]
    buffers: Sequence[Tensor]
    inputs: Sequence[Tensor]


@dataclass(slots=True)
class _InStage:
    """A micro-batch between its forward and its backward on a stage.

    Attributes:
        received: stage that values came from -> those values.
        outbox: stage on another rank -> values that aren't sent yet. No other results are held: the backward needs their place in
            autograd's graph, not their values.
        edges: index of a result that needs a gradient -> its place in autograd's graph.
    """

    received: dict[int, list[Tensor]]
    outbox: dict[int, list[Tensor]]
    edges: dict[int, GradientEdge] = field(default_factory=dict)


class Executor:
    """One run of a schedule on one rank.

    Args:
        pipeline: the stages and their schedules.
        schedule: which of the schedules to run.
        pipeline_rank: this rank's position along the pipeline.
        axis: the pipeline's axis; None with one pipeline rank.
        axes: the axes of the mesh that every pipeline rank runs.
        tensors: stage of this rank -> what it computes with.
        output_gradients: position of an output -> this rank's part of its gradient, of the whole batch. Other outputs get none.
        random_seed: seeds the random ops; the same on all ranks.
        regathers: gathered parameters aren't saved for the backward, which gathers them again.
        ahead: how many blocks ahead the backward begins these gathers.
        settle: called before every action that computes.
        scatter: called with a stage after each backward of it that computes weight gradients.
        reduce: called with a stage when its gradients are complete on this rank.
        finished_sends: what `find_finished_sends` says of this schedule and rank, see `Mailbox`.
    """

    def __init__(
        self,
        pipeline: PipelineProgram,
        schedule: Schedule,
        pipeline_rank: int,
        axis: Axis | None,
        axes: Mapping[str, Axis],
        tensors: Mapping[int, StageTensors],
        *,
        output_gradients: Mapping[int, Tensor] | None = None,
        random_seed: int = 0,
        regathers: bool = False,
        ahead: int = 0,
        settle: Callable[[], None] | None = None,
        scatter: Callable[[int], None] | None = None,
        reduce: Callable[[int], None] | None = None,
        finished_sends: FinishedSends | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.schedule = schedule
        self.actions = schedule.actions[pipeline_rank]
        self.pipeline_rank = pipeline_rank
        self.axes = axes
        self.tensors = tensors
        self.output_gradients = dict(output_gradients or {})
        self.random_seed = random_seed
        self.settle = settle or (lambda: None)
        self.scatter = scatter or (lambda stage: None)
        self.reduce = reduce or (lambda stage: None)
        self.trains = schedule.has_backward
        self.regathers, self.ahead = regathers and self.trains, ahead
        self.microbatches = schedule.microbatches
        self.mailbox = Mailbox(axis or comm.alone(PIPELINE), schedule, pipeline_rank, finished_sends)
        self.output_parts: dict[int, dict[int, Tensor]] = {}  # position of an output -> micro-batch -> its part
        self._microbatch_axes = [
            {**axes, MICROBATCH: MicrobatchAxis(MICROBATCH, self.microbatches, index)} for index in range(self.microbatches)
        ]
        self._whole_values: dict[int, tuple[Tensor, ...]] = {}
        self._in_stages: dict[StageMicrobatch, _InStage] = {}
        self._deferred: dict[StageMicrobatch, Deferred] = {}

    def run(self, actions: Sequence[Action] | None = None) -> None:
        """Run these actions (all of this rank's), one after the other, and wait for what was sent. Raises PipelineError."""
        watcher = watching.current()
        for action in self.actions if actions is None else actions:
            try:
                with nullcontext() if watcher is None else watcher.action(action):
                    self._run_action(action)
            except Exception as error:
                raise _explain(self.schedule, self.pipeline_rank, action, error) from error
        for action, messages in self.mailbox.pending_sends.items():
            try:
                for message in messages:
                    message.wait()
            except Exception as error:
                lost = CommError(f"stage {action.peer} (pipeline rank {self.schedule.rank_of[action.peer]}) never took it: {error}")
                raise _explain(self.schedule, self.pipeline_rank, action, lost) from error
        self.mailbox.pending_sends.clear()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in flight: every forward had its backward, every message was used."""
        return not (self._in_stages and self.trains) and self.mailbox.is_empty and not self._deferred

    def join(self, position: int) -> Tensor:
        """This rank's part of an output of the whole batch, joined from those of the micro-batches, which are released."""
        state = next(out.state for stage in self.tensors for out in self.pipeline.stages[stage].outputs if out.position == position)
        by_microbatch = self.output_parts.pop(position)
        parts = [by_microbatch[index] for index in range(self.microbatches)]
        if state.kind is StateKind.SHARD:
            return join_parts(parts, state.dim, state.outer)
        if state.kind is StateKind.PARTIAL:
            total = parts[0].clone()
            for part in parts[1:]:
                total += part
            return total
        return parts[0]

    def close(self) -> None:
        """Release what the stages compute with, when nothing more is run: a loss that the user stores for a log holds its executor."""
        self.tensors, self._whole_values = {}, {}

    # --- actions ---

    def _run_action(self, action: Action) -> None:
        if action.kind in COMPUTING:
            self.settle()
        getattr(self, _METHODS[action.kind])(action)

    def _forward(self, action: Action) -> None:
        program, tensors = self.pipeline.stages[action.stage], self.tensors[action.stage]
        received: dict[int, list[Tensor]] = {}
        for peer, crossing in sorted(program.receives.items()):
            values = self.mailbox.wait_for(Delivery(Kind.FORWARD, action.stage, peer, action.microbatch))
            received[peer] = [
                x.requires_grad_() if self.trains and tensor.requires_grad else x for x, tensor in zip(values, crossing, strict=True)
            ]
        self.mailbox.release_sends(AwaitedPass(True, action.stage, action.microbatch))
        whole_values = self._find_whole_values(action.stage, program, tensors)
        received_values = [x for peer in sorted(received) for x in received[peer]]
        with (
            comm.active(self._microbatch_axes[action.microbatch]),
            _random_streams(self.random_seed, action.stage) if self.pipeline.random else nullcontext(),
            regather(self.ahead) if self.regathers else nullcontext(),
            torch.set_grad_enabled(self.trains),
        ):
            results = list(program.module(*tensors.parameters, *tensors.buffers, *tensors.inputs, *whole_values, *received_values))
        for out in program.outputs:
            self.output_parts.setdefault(out.position, {})[action.microbatch] = results[out.result].detach()
        in_stage = _InStage(received if self.trains else {}, {})
        for consumer, sent in program.sends.items():
            values = [results[index].detach() for index, _ in sent]
            if self.mailbox.is_local(consumer):
                self.mailbox.put(Delivery(Kind.FORWARD, consumer, action.stage, action.microbatch), values)
            else:
                in_stage.outbox[consumer] = values
        if self.trains:
            leaving = {out.result for out in program.outputs}.union(index for sent in program.sends.values() for index, _ in sent)
            in_stage.edges = {index: get_gradient_edge(results[index]) for index in sorted(leaving) if results[index].requires_grad}
        if self.trains or in_stage.outbox:
            self._in_stages[action.stage, action.microbatch] = in_stage

    def _find_whole_values(self, stage: int, program: StageProgram, tensors: StageTensors) -> tuple[Tensor, ...]:
        """The values that a stage computes once per step from the whole batch, before its first micro-batch."""
        if program.prologue is None:
            return ()
        if stage not in self._whole_values:
            with comm.active(self.axes), torch.no_grad():
                self._whole_values[stage] = program.prologue(*tensors.buffers, *tensors.inputs)
        return self._whole_values[stage]

    def _backward(self, action: Action) -> None:
        self._pass_back(action)
        self.scatter(action.stage)

    def _pass_back(self, action: Action) -> None:
        in_stage = self._in_stages.pop((action.stage, action.microbatch))
        program = self.pipeline.stages[action.stage]
        gradients: dict[int, Tensor] = {}
        for out in program.outputs:
            if out.position in self.output_gradients and out.result in in_stage.edges:
                gradient = _cut_gradient(self.output_gradients[out.position], out.state, action.microbatch, self.microbatches)
                _add(gradients, out.result, gradient)
        for consumer, sent in sorted(program.sends.items()):
            differentiable = [index for index, tensor in sent if tensor.requires_grad]
            if differentiable:
                received = self.mailbox.wait_for(Delivery(Kind.BACKWARD, action.stage, consumer, action.microbatch))
                for index, gradient in zip(differentiable, received, strict=True):
                    _add(gradients, index, gradient)
        self.mailbox.release_sends(AwaitedPass(False, action.stage, action.microbatch))
        if gradients:
            with comm.active(self._microbatch_axes[action.microbatch]):
                torch.autograd.backward([in_stage.edges[index] for index in gradients], [*gradients.values()])
        for peer, values in in_stage.received.items():
            input_gradients = [x.grad if x.grad is not None else torch.zeros_like(x) for x in values if x.requires_grad]
            if input_gradients:
                self.mailbox.put(Delivery(Kind.BACKWARD, peer, action.stage, action.microbatch), input_gradients)

    def _input(self, action: Action) -> None:
        with deferring() as deferred:
            self._pass_back(action)
        self._deferred[action.stage, action.microbatch] = deferred

    def _weight(self, action: Action) -> None:
        with comm.active(self._microbatch_axes[action.microbatch]):
            self._deferred.pop((action.stage, action.microbatch)).run()
        self.scatter(action.stage)

    def _reduce(self, action: Action) -> None:
        self.reduce(action.stage)

    def _send_forward(self, action: Action) -> None:
        in_stage = self._in_stages[action.stage, action.microbatch]
        self.mailbox.send(action, in_stage.outbox.pop(action.peer))
        if not self.trains and not in_stage.outbox:
            del self._in_stages[action.stage, action.microbatch]

    def _send_backward(self, action: Action) -> None:
        self.mailbox.send(action, self.mailbox.pop(Delivery(Kind.BACKWARD, action.peer, action.stage, action.microbatch)))

    def _receive(self, action: Action) -> None:
        """Begin to receive: values from an earlier stage, or gradients from a later one, in the shapes in which they are sent."""
        program = self.pipeline.stages[action.stage]
        if action.kind is Kind.RECEIVE_FORWARD:
            crossing = tuple(program.receives[action.peer])
        else:
            crossing = tuple(tensor for _, tensor in program.sends[action.peer] if tensor.requires_grad)
        self.mailbox.receive(action, crossing, device_of(self.tensors[action.stage]))


# By name: bound methods stored in an executor would be a reference cycle, and all its tensors would stay until garbage is collected.
_METHODS = {
    Kind.FORWARD: "_forward",
    Kind.BACKWARD: "_backward",
    Kind.BACKWARD_INPUT: "_input",
    Kind.BACKWARD_WEIGHT: "_weight",
    Kind.SEND_FORWARD: "_send_forward",
    Kind.RECEIVE_FORWARD: "_receive",
    Kind.SEND_BACKWARD: "_send_backward",
    Kind.RECEIVE_BACKWARD: "_receive",
    Kind.REDUCE: "_reduce",
}


OUT_OF_MEMORY = (
    ". Use more micro-batches, a schedule that holds fewer of them at once (1f1b instead of gpipe, v-half), recompute='full' or more"
    " pipeline ranks"
)


def _explain(schedule: Schedule, pipeline_rank: int, action: Action, error: Exception) -> AutoparError:
    """The error to raise for one that an action of a rank met: it names the stage, the action and the micro-batch."""
    words = {
        Kind.FORWARD: "forward",
        Kind.BACKWARD: "backward",
        Kind.BACKWARD_INPUT: "backward of inputs",
        Kind.BACKWARD_WEIGHT: "backward of weights",
        Kind.SEND_FORWARD: "send",
        Kind.SEND_BACKWARD: "send of gradients",
        Kind.RECEIVE_FORWARD: "receive",
        Kind.RECEIVE_BACKWARD: "receive of gradients",
        Kind.REDUCE: "sum of gradients",
    }
    return PipelineError(
        f"stage {action.stage} of {schedule.stages}, {words[action.kind]} of micro-batch {action.microbatch} ({action}, pipeline rank "
        f"{pipeline_rank}): {type(error).__name__}: {error}{OUT_OF_MEMORY if _is_out_of_memory(error) else ''}"
    )


def _is_out_of_memory(error: Exception) -> bool:
    # For memory of the host torch has no error of its own.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def device_of(tensors: StageTensors) -> torch.device:
    """Where a stage computes."""
    return next((x.device for x in (*tensors.parameters, *tensors.buffers, *tensors.inputs)), torch.device("cpu"))


def _random_streams(random_seed: int, stage: int) -> AbstractContextManager[None]:
    """Random streams that are the same for all micro-batches of a stage, in which each draws the part of its own rows."""
    return rng.isolated(rng.derive(random_seed, stage))


def _cut_gradient(gradient: Tensor, state: State, microbatch: int, microbatches: int) -> Tensor:
    """A micro-batch's part of the gradient of an output that micro-batches make in the given state."""
    if state.kind is StateKind.SHARD:
        return take_part(gradient, state.dim, state.outer, microbatch, microbatches)
    # An output that every micro-batch makes whole counts once.
    return torch.zeros_like(gradient) if state.kind is StateKind.REPLICATE and microbatch else gradient


def _add(gradients: dict[int, Tensor], index: int, gradient: Tensor) -> None:
    gradients[index] = gradients[index] + gradient if index in gradients else gradient
