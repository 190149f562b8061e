"""Whether the parts of a plan agree: what every plan that the search makes keeps to, and a file or an edited plan needn't.

`check_consistency` looks at the plan alone. Whether it belongs to a model is `autopar.plans.fits`, and whether its decisions can be carried
out on that model is seen when its program is made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from autopar.errors import InputError, PlanError
from autopar.ir import HALVES, MICROBATCH, PARTIAL, PIPELINE, REPLICATE_PARTIAL_GRAD, Layout, Placement
from autopar.plans.rows import OUTSIDE, Phase, Purpose
from autopar.schedules import check_schedule

if TYPE_CHECKING:
    from autopar.plans.plan import Pipeline, Plan

MOST_DEVICES = 2**31 - 1
"""Ranks are numbered in 32 bits by the libraries that let them communicate."""

MOST_FORWARDS = 2**20
"""Forwards of a step, one per stage and micro-batch: of more, the schedule alone, a list of actions, would take about a minute to make."""

# The objective is the search's number in whole nanoseconds, the step a sum of all rows: they may differ by what rounding adds up to.
_STEP_SHARE = 1e-3
_STEP_NS = 1000
_GAP = 1e-6

_PHASES, _PURPOSES = tuple(Phase), tuple(Purpose)
# Counts are read up to this many digits, which is far above MOST_DEVICES.
_CLUSTER = re.compile(r"([0-9]{1,18})x([0-9]{1,18})x(.+)")
_TENSOR = re.compile(r"\w+\[(?:[0-9]+(?:, [0-9]+)*)?\]", re.ASCII)
_VALUE = re.compile(r"[^.]+(?:\.[0-9]{1,9})?")


def check_consistency(plan: Plan) -> None:
    """Raise PlanError, naming the field, when the parts of `plan` contradict each other or say what no plan can."""
    _check_mesh(plan)
    _check_cluster(plan)
    _check_layouts(plan)
    _check_pipeline(plan.pipeline)
    if plan.half_batches and not (plan.pipeline.is_trivial and plan.pipeline.keeps_all):
        raise PlanError("plan.half_batches is true, but plan.pipeline has stages, micro-batches or recomputation; plan again")
    _check_groups(plan)
    _check_costs(plan)
    _check_memory(plan)
    _check_proof(plan)


def _check_mesh(plan: Plan) -> None:
    position = {name: index for index, name in enumerate(plan.mesh.names)}
    if reserved := [name for name in (MICROBATCH, PIPELINE, *HALVES) if name in position]:
        raise PlanError(f"plan.mesh has an axis {reserved[0]!r}, which is no axis of the mesh of a pipeline rank; plan again")
    if unknown := [axis for axis in plan.batch_axes if axis not in position]:
        raise PlanError(f"plan.batch_axes names {', '.join(map(repr, unknown))}, the mesh has {plan.mesh}")
    positions = [position[axis] for axis in plan.batch_axes]
    if any(earlier >= later for earlier, later in pairwise(positions)):
        raise PlanError(f"plan.batch_axes is {', '.join(plan.batch_axes)}; each axis is named once, in the order of the mesh {plan.mesh}")


def _check_cluster(plan: Plan) -> None:
    """The devices must be as many as the ranks. The machine isn't looked up: its profile may be a file on another computer."""
    match = _CLUSTER.fullmatch(plan.cluster)
    if match is None or int(match[1]) * int(match[2]) == 0:
        raise PlanError(f"plan.cluster is {plan.cluster!r}, which is no cluster; nodes x devices x machine is needed, such as 4x8xh100")
    devices = int(match[1]) * int(match[2])
    if devices > MOST_DEVICES:
        raise PlanError(f"plan.cluster is {plan.cluster!r}; there are clusters of up to {MOST_DEVICES} devices")
    ranks = plan.pipeline.ranks
    for size in plan.mesh.sizes:
        ranks *= size
        if ranks > MOST_DEVICES:  # a product of many large sizes takes long, and is too long to print
            raise PlanError(f"plan.mesh is {plan.mesh} and plan.pipeline.ranks {plan.pipeline.ranks}, more than {MOST_DEVICES} ranks")
    if ranks != devices:
        pipeline = f" on each of {plan.pipeline.ranks} pipeline ranks (plan.pipeline.ranks)" if plan.pipeline.ranks > 1 else ""
        raise PlanError(f"plan.mesh is {plan.mesh}{pipeline}, {ranks} ranks; plan.cluster is {plan.cluster!r}, {devices} devices")


