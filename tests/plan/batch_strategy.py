"""Hypothesis strategies of batches."""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from tools.model_types.batches import random_batch

__all__ = ["Batch", "batches"]


class Batch(NamedTuple):
    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    cu: NDArray[np.int64]


@st.composite
def batches(draw: st.DrawFn, *, own_positions: bool = True) -> Batch:
    """Trees of many shapes: deep and wide, with copies, chains and empty sequences; positions counted or arbitrary."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids, cu = random_batch(
        rng,
        num_sequences=draw(st.integers(0, 24)),
        vocab_size=draw(st.sampled_from([1, 2, 3, 50, 2**31])),
        # past the widths at which stretches are compared at once
        max_length=draw(st.sampled_from([1, 4, 12, 40, 150])),
        branch=draw(st.floats(0, 1)),
        duplicate=draw(st.floats(0, 0.5)),
        empty=draw(st.floats(0, 0.5)),
    )
    positions = np.arange(len(ids)) - np.repeat(cu[:-1], np.diff(cu))
    kind = draw(st.sampled_from(["counted", "offset", "two", "any"])) if own_positions else "counted"
    if kind == "offset":
        positions += np.repeat(rng.integers(0, 2, len(cu) - 1), np.diff(cu))
    elif kind == "two":
        positions = rng.integers(0, 2, len(ids))
    elif kind == "any":
        positions = np.where(rng.random(len(ids)) < 0.95, positions * 7, rng.integers(0, 2**31, len(ids)))
    return Batch(ids, positions, cu)
