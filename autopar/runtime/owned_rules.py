"""What ops do with owned tensors: the placements of their results, beside torch's own rules.

Comes in: an op and the specs of its arguments, of which some are owned (`autopar.runtime.owned`). Goes out: the specs of its results, and
how its arguments must be redistributed before. Elementwise ops and ops on lists of tensors run where the owner is; norms and sums give
Partial results over the owner's axis; for any other op every rank gets a copy of what the owner has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate
from torch.utils._pytree import tree_leaves

from autopar import torch_compat
from autopar.errors import InputError
from autopar.runtime.owned import AxisOwner, find_owner, replicated, with_placement
from autopar.torch_compat import DTensorSpec, OpSchema, OutputSharding, with_placements

# Torch's rule is applied as if the owner's part were replicated over the owner's axis, which settles the other axes. Then `Owned` is put
# back where the op computes each element of its result from the elements in the same place.


_ELEMENTWISE = {
    *("alias", "detach", "clone", "_to_copy", "copy", "zero", "fill", "abs", "masked_fill"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"),
}
"""Elementwise ops, beside those that torch tags as pointwise and those on lists of tensors."""

_REDUCTIONS_OF_LISTS = {"_foreach_max", "_foreach_norm", "_foreach_powsum"}
"""Ops on lists of tensors that aren't elementwise."""

_NORMS = {
    torch.ops.aten.linalg_vector_norm.default: 2.0,
    torch.ops.aten.norm.Scalar: 2.0,
    torch.ops.aten._foreach_norm.Scalar: 2.0,
}
"""Norms, and the kind of norm that each is by default."""

ArgumentPosition = tuple[int, int]
"""A tensor among an op's arguments: (index of the argument, index in it if it is a list of tensors, else -1)."""

Rule = Callable[[OpSchema], OutputSharding]


def propagate(torch_rule: Rule, schema: OpSchema) -> OutputSharding:
    """The placements of an op's results: by torch's rule, or, where an argument is owned, by the rules below."""
    specs = _find_tensors(schema)
    options = {name: value for name, value in schema.kwargs_schema.items() if isinstance(value, DTensorSpec)}
    if not any(find_owner(spec.placements) for spec in (*specs.values(), *options.values())):
        return torch_rule(schema)
    plain = {name: with_placements(spec, replicated(spec.placements)) for name, spec in options.items()}
    schema = OpSchema(schema.op, schema.args_schema, {**schema.kwargs_schema, **plain}, schema_info=schema.schema_info)
    out = options.get("out")
    if schema.op in _NORMS and (len(schema.args_schema) < 3 or schema.args_schema[2] is None):
        answer = _propagate_reduction(torch_rule, schema, specs, _norm_type(schema))
    elif schema.op is torch.ops.aten.sum.default:
        answer = _propagate_reduction(torch_rule, schema, specs, None)
    elif is_elementwise(schema.op):
        answer = _propagate_elementwise(torch_rule, schema, specs, out)
    else:
        answer = _propagate_gathered(torch_rule, schema, specs)
    result: Any = answer.output_spec
    for name, spec in options.items():
        # Keyword arguments are used as they are, and ``out`` is written as it is.
        if spec.placements != (result if spec is out else plain[name]).placements:
            raise InputError(f"{schema.op} can't use {name!r} placed as {spec.placements}: redistribute it first")
    return answer


def _find_tensors(schema: OpSchema) -> dict[ArgumentPosition, DTensorSpec]:
    specs: dict[ArgumentPosition, DTensorSpec] = {}
    for position, argument in enumerate(schema.args_schema):
        items = enumerate(argument) if isinstance(argument, (list, tuple)) else [(-1, argument)]
        specs.update({(position, index): item for index, item in items if isinstance(item, DTensorSpec)})
    return specs


def _with_specs(schema: OpSchema, specs: Mapping[ArgumentPosition, DTensorSpec]) -> OpSchema:
    arguments: list[object] = []
    for position, argument in enumerate(schema.args_schema):
        if isinstance(argument, (list, tuple)):
            arguments.append(type(argument)(specs.get((position, index), item) for index, item in enumerate(argument)))
        else:
            arguments.append(specs.get((position, -1), argument))
    return OpSchema(schema.op, tuple(arguments), schema.kwargs_schema, schema_info=schema.schema_info)


