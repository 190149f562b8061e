"""What differs between two plans, and what it costs: a table for people (``autopar diff``), data for programs.

Comes in: two plans. Goes out: changes, each of one thing, with its value in either plan. Plans of different models or clusters can be
compared too; `find_warnings` says what isn't the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from rich.console import Console
from rich.text import Text

from autopar.ir import format_layout, format_placement
from autopar.plans import Plan, Seconds, to_json
from autopar.report.reasons import group_candidates
from autopar.report.summary import MEMORY_KINDS, describe_mesh, describe_recompute, describe_ring, find_rates, format_rate, word_purpose
from autopar.report.text_tables import NOTHING, Justify, make_table
from autopar.units import format_bytes, format_seconds

_SHOWN = 12

# A number that has changed by more than this factor has no share beside it.
_TELLING = 100.0


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that differs.

    Attributes:
        about: what kind of thing it is: ``decisions``, ``placements``, ``layouts``, ``step``, ``speed``, ``memory``,
            ``exposed communication``, ``bytes moved`` or ``candidates``.
        name: the thing.
        before, after: its value in the first and in the second plan: a number of seconds, bytes or a rate, or a text; None where a plan
            hasn't got it.
        unit: ``seconds``, ``bytes`` or ``rate`` of numbers; empty for texts.
    """

    about: str
    name: str
    before: float | str | None
    after: float | str | None
    unit: str = ""


def find_warnings(before: Plan, after: Plan) -> list[str]:
    """What must be the same for a comparison of costs to be one of plans, and isn't."""
    warnings = []
    if before.model != after.model or before.fingerprint != after.fingerprint:
        names = f"{before.model} and {after.model}" if before.model != after.model else f"{before.model}, captured differently"
        warnings.append(f"the plans are for different graphs ({names}): ops and tensors are compared by their names")
    if before.cluster != after.cluster:
        warnings.append(f"the plans are for different clusters: {before.cluster} and {after.cluster}")
    if before.inputs != after.inputs:
        warnings.append("the plans are for inputs of different sizes or types: compare tokens/s rather than steps")
    return warnings


def find_changes(before: Plan, after: Plan) -> list[Change]:
    """Everything that differs, by kind: decisions first, then what they cost. Empty if both plans say the same."""
    if to_json(before) == to_json(after):
        return []
    found: list[Change] = []
    for about, unit, tell in _TOLD:
        found += _compare(about, unit, tell(before), tell(after))
    if not found:
        others = sorted(field.name for field in fields(Plan) if getattr(before, field.name) != getattr(after, field.name))
        found.append(Change("decisions", "other fields", None, ", ".join(others)))
    return found


def _compare(about: str, unit: str, before: Mapping[str, float | str], after: Mapping[str, float | str]) -> Iterator[Change]:
    for name in dict.fromkeys((*before, *after)):
        if before.get(name) != after.get(name):
            yield Change(about, name, before.get(name), after.get(name), unit)


def _tell_decisions(plan: Plan) -> dict[str, float | str]:
    pipeline = plan.pipeline
    recompute = describe_recompute(plan)
    decisions: dict[str, float | str] = {
        "model": plan.model,
        "cluster": plan.cluster,
        "mesh": describe_mesh(plan),
        **{f"{axis} splits": role for axis, role in plan.splits.items()},
        "ring attention": describe_ring(plan) or "none",
        "schedule": pipeline.schedule if pipeline.stages > 1 else "none",
        "stages": str(pipeline.stages),
        "micro-batches": str(pipeline.microbatches),
        "blocks on stages": ", ".join(str(sum(block.stage == stage for block in pipeline.blocks)) for stage in range(pipeline.stages)),
        "run again in the backward": f"{recompute} of {len(pipeline.blocks)} blocks" if recompute else "nothing",
        "precision": str(plan.precision),
        "computed in": plan.work.dtype,
        "loss in chunks": str(plan.loss_chunks),
        "gathers begun ahead": f"{plan.prefetch} blocks",
        "half batches": "yes" if plan.half_batches else "no",
        "groups of layers": ", ".join(group.name for group in plan.groups),
    }
    return decisions


def _tell_layouts(plan: Plan) -> dict[str, float | str]:
    """The layout of every tensor by its group and name, with the axes that it is about."""
    axes = ",".join(plan.mesh.names)
    return {
        f"{group.name}: {name}": f"{format_layout(plan.layouts[op])} on {axes}"
        for group in plan.groups
        for op, name in group.tensors.items()
        if op in plan.layouts
    }


def _tell_placements(plan: Plan) -> dict[str, float | str]:
    """What is split of every call: in words where the plan has them, and by loops, since several loops may be called features."""
    words = {op.op: ", ".join(f"{what} over {axis}" for axis, what in op.splits.items()) for op in plan.ops}
    names = {op.op: f"{op.path or op.group}: {op.op}" for op in plan.ops}
    told: dict[str, float | str] = {}
    for op, placement in plan.placements.items():
        loops = format_placement(placement)
        told[names.get(op, op)] = f"{words[op]} ({loops})" if words.get(op) else loops
    return told


def _tell_step(plan: Plan) -> dict[str, float | str]:
    return {**{field.name: getattr(plan.seconds, field.name) for field in fields(Seconds)}, "step": plan.seconds.step}


