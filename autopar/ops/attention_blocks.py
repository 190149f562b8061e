"""Attention of some rows to some keys, with the logarithm of each row's sum of exponentials, and its gradients given the whole row's.

Comes in: queries, and a block of the keys and values. Goes out: the block's result and log-sum-exp, from which `merge` makes the result of
several blocks; in the backward the gradients of a block, of which those of the rows add up over blocks (Dao et al. 2022, section 3 and
appendix B). A fused kernel of torch does both where one takes the block's mask, and products of all scores elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autopar import torch_attention


@dataclass(frozen=True, slots=True)
class Scores:
    """How scores are made of the products of queries and keys.

    Attributes:
        scale: their factor.
        softcap: they become ``softcap * tanh(scores / softcap)`` before they are masked; None leaves them.
    """

    scale: float
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class BlockMask:
    """Which keys of a block its rows attend to, and what is added to their scores.

    Attributes:
        is_causal: row i attends to keys 0..i of the block; nothing else is masked then.
        allowed: bool, broadcasts to (batch, heads, rows, keys), True attends; None for all.
        bias: added to the scores, broadcasts likewise; None for nothing.
        shift: taken off the scores then, (..., rows, 1); None for nothing. Weights don't depend on it, but a log-sum-exp of huge numbers
            loses how many keys have them (`find_shift`).
    """

    is_causal: bool = False
    allowed: Tensor | None = None
    bias: Tensor | None = None
    shift: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """Whether every row attends to every key."""
        return not self.is_causal and self.allowed is None and self.bias is None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scores: Scores) -> tuple[Tensor, Tensor]:
    """The result of rows over the keys of a block, and its log-sum-exp.

    Args:
        q: (batch, heads, rows, head size).
        k: (batch, key/value heads, keys, head size), not repeated; their heads divide those of q.
        v: (batch, key/value heads, keys, width).
        mask: of the block.
        scores: how scores are made.

    Returns:
        (batch, heads, rows, width) and (batch, heads, rows), both of at least float32; zeros and minus infinity for a row that attends to
        no key of the block.
    """
    q, k, v, mask, ratio = _group(q, k, v, mask)
    if _is_fused(q, v, mask, scores):
        added = _added(q, mask)
        result, lse = torch_attention.flash_attention(q, k, v, mask.is_causal, added, scores.scale)
        if added is not None:
            # Of a row that attends to no key of the block the kernel says 0.
            lse = lse.masked_fill((added == -torch.inf).all(-1), -torch.inf)
    else:
        weights, lse = _weigh(_score(q, k, mask, scores), None)
        result = weights @ v.to(weights.dtype)
    wide = torch.promote_types(q.dtype, torch.float32)
    return _ungroup(result.to(wide), ratio), _ungroup(lse.to(wide).unsqueeze(-1), ratio).squeeze(-1)


def attend_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, result: Tensor, lse: Tensor, mask: BlockMask, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v that come of one block of keys.

    Args:
        gradient: of the result of all blocks, (batch, heads, rows, width), in the dtype of q.
        q: of the block, as are the next two and the last two arguments, which are those of `attend`.
        k: keys.
        v: values.
        result: of all blocks, in the dtype of q.
        lse: of all blocks, (batch, heads, rows).
        mask: of the block.
        scores: how scores are made.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    q, k, v, mask, ratio = _group(q, k, v, mask)
    gradient, result, lse = (_fold(x, ratio) for x in (gradient, result, lse.unsqueeze(-1)))
    lse = lse.squeeze(-1)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)  # of a row that attends to nothing all weights are 0 so
    if _is_fused(q, v, mask, scores):
        gradients = torch_attention.flash_attention_backward(gradient, q, k, v, result, lse, mask.is_causal, _added(q, mask), scores.scale)
    else:
        gradients = _backward_of_products(gradient, q, k, v, result, lse, mask, scores)
    of_q, of_k, of_v = gradients
    if of_k.shape[1] != kv_heads:
        of_k, of_v = (torch.unflatten(x, 1, (kv_heads, heads // kv_heads)).sum(2) for x in (of_k, of_v))
    return _ungroup(of_q, ratio), of_k, of_v


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scores: Scores) -> Tensor:
    """The result of rows over keys, (batch, heads, rows, width), in operators that can be differentiated any number of times.

    Arguments are those of `attend`.
    """
    ratio = q.shape[1] // k.shape[1]
    masked = _score(q, k.repeat_interleave(ratio, 1), mask, scores)
    weights = torch.ops.aten._safe_softmax.default(masked, -1)
    result: Tensor = weights @ v.repeat_interleave(ratio, 1).to(weights.dtype)
    return result.to(q.dtype)


_HUGE = 1e3
"""Added scores from which on a shift is needed: a float32 of 1,000 has steps of 6e-5."""


def may_need_shift(bias: Tensor) -> bool:
    """Whether scores that this is added to may need a shift: some of it is huge. An accelerator's values aren't looked at: they may."""
    return bias.device.type != "cpu" or bool(_is_huge(bias).any())


def find_shift(bias: Tensor, allowed: Tensor) -> Tensor | None:
    """What scores are shifted by where the largest of a row is huge, as of a row of padding; None where no row needs it.

    A row that gets the same huge number for all of its keys attends to them alike, which blocks can be merged to only if their log-sum-exps
    still tell the numbers of keys.

    Args:
        bias: added to the scores of all keys, (..., rows, keys).
        allowed: bool, broadcasts to it, True attends.

    Returns the largest number that is added in each such row, and 0 in others, (..., rows, 1).
    """
    largest = torch.where(allowed, bias, -torch.inf).amax(-1, keepdim=True)
    is_huge = _is_huge(largest)
    if bias.device.type == "cpu" and not bool(is_huge.any()):
        return None
    return torch.where(is_huge, largest, 0.0)


def _is_huge(x: Tensor) -> Tensor:
    return x.isfinite() & (x.abs() > _HUGE)


def merge(result: Tensor, lse: Tensor, block_result: Tensor, block_lse: Tensor) -> None:
    """Bring the result and the log-sum-exp of a further block into those so far, in place."""
    total = torch.logaddexp(lse, block_lse)
    finite = total.masked_fill(total == -torch.inf, 0.0)
    result.lerp_(block_result, (block_lse - finite).exp_()[..., None])
    lse.copy_(total)


def _group(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> tuple[Tensor, Tensor, Tensor, BlockMask, int]:
    """The operands with as many heads of q as of k and v, and how many heads of q became rows of one.

    Heads that share keys become rows of one head where every row attends to every key; a mask would have to be repeated for that, so
    there the keys are.
    """
    ratio = q.shape[1] // k.shape[1]
    if ratio == 1:
        return q, k, v, mask, 1
    if mask.is_empty:
        return _fold(q, ratio), k, v, mask, ratio
    return q, k.repeat_interleave(ratio, 1), v.repeat_interleave(ratio, 1), mask, 1


def _fold(x: Tensor, ratio: int) -> Tensor:
    """(batch, groups * ratio, rows, width) -> (batch, groups, ratio * rows, width)."""
    return x if ratio == 1 else torch.unflatten(x, 1, (-1, ratio)).flatten(2, 3)


def _ungroup(x: Tensor, ratio: int) -> Tensor:
    """What `_fold` makes, back."""
    return x if ratio == 1 else torch.unflatten(x, 2, (ratio, -1)).flatten(1, 2)


def _is_fused(q: Tensor, v: Tensor, mask: BlockMask, scores: Scores) -> bool:
    """Whether a fused kernel computes the block."""
    is_masked = mask.allowed is not None or mask.bias is not None
    return (
        scores.softcap is None
        and mask.shift is None
        and q.shape[-1] == v.shape[-1]
        and torch_attention.has_flash_attention(q, is_masked=is_masked)
    )


def _added(q: Tensor, mask: BlockMask) -> Tensor | None:
    """The mask as what is added to scores."""
    if mask.allowed is None:
        return None if mask.bias is None else mask.bias.to(q.dtype)
    bias = q.new_zeros(()) if mask.bias is None else mask.bias.to(q.dtype)
    return torch.where(mask.allowed, bias, -torch.inf)


def _score(q: Tensor, k: Tensor, mask: BlockMask, scores: Scores) -> Tensor:
    """Masked scores, of at least float32."""
    products = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scores.scale
    if scores.softcap is not None:
        products = torch.tanh(products / scores.softcap) * scores.softcap
    if mask.is_causal:
        later = torch.ones(products.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        return products.masked_fill(later, -torch.inf)
    if mask.bias is not None:
        products = products + mask.bias
    if mask.shift is not None:
        products = products - mask.shift
    return products if mask.allowed is None else products.masked_fill(~mask.allowed, -torch.inf)


def _weigh(scores: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights of keys, and the log-sum-exp by which they were made: that of these scores, or one that is given."""
    own = torch.logsumexp(scores, -1) if lse is None else lse
    finite = own.masked_fill(own == -torch.inf, 0.0)
    return (scores - finite.unsqueeze(-1)).exp_(), own


def _backward_of_products(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, result: Tensor, lse: Tensor, mask: BlockMask, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_backward` of as many heads of k as of q, by products of all scores."""
    masked = _score(q, k, mask, scores)
    weights, _ = _weigh(masked, lse)
    wide = weights.dtype
    gradient, result = gradient.to(wide), result.to(wide)
    of_v = weights.mT @ gradient
    of_scores = weights * (gradient @ v.to(wide).mT - (gradient * result).sum(-1, keepdim=True))
    if scores.softcap is not None:
        capped = (q @ k.mT).to(wide) * scores.scale
        of_scores = of_scores * (1 - torch.tanh(capped / scores.softcap).square())
    of_scores = of_scores * scores.scale
    return of_scores @ k.to(wide), of_scores.mT @ q.to(wide), of_v
