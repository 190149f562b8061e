"""What autograd does with a graph: which results need gradients, and what it saves for the backward.

Comes in: a flat, functional graph with fake tensors. Goes out: a `Record`. The graph runs once on the fake tensors, which compute nothing,
under hooks that see every tensor that autograd saves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from autopar import ir
from autopar.capture.errors import explain
from autopar.capture.fx_nodes import on_device, source_of, value_of
from autopar.capture.working import Run, call_key, find_working

aten = torch.ops.aten


@dataclass(slots=True)
class Record:
    """One run of a graph, by name of the fx node.

    Attributes:
        values: the fake result (or results), with ``requires_grad`` as autograd set it.
        saved: indices of the results that autograd saves.
        saved_nbytes: bytes that autograd saves for a node beyond operands and results of any node.
        working: what a node needs while it runs.
        on_cpu: the same with the kernels that torch takes on a CPU; None where these save what a GPU's do.
    """

    values: dict[str, Any] = field(default_factory=dict)
    saved: dict[str, set[int]] = field(default_factory=dict)
    saved_nbytes: dict[str, int] = field(default_factory=dict)
    working: dict[str, ir.Working] = field(default_factory=dict)
    on_cpu: Record | None = None

    def memory(self, name: str) -> ir.OpMemory:
        """What is known of a node's memory."""
        saved = frozenset(self.saved.get(name, ()))
        return ir.OpMemory(saved, self.saved_nbytes.get(name, 0), self.working.get(name, ir.Working()))

    def needs_grad(self, node: fx.Node) -> bool:
        """Whether the tensor that `node` makes needs a gradient."""
        value = self.values[node.name]
        return isinstance(value, Tensor) and value.requires_grad


