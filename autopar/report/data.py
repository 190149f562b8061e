"""A plan as data for programs: everything that ``explain`` shows, seconds and bytes without friendly units."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from autopar.plans import Group, Plan
from autopar.report.reasons import find_runner_up, find_untried, word_reasons
from autopar.report.selection import find_pipeline_ranks, select_blocks, select_groups, select_layouts
from autopar.report.summary import find_rates


def to_data(plan: Plan, *, layer: str | None = None) -> dict[str, Any]:
    """Everything that `explain` shows, as JSON-ready data: seconds and bytes in the key names, no friendly units.

    Args:
        plan: the plan to describe.
        layer: as for `explain`.

    Raises:
        InputError: no layer of the plan matches `layer`.
    """
    groups = select_groups(plan, layer)
    rank_of = find_pipeline_ranks(plan)
    data: dict[str, Any] = {
        "model": plan.model,
        "fingerprint": plan.fingerprint,
        "cluster": plan.cluster,
        "precision": str(plan.precision),
        "world_size": plan.world_size,
        "mesh": dict(zip(plan.mesh.names, plan.mesh.sizes, strict=True)),
        "pipeline": {
            "ranks": plan.pipeline.ranks,
            "schedule": plan.pipeline.schedule,
            "chunks": plan.pipeline.chunks,
            "microbatches": plan.pipeline.microbatches,
            "blocks": [{**asdict(block), "pipeline_rank": rank_of[block.stage]} for block in select_blocks(plan, layer)],
        },
        "loss_chunks": plan.loss_chunks,
        "half_batches": plan.half_batches,
        "axes": plan.splits,
        "batch_axes": list(plan.batch_axes),
        "seconds": {**asdict(plan.seconds), "step": plan.seconds.step},
        "memory_bytes": {**asdict(plan.memory), "total": plan.memory.total},
        "work": asdict(plan.work),
        "rates": None if (rates := find_rates(plan)) is None else asdict(rates),
        "why": _why_data(plan),
        "traffic": [asdict(traffic) for traffic in plan.traffic],
        "groups": [_group_data(plan, group) for group in groups],
        "ops": [asdict(op) for op in plan.ops if op.group in {group.name for group in groups}],
        "costs": [asdict(row) for row in plan.costs],
        "proof": asdict(plan.proof),
        "repeated": [asdict(work) for work in plan.repeated],
        "unruled": [asdict(op) for op in plan.unruled],
        "notes": list(plan.notes),
    }
    if layer is not None:
        data["layouts"] = select_layouts(plan, layer)
    return data


def _why_data(plan: Plan) -> dict[str, Any]:
    runner_up = find_runner_up(plan)
    data: dict[str, Any] = {"words": word_reasons(plan), "runner_up": None, "untried": None}
    if runner_up is not None:
        data["runner_up"] = {**asdict(runner_up.candidate), "more_seconds": runner_up.more, "terms_seconds": dict(runner_up.terms)}
    if (untried := find_untried(plan)) is not None:
        data["untried"] = asdict(untried)
    return data


def _group_data(plan: Plan, group: Group) -> dict[str, Any]:
    compute, communication = plan.group_seconds(group)
    return {
        "name": group.name,
        "count": group.count,
        "paths": list(group.paths),
        "axes": dict(group.axes),
        "compute_seconds": compute,
        "communication_seconds": communication,
        "parameter_bytes": group.parameter_bytes,
        "activation_bytes": group.activation_bytes,
    }
