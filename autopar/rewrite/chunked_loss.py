"""The captured graph in which a head and its cross entropy are one call, which computes its logits in chunks.

Comes in: `Captured`, and the number of chunks that a plan says. Goes out: another `Captured`. What is replaced by what is decided in
`autopar.rules.chunked_loss`, on the graph that planning sees; here the same is done to the fx graph.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from autopar.capture import Captured
from autopar.errors import PlanError
from autopar.ir import Op
from autopar.ops import chunked_loss
from autopar.rules import ChunkedLoss, chunk_losses, find_chunked_losses


def chunk_captured(captured: Captured, chunks: int) -> Captured:
    """`captured` with all losses in so many chunks that can be computed so; itself for a single chunk.

    Before::

        linear = linear(h, weight)
        view = reshape(linear, [64, 96])
        loss = cross_entropy_loss(view, labels)

    After, with two chunks::

        view = reshape(h, [64, 32])
        loss = linear_cross_entropy(view, weight, None, labels, 1, -100, 0.0, 2, ())

    Raises PlanError for more than one chunk where no loss can be computed so.
    """
    if chunks == 1:
        return captured
    losses = find_chunked_losses(captured.graph)
    if not losses.found:
        raise PlanError(
            f"plan.loss_chunks is {chunks}, but no loss of the model can be computed in chunks: "
            f"{'; '.join(losses.reasons) or 'it computes no cross entropy'}"
        )
    graph = chunk_losses(captured.graph, losses.found, chunks)
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    nodes = {node.name: node for node in captured.fx.graph.nodes}
    replaced: dict[str, ChunkedLoss] = {name: loss for loss in losses.found for name in (loss.loss, loss.head, *loss.between)}
    for node in captured.fx.graph.nodes:
        loss = replaced.get(node.name)
        if loss is None:
            env[node] = new.node_copy(node, env.__getitem__)
        elif node.name in loss.moves:
            env[node] = _move(new, nodes, env, graph.by_name[node.name], loss)
        elif node.name == loss.loss:
            env[node] = _call(new, nodes, env, graph.by_name[node.name], loss)
    return replace(captured, fx=fx.GraphModule(nn.Module(), new), graph=graph)


def _move(new: fx.Graph, nodes: dict[str, fx.Node], env: dict[fx.Node, fx.Node], op: Op, loss: ChunkedLoss) -> fx.Node:
    """What moved tokens of the logits, done to the hidden states."""
    node = nodes[op.name]
    sizes = [list(arg) if isinstance(arg, tuple) else arg for arg in op.args[1:]]
    return _emit(new, node, nodes[loss.head], node.target, (_hidden(nodes, env, op, loss), *sizes), op)


def _call(new: fx.Graph, nodes: dict[str, fx.Node], env: dict[fx.Node, fx.Node], op: Op, loss: ChunkedLoss) -> fx.Node:
    """The head and its loss as one call."""
    node, head = nodes[op.name], nodes[loss.head]
    weights = [env[arg] if isinstance(arg, fx.Node) else None for arg in (*head.args[1:], None)][:2]
    # The fx graph has the dtypes themselves, the plan's graph their names.
    steps = tuple((name, *(nodes[at].args[1:] or (None,))) for (name, _), at in zip(op.args[-1], loss.steps, strict=True))
    target = env[node.args[1]]  # type: ignore[index]
    args = (_hidden(nodes, env, op, loss), *weights, target, *op.args[4:-1], steps)
    return _emit(new, node, head, chunked_loss.linear_cross_entropy, args, op)


def _hidden(nodes: dict[str, fx.Node], env: dict[fx.Node, fx.Node], op: Op, loss: ChunkedLoss) -> fx.Node:
    """The hidden states that a call reads: those of the head, or what a call before has moved."""
    before = op.operands[0].op
    return env[nodes[before]] if before in loss.moves else env[nodes[loss.head].args[0]]  # type: ignore[index]


def _emit(new: fx.Graph, node: fx.Node, head: fx.Node, target: Any, args: tuple[Any, ...], op: Op) -> fx.Node:
    """Append a call that has the name and the user's line of `node`, and belongs to the module of the head."""
    made = new.create_node("call_function", target, args, {}, name=node.name)
    made.meta = {key: node.meta[key] for key in ("stack_trace",) if key in node.meta}
    if "nn_module_stack" in head.meta:
        made.meta["nn_module_stack"] = head.meta["nn_module_stack"]
    value = node.meta["val"]
    made.meta["val"] = value.new_empty(op.results[0].shape, dtype=getattr(torch, op.results[0].dtype))
    return made
