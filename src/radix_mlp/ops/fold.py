"""`fold` and `unfold`: between the tokens of a batch and the rows of its tree."""

from __future__ import annotations

from torch import Tensor

from radix_mlp.errors import InvalidDtypeError, InvalidInputError
from radix_mlp.ops.device_plan import DevicePlan, to_device
from radix_mlp.ops.row_copies import copy_rows, first_rows
from radix_mlp.ops.tensors import check_tensors
from radix_mlp.plan.radix_plan import RadixPlan

__all__ = ["fold", "unfold"]


def fold(x: Tensor, plan: RadixPlan | DevicePlan) -> Tensor:
    """`[N, ...]` by token -> `[M, ...]` by row, each row from its first occurrence.

    Use it for values that depend only on a token's left context; where copies differ, only the first is kept.
    Padding rows repeat token 0, and their gradients are dropped.

    Examples:
        >>> import torch
        >>> from radix_mlp.plan import build_plan
        >>> plan = build_plan([5, 6, 5, 7], [0, 2, 4])
        >>> fold(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), plan).flatten()
        tensor([1., 2., 4.])
    """
    plan = _on_device(plan, x)
    _check_rows("x", x, plan.unfold_index.shape[0], "tokens")
    return first_rows(x, plan.fold_index, plan.unfold_index)


def unfold(x: Tensor, plan: RadixPlan | DevicePlan) -> Tensor:
    """`[M, ...]` by row -> `[N, ...]` by token: copies. The gradient is summed in a fixed order.

    Examples:
        >>> import torch
        >>> from radix_mlp.plan import build_plan
        >>> plan = build_plan([5, 6, 5, 7], [0, 2, 4])
        >>> unfold(torch.tensor([[1.0], [2.0], [4.0]]), plan).flatten()
        tensor([1., 2., 1., 4.])
    """
    plan = _on_device(plan, x)
    _check_rows("x", x, plan.fold_index.shape[0], "rows")
    return copy_rows(x, plan.unfold_index)


def _on_device(plan: RadixPlan | DevicePlan, x: Tensor) -> DevicePlan:
    check_tensors(x=x)
    if isinstance(plan, RadixPlan):
        plan = to_device(plan, x.device)
    elif not isinstance(plan, DevicePlan):
        raise InvalidDtypeError(f"plan is a {type(plan).__name__}: pass a RadixPlan or a DevicePlan")
    if plan.fold_index.device != x.device:
        raise InvalidInputError(f"x is on {x.device}, the plan on {plan.fold_index.device}: use plan.to(x.device)")
    return plan


def _check_rows(name: str, x: Tensor, expected: int, what: str) -> None:
    if x.dim() == 0 or x.shape[0] != expected:
        raise InvalidInputError(f"{name} is {tuple(x.shape)}: the plan has {expected} {what}, which must come first")
