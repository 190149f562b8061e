"""Captured graph + plan -> the local program of a rank, with explicit collectives that name mesh axes.

Without a pipeline that is one module; else one module per stage, for a micro-batch, and the schedule that says when each runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set

import torch
from torch import fx, nn

from autopar.capture import Captured
from autopar.errors import PlanError
from autopar.ir import MICROBATCH, PIPELINE, Graph, OpKind, Space, Split, Tensor, Value, fits, is_legal
from autopar.plans import Pipeline, Plan, check_fits
from autopar.rewrite.outline import Region, outline
from autopar.rewrite.program import PipelineProgram, Program, Slot, StageOutput, StageProgram
from autopar.rewrite.rewriter import Rewriter
from autopar.rewrite.stages import Stage, edges_of, partition
from autopar.rules import facts_of, find_spaces
from autopar.schedules import Kind, StageEdge, add_messages, forward_only, make_schedule
from autopar.structure import (
    Chain,
    Folded,
    MicroSplit,
    find_chain,
    find_cores,
    find_factors,
    fold,
    fold_as_planned,
    split_microbatches,
)


def rewrite(captured: Captured, plan: Plan, device: torch.device | None = None, group: int | None = None) -> Program:
    """Carry out `plan` on `captured`; new tensors that the program makes are made on `device`.

    Under a pipeline, `group` says of which group of ranks the stages are wanted (all when None).

    Raises PlanError when the plan was made for another graph.
    """
    check_fits(plan, captured.graph)
    folded = fold(captured.graph)
    spaces, _ = find_spaces(captured.graph)
    chain = find_chain(folded, spaces)
    folded = fold_as_planned(folded, {*plan.placements, *plan.layouts})
    _check_decisions(plan, folded, spaces)
    if plan.pipeline.is_trivial and plan.pipeline.keeps_all:
        work = Rewriter(captured, plan, folded, spaces, device)
        return work.program(outline(work.run(), _layers_of(folded)))
    return _rewrite_stages(captured, plan, folded, chain, spaces, device, group)


def _check_decisions(plan: Plan, folded: Folded, spaces: Mapping[str, Space]) -> None:
    """Raise PlanError where the plan, a file that anyone may have edited, decides too little or what can't be."""
    mesh = plan.mesh
    if taken := {MICROBATCH, PIPELINE} & set(mesh.names):
        raise PlanError(f"plan.mesh has an axis {taken.pop()!r}, which is no axis of a group of ranks; plan again")
    tensors: dict[str, Tensor] = {}
    for op in folded.ops:
        if op.kind is OpKind.CALL:
            placement, space = plan.placements.get(op.name), spaces.get(op.name)
            if placement is None:
                raise PlanError(f"plan.placements has nothing for {op.name} ({op.target} at {op.source or op.layer}); plan again")
            loops = {part.loop for part in placement if isinstance(part, Split)}
            known = set() if space is None else set(space.loops)
            if len(placement) != len(mesh.sizes) or loops - known or (space is not None and not is_legal(space, placement, mesh)):
                raise PlanError(
                    f"plan.placements[{op.name!r}] is no way to split {op.target} at {op.source or op.layer} over the mesh {mesh}"
                    f" (it has {space or 'no rule and runs whole'}); plan again"
                )
        elif op.kind is not OpKind.OUTPUT:
            tensors[op.name] = op.results[0]
    for name, tensor in tensors.items():
        layout = plan.layouts.get(name)
        if layout is None:
            raise PlanError(f"plan.layouts has nothing for {name!r}; plan again")
        if len(layout) != len(mesh.sizes) or not fits(tensor.shape, layout, mesh):
            raise PlanError(f"plan.layouts[{name!r}] doesn't fit {tensor} on the mesh {mesh}; plan again")
    operands = folded.graph.output.operands
    if len(plan.outputs) != len(operands):
        raise PlanError(f"plan.outputs has {len(plan.outputs)} layouts, the model has {len(operands)} outputs; plan again")
    for position, (value, layout) in enumerate(zip(operands, plan.outputs, strict=True)):
        if len(layout) != len(mesh.sizes) or not fits(folded.graph.tensor(value).shape, layout, mesh):
            raise PlanError(f"plan.outputs[{position}] doesn't fit {folded.graph.tensor(value)} on the mesh {mesh}; plan again")
    for name, layout in plan.pipeline.travel.items():
        maker, _, index = name.partition(".")
        found = folded.graph.by_name.get(maker)
        number = int(index) if index.isdecimal() else 0
        if found is None or number >= len(found.results) or not fits(found.results[number].shape, layout, mesh):
            raise PlanError(f"plan.pipeline.travel[{name!r}] doesn't fit the mesh {mesh} or names nothing of the model; plan again")


