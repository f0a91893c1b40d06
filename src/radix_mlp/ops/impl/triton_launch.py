"""Tensors in, kernels launched, tensors out: `triton_forward` and `triton_backward`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from radix_mlp.errors import UnsupportedImplError
from radix_mlp.ops.impl.triton_tiles import Tiles, choose_tiles
from radix_mlp.plan.gpu_blocks import KEY_BLOCK, SEGMENT, backward_items, range_tree

__all__ = ["TritonBlocks", "triton_backward", "triton_forward"]

_LOG2_E = 1.4426950408889634
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_WIDTH = 512


class TritonBlocks(NamedTuple):
    """`RangeTree` and `BackwardItems` as int32 tensors on one device."""

    range_of_row: Tensor
    ranges: Tensor
    order: Tensor
    items: Tensor
    blocks: Tensor
    splits: Tensor
    slots: Tensor

    @classmethod
    def make(cls, end: Tensor, depth: Tensor, window: int | None = None) -> TritonBlocks:
        """Tables of the tree `end`, `depth` (`[M]`), on their device; copies to the host unless they lie there.

        A window only makes the backward faster: tables made for one window are right for every other that is
        not longer, tables made without a window for all.
        """
        host_end, host_depth = (x.to("cpu", torch.int32).numpy() for x in (end, depth))
        arrays = (*range_tree(host_end, host_depth), *backward_items(host_end, host_depth, window))
        flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).to(end.device)
        parts = flat.split([array.size for array in arrays])
        return cls(*(part.view(array.shape) for part, array in zip(parts, arrays, strict=True)))

    @classmethod
    def unpack(cls, tables: Tensor, sizes: Tensor, num_rows: int) -> TritonBlocks:
        """Views of what `radix_mlp.plan.gpu_blocks.pack_tables` packed; `sizes` lies on the CPU."""
        num_ranges, num_items, num_splits, num_slots = sizes.tolist()
        segments, key_blocks = -(-num_rows // SEGMENT), -(-num_rows // KEY_BLOCK)
        parts = tables.split(
            [num_rows, 4 * num_ranges, segments, 4 * num_items, 2 * key_blocks, 3 * num_splits, num_slots]
        )
        row, ranges, order, items, blocks, splits, slots = parts
        return cls(row, ranges.view(-1, 4), order, items.view(-1, 4), blocks.view(-1, 2), splits.view(-1, 3), slots)


def triton_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    end: Tensor,
    depth: Tensor,
    blocks: TritonBlocks,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Tree attention of `[M, Hq, D]`, `[M, Hkv, D]`, `[M, Hkv, Dv]`, any strides.

    Returns:
        out `[M, Hq, Dv]` in q's dtype, contiguous; lse `[Hq, M]` float32, natural logarithm, sinks included.

    Raises:
        UnsupportedImplError: a dtype, head dimension or scale that the kernels do not take.
    """
    _check(q, v, scale)
    q, k, v = _rows_dense(q), _rows_dense(k), _rows_dense(v)
    num_rows, heads, width = q.shape
    kv_heads, value_width = v.shape[1:]
    out = q.new_empty(num_rows, heads, value_width)
    lse = q.new_empty(heads, num_rows, dtype=torch.float32)
    if num_rows == 0:
        return out, lse
    from radix_mlp.ops.impl.triton_forward import forward_kernel

    group = heads // kv_heads
    tiles = tiles or choose_tiles("forward", q.device, q.dtype, max(width, value_width), group)
    tokens = tiles.rows // group
    tma = tiles.tma and _tma_fits(k, v)
    options = _options(q.dtype, width, value_width, group, tiles, window is not None, softcap is not None, tma)
    with _on(q.device):
        forward_kernel[(_num_tiles(num_rows, tokens) * kv_heads,)](
            q, *_keys(k, v, tiles, tma), q if sinks is None else sinks, out, lse,
            end, depth, blocks.range_of_row, blocks.ranges, blocks.order,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            num_rows, kv_heads, *_scales(scale, softcap), window or 0,
            BLOCK_N=tiles.keys, BLOCK_E=tiles.edge, SEGMENT=SEGMENT, HAS_SINKS=sinks is not None, **options,
        )  # fmt: skip
    return out, lse


