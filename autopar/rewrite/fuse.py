"""The parts of a program between its collectives become submodules that torch's compiler fuses.

Comes in: a `Program`. Goes out: one that computes the same, in which runs of plain operators are calls of `autopar.ops.Fused`. Collectives,
kernels that draw random numbers, calls whose weight gradients wait, and what the user's own code does stay as they are, visible between
the fused parts. Parts that run the same code on tensors of the same sizes share one module, which is compiled once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType

import torch
from torch import fx, nn

from autopar.capture import source_of
from autopar.ir import Graph
from autopar.ops import FunctionCall, Fused, Recomputed
from autopar.rewrite.outline import Block, Outlining, draws, signature
from autopar.rewrite.program import Program
from autopar.rewrite.regions import Region

_FUSED_DTYPES = frozenset({"float16", "bfloat16", "float32", "float64", "bool"})
"""Operators on other elements run as they are.

Integers are mostly places that are looked up: one that is out of range is an IndexError with torch's operators, and of compiled code a
RuntimeError about generated files or, for a negative one, a value. For complex numbers the compiler makes no code.
"""
_MIN_OPERATORS = 2  # that compute something: of a single one nothing can be fused


def fuse(program: Program, graph: Graph, *, required: bool) -> Program:
    """A program that computes the same, of which the parts between collectives are compiled when they first run.

    Before, on an axis that splits the features between two products::

        def layer(x, scale, up_weight, down_weight):
            norm = rms_norm(x, [64], scale)
            sum_gradient = sum_gradient(norm, 'tp')
            up = linear(sum_gradient, up_weight)
            relu = relu(up)
            down = linear(relu, down_weight)
            all_reduce = all_reduce(down, 'tp')
            add = add(x, all_reduce)
            return add

    After, where a norm and an addition alone are no parts to fuse::

        def layer(x, scale, up_weight, down_weight):
            norm = rms_norm(x, [64], scale)
            sum_gradient = sum_gradient(norm, 'tp')
            fused_0 = self.fused_0(sum_gradient, up_weight, down_weight)
            all_reduce = all_reduce(fused_0, 'tp')
            add = add(x, all_reduce)
            return add

    Args:
        program: of one kind of call.
        graph: the captured graph that the program was made from.
        required: whether a part that can't be compiled is an error; otherwise it runs as it is, with a warning.
    """
    fusing = _Fusing(graph, required)
    if program.pipeline is None:
        return replace(program, module=fusing.fuse(program.module))
    stages = {number: replace(stage, module=fusing.fuse(stage.module)) for number, stage in program.pipeline.stages.items()}
    modules = nn.ModuleDict({f"stage {number}": stage.module for number, stage in stages.items()})
    return replace(program, module=modules, pipeline=replace(program.pipeline, stages=stages))


@dataclass(slots=True)
class _Step:
    """Operators that may be fused, and the calls that stay as they are and come after them; both in program order."""

    operators: list[fx.Node] = field(default_factory=list)
    others: list[fx.Node] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Part:
    """What is fused of a step, and the views to make of it afterwards, in program order."""

    block: Block
    views: tuple[fx.Node, ...]


class _Fusing:
    """The fused parts of one program, and the submodules that hold them."""

    def __init__(self, graph: Graph, required: bool) -> None:
        self._graph = graph
        self._required = required
        self._parts: dict[Hashable, Fused] = {}
        self._children: dict[nn.Module, nn.Module] = {}

    def fuse(self, module: nn.Module, layer: str = "") -> nn.Module:
        """The module with its own parts, and those of its submodules, fused; `layer` names it in messages, and is empty for a program."""
        if isinstance(module, Recomputed):
            return Recomputed(self._fuse_graph(module.module, layer))
        return self._fuse_graph(module, layer) if isinstance(module, fx.GraphModule) else module

    def _fuse_graph(self, module: fx.GraphModule, layer: str) -> fx.GraphModule:
        layers: dict[str, list[str]] = {}
        for node in module.graph.find_nodes(op="call_module"):
            layers.setdefault(str(node.target), []).append(node.meta.get("layer", str(node.target)))
        children = {}
        for name, child in module.named_children():
            if child not in self._children:
                self._children[child] = self.fuse(child, _name_all(layers.get(name, [name])))
            children[name] = self._children[child]
        outlining = Outlining(module, children, lambda block, inner: self._make_part(block, inner, layer), self._key)
        for node in module.graph.find_nodes(op="placeholder"):
            outlining.copy(node)
        leads_to = self._find_results(module.graph)
        for step in _schedule(module.graph, self._is_fusable, hoists=bool(layer)):
            for operators in _group(step.operators, leads_to):
                part = self._cut(operators, layer)
                if part is not None:
                    outlining.call(part.block)
                for node in operators if part is None else part.views:
                    outlining.copy(node)
            for node in step.others:
                outlining.copy(node)
        outlining.copy(module.graph.output_node())
        return outlining.finish()

    def _cut(self, operators: Sequence[fx.Node], layer: str) -> _Part | None:
        """What to fuse of operators that run one after the other; None if that is too little.

        Views that are handed on are made outside, of what is fused: autograd has no need of the compiler there.
        """
        inside = set(operators)
        exported = {node for node in operators if any(user not in inside for user in node.users)}
        views = []
        for node in reversed(operators):
            if node in exported and self._is_view(node):
                exported.remove(node)
                views.append(node)
                exported.update(operand for operand in node.all_input_nodes if operand in inside)
        needed = set(exported)
        for node in reversed(operators):
            if node in needed:
                needed.update(operand for operand in node.all_input_nodes if operand in inside)
        fused = [node for node in operators if node in needed]
        if sum(not self._is_view(node) for node in fused) < _MIN_OPERATORS:
            return None
        inputs = dict.fromkeys(operand for node in fused for operand in node.all_input_nodes if operand not in needed)
        region = Region(layer, f"fused_{len(self._parts)}")
        return _Part(Block(region, tuple(fused), tuple(inputs), tuple(node for node in fused if node in exported)), tuple(reversed(views)))

    def _find_results(self, graph: fx.Graph) -> dict[fx.Node, frozenset[object]]:
        """The results of a graph that have a gradient and are made from each node, and the calls of the user's functions on the way."""
        leads_to: dict[fx.Node, frozenset[object]] = {}
        for node in reversed(graph.nodes):
            results = set[object]()
            for user in node.users:
                if user.op == "output":
                    results.add(node)
                else:
                    results |= leads_to[user]
                    # It may give some of its operands a gradient and others none.
                    results |= {(user, node)} if isinstance(user.target, FunctionCall) else set()
            leads_to[node] = frozenset(results)
        return leads_to

    def _key(self, block: Block) -> Hashable:
        """Equal for parts that share a module: they run the same code, on tensors of the same sizes."""
        return signature(block), tuple(self._graph.by_name[node.meta["block"]].results for node in block.nodes)

    def _make_part(self, block: Block, inner: fx.GraphModule, layer: str) -> Fused:
        key = self._key(block)
        if key not in self._parts:
            lines = dict.fromkeys(filter(None, (source_of(block.nodes[0]), source_of(block.nodes[-1]))))
            where = f"{layer or 'outside of layers'}, {block.region.name}" + (f" ({' to '.join(lines)})" if lines else "")
            self._parts[key] = Fused(inner, where, required=self._required)
        return self._parts[key]

    def _is_fusable(self, node: fx.Node) -> bool:
        """Whether a call is a plain operator: it computes floating-point numbers or masks of such, and has no effect but its results."""
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or node.meta.get("writes") or draws(node):
            return False
        if target._schema.is_mutable or not target._schema.returns or _UNSTEADY.intersection(target.tags):
            return False
        if node.meta["block"] is None:  # a cast on behalf of the output
            return False
        op = self._graph.by_name[node.meta["block"]]
        tensors = (*self._graph.operand_tensors(op), *op.results)
        return all(tensor.dtype in _FUSED_DTYPES for tensor in tensors)

    def _is_view(self, node: fx.Node) -> bool:
        """Whether a call gives its operand in another shape, or a piece of it; casts don't."""
        if node.target is operator.getitem:
            return self._is_view(node.all_input_nodes[0])
        if not isinstance(node.target, torch._ops.OpOverload) or not node.target.is_view:
            return False
        op = self._graph.by_name[node.meta["block"]]
        return self._graph.tensor(op.operands[0]).dtype == op.results[0].dtype


