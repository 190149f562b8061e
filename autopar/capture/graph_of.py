"""From a normalised fx graph to the `ir.Graph` that planning sees: same names, same order, nothing of torch in it.

Comes in from ``normalize`` and ``record``; goes out to ``rules`` and everything after. Nodes that pick one of several
results vanish; who read them reads ``Value(op, index)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from autopar import ir
from autopar.capture.fx_nodes import is_getitem, layer_of, source_of
from autopar.capture.record import Record


def graph_of(
    graph: fx.Graph,
    record: Record,
    kinds: Mapping[str, ir.OpKind],
    names: Mapping[str, str],
    updates: tuple[str, ...] = (),
) -> ir.Graph:
    """Describe an fx graph.

    Args:
        graph: flat and functional.
        record: what a run on fake tensors found out about its nodes.
        kinds: parameter, buffer or input, per placeholder.
        names: the user's name per placeholder.
        updates: the buffers whose new values the graph returns last.
    """
    values: dict[fx.Node, ir.Value] = {}
    ops = []
    for node in graph.nodes:
        if is_getitem(node):
            values[node] = ir.Value(node.args[0].name, node.args[1])
            continue
        values[node] = ir.Value(node.name)
        ops.append(_op(node, record, values, kinds, names))
    if updates:
        ops[-1] = dataclasses.replace(ops[-1], kwargs={"updates": updates})
    return ir.Graph(tuple(ops))


def _op(
    node: fx.Node,
    record: Record,
    values: Mapping[fx.Node, ir.Value],
    kinds: Mapping[str, ir.OpKind],
    names: Mapping[str, str],
) -> ir.Op:
    operands: list[ir.Value] = []
    args = tuple(_plain(arg, values, operands) for arg in node.args)
    kwargs = {key: _plain(arg, values, operands) for key, arg in node.kwargs.items()}
    if node.op == "output":
        return ir.Op(node.name, ir.OpKind.OUTPUT, "output", tuple(operands), (), args)
    value = record.values[node.name]
    results = tuple(map(_tensor, value if isinstance(value, (list, tuple)) else [value]))
    if node.op == "placeholder":
        return ir.Op(node.name, kinds[node.name], names[node.name], (), results)
    return ir.Op(
        name=node.name,
        kind=ir.OpKind.CALL,
        target=str(node.target),
        operands=tuple(operands),
        results=results,
        args=args,
        kwargs=kwargs,
        layer=layer_of(node),
        source=source_of(node),
        saved=frozenset(record.saved.get(node.name, ())),
        saved_nbytes=record.saved_nbytes.get(node.name, 0),
    )


def _tensor(value: Any) -> ir.Tensor:
    if isinstance(value, torch.Tensor):
        return ir.Tensor(tuple(value.shape), _word(value.dtype), value.requires_grad)
    return ir.Tensor((0,), "uint8")  # a result that isn't there keeps its index


def _plain(arg: Any, values: Mapping[fx.Node, ir.Value], operands: list[ir.Value]) -> Any:
    """An argument without torch: tensors become operands, dtypes and devices words."""
    if isinstance(arg, fx.Node):
        operands.append(values[arg])
        return ir.Operand(len(operands) - 1)
    if isinstance(arg, (list, tuple)):
        return tuple(_plain(part, values, operands) for part in arg)
    if isinstance(arg, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return _word(arg)
    return arg


def _word(value: Any) -> str:
    return str(value).removeprefix("torch.")
