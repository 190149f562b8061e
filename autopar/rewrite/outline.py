"""Regions of a rewritten graph become submodules; regions that came out alike share one.

Comes in: the graph of a program and the regions of its ops. Goes out: a module that computes the same. Repeated layers are such regions:
the program then reads as the model does, ``model_layers(h, cos, sin, q_proj, ...)`` once per layer, and the layer's own code stands there
once. What the backward runs again is one too.
"""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from autopar.capture import source_of
from autopar.errors import InputError, PlanError
from autopar.ir import freeze
from autopar.ops import Recomputed
from autopar.rewrite.regions import Region

# Names of arguments that say how likely an operator drops an element, and whether it draws at all.
_CHANCES = ("p", "dropout", "dropout_p")
_SWITCHES = ("train", "training")


@dataclass(frozen=True)
class Block:
    """The nodes of one region, in program order.

    Attributes:
        region: what they are.
        nodes: all of them.
        inputs: the nodes outside that they read, in the order in which they read them.
        outputs: those of them that nodes outside read.
    """

    region: Region
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def outline(module: fx.GraphModule, region_of: Mapping[str, Region]) -> fx.GraphModule:
    """A module that computes the same as `module`, in which each region is a call of a submodule.

    Before, with the first two calls in a region ``layers.0``, the others in a region ``layers.1``, both named ``layers.*``::

        def forward(self, p_0_weight, p_1_weight, x):
            linear = linear(x, p_0_weight)
            relu = relu(linear)
            linear_1 = linear(relu, p_1_weight)
            relu_1 = relu(linear_1)
            return (relu_1,)

    After::

        def forward(self, p_0_weight, p_1_weight, x):
            layers = self.layers(x, p_0_weight)
            layers_1 = self.layers(layers, p_1_weight)
            return (layers_1,)

        # layers
        def forward(self, x, p_0_weight):
            linear = linear(x, p_0_weight)
            relu = relu(linear)
            return relu

    A region whose nodes can't be run in one go, because something outside reads a part of it and gives back to the rest, is left as it is.

    Args:
        module: its nodes carry in ``meta["block"]`` the op of the captured graph that they belong to.
        region_of: op -> its region.

    Raises:
        PlanError: a region that the backward runs again can't be run in one go.
        InputError: a region that the backward runs again draws random numbers in a way that can't be repeated.
    """
    blocks = _find_blocks(module.graph, region_of)
    for path, block in list(blocks.items()):
        if not _runs_in_one_go(block):
            if block.region.recomputed:
                raise PlanError(f"{path} can't be run again as one: ops outside of it sit between its own; plan it with recompute none")
            del blocks[path]
    block_of = {node: block for block in blocks.values() for node in block.nodes}
    outlining = Outlining(module)
    for node in module.graph.nodes:
        if node not in block_of:
            outlining.copy(node)
        elif node is block_of[node].nodes[-1]:
            outlining.call(block_of[node])
    return outlining.finish()


def _submodule_of(block: Block, inner: fx.GraphModule) -> nn.Module:
    """The module to call for a region, given the one that runs its nodes."""
    if not block.region.recomputed:
        return inner
    check_repeatable(inner.graph)
    return Recomputed(inner)


