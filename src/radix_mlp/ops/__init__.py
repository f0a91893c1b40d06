"""Operations on folded batches: torch, any device."""

from radix_mlp.ops.attention.attention_tree import AttentionTree
from radix_mlp.ops.attention.impl.auto_cost_model import report
from radix_mlp.ops.attention.registry import available_impls
from radix_mlp.ops.attention.tree_attention import tree_attention
from radix_mlp.ops.device_plan import DevicePlan, to_device
from radix_mlp.ops.fold import fold, unfold
from radix_mlp.ops.head.edge_logprobs import EdgeLogprobs, edge_logprobs
from radix_mlp.ops.head.edges import (
    DeviceEdges,
    Edges,
    edges_to_tokens,
    label_edges,
    sequence_sums,
    tokens_to_edges,
    tree_edges,
)
from radix_mlp.ops.head.linear_head import LinearHead
from radix_mlp.ops.head.logprobs import TokenLogprobs, token_logprobs
from radix_mlp.ops.pool import cls, last_token, mean, weighted_mean

__all__ = [
    "AttentionTree",
    "DeviceEdges",
    "DevicePlan",
    "EdgeLogprobs",
    "Edges",
    "LinearHead",
    "TokenLogprobs",
    "available_impls",
    "cls",
    "edge_logprobs",
    "edges_to_tokens",
    "fold",
    "label_edges",
    "last_token",
    "mean",
    "report",
    "sequence_sums",
    "to_device",
    "token_logprobs",
    "tokens_to_edges",
    "tree_attention",
    "tree_edges",
    "unfold",
    "weighted_mean",
]
