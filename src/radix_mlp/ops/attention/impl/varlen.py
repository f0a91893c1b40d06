"""Tree attention through FlashAttention for packed sequences: q as it lies, k and v gathered along leaf paths.

The own rows of a leaf path (`leaf_paths`) see the root path of the last of them, causal from the bottom right.  So they
are one packed sequence of queries, and the keys of the path, gathered, are those of that sequence.
Depths grow by one a key along a path, so a window is the ordinary sliding window.  Every pair of the tree is computed
once.  In the backward pass q's gradient comes out row by row; those of k and v are sums over the gathered copies, in a
fixed order.  Where nothing is shared nothing is gathered: this is then plain packed attention.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from radix_mlp.ops.attention.attention_call import AttentionCall, CallKind, why_not_some_rows_or_spans
from radix_mlp.ops.attention.attention_tree import HostTree, tables_of
from radix_mlp.ops.attention.impl import torch_flash
from radix_mlp.ops.attention.impl.copies import Copies
from radix_mlp.ops.attention.impl.gathered_rows import gather_rows, sum_copies
from radix_mlp.ops.attention.impl.leaf_paths import LeafPaths, leaf_paths
from radix_mlp.ops.attention.impl.torch_flash import Flash, InTreeFlash

__all__ = [
    "SAVES_LSE",
    "Tables",
    "attend_paths",
    "attend_paths_backward",
    "backward",
    "forward",
    "prepare",
    "tables_from",
    "why_not",
]

SAVES_LSE = True


class Tables(NamedTuple):
    """`leaf_paths.LeafPaths` as int32 tensors on q's device, and the two lengths that kernels ask for."""

    cu_rows: Tensor
    cu_keys: Tensor
    path_of_row: Tensor
    gather: Tensor
    host_longest: Tensor
    """`[2]` int64, most own rows of a leaf path, and keys of the longest."""

    def keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """`[M, Hkv, D] -> [K, Hkv, D]`: the tensors themselves where nothing is shared."""
        if self.gather.shape[0] == 0:
            return k, v
        gathered_k, gathered_v = gather_rows((k, v), self.gather)
        return gathered_k, gathered_v

    def offsets(self) -> tuple[Tensor, Tensor, int, int]:
        """As `Flash` takes them."""
        own_rows, keys = self.host_longest.tolist()
        return self.cu_rows, self.cu_keys, own_rows, keys


def why_not(kind: CallKind) -> str | None:
    """See `attention_call.Implementation`."""
    return why_not_some_rows_or_spans(kind) or torch_flash.why_not(kind)


def prepare(tree: HostTree) -> Tables:
    """See `attention_call.Implementation`."""
    return tables_from(leaf_paths(tree.end, tree.depth))


def tables_from(paths: LeafPaths) -> Tables:
    """The tables of leaf paths."""
    longest = [int(np.diff(offsets).max(initial=0)) for offsets in (paths.cu_rows, paths.cu_keys)]
    cu_rows, cu_keys, path_of_row, gather = (torch.from_numpy(x) for x in paths)
    return Tables(cu_rows, cu_keys, path_of_row, gather, torch.tensor(longest))


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """`[M, Hq, D]`, `[M, Hkv, D]` twice -> `[M, Hq, D]` and the log-sum-exp `[Hq, M]`."""
    paths = tables_of(call.tree, "varlen", prepare)
    return attend_paths(call.q, call.k, call.v, paths, scale=call.scale, window=call.window, flash=InTreeFlash())


def backward(
    grad_out: Tensor, call: AttentionCall, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k and v."""
    q, k, v, _, tree, scale, window, _ = call
    paths = tables_of(tree, "varlen", prepare)
    grads = attend_paths_backward(
        grad_out, q, k, v, out, lse, paths, tree.end, tree.depth, scale=scale, window=window, flash=InTreeFlash()
    )
    return *grads, None


def attend_paths(
    q: Tensor, k: Tensor, v: Tensor, paths: Tables, *, scale: float, window: int | None, flash: Flash
) -> tuple[Tensor, Tensor]:
    """The output `[M, Hq, D]` and the log-sum-exp `[Hq, M]`, with `flash` for packed sequences."""
    if q.shape[0] == 0:
        return q.new_empty(q.shape), q.new_empty((q.shape[1], 0)).float()
    k, v = paths.keys(k, v)
    out, lse = flash.forward(q, k, v, *paths.offsets(), scale=scale, window=window)
    return out.contiguous(), lse


def attend_paths_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    paths: Tables,
    end: Tensor,
    depth: Tensor,
    *,
    scale: float,
    window: int | None,
    flash: Flash,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous. `end` and `depth` are `[M]` int32."""
    if q.shape[0] == 0:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    gathered_k, gathered_v = paths.keys(k, v)
    grad_q, grad_k, grad_v = flash.backward(
        grad_out, q, gathered_k, gathered_v, out, lse, *paths.offsets(), scale=scale, window=window
    )
    if paths.gather.shape[0]:
        # the last row of a subtree is a leaf, and the paths in between are those of the subtree
        last = paths.path_of_row.index_select(0, end - 1) + 1
        copies = Copies(paths.path_of_row, last, paths.cu_keys, depth)
        grad_k, grad_v = sum_copies((grad_k, grad_v), copies)
    return grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous()
