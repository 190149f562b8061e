"""In-place operators out of a flat graph: each becomes an operator that makes a new value, which later readers read.

Calls that write to an argument ``out=`` are treated alike.

Comes in: the graph of `normalize.inline_regions`. Goes out: a graph without in-place operators, and the last value of each buffer or input
that was written to, which becomes an output. A write through a view becomes a new value of the tensor that is viewed, and other views of
that tensor are made again when they are next read::

    y = x[0]; y.add_(1); z = x * 2   ->   y1 = x[0] + 1; x1 = select_scatter(x, y1, 0, 0); z = x1 * 2
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx

from autopar.capture.fx_nodes import emit, is_getitem, source_of, takes, value_of
from autopar.errors import CaptureError

aten = torch.ops.aten


def functionalize(graph: fx.Graph, refused: Mapping[str, str], differentiable: Collection[str]) -> tuple[fx.Graph, dict[str, fx.Node]]:
    """Replace in-place operators; returns the new graph, and name of a placeholder that was written to -> node of its last value.

    Args:
        graph: a flat graph; its placeholders have the same names in the new one.
        refused: names of nodes that mustn't be written to, parameters and constants, with what they are and a remedy.
        differentiable: names of the placeholders that need gradients.

    Raises CaptureError for a write to what is `refused`, for one through a view whose inverse isn't known, for one that goes past autograd
    (``x.detach()``, ``x.data``, under ``no_grad``), and for one to what an autograd function's result shares memory with.
    """
    return _Functionalizer(graph, refused, differentiable).run()


class _Functionalizer:
    """The state of one pass: per old node its current value, what it is a view of, and whether it must be made again."""

    def __init__(self, graph: fx.Graph, refused: Mapping[str, str], differentiable: Collection[str]) -> None:
        self.old = graph
        self.new = fx.Graph()
        self.refused = refused
        self.needs_grad = {node for node in graph.nodes if node.op == "placeholder" and node.name in differentiable}
        self.shared: set[fx.Node] = set()  # results of functions that share memory with arguments, and these arguments
        self.env: dict[fx.Node, Any] = {}
        self.same: dict[fx.Node, fx.Node] = {}  # in-place call -> the node that it writes to, whose value it is
        self.parent: dict[fx.Node, fx.Node] = {}  # view -> what it views
        self.views: dict[fx.Node, list[fx.Node]] = {}  # tensor that is no view -> all views of it, also of views
        self.stale: set[fx.Node] = set()  # views to make again, since what they view has another value
        self.written: dict[str, fx.Node] = {}

    def run(self) -> tuple[fx.Graph, dict[str, fx.Node]]:
        for node in self.old.nodes:
            if node.op == "call_function" and (written := _find_written(node)) is not None:
                self._write(node, written)
            elif node.op == "output":
                self.new.output(fx.node.map_arg(node.args[0], self._read))
            elif node.op == "placeholder":
                self.env[node] = self.new.node_copy(node)
            else:
                self._copy(node)
        return self.new, {name: self._read(node) for name, node in self.written.items()}

    def _copy(self, node: fx.Node) -> None:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._read)
        self.env[node] = emit(self.new, node.target, args, kwargs, node)  # type: ignore[arg-type]
        if _is_view(node):
            parent = self._resolve(node.args[0])  # type: ignore[arg-type]
            self.parent[node] = parent
            self.views.setdefault(self._root(parent), []).append(node)
        operands = [self._resolve(operand) for operand in node.all_input_nodes]
        if node.target is not aten.detach.default and self.needs_grad.intersection(operands):
            self.needs_grad.add(node)
        if node.meta.get("returns_view") or (is_getitem(node) and operands[0] in self.shared):
            self.shared.update([node, *map(self._root, operands)])

    def _resolve(self, node: fx.Node) -> fx.Node:
        while node in self.same:
            node = self.same[node]
        return node

    def _root(self, node: fx.Node) -> fx.Node:
        while node in self.parent:
            node = self.parent[node]
        return node

    def _read(self, node: fx.Node) -> Any:
        node = self._resolve(node)
        if node in self.stale:
            args = (self._read(self.parent[node]), *fx.node.map_arg(node.args[1:], self._read))
            self.env[node] = emit(self.new, node.target, args, node.kwargs, node)  # type: ignore[arg-type]
            self.stale.discard(node)
        return self.env[node]

    def _write(self, node: fx.Node, written: fx.Node) -> None:
        written = self._resolve(written)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._read)
        functional = _call_without_out if "out" in kwargs else _call_functional
        value = functional(self.new, node, args, kwargs)
        self.same[node] = written
        chain = {written}
        makes_grad = bool(self.needs_grad.intersection(map(self._resolve, node.all_input_nodes)))
        # Every tensor that this one is a view of gets a new value, the innermost first.
        while written in self.parent:
            parent = self.parent[written]
            if written.target is aten.detach.default and parent in self.needs_grad and parent.name not in self.refused:
                raise CaptureError(
                    f"a write in place goes past autograd, by detach, .data or no_grad ({source_of(node) or node.name}): the gradient isn't"
                    " that of the new value. Write the line without the in-place operator"
                )
            before = self._read(parent)
            self._set(written, value)
            value = _write_back(self.new, written, before, value, node)
            written = parent
            chain.add(written)
        self._set(written, value)
        self.stale.update(view for view in self.views.get(written, ()) if view not in chain)
        if makes_grad:
            self.needs_grad |= chain
        if chain & self.shared:
            raise CaptureError(
                f"a write in place changes what an autograd function's result shares memory with ({source_of(node) or node.name});"
                " write the line without the in-place operator"
            )
        if written.name in self.refused:
            raise CaptureError(f"the forward writes in place to {self.refused[written.name]} ({source_of(node) or node.name})")
        if written.op == "placeholder":
            self.written[written.name] = written

    def _set(self, node: fx.Node, value: fx.Node) -> None:
        self.env[node] = value
        self.stale.discard(node)


def _find_written(node: fx.Node) -> fx.Node | None:
    """The operand that a call writes to: its first, or the one called ``out``. None for a call that writes to nothing.

    Raises CaptureError for a call that writes to several operands or to a list of them.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return None
    arguments = target._schema.arguments
    is_written = [argument.alias_info is not None and argument.alias_info.is_write for argument in arguments]
    if sum(is_written) == 1:
        index = is_written.index(True)
        written = node.args[index] if index < len(node.args) else node.kwargs.get(arguments[index].name)
        if isinstance(written, fx.Node) and (index == 0 or arguments[index].name == "out"):
            return written
    raise CaptureError(
        f"{target} writes to its operands in a way that isn't known ({source_of(node) or node.name});"
        " call the operator without out= or the trailing underscore, and copy the results with copy_"
    )


