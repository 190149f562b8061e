"""A DTensor placement for what lives on one rank of a mesh axis: that rank has all of it, the others have parts of size zero.

Comes in: DTensors with `Owned` among their placements. Goes out: torch's own results for them, since to every rank they are whole tensors
of one global shape: optimizers, gradient clipping and checkpoints work unchanged. A rank that isn't the owner has a part whose dim 0 has
size zero, and of a scalar one of shape (0,)::

    Owned(1) of a (4, 8) weight on three ranks:   rank 0: (0, 8)   rank 1: (4, 8)   rank 2: (0, 8)

Torch refuses ops on placements that it doesn't know. The first `Owned` registers how it behaves: elementwise ops and norms keep the owner,
all other ops run on gathered copies; how values move to and from it; and what of them a checkpoint holds. Tensors without it get torch's
own results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as checkpoint_state
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate
from torch.utils._pytree import tree_leaves

from autopar import torch_compat
from autopar.errors import InputError
from autopar.runtime import dtensor
from autopar.torch_compat import DTensorSpec, OpSchema, OutputSharding, state_dict_utils, with_placements


class Owned(Placement):
    """A tensor that lives on one rank of a mesh axis: the one at `index` has all of it, every other rank a part of size zero."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self._index = index
        _register()

    @property
    def index(self) -> int:
        """The owner's position along the axis."""
        return self._index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Owned) and other.index == self.index

    def __hash__(self) -> int:
        return hash((Owned, self.index))

    def __repr__(self) -> str:
        return f"Owned({self.index})"

    def __str__(self) -> str:
        return f"O({self.index})"

    def __reduce__(self) -> tuple[type[Owned], tuple[int]]:
        return Owned, (self.index,)


AxisOwner = tuple[int, Owned]
"""A mesh axis, and the placement that names the owner along it."""


def as_owned(
    local: Tensor | None,
    device_mesh: DeviceMesh,
    k: int,
    inner_placements: Sequence[Placement],
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str,
) -> DTensor:
    """The DTensor that the ranks at position `k` of the first mesh axis own, without communication.

    Args:
        local: on the owners, their part, as `inner_placements` split it over the other axes; on other ranks it isn't read.
        device_mesh: the mesh of all ranks.
        k: the owners' position along the first axis.
        inner_placements: a placement per other axis.
        shape: global sizes.
        dtype: of all parts.
        device: where a rank that isn't an owner makes its part of size zero.

    Raises InputError when an owner's part is missing or has other sizes or another dtype, or when there is no such owner.
    """
    placements = (Owned(k), *inner_placements)
    if len(placements) != device_mesh.ndim or not 0 <= k < device_mesh.size(0):
        raise InputError(f"index {k} of the first axis and {len(inner_placements)} inner placements don't fit the mesh {device_mesh}")
    coordinate = device_mesh.get_coordinate()
    if coordinate is None or coordinate[0] != k:
        local = _empty_part(shape, device_mesh, placements, dtype, device)
    else:
        sizes = torch_compat.local_sizes(shape, device_mesh, _replicated(placements))
        if local is None or tuple(local.shape) != sizes or local.dtype != dtype:
            given = "nothing" if local is None else f"{tuple(local.shape)} of {local.dtype}"
            raise InputError(f"the owner's part of a tensor {tuple(shape)} as {placements} is {sizes} of {dtype}: {given} was passed")
    return dtensor.as_dtensor(local, device_mesh, placements, shape)


def owner_of(x: Tensor) -> int | None:
    """The owner's position along its axis; None for a tensor that isn't owned."""
    axis_owner = _find_owner(x.placements) if isinstance(x, DTensor) else None
    return None if axis_owner is None else axis_owner[1].index


def _find_owner(placements: Sequence[Placement]) -> AxisOwner | None:
    owners = [(axis, placement) for axis, placement in enumerate(placements) if isinstance(placement, Owned)]
    if len(owners) > 1:
        raise InputError(f"a tensor has one owner, along one mesh axis: {tuple(placements)}")
    return owners[0] if owners else None


