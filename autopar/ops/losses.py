"""Kernels of means and losses, whose batch or vocabulary is split over ranks or micro-batches.

Comes in: this rank's part of the op's operands, and which axes split which loops. Goes out: over a split batch a summand of the mean, the
sum of the rank's own elements divided by the number of all elements (or of all tokens that count), so that the results are Partial; over a
split vocabulary the whole loss on every rank. `autopar.ops.kernels` says how kernels are called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.ops import comm
from autopar.ops.bounds import check_bounds
from autopar.ops.collectives import all_reduce
from autopar.ops.comm import Reduction

Splits = Mapping[str, tuple[str, ...]]
"""Name of each split loop -> the mesh axes that split it, outermost first."""

aten = torch.ops.aten


def all_axes(splits: Splits) -> tuple[str, ...]:
    """The axes that split any of the loops."""
    return tuple(axis for axes in splits.values() for axis in axes)


def reduce_over(x: Tensor, axes: Sequence[str], op: Reduction = "sum") -> Tensor:
    """The sum, or the maximum, of the ranks' `x` over several axes."""
    for axis in axes:
        x = comm.axis(axis).all_reduce(x, op)
    return x


def count_parts(splits: Splits) -> int:
    """The number of parts into which the splits divide the whole."""
    return comm.count(all_axes(splits))


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over elements of `dtype` are accumulated: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def mean(*args: Any, splits: Splits, **kwargs: Any) -> Tensor:
    """A summand of a mean: the local mean divided by the number of parts, which are of equal size. So are the mean losses below."""
    return torch.mean(*args, **kwargs) / count_parts(splits)


def mse_loss(*args: Any, splits: Splits, **kwargs: Any) -> Tensor:
    """A summand of a mean of squared differences."""
    loss: Tensor = aten.mse_loss.default(*args, **kwargs)
    return loss / count_parts(splits)


def l1_loss(*args: Any, splits: Splits, **kwargs: Any) -> Tensor:
    """A summand of a mean of absolute differences."""
    loss: Tensor = aten.l1_loss.default(*args, **kwargs)
    return loss / count_parts(splits)


def smooth_l1_loss(*args: Any, splits: Splits, **kwargs: Any) -> Tensor:
    """A summand of a mean smooth L1 loss."""
    loss: Tensor = aten.smooth_l1_loss.default(*args, **kwargs)
    return loss / count_parts(splits)


def huber_loss(*args: Any, splits: Splits, **kwargs: Any) -> Tensor:
    """A summand of a mean Huber loss."""
    loss: Tensor = aten.huber_loss.default(*args, **kwargs)
    return loss / count_parts(splits)


def binary_cross_entropy(*args: Any, splits: Splits, **kwargs: Any) -> Tensor:
    """A summand of a mean binary cross entropy of probabilities."""
    loss: Tensor = aten.binary_cross_entropy.default(*args, **kwargs)
    return loss / count_parts(splits)


def binary_cross_entropy_with_logits(*args: Any, splits: Splits, **kwargs: Any) -> Tensor:
    """A summand of a mean binary cross entropy of logits."""
    loss: Tensor = aten.binary_cross_entropy_with_logits.default(*args, **kwargs)
    return loss / count_parts(splits)


def kl_div(*args: Any, splits: Splits, **kwargs: Any) -> Tensor:
    """A summand of a mean of pointwise divergences."""
    loss: Tensor = aten.kl_div.default(*args, **kwargs)
    return loss / count_parts(splits)


def soft_margin_loss(*args: Any, splits: Splits, **kwargs: Any) -> Tensor:
    """A summand of a mean of logistic losses."""
    loss: Tensor = aten.soft_margin_loss.default(*args, **kwargs)
    return loss / count_parts(splits)


def multi_margin_loss(*args: Any, splits: Splits, **kwargs: Any) -> Tensor:
    """A summand of a mean over samples of their margins between one class and the others."""
    loss: Tensor = aten.multi_margin_loss.default(*args, **kwargs)
    return loss / count_parts(splits)


