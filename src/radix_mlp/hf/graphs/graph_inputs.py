"""What a CUDA graph reads of a batch: one tensor of fixed size, filled in one copy."""

from __future__ import annotations

import itertools
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from radix_mlp.ops import AttentionTree
from radix_mlp.ops.attention.impl import fa4, triton
from radix_mlp.ops.attention.impl.triton_tiles import Tiles
from radix_mlp.plan import RadixPlan
from radix_mlp.plan.compiled import compiled

__all__ = ["GraphAttention", "GraphInputs", "GraphKey", "pack"]


class GraphTables(Protocol):
    """What the module of an implementation defines to run in graphs: tables of fixed size for `num_rows` rows."""

    def size_of_graph_tables(self, num_rows: int) -> int:
        """Numbers of its vector."""

    def graph_tables(self, vector: torch.Tensor, num_rows: int, mean_keys: int) -> tuple[torch.Tensor, ...]:
        """Its tables over the vector, int32."""

    def fill_graph_tables(self, end: NDArray[np.int32], depth: NDArray[np.int32], vector: NDArray[np.int32]) -> None:
        """Write those of a tree, on the host."""


TABLES: dict[str, GraphTables] = {"triton": triton, "fa4": fa4}
"""Implementations that run in graphs."""


class GraphAttention(NamedTuple):
    """How a graph runs attention: the choices usually made for each batch are made once, with the graph."""

    impl: str
    """One of `TABLES`."""
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
        self.impl = attention.impl
        tables = TABLES[self.impl]
        # ids, positions and needed rows (int64); end, depth; then the tables of the implementation
        size = tables.size_of_graph_tables(num_rows)
        self.sizes = (2 * num_rows, 2 * num_rows, 2 * (num_needed or 0), num_rows, num_rows, size)
        self.packed = torch.zeros(sum(self.sizes), dtype=torch.int32, device=device)
        ids, positions, rows, end, depth, vector = self.packed.split(self.sizes)
        self.ids, self.positions, self.rows = (part.view(torch.int64) for part in (ids, positions, rows))
        prepared = {self.impl: tables.graph_tables(vector, num_rows, attention.mean_keys)}
        self.tree = AttentionTree(end, depth, prepared)

    def fill(self, plan: RadixPlan, needed_rows: NDArray[np.int64] | None) -> None:
        """Copy what the graph reads of a batch, without waiting for the device."""
        host = torch.empty(len(self.packed), dtype=torch.int32, pin_memory=self.packed.is_cuda)
        pack(host.numpy(), plan, needed_rows, self.sizes, self.impl)
        self.packed.copy_(host, non_blocking=True)


def pack(
    packed: NDArray[np.int32],
    plan: RadixPlan,
    needed_rows: NDArray[np.int64] | None,
    sizes: tuple[int, ...],
    impl: str,
) -> None:
    """Write what a graph reads of a batch to `packed`, in parts of `sizes`."""
    starts = [0, *itertools.accumulate(sizes)]
    ids, positions, rows, end, depth, vector = (packed[start:stop] for start, stop in itertools.pairwise(starts))
    wide = ids.view(np.int64), positions.view(np.int64), rows.view(np.int64)
    needed = np.zeros(0, np.int64) if needed_rows is None else needed_rows
    given = plan.compact_ids, plan.compact_positions, needed, plan.end, plan.depth
    compiled(_pad)(*given, *wide, end, depth)
    TABLES[impl].fill_graph_tables(end, depth, vector)


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
) -> None:
    """Copy the given rows, and make the rest sequences of one token."""
    count = len(given_end)
    ids[:count], positions[:count], end[:count], depth[:count] = given_ids, given_positions, given_end, given_depth
    ids[count:], positions[count:], depth[count:] = 0, 0, 0
    for row in range(count, len(end)):
        end[row] = row + 1
    rows[: len(given_rows)] = given_rows
    rows[len(given_rows) :] = 0
