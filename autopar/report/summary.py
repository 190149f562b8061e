"""A plan in a few lines: the mesh, what each axis does and why, predicted time, speed and memory, and the proof."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields

from autopar.ir import AS_MODEL, Split, State, format_mesh, format_sizes, with_pipeline
from autopar.plans import RECOMPUTE, Memory, Plan, Purpose, Request, Seconds, Unruled
from autopar.report.reasons import word_reasons
from autopar.units import format_bytes, format_seconds, format_share

MEMORY_KINDS = tuple(field.name for field in fields(Memory) if field.name not in ("budget", "apart", "copies"))
"""The kinds of `Memory`, in the order shown."""

_KINDS = {"dp": "the batch", "cp": "the sequence", "tp": "features"}
"""What an axis of such a name splits if the name was given, which pins it to a kind."""

_METHODS = {"LP, integral": "a linear program with an integral solution", "MIP": "a mixed-integer program"}

_UNRULED_SHOWN = 3

_REPEATED_SHOWN = 2

_LEAST_REPEATED = 0.01


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast a plan trains, of its predicted step.

    Attributes:
        samples, tokens: per second, of the whole batch; tokens are None for a model without a sequence.
        utilisation: model-flops utilisation (Chowdhery et al. 2022, appendix B): flops of the model in a step, without what is run again,
            as a share of what all devices could compute in that time; None for a model without products.
    """

    samples: float
    tokens: float | None
    utilisation: float | None


def find_rates(plan: Plan) -> Rates | None:
    """The rates of a plan; None for one whose step takes no time."""
    step, work = plan.seconds.step, plan.work
    if step <= 0:
        return None
    possible = plan.world_size * work.peak_flops * step
    return Rates(
        samples=work.samples / step,
        tokens=None if work.tokens is None else work.tokens / step,
        utilisation=work.flops / possible if work.flops and possible else None,
    )


def summarize(plan: Plan) -> str:
    """Describe `plan` in a few plain lines: what is split and why, predicted time, speed and memory, proof, and ops without a rule."""
    lines = [*describe_decisions(plan), *describe_costs(plan), ("memory", _word_memory(plan)), ("proof", describe_proof(plan))]
    if plan.unruled:
        lines.append(("unruled", describe_unruled(plan)))
    indent = "\n" + " " * 8
    texts = [f"{label:7} {text.replace(chr(10), indent)}" for label, text in lines]
    return "\n".join([describe_header(plan), *texts])


def describe_header(plan: Plan) -> str:
    """What a plan is for, its mesh and its precision."""
    return f"{plan.model} on {plan.cluster}, mesh {describe_mesh(plan)}{describe_precision(plan)}"


def describe_decisions(plan: Plan) -> list[tuple[str, str]]:
    """What was decided, as (label, text), and why."""
    splits = [f"{axis} splits {role}" for axis, role in plan.splits.items()]
    splits += [*([f"ring attention {text}"] if (text := describe_ring(plan)) else []), *_word_free_axes(plan)]
    lines = [("axes", "; ".join(splits) or "none: one rank")]
    if text := describe_pipeline(plan):
        lines.append(("stages" if plan.pipeline.stages > 1 else "batch", text))
    if text := _word_batch(plan):
        lines.append(("batch", text))
    if plan.loss_chunks > 1:
        lines.append(("loss", f"its logits are computed in {plan.loss_chunks} chunks, twice"))
    if plan.half_batches:
        lines.append(("halves", "of the batch take turns: one computes while the ranks exchange for the other"))
    if text := describe_repeated(plan):
        lines.append(("repeats", text))
    return [*lines, ("why", " ".join(word_reasons(plan)))]


def describe_costs(plan: Plan) -> list[tuple[str, str]]:
    """What a step takes, and how fast that is, as (label, text)."""
    lines = [("step", f"{format_seconds(plan.seconds.step)} predicted = " + " + ".join(_word_parts(plan)))]
    rates = find_rates(plan)
    if rates is not None:
        work = plan.work
        texts = [] if rates.tokens is None else [f"{format_rate(rates.tokens)} tokens/s"]
        texts.append(f"{format_rate(rates.samples)} samples/s")
        if rates.utilisation is not None:
            devices = f"{plan.world_size} x " if plan.world_size > 1 else ""
            peak = f"{devices}{work.peak_flops / 1e12:.3g} TFLOP/s {work.dtype}"
            texts.append(f"model-flops utilisation {format_share(rates.utilisation, 1.0)} of {peak}")
        lines.append(("speed", ", ".join(texts)))
    return lines


