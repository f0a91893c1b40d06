"""`impl="fla"`: delta rules on the kernels of flash-linear-attention, level by level."""

from __future__ import annotations

import torch
from torch import Tensor

from radix_mlp.ops.packages import why_not_installed
from radix_mlp.ops.scan.impl.fla_delta import delta_rule
from radix_mlp.ops.scan.scan_call import DeltaCall, ScanKind, not_offered

__all__ = ["avoid_autotuning", "conv", "gated_delta_rule", "kimi_delta", "lightning", "mamba1", "mamba2", "why_not"]

# its private functions change from release to release
_MISSING = why_not_installed({"fla-core": "0.6.0"}, "hybrid")
_MAX_WIDTH = 256

conv = lightning = mamba1 = mamba2 = not_offered


def why_not(kind: ScanKind) -> str | None:
    """See `scan_call.ScanImplementation`."""
    if kind.op not in ("gated_delta_rule", "kimi_delta"):
        return "runs delta rules only"
    if kind.device_type != "cuda":
        return f"cannot run on {kind.device_type}"
    if kind.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {kind.dtype}"
    if kind.width > _MAX_WIDTH:
        return f"takes keys of up to {_MAX_WIDTH} elements, not {kind.width}"
    return _MISSING


def gated_delta_rule(call: DeltaCall) -> Tensor:
    """See `scan_call.ScanImplementation`."""
    dtype = call.q.dtype
    tree = call.tree
    q, k, v, beta = (tree.to_levels(x.to(dtype)) for x in (call.q, call.k, call.v, call.beta))
    out = delta_rule(q, k, v, tree.to_levels(call.g.float()), beta, tree.chunk_tables, call.scale, call.normalize_qk)
    return tree.from_levels(out)


kimi_delta = gated_delta_rule


def avoid_autotuning() -> None:
    """Fix the configurations of flash-linear-attention's kernels in this process, if it is installed.

    Calls of the unmodified model then are not autotuned either.
    """
    if _MISSING is None:
        from radix_mlp.ops.scan.impl.fla_kernels import use_fixed_configurations

        use_fixed_configurations()