class _FusedAttention(torch.autograd.Function):
    """Stands for fused attention: saves what every fused kernel saves, the operands, the result and a float32 statistic per query.

    Which kernel a GPU runs is decided there, with the plan's shapes; for a fake tensor torch would decide otherwise.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, queries, _ = q.shape
        out = q.new_empty((batch, queries, heads, v.shape[-1])).transpose(1, 2)  # the kernels' memory order
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError("only recorded, never differentiated")


_GATES = {aten.lstm.input: 6, aten.gru.input: 5, aten.rnn_tanh.input: 1, aten.rnn_relu.input: 1}
"""Recurrent layer -> values that its backward needs per step, sequence and hidden feature: gates, cell states, their tanh."""


def _find_workspace(node: fx.Node, args: Sequence[Any], value: Any) -> int:
    """Bytes that a fused recurrent layer saves in a workspace, which fake tensors show as empty; 0 for other calls.

    On a GPU these are the values of `_GATES`. On a CPU only the LSTM is fused, by oneDNN, in the dtypes below. Per layer, direction, step
    and sequence its workspace has about ``(7 s + 9) h + (2 s + 16) max(h, i)`` bytes, with elements of s bytes, h hidden features and i
    features of the layer's input. That was measured with torch 2.13; the numbers below are somewhat larger.
    """
    if node.target not in _GATES or not value[0].requires_grad:
        return 0
    x, states, _, _, layers, _, _, bidirectional, batch_first = args
    directions, itemsize = 2 if bidirectional else 1, x.dtype.itemsize
    if x.device.type != "cpu":
        hidden = (states[1] if isinstance(states, (list, tuple)) else states).shape[-1]  # an LSTM's hidden state may be a projection
        return int(layers * directions * x.shape[0] * x.shape[1] * hidden * _GATES[node.target] * itemsize)
    if node.target is not aten.lstm.input or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return 0
    hidden = states[1].shape[-1]
    rows = x.shape[0] * x.shape[1] + x.shape[0 if batch_first else 1]  # one step more than there are
    widths = [x.shape[2]] + [directions * hidden] * (layers - 1)
    per_row = ((7.5 * itemsize + 10) * hidden + (2 * itemsize + 18) * max(hidden, width) for width in widths)
    return int(directions * rows * sum(per_row))


def record(graph: fx.Graph, mode: FakeTensorMode, device: torch.device, needs_grad: frozenset[str]) -> Record:
    """Run a flat, functional graph on fake tensors; sets every node's ``meta["val"]`` to its new value.

    Args:
        graph: the graph; its placeholders have their fake tensors in ``meta["val"]``.
        mode: the mode of those fake tensors.
        device: where factories put their results.
        needs_grad: names of the placeholders that require gradients.
    """
    working: dict[object, ir.Working] = {}
    result = _run_graph(graph, mode, device, needs_grad, _run, working)
    attention = {call_key(node, result.values): node for node in graph.nodes if _may_be_fused(node)} if device.type == "cpu" else {}
    if any(_has_other_kernel(node, result.values, mode) for node in attention.values()):
        others = {key: needs for key, needs in working.items() if key not in attention}
        result.on_cpu = _run_graph(graph, mode, device, needs_grad, _run_as_it_is, others)
    for node in graph.nodes:
        if node.name in result.values:
            node.meta["val"] = result.values[node.name]
    return result


def _run_graph(
    graph: fx.Graph, mode: FakeTensorMode, device: torch.device, needs_grad: frozenset[str], run: Run, working: dict[object, ir.Working]
) -> Record:
    """Run a graph, node by node with `run`; `working` is what is known of calls by `call_key`, and is added to."""
    result = Record()
    makers: dict[int, tuple[str, int] | None] = {}  # storage -> the node and the index of the result that made it
    alive: list[Any] = []  # a storage's address identifies it only while it lives
    current = ""
    unclaimed: list[int] = []
    values: dict[fx.Node, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in makers:
            makers[key] = None
            alive.append(storage)
            result.saved_nbytes[current] = result.saved_nbytes.get(current, 0) + storage.nbytes()
            unclaimed.append(key)
        elif (maker := makers[key]) is not None:
            result.saved.setdefault(maker[0], set()).add(maker[1])
        return tensor

    with mode, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for node in graph.nodes:
            if node.op == "output":
                continue
            current, unclaimed = node.name, []
            if node.op == "placeholder":
                value: Any = _placeholder(node, node.name in needs_grad)
            else:
                args = fx.node.map_arg(node.args, values.__getitem__)
                kwargs = fx.node.map_arg(on_device(node, device), values.__getitem__)
                try:
                    value = run(node, args, kwargs)
                except Exception as error:  # exported, but its result depends on values
                    raise explain(error, source_of(node)) from error
                if workspace := _find_workspace(node, args, value):
                    result.saved_nbytes[node.name] = result.saved_nbytes.get(node.name, 0) + workspace
            values[node] = result.values[node.name] = value
            _claim(result, makers, node, value, unclaimed)
            alive.append(value)
    result.working = find_working(graph, result.values, mode, run, working)
    return result


def _placeholder(node: fx.Node, needs_grad: bool) -> Tensor:
    like = node.meta["val"]
    made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    return made.requires_grad_(needs_grad)


def _run(node: fx.Node, args: Any, kwargs: Any) -> Any:
    if _may_be_fused(node):
        return _FusedAttention.apply(*args[:3])  # type: ignore[no-untyped-call]
    return _run_as_it_is(node, args, kwargs)


def _run_as_it_is(node: fx.Node, args: Any, kwargs: Any) -> Any:
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _may_be_fused(node: fx.Node) -> bool:
    """Whether a fused kernel may run a call of attention: one without a mask, of (batch, heads, rows, head size), as all kernels take."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    query, _, _, *rest = node.args
    return isinstance(query, fx.Node) and value_of(query).ndim == 4 and (not rest or rest[0] is None)


class _Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the names of operators that run inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def _has_other_kernel(node: fx.Node, values: Mapping[str, Any], mode: FakeTensorMode) -> bool:
    """Whether torch has no fused kernel on a CPU for this call of attention, such as one with dropout, and so saves its scores."""
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda argument: values[argument.name])
    with mode, torch.no_grad(), _Kernels() as kernels:
        _run_as_it_is(node, args, kwargs)
    return not any(name.startswith("aten::_scaled_dot_product") for name in kernels.names)


def _claim(result: Record, makers: dict[int, tuple[str, int] | None], node: fx.Node, value: Any, unclaimed: list[int]) -> None:
    """Record which storages a node made. Those that were saved while it ran, and are among its results, are saved results."""
    values = value if isinstance(value, (list, tuple)) else [value]
    for index, tensor in enumerate(values):
        if not isinstance(tensor, Tensor):
            continue
        storage = tensor.untyped_storage()
        if storage._cdata in unclaimed:
            result.saved.setdefault(node.name, set()).add(index)
            result.saved_nbytes[node.name] -= storage.nbytes()
            unclaimed.remove(storage._cdata)
            makers[storage._cdata] = (node.name, index)
        elif storage._cdata not in makers:
            # A placeholder's tensor is there anyway, so that saving it is no activation.
            makers[storage._cdata] = None if node.op == "placeholder" else (node.name, index)
