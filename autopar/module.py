"""The user's model, run by a parallel program: what `autopar.compile` returns.

Comes in: the model and a planner that makes programs. Names, ``state_dict``, ``train``/``eval`` and attributes stay the
model's own; parameters become DTensors that store what the first plan says; calls and results mean what they mean on one
device. Optimizers must be made after, from this module's parameters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.utils import _pytree as pytree

from autopar import comm, rng, torch_compat
from autopar.capture import refuse_autocast
from autopar.collectives import gather_along, regather
from autopar.dtensor import as_dtensor, gather_whole, placements_of, shard_whole, split_steps, take_local, teach_strided_shards
from autopar.errors import InputError, PlanError
from autopar.failures import Alarm
from autopar.gradients import GradientReducer, StashedGradients, Tracked
from autopar.layout import REPLICATE, Layout, Mesh, format_layout, local_shape, shard, with_pipeline
from autopar.owned import Owned
from autopar.pipeline import PipelineRun, StageRunner, go_back_on_backward, hand_over_on_backward, refuse_backward
from autopar.program import Program, Slot
from autopar.world import axes_of, form_alarm, form_mesh, group_over, join_world, pipeline_axis

Planner = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], bool], Program]
"""Makes the program of one signature: gets the model with plain parameters, a call's arguments, and whether it trains.

The parameters' values must not be read (only shapes, dtypes and devices are true), and every rank must make the same program.
"""

Init = Callable[[str, Tensor], Tensor]
"""Gives the whole value of a parameter or buffer that is on the meta device, from its name and the meta tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class _Home:
    """Where the parameters live since the first plan.

    Attributes:
        mesh: the axes that layouts name; `device_mesh` has the pipeline before them when there is one.
        group: this rank's group along the pipeline, 0 without one; `groups` of them; `pipeline` is the axis between them.
        alarm: stops all ranks of a pipeline when one fails.
        layouts, owners: how, and in which group, each parameter is stored; an owner of None is every group.
    """

    mesh: Mesh
    device_mesh: DeviceMesh | None
    axes: Mapping[str, comm.Axis]
    group: int
    groups: int
    pipeline: comm.Axis | None
    alarm: Alarm
    layouts: Mapping[str, Layout]
    owners: Mapping[str, int | None]

    @property
    def place(self) -> int:
        """This rank's number within its group."""
        return dist.get_rank() % self.mesh.world_size if self.device_mesh is not None else 0

    def placements_of(self, layout: Layout, owner: int | None) -> list[Placement]:
        """What torch calls a stored tensor's layout on the device mesh."""
        inner = placements_of(layout, self.mesh)
        if self.groups == 1:
            return list(inner)
        return [Replicate() if owner is None else Owned(owner), *inner]


