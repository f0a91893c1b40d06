"""`tree_mamba2`: the state space of Mamba 2 along root paths."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from radix_mlp.errors import InvalidInputError
from radix_mlp.ops.scan.arguments import Tree, check_rows, check_shape, run, tree_of
from radix_mlp.ops.scan.scan_call import Mamba2Call, compute_dtype

__all__ = ["tree_mamba2"]


def tree_mamba2(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    tree: Tree,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    impl: str = "auto",
) -> Tensor:
    """The scan of Mamba 2 (arXiv 2405.21060), each row after the rows before it in its sequence.

    For every head, with state `S` `[P, N]`, zeros before the first token:

        S <- exp(A dt) S + dt x B^T;    out = S C + D x

    As `mamba2_chunk_scan` of transformers.

    Args:
        x: `[M, H, P]`.
        dt: `[M, H]` steps, before bias, softplus and limits, which are computed in its dtype.
        A: `[H]`, at most 0.
        B: `[M, G, N]`. Head `h` uses group `h // (H // G)`.
        C: `[M, G, N]`.
        tree: of the batch.
        D: `[H]` or None.
        dt_bias: `[H]` or None.
        dt_softplus: whether steps are `softplus(dt + dt_bias)`.
        dt_limit: the smallest and the largest step.
        impl: `auto`, or the name of an implementation, which never falls back.

    Returns:
        `[M, H, P]` in float32, or float64 for float64 rows. Differentiable once in all tensors. `D x` for padding
        rows.

    Raises:
        InvalidInputError: shapes or devices do not fit; InvalidDtypeError for dtypes.
        UnsupportedImplError: `impl` is unknown or does not support the call.

    Examples:
        >>> import torch
        >>> from radix_mlp.plan import build_plan
        >>> plan = build_plan([5, 6, 7, 5, 6, 8], [0, 3, 6])
        >>> one = torch.ones(4, 1, 1)
        >>> tree_mamba2(one, one[..., 0], torch.zeros(1), one, one, plan).flatten()
        tensor([1., 2., 3., 3.])
    """
    tree = tree_of(tree, x=x)
    check_rows(tree, x=(x, 3), B=(B, 3))
    rows, heads, _ = x.shape
    if 0 in (heads, B.shape[1]) or heads % B.shape[1]:
        raise InvalidInputError(f"x has {heads} heads, B {B.shape[1]} groups: heads must be a multiple of groups")
    check_shape(
        tree,
        dt=(dt, (rows, heads)),
        A=(A, (heads,)),
        C=(C, tuple(B.shape)),
        D=(D, (heads,)),
        dt_bias=(dt_bias, (heads,)),
    )
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    call = Mamba2Call(x, dt, A, B, C, tree)
    dtype = compute_dtype(x, B)
    out = run(impl, "mamba2", call).to(dtype)
    return out if D is None else out + D[:, None] * x.to(dtype)
