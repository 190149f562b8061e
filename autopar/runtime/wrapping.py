"""What other libraries do to a model before they train it, and how a compiled model answers.

Comes in: attempts to wrap a compiled model once more. Goes out: an error in our words where the wrapper would split or sum again what is
split and summed already; or the attribute by which a library leaves the model as it is.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NoReturn

from torch import nn

from autopar import torch_compat
from autopar.errors import InputError

HOW = (
    "a compiled model is parallel already: train it as it is, without DistributedDataParallel, FSDP or fully_shard around it or its "
    "modules. With Accelerate prepare the model, the optimizer and the loader as always; with Fabric use setup_optimizers() and "
    "setup_dataloaders(), and not setup(); give the Trainer the compiled model"
)


def refuse_wrapper(wrapper: str) -> NoReturn:
    """Raise InputError: the model is wrapped already."""
    raise InputError(f"{wrapper} around a compiled model: {HOW}")


class _Refusal(OrderedDict[Any, Any]):
    """Stands where torch notes which of its composable functions were applied to a module, and refuses more of them."""

    def __contains__(self, function: object) -> bool:
        refuse_wrapper(getattr(function, "__name__", str(function)))


def refuse_wrappers(module: nn.Module) -> None:
    """Let ``fully_shard`` and torch's other composable functions refuse a module."""
    module.__dict__.setdefault(torch_compat.COMPOSABLE_STATES, _Refusal())


class Unwrapped:
    """Attributes of a compiled model that wrappers look at first."""

    # Accelerate leaves a model alone that has been prepared.
    _is_accelerate_prepared = True
    # The Trainer computes its own mean over the batches of a step, which a model that returns its loss has computed.
    accepts_loss_kwargs = False

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> NoReturn:
        refuse_wrapper("DistributedDataParallel")

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, unless it is FSDP's mark of a module that it manages."""
        if name == "_is_fsdp_managed_module":
            refuse_wrapper("FullyShardedDataParallel")
        super().__setattr__(name, value)
