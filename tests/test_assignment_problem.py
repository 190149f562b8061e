"""What an assignment comes to, by hand, and which options are worth taking."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autopar.costs import BUCKET_NBYTES
from autopar.costs.cuts import CutCost
from autopar.schedules import Schedule
from autopar.schedules.families import forward_only, make_schedule
from autopar.search.pipeline.assignment_problem import PHASES, RECEIVES_AT_ONCE, compute_cost, longest_path, make_problem
from autopar.search.pipeline.block_options import BlockOption, BlockOptions
from autopar.search.pipeline.peaks import StageProfile, find_peak
from tests.block_options import random_blocks

PLAIN = BlockOption("plain", 1.0, 2.0, 3.0, 4.0, 10, 20, 100, 7)


def test_an_assignment_in_numbers() -> None:
    wide = replace(PLAIN, name="wide", workspace=9, per_step=8.0)
    blocks = [BlockOptions(f"b{i}", (PLAIN, wide), CutCost(0.25 + i, 0.5 + i, 3 + i, 1000)) for i in range(4)]
    problem = make_problem(blocks, make_schedule("1f1b", 2, 5), 0)
    measured = compute_cost(problem, (0, 0, 0, 1), (0, 1, 0, 1))
    # Forwards, both backwards, and what crosses behind the third block.
    assert measured.columns.tolist() == [3.0, 1.0, 6.0, 2.0, 9.0, 3.0, 2.25, 2.5]
    assert measured.per_step == 4.0 + 8.0 + 4.0
    # The first rank holds two micro-batches of three blocks; the second one, with a copy of what was read before.
    message = RECEIVES_AT_ONCE * 5
    assert measured.peak == (2 * 3 * 10 + 3 * 100 + 9 + message, 10 + 1000 + 100 + 9 + message)


def test_ranks_of_two_stages_add_them_up() -> None:
    blocks = [BlockOptions(f"b{i}", (replace(PLAIN, per_step=float(1 + i), workspace=i),), CutCost(0.0, 0.0, i)) for i in range(4)]
    problem = make_problem(blocks, make_schedule("zb-v", 2, 1), 0)
    measured = compute_cost(problem, (0, 1, 2, 3), (0, 0, 0, 0))
    assert measured.per_step == 1.0 + 4.0
    # Stages 0 and 3 on the first rank: two are held between forward and backward, or one that waits beside one that is.
    assert measured.peak[0] == max(20, 30) + 200 + (0 + 3) + RECEIVES_AT_ONCE * 2


def test_messages_to_a_rank_cross_its_stages_ends() -> None:
    schedule = make_schedule("1f1b", 3, 2)
    blocks = random_blocks(0, blocks=4, options=1, alike=False)
    assert make_problem(blocks, schedule, 0).messages_to == ((0,), (0, 1), (1,))
    assert make_problem(blocks, forward_only(schedule, 2), 0).messages_to == ((), (0,), (1,))
    # On a V the last stage follows one of the other rank; the two in the middle are on one.
    assert make_problem(blocks, make_schedule("zb-v", 2, 2), 0).messages_to == ((0, 2), (0, 2))


@pytest.mark.parametrize(("name", "ranks"), [("gpipe", 3), ("1f1b", 3), ("interleaved", 2), ("zb-v", 2)])
def test_the_longest_paths_columns_add_up_to_its_seconds(name: str, ranks: int) -> None:
    for seed in range(3):
        blocks = random_blocks(seed, blocks=6, options=1, alike=False)
        problem = make_problem([replace(block, cut=CutCost(0.5, 0.01, 1)) for block in blocks], make_schedule(name, ranks, 4), 0)
        stages = tuple(np.repeat(np.arange(problem.schedule.stages), 6)[:: problem.schedule.stages].tolist())
        columns = compute_cost(problem, stages, (0,) * 6).columns
        seconds, path = longest_path(problem, columns)
        assert path @ columns == pytest.approx(seconds)
        assert path[PHASES * problem.schedule.stages :].any()


@pytest.mark.parametrize(
    ("better", "schedules"),
    [
        ({"forward": 0.5}, "gpipe zb-h1 forward"),
        ({"backward_input": 1.5}, "gpipe zb-h1"),
        ({"backward_weight": 2.5}, "gpipe zb-h1"),
        ({"backward_input": 1.5, "backward_weight": 3.5}, "zb-h1"),
        ({"per_step": 3.0}, "gpipe zb-h1 forward"),
        ({"saved": 9}, "gpipe zb-h1"),
        ({"waiting": 19}, "zb-h1"),
        ({"workspace": 6}, "gpipe zb-h1 forward"),
    ],
)
def test_an_option_is_kept_where_it_is_better_in_what_counts(better: dict[str, float], schedules: str) -> None:
    other = replace(PLAIN, **better, name="other", static=1000)  # type: ignore[arg-type]
    for schedule in (make_schedule("gpipe", 2, 2), make_schedule("zb-h1", 2, 2), forward_only((0, 1), 2)):
        name = "forward" if not schedule.has_backward else schedule.name
        blocks = [BlockOptions(f"b{i}", (PLAIN, other), CutCost(0.0, 0.0, 0)) for i in range(2)]
        kept = (0, 1) if name in schedules else (0,)
        assert make_problem(blocks, schedule, 0).runs[0].indices == kept, name


def test_of_equal_options_only_one_is_kept() -> None:
    blocks = [BlockOptions(f"b{i}", (PLAIN, replace(PLAIN, name="same"), PLAIN), CutCost(0.0, 0.0, 0)) for i in range(2)]
    assert make_problem(blocks, make_schedule("1f1b", 2, 2), 0).runs[0].indices == (0,)


def random_profile(rng: np.random.Generator, blocks: int) -> StageProfile:
    """A stage of a schedule in which no weight gradients wait; sums of gradients take from no bucket to several."""
    sizes = rng.integers(0, 2 * BUCKET_NBYTES, (7, blocks)) * (rng.random((7, blocks)) < 0.7)
    saved, gradients, workspace, more, forward, whole, arriving = sizes
    parts = whole // rng.integers(1, 5)
    together = np.where(rng.random(blocks) < 0.5, whole, whole // 3)
    none = np.zeros_like(saved)
    return StageProfile(
        saved=saved,
        waiting=none,
        gradients=gradients,
        arriving=np.minimum(arriving, gradients),
        copies=none,
        unsaved=none,
        workspace=workspace,
        first_workspace=workspace + more,
        forward_workspace=forward,
        bucketed=none,
        unsummed=none,
        scattered=none,
        scattered_each=whole,
        together=together,
        largest=np.maximum(whole - together, together // 2),
        parts=parts,
        update=0,
    )


@pytest.mark.parametrize("schedule", [make_schedule("gpipe", 2, 3), make_schedule("1f1b", 3, 4), make_schedule("interleaved", 2, 4)])
def test_block_by_block_a_schedule_needs_no_more_than_the_model_of_assignments_has(schedule: Schedule) -> None:
    # A plan names the bytes block by block; if they were more, a plan could exceed the memory that it was searched for.
    rng = np.random.default_rng(0)
    problem = make_problem(random_blocks(0, blocks=schedule.stages, options=1, alike=False), schedule, 0)
    less = 0
    for _ in range(300):
        for stages, holdings in zip(problem.stages_of, problem.holdings, strict=True):
            profiles = [random_profile(rng, int(rng.integers(1, 5))) for _ in stages]
            fine, bound = (find_peak(profiles, holdings, is_whole=False, is_bound=is_bound) for is_bound in (False, True))
            assert fine.held + fine.workspace - fine.apart <= bound.held + bound.workspace - bound.apart
            less += fine != bound
    assert less
