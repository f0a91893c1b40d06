"""The paper's RadixMLP: unfold q, k and v to every token, attend sequence by sequence, fold the result.

The baseline: attention shares nothing.  On CUDA, in half precision and without a soft cap or sinks, rows are
copied by one fused kernel for q, k and v, and torch's FlashAttention runs over all `N` tokens as packed sequences;
elsewhere every sequence goes through torch's scaled dot-product attention by itself.  It runs outside the custom op and
does not compile into one graph.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.errors import UnsupportedCallError
from radix_mlp.ops.attention.attention_call import AttentionCall, CallKind, kind_of, why_not_some_rows_or_spans
from radix_mlp.ops.attention.attention_tree import HostTree, Sequences, tables_of
from radix_mlp.ops.attention.impl import torch_flash
from radix_mlp.ops.attention.impl.copies import Copies
from radix_mlp.ops.attention.impl.gathered_rows import gather_rows, sum_copies
from radix_mlp.ops.attention.impl.padded_attention import attend, pack_heads, unpack_heads
from radix_mlp.ops.attention.impl.torch_flash import Flash, InTreeFlash
from radix_mlp.ops.row_copies import copy_rows, first_rows

__all__ = ["attend_packed", "attention", "prepare", "why_not"]


def why_not(kind: CallKind) -> str | None:
    """See `attention_call.Composite`."""
    return why_not_some_rows_or_spans(kind)


def prepare(tree: HostTree) -> Sequences:
    """The batch's own sequences; the root paths of the leaves for a tree that came without its batch."""
    if tree.sequences is not None:
        return tree.sequences
    paths, cu = _leaf_paths(tree.end)
    fold_index = np.unique(paths, return_index=True)[1]
    fold, unfold, offsets = (torch.from_numpy(x).to(tree.device) for x in (fold_index, paths, cu))
    return Sequences(fold, unfold, offsets, torch.from_numpy(cu))


def attention(call: AttentionCall) -> Tensor:
    """`[M, Hq, D]`, `[M, Hkv, D]`, `[M, Hkv, Dv]` -> `[M, Hq, Dv]`. Rows that pad the plan repeat token 0."""
    q, k, v, sinks, tree, scale, window, softcap = call
    if q.shape[0] == 0:
        return _attend(q, k, v, sinks, scale=scale, window=window, softcap=softcap)
    batch = tables_of(tree, "expand", prepare)
    if torch_flash.why_not(kind_of(call)) is None:
        return attend_packed(q, k, v, tree.end, tree.depth, batch, scale=scale, window=window, flash=InTreeFlash())
    lengths = batch.host_cu_seq_lengths.diff().tolist()
    sequences = zip(*(copy_rows(x, batch.unfold_index).split(lengths) for x in (q, k, v)), strict=True)
    parts = [
        _attend(one_q, one_k, one_v, sinks, scale=scale, window=window, softcap=softcap)
        for one_q, one_k, one_v in sequences
        if len(one_q)
    ]
    out = first_rows(torch.cat(parts), batch.fold_index, batch.unfold_index)
    if out.requires_grad:
        out.register_hook(_refuse_second_derivative)
    return out


def _refuse_second_derivative(grad_out: Tensor) -> None:
    """torch's fused attention has no second derivative on most devices, and its error names no remedy."""
    if torch.is_grad_enabled():
        raise UnsupportedCallError(
            "impl='expand' has no second derivative: call backward without create_graph, or use impl='reference' "
            "(quadratic memory)"
        )


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    end: Tensor,
    depth: Tensor,
    batch: Sequences,
    *,
    scale: float,
    window: int | None,
    flash: Flash,
) -> Tensor:
    """All sequences in one call of `flash`: `[M, Hq, D]`, `[M, Hkv, D]` twice -> `[M, Hq, D]`, differentiable once."""
    out = _Packed.apply(
        q, k, v, batch.fold_index, batch.unfold_index, batch.cu_seq_lengths, end, depth,
        int(batch.host_cu_seq_lengths.diff().max()), {"scale": scale, "window": window}, flash,
    )  # fmt: skip
    return cast(Tensor, out)


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        fold_index: Tensor,
        unfold_index: Tensor,
        cu_seq_lengths: Tensor,
        end: Tensor,
        depth: Tensor,
        longest: int,
        options: dict[str, Any],
        flash: Flash,
    ) -> Tensor:
        unfolded = gather_rows((q, k, v), unfold_index)
        cu = cu_seq_lengths.to(torch.int32)
        out, lse = flash.forward(*_three(unfolded), cu, cu, longest, longest, **options)
        ctx.save_for_backward(*unfolded, out, lse, cu, fold_index, unfold_index, end, depth)
        ctx.rest = longest, options, flash
        return gather_rows((out,), fold_index)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, cu, fold_index, unfold_index, end, depth = ctx.saved_tensors
        longest, options, flash = ctx.rest
        # a row's gradient goes to its first occurrence, and zeros to the other tokens
        token = torch.arange(unfold_index.shape[0], device=unfold_index.device)
        first = torch.where(fold_index.index_select(0, unfold_index) == token, unfold_index, -1)
        (spread,) = gather_rows((grad_out,), first)
        grads = flash.backward(spread, q, k, v, out, lse, cu, cu, longest, longest, **options)
        return *sum_copies(grads, _copies(unfold_index, cu, end, depth)), *[None] * 8


def _copies(unfold_index: Tensor, cu_seq_lengths: Tensor, end: Tensor, depth: Tensor) -> Copies:
    """Copies of every row: the sequences through row `j` are those whose last row is in `[j, end[j])`."""
    starts, stops = cu_seq_lengths[:-1], cu_seq_lengths[1:]
    last = torch.where(stops > starts, unfold_index.index_select(0, (stops - 1).clamp(min=0)), -1)
    last, order = last.sort(stable=True)
    row = torch.arange(end.shape[0], device=end.device)
    first, past = (torch.searchsorted(last, edge, out_int32=True) for edge in (row, end.long()))
    return Copies(first, past, starts.index_select(0, order), depth)


def _three(tensors: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = tensors
    return q, k, v


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """One sequence, by itself."""
    if softcap is None and sinks is None and (window is None or window >= len(q)):
        by_head = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            is_causal=True,
            scale=scale,
            enable_gqa=True,
        )
        return by_head[0].transpose(0, 1)
    heads, kv_heads = q.shape[1], k.shape[1]
    distance = torch.arange(len(q), device=q.device)[:, None] - torch.arange(len(q), device=q.device)
    hidden = (distance < 0) | (distance >= (len(q) if window is None else window))
    mask = torch.zeros(hidden.shape, device=q.device).masked_fill_(hidden, -torch.inf)
    packed = attend(
        pack_heads(q, kv_heads),
        k.transpose(0, 1),
        v.transpose(0, 1),
        mask.repeat_interleave(heads // kv_heads, dim=0),
        None if sinks is None else sinks.view(kv_heads, -1),
        scale=scale,
        softcap=softcap,
    )
    return unpack_heads(packed, heads)


def _leaf_paths(end: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    paths: list[int] = []
    cu: list[int] = [0]
    path: list[tuple[int, int]] = []
    for row, stop in enumerate(end.tolist()):
        while path and path[-1][1] <= row:
            path.pop()
        path.append((row, stop))
        if stop == row + 1:
            paths.extend(ancestor for ancestor, _ in path)
            cu.append(len(paths))
    return np.asarray(paths, np.int64), np.asarray(cu, np.int64)
