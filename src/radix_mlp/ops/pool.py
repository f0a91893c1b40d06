"""Pooling: one vector a sequence, straight from compact rows."""

from __future__ import annotations

from torch import Tensor

from radix_mlp.plan.device import DevicePlan
from radix_mlp.plan.radix_plan import RadixPlan

__all__ = ["cls", "last_token", "mean", "weighted_mean"]


def last_token(hidden: Tensor, plan: RadixPlan | DevicePlan) -> Tensor:
    """`[M, h] -> [S, h]`: the last token of every sequence."""
    raise NotImplementedError


def cls(hidden: Tensor, plan: RadixPlan | DevicePlan) -> Tensor:
    """`[M, h] -> [S, h]`: the first token of every sequence."""
    raise NotImplementedError


def mean(hidden: Tensor, plan: RadixPlan | DevicePlan) -> Tensor:
    """`[M, h] -> [S, h]`: the mean over every sequence's tokens."""
    raise NotImplementedError


def weighted_mean(hidden: Tensor, plan: RadixPlan | DevicePlan) -> Tensor:
    """`[M, h] -> [S, h]`: the mean with weights 1, 2, ..., L."""
    raise NotImplementedError
