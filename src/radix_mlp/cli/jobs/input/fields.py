"""The fields that a command asks for, found among the names of a line or a table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from radix_mlp.cli.jobs.input.shorten import shorten
from radix_mlp.errors import InvalidInputError

__all__ = ["Column", "Fields", "RepeatedNames", "object_of"]

MISSING = object()


class RepeatedNames(dict[str, Any]):
    """A JSON object with repeated names."""

    names: frozenset[str]


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of its names and values (an `object_pairs_hook`)."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeated = RepeatedNames(found)
    repeated.names = frozenset(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
    return repeated


@dataclass(frozen=True)
class Column:
    """Where a table has a field."""

    name: str
    inner: str | None = None
    """The name within the object that the column holds."""


class Fields:
    """The fields that a command reads from each line.

    A name is looked for as it is, then as a path into objects (`data.text`), then without regard to case and blanks
    around it; the last is reported.

    Args:
        shown: the file.
        names: fields that must be there.
        also: fields that may be there in place of the last of `names`; they hold lists.
        guessed: called with a message when a field is not found by its exact name.
    """

    def __init__(self, shown: str, names: Sequence[str], also: Sequence[str], guessed: Callable[[str], None]) -> None:
        self.shown = shown
        self.names = tuple(names)
        self.also = tuple(also)
        self.guessed = guessed
        self.groups = [(name,) for name in names[:-1]] + [(*also, names[-1])]
        """Of each of these one field must be there."""
        self._reported: set[str] = set()

    def of_table(self, columns: Sequence[str], place: str, hint: str = "") -> dict[str, Column]:
        """Field -> its column.

        Args:
            place: of the names of the columns, for messages.
            hint: the end of the message about a missing column.

        Raises:
            InvalidInputError: there is none, or more than one.
        """
        found: dict[str, Column] = {}
        for group in self.groups:
            exact = {field: column for field in group if (column := _exact(columns, field)) is not None}
            similar = {field: Column(names[0]) for field in group if (names := _similar(columns, field))}
            if not (exact or similar):
                raise InvalidInputError(
                    f"{place}: no column {group[-1]!r}; there are {', '.join(map(repr, columns))}. Choose one "
                    f"with --field, or the like{hint}."
                )
            for field, column in (exact or similar).items():
                same = [name for name in columns if name == column.name] if exact else _similar(columns, field)
                if len(same) > 1:
                    shown = repr(field) if exact else f"that are like {field!r}: {', '.join(map(repr, same))}"
                    raise InvalidInputError(f"{place}: {len(same)} columns {shown}. Rename the others.")
            found.update(exact or similar)
        return found

    def report(self, found: Mapping[str, Column]) -> None:
        """Report the columns that have other names than their fields."""
        for field, column in found.items():
            if column.inner is None and column.name != field:
                self._report("column", field, column.name)

    def of_row(self, row: dict[str, Any], found: Mapping[str, Column], *, cells: bool = False) -> dict[str, Any] | str:
        """A row of a table as in `of_line`; with `cells`, lists and objects are JSON in their cell."""
        try:
            for field, column in found.items():
                value = row[column.name]
                if cells and (column.inner is not None or field in self.also):
                    value = _loaded(value)
                if column.inner is not None:
                    value = _find(value, column.inner)
                if value is not MISSING:
                    row[field] = value
        except _RepeatedError as error:
            return str(error)
        return row

    def of_line(self, row: dict[str, Any]) -> dict[str, Any] | str:
        """The JSON object with the fields that it has under their own names, or the problem with it."""
        try:
            for group in self.groups:
                found = {field: value for field in group if (value := _find(row, field)) is not MISSING}
                if not found:
                    for field in group:
                        names = _similar(list(row), field)
                        if len(names) > 1:
                            return f"no field {field!r}, and more than one like it: {', '.join(map(repr, names))}"
                        if names:
                            found[field] = _find(row, names[0])
                            self._report("field", field, names[0])
                row.update(found)
        except _RepeatedError as error:
            return str(error)
        return row

    def _report(self, what: str, field: str, name: str) -> None:
        message = f"{self.shown}: no {what} {field!r}: {shorten(repr(name))} is read in its place"
        if message not in self._reported:
            self._reported.add(message)
            self.guessed(message)


class _RepeatedError(ValueError):
    """A wanted field occurs more than once in its object."""


def _exact(columns: Sequence[str], field: str) -> Column | None:
    if field in columns:
        return Column(field)
    return next((Column(name, inner) for name, inner in _paths(field) if name in columns), None)


def _similar(names: Sequence[str], field: str) -> list[str]:
    wanted = field.strip().casefold()
    return [name for name in names if name.strip().casefold() == wanted]


def _paths(field: str) -> list[tuple[str, str]]:
    """All ways to take a name as that of an object and that of a field in it, the longest object's name first."""
    places = [place for place in range(len(field) - 1, 0, -1) if field[place] == "."]
    return [(field[:place], field[place + 1 :]) for place in places]


def _find(row: Any, field: str) -> Any:
    """The value of a field, or of a path into objects; `MISSING` if there is none."""
    if not isinstance(row, dict):
        return MISSING
    if field in row:
        if isinstance(row, RepeatedNames) and field in row.names:
            raise _RepeatedError(f"field {field!r} occurs more than once")
        return row[field]
    for name, inner in _paths(field):
        if name in row and (value := _find(_find(row, name), inner)) is not MISSING:
            return value
    return MISSING


def _loaded(cell: Any) -> Any:
    """The content of a cell parsed as JSON; the cell itself if it is not JSON."""
    try:
        return json.loads(cell, object_pairs_hook=object_of)
    except (ValueError, RecursionError, TypeError):
        return cell
