"""What a candidate is: the names of its axes, what it splits, and what its step is made of.

Comes in: a mesh with placements, or with constraints alone where nothing was solved; tables of costs of blocks. Goes out: meshes, kinds and
parts of steps, for the candidates that the plan lists, and for the plan itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from autopar.costs import BlockCost
from autopar.ir import MICROBATCH, Mesh, OpKind, Placement, Split
from autopar.plans import Seconds, add_parts
from autopar.search.meshes import Trial
from autopar.search.options import AxisKind, kind_of
from autopar.structure import AnalyzedGraph, Role, role_of

_KIND_OF_ROLE = {Role.BATCH: AxisKind.DP, Role.SEQUENCE: AxisKind.CP, Role.FEATURE: AxisKind.TP, Role.INNER: AxisKind.TP}


def find_kinds(model: AnalyzedGraph, mesh: Mesh, placements: Mapping[str, Placement]) -> list[AxisKind | None]:
    """Per axis of a mesh the kind of what it splits in most of the work of contractions; None for one that splits nothing of them."""
    kinds: list[AxisKind | None] = []
    for axis in range(len(mesh.names)):
        weight: Counter[AxisKind] = Counter()
        for op in model.folded.ops:
            space = model.spaces.get(op.name)
            if op.kind is OpKind.CALL and space is not None and space.is_contraction:
                part = placements[op.name][axis]
                if isinstance(part, Split):
                    points = space.points() * max(1.0, space.flops) * model.folded.count[op.name]
                    weight[_KIND_OF_ROLE[role_of(model.roles.of_loops[op.name], part)]] += int(points)
        kinds.append(weight.most_common(1)[0][0] if weight else None)
    return kinds


def name_axes(model: AnalyzedGraph, mesh: Mesh, placements: Mapping[str, Placement]) -> Mesh:
    """The mesh with free axes named after the role of what they split in most of the work; axes named for a kind keep their names.

    If several axes have the same name, free ones among them get a number.
    """
    named = {name for name in mesh.names if name == MICROBATCH or kind_of(name) is not AxisKind.FREE}
    kinds = find_kinds(model, mesh, placements)
    names = [mesh_name if mesh_name in named else (kind or AxisKind.DP).value for mesh_name, kind in zip(mesh.names, kinds, strict=True)]
    counts = Counter(names)
    unique = [
        f"{name}{names[:i].count(name)}" if counts[name] > 1 and mesh_name not in named else name
        for i, (name, mesh_name) in enumerate(zip(names, mesh.names, strict=True))
    ]
    return Mesh(tuple(unique), mesh.sizes)


def word_kind(kinds: Collection[AxisKind | None]) -> str:
    """What a mesh of one pipeline rank is whose axes split things of these `kinds` (of `autopar.plans.KINDS`)."""
    if AxisKind.FREE in kinds:
        return "not solved"
    for kind, words in ((AxisKind.TP, "tensor parallel"), (AxisKind.CP, "sequence parallel"), (AxisKind.DP, "data parallel")):
        if kind in kinds:
            return words
    return "nothing split"


def word_kind_of_trial(trial: Trial) -> str:
    """What a trial is that wasn't solved, as far as its constraints say it."""
    return word_kind([kind for kind, size in zip(trial.constraints.kinds, trial.mesh.sizes, strict=True) if size > 1])


def find_parts(costs: Iterable[BlockCost | None], microbatches: int, ranks: int, step_seconds: float) -> Seconds | None:
    """What a step is made of on the mean pipeline rank; the bubble is the time of the step in which it has nothing to run.

    Args:
        costs: of every block, as it is run.
        microbatches: parts of the batch.
        ranks: pipeline ranks.
        step_seconds: of the step.

    Returns None if the costs of some block aren't known.
    """
    parts: list[Seconds] = []
    for cost in costs:
        if cost is None:
            return None
        each, once = cost.parts
        parts += [each.times(microbatches / ranks), once.times(1 / ranks)]
    busy = add_parts(parts)
    # A step is simulated, what is worked is a sum: of equal numbers rounding may leave less than nothing.
    bubble = max(0.0, step_seconds - busy.step) if ranks > 1 else 0.0
    return add_parts([busy, Seconds(0.0, 0.0, 0.0, 0.0, 0.0, bubble)])
