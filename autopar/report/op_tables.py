"""Tables of what every op costs.

Comes in: a plan, groups of its layers. Goes out: a table per group, and one of all groups whose total is the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.text import Text

from autopar.plans import Group, Plan
from autopar.report.op_rows import OpRow, add_rows, list_group_rows, list_op_rows
from autopar.report.text_tables import NOTHING, Justify, make_table
from autopar.units import format_bytes, format_seconds

_NUMBERS: dict[str, Justify] = {"work": "right", "compute": "right", "exposed": "right", "hidden": "right", "moved": "right"}


def list_op_tables(plan: Plan, groups: Sequence[Group], layer: str | None = None) -> Iterator[RenderableType]:
    """What every op of these groups costs, a table for each; of a `layer` that is less than a group, only its own ops have rows."""
    if not plan.ops:
        yield Text("This plan has no table of ops.")
        return
    for group in groups:
        rows = list_op_rows(plan, group, layer)
        layers = f", its {group.count} layers together" if group.count > 1 else ""
        places = [_find_place(row.source) for row in rows]
        common = _find_common_file(places)
        lines = [line if file in ("", common) else f"{file}:{line}" for file, line in places]
        cells = [[row.module, row.op, row.placement or NOTHING, *_word_numbers(row), line] for row, line in zip(rows, lines, strict=True)]
        total = add_rows(rows, "all")
        columns: dict[str, Justify] = {"module": "left", "op": "left", "split": "left", **_NUMBERS, "your line": "left"}
        rank = "the mean rank" if plan.pipeline.ranks > 1 else "a rank"
        yield make_table(
            f"Ops of {group.name}{layers}: work of the forward on all ranks, the rest on {rank}"
            + (f"; lines without a file are those of {common}" if common else ""),
            columns,
            [*cells, [total.module, "", "", *_word_numbers(total), ""]],
            total=True,
            is_tight=True,
        )


def _find_place(source: str) -> tuple[str, str]:
    """Of the user's line the name of the file and the number; the line itself is in the data for programs."""
    file, _, line = source.partition(": ")[0].rpartition("/")[2].rpartition(":")
    return file, line


def _find_common_file(places: Sequence[tuple[str, str]]) -> str:
    """The file that most of the lines are in, if several are: it needn't stand in every row."""
    counts = Counter(file for file, _ in places if file)
    file, number = counts.most_common(1)[0] if counts else ("", 0)
    return file if number > 1 else ""


def _word_numbers(row: OpRow) -> list[str]:
    seconds = (row.compute, row.exposed, row.hidden)
    times = [format_seconds(value) if value else NOTHING for value in seconds]
    return [_format_flops(row.flops), *times, format_bytes(row.nbytes) if row.nbytes else NOTHING]


def _format_flops(flops: float) -> str:
    return f"{format_bytes(flops)[:-1]}FLOP" if flops else NOTHING


def tabulate_sums(plan: Plan) -> RenderableType:
    """The groups, and what belongs to no op, up to the whole step."""
    rows = list_group_rows(plan)
    total = add_rows(rows, "step")
    cells = [[row.module, *_word_numbers(row), format_seconds(row.waiting), format_seconds(row.seconds)] for row in [*rows, total]]
    columns: dict[str, Justify] = {"of": "left", **_NUMBERS, "waiting": "right", "of the step": "right"}
    return make_table("All groups of layers: compute, exposed communication and waiting make the step", columns, cells, total=True)
