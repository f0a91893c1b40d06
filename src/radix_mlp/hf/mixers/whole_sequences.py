"""Compact rows spread over whole sequences and back: for what knows sequences only."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from radix_mlp.ops.row_copies import copy_rows
from radix_mlp.ops.send import send
from radix_mlp.plan import RadixPlan

__all__ = ["WholeSequences", "whole_sequences"]

_KEPT: WeakKeyDictionary[RadixPlan, dict[torch.device, WholeSequences]] = WeakKeyDictionary()


class WholeSequences(NamedTuple):
    """The sequences that hold every row of a plan at least once, padded at the right to the longest."""

    rows: Tensor
    """`[S, T]` int64 row of every token, 0 for padding."""
    is_padding: Tensor | None
    """`[S, T]`, None if no place is padding."""
    places: Tensor
    """`[M]` int64 one place of each row in the flattened `[S * T]`."""

    def spread(self, x: Tensor) -> Tensor:
        """`[1, M, ...]` -> `[S, T, ...]`, zero at padding. The gradient sums copies in a fixed order."""
        out = copy_rows(x[0], self.rows.flatten()).view(*self.rows.shape, *x.shape[2:])
        if self.is_padding is None:
            return out
        return out.masked_fill(self.is_padding.view(*self.rows.shape, *[1] * (x.ndim - 2)), 0)

    def collect(self, x: Tensor) -> Tensor:
        """`[S, T, ...]` -> `[1, M, ...]`."""
        return copy_rows(x.flatten(0, 1), self.places)[None]


def whole_sequences(plan: RadixPlan, device: torch.device) -> WholeSequences:
    """The sequences of a plan without duplicates and prefixes of others, kept with the plan.

    Examples:
        >>> from radix_mlp import build_plan
        >>> plan = build_plan([5, 6, 7, 5, 6, 5, 8], [0, 3, 5, 7])
        >>> whole_sequences(plan, torch.device("cpu")).rows.tolist()
        [[0, 1, 2], [0, 3, 0]]
    """
    kept = _KEPT.setdefault(plan, {})
    if device not in kept:
        with torch.inference_mode(False):
            kept[device] = _make(plan, device)
    return kept[device]


def _make(plan: RadixPlan, device: torch.device) -> WholeSequences:
    cu = plan.cu_seq_lengths.astype(np.int64)
    first = plan.fold_index.astype(np.int64)
    # the sequence in which each row occurs first
    owner = np.searchsorted(cu, first, side="right") - 1
    needed, sequence = np.unique(owner, return_inverse=True)
    starts, lengths = cu[needed], (cu[1:] - cu[:-1])[needed]
    # leaves are enough: a row that is first seen in a sequence is on the way to one that is
    column = np.arange(lengths.max(initial=1))
    is_padding = column >= lengths[:, None]
    tokens = np.where(is_padding, 0, starts[:, None] + column)
    rows = np.where(is_padding, 0, plan.unfold_index[tokens]).astype(np.int64)
    places = sequence * len(column) + first - cu[owner]
    padding: Any = send(is_padding, device) if is_padding.any() else None
    return WholeSequences(send(rows, device), padding, send(places, device))
