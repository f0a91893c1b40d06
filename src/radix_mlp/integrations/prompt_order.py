"""The order in which prompts are cut into padded batches to generate from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["prompt_order"]


def prompt_order(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Places of the prompts, those that share half of their tokens together and else the longest first.

    A group of prompts with one beginning is ordered by length too, so that little of a batch is padding.

    Examples:
        >>> prompt_order([[1, 2, 3], [7, 8, 9, 9, 9], [1, 2, 3, 4], [7, 8, 9]])
        [1, 3, 2, 0]
        >>> prompt_order([[1], [2, 2], [3, 3, 3]])
        [2, 1, 0]
    """
    arrays = [np.asarray(prompt, np.int64) for prompt in prompts]
    groups: list[list[int]] = []
    for place in sorted(range(len(prompts)), key=lambda place: arrays[place].tolist()):
        if groups and _share_half(arrays[groups[-1][-1]], arrays[place]):
            groups[-1].append(place)
        else:
            groups.append([place])
    for group in groups:
        group.sort(key=lambda place: -len(arrays[place]))
    groups.sort(key=lambda group: -len(arrays[group[0]]))
    return [place for group in groups for place in group]


def _share_half(one: NDArray[np.int64], other: NDArray[np.int64]) -> bool:
    length = min(len(one), len(other))
    half = (length + 1) // 2
    return length > 0 and bool((one[:half] == other[:half]).all())
