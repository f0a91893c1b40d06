"""Linear attention with a decay for each head (Mamba 2, lightning attention) along a tree, in Triton: a custom op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from radix_mlp.ops.scan.chunk_tables import CHUNK, ChunkTables, flat_tables, from_parents, tables_of, to_parents
from radix_mlp.ops.scan.scan_call import no_double_backward

__all__ = ["linear_decay"]

# kernels use powers of 2
LOG2_E = 1.4426950408889634

_LIBRARY = torch.library.Library("radix_mlp", "FRAGMENT")
_LIBRARY.define("scan_linear_decay(Tensor q, Tensor k, Tensor v, Tensor g, Tensor[] tables) -> (Tensor, Tensor)")
_LIBRARY.define(
    "scan_linear_decay_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor sums, Tensor[] tables) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def linear_decay(q: Tensor, k: Tensor, v: Tensor, g: Tensor, tables: ChunkTables) -> Tensor:
    """`S <- exp(g) S + k v^T; out = S^T q`, with float32 states.

    Args:
        q, k: `[T, G, K]` in bfloat16 or float16, rows level by level. Head `h` uses group `h // (H // G)`.
        v: `[T, H, V]` in the same dtype.
        g: `[T, H]` float32 logarithms of the decays.
        tables: of the tree.

    Returns:
        `[T, H, V]` in v's dtype. Differentiable once.
    """
    out: Tensor = torch.ops.radix_mlp.scan_linear_decay(
        q.contiguous(), k.contiguous(), v.contiguous(), g.contiguous(), flat_tables(tables)
    )[0]
    return out


def _forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, flat: list[Tensor]) -> tuple[Tensor, Tensor]:
    from radix_mlp.ops.scan.impl.chunk_outputs import chunk_outputs, chunk_sums

    tables = tables_of(flat)
    where = (tables.cu_seqlens, tables.chunk_indices, CHUNK)
    sums = chunk_sums(g, LOG2_E, *where)
    return chunk_outputs(q, k, v, sums, _states(k, v, sums, tables, k.dtype), 1.0, *where), sums


def _backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, sums: Tensor, flat: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from radix_mlp.ops.scan.impl.chunk_gradients import chunk_gradients
    from radix_mlp.ops.scan.impl.chunk_outputs import chunk_sums, value_gradients
    from radix_mlp.ops.scan.impl.chunk_states import pass_gradients

    tables, grad_out = tables_of(flat), grad_out.contiguous()
    where = (tables.cu_seqlens, tables.chunk_indices, CHUNK)
    # products of states and their gradients want float32
    states = _states(k, v, sums, tables, torch.float32)
    grad_states = torch.empty_like(states)
    below: Tensor | None = None
    for level in reversed(tables.levels):
        below = pass_gradients(
            q, sums, grad_out, grad_states, to_parents(below, level), 1.0, level.cu_seqlens, level.chunk_offsets, CHUNK
        )
    dq, dk, _, dg = chunk_gradients(q, k, v, sums, states, grad_out, grad_states, None, 1.0, *where)
    dv = value_gradients(q, k, sums, grad_out, grad_states, 1.0, *where)
    return dq, dk, dv, chunk_sums(dg, 1.0, *where, reverse=True)


def _states(k: Tensor, v: Tensor, sums: Tensor, tables: ChunkTables, dtype: torch.dtype) -> Tensor:
    """States before every chunk: `[chunks, H, K, V]`."""
    from radix_mlp.ops.scan.impl.chunk_states import pass_states

    states = torch.empty(len(tables.chunk_indices), v.shape[1], k.shape[2], v.shape[2], dtype=dtype, device=k.device)
    final: Tensor | None = None
    for level in tables.levels:
        initial = from_parents(final, level)
        final = pass_states(k, v, sums, states, initial, level.cu_seqlens, level.chunk_offsets, CHUNK)
    return states


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, _, tables = inputs
    ctx.save_for_backward(q, k, v, output[1], *tables)


def _autograd(ctx: Any, grad_out: Tensor, grad_sums: Tensor | None) -> tuple[Any, ...]:
    q, k, v, sums, *tables = ctx.saved_tensors
    grads = torch.ops.radix_mlp.scan_linear_decay_backward(grad_out, q, k, v, sums, tables)
    return *grads, [None] * len(tables)


_LIBRARY.impl("scan_linear_decay", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("scan_linear_decay_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake(
    "radix_mlp::scan_linear_decay",
    lambda q, k, v, g, tables: (torch.empty_like(v), torch.empty_like(g, dtype=torch.float32)),
    lib=_LIBRARY,
)
torch.library.register_fake(
    "radix_mlp::scan_linear_decay_backward",
    lambda grad_out, q, k, v, sums, tables: tuple(torch.empty_like(x) for x in (q, k, v, sums)),
    lib=_LIBRARY,
)
torch.library.register_autograd("radix_mlp::scan_linear_decay", _autograd, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd(
    "radix_mlp::scan_linear_decay_backward", no_double_backward("scans on the tree have"), lib=_LIBRARY
)
