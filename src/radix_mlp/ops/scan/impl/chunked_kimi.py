"""Kimi delta attention in chunks, in plain torch: the gated delta rule with a decay for each key element.

Kimi Team, "Kimi Linear" (arXiv 2510.26692), section 3. Decays cannot be taken out of the products of q and k, so chunks
are shorter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from radix_mlp.ops.scan.impl.chunked_delta import normalized
from radix_mlp.ops.scan.layout import collect, spread
from radix_mlp.ops.scan.scan_call import DeltaCall, compute_dtype
from radix_mlp.ops.scan.state_pass import state_pass

__all__ = ["kimi_delta"]

CHUNK = 16


def kimi_delta(call: DeltaCall) -> Tensor:
    """See `scan_call.ScanImplementation`."""
    dtype = compute_dtype(call.q, call.v)
    q, k, v, g, beta = (x.to(dtype) for x in call[:5])
    if call.normalize_qk:
        q, k = normalized(q), normalized(k)
    chunks = call.tree.chunks(CHUNK)
    q, k, v, g, beta = (spread(x, chunks.layout).transpose(1, 2) for x in (q * call.scale, k, v, g, beta))
    total = g.cumsum(2)
    from_start = total.exp()
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    decay = (total[:, :, :, None] - total[:, :, None]).masked_fill(later[..., None], -torch.inf).exp()
    # both products at once, for each row its keys times their decays: n, H, L, L, K by n, H, L, K, 2
    products = (decay * k[:, :, None]) @ torch.stack([q, k], dim=4)
    qk, kk = products.unbind(4)
    right = torch.cat([v, k * from_start], dim=3) * beta[..., None]
    solved = torch.linalg.solve_triangular(kk * beta[..., None], right, upper=False, unitriangular=True)
    values, w = solved.split([v.shape[3], k.shape[3]], dim=3)
    to_end = (total[:, :, -1:] - total).exp()
    values, state = state_pass(k * to_end, values, w, from_start[:, :, -1], chunks.links)
    out = (q * from_start) @ state + qk @ values
    return collect(out.transpose(1, 2), chunks.layout)
