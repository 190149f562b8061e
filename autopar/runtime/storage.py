"""Where the user's parameters and buffers are stored since the first plan, and how they get there.

Comes in: the user's model and the programs that are made for it. Goes out: a `Deployment`, the layouts in which the first program stores
parameters, and which all later programs must use. Before the first plan every rank has every parameter whole (`replicate`). Captures see
plain tensors of the global sizes in the place of DTensors (`plain_parameters`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate

from autopar import torch_compat
from autopar.errors import InputError, PlanError
from autopar.ir import REPLICATE, Layout, Mesh, format_layout, local_shape, with_pipeline
from autopar.ops import comm
from autopar.rewrite import Program, Slot
from autopar.runtime import dispatch, states
from autopar.runtime.dtensor import as_dtensor, placements_of, shape_of_part, take_local
from autopar.runtime.failures import Alarm
from autopar.runtime.members import Structure, find_places, read
from autopar.runtime.owned import Owned
from autopar.runtime.sums import Held, TrackedParameter
from autopar.runtime.world import axes_of, form_alarm, form_mesh, group_over, pipeline_axis

Init = Callable[[str, Tensor], Tensor]
"""From the name of a parameter or buffer on the meta device, and that meta tensor, to its whole value."""


SHARED_REMEDY = "pin the same mesh and pipeline for both, or compile one module that holds both models"


@dataclass(frozen=True, slots=True)
class StoredParameter:
    """How a parameter is stored since a first plan; written on the parameter, for other models that share it.

    Attributes:
        mesh: the mesh of a pipeline rank.
        pipeline_ranks: number of pipeline ranks.
        layout: its layout on the mesh.
        owner: the pipeline rank that stores it; None where every one does.
    """

    mesh: Mesh
    pipeline_ranks: int
    layout: Layout
    owner: int | None

    def contradiction(self, name: str, other: str) -> str:
        """What to tell the user when another model, which shares this parameter, wants to store it otherwise."""
        mesh = with_pipeline(self.mesh, self.pipeline_ranks)
        return f"{name} is stored for another compiled model already, on the mesh {mesh}, but {other}: {SHARED_REMEDY}"


@dataclass(frozen=True, slots=True, eq=False)
class Deployment:
    """What the first plan decides for all later programs: meshes, process groups, and how parameters are stored.

    Attributes:
        mesh: the mesh that every pipeline rank runs; its axes are those that layouts name.
        batch_axes: the axes that the first plan splits the batch over: with ``inputs="local"`` every rank passes its part along these,
            whatever a later plan does with the batch.
        device_mesh: torch's mesh of all ranks, whose first axis is the pipeline's where there are several pipeline ranks; None for a single
            process without process groups.
        axes: what a program's names of axes stand for on this rank.
        pipeline_rank: this rank's position along the pipeline; 0 without one.
        pipeline_ranks: number of pipeline ranks; 1 without a pipeline.
        pipeline: the axis between them; None without a pipeline.
        alarm: stops all ranks of a pipeline when one fails.
        layouts: by name, the layout on `mesh` in which a parameter is stored.
        owners: by name, the pipeline rank that stores a parameter; None where every pipeline rank does.
    """

    mesh: Mesh
    batch_axes: tuple[str, ...]
    device_mesh: DeviceMesh | None
    axes: Mapping[str, comm.Axis]
    pipeline_rank: int
    pipeline_ranks: int
    pipeline: comm.Axis | None
    alarm: Alarm
    layouts: Mapping[str, Layout]
    owners: Mapping[str, int | None]

    @property
    def place(self) -> int:
        """This device's rank in the mesh of its pipeline rank."""
        return dist.get_rank() % self.mesh.world_size if self.device_mesh is not None else 0

    def placements_of(self, layout: Layout, owner: int | None) -> list[Placement]:
        """DTensor placements on the device mesh of a tensor with this layout, which pipeline rank `owner` (None: every one) stores."""
        inner = placements_of(layout, self.mesh)
        if self.pipeline_ranks == 1:
            return list(inner)
        return [Replicate() if owner is None else Owned(owner), *inner]


