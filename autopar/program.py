"""The local program of a rank, as the rewrite makes it and the runtime runs it: an fx module and what its tensors are.

The module is called with the parts that this rank stores, in the order of the slots: parameters, buffers, inputs. It returns
the user's outputs, then the new values of `mutated_buffers`. Within it, collectives name the axes of `mesh`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from autopar.layout import Layout, Mesh


class Signature(Protocol):
    """How a user's call maps to the flat tensors of the program and back (`autopar.capture.Captured`)."""

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Flatten a call to its tensors, in the order of the program's inputs; InputError when the call doesn't fit."""
        ...

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """Give the flat outputs the structure that the user's model returns."""
        ...


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor that goes into or comes out of the program.

    Attributes:
        name: the user's name of the parameter, buffer, input or output.
        layout: per mesh axis Shard or Replicate; what the program takes or gives.
        shape: global sizes.
        dtype: torch's name without the ``torch.`` prefix.
        partial_axes: for a parameter, the axes over which its local gradient still has to be summed, once per step.
        requires_grad: whether the tensor takes part in the backward.
    """

    name: str
    layout: Layout
    shape: tuple[int, ...]
    dtype: str
    partial_axes: tuple[str, ...] = ()
    requires_grad: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """What one rank runs for one signature of inputs.

    Attributes:
        module: the local program; takes parts of the parameters, buffers and inputs, in this order.
        mesh: the axes that the program's collectives name.
        parameters, buffers, inputs, outputs: what goes in and comes out.
        captured: binds a user's call to the inputs, gives the outputs the user's structure.
        mutated_buffers: names of the buffers whose new values follow the user's outputs.
        regather: gathered parameters are gathered again in the backward instead of kept.
        batch_axes: the axes that split the batch, in the order in which they number the parts.
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
    batch_axes: tuple[str, ...] = ()
