"""A plan in a few lines: the mesh, what each axis does, predicted time and memory, and the proof."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import fields

from autopar.ir import AS_MODEL, PIPELINE, with_pipeline
from autopar.plans import RECOMPUTE, Memory, Plan, Unruled
from autopar.units import format_bytes, format_seconds, format_share

MEMORY_KINDS = tuple(field.name for field in fields(Memory) if field.name not in ("budget", "apart"))
"""The kinds of `Memory`, in the order shown."""

_UNRULED_SHOWN = 3

_REPEATED_SHOWN = 2

_LEAST_REPEATED = 0.01


def summarize(plan: Plan) -> str:
    """Describe `plan` in a few plain lines: mesh, predicted time and memory, proof, and ops without a rule."""
    seconds, memory, proof = plan.seconds, plan.memory, plan.proof
    kinds = ", ".join(f"{kind} {format_bytes(getattr(memory, kind))}" for kind in MEMORY_KINDS if getattr(memory, kind))
    kinds += f"; {format_bytes(memory.apart)} of these not at the same time" if memory.apart else ""
    lines = [
        f"{plan.model} on {plan.cluster}, mesh {describe_mesh(plan)}{describe_precision(plan)}",
        "axes    " + ("; ".join(f"{axis} splits {role}" for axis, role in describe_axes(plan).items()) or "none: one rank"),
        *(f"stages  {text}" for text in [describe_pipeline(plan)] if text),
        *([f"loss    its logits are computed in {plan.loss_chunks} chunks, twice"] if plan.loss_chunks > 1 else []),
        *(["halves  of the batch take turns: one computes while the ranks exchange for the other"] if plan.half_batches else []),
        *(f"repeats {text}" for text in [describe_repeated(plan)] if text),
        f"step    {format_seconds(seconds.step)} predicted = " + " + ".join(_word_parts(plan)),
        f"memory  {format_bytes(memory.total)} of {format_bytes(memory.budget)} per device: {kinds or 'nothing'}",
        f"proof   {proof.status} ({proof.method}): objective {proof.objective_ns:,} ns, bound {proof.bound_ns:,} ns,"
        f" gap {format_gap(proof.gap)}, candidates looked at: {len(proof.candidates)}",
    ]
    if plan.unruled:
        shown = count_alike(plan.unruled)
        more = f" and {len(shown) - _UNRULED_SHOWN} more" if len(shown) > _UNRULED_SHOWN else ""
        lines.append(
            f"unruled {len(plan.unruled)} ops have no rule and run replicated at full cost: "
            + "; ".join(f"{target} ({source})" for target, source, _ in shown[:_UNRULED_SHOWN])
            + more
        )
    return "\n".join(lines)


def describe_choice(plan: Plan, started: str = "") -> str:
    """A plan in one line: what was chosen, and what a step takes. Words on how the ranks were `started` follow the mesh."""
    parts = [f"mesh {describe_mesh(plan)}{started}{describe_precision(plan)}"]
    if not plan.pipeline.is_trivial:
        number = plan.pipeline.microbatches
        parts.append(f"{plan.pipeline.schedule}, {number} micro-batch{'' if number == 1 else 'es'}")
    if plan.loss_chunks > 1:
        parts.append(f"loss in {plan.loss_chunks} chunks")
    if plan.half_batches:
        parts.append("half batches")
    if plan.world_size > 1 and set(describe_axes(plan).values()) == {"nothing"}:
        parts.append("no work is split, every rank runs the whole model")
    parts.append(f"step {format_seconds(plan.seconds.step)} and {format_bytes(plan.memory.total)} per device predicted")
    return f"{plan.model} on {plan.cluster}: {', '.join(parts)}"


def describe_precision(plan: Plan) -> str:
    """The precision, to follow what a plan is for; empty where everything is in the dtypes that the model has."""
    return "" if plan.precision == AS_MODEL else f", precision {plan.precision}"


def describe_axes(plan: Plan) -> dict[str, str]:
    """Per axis of the mesh, what it splits: the batch, and what the contractions of the groups of layers name, the dearest group first.

    The pipeline is an axis like the others, which splits the layers; axes of one rank beside it are left out.
    """
    is_pipelined = plan.pipeline.ranks > 1
    roles: dict[str, list[str]] = {PIPELINE: ["layers"]} if is_pipelined else {}
    for axis, size in zip(plan.mesh.names, plan.mesh.sizes, strict=True):
        if is_pipelined and size == 1:
            continue
        parts = ["batch"] if axis in plan.batch_axes else []
        for group in sorted(plan.groups, key=lambda group: -plan.group_seconds(group)[0]):
            parts += [part.strip() for part in group.axes.get(axis, "").split(",")]
        roles[axis] = [role for role in dict.fromkeys(parts) if role not in ("", "nothing")]
    return {axis: ", ".join(parts) or "nothing" for axis, parts in roles.items()}


def describe_pipeline(plan: Plan) -> str:
    """Say how the work is spread over pipeline ranks and over time; empty for a plan without a pipeline and micro-batches."""
    pipeline = plan.pipeline
    if pipeline.is_trivial and pipeline.stages == 1:
        return ""
    width = plan.mesh.world_size
    devices = f" of {width} devices" if width > 1 else ""
    where = f" on {pipeline.ranks} pipeline ranks{devices}" if pipeline.ranks > 1 else ""
    each = f", {pipeline.chunks} on each" if pipeline.chunks > 1 else ""
    microbatches = f"{pipeline.microbatches} micro-batches" if pipeline.microbatches > 1 else "1 micro-batch"
    return f"{pipeline.stages}{where}{each}; schedule {pipeline.schedule}, {microbatches}"


def describe_repeated(plan: Plan) -> str:
    """Say which share of the work is done by several ranks alike, and by which ops; empty when that is less than a hundredth."""
    total = sum(work.share for work in plan.repeated)
    if total < _LEAST_REPEATED:
        return ""
    lines = [f"{format_share(total, 1.0)} of the work of all ranks repeats what other ranks do, since nothing of it could be split:"]
    for work in plan.repeated[:_REPEATED_SHOWN]:
        alike = f" and {work.count - 1} like it" if work.count > 1 else ""
        where = f" at {work.source}" if work.source else ""
        lines.append(f"{work.path or work.op}: {work.target}{alike} on {work.ranks} ranks, loops {work.loops}{where}")
    if len(plan.repeated) > _REPEATED_SHOWN:
        lines.append(f"and {len(plan.repeated) - _REPEATED_SHOWN} more")
    return "\n        ".join(lines)


def count_recompute(plan: Plan) -> dict[str, int]:
    """Number of blocks by what their backward runs again, of the kinds that there are."""
    counts = Counter(block.recompute for block in plan.pipeline.blocks)
    return {kind: counts[kind] for kind in RECOMPUTE if counts[kind]}


def describe_mesh(plan: Plan) -> str:
    """The mesh of all ranks, the pipeline among its axes, and how many ranks there are."""
    mesh = with_pipeline(plan.mesh, plan.pipeline.ranks)
    return f"{mesh} ({plan.world_size} ranks)" if plan.world_size > 1 else "of one rank"


def _word_parts(plan: Plan) -> list[str]:
    """What the step's seconds are made of, for the summary."""
    seconds = plan.seconds
    parts = [f"compute {format_seconds(seconds.forward + seconds.backward)}"]
    if seconds.recompute or not plan.pipeline.keeps_all:
        parts.append(f"recompute {format_seconds(seconds.recompute)} ({_word_recompute(plan)})")
    parts.append(f"optimizer {format_seconds(seconds.optimizer)}")
    parts.append(f"exposed communication {format_seconds(seconds.communication)}")
    if seconds.bubble or plan.pipeline.ranks > 1:
        parts.append(f"bubble {format_seconds(seconds.bubble)} ({format_share(seconds.bubble, seconds.step)})")
    return parts


def _word_recompute(plan: Plan) -> str:
    """How much of the model is run again: ``full in 30 of 34 blocks``."""
    counts = [f"{kind} in {count}" for kind, count in count_recompute(plan).items() if kind != "none"]
    return f"{', '.join(counts) or 'none'} of {len(plan.pipeline.blocks)} blocks"


def format_gap(gap: float) -> str:
    """A relative gap in percent."""
    return "0" if gap == 0 else f"{100 * gap:.3g}%"


def count(number: int, what: str) -> str:
    """A number of things in words, ``3 candidates``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def count_alike(unruled: Iterable[Unruled]) -> list[tuple[str, str, int]]:
    """(target, source, number) of the ops that come from one line; repeated layers say the same many times."""
    counts: dict[tuple[str, str], int] = {}
    for op in unruled:
        key = op.target, op.source or "line unknown"
        counts[key] = counts.get(key, 0) + 1
    return [(target, source, count) for (target, source), count in counts.items()]
