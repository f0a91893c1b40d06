"""Reads the lists that callers pass, of any kind, once and in order; anything else is an error that names it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from radix_mlp.errors import InvalidDtypeError

__all__ = ["items_of", "refuse_tables"]


def items_of(values: Any, name: str) -> list[Any]:
    """The items of a list, tuple, column, array or iterator, in order, as a new list.

    Every public call reads its arguments through this function, once: a column of a data frame is indexed by label,
    and an iterator is empty after the first pass. Nested lists and arrays are copied, so changing them while the
    call runs has no effect.

    Args:
        values: list, tuple, iterator or generator; a column of pandas, polars, pyarrow or datasets; a NumPy array
            `[n, ...]` of any dtype.
        name: the argument's name, for the error.

    Raises:
        InvalidDtypeError: a string, bytes, a dictionary, a set, a table, or a value without items.

    Examples:
        >>> items_of((text for text in ("a", "b")), "texts")
        ['a', 'b']
        >>> items_of("one text", "texts")
        Traceback (most recent call last):
        radix_mlp.errors.InvalidDtypeError: texts must be a list, not one string: write ['one text'].
    """
    if type(values) is list:
        return [_own(item) for item in values]
    if isinstance(values, str):
        raise InvalidDtypeError(f"{name} must be a list, not one string: write [{values!r:.60}].")
    if isinstance(values, bytes | bytearray | memoryview):
        raise InvalidDtypeError(f"{name} must be a list, not {type(values).__name__}: decode it, and write [text].")
    if isinstance(values, Mapping):
        raise InvalidDtypeError(f"{name} must be a list, not a {type(values).__name__}: give list({name}.values()).")
    if isinstance(values, set | frozenset):
        raise InvalidDtypeError(
            f"{name} must be a list, not a {type(values).__name__}, which has no order: give sorted({name})."
        )
    refuse_tables(values, name)
    if not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise InvalidDtypeError(f"{name} must be a list, not {values!r:.60}: give one item for each answer.")
    return [_own(item) for item in _in_python(values)]


def refuse_tables(values: Any, name: str) -> None:
    """Raise `InvalidDtypeError` for a data frame, a table or a whole data set, where the column is ambiguous."""
    kind = type(values)
    # a data frame of pandas or polars; a table of pyarrow, a data set of datasets
    if hasattr(kind, "columns") or hasattr(kind, "column_names"):
        raise InvalidDtypeError(
            f"{name} must be a list or one column, not a {kind.__name__}: choose a column, as {name}['text']."
        )


def _in_python(values: Any) -> Iterable[Any]:
    """The items, texts as Python strings."""
    if hasattr(values, "to_pylist"):
        # pyarrow's iterators yield pyarrow scalars
        found: Iterable[Any] = values.to_pylist()
        return found
    if hasattr(values, "tolist") and (values.ndim == 1 or getattr(values.dtype, "kind", "") in "UOT"):
        # NumPy and torch yield scalars of their own, too
        listed: Iterable[Any] = values.tolist()
        return listed
    iterable: Iterable[Any] = values
    return iterable


def _own(item: Any) -> Any:
    """`item`, copied if its owner could change it while a call runs."""
    if isinstance(item, str):
        return item
    if type(item) is tuple:
        return item if all(type(part) is str for part in item) else tuple(map(_own, item))
    if isinstance(item, list):
        return list(item) if all(type(part) is int for part in item[:1]) else [_own(part) for part in item]
    if hasattr(item, "to_list"):
        # a column within a column
        return item.to_list()
    if type(item).__module__ == "numpy" and type(item).__name__ == "ndarray":
        return item.tolist() if item.dtype.kind in "UOT" else item.copy()
    return item
