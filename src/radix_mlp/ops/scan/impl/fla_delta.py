"""Delta rules along a tree on the kernels of flash-linear-attention: a custom op.

Everything local to a chunk runs once on all rows; only the pass of states over chunks runs level by level, each piece
starting from its parent's final state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from radix_mlp.ops.scan.chunk_tables import CHUNK, ChunkTables, flat_tables, from_parents, tables_of, to_parents
from radix_mlp.ops.scan.impl.linear_decay import LOG2_E
from radix_mlp.ops.scan.scan_call import no_double_backward

__all__ = ["delta_rule"]

_LIBRARY = torch.library.Library("radix_mlp", "FRAGMENT")
_LIBRARY.define(
    "scan_delta(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor[] tables, float scale, bool normalize) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "scan_delta_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor beta, Tensor sums, Tensor inverse, "
    "Tensor scores, Tensor[] tables, float scale, bool normalize) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, tables: ChunkTables, scale: float, normalize: bool
) -> Tensor:
    """The gated delta rule, or Kimi delta attention where `g` has a decay for each key element; float32 states.

    Args:
        q, k: `[T, G, K]` in bfloat16 or float16, rows level by level. Head `h` uses group `h // (H // G)`.
        v: `[T, H, V]` in the same dtype.
        g: `[T, H]` or `[T, H, K]` (then `G = H`), float32 logarithms of the decays.
        beta: `[T, H]`.
        tables: of the tree.
        normalize: whether to divide rows of `q` and `k` by their length.

    Returns:
        `[T, H, V]` in q's dtype. Differentiable once.
    """
    given = (x.contiguous() for x in (q, k, v, g, beta))
    out: Tensor = torch.ops.radix_mlp.scan_delta(*given, flat_tables(tables), scale, normalize)[0]
    return out


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, flat: list[Tensor], scale: float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from radix_mlp.ops.scan.impl import fla_kernels as fla

    fla.use_fixed_configurations()
    tables = tables_of(flat)
    where = {"cu_seqlens": tables.cu_seqlens, "chunk_indices": tables.chunk_indices}
    q, k, v, g, beta = (x[None] for x in (q, k, v, g, beta))
    if normalize:
        q, k = fla.l2norm_fwd(q)[0], fla.l2norm_fwd(k)[0]
    sums = fla.chunk_local_cumsum(g, chunk_size=CHUNK, scale=LOG2_E, **where)
    if g.dim() == 4:
        w, u, _, scaled_k, scores, inverse = fla.chunk_kda_fwd_intra(
            q=q, k=k, v=v, gk=sums, beta=beta, scale=scale, chunk_size=CHUNK, **where
        )
        states, values, _ = _states(scaled_k, w, u, tables, gk=sums)
        out = fla.chunk_gla_fwd_o_gk(q=q, v=values, g=sums, A=scores, h=states, scale=scale, chunk_size=CHUNK, **where)
        return out[0].to(q.dtype), sums[0], inverse[0], scores[0]
    w, u, inverse = fla.delta_rule_intra(k=k, v=v, g=sums, beta=beta, chunk_size=CHUNK, **where)
    states, values, _ = _states(k, w, u, tables, g=sums)
    out = fla.chunk_fwd_o(q=q, k=k, v=values, h=states, g=sums, scale=scale, chunk_size=CHUNK, **where)
    return out[0].to(q.dtype), sums[0], inverse[0], q.new_empty(0)


def _backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, sums: Tensor, inverse: Tensor, scores: Tensor,
    flat: list[Tensor], scale: float, normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from radix_mlp.ops.scan.impl import fla_kernels as fla

    # compiled code may run this without the forward pass
    fla.use_fixed_configurations()
    tables = tables_of(flat)
    grad_out, q, k, v, beta, sums, inverse = (x.contiguous()[None] for x in (grad_out, q, k, v, beta, sums, inverse))
    if normalize:
        (q, length_q), (k, length_k) = fla.l2norm_fwd(q), fla.l2norm_fwd(k)
    if sums.dim() == 4:
        dq, dk, dv, dg, db = _kimi_gradients(grad_out, q, k, v, beta, sums, inverse, scores[None], tables, scale)
    else:
        dq, dk, dv, dg, db = _gated_gradients(grad_out, q, k, v, beta, sums, inverse, tables, scale)
    if normalize:
        dq, dk = fla.l2norm_bwd(q, length_q, dq.to(q.dtype)), fla.l2norm_bwd(k, length_k, dk.to(k.dtype))
    dg = fla.chunk_local_cumsum(
        dg, chunk_size=CHUNK, reverse=True, cu_seqlens=tables.cu_seqlens, chunk_indices=tables.chunk_indices
    )
    return dq[0].to(q.dtype), dk[0].to(k.dtype), dv[0].to(v.dtype), dg[0], db[0].to(beta.dtype)


def _gated_gradients(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, sums: Tensor, inverse: Tensor,
    tables: ChunkTables, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of q, k, v, `sums` (before its own sum back) and beta."""
    from radix_mlp.ops.scan.impl import fla_kernels as fla
    from radix_mlp.ops.scan.impl.chunk_gradients import chunk_gradients

    where = {"cu_seqlens": tables.cu_seqlens, "chunk_indices": tables.chunk_indices}
    w, u = fla.delta_rule_w_u(k=k, v=v, beta=beta, A=inverse, g=sums, **where)
    states, values, initials = _states(k, w, u, tables, g=sums)
    local = fla.chunk_bwd_dv_local(q=q, k=k, g=sums, do=grad_out, scale=scale, chunk_size=CHUNK, **where)
    grad_states, grad_values = _state_gradients(q, k, w, grad_out, local, initials, scale, tables, g=sums)
    dq, dk, dw, dg = chunk_gradients(
        q[0], k[0], values[0], sums[0], states[0], grad_out[0], grad_states[0], grad_values[0], scale,
        tables.cu_seqlens, tables.chunk_indices, CHUNK,
    )  # fmt: skip
    assert dw is not None
    more_k, dv, db, more_g = fla.delta_rule_wy_gradients(
        k=k, v=v, beta=beta, g=sums, A=inverse, dw=dw[None], du=grad_values, **where
    )
    return dq[None], dk[None] + more_k, dv, dg[None] + more_g, db


