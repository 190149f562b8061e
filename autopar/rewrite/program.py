"""The local program of a rank, as the rewrite makes it and the runtime runs it: an fx module and what its tensors are.

The module is called with the parts that this rank stores, in the order of the slots: parameters, buffers, inputs. It returns
the user's outputs, then the new values of `mutated_buffers`. Within it, collectives name the axes of `mesh`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from autopar.ir import Layout, Mesh, State, shard
from autopar.schedules import Schedule


class Signature(Protocol):
    """How a user's call maps to the flat tensors of the program and back (`autopar.capture.Captured`)."""

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Flatten a call to its tensors, in the order of the program's inputs; InputError when the call doesn't fit."""
        ...

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """Give the flat outputs the structure that the user's model returns."""
        ...


_FIRST_DIM = shard(0)


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor that goes into or comes out of the program.

    Attributes:
        name: the user's name of the parameter, buffer or input; of an output ``output`` and its position.
        layout: per mesh axis Shard or Replicate; what the program takes or gives.
        shape: global sizes.
        dtype: torch's name without the ``torch.`` prefix; what the program takes or gives. A parameter may be stored in another one.
        partial_axes: for a parameter, the axes over which its local gradient still has to be summed, once per step.
        requires_grad: whether the tensor takes part in the backward.
        users: the pipeline ranks that use the parameter, in order of their stages, or the one that makes the output.
        batch: of an input or output, the state that splits it into equal numbers of samples; None when it has no batch. Nothing is
            split that way unless `layout` says so.
        reduced_dtype: of a parameter, the dtype in which its gradient is summed over `partial_axes`; None where that is the stored one.
        stored: of a parameter, the layout in which it is stored where that isn't `layout` (`autopar.ir.layout.program_layout`).
        made_from: of an output, positions of the outputs that it is computed from, as far as gradients pass.
    """

    name: str
    layout: Layout
    shape: tuple[int, ...]
    dtype: str
    partial_axes: tuple[str, ...] = ()
    requires_grad: bool = False
    users: tuple[int, ...] = (0,)
    batch: State | None = _FIRST_DIM
    reduced_dtype: str | None = None
    stored: Layout | None = None
    made_from: tuple[int, ...] = ()

    @property
    def stored_layout(self) -> Layout:
        """The layout in which a parameter is stored."""
        return self.layout if self.stored is None else self.stored

    @property
    def owner(self) -> int:
        """The pipeline rank that stores the parameter, or that makes the output: the first of the users."""
        return self.users[0]


@dataclass(frozen=True, slots=True)
class CrossingTensor:
    """A tensor that a stage receives for every micro-batch.

    Attributes:
        name: the value that it is, as text (`autopar.ir.Value`).
        shape: sizes of a rank's part of it, for one micro-batch.
        dtype: its dtype.
        requires_grad: whether its gradient is sent back.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


@dataclass(frozen=True, slots=True)
class StageOutput:
    """One of the user's outputs, or a buffer's new value, as a stage makes it per micro-batch.

    Attributes:
        position: among the program's outputs, then its mutated buffers.
        result: among the results of the stage's module.
        state: what a micro-batch has of it: a part of a dim, all, or a part of a sum.
    """

    position: int
    result: int
    state: State


@dataclass(frozen=True, slots=True, eq=False)
class StageProgram:
    """What the ranks of one stage run for every micro-batch.

    Attributes:
        module: takes parts of the parameters, buffers and inputs, what `prologue` made, and what is received from each stage before
            in order of their numbers. Under the axis `autopar.ir.layout.MICROBATCH` it takes a micro-batch's part of all this.
        prologue: takes the buffers and inputs and gives what is computed once per step from the whole batch; None when nothing is.
        parameters, buffers: positions in the program's slots; inputs are all taken.
        receives: number of an earlier stage -> what it sends to this one.
        sends: number of a later stage -> what this one sends to it, each as (index of a result of the module, what it is).
        outputs: the results that are the user's outputs or new values of buffers.
    """

    module: torch.nn.Module
    prologue: torch.nn.Module | None
    parameters: tuple[int, ...]
    buffers: tuple[int, ...]
    receives: Mapping[int, tuple[CrossingTensor, ...]]
    sends: Mapping[int, tuple[tuple[int, CrossingTensor], ...]]
    outputs: tuple[StageOutput, ...]


@dataclass(frozen=True, slots=True, eq=False)
class PipelineProgram:
    """The stages and the order in which they run.

    Attributes:
        stages: the programs of this rank's stages, or of all, by number.
        schedule: the schedule of a training step, with messages.
        inference: the schedule of a forward without gradients, with messages.
        loss: position of the output that is the loss; None when the loss is computed outside.
        trained: names of the parameters that get a gradient from the loss, or from any output where the loss is computed outside.
        reached: position of an output -> names of the parameters that get a gradient from it.
        written: buffers that ops of the stages write to, such as running statistics; others get new values from the outputs.
        makers: the pipeline rank that makes each output and each new value of a buffer, by position.
        random: whether some op draws random numbers.
        float16: whether some value is in float16, whose gradients vanish if the loss isn't scaled.
    """

    stages: Mapping[int, StageProgram]
    schedule: Schedule
    inference: Schedule
    loss: int | None
    trained: frozenset[str]
    reached: Mapping[int, frozenset[str]]
    written: frozenset[str]
    makers: Mapping[int, int]
    random: bool
    float16: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """What one rank runs for one signature of inputs.

    Attributes:
        module: the local program; takes parts of the parameters, buffers and inputs, in this order.
        mesh: the axes that the program's collectives name.
        parameters, buffers, inputs, outputs: what goes in and comes out.
        captured: binds a user's call to the inputs, gives the outputs the user's structure.
        mutated_buffers: names of the buffers whose new values follow the user's outputs.
        regather: whether parameters that are gathered in the forward are gathered again in the backward, instead of saved for it.
        prefetch: how many blocks ahead these gathers are begun.
        batch_axes: the axes that split the batch, in the order in which they number the parts.
        pipeline: with stages or micro-batches, how they run; `module` then holds the modules of the stages. None without.
        bucket_nbytes: bytes of gradients that are summed over ranks together.
        settings: module and attribute -> number or name that the forward read when it was captured.
        constants: name -> value of those buffers that are no buffers of the model (`autopar.capture.Captured.constants`).
    """

    module: torch.nn.Module
    mesh: Mesh
    parameters: tuple[Slot, ...]
    buffers: tuple[Slot, ...]
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    captured: Signature
    mutated_buffers: tuple[str, ...] = ()
    regather: bool = False
    prefetch: int = 0
    batch_axes: tuple[str, ...] = ()
    pipeline: PipelineProgram | None = None
    bucket_nbytes: int = 0
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    settings: Mapping[tuple[str, str], Any] = field(default_factory=dict)
