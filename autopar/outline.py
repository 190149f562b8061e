"""Repeated layers of a rewritten graph become submodules again, one shared by all layers that came out alike.

The program then reads as the model does: ``model_layers(h, cos, sin, q_proj, ...)`` once per layer, and the layer's own code once.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from autopar.layers import Folded, freeze


@dataclass
class _Block:
    """One layer's nodes, what they read from outside and what is read of them outside."""

    path: str
    class_name: str
    nodes: list[fx.Node] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)


def outline(module: fx.GraphModule, folded: Folded) -> fx.GraphModule:
    """A module that computes the same, in which each repeated layer is a call of a submodule.

    Nodes carry in ``meta["block"]`` the op of the captured graph that they belong to. A layer whose nodes can't be run in one
    go, because something outside needs a part of it and gives back to the rest, is left inline.
    """
    blocks, owner = _find_blocks(module.graph, folded)
    blocks = {path: block for path, block in blocks.items() if _runs_in_one_go(block, owner)}
    graph = fx.Graph()
    root = nn.Module()
    env: dict[fx.Node, fx.Node] = {}
    names: dict[Any, str] = {}
    waiting = {path: len(block.nodes) for path, block in blocks.items()}
    for node in module.graph.nodes:
        path = owner.get(node)
        if path not in blocks:
            env[node] = graph.node_copy(node, lambda n: env[n])
            continue
        waiting[path] -= 1
        if waiting[path] == 0:
            _call_block(graph, root, names, blocks[path], env)
    for name, child in module.named_children():
        if not hasattr(root, name):
            root.add_module(name, child)
    outlined = fx.GraphModule(root, graph, class_name="LocalProgram")
    graph.lint()
    return outlined


def _find_blocks(graph: fx.Graph, folded: Folded) -> tuple[dict[str, _Block], dict[fx.Node, str]]:
    path_of_op: dict[str, str] = {}
    class_of_path: dict[str, str] = {}
    for layer in folded.classes:
        for path, instance in zip(layer.paths, layer.instances, strict=True):
            # The layers of a model that is itself a list of layers have no name but their numbers.
            class_of_path[path] = re.sub(r"\W+", "_", layer.name.replace(".*", "")).strip("_") or "layers"
            for name in instance:
                path_of_op[name] = path
    blocks: dict[str, _Block] = {}
    owner: dict[fx.Node, str] = {}
    for node in graph.nodes:
        found = path_of_op.get(node.meta.get("block") or "")
        if found is not None and node.op == "call_function":
            path = found
            block = blocks.setdefault(path, _Block(path, class_of_path[path]))
            block.nodes.append(node)
            owner[node] = path
    for block in blocks.values():
        inside = set(block.nodes)
        block.inputs = list(dict.fromkeys(x for n in block.nodes for x in n.all_input_nodes if x not in inside))
        block.outputs = [node for node in block.nodes if any(user not in inside for user in node.users)]
    return blocks, owner


def _runs_in_one_go(block: _Block, owner: Mapping[fx.Node, str]) -> bool:
    """Whether nothing outside sits between the block's first node and its last, in program order, and reads it."""
    inside = set(block.nodes)
    last = block.nodes[-1]
    node = block.nodes[0]
    tainted: set[fx.Node] = set()
    while node is not last:
        if node not in inside and any(x in inside or x in tainted for x in node.all_input_nodes):
            tainted.add(node)
        node = node.next
    # Reading a part early is a matter of order, not of a cycle, but keeping the order keeps this pass simple.
    return not tainted


def _call_block(graph: fx.Graph, root: nn.Module, names: dict[Any, str], block: _Block, env: dict[fx.Node, fx.Node]) -> None:
    signature = _signature(block)
    if signature not in names:
        name = block.class_name
        while hasattr(root, name):
            name += "_"
        names[signature] = name
        root.add_module(name, _submodule(block, name))
    call = graph.call_module(names[signature], tuple(env[x] for x in block.inputs))
    call.meta["layer"] = block.path
    if len(block.outputs) == 1:
        env[block.outputs[0]] = call
        return
    for index, node in enumerate(block.outputs):
        env[node] = graph.call_function(operator.getitem, (call, index))


def _submodule(block: _Block, name: str) -> fx.GraphModule:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {x: graph.placeholder(x.name) for x in block.inputs}
    for node in block.nodes:
        env[node] = graph.node_copy(node, lambda n: env[n])
    results = tuple(env[node] for node in block.outputs)
    graph.output(results[0] if len(results) == 1 else results)
    return fx.GraphModule(nn.Module(), graph, class_name="".join(part.title() for part in name.split("_")))


def _signature(block: _Block) -> tuple[Any, ...]:
    """Equal for blocks that run the same code on their inputs."""
    number = {node: index for index, node in enumerate([*block.inputs, *block.nodes])}
    lines = []
    for node in block.nodes:
        args = fx.node.map_arg(node.args, lambda n: f"%{number[n]}")
        kwargs = fx.node.map_arg(node.kwargs, lambda n: f"%{number[n]}")
        lines.append((str(node.target), freeze(args), freeze(kwargs)))
    return (tuple(lines), tuple(number[node] for node in block.outputs))
