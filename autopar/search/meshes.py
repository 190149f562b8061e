"""Which meshes the search looks at, and what is asked of each: the user's pins, free meshes, and the named baselines.

Baselines are layouts that people use today, each stated as constraints on the same problem: plain DDP, FSDP (ZeRO-3), Megatron-LM's
tensor parallelism (Shoeybi et al. 2019, section 3) and Redco's two rules (algorithms after Redco's paper: fully-connected layers alternate
between splitting their outputs and their inputs; attention splits q, k, v by outputs and o by inputs), the latter found over
dataflow instead of over names. Because they are candidates like any other, the search can't return a plan that it holds worse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from autopar.cost_models import Cluster
from autopar.errors import InputError
from autopar.ir import MICRO, PIPELINE, Family, Layout, Mesh, Op, OpKind, Placement, Split
from autopar.search.options import AxisKind, Constraints, is_inside
from autopar.structure import Model, Role, role_of

PIN_NAMES = ("dp", "tp", "cp", "pp", "fsdp", "vocabulary", "schedule", "microbatches", "chunks", "recompute")
"""Pins of this version, those of pipelines are read by `autopar.search.pins`; any other key is a glob of module paths with a placement
(``{"layers.*.mlp": {"tp": "o"}}``)."""

LATER_PINS = ("ep", "offload", "attention")


@dataclass(frozen=True, slots=True)
class Trial:
    """A mesh with constraints, by name; `baseline` marks the layouts that people use today."""

    name: str
    mesh: Mesh
    constraints: Constraints
    baseline: bool = False


def find_trials(
    model: Model,
    cluster: Cluster,
    pins: Mapping[str, object],
    axes: Mapping[str, int] | None,
    stored: Mapping[str, Layout],
    groups: int = 1,
) -> list[Trial]:
    """Everything that the search tries on each of so many groups of ranks. Raises InputError on pins that can't be had."""
    check_pins(pins)
    who = f"the cluster {cluster}" if groups == 1 else f"each of the {groups} groups of {cluster}"
    cluster = cluster.part(groups)
    world = cluster.world_size
    modules = {name: value for name, value in pins.items() if isinstance(value, Mapping)}
    fsdp, vocabulary = pins.get("fsdp"), pins.get("vocabulary")
    sizes = {name: int(pins[name]) for name in ("dp", "cp", "tp") if name in pins}  # type: ignore[call-overload]
    if axes is not None:
        if wrong := {name: size for name, size in axes.items() if type(size) is not int or size < 1}:
            raise InputError(f"mesh axes {wrong}: sizes are integers from 1")
        if other := {name: size for name, size in sizes.items() if size != axes.get(name, 1)}:
            asked = ", ".join(f"{name}={size}" for name, size in other.items())
            raise InputError(f"the mesh {dict(axes)} and the pins {asked} contradict each other; leave out one of them")
        if MICRO in axes:
            raise InputError(f"mesh axis {MICRO!r}: the name is taken, by micro-batches; call the axis something else")
        meshes = [Mesh(tuple(axes), tuple(axes.values()))]
        if meshes[0].world_size != world:
            raise InputError(f"mesh {meshes[0]} has {meshes[0].world_size} ranks, {who} has {world}")
    elif sizes:
        meshes = _pinned_meshes(sizes, world, who)
    else:
        meshes = _free_meshes(world)
    # A kind of one rank is none at all; what ranks are left over do is another.
    barred = frozenset(AxisKind(name) for name, size in sizes.items() if size == 1 and not stored)
    trials = []
    for mesh in meshes:
        # A later program over parameters that are stored already only keeps the mesh: a last, smaller batch must run too.
        named = () if stored else ("dp", "tp", "cp")
        kinds = tuple(AxisKind(name) if name in named else AxisKind.FREE for name in mesh.names)
        if isinstance(fsdp, bool) and AxisKind.DP not in kinds:
            kinds = _with_batch_axis(kinds, mesh, fsdp, barred)
        for axis, kind in enumerate(kinds):
            if kind is AxisKind.DP and mesh.names[axis] in {**sizes, **(axes or {})}:
                _check_batch(model, mesh.sizes[axis])
        constraints = Constraints(kinds, _flag(fsdp), _flag(vocabulary), _check_modules(model, modules, mesh), stored, barred=barred)
        trials.append(Trial("search", mesh, constraints))
    if not pins and axes is None and not stored:
        trials += _baselines(model, cluster)
    return trials


