r"""The cheapest choice of one option per node of a `Problem` within a memory budget, with a lower bound on any choice's cost.

Comes in: a `Problem` (``problem``), a budget in bytes or a price per byte. Goes out: a `Solution`.

Data: nodes :math:`v` with options :math:`i`, cost :math:`c_{v,i}` in nanoseconds and bytes :math:`m_{v,i}`; arcs :math:`(u, v)` with cost
and bytes for each pair of options. Of the options at one end of an arc, those with equal costs and bytes for every option at the other end
form a *class* :math:`a`, so that an arc between ops has a flow per pair of layouts, not per pair of placements.

Variables: :math:`x_{v,i} \in [0, 1]`, whether node :math:`v` takes option :math:`i`; :math:`f_{u,v,a,b} \ge 0`, whether :math:`u` takes an
option of class :math:`a` and :math:`v` one of class :math:`b`.

.. math:: \min \sum c_{v,i}\, x_{v,i} + \sum c_{u,v,a,b}\, f_{u,v,a,b}

(1) every node takes one option:         :math:`\sum_i x_{v,i} = 1`
(2) flow out of each class of u:         :math:`\sum_b f_{u,v,a,b} = \sum_{i \in a} x_{u,i}`
(3) flow into each class of v:           :math:`\sum_a f_{u,v,a,b} = \sum_{j \in b} x_{v,j}`
(4) bytes on one device:                 :math:`\sum m_{v,i}\, x_{v,i} + \sum m_{u,v,a,b}\, f_{u,v,a,b} \le M`

The problem is reduced first (``eliminate``); what is left is solved as an LP, without (4). An integral LP solution is the optimum.
Otherwise the same model is solved with integer :math:`x`. If the optimum doesn't fit the budget, prices :math:`\lambda` per byte are tried:
:math:`\min (c + \lambda m)` is solved again, and since every choice that fits needs at most :math:`M` bytes,
:math:`\min (c + \lambda m) - \lambda M` is a lower bound on the cost of any that fits (the Lagrangian bound). If a gap is left after
that, (4) itself goes into a model in which few nodes stay open (`PlacementSolver._tighten`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from autopar.errors import InfeasibleError, SolverError
from autopar.search.linear_model import LinearModel
from autopar.search.placement.eliminate import Core, Costs, eliminate
from autopar.search.placement.problem import FORBIDDEN, Decision, Problem, Table

# The most prices of memory that are tried for a budget, and the relative gap between the best choice and the bound at which no more are.
PRICE_STEPS = 8
PRICE_GAP = 0.002
# Prices in units of the fastest step's nanoseconds per budget (at price 1 a full budget costs as much as the step): the first that is
# tried, and one at which time counts little.
FIRST_PRICE = 2.0
LEAN_PRICE = 128.0
# When (4) itself is put into the model: the number of nodes that stay open, and the most seconds that the solver gets.
OPEN_NODES = 12
TIGHTEN_SECONDS = 1.5
# That gains some percent, so it isn't tried if the best choice so far costs more than this multiple of the cutoff, which another mesh
# reached.
TIGHTEN_REACH = 1.25


@dataclass(frozen=True, slots=True)
class Solution:
    """The chosen options, by decision, and what is known about them.

    Attributes:
        choice: decision -> index of its option.
        cost_ns: nanoseconds of a step with this choice.
        nbytes: bytes of one device with this choice.
        bound_ns: a lower bound: no choice within the budget costs less.
        status: ``optimal`` where the cost is the bound, to a nanosecond, else ``feasible``.
        method: ``LP, integral`` or ``MIP``.
        variables, constraints: sizes of the linear model that the choice is a solution of.
    """

    choice: Mapping[Decision, int]
    cost_ns: int
    nbytes: int
    bound_ns: int
    status: str
    method: str
    variables: int
    constraints: int


@dataclass(frozen=True, slots=True)
class _Optimum:
    """The best choice at one price of memory, or under the memory limit of `PlacementSolver._tighten`.

    Attributes:
        choice: index of each node of the problem -> index of its option.
        weight_bound: a lower bound on the weight of any choice: its nanoseconds, and its bytes at that price.
        method, variables, constraints: as `Solution` has them.
    """

    choice: dict[int, int]
    weight_bound: float
    method: str
    variables: int
    constraints: int


@dataclass
class PlacementSolver:
    """The search of one problem; what was solved for one budget is used again for the next.

    Attributes:
        problem: what is solved.
        time_limit: seconds that each solve of a linear model may take.
        optima: price of a byte in nanoseconds -> the best choice at that price, for all prices tried.
        bound_in_memory_ns: a lower bound on the cost of any choice within the budget of the last call of `fit`.
    """

    problem: Problem
    time_limit: float = 60.0
    optima: dict[float, _Optimum] = field(default_factory=dict)
    bound_in_memory_ns: int = 0

    @property
    def bound_ns(self) -> int:
        """A lower bound on the cost of any choice, however much memory it needs."""
        return round(self._optimum_at(0.0).weight_bound)

    def _optimum_at(self, price: float) -> _Optimum:
        """The best choice when a byte costs `price` nanoseconds; at an infinite price the one of the fewest bytes."""
        if price not in self.optima:
            core = eliminate(self.problem.nodes, self.problem.arcs, price)
            optimum = _solve_core(core, None, self.time_limit)
            assert optimum is not None
            self.optima[price] = optimum
        return self.optima[price]

    def fit(self, budget: int, cutoff_ns: int | None = None, *, tighten: bool = True) -> Solution | None:
        """The cheapest choice found that needs at most `budget` bytes.

        Args:
            budget: bytes of one device.
            cutoff_ns: return None as soon as it is known that no choice costs less than this.
            tighten: also put the memory limit itself into the model. Not needed where blocks may mix solutions afterwards: that saves
                memory in finer steps.

        Raises InfeasibleError when nothing fits, with the bytes that the leanest choice needs in its ``needed`` attribute.
        """
        optimum = self._optimum_at(0.0)
        _, nbytes = evaluate(self.problem, optimum.choice)
        bound = optimum.weight_bound
        self.bound_in_memory_ns = round(bound)
        if cutoff_ns is not None and bound >= cutoff_ns:
            return None
        if nbytes > budget:
            fitting = self._fit(budget, cutoff_ns, tighten)
            if fitting is None:
                return None
            optimum, bound = fitting
        return self._as_solution(optimum, bound)

    def find_lean(self, budget: int) -> list[Solution]:
        """The best choices at all prices tried so far, and at two high ones.

        The high ones are an infinite price, whose best choice has the fewest bytes, and one at which `budget` bytes cost `LEAN_PRICE` times
        as much as the fastest step.
        """
        bound = self._optimum_at(0.0).weight_bound
        for price in (math.inf, self._capped(LEAN_PRICE * max(1.0, bound) / budget)):
            self._optimum_at(price)
        return [self._as_solution(optimum, bound) for optimum in self.optima.values()]

    def solution_at(self, price: float) -> Solution:
        """The best choice when a byte costs `price` nanoseconds; its `bound_ns` bounds every choice, whatever memory that needs."""
        return self._as_solution(self._optimum_at(self._capped(price)), self._optimum_at(0.0).weight_bound)

    def frontier(self, price: float, most: int) -> list[Solution]:
        """At most `most` choices, from fast to lean, each of which is the best at some price of memory from 0 to `price`.

        These are corners of the convex hull of all choices, drawn as points (bytes, nanoseconds)::

            ns
             | lean
             |  *
             |    *               between two corners lies a third, if the best choice at the price
             |        *           (slope) that makes both weigh the same weighs less than these
             |                *
             |              fast
             +------------------- bytes

        The pair that spans the largest rectangle is tried first.
        """
        corners = [self.solution_at(0.0), self.solution_at(price)]
        gaps = [(corners[0], corners[1])]
        while gaps and len(corners) < most:
            fast, lean = max(gaps, key=lambda gap: (gap[1].cost_ns - gap[0].cost_ns) * (gap[0].nbytes - gap[1].nbytes))
            gaps.remove((fast, lean))
            if lean.cost_ns <= fast.cost_ns or lean.nbytes >= fast.nbytes:
                continue
            slope = (lean.cost_ns - fast.cost_ns) / (fast.nbytes - lean.nbytes)
            between = self.solution_at(slope)
            if between.cost_ns + slope * between.nbytes < (fast.cost_ns + slope * fast.nbytes) * (1 - PRICE_GAP):
                corners.append(between)
                gaps += [(fast, between), (between, lean)]
        distinct = {frozenset(solution.choice.items()): solution for solution in corners}
        return sorted(distinct.values(), key=lambda solution: solution.cost_ns)

    def _capped(self, price: float) -> float:
        """The price, or less where the bytes of even the leanest choice would weigh nearly as much as a `FORBIDDEN` pair of options."""
        if price == 0.0:
            return price
        _, nbytes = evaluate(self.problem, self._optimum_at(math.inf).choice)
        return min(price, FORBIDDEN / 16 / max(1, nbytes))

    def _as_solution(self, optimum: _Optimum, bound: float) -> Solution:
        cost, nbytes = evaluate(self.problem, optimum.choice)
        return Solution(
            choice={self.problem.nodes[i].decision: option for i, option in optimum.choice.items()},
            cost_ns=cost,
            nbytes=nbytes,
            bound_ns=min(cost, round(bound)),
            status="optimal" if cost <= bound + 1 else "feasible",
            method=optimum.method,
            variables=optimum.variables,
            constraints=optimum.constraints,
        )

    def _fit(self, budget: int, cutoff_ns: int | None, tighten: bool) -> tuple[_Optimum, float] | None:
        """The cheapest choice found within `budget`, and a lower bound on the cost of any; None if that bound reaches `cutoff_ns`.

        Raises InfeasibleError, with the bytes that the leanest choice needs, when nothing fits.
        """
        leanest = self._optimum_at(math.inf)
        cost, nbytes = evaluate(self.problem, leanest.choice)
        if nbytes > budget:
            error = InfeasibleError(f"the leanest choice needs {nbytes} bytes, {budget} are there")
            error.needed = nbytes
            raise error
        best, best_cost = leanest, cost
        bound = self._optimum_at(0.0).weight_bound
        low, high, price = 0.0, math.inf, FIRST_PRICE * max(1.0, bound) / max(1, budget)
        for _ in range(PRICE_STEPS):
            optimum = self._optimum_at(price)
            cost, nbytes = evaluate(self.problem, optimum.choice)
            bound = max(bound, optimum.weight_bound - price * budget)
            self.bound_in_memory_ns = round(bound)
            if nbytes <= budget:
                high = price
                if cost < best_cost:
                    best, best_cost = optimum, cost
            else:
                low = price
            if best_cost <= bound * (1 + PRICE_GAP):
                break
            if cutoff_ns is not None and bound >= cutoff_ns:
                return None
            price = low * 8 if high == math.inf else (low * high) ** 0.5 if low else high / 8
            if price * budget + best_cost >= FORBIDDEN:
                break  # a choice would weigh as much as a forbidden pair of options
        can_gain = tighten and (cutoff_ns is None or best_cost < TIGHTEN_REACH * cutoff_ns)
        if can_gain and best_cost > bound * (1 + PRICE_GAP):
            tightened = self._tighten(budget, high, best_cost if cutoff_ns is None else min(best_cost, cutoff_ns))
            if tightened is not None:
                cost, nbytes = evaluate(self.problem, tightened.choice)
                # The solver's choice may exceed the budget by its tolerance.
                if nbytes <= budget and cost < best_cost:
                    best = tightened
        return best, bound

    def _tighten(self, budget: int, price: float, ceiling: int) -> _Optimum | None:
        """The best choice under (4) itself, with few nodes open and the others eliminated by what is best for them at `price`.

        The nodes whose options differ most in bytes stay open. None when the linear relaxation shows that no such choice costs less than
        `ceiling` nanoseconds, or when the time is up.
        """
        byte_range = {i: int(node.nbytes.max() - node.nbytes.min()) for i, node in enumerate(self.problem.nodes)}
        open_nodes = sorted(byte_range, key=byte_range.__getitem__, reverse=True)[:OPEN_NODES]
        core = eliminate(self.problem.nodes, self.problem.arcs, price, open_nodes)
        return _solve_core(core, budget, min(self.time_limit, TIGHTEN_SECONDS), ceiling)


def solve(problem: Problem, budget: int) -> Solution:
    """The cheapest choice that needs at most `budget` bytes; raises InfeasibleError when none does."""
    solution = PlacementSolver(problem).fit(budget)
    assert solution is not None
    return solution


def evaluate(problem: Problem, choice: Mapping[int, int]) -> tuple[int, int]:
    """(nanoseconds, bytes) of a choice (index of each node -> index of its option): sums over the problem's tables."""
    cost = nbytes = 0
    for i, node in enumerate(problem.nodes):
        cost += int(node.cost[choice[i]])
        nbytes += int(node.nbytes[choice[i]])
    for arc in problem.arcs:
        cost += int(arc.cost[choice[arc.a], choice[arc.b]])
        nbytes += int(arc.nbytes[choice[arc.a], choice[arc.b]])
    return cost, nbytes


