"""A plan as tables of plain values, each column with its unit: what the page shows and sorts.

Comes in: a `Plan`. Goes out: `Table`s. Every number is the plan's own or a sum of its numbers; the page gives them units.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from autopar.ir import PIPELINE, format_layout
from autopar.plans import OUTSIDE, Plan
from autopar.report import MEMORY_KINDS, describe_copies, describe_states, find_pipeline_ranks, list_step_parts

Cell = str | int | float | None
"""A text, a number in the unit of its column, or nothing."""

TEXT, COUNT, SECONDS, BYTES, SHARE, CHANGE = "", "count", "seconds", "bytes", "share", "change"
"""Units of columns. A share is of 1, and so is a change, which is shown with its sign."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the page.

    Attributes:
        name: identifies it within the page.
        title, note: what is shown above it.
        columns: (heading, unit) of each column.
        rows: in the order in which they are shown first.
        total: a last row that stays in its place when the others are sorted; empty where nothing is added up.
    """

    name: str
    title: str
    note: str
    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Cell, ...], ...]
    total: tuple[Cell, ...] = ()


def make_tables(plan: Plan) -> tuple[Table, ...]:
    """The tables of a plan; those that would be empty are left out."""
    tables = (
        _tabulate_step(plan),
        _tabulate_memory(plan),
        _tabulate_axes(plan),
        _tabulate_groups(plan),
        _tabulate_traffic(plan),
        _tabulate_blocks(plan),
        _tabulate_ops(plan),
        _tabulate_candidates(plan),
        _tabulate_costs(plan),
        _tabulate_layouts(plan),
        _tabulate_repeated(plan),
        _tabulate_unruled(plan),
    )
    return tuple(table for table in tables if table.rows)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _tabulate_step(plan: Plan) -> Table:
    seconds = plan.seconds
    whose = "Of the mean rank; the bubble is waiting for other stages." if plan.pipeline.ranks > 1 else "Of one rank."
    return Table(
        "step",
        "Predicted time of a step",
        whose,
        (("part", TEXT), ("time", SECONDS), ("of the step", SHARE)),
        tuple((name, value, _share(value, seconds.step)) for name, value in list_step_parts(seconds)),
        ("step", seconds.step, _share(seconds.step, seconds.step)),
    )


def _tabulate_memory(plan: Plan) -> Table:
    memory = plan.memory
    kinds = [(kind, getattr(memory, kind)) for kind in MEMORY_KINDS]
    if memory.apart:
        kinds.append(("not at once", -memory.apart))
    which = "the fullest device" if plan.pipeline.ranks > 1 else "one device"
    return Table(
        "memory",
        f"Memory of {which} at the peak",
        "Shares are of the device's memory." + (f" Of the parameters some are {describe_copies(plan)}." if memory.copies else ""),
        (("kind", TEXT), ("bytes", BYTES), ("of the budget", SHARE)),
        tuple((kind, nbytes, _share(nbytes, memory.budget)) for kind, nbytes in kinds),
        ("total", memory.total, _share(memory.total, memory.budget)),
    )


def _tabulate_axes(plan: Plan) -> Table:
    axes = tuple((f"{axis} ({size})", TEXT) for axis, size in zip(plan.mesh.names, plan.mesh.sizes, strict=True))
    return Table(
        "axes",
        "What each axis splits",
        "Per group of layers that are alike and split alike.",
        (("layers", TEXT), ("count", COUNT), *axes),
        tuple((group.name, group.count, *(group.axes.get(axis, "") for axis in plan.mesh.names)) for group in plan.groups),
    )


def _tabulate_groups(plan: Plan) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for group in sorted(plan.groups, key=lambda group: -sum(plan.group_seconds(group))):
        compute, communication = plan.group_seconds(group)
        share = _share(compute + communication, plan.seconds.step)
        rows.append((group.name, group.count, compute, communication, share, group.parameter_bytes, group.activation_bytes))
    remarks = [
        *(["Seconds are those of the mean pipeline rank, bytes those of all stages."] if plan.pipeline.ranks > 1 else []),
        *(["What is run again isn't included."] if not plan.pipeline.keeps_all else []),
        *(["Activations are those of one micro-batch."] if plan.pipeline.microbatches > 1 else []),
    ]
    columns = (("layers", TEXT), ("count", COUNT), ("compute", SECONDS), ("exposed communication", SECONDS), ("of the step", SHARE))
    seconds = tuple(sum(each) for each in zip(*map(plan.group_seconds, plan.groups), strict=True))
    nbytes = (sum(group.parameter_bytes for group in plan.groups), sum(group.activation_bytes for group in plan.groups))
    return Table(
        "groups",
        "Where the time goes",
        " ".join(remarks),
        (*columns, ("parameters", BYTES), ("activations", BYTES)),
        tuple(rows),
        ("all", None, *seconds, _share(sum(seconds), plan.seconds.step), *nbytes),
    )


def _tabulate_traffic(plan: Plan) -> Table:
    ordered = sorted(plan.traffic, key=lambda traffic: (-traffic.seconds, -traffic.hidden, traffic.axis))
    totals = [sum(numbers) for numbers in zip(*((each.count, each.nbytes, each.seconds, each.hidden) for each in ordered), strict=True)]
    has_messages = any(traffic.axis == PIPELINE for traffic in plan.traffic)
    columns = (("axis", TEXT), ("collective", TEXT), ("purpose", TEXT), ("times", COUNT), ("bytes", BYTES))
    return Table(
        "traffic",
        "Communication of a step",
        "Messages between stages are those of all cuts together; waiting for them is in the bubble." if has_messages else "",
        (*columns, ("exposed", SECONDS), ("hidden", SECONDS)),
        tuple((each.axis, each.collective, each.purpose, each.count, each.nbytes, each.seconds, each.hidden) for each in ordered),
        ("all", "", "", *totals),
    )


def _tabulate_blocks(plan: Plan) -> Table:
    rank_of = find_pipeline_ranks(plan)
    return Table(
        "blocks",
        "Blocks and stages",
        "Every block of the model in the order in which they run, and what of it the backward runs again.",
        (("block", COUNT), ("name", TEXT), ("stage", COUNT), ("pipeline rank", COUNT), ("recompute", TEXT)),
        tuple(
            (number, block.name, block.stage, rank_of[block.stage], block.recompute) for number, block in enumerate(plan.pipeline.blocks)
        ),
    )


def _tabulate_ops(plan: Plan) -> Table:
    columns = (("op", TEXT), ("layers", TEXT), ("operator or tensor", TEXT), ("source", TEXT), ("like ops", COUNT), ("exposed", SECONDS))
    return Table(
        "ops",
        "What every op costs in a step",
        "Of the mean rank, like ops together. A parameter's row is its update and the sums of its gradient over ranks.",
        (*columns, ("hidden", SECONDS), ("bytes", BYTES)),
        tuple((op.op, op.group, op.target, op.source, op.count, op.seconds.step, op.hidden, op.nbytes) for op in plan.ops),
        (
            *("all", "", "", "", None, sum(op.seconds.step for op in plan.ops)),
            *(sum(op.hidden for op in plan.ops), sum(op.nbytes for op in plan.ops)),
        ),
    )


def _tabulate_candidates(plan: Plan) -> Table:
    proof = plan.proof
    rows: list[tuple[Cell, ...]] = []
    ordered = sorted(enumerate(proof.candidates), key=lambda item: (item[1].step_seconds is None, item[1].step_seconds or 0.0))
    for number, candidate in ordered:
        seconds = candidate.step_seconds
        change = None if seconds is None or not proof.objective_ns else round(1e9 * seconds) / proof.objective_ns - 1
        outcome = f"{candidate.outcome}, chosen" if number == proof.chosen else candidate.outcome
        rows.append((candidate.kind, candidate.name, candidate.mesh, seconds, candidate.basis, change, candidate.memory_bytes, outcome))
    columns = (("kind", TEXT), ("candidate", TEXT), ("mesh", TEXT), ("step", SECONDS), ("step is", TEXT), ("to the plan", CHANGE))
    note = "A step is predicted, a lower bound or an estimate. Memory is without what the device reserves."
    return Table("candidates", "Candidates looked at", note, (*columns, ("memory", BYTES), ("outcome", TEXT)), tuple(rows))


def _tabulate_costs(plan: Plan) -> Table:
    rows = tuple(
        (row.layer or OUTSIDE, row.phase, row.purpose, row.axis, row.collective, row.count, row.nbytes, row.seconds, row.hidden)
        for row in plan.costs
    )
    totals = [sum(numbers) for numbers in zip(*((row.count, row.nbytes, row.seconds, row.hidden) for row in plan.costs), strict=True)]
    columns = (("layers", TEXT), ("phase", TEXT), ("purpose", TEXT), ("axis", TEXT), ("collective", TEXT), ("times", COUNT))
    return Table(
        "costs",
        "All rows of the step's costs",
        "The exposed seconds add up to the step.",
        (*columns, ("bytes", BYTES), ("exposed", SECONDS), ("hidden", SECONDS)),
        rows,
        ("all", "", "", "", "", *totals),
    )


def _tabulate_layouts(plan: Plan) -> Table:
    names = {op: (group.name, user) for group in plan.groups for op, user in group.tensors.items()}
    rows = [(*reversed(names.get(op, ("inputs", op))), format_layout(layout)) for op, layout in plan.layouts.items()]
    return Table(
        "layouts",
        "How tensors are stored",
        f"Per axis ({', '.join(plan.mesh.names)}): {describe_states(chain.from_iterable(plan.layouts.values()))}."
        " Layers of a group share this."
        if plan.mesh.names
        else "One rank stores everything.",
        (("tensor", TEXT), ("layers", TEXT), ("layout", TEXT)),
        tuple(rows),
    )


def _tabulate_repeated(plan: Plan) -> Table:
    columns = (("op", TEXT), ("operator", TEXT), ("module", TEXT), ("source", TEXT), ("loops", TEXT), ("like ops", COUNT))
    return Table(
        "repeated",
        "Work that several ranks do alike",
        "Shares are of what all ranks compute together in contractions.",
        (*columns, ("ranks", COUNT), ("share", SHARE)),
        tuple((work.op, work.target, work.path, work.source, work.loops, work.count, work.ranks, work.share) for work in plan.repeated),
    )


def _tabulate_unruled(plan: Plan) -> Table:
    return Table(
        "unruled",
        "Ops without a rule",
        "They run replicated, at their full cost.",
        (("op", TEXT), ("operator", TEXT), ("source", TEXT)),
        tuple((op.op, op.target, op.source) for op in plan.unruled),
    )
