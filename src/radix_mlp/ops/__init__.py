"""Operations on folded batches: torch, any device."""

from radix_mlp.ops.attention import tree_attention
from radix_mlp.ops.choose import report
from radix_mlp.ops.fold import fold, unfold
from radix_mlp.ops.logprobs import TokenLogprobs, token_logprobs
from radix_mlp.ops.pool import cls, last_token, mean, weighted_mean
from radix_mlp.ops.registry import available_impls
from radix_mlp.plan.device import AttentionTree, DevicePlan

__all__ = [
    "AttentionTree",
    "DevicePlan",
    "TokenLogprobs",
    "available_impls",
    "cls",
    "fold",
    "last_token",
    "mean",
    "report",
    "token_logprobs",
    "tree_attention",
    "unfold",
    "weighted_mean",
]
