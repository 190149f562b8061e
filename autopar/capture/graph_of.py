"""From a normalised fx graph to the `ir.Graph` that planning sees: the same names and order, nothing of torch.

Comes in: a flat fx graph, and a `Record` of a run on fake tensors. Goes out: an `ir.Graph`. Nodes that select one of several results have
no op of their own; their readers read ``Value(op, index)``.
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
    storages: Mapping[str, ir.StorageDtypes] | None = None,
) -> ir.Graph:
    """The `ir.Graph` of an fx graph.

    Args:
        graph: a flat, functional graph.
        record: values and saved tensors of its nodes, from a run on fake tensors.
        kinds: placeholder -> parameter, buffer or input.
        names: placeholder -> the user's name.
        updates: names of the buffers whose new values are the last outputs.
        storages: placeholder of a parameter -> how it is kept, where that isn't in the dtype in which the graph reads it.
    """
    values: dict[fx.Node, ir.Value] = {}
    ops = []
    for node in graph.nodes:
        if is_getitem(node):
            values[node] = ir.Value(node.args[0].name, node.args[1])
            continue
        values[node] = ir.Value(node.name)
        op = _op(node, record, values, kinds, names)
        if storages and node.name in storages:
            op = dataclasses.replace(op, results=(dataclasses.replace(op.results[0], storage=storages[node.name]),))
        ops.append(op)
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
    memory = record.memory(node.name)
    on_cpu = None if record.on_cpu is None else record.on_cpu.memory(node.name)
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
        saved=memory.saved,
        extra_saved_nbytes=memory.extra_saved_nbytes,
        working=memory.working,
        on_cpu=None if on_cpu == memory else on_cpu,
    )


def _tensor(value: Any) -> ir.Tensor:
    if isinstance(value, torch.Tensor):
        return ir.Tensor(tuple(value.shape), _text(value.dtype), value.requires_grad)
    return ir.Tensor((0,), "uint8")  # stands for a result that isn't a tensor, so that later ones have their index


def _plain(arg: Any, values: Mapping[fx.Node, ir.Value], operands: list[ir.Value]) -> Any:
    """An argument without anything of torch: tensors become operands, dtypes and devices text."""
    if isinstance(arg, fx.Node):
        operands.append(values[arg])
        return ir.Operand(len(operands) - 1)
    if isinstance(arg, (list, tuple)):
        return tuple(_plain(item, values, operands) for item in arg)
    if isinstance(arg, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return _text(arg)
    return arg


def _text(value: Any) -> str:
    return str(value).removeprefix("torch.")
