"""From an exported program to one flat graph without noise: a list of passes, each from a graph to a new graph.

Comes in: the fx graph of `torch.export`. Goes out: a graph without submodules that states every size, names no device, and has only calls
that compute something. In-place operators are replaced by `functionalize`, which runs between `inline_regions` and `simplify`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from autopar.capture.autocast import Region, around_call, enter_region
from autopar.capture.fx_nodes import emit, is_getitem, source_of, takes, value_of
from autopar.capture.record import Record
from autopar.errors import CaptureError
from autopar.ops import AUTOCAST_OFF, Autocast

aten = torch.ops.aten

Target = Callable[..., Any]
Call = tuple[Target, tuple[Any, ...], dict[str, Any]]


@dataclass(slots=True)
class _Inlining:
    """The state of `inline_regions`.

    Attributes:
        graph: the new graph.
        without_grad: its nodes made under ``no_grad``.
        detached: the detached version of each node read there.
        contexts: how many outermost regions of autocast there were.
    """

    graph: fx.Graph
    without_grad: set[fx.Node] = field(default_factory=set)
    detached: dict[fx.Node, fx.Node] = field(default_factory=dict)
    contexts: int = 0


def inline_regions(module: fx.GraphModule, autocast: Autocast = AUTOCAST_OFF) -> fx.Graph:
    """Replace ``no_grad`` and ``autocast`` regions, which are submodules of the export, by their bodies.

    What a ``no_grad`` region reads from outside is detached, so that nothing in it is differentiated; `drop_detach` later removes those
    detach calls whose operand needs no gradient. Every call is told its `Region` of autocast, of which `state_casts` makes casts; around
    the model autocast is in the state `autocast`. Raises CaptureError for `torch.func` and `torch.autograd.forward_ad`, which transform
    functions.
    """
    state = _Inlining(fx.Graph())
    placeholders = [state.graph.node_copy(node) for node in module.graph.nodes if node.op == "placeholder"]
    state.graph.output(_inline(module, placeholders, True, around_call(autocast), state))
    return state.graph


def _inline(module: fx.GraphModule, inputs: list[Any], grad: bool, casting: Region, state: _Inlining) -> Any:
    env: dict[fx.Node, Any] = {}
    operands = iter(inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(operands)
        elif node.op == "get_attr":
            env[node] = getattr(module, str(node.target))
        elif node.op == "output":
            return fx.node.map_arg(node.args[0], env.__getitem__)
        elif is_getitem(node) and not isinstance(env[node.args[0]], fx.Node):
            env[node] = env[node.args[0]][node.args[1]]
        elif (name := getattr(node.target, "__name__", "")) in _REGIONS:
            count = _REGIONS[name]
            given, body, args = node.args[:count], node.args[count], node.args[count + 1 :]
            values = [env[arg] if isinstance(arg, fx.Node) else arg for arg in args]
            if name == "wrap_with_autocast":
                state.contexts += 1
                env[node] = _inline(env[body], values, grad, enter_region(casting, given, state.contexts), state)
            else:
                env[node] = _inline(env[body], values, given[0], casting, state)
        else:
            if getattr(node.target, "__module__", "") == "torch._functorch.predispatch" or node.target is aten._make_dual.default:
                raise CaptureError(
                    f"the forward transforms a function by torch.func or forward-mode AD ({source_of(node) or node.name}), which isn't part"
                    " of a graph of operators. Write the computation of the whole batch by operators"
                )
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _read(env[n], grad, state))
            env[node] = emit(state.graph, node.target, args, kwargs, node)
            env[node].meta["autocast"] = casting
            if not grad:
                state.without_grad.add(env[node])
    raise AssertionError("an exported graph has an output node")


_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
"""Region of an export -> how many arguments come before its body; what the body reads comes after."""


def _read(value: Any, grad: bool, state: _Inlining) -> Any:
    """The value as a call reads it: detached if the call is in a ``no_grad`` region and the value comes from outside."""
    if grad or not isinstance(value, fx.Node) or value in state.without_grad:
        return value
    tensor = value.meta.get("val")
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or value.name.startswith("b_"):
        return value
    if value not in state.detached:
        state.detached[value] = emit(state.graph, aten.detach.default, (value,), {}, value)
        state.without_grad.add(state.detached[value])
    return state.detached[value]


def simplify(graph: fx.Graph, device: torch.device) -> fx.Graph:
    """Apply `RULES` to every call, in program order, and drop calls whose results nothing reads.

    Args:
        graph: a flat, functional graph.
        device: the model's device. Arguments that name it are removed, since programs may run on another one.
    """
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            env[node] = new.node_copy(node, env.__getitem__)
            continue
        if node.target in ASSERTIONS:  # of what a composite operator was made of
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
        call: Call = (node.target, args, dict(kwargs))
        if isinstance(node.target, torch._ops.OpOverload):
            call = to_positional(*call)
            call = forget_device(call, node, device)
        source: fx.Node | None = None
        for rule in RULES.get(call[0], ()):
            result = rule(call, node)
            if isinstance(result, fx.Node):
                source = result
                break
            call = result
        env[node] = emit(new, *call, node) if source is None else source
    new.eliminate_dead_code()
    return new


def to_positional(target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The call with its arguments by position, except those that the operator's schema has by keyword only."""
    if not kwargs:
        return target, args, kwargs
    schema = target._schema.arguments  # type: ignore[attr-defined]
    positional = list(args)
    missing: list[Any] = []
    for argument in schema[len(args) :]:
        if argument.kwarg_only:
            break
        if argument.name in kwargs:
            positional += [*missing, kwargs.pop(argument.name)]
            missing = []
        else:
            missing.append(argument.default_value)
    return target, tuple(positional), kwargs