def _kimi_gradients(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, sums: Tensor, inverse: Tensor, scores: Tensor,
    tables: ChunkTables, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `_gated_gradients`."""
    from radix_mlp.ops.scan.impl import fla_kernels as fla

    where = {"cu_seqlens": tables.cu_seqlens, "chunk_indices": tables.chunk_indices}
    w, u, scaled_q, scaled_k = fla.kda_w_u(q=q, k=k, v=v, beta=beta, A=inverse, gk=sums, **where)
    states, values, initials = _states(scaled_k, w, u, tables, gk=sums)
    d_scores, local = fla.chunk_kda_bwd_dAv(
        q=q, k=k, v=values, do=grad_out, A=scores, scale=scale, chunk_size=CHUNK, **where
    )
    grad_states, grad_values = _state_gradients(
        scaled_q, scaled_k, w, grad_out, local, initials, scale, tables, gk=sums
    )
    dq, dk, dv, db, dg, d_inverse = fla.chunk_kda_bwd_wy(
        q=q, k=k, v=v, v_new=values, g=sums, beta=beta, A=inverse, h=states, do=grad_out, dh=grad_states,
        dv=grad_values, scale=scale, chunk_size=CHUNK, **where,
    )  # fmt: skip
    dq, dk, db, dg = fla.chunk_kda_bwd_intra(
        q=q, k=k, g=sums, beta=beta, dAqk=d_scores, dAkk=d_inverse, dq=dq, dk=dk, db=db, dg=dg, chunk_size=CHUNK,
        **where,
    )  # fmt: skip
    return dq, dk, dv, dg, db


def _states(
    k: Tensor, w: Tensor, u: Tensor, tables: ChunkTables, *, g: Tensor | None = None, gk: Tensor | None = None
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """States before every chunk, the values that enter them, and what each level started from."""
    from radix_mlp.ops.scan.impl.fla_kernels import pass_delta_states

    groups, key_dim = k.shape[2:]
    heads, value_dim = u.shape[2:]
    states = k.new_empty(1, len(tables.chunk_indices), heads, key_dim, value_dim)
    values = torch.empty_like(u)
    initials: list[Tensor | None] = []
    final: Tensor | None = None
    for level in tables.levels:
        initials.append(from_parents(final, level))
        count = len(level.chunk_offsets)
        is_last = level.child_offsets.shape[0] == 0
        final = None if is_last else torch.empty(count, heads, key_dim, value_dim, device=k.device)
        pass_delta_states[_grid(value_dim, count * heads)](
            k=k, v=u, w=w, v_new=values, g=g, gk=gk, h=states, h0=initials[-1], ht=final,
            cu_seqlens=level.cu_seqlens, chunk_offsets=level.chunk_offsets, T=k.shape[1],
            H=groups, HV=heads, K=key_dim, V=value_dim, BT=CHUNK, STATE_V_FIRST=False,
        )  # fmt: skip
    return states, values, initials


def _state_gradients(
    q: Tensor, k: Tensor, w: Tensor, grad_out: Tensor, grad_values: Tensor, initials: list[Tensor | None],
    scale: float, tables: ChunkTables, *, g: Tensor | None = None, gk: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the state after every chunk, and of the values that enter the states."""
    from radix_mlp.ops.scan.impl.fla_kernels import pass_delta_gradients

    groups, key_dim = q.shape[2:]
    heads, value_dim = grad_out.shape[2:]
    grad_states = q.new_empty(1, len(tables.chunk_indices), heads, key_dim, value_dim)
    summed = torch.empty_like(grad_values)
    below: Tensor | None = None
    for level, initial in zip(reversed(tables.levels), reversed(initials), strict=True):
        above = None if initial is None else torch.empty_like(initial)
        pass_delta_gradients[_grid(value_dim, len(level.chunk_offsets) * heads)](
            q=q, k=k, w=w, g=g, gk=gk, dht=to_parents(below, level), dh0=above, do=grad_out, dh=grad_states,
            dv=grad_values, dv2=summed, cu_seqlens=level.cu_seqlens, chunk_offsets=level.chunk_offsets, scale=scale,
            T=q.shape[1], H=groups, HV=heads, K=key_dim, V=value_dim, BT=CHUNK, STATE_V_FIRST=False,
        )  # fmt: skip
        below = above
    return grad_states, summed


def _grid(value_dim: int, states: int) -> Any:
    return lambda meta: (-(-value_dim // meta["BV"]) * states,)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inverse = k.new_empty(*v.shape[:2], CHUNK)
    scores = k.new_empty(inverse.shape) if g.dim() == 3 else q.new_empty(0)
    return q.new_empty(v.shape), torch.empty_like(g, dtype=torch.float32), inverse, scores


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, _, beta, tables, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, beta, *output[1:], *tables)


def _autograd(ctx: Any, grad_out: Tensor, *rest: Tensor | None) -> tuple[Any, ...]:
    q, k, v, beta, sums, inverse, scores, *tables = ctx.saved_tensors
    grads = torch.ops.radix_mlp.scan_delta_backward(
        grad_out, q, k, v, beta, sums, inverse, scores, tables, *ctx.options
    )
    return *grads, [None] * len(tables), None, None


_LIBRARY.impl("scan_delta", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("scan_delta_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("radix_mlp::scan_delta", _forward_fake, lib=_LIBRARY)
torch.library.register_fake(
    "radix_mlp::scan_delta_backward",
    lambda grad_out, q, k, v, beta, sums, *rest: tuple(torch.empty_like(x) for x in (q, k, v, sums, beta)),
    lib=_LIBRARY,
)
torch.library.register_autograd("radix_mlp::scan_delta", _autograd, setup_context=_save, lib=_LIBRARY)
torch.library.register_autograd(
    "radix_mlp::scan_delta_backward", no_double_backward("scans on the tree have"), lib=_LIBRARY
)