_UNSTEADY = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})


def _schedule(graph: fx.Graph, is_fusable: Callable[[fx.Node], bool], *, hoists: bool) -> list[_Step]:
    """The calls of a graph in steps: some operators to fuse, then what stays as it is.

    Both kinds keep their own order. So random numbers are drawn, and ranks communicate, in the order of the program, and operators run
    where they ran, beside each other.

    Args:
        graph: of a program or a layer.
        is_fusable: whether an operator may be fused.
        hoists: whether what stays as it is comes as early as it can, so that few steps are left: in a layer, whose parameters are then
            gathered before the layer runs. The graph of a whole program would gather all of them.
    """
    steps = [_Step()]
    place: dict[fx.Node, tuple[int, bool]] = {}  # call -> number of its step, and whether it may be fused
    first_operator = first_other = 0  # the earliest step in which the next call of the kind may be
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        before = [place[operand] for operand in node.all_input_nodes if operand in place]
        is_item = node.target is operator.getitem
        fusable = before[0][1] if is_item else node.op == "call_function" and is_fusable(node)
        if fusable:
            number = max([first_operator, *(step + (not operand_fusable) for step, operand_fusable in before)])
            first_operator = number
        else:
            number = max([first_other, *(step for step, _ in before)])
            if not (hoists and _may_hoist(node)):
                number = max(number, first_operator)
                first_operator = number + 1
            first_other = number
        place[node] = number, fusable
        while len(steps) <= number:
            steps.append(_Step())
        (steps[number].operators if fusable else steps[number].others).append(node)
    return steps


def _group(operators: Sequence[fx.Node], leads_to: Mapping[fx.Node, frozenset[object]]) -> list[list[fx.Node]]:
    """Operators by the results that they lead to, in an order in which each group reads earlier ones only.

    Who calls ``backward`` from some of the results reaches all of a group or nothing of it. A group leads to whatever those lead to that
    read it, and to more: so it comes before them.
    """
    groups: dict[frozenset[object], list[fx.Node]] = {}
    for node in operators:
        groups.setdefault(leads_to[node], []).append(node)
    return [groups[results] for results in sorted(groups, key=len, reverse=True)]


def _may_hoist(node: fx.Node) -> bool:
    """Whether a call has no effect but its results, and communication and random numbers, whose order stays."""
    if node.target is operator.getitem or isinstance(node.target, torch._ops.OpOverload):
        return not node.meta.get("writes")
    is_ours = isinstance(node.target, FunctionType) and node.target.__module__.startswith("autopar.ops.")
    return node.op == "call_function" and is_ours and not node.meta.get("writes")


def _name_all(paths: Sequence[str]) -> str:
    """Like layers in words."""
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} like it"
