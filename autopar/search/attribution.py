"""What the model works, and what every op costs in the plan: the rows of the plan's costs, taken apart.

Comes in: a `Chosen`, what the search decided. Goes out: `Work`, and an `OpCost` for every call and parameter that decisions are about.
Their sums are those of the plan's rows, since both are made of the same entries (`autopar.costs.itemize_block`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from autopar.cost_models import Cluster, Device
from autopar.costs import BlockCost, CostTables, CutCost, Sharding, SolvedChain, itemize_block
from autopar.ir import MICROBATCH, Mesh, Op, OpKind, Placement, Split, StateKind, Value
from autopar.plans import OUTSIDE, CostRow, OpCost, Phase, Pipeline, Seconds, Work, add_parts, sum_parts
from autopar.search.pipeline import AssignmentCost, BlockOption
from autopar.search.placement import Solution
from autopar.structure import AnalyzedGraph, Block, Chain, Folded, Role, batch_size, count_flops, read_chain, role_of
from autopar.texts import printable


@dataclass(frozen=True)
class Chosen:
    """What the search decided, and the tables of costs that it decided by.

    Attributes:
        model: the model, folded so that like blocks with different placements are apart.
        mesh: the mesh of a pipeline rank; its first axis is that of micro-batches, if there is one.
        sharding: placements and layouts on this mesh, of the representatives of `model`.
        base: the folding whose names of layers the cost rows have.
        solution: the solution of the placement problem that decided on what blocks share.
        pipeline: stages, schedule and recomputation.
        chain: the blocks.
        options: the option of each block of `chain`.
        cuts: what it takes to end a stage after each block.
        rank_of: per stage its pipeline rank.
        cost: seconds and bytes of the assignment of blocks to stages.
        step_seconds: seconds of a step.
        bound_seconds: the lower bound on them that the search has proven.
        status, method: how the search ended, for the plan's proof.
        halved: representatives of the calls that run for each half of the batch, where these take turns.
    """

    model: AnalyzedGraph
    mesh: Mesh
    sharding: Sharding
    base: Folded
    solution: Solution
    pipeline: Pipeline
    chain: Chain
    options: tuple[BlockOption, ...]
    cuts: tuple[CutCost, ...]
    rank_of: tuple[int, ...]
    cost: AssignmentCost
    step_seconds: float
    bound_seconds: float
    status: str
    method: str
    halved: frozenset[str] = frozenset()

    def blocks(self) -> Iterator[tuple[Block, int, BlockOption, BlockCost]]:
        """Per block: the block, its pipeline rank, its option, and the option's table of costs."""
        for block, choice, option in zip(self.chain.blocks, self.pipeline.blocks, self.options, strict=True):
            assert option.cost is not None
            yield block, self.rank_of[choice.stage], option, option.cost


def group_names(chosen: Chosen, block: Block) -> dict[str, str]:
    """The names that groups of layers have in the plan, by those that the rows of a block have.

    Runs of like layers with different placements have names of their own in the plan.
    """
    base, final = chosen.base.layer_of, chosen.model.folded.layer_of
    return {base[name]: final[name] for name in block.ops if name in base and name in final}


def find_work(model: AnalyzedGraph, device: Device) -> Work:
    """What a step of the whole model computes, and what a device could compute in the dtype of most of it."""
    graph = model.folded.graph
    flops: Counter[str] = Counter()
    for op in model.folded.ops:
        space = model.spaces.get(op.name)
        if op.kind is OpKind.CALL and space is not None and space.is_product:
            operands = graph.operand_tensors(op)
            # A backward makes a product for each of two operands, not for a bias; what an attention computes again isn't the model's.
            factors = [tensor for index, tensor in enumerate(operands) if index not in space.added]
            has_backward = any(tensor.requires_grad for tensor in op.results)
            needing = min(2, sum(tensor.requires_grad for tensor in factors)) if has_backward else 0
            flops[operands[0].dtype] += int((1 + needing) * count_flops(model.spaces, op) * model.folded.count[op.name])
    dtype = flops.most_common(1)[0][0] if flops else next(iter(device.peak_flops))
    samples = batch_size(graph, model.roles)
    lengths = [
        op.results[0].shape[1]
        for op in graph.of_kind(OpKind.INPUT)
        if len(op.results[0].shape) > 1
        and op.results[0].shape[0] == samples
        and model.roles.of_dims[Value(op.name)][1].get(1) is Role.SEQUENCE
    ]
    return Work(
        flops=float(sum(flops.values())),
        samples=samples,
        tokens=samples * max(lengths) if lengths else None,
        dtype=dtype,
        peak_flops=device.peak_flops.get(dtype, 0.0),
    )


@dataclass(slots=True)
class _Sums:
    """What is added up of one op."""

    parts: list[Seconds] = field(default_factory=list)
    hidden: float = 0.0
    nbytes: float = 0.0