def format_rate(rate: float) -> str:
    """Things per second, or a share, to three digits at least."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _word_batch(plan: Plan) -> str:
    """Say so if the batch can't be shared equally by all ranks: plans that split it over all of them aren't among the candidates then."""
    samples, ranks = plan.work.samples, plan.world_size
    if samples % ranks == 0 or plan.pipeline.ranks > 1:
        return ""
    return f"{count(samples, 'sample')}, which {ranks} ranks can't share equally, so no plan splits the batch over all of them"


def _word_memory(plan: Plan) -> str:
    memory = plan.memory
    kinds = ", ".join(f"{kind} {format_bytes(getattr(memory, kind))}" for kind in MEMORY_KINDS if getattr(memory, kind))
    remarks = [
        *([f"of the parameters {format_bytes(memory.copies)} are {describe_copies(plan)}"] if memory.copies else []),
        *([f"minus {format_bytes(memory.apart)} that are never held at the same time as others"] if memory.apart else []),
    ]
    return f"{format_bytes(memory.total)} of {format_bytes(memory.budget)} per device: {'; '.join([kinds or 'nothing', *remarks])}"


def describe_copies(plan: Plan) -> str:
    """What the copies are that count with a plan's parameters."""
    if plan.precision.param_dtype is not None:
        return f"copies in {plan.precision.param_dtype}, which the program reads"
    return "copies that the program reads, gathered from the stored parts or cast"


def describe_proof(plan: Plan) -> str:
    """What is proven of the step, in words."""
    proof = plan.proof
    chosen = proof.candidates[proof.chosen]
    if chosen.is_spread:
        scope = "with these placements and this schedule, no other division into stages and recomputation takes less"
    else:
        what = "choice of placements" if chosen.name == "search" else f"{chosen.name} plan"
        scope = f"by the search's costs, no {what} on this mesh{_word_limits(plan)} takes less"
    text = scope
    if proof.objective_ns != proof.bound_ns:
        text += f" than {format_seconds(proof.bound_ns / 1e9)}; the step is within {format_gap(proof.gap)} of that bound"
    return f"{text}. {word_ending(plan)}; candidates looked at: {len(proof.candidates)}"


def word_ending(plan: Plan) -> str:
    """How the solver ended, and by what."""
    status, halves, _ = plan.proof.status.partition(" without half batches")
    method = "; ".join(_METHODS.get(part, part) for part in plan.proof.method.split("; "))
    return f"The solver ended as {status}{', its bound is that of plans without half batches' if halves else ''} ({method})"


def _word_limits(plan: Plan) -> str:
    """What was pinned of the placements on the plan's mesh, to follow it in a sentence: the kinds of axes that were named, and pins."""
    request = plan.request
    given = {*request.pins.axis_sizes, *(request.mesh_sizes or {})}
    sizes = dict(zip(plan.mesh.names, plan.mesh.sizes, strict=True))
    kinds = {name: _KINDS.get(name.rstrip("0123456789")) for name, size in sizes.items() if size > 1 and name in given}
    named = [f"{name} splits {what}" for name, what in kinds.items() if what]
    limits = [f"on which {' and '.join(named)}"] if named else []
    if request.pins.texts.keys() - request.pins.axis_sizes.keys():
        limits.append("within the pins given")
    return "".join(f", {limit}" for limit in limits) + ("," if limits else "")


def describe_unruled(plan: Plan) -> str:
    """The ops without a rule, the first of them by name."""
    shown = count_alike(plan.unruled)
    more = f" and {len(shown) - _UNRULED_SHOWN} more" if len(shown) > _UNRULED_SHOWN else ""
    names = "; ".join(f"{target} ({source})" for target, source, _ in shown[:_UNRULED_SHOWN])
    return f"{len(plan.unruled)} ops have no rule and run replicated at full cost: {names}{more}"


def describe_choice(plan: Plan, started: str = "") -> str:
    """A plan in one line: what was chosen, and what a step takes. Words on how the ranks were `started` follow the mesh."""
    parts = [f"mesh {describe_mesh(plan)}{started}{describe_precision(plan)}"]
    if text := describe_ring(plan):
        parts.append(f"ring attention {text}")
    if not plan.pipeline.is_trivial:
        number = plan.pipeline.microbatches
        schedule = f"{plan.pipeline.schedule}, " if plan.pipeline.ranks > 1 else ""
        parts.append(f"{schedule}{number} micro-batch{'' if number == 1 else 'es'}")
    if plan.loss_chunks > 1:
        parts.append(f"loss in {plan.loss_chunks} chunks")
    if plan.half_batches:
        parts.append("half batches")
    if plan.world_size > 1 and set(plan.splits.values()) == {"nothing"}:
        parts.append("no work is split, every rank runs the whole model")
    parts.append(f"step {format_seconds(plan.seconds.step)} and {format_bytes(plan.memory.total)} per device predicted")
    return f"{plan.model} on {plan.cluster}: {', '.join(parts)}"


def describe_precision(plan: Plan) -> str:
    """The precision, to follow what a plan is for, and the dtype in which most is computed."""
    name = "as the model's" if plan.precision == AS_MODEL else str(plan.precision)
    return f", precision {name} (computes in {plan.work.dtype})"


def _word_free_axes(plan: Plan) -> list[str]:
    """Of a plan whose axes were free to split anything, how to ask for them: by their names they would be pinned to a kind."""
    chosen, request = plan.proof.candidates[plan.proof.chosen], plan.request
    if not chosen.free_mesh or plan.world_size == 1 or request.mesh is not None or request.pins.axis_sizes or request == Request():
        return []
    # A mesh that is given is solved without a pipeline, and without mixing placements, unless one is asked for.
    pipeline = f" --pin pp={plan.pipeline.ranks}" if chosen.is_spread else ""
    sizes = dict(zip(chosen.free_mesh.names, chosen.free_mesh.sizes, strict=True))
    return [f"free axes, named by what they do: --mesh {format_sizes(sizes)}{pipeline} asks for them"]