def forget_device(call: Call, node: fx.Node, device: torch.device) -> Call:
    """The call without the model's device, and with the dtype that a factory would take from torch's default."""
    target, args, kwargs = call
    if "device" in kwargs and (kwargs["device"] is None or torch.device(kwargs["device"]) == device):
        del kwargs["device"]
    if not kwargs.get("pin_memory", True) or kwargs.get("pin_memory", 0) is None:
        del kwargs["pin_memory"]
    if "layout" in kwargs and kwargs["layout"] in (None, torch.strided):
        del kwargs["layout"]
    tensor = node.meta.get("val")
    is_factory = isinstance(tensor, Tensor) and not node.all_input_nodes and takes(target, "dtype")
    if is_factory and kwargs.get("dtype") is None:
        kwargs["dtype"] = tensor.dtype  # type: ignore[union-attr]
    return target, args, kwargs


def skip(call: Call, node: fx.Node) -> Call | fx.Node:
    """Replace an operator that only renames its operand by the operand."""
    return call[1][0]  # type: ignore[no-any-return]


def skip_same_tensor(call: Call, node: fx.Node) -> Call | fx.Node:
    """Replace a view, expansion or slice that changes neither sizes nor dtype by its operand."""
    source = call[1][0]
    before, after = value_of(source), value_of(node)
    return source if before.shape == after.shape and before.dtype == after.dtype else call


def skip_conversion(call: Call, node: fx.Node) -> Call | fx.Node:
    """Replace a conversion to the operand's own dtype and device by the operand, and one of the dtype alone by ``aten.to.dtype``."""
    source = call[1][0]
    before, after = value_of(source), value_of(node)
    if before.device != after.device:
        return call
    return source if before.dtype == after.dtype else (aten.to.dtype, (source, after.dtype), {})


def skip_inactive_dropout(call: Call, node: fx.Node) -> Call | fx.Node:
    """Replace dropout with probability zero, or outside training, by its operand."""
    source, probability, training = call[1]
    return source if probability == 0 or not training else call


def skip_copy(call: Call, node: fx.Node) -> Call | fx.Node:
    """Replace a copy in the operand's memory order by the operand: nothing is updated in place here, so they can't differ."""
    memory_format = call[2].get("memory_format")
    return call[1][0] if memory_format in (None, torch.preserve_format) else call


def skip_adding_zero(call: Call, node: fx.Node) -> Call | fx.Node:
    """Replace ``x + 0`` of integers, which comes from arithmetic on offsets, by its operand."""
    source, addend = call[1][:2]
    if isinstance(source, fx.Node) and addend == 0 and not isinstance(addend, fx.Node) and not value_of(node).is_floating_point():
        return skip_same_tensor(call, node)
    return call


def spell_shape(call: Call, node: fx.Node) -> Call | fx.Node:
    """Make a reshape or expansion state every size; ``view`` becomes ``reshape``, since a rank's part may have other strides."""
    source = call[1][0]
    shape = list(value_of(node).shape)
    target = aten.expand.default if call[0] in _EXPANSIONS else aten.reshape.default
    return target, (source, shape), {}


def spell_slice(call: Call, node: fx.Node) -> Call | fx.Node:
    """Make a slice state its dim, start and end, counted from the front."""
    source, *rest = call[1]
    given = dict(zip(("dim", "start", "end", "step"), rest, strict=False))
    dim, step = given.get("dim", 0), given.get("step", 1)
    shape = value_of(source).shape
    dim %= len(shape)
    start, end, _ = slice(given.get("start"), given.get("end"), step).indices(shape[dim])
    return call[0], (source, dim, start, max(start, end)) + ((step,) if step != 1 else ()), {}


