"""Functions that replace an op in a program where running the op itself on each rank's parts would give another result.

Comes in: the op's own arguments, each tensor being this rank's part, and ``splits``. Goes out: this rank's part of the results. `splits`
says for every split loop of `Space.kernel_loops` which mesh axes split it, outermost first; the rule of the op in `autopar.rules` names the
loops and the kernel. All are differentiable, and what they exchange goes through `autopar.ops.comm`::

    kernels.embedding(weight_part, tokens, splits={"v": ("tp",)})  # the table's rows are split over tp
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.ops import comm, rng
from autopar.ops.attention_blocks import Scores
from autopar.ops.bounds import check_bounds
from autopar.ops.chunked_loss import linear_cross_entropy as linear_cross_entropy
from autopar.ops.collectives import all_reduce
from autopar.ops.draws import bernoulli as bernoulli
from autopar.ops.draws import draw as draw
from autopar.ops.draws import dropout as dropout
from autopar.ops.draws import rand as rand
from autopar.ops.draws import rand_like as rand_like
from autopar.ops.draws import randn as randn
from autopar.ops.draws import randn_like as randn_like
from autopar.ops.halo import convolution as convolution
from autopar.ops.halo import padded_conv1d as padded_conv1d
from autopar.ops.losses import Splits, all_axes, count_parts, wider
from autopar.ops.losses import binary_cross_entropy as binary_cross_entropy
from autopar.ops.losses import binary_cross_entropy_with_logits as binary_cross_entropy_with_logits
from autopar.ops.losses import cross_entropy as cross_entropy
from autopar.ops.losses import huber_loss as huber_loss
from autopar.ops.losses import kl_div as kl_div
from autopar.ops.losses import l1_loss as l1_loss
from autopar.ops.losses import mean as mean
from autopar.ops.losses import mse_loss as mse_loss
from autopar.ops.losses import multi_margin_loss as multi_margin_loss
from autopar.ops.losses import multilabel_margin_loss as multilabel_margin_loss
from autopar.ops.losses import nll_loss as nll_loss
from autopar.ops.losses import smooth_l1_loss as smooth_l1_loss
from autopar.ops.losses import soft_margin_loss as soft_margin_loss
from autopar.ops.positions import Positions, Span
from autopar.ops.ring import attention_of_rows, ring_attention

aten = torch.ops.aten


# --- look-ups in a part of a table ------------------------------------------------------------------------------------------


def embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    splits: Splits,
) -> Tensor:
    """The rows of those indices that this part of the vocabulary has, and zeros for the other indices; the result is Partial.

    Args:
        weight: (vocabulary part, width).
        indices: rows of the whole table, of any shape.
        padding_idx: row of the whole table that gets no gradient; negative for none.
        scale_grad_by_freq: False; otherwise the rule doesn't let the table be split.
        sparse: False, likewise.
        splits: the axes that split ``v``, the vocabulary.

    Raises IndexError for an index that isn't in the whole table.
    """
    local, is_local = _local_rows(weight, indices, splits["v"])
    padding = padding_idx - comm.index(splits["v"]) * weight.shape[0]
    has_padding = padding_idx >= 0 and 0 <= padding < weight.shape[0]
    rows: Tensor = aten.embedding.default(weight, local, padding if has_padding else -1, False, False)
    return rows.masked_fill(~is_local[..., None], 0.0)


def _local_rows(weight: Tensor, indices: Tensor, axes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Indices into this rank's part of the table, 0 for rows that other ranks have; and a mask of those that this rank has.

    Raises IndexError for an index that isn't in the whole table.
    """
    check_bounds(
        indices, weight.shape[0] * comm.count(axes), f"index out of range in self: {{index}}, of {weight.shape[0] * comm.count(axes)} rows"
    )
    local = indices - comm.index(axes) * weight.shape[0]
    is_local = (local >= 0) & (local < weight.shape[0])
    return local.masked_fill(~is_local, 0), is_local


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    *,
    splits: Splits,
) -> tuple[Tensor]:
    """Sums of rows, for this rank's part of the bags (loop ``o``) and from its part of the table (loop ``v``: the result is Partial).

    Returns the sums alone: the op's other results are intermediate values that nothing reads.

    Args:
        weight: (vocabulary part, width).
        indices: (indices of all bags,).
        offsets: (bags of this part,): where each begins.
        scale_grad_by_freq: False; otherwise the rule doesn't let it be split.
        mode: 0, a sum.
        sparse: False.
        per_sample_weights: (indices,) or None.
        include_last_offset: False.
        padding_idx: row of the whole table that counts as zero; negative or None for none.
        splits: splits ``v``, ``o`` or both.

    Raises IndexError for an index that isn't in the whole table.
    """
    bags, vocabulary = splits.get("o", ()), splits.get("v", ())
    samples = torch.ones_like(indices, dtype=weight.dtype) if per_sample_weights is None else per_sample_weights
    is_summed = torch.ones_like(indices, dtype=torch.bool) if padding_idx is None or padding_idx < 0 else indices != padding_idx
    if vocabulary:
        indices, is_local = _local_rows(weight, indices, vocabulary)
        is_summed = is_summed & is_local
    if bags:
        starts = offsets
        for axis in reversed(bags):
            starts = torch.cat(comm.axis(axis).all_gather(starts))
        first_bag = comm.index(bags) * offsets.shape[0]
        begin = int(starts[first_bag])
        next_bag = first_bag + offsets.shape[0]
        end = int(starts[next_bag]) if next_bag < starts.shape[0] else indices.shape[0]
        indices, samples, offsets, is_summed = indices[begin:end], samples[begin:end], offsets - begin, is_summed[begin:end]
    # What isn't summed here goes to a bag of its own behind the others, since zero times a row that isn't finite isn't zero. Places are
    # computed without knowing how many there are, for which a GPU would have to be waited.
    counts = F.pad(is_summed.cumsum(0), (1, 0))
    behind = counts[-1] + torch.arange(indices.shape[0], device=indices.device) - counts[1:]
    places = torch.where(is_summed, counts[:-1], behind)
    indices = torch.zeros_like(indices).scatter(0, places, indices)
    samples = torch.zeros_like(samples).scatter(0, places, samples.masked_fill(~is_summed, 0.0))
    offsets = torch.cat([counts[offsets], counts[-1:]]).to(indices.dtype)
    results: tuple[Tensor, ...] = aten.embedding_bag.padding_idx(weight, indices, offsets, False, 0, False, samples, False, None)
    return (results[0][:-1],)


