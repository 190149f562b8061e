"""Proofs about attention masks: a mask that depends on no input is evaluated, and replaced where it is causal or hides nothing.

Comes in: a flat graph, and the values of its constants. Goes out: the graph with ``is_causal`` or no mask in the place of proven masks. A
mask tensor takes memory of the square of the sequence length, and keeps attention from running by its fastest kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from autopar.capture.fx_nodes import on_device, source_of, value_of

aten = torch.ops.aten

MAX_ELEMENTS = 2**28
"""Elements of the largest tensor that a proof may compute."""

_CPU = torch.device("cpu")


def prove_masks(graph: fx.Graph, known: Mapping[str, Tensor], notes: list[str]) -> fx.Graph:
    """Replace proven masks of ``scaled_dot_product_attention`` by ``is_causal``, or by no mask.

    Args:
        graph: a flat, functional graph.
        known: placeholder -> its value, where that is constant: buffers that nothing updates, tensors made in the forward.
        notes: gets a line per mask that is replaced.
    """
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    proofs: dict[tuple[fx.Node, tuple[int, int]], str] = {}  # by mask, and the numbers of rows and keys that it masks
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        env[node] = new.node_copy(node, env.__getitem__)
        if node.target is not aten.scaled_dot_product_attention.default:
            continue
        query, key, value, mask, dropout, causal = (*node.args, *(None, 0.0, False)[len(node.args) - 3 :])[:6]
        if not isinstance(mask, fx.Node) or causal:
            continue
        scores = value_of(query).shape[-2], value_of(key).shape[-2]
        if (mask, scores) not in proofs:
            proofs[mask, scores] = _prove(mask, known, values, scores)
            if proofs[mask, scores]:
                where = source_of(node) or node.name
                notes.append(f"the attention mask is {proofs[mask, scores]} and isn't kept as a tensor ({where})")
        if proofs[mask, scores]:
            args = (query, key, value, None, dropout, proofs[mask, scores] == "causal")
            env[node].args = fx.node.map_arg(args, env.__getitem__)
    new.eliminate_dead_code()
    return new


def _prove(mask: fx.Node, known: Mapping[str, Tensor], values: dict[fx.Node, Any], scores: tuple[int, int]) -> str:
    """``causal``, ``all true``, or the empty text when neither is proven; `scores` are the numbers of rows and keys that it masks."""
    if value_of(mask).ndim < 2 or not _evaluate(mask, known, values):
        return ""
    tensor = values[mask]
    if tensor.dtype != torch.bool:
        hidden = (tensor == -torch.inf) | (tensor == torch.finfo(tensor.dtype).min)
        if not bool((hidden | (tensor == 0)).all()):
            return ""
        tensor = ~hidden
    if bool(tensor.all()):
        return "all true"
    if tensor.shape[-2:] != scores:
        return ""  # one row that stands for all of them isn't causal, though it may look like the first of a causal mask
    causal = torch.ones(scores, dtype=torch.bool).tril()
    return "causal" if bool((tensor == causal).all()) else ""


def _evaluate(mask: fx.Node, known: Mapping[str, Tensor], values: dict[fx.Node, Any]) -> bool:
    """Compute a mask, and all that it is made of, into `values`; False when it depends on inputs or random numbers, or is too large."""
    order: list[fx.Node] = []
    pending = [mask]
    seen = set(values)
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        order.append(node)
        if not _is_constant(node, known):
            return False
        pending.extend(node.all_input_nodes)
    position = {node: index for index, node in enumerate(mask.graph.nodes)}
    for node in sorted(order, key=position.__getitem__):
        if node.op == "placeholder":
            values[node] = known[node.name]
            continue
        args, kwargs = fx.node.map_arg((node.args, on_device(node, _CPU)), values.__getitem__)
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return True


def _is_constant(node: fx.Node, known: Mapping[str, Tensor]) -> bool:
    if node.op == "placeholder":
        return node.name in known and known[node.name].numel() <= MAX_ELEMENTS
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.numel() > MAX_ELEMENTS:
        return False
    return not (isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags)
