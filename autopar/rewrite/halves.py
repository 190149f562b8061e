"""The whole program in two halves of the batch, one of which computes while the other one's ranks exchange.

Comes in: a `PlannedGraph` and its chain of blocks. Goes out: the graph of a program for the whole batch. The halves are two micro-batches
(`autopar.structure.split_microbatches`), with one difference: both are in one graph, so their calls can take turns. Known as nano-batches
(NanoFlow, Zhu et al. 2024), two-batch or dual-batch overlap (DeepSeek-V3, 2024, section 3.2), or Domino (Wang et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, cast

from torch import fx

from autopar.ir import HALVES, MICROBATCH, OpKind, Space, StateKind
from autopar.ops import collectives, exchanges
from autopar.rewrite.graphs import build_prologue, build_stage
from autopar.rewrite.planned import PlannedGraph
from autopar.rewrite.program import StageOutput
from autopar.rewrite.slots import find_stage_outputs
from autopar.rewrite.stages import partition
from autopar.rewrite.whole_batch import find_batch_values, with_prologue
from autopar.structure import Chain


def build_halves(planned: PlannedGraph, chain: Chain) -> fx.GraphModule:
    """The whole graph on the two halves of the batch, for `planned` with two micro-batches.

    Before, the program of a micro-batch, whose axis `tp` splits the features between two products::

        def forward(up_weight, down_weight, x):
            take_microbatch = take_microbatch(x, 'micro', 0, 1)
            up = linear(take_microbatch, up_weight)
            down = linear(up, down_weight)
            all_reduce = all_reduce(down, 'tp')
            relu = relu(all_reduce)
            return (relu,)

    After::

        def forward(up_weight, down_weight, x):
            take_microbatch = take_microbatch(x, 'half_0', 0, 1)
            up = linear(take_microbatch, up_weight)
            down = linear(up, down_weight)
            begin = begin('all_reduce', down, 'tp')
            take_microbatch_1 = take_microbatch(x, 'half_1', 0, 1)
            up_1 = linear(take_microbatch_1, up_weight)
            down_1 = linear(up_1, down_weight)
            begin_1 = begin('all_reduce', down_1, 'tp')
            all_reduce = end(begin)
            relu = relu(all_reduce)
            all_reduce_1 = end(begin_1)
            relu_1 = relu(all_reduce_1)
            join_halves = join_halves(relu, relu_1, 0, 1)
            return (join_halves,)

    What both halves would compute alike, such as gathered parameters and what needs the whole batch, stands there once.
    """
    (stage,) = partition(planned.graph, chain, [0] * len(chain.blocks))
    stage = with_prologue(planned, stage)
    batch_values = find_batch_values(planned, stage)
    unrolling = _Unrolling(planned)
    one_half = build_stage(planned, stage, batch_values, splits_backward=False)
    whole = unrolling.inline(build_prologue(planned, stage, batch_values).graph) if batch_values else ()
    return unrolling.run(one_half.graph, whole, find_stage_outputs(planned, stage))


class _Unrolling:
    """The graph of a program in halves while it is made."""

    def __init__(self, planned: PlannedGraph) -> None:
        self._planned = planned
        self._graph = fx.Graph()
        self._placeholders: dict[str, fx.Node] = {}
        # Axis of a half -> its last collective that exchanges only gradients.
        self._begun: dict[str, fx.Node] = {}
        for kind in (OpKind.PARAMETER, OpKind.BUFFER, OpKind.INPUT):
            for op in planned.graph.of_kind(kind):
                node = self._placeholders[op.name] = self._graph.placeholder(op.name)
                node.meta["block"] = None

    def inline(self, graph: fx.Graph) -> Sequence[fx.Node]:
        """Append the calls of a graph for the whole batch; the nodes that are its results."""
        copies: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                copies[node] = self._placeholders[node.name]
            elif node.op != "output":
                copies[node] = self._graph.node_copy(node, copies.__getitem__)
        return [copies[node] for node in _results_of(graph)]

    def run(self, graph: fx.Graph, whole: Sequence[fx.Node], outputs: Sequence[StageOutput]) -> fx.GraphModule:
        """The module of the program, given the graph of one half, what it needs of the whole batch, and what its results are."""
        shared: dict[fx.Node, fx.Node] = {}
        given = iter(whole)
        for node in graph.find_nodes(op="placeholder"):
            shared[node] = self._placeholders[node.name] if node.name in self._placeholders else next(given)
        own = _find_own(graph)
        halves: tuple[dict[fx.Node, fx.Node], ...] = (dict(shared), dict(shared))
        for half, part in _take_turns(_cut(graph, own), self._planned.spaces):
            copies, axis = halves[half], HALVES[half]
            for node, is_end in part:
                if is_end:
                    copies[node] = self._end(node, copies[node])
                elif node in own and _kind_of(node) in exchanges.KINDS_OF_GRADIENTS:
                    begun = self._begun[axis] = self._copy_own(node, copies, axis)
                    copies[node] = self._end(node, begun)
                elif node in own:
                    copies[node] = self._copy_own(node, copies, axis)
                elif node in halves[0]:
                    copies[node] = halves[0][node]
                else:
                    copies[node] = self._graph.node_copy(node, copies.__getitem__)
        results = _results_of(graph)
        joined = [self._join(out, [copies[results[out.result]] for copies in halves]) for out in outputs]
        self._graph.output(tuple(joined))
        self._graph.eliminate_dead_code()
        self._graph.lint()
        return fx.GraphModule(self._planned.captured.fx, self._graph, class_name="LocalProgram")

    def _copy_own(self, node: fx.Node, copies: Mapping[fx.Node, fx.Node], axis: str) -> fx.Node:
        """The call of a half; of a collective, its begin."""
        args, kwargs = (_rename(argument, copies.__getitem__, axis) for argument in (node.args, node.kwargs))
        target: Any = node.target
        kind = _kind_of(node)
        if kind is not None:
            target, args = exchanges.begin, (kind, *args)
            behind = next((begun for other, begun in self._begun.items() if other != axis), None)
            if kind in exchanges.KINDS_OF_GRADIENTS and behind is not None:
                kwargs = {**kwargs, "behind": behind}
        made = self._graph.create_node(node.op, target, args, kwargs, name="begin" if kind else node.name)
        made.meta = dict(node.meta)
        return made

    def _end(self, node: fx.Node, begun: fx.Node) -> fx.Node:
        made = self._graph.create_node("call_function", exchanges.end, (begun,), {}, name=node.name)
        made.meta = dict(node.meta)
        return made

    def _join(self, out: StageOutput, parts: Sequence[fx.Node]) -> fx.Node:
        """What the whole batch has of an output, given what each half has."""
        if out.state.kind is StateKind.SHARD:
            node = self._graph.call_function(collectives.join_halves, (*parts, out.state.dim, out.state.outer))
        elif out.state.kind is StateKind.PARTIAL:
            node = self._graph.call_function(collectives.add_halves, tuple(parts))
        else:
            return parts[0]
        node.meta["block"] = None
        return node


def _results_of(graph: fx.Graph) -> Sequence[fx.Node]:
    """The nodes that a graph returns."""
    return cast("Sequence[fx.Node]", graph.output_node().args[0])


def _kind_of(node: fx.Node) -> str | None:
    """Of a collective that can be begun its name; None for other nodes."""
    name = getattr(node.target, "__name__", "")
    return name if name in exchanges.KINDS and getattr(collectives, name) is node.target else None


def _find_own(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that are others in each half: those that name the axis of micro-batches, and what reads them."""
    own: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_function" and (own.intersection(node.all_input_nodes) or MICROBATCH in _texts((node.args, node.kwargs))):
            own.add(node)
    return own


