"""Ops on DTensors that torch refuses, or does to a copy in silence, done on whole copies.

Comes in: an op and its arguments, of which some are DTensors. Goes out: what the op gives on one device. Torch runs an op on the parts
that ranks store wherever it has a rule for it, and that stays so. In the other cases every rank gathers the arguments, runs the op on
whole tensors, and stores its part of what the op writes:

- ops without a rule, and in-place ops whose result torch would have to store otherwise;
- views that torch can only take of a gathered copy, such as ``weight[:3]`` of rows that are split: a `WholeView`, which brings what is
  written to it back to the tensor;
- operands on several meshes, unless one of them is a state that was made before the first plan, which is moved;
- random ops, whose values are those of one device, the same on every rank;
- plain tensors that are written to; a plain tensor beside DTensors is the same whole tensor on every rank.

All of this communicates, so every rank must run the same ops.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.utils import _pytree as pytree

from autopar import torch_compat
from autopar.errors import InputError
from autopar.runtime.dtensor import placement_steps
from autopar.runtime.owned_rules import is_elementwise
from autopar.torch_compat import OutputSharding, with_placements

WORLD = "autopar_world"
"""The name of the one axis of the mesh on which parameters are stored before the first plan; no mesh of the user's has it."""

Arguments = tuple[Any, ...]
Options = Mapping[str, Any]


# --- whole values and parts -----------------------------------------------------------------------------------------------------


def gather(x: Tensor) -> Tensor:
    """The whole of a DTensor as a plain tensor, on the device of this rank's part; a plain tensor itself. A collective."""
    if isinstance(x, WholeView):
        return torch_compat.local_of(x)
    if not isinstance(x, DTensor):
        return x
    with torch.no_grad():
        local = torch_compat.local_of(x)
        if local.device.type != x.device_mesh.device_type and not local.is_meta:
            # A copy of a part on the CPU: the mesh's process groups exchange what is on its devices only.
            on_mesh = torch_compat.make_like(local.to(x.device_mesh.device_type), x)
            return on_mesh.full_tensor().to(local.device)
        return x.full_tensor().detach()


def cut(whole: Tensor, like: DTensor) -> Tensor:
    """This rank's part of a whole tensor, as `like` stores it; without communication."""
    mesh = like.device_mesh
    with torch.no_grad():
        replicated = torch_compat.make_dtensor(whole, mesh, [Replicate()] * mesh.ndim, whole.shape, whole.stride())
        return torch_compat.local_of(replicated.redistribute(placements=like.placements))


def store(x: Tensor, whole: Tensor) -> None:
    """Write a whole value into a DTensor, every rank its part. Raises InputError when the sizes differ."""
    if isinstance(x, WholeView):
        torch_compat.local_of(x).copy_(whole)
        x.bring_back()
    elif isinstance(x, DTensor):
        if whole.shape != x.shape:
            raise InputError(f"a stored tensor keeps its sizes: {tuple(x.shape)} can't become {tuple(whole.shape)} in place")
        if any(isinstance(placement, Partial) for placement in x.placements):
            # A sum that is still to be made has no part that a whole value could be written to.
            torch_compat.exchange_part(x, whole, with_placements(x._spec, (Replicate(),) * x.device_mesh.ndim))
            return
        part, local = cut(whole, x), torch_compat.local_of(x)
        if part.data_ptr() != local.data_ptr() or part.stride() != local.stride():
            local.copy_(part)


def place(whole: Tensor, like: DTensor) -> DTensor:
    """A whole tensor as a DTensor that is stored as `like`; without communication."""
    return torch_compat.make_dtensor(cut(whole, like), like.device_mesh, like.placements, like.shape, like.stride())


