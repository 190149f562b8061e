"""A pipeline on one rank, behind an ordinary backward.

Comes in: a program with a pipeline, the leaves of this rank's parameters, and a call's inputs. Goes out: a run of the schedule, its outputs
and gradients. When the model returns its loss, the whole schedule runs in the forward call, and the user's ``backward()`` adds gradients
that exist already, scaled by the gradient of the loss, to the parameters. When the loss is computed outside, the forward call runs the
forwards, and the user's backward runs the rest.

A parameter that several pipeline ranks use is stored on one of them, its owner, which sends the value to the others before a step; they
send their gradients to it after the step, where these are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from autopar import torch_compat
from autopar.errors import CommError, InputError, PipelineError
from autopar.ir import local_shape
from autopar.ops import Axis, Message, refuse_double_backward
from autopar.rewrite import PipelineProgram, Program, Slot
from autopar.runtime.dtensor import read_as, stand_in
from autopar.runtime.executor import Executor, StageTensors, device_of
from autopar.runtime.failures import Alarm
from autopar.runtime.gradients import StashedGradients
from autopar.runtime.mailbox import find_finished_sends
from autopar.runtime.scattered import ScatteredSums
from autopar.runtime.sums import TrackedParameter
from autopar.schedules import SENDS, Kind
from autopar.torch_compat import GradientUse

SECOND_BACKWARD = "this pipelined step has had its backward already: call the model again before the next backward()"
FIRST_HALF_SCALE = 2.0**16
"""The factor by which the loss of a first step that computes in float16 is assumed to be scaled: torch GradScaler's initial one."""
# What runs before the user has the outputs, where the loss is computed outside; planning prices that by `schedules.forwards_first`.
FORWARD_KINDS = (Kind.FORWARD, Kind.SEND_FORWARD, Kind.RECEIVE_FORWARD)


def refuse_inside_backward() -> None:
    """Raise InputError inside of a backward, which may be that of a schedule: other ranks can't come to a call in the middle of it."""
    if torch_compat.backward_id() != -1:
        raise InputError(
            "a model in pipeline stages can't be run inside of a backward, as torch.utils.checkpoint around it does; "
            "pin recompute='full' instead"
        )


