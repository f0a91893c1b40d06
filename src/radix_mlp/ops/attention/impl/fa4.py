"""`impl="fa4"`: FlashAttention-4 with the tree as its mask function and our block lists, forward and backward.

The package's own functions are called, not torch's FlexAttention on top of them, which compiles anew for lengths and
costs more CPU time a call.  They are private and change between releases, so one release is taken and no other.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from radix_mlp.errors import UnsupportedImplError
from radix_mlp.ops.attention.fa4_blocks import BLOCK, pack_sparse_blocks
from radix_mlp.ops.attention.impl.torch_flash import aligned
from radix_mlp.ops.attention.registry import AttentionCall
from radix_mlp.ops.device_plan import AttentionTree

__all__ = ["CAPABILITY", "backward", "block_lists", "forward", "why_not"]

DTYPES = (torch.bfloat16, torch.float16)
WIDTH = 128
"""Head dimension. With block lists the backward of this release does not compile for others, or does not end."""
CAPABILITY = (9, 0)


class Lists(NamedTuple):
    """`radix_mlp.ops.attention.fa4_blocks` in the shapes that the kernels want: `[1, 1, T]` and `[1, 1, T, T]`."""

    end: Tensor
    """`[T * BLOCK]` int32."""
    forward: tuple[Tensor, Tensor, Tensor, Tensor]
    """Counts and numbers of the blocks of keys that need a mask, then of those that need none."""
    backward: tuple[Tensor, Tensor, Tensor, Tensor]
    """Likewise of the blocks of rows."""


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """`[M, Hq, D]`, `[M, Hkv, D]` twice -> `[M, Hq, D]` and the log-sum-exp `[Hq, M]`."""
    q, k, v, sinks, tree, scale, window, softcap = call
    _check(q, v, sinks, softcap, scale, window)
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
    q, k, v, sinks, tree, scale, window, softcap = call
    _check(q, v, sinks, softcap, scale, window)
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


def why_not(
    width: int,
    value_width: int,
    dtype: torch.dtype,
    *,
    window: bool = False,
    softcap: bool = False,
    sinks: bool = False,
    scale: float = 1.0,
) -> str | None:
    """What keeps the kernels from a call, wherever it runs; None if nothing does."""
    if dtype not in DTYPES:
        return f"takes bfloat16 and float16, not {dtype}"
    if window:
        return "has no window"
    if softcap:
        return "has no soft cap"
    if sinks:
        return "has no sinks"
    if not width == value_width == WIDTH:
        return f"takes the head dimension {WIDTH}, not {width} and {value_width}"
    if not scale > 0:
        return f"takes a scale above 0, not {scale}"
    return None


class _Package(NamedTuple):
    forward: Any
    backward: Any
    blocks: Any
    mask: Any


@cache
def _package() -> _Package:
    before = logging.root.manager.disable
    # with its import it tells that its cache is off, several times
    logging.disable(logging.DEBUG)
    try:
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
        from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
    finally:
        logging.disable(before)

    from radix_mlp.ops.attention.impl.fa4_mask import tree_mask

    return _Package(_flash_attn_fwd, _flash_attn_bwd, BlockSparseTensorsTorch, tree_mask)


def _check(q: Tensor, v: Tensor, sinks: Tensor | None, softcap: float | None, scale: float, window: int | None) -> None:
    options = {"window": window is not None, "softcap": softcap is not None, "sinks": sinks is not None}
    reason = why_not(q.shape[2], v.shape[2], q.dtype, scale=scale, **options)
    if reason is None and q.is_cuda and torch.cuda.get_device_capability(q.device) != CAPABILITY:
        reason = "was tested on GPUs of compute capability 9.0 (Hopper) alone"
    if reason is not None:
        raise UnsupportedImplError(f"impl='fa4' {reason}: use impl='triton' or 'dense'")


def _batch(x: Tensor) -> Tensor:
    """`[M, H, D] -> [1, M, H, D]`, dense enough for 16 bytes at once."""
    return aligned(x)[None]


def block_lists(tree: AttentionTree) -> Lists:
    """Those that came with the tree; made here, with a copy to the host, if it came without."""
    packed, sizes = tree.sparse_blocks, tree.host_sparse_sizes
    if packed.shape[0] == 0:
        made, made_sizes = pack_sparse_blocks(tree.end.cpu().numpy())
        if len(made) == 0:
            raise UnsupportedImplError(
                f"impl='fa4' does not take these {tree.end.shape[0]} rows: its block lists would be too long: "
                "use impl='triton' or smaller batches"
            )
        packed, sizes = torch.from_numpy(made).to(tree.end.device), torch.from_numpy(made_sizes)
    num_blocks = -(-tree.end.shape[0] // BLOCK)
    masked, full, backward_masked, *_ = sizes.tolist()
    place = num_blocks * BLOCK
    counts = [_count(packed, place + i * num_blocks, num_blocks) for i in range(4)]
    place += 4 * num_blocks
    tables = []
    for width in (masked, full, backward_masked):
        tables.append(_table(packed, place, num_blocks, width))
        place += num_blocks * width
    # the line of block `b` begins with `b + 1`
    ascending = _table(packed, place + 1, num_blocks, 1)
    return Lists(
        packed[: num_blocks * BLOCK],
        (counts[0], tables[0], counts[1], tables[1]),
        (counts[2], tables[2], counts[3], ascending),
    )


def _count(packed: Tensor, place: int, num_blocks: int) -> Tensor:
    return packed.as_strided((1, 1, num_blocks), (num_blocks, num_blocks, 1), packed.storage_offset() + place)


def _table(packed: Tensor, place: int, num_blocks: int, width: int) -> Tensor:
    """`[1, 1, T, T]`, as the kernels want it, over lines of `width`: a line is read no further than its count says."""
    steps = num_blocks * width
    return packed.as_strided(
        (1, 1, num_blocks, num_blocks), (steps, steps, width, 1), packed.storage_offset() + place
    )  # fmt: skip