def _rewrite_stages(
    captured: Captured,
    plan: Plan,
    folded: Folded,
    chain: Chain,
    spaces: Mapping[str, Space],
    device: torch.device | None,
    group: int | None,
) -> Program:
    pipeline = plan.pipeline
    names = [block.name for block in pipeline.blocks]
    if names != [block.name for block in chain.blocks]:
        raise PlanError(f"the plan's blocks are {', '.join(names)}; the model has {', '.join(block.name for block in chain.blocks)}")
    stages = partition(captured.graph, chain, [block.stage for block in pipeline.blocks])
    regions = _recomputed_regions(captured.graph, spaces, chain, pipeline)
    if pipeline.is_trivial:
        work = Rewriter(captured, plan, folded, spaces, device)
        module, _ = work.run_stage(stages[0])
        return work.program(_outline_stage(module, regions, folded))
    micro = split_microbatches(captured.graph, spaces, find_factors(captured.graph, spaces), pipeline.microbatches)
    if micro.reasons:
        raise PlanError(f"the plan has {pipeline.microbatches} micro-batches, but {'; '.join(micro.reasons)}")
    edges = edges_of(captured.graph, stages)
    schedule = add_messages(make_schedule(pipeline.schedule, pipeline.ranks, pipeline.microbatches, pipeline.chunks), edges)
    split = {action.stage for actions in schedule.actions for action in actions if action.kind is Kind.INPUT}
    work = Rewriter(captured, plan, folded, spaces, device, micro)
    stages = tuple(_with_prologue(captured.graph, stage, work.find_ancestors(work.find_wholes(stage))) for stage in stages)
    programs: dict[int, StageProgram] = {}
    for number, stage in enumerate(stages):
        if group is None or schedule.rank_of[number] == group:
            programs[number] = _stage_program(captured, plan, folded, spaces, device, stage, micro, number in split, regions)
    program = work.program(nn.ModuleDict({f"stage {number}": one.module for number, one in programs.items()}))
    users: dict[str, list[int]] = {}
    for number, stage in enumerate(stages):
        for name in stage.stored:
            users.setdefault(captured.graph.by_name[name].target, []).append(schedule.rank_of[number])
    written = _find_written(captured.graph, spaces)
    for name in sorted(written):
        if len(groups := sorted(set(users.get(name, ())))) > 1:
            raise PlanError(
                f"buffer {name} is written to on pipeline groups {', '.join(map(str, groups))}, each with a copy of its own; "
                "pin what uses it to one stage"
            )
    last = schedule.rank_of[-1]
    makers = {position: schedule.rank_of[number] for number, stage in enumerate(stages) for position in stage.outputs}
    return dataclasses.replace(
        program,
        parameters=tuple(_used_by(slot, users.get(slot.name, [last])) for slot in program.parameters),
        buffers=tuple(_used_by(slot, users.get(slot.name, [last])) for slot in program.buffers),
        outputs=tuple(_used_by(slot, [makers[position]]) for position, slot in enumerate(program.outputs)),
        regather=any(_gathers(one.module) for one in programs.values()),
        pipeline=PipelineProgram(
            stages=programs,
            schedule=schedule,
            inference=add_messages(
                forward_only(schedule.rank_of, pipeline.microbatches), [StageEdge(edge.producer, edge.consumer, False) for edge in edges]
            ),
            loss=captured.graph.loss,
            trained=_find_trained(captured.graph),
            reached=_find_reached(captured.graph),
            written=written,
            makers=makers,
            random=any(space.random for space in spaces.values()),
        ),
    )


def _with_prologue(graph: Graph, stage: Stage, ancestors: Set[str]) -> Stage:
    """The stage with the buffers that its prologue reads."""
    read = {op.name for op in graph.of_kind(OpKind.BUFFER) if op.name in ancestors}
    return dataclasses.replace(stage, stored=tuple(op.name for op in graph.ops if op.name in read or op.name in stage.stored))


def _used_by(slot: Slot, groups: Sequence[int]) -> Slot:
    return dataclasses.replace(slot, groups=tuple(dict.fromkeys(groups)))


