"""`RadixPlan` -> tensors on a device, in one copy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.plan.blocks import pack_tiles
from radix_mlp.plan.gpu_blocks import pack_tables
from radix_mlp.plan.runs import pack_runs
from radix_mlp.plan.sparse_blocks import pack_sparse_blocks

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
    """int32, query tiles and their key ranges as `radix_mlp.plan.blocks` packs them."""
    tables: Tensor
    """int32, what the GPU kernels walk, as `radix_mlp.plan.gpu_blocks` packs it."""
    host_table_sizes: Tensor
    """`[4]` int32 on the CPU, lines of the tables."""
    runs: Tensor
    """int32, root paths and where their copies are, as `radix_mlp.plan.runs` packs them."""
    host_statistics: Tensor
    """`[7]` int64 on the CPU, `radix_mlp.plan.runs.TreeStatistics`: what the choice of an implementation reads."""
    sparse_blocks: Tensor
    """int32, blocks of the mask as `radix_mlp.plan.sparse_blocks` packs them; made where FlashAttention-4 is there."""
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
    tree: AttentionTree
    """What attention takes."""
    plan: RadixPlan
    """The plan on the host."""


def to_device(plan: RadixPlan, device: torch.device | str) -> DevicePlan:
    """`plan` on `device`: one copy (pinned and asynchronous to CUDA), the tensors kept on `plan` for the next call."""
    # an empty tensor knows which device 'cuda' stands for
    device = torch.empty(0, device=device).device
    # the tensors are kept, not the DevicePlan: that one points back here, and a cycle would hold device memory
    cache: dict[torch.device, tuple[tuple[Tensor, ...], AttentionTree]] = plan.__dict__.setdefault("_tensors", {})
    if device not in cache:
        # kept for later calls, which may train
        with torch.inference_mode(False):
            cache[device] = _copy(plan, device)
    (ids, positions, fold, unfold, cu, last), tree = cache[device]
    return DevicePlan(ids, positions, fold, unfold, cu, last, tree, plan)


def _copy(plan: RadixPlan, device: torch.device) -> tuple[tuple[Tensor, ...], AttentionTree]:
    long: list[NDArray[Any]] = [
        plan.compact_ids,
        plan.compact_positions,
        plan.fold_index,
        plan.unfold_index,
        plan.cu_seq_lengths,
        plan.last_rows,
    ]
    on_cuda = device.type == "cuda"
    # each device gets what its implementations read: tables the GPU kernels, tiles plain-torch attention
    tables, table_sizes = (
        pack_tables(plan.end, plan.depth) if on_cuda else (np.zeros(0, np.int32), np.zeros(4, np.int32))
    )
    tiles = np.zeros(0, np.int32) if on_cuda else pack_tiles(plan.end, plan.depth)
    runs, statistics = pack_runs(plan.end, plan.depth) if on_cuda else (np.zeros(0, np.int32), np.zeros(0, np.int64))
    sparse, sparse_sizes = (
        pack_sparse_blocks(plan.end)
        if on_cuda and _has_flash_attention_4() and torch.cuda.get_device_capability(device) >= (9, 0)
        else (np.zeros(0, np.int32), np.zeros(5, np.int32))
    )
    short: list[NDArray[Any]] = [plan.end, plan.depth, tables, runs, sparse]
    sizes = [8 * len(array) for array in long] + [4 * len(array) for array in short]
    packed = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu", pin_memory=on_cuda)
    dtypes = [torch.int64] * len(long) + [torch.int32] * len(short)
    for array, part in zip(long + short, _parts(packed, sizes, dtypes), strict=True):
        np.copyto(part.numpy(), array)
    parts = _parts(packed.to(device, non_blocking=True), sizes, dtypes)
    ids, positions, fold, unfold, cu, last, end, depth, device_tables, device_runs, device_sparse = parts
    host_cu = torch.tensor(plan.cu_seq_lengths, device="cpu")
    host = torch.from_numpy(tiles), device_tables, torch.from_numpy(table_sizes)
    tree = AttentionTree(
        end, depth, fold, unfold, cu, host_cu, *host, device_runs, torch.from_numpy(statistics),
        device_sparse, torch.from_numpy(sparse_sizes),
    )  # fmt: skip
    return (ids, positions, fold, unfold, cu, last), tree


@cache
def _has_flash_attention_4() -> bool:
    try:
        version("flash-attn-4")
    except PackageNotFoundError:
        return False
    return True


def _parts(packed: Tensor, sizes: list[int], dtypes: list[torch.dtype]) -> list[Tensor]:
    return [part.view(dtype) for part, dtype in zip(packed.split(sizes), dtypes, strict=True)]
