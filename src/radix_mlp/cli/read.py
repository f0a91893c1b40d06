"""Files of texts -> records, each with its line number; bad lines named and, if wished, skipped."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from radix_mlp.errors import InvalidInputError

__all__ = ["FORMATS", "Record", "problem_of", "read_records", "read_rows", "skip_rejected"]

FORMATS = ("jsonl", "txt", "csv", "tsv")
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "txt", ".csv": "csv", ".tsv": "tsv"}

OnSkip = Callable[[str], None]
"""Gets the message of each bad line that is skipped; None makes the first one an error."""
Row = tuple[int, dict[str, Any] | str]
"""Line number, and the line's fields or what is wrong with it."""


@dataclass(frozen=True)
class Record:
    """The wanted fields of one line."""

    line: int
    values: tuple[str, ...]


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_records(
    name: str,
    fields: tuple[str, ...],
    *,
    file_format: str | None = None,
    on_skip: OnSkip | None = None,
    may_be_empty: Container[str] = (),
) -> list[Record]:
    """Read the string fields `fields` of every line of a file.

    Args:
        name: a path, or "-" for standard input; its extension tells the format (JSON lines for "-").
        fields: fields of a JSON line or columns of a CSV file; a text file has one field, the line.
        file_format: one of `FORMATS`, in place of the extension.
        on_skip: called for lines that are not valid instead of raising.
        may_be_empty: fields whose empty string is valid.

    Raises:
        InvalidInputError: no such file, an unknown format, a missing column, a bad line (unless `on_skip`), or
            no line at all; names file, line and value.
    """

    def problem(row: dict[str, Any]) -> str | None:
        return problem_of(row, fields, may_be_empty)

    rows = read_rows(name, fields, problem, file_format=file_format, on_skip=on_skip)
    return [Record(number, tuple(row[field] for field in fields)) for number, row in rows]


def read_rows(
    name: str,
    fields: tuple[str, ...],
    problem: Callable[[dict[str, Any]], str | None],
    *,
    file_format: str | None = None,
    on_skip: OnSkip | None = None,
) -> list[tuple[int, dict[str, Any]]]:
    """Line numbers and fields of all lines that are valid; arguments and errors as in `read_records`.

    Args:
        fields: what a table must have as columns; a text file has the first alone.
        problem: tells what is wrong with a line's fields, or None.
    """
    shown = "<stdin>" if name == "-" else name
    rows = {"jsonl": _json_rows, "txt": _text_rows, "csv": _csv_rows, "tsv": _tsv_rows}
    reader = rows[_format(name, file_format)]
    if reader is _text_rows and len(fields) > 1:
        raise InvalidInputError(
            f"{shown}: a text file has one field a line, and {' and '.join(fields)} are needed. Use JSON lines or CSV."
        )
    good: list[tuple[int, dict[str, Any]]] = []
    for number, row in reader(_lines(name), fields, shown):
        wrong = row if isinstance(row, str) else problem(row)
        if wrong is None and isinstance(row, dict):
            good.append((number, row))
            continue
        message = f"{shown}:{number}: {wrong}"
        if on_skip is None:
            raise InvalidInputError(f"{message}. Mend the line, or leave such lines out with --skip-bad.")
        on_skip(message)
    if not good:
        raise InvalidInputError(f"{shown}: not a single text in it.")
    return good


def skip_rejected(
    name: str, records: list[AnyRecord], rejected: list[tuple[int, str]], on_skip: OnSkip | None
) -> list[AnyRecord]:
    """What remains without the records that the engine rejected; an error without `on_skip`."""
    shown = "<stdin>" if name == "-" else name
    messages = [f"{shown}:{records[index].line}: {reason}" for index, reason in rejected]
    if on_skip is None:
        raise InvalidInputError(f"{messages[0]}. Or leave such lines out with --skip-bad.")
    for message in messages:
        on_skip(message)
    bad = {index for index, _ in rejected}
    kept = [record for index, record in enumerate(records) if index not in bad]
    if not kept:
        raise InvalidInputError(f"{shown}: every line was skipped.")
    return kept


def _format(name: str, file_format: str | None) -> str:
    if file_format is not None:
        if file_format not in FORMATS:
            raise InvalidInputError(f"--format {file_format!r}: must be one of {', '.join(FORMATS)}.")
        return file_format
    if name == "-":
        return "jsonl"
    if Path(name).is_dir():
        raise InvalidInputError(f"{name}: that is a folder. Give one file.")
    suffix = Path(name).suffix.lower()
    if suffix not in SUFFIXES:
        raise InvalidInputError(
            f"{name}: unknown extension {suffix!r}; known are {', '.join(SUFFIXES)}. Say what it is with --format."
        )
    return SUFFIXES[suffix]


def _lines(name: str) -> Iterator[str]:
    """Lines without their ends; bytes that are not UTF-8 become lone surrogates, which `problem_of` finds."""
    try:
        if name == "-":
            yield from _decoded(sys.stdin.buffer)
        else:
            with open(name, "rb") as file:
                yield from _decoded(file)
    except OSError as error:
        raise InvalidInputError(f"{name}: {error.strerror or error}.") from error


def _decoded(stream: Iterable[bytes]) -> Iterator[str]:
    for place, line in enumerate(stream):
        text = line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", "surrogateescape")
        yield text.removeprefix("\ufeff") if place == 0 else text


def _json_rows(lines: Iterator[str], fields: tuple[str, ...], shown: str) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"not JSON ({error}): {_short(line)}"
            continue
        yield number, value if isinstance(value, dict) else f"not a JSON object: {_short(line)}"


def _text_rows(lines: Iterator[str], fields: tuple[str, ...], shown: str) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        yield number, {fields[0]: line}


def _csv_rows(lines: Iterator[str], fields: tuple[str, ...], shown: str, delimiter: str = ",") -> Iterator[Row]:
    # a quoted cell may hold line ends: the reader needs them back
    # the limit of 131,072 characters a cell is for other uses
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((line + "\n" for line in lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, f"not CSV: {error}"
            continue
        if header is None:
            header = cells
            for field in fields:
                if field not in header:
                    raise InvalidInputError(
                        f"{shown}:1: no column {field!r}; there are {', '.join(map(repr, header))}. Name one of them."
                    )
        elif len(cells) != len(header):
            if cells:
                yield number, f"{len(cells)} cells in a table of {len(header)} columns: {_short(','.join(cells))}"
        else:
            yield number, dict(zip(header, cells, strict=True))


def _tsv_rows(lines: Iterator[str], fields: tuple[str, ...], shown: str) -> Iterator[Row]:
    return _csv_rows(lines, fields, shown, "\t")


def problem_of(row: dict[str, Any], fields: tuple[str, ...], may_be_empty: Container[str] = ()) -> str | None:
    """What is wrong with the string fields of a line, if anything."""
    for field in fields:
        if field not in row:
            names = ", ".join(map(repr, row)) or "none"
            return f"no field {field!r}; its fields are {_short(names)}"
        value = row[field]
        if not isinstance(value, str):
            return f"field {field!r} is not a string: {_short(json.dumps(value))}"
        if not value and field not in may_be_empty:
            return f"field {field!r} is empty"
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"field {field!r} is not valid UTF-8 at character {error.start}: {_short(ascii(value))}"
    return None


def _short(text: str) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 80 else text[:77] + "..."
