"""`impl="triton"`: convolutions and linear attention with decay in Triton; nothing to install."""

from __future__ import annotations

import torch
from torch import Tensor

from radix_mlp.ops.packages import HAS_TRITON, INTERPRETS_TRITON
from radix_mlp.ops.scan.impl.linear_decay import linear_decay
from radix_mlp.ops.scan.impl.triton_conv import conv
from radix_mlp.ops.scan.scan_call import LightningCall, Mamba2Call, ScanKind, not_offered
from radix_mlp.ops.scan.scan_tree import ScanTree

__all__ = ["conv", "gated_delta_rule", "kimi_delta", "lightning", "mamba1", "mamba2", "why_not"]

gated_delta_rule = kimi_delta = mamba1 = not_offered


def why_not(kind: ScanKind) -> str | None:
    """See `scan_call.ScanImplementation`."""
    if kind.op not in ("conv", "mamba2", "lightning"):
        return "runs convolutions, Mamba 2 and lightning attention only"
    if not HAS_TRITON:
        return "needs the package triton, which is not installed"
    if kind.device_type == "cpu" and INTERPRETS_TRITON:
        return None if kind.dtype == torch.float32 else f"takes float32 in Triton's interpreter, not {kind.dtype}"
    if kind.device_type != "cuda":
        return f"cannot run on {kind.device_type}"
    if kind.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {kind.dtype}"
    return None


def mamba2(call: Mamba2Call) -> Tensor:
    """See `scan_call.ScanImplementation`."""
    dt = call.dt.float()
    return _decayed(call.C, call.B, (call.x * dt[..., None]).to(call.x.dtype), call.A.float() * dt, call.tree)


def lightning(call: LightningCall) -> Tensor:
    """See `scan_call.ScanImplementation`."""
    g = (-call.slope.float()).expand(call.q.shape[:2])
    return _decayed(call.q, call.k, call.v, g, call.tree)


def _decayed(q: Tensor, k: Tensor, v: Tensor, g: Tensor, tree: ScanTree) -> Tensor:
    q, k, v, g = (tree.to_levels(x) for x in (q.to(v.dtype), k.to(v.dtype), v, g))
    return tree.from_levels(linear_decay(q, k, v, g, tree.chunk_tables))
