"""Mixed precision under capture: parameters that are stored in one dtype and read in another.

Comes in: a model, a `Precision`, a captured graph. Goes out: the graph as the program runs it, whose placeholders of parameters have the
dtype in which they are read. That a parameter is stored in another is noted beside (`StorageDtypes`), so a parameter is gathered and
computed with in one dtype, and a graph needs no casts of parameters. Inputs and outputs are cast in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from autopar.capture.fx_nodes import value_of
from autopar.errors import InputError
from autopar.ir import Precision, StorageDtypes

aten = torch.ops.aten

_CASTS = (aten.to.dtype, aten._to_copy.default)


def name_of(dtype: torch.dtype) -> str:
    """Torch's name of a dtype without the ``torch.`` prefix."""
    return str(dtype).removeprefix("torch.")


def read_dtypes(model: nn.Module, precision: Precision) -> dict[str, torch.dtype]:
    """Name -> the dtype in which the program reads a parameter, of those that are read in another than they are stored in.

    Batch norms read their own as they are: torch's kernels take statistics and parameters of one dtype, beside an input of a lower one.

    Raises InputError for a parameter that isn't stored as the policy says.
    """
    if precision.stored_dtype is not None:
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and name_of(parameter.dtype) != precision.stored_dtype:
                raise InputError(
                    f"precision={str(precision)!r} stores parameters as {precision.stored_dtype}, {name} is {name_of(parameter.dtype)}:"
                    f" call model.to(torch.{precision.stored_dtype}) first, or precision='model' to train in the dtypes it has"
                )
    if precision.param_dtype is None:
        return {}
    dtype = getattr(torch, precision.param_dtype)
    left = {id(parameter) for module in model.modules() if isinstance(module, _NormBase) for parameter in module.parameters(recurse=False)}
    return {
        name: dtype
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.is_floating_point() and parameter.dtype != dtype and id(parameter) not in left
    }


def cast_leaf(x: Any, precision: Precision) -> Any:
    """A leaf of a call's arguments as forward gets it: floating-point tensors in the dtype of the policy (FSDP2's cast_forward_inputs)."""
    if precision.param_dtype is None or not precision.cast_forward_inputs or not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.to(getattr(torch, precision.param_dtype))


def insert_casts(graph: fx.Graph, precision: Precision, inputs: Mapping[str, Tensor], outputs: int) -> None:
    """Cast a graph's inputs to the dtypes that it reads, and its first `outputs` results as the policy says; in place.

    Args:
        graph: its placeholders have in ``meta["val"]`` what forward got.
        precision: the policy.
        inputs: placeholder of an input -> a fake tensor like the one that the user passes.
        outputs: number of results that the user gets; others are new values of buffers.
    """
    for node in list(graph.find_nodes(op="placeholder")):
        given = inputs.get(node.name)
        if given is None or given.dtype == value_of(node).dtype:
            continue
        with graph.inserting_after(_last_placeholder(graph)):
            cast = graph.call_function(aten.to.dtype, (node, value_of(node).dtype))
        cast.meta["val"] = value_of(node)
        node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)
        node.meta["val"] = given
    if precision.output_dtype is None:
        return
    dtype = getattr(torch, precision.output_dtype)
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    results = list(output.args[0])
    for position, node in enumerate(results[:outputs]):
        if value_of(node).is_floating_point() and value_of(node).dtype != dtype:
            with graph.inserting_before(output):
                results[position] = graph.call_function(aten.to.dtype, (node, dtype))
            results[position].meta = {"val": value_of(node).to(dtype)}
    output.args = (tuple(results),)


def _last_placeholder(graph: fx.Graph) -> fx.Node:
    placeholders: list[fx.Node] = list(graph.find_nodes(op="placeholder"))
    return placeholders[-1]


def fold_casts(graph: fx.Graph, parameters: Sequence[str]) -> None:
    """Let parameters that are read by nothing but one cast to a narrower float be read in that dtype; in place.

    Such casts are what autocast makes, or the forward itself. Without the cast the gradient of the parameter can be left to one sum over
    ranks per step, and a gathered parameter is gathered in the narrower dtype.
    """
    for node in list(graph.find_nodes(op="placeholder")):
        if node.name not in parameters or len(node.users) != 1:
            continue
        (cast,) = node.users
        stored = value_of(node).dtype
        if cast.target not in _CASTS or not stored.is_floating_point:
            continue
        dtype = value_of(cast).dtype
        if dtype.is_floating_point and dtype.itemsize < stored.itemsize and value_of(cast).shape == value_of(node).shape:
            cast.replace_all_uses_with(node)
            graph.erase_node(cast)
            node.meta["val"] = value_of(cast)


def storage_dtypes(graph: fx.Graph, parameters: Mapping[str, Tensor], precision: Precision) -> dict[str, StorageDtypes]:
    """Placeholder of a parameter -> how it is kept, of those that aren't kept in the dtype in which the graph reads them.

    Args:
        graph: the graph.
        parameters: placeholder -> the user's parameter.
        precision: the policy.
    """
    kept: dict[str, StorageDtypes] = {}
    for node in graph.find_nodes(op="placeholder"):
        if node.name in parameters and (stored := parameters[node.name].dtype).is_floating_point:
            storage = precision.storage_dtypes(name_of(stored), name_of(value_of(node).dtype))
            if storage is not None:
                kept[node.name] = storage
    return kept


def call_in_precision(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], precision: Precision) -> Any:
    """What a model returns on one device under a policy: what every plan of the model under that policy computes in parallel.

    Parameters are cast by differentiable casts, so their gradients have the stored dtype.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    casts: dict[int, Tensor] = {}
    for name, dtype in read_dtypes(model, precision).items():
        casts.setdefault(id(named[name]), named[name].to(dtype))
    substitutes = {name: casts[id(parameter)] for name, parameter in named.items() if id(parameter) in casts}
    leaf: Callable[[Any], Any] = lambda x: cast_leaf(x, precision)  # noqa: E731
    cast_args, cast_kwargs = pytree.tree_map(leaf, (tuple(args), dict(kwargs)))
    result = torch.func.functional_call(model, substitutes, cast_args, cast_kwargs, tie_weights=False)
    if precision.output_dtype is None:
        return result
    dtype = getattr(torch, precision.output_dtype)
    return pytree.tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, result)
