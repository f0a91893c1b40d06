"""Unmodified hybrids as a peer: as strong as they can be made, and in plain torch where they say what is right."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["lend_backward", "plain_kernels"]


@contextmanager
def plain_kernels(model: torch.nn.Module) -> Iterator[None]:
    """The model's own torch code in place of the packages that transformers found for it."""
    modeling = sys.modules[type(model).__module__]
    names = ("torch_chunk_gated_delta_rule", "causal_conv1d_fn")
    kept = {name: getattr(modeling, name) for name in names if hasattr(modeling, name)}
    for name, function in kept.items():
        setattr(modeling, name, inspect.unwrap(function))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(modeling, name, function)


def lend_backward() -> None:
    """A backward pass for flash-linear-attention's gated delta rule in this process, where it refuses its own.

    Triton 3.4.0 to 3.7.0 compile its `chunk_bwd_dqkwg` wrongly for Hopper, and it says so. Our kernel takes its place.
    """
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
