"""Bytes of a block on one rank, by kind: what is stored, what a micro-batch saves for its backward, what is needed while the block runs.

Comes in: a chain of blocks under one solution (`SolvedChain`). Goes out: a `BlockMemory` per block and kind of recomputation. A rank with
the blocks b of its stages, of which at most n micro-batches are between forward and backward, needs about

    sum over b of (b.static + n b.saved) + the largest b.workspace

(the exact sum, with b.waiting and receive buffers, is in ``search.pipeline.assignment_problem``).

What counts as saved is what autograd saves (`SavedTensors`). A value that crosses from one block to another counts with the first block
that reads it: that block holds it whatever the maker runs again. Of a region that is run again, only what enters it counts, and results
that leave it for the same block if autograd saves them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from autopar.costs.solved import SolvedChain
from autopar.costs.tables import kept_nbytes
from autopar.ir import Collective, Graph, Layout, Op, OpKind, Value
from autopar.structure import find_source


@dataclass(frozen=True, slots=True)
class BlockMemory:
    """Bytes of a block on one rank.

    Attributes:
        parameters, gradients, optimizer: a rank's parts of the parameters that the block reads, with their copies in the dtype in which
            the program reads them; the optimizer's state of a parameter that several blocks read counts with the first.
        outputs: the user's outputs that the block makes, of the whole batch.
        saved: per micro-batch, held from its forward to its backward.
        waiting: per micro-batch, held from its input gradients to its weight gradients, where a schedule runs these apart.
        workspace: needed while the block runs, forward or backward, and free afterwards.
    """

    parameters: int
    gradients: int
    optimizer: int
    outputs: int
    saved: int
    waiting: int
    workspace: int

    @property
    def static(self) -> int:
        """Bytes that are there during the whole step."""
        return self.parameters + self.gradients + self.optimizer + self.outputs


def given_nbytes(graph: Graph) -> int:
    """Bytes of the inputs and buffers of a graph: every rank has them whole, whatever is decided."""
    return sum(op.results[0].nbytes for kind in (OpKind.INPUT, OpKind.BUFFER) for op in graph.of_kind(kind))


def find_memory(solved: SolvedChain, number: int) -> BlockMemory:
    """The memory of block `number` of the chain without recomputation.

    Where all blocks run on the same ranks, a parameter that several blocks read counts with the first of them only.
    """
    parameters = gradients = optimizer = 0
    for name in solved.reads.parameters[number]:
        is_first = solved.reads.first_block[name] == number
        if solved.is_one_stage and not is_first:
            continue
        value = Value(name)
        kept = kept_nbytes(solved.graph.tensor(value), solved.stored(name), solved.mesh)
        parameters += kept.stored
        if kept.copy and not _is_gathered(solved, value):
            parameters += kept.copy
        gradients += kept.gradient
        optimizer += kept.optimizer if is_first else 0
    return BlockMemory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        outputs=sum(solved.nbytes(value, solved.sharding.outputs[position]) for position, value in solved.reads.outputs[number]),
        saved=_saved_nbytes(solved, number, ()),
        waiting=_waiting_nbytes(solved, number),
        workspace=workspace_nbytes(solved, number),
    )


def _is_gathered(solved: SolvedChain, parameter: Value) -> bool:
    """Whether some reader gathers the parameter from its parts, which then are cast as they are gathered."""
    tensor = solved.graph.tensor(parameter)
    for reader in dict.fromkeys(solved.graph.readers.get(parameter, ())):
        op = solved.graph.by_name[reader]
        needs = solved.sharding.outputs if op.kind is OpKind.OUTPUT else solved.needs(op)
        for operand, need in zip(op.operands, needs, strict=True):
            if operand == parameter:
                steps = solved.tables.steps(tensor, solved.made(parameter), need)
                if any(step.forward is Collective.ALL_GATHER for step, _ in steps):
                    return True
    return False


def recompute_memory(solved: SolvedChain, number: int, plain: BlockMemory, regions: Sequence[Sequence[str]]) -> BlockMemory:
    """The memory of block `number` when the backward runs regions of it again.

    Args:
        solved: the chain.
        number: of the block.
        plain: its memory without recomputation (`find_memory`).
        regions: sets of its calls, each run again in one go.
    """
    if not regions:
        return plain
    # While a region is run again, all that autograd saves of it is held.
    region_nbytes = max(_region_nbytes(solved, region) for region in regions)
    return replace(plain, saved=_saved_nbytes(solved, number, regions), workspace=plain.workspace + region_nbytes)


def _saved_nbytes(solved: SolvedChain, number: int, regions: Sequence[Sequence[str]]) -> int:
    """Bytes that a micro-batch saves of a block from its forward to its backward when these regions, sets of its calls, are run again.

    A value counts once per layout in which it is saved.
    """
    reads, readers = solved.reads, solved.graph.readers
    block = solved.chain.blocks[number]
    again = {name for region in regions for name in region}
    inside = set(block.ops)
    held: dict[tuple[Value, Layout], int] = {}
    read_again: list[Value] = []
    extra_nbytes = 0

    def hold(value: Value, layout: Layout) -> None:
        held[value, layout] = solved.nbytes(value, layout)

    for name in block.ops:
        op = solved.graph.by_name[name]
        # Values of other blocks and of cheap calls count with the first block that reads them, if they are saved or needed to run a call
        # again.
        for value in op.operands:
            if reads.first_reader.get(value) == number:
                if name in again or solved.is_saved(value):
                    hold(value, solved.made(value))
            elif name in again and value.op in inside and value.op not in again:
                read_again.append(value)
        if name in again:
            # Results that leave the region are inputs of the calls after it, and saved for these if autograd saves them.
            for value in op.values:
                leaves = any(reader in inside and reader not in again for reader in readers.get(value, ()))
                if leaves and solved.is_saved(value):
                    hold(value, solved.made(value))
            continue
        for value in op.values:
            # Results that no call of this block reads count with the first block that reads them, or with the outputs.
            is_read_here = any(reads.block_of.get(reader) == number for reader in readers.get(value, ()))
            if solved.is_saved(value) and is_read_here:
                hold(value, solved.made(value))
        extra_nbytes += -(-op.extra_saved_nbytes // solved.ways(op))
        for journey in solved.journeys(op):
            if solved.saves_copy(journey) and not solved.is_moved_before(number, journey.value, journey.need):
                hold(journey.value, journey.need)
    # What a region reads of its own block is held, unless it is a view of what is held already.
    for value in read_again:
        source = find_source(solved.graph, solved.model.spaces, value)
        if (source, solved.made(source)) not in held:
            hold(value, solved.made(value))
    return extra_nbytes + sum(held.values())


def _waiting_nbytes(solved: SolvedChain, number: int) -> int:
    """Bytes that a micro-batch's deferrable weight gradients need: activations that their calls read, gradients of their results."""
    total = 0
    for name in solved.chain.blocks[number].ops:
        if name in solved.reads.deferrable:
            op = solved.graph.by_name[name]
            read = {j.value: j.need for j in solved.journeys(op) if solved.graph.by_name[j.value.op].kind is OpKind.CALL}
            total += sum(solved.nbytes(value, need) for value, need in read.items())
            total += sum(solved.nbytes(value) for value in op.values)
    return total


