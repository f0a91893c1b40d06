"""A line as its reader yields it."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["Line"]


class Line(NamedTuple):
    """A line of a file, or a row of a table, which may be several lines."""

    number: int
    """Of its first line, from 1; in Parquet and JSON arrays, of the row."""
    found: dict[str, Any] | str
    """Its fields, or what is wrong with it."""
    last: int
    """Of its last line."""
