"""Tensors in, kernels launched, tensors out: `triton_forward` and `triton_backward`."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from radix_mlp.ops.attention.impl.triton_fast_launch import evenly_laid, launch
from radix_mlp.ops.attention.impl.triton_tables import KEY_BLOCK, ORDER_ROWS, TableSizes, pack_tables, places
from radix_mlp.ops.attention.impl.triton_tiles import Tiles, Work, choose_tiles
from radix_mlp.ops.cuda_device import on_device

__all__ = ["TritonBlocks", "triton_backward", "triton_forward"]

_LOG2_E = 1.4426950408889634


class TritonBlocks(NamedTuple):
    """`RangeTree` and `BackwardItems` in one vector, int32 on one device, and how long they are."""

    tables: Tensor
    sizes: TableSizes

    @classmethod
    def make(cls, end: Tensor, depth: Tensor, window: int | None = None) -> TritonBlocks:
        """Tables of the tree `end`, `depth` (`[M]`), on their device; copies to the host unless they lie there.

        A window only makes the backward faster: tables made for one window are right for every other that is
        not longer, tables made without a window for all.
        """
        host_end, host_depth = (x.to("cpu", torch.int32).numpy() for x in (end, depth))
        tables, sizes = pack_tables(host_end, host_depth, window)
        return cls(torch.from_numpy(tables).to(end.device), sizes)


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
    span_end: Tensor | None = None,
    mean_keys: float | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Tree attention of `[M, Hq, D]`, `[M, Hkv, D]`, `[M, Hkv, Dv]`, any strides.

    `mean_keys` is how many keys a row sees on average, for the choice of tiles; None if unknown.

    Returns:
        out `[M, Hq, Dv]` in q's dtype, contiguous; lse `[Hq, M]` float32, natural logarithm, sinks included.
    """
    q, k, v = _rows_dense(q), _rows_dense(k), _rows_dense(v)
    sinks = None if sinks is None else sinks.contiguous()
    num_rows, heads, width = q.shape
    kv_heads, value_width = v.shape[1:]
    out = q.new_empty(num_rows, heads, value_width)
    lse = q.new_empty(heads, num_rows, dtype=torch.float32)
    if num_rows == 0:
        return out, lse
    from radix_mlp.ops.attention.impl.triton_forward import forward_kernel

    group = heads // kv_heads
    tiles = tiles or choose_tiles(
        "forward", q.device, q.dtype, max(width, value_width), group, Work(num_rows * kv_heads * group, mean_keys)
    )
    tokens = tiles.rows // group
    even = evenly_laid(q, k, v)
    tma = tiles.tma and ((even and q.is_cuda) or _tma_fits(k, v))
    flags = (window is not None, softcap is not None, span_end is not None)
    kind = (q.dtype, width, value_width, group, tiles, *flags, tma)
    options, hint = _forward_options(*kind, sinks is not None), None
    if even and (sinks is None or sinks.data_ptr() % 16 == 0):
        hint = ("forward", q.device.index, kv_heads, None if sinks is None else sinks.dtype, *kind)
    arguments = (
        q, *_keys(k, v, tiles, tma), q if sinks is None else sinks, out, lse,
        end, depth, end if span_end is None else span_end, blocks.tables,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        num_rows, blocks.sizes.num_ranges, kv_heads, *_scales(scale, softcap), window or 0,
    )  # fmt: skip
    with on_device(q.device):
        launch(forward_kernel, _num_tiles(num_rows, tokens) * kv_heads, arguments, options, hint)
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
    span_end: Tensor | None = None,
    mean_keys: float | None = None,
    tiles: tuple[Tiles, Tiles] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `triton_forward`: dq `[M, Hq, D]`, dk `[M, Hkv, D]`, dv `[M, Hkv, Dv]`, dsinks `[Hq]` or None.

    `out` and `lse` are what `triton_forward` returned. Bit for bit the same on every call.
    """
    q, k, v, dout = _rows_dense(q), _rows_dense(k), _rows_dense(v), _rows_dense(dout)
    num_rows, heads, width = q.shape
    kv_heads, value_width = v.shape[1:]
    dq = q.new_empty(q.shape)
    dk = k.new_empty(k.shape)
    dv = v.new_empty(v.shape)
    if num_rows == 0:
        return dq, dk, dv, None if sinks is None else torch.zeros_like(sinks)
    from radix_mlp.ops.attention.impl.triton_backward import dkdv_kernel, dq_kernel, sum_kernel

    group = heads // kv_heads
    widest = max(width, value_width)
    work = Work(num_rows * heads, mean_keys)
    dq_tiles, dkdv_tiles = tiles or (
        choose_tiles("dq", q.device, q.dtype, widest, group, work),
        choose_tiles("dkdv", q.device, q.dtype, widest, group, work),
    )
    delta = torch.empty_like(lse)
    scales = (scale, *_scales(scale, softcap))
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *dout.stride()[:2])
    shared = (q.dtype, width, value_width, group)
    flags = (window is not None, softcap is not None, span_end is not None)
    spans = (end, end) if span_end is None else (span_end, _span_starts(span_end))
    even = evenly_laid(q, k, v, dout, out) and lse.data_ptr() % 16 == 0
    hint = (q.device.index, kv_heads) if even else None
    at = places(num_rows, *blocks.sizes[:3])
    with on_device(q.device):
        tokens = dq_tiles.rows // group
        tma = dq_tiles.tma and ((even and q.is_cuda) or _tma_fits(k, v))
        kind = (*shared, dq_tiles, *flags, tma)
        arguments = (
            q, *_keys(k, v, dq_tiles, tma), out, dout, lse, delta, dq, end, depth, spans[0], blocks.tables,
            *strides, num_rows, blocks.sizes.num_ranges, kv_heads, *scales, window or 0,
        )  # fmt: skip
        programs = _num_tiles(num_rows, tokens) * kv_heads
        launch(dq_kernel, programs, arguments, _dq_options(*kind), hint and ("dq", *hint, *kind))

        tokens = dkdv_tiles.rows // group
        tma = dkdv_tiles.tma and dkdv_tiles.rows % group == 0 and _power_of_two(group)
        tma = tma and ((even and q.is_cuda) or _tma_fits(q, dout))
        query, grad = (_queries(x, tokens, group) for x in (q, dout)) if tma else (q, dout)
        shape = (blocks.sizes.num_slots, kv_heads, KEY_BLOCK)
        partial_dk = lse.new_empty(*shape, width)
        partial_dv = lse.new_empty(*shape, value_width)
        kind = (*shared, dkdv_tiles, *flags, tma)
        arguments = (
            query, k, v, grad, lse, delta, dk, dv, partial_dk, partial_dv, end, depth, *spans, blocks.tables,
            *strides, num_rows, at.items, at.blocks, kv_heads, *scales, window or 0,
        )  # fmt: skip
        programs = blocks.sizes.num_items * kv_heads * (KEY_BLOCK // dkdv_tiles.keys)
        launch(dkdv_kernel, programs, arguments, _dkdv_options(*kind), hint and ("dkdv", *hint, *kind))
        if blocks.sizes.num_splits:
            options = _sum_options(width, value_width)
            arguments = (
                partial_dk,
                partial_dv,
                dk,
                dv,
                blocks.tables,
                at.splits,
                blocks.sizes.num_splits,
                num_rows,
                kv_heads,
            )
            programs = 2 * blocks.sizes.num_splits * kv_heads * (KEY_BLOCK // options["BLOCK_N"])
            launch(sum_kernel, programs, arguments, options, hint and ("sum", *hint, q.dtype, width, value_width))
    if sinks is None:
        return dq, dk, dv, None
    # the sink's share of the softmax, times what its missing value contributes to delta
    dsinks = -(torch.exp(sinks.float()[:, None] - lse) * delta).sum(1)
    return dq, dk, dv, dsinks.to(sinks.dtype)


@cache
def _options(
    dtype: torch.dtype, width: int, value_width: int, group: int, tiles: Tiles, *flags: bool
) -> dict[str, Any]:
    """Compile-time arguments that all kernels share."""
    window, cap, spans, tma = flags
    return {
        "G": group,
        "D": width,
        "DV": value_width,
        "BLOCK_D": _padded(width),
        "BLOCK_DV": _padded(value_width),
        "T": tiles.rows // group,
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.keys,
        "HAS_WINDOW": window,
        "HAS_CAP": cap,
        "HAS_SPANS": spans,
        "TMA": tma,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "STAGES": tiles.stages,
        "STAGES_E": tiles.edge_stages,
        "num_warps": tiles.warps,
    }


@cache
def _forward_options(*kind: Any) -> dict[str, Any]:
    *shared, sinks = kind
    tiles: Tiles = shared[4]
    return {
        **_options(*shared), "BLOCK_E": tiles.edge, "ORDER_ROWS": ORDER_ROWS, "HAS_SINKS": sinks
    }  # fmt: skip


@cache
def _dq_options(*kind: Any) -> dict[str, Any]:
    tiles: Tiles = kind[4]
    return {**_options(*kind), "BLOCK_E": tiles.edge, "ORDER_ROWS": ORDER_ROWS}


@cache
def _dkdv_options(*kind: Any) -> dict[str, Any]:
    return {**_options(*kind), "KEY_BLOCK": KEY_BLOCK}


@cache
def _sum_options(width: int, value_width: int) -> dict[str, Any]:
    padded = {"BLOCK_D": _padded(width), "BLOCK_DV": _padded(value_width)}
    return {"D": width, "DV": value_width, **padded, "BLOCK_N": 16, "KEY_BLOCK": KEY_BLOCK}


def _scales(scale: float, softcap: float | None) -> tuple[float, float]:
    """`scale_log2` and `cap_log2` as `triton_walk.scores` reads them."""
    if softcap is None:
        return scale * _LOG2_E, 0.0
    return 2.0 * _LOG2_E * scale / softcap, softcap * _LOG2_E


def _span_starts(span_end: Tensor) -> Tensor:
    """`[M]` int32: the first row of the row's span."""
    rows = torch.arange(len(span_end), device=span_end.device, dtype=torch.int32)
    return torch.searchsorted(span_end, rows, right=True, out_int32=True)


def _num_tiles(num_rows: int, tokens: int) -> int:
    if ORDER_ROWS % tokens:
        return -(-num_rows // tokens)
    return -(-num_rows // ORDER_ROWS) * (ORDER_ROWS // tokens)


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