def masked_scatter(x: Tensor, mask: Tensor, source: Tensor, *, splits: Splits) -> Tensor:
    """This rank's part of a tensor in which the elements under a mask are replaced by those of `source`, in order.

    Args:
        x: a part of the tensor.
        mask: bool, all of the mask, which broadcasts to the whole tensor.
        source: all of it, of any shape.
        splits: loop, a letter per dim, to the axes that split the dim.

    Raises RuntimeError for a source of fewer elements than the mask selects.
    """
    axes = {ord(loop) - ord("a"): names for loop, names in splits.items()}
    whole = mask.expand([size * comm.count(axes.get(dim, ())) for dim, size in enumerate(x.shape)])
    selected = mask.sum() * (whole.numel() // max(1, mask.numel()))
    message = f"masked_scatter: the mask selects {{index}} elements, the source has {source.numel()}"
    check_bounds(selected, source.numel() + 1, message, error=RuntimeError)
    if not source.numel():
        return x.clone()
    part = whole
    for dim, names in axes.items():
        part = part.narrow(dim, comm.index(names) * x.shape[dim], x.shape[dim])
    if set(axes) == {0}:  # only what comes before this part must be counted
        before = whole[: comm.index(axes[0]) * x.shape[0]].sum()
        number = before + part.flatten().cumsum(0).view(part.shape)
    else:
        number = whole.flatten().cumsum(0).view(whole.shape)
        for dim, names in axes.items():
            number = number.narrow(dim, comm.index(names) * x.shape[dim], x.shape[dim])
    picked = source.flatten()[(number - 1).clamp(0, source.numel() - 1)]
    return torch.where(part, picked, x)


# --- attention of a part of the rows ----------------------------------------------------------------------------------------


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    splits: Splits,
    zigzag: bool = False,
) -> Tensor:
    """Attention of this rank's part of the query rows to all keys, with the causal mask of those rows.

    Args:
        q: (..., rows, head size), a part of the rows when ``s`` or ``ring`` is split.
        k: (..., keys, head size), all keys; those of this part's tokens when ``ring`` is split.
        v: (..., keys, head size of values).
        attn_mask: the mask of this part's rows.
        dropout_p: probability that an attention weight is dropped.
        is_causal: row i of the whole tensor attends to keys 0..i.
        scale: factor of the scores.
        enable_gqa: k and v have fewer heads than q.
        splits: the axes that split rows ``s``, or rows and keys ``ring``, and, where weights are dropped at random, batch and heads.
        zigzag: whether a part that ``ring`` makes has two pieces of the sequence.
    """
    positions = Positions.of(causal=is_causal, window=None)
    scores = Scores(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    made = _attend_by_blocks(q, k, v, None, attn_mask, positions, scores, dropout_p, splits, zigzag=zigzag)
    if made is not None:
        return made
    if is_causal and splits.get("s"):
        first_row = comm.index(splits["s"]) * q.shape[-2]
        # No row of this part attends to later keys.
        keys = min(first_row + q.shape[-2], k.shape[-2])
        k, v = k[..., :keys, :], v[..., :keys, :]
        attn_mask = torch.ones(q.shape[-2], keys, dtype=torch.bool, device=q.device).tril(first_row)
        is_causal = False
    with rng.stream(all_axes(splits), q.device) if dropout_p > 0.0 else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    *,
    splits: Splits,
    zigzag: bool = False,
) -> Tensor:
    """`autopar.ops.attention.attention` of this rank's part of the query rows to all keys.

    Masks that depend on positions, `causal` and `window`, are those of this part's rows.

    Args:
        q: (batch, heads, rows, head size), a part of the rows when ``s`` or ``ring`` is split.
        k: (batch, key/value heads, keys, head size), all keys; those of this part's tokens when ``ring`` is split.
        v: as `k`.
        key_padding: (batch, keys).
        bias: the mask, or the added scores, of this part's rows.
        causal: row i of the whole tensor attends to keys 0..i.
        window: as for `autopar.ops.attention.attention`.
        scale: factor of the scores.
        softcap: bound of the scores.
        dropout_p: probability that an attention weight is dropped.
        splits: the axes that split rows ``s``, or rows and keys ``ring``, and, where weights are dropped at random, batch and heads.
        zigzag: whether a part that ``ring`` makes has two pieces of the sequence.
    """
    positions = Positions.of(causal=causal, window=window)
    made = _attend_by_blocks(q, k, v, key_padding, bias, positions, Scores(scale, softcap), dropout_p, splits, zigzag=zigzag)
    if made is not None:
        return made
    if splits.get("s") and (causal or window is not None):
        rows, keys = q.shape[2], k.shape[2]
        allowed = positions.allow([Span(comm.index(splits["s"]) * rows, rows)], [Span(0, keys)], q.device)
        if bias is not None:
            allowed = bias & allowed if bias.dtype == torch.bool else bias.masked_fill(~allowed, -math.inf)
        bias = allowed
        causal, window = False, None
    with rng.stream(all_axes(splits), q.device) if dropout_p > 0.0 else nullcontext():
        result: Tensor = torch.ops.autopar.attention(q, k, v, key_padding, bias, causal, window, scale, softcap, dropout_p)
    return result


