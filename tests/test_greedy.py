"""Assignments made at once: they fit, keep the pins, and are as good as greedy ones can be."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from autopar.costs.cuts import CutCost
from autopar.schedules.families import make_schedule
from autopar.search.pipeline.assignment_problem import PHASES, AssignmentProblem, compute_cost, longest_path, make_problem
from autopar.search.pipeline.block_options import BlockOption, BlockOptions
from autopar.search.pipeline.greedy import _GreedySearch, assign_greedily, find_leanest
from tests.block_options import all_assignments, measure_all, random_blocks

FAMILIES = [
    ("gpipe", 3, 4, None),
    ("1f1b", 3, 5, None),
    ("interleaved", 2, 4, 2),
    ("zb-h1", 3, 5, None),
    ("zb-v", 2, 5, 2),
    ("v-half", 2, 6, 2),
]
PLENTY = 10**12


def check(problem: AssignmentProblem, stages: tuple[int, ...], options: tuple[int, ...]) -> None:
    assert len(stages) == len(options) == len(problem.blocks)
    assert stages[0] == 0
    assert stages[-1] == problem.schedule.stages - 1
    assert all(later - stage in (0, 1) for stage, later in itertools.pairwise(stages))
    assert all(block.stage in (None, stage) for block, stage in zip(problem.blocks, stages, strict=True))
    assert all(option < len(block.options) for block, option in zip(problem.blocks, options, strict=True))


def like(count: int, *options: BlockOption) -> list[BlockOptions]:
    return [BlockOptions(f"b{i}", options, CutCost(0.0, 0.0, 0)) for i in range(count)]


def stage_seconds(problem: AssignmentProblem, stages: tuple[int, ...], options: tuple[int, ...]) -> np.ndarray:
    count = problem.schedule.stages
    seconds: np.ndarray = compute_cost(problem, stages, options).columns[: PHASES * count].reshape(PHASES, count).sum(axis=0)
    return seconds


@pytest.mark.parametrize(("name", "ranks", "microbatches", "chunks"), FAMILIES)
@pytest.mark.parametrize("seed", range(4))
def test_greedy_assignments_fit_whatever_the_memory(name: str, ranks: int, microbatches: int, chunks: int | None, seed: int) -> None:
    schedule = make_schedule(name, ranks, microbatches, chunks)
    blocks = random_blocks(seed, blocks=6, options=3, alike=bool(seed % 2))
    every = measure_all(blocks, schedule)
    peaks = sorted(max(peak) for _, peak in every)
    for budget in (peaks[0] - 1, peaks[0], peaks[len(peaks) // 20], peaks[len(peaks) // 4], peaks[-1]):
        problem = make_problem(blocks, schedule, budget)
        found = list(assign_greedily(problem))
        assert not (found and budget < peaks[0])
        for stages, options in found:
            check(problem, stages, options)
            assert max(compute_cost(problem, stages, options).peak) <= budget
    assert found, "with memory for everything there is a greedy assignment"


@pytest.mark.parametrize("pins", [{1: 1}, {2: 0}, {0: 0, 4: 1, 5: 2}, {1: 1, 2: 2}])
def test_greedy_assignments_keep_pins(pins: dict[int, int]) -> None:
    free = random_blocks(7, blocks=6, options=2, alike=True)
    problem = make_problem(
        [replace(block, stage=pins.get(number)) for number, block in enumerate(free)], make_schedule("1f1b", 3, 4), PLENTY
    )
    found = list(assign_greedily(problem))
    assert found
    for stages, options in (*found, find_leanest(problem)):
        check(problem, stages, options)


@pytest.mark.parametrize("seed", [0, 1, 2, 10, 21, 28])
def test_the_slowest_stage_is_as_fast_as_can_be(seed: int) -> None:
    blocks = random_blocks(seed, blocks=8, options=1, alike=False)
    problem = make_problem(blocks, make_schedule("1f1b", 3, 4), PLENTY)
    best = min(stage_seconds(problem, *one).max() for one in all_assignments(blocks, 3))
    assert min(stage_seconds(problem, *one).max() for one in assign_greedily(problem)) == pytest.approx(best, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "ranks", "chunks", "seed", "budget", "within"),
    [
        ("zb-h1", 3, None, 10, 253, 1.0),
        ("zb-v", 2, 2, 3, 261, 1.0),
        ("zb-v", 2, 2, 4, 275, 1.0),
        ("zb-v", 2, 2, 11, 266, 1.0),
        ("zb-v", 2, 2, 13, 242, 1.2),
    ],
)
def test_with_little_memory_the_slowest_rank_is_nearly_as_fast_as_can_be(
    name: str, ranks: int, chunks: int | None, seed: int, budget: int, within: float
) -> None:
    """The budgets are so that greedy assignments of even stages alone are slower or don't fit."""
    schedule = make_schedule(name, ranks, 5, chunks)
    blocks = random_blocks(seed, blocks=6, options=3, alike=bool(seed % 2))
    problem = make_problem(blocks, schedule, budget)

    def slowest(one: tuple[tuple[int, ...], tuple[int, ...]]) -> float:
        seconds = stage_seconds(problem, *one)
        return max(float(seconds[list(own)].sum()) for own in problem.stages_of)

    fitting = [one for one in all_assignments(blocks, schedule.stages) if max(compute_cost(problem, *one).peak) <= budget]
    assert min(map(slowest, assign_greedily(problem))) <= within * min(map(slowest, fitting)) + 1e-9


