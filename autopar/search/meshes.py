"""Which meshes the search tries, and under which constraints: the pinned mesh, or free meshes and the named baselines.

Comes in: an `AnalyzedGraph`, a cluster, pins, layouts of parameters that are stored already. Goes out: `Trial`s.

Baselines are parallelisms in use today, each stated as constraints on the same problem:

- DDP: the batch is split, parameters are whole;
- FSDP (ZeRO-3, Rajbhandari et al. 2020): the batch is split, and parameters are stored split;
- Megatron-LM's tensor parallelism (Shoeybi et al. 2019, section 3): contractions are split by features;
- Redco's two rules: linear layers alternate between splitting their outputs and their inputs; attention splits q, k and v by outputs and o
  by inputs. Redco finds these layers by name, here they are found over dataflow.

Since they are candidates like any other, the search can't return a plan that it believes to be slower than one of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from autopar.cost_models import Cluster
from autopar.errors import InputError
from autopar.ir import Family, Layout, Mesh, Op, OpKind, Placement, Split
from autopar.plans import Pins, check_devices
from autopar.search.options import AxisKind, Constraints, is_inside, kind_of
from autopar.structure import AnalyzedGraph, Role, batch_size, grouped_heads, role_of

_FREE_NAMES = ("x", "y")
"""Names of free axes, which ask for no kind."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A mesh to try, with constraints.

    Attributes:
        name: ``search``, ``pipeline``, or that of a baseline.
        mesh: the devices of one pipeline rank; of all devices without a pipeline.
        constraints: what decisions on it must obey.
        baseline: whether this is one of the baselines.
        freed: whether axes are free in the place of axes of kinds, and so all get their names from what they do.
    """

    name: str
    mesh: Mesh
    constraints: Constraints
    baseline: bool = False
    freed: bool = False

    @property
    def free_mesh(self) -> Mesh | None:
        """The mesh as a user would ask for its free axes, which the names that axes get later wouldn't; None where none is free."""
        return self.mesh if any(kind_of(name) is AxisKind.FREE for name in self.mesh.names) else None


def find_trials(
    model: AnalyzedGraph, cluster: Cluster, pins: Pins, mesh: Mesh | None, stored: Mapping[str, Layout], pipeline_ranks: int = 1
) -> list[Trial]:
    """The meshes to try for each pipeline rank; for the whole cluster without a pipeline.

    Args:
        model: the model to place.
        cluster: all devices.
        pins: what every trial obeys.
        mesh: the only mesh of a pipeline rank to try; None leaves it to the search.
        stored: layouts in which parameters are stored already, by name.
        pipeline_ranks: number of pipeline ranks that the devices are spread over.

    Raises InputError on pins that can't be had.
    """
    check_devices(pins, mesh, cluster, pipeline_ranks)
    cluster = cluster.part(pipeline_ranks)
    world = cluster.world_size
    if mesh is not None:
        meshes = [mesh]
    elif pins.axis_sizes:
        meshes = [_pinned_mesh(pins.axis_sizes, world)]
        if any(kind_of(name) is AxisKind.FREE and size > 1 for name, size in zip(meshes[0].names, meshes[0].sizes, strict=True)):
            # Where memory is short, a search that knows what the ranks left over split comes closer.
            kinds = (kind_mesh for kind_mesh in _kind_meshes(model, cluster, cluster, pins) if _has_axes(kind_mesh, pins.axis_sizes))
            meshes += [kind_mesh for kind_mesh in kinds if kind_mesh not in meshes]
    else:
        meshes = [
            *_free_meshes(world),
            *(kind_mesh for kind_mesh in _kind_meshes(model, cluster, cluster, pins) if "cp" in kind_mesh.names),
        ]
    requested = {*pins.axis_sizes, *(mesh.names if mesh is not None else ())}
    trials = []
    if mesh is None and not pins.placements:
        meshes += [factored for trial_mesh in meshes if (factored := _factor_heads(model, trial_mesh)) is not None]
    ungrouped: list[InputError] = []
    for trial_mesh in meshes:
        constraints = _constrain(model, trial_mesh, pins, stored)
        for name, size, kind in zip(trial_mesh.names, trial_mesh.sizes, constraints.kinds, strict=True):
            if kind is AxisKind.DP and name in requested:
                _check_batch(model, size)
        try:
            trials.append(_form_groups(Trial("search", trial_mesh, constraints)))
        except InputError as error:
            ungrouped.append(error)
    if not trials:
        raise ungrouped[0]
    if not pins and mesh is None and not stored:
        trials += _baselines(model, cluster)
    return trials


