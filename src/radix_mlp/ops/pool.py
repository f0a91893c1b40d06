"""Pooling: one vector per sequence, straight from compact rows. Nothing of size `N` is made on the device.

A mean over a sequence is a sum over the pieces of its path: the rows of each piece are summed once, then the pieces of
each path. Pieces are the segments of the plan, cut wherever a sequence ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.errors import InvalidDtypeError, InvalidInputError
from radix_mlp.ops.device_plan import DevicePlan, to_device
from radix_mlp.ops.row_copies import copy_rows
from radix_mlp.ops.send import send
from radix_mlp.ops.tensors import check_tensors
from radix_mlp.plan.radix_plan import RadixPlan

__all__ = ["POOLINGS", "PoolingName", "cls", "last_token", "mean", "rows_to_classify", "weighted_mean"]


def last_token(hidden: Tensor, plan: RadixPlan | DevicePlan) -> Tensor:
    """`[M, h] -> [S, h]`: the last token of every sequence. Raises `InvalidInputError` if a sequence is empty.

    Examples:
        >>> from radix_mlp.plan import build_plan
        >>> plan = build_plan([5, 6, 5, 7], [0, 2, 4])
        >>> last_token(torch.tensor([[1.0], [2.0], [4.0]]), plan).flatten()
        tensor([2., 4.])
    """
    plan = _checked(hidden, plan)
    return copy_rows(hidden, plan.last_rows)


def cls(hidden: Tensor, plan: RadixPlan | DevicePlan) -> Tensor:
    """`[M, h] -> [S, h]`: the first token of every sequence. Raises `InvalidInputError` if a sequence is empty.

    Examples:
        >>> from radix_mlp.plan import build_plan
        >>> cls(torch.tensor([[1.0], [2.0], [4.0]]), build_plan([5, 6, 5, 7], [0, 2, 4])).flatten()
        tensor([1., 1.])
    """
    plan = _checked(hidden, plan)
    return copy_rows(hidden, plan.unfold_index.index_select(0, plan.cu_seq_lengths[:-1]))


def rows_to_classify(plan: RadixPlan, pad_token: int) -> NDArray[np.int64]:
    """The rows `[S]` that transformers' classifiers read: of every sequence the last token that is not `pad_token`.

    Where all tokens are padding, it is the first one. No sequence may be empty.

    >>> from radix_mlp.plan import build_plan
    >>> rows_to_classify(build_plan([5, 6, 0, 0, 0], [0, 3, 5]), pad_token=0).tolist()
    [1, 3]
    """
    starts = plan.cu_seq_lengths[:-1]
    places = np.where(plan.compact_ids[plan.unfold_index] == pad_token, -1, np.arange(plan.num_tokens))
    last = np.maximum(np.maximum.reduceat(places, starts), starts)
    return plan.unfold_index[last].astype(np.int64)


def mean(hidden: Tensor, plan: RadixPlan | DevicePlan) -> Tensor:
    """`[M, h] -> [S, h]`: the mean over the tokens of every sequence, summed in float32 (float64 stays).

    Raises `InvalidInputError` if a sequence is empty.

    Examples:
        >>> from radix_mlp.plan import build_plan
        >>> mean(torch.tensor([[1.0], [2.0], [4.0]]), build_plan([5, 6, 5, 7], [0, 2, 4])).flatten()
        tensor([1.5000, 2.5000])
    """
    plan = _checked(hidden, plan)
    lengths = plan.cu_seq_lengths.diff()
    wide = _wide(hidden)
    return (_path_sums(wide, plan.plan) / lengths[:, None].to(wide.dtype)).to(hidden.dtype)


def weighted_mean(hidden: Tensor, plan: RadixPlan | DevicePlan) -> Tensor:
    """`[M, h] -> [S, h]`: the mean with weights 1, 2, ..., L along every sequence of L tokens.

    Raises `InvalidInputError` if a sequence is empty.

    Examples:
        >>> from radix_mlp.plan import build_plan
        >>> weighted_mean(torch.tensor([[1.0], [2.5], [4.0]]), build_plan([5, 6, 5, 7], [0, 2, 4])).flatten()
        tensor([2., 3.])
    """
    plan = _checked(hidden, plan)
    lengths = plan.cu_seq_lengths.diff()
    total = lengths * (lengths + 1) / 2
    wide = _wide(hidden)
    weighted = wide * (plan.depth + 1)[:, None]
    return (_path_sums(weighted, plan.plan) / total[:, None].to(wide.dtype)).to(hidden.dtype)


PoolingName = Literal["last", "mean", "weighted_mean", "cls"]
POOLINGS: dict[str, Callable[[Tensor, RadixPlan | DevicePlan], Tensor]] = {
    "last": last_token,
    "mean": mean,
    "weighted_mean": weighted_mean,
    "cls": cls,
}
"""All poolings by the names that callers give; folders and the server know them by the functions' own names."""


class _Pieces(NamedTuple):
    row_offsets: NDArray[np.int64]
    """`[P + 1]` first row of every piece."""
    path: NDArray[np.int64]
    """Pieces of every sequence, one sequence after another."""
    path_offsets: NDArray[np.int64]
    """`[S + 1]` where a sequence's pieces start in `path`."""


def _path_sums(x: Tensor, plan: RadixPlan) -> Tensor:
    """Sum of the rows of every sequence: `[M, h] -> [S, h]`."""
    if plan.num_sequences == 0:
        return x.new_zeros(0, x.shape[1])
    row_offsets, path, path_offsets = (send(array, x.device) for array in _pieces(plan))
    by_piece = torch.segment_reduce(x, "sum", offsets=row_offsets, axis=0, initial=0)
    return torch.segment_reduce(copy_rows(by_piece, path), "sum", offsets=path_offsets, axis=0, initial=0)


def _pieces(plan: RadixPlan) -> _Pieces:
    """Segments cut wherever a sequence ends, so that every sequence is a list of whole pieces."""
    starts = np.zeros(plan.num_rows, bool)
    starts[plan.segments.start] = True
    after_last = plan.last_rows + 1
    starts[after_last[after_last < plan.num_rows]] = True
    piece_of_row = np.cumsum(starts) - 1
    enters = starts[plan.unfold_index]
    path = piece_of_row[plan.unfold_index[enters]]
    path_offsets = np.concatenate([[0], np.cumsum(enters)])[plan.cu_seq_lengths]
    return _Pieces(np.append(np.flatnonzero(starts), plan.num_rows), path, path_offsets)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _checked(hidden: Tensor, plan: RadixPlan | DevicePlan) -> DevicePlan:
    check_tensors(hidden=hidden)
    if isinstance(plan, RadixPlan):
        plan = to_device(plan, hidden.device)
    elif not isinstance(plan, DevicePlan):
        raise InvalidDtypeError(f"plan is a {type(plan).__name__}: pass a RadixPlan or a DevicePlan")
    if hidden.dim() != 2 or hidden.shape[0] != plan.plan.num_rows:
        raise InvalidInputError(f"hidden is {tuple(hidden.shape)}: pass [M, h] with M = {plan.plan.num_rows} rows")
    if hidden.device != plan.unfold_index.device:
        raise InvalidInputError(f"hidden is on {hidden.device}, the plan on {plan.unfold_index.device}")
    empty = np.flatnonzero(np.diff(plan.plan.cu_seq_lengths) == 0)
    if len(empty):
        raise InvalidInputError(f"sequence {empty[0]} is empty and has no vector: leave it out of the batch")
    return plan
