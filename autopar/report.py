"""A plan -> text or tables for people, and data for programs.

Comes in: a `Plan`. Goes out: `summarize`'s few lines, `explain`'s tables on a rich console that the caller gives, `to_data`'s
plain dict. Every cost shown is the plan's own, the one that the search used; nothing is estimated again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any, Literal

from rich import box
from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.table import Table
from rich.text import Text

from autopar.errors import InputError
from autopar.layout import format_layout
from autopar.plans import Candidate, Group, Memory, Plan, Proof, Unruled
from autopar.units import format_bytes, format_seconds, format_share

MEMORY_KINDS = ("parameters", "gradients", "optimizer", "activations", "buffers", "workspace", "reserved")
"""The parts of `Memory.total`, in the order shown."""

_BAR_WIDTH = 40
_UNRULED_SHOWN = 3
_NOTHING = "-"


def summarize(plan: Plan) -> str:
    """Describe `plan` in a few plain lines: mesh, predicted time and memory, proof, and ops without a rule."""
    seconds, memory, proof = plan.seconds, plan.memory, plan.proof
    kinds = ", ".join(f"{kind} {format_bytes(getattr(memory, kind))}" for kind in MEMORY_KINDS if getattr(memory, kind))
    lines = [
        f"{plan.model} on {plan.cluster}, mesh {_describe_mesh(plan)}",
        "axes    " + ("; ".join(f"{axis} splits {role}" for axis, role in describe_axes(plan).items()) or "none: one rank"),
        f"step    {format_seconds(seconds.step)} predicted = compute {format_seconds(seconds.forward + seconds.backward)}"
        f" + optimizer {format_seconds(seconds.optimizer)} + exposed communication {format_seconds(seconds.communication)}",
        f"memory  {format_bytes(memory.total)} of {format_bytes(memory.budget)} per device: {kinds or 'nothing'}",
        f"proof   {proof.status} ({proof.method}): objective {proof.objective_ns:,} ns, bound {proof.bound_ns:,} ns,"
        f" gap {_format_gap(proof.gap)}, {format_seconds(proof.seconds)}, candidates looked at: {len(proof.candidates)}",
    ]
    if plan.unruled:
        shown = _count_alike(plan.unruled)
        more = f" and {len(shown) - _UNRULED_SHOWN} more" if len(shown) > _UNRULED_SHOWN else ""
        lines.append(
            f"unruled {len(plan.unruled)} ops have no rule and run replicated at full cost: "
            + "; ".join(f"{target} ({source})" for target, source, _ in shown[:_UNRULED_SHOWN])
            + more
        )
    return "\n".join(lines)


def describe_axes(plan: Plan) -> dict[str, str]:
    """Per axis of the mesh, what it splits: the batch, and what the groups' contractions name, the dearest group first."""
    roles: dict[str, list[str]] = {}
    for axis in plan.mesh.names:
        found = ["batch"] if axis in plan.batch_axes else []
        for group in sorted(plan.groups, key=lambda group: -group.compute_seconds):
            found += [part.strip() for part in group.axes.get(axis, "").split(",")]
        roles[axis] = [role for role in dict.fromkeys(found) if role not in ("", "nothing")]
    return {axis: ", ".join(found) or "nothing" for axis, found in roles.items()}


def to_data(plan: Plan, *, layer: str | None = None) -> dict[str, Any]:
    """Everything that `explain` shows, as JSON-ready data: seconds and bytes in the key names, no friendly units.

    Args:
        plan: the plan to describe.
        layer: as for `explain`.

    Raises:
        InputError: no layer of the plan matches `layer`.
    """
    groups = select_groups(plan, layer)
    data: dict[str, Any] = {
        "model": plan.model,
        "fingerprint": plan.fingerprint,
        "cluster": plan.cluster,
        "mesh": dict(zip(plan.mesh.names, plan.mesh.sizes, strict=True)),
        "axes": describe_axes(plan),
        "batch_axes": list(plan.batch_axes),
        "seconds": {**asdict(plan.seconds), "step": plan.seconds.step},
        "memory_bytes": {**asdict(plan.memory), "total": plan.memory.total},
        "traffic": [asdict(traffic) for traffic in plan.traffic],
        "groups": [{**asdict(group), "axes": dict(group.axes)} for group in groups],
        "proof": asdict(plan.proof),
        "unruled": [asdict(op) for op in plan.unruled],
        "notes": list(plan.notes),
    }
    if layer is not None:
        data["layouts"] = dict(_select_layouts(plan, layer))
    return data


