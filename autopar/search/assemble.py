"""What was chosen -> Plan: names the axes after what they do, and sums the tables of costs that the search used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autopar.cost_models import Cluster
from autopar.costs import BUCKET_NBYTES, BlockCost, Sharding, count_saved, given_nbytes, local_nbytes, operand_layout_of
from autopar.ir import MICROBATCH, PIPELINE, Layout, Mesh, Op, OpKind, Placement, Split, StateKind
from autopar.plans import OUTSIDE, Candidate, CostRow, Group, Memory, Phase, Pipeline, Plan, Proof, Purpose, RowSums, Unruled, printable
from autopar.search.pipeline import AssignmentCost, BlockOption, Cut
from autopar.search.placement import Solution, saved_nbytes
from autopar.structure import Block, Chain, Folded, Model, Role, first_rank_axis, role_of

KIND_OF_ROLE = {Role.BATCH: "dp", Role.SEQUENCE: "cp", Role.FEATURE: "tp", Role.INNER: "tp"}


@dataclass(frozen=True)
class Chosen:
    """What the search decided, and the tables of costs that it decided by.

    Attributes:
        model: folded as blocks are split; `mesh` and `sharding` have micro-batches as their first axis where there are some.
        base: the folding whose names of layers the cost rows have.
        solution: the solution of the placement problem that decided on what blocks share.
        options: the option of each block of `chain`; `cuts`: what it takes to end a stage after each.
        rank_of: per stage its pipeline rank.
        cost: of the assignment of blocks to stages.
        step_seconds: of a step; `bound_seconds`: a lower bound of the search; `status`, `method`: how it ended.
    """

    model: Model
    mesh: Mesh
    sharding: Sharding
    base: Folded
    solution: Solution
    pipeline: Pipeline
    chain: Chain
    options: tuple[BlockOption, ...]
    cuts: tuple[Cut, ...]
    rank_of: tuple[int, ...]
    cost: AssignmentCost
    step_seconds: float
    bound_seconds: float
    status: str
    method: str

    def blocks(self) -> Iterator[tuple[Block, int, BlockOption, BlockCost]]:
        """Per block its pipeline rank, its option, and the option's table of costs."""
        for block, choice, option in zip(self.chain.blocks, self.pipeline.blocks, self.options, strict=True):
            assert option.cost is not None
            yield block, self.rank_of[choice.stage], option, option.cost


def assemble(
    chosen: Chosen,
    *,
    cluster: Cluster,
    rename: bool,
    model_name: str,
    fingerprint: str,
    candidates: tuple[Candidate, ...],
    candidate: int,
    unruled: tuple[Op, ...],
    notes: tuple[str, ...],
    seconds: float,
) -> Plan:
    """The plan of what was chosen; all costs are those that the search used.

    `rename` names the axes after what they do; `candidate` is the position of what was chosen among the candidates.
    """
    model, solution = chosen.model, chosen.solution
    placements, layouts = chosen.sharding.placements, chosen.sharding.layouts
    mesh = _name_axes(model, chosen.mesh, placements) if rename else chosen.mesh
    first = first_rank_axis(mesh)
    objective = round(chosen.step_seconds * 1e9)
    bound = min(objective, round(chosen.bound_seconds * 1e9))
    return Plan(
        model=printable(model_name),
        fingerprint=fingerprint,
        cluster=printable(str(cluster)),
        mesh=Mesh(mesh.names[first:], mesh.sizes[first:]),
        pipeline=chosen.pipeline,
        inputs={op.target: str(op.results[0]) for op in model.folded.graph.of_kind(OpKind.INPUT)},
        layouts={name: layout[first:] for name, layout in layouts.items()},
        outputs=tuple(layout[first:] for layout in chosen.sharding.outputs),
        placements={name: placement[first:] for name, placement in placements.items()},
        batch_axes=tuple(name for name in _batch_axes(model, mesh, placements) if name != MICROBATCH),
        bucket_nbytes=BUCKET_NBYTES,
        costs=_sum_rows(chosen, dict(zip(chosen.mesh.names, mesh.names, strict=True))),
        memory=_memory(chosen, cluster),
        groups=_groups(chosen, mesh),
        proof=Proof(
            objective_ns=objective,
            bound_ns=bound,
            gap=(objective - bound) / max(1, objective),
            status=chosen.status,
            method=chosen.method,
            variables=solution.variables,
            constraints=solution.constraints,
            seconds=seconds,
            candidates=candidates,
            chosen=candidate,
        ),
        # Lines of the user's code hold whatever their editor lets in, a tab for one.
        unruled=tuple(Unruled(op.name, op.target, printable(op.source)) for op in unruled),
        notes=tuple(map(printable, notes)),
    )


def _name_axes(model: Model, mesh: Mesh, placements: Mapping[str, Placement]) -> Mesh:
    """Name free axes after the role that most of the work is split by; an axis that the user asked for keeps its name."""
    kinds = set(KIND_OF_ROLE.values())
    names: list[str] = []
    for axis, given in enumerate(mesh.names):
        if given in kinds or given == MICROBATCH:
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


