"""Rules of ops that move elements without computing: reshape, permute, slice, split, concatenate, repeat."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from autopar.ir import Op, Space, Tensor
from autopar.rules.notation import Rule, argument, broadcast, floats, fresh, grouped, letters, named, normal, normals, space


def refine(before: Sequence[int], after: Sequence[int]) -> tuple[list[str], list[str], dict[str, int]]:
    """The loops that the dims before and after a reshape share: their dims, and the sizes of loops.

    Dims fall into blocks of equal product. Within a block the boundaries of both sides are laid over each other; when each
    divides the next they are loops, else the block stays whole on both sides.

    >>> refine((6, 4), (2, 3, 4))[:2]
    (['(a b)', 'c'], ['a', 'b', 'c'])
    """
    names = fresh()
    sizes: dict[str, int] = {}
    left, right = ["1"] * len(before), ["1"] * len(after)
    rest_before = [dim for dim, size in enumerate(before) if size != 1]
    rest_after = [dim for dim, size in enumerate(after) if size != 1]
    while rest_before and rest_after:
        here, there = [rest_before.pop(0)], [rest_after.pop(0)]
        while (difference := math.prod(before[d] for d in here) - math.prod(after[d] for d in there)) != 0:
            if difference < 0:
                here.append(rest_before.pop(0))
            else:
                there.append(rest_after.pop(0))
        _refine_block([before[d] for d in here], [after[d] for d in there], here, there, left, right, names, sizes)
    return left, right, sizes


def _refine_block(
    sizes_before: list[int],
    sizes_after: list[int],
    here: list[int],
    there: list[int],
    left: list[str],
    right: list[str],
    names: Iterator[str],
    sizes: dict[str, int],
) -> None:
    inside = [_suffixes(sizes_before), _suffixes(sizes_after)]
    bounds = sorted({*inside[0], *inside[1]}, reverse=True)
    if any(outer % inner for outer, inner in pairwise(bounds)):
        for side, dims in ((left, here), (right, there)):
            for dim in dims:
                side[dim] = f"{next(names)}!"
        return
    factors = [(outer, inner, next(names)) for outer, inner in pairwise(bounds)]
    sizes.update({name: outer // inner for outer, inner, name in factors})
    for side, dims, suffixes in ((left, here, inside[0]), (right, there, inside[1])):
        for position, dim in enumerate(dims):
            within = [name for outer, inner, name in factors if suffixes[position] >= outer and inner >= suffixes[position + 1]]
            side[dim] = within[0] if len(within) == 1 else f"({' '.join(within)})"


def _suffixes(sizes: Sequence[int]) -> list[int]:
    """Products of the sizes from each position to the end, and 1."""
    return [math.prod(sizes[position:]) for position in range(len(sizes) + 1)]


def _reshape(op: Op, operands: tuple[Tensor, ...], shape_arg: int | None, fixed: Sequence[int] = ()) -> Space | None:
    """A reshape to the result's sizes; the loops of the result's dims `fixed` stay whole since an argument has their sizes."""
    if operands[0].numel == 0:
        return None
    left, right, sizes = refine(operands[0].shape, op.results[0].shape)
    for dim in fixed:
        right[dim] = re.sub(r"([a-z]+)!?", r"\1!", right[dim])
    # The tensor whose sizes view_as takes has the result's dims.
    others = [right] * (len(operands) - 1)
    return space(op, operands, [left, *others], [right], sizes=sizes, linear=floats(operands, 0), shape_arg=shape_arg, view=True)


def reshape(op: Op, operands: tuple[Tensor, ...]) -> Space | None:
    """``(a b) c -> a b c`` and the like."""
    return _reshape(op, operands, 1)


def flatten(op: Op, operands: tuple[Tensor, ...]) -> Space | None:
    """``a b c -> (a b) c``; also ``view_as``: no argument has sizes."""
    return _reshape(op, operands, None)


def unflatten(op: Op, operands: tuple[Tensor, ...]) -> Space | None:
    """``(a b) c -> a b c``, where of the new dims only one written as -1 can be split: the others' sizes are arguments."""
    dim = normal(argument(op, 1, "dim"), len(operands[0].shape))
    new = argument(op, 2, "sizes")
    return _reshape(op, operands, None, fixed=[dim + position for position, size in enumerate(new) if size != -1])


