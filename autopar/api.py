"""What users call: `compile`, `plan` and `verify`.

Comes in: a model, an example batch, and a cluster. Goes out: a `Plan`, a `Verification`, or a module that trains in parallel. Each function
is the chain of capture, search, rewrite and runtime in order, short enough to be read.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from autopar.capture import Captured, ExampleInputs, capture, refuse_tensors, split_call
from autopar.checks import Verification, verify_plan
from autopar.cost_models import Cluster, peak_flops
from autopar.errors import CaptureError, InfeasibleError, InputError, PlanError
from autopar.ir import Mesh, Precision, StateKind, with_pipeline
from autopar.ops import Fused, Recomputed
from autopar.plans import NO_PINS, Pins, Plan, Request, check_devices, describe_ops, reconcile, record_request
from autopar.report import describe_choice
from autopar.rewrite import Program, mark_samples, rewrite
from autopar.rewrite import fuse as fuse_program
from autopar.runtime import Init, ParallelModule, StoredParameter, decide_fusion, expect_masters, form_agreement, world
from autopar.search import AxisKind, kind_of, make_plan
from autopar.units import format_seconds

Progress = Callable[[str], None]
PrecisionLike = Precision | str | Any | None
"""What `Precision.parse` reads: a name, a `Precision`, or FSDP2's ``MixedPrecisionPolicy``."""


