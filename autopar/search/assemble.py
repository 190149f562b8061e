"""Choices -> Plan: names the axes after what they do, and adds up the search's own numbers for the report."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autopar.cost_models import Cluster
from autopar.costs import (
    BUCKET_NBYTES,
    COLLECTIVE_KIND,
    OPTIMIZER_COPIES,
    CostTables,
    count_kept,
    count_uses,
    local_nbytes,
    operand_layout_of,
    result_layout_of,
)
from autopar.ir import MICRO, PIPELINE, Collective, Layout, Mesh, Op, OpKind, Placement, Split, StateKind, Value
from autopar.plans import Candidate, Group, Memory, Pipeline, Plan, Proof, Seconds, Traffic, Unruled, printable
from autopar.search.pipeline import Assignment, BlockOption, BlockOptions, Choices
from autopar.search.placement import Solution, kept_nbytes
from autopar.structure import Block, Chain, Model, Role, first_rank_axis, role_of

KIND_OF_ROLE = {Role.BATCH: "dp", Role.SEQUENCE: "cp", Role.FEATURE: "tp", Role.INNER: "tp"}


@dataclass(frozen=True, slots=True)
class Move:
    """One journey of a tensor in the chosen plan, for `count` edges; one `to_output` has no way back."""

    value: Value
    consumer: str
    start: Layout
    need: Layout
    count: int
    to_output: bool


@dataclass(frozen=True)
class Spread:
    """What came of spreading blocks over stages: the choice, and what it was made from."""

    assignment: Assignment
    menus: tuple[BlockOptions, ...]
    chain: Chain
    rank_of: tuple[int, ...]
    recompute_seconds: float

    def chosen(self) -> Iterator[tuple[Block, int, BlockOption]]:
        """Per block its rank and its variant."""
        for block, menu, stage, variant in zip(self.chain.blocks, self.menus, self.assignment.stages, self.assignment.options, strict=True):
            yield block, self.rank_of[stage], menu.options[variant]


@dataclass(frozen=True)
class Chosen:
    """What the search decided; with micro-batches, `mesh` and `choices` have time as their first axis.

    `spread` is None without a pipeline, micro-batches and recomputation; `workspace` counts only then.
    """

    model: Model
    mesh: Mesh
    choices: Choices
    solution: Solution
    workspace: int
    pipeline: Pipeline
    spread: Spread | None


def assemble(
    chosen: Chosen,
    *,
    cluster: Cluster,
    rename: bool,
    model_name: str,
    fingerprint: str,
    candidates: tuple[Candidate, ...],
    unruled: tuple[Op, ...],
    notes: tuple[str, ...],
    seconds: float,
) -> Plan:
    """The plan of what was chosen; all costs are those that the search used. `rename` names the axes after what they do."""
    model, mesh, choices, solution, pipeline, spread = (
        chosen.model,
        chosen.mesh,
        chosen.choices,
        chosen.solution,
        chosen.pipeline,
        chosen.spread,
    )
    tables = CostTables(model, mesh, cluster)
    placements, layouts = choices.placements, choices.layouts
    mesh = _name_axes(model, mesh, placements) if rename else mesh
    first = first_rank_axis(mesh)
    moves = list(find_moves(model, choices))
    traffic = _traffic(model, mesh, tables, moves, pipeline, spread)
    step = solution.cost_ns / 1e9 if spread is None else spread.assignment.simulated
    bound = solution.bound_ns if spread is None else round(spread.assignment.bound * 1e9)
    objective = solution.cost_ns if spread is None else round(spread.assignment.simulated * 1e9)
    return Plan(
        model=printable(model_name),
        fingerprint=fingerprint,
        cluster=printable(str(cluster)),
        mesh=Mesh(mesh.names[first:], mesh.sizes[first:]),
        pipeline=pipeline,
        inputs={op.target: str(op.results[0]) for op in model.folded.graph.of_kind(OpKind.INPUT)},
        layouts={name: layout[first:] for name, layout in layouts.items()},
        outputs=tuple(layout[first:] for layout in choices.outputs),
        placements={name: placement[first:] for name, placement in placements.items()},
        batch_axes=tuple(name for name in _batch_axes(model, mesh, placements) if name != MICRO),
        bucket_nbytes=BUCKET_NBYTES,
        seconds=_seconds(model, tables, placements, layouts, solution, pipeline, spread, step),
        memory=_memory(model, cluster, tables, layouts, solution, chosen.workspace, spread),
        traffic=traffic,
        groups=_groups(model, mesh, tables, placements, layouts, moves),
        proof=Proof(
            objective_ns=objective,
            bound_ns=bound,
            gap=(objective - bound) / max(1, objective),
            status=solution.status if spread is None else spread.assignment.status,
            method=solution.method if spread is None else f"{solution.method}; cutting planes, {spread.assignment.iterations} rounds",
            variables=solution.variables,
            constraints=solution.constraints,
            seconds=seconds,
            candidates=candidates,
        ),
        # Lines of the user's code hold whatever their editor lets in, a tab for one.
        unruled=tuple(Unruled(op.name, op.target, printable(op.source)) for op in unruled),
        notes=tuple(map(printable, notes)),
    )


def find_moves(model: Model, choices: Choices) -> Iterator[Move]:
    """Every journey that the chosen layouts make necessary: of a parameter for each use, of other values once per needed layout."""
    graph, output = model.folded.graph, model.folded.graph.output.name

    def made(value: Value) -> Layout:
        op = graph.by_name[value.op]
        if op.kind is not OpKind.CALL:
            return choices.layouts[value.op]
        return result_layout_of(model, op, choices.placements[value.op], value.index)

    def needed(consumer: str, operand: int) -> Layout:
        return operand_layout_of(model, graph.by_name[consumer], choices.placements[consumer], operand)

    for edge in model.folded.edges:
        if edge.consumer == output:
            yield Move(edge.value, edge.consumer, made(edge.value), choices.outputs[edge.operand], edge.count, True)
        elif graph.by_name[edge.value.op].kind is OpKind.PARAMETER:
            yield Move(edge.value, edge.consumer, made(edge.value), needed(edge.consumer, edge.operand), edge.count, False)
    for value, sets in model.folded.readers.items():
        for readers, count in sets.items() if graph.by_name[value.op].kind is not OpKind.PARAMETER else ():
            needs: dict[Layout, str] = {}
            for consumer, operand in readers:
                if consumer != output:
                    needs.setdefault(needed(consumer, operand), consumer)
            for need, consumer in needs.items():
                yield Move(value, consumer, made(value), need, count, False)


def workspace_bytes(model: Model, mesh: Mesh, choices: Choices) -> int:
    """Bytes that the hungriest op needs beside what is kept: its operands and results, their gradients, gathered parameters."""
    graph = model.folded.graph
    largest = 0
    for op in model.folded.ops:
        if op.kind is not OpKind.CALL:
            continue
        placement = choices.placements[op.name]
        total = 0
        for index, value in enumerate(op.operands):
            need = operand_layout_of(model, op, placement, index)
            if graph.by_name[value.op].kind is not OpKind.PARAMETER or need != choices.layouts[model.folded.representative[value.op]]:
                total += local_nbytes(graph.tensor(value), need, mesh)
        for index, tensor in enumerate(op.results):
            total += local_nbytes(tensor, result_layout_of(model, op, placement, index), mesh)
        largest = max(largest, total)
    return 2 * largest


def _name_axes(model: Model, mesh: Mesh, placements: Mapping[str, Placement]) -> Mesh:
    """Name free axes after the role that most of the work is split by; an axis that the user asked for keeps its name."""
    kinds = set(KIND_OF_ROLE.values())
    names: list[str] = []
    for axis, given in enumerate(mesh.names):
        if given in kinds or given == MICRO:
            names.append(given)
            continue
        weight: Counter[str] = Counter()
        for op in model.folded.ops:
            space = model.spaces.get(op.name)
            if op.kind is OpKind.CALL and space is not None and space.is_contraction:
                part = placements[op.name][axis]
                if isinstance(part, Split):
                    points = space.points() * max(1.0, space.flops) * model.folded.count[op.name]
                    weight[KIND_OF_ROLE[role_of(model.factors.of_loops[op.name], part)]] += int(points)
        names.append(weight.most_common(1)[0][0] if weight else "dp")
    doubled = Counter(names)
    unique = [
        f"{name}{names[:i].count(name)}" if doubled[name] > 1 and given not in kinds else name
        for i, (name, given) in enumerate(zip(names, mesh.names, strict=True))
    ]
    return Mesh(tuple(unique), mesh.sizes)


def _batch_axes(model: Model, mesh: Mesh, placements: Mapping[str, Placement]) -> tuple[str, ...]:
    """Axes that split the batch in most of the contractions."""
    axes = []
    contractions = [name for name, space in model.spaces.items() if name in placements and space.is_contraction]
    for axis, name in enumerate(mesh.names):
        parts = [(op, placements[op][axis]) for op in contractions]
        by_batch = sum(isinstance(p, Split) and role_of(model.factors.of_loops[op], p) is Role.BATCH for op, p in parts)
        if 2 * by_batch > len(contractions):
            axes.append(name)
    return tuple(axes)


def _seconds(
    model: Model,
    tables: CostTables,
    placements: Mapping[str, Placement],
    layouts: Mapping[str, Layout],
    solution: Solution,
    pipeline: Pipeline,
    spread: Spread | None,
    step: float,
) -> Seconds:
    """Seconds of one rank: of the mean rank, under a pipeline."""
    forward = backward = optimizer = 0.0
    for op in model.folded.ops:
        count = model.folded.count[op.name]
        if op.kind is OpKind.CALL:
            ahead, back = tables.op_seconds(op, placements[op.name])
            forward, backward = forward + count * ahead, backward + count * back
        elif op.kind is OpKind.PARAMETER:
            optimizer += count * tables.optimizer_seconds(op.results[0], layouts[op.name])
    share = pipeline.microbatches / pipeline.ranks
    forward, backward, optimizer = forward * share, backward * share, optimizer / pipeline.ranks
    # What is left of the objective is what the arcs cost: communication that isn't hidden.
    work, recompute = solution.cost_ns / 1e9, 0.0
    if spread is not None:
        recompute = share * spread.recompute_seconds
        chosen = [variant for _, _, variant in spread.chosen()]
        work = share * sum(one.forward + one.input + one.weight for one in chosen) - recompute
        work += sum(one.once for one in chosen) / pipeline.ranks
    communication = max(0.0, work - forward - backward - optimizer)
    bubble = max(0.0, step - forward - backward - optimizer - communication - recompute)
    return Seconds(forward, backward, recompute, optimizer, communication, bubble if spread is not None else 0.0)


def _memory(
    model: Model,
    cluster: Cluster,
    tables: CostTables,
    layouts: Mapping[str, Layout],
    solution: Solution,
    workspace: int,
    spread: Spread | None,
) -> Memory:
    """Bytes of one rank: of the fullest, under a pipeline."""
    graph = model.folded.graph
    fullest, needed = 0, solution.nbytes
    here: set[str] | None = None
    if spread is not None:
        fullest = max(range(len(spread.assignment.peak)), key=spread.assignment.peak.__getitem__)
        names = {name for block, rank, _ in spread.chosen() if rank == fullest for name in block.ops}
        here = {value.op for name in names for value in graph.by_name[name].operands}
        workspace = max(variant.workspace for _, rank, variant in spread.chosen() if rank == fullest)
    parameters = trained = buffers = 0
    for op in graph.ops:
        if op.kind not in (OpKind.PARAMETER, OpKind.BUFFER, OpKind.INPUT):
            continue
        nbytes = local_nbytes(op.results[0], layouts[model.folded.representative[op.name]], tables.mesh)
        if op.kind is not OpKind.PARAMETER:
            buffers += nbytes
        elif here is None or op.name in here:
            parameters += nbytes
            trained += nbytes if op.results[0].requires_grad else 0
    if spread is not None:
        needed = spread.assignment.peak[fullest] - workspace + buffers
    optimizer = OPTIMIZER_COPIES * trained
    device = cluster.machine.device
    return Memory(
        parameters=parameters,
        gradients=trained,
        optimizer=optimizer,
        activations=max(0, needed - parameters - trained - optimizer - buffers),
        buffers=buffers,
        workspace=workspace,
        reserved=device.reserved_bytes,
        budget=device.memory_bytes,
    )


def _traffic(
    model: Model, mesh: Mesh, tables: CostTables, moves: list[Move], pipeline: Pipeline, spread: Spread | None
) -> tuple[Traffic, ...]:
    """Every collective of a step, added up by axis, kind and purpose; seconds are what is exposed.

    Under a pipeline, of the mean rank; messages between stages are those of all of them.
    """
    share = pipeline.microbatches / pipeline.ranks
    uses = count_uses(model)
    totals: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0, 0, 0.0])
    graph = model.folded.graph

    def add(axis: int, collective: Collective, purpose: str, count: float, nbytes: float, seconds: float) -> None:
        entry = totals[mesh.names[axis], COLLECTIVE_KIND.get(collective, "local copy"), purpose]
        entry[0] += count
        entry[1] += count * nbytes
        entry[2] += count * seconds

    for move in moves:
        if move.start == move.need:
            continue
        producer = graph.by_name[move.value.op]
        tensor = producer.results[move.value.index]
        is_parameter = producer.kind is OpKind.PARAMETER
        for step, nbytes in tables.legs(tensor, move.start, move.need):
            if step.forward is not Collective.NONE:
                purpose = "parameters" if is_parameter else "activations"
                again = 2 if is_parameter and tensor.requires_grad and step.forward is Collective.ALL_GATHER else 1
                seconds = tables.collective_seconds(step.forward, step.axis, nbytes)
                add(step.axis, step.forward, purpose, share * move.count * again, nbytes, seconds)
            if not tensor.requires_grad or move.to_output or step.backward is Collective.NONE:
                continue
            if is_parameter and step.forward is Collective.NONE:
                seconds = tables.bucket_seconds(step.backward, step.axis, nbytes) * (1 - tables.device.overlap)
                add(step.axis, step.backward, "gradients", move.count / uses[producer.name] / pipeline.ranks, nbytes, seconds)
            else:
                purpose = "gradients" if is_parameter else "activation gradients"
                seconds = tables.collective_seconds(step.backward, step.axis, nbytes)
                add(step.axis, step.backward, purpose, share * move.count, nbytes, seconds)
    if spread is not None and pipeline.stages > 1:
        cuts = [
            menu.cut
            for menu, here, there in zip(spread.menus, spread.assignment.stages, spread.assignment.stages[1:], strict=False)
            if spread.rank_of[here] != spread.rank_of[there]
        ]
        entry = totals[PIPELINE, "send", "between stages"]
        entry[0] += 2 * pipeline.microbatches * len(cuts)
        entry[1] += 2 * pipeline.microbatches * sum(cut.nbytes for cut in cuts)
        entry[2] += pipeline.microbatches * sum(cut.forward + cut.backward for cut in cuts)
    return tuple(
        Traffic(axis, collective, purpose, round(count), int(nbytes), seconds)
        for (axis, collective, purpose), (count, nbytes, seconds) in sorted(totals.items())
    )


def _groups(
    model: Model,
    mesh: Mesh,
    tables: CostTables,
    placements: Mapping[str, Placement],
    layouts: Mapping[str, Layout],
    moves: list[Move],
) -> tuple[Group, ...]:
    """One line per class of layers, and one for what is outside of them."""
    group_of = {name: layer.name for layer in model.folded.classes for name in layer.instances[0]}
    sizes = {layer.name: len(layer.instances) for layer in model.folded.classes}
    outside = "outside of layers"
    names = [*sizes, outside]
    axes: dict[str, dict[str, list[str]]] = {name: {axis: [] for axis in mesh.names} for name in names}
    times = mesh.sizes[0] if first_rank_axis(mesh) else 1
    compute: dict[str, float] = defaultdict(float)
    parameters: Counter[str] = Counter()
    activations: Counter[str] = Counter()
    kept = count_kept(model)
    for op in model.folded.ops:
        group = group_of.get(op.name, outside)
        if op.kind is OpKind.CALL:
            seconds = sum(tables.op_seconds(op, placements[op.name]))
            compute[group] += times * model.folded.count[op.name] * seconds
            activations[group] += kept_nbytes(model, kept, op, placements[op.name], tables.mesh)
            _note_splits(model, mesh, op, placements[op.name], axes[group])
        elif op.kind is OpKind.PARAMETER:
            parameters[group] += model.folded.count[op.name] * local_nbytes(op.results[0], layouts[op.name], tables.mesh)
            for axis, state in enumerate(layouts[op.name]):
                if state.kind is StateKind.SHARD and _is_gathered(op, axis, moves):
                    _append(axes[group][mesh.names[axis]], "parameter storage")
    communication: dict[str, float] = defaultdict(float)
    uses = count_uses(model)
    for move in moves:
        often, once = _move_seconds(model, tables, move, uses)
        communication[group_of.get(move.consumer, outside)] += times * often + once
    return tuple(
        Group(
            name=name,
            count=sizes.get(name, 1),
            axes={axis: ", ".join(texts) or "nothing" for axis, texts in axes[name].items() if axis != MICRO},
            compute_seconds=compute[name],
            communication_seconds=communication[name],
            parameter_bytes=parameters[name],
            activation_bytes=activations[name],
        )
        for name in names
    )


def _move_seconds(model: Model, tables: CostTables, move: Move, uses: Counter[str]) -> tuple[float, float]:
    """(seconds of every micro-batch, seconds once per step) of a journey."""
    producer = model.folded.graph.by_name[move.value.op]
    tensor = producer.results[move.value.index]
    if move.start == move.need:
        return 0.0, 0.0
    if producer.kind is OpKind.PARAMETER:
        gathered, deferred = tables.parameter_seconds(tensor, move.start, move.need, uses[producer.name])
        return move.count * gathered, move.count * deferred
    backward = tensor.requires_grad and not move.to_output
    return move.count * sum(tables.journey_seconds(tensor, move.start, move.need, backward=backward)), 0.0


def _is_gathered(op: Op, axis: int, moves: list[Move]) -> bool:
    return any(move.value.op == op.name and move.need[axis].kind is not StateKind.SHARD for move in moves)


def _append(texts: list[str], text: str) -> None:
    if text not in texts:
        texts.append(text)


def _note_splits(model: Model, mesh: Mesh, op: Op, placement: Placement, texts: Mapping[str, list[str]]) -> None:
    """Say in words what an op's split divides, for the ops that hold the work."""
    space = model.spaces.get(op.name)
    if space is None or not space.is_contraction:
        return
    for axis, part in enumerate(placement):
        if not isinstance(part, Split):
            continue
        role = role_of(model.factors.of_loops[op.name], part)
        if role is Role.BATCH:
            text = "batch"
        elif role is Role.SEQUENCE:
            text = "sequence"
        else:
            text = space.facts.meaning_of(part.loop).value
        _append(texts[mesh.names[axis]], text)
