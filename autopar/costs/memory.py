"""Bytes of a block on one rank, by kind: what is stored, what a micro-batch saves for its backward, what is needed while the block runs.

Memory follows what autograd saves. A value that a later block reads is counted by the first block that reads it, which holds it whatever
else is recomputed; results of a recomputed region that leave it for the same block count where autograd saves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autopar.costs.solved import SolvedChain
from autopar.costs.tables import OPTIMIZER_COPIES
from autopar.ir import Graph, Layout, Op, OpKind, Value
from autopar.structure import find_source


@dataclass(frozen=True, slots=True)
class BlockMemory:
    """Bytes of a block on one rank.

    Attributes:
        parameters, gradients, optimizer: of the parameters that the block reads; the optimizer's state of one that several blocks read
            is with the first.
        outputs: the user's outputs that the block makes, of the whole batch.
        saved: of a micro-batch, from its forward to its backward.
        waiting: of a micro-batch, from its input gradients to its weight gradients, where a schedule parts these.
        workspace: while the block runs.
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
    """Bytes of the inputs and buffers of a step: every rank has them whole, whatever is decided."""
    return sum(op.results[0].nbytes for kind in (OpKind.INPUT, OpKind.BUFFER) for op in graph.of_kind(kind))


def find_memory(solved: SolvedChain, number: int) -> BlockMemory:
    """The memory of a block of the chain when the backward runs nothing of it again."""
    parameters = gradients = optimizer = 0
    for name in solved.reads.parameters[number]:
        nbytes = solved.nbytes(Value(name))
        is_first = solved.reads.owner[name] == number
        if solved.is_one_stage and not is_first:
            continue
        parameters += nbytes
        if solved.graph.by_name[name].results[0].requires_grad:
            gradients += nbytes
            optimizer += OPTIMIZER_COPIES * nbytes if is_first else 0
    return BlockMemory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        outputs=sum(solved.nbytes(value, solved.sharding.outputs[position]) for position, value in solved.reads.outputs[number]),
        saved=_saved_nbytes(solved, number, ()),
        waiting=_waiting_nbytes(solved, number),
        workspace=workspace_nbytes(solved, number),
    )


def recompute_memory(solved: SolvedChain, number: int, plain: BlockMemory, regions: Sequence[Sequence[str]]) -> BlockMemory:
    """The memory of a block that takes `plain` without recomputation, when the backward runs these regions of it, sets of calls, again."""
    if not regions:
        return plain
    # A region that is being run again is there as a whole.
    region_nbytes = max(_region_nbytes(solved, region) for region in regions)
    return replace(plain, saved=_saved_nbytes(solved, number, regions), workspace=plain.workspace + region_nbytes)


def _saved_nbytes(solved: SolvedChain, number: int, regions: Sequence[Sequence[str]]) -> int:
    """Bytes that a micro-batch keeps between its forward and its backward when these regions are run again."""
    reads, readers = solved.reads, solved.graph.readers
    block = solved.chain.blocks[number]
    again = {name for region in regions for name in region}
    inside = set(block.ops)
    held: dict[tuple[Value, Layout], int] = {}
    read_again: list[Value] = []
    beside = 0

    def hold(value: Value, layout: Layout) -> None:
        held[value, layout] = solved.nbytes(value, layout)

    for name in block.ops:
        op = solved.graph.by_name[name]
        # What other blocks or no block made is held here, by the first that reads it, if anyone needs it again.
        for value in op.operands:
            if reads.first_reader.get(value) == number:
                if name in again or solved.is_saved(value):
                    hold(value, solved.made(value))
            elif name in again and value.op in inside and value.op not in again:
                read_again.append(value)
        if name in again:
            # Results that leave the region are inputs of what comes after, which saves them if autograd does.
            for value in _results(op):
                leaves = any(reader in inside and reader not in again for reader in readers.get(value, ()))
                if leaves and solved.is_saved(value):
                    hold(value, solved.made(value))
            continue
        for value in _results(op):
            # What the user gets of it is counted with the outputs.
            stays = any(reads.block_of.get(reader) == number for reader in readers.get(value, ()))
            if solved.is_saved(value) and stays:
                hold(value, solved.made(value))
        beside += -(-op.saved_nbytes // solved.ways(op))
        for journey in solved.journeys(op):
            if solved.saves_copy(journey) and not solved.is_moved_before(number, journey.value, journey.need):
                hold(journey.value, journey.need)
    for value in read_again:
        source = find_source(solved.graph, solved.model.spaces, value)
        if (source, solved.made(source)) not in held:
            hold(value, solved.made(value))
    return beside + sum(held.values())


def _results(op: Op) -> list[Value]:
    return [Value(op.name, index) for index in range(len(op.results))]


def _waiting_nbytes(solved: SolvedChain, number: int) -> int:
    """Bytes that wait for the weight gradients: inputs and output gradients of the calls that read weights."""
    total = 0
    for name in solved.chain.blocks[number].ops:
        if name in solved.reads.deferrable:
            op = solved.graph.by_name[name]
            read = {j.value: j.need for j in solved.journeys(op) if solved.graph.by_name[j.value.op].kind is OpKind.CALL}
            total += sum(solved.nbytes(value, need) for value, need in read.items())
            total += sum(solved.nbytes(value) for value in _results(op))
    return total


def workspace_nbytes(solved: SolvedChain, number: int) -> int:
    """Bytes that a block needs while it runs: the hungriest call's tensors and their gradients."""
    largest, first = 0, solved.tables.first
    for name in solved.chain.blocks[number].ops:
        op = solved.graph.by_name[name]
        total = sum(solved.nbytes(value) for value in _results(op))
        for value, need in dict.fromkeys(zip(op.operands, solved.needs(op), strict=True)):
            is_stored = solved.graph.by_name[value.op].kind is OpKind.PARAMETER
            if not is_stored or need[first:] != solved.made(value)[first:]:
                total += solved.nbytes(value, need)
        largest = max(largest, total)
    return 2 * largest


def _region_nbytes(solved: SolvedChain, region: Sequence[str]) -> int:
    """Bytes that a region saves for its backward while it is being run again."""
    total = 0
    for name in region:
        op = solved.graph.by_name[name]
        total += -(-op.saved_nbytes // solved.ways(op))
        total += sum(solved.nbytes(value) for value in _results(op) if solved.is_saved(value))
        total += sum(solved.nbytes(journey.value, journey.need) for journey in solved.journeys(op) if solved.saves_copy(journey))
    return total
