"""States after the last token of each sequence, read from a scan along the tree by queries that change nothing.

A recurrence along the tree gives outputs, not states. Behind each sequence stand as many more rows as a state has rows;
each of these asks for one of them and adds nothing to the state, so their outputs are the state.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from radix_mlp.ops.send import send
from radix_mlp.plan import RadixPlan, build_plan

__all__ = ["StateReader", "state_reader"]

_KEPT: WeakKeyDictionary[RadixPlan, dict[tuple[int, torch.device], StateReader]] = WeakKeyDictionary()


class StateReader(NamedTuple):
    """A tree with rows behind its sequences that read their states."""

    plan: RadixPlan
    """The tree with these rows, `M'` in all."""
    rows: Tensor
    """`[M]` int64 place of each row of the first tree."""
    readers: Tensor
    """`[S * W]` int64 place of the rows that read, `W` for each sequence."""
    width: int
    """`W`."""

    def widen(self, x: Tensor, asked: Tensor | float = 0.0) -> Tensor:
        """`x [M, ...]` -> `[M', ...]`; the rows that read have the value `asked`, or `asked [W, ...]` in turn."""
        wide = x.new_zeros(self.plan.num_rows, *x.shape[1:])
        wide.index_copy_(0, self.rows, x)
        if isinstance(asked, Tensor):
            each = asked.to(x.dtype).expand(self.width, *x.shape[1:])
            return wide.index_copy_(0, self.readers, each.repeat(len(self.readers) // self.width, *[1] * (x.ndim - 1)))
        return wide if asked == 0 else wide.index_fill_(0, self.readers, asked)

    def split(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """`out [M', H, V]` -> the outputs `[M, H, V]` and what was read, `[S, W, H, V]`."""
        return out.index_select(0, self.rows), out.index_select(0, self.readers).unflatten(0, (-1, self.width))

    def units(self) -> Tensor:
        """`[W, 1, W]`: each row that reads asks for another row of the state."""
        return torch.eye(self.width, device=self.rows.device)[:, None]


def state_reader(plan: RadixPlan, width: int, device: torch.device) -> StateReader:
    """The reader for states of `width` rows, kept with the plan.

    Examples:
        >>> plan = build_plan([5, 6, 7, 5, 6], [0, 3, 5])
        >>> reader = state_reader(plan, 2, torch.device("cpu"))
        >>> reader.plan.num_rows, reader.rows.tolist(), reader.readers.tolist()
        (7, [0, 1, 2], [3, 4, 5, 6])
    """
    kept = _KEPT.setdefault(plan, {})
    if (width, device) not in kept:
        with torch.inference_mode(False):
            kept[width, device] = _make(plan, width, device)
    return kept[width, device]


def _make(plan: RadixPlan, width: int, device: torch.device) -> StateReader:
    cu = plan.cu_seq_lengths.astype(np.int64)
    count = len(cu) - 1
    shift = np.repeat(np.arange(count), np.diff(cu)) * width
    place = np.arange(len(shift)) + shift
    readers = (cu[1:, None] + np.arange(count)[:, None] * width + np.arange(width)).reshape(-1)
    # rows by their numbers make the same tree
    keys = np.empty(len(place) + len(readers), np.int64)
    keys[place] = plan.unfold_index
    keys[readers] = np.tile(plan.num_rows + np.arange(width), count)
    wide = build_plan(keys, cu + np.arange(count + 1) * width)
    unfold = wide.unfold_index.astype(np.int64)
    rows = unfold[place][plan.fold_index]
    return StateReader(wide, send(rows, device), send(unfold[readers], device), width)
