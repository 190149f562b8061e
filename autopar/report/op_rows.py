"""What every op costs in a plan, as rows whose sums are the plan's own: per group of layers, then what belongs to no op.

Comes in: `Plan.ops`. Goes out: rows for tables and for programs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from autopar.ir import PIPELINE
from autopar.plans import OUTSIDE, Group, OpCost, Plan, Purpose
from autopar.report.selection import select_ops
from autopar.rules import short_name


@dataclass(frozen=True, slots=True)
class OpRow:
    """An op, or several together, in a step on the mean rank.

    Attributes:
        module: path below the layer; for a sum what is summed.
        op: the operator.
        placement: what of it is split over which axis, in words.
        flops: of the forward, in the whole batch and on all ranks together.
        compute: seconds of forward, backward, what is run again, and updates.
        exposed, hidden: seconds of communication that isn't, and that is, overlapped with other work.
        waiting: seconds in which there is nothing to run, the bubble.
        nbytes: that communication moves.
        source: the user's line.
    """

    module: str
    op: str
    placement: str
    flops: float
    compute: float
    exposed: float
    hidden: float
    waiting: float
    nbytes: float
    source: str

    @property
    def seconds(self) -> float:
        """What it adds to the step."""
        return self.compute + self.exposed + self.waiting


def list_op_rows(plan: Plan, group: Group, layer: str | None = None) -> list[OpRow]:
    """The rows of a group's ops that take anything, of all layers together, in the order of the program; parameters are one more row.

    Of a `layer` that is less than the group, its ops have rows, and the others are one last row: the rows always add up to the group's.
    """
    ops = select_ops(plan, group, layer)
    calls = [op for op in ops if op.op in plan.placements]
    rows = [row for op in calls if (row := _make_row(plan, group, op)).seconds or row.flops or row.nbytes]
    parameters = [_make_row(plan, group, op) for op in ops if op.op not in plan.placements]
    if parameters:
        number = sum(op.count for op in ops if op.op not in plan.placements)
        rows.append(add_rows(parameters, f"{number} parameter{'' if number == 1 else 's'}", "update, sums"))
    names = {op.op for op in ops}
    if others := [_make_row(plan, group, op) for op in plan.ops if op.group == group.name and op.op not in names]:
        rows.append(add_rows(others, "rest of the layer" if group.paths else "the others outside"))
    return rows


def list_group_rows(plan: Plan) -> list[OpRow]:
    """A row per group of layers, then what belongs to no op: messages between stages, and the bubble. They add up to the step."""
    rows = [
        add_rows(
            [_make_row(plan, group, op) for op in plan.ops if op.group == group.name],
            group.name,
            f"{group.count} layers" if group.paths else "",
        )
        for group in plan.groups
    ]
    messages = [row for row in plan.costs if row.axis == PIPELINE]
    if messages:
        hidden, nbytes = sum(row.hidden for row in messages), sum(row.nbytes for row in messages)
        exposed = sum(row.seconds for row in messages)
        rows.append(OpRow("messages between stages", "", "", 0.0, 0.0, exposed, hidden, 0.0, nbytes, ""))
    bubble = sum(row.seconds for row in plan.costs if row.purpose == Purpose.BUBBLE)
    if bubble or plan.pipeline.ranks > 1:
        rows.append(OpRow("bubble", "", "", 0.0, 0.0, 0.0, 0.0, bubble, 0.0, ""))
    return rows


def add_rows(rows: Iterable[OpRow], module: str, op: str = "") -> OpRow:
    """The sum of rows, under a name."""
    sums = dict.fromkeys(("flops", "compute", "exposed", "hidden", "waiting", "nbytes"), 0.0)
    for row in rows:
        for name in sums:
            sums[name] += getattr(row, name)
    return OpRow(module=module, op=op, placement="", source="", **sums)


def _make_row(plan: Plan, group: Group, op: OpCost) -> OpRow:
    sizes = dict(zip(plan.mesh.names, plan.mesh.sizes, strict=True))
    seconds = op.seconds
    return OpRow(
        module=_shorten(group, op.path),
        op=short_name(op.target),
        placement=", ".join(f"{what} over {axis}" for axis, what in op.splits.items() if sizes[axis] > 1),
        flops=op.flops,
        compute=seconds.computing,
        exposed=seconds.communication,
        hidden=op.hidden,
        waiting=0.0,
        nbytes=op.nbytes,
        source=op.source,
    )


def _shorten(group: Group, path: str) -> str:
    """A module's path without that of the layer that it is in."""
    if group.name == OUTSIDE or not group.paths:
        return path
    return path.removeprefix(group.paths[0]).removeprefix(".") if f"{path}.".startswith(f"{group.paths[0]}.") else path
