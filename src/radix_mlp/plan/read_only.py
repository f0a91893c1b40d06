"""Arrays in the form that the compiled loops expect."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["read_only"]


def read_only(array: NDArray[np.int32]) -> NDArray[np.int32]:
    """A dense read-only int32 view or copy. Numba compiles a loop per kind of array, and a plan's are read-only."""
    view = np.ascontiguousarray(array, np.int32).view()
    view.flags.writeable = False
    return view