def find_pipeline_trials(
    model: AnalyzedGraph, cluster: Cluster, pipeline_ranks: int, pins: Pins, mesh: Mesh | None, stored: Mapping[str, Layout]
) -> list[Trial]:
    """The meshes to try for each of so many pipeline ranks: the pinned one, else dp x tp with tp of every size inside a machine.

    For long sequences, and for few, also dp x cp x tp.

    Raises InputError on a mesh or stored layouts that can't be had, and on pinned placements. Pinned axes that don't divide the devices of
    a pipeline rank have no trials.
    """
    if mesh is not None or stored or pins.axis_sizes:
        try:
            return [trial for trial in find_trials(model, cluster, pins, mesh, stored, pipeline_ranks) if not trial.baseline]
        except InputError:
            if mesh is not None or stored:
                raise
            return []  # the pinned axes don't divide the devices of a pipeline rank
    return find_kind_trials(model, cluster, cluster.part(pipeline_ranks), pins, "pipeline")


def find_kind_trials(model: AnalyzedGraph, cluster: Cluster, part: Cluster, pins: Pins, name: str) -> list[Trial]:
    """The meshes dp x tp of the devices `part`, with tp of every size inside a machine; for long sequences, and for few, dp x cp x tp.

    `name` is that of the trials. Raises InputError on pinned placements that can't be had.
    """
    trials = []
    for trial_mesh in _kind_meshes(model, cluster, part, pins):
        _check_placements(model, pins, trial_mesh)
        factored = _factor_heads(model, trial_mesh) if not pins.placements else None
        for pipeline_mesh in (trial_mesh, factored):
            if pipeline_mesh is not None:
                kinds = tuple(kind_of(name) for name in pipeline_mesh.names)
                trial = Trial(name, pipeline_mesh, Constraints(kinds, pins))
                with suppress(InputError):  # too few ranks for a group
                    trials.append(_form_groups(trial))
    return trials


def find_free_trials(cluster: Cluster, pins: Pins) -> list[Trial]:
    """The meshes of free axes that the search looks at without pins; none where these name axes."""
    return [_free(mesh, pins) for mesh in _free_meshes(cluster.world_size)] if can_free(pins) else []


def free_axes(trial: Trial) -> list[Trial]:
    """The trial with free axes of the same sizes: with all axes free, and of two also with each of them alone.

    Empty for more than two axes, for one of kind CP (free axes don't split zigzag), for one that is free already, and where `can_free` says
    no.
    """
    axes = [(name, size) for name, size in zip(trial.mesh.names, trial.mesh.sizes, strict=True) if size > 1]
    kinds, pins = trial.constraints.kinds, trial.constraints.pins
    if not can_free(pins) or not 1 <= len(axes) <= 2 or AxisKind.CP in kinds or AxisKind.FREE in kinds:
        return []
    sizes = tuple(size for _, size in axes)
    names = [_FREE_NAMES[: len(axes)]]
    if len(axes) == 2:
        names += [(_FREE_NAMES[0], axes[1][0]), (axes[0][0], _FREE_NAMES[0])]
    return [_free(Mesh(mesh_names, sizes), pins) for mesh_names in names]


def can_free(pins: Pins) -> bool:
    """Whether axes may be free under these pins: nothing asks for axes by their names, but for those of one rank."""
    names_axes = any(size not in (None, 1) for size in (pins.dp, pins.cp, pins.tp)) or pins.zero_level is not None
    return not names_axes and not pins.placements and pins.zero_group is None