def _tell_speed(plan: Plan) -> dict[str, float | str]:
    rates = find_rates(plan)
    if rates is None:
        return {}
    named = {"tokens/s": rates.tokens, "samples/s": rates.samples, "model-flops utilisation": rates.utilisation}
    return {name: rate for name, rate in named.items() if rate is not None}


def _tell_memory(plan: Plan) -> dict[str, float | str]:
    memory = plan.memory
    return {
        **{kind: getattr(memory, kind) for kind in MEMORY_KINDS},
        "not at once": -memory.apart,
        "total": memory.total,
        "budget": memory.budget,
    }


def _tell_traffic(unit: str) -> Callable[[Plan], dict[str, float | str]]:
    def tell(plan: Plan) -> dict[str, float | str]:
        return {
            f"{traffic.axis} {traffic.collective}, {traffic.purpose}": traffic.nbytes if unit == "bytes" else traffic.seconds
            for traffic in plan.traffic
        }

    return tell


def _tell_candidates(plan: Plan) -> dict[str, float | str]:
    """The best step that was found of every kind; bounds and estimates of what wasn't solved are left out."""
    best = {kind: candidates[0] for kind, candidates in group_candidates(plan).items()}
    return {
        f"best {kind}": candidate.step_seconds
        for kind, candidate in best.items()
        if candidate.step_seconds is not None and candidate.basis == "predicted"
    }


_TOLD: tuple[tuple[str, str, Callable[[Plan], Mapping[str, float | str]]], ...] = (
    ("decisions", "", _tell_decisions),
    ("placements", "", _tell_placements),
    ("layouts", "", _tell_layouts),
    ("step", "seconds", _tell_step),
    ("speed", "rate", _tell_speed),
    ("memory", "bytes", _tell_memory),
    ("exposed communication", "seconds", _tell_traffic("seconds")),
    ("bytes moved", "bytes", _tell_traffic("bytes")),
    ("candidates", "seconds", _tell_candidates),
)

_TITLES = {
    "decisions": "What was decided otherwise",
    "placements": "What is split otherwise, by op",
    "layouts": "What is stored otherwise, by tensor",
    "step": "What a step costs on the mean rank",
    "speed": "How fast that is",
    "memory": "Memory of the fullest device",
    "exposed communication": "Exposed communication in a step",
    "bytes moved": "Bytes moved in a step",
    "candidates": "Best candidates",
}


def diff(before: Plan, after: Plan, console: Console, names: tuple[str, str] = ("before", "after")) -> None:
    """Print what differs between two plans, in tables; `names` head their columns."""
    for warning in find_warnings(before, after):
        console.print(Text(f"warning: {warning}"))
    changes = find_changes(before, after)
    if not changes:
        console.print(Text("The plans are equal."))
        return
    steps = before.seconds.step, after.seconds.step
    change = f" ({_word_change(*steps, 'seconds')})" if steps[0] != steps[1] else ", as before"
    console.print(Text(f"Step {format_seconds(steps[0])} to {format_seconds(steps[1])}{change}"))
    for about, title in _TITLES.items():
        rows = [change for change in changes if change.about == about]
        if not rows:
            continue
        shown = rows[:_SHOWN]
        more = f" ({len(rows)}, the first {_SHOWN} shown; --json has all)" if len(rows) > _SHOWN else ""
        columns: dict[str, Justify] = {about: "left", names[0]: "left", names[1]: "left"}
        cells = [[_word_name(change), _word_value(change.before, change.unit), _word_value(change.after, change.unit)] for change in shown]
        if shown[0].unit:
            columns = {about: "left", names[0]: "right", names[1]: "right", "change": "right"}
            cells = [[*cell, _word_change_of(change)] for cell, change in zip(cells, shown, strict=True)]
        console.print()
        console.print(make_table(title + more, columns, cells))


def diff_data(before: Plan, after: Plan) -> dict[str, Any]:
    """What differs as JSON-ready data: warnings, and every change."""
    changes = find_changes(before, after)
    return {"equal": not changes, "warnings": find_warnings(before, after), "changes": [asdict(change) for change in changes]}


def _word_name(change: Change) -> str:
    """The name of what has changed, with what communication is for in words."""
    what, comma, purpose = change.name.rpartition(", ")
    return f"{what}{comma}{word_purpose(purpose)}" if change.about in ("exposed communication", "bytes moved") else change.name


def _word_value(value: float | str | None, unit: str) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, str):
        return value
    if unit == "bytes":
        return format_bytes(value)
    return format_seconds(value) if unit == "seconds" else format_rate(value)


def _word_change_of(change: Change) -> str:
    """By how much a thing has changed; a kind of candidates that wasn't found in one of the plans has no step there, not one of nothing."""
    if change.about == "candidates" and None in (change.before, change.after):
        return NOTHING
    return _word_change(change.before, change.after, change.unit)


def _word_change(before: float | str | None, after: float | str | None, unit: str) -> str:
    """By how much a number has changed, and the share where both plans have something."""
    old, new = (value if isinstance(value, (int, float)) else 0.0 for value in (before, after))
    sign = "+" if new >= old else "-"
    # What one plan hasn't got, or hardly has, has no share that says anything.
    share = f", {100 * (new / old - 1):+.1f}%" if min(old, new) > 0 and max(old, new) < _TELLING * min(old, new) else ""
    return f"{sign}{_word_value(abs(new - old), unit)}{share}"
