"""The linear model by itself: bounds, what is freed and fixed, and a solver that fails."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autopar.search import linear_model
from autopar.search.linear_model import LinearModel


def knapsack() -> LinearModel:
    """At most 10 of weights 6, 5, 5, worth 7, 5, 5: the last two, worth 10; in fractions 7 + 4 / 5 * 5 = 11."""
    model = LinearModel()
    columns = model.add_variables(np.array([-7, -5, -5]), is_integer=True)
    model.add_row(columns, np.array([6, 5, 5]), -np.inf, 10.0)
    return model


def test_whole_and_relaxed() -> None:
    whole = knapsack().solve(10)
    assert whole.values is not None
    assert whole.values.round().tolist() == [0, 1, 1]
    assert whole.bound == pytest.approx(-10)
    relaxed = knapsack().solve(10, free=np.arange(3))
    assert relaxed.bound == pytest.approx(-11)
    first = knapsack().solve(10, free=np.array([1, 2]))
    assert first.values is not None
    assert first.bound == pytest.approx(-11)
    assert first.values[0] == pytest.approx(1)


def test_fixed_variables_stay() -> None:
    fixed = knapsack().solve(10, fixed=(np.array([0]), np.array([1.0])))
    assert fixed.values is not None
    assert fixed.values.round().tolist() == [1, 0, 0]
    nothing = knapsack().solve(10, fixed=(np.array([0, 1]), np.array([1.0, 1.0])))
    assert nothing.is_infeasible
    assert nothing.values is None


def test_an_error_of_the_solver_is_tried_again_and_then_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = linear_model._solve, []

    def fails(times: int) -> None:
        def solve(model: object, parameters: object) -> object:
            calls.append(parameters)
            if len(calls) <= times:
                raise AttributeError("kError")
            return real(model, parameters)  # type: ignore[arg-type]

        calls.clear()
        monkeypatch.setattr(linear_model, "_solve", solve)

    fails(1)
    assert knapsack().solve(10).bound == pytest.approx(-10)
    fails(2)
    result = knapsack().solve(10)
    assert (result.values, result.bound, result.is_infeasible) == (None, -math.inf, False)
    assert "kError" in result.termination
