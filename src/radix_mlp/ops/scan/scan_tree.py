"""`ScanTree`: the part of a plan that convolutions and recurrences read, on a device."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

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

__all__ = ["Level", "ScanTree"]

# what the pass of states through one more level costs a kernel, in chunks
LEVEL_COST = 8.0
# of plain torch: largest first, and what reading and writing a state costs, in rows
CHUNK_SIZES = (64, 32, 16)
ROWS_FOR_A_STATE = 16


class Level(NamedTuple):
    """`R` pieces of the tree (`plan.levels.Levels`) that run together: one call of a kernel for packed sequences."""

    start: int
    """The first place of the level in `ScanTree.layout`."""
    stop: int
    """One past its last place."""
    rows: Tensor
    """`[stop - start]` int64 rows, piece by piece."""
    cu_seqlens: Tensor
    """`[R + 1]` int32 offsets of the pieces into `rows`."""
    host_cu_seqlens: Tensor
    """The same on the CPU, int64."""
    parents: Tensor
    """`[R]` int64, the piece of the level above from whose final state each piece starts, ascending; empty for the
    first level."""
    child_offsets: Tensor
    """`[R + 1]` int32, the pieces of the level below that start from piece `r` are `child_offsets[r]` up to
    `child_offsets[r + 1]`."""


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
        """The levels on the host: those of kernels, with the copies that pay there."""
        return make_levels(self._segments, self.num_compact, self._copies(CHUNK, LEVEL_COST).copied)

    @cached_property
    def layout(self) -> Layout:
        """The layout in which each level is a slice: `spread` rows to it, `collect` them from it.

        Rows of a segment may be copied into its children (`plan.copies`), so it may have more places than rows.
        """
        with torch.inference_mode(False):
            return _send_layout(make_layout(self.pieces.rows, self.num_rows), self.device)

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """The levels, roots first. A piece of one level starts from a final state of the level above."""
        with torch.inference_mode(False):
            return _send_levels(self.pieces, self.device)

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
        parent = parents(self._end, self.num_compact)
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


class _HostLevel(NamedTuple):
    start: int
    stop: int
    cu_seqlens: NDArray[np.int32]
    parents: NDArray[np.int64]
    child_offsets: NDArray[np.int32]


def _host_levels(levels: Levels) -> list[_HostLevel]:
    found = []
    # the pieces below the last level are none
    bounds = [0, *levels.first.tolist(), len(levels.parent)]
    for above, low, high, below in zip(bounds, bounds[1:], bounds[2:], bounds[3:], strict=False):
        cu = levels.start[low : high + 1]
        found.append(
            _HostLevel(
                start=int(cu[0]),
                stop=int(cu[-1]),
                cu_seqlens=cu - cu[0],
                parents=levels.parent[low:high].astype(np.int64) - above if above < low else np.zeros(0, np.int64),
                child_offsets=np.searchsorted(levels.parent[high:below], np.arange(low, high + 1)).astype(np.int32),
            )
        )
    return found


def _send_levels(levels: Levels, device: torch.device) -> tuple[Level, ...]:
    host = _host_levels(levels)
    long = [levels.rows.astype(np.int64), *(level.parents for level in host)]
    short = [array for level in host for array in (level.cu_seqlens, level.child_offsets)]
    (rows, *parents_of), tables = send_arrays(long, short, device)
    return tuple(
        Level(
            level.start,
            level.stop,
            rows[level.start : level.stop],
            cu_seqlens,
            torch.from_numpy(level.cu_seqlens.astype(np.int64)),
            above,
            child_offsets,
        )
        for level, above, cu_seqlens, child_offsets in zip(host, parents_of, tables[::2], tables[1::2], strict=True)
    )


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
