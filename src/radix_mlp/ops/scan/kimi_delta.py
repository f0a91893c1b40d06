"""`tree_kimi_delta`: the gated delta rule with a decay for each key element, along root paths."""

from __future__ import annotations

from torch import Tensor

from radix_mlp.ops.scan.arguments import Tree, check_rows, check_shape, run, tree_of
from radix_mlp.ops.scan.scan_call import DeltaCall

__all__ = ["tree_kimi_delta"]


def tree_kimi_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    tree: Tree,
    *,
    scale: float | None = None,
    normalize_qk: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Kimi delta attention (arXiv 2510.26692), each row after the rows before it in its sequence.

    For every head, with state `S` `[K, V]`, zeros before the first token:

        S <- diag(exp(g)) S;    S <- S + beta k (v - S^T k)^T;    out = scale * S^T q

    As `chunk_kimi_delta_attention` of transformers: states are float32, or float64 for float64 rows.

    Args:
        q: `[M, H, K]`.
        k: `[M, H, K]`.
        v: `[M, H, V]`.
        g: `[M, H, K]` logarithms of the decays, at most 0.
        beta: `[M, H]`.
        tree: of the batch.
        scale: of q; `K ** -0.5` if None.
        normalize_qk: divide each row of q and k by its length first.
        impl: `auto`, or the name of an implementation, which never falls back.

    Returns:
        `[M, H, V]` in q's dtype. Differentiable once in all tensors. Zeros for padding rows.

    Raises:
        InvalidInputError: shapes or devices do not fit; InvalidDtypeError for dtypes.
        UnsupportedImplError: `impl` is unknown or does not support the call.

    Examples:
        >>> import torch
        >>> from radix_mlp.plan import build_plan
        >>> plan = build_plan([5, 6, 7, 5, 6, 8], [0, 3, 6])
        >>> one, gate = torch.ones(4, 1, 1), torch.zeros(4, 1)
        >>> tree_kimi_delta(one, one, one, gate[..., None], gate + 0.5, plan).flatten()
        tensor([0.5000, 0.7500, 0.8750, 0.8750])
    """
    tree = tree_of(tree, q=q)
    check_rows(tree, q=(q, 3), v=(v, 3))
    rows, heads, width = q.shape
    check_shape(
        tree,
        k=(k, (rows, heads, width)),
        v=(v, (rows, heads, v.shape[2])),
        g=(g, (rows, heads, width)),
        beta=(beta, (rows, heads)),
    )
    call = DeltaCall(q, k, v, g, beta, tree, width**-0.5 if scale is None else scale, normalize_qk)
    return run(impl, "kimi_delta", call).to(q.dtype)
