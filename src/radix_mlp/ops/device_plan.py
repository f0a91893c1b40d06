"""`RadixPlan` -> tensors on a device, in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.ops.attention.dense_tiles import pack_tiles
from radix_mlp.ops.attention.fa4_blocks import pack_sparse_blocks
from radix_mlp.ops.attention.leaf_runs import pack_runs
from radix_mlp.ops.attention.triton_tables import pack_tables

if TYPE_CHECKING:
    from radix_mlp.plan.radix_plan import RadixPlan

__all__ = ["AttentionTree", "DevicePlan", "to_device"]


class AttentionTree(NamedTuple):
    """What attention has to know of a plan: tensors and nothing else, so that compiled models take it as it is.

    Query row `i` sees key row `j` iff `j <= i < end[j]`, and under a window `depth[i] - depth[j] < window`.
    `host_*` fields lie on the CPU.  An empty `host_tiles`, `unfold_index` or the like means "not prepared": the
    implementation that needs it makes it from `end`.
    """

    end: Tensor
    """`[M]` int32, one past the last row of the row's subtree."""
    depth: Tensor
    """`[M]` int32, number of ancestors of the row."""
    fold_index: Tensor
    """`[M]` int64, row -> its first occurrence among the `N` tokens."""
    unfold_index: Tensor
    """`[N]` int64, token -> its row."""
    cu_seq_lengths: Tensor
    """`[S + 1]` int64, token offsets of the sequences."""
    host_cu_seq_lengths: Tensor
    """`[S + 1]` int64, the same on the CPU."""
    host_tiles: Tensor
    """int32, query tiles and their key ranges as `radix_mlp.ops.attention.dense_tiles` packs them."""
    tables: Tensor
    """int32, what the GPU kernels walk, as `radix_mlp.ops.attention.triton_tables` packs it."""
    host_table_sizes: Tensor
    """`[4]` int32 on the CPU, lines of the tables."""
    runs: Tensor
    """int32, root paths and where their copies are, as `radix_mlp.ops.attention.leaf_runs` packs them."""
    host_statistics: Tensor
    """`[7]` int64 on the CPU, `leaf_runs.TreeStatistics`: what the choice of an implementation reads."""
    sparse_blocks: Tensor
    """int32, blocks of the mask as `fa4_blocks` packs them; made where FlashAttention-4 is there."""
    host_sparse_sizes: Tensor
    """`[5]` int32 on the CPU, widths of those lists and pairs of blocks in them."""

    @classmethod
    def from_end(cls, end: Tensor, depth: Tensor) -> AttentionTree:
        """A tree from `end` and `depth` alone (`[M]` int32 each); implementations make the rest when they need it.

        >>> AttentionTree.from_end(torch.tensor([3, 2, 3]), torch.tensor([0, 1, 1])).end
        tensor([3, 2, 3], dtype=torch.int32)
        """
        index = end.new_empty(0, dtype=torch.int64)
        host = torch.empty(0, dtype=torch.int64, device="cpu")
        tiles = torch.empty(0, dtype=torch.int32, device="cpu")
        tables = end.new_empty(0, dtype=torch.int32)
        sizes, sparse_sizes = torch.zeros(4, dtype=torch.int32), torch.zeros(5, dtype=torch.int32)
        short = end.to(torch.int32), depth.to(torch.int32)
        return cls(*short, index, index, index, host, tiles, tables, sizes, tables, host, tables, sparse_sizes)


@dataclass(frozen=True, eq=False)
class DevicePlan:
    """A `RadixPlan` as tensors on one device. Made by `RadixPlan.to`."""

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

    @property
    def tree(self) -> AttentionTree:
        """What attention takes: `tree_for("auto")`."""
        return self.tree_for("auto")

    def tree_for(self, impl: str) -> AttentionTree:
        """The tree with what the implementation `impl` reads, made at the first call and kept on the plan.

        What only the backward pass reads is made where gradients are enabled, and later where they are enabled then.
        """
        return _tree_of(self.plan, self.end.device, impl)


def to_device(plan: RadixPlan, device: torch.device | str, *, tree: bool = True) -> DevicePlan:
    """`plan` on `device`: one copy (pinned and asynchronous to CUDA), the tensors kept on `plan` for the next call.

    Without `tree`, what attention reads besides is made when somebody asks for it.
    """
    if tree:
        _tree_of(plan, _device(device), "auto")
    ids, positions, fold, unfold, cu, last, end, depth = _kept(plan, _device(device)).base
    return DevicePlan(ids, positions, fold, unfold, cu, last, end, depth, plan)