def _attend_by_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    bias: Tensor | None,
    positions: Positions,
    scores: Scores,
    dropout_p: float,
    splits: Splits,
    *,
    zigzag: bool,
) -> Tensor | None:
    """Attention of a part that leaves out what its mask excludes: over a ring, or to all keys. None where it can't, or excludes nothing."""
    if splits.get("ring"):
        (name,) = splits["ring"]
        return ring_attention(q, k, v, key_padding, bias, positions, scores, comm.axis(name), zigzag=zigzag, rotates=q.is_cuda)
    if not splits.get("s") or positions == Positions.of(causal=False, window=None):
        return None
    first_row = comm.index(splits["s"]) * q.shape[-2]
    if not _can_skip(q, k, v, bias, first_row, dropout_p):
        return None
    return attention_of_rows(q, k, v, key_padding, bias, positions, scores, first_row)


def _can_skip(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, first_row: int, dropout_p: float) -> bool:
    """Whether rows from `first_row` on can leave out what their mask excludes.

    They must be rows of the tokens that the keys are of, whose weights aren't dropped at random; `bias` gets no gradient so.
    """
    if q.dim() != 4 or first_row + q.shape[2] > k.shape[2] or dropout_p > 0.0:
        return False
    is_alike = q.shape[0] == k.shape[0] and k.shape[:2] == v.shape[:2]
    return is_alike and (bias is None or not bias.requires_grad)