def as_stored(value: Any, parameter: Tensor | None) -> Any:
    """A value to load into a parameter, as a DTensor with the parameter's mesh and placements; other values unchanged."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    if isinstance(value, DTensor) and not isinstance(value, WholeView) and value.device_mesh == parameter.device_mesh:
        return value if value.placements == parameter.placements else value.redistribute(placements=parameter.placements)
    return place(gather(value).to(parameter.device), parameter)


def move(x: DTensor, like: DTensor) -> None:
    """Store a replicated DTensor in place on the mesh of `like`, and as `like` where the sizes are equal; without communication."""
    mesh = like.device_mesh
    placements: tuple[Placement, ...] = (Replicate(),) * mesh.ndim
    if x.shape == like.shape and not any(isinstance(placement, Partial) for placement in like.placements):
        placements = like.placements
    whole = torch_compat.local_of(x)
    moved = torch_compat.make_dtensor(whole, mesh, placements, x.shape, x.stride())
    part = cut(whole, moved)
    # A copy where it is a part, so that the whole needs no memory any more.
    part = part.clone() if part.numel() < whole.numel() else part
    torch_compat.exchange_part(x, part, moved._spec)


def is_temporary(mesh: DeviceMesh) -> bool:
    """Whether a mesh is the one on which everything is replicated before the first plan."""
    return mesh.mesh_dim_names == (WORLD,)


# --- ops on whole copies --------------------------------------------------------------------------------------------------------


def run_whole(op: Any, args: Arguments, kwargs: Options) -> Any:
    """Run an op on gathered copies, and bring what it writes back; its other results are replicated DTensors."""
    operands = list(_find_tensors(args, kwargs))
    written = {id(x) for x in _find_written(op, args, kwargs)}
    dtensors = [x for x in operands if isinstance(x, DTensor)]
    mesh = _find_home(dtensors, written)
    whole_of = {id(x): gather(x) for x in dtensors}
    plain_args, plain_kwargs = pytree.tree_map_only(Tensor, lambda x: whole_of.get(id(x), x), (args, dict(kwargs)))
    results = op(*plain_args, **plain_kwargs)
    if _is_random(op):
        drawn = pytree.tree_leaves((results, [whole_of[key] for key in written & whole_of.keys()]))
        _share((x for x in drawn if isinstance(x, Tensor)), mesh)
    for x in dtensors:
        if id(x) in written:
            store(x, whole_of[id(x)])
    given_of = {id(x): x for x in operands} | {id(whole_of[id(x)]): x for x in dtensors}

    def hand_out(result: Tensor) -> Tensor:
        if id(result) in given_of:
            return given_of[id(result)]
        return torch_compat.make_dtensor(result, mesh, [Replicate()] * mesh.ndim, result.shape, result.stride())

    return pytree.tree_map_only(Tensor, hand_out, results)


def _find_home(dtensors: Iterable[DTensor], written: Iterable[int]) -> DeviceMesh:
    """The mesh for the results of an op: that of what it writes, if it is no plain tensor, else of a parameter that has its place."""
    written = set(written)
    return min(dtensors, key=lambda x: (id(x) not in written, is_temporary(x.device_mesh))).device_mesh


def _share(values: Iterable[Tensor], mesh: DeviceMesh) -> None:
    """Give every rank of a mesh the first one's values."""
    for x in {id(x): x for x in values}.values():
        dense = x.contiguous()
        on_mesh = dense.to(mesh.device_type)
        for axis in range(mesh.ndim):
            dist.broadcast(on_mesh, group=mesh.get_group(axis), group_src=0)
        if on_mesh is not x:
            x.copy_(on_mesh)


def _find_tensors(args: Arguments, kwargs: Options) -> Iterator[Tensor]:
    return (x for x in pytree.tree_leaves((args, dict(kwargs))) if isinstance(x, Tensor))


def _pair_arguments(op: Any, args: Arguments, kwargs: Options) -> Iterator[tuple[Any, Any]]:
    """Each argument of an op's schema with the value that was passed for it."""
    for position, argument in enumerate(op._schema.arguments):
        if position < len(args):
            yield argument, args[position]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _find_written(op: Any, args: Arguments, kwargs: Options) -> Iterator[Tensor]:
    if op._schema.is_mutable:
        for argument, value in _pair_arguments(op, args, kwargs):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from (x for x in pytree.tree_leaves(value) if isinstance(x, Tensor))