def test_a_stage_is_timed_with_the_cheapest_exchanges_that_its_bytes_ask_for() -> None:
    fast = BlockOption("fast", 1.0, 1.0, 1.0, 0.0, 10, 0, 0, 0)
    cheap, dear = (BlockOption(name, 1.0, seconds, 1.0, 0.0, 1, 0, 0, 0) for name, seconds in (("cheap", 2.0), ("dear", 6.0)))
    blocks = [BlockOptions("first", (fast, dear), CutCost(0.0, 0.0, 0)), BlockOptions("second", (fast, cheap), CutCost(0.0, 0.0, 0))]
    search = _GreedySearch(make_problem(blocks, make_schedule("1f1b", 1, 1), PLENTY))
    assert [search._stage_seconds(0, 0, 2, share) for share in (20, 19, 11, 10, 2)] == [6.0, 7.0, 7.0, 12.0, 12.0]
    assert search._stage_seconds(0, 0, 2, 1) == np.inf


def test_workspace_counts_where_a_block_takes_the_option_that_needs_it() -> None:
    small, large = BlockOption("small", 1.0, 1.0, 1.0, 0.0, 10, 0, 0, 1), BlockOption("large", 1.0, 2.0, 1.0, 0.0, 1, 0, 0, 100)
    assert next(assign_greedily(make_problem(like(2, small, large), make_schedule("1f1b", 2, 2), 21)))[1] == (0, 0)


@pytest.mark.parametrize("what", ["static", "saved", "workspace"])
def test_the_leanest_counts_all_that_an_option_needs(what: str) -> None:
    lean = BlockOption("lean", 1.0, 3.0, 1.0, 0.0, 5, 0, 5, 5)
    heavy = replace(lean, name="heavy", backward_input=1.0, **{what: 40})  # type: ignore[arg-type]
    assert find_leanest(make_problem(like(2, heavy, lean), make_schedule("1f1b", 2, 2), 1))[1] == (1, 1)


