"""The attention cores of a block: the calls that selective recomputation runs again.

Comes in: the calls of a block, in the order in which they run. Goes out: sets of calls, each of which can run in one go.

A core is ``softmax(q k^T) v`` with all that is between: from the product that makes the scores over the softmax to the product with the
values. It holds most of what an attention saves and little of what it computes (Korthikanti et al. 2022, "Reducing Activation
Recomputation in Large Transformer Models", section 5). A fused attention operator is a core of its own; it saves little beside its
operands and result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from autopar.ir import Family, Graph, Op, OpKind, Space


def find_cores(graph: Graph, spaces: Mapping[str, Space], names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The attention cores among some calls of a graph.

    Args:
        graph: the whole graph.
        spaces: of every call that has a rule.
        names: the calls, in the order in which they run.

    Returns:
        The cores, each as names of calls in this order. No two cores have a call in common.
    """
    inside = set(names)
    in_cores: set[str] = set()
    cores: list[tuple[str, ...]] = []
    for name in names:
        space = spaces.get(name)
        if name in in_cores or space is None:
            continue
        if space.family is Family.ATTENTION:
            core = {name}
        elif space.facts.softmax:
            core = _surround(graph, spaces, name, inside)
        else:
            continue
        if core and not core & in_cores and _runs_in_one_go(graph, names, core):
            cores.append(tuple(name for name in names if name in core))
            in_cores |= core
    return tuple(cores)


def _surround(graph: Graph, spaces: Mapping[str, Space], softmax: str, inside: set[str]) -> set[str]:
    """A softmax with the calls around it up to and with the nearest products of activations; empty if one side has no such product."""

    def producers(op: Op) -> Iterable[str]:
        return (value.op for value in op.operands)

    def readers(op: Op) -> Iterable[str]:
        return (reader for value in op.values for reader in graph.readers.get(value, ()))

    before = _walk(graph, spaces, softmax, inside, producers)
    after = _walk(graph, spaces, softmax, inside, readers)
    has_products = all(any(_is_product(spaces, name) for name in calls) for calls in (before, after))
    return before | after if has_products else set()


def _walk(graph: Graph, spaces: Mapping[str, Space], start: str, inside: set[str], neighbours: Callable[[Op], Iterable[str]]) -> set[str]:
    """Calls of `inside` that can be reached from `start`; not past products, not past calls without a rule or that read a parameter."""
    reached = {start}
    pending = [start]
    while pending:
        for name in neighbours(graph.by_name[pending.pop()]):
            if name in reached or name not in inside or name not in spaces or _reads_parameter(graph, name):
                continue
            reached.add(name)
            if not _is_product(spaces, name):
                pending.append(name)
    return reached


def _is_product(spaces: Mapping[str, Space], name: str) -> bool:
    return spaces[name].family is Family.MATMUL


def _reads_parameter(graph: Graph, name: str) -> bool:
    return any(graph.by_name[value.op].kind is OpKind.PARAMETER for value in graph.by_name[name].operands)


def _runs_in_one_go(graph: Graph, names: Sequence[str], core: set[str]) -> bool:
    """Whether no call outside of the core, among `names` in their order, is between two calls of the core."""
    depends_on_core: set[str] = set()
    for name in names:
        producers = {value.op for value in graph.by_name[name].operands}
        if name in core:
            if producers & depends_on_core:
                return False
        elif producers & (core | depends_on_core):
            depends_on_core.add(name)
    return True
