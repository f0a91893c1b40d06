"""What a CUDA graph reads of a batch: one tensor of fixed size, filled in one copy."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from radix_mlp.ops import AttentionTree
from radix_mlp.ops.attention.fa4_blocks import BLOCK, pack_forward_blocks, size_of_forward_blocks
from radix_mlp.ops.attention.impl.triton_tiles import Tiles
from radix_mlp.ops.attention.leaf_runs import TreeStatistics
from radix_mlp.ops.attention.triton_tables import KEY_BLOCK, SEGMENT, fill_ranges
from radix_mlp.plan import RadixPlan
from radix_mlp.plan.compiled import compiled

__all__ = ["GraphAttention", "GraphInputs", "GraphKey", "pack"]


class GraphAttention(NamedTuple):
    """How a graph runs attention: whatever would be decided anew for every batch is decided with the graph."""

    impl: str
    """`triton` or `fa4`."""
    tiles: tuple[Tiles, ...] = ()
    """Of the tree kernel, for every window that a layer has."""
    mean_keys: int = 0
    """Keys that a row sees, for which these tiles are chosen."""


class GraphKey(NamedTuple):
    """What batches of one graph have in common."""

    num_rows: int
    num_needed: int | None
    """Rows that go past the last attention; None: all."""
    attention: tuple[str, tuple[Tiles, ...]]


class GraphInputs:
    """The tensors of one graph, of `num_rows` rows of which `num_needed` are needed (None: all)."""

    def __init__(self, num_rows: int, num_needed: int | None, attention: GraphAttention, device: torch.device) -> None:
        self.uses_fa4 = attention.impl == "fa4"
        segments, key_blocks = -(-num_rows // SEGMENT), -(-num_rows // KEY_BLOCK)
        # ids, positions and needed rows (int64); end, depth; then the tables of the kernels
        tables = (num_rows, 4 * num_rows, segments, 2 * key_blocks)
        blocks = size_of_forward_blocks(num_rows) if self.uses_fa4 else 0
        self.sizes = (2 * num_rows, 2 * num_rows, 2 * (num_needed or 0), num_rows, num_rows, *tables, blocks)
        self.packed = torch.zeros(sum(self.sizes), dtype=torch.int32, device=device)
        parts = self.packed.split(self.sizes)
        self.ids, self.positions, self.rows = (part.view(torch.int64) for part in parts[:3])
        num_blocks = -(-num_rows // BLOCK)
        known = TreeStatistics(num_rows, 0, num_rows, 0, num_rows, attention.mean_keys * num_rows, 0)
        self.tree = AttentionTree.from_end(parts[3], parts[4])._replace(
            tables=self.packed[sum(self.sizes[:5]) :],
            host_table_sizes=torch.tensor([num_rows, 0, 0, 0], dtype=torch.int32),
            host_statistics=torch.tensor(known),
            sparse_blocks=parts[-1],
            host_sparse_sizes=torch.tensor([num_blocks, num_blocks, 1, 0, 0], dtype=torch.int32),
        )

    def fill(self, plan: RadixPlan, needed_rows: NDArray[np.int64] | None) -> None:
        """Copy what the graph reads of a batch, without waiting for the device."""
        host = torch.empty(len(self.packed), dtype=torch.int32, pin_memory=self.packed.is_cuda)
        pack(host.numpy(), plan, needed_rows, self.sizes)
        self.packed.copy_(host, non_blocking=True)


def pack(
    packed: NDArray[np.int32], plan: RadixPlan, needed_rows: NDArray[np.int64] | None, sizes: tuple[int, ...]
) -> None:
    """Write what a graph reads of a batch to `packed`, in parts of `sizes`."""
    starts = [0, *itertools.accumulate(sizes)]
    ids, positions, rows, end, depth, range_of_row, ranges, order, _, blocks = (
        packed[start:stop] for start, stop in itertools.pairwise(starts)
    )
    wide = ids.view(np.int64), positions.view(np.int64), rows.view(np.int64)
    needed = np.zeros(0, np.int64) if needed_rows is None else needed_rows
    given = plan.compact_ids, plan.compact_positions, needed, plan.end, plan.depth
    compiled(_pad)(*given, *wide, end, depth, order)
    # ranges past the last are never read
    fill_ranges(end, ranges.reshape(-1, 4), range_of_row)
    if len(blocks):
        assert pack_forward_blocks(end, blocks), len(end)


def _pad(
    given_ids: NDArray[np.int64],
    given_positions: NDArray[np.int64],
    given_rows: NDArray[np.int64],
    given_end: NDArray[np.int32],
    given_depth: NDArray[np.int32],
    ids: NDArray[np.int64],
    positions: NDArray[np.int64],
    rows: NDArray[np.int64],
    end: NDArray[np.int32],
    depth: NDArray[np.int32],
    order: NDArray[np.int32],
) -> None:
    """Copy the given rows, make the rest sequences of one token, and order segments by their depth, deepest first."""
    count = len(given_end)
    ids[:count], positions[:count], end[:count], depth[:count] = given_ids, given_positions, given_end, given_depth
    ids[count:], positions[count:], depth[count:] = 0, 0, 0
    for row in range(count, len(end)):
        end[row] = row + 1
    rows[: len(given_rows)] = given_rows
    rows[len(given_rows) :] = 0
    shallow = np.empty(len(order), np.int32)
    for segment in range(len(order)):
        shallow[segment] = -depth[min(segment * SEGMENT + SEGMENT // 2, len(depth) - 1)]
    order[:] = np.argsort(shallow, kind="mergesort")
