"""Tree attention through FlashAttention for packed sequences: q as it lies, k and v gathered along root paths.

A run (`leaf_runs`) is a stretch of rows that see the root path of the last of them, causal from the bottom
right.  So its rows are one packed sequence of queries, and the keys of its path, gathered, are those of that sequence.
Depths grow by one a key along a path, so a window is the ordinary sliding window.  Every pair of the tree is computed
once.  In the backward pass q's gradient comes out row by row; those of k and v are sums over the gathered copies, in a
fixed order.  Where nothing is shared nothing is gathered: this is then plain packed attention.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from radix_mlp.errors import UnsupportedImplError
from radix_mlp.ops.attention.impl.gathered_rows import Copies, gather_rows, sum_copies
from radix_mlp.ops.attention.impl.torch_flash import Flash, InTreeFlash, why_not
from radix_mlp.ops.attention.leaf_runs import TreeStatistics, pack_runs
from radix_mlp.ops.attention.registry import AttentionCall
from radix_mlp.ops.device_plan import AttentionTree

__all__ = ["RunTensors", "attend_runs", "attend_runs_backward", "backward", "forward", "run_tensors"]


class RunTensors(NamedTuple):
    """`leaf_runs.Runs` as int32 tensors on q's device, and the two lengths that kernels ask for."""

    cu_rows: Tensor
    cu_keys: Tensor
    run_of_row: Tensor
    gather: Tensor
    longest_run: int
    longest_path: int

    def keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """`[M, Hkv, D] -> [K, Hkv, D]`: the tensors themselves where nothing is shared."""
        if self.gather.shape[0] == 0:
            return k, v
        gathered_k, gathered_v = gather_rows((k, v), self.gather)
        return gathered_k, gathered_v


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """`[M, Hq, D]`, `[M, Hkv, D]` twice -> `[M, Hq, D]` and the log-sum-exp `[Hq, M]`."""
    q, k, v, sinks, tree, scale, window, softcap = call
    _check(q, v, sinks, softcap, scale)
    return attend_runs(q, k, v, run_tensors(tree), scale=scale, window=window, flash=InTreeFlash())


def backward(
    grad_out: Tensor, call: AttentionCall, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k and v."""
    q, k, v, sinks, tree, scale, window, softcap = call
    _check(q, v, sinks, softcap, scale)
    runs = run_tensors(tree)
    grads = attend_runs_backward(
        grad_out, q, k, v, out, lse, runs, tree.end, tree.depth, scale=scale, window=window, flash=InTreeFlash()
    )
    return *grads, None


def attend_runs(
    q: Tensor, k: Tensor, v: Tensor, runs: RunTensors, *, scale: float, window: int | None, flash: Flash
) -> tuple[Tensor, Tensor]:
    """The output `[M, Hq, D]` and the log-sum-exp `[Hq, M]`, with `flash` for packed sequences."""
    if q.shape[0] == 0:
        return q.new_empty(q.shape), q.new_empty((q.shape[1], 0)).float()
    k, v = runs.keys(k, v)
    cu = runs.cu_rows, runs.cu_keys, runs.longest_run, runs.longest_path
    out, lse = flash.forward(q, k, v, *cu, scale=scale, window=window)
    return out.contiguous(), lse


def attend_runs_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    runs: RunTensors,
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
    gathered_k, gathered_v = runs.keys(k, v)
    cu = runs.cu_rows, runs.cu_keys, runs.longest_run, runs.longest_path
    grad_q, grad_k, grad_v = flash.backward(
        grad_out, q, gathered_k, gathered_v, out, lse, *cu, scale=scale, window=window
    )
    if runs.gather.shape[0]:
        # the last row of a subtree is a leaf, and the runs in between are those of the subtree
        last = runs.run_of_row.index_select(0, end - 1) + 1
        copies = Copies(runs.run_of_row, last, runs.cu_keys, depth)
        grad_k, grad_v = sum_copies((grad_k, grad_v), copies)
    return grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous()


def run_tensors(tree: AttentionTree) -> RunTensors:
    """The runs that came with the tree; made here, with a copy to the host, if it came without."""
    num_rows = tree.end.shape[0]
    packed, statistics = tree.runs, tree.host_statistics
    if packed.shape[0] == 0 and num_rows:
        packed, statistics = _make(tree)
    if num_rows == 0:
        return RunTensors(packed, packed, packed, packed, 0, 0)
    known = TreeStatistics(*statistics.tolist())
    num_keys = 0 if known.num_gathered == num_rows else known.num_gathered
    cu_rows, cu_keys, run_of_row, gather = packed.split([known.num_runs + 1, known.num_runs + 1, num_rows, num_keys])
    return RunTensors(cu_rows, cu_keys, run_of_row, gather, known.longest_run, known.longest_path)


def _make(tree: AttentionTree) -> tuple[Tensor, Tensor]:
    packed, statistics = pack_runs(tree.end.cpu().numpy(), tree.depth.cpu().numpy())
    return torch.from_numpy(packed).to(tree.end.device), torch.from_numpy(statistics)


def _check(q: Tensor, v: Tensor, sinks: Tensor | None, softcap: float | None, scale: float) -> None:
    reason = why_not(q, v, sinks, softcap, scale)
    if reason is not None:
        raise UnsupportedImplError(f"impl='varlen' {reason}: use impl='triton' or 'dense'")
