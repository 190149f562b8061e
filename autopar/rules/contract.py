"""Rules of contractions: matrix products, einsum, attention, recurrent layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from string import ascii_letters
from typing import Any

from autopar.ir import (
    ITEMSIZE,
    Exchange,
    Facts,
    Family,
    HaloSize,
    KernelMemory,
    Meaning,
    Op,
    Operand,
    Space,
    Tensor,
)
from autopar.rules.notation import Rule, argument, broadcast, grouped, letters, named, operand, per_point, space

_LEADING = {0: [], 1: ["n"], 2: ["b", "s"]}


def weight_and_bias(op: Op) -> Facts:
    """Facts of an op that reads an input, a weight and perhaps a bias."""
    return Facts(weights=tuple(range(1, len(op.operands))))


def linear(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``b s i, o i, o -> b s o``."""
    rank = len(operands[0].shape) - 1
    leading = _LEADING.get(rank, letters(rank))
    inner, outer = ("i", "o") if rank < 3 else ("in", "out")  # letters may hold i and o
    left = [[*leading, inner], [outer, inner], [outer]][: len(operands)]
    return space(
        op,
        operands,
        left,
        [[*leading, outer]],
        flops=2.0,
        family=Family.MATMUL,
        added=[2] if len(operands) == 3 else [],
        facts=weight_and_bias(op),
    )


