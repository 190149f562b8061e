"""Which parameters' gradients are summed over which ranks, and how ZeRO stores them: the tables as `autopar.runtime.sums` takes them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from autopar.emit.support.described import Model, Parameter
from autopar.emit.support.ranks import Ranks, beside_stored
from autopar.ir import parse_layout, program_layout
from autopar.ops import GroupAxis
from autopar.runtime import dtensor, sums


def track(parameter: Parameter, leaf: Tensor, model: Model, ranks: Ranks) -> sums.TrackedParameter:
    """A parameter whose gradient is summed; `leaf` is this rank's part, or has its sizes."""
    reduced = getattr(torch, parameter.reduced) if parameter.reduced else None
    tracked = sums.TrackedParameter(parameter.name, _as_parameter(leaf), leaf, ranks.groups.get(parameter.summed), reduced)
    level = [(name, state) for name, state in zip(model.mesh.names, parse_layout(parameter.layout), strict=True) if state.level]
    if level:
        ((name, state),) = level
        axis = ranks.axes[name]
        assert isinstance(axis, GroupAxis), "the ranks are processes"
        whole = parameter.shape[state.dim] if state.padded else None
        tracked.held = sums.Held(axis, state.dim, state.level, name in parameter.summed, whole)
        tracked.group = ranks.groups.get(beside_stored(model, parameter.layout, parameter.summed))
    return tracked


def _as_parameter(leaf: Tensor) -> nn.Parameter:
    """The same storage as an `nn.Parameter`, by which sums of the original library know their parameter."""
    return nn.Parameter(leaf.detach(), requires_grad=leaf.requires_grad)


def make_leaf(parameter: Parameter, model: Model, ranks: Ranks, *, as_stored: bool) -> Tensor:
    """A leaf of the sizes of what is stored of a parameter, or of what programs take, without memory: it only gets gradients."""
    layout = parse_layout(parameter.layout)
    shape = dtensor.shape_of_part(parameter.shape, layout if as_stored else program_layout(layout), model.mesh, ranks.place)
    leaf = torch.zeros((), dtype=getattr(torch, parameter.dtype), device=ranks.device).expand(shape)
    return leaf.requires_grad_(parameter.trained)