def multilabel_margin_loss(*args: Any, splits: Splits, **kwargs: Any) -> Tensor:
    """A summand of a mean over samples of their margins between several classes and the others."""
    loss: Tensor = aten.multilabel_margin_loss.default(*args, **kwargs)
    return loss / count_parts(splits)


def count_targets(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What a mean over tokens divides by: the number of tokens that count, or the sum of their classes' weights.

    Args:
        target: the class of every token, of any shape.
        weight: the weight of every class, (classes,), or None.
        ignore_index: the class of tokens that don't count.
    """
    target = target.long()
    counts = target != ignore_index
    # An ignored class may be negative, or beyond the table.
    return counts.sum() if weight is None else weight[target.masked_fill(~counts, 0)].masked_fill(~counts, 0.0).sum()


def count_all(target: Tensor, weight: Tensor | None, ignore_index: int, axes: Sequence[str], counted: Tensor | None) -> Tensor:
    """`count_targets` over the whole batch.

    Micro-batches can't be summed over, so where they split the tokens, `counted` is this rank's `count_targets` of all of them.
    """
    if counted is None:
        return reduce_over(count_targets(target, weight, ignore_index), axes)
    return reduce_over(counted, [axis for axis in axes if not isinstance(comm.axis(axis), comm.MicrobatchAxis)])


def nll_loss(
    log_probabilities: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    *,
    splits: Splits,
    counted: Tensor | None = None,
) -> Tensor:
    """A summand of the mean negative log likelihood over the tokens of the whole batch; arguments as for `cross_entropy`."""
    losses = F.nll_loss(log_probabilities, target, weight, ignore_index=ignore_index, reduction="none")
    return divide(losses, count_all(target, weight, ignore_index, all_axes(splits), counted))


def divide(losses: Tensor, count: Tensor | int) -> Tensor:
    """The sum of these losses, divided by the count. The sum of a batch may be beyond what a half-precision number can hold."""
    return (losses.sum(dtype=wider(losses.dtype)) / count).to(losses.dtype)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    *,
    splits: Splits,
    counted: Tensor | None = None,
) -> Tensor:
    """Cross entropy over parts of the tokens and of the vocabulary, without gathering logits.

    Args:
        logits: (tokens, vocabulary part, ...).
        target: (tokens, ...) classes of the whole vocabulary, or probabilities of the shape of `logits`.
        weight: (vocabulary,) or None; None when the vocabulary is split.
        reduction: 0 none, 1 mean, 2 sum.
        ignore_index: class of tokens that don't count.
        label_smoothing: share of the target that is spread over the vocabulary.
        splits: may split the vocabulary ``v`` and any loop of tokens; the mean is over the tokens of the whole batch.
        counted: `count_targets` of all micro-batches of this rank, when micro-batches split the tokens of a mean over classes.

    Returns the loss per token, complete on every rank of the vocabulary's axes, or a summand of the mean or sum. Raises IndexError for a
    class that isn't in the vocabulary.
    """
    vocabulary = splits.get("v", ())
    tokens = tuple(axis for loop, axes in splits.items() if loop != "v" for axis in axes)
    if vocabulary:
        losses: Tensor = _VocabularyCrossEntropy.apply(logits.movedim(1, -1), target, vocabulary, ignore_index, label_smoothing)  # type: ignore[no-untyped-call]
    else:
        losses = F.cross_entropy(logits, target, weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
    if reduction == 0:
        return losses
    if reduction == 2:
        return losses.sum()
    if target.is_floating_point():
        return divide(losses, target.numel() // target.shape[1] * comm.count(tokens))
    return divide(losses, count_all(target, weight, ignore_index, tokens, counted))


class _VocabularyCrossEntropy(torch.autograd.Function):
    """Loss per token from logits (..., vocabulary part), as in Megatron-LM's vocabulary-parallel cross entropy.

    The gradient ``softmax - target`` of `_loss_of_part` needs no further exchange between ranks.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, axes: tuple[str, ...], ignore_index: int, smoothing: float) -> Tensor:
        target = target.long()  # of uint8 classes, numbers beyond 255 couldn't be compared with
        counts = target != ignore_index
        size = logits.shape[-1] * comm.count(axes)
        check_bounds(target, size, "Target {index} is out of bounds.", ignored=~counts)
        first = comm.index(axes) * logits.shape[-1]
        loss, log_sum = _loss_of_part(logits, target - first, axes, smoothing)
        # Logits that anything else saves or returns take no memory here; the softmax always would.
        ctx.save_for_backward(logits, target, log_sum, counts)
        # The backward may run where the program's axes aren't active any more.
        ctx.axes, ctx.world = axes, comm.current()
        ctx.first, ctx.smoothing, ctx.size = first, smoothing, size
        return loss.masked_fill(~counts, 0.0).to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        logits, target, log_sum, counts = ctx.saved_tensors
        # The gradient of a mean over no tokens is infinite, and times zero it wouldn't be zero.
        wide_grad = grad.to(log_sum.dtype).masked_fill(~counts, 0.0)
        local = target - ctx.first
        if torch.is_grad_enabled():
            # What was saved is a number to autograd; for a second derivative the loss is computed again, in operations that it knows.
            with comm.active(ctx.world):
                loss, _ = _loss_of_part(logits, local, ctx.axes, ctx.smoothing)
            return *torch.autograd.grad(loss, logits, wide_grad, create_graph=True), None, None, None, None
        gradient = (logits.to(log_sum.dtype) - log_sum[..., None]).exp_()
        if ctx.smoothing:
            gradient -= ctx.smoothing / ctx.size
        place, is_local = place_of(local, logits.shape[-1])
        gradient.scatter_add_(-1, place, is_local.to(gradient.dtype) * (ctx.smoothing - 1.0))
        gradient *= wide_grad[..., None]
        return gradient.to(logits.dtype), None, None, None, None


