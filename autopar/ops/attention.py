"""The operator ``autopar::attention``: attention whose mask is stated by what it means (causal, window, padding) instead of elements.

Comes in: queries, keys, values and the meaning of the mask, from models of transformers (`autopar.capture.transformers`). Goes out: one op
in the captured graph, which a rule can split over rows and heads without a mask of all rows and keys. The operator is
CompositeImplicitAutograd: `torch.export`'s training IR has it as one call, and autograd sees the torch operators inside.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("autopar", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "attention(Tensor q, Tensor k, Tensor v, Tensor? key_padding, Tensor? bias, bool causal, int? window, float scale,"
    " float? softcap, float dropout_p) -> Tensor"
)


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
) -> Tensor:
    """Scaled dot-product attention; a query that may attend to no key gets zeros, as in torch.

    Args:
        q: (batch, heads, queries, head size).
        k: (batch, key/value heads, keys, head size), not repeated; key/value heads divide heads.
        v: the same for values, whose head size may be another.
        key_padding: bool (batch, keys), True where a key may be attended to.
        bias: mask (bool, True attends) or added scores, broadcastable to (batch, heads, queries, keys).
        causal: query i attends to keys 0..i.
        window: with `causal` the number of keys that a query attends to, counted back from its own; without, the largest distance of a key.
        scale: factor of the scores.
        softcap: scores are replaced by ``softcap * tanh(scores / softcap)``.
        dropout_p: probability that an attention weight is dropped.
    """
    is_grouped = k.shape[1] != q.shape[1]
    # Flash kernels know the causal mask by name, and skip what it leaves out; a mask of elements would rule them out on a GPU.
    is_causal = causal and softcap is None and window is None and key_padding is None and bias is None
    mask = None if is_causal else merge_masks(q, k, key_padding, bias, causal, window)
    if softcap is None:
        if is_grouped and mask is not None and q.is_cuda:
            # No kernel of a GPU takes a mask and grouped heads, but the one that makes all scores.
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            is_grouped = False
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=is_grouped
        )
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    # Query heads that share a key head become rows of one product, so that keys and values are never repeated.
    rows = q.reshape(batch, kv_heads, heads // kv_heads * queries, q.shape[3])
    scores = (rows @ k.transpose(-1, -2)).reshape(batch, heads, queries, keys) * scale
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = torch.ops.aten._safe_softmax.default(scores.to(wide), -1).to(q.dtype)
    weights = torch.nn.functional.dropout(weights, dropout_p, training=dropout_p > 0.0)
    return (weights.reshape(batch, kv_heads, -1, keys) @ v).reshape(batch, heads, queries, v.shape[3])


def merge_masks(q: Tensor, k: Tensor, key_padding: Tensor | None, bias: Tensor | None, causal: bool, window: int | None) -> Tensor | None:
    """The mask, bool or added scores, that has the meaning of `attention`'s arguments; None when every key may be attended to."""
    allowed: Tensor | None = None
    if causal or window is not None:
        query = torch.arange(q.shape[2], device=q.device)[:, None]
        key = torch.arange(k.shape[2], device=q.device)[None, :]
        if causal:
            allowed = key <= query
        if window is not None:
            in_window = key > query - window if causal else (key - query).abs() <= window
            allowed = in_window if allowed is None else allowed & in_window
    if key_padding is not None:
        padding = key_padding[:, None, None, :]
        allowed = padding if allowed is None else allowed & padding
    if bias is None:
        return allowed
    if bias.dtype == torch.bool:
        return bias if allowed is None else bias & allowed
    bias = bias.to(q.dtype)
    return bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)


_LIBRARY.impl("attention", attention, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
