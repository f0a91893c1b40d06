"""`impl="triton"`: the tree kernels behind the interface of `radix_mlp.ops.attention.registry`."""

from __future__ import annotations

from torch import Tensor

from radix_mlp.ops.attention.impl.triton_launch import TritonBlocks, triton_backward, triton_forward
from radix_mlp.ops.attention.leaf_runs import TreeStatistics
from radix_mlp.ops.attention.registry import AttentionCall
from radix_mlp.ops.device_plan import AttentionTree

__all__ = ["backward", "forward"]

# rows, in windows, from which tables made for the window save more than making them costs
_LONG = 8


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """`[M, Hq, D]`, `[M, Hkv, D]`, `[M, Hkv, Dv]` -> `[M, Hq, Dv]` and the log-sum-exp `[Hq, M]`."""
    q, k, v, sinks, tree, scale, window, softcap = call
    return triton_forward(
        q, k, v, tree.end, tree.depth, _blocks(tree), scale=scale, window=window, softcap=softcap, sinks=sinks,
        mean_keys=_mean_keys(tree, window),
    )  # fmt: skip


def backward(
    grad_out: Tensor, call: AttentionCall, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and sinks."""
    q, k, v, sinks, tree, scale, window, softcap = call
    end, depth = tree.end, tree.depth
    # a tree that was made where no gradients are taken comes without the tables of the backward pass
    unprepared = int(tree.host_table_sizes[1]) == 0
    if unprepared or (window is not None and len(end) > _LONG * window):
        blocks = TritonBlocks.make(end, depth, window)
    else:
        blocks = _blocks(tree)
    return triton_backward(
        grad_out, q, k, v, out, lse, end, depth, blocks, scale=scale, window=window, softcap=softcap, sinks=sinks,
        mean_keys=_mean_keys(tree, window),
    )  # fmt: skip


def _blocks(tree: AttentionTree) -> TritonBlocks:
    num_rows = tree.end.shape[0]
    if tree.tables.shape[0] == 0 and num_rows:
        return TritonBlocks.make(tree.end, tree.depth)
    return TritonBlocks(tree.tables, *tree.host_table_sizes.tolist())


def _mean_keys(tree: AttentionTree, window: int | None) -> float | None:
    if tree.host_statistics.shape[0] == 0:
        return None
    known = TreeStatistics(*tree.host_statistics.tolist())
    mean = known.pairs / max(known.num_rows, 1)
    return mean if window is None else min(mean, window)