def _loss_of_part(logits: Tensor, local: Tensor, axes: Sequence[str], smoothing: float) -> tuple[Tensor, Tensor]:
    """The loss per token, and the logarithm of the sum of the exponentials of all its logits, both in the dtype of sums.

    Over the whole vocabulary ``loss = log(sum(exp(logits))) - logits[target]``, so a few numbers per token are summed over the ranks, after
    their maximum. With label smoothing s the target is ``1 - s`` of the one-hot plus ``s / vocabulary`` everywhere.

    Args:
        logits: (..., vocabulary part).
        local: (...) each token's class, counted from the first of this part.
        axes: the axes that split the vocabulary.
        smoothing: share of the target that is spread over the vocabulary.
    """
    wide = logits.to(wider(logits.dtype))
    largest = reduce_over(wide.detach().amax(-1), axes, "max")
    shifted = wide - largest[..., None]
    place, is_local = place_of(local, logits.shape[-1])
    # Logits of minus infinity are no mistake (classes that are masked out), and times zero they wouldn't be zero.
    target_logit = shifted.gather(-1, place).masked_fill(~is_local, 0.0)[..., 0]
    sums = torch.stack([shifted.exp().sum(-1), target_logit, *([shifted.sum(-1)] if smoothing else [])])
    for axis in axes:
        sums = all_reduce(sums, axis)
    log_sum = sums[0].log()
    loss = log_sum - (1.0 - smoothing) * sums[1]
    if smoothing:
        loss = loss - smoothing / (logits.shape[-1] * comm.count(axes)) * sums[2]
    return loss, largest + log_sum


def place_of(local: Tensor, part: int) -> tuple[Tensor, Tensor]:
    """Where in this part of the vocabulary each token's class is, 0 where it isn't there, and whether it is; both are (..., 1)."""
    is_local = ((local >= 0) & (local < part))[..., None]
    return local[..., None].masked_fill(~is_local, 0), is_local
