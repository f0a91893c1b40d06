"""Parents and depths, computed from `end`. Numba is imported on first use."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from radix_mlp.plan.read_only import read_only

__all__ = ["depths", "parents"]


def parents(end: NDArray[np.int32], num_compact: int) -> NDArray[np.int32]:
    """`[M]` parent row of every row, -1 for roots and padding."""
    from radix_mlp.plan import kernels

    return kernels.parents(read_only(end), num_compact)


def depths(end: NDArray[np.int32], num_compact: int) -> NDArray[np.int32]:
    """`[M]` number of ancestors of every row, 0 for padding."""
    from radix_mlp.plan import kernels

    return kernels.depths(read_only(parents(end, num_compact)), num_compact)