# --- statistics of the whole batch ------------------------------------------------------------------------------------------


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
    *,
    splits: Splits,
) -> Tensor:
    """Batch norm in training whose mean and variance are those of the whole batch, as are the running statistics that it updates.

    Args:
        x: (batch part, channels part, ...).
        weight: (channels part,) or None.
        bias: (channels part,) or None.
        running_mean: (all channels,) or None, updated in place.
        running_var: (all channels,) or None, updated in place.
        training: True; in evaluation the op itself runs.
        momentum: share of the new statistics in the running ones.
        eps: added to the variance.
        cudnn_enabled: not used.
        splits: the axes that split the batch ``n``, the spatial dims and the channels ``c``.
    """
    axes = tuple(axis for loop, names in splits.items() if loop != "c" for axis in names)
    y, average, variance = _BatchNorm.apply(x, weight, bias, axes, eps)  # type: ignore[no-untyped-call]
    if running_mean is not None and running_var is not None:
        count = _values_per_channel(x, axes)
        # Of a single value the unbiased variance is 0 / 0.
        correction = count / (count - 1) if count > 1 else math.inf
        statistics = torch.stack([average, variance * correction], dim=1)
        for axis in reversed(splits.get("c", ())):
            statistics = torch.cat(comm.axis(axis).all_gather(statistics))
        with torch.no_grad():
            running_mean.lerp_(statistics[:, 0].to(running_mean.dtype), momentum)
            running_var.lerp_(statistics[:, 1].to(running_var.dtype), momentum)
    result: Tensor = y
    return result


class _BatchNorm(torch.autograd.Function):
    """This rank's normalised part, and the whole batch's mean and biased variance per channel; the statistics are differentiated too."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: tuple[str, ...], eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        centred, average, variance = _batch_statistics(x, axes)
        inverse = (variance + eps).rsqrt()
        y = centred * _per_channel(inverse, x)
        if weight is not None:
            y = y * _per_channel(weight.to(y.dtype), x)
        if bias is not None:
            y = y + _per_channel(bias.to(y.dtype), x)
        ctx.save_for_backward(x, weight, average, inverse)
        # The backward may run where the program's axes aren't active any more.
        ctx.axes, ctx.world = axes, comm.current()
        ctx.eps, ctx.bias_dtype = eps, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(average, variance)
        return y.to(x.dtype), average, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _average: Tensor, _variance: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        x, weight, average, inverse = ctx.saved_tensors
        wide_grad = grad.to(average.dtype)
        with comm.active(ctx.world):
            if torch.is_grad_enabled():
                # What was saved is a number to autograd; for a second derivative it must be known as a function of x.
                centred, average, variance = _batch_statistics(x, ctx.axes)
                inverse = (variance + ctx.eps).rsqrt()
            else:
                centred = x.to(average.dtype) - _per_channel(average, x)
            normalised = centred * _per_channel(inverse, x)
            # The parameters' own gradients stay sums over this part, which are Partial; what flows through the statistics is exchanged.
            local_sums = torch.stack([_sum_per_channel(wide_grad), _sum_per_channel(wide_grad * normalised)])
            means = _sum_over(local_sums, ctx.axes) / _values_per_channel(x, ctx.axes)
        centred_grad = wide_grad - _per_channel(means[0], x) - normalised * _per_channel(means[1], x)
        factor = inverse if weight is None else inverse * weight.to(inverse.dtype)
        weight_grad = None if weight is None else local_sums[1].to(weight.dtype)
        bias_grad = None if ctx.bias_dtype is None else local_sums[0].to(ctx.bias_dtype)
        return (centred_grad * _per_channel(factor, x)).to(x.dtype), weight_grad, bias_grad, None, None


def _batch_statistics(x: Tensor, axes: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """This part of a batch without its mean, and the whole batch's mean and biased variance per channel; in the dtype of sums."""
    wide, count = x.to(wider(x.dtype)), _values_per_channel(x, axes)
    average = _sum_over(_sum_per_channel(wide), axes) / count
    centred = wide - _per_channel(average, x)
    variance = _sum_over(_sum_per_channel(centred.square()), axes) / count
    return centred, average, variance


