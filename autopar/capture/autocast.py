"""The casts of ``torch.autocast`` as calls of the graph.

Comes in: a flat graph as torch exports it, and the state of autocast at each of its calls. Goes out: the same graph, in which every cast
that autocast makes is a call, so that it computes the same while autocast is off::

    linear = linear(x, w, b)   ->   x_bfloat16 = to(x, bfloat16); w_bfloat16 = ...; b_bfloat16 = ...
                                    linear = linear(x_bfloat16, w_bfloat16, b_bfloat16)

Which operands an operator gets in which dtype is read off torch: the operator runs on fake tensors with autocast as it is at the call, and
what it dispatches is compared with what it dispatches while autocast is off and the operands are cast before. Where no such casts do the
same, as in an operator that torch composes of others and whose inner results autocast casts, it is replaced by those others, with the casts
between them.

As torch does it, the cast of a weight is made once and read by all its readers, whose gradients are so added in the narrow dtype and cast
once; every other tensor is cast for each reader, and the gradients are added in the wide dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import proxy_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.capture.decompose import find_parts
from autopar.capture.errors import explain, failures_unlogged
from autopar.capture.fx_nodes import emit, is_getitem, list_operands, source_of
from autopar.errors import CaptureError
from autopar.ops import AUTOCAST_OFF, Autocast, FunctionCall
from autopar.replaced import replaced

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Region:
    """Where a call is.

    Attributes:
        state: the state of autocast there.
        context: number of the outermost ``with torch.autocast``, whose end drops the cached casts; 0 is one around the call of the model.
            None outside of all.
    """

    state: Autocast
    context: int | None = None


def around_call(state: Autocast) -> Region:
    """Where the calls of a model are that is called in this state of autocast."""
    return Region(state, 0 if state.is_on else None)


def region_of(node: fx.Node) -> Region | None:
    """Where a call is that `enter_region` was told of; None where autocast is off and was never on."""
    return node.meta.get("autocast")


def enter_region(outside: Region, arguments: Sequence[Any], number: int) -> Region:
    """What is inside of a region of the export, whose node has these arguments: device type, dtype, whether it is on, whether it caches.

    `number` is that of the region, if it is an outermost one.
    """
    device, dtype, enabled, caches = arguments
    state = outside.state.inside(device, dtype or torch.get_autocast_dtype(device), enabled, True if caches is None else caches)
    return Region(state, number if outside.context is None else outside.context)


@contextmanager
def weights_cached() -> Iterator[None]:
    """Inside, an export leaves on what caches the casts of weights, so that regions of autocast have the flag that the user gave."""
    with replaced(proxy_tensor, "disable_autocast_cache", nullcontext):
        yield


def state_casts(graph: fx.Graph, mode: FakeTensorMode, trained: Collection[str], notes: list[str]) -> fx.Graph:
    """State the casts of autocast as calls.

    Args:
        graph: a flat graph, whose calls know their `Region`; its placeholders and calls have fake tensors.
        mode: the mode of these fake tensors.
        trained: names of the placeholders that need gradients.
        notes: gets a line where gradients are added otherwise than on one device.

    Raises CaptureError for an operator inside of which autocast casts what a graph can't state.
    """
    if all(region is None or not region.state.is_on for region in map(region_of, graph.nodes)):
        return graph
    with failures_unlogged():
        return _Casting(mode, frozenset(trained), notes).run(graph)


Casts = tuple[torch.dtype | None, ...]
"""Per tensor that a call reads, in order and one that is read twice twice, the dtype to cast it to; None for one that stays."""


@dataclass(frozen=True, slots=True)
class Found:
    """What autocast does to a call.

    Attributes:
        casts: the casts before the call with which it does the same while autocast is off; None where there are no such.
        parts: then, the calls and casts that it is made of, as a functional graph of its operands; None where there are no such either.
        repeated: the operands that autocast casts several times inside of the call, where `casts` do it once.
        views: the operands of which autocast casts a view, which isn't cached.
        same: per result the operand that it is, as a conversion to its own dtype returns its operand; None for others.
    """

    casts: Casts | None
    parts: fx.Graph | None = None
    repeated: frozenset[int] = frozenset()
    views: frozenset[int] = frozenset()
    same: tuple[int | None, ...] = ()


@dataclass(slots=True)
class _Casting:
    """The state of one pass.

    Attributes:
        mode: the mode of the fake tensors.
        trained: names of the placeholders that need gradients.
        notes: gets a line where gradients are added otherwise than on one device.
        new: the new graph.
        cached: weight and context -> its cast.
        same: node of the new graph, or index and node, of a result that is another's -> that other.
        known: target and arguments -> what autocast does.
    """

    mode: FakeTensorMode
    trained: frozenset[str]
    notes: list[str]
    new: fx.Graph = field(default_factory=fx.Graph)
    cached: dict[tuple[fx.Node, int | None], fx.Node] = field(default_factory=dict)
    same: dict[fx.Node | tuple[fx.Node, int], fx.Node] = field(default_factory=dict)
    known: dict[Any, Found] = field(default_factory=dict)

    def run(self, graph: fx.Graph) -> fx.Graph:
        env: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            env[node] = self._emit(node, env)
        return self.new

    def _emit(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        """Emit a node of the old graph, with casts before it; returns the node, or the list of nodes, that make its results."""
        region = region_of(node)
        if is_getitem(node):
            source: Any = env[node.all_input_nodes[0]]
            index: Any = node.args[1]
            if not isinstance(source, fx.Node):
                return source[index]
            made = self.new.node_copy(node, env.__getitem__)
            if (source, index) in self.same:
                self.same[made] = self.same[source, index]
            return made
        if node.op != "call_function" or region is None or not region.state.is_on:
            return self.new.node_copy(node, env.__getitem__)
        if isinstance(node.target, FunctionCall):
            made = self.new.node_copy(node, env.__getitem__)
            made.target = node.target.under(region.state)
            return made
        found = self._find(node, region.state)
        operands = [env[operand] for operand in list_operands(node)]
        if found.casts is None:
            return self._emit_parts(node, found, region, operands)
        read = iter(
            x if dtype is None else self._cast(x, dtype, node, region, is_view=number in found.views)
            for number, (x, dtype) in enumerate(zip(operands, found.casts, strict=True))
        )
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: next(read))
        made = self.new.create_node("call_function", node.target, args, kwargs, name=node.name)
        made.meta = dict(node.meta)
        for number, operand in enumerate(found.same):
            if operand is not None:
                key = made if isinstance(node.meta.get("val"), Tensor) else (made, number)
                self.same[key] = self.same.get(operands[operand], operands[operand])
        for operand in found.repeated:
            if operand in found.views or not self._is_cached(operands[operand], found.casts[operand], region):
                self.notes.append(
                    f"autocast casts an operand of {node.target} several times ({source_of(node) or node.name}); here it is cast once, so"
                    f" that its gradients are added in {str(found.casts[operand]).removeprefix('torch.')}"
                )
        return made

    def _emit_parts(self, node: fx.Node, found: Found, region: Region, operands: Sequence[fx.Node]) -> Any:
        """Emit the operators that an operator is composed of, and the casts between them; returns what makes its results."""
        if found.parts is None:
            raise CaptureError(
                f"autocast ({region.state}) casts values inside of {node.target} ({source_of(node) or node.name}), which can't be stated in"
                " a graph. Write the line with simpler operators, or run it inside of torch.autocast(..., enabled=False) on tensors of one"
                " dtype"
            )
        inner: dict[fx.Node, Any] = {}
        given = iter(operands)
        for part in found.parts.nodes:
            if part.op == "placeholder":
                inner[part] = next(given)
            elif part.op == "output":
                return fx.node.map_arg(part.args[0], inner.__getitem__)
            elif part.target is aten._to_copy.default and part.args[0].op == "placeholder":
                inner[part] = self._cast(inner[part.args[0]], part.meta["val"].dtype, node, region)
            else:
                args, kwargs = fx.node.map_arg((part.args, part.kwargs), inner.__getitem__)
                inner[part] = emit(self.new, part.target, args, kwargs, node)
                inner[part].meta["val"] = part.meta["val"]
        raise AssertionError("a traced graph has an output node")

    def _is_cached(self, operand: fx.Node, dtype: torch.dtype | None, region: Region) -> bool:
        """Whether torch caches the cast of a tensor: it is a weight, of float32 and with a gradient, and the dtype is autocast's."""
        value = operand.meta["val"]
        is_weight = operand.op == "placeholder" and operand.name in self.trained and value.dtype == torch.float32
        return is_weight and region.state.caches and (value.device.type, dtype) in region.state.dtypes

    def _cast(self, operand: fx.Node, dtype: torch.dtype, reader: fx.Node, region: Region, *, is_view: bool = False) -> fx.Node:
        """The cast of a tensor for one of its readers; that of a weight is the same for all readers in a context."""
        operand = self.same.get(operand, operand)
        is_cached = not is_view and self._is_cached(operand, dtype, region)
        if is_cached and (operand, region.context) in self.cached:
            return self.cached[operand, region.context]
        name = f"{operand.name}_{str(dtype).removeprefix('torch.')}"
        made = self.new.create_node("call_function", aten.to.dtype, (operand, dtype), name=name)
        with self.mode:
            made.meta = {**reader.meta, "val": torch.empty_like(operand.meta["val"], dtype=dtype)}
        if is_cached:
            self.cached[operand, region.context] = made
        return made

    def _find(self, node: fx.Node, state: Autocast) -> Found:
        operands = [operand.meta["val"] for operand in list_operands(node)]
        others = fx.node.map_arg((node.args, node.kwargs), lambda _: None)
        described = tuple((x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x for x in operands)
        key = (node.target, state, repr(described), repr(others))
        if key not in self.known:
            try:
                self.known[key] = find_casts(node, operands, state, self.mode)
            except Exception as error:  # a run on fake tensors that torch refuses
                raise explain(error, source_of(node)) from error
        return self.known[key]


# --- casts read off torch ---------------------------------------------------------------------------------------------------


def find_casts(node: fx.Node, operands: Sequence[Any], state: Autocast, mode: FakeTensorMode) -> Found:
    """What autocast does to a call in `state`.

    Casts before a call do the same as autocast when the call then dispatches the same operators, whose results have the same dtypes, where
    operators that only move elements don't count. What is cast must not be read in its own dtype beside that, or be cast to a wider dtype,
    which changes no value.

    Args:
        node: the call.
        operands: what its operands are, in order: fake tensors.
        state: the state of autocast.
        mode: the mode of the fake tensors.
    """

    def watch(casts: Casts, autocast: Autocast = AUTOCAST_OFF) -> _Watch:
        return _watch(lambda args, kwargs: node.target(*args, **kwargs), node, operands, casts, autocast, mode)  # type: ignore[operator]

    if node.target in _HIDDEN:
        return Found(None)
    nothing: Casts = (None,) * len(operands)
    under = watch(nothing, state)
    plain = _try(watch, nothing)
    if plain is not None and plain.calls == under.calls:
        return Found(nothing, same=plain.same)
    own = [] if plain is None else plain.calls

    def does_the_same(casts: Casts | None) -> bool:
        stated = _try(watch, casts) if casts is not None and any(casts) else None
        return stated is not None and casts is not None and stated.without() == under.without(casts) and stated.results == under.results

    casts, repeated, views = _casts_of_operands(operands, under, own)
    if not repeated and does_the_same(casts):
        return Found(casts, views=views)
    if does_the_same(widened := _casts_to_results(operands, under)):
        return Found(widened)
    if all(isinstance(x, Tensor) for x in operands) and (parts := find_parts(node, operands, mode, state)) is not None:
        module = fx.GraphModule(nn.Module(), parts)
        whole = _watch(lambda args, kwargs: module(*_tensors_of((args, kwargs))), node, operands, nothing, AUTOCAST_OFF, mode)
        if whole.without() == under.without() and whole.results == under.results:
            return Found(None, parts)
    return Found(casts, repeated=repeated, views=views) if does_the_same(casts) else Found(None)


_HIDDEN = frozenset({aten.bilinear.default, aten._trilinear.default})
"""Operators whose kernels call operators that autocast casts, where nothing sees it."""


def _try(watch: Callable[[Casts], _Watch], casts: Casts) -> _Watch | None:
    """What a call does while autocast is off; None where the operator refuses operands of these dtypes."""
    try:
        return watch(casts)
    except Exception:  # torch's
        return None


@dataclass(frozen=True, slots=True)
class _Call:
    """One operator that computes something, by its name and what it makes; and which operand it casts, or a view of which one."""

    name: str
    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[torch.Size, ...]
    source: int | None = None
    numel: int = 0
    is_view: bool = False


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the operators that a call dispatches below autocast.

    Attributes:
        calls: those that compute something, in order.
        reads: the operands that they read, but for casts.
        results: the dtypes of what the call returns.
        same: per result the operand that it is.
    """

    def __init__(self, operands: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []
        self.reads: set[int] = set()
        self.results: list[torch.dtype] = []
        self.same: tuple[int | None, ...] = ()
        self._made = list(operands)  # alive, so that no other tensor gets one's id
        self._operands = set(map(id, operands))
        self._source = {id(x): number for number, x in enumerate(operands)}  # what has elements of an operand and nothing else

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # questions
            return result
        results = _tensors_of(result)
        self._made += results
        first = args[0] if args else None
        source = self._source.get(id(first))
        if isinstance(first, Tensor) and all(_is_moved(func, first, x) for x in results):
            for x in results:
                if source is not None and x.numel() <= first.numel():
                    self._source[id(x)] = source
        elif func is aten._to_copy.default and source is not None:
            self.calls.append(_Call(_name(func), (result.dtype,), (result.shape,), source, result.numel(), id(first) not in self._operands))
        else:
            self.reads.update(self._source[id(x)] for x in _tensors_of((args, kwargs)) if id(x) in self._source)
            self.calls.append(_Call(_name(func), tuple(x.dtype for x in results), tuple(x.shape for x in results)))
        return result

    def without(self, casts: Casts = ()) -> list[_Call]:
        """The calls without `casts`."""
        stated = {(number, (dtype,)) for number, dtype in enumerate(casts)}
        return [replace(call, source=None, numel=0, is_view=False) for call in self.calls if (call.source, call.dtypes) not in stated]


_COPIES = frozenset({aten.clone.default, aten._unsafe_view.default})


def _name(func: Any) -> str:
    """An operator's name, the same whether it works in place or not, and whether it is told the dtype to compute in."""
    return str(func._schema.name).rstrip("_")


def _tensors_of(values: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(values) if isinstance(x, Tensor)]


def _is_moved(func: Any, source: Tensor, result: Tensor) -> bool:
    """Whether the result has elements of `source`, perhaps in another order or repeated, and nothing is computed."""
    if func._schema.is_mutable or result.dtype != source.dtype:
        return False
    return func in _COPIES or result.untyped_storage()._cdata == source.untyped_storage()._cdata


def _watch(
    run: Callable[[Any, Any], Any], node: fx.Node, operands: Sequence[Any], casts: Casts, state: Autocast, mode: FakeTensorMode
) -> _Watch:
    """Call `run` with the arguments of a call, in which its operands are fake tensors, cast before, in a state of autocast."""
    fakes = [_make_fake(x, mode, dtype) for x, dtype in zip(operands, casts, strict=True)]
    given = iter(fakes)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: next(given))
    # Without gradients, as torch remembers the casts of weights that need one.
    watch = _Watch(fakes)
    with torch.no_grad(), mode, state.active(), watch:
        results = _tensors_of(run(args, kwargs))
    watch.results = [x.dtype for x in results]
    number_of = {id(x): number for number, x in enumerate(fakes)}
    watch.same = tuple(number_of.get(id(x)) for x in results)
    return watch


