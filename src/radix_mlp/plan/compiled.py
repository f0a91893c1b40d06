"""Loops compiled by Numba on their first call and cached on disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

__all__ = ["compiled"]


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled by Numba, which is imported here because the import takes half a second.

    >>> def add(a: int, b: int) -> int:
    ...     return a + b
    >>> compiled(add)(1, 2)
    3
    """
    import numba

    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:
        # there is no writable folder for the cache
        return numba.njit(nogil=True, error_model="numpy")(function)
