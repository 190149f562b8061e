"""The assignment of blocks to stages and options against brute force, against even splits, and at its edges."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from autopar.costs.cuts import CutCost
from autopar.errors import InfeasibleError, InputError
from autopar.schedules.actions import Schedule
from autopar.schedules.families import forward_only, make_schedule
from autopar.search.pipeline.assignment import Assignment, assign, assign_by_block
from autopar.search.pipeline.assignment_problem import compute_cost, evaluate, make_problem
from autopar.search.pipeline.block_options import BlockOption, BlockOptions
from tests.block_options import measure_all, random_blocks, random_option

FAMILIES = [
    ("gpipe", 3, 4, None),
    ("1f1b", 3, 5, None),
    ("1f1b", 1, 3, None),
    ("1f1b", 4, 2, None),
    ("interleaved", 2, 4, 2),
    ("zb-h1", 3, 5, None),
    ("zb-v", 2, 5, 2),
    ("v-half", 2, 6, 2),
]
GAP = 1e-6


def check(blocks: Sequence[BlockOptions], schedule: Schedule, budget: Sequence[int], found: Assignment) -> None:
    """What is said of an assignment is true, and it may be taken."""
    seconds, peak = evaluate(blocks, schedule, found.stages, found.options)
    assert found.simulated == pytest.approx(seconds, rel=1e-9)
    assert found.peak == peak
    assert all(used <= there for used, there in zip(peak, budget, strict=True))
    assert found.bound <= found.simulated
    assert found.objective <= found.simulated * (1 + 1e-9)
    assert found.stages[0] == 0
    assert found.stages[-1] == schedule.stages - 1
    assert all(later - stage in (0, 1) for stage, later in itertools.pairwise(found.stages))
    assert all(block.stage in (None, stage) for block, stage in zip(blocks, found.stages, strict=True))


@pytest.mark.parametrize(("name", "ranks", "microbatches", "chunks"), FAMILIES)
@pytest.mark.parametrize(("seed", "alike"), [(0, False), (1, True)])
def test_equals_brute_force(name: str, ranks: int, microbatches: int, chunks: int | None, seed: int, alike: bool) -> None:
    schedule = make_schedule(name, ranks, microbatches, chunks)
    blocks = random_blocks(seed, blocks=6, options=3, alike=alike)
    every = measure_all(blocks, schedule)
    peaks = sorted(max(peak) for _, peak in every)
    # From memory that hardly anything fits to more than enough.
    for budget in (peaks[0], peaks[len(peaks) // 50], peaks[len(peaks) // 4], peaks[-1]):
        best = min(seconds for seconds, peak in every if max(peak) <= budget)
        found = assign(blocks, schedule, budget, gap=GAP, time_limit=60)
        check(blocks, schedule, [budget] * ranks, found)
        assert found.simulated == pytest.approx(best, rel=2 * GAP)
        assert found.status == "optimal"
        assert found.objective == pytest.approx(found.simulated, rel=1e-3)
    with pytest.raises(InfeasibleError) as error:
        assign(blocks, schedule, peaks[0] - 1)
    assert error.value.needed == peaks[0]


@pytest.mark.parametrize("seed", range(4))
def test_each_rank_has_its_own_budget(seed: int) -> None:
    schedule = make_schedule("1f1b", 3, 4)
    blocks = random_blocks(seed, blocks=6, options=2, alike=False)
    every = measure_all(blocks, schedule)
    # What one of the leaner assignments needs on each rank.
    budget = sorted((peak for _, peak in every), key=sum)[len(every) // 20]
    fits = [seconds for seconds, peak in every if all(used <= there for used, there in zip(peak, budget, strict=True))]
    found = assign(blocks, schedule, budget, gap=GAP)
    check(blocks, schedule, budget, found)
    assert found.simulated == pytest.approx(min(fits), rel=2 * GAP)
    assert found.simulated > assign(blocks, schedule, max(budget), gap=GAP).simulated


@pytest.mark.parametrize("pins", [{1: 1}, {2: 0}, {0: 0, 4: 1, 5: 2}, {1: 1, 2: 2}])
def test_pins_are_kept(pins: dict[int, int]) -> None:
    schedule = make_schedule("1f1b", 3, 4)
    free = random_blocks(7, blocks=6, options=2, alike=True)
    blocks = [BlockOptions(block.name, block.options, block.cut, pins.get(number)) for number, block in enumerate(free)]
    best = min(seconds for seconds, _ in measure_all(blocks, schedule))
    found = assign(blocks, schedule, 10**6, gap=GAP)
    check(blocks, schedule, [10**6] * 3, found)
    assert {block: found.stages[block] for block in pins} == pins
    assert found.simulated == pytest.approx(best, rel=2 * GAP)


def test_forward_only_counts_no_backward() -> None:
    schedule = forward_only(make_schedule("1f1b", 2, 3).rank_of, 3)
    blocks = random_blocks(3, blocks=5, options=2, alike=False)
    every = measure_all(blocks, schedule)
    found = assign(blocks, schedule, 10**6, gap=GAP)
    assert found.simulated == pytest.approx(min(seconds for seconds, _ in every), rel=2 * GAP)


def llama(layers: int, recompute: int, *, cut: float = 1e-4) -> list[BlockOptions]:
    """An embedding, like layers with `recompute` ways to keep less, a heavy head."""
    shares = np.linspace(0, 1, recompute)
    layer = tuple(
        BlockOption(f"r{i}", 1e-3, 1e-3 * (1 + share), 1e-3, 1e-4, int(76e6 - 60e6 * share), 10**7, 7 * 10**8, 2 * 10**8)
        for i, share in enumerate(shares.tolist())
    )
    embedding = BlockOption("e", 2e-4, 0.0, 3e-4, 1e-4, 16 * 10**6, 0, 2 * 10**9, 10**8)
    head = BlockOption("h", 1.5e-3, 1.5e-3, 1.5e-3, 1e-4, 64 * 10**6, 0, 2 * 10**9, 10**9)
    ends = CutCost(cut, cut, 16 * 10**6)
    return [
        BlockOptions("embedding", (embedding,), ends),
        *(BlockOptions(f"layers.{i}", layer, ends) for i in range(layers)),
        BlockOptions("head", (head,), ends),
    ]


def even_split(blocks: Sequence[BlockOptions], schedule: Schedule, budget: int) -> float:
    """What one gets by hand: layers evenly, and the fastest one option for all of them that fits."""
    layers = len(blocks) - 2
    of = [min(schedule.stages - 1, i * schedule.stages // layers) for i in range(layers)]
    stages = [0, *of, schedule.stages - 1]
    best = math.inf
    for option in range(len(blocks[1].options)):
        seconds, peak = evaluate(blocks, schedule, stages, [0, *([option] * layers), 0])
        if max(peak) <= budget:
            best = min(best, seconds)
    return best


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "chunks", "layers", "budget"),
    [
        ("1f1b", 4, 16, None, 22, 60),
        ("1f1b", 4, 16, None, 22, 9),
        ("1f1b", 8, 64, None, 61, 11),
        ("gpipe", 4, 8, None, 22, 10),
        ("interleaved", 4, 16, 3, 22, 12),
        ("zb-h1", 8, 64, None, 61, 13),
        ("zb-v", 4, 16, 2, 30, 14),
        ("v-half", 4, 16, 2, 30, 12),
    ],
)
def test_never_worse_than_an_even_split(name: str, ranks: int, microbatches: int, chunks: int | None, layers: int, budget: int) -> None:
    schedule = make_schedule(name, ranks, microbatches, chunks)
    blocks = llama(layers, 3)
    nbytes = budget * 10**9
    found = assign(blocks, schedule, nbytes, time_limit=3)
    check(blocks, schedule, [nbytes] * ranks, found)
    by_hand = even_split(blocks, schedule, nbytes)
    assert found.simulated <= by_hand
    assert found.objective == pytest.approx(found.simulated, rel=0.02)
    assert found.simulated <= 1.1 * found.bound


def test_tight_memory_mixes_options_and_stages() -> None:
    """By hand: rank 0 holds two micro-batches. It can't keep all of two blocks, rank 1 can."""
    fast = BlockOption("fast", 1.0, 1.0, 1.0, 0.0, 10, 0, 0, 0)
    lean = BlockOption("lean", 1.0, 2.0, 1.0, 0.0, 1, 0, 0, 0)
    blocks = [BlockOptions(f"b{i}", (fast, lean), CutCost(0.0, 0.0, 0)) for i in range(4)]
    schedule = make_schedule("1f1b", 2, 8)
    found = assign(blocks, schedule, 22, gap=GAP)
    # One of rank 0's two blocks recomputes: 2 (10 + 1) = 22 bytes.
    assert found.stages == (0, 0, 1, 1)
    assert sorted(found.options[:2]) == [0, 1]
    assert found.options[2:] == (0, 0)
    assert found.peak == (22, 20)
    # Rank 0 works 8 (3 + 4) s; its last backward waits for nothing, its first for rank 1's 2 + 4 s.
    assert found.simulated == pytest.approx(evaluate(blocks, schedule, (0, 0, 1, 1), (0, 1, 0, 0))[0])
    assert assign(blocks, schedule, 21, gap=GAP).simulated > found.simulated