class Outlining:
    """The graph of a module while its blocks are replaced by calls of submodules.

    Args:
        module: the module; it isn't changed.
        children: what stands in the place of its submodules, by name; by default they themselves.
        make: the module to call for a block, given the one that runs its nodes.
        key: equal for blocks that share one module; by default for those that run the same code.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        children: Mapping[str, nn.Module] | None = None,
        make: Callable[[Block, fx.GraphModule], nn.Module] = _submodule_of,
        key: Callable[[Block], Hashable] | None = None,
    ) -> None:
        self._module = module
        self._make = make
        self._key = key or signature
        self._graph = fx.Graph()
        self._root = nn.Module()
        for name, child in (dict(module.named_children()) if children is None else children).items():
            self._root.add_module(name, child)
        self._copies: dict[fx.Node, fx.Node] = {}  # node of the module -> what stands for it in the new graph
        self._names: dict[Hashable, str] = {}  # key of a block -> name of the submodule that runs it

    def copy(self, node: fx.Node) -> None:
        """Take over a node that is in no block."""
        self._copies[node] = self._graph.node_copy(node, self._copies.__getitem__)

    def call(self, block: Block) -> None:
        """Call the submodule that runs `block`."""
        call = self._graph.call_module(self._name_of(block), tuple(self._copies[node] for node in block.inputs))
        call.meta["layer"] = block.region.path
        call.meta["block"] = block.nodes[0].meta["block"]
        if len(block.outputs) == 1:
            self._copies[block.outputs[0]] = call
            return
        for index, node in enumerate(block.outputs):
            item = self._copies[node] = self._graph.call_function(operator.getitem, (call, index))
            item.meta["block"] = call.meta["block"]

    def finish(self) -> fx.GraphModule:
        """The new module."""
        outlined = fx.GraphModule(self._root, self._graph, class_name=type(self._module).__name__)
        outlined.delete_all_unused_submodules()
        self._graph.lint()
        return outlined

    def _name_of(self, block: Block) -> str:
        """The name of the submodule for `block`: one that runs the same code, or else a new one."""
        key = self._key(block)
        if key in self._names:
            return self._names[key]
        # The layers of a model that is itself a list of layers have no name but their numbers.
        name = re.sub(r"\W+", "_", block.region.name.replace(".*", "")).strip("_") or "layers"
        while hasattr(self._root, name):
            name += "_"
        self._root.add_module(name, self._make(block, _submodule(block, name, self._module)))
        self._names[key] = name
        return name


def _find_blocks(graph: fx.Graph, region_of: Mapping[str, Region]) -> dict[str, Block]:
    """Path of each region -> its block."""
    members: dict[Region, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        region = region_of.get(node.meta.get("block") or "")
        if region is not None and node.op in ("call_function", "call_module"):
            members[region].append(node)
    return {region.path: make_block(region, nodes) for region, nodes in members.items()}


def make_block(region: Region, nodes: Sequence[fx.Node]) -> Block:
    """The block of these nodes, which are in program order."""
    inside = set(nodes)
    inputs = dict.fromkeys(operand for node in nodes for operand in node.all_input_nodes if operand not in inside)
    outputs = (node for node in nodes if any(user not in inside for user in node.users))
    return Block(region, tuple(nodes), tuple(inputs), tuple(outputs))


def _runs_in_one_go(block: Block) -> bool:
    """Whether nothing outside sits between the block's first node and its last, in program order, and reads it."""
    inside = set(block.nodes)
    node, last = block.nodes[0], block.nodes[-1]
    while node is not last:
        # Reading a part early is a matter of order, not of a cycle, but keeping the order keeps this pass simple.
        if node not in inside and any(operand in inside for operand in node.all_input_nodes):
            return False
        node = node.next
    return True


def _submodule(block: Block, name: str, module: fx.GraphModule) -> fx.GraphModule:
    """A module that runs the nodes of `block`; its placeholders are the block's inputs."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in block.inputs}
    for node in block.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    results = tuple(copies[node] for node in block.outputs)
    graph.output(results[0] if len(results) == 1 else results)
    root = nn.Module()
    for node in block.nodes:
        if node.op == "call_module":
            root.add_module(str(node.target), module.get_submodule(str(node.target)))
    return fx.GraphModule(root, graph, class_name="".join(part.title() for part in name.split("_")))


def signature(block: Block) -> tuple[Any, ...]:
    """Equal for blocks that run the same code on their inputs."""
    number = {node: index for index, node in enumerate([*block.inputs, *block.nodes])}
    lines = []
    for node in block.nodes:
        args = fx.node.map_arg(node.args, lambda operand: f"%{number[operand]}")
        kwargs = fx.node.map_arg(node.kwargs, lambda operand: f"%{number[operand]}")
        lines.append((node.target, freeze(args), freeze(kwargs)))
    return (tuple(lines), tuple(number[node] for node in block.outputs))


def check_repeatable(graph: fx.Graph) -> None:
    """Raise InputError when an operator draws random numbers that a second run wouldn't draw again."""
    if drawing := find_unrepeatable(graph):
        raise InputError(
            "can't recompute a region that draws random numbers of its own: "
            + ", ".join(f"{node.target} ({source_of(node) or node.name})" for node in drawing)
            + ". Keep its activations"
        )


def find_unrepeatable(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """Calls of operators that draw from torch's generators directly; those that draw through `autopar.ops.rng` are no such."""
    return tuple(node for node in graph.nodes if node.op == "call_function" and draws(node))


def draws(node: fx.Node) -> bool:
    """Whether a call draws random numbers from torch's generators directly."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    given = dict(node.kwargs)
    for position, argument in enumerate(target._schema.arguments):
        value = node.args[position] if position < len(node.args) else given.get(argument.name, argument.default_value)
        if (argument.name in _CHANCES and value == 0) or (argument.name in _SWITCHES and value is False):
            return False
    return True
