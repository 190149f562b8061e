"""Rules of elementwise ops, casts, reductions, normalisation and random masks."""

from __future__ import annotations

from autopar.ir import Exchange, Facts, MicrobatchRefusal, Op, Space, Tensor
from autopar.rules.notation import Rule, argument, broadcast, floats, is_float, letters, named, normal, normals, operand, space


def pointwise(op: Op, operands: tuple[Tensor, ...], linear: tuple[int, ...] = (), flops: float = 1.0, view: bool = False) -> Space:
    """Elementwise with broadcasting: ``a b, b -> a b``."""
    full = op.results[0].shape
    tokens = letters(len(full))
    left = [broadcast(tensor.shape, tokens, full) for tensor in operands]
    return space(op, operands, left, [tokens], flops=flops, linear=linear, view=view)


def add(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """A sum or difference: sums of two Partial tensors are Partial; a number would be added once per part."""
    return pointwise(op, operands, linear=floats(operands, 0, 1) if len(operands) == 2 else ())


def multiply(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """A product, linear in the tensor that isn't broadcast."""
    which = 1 if len(operands) == 2 and operands[0].numel < operands[1].numel else 0
    return pointwise(op, operands, linear=floats(operands, which) if is_float(op.results[0]) else ())


def scale(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """An op that is linear in its first operand: a quotient, a change of sign."""
    return pointwise(op, operands, linear=floats(operands, 0))


def complex_(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """Complex numbers of given real and imaginary parts, jointly linear in both."""
    return pointwise(op, operands, linear=floats(operands, 0, 1))


def prelu(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``n c x, c -> n c x``: a slope per channel, or one slope for all."""
    tokens = letters(len(operands[0].shape))
    slopes = [tokens[1]] if operands[1].numel > 1 else ["1"] * len(operands[1].shape)
    return space(op, operands, [tokens, slopes], [tokens], flops=2.0)


def cast(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """A copy, perhaps of another type; a cast from floating point to something else isn't linear."""
    tokens = letters(len(operands[0].shape))
    # The other operand of type_as gives nothing but its type: no loop of the op runs over it.
    others = [[f"{name}!" for name in _names("other", tensor)] for tensor in operands[1:]]
    linear = floats(operands, 0) if is_float(op.results[0]) else ()
    return space(op, operands, [tokens, *others], [tokens], linear=linear)


def alias(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """The same tensor under another name."""
    return pointwise(op, operands, linear=floats(operands, 0), flops=0.0, view=True)


def where(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """A choice between two tensors, linear in both; with a number only when that number is zero."""
    values = [index for position, name in ((1, "self"), (2, "other")) if (index := operand(op, position, name)) is not None]
    numbers = [value for position in (1, 2) if isinstance(value := argument(op, position, ""), (int, float))]
    return pointwise(op, operands, linear=floats(operands, *values) if not any(numbers) else ())


def masked_fill(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """A tensor with some elements replaced; linear when they are replaced by zero."""
    value = argument(op, 2, "value")
    return pointwise(op, operands, linear=floats(operands, 0) if value == 0 else ())


def like(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """A constant tensor shaped as another."""
    return pointwise(op, operands, flops=0.0)


def triangle(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``tril`` and ``triu``: the last two dims are compared with each other, so both stay whole."""
    tokens = letters(len(operands[0].shape))
    tokens[-2:] = [f"{name}!" for name in tokens[-2:]]
    return space(op, operands, [tokens], [tokens], flops=1.0, linear=floats(operands, 0))


def _reduced(op: Op, operands: tuple[Tensor, ...], dims: tuple[int, ...], mark: str) -> tuple[list[str], list[list[str]]]:
    """Dims of the operand and of the results when `dims` are reduced; their loops carry `mark`."""
    shape = operands[0].shape
    tokens = [name + mark if dim in dims else name for dim, name in enumerate(letters(len(shape)))]
    keep = len(op.results[0].shape) == len(shape)
    kept = [token if dim not in dims else "1" for dim, token in enumerate(tokens) if keep or dim not in dims]
    return tokens, [kept] * len(op.results)


def reduce_sum(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """A sum: parts give Partial results."""
    dims = normals(argument(op, 1, "dim"), len(operands[0].shape))
    left, right = _reduced(op, operands, dims, "")
    return space(op, operands, [left], right, flops=1.0, linear=floats(operands, 0))


def reduce_mean(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """A mean: a part divides by the number of all elements, not of its own."""
    dims = normals(argument(op, 1, "dim"), len(operands[0].shape))
    left, right = _reduced(op, operands, dims, "")
    loops = [left[dim] for dim in dims]
    return space(op, operands, [left], right, flops=1.0, linear=floats(operands, 0), kernel="mean", kernel_loops=loops)


def reduce_whole(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """A reduction that isn't a sum; its dims stay whole."""
    dims = normals(argument(op, 1, "dim"), len(operands[0].shape))
    left, right = _reduced(op, operands, dims, "!")
    return space(op, operands, [left], right, flops=1.0)


def variance(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """Variance or standard deviation; without dims its second argument is the correction."""
    dims = argument(op, 1, "dim")
    left, right = _reduced(op, operands, normals(None if isinstance(dims, bool) else dims, len(operands[0].shape)), "!")
    return space(op, operands, [left], right, flops=3.0)


def vector_norm(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """A norm over some dims."""
    dims = normals(argument(op, 2, "dim"), len(operands[0].shape))
    left, right = _reduced(op, operands, dims, "!")
    return space(op, operands, [left], right, flops=2.0)


def cosine_similarity(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``a b!, a b! -> a``: the cosine of the angle between vectors along one dim."""
    rank = max(len(tensor.shape) for tensor in operands)
    full = tuple(max(sizes) for sizes in zip(*((1,) * (rank - len(tensor.shape)) + tensor.shape for tensor in operands), strict=True))
    dim = normal(argument(op, 2, "dim", 1), len(full))
    tokens = [f"{name}!" if position == dim else name for position, name in enumerate(letters(len(full)))]
    left = [broadcast(tensor.shape, tokens, full) for tensor in operands]
    return space(op, operands, left, [[token for position, token in enumerate(tokens) if position != dim]], flops=6.0)


def along(op: Op, operands: tuple[Tensor, ...], linear: tuple[int, ...] = (), flops: float = 1.0, facts: Facts | None = None) -> Space:
    """An op that mixes the elements of one dim and keeps the shape: ``a b! -> a b!``."""
    rank = len(operands[0].shape)
    dim = normal(argument(op, 1, "dim"), rank) if rank else 0
    tokens = [name + "!" if position == dim else name for position, name in enumerate(letters(rank))]
    return space(op, operands, [tokens], [tokens] * len(op.results), flops=flops, linear=linear, facts=facts)


def softmax(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``a b! -> a b!``: maximum, difference, exponential, sum and quotient over one dim."""
    return along(op, operands, flops=5.0, facts=Facts(softmax=True))


def transform(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """A Fourier transform over some dims: ``a b! -> a b_out!``."""
    dims = normals(argument(op, 1, "dim"), len(operands[0].shape))
    tokens = letters(len(operands[0].shape))
    left, right = ([f"{name}{mark}!" if dim in dims else name for dim, name in enumerate(tokens)] for mark in ("", "_out"))
    return space(op, operands, [left], [right], flops=5.0, linear=floats(operands, 0))


def stft(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``b t!, w! -> b f! s!``: the spectra of windows along the last dim; real and imaginary parts may be one more dim."""
    leading = letters(len(operands[0].shape) - 1)
    right = [f"spectrum{dim}!" for dim in range(len(op.results[0].shape) - len(leading))]
    return space(op, operands, [[*leading, "t!"], *([["w!"]] * (len(operands) - 1))], [[*leading, *right]], flops=5.0)


def cumsum(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """A running sum."""
    return along(op, operands, linear=floats(operands, 0))


def _names(prefix: str, tensor: Tensor) -> list[str]:
    return [f"{prefix}{dim}" for dim in range(len(tensor.shape))]


def layer_norm(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``b s h!, h!, h! -> b s h!``, also ``rms_norm``: the last dims are normalised."""
    rank = len(operands[0].shape)
    normalised = rank - len(argument(op, 1, "normalized_shape"))
    tokens = [name + "!" if dim >= normalised else name for dim, name in enumerate(letters(rank))]
    left = [tokens, *([tokens[normalised:]] * (len(operands) - 1))]
    return space(op, operands, left, [tokens], flops=8.0)


def weight_norm(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``o i! k!, o 1 1 -> o i! k!``: a direction of length one for each element of one dim, times its length; dim -1 has one length in all.

    Linear in the lengths.
    """
    full = operands[0].shape
    dim = argument(op, 2, "dim", 0)
    kept = None if dim == -1 else normal(dim, len(full))
    tokens = [name if position == kept else f"{name}!" for position, name in enumerate(letters(len(full)))]
    return space(op, operands, [tokens, broadcast(operands[1].shape, tokens, full)], [tokens], flops=3.0, linear=floats(operands, 1))


def instance_norm(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``n c x!, c, c -> n c x!``: every channel of every sample is normalised alone.

    With running statistics, ``n c x, c, c, c, c -> n c x`` where they are used; where they are updated, from the whole batch, all is whole.
    """
    spatial = [f"x{dim}" for dim in range(len(operands[0].shape) - 2)]
    given = (operand(op, position, name) for position, name in ((3, "running_mean"), (4, "running_var")))
    running = frozenset(index for index in given if index is not None)
    uses_input = bool(argument(op, 5, "use_input_stats"))
    mark = "!" if running and uses_input else ""
    tokens = [f"n{mark}", f"c{mark}", *(f"{name}!" if uses_input else name for name in spatial)]
    left = [tokens, *([[f"c{mark}"]] * (len(operands) - 1))]
    facts = Facts()
    if mark:
        facts = Facts(
            writes=running,
            microbatch_refusal=MicrobatchRefusal(
                "takes its running statistics over the whole batch", "make the layer with track_running_stats=False, put it into eval mode"
            ),
        )
    return space(op, operands, left, [tokens], flops=8.0, facts=facts)


def group_norm(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``n c! x!, c!, c! -> n c! x!``: channels stay whole because their groups are counted by an argument."""
    tokens = ["n", "c!", *(f"x{dim}!" for dim in range(len(operands[0].shape) - 2))]
    return space(op, operands, [tokens, *([["c!"]] * (len(operands) - 1))], [tokens], flops=8.0)


def batch_norm(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``n* c x*, c, c, r!, r! -> n* c x*`` in training, where the statistics are those of the whole batch.

    The running statistics are updated in place, so that a part of the channels needs them whole: the kernel updates all of them.
    In evaluation they are read like weights: ``n c x, c, c, c, c -> n c x``.
    """
    reduced = ["n", *(f"x{dim}" for dim in range(len(operands[0].shape) - 2))]
    if not argument(op, 5, "training", False):
        tokens = [reduced[0], "c", *reduced[1:]]
        return space(op, operands, [tokens, *([["c"]] * (len(operands) - 1))], [tokens], flops=8.0)
    tokens = [f"{reduced[0]}*", "c", *(f"{name}*" for name in reduced[1:])]
    left = [tokens, *([["c"]] * (len(operands) - 1))]
    given = (operand(op, position, name) for position, name in ((3, "running_mean"), (4, "running_var")))
    running = [index for index in given if index is not None]
    for index in running:
        left[index] = ["r!"]
    return space(
        op,
        operands,
        left,
        [tokens],
        flops=8.0,
        kernel="batch_norm",
        kernel_loops=["c"],
        positional=["c"],
        facts=Facts(
            writes=frozenset(running),
            # A mean and a variance per channel, and their gradients.
            exchanges=(Exchange(frozenset(reduced), "all_reduce", ("c",), forward=2, backward=2),),
            coupled=frozenset("c"),
            microbatch_refusal=MicrobatchRefusal(
                "takes its statistics over the whole batch",
                "use a norm that works on each sample (GroupNorm, LayerNorm), put this layer into eval mode",
            ),
        ),
    )


def _random(
    op: Op, operands: tuple[Tensor, ...], kernel: str | None, *, linear: tuple[int, ...] = (), shape_arg: int | None = None
) -> Space:
    tokens = letters(len(op.results[0].shape))
    left = [broadcast(tensor.shape, tokens, op.results[0].shape) for tensor in operands]
    return space(
        op,
        operands,
        left,
        [tokens],
        flops=1.0,
        linear=linear,
        kernel=kernel,
        kernel_loops=tokens,
        random=True,
        shape_arg=shape_arg,
    )


def dropout(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """A random mask; the identity when nothing can be dropped."""
    if not argument(op, 1, "p") or not argument(op, 2, "train"):
        return alias(op, operands)
    return _random(op, operands, "dropout", linear=floats(operands, 0))


def bernoulli(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """Zeros and ones, each drawn with its own or one common probability."""
    return _random(op, operands, "bernoulli")


def rand_like(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """Uniform numbers shaped as another tensor."""
    return _random(op, operands, "rand_like")


def randn_like(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """Normal numbers shaped as another tensor."""
    return _random(op, operands, "randn_like")


def rand(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """Uniform numbers of given sizes."""
    return _random(op, operands, "rand", shape_arg=0)


def randn(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """Normal numbers of given sizes."""
    return _random(op, operands, "randn", shape_arg=0)


def drawn(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """Random numbers in the shape of another tensor, each drawn alone: what an in-place op such as ``x.exponential_()`` becomes."""
    return _random(op, operands, None)


def drawn_integers(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """Random integers of given sizes; the sizes follow the bounds."""
    return _random(op, operands, None, shape_arg=2 if op.target.endswith(".low") else 1)


def permutation(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """A random order, whole on every rank."""
    return space(op, operands, [], [["a!"]], flops=1.0, random=True)


def multinomial(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """``b v! -> b k!``: classes drawn with the probabilities of each row."""
    tokens = letters(len(operands[0].shape) - 1)
    return space(op, operands, [[*tokens, "v!"]], [[*tokens, "k!"]], flops=1.0, kernel_loops=tokens, random=True)


def rrelu(op: Op, operands: tuple[Tensor, ...]) -> Space:
    """A slope that is drawn for each element in training, and is fixed in evaluation."""
    return _random(op, operands, None) if argument(op, 3, "training", False) else pointwise(op, operands)


_UNARY = """abs acos acosh asin asinh atan atanh bitwise_not ceil cos cosh elu erf erfc exp exp2 expm1 floor gelu
hardsigmoid hardswish hardtanh isinf isnan leaky_relu log log10 log1p log2 log_sigmoid logical_not mish
nan_to_num reciprocal relu relu6 round rsqrt selu sigmoid sign silu sin sinh softplus sqrt square tan tanh trunc
clamp clamp_min clamp_max logit sinc isfinite celu hardshrink softshrink threshold angle erfinv lgamma digamma frac
sgn"""

_COMPLEX = "aten.real.default aten.imag.default aten.conj.default aten._conj.default aten.resolve_conj.default aten.resolve_neg.default"

_DRAWN = """aten.exponential.default aten.uniform.default aten.normal_functional.default aten.log_normal.default aten.cauchy.default
        aten.geometric.default aten.random.default aten.random.from aten.random.to aten.poisson.default aten.randint_like.default
        aten.randint_like.low_dtype"""

_BINARY = """aten.polar.default aten.eq.Tensor aten.eq.Scalar aten.ne.Tensor aten.ne.Scalar aten.lt.Tensor aten.lt.Scalar aten.le.Tensor
        aten.le.Scalar aten.gt.Tensor aten.gt.Scalar aten.ge.Tensor aten.ge.Scalar aten.minimum.default
        aten.maximum.default aten.min.other aten.max.other aten.pow.Tensor_Tensor aten.pow.Tensor_Scalar
        aten.pow.Scalar aten.remainder.Tensor aten.remainder.Scalar aten.fmod.Tensor aten.fmod.Scalar
        aten.floor_divide.default aten.div.Tensor_mode aten.div.Scalar_mode aten.atan2.default
        aten.logical_and.default aten.logical_or.default aten.logical_xor.default aten.bitwise_and.Tensor
        aten.bitwise_or.Tensor aten.bitwise_xor.Tensor aten.bitwise_and.Scalar aten.bitwise_or.Scalar
        aten.__and__.Tensor aten.__or__.Tensor aten.__xor__.Tensor aten.addcmul.default aten.addcdiv.default
        aten.lerp.Tensor aten.lerp.Scalar aten.xlogy.Tensor aten.logaddexp.default aten.clamp.Tensor
        aten.clamp_min.Tensor aten.clamp_max.Tensor
        aten.rsub.Scalar
        aten.masked_fill.Tensor
aten.fill.Tensor aten.fill.Scalar"""

_CASTS = """aten.to.dtype aten.to.device aten.to.dtype_layout aten._to_copy.default aten.type_as.default aten.to.other
        aten.clone.default aten.contiguous.default aten.lift_fresh_copy.default"""

RULES: dict[str, Rule] = {
    **{f"aten.{name}.default": pointwise for name in _UNARY.split()},
    **named(_BINARY, pointwise),
    **named(_CASTS, cast),
    **named("aten.add.Tensor aten.add.Scalar aten.sub.Tensor aten.sub.Scalar aten.rsub.Tensor", add),
    **named("aten.mul.Tensor aten.mul.Scalar aten.multiply.Tensor aten.multiply.Scalar", multiply),
    **named("aten.div.Tensor aten.div.Scalar aten.neg.default", scale),
    **named(_COMPLEX, scale),
    "aten.complex.default": complex_,
    "aten.prelu.default": prelu,
    **named("aten.alias.default aten.detach.default", alias),
    **named("aten.where.self aten.where.ScalarOther aten.where.ScalarSelf aten.where.Scalar", where),
    "aten.masked_fill.Scalar": masked_fill,
    **named("aten.zeros_like.default aten.ones_like.default aten.full_like.default aten.empty_like.default", like),
    **named("aten.tril.default aten.triu.default", triangle),
    **named("aten.sum.default aten.sum.dim_IntList aten.nansum.default", reduce_sum),
    **named("aten.mean.default aten.mean.dim", reduce_mean),
    **named(
        """aten.amax.default aten.amin.default aten.max.default aten.max.dim aten.min.default aten.min.dim
        aten.argmax.default aten.argmin.default aten.prod.default aten.prod.dim_int aten.logsumexp.default
        aten.any.default aten.any.dim aten.all.default aten.all.dim""",
        reduce_whole,
    ),
    **named(
        """aten.var.default aten.var.dim aten.var.correction aten.std.default aten.std.dim aten.std.correction
        aten.var_mean.correction aten.std_mean.correction""",
        variance,
    ),
    **named("aten.linalg_vector_norm.default aten.norm.ScalarOpt_dim aten.norm.Scalar", vector_norm),
    "aten.cosine_similarity.default": cosine_similarity,
    **named("aten.softmax.int aten.log_softmax.int aten._softmax.default aten._log_softmax.default", softmax),
    "aten.cumsum.default": cumsum,
    **named("aten._fft_r2c.default aten._fft_c2r.default aten._fft_c2c.default", transform),
    **named("aten.stft.default aten.stft.center", stft),
    **named("aten.cumprod.default aten.logcumsumexp.default aten.cummax.default aten.cummin.default", along),
    **named("aten.layer_norm.default aten.rms_norm.default", layer_norm),
    "aten._weight_norm.default": weight_norm,
    "aten.instance_norm.default": instance_norm,
    "aten.group_norm.default": group_norm,
    "aten.batch_norm.default": batch_norm,
    "aten.dropout.default": dropout,
    **named("aten.bernoulli.default aten.bernoulli.p", bernoulli),
    "aten.rand_like.default": rand_like,
    "aten.randn_like.default": randn_like,
    "aten.rand.default": rand,
    "aten.randn.default": randn,
    **named(_DRAWN, drawn),
    **named("aten.randint.default aten.randint.low", drawn_integers),
    "aten.randperm.default": permutation,
    "aten.multinomial.default": multinomial,
    "aten.rrelu.default": rrelu,
    # Elementwise autograd functions of transformers, as `autopar.ops.FunctionCall` names them.
    **named(
        """autograd_function.transformers_models_bloom_modeling_bloom_GeLUFunction.T
        autograd_function.transformers_models_recurrent_gemma_modeling_recurrent_gemma_SqrtBoundDerivative.T""",
        pointwise,
    ),
}
