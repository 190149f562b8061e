"""Methods of a compiled model beside its forward: submodules that are called, ``generate``, ``save_pretrained``.

Comes in: calls of the user's modules outside of our programs. Goes out: what they give on one device. A module that is called so gathers
its own parameters for the time of its forward, through which gradients flow back to the parameters. Methods that save run on the first
rank, with the whole model in its memory.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autopar.errors import InputError
from autopar.runtime.checkpoints import full_state_dict
from autopar.runtime.dispatch import gather, take_plain_gradients

logger = logging.getLogger("autopar")

SAVING = frozenset({"save_pretrained", "push_to_hub"})
"""Names of methods that write a whole model to files."""

# --- modules called outside of programs ---------------------------------------------------------------------------------------------

_stored: WeakKeyDictionary[nn.Module, list[dict[str, Any]]] = WeakKeyDictionary()
"""Per module that is running now, the parameters that it had before, once per call in it."""


def gather_when_called(model: nn.Module, *, is_local: bool) -> None:
    """Let every module in `model` that has parameters of its own gather them when it is called outside of our programs.

    Where ranks pass samples of their own (`is_local`), each has a loss of its own, and the gradient is that of their mean, as under DDP.
    """
    for module in model.modules():
        if any(parameter is not None for parameter in module._parameters.values()):
            module.register_forward_pre_hook(functools.partial(_gather_parameters, is_local), prepend=True)
            module.register_forward_hook(_put_back, always_call=True)


def _gather_parameters(is_local: bool, module: nn.Module, args: Any) -> None:
    """Called before a forward. Under capture, and inside another call of the module, the parameters are plain already."""
    stored: dict[str, Any] = {name: parameter for name, parameter in module._parameters.items() if isinstance(parameter, DTensor)}
    _stored.setdefault(module, []).append(stored)
    if not stored:
        return
    if not _said:
        _said.append(True)
        logger.warning(
            "%s runs outside of the compiled program, on parameters that are gathered for each call: it is right, and slower than "
            "calling the compiled model",
            type(module).__name__,
        )
    for name, parameter in stored.items():
        module._parameters[name] = _whole(parameter, is_local)  # type: ignore[assignment]
    refresh_flat_weights(module)


_said: list[bool] = []


def _put_back(module: nn.Module, args: Any, output: Any) -> None:
    calls = _stored.get(module)
    if calls:
        stored = calls.pop()
        if stored:
            module._parameters.update(stored)
            refresh_flat_weights(module)


def _whole(parameter: DTensor, is_local: bool) -> Tensor:
    """The whole of a parameter, through which its gradient flows back."""
    if torch.is_grad_enabled() and parameter.requires_grad:
        whole = parameter.full_tensor()
        take_plain_gradients([whole])
        if is_local:
            whole.register_hook(functools.partial(_average, parameter.device_mesh))  # type: ignore[no-untyped-call]
        return whole
    return gather(parameter)


def _average(mesh: DeviceMesh, gradient: Tensor) -> Tensor:
    """The mean over the ranks of a mesh."""
    mean = (gradient / mesh.size()).contiguous()  # as NCCL wants it
    for axis in range(mesh.ndim):
        dist.all_reduce(mean, group=mesh.get_group(axis))
    return mean


def refresh_flat_weights(module: nn.Module) -> None:
    """Let a recurrent module, which has a list of its parameters beside them, list those that it has now."""
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [module._parameters.get(name) for name in module._flat_weights_names]


# --- methods that save ------------------------------------------------------------------------------------------------------------------


def save_on_first_rank(model: nn.Module, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a method of `model` that saves it, on the first rank and with whole parameters; every rank must call this.

    Returns what the method does on the first rank, None on the others, once the files are written. An error of the first rank is raised
    on every rank.
    """
    whole = full_state_dict(dict(model.named_parameters(remove_duplicate=False)))
    result, failure = None, ""
    if dist.get_rank() == 0:
        try:
            with _whole_parameters(model, whole):
                result = method(*args, **kwargs)
        except Exception as error:  # the other ranks wait for an answer, whatever it is
            _agree(f"{type(error).__name__}: {error}")
            raise
    failure = _agree(failure)
    if failure:
        raise InputError(f"on the first rank: {failure}")
    return result


def _agree(failure: str) -> str:
    """The first rank's failure, on every rank."""
    said = [failure]
    dist.broadcast_object_list(said, 0)
    return said[0]


@contextmanager
def _whole_parameters(model: nn.Module, whole: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the model's parameters are these whole ones."""
    before = [(path, module, dict(module._parameters)) for path, module in model.named_modules(remove_duplicate=False)]
    made: dict[int, nn.Parameter] = {}
    try:
        for path, module, parameters in before:
            for name, parameter in parameters.items():
                if parameter is not None:
                    value = whole[f"{path}.{name}" if path else name]
                    module._parameters[name] = made.setdefault(id(parameter), nn.Parameter(value, parameter.requires_grad))
        yield
    finally:
        for _, module, parameters in before:
            module._parameters.update(parameters)
