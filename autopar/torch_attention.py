"""Torch's fused attention kernels where they return the log-sum-exp of scores, which is private to torch."""

from __future__ import annotations

import torch
from torch import Tensor

_OPS = torch.ops.aten
_CPU_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
_CUDA_DTYPES = frozenset({torch.bfloat16, torch.float16})


def has_flash_attention(q: Tensor, *, is_masked: bool) -> bool:
    """Whether `flash_attention` takes queries of this device and dtype, with a mask of elements if `is_masked`."""
    if q.device.type == "cpu":
        return q.dtype in _CPU_DTYPES
    return q.device.type == "cuda" and not is_masked and q.dtype in _CUDA_DTYPES and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def flash_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, added: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(result, log-sum-exp) of attention.

    Args:
        q: (batch, heads, rows, head size).
        k: (batch, heads, keys, head size).
        v: the same for values.
        is_causal: row i attends to keys 0..i.
        added: to the scores, on a CPU alone; None for nothing.
        scale: factor of the scores.
    """
    if q.device.type == "cuda":
        result, lse, *_ = _OPS._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)
        return result, lse
    added = None if added is None else _as_cpu_mask(added)
    result, lse = _OPS._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=added, scale=scale)
    return result, lse


def flash_attention_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    result: Tensor,
    lse: Tensor,
    is_causal: bool,
    added: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; `result` and `lse` may be those of more keys than k has, and the gradients are then these keys' share."""
    if q.device.type == "cuda":
        none = torch.empty(0, dtype=torch.uint64, device=q.device)
        gradients = _OPS._scaled_dot_product_flash_attention_backward(
            gradient, q, k, v, result, lse, None, None, q.shape[-2], k.shape[-2], 0.0, is_causal, none, none, scale=scale
        )
    else:
        added = None if added is None else _as_cpu_mask(added)
        gradients = _OPS._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, q, k, v, result, lse, 0.0, is_causal, attn_mask=added, scale=scale
        )
    of_q, of_k, of_v = gradients
    return of_q, of_k, of_v


def _as_cpu_mask(added: Tensor) -> Tensor:
    """The kernel takes masks of two or four dims."""
    return added if added.dim() in (2, 4) else added.reshape((1,) * (4 - added.dim()) + added.shape)
