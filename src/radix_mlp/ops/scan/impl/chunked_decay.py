"""Linear attention with a decay per head, in chunks, in plain torch: Mamba 2 and lightning attention.

Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 6: within a chunk the recurrence is masked attention, so
that only `state_pass` is sequential.
"""

from __future__ import annotations

import torch
from torch import Tensor

from radix_mlp.ops.scan.layout import collect, spread
from radix_mlp.ops.scan.scan_call import LightningCall, Mamba2Call, compute_dtype
from radix_mlp.ops.scan.scan_tree import ScanTree
from radix_mlp.ops.scan.state_pass import state_pass

__all__ = ["lightning", "mamba2"]


def mamba2(call: Mamba2Call) -> Tensor:
    """See `scan_call.ScanImplementation`."""
    x, dt, A, B, C = (tensor.to(compute_dtype(call.x, call.B)) for tensor in call[:5])
    return _decayed(C, B, x * dt[..., None], A * dt, call.tree)


def lightning(call: LightningCall) -> Tensor:
    """See `scan_call.ScanImplementation`."""
    q, k, v, slope = (tensor.to(compute_dtype(call.q, call.v)) for tensor in call[:4])
    return _decayed(q, k, v, (-slope).expand(q.shape[:2]), call.tree)


def _decayed(q: Tensor, k: Tensor, v: Tensor, g: Tensor, tree: ScanTree) -> Tensor:
    """`S <- exp(g) S + k v^T; out = S^T q`: `[M, G, K]` twice, `[M, H, V]`, `[M, H]` -> `[M, H, V]`."""
    chunks = tree.chunks(tree.chunk_size)
    q, k, v, g = (spread(x, chunks.layout).transpose(1, 2) for x in (q, k, v, g))
    group = v.shape[1] // k.shape[1]
    qk = (q @ k.transpose(2, 3)).repeat_interleave(group, 1)
    q, k = q.repeat_interleave(group, 1), k.repeat_interleave(group, 1)
    total = g.cumsum(2)
    later = torch.ones(chunks.size, chunks.size, dtype=torch.bool, device=q.device).triu(1)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()
    to_end = (total[..., -1:] - total).exp()[..., None]
    _, state = state_pass(k * to_end, v, None, total[..., -1:].exp(), chunks.links)
    out = (q * total.exp()[..., None]) @ state + (qk * decay) @ v
    return collect(out.transpose(1, 2), chunks.layout)
