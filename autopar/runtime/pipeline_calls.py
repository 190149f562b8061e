"""Calls of pipelined programs, between the user's call and the runs of a schedule.

Comes in: a program with a pipeline, and the whole batch. Goes out: the outputs as the user gets them, behind which the user's backward adds
the gradients to the parameters (`autopar.runtime.pipeline`).
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autopar import torch_compat
from autopar.errors import InputError
from autopar.ir import Layout, local_shape
from autopar.rewrite import Program, Slot
from autopar.runtime.dtensor import as_dtensor, gather_whole, shape_of_part
from autopar.runtime.gradients import GradientReducer, StashedGradients
from autopar.runtime.mailbox import connect
from autopar.runtime.outputs import Handover
from autopar.runtime.parameters import gather_held
from autopar.runtime.pipeline import PipelineRun, StageRunner, hand_over_on_backward, refuse_backward, run_backwards_on_backward
from autopar.runtime.storage import Deployment, Storage, copy_updated_buffers, empty_part, stands_for


class PipelineCalls:
    """The pipelined programs of one model on this rank: their runners, and copies of parameters that other pipeline ranks own."""

    def __init__(self, storage: Storage, deployment: Deployment, reducer: GradientReducer) -> None:
        self._storage = storage
        self._deployment = deployment
        self._reducer = reducer
        # Program -> its parameters, leaves and runner.
        self._runners: dict[int, tuple[list[nn.Parameter], list[Tensor], StageRunner]] = {}
        # Name -> copy of a parameter that this pipeline rank uses and another one owns.
        self._borrowed: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._connected: set[tuple[int, int]] = set()
        self._connected_programs: set[int] = set()

    def find_runner(self, program: Program) -> StageRunner:
        """The runner of a program, whose leaves share the storage that the parameters have now.

        Raises InputError for a tensor that stands in the place of a parameter.
        """
        deployment = self._deployment
        used = [slot for slot in program.parameters if deployment.pipeline_rank in slot.users]
        parameters = {slot.name: self._storage.parameter(slot.name) for slot in program.parameters}
        stored = [slot.name for slot in used if deployment.owners[slot.name] in (deployment.pipeline_rank, None)]
        if id(program) in self._runners:
            known, leaves, runner = self._runners[id(program)]
            is_known = all(map(operator.is_, known, parameters.values()))
            if is_known and all(stands_for(leaf, parameters[name]) for name, leaf in zip(stored, leaves, strict=True)):
                return runner
            self._reducer.remove_stash(runner.stash)
            del self._runners[id(program)]
        if substitutes := [name for name, parameter in parameters.items() if not self._storage.is_stored(name, parameter)]:
            raise InputError(
                f"{', '.join(substitutes[:3])} {'is' if len(substitutes) == 1 else 'are'} not the model's own at this call "
                "(torch.func.functional_call, or exchanged after the first call), which a pipeline can't take: pin pp=1, microbatches=1"
            )
        local_leaves = {
            name: torch_compat.local_of(parameter).requires_grad_(parameter.requires_grad) for name, parameter in parameters.items()
        }
        tracked = [self._storage.track(slot, parameters[slot.name], local_leaves[slot.name]) for slot in program.parameters]
        leaves = [local_leaves[name] for name in stored]
        leaf_of = dict(zip(stored, leaves, strict=True))
        entry_of = {entry.name: entry for entry in tracked}
        held = [(entry_of[slot.name], slot) for slot in used if entry_of[slot.name].held is not None]
        scattered = []
        for slot in used:
            if slot.stored is not None and deployment.device_mesh is not None:
                parameter, entry = parameters[slot.name], entry_of[slot.name]
                leaf_of[slot.name] = self._make_leaf(slot, slot.layout, parameter)
                if entry.held is None:  # another pipeline rank stores it, and gets the gradients
                    entry = self._storage.track(slot, parameter, self._make_leaf(slot, slot.stored, parameter), is_borrowed=True)
                entry.receiver = leaf_of[slot.name]
                if entry.is_scattered:
                    scattered.append(entry)
            elif slot.name not in leaf_of:
                if slot.name not in self._borrowed:
                    shape = local_shape(slot.shape, slot.layout, deployment.mesh)
                    self._borrowed[slot.name] = torch.empty(shape, dtype=parameters[slot.name].dtype, device=self._storage.device)
                leaf_of[slot.name] = self._borrowed[slot.name].detach().requires_grad_(parameters[slot.name].requires_grad)
        stash = StashedGradients(tracked, program.bucket_nbytes, self._reducer)
        runner = StageRunner(
            program,
            deployment.pipeline_rank,
            deployment.pipeline,
            deployment.axes,
            leaf_of,
            stash,
            scattered,
            deployment.alarm,
            lambda: gather_held(held),
            self._has_changed,
        )
        self._runners[id(program)] = list(parameters.values()), leaves, runner
        return runner

    def _has_changed(self, name: str) -> bool:
        """Whether a borrowed parameter was changed in place since this was last asked: every rank has a part that counts changes."""
        version = self._storage.parameter(name)._version
        before, self._versions[name] = self._versions.get(name), version
        return before != version

    def _make_leaf(self, slot: Slot, layout: Layout, parameter: nn.Parameter) -> Tensor:
        """A leaf of the sizes of this rank's part of a parameter in a layout, without memory: it only gets gradients."""
        deployment = self._deployment
        shape = shape_of_part(slot.shape, layout, deployment.mesh, deployment.place)
        return torch.zeros((), dtype=parameter.dtype, device=self._storage.device).expand(shape).requires_grad_(parameter.requires_grad)

    def run(self, program: Program, runner: StageRunner, inputs: Sequence[Tensor], handover: Handover) -> list[Any]:
        """Run the stages of this rank; returns what the user gets of each output, by `handover`."""
        pipeline = program.pipeline
        assert pipeline is not None
        buffers = self._storage.buffers_of(program)
        random_seed = 0
        self._connect(runner)
        if pipeline.random:
            random_seed = handover.step.share(int(torch.randint(2**62, ())))
        trains = torch.is_grad_enabled() and bool(pipeline.trained)
        read_buffers = copy_updated_buffers(program, buffers) if trains else buffers
        run = runner.run(read_buffers, inputs, random_seed=random_seed, trains=trains, syncs=self._reducer.is_synced)
        executor = run.executor
        made_here = {out.position for stage in executor.tensors for out in pipeline.stages[stage].outputs}
        parts = {position: executor.join(position) for position in made_here}
        if not trains or pipeline.loss is not None:
            executor.close()
        with torch.no_grad():
            self._update_buffers(program, runner, buffers, parts)
        return self._as_outputs(program, runner, run, parts, trains, handover)

    def _as_outputs(
        self, program: Program, runner: StageRunner, run: PipelineRun, parts: Mapping[int, Tensor], trains: bool, handover: Handover
    ) -> list[Any]:
        """What the user gets of each output. What may stay unread stays where it was made until then."""
        pipeline = program.pipeline
        assert pipeline is not None
        has_outside_loss = trains and pipeline.loss is None
        device = self._storage.device
        late = {
            position
            for position, slot in enumerate(program.outputs)
            if not has_outside_loss and math.prod(slot.shape) > 1 and (handover.has_loss or handover.is_sharded)
        }
        shared = {
            position: runner.broadcast(parts.get(position), slot, device)
            for position, slot in enumerate(program.outputs)
            if position not in late
        }
        differentiable = [position for position, slot in enumerate(program.outputs) if slot.requires_grad]
        trainable = {slot.name: parameter for slot in program.parameters if (parameter := self._storage.parameter(slot.name)).requires_grad}

        def trained(names: frozenset[str]) -> dict[str, nn.Parameter]:
            return {name: parameter for name, parameter in trainable.items() if name in names}

        if has_outside_loss:
            shared.update(
                run_backwards_on_backward({position: shared[position] for position in differentiable}, run, trained(pipeline.trained))
            )
        results: list[Any] = []
        for position, slot in enumerate(program.outputs):
            is_refused = trains and not has_outside_loss and position in differentiable and position != pipeline.loss
            reaching = trained(pipeline.reached.get(position, frozenset()))
            if handover.is_sharded and position in late:
                results.append(self._as_dtensor(slot, parts.get(position), reaching if is_refused else None))
                continue
            if position in late:
                # Sizes without memory.
                dtype = getattr(torch, slot.dtype)
                x = torch.zeros((), dtype=dtype, device=device).expand(local_shape(slot.shape, slot.layout, self._deployment.mesh))
            else:
                x = shared[position]
            if trains and position == pipeline.loss:
                x = hand_over_on_backward(x, run, trained(pipeline.trained))
            x = refuse_backward(x, reaching) if is_refused else x
            bring = self._bringing(runner, slot, parts.get(position)) if position in late else None
            results.append(handover.give(position, slot, x, bring))
        return results

    def _bringing(self, runner: StageRunner, slot: Slot, part: Tensor | None) -> Callable[[], Tensor]:
        """What gets this rank's part of an output from the pipeline rank that made it; a collective."""

        def bring() -> Tensor:
            with self._deployment.alarm.guard(runner.where):
                return runner.broadcast(part, slot, self._storage.device)

        return bring

    def _as_dtensor(self, slot: Slot, part: Tensor | None, refused: Mapping[str, Tensor] | None) -> Tensor:
        """An output as a DTensor, of which the pipeline rank that made it has all parts; a backward to parameters in `refused` raises."""
        deployment = self._deployment
        if part is None:
            part = empty_part(slot.shape, slot.layout, deployment.mesh, getattr(torch, slot.dtype), self._storage.device)
        part = part if refused is None else refuse_backward(part, refused)
        if deployment.device_mesh is None:
            return part
        return as_dtensor(part, deployment.device_mesh, deployment.placements_of(slot.layout, slot.owner), slot.shape)

    def _update_buffers(self, program: Program, runner: StageRunner, buffers: Mapping[str, Tensor], parts: Mapping[int, Tensor]) -> None:
        """Give buffers their new values on every rank, also of those that other pipeline ranks made or updated in place."""
        pipeline = program.pipeline
        assert pipeline is not None
        slots = {slot.name: slot for slot in program.buffers}
        for position, name in enumerate(program.mutated_buffers, len(program.outputs)):
            maker = dataclasses.replace(slots[name], users=(pipeline.makers[position],))
            value = runner.broadcast(parts.get(position), maker, self._storage.device)
            buffers[name].copy_(gather_whole(value, slots[name].layout, self._deployment.mesh, self._deployment.axes))
        for name in sorted(pipeline.written):
            value = runner.broadcast(buffers[name], slots[name], self._storage.device)
            if value is not buffers[name]:
                buffers[name].copy_(value)

    def _connect(self, runner: StageRunner) -> None:
        """Before the first run of a program: connect the pipeline ranks that exchange messages in it."""
        axis = self._deployment.pipeline
        if axis is None or id(runner.program) in self._connected_programs:
            return
        self._connected_programs.add(id(runner.program))
        pairs = runner.find_pairs() - self._connected
        with runner.step_context("before micro-batch 0, the first messages between pipeline ranks"):
            connect(axis, pairs, self._storage.device)
        self._connected |= pairs


def refuse_gradients(inputs: Sequence[Tensor]) -> None:
    """Raise InputError when an input of a pipelined call needs a gradient."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise InputError(
            "an input of a pipelined model needs a gradient, which the pipeline doesn't bring back: detach it, or pin pp=1, microbatches=1"
        )
