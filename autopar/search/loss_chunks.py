"""In how many parts a head and its cross entropy compute the logits: as pinned, or as memory needs it.

Comes in: a `Graph`, the pins, and a function that plans a graph. Goes out: the `Plan` for the graph with so many chunks.

Chunks save memory and cost time, as the backward computes the logits again. So they are tried where the logits matter: where no plan fits
without them, and where the best plan without them leaves little memory, so that it may have paid for it with something dearer
(recomputation, gathers of parameters, more micro-batches). The faster of the two plans is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from autopar.errors import InfeasibleError, InputError
from autopar.ir import Graph, format_mesh, with_pipeline
from autopar.plans import Candidate, Pins, Plan
from autopar.rules import ChunkedLoss, ChunkedLosses, chunk_losses, find_chunked_losses
from autopar.units import format_bytes

CHUNKS = (8, 64)
"""Numbers of chunks that the search tries, the next where the one before leaves no plan that fits."""

# The search tries chunks where the plan without them leaves less than this share of a device's memory free, and all ranks' logits in
# float32 are at least `_MATTERS` of the memory of all devices: below, they decide nothing.
_FREE = 0.2
_MATTERS = 0.02

Attempt = Callable[[Graph], Plan]
"""Plans a graph; raises InfeasibleError when nothing fits."""


def plan_with_chunks(graph: Graph, pins: Pins, first_plan: Plan | None, memory_nbytes: int, attempt: Attempt) -> Plan:
    """The plan of a graph, with its losses in as many chunks as the pins say or as memory needs.

    Args:
        graph: as captured.
        pins: whose `loss_chunks` is obeyed; one that can't be had is refused.
        first_plan: the plan that the parameters are stored by; its chunks are taken where this graph has a loss that can be computed so.
        memory_nbytes: of all devices together.
        attempt: plans a graph.

    Raises InputError for pinned chunks without a loss that can be computed so, InfeasibleError when nothing fits.
    """
    losses = find_chunked_losses(graph)
    if pins.loss_chunks not in (None, 1) and not losses.found:
        raise InputError(
            f"pin loss_chunks={pins.loss_chunks}: no loss of the model can be computed in chunks: "
            f"{'; '.join(losses.reasons) or 'it computes no cross entropy'}"
        )
    planned = 1 if first_plan is None else first_plan.loss_chunks
    chunks = pins.loss_chunks or (planned if planned > 1 and losses.found else None)
    if chunks is not None and chunks > 1:
        return _attempt(graph, losses.found, chunks, attempt)
    try:
        whole = attempt(graph)
    except InfeasibleError as error:
        if chunks == 1 or not losses.found:
            raise _explain(error, losses) from None
        return _first_that_fits(graph, losses.found, attempt)
    matters = losses.logits_nbytes >= _MATTERS * memory_nbytes
    if losses.found and chunks is None and matters and whole.memory.total > (1 - _FREE) * whole.memory.budget:
        try:
            chunked = _attempt(graph, losses.found, CHUNKS[0], attempt)
        except InfeasibleError:  # a search that was cut short
            return whole
        fast, slow = sorted((whole, chunked), key=lambda plan: plan.seconds.step)
        return replace(fast, proof=replace(fast.proof, candidates=(*fast.proof.candidates, _as_candidate(slow))))
    if losses.reasons and chunks is None and matters:
        note = f"the logits stay in memory whole, up to {format_bytes(losses.logits_nbytes)} over all ranks: {'; '.join(losses.reasons)}"
        return replace(whole, notes=(*whole.notes, note))
    return whole


def _as_candidate(plan: Plan) -> Candidate:
    """A plan that isn't taken, as one of the candidates of the plan that is."""
    name = "logits whole" if plan.loss_chunks == 1 else f"logits in {plan.loss_chunks} chunks"
    mesh, chosen = format_mesh(with_pipeline(plan.mesh, plan.pipeline.ranks)), plan.proof.candidates[plan.proof.chosen]
    needed = plan.memory.total - plan.memory.reserved
    outcome = "slower than what was chosen"
    return Candidate(name, mesh, plan.seconds.step, needed, outcome, chosen.kind, plan.seconds, free_mesh=chosen.free_mesh)


def _attempt(graph: Graph, losses: Sequence[ChunkedLoss], chunks: int, attempt: Attempt) -> Plan:
    return replace(attempt(chunk_losses(graph, losses, chunks)), loss_chunks=chunks)


def _first_that_fits(graph: Graph, losses: Sequence[ChunkedLoss], attempt: Attempt) -> Plan:
    """The plan with the least number of chunks that fits. Raises InfeasibleError with the numbers of the last try."""
    for chunks in CHUNKS[:-1]:
        try:
            return _attempt(graph, losses, chunks, attempt)
        except InfeasibleError:
            continue
    return _attempt(graph, losses, CHUNKS[-1], attempt)


def _explain(error: InfeasibleError, losses: ChunkedLosses) -> InfeasibleError:
    """The error, with what keeps a loss from being computed in chunks."""
    if not losses.reasons:
        return error
    told = InfeasibleError(
        f"{error}. The logits take up to {format_bytes(losses.logits_nbytes)} over all ranks, and can't be computed in chunks:"
        f" {'; '.join(losses.reasons)}"
    )
    told.needed = error.needed
    return told