class StageRunner:
    """Runs the stages of one program on this rank.

    Args:
        program: a program with a pipeline.
        pipeline_rank: this rank's position along the pipeline.
        axis: the pipeline's axis; None with one pipeline rank.
        axes: the axes of the mesh that every pipeline rank runs.
        leaves: name -> leaf of every parameter that this pipeline rank uses.
        stash: stores the leaves' gradients until the user's backward.
        scattered: the parameters of ZeRO level 2 that this pipeline rank uses, whose gradients are summed after every backward.
        alarm: stops the other ranks when the user's backward fails; callers of `run` must guard it themselves.
        gather: gives by name what programs are given of the parameters that are stored here in parts (ZeRO levels 1 and 2); their
            `leaves` only get gradients, those of level 2 not even these.
        has_changed: says by name whether a parameter that another pipeline rank stores was changed in place since it was last asked.
    """

    def __init__(
        self,
        program: Program,
        pipeline_rank: int,
        axis: Axis | None,
        axes: Mapping[str, Axis],
        leaves: Mapping[str, Tensor],
        stash: StashedGradients,
        scattered: Sequence[TrackedParameter] = (),
        alarm: Alarm | None = None,
        gather: Callable[[], Mapping[str, Tensor]] = dict,
        has_changed: Callable[[str], bool] = lambda name: True,
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
        self._gather = gather
        self._has_changed = has_changed
        self._shared = [slot for slot in program.parameters if len(slot.users) > 1 and pipeline_rank in slot.users]
        own_stages = {
            number: stage for number, stage in self.pipeline.stages.items() if self.pipeline.schedule.rank_of[number] == pipeline_rank
        }
        self._stages = own_stages
        stages = ("stages " if len(own_stages) > 1 else "stage ") + ", ".join(map(str, own_stages))
        self.where = f"{stages} (pipeline rank {pipeline_rank})"
        names = {number: [program.parameters[position].name for position in stage.parameters] for number, stage in own_stages.items()}
        self.scattered = ScatteredSums(scattered, names, program.bucket_nbytes)
        # A parameter's gradient may be summed over the mesh when the last stage of this rank that uses it has run its backwards.
        self._stages_using: dict[int, set[int]] = {}
        for number, stage in own_stages.items():
            for position in stage.parameters:
                if len(program.parameters[position].users) == 1:
                    self._stages_using.setdefault(position, set()).add(number)
        self._finished_sends = (
            find_finished_sends(self.pipeline.schedule, pipeline_rank),
            find_finished_sends(self.pipeline.inference, pipeline_rank),
        )
        # The factor by which the user scaled the last loss. It is used for the next one, whose factor isn't known before its backward.
        loss = self.pipeline.loss
        is_scaled = self.pipeline.float16 and loss is not None and program.outputs[loss].dtype != "float16"
        self.scale = torch.tensor(FIRST_HALF_SCALE if is_scaled else 1.0)

    def run(self, buffers: Mapping[str, Tensor], inputs: Sequence[Tensor], *, random_seed: int, trains: bool, syncs: bool) -> PipelineRun:
        """Run the schedule, or only its forwards when the loss is computed outside.

        Args:
            buffers: name -> buffer.
            inputs: this rank's inputs, of the whole batch.
            random_seed: seeds the random ops; the same on all ranks.
            trains: whether a backward follows.
            syncs: whether gradients are summed over the ranks (not under ``no_sync``).

        The backwards begin with the factor by which the last loss was scaled, since gradients of float16 would vanish without it.
        """
        refuse_inside_backward()
        wholes = dict(self._gather())
        self._share_values(wholes)
        with torch.set_grad_enabled(trains):
            # Once for all micro-batches; their gradients add up in the leaves, in the stored dtype.
            parts = {
                slot.name: stand_in(leaf, wholes[slot.name], self.scattered.find_receiver(slot.name))
                if slot.name in wholes
                else read_as(slot.dtype, leaf)
                for slot in self.program.parameters
                if (leaf := self.leaves.get(slot.name)) is not None
            }
        tensors = {
            stage: StageTensors(
                [parts[self.program.parameters[position].name] for position in program.parameters],
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
            ahead=self.program.prefetch,
            settle=self.scattered.finish,
            scatter=self.scattered.flush,
            reduce=reduce,
            finished_sends=self._finished_sends[0 if trains else 1],
        )
        run = PipelineRun(self, executor, syncs)
        if trains:
            self.stash.note_changes()
            self.stash.begin()
            self.scattered.clear()
        if trains and loss is None:
            executor.run([action for action in executor.actions if action.kind in FORWARD_KINDS])
        else:
            executor.run()
            if trains:
                run.finish()
        return run

    def find_pairs(self) -> set[tuple[int, int]]:
        """The pairs of pipeline ranks, the lower first, that exchange messages in any run of this program; the same on every rank."""
        rank_of, makers = self.pipeline.schedule.rank_of, set(self.pipeline.makers.values())
        sends = [
            (rank, rank_of[action.peer])
            for schedule in (self.pipeline.schedule, self.pipeline.inference)
            for rank, actions in enumerate(schedule.actions)
            for action in actions
            if action.kind in SENDS
        ]
        shares = [(slot.owner, user) for slot in self.program.parameters for user in slot.users]
        makers.update(slot.owner for slot in self.program.buffers if slot.name in self.pipeline.written)
        results = [(maker, rank) for maker in makers for rank in range(self.pipeline.schedule.ranks)]
        return {(min(pair), max(pair)) for pair in (*sends, *shares, *results) if pair[0] != pair[1]}

    @contextmanager
    def step_context(self, what: str) -> Iterator[None]:
        """Raise errors inside as PipelineErrors that name this rank's stages and `what`, which is no action of the schedule."""
        try:
            yield
        except PipelineError:
            raise
        except Exception as error:
            raise PipelineError(f"{self.where}, {what}: {type(error).__name__}: {error}") from error

    def _ready(self, stage: int, done: set[int]) -> list[str]:
        """Parameters of a stage whose gradients are complete on this rank, and which no other pipeline rank uses."""
        parameters = self.program.parameters
        return [
            parameters[position].name
            for position in self._stages[stage].parameters
            if position in self._stages_using and self._stages_using[position] <= done
        ]

    def _share_values(self, wholes: dict[str, Tensor]) -> None:
        """Get the values of shared parameters from their owners, or send them to their users.

        `wholes` has what the owner gathered; what an owner elsewhere gathered is added.
        """
        if self.axis is None:
            return
        axis = self.axis
        messages = []
        for slot in self._shared:
            leaf, owner = self.leaves[slot.name].detach(), slot.owner
            with self.step_context(f"before micro-batch 0, the value of the shared parameter {slot.name} from pipeline rank {owner}"):
                if owner == self.pipeline_rank:
                    messages += [axis.send(wholes.get(slot.name, leaf), user) for user in slot.users[1:]]
                elif slot.stored is not None:
                    wholes[slot.name] = _wait(axis.receive(owner, leaf.shape, getattr(torch, slot.dtype), leaf.device), owner)
                else:
                    value = _wait(axis.receive(owner, leaf.shape, leaf.dtype, leaf.device), owner)
                    # A later backward may have saved the leaf, and would refuse even a write of the same value. Whether it's the same isn't
                    # looked at, for which a GPU would have to be waited: autograd is told what it is told of the parameter itself.
                    leaf.data.copy_(value)
                    if self._has_changed(slot.name):
                        torch.autograd.graph.increment_version([leaf])
        with self.step_context("before micro-batch 0, the values of shared parameters to other pipeline ranks"):
            for message in messages:
                message.wait()

    def sum_shared_gradients(self) -> None:
        """Add up the gradients of shared parameters on their owners; users of a parameter have none afterwards."""
        if self.axis is None:
            return
        axis = self.axis
        messages = []
        # At ZeRO level 2 every user of a parameter has a part of the sum.
        leaves = {slot.name: self.scattered.find_leaf(slot.name, self.leaves[slot.name]) for slot in self._shared}
        for slot in self._shared:
            leaf, owner = leaves[slot.name], slot.owner
            if owner != self.pipeline_rank and leaf.requires_grad:
                with self.step_context(
                    f"after the last micro-batch, the gradient of the shared parameter {slot.name} to pipeline rank {owner}"
                ):
                    messages.append(axis.send(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf), owner))
                leaf.grad = None
        for slot in self._shared:
            leaf = leaves[slot.name]
            if slot.owner == self.pipeline_rank and leaf.requires_grad:
                for user in slot.users[1:]:
                    with self.step_context(
                        f"after the last micro-batch, the gradient of the shared parameter {slot.name} from pipeline rank {user}"
                    ):
                        gradient = _wait(axis.receive(user, leaf.shape, leaf.dtype, leaf.device), user)
                        leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        with self.step_context("after the last micro-batch, the gradients of shared parameters to other pipeline ranks"):
            for message in messages:
                message.wait()

    def wait_for_all_ranks(self, device: torch.device) -> None:
        """Wait until every pipeline rank has finished the step, so that either all of them reach their optimizers or none."""
        if self.axis is not None:
            with self.step_context("after the last micro-batch, waiting for the other pipeline ranks to end the step"):
                self.axis.all_reduce(torch.zeros(1, device=device))

    def broadcast(self, x: Tensor | None, slot: Slot, device: torch.device) -> Tensor:
        """This rank's part of an output, or of a buffer's new value, sent by the pipeline rank that made it to all others."""
        maker = slot.owner
        if self.axis is None:
            assert x is not None
            return x
        with self.step_context(f"after the last micro-batch, {slot.name} from pipeline rank {maker} to all others"):
            if maker != self.pipeline_rank:
                shape = local_shape(slot.shape, slot.layout, self.program.mesh)
                return _wait(self.axis.receive(maker, shape, getattr(torch, slot.dtype), device), maker)
            assert x is not None
            messages = [self.axis.send(x, receiver) for receiver in range(self.axis.size) if receiver != maker]
            for message in messages:
                message.wait()
            return x


def _wait(message: Message, sender: int) -> Tensor:
    try:
        return message.wait()
    except Exception as error:
        raise CommError(f"pipeline rank {sender} never sent it: {error}") from error


def _device_of(tensors: Mapping[int, StageTensors]) -> torch.device:
    return device_of(next(iter(tensors.values())))


class PipelineRun:
    """One run of the schedule, until its gradients are added to the parameters."""

    def __init__(self, runner: StageRunner, executor: Executor, syncs: bool) -> None:
        self.runner = runner
        self.executor = executor
        self.syncs = syncs
        self.gradients: dict[str, Tensor] | None = None
        self.had_backward = False
        self.trained = runner.pipeline.trained
        self.scale = runner.scale

    def finish(self) -> None:
        """After the last backward: sum gradients of shared parameters on their owners, and all gradients over the ranks of the mesh."""
        runner = self.runner
        with runner.step_context("after the last micro-batch, the parts of gradients of this rank"):
            runner.scattered.finish()
        runner.sum_shared_gradients()
        with runner.step_context("after the last micro-batch, the sum of gradients over the ranks of the mesh"):
            if self.syncs:
                runner.stash.start([slot.name for slot in runner._shared if slot.owner == runner.pipeline_rank])
            # A parameter that the loss doesn't reach may have zeros that another pipeline rank sent; as on one device it gets none.
            self.gradients = {name: x for name, x in runner.stash.collect(is_summed=self.syncs).items() if name in self.trained}
        for slot in runner.program.parameters:
            if slot.name in self.trained and slot.name not in self.gradients:
                # Every rank must have a gradient of every parameter, of size 0 where it isn't stored: norms are summed by collectives.
                self.gradients[slot.name] = runner.stash.zeros(slot.name, is_summed=self.syncs)
        runner.wait_for_all_ranks(_device_of(self.executor.tensors))

    def hand_over(self, scale: Tensor, uses: Mapping[str, GradientUse]) -> dict[str, Tensor]:
        """Add the gradients, times the gradient of the loss, to the parameters' ``grad``, or return them to autograd.

        Args:
            scale: the gradient of the loss.
            uses: name of a parameter -> what the backward does with its gradient.

        Returns by name the gradients of those parameters whose gradients the user asked for, or whose hooks get them. Raises InputError
        the second time, unless the first backward was asked to keep its graph, and PipelineError when the pipeline has failed.
        """
        self.runner.alarm.check()
        if self.gradients is None:
            raise InputError(SECOND_BACKWARD)
        gradients, keeps = self.gradients, torch_compat.keeps_graph()
        if not keeps:
            self.gradients = None
        if self.runner.pipeline.loss is not None:
            self.runner.scale = torch.where(scale.isfinite() & (scale != 0), scale, self.scale)
            exact = torch.promote_types(scale.dtype, torch.float32)
            scale = scale.to(exact) / self.scale.to(exact)
        stash = self.runner.stash
        with (
            self.runner.alarm.guard(self.runner.where),
            self.runner.step_context("after the last micro-batch, handing gradients to the parameters"),
        ):
            scaled = {
                name: (gradient.clone() if keeps else gradient).mul_(scale) for name, gradient in gradients.items() if uses[name] != "none"
            }
            added = {name: gradient for name, gradient in scaled.items() if uses[name] == "added" and stash.is_ordinary(name)}
            returned = {name: gradient for name, gradient in scaled.items() if name not in added}
            if not self.syncs:
                # The forward was under `no_sync`; what is returned can't wait.
                waiting = {name: gradient for name, gradient in scaled.items() if not stash.is_summed(name)}
                returned |= stash.sum({name: waiting[name] for name in returned if name in waiting})
                stash.accumulate({name: waiting[name] for name in added if name in waiting})
                added = {name: gradient for name, gradient in added.items() if name not in waiting}
            stash.apply(added)
            if "added" in uses.values():
                stash.end_unsynced()
            return {name: stash.as_gradient(name, gradient) for name, gradient in returned.items()}

    def run_backwards(self, gradients: Mapping[int, Tensor], uses: Mapping[str, GradientUse]) -> dict[str, Tensor]:
        """Run the backwards from the gradients of outputs (position -> gradient); returns what `hand_over` does."""
        self.runner.alarm.check()
        if self.had_backward:
            raise InputError(SECOND_BACKWARD)
        self.had_backward = True
        self.runner.stash.note_changes()
        with self.runner.alarm.guard(self.runner.where), self.runner.step_context("between the forwards and the backwards"):
            self.trained = frozenset().union(*(self.runner.pipeline.reached[position] for position in gradients))
            self.executor.output_gradients = dict(gradients)
            self.executor.run([action for action in self.executor.actions if action.kind not in FORWARD_KINDS])
            self.finish()
        return self.hand_over(torch.ones((), device=next(iter(gradients.values())).device), uses)


Parameters = Mapping[str, Tensor]
"""Name -> the user's parameter, of those that require a gradient: operands of the functions below, so that autograd reaches them."""


def hand_over_on_backward(loss: Tensor, run: PipelineRun, parameters: Parameters) -> Tensor:
    """The loss, whose backward hands out the run's gradients of the parameters."""
    result: Tensor = _HandOver.apply(run, tuple(parameters), loss, *parameters.values())  # type: ignore[no-untyped-call]
    return result


def refuse_backward(x: Tensor, parameters: Parameters) -> Tensor:
    """An output beside the loss, whose backward raises InputError: the schedule's backwards have run without its gradient."""
    result: Tensor = _Refuse.apply(x, *parameters.values())  # type: ignore[no-untyped-call]
    return result


def run_backwards_on_backward(outputs: Mapping[int, Tensor], run: PipelineRun, parameters: Parameters) -> dict[int, Tensor]:
    """The outputs (position -> tensor), whose backward runs the backwards of the schedule and hands out gradients of the parameters."""
    results: Any = _RunBackwards.apply(run, tuple(outputs), tuple(parameters), *outputs.values(), *parameters.values())  # type: ignore[no-untyped-call]
    return dict(zip(outputs, results, strict=True))


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: PipelineRun, names: tuple[str, ...], loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run, ctx.names = run, names
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("a pipelined model")
        returned = ctx.run.hand_over(grads[0].reshape(()), _find_uses(ctx.names, ctx.next_functions[1:]))
        return None, None, None, *map(returned.get, ctx.names)


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise InputError(
            "a loss was computed from an output of a pipelined model that returns its own loss: that backward has run already. Use the "
            "loss that the model returns, or call the model without labels so that it returns none"
        )


class _RunBackwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: PipelineRun, positions: tuple[int, ...], names: tuple[str, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.run, ctx.positions, ctx.names = run, positions, names
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in tensors[: len(positions)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("a pipelined model")
        gradients = {position: gradient for position, gradient in zip(ctx.positions, grads, strict=True) if gradient is not None}
        returned = ctx.run.run_backwards(gradients, _find_uses(ctx.names, ctx.next_functions[len(grads) :]))
        return None, None, None, *(None for _ in grads), *map(returned.get, ctx.names)


def _find_uses(names: Sequence[str], edges: Sequence[tuple[Any, int]]) -> dict[str, GradientUse]:
    """What the backward that runs now does with the gradients of parameters, given their places in autograd's graph."""
    return {name: torch_compat.use_of_gradient(node) for name, (node, _) in zip(names, edges, strict=True)}
