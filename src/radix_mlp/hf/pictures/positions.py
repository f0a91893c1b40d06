"""Positions with several axes, as the classes make them of texts and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["axes_of", "has_axes", "numbered"]


def has_axes(trunk: Any) -> bool:
    """Whether a class makes positions of where its pictures stand."""
    return hasattr(trunk, "get_rope_index")


def axes_of(trunk: Any, shows: Sequence[NDArray[np.bool_]], grids: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """`[3, N]` positions of sequences one after the other.

    The class is asked once for each beginning up to the last picture; what follows counts up by one.

    Args:
        trunk: of a class that `has_axes`.
        shows: for each sequence `[n]`, which of its tokens stand for pictures.
        grids: for each sequence `[k, 3]`, those of its pictures.
    """
    known: dict[tuple[bytes, bytes], NDArray[np.int64]] = {}
    found = [np.zeros((3, 0), np.int64)]
    for is_shown, grid in zip(shows, grids, strict=True):
        length = len(is_shown)
        # up to the first token after the last picture
        stop = length - int(is_shown[::-1].argmax()) + 1 if len(grid) else 0
        if not stop:
            found.append(np.broadcast_to(np.arange(length), (3, length)))
            continue
        types = np.append(is_shown, False)[:stop]
        key = (types.tobytes(), grid.tobytes())
        if key not in known:
            given = torch.from_numpy(types.astype(np.int64))[None]
            positions, _ = trunk.get_rope_index(
                torch.zeros_like(given), mm_token_type_ids=given, image_grid_thw=torch.from_numpy(grid)
            )
            known[key] = positions[:, 0].numpy()
        head = known[key]
        tail = head[:, -1:] + np.arange(1, max(length - stop, 0) + 1)
        found.append(np.concatenate((head, tail), axis=1)[:, :length])
    return np.concatenate(found, axis=1)


def numbered(axes: NDArray[np.int64]) -> NDArray[np.int64]:
    """`[N]` equal numbers, below 2**31, where all `[A, N]` are equal.

    >>> numbered(np.array([[0, 1, 1, 1], [0, 1, 2, 1], [0, 1, 1, 1]])).tolist()
    [0, 2, 3, 2]
    """
    # the axes of a picture stay near the first one
    parts = [axes[0], *(axis - axes[0] for axis in axes[1:])]
    parts = [part - part.min(initial=0) for part in parts]
    widths = [int(part.max(initial=0)) + 1 for part in parts]
    found, size = parts[0], widths[0]
    for part, width in zip(parts[1:], widths[1:], strict=True):
        if size * width >= 2**31:
            values, found = np.unique(found, return_inverse=True)
            size = len(values)
        found, size = found * width + part, size * width
    return np.unique(found, return_inverse=True)[1] if size >= 2**31 else found
