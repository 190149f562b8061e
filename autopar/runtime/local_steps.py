"""Steps of elementwise optimizers over the parts that this rank stores, without a dispatch of DTensors for each op.

Comes in: the lists of parameters, gradients and states that an optimizer of ``torch.optim`` hands to the function that updates them, such
as `torch.optim.adam.adam`. Goes out: the same function's updates, made to the parts as plain tensors, so that its kernels for lists of
tensors and its fused ones run as they do on one device. What each of these functions does to an element depends on that element's
gradient, its states and numbers of the whole parameter alone, such as how many steps it has made; so parts need nothing of each other.

All that is around these functions stays as it is: which parameters have a gradient, how states begin, hooks, closures and schedules. The
optimizer's states are DTensors before and after. Torch's own way is taken where parts don't fit together (a gradient that is stored
otherwise than its parameter), under ``differentiable=True``, and by optimizers that call other functions.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement

from autopar import torch_compat
from autopar.runtime.dispatch import gather, is_ours
from autopar.torch_compat import DTensorSpec

ELEMENTWISE = ("adadelta", "adagrad", "adam", "adamax", "asgd", "nadam", "radam", "rmsprop", "rprop", "sgd")
"""Modules of ``torch.optim`` whose function of the same name updates each element for itself; `AdamW` calls ``adam`` too."""

_NUMBERS = {"state_steps", "mu_products", "mus", "etas"}
"""Arguments with one number for each parameter, which every rank has whole."""

Lists = Sequence[list[Any]]
"""For each of a function's first arguments its list: a tensor for each parameter, or nothing where the optimizer has no such state."""


def _run_on_parts(function: Callable[..., None], names: Sequence[str], *args: Any, **options: Any) -> None:
    """Call an optimizer's function with this rank's parts, where it can be; `names` are its arguments that are lists."""
    lists = args[: len(names)]
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or len(lists) < len(names):
        return function(*args, **options)
    specs = _find_specs(lists[0])
    parts = None if specs is None else _find_parts(specs, lists, names)
    if specs is None or parts is None:
        return function(*args, **options)
    rest = (gather(x) if isinstance(x, Tensor) else x for x in args[len(names) :])
    function(*parts, *rest, **{name: gather(x) if isinstance(x, Tensor) else x for name, x in options.items()})
    _bring_back(specs, lists, parts)
    # Autograd refuses a backward that needs what was changed since; it asks the DTensor, of which torch counts no changes of its part.
    torch.autograd.graph.increment_version([p for p, spec in zip(lists[0], specs, strict=True) if spec is not None])


def _find_specs(parameters: Sequence[Tensor]) -> list[DTensorSpec | None] | None:
    """How each parameter is stored, None for a plain one; None where none is a compiled model's, or another library's is among them."""
    specs: list[DTensorSpec | None] = []
    mesh = None
    for p in parameters:
        if type(p) is not DTensor:
            if isinstance(p, DTensor):
                return None
            specs.append(None)
            continue
        spec = torch_compat.spec_of(p)
        if spec.mesh is not mesh:
            mesh = spec.mesh
            if not is_ours(mesh):
                return None
        specs.append(spec)
    return None if mesh is None else specs


def _find_parts(specs: Sequence[DTensorSpec | None], lists: Lists, names: Sequence[str]) -> list[list[Any]] | None:
    """The lists with parts in the place of DTensors; None where a tensor isn't stored as its parameter is."""
    parts: list[list[Any]] = []
    for name, values in zip(names, lists, strict=True):
        if name in _NUMBERS:
            if any(isinstance(x, DTensor) for x in values):
                return None
            parts.append(list(values))
            continue
        column: list[Any] = []
        # Some lists of states are empty, such as that of the largest second moments without ``amsgrad``.
        for x, spec in zip(values, specs, strict=False):
            if type(x) is not DTensor:
                if spec is not None and x is not None and not (x.dim() == 0 and all(map(_is_replicate, spec.placements))):
                    return None
                column.append(x)
                continue
            own = torch_compat.spec_of(x)
            if own is not spec and (spec is None or own.mesh is not spec.mesh or own.placements != spec.placements):
                return None
            part = torch_compat.part_of(x)
            if type(part) is not Tensor:
                return None  # one that is still on its way
            column.append(part)
        parts.append(column)
    return parts


def _is_replicate(placement: Placement) -> bool:
    return placement.is_replicate()


def _bring_back(specs: Sequence[DTensorSpec | None], lists: Lists, parts: Lists) -> None:
    """Hand out the states that the function made, such as the momentum of SGD in its first step, stored as their parameters are."""
    for values, column in zip(lists, parts, strict=True):
        for position, (before, after) in enumerate(zip(values, column, strict=True)):
            if before is None and after is not None:
                spec = specs[position]
                values[position] = after if spec is None else torch_compat.with_spec(after, spec)


@functools.cache
def teach_local_steps() -> None:
    """Let the elementwise optimizers of ``torch.optim`` update parts of compiled models' parameters; a second call changes nothing."""
    for name in ELEMENTWISE:
        module: Any = importlib.import_module(f"torch.optim.{name}")
        function = getattr(module, name)
        arguments = inspect.signature(function).parameters.values()
        lists = tuple(x.name for x in arguments if x.default is x.empty and x.kind is x.POSITIONAL_OR_KEYWORD)
        setattr(module, name, functools.wraps(function)(functools.partial(_run_on_parts, function, lists)))
