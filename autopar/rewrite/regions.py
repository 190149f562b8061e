"""Which ops of a program become a submodule: those of a repeated layer, and those that the backward runs again as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autopar.ir import Graph, Space
from autopar.plans import Pipeline
from autopar.structure import Chain, Folded, find_cores


@dataclass(frozen=True, slots=True)
class Region:
    """A part of the graph: its own `path`, the `name` that it shares with its like, and whether the backward runs it again."""

    path: str
    name: str
    recomputed: bool = False


def find_layers(folded: Folded) -> dict[str, Region]:
    """Op of a repeated layer -> the layer that it belongs to."""
    return {
        name: Region(path, layer.name)
        for layer in folded.layer_groups
        for path, instance in zip(layer.paths, layer.instances, strict=True)
        for name in instance
    }


def find_recomputed(graph: Graph, spaces: Mapping[str, Space], chain: Chain, pipeline: Pipeline) -> dict[str, Region]:
    """Op that the backward runs again -> the block, or the attention core of a block, that it is run again with."""
    regions: dict[str, Region] = {}
    for block, choice in zip(chain.blocks, pipeline.blocks, strict=True):
        if choice.recompute == "full":
            regions.update({name: Region(block.name, "layer", recomputed=True) for name in block.ops})
        elif choice.recompute == "selective":
            for number, core in enumerate(find_cores(graph, spaces, block.ops)):
                regions.update({name: Region(f"{block.name}.attention.{number}", "attention_core", recomputed=True) for name in core})
    return regions
