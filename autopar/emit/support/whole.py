"""A training step without a pipeline: one call of the program, one backward, sums of gradients that run behind it."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from autopar.emit.support.described import Model, Parameter
from autopar.emit.support.gradients import track
from autopar.emit.support.ranks import Ranks
from autopar.emit.support.stored import Stored
from autopar.ir import parse_layout
from autopar.ops import StoredPart, comm, regather, stand_for_whole
from autopar.runtime import dtensor, scattered, sums


class WholeStep:
    """Runs the program on a batch and leaves every parameter its gradient."""

    def __init__(self, model: Model, ranks: Ranks, stored: Stored) -> None:
        self.model, self.ranks, self.stored = model, ranks, stored
        self._tracked = {x.name: track(x, stored.parts[x.name], model, ranks) for x in model.parameters}
        summed = [entry for entry in self._tracked.values() if entry.is_deferred or entry.held is not None]
        self._sums = scattered.ScatteredSums(summed, {0: [entry.name for entry in summed]}, model.bucket_nbytes)

    def run(self, inputs: list[Tensor]) -> Tensor:
        """The loss of a batch, of which `inputs` are this rank's parts; gradients are in the ``grad`` of the parts of parameters."""
        model, ranks = self.model, self.ranks
        assert model.forward is not None
        parameters = {parameter.name: self._enter(parameter) for parameter in model.parameters}
        buffers = {x.name: self.stored.buffers[x.name] for x in model.buffers}
        # The backward may need the old values of those that get new ones.
        read = {
            x.name: dtensor.take_local(
                buffers[x.name].clone() if x.updated else buffers[x.name], parse_layout(x.layout), model.mesh, ranks.place
            )
            for x in model.buffers
        }
        with comm.active(ranks.axes), regather(model.prefetch) if model.regather else nullcontext():
            results = model.forward(parameters, read, *inputs)
        loss: Tensor = results[model.loss]
        loss.backward()  # type: ignore[no-untyped-call]
        self._sums.flush(0)
        self._sums.finish()
        with torch.no_grad():
            layouts = {x.name: parse_layout(x.layout) for x in model.buffers}
            for name, value in zip(model.mutated, results[model.outputs :], strict=True):
                buffers[name].copy_(dtensor.gather_whole(value, layouts[name], model.mesh, ranks.axes))
        return loss.detach()

    def _enter(self, parameter: Parameter) -> Tensor:
        """What the program computes with: the part itself, or what stands for it and hands its gradient to the sums."""
        leaf, entry = self.stored.parts[parameter.name], self._tracked[parameter.name]
        take = self._sums.find_receiver(parameter.name)
        if entry.held is not None:
            held, dtype = entry.held, getattr(torch, parameter.program_dtype)
            join = partial(_join, leaf, held, take)
            return stand_for_whole(leaf.detach(), StoredPart(held.axis, entry.sent_shape, dtype, lambda: held.sent(leaf.detach()), join))
        if take is not None:
            return dtensor.stand_in(leaf, dtensor.read_as(parameter.program_dtype, leaf.detach()), take)
        return dtensor.read_as(parameter.program_dtype, leaf)


def _join(leaf: Tensor, held: sums.Held, take: object, stack: Tensor) -> Tensor:
    """The whole parameter from the parts of all ranks, whose gradient goes to the sums."""
    return dtensor.stand_in(leaf, held.join(stack), take)  # type: ignore[arg-type]