def test_like_blocks_recompute_no_more_than_they_must() -> None:
    """Rank 0 holds three micro-batches of four blocks, in 3 (10 n + 1 (4 - n)) of 75 bytes: two blocks keep all, two don't."""
    fast, lean = (BlockOption(name, 1.0, seconds, 1.0, 0.0, kept, 0, 0, 0) for name, seconds, kept in (("fast", 1.0, 10), ("lean", 2.0, 1)))
    problem = make_problem(like(12, fast, lean), make_schedule("1f1b", 3, 9), 75)
    stages, options = next(assign_greedily(problem))
    assert stages == (0,) * 4 + (1,) * 4 + (2,) * 4
    assert [sum(options[start : start + 4]) for start in (0, 4, 8)] == [2, 1, 0]
    assert compute_cost(problem, stages, options).peak == (66, 62, 40)


def test_of_two_exchanges_the_one_that_saves_more_for_its_time_is_made() -> None:
    fast = BlockOption("fast", 1.0, 1.0, 1.0, 0.0, 100, 0, 0, 0)
    dear, cheap = replace(fast, name="dear", backward_input=3.0, saved=10), replace(fast, name="cheap", backward_input=1.5, saved=40)
    problem = make_problem(like(2, fast, dear, cheap), make_schedule("1f1b", 1, 2), 150)
    # One cheap exchange leaves 140 bytes; a dear one would take 1.5 s more.
    assert sorted(next(assign_greedily(problem))[1]) == [0, 2]
    assert next(assign_greedily(make_problem(like(2, fast, dear, cheap), make_schedule("1f1b", 1, 2), 80)))[1] == (2, 2)
    assert next(assign_greedily(make_problem(like(2, fast, dear, cheap), make_schedule("1f1b", 1, 2), 20)))[1] == (1, 1)


def test_ranks_of_several_stages_get_whole_layers_in_each_round() -> None:
    """Eight layers for each rank of three stages: 3, 3 and 2, not any mixture of twos and threes."""
    one = BlockOption("none", 1.0, 1.0, 1.0, 0.0, 1, 0, 0, 0)
    problem = make_problem(like(32, one), make_schedule("interleaved", 4, 16, 3), PLENTY)
    found = list(assign_greedily(problem))
    sizes = [[stages.count(stage) for stage in range(12)] for stages, _ in found]
    assert [3] * 8 + [2] * 4 in sizes
    seconds = {tuple(size): longest_path(problem, compute_cost(problem, *one).columns)[0] for size, one in zip(sizes, found, strict=True)}
    by_time = sizes[0]
    assert seconds[(3,) * 8 + (2,) * 4] < seconds[tuple(by_time)]


def test_on_a_v_a_rank_uses_what_its_first_stage_leaves() -> None:
    """A heavy head sits with the first stage on rank 0; a bound for each stage alone would leave that rank idle."""
    layer, head = BlockOption("layer", 1.0, 1.0, 1.0, 0.0, 1, 0, 0, 0), BlockOption("head", 5.0, 5.0, 5.0, 0.0, 1, 0, 0, 0)
    blocks = [*like(31, layer), BlockOptions("head", (head,), CutCost(0.0, 0.0, 0))]
    problem = make_problem(blocks, make_schedule("zb-v", 4, 16), PLENTY)
    slowest = []
    for one in assign_greedily(problem):
        work = stage_seconds(problem, *one)
        slowest.append(max(float(work[list(own)].sum()) for own in problem.stages_of))
    # 31 layers and a head of five layers' time on four ranks: nine each.
    assert min(slowest) == pytest.approx(27.0)


def test_the_leanest_takes_the_options_that_need_least() -> None:
    fast, lean = (BlockOption(name, 1.0, 1.0, 1.0, 0.0, kept, 0, 5, 0) for name, kept in (("fast", 10), ("lean", 1)))
    problem = make_problem(like(4, fast, lean), make_schedule("1f1b", 2, 4), 1)
    assert list(assign_greedily(problem)) == []
    stages, options = find_leanest(problem)
    assert (stages, options) == ((0, 0, 1, 1), (1, 1, 1, 1))
    assert compute_cost(problem, stages, options).peak == (14, 12)
