"""Which groups, blocks and layouts of a plan a user means by the name of a layer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from autopar.errors import InputError
from autopar.ir import format_layout
from autopar.plans import BlockChoice, Group, Plan
from autopar.schedules import make_schedule


def select_groups(plan: Plan, layer: str | None) -> tuple[Group, ...]:
    """The plan's groups that `layer` names, all when it is None. Raises InputError, listing the groups, when none does."""
    if layer is None:
        return plan.groups
    found = tuple(group for group in plan.groups if _names_group(layer, group))
    if not found:
        names = ", ".join(repr(group.name) for group in plan.groups) or "none"
        raise InputError(f"no layer of this plan matches {layer!r}; its groups of layers are {names}")
    return found


def _path_of(group: Group) -> str:
    # `layers.*#1` is the second kind of block under `layers`, `layers.*[4-7]` the fifth to the eighth block.
    return re.sub(r"(#\d+)?(\[\d+(-\d+)?\])?$", "", group.name)


def _names_group(layer: str, group: Group) -> bool:
    path = _path_of(group)
    return layer in group.name or fnmatchcase(path, layer) or fnmatchcase(layer, path)


def select_blocks(plan: Plan, layer: str | None) -> list[BlockChoice]:
    """The blocks that are in `layer`, that it is in, or whose paths have it as a part; all when it is None."""
    if layer is None:
        return list(plan.pipeline.blocks)
    wanted = layer.split(".")

    def is_named(block: BlockChoice) -> bool:
        # `layers.1#2` is a second block named after the same module.
        words = re.sub(r"#\d+$", "", block.name).split(".")
        starts = (zip(words[start:], wanted, strict=False) for start in range(len(words)))
        return any(all(fnmatchcase(word, pattern) for word, pattern in pairs) for pairs in starts)

    return list(filter(is_named, plan.pipeline.blocks))


def find_ranks(plan: Plan) -> tuple[int, ...]:
    """The group of ranks that runs each stage."""
    pipeline = plan.pipeline
    # Which stages a group has doesn't depend on the number of micro-batches.
    return make_schedule(pipeline.schedule, pipeline.ranks, pipeline.ranks, pipeline.chunks).rank_of


def select_layouts(plan: Plan, layer: str) -> Iterable[tuple[str, str]]:
    """Name and layout of the stored tensors of `layer`, or of the layer like it that stands for all in the plan.

    Names of ops are module paths with ``_`` for every dot.
    """
    stored = {name: format_layout(layout) for name, layout in plan.layouts.items()}
    wanted = [layer, *(_generalize(layer, _path_of(group)) for group in select_groups(plan, layer))]
    for pattern in map(_match_names, wanted):
        if found := [(name, text) for name, text in stored.items() if pattern.search(name)]:
            return found
    return []


def _generalize(layer: str, path: str) -> str:
    """The same place in every layer of `path`: ``h.3.mlp`` under ``h.*`` is ``h.*.mlp``."""
    inside = re.match(re.escape(path).replace(r"\*", r"\d+"), layer)
    return path + layer[inside.end() :] if inside else path if layer in path else layer


def _match_names(path: str) -> re.Pattern[str]:
    """What finds `path`, whole words of it, in the names of ops."""
    words = re.sub(r"[^0-9A-Za-z*]+", "_", path).strip("_")
    return re.compile(rf"(?:^|_){re.escape(words).replace(re.escape('*'), '[0-9A-Za-z]+')}(?:_|$)")
