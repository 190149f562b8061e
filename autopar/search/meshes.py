"""Which meshes the search looks at, and what is asked of each: the user's pins, free meshes, and the named baselines.

Baselines are layouts that people use today, each stated as constraints on the same problem: plain DDP, FSDP (ZeRO-3), Megatron-LM's
tensor parallelism (Shoeybi et al. 2019, section 3) and Redco's two rules (algorithms after Redco's paper: fully-connected layers alternate
between splitting their outputs and their inputs; attention splits q, k, v by outputs and o by inputs), the latter found over
dataflow instead of over names. Because they are candidates like any other, the search can't return a plan that it holds worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from autopar.cost_models import Cluster
from autopar.errors import InputError
from autopar.ir import Family, Layout, Mesh, Op, OpKind, Placement, Split
from autopar.plans import Pins
from autopar.search.options import AxisKind, Constraints, is_inside
from autopar.structure import Model, Role, role_of


@dataclass(frozen=True, slots=True)
class Trial:
    """A mesh with constraints, by name; `baseline` marks the layouts that people use today."""

    name: str
    mesh: Mesh
    constraints: Constraints
    baseline: bool = False


def find_trials(
    model: Model, cluster: Cluster, pins: Pins, mesh: Mesh | None, stored: Mapping[str, Layout], groups: int = 1
) -> list[Trial]:
    """Everything that the search tries on each of so many groups of ranks.

    Args:
        model: the model to place.
        cluster: all ranks, those of every group.
        pins: what every trial obeys.
        mesh: of a group of ranks, the only one to try; None leaves it to the search.
        stored: layouts that parameters already have and keep, by name.
        groups: of ranks, in a pipeline.

    Raises InputError on pins that can't be had.
    """
    who = f"the cluster {cluster}" if groups == 1 else f"each of the {groups} groups of {cluster}"
    cluster = cluster.part(groups)
    world = cluster.world_size
    if mesh is not None:
        meshes = [mesh]
        if mesh.world_size != world:
            raise InputError(f"mesh {mesh} has {mesh.world_size} ranks, {who} has {world}")
    elif pins.axis_sizes:
        meshes = [_pinned_mesh(pins.axis_sizes, world, who)]
    else:
        meshes = _free_meshes(world)
    asked = {*pins.axis_sizes, *(mesh.names if mesh is not None else ())}
    trials = []
    for each in meshes:
        constraints = _constrain(model, each, pins, stored)
        for name, size, kind in zip(each.names, each.sizes, constraints.kinds, strict=True):
            if kind is AxisKind.DP and name in asked:
                _check_batch(model, size)
        trials.append(Trial("search", each, constraints))
    if not pins and mesh is None and not stored:
        trials += _baselines(model, cluster)
    return trials


def group_trials(model: Model, cluster: Cluster, groups: int, pins: Pins, mesh: Mesh | None, stored: Mapping[str, Layout]) -> list[Trial]:
    """What each of so many groups of ranks may do: as pinned, else a batch axis and, inside a machine, a tensor axis of every size."""
    if mesh is not None or stored or pins.axis_sizes:
        try:
            return [trial for trial in find_trials(model, cluster, pins, mesh, stored, groups) if not trial.baseline]
        except InputError:
            if mesh is not None or stored:
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
        if pins.fsdp and sizes["dp"] == 1 < cluster.world_size:
            continue  # nothing to store parameters split over
        if any(set(loops) - set(names) for loops in pins.placements.values()):
            continue
        shape = Mesh(tuple(names), tuple(sizes[name] for name in names))
        _check_placements(model, pins, shape)
        trials.append(Trial("pipeline", shape, Constraints(tuple(AxisKind(name) for name in names), pins, stored)))
    return trials


def _constrain(model: Model, mesh: Mesh, pins: Pins, stored: Mapping[str, Layout]) -> Constraints:
    """What is asked of a mesh whose axes are called by their kinds, or otherwise are free. Raises InputError on pins that can't be had."""
    # A later program over parameters that are stored already only keeps the mesh: a last, smaller batch must run too.
    named = () if stored else ("dp", "tp", "cp")
    constraints = Constraints(tuple(AxisKind(name) if name in named else AxisKind.FREE for name in mesh.names), pins, stored)
    if pins.fsdp is not None and AxisKind.DP not in constraints.kinds:
        constraints = replace(constraints, kinds=_with_batch_axis(constraints, mesh))
    _check_placements(model, pins, mesh)
    return constraints


