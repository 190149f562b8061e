"""What users made from parameters before the parameters had their place: optimizers and their states, lists, copies.

Comes in: parameters that `autopar.compile` replaced, or that the first plan stores elsewhere. Goes out: the user's objects, which go on
meaning the model's parameters. There are three kinds:

- a parameter from before `autopar.compile`, in an optimizer or a list: optimizers are pointed to the new parameter, and the object itself
  becomes a `ReplacedParameter`, by which every op means the new one;
- an alias of a parameter from before the first plan, such as a value of ``state_dict()``: it goes on sharing the parameter's storage;
- a state of an optimizer that is a whole plain tensor, as loaded from a single device's checkpoint, or that was made before the first
  plan: before a step it becomes a DTensor that is stored as its parameter is.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils import _pytree as pytree

from autopar import torch_compat, torch_optim_compat
from autopar.runtime.dispatch import as_stored, gather, is_ours, is_temporary, move, place

# --- parameters that `autopar.compile` replaced -----------------------------------------------------------------------------------


class ReplacedParameter(nn.Parameter):
    """A parameter from before `autopar.compile`: all that is done with it is done with the parameter that took its place."""

    replacement: nn.Parameter

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Call `func` with the parameters that took these ones' places."""
        args, kwargs = pytree.tree_map_only(ReplacedParameter, find_replacement, (args, dict(kwargs or {})))
        return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What pickle saves is the parameter that took this one's place."""
        return find_replacement(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def find_replacement(parameter: ReplacedParameter) -> nn.Parameter:
    """The parameter that took the place of this one."""
    replacement: nn.Parameter = parameter.__dict__["replacement"]
    return replacement


def replace_parameters(replaced: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Let what holds one of these parameters mean the one in its place: optimizers at once, other holders when they use it."""
    new_of = {id(old): new for old, new in replaced.items()}
    for optimizer in _find_optimizers():
        _point_to_new(optimizer, new_of)
    for old, new in replaced.items():
        if type(old) is nn.Parameter:
            # The new parameter has the storage now, so the old object must not keep it alive.
            old.data = old.data.new_empty(0)
            old.__class__ = ReplacedParameter
            old.__dict__["replacement"] = new


def _find_optimizers() -> list[Optimizer]:
    # By type, since some libraries' objects import modules when they are asked for ``__class__``; and each type once, which is quicker.
    objects = gc.get_objects()
    types = {kind for kind in set(map(type, objects)) if issubclass(kind, Optimizer)}
    return [x for x in objects if type(x) in types] if types else []


def _point_to_new(optimizer: Optimizer, new_of: Mapping[int, nn.Parameter]) -> None:
    # One whose constructor failed, and which a traceback holds, has no groups.
    for group in vars(optimizer).get("param_groups", ()):
        parameters = group["params"]
        for position, parameter in enumerate(parameters):
            new = new_of.get(id(parameter))
            if new is not None:
                parameters[position] = new
                if parameter in optimizer.state:
                    optimizer.state[new] = {name: _as_state(value, new) for name, value in optimizer.state.pop(parameter).items()}


# --- aliases of parameters ----------------------------------------------------------------------------------------------------------


def follow_parameters(moved: Iterable[tuple[Tensor, DTensor]]) -> None:
    """Let aliases of parameters, made before the first plan, share the storage that their parameters have now.

    Args:
        moved: the whole local tensor before the plan of each parameter that has aliases, and the parameter.
    """
    parameter_at = {(whole.data_ptr(), tuple(whole.shape)): parameter for whole, parameter in moved if whole.numel() and not whole.is_meta}
    if not parameter_at:
        return  # the search through all objects takes a while
    for x in [x for x in gc.get_objects() if type(x) is DTensor]:
        if not torch_compat.is_made(x) or not is_temporary(x.device_mesh):
            continue
        parameter = parameter_at.get((torch_compat.address_of(x), tuple(x.shape)))
        if parameter is not None and x.dtype == parameter.dtype:
            torch_compat.exchange_part(x, torch_compat.local_of(parameter), parameter._spec)


# --- states of optimizers -----------------------------------------------------------------------------------------------------------


def _as_state(value: Any, parameter: Tensor) -> Any:
    """A state as its parameter is stored, where it is a whole value of the parameter's sizes."""
    if not isinstance(value, Tensor) or not parameter.dim() or value.shape != parameter.shape:
        return value
    if not isinstance(value, DTensor):
        return as_stored(value.detach(), parameter)
    if isinstance(parameter, DTensor) and value.device_mesh != parameter.device_mesh and is_temporary(value.device_mesh):
        move(value, parameter)
    return value


def _prepare_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Called before every step of every optimizer: its parameters are the model's, and its states are stored as they are."""
    torch_compat.count_plain_as_replicated()
    state = optimizer.state
    for group in optimizer.param_groups:
        for position, parameter in enumerate(group["params"]):
            if type(parameter) is ReplacedParameter:
                # Made after `compile`, from a list that was made before.
                _point_to_new(optimizer, {id(parameter): find_replacement(parameter)})
                parameter = group["params"][position]
            if type(parameter) is DTensor:
                if parameter not in state or not is_ours(parameter.device_mesh):
                    continue
                states, mesh = state[parameter], parameter.device_mesh
                for name, value in states.items():
                    if isinstance(value, Tensor) and (type(value) is not DTensor or value.device_mesh is not mesh):
                        states[name] = _as_state(value, parameter)
            elif isinstance(parameter.grad, DTensor):
                # A plain parameter beside the model, in a loss with weights of the model.
                parameter.grad = gather(parameter.grad)


def _orthogonalize(torch_function: Callable[..., Tensor], update: Tensor, *options: Any) -> Tensor:
    """The orthogonalized update of a whole matrix: in bfloat16, products of parts would round otherwise than on one device."""
    if not isinstance(update, DTensor):
        return torch_function(update, *options)
    return place(torch_function(gather(update), *options), update)


@functools.cache
def teach_optimizers() -> None:
    """Let all optimizers prepare their steps so; a second call changes nothing."""
    register_optimizer_step_pre_hook(_prepare_step)
    torch_optim_compat.wrap_orthogonalization(lambda torch_function: functools.partial(_orthogonalize, torch_function))