def is_elementwise(op: Any) -> bool:
    """Whether an op computes each element of its results from the elements in the same place of its arguments."""
    name = op._schema.name.partition("::")[2]
    if name.startswith(("_foreach_", "_fused_")):
        return name not in _REDUCTIONS_OF_LISTS
    return torch.Tag.pointwise in op.tags or name.rstrip("_") in _ELEMENTWISE


def _apply_torch_rule(
    torch_rule: Rule, schema: OpSchema, requested: Mapping[ArgumentPosition, DTensorSpec]
) -> tuple[dict[ArgumentPosition, DTensorSpec], Any]:
    """Torch's rule for an op whose arguments are placed as requested: how it requires them, and the specs of its results."""
    # Ops on lists compute the same at every place of the lists. A model has few kinds of parameters, and torch takes seconds for hundreds
    # of tensors, so its rule gets one place of each kind.
    columns: dict[int, list[DTensorSpec]] = {}
    for (_, place), spec in requested.items():
        if place >= 0:
            columns.setdefault(place, []).append(spec)
    place_of_kind: dict[tuple[DTensorSpec, ...], int] = {}
    for place, column in columns.items():
        place_of_kind.setdefault(tuple(column), place)
    kinds = {place: index for index, place in enumerate(place_of_kind.values())}
    kind_of = {-1: -1} | {place: kinds[place_of_kind[tuple(column)]] for place, column in columns.items()}
    arguments = tuple(
        [argument[place] for place in kinds] if columns and isinstance(argument, (list, tuple)) and argument else argument
        for argument in _with_specs(schema, requested).args_schema
    )
    short = OpSchema(schema.op, arguments, schema.kwargs_schema, schema_info=schema.schema_info)
    answer = torch_rule(short)
    required = _find_tensors(short)
    if answer.redistribute_schema is not None:
        leaves = tree_leaves(answer.redistribute_schema.args_schema)
        required = dict(zip(required, (leaf for leaf in leaves if isinstance(leaf, DTensorSpec)), strict=True))
    output: Any = answer.output_spec
    if columns and output is not None:
        output = [output[kind_of[place]] for place in columns]
    return {(position, place): required[position, kind_of[place]] for position, place in requested}, output


def _make_sharding(
    schema: OpSchema, specs: Mapping[ArgumentPosition, DTensorSpec], required: Mapping[ArgumentPosition, DTensorSpec], output: Any
) -> OutputSharding:
    moved = {position for position, spec in specs.items() if spec.placements != required[position].placements}
    _refuse_lost_writes(schema, specs, moved)
    return OutputSharding(output, _with_specs(schema, required) if moved else None, needs_redistribute=bool(moved))


def _refuse_lost_writes(schema: OpSchema, specs: Mapping[ArgumentPosition, DTensorSpec], moved: set[ArgumentPosition]) -> None:
    for position in moved:
        alias = schema.op._schema.arguments[position[0]].alias_info
        if alias is not None:
            raise InputError(
                f"{schema.op} would see or change a copy of a tensor placed as {specs[position].placements}, not the tensor: "
                "read the whole of it with full_tensor(), or write the owner's to_local()"
            )


def _propagate_gathered(torch_rule: Rule, schema: OpSchema, specs: Mapping[ArgumentPosition, DTensorSpec]) -> OutputSharding:
    """Any op: every rank gets a copy of what the owners have, and computes the same."""
    requested = {position: with_placements(spec, replicated(spec.placements)) for position, spec in specs.items()}
    moved = {position for position, spec in specs.items() if find_owner(spec.placements)}
    _refuse_lost_writes(schema, specs, moved)
    answer = torch_rule(_with_specs(schema, requested))
    required = answer.redistribute_schema if answer.needs_redistribute else _with_specs(schema, requested)
    return OutputSharding(answer.output_spec, required, True, answer.use_val_from_redistribute_schema)


