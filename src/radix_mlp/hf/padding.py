"""`PaddedLayout`: where the tokens of a padded or packed batch stand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radix_mlp.errors import InvalidInputError

__all__ = ["PaddedLayout", "row_with_holes"]


@dataclass(frozen=True, eq=False)
class PaddedLayout:
    """Where the `N` tokens stand in the caller's `[B, T]`.

    Examples:
        >>> layout, offsets = PaddedLayout.of_mask(np.array([[False, True, True], [True, False, False]]))
        >>> layout.token_index.tolist(), offsets.tolist()
        ([1, 2, 3], [0, 2, 3])
        >>> layout.pad(torch.tensor([7, 8, 9])).tolist()
        [[0, 7, 8], [9, 0, 0]]
    """

    shape: tuple[int, int]
    """`(B, T)`"""
    token_index: NDArray[np.int64]
    """`[N]` place of every token in the flattened `[B * T]`; ascending."""

    @classmethod
    def of_mask(cls, present: NDArray[np.bool_]) -> tuple[PaddedLayout, NDArray[np.int64]]:
        """The layout of the tokens that are `present` `[B, T]`, and the offsets `[B + 1]` of the rows among them."""
        layout = cls((present.shape[0], present.shape[1]), np.flatnonzero(present))
        return layout, np.concatenate(([0], np.cumsum(present.sum(1))))

    @property
    def is_padded(self) -> bool:
        """Whether some places hold no token."""
        return len(self.token_index) < self.shape[0] * self.shape[1]

    @property
    def present(self) -> NDArray[np.bool_]:
        """`[B, T]`, where a token stands."""
        found = np.zeros(self.shape[0] * self.shape[1], bool)
        found[self.token_index] = True
        return found.reshape(self.shape)

    def pack(self, values: Tensor) -> Tensor:
        """`[B, T, ...] -> [N, ...]`"""
        if tuple(values.shape[:2]) != self.shape:
            raise InvalidInputError(f"values is {tuple(values.shape)}: the batch is {self.shape}, [B, T]")
        return values.flatten(0, 1).index_select(0, torch.from_numpy(self.token_index).to(values.device))

    def pad(self, values: Tensor) -> Tensor:
        """`[N, ...] -> [B, T, ...]`, 0 at padding. Differentiable."""
        flat = values.new_zeros(self.shape[0] * self.shape[1], *values.shape[1:])
        flat = flat.index_copy(0, torch.from_numpy(self.token_index).to(values.device), values)
        return flat.view(*self.shape, *values.shape[1:])


def row_with_holes(present: NDArray[np.bool_]) -> int | None:
    """The first row whose tokens `[B, T]` have padding between them, or None.

    >>> row_with_holes(np.array([[False, True, True], [True, False, True]]))
    1
    """
    lengths = present.sum(1)
    spans = np.where(lengths > 0, present.shape[1] - present[:, ::-1].argmax(1) - present.argmax(1), 0)
    rows = np.flatnonzero(spans != lengths)
    return int(rows[0]) if len(rows) else None