def workspace_nbytes(solved: SolvedChain, number: int) -> int:
    """Bytes that a block needs while it runs: those of the call with most, for its operands, results, their gradients and its chunk.

    Parameters count only where they were moved for the call, as by ZeRO's gathers. What is in flight of gathers that are begun ahead, and
    of their gradients' sums, isn't counted here but in ``ahead``. An estimate: there is no liveness analysis.
    """
    largest, first_axis = 0, solved.tables.first_axis
    for name in solved.chain.blocks[number].ops:
        op = solved.graph.by_name[name]
        total = 2 * sum(solved.nbytes(value) for value in op.values)
        for value, need in dict.fromkeys(zip(op.operands, solved.needs(op), strict=True)):
            times = 2
            if solved.graph.by_name[value.op].kind is OpKind.PARAMETER:
                times = 0 if need[first_axis:] == solved.made(value)[first_axis:] else _times_held(solved, value, need)
            if times:
                total += times * solved.nbytes(value, need)
        largest = max(largest, total + _chunk_nbytes(solved, op))
    return largest


def _times_held(solved: SolvedChain, parameter: Value, need: Layout) -> int:
    """How many times a call needs the bytes of a parameter that was moved for it: the parameter and its gradient, unless in flight."""
    steps = solved.tables.steps(solved.graph.tensor(parameter), solved.made(parameter), need)
    if not solved.tables.ahead or not any(step.forward is Collective.ALL_GATHER for step, _ in steps):
        return 2
    return 0 if solved.runs_ahead else 1


def _chunk_nbytes(solved: SolvedChain, op: Op) -> int:
    """Bytes of what an op holds of one of its chunks (`Facts.workspace`)."""
    space = solved.model.spaces.get(op.name)
    if space is None or space.facts.workspace is None:
        return 0
    workspace = space.facts.workspace
    points = math.prod(space.loops[name].size for name in workspace.loops) // solved.ways(op)
    return workspace.itemsize * -(-points // workspace.chunks)


def _region_nbytes(solved: SolvedChain, region: Sequence[str]) -> int:
    """Bytes that a region saves for its backward while it is being run again."""
    total = 0
    for name in region:
        op = solved.graph.by_name[name]
        total += -(-op.extra_saved_nbytes // solved.ways(op))
        total += sum(solved.nbytes(value) for value in op.values if solved.is_saved(value))
        total += sum(solved.nbytes(journey.value, journey.need) for journey in solved.journeys(op) if solved.saves_copy(journey))
    return total