class _Kept:
    """Tensors of a plan on one device. Not the `DevicePlan`: that one points back, and a cycle holds device memory."""

    def __init__(self) -> None:
        self.base: tuple[Tensor, ...] = ()
        self.tree: AttentionTree | None = None
        self.parts: frozenset[str] = frozenset()
        """What of the tree is there: "backward", "runs"."""


def _device(device: torch.device | str) -> torch.device:
    """With its index: 'cuda' stands for the current one."""
    if isinstance(device, torch.device) and device.index is not None:
        return device
    return torch.empty(0, device=device).device


def _kept(plan: RadixPlan, device: torch.device, base: bool = True) -> _Kept:
    cache: dict[torch.device, _Kept] = plan.__dict__.setdefault("_tensors", {})
    kept = cache.setdefault(device, _Kept())
    if base and not kept.base:
        _copy_base(plan, device, kept, [])
    return kept


def _copy_base(plan: RadixPlan, device: torch.device, kept: _Kept, more: Sequence[NDArray[np.int32]]) -> list[Tensor]:
    """Send what a `DevicePlan` holds, and `more` with it, which is returned."""
    long = (
        plan.compact_ids,
        plan.compact_positions,
        plan.fold_index,
        plan.unfold_index,
        plan.cu_seq_lengths,
        plan.last_rows,
    )
    wide, (end, depth, *others) = _send(long, (plan.end, plan.depth, *more), device)
    kept.base = (*wide, end, depth)
    return others


def _tree_of(plan: RadixPlan, device: torch.device, impl: str) -> AttentionTree:
    kept = _kept(plan, device, base=False)
    parts = set(kept.parts)
    if device.type == "cuda":
        # lists of runs are as long as all root paths: for those who ask, and where they cost nothing
        parts |= {"backward"} if torch.is_grad_enabled() else set()
        parts |= {"runs"} if impl == "varlen" else set()
    if kept.tree is None or parts != kept.parts:
        kept.tree, kept.parts = _make_tree(plan, device, kept, parts), frozenset(parts)
    return kept.tree


def _make_tree(plan: RadixPlan, device: torch.device, kept: _Kept, parts: set[str]) -> AttentionTree:
    nothing = np.zeros(0, np.int32)
    tiles, tables, runs, sparse = nothing, nothing, nothing, nothing
    table_sizes, statistics, sparse_sizes = np.zeros(4, np.int32), np.zeros(0, np.int64), np.zeros(5, np.int32)
    # each device gets what its implementations read: tables the GPU kernels, tiles plain-torch attention
    if device.type == "cuda":
        tables, table_sizes = pack_tables(plan.end, plan.depth, backward="backward" in parts)
        runs, statistics = pack_runs(plan.end, plan.depth, always="runs" in parts)
        if _has_flash_attention_4() and torch.cuda.get_device_capability(device) >= (9, 0):
            sparse, sparse_sizes = pack_sparse_blocks(plan.end)
    else:
        tiles = pack_tiles(plan.end, plan.depth)
    if kept.base:
        _, (tables_, runs_, sparse_) = _send((), (tables, runs, sparse), device)
    else:
        tables_, runs_, sparse_ = _copy_base(plan, device, kept, (tables, runs, sparse))
    _, _, fold, unfold, cu, _, end, depth = kept.base
    # kept for later calls, which may train
    with torch.inference_mode(False):
        host_cu, host_tiles, host_sizes, host_statistics, host_sparse = (
            torch.from_numpy(array)
            for array in (plan.cu_seq_lengths.copy(), tiles, table_sizes, statistics, sparse_sizes)
        )
    return AttentionTree(
        end, depth, fold, unfold, cu, host_cu, host_tiles, tables_, host_sizes, runs_, host_statistics, sparse_,
        host_sparse,
    )  # fmt: skip


def _send(
    long: Sequence[NDArray[Any]], short: Sequence[NDArray[np.int32]], device: torch.device
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Arrays as int64 and int32 tensors on `device`, in one copy."""
    lengths, short_lengths = [len(array) for array in long], [len(array) for array in short]
    middle = 2 * sum(lengths)
    # kept for later calls, which may train
    with torch.inference_mode(False):
        packed = torch.empty(
            middle + sum(short_lengths), dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda"
        )
        host = packed.numpy()
        if long:
            np.concatenate(long, out=host[:middle].view(np.int64))
        np.concatenate(short, out=host[middle:])
        moved = packed.to(device, non_blocking=True)
        return moved[:middle].view(torch.int64).split(lengths), moved[middle:].split(short_lengths)


@cache
def _has_flash_attention_4() -> bool:
    try:
        version("flash-attn-4")
    except PackageNotFoundError:
        return False
    return True