class Storage:
    """The parameters and buffers of one model on this rank.

    Args:
        model: the user's model; its parameters are exchanged in place.
        init: makes the values of what is on the meta device; without it, that holds NaN until a state is loaded.
        device: where what is on the meta device is stored.

    Attributes:
        deployment: the meshes, process groups and layouts of the first plan; None before it.
    """

    def __init__(self, model: nn.Module, init: Init | None, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.deployment: Deployment | None = None
        self._init = init
        self._groups: dict[tuple[str, ...], dist.ProcessGroup] = {}
        # The place of each name, so that a call needn't walk the modules. Not the tensors, since the user may replace them.
        self._parameter_at = find_places(model, "_parameters")
        self._buffer_at = find_places(model, "_buffers")
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._named: dict[str, nn.Parameter] = {name: read(place) for name, place in self._parameter_at.items()}
        self._structure = Structure(model)

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter of this name, as it is stored now."""
        parameter: nn.Parameter = read(self._parameter_at[name])
        return parameter

    def buffers_of(self, program: Program) -> dict[str, Tensor]:
        """The buffers that a program reads, and the constants among them, by name.

        Raises InputError for a tensor that is an attribute of the model and was given other sizes or another dtype, or no values.
        """
        return {slot.name: self._buffer(slot, program) for slot in program.buffers}

    def _buffer(self, slot: Slot, program: Program) -> Tensor:
        if slot.name not in program.constants:
            buffer: Tensor = read(self._buffer_at[slot.name])
            return buffer
        captured = program.constants[slot.name]
        # A constant that is an attribute of the model may have been given another tensor since.
        owner, _, attribute = slot.name.rpartition(".")
        value = self._modules[owner].__dict__.get(attribute, captured) if owner in self._modules else captured
        if not isinstance(value, Tensor) or (value.shape, value.dtype) != (captured.shape, captured.dtype):
            raise InputError(
                f"{slot.name} was {_describe(captured)} when the model was captured, and is {_describe(value)} now:"
                " compile the model again, or pass the tensor to forward"
            )
        if value.is_meta:
            raise InputError(
                f"{slot.name} is on the meta device and gets no values, being neither parameter nor buffer: register it as a buffer"
            )
        return value

    def kinds(self) -> tuple[object, ...]:
        """What a program depends on beside the sizes of parameters: of each, in order, the dtype and whether it requires a gradient.

        Raises InputError when modules or parameters were added, removed or untied since the model was compiled, or sizes are others.
        """
        self._structure.check()
        tensors = [read(place) for place in self._parameter_at.values()]
        for (name, own), x in zip(self._named.items(), tensors, strict=True):
            if x is not own and x.shape != own.shape:
                raise InputError(
                    f"{name} has the sizes {tuple(x.shape)} at this call, and had {tuple(own.shape)} when the model was compiled: "
                    "compile the changed model again"
                )
        return tuple((tensor.dtype, tensor.requires_grad) for tensor in tensors)

    def hooked(self) -> list[str]:
        """Names of the parameters whose gradients the user's hooks get."""
        return [name for name, place in self._parameter_at.items() if torch_compat.has_hooks(read(place))]

    def is_stored(self, name: str, x: Tensor) -> bool:
        """Whether `x` is a parameter that is stored as the first plan says, not a substitute."""
        deployment = self.deployment
        assert deployment is not None
        if deployment.device_mesh is None or not isinstance(x, DTensor):
            return deployment.device_mesh is None and isinstance(x, nn.Parameter)
        placements = deployment.placements_of(deployment.layouts[name], deployment.owners[name])
        return isinstance(x, nn.Parameter) and x.device_mesh == deployment.device_mesh and x.placements == tuple(placements)

    def sum_group(self, slot: Slot) -> dist.ProcessGroup | None:
        """The process group over which the gradient of a program's parameter is summed; None when it is complete on every rank."""
        return self._groups.get(slot.partial_axes)

    def track(self, slot: Slot, parameter: nn.Parameter, leaf: Tensor, *, is_borrowed: bool = False) -> TrackedParameter:
        """A parameter of a program, whose gradients are to be summed.

        `leaf` is this rank's part; where the parameter `is_borrowed`, another pipeline rank stores it, and the leaf is of the sizes of the
        part there.
        """
        reduced = None if slot.reduced_dtype is None else getattr(torch, slot.reduced_dtype)
        tracked = TrackedParameter(slot.name, parameter, leaf, self.sum_group(slot), reduced)
        deployment = self.deployment
        is_here = is_borrowed or (deployment is not None and deployment.owners[slot.name] in (None, deployment.pipeline_rank))
        if slot.stored is not None and deployment is not None and deployment.device_mesh is not None and is_here:
            axis, state = next((axis, state) for axis, state in enumerate(slot.stored) if state.level)
            name = deployment.mesh.names[axis]
            group_axis = deployment.axes[name]
            assert isinstance(group_axis, comm.GroupAxis), "the ranks are processes"
            tracked.held = Held(
                group_axis, state.dim, state.level, name in slot.partial_axes, parameter.shape[state.dim] if state.padded else None
            )
            tracked.group = self._groups.get(_axes_beside_held(slot, deployment.mesh))
        return tracked

    def _own_parameters(self) -> dict[str, nn.Parameter]:
        """The model's parameters by name, without what stands in their places for one call (``torch.func.functional_call``)."""
        now = {name: read(place) for name, place in self._parameter_at.items()}
        return {
            name: now[name] if type(now[name]) is type(own) and isinstance(now[name], nn.Parameter) else own
            for name, own in self._named.items()
        }

    def stored_elsewhere(self) -> dict[str, StoredParameter]:
        """Before the first plan: the parameters that another compiled model stores already, by name."""
        if self.deployment is not None:
            return {}
        return {name: taken for name, own in self._own_parameters().items() if (taken := _find_stored(own)) is not None}

    def _shared_mesh(self) -> DeviceMesh | None:
        """The device mesh of parameters that another compiled model stores already; None without any."""
        own = self._own_parameters()
        return next((x.device_mesh for name in self.stored_elsewhere() if isinstance(x := own[name], DTensor)), None)

    def place_parameters(self, program: Program) -> Program:
        """Store the parameters as the first program needs them, or check that a later program reads them as they are stored.

        Returns the program; parameters that its pipeline ranks need and another stores are shared by their owner. Raises PlanError when a
        later program needs another mesh, another pipeline or other layouts.
        """
        pipeline_ranks = 1 if program.pipeline is None else program.pipeline.schedule.ranks
        if self.deployment is None:
            for name, taken in self.stored_elsewhere().items():
                if (taken.mesh, taken.pipeline_ranks) != (program.mesh, pipeline_ranks):
                    raise PlanError(taken.contradiction(name, f"this plan is for {with_pipeline(program.mesh, pipeline_ranks)}"))
            device_mesh = self._shared_mesh() or form_mesh(with_pipeline(program.mesh, pipeline_ranks), self.device.type)
            if device_mesh is not None:
                dispatch.adopt(device_mesh)
            axis = pipeline_axis(device_mesh) if device_mesh is not None and pipeline_ranks > 1 else None
            alarm = form_alarm(device_mesh, axis) if device_mesh is not None and program.pipeline is not None else Alarm()
            deployment = Deployment(
                mesh=program.mesh,
                batch_axes=program.batch_axes,
                device_mesh=device_mesh,
                axes=axes_of(program.mesh, device_mesh),
                pipeline_rank=axis.index if axis is not None else 0,
                pipeline_ranks=pipeline_ranks,
                pipeline=axis,
                alarm=alarm,
                layouts={},
                owners={},
            )
            layouts, owners = self._exchange_parameters(program, deployment)
            self.deployment = dataclasses.replace(deployment, layouts=layouts, owners=owners)
        deployment = self.deployment
        if pipeline_ranks != deployment.pipeline_ranks:
            raise PlanError(f"the parameters are stored on {deployment.pipeline_ranks} pipeline ranks, a later plan wants {pipeline_ranks}")
        if program.mesh != deployment.mesh:
            raise PlanError(f"the parameters are stored on the mesh {deployment.mesh}, a later plan wants {program.mesh}")
        mismatched = [slot for slot in program.parameters if deployment.layouts[slot.name] != slot.stored_layout]
        # A parameter may be needed where the first program didn't use it: its owner sends it there, as it does with shared ones.
        program = dataclasses.replace(
            program, parameters=tuple(_with_owner(slot, deployment.owners[slot.name]) for slot in program.parameters)
        )
        if mismatched:
            raise PlanError(
                "a later plan wants parameters stored otherwise than the first: "
                + ", ".join(
                    f"{slot.name} {format_layout(slot.stored_layout)}, not {format_layout(deployment.layouts[slot.name])}"
                    for slot in mismatched
                )
            )
        if deployment.device_mesh is not None:
            for slot in program.buffers:
                if slot.name in program.constants:
                    _share_first(self._buffer(slot, program), self.device)
            # Forming a group is a collective: every rank forms the same ones in the same order.
            wanted = {axes for slot in program.parameters for axes in (slot.partial_axes, _axes_beside_held(slot, program.mesh)) if axes}
            for axes in sorted(wanted - set(self._groups)):
                self._groups[axes] = group_over(deployment.device_mesh, axes)
            deployment.alarm.watch(self._groups.values())
        return program

    def _exchange_parameters(self, program: Program, deployment: Deployment) -> tuple[dict[str, Layout], dict[str, int | None]]:
        """Exchange every parameter for the part that this rank stores; returns all layouts and owners by name."""
        mesh, device_mesh = deployment.mesh, deployment.device_mesh
        named = self._own_parameters()
        by_object = {id(named[slot.name]): slot for slot in program.parameters}
        layouts: dict[str, Layout] = {}
        owners: dict[str, int | None] = {}
        exchanged: set[int] = set()
        moved: list[tuple[Tensor, DTensor]] = []
        for name, parameter in named.items():
            # What the program doesn't use stays whole, on the same mesh, so that gradient clipping sees a single mesh.
            slot = by_object.get(id(parameter))
            layout = layouts[name] = slot.stored_layout if slot is not None else (REPLICATE,) * len(mesh.names)
            owner = owners[name] = slot.owner if slot is not None and deployment.pipeline_ranks > 1 else None
            if (taken := _find_stored(parameter)) is not None:
                layouts[name], owners[name] = taken.layout, taken.owner
                continue
            if id(parameter) in exchanged:
                continue
            exchanged.add(id(parameter))
            is_aliased = isinstance(parameter, DTensor) and torch_compat.has_aliases(parameter)
            whole = torch_compat.local_of(parameter)
            is_stored_here = owner in (None, deployment.pipeline_rank)
            if not is_stored_here:
                local = empty_part(parameter.shape, layout, mesh, parameter.dtype, self.device)
            elif whole.is_meta:
                local = self._materialise(name, whole, layout, mesh, deployment.place)
            elif device_mesh is None:
                continue
            else:
                local = take_local(whole, layout, mesh, deployment.place)
            if device_mesh is not None:
                local = as_dtensor(local, device_mesh, deployment.placements_of(layout, owner), parameter.shape)
            gradient = parameter.grad
            if isinstance(parameter, DTensor) and isinstance(local, DTensor) and not whole.is_meta:
                # It stays the same tensor to autograd, to which hooks and graphs may belong.
                torch_compat.exchange_part(parameter, torch_compat.local_of(local), torch_compat.spec_of(local))
            else:
                stored = nn.Parameter(local, requires_grad=parameter.requires_grad)
                stored.__dict__.update(parameter.__dict__)
                torch.utils.swap_tensors(parameter, stored)  # type: ignore[no-untyped-call]
                torch_compat.relink_hooks(parameter)
            parameter.__dict__[_STORED] = StoredParameter(mesh, deployment.pipeline_ranks, layout, owner)
            if isinstance(parameter, DTensor):
                if is_aliased:
                    moved.append((whole, parameter))
                parameter.grad = dispatch.as_stored(gradient, parameter)
        states.follow_parameters(moved)
        for path, module in self.model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    full = f"{path}.{name}" if path else name
                    module._buffers[name] = self._materialise(full, buffer, (REPLICATE,) * len(mesh.names), mesh, deployment.place)
        return layouts, owners

    def _materialise(self, name: str, meta: Tensor, layout: Layout, mesh: Mesh, rank: int) -> Tensor:
        """This rank's part of a tensor on the meta device."""
        if self._init is not None:
            whole = self._init(name, meta).detach()
            if whole.shape != meta.shape:
                raise InputError(f"init gave {name} the shape {tuple(whole.shape)}, the model has {tuple(meta.shape)}")
            return take_local(whole.to(meta.dtype), layout, mesh, rank).to(self.device)
        local = torch.empty(shape_of_part(meta.shape, layout, mesh, rank), dtype=meta.dtype, device=self.device)
        return local.fill_(float("nan")) if local.is_floating_point() else local.zero_()


def empty_part(shape: Sequence[int], layout: Layout, mesh: Mesh, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a rank has of a tensor that another pipeline rank owns: a part of size 0 along dim 0 (`autopar.runtime.owned`)."""
    return torch.empty((0, *local_shape(tuple(shape), layout, mesh)[1:]), dtype=dtype, device=device)


def stands_for(leaf: Tensor, parameter: nn.Parameter) -> bool:
    """Whether a program's leaf still shares the storage of a parameter, and requires a gradient if the parameter does."""
    return leaf.data_ptr() == torch_compat.address_of(parameter) and leaf.requires_grad == parameter.requires_grad


def copy_updated_buffers(program: Program, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The buffers that a run with a backward reads: copies of those that get new values, since the backward may need the old ones."""
    return {**buffers, **{name: buffers[name].clone() for name in program.mutated_buffers}}


def replicate(model: nn.Module, device: torch.device) -> None:
    """Make every parameter a replicated DTensor with the first rank's values; buffers get the first rank's values too, as in DDP.

    All ranks must have the same parameters in the same order, and the same buffers (`autopar.runtime.module` checks that).
    """
    world = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=(dispatch.WORLD,))
    dispatch.adopt(world)
    made: dict[int, nn.Parameter] = {}
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, states.ReplacedParameter):
                # Tied to a parameter of a model that was compiled before.
                module._parameters[name] = states.find_replacement(parameter)
                continue
            if parameter is None or isinstance(parameter, DTensor):
                _refuse_others(name, parameter)
                continue
            if id(parameter) not in made:
                local = parameter.detach().contiguous()
                if not local.is_meta:
                    _share_first(local, device)
                whole = as_dtensor(local, world, [Replicate()], parameter.shape)
                made[id(parameter)] = _like(parameter, nn.Parameter(whole, requires_grad=parameter.requires_grad))
                made[id(parameter)].grad = dispatch.as_stored(parameter.grad, made[id(parameter)])
                replaced[parameter] = made[id(parameter)]
            module._parameters[name] = made[id(parameter)]
    states.replace_parameters(replaced)
    for _, buffer in sorted(model.named_buffers(), key=lambda item: item[0]):
        if not buffer.is_meta:
            _share_first(buffer, device)


def _share_first(tensor: Tensor, device: torch.device) -> None:
    """Give a tensor the first rank's values, in place; of any dtype, strides and device, unlike the broadcasts of process groups."""
    sent = tensor.detach().to(device).contiguous()
    dist.broadcast(sent.reshape(-1).view(torch.uint8), 0)
    if sent.data_ptr() != tensor.data_ptr():
        with torch.no_grad():
            tensor.copy_(sent)


@contextmanager
def plain_parameters(model: nn.Module) -> Iterator[None]:
    """Inside, the model's parameters are plain ones of the global sizes, instead of DTensors and of tensors that stand in for a call."""
    before = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and (isinstance(parameter, DTensor) or not isinstance(parameter, nn.Parameter))
    ]
    plain: dict[int, nn.Parameter] = {}
    for module, name, parameter in before:
        if id(parameter) not in plain:
            local = torch_compat.local_of(parameter)
            if local.shape != parameter.shape:
                # Capture reads sizes only, so the tensor needs no memory.
                local = torch.empty(parameter.shape, dtype=local.dtype, device=local.device)
                local.untyped_storage().resize_(0)
            plain[id(parameter)] = nn.Parameter(local, requires_grad=parameter.requires_grad)
        module._parameters[name] = plain[id(parameter)]
    try:
        yield
    finally:
        for module, name, parameter in before:
            module._parameters[name] = parameter


def _refuse_others(name: str, parameter: Tensor | None) -> None:
    if isinstance(parameter, DTensor) and not dispatch.is_ours(parameter.device_mesh):
        raise InputError(
            f"{name} is a DTensor on the mesh {parameter.device_mesh}, which something else than autopar made: compile the model before it "
            "is split, without fully_shard, parallelize_module and distribute_tensor"
        )


def _like(parameter: nn.Parameter, stored: nn.Parameter) -> nn.Parameter:
    """`stored`, with the attributes and hooks of the user's `parameter`."""
    stored.__dict__.update(parameter.__dict__)
    torch_compat.copy_hooks(parameter, stored)
    return stored


def _axes_beside_held(slot: Slot, mesh: Mesh) -> tuple[str, ...]:
    """The axes over which a parameter's gradient is summed, but for one along which it is stored split and given whole."""
    held = {name for name, state in zip(mesh.names, slot.stored_layout, strict=True) if state.level}
    return tuple(axis for axis in slot.partial_axes if axis not in held)


def _with_owner(slot: Slot, owner: int | None) -> Slot:
    """The slot with the parameter's owner among the pipeline ranks that have it, in first place."""
    return slot if owner in (None, slot.owner) else dataclasses.replace(slot, users=tuple(dict.fromkeys((owner, *slot.users))))


_STORED = "_autopar_stored"
"""The attribute of a parameter that says how it is stored."""


def _find_stored(parameter: nn.Parameter) -> StoredParameter | None:
    return parameter.__dict__.get(_STORED)


def _describe(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
