"""Copies of rows by index and sums of copies: differentiable custom ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["copy_rows", "first_rows", "segment_sum"]

_LIBRARY = torch.library.Library("radix_mlp", "FRAGMENT")
# pairs of linear maps, each the other's gradient, so that both differentiate any number of times
_LIBRARY.define("copy_rows(Tensor x, Tensor index) -> Tensor")
_LIBRARY.define("segment_sum(Tensor x, Tensor index, SymInt num_rows) -> Tensor")
_LIBRARY.define("first_rows(Tensor x, Tensor fold_index, Tensor unfold_index) -> Tensor")
_LIBRARY.define("spread_rows(Tensor x, Tensor fold_index, Tensor unfold_index) -> Tensor")


def first_rows(x: Tensor, fold_index: Tensor, unfold_index: Tensor) -> Tensor:
    """`x[fold_index]`, differentiable any number of times; padding rows pass no gradient."""
    return torch.ops.radix_mlp.first_rows(x, fold_index, unfold_index)


def copy_rows(x: Tensor, index: Tensor) -> Tensor:
    """`x[index]`, differentiable any number of times; the gradient is a deterministic segment sum."""
    return torch.ops.radix_mlp.copy_rows(x, index)


def segment_sum(x: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """`out[j]` = sum of `x[i]` where `index[i] == j`, in order of `i`: `[N, ...] -> [num_rows, ...]`.

    Half types are summed in float32.
    """
    return torch.ops.radix_mlp.segment_sum(x, index, num_rows)


def _copy_rows(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index)


def _segment_sum(x: Tensor, index: Tensor, num_rows: int) -> Tensor:
    if x.numel() == 0 or num_rows == 0:
        return x.new_zeros(num_rows, *x.shape[1:])
    wide = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    if not x.is_cuda:
        # in order and many times faster there than segment_reduce
        return x.new_zeros(num_rows, *x.shape[1:], dtype=wide).index_add_(0, index, x.to(wide)).to(x.dtype)
    index, order = index.sort(stable=True)
    offsets = torch.searchsorted(index, torch.arange(num_rows + 1, device=index.device))
    gathered = x.index_select(0, order).flatten(1).to(wide) if x.dim() > 1 else x[order, None].to(wide)
    sums = torch.segment_reduce(gathered, "sum", offsets=offsets, axis=0, initial=0)
    return sums.to(x.dtype).view(num_rows, *x.shape[1:])


def _first_rows(x: Tensor, fold_index: Tensor, unfold_index: Tensor) -> Tensor:
    return x.index_select(0, fold_index)


def _first_real_rows(x: Tensor, fold_index: Tensor, unfold_index: Tensor) -> Tensor:
    """The adjoint of `_spread_rows`: padding rows are zero."""
    row = torch.arange(fold_index.shape[0], device=x.device)
    real = unfold_index.index_select(0, fold_index) == row
    return _keep(first_rows(x, fold_index, unfold_index), real)


def _spread_rows(x: Tensor, fold_index: Tensor, unfold_index: Tensor) -> Tensor:
    """Every row to its first occurrence, zeros elsewhere; padding rows go nowhere."""
    token = torch.arange(unfold_index.shape[0], device=x.device)
    first = fold_index.index_select(0, unfold_index) == token
    return _keep(x.index_select(0, unfold_index), first)


def _keep(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(~mask.view(-1, *[1] * (x.dim() - 1)), 0)


def _save_index(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, *_ = inputs
    ctx.save_for_backward(index)
    ctx.num_rows = x.shape[0]


def _save_indices(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _register(name: str, kernel: Any, fake: Any, backward: Any, setup_context: Any) -> None:
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"radix_mlp::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"radix_mlp::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


_register(
    "copy_rows",
    _copy_rows,
    lambda x, index: x.new_empty(index.shape[0], *x.shape[1:]),
    lambda ctx, grad: (segment_sum(grad, ctx.saved_tensors[0], ctx.num_rows), None),
    _save_index,
)
_register(
    "segment_sum",
    _segment_sum,
    lambda x, index, num_rows: x.new_empty(num_rows, *x.shape[1:]),
    lambda ctx, grad: (copy_rows(grad, ctx.saved_tensors[0]), None, None),
    _save_index,
)
_register(
    "first_rows",
    _first_rows,
    lambda x, fold_index, unfold_index: x.new_empty(fold_index.shape[0], *x.shape[1:]),
    lambda ctx, grad: (torch.ops.radix_mlp.spread_rows(grad, *ctx.saved_tensors), None, None),
    _save_indices,
)
_register(
    "spread_rows",
    _spread_rows,
    lambda x, fold_index, unfold_index: x.new_empty(unfold_index.shape[0], *x.shape[1:]),
    lambda ctx, grad: (_first_real_rows(grad, *ctx.saved_tensors), None, None),
    _save_indices,
)
