"""The plan of what the search chose: its axes get names, and the costs that the search used are summed.

Comes in: a `Chosen`. Goes out: a `Plan`, whose rows of seconds are those of a pipeline rank on average, and whose bytes are those of the
fullest device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from autopar.cost_models import Cluster
from autopar.costs import BUCKET_NBYTES, Sharding, given_nbytes, local_nbytes, operand_layout_of
from autopar.ir import MICROBATCH, PIPELINE, Layout, Mesh, Op, OpKind, Placement, Precision, Split, StateKind
from autopar.plans import OUTSIDE, STORAGE, Candidate, CostRow, Group, Memory, Phase, Plan, Proof, Purpose, RowSums, Timing, Unruled
from autopar.search.attribution import Chosen, find_ops, find_work, group_names, word_splits
from autopar.search.candidates import name_axes
from autopar.search.placement import nanoseconds, saved_nbytes
from autopar.search.reads import find_reads
from autopar.search.repeated import find_repeated
from autopar.search.timing import make_timing
from autopar.structure import AnalyzedGraph, Role, first_rank_axis, role_of
from autopar.texts import printable


def assemble(
    chosen: Chosen,
    *,
    cluster: Cluster,
    rename: bool,
    model_name: str,
    precision: Precision,
    prefetch: int,
    half_batches: bool,
    fingerprint: str,
    candidates: tuple[Candidate, ...],
    candidate: int,
    unruled: tuple[Op, ...],
    notes: tuple[str, ...],
) -> Plan:
    """The plan of what was chosen; all costs are those that the search used.

    Args:
        chosen: what the search decided.
        cluster: the devices.
        rename: whether to name free axes after what they split.
        model_name: the model's name, for the report.
        precision: in which dtypes the model trains.
        prefetch: how many blocks ahead gathers of parameters are begun.
        half_batches: whether two halves of the batch take turns.
        fingerprint: of the captured graph, by which a plan is checked to be of it.
        candidates: the outcome of everything that the search tried.
        candidate: position of what was chosen among them.
        unruled: ops without a rule.
        notes: remarks for the report.
    """
    model, solution = chosen.model, chosen.solution
    placements, layouts = chosen.sharding.placements, chosen.sharding.layouts
    mesh = name_axes(model, chosen.mesh, placements) if rename else chosen.mesh
    first_axis = first_rank_axis(mesh)
    block_rows = _name_rows(chosen, dict(zip(chosen.mesh.names, mesh.names, strict=True)))
    objective = nanoseconds(chosen.step_seconds)
    bound = min(objective, nanoseconds(chosen.bound_seconds))
    return Plan(
        model=printable(model_name) or "model",
        fingerprint=fingerprint,
        cluster=printable(str(cluster)),
        precision=precision,
        mesh=Mesh(mesh.names[first_axis:], mesh.sizes[first_axis:]),
        pipeline=replace(chosen.pipeline, timing=_make_timing(chosen, block_rows)),
        inputs={printable(op.target): str(op.results[0]) for op in model.folded.graph.of_kind(OpKind.INPUT)},
        layouts={name: layout[first_axis:] for name, layout in layouts.items()},
        outputs=tuple(layout[first_axis:] for layout in chosen.sharding.outputs),
        placements={name: placement[first_axis:] for name, placement in placements.items()},
        batch_axes=tuple(name for name in _batch_axes(model, mesh, placements) if name != MICROBATCH),
        bucket_nbytes=BUCKET_NBYTES,
        prefetch=prefetch,
        half_batches=half_batches,
        costs=_sum_rows(chosen, block_rows),
        work=find_work(model, cluster.machine.device),
        ops=find_ops(chosen, cluster, prefetch, mesh),
        reads=find_reads(chosen),
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
            candidates=candidates,
            chosen=candidate,
        ),
        repeated=find_repeated(model, mesh, placements),
        # Lines of the user's code may hold characters that can't be printed, such as tabs.
        unruled=tuple(Unruled(op.name, op.target, printable(op.source)) for op in unruled),
        notes=tuple(map(printable, notes)),
    )


def _batch_axes(model: AnalyzedGraph, mesh: Mesh, placements: Mapping[str, Placement]) -> tuple[str, ...]:
    """Names of the axes that split the batch in more than half of the contractions."""
    axes = []
    contractions = [name for name, space in model.spaces.items() if name in placements and space.is_contraction]
    for axis, name in enumerate(mesh.names):
        parts = [(op, placements[op][axis]) for op in contractions]
        by_batch = sum(isinstance(part, Split) and role_of(model.roles.of_loops[op], part) is Role.BATCH for op, part in parts)
        if 2 * by_batch > len(contractions):
            axes.append(name)
    return tuple(axes)


def _name_rows(chosen: Chosen, axis_names: Mapping[str, str]) -> list[tuple[CostRow, ...]]:
    """Per block its rows of one micro-batch, under the plan's names of layers and axes; `axis_names` are these by those of the rows."""
    layers = set(chosen.model.folded.layer_of.values())
    named = []
    for block, _, _, cost in chosen.blocks():
        names = group_names(chosen, block)
        sums = RowSums()
        for row in cost.rows:
            layer = names.get(row.layer, row.layer if row.layer in layers else "")
            sums.add_row(row, layer=printable(layer), axis=axis_names.get(row.axis, row.axis))
        named.append(sums.rows())
    return named


