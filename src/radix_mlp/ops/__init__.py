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
from radix_mlp.ops.scan.conv import tree_conv
from radix_mlp.ops.scan.gated_delta_rule import tree_gated_delta_rule
from radix_mlp.ops.scan.kimi_delta import tree_kimi_delta
from radix_mlp.ops.scan.lightning import tree_lightning
from radix_mlp.ops.scan.mamba1 import tree_mamba1
from radix_mlp.ops.scan.mamba2 import tree_mamba2
from radix_mlp.ops.scan.scan_tree import ScanTree

__all__ = [
    "AttentionTree",
    "DeviceEdges",
    "DevicePlan",
    "EdgeLogprobs",
    "Edges",
    "LinearHead",
    "ScanTree",
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
    "tree_conv",
    "tree_edges",
    "tree_gated_delta_rule",
    "tree_kimi_delta",
    "tree_lightning",
    "tree_mamba1",
    "tree_mamba2",
    "unfold",
    "weighted_mean",
]
