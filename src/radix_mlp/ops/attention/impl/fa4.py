"""`impl="fa4"`: FlashAttention-4 with the tree as its mask function and our block lists, forward and backward.

We call the package's own functions rather than torch's FlexAttention on top of them, which recompiles for new lengths
and costs more CPU time per call.  They are private and change between releases, so exactly one release is accepted.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.errors import UnsupportedImplError
from radix_mlp.ops.attention.attention_call import AttentionCall, CallKind, why_not_some_rows_or_spans
from radix_mlp.ops.attention.attention_tree import AttentionTree, HostTree, tables_of
from radix_mlp.ops.attention.impl.fa4_blocks import (
    BLOCK,
    BlockSizes,
    forward_sizes,
    pack_forward_blocks,
    pack_sparse_blocks,
    places,
)
from radix_mlp.ops.attention.impl.torch_flash import aligned
from radix_mlp.ops.packages import why_not_installed

__all__ = [
    "SAVES_LSE",
    "Tables",
    "backward",
    "block_lists",
    "fill_graph_tables",
    "forward",
    "graph_tables",
    "prepare",
    "prepare_short",
    "refuses",
    "size_of_graph_tables",
    "why_not",
]

SAVES_LSE = True
DTYPES = (torch.bfloat16, torch.float16)
WIDTH = 128
"""Head dimension. With block lists the backward of this release does not compile for others, or does not end."""
CAPABILITY = (9, 0)
# its private functions change from release to release
VERSIONS = {"flash-attn-4": "4.0.0b5", "nvidia-cutlass-dsl": "4.4.2", "quack-kernels": "0.3.3"}
MISSING = why_not_installed(VERSIONS, "fa4")


class Tables(NamedTuple):
    """The lists of blocks."""

    lists: Tensor
    """int32, all lists in one vector, as `fa4_blocks.pack_sparse_blocks` lays them out."""
    host_sizes: Tensor
    """int64, `fa4_blocks.BlockSizes`."""


class Lists(NamedTuple):
    """`radix_mlp.ops.attention.impl.fa4_blocks` in the shapes that the kernels want: `[1, 1, T]` and `[1, 1, T, T]`."""

    end: Tensor
    """`[T * BLOCK]` int32."""
    forward: tuple[Tensor, Tensor, Tensor, Tensor]
    """Counts and numbers of the blocks of keys that need a mask, then of those that need none."""
    backward: tuple[Tensor, Tensor, Tensor, Tensor]
    """Likewise of the blocks of rows."""


def why_not(kind: CallKind) -> str | None:
    """See `attention_call.Implementation`."""
    if kind.device_type != "cuda":
        return f"cannot run on {kind.device_type}"
    if MISSING is not None:
        return MISSING
    if kind.capability is not None and kind.capability != CAPABILITY:
        return f"was tested on GPUs of compute capability 9.0 (Hopper) alone, not {kind.capability}"
    return refuses(kind)


def refuses(kind: CallKind) -> str | None:
    """What keeps the kernels from a call where the package and the device are there."""
    if kind.dtype not in DTYPES:
        return f"takes bfloat16 and float16, not {kind.dtype}"
    if kind.window is not None:
        return "has no window"
    if kind.softcap:
        return "has no soft cap"
    if kind.sinks:
        return "has no sinks"
    if not kind.width == kind.value_width == WIDTH:
        return f"takes the head dimension {WIDTH}, not {kind.width} and {kind.value_width}"
    if not kind.scale > 0:
        return f"takes a scale above 0, not {kind.scale}"
    return why_not_some_rows_or_spans(kind)


def prepare(tree: HostTree) -> Tables:
    """See `attention_call.Implementation`.

    Raises:
        UnsupportedImplError: the lists would be too long.
    """
    tables = prepare_short(tree)
    if tables is None:
        raise UnsupportedImplError(
            f"impl='fa4' does not take these {len(tree.end)} rows: its block lists would be too long: "
            "use impl='triton' or smaller batches"
        )
    return tables


def prepare_short(tree: HostTree) -> Tables | None:
    """As `prepare`, but None where the lists would be too long."""
    lists, sizes = pack_sparse_blocks(tree.end)
    return Tables(torch.from_numpy(lists), torch.tensor(sizes)) if len(lists) or not len(tree.end) else None


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """`[M, Hq, D]`, `[M, Hkv, D]` twice -> `[M, Hq, D]` and the log-sum-exp `[Hq, M]`."""
    q, k, v, _, tree, scale, _, _ = call
    rows, heads, width = q.shape
    out, lse = q.new_empty((1, rows, heads, width)), q.new_empty((1, heads, rows), dtype=torch.float32)
    if rows:
        lists = block_lists(tree)
        q, k, v = (_batch(x) for x in (q, k, v))
        package = _package()
        package.forward(
            q, k, v, softmax_scale=scale, tile_mn=(BLOCK, BLOCK), mask_mod=package.mask, aux_tensors=[lists.end],
            block_sparse_tensors=package.blocks(*lists.forward, (BLOCK, BLOCK)), out=out, lse=lse,
        )  # fmt: skip
    return out[0], lse[0]


def backward(
    grad_out: Tensor, call: AttentionCall, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k and v. dq, and with several heads a group dk and dv, are summed in no fixed order.

    Raises:
        UnsupportedImplError: also in torch's deterministic mode.
    """
    q, k, v, _, tree, scale, _, _ = call
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        raise UnsupportedImplError(
            "the backward of impl='fa4' sums in no fixed order, and torch.use_deterministic_algorithms is on: "
            "use impl='triton'"
        )
    grads = [x.new_empty((1, *x.shape)) for x in (q, k, v)]
    if q.shape[0]:
        lists = block_lists(tree)
        package = _package()
        q, k, v, out, grad_out = (_batch(x) for x in (q, k, v, out, grad_out))
        package.backward(
            q, k, v, out, grad_out, lse[None], softmax_scale=scale, mask_mod=package.mask, aux_tensors=[lists.end],
            block_sparse_tensors=package.blocks(*lists.backward, (BLOCK, BLOCK)),
            dq=grads[0], dk=grads[1], dv=grads[2],
        )  # fmt: skip
    return grads[0][0], grads[1][0], grads[2][0], None


