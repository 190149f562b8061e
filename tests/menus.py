"""Random menus, and all assignments of small ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from autopar.schedules.actions import Schedule
from autopar.search.pipeline.assignment import BlockMenu, Cut, Variant, evaluate


def random_variant(rng: np.random.Generator, name: str) -> Variant:
    forward, backward, weight, once = rng.integers(1, 30, 4).tolist()
    kept, waiting, static, workspace = rng.integers(1, 40, 4).tolist()
    return Variant(name, forward * 1e-3, backward * 1e-3, weight * 1e-3, once * 1e-3, kept, waiting, static, workspace)


def random_menus(seed: int, blocks: int, variants: int, *, alike: bool) -> list[BlockMenu]:
    """Blocks between a first and a last of their own; `alike` makes them one layer."""
    rng, left = np.random.default_rng(seed), np.random.default_rng(seed + 1000)
    made: list[BlockMenu] = []
    for block in range(blocks):
        inside = 0 < block < blocks - 1
        if alike and inside and made[1:]:
            made.append(BlockMenu(f"b{block}", made[1].variants, made[1].cut))
        else:
            menu = tuple(random_variant(rng, f"v{i}") for i in range(variants if inside else 1))
            cut = rng.integers(0, 9, 3).tolist()
            made.append(BlockMenu(f"b{block}", menu, Cut(cut[0] * 1e-3, cut[1] * 1e-3, cut[2], int(left.integers(0, 9)))))
    return made


def all_assignments(menus: Sequence[BlockMenu], stages: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for ends in itertools.combinations(range(1, len(menus)), stages - 1):
        cuts = (0, *ends, len(menus))
        of = tuple(stage for stage in range(stages) for _ in range(cuts[stage], cuts[stage + 1]))
        if all(menu.stage in (None, stage) for menu, stage in zip(menus, of, strict=True)):
            for variants in itertools.product(*(range(len(menu.variants)) for menu in menus)):
                yield of, variants


def measure_all(menus: Sequence[BlockMenu], schedule: Schedule) -> list[tuple[float, tuple[int, ...]]]:
    return [evaluate(menus, schedule, *choice) for choice in all_assignments(menus, schedule.stages)]
