"""`tree_attention`: causal attention on the rows of a folded batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from radix_mlp.errors import InvalidDtypeError, InvalidInputError
from radix_mlp.ops.attention.attention_call import AttentionCall, kind_of
from radix_mlp.ops.attention.attention_tree import AttentionTree
from radix_mlp.ops.attention.custom_op import attention_op
from radix_mlp.ops.attention.registry import COMPOSITES, resolve_impl
from radix_mlp.ops.device_plan import DevicePlan, to_device
from radix_mlp.ops.tensors import check_tensors
from radix_mlp.plan.radix_plan import RadixPlan

__all__ = ["tree_attention"]

# kernels add it to depths in 32 bits; no path is as long
_MAX_WINDOW = 2**30


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: RadixPlan | DevicePlan | AttentionTree,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    query_rows: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention in which every row sees its left context, as it would in its sequence alone.

    Row `i` sees key `j` iff `j <= i < plan.end[j]` and, with a window, `depth[i] - depth[j] < window`. In a plan with
    spans (`RadixPlan.with_spans`), `j < span_end[i]` takes the place of `j <= i`: rows of a span see one another.
    The output of padding rows is finite but meaningless.

    Args:
        q: `[M, Hq, D]`, or `[Q, Hq, D]` with `query_rows`; any strides (the last dimension dense is faster).
        k: `[M, Hkv, D]`, `Hq` a multiple of `Hkv`; query head `h` uses kv head `h // (Hq // Hkv)`.
        v: `[M, Hkv, Dv]`.
        plan: of the batch. In compiled code pass an `AttentionTree`, which must be on q's device.
        scale: of the scores; `D ** -0.5` if None.
        window: the most keys that a query sees, including its own.
        softcap: scores become `softcap * tanh(scores / softcap)`.
        sinks: `[Hq]`, one logit per head that takes part in the softmax and has no value.
        query_rows: `[Q]` int32, ascending: the rows that q holds, if not all. None takes those of the plan
            (`RadixPlan.with_query_rows`), which are all rows by default. Forward only, with `dense` and `reference`.
        impl: `auto`, or a name from `available_impls`. A named implementation never falls back.

    Returns:
        `[M, Hq, Dv]` (`[Q, Hq, Dv]`) in q's dtype, contiguous. Differentiable once in q, k, v and sinks.

    Raises:
        InvalidInputError: shapes, devices or options do not fit together; InvalidDtypeError for dtypes.
        UnsupportedImplError: `impl` is unknown here or does not support the call.

    Examples:
        >>> import torch
        >>> from radix_mlp.plan import build_plan
        >>> plan = build_plan([5, 6, 7, 5, 6, 8], [0, 3, 6])
        >>> q, kv = torch.ones(4, 2, 8), torch.ones(4, 1, 8)
        >>> tree_attention(q, kv, kv, plan).shape
        torch.Size([4, 2, 8])
    """
    check_tensors(q=q, k=k, v=v, sinks=sinks, query_rows=query_rows)
    tree = _tree(plan, q, impl)
    if query_rows is not None:
        tree = tree._replace(query_rows=query_rows)
    _check(q, k, v, tree, window, softcap, sinks)
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    window = None if window is None else min(int(window), _MAX_WINDOW)
    call = AttentionCall(q, k, v, sinks, tree, scale, window, softcap)
    name = resolve_impl(impl, kind_of(call))
    if name in COMPOSITES:
        return COMPOSITES[name].attention(call)
    return attention_op(call, name)


def _tree(plan: RadixPlan | DevicePlan | AttentionTree, q: Tensor, impl: str) -> AttentionTree:
    if isinstance(plan, AttentionTree):
        return plan
    if isinstance(plan, DevicePlan):
        return plan.tree_for(impl)
    if isinstance(plan, RadixPlan):
        return to_device(plan, q.device, tree=False).tree_for(impl)
    raise InvalidDtypeError(f"plan is a {type(plan).__name__}: pass a RadixPlan, a DevicePlan or an AttentionTree")


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: AttentionTree,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    if not q.dim() == k.dim() == v.dim() == 3:
        raise InvalidInputError(
            f"q, k, v have {q.dim()}, {k.dim()}, {v.dim()} dimensions, not 3: [M, H, D], without a batch dimension"
        )
    rows, heads, width = q.shape
    num_rows = tree.end.shape[0]
    if tree.query_rows is None and num_rows != rows:
        raise InvalidInputError(f"q has {rows} rows, the plan {num_rows}: pass folded rows and their own plan")
    if tree.query_rows is not None:
        _check_query_rows(tree.query_rows, q)
    if tree.span_end is not None:
        _check_span_end(tree.span_end, tree.end)
    if k.shape[0] != num_rows or v.shape[0] != num_rows:
        raise InvalidInputError(f"k and v have {k.shape[0]} and {v.shape[0]} rows, the plan {num_rows}")
    if k.shape[2] != width:
        raise InvalidInputError(f"k has head dimension {k.shape[2]}, q has {width}")
    if k.shape[1] != v.shape[1] or 0 in (k.shape[1], heads) or heads % k.shape[1]:
        raise InvalidInputError(
            f"k and v have {k.shape[1]} and {v.shape[1]} heads: they must agree and divide q's {heads}"
        )
    if not q.dtype.is_floating_point or not q.dtype == k.dtype == v.dtype:
        raise InvalidDtypeError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: they must be one floating dtype")
    if not q.device == k.device == v.device == tree.end.device:
        raise InvalidInputError(
            f"q, k, v and the plan are on {q.device}, {k.device}, {v.device} and {tree.end.device}: use one device"
        )
    if window is not None and (window < 1 or window != int(window)):
        raise InvalidInputError(f"window={window}: a whole number of at least 1, or None for no window")
    if softcap is not None and not 0 < softcap < math.inf:
        raise InvalidInputError(f"softcap={softcap}: above 0 and finite, or None for no soft cap")
    if sinks is not None and (sinks.shape != (heads,) or sinks.device != q.device):
        raise InvalidInputError(f"sinks is {tuple(sinks.shape)} on {sinks.device}: pass ({heads},) on {q.device}")
    if sinks is not None and not sinks.dtype.is_floating_point:
        raise InvalidDtypeError(f"sinks is {sinks.dtype}: pass a floating dtype")


def _check_query_rows(query_rows: Tensor, q: Tensor) -> None:
    if query_rows.dtype != torch.int32:
        raise InvalidDtypeError(f"query_rows is {query_rows.dtype}: pass int32")
    if query_rows.shape != (q.shape[0],) or query_rows.device != q.device:
        raise InvalidInputError(
            f"query_rows is {tuple(query_rows.shape)} on {query_rows.device}: pass one row for each row of q, "
            f"({q.shape[0]},) on {q.device}"
        )


def _check_span_end(span_end: Tensor, end: Tensor) -> None:
    if span_end.dtype != torch.int32:
        raise InvalidDtypeError(f"span_end is {span_end.dtype}: pass int32")
    if span_end.shape != end.shape or span_end.device != end.device:
        raise InvalidInputError(
            f"span_end is {tuple(span_end.shape)} on {span_end.device}: pass one number for each row of the plan, "
            f"({end.shape[0]},) on {end.device}"
        )
