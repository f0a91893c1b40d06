"""What runs in place of the kernel functions that mixers call, on compact rows: the same functions along the tree.

The names and parameters are those of transformers' modeling files, which are the same in all of them. Whether
transformers runs its own code under such a name or a package's (flash-linear-attention, causal-conv1d, mamba-ssm)
makes no difference here: on compact rows, neither is called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from radix_mlp.errors import UnsupportedCallError
from radix_mlp.hf.mixers.final_states import state_reader
from radix_mlp.ops.scan.conv import tree_conv
from radix_mlp.ops.scan.gated_delta_rule import tree_gated_delta_rule
from radix_mlp.ops.scan.kimi_delta import tree_kimi_delta
from radix_mlp.ops.scan.mamba1 import tree_mamba1
from radix_mlp.ops.scan.mamba2 import tree_mamba2
from radix_mlp.plan import RadixPlan

__all__ = ["FUSED", "KERNELS", "follow", "not_fused"]

_PLAN: ContextVar[RadixPlan | None] = ContextVar("radix_plan_of_the_running_mixer", default=None)


@contextlib.contextmanager
def follow(plan: RadixPlan) -> Iterator[None]:
    """Around the forward of one mixer: the plan whose tree its kernels follow."""
    token = _PLAN.set(plan)
    try:
        yield
    finally:
        _PLAN.reset(token)


def causal_conv1d_fn(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **kwargs: Any
) -> Tensor:
    """`hidden_states [1, C, M]`, `weight [C, K]`, `bias [C]` -> `[1, C, M]`."""
    plan = _plan("causal_conv1d_fn", kwargs)
    with _as_given(hidden_states):
        out = tree_conv(hidden_states[0].T.to(weight.dtype), weight, bias, plan)
        if activation is not None:
            out = ACT2FN[activation](out)
    return out.T[None].to(hidden_states.dtype)


def _delta_rule(name: str, along_tree: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """What runs in place of the delta rule `name`, whose kernels all take the same."""

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int = 64,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`query`, `key [1, M, Hk, K]`, `value [1, M, Hv, V]`, `g [1, M, Hv]` or `[1, M, Hv, K]`, `beta [1, M, Hv]`
        -> `[1, M, Hv, V]` and, if it is asked for, the state after each sequence `[S, Hv, K, V]`."""
        plan = _plan(name, kwargs, initial_state=initial_state)
        with _as_given(query):
            q, k, v, decay, step = query[0], key[0], value[0], g[0], beta[0]
            if not output_final_state:
                return along_tree(q, k, v, decay, step, plan, normalize_qk=use_qk_l2norm_in_kernel)[None], None
            reader = state_reader(plan, q.shape[2], q.device)
            # keys of length 1, which a step of 0 keeps out of the state
            q, k = reader.widen(q, reader.units()), reader.widen(k, reader.units())
            v, decay, step = (reader.widen(x) for x in (v, decay, step))
            out, read = reader.split(
                along_tree(q, k, v, decay, step, reader.plan, normalize_qk=use_qk_l2norm_in_kernel)
            )
            # outputs are multiplied by K ** -0.5
            return out[None], _dense(read.transpose(1, 2) * q.shape[2] ** 0.5, torch.float32)

    return run


def mamba2_chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`hidden_states [1, M, H, P]`, `dt [1, M, H]`, `A`, `D [H]`, `B`, `C [1, M, G, N]` -> `[1, M, H, P]` and, if it is
    asked for, the state after each sequence `[S, H, P, N]`."""
    plan = _plan("mamba2_chunk_scan", kwargs, initial_state=initial_states)
    options: dict[str, Any] = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
    x, step, b, c = hidden_states[0], dt[0], B[0], C[0]
    with _as_given(hidden_states):
        if not return_final_states:
            return tree_mamba2(x, step, A, b, c, plan, **options)[None]
        if not dt_softplus or dt_limit[0] > 0:
            raise UnsupportedCallError(
                f"mamba2_chunk_scan has steps of at least {dt_limit[0]} (softplus: {dt_softplus}), so no row can leave "
                "a state as it is"
            )
        reader = state_reader(plan, b.shape[2], x.device)
        x, b, c = reader.widen(x), reader.widen(b), reader.widen(c, reader.units())
        out, read = reader.split(tree_mamba2(x, reader.widen(step, _NO_STEP), A, b, c, reader.plan, **options))
        return out[None], _dense(read.permute(0, 2, 3, 1), torch.float32)


def mamba_selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`hidden_states`, `dt`, `z [1, I, M]`, `A [I, N]`, `B`, `C [1, N, M]`, `D [I]` -> `[1, I, M]` and, if it is asked
    for, the state after each sequence `[S, I, N]`."""
    plan = _plan("mamba_selective_scan", kwargs)
    options: dict[str, Any] = {"D": D, "dt_bias": delta_bias, "dt_softplus": delta_softplus}
    with _as_given(hidden_states):
        x, step, gate = hidden_states[0].T, dt[0].T, None if z is None else z[0].T
        b, c = B[0].T, C[0].T
        if not return_last_state:
            return tree_mamba1(x, step, A, b, c, plan, z=gate, **options).T[None]
        if not delta_softplus:
            raise UnsupportedCallError("mamba_selective_scan takes no softplus, so no row can leave a state as it is")
        reader = state_reader(plan, b.shape[1], x.device)
        x, b, c = reader.widen(x), reader.widen(b), reader.widen(c, reader.units()[:, 0])
        out, read = reader.split(tree_mamba1(x, reader.widen(step, _NO_STEP), A, b, c, reader.plan, **options))
        out = out if gate is None else out * torch.nn.functional.silu(gate)
        return out.T[None], _dense(read.transpose(1, 2), torch.promote_types(read.dtype, torch.float32))


def not_fused(*args: Any, **kwargs: Any) -> None:
    """In place of the fused kernels of training, which know no tree: mixers then call the functions above."""


KERNELS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "chunk_kimi_delta_attention": _delta_rule("chunk_kimi_delta_attention", tree_kimi_delta),
    "mamba2_chunk_scan": mamba2_chunk_scan,
    "mamba_selective_scan": mamba_selective_scan,
    "torch_chunk_gated_delta_rule": _delta_rule("torch_chunk_gated_delta_rule", tree_gated_delta_rule),
}
"""Name in the modeling files -> what runs in its place."""
FUSED = ("mamba2_split_conv1d_scan_combined", "mamba_inner_fn")
"""Functions of the modeling files that give None where there is no fused kernel."""


_NO_STEP = -1e4
"""Of which the softplus is 0 in every dtype."""


def _dense(state: Tensor, dtype: torch.dtype) -> Tensor:
    """In the dtype that the plain function gives states in."""
    return state.to(dtype).contiguous()


def _plan(name: str, kwargs: dict[str, Any], *, initial_state: Tensor | None = None) -> RadixPlan:
    """The plan to follow, if nothing is asked for that a folded call has not: sequences in a row, earlier states."""
    given = [option for option in ("cu_seqlens", "seq_idx", "scale", "z") if kwargs.get(option) is not None]
    given += ["initial_state"] * (initial_state is not None)
    if given:
        raise UnsupportedCallError(
            f"{name} was given {', '.join(given)} in a folded call, which continues no state, packs no sequences. Run "
            "the call unfolded (radix_mlp.disable(model))."
        )
    plan = _PLAN.get()
    assert plan is not None, "only MixerForward runs this, inside of `follow`"
    return plan


def _as_given(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """States are summed in the dtype of what is given, not in that of autocast."""
    return torch.autocast(x.device.type, enabled=False)
