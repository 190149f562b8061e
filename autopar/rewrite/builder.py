"""The fx graph of a program while it is made: which node holds which value in which layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from autopar.ir import Layout, Op, OpKind, Value
from autopar.rewrite.planned import PlannedGraph
from autopar.rewrite.whole_batch import BatchValue


@dataclass(frozen=True, slots=True)
class LocalValue:
    """What a rank holds of a value of the captured graph: the part that `layout` says, made by `node` of the new graph."""

    value: Value
    layout: Layout
    node: fx.Node


class GraphBuilder:
    """The new graph and what its nodes hold; lives until `finish` makes a module of it.

    Attributes:
        planned: what is rewritten.
        made: value -> what a rank has of it as its op made it, as it is stored or as it was received.
        moved: (value, layout) -> the same in another layout; whoever needs it there reads this node.
        whole_batch: what was computed from the whole batch -> the placeholder that takes it.
        casts: parameter -> the same in the dtype in which ops read it, where the program takes it in the stored dtype.
    """

    def __init__(self, planned: PlannedGraph) -> None:
        self.planned = planned
        self.made: dict[Value, LocalValue] = {}
        self.moved: dict[tuple[Value, Layout], LocalValue] = {}
        self.whole_batch: dict[BatchValue, fx.Node] = {}
        self.casts: dict[Value, LocalValue] = {}
        self._graph = fx.Graph()

    def placeholder(self, name: str) -> fx.Node:
        """A new input of the graph."""
        node = self._graph.placeholder(name)
        node.meta["block"] = None
        return node

    def call(
        self, op: Op, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, name: str | None = None
    ) -> fx.Node:
        """A call on behalf of `op`: the op itself, or a collective before it.

        ``meta["block"]`` of the node says so, for `autopar.rewrite.outline`; it has the lines of the user's that the op came from.
        """
        node = self._graph.create_node("call_function", function, tuple(args), dict(kwargs or {}), name=name)
        node.meta["block"] = None
        if op.kind is OpKind.CALL:
            node.meta["block"] = op.name
            trace = self.planned.fx_nodes[op.name].meta.get("stack_trace")
            if trace is not None:
                node.meta["stack_trace"] = trace
        return node

    def finish(self, results: Sequence[fx.Node]) -> fx.GraphModule:
        """The module that returns `results`, without calls that nothing reads."""
        self._graph.output(tuple(results))
        self._graph.eliminate_dead_code()
        module = fx.GraphModule(self.planned.captured.fx, self._graph, class_name="LocalProgram")
        self._graph.lint()
        return module
