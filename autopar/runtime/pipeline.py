"""A pipeline on one rank: values of shared parameters, a run of the schedule, gradients and outputs, behind an ordinary backward.

When the model returns its loss, the whole schedule runs in the forward call, and the user's ``backward()`` hands over gradients that are
there already, scaled by what arrives. When the loss is computed outside, the forward call runs the forwards and the user's backward the
rest. Parameters that several groups use live on one of them (the owner); the others get the value before a step and send their part of
the gradient after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from autopar import torch_compat
from autopar.errors import CommError, InputError, PipelineError
from autopar.ir import local_shape
from autopar.ops import Axis, Message
from autopar.rewrite import PipelineProgram, Program, Slot
from autopar.runtime.executor import Executor, StageTensors, device_of
from autopar.runtime.failures import Alarm
from autopar.runtime.gradients import StashedGradients
from autopar.runtime.mailbox import find_finished_sends
from autopar.schedules import Kind

SECOND_BACKWARD = "this pipelined step has had its backward already: call the model again before the next backward()"
FIRST_HALF_SCALE = 2.0**16
"""What a first loss over float16 parameters, itself of a wider dtype, is taken to be scaled by: as torch's GradScaler begins."""
FORWARD_KINDS = (Kind.FORWARD, Kind.SEND_FORWARD, Kind.RECEIVE_FORWARD)