def explain(plan: Plan, console: Console, *, layer: str | None = None) -> None:
    """Print what `plan` decided, what it costs, and why it can be believed.

    Args:
        plan: the plan to show.
        console: where to print; its width is used.
        layer: show only what concerns these layers, with the stored layout of each of their tensors (layers that are alike
            share theirs). A module path (``transformer.h.3.mlp``), the name of a group (``transformer.h.*``) or a part of one.

    Raises:
        InputError: no layer of the plan matches `layer`.
    """
    groups = select_groups(plan, layer)
    console.print(Text(f"{plan.model} on {plan.cluster}, mesh {_describe_mesh(plan)}", style="bold"))
    console.print(Text(f"fingerprint {plan.fingerprint}"))
    _print(console, _tabulate_axes(plan, groups))
    if layer is not None:
        _print(console, _tabulate_groups(plan, groups))
        _print(console, _tabulate_layouts(plan, layer))
        return
    _print(console, _tabulate_step(plan))
    _print(console, _tabulate_traffic(plan))
    _print(console, _tabulate_memory(plan.memory))
    _print(console, _tabulate_groups(plan, groups))
    _print(console, _tabulate_candidates(plan))
    _print(console, Text("\n".join(_word_proof(plan))))
    if plan.unruled:
        _print(console, _tabulate_unruled(plan.unruled))
    if plan.notes:
        _print(console, Text("Notes\n" + "\n".join(f"- {note}" for note in plan.notes)))


def select_groups(plan: Plan, layer: str | None) -> tuple[Group, ...]:
    """The plan's groups that `layer` names, all when it is None. Raises InputError, listing the groups, when none does."""
    if layer is None:
        return plan.groups
    found = tuple(group for group in plan.groups if _names_group(layer, group))
    if not found:
        names = ", ".join(repr(group.name) for group in plan.groups) or "none"
        raise InputError(f"no layer of this plan matches {layer!r}; its groups of layers are {names}")
    return found


def _path_of(group: Group) -> str:
    # `layers.*#1` is the second kind of block under `layers`.
    return re.sub(r"#\d+$", "", group.name)


def _names_group(layer: str, group: Group) -> bool:
    path = _path_of(group)
    return layer in group.name or fnmatchcase(path, layer) or fnmatchcase(layer, path)


def _select_layouts(plan: Plan, layer: str) -> Iterable[tuple[str, str]]:
    """Name and layout of the stored tensors of `layer`, or of the layer like it that stands for all in the plan.

    Names of ops are module paths with ``_`` for every dot.
    """
    stored = {name: format_layout(layout) for name, layout in plan.layouts.items() if not name.startswith("fan:")}
    wanted = [layer, *(_generalize(layer, _path_of(group)) for group in select_groups(plan, layer))]
    for pattern in map(_match_names, wanted):
        if found := [(name, text) for name, text in stored.items() if pattern.search(name)]:
            return found
    return []


def _generalize(layer: str, path: str) -> str:
    """The same place in every layer of `path`: ``h.3.mlp`` under ``h.*`` is ``h.*.mlp``."""
    inside = re.match(re.escape(path).replace(r"\*", r"\d+"), layer)
    return path + layer[inside.end() :] if inside else path if layer in path else layer


def _match_names(path: str) -> re.Pattern[str]:
    """What finds `path`, whole words of it, in the names of ops."""
    words = re.sub(r"[^0-9A-Za-z*]+", "_", path).strip("_")
    return re.compile(rf"(?:^|_){re.escape(words).replace(re.escape('*'), '[0-9A-Za-z]+')}(?:_|$)")


def _describe_mesh(plan: Plan) -> str:
    ranks = plan.mesh.world_size
    return f"{plan.mesh} ({ranks} ranks)" if ranks > 1 else "of one rank"


def _format_gap(gap: float) -> str:
    return "0" if gap == 0 else f"{100 * gap:.3g}%"


def _count_alike(unruled: Iterable[Unruled]) -> list[tuple[str, str, int]]:
    """(target, source, number) of the ops that come from one line; repeated layers say the same many times."""
    counts: dict[tuple[str, str], int] = {}
    for op in unruled:
        key = op.target, op.source or "line unknown"
        counts[key] = counts.get(key, 0) + 1
    return [(target, source, count) for (target, source), count in counts.items()]


