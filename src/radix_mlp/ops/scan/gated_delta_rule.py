"""`tree_gated_delta_rule`: linear attention that forgets and corrects, along root paths."""

from __future__ import annotations

from torch import Tensor

from radix_mlp.errors import InvalidInputError
from radix_mlp.ops.scan.arguments import Tree, check_rows, check_shape, run, tree_of
from radix_mlp.ops.scan.scan_call import DeltaCall

__all__ = ["tree_gated_delta_rule"]


def tree_gated_delta_rule(
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
    """The gated delta rule (arXiv 2412.06464), each row after the rows before it in its sequence.

    For every value head, with state `S` `[K, V]`, zeros before the first token:

        S <- exp(g) S;    S <- S + beta k (v - S^T k)^T;    out = scale * S^T q

    As `torch_chunk_gated_delta_rule` of transformers: states are float32, or float64 for float64 rows.

    Args:
        q: `[M, Hk, K]`.
        k: `[M, Hk, K]`. Value head `h` uses key head `h // (Hv // Hk)`.
        v: `[M, Hv, V]`.
        g: `[M, Hv]` logarithms of the decays, at most 0.
        beta: `[M, Hv]`.
        tree: of the batch.
        scale: of q; `K ** -0.5` if None.
        normalize_qk: divide each row of q and k by its length first.
        impl: `auto`, or the name of an implementation, which never falls back.

    Returns:
        `[M, Hv, V]` in q's dtype. Differentiable once in all tensors. Zeros for padding rows.

    Raises:
        InvalidInputError: shapes or devices do not fit; InvalidDtypeError for dtypes.
        UnsupportedImplError: `impl` is unknown or does not support the call.

    Examples:
        >>> import torch
        >>> from radix_mlp.plan import build_plan
        >>> plan = build_plan([5, 6, 7, 5, 6, 8], [0, 3, 6])
        >>> one, gate = torch.ones(4, 1, 1), torch.zeros(4, 1)
        >>> tree_gated_delta_rule(one, one, one, gate, gate + 0.5, plan).flatten()
        tensor([0.5000, 0.7500, 0.8750, 0.8750])
    """
    tree = tree_of(tree, q=q)
    check_rows(tree, q=(q, 3), v=(v, 3))
    rows, key_heads, width = q.shape
    heads = v.shape[1]
    if 0 in (key_heads, heads) or heads % key_heads:
        raise InvalidInputError(f"v has {heads} heads, q {key_heads}: they must be a multiple")
    check_shape(tree, k=(k, (rows, key_heads, width)), g=(g, (rows, heads)), beta=(beta, (rows, heads)))
    call = DeltaCall(q, k, v, g, beta, tree, width**-0.5 if scale is None else scale, normalize_qk)
    return run(impl, "gated_delta_rule", call).to(q.dtype)
