"""Everything that a page shows of a plan, as data for JSON.

Comes in: a `Plan`. Goes out: one dict. Its numbers are the plan's own, or sums of them, in seconds and bytes; units are given by the page.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from autopar.errors import InputError
from autopar.pages.graph import describe_graph
from autopar.pages.tables import make_tables
from autopar.pages.timeline import describe_timeline, tabulate_ranks
from autopar.plans import OpCost, Plan, Seconds
from autopar.report import describe_decisions, describe_mesh, describe_precision, describe_proof, find_rates, format_gap
from autopar.timelines import predict
from autopar.units import format_bytes


def describe_page(plan: Plan) -> dict[str, Any]:
    """What a page shows of `plan`. A plan that says nothing of single blocks, or has too many events, has no timeline."""
    tables = list(make_tables(plan))
    timeline, notes = None, list(plan.notes)
    if plan.pipeline.timing is not None:
        try:
            trace = predict(plan)
        except InputError as error:
            notes.append(f"no timeline: {error}")
        else:
            timeline = describe_timeline(trace)
            tables.insert(2, tabulate_ranks(trace))
    return {
        "title": f"{plan.model} on {plan.cluster}",
        "lead": _word_lead(plan),
        "figures": _list_figures(plan),
        "budget": plan.memory.budget,
        "graph": describe_graph(plan),
        "ops": [_describe_op(op) for op in plan.ops],
        "timeline": timeline,
        "tables": [asdict(table) for table in tables],
        "notes": notes,
    }


def _describe_op(op: OpCost) -> dict[str, Any]:
    """What a click on an op shows: its loops, what splits them, its costs and the user's line."""
    parts = [(field.name, getattr(op.seconds, field.name)) for field in fields(Seconds)]
    return {
        "op": op.op,
        "group": op.group,
        "target": op.target,
        "path": op.path,
        "source": op.source,
        "space": op.space,
        "loops": dict(op.loops),
        "splits": dict(op.splits),
        "count": op.count,
        "flops": op.flops,
        "seconds": [[name, seconds] for name, seconds in parts if seconds],
        "hidden": op.hidden,
        "nbytes": op.nbytes,
    }


def _word_lead(plan: Plan) -> list[tuple[str, str]]:
    """(label, text) of what was decided and why, and what is proven."""
    mesh = f"{describe_mesh(plan)}{describe_precision(plan)}"
    return [("mesh", mesh), *describe_decisions(plan), ("proof", describe_proof(plan))]


def _list_figures(plan: Plan) -> list[list[Any]]:
    """(label, number or text, unit, remark) of what a reader looks for first."""
    seconds, memory, rates = plan.seconds, plan.memory, find_rates(plan)
    is_spread = plan.proof.candidates[plan.proof.chosen].is_spread
    figures: list[list[Any]] = [
        ["step, predicted", seconds.step, "seconds", ""],
        ["computing", seconds.computing, "seconds", "with what is run again"],
        ["exposed communication", seconds.communication, "seconds", "not hidden behind computing"],
    ]
    if plan.pipeline.ranks > 1:
        figures.append(["bubble", seconds.bubble, "seconds", "waiting for other stages"])
    if rates is not None:
        name, rate = ("samples", rates.samples) if rates.tokens is None else ("tokens", rates.tokens)
        figures.append([f"{name} per second", rate, "rate", ""])
        if rates.utilisation is not None:
            figures.append(["model-flops utilisation", rates.utilisation, "share", "without what is run again"])
    return [
        *figures,
        ["memory per device", memory.total, "bytes", f"at the peak, of {format_bytes(memory.budget)}"],
        ["devices", plan.world_size, "count", ""],
        ["gap to the bound", format_gap(plan.proof.gap), "", "of stages and recomputation alone" if is_spread else ""],
    ]