class StageRunner:
    """Runs the stages of one program on this rank.

    Args:
        program: with a pipeline.
        group: this rank's group.
        axis: the pipeline's axis; None with one group.
        axes: the axes of the mesh.
        leaves: the tensors that stand for the parameters that this group uses, by name.
        stash: keeps their gradients.
        alarm: stops the other ranks when a backward fails; what else fails is for whoever calls `run` to tell.
    """

    def __init__(
        self,
        program: Program,
        pipeline_rank: int,
        axis: Axis | None,
        axes: Mapping[str, Axis],
        leaves: Mapping[str, Tensor],
        stash: StashedGradients,
        alarm: Alarm | None = None,
    ) -> None:
        assert program.pipeline is not None
        self.program = program
        self.pipeline: PipelineProgram = program.pipeline
        self.pipeline_rank = pipeline_rank
        self.axis = axis
        self.axes = axes
        self.leaves = leaves
        self.stash = stash
        self.alarm = alarm or Alarm()
        self._shared = [slot for slot in program.parameters if len(slot.groups) > 1 and pipeline_rank in slot.groups]
        mine = {number: stage for number, stage in self.pipeline.stages.items() if self.pipeline.schedule.rank_of[number] == pipeline_rank}
        self._stages = mine
        stages = ("stages " if len(mine) > 1 else "stage ") + ", ".join(map(str, mine))
        self.where = f"{stages} (group {pipeline_rank} of the pipeline)"
        # A parameter may be summed over the ranks when the last stage of this rank that uses it is done.
        self._stages_using: dict[int, set[int]] = {}
        for number, stage in mine.items():
            for i in stage.parameters:
                if len(program.parameters[i].groups) == 1:
                    self._stages_using.setdefault(i, set()).add(number)
        self._finished_sends = (
            find_finished_sends(self.pipeline.schedule, pipeline_rank),
            find_finished_sends(self.pipeline.inference, pipeline_rank),
        )
        # What the last loss was scaled by before its backward. The backward of the next has run before that is known of it.
        halves = any(slot.dtype == "float16" for slot in program.parameters)
        loss = self.pipeline.loss
        is_scaled = halves and loss is not None and program.outputs[loss].dtype != "float16"
        self.scale = torch.tensor(FIRST_HALF_SCALE if is_scaled else 1.0)

    def run(self, buffers: Mapping[str, Tensor], inputs: Sequence[Tensor], *, random_seed: int, trains: bool, syncs: bool) -> PipelineRun:
        """Run the schedule (its forwards, when the loss is computed outside) on this rank's parts of the buffers and inputs.

        The backward begins with the scale that the last loss had: gradients of float16 would vanish without it.
        """
        if torch_compat.backward_id() != -1:
            raise InputError(
                "a model in pipeline stages can't be run inside of a backward, as torch.utils.checkpoint around it does; "
                "pin recompute='full' instead"
            )
        self._update_shared_values()
        tensors = {
            stage: StageTensors(
                [self.leaves[self.program.parameters[position].name] for position in program.parameters],
                [buffers[self.program.buffers[position].name] for position in program.buffers],
                inputs,
            )
            for stage, program in self._stages.items()
        }
        loss = self.pipeline.loss
        output_gradients = {}
        if trains and loss is not None:
            slot = self.program.outputs[loss]
            self.scale = self.scale.to(_device_of(tensors), getattr(torch, slot.dtype))
            output_gradients[loss] = self.scale.expand(slot.shape)
        done: set[int] = set()

        def reduce(stage: int) -> None:
            done.add(stage)
            if syncs:
                self.stash.start(self._ready(stage, done))

        executor = Executor(
            self.pipeline,
            self.pipeline.schedule if trains else self.pipeline.inference,
            self.pipeline_rank,
            self.axis,
            self.axes,
            tensors,
            output_gradients=output_gradients,
            random_seed=random_seed,
            regathers=self.program.regather,
            reduce=reduce,
            finished_sends=self._finished_sends[0 if trains else 1],
        )
        run = PipelineRun(self, executor, syncs)
        if trains:
            self.stash.begin()
        if trains and loss is None:
            executor.run([action for action in executor.actions if action.kind in FORWARD_KINDS])
        else:
            executor.run()
            if trains:
                run.finish()
        return run

    @contextmanager
    def step_context(self, what: str) -> Iterator[None]:
        """Say of an error inside in which stages it came, and at `what`, which is none of the schedule's actions."""
        try:
            yield
        except PipelineError:
            raise
        except Exception as error:
            raise PipelineError(f"{self.where}, {what}: {type(error).__name__}: {error}") from error

    def _ready(self, stage: int, done: set[int]) -> list[str]:
        """Parameters of a stage whose gradients are complete on this group, and on no other."""
        parameters = self.program.parameters
        return [parameters[i].name for i in self._stages[stage].parameters if i in self._stages_using and self._stages_using[i] <= done]

    def _update_shared_values(self) -> None:
        """Bring the values of shared parameters from their owners."""
        if self.axis is None:
            return
        axis = self.axis
        messages = []
        for slot in self._shared:
            leaf, owner = self.leaves[slot.name].detach(), slot.groups[0]
            with self.step_context(f"before micro-batch 0, the value of the shared parameter {slot.name} from group {owner}"):
                if owner == self.pipeline_rank:
                    messages += [axis.send(leaf, user) for user in slot.groups[1:]]
                else:
                    value = _wait(axis.receive(owner, leaf.shape, leaf.dtype, leaf.device), owner)
                    # A backward that is still to come may have saved it, and minds a write even of the same value.
                    if not torch.equal(leaf, value):
                        leaf.copy_(value)
        with self.step_context("before micro-batch 0, the values of shared parameters to other groups"):
            for message in messages:
                message.wait()

    def sum_shared_gradients(self) -> None:
        """Add the gradients of shared parameters up where their owner is."""
        if self.axis is None:
            return
        axis = self.axis
        messages = []
        for slot in self._shared:
            leaf, owner = self.leaves[slot.name], slot.groups[0]
            if owner != self.pipeline_rank and leaf.requires_grad:
                with self.step_context(f"after the last micro-batch, the gradient of the shared parameter {slot.name} to group {owner}"):
                    messages.append(axis.send(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf), owner))
                leaf.grad = None
        for slot in self._shared:
            leaf = self.leaves[slot.name]
            if slot.groups[0] == self.pipeline_rank and leaf.requires_grad:
                for user in slot.groups[1:]:
                    with self.step_context(
                        f"after the last micro-batch, the gradient of the shared parameter {slot.name} from group {user}"
                    ):
                        gradient = _wait(axis.receive(user, leaf.shape, leaf.dtype, leaf.device), user)
                        leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        with self.step_context("after the last micro-batch, the gradients of shared parameters to other groups"):
            for message in messages:
                message.wait()

    def wait_for_all_ranks(self, device: torch.device) -> None:
        """Wait until every group has come through the step, so that all of them go on to their optimizers or none."""
        if self.axis is not None:
            with self.step_context("after the last micro-batch, waiting for the other groups to end the step"):
                self.axis.all_reduce(torch.zeros(1, device=device))

    def broadcast(self, x: Tensor | None, slot: Slot, device: torch.device) -> Tensor:
        """This rank's part of an output, or of a buffer's new value, on every group: its maker passes it."""
        maker = slot.groups[0]
        if self.axis is None:
            assert x is not None
            return x
        with self.step_context(f"after the last micro-batch, {slot.name} from group {maker} to all others"):
            if maker != self.pipeline_rank:
                shape = local_shape(slot.shape, slot.layout, self.program.mesh)
                return _wait(self.axis.receive(maker, shape, getattr(torch, slot.dtype), device), maker)
            assert x is not None
            messages = [self.axis.send(x, group) for group in range(self.axis.size) if group != maker]
            for message in messages:
                message.wait()
            return x


def _wait(message: Message, group: int) -> Tensor:
    try:
        return message.wait()
    except Exception as error:
        raise CommError(f"group {group} never sent it: {error}") from error


def _device_of(tensors: Mapping[int, StageTensors]) -> torch.device:
    return device_of(next(iter(tensors.values())))


