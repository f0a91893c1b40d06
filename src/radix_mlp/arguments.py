"""Lists that callers hand in, of whatever kind: read once, in their order, or refused by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from radix_mlp.errors import InvalidDtypeError

__all__ = ["items_of", "refuse_tables"]


def items_of(values: Any, name: str) -> list[Any]:
    """The items of a list, tuple, column, array or iterator, in their order, as a list of our own.

    Every public call reads its arguments through this, once: a column of a data frame looks places up by label, and
    an iterator is empty after the first reading. Lists and arrays inside are copied, so that a caller who changes
    one while the call runs changes nothing.

    Args:
        values: list, tuple, iterator or generator; a column of pandas, polars, pyarrow or datasets; a NumPy array
            `[n, ...]` of any dtype.
        name: the argument's name, for the error.

    Raises:
        InvalidDtypeError: a string, bytes, a dictionary, a set, a table, or nothing that has items.

    Example:
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
    """Raise `InvalidDtypeError` for a data frame, a table or a whole data set: which column is meant?"""
    kind = type(values)
    # a data frame of pandas or polars; a table of pyarrow, a data set of datasets
    if hasattr(kind, "columns") or hasattr(kind, "column_names"):
        raise InvalidDtypeError(
            f"{name} must be a list or one column, not a {kind.__name__}: choose a column, as {name}['text']."
        )


def _in_python(values: Any) -> Iterable[Any]:
    """The items as Python's own values where they are texts."""
    if hasattr(values, "to_pylist"):
        # pyarrow's own iterators give scalars of its own
        found: Iterable[Any] = values.to_pylist()
        return found
    if hasattr(values, "tolist") and (values.ndim == 1 or getattr(values.dtype, "kind", "") in "UOT"):
        # NumPy and torch have scalars of their own, too
        listed: Iterable[Any] = values.tolist()
        return listed
    iterable: Iterable[Any] = values
    return iterable


def _own(item: Any) -> Any:
    """`item`, copied where its owner could change it while a call runs."""
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
