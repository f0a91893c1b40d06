"""`impl="triton"`: the tree kernels behind the interface of `attention_call.Implementation`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.ops.attention.attention_call import AttentionCall, CallKind
from radix_mlp.ops.attention.attention_tree import AttentionTree, HostTree, tables_of
from radix_mlp.ops.attention.impl.triton_launch import TritonBlocks, triton_backward, triton_forward
from radix_mlp.ops.attention.impl.triton_tables import (
    TableSizes,
    fill_forward_tables,
    pack_tables,
    size_of_forward_tables,
)
from radix_mlp.ops.packages import HAS_TRITON, INTERPRETS_TRITON

__all__ = [
    "MAX_WIDTH",
    "SAVES_LSE",
    "Tables",
    "backward",
    "fill_graph_tables",
    "forward",
    "graph_tables",
    "prepare",
    "size_of_graph_tables",
    "why_not",
]

SAVES_LSE = True
MAX_WIDTH = 512
"""Largest head dimension."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# rows, in windows, from which tables made for the window save more than making them costs
_LONG = 8


class Tables(NamedTuple):
    """The tables that the kernels walk."""

    tables: Tensor
    """int32, all tables in one vector, as `triton_tables.pack_tables` lays them out."""
    host_sizes: Tensor
    """int64, `triton_tables.TableSizes`."""


def why_not(kind: CallKind) -> str | None:
    """See `attention_call.Implementation`."""
    if kind.device_type != "cuda" and not (INTERPRETS_TRITON and kind.device_type == "cpu"):
        return f"cannot run on {kind.device_type}"
    if not HAS_TRITON:
        return "needs the package triton, which is not installed"
    if kind.dtype not in _DTYPES:
        return f"takes bfloat16, float16 and float32, not {kind.dtype}"
    if kind.width > MAX_WIDTH or kind.value_width > MAX_WIDTH:
        return f"takes head dimensions up to {MAX_WIDTH}, not {kind.width} and {kind.value_width}"
    if kind.scale < 0:
        return f"takes a scale of at least 0, not {kind.scale}: negate q"
    if kind.query_rows:
        return "does not compute a subset of the rows (query_rows)"
    return None


def prepare(tree: HostTree) -> Tables:
    """See `attention_call.Implementation`."""
    tables, sizes = pack_tables(tree.end, tree.depth, backward=tree.backward)
    return Tables(torch.from_numpy(tables), torch.tensor(sizes))


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """`[M, Hq, D]`, `[M, Hkv, D]`, `[M, Hkv, Dv]` -> `[M, Hq, Dv]` and the log-sum-exp `[Hq, M]`."""
    q, k, v, sinks, tree, scale, window, softcap = call
    blocks = _blocks(tree)
    return triton_forward(
        q, k, v, tree.end, tree.depth, blocks, scale=scale, window=window, softcap=softcap, sinks=sinks,
        span_end=tree.span_end, mean_keys=_mean_keys(blocks, len(tree.end), window),
    )  # fmt: skip


def backward(
    grad_out: Tensor, call: AttentionCall, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and sinks."""
    q, k, v, sinks, tree, scale, window, softcap = call
    end, depth = tree.end, tree.depth
    blocks = _blocks(tree)
    mean_keys = _mean_keys(blocks, len(end), window)
    # a tree made with gradients disabled lacks the tables of the backward pass
    if blocks.sizes.num_items == 0 or (window is not None and len(end) > _LONG * window):
        blocks = TritonBlocks.make(end, depth, window)
    return triton_backward(
        grad_out, q, k, v, out, lse, end, depth, blocks, scale=scale, window=window, softcap=softcap, sinks=sinks,
        span_end=tree.span_end, mean_keys=mean_keys,
    )  # fmt: skip


def _blocks(tree: AttentionTree) -> TritonBlocks:
    tables = tables_of(tree, "triton", prepare)
    return TritonBlocks(tables.tables, TableSizes(*tables.host_sizes.tolist()))


def _mean_keys(blocks: TritonBlocks, num_rows: int, window: int | None) -> float:
    """Keys that a row sees on average."""
    mean = blocks.sizes.pairs / max(num_rows, 1)
    return mean if window is None else min(mean, window)


def size_of_graph_tables(num_rows: int) -> int:
    """Numbers of the tables of any tree of `num_rows`, forward only."""
    return size_of_forward_tables(num_rows)


def graph_tables(vector: Tensor, num_rows: int, mean_keys: int) -> Tables:
    """Tables over `vector` (`[size_of_graph_tables]` int32), of a size that is right for all trees of `num_rows`.

    `mean_keys` is how many keys a row sees, for the choice of tiles.
    """
    return Tables(vector, torch.tensor(TableSizes(num_rows, 0, 0, 0, mean_keys * num_rows)))


def fill_graph_tables(end: NDArray[np.int32], depth: NDArray[np.int32], vector: NDArray[np.int32]) -> None:
    """Write the tables of a tree to the vector of `graph_tables`. Ranges past the last are never read."""
    fill_forward_tables(end, depth, vector)
