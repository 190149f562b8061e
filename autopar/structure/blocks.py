"""A folded graph -> its calls as a chain of blocks, which pipeline stages are runs of.

Comes in: a `Folded` and the spaces of its calls. Goes out: a `Chain`. Repeated layers are blocks of their own; what lies between them is
cut where few bytes are alive (``chain_cuts``). Every block says which values must be sent when a stage ends after it: those made up to its
end and read later. Calls that need no parameter and do little work (masks, position ids, rotary tables, shifted labels) are in no block:
every stage that needs them makes them for itself.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from autopar.ir import Graph, Op, OpKind, Space, Value
from autopar.structure.chain_cuts import cut_units
from autopar.structure.chain_order import Unit, order_units
from autopar.structure.layers import Folded, enclosing_modules
from autopar.structure.measures import count_elements, count_flops


@dataclass(frozen=True, slots=True)
class Block:
    """Calls that stay on one stage.

    Attributes:
        name: the path, with a number where a block before it has the same (``layers.1#2``); unique in its chain.
        path: module path of the layer, or of the module that does most of the work.
        ops: names of the calls, in the order in which they run.
        like: blocks with the same number have the same representatives: they are isomorphic, and planned as one.
        crossing: values made by this block or one before it and read by a later one: what is sent when a stage ends after this block.
    """

    name: str
    path: str
    ops: tuple[str, ...]
    like: int
    crossing: tuple[Value, ...]


@dataclass(frozen=True)
class Chain:
    """All calls of a graph.

    Attributes:
        blocks: in the order in which they run.
        cheap: the calls in no block, which every stage that needs their results makes for itself.
    """

    blocks: tuple[Block, ...]
    cheap: frozenset[str]


# Calls are made again on every stage only when each makes at most this share of the elements that calls with parameters make: one pass over
# memory is cheaper than a message, but many large ones add up.
CHEAP_SHARE = 0.1


def find_chain(folded: Folded, spaces: Mapping[str, Space]) -> Chain:
    """Cut the calls of `folded.graph` into a chain of blocks; `spaces` gives the space of every call that has a rule."""
    cheap = _find_cheap(folded, spaces)
    calls = [op for op in folded.graph.of_kind(OpKind.CALL) if op.name not in cheap]
    return Chain(_make_blocks(folded, spaces, cut_units(folded, spaces, order_units(folded, spaces, calls))), cheap)


def relabel(chain: Chain, folded: Folded) -> Chain:
    """The same chain for another folding of its graph: `Block.like` is the same only where this one has the same representatives."""
    likes: dict[tuple[str, ...], int] = {}
    blocks = (replace(block, like=_number_like(block.ops, folded, likes)) for block in chain.blocks)
    return replace(chain, blocks=tuple(blocks))


def _number_like(ops: Iterable[str], folded: Folded, likes: dict[tuple[str, ...], int]) -> int:
    """`Block.like` of a block of these calls: `likes` numbers every sequence of representatives, in the order in which they are met."""
    return likes.setdefault(tuple(folded.representative[name] for name in ops), len(likes))


def _find_cheap(folded: Folded, spaces: Mapping[str, Space]) -> frozenset[str]:
    """Calls of little work that depend on inputs and buffers only; of the ops that one representative stands for either all or none."""
    graph = folded.graph
    calls = graph.of_kind(OpKind.CALL)
    without_parameters = {op.name for op in graph.ops if op.kind in (OpKind.INPUT, OpKind.BUFFER)}
    for op in calls:
        if all(value.op in without_parameters for value in op.operands):
            without_parameters.add(op.name)
    limit = CHEAP_SHARE * sum(count_elements(op) for op in calls if op.name not in without_parameters)
    # The new value of a buffer is made once, where the layer is that has the buffer.
    makes_update = {value.op for value in graph.updates.values()}

    def is_light(op: Op) -> bool:
        space = spaces.get(op.name)
        is_simple = space is not None and not space.is_contraction and not space.random
        return is_simple and op.name not in makes_update and count_elements(op) <= limit

    barred: set[str] = set()  # representatives
    while True:
        cheap: set[str] = set()
        for op in calls:
            is_local = all(value.op in cheap or graph.by_name[value.op].kind in (OpKind.INPUT, OpKind.BUFFER) for value in op.operands)
            if is_local and is_light(op) and folded.representative[op.name] not in barred:
                cheap.add(op.name)
        # A call of the first layer may read an input where those of the others read the layer before: it isn't cheap then, as they aren't.
        in_blocks = {folded.representative[op.name] for op in calls if op.name not in cheap}
        if not any(folded.representative[name] in in_blocks for name in cheap):
            return frozenset(cheap)
        barred |= in_blocks


def _make_blocks(folded: Folded, spaces: Mapping[str, Space], units: Sequence[Unit]) -> tuple[Block, ...]:
    """A block of every unit; the units are in the order in which they run."""
    crossing = _find_crossing(folded.graph, units)
    paths = _find_paths(folded.graph, spaces, units)
    likes: dict[tuple[str, ...], int] = {}
    return tuple(
        Block(
            name=name,
            path=path,
            ops=tuple(op.name for op in unit.ops),
            like=_number_like((op.name for op in unit.ops), folded, likes),
            crossing=tuple(values),
        )
        for name, path, unit, values in zip(_number(paths), paths, units, crossing, strict=True)
    )


def _find_crossing(graph: Graph, units: Sequence[Unit]) -> list[list[Value]]:
    """Per unit the values that it or one before it makes and a later one reads, in the order in which the graph makes them."""
    unit_of = {op.name: number for number, unit in enumerate(units) for op in unit.ops}
    crossing: list[list[Value]] = [[] for _ in units]
    for value in (value for op in graph.ops if op.name in unit_of for value in op.values):
        maker = unit_of[value.op]
        last_reader = max((unit_of[reader] for reader in graph.readers.get(value, ()) if reader in unit_of), default=maker)
        for number in range(maker, last_reader):
            crossing[number].append(value)
    return crossing


def _find_paths(graph: Graph, spaces: Mapping[str, Space], units: Sequence[Unit]) -> list[str]:
    """Per unit the path of its layer, or of the module that does most of its work."""
    calls_in = Counter(path for unit in units for op in unit.ops for path in enclosing_modules(op.layer))
    position = {op.name: index for index, op in enumerate(graph.ops)}
    return [unit.path or _find_main_module(graph, spaces, sorted(unit.ops, key=lambda op: position[op.name]), calls_in) for unit in units]


def _number(paths: Sequence[str]) -> list[str]:
    """The paths, from the second of the same on with a number: ``layers.1``, ``layers.1#2``."""
    names: list[str] = []
    used: Counter[str] = Counter()
    for path in paths:
        used[path] += 1
        names.append(path if used[path] == 1 else f"{path}#{used[path]}")
    return names


def _find_main_module(graph: Graph, spaces: Mapping[str, Space], ops: Sequence[Op], calls_in: Mapping[str, int]) -> str:
    """The module that does most of the work of `ops`, among those with all their calls in `ops`.

    Most work is most flops of products, then most elements of parameters; of equals the outermost module, then the first. A call none of
    whose modules is whole counts for its own module or, at the root, for the parameter that it reads.

    Args:
        graph: the whole graph.
        spaces: of every call that has a rule.
        ops: calls, in the graph's order.
        calls_in: number of calls of every module in the whole graph.
    """
    calls_here = Counter(path for op in ops for path in enclosing_modules(op.layer))
    work: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # module -> flops of products, elements of parameters
    for op in ops:
        parameters = [graph.by_name[value.op] for value in op.operands if graph.by_name[value.op].kind is OpKind.PARAMETER]
        is_product = op.name in spaces and spaces[op.name].is_product
        whole = [path for path in enclosing_modules(op.layer) if calls_here[path] == calls_in[path]]
        for path in whole or [op.layer or (parameters[0].target if parameters else op.name)]:
            work[path][0] += count_flops(spaces, op) if is_product else 0.0
            work[path][1] += sum(map(count_elements, parameters))
    return max(work, key=lambda path: (*work[path], -len(path)))
