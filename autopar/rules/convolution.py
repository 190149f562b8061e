"""Rules of convolutions, whose positions can be split where equal parts of the result are made of equal parts of the input."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from autopar.ir import ITEMSIZE, Exchange, Facts, Family, HaloSize, KernelMemory, Op, Space, Tensor, find_halo, find_pads, per_dim
from autopar.rules.contract import weight_and_bias
from autopar.rules.notation import Rule, argument, grouped, named, per_point, space


def convolution(op: Op, operands: tuple[Tensor, ...]) -> Space | None:
    """``n (g i) p0* p1*, (g o) i k0! k1!, (g o) -> n (g o) p0* p1*``; splitting the groups changes their number, an argument.

    Where all positions of a dim are made of as many elements as the stride, ``(p0* step0!)``, the dim can be split: each rank then gets a
    halo of its neighbours. It is ``x0!``, and ``y0!`` in the result, where they aren't, and ``p0`` where no position reads another's.
    """
    dims = len(operands[0].shape) - 2
    dilations = per_dim(argument(op, 5, "dilation", 1), dims)
    pads = find_pads(argument(op, 4, "padding", 0), operands[1].shape[2:], dilations)
    # Padding that is given as a word may differ at both ends, which the function for weight gradients doesn't know.
    weights = () if op.target.endswith(".padding") else weight_and_bias(op).weights
    strides, groups = per_dim(argument(op, 3, "stride", 1), dims), int(argument(op, 6, "groups", 1))
    return _convolution(op, operands, "convolution", strides, [before for before, _ in pads], dilations, groups, weights)


def padded_conv1d(op: Op, operands: tuple[Tensor, ...]) -> Space | None:
    """The same for `autopar.ops.padded.padded_conv1d`."""
    stride, before, _, dilation, groups = op.args[3:]
    return _convolution(op, operands, "padded_conv1d", [stride], [before], [dilation], groups, weight_and_bias(op).weights)


def _convolution(
    op: Op,
    operands: tuple[Tensor, ...],
    kernel: str,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    groups: int,
    weights: tuple[int, ...],
) -> Space | None:
    image, weight, made = operands[0].shape, operands[1].shape, op.results[0].shape
    if len(image) != len(weight):
        return None  # without a batch dim
    sizes = {"g": groups, "i": weight[1], "o": weight[0] // groups}
    channels, features = (grouped(*((name, sizes[name]) for name in names)) for names in ("gi", "go"))
    halos = dict[str, HaloSize]()
    read, written = list[str](), list[str]()
    for dim, (length, positions) in enumerate(zip(image[2:], made[2:], strict=True)):
        halo = find_halo(length, positions, size=weight[2 + dim], stride=strides[dim], dilation=dilations[dim], before=pads[dim])
        if halo is None:
            of_image, of_result = {f"x{dim}!": length}, {f"y{dim}!": positions}
        else:
            name = f"p{dim}*" if halo.before or halo.behind else f"p{dim}"
            of_image, of_result = {name: positions, f"step{dim}!": strides[dim]}, {name: positions}
            if name.endswith("*") and positions > 1:
                halos[f"p{dim}"] = halo
        read.append(grouped(*of_image.items()))
        written.append(grouped(*of_result.items()))
        sizes |= {loop.rstrip("!*"): size for loop, size in (*of_image.items(), *of_result.items())}
    kernel_loops = [*(["g"] if groups > 1 else []), *halos]
    weight_dims = [features, grouped(("i", sizes["i"])), *(f"k{dim}!" for dim in range(len(read)))]
    return space(
        op,
        operands,
        [["n", channels, *read], weight_dims, [features]][: len(operands)],
        [["n", features, *written]],
        sizes={name: size for name, size in sizes.items() if size > 1},
        flops=per_point(2.0 * op.results[0].numel * math.prod(weight[1:]), image[:1], list(sizes.values()), weight[2:]),
        family=Family.MATMUL,
        kernel=kernel if kernel_loops else None,
        kernel_loops=kernel_loops,
        positional=halos,
        added=[2] if len(operands) == 3 else [],
        facts=Facts(weights=weights, **_halo_facts(operands[0], ["n", channels, *read], sizes, halos)),
    )


def _halo_facts(image: Tensor, dims: Sequence[str], sizes: Mapping[str, int], halos: Mapping[str, HaloSize]) -> dict[str, Any]:
    """What the kernel of a convolution sends, saves and needs where a dim of positions is split that has a halo.

    Args:
        image: what is read.
        dims: its dims, as text.
        sizes: of the loops.
        halos: loop of positions -> the halo of its dim.
    """
    if not halos:
        return {}
    itemsize = ITEMSIZE[image.dtype]
    wide = max(itemsize, ITEMSIZE["float32"])
    loops = tuple(re.findall(r"[a-z]\w*", " ".join(dims)))
    backward = int(image.requires_grad)
    exchanges = [
        Exchange(frozenset({name}), "halo", loops, forward=1, backward=backward, itemsize=itemsize, halo=halo)
        for name, halo in halos.items()
    ]
    # A copy of the part with its halo; in the backward also its gradient, or with that the part's own, which is summed in float32 or wider.
    elements = math.prod(image.shape[2:])
    strip = max((halo.before + halo.behind) * elements // halo.length for halo in halos.values())
    memory = KernelMemory(
        frozenset(halos),
        frozenset({0, 1}),
        loops,
        forward=itemsize,
        backward=itemsize + wide,
        saved=math.ceil(itemsize * strip * math.prod(sizes[name] for name in halos) / elements),
    )
    return {"exchanges": tuple(exchanges), "kernel_memory": memory}


def transposed_convolution(op: Op, operands: tuple[Tensor, ...]) -> Space | None:
    """``n (g i) y! x!, (g i) o v! u!, (g o) -> n (g o) q! p!``; splitting the groups changes their number, an argument."""
    image, weight = operands[0].shape, operands[1].shape
    if len(image) != len(weight):
        return None  # without a batch dim
    groups = int(argument(op, 6, "groups", 1))
    spatial = range(len(image) - 2)
    channels = grouped(("g", groups), ("i", weight[0] // groups))
    features = grouped(("g", groups), ("o", weight[1]))
    left = [
        ["n", channels, *(f"x{dim}!" for dim in spatial)],
        [channels, grouped(("o", weight[1])), *(f"k{dim}!" for dim in spatial)],
        [features],
    ][: len(operands)]
    total = 2.0 * operands[0].numel * math.prod(weight[1:])
    return space(
        op,
        operands,
        left,
        [["n", features, *(f"y{dim}!" for dim in spatial)]],
        sizes={name: size for name, size in (("g", groups), ("i", weight[0] // groups), ("o", weight[1])) if size > 1},
        flops=per_point(total, image[:1], image[2:], weight, op.results[0].shape[2:]),
        family=Family.MATMUL,
        kernel="transposed_convolution" if groups > 1 else None,
        kernel_loops=["g"] if groups > 1 else [],
        added=[2] if len(operands) == 3 else [],
        facts=weight_and_bias(op),
    )


RULES: dict[str, Rule] = {
    **named("aten.conv1d.default aten.conv2d.default aten.conv3d.default", convolution),
    **named("aten.conv1d.padding aten.conv2d.padding aten.conv3d.padding", convolution),
    "autopar.padded_conv1d.default": padded_conv1d,
    **named("aten.conv_transpose1d.default aten.conv_transpose2d.input aten.conv_transpose3d.input", transposed_convolution),
}

_CONVOLUTIONS = """aten.convolution.default aten.conv1d.default aten.conv2d.default aten.conv3d.default
    aten.conv_transpose1d.default aten.conv_transpose2d.input aten.conv_transpose3d.input"""

FACTS: Mapping[str, Callable[[Op], Facts]] = dict.fromkeys(_CONVOLUTIONS.split(), weight_and_bias)
"""Facts of calls without loops: of ops that have no rule, and of calls that a rule leaves out (a convolution without a batch dim)."""
