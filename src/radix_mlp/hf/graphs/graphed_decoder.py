"""CUDA graphs of a decoder for batches whose kernels take longer to launch than to run.

A graph has fixed addresses and sizes, so a batch is padded to the next size of a few per power of two: padding rows are
sequences of one token, and everything that depends on the batch is copied into the graph's own tensors in one go. What
attention decides by a batch, tiles and the kernel itself, is a part of what a graph is found by.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.hf.graphs.decoder import Decoder, difference, spread
from radix_mlp.hf.graphs.graph_inputs import GraphAttention, GraphInputs, GraphKey
from radix_mlp.ops.attention.attention_call import CallKind
from radix_mlp.ops.attention.impl import fa4
from radix_mlp.ops.attention.impl.auto_cost_model import Call, choose, device_facts
from radix_mlp.ops.attention.impl.fa4_blocks import pack_sparse_blocks
from radix_mlp.ops.attention.impl.leaf_paths import tree_statistics
from radix_mlp.ops.attention.impl.triton import MAX_WIDTH
from radix_mlp.ops.attention.impl.triton_tiles import Work, choose_tiles, typical_keys
from radix_mlp.ops.cuda_device import on_device
from radix_mlp.plan import RadixPlan

__all__ = ["GraphedDecoder", "padded_size"]

_SMALLEST_STEP = 64
_SIZES_PER_OCTAVE = 32
_LAYER_FLOP = 0.6e12
"""Work of a layer above which its kernels take longer than their launches, also where other threads hold Python's lock
half of the time: about 1 ms on an H200."""
_FEWEST_NEEDED = 64
_FA4_ROWS = 2048
"""Below, the tree kernel is as fast, and block lists take time to make."""
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
    """A `Decoder` that replays CUDA graphs for batches of up to `max_rows` compact rows.

    A graph is captured when a size comes for the second time; graphs share one pool of memory, and the one that was not
    used for longest goes when there are too many.
    """

    def __init__(self, decoder: Decoder, max_rows: int | None = None) -> None:
        self.decoder = decoder
        if max_rows is None:
            max_rows = int(_LAYER_FLOP / (2 * decoder.layer_weights))
        self.max_rows = max_rows if decoder.impl in _GRAPH_IMPLS and decoder.shape.width <= MAX_WIDTH else 0
        self._windows = sorted({window or 0 for window in decoder.windows})
        self._without_fa4 = decoder.impl != "auto" or self._windows != [0]
        self._graphs: dict[GraphKey, _Graph] = {}
        self._seen: set[GraphKey] = set()
        self._pool: Any = None
        self._stream: Any = None
        self.must_capture = False
        """Whether a batch that cannot be captured is an error, instead of running without a graph."""

    def is_current(self) -> bool:
        """Whether the model still has the parameters that this was made from."""
        return self.decoder.is_current()

    def release(self) -> None:
        """Let go of all graphs: a group of processes whose sums are in one cannot be closed before."""
        self._graphs.clear()

    def takes(self, plan: RadixPlan) -> bool:
        """Whether a batch may run as a graph, which brings tables of its own."""
        return 0 < plan.num_rows <= self.max_rows and plan.span_end is None and plan.query_rows is None

    @torch.inference_mode()
    def __call__(self, plan: RadixPlan, needed_rows: NDArray[np.int64] | None = None) -> Tensor:
        """As `Decoder`, whatever the size of the batch."""
        if not self.takes(plan):
            return self.decoder(plan, needed_rows)
        if not self.decoder.reads_needed_rows:
            needed_rows = None
        size = padded_size(plan.num_rows)
        attention = self._attention(plan, size)
        num_needed = None if needed_rows is None else min(_padded_needed(len(needed_rows)), size)
        key = GraphKey(size, num_needed, attention[:2])
        if key not in self._graphs and key not in self._seen:
            self._seen.add(key)
            return self.decoder(plan, needed_rows)
        with on_device(self.decoder.trunk.device):
            graph = self._graphs.pop(key, None)
            is_new = graph is None
            try:
                graph = graph or self._captured(key, attention)
            except RuntimeError as error:
                if self.must_capture:
                    raise
                self._give_up(key, error)
                return self.decoder(plan, needed_rows)
            self._graphs[key] = graph
            graph.replay(plan, needed_rows)
            if is_new and self.decoder.is_foreign:
                expected = self.decoder(plan)
                reason = difference(graph.hidden[: plan.num_rows], expected)
                if reason is not None:
                    self._stop(f"a CUDA graph gives something else ({reason})")
                    return expected
        if needed_rows is None:
            return graph.hidden[: plan.num_rows].clone()
        return spread(graph.hidden, graph.inputs.rows[: len(needed_rows)], plan.num_rows)

    def _attention(self, plan: RadixPlan, size: int) -> GraphAttention:
        """What `impl="auto"` would run, by the numbers of this batch."""
        width, heads, kv_heads, dtype = self.decoder.shape
        device = self.decoder.trunk.device
        if size >= _FA4_ROWS and device.type == "cuda" and not self._without_fa4:
            chip, capability = device_facts(device.index)
            kind = CallKind("cuda", dtype, width, width, capability=capability)
            sizes = None if fa4.why_not(kind) else pack_sparse_blocks(plan.end)[1]
            blocks = (sizes.num_masked, sizes.num_full) if sizes is not None and sizes.num_masked else None
            call = Call(heads, kv_heads, kind, has_paths=False, blocks=blocks)
            if blocks and choose(tree_statistics(plan.end, plan.depth), call, chip).impl == "fa4":
                return GraphAttention("fa4")
        keys = typical_keys(int(plan.depth.sum()) / plan.num_rows + 1)
        tiles = tuple(
            choose_tiles(
                "forward", device, dtype, width, heads // kv_heads,
                Work(size * heads, min(keys, window or keys)),
            )
            for window in self._windows
        )  # fmt: skip
        return GraphAttention("triton", tiles, keys)

    def _give_up(self, key: GraphKey, error: RuntimeError) -> None:
        if key.attention[0] == "fa4":
            self._without_fa4 = True
            warnings.warn(f"FlashAttention-4 runs without CUDA graphs: {error}", UserWarning, stacklevel=4)
            return
        if self.decoder.is_foreign and not isinstance(error, torch.OutOfMemoryError):
            self._stop(f"capturing one failed ({str(error).partition(chr(10))[0]})")
            return
        # memory did not suffice for a graph, most likely: run batches of this size and above without one
        self._graphs.clear()
        self.max_rows = key.num_rows - 1
        message = f"batches of {key.num_rows} rows and more run without CUDA graphs: {error}"
        warnings.warn(message, UserWarning, stacklevel=4)

    def _stop(self, reason: str) -> None:
        self._graphs.clear()
        self.max_rows = 0
        warnings.warn(
            f"{type(self.decoder.trunk).__name__} runs without CUDA graphs: {reason}", UserWarning, stacklevel=4
        )

    def _captured(self, key: GraphKey, attention: GraphAttention) -> _Graph:
        if len(self._graphs) == _MAX_GRAPHS:
            # dictionaries keep their order: the first was used longest ago
            del self._graphs[next(iter(self._graphs))]
        if self._pool is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        return _Graph(self.decoder, key, attention, self._pool, self._stream)


class _Graph:
    """One captured size."""

    def __init__(self, decoder: Decoder, key: GraphKey, attention: GraphAttention, pool: Any, side: Any) -> None:
        device = decoder.trunk.device
        self.inputs = GraphInputs(key.num_rows, key.num_needed, attention, device)
        rows = None if key.num_needed is None else self.inputs.rows
        arguments = self.inputs.ids, self.inputs.positions, self.inputs.tree, rows, attention.impl
        self.inputs.fill(_one_token_sequences(key.num_rows), None)
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
        self.inputs.fill(plan, needed_rows)
        self.graph.replay()


def _padded_needed(number: int) -> int:
    """Powers of two: these rows cost next to nothing, and a graph for every number of them would."""
    return max(_FEWEST_NEEDED, 1 << max(number - 1, 0).bit_length())


def _one_token_sequences(num_rows: int) -> RadixPlan:
    rows = np.arange(num_rows, dtype=np.int32)
    nothing = np.zeros(num_rows, np.int64)
    depth = np.zeros(num_rows, np.int32)
    return RadixPlan(num_rows, nothing, nothing, rows + 1, rows, rows, np.arange(num_rows + 1), depth)
