"""torch's FlexAttention with the tree as its mask, for benchmarks/attention.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from radix_mlp.ops.attention.impl.fa4_blocks import BLOCK, sparse_blocks
from radix_mlp.plan import RadixPlan

__all__ = ["flex_attention_of"]


def flex_attention_of(plan: RadixPlan, backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`[M, Hq, D]`, `[M, Hkv, D]` twice -> `[M, Hq, D]`; the blocks of the mask are found once, by our lists."""
    lists = sparse_blocks(plan.end)
    assert lists is not None
    end = torch.tensor(plan.end, device="cuda")
    tables = (lists.forward_masked, lists.forward_full)
    counts_and_blocks = [
        x for count, table in zip(lists.forward_counts, tables, strict=True) for x in (count[None, None], wide(table))
    ]
    mask = BlockMask.from_kv_blocks(
        *(torch.tensor(x, device="cuda") for x in counts_and_blocks),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda batch, head, query, key: (key <= query) & (query < end[key]),
        seq_lengths=(len(plan.end), len(plan.end)),
    )
    options: Any = {"BACKEND": backend}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out: Any = compiled()(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1], kernel_options=options)
        return out[0].transpose(0, 1)

    return run


def wide(table: NDArray[np.int32]) -> NDArray[np.int32]:
    """`[T, W] -> [1, 1, T, T]`, as FlexAttention wants it."""
    return np.pad(table, ((0, 0), (0, max(0, len(table) - table.shape[1]))))[None, None]


@cache
def compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)
