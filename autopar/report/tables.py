"""A plan as tables on a console that the caller gives (``autopar explain``).

Every cost shown is the plan's own, the one that the search used; nothing is estimated again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Literal

from rich import box
from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.table import Table
from rich.text import Text

from autopar.ir import PIPELINE, parse_layout
from autopar.plans import BlockChoice, Candidate, Group, Memory, Plan, Unruled
from autopar.report.selection import find_pipeline_ranks, select_blocks, select_groups, select_layouts
from autopar.report.summary import MEMORY_KINDS, count, count_alike, describe_mesh, describe_pipeline, describe_precision, format_gap
from autopar.units import format_bytes, format_seconds, format_share

# With the other columns the table of memory is 80 wide.
_BAR_WIDTH = 38

_NOTHING = "-"

# Names of the candidates whose bound is that of the assignment of blocks to stages (`autopar.search.pipeline.configurations`).
_SPREAD = ("pipeline", "micro-batches", "recomputation")


def explain(plan: Plan, console: Console, *, layer: str | None = None) -> None:
    """Print what `plan` decided, what it costs, and why it can be believed.

    Args:
        plan: the plan to show.
        console: where to print; its width is used.
        layer: show only what concerns these layers, with the stored layout of each of their tensors (layers that are alike
            share theirs). A module path (``transformer.h.3.mlp``), whose parts may be patterns (``h.*.mlp``), or the name of a group
            of layers (`autopar.report.selection`).

    Raises:
        InputError: no layer of the plan matches `layer`.
    """
    groups = select_groups(plan, layer)
    console.print(Text(f"{plan.model} on {plan.cluster}, mesh {describe_mesh(plan)}{describe_precision(plan)}", style="bold"))
    console.print(Text(f"fingerprint {plan.fingerprint}"))
    _print(console, _tabulate_axes(plan, groups))
    if (describe_pipeline(plan) or not plan.pipeline.keeps_all) and (blocks := select_blocks(plan, layer)):
        _print(console, _tabulate_blocks(plan, blocks))
    if layer is not None:
        _print(console, _tabulate_groups(plan, groups))
        _print(console, _tabulate_layouts(plan, layer))
        return
    _print(console, _tabulate_step(plan))
    _print(console, _tabulate_traffic(plan))
    if messages := _word_messages(plan):
        _print(console, Text(messages))
    _print(console, _tabulate_memory(plan))
    _print(console, _tabulate_groups(plan, groups))
    _print(console, _tabulate_candidates(plan))
    _print(console, Text("\n".join(_word_proof(plan))))
    if plan.unruled:
        _print(console, _tabulate_unruled(plan.unruled))
    if plan.notes:
        _print(console, Text("Notes\n" + "\n".join(f"- {note}" for note in plan.notes)))


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
    whose = "a pipeline rank's mesh" if plan.pipeline.ranks > 1 else "the mesh"
    return _make_table(f"What each axis of {whose} splits", columns, rows, total=True)


def _tabulate_blocks(plan: Plan, blocks: Sequence[BlockChoice]) -> Stack:
    """Where the blocks are and what of them the backward runs again; a row per run of blocks that are alike in both."""
    rank_of = find_pipeline_ranks(plan)
    width = plan.mesh.world_size
    position = {block.name: index for index, block in enumerate(plan.pipeline.blocks)}

    def run_of(numbered: tuple[int, BlockChoice]) -> tuple[int, str, int]:
        # Neighbours keep their distance from a counter, so that what was left out between two blocks parts them.
        number, block = numbered
        return block.stage, block.recompute, position[block.name] - number

    rows = []
    for (stage, recompute, _), run in groupby(enumerate(blocks), run_of):
        names = [block.name for _, block in run]
        pipeline_rank = rank_of[stage]
        first = pipeline_rank * width
        ranks = f"{first}-{first + width - 1}" if width > 1 else str(first)
        span = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        rows.append([str(pipeline_rank), ranks, str(stage), span, str(len(names)), recompute])
    columns: dict[str, _Justify] = {"pipeline rank": "right", "ranks": "left", "stage": "right", "blocks": "left", "count": "right"}
    columns["recompute"] = "left"
    text = describe_pipeline(plan)
    if plan.pipeline.ranks == 1:
        rows = [row[2:] for row in rows]
        columns = {name: justify for name, justify in columns.items() if name not in ("pipeline rank", "ranks")}
    return _make_table(f"Stages: {text}" if text else "What the backward runs again", columns, rows)


def _tabulate_step(plan: Plan) -> Stack:
    seconds = plan.seconds
    parts = [
        ("compute, forward", seconds.forward),
        ("compute, backward", seconds.backward),
        ("recompute", seconds.recompute),
        ("optimizer", seconds.optimizer),
        ("exposed communication", seconds.communication),
        ("bubble", seconds.bubble),
        ("step", seconds.step),
    ]
    absent = {
        "recompute": not seconds.recompute and plan.pipeline.keeps_all,
        "bubble": not (seconds.bubble or plan.pipeline.ranks > 1),
    }
    rows = [[name, format_seconds(value), format_share(value, seconds.step)] for name, value in parts if not absent.get(name)]
    whose = "the mean rank; bubble: waiting for other stages" if plan.pipeline.ranks > 1 else "one rank"
    return _make_table(
        f"Predicted time of one training step on {whose}",
        {"part": "left", "time": "right", "of the step": "right"},
        rows,
        total=True,
    )


def _tabulate_traffic(plan: Plan) -> RenderableType:
    is_pipelined = plan.pipeline.ranks > 1
    inside = [traffic for traffic in plan.traffic if traffic.axis != PIPELINE]
    if not inside:
        return Text("Communication inside pipeline ranks: none" if is_pipelined else "Communication: none")
    ordered = sorted(inside, key=lambda traffic: (-traffic.seconds, traffic.axis, traffic.collective, traffic.purpose))
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
        f"Communication of one step{' inside pipeline ranks' if is_pipelined else ''}"
        f" (bytes of {'the mean' if is_pipelined else 'a'} rank, time not hidden behind compute)",
        columns,
        [*rows, ["all", "", "", *total]],
        total=True,
    )


def _word_messages(plan: Plan) -> str:
    """Say what travels between stages; nothing where nothing does."""
    sent = [traffic for traffic in plan.traffic if traffic.axis == PIPELINE]
    if not sent:
        return ""
    return (
        f"Messages between stages, of all cuts together: {sum(traffic.count for traffic in sent):,} in a step, forward and backward,"
        f" {format_bytes(sum(traffic.nbytes for traffic in sent))} per device of a pipeline rank,"
        f" {format_seconds(sum(traffic.hidden for traffic in sent))}"
        " on their way. What a stage waits for them is in the bubble."
    )


def _tabulate_memory(plan: Plan) -> Stack:
    memory: Memory = plan.memory
    rows = []
    for kind in (*MEMORY_KINDS, "total"):
        nbytes = getattr(memory, kind)
        rows.append([kind, format_bytes(nbytes), format_share(nbytes, memory.budget), _draw_bar(nbytes, memory.budget)])
    if memory.apart:
        rows.insert(-1, ["not at once", f"-{format_bytes(memory.apart)}", f"-{format_share(memory.apart, memory.budget)}", ""])
    columns: dict[str, _Justify] = {"kind": "left", "bytes": "right", "of the budget": "right", "": "left"}
    which = "the fullest device" if plan.pipeline.ranks > 1 else "one device"
    return _make_table(f"Memory of {which} at the peak, budget {format_bytes(memory.budget)}", columns, rows, total=True)


def _draw_bar(part: int, whole: int) -> str:
    """Draw `part` of `whole` as a bar between marks; anything at all shows, and more than the whole runs over the mark."""
    if whole <= 0:
        return ""
    cells = round(_BAR_WIDTH * part / whole)
    cells = max(cells, 1) if part > 0 else 0
    over = min(cells - _BAR_WIDTH, _BAR_WIDTH // 4)
    return f"|{'█' * min(cells, _BAR_WIDTH)}{' ' * (_BAR_WIDTH - cells)}|{'█' * over}"


def _tabulate_groups(plan: Plan, groups: Sequence[Group]) -> Stack:
    pipeline, step = plan.pipeline, plan.seconds.step
    seconds = {group.name: plan.group_seconds(group) for group in groups}
    ordered = sorted(groups, key=lambda group: -sum(seconds[group.name]))
    rows = [
        [
            group.name,
            str(group.count),
            *map(format_seconds, seconds[group.name]),
            format_share(sum(seconds[group.name]), step),
            format_bytes(group.parameter_bytes),
            format_bytes(group.activation_bytes),
        ]
        for group in ordered
    ]
    columns: dict[str, _Justify] = {"layers": "left", "count": "right", "compute": "right", "communication": "right"}
    columns |= {"of the step": "right", "parameters": "right", "activations": "right"}
    remarks = [
        *(["seconds of the mean pipeline rank", "bytes of all stages"] if pipeline.ranks > 1 else []),
        *(["without what is run again"] if not plan.pipeline.keeps_all else []),
        *(["activations of one micro-batch"] if pipeline.microbatches > 1 else []),
    ]
    return _make_table("Where the time goes" + (f" ({', '.join(remarks)})" if remarks else ""), columns, rows)


def _tabulate_layouts(plan: Plan, layer: str) -> RenderableType:
    layouts = select_layouts(plan, layer)
    if not layouts:
        return Text(f"No stored tensor is named after {layer!r}.")
    axes = ", ".join(plan.mesh.names)
    states = [state for text in layouts.values() for state in parse_layout(text)]
    meanings = [
        "S<dim> split, R replicated",
        *(["/N in each of N equal blocks"] if any(state.outer > 1 for state in states) else []),
        *(["p in unequal parts"] if any(state.padded for state in states) else []),
        *(f"z{level} ZeRO level {level}" for level in (1, 2) if any(state.level == level for state in states)),
    ]
    return _make_table(
        f"How its tensors are stored (layers that are alike share this), per axis ({axes}): {', '.join(meanings)}",
        {"tensor": "left", "layout": "left"},
        list(layouts.items()),
    )


def _tabulate_candidates(plan: Plan) -> Stack:
    proof = plan.proof
    cheapest_first = sorted(
        enumerate(proof.candidates), key=lambda numbered: (numbered[1].step_seconds is None, numbered[1].step_seconds or 0.0)
    )
    rows = [
        [
            candidate.name,
            candidate.mesh,
            *_word_candidate_cost(candidate, proof.objective_ns),
            _NOTHING if candidate.memory_bytes is None else format_bytes(candidate.memory_bytes),
            f"{candidate.outcome}, chosen" if position == proof.chosen else candidate.outcome,
        ]
        for position, candidate in cheapest_first
    ]
    columns: dict[str, _Justify] = {"candidate": "left", "mesh": "left", "step": "right", "to the plan": "right"}
    columns |= {"memory": "right", "outcome": "left"}
    return _make_table(f"Candidates looked at: {len(rows)} (memory: without what the device reserves)", columns, rows)


def _word_candidate_cost(candidate: Candidate, objective_ns: int) -> tuple[str, str]:
    """Step time of a candidate, and by how much it is slower than the plan."""
    seconds = candidate.step_seconds
    if seconds is None:
        return _NOTHING, _NOTHING
    return format_seconds(seconds), f"{100 * (round(1e9 * seconds) / objective_ns - 1):+.1f}%" if objective_ns > 0 else _NOTHING


def _word_proof(plan: Plan) -> list[str]:
    """Say what the search proved, in words and exact numbers."""
    proof = plan.proof
    chosen = proof.candidates[proof.chosen]
    is_spread = chosen.name in _SPREAD
    lines = [f"Proof for the mesh {describe_mesh(plan)}"]
    costs = f"The chosen plan costs {proof.objective_ns:,} ns under this cost model."
    if is_spread:
        lines.append(
            f"{costs} With the placements chosen, no stages and recomputation that fit the memory and the pins cost less than"
            f" {proof.bound_ns:,} ns under this schedule."
        )
    else:
        # A baseline is solved under constraints of its own, so its bound speaks of such plans only.
        plans = "plan" if chosen.name == "search" else f"{chosen.name} plan"
        lines.append(
            f"{costs} By the search's costs no {plans} on this mesh, within the pins given, costs less than {proof.bound_ns:,} ns."
        )
    if proof.objective_ns == proof.bound_ns:
        lines.append("The two are equal: nothing cheaper is known there.")
    else:
        lines.append(f"So it is within {format_gap(proof.gap)} of that.")
    if is_spread:
        lines.append("Other placements, schedules, micro-batches and meshes were compared by what was found for each, not by bounds.")
    lines.append(
        f"The solver ended as {proof.status} ({proof.method}) on {count(proof.variables, 'variable')} and"
        f" {count(proof.constraints, 'constraint')}."
    )
    lines += _word_other_pins(plan)
    return lines


def _word_other_pins(plan: Plan) -> list[str]:
    """Say by which options another plan for the same ranks can be had, to compare with; nothing for one rank, which has no other."""
    ranks = plan.world_size
    if plan.pipeline.ranks > 1:
        schedule = "zb-h1" if plan.pipeline.schedule == "1f1b" else "1f1b"
        what, options, is_pinned = "pipeline", f"--pin pp={plan.pipeline.ranks} --pin schedule={schedule}", "a pinned pipeline"
    elif ranks > 1:
        meshes = [{"dp": ranks // 2, "tp": 2}] if ranks % 2 == 0 and ranks > 2 else []
        meshes += [{"dp": ranks}, {"tp": ranks}]
        mesh = next(mesh for mesh in meshes if mesh != dict(zip(plan.mesh.names, plan.mesh.sizes, strict=True)))
        what, options, is_pinned = "mesh", "--mesh " + ",".join(f"{name}={size}" for name, size in mesh.items()), "a pinned mesh"
    else:
        return []
    return [f"To check another {what}, pin it (`autopar plan ... {options}`): {is_pinned} is solved with the same costs."]


def _tabulate_unruled(unruled: Sequence[Unruled]) -> Stack:
    rows = [[target, str(count), source] for target, source, count in count_alike(unruled)]
    return _make_table(
        f"Ops without a rule: {len(unruled)}; each runs replicated, at its full cost",
        {"op": "left", "times": "right", "your line": "left"},
        rows,
    )