def triton_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    end: Tensor,
    depth: Tensor,
    blocks: TritonBlocks,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    tiles: tuple[Tiles, Tiles] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `triton_forward`: dq `[M, Hq, D]`, dk `[M, Hkv, D]`, dv `[M, Hkv, Dv]`, dsinks `[Hq]` or None.

    `out` and `lse` are what `triton_forward` returned. Bit for bit the same on every call.
    """
    _check(q, v, scale)
    q, k, v, dout = _rows_dense(q), _rows_dense(k), _rows_dense(v), _rows_dense(dout)
    num_rows, heads, width = q.shape
    kv_heads, value_width = v.shape[1:]
    dq = q.new_empty(q.shape)
    dk = k.new_empty(k.shape)
    dv = v.new_empty(v.shape)
    if num_rows == 0:
        return dq, dk, dv, None if sinks is None else torch.zeros_like(sinks)
    from radix_mlp.ops.impl.triton_backward import dkdv_kernel, dq_kernel, sum_kernel

    group = heads // kv_heads
    widest = max(width, value_width)
    dq_tiles, dkdv_tiles = tiles or (
        choose_tiles("dq", q.device, q.dtype, widest, group),
        choose_tiles("dkdv", q.device, q.dtype, widest, group),
    )
    delta = torch.empty_like(lse)
    scales = (scale, *_scales(scale, softcap))
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2])
    shared = (q.dtype, width, value_width, group)
    flags = (window is not None, softcap is not None)
    with _on(q.device):
        tokens = dq_tiles.rows // group
        tma = dq_tiles.tma and _tma_fits(k, v)
        dq_kernel[(_num_tiles(num_rows, tokens) * kv_heads,)](
            q, *_keys(k, v, dq_tiles, tma), out, dout, lse, delta, dq,
            end, depth, blocks.range_of_row, blocks.ranges, blocks.order,
            *strides, num_rows, kv_heads, *scales, window or 0,
            BLOCK_N=dq_tiles.keys, BLOCK_E=dq_tiles.edge, SEGMENT=SEGMENT,
            **_options(*shared, dq_tiles, *flags, tma),
        )  # fmt: skip

        tokens = dkdv_tiles.rows // group
        tma = dkdv_tiles.tma and dkdv_tiles.rows % group == 0 and _power_of_two(group) and _tma_fits(q, dout)
        query, grad = (_queries(x, tokens, group) for x in (q, dout)) if tma else (q, dout)
        shape = (blocks.slots.shape[0], kv_heads, KEY_BLOCK)
        partial_dk = lse.new_empty(*shape, width)
        partial_dv = lse.new_empty(*shape, value_width)
        dkdv_kernel[(blocks.items.shape[0] * kv_heads * (KEY_BLOCK // dkdv_tiles.keys),)](
            query, k, v, grad, lse, delta, dk, dv, partial_dk, partial_dv,
            end, depth, blocks.items, blocks.blocks,
            *strides, num_rows, kv_heads, *scales, window or 0,
            BLOCK_N=dkdv_tiles.keys, KEY_BLOCK=KEY_BLOCK,
            **_options(*shared, dkdv_tiles, *flags, tma),
        )  # fmt: skip
        if blocks.splits.shape[0]:
            for partial, grad in ((partial_dk, dk), (partial_dv, dv)):
                sum_kernel[(blocks.splits.shape[0] * kv_heads * (KEY_BLOCK // 16),)](
                    partial, grad, blocks.splits, num_rows, kv_heads,
                    D=grad.shape[2], BLOCK_D=_padded(grad.shape[2]), BLOCK_N=16, KEY_BLOCK=KEY_BLOCK,
                )  # fmt: skip
    if sinks is None:
        return dq, dk, dv, None
    # the sink's share of the softmax, times what its missing value contributes to delta
    dsinks = -(torch.exp(sinks.float()[:, None] - lse) * delta).sum(1)
    return dq, dk, dv, dsinks.to(sinks.dtype)


def _check(q: Tensor, v: Tensor, scale: float) -> None:
    if q.dtype not in _DTYPES:
        raise UnsupportedImplError(f"impl='triton' takes bfloat16, float16 and float32, not {q.dtype}: use 'dense'")
    if max(q.shape[2], v.shape[2]) > _MAX_WIDTH:
        raise UnsupportedImplError(
            f"impl='triton' takes head dimensions up to {_MAX_WIDTH}, not {q.shape[2]} and {v.shape[2]}: use 'dense'"
        )
    if scale < 0:
        raise UnsupportedImplError(f"impl='triton' takes a scale of at least 0, not {scale}: negate q")


@cache
def _options(
    dtype: torch.dtype, width: int, value_width: int, group: int, tiles: Tiles, window: bool, cap: bool, tma: bool
) -> dict[str, Any]:
    """Compile-time arguments that all kernels share."""
    return {
        "G": group,
        "D": width,
        "DV": value_width,
        "BLOCK_D": _padded(width),
        "BLOCK_DV": _padded(value_width),
        "T": tiles.rows // group,
        "BLOCK_M": tiles.rows,
        "HAS_WINDOW": window,
        "HAS_CAP": cap,
        "TMA": tma,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "STAGES": tiles.stages,
        "STAGES_E": tiles.edge_stages,
        "num_warps": tiles.warps,
    }


def _scales(scale: float, softcap: float | None) -> tuple[float, float]:
    """`scale_log2` and `cap_log2` as `triton_walk.scores` reads them."""
    if softcap is None:
        return scale * _LOG2_E, 0.0
    return 2.0 * _LOG2_E * scale / softcap, softcap * _LOG2_E


def _num_tiles(num_rows: int, tokens: int) -> int:
    if SEGMENT % tokens:
        return -(-num_rows // tokens)
    return -(-num_rows // SEGMENT) * (SEGMENT // tokens)


def _rows_dense(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _padded(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def _tma_fits(*tensors: Tensor) -> bool:
    """The copy engine wants 16-byte aligned rows."""
    return all(
        x.is_cuda
        and x.data_ptr() % 16 == 0
        and all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:2])
        for x in tensors
    )


def _keys(k: Tensor, v: Tensor, tiles: Tiles, tma: bool) -> tuple[Any, Any, Any, Any]:
    """k and v as the kernels take them: pointers, or descriptors of `[Hkv, M, D]`; for masked blocks or None."""
    if not tma:
        return k, v, None, None
    from triton.tools.tensor_descriptor import TensorDescriptor

    def describe(x: Tensor, keys: int) -> Any:
        shape = [x.shape[1], x.shape[0], x.shape[2]]
        return TensorDescriptor(x, shape, [x.stride(1), x.stride(0), 1], [1, keys, _padded(x.shape[2])])

    full = describe(k, tiles.keys), describe(v, tiles.keys)
    if tiles.keys == tiles.edge:
        return (*full, None, None)
    return (*full, describe(k, tiles.edge), describe(v, tiles.edge))


def _queries(x: Tensor, tokens: int, group: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [tokens, group, _padded(x.shape[2])])


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()
