"""Regions of a rewritten graph become submodules, one shared by all regions that came out alike.

Repeated layers are such regions: the program then reads as the model does, ``model_layers(h, cos, sin, q_proj, ...)`` once per layer, and
the layer's own code once. What the backward shall run again is one too.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
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


@dataclass
class _Block:
    """One region's nodes, what they read from outside and what is read of them outside."""

    region: Region
    nodes: list[fx.Node] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)


def outline(module: fx.GraphModule, region_of: Mapping[str, Region]) -> fx.GraphModule:
    """A module that computes the same, in which each region is a call of a submodule.

    Nodes carry in ``meta["block"]`` the op of the captured graph that they belong to; `region_of` is by such ops. A region whose nodes
    can't be run in one go, because something outside needs a part of it and gives back to the rest, is left inline. Raises PlanError
    when it is to be run again, InputError when a region that is to be run again draws random numbers in a way that can't be repeated.
    """
    blocks, owner = _find_blocks(module.graph, region_of)
    for where, block in list(blocks.items()):
        if not _runs_in_one_go(block):
            if block.region.recomputed:
                raise PlanError(f"{where} can't be run again as one: ops outside of it sit between its own; plan it with recompute none")
            del blocks[where]
    graph = fx.Graph()
    root = nn.Module()
    for name, child in module.named_children():
        root.add_module(name, child)
    env: dict[fx.Node, fx.Node] = {}
    names: dict[Any, str] = {}
    waiting = {path: len(block.nodes) for path, block in blocks.items()}
    for node in module.graph.nodes:
        path = owner.get(node)
        if path is None or path not in blocks:
            env[node] = graph.node_copy(node, lambda n: env[n])
            continue
        waiting[path] -= 1
        if waiting[path] == 0:
            _call_block(graph, root, names, blocks[path], env, module)
    outlined = fx.GraphModule(root, graph, class_name="LocalProgram")
    outlined.delete_all_unused_submodules()
    graph.lint()
    return outlined


def _find_blocks(graph: fx.Graph, region_of: Mapping[str, Region]) -> tuple[dict[str, _Block], dict[fx.Node, str]]:
    blocks: dict[str, _Block] = {}
    owner: dict[fx.Node, str] = {}
    for node in graph.nodes:
        region = region_of.get(node.meta.get("block") or "")
        if region is not None and node.op in ("call_function", "call_module"):
            blocks.setdefault(region.path, _Block(region)).nodes.append(node)
            owner[node] = region.path
    for block in blocks.values():
        inside = set(block.nodes)
        block.inputs = list(dict.fromkeys(x for n in block.nodes for x in n.all_input_nodes if x not in inside))
        block.outputs = [node for node in block.nodes if any(user not in inside for user in node.users)]
    return blocks, owner


def _runs_in_one_go(block: _Block) -> bool:
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


def _call_block(
    graph: fx.Graph, root: nn.Module, names: dict[Any, str], block: _Block, env: dict[fx.Node, fx.Node], module: fx.GraphModule
) -> None:
    signature = _signature(block)
    if signature not in names:
        # The layers of a model that is itself a list of layers have no name but their numbers.
        name = re.sub(r"\W+", "_", block.region.name.replace(".*", "")).strip("_") or "layers"
        while hasattr(root, name):
            name += "_"
        names[signature] = name
        inner = _submodule(block, name, module)
        if block.region.recomputed:
            check_repeatable(inner.graph)
        root.add_module(name, Recomputed(inner) if block.region.recomputed else inner)
    call = graph.call_module(names[signature], tuple(env[x] for x in block.inputs))
    call.meta["layer"] = block.region.path
    call.meta["block"] = block.nodes[0].meta["block"]
    if len(block.outputs) == 1:
        env[block.outputs[0]] = call
        return
    for index, node in enumerate(block.outputs):
        item = env[node] = graph.call_function(operator.getitem, (call, index))
        item.meta["block"] = call.meta["block"]


def _submodule(block: _Block, name: str, module: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {x: graph.placeholder(x.name) for x in block.inputs}
    for node in block.nodes:
        env[node] = graph.node_copy(node, lambda n: env[n])
    results = tuple(env[node] for node in block.outputs)
    graph.output(results[0] if len(results) == 1 else results)
    root = nn.Module()
    for node in block.nodes:
        if node.op == "call_module":
            root.add_module(str(node.target), module.get_submodule(str(node.target)))
    return fx.GraphModule(root, graph, class_name="".join(part.title() for part in name.split("_")))


def _signature(block: _Block) -> tuple[Any, ...]:
    """Equal for blocks that run the same code on their inputs."""
    number = {node: index for index, node in enumerate([*block.inputs, *block.nodes])}
    lines = []
    for node in block.nodes:
        args = fx.node.map_arg(node.args, lambda n: f"%{number[n]}")
        kwargs = fx.node.map_arg(node.kwargs, lambda n: f"%{number[n]}")
        lines.append((str(node.target), freeze(args), freeze(kwargs)))
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
    return tuple(node for node in graph.nodes if node.op == "call_function" and _draws(node))


def _draws(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    given = dict(node.kwargs)
    for position, argument in enumerate(target._schema.arguments):
        value = node.args[position] if position < len(node.args) else given.get(argument.name, argument.default_value)
        if (argument.name in _CHANCES and value == 0) or (argument.name in _SWITCHES and value is False):
            return False
    return True
