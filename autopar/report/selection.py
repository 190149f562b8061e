"""Which groups, blocks and stored tensors of a plan a user means by the name of a layer.

A name is that of a group of like layers as the report prints it (``transformer.h.*``), or a module path, which is compared part by part:
each part may be a pattern, and the path may leave out the modules around it. ``h.3.mlp``, ``transformer.h.3`` and ``h.*`` all name the
layer ``transformer.h.3``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from autopar.errors import InputError
from autopar.ir import format_layout
from autopar.plans import OUTSIDE, BlockChoice, Group, OpCost, Plan
from autopar.schedules import make_schedule


def select_groups(plan: Plan, layer: str | None) -> tuple[Group, ...]:
    """The plan's groups that `layer` names, all when it is None. Raises InputError, listing the groups, when none does."""
    if layer is None:
        return plan.groups
    if named := _find_group(plan, layer):
        return (named,)
    pattern = layer.split(".")
    groups = tuple(group for group in plan.groups if any(_list_matches(plan, group, pattern)))
    if not groups:
        names = ", ".join(map(_word_group, plan.groups)) or "none"
        raise InputError(f"no layer of this plan matches {layer!r}; its groups of layers are {names}")
    return groups


def select_blocks(plan: Plan, layer: str | None) -> list[BlockChoice]:
    """The blocks that are in `layer`, or that it is in; all when it is None. Raises InputError as `select_groups` does."""
    if layer is None:
        return list(plan.pipeline.blocks)
    outside = {block.name for block in _find_blocks_outside(plan)}
    named = _find_group(plan, layer)
    if named is not None and named.name == OUTSIDE:
        return [block for block in plan.pipeline.blocks if block.name in outside]
    pattern = layer.split(".")
    groups = select_groups(plan, layer)
    paths = named.paths if named is not None else [path for group in groups for path in _list_matches(plan, group, pattern)]
    return [block for block in plan.pipeline.blocks if any(_is_around(block.path, path) for path in paths)]


def select_layouts(plan: Plan, layer: str) -> Mapping[str, str]:
    """The user's name -> the layout of the parameters and buffers in `layer`.

    The plan lists those of the first of like layers, which stand for those of the others: for ``h.3.mlp`` comes ``h.0.mlp.weight``.
    Raises InputError as `select_groups` does.
    """
    named = _find_group(plan, layer)
    pattern = layer.split(".")
    return {
        name: format_layout(plan.layouts[op])
        for group in select_groups(plan, layer)
        for op, name in group.tensors.items()
        if named is not None or any(_matches(alike, pattern) for alike in _list_names(group, name))
    }


def select_ops(plan: Plan, group: Group, layer: str | None) -> list[OpCost]:
    """The calls and parameters of a group that are inside of `layer`; all of the group when it is None or names the group.

    The plan lists those of the first of like layers, which stand for those of the others. Raises InputError as `select_groups` does.
    """
    ops = [op for op in plan.ops if op.group == group.name]
    if layer is None or _find_group(plan, layer) is not None:
        return ops
    pattern = layer.split(".")
    names = {op.op: op.path if op.op in plan.placements else op.target for op in ops}
    return [op for op in ops if any(_matches(alike, pattern) for alike in _list_names(group, names[op.op]))]


def find_pipeline_ranks(plan: Plan) -> tuple[int, ...]:
    """The pipeline rank that runs each stage."""
    pipeline = plan.pipeline
    # Which stages a pipeline rank has doesn't depend on the number of micro-batches.
    return make_schedule(pipeline.schedule, pipeline.ranks, pipeline.ranks, pipeline.chunks).rank_of


def _word_group(group: Group) -> str:
    """A group's name, and which layers it has: numbers that no layer has are mistaken most often."""
    return f"{group.name!r} ({group.paths[0]} to {group.paths[-1]})" if group.count > 1 else repr(group.name)


def _find_group(plan: Plan, layer: str) -> Group | None:
    """The group whose name is `layer`; ``outside`` is short for that of what is in no layer."""
    name = OUTSIDE if layer == "outside" else layer
    return next((group for group in plan.groups if group.name == name), None)


def _list_matches(plan: Plan, group: Group, pattern: Sequence[str]) -> Iterator[str]:
    """Paths in which `pattern` is found: of the group's layers, of the tensors in them, and of blocks outside of layers."""
    yield from (path for path in group.paths if _matches(path, pattern))
    yield from (alike for name in group.tensors.values() for alike in _list_names(group, name) if _matches(alike, pattern))
    if group.name == OUTSIDE:
        yield from (block.path for block in _find_blocks_outside(plan) if _matches(block.path, pattern))


def _find_blocks_outside(plan: Plan) -> list[BlockChoice]:
    """The blocks that are in no layer and hold none."""
    layers = [path for group in plan.groups for path in group.paths]
    return [block for block in plan.pipeline.blocks if not any(_is_around(block.path, path) for path in layers)]


def _list_names(group: Group, name: str) -> Iterator[str]:
    """The user's names of a tensor or a module of the group's first layer and of those at the same place in the other layers."""
    first = group.paths[0] if group.paths else ""
    if not f"{name}.".startswith(f"{first}."):
        yield name
        return
    yield from (path + name[len(first) :] for path in group.paths)


def _is_around(path: str, other: str) -> bool:
    """Whether one of two module paths is inside the other, or both are the same."""
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")


def _matches(name: str, pattern: Sequence[str]) -> bool:
    """Whether `pattern` is found in the parts of a dotted name, all of it."""
    parts = name.split(".")
    starts = range(len(parts) - len(pattern) + 1)
    # A part may have a bracket in its name: what is equal matches, whatever it means as a pattern.
    return any(all(part == text or fnmatchcase(part, text) for part, text in zip(parts[start:], pattern, strict=False)) for start in starts)
