"""The kernels of flash-linear-attention that the tree needs, with one configuration each.

These are private names of fla-core, so its version is pinned. Autotuning all of them takes minutes on a fresh machine
(measured on an H200: 90 s for the forward kernels of one head shape, 240 s with the backward ones), which no first
request may pay. The configurations below are what autotuning chose there for 32 value heads of 128; on the shapes of
Qwen3.5, Kimi Linear and Granite 4 they were the best or within the noise of it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import triton
from fla.modules.norm.l2norm import l2norm_bwd, l2norm_bwd_kernel, l2norm_fwd, l2norm_fwd_kernel
from fla.ops.common import chunk_delta_h, chunk_o
from fla.ops.gated_delta_rule import chunk_fwd, wy_fast
from fla.ops.gla.chunk import chunk_gla_fwd_kernel_o, chunk_gla_fwd_o_gk
from fla.ops.kda import chunk_bwd as kda_bwd
from fla.ops.kda import chunk_intra, chunk_intra_token_parallel
from fla.ops.kda import wy_fast as kda_wy
from fla.ops.utils import chunk_local_cumsum, cumsum

__all__ = [
    "chunk_bwd_dv",
    "chunk_bwd_dv_local",
    "chunk_fwd_o",
    "chunk_gla_fwd_o_gk",
    "chunk_kda_bwd_dAv",
    "chunk_kda_bwd_intra",
    "chunk_kda_bwd_wy",
    "chunk_kda_fwd_intra",
    "chunk_local_cumsum",
    "delta_rule_intra",
    "delta_rule_w_u",
    "delta_rule_wy_gradients",
    "kda_w_u",
    "l2norm_bwd",
    "l2norm_fwd",
    "pass_delta_gradients",
    "pass_delta_states",
    "use_fixed_configurations",
]

chunk_fwd_o, chunk_bwd_dv, chunk_bwd_dv_local = chunk_o.chunk_fwd_o, chunk_o.chunk_bwd_dv, chunk_o.chunk_bwd_dv_local
delta_rule_intra = chunk_fwd.chunk_gated_delta_rule_fwd_intra
delta_rule_w_u, delta_rule_wy_gradients = wy_fast.recompute_w_u_fwd, wy_fast.prepare_wy_repr_bwd
chunk_kda_fwd_intra, chunk_kda_bwd_intra = chunk_intra.chunk_kda_fwd_intra, chunk_intra.chunk_kda_bwd_intra
chunk_kda_bwd_dAv, chunk_kda_bwd_wy = kda_bwd.chunk_kda_bwd_dAv, kda_bwd.chunk_kda_bwd_wy_dqkg_fused
kda_w_u = kda_wy.recompute_w_u_fwd
pass_delta_states = chunk_delta_h.chunk_gated_delta_rule_fwd_kernel_h_blockdim64
pass_delta_gradients = chunk_delta_h.chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64

# kernel, its meta-parameters, warps, stages
_CONFIGURATIONS: tuple[tuple[Any, dict[str, int], int, int], ...] = (
    (l2norm_fwd_kernel, {"BT": 8}, 1, 3),
    (l2norm_bwd_kernel, {"BT": 8}, 4, 3),
    (cumsum.chunk_local_cumsum_scalar_kernel, {}, 1, 3),
    (cumsum.chunk_local_cumsum_vector_kernel, {"BS": 64}, 2, 3),
    (chunk_fwd.chunk_gated_delta_rule_fwd_kkt_solve_kernel, {"BK": 64}, 1, 3),
    (wy_fast.recompute_w_u_fwd_kernel, {}, 4, 3),
    (wy_fast.prepare_wy_repr_bwd_kernel, {}, 4, 3),
    (pass_delta_states, {"BV": 64}, 4, 2),
    (pass_delta_gradients, {"BV": 32}, 4, 2),
    (chunk_o.chunk_fwd_kernel_o, {"BK": 64, "BV": 64}, 4, 3),
    (chunk_o.chunk_bwd_kernel_dv, {}, 4, 4),
    (chunk_o.chunk_bwd_kernel_dv_local, {}, 2, 3),
    (chunk_intra_token_parallel.chunk_kda_fwd_kernel_intra_token_parallel, {"BH": 4}, 1, 3),
    (chunk_intra.chunk_kda_fwd_kernel_inter_solve_fused, {"BK": 32}, 1, 3),
    (chunk_intra.chunk_kda_bwd_kernel_intra, {}, 2, 3),
    (kda_wy.recompute_w_u_fwd_kda_kernel, {}, 4, 3),
    (chunk_gla_fwd_kernel_o, {"BK": 64, "BV": 128}, 4, 3),
    (kda_bwd.chunk_kda_bwd_kernel_dAv, {}, 4, 3),
    (kda_bwd.chunk_kda_bwd_kernel_wy_dqkg_fused, {"BK": 64, "BV": 64}, 4, 2),
)


@cache
def use_fixed_configurations() -> None:
    """Give each kernel one configuration, so that none is autotuned; also for others that call fla in this process.

    A configuration that fla does not offer on this GPU is left out, and the first that it offers taken.
    """
    for kernel, meta, warps, stages in _CONFIGURATIONS:
        tuner = kernel
        while not hasattr(tuner, "configs"):
            tuner = tuner.fn
        offered = [
            x for x in tuner.configs if x.kwargs == meta and x.num_warps == warps and x.num_stages == stages
        ] or tuner.configs[:1]
        tuner.configs = [triton.Config(x.kwargs, num_warps=x.num_warps, num_stages=x.num_stages) for x in offered[:1]]