def test_an_option_that_lets_less_wait_is_worth_taking() -> None:
    fast = BlockOption("fast", 1.0, 1.0, 1.0, 0.0, 1, 10, 0, 0)
    lean = BlockOption("lean", 1.0, 1.0, 2.0, 0.0, 1, 0, 0, 0)
    blocks = [BlockOptions(f"b{i}", (fast, lean), CutCost(0.0, 0.0, 0)) for i in range(2)]
    assert assign(blocks, make_schedule("zb-h1", 2, 4), 5).options == (1, 1)
    assert assign(blocks, make_schedule("1f1b", 2, 4), 5).options == (0, 0)


def test_many_layers_are_counted_not_listed() -> None:
    blocks = llama(126, 9)
    schedule = make_schedule("1f1b", 16, 64)
    found = assign(blocks, schedule, 11 * 10**9, time_limit=30, gap=0.02)
    check(blocks, schedule, [11 * 10**9] * 16, found)
    assert found.status == "optimal"
    assert len({found.stages.count(stage) for stage in range(16)}) > 1


def test_a_chain_without_repeats() -> None:
    rng = np.random.default_rng(5)
    blocks = [
        BlockOptions(f"b{i}", tuple(random_option(rng, f"v{j}") for j in range(3)), CutCost(1e-4, 1e-4, int(rng.integers(1, 9))))
        for i in range(40)
    ]
    schedule = make_schedule("1f1b", 4, 16)
    found = assign(blocks, schedule, 1500, time_limit=30, gap=0.02)
    check(blocks, schedule, [1500] * 4, found)
    assert found.status == "optimal"


