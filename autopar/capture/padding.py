"""Convolutions whose input is padded, or whose result is cut, as one call.

Comes in: a flat graph. Goes out: the graph in which a convolution that looks back is one call, whose input and result can be split alike.
Both of these have more elements in between than a sequence has tokens, which no ranks can share equally::

    pad = pad(x, [3, 0])                                conv1d = conv1d(x, weight, None, [1], [3])
    conv1d = conv1d(pad, weight)                        slice = slice(conv1d, 2, 0, 16)

    conv1d = padded_conv1d(x, weight, None, 1, 3, 0, 1, 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from autopar.capture.fx_nodes import emit, value_of
from autopar.ir import find_halo
from autopar.ops import padded as padded  # the import defines torch.ops.autopar.padded_conv1d

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class _Merged:
    """A convolution with what stands around it: the calls before and behind it that become part of it, and the arguments of all."""

    pad: fx.Node | None
    cut: fx.Node | None
    args: tuple[Any, ...]


def merge_padding(graph: fx.Graph) -> fx.Graph:
    """Make one call of each convolution over one dim and the zeros before it, or the cut behind it, if equal parts can be convolved."""
    merged = {node: found for node in graph.nodes if node.target is aten.conv1d.default and (found := _match(node)) is not None}
    if not merged:
        return graph
    dropped = {around for found in merged.values() for around in (found.pad, found.cut) if around is not None}
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in merged:
            found = merged[node]
            args = fx.node.map_arg(found.args, env.__getitem__)
            env[node] = emit(new, torch.ops.autopar.padded_conv1d.default, args, {}, node)
            if found.cut is not None:
                env[node].meta["val"] = found.cut.meta["val"]
                env[found.cut] = env[node]
        elif node not in dropped:
            env[node] = new.node_copy(node, env.__getitem__)
    return new


def _match(node: fx.Node) -> _Merged | None:
    """How a convolution is made one call with what stands around it; None where it can't, or needn't."""
    source, weight, bias, (stride,), (padding,), (dilation,), groups = _arguments(node)
    size = value_of(weight).shape[-1]
    pad, before = None, padding
    if source.target in (aten.pad.default, aten.constant_pad_nd.default) and len(source.users) == 1 and _adds_zeros(source):
        pad, before = source, padding + source.args[1][0]
        source = source.args[0]
    cut, positions = None, value_of(node).shape[-1]
    reader = next(iter(node.users), node)
    if len(node.users) == 1 and reader.target is aten.slice.Tensor and reader.args[1] in (2, -1):
        start, end, step = slice(*reader.args[2:5]).indices(positions)
        if step == 1:
            cut, positions, before = reader, end - start, before - start * stride
    length = value_of(source).shape[-1]
    if (pad is None and cut is None) or value_of(node).ndim != 3:
        return None
    if find_halo(length, positions, size=size, stride=stride, dilation=dilation, before=before) is None:
        return None
    behind = max(0, (positions - 1) * stride + dilation * (size - 1) + 1 - before - length)
    return _Merged(pad, cut, (source, weight, bias, stride, before, behind, dilation, groups))


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """All arguments of a convolution, with defaults, by position."""
    defaults: tuple[Any, ...] = (None, [1], [0], [1], 1)
    return (*node.args, *defaults[len(node.args) - 2 :])


def _adds_zeros(pad: fx.Node) -> bool:
    """Whether a padding adds zeros at the ends of the last dim, and nothing else."""
    given: tuple[Any, ...] = pad.args
    _, amounts, *rest = given
    mode = "constant"
    if pad.target is aten.pad.default and rest:
        mode, *rest = rest
    value = rest[0] if rest else None
    return len(amounts) == 2 and min(amounts) >= 0 and mode == "constant" and not value
