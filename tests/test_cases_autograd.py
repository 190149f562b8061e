"""Gradients asked for by other means than ``loss.backward()``, and parameters of several models, on two processes and on one device.

All loops run in one pair of processes, in float64; each is a test of its own, which reads what its loop raised there.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

import autopar
from autopar.errors import InputError
from tests.processes import spawn

PLANS: Mapping[str, Mapping[str, object]] = {"dp": {"dp": 2}, "fsdp": {"dp": 2, "fsdp": True}, "tp": {"tp": 2}}
PIPELINE: Mapping[str, object] = {"pp": 2, "schedule": "1f1b", "microbatches": 4}


class Regression(nn.Module):
    """Returns its loss."""

    def __init__(self, body: nn.Module | None = None, width: int = 4) -> None:
        super().__init__()
        self.body = body or nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh())
        self.head = nn.Linear(8, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).square().mean()


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _rows(seed: int = 0) -> Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))


def _models(pins: Mapping[str, object]) -> tuple[nn.Module, nn.Module]:
    """A model for one device, and a compiled one with the same parameters."""
    torch.manual_seed(0)
    reference = Regression()
    return reference, autopar.compile(copy.deepcopy(reference), pins=pins)


def _assert_alike(model: nn.Module, reference: nn.Module, compare: Callable[[nn.Module], list[Tensor]]) -> None:
    for actual, expected in zip(compare(model), compare(reference), strict=True):
        torch.testing.assert_close(_whole(actual).detach(), expected.detach(), rtol=1e-9, atol=1e-12)


def gradients_of_parameters() -> None:
    """As in gradient norms of tasks and influence functions; `grad` of the parameters stays empty."""

    def compare(model: nn.Module) -> list[Tensor]:
        gradients = torch.autograd.grad(model(_rows()), list(model.parameters()))
        assert all(parameter.grad is None for parameter in model.parameters())
        return list(gradients)

    for pins in (*PLANS.values(), PIPELINE):
        reference, model = _models(pins)
        _assert_alike(model, reference, compare)
        _assert_alike(model, reference, compare)


def a_penalty_on_the_gradients_of_parameters() -> None:
    def compare(model: nn.Module) -> list[Tensor]:
        model.zero_grad()
        loss = model(_rows())
        gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        (loss + sum(_whole(gradient).square().sum() for gradient in gradients)).backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    for pins in PLANS.values():
        reference, model = _models(pins)
        _assert_alike(model, reference, compare)


def a_second_derivative_of_a_pipeline_is_refused() -> None:
    _, model = _models(PIPELINE)
    with pytest.raises(InputError, match="create_graph"):
        torch.autograd.grad(model(_rows()), list(model.parameters()), create_graph=True)


def a_step_inside_of_a_step() -> None:
    """Meta-learning: the loss after a step is differentiated through the step."""

    def compare(model: nn.Module) -> list[Tensor]:
        named = dict(model.named_parameters())
        gradients = torch.autograd.grad(functional_call(model, named, (_rows(1),)), list(named.values()), create_graph=True)
        stepped = {name: parameter - 0.1 * gradient for (name, parameter), gradient in zip(named.items(), gradients, strict=True)}
        return list(torch.autograd.grad(functional_call(model, stepped, (_rows(2),)), list(named.values())))

    for pins in PLANS.values():
        reference, model = _models(pins)
        _assert_alike(model, reference, compare)


def shared_body_of_two_models() -> None:
    """Actor and critic: the gradient of the body is the sum of both models'."""
    for pins in PLANS.values():
        gradients = []
        for compiles in (False, True):
            torch.manual_seed(0)
            body = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh())
            models: list[nn.Module] = [Regression(body, 2), Regression(body, 6)]
            if compiles:
                models = [autopar.compile(model, pins=pins) for model in models]
            for number, model in enumerate(models):
                model(_rows(number)).backward()
            gradients.append([_whole(parameter.grad) for parameter in models[0].body.parameters() if parameter.grad is not None])  # type: ignore[union-attr]
        assert len(gradients[0]) == len(gradients[1]) == 4
        for actual, expected in zip(gradients[1], gradients[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def a_backward_of_some_parameters() -> None:
    def compare(model: nn.Module) -> list[Tensor]:
        model.zero_grad()
        chosen = list(model.parameters())[:2]
        model(_rows()).backward(inputs=chosen)
        assert [parameter.grad is None for parameter in model.parameters()] == [False, False, True, True, True, True]
        return [parameter.grad for parameter in chosen if parameter.grad is not None]

    for pins in PLANS.values():
        reference, model = _models(pins)
        _assert_alike(model, reference, compare)


def accumulated_and_freed() -> None:
    """Two calls before one backward, a backward of a kept graph, accumulation; hooks of parameters see the step's gradient once."""

    def compare(model: nn.Module) -> list[Tensor]:
        model.zero_grad()
        seen: list[Tensor] = []
        handle = next(iter(model.parameters())).register_hook(lambda gradient: seen.append(_whole(gradient).clone()))
        (model(_rows(1)) + model(_rows(2))).backward()
        loss = model(_rows(3))
        loss.backward(retain_graph=True)
        loss.backward()
        handle.remove()
        return [torch.stack(seen).sum(0), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]

    for pins in PLANS.values():
        reference, model = _models(pins)
        _assert_alike(model, reference, compare)


def input_grad() -> None:
    def compare(model: nn.Module) -> list[Tensor]:
        x = _rows().requires_grad_()
        return list(torch.autograd.grad(model(x), [x]))

    for pins in PLANS.values():
        reference, model = _models(pins)
        _assert_alike(model, reference, compare)


LOOPS: tuple[Callable[[], None], ...] = (
    gradients_of_parameters,
    a_penalty_on_the_gradients_of_parameters,
    a_second_derivative_of_a_pipeline_is_refused,
    a_step_inside_of_a_step,
    shared_body_of_two_models,
    a_backward_of_some_parameters,
    accumulated_and_freed,
    input_grad,
)


def _run_all(rank: int, folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    for loop in LOOPS:
        try:
            loop()
            text = ""
        except Exception:
            text = traceback.format_exc()
        (folder / f"{loop.__name__}.{rank}").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each loop raised on each rank, empty if it went well."""
    folder = tmp_path_factory.mktemp("loops")
    spawn(2, folder, _run_all, folder)
    return folder


@pytest.mark.processes
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_on_two_ranks(loop: Callable[[], None], outcomes: Path) -> None:
    for rank in range(2):
        text = (outcomes / f"{loop.__name__}.{rank}").read_text(encoding="utf-8")
        assert not text, f"rank {rank}: {text}"