def _find_trained(graph: Graph) -> frozenset[str]:
    """Parameters that get a gradient from the loss, or from any output when the loss is computed outside."""
    loss = graph.loss
    return frozenset().union(*(names for i, names in _find_reached(graph).items() if loss in (i, None)))


def _find_reached(graph: Graph) -> dict[int, frozenset[str]]:
    """Per output of the user's, the parameters that get a gradient from it."""
    (output,) = graph.of_kind(OpKind.OUTPUT)
    returned = len(output.operands) - len(output.kwargs.get("updates", ()))
    return {i: _parameters_before(graph, value) for i, value in enumerate(output.operands[:returned])}


def _parameters_before(graph: Graph, value: Value) -> frozenset[str]:
    waiting = [value]
    reached: set[str] = set()
    while waiting:
        value = waiting.pop()
        if value.op not in reached and graph.tensor(value).requires_grad:
            reached.add(value.op)
            waiting += graph.by_name[value.op].operands
    return frozenset(op.target for op in graph.of_kind(OpKind.PARAMETER) if op.name in reached)


def _find_written(graph: Graph, spaces: Mapping[str, Space]) -> frozenset[str]:
    """Buffers that ops write to: the running statistics of a batch norm that trains."""
    names = {op.operands[index].op for op in graph.of_kind(OpKind.CALL) for index in facts_of(op, spaces.get(op.name)).writes}
    return frozenset(op.target for op in graph.of_kind(OpKind.BUFFER) if op.name in names)


def _stage_program(
    captured: Captured,
    plan: Plan,
    folded: Folded,
    spaces: Mapping[str, Space],
    device: torch.device | None,
    stage: Stage,
    micro: MicroSplit,
    splits_backward: bool,
    regions: Mapping[str, Region],
) -> StageProgram:
    graph = captured.graph
    work = Rewriter(captured, plan, folded, spaces, device, micro, splits_backward)
    module, results = work.run_stage(stage)
    wholes = work.wholes
    prologue = None
    if wholes:
        prologue = Rewriter(captured, plan, folded, spaces, device).run_prologue(stage, wholes)
    outlined = _outline_stage(module, regions, folded)
    receives = {start: tuple(work.boundary(value) for value in values) for start, values in stage.receives.items()}
    sends = {end: tuple((results.index(value), work.boundary(value)) for value in values) for end, values in stage.sends.items()}
    crossing = len(results)
    outputs = tuple(
        StageOutput(position, crossing + number, work.in_time(work.output_layout(position)))
        for number, position in enumerate(stage.outputs)
    )
    order = {kind: [op.name for op in graph.of_kind(kind)] for kind in (OpKind.PARAMETER, OpKind.BUFFER)}
    return StageProgram(
        module=outlined,
        prologue=prologue,
        parameters=tuple(order[OpKind.PARAMETER].index(name) for name in stage.stored if name in order[OpKind.PARAMETER]),
        buffers=tuple(order[OpKind.BUFFER].index(name) for name in stage.stored if name in order[OpKind.BUFFER]),
        receives=receives,
        sends=sends,
        outputs=outputs,
    )


def _gathers(module: nn.Module) -> bool:
    graphs = [one.graph for one in module.modules() if isinstance(one, fx.GraphModule)]
    return any(node.kwargs.get("save") is False for graph in graphs for node in graph.nodes)


def _layers_of(folded: Folded) -> dict[str, Region]:
    """Per op of a repeated layer, the layer that it belongs to."""
    return {
        name: Region(path, layer.name)
        for layer in folded.classes
        for path, instance in zip(layer.paths, layer.instances, strict=True)
        for name in instance
    }


def _recomputed_regions(graph: Graph, spaces: Mapping[str, Space], chain: Chain, pipeline: Pipeline) -> dict[str, Region]:
    """Per op that the backward runs again, the region that is run again as one."""
    regions: dict[str, Region] = {}
    for block, choice in zip(chain.blocks, pipeline.blocks, strict=True):
        if choice.recompute == "full":
            regions.update({name: Region(block.name, "layer", recomputed=True) for name in block.ops})
        elif choice.recompute == "selective":
            for number, core in enumerate(find_cores(graph, spaces, block.ops)):
                regions.update({name: Region(f"{block.name}.attention.{number}", "attention_core", recomputed=True) for name in core})
    return regions


def _outline_stage(module: fx.GraphModule, regions: Mapping[str, Region], folded: Folded) -> fx.GraphModule:
    return outline(outline(module, regions), _layers_of(folded))
