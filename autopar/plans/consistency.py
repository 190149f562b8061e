"""Whether the parts of a plan agree: what every plan that the search makes keeps to, and a file or an edited plan needn't.

`check_consistency` looks at the plan alone. Whether it belongs to a model is `autopar.plans.fits`, and whether its decisions can be carried
out on that model is seen when its program is made.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from autopar.errors import InputError, PlanError
from autopar.ir import (
    HALVES,
    ITEMSIZE,
    MICROBATCH,
    PARTIAL,
    PIPELINE,
    REPLICATE_PARTIAL_GRAD,
    Layout,
    Placement,
    Tensor,
    fits,
    format_layout,
)
from autopar.plans.files import LARGEST
from autopar.plans.pins import reconcile
from autopar.plans.rows import OUTSIDE, CostRow, Phase, Purpose
from autopar.plans.timing import Timing, sum_rows
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
# Sums of the same numbers in another order.
_ROUNDING = 1e-9

_PHASES, _PURPOSES = tuple(Phase), tuple(Purpose)
# What a rank does alone: with an axis and a collective a row of these would count as communication.
_ALONE = (Purpose.COMPUTE, Purpose.OPTIMIZER, Purpose.BUBBLE)
# Counts are read up to this many digits, which is far above MOST_DEVICES.
_CLUSTER = re.compile(r"([0-9]{1,18})x([0-9]{1,18})x(.+)")
# Sizes are read up to as many digits as LARGEST has.
_TENSOR = re.compile(r"\w+\[(?:[0-9]{1,19}(?:, [0-9]{1,19})*)?\]", re.ASCII)
_VALUE = re.compile(r"[^.]+(?:\.[0-9]{1,9})?")


def check_consistency(plan: Plan) -> None:
    """Raise PlanError, naming the field, when the parts of `plan` contradict each other or say what no plan can."""
    _check_mesh(plan)
    _check_cluster(plan)
    _check_layouts(plan)
    _check_reads(plan)
    _check_pipeline(plan.pipeline)
    if plan.half_batches and not (plan.pipeline.is_trivial and plan.pipeline.keeps_all):
        raise PlanError("plan.half_batches is true, but plan.pipeline has stages, micro-batches or recomputation; plan again")
    _check_groups(plan)
    _check_costs(plan)
    _check_memory(plan)
    if plan.pipeline.timing is not None:
        _check_timing(plan, plan.pipeline.timing)
    _check_proof(plan)
    _check_ops(plan)
    _check_request(plan)


def _check_mesh(plan: Plan) -> None:
    position = {name: index for index, name in enumerate(plan.mesh.names)}
    if reserved := [name for name in (MICROBATCH, PIPELINE, *HALVES) if name in position]:
        raise PlanError(f"plan.mesh has an axis {reserved[0]!r}, which is no axis of the mesh of a pipeline rank; plan again")
    if wrong := [name for name in position if not name.isidentifier()]:
        raise PlanError(f"plan.mesh has an axis {wrong[0]!r}; the name of an axis is a word, such as dp")
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
        _check_tensor(f"plan.inputs: {name!r}", text)


def _check_tensor(where: str, text: str) -> None:
    """A tensor must be written as one, with sizes and a number of elements of at most 64 bits."""
    if _TENSOR.fullmatch(text) is None:
        raise PlanError(f"{where} is {text!r}, which is no type of a tensor; int64[8, 128] is one")
    numel = 1
    for size in Tensor.parse(text).shape:
        numel *= max(size, 1)
        if numel > LARGEST:  # a product of many large sizes takes long, and is too long to print
            raise PlanError(f"{where} is {text!r}, a tensor of more elements than any number of 64 bits")


def _check_reads(plan: Plan) -> None:
    """What is read must be what the steps between two layouts are known for (`autopar.ir.journey`)."""
    for name, reads in plan.reads.items():
        if name not in plan.placements:
            raise PlanError(f"plan.reads: {name!r} has no placement in plan.placements")
        for index, read in enumerate(reads):
            where = f"plan.reads[{name!r}][{index}]"
            if _VALUE.fullmatch(read.value) is None:
                raise PlanError(f"{where}.value is {read.value!r}, which is no value; add_3 is one, or split.1, the second result of an op")
            _check_tensor(f"{where}.tensor", read.tensor)
            if read.dtype not in ITEMSIZE:
                raise PlanError(f"{where}.tensor is of type {read.dtype!r}; known are {', '.join(ITEMSIZE)}")
            if read.gradient not in ("", *ITEMSIZE):
                raise PlanError(f"{where}.gradient is of type {read.gradient!r}; known are {', '.join(ITEMSIZE)}, or nothing")
            for field, layout in (("made", read.made), ("need", read.need)):
                _check_axes(plan, where, field, layout)
                if any(state.level for state in layout) or not fits(read.shape, layout, plan.mesh):
                    raise PlanError(f"{where}.{field} is {format_layout(layout)}, in which no {read.tensor} is made or read on {plan.mesh}")
            if REPLICATE_PARTIAL_GRAD in read.made:
                raise PlanError(f"{where}.made has the state B, which is what an op may need, but no state in which a tensor is made")


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
    for where, row in _list_rows(plan):
        for field, text, known in (("phase", row.phase, _PHASES), ("purpose", row.purpose, _PURPOSES)):
            if text not in known:
                raise PlanError(f"{where}.{field} is {text!r}; known are {', '.join(known)}")
        if row.layer not in layers:
            raise PlanError(f"{where}.layer is {row.layer!r}, which is the name of no group in plan.groups")
        if row.axis and row.axis not in axes and not (row.axis == PIPELINE and plan.pipeline.stages > 1):
            raise PlanError(f"{where}.axis is {row.axis!r}, the mesh has {plan.mesh}")
        if bool(row.axis) != bool(row.collective):
            raise PlanError(f"{where} has axis {row.axis!r} and collective {row.collective!r}; both are empty, or neither")
        if row.axis and row.purpose in _ALONE:
            raise PlanError(f"{where} is {row.purpose} with axis {row.axis!r}; a rank does it alone, so axis and collective are empty")
        if row.purpose == Purpose.RECOMPUTE and row.seconds and plan.pipeline.keeps_all:
            raise PlanError(f"{where} is {row.seconds} s of recompute, but no block in plan.pipeline.blocks is run again")


def _list_rows(plan: Plan) -> Iterator[tuple[str, CostRow]]:
    """(field, row) of every row of costs: those of the step, and those of single blocks."""
    for index, row in enumerate(plan.costs):
        yield f"plan.costs[{index}]", row
    for number, kind in enumerate(plan.pipeline.timing.kinds if plan.pipeline.timing is not None else ()):
        for index, row in enumerate(kind.rows):
            yield f"plan.pipeline.timing.kinds[{number}].rows[{index}]", row


def _check_timing(plan: Plan, timing: Timing) -> None:
    """There must be numbers of every block, stage and rank, and those of the blocks must add up to those of the step."""
    pipeline = plan.pipeline
    for field, entries, count, what in (
        ("kind_of", timing.kind_of, len(pipeline.blocks), "blocks"),
        ("messages", timing.messages, pipeline.stages - 1, "stages but the last"),
        ("stages", timing.stages, pipeline.stages, "stages"),
        ("ranks", timing.ranks, pipeline.ranks, "pipeline ranks"),
    ):
        if len(entries) != count:
            raise PlanError(f"plan.pipeline.timing.{field} has {len(entries)} entries, and there are {count} {what}")
    if wrong := [kind for kind in timing.kind_of if kind >= len(timing.kinds)]:
        raise PlanError(f"plan.pipeline.timing.kind_of names {wrong[0]}, but there are {len(timing.kinds)} kinds, numbered from 0")
    for stage, levels in enumerate(timing.stages):
        count = sum(block.stage == stage for block in pipeline.blocks)
        for field, entries in (("forward", levels.forward), ("first_backward", levels.first_backward), ("backward", levels.backward)):
            if len(entries) != count:
                raise PlanError(f"plan.pipeline.timing.stages[{stage}].{field} has {len(entries)} entries; the stage has {count} blocks")
    counts = Counter(timing.kind_of)
    of_blocks = sum_rows(
        (counts[number] * (1 if row.phase == Phase.STEP else pipeline.microbatches) / pipeline.ranks, row)
        for number, kind in enumerate(timing.kinds)
        for row in kind.rows
    )
    of_step = sum_rows((1.0, row) for row in plan.costs if row.purpose not in (Purpose.MESSAGES, Purpose.BUBBLE))
    for key in {**of_step, **of_blocks}:
        for of_block, of_all in zip(of_blocks.get(key, (0.0, 0.0)), of_step.get(key, (0.0, 0.0)), strict=True):
            if abs(of_block - of_all) > _ROUNDING * max(of_block, of_all):
                raise PlanError(
                    f"plan.pipeline.timing adds up to {of_block} s of {' '.join(filter(None, key))}, but plan.costs has {of_all} s"
                )


def _check_ops(plan: Plan) -> None:
    """Ops must be known, and add up to the rows of costs; a plan made by hand may have none."""
    groups = {group.name for group in plan.groups}
    names: set[str] = set()
    for index, op in enumerate(plan.ops):
        where = f"plan.ops[{index}]"
        if op.op in names or (op.op not in plan.placements and op.op not in plan.layouts):
            raise PlanError(f"{where}.op is {op.op!r}; an op is there once, and has a placement or a layout")
        names.add(op.op)
        if op.group not in groups:
            raise PlanError(f"{where}.group is {op.group!r}, which is the name of no group in plan.groups")
        if unknown := [axis for axis in op.splits if axis not in plan.mesh.names]:
            raise PlanError(f"{where}.splits names {unknown[0]!r}, the mesh has {plan.mesh}")
        if op.seconds.bubble:
            raise PlanError(f"{where}.seconds.bubble is {op.seconds.bubble}; waiting is no op's")
    if plan.ops:
        inside = [row for row in plan.costs if row.axis != PIPELINE]
        step = plan.seconds.step - plan.seconds.bubble
        _check_sum("seconds", sum(op.seconds.step for op in plan.ops), step)
        _check_sum("hidden", sum(op.hidden for op in plan.ops), sum(row.hidden for row in inside))
        _check_sum("nbytes", sum(op.nbytes for op in plan.ops), sum(row.nbytes for row in inside if row.is_communication))


def _check_sum(field: str, of_ops: float, of_rows: float) -> None:
    if abs(of_ops - of_rows) > _STEP_SHARE * max(of_ops, of_rows):
        raise PlanError(f"plan.ops: their {field} add up to {of_ops}, those of plan.costs without messages and bubble to {of_rows}")


def _check_memory(plan: Plan) -> None:
    memory = plan.memory
    if memory.copies > memory.parameters:
        raise PlanError(f"plan.memory.copies is {memory.copies}, more than plan.memory.parameters, {memory.parameters}, which hold them")
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
    for index, candidate in enumerate(proof.candidates):
        parts, step = candidate.parts, candidate.step_seconds
        if parts is not None and (step is None or abs(parts.step - step) > _STEP_NS / 1e9 + _STEP_SHARE * step):
            raise PlanError(f"plan.proof.candidates[{index}].parts add up to {parts.step} s, but its step_seconds are {step}")
    free = proof.candidates[proof.chosen].free_mesh
    if free is not None and (free.sizes != plan.mesh.sizes or not all(name.isidentifier() for name in free.names)):
        raise PlanError(f"plan.proof.candidates[{proof.chosen}].free_mesh is {free}, which asks for no plan on {plan.mesh}")


def _check_request(plan: Plan) -> None:
    """What was asked for must be something that can be asked for; whether the plan obeys its pins is seen when it is made again."""
    request = plan.request
    try:
        reconcile(request.pins, request.mesh_sizes)
    except InputError as error:
        raise PlanError(f"plan.request: {error}") from error
    if request.memory not in (None, plan.memory.budget):
        raise PlanError(f"plan.request.memory is {request.memory}, but plan.memory.budget is {plan.memory.budget}")
