"""Who reads what in a chain of blocks, before anything is decided about it.

Comes in: a `Graph` and its `Chain`. Goes out: a `ChainReads`, from which the costs know in which block a value, a parameter or an output
counts, so that none counts twice, and what a stage holds when it begins after any block. Blocks are given by their number in the chain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from autopar.ir import Graph, OpKind, Space, Value
from autopar.structure.blocks import Chain
from autopar.structure.weights import is_deferrable

T = TypeVar("T")


@dataclass(frozen=True)
class ChainReads:
    """Who reads what in a chain of blocks.

    Attributes:
        block_of: call -> the block that it is in; cheap calls are in none.
        first_reader: value that crosses between blocks, or that a cheap call makes and a block reads -> the first block that reads it,
            other than the block that makes it.
        first_read: per block the values whose first reader it is.
        made_again: per block the values of cheap calls that this block or one before it reads, and a later one too: a stage that begins
            after this block makes them again.
        outputs: per block the outputs that it makes, as (position among the graph's outputs, value).
        cheap: per block the cheap calls that it is the first to need, directly or for another cheap call, in reverse order of running.
        deferrable: calls whose weight gradients can wait for a pass of its own (`is_deferrable`).
        parameters: per block the parameters that it reads; the last block also has those that no block reads.
        first_block: parameter -> the first block that has it in `parameters`: its optimizer state counts there. The program follows the
            same rule: `Slot.owner` is the first pipeline rank that uses it.
        last_block: parameter -> the last block that has it in `parameters`: its backward makes the first summand of its gradient.
        tied: parameters of several blocks, such as the table of an embedding that is the head too.
        shared: per block its operands, as (call, number of the operand), whose values other blocks read too and which aren't parameters.
    """

    block_of: Mapping[str, int]
    first_reader: Mapping[Value, int]
    first_read: tuple[tuple[Value, ...], ...]
    made_again: tuple[tuple[Value, ...], ...]
    outputs: tuple[tuple[tuple[int, Value], ...], ...]
    cheap: tuple[tuple[str, ...], ...]
    deferrable: frozenset[str]
    parameters: tuple[tuple[str, ...], ...]
    first_block: Mapping[str, int]
    last_block: Mapping[str, int]
    tied: tuple[str, ...]
    shared: tuple[tuple[tuple[str, int], ...], ...]


def read_chain(graph: Graph, spaces: Mapping[str, Space], chain: Chain) -> ChainReads:
    """Find who reads what in `chain`, the blocks of `graph`; `spaces` gives the space of every call that has a rule."""
    block_of = {name: number for number, block in enumerate(chain.blocks) for name in block.ops}
    first_reader, made_again = _find_first_readers(graph, chain, block_of)
    first_read: list[list[Value]] = [[] for _ in chain.blocks]
    for value, number in first_reader.items():
        first_read[number].append(value)
    outputs: list[list[tuple[int, Value]]] = [[] for _ in chain.blocks]
    for position, value in enumerate(graph.output.operands):
        if value.op in block_of:
            outputs[block_of[value.op]].append((position, value))
    parameters = _find_parameters(graph, chain, block_of)
    first_block = {name: number for number in reversed(range(len(parameters))) for name in parameters[number]}
    last_block = {name: number for number, names in enumerate(parameters) for name in names}
    return ChainReads(
        block_of=block_of,
        first_reader=first_reader,
        first_read=_freeze(first_read),
        made_again=_freeze(made_again),
        outputs=_freeze(outputs),
        cheap=_find_cheap_calls(graph, chain, block_of),
        deferrable=frozenset(name for name in block_of if is_deferrable(graph, spaces, graph.by_name[name])),
        parameters=parameters,
        first_block=first_block,
        last_block=last_block,
        tied=tuple(name for name, last in last_block.items() if first_block[name] < last),
        shared=_find_shared_operands(graph, chain, block_of),
    )


def _freeze(lists: Sequence[Sequence[T]]) -> tuple[tuple[T, ...], ...]:
    return tuple(map(tuple, lists))


def _reading_blocks(graph: Graph, value: Value, block_of: Mapping[str, int]) -> set[int]:
    """The blocks that read a value."""
    return {block_of[name] for name in graph.readers.get(value, ()) if name in block_of}


def _find_first_readers(graph: Graph, chain: Chain, block_of: Mapping[str, int]) -> tuple[dict[Value, int], list[list[Value]]]:
    """`ChainReads.first_reader` and `made_again`."""
    first_reader: dict[Value, int] = {}
    for value in dict.fromkeys(value for block in chain.blocks for value in block.crossing):
        first_reader[value] = min(_reading_blocks(graph, value, block_of) - {block_of[value.op]}, default=block_of[value.op])
    made_again: list[list[Value]] = [[] for _ in chain.blocks]
    for value in graph.readers:
        blocks = _reading_blocks(graph, value, block_of)
        if value.op in chain.cheap and blocks:
            first_reader[value] = min(blocks)
            for number in range(min(blocks), max(blocks)):
                made_again[number].append(value)
    return first_reader, made_again


def _find_cheap_calls(graph: Graph, chain: Chain, block_of: Mapping[str, int]) -> tuple[tuple[str, ...], ...]:
    """`ChainReads.cheap`: readers are looked at before what they read, so that their need is known."""
    needed_by: dict[str, int] = dict(block_of)
    cheap: list[list[str]] = [[] for _ in chain.blocks]
    for op in reversed(graph.ops):
        if op.name in chain.cheap:
            readers = [name for value in op.values for name in graph.readers.get(value, ())]
            if blocks := [needed_by[name] for name in readers if name in needed_by]:
                needed_by[op.name] = min(blocks)
                cheap[min(blocks)].append(op.name)
    return _freeze(cheap)


def _find_parameters(graph: Graph, chain: Chain, block_of: Mapping[str, int]) -> tuple[tuple[str, ...], ...]:
    """`ChainReads.parameters`."""
    parameters: list[dict[str, None]] = [{} for _ in chain.blocks]
    for number, block in enumerate(chain.blocks):
        for value in (value for name in block.ops for value in graph.by_name[name].operands):
            if graph.by_name[value.op].kind is OpKind.PARAMETER:
                parameters[number][value.op] = None
    for op in graph.of_kind(OpKind.PARAMETER) if chain.blocks else ():
        if not _reading_blocks(graph, Value(op.name), block_of):
            parameters[-1][op.name] = None
    return tuple(map(tuple, parameters))


def _find_shared_operands(graph: Graph, chain: Chain, block_of: Mapping[str, int]) -> tuple[tuple[tuple[str, int], ...], ...]:
    """`ChainReads.shared`."""
    is_shared = {
        value
        for value in graph.readers
        if graph.by_name[value.op].kind is not OpKind.PARAMETER and len(_reading_blocks(graph, value, block_of)) > 1
    }
    return tuple(
        tuple((name, index) for name in block.ops for index, value in enumerate(graph.by_name[name].operands) if value in is_shared)
        for block in chain.blocks
    )
