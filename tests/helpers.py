"""Comparisons that tests share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def tree_allclose(actual: Any, expected: Any, *, rtol: float = 1e-9) -> int:
    """Assert that two nested structures hold equal tensors, and return how many were compared.

    Two tensors are equal when no element differs by more than `rtol` times the largest element of the expected one, so that
    elements that cancel to nearly zero don't ask for more digits than the sum had. Keys, lengths, shapes, dtypes and the
    places of None must agree; a comparison of nothing fails.
    """
    pairs = list(_pair("", actual, expected))
    assert pairs, "nothing was compared: neither structure holds a tensor"
    for path, got, want in pairs:
        assert got.shape == want.shape, f"{path}: shape {tuple(got.shape)} instead of {tuple(want.shape)}"
        assert got.dtype == want.dtype, f"{path}: dtype {got.dtype} instead of {want.dtype}"
        assert torch.isfinite(want).all(), f"{path}: the expected tensor isn't finite"
        if want.numel() == 0:
            continue
        error = (got - want).abs().max().item() if want.is_floating_point() else float((got != want).sum())
        limit = rtol * max(want.abs().max().item(), torch.finfo(want.dtype).tiny) if want.is_floating_point() else 0.0
        assert error <= limit, f"{path}: largest difference {error:.3e}, allowed {limit:.3e}"
    assert any(want.numel() for _, _, want in pairs), "nothing was compared: every tensor is empty"
    return len(pairs)


def _pair(path: str, actual: Any, expected: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Walk two structures side by side and yield their tensors with the path to them."""
    if isinstance(expected, Tensor | bool | int | float):
        assert isinstance(actual, Tensor | bool | int | float), f"{path or '.'}: {type(actual).__name__} instead of a tensor"
        yield path or ".", torch.as_tensor(actual).detach(), torch.as_tensor(expected).detach()
    elif isinstance(expected, Mapping):
        assert isinstance(actual, Mapping), f"{path or '.'}: {type(actual).__name__} instead of a mapping"
        assert set(actual) == set(expected), f"{path or '.'}: keys {sorted(set(actual) ^ set(expected), key=str)} differ"
        for key, value in expected.items():
            yield from _pair(f"{path}.{key}", actual[key], value)
    elif isinstance(expected, list | tuple):
        assert isinstance(actual, list | tuple), f"{path or '.'}: {type(actual).__name__} instead of a sequence"
        assert len(actual) == len(expected), f"{path or '.'}: {len(actual)} items instead of {len(expected)}"
        for index, value in enumerate(expected):
            yield from _pair(f"{path}[{index}]", actual[index], value)
    elif dataclasses.is_dataclass(expected) and not isinstance(expected, type):
        assert type(actual) is type(expected), f"{path or '.'}: {type(actual).__name__} instead of {type(expected).__name__}"
        for field in dataclasses.fields(expected):
            yield from _pair(f"{path}.{field.name}", getattr(actual, field.name), getattr(expected, field.name))
    else:
        assert actual is expected or actual == expected, f"{path or '.'}: {actual!r} instead of {expected!r}"


def read_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every parameter's gradient; a trainable parameter without one fails the test."""
    missing = [name for name, parameter in module.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert not missing, f"no gradient for {missing}"
    return {name: p.grad.detach().clone() for name, p in module.named_parameters() if p.grad is not None}


CLOSE = {"rtol": 1e-9, "atol": 1e-12}
"""How near to one device float64 must be."""


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients that there are, by parameter, whole on every rank."""
    return {name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for name, p in model.named_parameters() if p.grad is not None}


def assert_agree(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Both have the same names, and tensors that are `CLOSE`."""
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(actual[name], x, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
