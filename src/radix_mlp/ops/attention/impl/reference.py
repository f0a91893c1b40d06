"""Tree attention with the mask as a matrix, in float64: the oracle, for small batches. Differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from radix_mlp.ops.attention.attention_call import AttentionCall, CallKind
from radix_mlp.ops.attention.attention_tree import HostTree, host_query_rows

__all__ = ["attention", "prepare", "why_not"]


def why_not(kind: CallKind) -> None:
    """None: it runs every call."""


def prepare(tree: HostTree) -> None:
    """None: it reads only the tree."""


def attention(call: AttentionCall) -> Tensor:
    """`[M, Hq, D]` (`[Q, Hq, D]`), `[M, Hkv, D]`, `[M, Hkv, Dv]` -> `[M, Hq, Dv]`; memory `Hq * M * M`."""
    q, k, v, sinks, tree, scale, window, softcap = call
    end, depth = tree.end, tree.depth
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q.double(), k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    key = torch.arange(len(end), device=end.device)
    query = key
    if tree.query_rows is not None:
        host_query_rows(tree)
        query = tree.query_rows.long()
    stop = key + 1 if tree.span_end is None else tree.span_end
    visible = (key[None, :] < stop[query, None]) & (query[:, None] < end[None, :])
    if window is not None:
        visible &= depth[query, None] - depth[None, :] < window
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        sink_column = sinks.double()[:, None, None].expand(-1, len(query), 1)
        scores = torch.cat([scores, sink_column], dim=-1)
    weights = scores.softmax(dim=-1)[..., : len(end)]
    return torch.einsum("hij,jhd->ihd", weights, v).to(q.dtype)