def _solve_core(core: Core, budget: int | None, time_limit: float, ceiling: float = math.inf) -> _Optimum | None:
    """Solve what elimination left: without a `budget` minimise weights, with one minimise nanoseconds under (4).

    With a budget, None if no choice is found in the time given, or if none costs less than `ceiling` nanoseconds.
    """
    model = LinearModel()
    option_ids: dict[int, Table] = {}  # per node the variables x
    used: list[tuple[Table, Table]] = []  # variables, and the bytes of each
    for node, costs in core.nodes.items():
        option_ids[node] = _add_node(model, costs, budget is not None)
        used.append((option_ids[node], costs.nbytes))
    for (a, b), costs in core.arcs.items():
        used.append(_add_arc(model, costs, option_ids[a], option_ids[b], budget is not None))
    # What every choice costs is no part of the objective: beside a constant of 2e12 bytes the solver may not tell options apart in time.
    fixed = sum(float(_objective(costs, budget is not None).min()) for costs in (*core.nodes.values(), *core.arcs.values()))
    if budget is not None:
        columns = np.concatenate([ids for ids, _ in used])
        model.add_row(columns, np.concatenate([nbytes for _, nbytes in used]), -np.inf, float(budget))
    values, bound, method = _run(model, time_limit, ceiling - fixed, required=budget is None)
    if values is None:
        return None
    choice = {node: int(np.argmax(values[ids])) for node, ids in option_ids.items()}
    return _Optimum(core.complete(choice), bound + fixed, method, model.size, model.row_count)


