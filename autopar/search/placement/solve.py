r"""Problem -> the cheapest choice of an option per node, with a proof.

Data: nodes :math:`v` with options :math:`i`, cost :math:`c_{v,i}` and bytes :math:`m_{v,i}`; arcs :math:`(u, v)` whose
options meet at a cost. Options that meet everything alike on an arc form one class, so that an arc between ops has a flow per
pair of *layouts*, not per pair of placements.

Variables: :math:`x_{v,i} \in [0, 1]`, option :math:`i` is taken at :math:`v`; :math:`f_{u,v,a,b} \ge 0`, class :math:`a` of
:math:`u` meets class :math:`b` of :math:`v`.

.. math:: \min \sum c_{v,i}\, x_{v,i} + \sum c_{u,v,a,b}\, f_{u,v,a,b}

(1) every node takes one option:            :math:`\sum_i x_{v,i} = 1`
(2) what leaves a class is what it takes:   :math:`\sum_b f_{u,v,a,b} = \sum_{i \in a} x_{u,i}`
(3) what enters a class is what it takes:   :math:`\sum_a f_{u,v,a,b} = \sum_{j \in b} x_{v,j}`
(4) one device's bytes:                     :math:`\sum m_{v,i}\, x_{v,i} + \sum m_{u,v,a,b}\, f_{u,v,a,b} \le M`

All costs are integer nanoseconds. The LP is solved first; an integral answer is the optimum. Else the same model is solved with integer
:math:`x`. Memory: (4) is left out while the optimum fits without it. Otherwise a price per byte is searched at which the answer fits;
the Lagrangian :math:`\min (c + \lambda m) - \lambda M` of every price tried is a lower bound, and (4) is then put into the
model to take up what room is left.
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

# Prices of memory that are tried at most, and the relative gap at which the search for a better one ends; what gap is left is
# reported.
PRICE_STEPS = 8
PRICE_GAP = 0.002
# What all of the memory costs, as a multiple of the fastest step: the first price tried, and one at which a choice is lean.
FIRST_PRICE = 2.0
LEAN_PRICE = 128.0
# Nodes that stay open, and seconds spent at most, when the memory limit itself is put into the model.
OPEN_NODES = 12
# That gains some percent: where the prices' best is further than this above what another mesh reached, it isn't tried.
TIGHTEN_REACH = 1.25
TIGHTEN_SECONDS = 1.5


@dataclass(frozen=True, slots=True)
class Solution:
    """The chosen options, by decision, and what is known about them.

    Attributes:
        choice: decision -> index of its option.
        cost_ns, nbytes: of the choice; `bound_ns`: no choice within the memory costs less.
        status, method: how the solver ended, and whether the LP was integral.
        variables, constraints: of the largest model that was solved.
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
class _Answer:
    choice: dict[int, int]
    weight_bound: float
    method: str
    variables: int
    constraints: int