# Operators whose schema allows a view, and which make one only when no copy is needed.
_MAYBE_VIEWS = frozenset({aten.reshape.default, aten.contiguous.default, aten.flatten.using_ints})


def _is_view(node: fx.Node) -> bool:
    """Whether the node's result shares storage with its first operand."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not node.args or not isinstance(node.args[0], fx.Node):
        return is_getitem(node) and _is_view(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else False
    alias = target._schema.arguments[0].alias_info
    if alias is None or alias.is_write or not target._schema.returns or target._schema.returns[0].alias_info is None:
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return isinstance(before, Tensor)
    if before.dtype != after.dtype and target is not aten.view.dtype:
        return False  # a conversion
    if target in _MAYBE_VIEWS:
        return before.is_contiguous() or (target is aten.reshape.default and _can_view(before, after.shape))
    return True


def _can_view(tensor: Tensor, shape: torch.Size) -> bool:
    try:
        tensor.view(shape)
    except (RuntimeError, ValueError):
        return False
    return True


def _call_functional(graph: fx.Graph, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    """Emit the operator that makes the value which an in-place operator writes, with the dtype and sizes of what is written to."""
    before = value_of(node)
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    name = target._schema.name.split("::")[1]
    if name == "copy_":
        value: fx.Node = args[1]
        if value_of(value).dtype != before.dtype:
            value = emit(graph, aten.to.dtype, (value, before.dtype), {}, node)
        if value_of(value).shape != before.shape:
            value = emit(graph, aten.expand.default, (value, list(before.shape)), {}, node)
        return value
    if name == "zero_":
        return emit(graph, aten.zeros_like.default, (args[0],), {}, node)
    if name == "fill_" and not isinstance(args[1], fx.Node):
        return emit(graph, aten.full_like.default, (args[0], args[1]), {}, node)
    functional = _functional(target, name, node)
    args = (*args, *_missing_defaults(target, functional, len(args), kwargs))
    value = emit(graph, functional, args, kwargs, node)
    operands = [arg for arg in args[1:] if isinstance(arg, fx.Node) and isinstance(arg.meta.get("val"), Tensor)]
    wide = before.dtype
    for operand in operands:
        if value_of(operand).ndim and value_of(operand).dtype != torch.bool:
            wide = torch.promote_types(wide, value_of(operand).dtype)
    if wide != before.dtype:  # in place keeps the dtype, the functional operator promotes
        value.meta["val"] = before.to(wide)
        value = emit(graph, aten.to.dtype, (value, before.dtype), {}, node)
    return value


def _call_without_out(graph: fx.Graph, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    """Emit the operator that makes what a call writes to its argument ``out``, with the dtype of `out`."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    out = value_of(kwargs["out"])
    kwargs = {name: value for name, value in kwargs.items() if name != "out"}
    functional = _without_out(target, node)
    if takes(functional, "dtype") and not takes(target, "dtype"):
        kwargs["dtype"] = out.dtype  # a factory's, whose twin takes it from `out`
    operands = fx.node.map_arg((args, kwargs), lambda operand: operand.meta["val"])
    value = emit(graph, functional, args, kwargs, node)
    with out.fake_mode:  # type: ignore[attr-defined]
        made = value.meta["val"] = functional(*operands[0], **operands[1])
    if made.shape != out.shape:
        raise CaptureError(
            f"{target} makes a tensor of shape {tuple(made.shape)} and writes it to one of shape {tuple(out.shape)}"
            f" ({source_of(node) or node.name}); give out= a tensor of the right shape, or leave it out"
        )
    if made.dtype == out.dtype:
        return value
    value = emit(graph, aten.to.dtype, (value, out.dtype), {}, node)
    value.meta["val"] = out
    return value


