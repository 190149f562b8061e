"""What autograd does with a graph: which results need gradients, and what is kept for the backward.

Comes in from ``normalize``; goes out to ``graph_of``. The graph runs once on fake tensors, which compute nothing, under
hooks that see every tensor autograd saves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.capture.fx_nodes import on_device

aten = torch.ops.aten


@dataclass(slots=True)
class Record:
    """What one run found out, by name of the fx node.

    Attributes:
        values: the fake result, with `requires_grad` as autograd sees it.
        saved: indices of the results that autograd keeps.
        saved_nbytes: bytes kept for a node that are neither an operand nor a result of any.
    """

    values: dict[str, Any] = field(default_factory=dict)
    saved: dict[str, set[int]] = field(default_factory=dict)
    saved_nbytes: dict[str, int] = field(default_factory=dict)

    def needs_grad(self, node: fx.Node) -> bool:
        """Whether the tensor that `node` makes needs a gradient."""
        value = self.values[node.name]
        return isinstance(value, Tensor) and value.requires_grad


class _FusedAttention(torch.autograd.Function):
    """Saves what every fused attention kernel does: operands, result and one float32 statistic per query.

    Which kernel runs is decided on the device, with the plan's shapes; the decision for a fake tensor would be another.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, queries, _ = q.shape
        out = q.new_empty((batch, queries, heads, v.shape[-1])).transpose(1, 2)  # the kernels' memory order
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise AssertionError("only recorded, never differentiated")


def record(graph: fx.Graph, mode: FakeTensorMode, device: torch.device, needs_grad: frozenset[str]) -> Record:
    """Run a flat functional graph on fake tensors; also renews every node's ``meta["val"]``.

    Args:
        graph: placeholders carry their fake tensor in ``meta["val"]``.
        mode: the mode of those fake tensors.
        device: where factories put their results.
        needs_grad: names of the placeholders that need gradients.
    """
    result = Record()
    owner: dict[int, tuple[str, int] | None] = {}
    keep: list[Any] = []  # a storage's address names it only while it lives
    current = ""
    fresh: list[int] = []
    values: dict[fx.Node, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in owner:
            owner[key] = None
            keep.append(storage)
            result.saved_nbytes[current] = result.saved_nbytes.get(current, 0) + storage.nbytes()
            fresh.append(key)
        elif (made_by := owner[key]) is not None:
            result.saved.setdefault(made_by[0], set()).add(made_by[1])
        return tensor

    with mode, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for node in graph.nodes:
            if node.op == "output":
                continue
            current, fresh = node.name, []
            if node.op == "placeholder":
                value: Any = _placeholder(node, node.name in needs_grad)
            else:
                args = fx.node.map_arg(node.args, values.__getitem__)
                kwargs = fx.node.map_arg(on_device(node, device), values.__getitem__)
                value = _run(node, args, kwargs)
            values[node] = result.values[node.name] = value
            _own(result, owner, node, value, fresh)
            keep.append(value)
            node.meta["val"] = value
    return result


def _placeholder(node: fx.Node, needs_grad: bool) -> Tensor:
    like = node.meta["val"]
    made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    return made.requires_grad_(needs_grad)


def _run(node: fx.Node, args: Any, kwargs: Any) -> Any:
    target = node.target
    if target is aten.scaled_dot_product_attention.default and (len(args) < 4 or args[3] is None):
        return _FusedAttention.apply(*args[:3])  # type: ignore[no-untyped-call]
    return target(*args, **kwargs)  # type: ignore[operator]


def _own(result: Record, owner: dict[int, tuple[str, int] | None], node: fx.Node, value: Any, fresh: list[int]) -> None:
    """Note which storages `node` made; one that was saved while it ran turns out to be a result."""
    values = value if isinstance(value, (list, tuple)) else [value]
    for index, tensor in enumerate(values):
        if not isinstance(tensor, Tensor):
            continue
        storage = tensor.untyped_storage()
        if storage._cdata in fresh:
            result.saved.setdefault(node.name, set()).add(index)
            result.saved_nbytes[node.name] -= storage.nbytes()
            fresh.remove(storage._cdata)
            owner[storage._cdata] = (node.name, index)
        elif storage._cdata not in owner:
            # What a placeholder holds is kept by the program anyway and counts as nobody's activation.
            owner[storage._cdata] = None if node.op == "placeholder" else (node.name, index)
