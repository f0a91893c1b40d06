"""Lines of files -> records with their line numbers, and bad lines with the problem."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from radix_mlp.cli.jobs.input.find import open_sources
from radix_mlp.cli.jobs.input.shorten import shorten
from radix_mlp.cli.jobs.input.source import Source
from radix_mlp.errors import InvalidInputError

__all__ = ["BadLine", "Item", "Read", "Record", "Row", "bad_line_error", "id_problem", "problem_of", "read_items"]
__all__ += ["read_records", "skip_rejected", "text_records", "without_rejected"]

OnSkip = Callable[[str], None]
"""Called with the message of each skipped line; None makes the first bad line an error."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line with valid fields."""

    file: str
    line: int
    fields: dict[str, Any]
    id: str | int | None = None
    last: int = 0
    """The last of its lines; 0 if it has one line."""


@dataclass(frozen=True, slots=True)
class Record:
    """One request: the wanted fields of a line, in the order in which they were asked for."""

    line: int
    values: tuple[str, ...]
    file: str = ""
    id: str | int | None = None
    """The value of the line's id field."""
    group: str | tuple[str, int] | None = None
    """Neighbouring records of one group are kept together: the query, or the line that holds a list."""
    index: int = 0
    """Its place in the list of documents that the line holds."""
    last: int = 0
    """The last of its lines; 0 if it has one line."""


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line, or a row of several lines, that cannot be run."""

    line: int
    reason: str
    file: str = ""
    last: int = 0
    """The last of its lines; 0 if it has one line."""

    @property
    def num_lines(self) -> int:
        """How many lines it covers."""
        return self.last - self.line + 1 if self.last else 1

    def __str__(self) -> str:
        lines = f"{self.line}-{self.last}" if self.last else f"{self.line}"
        return f"{self.file}:{lines}: {self.reason}"


Item = Record | BadLine
Read = Callable[[Sequence[Source]], Iterable[Item]]
"""All items of files, in order; it is sent to the workers of a Ray job."""
AnyRecord = TypeVar("AnyRecord", bound=Record)
Result = TypeVar("Result")


def read_items(
    sources: Iterable[Source],
    fields: Sequence[str],
    problem: Callable[[dict[str, Any]], str | None],
    records: Callable[[Row], Iterator[Record]],
    *,
    also: Sequence[str] = (),
    id_field: str | None = None,
) -> Iterator[Item]:
    """The records of all lines in order, read lazily.

    Args:
        fields: what a line must have; a text file has the first alone.
        problem: returns the problem with a line's fields, or None.
        records: what a good line holds.
        also: fields with a list, one of which may replace the last of `fields`.
        id_field: a field with the name of the line, a string or an integer.

    Raises:
        InvalidInputError: a missing column, or a file that cannot be read.
    """
    columns = fields if id_field is None else (id_field, *fields)
    for source in sources:
        if id_field is not None and source.format == "txt":
            raise InvalidInputError(f"{source.shown}: a text file has no ids. Use JSON lines or CSV for --id-field.")
        for number, found, end in source.rows(columns, also):
            last = end if end > number else 0
            if isinstance(found, str):
                yield BadLine(number, found, source.shown, last)
                continue
            wrong = problem(found) or (None if id_field is None else id_problem(found, id_field))
            if wrong is not None:
                yield BadLine(number, wrong, source.shown, last)
            else:
                name = None if id_field is None else found[id_field]
                yield from records(Row(source.shown, number, found, name, last))


def text_records(
    sources: Sequence[Source],
    fields: tuple[str, ...],
    *,
    id_field: str | None = None,
    may_be_empty: Container[str] = (),
) -> Iterator[Item]:
    """One record per line, with the texts of `fields`."""

    def problem(row: dict[str, Any]) -> str | None:
        return problem_of(row, fields, may_be_empty)

    def records(row: Row) -> Iterator[Record]:
        yield Record(row.line, tuple(row.fields[field] for field in fields), row.file, row.id, last=row.last)

    return read_items(sources, fields, problem, records, id_field=id_field)


def bad_line_error(bad: BadLine) -> InvalidInputError:
    """The error for a bad line if such lines are not skipped."""
    return InvalidInputError(f"{bad}. Mend the line, or leave such lines out with --on-error skip.")


def read_records(
    name: str,
    fields: tuple[str, ...],
    *,
    file_format: str | None = None,
    delimiter: str | None = None,
    on_skip: OnSkip | None = None,
    may_be_empty: Container[str] = (),
) -> list[Record]:
    """Read the string fields `fields` of every line of the input, for commands that need all of it at once.

    Args:
        name: a path, or "-" for standard input; its extension gives the format (JSON lines for "-").
        fields: fields of a JSON line or columns of a table; a text file has one field, the line.
        file_format: one of `FORMATS`, in place of the extension.
        delimiter: what separates the columns of a table.
        on_skip: called for lines that are not valid instead of raising.
        may_be_empty: fields whose empty string is valid.

    Raises:
        InvalidInputError: no such file, an unknown format, a missing column, a bad line (unless `on_skip`), or
            no line at all; names file, line and value.
    """
    sources = open_sources([name], file_format, delimiter=delimiter)
    records: list[Record] = []
    for item in text_records(sources, fields, may_be_empty=may_be_empty):
        if isinstance(item, Record):
            records.append(item)
        elif on_skip is None:
            raise bad_line_error(item)
        else:
            on_skip(str(item))
    if not records:
        raise InvalidInputError(f"{'<stdin>' if name == '-' else name}: not a single text in it.")
    return records


def skip_rejected(
    name: str, records: list[AnyRecord], rejected: list[tuple[int, str]], on_skip: OnSkip | None
) -> list[AnyRecord]:
    """What remains without the records that the engine rejected; an error without `on_skip`."""
    lines = [records[index] for index, _ in rejected]
    found = zip(lines, rejected, strict=True)
    messages = [str(BadLine(record.line, reason, record.file, record.last)) for record, (_, reason) in found]
    if on_skip is None:
        raise InvalidInputError(f"{messages[0]}. Or leave such lines out with --on-error skip.")
    for message in messages:
        on_skip(message)
    bad = {index for index, _ in rejected}
    kept = [record for index, record in enumerate(records) if index not in bad]
    if not kept:
        raise InvalidInputError(f"{'<stdin>' if name == '-' else name}: every line was skipped.")
    return kept


def without_rejected(
    name: str, records: list[AnyRecord], on_skip: OnSkip | None, job: Callable[[list[AnyRecord]], Result]
) -> tuple[list[AnyRecord], Result]:
    """Run `job`; should it reject records (too long, no tokens), name their lines and run it without them."""
    from radix_mlp.errors import RejectedItemsError

    while True:
        try:
            return records, job(records)
        except RejectedItemsError as error:
            records = skip_rejected(name, records, error.rejected, on_skip)


def problem_of(row: dict[str, Any], fields: tuple[str, ...], may_be_empty: Container[str] = ()) -> str | None:
    """The problem with the string fields of a line, if any."""
    for field in fields:
        if field not in row:
            names = ", ".join(map(repr, row)) or "none"
            return f"no field {field!r}; its fields are {shorten(names)} (--field, or the like, says which to read)"
        value = row[field]
        if not isinstance(value, str):
            return f"field {field!r} is not a string: {shorten(json.dumps(value, default=str))}"
        if not value and field not in may_be_empty:
            return f"field {field!r} is empty"
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"field {field!r} is not valid UTF-8 at character {error.start}: {shorten(ascii(value))}"
    return None


def id_problem(row: dict[str, Any], field: str) -> str | None:
    """The problem with the id field of a line, if any."""
    value = row.get(field)
    if isinstance(value, int) and not isinstance(value, bool):
        return None if -(2**63) <= value < 2**63 else f"field {field!r} is an integer of more than 64 bits: {value}"
    return problem_of(row, (field,))