def permute_to(op: Op, operands: tuple[Tensor, ...], order: Sequence[int]) -> Space:
    """Result dim i is operand dim ``order[i]``."""
    tokens = letters(len(operands[0].shape))
    return space(op, operands, [tokens], [[tokens[dim] for dim in order]], linear=floats(operands, 0), view=True)


def permute(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``a b c -> a c b``."""
    return permute_to(op, operands, normals(argument(op, 1, "dims"), len(operands[0].shape)))


def transpose(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """Two dims change places."""
    rank = len(operands[0].shape)
    first, second = (normal(argument(op, position, f"dim{position - 1}"), rank) for position in (1, 2))
    order = list(range(rank))
    order[first], order[second] = second, first
    return permute_to(op, operands, order)


def reverse_dims(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``t`` and ``numpy_T``: all dims in reverse order."""
    return permute_to(op, operands, range(len(operands[0].shape))[::-1])


def transpose_last(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``mT``: the last two dims change places."""
    rank = len(operands[0].shape)
    return permute_to(op, operands, [*range(rank - 2), rank - 1, rank - 2])


def movedim(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """Some dims move to given places, the others keep their order."""
    rank = len(operands[0].shape)
    source, target = normals(argument(op, 1, "source"), rank), normals(argument(op, 2, "destination"), rank)
    moved = dict(zip(target, source, strict=True))
    others = iter(dim for dim in range(rank) if dim not in source)
    return permute_to(op, operands, [moved[place] if place in moved else next(others) for place in range(rank)])


def unsqueeze(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``a b -> a 1 b``."""
    tokens = letters(len(operands[0].shape))
    dim = normal(argument(op, 1, "dim"), len(tokens) + 1)
    return space(op, operands, [tokens], [[*tokens[:dim], "1", *tokens[dim:]]], linear=floats(operands, 0), view=True)


def squeeze(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``a 1 b -> a b``; a dim that a split leaves with one element must stay: the kernel knows it by its place."""
    shape = operands[0].shape
    dims = normals(argument(op, 1, "dim"), len(shape))
    tokens = ["1" if size == 1 else f"d{dim}" for dim, size in enumerate(shape)]
    right = [token for dim, token in enumerate(tokens) if token != "1" or dim not in dims]
    loops = [token for token in tokens if token != "1"]
    return space(op, operands, [tokens], [right], linear=floats(operands, 0), view=True, kernel="squeeze", kernel_loops=loops)


def expand(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``1 b -> a b``: the operand lacks the loops of the new dims. Also ``expand_as``, whose other operand has them all."""
    full = op.results[0].shape
    tokens = letters(len(full))
    left = [broadcast(operands[0].shape, tokens, full), *([tokens] * (len(operands) - 1))]
    shape_arg = 1 if len(operands) == 1 else None
    return space(op, operands, left, [tokens], linear=floats(operands, 0), shape_arg=shape_arg, view=True)


def select(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``a b! c -> a c``; also ``unbind``, with a result per element."""
    tokens = letters(len(operands[0].shape))
    dim = normal(argument(op, 1, "dim", 0), len(tokens))
    tokens[dim] += "!"
    right = [tokens[:dim] + tokens[dim + 1 :]] * len(op.results)
    return space(op, operands, [tokens], right, linear=floats(operands, 0), view=True)


def _pieces(total: int, unit: int, names: tuple[str, str]) -> str:
    """A dim of `total` elements that is a whole number of blocks of `unit` elements: ``(p! o)``."""
    if total == 0:
        return f"{names[0]}!"
    return grouped((f"{names[0]}!", total // unit), (names[1], unit))


def _cut(op: Op, operands: tuple[Tensor, ...], dim: int, unit: int, kernel: str | None) -> Space:
    """Pieces cut out of dim `dim` at whole numbers of blocks of `unit` elements: ``(p! o) -> (q! o), o``.

    A split of o takes a part of every block, and so the same part of every piece.
    """
    tokens = letters(len(operands[0].shape))
    others = tokens[:dim] + tokens[dim + 1 :]
    left = [*others[:dim], _pieces(operands[0].shape[dim], unit, ("part", "o")), *others[dim:]]
    right = [
        [*others[:dim], _pieces(result.shape[dim], unit, (f"part{index}", "o")), *others[dim:]] for index, result in enumerate(op.results)
    ]
    sizes = {"part": operands[0].shape[dim] // unit, "o": unit}
    sizes |= {f"part{index}": result.shape[dim] // unit for index, result in enumerate(op.results)}
    return space(
        op,
        operands,
        [left],
        right,
        sizes={name: size for name, size in sizes.items() if size > 1},
        linear=floats(operands, 0),
        view=True,
        kernel=kernel if unit > 1 else None,
        kernel_loops=["o"] if unit > 1 and kernel else [],
    )


def slice_(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``(p! o) -> (q! o)``; all of a dim leaves its loop as it is."""
    shape = operands[0].shape
    dim = normal(argument(op, 1, "dim", 0), len(shape))
    start, end, step = slice(argument(op, 2, "start"), argument(op, 3, "end"), argument(op, 4, "step", 1)).indices(shape[dim])
    if (start, end, step) == (0, shape[dim], 1):
        tokens = letters(len(shape))
        return space(op, operands, [tokens], [tokens], linear=floats(operands, 0), view=True)
    # A slice may be empty: partial rotary embeddings of all of a head leave nothing over.
    unit = math.gcd(start, end, shape[dim]) if step == 1 and start < end else 1
    return _cut(op, operands, dim, unit, "slice_dim")


def narrow(op: Op, operands: tuple[Tensor, ...]) -> Space | None:
    """As `slice_`, from start and length."""
    shape = operands[0].shape
    dim, start, length = normal(argument(op, 1, "dim"), len(shape)), argument(op, 2, "start"), argument(op, 3, "length")
    if not isinstance(start, int) or length == 0:
        return None
    start = normal(start, shape[dim])
    return _cut(op, operands, dim, math.gcd(start, length, shape[dim]), "narrow")


def split(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``(p! o) -> o, o, (p2! o)``; the pieces' sizes are arguments."""
    dim = normal(argument(op, 2, "dim", 0), len(operands[0].shape))
    return _cut(op, operands, dim, math.gcd(*(result.shape[dim] for result in op.results)), "split")


def chunk(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``(p! o) -> o, o``; unequal chunks would be cut elsewhere in a part, so they stay whole."""
    dim = normal(argument(op, 2, "dim", 0), len(operands[0].shape))
    sizes = {result.shape[dim] for result in op.results}
    # Fewer chunks than asked for: a part would again give the number asked for.
    equal = len(sizes) == 1 and len(op.results) == argument(op, 1, "chunks")
    return _cut(op, operands, dim, sizes.pop() if equal else 1, None)


def cat(op: Op, operands: tuple[Tensor, ...]) -> Space | None:
    """``o, (p1! o) -> (p! o)``: the reverse of `split`."""
    shapes = [tensor.shape for tensor in operands]
    if any(len(shape) != len(shapes[0]) for shape in shapes):
        return None  # torch skips empty one-dim tensors here
    dim = normal(argument(op, 1, "dim", 0), len(shapes[0]))
    unit = math.gcd(*(shape[dim] for shape in shapes))
    total = op.results[0].shape[dim]
    if unit == 0:
        return None
    tokens = letters(len(shapes[0]))
    others = tokens[:dim] + tokens[dim + 1 :]
    left = [[*others[:dim], _pieces(shape[dim], unit, (f"part{index}", "o")), *others[dim:]] for index, shape in enumerate(shapes)]
    right = [*others[:dim], _pieces(total, unit, ("part", "o")), *others[dim:]]
    sizes = {"part": total // unit, "o": unit} | {f"part{index}": shape[dim] // unit for index, shape in enumerate(shapes)}
    linear = floats(operands, *range(len(operands)))
    return space(op, operands, left, [right], sizes={name: size for name, size in sizes.items() if size > 1}, linear=linear)


def put(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``a b!, a -> a b!``: ``select_scatter``, also ``slice_scatter``, whose second operand keeps the dim: ``a b!, a c! -> a b!``."""
    tokens = letters(len(operands[0].shape))
    dim = normal(argument(op, 2, "dim", 0), len(tokens))
    tokens[dim] += "!"
    middle = ["placed!"] if len(operands[1].shape) == len(tokens) else []
    source = [*tokens[:dim], *middle, *tokens[dim + 1 :]]
    return space(op, operands, [tokens, source], [tokens], linear=floats(operands, 0, 1))


def stack(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``a b, a b -> a p! b``."""
    tokens = letters(len(operands[0].shape))
    dim = normal(argument(op, 1, "dim", 0), len(tokens) + 1)
    right = [*tokens[:dim], "part!", *tokens[dim:]]
    return space(op, operands, [tokens] * len(operands), [right], linear=floats(operands, *range(len(operands))))


def pad(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """Dims that are padded stay whole; linear when zeros or copies are added."""
    tokens = letters(len(operands[0].shape))
    both = list(zip(tokens, operands[0].shape, op.results[0].shape, strict=True))
    # Padding by equal amounts of opposite sign moves elements and keeps the size.
    amounts = argument(op, 1, "pad")
    touched = [any(amounts[2 * (len(tokens) - 1 - dim) : 2 * (len(tokens) - dim)]) for dim in range(len(tokens))]
    left = [f"{name}!" if moved else name for (name, _, _), moved in zip(both, touched, strict=True)]
    right = [f"{name}_padded!" if moved else name for (name, _, _), moved in zip(both, touched, strict=True)]
    fill = argument(op, 3, "value") if op.target == "aten.pad.default" else argument(op, 2, "value", 0)
    return space(op, operands, [left], [right], linear=() if fill else floats(operands, 0))


def reorder(op: Op, operands: tuple[Tensor, ...], dims: Sequence[int]) -> Space:
    """Elements change places along `dims`, which stay whole."""
    tokens = [f"{name}!" if dim in dims else name for dim, name in enumerate(letters(len(operands[0].shape)))]
    return space(op, operands, [tokens], [tokens], linear=floats(operands, 0))


def flip(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """Dims run backwards."""
    return reorder(op, operands, [normal(dim, len(operands[0].shape)) for dim in argument(op, 1, "dims")])


def roll(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """Dims are shifted around; without dims the flattened tensor is."""
    return reorder(op, operands, normals(argument(op, 2, "dims", ()), len(operands[0].shape)))


def repeat(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``a b -> r! (q! a) b``; also ``tile``, which may name fewer dims than there are."""
    shape = operands[0].shape
    times = list(argument(op, 1, "repeats", op.kwargs.get("dims")))
    times = [1] * (len(shape) - len(times)) + times
    new = len(times) - len(shape)
    tokens = letters(len(shape))
    sizes = {f"times{place}": count for place, count in enumerate(times) if count > 1}
    sizes |= {name: size for name, size in zip(tokens, shape, strict=True) if size > 1}
    right = [grouped((f"times{place}!", count)) for place, count in enumerate(times[:new])]
    for place, (name, size) in enumerate(zip(tokens, shape, strict=True), new):
        right.append(grouped((f"times{place}!", times[place]), (name, size)))
    left = [grouped((name, size)) for name, size in zip(tokens, shape, strict=True)]
    return space(op, operands, [left], [right], sizes=sizes, linear=floats(operands, 0))


def repeat_interleave(op: Op, operands: tuple[Tensor, ...]) -> Space | None:
    """``a b -> a (b r!)``: every element several times in a row, as grouped-query attention's keys are repeated."""
    if argument(op, 2, "dim") is None:
        return None
    shape = operands[0].shape
    dim, times = normal(argument(op, 2, "dim"), len(shape)), int(argument(op, 1, "repeats"))
    tokens = [grouped((name, size)) for name, size in zip(letters(len(shape)), shape, strict=True)]
    right = list(tokens)
    right[dim] = grouped((letters(len(shape))[dim], shape[dim]), ("times!", times))
    sizes = {name: size for name, size in zip(letters(len(shape)), shape, strict=True) if size > 1}
    if times > 1:
        sizes["times"] = times
    return space(op, operands, [tokens], [right], sizes=sizes, linear=floats(operands, 0))


def view_as_complex(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``a b part! -> a b``: the two parts of a complex number are the last dim."""
    tokens = letters(len(op.results[0].shape))
    return space(op, operands, [[*tokens, "part!"]], [tokens], linear=floats(operands, 0), view=True)


def view_as_real(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``a b -> a b part!``: the reverse."""
    tokens = letters(len(operands[0].shape))
    return space(op, operands, [tokens], [[*tokens, "part!"]], linear=floats(operands, 0), view=True)


def glu(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``a (half! b) -> a b``: the first half of a dim, each element times the sigmoid of its counterpart in the second."""
    shape = operands[0].shape
    dim = normal(argument(op, 1, "dim", -1), len(shape))
    right = letters(len(shape))
    left = list(right)
    left[dim] = grouped(("half!", 2), (right[dim], shape[dim] // 2))
    if shape[dim] == 2:
        right[dim] = "1"
    sizes = {"half": 2} | ({letters(len(shape))[dim]: shape[dim] // 2} if shape[dim] > 2 else {})
    return space(op, operands, [left], [right], sizes=sizes, flops=4.0)


_Dim = tuple[tuple[str, int], ...]
"""The loops of a dim that is their product, and their sizes; those of one iteration are left out of a rule's text."""


def _rearranged(op: Op, operands: tuple[Tensor, ...], left: Sequence[_Dim], right: Sequence[_Dim]) -> Space:
    """Elements change places between dims, each given as its factors, (loop, size), outermost first."""
    sizes = {name.rstrip("!"): size for dims in (left, right) for dim in dims for name, size in dim if size > 1}
    sides = ([grouped(*dim) for dim in dims] for dims in (left, right))
    return space(op, operands, [next(sides)], [next(sides)], sizes=sizes, linear=floats(operands, 0))


def pixel_shuffle(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``n (c q! r!) y x -> n c (y q!) (x r!)``; ``pixel_unshuffle`` is the reverse."""
    is_reverse = "unshuffle" in op.target
    coarse, fine = (op.results[0].shape, operands[0].shape) if is_reverse else (operands[0].shape, op.results[0].shape)
    factor = argument(op, 1, "downscale_factor" if is_reverse else "upscale_factor")
    leading: list[_Dim] = [((name, size),) for name, size in zip(letters(len(fine) - 3), fine[:-3], strict=True)]
    channels, height, width = ("channels", fine[-3]), ("y", coarse[-2]), ("x", coarse[-1])
    rows, columns = ("q!", factor), ("r!", factor)
    merged: list[_Dim] = [*leading, (channels, rows, columns), (height,), (width,)]
    spread: list[_Dim] = [*leading, (channels,), (height, rows), (width, columns)]
    return _rearranged(op, operands, spread, merged) if is_reverse else _rearranged(op, operands, merged, spread)


def channel_shuffle(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``n (g! c) x -> n (c g!) x``."""
    shape = operands[0].shape
    groups = argument(op, 1, "groups")
    inner, outer = ("channels", shape[1] // groups), ("g!", groups)
    spatial: list[_Dim] = [((f"x{dim}", size),) for dim, size in enumerate(shape[2:])]
    return _rearranged(op, operands, [(("n", shape[0]),), (outer, inner), *spatial], [(("n", shape[0]),), (inner, outer), *spatial])


def im2col(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``n c y! x! -> n (c k!) l!``: the pixels under a window, for every place of it.

    ``col2im``, ``n (c k!) l! -> n c y! x!``, adds them up.
    """
    is_reverse = "col2im" in op.target
    image, columns = (op.results[0].shape, operands[0].shape) if is_reverse else (operands[0].shape, op.results[0].shape)
    leading: list[_Dim] = [(("n", size),) for size in image[:-3]]
    channels = ("channels", image[-3])
    pixels: list[_Dim] = [*leading, (channels,), (("y!", image[-2]),), (("x!", image[-1]),)]
    windows: list[_Dim] = [*leading, (channels, ("k!", columns[-2] // image[-3])), (("l!", columns[-1]),)]
    return _rearranged(op, operands, windows, pixels) if is_reverse else _rearranged(op, operands, pixels, windows)


def unfold(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``a b! -> a w! k!``: windows along one dim; their elements are a new last dim."""
    tokens = letters(len(operands[0].shape))
    dim = normal(argument(op, 1, "dimension"), len(tokens))
    left, right = list(tokens), list(tokens)
    left[dim], right[dim] = f"{tokens[dim]}!", "windows!"
    return space(op, operands, [left], [[*right, "elements!"]], linear=floats(operands, 0), view=True)


def diagonal(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``a! b! c -> c d!``: the diagonal of two dims is a new last dim."""
    rank = len(operands[0].shape)
    pair = {normal(argument(op, position, f"dim{position - 1}", position - 2), rank) for position in (2, 3)}
    tokens = letters(rank)
    left = [f"{name}!" if dim in pair else name for dim, name in enumerate(tokens)]
    right = [name for dim, name in enumerate(tokens) if dim not in pair]
    return space(op, operands, [left], [[*right, "diagonal!"]], linear=floats(operands, 0), view=True)


RULES: dict[str, Rule] = {
    **named("aten.view.default aten.reshape.default aten._unsafe_view.default", reshape),
    **named("aten.flatten.using_ints aten.view_as.default aten.reshape_as.default aten.ravel.default", flatten),
    "aten.unflatten.int": unflatten,
    "aten.permute.default": permute,
    **named("aten.transpose.int aten.swapaxes.default aten.swapdims.default", transpose),
    **named("aten.t.default aten.numpy_T.default", reverse_dims),
    "aten.mT.default": transpose_last,
    **named("aten.movedim.int aten.movedim.intlist", movedim),
    "aten.unsqueeze.default": unsqueeze,
    **named("aten.squeeze.default aten.squeeze.dim aten.squeeze.dims", squeeze),
    **named("aten.expand.default aten.expand_as.default aten.broadcast_to.default", expand),
    **named("aten.select.int aten.unbind.int", select),
    "aten.slice.Tensor": slice_,
    "aten.narrow.default": narrow,
    **named("aten.split.Tensor aten.split.sizes aten.split_with_sizes.default aten.unsafe_split.Tensor", split),
    "aten.chunk.default": chunk,
    **named("aten.cat.default aten.concat.default aten.concatenate.default", cat),
    "aten.stack.default": stack,
    **named("aten.select_scatter.default aten.slice_scatter.default", put),
    **named("aten.pad.default aten.constant_pad_nd.default", pad),
    "aten.flip.default": flip,
    "aten.roll.default": roll,
    **named("aten.repeat.default aten.tile.default", repeat),
    "aten.repeat_interleave.self_int": repeat_interleave,
    "aten.view_as_complex.default": view_as_complex,
    "aten.view_as_real.default": view_as_real,
    "aten.glu.default": glu,
    **named("aten.pixel_shuffle.default aten.pixel_unshuffle.default", pixel_shuffle),
    "aten.channel_shuffle.default": channel_shuffle,
    **named("aten.im2col.default aten.col2im.default", im2col),
    "aten.unfold.default": unfold,
    "aten.diagonal.default": diagonal,
}
