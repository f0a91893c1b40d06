"""The paper's RadixMLP: unfold q, k and v to every token, attend sequence by sequence, fold the result.

The baseline: nothing of attention is shared. Autograd falls out of torch, so this runs outside the custom op and does
not compile into one graph.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.ops.fold import copy_rows
from radix_mlp.ops.impl.common import attend, pack_heads, unpack_heads
from radix_mlp.plan.device import AttentionTree

__all__ = ["attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    tree: AttentionTree,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """`[M, Hq, D]`, `[M, Hkv, D]`, `[M, Hkv, Dv]` -> `[M, Hq, Dv]`. Rows that pad the plan repeat token 0."""
    rows, heads, _ = q.shape
    if rows == 0:
        return q.new_zeros(0, heads, v.shape[2])
    tree = _with_sequences(tree)
    by_token = [copy_rows(x, tree.unfold_index).split(tree.host_cu_seq_lengths.diff().tolist()) for x in (q, k, v)]
    parts = []
    for sequence in zip(*by_token, strict=True):
        length = len(sequence[0])
        if softcap is None and sinks is None and (window is None or window >= length):
            batched = (x.transpose(0, 1)[None] for x in sequence)
            part = F.scaled_dot_product_attention(*batched, is_causal=True, scale=scale, enable_gqa=True)
            parts.append(part[0].transpose(0, 1))
        elif length:
            parts.append(_masked(*sequence, sinks, scale=scale, window=window, softcap=softcap))
    return torch.cat(parts).index_select(0, tree.fold_index)


def _masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    heads, kv_heads = q.shape[1], k.shape[1]
    distance = torch.arange(len(q), device=q.device)[:, None] - torch.arange(len(q), device=q.device)
    hidden = (distance < 0) | (distance >= (len(q) if window is None else window))
    mask = torch.zeros(hidden.shape, device=q.device).masked_fill_(hidden, -torch.inf)
    packed = attend(
        pack_heads(q, kv_heads),
        k.transpose(0, 1),
        v.transpose(0, 1),
        mask.repeat_interleave(heads // kv_heads, dim=0),
        None if sinks is None else sinks.view(kv_heads, -1),
        scale=scale,
        softcap=softcap,
    )
    return unpack_heads(packed, heads)


def _with_sequences(tree: AttentionTree) -> AttentionTree:
    """A tree made from `end` alone gets the root paths of its leaves as sequences."""
    if len(tree.unfold_index):
        return tree
    paths, cu = _leaf_paths(tree.end.cpu().numpy())
    device = tree.end.device
    return tree._replace(
        fold_index=torch.from_numpy(np.unique(paths, return_index=True)[1]).to(device),
        unfold_index=torch.from_numpy(paths).to(device),
        host_cu_seq_lengths=torch.from_numpy(cu),
    )


def _leaf_paths(end: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    paths: list[int] = []
    cu, path = [0], []
    for row, stop in enumerate(end.tolist()):
        while path and path[-1][1] <= row:
            path.pop()
        path.append((row, stop))
        if stop == row + 1:
            paths.extend(ancestor for ancestor, _ in path)
            cu.append(len(paths))
    return np.asarray(paths, np.int64), np.asarray(cu, np.int64)
