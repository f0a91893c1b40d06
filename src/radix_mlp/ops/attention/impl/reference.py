"""Tree attention with the mask written out, in float64: the oracle, for small batches. Autograd falls out."""

from __future__ import annotations

import torch
from torch import Tensor

from radix_mlp.ops.attention.registry import AttentionCall

__all__ = ["attention"]


def attention(call: AttentionCall) -> Tensor:
    """`[M, Hq, D]`, `[M, Hkv, D]`, `[M, Hkv, Dv]` -> `[M, Hq, Dv]`; memory `Hq * M * M`."""
    q, k, v, sinks, tree, scale, window, softcap = call
    end, depth = tree.end, tree.depth
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q.double(), k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    row = torch.arange(len(end), device=end.device)
    visible = (row[None, :] <= row[:, None]) & (row[:, None] < end[None, :])
    if window is not None:
        visible &= depth[:, None] - depth[None, :] < window
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        sink_column = sinks.double()[:, None, None].expand(-1, len(end), 1)
        scores = torch.cat([scores, sink_column], dim=-1)
    weights = scores.softmax(dim=-1)[..., : len(end)]
    return torch.einsum("hij,jhd->ihd", weights, v).to(q.dtype)