def _list_layouts(plan: Plan) -> Iterator[tuple[str, str, Layout]]:
    """(field, name, layout) of every layout."""
    for name, layout in plan.layouts.items():
        yield "plan.layouts", name, layout
    for position, layout in enumerate(plan.outputs):
        yield "plan.outputs", f"output {position}", layout
    for name, layout in plan.pipeline.travel.items():
        yield "plan.pipeline.travel", name, layout


def _check_layouts(plan: Plan) -> None:
    for where, name, layout in _list_layouts(plan):
        _check_axes(plan, where, name, layout)
        if REPLICATE_PARTIAL_GRAD in layout:
            raise PlanError(f"{where}: {name!r} has the state B, which is what an op may need, but no state in which a tensor is kept")
        if PARTIAL in layout and where != "plan.pipeline.travel":
            raise PlanError(f"{where}: {name!r} has the state P; what is stored or returned is split or replicated, but no part of a sum")
    for name, placement in plan.placements.items():
        _check_axes(plan, "plan.placements", name, placement)
    for name, text in plan.inputs.items():
        if _TENSOR.fullmatch(text) is None:
            raise PlanError(f"plan.inputs: {name!r} is {text!r}, which is no type of a tensor; int64[8, 128] is one")


def _check_axes(plan: Plan, where: str, name: str, parts: Layout | Placement) -> None:
    if len(parts) != len(plan.mesh.names):
        raise PlanError(f"{where}: {name!r} has {len(parts)} axes, the mesh has {len(plan.mesh.names)} ({plan.mesh})")


def _check_pipeline(pipeline: Pipeline) -> None:
    try:
        check_schedule(pipeline.schedule, pipeline.ranks, pipeline.microbatches, pipeline.chunks)
    except InputError as error:
        raise PlanError(f"plan.pipeline.schedule: {error}") from error
    stages = [block.stage for block in pipeline.blocks]
    ends = (stages[0], stages[-1]) if stages else (0, 0)  # a model without calls has no block
    # Counted, not compared with a list of all stages: a file may name any number of them.
    is_whole = len(set(stages) or {0}) == pipeline.stages and ends == (0, pipeline.stages - 1)
    if not is_whole or stages != sorted(stages):
        raise PlanError(
            f"plan.pipeline.blocks must be on stages 0 to {pipeline.stages - 1}, ascending and none left out; they are on {stages}"
        )
    names: set[str] = set()
    for index, block in enumerate(pipeline.blocks):
        if block.name in names:
            raise PlanError(f"plan.pipeline.blocks[{index}].name is {block.name!r}, as that of a block before it; each has its own")
        names.add(block.name)
    # Which pipeline rank runs a stage is read off a schedule of as many micro-batches as ranks.
    if pipeline.stages * max(pipeline.ranks, pipeline.microbatches) > MOST_FORWARDS:
        raise PlanError(
            f"plan.pipeline.microbatches is {pipeline.microbatches}, plan.pipeline.ranks is {pipeline.ranks}: on {pipeline.stages} stages"
            f" a step has more than {MOST_FORWARDS} forwards"
        )
    if pipeline.travel and pipeline.stages == 1:
        raise PlanError(f"plan.pipeline.travel names {next(iter(pipeline.travel))!r}, but from a single stage nothing travels")
    for name in pipeline.travel:
        if _VALUE.fullmatch(name) is None:
            raise PlanError(f"plan.pipeline.travel names {name!r}, which is no value; add_3 is one, or split.1, the second result of an op")


