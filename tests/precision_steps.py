"""One training step of a model of the zoo in a precision, on a single device and compiled: its loss and every gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import autopar
from autopar.capture import call_in_precision
from autopar.ir.precision import Precision
from tests.zoo import ZOO, in_float64

MODELS = ("gpt2", "llama", "bert", "vit")


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of the zoo and a batch for it, in a dtype."""
    model, batch = ZOO[name]()
    # Transformers compute norms and losses in float32 whatever the model's dtype.
    model = model.to(dtype)
    if dtype == torch.float64 and name in ("gpt2", "llama"):
        model = in_float64(model)
    return model, {key: x.to(dtype) if x.is_floating_point() else x for key, x in batch.items()}


def loss_of(output: Any) -> Tensor:
    """The loss in what a model of the zoo returns."""
    loss: Tensor = output if isinstance(output, Tensor) else output.loss
    return loss


def step_of_one_device(name: str, precision: Precision, dtype: torch.dtype = torch.float32) -> Mapping[str, Tensor]:
    """``loss``, and the gradients by name of the parameter, of plain torch in this process under a policy."""
    model, batch = build(name, dtype)
    loss = loss_of(call_in_precision(model, (), batch, precision))
    loss.backward()
    return {"loss": loss.detach(), **{path: p.grad for path, p in model.named_parameters() if p.grad is not None}}


def step_in_parallel(
    name: str, pins: Mapping[str, object], precision: Any, dtype: torch.dtype = torch.float32
) -> tuple[autopar.Plan, Mapping[str, Tensor]]:
    """The plan that the pins lead to over all processes, and what `step_of_one_device` gives, of the compiled model."""
    model, batch = build(name, dtype)
    compiled = autopar.compile(model, precision=precision, pins=pins)
    loss = loss_of(compiled(**batch))
    loss.backward()
    for p in compiled.parameters():
        assert p.dtype == dtype
        assert p.grad is None or p.grad.dtype == dtype
    gradients = {path: p.grad.full_tensor() for path, p in compiled.named_parameters() if p.grad is not None}
    return compiled.plan, {"loss": loss.detach(), **gradients}


def largest_error(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference of an element, by the largest element of its tensor or a thousandth of that of all.

    Some gradients, such as that of a key's bias, are zero but for rounding.
    """
    assert actual.keys() == expected.keys()
    largest = max(float(x.abs().max()) for x in expected.values())
    return max(float((actual[name] - x).abs().max()) / max(float(x.abs().max()), 1e-3 * largest) for name, x in expected.items())