def _find_viewed(op: Any, args: Arguments, kwargs: Options) -> DTensor | None:
    """The argument that an op's results are views of; None where they are no views."""
    if op._schema.is_mutable:
        return None
    for argument, value in _pair_arguments(op, args, kwargs):
        if argument.alias_info is not None and isinstance(value, DTensor):
            return value
    return None


def _is_random(op: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in op.tags


# --- views of whole copies ------------------------------------------------------------------------------------------------------


class WholeView(DTensor):
    """A view of a gathered copy of a DTensor: what is written to it is written to the tensor, and it is read anew for every op.

    Attributes:
        base: the tensor that is viewed.
        whole: the gathered copy, a plain tensor.
    """

    base: DTensor
    whole: Tensor

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Arguments = (), kwargs: Options | None = None) -> Any:  # type: ignore[override]
        """Run an op with views of gathered copies among its arguments."""
        kwargs = kwargs or {}
        viewed = _find_viewed(op, args, kwargs)
        if isinstance(viewed, WholeView):
            return _view(op, args, kwargs, viewed.base, viewed.whole, viewed)
        views = {id(x): x for x in _find_tensors(args, kwargs) if isinstance(x, WholeView)}
        for view in views.values():
            view.read()
        if any(id(x) in views for x in _find_written(op, args, kwargs)):
            return run_whole(op, args, kwargs)
        args, kwargs = pytree.tree_map_only(WholeView, _as_replicated, (args, dict(kwargs)))
        return op(*args, **kwargs)

    def read(self) -> None:
        """Gather the tensor's values again."""
        self.whole.copy_(gather(self.base))

    def bring_back(self) -> None:
        """Store what was written to this view in the tensor."""
        store(self.base, self.whole)


def _as_replicated(view: WholeView) -> DTensor:
    return torch_compat.make_like(torch_compat.local_of(view), view)


def view_whole(op: Any, args: Arguments, kwargs: Options, base: DTensor) -> Any:
    """The results of an op that views `base`, as views of a gathered copy."""
    whole = gather(base)
    is_local = whole.data_ptr() == torch_compat.address_of(base)
    return _view(op, args, kwargs, base, whole if is_local else whole.clone(), None)


def _view(op: Any, args: Arguments, kwargs: Options, base: DTensor, whole: Tensor, view: WholeView | None) -> Any:
    of, plain = (base, whole) if view is None else (view, torch_compat.local_of(view))
    plain_args, plain_kwargs = pytree.tree_map_only(Tensor, lambda x: plain if x is of else gather(x), (args, dict(kwargs)))
    results = op(*plain_args, **plain_kwargs)
    is_local = view is None and whole.data_ptr() == torch_compat.address_of(base)
    mesh = base.device_mesh

    def hand_out(result: Tensor) -> DTensor:
        replicated = torch_compat.make_dtensor(result, mesh, [Replicate()] * mesh.ndim, result.shape, result.stride())
        if is_local:
            return replicated
        new: Callable[..., WholeView] = WholeView
        handed_out = new(result, replicated._spec, requires_grad=False)
        handed_out.base, handed_out.whole = base, whole
        return handed_out

    return pytree.tree_map_only(Tensor, hand_out, results)


# --- what torch calls -----------------------------------------------------------------------------------------------------------


