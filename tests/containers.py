"""The kinds of lists that Python callers hand in, and what is no list."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, ValuesView
from typing import Any

import numpy as np
import pytest


def _pandas(make: Callable[[Any, list[Any]], Any]) -> Callable[[list[Any]], Any]:
    return lambda values: make(pytest.importorskip("pandas"), values)


def _filtered(pd: Any, values: list[Any]) -> Any:
    """A column of which every second row was dropped, in an order that its labels do not have."""
    doubled = pd.Series([value for value in values for _ in (0, 1)], index=range(2 * len(values), 0, -1))
    return doubled[::2]


def _objects(values: list[Any]) -> Any:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _dataset(values: list[Any]) -> Any:
    return pytest.importorskip("datasets").Dataset.from_dict({"text": values})


LISTS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "deque": deque,
    "iterator": iter,
    "generator": lambda values: (value for value in values),
    "map": lambda values: map(copy.copy, values),
    "values of a dictionary": lambda values: dict(enumerate(values)).values(),
    "array of objects": _objects,
    "array": np.array,
    "pandas, labels reversed": _pandas(lambda pd, values: pd.Series(values, index=range(len(values) - 1, -1, -1))),
    "pandas, filtered": _pandas(_filtered),
    "pandas, objects": _pandas(lambda pd, values: pd.Series(values, dtype=object, index=[7] * len(values))),
    "pandas index": _pandas(lambda pd, values: pd.Index(values)),
    "polars": lambda values: pytest.importorskip("polars").Series(values),
    "arrow": lambda values: pytest.importorskip("pyarrow").array(values),
    "arrow, chunked": lambda values: pytest.importorskip("pyarrow").chunked_array([values[:1], values[1:]]),
    "datasets column": lambda values: _dataset(values)["text"],
}
"""Holds the values of a list, in their order."""

NO_LISTS: dict[str, Callable[[list[Any]], Any]] = {
    "string": lambda values: "one text",
    "bytes": lambda values: b"one text",
    "dictionary": lambda values: dict(enumerate(values)),
    "set": lambda values: {"a", "b"},
    "frozen set": lambda values: frozenset({"a", "b"}),
    "None": lambda values: None,
    "number": lambda values: 7,
    "array without dimensions": lambda values: np.array("a"),
    "pandas table": _pandas(lambda pd, values: pd.DataFrame({"text": _objects(values)})),
    "polars table": lambda values: pytest.importorskip("polars").DataFrame({"text": ["a", "b"]}),
    "arrow table": lambda values: pytest.importorskip("pyarrow").table({"text": ["a", "b"]}),
    "data set": lambda values: _dataset(["a", "b"]),
}
"""Has no order, or more than one column, or is one text."""


def kept(container: Any) -> Any:
    """A copy to compare with after a call; None of what can be read once."""
    return None if isinstance(container, Iterator | ValuesView) else copy.deepcopy(container)


def as_values(held: Any) -> Any:
    """What a container holds, in a form that compares by value."""
    if held is None or isinstance(held, str | bytes | int):
        return held
    if hasattr(held, "columns") or hasattr(held, "column_names"):
        return str(held)
    if isinstance(held, dict):
        return [(key, as_values(value)) for key, value in held.items()]
    if getattr(held, "ndim", 1) == 0:
        return held.item()
    if isinstance(held, set | frozenset):
        # a copy may have another order
        return sorted(map(str, held))
    return [as_values(item) for item in held] if hasattr(held, "__iter__") else str(held)