def _make_fake(like: Any, mode: FakeTensorMode, dtype: torch.dtype | None) -> Any:
    if not isinstance(like, Tensor):
        return like
    with mode:
        return torch.empty_strided(like.shape, like.stride(), dtype=dtype or like.dtype, device=like.device)


def _casts_of_operands(operands: Sequence[Any], under: _Watch, own: Sequence[_Call]) -> tuple[Casts | None, frozenset[int], frozenset[int]]:
    """The casts of operands beside the operator's own; which operands are cast more than once; of which a view is cast.

    No casts where they contradict each other.
    """
    casts: list[torch.dtype | None] = [None] * len(operands)
    left = [x.numel() if isinstance(x, Tensor) else 0 for x in operands]
    added = [call for call in under.calls if call.source is not None and call not in own]
    for call in added:
        assert call.source is not None
        left[call.source] -= call.numel
        if call.source in under.reads or casts[call.source] not in (None, call.dtypes[0]):
            return None, frozenset(), frozenset()
        casts[call.source] = call.dtypes[0]
    repeated = frozenset(number for number, numel in enumerate(left) if numel < 0)
    return tuple(casts), repeated, frozenset(call.source for call in added if call.source is not None and call.is_view)


def _casts_to_results(operands: Sequence[Any], under: _Watch) -> Casts | None:
    """Casts of all operands to the dtype of the results, as of an operator that autocast asks to compute in it; None where one is wider."""
    dtypes = {dtype for dtype in under.results if dtype.is_floating_point}
    if len(dtypes) != 1:
        return None
    dtype = dtypes.pop()
    floats = [isinstance(x, Tensor) and x.is_floating_point() for x in operands]
    if any(is_float and torch.promote_types(x.dtype, dtype) != dtype for x, is_float in zip(operands, floats, strict=True)):
        return None
    return tuple(dtype if is_float and x.dtype != dtype else None for x, is_float in zip(operands, floats, strict=True))