@dataclass
class Search:
    """One problem on its way to a solution: what was solved already serves when the budget changes.

    Attributes:
        bound_ns: no choice costs less, whatever the memory.
        bound_in_memory_ns: no choice within the budget asked for last costs less.
    """

    problem: Problem
    time_limit: float = 60.0
    answers: dict[float, _Answer] = field(default_factory=dict)
    bound_in_memory_ns: int = 0

    @property
    def bound_ns(self) -> int:
        """Cost of the best choice if memory were no matter."""
        return round(self.at(0.0).weight_bound)

    def at(self, price: float) -> _Answer:
        """The best choice when a byte costs `price` nanoseconds."""
        if price not in self.answers:
            core = eliminate(self.problem.nodes, self.problem.arcs, price)
            answer = _solve_core(core, None, self.time_limit)
            assert answer is not None
            self.answers[price] = answer
        return self.answers[price]

    def fit(self, budget: int, cutoff_ns: int | None = None, *, tighten: bool = True) -> Solution | None:
        """The cheapest choice that needs at most `budget` bytes; None as soon as none can cost less than `cutoff_ns`.

        Without `tighten`, prices of memory alone are tried: enough where variants per block follow, which are a finer way to save memory.

        Raises InfeasibleError when nothing fits, with the bytes that the leanest choice needs in its ``needed`` attribute.
        """
        answer = self.at(0.0)
        _, nbytes = evaluate(self.problem, answer.choice)
        bound = answer.weight_bound
        self.bound_in_memory_ns = round(bound)
        if cutoff_ns is not None and bound >= cutoff_ns:
            return None
        if nbytes > budget:
            found = self._fit(budget, cutoff_ns, tighten)
            if found is None:
                return None
            answer, bound = found
        return self._as_solution(answer, bound)

    def lean(self, budget: int) -> list[Solution]:
        """Choices from lean to fast, among them that of the fewest bytes and one for which time counts little beside `budget`."""
        bound = self.at(0.0).weight_bound
        for price in (math.inf, self._capped(LEAN_PRICE * max(1.0, bound) / budget)):
            self.at(price)
        return [self._as_solution(answer, bound) for answer in self.answers.values()]

    def solution_at(self, price: float) -> Solution:
        """The best choice when a byte costs `price` nanoseconds; its bound holds without a limit on memory."""
        return self._as_solution(self.at(self._capped(price)), self.at(0.0).weight_bound)

    def frontier(self, price: float, most: int) -> list[Solution]:
        """Choices that are best at some price of memory up to `price`, from fast to lean, at most so many.

        Between two of them the price at which they weigh the same gives a third that weighs less, if there is one: these are the corners
        of the convex hull of all choices in time and bytes. The widest gaps are filled first.
        """
        found = [self.solution_at(0.0), self.solution_at(price)]
        gaps = [(found[0], found[1])]
        while gaps and len(found) < most:
            fast, lean = max(gaps, key=lambda gap: (gap[1].cost_ns - gap[0].cost_ns) * (gap[0].nbytes - gap[1].nbytes))
            gaps.remove((fast, lean))
            if lean.cost_ns <= fast.cost_ns or lean.nbytes >= fast.nbytes:
                continue
            slope = (lean.cost_ns - fast.cost_ns) / (fast.nbytes - lean.nbytes)
            between = self.solution_at(slope)
            if between.cost_ns + slope * between.nbytes < (fast.cost_ns + slope * fast.nbytes) * (1 - PRICE_GAP):
                found.append(between)
                gaps += [(fast, between), (between, lean)]
        distinct = {frozenset(solution.choice.items()): solution for solution in found}
        return sorted(distinct.values(), key=lambda one: one.cost_ns)

    def _capped(self, price: float) -> float:
        """A price at which even a choice that is far too large can be told from what can't be chosen."""
        if price == 0.0:
            return price
        _, nbytes = evaluate(self.problem, self.at(math.inf).choice)
        return min(price, FORBIDDEN / 16 / max(1, nbytes))

    def _as_solution(self, answer: _Answer, bound: float) -> Solution:
        cost, nbytes = evaluate(self.problem, answer.choice)
        return Solution(
            choice={self.problem.nodes[i].decision: option for i, option in answer.choice.items()},
            cost_ns=cost,
            nbytes=nbytes,
            bound_ns=min(cost, round(bound)),
            status="optimal" if cost <= bound + 1 else "feasible",
            method=answer.method,
            variables=answer.variables,
            constraints=answer.constraints,
        )

    def _fit(self, budget: int, cutoff_ns: int | None, tighten: bool) -> tuple[_Answer, float] | None:
        """The best answer found within `budget`, and a lower bound on the cost of any."""
        leanest = self.at(math.inf)
        cost, nbytes = evaluate(self.problem, leanest.choice)
        if nbytes > budget:
            error = InfeasibleError(f"the leanest choice needs {nbytes} bytes, {budget} are there")
            error.needed = nbytes
            raise error
        best, best_cost = leanest, cost
        bound = self.at(0.0).weight_bound
        low, high, price = 0.0, math.inf, FIRST_PRICE * max(1.0, bound) / max(1, budget)
        for _ in range(PRICE_STEPS):
            answer = self.at(price)
            cost, nbytes = evaluate(self.problem, answer.choice)
            bound = max(bound, answer.weight_bound - price * budget)
            self.bound_in_memory_ns = round(bound)
            if nbytes <= budget:
                high = price
                if cost < best_cost:
                    best, best_cost = answer, cost
            else:
                low = price
            if best_cost <= bound * (1 + PRICE_GAP):
                break
            if cutoff_ns is not None and bound >= cutoff_ns:
                return None
            price = low * 8 if high == math.inf else (low * high) ** 0.5 if low else high / 8
            if price * budget + best_cost >= FORBIDDEN:
                break  # what a choice weighs could no longer be told from what can't be chosen
        is_hopeful = tighten and (cutoff_ns is None or best_cost < TIGHTEN_REACH * cutoff_ns)
        if is_hopeful and best_cost > bound * (1 + PRICE_GAP):
            tight = self._tighten(budget, high, best_cost if cutoff_ns is None else min(best_cost, cutoff_ns))
            if tight is not None:
                cost, nbytes = evaluate(self.problem, tight.choice)
                # The solver keeps the limit only as far as its tolerances go.
                if nbytes <= budget and cost < best_cost:
                    best = tight
        return best, bound

    def _tighten(self, budget: int, price: float, ceiling: int) -> _Answer | None:
        """The best answer under (4) itself, with the heaviest nodes left open and the others as they are best at `price`.

        None when the linear relaxation shows that none costs less than `ceiling` nanoseconds.
        """
        swing = {i: int(node.nbytes.max() - node.nbytes.min()) for i, node in enumerate(self.problem.nodes)}
        heaviest = sorted(swing, key=swing.__getitem__, reverse=True)[:OPEN_NODES]
        core = eliminate(self.problem.nodes, self.problem.arcs, price, heaviest)
        return _solve_core(core, budget - self.problem.fixed_bytes, min(self.time_limit, TIGHTEN_SECONDS), ceiling)


