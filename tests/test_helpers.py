"""The comparison that other tests rely on: it must be seen to fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import read_gradients, tree_allclose
from torch import nn


def test_equal_trees_pass_and_are_counted() -> None:
    tree = {"a": torch.ones(3), "b": [torch.zeros(2), None, (torch.arange(4),)], "c": 1.5}
    assert tree_allclose(tree, tree) == 4


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        ({}, {}, "nothing was compared"),
        (torch.zeros(0), torch.zeros(0), "every tensor is empty"),
        ([None], [None], "nothing was compared"),
        (torch.ones(3), torch.ones(3) * (1 + 1e-5), "largest difference"),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "largest difference"),
        (torch.full((2,), float("nan")), torch.ones(2), "largest difference"),
        (torch.ones(2), torch.full((2,), float("nan")), "isn't finite"),
        (torch.zeros(2), torch.full((2,), 1e-30), "largest difference"),
        (torch.ones(3), torch.ones(1, 3), "shape"),
        (torch.ones(3), torch.ones(3, dtype=torch.float64), "dtype"),
        ({"a": torch.ones(1)}, {"b": torch.ones(1)}, "keys"),
        ([torch.ones(1)], [torch.ones(1)] * 2, "items"),
        ([torch.ones(1), None], [torch.ones(1), torch.ones(1)], "instead of a tensor"),
        ([torch.ones(1), torch.ones(1)], [torch.ones(1), None], "instead of None"),
    ],
)
def test_unequal_trees_fail(actual: Any, expected: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        tree_allclose(actual, expected, rtol=1e-9)


def test_a_parameter_without_gradient_fails() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    model["used"](torch.ones(1, 2)).sum().backward()
    with pytest.raises(AssertionError, match=r"unused\.weight"):
        read_gradients(model)
    assert set(read_gradients(model["used"])) == {"weight", "bias"}
