"""What CUDA graphs ask of a forward on compact rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from radix_mlp.ops import AttentionTree
from radix_mlp.plan import RadixPlan

__all__ = ["Decoder", "HeadShape", "difference", "spread"]

MAX_DIFFERENCE = 0.1


class HeadShape(NamedTuple):
    """The heads of a layer's attention."""

    width: int
    """Elements of a head."""
    heads: int
    kv_heads: int
    dtype: torch.dtype


class Decoder:
    """A trunk's forward pass on compact rows.

    Args:
        trunk: the model without its output head.
        impl: the way to run attention.
        shape: of its attention.
        windows: those that layers have; None among them: some see all.
        layer_weights: elements of a layer's weights, which tell how long it takes.
    """

    reads_needed_rows = True
    """Whether rows that nobody needs cost less."""
    is_foreign = False
    """Whether it runs code that was not written for graphs: each graph is compared with a plain pass once."""

    def __init__(
        self,
        trunk: PreTrainedModel,
        *,
        impl: str,
        shape: HeadShape,
        windows: tuple[int | None, ...],
        layer_weights: int,
    ) -> None:
        self.trunk: Any = trunk
        self.impl = impl
        self.shape = shape
        self.windows = windows
        self.layer_weights = layer_weights

    def is_current(self) -> bool:
        """Whether the model still has the modules and parameters that this was made from."""
        raise NotImplementedError

    def __call__(self, plan: RadixPlan, needed_rows: NDArray[np.int64] | None = None) -> Tensor:
        """Hidden states `[M, h]` after the final norm; rows outside `needed_rows` `[R]` may be NaN."""
        raise NotImplementedError

    def run(self, ids: Tensor, positions: Tensor, tree: AttentionTree, rows: Tensor | None, impl: str) -> Tensor:
        """`ids [M]`, `positions [M]` -> hidden states of all rows `[M, h]`, or of `rows [R]` alone `[R, h]`."""
        raise NotImplementedError

    def why_not_captured(self, plan: RadixPlan) -> str | None:
        """Why a forward pass cannot be captured, or None if it can."""
        return None


def spread(hidden: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """`hidden [R, h]` in its places among `[M, h]`, the rest NaN so that reading it shows."""
    whole = hidden.new_full((num_rows, hidden.shape[1]), torch.nan)
    return whole.index_copy_(0, rows, hidden[: len(rows)])


def difference(found: Tensor, expected: Tensor) -> str | None:
    """How far hidden states `[M, h]` of one batch are apart if that is more than rounding, or None.

    Half precision is a hundredth off after many layers; anything wrong is off by about the whole.

    Examples:
        >>> expected = torch.eye(3)
        >>> difference(expected * 1.01, expected)
        >>> difference(expected.roll(1, 0), expected)
        'off by 1'
    """
    off = float((found.float() - expected.float()).norm() / expected.float().norm())
    return None if off < MAX_DIFFERENCE else f"off by {off:.1g}"
