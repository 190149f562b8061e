"""A plan as tables on a console that the caller gives (``autopar explain``).

Every cost shown is the plan's own, the one that the search used; nothing is estimated again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.text import Text

from autopar.ir import PIPELINE, format_sizes, parse_layout
from autopar.plans import BlockChoice, Candidate, Group, Memory, Plan, Unruled
from autopar.report.op_tables import list_op_tables, tabulate_sums
from autopar.report.reasons import format_step, group_candidates, is_baseline
from autopar.report.selection import find_pipeline_ranks, select_blocks, select_groups, select_layouts
from autopar.report.summary import (
    MEMORY_KINDS,
    count,
    count_alike,
    describe_copies,
    describe_costs,
    describe_decisions,
    describe_header,
    describe_mesh,
    describe_pipeline,
    describe_proof,
    describe_states,
    format_gap,
    list_step_parts,
    word_ending,
    word_purpose,
)
from autopar.report.text_tables import NOTHING, Justify, make_lines, make_table
from autopar.units import format_bytes, format_seconds, format_share

# With the other columns the table of memory is 80 wide.
_BAR_WIDTH = 38

_MORE = (
    "More: --layer NAME for some layers, --ops for every op, --all for every table and candidate."
    " Words such as exposed, reserved, proof and bound are in docs/concepts.md#glossary."
)


def explain(plan: Plan, console: Console, *, layer: str | None = None, ops: bool = False, everything: bool = False) -> None:
    """Print what `plan` decided and why, what it costs, and why it can be believed: one screen, unless more is asked for.

    Args:
        plan: the plan to show.
        console: where to print; its width is used.
        layer: show only what concerns these layers, with their ops and the stored layout of each of their tensors (layers that are alike
            share theirs). A module path (``transformer.h.3.mlp``), whose parts may be patterns (``h.*.mlp``), or the name of a group
            of layers (`autopar.report.selection`).
        ops: show what every op costs, in tables whose sums are the plan's.
        everything: show all tables but those of ops, and every candidate.

    Raises:
        InputError: no layer of the plan matches `layer`.
    """
    groups = select_groups(plan, layer)
    console.print(Text(describe_header(plan), style="bold"))
    if everything or layer is not None:
        console.print(Text(f"fingerprint {plan.fingerprint}"))
    if layer is not None:
        _print_all(console, [*_list_decisions(plan, groups, layer), _tabulate_groups(plan, groups), _tabulate_layouts(plan, layer)])
        _print_all(console, list_op_tables(plan, groups, layer))
        return
    if everything:
        _print_all(console, _list_everything(plan, groups))
    elif not ops:
        _print_all(console, _list_first_screen(plan))
    if ops:
        _print_all(console, list_op_tables(plan, groups))
        if plan.ops:
            _print_all(console, [tabulate_sums(plan)])


def _print_all(console: Console, parts: Iterable[RenderableType]) -> None:
    for part in parts:
        console.print()
        console.print(part)


def _list_first_screen(plan: Plan) -> Iterator[RenderableType]:
    """What a reader needs first: what is split and why, time, speed, memory, the proof, the best candidates; and what else there is."""
    yield make_lines([*describe_decisions(plan), *describe_costs(plan), ("proof", describe_proof(plan))])
    yield _tabulate_memory(plan)
    yield _tabulate_candidates(plan, everything=False)
    yield from _list_remarks(plan)
    yield Text(_MORE)


def _list_everything(plan: Plan, groups: Sequence[Group]) -> Iterator[RenderableType]:
    """Every table but those of ops."""
    yield make_lines([*describe_decisions(plan), *describe_costs(plan)])
    yield from _list_decisions(plan, groups, None)
    yield _tabulate_step(plan)
    yield _tabulate_traffic(plan)
    if messages := _word_messages(plan):
        yield Text(messages)
    yield _tabulate_memory(plan)
    yield _tabulate_groups(plan, groups)
    yield _tabulate_candidates(plan, everything=True)
    yield Text("\n".join(_word_proof(plan)))
    yield from _list_remarks(plan)


def _list_decisions(plan: Plan, groups: Sequence[Group], layer: str | None) -> Iterator[RenderableType]:
    yield _tabulate_axes(plan, groups)
    if (plan.pipeline.stages > 1 or not plan.pipeline.keeps_all) and (blocks := select_blocks(plan, layer)):
        yield _tabulate_blocks(plan, blocks)


def _list_remarks(plan: Plan) -> Iterator[RenderableType]:
    if plan.unruled:
        yield _tabulate_unruled(plan.unruled)
    if plan.notes:
        yield Text("Notes\n" + "\n".join(f"- {note}" for note in plan.notes))


def _tabulate_axes(plan: Plan, groups: Sequence[Group]) -> Stack:
    axes = {axis: size for axis, size in zip(plan.mesh.names, plan.mesh.sizes, strict=True) if size > 1}
    columns: dict[str, Justify] = {"layers": "left", "count": "right", **{f"{axis} ({size})": "left" for axis, size in axes.items()}}
    rows = [[group.name, str(group.count), *(group.axes.get(axis) or NOTHING for axis in axes)] for group in groups]
    rows.append(["batch of the inputs", "", *("split" if axis in plan.batch_axes else NOTHING for axis in axes)])
    whose = "a pipeline rank's mesh" if plan.pipeline.ranks > 1 else "the mesh"
    return make_table(f"What each axis of {whose} splits", columns, rows, total=True)


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
    columns: dict[str, Justify] = {"pipeline rank": "right", "ranks": "left", "stage": "right", "blocks": "left", "count": "right"}
    columns["recompute"] = "left"
    text = describe_pipeline(plan)
    if plan.pipeline.ranks == 1:
        rows = [row[2:] for row in rows]
        columns = {name: justify for name, justify in columns.items() if name not in ("pipeline rank", "ranks")}
    return make_table(f"Stages: {text}" if plan.pipeline.stages > 1 else "What the backward runs again", columns, rows)


def _tabulate_step(plan: Plan) -> Stack:
    seconds = plan.seconds
    parts = [*list_step_parts(seconds), ("step", seconds.step)]
    absent = {
        "recompute": not seconds.recompute and plan.pipeline.keeps_all,
        "bubble": not (seconds.bubble or plan.pipeline.ranks > 1),
    }
    rows = [[name, format_seconds(value), format_share(value, seconds.step)] for name, value in parts if not absent.get(name)]
    whose = "the mean rank; bubble: waiting for other stages" if plan.pipeline.ranks > 1 else "one rank"
    return make_table(
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
            word_purpose(traffic.purpose),
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
    columns: dict[str, Justify] = {"axis": "left", "collective": "left", "purpose": "left"}
    columns |= {"times": "right", "bytes": "right", "exposed": "right"}
    return make_table(
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
    columns: dict[str, Justify] = {"kind": "left", "bytes": "right", "of the budget": "right", "": "left"}
    which = "the fullest device" if plan.pipeline.ranks > 1 else "one device"
    table = make_table(f"Memory of {which} at the peak, budget {format_bytes(memory.budget)}", columns, rows, total=True)
    if not memory.copies:
        return table
    return Stack(table, Text(f"Of the parameters {format_bytes(memory.copies)} are {describe_copies(plan)}."))


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
    columns: dict[str, Justify] = {"layers": "left", "count": "right", "compute": "right", "communication": "right"}
    columns |= {"of the step": "right", "parameters": "right", "activations": "right"}
    remarks = [
        *(["seconds of the mean pipeline rank", "bytes of all stages"] if pipeline.ranks > 1 else []),
        *(["without what is run again"] if not plan.pipeline.keeps_all else []),
        *(["activations of one micro-batch"] if pipeline.microbatches > 1 else []),
    ]
    return make_table("Where the time goes" + (f" ({', '.join(remarks)})" if remarks else ""), columns, rows)


def _tabulate_layouts(plan: Plan, layer: str) -> RenderableType:
    layouts = select_layouts(plan, layer)
    if not layouts:
        return Text(f"No stored tensor is named after {layer!r}.")
    axes = ", ".join(plan.mesh.names)
    meanings = describe_states(state for text in layouts.values() for state in parse_layout(text))
    return make_table(
        f"How its tensors are stored (layers that are alike share this), per axis ({axes}): {meanings}",
        {"tensor": "left", "layout": "left"},
        list(layouts.items()),
    )


def _tabulate_candidates(plan: Plan, *, everything: bool) -> Stack:
    """The candidates by kind: all of them, or the best of each kind."""
    proof = plan.proof
    chosen = proof.candidates[proof.chosen]
    rows = []
    for kind, candidates in group_candidates(plan).items():
        for number, candidate in enumerate(candidates if everything else candidates[:1]):
            more = f"; {len(candidates) - 1} more" if len(candidates) > 1 and not everything else ""
            rows.append(
                [
                    kind if number == 0 else "",
                    "this plan" if candidate is chosen else f"baseline {candidate.name}" if is_baseline(candidate) else candidate.name,
                    candidate.mesh,
                    format_step(candidate),
                    _word_distance(candidate, proof.objective_ns),
                    NOTHING if candidate.memory_bytes is None else format_bytes(candidate.memory_bytes),
                    f"{f'{candidate.name}: ' if candidate is chosen else ''}{candidate.outcome}{more}",
                ]
            )
    columns: dict[str, Justify] = {"kind": "left", "candidate": "left", "mesh": "left", "step": "right", "to the plan": "right"}
    columns |= {"memory": "right", "outcome": "left"}
    which = "" if everything else "the best of each kind, "
    legend = "≥ a lower bound, ~ an estimate; "
    if any(row[1].startswith("baseline") for row in rows):
        legend += "a baseline's bound isn't its kind's; "
    return make_table(
        f"Candidates: {which}{len(proof.candidates)} looked at ({legend}memory without what the device reserves)",
        columns,
        rows,
    )


def _word_distance(candidate: Candidate, objective_ns: int) -> str:
    """By how much a candidate is slower than the plan."""
    if candidate.step_seconds is None or objective_ns <= 0:
        return NOTHING
    return f"{100 * (round(1e9 * candidate.step_seconds) / objective_ns - 1):+.1f}%"


def _word_proof(plan: Plan) -> list[str]:
    """Say what the search proved, in words and exact numbers."""
    proof = plan.proof
    chosen = proof.candidates[proof.chosen]
    spread = chosen.is_spread
    lines = [f"Proof for the mesh {describe_mesh(plan)}"]
    costs = f"The chosen plan costs {proof.objective_ns:,} ns under this cost model."
    if spread:
        lines.append(
            f"{costs} With the placements chosen, no stages and recomputation that fit the memory and the pins cost less than"
            f" {proof.bound_ns:,} ns under this schedule."
        )
    else:
        # A baseline is solved under constraints of its own, so its bound speaks of such plans only.
        plans = "plan" if chosen.name == "search" else f"{chosen.name} plan"
        lines.append(
            f"{costs} By the search's costs no {plans} on this mesh, within the pins and the kinds of axes given, costs less than"
            f" {proof.bound_ns:,} ns."
        )
    if proof.objective_ns == proof.bound_ns:
        lines.append("The two are equal: nothing cheaper is known there.")
    else:
        lines.append(f"So it is within {format_gap(proof.gap)} of that.")
    if spread:
        lines.append("Other placements, schedules, micro-batches and meshes were compared by what was found for each, not by bounds.")
    lines.append(f"{word_ending(plan)} on {count(proof.variables, 'variable')} and {count(proof.constraints, 'constraint')}.")
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
        what, options, is_pinned = "mesh", f"--mesh {format_sizes(mesh)}", "a pinned mesh"
    else:
        return []
    return [f"To check another {what}, pin it (`autopar plan ... {options}`): {is_pinned} is solved with the same costs."]


def _tabulate_unruled(unruled: Sequence[Unruled]) -> Stack:
    rows = [[target, str(count), source] for target, source, count in count_alike(unruled)]
    return make_table(
        f"Ops without a rule: {len(unruled)}; each runs replicated, at its full cost",
        {"op": "left", "times": "right", "your line": "left"},
        rows,
    )
