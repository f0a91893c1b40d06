"""`tree_lightning`: linear attention with a fixed decay per head, along root paths."""

from __future__ import annotations

from torch import Tensor

from radix_mlp.ops.scan.arguments import Tree, check_rows, check_shape, run, tree_of
from radix_mlp.ops.scan.scan_call import LightningCall

__all__ = ["tree_lightning"]


def tree_lightning(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, tree: Tree, *, impl: str = "auto") -> Tensor:
    """Lightning attention (arXiv 2401.04658), each row after the rows before it in its sequence.

    For every head, with state `S` `[K, V]`, zeros before the first token:

        S <- exp(-slope) S + k v^T;    out = S^T q

    As `MiniMaxLightningAttention` of transformers, but states are float32, or float64 for float64 rows.

    Args:
        q: `[M, H, K]`.
        k: `[M, H, K]`.
        v: `[M, H, V]`.
        slope: `[H]`, at least 0.
        tree: of the batch.
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
        >>> one = torch.ones(4, 1, 1)
        >>> tree_lightning(one, one, one, torch.zeros(1), plan).flatten()
        tensor([1., 2., 3., 3.])
    """
    tree = tree_of(tree, q=q)
    check_rows(tree, q=(q, 3), v=(v, 3))
    rows, heads, width = q.shape
    check_shape(tree, k=(k, (rows, heads, width)), v=(v, (rows, heads, v.shape[2])), slope=(slope, (heads,)))
    call = LightningCall(q, k, v, slope, tree)
    return run(impl, "lightning", call).to(q.dtype)
