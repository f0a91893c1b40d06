"""`ScanTree`: the part of a plan that convolutions and recurrences read, on a device."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.ops.attention.attention_tree import send_arrays, send_tables
from radix_mlp.ops.scan.chunk_tables import CHUNK, ChunkTables, make_chunk_tables
from radix_mlp.ops.scan.chunks import Chunks, make_chunks
from radix_mlp.ops.scan.layout import Layout, collect, make_layout, spread
from radix_mlp.plan.copies import Copies, choose_copies
from radix_mlp.plan.levels import Levels, make_levels
from radix_mlp.plan.segments import Segments, make_segments
from radix_mlp.plan.tree import parents

__all__ = ["ScanTree"]

# what the pass of states through one more level costs a kernel, in chunks
LEVEL_COST = 8.0
# of plain torch: largest first, and what reading and writing a state costs, in rows
CHUNK_SIZES = (64, 32, 16)
ROWS_FOR_A_STATE = 16


class ScanTree:
    """Where the states of convolutions and recurrences come from, for every row. Made by `DevicePlan.scan_tree`.

    Tables are made on first use and kept. Each kind of table is one copy to the device, so nothing waits for the
    device in any layer. Padding rows of a plan have no place in a layout: recurrences give zeros for them.
    """

    def __init__(self, end: NDArray[np.int32], num_compact: int, device: torch.device) -> None:
        self._end = end
        self._windows: dict[int, Tensor] = {}
        self._chunks: dict[int, Chunks] = {}
        self.device = device
        self.num_rows = len(end)
        """`M`, with padding."""
        self.num_compact = num_compact
        """Rows before the padding."""

    @cached_property
    def parent(self) -> Tensor:
        """`[M]` int64 row of the token before, -1 for first tokens and padding rows."""
        return send_arrays([self._host_parent], [], self.device)[0][0]

    def windows(self, width: int) -> Tensor:
        """`[M, width]` int64: the ancestors of each row, oldest first, then the row; -1 before the first token."""
        if width not in self._windows:
            with torch.inference_mode(False):
                self._windows[width] = _windows(self.parent, width)
        return self._windows[width]

    @cached_property
    def above(self) -> Layout:
        """The layout of parents: the place of row `i` holds the row before it, and is empty for first tokens."""
        with torch.inference_mode(False):
            return _send_layout(make_layout(self._host_parent, self.num_rows), self.device)

    @cached_property
    def pieces(self) -> Levels:
        """The levels of kernels, on the host, with the copies that pay there (`plan.copies`)."""
        return make_levels(self._segments, self.num_compact, self._copies(CHUNK, LEVEL_COST).copied)

    @cached_property
    def layout(self) -> Layout:
        """The layout of `pieces`: rows level by level. With copies, it has more places than there are rows."""
        with torch.inference_mode(False):
            return _send_layout(make_layout(self.pieces.rows, self.num_rows), self.device)

    @cached_property
    def chunk_size(self) -> int:
        """Rows of a chunk with which plain torch does the least work: less where segments are short."""
        return min(CHUNK_SIZES, key=lambda size: self._copies(size).num_chunks * (size + ROWS_FOR_A_STATE))

    @cached_property
    def chunk_tables(self) -> ChunkTables:
        """The tables of kernels that work on chunks of rows that stand level by level."""
        return make_chunk_tables(self.pieces, self.device)

    def to_levels(self, x: Tensor) -> Tensor:
        """`[M, ...]` by row -> `[T, ...]` level by level."""
        return x if self._is_in_level_order else spread(x, self.layout)

    def from_levels(self, x: Tensor) -> Tensor:
        """`[T, ...]` level by level -> `[M, ...]` by row; zeros for padding rows."""
        return x if self._is_in_level_order else collect(x, self.layout)

    @cached_property
    def _is_in_level_order(self) -> bool:
        """Whether the rows stand level by level as they are, as in trees of one root with leaves right below it."""
        rows = self.pieces.rows
        return len(rows) == self.num_rows and bool((rows == np.arange(self.num_rows)).all())

    @cached_property
    def children(self) -> tuple[Tensor, Tensor, Tensor]:
        """The first child of each row (`[M]`, -1 for none), and the others: offsets `[M + 1]` into a list; int32."""
        parent = self._host_parent
        rows = np.flatnonzero(parent >= 0)
        # in preorder the first child is the next row
        is_first = parent[rows] == rows - 1
        first = np.full(self.num_rows, -1, np.int32)
        first[parent[rows[is_first]]] = rows[is_first]
        others = rows[~is_first]
        others = others[np.argsort(parent[others], kind="stable")]
        offsets = np.searchsorted(parent[others], np.arange(self.num_rows + 1))
        _, sent = send_arrays([], [first, offsets.astype(np.int32), others.astype(np.int32)], self.device)
        return sent[0], sent[1], sent[2]

    def chunks(self, size: int) -> Chunks:
        """The tree cut into chunks of `size` rows."""
        if size not in self._chunks:
            with torch.inference_mode(False):
                levels = make_levels(self._segments, self.num_compact, self._copies(size).copied)
                host = make_chunks(levels, size, self.num_rows)
                layout, links = send_tables([host.layout, host.links], self.device)
                layout = layout._replace(rows=layout.rows.view(-1, size))
            self._chunks[size] = Chunks(layout, links, size)
        return self._chunks[size]

    def _copies(self, chunk: int, level_cost: float = 0.0) -> Copies:
        return choose_copies(self._segments, self.num_compact, chunk, level_cost)

    @cached_property
    def _segments(self) -> Segments:
        return make_segments(self._end)

    @cached_property
    def _host_parent(self) -> NDArray[np.int32]:
        return parents(self._end, self.num_compact)


def _send_layout(layout: Layout, device: torch.device) -> Layout:
    found: Layout = send_tables([layout], device)[0]
    return found


def _windows(parent: Tensor, width: int) -> Tensor:
    # the last entry is the parent of -1
    above = torch.cat([parent, parent.new_full((1,), -1)])
    columns = [torch.arange(parent.shape[0], device=parent.device)]
    for _ in range(width - 1):
        columns.append(above[columns[-1]])
    return torch.stack(columns[::-1], dim=1)