def plan(
    model: nn.Module,
    example_inputs: ExampleInputs,
    cluster: Cluster | str,
    *,
    precision: PrecisionLike = None,
    pins: Mapping[str, object] | Pins | None = None,
    mesh: Mapping[str, int] | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Find the fastest plan for a model on a cluster, without running anything.

    Args:
        model: a model on any device; the meta device is enough.
        example_inputs: one global batch, as a mapping of keyword arguments, a tuple of positional ones, or a pair of both. Only shapes and
            dtypes of tensors are read.
        cluster: such as ``"4x8xH100"``: 4 machines of 8 devices each.
        precision: in which dtypes parameters are read, gathered, summed and updated, where that isn't the model's own: ``"mixed"``
            (parameters, gradients and moments float32, the program bfloat16), ``"mixed-float16"``, ``"float32"``, ``"bfloat16"`` (with
            float32 masters in the optimizer, `MasterWeights`), an `autopar.Precision`, or FSDP2's ``MixedPrecisionPolicy``.
        pins: what the plan must have, as a dict or `autopar.Pins`: axis sizes by kind (``{"dp": 2, "tp": 4}``), ``zero`` (ZeRO level, 0 to
            3), ``fsdp`` (short for level 3 or 0) and ``vocabulary`` (true or false); of a pipeline ``pp`` (pipeline ranks), ``schedule``
            (``"1f1b"``), ``microbatches``, ``chunks`` (stages per pipeline rank) and ``recompute`` (``"none"``, ``"selective"``,
            ``"full"``); ``loss_chunks`` (parts in which a head and its cross entropy compute the logits); ``prefetch``
            (blocks ahead of which parameters are gathered); ``half_batches`` (whether halves of the batch take turns); placements
            and stages of modules by glob (``{"layers.*.mlp": {"tp": "o"}, "layers.3": {"pp": 1}}``).
        mesh: axis sizes by name, instead of a search over meshes. ``dp``, ``tp`` and ``cp`` are kinds, ``pp`` is the pipeline, other names
            are free. With a mesh there is a pipeline only if ``pp`` is in it or pinned.
        strict: whether an op without a rule is an error; by default it runs replicated.
        progress: called with a few words on what is being done.

    Raises:
        CaptureError: the model can't be one graph.
        InputError: pins, mesh or inputs that can't be used. HardwareError is one too.
        HardwareError: text of a cluster that can't be read, or names no known machine; or a machine that can't compute the model's dtype.
        InfeasibleError: no plan fits the memory; the message says how much is needed.
        UnknownOpError: under `strict`, an op has no rule.
    """
    devices = _read_cluster(cluster)
    policy = Precision.parse(precision)
    pins = Pins.parse(pins)
    # What is known without the graph is refused before the model is captured, which takes seconds.
    check_devices(*reconcile(pins, mesh), devices)
    request = record_request(cluster, pins, mesh, strict=strict)
    captured = capture_for_planning(model, example_inputs, devices, policy, progress)
    return plan_captured(captured, request, devices, policy, type(model).__name__, progress)


def capture_for_planning(
    model: nn.Module, example_inputs: ExampleInputs, cluster: Cluster, precision: Precision, progress: Progress | None = None
) -> Captured:
    """Capture a model that is planned for a cluster. Raises as `plan` does; what is known without the graph is refused before."""
    refuse_tensors(model)
    _check_dtypes(model, cluster, precision)
    if progress is not None:
        progress("capture")
    return capture(model, example_inputs, precision=precision)


def plan_captured(
    captured: Captured, request: Request, cluster: Cluster, precision: Precision, model_name: str, progress: Progress | None = None
) -> Plan:
    """The plan that `request` asks for, of a model that was captured with `precision`. Raises as `plan` does.

    One capture serves any number of requests that differ in the cluster, the memory, the pins or the mesh.
    """
    pins, mesh = reconcile(request.pins, request.mesh_sizes)
    check_devices(pins, mesh, cluster)
    made = make_plan(
        captured.graph,
        cluster,
        model_name=model_name,
        precision=precision,
        pins=pins,
        mesh=mesh,
        strict=request.strict,
        notes=captured.notes,
        progress=progress,
    )
    return replace(made, request=replace(request, machine=cluster.machine.digest).in_print())


def _read_cluster(cluster: Cluster | str) -> Cluster:
    """The cluster that an argument names. Raises HardwareError."""
    return cluster if isinstance(cluster, Cluster) else Cluster.parse(cluster)


def _check_dtypes(model: nn.Module, cluster: Cluster, precision: Precision) -> None:
    """Raise HardwareError when the machine can't compute in any dtype in which the model's floating-point parameters are read."""
    stored = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters() if parameter.dtype.is_floating_point}
    dtypes = set(map(precision.computed_dtype, stored))
    if dtypes and not any(dtype in cluster.machine.device.peak_flops for dtype in dtypes):
        peak_flops(cluster.machine.device, min(dtypes))


def verify(
    model: nn.Module,
    example_inputs: ExampleInputs,
    plan: Plan | None = None,
    *,
    cluster: Cluster | str | None = None,
    pins: Mapping[str, object] | Pins | None = None,
    ranks: int | None = None,
    precision: PrecisionLike = None,
    tolerance: float = 1e-9,
) -> Verification:
    """Run all ranks of a plan in one process, and compare outputs, every gradient and updated buffers with the model.

    Args:
        model: a model with real parameters and without randomness (dropout 0, or in evaluation mode).
        example_inputs: one global batch, with values.
        plan: the plan to check; without one, a plan is made for `cluster`, or for `ranks` CPU processes.
        cluster: the cluster to plan for when no plan is given.
        pins: as in `autopar.plan`, when no plan is given.
        precision: likewise.
        ranks: number of CPU processes to plan for when neither a plan nor a cluster is given; 4 by default.
        tolerance: the relative error that is accepted in float64.

    Raises InputError for arguments that contradict each other and for a model on the meta device, PlanError for a plan of another model or
    number of ranks, CaptureError for a model that can't be one graph; without a plan also what `plan` raises. A disagreement isn't raised:
    `Verification.check` does that.
    """
    if plan is not None and (pins or cluster is not None or precision is not None):
        raise InputError("a plan says what to check; leave out pins, precision and cluster, or the plan")
    if not tolerance >= 0 or (ranks is not None and ranks < 1):
        raise InputError(f"tolerance={tolerance}, ranks={ranks}: a number from 0 and an integer from 1 are needed")
    if plan is not None and ranks is not None and plan.world_size != ranks:
        raise PlanError(
            f"the plan is for {plan.world_size} ranks ({with_pipeline(plan.mesh, plan.pipeline.ranks)}), {ranks} were asked for"
        )
    if plan is None:
        plan = _plan(model, example_inputs, cluster if cluster is not None else f"{ranks or 4}xcpu", pins, precision)
    return verify_plan(model, example_inputs, plan, tolerance=tolerance)


def _plan(
    model: nn.Module,
    example_inputs: ExampleInputs,
    cluster: Cluster | str,
    pins: Mapping[str, object] | Pins | None,
    precision: PrecisionLike,
) -> Plan:
    """`plan`, for a function that has an argument of that name."""
    return globals()["plan"](model, example_inputs, cluster, pins=pins, precision=precision)  # type: ignore[no-any-return]


def detect_cluster(device_type: str | None = None) -> Cluster:
    """The cluster of this process group: as many devices as there are ranks, of this machine's kind and memory.

    Raises InputError for a GPU without a machine profile.
    """
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    ranks = world.join_world(device_type)
    ranks_per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if device_type == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks_per_machine
        return Cluster.parse(f"{ranks}xcpu").with_memory(memory)
    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties().total_memory
    a100 = "a100-80gb" if memory > 60e9 else "a100-40gb"
    for machine, mark in (("h200", "H200"), ("h100", "H100"), (a100, "A100"), ("v100", "V100")):
        if mark in name:
            shape = f"{ranks // ranks_per_machine}x{ranks_per_machine}x{machine}" if ranks_per_machine < ranks else f"{ranks}x{machine}"
            return Cluster.parse(shape).with_memory(memory)
    raise InputError(f"no machine profile is known for {name!r}; give `cluster=` a known machine or the path of a profile")


def compile(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    cluster: Cluster | str | None = None,
    plan: Plan | None = None,
    precision: PrecisionLike = None,
    pins: Mapping[str, object] | Pins | None = None,
    mesh: Mapping[str, int] | None = None,
    strict: bool = False,
    inputs: Literal["global", "local"] = "global",
    outputs: Literal["plain", "sharded"] = "plain",
    init: Init | None = None,
    device: torch.device | str | None = None,
    fuse: bool | None = None,
    progress: Progress | None = None,
) -> CompiledModule:
    """Make a model run in parallel over the ranks of this process group; the training loop stays as it is.

    Every rank passes the same global batch and gets the loss, and the outputs, that one device would. Without `example_inputs` the first
    call makes the plan.
    Make optimizers after this call, from the returned module's parameters::

        model = autopar.compile(model, {"x": x, "labels": labels})
        optimizer = torch.optim.AdamW(model.parameters())

    Args:
        model: the user's model; its parameters become DTensors.
        example_inputs: a call to plan for at once, instead of at the first call.
        cluster: the devices; by default those of this process group.
        plan: a plan that was made before, instead of a search.
        precision: as in `autopar.plan`; a given plan says its own.
        pins: as in `autopar.plan`.
        mesh: as in `autopar.plan`.
        strict: as in `autopar.plan`.
        inputs: ``local`` when every rank passes its own part of the batch (see `CompiledModule.data_shard`) and gets the outputs of that;
            needs `example_inputs`.
        outputs: ``sharded`` for DTensors where a rank has a part of an output only; by default outputs are plain tensors.
        init: from name and meta tensor to the value of a parameter or buffer on the meta device.
        device: where these are stored.
        fuse: whether the operators between collectives go through torch's compiler (``torch.compile``), each distinct layer once, when they
            first run. Results are the same to rounding. By default on a GPU only.
        progress: called with a few words on what is being done, and on rank 0 with a line on what was chosen; without it, that line is
            shown once, by the logger ``autopar`` at INFO where logging is set up, else on standard error
            (``logging.getLogger("autopar").setLevel(logging.WARNING)`` leaves it out).

    Raises InputError for arguments that can't be used or contradict each other, or the number of ranks, and for ``fuse=True`` where torch
    can't compile; PlanError for a plan of another number of ranks. The other errors of `autopar.plan` are raised when planning: here with
    `example_inputs`, else by the first call.
    """
    if inputs not in ("global", "local"):
        raise InputError(f'inputs={inputs!r}: "global" or "local" is needed')
    if outputs not in ("plain", "sharded"):
        raise InputError(f'outputs={outputs!r}: "plain" or "sharded" is needed')
    if plan is not None and not isinstance(plan, Plan):
        raise InputError(f"plan={plan!r} is no plan; read a file with autopar.Plan.load(path)")
    if plan is not None and (pins or mesh or precision is not None):
        raise InputError("a plan has been decided on already; leave out pins, mesh and precision, or the plan")
    policy = Precision.parse(precision) if plan is None else plan.precision
    asked = Pins.parse(pins)
    pins, group_mesh = reconcile(asked, mesh)
    if inputs == "local" and example_inputs is None:
        raise InputError('inputs="local" needs example_inputs of the global batch: how it is split is known only with a plan')
    refuse_tensors(model)
    record = partial(record_request, pins=asked, mesh=mesh, strict=strict)
    planner = _Planner(cluster, plan, policy, pins, group_mesh, strict, progress, record)
    planner.marks_samples = inputs == "local"
    module = CompiledModule(model, planner, inputs=inputs, outputs=outputs, init=init, device=device)
    planner.module = module
    planner.check_world(_find_device(model))
    planner.fuses = decide_fusion(fuse, module.device_type)
    planner.fuse_is_required = fuse is True
    if policy.masters:
        expect_masters(model, policy)
    if example_inputs is not None:
        args, kwargs = split_call(example_inputs)
        module.prepare(*args, **kwargs)
    return module


class CompiledModule(ParallelModule):
    """The module that `compile` returns: a `ParallelModule` with its plan."""

    @property
    def plan(self) -> Plan:
        """The first plan, whose mesh and stored layouts later programs (other shapes, evaluation) use. Raises PlanError before it."""
        plan = self._planner.first_plan  # type: ignore[attr-defined]
        if plan is None:
            raise PlanError("there is no plan yet: compile with example inputs, or call the module once")
        assert isinstance(plan, Plan)
        return plan

    def print_program(self) -> str:
        """The code of the program that ran last on this rank. Raises PlanError before the first plan."""
        if self._last is None:
            raise PlanError("there is no program yet: compile with example inputs, or call the module once")
        module = self._last.module
        titled = [("", module)] if isinstance(module, torch.fx.GraphModule) else [(f"# {name}\n", x) for name, x in module.named_children()]
        # Torch prints graph modules that are right inside of another; those that are run in a way of their own follow.
        titled += [("", part.module) for part in module.modules() if isinstance(part, Fused | Recomputed)]
        return "\n".join(f"{title}{x.print_readable(print_output=False)}" for title, x in titled if isinstance(x, torch.fx.GraphModule))


def _find_device(model: nn.Module) -> torch.device | None:
    """Where the parameters are; None when all are on the meta device."""
    return next((parameter.device for parameter in model.parameters() if not parameter.is_meta), None)


def _capture_alike(model: nn.Module, example_inputs: ExampleInputs, precision: Precision) -> Captured:
    """`capture`; raises CaptureError on all ranks when one captures another graph than the first, and an error on all when one has one."""
    agreement, name = form_agreement(), type(model).__name__
    if agreement is None:
        return capture(model, example_inputs, precision=precision)
    with agreement.share_errors(f"has captured {name}"):
        captured = capture(model, example_inputs, precision=precision)
    texts = [f"{op.target} at {op.source or op.layer or op.name}" for op in captured.graph.ops]
    difference = agreement.find_difference(f"compares its graph of {name}", describe_ops(captured.graph), texts)
    if difference is not None:
        raise CaptureError(
            f"the ranks capture different graphs: rank {difference.rank} has {difference.other},"
            f" where the first rank has {difference.first}. The calls of forward must be the same on every rank and in one order:"
            " walk over a list or sorted(...), not over a set, and don't ask for the rank"
        )
    return captured


class _Planner:
    """Makes the programs of one compiled module; the first plan decides how parameters are stored."""

    def __init__(
        self,
        cluster: Cluster | str | None,
        plan: Plan | None,
        precision: Precision,
        pins: Pins,
        mesh: Mesh | None,
        strict: bool,
        progress: Progress | None,
        record_request: Callable[[Cluster | str], Request],
    ) -> None:
        self.cluster = cluster
        self.given_plan = plan
        self.precision = precision
        self.pins = pins
        self.mesh = mesh
        self.strict = strict
        self.progress = progress
        self.first_plan: Plan | None = None
        self.module: CompiledModule | None = None
        self.record_request = record_request
        self.marks_samples = False
        self.fuses = self.fuse_is_required = False

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool) -> Program:
        assert self.module is not None
        # A model on the meta device has its place already, where the first plan will store it.
        device = _find_device(model) or self.module._device
        start = time.perf_counter()
        captured = _capture_alike(model, (args, kwargs), self.precision)
        capture_seconds = time.perf_counter() - start
        if self.first_plan is None and self.given_plan is not None:
            plan = self.given_plan
        else:
            cluster = self._cluster(device)
            _check_dtypes(model, cluster, self.precision)
            plan = world.agree(lambda: self._search(model, captured, cluster), device)
        if self.first_plan is None:
            self.first_plan = plan
            if world.rank() == 0:
                planned = (
                    "" if self.given_plan is not None else f", planned in {format_seconds(time.perf_counter() - start - capture_seconds)}"
                )
                started = " (started without torchrun)" if world.is_alone() else ""
                self._announce(f"{describe_choice(plan, started)}; captured in {format_seconds(capture_seconds)}{planned}")
        program = rewrite(captured, plan, device, world.rank() // plan.mesh.world_size)
        if self.fuses:
            program = fuse_program(program, captured.graph, required=self.fuse_is_required)
            if world.rank() == 0:
                parts = [part for part in program.module.modules() if isinstance(part, Fused)]
                for number, part in enumerate(parts, 1):
                    part.tell = partial(self._announce, f"compiling part {number} of {len(parts)}: {part.where}")
        return mark_samples(program, captured) if self.marks_samples else program

    def _search(self, model: nn.Module, captured: Captured, cluster: Cluster) -> Plan:
        """A plan for this graph; later plans have the first one's mesh, and read parameters as they are stored."""
        assert self.module is not None
        first = self.first_plan
        pins, mesh, stored = (self.pins, self.mesh, {}) if first is None else (self._kept_pins(first), first.mesh, self.module.layouts)
        if elsewhere := self.module.stored_elsewhere:
            stored = {name: parameter.layout for name, parameter in elsewhere.items()}
            pins, mesh = self._obey(elsewhere)

        search = partial(
            make_plan,
            captured.graph,
            cluster,
            model_name=type(model).__name__,
            precision=self.precision,
            mesh=mesh,
            stored=stored,
            first_plan=first,
            strict=self.strict,
            progress=self.progress,
        )
        try:
            made = search(pins=pins, notes=captured.notes)
        except (InputError, InfeasibleError) as error:
            if first is None or not pins:
                raise
            note = f"a later kind of call is planned without the pins {pins}: {error}"
            self._announce(note)
            made = search(notes=(*captured.notes, note))
        request = replace(self.record_request(self.cluster or cluster), machine=cluster.machine.digest)
        return replace(made, request=request.in_print())

    def _kept_pins(self, first: Plan) -> Pins:
        """The pins that later plans obey where they can: how a sequence is split. What else was pinned is in what is stored."""
        is_pinned = self.pins.cp is not None or (self.mesh is not None and "cp" in self.mesh.names)
        cp = _sizes_of(first.mesh).get("cp", 1) if is_pinned else None
        return replace(NO_PINS, cp=cp, attention=self.pins.attention, zigzag=self.pins.zigzag)

    def check_world(self, device: torch.device | None) -> None:
        """Raise PlanError or InputError, before anything is captured, when a plan, a cluster or pins don't fit the number of ranks."""
        if self.given_plan is not None:
            world.check_width(self.given_plan)
            return
        cluster = self._cluster(device)
        if cluster.world_size != (ranks := world.join_world(device.type if device is not None else "cpu")):
            raise InputError(
                f"the cluster {cluster} has {cluster.world_size} devices, but this job has {ranks} {'rank' if ranks == 1 else 'ranks'};"
                " leave out cluster, or start as many processes with torchrun"
            )
        try:
            check_devices(self.pins, self.mesh, cluster)
        except InputError as error:
            needed = (self.pins.pp or 1) * (math.prod(self.pins.axis_sizes.values()) if self.mesh is None else self.mesh.world_size)
            if needed == 1 or not world.is_alone():
                raise
            raise InputError(f"{error}; one process is running: start the script with torchrun --nproc-per-node {needed}") from None

    def _announce(self, line: str) -> None:
        """Show what was chosen: by the user's `progress`, by the logger ``autopar`` if logging is set up, else on standard error."""
        log = logging.getLogger("autopar")
        if self.progress is not None:
            self.progress(line)
        elif log.hasHandlers():
            log.info(line)
        elif log.level <= logging.INFO:
            print(f"autopar: {line}", file=sys.stderr, flush=True)

    def _cluster(self, device: torch.device | None) -> Cluster:
        if self.cluster is not None:
            return _read_cluster(self.cluster)
        return detect_cluster(device.type if device is not None else None)

    def _obey(self, stored: Mapping[str, StoredParameter]) -> tuple[Pins, Mesh]:
        """The pins and the mesh of a first plan, given how another compiled model stores the parameters that both share.

        Raises PlanError when this model's pins or mesh contradict that.
        """
        name, parameter = next(iter(stored.items()))
        sizes, of_kinds = _sizes_of(parameter.mesh), _sizes_of_kinds(parameter.mesh)
        # The pin zero_group makes two axes of one.
        of_mesh = _sizes_of(self.mesh) if self.pins.zero_group is None else _sizes_of_kinds(self.mesh)
        asked = {**self.pins.axis_sizes, **of_mesh}
        if any(size not in (sizes.get(axis, 1), of_kinds.get(axis)) for axis, size in asked.items()) or self.pins.pp not in (
            None,
            parameter.pipeline_ranks,
        ):
            raise PlanError(parameter.contradiction(name, f"this model's is pinned to {self.mesh or self.pins}"))
        if self.pins.zero_level is not None and "dp" in sizes:
            axes = [axis for axis, axis_name in enumerate(parameter.mesh.names) if kind_of(axis_name) is AxisKind.DP]
            if (self.pins.zero_level > 0) != any(
                shared.layout[axis].kind is StateKind.SHARD for shared in stored.values() for axis in axes
            ):
                raise PlanError(parameter.contradiction(name, f"this model is pinned to {self.pins}, which stores parameters otherwise"))
        # Axes that were asked for have their kinds, as in any first plan.
        pins = replace(self.pins, dp=asked.get("dp"), cp=asked.get("cp"), tp=asked.get("tp"))
        return replace(pins, pp=parameter.pipeline_ranks) if parameter.pipeline_ranks > 1 else pins, parameter.mesh


def _sizes_of(mesh: Mesh | None) -> dict[str, int]:
    return {} if mesh is None else dict(zip(mesh.names, mesh.sizes, strict=True))


def _sizes_of_kinds(mesh: Mesh | None) -> dict[str, int]:
    """Ranks of the axes of each kind together: dp=2 x dp2=4 are dp=8."""
    sizes: dict[str, int] = {}
    for name, size in _sizes_of(mesh).items():
        kind = kind_of(name)
        key = name if kind is AxisKind.FREE else kind.value
        sizes[key] = sizes.get(key, 1) * size
    return sizes