def _replicated(placements: Sequence[Placement]) -> tuple[Placement, ...]:
    """The placements with Replicate for `Owned`: how the owner's part is split over the other axes."""
    return tuple(Replicate() if isinstance(placement, Owned) else placement for placement in placements)


def _with_placement(spec: DTensorSpec, axis: int, placement: Placement) -> DTensorSpec:
    return with_placements(spec, (*spec.placements[:axis], placement, *spec.placements[axis + 1 :]))


def _is_owner(axis_owner: AxisOwner, mesh: DeviceMesh) -> bool:
    coordinate = mesh.get_coordinate()
    return coordinate is not None and coordinate[axis_owner[0]] == axis_owner[1].index


def _empty_part(
    shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement], dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """The part of a rank that isn't the owner: as the owner's, but of size 0 along dim 0."""
    return torch.empty((0, *torch_compat.local_sizes(shape, mesh, _replicated(placements))[1:]), dtype=dtype, device=device)


# --- what ops do --------------------------------------------------------------------------------------------------------------
#
# Torch's rule is applied as if the owner's part were replicated over the owner's axis, which settles the other axes. Then `Owned` is put
# back where the op computes each element of its result from the elements in the same place.


_ELEMENTWISE = {
    *("alias", "detach", "clone", "_to_copy", "copy", "zero", "fill", "abs", "masked_fill"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"),
    *("normal", "uniform", "bernoulli", "exponential", "random"),
}
"""Elementwise ops, beside those that torch tags as pointwise and those on lists of tensors."""

_NORMS = {
    torch.ops.aten.linalg_vector_norm.default: 2.0,
    torch.ops.aten.norm.Scalar: 2.0,
    torch.ops.aten._foreach_norm.Scalar: 2.0,
}
"""Norms, and the kind of norm that each is by default."""

ArgumentPosition = tuple[int, int]
"""A tensor among an op's arguments: (index of the argument, index in it if it is a list of tensors, else -1)."""

Rule = Callable[[OpSchema], OutputSharding]


def _propagate(torch_rule: Rule, schema: OpSchema) -> OutputSharding:
    """The placements of an op's results: by torch's rule, or, where an argument is owned, by the rules below."""
    specs = _find_tensors(schema)
    options = {name: value for name, value in schema.kwargs_schema.items() if isinstance(value, DTensorSpec)}
    if not any(_find_owner(spec.placements) for spec in (*specs.values(), *options.values())):
        return torch_rule(schema)
    plain = {name: with_placements(spec, _replicated(spec.placements)) for name, spec in options.items()}
    schema = OpSchema(schema.op, schema.args_schema, {**schema.kwargs_schema, **plain}, schema_info=schema.schema_info)
    out = options.get("out")
    if schema.op in _NORMS and (len(schema.args_schema) < 3 or schema.args_schema[2] is None):
        answer = _propagate_reduction(torch_rule, schema, specs, _norm_type(schema))
    elif schema.op is torch.ops.aten.sum.default:
        answer = _propagate_reduction(torch_rule, schema, specs, None)
    elif _is_elementwise(schema.op):
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
    found: dict[ArgumentPosition, DTensorSpec] = {}
    for position, argument in enumerate(schema.args_schema):
        items = enumerate(argument) if isinstance(argument, (list, tuple)) else [(-1, argument)]
        found.update({(position, index): item for index, item in items if isinstance(item, DTensorSpec)})
    return found


def _with_specs(schema: OpSchema, specs: Mapping[ArgumentPosition, DTensorSpec]) -> OpSchema:
    arguments: list[object] = []
    for position, argument in enumerate(schema.args_schema):
        if isinstance(argument, (list, tuple)):
            arguments.append(type(argument)(specs.get((position, index), item) for index, item in enumerate(argument)))
        else:
            arguments.append(specs.get((position, -1), argument))
    return OpSchema(schema.op, tuple(arguments), schema.kwargs_schema, schema_info=schema.schema_info)


def _is_elementwise(op: Any) -> bool:
    name = op._schema.name.partition("::")[2]
    return torch.Tag.pointwise in op.tags or name.rstrip("_") in _ELEMENTWISE or name.startswith(("_foreach_", "_fused_"))


def _apply_torch_rule(
    torch_rule: Rule, schema: OpSchema, requested: Mapping[ArgumentPosition, DTensorSpec]
) -> tuple[dict[ArgumentPosition, DTensorSpec], Any]:
    """Torch's rule for an op whose arguments are placed as requested: how it requires them, and the specs of its results."""
    # Ops on lists compute the same at every place of the lists. A model has few kinds of parameters, and torch takes seconds for hundreds of
    # tensors, so its rule gets one place of each kind.
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
    requested = {position: with_placements(spec, _replicated(spec.placements)) for position, spec in specs.items()}
    moved = {position for position, spec in specs.items() if _find_owner(spec.placements)}
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
    requested = {position: with_placements(spec, _replicated(spec.placements)) for position, spec in specs.items()}
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
            requested[position] = _with_placement(requested[position], axis_owner[0], Replicate())
            if position[1] == place and _is_cut(spec, sizes):
                owner_restored[position] = axis_owner
    required, output = _apply_torch_rule(torch_rule, schema, requested)
    for position, (axis, owner) in owner_restored.items():
        required[position] = _with_placement(required[position], axis, owner)
    if isinstance(output, (list, tuple)):
        of_output = list(columns) or [-1] * len(output)
        pairs = zip(output, of_output, strict=True)
        output = tuple(spec if spec is None or place not in owners else _with_placement(spec, *owners[place]) for spec, place in pairs)
    elif output is not None and -1 in owners:
        output = _with_placement(output, *owners[-1])
    return _make_sharding(schema, specs, required, output)


def _owner_of_result(specs: Sequence[DTensorSpec], sizes: torch.Size) -> AxisOwner | None:
    """The owner of the first argument that has the sizes of the result."""
    owners = (_find_owner(spec.placements) for spec in specs if spec.shape == sizes)
    return next((axis_owner for axis_owner in owners if axis_owner is not None), None)


def _broadcast_sizes(shapes: Iterable[torch.Size]) -> torch.Size:
    sizes: torch.Size = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    return sizes


def _is_cut(spec: DTensorSpec, shape: torch.Size) -> bool:
    """Whether an argument, too, has a part of size zero on ranks that aren't owners, in an op whose result has sizes `shape`."""
    if not shape:
        # Scalars from elsewhere, such as a clipping factor, broadcast to nothing too.
        return _find_owner(spec.placements) is not None
    return len(spec.shape) == len(shape) and spec.shape[0] == shape[0]


def _norm_type(schema: OpSchema) -> float:
    given = schema.args_schema[1] if len(schema.args_schema) > 1 else _NORMS[schema.op]
    return float(given)  # type: ignore[arg-type]


def _propagate_reduction(
    torch_rule: Rule, schema: OpSchema, specs: Mapping[ArgumentPosition, DTensorSpec], norm_type: float | None
) -> OutputSharding:
    """A norm (or a sum, without a norm type) of whole tensors: Partial over the owner's axis, where other ranks add nothing."""
    requested = {position: with_placements(spec, _replicated(spec.placements)) for position, spec in specs.items()}
    required, output = _apply_torch_rule(torch_rule, schema, requested)
    outputs = list(output) if isinstance(output, (list, tuple)) else [output]
    partial = Partial("sum") if norm_type is None else torch_compat.partial_norm(norm_type)
    for number, position in enumerate(specs):
        axis_owner = _find_owner(specs[position].placements)
        if axis_owner is not None:
            required[position] = _with_placement(required[position], *axis_owner)
            outputs[number] = _with_placement(outputs[number], axis_owner[0], partial)
    found = _make_sharding(schema, specs, required, tuple(outputs) if isinstance(output, (list, tuple)) else outputs[0])
    if norm_type in (float("inf"), -float("inf")):
        # The maximum of no elements isn't defined, so parts of size zero get an element that is never the maximum.
        run: Any = functools.partial(_extreme_norm, schema.op, 0.0 if norm_type == float("inf") else float("inf"))
        found.redistribute_schema = _with_specs(schema, required)
        found.redistribute_schema.op = run
        found.needs_redistribute = True
    return found


def _extreme_norm(op: Any, neutral: float, parts: Any, *arguments: Any, **options: Any) -> Any:
    def fill(part: Tensor) -> Tensor:
        return part if part.numel() else part.new_full((1,), neutral)

    return op(fill(parts) if isinstance(parts, Tensor) else [fill(part) for part in parts], *arguments, **options)


# --- moving values ------------------------------------------------------------------------------------------------------------


def _redistribute_part(local: Tensor, current_spec: DTensorSpec, target_spec: DTensorSpec, **options: Any) -> Tensor:
    """This rank's part when a DTensor goes from one spec to another; replaces torch's function."""
    current_owner, target_owner = _find_owner(current_spec.placements), _find_owner(target_spec.placements)
    if current_owner is None and target_owner is None:
        return torch_compat.redistribute_part(local, current_spec, target_spec, **options)
    mesh, shape = current_spec.mesh, current_spec.shape
    if mesh.get_coordinate() is None:
        return local
    inner, target = (with_placements(spec, _replicated(spec.placements)) for spec in (current_spec, target_spec))
    if current_owner == target_owner and current_owner is not None and not _is_owner(current_owner, mesh):
        # The process groups of all other axes consist of ranks that aren't owners, so target_owner is nothing to exchange.
        return _empty_part(shape, mesh, target.placements, local.dtype, local.device)
    if current_owner != target_owner and current_owner is not None:
        local = _broadcast(local, current_owner, inner)
    moved = _redistribute_inner(local, inner, target, options)
    if target_owner is None or current_owner == target_owner:
        return moved
    if not _is_owner(target_owner, mesh):
        return _empty_part(shape, mesh, target.placements, local.dtype, local.device)
    return moved.clone() if moved is local else moved


def _broadcast(local: Tensor, axis_owner: AxisOwner, inner: DTensorSpec) -> Tensor:
    axis, owner = axis_owner
    if _is_owner(axis_owner, inner.mesh):
        # A copy: what comes of it must not share memory with the tensor on one rank only.
        whole = local.detach().clone(memory_format=torch.contiguous_format)
    else:
        whole = local.new_empty(torch_compat.local_sizes(inner.shape, inner.mesh, inner.placements))
    dist.broadcast(whole, group=inner.mesh.get_group(axis), group_src=owner.index)
    return whole


def _redistribute_inner(local: Tensor, current: DTensorSpec, target: DTensorSpec, options: Mapping[str, Any]) -> Tensor:
    if not dtensor.is_beyond_torch(current.placements, target.placements):
        return torch_compat.redistribute_part(local, current, target, **options)
    with torch.no_grad():
        x = dtensor.as_dtensor(local, current.mesh, current.placements, current.shape)
        return dtensor.redistribute(x, placements=target.placements).to_local()


def _redistribute(
    self: DTensor, device_mesh: DeviceMesh | None = None, placements: Sequence[Placement] | None = None, **options: Any
) -> DTensor:
    owned = _find_owner(self.placements) or _find_owner(placements or ())
    return (dtensor.TORCH_REDISTRIBUTE if owned else dtensor.redistribute)(self, device_mesh, placements, **options)


def _full_tensor(self: DTensor, **options: Any) -> Tensor:
    return (dtensor.TORCH_FULL_TENSOR if _find_owner(self.placements) else dtensor.full_tensor)(self, **options)


# --- checkpoints --------------------------------------------------------------------------------------------------------------


def _owned_part(x: DTensor) -> DTensor | None:
    """On owners, the tensor as a DTensor without `Owned`, for torch's functions; None on the other ranks."""
    axis_owner = _find_owner(x.placements)
    if axis_owner is None:
        return x
    if not _is_owner(axis_owner, x.device_mesh):
        return None
    return dtensor.as_dtensor(torch_compat.local_of(x), x.device_mesh, _replicated(x.placements), x.shape)


def _create_write_items(self: DTensor, fqn: str, whole: Any) -> Any:
    owned_part = _owned_part(self)
    return [] if owned_part is None else dtensor.create_write_items(owned_part, fqn, owned_part)


def _create_chunk_list(self: DTensor) -> Any:
    owned_part = _owned_part(self)
    return [] if owned_part is None else dtensor.create_chunk_list(owned_part)


def _get_tensor_shard(self: DTensor, index: MetadataIndex) -> Any:
    owned_part = _owned_part(self)
    if owned_part is None:
        raise ValueError(f"{index.fqn} has no part on this rank")
    return dtensor.get_tensor_shard(owned_part, index)


def _distribute_tensors(states: dict[str, Any], keys: Sequence[str], *options: Any, **more_options: Any) -> None:
    for key in keys:
        state = states.get(key)
        if state is None or isinstance(state, Tensor) or _find_owner(state[0].placements) is None:
            continue
        # A pair (what to fill, whole value), until the value has been cut.
        target, whole = state
        owned_part = _owned_part(target)
        if owned_part is not None:
            part: dict[str, Any] = {key: (owned_part, whole)}
            dtensor.distribute_tensors(part, [key], *options, **more_options)
            local = torch_compat.local_of(part[key])
        else:
            local = _empty_part(target.shape, target.device_mesh, target.placements, whole.dtype, whole.device)
        # Only a target on the meta device has no part to fill.
        states[key] = dtensor.as_dtensor(local, target.device_mesh, target.placements, target.shape) if target.is_meta else target
    dtensor.distribute_tensors(states, keys, *options, **more_options)


_DISTRIBUTE_TENSOR: Callable[..., DTensor] = state_dict_utils.distribute_tensor  # type: ignore[attr-defined]


def _distribute_tensor(tensor: Tensor, device_mesh: DeviceMesh, placements: Sequence[Placement], **options: Any) -> DTensor:
    if _find_owner(placements) is None:
        return _DISTRIBUTE_TENSOR(tensor, device_mesh, placements, **options)
    return _DISTRIBUTE_TENSOR(tensor, device_mesh, [Replicate()] * len(placements), **options).redistribute(placements=placements)


def _keep_scalars(torch_rule: Callable[..., None]) -> Callable[..., None]:
    """Wrap torch's loading of whole states, which makes plain tensors of an optimizer's scalars, so that owned scalars stay owned."""

    def load(whole: dict[str, Any], states: dict[str, Any], *options: Any, **more_options: Any) -> None:
        owned = {key: x for key, x in states.items() if isinstance(x, DTensor) and not x.shape and owner_of(x) is not None}
        torch_rule(whole, states, *options, **more_options)
        for key, x in owned.items():
            if key in states and not isinstance(states[key], DTensor):
                with torch.no_grad():
                    states[key] = x.copy_(states[key])

    return load


@functools.cache
def _register() -> None:
    """Replace the functions and methods of torch's DTensor that must know `Owned`; a second call changes nothing."""
    dtensor.teach_strided_shards()
    for name, method in (
        ("redistribute", _redistribute),
        ("full_tensor", _full_tensor),
        ("__create_write_items__", _create_write_items),
        ("__create_chunk_list__", _create_chunk_list),
        ("__get_tensor_shard__", _get_tensor_shard),
    ):
        setattr(DTensor, name, method)
    state_dict_utils._distribute_tensors = _distribute_tensors  # type: ignore[assignment]
    state_dict_utils.distribute_tensor = _distribute_tensor  # type: ignore[assignment, attr-defined]
    for name in ("_distribute_state_dict", "_broadcast_state_dict"):
        setattr(checkpoint_state, name, _keep_scalars(getattr(checkpoint_state, name)))
    torch_compat.replace_redistribution(_redistribute_part)
    torch_compat.replace_propagation(lambda torch_rule: functools.partial(_propagate, torch_rule))