def _texts(argument: object) -> Iterator[str]:
    """All texts in the arguments of a node."""
    if isinstance(argument, str):
        yield argument
    elif isinstance(argument, Mapping):
        yield from _texts(tuple(argument.values()))
    elif isinstance(argument, (tuple, list)):
        for item in argument:
            yield from _texts(item)


def _rename(argument: Any, copy: Callable[[fx.Node], fx.Node], axis: str) -> Any:
    """An argument with the nodes and the axis of micro-batches of one half."""
    if isinstance(argument, fx.Node):
        return copy(argument)
    if isinstance(argument, str):
        return axis if argument == MICROBATCH else argument
    if isinstance(argument, Mapping):
        return {name: _rename(value, copy, axis) for name, value in argument.items()}
    if isinstance(argument, (tuple, list)):
        return type(argument)(_rename(item, copy, axis) for item in argument)
    return argument


_Part = list[tuple[fx.Node, bool]]
"""Calls of a half that run in one go, each as (node, whether it is the end of the collective)."""


def _cut(graph: fx.Graph, own: set[fx.Node]) -> list[_Part]:
    """The calls of a half in parts between which it waits for other ranks.

    A collective is begun where it stands, and ends before its first reader, which begins the next part.
    """
    parts: list[_Part] = [[]]
    begun: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op not in ("placeholder", "output"):
            ending = [operand for operand in node.all_input_nodes if operand in begun]
            if any(begun[operand] == len(parts) for operand in ending):
                parts.append([])
            parts[-1] += [(operand, True) for operand in ending]
            for operand in ending:
                del begun[operand]
            parts[-1].append((node, False))
            if node in own and _kind_of(node) not in (None, *exchanges.KINDS_OF_GRADIENTS):
                begun[node] = len(parts)
    parts.append([(node, True) for node in begun])
    return parts


def _take_turns(parts: Sequence[_Part], spaces: Mapping[str, Space]) -> Iterator[tuple[int, _Part]]:
    """(half, part) in the order in which they run.

    Where every part has products, the halves run each part one after the other, so a collective of a half has a part of the other one to
    run behind::

        0: product, begin  1: product, begin  0: end, product, begin  1: end, product, begin ...

    Between a reduce-scatter and an all-gather there may be no more than a norm (sequence parallelism). Then parts with products are cut in
    two, and the second half runs one part later, so that both collectives have half of such a part to run behind::

        0: end, product, begin   1: end, product   0: end, norm, begin   1: product, begin   0: end, product   1: end, norm, begin ...
    """
    work = [[_work_of(node, spaces) for node, _ in part] for part in parts]
    if all(map(any, work[1:-1])):
        for part in parts:
            yield from ((half, part) for half in range(2))
        return
    pieces = [piece for part, seconds in zip(parts, work, strict=True) for piece in _cut_in_two(part, seconds)]
    for first, second in zip([*pieces, []], [[], *pieces], strict=True):
        yield 0, first
        yield 1, second


def _cut_in_two(part: _Part, work: Sequence[float]) -> Sequence[_Part]:
    """A part in two pieces of about equal work; one with less than two products as it is."""
    done = list(accumulate(work))
    if sum(map(bool, work)) < 2:
        return [part]
    middle = min(range(1, len(part)), key=lambda place: abs(done[place - 1] - done[-1] / 2))
    return [part[:middle], part[middle:]]


def _work_of(node: fx.Node, spaces: Mapping[str, Space]) -> float:
    """Flops of a product, of all of its parts; 0 for other calls."""
    space = spaces.get(node.name)
    return space.flops * space.points() if space is not None and space.is_contraction else 0.0