def _with_batch_axis(constraints: Constraints, mesh: Mesh) -> tuple[AxisKind, ...]:
    """Make the outermost free axis a batch axis: parameter storage is split over those."""
    kinds = constraints.kinds
    if AxisKind.DP in constraints.barred:
        return kinds
    if AxisKind.FREE in kinds:
        axis = kinds.index(AxisKind.FREE)
        return (*kinds[:axis], AxisKind.DP, *kinds[axis + 1 :])
    if constraints.pins.fsdp:
        raise InputError(
            f"pin fsdp=True stores parameters split over a dp axis, but all axes of the mesh {mesh} are pinned to other kinds; "
            "pin a smaller tp or cp, or leave fsdp out"
        )
    return kinds


def _check_placements(model: Model, pins: Pins, mesh: Mesh) -> None:
    """Raise InputError for pinned placements that name no module with work, no loop of its ops or no axis of the mesh."""
    work = [op for op in model.folded.graph.of_kind(OpKind.CALL) if op.name in model.spaces and model.spaces[op.name].is_contraction]
    for pattern, pinned in pins.placements.items():
        loops = {loop for op in work if is_inside(op.layer, pattern) for loop in model.spaces[op.name].loops}
        if not loops:
            paths = sorted({op.layer for op in work if op.layer})
            known = ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "") if paths else "no modules but the model itself ('*')"
            raise InputError(f"pin {pattern!r} matches no module that holds work; there are {known}")
        for op in work:
            representative = model.folded.graph.by_name[model.folded.representative[op.name]]
            if is_inside(op.layer, pattern) != is_inside(representative.layer, pattern):
                raise InputError(
                    f"pin {pattern!r} takes one of {representative.layer!r} and {op.layer!r}, which are alike and planned as one; "
                    "pin all of such layers, with * for their numbers"
                )
        if absent := sorted(set(pinned.values()) - loops):
            raise InputError(f"pin {pattern!r} splits loop {', '.join(absent)}; the ops of its modules have {', '.join(sorted(loops))}")
        for name in pinned:
            if name not in mesh.names:
                raise InputError(f"pin {pattern!r} names axis {name!r}, the mesh has {', '.join(mesh.names)}")


def _check_batch(model: Model, size: int) -> None:
    graph = model.folded.graph
    inputs = [op for op in graph.of_kind(OpKind.INPUT) if op.results[0].shape]
    if inputs and not any(op.results[0].shape[0] % size == 0 for op in inputs):
        op = inputs[0]
        raise InputError(
            f"input {op.target!r} has {op.results[0].shape[0]} rows in dim 0 (the batch), which an axis of {size} (dp={size}) "
            f"doesn't divide; use a batch that is a multiple of {size}, or a smaller dp"
        )


def _pinned_mesh(sizes: Mapping[str, int], world: int, who: str) -> Mesh:
    """The pinned axes that have more than one rank, and a free one for the ranks that are left over."""
    named = math.prod(sizes.values())
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
    return Mesh(tuple(name for name, _ in pinned), tuple(size for _, size in pinned))


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
        Trial("DDP", data, Constraints((AxisKind.DP,), Pins(fsdp=False)), baseline=True),
        Trial("FSDP", data, Constraints((AxisKind.DP,), Pins(fsdp=True)), baseline=True),
    ]
    width = cluster.devices_per_node if world % cluster.devices_per_node == 0 else world
    both = Mesh(("tp",), (world,)) if width == world else Mesh(("dp", "tp"), (world // width, width))
    kinds = tuple(AxisKind(name) for name in both.names)
    if width > 1:
        for name, accept in (("Megatron", _megatron(model, len(kinds) - 1)), ("Redco", _redco(model, len(kinds) - 1))):
            trials.append(Trial(name, both, Constraints(kinds, Pins(fsdp=False), accept=accept), baseline=True))
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
