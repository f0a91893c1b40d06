"""`fold` and `unfold`: between the tokens of a batch and the rows of its tree."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from radix_mlp.errors import InvalidInputError
from radix_mlp.plan.device import DevicePlan
from radix_mlp.plan.radix_plan import RadixPlan

__all__ = ["copy_rows", "fold", "segment_sum", "unfold"]

_LIBRARY = torch.library.Library("radix_mlp", "FRAGMENT")
_LIBRARY.define("segment_sum(Tensor x, Tensor index, SymInt num_rows) -> Tensor")


def fold(x: Tensor, plan: RadixPlan | DevicePlan) -> Tensor:
    """`[N, ...]` by token -> `[M, ...]` by row, each row from its first occurrence.

    Right for whatever depends only on a token's left context; values that differ between copies are lost.
    Rows that pad the plan repeat token 0, and their gradients are dropped.

    >>> from radix_mlp.plan import build_plan
    >>> plan = build_plan([5, 6, 5, 7], [0, 2, 4])
    >>> fold(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), plan).flatten()
    tensor([1., 2., 4.])
    """
    plan = _on_device(plan, x)
    _check_rows("x", x, plan.unfold_index.shape[0], "tokens")
    return _Fold.apply(x, plan.fold_index, plan.unfold_index)


def unfold(x: Tensor, plan: RadixPlan | DevicePlan) -> Tensor:
    """`[M, ...]` by row -> `[N, ...]` by token: copies. The gradient is summed in a fixed order.

    >>> from radix_mlp.plan import build_plan
    >>> plan = build_plan([5, 6, 5, 7], [0, 2, 4])
    >>> unfold(torch.tensor([[1.0], [2.0], [4.0]]), plan).flatten()
    tensor([1., 2., 1., 4.])
    """
    plan = _on_device(plan, x)
    _check_rows("x", x, plan.fold_index.shape[0], "rows")
    return copy_rows(x, plan.unfold_index)


def copy_rows(x: Tensor, index: Tensor) -> Tensor:
    """`x[index]`, differentiable any number of times; the gradient is a deterministic segment sum."""
    return _CopyRows.apply(x, index)


def segment_sum(x: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """`out[j]` = sum of `x[i]` where `index[i] == j`, in order of `i`: `[N, ...] -> [num_rows, ...]`.

    Half types are summed in float32.
    """
    return torch.ops.radix_mlp.segment_sum(x, index, num_rows)


class _CopyRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return _SumRows.apply(grad, index, ctx.num_rows), None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(index)
        return segment_sum(x, index, num_rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return _CopyRows.apply(grad, index), None, None


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fold_index: Tensor, unfold_index: Tensor) -> Tensor:
        ctx.save_for_backward(fold_index, unfold_index)
        return x.index_select(0, fold_index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Unfold.apply(grad, *ctx.saved_tensors), None, None


class _Unfold(torch.autograd.Function):
    """The adjoint of fold: every row to its first occurrence, zeros elsewhere; padding rows go nowhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fold_index: Tensor, unfold_index: Tensor) -> Tensor:
        ctx.save_for_backward(fold_index, unfold_index)
        token = torch.arange(unfold_index.shape[0], device=x.device)
        first = fold_index.index_select(0, unfold_index) == token
        return _keep(x.index_select(0, unfold_index), first)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        fold_index, unfold_index = ctx.saved_tensors
        row = torch.arange(fold_index.shape[0], device=grad.device)
        real = unfold_index.index_select(0, fold_index) == row
        return _keep(_Fold.apply(grad, fold_index, unfold_index), real), None, None


def _keep(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(~mask.view(-1, *[1] * (x.dim() - 1)), 0)


def _segment_sum(x: Tensor, index: Tensor, num_rows: int) -> Tensor:
    if x.numel() == 0 or num_rows == 0:
        return x.new_zeros(num_rows, *x.shape[1:])
    index, order = index.sort(stable=True)
    offsets = torch.searchsorted(index, torch.arange(num_rows + 1, device=index.device))
    wide = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    gathered = x.index_select(0, order).flatten(1).to(wide)
    return torch.segment_reduce(gathered, "sum", offsets=offsets, axis=0, initial=0).to(x.dtype).view(-1, *x.shape[1:])


def _segment_sum_fake(x: Tensor, index: Tensor, num_rows: int) -> Tensor:
    return x.new_empty(num_rows, *x.shape[1:])


_LIBRARY.impl("segment_sum", _segment_sum, "CompositeExplicitAutograd")
torch.library.register_fake("radix_mlp::segment_sum", _segment_sum_fake, lib=_LIBRARY)


def _on_device(plan: RadixPlan | DevicePlan, x: Tensor) -> DevicePlan:
    if isinstance(plan, RadixPlan):
        plan = plan.to(x.device)
    if plan.fold_index.device != x.device:
        raise InvalidInputError(f"x is on {x.device}, the plan on {plan.fold_index.device}: use plan.to(x.device)")
    return plan


def _check_rows(name: str, x: Tensor, expected: int, what: str) -> None:
    if x.dim() == 0 or x.shape[0] != expected:
        raise InvalidInputError(f"{name} is {tuple(x.shape)}: the plan has {expected} {what}, which must come first")
