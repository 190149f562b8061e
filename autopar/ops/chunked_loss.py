"""A linear head and its cross entropy as one operator, which never holds all logits.

Comes in: this rank's part of the hidden states, of the head's weight and of the targets. Goes out: the loss, as `autopar.ops.losses` gives
it. Logits (tokens x vocabulary), their copy in float32 and their gradient are what a step with a large vocabulary needs most memory for;
here they exist for one chunk at a time.

The backward computes the logits again instead of saving anything of their size, as Apple's cut cross entropy does (Wijmans et al. 2024,
"Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009). Liger-kernel (Hsu et al. 2024, arXiv 2410.10989) computes the
gradients in the forward, which saves one of four products. That was not taken, because

- the gradient of the weight would be held from the forward to the backward, by every micro-batch that is between the two, beside the
  gradient that they are added to; here nothing but a number per token is held;
- the gradient that arrives would be multiplied in afterwards, so with a loss scaled for float16 what is small is lost before it is scaled;
- a region that is run again (activation checkpointing) would compute all of it twice.

So the product is computed four times instead of three: forward, again, for the hidden states, for the weight.

A chunk is a part of the vocabulary, for all tokens, not a part of the tokens for the whole vocabulary. The weight is far larger than the
hidden states, and so it is read once instead of once per chunk; its gradient's rows are made by one product each, which is rounded once,
and only the gradient of the hidden states is added up, in at least float32; and ranks that split the vocabulary exchange a few numbers per
token once, not chunk by chunk. In turn the forward must scale its sum where a chunk has a larger logit than those before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.ops import comm
from autopar.ops.bounds import check_bounds
from autopar.ops.double_backward import refuse_double_backward
from autopar.ops.losses import Splits, count_all, divide, place_of, reduce_over, wider

Step = tuple[str, Any]
"""What a model does to its logits before the loss: a word of `STEPS`, and its argument (None without one)."""

STEPS: Mapping[str, Callable[[Tensor, Any], Tensor]] = {
    "to": lambda logits, dtype: logits.to(dtype),
    "div": lambda logits, number: logits / number,
    "mul": lambda logits, number: logits * number,
    "tanh": lambda logits, _: logits.tanh(),
}

# Chunks of the vocabulary are multiples of this many classes: matrices whose rows aren't aligned are multiplied by slower kernels.
_ALIGNED = 128


@dataclass(frozen=True, slots=True)
class _Call:
    """The settings of one call, as `linear_cross_entropy` has them; `axes` split the vocabulary."""

    ignore_index: int
    smoothing: float
    chunks: int
    steps: tuple[Step, ...]
    axes: tuple[str, ...]

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The logits as the loss reads them, in a tensor of their own: (tokens, classes)."""
        return self.after_head(F.linear(hidden, weight, bias))

    def after_head(self, logits: Tensor) -> Tensor:
        """The logits after all steps."""
        for name, argument in self.steps:
            logits = STEPS[name](logits, argument)
        return logits

    @property
    def only_casts(self) -> bool:
        """Whether the gradient passes the steps unchanged but for its dtype."""
        return all(name == "to" for name, _ in self.steps)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    chunks: int = 1,
    steps: Sequence[Step] = (),
    *,
    splits: Splits | None = None,
    counted: Tensor | None = None,
) -> Tensor:
    """``cross_entropy(steps(linear(hidden, weight, bias)), target)`` without all logits; it can't be differentiated twice.

    Where the vocabulary is split, the maximum, the sum of the exponentials and the logit of the target are combined over the axis
    (Megatron-LM, Shoeybi et al. 2019, section 3); the gradient of the hidden states is then a summand, Partial over the axis.

    Args:
        hidden: (tokens, features).
        weight: (vocabulary part, features).
        bias: (vocabulary part,), or None.
        target: (tokens,) classes of the whole vocabulary.
        reduction: 1 mean, 2 sum.
        ignore_index: class of tokens that don't count.
        label_smoothing: share of the target that is spread over the vocabulary.
        chunks: number of parts of this rank's vocabulary, whose logits are held one at a time.
        steps: what is done to the logits before the loss, in order; a cast to float32, for example.
        splits: may split the tokens ``n`` and the vocabulary ``v``; the mean is over the tokens of the whole batch.
        counted: `autopar.ops.losses.count_targets` of all micro-batches of this rank, when micro-batches split the tokens of a mean.

    Returns the loss, or this rank's summand of it where tokens are split. Raises IndexError for a class that isn't in the vocabulary.
    """
    splits = splits or {}
    call = _Call(ignore_index, label_smoothing, chunks, tuple(steps), tuple(splits.get("v", ())))
    losses: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, target, call)  # type: ignore[no-untyped-call]
    if reduction == 2:
        return losses.sum()
    return divide(losses, count_all(target, None, ignore_index, splits.get("n", ()), counted))


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss per token, in the dtype of the logits that the loss reads."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, call: _Call) -> Tensor:
        target = target.long()
        counts = target != call.ignore_index
        size = weight.shape[0] * comm.count(call.axes)
        check_bounds(target, size, "Target {index} is out of bounds.", ignored=~counts)
        local = target - comm.index(call.axes) * weight.shape[0]
        losses, log_sums = _loss_of_chunks(hidden, weight, bias, local, call, size)
        ctx.save_for_backward(hidden, weight, bias, local, counts, log_sums)
        ctx.call, ctx.size = call, size
        return losses.masked_fill_(~counts, 0.0).to(call.logits(hidden[:0], weight, bias).dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("a loss that is computed in chunks", "pin loss_chunks=1")
        hidden, weight, bias, local, counts, log_sums = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # The gradient of a mean over no tokens is infinite, and times zero it wouldn't be zero.
        wide_grad = grad.to(log_sums.dtype).masked_fill(~counts, 0.0)
        for_hidden = torch.zeros_like(hidden, dtype=wider(hidden.dtype)) if needs_hidden else None
        for_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs_weight else None
        for_bias = torch.empty_like(bias) if needs_bias else None
        for classes in _parts(len(weight), ctx.call.chunks):
            part, part_bias = weight[classes], None if bias is None else bias[classes]
            gradient = _gradient_of_part(hidden, part, part_bias, local - classes.start, log_sums, wide_grad, ctx.call, ctx.size)
            if for_hidden is not None:
                _add_product(for_hidden, gradient, part)
            if for_weight is not None:
                torch.mm(gradient.T, hidden, out=for_weight[classes])
            if for_bias is not None:
                torch.sum(gradient, 0, out=for_bias[classes])
            del gradient
        return None if for_hidden is None else for_hidden.to(hidden.dtype), for_weight, for_bias, None, None


def _parts(size: int, count: int) -> Iterator[slice]:
    """Consecutive parts of a range: `count` of one size, rounded up to `_ALIGNED`, so the last may be smaller and there may be fewer."""
    step = max(1, -(-size // (count * _ALIGNED)) * _ALIGNED)
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _loss_of_chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, local: Tensor, call: _Call, size: int) -> tuple[Tensor, Tensor]:
    """The loss per token, and the logarithm of the sum of the exponentials of all its logits, both in the dtype of sums.

    The sum so far is that of ``exp(logit - largest)``, where `largest` is the largest logit so far; a chunk with a larger one scales it
    (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", arXiv 1805.02867). So do ranks with their parts of it.

    Args:
        hidden: (tokens, features).
        weight: (vocabulary part, features).
        bias: (vocabulary part,), or None.
        local: (tokens,) each token's class, counted from the first of this part of the vocabulary.
        call: the settings.
        size: of the whole vocabulary.
    """
    dtype = wider(call.logits(hidden[:0], weight, bias).dtype)
    largest = torch.full(local.shape, -torch.inf, dtype=dtype, device=hidden.device)
    total, target_logit, all_logits = (torch.zeros_like(largest) for _ in range(3))
    for classes in _parts(len(weight), call.chunks):
        logits = call.logits(hidden, weight[classes], None if bias is None else bias[classes]).to(dtype)
        place, is_local = place_of(local - classes.start, logits.shape[-1])
        target_logit += logits.gather(-1, place).masked_fill_(~is_local, 0.0)[:, 0]
        if call.smoothing:
            all_logits += logits.sum(-1)
        before, largest = largest, torch.maximum(largest, logits.amax(-1))
        total = total * _scale(before, largest) + logits.sub_(_finite(largest)[:, None]).exp_().sum(-1)
        del logits  # before the next chunk's are made
    of_part, largest = largest, reduce_over(largest, call.axes, "max")
    sums = reduce_over(torch.stack([total * _scale(of_part, largest), target_logit, all_logits]), call.axes)
    log_sum = sums[0].log()
    loss = log_sum - (1.0 - call.smoothing) * (sums[1] - largest)
    if call.smoothing:
        loss -= call.smoothing * (sums[2] / size - largest)
    return loss, _finite(largest) + log_sum


def _finite(largest: Tensor) -> Tensor:
    """What logits are shifted by: their largest, or nothing where all are minus infinity (classes that are masked out)."""
    return largest.masked_fill(largest == -torch.inf, 0.0)


def _scale(before: Tensor, after: Tensor) -> Tensor:
    """By what a sum that is shifted by `before` is multiplied to be shifted by `after`."""
    return (before - _finite(after)).exp()


def _gradient_of_part(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, local: Tensor, log_sums: Tensor, grad: Tensor, call: _Call, size: int
) -> Tensor:
    """The gradient of the head's results for these classes, ``softmax - target`` times `grad`, in the head's dtype: (tokens, classes)."""
    if call.only_casts:
        gradient = call.logits(hidden, weight, bias).to(log_sums.dtype)
    else:
        head = F.linear(hidden, weight, bias).requires_grad_()
        with torch.enable_grad():
            logits = call.after_head(head)
        gradient = logits.detach().to(log_sums.dtype, copy=True)  # the steps may have saved theirs for their own backward
    gradient.sub_(log_sums[:, None]).exp_()
    if call.smoothing:
        gradient -= call.smoothing / size
    place, is_local = place_of(local, len(weight))
    gradient.scatter_add_(-1, place, is_local.to(gradient.dtype) * (call.smoothing - 1.0))
    gradient *= grad[:, None]
    if call.only_casts:
        return gradient.to(hidden.dtype)
    return torch.autograd.grad(logits, head, gradient.to(logits.dtype))[0]


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, where the total may be of a wider dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
