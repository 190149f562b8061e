"""Private parts of torch's optimizers, each under a name that says what autopar uses it for; beside `autopar.torch_compat`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.optim._muon as muon
from torch import Tensor
from torch.optim import Optimizer

from autopar.replaced import on_this_thread, replaced

__all__ = ["copy_each", "scale_each", "states_loaded_as", "wrap_orthogonalization"]


def wrap_orthogonalization(wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> None:
    """Wrap the function by which ``torch.optim.Muon`` orthogonalizes an update, its first argument."""
    muon._zeropower_via_newtonschulz = wrap(muon._zeropower_via_newtonschulz)


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, which may have another dtype; one kernel for many of them where the device has one."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def scale_each(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply tensors in place by a scalar on their device."""
    if tensors:
        torch._foreach_mul_(list(tensors), factor)


@contextmanager
def states_loaded_as(dtype_of: Callable[[Tensor], torch.dtype]) -> Iterator[None]:
    """Inside, on this thread, ``load_state_dict`` of optimizers loads states as if each parameter had the dtype that this function names.

    Torch casts all states but the number of steps to their parameter's dtype.
    """
    own: Callable[..., Tensor] = Optimizer._process_value_according_to_param_policy

    def load(parameter: Tensor, *others: Any, **options: Any) -> Tensor:
        return own(torch.empty((), dtype=dtype_of(parameter), device=parameter.device), *others, **options)

    with replaced(Optimizer, "_process_value_according_to_param_policy", staticmethod(on_this_thread(load, own))):
        yield