def test_the_search_ends_at_the_cutoff() -> None:
    blocks = llama(22, 3)
    schedule = make_schedule("1f1b", 4, 16)
    best = assign(blocks, schedule, 9 * 10**9)
    early = assign(blocks, schedule, 9 * 10**9, cutoff=0.5 * best.bound)
    assert early.status == "beyond"
    assert early.bound >= 0.5 * best.bound
    assert early.iterations < best.iterations


def test_refusals_say_what_to_do() -> None:
    schedule = make_schedule("1f1b", 4, 8)
    blocks = llama(10, 2)
    with pytest.raises(InfeasibleError, match=r"3 blocks can't fill the 4 stages .* take fewer stages") as error:
        assign(llama(1, 2), schedule, 10**12)
    assert error.value.needed == 0
    with pytest.raises(InputError, match="2 budgets of memory for 4 pipeline ranks"):
        assign(blocks, schedule, [10**12, 10**12])

    def pin(**stages: int) -> list[BlockOptions]:
        return [BlockOptions(block.name, block.options, block.cut, stages.get(block.name)) for block in blocks]

    with pytest.raises(InputError, match="'head' is pinned to stage 4; the stages are 0 to 3"):
        assign(pin(head=4), schedule, 10**12)
    with pytest.raises(InfeasibleError, match=r"'embedding' pinned to stage 2.* 0 blocks for 2 stages.*move a pin"):
        assign(pin(embedding=2), schedule, 10**12)
    with pytest.raises(InfeasibleError, match="'head' pinned to stage 1"):
        assign(pin(head=1), schedule, 10**12)
    with pytest.raises(InfeasibleError, match=r"'head' is pinned to stage 2, block 'layers.9' before it to stage 3; .* in order"):
        assign(pin(**{"layers.9": 3, "head": 2}), schedule, 10**12)
    with pytest.raises(InfeasibleError, match=r"need .* on pipeline rank \d at the leanest, 2.00 GB are there") as error:
        assign(blocks, schedule, 2 * 10**9)
    assert assign(blocks, schedule, error.value.needed).peak


@pytest.mark.parametrize(("name", "seed", "budget"), [("zb-v", 1, 271), ("zb-v", 13, 292), ("zb-h1", 31, 330)])
def test_weight_gradients_that_wait_fit_the_budget_block_by_block_too(name: str, seed: int, budget: int) -> None:
    schedule = make_schedule(name, 2, 4)
    blocks = random_blocks(seed, blocks=7, options=3, alike=False)

    def needs(found: Assignment) -> int:
        return max(compute_cost(make_problem(blocks, schedule, 0), found.stages, found.options, is_bound=False).peak)

    assert needs(assign(blocks, schedule, budget, gap=GAP, time_limit=60)) > budget
    found, cost = assign_by_block(blocks, schedule, budget, gap=GAP, time_limit=60, cutoff=math.inf)
    assert needs(found) == max(cost.peak) <= budget
    with pytest.raises(InfeasibleError) as failed:
        assign_by_block(blocks, schedule, 100, gap=GAP, time_limit=60, cutoff=math.inf)
    assert failed.value.needed > 100