def _without_out(target: torch._ops.OpOverload[..., Any], node: fx.Node) -> Callable[..., Any]:
    """The overload of the same operator that returns its result, and takes the same arguments but for what ``out`` says of its storage."""
    stored_as = {"out", "layout", "device", "pin_memory"} | ({"dtype"} if not takes(target, "dtype") else set())

    def signature(overload: torch._ops.OpOverload[..., Any]) -> list[tuple[str, str]]:
        return [(argument.name, str(argument.type)) for argument in overload._schema.arguments if argument.name not in stored_as]

    packet = getattr(getattr(torch.ops, target.namespace), target._schema.name.split("::")[1])
    for functional in (getattr(packet, name) for name in packet.overloads()):
        if not functional._schema.is_mutable and signature(functional) == signature(target):
            return functional  # type: ignore[no-any-return]
    raise CaptureError(f"{target} has no twin that returns its result ({source_of(node) or node.name}); write the line without out=")


_RENAMED: dict[str, Callable[..., Any]] = {
    "bernoulli_.float": aten.bernoulli.p,
    "normal_.default": aten.normal_functional.default,
    "__iand__.Tensor": aten.bitwise_and.Tensor,
    "__ior__.Tensor": aten.bitwise_or.Tensor,
}


def _functional(target: torch._ops.OpOverload[..., Any], name: str, node: fx.Node) -> Callable[..., Any]:
    renamed = _RENAMED.get(f"{name}.{target._overloadname}")
    if renamed is not None:
        return renamed
    packet = getattr(getattr(torch.ops, target.namespace), name.rstrip("_"), None)
    functional = getattr(packet, target._overloadname, None)
    if functional is None or functional._schema.is_mutable:
        raise CaptureError(
            f"{target} works in place and has no twin that doesn't ({source_of(node) or node.name});"
            " write the line without the in-place operator"
        )
    return functional  # type: ignore[no-any-return]


def _missing_defaults(
    target: torch._ops.OpOverload[..., Any], functional: Callable[..., Any], given: int, kwargs: Mapping[str, Any]
) -> list[Any]:
    """Defaults of the in-place operator for arguments that its functional twin has without one, as the probability of ``bernoulli_``."""
    twins = functional._schema.arguments[given:]  # type: ignore[attr-defined]
    pairs = zip(target._schema.arguments[given:], twins, strict=False)
    required = takewhile(lambda pair: not pair[1].has_default_value() and not pair[1].kwarg_only and pair[1].name not in kwargs, pairs)
    return [argument.default_value for argument, _ in required]


def _write_back(graph: fx.Graph, view: fx.Node, before: fx.Node, value: fx.Node, writer: fx.Node) -> fx.Node:
    """Emit the tensor `before` with `value` in the place of what `view` views of it."""
    target, rest = view.target, view.args[1:]
    like = view.args[0]
    assert isinstance(like, fx.Node)
    shape = list(value_of(like).shape)
    inverse: tuple[Callable[..., Any], tuple[Any, ...]]
    if target in _SCATTERS:
        inverse = (_SCATTERS[target], (before, value, *rest))
    elif target in (aten.transpose.int, aten.t.default):
        inverse = (target, (value, *rest))
    elif target is aten.permute.default:
        order: Any = rest[0]
        inverse = (aten.permute.default, (value, [order.index(dim) for dim in range(len(order))]))
    elif value_of(view).numel() == value_of(like).numel() and target not in (aten.as_strided.default, aten.view.dtype):
        inverse = (aten.reshape.default, (value, shape))
    else:
        raise CaptureError(
            f"a write in place goes through a view by {target} and can't be followed back"
            f" ({source_of(writer) or writer.name}); build the tensor with torch.where or torch.cat instead"
        )
    return emit(graph, *inverse, {}, like)


_SCATTERS: dict[Any, Callable[..., Any]] = {
    aten.select.int: aten.select_scatter.default,
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.diagonal.default: aten.diagonal_scatter.default,
}
