"""The cost model by which `impl="auto"` chooses on CUDA: the tree kernel, FlashAttention on leaf paths, or, if it is
installed, FlashAttention-4 with the tree as its mask.

The model counts arithmetic, memory traffic and launches from the statistics of the tree, which are made once per batch:

  triton   pairs of the tree, and for every row half a tile of rows and one masked block of keys it cannot see
  varlen   pairs in FlashAttention's tiles, which never hold rows of two leaf paths; gathered keys and values, unless
           nothing is shared; backward also the sums of the copies, and one gradient of the keys for every query head

each over its measured rate, but no less than its longest tile takes by itself; and rows of q, the output and their
gradients, read or written once.  The forward and the backward pass are chosen apart, since both save the same things.

On a chip without measurements, the tree kernel runs, or `varlen` if nothing is shared: that is then plain packed
FlashAttention, as a model without this package runs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import torch

from radix_mlp.errors import InvalidInputError
from radix_mlp.ops.attention.attention_call import CallKind
from radix_mlp.ops.attention.impl import fa4, varlen
from radix_mlp.ops.attention.impl.fa4_blocks import BLOCK, pack_sparse_blocks
from radix_mlp.ops.attention.impl.leaf_paths import TreeStatistics, shares, tree_statistics
from radix_mlp.ops.attention.impl.torch_flash import MAX_ELEMENTS
from radix_mlp.plan.radix_plan import RadixPlan

__all__ = ["CHIPS", "Call", "Chip", "Choice", "choose", "device_facts", "report"]


class Call(NamedTuple):
    """One call of attention, except its tree."""

    heads: int
    kv_heads: int
    kind: CallKind
    backward: bool = False
    has_paths: bool = True
    """Whether the tree came with its leaf paths: they are made for `impl="varlen"`, and where nothing is shared."""
    blocks: tuple[int, int] | None = None
    """Where FlashAttention-4 is there: pairs of blocks of `fa4_blocks` that need the mask, and that need none."""


class Chip(NamedTuple):
    """Rates that a chip was measured at; arithmetic for head dimension 128 in bf16."""

    multiprocessors: int
    """Tiles that run at once, for the time of the longest."""
    triton: tuple[float, float]
    """TFLOP/s of the tree kernel, forward and backward, all pairs of its tiles counted."""
    flash: tuple[float, float]
    """TFLOP/s of torch's FlashAttention, forward and backward, all pairs of its tiles counted."""
    fa4: tuple[float, float]
    """TFLOP/s of FlashAttention-4 in blocks without a mask, forward and backward."""
    masked: tuple[float, float]
    """Cost of a masked block relative to an unmasked one, forward and backward."""
    gather: float
    """GB/s of copying and summing rows, bytes read and bytes written."""
    launch: float
    """Microseconds from one kernel to the next, with its ramp up and down."""


CHIPS: dict[str, Chip] = {
    # one NVIDIA H200, torch 2.11, Triton 3.6, bf16, 32 and 8 heads of 128: fitted to benchmarks/impls.py --backward of
    # 2026-11-22; nine batches, forward and backward, are met within 28%, those above 0.5 ms within 11%; eleven by fa4
    # within 25%
    "NVIDIA H200": Chip(
        132,
        triton=(585.0, 460.0),
        flash=(365.0, 305.0),
        fa4=(700.0, 640.0),
        masked=(1.7, 1.4),
        gather=2600.0,
        launch=10.0,
    ),
}

_FLOPS = (4, 10)
_TILE_ROWS = 128
_EDGE_KEYS = 64


class Choice(NamedTuple):
    """What runs and why."""

    impl: str
    milliseconds: float
    """Estimate for one layer; NaN where nothing was measured."""
    reasons: tuple[str, ...]


