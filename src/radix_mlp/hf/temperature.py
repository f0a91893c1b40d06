"""Llama 4's attention temperature: queries of layers without rotary positions grow with the number of their token.

The model takes the number of the row in its input for it, which in a sequence alone is the token's depth and on compact
rows is not: those rows get the scale of their depth instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from radix_mlp.ops import AttentionTree

__all__ = ["scales_by_row", "with_scale_of_depth"]


def scales_by_row(module: Any) -> bool:
    """Whether this attention scales queries by the numbers of their rows."""
    return bool(getattr(module, "attn_temperature_tuning", False)) and not getattr(module, "use_rope", True)


def with_scale_of_depth(module: Any, query: Tensor, tree: AttentionTree) -> Tensor:
    """`[1, Hq, M, D]` as `module` scaled it by row -> the same scaled by depth; unchanged for other attention.

    >>> from types import SimpleNamespace
    >>> module = SimpleNamespace(attn_temperature_tuning=True, use_rope=False, floor_scale=2, attn_scale=1.0)
    >>> tree = AttentionTree.from_end(torch.tensor([1, 2]), torch.tensor([0, 0]))
    >>> scaled_by_row = torch.ones(1, 1, 2, 1) * _scale(module, torch.arange(2))[:, None]
    >>> with_scale_of_depth(module, scaled_by_row, tree).flatten()
    tensor([1., 1.])
    """
    if not scales_by_row(module):
        return query
    rows = torch.arange(query.shape[2], device=query.device)
    # 1 where both are the same, so that those rows stay as they are
    ratio = _scale(module, tree.depth).double() / _scale(module, rows).double()
    wide = torch.promote_types(query.dtype, torch.float32)
    return (query.to(wide) * ratio[:, None].to(wide)).to(query.dtype)


def _scale(module: Any, position: Tensor) -> Tensor:
    """`[M]` float32, as `Llama4TextAttention` computes it."""
    return torch.log1p(torch.floor((position.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0