def _objective(costs: Costs, by_time: bool) -> Table:
    """What each option of a node or arc costs: nanoseconds if `by_time`, else weight. What all of them cost is no part of the model."""
    return costs.cost if by_time else costs.weight


def _add_node(model: LinearModel, costs: Costs, by_time: bool) -> Table:
    """Variables x of a node with constraint (1); returns their ids. The objective has nanoseconds if `by_time`, else weights."""
    objective = _objective(costs, by_time)
    ids = model.add_variables(np.minimum(objective - objective.min(), FORBIDDEN), is_integer=True)
    model.add_row(ids, np.ones(len(ids)), 1.0, 1.0)
    return ids


def _add_arc(model: LinearModel, costs: Costs, from_ids: Table, to_ids: Table, by_time: bool) -> tuple[Table, Table]:
    """Flows between classes of options, with constraints (2) and (3); returns the flows' ids and the bytes of each."""
    stacked = np.stack([costs.weight, costs.cost, costs.nbytes], axis=-1)
    row_of_class, row_class = _find_classes(stacked.reshape(len(from_ids), -1))
    column_of_class, column_class = _find_classes(stacked.transpose(1, 0, 2).reshape(len(to_ids), -1))
    class_pairs = np.ix_(row_of_class, column_of_class)
    weight = costs.weight[class_pairs]
    is_allowed = weight < FORBIDDEN
    objective = _objective(costs, by_time)
    flows = np.full(weight.shape, -1, dtype=np.int64)
    flows[is_allowed] = model.add_variables(objective[class_pairs][is_allowed] - objective.min())
    for a in range(len(row_of_class)):
        _add_balance(model, flows[a][is_allowed[a]], from_ids[row_class == a])
    for b in range(len(column_of_class)):
        _add_balance(model, flows[:, b][is_allowed[:, b]], to_ids[column_class == b])
    return flows[is_allowed], costs.nbytes[class_pairs][is_allowed]