def addmm(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``n, m k, k n -> m n``."""
    bias = broadcast(operands[0].shape, ["m", "n"], op.results[0].shape)
    left = [bias, ["m", "k"], ["k", "n"]]
    return space(op, operands, left, [["m", "n"]], flops=2.0, family=Family.MATMUL, added=[0], facts=Facts(weights=(2, 0)))


def baddbmm(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``b m n, b m k, b k n -> b m n``."""
    result = ["b", "m", "n"]
    bias = broadcast(operands[0].shape, result, op.results[0].shape)
    return space(op, operands, [bias, ["b", "m", "k"], ["b", "k", "n"]], [result], flops=2.0, family=Family.MATMUL, added=[0])


def _product(op: Op, operands: tuple[Tensor, ...], facts: Facts) -> Space:
    first, second = (tensor.shape for tensor in operands)
    rows = ["m"] if len(first) > 1 else []
    columns = ["n"] if len(second) > 1 else []
    full = op.results[0].shape
    batch = full[: len(full) - len(rows) - len(columns)]
    leading = [f"b{dim}" for dim in range(len(batch))] if len(batch) != 1 else ["b"]
    left = [[*broadcast(first[:-2], leading, batch), *rows, "k"], [*broadcast(second[:-2], leading, batch), "k", *columns]]
    return space(op, operands, left, [[*leading, *rows, *columns]], flops=2.0, family=Family.MATMUL, facts=facts)


def matmul(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``b m k, b k n -> b m n`` with broadcast leading dims; a vector lacks m or n. Also mm and bmm."""
    return _product(op, operands, Facts(weights=(1,)))


def vector_product(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``m k, k -> m`` and ``k, k ->``: mv and dot, whose weight gradients can't wait."""
    return _product(op, operands, Facts())


def einsum(op: Op, operands: tuple[Tensor, ...]) -> Space | None:
    """The equation's letters are the loops; no repeated letter within a tensor. An ellipsis stands for leading dims aligned at the last."""
    equation = str(argument(op, 0, "equation")).replace(" ", "")
    terms, arrow, result = equation.partition("->")
    counts = [len(tensor.shape) - len(term) + 3 if "..." in term else 0 for term, tensor in zip(terms.split(","), operands, strict=True)]
    spare = [letter for letter in ascii_letters if letter not in equation][: max(counts, default=0)]
    inputs = [term.replace("...", "".join(spare[len(spare) - count :])) for term, count in zip(terms.split(","), counts, strict=True)]
    result = result.replace("...", "".join(spare))
    if not arrow or any(len(set(part)) != len(part) for part in [*inputs, result]):
        return None
    sizes: dict[str, int] = {}
    for part, tensor in zip(inputs, operands, strict=True):
        for name, size in zip(part, tensor.shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 1))
    left = [
        [name if size == sizes[name] else "1" for name, size in zip(part, tensor.shape, strict=True)]
        for part, tensor in zip(inputs, operands, strict=True)
    ]
    return space(op, operands, left, [list(result)], flops=2.0 if len(operands) > 1 else 1.0, family=Family.MATMUL)


def _attention_dims(operands: tuple[Tensor, ...], rank: int) -> tuple[list[str], list[str], dict[str, int], list[str]]:
    """Dims of the leading dims of q and of k and v, the loops' sizes, and the names of all loops q has before its rows.

    Heads of q are ``(g r)`` when k and v have fewer heads, each serving a group of r heads of q.
    """
    queries, keys = operands[0].shape, operands[1].shape
    outer = ["b"] if rank == 4 else [f"b{dim}" for dim in range(max(0, rank - 3))]
    if rank < 3:
        return [], [], {}, []
    heads, kv_heads = queries[-3], keys[-3]
    if heads == kv_heads:
        return [*outer, "h"], [*outer, "h"], {}, [*outer, "h"]
    ratio = heads // kv_heads
    sizes = {"g": kv_heads, "r": ratio}
    return [*outer, grouped(("g", kv_heads), ("r", ratio))], [*outer, grouped(("g", kv_heads))], sizes, [*outer, "g", "r"]


RING = "ring"
"""Loop of an attention whose queries and keys are of the same tokens: splitting it splits both, and keys and values travel."""


def _attention(
    op: Op,
    operands: tuple[Tensor, ...],
    extra: Sequence[tuple[int, list[str]]],
    kernel: str,
    *,
    positioned: bool,
    dropped: bool,
    triangular: bool,
    window: int | None = None,
) -> Space | None:
    rank = len(operands[0].shape)
    if any(len(tensor.shape) != rank for tensor in operands[:3]) or operands[1].shape[:-2] != operands[2].shape[:-2]:
        return None
    if operands[0].shape[:-3] != operands[1].shape[:-3]:
        return None
    queries, keys, sizes, leading = _attention_dims(operands, rank)
    left = [[*queries, "s", "d!"], [*keys, "t!", "d!"], [*keys, "t!", "e!"]]
    length = operands[1].shape[-2]
    score_shape = (*operands[0].shape[:-1], length)
    # The keys of masks have a loop of their own: a ring needs them whole.
    tokens = [*queries, "s", "u!"]
    for index, dims in extra:
        left.append(dims or broadcast(operands[index].shape, tokens, score_shape))
    depth, width = operands[0].shape[-1], operands[2].shape[-1]
    loops = [*(name for name in leading if sizes.get(name, 2) > 1), "s"]
    repeats = length if any("u!" in dims for dims in left) else 1
    heads = [name for name in leading if sizes.get(name, 2) > 1]
    refusal = _refuse_ring(operands, [index for index, _ in extra], dropped=dropped)
    is_ring = not refusal
    # A row attends to so many keys before it; keys on both sides of it make one trip, which takes all that is between.
    halo = HaloSize(window - 1, 0, length) if window is not None and window <= length else None
    ring = _ring_facts(operands, heads, halo) if is_ring else {}
    kernel_loops = loops if dropped else ["s"] if positioned else []
    return space(
        op,
        operands,
        left,
        [[*queries, "s", "e!"]],
        sizes={name: size for name, size in sizes.items() if size > 1},
        # Scores cost 2 d and the weighted sum 2 e per pair of query and key; the space has both loops, and that of the masks' keys.
        flops=2.0 * (depth + width) / (depth * width * repeats),
        family=Family.ATTENTION,
        kernel=kernel if positioned or dropped or is_ring else None,
        kernel_loops=[*kernel_loops, RING] if is_ring else kernel_loops,
        positional=[*(["s"] if positioned else []), *([RING] if is_ring else [])],
        random=dropped,
        joined={RING: ("s", "t")} if is_ring else {},
        facts=Facts(
            meanings=dict.fromkeys({"h", "g", "r"}.intersection(loops), Meaning.HEADS),
            triangular=frozenset({"s", RING} if is_ring else {"s"}) if triangular else frozenset(),
            ring_refusal=refusal,
            **ring,
        ),
    )


def _refuse_ring(operands: tuple[Tensor, ...], masks: Sequence[int], *, dropped: bool) -> str:
    """Why the rows and keys of an attention can't be split together; empty where they can."""
    rows, keys = operands[0].shape[-2], operands[1].shape[-2]
    if len(operands[0].shape) != 4:
        return "its queries aren't (batch, heads, rows, head size)"
    if rows != keys:
        return f"it has {rows} rows and {keys} keys"
    if any(operands[index].requires_grad for index in masks):
        return "what is added to its scores needs a gradient"
    return "it drops weights at random" if dropped else ""


def _ring_facts(operands: tuple[Tensor, ...], heads: Sequence[str], halo: HaloSize | None) -> dict[str, Any]:
    """What the kernel of a ring sends, saves and needs.

    Forward and backward, keys and values go from rank to rank; in the backward their gradients too, of at least float32. With a window,
    only those of a `halo`.
    """
    query, key, value = operands[:3]
    itemsize = ITEMSIZE[key.dtype]
    wide = max(itemsize, 4)
    shared = [name for name in heads if name != "r"]
    sent = ((("d",), key.shape[-1]), (("e",), value.shape[-1]))
    exchanges = [
        Exchange(frozenset({RING}), "ring", (*shared, RING, *depth), forward=forward, backward=1, itemsize=size, is_hidden=True, halo=halo)
        for depth, _ in sent
        for forward, size in ((1, itemsize), (0, wide))
    ]
    # Per row and element of a value: the result so far, or the gradient of q; then the keys and values of two stops, and in the backward
    # their gradients twice, of which grouped heads have fewer.
    ratio = query.shape[1] / key.shape[1]
    memory = KernelMemory(
        frozenset({RING}),
        frozenset({0, 1, 2}),
        (*heads, RING, "e"),
        forward=wide + math.ceil(4 * itemsize / ratio),
        backward=wide + math.ceil((4 * itemsize + 4 * wide) / ratio),
        saved=math.ceil(wide * query.shape[-2] / (2 * value.shape[-1])),
    )
    return {"exchanges": tuple(exchanges), "kernel_memory": memory}


def scaled_dot_product_attention(op: Op, operands: tuple[Tensor, ...]) -> Space | None:
    """``b (g r) s d!, b g t! d!, b g t! e! -> b (g r) s e!``; rows of a causal mask need their position."""
    mask = operand(op, 3, "attn_mask")
    extra: list[tuple[int, list[str]]] = [] if mask is None else [(mask, [])]
    causal, dropped = bool(argument(op, 5, "is_causal", False)), bool(argument(op, 4, "dropout_p", 0.0))
    return _attention(op, operands, extra, "scaled_dot_product_attention", positioned=causal, dropped=dropped, triangular=causal)


def attention(op: Op, operands: tuple[Tensor, ...]) -> Space | None:
    """The same for `autopar.ops.attention.attention`, with a mask of keys ``b t!`` and a bias that broadcasts to the scores."""
    extra: list[tuple[int, list[str]]] = []
    padding, bias = operand(op, 3, "key_padding"), operand(op, 4, "bias")
    if padding is not None:
        extra.append((padding, ["b" if operands[padding].shape[0] == operands[0].shape[0] else "1", "u!"]))
    if bias is not None:
        extra.append((bias, []))
    causal, window = bool(argument(op, 5, "causal", False)), argument(op, 6, "window")
    dropped = bool(argument(op, 9, "dropout_p", 0.0))
    triangular = causal and window is None
    return _attention(
        op,
        operands,
        extra,
        "attention",
        positioned=causal or window is not None,
        dropped=dropped,
        triangular=triangular,
        window=window if causal else None,
    )


def bilinear(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``n l, n r, o l r, o -> n o``: a sum over the products of all pairs of features."""
    leading = letters(len(operands[0].shape) - 1)
    left = [[*leading, "left"], [*leading, "right"], ["out", "left", "right"], ["out"]][: len(operands)]
    added = [3] if len(operands) == 4 else []
    return space(op, operands, left, [[*leading, "out"]], flops=2.0, family=Family.MATMUL, added=added)


def cdist(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``b p m!, b r m! -> b p r``: distances of all pairs.

    How they are computed depends on the numbers of points, which the kernel knows.
    """
    first, second, full = operands[0].shape, operands[1].shape, op.results[0].shape
    leading = letters(len(full) - 2)
    left = [
        [*broadcast(first[:-2], leading, full[:-2]), "points", "m!"],
        [*broadcast(second[:-2], leading, full[:-2]), "references", "m!"],
    ]
    by_size = argument(op, 2, "p", 2.0) == 2.0 and argument(op, 3, "compute_mode") in (None, 0)
    return space(
        op,
        operands,
        left,
        [[*leading, "points", "references"]],
        flops=3.0,
        kernel="cdist" if by_size else None,
        kernel_loops=["points", "references"] if by_size else [],
    )


def recurrent_cell(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``n i!, n h!, ..., weights -> n o!``: a step of a recurrent layer; samples are independent, the rest stays whole."""
    states = argument(op, 1, "hx")
    count = len(states) if isinstance(states, tuple | list) else 1
    weights = operands[1 + count :]
    names = [[f"w{index}_{dim}!" for dim in range(len(tensor.shape))] for index, tensor in enumerate(weights)]
    left = [["n", "i!"], *(["n", f"h{index}!"] for index in range(count)), *names]
    right = [["n", f"o{index}!"] for index in range(len(op.results))]
    total = 2.0 * operands[0].shape[0] * sum(tensor.numel for tensor in weights if len(tensor.shape) == 2)
    shapes = [operands[0].shape, *(tensor.shape[-1:] for tensor in (*operands[1 : 1 + count], *op.results)), *(t.shape for t in weights)]
    return space(op, operands, left, right, flops=per_point(total, *shapes), family=Family.MATMUL)


def recurrent(op: Op, operands: tuple[Tensor, ...]) -> Space | None:
    """``b t! i!, l! b h!, ..., weights -> b t! o!, l! b h!``: sequences of a batch are independent, the rest stays whole."""
    states = argument(op, 1, "hx")
    states = [states] if isinstance(states, Operand) else list(states)
    dropout, training, batch_first = (
        float(argument(op, 5, "dropout")),
        bool(argument(op, 6, "train")),
        bool(argument(op, 8, "batch_first")),
    )
    if len(operands[0].shape) != 3:
        return None
    order = ["b", "t!"] if batch_first else ["t!", "b"]
    state = ["l!", "b", "h!"]
    weights = operands[1 + len(states) :]
    names = [[f"w{index}_{dim}!" for dim in range(len(tensor.shape))] for index, tensor in enumerate(weights)]
    # A projected LSTM's hidden and cell states differ in width.
    states_dims = [["l!", "b", f"h{index}!"] for index in range(len(states))]
    right = [[*order, "o!"], *states_dims[: len(op.results) - 1]] if len(states) > 1 else [[*order, "o!"], state]
    if len(states) == 1:
        states_dims = [state]
    steps = operands[0].shape[0] * operands[0].shape[1]
    shapes = [operands[0].shape, *(operands[1 + index].shape[2:] for index in range(len(states))), *(t.shape for t in weights)]
    layers = operands[1].shape[:1]
    total = 2.0 * steps * sum(tensor.numel for tensor in weights if len(tensor.shape) == 2)
    random = dropout > 0 and training
    return space(
        op,
        operands,
        [[*order, "i!"], *states_dims, *names],
        right,
        flops=per_point(total, *shapes, layers, op.results[0].shape[-1:]),
        family=Family.MATMUL,
        kernel_loops=["b"] if random else [],
        random=random,
    )


RULES: dict[str, Rule] = {
    "aten.linear.default": linear,
    "aten.addmm.default": addmm,
    "aten.baddbmm.default": baddbmm,
    **named("aten.matmul.default aten.mm.default aten.bmm.default", matmul),
    **named("aten.mv.default aten.dot.default", vector_product),
    "aten.einsum.default": einsum,
    "aten.scaled_dot_product_attention.default": scaled_dot_product_attention,
    "autopar.attention.default": attention,
    "aten.bilinear.default": bilinear,
    "aten.cdist.default": cdist,
    **named("aten.lstm.input aten.gru.input aten.rnn_tanh.input aten.rnn_relu.input", recurrent),
    **named(
        "aten.lstm_cell.default aten.gru_cell.default aten.rnn_tanh_cell.default aten.rnn_relu_cell.default",
        recurrent_cell,
    ),
}
