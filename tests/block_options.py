"""Random blocks, and all assignments of small ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from autopar.costs.cuts import CutCost
from autopar.schedules.actions import Schedule
from autopar.search.pipeline.assignment_problem import evaluate
from autopar.search.pipeline.block_options import BlockOption, BlockOptions


def random_option(rng: np.random.Generator, name: str) -> BlockOption:
    forward, backward, weight, per_step = rng.integers(1, 30, 4).tolist()
    kept, waiting, static, workspace = rng.integers(1, 40, 4).tolist()
    return BlockOption(name, forward * 1e-3, backward * 1e-3, weight * 1e-3, per_step * 1e-3, kept, waiting, static, workspace)


def random_blocks(seed: int, blocks: int, options: int, *, alike: bool) -> list[BlockOptions]:
    """Blocks between a first and a last of their own; `alike` makes them one layer."""
    rng, left = np.random.default_rng(seed), np.random.default_rng(seed + 1000)
    made: list[BlockOptions] = []
    for block in range(blocks):
        inside = 0 < block < blocks - 1
        if alike and inside and made[1:]:
            made.append(BlockOptions(f"b{block}", made[1].options, made[1].cut))
        else:
            options_of = tuple(random_option(rng, f"v{i}") for i in range(options if inside else 1))
            cut = rng.integers(0, 9, 3).tolist()
            made.append(BlockOptions(f"b{block}", options_of, CutCost(cut[0] * 1e-3, cut[1] * 1e-3, cut[2], int(left.integers(0, 9)))))
    return made


def all_assignments(blocks: Sequence[BlockOptions], stages: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for ends in itertools.combinations(range(1, len(blocks)), stages - 1):
        cuts = (0, *ends, len(blocks))
        of = tuple(stage for stage in range(stages) for _ in range(cuts[stage], cuts[stage + 1]))
        if all(block.stage in (None, stage) for block, stage in zip(blocks, of, strict=True)):
            for options in itertools.product(*(range(len(block.options)) for block in blocks)):
                yield of, options


def measure_all(blocks: Sequence[BlockOptions], schedule: Schedule) -> list[tuple[float, tuple[int, ...]]]:
    return [evaluate(blocks, schedule, *choice) for choice in all_assignments(blocks, schedule.stages)]