def _values_per_channel(x: Tensor, axes: Sequence[str]) -> int:
    """The number of values per channel in the whole batch."""
    return x.numel() // x.shape[1] * comm.count(axes)


def _sum_per_channel(x: Tensor) -> Tensor:
    return x.sum([dim for dim in range(x.dim()) if dim != 1])


def _sum_over(x: Tensor, axes: Sequence[str]) -> Tensor:
    """The sum of the ranks' `x` over several axes, of which every rank uses its own part's share."""
    for axis in axes:
        x = all_reduce(x, axis, grad="all_reduce")
    return x


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Values of (channels,) in a shape that broadcasts over `x`, whose dim 1 is the channels."""
    return values.view(1, -1, *([1] * (x.dim() - 2)))


# --- ops whose arguments count elements of a dim that is split ---------------------------------------------------------------


def slice_dim(x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1, *, splits: Splits) -> Tensor:
    """A slice of a dim that is split inside its outer blocks: this rank's part of the blocks that the slice selects.

    `start` and `end` count elements of the whole dim and are at the boundaries of blocks.
    """
    parts = count_parts(splits)
    begin, stop, _ = slice(start, end).indices(x.shape[dim] * parts)
    return x.narrow(dim, begin // parts, (stop - begin) // parts)


def narrow(x: Tensor, dim: int, start: int, length: int, *, splits: Splits) -> Tensor:
    """As `slice_dim`, with a start and a length."""
    return slice_dim(x, dim, start, (start + length) or None, splits=splits)


def split(x: Tensor, sizes: int | Sequence[int], dim: int = 0, *, splits: Splits) -> list[Tensor]:
    """This rank's part of every piece; `sizes` are those of pieces of the whole dim."""
    parts = count_parts(splits)
    local_sizes = sizes // parts if isinstance(sizes, int) else [size // parts for size in sizes]
    return list(x.split(local_sizes, dim))  # type: ignore[no-untyped-call]


def squeeze(x: Tensor, dim: int | Sequence[int] | None = None, *, splits: Splits) -> Tensor:
    """Drop dims of size 1, but not the split ones, whose whole size is larger; the loop ``d2`` is dim 2."""
    dims = range(x.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    split_dims = {int(loop[1:]) for loop in splits}
    return x.squeeze([d % x.dim() for d in dims if d % x.dim() not in split_dims])


def transposed_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    *,
    splits: Splits,
) -> Tensor:
    """As `convolution`, transposed."""
    function: Any = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}[x.dim()]
    result: Tensor = function(x, weight, bias, stride, padding, output_padding, groups // count_parts(splits), dilation)
    return result


def cdist(x: Tensor, y: Tensor, p: float = 2.0, compute_mode: int | None = None, *, splits: Splits) -> Tensor:
    """Euclidean distances of this part's pairs of points, as torch computes them for the whole: of many points by a product of matrices.

    The two ways round differently. `compute_mode` of the whole op is None or 0, which leaves the choice to torch.
    """
    points = x.shape[-2] * comm.count(splits.get("points", ()))
    references = y.shape[-2] * comm.count(splits.get("references", ()))
    result: Tensor = aten.cdist.default(x, y, p, 1 if max(points, references) > 25 else 2)
    return result