def spell_transpose(call: Call, node: fx.Node) -> Call | fx.Node:
    """Replace ``x.T`` and ``x.mT`` by the operator that names the dims."""
    source = call[1][0]
    if value_of(source).ndim < 2:
        return source  # type: ignore[no-any-return]
    if call[0] is aten.numpy_T.default and value_of(source).ndim > 2:
        return aten.permute.default, (source, list(reversed(range(value_of(source).ndim)))), {}
    return (aten.t.default, (source,), {}) if value_of(source).ndim == 2 else (aten.transpose.int, (source, -2, -1), {})


def spell_factory(call: Call, node: fx.Node) -> Call | fx.Node:
    """Replace ``x.new_zeros``, ``x.new_empty`` and the like, which read nothing but the dtype of `x`, by factories that name the dtype."""
    if "device" in call[2]:
        return call
    return _FACTORIES[call[0]], call[1][1:], {"dtype": value_of(node).dtype}


def spell_padding(call: Call, node: fx.Node) -> Call | fx.Node:
    """Make a convolution that pads by a word, ``same`` or ``valid``, state the numbers, where both ends get the same."""
    image, weight, *rest = call[1]
    sizes = value_of(weight).shape[2:]
    defaults: list[Any] = [None, [1], "valid", [1], 1]
    bias, stride, word, dilation, groups = [*rest, *defaults[len(rest) :]]
    dilations = list(dilation) * len(sizes) if len(dilation) == 1 else dilation
    both_ends = [0 if word == "valid" else step * (size - 1) for step, size in zip(dilations, sizes, strict=True)]
    if any(amount % 2 for amount in both_ends):
        return call
    target = getattr(aten, f"conv{len(sizes)}d").default
    return target, (image, weight, bias, stride, [amount // 2 for amount in both_ends], dilation, groups), {}


def spell_broadcast(call: Call, node: fx.Node) -> Call | fx.Node:
    """Replace a result of ``broadcast_tensors``, which losses call, by the expansion of its operand, or by the operand itself."""
    source, index = call[1]
    if source.target is not aten.broadcast_tensors.default:
        return call
    return skip_same_tensor((aten.expand.default, (source.args[0][index], list(value_of(node).shape)), {}), node)


def spell_mean_of_losses(call: Call, node: fx.Node) -> Call | fx.Node:
    """Replace the loss that ``nll_loss_forward`` returns beside the weight of its targets, by the operator that returns the loss alone."""
    source, index = call[1]
    is_loss = index == 0 and source.target in (aten.nll_loss_forward.default, aten.nll_loss2d_forward.default)
    return (aten.nll_loss_nd.default, source.args, {}) if is_loss else call


def forget_output_size(call: Call, node: fx.Node) -> Call | fx.Node:
    """Drop the size of the result of ``repeat_interleave``, which follows from the operand's, and is another one for a part of it."""
    return call[0], call[1], {name: value for name, value in call[2].items() if name != "output_size"}


def rename(target: Target) -> Callable[[Call, fx.Node], Call | fx.Node]:
    """A rule that calls the same operator under its usual name."""

    def rule(call: Call, node: fx.Node) -> Call | fx.Node:
        return target, call[1], call[2]

    return rule


_OF_VALUES: frozenset[Any] = frozenset({aten._assert_async.msg, aten._assert_async.default, aten._assert_scalar.default})
_OF_SIZES: frozenset[Any] = frozenset(
    {aten._assert_tensor_metadata.default, aten.sym_constrain_range_for_size.default, aten.sym_constrain_range.default}
)
ASSERTIONS = _OF_VALUES | _OF_SIZES
"""Operators that check something and make nothing."""


def drop_assertions(graph: fx.Graph, notes: list[str]) -> None:
    """Remove calls that check something and make nothing, and the numbers that only they read.

    What is checked of sizes and dtypes can't change for a captured graph. An assertion about values, such as
    ``assert lengths.max().item() <= 512``, is noted: a program doesn't check it.
    """
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or node.users:
            continue
        if node.target in _OF_VALUES:
            notes.append(f"the assertion about values at `{source_of(node)}` isn't checked by the program")
            graph.erase_node(node)
        elif node.target in _OF_SIZES or isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)):
            graph.erase_node(node)


# Each draws a mask of its own kind, by simpler random operators.
_COMPOSITE_DROPOUTS = (aten.feature_dropout.default, aten.alpha_dropout.default, aten.feature_alpha_dropout.default)

_EXPANSIONS = frozenset({aten.expand.default, aten.expand_as.default, aten.broadcast_to.default})

_FACTORIES: dict[Any, Any] = {
    aten.new_empty.default: aten.empty.memory_format,
    aten.new_zeros.default: aten.zeros.default,
    aten.new_ones.default: aten.ones.default,
    aten.new_full.default: aten.full.default,
}

