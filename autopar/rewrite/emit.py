"""Captured graph and plan to the program that each rank runs, with explicit collectives that name mesh axes.

Comes in: `Captured` and a `Plan`. Goes out: a `Program`. Without stages and micro-batches that is one module for the whole model; else
`autopar.rewrite.pipeline` makes one per stage.
"""

from __future__ import annotations

import torch

from autopar.capture import Captured
from autopar.errors import PlanError
from autopar.ir import OpKind
from autopar.plans import Pipeline, Plan, check_fits
from autopar.rewrite.chunked_loss import chunk_captured
from autopar.rewrite.graphs import build_whole
from autopar.rewrite.halves import build_halves
from autopar.rewrite.outline import outline
from autopar.rewrite.pipeline import rewrite_pipeline
from autopar.rewrite.planned import PlannedGraph, read_plan, stored_layout, with_microbatches
from autopar.rewrite.prefetch import begin_gathers_ahead, gather_wholes
from autopar.rewrite.program import Program
from autopar.rewrite.regions import find_layers, find_recomputed
from autopar.rewrite.slots import make_program
from autopar.rewrite.stages import partition
from autopar.rules import find_spaces
from autopar.structure import Chain, find_chain, fold
from autopar.texts import printable


def rewrite(captured: Captured, plan: Plan, device: torch.device | None = None, pipeline_rank: int | None = None) -> Program:
    """Carry out `plan` on `captured`.

    Args:
        captured: the model; it isn't changed.
        plan: made for this model and inputs of these sizes.
        device: where the program makes new tensors; None leaves it to each call.
        pipeline_rank: under a pipeline, the pipeline rank whose stages are made; None makes those of all.

    Raises:
        PlanError: the plan was made for another graph, or was edited and can't be carried out.
        InputError: an op that the backward shall run again draws random numbers in a way that can't be repeated.
    """
    check_fits(plan, captured.graph)
    captured = chunk_captured(captured, plan.loss_chunks)
    folded = fold(captured.graph)
    spaces, _ = find_spaces(captured.graph)
    planned = read_plan(captured, plan, folded, spaces, device)
    chain = find_chain(folded, spaces)
    if not plan.pipeline.is_trivial or not plan.pipeline.keeps_all:
        _check_blocks(plan.pipeline, chain)
    return _rewrite_whole(planned, chain) if plan.pipeline.is_trivial else rewrite_pipeline(planned, chain, pipeline_rank)


def _rewrite_whole(planned: PlannedGraph, chain: Chain) -> Program:
    """Carry out a plan without stages and micro-batches."""
    graph, pipeline = planned.graph, planned.plan.pipeline
    if planned.plan.half_batches:
        planned = with_microbatches(planned)
        module = build_halves(planned, chain)
    elif pipeline.keeps_all:
        module = build_whole(planned, [op.name for op in graph.of_kind(OpKind.CALL)])
    else:
        # What is run again as one must stand in one piece, so the calls run block by block.
        (stage,) = partition(graph, chain, [block.stage for block in pipeline.blocks])
        module = build_whole(planned, stage.calls)
    begin_gathers_ahead(module, chain, planned.plan.prefetch)
    held = [op.name for op in graph.of_kind(OpKind.PARAMETER) if any(state.level for state in stored_layout(planned, op))]
    gather_wholes(module, held, chain, planned.plan.prefetch)
    if not pipeline.keeps_all:
        module = outline(module, find_recomputed(graph, planned.spaces, chain, pipeline))
    return make_program(planned, outline(module, find_layers(planned.folded)))


def _check_blocks(pipeline: Pipeline, chain: Chain) -> None:
    planned, names = [block.name for block in pipeline.blocks], [printable(block.name) for block in chain.blocks]
    if planned != names:
        raise PlanError(f"the plan's blocks are {', '.join(planned)}; the model has {', '.join(names)}")
