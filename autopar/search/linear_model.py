"""A linear model under construction -> the solver's answer. The only user of OR-Tools.

Comes in: variables with costs and bounds, rows of coefficients, in blocks of numpy arrays. Goes out: values, a proven bound, and how the
solver ended. Costs should be of the size of integer nanoseconds: with costs like 2e-7 solvers return wrong choices as optimal.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from ortools.math_opt import model_pb2
from ortools.math_opt.python import mathopt

Numbers = npt.NDArray[np.float64] | npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Answer:
    """How a solve ended.

    Attributes:
        values: of all variables, shape (variables,); None when no solution was found.
        bound: no solution costs less.
        is_infeasible: it is proven that there is no solution.
        termination: the solver's own words.
    """

    values: npt.NDArray[np.float64] | None
    bound: float
    is_infeasible: bool
    termination: str


class LinearModel:
    """Variables and rows as the flat lists that MathOpt's wire format holds; the objective is minimised."""

    def __init__(self) -> None:
        self.size = 0
        self._costs: list[npt.NDArray[np.float64]] = []
        self._lowest: list[npt.NDArray[np.float64]] = []
        self._highest: list[npt.NDArray[np.float64]] = []
        self._integer: list[npt.NDArray[np.bool_]] = []
        self._rows: list[npt.NDArray[np.int64]] = []
        self._columns: list[npt.NDArray[np.int64]] = []
        self._coefficients: list[npt.NDArray[np.float64]] = []
        self._lower: list[float] = []
        self._upper: list[float] = []

    @property
    def row_count(self) -> int:
        """Rows so far."""
        return len(self._lower)

    def add_variables(
        self, costs: Numbers, *, lower: Numbers | float = 0.0, upper: Numbers | float = 1.0, is_integer: bool = False
    ) -> npt.NDArray[np.int64]:
        """Ids of new variables, one per cost, between `lower` and `upper`."""
        shape = (costs.size,)
        self._costs.append(costs.ravel().astype(float))
        self._lowest.append(np.broadcast_to(lower, shape).astype(float))
        self._highest.append(np.broadcast_to(upper, shape).astype(float))
        self._integer.append(np.full(shape, is_integer))
        self.size += costs.size
        return np.arange(self.size - costs.size, self.size)

    def add_row(
        self, columns: npt.NDArray[np.int64] | Sequence[int], coefficients: Numbers | Sequence[float], lower: float, upper: float
    ) -> None:
        """A row between `lower` and `upper`; a column occurs once in it."""
        self._rows.append(np.full(len(columns), len(self._lower)))
        self._columns.append(np.asarray(columns, dtype=np.int64))
        self._coefficients.append(np.asarray(coefficients, dtype=float))
        self._lower.append(lower)
        self._upper.append(upper)

    def integers(self) -> npt.NDArray[np.bool_]:
        """Which variables are integer, shape (variables,)."""
        return np.concatenate(self._integer)

    def solve(
        self,
        seconds: float,
        *,
        free: npt.NDArray[np.int64] | None = None,
        fixed: tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]] | None = None,
        gap: float | None = None,
    ) -> Answer:
        """Solve with HiGHS until the relative `gap` is closed or the time is up; without integers the model is a linear program.

        Args:
            seconds: the time limit.
            free: ids of variables that needn't be integers here.
            fixed: ids of variables, and the values that they take here.
            gap: relative distance from the bound; the solver's own by default.
        """
        lowest, highest, integer = np.concatenate(self._lowest), np.concatenate(self._highest), self.integers()
        if free is not None:
            integer[free] = False
        if fixed is not None:
            lowest[fixed[0]] = highest[fixed[0]] = fixed[1]
        model = self._model(lowest, highest, integer)
        parameters = mathopt.SolveParameters(
            time_limit=datetime.timedelta(seconds=seconds), relative_gap_tolerance=gap if integer.any() else None
        )
        # HiGHS calls an optimum of a MIP an error where rounding leaves it outside of a row by just the tolerance, and MathOpt
        # raises AttributeError over that. The same model without presolve takes another way to the optimum.
        try:
            result = _solve(model, parameters)
        except (AttributeError, ValueError, RuntimeError):
            try:
                result = _solve(model, replace(parameters, presolve=mathopt.Emphasis.OFF))
            except (AttributeError, ValueError, RuntimeError) as error:
                return Answer(None, -math.inf, False, f"an error of the solver: {error}")
        values = None
        if result.has_primal_feasible_solution():
            values = np.zeros(self.size)
            for variable, value in result.variable_values().items():
                values[variable.id] = value
        reason = result.termination.reason
        return Answer(
            values,
            result.best_objective_bound(),
            reason in (mathopt.TerminationReason.INFEASIBLE, mathopt.TerminationReason.INFEASIBLE_OR_UNBOUNDED),
            str(result.termination),
        )

    def _model(self, lowest: npt.NDArray[np.float64], highest: npt.NDArray[np.float64], integer: npt.NDArray[np.bool_]) -> mathopt.Model:
        proto = model_pb2.ModelProto()
        proto.variables.ids.extend(range(self.size))
        proto.variables.lower_bounds.extend(lowest.tolist())
        proto.variables.upper_bounds.extend(highest.tolist())
        proto.variables.integers.extend(integer.tolist())
        proto.objective.maximize = False
        costs = np.concatenate(self._costs)
        paid = np.flatnonzero(costs)
        proto.objective.linear_coefficients.ids.extend(paid.tolist())
        proto.objective.linear_coefficients.values.extend(costs[paid].tolist())
        proto.linear_constraints.ids.extend(range(len(self._lower)))
        proto.linear_constraints.lower_bounds.extend(self._lower)
        proto.linear_constraints.upper_bounds.extend(self._upper)
        rows, columns = np.concatenate(self._rows), np.concatenate(self._columns)
        order = np.lexsort((columns, rows))
        proto.linear_constraint_matrix.row_ids.extend(rows[order].tolist())
        proto.linear_constraint_matrix.column_ids.extend(columns[order].tolist())
        proto.linear_constraint_matrix.coefficients.extend(np.concatenate(self._coefficients)[order].tolist())
        return mathopt.Model.from_model_proto(proto)


def _solve(model: mathopt.Model, parameters: mathopt.SolveParameters) -> mathopt.SolveResult:
    # Zeros and duals are most of an answer and nobody reads them.
    wanted = mathopt.ModelSolveParameters(
        variable_values_filter=mathopt.VariableFilter(skip_zero_values=True),
        dual_values_filter=mathopt.LinearConstraintFilter(filtered_items=()),
        reduced_costs_filter=mathopt.VariableFilter(filtered_items=()),
    )
    return mathopt.solve(model, mathopt.SolverType.HIGHS, params=parameters, model_params=wanted)
