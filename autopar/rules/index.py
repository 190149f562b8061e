"""Rules of ops that look things up: embedding, gather, scatter, sorting; of losses, pools and constants."""

from __future__ import annotations

import re

from autopar.ir import ITEMSIZE, Exchange, Facts, Family, KernelMemory, Meaning, Op, Operand, Space, TargetMean, Tensor
from autopar.rules.notation import Rule, argument, broadcast, floats, letters, named, normal, operand, space

_MEAN, _SUM = 1, 2  # values of aten's `reduction` argument; 0 is none


def embedding(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``v h, b s -> b s h``: a part of the vocabulary gives the rows that it has and zeros for the others."""
    rank = len(operands[1].shape)
    indices = ["b", "s"] if rank == 2 else [f"i{dim}" for dim in range(rank)]
    by_frequency, sparse = argument(op, 3, "scale_grad_by_freq", False), argument(op, 4, "sparse", False)
    if by_frequency:  # the gradient counts how often a row occurs in the whole batch
        indices = [f"{name}!" for name in indices]
    rows, width = ("v!", "h") if by_frequency or sparse else ("v", "h")
    kernel = None if rows == "v!" else "embedding"
    loops = ["v"] if kernel else []
    left = [[rows, width], indices]
    return space(
        op,
        operands,
        left,
        [[*indices, width]],
        family=Family.LOOKUP,
        kernel=kernel,
        kernel_loops=loops,
        positional=loops,
        linear=floats(operands, 0),
        facts=Facts(weights=(0,), meanings={"v": Meaning.VOCABULARY}),
    )


def embedding_bag(op: Op, operands: tuple[Tensor, ...]) -> Space | None:
    """``v h, i!, o, i! -> o h, ...``: sums of looked-up rows; bags need their place among all bags' indices."""
    mode, sparse, by_frequency = (
        argument(op, 4, "mode", 0),
        argument(op, 5, "sparse", False),
        argument(op, 3, "scale_grad_by_freq"),
    )
    includes_last = argument(op, 7, "include_last_offset", False)
    if mode != 0 or sparse or by_frequency or includes_last or len(operands[1].shape) != 1:
        return None
    left = [["v", "h"], ["i!"], ["o"], ["i!"]][: len(operands)]
    # Besides the bags the op returns bookkeeping for its own backward, which nothing else reads.
    others = [[f"r{index}_{dim}!" for dim in range(len(result.shape))] for index, result in enumerate(op.results[1:])]
    return space(
        op,
        operands,
        left,
        [["o", "h"], *others],
        flops=1.0 / max(1, operands[0].shape[0]),
        family=Family.LOOKUP,
        kernel="embedding_bag",
        kernel_loops=["v", "o"],
        positional=["v", "o"],
        facts=Facts(coupled=frozenset("o")),
    )


def gather(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``b v!, b k -> b k``; a dim of which only a first part is looked up stays whole."""
    source, index = operands[0].shape, operands[1].shape
    dim = normal(argument(op, 1, "dim"), len(source)) if source else 0
    left, right = [], []
    for place, name in enumerate(letters(len(source))):
        if place == dim:
            left.append(f"{name}_all!")
            right.append(name)
        else:
            left.append(name if source[place] == index[place] else f"{name}_all!")
            right.append(name if source[place] == index[place] else f"{name}!")
    return space(op, operands, [left, right], [right], linear=floats(operands, 0))


def index_select(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``a v! c, k -> a k c``."""
    tokens = letters(len(operands[0].shape))
    dim = normal(argument(op, 1, "dim"), len(tokens))
    left, right = list(tokens), list(tokens)
    left[dim], right[dim] = "v!", "k"
    return space(op, operands, [left, ["k"]], [right], linear=floats(operands, 0))


def index(op: Op, operands: tuple[Tensor, ...]) -> Space | None:
    """``x! y! c, i j, j -> i j c``: integer indices broadcast together and replace the dims that they index."""
    where = argument(op, 1, "indices")
    shape = operands[0].shape
    given = [place for place, value in enumerate(where) if isinstance(value, Operand)]
    if not given or any(tensor.dtype in ("bool", "uint8") for tensor in operands[1:]):
        return None  # a mask makes a result whose size depends on the data
    together = given == list(range(given[0], given[0] + len(given)))
    rank = max(len(tensor.shape) for tensor in operands[1:])
    names = [f"i{dim}" for dim in range(rank)]
    place = given[0] if together else 0
    full = op.results[0].shape[place : place + rank]
    tokens = letters(len(shape))
    left = [f"{name}!" if dim in given else name for dim, name in enumerate(tokens)]
    kept = [name for dim, name in enumerate(tokens) if dim not in given]
    right = [*kept[:place], *names, *kept[place:]]
    looked_up = [broadcast(tensor.shape, names, full) for tensor in operands[1:]]
    return space(op, operands, [left, *looked_up], [right], linear=floats(operands, 0))


def scatter(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``b v!, b k!, b k! -> b v!``; also ``scatter_add``."""
    target, index_shape = operands[0].shape, operands[1].shape
    dim = normal(argument(op, 1, "dim"), len(target)) if target else 0
    left: list[list[str]] = [[] for _ in operands]
    for place, name in enumerate(letters(len(target))):
        sizes = [tensor.shape[place] for tensor in operands]
        whole = place == dim or target[place] != index_shape[place] or len(set(sizes)) > 1
        for number, dims in enumerate(left):
            dims.append(f"{name}{number}!" if whole and number else f"{name}!" if whole else name)
    return space(op, operands, left, [left[0]], flops=0.0)


def masked_scatter(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``a b, m0! m1!, n! -> a b``: where the mask is set, the next element of the source.

    Which that is depends on the mask before this part, so the kernel reads all of the mask, and all of the source.
    """
    tokens = letters(len(operands[0].shape))
    mask, source = ([f"{name}{dim}!" for dim in range(len(tensor.shape))] for name, tensor in zip("ms", operands[1:], strict=True))
    return space(op, operands, [tokens, mask, source], [tokens], kernel="masked_scatter", kernel_loops=tokens, positional=tokens)


def index_into(op: Op, operands: tuple[Tensor, ...]) -> Space | None:
    """``a v! c, k!, a k! c -> a v! c``: slices along one dim are added or replaced, by tensors or by a number."""
    if not all(tensor.shape for tensor in operands):
        return None  # scalars stand for vectors of one element
    tokens = letters(len(operands[0].shape))
    dim = normal(argument(op, 1, "dim"), len(tokens))
    target, source = list(tokens), list(tokens)
    target[dim], source[dim] = f"{tokens[dim]}!", "k!"
    left = [target, ["k!"], source][: len(operands)]
    linear = floats(operands, 0, 2) if "index_add" in op.target else ()
    return space(op, operands, left, [target], flops=0.0, linear=linear)


def one_hot(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``b s -> b s c!``."""
    tokens = letters(len(operands[0].shape))
    return space(op, operands, [tokens], [[*tokens, "class!"]])


def ordered(op: Op, operands: tuple[Tensor, ...], default: int = -1) -> Space:
    """``sort`` and ``argsort``: ``a b! -> a b!, a b!``."""
    rank = len(operands[0].shape)
    stable = op.target.endswith(".stable")
    dim = normal(op.kwargs.get("dim", -1) if stable else argument(op, 1, "dim", default), rank)
    tokens = [f"{name}!" if place == dim else name for place, name in enumerate(letters(rank))]
    return space(op, operands, [tokens], [tokens] * len(op.results), flops=1.0)


def topk(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``a b! -> a k!, a k!``."""
    tokens = letters(len(operands[0].shape))
    dim = normal(argument(op, 2, "dim", -1), len(tokens))
    left, right = list(tokens), list(tokens)
    left[dim], right[dim] = f"{tokens[dim]}!", "k!"
    return space(op, operands, [left], [right, right], flops=1.0)


def diff(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """Differences of neighbours along one dim, which stays whole in every tensor."""
    tokens = letters(len(operands[0].shape))
    dim = normal(argument(op, 2, "dim", -1), len(tokens))
    names = [f"{tokens[dim]}{number}!" for number in range(len(operands) + 1)]
    *left, right = ([*tokens[:dim], name, *tokens[dim + 1 :]] for name in names)
    return space(op, operands, left, [right], flops=1.0)


def _mean_over_targets(op: Op) -> TargetMean:
    return TargetMean(target=1, weight=operand(op, 2, "weight"), ignore_index=int(argument(op, 4, "ignore_index", -100)))


def cross_entropy(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``n v*, n ->``: a mean is over the tokens of the whole batch that count; vocabulary parts agree on maximum and sums."""
    logits, target = operands[:2]
    reduction, weighted = argument(op, 3, "reduction", _MEAN), operands[2:]
    rank = len(logits.shape)
    tokens = [] if rank == 1 else ["n", *(f"x{dim}" for dim in range(rank - 2))]
    by_class = len(target.shape) == rank
    # Class weights and class probabilities couple the whole vocabulary; a single token's loss isn't worth a kernel.
    split = not weighted and not by_class and rank > 1
    vocabulary = "v*" if split else "v!"
    left = [[*tokens[:1], vocabulary, *tokens[1:]], [*tokens[:1], vocabulary, *tokens[1:]] if by_class else tokens, ["v!"]]
    mean = tokens if reduction == _MEAN else []
    itemsize, wide = ITEMSIZE[logits.dtype], max(ITEMSIZE[logits.dtype], ITEMSIZE["float32"])
    cast = wide if itemsize < wide else 0
    # Logits less their maximum, and the exponentials of these. Saved are the logits, each token's class, and two numbers more.
    memory = KernelMemory(frozenset("v"), frozenset({0}), ("v", *tokens), forward=2 * wide + cast, backward=cast, saved=24)
    return space(
        op,
        operands,
        left[: len(operands)],
        [tokens if reduction == 0 else []],
        flops=5.0,
        family=Family.LOOKUP,
        kernel="cross_entropy" if split or mean else None,
        kernel_loops=[*(["v"] if split else []), *mean],
        positional=["v"] if split else [],
        facts=Facts(
            # Two statistics of each token's logits.
            exchanges=(Exchange(frozenset("v"), "all_reduce", tuple(tokens), forward=2, backward=2),) if split else (),
            meanings={"v": Meaning.VOCABULARY},
            kernel_memory=memory if split else None,
            target_mean=_mean_over_targets(op) if mean and not by_class else None,
        ),
    )


def nll_loss(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``n v!, n ->``, mean over the tokens of the whole batch that count."""
    rank = len(operands[0].shape)
    tokens = [] if rank == 1 else ["n", *(f"x{dim}" for dim in range(rank - 2))]
    reduction = argument(op, 3, "reduction", _MEAN)
    left = [[*tokens[:1], "v!", *tokens[1:]], tokens, ["v!"]]
    mean = tokens if reduction == _MEAN else []
    right = tokens if reduction == 0 else []
    return space(
        op,
        operands,
        left[: len(operands)],
        [right],
        flops=1.0,
        kernel="nll_loss" if mean else None,
        kernel_loops=mean,
        facts=Facts(meanings={"v": Meaning.VOCABULARY}, target_mean=_mean_over_targets(op) if mean else None),
    )


def elementwise_loss(op: Op, operands: tuple[Tensor, ...], position: int = 2) -> Space:
    """``a b, a b ->``: a sum or mean over all elements, or none."""
    reduction = argument(op, position, "reduction", _MEAN)
    # Inputs broadcast to the largest of them.
    full = max((tensor.shape for tensor in operands), key=len)
    full = tuple(max(sizes) for sizes in zip(*((1,) * (len(full) - len(t.shape)) + t.shape for t in operands), strict=True))
    tokens = letters(len(full))
    left = [broadcast(tensor.shape, tokens, full) for tensor in operands]
    mean = reduction == _MEAN
    right = tokens if reduction == 0 else []
    kernel = op.target.split(".")[1] if mean else None
    return space(op, operands, left, [right], flops=1.0, kernel=kernel, kernel_loops=tokens if mean else [])


def binary_cross_entropy(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """As `elementwise_loss`, with an optional weight in third place."""
    return elementwise_loss(op, operands, position=3)


def binary_cross_entropy_with_logits(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """As `elementwise_loss`, with an optional weight and weight of positives."""
    return elementwise_loss(op, operands, position=4)


def margin_loss(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``n v!, n -> `` or ``n v!, n v! -> ``: margins between the scores of all classes of a sample, summed or averaged over samples."""
    tokens = ["n"] if len(operands[0].shape) == 2 else []
    reduction = argument(op, 5 if "multi_margin" in op.target else 2, "reduction", _MEAN)
    targets = [*tokens, "v!"][: len(operands[1].shape)]
    mean = reduction == _MEAN and bool(tokens)
    return space(
        op,
        operands,
        [[*tokens, "v!"], targets, ["v!"]][: len(operands)],
        [tokens if reduction == 0 else []],
        flops=2.0,
        kernel=op.target.split(".")[1] if mean else None,
        kernel_loops=tokens if mean else [],
    )


def grid_sampler(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``n c y! x!, n q p xy! -> n c q p``: an image, read at given places."""
    spatial = range(len(operands[0].shape) - 2)
    image, places = [f"x{dim}!" for dim in spatial], [f"y{dim}" for dim in spatial]
    return space(op, operands, [["n", "c", *image], ["n", *places, "xy!"]], [["n", "c", *places]], flops=8.0)


def fractional_pool(op: Op, operands: tuple[Tensor, ...]) -> Space | None:
    """``n c y! x!, n c r! -> n c q! p!, n c q! p!``: the places of its windows are drawn before, for every channel of every sample."""
    spatial = len(operands[0].shape) - 2
    if f"pool{spatial}d" not in op.target:
        return None  # without a batch dim
    left, right = (["n", "c", *(f"{name}{dim}!" for dim in range(spatial))] for name in ("x", "y"))
    return space(op, operands, [left, ["n", "c", "r!"]], [right] * len(op.results))


def pool(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``n c y! x! -> n c q! p!``; without a batch dim ``c y! x! -> c q! p!``."""
    spatial = int(re.findall(r"(\d)d", op.target)[0])
    leading = letters(len(operands[0].shape) - spatial)
    left, right = ([*leading, *(f"{name}{dim}!" for dim in range(spatial))] for name in ("x", "y"))
    linear = floats(operands, 0) if "avg" in op.target else ()
    return space(op, operands, [left], [right] * len(op.results), linear=linear)


def upsample(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``n c y! x! -> n c q! p!``: interpolation between neighbours, by size or by factor."""
    spatial = len(operands[0].shape) - 2
    left, right = (["n", "c", *(f"{name}{dim}!" for dim in range(spatial))] for name in ("x", "y"))
    return space(op, operands, [left], [right], linear=floats(operands, 0))


def constant(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """Sizes and a value: every part makes its own. ``new_zeros`` and the like take nothing but the type from their operand."""
    tokens = letters(len(op.results[0].shape))
    left = [[f"other{dim}!" for dim in range(len(tensor.shape))] for tensor in operands]
    return space(op, operands, left, [tokens], shape_arg=1 if ".new_" in op.target else 0)


def sequence(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """Elements that differ by position, such as ``arange``: whole on every rank."""
    tokens = [f"{name}!" for name in letters(len(op.results[0].shape))]
    return space(op, operands, [], [tokens])


RULES: dict[str, Rule] = {
    "aten.embedding.default": embedding,
    **named("aten.embedding_bag.padding_idx aten.embedding_bag.default", embedding_bag),
    "aten.gather.default": gather,
    "aten.index_select.default": index_select,
    "aten.index.Tensor": index,
    **named("aten.scatter.src aten.scatter.value aten.scatter.reduce aten.scatter_add.default aten.scatter_reduce.two", scatter),
    "aten.masked_scatter.default": masked_scatter,
    **named("aten.index_add.default aten.index_copy.default aten.index_fill.int_Scalar", index_into),
    "aten.one_hot.default": one_hot,
    **named("aten.sort.default aten.sort.stable aten.argsort.default", ordered),
    "aten.topk.default": topk,
    "aten.diff.default": diff,
    "aten.cross_entropy_loss.default": cross_entropy,
    **named("aten.nll_loss.default aten.nll_loss_nd.default", nll_loss),
    **named("aten.mse_loss.default aten.l1_loss.default aten.smooth_l1_loss.default aten.huber_loss.default", elementwise_loss),
    **named("aten.kl_div.default aten.soft_margin_loss.default", elementwise_loss),
    **named("aten.multi_margin_loss.default aten.multilabel_margin_loss.default", margin_loss),
    "aten.grid_sampler.default": grid_sampler,
    **named("aten.fractional_max_pool2d.default aten.fractional_max_pool3d.default", fractional_pool),
    "aten.binary_cross_entropy.default": binary_cross_entropy,
    "aten.binary_cross_entropy_with_logits.default": binary_cross_entropy_with_logits,
    **named(
        """aten.max_pool1d.default aten.max_pool2d.default aten.avg_pool1d.default aten.avg_pool2d.default
        aten.adaptive_avg_pool1d.default aten.adaptive_avg_pool2d.default aten.max_pool3d.default aten.avg_pool3d.default
        aten.adaptive_avg_pool3d.default aten.max_pool1d_with_indices.default aten.max_pool2d_with_indices.default
        aten.max_pool3d_with_indices.default aten.adaptive_max_pool1d.default aten.adaptive_max_pool2d.default
        aten.adaptive_max_pool3d.default""",
        pool,
    ),
    **named(
        """aten.upsample_nearest1d.vec aten.upsample_nearest2d.vec aten.upsample_nearest3d.vec aten.upsample_linear1d.vec
        aten.upsample_bilinear2d.vec aten.upsample_bicubic2d.vec aten.upsample_trilinear3d.vec""",
        upsample,
    ),
    **named(
        """aten.zeros.default aten.ones.default aten.full.default aten.empty.memory_format aten.new_empty.default aten.new_zeros.default
        aten.new_ones.default aten.new_full.default""",
        constant,
    ),
    **named(
        """aten.arange.default aten.arange.start aten.arange.start_step aten.linspace.default aten.eye.default
        aten.tril_indices.default aten.triu_indices.default aten.scalar_tensor.default""",
        sequence,
    ),
}