def solve(problem: Problem, budget: int) -> Solution:
    """The cheapest choice that needs at most `budget` bytes; raises InfeasibleError when none does."""
    solution = Search(problem).fit(budget)
    assert solution is not None
    return solution


def evaluate(problem: Problem, choice: Mapping[int, int]) -> tuple[int, int]:
    """(nanoseconds, bytes) of a choice, from the tables alone."""
    cost, nbytes = problem.fixed_ns, problem.fixed_bytes
    for i, node in enumerate(problem.nodes):
        cost += int(node.cost[choice[i]])
        nbytes += int(node.nbytes[choice[i]])
    for arc in problem.arcs:
        cost += int(arc.cost[choice[arc.a], choice[arc.b]])
        nbytes += int(arc.nbytes[choice[arc.a], choice[arc.b]])
    return cost, nbytes


def _solve_core(core: Core, budget: int | None, time_limit: float, ceiling: float = math.inf) -> _Answer | None:
    """Solve the core; with a `budget`, minimise nanoseconds under (4), else the weights without it."""
    rows = LinearModel()
    taken: dict[int, Table] = {}
    used: list[tuple[Table, Table]] = []
    for node, costs in core.nodes.items():
        taken[node] = _add_node(rows, costs, budget is not None)
        used.append((taken[node], costs.nbytes))
    for (a, b), costs in core.arcs.items():
        used.append(_add_arc(rows, costs, taken[a], taken[b], budget is not None))
    if budget is not None:
        columns = np.concatenate([ids for ids, _ in used])
        rows.add_row(columns, np.concatenate([nbytes for _, nbytes in used]), -np.inf, float(budget))
    values, bound, method = _run(rows, time_limit, ceiling, required=budget is None)
    if values is None:
        return None
    choice = {node: int(np.argmax(values[ids])) for node, ids in taken.items()}
    return _Answer(core.complete(choice), bound, method, rows.size, rows.row_count)


def _add_node(rows: LinearModel, costs: Costs, by_time: bool) -> Table:
    """Constraint (1)."""
    ids = rows.add_variables(np.minimum(costs.cost if by_time else costs.weight, FORBIDDEN), is_integer=True)
    rows.add_row(ids, np.ones(len(ids)), 1.0, 1.0)
    return ids


def _add_arc(rows: LinearModel, costs: Costs, from_ids: Table, to_ids: Table, by_time: bool) -> tuple[Table, Table]:
    """Constraints (2) and (3), over classes of options that meet the other end alike; returns the flows and their bytes."""
    stacked = np.stack([costs.weight, costs.cost, costs.nbytes], axis=-1)
    row_first, row_class = _classes(stacked.reshape(len(from_ids), -1))
    column_first, column_class = _classes(stacked.transpose(1, 0, 2).reshape(len(to_ids), -1))
    small = np.ix_(row_first, column_first)
    weight = costs.weight[small]
    open_pairs = weight < FORBIDDEN
    objective = (costs.cost if by_time else costs.weight)[small][open_pairs]
    flows = np.full(weight.shape, -1, dtype=np.int64)
    flows[open_pairs] = rows.add_variables(objective)
    for a in range(len(row_first)):
        _balance(rows, flows[a][open_pairs[a]], from_ids[row_class == a])
    for b in range(len(column_first)):
        _balance(rows, flows[:, b][open_pairs[:, b]], to_ids[column_class == b])
    return flows[open_pairs], costs.nbytes[small][open_pairs]


def _balance(rows: LinearModel, flows: Table, options: Table) -> None:
    rows.add_row(np.concatenate([flows, options]), np.concatenate([np.ones(len(flows)), -np.ones(len(options))]), 0.0, 0.0)


def _classes(lines: Table) -> tuple[Table, Table]:
    """(first line of each class of equal lines, class of each line)."""
    _, first, classes = np.unique(lines, axis=0, return_index=True, return_inverse=True)
    return first, classes.reshape(-1)


def _run(rows: LinearModel, time_limit: float, ceiling: float, *, required: bool) -> tuple[npt.NDArray[np.float64] | None, float, str]:
    """(values, lower bound, method); no values, when an answer isn't `required`, for a model without one in the time given.

    Integers are only looked for where the relaxation leaves hope for less than `ceiling`.
    """
    integers = np.flatnonzero(rows.integers())
    answer = rows.solve(time_limit, free=integers)
    if answer.values is None:
        if not required:
            return None, 0.0, "LP, integral"
        raise SolverError(f"the solver ended with {answer.termination}")
    decided = answer.values[integers]
    if np.abs(decided - np.rint(decided)).max() <= 1e-6:
        return answer.values, answer.bound, "LP, integral"
    if answer.bound >= ceiling:
        return None, answer.bound, "MIP"
    exact = rows.solve(time_limit)
    if exact.values is None and required:
        raise SolverError(f"the solver ended with {exact.termination}")
    return exact.values, max(answer.bound, exact.bound), "MIP"