def _sum_rows(chosen: Chosen, axis_names: Mapping[str, str]) -> tuple[CostRow, ...]:
    """What a step costs the mean rank: the rows of all blocks, of all micro-batches, then messages and the time that it waits."""
    pipeline = chosen.pipeline
    base, final = chosen.base.layer_of, chosen.model.folded.layer_of
    sums = RowSums()
    for block, _, _, cost in chosen.blocks():
        # Where like layers are split in several ways, each way has a name of its own.
        names = {base[name]: final[name] for name in block.ops if name in base and name in final}
        for row in cost.rows:
            times = (1 if row.phase == Phase.STEP else pipeline.microbatches) / pipeline.ranks
            layer = names.get(row.layer, row.layer if row.layer in final.values() else "")
            sums.add_row(row, times, layer=layer, axis=axis_names.get(row.axis, row.axis))
    stages = [choice.stage for choice in pipeline.blocks]
    for cut, stage, after in zip(chosen.cuts, stages, stages[1:], strict=False):
        if chosen.rank_of[stage] != chosen.rank_of[after]:
            for phase, nbytes, seconds in (
                (Phase.FORWARD, cut.nbytes, cut.forward),
                (Phase.INPUT, cut.backward_nbytes, cut.backward),
            ):
                if nbytes:
                    count = pipeline.microbatches
                    # Ranks wait for a message only where the schedule has nothing else for them: that is the bubble's.
                    sums.add(
                        phase,
                        Purpose.MESSAGES,
                        0.0,
                        axis=PIPELINE,
                        collective="send",
                        count=count,
                        nbytes=count * nbytes,
                        hidden=count * seconds,
                    )
    if pipeline.ranks > 1:
        sums.add(Phase.STEP, Purpose.BUBBLE, _mean_idle_seconds(chosen))
    return sums.rows()


def _mean_idle_seconds(chosen: Chosen) -> float:
    """The part of the step in which the mean rank has nothing to run."""
    busy = [0.0] * chosen.pipeline.ranks
    for _, rank, option, _ in chosen.blocks():
        busy[rank] += chosen.pipeline.microbatches * (option.forward + option.input + option.weight) + option.once
    return sum(chosen.step_seconds - seconds for seconds in busy) / len(busy)


def _memory(chosen: Chosen, cluster: Cluster) -> Memory:
    """Bytes of one rank: of the fullest, under a pipeline."""
    peaks = chosen.cost.peak
    fullest = max(range(len(peaks)), key=peaks.__getitem__)
    held = chosen.cost.memory[fullest]
    here = [cost.memory for _, rank, _, cost in chosen.blocks() if rank == fullest]
    device = cluster.machine.device
    return Memory(
        parameters=sum(memory.parameters for memory in here),
        gradients=sum(memory.gradients for memory in here),
        optimizer=sum(memory.optimizer for memory in here),
        activations=held.held + held.messages + sum(memory.outputs for memory in here),
        buffers=given_nbytes(chosen.model.folded.graph),
        workspace=held.workspace,
        reserved=device.reserved_bytes,
        budget=device.memory_bytes,
    )


def _groups(chosen: Chosen, mesh: Mesh) -> tuple[Group, ...]:
    """One line per group of like layers, and one for what is outside of them."""
    model, sharding = chosen.model, chosen.sharding
    group_of = model.folded.layer_of
    paths = {layer.name: layer.paths for layer in model.folded.layer_groups}
    names = [*paths, OUTSIDE]
    tensors: dict[str, dict[str, str]] = {name: {} for name in names}
    axes: dict[str, dict[str, list[str]]] = {name: {axis: [] for axis in mesh.names} for name in names}
    parameters: Counter[str] = Counter()
    activations: Counter[str] = Counter()
    saved = count_saved(model)
    for op in model.folded.ops:
        group = group_of.get(op.name, OUTSIDE)
        if op.kind in (OpKind.PARAMETER, OpKind.BUFFER):
            tensors[group][op.name] = op.target
        if op.kind is OpKind.CALL:
            activations[group] += saved_nbytes(model, saved, op, sharding.placements[op.name], chosen.mesh)
            _note_splits(model, mesh, op, sharding.placements[op.name], axes[group])
        elif op.kind is OpKind.PARAMETER:
            layout = sharding.layouts[op.name]
            parameters[group] += model.folded.count[op.name] * local_nbytes(op.results[0], layout, chosen.mesh)
            for axis, state in enumerate(layout):
                if state.kind is StateKind.SHARD and _is_gathered(model, sharding, op, axis):
                    _append(axes[group][mesh.names[axis]], "parameter storage")
    return tuple(
        Group(
            name=name,
            paths=paths.get(name, ()),
            tensors=tensors[name],
            axes={axis: ", ".join(texts) or "nothing" for axis, texts in axes[name].items() if axis != MICROBATCH},
            parameter_bytes=parameters[name],
            activation_bytes=activations[name],
        )
        for name in names
    )


def _is_gathered(model: Model, sharding: Sharding, parameter: Op, axis: int) -> bool:
    """Whether some reader needs a parameter whole on an axis that splits its storage."""
    graph = model.folded.graph
    needs: list[Layout] = []
    for edge in model.folded.edges:
        if edge.value.op == parameter.name:
            reader = graph.by_name[edge.consumer]
            is_output = reader.kind is OpKind.OUTPUT
            needs.append(
                sharding.outputs[edge.operand]
                if is_output
                else operand_layout_of(model, reader, sharding.placements[reader.name], edge.operand)
            )
    return any(need[axis].kind is not StateKind.SHARD for need in needs)


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