def _dispatch(torch_rule: Callable[..., object], op: Any, args: Arguments, kwargs: Options, op_info: Any, try_cache: bool) -> object:
    """How torch is to run an op, or, where it can't, the op's results."""
    operands = list(_find_tensors(args, kwargs))
    dtensors = [x for x in operands if isinstance(x, DTensor)]
    if len(dtensors) == len(operands) and not any(is_ours(x.device_mesh) for x in dtensors):
        # Nothing of a compiled model, and no plain tensor, which torch would refuse but for us.
        return torch_rule(op, args, kwargs, op_info, try_cache)
    if op.namespace in ("c10d", "_c10d_functional"):
        raise InputError(
            f"{op._schema.name} of a tensor that ranks store parts of, such as a parameter of a compiled model: gradients are summed over "
            "the ranks already, so don't wrap a compiled model in DistributedDataParallel and don't reduce gradients by hand; "
            "x.to_local() is this rank's part, x.full_tensor() the whole"
        )
    if _bring_together(dtensors):
        return op(*args, **kwargs)
    viewed = _find_viewed(op, args, kwargs)
    if any(x.device_mesh != dtensors[0].device_mesh for x in dtensors) or _is_wrong_in_torch(op, dtensors):
        return run_whole(op, args, kwargs) if viewed is None else view_whole(op, args, kwargs, viewed)
    try:
        answer = torch_rule(op, args, kwargs, op_info, try_cache)
    except (NotImplementedError, RuntimeError):
        return run_whole(op, args, kwargs) if viewed is None else view_whole(op, args, kwargs, viewed)
    if viewed is not None and isinstance(answer, OutputSharding) and answer.needs_redistribute and _is_moved(viewed, op_info, answer):
        return view_whole(op, args, kwargs, viewed)
    return answer


def _is_wrong_in_torch(op: Any, dtensors: Iterable[DTensor]) -> bool:
    """Whether torch's rule for an op, of tensors on one mesh, isn't what the op does on one device.

    Torch draws random numbers for each part alone, loses the placements of ``out=``, writes in place by indices of the part instead of the
    whole (``index_copy_`` and others), reshapes strided shards as if they were plain ones, and fails to reshape, or to look up in, a dim
    that two axes split.
    """
    if _is_random(op):
        return True
    if op._schema.is_mutable:
        is_out = any(argument.is_out for argument in op._schema.arguments)
        return is_out or not (is_elementwise(op) or torch.Tag.inplace_view in op.tags)
    return op._schema.name in _BY_PLACE and any(map(_is_split_twice_or_strided, dtensors))


_BY_PLACE = {f"aten::{name}" for name in ("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy", "embedding", "gather")}
"""Ops that find elements by their place in a dim."""


def _is_split_twice_or_strided(x: DTensor) -> bool:
    steps = placement_steps(x.placements)
    return len({dim for _, dim, _ in steps}) < len(steps) or any(outer > 1 for _, _, outer in steps)


def _is_moved(viewed: DTensor, op_info: Any, answer: OutputSharding) -> bool:
    """Whether torch would take a view of a redistributed copy."""
    if answer.redistribute_schema is None:
        return False
    given, required = (pytree.tree_leaves(schema.args_schema) for schema in (op_info.schema, answer.redistribute_schema))
    return any(
        spec.placements != other.placements
        for spec, other in zip(given, required, strict=False)
        if isinstance(spec, torch_compat.DTensorSpec) and spec is viewed._spec
    )


def _bring_together(dtensors: list[DTensor]) -> bool:
    """Move states made before the first plan to the mesh of the operands that have their place; whether all are on one mesh then."""
    placed = [x for x in dtensors if not is_temporary(x.device_mesh)]
    if not placed or len(placed) == len(dtensors) or any(x.device_mesh != placed[0].device_mesh for x in placed):
        return False
    temporary = [x for x in dtensors if is_temporary(x.device_mesh)]
    if any(isinstance(x, torch.nn.Parameter) or torch_compat.has_aliases(x) or not _is_replicated(x) for x in temporary):
        # A parameter of a model that has no plan yet, which will say where the parameter goes. And what is written to an alias, such as
        # one of ``state_dict()``, must reach the tensor.
        return False
    for x in temporary:
        if is_temporary(x.device_mesh):
            move(x, next((other for other in placed if other.shape == x.shape), placed[0]))
    return True


def _is_replicated(x: DTensor) -> bool:
    return all(isinstance(placement, Replicate) for placement in x.placements)


def _read_scalar(op: Any, args: Arguments, kwargs: Options) -> Any:
    """``item()`` of the whole tensor, on every rank."""
    return op(gather(args[0]))


