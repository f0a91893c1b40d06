"""CUDA graphs of a fused decoder for small batches, where launching kernels takes longer than running them.

A graph has fixed addresses and sizes, so a batch is padded to the next multiple of `STEP` rows: padding rows are
sequences of one token, and everything that depends on the batch is copied into the graph's own tensors in one go.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.hf.fused.decoder import FusedDecoder, spread
from radix_mlp.ops import AttentionTree
from radix_mlp.plan import RadixPlan
from radix_mlp.plan.gpu_blocks import KEY_BLOCK, SEGMENT, range_tree

__all__ = ["MAX_ROWS", "GraphedDecoder"]

STEP = 64
"""Rows that graphs are apart."""
MAX_ROWS = 2048
"""Largest batch that runs as a graph; above, kernels take longer than their launches."""
_ROW_CLASSES = (8, 32, 128, 512, MAX_ROWS)
_GRAPH_IMPLS = ("auto", "triton")


class GraphedDecoder:
    """A `FusedDecoder` that replays a CUDA graph for batches of up to `max_rows` compact rows.

    A graph is captured when a size comes for the second time, and they share one pool of memory.
    """

    def __init__(self, decoder: FusedDecoder, max_rows: int = MAX_ROWS) -> None:
        self.decoder = decoder
        self.max_rows = max_rows if decoder.impl in _GRAPH_IMPLS else 0
        self._graphs: dict[tuple[int, int | None], _Graph] = {}
        self._seen: set[tuple[int, int | None]] = set()
        self._pool: Any = None

    def is_current(self) -> bool:
        """Whether the model still has the parameters that this was made from."""
        return self.decoder.is_current()

    @torch.inference_mode()
    def __call__(self, plan: RadixPlan, needed_rows: NDArray[np.int64] | None = None) -> Tensor:
        """As `FusedDecoder`, whatever the size of the batch."""
        num_rows = plan.num_rows
        padded = -(-num_rows // STEP) * STEP
        if not 0 < padded <= self.max_rows:
            return self.decoder(plan, needed_rows)
        key = padded, None if needed_rows is None else next(n for n in _ROW_CLASSES if n >= len(needed_rows))
        if key not in self._graphs:
            if key not in self._seen:
                self._seen.add(key)
                return self.decoder(plan, needed_rows)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._graphs[key] = _Graph(self.decoder, *key, self._pool)
        graph = self._graphs[key]
        graph.replay(plan, needed_rows)
        if needed_rows is None:
            return graph.hidden[:num_rows].clone()
        return spread(graph.hidden, graph.rows[: len(needed_rows)], num_rows)


class _Graph:
    """One captured size: `num_rows` rows, of which `num_needed` go past the last attention (None: all)."""

    def __init__(self, decoder: FusedDecoder, num_rows: int, num_needed: int | None, pool: Any) -> None:
        device = decoder.trunk.device
        segments, key_blocks = -(-num_rows // SEGMENT), -(-num_rows // KEY_BLOCK)
        # ids, positions and needed rows (int64); end, depth; then the tables of the kernels
        tables = (num_rows, 4 * num_rows, segments, 2 * key_blocks)
        self.sizes = (2 * num_rows, 2 * num_rows, 2 * (num_needed or 0), num_rows, num_rows, *tables)
        self.packed = torch.zeros(sum(self.sizes), dtype=torch.int32, device=device)
        parts = self.packed.split(self.sizes)
        ids, positions, self.rows = (part.view(torch.int64) for part in parts[:3])
        tree = AttentionTree.from_end(parts[3], parts[4])._replace(
            tables=self.packed[sum(self.sizes[:5]) :],
            host_table_sizes=torch.tensor([num_rows, 0, 0, 0], dtype=torch.int32),
        )
        arguments = ids, positions, tree, None if num_needed is None else self.rows, "triton"
        self._fill(_one_token_sequences(num_rows), None)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            # kernels compile and libraries allocate outside of the capture
            decoder.run(*arguments)
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.hidden = decoder.run(*arguments)

    def replay(self, plan: RadixPlan, needed_rows: NDArray[np.int64] | None) -> None:
        """Compute `hidden` of this batch; the next replay overwrites it."""
        self._fill(plan, needed_rows)
        self.graph.replay()

    def _fill(self, plan: RadixPlan, needed_rows: NDArray[np.int64] | None) -> None:
        host = torch.zeros(len(self.packed), dtype=torch.int32, pin_memory=True)
        pack(host.numpy(), plan, needed_rows, self.sizes)
        self.packed.copy_(host, non_blocking=True)


def pack(
    packed: NDArray[np.int32], plan: RadixPlan, needed_rows: NDArray[np.int64] | None, sizes: tuple[int, ...]
) -> None:
    """Write what a graph reads of a batch over the zeros of `packed`, in parts of `sizes`."""
    num_rows, padded = plan.num_rows, sizes[3]
    ids, positions, rows, end, depth, range_of_row, ranges, order, _ = np.split(packed, np.cumsum(sizes)[:-1])
    ids.view(np.int64)[:num_rows] = plan.compact_ids
    positions.view(np.int64)[:num_rows] = plan.compact_positions
    if needed_rows is not None:
        rows.view(np.int64)[: len(needed_rows)] = needed_rows
    end[:num_rows], depth[:num_rows] = plan.end, plan.depth
    end[num_rows:] = np.arange(num_rows + 1, padded + 1)
    tree = range_tree(end, depth)
    range_of_row[:] = tree.range_of_row
    ranges[: tree.ranges.size] = tree.ranges.ravel()
    order[:] = tree.order


def _one_token_sequences(num_rows: int) -> RadixPlan:
    rows = np.arange(num_rows, dtype=np.int32)
    nothing = np.zeros(num_rows, np.int64)
    return RadixPlan(num_rows, nothing, nothing, rows + 1, rows, rows, np.arange(num_rows + 1))