def group_trials(
    model: Model, cluster: Cluster, groups: int, pins: Mapping[str, object], axes: Mapping[str, int] | None, stored: Mapping[str, Layout]
) -> list[Trial]:
    """What each of so many groups of ranks may do: as pinned, else a batch axis and, inside a machine, a tensor axis of every size."""
    if axes is not None or stored or any(name in pins for name in ("dp", "tp", "cp")):
        try:
            return [trial for trial in find_trials(model, cluster, pins, axes, stored, groups) if not trial.baseline]
        except InputError:
            if axes is not None or stored:
                raise
            return []  # the pinned axes don't divide this group
    part = cluster.part(groups)
    world = part.world_size
    trials = []
    for tensor in range(1, part.devices_per_node + 1):
        if world % tensor or part.devices_per_node % tensor:
            continue
        sizes = {"dp": world // tensor, "tp": tensor}
        names = [name for name, size in sizes.items() if size > 1] or ["dp"]
        if pins.get("fsdp") and sizes["dp"] == 1 < cluster.world_size:
            continue  # nothing to store parameters split over
        mesh = Mesh(tuple(names), tuple(sizes[name] for name in names))
        modules = {name: value for name, value in pins.items() if isinstance(value, Mapping)}
        if any(set(loops) - set(names) for loops in modules.values()):
            continue
        kinds = tuple(AxisKind(name) for name in names)
        constraints = Constraints(
            kinds, _flag(pins.get("fsdp")), _flag(pins.get("vocabulary")), _check_modules(model, modules, mesh), stored
        )
        trials.append(Trial("pipeline", mesh, constraints))
    return trials


def check_pins(pins: Mapping[str, object]) -> None:
    """Raise InputError for pins that are unknown, of later versions, or of the wrong type."""
    for name, value in pins.items():
        if name in LATER_PINS:
            raise InputError(f"pin {name!r} is not supported yet; this version pins {', '.join(PIN_NAMES)} and modules")
        if name in ("dp", "tp", "cp"):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"pin {name}={value!r}: the size of an axis is needed, an integer from 1")
        elif name in ("pp", "schedule", "microbatches", "chunks", "recompute"):
            continue  # read with the pipeline
        elif name in ("fsdp", "vocabulary"):
            if not isinstance(value, bool):
                raise InputError(f"pin {name}={value!r}: true or false is needed")
        elif not isinstance(value, Mapping):
            raise InputError(f"unknown pin {name!r}; known are {', '.join(PIN_NAMES)} and globs of module paths")
        elif wrong := [axis for axis, loop in value.items() if axis != PIPELINE and not isinstance(loop, str)]:
            raise InputError(f"pin {name!r}: {wrong[0]}={value[wrong[0]]!r} is no loop; write the name of a loop of its ops, such as 'o'")


def _with_batch_axis(kinds: tuple[AxisKind, ...], mesh: Mesh, fsdp: bool, barred: frozenset[AxisKind]) -> tuple[AxisKind, ...]:
    """Make the outermost free axis a batch axis: parameter storage is split over those."""
    if AxisKind.DP in barred:
        if fsdp:
            raise InputError("pin fsdp=True stores parameters split over a dp axis, but dp is pinned to 1; pin more, or leave fsdp out")
        return kinds
    if AxisKind.FREE in kinds:
        axis = kinds.index(AxisKind.FREE)
        return (*kinds[:axis], AxisKind.DP, *kinds[axis + 1 :])
    if fsdp:
        raise InputError(
            f"pin fsdp=True stores parameters split over a dp axis, but all axes of the mesh {mesh} are pinned to other kinds; "
            "pin a smaller tp or cp, or leave fsdp out"
        )
    return kinds


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _check_modules(model: Model, modules: Mapping[str, Mapping[str, str]], mesh: Mesh) -> Mapping[str, Mapping[str, str]]:
    work = [op for op in model.folded.graph.of_kind(OpKind.CALL) if op.name in model.spaces and model.spaces[op.name].is_contraction]
    for pattern, wanted in modules.items():
        loops = {loop for op in work if is_inside(op.layer, pattern) for loop in model.spaces[op.name].loops}
        if not loops:
            paths = sorted({op.layer for op in work if op.layer})
            known = ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "") if paths else "no modules but the model itself ('*')"
            raise InputError(f"pin {pattern!r} matches no module that holds work; there are {known}")
        for op in work:
            first = model.folded.graph.by_name[model.folded.representative[op.name]]
            if is_inside(op.layer, pattern) != is_inside(first.layer, pattern):
                raise InputError(
                    f"pin {pattern!r} takes one of {first.layer!r} and {op.layer!r}, which are alike and planned as one; "
                    "pin all of such layers, with * for their numbers"
                )
        if absent := sorted(set(wanted.values()) - loops):
            raise InputError(f"pin {pattern!r} splits loop {', '.join(absent)}; the ops of its modules have {', '.join(sorted(loops))}")
        for name in wanted:
            if name not in mesh.names:
                raise InputError(f"pin {pattern!r} names axis {name!r}, the mesh has {', '.join(mesh.names)}")
    return modules