def _free(mesh: Mesh, pins: Pins) -> Trial:
    """The trial of a mesh whose axes are free but for those called by a kind."""
    return Trial("search", mesh, Constraints(tuple(kind_of(name) for name in mesh.names), pins), freed=True)


def _form_groups(trial: Trial) -> Trial:
    """The trial with the ranks of its dp axes in groups, as the pin `zero_group` asks; the trial itself where nothing is pinned.

    A group is made of neighbours: of dp=8 with zero_group=4 come an outer axis of 2, along which every rank stores the same, and an inner
    one of 4. Raises InputError where the dp axes can't be divided so.
    """
    mesh, constraints, group = trial.mesh, trial.constraints, trial.constraints.pins.zero_group
    if group is None:
        return trial
    names, sizes, kinds = list(mesh.names), list(mesh.sizes), list(constraints.kinds)
    rest = group
    axes = [axis for axis, kind in enumerate(kinds) if kind is AxisKind.DP]
    while axes and rest > 1 and rest % sizes[axes[-1]] == 0:
        rest //= sizes[axes.pop()]
    if rest > 1:
        if not axes or sizes[axes[-1]] % rest:
            splitting = [sizes[axis] for axis, kind in enumerate(kinds) if kind is AxisKind.DP]
            ranks = math.prod(splitting)
            raise InputError(
                f"pin zero_group={group} can't form equal groups: {ranks} {'rank splits' if ranks == 1 else 'ranks split'} the batch;"
                f" zero_group must divide {ranks}" + (f", and be a group of neighbours on the mesh {mesh}" if len(splitting) > 1 else "")
            )
        outer = axes[-1]
        name = next(name for number in itertools.count(2) if (name := f"{names[outer]}{number}") not in names)
        names[outer + 1 : outer + 1], kinds[outer + 1 : outer + 1] = [name], [AxisKind.DP]
        sizes[outer : outer + 1] = [sizes[outer] // rest, rest]
    return replace(
        trial,
        mesh=Mesh(tuple(names), tuple(sizes)),
        constraints=replace(constraints, kinds=tuple(kinds), copies=frozenset(axes)),
    )


def _factor_heads(model: AnalyzedGraph, mesh: Mesh) -> Mesh | None:
    """The mesh with its tp axis in two, of which the outer splits the groups of heads of attention, the inner the queries of a group.

    This is what replicating heads of keys and values over a part of the ranks amounts to: with 2 of them and 8 queries, tp=8 becomes
    tp=2 x tp2=4. None where nothing is gained: every number of groups is a multiple of the axis, or has no divisor in common with it.
    """
    if "tp" not in mesh.names:
        return None
    axis = mesh.names.index("tp")
    ranks = mesh.sizes[axis]
    groups = {grouped_heads(model.spaces[op.name])[0] for op in model.folded.ops if op.name in model.spaces}
    outer = math.gcd(ranks, *(number for number in groups if number > 1))
    if outer in (1, ranks):
        return None
    names, sizes = mesh.names, mesh.sizes
    return Mesh((*names[: axis + 1], "tp2", *names[axis + 1 :]), (*sizes[:axis], outer, ranks // outer, *sizes[axis + 1 :]))


def _constrain(model: AnalyzedGraph, mesh: Mesh, pins: Pins, stored: Mapping[str, Layout]) -> Constraints:
    """The constraints of a mesh: axes called dp, tp or cp have that kind, others are free. Raises InputError on pins that can't be had.

    Over stored parameters only pinned axes have their kind, as the names of others say what an earlier program did: a last, smaller batch
    must run too.
    """
    kinds = tuple(kind_of(name) for name in mesh.names)
    if stored:
        kinds = tuple(kind if kind.value in pins.axis_sizes else AxisKind.FREE for kind in kinds)
    constraints = Constraints(kinds, pins, stored=stored)
    if pins.zero_level is not None and AxisKind.DP not in constraints.kinds:
        constraints = replace(constraints, kinds=_with_batch_axis(constraints, mesh))
    if pins.zero_group is not None:
        # What else split the batch would add to the ranks of a group.
        kinds = tuple(AxisKind.TP if kind is AxisKind.FREE else kind for kind in constraints.kinds)
        constraints = replace(constraints, kinds=kinds)
    _check_placements(model, pins, mesh)
    return constraints


def _with_batch_axis(constraints: Constraints, mesh: Mesh) -> tuple[AxisKind, ...]:
    """The kinds with the outermost free axis as a dp axis, over which parameters are stored split. Raises InputError if there is none."""
    kinds = constraints.kinds
    if AxisKind.DP in constraints.unused_kinds:
        return kinds
    if AxisKind.FREE in kinds:
        axis = kinds.index(AxisKind.FREE)
        return (*kinds[:axis], AxisKind.DP, *kinds[axis + 1 :])
    if constraints.pins.zero_level and AxisKind.CP not in kinds:
        raise InputError(
            f"{constraints.pins.word_zero()} over a dp or cp axis, but all axes of the mesh {mesh} are pinned to other kinds; "
            "pin a smaller tp, or leave it out"
        )
    return kinds


def _has_axes(mesh: Mesh, sizes: Mapping[str, int]) -> bool:
    """Whether a mesh has axes of these kinds and sizes; one of one rank is none."""
    own = dict(zip(mesh.names, mesh.sizes, strict=True))
    return all(own.get(kind, 1) == size for kind, size in sizes.items())


def _kind_meshes(model: AnalyzedGraph, cluster: Cluster, part: Cluster, pins: Pins) -> list[Mesh]:
    """The meshes dp x cp x tp of the devices `part` that have what pins need, with tp inside a machine, and cp only where it may help."""
    world = part.world_size
    meshes = []
    for tensor, context in itertools.product(range(1, part.devices_per_node + 1), _context_sizes(model, cluster, part)):
        if world % (tensor * context) or part.devices_per_node % tensor:
            continue
        sizes = {"dp": world // tensor // context, "cp": context, "tp": tensor}
        names = [name for name, size in sizes.items() if size > 1] or ["dp"]
        if pins.zero_level and not {"dp", "cp"} & set(names) and cluster.world_size > 1:
            continue  # nothing to store parameters split over
        if any(set(loops) - set(names) for loops in pins.placements.values()):
            continue
        meshes.append(Mesh(tuple(names), tuple(sizes[name] for name in names)))
    return meshes


LONG = 16384
"""From so many tokens on, the sequence is worth splitting though there are samples for all devices."""
SHORTEST = 1024
"""Tokens that a rank has at least of a sequence that the search splits unasked, so that there are few sizes to look at on any cluster."""


def _context_sizes(model: AnalyzedGraph, cluster: Cluster, part: Cluster) -> tuple[int, ...]:
    """Numbers of ranks that may split the sequence over the devices `part`: more than one for long, or for few, sequences."""
    sequences = [
        loop.size
        for op, space in model.spaces.items()
        for loop in space.loops.values()
        if loop.joins and op not in model.constants and Role.SEQUENCE in model.roles.of_loops[op][loop.name].values()
    ]
    batch, length = batch_size(model.folded.graph, model.roles), max(sequences, default=0)
    # Where features can be split inside a machine, so many samples are enough.
    if length < LONG and batch * cluster.devices_per_node >= cluster.world_size:
        return (1,)
    most = min(part.world_size, length // SHORTEST)
    return (1, *(size for size in range(2, most + 1) if part.world_size % size == 0))


def _check_placements(model: AnalyzedGraph, pins: Pins, mesh: Mesh) -> None:
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
                hint = f"; pin its size too, such as {name}=2" if name in ("dp", "tp", "cp") else ""
                raise InputError(f"pin {pattern!r} names axis {name!r}, the mesh has {', '.join(mesh.names)}{hint}")


def _check_batch(model: AnalyzedGraph, size: int) -> None:
    """Raise InputError if the batch, dim 0 of the inputs, can't be split over a dp axis of this size."""
    graph = model.folded.graph
    inputs = [op for op in graph.of_kind(OpKind.INPUT) if op.results[0].shape]
    if inputs and not any(op.results[0].shape[0] % size == 0 for op in inputs):
        op = inputs[0]
        raise InputError(
            f"input {op.target!r} has {op.results[0].shape[0]} rows in dim 0 (the batch), which an axis of {size} (dp={size}) "
            f"doesn't divide; use a batch that is a multiple of {size}, or a smaller dp"
        )


def _pinned_mesh(sizes: Mapping[str, int], world: int) -> Mesh:
    """The pinned axes of more than one rank, and a free axis for those of `world` ranks that these leave."""
    rest = world // math.prod(sizes.values())
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
    """All meshes of one and two free axes over so many ranks; meshes of more axes must be pinned."""
    meshes = [Mesh(_FREE_NAMES[:1], (world,))]
    for inner in range(2, world // 2 + 1):
        if world % inner == 0:
            meshes.append(Mesh(_FREE_NAMES, (world // inner, inner)))
    return meshes


def _baselines(model: AnalyzedGraph, cluster: Cluster) -> list[Trial]:
    """The baselines on all ranks of a cluster; none for a single rank."""
    world = cluster.world_size
    if world == 1:
        return []
    data = Mesh(("dp",), (world,))
    trials = [
        Trial("DDP", data, Constraints((AxisKind.DP,), Pins(fsdp=False)), baseline=True),
        Trial("FSDP", data, Constraints((AxisKind.DP,), Pins(fsdp=True)), baseline=True),
    ]
    tp_size = cluster.devices_per_node if world % cluster.devices_per_node == 0 else world
    mesh = Mesh(("tp",), (world,)) if tp_size == world else Mesh(("dp", "tp"), (world // tp_size, tp_size))
    kinds = tuple(AxisKind(name) for name in mesh.names)
    if tp_size > 1:
        for name, accept in (("Megatron", _megatron(model, len(kinds) - 1)), ("Redco", _redco(model, len(kinds) - 1))):
            trials.append(Trial(name, mesh, Constraints(kinds, Pins(fsdp=False), baseline_filter=accept), baseline=True))
    return trials


def _megatron(model: AnalyzedGraph, axis: int) -> Callable[[Op, Placement], bool]:
    """Megatron's rule: along `axis` calls are split by features or not at all, so that between blocks values are whole."""

    def accept(op: Op, placement: Placement) -> bool:
        part = placement[axis]
        return not isinstance(part, Split) or role_of(model.roles.of_loops[op.name], part) is Role.FEATURE

    return accept


def _redco(model: AnalyzedGraph, axis: int) -> Callable[[Op, Placement], bool]:
    """Redco's rule: along `axis` linear layers alternate over dataflow, outputs split, then inputs; other calls are split by features."""
    graph = model.folded.graph
    splits_outputs: dict[str, bool] = {}
    upstream: dict[str, str | None] = {}  # per op the nearest linear layer before it; of several the latest in program order
    order = {op.name: position for position, op in enumerate(graph.ops)}
    for op in graph.ops:
        linears = [upstream[value.op] for value in op.operands if upstream.get(value.op)]
        nearest = max((name for name in linears if name), key=order.__getitem__, default=None)
        if _is_linear(model, op):
            splits_outputs[op.name] = nearest is None or not splits_outputs[nearest]
            upstream[op.name] = op.name
        else:
            upstream[op.name] = nearest

    def accept(op: Op, placement: Placement) -> bool:
        part = placement[axis]
        if op.name not in splits_outputs:
            return not isinstance(part, Split) or role_of(model.roles.of_loops[op.name], part) is Role.FEATURE
        if not isinstance(part, Split):
            return False
        in_results = model.spaces[op.name].find(model.spaces[op.name].results[0], part.loop) is not None
        return in_results == splits_outputs[op.name]

    return accept


def _is_linear(model: AnalyzedGraph, op: Op) -> bool:
    """Whether an op is a matrix product with a parameter."""
    space = model.spaces.get(op.name)
    graph = model.folded.graph
    reads_parameter = any(graph.by_name[value.op].kind is OpKind.PARAMETER for value in op.operands)
    return space is not None and space.family is Family.MATMUL and space.kernel is None and reads_parameter