@lru_cache(maxsize=256)
def choose(statistics: TreeStatistics, call: Call, chip: str) -> Choice:
    """The implementation for a tree, a call and a chip (its name as CUDA gives it).

    >>> from radix_mlp.plan import build_plan
    >>> plan = build_plan([1, 2, 3, 1, 2, 4], [0, 3, 6])
    >>> call = Call(32, 8, CallKind("cuda", sinks=True))
    >>> choose(tree_statistics(plan.end, plan.depth), call, "NVIDIA H200").impl
    'triton'
    """
    refusal = _why_not_varlen(statistics, call)
    able = ("triton",) if refusal else ("triton", "varlen")
    rates = CHIPS.get(chip)
    if rates is not None and call.blocks is not None and fa4.refuses(call.kind) is None:
        able = (*able, "fa4")
    costs = {name: _COSTS[name](statistics, call, rates) if rates else math.nan for name in able}
    reasons = [f"{name} takes about {_show(costs[name])}" for name in sorted(able, key=costs.__getitem__) if rates]
    if rates is None:
        reasons.append(f"nothing was measured on {chip}")
    if refusal:
        reasons.append(f"varlen {refusal}")
    impl = min(able, key=costs.__getitem__) if rates else "triton"
    if rates is None and not shares(statistics):
        reasons.append("nothing is shared")
        impl = "triton" if refusal else "varlen"
    return Choice(impl, costs[impl], tuple(reasons))


def report(
    plan: RadixPlan,
    *,
    heads: int,
    kv_heads: int,
    width: int,
    value_width: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    window: int | None = None,
    plain: bool = True,
    chip: str | None = None,
    with_fa4: bool | None = None,
) -> str:
    """What `impl="auto"` would run for a plan on CUDA and why, as text; nothing runs.

    Args:
        plan: of the batch.
        heads: query heads.
        kv_heads: key and value heads.
        width: head dimension of queries and keys.
        value_width: that of values, if another.
        dtype: of q, k and v.
        window: keys that a query sees at most.
        plain: False with a soft cap or sinks.
        chip: name of the GPU as CUDA gives it; that of the current device if None.
        with_fa4: whether FlashAttention-4 may be chosen; None asks whether it is installed and the GPU runs it.

    Examples:
        >>> from radix_mlp.plan import build_plan
        >>> plan = build_plan([1, 2, 3, 1, 2, 4], [0, 3, 6])
        >>> print(report(plan, heads=8, kv_heads=2, width=64, chip="NVIDIA H200").splitlines()[0])
        6 tokens in 2 sequences -> 4 rows, compression 0.667
    """
    capability = None
    if chip is None:
        if not torch.cuda.is_available():
            raise InvalidInputError("chip=None and there is no CUDA device: pass its name, as in chip='NVIDIA H200'")
        chip, capability = device_facts(torch.cuda.current_device())
        if with_fa4 is None:
            with_fa4 = fa4.why_not(CallKind("cuda", capability=capability)) is None
    known = tree_statistics(plan.end, plan.depth)
    padding = plan.num_rows - plan.num_compact
    tree_pairs = _tree_pairs(known, heads, kv_heads)
    gathered = known.num_gathered if shares(known) else 0
    lines = [
        f"{plan.num_tokens} tokens in {plan.num_sequences} sequences -> {plan.num_compact} rows"
        f"{f' and {padding} of padding' if padding else ''}, compression {plan.compression:.3f}",
        f"{known.num_paths} paths to leaves, of up to {known.longest_path} tokens and {known.most_own_rows} rows of "
        "their own",
        f"{known.pairs} visible pairs: {tree_pairs} in the tiles of the tree kernel, {known.flash_pairs} in those of "
        f"FlashAttention, with {gathered} keys to gather",
    ]
    blocks = None
    if with_fa4:
        sizes = pack_sparse_blocks(plan.end)[1]
        blocks = sizes.num_masked, sizes.num_full
        lines.append(
            f"{sizes.num_masked} pairs of blocks with the mask and {sizes.num_full} without it for FlashAttention-4"
        )
    # what is not plain may be any of the two: what refuses one refuses both
    kind = CallKind(
        "cuda", dtype, width, value_width or width, window=window, softcap=not plain, sinks=not plain,
        capability=capability,
    )  # fmt: skip
    for backward in (False, True):
        impl, _, reasons = choose(known, Call(heads, kv_heads, kind, backward, not shares(known), blocks), chip)
        lines.append(f"{'backward' if backward else 'forward'} on {chip}: {impl}: {'; '.join(reasons)}")
    return "\n".join(lines)


@cache
def device_facts(index: int) -> tuple[str, tuple[int, int]]:
    """Name of a CUDA device and its compute capability."""
    return torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)


def _why_not_varlen(statistics: TreeStatistics, call: Call) -> str | None:
    if not call.has_paths:
        return "needs lists of leaf paths, made where nothing is shared"
    if call.backward and statistics.num_gathered * call.heads * call.kind.width >= MAX_ELEMENTS:
        return f"cannot go back through {statistics.num_gathered} keys of {call.heads} heads"
    return varlen.why_not(call.kind)


