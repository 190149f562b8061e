"""The program of a pipeline: a graph per stage for one micro-batch, and the schedule that says when each runs.

Comes in: a `PlannedGraph` and its chain of blocks. Goes out: a `Program` with a `PipelineProgram`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from autopar.errors import PlanError
from autopar.ir import Graph, OpKind, Space, Value
from autopar.rewrite.graphs import build_prologue, build_stage
from autopar.rewrite.outline import outline
from autopar.rewrite.planned import PlannedGraph, with_microbatches
from autopar.rewrite.prefetch import begin_gathers_ahead
from autopar.rewrite.program import PipelineProgram, Program, StageProgram
from autopar.rewrite.regions import Region, find_layers, find_recomputed
from autopar.rewrite.slots import find_stage_outputs, make_crossing, make_program
from autopar.rewrite.stages import Stage, edges_of, partition
from autopar.rewrite.whole_batch import find_batch_values, with_prologue
from autopar.rules import facts_of, is_random
from autopar.schedules import Kind, Schedule, StageEdge, add_messages, forward_only, make_schedule
from autopar.structure import Chain


def rewrite_pipeline(planned: PlannedGraph, chain: Chain, pipeline_rank: int | None) -> Program:
    """Carry out a plan that has several stages or micro-batches.

    Before, a plan of two stages and four micro-batches, and the calls of the graph::

        blocks: layers.0 on stage 0, layers.1 on stage 1
        h = layer_0(x)
        loss = layer_1(h, labels)

    After, a program per stage, and the schedule::

        stage 0:  module(x, labels) -> (h,)          sends {1: h}
        stage 1:  module(x, labels, h) -> (loss,)    receives {0: h}, outputs (loss,)
        0F0 0SF0>1 0F1 ...

    Args:
        planned: with neither stages nor micro-batches yet.
        chain: the blocks of its graph, as many as the plan has.
        pipeline_rank: the pipeline rank whose stages are made; None makes those of all.

    Raises:
        PlanError: the batch can't be split into the plan's micro-batches, or stages of several pipeline ranks write to one buffer.
    """
    pipeline = planned.plan.pipeline
    planned = with_microbatches(planned)
    graph = planned.graph
    stages = partition(graph, chain, [block.stage for block in pipeline.blocks])
    edges = edges_of(graph, stages)
    stages = tuple(with_prologue(planned, stage) for stage in stages)
    schedule = add_messages(make_schedule(pipeline.schedule, pipeline.ranks, pipeline.microbatches, pipeline.chunks), edges)
    inference = forward_only(schedule.rank_of, pipeline.microbatches)
    written = _find_written(graph, planned.spaces)
    users = _find_users(graph, stages, schedule)
    _check_written(written, users)
    programs = _make_stages(planned, chain, stages, schedule, pipeline_rank)
    makers = {position: schedule.rank_of[number] for number, stage in enumerate(stages) for position in stage.outputs}
    program = make_program(planned, nn.ModuleDict({f"stage {number}": stage.module for number, stage in programs.items()}))
    # What no stage uses belongs to the last.
    users = {slot.name: users.get(slot.name, (schedule.rank_of[-1],)) for slot in (*program.parameters, *program.buffers)}
    return replace(
        program,
        parameters=tuple(replace(slot, users=users[slot.name]) for slot in program.parameters),
        buffers=tuple(replace(slot, users=users[slot.name]) for slot in program.buffers),
        outputs=tuple(replace(slot, users=(makers[position],)) for position, slot in enumerate(program.outputs)),
        pipeline=PipelineProgram(
            stages=programs,
            schedule=schedule,
            inference=add_messages(inference, [StageEdge(edge.producer, edge.consumer, False) for edge in edges]),
            loss=graph.loss,
            trained=_find_trained(graph),
            reached=_find_reached(graph),
            written=written,
            makers=makers,
            random=any(is_random(op, planned.spaces.get(op.name)) for op in planned.graph.of_kind(OpKind.CALL)),
            float16=any(tensor.dtype == "float16" for op in planned.graph.ops for tensor in op.results),
        ),
    )


def _make_stages(
    planned: PlannedGraph, chain: Chain, stages: Sequence[Stage], schedule: Schedule, pipeline_rank: int | None
) -> dict[int, StageProgram]:
    """The programs of the stages of one pipeline rank, or of all, by number."""
    recomputed = find_recomputed(planned.graph, planned.spaces, chain, planned.plan.pipeline)
    split = {action.stage for actions in schedule.actions for action in actions if action.kind is Kind.BACKWARD_INPUT}
    return {
        number: _make_stage(planned, chain, stage, recomputed, splits_backward=number in split)
        for number, stage in enumerate(stages)
        if pipeline_rank is None or schedule.rank_of[number] == pipeline_rank
    }


def _make_stage(
    planned: PlannedGraph, chain: Chain, stage: Stage, recomputed: Mapping[str, Region], *, splits_backward: bool
) -> StageProgram:
    graph = planned.graph
    batch_values = find_batch_values(planned, stage)
    module = build_stage(planned, stage, batch_values, splits_backward=splits_backward)
    begin_gathers_ahead(module, chain, planned.plan.prefetch)
    return StageProgram(
        module=outline(outline(module, recomputed), find_layers(planned.folded)),
        prologue=build_prologue(planned, stage, batch_values) if batch_values else None,
        parameters=tuple(number for number, op in enumerate(graph.of_kind(OpKind.PARAMETER)) if op.name in stage.stored),
        buffers=tuple(number for number, op in enumerate(graph.of_kind(OpKind.BUFFER)) if op.name in stage.stored),
        receives={producer: tuple(make_crossing(planned, value) for value in values) for producer, values in stage.receives.items()},
        sends={
            consumer: tuple((stage.sent.index(value), make_crossing(planned, value)) for value in values)
            for consumer, values in stage.sends.items()
        },
        outputs=find_stage_outputs(planned, stage),
    )


def _find_users(graph: Graph, stages: Sequence[Stage], schedule: Schedule) -> dict[str, tuple[int, ...]]:
    """The user's name of a parameter or buffer -> the pipeline ranks whose stages read it, in order of the stages: the first owns it.

    The costs count its optimizer state there too (`ChainReads.first_block`).
    """
    users: dict[str, dict[int, None]] = defaultdict(dict)
    for number, stage in enumerate(stages):
        for name in stage.stored:
            users[graph.by_name[name].target][schedule.rank_of[number]] = None
    return {name: tuple(pipeline_ranks) for name, pipeline_ranks in users.items()}


def _check_written(written: frozenset[str], users: Mapping[str, Sequence[int]]) -> None:
    """Raise PlanError when several pipeline ranks write to one buffer."""
    for name in sorted(written):
        if len(pipeline_ranks := sorted(users.get(name, ()))) > 1:
            raise PlanError(
                f"buffer {name} is written to on pipeline ranks {', '.join(map(str, pipeline_ranks))}, each with a copy of its own; "
                "pin what uses it to one stage"
            )


# Facts of the graph that the runtime of a pipeline asks for.


def _find_trained(graph: Graph) -> frozenset[str]:
    """Parameters that get a gradient from the loss, or from any output when the loss is computed outside."""
    loss = graph.loss
    return frozenset().union(*(names for position, names in _find_reached(graph).items() if loss in (position, None)))


def _find_reached(graph: Graph) -> dict[int, frozenset[str]]:
    """Position of each of the user's outputs -> the parameters that get a gradient from it."""
    return {position: _find_parameters_behind(graph, value) for position, value in enumerate(graph.returned)}


def _find_parameters_behind(graph: Graph, value: Value) -> frozenset[str]:
    """Names of the parameters that `value` is computed from in a way that has a gradient."""
    pending = [value]
    reached: set[str] = set()
    while pending:
        value = pending.pop()
        if value.op not in reached and graph.tensor(value).requires_grad:
            reached.add(value.op)
            pending += graph.by_name[value.op].operands
    return frozenset(op.target for op in graph.of_kind(OpKind.PARAMETER) if op.name in reached)


def _find_written(graph: Graph, spaces: Mapping[str, Space]) -> frozenset[str]:
    """Buffers that ops write to: the running statistics of a batch norm that trains."""
    names = {op.operands[index].op for op in graph.of_kind(OpKind.CALL) for index in facts_of(op, spaces.get(op.name)).writes}
    return frozenset(op.target for op in graph.of_kind(OpKind.BUFFER) if op.name in names)