def _print(console: Console, part: RenderableType) -> None:
    console.print()
    console.print(part)


_Justify = Literal["left", "right"]


def _make_table(title: str, columns: Mapping[str, _Justify], rows: Iterable[Sequence[str]], *, total: bool = False) -> Stack:
    """Make a table of plain text under its title; `total` sets the last row apart."""
    # Text, not str: names and source lines may hold square brackets, which rich would read as markup.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name, justify in columns.items():
        table.add_column(Text(name), justify=justify, overflow="fold")
    cells = [[Text(cell) for cell in row] for row in rows]
    for index, row in enumerate(cells):
        table.add_row(*row, end_section=total and index == len(cells) - 2)
    return Stack(Text(title, style="bold"), table)


def _tabulate_axes(plan: Plan, groups: Sequence[Group]) -> Stack:
    columns: dict[str, _Justify] = {"layers": "left", "count": "right"}
    for axis, size in zip(plan.mesh.names, plan.mesh.sizes, strict=True):
        columns[f"{axis} ({size})"] = "left"
    rows = [[group.name, str(group.count), *(group.axes.get(axis) or _NOTHING for axis in plan.mesh.names)] for group in groups]
    rows.append(["batch of the inputs", "", *("split" if axis in plan.batch_axes else _NOTHING for axis in plan.mesh.names)])
    return _make_table("What each axis of the mesh splits", columns, rows, total=True)


def _tabulate_step(plan: Plan) -> Stack:
    seconds = plan.seconds
    parts = [
        ("compute, forward", seconds.forward),
        ("compute, backward", seconds.backward),
        ("optimizer", seconds.optimizer),
        ("exposed communication", seconds.communication),
        ("step", seconds.step),
    ]
    rows = [[name, format_seconds(value), format_share(value, seconds.step)] for name, value in parts]
    return _make_table(
        "Predicted time of one training step on one rank",
        {"part": "left", "time": "right", "of the step": "right"},
        rows,
        total=True,
    )


def _tabulate_traffic(plan: Plan) -> RenderableType:
    if not plan.traffic:
        return Text("Communication: none")
    ordered = sorted(plan.traffic, key=lambda traffic: (-traffic.seconds, traffic.axis, traffic.collective, traffic.purpose))
    rows = [
        [
            traffic.axis,
            traffic.collective,
            traffic.purpose,
            f"{traffic.count:,}",
            format_bytes(traffic.nbytes),
            format_seconds(traffic.seconds),
        ]
        for traffic in ordered
    ]
    total = [
        f"{sum(traffic.count for traffic in ordered):,}",
        format_bytes(sum(traffic.nbytes for traffic in ordered)),
        format_seconds(sum(traffic.seconds for traffic in ordered)),
    ]
    columns: dict[str, _Justify] = {"axis": "left", "collective": "left", "purpose": "left"}
    columns |= {"times": "right", "bytes": "right", "exposed": "right"}
    return _make_table(
        "Communication of one step (bytes of a rank, time not hidden behind compute)",
        columns,
        [*rows, ["all", "", "", *total]],
        total=True,
    )


def _tabulate_memory(memory: Memory) -> Stack:
    rows = []
    for kind in (*MEMORY_KINDS, "total"):
        nbytes = getattr(memory, kind)
        rows.append([kind, format_bytes(nbytes), format_share(nbytes, memory.budget), _draw_bar(nbytes, memory.budget)])
    columns: dict[str, _Justify] = {"kind": "left", "bytes": "right", "of the budget": "right", "": "left"}
    return _make_table(f"Memory of one device at the peak, budget {format_bytes(memory.budget)}", columns, rows, total=True)


