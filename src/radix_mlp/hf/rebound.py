"""A function of a modeling file over globals in which some names are ours."""

from __future__ import annotations

import functools
from types import CellType, FunctionType
from typing import Any

from radix_mlp.errors import UnsupportedModelError

__all__ = ["forget_functions", "rebound"]


@functools.lru_cache(maxsize=256)
def rebound(function: Any, names: tuple[tuple[str, Any], ...]) -> FunctionType:
    """A copy of `function`, in the same decorators, for which global names have other values. Nothing else changes.

    Raises:
        UnsupportedModelError: a decorator keeps the function where it cannot be exchanged.

    Example:
        >>> def twice(x):
        ...     return factor * x
        >>> rebound(twice, (("factor", 2),))(3)
        6
    """
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        return _copy(function, function.__globals__ | dict(names), function.__closure__)
    closure = function.__closure__ or ()
    cells = [CellType(rebound(inner, names)) if cell.cell_contents is inner else cell for cell in closure]
    if all(cell is old for cell, old in zip(cells, closure, strict=True)):
        raise UnsupportedModelError(
            f"{function.__qualname__} has a decorator that cannot be kept on compact rows. Run the model unfolded."
        )
    return _copy(function, function.__globals__, tuple(cells))


def forget_functions() -> None:
    """Make the copies once more: something in the modeling files was replaced."""
    rebound.cache_clear()


def _copy(function: FunctionType, names: dict[str, Any], closure: tuple[CellType, ...] | None) -> FunctionType:
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    return copy
