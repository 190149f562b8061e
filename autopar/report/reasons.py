"""Why a plan was chosen: the best candidate of another kind, what it would take, and which part of the step makes the difference.

Comes in: the candidates of a plan's proof. Goes out: the runner-up, and sentences. Only differences of the plan's numbers are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.plans import KINDS, Candidate, Plan, Seconds
from autopar.units import format_bytes, format_seconds

TERMS = {
    "compute": "compute",
    "recompute": "recomputation",
    "optimizer": "optimizer work",
    "communication": "exposed communication",
    "bubble": "bubble",
}
"""Parts of a step that are compared, with their names: forward and backward are one, since they change alike."""

# Parts that differ by less than this share of the step aren't worth a word.
_WORTH = 0.005
_TERMS_SHOWN = 2

_MARKS = {"bound": "≥ ", "estimate": "~"}


@dataclass(frozen=True, slots=True)
class RunnerUp:
    """The best candidate of another kind than the plan's.

    Attributes:
        candidate: it has `step_seconds`.
        more: seconds that its step takes more than the plan's; a bound or an estimate if those are.
        terms: per part of the step seconds more than in the plan, the largest difference first; empty where its parts aren't known.
        untried: a candidate of the same kind that may be faster, but was only bounded or estimated, and not tried; the fastest of them.
    """

    candidate: Candidate
    more: float
    terms: tuple[tuple[str, float], ...]
    untried: Candidate | None


def split_terms(seconds: Seconds) -> dict[str, float]:
    """The parts of a step that are compared, by the keys of `TERMS`."""
    terms = {name: getattr(seconds, name) for name in TERMS if name != "compute"}
    return {"compute": seconds.forward + seconds.backward, **terms}


def group_candidates(plan: Plan) -> dict[str, list[Candidate]]:
    """The candidates by kind, the plan's kind first; in a kind the plan, then those that were found, the fastest first, then the others."""
    proof = plan.proof
    chosen = proof.candidates[proof.chosen]
    order = {kind: number for number, kind in enumerate(dict.fromkeys((chosen.kind, *KINDS)))}
    groups: dict[str, list[tuple[tuple[bool, int, float], Candidate]]] = {}
    for position, candidate in enumerate(proof.candidates):
        key = position != proof.chosen, _rank(candidate), candidate.step_seconds or 0.0
        groups.setdefault(candidate.kind, []).append((key, candidate))
    for group in groups.values():
        group.sort(key=lambda pair: pair[0])
    return {kind: [candidate for _, candidate in groups[kind]] for kind in sorted(groups, key=order.__getitem__)}


def _rank(candidate: Candidate) -> int:
    """What is known best comes first: found, bounded or estimated, nothing known."""
    if candidate.step_seconds is None:
        return 2
    return 0 if candidate.basis == "predicted" else 1


def find_runner_up(plan: Plan) -> RunnerUp | None:
    """The best candidate of another kind; None where none has a step. One that was found is better than one that was only estimated."""
    chosen, groups = plan.proof.candidates[plan.proof.chosen], group_candidates(plan)
    others = [
        candidates[0]
        for kind, candidates in groups.items()
        if kind not in (chosen.kind, "not solved") and candidates[0].step_seconds is not None
    ]
    if not others:
        return None
    best = min(others, key=lambda candidate: (_rank(candidate), candidate.step_seconds))
    assert best.step_seconds is not None
    terms: list[tuple[str, float]] = []
    if best.parts is not None:
        own = split_terms(plan.seconds)
        terms = sorted(((name, value - own[name]) for name, value in split_terms(best.parts).items()), key=lambda pair: -abs(pair[1]))
    faster = [
        candidate
        for candidate in groups[best.kind]
        if _rank(best) == 0 and _rank(candidate) == 1 and (candidate.step_seconds or 0.0) < best.step_seconds
    ]
    untried = min(faster, key=lambda candidate: candidate.step_seconds or 0.0, default=None)
    return RunnerUp(best, best.step_seconds - plan.seconds.step, tuple(terms), untried)


def format_step(candidate: Candidate) -> str:
    """The step of a candidate: ``≥`` before a lower bound, ``~`` before an estimate; a dash where nothing is known."""
    if candidate.step_seconds is None:
        return "-"
    return f"{_MARKS.get(candidate.basis, '')}{format_seconds(candidate.step_seconds)}"


def word_reasons(plan: Plan) -> list[str]:
    """Why this plan, in sentences: the runner-up of another kind, and kinds that don't fit the memory."""
    sentences = []
    runner_up = find_runner_up(plan)
    if runner_up is not None:
        sentences.append(_word_runner_up(plan, runner_up))
    for kind, candidates in group_candidates(plan).items():
        needed = [candidate.memory_bytes for candidate in candidates if candidate.memory_bytes is not None]
        if needed and all(candidate.step_seconds is None for candidate in candidates):
            usable = plan.memory.budget - plan.memory.reserved
            sentences.append(f"{_name_kind(kind)} doesn't fit: {format_bytes(min(needed))} at the least, {format_bytes(usable)} are there.")
    if not sentences:
        sentences.append("No candidate of another kind was solved or estimated.")
    return sentences


def _name_kind(kind: str) -> str:
    names = {"pipeline": "A pipeline", "nothing split": "Splitting nothing", "data parallel": "Data parallelism alone"}
    return names.get(kind, kind.replace("parallel", "parallelism").capitalize())


def _word_runner_up(plan: Plan, runner_up: RunnerUp) -> str:
    candidate, step = runner_up.candidate, plan.seconds.step
    schedule = candidate.outcome.partition(":")[0] if candidate.kind == "pipeline" and ":" in candidate.outcome else ""
    name = "" if candidate.name in ("search", "pipeline") else f"{candidate.name}, "
    where = ", ".join(filter(None, (f"{name}{candidate.mesh}", schedule if candidate.basis == "predicted" else "")))
    percent = 100 * runner_up.more / step if step > 0 else 0.0
    how = {"bound": "at least ", "estimate": "an estimated "}.get(candidate.basis, "")
    text = f"{_name_kind(candidate.kind)} ({where}) would take {how}{format_seconds(candidate.step_seconds or 0.0)}, {percent:+.1f}%"
    if terms := _word_terms(runner_up.terms, step):
        text += f": {terms}"
    elif not runner_up.terms:
        text += "; it was not solved, so the parts of its step aren't known"
    if runner_up.untried is not None:
        text += f". Others of that kind weren't tried, since they take {format_step(runner_up.untried)} at best ({runner_up.untried.mesh})"
    return f"{text}."


def _word_terms(terms: Sequence[tuple[str, float]], step: float) -> str:
    """The largest differences: ``3.00 ms more bubble, 1.00 ms less exposed communication``."""
    shown = [(name, seconds) for name, seconds in terms if abs(seconds) > _WORTH * step][:_TERMS_SHOWN]
    return ", ".join(f"{format_seconds(abs(seconds))} {'more' if seconds > 0 else 'less'} {TERMS[name]}" for name, seconds in shown)
