"""A backward pass for flash-linear-attention where it refuses its own, so that unmodified models can be trained there.

Triton 3.4.0 to 3.7.0 compile its `chunk_bwd_dqkwg` wrongly for Hopper, and it says so. Our kernel takes its place: the
peer is as strong as it can be made.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["lend_backward"]


def lend_backward() -> None:
    """For all later calls of flash-linear-attention's gated delta rule in this process; nothing without it."""
    if not torch.cuda.is_available():
        return
    try:
        from fla.ops.gated_delta_rule import chunk

        from radix_mlp.ops.scan.impl.chunk_gradients import chunk_gradients
        from radix_mlp.ops.scan.impl.fla_kernels import use_fixed_configurations
    except ImportError:
        return
    use_fixed_configurations()

    def gradients(
        *, q: Any, k: Any, v: Any, do: Any, h: Any, dh: Any, w: Any, g: Any, dv: Any, scale: float,
        cu_seqlens: Any = None, chunk_indices: Any = None, chunk_size: int = 64, **_: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        batch, rows = q.shape[:2]
        if cu_seqlens is None:
            # equal sequences as one row
            starts = torch.arange(batch + 1, device=q.device) * rows
            per = -(-rows // chunk_size)
            places = torch.arange(batch * per, device=q.device)
            cu_seqlens, chunk_indices = starts, torch.stack([places // per, places % per], 1)
        flat = (x.flatten(0, 1).contiguous() for x in (q, k, v, g, h, do, dh, dv))
        found = chunk_gradients(*flat, scale, cu_seqlens, chunk_indices, chunk_size)
        return tuple(None if x is None else x.unflatten(0, (batch, rows)) for x in found)

    chunk.chunk_bwd_dqkwg = gradients
