"""Blocks on stages -> what each stage runs, what it receives and sends: a directed graph of stages.

A value that crosses a cut travels from the stage that makes it straight to every stage that reads it, however far that is. What needs no
parameter and costs little is made again where it is needed; parameters, buffers and inputs are read where they are used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autopar.ir import Graph, OpKind, Value
from autopar.schedules import StageEdge
from autopar.structure import Chain


@dataclass(frozen=True)
class Stage:
    """What one stage runs.

    Attributes:
        calls: names of the calls, in the order in which they run.
        stored: names of the parameters and buffers that they read, in graph order.
        receives: per stage before, the values that come from it; `sends`: per stage after, the values that go to it.
        outputs: positions of the graph's outputs that this stage makes.
    """

    calls: tuple[str, ...]
    stored: tuple[str, ...]
    receives: Mapping[int, tuple[Value, ...]]
    sends: Mapping[int, tuple[Value, ...]]
    outputs: tuple[int, ...]


def partition(graph: Graph, chain: Chain, stage_of: Sequence[int]) -> tuple[Stage, ...]:
    """The stages that result when block ``i`` of the chain is on stage ``stage_of[i]``; these ascend from 0 without gaps."""
    count = max(stage_of) + 1
    home = {name: stage for block, stage in zip(chain.blocks, stage_of, strict=True) for name in block.ops}
    calls: list[list[str]] = [[] for _ in range(count)]
    for block, stage in zip(chain.blocks, stage_of, strict=True):
        calls[stage] += block.ops
    (output,) = graph.of_kind(OpKind.OUTPUT)
    outputs: list[list[int]] = [[] for _ in range(count)]
    for position, value in enumerate(output.operands):
        # What no stage makes (an input that is returned, a table) comes from the last.
        outputs[home.get(value.op, count - 1)].append(position)
    order = {op.name: position for position, op in enumerate(graph.ops)}
    crossing: dict[tuple[int, int], set[Value]] = defaultdict(set)
    stages: list[Stage] = []
    stored: list[list[str]] = []
    for stage in range(count):
        again = _cheap_before(graph, chain.cheap, [*calls[stage], *(output.operands[i].op for i in outputs[stage])])
        calls[stage] = [*sorted(again, key=order.__getitem__), *calls[stage]]
        reads = [value for name in calls[stage] for value in graph.by_name[name].operands]
        reads += [output.operands[i] for i in outputs[stage]]
        for value in reads:
            if value.op in home and home[value.op] != stage:
                crossing[home[value.op], stage].add(value)
        kept = {value.op for value in reads if graph.by_name[value.op].kind in (OpKind.PARAMETER, OpKind.BUFFER)}
        stored.append(sorted(kept, key=order.__getitem__))

    def between(start: int, end: int) -> tuple[Value, ...]:
        return tuple(sorted(crossing[start, end], key=lambda value: (order[value.op], value.index)))

    pairs = sorted(crossing)
    for stage in range(count):
        stages.append(
            Stage(
                calls=tuple(calls[stage]),
                stored=tuple(stored[stage]),
                receives={start: between(start, end) for start, end in pairs if end == stage},
                sends={end: between(start, end) for start, end in pairs if start == stage},
                outputs=tuple(outputs[stage]),
            )
        )
    return tuple(stages)


def edges_of(graph: Graph, stages: Sequence[Stage]) -> tuple[StageEdge, ...]:
    """Which stage waits for which, and whether a gradient comes back."""
    return tuple(
        StageEdge(start, end, any(graph.tensor(value).requires_grad for value in values))
        for start, stage in enumerate(stages)
        for end, values in stage.sends.items()
    )


def _cheap_before(graph: Graph, cheap: frozenset[str], names: Sequence[str]) -> set[str]:
    """The cheap calls that these calls need, directly or through others."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in cheap:
            if name in found:
                continue
            found.add(name)
        waiting += [value.op for value in graph.by_name[name].operands if value.op in cheap]
    return found