def _draw_bar(part: int, whole: int) -> str:
    """Draw `part` of `whole` as a bar between marks; anything at all shows, and more than the whole runs over the mark."""
    if whole <= 0:
        return ""
    cells = round(_BAR_WIDTH * part / whole)
    cells = max(cells, 1) if part > 0 else 0
    over = min(cells - _BAR_WIDTH, _BAR_WIDTH // 4)
    return f"|{'█' * min(cells, _BAR_WIDTH)}{' ' * (_BAR_WIDTH - cells)}|{'█' * over}"


def _tabulate_groups(plan: Plan, groups: Sequence[Group]) -> Stack:
    step = plan.seconds.step
    ordered = sorted(groups, key=lambda group: -(group.compute_seconds + group.communication_seconds))
    rows = [
        [
            group.name,
            str(group.count),
            format_seconds(group.compute_seconds),
            format_seconds(group.communication_seconds),
            format_share(group.compute_seconds + group.communication_seconds, step),
            format_bytes(group.parameter_bytes),
            format_bytes(group.activation_bytes),
        ]
        for group in ordered
    ]
    columns: dict[str, _Justify] = {"layers": "left", "count": "right", "compute": "right", "communication": "right"}
    columns |= {"of the step": "right", "parameters": "right", "activations": "right"}
    return _make_table("Where the time goes", columns, rows)


def _tabulate_layouts(plan: Plan, layer: str) -> RenderableType:
    rows = [[name, layout] for name, layout in _select_layouts(plan, layer)]
    if not rows:
        return Text(f"No stored tensor is named after {layer!r}.")
    axes = ", ".join(plan.mesh.names)
    return _make_table(
        f"How its tensors are stored (layers that are alike share this), per axis ({axes}): S<dim> split, R replicated",
        {"tensor": "left", "layout": "left"},
        rows,
    )


def _tabulate_candidates(plan: Plan) -> Stack:
    candidates = plan.proof.candidates
    chosen = _find_chosen(plan.proof)
    rows = [
        [
            candidate.name,
            candidate.mesh,
            *_word_candidate_cost(candidate, plan.proof.objective_ns),
            _NOTHING if candidate.memory_bytes is None else format_bytes(candidate.memory_bytes),
            f"{candidate.outcome}, chosen" if candidate is chosen else candidate.outcome,
        ]
        for candidate in sorted(candidates, key=lambda one: (one.step_seconds is None, one.step_seconds or 0.0))
    ]
    columns: dict[str, _Justify] = {"candidate": "left", "mesh": "left", "step": "right", "to the plan": "right"}
    columns |= {"memory": "right", "outcome": "left"}
    return _make_table(f"Candidates looked at: {len(rows)} (memory: without what the device reserves)", columns, rows)


def _find_chosen(proof: Proof) -> Candidate | None:
    # The search prefers what comes first among equals, so the first with the plan's cost is the plan.
    return next((one for one in proof.candidates if _cost_ns(one) == proof.objective_ns), None)


def _cost_ns(candidate: Candidate) -> int | None:
    return None if candidate.step_seconds is None else round(candidate.step_seconds * 1e9)


def _word_candidate_cost(candidate: Candidate, objective_ns: int) -> tuple[str, str]:
    """Step time of a candidate, and by how much it is slower than the plan."""
    cost = _cost_ns(candidate)
    if candidate.step_seconds is None or cost is None:
        return _NOTHING, _NOTHING
    return format_seconds(candidate.step_seconds), f"{100 * (cost / objective_ns - 1):+.1f}%" if objective_ns > 0 else _NOTHING


def _word_proof(plan: Plan) -> list[str]:
    """Say what the search proved, in words and exact numbers."""
    proof = plan.proof
    chosen = _find_chosen(proof)
    # A baseline is solved under constraints of its own, so its bound speaks of such plans only.
    plans = "plan" if chosen is None or chosen.name == "search" else f"{chosen.name} plan"
    lines = [
        f"Proof for the mesh {_describe_mesh(plan)}",
        f"The chosen plan costs {proof.objective_ns:,} ns under this cost model. No {plans} on this mesh, within the pins given,"
        f" costs less than {proof.bound_ns:,} ns.",
    ]
    if proof.objective_ns == proof.bound_ns:
        lines.append("The two are equal: nothing there is cheaper.")
    else:
        lines.append(f"So it is within {_format_gap(proof.gap)} of the cheapest there.")
    lines.append(
        f"The solver ended as {proof.status} ({proof.method}) on {proof.variables:,} variables and"
        f" {proof.constraints:,} constraints; the whole search took {format_seconds(proof.seconds)}."
    )
    lines.append("To check another mesh, pin it (`autopar plan ... --mesh dp=4,tp=2`): a pinned mesh is solved with the same costs.")
    return lines


def _tabulate_unruled(unruled: Sequence[Unruled]) -> Stack:
    rows = [[target, str(count), source] for target, source, count in _count_alike(unruled)]
    return _make_table(
        f"Ops without a rule: {len(unruled)}; each runs replicated, at its full cost",
        {"op": "left", "times": "right", "your line": "left"},
        rows,
    )
