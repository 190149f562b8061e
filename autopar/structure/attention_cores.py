"""The attention cores of a block: what selective recomputation runs again.

From the product that makes the scores over the softmax to the product with the values: most of what attention keeps and little of
what it computes (Korthikanti et al. 2022, section 5). A fused attention op is a core of its own; it keeps next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from autopar.ir import Family, Graph, Op, OpKind, Space


def find_cores(graph: Graph, spaces: Mapping[str, Space], names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The cores among the calls `names`, which run in this order; each is a set of calls that can run in one go."""
    inside = set(names)
    taken: set[str] = set()
    cores: list[tuple[str, ...]] = []
    readers: dict[str, list[str]] = {}
    for name in names:
        for value in graph.by_name[name].operands:
            readers.setdefault(value.op, []).append(name)
    for name in names:
        space = spaces.get(name)
        if name in taken or space is None:
            continue
        if space.family is Family.ATTENTION:
            core = {name}
        elif space.facts.softmax:
            core = _around(graph, spaces, name, inside, readers)
        else:
            continue
        if core and not core & taken and _runs_in_one_go(graph, names, core):
            cores.append(tuple(one for one in names if one in core))
            taken |= core
    return tuple(cores)


def _around(graph: Graph, spaces: Mapping[str, Space], start: str, inside: set[str], readers: Mapping[str, list[str]]) -> set[str]:
    """The calls around a softmax up to the nearest products without a parameter, both included; empty without such products."""
    before = _walk(graph, spaces, start, inside, lambda op: [value.op for value in op.operands])
    after = _walk(graph, spaces, start, inside, lambda op: readers.get(op.name, []))
    products = [{name for name in walked if _is_product(graph, spaces, name)} for walked in (before, after)]
    return before | after if all(products) else set()


def _walk(graph: Graph, spaces: Mapping[str, Space], start: str, inside: set[str], step: Callable[[Op], Iterable[str]]) -> set[str]:
    found = {start}
    waiting = [start]
    while waiting:
        for name in step(graph.by_name[waiting.pop()]):
            if name in found or name not in inside or name not in spaces or _reads_parameter(graph, name):
                continue
            found.add(name)
            if not _is_product(graph, spaces, name):
                waiting.append(name)
    return found


def _is_product(graph: Graph, spaces: Mapping[str, Space], name: str) -> bool:
    return spaces[name].family is Family.MATMUL


def _reads_parameter(graph: Graph, name: str) -> bool:
    return any(graph.by_name[value.op].kind is OpKind.PARAMETER for value in graph.by_name[name].operands)


def _runs_in_one_go(graph: Graph, names: Sequence[str], core: set[str]) -> bool:
    """Whether nothing that the core needs depends on a part of it by way of calls outside."""
    tainted: set[str] = set()
    for name in names:
        before = {value.op for value in graph.by_name[name].operands}
        if name in core:
            if before & tainted:
                return False
        elif before & (core | tainted):
            tainted.add(name)
    return True