def _check_groups(plan: Plan) -> None:
    """Every layer and every stored tensor must be in one group of layers at most."""
    names: set[str] = {""}
    paths: set[str] = set()
    ops: set[str] = set()
    tensors: set[str] = set()
    for index, group in enumerate(plan.groups):
        where = f"plan.groups[{index}]"
        if unknown := [axis for axis in group.axes if axis not in plan.mesh.names]:
            raise PlanError(f"{where}.axes names {unknown[0]!r}, the mesh has {plan.mesh}")
        if group.name in names:
            raise PlanError(f"{where}.name is {group.name!r}; each group has a name of its own")
        names.add(group.name)
        if (group.name == OUTSIDE) != (not group.paths):
            raise PlanError(f"{where}.paths has {len(group.paths)} layers; only the group {OUTSIDE!r} has none, and it has none")
        for path in group.paths:
            if path in paths:
                raise PlanError(f"{where}.paths lists {path!r} a second time; a layer is in one group, once")
            paths.add(path)
        for op, name in group.tensors.items():
            if op not in plan.layouts:
                raise PlanError(f"{where}.tensors names {op!r}, which has no layout in plan.layouts")
            if op in ops or name in tensors:
                raise PlanError(
                    f"{where}.tensors lists {op!r}, {name!r} a second time; a tensor is in one group, and has a name of its own"
                )
            ops.add(op)
            tensors.add(name)


def _check_costs(plan: Plan) -> None:
    """What the report adds up by must be known: phases, purposes, groups of layers, axes."""
    axes = set(plan.mesh.names)
    layers = {"", *(group.name for group in plan.groups)}
    for index, row in enumerate(plan.costs):
        for field, text, known in (("phase", row.phase, _PHASES), ("purpose", row.purpose, _PURPOSES)):
            if text not in known:
                raise PlanError(f"plan.costs[{index}].{field} is {text!r}; known are {', '.join(known)}")
        if row.layer not in layers:
            raise PlanError(f"plan.costs[{index}].layer is {row.layer!r}, which is the name of no group in plan.groups")
        if row.axis and row.axis not in axes and not (row.axis == PIPELINE and plan.pipeline.stages > 1):
            raise PlanError(f"plan.costs[{index}].axis is {row.axis!r}, the mesh has {plan.mesh}")
        if bool(row.axis) != bool(row.collective):
            raise PlanError(f"plan.costs[{index}] has axis {row.axis!r} and collective {row.collective!r}; both are empty, or neither")
        if row.purpose == Purpose.RECOMPUTE and row.seconds and plan.pipeline.keeps_all:
            raise PlanError(f"plan.costs[{index}] is {row.seconds} s of recompute, but no block in plan.pipeline.blocks is run again")


def _check_memory(plan: Plan) -> None:
    memory = plan.memory
    if memory.total > memory.budget:
        raise PlanError(f"plan.memory adds up to {memory.total} bytes, more than plan.memory.budget, {memory.budget}")


def _check_proof(plan: Plan) -> None:
    proof, step_ns = plan.proof, 1e9 * plan.seconds.step
    if abs(step_ns - proof.objective_ns) > _STEP_NS + _STEP_SHARE * proof.objective_ns:
        raise PlanError(f"plan.proof.objective_ns is {proof.objective_ns}, but plan.costs add up to a step of {step_ns:.0f} ns")
    if proof.bound_ns > proof.objective_ns:
        raise PlanError(f"plan.proof.bound_ns is {proof.bound_ns}, a lower bound above plan.proof.objective_ns, {proof.objective_ns}")
    gap = (proof.objective_ns - proof.bound_ns) / max(1, proof.objective_ns)
    if abs(proof.gap - gap) > _GAP:
        raise PlanError(f"plan.proof.gap is {proof.gap}, but objective_ns and bound_ns are {gap} apart, as a share of the objective")
    if proof.chosen >= len(proof.candidates):
        raise PlanError(f"plan.proof.chosen is {proof.chosen}, but there are {len(proof.candidates)} candidates, numbered from 0")
    seconds = proof.candidates[proof.chosen].step_seconds
    if seconds is None or round(1e9 * seconds) != proof.objective_ns:
        raise PlanError(
            f"plan.proof.chosen is {proof.chosen}, a candidate whose step takes {seconds} s, but plan.proof.objective_ns is"
            f" {proof.objective_ns}"
        )
