"""Who reads what in a chain of blocks, whatever is decided about it: what crosses, what is shared, what is computed again."""

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
        block_of: call -> the number of its block, for the calls that are in one.
        first_reader: values that cross from one block to another, or that every stage makes for itself -> the first block that reads
            them, after their own.
        first_read: per block the values whose first reader it is.
        made_again: per block the values that a stage which begins behind it makes for itself although this block or one before it has
            read them.
        outputs: per block the outputs that it makes, as (position, value).
        cheap: per block the calls in no block whose results it is the first to need.
        deferrable: calls whose weight gradients can wait for a pass of their own.
        parameters: per block the parameters that it reads; the last block has those that no block reads too.
        owner: parameter -> the first block that has it: the optimizer's state is there.
        shared: per block its calls' operands, as (call, operand), whose values are read in other blocks too and are no parameters.
    """

    block_of: Mapping[str, int]
    first_reader: Mapping[Value, int]
    first_read: tuple[tuple[Value, ...], ...]
    made_again: tuple[tuple[Value, ...], ...]
    outputs: tuple[tuple[tuple[int, Value], ...], ...]
    cheap: tuple[tuple[str, ...], ...]
    deferrable: frozenset[str]
    parameters: tuple[tuple[str, ...], ...]
    owner: Mapping[str, int]
    shared: tuple[tuple[tuple[str, int], ...], ...]


def read_chain(graph: Graph, spaces: Mapping[str, Space], chain: Chain) -> ChainReads:
    """Read a chain of blocks of `graph`, whose calls have these spaces."""
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
    return ChainReads(
        block_of=block_of,
        first_reader=first_reader,
        first_read=_freeze(first_read),
        made_again=_freeze(made_again),
        outputs=_freeze(outputs),
        cheap=_find_cheap_calls(graph, chain, block_of),
        deferrable=frozenset(name for name in block_of if is_deferrable(graph, spaces, graph.by_name[name])),
        parameters=parameters,
        owner={name: number for number in reversed(range(len(parameters))) for name in parameters[number]},
        shared=_find_shared_operands(graph, chain, block_of),
    )


def _freeze(lists: Sequence[Sequence[T]]) -> tuple[tuple[T, ...], ...]:
    return tuple(map(tuple, lists))


def _reading_blocks(graph: Graph, value: Value, block_of: Mapping[str, int]) -> set[int]:
    return {block_of[name] for name in graph.readers.get(value, ()) if name in block_of}


def _find_first_readers(graph: Graph, chain: Chain, block_of: Mapping[str, int]) -> tuple[dict[Value, int], list[list[Value]]]:
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
    needed_by: dict[str, int] = dict(block_of)
    cheap: list[list[str]] = [[] for _ in chain.blocks]
    for op in reversed(graph.ops):
        if op.name in chain.cheap:
            readers = [name for index in range(len(op.results)) for name in graph.readers.get(Value(op.name, index), ())]
            if blocks := [needed_by[name] for name in readers if name in needed_by]:
                needed_by[op.name] = min(blocks)
                cheap[min(blocks)].append(op.name)
    return _freeze(cheap)


def _find_parameters(graph: Graph, chain: Chain, block_of: Mapping[str, int]) -> tuple[tuple[str, ...], ...]:
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
    is_shared = {
        value
        for value in graph.readers
        if graph.by_name[value.op].kind is not OpKind.PARAMETER and len(_reading_blocks(graph, value, block_of)) > 1
    }
    return tuple(
        tuple((name, index) for name in block.ops for index, value in enumerate(graph.by_name[name].operands) if value in is_shared)
        for block in chain.blocks
    )
