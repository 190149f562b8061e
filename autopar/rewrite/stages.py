"""Cuts a graph into the stages of a pipeline: which calls each stage runs, what it receives and what it sends.

Comes in: a graph, its chain of blocks and the stage of every block. Goes out: a `Stage` per stage, and the edges between them.

A value that crosses a cut is sent by the stage that makes it straight to every stage that reads it, however many stages lie between. Calls
that need no parameter and cost little (`Chain.cheap`) are made again on every stage that needs them. Parameters, buffers and inputs are
never sent: they are read where they are used.
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
        receives: number of an earlier stage -> the values that come from it.
        sends: number of a later stage -> the values that go to it.
        outputs: positions of the graph's outputs that this stage makes.
    """

    calls: tuple[str, ...]
    stored: tuple[str, ...]
    receives: Mapping[int, tuple[Value, ...]]
    sends: Mapping[int, tuple[Value, ...]]
    outputs: tuple[int, ...]

    @property
    def received(self) -> tuple[Value, ...]:
        """All values that come from other stages, in order of these stages."""
        return tuple(value for producer in sorted(self.receives) for value in self.receives[producer])

    @property
    def sent(self) -> tuple[Value, ...]:
        """All values that go to other stages, each once, in order of these stages."""
        return tuple(dict.fromkeys(value for consumer in sorted(self.sends) for value in self.sends[consumer]))


def partition(graph: Graph, chain: Chain, stage_of: Sequence[int]) -> tuple[Stage, ...]:
    """The stages that result when block ``i`` of `chain` is on stage ``stage_of[i]``.

    Before, a graph and its blocks on stages 0 and 1, with a `mask` that is cheap::

        stage 0:  h = block_0(x, mask(x))
        stage 1:  y = block_1(h, mask(x));  return y

    After::

        Stage(calls=("mask", "h"), receives={}, sends={1: (h,)}, outputs=())
        Stage(calls=("mask", "y"), receives={0: (h,)}, sends={}, outputs=(0,))

    Args:
        graph: the whole graph.
        chain: its blocks.
        stage_of: ascends from 0 without gaps.
    """
    stages = range(max(stage_of) + 1)
    stage_of_call = {name: stage for block, stage in zip(chain.blocks, stage_of, strict=True) for name in block.ops}
    outputs: list[list[int]] = [[] for _ in stages]
    for position, value in enumerate(graph.output.operands):
        # What no block makes (an input that is returned, a table) is returned by the last stage.
        outputs[stage_of_call.get(value.op, stages[-1])].append(position)
    order = {op.name: position for position, op in enumerate(graph.ops)}
    calls: list[list[str]] = []
    reads: list[list[Value]] = []
    crossing: dict[tuple[int, int], set[Value]] = defaultdict(set)
    for stage in stages:
        own = [name for block, number in zip(chain.blocks, stage_of, strict=True) if number == stage for name in block.ops]
        returned = [graph.output.operands[position] for position in outputs[stage]]
        cheap = _find_cheap(graph, chain.cheap, [*own, *(value.op for value in returned)])
        calls.append([*sorted(cheap, key=order.__getitem__), *own])
        reads.append([*(value for name in calls[stage] for value in graph.by_name[name].operands), *returned])
        for value in reads[stage]:
            producer = stage_of_call.get(value.op, stage)
            if producer != stage:
                crossing[producer, stage].add(value)
    edges = {edge: tuple(sorted(crossing[edge], key=lambda value: (order[value.op], value.index))) for edge in sorted(crossing)}
    return tuple(
        Stage(
            calls=tuple(calls[stage]),
            stored=_find_stored(graph, reads[stage], order),
            receives={producer: values for (producer, consumer), values in edges.items() if consumer == stage},
            sends={consumer: values for (producer, consumer), values in edges.items() if producer == stage},
            outputs=tuple(outputs[stage]),
        )
        for stage in stages
    )


def edges_of(graph: Graph, stages: Sequence[Stage]) -> tuple[StageEdge, ...]:
    """Which stage waits for which, and whether a gradient is sent back."""
    return tuple(
        StageEdge(producer, consumer, any(graph.tensor(value).requires_grad for value in values))
        for producer, stage in enumerate(stages)
        for consumer, values in stage.sends.items()
    )


def _find_stored(graph: Graph, reads: Sequence[Value], order: Mapping[str, int]) -> tuple[str, ...]:
    """The parameters and buffers among the values that a stage reads."""
    stored = {value.op for value in reads if graph.by_name[value.op].kind in (OpKind.PARAMETER, OpKind.BUFFER)}
    return tuple(sorted(stored, key=order.__getitem__))


def _find_cheap(graph: Graph, cheap: frozenset[str], names: Sequence[str]) -> set[str]:
    """The cheap calls among ops called `names` and among what these need, directly or through other cheap calls."""
    needed: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop()
        if name in cheap:
            if name in needed:
                continue
            needed.add(name)
        pending += [value.op for value in graph.by_name[name].operands if value.op in cheap]
    return needed
