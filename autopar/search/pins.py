"""What the user, or a program before, asks of a pipeline.

Comes in: pins, a mesh, the plan of an earlier program over the same parameters. Goes out: `Wanted`, and the pins and the mesh of one group
of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from autopar.errors import InputError
from autopar.ir import PIPELINE
from autopar.plans import RECOMPUTE, Plan
from autopar.schedules import SCHEDULES
from autopar.structure import Chain

PINS = ("pp", "schedule", "microbatches", "chunks", "recompute")


@dataclass(frozen=True)
class Wanted:
    """What the user asked of the pipeline; None is left to the search."""

    groups: int | None = None
    schedule: str | None = None
    microbatches: int | None = None
    chunks: int | None = None
    recompute: str | None = None
    stages: Mapping[str, int] | None = None

    @property
    def asks(self) -> bool:
        """Whether anything was asked for."""
        return any(value is not None for value in (self.groups, self.schedule, self.microbatches, self.chunks, self.recompute, self.stages))

    def __str__(self) -> str:
        names = {"groups": "pp", "stages": "stages"}
        given = ((names.get(one.name, one.name), getattr(self, one.name)) for one in fields(self))
        return "the pins " + ", ".join(f"{name}={value}" for name, value in given if value is not None)


def read_pipeline(pins: Mapping[str, object], mesh: Mapping[str, int] | None) -> tuple[Wanted, dict[str, object], dict[str, int] | None]:
    """What the user asks of the pipeline; the pins and the mesh of one group of ranks that are left.

    Raises InputError for pins and meshes that aren't mappings, that contradict each other, or whose values can't be used.
    """
    for what, given in (("pins", pins), ("mesh", mesh)):
        if given is not None and not isinstance(given, Mapping):
            raise InputError(f"{what}={given!r}: a dict is needed, such as {{'dp': 4}}")
    groups = pins.get(PIPELINE) if mesh is None else mesh.get(PIPELINE, pins.get(PIPELINE))
    if groups != pins.get(PIPELINE, groups):
        raise InputError(f"the mesh has pp={groups} and pin pp={pins[PIPELINE]!r} asks for another number; leave out one of them")
    wanted = read_pins(pins if groups is None else {**pins, PIPELINE: groups})
    if mesh is not None and groups is None and wanted.asks:
        # A given mesh is that of all ranks, unless it says otherwise.
        wanted = replace(wanted, groups=1)
    left: dict[str, object] = {}
    for name, value in pins.items():
        if name in PINS:
            continue
        loops = {axis: loop for axis, loop in value.items() if axis != PIPELINE} if isinstance(value, Mapping) else value
        if loops or not isinstance(value, Mapping):
            left[name] = loops
    inner = None if mesh is None else {name: size for name, size in mesh.items() if name != PIPELINE}
    return wanted, left, inner if inner is None or inner else {"free": 1}


def read_pins(pins: Mapping[str, object]) -> Wanted:
    """What `pins` say about pipelines. Raises InputError for values that can't be used."""
    for name in ("pp", "microbatches", "chunks"):
        value = pins.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"pin {name}={value!r}: an integer from 1 is needed")
    schedule, recompute = pins.get("schedule"), pins.get("recompute")
    if schedule is not None and not (isinstance(schedule, str) and schedule in SCHEDULES):
        raise InputError(f"pin schedule={schedule!r} is unknown; there are {', '.join(SCHEDULES)}")
    if isinstance(recompute, bool):
        recompute = "full" if recompute else "none"
    if recompute is not None and not (isinstance(recompute, str) and recompute in RECOMPUTE):
        raise InputError(f"pin recompute={recompute!r} is unknown; there are {', '.join(RECOMPUTE)}, true (full) and false (none)")
    stages = {name: value["pp"] for name, value in pins.items() if isinstance(value, Mapping) and "pp" in value}
    for name, stage in stages.items():
        if isinstance(stage, bool) or not isinstance(stage, int) or stage < 0:
            raise InputError(f"pin {name!r}: pp={stage!r} isn't the number of a stage, which is an integer from 0")

    def size(name: str) -> int | None:
        value = pins.get(name)
        return value if isinstance(value, int) else None

    return Wanted(
        size("pp"),
        str(schedule) if schedule is not None else None,
        size("microbatches"),
        size("chunks"),
        str(recompute) if recompute is not None else None,
        stages or None,
    )


def keep_pipeline(first: Plan, chain: Chain, batch: int) -> Wanted:
    """What a later program over the same parameters must keep: groups, schedule, and each block's stage; as many micro-batches as fit."""
    pipeline = first.pipeline
    known = {block.name: block.stage for block in pipeline.blocks}
    stages: dict[str, int] = {}
    stage = 0
    for block in chain.blocks:
        # A block that the first program didn't have (its loss, say) stays with the one before it.
        stage = stages[block.name] = known.get(block.name, stage)
    ways = math.prod(size for name, size in zip(first.mesh.names, first.mesh.sizes, strict=True) if name in first.batch_axes)
    rows = batch // ways if batch % ways == 0 else batch
    count = max(n for n in range(1, min(pipeline.microbatches, rows) + 1) if rows % n == 0)
    return Wanted(pipeline.ranks, pipeline.schedule, count, pipeline.chunks, None, stages)