def _make_timing(chosen: Chosen, block_rows: Sequence[tuple[CostRow, ...]]) -> Timing:
    pipeline = chosen.pipeline
    return make_timing(
        block_rows,
        chosen.options,
        chosen.cuts,
        [choice.stage for choice in pipeline.blocks],
        chosen.rank_of,
        chosen.cost.memory,
        is_whole=pipeline.stages == pipeline.microbatches == 1,
        forwards_first=chosen.model.folded.graph.loss is None,
    )


def _sum_rows(chosen: Chosen, block_rows: Sequence[tuple[CostRow, ...]]) -> tuple[CostRow, ...]:
    """What a step costs a pipeline rank on average: rows of all blocks for all micro-batches, messages between stages, and the bubble."""
    pipeline = chosen.pipeline
    sums = RowSums()
    for rows in block_rows:
        for row in rows:
            sums.add_row(row, (1 if row.phase == Phase.STEP else pipeline.microbatches) / pipeline.ranks)
    stages = [choice.stage for choice in pipeline.blocks]
    for cut, stage, next_stage in zip(chosen.cuts, stages, stages[1:], strict=False):
        if chosen.rank_of[stage] != chosen.rank_of[next_stage]:
            for phase, nbytes, seconds in (
                (Phase.FORWARD, cut.nbytes, cut.forward),
                (Phase.BACKWARD_INPUT, cut.backward_nbytes, cut.backward),
            ):
                if nbytes:
                    count = pipeline.microbatches
                    # A rank that waits for a message has nothing to compute: its wait is in the bubble, so the message counts as hidden.
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
    """Seconds of the step in which a pipeline rank computes nothing, the mean over pipeline ranks."""
    busy = [0.0] * chosen.pipeline.ranks
    for _, rank, option, _ in chosen.blocks():
        busy[rank] += chosen.pipeline.microbatches * (option.forward + option.backward_input + option.backward_weight) + option.per_step
    return sum(chosen.step_seconds - seconds for seconds in busy) / len(busy)


def _memory(chosen: Chosen, cluster: Cluster) -> Memory:
    """Bytes of one device: under a pipeline of the fullest pipeline rank's."""
    peaks = chosen.cost.peak
    fullest = max(range(len(peaks)), key=peaks.__getitem__)
    rank_memory = chosen.cost.memory[fullest]
    block_memories = [cost.memory for _, rank, _, cost in chosen.blocks() if rank == fullest]
    device = cluster.machine.device
    return Memory(
        parameters=sum(memory.parameters for memory in block_memories),
        gradients=sum(memory.gradients for memory in block_memories),
        optimizer=sum(memory.optimizer for memory in block_memories),
        activations=rank_memory.held + rank_memory.messages + sum(memory.outputs for memory in block_memories),
        buffers=given_nbytes(chosen.model.folded.graph),
        workspace=rank_memory.workspace,
        reserved=device.reserved_bytes,
        budget=device.memory_bytes,
        apart=rank_memory.apart,
        copies=sum(memory.copies for memory in block_memories),
    )


def _groups(chosen: Chosen, mesh: Mesh) -> tuple[Group, ...]:
    """What each axis splits in each group of like layers, and in what is outside of layers, with bytes of parameters and saved tensors."""
    model, sharding = chosen.model, chosen.sharding
    group_of = model.folded.layer_of
    paths = {layer.name: layer.paths for layer in model.folded.layer_groups}
    names = [*paths, OUTSIDE]
    tensors: dict[str, dict[str, str]] = {name: {} for name in names}
    axes: dict[str, dict[str, list[str]]] = {name: {axis: [] for axis in mesh.names} for name in names}
    parameters: Counter[str] = Counter()
    activations: Counter[str] = Counter()
    for op in model.folded.ops:
        group = group_of.get(op.name, OUTSIDE)
        if op.kind in (OpKind.PARAMETER, OpKind.BUFFER):
            tensors[group][op.name] = printable(op.target)
        if op.kind is OpKind.CALL:
            activations[group] += saved_nbytes(model, op, sharding.placements[op.name], chosen.mesh)
            _note_splits(model, mesh, op, sharding.placements[op.name], axes[group])
        elif op.kind is OpKind.PARAMETER:
            layout = sharding.layouts[op.name]
            parameters[group] += model.folded.count[op.name] * local_nbytes(op.results[0], layout, chosen.mesh)
            for axis, state in enumerate(layout):
                if state.level or (state.kind is StateKind.SHARD and _is_gathered(model, sharding, op, axis)):
                    _append(axes[group][mesh.names[axis]], STORAGE[state.level])
    return tuple(
        Group(
            name=printable(name),
            paths=tuple(map(printable, paths.get(name, ()))),
            tensors=tensors[name],
            axes={axis: ", ".join(texts) or "nothing" for axis, texts in axes[name].items() if axis != MICROBATCH},
            parameter_bytes=parameters[name],
            activation_bytes=activations[name],
        )
        for name in names
    )


def _is_gathered(model: AnalyzedGraph, sharding: Sharding, parameter: Op, axis: int) -> bool:
    """Whether some reader needs a parameter whole along an axis, which splits its storage: it is gathered there."""
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
    """Add a text that isn't there yet."""
    if text not in texts:
        texts.append(text)


def _note_splits(model: AnalyzedGraph, mesh: Mesh, op: Op, placement: Placement, texts: Mapping[str, list[str]]) -> None:
    """Add to `texts`, by axis, in words what the placement of a contraction splits."""
    space = model.spaces.get(op.name)
    if space is not None and space.is_contraction:
        for name, text in word_splits(model, mesh, op, placement).items():
            _append(texts[name], text)