def describe_pipeline(plan: Plan) -> str:
    """Say how the work is spread over pipeline ranks and over time; empty for a plan without a pipeline and micro-batches."""
    pipeline = plan.pipeline
    if pipeline.stages == 1:
        return "" if pipeline.is_trivial else f"in {pipeline.microbatches} micro-batches, one after the other"
    width = plan.mesh.world_size
    devices = f" of {width} devices" if width > 1 else ""
    where = f" on {pipeline.ranks} pipeline ranks{devices}" if pipeline.ranks > 1 else ""
    each = f", {pipeline.chunks} on each" if pipeline.chunks > 1 else ""
    microbatches = f"{pipeline.microbatches} micro-batches" if pipeline.microbatches > 1 else "1 micro-batch"
    return f"{pipeline.stages}{where}{each}; schedule {pipeline.schedule}, {microbatches}"


def describe_ring(plan: Plan) -> str:
    """Over which axes attention passes keys and values around, and whether parts are zigzag; empty where none does."""
    axes = [axis for axis in plan.mesh.names if any(row.collective == "ring" and row.axis == axis for row in plan.costs)]
    splits = [part for placement in plan.placements.values() for part in placement if isinstance(part, Split)]
    zigzag = ", zigzag" if any(part.zigzag for part in splits) else ""
    return f"over {' and '.join(axes)}{zigzag}" if axes else ""


def describe_repeated(plan: Plan) -> str:
    """Say which share of the work is done by several ranks alike, and by which ops; empty when that is less than a hundredth."""
    total = sum(work.share for work in plan.repeated)
    if total < _LEAST_REPEATED:
        return ""
    reason = "nothing of it could be split"
    if any(work.could_split for work in plan.repeated):
        is_all = all(work.could_split for work in plan.repeated)
        reason = "the search found no faster split of it" if is_all else f"{reason}, or no split that the search found is faster"
    lines = [f"{format_share(total, 1.0)} of the work of all ranks repeats what other ranks do, since {reason}:"]
    for work in plan.repeated[:_REPEATED_SHOWN]:
        alike = f" and {work.count - 1} like it" if work.count > 1 else ""
        where = f" at {work.source}" if work.source else ""
        lines.append(f"{work.path or work.op}: {work.target}{alike} on {work.ranks} ranks, loops {work.loops}{where}")
    if len(plan.repeated) > _REPEATED_SHOWN:
        lines.append(f"and {len(plan.repeated) - _REPEATED_SHOWN} more")
    return "\n".join(lines)


def count_recompute(plan: Plan) -> dict[str, int]:
    """Number of blocks by what their backward runs again, of the kinds that there are."""
    counts = Counter(block.recompute for block in plan.pipeline.blocks)
    return {kind: counts[kind] for kind in RECOMPUTE if counts[kind]}


def describe_mesh(plan: Plan) -> str:
    """The mesh of all ranks, the pipeline among its axes, and how many ranks there are."""
    mesh = format_mesh(with_pipeline(plan.mesh, plan.pipeline.ranks))
    return f"{mesh} ({plan.world_size} ranks)" if plan.world_size > 1 else "of one rank"


def describe_states(states: Iterable[State]) -> str:
    """What the texts of states of stored tensors mean, as far as they occur."""
    seen = set(states)
    meanings = [
        "S<dim> split, R replicated",
        *(["/N in each of N equal blocks"] if any(state.outer > 1 for state in seen) else []),
        *(["p in unequal parts"] if any(state.padded for state in seen) else []),
        *(f"z{level} ZeRO level {level}" for level in (1, 2) if any(state.level == level for state in seen)),
    ]
    return ", ".join(meanings)


def list_step_parts(seconds: Seconds) -> tuple[tuple[str, float], ...]:
    """The parts of a step by the names that tables have for them; they add up to the step."""
    return (
        ("compute, forward", seconds.forward),
        ("compute, backward", seconds.backward),
        ("recompute", seconds.recompute),
        ("optimizer", seconds.optimizer),
        ("exposed communication", seconds.communication),
        ("bubble", seconds.bubble),
    )


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
    return f"{describe_recompute(plan) or 'none'} of {len(plan.pipeline.blocks)} blocks"


def describe_recompute(plan: Plan) -> str:
    """In how many blocks what is run again, ``selective in 2, full in 30``; empty where nothing is."""
    return ", ".join(f"{kind} in {number}" for kind, number in count_recompute(plan).items() if kind != "none")


def word_purpose(purpose: str) -> str:
    """What communication is for, as reports call it; data for programs have the plan's own word."""
    return "inside attention, convolutions, losses and norms" if purpose == Purpose.KERNEL else purpose


def format_gap(gap: float) -> str:
    """A relative gap in percent."""
    return "0" if gap == 0 else f"{100 * gap:.3g}%" if gap >= 1e-5 else "0.001%"


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
