"""Composite operators without a rule, taken apart into operators that have one.

Comes in: a flat, functional graph. Goes out: the same graph, in which a call of an operator that torch defines by others (``outer``,
``cosine_embedding_loss``, ``alpha_dropout``) is replaced by calls of these, where all of them have rules. How the composite operator splits
is so proven by their rules, without a rule of its own::

    outer = outer(x, y)   ->   outer = view(x, [4, 1]); outer_1 = mul(outer, y)

Nothing is taken apart on trust: the calls must build the same autograd graph as the operator does, so that their gradients are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.capture.functionalize import functionalize
from autopar.capture.fx_nodes import emit, is_getitem, list_operands
from autopar.errors import CaptureError
from autopar.ops import AUTOCAST_OFF, Autocast
from autopar.rules import has_rule


def decompose(graph: fx.Graph, mode: FakeTensorMode, handled: Collection[Any]) -> fx.Graph:
    """Take apart the composite operators of `graph` that have no rule, where what they are made of has rules.

    Args:
        graph: a flat, functional graph.
        mode: the mode of its fake tensors.
        handled: operators that other passes replace or drop.
    """
    new = fx.Graph()
    env: dict[fx.Node, Any] = {}
    known: dict[Any, fx.Graph | None] = {}
    for node in graph.nodes:
        if is_getitem(node) and not isinstance(env[node.args[0]], fx.Node):
            env[node] = env[node.args[0]][node.args[1]]
            continue
        body: fx.Graph | None = None
        if isinstance(node.target, torch._ops.OpOverload) and not has_rule(str(node.target)) and node.target not in handled:
            body = _find_body(node, mode, known)
        env[node] = new.node_copy(node, env.__getitem__) if body is None else _inline(new, body, node, env)
    return new


def _inline(new: fx.Graph, body: fx.Graph, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
    """Emit the calls of `body` in the place of `node`; returns the node, or the list of nodes, that make its results."""
    inner: dict[fx.Node, fx.Node] = {}
    given = iter(list_operands(node))
    for part in body.nodes:
        if part.op == "placeholder":
            inner[part] = env[next(given)]
        elif part.op == "output":
            return fx.node.map_arg(part.args[0], inner.__getitem__)
        else:
            args, kwargs = fx.node.map_arg((part.args, part.kwargs), inner.__getitem__)
            inner[part] = emit(new, part.target, args, kwargs, node)
            inner[part].meta["val"] = part.meta["val"]
    raise AssertionError("a traced graph has an output node")


def _find_body(node: fx.Node, mode: FakeTensorMode, known: dict[Any, fx.Graph | None]) -> fx.Graph | None:
    """The calls that make up a call of a composite operator, as a functional graph of its operands; None where it must stay whole."""
    operands = [operand.meta["val"] for operand in list_operands(node)]
    # Questions such as `torch.promote_types` make a number, which forward has by now.
    makes_tensors = isinstance(node.meta.get("val"), (Tensor, list, tuple))
    if not makes_tensors or not all(isinstance(operand, Tensor) for operand in operands):
        return None
    others = fx.node.map_arg((node.args, node.kwargs), lambda _: None)
    key = (node.target, tuple((x.shape, x.stride(), x.dtype, x.device) for x in operands), repr(others))
    if key not in known:
        known[key] = _trace(node, operands, mode)
    return known[key]


def _trace(node: fx.Node, operands: Sequence[Tensor], mode: FakeTensorMode) -> fx.Graph | None:
    body = find_parts(node, operands, mode)
    if body is None:
        return None
    calls = [part for part in body.nodes if part.op not in ("placeholder", "output")]
    return body if all(is_getitem(part) or has_rule(str(part.target)) for part in calls) else None


def find_parts(node: fx.Node, operands: Sequence[Tensor], mode: FakeTensorMode, autocast: Autocast = AUTOCAST_OFF) -> fx.Graph | None:
    """The calls that a call of a composite operator makes, as a functional graph of its operands, with the casts that autocast adds.

    None for an operator that isn't composite, or whose calls build another autograd graph than the operator.

    Args:
        node: the call.
        operands: fake tensors like its operands, in order.
        mode: the mode of the fake tensors.
        autocast: the state in which the call is made; that its cache is on must not matter.
    """
    target: Any = node.target

    def call(function: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
        given = iter(tensors)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: next(given))
        return function(*args, **kwargs)

    try:
        with mode, torch.no_grad(), autocast.active():
            traced = make_fx(lambda *tensors: call(target.decompose, tensors))(*(x.detach() for x in operands))
    except Exception:  # torch's: the operator isn't composite, or reads values
        return None
    try:
        body, written = functionalize(traced.graph, {}, [part.name for part in traced.graph.find_nodes(op="placeholder")])
    except CaptureError:
        return None
    if written or not all(part.op in ("placeholder", "output", "call_function") for part in body.nodes):
        return None
    with mode, torch.enable_grad():
        fakes = [[x.detach().clone().requires_grad_(x.is_floating_point() or x.is_complex()) for x in operands] for _ in range(2)]
        # Operands aren't all weights, whose casts alone are cached.
        with dataclasses.replace(autocast, caches=autocast == AUTOCAST_OFF).active():
            whole = call(target, fakes[0])
        parts = traced(*fakes[1])
    return body if _describe_backward(whole, fakes[0]) == _describe_backward(parts, fakes[1]) else None


def _describe_backward(results: Any, operands: Sequence[Tensor]) -> list[Any]:
    """The autograd graph from results back to operands: its nodes' names and wiring, in a fixed order."""
    position = {id(operand): number for number, operand in enumerate(operands)}
    described: list[Any] = []
    numbers: dict[Any, int] = {}

    def visit(function: Any) -> int:
        if function is None:
            return -1
        if function not in numbers:
            numbers[function] = len(numbers)
            below = [(visit(next_function), index) for next_function, index in function.next_functions]
            described.append((numbers[function], function.name(), position.get(id(getattr(function, "variable", None))), below))
        return numbers[function]

    for tensor in pytree.tree_leaves(results):
        described.append((visit(tensor.grad_fn), tuple(tensor.shape), tensor.dtype, tensor.requires_grad))
    return described