def _propagate_elementwise(
    torch_rule: Rule, schema: OpSchema, specs: Mapping[ArgumentPosition, DTensorSpec], out: DTensorSpec | None
) -> OutputSharding:
    """An elementwise op: its result has the owner of its arguments, which computes alone."""
    # Ops on lists do the same for each place in the lists; a tensor that isn't in a list meets all of them.
    alone = [(position, spec) for position, spec in specs.items() if position[1] < 0]
    columns: dict[int, list[tuple[ArgumentPosition, DTensorSpec]]] = {}
    for position, spec in specs.items():
        if position[1] >= 0:
            columns.setdefault(position[1], []).append((position, spec))
    owners: dict[int, AxisOwner] = {}
    requested = {position: with_placements(spec, replicated(spec.placements)) for position, spec in specs.items()}
    owner_restored: dict[ArgumentPosition, AxisOwner] = {}
    for place, column in (columns or {-1: alone}).items():
        column_specs = [spec for _, spec in column] + [spec for _, spec in alone if columns]
        # What is written decides, else the first that has the sizes of the result.
        leading = [out] if out is not None else column_specs[:1] if schema.op._schema.is_mutable else column_specs
        sizes = _broadcast_sizes(spec.shape for spec in leading)
        axis_owner = _owner_of_result(leading, sizes)
        if axis_owner is None:
            continue
        owners[place] = axis_owner
        for position, spec in column + alone if columns else column:
            requested[position] = with_placement(requested[position], axis_owner[0], Replicate())
            if position[1] == place and _is_cut(spec, sizes):
                owner_restored[position] = axis_owner
    required, output = _apply_torch_rule(torch_rule, schema, requested)
    for position, (axis, owner) in owner_restored.items():
        required[position] = with_placement(required[position], axis, owner)
    if isinstance(output, (list, tuple)):
        of_output = list(columns) or [-1] * len(output)
        pairs = zip(output, of_output, strict=True)
        output = tuple(spec if spec is None or place not in owners else with_placement(spec, *owners[place]) for spec, place in pairs)
    elif output is not None and -1 in owners:
        output = with_placement(output, *owners[-1])
    return _make_sharding(schema, specs, required, output)


def _owner_of_result(specs: Sequence[DTensorSpec], sizes: torch.Size) -> AxisOwner | None:
    """The owner of the first argument that has the sizes of the result."""
    owners = (find_owner(spec.placements) for spec in specs if spec.shape == sizes)
    return next((axis_owner for axis_owner in owners if axis_owner is not None), None)


def _broadcast_sizes(shapes: Iterable[torch.Size]) -> torch.Size:
    sizes: torch.Size = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    return sizes


def _is_cut(spec: DTensorSpec, shape: torch.Size) -> bool:
    """Whether an argument, too, has a part of size zero on ranks that aren't owners, in an op whose result has sizes `shape`."""
    if not shape:
        # Scalars from elsewhere, such as a clipping factor, broadcast to nothing too.
        return find_owner(spec.placements) is not None
    return len(spec.shape) == len(shape) and spec.shape[0] == shape[0]


def _norm_type(schema: OpSchema) -> float:
    given = schema.args_schema[1] if len(schema.args_schema) > 1 else _NORMS[schema.op]
    return float(given)  # type: ignore[arg-type]


def _propagate_reduction(
    torch_rule: Rule, schema: OpSchema, specs: Mapping[ArgumentPosition, DTensorSpec], norm_type: float | None
) -> OutputSharding:
    """A norm (or a sum, without a norm type) of whole tensors: Partial over the owner's axis, where other ranks add nothing."""
    requested = {position: with_placements(spec, replicated(spec.placements)) for position, spec in specs.items()}
    required, output = _apply_torch_rule(torch_rule, schema, requested)
    outputs = list(output) if isinstance(output, (list, tuple)) else [output]
    partial = Partial("sum") if norm_type is None else torch_compat.partial_norm(norm_type)
    for number, position in enumerate(specs):
        axis_owner = find_owner(specs[position].placements)
        if axis_owner is not None:
            required[position] = with_placement(required[position], *axis_owner)
            outputs[number] = with_placement(outputs[number], axis_owner[0], partial)
    sharding = _make_sharding(schema, specs, required, tuple(outputs) if isinstance(output, (list, tuple)) else outputs[0])
    if norm_type in (float("inf"), -float("inf")):
        # The maximum of no elements isn't defined, so parts of size zero get an element that is never the maximum.
        run: Any = functools.partial(_extreme_norm, schema.op, 0.0 if norm_type == float("inf") else float("inf"))
        sharding.redistribute_schema = _with_specs(schema, required)
        sharding.redistribute_schema.op = run
        sharding.needs_redistribute = True
    return sharding


def _extreme_norm(op: Any, neutral: float, parts: Any, *arguments: Any, **options: Any) -> Any:
    def fill(part: Tensor) -> Tensor:
        return part if part.numel() else part.new_full((1,), neutral)

    return op(fill(parts) if isinstance(parts, Tensor) else [fill(part) for part in parts], *arguments, **options)
