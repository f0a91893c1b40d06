"""The gated delta rule in chunks, in plain torch.

Yang et al., "Gated Delta Networks" (arXiv 2412.06464), section 3.3: within a chunk the updates of the state are
one triangular system, so that only `state_pass` is sequential.
"""

from __future__ import annotations

import torch
from torch import Tensor

from radix_mlp.ops.scan.layout import collect, spread
from radix_mlp.ops.scan.scan_call import DeltaCall, compute_dtype
from radix_mlp.ops.scan.state_pass import state_pass

__all__ = ["gated_delta_rule"]

# as transformers and flash-linear-attention have it
EPSILON = 1e-6


def gated_delta_rule(call: DeltaCall) -> Tensor:
    """See `scan_call.ScanImplementation`."""
    dtype = compute_dtype(call.q, call.v)
    q, k, v, g, beta = (x.to(dtype) for x in call[:5])
    if call.normalize_qk:
        q, k = normalized(q), normalized(k)
    chunks = call.tree.chunks(call.tree.chunk_size)
    q, k, v, g, beta = (spread(x, chunks.layout).transpose(1, 2) for x in (q * call.scale, k, v, g, beta))
    # a key head serves consecutive value heads
    group = v.shape[1] // k.shape[1]
    products = torch.cat([q, k], dim=2) @ k.transpose(2, 3)
    qk, kk = products.repeat_interleave(group, 1).unflatten(2, (2, chunks.size)).unbind(2)
    q, k = q.repeat_interleave(group, 1), k.repeat_interleave(group, 1)

    total = g.cumsum(2)
    from_start = total.exp()[..., None]
    later = torch.ones(chunks.size, chunks.size, dtype=torch.bool, device=q.device).triu(1)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()
    system = kk * decay * beta[..., None]
    right = torch.cat([v, k * from_start], dim=3) * beta[..., None]
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    values, w = solved.split([v.shape[3], k.shape[3]], dim=3)
    to_end = (total[..., -1:] - total).exp()[..., None]
    values, state = state_pass(k * to_end, values, w, total[..., -1:].exp(), chunks.links)
    out = (q * from_start) @ state + (qk * decay) @ values
    return collect(out.transpose(1, 2), chunks.layout)


def normalized(x: Tensor) -> Tensor:
    """`[..., K]` with rows of length 1."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPSILON)