class _Package(NamedTuple):
    forward: Any
    backward: Any
    blocks: Any
    mask: Any


@cache
def _package() -> _Package:
    before = logging.root.manager.disable
    # importing it logs several times that its cache is off
    logging.disable(logging.DEBUG)
    try:
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
        from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
    finally:
        logging.disable(before)

    from radix_mlp.ops.attention.impl.fa4_mask import tree_mask

    return _Package(_flash_attn_fwd, _flash_attn_bwd, BlockSparseTensorsTorch, tree_mask)


def _batch(x: Tensor) -> Tensor:
    """`[M, H, D] -> [1, M, H, D]`, dense enough for 16 bytes at once."""
    return aligned(x)[None]


def block_lists(tree: AttentionTree) -> Lists:
    """Those that came with the tree; made here, with a copy to the host, if it came without."""
    tables = tables_of(tree, "fa4", prepare)
    num_rows = tree.end.shape[0]
    num_blocks = -(-num_rows // BLOCK)
    sizes = BlockSizes(*tables.host_sizes.tolist())
    at = places(num_rows, sizes)
    counts = [
        _count(tables.lists, place + i * num_blocks, num_blocks)
        for place in (at.forward_counts, at.backward_counts)
        for i in (0, 1)
    ]
    masked = _table(tables.lists, at.forward_masked, num_blocks, sizes.forward_masked)
    full = _table(tables.lists, at.forward_full, num_blocks, sizes.forward_full)
    backward_masked = _table(tables.lists, at.backward_masked, num_blocks, sizes.backward_masked)
    # the line of block `b` begins with `b + 1`
    ascending = _table(tables.lists, at.ascending + 1, num_blocks, 1)
    return Lists(
        tables.lists[: at.forward_counts],
        (counts[0], masked, counts[1], full),
        (counts[2], backward_masked, counts[3], ascending),
    )


def _count(packed: Tensor, place: int, num_blocks: int) -> Tensor:
    return packed.as_strided((1, 1, num_blocks), (num_blocks, num_blocks, 1), packed.storage_offset() + place)


def _table(packed: Tensor, place: int, num_blocks: int, width: int) -> Tensor:
    """`[1, 1, T, T]`, as the kernels want it, over lines of `width`: a line is read no further than its count says."""
    steps = num_blocks * width
    return packed.as_strided(
        (1, 1, num_blocks, num_blocks), (steps, steps, width, 1), packed.storage_offset() + place
    )  # fmt: skip


def size_of_graph_tables(num_rows: int) -> int:
    """Numbers of the lists of any tree of `num_rows`, forward only."""
    return places(num_rows, forward_sizes(num_rows)).stop


def graph_tables(vector: Tensor, num_rows: int, mean_keys: int) -> Tables:
    """Tables over `vector` (`[size_of_graph_tables]` int32), of a size that is right for all trees of `num_rows`."""
    return Tables(vector, torch.tensor(forward_sizes(num_rows)))


def fill_graph_tables(end: NDArray[np.int32], depth: NDArray[np.int32], vector: NDArray[np.int32]) -> None:
    """Write the lists of a tree to the vector of `graph_tables`."""
    assert pack_forward_blocks(end, vector), len(end)
