"""The search against brute force on small problems, and its proof."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from autopar.errors import InfeasibleError
from autopar.layout import Mesh
from autopar.problem import FORBIDDEN, Arc, Node, Problem
from autopar.search import evaluate, solve


def random_problem(seed: int, nodes: int, options: int, arcs: int) -> Problem:
    rng = np.random.default_rng(seed)
    made = tuple(
        Node(f"n{i}", tuple((None,) * 1 for _ in range(options)), rng.integers(1, 100, options), rng.integers(1, 100, options))
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
    return Problem(made, tuple(tables), Mesh(("x",), (2,)), fixed_ns=0, fixed_bytes=0)


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
    node = Node("a", ((None,), (None,)), np.array([5, 3]), np.array([0, 0]))
    problem = Problem((node, node), (), Mesh(("x",), (2,)), fixed_ns=0, fixed_bytes=0)
    assert solve(problem, 10).cost_ns == 6
