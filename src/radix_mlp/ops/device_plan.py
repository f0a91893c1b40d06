"""`RadixPlan` -> tensors on a device, in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.ops.attention.attention_tree import (
    AttentionTree,
    HostTree,
    Sequences,
    arrays_to_send,
    send_arrays,
    send_tables,
    with_sent,
)
from radix_mlp.ops.attention.registry import prepare
from radix_mlp.ops.scan.scan_tree import ScanTree
from radix_mlp.plan.radix_plan import RadixPlan

__all__ = ["DevicePlan", "to_device"]

Arrays = Sequence[NDArray[Any]]


@dataclass(eq=False)
class _Kept:
    """Tensors of a plan on one device. Holds no reference to the plan, which could then never be freed."""

    base: tuple[Tensor, ...] = ()
    """The tensors of `DevicePlan`, in the order of its fields."""
    query_rows: Tensor | None = None
    span_end: Tensor | None = None
    trees: dict[str, AttentionTree] = field(default_factory=dict)
    """By implementation."""
    backward_trees: dict[str, AttentionTree] = field(default_factory=dict)
    """Likewise, with the tables of the backward pass."""
    scan_tree: ScanTree | None = None


_KEPT: WeakKeyDictionary[RadixPlan, dict[torch.device, _Kept]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class DevicePlan:
    """A `RadixPlan` as tensors on one device. Made by `to_device`."""

    compact_ids: Tensor
    """`[M]` int64 token ids."""
    compact_positions: Tensor
    """`[M]` int64 position ids."""
    fold_index: Tensor
    """`[M]` int64, row -> its first occurrence among the `N` tokens."""
    unfold_index: Tensor
    """`[N]` int64, token -> its row."""
    cu_seq_lengths: Tensor
    """`[S + 1]` int64 token offsets."""
    last_rows: Tensor
    """`[S]` int64 row of every sequence's last token, -1 for an empty sequence."""
    end: Tensor
    """`[M]` int32, one past the last row of the row's subtree."""
    depth: Tensor
    """`[M]` int32, number of ancestors of the row."""
    plan: RadixPlan
    """The plan on the host."""
    kept: _Kept
    """Everything computed from the plan on this device so far."""

    @property
    def tree(self) -> AttentionTree:
        """The tree that attention takes: `tree_for("auto")`."""
        return self.tree_for("auto")

    @property
    def scan_tree(self) -> ScanTree:
        """The tree that convolutions and recurrences take, made on first use and kept with the plan."""
        if self.kept.scan_tree is None:
            self.kept.scan_tree = ScanTree(self.plan.end, self.plan.num_compact, self.end.device)
        return self.kept.scan_tree

    def tree_for(self, impl: str) -> AttentionTree:
        """The tree with the tables of implementation `impl`, made on the first call and kept with the plan.

        Tables that only the backward pass reads are made on the first call with gradients enabled.
        """
        backward = self.end.is_cuda and torch.is_grad_enabled()
        tree = self.kept.backward_trees.get(impl)
        if tree is None and not backward:
            tree = self.kept.trees.get(impl)
        return _make_tree(self.plan, self.end.device, self.kept, impl, backward) if tree is None else tree


def to_device(plan: RadixPlan, device: torch.device | str, *, tree: bool = True) -> DevicePlan:
    """`plan` on `device`: one copy (pinned and asynchronous to CUDA), its tensors kept for the next call.

    With `tree=False`, the tables of attention are made on first use.

    Examples:
        >>> from radix_mlp.plan import build_plan
        >>> to_device(build_plan([5, 6, 5, 7], [0, 2, 4]), "cpu").compact_ids
        tensor([5, 6, 7])
    """
    device = _device(device)
    kept = _KEPT.setdefault(plan, {}).setdefault(device, _Kept())
    if not kept.base and tree:
        _make_tree(plan, device, kept, "auto", device.type == "cuda" and torch.is_grad_enabled())
    elif not kept.base:
        _copy_base(plan, device, kept, [])
    ids, positions, fold, unfold, cu, last, end, depth = kept.base
    found = DevicePlan(ids, positions, fold, unfold, cu, last, end, depth, plan, kept)
    if tree:
        # the plan may be on the device without these tables, or without those for gradients
        found.tree_for("auto")
    return found


RadixPlan.to_device = to_device


def _device(device: torch.device | str) -> torch.device:
    """The device with its index: 'cuda' is the current one."""
    if isinstance(device, torch.device) and device.index is not None:
        return device
    return torch.empty(0, device=device).device


def _copy_base(plan: RadixPlan, device: torch.device, kept: _Kept, more: Arrays) -> Sequence[Tensor]:
    """Send the arrays of a `DevicePlan`, and `more` (int32) in the same copy; returns the tensors of `more`."""
    long = (
        plan.compact_ids,
        plan.compact_positions,
        plan.fold_index,
        plan.unfold_index,
        plan.cu_seq_lengths,
        plan.last_rows,
    )
    some = {"query_rows": plan.query_rows, "span_end": plan.span_end}
    optional = {name: array for name, array in some.items() if array is not None}
    short = [plan.end, plan.depth, *optional.values()]
    wide, moved = send_arrays(long, (*short, *more), device)
    kept.base = (*wide, *moved[:2])
    for name, tensor in zip(optional, moved[2:], strict=False):
        setattr(kept, name, tensor)
    return moved[len(short) :]


def _make_tree(plan: RadixPlan, device: torch.device, kept: _Kept, impl: str, backward: bool) -> AttentionTree:
    """Prepare the tables of `impl` and send them, together with the plan if it is not on the device yet."""
    # kept for later calls, which may train
    with torch.inference_mode(False):
        sequences = _sequences(plan, kept) if kept.base else None
        tables = prepare(impl, HostTree(plan.end, plan.depth, device, backward, sequences))
        if kept.base:
            sent = send_tables(list(tables.values()), device)
        else:
            arrays = arrays_to_send(list(tables.values()), device)
            sent = with_sent(list(tables.values()), arrays, _copy_base(plan, device, kept, list(arrays.values())))
    end, depth = kept.base[-2:]
    tree = AttentionTree(end, depth, dict(zip(tables, sent, strict=True)), kept.query_rows, kept.span_end)
    (kept.backward_trees if backward else kept.trees)[impl] = tree
    return tree


def _sequences(plan: RadixPlan, kept: _Kept) -> Sequences:
    _, _, fold, unfold, cu, *_ = kept.base
    return Sequences(fold, unfold, cu, torch.from_numpy(np.array(plan.cu_seq_lengths)))
