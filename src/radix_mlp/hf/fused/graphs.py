"""CUDA graphs of a fused decoder for batches whose kernels take longer to launch than to run.

A graph has fixed addresses and sizes, so a batch is padded to the next size of a few per power of two: padding rows are
sequences of one token, and everything that depends on the batch is copied into the graph's own tensors in one go.
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.hf.fused.decoder import FusedDecoder, spread
from radix_mlp.ops import AttentionTree
from radix_mlp.ops.impl.cuda_device import on_device
from radix_mlp.ops.registry import MAX_WIDTH
from radix_mlp.plan import RadixPlan
from radix_mlp.plan.compiled import compiled
from radix_mlp.plan.gpu_blocks import KEY_BLOCK, SEGMENT, fill_ranges

__all__ = ["GraphedDecoder", "padded_size"]

_SMALLEST_STEP = 64
_SIZES_PER_OCTAVE = 32
_LAYER_FLOP = 0.45e12
"""Work of a layer above which its kernels take longer than their launches: about 0.6 ms on an H200."""
_MAX_GRAPHS = 64
_GRAPH_IMPLS = ("auto", "triton")


def padded_size(number: int, smallest_step: int = _SMALLEST_STEP) -> int:
    """The next size that graphs are made for: at most a 32nd larger, except where steps of `smallest_step` are coarser.

    >>> [padded_size(number) for number in (1, 65, 1088, 6272, 6273, 10_000)]
    [64, 128, 1088, 6272, 6400, 10240]
    """
    step = max(smallest_step, (1 << max(number - 1, 1).bit_length() - 1) // _SIZES_PER_OCTAVE)
    return -(-number // step) * step


class GraphedDecoder:
    """A `FusedDecoder` that replays CUDA graphs for batches of up to `max_rows` compact rows.

    A graph is captured when a size comes for the second time; graphs share one pool of memory, and the one that was not
    used for longest goes when there are too many.
    """

    def __init__(self, decoder: FusedDecoder, max_rows: int | None = None) -> None:
        self.decoder = decoder
        if max_rows is None:
            layer = decoder.layers[0]
            weights = sum(weight.numel() for weight in (layer.qkv, layer.out, layer.gate_up, layer.down))
            max_rows = int(_LAYER_FLOP / (2 * weights))
        self.max_rows = max_rows if decoder.impl in _GRAPH_IMPLS and decoder.head_dim <= MAX_WIDTH else 0
        self._graphs: dict[tuple[int, int | None], _Graph] = {}
        self._seen: set[tuple[int, int | None]] = set()
        self._pool: Any = None
        self._stream: Any = None

    def is_current(self) -> bool:
        """Whether the model still has the parameters that this was made from."""
        return self.decoder.is_current()

    @torch.inference_mode()
    def __call__(self, plan: RadixPlan, needed_rows: NDArray[np.int64] | None = None) -> Tensor:
        """As `FusedDecoder`, whatever the size of the batch."""
        num_rows = plan.num_rows
        if not 0 < num_rows <= self.max_rows:
            return self.decoder(plan, needed_rows)
        size = padded_size(num_rows)
        key = size, None if needed_rows is None else min(padded_size(max(1, len(needed_rows)), 32), size)
        if key not in self._graphs and key not in self._seen:
            self._seen.add(key)
            return self.decoder(plan, needed_rows)
        with on_device(self.decoder.trunk.device):
            try:
                graph = self._graphs.pop(key, None) or self._captured(*key)
            except RuntimeError as error:
                self._give_up(size, error)
                return self.decoder(plan, needed_rows)
            self._graphs[key] = graph
            graph.replay(plan, needed_rows)
        if needed_rows is None:
            return graph.hidden[:num_rows].clone()
        return spread(graph.hidden, graph.rows[: len(needed_rows)], num_rows)

    def _give_up(self, size: int, error: RuntimeError) -> None:
        """Memory did not suffice for a graph, most likely: run batches of this size and above without one."""
        self._graphs.clear()
        self.max_rows = size - 1
        warnings.warn(f"batches of {size} rows and more run without CUDA graphs: {error}", UserWarning, stacklevel=4)

    def _captured(self, size: int, num_needed: int | None) -> _Graph:
        if len(self._graphs) == _MAX_GRAPHS:
            # dictionaries keep their order: the first was used longest ago
            del self._graphs[next(iter(self._graphs))]
        if self._pool is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        return _Graph(self.decoder, size, num_needed, self._pool, self._stream)


class _Graph:
    """One captured size: `num_rows` rows, of which `num_needed` go past the last attention (None: all)."""

    def __init__(self, decoder: FusedDecoder, num_rows: int, num_needed: int | None, pool: Any, side: Any) -> None:
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
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            # kernels compile and libraries allocate outside of the capture
            decoder.run(*arguments)
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        # torch's own stream for this is one of the device that captured first; other threads go on copying plans
        with torch.cuda.graph(self.graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            self.hidden = decoder.run(*arguments)

    def replay(self, plan: RadixPlan, needed_rows: NDArray[np.int64] | None) -> None:
        """Compute `hidden` of this batch; the next replay overwrites it."""
        self._fill(plan, needed_rows)
        self.graph.replay()

    def _fill(self, plan: RadixPlan, needed_rows: NDArray[np.int64] | None) -> None:
        host = torch.empty(len(self.packed), dtype=torch.int32, pin_memory=True)
        pack(host.numpy(), plan, needed_rows, self.sizes)
        self.packed.copy_(host, non_blocking=True)


def pack(
    packed: NDArray[np.int32], plan: RadixPlan, needed_rows: NDArray[np.int64] | None, sizes: tuple[int, ...]
) -> None:
    """Write what a graph reads of a batch to `packed`, in parts of `sizes`."""
    starts = [0, *itertools.accumulate(sizes)]
    ids, positions, rows, end, depth, range_of_row, ranges, order = (
        packed[start:stop] for start, stop in itertools.pairwise(starts[:-1])
    )
    wide = ids.view(np.int64), positions.view(np.int64), rows.view(np.int64)
    needed = np.zeros(0, np.int64) if needed_rows is None else needed_rows
    given = plan.compact_ids, plan.compact_positions, needed, plan.end, plan.depth
    compiled(_pad)(*given, *wide, end, depth, order)
    # ranges past the last are never read
    fill_ranges(end, ranges.reshape(-1, 4), range_of_row)


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


def _one_token_sequences(num_rows: int) -> RadixPlan:
    rows = np.arange(num_rows, dtype=np.int32)
    nothing = np.zeros(num_rows, np.int64)
    return RadixPlan(num_rows, nothing, nothing, rows + 1, rows, rows, np.arange(num_rows + 1))
