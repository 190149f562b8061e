r"""A mixed-integer linear model that is built step by step, and its solution by HiGHS. The only user of OR-Tools.

.. math:: \min_x c^\top x \quad \text{subject to} \quad l \le A x \le u, \quad \underline{x} \le x \le \overline{x},
    \quad x_i \in \mathbb{Z} \text{ for some } i

Comes in: variables with costs and bounds, rows of :math:`A` with bounds, as numpy arrays. Goes out: values, a proven bound on the
objective, and how the solver ended. Costs should be of the size of integer nanoseconds: with costs like 2e-7 solvers return wrong choices
as optimal.

For example, the more valuable of two things that don't fit together::

    model = LinearModel()
    columns = model.add_variables(np.array([-2, -3]), is_integer=True)
    model.add_row(columns, [1.0, 1.0], -np.inf, 1.0)
    model.solve(10).values  # [0., 1.]
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
class SolverResult:
    """How a solve ended.

    Attributes:
        values: of all variables, shape (variables,); None when no solution was found.
        bound: a lower bound on the objective of any solution.
        is_infeasible: whether it is proven that there is no solution.
        termination: why the solver stopped, in its own words.
    """

    values: npt.NDArray[np.float64] | None
    bound: float
    is_infeasible: bool
    termination: str


class LinearModel:
    """Variables and rows, as the flat lists that MathOpt's protocol buffers hold.

    Attributes:
        size: number of variables; their ids are 0 to `size` - 1 in the order in which they were added.
    """

    def __init__(self) -> None:
        self.size = 0
        self._costs: list[npt.NDArray[np.float64]] = []
        self._variable_lower: list[npt.NDArray[np.float64]] = []
        self._variable_upper: list[npt.NDArray[np.float64]] = []
        self._integer: list[npt.NDArray[np.bool_]] = []
        self._rows: list[npt.NDArray[np.int64]] = []
        self._columns: list[npt.NDArray[np.int64]] = []
        self._coefficients: list[npt.NDArray[np.float64]] = []
        self._row_lower: list[float] = []
        self._row_upper: list[float] = []

    @property
    def row_count(self) -> int:
        """Number of rows so far."""
        return len(self._row_lower)

    def add_variables(
        self, costs: Numbers, *, lower: Numbers | float = 0.0, upper: Numbers | float = 1.0, is_integer: bool = False
    ) -> npt.NDArray[np.int64]:
        """Add a variable per entry of `costs`, its coefficient in the objective; returns their ids, shape (variables,).

        Bounds are one number for all of them, or one for each.
        """
        shape = (costs.size,)
        self._costs.append(costs.ravel().astype(float))
        self._variable_lower.append(np.broadcast_to(lower, shape).astype(float))
        self._variable_upper.append(np.broadcast_to(upper, shape).astype(float))
        self._integer.append(np.full(shape, is_integer))
        self.size += costs.size
        return np.arange(self.size - costs.size, self.size)

    def add_row(
        self, columns: npt.NDArray[np.int64] | Sequence[int], coefficients: Numbers | Sequence[float], lower: float, upper: float
    ) -> None:
        """Add the row lower <= coefficients @ x[columns] <= upper; `columns` are ids of variables, none of them twice."""
        self._rows.append(np.full(len(columns), len(self._row_lower)))
        self._columns.append(np.asarray(columns, dtype=np.int64))
        self._coefficients.append(np.asarray(coefficients, dtype=float))
        self._row_lower.append(lower)
        self._row_upper.append(upper)

    def integers(self) -> npt.NDArray[np.bool_]:
        """Whether each variable is an integer, shape (variables,)."""
        return np.concatenate(self._integer)

    def solve(
        self,
        seconds: float,
        *,
        free: npt.NDArray[np.int64] | None = None,
        fixed: tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]] | None = None,
        gap: float | None = None,
    ) -> SolverResult:
        """Solve with HiGHS until the relative `gap` is closed or the time is up; errors of the solver are told in `termination`.

        Args:
            seconds: the time limit.
            free: ids of variables that needn't be integers in this solve.
            fixed: ids of variables, and the values that they have in this solve.
            gap: relative distance of the objective from the bound at which to stop; the solver's own by default.
        """
        lower, upper, integer = np.concatenate(self._variable_lower), np.concatenate(self._variable_upper), self.integers()
        if free is not None:
            integer[free] = False
        if fixed is not None:
            lower[fixed[0]] = upper[fixed[0]] = fixed[1]
        model = self._build(lower, upper, integer)
        parameters = mathopt.SolveParameters(
            time_limit=datetime.timedelta(seconds=seconds), relative_gap_tolerance=gap if integer.any() else None
        )
        # HiGHS reports an error for an optimum of a MIP that rounding leaves outside of a row by just the tolerance, and MathOpt raises
        # AttributeError for that. Without presolve the solver reaches the optimum by other steps.
        try:
            result = _solve(model, parameters)
        except (AttributeError, ValueError, RuntimeError):
            try:
                result = _solve(model, replace(parameters, presolve=mathopt.Emphasis.OFF))
            except (AttributeError, ValueError, RuntimeError) as error:
                return SolverResult(None, -math.inf, False, f"an error of the solver: {error}")
        values = None
        if result.has_primal_feasible_solution():
            values = np.zeros(self.size)
            for variable, value in result.variable_values().items():
                values[variable.id] = value
        reason = result.termination.reason
        return SolverResult(
            values,
            result.best_objective_bound(),
            reason in (mathopt.TerminationReason.INFEASIBLE, mathopt.TerminationReason.INFEASIBLE_OR_UNBOUNDED),
            str(result.termination),
        )

    def _build(self, lower: npt.NDArray[np.float64], upper: npt.NDArray[np.float64], integer: npt.NDArray[np.bool_]) -> mathopt.Model:
        """MathOpt's model, with these bounds and integers of the variables."""
        proto = model_pb2.ModelProto()
        proto.variables.ids.extend(range(self.size))
        proto.variables.lower_bounds.extend(lower.tolist())
        proto.variables.upper_bounds.extend(upper.tolist())
        proto.variables.integers.extend(integer.tolist())
        proto.objective.maximize = False
        costs = np.concatenate(self._costs)
        nonzero = np.flatnonzero(costs)
        proto.objective.linear_coefficients.ids.extend(nonzero.tolist())
        proto.objective.linear_coefficients.values.extend(costs[nonzero].tolist())
        proto.linear_constraints.ids.extend(range(len(self._row_lower)))
        proto.linear_constraints.lower_bounds.extend(self._row_lower)
        proto.linear_constraints.upper_bounds.extend(self._row_upper)
        rows, columns = np.concatenate(self._rows), np.concatenate(self._columns)
        order = np.lexsort((columns, rows))
        proto.linear_constraint_matrix.row_ids.extend(rows[order].tolist())
        proto.linear_constraint_matrix.column_ids.extend(columns[order].tolist())
        proto.linear_constraint_matrix.coefficients.extend(np.concatenate(self._coefficients)[order].tolist())
        return mathopt.Model.from_model_proto(proto)


def _solve(model: mathopt.Model, parameters: mathopt.SolveParameters) -> mathopt.SolveResult:
    # Most of a result would be zeros and duals, which aren't read.
    filters = mathopt.ModelSolveParameters(
        variable_values_filter=mathopt.VariableFilter(skip_zero_values=True),
        dual_values_filter=mathopt.LinearConstraintFilter(filtered_items=()),
        reduced_costs_filter=mathopt.VariableFilter(filtered_items=()),
    )
    return mathopt.solve(model, mathopt.SolverType.HIGHS, params=parameters, model_params=filters)