class PipelineRun:
    """One run of the schedule, until its gradients are handed over."""

    def __init__(self, runner: StageRunner, executor: Executor, syncs: bool) -> None:
        self.runner = runner
        self.executor = executor
        self.syncs = syncs
        self.gradients: dict[str, Tensor] | None = None
        self.had_backward = False
        self.trained = runner.pipeline.trained
        self.scale = runner.scale

    def finish(self) -> None:
        """After the last backward: gradients of shared parameters go home, and all are summed over the ranks."""
        runner = self.runner
        runner.sum_shared_gradients()
        with runner.step_context("after the last micro-batch, the sum of gradients over the ranks of the group"):
            if self.syncs:
                runner.stash.start([slot.name for slot in runner._shared if slot.groups[0] == runner.pipeline_rank])
            # What the loss doesn't reach may have come by zeros that another group sent back; like on one device it gets none.
            self.gradients = {name: x for name, x in runner.stash.collect().items() if name in self.trained}
        for slot in runner.program.parameters:
            if slot.name in self.trained and slot.name not in self.gradients:
                # Every rank must have the same gradients, of size zero where the parameter isn't: sums of norms meet in collectives.
                self.gradients[slot.name] = runner.stash.zeros(slot.name)
        runner.wait_for_all_ranks(_device_of(self.executor.tensors))

    def hand_over(self, scale: Tensor) -> None:
        """Give the parameters their gradients. Raises InputError the second time, PipelineError when the pipeline has failed."""
        self.runner.alarm.check()
        if self.gradients is None:
            raise InputError(SECOND_BACKWARD)
        gradients, self.gradients = self.gradients, None
        if self.runner.pipeline.loss is not None:
            self.runner.scale = torch.where(scale.isfinite() & (scale != 0), scale, self.scale)
            exact = torch.promote_types(scale.dtype, torch.float32)
            scale = scale.to(exact) / self.scale.to(exact)
        with (
            self.runner.alarm.guard(self.runner.where),
            self.runner.step_context("after the last micro-batch, handing gradients to the parameters"),
        ):
            if self.syncs:
                self.runner.stash.apply(gradients, scale)
            else:
                self.runner.stash.accumulate(gradients, scale)
                if self.runner.stash.is_synced:
                    self.runner.stash.settle()  # the forward was under no_sync, the backward isn't

    def run_backwards(self, gradients: Mapping[int, Tensor]) -> None:
        """Run the backwards, with these gradients of outputs that were given to a loss outside, and give the parameters theirs."""
        self.runner.alarm.check()
        if self.had_backward:
            raise InputError(SECOND_BACKWARD)
        self.had_backward = True
        with self.runner.alarm.guard(self.runner.where), self.runner.step_context("between the forwards and the backwards"):
            self.trained = frozenset().union(*(self.runner.pipeline.reached[i] for i in gradients))
            self.executor.output_gradients = dict(gradients)
            self.executor.run([action for action in self.executor.actions if action.kind not in FORWARD_KINDS])
            self.finish()
        self.hand_over(torch.ones((), device=next(iter(gradients.values())).device))


def hand_over_on_backward(loss: Tensor, run: PipelineRun) -> Tensor:
    """The loss, whose backward gives the parameters their gradients."""
    anchor = torch.zeros((), dtype=loss.dtype, device=loss.device, requires_grad=True)
    result: Tensor = _HandOver.apply(anchor, loss, run)  # type: ignore[no-untyped-call]
    return result


def refuse_backward(x: Tensor) -> Tensor:
    """An output beside the loss: its gradient would come too late, so that asking for it is an error instead of a wrong number."""
    anchor = torch.zeros((), dtype=x.dtype, device=x.device, requires_grad=True)
    result: Tensor = _Refuse.apply(anchor, x)  # type: ignore[no-untyped-call]
    return result


def run_backwards_on_backward(outputs: Mapping[int, Tensor], run: PipelineRun) -> dict[int, Tensor]:
    """The outputs, whose backward runs that of the pipeline."""
    positions = tuple(outputs)
    anchor = torch.zeros((), device=outputs[positions[0]].device, requires_grad=True)
    results: Any = _RunBackwards.apply(anchor, run, positions, *outputs.values())  # type: ignore[no-untyped-call]
    return dict(zip(positions, results, strict=True))


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, loss: Tensor, run: PipelineRun) -> Tensor:
        ctx.run = run
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.run.hand_over(grads[0].reshape(()))
        return torch.zeros_like(grads[0]).reshape(()), None, None


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise InputError(
            "a loss was computed from an output of a pipelined model that returns its own loss: that backward has run already. Use the "
            "loss that the model returns, or call the model without labels so that it returns none"
        )


class _RunBackwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, run: PipelineRun, positions: tuple[int, ...], *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.run, ctx.positions = run, positions
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given = {i: gradient for i, gradient in zip(ctx.positions, grads, strict=True) if gradient is not None}
        ctx.run.run_backwards(given)
        return (torch.zeros((), device=next(iter(given.values())).device), None, None, *(None for _ in grads))