@dataclass(frozen=True, slots=True)
class _Item:
    """What a block costs for one op, for a micro-batch and once per step; `exposed` and `hidden` are parts of what its rows have."""

    op: str
    once: bool
    exposed: Seconds
    hidden: float
    nbytes: float


def find_ops(chosen: Chosen, cluster: Cluster, prefetch: int, mesh: Mesh) -> tuple[OpCost, ...]:
    """What every call and parameter costs the mean rank in a step.

    Args:
        chosen: what the search decided.
        cluster: the devices.
        prefetch: how many blocks ahead gathers of parameters are begun.
        mesh: that of `chosen`, with the plan's names of axes.
    """
    model, pipeline = chosen.model, chosen.pipeline
    reads = read_chain(model.folded.graph, model.spaces, chosen.chain)
    tables = CostTables(model, chosen.mesh, cluster, prefetch, chosen.halved)
    solved = SolvedChain(model, chosen.chain, reads, tables, chosen.sharding, is_one_stage=pipeline.ranks == 1)
    items: dict[object, list[_Item]] = {}  # blocks of one cost and the same representatives have the same
    sums: defaultdict[str, _Sums] = defaultdict(_Sums)
    for number, (block, _, option, cost) in enumerate(chosen.blocks()):
        key = id(cost), tuple(model.folded.representative[name] for name in block.ops)
        if key not in items:
            items[key] = list(_itemize(solved, number, option.name, cost, group_names(chosen, block)))
        for item in items[key]:
            times = (1 if item.once else pipeline.microbatches) / pipeline.ranks
            total = sums[item.op]
            total.parts.append(item.exposed.times(times))
            total.hidden += times * item.hidden
            total.nbytes += times * item.nbytes
    return tuple(_describe(chosen, mesh, op, sums[op.name]) for op in model.folded.ops if op.kind is OpKind.CALL or op.name in sums)


def _itemize(solved: SolvedChain, number: int, recompute: str, cost: BlockCost, names: Mapping[str, str]) -> Iterator[_Item]:
    """The cost of a block by representatives; what is hidden of a row is spread over its entries by their seconds."""
    representative = solved.model.folded.representative
    entries = list(itemize_block(solved, number, recompute))
    whole: defaultdict[object, float] = defaultdict(float)
    exposed: defaultdict[object, float] = defaultdict(float)
    hidden: defaultdict[object, float] = defaultdict(float)
    for _, row in entries:
        whole[_kind(row, row.layer)] += row.seconds + row.hidden
    for row in cost.rows:
        key = _kind(row, names.get(row.layer, row.layer))
        exposed[key] += row.seconds
        hidden[key] += row.hidden
    for name, row in entries:
        key = _kind(row, row.layer)
        share = (row.seconds + row.hidden) / whole[key] if whole[key] else 0.0
        moved = row.nbytes if row.is_communication else 0.0
        parts = sum_parts([replace(row, seconds=share * exposed[key])])
        yield _Item(representative[name], row.phase == Phase.STEP, parts, share * hidden[key], moved)


def _kind(row: CostRow, layer: str) -> object:
    return layer, row.phase, row.purpose, row.axis, row.collective


def _describe(chosen: Chosen, mesh: Mesh, op: Op, sums: _Sums) -> OpCost:
    """The entry of a call or parameter."""
    model, is_call = chosen.model, op.kind is OpKind.CALL
    space = model.spaces.get(op.name) if is_call else None
    placements, layouts = chosen.sharding.placements, chosen.sharding.layouts
    return OpCost(
        op=op.name,
        group=printable(model.folded.layer_of.get(op.name, OUTSIDE)),
        target=printable(op.target),
        path=printable(op.layer),
        source=printable(op.source) if is_call else "",
        space="" if space is None else str(space),
        loops={} if space is None else {name: loop.size for name, loop in space.loops.items()},
        splits=word_splits(model, mesh, op, placements[op.name])
        if is_call
        else {
            axis: f"dim {state.dim}"
            for axis, state in zip(mesh.names, layouts[op.name], strict=True)
            if axis != MICROBATCH and state.kind is StateKind.SHARD
        },
        count=model.folded.count[op.name],
        flops=0.0 if space is None else count_flops(model.spaces, op) * model.folded.count[op.name],
        seconds=add_parts(sums.parts),
        hidden=sums.hidden,
        nbytes=sums.nbytes,
    )


def word_splits(model: AnalyzedGraph, mesh: Mesh, op: Op, placement: Placement) -> dict[str, str]:
    """Per axis of the mesh that splits a call in words what it splits; parts of sums that pass through are none."""
    space = model.spaces.get(op.name)
    words = {}
    for axis, part in zip(mesh.names, placement, strict=True):
        if space is None or axis == MICROBATCH or not isinstance(part, Split):
            continue
        role = role_of(model.roles.of_loops[op.name], part)
        if role in (Role.BATCH, Role.SEQUENCE):
            words[axis] = "batch" if role is Role.BATCH else "sequence"
        else:
            words[axis] = space.facts.meaning_of(part.loop).value
    return words