class ParallelModule(nn.Module):
    """Runs a model through parallel programs, one for each signature of inputs.

    Args:
        model: the user's model, on its device or on the meta device; its parameters are changed in place.
        planner: makes the programs.
        inputs: ``global``: every rank passes the same whole batch; ``local``: every rank passes the part that `data_shard`
            names, along dim 0 of every input, and a plan exists already (see `prepare`).
        init: values of what is on the meta device; without it, these hold NaN until a state is loaded.
        device: where parameters on the meta device go.

    A rank that loses another gives up after `autopar.world.TIMEOUT`.
    """

    def __init__(
        self,
        model: nn.Module,
        planner: Planner,
        *,
        inputs: Literal["global", "local"] = "global",
        init: Init | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(model, ParallelModule):
            raise InputError("the model is compiled already: compile the model that was given then, or use this one")
        for name in _SHARED:
            self.__dict__[name] = model.__dict__[name]
        # Not registered as a submodule: its children already are ours.
        self.__dict__["_original"] = model
        self.training = model.training
        self._planner = planner
        self._inputs = inputs
        self._init = init
        self._device = torch.device(device) if device is not None else _find_device(model)
        self._home: _Home | None = None
        self._programs: dict[object, Program] = {}
        self._leaves: dict[int, list[Tensor]] = {}
        self._runners: dict[int, tuple[list[Tensor], StageRunner]] = {}
        # Copies of parameters that this group uses and another owns, by name.
        self._guests: dict[str, Tensor] = {}
        self._groups: dict[tuple[str, ...], dist.ProcessGroup] = {}
        self._last: Program | None = None
        # Where each name's tensor is, so that a call needn't walk the modules; the tensors themselves may be replaced.
        self._all_modules = tuple(model.modules())
        self._parameter_at = _find_places(model, "_parameters")
        self._buffer_at = _find_places(model, "_buffers")
        self._reducer = GradientReducer()
        join_world(self._device.type)
        if dist.is_available() and dist.is_initialized():
            teach_strided_shards()
            _replicate(model, self._device)

    def __getattr__(self, name: str) -> Any:
        """Find what this module lacks in the user's model, such as ``config``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"], name)

    def train(self, mode: bool = True) -> ParallelModule:
        """Switch the model between training and evaluation; each has programs of its own."""
        super().train(mode)
        self._original.training = mode
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, those that wait under `no_sync` too."""
        super().zero_grad(set_to_none)
        self._reducer.zero()

    def no_sync(self) -> AbstractContextManager[None]:
        """Backwards inside add up on this rank only; the next one outside sums over the ranks."""
        return self._reducer.no_sync()

    @property
    def layouts(self) -> Mapping[str, Layout]:
        """How each parameter is stored, by name; empty before the first plan. Later programs must take them so."""
        return {} if self._home is None else self._home.layouts

    @property
    def owners(self) -> Mapping[str, int | None]:
        """The pipeline's group that stores each parameter, by name; None when every group does. Later programs must take them so."""
        return {} if self._home is None else self._home.owners

    @property
    def data_shard(self) -> tuple[int, int]:
        """Which part of the batch this rank works on: (index, count). PlanError before the first plan."""
        if self._home is None or self._last is None:
            raise PlanError("there is no plan yet that says how the batch is split: compile with example inputs, or call once")
        with comm.active(self._home.axes):
            return comm.index(self._last.batch_axes), comm.count(self._last.batch_axes)

    def prepare(self, *args: Any, **kwargs: Any) -> Program:
        """Plan for this call, whose arguments are global, and exchange the parameters, without running anything."""
        return self._find_program(args, kwargs)

    def train_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run forward and backward of a model that returns its loss, and return the loss, detached."""
        output = self(*args, **kwargs)
        loss = output if isinstance(output, Tensor) else _find_loss(output)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled or copied: process groups belong to this process. Raises InputError."""
        raise InputError(
            "a compiled model can't be pickled or copied, it holds process groups: save its state_dict(), and copy the model "
            "(for an average of the weights, say) before compiling it"
        )

    @torch_compat.uncompiled
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program of this call's signature, planning it first when there is none."""
        if self._home is not None:
            self._home.alarm.check()
        refuse_autocast(self._device)
        self._reducer.recover()
        local_tensors: dict[int, Tensor] = {}
        if self._inputs == "local":
            args, kwargs, local_tensors = self._as_global(args, kwargs)
        program = self._find_program(args, kwargs)
        home = self._home
        assert home is not None
        tensors = program.captured.bind(args, kwargs)
        if program.pipeline is not None:
            _refuse_gradients([local_tensors.get(id(x), x) for x in tensors])
            with torch.inference_mode(False):
                runner = self._find_runner(program, home)
            with home.alarm.guard(runner.where):
                whole = [self._find_global(x, local_tensors, home, program) for x in tensors]
                return self._run_pipeline(program, home, runner, whole)
        parts = []
        for slot, x in zip(program.inputs, tensors, strict=True):
            here = local_tensors.get(id(x))
            if here is None:
                parts.append(shard_whole(x, slot.layout, home.mesh, home.axes))
            else:
                parts.append(_reshard_local(here, slot.layout, home, program.batch_axes))
        buffers = {slot.name: _read(self._buffer_at[slot.name]) for slot in program.buffers}
        with torch.inference_mode(False):
            leaves = self._find_leaves(program)
        read = _lend_buffers(program, buffers) if torch.is_grad_enabled() else buffers
        held = [take_local(read[slot.name], slot.layout, home.mesh, home.place) for slot in program.buffers]
        one_seed = rng.agreed(self._share) if home.device_mesh is not None else nullcontext()
        with comm.active(home.axes), one_seed, regather() if program.regather else nullcontext():
            results = program.module(*leaves, *held, *parts)
        results = tuple(results) if isinstance(results, tuple | list) else (results,)
        with torch.no_grad():
            layouts = {slot.name: slot.layout for slot in program.buffers}
            for name, value in zip(program.mutated_buffers, results[len(program.outputs) :], strict=True):
                buffers[name].copy_(gather_whole(value, layouts[name], home.mesh, home.axes))
        outputs = [_as_output(x, slot, home) for x, slot in zip(results, program.outputs, strict=False)]
        return program.captured.unflatten(outputs)

    def _find_global(self, x: Tensor, local_tensors: Mapping[int, Tensor], home: _Home, program: Program) -> Tensor:
        """The whole batch; what every rank passed of it is gathered."""
        here = local_tensors.get(id(x))
        return x if here is None else _reshard_local(here, tuple(REPLICATE for _ in home.mesh.names), home, program.batch_axes)

    def _run_pipeline(self, program: Program, home: _Home, runner: StageRunner, inputs: list[Tensor]) -> Any:
        """Run the stages of this rank; see `autopar.pipeline`."""
        pipeline = program.pipeline
        assert pipeline is not None
        buffers = {slot.name: _read(self._buffer_at[slot.name]) for slot in program.buffers}
        number = 0
        if pipeline.random:
            number = self._agree(int(torch.randint(2**62, ())), home)
        trains = torch.is_grad_enabled() and bool(pipeline.trained)
        read = _lend_buffers(program, buffers) if trains else buffers
        run = runner.run(read, inputs, number=number, trains=trains, syncs=self._reducer.is_synced)
        executor = run.executor
        makes = {out.position for stage in executor.tensors for out in pipeline.stages[stage].outputs}
        parts = {i: executor.join(i) for i in makes}
        if not trains or pipeline.loss is not None:
            executor.close()
        with torch.no_grad():
            self._update_buffers(program, runner, buffers, parts)
        return program.captured.unflatten(self._as_outputs(program, home, runner, run, parts, trains))

    def _as_outputs(
        self, program: Program, home: _Home, runner: StageRunner, run: PipelineRun, parts: Mapping[int, Tensor], trains: bool
    ) -> list[Any]:
        """What the user gets of each output: the loss and other scalars on every rank, larger tensors as DTensors."""
        pipeline = program.pipeline
        assert pipeline is not None
        outside = trains and pipeline.loss is None
        shared: dict[int, Tensor] = {}
        for i, slot in enumerate(program.outputs):
            if outside or math.prod(slot.shape) == 1:
                shared[i] = runner.share(parts.get(i), slot, self._device)
        differentiable = [i for i, slot in enumerate(program.outputs) if slot.requires_grad]
        if outside:
            shared.update(go_back_on_backward({i: shared[i] for i in differentiable}, run))
        results: list[Any] = []
        for i, slot in enumerate(program.outputs):
            if trains and i == pipeline.loss:
                results.append(hand_over_on_backward(shared[i], run))
                continue
            refused = trains and not outside and i in differentiable
            owner = None if i in shared else slot.groups[0]
            local = shared.get(i, parts.get(i))
            if local is None:
                local = empty_part(slot.shape, slot.layout, home.mesh, getattr(torch, slot.dtype), self._device)
            local = refuse_backward(local) if refused else local
            if home.device_mesh is None or not (split_steps(slot.layout, home.mesh) or owner is not None):
                results.append(local)
            else:
                results.append(as_dtensor(local, home.device_mesh, home.placements_of(slot.layout, owner), slot.shape))
        return results

    def _update_buffers(self, program: Program, runner: StageRunner, buffers: Mapping[str, Tensor], parts: Mapping[int, Tensor]) -> None:
        """Give buffers their new values on every rank, those too that other groups made or wrote to."""
        pipeline = program.pipeline
        assert pipeline is not None
        slots = {slot.name: slot for slot in program.buffers}
        home = self._home
        assert home is not None
        for position, name in enumerate(program.mutated_buffers, len(program.outputs)):
            maker = dataclasses.replace(slots[name], groups=(pipeline.makers[position],))
            value = runner.share(parts.get(position), maker, self._device)
            buffers[name].copy_(gather_whole(value, slots[name].layout, home.mesh, home.axes))
        for name in sorted(pipeline.written):
            value = runner.share(buffers[name], slots[name], self._device)
            if value is not buffers[name]:
                buffers[name].copy_(value)

    def _find_runner(self, program: Program, home: _Home) -> StageRunner:
        """The runner of a program, with leaves that stand for the parameters as they are stored now."""
        mine = [slot for slot in program.parameters if home.group in slot.groups]
        parameters = {slot.name: _read(self._parameter_at[slot.name]) for slot in program.parameters}
        stored = [parameters[slot.name] for slot in mine if self._stores(slot.name, home)]
        if id(program) in self._runners:
            leaves, runner = self._runners[id(program)]
            if all(map(_stands_for, leaves, stored)):
                return runner
            self._reducer.part(runner.stash)
        leaves = [torch_compat.local_of(parameter).requires_grad_(parameter.requires_grad) for parameter in stored]
        named = {slot.name: leaf for slot, leaf in zip((s for s in mine if self._stores(s.name, home)), leaves, strict=True)}
        tracked = []
        for slot in program.parameters:
            parameter = parameters[slot.name]
            leaf = named.get(slot.name)
            if leaf is None:
                leaf = torch_compat.local_of(parameter).requires_grad_(parameter.requires_grad)
            tracked.append(Tracked(slot.name, parameter, leaf, self._groups.get(slot.partial_axes)))
        for slot in mine:
            if slot.name not in named:
                if slot.name not in self._guests:
                    shape = local_shape(slot.shape, slot.layout, home.mesh)
                    self._guests[slot.name] = torch.empty(shape, dtype=parameters[slot.name].dtype, device=self._device)
                named[slot.name] = self._guests[slot.name].detach().requires_grad_(parameters[slot.name].requires_grad)
        runner = StageRunner(program, home.group, home.pipeline, home.axes, named, StashedGradients(tracked, self._reducer), home.alarm)
        self._runners[id(program)] = leaves, runner
        return runner

    def _stores(self, name: str, home: _Home) -> bool:
        """Whether this rank stores its part of a parameter."""
        return home.owners[name] in (home.group, None)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load whole tensors or DTensors of any layout; of whole tensors every rank keeps its part."""
        own = dict(self.named_parameters(remove_duplicate=False))
        return super().load_state_dict({name: _as_stored(value, own.get(name)) for name, value in state_dict.items()}, strict, assign)

    def _agree(self, number: int, home: _Home) -> int:
        """The first rank's number, on every rank, over groups that a failure closes."""
        if home.pipeline is None:
            return self._share(number) if home.device_mesh is not None else number
        x = torch.tensor(number, device=self._device)
        for axis in (home.pipeline, *home.axes.values()):
            x = axis.gather_stack(x)[0]
        return int(x)

    def _share(self, number: int) -> int:
        """The first rank's number, on every rank."""
        shared = torch.tensor(number, device=self._device)
        dist.broadcast(shared, 0)
        return int(shared)

    # --- programs ---

    def _find_program(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Program:
        key = (
            _signature(args, kwargs),
            tuple(module.training for module in self._all_modules),
            tuple(_read(place).requires_grad for place in self._parameter_at.values()),
        )
        program = self._programs.get(key)
        if program is None:
            # Programs and stored parameters outlive a call in inference mode.
            with torch.inference_mode(False), _plain_parameters(self._original):
                program = self._planner(self._original, args, kwargs, self.training)
            with torch.inference_mode(False), torch.no_grad():
                program = self._settle(program)
            self._programs[key] = program
        self._last = program
        return program

    def _settle(self, program: Program) -> Program:
        """Store the parameters as the first program wants them; check that a later one takes them so."""
        groups = 1 if program.pipeline is None else program.pipeline.schedule.ranks
        if self._home is None:
            device_mesh = form_mesh(with_pipeline(program.mesh, groups), self._device.type)
            along = pipeline_axis(device_mesh) if device_mesh is not None and groups > 1 else None
            alarm = form_alarm(device_mesh, along) if device_mesh is not None and program.pipeline is not None else Alarm()
            group = along.index if along else 0
            home = _Home(program.mesh, device_mesh, axes_of(program.mesh, device_mesh), group, groups, along, alarm, {}, {})
            layouts, owners = self._exchange(program, home)
            self._home = dataclasses.replace(home, layouts=layouts, owners=owners)
        home = self._home
        if groups != home.groups:
            raise PlanError(f"the parameters are stored on {home.groups} groups of ranks, a later plan wants {groups}")
        if program.mesh != home.mesh:
            raise PlanError(f"the parameters are stored on the mesh {home.mesh}, a later plan wants {program.mesh}")
        wrong = [slot for slot in program.parameters if home.layouts[slot.name] != slot.layout]
        # A parameter that the first program didn't use may be wanted elsewhere: its owner lends it, as it does a shared one.
        program = dataclasses.replace(program, parameters=tuple(_lend(slot, home.owners[slot.name]) for slot in program.parameters))
        if wrong:
            raise PlanError(
                "a later plan wants parameters stored otherwise than the first: "
                + ", ".join(f"{slot.name} {format_layout(slot.layout)}, not {format_layout(home.layouts[slot.name])}" for slot in wrong)
            )
        if home.device_mesh is not None:
            # Forming groups is a collective: here every rank asks for the same ones in the same order.
            for axes in sorted({slot.partial_axes for slot in program.parameters if slot.partial_axes} - set(self._groups)):
                self._groups[axes] = group_over(home.device_mesh, axes)
            home.alarm.watch(self._groups.values())
        return program

    def _exchange(self, program: Program, home: _Home) -> tuple[dict[str, Layout], dict[str, int | None]]:
        mesh, device_mesh = home.mesh, home.device_mesh
        named = dict(self.named_parameters(remove_duplicate=False))
        by_object = {id(named[slot.name]): slot for slot in program.parameters}
        layouts: dict[str, Layout] = {}
        owners: dict[str, int | None] = {}
        exchanged: set[int] = set()
        for name, parameter in named.items():
            # What the program doesn't use is kept whole, on the same mesh, so that gradient clipping sees one mesh.
            slot = by_object.get(id(parameter))
            layout = layouts[name] = slot.layout if slot is not None else (REPLICATE,) * len(mesh.names)
            owner = owners[name] = slot.groups[0] if slot is not None and home.groups > 1 else None
            if id(parameter) in exchanged:
                continue
            exchanged.add(id(parameter))
            whole = torch_compat.local_of(parameter)
            is_here = owner in (None, home.group)
            if not is_here:
                local = empty_part(parameter.shape, layout, mesh, parameter.dtype, self._device)
            elif whole.is_meta:
                local = self._materialise(name, whole, layout, mesh, home.place)
            elif device_mesh is None:
                continue
            else:
                local = take_local(whole, layout, mesh, home.place)
            if device_mesh is not None:
                local = as_dtensor(local, device_mesh, home.placements_of(layout, owner), parameter.shape)
            stored = nn.Parameter(local, requires_grad=parameter.requires_grad)
            stored.__dict__.update(parameter.__dict__)
            torch.utils.swap_tensors(parameter, stored)  # type: ignore[no-untyped-call]
        for path, module in self._original.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    full = f"{path}.{name}" if path else name
                    module._buffers[name] = self._materialise(full, buffer, (REPLICATE,) * len(mesh.names), mesh, home.place)
        return layouts, owners

    def _materialise(self, name: str, meta: Tensor, layout: Layout, mesh: Mesh, rank: int) -> Tensor:
        """This rank's part of a tensor on the meta device."""
        if self._init is not None:
            whole = self._init(name, meta).detach()
            if whole.shape != meta.shape:
                raise InputError(f"init gave {name} the shape {tuple(whole.shape)}, the model has {tuple(meta.shape)}")
            return take_local(whole.to(meta.dtype), layout, mesh, rank).to(self._device)
        local = torch.empty(local_shape(tuple(meta.shape), layout, mesh), dtype=meta.dtype, device=self._device)
        return local.fill_(float("nan")) if local.is_floating_point() else local.zero_()

    def _find_leaves(self, program: Program) -> list[Tensor]:
        """The tensors that stand for the parameters in this program; made again when a parameter got other storage."""
        parameters = [_read(self._parameter_at[slot.name]) for slot in program.parameters]
        leaves = self._leaves.get(id(program))
        if leaves is not None and all(map(_stands_for, leaves, parameters)):
            return leaves
        if leaves is not None:
            self._reducer.close()
            self._leaves.clear()
        leaves = [torch_compat.local_of(parameter).requires_grad_(parameter.requires_grad) for parameter in parameters]
        self._reducer.track(
            [
                Tracked(slot.name, parameter, leaf, self._groups.get(slot.partial_axes))
                for slot, parameter, leaf in zip(program.parameters, parameters, leaves, strict=True)
            ]
        )
        self._leaves[id(program)] = leaves
        return leaves

    def _as_global(self, args: Any, kwargs: Any) -> tuple[Any, Any, dict[int, Tensor]]:
        """Arguments of the whole batch's sizes in place of local ones, and by their ids the tensors that they stand for."""
        _, count = self.data_shard
        local_tensors: dict[int, Tensor] = {}

        def widen(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.ndim == 0:
                return x
            # Sizes without memory: nothing reads the values of a stand-in.
            stand_in = x.new_zeros(1).expand(x.shape[0] * count, *x.shape[1:])
            local_tensors[id(stand_in)] = x
            return stand_in

        args, kwargs = pytree.tree_map(widen, (args, kwargs))
        return args, kwargs, local_tensors


# The dicts of `nn.Module` that make names, states and their hooks the original's.
_SHARED = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


Place = tuple[dict[str, Any], str]
"""A module's dict of parameters or buffers and the name in it."""


def _find_places(model: nn.Module, kind: Literal["_parameters", "_buffers"]) -> dict[str, Place]:
    """Every place of a tensor, by its full name; a tied parameter has several."""
    return {
        f"{path}.{name}" if path else name: (module.__dict__[kind], name)
        for path, module in model.named_modules(remove_duplicate=False)
        for name, tensor in module.__dict__[kind].items()
        if tensor is not None
    }


def _read(place: Place) -> Any:
    return place[0][place[1]]


def _find_device(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            return tensor.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _replicate(model: nn.Module, device: torch.device) -> None:
    """Make every parameter a DTensor that all ranks have whole, with the first rank's values, as DDP does."""
    world = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("world",))
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or isinstance(parameter, DTensor):
                continue
            if id(parameter) not in made:
                local = parameter.detach().contiguous()
                if not local.is_meta:
                    dist.broadcast(local, 0)
                whole = as_dtensor(local, world, [Replicate()], parameter.shape)
                made[id(parameter)] = _like(parameter, nn.Parameter(whole, requires_grad=parameter.requires_grad))
            module._parameters[name] = made[id(parameter)]
    for buffer in model.buffers():
        if not buffer.is_meta:
            dist.broadcast(buffer, 0)


def _lend(slot: Slot, owner: int | None) -> Slot:
    """The parameter as its owner lends it to the groups that use it."""
    return slot if owner in (None, slot.groups[0]) else dataclasses.replace(slot, groups=tuple(dict.fromkeys((owner, *slot.groups))))


def _lend_buffers(program: Program, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The buffers for a run with a backward: of those that get a new value a copy, for the backward may want the old one."""
    return {**buffers, **{name: buffers[name].clone() for name in program.mutated_buffers}}


def _like(parameter: nn.Parameter, stored: nn.Parameter) -> nn.Parameter:
    """`stored` with the attributes and the hooks that the user has put on `parameter`."""
    stored.__dict__.update(parameter.__dict__)
    for hook in (parameter._backward_hooks or {}).values():
        stored.register_hook(hook)  # type: ignore[no-untyped-call]
    for hook in (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values():
        stored.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    return stored


@contextmanager
def _plain_parameters(model: nn.Module) -> Iterator[None]:
    """Put plain tensors of the global sizes in the place of DTensors, so that a model can be captured."""
    before = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and isinstance(parameter, DTensor)
    ]
    plain: dict[int, nn.Parameter] = {}
    for module, name, parameter in before:
        if id(parameter) not in plain:
            local = torch_compat.local_of(parameter)
            if local.shape != parameter.shape:
                # Capture reads sizes only, so what other ranks store needs no memory here.
                local = torch.empty(parameter.shape, dtype=local.dtype, device=local.device)
                local.untyped_storage().resize_(0)
            plain[id(parameter)] = nn.Parameter(local, requires_grad=parameter.requires_grad)
        module._parameters[name] = plain[id(parameter)]
    try:
        yield
    finally:
        for module, name, parameter in before:
            module._parameters[name] = parameter


def _reshard_local(x: Tensor, layout: Layout, home: _Home, batch_axes: Sequence[str]) -> Tensor:
    """What the program takes of a batch of which this rank has the rows that the batch axes number; other rows are fetched."""
    if all(layout[home.mesh.names.index(name)] == shard(0) for name in batch_axes):
        return shard_whole(x, layout, home.mesh, home.axes, batch_axes)
    for name in reversed(batch_axes):
        if home.axes[name].size > 1:
            x = gather_along(x, home.axes[name], 0, 1)
    return shard_whole(x, layout, home.mesh, home.axes)


def _refuse_gradients(inputs: Sequence[Tensor]) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise InputError(
            "an input of a pipelined model needs a gradient, which the pipeline doesn't bring back: detach it, or pin pp=1, microbatches=1"
        )


def empty_part(shape: Sequence[int], layout: Layout, mesh: Mesh, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a rank has of a tensor that another group owns: nothing along dim 0 (`autopar.owned`)."""
    return torch.empty((0, *local_shape(tuple(shape), layout, mesh)[1:]), dtype=dtype, device=device)


def _stands_for(leaf: Tensor, parameter: nn.Parameter) -> bool:
    return leaf.data_ptr() == torch_compat.address_of(parameter) and leaf.requires_grad == parameter.requires_grad


def _as_output(x: Any, slot: Slot, home: _Home) -> Any:
    if home.device_mesh is None or not isinstance(x, Tensor) or not split_steps(slot.layout, home.mesh):
        return x
    return as_dtensor(x, home.device_mesh, placements_of(slot.layout, home.mesh), slot.shape)


def _as_stored(value: Any, parameter: nn.Parameter | None) -> Any:
    """A whole tensor as a DTensor like the parameter's; a DTensor of another layout exchanged for one."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    if not isinstance(value, DTensor):
        replicate = [Replicate()] * parameter.device_mesh.ndim
        whole = as_dtensor(value.to(parameter.device), parameter.device_mesh, replicate, value.shape)
        return whole.redistribute(placements=parameter.placements)
    if value.device_mesh == parameter.device_mesh:
        return value.redistribute(placements=parameter.placements)
    return _as_stored(value.full_tensor(), parameter)


def _signature(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[object, ...]:
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    return (repr(spec), *(_describe(leaf) for leaf in leaves))


def _describe(leaf: Any) -> object:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.device, leaf.requires_grad
    return type(leaf), repr(leaf)


def _find_loss(output: Any) -> Tensor:
    found: Any = None
    if isinstance(output, Mapping):
        found = output.get("loss")
    elif isinstance(output, Sequence) and output:
        found = output[0]
    found = getattr(output, "loss", found)
    if not isinstance(found, Tensor):
        raise InputError(f"train_step needs a model that returns its loss; it returned a {type(output).__name__} without one")
    return found
