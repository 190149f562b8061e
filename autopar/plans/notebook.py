"""What notebooks show of a plan.

Comes in: a `Plan`. Goes out: HTML, a table of what a reader looks for first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopar.ir import with_pipeline
from autopar.notebooks import show_table
from autopar.units import format_bytes, format_seconds, format_share

if TYPE_CHECKING:
    from autopar.plans.plan import Plan


def show_plan(plan: Plan) -> str:
    """The mesh, what it splits, stages, step, memory and bound of a plan as a table."""
    seconds, memory, pipeline = plan.seconds, plan.memory, plan.pipeline
    mesh = f"{with_pipeline(plan.mesh, pipeline.ranks)} ({plan.world_size} ranks)" if plan.world_size > 1 else "one rank"
    stages = f"{pipeline.stages}, schedule {pipeline.schedule}, micro-batches {pipeline.microbatches}"
    # Placements and schedule of a pipeline aren't proven to be the best.
    scope = ", of stages and recomputation alone" if plan.proof.candidates[plan.proof.chosen].is_spread else ""
    rows = [
        ("mesh", mesh),
        *(("split", f"{axis} splits {words}") for axis, words in plan.splits.items()),
        *([] if pipeline.is_trivial else [("stages", stages)]),
        ("step, predicted", format_seconds(seconds.step)),
        ("computing", f"{format_seconds(seconds.computing)} ({format_share(seconds.computing, seconds.step)})"),
        ("exposed communication", f"{format_seconds(seconds.communication)} ({format_share(seconds.communication, seconds.step)})"),
        *([("bubble", f"{format_seconds(seconds.bubble)} ({format_share(seconds.bubble, seconds.step)})")] if pipeline.ranks > 1 else []),
        ("memory per device", f"{format_bytes(memory.total)} of {format_bytes(memory.budget)}"),
        ("gap to the bound", format_share(plan.proof.gap, 1.0) + scope),
    ]
    return show_table(f"{plan.model} on {plan.cluster}", rows)
