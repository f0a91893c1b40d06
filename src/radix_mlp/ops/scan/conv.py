"""`tree_conv`: causal depthwise convolution along root paths."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from radix_mlp.errors import InvalidInputError
from radix_mlp.ops.scan.arguments import Tree, check_rows, check_shape, run, tree_of
from radix_mlp.ops.scan.scan_call import ConvCall
from radix_mlp.ops.tensors import check_tensors

__all__ = ["tree_conv"]

ACTIVATIONS = (None, "silu", "swish")


def tree_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tree: Tree,
    activation: str | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Each row with the `K - 1` rows before it in its sequence, zeros before the first one.

    As `causal_conv1d_fn` of transformers: computed in weight's dtype, returned in x's.

    Args:
        x: `[M, C]`.
        weight: `[C, K]`; the last tap is the row's own.
        bias: `[C]` or None.
        tree: of the batch.
        activation: `silu` (`swish`), or None.
        impl: `auto`, or the name of an implementation, which never falls back.

    Returns:
        `[M, C]`. Differentiable once in x, weight and bias. Padding rows see only themselves.

    Raises:
        InvalidInputError: shapes, devices or the activation do not fit; InvalidDtypeError for dtypes.
        UnsupportedImplError: `impl` is unknown or does not support the call.

    Examples:
        >>> import torch
        >>> from radix_mlp.plan import build_plan
        >>> plan = build_plan([5, 6, 7, 5, 6, 8], [0, 3, 6])
        >>> tree_conv(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.ones(1, 2), None, plan).flatten()
        tensor([1., 3., 5., 6.])
    """
    tree = tree_of(tree, x=x)
    check_rows(tree, x=(x, 2))
    check_tensors(weight=weight)
    check_shape(tree, weight=(weight, (x.shape[1], *weight.shape[1:2])), bias=(bias, (x.shape[1],)))
    if weight.shape[1] == 0:
        raise InvalidInputError("weight has no taps")
    if activation not in ACTIVATIONS:
        raise InvalidInputError(f"activation={activation!r}: pass one of {ACTIVATIONS} and apply others to the result")
    out = run(impl, "conv", ConvCall(x.to(weight.dtype), weight, tree)).to(weight.dtype)
    out = out if bias is None else out + bias
    return (out if activation is None else F.silu(out)).to(x.dtype)
