"""The search against brute force on small problems, and its proof."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from autopar.errors import InfeasibleError
from autopar.ir.layout import Mesh
from autopar.search.placement.problem import FORBIDDEN, Arc, Decision, DecisionKind, Node, Problem, restrict
from autopar.search.placement.solve import PlacementSolver, evaluate, solve


def random_problem(seed: int, nodes: int, options: int, arcs: int) -> Problem:
    rng = np.random.default_rng(seed)
    made = tuple(
        Node(
            Decision(DecisionKind.CALL, f"n{i}"),
            tuple((None,) * 1 for _ in range(options)),
            rng.integers(1, 100, options),
            rng.integers(1, 100, options),
        )
        for i in range(nodes)
    )
    pairs = list(itertools.combinations(range(nodes), 2))
    chosen = rng.choice(len(pairs), size=min(arcs, len(pairs)), replace=False)
    tables = []
    for index in chosen:
        cost = rng.integers(0, 100, (options, options))
        if options > 2:
            cost[0, options - 1] = FORBIDDEN
        tables.append(Arc(*pairs[index], cost, rng.integers(0, 20, (options, options))))
    return Problem(made, tuple(tables), Mesh(("x",), (2,)))


def brute_force(problem: Problem, budget: int) -> int | None:
    best: int | None = None
    for combination in itertools.product(*(range(len(node.options)) for node in problem.nodes)):
        cost, nbytes = evaluate(problem, dict(enumerate(combination)))
        if nbytes <= budget and cost < FORBIDDEN and (best is None or cost < best):
            best = cost
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("arcs", [4, 7, 15])
def test_equals_brute_force_without_memory(seed: int, arcs: int) -> None:
    problem = random_problem(seed, nodes=6, options=3, arcs=arcs)
    solution = solve(problem, budget=10**9)
    assert solution.cost_ns == brute_force(problem, 10**9)
    assert solution.bound_ns == solution.cost_ns
    assert solution.status == "optimal"


@pytest.mark.parametrize("seed", range(12))
def test_memory_is_kept_and_the_bound_holds(seed: int) -> None:
    problem = random_problem(seed, nodes=6, options=3, arcs=8)
    free = solve(problem, budget=10**9)
    budget = int(free.nbytes * 0.8)
    best = brute_force(problem, budget)
    if best is None:
        with pytest.raises(InfeasibleError):
            solve(problem, budget)
        return
    solution = solve(problem, budget)
    assert solution.nbytes <= budget
    assert solution.bound_ns <= best <= solution.cost_ns
    assert solution.cost_ns == best  # of a problem this small every node stays open under the memory limit


def test_infeasible_says_what_is_needed() -> None:
    problem = random_problem(0, nodes=4, options=3, arcs=4)
    with pytest.raises(InfeasibleError) as caught:
        solve(problem, budget=1)
    leanest = min(evaluate(problem, dict(enumerate(c)))[1] for c in itertools.product(range(3), repeat=4))
    assert caught.value.needed >= leanest


def test_an_isolated_node_takes_its_cheapest_option() -> None:
    node = Node(Decision(DecisionKind.CALL, "a"), ((None,), (None,)), np.array([5, 3]), np.array([0, 0]))
    problem = Problem((node, node), (), Mesh(("x",), (2,)))
    assert solve(problem, 10).cost_ns == 6


def all_choices(problem: Problem) -> list[tuple[int, int]]:
    """(cost, bytes) of every choice that can be made."""
    every = itertools.product(*(range(len(node.options)) for node in problem.nodes))
    return [one for one in (evaluate(problem, dict(enumerate(combination))) for combination in every) if one[0] < FORBIDDEN]


@pytest.mark.parametrize("seed", range(8))
def test_the_frontier_has_the_best_choice_at_every_price(seed: int) -> None:
    problem = random_problem(seed, nodes=6, options=3, arcs=8)
    every = all_choices(problem)
    highest = 20.0
    found = PlacementSolver(problem).frontier(highest, 1000)
    costs = [one.cost_ns for one in found]
    assert costs == sorted(set(costs))
    assert [one.nbytes for one in found] == sorted({one.nbytes for one in found}, reverse=True)
    for price in (0.0, *np.geomspace(0.01, highest, 60).tolist()):
        best = min(cost + price * nbytes for cost, nbytes in every)
        assert min(one.cost_ns + price * one.nbytes for one in found) == pytest.approx(best, rel=2.5e-3)
    slopes = [(b.cost_ns - a.cost_ns) / (a.nbytes - b.nbytes) for a, b in itertools.pairwise(found)]
    assert slopes == sorted(slopes), "each is a corner of the hull"


def test_a_short_frontier_fills_the_widest_gap_first() -> None:
    costs, nbytes = np.array([0, 1, 10, 31, 100]), np.array([100, 95, 60, 40, 0])
    problem = Problem((Node(Decision(DecisionKind.CALL, "a"), ((None,),) * 5, costs, nbytes),), (), Mesh(("x",), (2,)))
    search = PlacementSolver(problem)
    assert [one.cost_ns for one in search.frontier(100.0, 2)] == [0, 100]
    assert [one.cost_ns for one in search.frontier(100.0, 3)] == [0, 10, 100]
    assert [one.cost_ns for one in search.frontier(100.0, 4)] == [0, 10, 31, 100]
    assert [one.cost_ns for one in search.frontier(100.0, 9)] == [0, 1, 10, 31, 100]


def test_at_the_highest_price_the_leanest_possible_choice_is_best() -> None:
    problem = random_problem(3, nodes=6, options=3, arcs=8)
    nodes = tuple(replace(node, nbytes=node.nbytes * 10**9) for node in problem.nodes)
    big = replace(problem, nodes=nodes, arcs=tuple(replace(arc, nbytes=arc.nbytes * 10**9) for arc in problem.arcs))
    found = PlacementSolver(big).solution_at(1e12)
    assert found.nbytes == min(nbytes for _, nbytes in all_choices(big))
    assert found.cost_ns < FORBIDDEN


@pytest.mark.parametrize("seed", range(3))
def test_a_restricted_problem_costs_what_the_whole_one_does(seed: int) -> None:
    problem = random_problem(seed, nodes=4, options=3, arcs=6)
    allowed = {Decision(DecisionKind.CALL, "n0"): [2], Decision(DecisionKind.CALL, "n2"): [0, 2]}
    inner = restrict(problem, allowed)
    positions = [allowed.get(node.decision, [0, 1, 2]) for node in problem.nodes]
    for choice in itertools.product(*(range(len(one)) for one in positions)):
        whole = {at: positions[at][number] for at, number in enumerate(choice)}
        assert evaluate(inner, dict(enumerate(choice))) == evaluate(problem, whole)