def _unscale(op: Any, args: Arguments, kwargs: Options) -> None:
    """Unscaling of gradients by a ``GradScaler``: an infinite gradient in any rank's part is found by every rank."""
    gradients, found_inf, inverse_scale = args
    op([torch_compat.local_of(x) for x in gradients], torch_compat.local_of(found_inf), torch_compat.local_of(inverse_scale))
    for mesh in {x.device_mesh: x.device_mesh for x in gradients if isinstance(x, DTensor)}:
        for axis in range(mesh.ndim):
            dist.all_reduce(torch_compat.local_of(found_inf), op=dist.ReduceOp.MAX, group=mesh.get_group(axis))


def _as_strided(torch_handler: Callable[..., Any], op: Any, args: Arguments, kwargs: Options) -> Any:
    """A view by strides, which torch knows only where it changes nothing."""
    try:
        return torch_handler(op, args, dict(kwargs))
    except RuntimeError:
        return view_whole(op, args, kwargs, args[0])


def _run_whole_beyond_torch(torch_handler: Callable[..., Any], op: Any, args: Arguments, kwargs: Options) -> Any:
    """An op that torch runs by a function of its own, which knows plain shards only."""
    dtensors = [x for x in _find_tensors(args, kwargs) if isinstance(x, DTensor)]
    is_known = all(type(placement) in (Shard, Replicate) for x in dtensors for placement in x.placements)
    # Torch splits a convolution by rows of its input, with an exchange of borders; weights that are split it takes for whole ones.
    if is_known and not ("convolution" in op._schema.name and is_ours(dtensors[0].device_mesh)):
        return torch_handler(op, args, dict(kwargs))
    return run_whole(op, args, kwargs)


def take_plain_gradients(values: Iterable[Any]) -> None:
    """Let these outputs of a program take gradients that are DTensors, which they get where a loss has a term of weights."""
    for x in values:
        # Other classes of tensors, such as outputs that aren't read yet, see to it themselves.
        if type(x) is Tensor and x.requires_grad:
            x.register_hook(lambda gradient: gather(gradient) if isinstance(gradient, DTensor) else None)  # type: ignore[no-untyped-call]


_OURS: dict[DeviceMesh, DeviceMesh] = {}


def adopt(mesh: DeviceMesh) -> None:
    """Note that a mesh holds tensors of a compiled model. An equal one, of process groups that are gone, is forgotten."""
    _OURS.pop(mesh, None)
    _OURS[mesh] = mesh


def is_ours(mesh: DeviceMesh) -> bool:
    """Whether a mesh holds tensors of a compiled model."""
    return mesh in _OURS


def find_ours(sizes: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh | None:
    """The mesh with these axes that holds tensors of a compiled model."""
    return next((mesh for mesh in _OURS if tuple(mesh.shape) == sizes and (mesh.mesh_dim_names or ()) == names), None)


@functools.cache
def teach_whole_values() -> None:
    """Make torch's DTensors do what plain tensors do, where they don't; a second call changes nothing."""
    # Torch warns that it replicates plain tensors of one element, which is what is done with all plain tensors.
    warnings.filterwarnings("ignore", message="Found a non-scalar tensor with numel=1 and ndim!=0")
    aten = torch.ops.aten
    torch_compat.replace_dispatch(lambda torch_rule: functools.partial(_dispatch, torch_rule))
    torch_compat.add_op_handler(aten._local_scalar_dense.default, _read_scalar)
    torch_compat.add_op_handler(aten._amp_foreach_non_finite_check_and_unscale_.default, _unscale)
    for op in (aten.argmax.default, aten.argmin.default, aten.convolution.default, aten.convolution_backward.default):
        _wrap_handler(op, _run_whole_beyond_torch)
    _wrap_handler(aten.as_strided.default, _as_strided)


def _wrap_handler(op: Any, wrapper: Callable[..., Any]) -> None:
    """Let `wrapper` decide when torch's own handler of an op is called."""
    torch_handler: list[Any] = []
    torch_handler.append(torch_compat.add_op_handler(op, lambda *call: wrapper(torch_handler[0], *call)))
