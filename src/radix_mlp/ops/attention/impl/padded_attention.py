"""The mathematics of one tile, shared by the implementations in plain torch.

A tile is `q [Hkv, R, D]`, `k [Hkv, K, D]`, `v [Hkv, K, Dv]`: the query heads of one kv head are packed into rows, row
`r` being (token `r // G`, group member `r % G`).  `mask [R, K]` is added to the scores: 0 or -inf.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend", "attend_backward", "pack_heads", "unpack_heads"]


def pack_heads(x: Tensor, kv_heads: int) -> Tensor:
    """`[T, Hq, D] -> [Hkv, T * G, D]`."""
    rows, heads, width = x.shape
    group = heads // kv_heads
    return x.view(rows, kv_heads, group, width).transpose(0, 1).reshape(kv_heads, rows * group, width)


def unpack_heads(x: Tensor, heads: int) -> Tensor:
    """`[Hkv, T * G, D] -> [T, Hq, D]`, a view where it can be one."""
    kv_heads, packed, width = x.shape
    group = heads // kv_heads
    rows = packed // group
    return x.view(kv_heads, rows, group, width).transpose(0, 1).reshape(rows, heads, width)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """`out [Hkv, R, Dv]` in q's dtype; `sinks [Hkv, G]`."""
    if softcap is None and sinks is None:
        mask = None if mask is None else mask.to(q.dtype)
        # four dimensions: with three, the flash kernel of the CPU is not taken
        return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale)[0]
    dtype = q.dtype
    q, k, v = (_wide(x) for x in (q, k, v))
    weights, _, _ = _weights(q, k, mask, sinks, scale, softcap)
    return torch.matmul(weights, v).to(dtype)


def attend_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and sinks (`[Hkv, G]`), half types in float32. Scores are computed again."""
    grad_out, q, k, v = (_wide(x) for x in (grad_out, q, k, v))
    weights, sink_weights, slope = _weights(q, k, mask, sinks, scale, softcap)
    grad_v = torch.matmul(weights.transpose(1, 2), grad_out)
    grad_weights = torch.matmul(grad_out, v.transpose(1, 2))
    delta = (weights * grad_weights).sum(-1, keepdim=True)
    grad_scores = grad_weights.sub_(delta).mul_(weights)
    if slope is not None:
        grad_scores.mul_(slope)
    grad_q = torch.matmul(grad_scores, k).mul_(scale)
    grad_k = torch.matmul(grad_scores.transpose(1, 2), q).mul_(scale)
    grad_sinks = None
    if sinks is not None and sink_weights is not None:
        kv_heads, group = sinks.shape
        grad_sinks = -(sink_weights * delta).view(kv_heads, -1, group).sum(1)
    return grad_q, grad_k, grad_v, grad_sinks


def _weights(
    q: Tensor, k: Tensor, mask: Tensor | None, sinks: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Softmax weights `[Hkv, R, K]`, those of the sinks `[Hkv, R, 1]`, and the slope of the soft cap."""
    scores = torch.matmul(q, k.transpose(1, 2)).mul_(scale)
    slope = None
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        slope = 1 - capped * capped
        scores = capped * softcap
    if mask is not None:
        scores += mask
    if sinks is None:
        return scores.softmax(-1), None, slope
    kv_heads, rows, _ = scores.shape
    sink = sinks.to(scores.dtype)[:, None, :].expand(-1, rows // sinks.shape[1], -1).reshape(kv_heads, rows, 1)
    weights = torch.cat([scores, sink], dim=-1).softmax(-1)
    return weights[..., :-1], weights[..., -1:], slope


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
