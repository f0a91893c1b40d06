"""`tree_mamba1`: the selective scan of Mamba 1 along root paths."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from radix_mlp.ops.scan.arguments import Tree, check_rows, check_shape, run, tree_of
from radix_mlp.ops.scan.scan_call import Mamba1Call

__all__ = ["tree_mamba1"]


def tree_mamba1(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    tree: Tree,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    impl: str = "auto",
) -> Tensor:
    """The selective scan of Mamba 1 (arXiv 2312.00752), each row after the rows before it in its sequence.

    For every channel, with state `s` `[N]`, zeros before the first token:

        s <- exp(A dt) s + dt x B;    out = (s . C + D x) silu(z)

    As `mamba_selective_scan` of transformers: states are float32, or float64 for float64 rows.

    Args:
        x: `[M, C]`.
        dt: `[M, C]` steps, before bias and softplus, which are computed in its dtype.
        A: `[C, N]`, at most 0.
        B: `[M, N]`.
        C: `[M, N]`.
        tree: of the batch.
        D: `[C]` or None.
        z: `[M, C]` gates, or None.
        dt_bias: `[C]` or None.
        dt_softplus: whether steps are `softplus(dt + dt_bias)`.
        impl: `auto`, or the name of an implementation, which never falls back.

    Returns:
        `[M, C]` in x's dtype, or that of D or z if it is wider. Differentiable once in all tensors. Padding rows have
        no state.

    Raises:
        InvalidInputError: shapes or devices do not fit; InvalidDtypeError for dtypes.
        UnsupportedImplError: `impl` is unknown or does not support the call.

    Examples:
        >>> import torch
        >>> from radix_mlp.plan import build_plan
        >>> plan = build_plan([5, 6, 7, 5, 6, 8], [0, 3, 6])
        >>> one = torch.ones(4, 1)
        >>> tree_mamba1(one, one, torch.zeros(1, 1), one, one, plan).flatten()
        tensor([1., 2., 3., 3.])
    """
    tree = tree_of(tree, x=x)
    check_rows(tree, x=(x, 2), B=(B, 2))
    rows, channels = x.shape
    check_shape(
        tree,
        dt=(dt, (rows, channels)),
        A=(A, (channels, B.shape[1])),
        C=(C, tuple(B.shape)),
        D=(D, (channels,)),
        z=(z, (rows, channels)),
        dt_bias=(dt_bias, (channels,)),
    )
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = F.softplus(dt) if dt_softplus else dt
    call = Mamba1Call(x, dt, A, B, C, tree)
    out = run(impl, "mamba1", call).to(x.dtype)
    out = out if D is None else out + x * D
    return out if z is None else out * F.silu(z)
