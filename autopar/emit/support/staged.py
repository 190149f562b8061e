"""A training step of a pipeline: this rank's list of the schedule, then sums of gradients.

Stages compute with leaves, whose ``grad`` adds up the gradients of micro-batches. A parameter that several pipeline ranks use is stored by
the first of them, which sends its value to the others before the step and gets their gradients after it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.emit.support.described import Model, Parameter
from autopar.emit.support.gradients import make_leaf, track
from autopar.emit.support.ranks import Ranks
from autopar.emit.support.stored import Stored
from autopar.ir import local_shape, parse_layout, program_layout
from autopar.ops import Message, StoredPart, begin_wholes, stand_for_whole, take_wholes
from autopar.rewrite import PipelineProgram
from autopar.runtime import dtensor, executor, mailbox, scattered, sums
from autopar.schedules import SENDS


class StagedStep:
    """Runs the stages of this rank on a batch and leaves every parameter that is stored here its gradient."""

    def __init__(self, model: Model, ranks: Ranks, stored: Stored) -> None:
        self.model, self.ranks, self.stored = model, ranks, stored
        self.pipeline: PipelineProgram = model.pipeline
        schedule = self.pipeline.schedule
        self.stages = {number: x for number, x in self.pipeline.stages.items() if schedule.rank_of[number] == ranks.pipeline_rank}
        names = {number: [model.parameters[position].name for position in stage.parameters] for number, stage in self.stages.items()}
        used = {name for stage in names.values() for name in stage}
        self.used = [parameter for parameter in model.parameters if parameter.name in used]
        self.shared = [x for x in model.parameters if len(x.users) > 1 and ranks.pipeline_rank in x.users]
        self.leaves: dict[str, Tensor] = {}
        self._tracked: dict[str, sums.TrackedParameter] = {}
        scatters = [self._set_up(parameter) for parameter in self.used]
        self.scattered = scattered.ScatteredSums([x for x in scatters if x is not None], names, model.bucket_nbytes)
        self._stages_using: dict[str, set[int]] = {}
        for number, stage in names.items():
            for name in stage:
                self._stages_using.setdefault(name, set()).add(number)
        self._finished_sends = mailbox.find_finished_sends(schedule, ranks.pipeline_rank)
        self._pending: list[sums.PendingSum] = []
        if ranks.pipeline is not None and ranks.device.type == "cuda":
            mailbox.connect(ranks.pipeline, _pairs(model), ranks.device)
        self._random = torch.Generator().manual_seed(torch.initial_seed())

    def _set_up(self, parameter: Parameter) -> sums.TrackedParameter | None:
        """Make the leaf of a parameter; returns its entry where its gradients are scattered after every backward (ZeRO level 2)."""
        model, ranks = self.model, self.ranks
        part = self.stored.parts.get(parameter.name)
        entry = None
        if part is not None:
            entry = self._tracked[parameter.name] = track(parameter, part, model, ranks)
        if any(state.level for state in parse_layout(parameter.layout)):
            self.leaves[parameter.name] = make_leaf(parameter, model, ranks, as_stored=False)
            if entry is None:  # another pipeline rank stores it, and gets the gradients
                entry = track(parameter, make_leaf(parameter, model, ranks, as_stored=True), model, ranks)
            entry.receiver = self.leaves[parameter.name]
            return entry if entry.is_scattered else None
        if part is None:
            shape = local_shape(parameter.shape, parse_layout(parameter.layout), model.mesh)
            empty = torch.empty(shape, dtype=getattr(torch, parameter.dtype), device=ranks.device)
            self.leaves[parameter.name] = empty.requires_grad_(parameter.trained)
        else:
            self.leaves[parameter.name] = part
        return None

    def run(self, inputs: list[Tensor]) -> Tensor:
        """The loss of a batch, of which `inputs` are this rank's parts; gradients are in the ``grad`` of the parts of parameters."""
        model, ranks = self.model, self.ranks
        wholes = self._gather()
        self._share_values(wholes)
        parts = {
            x.name: dtensor.stand_in(self.leaves[x.name], wholes[x.name], self.scattered.find_receiver(x.name))
            if x.name in wholes
            else dtensor.read_as(x.program_dtype, self.leaves[x.name])
            for x in self.used
        }
        buffers = [self.stored.buffers[x.name].clone() if x.updated else self.stored.buffers[x.name] for x in model.buffers]
        buffers = [
            dtensor.take_local(x, parse_layout(y.layout), model.mesh, ranks.place) for x, y in zip(buffers, model.buffers, strict=True)
        ]
        tensors = {
            number: executor.StageTensors(
                [parts[model.parameters[position].name] for position in stage.parameters],
                [buffers[position] for position in stage.buffers],
                inputs,
            )
            for number, stage in self.stages.items()
        }
        done: set[int] = set()

        def reduce(stage: int) -> None:
            done.add(stage)
            self._start_sums([x.name for x in self.used if len(x.users) == 1 and stage in self._stages_using[x.name] <= done])

        run = executor.Executor(
            self.pipeline,
            self.pipeline.schedule,
            ranks.pipeline_rank,
            ranks.pipeline,
            ranks.axes,
            tensors,
            output_gradients={model.loss: torch.ones((), device=ranks.device)},
            random_seed=int(torch.randint(2**62, (), generator=self._random)),
            regathers=model.regather,
            ahead=model.prefetch,
            settle=self.scattered.finish,
            scatter=self.scattered.flush,
            reduce=reduce,
            finished_sends=self._finished_sends,
        )
        run.run()
        self._finish()
        return self._loss(run)

    # --- values of parameters ---

    def _gather(self) -> dict[str, Tensor]:
        """What programs are given of parameters that are stored here in parts and computed with whole, by name."""
        held = [(entry, x) for x in self.used if (entry := self._tracked.get(x.name)) is not None and entry.held is not None]
        begun = begin_wholes([_stand_for(entry, getattr(torch, x.program_dtype)) for entry, x in held])
        return {entry.name: whole for (entry, _), whole in zip(held, take_wholes(begun), strict=True)}

    def _share_values(self, wholes: dict[str, Tensor]) -> None:
        """Send the values of shared parameters to their users, or get them; `wholes` gets those that are computed with whole."""
        axis, sent = self.ranks.pipeline, list[Message]()
        for x in self.shared if axis is not None else ():
            assert axis is not None
            owner, leaf = x.users[0], self.leaves[x.name].detach()
            if owner == self.ranks.pipeline_rank:
                sent += [axis.send(wholes.get(x.name, leaf), user) for user in x.users[1:]]
            elif "z" in x.layout:
                shape = local_shape(x.shape, program_layout(parse_layout(x.layout)), self.model.mesh)
                wholes[x.name] = axis.receive(owner, shape, getattr(torch, x.program_dtype), leaf.device).wait()
            else:
                leaf.copy_(axis.receive(owner, leaf.shape, leaf.dtype, leaf.device).wait())
        for message in sent:
            message.wait()

    # --- gradients ---

    def _start_sums(self, names: list[str]) -> None:
        """Start to sum gradients that are complete on this rank over the ranks that have summands."""
        members = [self._tracked[name] for name in names if name in self._tracked and not self._tracked[name].is_scattered]
        for entry in members:
            _take_gradient(entry)
        for bucket in sums.fill_buckets(members, self.model.bucket_nbytes):
            sums.start_sum(bucket.members, self._pending, self.model.bucket_nbytes)

    def _finish(self) -> None:
        """After the last backward: gradients of shared parameters to their owners, and all sums to the parts' ``grad``."""
        self.scattered.finish()
        self._sum_shared()
        self._start_sums([x.name for x in self.shared if x.users[0] == self.ranks.pipeline_rank])
        for pending in self._pending:
            for entry, gradient in sums.end_sum(pending):
                entry.leaf.grad = gradient
        self._pending.clear()
        for entry in self._tracked.values():
            if not entry.is_scattered:
                _take_gradient(entry)
            if entry.gradient is not None:  # complete on every rank
                entry.leaf.grad = entry.complete_part(entry.gradient)
                entry.gradient = None

    def _sum_shared(self) -> None:
        """Add up the gradients of shared parameters on their owners."""
        axis, sent = self.ranks.pipeline, list[Message]()
        for x in self.shared if axis is not None else ():
            assert axis is not None
            leaf = self.scattered.find_leaf(x.name, self.leaves[x.name])
            if not leaf.requires_grad:
                continue
            if x.users[0] != self.ranks.pipeline_rank:
                sent.append(axis.send(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf), x.users[0]))
                leaf.grad = None
                continue
            for user in x.users[1:]:
                gradient = axis.receive(user, leaf.shape, leaf.dtype, leaf.device).wait()
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        for message in sent:
            message.wait()

    # --- results ---

    def _loss(self, run: executor.Executor) -> Tensor:
        """The loss, which the ranks of one pipeline rank have, on all ranks."""
        maker = self.pipeline.makers[self.model.loss]
        is_here = maker == self.ranks.pipeline_rank
        loss = run.join(self.model.loss).clone() if is_here else torch.zeros((), device=self.ranks.device)
        loss = loss.float() if loss.dtype.itemsize < 4 else loss
        if self.ranks.pipeline is not None:
            value = torch.tensor([loss.item()], dtype=torch.float64, device=self.ranks.device)
            dist.broadcast(value, maker * self.model.mesh.world_size)
            return value[0]
        return loss


def _stand_for(entry: sums.TrackedParameter, dtype: torch.dtype) -> Tensor:
    held, leaf = entry.held, entry.leaf
    assert held is not None
    return stand_for_whole(leaf.detach(), StoredPart(held.axis, entry.sent_shape, dtype, lambda: held.sent(leaf.detach()), held.join))


def _take_gradient(entry: sums.TrackedParameter) -> None:
    """Take what micro-batches have added up in a leaf's ``grad``."""
    if entry.collector.grad is not None:
        entry.gradient, entry.collector.grad = entry.collector.grad.detach(), None


def _pairs(model: Model) -> set[tuple[int, int]]:
    """The pairs of pipeline ranks that exchange messages."""
    schedule = model.pipeline.schedule
    pairs = {
        (rank, schedule.rank_of[action.peer]) for rank, actions in enumerate(schedule.actions) for action in actions if action.kind in SENDS
    }
    pairs |= {(parameter.users[0], user) for parameter in model.parameters for user in parameter.users}
    # Where a checkpoint is written, every owner sends to the first.
    pairs |= {(0, rank) for rank in range(model.pipeline_ranks)}
    return {(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]}
