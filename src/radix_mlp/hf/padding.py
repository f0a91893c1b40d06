"""Reading an attention mask: where the tokens of a padded batch stand."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["row_with_holes", "tokens_of_mask"]


def tokens_of_mask(present: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`[B, T]` bool -> places `[N]` of the tokens in the flattened `[B * T]`, and offsets `[B + 1]` of the rows in `N`.

    >>> [array.tolist() for array in tokens_of_mask(np.array([[False, True, True], [True, False, False]]))]
    [[1, 2, 3], [0, 2, 3]]
    """
    return np.flatnonzero(present), np.concatenate(([0], np.cumsum(present.sum(1))))


def row_with_holes(present: NDArray[np.bool_]) -> int | None:
    """The first row whose tokens `[B, T]` have padding between them, or None.

    >>> row_with_holes(np.array([[False, True, True], [True, False, True]]))
    1
    """
    lengths = present.sum(1)
    spans = np.where(lengths > 0, present.shape[1] - present[:, ::-1].argmax(1) - present.argmax(1), 0)
    rows = np.flatnonzero(spans != lengths)
    return int(rows[0]) if len(rows) else None