_OTHER_NAMES = {
    "multiply": "mul",
    "subtract": "sub",
    "divide": "div",
    "true_divide": "div",
    "negative": "neg",
    "absolute": "abs",
    "clip": "clamp",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
    "arccos": "acos",
    "arcsin": "asin",
    "arctan": "atan",
    "arctan2": "atan2",
    "special_expit": "sigmoid",
    "special_erf": "erf",
    "fix": "trunc",
    "concatenate": "cat",
    "moveaxis": "movedim",
}
"""Operators that do what another does under its usual name."""

Rule = Callable[[Call, fx.Node], "Call | fx.Node"]

RULES: dict[Any, tuple[Rule, ...]] = {
    **dict.fromkeys((aten.alias.default, aten.lift_fresh_copy.default, aten.lift_fresh.default), (skip,)),
    **dict.fromkeys(
        (
            aten.to.dtype,
            aten.to.device,
            aten.to.dtype_layout,
            aten.to.other,
            aten._to_copy.default,
            aten.type_as.default,
        ),
        (skip_conversion,),
    ),
    **dict.fromkeys(
        (
            aten.view.default,
            aten.reshape.default,
            aten._unsafe_view.default,
            aten.unflatten.int,
            aten.flatten.using_ints,
            aten.view_as.default,
            aten.reshape_as.default,
            *_EXPANSIONS,
        ),
        (skip_same_tensor, spell_shape),
    ),
    aten.slice.Tensor: (skip_same_tensor, spell_slice),
    **dict.fromkeys((aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding), (spell_padding,)),
    aten.clone.default: (skip_copy,),
    **dict.fromkeys(
        (aten.dropout.default, *_COMPOSITE_DROPOUTS),
        (skip_inactive_dropout,),
    ),
    **dict.fromkeys(_FACTORIES, (spell_factory,)),
    operator.getitem: (spell_broadcast, spell_mean_of_losses),
    aten.add.Tensor: (skip_adding_zero,),
    aten.repeat_interleave.self_int: (forget_output_size,),
    **{
        getattr(getattr(aten, other), overload): (rename(getattr(getattr(aten, usual), overload)),)
        for other, usual in _OTHER_NAMES.items()
        for overload in getattr(aten, other).overloads()
        if overload in getattr(aten, usual).overloads()
    },
    aten.numpy_T.default: (spell_transpose,),
    aten.mT.default: (spell_transpose,),
    aten.__and__.Tensor: (rename(aten.bitwise_and.Tensor),),
    aten.__or__.Tensor: (rename(aten.bitwise_or.Tensor),),
    aten.__xor__.Tensor: (rename(aten.bitwise_xor.Tensor),),
}
"""Operator -> the rules that are applied to its calls, in order. A rule returns a changed call, or a node that replaces the call."""


HANDLED: frozenset[Any] = frozenset({*RULES, *ASSERTIONS, aten.broadcast_tensors.default} - set(_COMPOSITE_DROPOUTS))
"""Operators that `simplify` replaces or drops, and which needn't be taken apart before it."""


def slice_constant_indices(graph: fx.Graph, constants: Mapping[str, Tensor]) -> fx.Graph:
    """Replace ``x[..., [4, 5]]``, whose indices are constant and consecutive in one dim, by a slice.

    Args:
        graph: a flat, functional graph.
        constants: placeholder -> its value, where that is constant.
    """
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        dim_range = _constant_range(node, constants)
        if dim_range is None:
            env[node] = new.node_copy(node, env.__getitem__)
        else:
            env[node] = emit(new, aten.slice.Tensor, (env[node.args[0]], *dim_range), {}, node)
    new.eliminate_dead_code()
    return new


def _constant_range(node: fx.Node, constants: Mapping[str, Tensor]) -> tuple[int, int, int] | None:
    """(dim, start, end) of an index operator that selects a constant range; None for any other node."""
    if node.target is not aten.index.Tensor:
        return None
    source, indices = node.args
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]  # type: ignore[arg-type]
    if len(given) != 1 or given[0][1].name not in constants:
        return None
    dim, index = given[0]
    values = constants[index.name]
    if values.ndim != 1 or values.dtype == torch.bool or not values.numel():
        return None
    size = value_of(source).shape[dim]  # type: ignore[arg-type]
    start = int(values[0]) % size
    consecutive = torch.arange(start, start + values.numel())
    return (dim, start, start + values.numel()) if torch.equal(values.cpu() % size, consecutive) else None


def drop_unused(graph: fx.Graph, names: Collection[str]) -> fx.Graph:
    """The graph without those of the placeholders `names` that nothing reads."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "placeholder" or node.users or node.name not in names:
            env[node] = new.node_copy(node, env.__getitem__)
    return new


def drop_detach(graph: fx.Graph, record: Record) -> fx.Graph:
    """The graph without the detach calls whose operand needs no gradient."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.target is aten.detach.default and not record.needs_grad(node.args[0]):
            env[node] = env[node.args[0]]
        else:
            env[node] = new.node_copy(node, env.__getitem__)
    return new