def _triton(statistics: TreeStatistics, call: Call, chip: Chip) -> float:
    """Milliseconds of the tree kernel."""
    pairs = _tree_pairs(statistics, call.heads, call.kv_heads) * _seen(statistics, call)
    # dq, dk with dv, and the sums of what was cut
    launches = 3 if call.backward else 1
    memory = _rows_bytes(statistics, call) / chip.gather / 1e6
    return launches * chip.launch / 1e3 + memory + _arithmetic(pairs, statistics, call, chip, chip.triton)


def _varlen(statistics: TreeStatistics, call: Call, chip: Chip) -> float:
    """Milliseconds of FlashAttention on runs."""
    pairs = statistics.flash_pairs * _seen(statistics, call)
    # the backward of torch's kernels: sums of out and its gradient, the gradients, dq in half precision, dk and dv
    launches = 4 if call.backward else 1
    row = call.kind.width * call.kind.dtype.itemsize
    bytes_moved = _rows_bytes(statistics, call)
    if shares(statistics):
        launches += 2 if call.backward else 1
        read_or_written = statistics.num_gathered + statistics.num_rows
        bytes_moved += (2 if call.backward else 1) * 2 * call.kv_heads * row * read_or_written
    if call.backward and call.heads != call.kv_heads:
        # written for every query head, then read and summed over those of one kv head
        bytes_moved += statistics.num_gathered * row * 2 * (2 * call.heads + call.kv_heads)
    memory = bytes_moved / chip.gather / 1e6
    return launches * chip.launch / 1e3 + memory + _arithmetic(pairs, statistics, call, chip, chip.flash)


def _fa4(statistics: TreeStatistics, call: Call, chip: Chip) -> float:
    """Milliseconds of FlashAttention-4."""
    masked, full = call.blocks or (0, 0)
    pairs = BLOCK * BLOCK * (full + masked * chip.masked[call.backward])
    bytes_moved = _rows_bytes(statistics, call)
    # sums of out and its gradient, the gradients, and what was summed in float32 to half precision
    launches = 5 if call.backward else 1
    if call.backward:
        # set to zero and read: for dq, and for dk and dv where a group has several heads
        summed = call.heads + (2 * call.kv_heads if call.heads != call.kv_heads else 0)
        bytes_moved += 2 * 4 * statistics.num_rows * summed * call.kind.width
    memory = bytes_moved / chip.gather / 1e6
    return launches * chip.launch / 1e3 + memory + _arithmetic(pairs, statistics, call, chip, chip.fa4)


_COSTS: dict[str, Callable[[TreeStatistics, Call, Chip], float]] = {
    "triton": _triton,
    "varlen": _varlen,
    "fa4": _fa4,
}


def _tree_pairs(statistics: TreeStatistics, heads: int, kv_heads: int) -> int:
    tokens = max(1, _TILE_ROWS // (heads // kv_heads))
    return statistics.pairs + statistics.num_rows * (tokens // 2 + _EDGE_KEYS)


def _rows_bytes(statistics: TreeStatistics, call: Call) -> int:
    """q and the output; backward their gradients too."""
    tensors = 4 if call.backward else 2
    return tensors * statistics.num_rows * call.heads * call.kind.width * call.kind.dtype.itemsize


def _seen(statistics: TreeStatistics, call: Call) -> float:
    """The share of pairs that a window leaves."""
    if call.kind.window is None or statistics.pairs == 0:
        return 1.0
    return min(1.0, statistics.num_rows * (call.kind.window + _EDGE_KEYS) / statistics.pairs)


def _arithmetic(pairs: float, statistics: TreeStatistics, call: Call, chip: Chip, rates: tuple[float, float]) -> float:
    """Milliseconds of `pairs` in every head, no less than one tile with the longest path needs on its own."""
    flops = _FLOPS[call.backward] * (call.kind.width + call.kind.value_width) / 2
    rate = rates[call.backward] * 1e9
    longest = min(statistics.longest_path, (call.kind.window or statistics.longest_path) + _TILE_ROWS)
    alone = flops * _TILE_ROWS * longest / (rate / chip.multiprocessors)
    return max(flops * call.heads * pairs / rate, alone)


def _show(milliseconds: float) -> str:
    return f"{milliseconds:.3f} ms" if milliseconds >= 0.1 else f"{1e3 * milliseconds:.1f} us"