def _add_balance(model: LinearModel, flows: Table, options: Table) -> None:
    """The row: the sum of the flows of a class is the sum of its options."""
    model.add_row(np.concatenate([flows, options]), np.concatenate([np.ones(len(flows)), -np.ones(len(options))]), 0.0, 0.0)


def _find_classes(rows: Table) -> tuple[Table, Table]:
    """(index of one row of each class of equal rows, class of each row)."""
    _, representatives, classes = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return representatives, classes.reshape(-1)


def _run(model: LinearModel, time_limit: float, ceiling: float, *, required: bool) -> tuple[npt.NDArray[np.float64] | None, float, str]:
    """Solve the relaxation, and with integers if it isn't integral; returns (values, lower bound, method).

    Unless a solution is `required`, values are None if none is found in `time_limit` seconds, and if the relaxation's bound shows that none
    costs less than `ceiling`. Raises SolverError if one is required and not found.
    """
    integers = np.flatnonzero(model.integers())
    relaxed = model.solve(time_limit, free=integers)
    if relaxed.values is None:
        if not required:
            return None, 0.0, "LP, integral"
        raise SolverError(f"the solver ended with {relaxed.termination}")
    relaxed_integers = relaxed.values[integers]
    if np.abs(relaxed_integers - np.rint(relaxed_integers)).max() <= 1e-6:
        return relaxed.values, relaxed.bound, "LP, integral"
    if relaxed.bound >= ceiling:
        return None, relaxed.bound, "MIP"
    exact = model.solve(time_limit)
    if exact.values is None and required:
        raise SolverError(f"the solver ended with {exact.termination}")
    return exact.values, max(relaxed.bound, exact.bound), "MIP"
