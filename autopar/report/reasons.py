"""Why a plan was chosen: the best candidate of another kind, what it would take, and which part of the step makes the difference.

Comes in: the candidates of a plan's proof. Goes out: what comes closest, and sentences. Only differences of its numbers are computed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from autopar.ir import format_sizes
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

# Names of candidates that aren't baselines.
_SEARCHED = ("search", "pipeline", "micro-batches", "recomputation")

# Axes and micro-batches in the text of a candidate's mesh, ``pp=4 x dp=2, 4 micro-batches``.
_AXIS = re.compile(r"(\w+)=([0-9]+)")
_PARTS = re.compile(r"([0-9]+) micro-batch")

_MARKS = {"bound": "≥ ", "estimate": "~"}


@dataclass(frozen=True, slots=True)
class RunnerUp:
    """The best candidate of another kind than the plan's.

    Attributes:
        candidate: it has `step_seconds`.
        more: seconds that its step takes more than the plan's; a bound or an estimate if those are.
        terms: per part of the step seconds more than in the plan, the largest difference first; empty where its parts aren't known.
    """

    candidate: Candidate
    more: float
    terms: tuple[tuple[str, float], ...]


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
    return RunnerUp(best, best.step_seconds - plan.seconds.step, tuple(terms))


def find_untried(plan: Plan) -> Candidate | None:
    """What comes closest to the plan of all that was only bounded or estimated and is of another kind; else of what wasn't solved.

    None where a plan of another kind was found that takes no longer than any of these.
    """
    chosen, runner_up = plan.proof.candidates[plan.proof.chosen], find_runner_up(plan)
    found_s = math.inf
    if runner_up is not None and _rank(runner_up.candidate) == 0:
        found_s = runner_up.candidate.step_seconds or 0.0
    untried = [
        (candidate.kind == "not solved", candidate.step_seconds or 0.0, position, candidate)
        for position, candidate in enumerate(plan.proof.candidates)
        if candidate.kind != chosen.kind and _rank(candidate) == 1 and (candidate.step_seconds or 0.0) < found_s
    ]
    return min(untried, key=lambda ranked: ranked[:3])[3] if untried else None


def format_step(candidate: Candidate) -> str:
    """The step of a candidate: ``≥`` before a lower bound, ``~`` before an estimate; a dash where nothing is known."""
    if candidate.step_seconds is None:
        return "-"
    return f"{_MARKS.get(candidate.basis, '')}{format_seconds(candidate.step_seconds)}"


def word_reasons(plan: Plan) -> list[str]:
    """Why this plan, in sentences: what comes closest, found or not, and kinds that don't fit the memory."""
    sentences = []
    untried, runner_up = find_untried(plan), find_runner_up(plan)
    if untried is not None:
        sentences.append(_word_untried(plan, untried))
    if runner_up is not None and _rank(runner_up.candidate) == 0:
        text = _word_runner_up(plan, runner_up)
        sentences.append(_capitalize(text) if untried is None else f"The best found: {text}")
    for kind, candidates in group_candidates(plan).items():
        needed = [candidate.memory_bytes for candidate in candidates if candidate.memory_bytes is not None]
        if needed and all(candidate.step_seconds is None for candidate in candidates):
            usable = plan.memory.budget - plan.memory.reserved
            sentences.append(
                f"{_capitalize(_name_kind(kind))} doesn't fit: {format_bytes(min(needed))} at the least, {format_bytes(usable)} are there."
            )
    if not sentences:
        sentences.append("No candidate of another kind was solved or estimated.")
    return sentences


def _capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def is_baseline(candidate: Candidate) -> bool:
    """Whether a candidate is a known way of splitting, such as Megatron: its bound is of that way, not of all plans of its kind."""
    return candidate.name not in _SEARCHED


def _name_kind(kind: str) -> str:
    names = {"pipeline": "a pipeline", "nothing split": "splitting nothing", "data parallel": "data parallelism alone"}
    names["not solved"] = "a mesh of free axes"
    return names.get(kind, kind.replace("parallel", "parallelism"))


def _name_candidate(candidate: Candidate) -> str:
    """A candidate in words: its kind, how it is split if that is a baseline, its mesh, and of a pipeline that was found the schedule."""
    schedule, _, outcome = candidate.outcome.partition(": ")
    details = [candidate.mesh]
    if is_baseline(candidate):
        details.insert(0, f"as the baseline {candidate.name}")
    elif candidate.name == "recomputation":
        details.insert(0, candidate.name)
    if candidate.kind == "pipeline" and candidate.basis == "predicted" and outcome:
        details += [schedule, *(["a greedy assignment"] if "not searched" in outcome else [])]
    return f"{_name_kind(candidate.kind)} ({', '.join(details)})"


def _word_untried(plan: Plan, candidate: Candidate) -> str:
    """What was only bounded or estimated: ``Closest of another kind: a pipeline (pp=8, ...), an estimated 209 ms (+0.2%) ...``."""
    step, seconds = plan.seconds.step, candidate.step_seconds or 0.0
    percent = f" ({100 * (seconds - step) / step:+.1f}%)" if step > 0 else ""
    what = "what wasn't solved" if candidate.kind == "not solved" else "another kind"
    # A bound is of the search's costs, below which a plan's own can be (`docs/search.md`, fan-outs).
    how, costs = ("at least", " by the search's costs,") if candidate.basis == "bound" else ("an estimated", "")
    text = f"Closest of {what}: {_name_candidate(candidate)}, {how} {format_seconds(seconds)}{percent}{costs} and not searched further"
    if request := _word_request(candidate):
        text += f"; {request} plans {'its mesh' if is_baseline(candidate) else 'it'}"
    return f"{text}."


def _word_request(candidate: Candidate) -> str:
    """The option that plans a candidate of these axes and micro-batches; empty where none does."""
    sizes = dict(_AXIS.findall(candidate.mesh))
    parts = _PARTS.search(candidate.mesh)
    kinds = {name: size for name, size in sizes.items() if name in ("pp", "dp", "cp", "tp")}
    # What is left over of the ranks is a free axis, which needs no pin.
    if sizes.keys() - kinds.keys() - {"free"}:
        return "" if kinds or parts else f"`autopar plan` with --mesh {format_sizes(sizes)}"
    pins = [f"{name}={size}" for name, size in kinds.items()] + ([f"microbatches={parts[1]}"] if parts else [])
    return f'--why-not "{",".join(pins)}"' if pins else ""


def _word_runner_up(plan: Plan, runner_up: RunnerUp) -> str:
    """What was found, and the parts of its step that make the difference."""
    candidate, step = runner_up.candidate, plan.seconds.step
    percent = 100 * runner_up.more / step if step > 0 else 0.0
    text = f"{_name_candidate(candidate)} would take {format_seconds(candidate.step_seconds or 0.0)}, {percent:+.1f}%"
    if terms := _word_terms(runner_up.terms, step):
        text += f": {terms}"
    return f"{text}."


def _word_terms(terms: Sequence[tuple[str, float]], step: float) -> str:
    """The largest differences: ``3.00 ms more bubble, 1.00 ms less exposed communication``."""
    shown = [(name, seconds) for name, seconds in terms if abs(seconds) > _WORTH * step][:_TERMS_SHOWN]
    return ", ".join(f"{format_seconds(abs(seconds))} {'more' if seconds > 0 else 'less'} {TERMS[name]}" for name, seconds in shown)