def _check_batch(model: Model, size: int) -> None:
    graph = model.folded.graph
    inputs = [op for op in graph.of_kind(OpKind.INPUT) if op.results[0].shape]
    if inputs and not any(op.results[0].shape[0] % size == 0 for op in inputs):
        op = inputs[0]
        raise InputError(
            f"input {op.target!r} has {op.results[0].shape[0]} rows in dim 0 (the batch), which an axis of {size} (dp={size}) "
            f"doesn't divide; use a batch that is a multiple of {size}, or a smaller dp"
        )


def _pinned_meshes(sizes: Mapping[str, int], world: int, who: str) -> list[Mesh]:
    named = 1
    for size in sizes.values():
        named *= size
    if world % named:
        asked = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise InputError(f"pins {asked} need a multiple of {named} ranks, {who} has {world}")
    rest = world // named
    pinned = [(name, size) for name, size in sizes.items() if size > 1]
    if rest > 1:
        if "dp" not in sizes:
            pinned.insert(0, ("free", rest))
        else:
            pinned.append(("free", rest))
    if not pinned:
        pinned = [("free", world)]
    return [Mesh(tuple(name for name, _ in pinned), tuple(size for _, size in pinned))]


def _free_meshes(world: int) -> list[Mesh]:
    """One and two free axes of every size; more axes are for pins, or for what later searches compose."""
    meshes = [Mesh(("x",), (world,))]
    for inner in range(2, world // 2 + 1):
        if world % inner == 0:
            meshes.append(Mesh(("x", "y"), (world // inner, inner)))
    return meshes


def _baselines(model: Model, cluster: Cluster) -> list[Trial]:
    world = cluster.world_size
    if world == 1:
        return []
    data = Mesh(("dp",), (world,))
    trials = [
        Trial("DDP", data, Constraints((AxisKind.DP,), fsdp=False), baseline=True),
        Trial("FSDP", data, Constraints((AxisKind.DP,), fsdp=True), baseline=True),
    ]
    width = cluster.devices_per_node if world % cluster.devices_per_node == 0 else world
    both = Mesh(("tp",), (world,)) if width == world else Mesh(("dp", "tp"), (world // width, width))
    kinds = tuple(AxisKind(name) for name in both.names)
    if width > 1:
        for name, accept in (("Megatron", _megatron(model, len(kinds) - 1)), ("Redco", _redco(model, len(kinds) - 1))):
            trials.append(Trial(name, both, Constraints(kinds, fsdp=False, accept=accept), baseline=True))
    return trials


def _megatron(model: Model, axis: int) -> Callable[[Op, Placement], bool]:
    """Work split by features, everything between the blocks whole on every rank of the tensor axis."""

    def accept(op: Op, placement: Placement) -> bool:
        part = placement[axis]
        return not isinstance(part, Split) or role_of(model.factors.of_loops[op.name], part) is Role.FEATURE

    return accept


def _redco(model: Model, axis: int) -> Callable[[Op, Placement], bool]:
    """Linears alternate along dataflow: outputs split, then inputs split; what a lookup finds is split by features."""
    graph = model.folded.graph
    splits_outputs: dict[str, bool] = {}
    upstream: dict[str, str | None] = {}  # nearest linear before each op, the latest in program order
    order = {op.name: position for position, op in enumerate(graph.ops)}
    for op in graph.ops:
        before = [upstream[value.op] for value in op.operands if upstream.get(value.op)]
        nearest = max((name for name in before if name), key=order.__getitem__, default=None)
        if _is_linear(model, op):
            splits_outputs[op.name] = nearest is None or not splits_outputs[nearest]
            upstream[op.name] = op.name
        else:
            upstream[op.name] = nearest

    def accept(op: Op, placement: Placement) -> bool:
        part = placement[axis]
        if op.name not in splits_outputs:
            return not isinstance(part, Split) or role_of(model.factors.of_loops[op.name], part) is Role.FEATURE
        if not isinstance(part, Split):
            return False
        in_results = model.spaces[op.name].find(model.spaces[op.name].results[0], part.loop) is not None
        return in_results == splits_outputs[op.name]

    return accept


def _is_linear(model: Model, op: Op) -> bool:
    space = model.spaces.get(op.name)
    graph = model.folded.graph
    reads = any(graph.by_name[value.op].kind is OpKind.PARAMETER for value in op.operands)
    return space is not None and space.family is Family.MATMUL and space.kernel is None and reads
